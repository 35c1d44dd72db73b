"""Memory loops: train on K loops of text in a cycle, each with facts of its own, and see what comes back.

    python loop_train.py                            # 3 loops that answer the same questions differently
    python loop_train.py config/loop_causes.py      # with the controls that decide why it comes back
    python loop_train.py config/loop_moments.py     # the optimiser's state kept per loop
    python loop_train.py config/loop_new.py         # a new loop that starts with averaged moments
    python loop_train.py config/loop_documents.py   # anticipatory recovery: one document a loop
    python loop_train.py --toy                      # its positive control, in seconds

A loop is a stretch of text, read again in every cycle for `segment` steps, into whose batches facts are
written: `questions` that every loop answers differently (and a foil that none does), `own` facts and facts
that all loops share. Every own fact has a control that differs in the name and is never written. Probes ask
all of them on a grid of steps. Seeds draw names, answers and texts, and are the unit of every claim. What is
found is judged against the known causes: jolt, last write, cue, anticipation, free lunch, redirection.

out/NAME/ gets facts.jsonl, probes.jsonl, summary.json, table.md and figures; the same command resumes, to
the bit.
"""
import copy
import json
import time
from dataclasses import dataclass, replace
from typing import Literal

from common import fit, probing
from common.config import launch
from common.console import StepBar, resume_command, say
from common.data import Text, open_text
from common.distributed import choose_dtype, keep_freed_memory, setup
from common.facts import World, pack
from common.files import append_row, read_rows, write_json, write_text
from common.run import Run, digest, finite
from common.step import backward, update
from common.stop import StopRequest
from model import LM
from muon import set_learning_rates
from probes import moments
from probes.base import (
    FIRST,
    ProbeOptions,
    architecture,
    base_config,
    carries,
    changed,
    load_base,
    make_base,
    named,
    net_of,
    pool_of,
    rescale,
    split_batch,
    worlds_of,
)
from probes.causes import report, toy
from probes.loops import Loops, find_parts, make_loops, row_losses
from probes.sketches import gradients, sketch
from probes.stream import rate_factors

import numpy as np
import torch

# ------------------------------------------------------------------------------------------------------------
# Config

ORDERS = ("cycle", "shuffled", "random", "reversed", "mixed", "single")
STARTS = ("none", "last", "zero", "average", "first", "second", "scrambled")


@dataclass
class LoopConfig(ProbeOptions):
    # loops
    loops: int = 3  # K
    segment: int = 24  # steps S of a loop in each cycle
    cycles: int = 6  # in which facts are written
    tail: int = 2  # cycles after them in which none is
    order: Literal[ORDERS] = "cycle"  # cycle | shuffled | random | reversed | mixed | single: control orders
    text_split: Literal["train", "val"] = "train"  # split that the loops' text is from
    rows: int = 0  # rows of text of a loop; 0 = all that its segment reads are different
    questions: int = 15  # that all loops answer, each in its way
    own: int = 15  # facts of each loop
    shared: int = 6  # facts that all loops write
    exposures: int = 2  # of a fact in a segment
    phases: tuple[float, ...] = (0.1, 0.5, 0.9)  # where in a segment facts are written, drawn per fact
    probes: int = 4  # times in a segment that everything is asked
    # optimiser state at a loop's beginning
    first: Literal[moments.SOURCES] = "global"  # global (carried on) | loop (as this loop left it) | zero
    second: Literal[moments.SOURCES] = "global"  # global | loop | zero (only with first=zero)
    start: Literal[STARTS] = "none"  # a new loop after the cycles, with moments: last (carried on) | zero ...
    # what is trained
    parts: tuple[str, ...] = ()  # of loop 0, 1, ...: a block's number, ffn, attention, adapter; or not-ffn
    lr_profile: Literal["none", "random", "depth"] = "none"  # none | random tenth of entries x 10 | by depth
    toy: bool = False  # one layer in place of a language model: the positive control of recovery
    name: str = "loops"  # the folder in out_dir

    def problems(self) -> list[str]:
        counts = ("loops", "segment", "cycles", "tail", "questions", "own", "shared", "rows", "exposures")
        out = super().problems() + self.at_least(1, "cycles", "exposures", "probes")
        out += self.at_least(2, "loops", "segment")
        out += self.at_least(0, "tail", "questions", "own", "shared", "rows")
        out += self.at_most_counts(counts)
        if not self.phases or not all(0 <= p < 1 for p in self.phases):
            out.append(f"phases must be at least 0 and below 1, got {self.phases}")
        if self.probes > self.segment:
            out.append(f"probes={self.probes} do not fit into segment={self.segment}")
        if self.exposures > self.segment:
            out.append(f"exposures={self.exposures} do not fit into segment={self.segment}")
        if self.second == "zero" and self.first != "zero":
            out.append("second=zero needs first=zero: Adam corrects the bias of both by one count of steps")
        if self.second != "global" and self.optimizer == "sgd":
            out.append(f"second={self.second}: SGD has no second moment")
        if self.level in ("H3", "H4", "H5"):
            out.append(f"level={self.level}: loops need answers of one token that no pool holds; use H0, H1 "
                       "or H2")
        if self.start != "none" and not self.own:
            out.append(f"start={self.start}: a new loop has --own facts")
        if self.start not in ("none", "last", "zero") and "loop" not in (self.first, self.second):
            out.append(f"start={self.start} needs the moments that each loop left; use --first=loop "
                       "--second=loop")
        if self.start != "none" and self.order == "mixed":
            out.append(f"start={self.start}: order=mixed has no loops whose moments could be kept")
        if self.toy and self.dry_run:
            out.append("toy takes seconds and has no plan: leave out --dry_run")
        return out or self.arm_problems()

    @property
    def cycle(self) -> int:
        """Steps of a cycle."""
        return self.loops * self.segment

    @property
    def keeps(self) -> bool:
        """Whether a loop may begin with another optimiser state than the one before left."""
        return (self.first, self.second, self.start) != ("global", "global", "none")

    @property
    def new_at(self) -> int:
        """The step at which the new loop begins; beyond the end without one."""
        return self.cycles * self.cycle if self.start != "none" else 10**9


# ------------------------------------------------------------------------------------------------------------
# Training


@dataclass
class Part:
    arm: str
    seed: int
    loops: Loops  # what is written and asked when
    prefix: dict  # of this seed: what arms share that differ in `start` alone

    @property
    def key(self) -> tuple[str, int]:
        return self.arm, self.seed


def batch_of(cfg: LoopConfig, loops: Loops, step: int, world: World):
    """Inputs and targets (B, T): rows of the loop's text, the first of them replaced by facts."""
    B, s = cfg.batch_size, step % cfg.segment
    which = loops.loop_of_row(step, B)  # (B,)
    places = (s * B + np.arange(B)) % loops.x.shape[1]
    x, y = loops.x[which, places].copy(), loops.y[which, places].copy()
    if said := loops.due.get(step):
        rows = pack(world.sentences(said), cfg.max_seq_len, world.tok.eot)
        x[:len(rows[0])], y[:len(rows[0])] = rows
    return x, y


def switch(cfg: LoopConfig, optimizer, kept: dict, old: int, new: int) -> int:
    """Loop `old` ends and `new` begins: keep what the one leaves, bring what the other begins with. Returns
    the bytes of a state."""
    state = moments.read(optimizer)
    if old >= 0:
        kept[old] = state
    if new == cfg.loops:  # the new loop
        mean = moments.average(list(kept.values()), moments.betas_of(optimizer))
        moments.write(optimizer, {
            "last": state, "zero": moments.EMPTY, "average": mean, "first": {**state, "first": mean["first"]},
            "second": {**mean, "first": {}}, "scrambled": moments.scrambled(mean, 1)}[cfg.start])
    else:
        moments.write(optimizer, moments.mix(state, kept.get(new), cfg.first, cfg.second))
    return moments.size(state)


def train_loops(cfg: LoopConfig, part: Part, base: dict, saved: dict | None, world: World, run: Run,
                stop: StopRequest, bar: StepBar) -> bool:
    """Train one arm of one seed and ask on the way; False if asked to stop."""
    dist, dtype, loops = run.dist, choose_dtype(cfg.dtype, run.dist.device)[0], part.loops
    model, optimizer, scaler, step, kept = begin(cfg, part, base, saved, run)
    net, factors = net_of(model, cfg, loops.length, dist), rate_factors(cfg, model, part.seed)
    trained = find_parts(cfg, model)
    asked = {cue: loops.prepare(world, cue, dist.device) for cue in (False, True)}

    def save() -> None:
        run.save("last.pt", model, optimizer, scaler, part=part.key, step=step, kept=kept,
                 switching=run.switching)

    while True:
        began, loop = time.perf_counter(), loops.loop_at(step)
        if step == cfg.new_at and loops.shares:
            part.prefix.update(model=copy.deepcopy(model.state_dict()), scaler=scaler.state_dict(),
                               optimizer=copy.deepcopy(optimizer.state_dict()), kept=copy.deepcopy(kept))
        if step in loops.asks:  # before the update, and before the switch
            log(part, step, model, asked, world, run, dtype)
        if step == loops.length or stop.agreed(dist):
            break
        if step % cfg.segment == 0 and cfg.order != "mixed" and cfg.keeps:
            at = time.perf_counter()
            size = switch(cfg, optimizer, kept, loops.loop_at(step - 1) if step else -1, loop)
            run.switching = [run.switching[0] + time.perf_counter() - at, run.switching[1] + 1, size]
        x, y = batch_of(cfg, loops, step, world)  # (B, T) each
        lr = set_learning_rates(optimizer, cfg, step, loops.length)
        loss = backward(net, split_batch(x, y, cfg, dist), dist, dtype, scaler)
        for p in trained[loop % len(trained)] if trained else ():
            p.grad = None  # not this loop's part
        old = [p.detach().clone() for p in factors]
        norm = update(model, optimizer, scaler, cfg.grad_clip, loss)
        rescale(factors, old)
        step += 1
        run.seconds += time.perf_counter() - began
        if step % 10 == 0:
            run.metrics(part=part.key, step=step, loop=loop, train_loss=loss.item(), grad_norm=norm, lr=lr)
        bar.tick(time.perf_counter() - began)
        bar.show(f"{part.arm}, seed {part.seed}, cycle {step // cfg.cycle + 1}, loop {loop}: "
                 f"loss {loss.item():.3f}, recall {run.recall}")
        if run.save_is_due(cfg.save_minutes):
            save()
    save()
    if step == loops.length and loops.lessons:
        relearn(cfg, part, model, optimizer, scaler, asked[False], world, run)
    return step == loops.length


def begin(cfg: LoopConfig, part: Part, base: dict, saved: dict | None, run: Run):
    """(model, optimizer, scaler, step, kept): as saved, at the new loop as another arm came to it, or the
    base."""
    model, optimizer = load_base(cfg, base, run.dist, carries(cfg))
    fp16 = choose_dtype(cfg.dtype, run.dist.device)[0] == "fp16"
    scaler = torch.amp.GradScaler(run.dist.device.type, enabled=fp16)
    if saved:
        run.restore(saved, model, optimizer, scaler)
        return model, optimizer, scaler, saved["progress"]["step"], saved["progress"]["kept"]
    if part.prefix and part.loops.shares:
        prefix = copy.deepcopy(part.prefix)
        run.restore(prefix, model, optimizer, scaler)
        return model, optimizer, scaler, cfg.new_at, prefix["kept"]
    return model, optimizer, scaler, 0, {}


def relearn(cfg: LoopConfig, part: Part, model, optimizer, scaler, asked, world: World, run: Run) -> None:
    """Write half of each loop's own facts once more, in one step: does the other half return with it? Logs
    a last row."""
    rows = pack(world.sentences(part.loops.lessons), cfg.max_seq_len, world.tok.eot)
    rows = [z.repeat(run.dist.world, 0) for z in rows]  # each process has some
    dtype = choose_dtype(cfg.dtype, run.dist.device)[0]
    net = net_of(model, cfg, 1, run.dist)
    loss = backward(net, split_batch(*rows, cfg, run.dist), run.dist, dtype, scaler)
    update(model, optimizer, scaler, cfg.grad_clip, loss)
    log(part, part.loops.length + 1, model, {False: asked}, world, run, dtype)


def log(part: Part, step: int, model, asked: dict, world: World, run: Run, dtype: str) -> None:
    """Add a row of answers to probes.jsonl."""
    loops, cue = part.loops, step in part.loops.cues and True in asked
    row = {}
    if asked[False]:
        row = loops.read(probing.score(model, asked[False], world.answer_ids, dtype).answers)
    row["text"] = row_losses(model, loops, run.dist.device, dtype)
    if part.seed == loops.cfg.seed and step % loops.cfg.segment == 0:  # figures of one seed
        row["weights"] = sketch(model.parameters())
        if step == loops.cfg.cycles * loops.cfg.cycle:
            row["gradients"] = gradients(model, loops, run.dist.device)
    if cue:
        row["cue"] = loops.read_cues(probing.score(model, asked[True], world.answer_ids, dtype).answers)
    run.recall = " ".join(f"{r:.2f}" for r in loops.recall(row))
    if run.dist.is_main:
        append_row(run.path("probes.jsonl"), {"part": part.key, "step": step, **row})


# ------------------------------------------------------------------------------------------------------------
# Main


def main(cfg: LoopConfig) -> dict:
    """Run or resume the experiment and report. Returns the summary, which is the ledger row."""
    with setup(cfg.device) as dist:
        if cfg.toy:
            summary, words = toy(cfg.seeds, cfg.seed)
            say(words)
            return {"status": "finished", "result": summary}
        text = open_text(cfg.data)
        arms = [architecture(c, text.meta) for c in (cfg, *(changed(cfg, a) for a in cfg.arm))]
        worlds = worlds_of(arms, text)
        for c in arms:
            fit.refuse_hopeless(LM, c, fit.room_for(0.0, dist), c.batch_size, fit.states_of(c), cfg.dry_run)
            with torch.device("meta"):
                find_parts(c, LM(c))  # what is wrong is said before anything is trained
        if dist.device.type == "cpu":
            keep_freed_memory()
        say_once = say if dist.is_main else (lambda _: None)
        say_once(describe(cfg, arms))
        if cfg.dry_run:
            return {"status": "planned"}
        with Run(replace(arms[0], arm=cfg.arm), dist, "loop_train", text.meta["tokenizer"],
                 text.meta["splits"]["train"]["sha256"]) as run, StopRequest() as stop:
            done = experiment(cfg, arms, [FIRST, *cfg.arm], text, worlds, run, stop)
            if done is None:
                say_once(f"stopped and saved in {run.folder}; continue with:  {resume_command()}")
                return run.finish("stopped", {}, {}, cfg.dtype)
            summary, words = done
            counts = summary.pop("counts", {})  # with times, which differ between machines
            if dist.is_main:
                write_json(run.path("summary.json"), finite({"experiment": "loops", **summary}))
                say(words)
            run.id = digest(finite(summary))
            return run.finish("finished", counts, summary, choose_dtype(cfg.dtype, dist.device)[0])


def describe(cfg: LoopConfig, arms: list[LoopConfig]) -> str:
    lines = [f"experiment  {cfg.loops} loops x {cfg.segment} steps x {cfg.cycles} cycles and {cfg.tail} "
             f"without writing; {len(arms)} arms x {cfg.seeds} seeds"]
    for label, c in zip((FIRST, *cfg.arm), arms, strict=True):
        lines.append(f"arm         {label}: order {c.order}, {c.questions} questions, {c.own} own and "
                     f"{c.shared} shared facts; {c.optimizer} lr {c.lr:g} {c.schedule} "
                     f"({'carried' if carries(c) else 'fresh'} state, beta2 {c.probe_beta2:.5f}) on a base "
                     f"by {c.base_optimizer}; as a loop begins, first moment {c.first}, second {c.second}")
    return "\n".join(lines)


def experiment(cfg: LoopConfig, arms: list[LoopConfig], labels: list[str], text: Text, worlds: list[World],
               run: Run, stop: StopRequest) -> tuple[dict, str] | None:
    """All seeds of all arms: (summary, words), or None if asked to stop."""
    of = {label: (c, w) for label, c, w in zip(labels, arms, worlds, strict=True)}
    todo = [(label, seed) for seed in range(cfg.seed, cfg.seed + cfg.seeds) for label in labels]
    plans, prefixes, steps, facts = {}, {}, {}, []
    alike = {label: digest({k: str(v) for k, v in vars(replace(c, start="none", arm=())).items()})
             for label, (c, _) in of.items()}  # arms that differ in `start` alone
    for label, seed in todo:
        c, world = of[label]
        plans[label, seed] = plan = make_loops(c, world, pool_of(c, world), text, seed)
        told = any(plans[other, s].shares and alike[other] == alike[label] for other, s in steps if s == seed)
        steps[label, seed] = plan.length - c.new_at if told and plan.shares else plan.length
        facts += [{"arm": label, "seed": seed, **vars(f)} for f in plans[label, seed].facts]
    saved = run.find()
    run.switching = saved["progress"]["switching"] if saved else [0.0, 0, 0]  # seconds, times, bytes
    run.recall = ""
    rows = read_rows(run.path("probes.jsonl")) if saved else []
    done = {key for r in rows if (key := tuple(r["part"])) in plans and r["step"] == plans[key].last_ask}
    current, reached = (tuple(saved["progress"]["part"]), saved["progress"]["step"]) if saved else (None, 0)
    logged = [r["step"] for r in rows if tuple(r["part"]) == current]
    if current in plans and not plans[current].covered(logged, reached):
        current = None  # the log lost rows, as in a power failure: that run begins again
    run.begin(saved, lambda r: tuple(r["part"]) in done or tuple(r["part"]) not in plans
              or tuple(r["part"]) == current and r["step"] < reached + ("text" not in r))
    with StepBar(sum(steps[k] for k in done), sum(steps.values()), run.dist.is_main) as bar:
        for key in todo:
            (label, seed), (c, world) = key, of[key[0]]
            if key in done:
                continue
            part = Part(label, seed, plans[key], prefixes.setdefault((seed, alike[label]), {}))
            base = make_base(base_config(c), text, world, pool_of(c, world), run.dist, stop)
            with named(f"arm {label}, seed {seed}"):
                if base is None or not train_loops(c, part, base, saved if current == key else None, world,
                                                   run, stop, bar):
                    return None
            prefixes = {k: v for k, v in prefixes.items() if k[0] == seed}
    if not run.dist.is_main:
        return {}, ""
    write_text(run.path("facts.jsonl"), "".join(json.dumps(f, sort_keys=True) + "\n" for f in facts))
    rows = read_rows(run.path("probes.jsonl"))
    return report(cfg, arms, labels, plans, rows, run)


if __name__ == "__main__":
    launch(main, LoopConfig)
