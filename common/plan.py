"""How a run is divided into optimiser steps, processes and micro-batches."""
import math
from dataclasses import dataclass, field

from common import distributed, fit
from common.config import UserError


@dataclass
class Plan:
    world: int
    micro: int  # sequences per forward pass
    accumulation: int  # forward passes per step and process
    per_epoch: int  # training windows per epoch; 0 = unknown
    steps: int  # optimiser steps of the whole run
    dtype: str = "fp32"
    compiled: bool = False
    flops_per_token: float = 0.0
    run_flops: float = 0.0
    peak_flops: float = 0.0  # of all devices together; 0 = unknown
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


def make_plan(cfg, world: int, per_epoch: int, micro: int) -> Plan:
    if cfg.batch_size % (micro * world):
        fits = math.ceil(cfg.batch_size / (micro * world)) * micro * world
        raise UserError(f"batch_size={cfg.batch_size} does not split into {world} processes x "
                        f"micro_batch_size={micro}; use --batch_size={fits}")
    epochs = cfg.epochs if cfg.epochs >= 0 else 0 if cfg.max_steps else 1
    ends = [max(1, math.ceil(epochs * per_epoch / cfg.batch_size))] if epochs else []
    ends += [cfg.max_steps] if cfg.max_steps else []
    return Plan(world, micro, cfg.batch_size // (micro * world), per_epoch, min(ends))


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
    effect = "dropout draws other masks from here on" if cfg.dropout else "losses agree only up to rounding"
    return micro, f"note        micro-batch {began} at the start of the run, now {micro}: {why}; {effect}"
