"""How a run is divided into optimiser steps, processes and micro-batches."""
import math
from dataclasses import dataclass, field
from typing import ClassVar

from common import distributed, fit
from common.config import Config, UserError


@dataclass
class PlanConfig(Config):
    MAY_CHANGE = {"checkpoint_activations", "memory_gb", "micro_batch_size", "max_minutes", "prompts",
                  "sample_tokens", "log_interval", "save_minutes"}
    # options of the scripts that have them
    train_minutes: ClassVar[float] = 0.0
    head_samples: ClassVar[int] = 0
    # length: whichever ends first
    epochs: float = -1.0  # passes over the training samples; 0 = no limit; -1 = 1, or no limit with max_steps
    max_steps: int = 0  # optimiser steps; 0 = no limit
    max_minutes: float = 0.0  # of a session: save and stop; the same command resumes; 0 = no limit
    # batch
    batch_size: int = 32  # sequences per optimiser step, over all processes
    micro_batch_size: int = 0  # sequences per process and forward pass; 0 = as many as fit at the start
    checkpoint_activations: bool = False  # recompute each block in backward: less memory, more time
    memory_gb: float = 0.0  # what micro_batch_size=0 may fill; 0 = what is free now
    # evaluation and output
    eval_interval: int = 0  # steps between evaluations on the whole validation split; 0 = once per epoch
    patience: int = 0  # stop after this many evaluations without a new best; 0 = never
    prompts: tuple[str, ...] = ()  # continued at each evaluation
    sample_tokens: int = 40  # length of those samples, with temperature 0.8 and top_k 50
    log_interval: int = 10  # steps between rows of metrics.jsonl
    save_minutes: float = 5.0  # minutes between saves of last.pt; evaluations save too; 0 = every step

    def problems(self) -> list[str]:
        out = super().problems() + self.at_least(1, "batch_size", "log_interval")
        out += self.at_least(0, "micro_batch_size", "max_steps", "max_minutes", "eval_interval", "patience",
                             "sample_tokens", "save_minutes", "memory_gb")
        if self.epochs < 0 and self.epochs != -1:
            out.append(f"epochs must not be negative (except -1, the default), got {self.epochs}")
        if not self.epochs and not self.max_steps and not self.train_minutes:
            out.append("the run has no end: set epochs or max_steps (max_minutes only stops a session)")
        if self.micro_batch_size > 0 and self.batch_size % self.micro_batch_size:
            out.append(f"micro_batch_size={self.micro_batch_size} does not divide "
                       f"batch_size={self.batch_size}")
        return out

    def differences(self, saved: dict, free: set[str] | None = None) -> list[str]:
        free = self.may_change() if free is None else free
        return super().differences(saved, free | {"epochs"} if self.epochs < 0 else free)


@dataclass
class Plan:
    world: int
    micro: int  # sequences per forward pass
    accumulation: int  # forward passes per step and process
    per_epoch: int  # training windows per epoch; 0 = unknown
    steps: int  # optimiser steps of the whole run; 0 = as many as fit into its time, not measured yet
    dtype: str = "fp32"
    compiled: bool = False
    flops_per_token: float = 0.0
    run_flops: float = 0.0
    peak_flops: float = 0.0  # of all devices together; 0 = unknown
    fitting: int = 0  # steps that fit into train_minutes; 0 = no length by time
    step_seconds: float = 0.0  # as just measured for that
    notes: list[str] = field(default_factory=list)  # lines to print

    def evaluates(self, step: int, cfg) -> bool:
        """Whether an evaluation follows this step, counted from 1."""
        if step == self.steps or cfg.eval_interval:
            return step == self.steps or step % cfg.eval_interval == 0
        return step * cfg.batch_size // self.per_epoch > (step - 1) * cfg.batch_size // self.per_epoch

    def samples(self, step: int, rank: int) -> list[int]:
        """The first training sample of each of this process's micro-batches."""
        first = (step * self.world + rank) * self.accumulation * self.micro
        return [first + i * self.micro for i in range(self.accumulation)]

    def speed_text(self, cfg, speed: float, device) -> str:
        """From steps per second: tokens/s, MFU if the device's peak is known, and peak memory."""
        tokens = speed * cfg.batch_size * cfg.max_seq_len
        mfu = f", MFU {self.flops_per_token * tokens / self.peak_flops:.0%}" if self.peak_flops else ""
        return f"{tokens:,.0f} tok/s{mfu}, {distributed.peak_memory(device):.2f} GB"


def make_plan(cfg, world: int, per_epoch: int, micro: int, steps: int = 0) -> Plan:
    """`steps`: how many fit into the length by time; 0 = it is not known or not asked for."""
    if cfg.batch_size % (micro * world):
        fits = math.ceil(cfg.batch_size / (micro * world)) * micro * world
        raise UserError(f"batch_size={cfg.batch_size} does not split into {world} processes x "
                        f"micro_batch_size={micro}; use --batch_size={fits}")
    epochs = cfg.epochs if cfg.epochs >= 0 else 0 if cfg.max_steps or cfg.train_minutes else 1
    ends = [max(1, math.ceil(epochs * per_epoch / cfg.batch_size))] if epochs else []
    ends += [n for n in (cfg.max_steps, steps) if n]
    return Plan(world, micro, cfg.batch_size // (micro * world), per_epoch, min(ends, default=0))


def choose_micro_batch(cfg, needs: fit.Needs, dist, room: float, began: int) -> tuple[int, str]:
    """(sequences per forward pass, a line to print if the run `began` with another number; 0 = a new run). It
    is kept while it fits: with another one dropout draws other masks, and sums round differently."""
    splits = began and cfg.batch_size % (began * dist.world) == 0
    if not cfg.micro_batch_size and splits and dist.min(needs.peak(began, dist.world) <= room):
        return began, ""
    micro = cfg.micro_batch_size or fit.largest_micro_batch(needs, dist, room)
    if began in (0, micro):
        return micro, ""
    why = "as asked" if cfg.micro_batch_size else \
        f"{began} no longer fit" if splits else f"{began} do not divide among {dist.world} processes"
    drawn = ["dropout draws other masks"] * bool(cfg.dropout) + ["head_samples other tokens"] * bool(
        cfg.head_samples)
    effect = f"{', '.join(drawn)} from here on" if drawn else "losses agree only up to rounding"
    return micro, f"note        micro-batch {began} at the start of the run, now {micro}: {why}; {effect}"
