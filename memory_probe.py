"""What does one exposure leave behind, how long does it last, does it come back: signal or noise.

    python memory_probe.py                                    # retention, on a base it trains first
    python memory_probe.py --show_facts=10                    # some facts, their controls and probes
    python memory_probe.py --power                            # what this design can detect, how long it takes
    python memory_probe.py config/probe_spacing.py --seeds=6  # also: frequency, dilution, mixed, continual
    python memory_probe.py --arm=optimizer=muon --arm="optimizer=sgd lr=0.003"  # each arm against the first
    python memory_probe.py --base=out/demo --pool=0           # on a checkpoint, as it is

How it measures. A small base learns a pool of facts until it answers them in every wording. Then unknown
facts are written into rows of the ordinary batches, and training goes on. Everything is done twice, in
crossover twins: run A trains the treated facts, run B their controls in the same rows, at the same steps, in
the same sentences; only the names differ. The effect is log p(answer) in A minus that in B on the treated
facts, and B minus A on the controls: what a fact gained from its own exposures, in nats (log p is summed
over the answer's tokens). A third twin, A with one background row changed, gives the chaos floor. Seeds draw
new names and answers, and are the unit of every claim.

window, trace (probes/stream.py), handover, incontext (probes/context.py), inherit (probes/inherit.py) and
artefacts (probes/artefacts.py) have loops of their own. out/NAME/ gets facts.jsonl, probes.jsonl,
summary.json, table.md and effect.png; the same command resumes, to the bit.
"""
import copy
import hashlib
import itertools
import json
import math
import os
import time
from dataclasses import dataclass, field, replace
from typing import Literal

from common import fit, probing, stats
from common.config import UserError, launch
from common.console import StepBar, resume_command, say
from common.data import Text, Windows, open_text
from common.distill_loss import DIVERGENCES
from common.distributed import Dist, choose_dtype, keep_freed_memory, setup
from common.facts import TRAINED, WORDINGS, Fact, World, make_pairs, new_pairs, pack, shuffled
from common.files import append_row, read_json, read_rows, write_json, write_text
from common.run import Run, digest, finite
from common.step import backward, update
from common.stop import StopRequest
from model import LM
from muon import make_optimizer, set_learning_rates
from probes.artefacts import ARTEFACTS, artefacts
from probes.base import (
    CPU,
    FIRST,
    ProbeOptions,
    architecture,
    background,
    base_config,
    carries,
    changed,
    load_base,
    make_base,
    named,
    net_of,
    pool_batch,
    pool_of,
    split_batch,
    worlds_of,
)
from probes.context import handover, incontext
from probes.effects import early_and_late
from probes.inherit import inherit
from probes.report import CONTROLS, HORIZONS, report
from probes.stream import trace, window

import numpy as np
import torch

# ------------------------------------------------------------------------------------------------------------
# Config

OTHERS = {f.__name__: f for f in (window, trace, handover, incontext, inherit, artefacts)}  # own loops
EXPERIMENTS = ("retention", "frequency", "dilution", "spacing", "mixed", "continual", *OTHERS)


@dataclass
class ProbeConfig(ProbeOptions):
    MAY_CHANGE = {"power", "show_facts", "chaos_seeds"}
    # experiment
    experiment: Literal[EXPERIMENTS] = "retention"  # retention | frequency | dilution | spacing | mixed | ...
    facts: int = 32  # treated facts (and controls) of each group
    exposures: int = 4  # of a fact, where the experiment does not vary them
    steps: int = 500  # after the injection
    lead: int = 8  # before the injection
    spread: int = 64  # steps over which exposures are spread
    share: float = 0.25  # mixed, inherit: share of each batch that holds facts or prompts
    cohorts: int = 6  # continual: how many groups are written, `spread` steps apart
    method: Literal["none", "replay", "ewc", "rows"] = "none"  # none | rows; continual: replay | ewc
    replay_share: float = 0.1  # replay: share of each batch that repeats facts written before
    ewc_lambda: float = 100.0  # ewc: weight of the penalty (lambda / 2) F (p - p_before)^2
    keep_pool: bool = False  # keep the pool's rows in the background: the form of facts is not forgotten
    artefacts: tuple[Literal[tuple(ARTEFACTS)], ...] = tuple(ARTEFACTS)  # which of them
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
    # inherit
    divergence: Literal[DIVERGENCES] = "forward_kl"  # of a student from its teacher
    alpha: float = 1.0  # weight of the teacher's labels, 1 - alpha that of the text; 0 = no labels
    temperature: float = 1.0  # of both distributions
    reads: Literal["text", "pool", "names", "questions"] = "text"  # text | pool | names | questions
    student: Literal["base", "other"] = "base"  # begins as: the teachers' base | one of other weights
    teacher_lr: float = 1e-3  # while teachers are taught, for `spread` steps
    # verdict
    chaos_seeds: int = 1  # seeds that also run the chaos twin
    power: bool = False  # print what would be detected and how long it takes, and stop
    show_facts: int = 0  # print this many facts with controls and probes, and stop
    name: str = "memory"  # the folder in out_dir

    def problems(self) -> list[str]:
        counts = ("facts", "exposures", "spread", "cohorts", "lead", "show_facts", "chaos_seeds")
        out = super().problems() + self.at_least(1, *counts[:5], "window_size", "stride", "intervals",
                                                 "retrain_steps")
        out += self.at_least(0, *counts[5:], "steps", "ewc_lambda", "context", "alpha", "teacher_lr")
        out += self.at_most_counts(counts)
        out += [f"{key} must be above 0, got {getattr(self, key)}"
                for key in ("share", "target", "temperature") if not getattr(self, key) > 0]
        out += [f"{key} must be at most 1, got {getattr(self, key)}" for key in ("share", "target", "alpha")
                if getattr(self, key) > 1]
        out += [f"{key} must be at least 0 and below 1, got {getattr(self, key)}"
                for key in ("replay_share", "overlap") if not 0 <= getattr(self, key) < 1]
        if self.sentences < 4 or self.sentences % 2:
            out.append(f"sentences must be even and at least 4, got {self.sentences}")
        if not self.modes or not self.artefacts or min(self.distances, default=-1) < 0:
            out.append("modes, artefacts and distances must not be empty, and distances not negative")
        out += self.contradictions()
        return out or self.arm_problems()

    def contradictions(self) -> list[str]:
        """Options that do not fit the experiment."""
        out, name = [], self.experiment
        if self.exposures > TRAINED and name == "retention":
            out.append(f"exposures={self.exposures}: a fact has {TRAINED} wordings to train")
        if self.exposures > self.spread and name != "incontext":
            out.append(f"exposures={self.exposures} do not fit into spread={self.spread} steps")
        if name in ("handover", "incontext") and not (self.context_share or self.base):
            out.append(f"experiment={name} needs a base that reads facts from its context; use "
                       "--context_share=0.5")
        if name == "continual":
            out += self.at_least(2, "cohorts")
        if name == "window" and self.stride > self.window_size:
            out.append(f"stride={self.stride} leaves out sentences; at most window_size={self.window_size}")
        if name == "trace":
            out += self.at_least(self.max_seq_len + 1, "stretch")
            out += self.at_least(2 * self.max_seq_len, "reach")
        if name == "inherit":
            out += self.inherit_problems()
        if name == "artefacts" and (self.arm or self.lora_rank or not self.pool
                                    or {self.optimizer, self.base_optimizer} != {"adamw"}):
            out.append("experiment=artefacts shows its set-ups on one base by adamw with a pool, without "
                       "arms or LoRA")
        if self.method != "none" and name != "continual" and (self.method != "rows" or name in OTHERS):
            out.append(f"method={self.method} is for --experiment=continual")
        if self.lora_rank and self.method in ("ewc", "rows"):
            out.append(f"method={self.method} is about weights that lora_rank={self.lora_rank} freezes; use "
                       "one of the two")
        if self.power and name in OTHERS:
            out.append(f"power is for experiments with exposures, not {name}; its words say what was "
                       "detectable")
        return out

    def inherit_problems(self) -> list[str]:
        out = []
        if self.reads == "questions" and self.alpha < 1:
            out.append("reads=questions has labels where the answer would stand, but no token for "
                       f"alpha={self.alpha} to train on; use alpha=1, or reads=names")
        if self.reads != "text" and not round(self.share * self.batch_size):
            out.append(f"share={self.share} of batch_size={self.batch_size} is no row")
        if self.reads == "pool" and not self.pool:
            out.append("reads=pool needs a pool, and pool=0")
        if self.student == "other" and (self.base or not self.pool):
            out.append("student=other needs two bases from random weights, with a pool; leave out --base")
        return out

    @property
    def burst(self) -> int:
        """Steps in which a cohort is written."""
        return min(self.spread, max(self.exposures, 8))


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
    whole = {e + h for e in ends.values() for h in HORIZONS} | {length + cfg.steps, 0}
    some = {round(i * length / 4) for i in range(4)} | {length + g
                                                        for g in early_and_late(cfg.steps)} | {-cfg.lead}
    return {cfg.lead + s: s in whole for s in sorted(whole | some) if s <= length + cfg.steps}


# ------------------------------------------------------------------------------------------------------------
# Exposure: one twin of one seed of one arm


@dataclass
class Part:
    arm: str
    seed: int
    twin: str  # A: the treated facts; B: their controls; chaos: A with one background row changed
    facts: list[Fact]  # treated, controls, spares: pair i is facts i, n + i, 2 n + i
    due: dict[int, list]  # step after `lead` -> [(pair, place in the order of its statements)]
    steps: dict[int, bool]  # where probes are asked, and whether all kinds or only OFTEN; the last is the end
    written: dict[int, tuple] = field(default_factory=dict)  # step -> rows (R, T) of inputs and targets

    @property
    def key(self) -> tuple[str, int, str]:
        return self.arm, self.seed, self.twin

    @property
    def length(self) -> int:
        return max(self.steps)

    def sentences(self, said: list[tuple[int, int]], world: World) -> list[list[int]]:
        """Of (pair, place), with the subjects that this twin trains."""
        own = len(self.facts) // 3 if self.twin == "B" else 0
        return world.sentences([(self.facts[own + pair], self.facts[pair].order[place])
                                for pair, place in said])


def write_rows(part: Part, world: World, cfg: ProbeConfig) -> None:
    """Fill in what this twin writes."""
    for step, said in part.due.items():
        rows = pack(part.sentences(said, world), cfg.max_seq_len, world.tok.eot)
        if len(rows[0]) > cfg.batch_size - cfg.pool_rows * cfg.keep_pool:
            raise UserError(f"step {step} of the injection has {len(said)} sentences, {len(rows[0])} rows of "
                            f"{cfg.max_seq_len} tokens, but the batch has {cfg.batch_size} rows; use a "
                            "larger --batch_size or --spread, or fewer --facts")
        part.written[cfg.lead + step] = rows


def batch_of(cfg: ProbeConfig, part: Part, step: int, world: World, windows: Windows, pool: list):
    """Inputs and targets (B, T) of a step: background text, in rows of which stand the pool if it is kept,
    what this twin writes, and in the last ones what it replays."""
    x, y = background(windows, step, cfg)
    if part.twin == "chaos" and step == cfg.lead:
        x[-1], y[-1] = (z[0].numpy() for z in windows.batch(2**40, 1, CPU))
    kept = cfg.pool_rows * cfg.keep_pool
    if kept:
        x[:kept], y[:kept] = pool_batch(pool, kept, step + cfg.base_steps, cfg, world.tok.eot)
    if rows := part.written.get(step):
        x[kept:kept + len(rows[0])], y[kept:kept + len(rows[0])] = rows
    if rows := replay(cfg, part, step, world) if cfg.method == "replay" else None:
        x[-len(rows[0]):], y[-len(rows[0]):] = rows
    return x, y


def replay(cfg: ProbeConfig, part: Part, step: int, world: World):
    """Rows (R, T) that repeat facts of earlier cohorts, a function of (seed, step). None in the first."""
    begun = (step - cfg.lead) // cfg.spread * cfg.spread
    before = sorted({what for s, said in part.due.items() if s < begun for what in said})
    rows = round(cfg.replay_share * cfg.batch_size)
    if not before or not rows:
        return None
    rng = np.random.default_rng((part.seed, 11, step))
    drawn = rng.integers(len(before), size=rows * cfg.max_seq_len // 8)
    x, y = pack(part.sentences([before[i] for i in drawn], world), cfg.max_seq_len, world.tok.eot)
    return x[:rows], y[:rows]


def cohort_before(cfg: ProbeConfig, part: Part, step: int) -> list | None:
    """A quarter of the rows of the cohort that is complete at this step; None if none is."""
    steps = range(step - cfg.burst, step) if (step - cfg.lead - cfg.burst) % cfg.spread == 0 else ()
    rows = [part.written[s] for s in steps if s in part.written]
    return [np.concatenate(z)[::4] for z in zip(*rows, strict=True)] if rows else None


def consolidate(net, model: LM, rows: list, cfg: ProbeConfig, dist: Dist) -> dict:
    """What EWC (Kirkpatrick 2017, 1612.00796) keeps of the rows (R, T): the weights now, and the diagonal
    Fisher information, as the mean over rows of the squared gradient."""
    fisher, (x, y) = {name: torch.zeros_like(p) for name, p in model.named_parameters()}, rows
    scaler = torch.amp.GradScaler(dist.device.type, enabled=False)
    for i in range(len(x)):
        alone = [z[i:i + 1].repeat(dist.world, 0) for z in (x, y)]
        backward(net, split_batch(*alone, cfg, dist), dist, "fp32", scaler)
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


def expose(cfg: ProbeConfig, part: Part, base: dict, saved: dict | None, prefix: dict, world: World,
           text: Text, pool: list[Fact], run: Run, stop: StopRequest, bar: StepBar) -> bool:
    """Train one twin and ask probes on the way; False if asked to stop. Until the injection both twins are
    the same run: A leaves its state there in `prefix`, and B begins with it."""
    dist, dtype = run.dist, choose_dtype(cfg.dtype, run.dist.device)[0]
    model, optimizer, scaler, step = start(cfg, base, saved, run, prefix, part.twin)
    net, ewc = net_of(model, cfg, part.length, dist), saved["progress"]["ewc"] if saved else {}
    windows = Windows(text.train, cfg.max_seq_len, 1000 + part.seed)
    known = world.sentences(list(itertools.product(pool, range(len(WORDINGS))))) if cfg.keep_pool else []
    probes = {everything: probes_of(part, world, everything) for everything in (False, True)}
    prepared = {k: probing.batches(p, world.tok.eot, dist.device) for k, p in probes.items()}

    def save() -> None:
        run.save("last.pt", model, optimizer, scaler, part=part.key, step=step, ewc=ewc, probing=run.probing)

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
        x, y = batch_of(cfg, part, step, world, windows, known)  # (B, T) each
        lr = set_learning_rates(optimizer, cfg, step, part.length)
        loss = backward(net, split_batch(x, y, cfg, dist), dist, dtype, scaler)
        if ewc:
            pull_back(model, ewc, cfg.ewc_lambda * scaler.get_scale())
        restore = only_rows(model,
                            part.written[step][0]) if cfg.method == "rows" and step in part.written else None
        norm = update(model, optimizer, scaler, cfg.grad_clip, loss)
        if restore:
            restore()
        step += 1
        if cfg.method == "ewc" and (rows := cohort_before(cfg, part, step)):
            ewc = consolidate(net, model, rows, cfg, dist)
        run.seconds += time.perf_counter() - began
        if step % 10 == 0:
            run.metrics(part=part.key, step=step, train_loss=loss.item(), grad_norm=norm, lr=lr)
        bar.tick(time.perf_counter() - began)
        bar.show(f"{part.arm}, seed {part.seed}, twin {part.twin}: loss {loss.item():.3f}")
        if run.save_is_due(cfg.save_minutes):
            save()
    save()
    return step == part.length


def probes_of(part: Part, world: World, everything: bool) -> list:
    """Probes of treated facts and controls; of spares, which nobody trains, only what OFTEN names first."""
    return [p for fact in part.facts for p in world.probes(fact)
            if p.kind == OFTEN[0] or fact.split != "spare" and (everything or p.kind in OFTEN)]


def log_scores(part: Part, step: int, probes: list, scores: probing.Scores, run: Run) -> None:
    """Add a row to probes.jsonl. `kinds` has lists over treated facts, then over controls; the confidence on
    subjects that no run has seen is a mean over spares."""
    if not run.dist.is_main:
        return
    of, n, kinds = np.array([p.kind for p in probes]), len(part.facts) // 3, {}
    for kind in dict.fromkeys(of.tolist()):
        mine = np.flatnonzero(of == kind)[:2 * n]
        kinds[kind] = {"logp": scores.logp[mine].round(5).tolist()}
        kinds[kind] |= {key: getattr(scores, key)[mine].astype(int).tolist()
                        for key in ("hit", "rank", "guess")}
    spares = np.flatnonzero(of == OFTEN[0])[2 * n:]
    append_row(run.path("probes.jsonl"), {"part": part.key, "step": step, "kinds": kinds,
                                          "unseen_confidence": float(scores.confidence[spares].mean())})


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
    facts = make_pairs(world, cfg.show_facts, cfg.seed, pool_of(cfg, world))
    say(f"{len(world.answers)} answers, guessing is right once in {len(world.answers)}: "
        f"{', '.join(a.strip() for a in shuffled(world.answers, 'shown')[:8])}, ...")
    for fact, control in zip(facts[:cfg.show_facts], facts[cfg.show_facts:], strict=False):
        say(f"\n{fact.id}" + (f"; the pool says {fact.old.strip()}" if fact.old else ""))
        for label, f, wording in (("trained", fact, fact.order[0]), ("", fact, fact.order[1]),
                                  ("control", control, fact.order[0])):
            say(f"    {label:<10}{''.join(world.prompt(f, wording))}.")
        for p in world.probes(fact):
            say(f"    {p.kind:<10}{world.tok.decode(p.prompt[1:])} |{world.tok.decode(p.target)}|")


def facts_of(cfg: ProbeConfig, seed: int, world: World, pool: list[Fact], text: Text) -> list[Fact]:
    """The facts of one seed, with their groups. Names that the text contains are named and avoided."""
    groups = schedule(cfg)[0]
    facts, found = new_pairs(world, len(groups), seed, pool, text.train)
    for name, place in found.items():
        say(f"note: the text contains '{name}' (token {place:,}); another name was drawn for the fact")
    for fact in facts:
        fact.group = groups[fact.pair]
    return facts


def main(cfg: ProbeConfig) -> dict:
    """Run or resume the experiment and report. Returns the summary, which is the ledger row."""
    with setup(cfg.device) as dist:
        text = open_text(cfg.data)
        arms = [architecture(c, text.meta) for c in (cfg, *(changed(cfg, a) for a in cfg.arm))]
        worlds = worlds_of(arms, text)
        if cfg.show_facts:
            show_facts(cfg, worlds[0])
            return {"status": "shown"}
        for c in arms:
            fit.refuse_hopeless(LM, c, fit.room_for(0.0, dist), c.batch_size, fit.states_of(c), cfg.dry_run)
        if dist.device.type == "cpu":
            keep_freed_memory()
        others = OTHERS.get(cfg.experiment)
        if dist.is_main:
            say(f"experiment  {cfg.experiment}: {len(arms)} arms x {cfg.seeds} seeds" if others
                else describe(cfg, arms))
        if cfg.power:
            say(power(cfg, arms, dist))
        if cfg.dry_run or cfg.power:
            return {"status": "planned"}
        with Run(replace(arms[0], arm=cfg.arm), dist, "memory_probe", text.meta["tokenizer"],
                 text.meta["splits"]["train"]["sha256"]) as run, StopRequest() as stop:
            done = (others or exposures)(cfg, arms, [FIRST, *cfg.arm], text, worlds, run, stop)
            if done is None:
                say(f"stopped and saved in {run.folder}; continue with:  {resume_command()}")
                return run.finish("stopped", {}, {}, cfg.dtype)
            summary, words = done
            counts = summary.pop("counts", {})  # with times, which differ between machines
            if dist.is_main:
                write_json(run.path("summary.json"), finite({"experiment": cfg.experiment, **summary}))
                say(words)
            run.id = digest(finite(summary))
            return run.finish("finished", counts, summary, choose_dtype(cfg.dtype, dist.device)[0])


def exposures(cfg: ProbeConfig, arms: list, labels: list[str], text: Text, worlds: list[World], run: Run,
              stop: StopRequest) -> tuple[dict, str] | None:
    """All twins of all seeds of all arms: (summary, words), or None if asked to stop."""
    plans = {label: (schedule(c), probe_steps(c, schedule(c))) for label, c in zip(labels, arms, strict=True)}
    of = {label: (c, w) for label, c, w in zip(labels, arms, worlds, strict=True)}
    todo = parts(cfg, labels)
    saved = run.find()
    run.probing = saved["progress"].get("probing", 0.0) if saved else 0.0  # seconds
    rows = read_rows(run.path("probes.jsonl")) if saved else []
    done = {key for r in rows if (key := tuple(r["part"])) in todo and r["step"] == max(plans[key[0]][1])}
    current, reached = (tuple(saved["progress"]["part"]), saved["progress"]["step"]) if saved else (None, 0)
    if current in todo and not covered(rows, current, reached, plans[current[0]][1], of[current[0]][0]):
        current = None  # the log lost rows, as in a power failure: that run begins again
    run.begin(saved, lambda r: tuple(r["part"]) in done or tuple(r["part"]) not in todo
              or tuple(r["part"]) == current and r["step"] < reached + ("kinds" not in r))
    prefix, written, place = {}, [], None
    with StepBar(sum(max(plans[a][1]) for a, _, _ in done), sum(max(plans[a][1]) for a, _, _ in todo),
                 run.dist.is_main) as bar:
        for key in todo:
            (label, seed, twin), (c, world) = key, of[key[0]]
            if place != (label, seed):
                prefix, place, pool = {}, (label, seed), pool_of(c, world)
                facts = facts_of(c, seed, world, pool, text)
                written += [{"arm": label, "seed": seed, **vars(f)} for f in facts]
            if key in done:
                continue
            part = Part(label, seed, twin, facts, plans[label][0][1], plans[label][1])
            write_rows(part, world, c)  # before a base is trained for nothing
            base = make_base(base_config(c), text, world, pool, run.dist, stop)
            with named(f"arm {label}, seed {seed}, twin {twin}"):
                if base is None or not expose(c, part, base, saved if current == key else None, prefix, world,
                                              text, pool, run, stop, bar):
                    return None
    if not run.dist.is_main:
        return {}, ""
    asked = [r for r in read_rows(run.path("probes.jsonl")) if tuple(r["part"]) in todo]
    lines = "".join(json.dumps(f, sort_keys=True) + "\n" for f in written)
    write_text(run.path("facts.jsonl"), lines)
    summary, words = report(cfg, labels, arms, list(plans.values()), asked, written, worlds[0].answers, run)
    summary |= {"facts_sha256": hashlib.sha256(lines.encode()).hexdigest(),
                "counts": {"runs": len(todo), "probing_share": run.probing / max(run.seconds, 1e-9)}}
    return summary, words


def covered(rows: list[dict], part: tuple, reached: int, grid: dict, cfg: ProbeConfig) -> bool:
    """Whether all probes of a part up to the step `reached` were logged (twin B begins at the injection)."""
    asked = {r["step"] for r in rows if tuple(r["part"]) == part}
    return all(s in asked for s in grid if s < reached and (part[2] != "B" or s >= cfg.lead))


def parts(cfg: ProbeConfig, labels: list[str]) -> list[tuple[str, int, str]]:
    """(arm, seed, twin) of every run, seed by seed, so that what is done can be compared."""
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    return [(a, s, t) for s in seeds for a in labels
            for t in ("A", "B", "chaos")[:3 if s < cfg.seed + cfg.chaos_seeds else 2]]


def describe(cfg: ProbeConfig, arms: list) -> str:
    n = len(parts(cfg, [FIRST, *cfg.arm]))
    lines = [f"experiment  {cfg.experiment}: {len(arms)} arms x {cfg.seeds} seeds x twins = {n} runs"]
    for label, c in zip((FIRST, *cfg.arm), arms, strict=True):
        groups, due, length = schedule(c)
        sizes = ", ".join(f"{groups.count(g)} {g}" for g in dict.fromkeys(groups))
        lines.append(f"arm         {label}: {sizes}; {c.lead} steps, {length} with "
                     f"{sum(map(len, due.values())):,} exposures, {c.steps} after; {c.optimizer} lr {c.lr:g} "
                     f"{c.schedule} ({'carried' if carries(c) else 'fresh'} state, beta2 "
                     f"{c.probe_beta2:.5f}) on a base by {c.base_optimizer}")
    return "\n".join(lines)


def power(cfg: ProbeConfig, arms: list, dist: Dist) -> str:
    """What these facts and seeds detect, from the spread measured by an earlier run of this name if there is
    one; and how long it takes here."""
    sd_seed, sd_item, source = 0.1, 0.6, "assumed; after a first run of this name it is measured"
    path = os.path.join(cfg.out_dir, cfg.name, "summary.json")
    earlier = read_json(path) if os.path.exists(path) else {}
    if earlier.get("experiment") == cfg.experiment:
        found = [next(iter(g["kinds"]["mem"]["at"].values()))
                 for name, g in earlier["arms"][0]["groups"].items() if name not in CONTROLS]
        sd_item = max(e["sd_item"] for e in found)
        sd_seed = max((e["sd_seed"] for e in found if e["sd_seed"] is not None), default=sd_seed)
        source = f"measured in {os.path.dirname(path)}"
    lines = [f"spread      {sd_seed:.2f} nats over seeds, {sd_item:.2f} over facts ({source})"]
    for seeds in sorted({1, 3, cfg.seeds, 6, 10}):
        see = stats.minimum_detectable(sd_seed, sd_item, seeds, cfg.facts)
        lines.append(f"power       {seeds:2} seed{'s' if seeds > 1 else ' '} x {cfg.facts} pairs: sees "
                     f"{see:.2f} nats ({see / math.log(2):.2f} bits) four times in five"
                     + " <- as it is" * (seeds == cfg.seeds))
    labels = [FIRST, *cfg.arm]
    for label, c in zip(labels, arms, strict=True):
        runs = [key[0] for key in parts(cfg, labels)].count(label)
        minutes = runs * max(probe_steps(c, schedule(c))) * seconds_per_step(c, dist) * 1.2 / 60
        lines.append(f"time        {label}: {runs} runs, about {minutes:.0f} minutes here, and its base "
                     "where that is not cached")
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
