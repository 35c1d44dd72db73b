"""Timing side by side: each arm in a process of its own, in turns, with ratios taken within a round, so that
a machine that drifts hits all alike. `cfg` has a device and a number of rounds."""
import math
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from common import distributed

import torch
from tqdm import tqdm

SPAWN = multiprocessing.get_context("spawn")  # a forked process would start with this one's peak memory

# ------------------------------------------------------------------------------------------------------------
# In an arm's process


class Runner(NamedTuple):
    measure: Callable[[], float]  # one round, in `unit`
    unit: str = "tok/s"
    note: str = ""  # how it came to run
    dtype: str = ""  # whose matmul rate is the limit
    flops: float = 0.0  # per token


def timed(work: Callable, times: int, device) -> float:
    """Seconds that so many calls take, with what they started on an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def warm_up(step: Callable, device, steps: int) -> int:
    """Runs at least three steps, until one is not much slower than the fastest so far; returns how many make
    a round."""
    times = []
    while len(times) < 3 or times[-1] > 1.2 * min(times) and len(times) < 8:
        times.append(timed(step, 1, device))
    return steps or max(1, round(1 / min(times)))


# ------------------------------------------------------------------------------------------------------------
# Arms: who runs, and the race


class Arm(NamedTuple):
    label: str
    make: Callable[..., Runner]
    shape: NamedTuple
    options: dict = {}


@dataclass
class Row:
    """One line of the table. What was not measured stays None."""
    shape: str
    arm: str
    unit: str = ""
    dtype: str = ""
    flops_per_token: float = 0.0  # 0 = not counted
    values: list[float] = field(default_factory=list)  # one per round, in `unit`
    peak_gb: float | None = None
    of_limit: float | None = None  # share of the matmul rate in this dtype
    speed_ratio: tuple[float, ...] | None = None  # tokens/s of the shape's first arm over this one's
    memory_ratio: float | None = None  # peak memory of the shape's first arm over this one's
    error: str = ""


def child(pipe, cfg, arm: Arm, folder: str) -> None:
    """An arm's process: at the first message make its Runner and say what it is, at each further one run a
    round. It ends with the pipe, so when the parent does, however that ends. Errors are sent as text."""
    sys.stdout = open(os.devnull, "w")  # the table is the parent's
    try:
        pipe.recv()
        runner = arm.make(cfg, arm.shape, folder, **arm.options)
        pipe.send(runner._replace(measure=None))
        while True:
            pipe.recv()
            pipe.send((runner.measure(), distributed.peak_memory(distributed.pick_device(cfg.device))))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception:
        pipe.send(traceback.format_exc())


def race(name: str, arms: list[Arm], cfg, folder: str, bar: tqdm) -> list[Row]:
    rows, pipes, processes = [Row(name, arm.label) for arm in arms], [], []
    for arm in arms:  # all import torch at once; nothing is timed yet
        pipe, theirs = SPAWN.Pipe()
        pipes.append(pipe)
        processes.append(SPAWN.Process(target=child, args=(theirs, cfg, arm, folder), daemon=True))
        processes[-1].start()
        theirs.close()  # else its death would not end the pipe

    def ask(row: Row, pipe):
        bar.set_description_str(f"{name}, {row.arm}")
        bar.update()
        if row.error:
            return None
        try:
            pipe.send(None)
            answer = pipe.recv()
        except (EOFError, OSError):
            answer = "its process died; out of memory?"
        if isinstance(answer, str):
            print(f"{name}, {row.arm} failed: {answer}", file=sys.stderr)
            row.error = answer.strip().splitlines()[-1]
            return None
        return answer

    for row, pipe in zip(rows, pipes, strict=True):
        if made := ask(row, pipe):
            row.arm += f": {made.note}" if made.note else ""
            row.unit, row.dtype, row.flops_per_token = made.unit, made.dtype, made.flops
    for i in range(cfg.rounds):
        for row, pipe in list(zip(rows, pipes, strict=True))[::-1 if i % 2 else 1]:
            if measured := ask(row, pipe):
                row.values.append(measured[0])
                row.peak_gb = measured[1] if row.unit == "tok/s" else None
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.close()
        process.join()  # its memory is the next shape's
    return rows


# ------------------------------------------------------------------------------------------------------------
# The table


def compare(rows: list[Row], limits: dict) -> None:
    """Fill in what follows from the measured values."""
    first = rows[0]
    for row in rows:
        if row.unit != "tok/s" or row.error:
            continue
        row.flops_per_token = row.flops_per_token or first.flops_per_token  # a peer's model has the same size
        if row.flops_per_token and row.dtype in limits:
            flops = row.flops_per_token * statistics.median(row.values)
            row.of_limit = flops / (limits[row.dtype] * 1e9)
        if row is not first and not first.error:
            ratios = [a / b for a, b in zip(first.values, row.values, strict=True)]
            row.speed_ratio = min(ratios), statistics.median(ratios), max(ratios)
            row.memory_ratio = first.peak_gb / row.peak_gb


HEAD = ("shape", "", "median", "of limit", "peak", "first / this: speed", "memory")


def cells(row: Row) -> tuple[str, ...]:
    median = statistics.median(row.values) if row.values else math.nan
    value = f"{median:,.0f} tok/s" if row.unit == "tok/s" else f"{median:.2f} {row.unit}"
    return (row.shape, row.arm, "failed" if row.error else value,
            f"{row.of_limit:.1%}" if row.of_limit else "n/a",
            f"{row.peak_gb:.2f} GB" if row.peak_gb else "n/a",
            "{:.2f}-{:.2f}-{:.2f}x".format(*row.speed_ratio) if row.speed_ratio else "",
            f"{row.memory_ratio:.2f}x" if row.memory_ratio else "")


def aligned(row: tuple[str, ...]) -> str:
    return "{:<8}  {:<31} {:>16} {:>9} {:>9} {:>20} {:>7}".format(*row).rstrip()
