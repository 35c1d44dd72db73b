"""probes/context.py and the context rows of probes/base.py, on a base that has learned nothing:
prompts, losses, arithmetic, exact resume."""
import itertools
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

from common.config import ConfigError, UserError
from common.data import open_text
from common.distributed import Dist
from common.facts import TRAINED, World, make_facts
from common.files import read_rows
from common.run import digest
from common.stop import StopRequest
from memory_probe import ProbeConfig, changed, main
from model import LM
from probes import context
from probes.base import (
    GATE_NAMES,
    NAMES,
    architecture,
    base_config,
    context_batch,
    context_names,
    context_probes,
    make_base,
)
from probes.context import (
    asked,
    at_distances,
    baking_loss,
    crossing,
    doublings,
    facts_of,
    hand_over,
    interpolate,
    lesson,
    margins,
    needed,
    statement,
)
from probes.effects import describe
from tests.conftest import prepare

import numpy as np
import pytest
import torch
import torch.nn.functional as F

SMALL = {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 96, "batch_size": 8, "pool": 16,
         "level": "H0", "context_share": 0.5, "gate": 0.0, "facts": 8, "seeds": 2, "steps": 6, "exposures": 3,
         "distances": (0, 11), "dtype": "fp32", "device": "cpu", "lr": 5e-3, "experiment": "handover"}


def place_for(root, options: dict) -> SimpleNamespace:
    """Everything that a loop needs, with a base that has learned nothing (its gate is 0)."""
    cfg = ProbeConfig(**options, data=prepare(root, "topics", "bpe:2000"), out_dir=str(root / "out"))
    text = open_text(cfg.data)
    cfg = architecture(cfg, text.meta)
    world, dist = World(text.tok, cfg.level, cfg.base_seed), Dist(0, 1, torch.device("cpu"))
    pool = make_facts(world, "pool", cfg.pool, cfg.base_seed)
    stop = SimpleNamespace(agreed=lambda dist: False)
    bar = SimpleNamespace(tick=lambda seconds: None, show=lambda text: None)
    base = make_base(base_config(cfg), text, world, pool, dist, stop)
    return SimpleNamespace(cfg=cfg, text=text, world=world, pool=pool, base=base, stop=stop, bar=bar,
                           facts=facts_of(cfg, world, 1, text), run=SimpleNamespace(dist=dist, seconds=0.0))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return place_for(tmp_path_factory.mktemp("context"), SMALL)


def train(place, mode: str, base=None, **options) -> dict:
    cfg = replace(place.cfg, **options)
    return hand_over(cfg, mode, place.facts, base or place.base, place.text, place.world, place.run,
                     place.stop, place.bar)


def contains(ids: list[int], part: list[int]) -> bool:
    return any(ids[i:i + len(part)] == part for i in range(len(ids) - len(part) + 1))


# ------------------------------------------------------------------------------------------------------------
# The base


def test_context_rows_can_only_be_answered_by_reading(place):
    cfg, world, tok = base_config(place.cfg), place.world, place.text.tok
    people, others = context_names(world, place.pool, 1)
    assert (len(set(people)), len(set(others))) == (NAMES, GATE_NAMES)
    assert not set(people) & set(others) and not {f.subject for f in place.pool} & {*people, *others}
    assert not {f.subject for f in place.facts} & set(people)
    x, y = context_batch(world, people, 16, 3, cfg)
    assert (x == context_batch(world, people, 16, 3, cfg)[0]).all() and (y >= 0).mean() > 0.6
    assert (x != context_batch(world, people, 16, 4, cfg)[0]).any()
    answers = {name: [] for name in people[:8]}  # one in a row, another one in other rows
    for row, name in itertools.product(context_batch(world, people[:8], 64, 0, cfg)[0].tolist(), answers):
        said = [s.removesuffix(".").split()[-1] for s in tok.decode(row).split("<|endoftext|>")
                if name in s and s.endswith(".")]
        assert len(set(said)) <= 1
        answers[name] += set(said)
    assert all(len(set(a)) > 4 for a in answers.values())
    for p in context_probes(world, others):
        assert contains(p.prompt, p.target) and len(p.prompt) + len(p.target) < 130
        *context, question = tok.decode(p.prompt).split("<|endoftext|>")
        stated = [s for s in context if next(n for n in others if n in question) in s]
        assert len(stated) == 1 and stated[0].endswith(tok.decode(p.target) + ".")


def test_a_base_without_context_rows_keeps_the_name_it_had_before_the_option(place):
    cfg = replace(place.cfg, experiment="retention", context_share=0.0)
    base = base_config(cfg)
    free = ("context_share", "name", "out_dir", "device", "dtype", "compile", "save_minutes",
            "micro_batch_size")
    named = {k: v for k, v in asdict(base).items() if k not in free}
    assert base.name == f"base_{digest(named)}" != base_config(place.cfg).name
    with pytest.raises(ConfigError, match="--context_share=0.5"):
        replace(cfg, experiment="handover")
    with pytest.raises(ConfigError, match="more than a batch"):
        replace(cfg, context_share=0.8)


# ------------------------------------------------------------------------------------------------------------
# Prompts and losses


def test_prompts_hold_what_they_say_and_ask_in_a_held_out_wording(place):
    world, n = place.world, len(place.facts) // 3
    for fact, control in zip(place.facts[:n], place.facts[n:], strict=False):
        own, other = statement(world, fact), statement(world,
                                                       replace(fact, answer=world.another(fact.answer)))
        probes = {kind: asked(world, fact, kind) for kind in context.ASKED}
        question = probes["none"].prompt
        assert probes["true"].prompt == own + question
        assert probes["weights"].prompt == probes["prompt"].prompt == other + question
        assert probes["weights"].target == probes["true"].target == probes["none"].target
        assert probes["weights"].target != probes["prompt"].target
        assert question[1:] == world.encode(world.prompt(fact, fact.order[TRAINED])[0])
        assert control.subject not in world.tok.decode(own + question)
        assert len(asked(world, control, "true").prompt) == len(probes["true"].prompt)


def test_lessons_have_the_same_targets_with_and_without_the_statement(place):
    world, treated = place.world, place.facts[:8]
    (x, y), (long, marks) = (lesson(world, treated, 3, prompted) for prompted in (False, True))
    assert (y[y >= 0] == marks[marks >= 0]).all() and (y >= 0).sum(dim=1).tolist() == [1] * 8
    for row, fact in enumerate(treated):
        assert world.tok.decode([int(y[row].max())]).strip() == fact.answer.strip()
        assert contains(long[row].tolist(), statement(world, fact)[:-1])
        assert not contains(x[row].tolist(), statement(world, fact)[:-1])
        end, long_end = int(y[row].argmax()) + 1, int(marks[row].argmax()) + 1
        assert x[row, :end].tolist() == long[row, long_end - end:long_end].tolist()  # the same question


def test_at_distances_pairs_differ_in_names_alone(place):
    world, cfg, n = place.world, place.cfg, 8
    probes = at_distances(cfg, place.facts, world, place.text, 1)
    assert len(probes) == 2 * len(cfg.distances) * 2 * n * 2
    grid = np.arange(len(probes)).reshape(2, len(cfg.distances), 2 * n, 2)
    for (k, d), i in itertools.product(np.ndindex(2, len(cfg.distances)), range(2 * n)):
        own, partner = (probes[j] for j in grid[k, d, i])
        stated = [statement(world, place.facts[j]) for j in (i, (i + n) % (2 * n))]
        assert own.target == partner.target and len(own.prompt) == len(partner.prompt)
        rest = own.prompt[len(stated[0]):]
        assert own.prompt[:len(stated[0])] == stated[0] and partner.prompt == stated[1] + rest
        question = asked(world, place.facts[i], "none").prompt
        assert rest[cfg.distances[d]:] == question and len(rest) == cfg.distances[d] + len(question)
    with pytest.raises(UserError, match="--max_seq_len="):
        at_distances(replace(cfg, distances=(90,)), place.facts, world, place.text, 1)


def test_baking_loss_is_the_kl_divergence_and_zero_for_the_same_prompt(place):
    torch.manual_seed(0)
    model, teacher = LM(place.cfg), LM(place.cfg)
    x, y = lesson(place.world, place.facts[:8], 2, prompted=False)
    with torch.no_grad():
        target = teacher(x)[0][y >= 0] * 20
    plain = F.kl_div(model(x)[0][y >= 0].log_softmax(-1), target.log_softmax(-1), log_target=True,
                     reduction="batchmean")
    loss, _ = baking_loss(target)(model, x, y)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5) and loss > 0.1
    for a, b in zip(*(torch.autograd.grad(z, list(model.parameters())) for z in (loss, plain)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    with torch.no_grad():
        own = model(x)[0][y >= 0]
    loss, _ = baking_loss(own)(model, x, y)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert max(g.abs().max() for g in torch.autograd.grad(loss, list(model.parameters()))) < 1e-6


# ------------------------------------------------------------------------------------------------------------
# Handover


def test_training_moves_treated_facts_and_nothing_moves_at_a_rate_of_0(place):
    still = train(place, "ce", lr=0.0, weight_decay=0.0)
    for key, curve in still.items():
        assert key in ("steps", "constant") or all(c == curve[0] for c in curve), key
    row = train(place, "ce", steps=60)
    gained = context.changes(row, "none")  # beyond controls
    assert row["steps"] == [0, 1, 2, 4, 8, 16, 32, 60] and (gained[:, 0] == 0).all()
    assert gained[:, -1].mean() > 0.7 and describe([gained[:, -1]], 0.1)["p"] < 0.05
    half = train(place, "ce", steps=16)  # constant rate: the same beginning
    assert half["logp none"] == row["logp none"][:6]


def test_kl_moves_the_model_towards_its_prompted_self(place):
    """The teacher answers when it sees the statement: trained to, on the prompts."""
    model, world = LM(place.cfg), place.world
    model.load_state_dict(place.base["model"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(50):
        optimizer.zero_grad()
        x, y = lesson(world, place.facts[:8], step, prompted=True)
        model(x, y)[0].backward()
        optimizer.step()
    row = train(place, "kl", base=place.base | {"model": model.state_dict()}, steps=40, lr=2e-3)
    before, after, prompted = (np.mean(row[key][t][:8]) for key, t in (
        ("logp none", 0), ("logp none", -1), ("logp true", 0)))
    assert prompted > before + 0.3 and after > before + 0.5 * (prompted - before)


def test_margins_equal_a_forward_pass_for_each_contradiction(place):
    row, model = train(place, "ce", steps=1), LM(place.cfg)
    model.load_state_dict(place.base["model"])
    model.eval()
    for i, fact in enumerate(place.facts[:16]):
        probes = [asked(place.world, fact, kind) for kind in ("weights", "prompt")]
        with torch.no_grad():
            logits = model(torch.tensor([probes[0].prompt]))[0][0, -1]
        expected = logits[probes[0].target[0]] - logits[probes[1].target[0]]
        assert margins(row).transpose(2, 0, 1).reshape(2, -1)[0, i] == pytest.approx(expected.item(),
                                                                                     abs=1e-4)


def test_needed_context_and_crossings_by_hand():
    with_, without = np.array([1.0, 1.0, 0.5, 0.95, 0.1]), np.array([0.0, 0.5, 0.2, 0.92, 0.3])
    assert needed(with_, without, 0.9).tolist() == pytest.approx([0.9, 0.8, 1.0, 0.0, 1.0])
    curve = np.array([0.0, -1.0, 1.0, 3.0, 2.0])
    assert [crossing(curve, g) for g in (0.0, 0.5, 2.0, 3.0, 4.0)] == [0.0, 1.75, 2.5, 3.0, math.inf]
    curves = np.array([[0.0, 4.0, 8.0], [2.0, 4.0, 6.0]])
    assert interpolate(curves, 1.5).tolist() == [6.0, 5.0] and interpolate(curves, 2.0).tolist() == [8.0, 6.0]
    assert doublings(6) == [0, 1, 2, 4, 6] and doublings(8) == [0, 1, 2, 4, 8] and doublings(1) == [0, 1]


# ------------------------------------------------------------------------------------------------------------
# The whole


@pytest.mark.parametrize("experiment", ["handover", pytest.param("incontext", marks=pytest.mark.slow)])
def test_a_run_that_lost_parts_resumes_to_the_same_summary(place, experiment, monkeypatch):
    cfg = replace(place.cfg, experiment=experiment, name=experiment)
    row, folder = main(cfg), Path(place.cfg.out_dir, experiment)
    summary, rows = (folder / "summary.json").read_text(), (folder / "probes.jsonl").read_text()
    assert row["status"] == "finished" and {"table.md", "effect.png"} <= {p.name for p in folder.iterdir()}
    assert "this endpoint does not work" in (folder / "table.md").read_text()  # the base cannot read
    cut = folder.with_name(f"{experiment}_cut")
    shutil.copytree(folder, cut)
    (cut / "probes.jsonl").write_text(rows.splitlines(keepends=True)[0])
    (cut / "summary.json").unlink()
    monkeypatch.setattr(StopRequest, "agreed", lambda self, dist: True)
    assert main(replace(cfg, name=cut.name))["status"] == "stopped"
    monkeypatch.undo()
    main(replace(cfg, name=cut.name))
    assert (cut / "summary.json").read_text() == summary and (cut / "probes.jsonl").read_text() == rows


def test_arms_need_not_fit_each_other(place):
    cfg = replace(place.cfg, arm=("window=8", "mixer=lstm pos=none"))
    assert changed(cfg, cfg.arm[1]).mixer == "lstm" and changed(cfg, cfg.arm[0]).window == 8


def test_an_arm_below_its_gate_has_no_verdict_and_others_go_on(place):
    high = "gate=1.0 base_steps=1"
    cfg = replace(place.cfg, experiment="incontext", name="gates", seeds=1, arm=(high, "lr=0"))
    result = main(cfg)["result"]
    assert list(result["failed"]) == [high] and len(result["arms"]) == 2
    assert "this endpoint does not work" in result["failed"][high]
    still = [p for p in result["arms"][1]["places"] if p["where"] == "weights"]
    assert len(still) == 3 and all(p["mean"] == 0 for p in still)  # with a rate of 0 twins are one model
    moved = [p["mean"] for p in result["arms"][0]["places"] if p["where"] == "weights"]
    assert all(m != 0 for m in moved)
    rows = read_rows(f"{cfg.out_dir}/gates/probes.jsonl")
    assert {tuple(r["part"]) for r in rows} == {(arm, 1, part) for arm in ("as it is", "lr=0")
                                                for part in context.PARTS}
