"""From rows of probes to a verdict: effects with intervals, curves, words, figures. Used by memory_probe.py.

Units: effects in nats of log p(target), steps since the end of the injection unless said otherwise.
"""
import math
from collections import Counter

from common import stats
from common.files import write_text
from common.tables import grid, new_figure, save_figure

import numpy as np

HORIZONS = (0, 10, 100, 1000)  # steps after the injection at which verdicts are given, and the end
KINDS = {"mem": "trained wording", "para": "other wording", "qa": "question", "reverse": "reverse",
         "comp": "two hops", "old": "old answer"}
CONTROLS = ("zero", "heavy")  # groups that test the set-up


def table_of(rows: list[dict], arm: int, kind: str) -> dict:
    """{(seed, twin): {step: row}}"""
    out = {}
    for r in rows:
        a, seed, twin = r["part"]
        if a == arm and r["kind"] == kind:
            out.setdefault((seed, twin), {})[r["step"]] = r
    if kind == "reverse":  # beyond the same name after another answer
        for key, by_step in table_of(rows, arm, "foil").items():
            for step, foil in by_step.items():
                if own := out[key].get(step):
                    out[key][step] = own | {"logp": np.subtract(own["logp"], foil["logp"]).tolist()}
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


def describe_effect(values: list[np.ndarray], bound: float) -> dict:
    """An effect over seeds, what this design could have seen, and whether it is equivalent to none."""
    e = stats.clustered(values)
    sd_seed, sd_item = stats.variance_components(values)
    items = round(np.mean([len(v) for v in values]))
    units = [v.mean() for v in values] if len(values) > 1 else values[0]
    p_none, low, high = stats.equivalence(units, bound)
    return {"mean": e.mean, "low": e.low, "high": e.high, "p": e.p, "sd_seed": sd_seed, "sd_item": sd_item,
            "detectable": stats.minimum_detectable(sd_seed, sd_item, len(values), items),
            "none_p": p_none, "none_below": max(abs(low), abs(high)), "seeds": len(values), "items": items}


def verdict(e: dict, bound: float, floor: float) -> str:
    if e["p_holm"] < 0.05 and abs(e["mean"]) > floor:
        return "signal"
    if e["none_p"] < 0.05:
        return f"none larger than {e['none_below']:.2g}"
    if not math.isfinite(e["low"]):
        return "undecided: one unit shows nothing"
    size = max(bound, abs(e["mean"]))
    n = stats.seeds_needed(size, 0.0 if math.isnan(e["sd_seed"]) else e["sd_seed"], e["sd_item"], e["items"])
    more = n - e["seeds"]
    if more <= 0:
        return "undecided"
    return f"undecided: needs {more} more seed{'s' * (more > 1)} to see {size:.2g}"


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
        seeds = np.stack([c.mean(axis=0) for c in curves])  # (S, steps)
        mean = seeds.mean(axis=0)
        units = seeds if len(seeds) > 1 else curves[0]
        half = 1.96 * units.std(axis=0, ddof=1) / math.sqrt(len(units)) if len(units) > 1 else mean * math.nan
        window = [i for i in after if steps[i] - end <= (1 if cfg.optimizer == "sgd" else 50)]
        peak = max(window, key=lambda i: mean[i])
        entry = {"steps": steps, "mean": mean.tolist(), "half": half.tolist(),
                 "effectivity": float(mean[peak]),
                 "at": {str(h): describe_effect([c[:, i] for c in curves], cfg.bound)
                        for h, i in horizons(steps, end).items()}}
        if mean[peak] > 0.1 and cfg.method != "replay":  # which writes on
            kept = mean[[i for i in after if i > peak]] / mean[peak]
            fit = stats.forgetting_curve([steps[i] - steps[peak] for i in after if i > peak], kept)
            entry |= {"forgetting": fit.kind, "half_life": fit.half_life,
                      "retained": float(mean[after[-1]] / mean[peak])}
        late = np.concatenate([c[:, [i for i in after if i >= peak]] for c in curves])
        if late.shape[1] > 2 and len(late) > 1 and cfg.method != "replay":
            rise, t1, t2, p = stats.revival(late, np.zeros_like(late), flips=2000)
            times = [steps[i] - end for i in after if i >= peak]
            entry["revival"] = {"rise": rise, "from": times[t1], "to": times[t2], "p": p,
                                "level": float(late[:, t2].mean())}
        out["kinds"][kind] = entry
    return out


def analyse(label: str, cfg, plan, rows: list[dict], arm: int, facts: list[dict]) -> dict:
    """Everything about one arm."""
    (groups, due, length), grid = plan
    steps, end = list(grid), cfg.lead + length
    kinds = list(dict.fromkeys(r["kind"] for r in rows if r["part"][0] == arm))
    kinds = [k for k in kinds if k != "foil"]
    tables = {kind: table_of(rows, arm, kind) for kind in kinds}
    asked = {kind: sorted(next(iter(t.values()))) for kind, t in tables.items()}  # steps
    effects = {kind: twin_effects(t, asked[kind]) for kind, t in tables.items()}
    members = {g: [i for i, x in enumerate(groups) if x == g] for g in dict.fromkeys(groups)}
    out = {"arm": label, "end": end, "seeds": sorted(effects["mem"]),
           "chaos_floor": chaos_floor(tables["mem"], steps),
           "gate": gate(tables["mem"], end, members["heavy"],
                        [f["answer"] for f in facts if f["arm"] == arm and f["split"] == "treated" and
                         f["group"] == "heavy"]),
           "groups": {g: analyse_group(effects, m, asked, cfg.lead + last_written(due, m, length), cfg)
                      for g, m in members.items()}}
    out["rises_before"] = rises_before(out, cfg)
    tested = [(g, h) for g in members if g not in CONTROLS for h in out["groups"][g]["kinds"]["mem"]["at"]]
    for kind in kinds:
        found = [out["groups"][g]["kinds"][kind]["at"][h] for g, h in tested]
        for e, p in zip(found, stats.holm([e["p"] for e in found]), strict=True):
            e["p_holm"] = p
            e["verdict"] = verdict(e, cfg.bound, out["chaos_floor"]) if out["gate"]["passed"] else \
                "this endpoint does not work"
    ages = [(s, t) for s, t in tables["mem"] if t == "A"]
    out["unseen_confidence"] = [float(np.mean([tables["mem"][a][s]["unseen_confidence"] for a in ages]))
                                for s in steps]
    out["hits"] = {g: {kind: [hit_rate(t, s, m) for s in asked[kind]] for kind, t in tables.items()}
                   for g, m in members.items()}
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
    first, last = list(e["at"].items())[0][1], list(e["at"].items())[-1]
    text = (f"{name}: {number(first['mean'])} nats ({number(first['mean'] / math.log(2))} bits) right "
            "after, 95 % "
            f"interval {number(first['low'])} to {number(first['high'])}, p {first['p_holm']:.2g} (Holm), "
            "detectable "
            f"{first['detectable']:.2f}: {first['verdict']}.")
    text += (f" After {int(last[0]):,} steps {number(last[1]['mean'])} ({number(last[1]['low'])} to "
             f"{number(last[1]['high'])}): {last[1]['verdict']}.")
    if "half_life" in e and e["half_life"] <= e["steps"][-1] - g["end"]:
        text += f" Half of it is gone after {e['half_life']:,.0f} steps ({e['forgetting']} fit)."
    elif "half_life" in e and e["retained"] > 0.5:
        text += f" {e['retained']:.0%} of its peak is left at the end."
    if r := e.get("revival"):
        back = r["p"] < 0.01 and r["level"] > floor
        text += (f" It comes back: {number(r['rise'])} from step {r['from']} to {r['to']} (p {r['p']:.2g})."
                 if back
                 else f" No revival (p {r['p']:.2g}).")
    return text


def words(arms: list[dict], cfg, comparisons: list[dict]) -> str:
    lines = []
    for a in arms:
        lines.append(f"\n{a['arm']} ({len(a['seeds'])} seeds; chaos floor {a['chaos_floor']:.3f} nats)")
        t = a["gate"]
        if not t["passed"]:
            lines.append(f"  this endpoint does not work: of {t['of']} heavily exposed facts {t['hits']} are "
                         f"answered, by the best constant answer {t['best_constant']:.1%}; nothing below "
                         "counts")
        if a["rises_before"]:
            lines.append("  something is wrong: effects differ from 0 before the injection")
        if zero := a["groups"].get("zero"):
            e = next(iter(zero["kinds"]["mem"]["at"].values()))
            lines.append(f"  never written (zero): {number(e['mean'])} nats ({number(e['low'])} to "
                         f"{number(e['high'])})")
        for name, g in a["groups"].items():
            if name not in CONTROLS:
                lines.append("  " + words_of_group(name, g, a["chaos_floor"]))
    lines += ["", *(c["words"] for c in comparisons)] if comparisons else []
    return "\n".join(lines)


def compare(pairs: list[tuple[str, dict, str, dict]], cfg) -> list[dict]:
    """Differences of two effects, seed by seed: (name, values by seed, name, values by seed)."""
    out = []
    for name, a, other, b in pairs:
        seeds = [s for s in a if s in b]
        d = [float(a[s] - b[s]) for s in seeds]
        e = stats.clustered([np.array([x]) for x in d]) if len(d) > 1 else None
        none_p, low, high = stats.equivalence(d, cfg.bound) if len(d) > 1 else (math.nan,) * 3
        out.append({"a": name, "b": other, "seeds": len(d), "difference": float(np.mean(d)),
                    **({"low": e.low, "high": e.high, "p": e.p} if e else {"low": -math.inf, "high": math.inf,
                                                                         "p": math.nan}),
                    "none_p": none_p, "none_below": max(abs(low), abs(high))})
    for c, p in zip(out, stats.holm([c["p"] for c in out]), strict=True):
        none = f"none larger than {c['none_below']:.2g}" if c["none_p"] < 0.05 else "undecided"
        say = "signal" if p < 0.05 else none
        c |= {"p_holm": p, "words": f"{c['a']} - {c['b']}: {number(c['difference'])} nats, 95 % interval "
              f"{number(c['low'])} to {number(c['high'])}, p {p:.2g} (Holm), {c['seeds']} seeds: {say}"}
    return out


def comparisons(cfg, labels, plans, rows, analysed) -> list[dict]:
    """Between the groups of the first arm (for experiments that compare groups), and of each arm to the
    first, at the end. Arms whose endpoint does not work are left out."""
    pairs, values = [], []
    for arm, (((groups, _, _), steps), found) in enumerate(zip(plans, analysed, strict=True)):
        effects = twin_effects(table_of(rows, arm, "mem"), list(steps))
        members = {g: [i for i, x in enumerate(groups) if x == g] for g in dict.fromkeys(groups)}
        values.append({g: {s: v[m][:, -1].mean() for s, v in effects.items()} for g, m in members.items()
                       if g not in CONTROLS and found["gate"]["passed"]})
    names = list(values[0])
    if cfg.experiment in ("spacing", "dilution", "retention"):
        pairs += [(a, values[0][a], b, values[0][b]) for a, b in zip(names[1:], names, strict=False)]
    for label, by_group in zip(labels[1:], values[1:], strict=True):
        pairs += [(f"{label}: {g}", by_group[g], labels[0], values[0][g]) for g in by_group if g in values[0]]
    return compare(pairs, cfg)


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


def continual(arms: list[dict], plans: list, rows: list[dict], facts: list[dict],
              answers: list[str]) -> list[str]:
    """How much each method learns, what it keeps of older cohorts, and what intrudes; a line per arm."""
    lines, base = [], None
    for i, (arm, ((groups, _, _), _)) in enumerate(zip(arms, plans, strict=True)):
        cohorts = [g for g in arm["groups"] if g.startswith("cohort")]
        ats = [list(arm["groups"][c]["kinds"]["mem"]["at"].values()) for c in cohorts]
        jump, kept = np.mean([a[0]["mean"] for a in ats]), np.mean([a[-1]["mean"] for a in ats[:-1]])
        base, table = jump if base is None else base, table_of(rows, i, "mem")
        own = [f for f in facts if f["arm"] == i]
        rates, chances = zip(*(intrusion(table, groups, own, answers, arm["groups"][c]["end"], c)
                               for c in cohorts[1:]), strict=True) if cohorts[1:] else ((0.0,), (0.0,))
        chance = np.mean(chances)
        arm["continual"] = {"learned": float(jump), "kept": float(kept), "plasticity": float(jump / base),
                            "intrusion": float(np.mean(rates)), "intrusion_by_chance": float(chance)}
        lines.append(f"{arm['arm']}: learns {number(jump)} nats of a cohort ({jump / base:.0%} of the first "
                     "arm"
                     f"{': too little, it keeps because it does not learn' if jump < 0.8 * base else ''}), "
                     "older cohorts "
                     f"end at {number(kept)} ({kept / jump:.0%}); {np.mean(rates):.0%} of wrong answers "
                     "about them are "
                     f"the newest cohort's (by chance {chance:.0%})")
    return lines


# ------------------------------------------------------------------------------------------------------------
# Files


def report(cfg, labels, arms, plans, rows, facts, answers: list[str], folder: str) -> tuple[dict, str]:
    """(the summary, the words for the terminal); writes table.md and effect.png."""
    analysed = [analyse(label, c, plan, rows, i, facts)
                for i, (label, c, plan) in enumerate(zip(labels, arms, plans, strict=True))]
    compared = comparisons(cfg, labels, plans, rows, analysed)
    text = words(analysed, cfg, compared)
    if cfg.experiment == "continual":
        text += "\n\n" + "\n".join(continual(analysed, plans, rows, facts, answers))
    write_text(f"{folder}/table.md", table(analysed) + "\n\n" + text.strip() + "\n")
    draw(analysed, cfg, f"{folder}/effect.png")
    text += f"\nin {folder}: table.md, effect.png, summary.json"
    return {"arms": analysed, "comparisons": compared}, text


def table(arms: list[dict]) -> str:
    lines = [["arm", "group", "probe", "pairs", "right", "control", "steps after", "effect, nats",
              "95 % from", "to",
              "p (Holm)", "verdict"]]
    for a in arms:
        for name, g in a["groups"].items():
            for kind, e in g["kinds"].items():
                for h, x in e["at"].items():
                    hit = a["hits"][name][kind][e["steps"].index(g["end"] + int(h))]
                    lines.append([a["arm"], name, KINDS[kind], str(g["pairs"]), f"{hit[0]:.0%}",
                                  f"{hit[1]:.0%}", h,
                                  number(x["mean"]), number(x["low"]), number(x["high"]),
                                  f"{x['p_holm']:.2g}" if "p_holm" in x else "", x.get("verdict", "control")])
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
