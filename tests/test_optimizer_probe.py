"""optimizer_probe.py: targets are met, a target that is met already changes nothing, the law holds."""
import functools
import itertools
import math
import sys
from pathlib import Path

import optimizer_probe
from common.config import ConfigError, UserError
from common.distributed import Dist
from common.files import read_json, read_rows
from common.run import finite
from common.steering import cosines, law, steered
from optimizer_probe import Pair, SteerConfig, main, resolved
from probes import rates
from probes.rates import Rated, factors_of
from probes.tasks import TASKS

import numpy as np
import pytest
import torch

HERE = Dist(0, 1, torch.device("cpu"))


def config(tmp_path=None, **options) -> SteerConfig:
    return SteerConfig(**{"device": "cpu", "seeds": 2, "steps": 12, "targets": 3, "points": 2,
                          "out_dir": str(tmp_path or "nowhere")} | options)


def walk(cfg, steps: int, target):
    """A pair after some steps at a target, or at the one that `target` gives for each step; and the vectors
    of B's last step."""
    task = TASKS[cfg.task](cfg, HERE.device)
    pair = Pair(cfg, task.make(1), 1, HERE)
    for step in range(steps):
        pair.first(step, task.batch(1, 0, step), True)
        batch = task.batch(1, 1, step)
        found = pair.second(step, batch, target(pair, step, batch) if callable(target) else target, True)
    return pair, found


# ------------------------------------------------------------------------------------------------------------
# Steering


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("parallel", [False, True])
def test_the_norm_stays_and_the_cosine_is_the_target(scope, parallel):
    generator = torch.Generator().manual_seed(1)
    g, r = ([torch.randn(shape, generator=generator) * size for shape, size in
             (((30, 20), 1.0), ((7,), 1e-4), ((), 3.0))] for _ in range(2))
    g = [-3 * x for x in r] if parallel else g
    for c in (-1.0, -0.9999, -0.5, 0.0, 0.3, 0.999, 1.0):
        new = steered(g, r, c, scope, generator)
        achieved = cosines(new, r, scope)
        np.testing.assert_allclose([a for a in achieved if not math.isnan(a)], c, atol=1e-4)
        assert len(achieved) == (1 if scope == "global" else 3)
        norms = [torch.stack([x.norm() for x in z]) for z in (new, g)]
        torch.testing.assert_close(*(n.norm() if scope == "global" else n for n in norms))
        if scope == "tensor":
            assert new[2] is g[2]  # a single number has no direction to turn to


def test_it_is_the_closest_vector_of_that_norm_and_cosine():
    """Against brute force: random vectors of g's norm at the cosine c with r."""
    generator = torch.Generator().manual_seed(2)
    g, r = torch.randn(2, 5, generator=generator).double()
    u = r / r.norm()
    new = steered([g], [r], 0.3, "global", generator)[0]
    for _ in range(2000):
        n = torch.randn(5, generator=generator).double()
        n = n - (n @ u) * u
        other = g.norm() * (0.3 * u + math.sqrt(1 - 0.09) * n / n.norm())
        assert (other - g).norm() >= (new - g).norm() - 1e-9


def test_the_law_is_what_is_left_of_the_first_order_decrease():
    generator = torch.Generator().manual_seed(3)
    for c in np.linspace(-1, 1, 9):
        g, r = torch.randn(2, 6, generator=generator).double()
        phi = cosines([g], [r], "global")[0]
        left = float(g @ steered([g], [r], float(c), "global", generator)[0] / (g @ g))
        assert left == pytest.approx(law(phi, c)) == pytest.approx(math.cos(math.acos(phi) - math.acos(c)))
    assert law(0.3, -1) == pytest.approx(-0.3) and law(0.0, 0.6) == pytest.approx(0.8)


@pytest.mark.parametrize("steer, scope, optimizer", list(itertools.product(
    ("grad", "update", "displacement"), ("global", "tensor"), ("sgd", "adamw", "muon"))))
def test_the_achieved_cosine_is_the_target(steer, scope, optimizer):
    """Measured on what was applied: the gradient the optimiser saw, the weights as they are after it."""
    for target in (-0.7, 0.0, 0.9):
        _, found = walk(config(steer=steer, scope=scope, optimizer=optimizer), 4, target)
        assert np.abs(np.array(cosines(*found[steer], scope)) - target).max() < 1e-3
    _, found = walk(config(steer=steer, scope=scope, optimizer=optimizer), 4, None)
    assert np.abs(np.array(cosines(*found[steer], scope)) + 0.7).max() > 0.05  # it would not be by itself


def test_the_text_model_is_held_too(corpus):
    cfg = resolved(config(task="text", data=corpus, steer="update", scope="tensor", optimizer="muon",
                          d_model=16, n_heads=1, batch_size=4, max_seq_len=16, reference="ema"), HERE)
    _, found = walk(cfg, 3, 0.4)
    achieved = np.array(cosines(*found["update"], "tensor"))
    assert len(achieved) > 20 and np.nanmax(np.abs(achieved - 0.4)) < 1e-3


@pytest.mark.parametrize("steer, optimizer", list(itertools.product(
    ("grad", "update", "displacement"), ("sgd", "adamw", "muon"))))
def test_the_current_cosine_as_target_changes_no_bit(steer, optimizer):
    cfg = config(steer=steer, optimizer=optimizer)

    def current(pair, step, batch):
        twin = optimizer_probe.copy.deepcopy(pair)
        return cosines(*twin.second(step, batch, None, True)[steer], "global")[0]

    plain, held, other = (walk(cfg, 5, target)[0] for target in (None, current, 0.5))
    for a, b in zip(plain.params[1], held.params[1], strict=True):
        assert torch.equal(a, b)
    assert not all(map(torch.equal, plain.params[1], other.params[1]))


def test_moments_never_see_a_steered_update():
    """Up to B's second step its gradients are those of an unsteered run, and so are its moments after it."""
    plain, held = (walk(config(steer="update", optimizer="adamw"), 1, t)[0] for t in (None, -0.5))
    before, after = (walk(config(steer="grad", optimizer="adamw"), 1, t)[0] for t in (None, -0.5))

    def moments(pair):
        return [s["exp_avg"] for s in pair.optimizers[1].state.values()]

    assert all(map(torch.equal, moments(plain), moments(held)))
    assert not any(map(torch.equal, moments(before), moments(after)))


def test_the_moving_average_is_one():
    cfg, seen = config(reference="ema"), []
    task = TASKS["digits"](cfg, HERE.device)
    pair = Pair(cfg, task.make(1), 1, HERE)
    for step in range(3):
        pair.first(step, task.batch(1, 0, step))
        seen.append([g.clone() for g in pair.of_a["grad"]])
    for r, a, b, c in zip(pair.reference, *seen, strict=True):
        torch.testing.assert_close(r, 0.81 * a + 0.09 * b + 0.1 * c)


# ------------------------------------------------------------------------------------------------------------
# The sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    cfg = config(tmp_path_factory.mktemp("steer"), targets=7)
    return cfg, main(cfg)


def test_sgd_decreases_the_loss_as_the_law_says(sweep):
    cfg, row = sweep
    found = row["result"]
    e = found["slopes"]["small on law"]
    assert 0.95 < 1 + e["low"] <= 1 + e["high"] < 1.05
    rows = {tuple(r["part"]): r for r in read_rows(f"{cfg.out_dir}/steer/probes.jsonl")}
    assert len(rows) == cfg.seeds * 8
    first = rows[1, "none"]["laws"][0]
    assert max(first["law"]) - min(first["law"]) > 0.5  # there is something to fit
    np.testing.assert_allclose(first["small"], first["law"], atol=0.01)
    assert first["plain"] == pytest.approx(1.0)
    # a step at the training rate is not first order: it falls short
    assert found["slopes"]["whole on law"]["mean"] < -0.02 and found["worst"] < 1e-3
    marks = [t["measurable"] for t in found["targets"]]
    assert marks == [t["target"] <= found["halves"] for t in found["targets"]]
    assert 0.02 < found["halves"] < 0.9
    table = Path(cfg.out_dir, "steer", "table.md").read_text()
    assert table.count("| not measurable |") == marks.count(False) > 0 and "slope 1.00" in table
    effect = found["targets"][0]["effect"]
    assert effect["mean"] > 0.3 and effect["verdict"]  # c = -1 undoes A's steps
    assert Path(cfg.out_dir, "steer", "effect.png").stat().st_size > 10_000


def test_interrupted_it_says_the_same(sweep, tmp_path, monkeypatch):
    cfg, row = sweep
    short, calls = config(tmp_path, targets=7), itertools.count()
    whole = optimizer_probe.train

    def interrupted(*args):  # Ctrl-C in the fourth run
        args[5].requested = next(calls) == 3
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(optimizer_probe, "train", interrupted)
        assert main(short)["status"] == "stopped"
    assert len(read_rows(f"{short.out_dir}/steer/probes.jsonl")) == 3
    again = main(short)
    assert finite(again["result"]) == finite(row["result"]) and again["run_id"] == row["run_id"]
    assert read_json(f"{short.out_dir}/steer/summary.json") == read_json(f"{cfg.out_dir}/steer/summary.json")
    with pytest.raises(UserError, match="another configuration"):
        main(config(tmp_path, targets=7, lr=0.2))


def test_before_adam_gradients_are_held_and_updates_drift(tmp_path):
    drift = {}
    for steer in ("grad", "update"):
        cfg = config(tmp_path, name=steer, steer=steer, optimizer="adamw", steps=40, targets=5)
        found = main(cfg)["result"]
        drift[steer] = {k: e["mean"] for k, e in found["away"].items()}
        assert found["worst"] < 1e-3
    assert drift["grad"]["grad"] < 1e-3 and drift["grad"]["update"] > 0.1
    assert drift["update"]["update"] < 1e-3 and drift["update"]["grad"] > 0.1
    shown = found["slopes"]  # of steered updates the first order holds, the law of gradients does not
    assert shown["small on first"]["misfit"] < 0.01 < 0.03 < shown["small on law"]["misfit"]


def test_displacements_report_how_far_apart_the_functions_are(tmp_path):
    found = main(config(tmp_path, steer="displacement", steps=30, targets=5))["result"]
    apart = [t["apart"] for t in found["targets"]]
    assert apart[0] > apart[2] > apart[4] >= 0 and apart[0] > 0.1 > apart[4] and not found["slopes"]


def test_a_batch_and_its_halves():
    """The split-half cosine: of two halves that are the same, 1; of real ones, less."""
    cfg = config()
    task = TASKS["digits"](cfg, HERE.device)
    pair, (x, y) = Pair(cfg, task.make(1), 1, HERE), task.batch(1, 1, 0)
    twice = torch.cat((x[:32], x[:32])), torch.cat((y[:32], y[:32]))
    assert optimizer_probe.halves_agree(pair, twice) == pytest.approx(1.0)
    assert optimizer_probe.halves_agree(pair, (x, y)) < 0.95


def test_classes_are_split():
    cfg = config(split="classes")
    task = TASKS["digits"](cfg, HERE.device)
    seen = [set(task.batch(1, who, 0)[1].flatten().tolist()) for who in (0, 1)]
    assert seen[0] <= set(range(5)) and seen[1] <= set(range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(task.batch(1, 0, 3), task.batch(1, 0, 3), strict=True))


# ------------------------------------------------------------------------------------------------------------
# Rates


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_rate_by_group_moves_its_tensor_by_its_factor(optimizer):
    cfg = config(study="rates", optimizer=optimizer)
    task, moved = TASKS["digits"](cfg, HERE.device), {}
    for profile in ("plain", "rising", "tensors", "entries", "scaled"):
        learner = Rated(cfg, task.make(1), profile, 1, HERE)
        before = [p.detach().clone() for p in learner.model.parameters()]
        learner.step(0, task.batch(1, 0, 0))
        moved[profile] = [p.detach() - b for p, b in zip(learner.model.parameters(), before, strict=True)]
        factors = factors_of(cfg, learner.model, profile, 1)
        for change, plain, factor in zip(moved[profile], moved["plain"], factors.values(), strict=True):
            torch.testing.assert_close(change, plain * factor, rtol=1e-2, atol=1e-6)
        kinds = [float(f.mean()) if torch.is_tensor(f) else f for f in factors.values()]
        if profile == "rising":
            assert kinds == [0.1, 0.1, 1.0, 1.0, 10.0, 10.0]
        elif profile == "entries":
            each = torch.cat([f.flatten() for f in factors.values()])
            assert set(each.tolist()) == {1.0, 10.0} and each.mean().item() == pytest.approx(1.9, abs=0.2)
        elif profile == "tensors":
            assert sorted(kinds) == [1.0] * 5 + [10.0]


def test_rates_resume_and_report(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "in_turns", functools.partial(rates.in_turns, rounds=1, seconds=0.0))
    cfg = config(tmp_path, study="rates", optimizer="adamw")
    row = main(cfg)
    assert main(cfg)["run_id"] == row["run_id"]  # times are not part of the result
    assert set(row["result"]["effects"]) == set(cfg.profiles) == set(row["counts"]["cost"]) - {"plain"}
    table = Path(cfg.out_dir, "steer", "table.md").read_text()
    assert "time per step" in table and all(p in table for p in cfg.profiles)


# ------------------------------------------------------------------------------------------------------------
# Wrong input


@pytest.mark.parametrize("options, message", [
    ({"targets": 1}, "targets must be at least 2, got 1"), ({"steps": 0}, "steps must be at least 1"),
    ({"steer": "gradient"}, "steer: expected one of grad, update, displacement; got 'gradient'"),
    ({"steer": "displacement", "reference": "ema"}, "use --reference=last"),
    ({"split": "classes", "task": "text"}, "split=classes is for --task=digits"),
    ({"dtype": "fp16"}, "use bf16 or fp32"), ({"fraction": 1.0}, "fraction must be between 0 and 1"),
    ({"study": "rates", "cost": True}, "leave out --cost")])
def test_contradictions_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        config(**options)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="python prepare_data.py"):
        main(config(tmp_path, task="text", data=str(tmp_path / "none")))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        main(config(tmp_path))


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    with pytest.raises(UserError, match="seed 1, target none: loss nan.*use a lower --lr"):
        main(config(tmp_path, lr=1e30))
