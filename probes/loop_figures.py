"""Figures of loop_train.py: why answers come back, where the weights go, what each moment does.

Shapes: K loops, G segments, M logged ends of segments
"""
from common.stats import forgetting_curve
from common.tables import new_figure, save_figure
from probes.effects import band
from probes.loops import Loops
from probes.moments import SOURCES
from probes.records import Record, by_visit, recoveries

import numpy as np

CELLS = ("own facts, over the last written cycle", "loss on a loop's text as it begins")  # of moments.png


def draw(arms: dict, plans: dict, records: dict, outcomes: dict, run) -> None:
    """effect.png, arms.png, weights.png and, for arms that cross both moments, moments.png."""
    draw_effect(arms, plans, records, run.path("effect.png"))
    draw_arms(arms, plans, records, run.path("arms.png"))
    draw_weights(arms, plans, records, run.path("weights.png"))
    draw_moments(arms, outcomes, run.path("moments.png"))


# ------------------------------------------------------------------------------------------------------------
# What comes back


def draw_effect(arms: dict, plans: dict, records: dict, path: str) -> None:
    """For each arm: recovery curves, recovery by cycle, answers over the whole run, and what each loop does
    to each text."""
    figure = new_figure(4.2 * len(arms) + 1, 12)
    axes = figure.subplots(4, len(arms), squeeze=False)
    for column, label in zip(axes.T, arms, strict=True):
        cfg, loops, by = arms[label], plans[label], records[label]
        one = next(iter(by.values()))
        curves_of(column[0], column[1], loops, by)
        column[0].set(title=label, xlabel="steps since the loop's own segment")
        column[1].set(xlabel="visit of the loop")
        for k in range(min(cfg.loops, 8)) if cfg.questions else ():
            margins = np.mean([(r.choices[:, :, k] - r.choices[:, :, -1]).mean(axis=1)
                               for r in by.values()], axis=0)
            column[2].plot(one.steps, margins, color=f"C{k}", label=f"loop {k}", linewidth=0.9)
        for k in range(min(cfg.loops, 3)) if not cfg.questions else ():
            column[2].plot(one.steps, np.mean([r.text[:, k] for r in by.values()], axis=0), color=f"C{k}",
                           label=f"text {k}", linewidth=0.9)
        if cfg.questions:
            column[2].axhline(0, color="black", linewidth=0.8)  # the foil
        column[2].axvline(cfg.cycles * cfg.cycle, color="black", linestyle=":")
        column[2].set(xlabel="step (dotted: the last is written)")
        effect = np.mean([during(r, loops[s]) for s, r in by.items()], axis=0)
        top = max(float(np.nanmax(abs(effect))), 1e-9) if np.isfinite(effect).any() else 1.0
        picture = column[3].imshow(effect, cmap="RdBu_r", vmin=-top, vmax=top)
        if cfg.loops <= 8:
            column[3].set(xticks=range(cfg.loops), yticks=range(cfg.loops))
        column[3].set(xlabel="text of loop", ylabel="while this loop runs")
        figure.colorbar(picture, ax=column[3], label="change of loss")
    axes[0][0].set_ylabel("nats since then")
    asks = next(iter(arms.values())).questions
    axes[1][0].set_ylabel("rise before it returns, nats")
    axes[2][0].set_ylabel("log p of its answer beyond the foil" if asks else "loss on its text")
    for row in axes[:3]:
        if row[0].get_legend_handles_labels()[0]:
            row[0].legend(fontsize=8)
    save_figure(figure, path)


def curves_of(lags, visits, loops: dict, by: dict) -> None:
    """Draw the value against the lag, and the rise before the return against the visit, over seeds."""
    for i, what in enumerate(("answers", "texts")):
        curves = [x[what] for s in by if what in (x := recoveries(by[s], loops[s]))]
        if curves and len({len(x["curve"]) for x in curves}) == 1:
            mean, half = band([np.array([x["curve"]]) for x in curves])
            lags.errorbar(curves[0]["lags"], np.array(mean) - mean[0], half, color=f"C{i}", label=what,
                          capsize=2)
        if rises := by_visit(by, loops, what):
            mean, half = zip(*rises.values(), strict=True)
            visits.errorbar(list(rises), mean, half, fmt="o-", color=f"C{i}", label=what, capsize=2)
    cfg = next(iter(loops.values())).cfg
    lags.axvline((cfg.loops - 1) * cfg.segment, color="black", linewidth=0.8)
    visits.axhline(0, color="black", linewidth=0.8)


def during(r: Record, loops: Loops) -> np.ndarray:
    """(K, K): the change of each text's loss while each loop runs, from the second cycle on."""
    cfg, at = loops.cfg, {int(s): i for i, s in enumerate(r.steps)}
    out = [[] for _ in range(cfg.loops)]
    for g in range(cfg.loops, len(loops.order)):
        ends = (g * cfg.segment, (g + 1) * cfg.segment)
        if 0 <= loops.order[g] < cfg.loops and set(ends) <= set(at):
            out[loops.order[g]].append(r.text[at[ends[1]]] - r.text[at[ends[0]]])
    return np.array([np.mean(z, axis=0) if z else np.full(cfg.loops, np.nan) for z in out])


def draw_arms(arms: dict, plans: dict, records: dict, path: str) -> None:
    """Arms side by side, over seeds: the loss on a loop's text as it begins, and what is left of own facts
    after their last writing."""
    panels = new_figure(12, 4.5).subplots(1, 2)
    for i, (label, cfg) in enumerate(arms.items()):
        found = [arriving(r, cfg) for r in records[label].values()]
        visits = sorted(set.intersection(*map(set, found)))
        if visits:
            mean, half = band([np.array([[x[v] for v in visits]]) for x in found])
            panels[0].errorbar(visits, mean, half, fmt="o-", color=f"C{i}", label=label, capsize=2)
        curves = [fading(records[label][s], plans[label][s]) for s in records[label]]
        if curves[0] is None or len(curves[0][0]) < 2:
            continue
        lags, mean = curves[0][0], np.mean([values for _, values in curves], axis=0)
        half = np.array(band([values[None] for _, values in curves])[1])
        panels[1].plot(lags, mean, color=f"C{i}", label=f"{label}: {half_life(lags, mean)}")
        panels[1].fill_between(lags, mean - half, mean + half, color=f"C{i}", alpha=0.15)
    panels[0].set(xlabel="visit of the loop", ylabel="nats per token", title="loss on its text as it begins")
    panels[1].set(xlabel="steps since the end of the writing", ylabel="nats beyond controls, since the start",
                  title="own facts")
    for panel in panels:
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7)
    save_figure(panels[0].figure, path)


def arriving(r: Record, cfg) -> dict[int, float]:
    """{visit: mean loss on a loop's text as that visit begins}."""
    out = {}
    begins = (r.steps % cfg.segment == 0) & (r.steps < r.steps[-1])
    for i in np.flatnonzero(begins & (r.loop >= 0) & (r.loop < cfg.loops)):
        out.setdefault(int(r.came[i, r.loop[i]]) + 1, []).append(r.text[i, r.loop[i]])
    return {visit: float(np.mean(losses)) for visit, losses in out.items()}


def fading(r: Record, loops: Loops) -> tuple[np.ndarray, np.ndarray] | None:
    """(steps since the end of the writing, mean gain of own facts then); None without own facts."""
    own = np.array([loops.is_own(f) for f in loops.written], dtype=bool)
    after = r.steps >= loops.cfg.cycles * loops.cfg.cycle
    if loops.shares or not own.any():
        return None
    return r.steps[after] - loops.cfg.cycles * loops.cfg.cycle, (r.facts - r.facts[0])[after][:, own].mean(
        axis=1)


def half_life(lags: np.ndarray, mean: np.ndarray) -> str:
    """In words, from the law that fits best."""
    if mean[0] <= 0.1:
        return "nothing to forget"
    left = mean[-1] / mean[0]
    fit = forgetting_curve(lags[1:], mean[1:] / mean[0])
    if fit.half_life <= lags[-1]:
        return f"half is gone after {fit.half_life:.0f} steps ({fit.kind} fit)"
    return f"{left:.0%} left after {lags[-1]:.0f} steps"


# ------------------------------------------------------------------------------------------------------------
# Where the weights go


def cosines(rows: np.ndarray) -> np.ndarray:
    """(N, N) of the rows of (N, SIZE)."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    return unit @ unit.T


def principal(ways: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ways (M, SIZE) along their two principal axes (M, 2), and the share of the variance of each axis."""
    u, s, _ = np.linalg.svd(ways - ways.mean(axis=0), full_matrices=False)
    return u[:, :2] * s[:2], s[:2] ** 2 / max(float((s ** 2).sum()), 1e-30)


def without_drift(path: np.ndarray, cycle: int) -> np.ndarray:
    """A path (M, SIZE) minus its mean over the cycle around each point, (M - cycle + 1, SIZE): what is left
    is what each loop undoes. Any steady drift looks like an arc along its principal axes."""
    sums = np.cumsum(np.vstack([np.zeros_like(path[:1]), path]), axis=0)
    mean, first = (sums[cycle:] - sums[:-cycle]) / cycle, (cycle - 1) // 2
    return path[first:first + len(mean)] - mean


def draw_weights(arms: dict, plans: dict, records: dict, path: str) -> None:
    """For each arm, from sketches of its first seed: cosines between the loops' gradients at the end of the
    writing, between what segments changed, between ways from the start; and the path without its drift along
    two axes."""
    drawn = [label for label in arms if len(next(iter(records[label].values())).weights) > 2]
    if not drawn:  # logged by an earlier version
        return
    figure = new_figure(4.2 * len(drawn) + 1, 14)
    axes = figure.subplots(4, len(drawn), squeeze=False)
    for column, label in zip(axes.T, drawn, strict=True):
        seed, r = next(iter(records[label].items()))
        loops, steps = plans[label][seed], sorted(r.weights)
        weights = np.array([r.weights[s] for s in steps])  # (M, SIZE)
        ways, changes = weights[1:] - weights[0], np.diff(weights, axis=0)
        ends = np.array(steps[1:]) / loops.cfg.segment
        pictures = [(r.gradients, "loop", "loop"), (changes, "segment", "change in segment"),
                    (ways, "segment", "way from the start after segment")]
        for panel, (rows, x, y) in zip(column, pictures, strict=False):
            if len(rows):
                extent = None if x == "loop" else (ends[0] - 0.5, ends[-1] + 0.5, ends[-1] + 0.5,
                                                   ends[0] - 0.5)
                shown = panel.imshow(cosines(rows), cmap="RdBu_r", vmin=-1, vmax=1, extent=extent)
                figure.colorbar(shown, ax=panel, label="cosine")
            panel.set(xlabel=x, ylabel="gradient of loop" if x == "loop" else y)
        column[0].set_title(f"{label}, seed {seed}")
        K, path_of = loops.cfg.loops, np.vstack([np.zeros_like(ways[:1]), ways])
        if len(path_of) < 2 * K:
            continue
        along, shares = principal(without_drift(path_of, K))
        after = [loops.loop_at(max(0, s - 1)) for s in steps][(K - 1) // 2:][:len(along)]
        column[3].plot(*along.T, color="grey", linewidth=0.5)
        dots = column[3].scatter(*along.T, c=after, cmap="viridis", s=14, zorder=2)
        figure.colorbar(dots, ax=column[3], label="after loop")
        column[3].set(xlabel=f"path without drift: first axis, {shares[0]:.0%}",
                      ylabel=f"second axis, {shares[1]:.0%}")
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------------------------
# Moments


def draw_moments(arms: dict, outcomes: dict, path: str) -> None:
    """Outcomes by the source of the first and of the second moment; arms that differ in more are left out."""
    of = {(c.first, c.second): outcomes[label] for label, c in reversed(arms.items()) if c.start == "none"
          and set(label.split()) <= {*"as it is".split(), f"first={c.first}", f"second={c.second}"}}
    asked = [what for what in CELLS if all(what in found for found in of.values())]
    if len(of) < 3 or not asked:
        return
    figure = new_figure(4.4 * len(asked), 3.8)
    for panel, what in zip(figure.subplots(1, len(asked), squeeze=False)[0], asked, strict=True):
        means = np.full((3, 3), np.nan)
        for (first, second), found in of.items():
            i, j, e = SOURCES.index(first), SOURCES.index(second), found[what]
            means[i, j] = e["mean"]
            panel.text(j, i, f"{e['mean']:.2f}\n{e['low']:.2f} to {e['high']:.2f}", ha="center", va="center",
                       fontsize=8, bbox={"color": "white", "alpha": 0.6})
        shown = panel.imshow(means, cmap="viridis")
        figure.colorbar(shown, ax=panel, label="nats")
        panel.set(xticks=range(3), yticks=range(3), xlabel="second moment", ylabel="first moment", title=what)
        panel.set_xticklabels(SOURCES)
        panel.set_yticklabels(SOURCES)
        panel.title.set_fontsize(9)
    save_figure(figure, path)
