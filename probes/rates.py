"""Learning rates that differ by entry, by tensor and by depth: what they gain, and what they cost per step.

    python optimizer_probe.py config/rates.py
    python optimizer_probe.py config/rates.py --task=text --optimizer=muon --batch_size=16 --name=rates_text

entries   a random share of all weights, one by one, learns at another rate. No optimiser has a rate per
          entry, so each step is followed by a mask over all weights.
tensors   the same share of the tensors: parameter groups, which cost nothing
rising, falling   by depth, from one end of the network to the other: parameter groups
scaled    the control: every rate is the mean rate of `entries`
"""
import re
import statistics
import time

from common.console import StepBar
from common.distributed import autocast, choose_dtype
from common.tables import grid, new_figure, save_figure
from muon import OPTIMIZERS, parameter_groups, set_learning_rates
from probes.base import named, rescale
from probes.effects import cells, describe, judge, said, write_report
from probes.tasks import gradient_of, plain_sgd, prepared

import numpy as np
import torch


def factors_of(cfg, model, profile: str, seed: int) -> dict:
    """{parameter: what its rate is multiplied by}, a tensor for each entry of its own. `scaled` is the
    control for `entries`: the same mean rate for all."""
    named_parameters, generator = dict(model.named_parameters()), torch.Generator().manual_seed(seed)
    params, n = list(named_parameters.values()), len(named_parameters)
    if profile == "plain":
        return {p: 1.0 for p in params}
    if profile == "scaled":
        return {p: 1 + cfg.fraction * (cfg.factor - 1) for p in params}
    if profile == "entries":
        return {p: torch.where(torch.rand(p.shape, generator=generator) < cfg.fraction, cfg.factor, 1.0)
                .to(p.device) for p in params}
    if profile == "tensors":
        chosen = torch.randperm(n, generator=generator)[:max(1, round(cfg.fraction * n))].tolist()
        return {p: cfg.factor if i in chosen else 1.0 for i, p in enumerate(params)}
    if profile not in ("rising", "falling"):
        raise NotImplementedError(f"profile={profile}")
    depths = {name: int(m[1]) for name in named_parameters if (m := re.search(r"\.(\d+)\.", name))}
    deepest, sign = max(1, max(depths.values(), default=1)), 1 if profile == "rising" else -1
    return {p: cfg.factor ** (sign * (2 * depths[name] / deepest - 1)) if name in depths else 1.0
            for name, p in named_parameters.items()}


def groups_of(cfg, model, factors: dict) -> list[dict]:
    """muon.py's groups, split by factor: rates per tensor at no cost per step."""
    out = []
    for group in parameter_groups(model, cfg):
        of = [factors[p] for p in group["params"]]
        for factor in sorted(set(of)):
            mine = {key: [v for v, f in zip(group[key], of, strict=True) if f == factor]
                    for key in ("params", "parts") if key in group}
            out.append({**group, **mine, "peak_lr": factor * group["peak_lr"], "lr": factor * group["lr"]})
    return out


class Rated:
    """One learner, whose rates follow a profile. Rates of single entries need a mask after the step."""

    def __init__(self, cfg, model, profile: str, seed: int, dist):
        self.cfg, self.dist, self.dtype = plain_sgd(cfg), dist, choose_dtype(cfg.dtype, dist.device)[0]
        self.model = prepared(cfg, model, dist)
        factors = factors_of(cfg, model, profile, seed)
        self.masks = factors if profile == "entries" else {}
        groups = groups_of(self.cfg, model, dict.fromkeys(factors, 1.0) if self.masks else factors)
        self.optimizer = OPTIMIZERS[cfg.optimizer](groups, self.cfg, dist.device.type in ("cpu", "cuda"))

    @torch.no_grad()
    def step(self, step: int, batch) -> None:
        with torch.enable_grad():
            gradient_of(self.cfg, self.model, batch, self.dist, self.dtype)
        before = [p.clone() for p in self.masks]
        set_learning_rates(self.optimizer, self.cfg, step, self.cfg.steps)
        self.optimizer.step()
        rescale(self.masks, before)


def rates(cfg, task, run, stop):
    """Every profile and the plain run, of all seeds: (summary, words), or None if asked to stop."""
    done, seeds, arms = run.finished_parts(), range(cfg.seed, cfg.seed + cfg.seeds), ("plain", *cfg.profiles)
    todo = [(s, a) for s in seeds for a in arms]
    left = [part for part in todo if part not in done]
    with StepBar((len(todo) - len(left)) * cfg.steps, len(todo) * cfg.steps, True) as bar:
        for seed, profile in left:
            with named(f"seed {seed}, {profile}"):
                row = learn(cfg, task, seed, profile, run, stop, bar)
            if row is None:
                return None
            run.finish_part((seed, profile), row, done)
    costs = in_turns({a: mover(cfg, task, a, run.dist) for a in arms})
    losses = {a: np.array([done[s, a]["loss"] for s in seeds]) for a in arms}
    effects = {a: describe([np.array([v]) for v in losses[a] - losses["plain"]], cfg.bound)
               for a in cfg.profiles}
    matched = {}
    if {"entries", "scaled"} <= set(arms):  # is it the spread of the rates, or their mean?
        gained = losses["entries"] - losses["scaled"]
        matched["entries minus scaled"] = describe([np.array([v]) for v in gained], cfg.bound)
    judge([*effects.values(), *matched.values()], cfg.bound)
    lines = [["profile", "test loss", "minus plain", "low", "high", "p (Holm)", "verdict", "time per step"]]
    for a in arms:
        low, high = min(costs[a]), max(costs[a])
        cost = "1" if a == "plain" else f"{statistics.median(costs[a]):.2f}x ({low:.2f}-{high:.2f})"
        lines.append([a, f"{losses[a].mean():.4f}", *(cells(effects[a]) if a in effects else [""] * 5), cost])
    said_of = {**{f"{a} minus plain": e for a, e in effects.items()}, **matched}
    words = [f"{what}, test loss: {said(e)}" for what, e in said_of.items()]
    return write_report(run, grid(lines), ["", grid(lines), "", *words],
                        lambda path: draw_rates(cfg, losses, effects, costs, path),
                        {"losses": {a: v.tolist() for a, v in losses.items()}, "effects": effects,
                         "matched": matched,
                         "counts": {"runs": len(todo), "steps": len(todo) * cfg.steps, "cost": costs}})


def learn(cfg, task, seed: int, profile: str, run, stop, bar: StepBar) -> dict | None:
    learner = Rated(cfg, task.make(seed), profile, seed, run.dist)
    for step in range(cfg.steps):
        if stop.agreed(run.dist):
            return None
        began = time.perf_counter()
        learner.step(step, task.batch(seed, 0, step))
        run.seconds += time.perf_counter() - began
        bar.tick(time.perf_counter() - began)
        bar.show(f"seed {seed}, {profile}")
    learner.model.eval()
    with torch.no_grad(), autocast(learner.dtype, run.dist.device):
        return {"loss": learner.model(*task.tests[0])[0].item()}


# ------------------------------------------------------------------------------------------------------------
# Cost


def mover(cfg, task, profile: str, dist):
    """A function of i that takes step i, beginning again after cfg.steps: gradients that vanish are slow."""
    learners = {}

    def move(i: int) -> None:
        step = i % cfg.steps
        if step == 0:
            learners[0] = Rated(cfg, task.make(cfg.seed), profile, cfg.seed, dist)
        learners[0].step(step, task.batch(cfg.seed, 0, step))
    return move


def in_turns(moves: dict, rounds: int = 11, seconds: float = 0.1) -> dict[str, list[float]]:
    """{name: time of a call over that of the first of `moves`, in each round}. All are called once each in
    turn, for about this many seconds of each a round. A round compares first deciles: on a busy machine the
    system stops a call in three, and these are then mostly of one kind."""
    device, ratios = torch.accelerator.current_accelerator(), {name: [] for name in moves}

    def timed(move, i: int) -> float:
        began = time.perf_counter()
        move(i)
        if device:
            torch.accelerator.synchronize()
        return time.perf_counter() - began

    fastest = min(timed(move, i) for i in range(5) for move in moves.values())  # and warm
    calls = min(200, max(5, round(seconds / fastest)))
    for r in range(rounds):
        times = [[timed(move, r * calls + i) for move in moves.values()] for i in range(calls)]
        fast = [statistics.quantiles(column, n=10)[0] for column in zip(*times, strict=True)]
        for name, seconds_of_call in zip(moves, fast, strict=True):
            ratios[name].append(seconds_of_call / fast[0])
    return ratios


def draw_rates(cfg, losses: dict, effects: dict, costs: dict, path: str) -> None:
    """Test loss minus plain (dots are seeds, bars 95 % intervals) and time per step."""
    figure = new_figure(11, 4)
    left, right = figure.subplots(1, 2)
    for i, (a, e) in enumerate(effects.items()):
        left.plot([i] * cfg.seeds, losses[a] - losses["plain"], "o", color=f"C{i}", alpha=0.4)
        if cfg.seeds > 1:
            left.errorbar(i, e["mean"], [[e["mean"] - e["low"]], [e["high"] - e["mean"]]], fmt="_",
                          color=f"C{i}", capsize=5)
        middle = statistics.median(costs[a])
        spread = [[middle - min(costs[a])], [max(costs[a]) - middle]]
        right.errorbar(i, middle, spread, fmt="o", color=f"C{i}", capsize=5)
    left.set(title=f"test loss minus plain, {cfg.seeds} seeds", ylabel="nats")
    right.set(title="time per step, plain = 1: median, least and most", ylabel="ratio")
    for ax, level in ((left, 0.0), (right, 1.0)):
        ax.axhline(level, color="black", linewidth=0.8)
        ax.set_xticks(range(len(effects)), list(effects))
        ax.grid(alpha=0.3)
    figure.suptitle(f"{cfg.task}, {cfg.optimizer}: {cfg.fraction:.0%} at {cfg.factor:g} times the rate")
    save_figure(figure, path)
