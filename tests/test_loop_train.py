"""loop_train.py on a base of 150,000 parameters: moments, orders, causes, resume."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import loop_train
from common.config import ConfigError, UserError
from common.data import open_text
from common.facts import World
from common.files import read_rows
from common.run import finite
from common.stop import StopRequest
from loop_train import LoopConfig, main
from model import LM
from muon import OptimizerConfig, make_optimizer, set_learning_rates
from probes import causes, loop_figures, moments, sketches
from probes.base import architecture, base_config, pool_of
from probes.loops import find_parts, make_loops, order_of, text_of
from tests.conftest import prepare

import numpy as np
import pytest
import torch

SMALL = {"d_model": 48, "n_layers": 2, "n_heads": 2, "max_seq_len": 48, "batch_size": 16, "pool": 32,
         "pool_share": 0.5, "level": "H0", "base_lr": 8e-3, "seeds": 2, "dtype": "fp32", "device": "cpu",
         "lr": 2e-3, "gate": 0.5, "loops": 3, "segment": 4, "cycles": 3, "tail": 1, "questions": 3,
         "own": 6, "shared": 2, "probes": 2, "name": "loops"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A data folder and an out folder with the base that all tests share."""
    root = tmp_path_factory.mktemp("loops")
    return {"data": prepare(root, "topics", "bpe:2000"), "out_dir": str(root / "out")}


def config(place, **options) -> LoopConfig:
    return LoopConfig(**SMALL | place | options)


def plan_of(cfg, seed=1):
    text = open_text(cfg.data)
    world = World(text.tok, cfg.level, cfg.base_seed, cfg.answers)
    return make_loops(cfg, world, pool_of(cfg, world), text, seed), world


# ------------------------------------------------------------------------------------------------------------
# Moments


def trained(optimizer: str, steps: int = 3, seed: int = 1):
    torch.manual_seed(0)
    cfg = OptimizerConfig(optimizer=optimizer, lr=1e-2, schedule="constant")
    model = LM(loop_train.ProbeOptions(d_model=16, n_layers=1, n_heads=2, vocab_size=32, n_tokens=32))
    made = make_optimizer(model, cfg)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        x = torch.randint(32, (4, 9), generator=generator)
        set_learning_rates(made, cfg, step, 100)
        model(x[:, :-1], x[:, 1:])[0].backward()
        made.step()
        made.zero_grad(set_to_none=True)
    return model, made


def same(a: dict, b: dict) -> bool:
    return all(a[part].keys() == b[part].keys() and all(torch.equal(a[part][i], b[part][i]) for i in a[part])
               for part in moments.KEYS)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_states_are_deep_copies_and_come_back_to_the_bit(optimizer):
    model, made = trained(optimizer)
    a = moments.read(made)
    b = moments.read(made)
    assert len(a["first"]) == len(list(model.parameters())) and same(a, b)
    for part in b.values():
        for value in part.values():
            value.add_(1)
    assert same(a, moments.read(made)) and not same(a, b)  # neither the optimiser nor the other copy moved
    moments.write(made, b)
    assert same(b, moments.read(made)) and not same(a, b)
    moments.write(made, a)
    assert same(a, moments.read(made))
    moments.write(made, moments.EMPTY)
    assert all(not v.any() for part in moments.read(made).values() for v in part.values())


def test_mixing_takes_each_moment_from_where_it_is_asked():
    (_, one), (_, two) = trained("adamw"), trained("adamw", steps=5, seed=2)
    now, left = moments.read(one), moments.read(two)
    assert same(moments.mix(now, left, "global", "global"), now)
    assert same(moments.mix(now, left, "loop", "loop"), left)
    assert same(moments.mix(now, None, "loop", "loop"), now)  # a loop's first time
    half = moments.mix(now, left, "zero", "loop")
    assert not half["first"] and half["second"] is left["second"] and float(half["count"][0]) == 5


def test_the_average_corrects_the_bias_of_each_and_of_one_is_the_identity():
    (_, one), (_, two) = trained("adamw", steps=2), trained("adamw", steps=7, seed=2)
    a, b = moments.read(one), moments.read(two)
    betas = moments.betas_of(one)
    assert same(moments.average([a], betas), a)
    mean = moments.average([a, b], betas)
    for part, beta in (("first", 0.9), ("second", 0.95)):  # by the closed form, in double
        x, y = (s[part][0].double() / (1 - beta**n) for s, n in ((a, 2), (b, 7)))
        expected = (x + y) / 2 * (1 - beta**2)
        torch.testing.assert_close(mean[part][0].double(), expected, rtol=1e-5, atol=1e-9)
    assert float(mean["count"][0]) == 2
    mixed = moments.scrambled(mean, 1)
    assert not torch.equal(mixed["first"][0], mean["first"][0])
    assert torch.equal(mixed["first"][0].flatten().sort().values, mean["first"][0].flatten().sort().values)


# ------------------------------------------------------------------------------------------------------------
# What is written when


@pytest.mark.parametrize("order", ["cycle", "shuffled", "random", "reversed", "single", "mixed"])
def test_every_order_writes_each_fact_equally_often_and_controls_never(place, order):
    cfg = config(place, order=order)
    loops, world = plan_of(cfg)
    times = {}
    for at, fact in loops.log:
        times.setdefault((fact.subject, fact.answer), []).append(at)
        loop = loops.loop_at(at)
        assert order == "mixed" or fact.group == "shared" or fact.loop == loop
        assert at < cfg.cycles * cfg.cycle  # the tail writes nothing
    never = {f.subject for f in loops.controls}
    assert not never & {s for s, _ in times} and len(never) == len(loops.written)
    if order in ("cycle", "shuffled", "reversed", "mixed"):
        counts = {len(times[f.subject, f.answer]) for f in [*loops.questions, *loops.written] if f.loop >= 0}
        assert counts == {cfg.exposures * cfg.cycles}
        assert {len(times[f.subject, f.answer]) for f in loops.written if f.group == "shared"} == {
            cfg.exposures * cfg.cycles * cfg.loops}
    if order == "single":
        assert {f.loop for _, f in loops.log if f.group != "shared"} == {0}
    foils = {f.old for f in loops.questions}
    assert not any(f.answer in foils and f.old == f.answer for f in loops.questions)
    for i in range(cfg.questions):  # as many answers as loops, and none of them the foil
        of = [loops.questions[k * cfg.questions + i] for k in range(cfg.loops)]
        assert len({f.answer for f in of}) == cfg.loops and len({f.subject for f in of}) == 1
        assert of[0].old not in {f.answer for f in of}


def test_orders_are_what_they_are_called(place):
    K, n = 3, 40
    by = {o: order_of(config(place, order=o, cycles=n), 1)
          for o in ("cycle", "shuffled", "random", "reversed")}
    assert by["cycle"] == [0, 1, 2] * (n + 1)
    assert all(sorted(by["shuffled"][i:i + K]) == [0, 1, 2] for i in range(0, K * n, K))
    assert by["shuffled"] != by["cycle"]
    assert all(a != b for a, b in zip(by["random"], by["random"][1:], strict=False))
    assert by["reversed"][:60] == by["cycle"][:60] and by["reversed"][60:63] == [2, 1, 0]
    new = order_of(config(place, start="zero"), 1)
    assert new == [0, 1, 2] * 3 + [3] + [0, 1, 2]  # the new loop, then what it costs the others


# ------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def whole(place):
    cfg = config(place, arm=("first=loop second=loop", "order=random"))
    return cfg, main(cfg)


def test_a_run_reports_every_cause_and_outcome(place, whole):
    cfg, row = whole
    table = row["result"]["causes"]
    found = {(e["arm"], e["cause"]): e for e in table}
    assert {"last write", "cue", "free lunch", "redirected"} <= {c for a, c in found if a == "as it is"}
    assert found["as it is", "anticipation of texts"]["control"].startswith("'order=random'")
    assert found["first=loop second=loop", "jolt"]["against"] and ("as it is", "jolt") not in found
    facts = row["result"]["outcomes"]["as it is"]
    assert facts["own facts, right after their loop"]["mean"] > 0.3  # they were learned
    folder = Path(cfg.out_dir, cfg.name)
    assert {"facts.jsonl", "probes.jsonl", "summary.json", "table.md", "effect.png", "arms.png",
            "weights.png"} <= {p.name for p in folder.iterdir()}
    assert json.loads((folder / "summary.json").read_text())["experiment"] == "loops"


class Stopping(StopRequest):
    """Asks to stop after some steps."""

    def __init__(self, after: int):
        super().__init__()
        self.left = after

    def agreed(self, dist) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("stops", [(15, 62), pytest.param((5, 15, 62, 90), marks=pytest.mark.slow)])
def test_interrupted_anywhere_it_gives_the_same_summary(place, whole, monkeypatch, stops):
    cfg, row = whole
    other = replace(cfg, name=f"again{len(stops)}")
    monkeypatch.setattr(causes, "draw", lambda *args: None)
    for after in stops:  # within a segment, at a switch, in the second arm, in the second seed
        monkeypatch.setattr(loop_train, "StopRequest", lambda after=after: Stopping(after))
        assert main(other)["status"] == "stopped"
    monkeypatch.undo()
    assert finite(main(other)["result"]) == finite(row["result"])
    paths = [Path(cfg.out_dir, name, "summary.json") for name in (cfg.name, other.name)]
    assert paths[0].read_text() == paths[1].read_text()


def test_sketches_show_what_the_weights_did(place, whole):
    cfg, _ = whole
    rows = [r for r in read_rows(Path(cfg.out_dir, cfg.name, "probes.jsonl")) if r["part"] == ["as it is", 1]]
    logged = [r for r in rows if "weights" in r]
    assert [r["step"] for r in logged] == list(range(0, cfg.cycle * (cfg.cycles + cfg.tail) + 1, cfg.segment))
    last, first = (list(LM(replace(architecture(cfg, open_text(cfg.data).meta), name=n)).parameters())
                   for n in "ab")
    way = np.subtract(sketches.sketch(last), sketches.sketch(first))  # linear, the same buckets at each call
    exact = torch.cat([(a - b).flatten() for a, b in zip(last, first, strict=True)]).double()
    assert np.allclose(way, sketches.sketch([exact.float()]), atol=1e-4)
    assert abs(np.linalg.norm(way) / exact.norm().item() - 1) < 0.1
    assert [r["step"] for r in rows if "gradients" in r] == [cfg.cycles * cfg.cycle]

    plan, _ = plan_of(cfg)
    found = np.array(sketches.gradients(last_model := LM(architecture(cfg, open_text(cfg.data).meta)), plan,
                                        torch.device("cpu")))
    exact = []
    for x, y in zip(*text_of(plan, torch.device("cpu")), strict=True):
        last_model.zero_grad()
        logits = last_model(x)[0]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
        exact.append(torch.cat([p.grad.flatten() for p in last_model.parameters()]).numpy())
    assert np.abs(loop_figures.cosines(found) - loop_figures.cosines(np.array(exact))).max() < 0.12


def test_what_fades_has_a_half_life(place):
    loops, record = synthetic(place, 1, "nothing", tail=3)
    end, own = loops.cfg.cycles * loops.cfg.cycle, [f.group.startswith("own") for f in loops.written]
    record.facts[:] = record.facts[0]
    record.facts[record.steps >= end] += 2 * 0.5 ** ((record.steps[record.steps >= end, None] - end) / 6)
    lags, values = loop_figures.fading(record, loops)
    assert sum(own) and lags[0] == 0 and abs(values[0] - 2) < 1e-9
    assert loop_figures.half_life(lags, values).startswith("half is gone after 6 steps")
    assert loop_figures.half_life(lags, 1 + lags * 0.0).startswith("100% left")
    found = loop_figures.arriving(record, loops.cfg)
    assert sorted(found) == list(range(1, loops.cfg.cycles + 4))  # not the end, at which none begins
    assert all(abs(v - 4) < 0.5 for v in found.values())


def test_a_path_in_a_plane_has_two_axes():
    turns = np.linspace(0, 6, 40)
    plane = np.linalg.qr(np.random.default_rng(1).normal(size=(50, 2)))[0].T  # (2, 50)
    path = np.stack([3 * np.cos(turns), np.sin(turns)], axis=1)
    found, shares = loop_figures.principal(path @ plane)
    assert abs(shares.sum() - 1) < 1e-9 and shares[0] > shares[1]
    assert np.allclose(np.abs(found[:, 0] - found[0, 0]), np.abs(path[:, 0] - path[0, 0]), atol=0.3)
    steps = np.arange(20)
    circle = np.stack([np.cos(2 * np.pi * steps / 5), np.sin(2 * np.pi * steps / 5)], axis=1)
    left = loop_figures.without_drift(circle + 7 * steps[:, None], 5)  # a turn in five steps, and a drift
    assert np.allclose(left, circle[2:18])


@pytest.mark.slow
def test_two_processes_find_what_one_finds(place):
    """On the cached base, by SGD, whose steps do not magnify what sums differ by in rounding."""
    options = {"seeds": 1, "cycles": 2, "tail": 0, "state": "fresh", "optimizer": "sgd", "lr": 1e-2}
    flags = [f"--{k}={v}" for k, v in (SMALL | place | options | {"name": "two"}).items()]
    main(config(place, **options, name="one"))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    "loop_train.py", *flags], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                   capture_output=True, text=True, timeout=300)
    one, two = (read_rows(Path(place["out_dir"], name, "probes.jsonl")) for name in ("one", "two"))
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for key in ("text", "choices", "facts", "controls"):
        np.testing.assert_allclose(one[-1][key], two[-1][key], atol=2e-3)
        assert np.abs(np.subtract(one[-1][key], one[0][key])).max() > 0.05  # something was learned


def weights(cfg) -> dict:
    return torch.load(Path(cfg.out_dir, cfg.name, "last.pt"), weights_only=True)["model"]


def test_global_moments_are_ordinary_training_to_the_bit_and_others_are_not(place, monkeypatch):
    one = {"seeds": 1, "cycles": 2, "tail": 0}
    monkeypatch.setattr(causes, "draw", lambda *args: None)
    main(cfg := config(place, name="global", **one))
    monkeypatch.setattr(loop_train, "switch", lambda *args: None)
    main(plain := config(place, name="plain", **one))
    monkeypatch.undo()
    main(kept := config(place, name="kept", first="loop", second="loop", **one))
    a, b, c = weights(cfg), weights(plain), weights(kept)
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


def test_loops_train_only_their_part(place, monkeypatch):
    monkeypatch.setattr(causes, "draw", lambda *args: None)
    cfg = config(place, name="parts", seeds=1, cycles=1, tail=0, parts=("0", "not-ffn"), weight_decay=0.0)
    model = LM(replace(cfg, vocab_size=64, n_tokens=64))
    names = dict(model.named_parameters())
    frozen = [{n for n, p in names.items() if any(p is q for q in z)} for z in find_parts(cfg, model)]
    assert all(("trunk.0." in n) != (n in frozen[0]) for n in names)
    assert all((".ff" in n) == (n in frozen[1]) for n in names)
    with pytest.raises(UserError, match="number of a block"):
        main(replace(cfg, name="none", arm=("parts=0 parts=7",)))  # before anything is trained
    assert not Path(cfg.out_dir, "none").exists()
    assert loop_train.changed(cfg, "parts=0 parts=ffn").parts == ("0", "ffn")
    main(one := replace(cfg, parts=("1",), name="block1"))
    base = weights(base_config(architecture(one, open_text(cfg.data).meta)))
    moved = {name for name, value in weights(one).items() if not torch.equal(value, base[name])}
    assert moved and all(name.startswith("trunk.1.") for name in moved)


def test_a_new_loop_begins_with_the_moments_asked_for_and_shares_what_came_before(place, monkeypatch):
    monkeypatch.setattr(causes, "draw", lambda *args: None)
    arms = ("start=average", "start=zero")
    cfg = config(place, name="new", first="loop", second="loop", start="last", arm=arms, seeds=1, cycles=2)
    found = main(cfg)["result"]["outcomes"]
    assert set(found) == {"as it is", *arms}
    assert len({e["new facts, at the end of their loop"]["mean"] for e in found.values()}) == 3
    rows = read_rows(f"{cfg.out_dir}/new/probes.jsonl")
    begun = {a: min(r["step"] for r in rows if r["part"][0] == a) for a in found}
    assert begun == {"as it is": 0, arms[0]: cfg.new_at, arms[1]: cfg.new_at}
    alone = replace(cfg, name="alone", start="zero", arm=())  # it is what a run of its own would give
    again = main(alone)["result"]["outcomes"]["as it is"]
    assert again == found["start=zero"]


@pytest.mark.parametrize("options, words", [
    ({"second": "zero"}, "first=zero"), ({"optimizer": "sgd", "second": "loop"}, "no second moment"),
    ({"level": "H3"}, "one token"), ({"start": "average"}, "--first=loop"), ({"phases": (1.5,)}, "phases"),
    ({"loops": 1}, "loops"), ({"probes": 9}, "probes"), ({"start": "zero", "own": 0}, "own"),
    ({"arm": ("lr=x",)}, "arm 'lr=x'"), ({"start": "zero", "order": "mixed"}, "mixed")])
def test_options_that_make_no_sense_are_refused(place, options, words):
    with pytest.raises(ConfigError, match=words):
        config(place, **options)


# ------------------------------------------------------------------------------------------------------------
# Causes: planted ones are named, absent ones are not


def synthetic(place, seed: int, plant: str, **options):
    """Rows of a run in which one thing happens, and noise."""
    cfg = config(place, **options)
    loops, _ = plan_of(cfg, seed)
    rng, rows, K, Q = np.random.default_rng(seed), [], cfg.loops, cfg.questions
    for step in sorted(loops.asks):
        noise = rng.normal(size=(Q, K + 1)) * 0.02 - 5
        text = rng.normal(size=K) * 0.02 + 4
        since = step % cfg.segment
        last = {f.pair: f.loop for at, f in loops.log if at < step and f.old}
        if plant == "last write":
            for q, k in last.items():
                noise[q, k] += 2
        if plant == "jolt":  # all texts suffer as a segment begins, then return
            text += 0.5 * (since == 2)
        if plant == "anticipation":  # a text gets easier as its turn comes nearer
            for k in range(K):
                text[k] += 0.3 * abs((step - k * cfg.segment) / cfg.cycle % 1 - 0.5) * -2
        row = {"part": ["as it is", seed], "step": step, "choices": noise.tolist(),
               "guess": [last.get(q, -1) for q in range(Q)], "text": text.tolist(),
               "facts": (rng.normal(size=len(loops.written)) * 0.02 - 5).tolist(),
               "controls": (rng.normal(size=len(loops.written)) * 0.02 - 5).tolist()}
        if step in loops.cues:
            found = rng.normal(size=(K, Q, K + 1)) * 0.02 - 5
            for k in range(K if plant == "cue" else 0):
                found[k, :, k] += 1
            row["cue"] = found.tolist()
        rows.append(row)
    rows.append({**rows[-1], "step": loops.length + 1})
    return loops, causes.record(loops, rows)


@pytest.mark.parametrize("plant", ["last write", "cue", "jolt", "anticipation", "nothing"])
def test_a_planted_cause_is_named_and_no_other(place, plant):
    options = {"as it is": {"first": "zero", "second": "zero"}, "carried": {},
               "order=random": {"order": "random"}}
    arms, made = {label: config(place, **o) for label, o in options.items()}, {}
    for label, o in options.items():
        planted = plant if label == "as it is" or plant in ("last write", "cue") else "nothing"
        made[label] = {s: synthetic(place, s, planted, **o) for s in range(1, 6)}
    loops, records = ({a: {s: made[a][s][i] for s in made[a]} for a in arms} for i in range(2))
    table = causes.decide(arms["as it is"], arms, loops, records)
    found = {e["cause"]: e["verdict"] for e in table if e["arm"] == "as it is"}
    expected = {"last write": "last write", "cue": "cue", "jolt": "jolt",
                "anticipation": "anticipation of texts"}
    yes = {cause for cause, verdict in found.items() if verdict == "yes"}
    assert yes == ({expected[plant]} if plant in expected else set()), found
    if plant == "jolt":  # without the control there is no verdict
        alone = causes.decide(arms["as it is"], {"as it is": arms["as it is"]}, loops, records)
        assert next(e["verdict"] for e in alone if e["cause"] == "jolt").startswith("undecided")


def test_a_loop_that_never_comes_is_left_out(place):
    options = {"order": "random", "loops": 6, "cycles": 1, "tail": 0}
    cfg, made = config(place, **options), {s: synthetic(place, s, "nothing", **options) for s in (1, 2, 3)}
    assert any(len(set(loops.order)) < 6 for loops, _ in made.values())
    loops, records = ({"as it is": {s: made[s][i] for s in made}} for i in range(2))
    found, _ = causes.compare(cfg, {"as it is": cfg}, loops, records)
    assert abs(found["as it is"]["loss on a loop's text as it begins"]["mean"] - 4) < 0.1
    causes.decide(cfg, {"as it is": cfg}, loops, records)


def test_the_toy_recovers_in_a_cycle_and_not_shuffled():
    found = loop_train.main(LoopConfig(toy=True, seeds=3))["result"]
    assert min(found["recovery"]["cycle"]) > 0.25 and max(found["recovery"]["shuffled"]) < 0.15
    losses, visits = causes.toy_losses(1, False, tasks=3, width=4, steps=200, cycles=2)
    assert visits == [0, 1, 2] * 2 and all(losses[i, k] == losses[i].min() for i, k in enumerate(visits))
