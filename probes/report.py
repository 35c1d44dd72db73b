"""The report of memory_probe.py's exposure experiments: from rows of probes to effects, words and figures.

Units: effects in nats of log p(target), steps since a group's last exposure unless said otherwise.
"""
import math
from collections import Counter

from common import stats
from common.tables import grid, new_figure, save_figure
from probes.effects import NO_ENDPOINT, band, between, cells, describe, judge, said, write_report

import numpy as np

HORIZONS = (0, 10, 100, 1000)  # steps after a group's last exposure at which verdicts are given, and the end
KINDS = {"mem": "trained wording", "para": "other wording", "qa": "question", "reverse": "reverse",
         "comp": "two hops", "old": "old answer"}
CONTROLS = ("zero", "heavy")  # groups that test the set-up


def table_of(rows: list[dict], arm: str, kind: str) -> dict:
    """{(seed, twin): {step: what was found}} of one kind of probe."""
    out = {}
    for r in rows:
        (label, *key), kinds = r["part"], r["kinds"]
        if label == arm and kind in kinds:
            found = kinds[kind] | {"unseen_confidence": r["unseen_confidence"]}
            if kind == "reverse":  # beyond the same name after another answer
                found |= {"logp": np.subtract(found["logp"], kinds["foil"]["logp"]).tolist()}
            out.setdefault(tuple(key), {})[r["step"]] = found
    for (seed, twin), by_step in out.items():
        if twin == "B":  # it begins where A stood before the injection
            by_step |= {s: r for s, r in out[seed, "A"].items() if s not in by_step}
    return out


def halves(values) -> np.ndarray:
    """(2, pairs): treated facts, controls."""
    return np.asarray(values, dtype=float).reshape(2, -1)


def twin_effects(table: dict, steps: list[int], key: str = "logp") -> dict[int, np.ndarray]:
    """{seed: (pairs, steps)}: half of (A - B on the treated facts) + (B - A on their controls)."""
    out = {}
    for seed in sorted({s for s, _ in table}):
        a, b = (np.stack([halves(table[seed, twin][s][key]) for s in steps], axis=2) for twin in "AB")
        out[seed] = ((a[0] - b[0]) + (b[1] - a[1])) / 2
    return out


def chaos_floor(table: dict, steps: list[int]) -> float:
    """The root mean square over facts of what one changed background row does, at its largest step."""
    floors = [0.0]
    for seed, twin in table:
        if twin == "chaos":
            a, c = (np.stack([table[seed, t][s]["logp"] for s in steps]) for t in ("A", "chaos"))
            floors.append(float(np.sqrt(((a - c) ** 2).mean(axis=1)).max()))
    return max(floors)


def gate(table: dict, step: int, heavy: list[int], answers: list[str]) -> dict:
    """Does the endpoint work: do facts of many exposures beat the best constant answer?"""
    hits, n = 0, 0
    for (_, twin), by_step in table.items():
        if twin in "AB":
            found = halves(by_step[step]["hit"])[0 if twin == "A" else 1][heavy]
            hits, n = hits + int(found.sum()), n + len(found)
    constant = max(Counter(answers).values()) / max(1, len(answers))
    p = stats.hits_above_chance(hits, n, constant)
    return {"hits": hits, "of": n, "best_constant": constant, "p": p, "passed": p < 0.01}


def horizons(steps: list[int], end: int) -> dict[int, int]:
    """{steps after the end: index in `steps`}: the first probe at or after each horizon, and the last."""
    found = [next((i for i, s in enumerate(steps) if s >= end + h), None) for h in HORIZONS]
    return {steps[i] - end: i for i in (*found, len(steps) - 1) if i is not None}


def analyse_group(effects: dict[str, dict], members: list[int], asked: dict, end: int, cfg) -> dict:
    """Everything about one group of pairs, last written before step `end`: effects at horizons by kind,
    curve, half-life, revival."""
    out = {"pairs": len(members), "end": end, "kinds": {}}
    for kind, by_seed in effects.items():
        steps = asked[kind]
        after = [i for i, s in enumerate(steps) if s >= end]
        curves = [v[members] for v in by_seed.values()]  # (pairs, steps) each
        mean = np.mean([c.mean(axis=0) for c in curves], axis=0)  # (steps,)
        peak = max((i for i in after if steps[i] - end <= (1 if cfg.optimizer == "sgd" else 50)),
                   key=lambda i: mean[i])  # Chang's local acquisition maximum
        entry = {"steps": steps, "mean": mean.tolist(), "half": band(curves)[1],
                 "effectivity": float(mean[peak]),
                 "at": {str(h): describe([c[:, i] for c in curves], cfg.bound)
                        for h, i in horizons(steps, end).items()}}
        late = [i for i in after if i >= peak]
        if cfg.method != "replay":  # which writes on
            entry |= kept(mean[late], [steps[i] - steps[peak] for i in late])
            entry |= comes_back([c[:, late] for c in curves], [steps[i] - end for i in late])
        out["kinds"][kind] = entry
    return out


def kept(mean: np.ndarray, since: list[int]) -> dict:
    """What is kept of a mean curve (T,) that begins at its peak, and by which law; {} below 0.1 nats."""
    if mean[0] <= 0.1:
        return {}
    fit = stats.forgetting_curve(since[1:], mean[1:] / mean[0])
    return {"forgetting": fit.kind, "half_life": fit.half_life, "retained": float(mean[-1] / mean[0])}


UNITS = 8  # seeds from which they are the unit of revival: sign flips of fewer cannot reach p < 0.01


def comes_back(curves: list[np.ndarray], times: list[int]) -> dict:
    """Whether curves (pairs, T), one per seed, rise without exposure. With fewer than UNITS seeds pairs are
    the unit, and the statement is about these seeds alone."""
    units = np.stack([c.mean(axis=0) for c in curves]) if len(curves) >= UNITS else np.concatenate(curves)
    if units.shape[1] < 3 or len(units) < 2:
        return {}
    rise, t1, t2, p = stats.revival(units, np.zeros_like(units), flips=2000)
    return {"revival": {"rise": rise, "from": times[t1], "to": times[t2], "p": p,
                        "level": float(units[:, t2].mean()),
                        "unit": "seeds" if len(curves) >= UNITS else "pairs"}}


def analyse(label: str, cfg, plan, rows: list[dict], facts: list[dict]) -> dict:
    """Everything about one arm."""
    (groups, due, length), asked_at = plan
    steps, end = list(asked_at), cfg.lead + length
    kinds = [k for k in dict.fromkeys(k for r in rows if r["part"][0] == label for k in r["kinds"])
             if k != "foil"]
    tables = {kind: table_of(rows, label, kind) for kind in kinds}
    asked = {kind: sorted(next(iter(t.values()))) for kind, t in tables.items()}  # steps
    effects = {kind: twin_effects(t, asked[kind]) for kind, t in tables.items()}
    members = {g: [i for i, x in enumerate(groups) if x == g] for g in dict.fromkeys(groups)}
    answers = [f["answer"] for f in facts
               if f["arm"] == label and f["split"] == "treated" and f["group"] == "heavy"]
    mem = tables["mem"]
    out = {"arm": label, "end": end, "seeds": sorted(effects["mem"]), "chaos_floor": chaos_floor(mem, steps),
           "gate": gate(mem, end, members["heavy"], answers),
           "groups": {g: analyse_group(effects, m, asked, cfg.lead + last_written(due, m, length), cfg)
                      for g, m in members.items()},
           "unseen_confidence": [float(np.mean([t[s]["unseen_confidence"] for (_, twin), t in mem.items()
                                                if twin == "A"])) for s in steps],
           "hits": {g: {kind: [hit_rate(t, s, m) for s in asked[kind]] for kind, t in tables.items()}
                    for g, m in members.items()}}
    out["rises_before"] = rises_before(out, cfg)
    for kind in kinds:
        judge([e for g in members if g not in CONTROLS
               for e in out["groups"][g]["kinds"][kind]["at"].values()],
              cfg.bound, out["chaos_floor"], out["gate"]["passed"])
    return out


def last_written(due: dict, members: list[int], length: int) -> int:
    """The step after the last exposure of these pairs; `length` if they have none."""
    return max((step + 1 for step, said in due.items() if any(pair in members for pair, _ in said)),
               default=length)


def hit_rate(table: dict, step: int, members: list[int]) -> list[float]:
    """[of facts that were trained, of the same facts in the other twin, where they were not]"""
    found = [[], []]
    for (_, twin), by_step in table.items():
        if twin in "AB":
            hits = halves(by_step[step]["hit"])
            own = 0 if twin == "A" else 1
            found[0] += hits[own][members].tolist()
            found[1] += hits[1 - own][members].tolist()
    return [float(np.mean(f)) for f in found]


def rises_before(arm: dict, cfg) -> bool:
    """Whether any effect differs from 0 at the step before the injection: a leak or an error of ours."""
    return any(abs(v) > 1e-6 for g in arm["groups"].values() for e in g["kinds"].values()
               for s, v in zip(e["steps"], e["mean"], strict=True) if s <= cfg.lead)


# ------------------------------------------------------------------------------------------------------------
# Words


def number(x: float) -> str:
    return f"{x:+.2f}" if math.isfinite(x) else "?"


def words_of_group(name: str, g: dict, floor: float) -> str:
    e = g["kinds"]["mem"]
    (_, first), (last_step, last) = list(e["at"].items())[0], list(e["at"].items())[-1]
    text = (f"{name}: {number(first['mean'] / math.log(2))} bits right after; in nats {said(first)}. After "
            f"{int(last_step):,} steps {number(last['mean'])} ({number(last['low'])} to "
            f"{number(last['high'])}): {last['verdict']}.")
    if "half_life" in e and e["half_life"] <= e["steps"][-1] - g["end"]:
        text += f" Half of it is gone after {e['half_life']:,.0f} steps ({e['forgetting']} fit)."
    elif "half_life" in e and e["retained"] > 0.5:
        text += f" {e['retained']:.0%} of its peak is left at the end."
    if r := e.get("revival"):
        found, where = f"p {r['p']:.2g}", f"{number(r['rise'])} from step {r['from']} to {r['to']}"
        if r["p"] >= 0.01 or r["level"] <= floor:
            text += f" No revival ({found})."
        elif r["unit"] == "seeds":
            text += f" It comes back: {where} ({found})."
        else:
            text += (f" In these seeds it rises again: {where} ({found} over pairs; a claim needs {UNITS} "
                     "seeds).")
    return text


def words(arms: list[dict]) -> list[str]:
    lines = []
    for a in arms:
        lines.append(f"\n{a['arm']} ({len(a['seeds'])} seeds; chaos floor {a['chaos_floor']:.3f} nats)")
        t = a["gate"]
        if not t["passed"]:
            lines.append(f"  {NO_ENDPOINT}: of {t['of']} heavily exposed facts {t['hits']} are answered, by "
                         f"the best constant answer {t['best_constant']:.1%}; nothing below counts")
        if a["rises_before"]:
            lines.append("  something is wrong: effects differ from 0 before the injection")
        if zero := a["groups"].get("zero"):
            e = next(iter(zero["kinds"]["mem"]["at"].values()))
            lines.append(f"  never written (zero): {number(e['mean'])} nats ({number(e['low'])} to "
                         f"{number(e['high'])})")
        lines += ["  " + words_of_group(name, g, a["chaos_floor"]) for name, g in a["groups"].items()
                  if name not in CONTROLS]
    return lines


def comparisons(cfg, labels, plans, rows, analysed) -> list[dict]:
    """Differences at the end, seed by seed: between the groups of the first arm (for experiments that compare
    groups), and of each arm to the first. Arms whose endpoint does not work are left out."""
    values = {}
    for label, ((groups, _, _), steps), found in zip(labels, plans, analysed, strict=True):
        if found["gate"]["passed"]:
            effects = twin_effects(table_of(rows, label, "mem"), list(steps))
            members = {g: [i for i, x in enumerate(groups) if x == g] for g in dict.fromkeys(groups)}
            values[label] = {g: {s: v[m][:, -1].mean(keepdims=True) for s, v in effects.items()}
                             for g, m in members.items() if g not in CONTROLS}
    first, out = values.get(labels[0], {}), []
    if cfg.experiment in ("spacing", "dilution", "retention"):
        out += [(f"{a} - {b}", first[a], first[b]) for a, b in zip(list(first)[1:], first, strict=False)]
    out += [(f"{label}, {g} - {labels[0]}", by_group[g], first[g])
            for label, by_group in values.items() if label != labels[0] for g in by_group if g in first]
    out = [{"what": what, **describe([a[s] - b[s] for s in a if s in b], cfg.bound)} for what, a, b in out]
    judge(out, cfg.bound)
    return out


def intrusion(table: dict, groups: list[str], facts: list[dict], answers: list[str], step: int,
              cohort: str) -> tuple[float, float]:
    """(of the wrong answers about older cohorts at `step`, the share that the newest one was just taught; the
    share by chance)."""
    older = [i for i, g in enumerate(groups) if g.startswith("cohort") and int(g[6:]) < int(cohort[6:])]
    intruded, wrong, chance = 0, 0, []
    for (seed, twin), by_step in table.items():
        if twin in "AB":
            new = {answers.index(f["answer"]) for f in facts if f["group"] == cohort and f["seed"] == seed}
            own = 0 if twin == "A" else 1
            guess, hit = (halves(by_step[step][key])[own][older] for key in ("guess", "hit"))
            missed = guess[hit == 0]
            intruded, wrong = intruded + sum(g in new for g in missed.tolist()), wrong + len(missed)
            chance.append(len(new) / len(answers))
    return intruded / max(1, wrong), float(np.mean(chance))


def continual(cfg, arms: list[dict], plans: list, rows: list[dict], facts: list[dict],
              answers: list[str]) -> list[str]:
    """How much each method learns, what it keeps of older cohorts, and what intrudes: a line per arm. Then
    the share kept against the first arm's, so that methods that learn differently much compare."""
    lines, shares, base = [], {}, None
    for arm, ((groups, _, _), _) in zip(arms, plans, strict=True):
        cohorts = [g for g in arm["groups"] if g.startswith("cohort")]
        table, ends = table_of(rows, arm["arm"], "mem"), [arm["groups"][c]["end"] for c in cohorts]
        steps = sorted(next(iter(table.values())))
        of = np.array(groups)
        at = {seed: np.array([[v[of == c, j].mean() for j in (steps.index(end), -1)]
                              for c, end in zip(cohorts, ends, strict=True)])
              for seed, v in twin_effects(table, steps).items()}  # (cohorts, right after and at the end)
        jump, kept = np.mean([a[:, 0].mean() for a in at.values()]), np.mean([a[:-1, 1] for a in at.values()])
        base = jump if base is None else base
        if arm["gate"]["passed"] and jump > 0.1:
            shares[arm["arm"]] = {s: a[:-1, 1].sum(keepdims=True) / a[:-1, 0].sum() for s, a in at.items()}
        own = [f for f in facts if f["arm"] == arm["arm"]]
        rates, chances = zip(*(intrusion(table, groups, own, answers, end, c)
                               for c, end in list(zip(cohorts, ends, strict=True))[1:]), strict=True)
        chance = np.mean(chances)
        arm["continual"] = {"learned": float(jump), "kept": float(kept), "plasticity": float(jump / base),
                            "intrusion": float(np.mean(rates)), "intrusion_by_chance": float(chance)}
        little = ": too little, it keeps because it does not learn" if jump < 0.8 * base else ""
        lines.append(f"{arm['arm']}: learns {number(jump)} nats of a cohort ({jump / base:.0%} of the first "
                     f"arm{little}), older cohorts end at {number(kept)} ({kept / jump:.0%}); "
                     f"{np.mean(rates):.0%} of wrong answers about them are the newest cohort's (by chance "
                     f"{chance:.0%})")
    return lines + between(list(shares.values()), list(shares), cfg.bound,
                           "kept by older cohorts of what they gained, as a share")


# ------------------------------------------------------------------------------------------------------------
# Table and figure


def report(cfg, labels, arms, plans, rows, facts, answers: list[str], run) -> tuple[dict, str]:
    """(the summary, the words for the terminal); writes table.md and effect.png."""
    analysed = [analyse(label, c, plan, rows, facts)
                for label, c, plan in zip(labels, arms, plans, strict=True)]
    compared = comparisons(cfg, labels, plans, rows, analysed)
    lines = [*words(analysed), "", *(f"{c['what']}: {said(c)}" for c in compared)]
    if cfg.experiment == "continual":
        lines += ["", *continual(cfg, analysed, plans, rows, facts, answers)]
    return write_report(run, table(analysed), lines, lambda path: draw(analysed, cfg, path),
                        {"arms": analysed, "comparisons": compared})


def table(arms: list[dict]) -> str:
    lines = [["arm", "group", "probe", "pairs", "right", "control", "steps after", "effect, nats",
              "95 % from", "to",
              "p (Holm)", "verdict"]]
    for a in arms:
        for name, g in a["groups"].items():
            for kind, e in g["kinds"].items():
                for h, x in e["at"].items():
                    hit = a["hits"][name][kind][e["steps"].index(g["end"] + int(h))]
                    judged = cells({"p_holm": math.nan, "verdict": "control"} | x)
                    lines.append([a["arm"], name, KINDS[kind], str(g["pairs"]), f"{hit[0]:.0%}",
                                  f"{hit[1]:.0%}", h,
                                  *judged])
    return grid(lines)


def draw(arms: list[dict], cfg, path: str) -> None:
    """For each arm: effect by group with bands, right answers, and for cohorts a map by age."""
    ages = cfg.experiment == "continual"
    figure = new_figure(4.6 * len(arms) + 1, 9 if ages else 6.4)
    axes = figure.subplots(3 if ages else 2, len(arms), squeeze=False, sharey="row")
    for column, a in zip(axes.T, arms, strict=True):
        for i, (name, g) in enumerate(a["groups"].items()):
            e, color = g["kinds"]["mem"], f"C{i}"
            x, mean, half = np.array(e["steps"]) - a["end"], np.array(e["mean"]), np.array(e["half"])
            column[0].plot(x, mean, color=color, label=name)
            column[0].fill_between(x, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
            hits = np.array(a["hits"][name]["mem"])
            column[1].plot(x, hits[:, 0], color=color)
            column[1].plot(x, hits[:, 1], color=color, linestyle=":")
        column[0].axhspan(-a["chaos_floor"], a["chaos_floor"], color="black", alpha=0.15, linewidth=0)
        column[0].set_title(a["arm"], fontsize=9)
        for ax in column[:2]:
            ax.set_xscale("symlog", linthresh=10, linscale=0.6)
            ax.set(xlim=(x[0], x[-1]), xlabel="steps after the injection")
            ax.axvline(0, color="black", linewidth=0.8)
            ax.grid(alpha=0.3)
        column[1].set_ylim(-0.02, 1.02)
        if ages:
            cohorts = [g for name, g in a["groups"].items() if name.startswith("cohort")]
            steps = cohorts[0]["kinds"]["mem"]["steps"]
            picture = column[2].pcolormesh(range(len(steps)), range(1, len(cohorts) + 1), np.array(
                [g["kinds"]["mem"]["mean"] for g in cohorts]), cmap="RdBu_r", vmin=-3, vmax=3,
                shading="nearest")
            column[2].set_xticks(range(0, len(steps), 4), steps[::4])
            column[2].set(xlabel="step", ylabel="cohort")
    if ages:
        figure.colorbar(picture, ax=axes[2].tolist(), label="effect, nats")
    axes[0][0].set_ylabel("twin effect on log p, nats\n(grey: chaos floor)")
    axes[1][0].set_ylabel("right answers\n(dotted: in the other twin)")
    axes[0][0].legend(fontsize=8)
    save_figure(figure, path)
