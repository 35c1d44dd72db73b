"""From numbers to an effect with an interval and a verdict in words, for every experiment of memory_probe.py.

An effect comes as a list of one array per seed, of its items' effects (pairs of facts, sentences), in nats
unless said otherwise. Seeds are the unit; with one seed it is the items, and the statement is about that run.
"""
import math

from common import stats
from common.files import write_text

import numpy as np

NO_ENDPOINT = "this endpoint does not work"


def describe(values: list[np.ndarray], bound: float) -> dict:
    """An effect, what this design could have seen, and whether it is equivalent to none within +-bound. Where
    seeds agree exactly, as shares do by chance, their spread says nothing and items are the unit."""
    if len(values) > 1 and len({float(np.mean(v)) for v in values}) == 1:
        return pooled(values, bound)
    e, (sd_seed, sd_item) = stats.clustered(values), stats.variance_components(values)
    items = round(np.mean([len(v) for v in values]))
    units = [np.mean(v) for v in values] if len(values) > 1 else values[0]
    p_none, low, high = stats.equivalence(units, bound)
    return {"mean": e.mean, "low": e.low, "high": e.high, "p": e.p, "sd_seed": sd_seed, "sd_item": sd_item,
            "detectable": stats.minimum_detectable(sd_seed, sd_item, len(values), items),
            "none_p": p_none, "none_below": max(abs(low), abs(high)), "seeds": len(values), "items": items}


def pooled(values: list[np.ndarray], bound: float) -> dict:
    """describe() with items as the unit, for seeds that do no more than draw more of them. `over_seeds` is
    the more cautious interval, with seeds as the unit."""
    e, cautious = describe([np.concatenate(values)], bound), stats.clustered(values)
    return e | {"seeds": len(values), "items": round(np.mean([len(v) for v in values])),
                "over_seeds": {k: getattr(cautious, k) for k in ("low", "high", "p")}}


def band(curves: list[np.ndarray]) -> tuple[list[float], list[float]]:
    """(mean, half of its 95 % t interval) at each point of curves (items, T), one per seed."""
    units = np.stack([c.mean(axis=0) for c in curves]) if len(curves) > 1 else curves[0]
    found = [stats.paired_difference(u, np.zeros(len(u))) for u in units.T]
    return [float(e.mean) for e in found], [float(e.high - e.low) / 2 for e in found]


def judge(effects: list[dict], bound: float, floor: float = 0.0, works: bool = True) -> None:
    """Add to each effect its p adjusted for the number of them (Holm) and a verdict. `floor`: the size that
    an effect has by chaos alone; `works`: whether the positive control passed."""
    for e, p in zip(effects, stats.holm([e["p"] for e in effects]), strict=True):
        e["p_holm"] = p
        e["verdict"] = verdict(e, bound, floor) if works else NO_ENDPOINT


def verdict(e: dict, bound: float, floor: float) -> str:
    if e["p_holm"] < 0.05 and abs(e["mean"]) > floor:
        return "signal"
    if e["none_p"] < 0.05:
        return f"none larger than {e['none_below']:.2g}"
    if not math.isfinite(e["low"]):
        return "undecided: one unit shows nothing"
    size, sd_seed = max(bound, abs(e["mean"])), 0.0 if math.isnan(e["sd_seed"]) else e["sd_seed"]
    more = stats.seeds_needed(size, sd_seed, e["sd_item"], e["items"]) - e["seeds"]
    if more <= 0:
        return "undecided"
    return f"undecided: needs {more} more seed{'s' * (more > 1)} to see {size:.2g}"


def between(values: list[dict], labels: list[str], bound: float, what: str, effect=describe) -> list[str]:
    """Words on each arm against the first, item by item; values[arm] is {seed: (items,)}. Arms of other sizes
    are left out."""
    out = [(label, effect([mine[s] - values[0][s] for s in mine], bound))
           for label, mine in zip(labels[1:], values[1:], strict=True)
           if all(mine[s].shape == values[0][s].shape for s in mine)]
    judge([e for _, e in out], bound)
    return [f"{label} - {labels[0]}, {what}: {said(e)}" for label, e in out]


# ------------------------------------------------------------------------------------------------------------
# Words and files


def said(e: dict) -> str:
    return (f"{e['mean']:+.3g}, 95 % interval {e['low']:+.3g} to {e['high']:+.3g}, p {e['p_holm']:.2g} "
            f"(Holm), detectable {e['detectable']:.2g}: {e['verdict']}")


def cells(e: dict) -> list[str]:
    return [*(f"{e[key]:+.3g}" for key in ("mean", "low", "high")), f"{e['p_holm']:.2g}", e["verdict"]]


def write_report(run, table: str, words: list[str], draw, summary: dict) -> tuple[dict, str]:
    """Write table.md, and effect.png by draw(path); returns (summary, words for the terminal)."""
    text = "\n".join(words)
    if run.dist.is_main:
        write_text(run.path("table.md"), f"{table}\n\n{text.strip()}\n")
        draw(run.path("effect.png"))
    return summary, f"{text}\nin {run.folder}: table.md, effect.png, summary.json"


def early_and_late(most: int) -> list[int]:
    """0, 1, 2, 3, 5, 8, ... below `most`, and `most`: where changes are asked for, dense at first."""
    out, a, b = [0], 1, 2
    while a < most:
        out.append(a)
        a, b = b, a + b
    return [*out, most] if most else out
