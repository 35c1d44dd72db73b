"""Why did it come back? The analysis of loop_train.py: the decision table, outcomes, the toy.

Shapes: P probed steps, K loops, Q questions, F facts, N items
"""
import math

from common.tables import grid
from probes.effects import between, cells, describe, judge, said, write_report
from probes.loop_figures import draw
from probes.loops import Loops
from probes.records import Record, by_visit, record, recoveries, recovery

import numpy as np

# ------------------------------------------------------------------------------------------------------------
# Causes: each a function of one seed's record to items (N,), or None where it says nothing


def last_write(r: Record, loops: Loops) -> np.ndarray | None:
    """log p of the answer given last minus that of the loop that runs, while they differ, by question."""
    use = (r.last >= 0) & (r.loop[:, None] >= 0) & (r.loop[:, None] < loops.cfg.loops) \
        & (r.last != r.loop[:, None]) & (r.came.min(axis=1) >= 1)[:, None] \
        & (r.steps < loops.cfg.cycles * loops.cfg.cycle)[:, None]
    if not use.any(axis=0).all() or not use.size:
        return None
    p, q = np.nonzero(use)
    margins = np.zeros(use.shape)
    margins[p, q] = r.choices[p, q, r.last[p, q]] - r.choices[p, q, r.loop[p]]
    return margins.sum(axis=0) / use.sum(axis=0)


def moved_by_phase(r: Record, loops: Loops) -> np.ndarray | None:
    """log p of the running loop's answer minus that of the loop before: of questions that it has answered
    already, minus of those whose phase is still to come, at the same steps."""
    cfg, out = loops.cfg, []
    for i in np.flatnonzero((r.loop >= 0) & (r.came.min(axis=1) >= 1) & (r.steps < cfg.cycles * cfg.cycle)
                            & (r.loop < cfg.loops)):
        before = loops.order[max(0, r.steps[i] // cfg.segment - 1)]
        own = r.choices[i, :, r.loop[i]] - r.choices[i, :, before]  # (Q,)
        done = r.last[i] == r.loop[i]
        if before >= 0 and before != r.loop[i] and done.any() and not done.all():
            out.append(own[done].mean() - own[~done].mean())
    return np.array([np.mean(out)]) if out else None


def cue(r: Record, loops: Loops) -> np.ndarray | None:
    """log p of each loop's answer beyond the others' after a piece of its own text, minus after the
    others'."""
    out = []
    for found in r.cues.values():
        answers = found[:, :, :-1]  # (K prefixes, Q, K answers)
        K = len(answers)
        margin = answers - (answers.sum(axis=2, keepdims=True) - answers) / (K - 1)
        own = np.stack([margin[k, :, k] for k in range(K)])  # (K, Q)
        every = margin.sum(axis=0).T  # (K, Q) over prefixes
        out.append((own - (every - own) / (K - 1)).mean(axis=0))
    return np.mean(out, axis=0) if out else None


def shaken(r: Record, loops: Loops) -> np.ndarray | None:
    """By how much the loss on texts of neither loop rises in the first two steps of a segment, then falls
    until its end: the smaller of both, (texts,)."""
    cfg, out = loops.cfg, []
    at = {int(s): i for i, s in enumerate(r.steps)}
    for g in range(2 * cfg.loops, len(loops.order) - 1):
        s = g * cfg.segment
        if {s, s + 2, s + cfg.segment} <= set(at):
            before, jolted, after = (r.text[at[t]] for t in (s, s + 2, s + cfg.segment))
            out.append([min(jolted[k] - before[k], jolted[k] - after[k]) if k not in loops.order[g - 1:g + 1]
                        else np.nan for k in range(cfg.loops)])
    return np.nanmean(out, axis=0) if out and not np.isnan(out).all(axis=0).any() else None


def free_lunch(r: Record, loops: Loops) -> np.ndarray | None:
    """What the own facts that were not relearnt gain when the other half is."""
    taught = {id(f) for f, _ in loops.lessons}
    use = [loops.is_own(f) and id(f) not in taught for f in loops.written]
    return r.again[use] if r.again is not None and any(use) else None


def redirected(r: Record, loops: Loops) -> np.ndarray | None:
    """log p of a loop's answer beyond the foil while another answer was given last and the guess is wrong."""
    cfg, out = loops.cfg, []
    for k in range(cfg.loops):
        use = (r.came[:, k] >= 1)[:, None] & (r.last != k) & (r.guess != k)
        margin = np.where(use, r.choices[:, :, k] - r.choices[:, :, -1], np.nan)
        out.append(margin)
    out = np.concatenate(out) if out else np.zeros((0, 0))
    return np.nanmean(out, axis=0) if out.size and not np.isnan(out).all(axis=0).any() else None


# ------------------------------------------------------------------------------------------------------------
# Verdicts


def over_seeds(items, records: dict, loops: dict) -> list[np.ndarray] | None:
    """items(record, loops) of all seeds; None if one says nothing."""
    out = [items(records[s], loops[s]) for s in records]
    return out if all(v is not None and len(v) for v in out) else None


def minus(a: list | None, b: list | None) -> list | None:
    if a and b:
        return [x.mean(keepdims=True) - y.mean(keepdims=True) for x, y in zip(a, b, strict=True)]
    return None


def decide(cfg, arms: dict, plans: dict, records: dict) -> list[dict]:
    """The decision table: for each arm and cause its effect, the control that decides it, and a verdict."""
    out = [e for label, c in arms.items() if c.start == "none"
           for e in decide_arm(label, cfg, arms, plans, records)]
    judge([e["effect"] for e in out], cfg.bound)
    judge([e["against"] for e in out if e["against"]], cfg.bound)
    for e in out:
        e["verdict"] = answer(e)
    return out


def decide_arm(label: str, cfg, arms: dict, plans: dict, records: dict) -> list[dict]:
    c, mine, plan, out = arms[label], records[label], plans[label], []
    others = {name: o for name, o in arms.items()
              if o.start == "none" and name != label and o.optimizer == c.optimizer}
    carried = next((n for n, o in others.items() if (o.first, o.second) == ("global", "global")
                    and o.order == c.order), None)
    random = next((n for n, o in others.items() if o.order in ("random", "shuffled")), None)

    def add(cause: str, effect, control: str, against, needs: str = "") -> None:
        """effect: a list over seeds of items; against: the same of what decides, None if it is missing."""
        if effect:
            out.append({"arm": label, "cause": cause, "control": control, "needs": needs,
                        "effect": describe(effect, cfg.bound),
                        "against": describe(against, cfg.bound) if against else None})

    add("last write", over_seeds(last_write, mine, plan), "questions answered already against those to come",
        over_seeds(moved_by_phase, mine, plan), "several --phases")
    for cause, items, control in (("cue", cue, "the other loops' texts in its place"),
                                  ("free lunch", free_lunch, "controls, never written"),
                                  ("redirected", redirected, "the foil, never written")):
        found = over_seeds(items, mine, plan)
        add(cause, found, control, found)
    jolted = over_seeds(shaken, mine, plan)
    if (c.first, c.second) == ("global", "global"):
        add("stability gap", jolted, "none: the state is carried on", jolted)
    else:
        there = over_seeds(shaken, records[carried], plans[carried]) if carried else None
        add("jolt", jolted, f"'{carried}', whose state is carried on", minus(jolted, there),
            "an arm whose moments are carried on")
    for what in ("answers", "texts") if c.order in ("cycle", "reversed") else ():
        rises = over_seeds(lambda r, loops, what=what: rise_of(r, loops, what), mine, plan)
        there = over_seeds(lambda r, loops, what=what: rise_of(r, loops, what), records[random],
                           plans[random]) if random else None
        add(f"anticipation of {what}", rises, f"'{random}' at the same lags", minus(rises, there),
            '--arm="order=random"')
    return out


def brief(e: dict) -> str:
    return f"{e['mean']:+.2f} nats, {e['low']:+.2f} to {e['high']:+.2f}"


def rise_of(r: Record, loops: Loops, what: str) -> np.ndarray | None:
    found = recoveries(r, loops).get(what)
    return np.array([found["rise"]]) if found else None


def answer(e: dict) -> str:
    """yes, no or undecided: the effect must be there, and beyond what decides."""
    effect, against = e["effect"], e["against"]
    if effect["verdict"] != "signal":
        return f"no, {effect['verdict']}" if effect["verdict"].startswith("none") else effect["verdict"]
    if effect["mean"] < 0:
        return "no, the opposite"
    if against is None:
        return f"undecided: needs {e['needs']}"
    if against["verdict"] == "signal":
        return "yes" if against["mean"] > 0 else "no, less than its control"
    if against["verdict"].startswith("none"):
        return f"no more than its control: {against['verdict']}"
    return f"beyond its control {against['verdict']}"


# ------------------------------------------------------------------------------------------------------------
# Outcomes: what the arms are compared by


def outcomes(r: Record, loops: Loops) -> dict[str, np.ndarray]:
    """{what: items (N,)} of one seed: nats of facts beyond their controls, since the first probe."""
    cfg, out = loops.cfg, {}
    gains, groups = r.facts - r.facts[0], np.array([f.group for f in loops.written])
    old = np.array([f.group not in ("new", "") for f in loops.written], dtype=bool)
    where = np.array([f.loop if loops.is_own(f) else -1 for f in loops.written])
    if loops.shares:
        new, end = groups == "new", cfg.new_at + cfg.segment
        at = [int(np.argmin(abs(r.steps - s))) for s in (end, cfg.new_at + 20)]
        return {"new facts, at the end of their loop": gains[at[0], new],
                "new facts, at the end": gains[-1, new],
                "old facts, after 20 steps of the new loop": gains[at[1], old],
                "old facts, at the end": gains[-1, old]}
    ending = (r.steps >= (cfg.cycles - 1) * cfg.cycle) & (r.steps <= cfg.cycles * cfg.cycle)
    if (where >= 0).any():
        ends = [gains[r.since[:, k] == 0][:, where == k] for k in range(cfg.loops)]
        ends = [z.mean(axis=0) for z in ends if len(z)]  # some loops may never come
        if ends:
            out["own facts, right after their loop"] = np.concatenate(ends)
        out["own facts, over the last written cycle"] = gains[ending][:, where >= 0].mean(axis=0)
        out["own facts, at the end"] = gains[-1][where >= 0]
    begins = (r.steps % cfg.segment == 0) & (r.steps < loops.length)
    arrivals = [r.text[begins & (r.loop == k), k] for k in range(cfg.loops)]
    arrivals = [a[1:].mean() if len(a) > 1 else a[0] for a in arrivals if len(a)]  # some may never come
    if arrivals:
        out["loss on a loop's text as it begins"] = np.array(arrivals)
    return out


def compare(cfg, arms: dict, plans: dict, records: dict) -> tuple[dict, list[str]]:
    """({arm: {what: effect}}, words): of each arm, and against the first of its kind."""
    found = {label: {s: outcomes(records[label][s], plans[label][s]) for s in records[label]}
             for label in arms}
    asked = {label: [what for what in next(iter(by.values())) if all(what in z for z in by.values())]
             for label, by in found.items()}
    out = {label: {what: describe([by[s][what] for s in by], cfg.bound) for what in asked[label]}
           for label, by in found.items()}
    lines = []
    for shares in (False, True):
        same = [label for label, c in arms.items() if (c.start != "none") == shares]
        for what in asked[same[0]] if same else ():
            with_it = [label for label in same if what in asked[label]]
            lines += [f"{label}: {what} {e['mean']:+.2f} ({e['low']:+.2f} to {e['high']:+.2f})"
                      for label in with_it for e in [out[label][what]]]
            lines += between([{s: by[what] for s, by in found[label].items()} for label in with_it], with_it,
                             cfg.bound, what)
    return out, lines


# ------------------------------------------------------------------------------------------------------------
# Report


def report(cfg, arms: list, labels: list[str], plans: dict, rows: list[dict], run) -> tuple[dict, str]:
    """(the summary, the words for the terminal); writes table.md and the figures."""
    by = {}
    for row in rows:
        by.setdefault(tuple(row["part"]), []).append(row)
    seeds = sorted({s for _, s in plans})
    of = dict(zip(labels, arms, strict=True))
    loops = {label: {s: plans[label, s] for s in seeds} for label in labels}
    records = {label: {s: record(plans[label, s], by[label, s]) for s in seeds} for label in labels}
    table, (found, lines) = decide(cfg, of, loops, records), compare(cfg, of, loops, records)
    ratios = {}
    for label in labels:
        every = [recoveries(records[label][s], loops[label][s]) for s in seeds]
        ratios[label] = {what: float(np.mean(them)) for what in ("answers", "texts")
                         if (them := [x[what]["recovery"] for x in every
                                      if what in x and math.isfinite(x[what]["recovery"])])}
    visits = {label: {what: by_visit(records[label], loops[label], what) for what in ("answers", "texts")}
              for label in labels}
    words = ["", "why does it come back?",
             *(f"  {e['arm']}, {e['cause']}: {e['verdict']} ({brief(e['effect'])}"
               + (f"; beyond {e['control']} {brief(e['against'])})"
                  if e["against"] and e["against"] != e["effect"] else ")") for e in table),
             "", *cost_of(run),
             *(f"{label}: recovery before the return {', '.join(f'{v:.0%} of {k}' for k, v in r.items())}"
                   for label, r in ratios.items() if r), "", *lines]
    summary = {"causes": table, "outcomes": found, "recovery": ratios,
               "by_visit": visits, "counts": {"runs": len(plans), "switching": run.switching}}
    text = grid([["arm", "cause", "effect, nats", "95 % from", "to", "p (Holm)", "", "decided by",
                  "beyond it", "from", "to", "p (Holm)", "", "verdict"],
                 *([e["arm"], e["cause"], *cells(e["effect"]), e["control"],
                    *(cells(e["against"]) if e["against"] else [""] * 5), e["verdict"]] for e in table)])
    return write_report(run, text, words, lambda _: draw(of, loops, records, found, run), summary)


def cost_of(run) -> list[str]:
    """What keeping optimiser states costs, in words."""
    seconds, times, size = run.switching
    return [f"a kept state has {size / 2**20:.1f} MiB; a switch takes {1000 * seconds / times:.1f} ms, all "
            f"{times:,} together {seconds / max(run.seconds, 1e-9):.2%} of the time"] if times else []


# ------------------------------------------------------------------------------------------------------------
# The toy


def toy_losses(seed: int, shuffled: bool, tasks=25, width=20, steps=100, cycles=10, lr=0.01):
    """(losses (visits, tasks) after each visit, the task of each visit). One layer: task i has the loss
    |M_i w - y_i|^2 / 2 with a weight w (width,) that all share and a map M_i (width, width) of its own."""
    rng = np.random.default_rng(seed)
    w, maps = rng.normal(size=width) / width**0.5, rng.normal(size=(tasks, width, width)) / width**0.5
    targets, losses, visits = rng.normal(size=(tasks, width)), [], []
    for _ in range(cycles):
        for i in rng.permutation(tasks) if shuffled else range(tasks):
            for _ in range(steps):
                error = maps[i] @ w - targets[i]
                w, maps[i] = w - lr * maps[i].T @ error, maps[i] - lr * np.outer(error, w)
            losses.append(((maps @ w - targets) ** 2).sum(axis=1) / 2)
            visits.append(int(i))
    return np.array(losses), visits


def toy_recovery(seed: int, shuffled: bool) -> dict:
    """recovery() of the toy from the second cycle on; the lag is in visits."""
    losses, visits = toy_losses(seed, shuffled)
    since, came = np.full(losses.shape, np.nan), np.zeros(losses.shape, dtype=int)
    for i, task in enumerate(visits):
        if i:
            since[i], came[i] = since[i - 1] + 1, came[i - 1]
        since[i, task], came[i, task] = 0, came[i, task] + 1
    return recovery(-losses, since, came >= 2, losses.shape[1] - 1)


def toy(seeds: int, first: int) -> tuple[dict, str]:
    """The positive control of anticipatory recovery (Yang 2024, 2403.09613): (summary, words)."""
    every = range(first, first + seeds)
    found = {name: [toy_recovery(s, name == "shuffled") for s in every] for name in ("cycle", "shuffled")}
    rises = {name: [np.array([x["rise"]]) for x in them] for name, them in found.items()}
    effects = [describe(rises["cycle"], 1e-4), describe(rises["shuffled"], 1e-4),
               describe(minus(rises["cycle"], rises["shuffled"]), 1e-4)]
    judge(effects, 1e-4)
    names = ("in a cycle", "shuffled", "difference")
    lines = [f"{name}: the loss falls before the return by {said(e)}"
             for name, e in zip(names, effects, strict=True)]
    lines += [f"recovery {name}: {np.mean([x['recovery'] for x in them]):.0%}"
              for name, them in found.items()]
    return {"effects": dict(zip(names, effects, strict=True)),
            "recovery": {n: [x["recovery"] for x in them] for n, them in found.items()}}, "\n".join(lines)
