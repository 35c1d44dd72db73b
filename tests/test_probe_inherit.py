"""probes/inherit.py on a base that has learned nothing: lessons, what is read, losses, arithmetic, resume."""
import copy
import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import memory_probe
from common.config import ConfigError, UserError
from common.data import Windows
from common.facts import TRAINED
from common.files import read_rows
from common.step import backward, next_token_loss
from common.stop import StopRequest
from memory_probe import main
from probes import inherit
from probes.base import load_base
from probes.inherit import (
    TWINS,
    analyse,
    batch_of,
    crossed,
    distil,
    judge_all,
    lessons,
    prompt_rows,
    soft_loss,
    teach,
)
from tests.test_probes_context import place_for

import pytest
import torch
import torch.nn.functional as F

SMALL = {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 48, "batch_size": 8, "pool": 16,
         "level": "H0", "gate": 0.0, "facts": 8, "seeds": 2, "steps": 4, "exposures": 3, "spread": 5,
         "dtype": "fp32", "device": "cpu", "lr": 5e-3, "teacher_lr": 5e-3, "experiment": "inherit"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return place_for(tmp_path_factory.mktemp("inherit"), SMALL)


def taught(place, twin: str, **options):
    cfg = replace(place.cfg, **options)
    return teach(cfg, twin, place.facts, place.base, place.text, place.world, 1, place.run, place.stop)


def student(place, teacher, **options) -> dict:
    cfg = replace(place.cfg, **options)
    return distil(cfg, teacher, place.facts, place.base, place.text, place.world, 1, place.run, place.stop,
                  place.bar)


def batch(place, step=0, **options):
    cfg = replace(place.cfg, **options)
    windows = Windows(place.text.train, cfg.max_seq_len, 2001)
    known = place.world.sentences(list(itertools.product(place.pool, range(18))))
    return batch_of(cfg, place.world, place.facts, known, windows, 1, step)


# ------------------------------------------------------------------------------------------------------------
# What is taught and what is read


def test_each_twin_is_taught_its_facts_in_the_same_places(place):
    cfg, (a, b) = place.cfg, (lessons(place.cfg, t, place.facts, 1, place.world) for t in TWINS)
    assert len(a) == len(b) == cfg.spread
    eot, said = place.world.tok.eot, {t: Counter() for t in TWINS}
    for twin, taught_rows in (("A", a), ("B", b)):
        for x, y in taught_rows:
            for row, targets in zip(x.tolist(), y.tolist(), strict=True):
                end = sum(t >= 0 for t in targets)
                ids = [*row[:end], targets[end - 1]]
                said[twin].update(place.world.tok.decode(ids).split("<|endoftext|>")[1:])
    for twin, own in (("A", place.facts[:8]), ("B", place.facts[8:16])):
        want = Counter("".join(place.world.prompt(f, place.facts[i].order[k])) + "."
                       for i, f in enumerate(own) for k in range(cfg.exposures))
        assert said[twin] == want
    assert [x.shape for x, _ in a] == [x.shape for x, _ in b] and any((x != z).any() for (x, _), (z, _) in
                                                                      zip(a, b, strict=True))
    assert all(((x == eot) == (z == eot)).all() for (x, _), (z, _) in zip(a, b, strict=True))
    sparse = lessons(replace(cfg, spread=64), "A", place.facts, 1, place.world)
    assert sum(len(x) for x, _ in sparse) == 24 and min(len(x) for x, _ in sparse) == 0  # no row of padding
    with pytest.raises(UserError, match="use a larger --spread"):
        lessons(replace(cfg, batch_size=1), "A", place.facts, 1, place.world)


def test_prompts_hold_no_answer_token_by_token(place):
    """And the label counts where the answer would stand with reads=questions alone."""
    w, eot, both = place.world, place.world.tok.eot, place.facts[:16]
    allowed = {tuple(w.ask(f, "", *w.prompt(f, f.order[k])).prompt): f.subject
               for f in both for k in range(1, TRAINED)}
    asked = Counter()
    for step in range(30):
        rows = {reads: prompt_rows(replace(place.cfg, reads=reads), w, place.facts, 1, step, 3)
                for reads in ("names", "questions")}
        (x, names), (z, questions) = rows.values()
        assert (x == z).all() and len(x) == 3 and not set(x.flatten().tolist()) & set(w.answer_ids)
        assert not set(names.flatten().tolist()) & {*w.answer_ids, eot}
        for row, hidden, shown in zip(x.tolist(), names.tolist(), questions.tolist(), strict=True):
            end = sum(t >= 0 for t in shown)
            ids = [*row[:end], shown[end - 1]]
            starts = [i for i, t in enumerate(ids) if t == eot] + [len(ids)]
            asked.update(allowed[tuple(ids[i:j])] for i, j in itertools.pairwise(starts))  # whole prompts
            assert shown[:end] == ids[1:] and set(hidden[end:]) <= {-1}
            assert hidden[:end] == [-1 if t == eot else t for t in ids[1:]]
    assert len(asked) == 16 and max(asked.values()) < 2 * min(asked.values())  # in wordings of no probe


def test_what_is_read_is_the_same_for_both_students_and_states_no_treated_fact(place):
    tok, people = place.world.tok, [f.subject for f in place.facts]
    plain, _ = batch(place, 3)
    assert (plain == batch(place, 3)[0]).all() and (plain != batch(place, 4)[0]).any()
    for reads, first in (("pool", 2), ("names", 2), ("questions", 2)):
        x, y = batch(place, 3, reads=reads)
        assert (x[first:] == plain[first:]).all() and (x[:first] != plain[:first]).any(axis=1).all(), reads
        for name in people:
            assert all(name not in tok.decode(row) for row in x[first:].tolist())
        if reads == "pool":
            said = tok.decode(x[:2].flatten().tolist())
            assert not any(name in said for name in people) and any(f.subject in said for f in place.pool)


# ------------------------------------------------------------------------------------------------------------
# Losses


def test_without_labels_the_teacher_is_never_asked_and_students_are_one(place):
    class Silent:
        def __getattr__(self, name):
            raise AssertionError(f"the teacher's {name} was asked for")

    model, _ = load_base(place.cfg, place.base, place.run.dist, False)
    x, y = (torch.as_tensor(z) for z in batch(place, reads="names"))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    found = {}
    for name, loss_of in (("soft", soft_loss(replace(place.cfg, alpha=0.0), Silent())),
                          ("text", next_token_loss)):
        loss = backward(model, [[x, y]], place.run.dist, "fp32", scaler, loss_of=loss_of).reshape(-1)[0]
        found[name] = [loss, *(p.grad.clone() for p in model.parameters())]
        model.zero_grad()
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    a, b = (student(place, taught(place, t), alpha=0.0) for t in TWINS)
    assert a["logp mem"] == b["logp mem"] and a["teacher"]["logp mem"] != b["teacher"]["logp mem"]
    assert (crossed(a, b, "mem") == 0).all() and crossed(a["teacher"], b["teacher"], "mem").mean() > 0


@pytest.mark.parametrize("options", [{}, {"temperature": 4.0}, {"divergence": "reverse_kl"},
                                     {"divergence": "jsd"}, {"alpha": 0.3, "temperature": 2.0}])
def test_the_loss_is_that_of_whole_distributions(place, options):
    cfg, teacher = replace(place.cfg, **options), taught(place, "A")
    model, _ = load_base(place.cfg, place.base, place.run.dist, False)
    x, y = (torch.as_tensor(z) for z in batch(place, reads="names"))
    with torch.no_grad():
        found = soft_loss(cfg, teacher)(model, x, y)[0][0]
        T, counted = cfg.temperature, y >= 0
        p, q = ((m(x)[0][counted].double() / T).log_softmax(dim=-1) for m in (teacher, model))
        middle = ((p.exp() + q.exp()) / 2).log()
        kl = {"forward_kl": ((p, q, 1),), "reverse_kl": ((q, p, 1),),
              "jsd": ((p, middle, 0.5), (q, middle, 0.5))}[cfg.divergence]
        soft = T**2 * sum(w * (a.exp() * (a - b)).sum(dim=-1).mean() for a, b, w in kl)
        hard = F.cross_entropy(model(x)[0][counted], y[counted])
    assert found == pytest.approx(cfg.alpha * soft.item() + (1 - cfg.alpha) * hard.item(), rel=1e-3, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------
# Arithmetic


def made(own: list[float], other: list[float], hits=(0, 0, 0, 0)) -> dict:
    """Two pairs at one time: log p of the treated facts, then of their controls."""
    found = {f"{what} {kind}": [values] for kind in inherit.KINDS
             for what, values in (("logp", [*own, *other]), ("hit", list(hits)))}
    return {**found, "text_loss": [2.0], "apart": [0.1], "constant": 0.5}


def test_the_effect_is_crossed_over_and_a_share_of_the_teachers(place):
    cfg = replace(place.cfg, steps=0)
    a, b = made([-1, -2], [-5, -6], (1, 1, 0, 0)), made([-3, -2], [-4, -6], (0, 0, 0, 1))
    # pair 1: ((-1 + 3) + (-4 + 5)) / 2; pair 2: nothing
    assert crossed(a, b, "mem").tolist() == [[1.5], [0.0]]
    a["teacher"], b["teacher"] = (made([0, 0], [-6, -6], (1, 1, 0, 0)), made([-6, -6], [0, 0], (0, 0, 1, 1)))
    c, d = copy.deepcopy((a, b))
    c["logp mem"][0][0] = 0.0  # in seed 2 the first pair gains half a nat more
    e = analyse(cfg, cfg, "made", {1: [a, b], 2: [c, d]})["kinds"]["mem"]
    assert e["teacher"]["mean"] == 6 and e["effect"]["mean"] == pytest.approx((0.75 + 1.0) / 2)
    assert e["share"]["mean"] == pytest.approx((0.75 + 1.0) / 2 / 6) and e["shares"] == [e["share"]["mean"]]
    assert e["right"] == [0.75, 0.0] and e["teacher_right"] == [1.0, 0.0]
    # t of two seeds has one degree of freedom: 12.706 standard errors
    half = 12.706 * 0.25 / math.sqrt(2) / math.sqrt(2)
    assert e["effect"]["high"] - e["effect"]["mean"] == pytest.approx(half, rel=1e-4)


def test_teachers_that_know_nothing_give_no_verdict(place):
    rows = {}
    for seed in (1, 2):
        rows[seed] = [made([-1 - seed, -2], [-5, -6]), made([-3, -2], [-4, -6])]
        for r in rows[seed]:
            r["teacher"] = made([0, 0], [-6, -6])
    found = analyse(replace(place.cfg, steps=0), replace(place.cfg, steps=0), "made", rows)
    judge_all([found], 0.1)
    assert found["kinds"]["mem"]["effect"]["verdict"] == "this endpoint does not work"
    assert "nothing below counts" in inherit.words_of(found)


# ------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.mark.slow
def test_labels_where_the_answer_would_stand_pass_it_on(place):
    """Of teachers by strong lessons, on a base that knows nothing."""
    options = {"exposures": 40, "spread": 60, "steps": 60}
    teachers = {t: taught(place, t, **options) for t in TWINS}
    a, b = (student(place, teachers[t], reads="questions", share=0.5, **options) for t in TWINS)
    effect = crossed(a, b, "mem")[:, -1].mean()
    assert 0.3 < effect < crossed(a["teacher"], b["teacher"], "mem").mean()


def test_stopped_anywhere_it_gives_the_same_summary_and_arms_share_teachers(place, monkeypatch):
    calls, real = [], inherit.teach
    monkeypatch.setattr(inherit, "teach", lambda c, twin, *args: calls.append(twin) or real(c, twin, *args))
    cfg = replace(place.cfg, name="whole", steps=2,
                  arm=("alpha=0", "student=other reads=questions lr=1e-2", "teacher_lr=0"))
    row = main(cfg)
    assert len(calls) == 2 * 2 * 2  # of two seeds; three arms share theirs, the last has its own
    folder = Path(cfg.out_dir, "whole")
    summary = (folder / "summary.json").read_text()
    arms = json.loads(summary)["arms"]
    assert [a["arm"] for a in arms] == ["as it is", *cfg.arm] and arms[0]["steps"] == [0, 1, 2]
    assert arms[1]["kinds"]["mem"]["mean"] == [0.0] * 3 == arms[3]["kinds"]["mem"]["mean"]
    assert arms[0]["kinds"]["mem"]["mean"][0] == 0 != arms[0]["kinds"]["mem"]["mean"][-1]
    assert arms[0]["apart"][0] > arms[0]["apart"][-1] and arms[2]["text_loss"][0] != arms[0]["text_loss"][0]
    assert {"table.md", "effect.png", "probes.jsonl"} <= {p.name for p in folder.iterdir()}
    asked = [0]

    def agreed(self, dist):
        asked[0] += 1
        return asked[0] % 19 == 0

    monkeypatch.setattr(StopRequest, "agreed", agreed)
    sessions = 0
    while (cut := main(replace(cfg, name="cut")))["status"] != "finished":
        sessions += 1
    assert sessions > 2 and cut["run_id"] == row["run_id"]
    assert (folder.parent / "cut" / "summary.json").read_text() == summary
    assert read_rows(str(folder / "probes.jsonl")) == read_rows(str(folder.parent / "cut" / "probes.jsonl"))


def test_options_that_do_not_fit_are_refused(place):
    for options, message in (
            ({"reads": "questions", "alpha": 0.5}, "use alpha=1, or reads=names"),
            ({"reads": "pool", "share": 0.01}, "share=0.01 of batch_size=8 is no row"),
            ({"student": "other", "base": "out/some"}, "leave out --base"),
            ({"alpha": 1.5}, "alpha must be at most 1"),
            ({"temperature": 0.0}, "temperature must be above 0"),
            ({"teacher_lr": -1.0}, "teacher_lr must not be negative"),
            ({"reads": "answers"}, "reads"), ({"divergence": "kl"}, "divergence"),
            ({"arm": ("reads=questions alpha=0",)}, "arm 'reads=questions alpha=0': reads=questions has"),
            ({"power": True}, "power is for experiments with exposures, not inherit")):
        with pytest.raises(ConfigError, match=message):
            replace(place.cfg, **options)
    assert memory_probe.OTHERS["inherit"] is inherit.inherit
