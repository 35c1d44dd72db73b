"""memory_probe.py on a base of 150,000 parameters: signs of a right implementation, controls, resume."""
import copy
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import memory_probe
from common import probing, stats
from common.config import ConfigError, UserError
from common.data import open_text
from common.facts import World, make_facts, make_pairs
from common.files import read_rows
from common.stop import StopRequest
from memory_probe import ProbeConfig, changed, main, probe_steps, schedule
from model import load_model
from probes import base as base_module
from probes.report import analyse, table_of, twin_effects
from tests.conftest import prepare

import numpy as np
import pytest
import torch

SMALL = {"d_model": 48, "n_layers": 2, "n_heads": 2, "max_seq_len": 48, "batch_size": 16, "pool": 32,
         "pool_share": 0.5,
         "level": "H0", "base_lr": 8e-3, "facts": 8, "spread": 16, "steps": 20, "lead": 3, "seeds": 2,
         "dtype": "fp32",
         "device": "cpu", "lr": 2e-3}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A data folder and an out folder with the base that all tests share."""
    root = tmp_path_factory.mktemp("memory")
    return {"data": prepare(root, "topics", "bpe:2000"), "out_dir": str(root / "out")}


def config(place, **options) -> ProbeConfig:
    return ProbeConfig(**SMALL | place | options)


def effects_of(place, cfg, kind="mem"):
    rows = read_rows(f"{cfg.out_dir}/{cfg.name}/probes.jsonl")
    table = table_of(rows, "as it is", kind)
    steps = sorted(next(iter(table.values())))
    return steps, twin_effects(table, steps)


@pytest.fixture(scope="module")
def retention(place):
    cfg = config(place, name="retention", arm=("lr=0",))
    return cfg, main(cfg)


def test_the_effect_is_there_where_it_must_be_and_nowhere_else(place, retention):
    cfg, row = retention
    groups = [row["result"]["arms"][0]["groups"], row["result"]["arms"][1]["groups"]]
    first = {g: {k: next(iter(v["at"].values()))["mean"] for k, v in entry["kinds"].items()}
             for g, entry in groups[0].items()}
    assert first["heavy"]["mem"] > first["duplicated"]["mem"] > first["once"]["mem"]
    assert first["heavy"]["mem"] > 2 and first["heavy"]["qa"] > 1 and abs(first["heavy"]["reverse"]) < 1
    assert first["duplicated"]["mem"] > first["duplicated"]["para"] > 0.2  # trained wording above the other
    assert abs(first["zero"]["mem"]) < 0.5
    assert row["result"]["arms"][0]["gate"]["passed"] and not row["result"]["arms"][0]["rises_before"]
    for entry in groups[1].values():  # with a rate of 0 twins are one model
        assert all(v == 0 for kind in entry["kinds"].values() for v in kind["mean"])
    assert not row["result"]["arms"][1]["gate"]["passed"]
    assert "this endpoint does not work" in Path(cfg.out_dir, cfg.name, "table.md").read_text()
    begun = {twin: min(r["step"] for r in read_rows(f"{cfg.out_dir}/{cfg.name}/probes.jsonl")
                       if r["part"][2] == twin) for twin in ("A", "B")}
    assert begun == {"A": 0, "B": cfg.lead}  # a second twin costs what follows the injection
    assert {"facts.jsonl", "probes.jsonl", "summary.json", "table.md", "effect.png"} <= set(
        p.name for p in Path(cfg.out_dir, cfg.name).iterdir())


def test_a_higher_rate_and_more_exposures_leave_more(place):
    found = {}
    for options in ({"lr": 5e-4}, {"lr": 2e-3}):
        cfg = config(place, name=f"rate{options['lr']}", seeds=1, steps=2, chaos_seeds=0,
                     experiment="frequency",
                     spread=32, **options)
        found[options["lr"]] = {g: next(iter(e["kinds"]["mem"]["at"].values()))["mean"]
                                for g, e in main(cfg)["result"]["arms"][0]["groups"].items()}
    assert found[2e-3]["x16"] > found[5e-4]["x16"] > 0.1
    for nats in found.values():  # by halves, since a group is eight facts and one seed
        assert sum(nats[f"x{n}"] for n in (8, 16, 32)) / 3 > sum(nats[f"x{n}"] for n in (1, 2, 4)) / 3 + 0.3


def one_step_plan(cfg):
    return ["heavy"] * 8, {0: [(pair, 0) for pair in range(8)]}, 1


def test_plain_sgd_jumps_exactly_one_step_after_the_exposure(place, monkeypatch):
    monkeypatch.setattr(memory_probe, "schedule", one_step_plan)
    monkeypatch.setattr(memory_probe, "probe_steps", lambda cfg,
                        plan: {s: False for s in range(cfg.lead + 6)})
    cfg = config(place, name="sgd", optimizer="sgd", beta1=0.0, lr=0.1, grad_clip=0.0, seeds=1,
                 chaos_seeds=0)  # at 0.02 the drift of later steps could hide the peak, by rounding
    main(cfg)
    steps, effects = effects_of(place, cfg)
    curve = effects[1].mean(axis=0)
    assert (curve[:cfg.lead + 1] == 0).all() and curve[cfg.lead + 1] > 0.02
    assert np.argmax(curve) == cfg.lead + 1, curve


# ------------------------------------------------------------------------------------------------------------
# Probing


def test_scores_equal_one_forward_pass_per_probe(place, retention):
    text = open_text(place["data"])
    model, _ = load_model(next(str(p) for p in Path(place["out_dir"]).glob("base_*")))
    world = World(text.tok, "H0", 1)
    probes = [p for f in make_pairs(world, 12, 5, make_facts(world, "pool", 32, 1)) for p in world.probes(f)]
    scores = probing.score(model, probing.batches(probes, text.tok.eot, "cpu"), world.answer_ids)
    for i, p in enumerate(probes):
        with torch.no_grad():
            logits = model(torch.tensor([p.prompt + p.target]))[0][0].log_softmax(dim=-1)  # (T, V)
        own = logits[len(p.prompt) - 1:-1]
        logp = own[torch.arange(len(p.target)), p.target]
        assert scores.logp[i] == pytest.approx(logp.sum().item(), abs=1e-4)
        assert scores.hit[i] == (own.argmax(dim=-1) == torch.tensor(p.target)).all()
        answers = own[0][world.answer_ids]
        assert scores.guess[i] == answers.argmax() and scores.rank[i] == (answers > logp[0]).sum()
        assert scores.confidence[i] == pytest.approx(own[0].exp().max().item(), abs=1e-5)


def test_an_untrained_model_guesses(place):
    text = open_text(place["data"])
    world = World(text.tok, "H0", 1)
    facts = make_pairs(world, 64, 5)
    probes = [p for f in facts for p in world.probes(f) if p.kind == "mem"]
    torch.manual_seed(0)
    model = base_module.LM(base_module.architecture(config(place), text.meta))
    scores = probing.score(model, probing.batches(probes, text.tok.eot, "cpu"), world.answer_ids)
    right = sum(world.answers[int(g)] == f.answer for g, f in zip(scores.guess, facts, strict=True))
    assert stats.hits_above_chance(right, len(facts), 1 / 16) > 0.001


# ------------------------------------------------------------------------------------------------------------
# Twins, resume, leaks


def test_only_this_twins_facts_are_in_its_batches(place, monkeypatch):
    """Controls never stand in a batch of A, treated facts never in one of B, spares nowhere."""
    seen, part = {}, memory_probe.Part
    real = memory_probe.backward

    def spy(net, batches, *args, **kwargs):
        seen.setdefault(current[0], []).extend(row for x, _ in batches for row in x.tolist())
        return real(net, batches, *args, **kwargs)

    current = [""]
    monkeypatch.setattr(memory_probe, "backward", spy)
    monkeypatch.setattr(memory_probe, "Part", lambda *a: current.__setitem__(0, a[2]) or part(*a))
    cfg = config(place, name="batches", seeds=1, steps=2)
    main(cfg)
    text = open_text(place["data"])
    rows = read_rows(f"{cfg.out_dir}/{cfg.name}/facts.jsonl")
    for twin, trained in (("A", "treated"), ("chaos", "treated"), ("B", "control")):
        flat = " ".join(text.tok.decode(row) for row in seen[twin])
        for split in ("treated", "control", "spare"):
            inside = [r["subject"] in flat for r in rows if r["split"] == split and r["group"] != "zero"]
            assert all(inside) if split == trained else not any(inside), (twin, split)


def run_in_sessions(cfg, monkeypatch, every: int) -> dict:
    """Stopped after every `every` steps, as by SIGTERM, until it ends."""
    asked = [0]

    def agreed(self, dist):
        asked[0] += 1
        return asked[0] % every == 0

    monkeypatch.setattr(StopRequest, "agreed", agreed)
    for _ in range(1000):
        row = main(cfg)
        if row["status"] == "finished":
            return row
    raise AssertionError("it never ends")


def test_stopped_anywhere_in_any_order_gives_the_same_summary(place, monkeypatch):
    options = {"experiment": "continual", "method": "ewc", "cohorts": 2, "spread": 8, "steps": 5}
    whole = main(config(place, name="whole", **options))
    summary = Path(place["out_dir"], "whole", "summary.json").read_text()
    cut = run_in_sessions(config(place, name="cut", **options), monkeypatch, 11)
    monkeypatch.undo()
    assert Path(place["out_dir"], "cut", "summary.json").read_text() == summary
    assert cut["result"] == whole["result"]
    logged = [[(r["part"], r["step"], r["train_loss"]) for r in read_rows(str(log))]
              for log in (Path(place["out_dir"], name, "metrics.jsonl") for name in ("whole", "cut"))]
    assert logged[0] == logged[1]  # no row lost or doubled
    # seed 2 first, then both
    main(config(place, name="later", **options | {"seed": 2, "seeds": 1, "chaos_seeds": 0}))
    main(config(place, name="later", **options))
    assert Path(place["out_dir"], "later", "summary.json").read_text() == summary
    # a kill leaves rows beyond the last save, and half a line: both are dropped and made again
    folder = Path(place["out_dir"], "killed")
    shutil.copytree(Path(place["out_dir"], "whole"), folder)
    rows = (folder / "probes.jsonl").read_text()
    (folder / "probes.jsonl").write_text(rows[:2 * len(rows) // 3])
    (folder / "summary.json").unlink()
    main(config(place, name="killed", **options))
    assert (folder / "summary.json").read_text() == summary


def test_another_configuration_is_refused_and_more_seeds_are_added(place, retention):
    cfg, _ = retention
    with pytest.raises(UserError, match="lr: 0.002 -> 0.01"):
        main(replace(cfg, lr=0.01))
    with pytest.raises(ConfigError, match="optimizer: expected one of adamw, muon, sgd"):
        replace(cfg, arm=("optimizer=adam",))
    with pytest.raises(ConfigError, match="'lrr' is not an option of an arm"):
        changed(cfg, "lrr=3")


def test_arms_are_known_by_their_options_not_their_place(place):
    options = {"name": "arms", "seeds": 1, "chaos_seeds": 0, "steps": 2}
    row = main(config(place, **options, arm=("lr=0", "lr=1e-3")))
    log = Path(place["out_dir"], "arms", "probes.jsonl")
    before, summary = log.read_text(), (log.parent / "summary.json").read_text()
    turned = main(config(place, **options, arm=("lr=1e-3",)))
    assert turned["result"]["arms"] == [row["result"]["arms"][0], row["result"]["arms"][2]]
    main(config(place, **options, arm=("lr=0", "lr=1e-3")))
    assert (log.parent / "summary.json").read_text() == summary
    assert sorted(log.read_text().splitlines()) == sorted(before.splitlines())  # nothing ran again
    with pytest.raises(ConfigError, match="two arms are the same"):
        config(place, arm=("lr=0", "lr=0"))


def test_a_folder_holds_one_experiment(place):
    """Whether it saves checkpoints or not, neither replaces the other's results."""
    main(config(place, name="one", seeds=1, chaos_seeds=0, steps=1))
    atomic = {"seeds": 1, "experiment": "artefacts", "artefacts": ("last_token",)}
    main(config(place, name="other", **atomic))
    for name, options in (("one", atomic), ("other", {"seeds": 1})):
        kept = Path(place["out_dir"], name, "probes.jsonl").read_text()
        with pytest.raises(UserError, match="experiment: "):
            main(config(place, name=name, **options))
        assert Path(place["out_dir"], name, "probes.jsonl").read_text() == kept


@pytest.mark.slow
def test_two_processes_find_what_one_finds(place, retention):
    """On the cached base, with an own optimiser state, so that sums differ in rounding alone."""
    cfg = config(place, name="two", seeds=1, steps=5, chaos_seeds=0)
    flags = [f"--{k}={v}" for k, v in (SMALL | place | {"name": "two", "seeds": 1, "steps": 5,
                                                       "chaos_seeds": 0}).items()]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    "memory_probe.py", *flags], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                   capture_output=True, text=True, timeout=300)
    main(replace(cfg, name="one_of_two"))
    steps, two = effects_of(place, cfg)
    _, one = effects_of(place, replace(cfg, name="one_of_two"))
    np.testing.assert_allclose(two[1], one[1], atol=2e-3)
    assert abs(one[1]).max() > 1


def test_a_name_in_the_text_is_named_and_avoided(place, tmp_path, capsys):
    text = open_text(place["data"])
    world = World(text.tok, "H0", 1)
    cfg = config(place)
    planted = make_pairs(world, len(schedule(cfg)[0]), 1, make_facts(world, "pool", 32, 1))[50]
    assert planted.split == "control"
    said = np.array(text.tok.encode(f" The sign of {planted.subject} is{planted.answer}."),
                    dtype=text.train.dtype)
    leaky = text._replace(train=np.concatenate((text.train[:1000], said, text.train[1000:])))
    facts = memory_probe.facts_of(cfg, 1, world, make_facts(world, "pool", 32, 1), leaky)
    out = capsys.readouterr().out
    assert planted.subject in out and "token 1,00" in out
    assert planted.subject not in {f.subject for f in facts}


@pytest.mark.parametrize("method, options", [("replay", {"replay_share": 0.0}), ("ewc", {"ewc_lambda": 0.0})])
def test_a_method_of_strength_zero_is_the_baseline(place, method, options):
    common = {"experiment": "continual", "cohorts": 2, "spread": 8, "steps": 3, "seeds": 1, "chaos_seeds": 0}
    results = [main(config(place, name=f"strength_{method}_{m}", **common, method=m,
                           **options))["result"]["arms"][0]
               for m in ("none", method)]
    curves = [{(g, kind): e["mean"] for g, entry in r["groups"].items() for kind, e in entry["kinds"].items()}
              for r in results]
    assert curves[0] == curves[1]
    if method == "ewc":  # and of a strength that holds everything, it is not
        row = main(config(place, name="strong", **common, method="ewc", ewc_lambda=1e6))
        groups = row["result"]["arms"][0]["groups"]
        assert groups["cohort1"]["kinds"]["mem"]["mean"] != curves[0]["cohort1", "mem"]


def test_rows_leaves_everything_else_alone(place, retention):
    cfg = config(place)
    saved = load_model(next(str(p) for p in Path(place["out_dir"]).glob("base_*")))[0]
    model, x = copy.deepcopy(saved).train(), np.array([[3, 5, 8, 3]])
    optimizer = memory_probe.make_optimizer(model, cfg)
    for _ in range(2):  # the second with momentum
        model(torch.tensor(x), torch.tensor(x))[0].backward()
        restore = memory_probe.only_rows(model, x)
        optimizer.step()
        restore()
        optimizer.zero_grad()
    for (name, p), q in zip(model.named_parameters(), saved.parameters(), strict=True):
        moved = (p != q).view(len(p), -1).any(dim=1).nonzero().flatten().tolist()
        assert moved == ([3, 5, 8] if name == "embed.weight" else []), name


# ------------------------------------------------------------------------------------------------------------
# Verdicts on planted effects


def planted(cfg, effect: float, seeds: int, rng) -> list[dict]:
    """Rows of probes of a world where each exposed fact gains `effect` nats right after the injection."""
    groups, due, length = schedule(cfg)
    steps, rows = probe_steps(cfg, schedule(cfg)), []
    for seed in range(1, seeds + 1):
        level = rng.normal(-4, 1, (2, len(groups)))
        for twin in "AB":
            for step in steps:
                gain = np.array([0 if g == "zero" else 5 if g == "heavy" else effect for g in groups])
                noise = rng.normal(0, 0.3, level.shape)
                own = (0 if twin == "A" else 1, slice(None))
                logp = level + noise
                logp[own] += gain * (step >= cfg.lead + length)
                hit = np.zeros(level.shape, dtype=int)
                hit[own] = (gain > 3) * (step >= cfg.lead + length)
                found = {"logp": logp.flatten().tolist(), "hit": hit.flatten().tolist()}
                rows.append({"part": ["as it is", seed, twin], "step": step, "unseen_confidence": 0.1,
                             "kinds": {"mem": found, "para": found}})
    return rows


def facts_for(cfg):
    return [{"arm": "as it is", "split": "treated", "group": g, "answer": str(i % 16)}
            for i, g in enumerate(schedule(cfg)[0])]


def verdicts(cfg, effect, rng, seeds=6):
    plan = (schedule(cfg), probe_steps(cfg, schedule(cfg)))
    arm = analyse("as it is", cfg, plan, planted(cfg, effect, seeds, rng), facts_for(cfg))
    return arm["groups"]["once"]["kinds"]["mem"]["at"]


def test_a_planted_effect_is_found_at_its_size_and_its_absence_too():
    cfg, rng = ProbeConfig(facts=32, steps=20, bound=0.2), np.random.default_rng(1)
    found = verdicts(cfg, 0.5, rng)["0"]
    assert found["verdict"] == "signal" and found["low"] < 0.5 < found["high"] and abs(found["mean"]
                                                                                       - 0.5) < 0.1
    wrong, none, detected = 0, 0, 0
    for _ in range(20):
        for e in verdicts(cfg, 0.0, rng).values():
            wrong += e["verdict"] == "signal"
            none += e["verdict"].startswith("none larger than") and e["none_below"] < 0.2
        detected += verdicts(cfg, found["detectable"], rng)["0"]["verdict"] == "signal"
    assert wrong <= 4 and none >= 50, (wrong, none)  # of 60; Holm keeps false alarms below 0.05 a table
    assert detected >= 8  # 0.8 for one test; Holm over the table's nine costs power


def test_power_of_the_default_says_what_it_can_see(place, capsys):
    row = main(config(place, power=True))
    assert row["status"] == "planned" and "nats" in capsys.readouterr().out


def test_every_experiment_writes_what_it_says():
    for experiment in ("retention", "frequency", "dilution", "spacing", "mixed", "continual"):
        cfg = ProbeConfig(experiment=experiment)
        groups, due, length = schedule(cfg)
        count = np.zeros(len(groups), dtype=int)
        for said in due.values():
            for pair, _ in said:
                count[pair] += 1
        for g in set(groups):
            of = {int(count[i]) for i, x in enumerate(groups) if x == g}
            want = {"zero": 0, "once": 1, "heavy": 16}.get(g,
                                                                        int(g[1:]) if g[0] == "x"
                                                                        else cfg.exposures)
            assert of == {want}, (experiment, g)
        assert max(due) < length and min(due) >= 0
    last = {}
    groups, due, _ = schedule(ProbeConfig(experiment="spacing"))
    for step, said in due.items():
        for pair, _ in said:
            last.setdefault(groups[pair], {})[pair] = step
    assert len({tuple(sorted(v.values())) for g, v in last.items() if g != "heavy"}) == 1  # matched


def test_fresh_state_and_beta2_by_tokens(place):
    cfg = config(place, beta2_tokens=7680)  # 16 x 48 = 768 tokens a step: halves in 10 steps
    assert cfg.probe_beta2 ** 10 == pytest.approx(0.5)
    assert memory_probe.carries(cfg) and not memory_probe.carries(replace(cfg, state="fresh"))
    assert not memory_probe.carries(replace(cfg, optimizer="sgd"))
    assert asdict(base_module.base_config(cfg))["beta2"] == 0.95


@pytest.mark.slow
def test_the_artefacts_appear_and_vanish(place):
    cfg = config(place, name="lab", experiment="artefacts", seeds=1)
    row = main(cfg)
    found = {name: rows[0] for name, rows in row["result"]["artefacts"].items()}
    assert found["state_cosines"]["artefact"] > 0.9 > found["state_cosines"]["clean"]
    assert found["unmasked_padding"]["artefact"] < found["unmasked_padding"]["clean"]
    assert found["overlapping_windows"]["artefact"] < found["overlapping_windows"]["clean"]
    assert found["last_token"]["artefact"] > found["last_token"]["clean"]
    assert found["fresh_adam"]["curves"]["new optimiser: step RMS"][0] > 2e-3 / 2
    folder = Path(cfg.out_dir, cfg.name)
    summary, rows = (folder / "summary.json").read_text(), (folder / "probes.jsonl").read_text()
    (folder / "probes.jsonl").write_text("".join(rows.splitlines(keepends=True)[:2]) + '{"part": [0, 1')
    assert main(cfg)["result"] == row["result"] and (folder / "summary.json").read_text() == summary
    with pytest.raises(UserError, match="lr: 0.002 -> 0.5"):
        main(replace(cfg, lr=0.5))
