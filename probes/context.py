"""Facts in the context against facts in the weights.

    python memory_probe.py config/probe_handover.py                  # from the context into the weights
    python memory_probe.py config/probe_handover.py --arm=lr=3e-4 --arm=state=fresh
    python memory_probe.py config/probe_incontext.py                 # a fact read against a fact learned
    python memory_probe.py config/probe_incontext.py --arm=window=16 --distances=0,8,32

Both need a base that reads facts from its context (--context_share): stated once, asked in another wording.

handover: a fact is asked without its statement, and the model learns the answer (ce), or what the base says
when it sees the statement (kl: Prompt Baking, 2409.13697; here for the answer alone). On the way facts are
asked without the statement, with it, and with a statement of another answer: who wins, weights or prompt? If
a share c of the questions comes with the statement, c * with + (1 - c) * without of them are answered: the
curve is the c that holds an accuracy.

incontext: a statement, then d other tokens, then the question; against the question alone after k exposures
in training. Both effects are crossed over: what a fact's own statement adds to log p(answer) beyond the same
statement about its partner, a fact with the same answer and another name. Copying an answer without reading
the name adds nothing.
"""
import itertools
import math
import time
from collections import Counter
from dataclasses import replace

from common import probing, stats
from common.config import UserError
from common.console import StepBar, say
from common.data import Windows
from common.distributed import choose_dtype
from common.facts import TRAINED, Fact, Probe, World, new_pairs, pack
from common.step import backward, next_token_loss, update
from common.tables import grid, new_figure, save_figure
from muon import set_learning_rates
from probes.base import (
    BelowGate,
    background,
    bases_of,
    carries,
    context_names,
    load_base,
    named,
    net_of,
    passing_facts,
    pool_of,
    split_batch,
)
from probes.effects import NO_ENDPOINT, band, between, cells, describe, judge, said, write_report

import numpy as np
import torch

# ------------------------------------------------------------------------------------------------------------
# Prompts

ASKED = ("none", "true", "weights", "prompt")  # no statement; a true one; another answer's, either target
FILLERS = ("text", "facts")  # what stands between a statement and its question


def facts_of(cfg, world: World, seed: int, text) -> list[Fact]:
    """Treated facts, their controls and spares. No name stands in the text or in context rows of the base."""
    pool = pool_of(cfg, world)
    avoid = sum(context_names(world, pool, cfg.base_seed), []) if cfg.context_rows else ()
    return new_pairs(world, cfg.facts, seed, pool, text.train, avoid)[0]


def statement(world: World, fact: Fact) -> list[int]:
    return world.sentences([(fact, fact.order[0])])[0]


def asked(world: World, fact: Fact, kind: str) -> Probe:
    """A fact's held-out wording after one of the contexts in ASKED."""
    other = replace(fact, answer=world.another(fact.answer))
    context = [] if kind == "none" else statement(world, fact if kind == "true" else other)
    asked_of = other if kind == "prompt" else fact
    return world.ask(asked_of, kind, *world.prompt(asked_of, fact.order[TRAINED]), context)


def lesson(world: World, facts: list[Fact], step: int, prompted: bool):
    """Rows (N, T) of inputs and targets that ask every fact in one of its trained wordings, after its
    statement or without it. Only answers are targets: in each row the same ones in both."""
    probes = [world.ask(f, "", *world.prompt(f, f.order[1 + step % (TRAINED - 1)]),
                        statement(world, f) if prompted else ()) for f in facts]
    T = max(len(p.prompt) + len(p.target) for p in probes) - 1
    x, y = (torch.full((len(probes), T), fill) for fill in (world.tok.eot, -1))
    for row, p in enumerate(probes):
        ids = torch.tensor(p.prompt + p.target)
        x[row, :len(ids) - 1], y[row, len(p.prompt) - 1:len(ids) - 1] = ids[:-1], ids[len(p.prompt):]
    return x, y


def baking_loss(teacher):
    """A loss_of for backward(): KL(teacher || net), nats per answer token, of the teacher's logits (M, V)."""
    def loss_of(net, x, y, state=None):
        ours = net(x)[0][y >= 0][:, :teacher.size(1)].float().log_softmax(dim=-1)  # (M, V)
        theirs = teacher.log_softmax(dim=-1)
        return (theirs.exp() * (theirs - ours)).sum(dim=-1).mean(), state
    return loss_of


def doublings(most: int) -> list[int]:
    return [0, *(2**i for i in range(most.bit_length()) if 2**i < most), most]


def best_constant(facts: list[Fact]) -> float:
    """The share of facts that the best constant answer gets right."""
    return max(Counter(f.answer for f in facts).values()) / len(facts)


# ------------------------------------------------------------------------------------------------------------
# Handover


def hand_over(cfg, mode: str, facts: list[Fact], base: dict, text, world, run, stop, bar) -> dict | None:
    """Train the treated facts without their statements, and ask all on the way; None if asked to stop."""
    dist, dtype, n = run.dist, choose_dtype(cfg.dtype, run.dist.device)[0], len(facts) // 3
    (model, optimizer), (teacher, _) = (load_base(cfg, base, dist, c) for c in (carries(cfg), False))
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dtype == "fp16")
    net, times = net_of(model, cfg, cfg.steps, dist), doublings(cfg.steps)
    probes = [asked(world, f, kind) for kind in ASKED for f in facts[:2 * n]]
    prepared = probing.batches(probes, world.tok.eot, dist.device)
    windows = Windows(text.val, cfg.max_seq_len, 1).batch(0, 32, dist.device)
    out = {"steps": times, "constant": best_constant(facts[:n]), "text_loss": []}
    out |= {f"{what} {kind}": [] for what in ("logp", "hit") for kind in ASKED}
    for step in range(cfg.steps + 1):
        if step in times:  # before the update: step 0 is the base
            scores = probing.score(model, prepared, world.answer_ids, dtype)
            for k, kind in enumerate(ASKED):  # treated facts, then controls
                out[f"logp {kind}"].append(scores.logp.reshape(4, -1)[k].round(5).tolist())
                out[f"hit {kind}"].append(scores.hit.reshape(4, -1)[k].astype(int).tolist())
            with torch.inference_mode():
                out["text_loss"].append(round(model(*windows)[0].item(), 5))
        if step == cfg.steps:
            return out
        if stop.agreed(dist):
            return None
        began, loss_of = time.perf_counter(), next_token_loss
        if mode == "kl":
            x, y = (z.to(dist.device) for z in lesson(world, facts[:n], step, prompted=True))
            with torch.no_grad():
                loss_of = baking_loss(teacher.eval()(x)[0][y >= 0][:, :model.n_tokens].float())
        rows = [z.to(dist.device) for z in lesson(world, facts[:n], step, prompted=False)]
        set_learning_rates(optimizer, cfg, step, cfg.steps)
        loss = backward(net, [rows], dist, dtype, scaler, loss_of=loss_of)  # every process has all rows
        update(model, optimizer, scaler, cfg.grad_clip, loss)
        run.seconds += time.perf_counter() - began
        bar.tick(time.perf_counter() - began)
        bar.show(f"{mode}, step {step + 1}: loss {loss.item():.3f}")


def handover(cfg, arms, labels, text, worlds, run, stop):
    """All seeds and modes of all arms: (summary, words), or None if asked to stop."""
    done, seeds = run.finished_parts(), range(cfg.seed, cfg.seed + cfg.seeds)
    keys = [(s, a, mode) for s in seeds for a, c in enumerate(arms) for mode in c.modes]
    todo = [(s, a, mode) for s, a, mode in keys if (labels[a], s, mode) not in done]
    bases = bases_of(arms, [a for _, a, _ in todo], text, worlds, run, stop)
    if bases is None:
        return None
    steps, left = (sum(arms[a].steps for _, a, _ in which) for which in (keys, todo))
    with StepBar(steps - left, steps, run.dist.is_main) as bar:
        for s, a, mode in todo:
            facts = facts_of(arms[a], worlds[a], s, text)
            with named(f"{labels[a]}, {mode}, seed {s}"):
                row = hand_over(arms[a], mode, facts, bases[a], text, worlds[a], run, stop, bar)
            if row is None:
                return None
            run.finish_part((labels[a], s, mode), row, done)
    rows = [{mode: {s: done[label, s, mode] for s in seeds} for mode in c.modes}
            for c, label in zip(arms, labels, strict=True)]
    analysed = [analyse_handover(cfg, c, label, r) for c, label, r in zip(arms, labels, rows, strict=True)]
    words = sum((words_of_handover(c, a) for c, a in zip(arms, analysed, strict=True)), [])
    for mode in arms[0].modes:
        gains = {label: {s: changes(r[mode][s], "none")[:, -1] for s in seeds}
                 for label, r in zip(labels, rows, strict=True) if mode in r}
        words += between(list(gains.values()), list(gains), cfg.bound, f"{mode}, gain without the statement")
    return write_report(run, table_of_handover(analysed), words, lambda path: draw_handover(analysed, path),
                 {"arms": analysed, "counts": {"parts": len(keys), "steps": steps}})


def halves(row: dict, what: str) -> np.ndarray:
    """(2, pairs, times): treated facts, controls."""
    found = np.array(row[what], dtype=float)  # (times, 2 n)
    return found.T.reshape(2, -1, len(found))


def changes(row: dict, kind: str) -> np.ndarray:
    """(pairs, times): what treated facts gained since step 0, beyond their controls."""
    v = halves(row, f"logp {kind}")
    return stats.difference_in_differences(v[0, :, :1], v[0], v[1, :, :1], v[1])


def margins(row: dict) -> np.ndarray:
    """(2, pairs, times): log p of the fact's answer minus that of the contradicting statement's."""
    return halves(row, "logp weights") - halves(row, "logp prompt")


def needed(with_: np.ndarray, without: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """The share of questions that must come with the statement for an accuracy of `goal`; 1 where even all of
    them do not suffice."""
    share = (goal - without) / np.where(with_ > without, with_ - without, 1)
    return np.where(without >= goal, 0.0, np.where(with_ > without, np.clip(share, 0, 1), 1.0))


def reads(hits: list[np.ndarray], constant: float) -> dict:
    """Does the base answer with the statement before the question, beyond the best constant answer?"""
    n, right = sum(h.size for h in hits), int(sum(h.sum() for h in hits))
    p = stats.hits_above_chance(right, n, constant)
    return {"hits": right, "of": n, "best_constant": constant, "p": p, "passed": p < 0.01}


def analyse_handover(cfg, arm, label: str, rows: dict[str, dict[int, dict]]) -> dict:
    modes = {mode: analyse_mode(cfg, arm, list(by_seed.values())) for mode, by_seed in rows.items()}
    pairs = matched(cfg, rows) if {"ce", "kl"} <= set(rows) else []
    tests = [m[e] for m in modes.values() for e in ("gain", "won")] + [m[e] for m in pairs for e in DAMAGE]
    judge(tests, cfg.bound)
    if not all(m["reads"]["passed"] for m in modes.values()):
        for e in tests:
            e["verdict"] = NO_ENDPOINT
    return {"arm": label, "seeds": list(next(iter(rows.values()))), "modes": modes, "matched": pairs}


def analyse_mode(cfg, arm, rows: list[dict]) -> dict:
    """One row per seed."""
    hits = {kind: np.stack([halves(r, f"hit {kind}").mean(axis=1) for r in rows]) for kind in ASKED}
    goals = arm.target * hits["true"][:, 0, :1]  # (S, 1) from (S, 2, times)
    out = {"steps": rows[0]["steps"], "text_loss": np.mean([r["text_loss"] for r in rows], axis=0).tolist(),
           "reads": reads([halves(r, "hit true")[..., 0] for r in rows], rows[0]["constant"]),
           "accuracy": {kind: h.mean(axis=0).tolist() for kind, h in hits.items()},
           "gain": describe([changes(r, "none")[:, -1] for r in rows], cfg.bound),
           "won": describe([(margins(r)[0] - margins(r)[1])[:, -1] for r in rows], cfg.bound)}
    for side, who in enumerate(("treated", "controls")):
        curves = {"logp": [halves(r, "logp none")[side] for r in rows],
                  "needed": needed(hits["true"][:, side], hits["none"][:, side], goals)[:, None],
                  "margin": [margins(r)[side] for r in rows]}  # (items, times) of each seed
        bands = {name: band(list(found)) for name, found in curves.items()}
        out[who] = {name: {"mean": mean, "half": half} for name, (mean, half) in bands.items()}
    return out


DAMAGE = {"margin": "contradicted, weights - prompt", "reading": "never-trained facts with their statement"}


def matched(cfg, rows: dict[str, dict[int, dict]]) -> list[dict]:
    """kl minus ce where both have gained equally much without the statement: half of what both reach, all."""
    out = []
    for fraction in (0.5, 1.0):
        found = {"kl": [], "ce": []}  # of each seed: step, margins (n,), reading (n,), loss on text
        for s in rows["ce"]:
            gains = {mode: changes(rows[mode][s], "none").mean(axis=0) for mode in found}  # (times,)
            goal = fraction * min(g.max() for g in gains.values())
            for mode, g in gains.items():
                r, at = rows[mode][s], crossing(g, goal)
                curves = r["steps"], margins(r)[0], halves(r, "logp true")[1], r["text_loss"]
                found[mode].append([interpolate(np.array(z, dtype=float), at) for z in curves])
        kl, ce = (list(zip(*f, strict=True)) for f in found.values())
        out.append({"fraction": fraction, "steps": [float(np.mean(z[0])) for z in (kl, ce)],
                    "text_loss": [float(np.mean(z[3])) for z in (kl, ce)],
                    **{name: describe([a - b for a, b in zip(kl[i], ce[i], strict=True)], cfg.bound)
                       for i, name in enumerate(DAMAGE, 1)}})
    return out


def crossing(curve: np.ndarray, goal: float) -> float:
    """Where a curve first reaches the goal, as an index between its points; inf if it does not."""
    i = int(np.argmax(curve >= goal))
    if curve[i] < goal:
        return math.inf
    return float(i and i - 1 + (goal - curve[i - 1]) / (curve[i] - curve[i - 1]))


def interpolate(curves: np.ndarray, at: float) -> np.ndarray:
    """Curves (..., times) at an index between two times."""
    i = min(int(at), curves.shape[-1] - 2)
    return curves[..., i] + (at - i) * (curves[..., i + 1] - curves[..., i])


def words_of_handover(arm, a: dict) -> list[str]:
    lines = [f"\n{a['arm']} ({len(a['seeds'])} seeds)"]
    for mode, m in a["modes"].items():
        (none, never_none), (true, never_true) = m["accuracy"]["none"], m["accuracy"]["true"]
        need, never, margin = m["treated"]["needed"], m["controls"]["needed"], m["treated"]["margin"]["mean"]
        clear = abs(margin[-1]) > m["treated"]["margin"]["half"][-1]
        winner = "neither wins" if not clear else "the weights win" if margin[-1] > 0 else "the prompt wins"
        if not (r := m["reads"])["passed"]:
            lines.append(f"  {NO_ENDPOINT}: with the statement before the question {r['hits']} of {r['of']} "
                         f"answers are right, and a constant answer in {r['best_constant']:.1%}")
        lines += [f"  {mode}, {m['steps'][-1]} steps: right with the statement {true[0]:.0%} -> "
                  f"{true[-1]:.0%}, without {none[0]:.0%} -> {none[-1]:.0%} (never trained: "
                  f"{never_true[-1]:.0%}, {never_none[-1]:.0%}); loss on text {m['text_loss'][0]:.2f} -> "
                  f"{m['text_loss'][-1]:.2f}",
                  f"    gained without the statement, beyond never-trained facts: {said(m['gain'])}",
                  f"    share of questions that need the statement for {arm.target:.0%} of the accuracy: "
                  f"{need['mean'][0]:.2f} -> {need['mean'][-1]:.2f} +- {need['half'][-1]:.2f} (never "
                  f"trained: {never['mean'][-1]:.2f})",
                  f"    contradicted, log p of weights - prompt: {margin[0]:+.2f} -> {margin[-1]:+.2f} "
                  f"nats, {winner}; beyond never-trained facts {said(m['won'])}"]
    for m in a["matched"]:
        lines.append(f"  kl - ce at {m['fraction']:.0%} of the gain that both reach (after "
                     f"{m['steps'][0]:.1f} and {m['steps'][1]:.1f} steps; loss on text "
                     f"{m['text_loss'][0]:.2f} and {m['text_loss'][1]:.2f})")
        lines += [f"    {what}: {said(m[name])}" for name, what in DAMAGE.items()]
    return lines


def table_of_handover(arms: list[dict]) -> str:
    lines = [["arm", "loss", "step", "with", "without", "never trained: with", "without", "statements needed",
              "weights - prompt", "never trained", "loss on text"]]
    for a in arms:
        for mode, m in a["modes"].items():
            right = [m["accuracy"][kind][side] for side in (0, 1) for kind in ("true", "none")]
            rest = [(m["treated"]["needed"]["mean"], ".2f"), (m["treated"]["margin"]["mean"], "+.2f"),
                    (m["controls"]["margin"]["mean"], "+.2f"), (m["text_loss"], ".3f")]
            lines += [[a["arm"], mode, str(step), *(f"{z[t]:.0%}" for z in right),
                       *(format(z[t], form) for z, form in rest)] for t, step in enumerate(m["steps"])]
    return grid(lines)


def draw_handover(arms: list[dict], path: str) -> None:
    """A row per arm. Dotted: facts never trained."""
    titles = {"logp": "log p without the statement, nats", "needed": "questions that need the statement",
              "margin": "contradicted: weights - prompt, nats"}
    figure = new_figure(12, 3.4 * len(arms))
    for axes, a in zip(figure.subplots(len(arms), 3, squeeze=False), arms, strict=True):
        for ax, (name, title) in zip(axes, titles.items(), strict=True):
            for i, (mode, m) in enumerate(a["modes"].items()):
                mean, half = (np.array(m["treated"][name][key]) for key in ("mean", "half"))
                ax.plot(m["steps"], mean, color=f"C{i}", label=mode)
                ax.fill_between(m["steps"], mean - half, mean + half, color=f"C{i}", alpha=0.2, lw=0)
                ax.plot(m["steps"], m["controls"][name]["mean"], color=f"C{i}", linestyle=":")
            ax.set(xscale="symlog", xlabel="steps; dotted: facts never trained", title=title)
            ax.grid(alpha=0.3)
        axes[2].axhline(0, color="black", linewidth=0.8)
        axes[0].set_ylabel(a["arm"])
        axes[0].legend(fontsize=8)
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------------------------
# In the context or in the weights


def filler(world: World, kind: str, length: int, people: list[str], text, rng) -> list[int]:
    """`length` tokens of text; or as many whole statements of other facts as fit, after some text."""
    facts, ids = passing_facts(world, people, length // 6, rng) if kind == "facts" else [], []
    for s in world.sentences([(f, int(rng.integers(TRAINED))) for f in facts]) if facts else []:
        ids += s if len(ids) + len(s) <= length else []
    start = int(rng.integers(len(text.val) - length))
    return [*text.val[start:start + length - len(ids)].tolist(), *ids]


def at_distances(cfg, facts: list[Fact], world: World, text, seed: int) -> list[Probe]:
    """In the order (filler, distance, own statement or the partner's, treated facts and controls). A pair has
    one filler: its prompts differ in the names alone."""
    n, out = len(facts) // 3, []
    people = context_names(world, pool_of(cfg, world), cfg.base_seed)[1]
    stated = [statement(world, f) for f in facts[:2 * n]]
    for kind, d in itertools.product(FILLERS, cfg.distances):
        rngs = (np.random.default_rng((seed, 21, i)) for i in range(n))
        apart = [filler(world, kind, d, people, text, rng) for rng in rngs]
        for i, shift in itertools.product(range(2 * n), (0, n)):
            f, context = facts[i], stated[(i + shift) % (2 * n)] + apart[i % n]
            out.append(world.ask(f, kind, *world.prompt(f, f.order[TRAINED]), context))
    longest = max(len(p.prompt) + len(p.target) - 1 for p in out)
    if longest > cfg.max_seq_len:
        raise UserError(f"distances={max(cfg.distances)} makes prompts of {longest} tokens, but rows of the "
                        f"base have {cfg.max_seq_len}; use --max_seq_len={longest} or smaller --distances")
    return out


def read(cfg, facts: list[Fact], base: dict, text, world, seed: int, dist) -> dict:
    """Scores of at_distances: (fillers, distances, 2 n, own or partner's)."""
    model, shape = load_base(cfg, base, dist, False)[0], (len(FILLERS), len(cfg.distances), -1, 2)
    prepared = probing.batches(at_distances(cfg, facts, world, text, seed), world.tok.eot, dist.device)
    scores = probing.score(model, prepared, world.answer_ids, choose_dtype(cfg.dtype, dist.device)[0])
    return {"constant": best_constant(facts[:len(facts) // 3]),
            "logp": scores.logp.reshape(shape).round(5).tolist(),
            "hit": scores.hit.reshape(shape).astype(int).tolist()}


def write(cfg, twin: str, facts: list[Fact], base: dict, text, world, seed: int, run, stop) -> dict | None:
    """Train the treated facts (twin A) or their controls (B), a statement each per step in background rows,
    and ask both without context; None if asked to stop."""
    dist, dtype, n = run.dist, choose_dtype(cfg.dtype, run.dist.device)[0], len(facts) // 3
    model, optimizer = load_base(cfg, base, dist, carries(cfg))
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dtype == "fp16")
    net, windows = net_of(model, cfg, cfg.exposures, dist), Windows(text.train, cfg.max_seq_len, 1000 + seed)
    probes = [asked(world, f, "none") for f in facts[:2 * n]]
    prepared = probing.batches(probes, world.tok.eot, dist.device)
    out = {"logp": [], "hit": []}
    for step in range(cfg.exposures + 1):
        if step in doublings(cfg.exposures):
            scores = probing.score(model, prepared, world.answer_ids, dtype)
            out["logp"].append(scores.logp.round(5).tolist())
            out["hit"].append(scores.hit.astype(int).tolist())
        if step == cfg.exposures:
            return out
        if stop.agreed(dist):
            return None
        began, own = time.perf_counter(), facts[:n] if twin == "A" else facts[n:2 * n]
        sentences = world.sentences([(f, f.order[step % TRAINED]) for f in own])
        rows, (x, y) = pack(sentences, cfg.max_seq_len, world.tok.eot), background(windows, step, cfg)
        if len(rows[0]) > len(x):
            raise UserError(f"{n} facts take {len(rows[0])} rows, the batch has {len(x)}; use fewer --facts "
                            f"or --batch_size={len(rows[0])}")
        x[:len(rows[0])], y[:len(rows[0])] = rows
        set_learning_rates(optimizer, cfg, step, cfg.exposures)
        loss = backward(net, split_batch(x, y, cfg, dist), dist, dtype, scaler)
        update(model, optimizer, scaler, cfg.grad_clip, loss)
        run.seconds += time.perf_counter() - began


def incontext(cfg, arms, labels, text, worlds, run, stop):
    """All seeds of all arms: (summary, words), or None if asked to stop. An arm whose base stays below its
    gate has no verdict."""
    done, seeds, failed = run.finished_parts(), range(cfg.seed, cfg.seed + cfg.seeds), {}
    for c, w in zip(arms, worlds, strict=True):  # before a base is trained for nothing
        at_distances(c, facts_of(c, w, cfg.seed, text), w, text, cfg.seed)
    for a, (c, label, w) in enumerate(zip(arms, labels, worlds, strict=True)):
        todo = [(s, part) for s in seeds for part in PARTS if (label, s, part) not in done]
        try:
            bases = bases_of(arms, [a] if todo else [], text, worlds, run, stop)
        except BelowGate as e:
            failed[label] = str(e)
            say(f"{label}: {e}")
            continue
        if bases is None:
            return None
        for s, part in todo:
            facts = facts_of(c, w, s, text)
            with named(f"{label}, seed {s}"):
                row = read(c, facts, bases[a], text, w, s, run.dist) if part == "context" else \
                    write(c, part, facts, bases[a], text, w, s, run, stop)
            if row is None:
                return None
            run.finish_part((label, s, part), row, done)
            if stop.agreed(run.dist):
                return None
    rows = {label: {s: [done[label, s, part] for part in PARTS] for s in seeds}
            for label in labels if label not in failed}
    analysed = [analyse_reading(cfg, c, label, rows[label])
                for c, label in zip(arms, labels, strict=True) if label in rows]
    words = sum((words_of_reading(a) for a in analysed), [])
    words += [f"\n{label}: {why}" for label, why in failed.items()]
    if rows:
        far = [{s: crossed(parts[0])[1, -1] for s, parts in by_seed.items()} for by_seed in rows.values()]
        words += between(far, list(rows), cfg.bound, "read after other facts, at the last distance")
    return write_report(run, table_of_reading(analysed, failed), words,
                        lambda path: draw_reading(analysed, path),
                 {"arms": analysed, "failed": failed, "counts": {"parts": len(done)}})


PARTS = ("context", "A", "B")


def crossed(row: dict) -> np.ndarray:
    """(fillers, distances, pairs): what the own statement adds beyond the partner's."""
    own, other = np.moveaxis(np.array(row["logp"]), -1, 0)
    return (own - other).reshape(*own.shape[:2], 2, -1).mean(axis=2)


def learned(a: dict, b: dict) -> np.ndarray:
    """(pairs, times): what the own exposures add beyond the partner's, from twins A and B."""
    d = halves(a, "logp") - halves(b, "logp")
    return (d[0] - d[1]) / 2


def analyse_reading(cfg, arm, label: str, rows: dict[int, list[dict]]) -> dict:
    """Effects by place: `number` tokens of `after` behind the statement, or after as many exposures."""
    rows, times = list(rows.values()), doublings(arm.exposures)
    context, weights = [crossed(r[0]) for r in rows], [learned(*r[1:]) for r in rows]
    read_hits = np.mean([np.mean(r[0]["hit"], axis=2) for r in rows], axis=0)  # (fillers, distances, 2)
    hits = np.mean([[halves(z, "hit").mean(axis=1) for z in r[1:]] for r in rows], axis=0)  # (2, 2, times)
    known = (hits[0, 0] + hits[1, 1]) / 2, (hits[0, 1] + hits[1, 0]) / 2  # own, partner's
    places = [{"where": "context", "after": kind, "number": d, "right": read_hits[k, i].tolist(),
               **describe([c[k, i] for c in context], cfg.bound)}
              for k, kind in enumerate(FILLERS) for i, d in enumerate(arm.distances)]
    places += [{"where": "weights", "after": "exposures", "number": k, "right": [float(z[i]) for z in known],
                **describe([w[:, i] for w in weights], cfg.bound)} for i, k in enumerate(times) if k]
    judge(places, cfg.bound)
    near, curve = int(np.argmin(arm.distances)), np.mean([w.mean(axis=0) for w in weights], axis=0)
    gate = reads([np.array(r[0]["hit"])[:, near, :, 0] for r in rows], rows[0][0]["constant"])
    for p in places:
        if not gate["passed"]:
            p["verdict"] = NO_ENDPOINT
        if p["where"] == "context":  # the exposures that are worth as much
            at = crossing(curve, p["mean"])
            p["worth"] = float(interpolate(np.array(times, dtype=float), at)) if math.isfinite(at) else at
    return {"arm": label, "seeds": len(rows), "reads": gate, "places": places}


def words_of_reading(a: dict) -> list[str]:
    lines = [f"\n{a['arm']} ({a['seeds']} seeds; in brackets: after the partner's statement or exposures)"]
    for p in a["places"]:
        text = f"learned in {p['number']} exposures" if p["where"] == "weights" else \
            f"read before {p['number']} tokens of {p['after']}"
        text += f": right {p['right'][0]:.0%} ({p['right'][1]:.0%}), {said(p)}"
        if p.get("worth", 0) > 0:
            text += "; worth " + (f"{p['worth']:.1f}" if math.isfinite(p["worth"]) else "more than all") \
                + " exposures"
        lines.append(f"  {text}")
    return lines


def table_of_reading(arms: list[dict], failed: dict[str, str]) -> str:
    lines = [["arm", "where", "after", "number", "right", "partner's", "effect, nats", "95 % from", "to",
              "p (Holm)", "verdict"]]
    lines += [[a["arm"], p["where"], p["after"], str(p["number"]), *(f"{r:.0%}" for r in p["right"]),
               *cells(p)] for a in arms for p in a["places"]]
    return grid(lines + [[label, *[""] * 9, NO_ENDPOINT] for label in failed])


def draw_reading(arms: list[dict], path: str) -> None:
    """Effects by distance in the context, and by exposures in the weights."""
    figure = new_figure(11, 4)
    axes = figure.subplots(1, 3, sharey=True)
    for ax, after, label in zip(axes, (*FILLERS, "exposures"), (
            "tokens of text from statement to question", "tokens of other facts between them",
            "exposures in training, asked alone"), strict=True):
        for i, a in enumerate(arms):
            x, mean, low, high = np.array(sorted([p[k] for k in ("number", "mean", "low", "high")]
                                                 for p in a["places"] if p["after"] == after)).T
            ax.plot(x, mean, "o-", color=f"C{i}", markersize=3, label=a["arm"])
            if np.isfinite(low).all():
                ax.fill_between(x, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
        ax.set(xlabel=label)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("what the own statement adds to log p, nats")
    if arms:
        axes[0].legend(fontsize=8)
    save_figure(figure, path)
