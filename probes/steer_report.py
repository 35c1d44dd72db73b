"""What optimizer_probe.py says of steered runs: slopes, effects, table, figure."""
from common.tables import grid, new_figure, save_figure
from probes.effects import describe, judge, said

import numpy as np

AWAY = 0.01  # mean distance of a cosine from its targets up to which it counts as held


def over_seeds(values, bound: float) -> dict:
    return describe([np.array([v], dtype=float) for v in values], bound)


def slope(x, y) -> float:
    """Of y on x through the origin."""
    x, y = np.ravel(x), np.ravel(y)
    return float(x @ y / (x @ x))


def analyse(cfg, rows: dict) -> dict:
    """Means over seeds and logged steps for each target, slopes and effects with intervals over seeds. `rows`
    holds for each target, and "none", a row per seed."""
    plain, targets = rows["none"], []
    out = {"steer": cfg.steer, "scope": cfg.scope, "optimizer": cfg.optimizer,
           "halves": float(np.mean([r["halves"] for r in plain])),
           "worst": max(r["worst"] for c in cfg.aims for r in rows[c]),
           "slopes": {}, "plain": {"loss": over_seeds([r["losses"][1] for r in plain], cfg.bound),
                     "cosines": {k: float(np.mean([r["cosines"][k] for r in plain]))
                                 for k in plain[0]["cosines"]}}}
    for i, c in enumerate(cfg.aims):
        mine = rows[c]
        targets.append({
            "target": c, "measurable": c <= out["halves"],
            "cosines": {k: float(np.mean([r["cosines"][k] for r in mine])) for k in mine[0]["cosines"]},
            "losses": np.mean([r["losses"] for r in mine], axis=0).tolist(),
            "apart": float(np.mean([r["apart"] for r in mine])),
            "effect": over_seeds([r["losses"][1] - p["losses"][1] for r, p in zip(mine, plain, strict=True)],
                                 cfg.bound),
            "law": {k: float(np.mean([[point[k][i] for point in r["laws"]] for r in plain]))
                    for k in ("law", "first", "small", "whole")} if plain[0]["laws"] else {}})
    out["targets"] = targets
    out["away"] = {kind: over_seeds([np.mean([abs(np.mean(rows[c][s]["cosines"][kind]) - c)
                                              for c in cfg.aims]) for s in range(cfg.seeds)], AWAY)
                   for kind in plain[0]["cosines"]}
    for x, y in (("law", "small"), ("first", "small"), ("law", "whole")) if plain[0]["laws"] else ():
        pairs = [[[point[k] for point in r["laws"]] for k in (x, y)] for r in plain]
        out["slopes"][f"{y} on {x}"] = over_seeds([slope(*pair) - 1 for pair in pairs], 0.05) | {
            "misfit": float(np.sqrt(np.mean([np.square(np.subtract(*pair)) for pair in pairs])))}
    chosen = [targets[0], min(targets, key=lambda t: abs(t["target"])), targets[-1]]
    judge([t["effect"] for t in chosen], cfg.bound)
    out["judged"] = [t["target"] for t in chosen]
    return out


def slope_words(e: dict) -> str:
    held = "within 5 % of 1" if abs(e["low"]) < 0.05 > abs(e["high"]) else \
        "1 is outside" if e["low"] * e["high"] > 0 else "not known to 5 %"
    return (f"slope {1 + e['mean']:.4f}, 95 % interval {1 + e['low']:.4f} to {1 + e['high']:.4f} over "
            f"{e['seeds']} seeds: {held}; rms distance {e['misfit']:.2g} of the steepest descent")


def words_of(cfg, found: dict) -> list[str]:
    high = sum(not t["measurable"] for t in found["targets"])
    names = {"grad": "gradients", "update": "updates", "displacement": "displacements"}
    says = {"small on law": "a small step, on the law", "whole on law": "the whole step, on the law",
            "small on first": "a small step, on the first order of its change"}
    out = [f"{names[cfg.steer]} steered ({cfg.scope}, {cfg.optimizer}): the achieved cosine is at most "
           f"{found['worst']:.1e} from its target",
           f"halves of a batch agree to a cosine of {found['halves']:.2f}: {high} of {len(found['targets'])} "
           "targets lie above that and are not measurable"]
    out += [f"decrease of the loss by {says[k]}: {slope_words(e)}" for k, e in found["slopes"].items()]
    for kind, e in found["away"].items():
        role = "steered" if kind == cfg.steer else "not steered"
        out.append(f"cosine of {names[kind]} ({role}): {e['mean']:.2g} from the target on average, 95 % "
                   f"interval {e['low']:.2g} to {e['high']:.2g}: {'' if e['high'] < AWAY else 'not '}held")
    out += [f"test loss at {t['target']:+.2f} minus unsteered: {said(t['effect'])}"
            for t in found["targets"] if t["target"] in found["judged"]]
    return out


def table_of(cfg, found: dict) -> str:
    kinds = list(found["plain"]["cosines"])
    has_law, two = bool(found["slopes"]), cfg.steer == "displacement" or cfg.split == "classes"
    lines = [["target", *(f"cos {k}s" for k in kinds), *["A's test loss"] * two, "B's test loss",
              "minus unsteered", "95 %", *["KL of outputs"] * (cfg.steer == "displacement"),
              *["law", "first order", "small step", "whole step"] * has_law, ""]]
    for t in found["targets"]:
        e = t["effect"]
        lines.append([f"{t['target']:+.3f}", *(f"{t['cosines'][k]:+.3f}" for k in kinds),
                      *[f"{t['losses'][0]:.3f}"] * two, f"{t['losses'][1]:.3f}", f"{e['mean']:+.3f}",
                      f"{e['low']:+.3f} to {e['high']:+.3f}",
                      *[f"{t['apart']:.3f}"] * (cfg.steer == "displacement"),
                      *(f"{t['law'][k]:+.4f}" for k in ("law", "first", "small", "whole") if has_law),
                      "" if t["measurable"] else "not measurable"])
    return grid(lines)


def draw(cfg, found: dict, path: str) -> None:
    """The law over the measured decrease (for displacements how far the functions are apart), the test loss
    and the achieved cosines, against the target."""
    figure = new_figure(15, 4.4)
    axes = figure.subplots(1, 3)
    targets, c = found["targets"], np.array(cfg.aims)
    if found["slopes"]:
        for key, style, label in (("whole", "C1.", "measured, the whole step"),
                                  ("small", "C0o", "measured, a small step"),
                                  ("first", "C2--", "first order of the change made"),
                                  ("law", "k-", "law: cos(arccos phi - arccos c)")):
            axes[0].plot(c, [t["law"][key] for t in targets], style, markersize=5, label=label)
        axes[0].set(title="decrease of B's batch loss in one step",
                    ylabel="share of the steepest descent of that length")
    else:
        axes[0].plot(c, [t["apart"] for t in targets], "C0o-", markersize=4)
        axes[0].set(title="how far apart the functions are", ylabel="KL of outputs, nats", yscale="log")
    losses = np.array([t["losses"][1] for t in targets])
    half = np.array([t["effect"]["high"] - t["effect"]["low"] for t in targets]) / 2
    axes[1].plot(c, losses, "C0o-", markersize=4, label="B, steered")
    if np.isfinite(half).all():
        axes[1].fill_between(c, np.maximum(losses - half, losses / 10), losses + half, color="C0", alpha=0.2,
                             label="95 % of the difference to unsteered")
    if cfg.steer == "displacement" or cfg.split == "classes":
        axes[1].plot(c, [t["losses"][0] for t in targets], "C3.-", label="A")
    axes[1].axhline(found["plain"]["loss"]["mean"], color="black", linestyle="--", label="unsteered")
    axes[1].set(title="test loss after the run", ylabel="nats", yscale="log")
    axes[2].plot(c, c, color="black", linewidth=0.8, label="target")
    for i, kind in enumerate(found["plain"]["cosines"]):
        axes[2].plot(c, [t["cosines"][kind] for t in targets], f"C{i}o", markersize=4,
                     label=f"{kind}s" + " (steered)" * (kind == cfg.steer))
    axes[2].set(title="cosines of B's with A's, mean over the run", ylabel="cosine")
    for ax in axes:
        ax.axvspan(min(1.0, max(-1.0, found["halves"])), 1, color="grey", alpha=0.15, label="not measurable")
        ax.set(xlabel="target cosine", xlim=(-1.04, 1.04))
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.suptitle(f"{cfg.task}, {cfg.optimizer}: {cfg.steer} steered, {cfg.scope}, {cfg.seeds} seeds")
    save_figure(figure, path)
