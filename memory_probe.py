"""What does one exposure leave behind, how long does it last, does it come back: signal or noise.

    python memory_probe.py                                    # retention, on a base it trains first: 10
    minutes
    python memory_probe.py --show_facts=10                    # some facts, their controls and probes
    python memory_probe.py --power                            # what these facts and seeds can detect, how
    long
    python memory_probe.py config/probe_spacing.py --seeds=6  # also: frequency, dilution, mixed, continual,
    ...
    python memory_probe.py --arm=optimizer=muon --arm="optimizer=sgd lr=0.3"     # each arm against the first
    python memory_probe.py --base=out/demo --pool=0           # on a checkpoint, as it is

How it measures. A small base learns a pool of facts until it answers them in every wording. Then unknown
facts are written into rows of the ordinary batches, and training goes on. Everything is done twice, in
crossover twins: run A trains the treated facts, run B their controls in the same rows, at the same steps, in
the same sentences; only the names differ. The effect is log p(answer) in A minus that in B on the treated
facts, and B minus A on the controls: what a fact gained from its own exposures, in nats (log p is summed
over the answer's tokens). A third twin, A with one background row changed, gives the chaos floor. Seeds draw
new names and answers, and are the unit of every claim.

out/NAME/ gets facts.jsonl, probes.jsonl, summary.json and figures; the same command resumes, to the bit.
"""
import copy
import hashlib
import itertools
import json
import math
import os
import time
from dataclasses import dataclass, replace
from typing import Literal

import context_probe
import stream_probe
from artefacts import ARTEFACTS, artefacts
from base import (
    CPU,
    MOST,
    BaseConfig,
    architecture,
    background,
    base_config,
    carries,
    load_base,
    make_base,
    pool_batch,
    split_batch,
)
from common import fit, probing, stats, tokenizer
from common.config import ConfigError, UserError, launch, option_types, parse
from common.console import StepBar, resume_command, say
from common.data import Text, Windows, open_text
from common.distributed import Dist, choose_dtype, keep_freed_memory, setup
from common.facts import TRAINED, WORDINGS, Fact, World, find_leaks, make_facts, make_pairs, pack, shuffled
from common.files import append_row, read_rows, write_json, write_text
from common.memory_report import CONTROLS, HORIZONS, report
from common.run import Run, digest, finite
from common.step import NotFinite, backward, update, wrap
from common.stop import StopRequest
from model import LM
from muon import OPTIMIZERS, make_optimizer, set_learning_rates

import numpy as np
import torch

# ------------------------------------------------------------------------------------------------------------
# Config


OTHERS = {"window": stream_probe.window, "trace": stream_probe.trace, "handover": context_probe.handover,
          "incontext": context_probe.incontext, "artefacts": artefacts}  # with loops of their own
EXPERIMENTS = ("retention", "frequency", "dilution", "spacing", "mixed", "continual", *OTHERS)


@dataclass
class ProbeConfig(BaseConfig):
    MAY_CHANGE = {"seeds", "seed", "arm", "power", "show_facts", "bound", "chaos_seeds"}
    # experiment
    experiment: Literal[EXPERIMENTS] = "retention"  # retention | frequency | dilution | spacing | mixed | ...
    arm: tuple[str, ...] = ()  # options changed in another arm, as "optimizer=sgd lr=0.3"; repeat for more
    seeds: int = 4  # seed, seed + 1, ...: other facts, other background
    facts: int = 32  # treated facts (and controls) of each group
    exposures: int = 4  # of a fact, where the experiment does not vary them
    steps: int = 500  # after the injection
    lead: int = 8  # before the injection
    spread: int = 64  # steps over which exposures are spread
    share: float = 0.25  # mixed: share of each batch that holds facts
    cohorts: int = 6  # continual: how many groups are written, `spread` steps apart
    method: Literal["none", "replay", "ewc", "rows"] = "none"  # continual: none | replay | ewc | rows
    replay_share: float = 0.1  # replay: share of each batch that repeats facts written before
    ewc_lambda: float = 100.0  # ewc: weight of the penalty (lambda / 2) F (p - p_before)^2
    reset_after: bool = False  # artefact: begin a new optimiser when the injection ends
    keep_pool: bool = False  # keep the pool's rows in the background: the form of facts is not forgotten
    artefacts: tuple[Literal[tuple(ARTEFACTS)], ...] = tuple(ARTEFACTS)  # which of artefacts.py
    # window, trace
    window_size: int = 32  # window: sentences in it, all trained at each step
    stride: int = 8  # window: new sentences per step, so that each is trained window_size / stride times
    sentences: int = 256  # window: half of them in the stream, half never trained
    context: int = 0  # window: earlier sentences before each one, in training (masked) and probes; 0 = none
    lr_profile: Literal["none", "random", "depth"] = "none"  # window: none | random | depth
    intervals: int = 8  # trace: stretches of text per seed
    stretch: int = 512  # trace: tokens of a stretch
    retrain_steps: int = 10  # trace: steps on a stretch, each on all of its windows
    overlap: float = 0.5  # trace: share of a window that the next one repeats
    reach: int = 2048  # trace: tokens before and behind a stretch that are read
    exclude_overlap: bool = True  # trace: not the tokens that are read in one window with trained ones
    # handover, incontext
    modes: tuple[Literal["ce", "kl"], ...] = ("ce", "kl")  # handover: ce | kl to the prompted base
    target: float = 0.9  # handover: accuracy to hold, as a share of the prompted base's
    distances: tuple[int, ...] = (0, 16, 32)  # incontext: tokens between a statement and its question
    # probe's optimiser (the base has its own)
    state: Literal["carry", "fresh"] = "carry"  # carry the base's state where the optimiser is the same
    beta2_tokens: int = 0  # tokens in which Adam's second moment halves; 0 = as beta2 says
    base_optimizer: Literal[tuple(OPTIMIZERS)] = "adamw"  # adamw | muon | sgd
    base_lr: float = 2e-3  # peak learning rate of the base
    base_seed: int = 1  # of the base's weights, pool and answers
    # verdict
    chaos_seeds: int = 1  # seeds that also run the chaos twin
    bound: float = 0.1  # nats below which an effect counts as none
    power: bool = False  # print what would be detected and how long it takes, and stop
    show_facts: int = 0  # print this many facts with controls and probes, and stop
    name: str = "memory"  # the folder in out_dir

    def problems(self) -> list[str]:
        out = super().problems() + self.at_least(1, "seeds", "facts", "exposures", "spread", "cohorts",
                                                 "lead")
        out += self.at_least(0, "steps", "beta2_tokens", "chaos_seeds", "base_lr", "bound", "show_facts",
                             "base_seed",
                             "ewc_lambda")
        out += [f"{key}={getattr(self, key):,} is more than {MOST:,}, the most there can be"
                for key in ("seeds", "facts", "exposures", "spread", "cohorts", "lead", "show_facts",
                            "chaos_seeds")
                if getattr(self, key) > MOST]
        if self.exposures > TRAINED and self.experiment == "retention":
            out.append(f"exposures={self.exposures}: a fact has {TRAINED} wordings to train")
        if self.exposures > self.spread:
            out.append(f"exposures={self.exposures} do not fit into spread={self.spread} steps")
        out += [f"{key} must be above 0 and at most 1, got {getattr(self, key)}" for key in ("share",)
                if not 0 < getattr(self, key) <= 1]
        if not 0 <= self.replay_share < 1:
            out.append(f"replay_share must be at least 0 and below 1, got {self.replay_share}")
        if self.experiment in ("handover", "incontext") and not (self.context_share or self.base):
            out.append(f"experiment={self.experiment} needs a base that reads facts from its context; use "
                       "--context_share=0.5")
        if not self.modes or not self.distances or min(self.distances) < 0 or not 0 < self.target <= 1:
            out.append("modes and distances must not be empty, distances not negative, target above 0 and "
                       "at most 1")
        out += self.at_least(1, "window_size", "stride", "intervals", "retrain_steps") + self.at_least(0,
                                                                                                       "context")
        if self.experiment == "window" and self.stride > self.window_size:
            out.append(f"stride={self.stride} leaves out sentences; at most window_size={self.window_size}")
        if self.sentences < 4 or self.sentences % 2:
            out.append(f"sentences must be even and at least 4, got {self.sentences}")
        if not 0 <= self.overlap < 1:
            out.append(f"overlap must be at least 0 and below 1, got {self.overlap}")
        if self.experiment == "trace":
            out += self.at_least(self.max_seq_len + 1, "stretch") + self.at_least(2 * self.max_seq_len,
                                                                                  "reach")
        if self.method != "none" and self.experiment != "continual":
            out.append(f"method={self.method} is for --experiment=continual")
        for text in self.arm if not out else ():
            try:
                changed(replace(self, arm=()), text)
            except ConfigError as e:
                out += [f"arm '{text}': {p}" for p in e.problems]
        return out

    @property
    def burst(self) -> int:
        """Steps in which a cohort is written."""
        return min(self.spread, max(self.exposures, 8))

    @property
    def probe_beta2(self) -> float:
        """Adam's decay per step, whose half-life is `beta2_tokens` where that is set (2507.07101)."""
        tokens = self.batch_size * self.max_seq_len
        return 0.5 ** (tokens / self.beta2_tokens) if self.beta2_tokens else self.beta2


def changed(cfg, text: str):
    """`cfg` with the options of an arm, such as "optimizer=sgd lr=0.3"."""
    kinds, values, problems = option_types(type(cfg)), {}, []
    for word in text.split():
        key, _, value = word.removeprefix("--").partition("=")
        if key not in kinds or key in ("arm", "name", "seed", "seeds", "out_dir", "data"):
            problems.append(f"'{key}' is not an option of an arm")
            continue
        try:
            values[key] = parse(value or "true", kinds[key], key)
        except ValueError as e:
            problems.append(str(e))
    if problems:
        raise ConfigError(problems)
    return replace(cfg, **values, arm=())  # arms need not fit each other


# ------------------------------------------------------------------------------------------------------------
# Schedules: which experiment writes which pair when. (groups, {step: [(pair, place in its order)]}, length):
# `groups` names the group of each pair, steps count from the start of the injection.

HEAVY = 16  # exposures of the positive control
OFTEN = ("mem", "para")  # kinds of probes that are asked on the whole grid


def evenly(pairs: list[int], exposures: int, cfg: ProbeConfig, same: bool, first=0, length=0) -> list[tuple]:
    """Each pair's exposures at equal distances, the last within the last of them; [(step, pair, place)]."""
    length, said = length or cfg.spread, []
    gap, slots = length // exposures, max(1, length // max(HEAVY, exposures))
    for n, pair in enumerate(pairs):
        last = first + length - 1 - n % slots
        said += [(last - j * gap, pair, 0 if same else (exposures - 1 - j) % TRAINED)
                 for j in range(exposures)]
    return said


def schedule(cfg: ProbeConfig) -> tuple[list[str], dict[int, list], int]:
    n, k, S = cfg.facts, cfg.exposures, cfg.spread
    few = max(8, n // 4)
    said, groups, length = [], [], S

    def group(name: str, count: int) -> list[int]:
        groups.extend([name] * count)
        return list(range(len(groups) - count, len(groups)))

    if cfg.experiment == "retention":
        group("zero", few)
        said += evenly(group("once", n), 1, cfg, True)
        said += evenly(group("duplicated", n), k, cfg, True)
        said += evenly(group("paraphrased", n), k, cfg, False)
    elif cfg.experiment == "frequency":  # Zipf: half as many facts at each doubling
        for e in (2**i for i in range(7) if 2**i <= S):
            said += evenly(group(f"x{e}", max(8, n // e)), e, cfg, False)
    elif cfg.experiment == "dilution":  # the same exposures early or late in the text; arms vary --spread
        said += evenly(group("early", n), k, cfg, False, length=max(k, S // 4))
        said += evenly(group("late", n), k, cfg, False, first=S - max(k, S // 4), length=max(k, S // 4))
        said += evenly(group("throughout", n), k, cfg, False)
    elif cfg.experiment == "spacing":  # matched exposures and matched last exposure
        room = S - S // 8  # the last exposures are spread over the rest
        gaps = {"massed": [1] * (k - 1), "uniform": [room // k] * (k - 1),
                "expanding": [max(1, room * 2**j // 2**k) for j in range(k - 1)]}
        for name, apart in gaps.items():
            for i, pair in enumerate(group(name, n)):
                steps = itertools.accumulate(reversed(apart), int.__sub__, initial=S - 1 - i % max(1, S // 8))
                said += [(step, pair, (k - 1 - j) % TRAINED) for j, step in enumerate(steps)]
    elif cfg.experiment == "mixed":  # facts in a share of each batch until all exposures are used up
        per_step = max(1, round(cfg.share * cfg.batch_size)) * max(1, (cfg.max_seq_len + 1) // 16)
        pairs = group("mixed", n)
        everything = [(pair, j % TRAINED) for j in range(k) for pair in pairs]
        said += [(i // per_step, *what) for i, what in enumerate(everything)]
        length = -(-len(everything) // per_step)
    elif cfg.experiment == "continual":  # a cohort every S steps
        for c in range(cfg.cohorts):
            said += evenly(group(f"cohort{c + 1}", n), k, cfg, False, first=c * S, length=cfg.burst)
        length = (cfg.cohorts - 1) * S + cfg.burst
    else:
        raise NotImplementedError(f"experiment={cfg.experiment}")
    heavy = group("heavy", few)  # the positive control
    if length >= HEAVY:
        said += evenly(heavy, HEAVY, cfg, False, length=length)
    else:
        said += [(j * length // HEAVY, pair, j % TRAINED) for pair in heavy for j in range(HEAVY)]
    due = {}
    for step, pair, place in sorted(said):
        due.setdefault(step, []).append((pair, place))
    assert min(due) >= 0 and max(due) < length, f"exposures at steps {min(due)} to {max(due)} of {length}"
    return groups, due, length


def probe_steps(cfg: ProbeConfig, plan: tuple) -> dict[int, bool]:
    """{step before whose update probes are asked: whether all kinds are}. Before and during the injection,
    after each group's last exposure, then 0, 1, 2, 3, 5, 8, ... steps after all, and the end."""
    groups, due, length = plan
    ends = {groups[pair]: step + 1 for step, said in due.items() for pair, _ in said} | {"": length}
    grid, a, b = {0}, 1, 2
    while a < cfg.steps:
        grid.add(a)
        a, b = b, a + b
    whole = {e + h for e in ends.values() for h in HORIZONS} | {length + cfg.steps, 0}
    some = {round(i * length / 4) for i in range(4)} | {length + g for g in grid} | {-cfg.lead}
    return {cfg.lead + s: s in whole for s in sorted(whole | some) if s <= length + cfg.steps}


# ------------------------------------------------------------------------------------------------------------
# Exposure: one twin of one seed of one arm


@dataclass
class Part:
    arm: int
    seed: int
    twin: str  # A: the treated facts; B: their controls; chaos: A with one background row changed
    facts: list[Fact]  # treated, controls, spares: pair i is facts i, n + i, 2 n + i
    due: dict[int, list]  # step after `lead` -> [(pair, place in the order of its statements)]
    end: int  # the step after the injection
    steps: dict[int, bool]  # where probes are asked, and whether all kinds or only OFTEN; the last is the end

    @property
    def key(self) -> list:
        return [self.arm, self.seed, self.twin]

    @property
    def length(self) -> int:
        return max(self.steps)

    def sentences(self, said: list[tuple[int, int]], world: World) -> list[list[int]]:
        """Of (pair, place), with the subjects that this twin trains."""
        own = len(self.facts) // 3 if self.twin == "B" else 0
        return world.sentences([(self.facts[own + pair], self.facts[pair].order[place]) for pair,
                                place in said])


def fact_rows(part: Part, world: World, cfg: ProbeConfig) -> dict[int, tuple]:
    """{step: rows (R, T) of inputs and targets} with what this twin writes."""
    out = {}
    for step, said in part.due.items():
        out[cfg.lead + step] = rows = pack(part.sentences(said, world), cfg.max_seq_len, world.tok.eot)
        if len(rows[0]) > cfg.batch_size - cfg.pool_rows * cfg.keep_pool:
            raise UserError(f"step {step} of the injection has {len(said)} sentences, {len(rows[0])} rows of "
                            f"{cfg.max_seq_len} tokens, but the batch has {cfg.batch_size} rows; use a "
                            "larger "
                            "--batch_size or --spread, or fewer --facts")
    return out


def replay(cfg: ProbeConfig, part: Part, step: int, world: World):
    """Rows (R, T) that repeat facts of earlier cohorts, a function of (seed, step). None in the first."""
    begun = (step - cfg.lead) // cfg.spread * cfg.spread
    before = sorted({what for s, said in part.due.items() if s < begun for what in said})
    rows = round(cfg.replay_share * cfg.batch_size)
    if not before or not rows:
        return None
    drawn = np.random.default_rng((part.seed, 11, step)).integers(len(before),
                                                                  size=rows * cfg.max_seq_len // 8)
    x, y = pack(part.sentences([before[i] for i in drawn], world), cfg.max_seq_len, world.tok.eot)
    return x[:rows], y[:rows]


def consolidate(net, model: LM, rows: list, cfg: ProbeConfig, dist: Dist) -> dict:
    """What EWC (Kirkpatrick 2017, 1612.00796) keeps of the rows (R, T): the weights now, and the diagonal
    Fisher information, as the mean over rows of the squared gradient."""
    fisher, (x, y) = {name: torch.zeros_like(p) for name, p in model.named_parameters()}, rows
    for i in range(len(x)):
        alone = [z[i:i + 1].repeat(dist.world, 0) for z in (x, y)]
        backward(net, split_batch(*alone, cfg, dist), dist, "fp32",
                 torch.amp.GradScaler("cpu", enabled=False))
        for name, p in model.named_parameters():
            fisher[name] += p.grad.float() ** 2 / len(x)
            p.grad = None
    return {"fisher": fisher, "anchor": {name: p.detach().clone() for name, p in model.named_parameters()}}


def pull_back(model: LM, ewc: dict, weight: float) -> None:
    """Add the gradient of (weight / 2) sum F (p - anchor)^2."""
    for name, p in model.named_parameters():
        p.grad += weight * ewc["fisher"][name] * (p.detach() - ewc["anchor"][name])


def only_rows(model: LM, x: np.ndarray):
    """Keep gradients of nothing but the embeddings of the tokens x; returns what restores the other rows
    (momentum would move them)."""
    table, others = model.embed.weight, torch.ones(len(model.embed.weight), dtype=torch.bool)
    others[torch.as_tensor(x).unique()] = False
    others = others.to(table.device)
    for p in model.parameters():
        p.grad = p.grad if p is table else None
    before = table.detach()[others].clone()

    def restore() -> None:
        with torch.no_grad():
            table[others] = before

    return restore


def expose(cfg: ProbeConfig, part: Part, written: dict, model: LM, optimizer, scaler, step: int, ewc: dict,
           prefix: dict, world: World, windows: Windows, pool: list, run: Run, stop: StopRequest,
           bar: StepBar) -> bool:
    """Train on from `step` and ask probes on the way; False if asked to stop. Until the injection both twins
    are the same run: the first one leaves its state there in `prefix`."""
    dist, dtype = run.dist, choose_dtype(cfg.dtype, run.dist.device)[0]
    probes = {everything: probes_of(part, world, everything) for everything in (False, True)}
    prepared = {k: probing.batches(p, world.tok.eot, dist.device) for k, p in probes.items()}
    net = wrap(model, False, dist)
    kept = cfg.pool_rows * cfg.keep_pool
    while True:
        began = time.perf_counter()
        if step == cfg.lead and part.twin == "A":
            prefix.update(model=copy.deepcopy(model.state_dict()), scaler=scaler.state_dict(),
                          optimizer=copy.deepcopy(optimizer.state_dict()))
        if step in part.steps:  # before the update: step `lead` is "never seen"
            scores = probing.score(model, prepared[part.steps[step]], world.answer_ids, dtype)
            log_scores(part, step, probes[part.steps[step]], scores, run)
            run.probing += time.perf_counter() - began
        if step == part.length or stop.agreed(dist):
            break
        x, y = background(windows, step, cfg)  # (B, T) each
        if part.twin == "chaos" and step == cfg.lead:
            x[-1], y[-1] = (z[0].numpy() for z in windows.batch(2**40, 1, CPU))
        if kept:
            x[:kept], y[:kept] = pool_batch(pool, kept, step + cfg.base_steps, cfg, world.tok.eot)
        again = replay(cfg, part, step, world) if cfg.method == "replay" else None
        for rows, place in ((written.get(step), kept), (again, len(x) - len(again[0]) if again else 0)):
            if rows:
                x[place:place + len(rows[0])], y[place:place + len(rows[0])] = rows
        if cfg.reset_after and step == part.end:
            optimizer.state.clear()
        lr = set_learning_rates(optimizer, cfg, step, part.length)
        loss = backward(net, split_batch(x, y, cfg, dist), dist, dtype, scaler)
        if cfg.method == "ewc" and ewc:
            pull_back(model, ewc, cfg.ewc_lambda)
        restore = only_rows(model, written[step][0]) if cfg.method == "rows" and step in written else None
        norm = update(model, optimizer, scaler, cfg.grad_clip, loss)
        if restore:
            restore()
        if cfg.method == "ewc" and (step + 1 - cfg.lead) % cfg.spread == cfg.burst:  # a cohort is complete
            if cohort := [written[s] for s in range(step + 1 - cfg.burst, step + 1) if s in written]:
                rows = [np.concatenate(z)[::4] for z in zip(*cohort, strict=True)]
                ewc = consolidate(net, model, rows, cfg, dist)
        step += 1
        run.seconds += time.perf_counter() - began
        if step % 10 == 0:
            run.metrics(part=part.key, step=step, train_loss=loss.item(), grad_norm=norm, lr=lr)
        bar.tick(time.perf_counter() - began)
        bar.show(f"arm {part.arm + 1}, seed {part.seed}, twin {part.twin}: loss {loss.item():.3f}")
        if run.save_is_due(cfg.save_minutes):
            run.save("last.pt", model, optimizer, scaler, part=part.key, step=step, ewc=ewc,
                     probing=run.probing)
    run.save("last.pt", model, optimizer, scaler, part=part.key, step=step, ewc=ewc,
                     probing=run.probing)
    return step == part.length


def probes_of(part: Part, world: World, everything: bool) -> list:
    """Probes of treated facts and controls; of spares, which nobody trains, only what OFTEN names first."""
    return [p for fact in part.facts for p in world.probes(fact)
            if p.kind == OFTEN[0] or fact.split != "spare" and (everything or p.kind in OFTEN)]


def log_scores(part: Part, step: int, probes: list, scores: probing.Scores, run: Run) -> None:
    """Add a row per kind of probe to probes.jsonl: lists over treated facts, then over controls. The
    confidence on subjects that no run has seen is a mean over spares."""
    if not run.dist.is_main:
        return
    kinds, n = np.array([p.kind for p in probes]), len(part.facts) // 3
    for kind in dict.fromkeys(kinds.tolist()):
        of = np.flatnonzero(kinds == kind)
        row = {"part": part.key, "step": step, "kind": kind,
               "logp": scores.logp[of[:2 * n]].round(5).tolist()}
        row |= {k: getattr(scores, k)[of[:2 * n]].astype(int).tolist() for k in ("hit", "rank", "guess")}
        if kind == OFTEN[0]:
            row["unseen_confidence"] = float(scores.confidence[of[2 * n:]].mean())
        append_row(run.path("probes.jsonl"), row)


def start(cfg: ProbeConfig, base: dict, saved: dict | None, run: Run, prefix: dict, twin: str):
    """(model, optimizer, scaler, step): as saved, as twin A was at the injection, or the base."""
    model, optimizer = load_base(cfg, base, run.dist, carries(cfg))
    fp16 = choose_dtype(cfg.dtype, run.dist.device)[0] == "fp16"
    scaler = torch.amp.GradScaler(run.dist.device.type, enabled=fp16)
    state, step = (saved, saved["progress"]["step"]) if saved else (prefix, cfg.lead)
    if state and (saved or twin == "B"):
        run.restore(copy.deepcopy(state), model, optimizer, scaler)
        return model, optimizer, scaler, step
    return model, optimizer, scaler, 0


# ------------------------------------------------------------------------------------------------------------
# Main


def show_facts(cfg: ProbeConfig, world: World) -> None:
    facts = make_pairs(world, cfg.show_facts, cfg.seed, make_facts(world, "pool", cfg.pool, cfg.base_seed))
    say(f"{len(world.answers)} answers, guessing is right once in {len(world.answers)}: "
        f"{', '.join(a.strip() for a in shuffled(world.answers, 'shown')[:8])}, ...")
    for fact, control in zip(facts[:cfg.show_facts], facts[cfg.show_facts:], strict=False):
        say(f"\n{fact.id}" + (f"; the pool says {fact.old.strip()}" if fact.old else ""))
        for label, f, wording in (("trained", fact, fact.order[0]), ("", fact, fact.order[1]),
                                  ("control", control, fact.order[0])):
            say(f"    {label:<10}{''.join(world.prompt(f, wording))}.")
        for p in world.probes(fact):
            say(f"    {p.kind:<10}{world.tok.decode(p.prompt[1:])} |{world.tok.decode(p.target)}|")


def facts_of(cfg: ProbeConfig, seed: int, world: World, text: Text) -> tuple[list[Fact], list[Fact]]:
    """(the pool, the facts of one seed with their groups). Names that the text contains are named and
    avoided: a control that stands in the text would be no control."""
    pool = make_facts(world, "pool", cfg.pool, cfg.base_seed) if cfg.pool else []
    groups, avoid = schedule(cfg)[0], {}
    while True:
        facts = make_pairs(world, len(groups), seed, pool, avoid)
        leaks = find_leaks(world, facts, text.train)
        if not leaks or cfg.level == "H4":
            break
        avoid |= {f.subject: leaks[f.id] for f in facts if f.id in leaks}
    for name, place in avoid.items():
        say(f"note: the text contains '{name}' (token {place:,}); another name was drawn for the fact")
    for fact in facts:
        fact.group = groups[fact.pair]
    return pool, facts


def run_part(cfg: ProbeConfig, part: Part, prefix: dict, saved: dict | None, text: Text, world: World,
             pool: list[Fact], run: Run, stop: StopRequest, bar: StepBar) -> bool:
    written = fact_rows(part, world, cfg)  # before a base is trained for nothing
    base = make_base(base_config(cfg), text, world, pool, run.dist, stop)
    if base is None:
        return False
    model, optimizer, scaler, step = start(cfg, base, saved, run, prefix, part.twin)
    ewc = saved["progress"]["ewc"] if saved else {}
    sentences = world.sentences(list(itertools.product(pool, range(len(WORDINGS))))) if cfg.keep_pool else []
    windows = Windows(text.train, cfg.max_seq_len, 1000 + part.seed)
    try:
        return expose(cfg, part, written, model, optimizer, scaler, step, ewc, prefix, world, windows,
                      sentences, run,
                      stop, bar)
    except NotFinite as e:
        raise UserError(f"arm {part.arm + 1}, seed {part.seed}, twin {part.twin}: {e}; use a lower "
                        "--lr") from None


def main(cfg: ProbeConfig) -> dict:
    """Run or resume the experiment and report. Returns the summary, which is the ledger row."""
    with setup(cfg.device) as dist:
        text = open_text(cfg.data)
        arms = [architecture(c, text.meta) for c in (cfg, *(changed(cfg, a) for a in cfg.arm))]
        worlds = [World(text.tok, c.level, c.base_seed, c.answers) for c in arms]
        if cfg.show_facts:
            show_facts(cfg, worlds[0])
            return {"status": "shown"}
        for c in arms:
            fit.refuse_hopeless(LM, c, fit.room_for(0.0, dist), c.batch_size, fit.states_of(c), cfg.dry_run)
        if dist.device.type == "cpu":
            keep_freed_memory()
        others = OTHERS.get(cfg.experiment)
        if not others and dist.is_main:
            say(describe(cfg, arms))
        if cfg.power and not others:
            say(power(cfg, arms, dist))
        if cfg.dry_run or cfg.power:
            return {"status": "planned"}
        with Run(replace(arms[0], arm=cfg.arm), dist, "memory_probe", text.meta["tokenizer"],
                 text.meta["splits"]["train"]["sha256"]) as run, StopRequest() as stop:
            done = (others or exposures)(cfg, arms, ["as it is", *cfg.arm], text, worlds, run, stop)
            if done is None:
                say(f"stopped and saved in {run.folder}; continue with:  {resume_command()}")
                return run.finish("stopped", {}, {}, cfg.dtype)
            summary, words = done
            counts = summary.pop("counts", {})  # with times, which differ between machines
            if dist.is_main:
                write_json(run.path("summary.json"), finite(summary))
                say(words)
            run.id = digest(finite(summary))
            return run.finish("finished", counts, summary, choose_dtype(cfg.dtype, dist.device)[0])


def exposures(cfg: ProbeConfig, arms: list, labels: list[str], text: Text, worlds: list[World], run: Run,
              stop: StopRequest) -> tuple[dict, str] | None:
    """All twins of all seeds of all arms: (summary, words), or None if asked to stop."""
    plans = [(schedule(c), probe_steps(c, schedule(c))) for c in arms]
    todo = parts(cfg, arms)
    saved = run.find()
    run.probing = saved["progress"].get("probing", 0.0) if saved else 0.0  # seconds
    rows = read_rows(run.path("probes.jsonl")) if saved else []
    done = {tuple(r["part"]) for r in rows if r["step"] == max(plans[r["part"][0]][1])}
    current, reached = (tuple(saved["progress"]["part"]), saved["progress"]["step"]) if saved else (None, 0)
    if saved and current[0] < len(plans) and not covered(rows, current, reached, plans[current[0]][1],
                                                         arms[current[0]]):
        current = None  # the log lost rows, as in a power failure: that run begins again
    run.begin(saved, lambda r: tuple(r["part"]) in done or tuple(r["part"]) == current
              and r["step"] < reached)
    prefix, written, place = {}, [], None
    with StepBar(sum(max(plans[key[0]][1]) for key in done if key in todo),
                 sum(max(plans[a][1]) for a, _, _ in todo),
                 run.dist.is_main) as bar:
        for key in todo:
            a, seed, twin = key
            if place != (a, seed):
                prefix, place = {}, (a, seed)
                pool, facts = facts_of(arms[a], seed, worlds[a], text)
                written += [{"arm": a, "seed": seed, **vars(f)} for f in facts]
            _, due, length = plans[a][0]
            part = Part(a, seed, twin, facts, due, arms[a].lead + length, plans[a][1])
            mine = saved if current == key else None
            if key not in done and not run_part(arms[a], part, prefix, mine, text, worlds[a], pool, run, stop,
                                                bar):
                return None
    if not run.dist.is_main:
        return {}, ""
    asked = [r for r in read_rows(run.path("probes.jsonl")) if tuple(r["part"]) in todo]
    lines = "".join(json.dumps(f, sort_keys=True) + "\n" for f in written)
    write_text(run.path("facts.jsonl"), lines)
    summary, words = report(cfg, labels, arms, plans, asked, written,
                            worlds[0].answers, run.folder)
    summary |= {"facts_sha256": hashlib.sha256(lines.encode()).hexdigest(),
                "counts": {"runs": len(todo), "probing_share": run.probing / max(run.seconds, 1e-9)}}
    return summary, words


def covered(rows: list[dict], part: tuple, reached: int, grid: dict, cfg: ProbeConfig) -> bool:
    """Whether all probes of a part up to the step `reached` were logged (twin B begins at the injection)."""
    asked = {r["step"] for r in rows if tuple(r["part"]) == part}
    return all(s in asked for s in grid if s < reached and (part[2] != "B" or s >= cfg.lead))


def parts(cfg: ProbeConfig, arms: list) -> list[tuple[int, int, str]]:
    """(arm, seed, twin) of every run, seed by seed, so that what is done can be compared."""
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    return [(a, s, t) for s in seeds for a in range(len(arms))
            for t in ("A", "B", "chaos")[:3 if s < cfg.seed + cfg.chaos_seeds else 2]]


def describe(cfg: ProbeConfig, arms: list) -> str:
    n = len(parts(cfg, arms))
    lines = [f"experiment  {cfg.experiment}: {len(arms)} arms x {cfg.seeds} seeds x twins = {n} runs"]
    for label, c in zip(("as it is", *cfg.arm), arms, strict=True):
        groups, due, length = schedule(c)
        lines.append(f"arm         {label}: "
                     f"{', '.join(f'{groups.count(g)} {g}' for g in dict.fromkeys(groups))}; "
                     f"{c.lead} steps, {length} with {sum(map(len, due.values())):,} exposures, {c.steps} "
                     "after; "
                     f"{c.optimizer} lr {c.lr:g} ({'carried' if carries(c) else 'fresh'} state, beta2 "
                     f"{c.probe_beta2:.5f}) on a base by {c.base_optimizer}")
    return "\n".join(lines)


def power(cfg: ProbeConfig, arms: list, dist: Dist) -> str:
    """What these facts and seeds detect, from the spread measured by an earlier run of this name if there is
    one; and how long it takes here."""
    sd_seed, sd_item, source = 0.1, 0.6, "assumed; after a first run of one or more seeds it is measured"
    path = os.path.join(cfg.out_dir, cfg.name, "summary.json")
    if os.path.exists(path):
        groups = tokenizer.read_json(path)["arms"][0]["groups"]
        found = [next(iter(g["kinds"]["mem"]["at"].values())) for name,
                 g in groups.items() if name not in CONTROLS]
        sd_item = max(e["sd_item"] for e in found)
        sd_seed = max((e["sd_seed"] for e in found if e["sd_seed"] is not None), default=sd_seed)
        source = f"measured in {os.path.dirname(path)}"
    lines = [f"spread      {sd_seed:.2f} nats over seeds, {sd_item:.2f} over facts ({source})"]
    for seeds in sorted({1, 3, cfg.seeds, 6, 10}):
        see = stats.minimum_detectable(sd_seed, sd_item, seeds, cfg.facts)
        lines.append(f"power       {seeds:2} seed{'s' if seeds > 1 else ' '} x {cfg.facts} pairs: sees "
                     f"{see:.2f} nats "
                     f"({see / math.log(2):.2f} bits) four times in five"
                     + " <- as it is" * (seeds == cfg.seeds))
    for label, c in zip(("as it is", *cfg.arm), arms, strict=True):
        mine = [key for key in parts(cfg, arms) if arms[key[0]] is c]
        seconds = sum(max(probe_steps(c, schedule(c))) for _ in mine) * seconds_per_step(c, dist)
        lines.append(f"time        {label}: {len(mine)} runs, about {seconds * 1.2 / 60:.0f} minutes here, "
                     "and its "
                     "base where that is not cached")
    return "\n".join(lines)


def seconds_per_step(cfg: ProbeConfig, dist: Dist) -> float:
    """Measured with random weights and tokens."""
    model = LM(cfg).to(dist.device)
    optimizer, dtype = make_optimizer(model, cfg), choose_dtype(cfg.dtype, dist.device)[0]
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dtype == "fp16")
    x = np.random.default_rng(0).integers(0, cfg.vocab_size, (cfg.batch_size, cfg.max_seq_len))
    times = []
    for _ in range(8):
        began = time.perf_counter()
        loss = backward(model, split_batch(x, x, cfg, dist), dist, dtype, scaler)
        update(model, optimizer, scaler, cfg.grad_clip, loss)
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    launch(main, ProbeConfig)
