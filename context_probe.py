"""Facts in the context against facts in the weights.

    python memory_probe.py config/probe_handover.py                  # from the context into the weights
    python memory_probe.py config/probe_handover.py --arm=lr=3e-4 --arm=optimizer=muon
    python memory_probe.py config/probe_incontext.py                 # reading a fact against having learned it
    python memory_probe.py config/probe_incontext.py --arm="mixer=lstm pos=none" --distances=0,8,32

Both need a base that reads facts from its context (--context_share): stated once, asked in another wording.

handover: a fact is asked without its statement, and the model learns either the answer (ce) or what the base says
when it sees the statement (kl: Prompt Baking, 2409.13697; here on the answer's tokens). On the way it is asked
without the statement, with it, and with a statement of another answer: who wins, weights or prompt. If a share c of
questions comes with the statement, accuracy is c * with + (1 - c) * without: the curve is the c that holds it.

incontext: a statement, then d other tokens, then the question; against the same question after k exposures in
training. Both effects are crossed over: what a fact's own statement adds to log p(answer), beyond the same
statement of its partner, which has the same answer and another name. Copying an answer without reading the name
adds nothing.
"""
import itertools
import math
import time
from collections import Counter
from dataclasses import replace

from base import (
    BelowGate,
    asked_after,
    background,
    base_config,
    carries,
    context_names,
    finished_parts,
    load_base,
    make_base,
    passing_facts,
    split_batch,
)
from common import probing, stats
from common.config import UserError
from common.console import StepBar, say
from common.data import Windows
from common.distributed import choose_dtype
from common.facts import TRAINED, Fact, Probe, World, find_leaks, make_facts, make_pairs, pack
from common.memory_report import describe_effect
from common.step import backward, next_token_loss, update, wrap
from common.tables import grid, new_figure, save_figure
from muon import set_learning_rates
from stream_probe import band, bases_of, between, cells, files, judge, keep, named, said

import numpy as np
import torch

# ------------------------------------------------------------------------------------------------------------
# Prompts

ASKED = ("none", "true", "weights", "prompt")  # context: none, true, contradicting; the last two differ in the target
FILLERS = ("text", "facts")  # what stands between a statement and its question
NO_READING = "this endpoint does not work"


def facts_of(cfg, world: World, seed: int, text) -> list[Fact]:
    """Treated facts, their controls and spares; no name stands in the text or in the base's context rows."""
    pool = pool_of(cfg, world)
    avoid = set(context_names(world, pool, cfg.base_seed)[0]) if cfg.context_rows else set()
    while True:
        facts = make_pairs(world, cfg.facts, seed, pool, avoid)
        leaks = find_leaks(world, facts, text.train)
        if not leaks or cfg.level == "H4":
            return facts
        avoid |= {f.subject for f in facts if f.id in leaks}


def pool_of(cfg, world: World) -> list[Fact]:
    return make_facts(world, "pool", cfg.pool, cfg.base_seed) if cfg.pool else []


def statement(world: World, fact: Fact) -> list[int]:
    return world.sentences([(fact, fact.order[0])])[0]


def asked(world: World, fact: Fact, kind: str) -> Probe:
    """A fact's held-out wording after one of the contexts of ASKED."""
    other = replace(fact, answer=world.another(fact.answer))
    context = {"none": [], "true": statement(world, fact)}.get(kind, statement(world, other))
    return asked_after(world, context, other if kind == "prompt" else fact, fact.order[TRAINED], kind)


def best_constant(facts: list[Fact]) -> float:
    """The share of facts that the best constant answer gets right."""
    return max(Counter(f.answer for f in facts).values()) / len(facts)


def lesson(world: World, facts: list[Fact], step: int, prompted: bool):
    """Rows (N, T) of inputs and targets that ask all facts in one of their trained wordings, with the statement in
    the context or without it. Only answers are targets: row by row the same ones in both."""
    probes = [asked_after(world, statement(world, f) if prompted else [], f, f.order[1 + step % (TRAINED - 1)], "")
              for f in facts]
    x, y = (torch.full((len(probes), max(len(p.prompt) + len(p.target) for p in probes) - 1), fill)
            for fill in (world.tok.eot, -1))
    for row, p in enumerate(probes):
        ids = torch.tensor(p.prompt + p.target)
        x[row, :len(ids) - 1], y[row, len(p.prompt) - 1:len(ids) - 1] = ids[:-1], ids[len(p.prompt):]
    return x, y


def baking_loss(target):
    """A loss_of for backward(): KL(target || net) in nats per answer token, for the teacher's logits (M, V)."""
    def loss_of(net, x, y, state=None):
        ours = net(x)[0][y >= 0][:, :target.size(1)].float().log_softmax(dim=-1)  # (M, V)
        theirs = target.log_softmax(dim=-1)
        return (theirs.exp() * (theirs - ours)).sum(dim=-1).mean(), state
    return loss_of


# ------------------------------------------------------------------------------------------------------------
# Handover


def fibonacci(last: int) -> list[int]:
    """0, 1, 2, 3, 5, 8, ... and the last."""
    steps, a, b = {0, last}, 1, 2
    while a < last:
        steps.add(a)
        a, b = b, a + b
    return sorted(steps)


def hand_over(cfg, mode: str, facts: list[Fact], base: dict, text, world, run, stop, bar: StepBar) -> dict | None:
    """Train the treated facts without their statements, and ask all on the way; None if asked to stop."""
    dist, dtype = run.dist, choose_dtype(cfg.dtype, run.dist.device)[0]
    (model, optimizer), (teacher, _) = (load_base(cfg, base, dist, c) for c in (carries(cfg), False))
    scaler, net = torch.amp.GradScaler(dist.device.type, enabled=dtype == "fp16"), wrap(model, False, dist)
    n, grid_ = len(facts) // 3, fibonacci(cfg.steps)
    prepared = probing.batches([asked(world, f, kind) for kind in ASKED for f in facts[:2 * n]], world.tok.eot,
                               dist.device)
    windows = Windows(text.val, cfg.max_seq_len, 1).batch(0, 32, dist.device)
    out = {"steps": grid_, "constant": best_constant(facts[:n]), "text_loss": [], **{f"{what} {kind}": [] for what in ("logp", "hit") for kind in ASKED}}
    for step in range(cfg.steps + 1):
        if step in grid_:  # before the update: step 0 is the base
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
            x, y = (z.to(dist.device) for z in lesson(world, facts[:n], step, True))
            with torch.no_grad():
                loss_of = baking_loss(teacher.eval()(x)[0][y >= 0][:, :model.n_tokens].float())
        set_learning_rates(optimizer, cfg, step, cfg.steps)
        rows = [z.to(dist.device) for z in lesson(world, facts[:n], step, False)]  # every process has all of them
        loss = backward(net, [rows], dist, dtype, scaler, loss_of=loss_of)
        update(model, optimizer, scaler, cfg.grad_clip, loss)
        run.seconds += time.perf_counter() - began
        bar.tick(time.perf_counter() - began)
        bar.show(f"{mode}, step {step + 1}: loss {loss.item():.3f}")


def handover(cfg, arms, labels, text, worlds, run, stop):
    """All seeds and modes of all arms: (summary, words), or None if asked to stop."""
    done, seeds = finished_parts(cfg, run), range(cfg.seed, cfg.seed + cfg.seeds)
    keys = [(s, a, mode) for s in seeds for a, c in enumerate(arms) for mode in c.modes]
    todo = [(s, a, mode) for s, a, mode in keys if (labels[a], s, mode) not in done]
    bases = bases_of(arms, [a for _, a, _ in todo], text, worlds, run, stop)
    if bases is None:
        return None
    steps = sum(arms[a].steps for _, a, _ in keys)
    with StepBar(steps - sum(arms[a].steps for _, a, _ in todo), steps, run.dist.is_main) as bar:
        for s, a, mode in todo:
            with named((f"{labels[a]}, {mode}", s)):
                row = hand_over(arms[a], mode, facts_of(arms[a], worlds[a], s, text), bases[a], text, worlds[a], run,
                                stop, bar)
            if not keep((labels[a], s, mode), row, done, run):
                return None
    rows = [{mode: {s: done[label, s, mode] for s in seeds} for mode in c.modes}
            for c, label in zip(arms, labels, strict=True)]
    analysed = [{"arm": label, "seeds": list(seeds), "modes": {m: analyse_mode(cfg, c, r[m]) for m in c.modes},
                 "matched": matched(cfg, r)} for c, label, r in zip(arms, labels, rows, strict=True)]
    for a in analysed:
        judge([m[e] for m in a["modes"].values() for e in ("gain", "won")], cfg.bound)
        judge([m[e] for m in a["matched"] for e in ("margin", "reading")], cfg.bound)
        for m in a["modes"].values():
            if not m["reads"]["passed"]:
                m["gain"]["verdict"] = m["won"]["verdict"] = NO_READING
    words = sum((words_of_handover(cfg, a) for a in analysed), [])
    for mode in cfg.modes:
        values = [{s: changes(r[mode][s], "none")[:, -1] for s in seeds} if mode in r else {} for r in rows]
        words += between(values, labels, cfg.bound, f"{mode}, without the statement, at the end")
    return files(run, table_of_handover(analysed), words, lambda path: draw_handover(analysed, path),
                 {"arms": analysed, "counts": {"parts": len(keys), "steps": steps}})


def values(row: dict, what: str) -> np.ndarray:
    """(2, pairs, times): treated facts, controls."""
    found = np.array(row[what], dtype=float)  # (times, 2 n)
    return found.T.reshape(2, -1, len(found))


def changes(row: dict, kind: str) -> np.ndarray:
    """(pairs, times): what treated facts gained beyond their controls since the base."""
    v = values(row, f"logp {kind}")
    return stats.difference_in_differences(v[0, :, :1], v[0], v[1, :, :1], v[1])


def margins(row: dict) -> np.ndarray:
    """(2, pairs, times): log p of the fact's answer minus log p of the one in the contradicting statement."""
    return values(row, "logp weights") - values(row, "logp prompt")


def needed(with_, without, goal: float) -> np.ndarray:
    """The share of questions that must come with the statement for an accuracy of `goal`; 1 where all of them do
    not suffice."""
    with_, without = (np.asarray(z, dtype=float) for z in (with_, without))
    share = (goal - without) / np.where(with_ > without, with_ - without, 1)
    return np.where(without >= goal, 0.0, np.where(with_ > without, np.clip(share, 0.0, 1.0), 1.0))


def analyse_mode(cfg, arm, rows: dict[int, dict]) -> dict:
    every = list(rows.values())
    hits = {kind: np.stack([values(r, f"hit {kind}").mean(axis=1) for r in every]) for kind in ASKED}  # (S, 2, times)
    goals = arm.target * hits["true"][:, 0, :1]  # (S, 1)
    out = {"steps": every[0]["steps"], "text_loss": np.mean([r["text_loss"] for r in every], axis=0).tolist(),
           "reads": reads([values(r, "hit true")[..., 0] for r in every], every[0]["constant"]),
           "accuracy": {kind: h.mean(axis=0).tolist() for kind, h in hits.items()},
           "gain": describe_effect([changes(r, "none")[:, -1] for r in every], cfg.bound),
           "won": describe_effect([(margins(r)[0] - margins(r)[1])[:, -1] for r in every], cfg.bound)}
    for side, who in enumerate(("treated", "controls")):
        curves = {"needed": needed(hits["true"][:, side], hits["none"][:, side], goals)[:, None],  # (S, 1, times)
                  "margin": [margins(r)[side] for r in every],
                  "logp": [values(r, "logp none")[side] for r in every]}
        out[who] = {}
        for name, found in curves.items():
            mean, half = band(list(found))
            out[who][name] = {"mean": mean.tolist(), "half": half.tolist()}
    return out


def reads(hits: list[np.ndarray], constant: float) -> dict:
    """Does the base answer with the statement before the question, beyond the best constant answer?"""
    n, right = sum(h.size for h in hits), int(sum(h.sum() for h in hits))
    p = stats.hits_above_chance(right, n, constant)
    return {"hits": right, "of": n, "best_constant": constant, "p": p, "passed": p < 0.01}


def matched(cfg, rows: dict[str, dict[int, dict]]) -> list[dict]:
    """kl minus ce where both have gained equally much without the statement: half of what both reach, and all."""
    if {"ce", "kl"} - set(rows):
        return []
    out = []
    for fraction in (0.5, 1.0):
        found = {mode: [] for mode in rows}  # (step, margins (n,), reading (n,), text loss) of each seed
        for s in rows["ce"]:
            gains = {mode: changes(r[s], "none").mean(axis=0) for mode, r in rows.items()}
            goal = fraction * min(g.max() for g in gains.values())
            for mode, g in gains.items():
                r, at = rows[mode][s], crossing(g, goal)
                found[mode].append([interpolate(z, at) for z in (
                    np.array(r["steps"], dtype=float), margins(r)[0], values(r, "logp true")[1], np.array(r["text_loss"]))])
        kl, ce = ([list(z) for z in zip(*found[mode], strict=True)] for mode in ("kl", "ce"))
        out.append({"fraction": fraction, "steps": {"ce": float(np.mean(ce[0])), "kl": float(np.mean(kl[0]))},
                    "text_loss": {"ce": float(np.mean(ce[3])), "kl": float(np.mean(kl[3]))},
                    **{name: describe_effect([a - b for a, b in zip(kl[i], ce[i], strict=True)], cfg.bound)
                       for i, name in ((1, "margin"), (2, "reading"))}})
    return out


def crossing(curve: np.ndarray, goal: float) -> float:
    """Where a curve first reaches the goal, as an index between its points; inf if it does not."""
    i = int(np.argmax(curve >= goal))
    if curve[i] < goal:
        return math.inf
    return float(i if i == 0 else i - 1 + (goal - curve[i - 1]) / (curve[i] - curve[i - 1]))


def interpolate(curves: np.ndarray, at: float) -> np.ndarray:
    """Curves (..., times) at an index between two times."""
    i = min(int(at), curves.shape[-1] - 2)
    return curves[..., i] + (at - i) * (curves[..., i + 1] - curves[..., i])


def words_of_handover(cfg, a: dict) -> list[str]:
    lines = [f"\n{a['arm']} ({len(a['seeds'])} seeds)"]
    for mode, m in a["modes"].items():
        acc, need, margin = m["accuracy"], m["treated"]["needed"], m["treated"]["margin"]
        lines += [
            f"  {mode}: the base answers {acc['true'][0][0]:.0%} with the statement and {acc['none'][0][0]:.0%} without; "
            f"after {m['steps'][-1]} steps {acc['true'][0][-1]:.0%} and {acc['none'][0][-1]:.0%} (never trained: "
            f"{acc['true'][1][-1]:.0%} and {acc['none'][1][-1]:.0%}); loss on text {m['text_loss'][0]:.2f} -> "
            f"{m['text_loss'][-1]:.2f}",
            f"    log p without the statement, beyond never-trained facts: {said(m['gain'])}",
            f"    share of questions that need the statement, to hold {cfg.target:.0%} of the accuracy: "
            f"{need['mean'][0]:.2f} -> {need['mean'][-1]:.2f} +- {need['half'][-1]:.2f} (never trained: "
            f"{m['controls']['needed']['mean'][-1]:.2f})",
            f"    against a contradicting statement, log p of weights - prompt: {margin['mean'][0]:+.2f} -> "
            f"{margin['mean'][-1]:+.2f} nats, the {'weights' if margin['mean'][-1] > 0 else 'prompt'} win; beyond "
            f"never-trained facts {said(m['won'])}"]
        if not m["reads"]["passed"]:
            lines.append(f"    {NO_READING}: with the statement {m['reads']['hits']} of {m['reads']['of']} answers are "
                         f"right, a constant answer in {m['reads']['best_constant']:.1%}")
    for m in a["matched"]:
        lines += [f"  kl - ce at {m['fraction']:.0%} of the gain that both reach (after {m['steps']['kl']:.1f} and "
                  f"{m['steps']['ce']:.1f} steps): weights - prompt {said(m['margin'])}",
                  f"    reading never-trained facts, log p: {said(m['reading'])}; loss on text "
                  f"{m['text_loss']['kl']:.2f} and {m['text_loss']['ce']:.2f}"]
    return lines


def table_of_handover(arms: list[dict]) -> str:
    lines = [["arm", "loss", "step", "with", "without", "never trained: with", "without", "statements needed",
              "weights - prompt", "never trained", "loss on text"]]
    for a in arms:
        for mode, m in a["modes"].items():
            lines += [[a["arm"], mode, str(step), *(f"{m['accuracy'][kind][side][t]:.2f}" for side in (0, 1)
                                                    for kind in ("true", "none")),
                       f"{m['treated']['needed']['mean'][t]:.2f}",
                       *(f"{m[who]['margin']['mean'][t]:+.2f}" for who in ("treated", "controls")),
                       f"{m['text_loss'][t]:.3f}"] for t, step in enumerate(m["steps"])]
    return grid(lines)


def draw_handover(arms: list[dict], path: str) -> None:
    """A row per arm: log p without the statement, statements needed, weights against prompt; dotted: never trained."""
    figure = new_figure(12, 3.4 * len(arms))
    for axes, a in zip(figure.subplots(len(arms), 3, squeeze=False), arms, strict=True):
        for i, (mode, m) in enumerate(a["modes"].items()):
            for ax, name in zip(axes, ("logp", "needed", "margin"), strict=True):
                mean, half = (np.array(m["treated"][name][key]) for key in ("mean", "half"))
                ax.plot(m["steps"], mean, color=f"C{i}", label=mode)
                ax.fill_between(m["steps"], mean - half, mean + half, color=f"C{i}", alpha=0.2, linewidth=0)
                ax.plot(m["steps"], m["controls"][name]["mean"], color=f"C{i}", linestyle=":")
        for ax, title in zip(axes, ("log p without the statement, nats", "share of questions that need it",
                                    "contradicted: weights - prompt, nats"), strict=True):
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
    for i, s in enumerate(world.sentences([(f, int(rng.integers(TRAINED))) for f in facts])):
        ids = ids + s if len(ids) + len(s) <= length else ids
    start = int(rng.integers(len(text.val) - length))
    return [*text.val[start:start + length - len(ids)].tolist(), *ids]


def at_distances(cfg, facts: list[Fact], world: World, text, seed: int) -> list[Probe]:
    """In the order (filler, distance, own statement or the partner's, treated facts and controls): a pair has the
    same filler and, its subjects apart, the same prompts."""
    n, out = len(facts) // 3, []
    people = context_names(world, pool_of(cfg, world), cfg.base_seed)[1]
    said = [statement(world, f) for f in facts[:2 * n]]
    for kind, d in itertools.product(FILLERS, cfg.distances):
        between = [filler(world, kind, d, people, text, np.random.default_rng((seed, 21, i))) for i in range(n)]
        out += [asked_after(world, said[(i + shift) % (2 * n)] + between[i % n], facts[i], facts[i].order[TRAINED], kind)
                for shift in (0, n) for i in range(2 * n)]
    longest = max(len(p.prompt) + len(p.target) - 1 for p in out)
    if longest > cfg.max_seq_len:
        raise UserError(f"distances={max(cfg.distances)} makes prompts of {longest} tokens, but the base has rows of "
                        f"{cfg.max_seq_len}; use --max_seq_len={longest} or smaller --distances")
    return out


def read(cfg, facts: list[Fact], base: dict, text, world, seed: int, dist) -> dict:
    """Scores of at_distances, (fillers, distances, own or partner's, 2 n)."""
    model, shape = load_base(cfg, base, dist, False)[0], (len(FILLERS), len(cfg.distances), 2, -1)
    prepared = probing.batches(at_distances(cfg, facts, world, text, seed), world.tok.eot, dist.device)
    scores = probing.score(model, prepared, world.answer_ids, choose_dtype(cfg.dtype, dist.device)[0])
    return {"constant": best_constant(facts[:len(facts) // 3]), "logp": scores.logp.reshape(shape).round(5).tolist(),
            "hit": scores.hit.reshape(shape).astype(int).tolist()}


def doublings(most: int) -> list[int]:
    return [0, *(2**i for i in range(most.bit_length()) if 2**i < most), most]


def write(cfg, twin: str, facts: list[Fact], base: dict, text, world, seed: int, dist, stop) -> dict | None:
    """Train the treated facts (twin A) or their controls (B), a statement each per step in background rows, and
    ask all of them without context; None if asked to stop."""
    model, optimizer = load_base(cfg, base, dist, carries(cfg))
    dtype, n = choose_dtype(cfg.dtype, dist.device)[0], len(facts) // 3
    scaler, net = torch.amp.GradScaler(dist.device.type, enabled=dtype == "fp16"), wrap(model, False, dist)
    windows, own = Windows(text.train, cfg.max_seq_len, 1000 + seed), facts[:n] if twin == "A" else facts[n:2 * n]
    prepared = probing.batches([asked(world, f, "none") for f in facts[:2 * n]], world.tok.eot, dist.device)
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
        x, y = background(windows, step, cfg)  # (B, T) each
        rows = pack(world.sentences([(f, f.order[step % TRAINED]) for f in own]), cfg.max_seq_len, world.tok.eot)
        if len(rows[0]) > len(x):
            raise UserError(f"{n} facts take {len(rows[0])} rows, the batch has {len(x)}; use fewer --facts")
        x[:len(rows[0])], y[:len(rows[0])] = rows
        set_learning_rates(optimizer, cfg, step, cfg.exposures)
        loss = backward(net, split_batch(x, y, cfg, dist), dist, dtype, scaler)
        update(model, optimizer, scaler, cfg.grad_clip, loss)


def incontext(cfg, arms, labels, text, worlds, run, stop):
    """All seeds of all arms: (summary, words), or None if asked to stop. An arm whose base fails the gate has no
    verdict."""
    done, seeds, failed = finished_parts(cfg, run), range(cfg.seed, cfg.seed + cfg.seeds), {}
    for c, w in zip(arms, worlds, strict=True):  # before a base is trained for nothing
        at_distances(c, facts_of(c, w, cfg.seed, text), w, text, cfg.seed)
    for a, (c, label, w) in enumerate(zip(arms, labels, worlds, strict=True)):
        todo = [(s, part) for s in seeds for part in ("context", "A", "B") if (label, s, part) not in done]
        try:
            base = (bases_of(arms, [a], text, worlds, run, stop) or {}).get(a) if todo else None
        except BelowGate as e:
            failed[label] = str(e)
            say(f"{label}: {e}")
            continue
        if todo and base is None:
            return None
        for s, part in todo:
            facts = facts_of(c, w, s, text)
            with named((label, s)):
                row = read(c, facts, base, text, w, s, run.dist) if part == "context" else \
                    write(c, part, facts, base, text, w, s, run.dist, stop)
            if stop.agreed(run.dist) or not keep((label, s, part), row, done, run):
                return None
    analysed = [analyse_reading(cfg, c, label, {s: [done[label, s, p] for p in ("context", "A", "B")] for s in seeds})
                for c, label in zip(arms, labels, strict=True) if label not in failed]
    words = sum((words_of_reading(a) for a in analysed), [f"\n{label}: {why}" for label, why in failed.items()])
    far = {label: {s: crossed(done[label, s, "context"])[-1, -1] for s in seeds} for label in labels
           if label not in failed}
    words += between(list(far.values()), list(far), cfg.bound, "read over other facts at the largest distance") \
        if far else []
    return files(run, table_of_reading(analysed, failed), words, lambda path: draw_reading(analysed, path),
                 {"arms": analysed, "failed": failed, "counts": {"parts": len(done)}})


def crossed(row: dict) -> np.ndarray:
    """(fillers, distances, pairs): what the own statement adds beyond the partner's, over both facts of a pair."""
    own, other = np.moveaxis(np.array(row["logp"]), 2, 0)
    return (own - other).reshape(*own.shape[:2], 2, -1).mean(axis=2)


def learned(a: dict, b: dict) -> np.ndarray:
    """(pairs, times): what the own exposures add beyond the partner's, from twins A and B."""
    d = values(a, "logp") - values(b, "logp")
    return (d[0] - d[1]) / 2


def analyse_reading(cfg, arm, label: str, rows: dict[int, list[dict]]) -> dict:
    """Effects by place: (what, filler or exposures, distance or number)."""
    context = [crossed(r[0]) for r in rows.values()]
    weights = [learned(*r[1:]) for r in rows.values()]
    right = np.mean([np.mean(np.array(r[0]["hit"])[:, :, 0], axis=2) for r in rows.values()], axis=0)
    known = np.mean([(values(a, "hit")[0] + values(b, "hit")[1]).mean(axis=0) / 2 for _, a, b in rows.values()], axis=0)
    places = [{"where": "context", "after": kind, "number": d, "right": float(right[k, i]),
               **describe_effect([c[k, i] for c in context], cfg.bound)}
              for k, kind in enumerate(FILLERS) for i, d in enumerate(arm.distances)]
    places += [{"where": "weights", "after": "exposures", "number": k, "right": float(known[i]),
                **describe_effect([w[:, i] for w in weights], cfg.bound)}
               for i, k in enumerate(doublings(arm.exposures)) if k]
    judge(places, cfg.bound)
    near = int(np.argmin(arm.distances))
    gate = reads([np.array(r[0]["hit"])[:, near, 0] for r in rows.values()], next(iter(rows.values()))[0]["constant"])
    curve = np.mean([w.mean(axis=0) for w in weights], axis=0)
    for p in places:
        p |= {} if gate["passed"] else {"verdict": NO_READING}
        if p["where"] == "context":
            p["worth"] = float(np.interp(min(crossing(curve, p["mean"]), len(curve)), range(len(curve)),
                                         doublings(arm.exposures), right=math.inf))
    return {"arm": label, "seeds": list(rows), "reads": gate, "places": places}


def words_of_reading(a: dict) -> list[str]:
    lines = [f"\n{a['arm']} ({len(a['seeds'])} seeds)"]
    for p in a["places"]:
        where = f"read {p['number']} tokens of {p['after']} later" if p["where"] == "context" else \
            f"learned in {p['number']} exposures"
        worth = "" if "worth" not in p or p["mean"] <= 0 else \
            f"; as much as {p['worth']:.1f} exposures" if math.isfinite(p["worth"]) else "; more than all exposures"
        lines.append(f"  {where}: right {p['right']:.0%}, log p {said(p)}{worth}")
    return lines


def table_of_reading(arms: list[dict], failed: dict[str, str]) -> str:
    lines = [["arm", "where", "after", "number", "right", "effect, nats", "95 % from", "to", "p (Holm)", "verdict"]]
    lines += [[a["arm"], p["where"], p["after"], str(p["number"]), f"{p['right']:.0%}", *cells(p)]
              for a in arms for p in a["places"]]
    return grid(lines + [[label, *[""] * 8, NO_READING] for label in failed])


def draw_reading(arms: list[dict], path: str) -> None:
    """Effects by distance in the context, and by exposures in the weights: a color per arm."""
    figure = new_figure(11, 4)
    axes = figure.subplots(1, 3, sharey=True)
    for i, a in enumerate(arms):
        for ax, kind in zip(axes, (*FILLERS, "exposures"), strict=True):
            found = sorted((p["number"], p["mean"], p["low"], p["high"]) for p in a["places"] if p["after"] == kind)
            x, mean, low, high = np.array(found, dtype=float).T
            ax.plot(x, mean, "o-", color=f"C{i}", markersize=3, label=a["arm"])
            if np.isfinite(low).all():
                ax.fill_between(x, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
    for ax, label in zip(axes, ("tokens of text between statement and question", "tokens of other facts between",
                                "exposures in training, asked without context"), strict=True):
        ax.set(xlabel=label)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("what the own statement adds to log p, nats")
    if arms:
        axes[0].legend(fontsize=8)
    save_figure(figure, path)
