"""What loop_train.py logged, as arrays, and recovery.

Recovery, our definition (no published code has one): a value (log p of an answer, or minus a text's loss) as
a function of the lag, the steps since the end of the loop's own segment, is averaged over loops and their
visits from the second on, at the ends of segments. With `start` its value at lag 0, `pre` at the last lag
before a cycle brings the loop back, and `trough` at the lag between them where it is smallest,

    rise = pre - trough        recovery = (pre - trough) / (start - trough)

Both are negative where the value falls all the way. The lag of the trough is chosen on one half of the items
and read on the other, both ways, because the smallest of noisy values is always too small. What is judged is
`rise` beyond that of a control order at the same lags.

Shapes: P probed steps, K loops, Q questions, F facts, N items
"""
import math
from typing import NamedTuple

from probes.effects import band
from probes.loops import Loops

import numpy as np

# ------------------------------------------------------------------------------------------------------------
# What was logged, as arrays


class Record(NamedTuple):
    """One seed of one arm."""
    steps: np.ndarray  # (P,)
    loop: np.ndarray  # (P,) whose segment the step is in
    since: np.ndarray  # (P, K) steps since the end of each loop's last segment; nan inside one, or before
    came: np.ndarray  # (P, K) how many segments each loop has had
    last: np.ndarray  # (P, Q) the loop that answered each question last; -1 if none has
    text: np.ndarray  # (P, K) loss
    choices: np.ndarray  # (P, Q, K + 1) log p of each loop's answer and of the foil
    guess: np.ndarray  # (P, Q) the loop whose answer is the most probable of all; -1 if none's is
    facts: np.ndarray  # (P, F) log p of a fact beyond its control
    cues: dict  # step -> (K prefixes, Q, K + 1)
    again: np.ndarray | None  # (F,) what relearning half of the own facts adds to each
    weights: dict  # step -> sketch (SIZE,), of the first seed (probes/sketches.py)
    gradients: np.ndarray  # (K, SIZE) sketches for the loops' texts, at the end of the writing; or (0,)


def record(loops: Loops, rows: list[dict]) -> Record:
    cfg = loops.cfg
    rows = [r for r in sorted(rows, key=lambda r: r["step"]) if not loops.shares or r["step"] >= cfg.new_at]
    relearnt = rows.pop() if rows[-1]["step"] > loops.length else None
    steps, S, K = np.array([r["step"] for r in rows]), cfg.segment, cfg.loops
    since, came, last = np.full((len(steps), K), np.nan), np.zeros((len(steps), K)), []
    for i, step in enumerate(steps):
        for g, k in enumerate(loops.order):
            if 0 <= k < K and g * S < step:
                since[i, k], came[i, k] = max(step - (g + 1) * S, -1), came[i, k] + 1
        since[i, since[i] < 0] = np.nan
        before = {f.pair: f.loop for at, f in loops.log if at < step and f.old}
        last.append([before.get(q, -1) for q in range(cfg.questions)])
    facts, again = np.zeros((len(steps), 0)), None
    if loops.written:
        facts = np.array([np.subtract(r["facts"], r["controls"]) for r in rows])
        if relearnt:
            again = np.subtract(relearnt["facts"], relearnt["controls"]) - facts[-1]
    Q = cfg.questions
    choices = np.array([r["choices"] for r in rows]) if Q else np.zeros((len(steps), 0, K + 1))
    return Record(steps, np.array([loops.loop_at(s) for s in steps]), since, came,
                  np.array(last, dtype=int).reshape(len(steps), Q), np.array([r["text"] for r in rows]),
                  choices,
                  np.array([r["guess"] for r in rows]) if Q else np.zeros((len(steps), 0)), facts,
                  {r["step"]: np.array(r["cue"]) for r in rows if r.get("cue")}, again,
                  {r["step"]: np.array(r["weights"]) for r in rows if "weights" in r},
                  np.array(next((r["gradients"] for r in rows if "gradients" in r), [])))


# ------------------------------------------------------------------------------------------------------------
# Recovery


def recovery(values: np.ndarray, since: np.ndarray, use: np.ndarray, horizon: float) -> dict | None:
    """Of values (P, N), each `since` (P, N) its loop's own segment, at the places `use` (P, N) and lags up to
    the horizon. None if there are too few."""
    use = use & np.isfinite(since) & (since <= horizon)
    lags = sorted(set(since[use].tolist()))
    if len(lags) < 3 or values.shape[1] < 2:
        return None
    curves = np.full((2, len(lags)), np.nan)  # of either half of the items
    for half in range(2):
        mine = use.copy()
        mine[:, 1 - half::2] = False
        for j, lag in enumerate(lags):
            if (at := mine & (since == lag)).any():
                curves[half, j] = values[at].mean()
    if np.isnan(curves).any():
        return None
    troughs = [curves[1 - h][1 + np.argmin(curves[h][1:-1])] for h in range(2)]
    start, pre, trough = curves[:, 0].mean(), curves[:, -1].mean(), float(np.mean(troughs))
    return {"lags": lags, "curve": curves.mean(axis=0).tolist(), "rise": float(pre - trough),
            "recovery": float((pre - trough) / (start - trough)) if start > trough else math.nan}


def recoveries(r: Record, loops: Loops, visit: int = 0) -> dict[str, dict]:
    """Of the questions (answer beyond foil) and of the texts, before their loops return: after one visit, or
    for visit=0 after all from the second on."""
    cfg, found = loops.cfg, {}
    K, horizon = cfg.loops, (cfg.loops - 1) * cfg.segment
    enough = r.came == visit if visit else r.came >= 2
    enough = enough & (r.steps % cfg.segment == 0)[:, None]  # not while a switch shakes everything
    if cfg.questions:
        written = enough & (r.steps < cfg.cycles * cfg.cycle)[:, None]
        since, use = (np.repeat(z, cfg.questions, axis=1) for z in (r.since, written))  # (P, K Q)
        margins = (r.choices[:, :, :K] - r.choices[:, :, K:]).transpose(0, 2, 1).reshape(len(r.steps), -1)
        found["answers"] = recovery(margins, since, use, horizon)
    found["texts"] = recovery(-r.text, r.since, enough, horizon)
    return {k: v for k, v in found.items() if v}


def by_visit(by: dict, loops: dict, what: str) -> dict[int, tuple[float, float]]:
    """{visit: (mean over seeds of the rise before the next one, half of its 95 % interval)} of "answers" or
    "texts"; visits that a seed lacks are left out."""
    cfg, out = next(iter(loops.values())).cfg, {}
    for visit in range(1, cfg.cycles + cfg.tail):
        found = [recoveries(by[s], loops[s], visit).get(what) for s in by]
        if all(found):
            [mean], [half] = band([np.array([[x["rise"]]]) for x in found])
            out[visit] = mean, half
    return out
