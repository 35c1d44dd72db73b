"""Why did it come back? The analysis of loop_train.py: recovery, the decision table, outcomes, figures.

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

from common.tables import grid, new_figure, save_figure
from probes.effects import band, between, cells, describe, judge, said, write_report
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
                  {r["step"]: np.array(r["cue"]) for r in rows if r.get("cue")}, again)


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


def recoveries(r: Record, loops: Loops) -> dict[str, dict]:
    """Of the questions (answer beyond foil) and of the texts, before their loops return."""
    cfg, found = loops.cfg, {}
    K, horizon = cfg.loops, (cfg.loops - 1) * cfg.segment
    enough = (r.came >= 2) & (r.steps % cfg.segment == 0)[:, None]  # not while a switch shakes everything
    if cfg.questions:
        written = enough & (r.steps < cfg.cycles * cfg.cycle)[:, None]
        since, use = (np.repeat(z, cfg.questions, axis=1) for z in (r.since, written))  # (P, K Q)
        margins = (r.choices[:, :, :K] - r.choices[:, :, K:]).transpose(0, 2, 1).reshape(len(r.steps), -1)
        found["answers"] = recovery(margins, since, use, horizon)
    found["texts"] = recovery(-r.text, r.since, enough, horizon)
    return {k: v for k, v in found.items() if v}


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
    use = [f.group.startswith("own") and id(f) not in taught for f in loops.written]
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
    where = np.array([f.loop for f in loops.written])
    if loops.shares:
        new, end = groups == "new", cfg.new_at + cfg.segment
        at = [int(np.argmin(abs(r.steps - s))) for s in (end, cfg.new_at + 20)]
        return {"new facts, at the end of their loop": gains[at[0], new],
                "new facts, at the end": gains[-1, new],
                "old facts, after 20 steps of the new loop": gains[at[1], old],
                "old facts, at the end": gains[-1, old]}
    ending = (r.steps >= (cfg.cycles - 1) * cfg.cycle) & (r.steps <= cfg.cycles * cfg.cycle)
    if any(f.group.startswith("own") for f in loops.written):
        ends = [gains[r.since[:, k] == 0][:, where == k] for k in range(cfg.loops)]
        ends = [z.mean(axis=0) for z in ends if len(z)]  # some loops may never come
        if ends:
            out["own facts, right after their loop"] = np.concatenate(ends)
        out["own facts, over the last written cycle"] = gains[ending][:, where >= 0].mean(axis=0)
        out["own facts, at the end"] = gains[-1][where >= 0]
    arrivals = [r.text[(r.steps % cfg.segment == 0) & (r.loop == k), k] for k in range(cfg.loops)]
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
    """(the summary, the words for the terminal); writes table.md and effect.png."""
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
    words = ["", "why does it come back?",
             *(f"  {e['arm']}, {e['cause']}: {e['verdict']} ({brief(e['effect'])}"
               + (f"; beyond {e['control']} {brief(e['against'])})"
                  if e["against"] and e["against"] != e["effect"] else ")") for e in table),
             "", *cost_of(run),
             *(f"{label}: recovery before the return {', '.join(f'{v:.0%} of {k}' for k, v in r.items())}"
                   for label, r in ratios.items() if r), "", *lines]
    summary = {"causes": table, "outcomes": found, "recovery": ratios,
               "counts": {"runs": len(plans), "switching": run.switching}}
    text = grid([["arm", "cause", "effect, nats", "95 % from", "to", "p (Holm)", "", "decided by",
                  "beyond it", "from", "to", "p (Holm)", "", "verdict"],
                 *([e["arm"], e["cause"], *cells(e["effect"]), e["control"],
                    *(cells(e["against"]) if e["against"] else [""] * 5), e["verdict"]] for e in table)])
    return write_report(run, text, words, lambda path: draw(of, loops, records, path), summary)


def draw(arms: dict, plans: dict, records: dict, path: str) -> None:
    """For each arm: recovery curves, answers over the whole run, and what each loop does to each text."""
    figure = new_figure(4.2 * len(arms) + 1, 9)
    axes = figure.subplots(3, len(arms), squeeze=False)
    for column, label in zip(axes.T, arms, strict=True):
        cfg, loops, by = arms[label], plans[label], records[label]
        one = next(iter(by.values()))
        for i, what in enumerate(("answers", "texts")):
            curves = [x[what] for s in by if what in (x := recoveries(by[s], loops[s]))]
            if curves and len({len(x["curve"]) for x in curves}) == 1:
                mean, half = band([np.array([x["curve"]]) for x in curves])
                column[0].errorbar(curves[0]["lags"], np.array(mean) - mean[0], half, color=f"C{i}",
                                   label=what, capsize=2)
        column[0].axvline((cfg.loops - 1) * cfg.segment, color="black", linewidth=0.8)
        column[0].set(title=label, xlabel="steps since the loop's own segment")
        for k in range(min(cfg.loops, 8)) if cfg.questions else ():
            margins = np.mean([(r.choices[:, :, k] - r.choices[:, :, -1]).mean(axis=1)
                               for r in by.values()], axis=0)
            column[1].plot(one.steps, margins, color=f"C{k}", label=f"loop {k}", linewidth=0.9)
        for k in range(min(cfg.loops, 3)) if not cfg.questions else ():
            column[1].plot(one.steps, np.mean([r.text[:, k] for r in by.values()], axis=0), color=f"C{k}",
                           label=f"text {k}", linewidth=0.9)
        if cfg.questions:
            column[1].axhline(0, color="black", linewidth=0.8)  # the foil
        column[1].axvline(cfg.cycles * cfg.cycle, color="black", linestyle=":")
        column[1].set(xlabel="step (dotted: the last is written)")
        effect = np.mean([during(r, loops[s]) for s, r in by.items()], axis=0)
        top = max(float(np.nanmax(abs(effect))), 1e-9) if np.isfinite(effect).any() else 1.0
        picture = column[2].imshow(effect, cmap="RdBu_r", vmin=-top, vmax=top)
        if cfg.loops <= 8:
            column[2].set(xticks=range(cfg.loops), yticks=range(cfg.loops))
        column[2].set(xlabel="text of loop", ylabel="while this loop runs")
        figure.colorbar(picture, ax=column[2], label="change of loss")
    axes[0][0].set_ylabel("nats since then")
    asks = next(iter(arms.values())).questions
    axes[1][0].set_ylabel("log p of its answer beyond the foil" if asks else "loss on its text")
    for row in axes[:2]:
        if row[0].get_legend_handles_labels()[0]:
            row[0].legend(fontsize=8)
    save_figure(figure, path)


def cost_of(run) -> list[str]:
    """What keeping optimiser states costs, in words."""
    seconds, times, size = run.switching
    return [f"a kept state has {size / 2**20:.1f} MiB; a switch takes {1000 * seconds / times:.1f} ms, all "
            f"{times:,} together {seconds / max(run.seconds, 1e-9):.2%} of the time"] if times else []


def during(r: Record, loops: Loops) -> np.ndarray:
    """(K, K): the change of each text's loss while each loop runs, from the second cycle on."""
    cfg, at = loops.cfg, {int(s): i for i, s in enumerate(r.steps)}
    out = [[] for _ in range(cfg.loops)]
    for g in range(cfg.loops, len(loops.order)):
        ends = (g * cfg.segment, (g + 1) * cfg.segment)
        if 0 <= loops.order[g] < cfg.loops and set(ends) <= set(at):
            out[loops.order[g]].append(r.text[at[ends[1]]] - r.text[at[ends[0]]])
    return np.array([np.mean(z, axis=0) if z else np.full(cfg.loops, np.nan) for z in out])


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
