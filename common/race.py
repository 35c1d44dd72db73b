"""Side-by-side timing: each arm in its own process, in turns, with ratios taken within a round, so that drift
of the machine affects all arms alike. `cfg` needs `device` and `rounds`."""
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
from common.run import git_commit

import torch
from tqdm import tqdm

SPAWN = multiprocessing.get_context("spawn")  # a forked process would inherit this one's peak memory


class Runner(NamedTuple):
    measure: Callable[[], float]  # runs one round; returns its value in `unit`
    unit: str = "tok/s"
    note: str = ""  # dtype and compilation, shown after the label
    dtype: str = ""  # the limit is the rate of matmuls in this dtype
    flops: float = 0.0  # per token
    peak: Callable[[], float] | None = None  # GB, if not of the arm's own process


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
    speed_ratio: tuple[float, ...] | None = None  # first arm's tokens/s over this one's: min, median, max
    memory_ratio: float | None = None  # first arm's peak memory over this one's
    error: str = ""


def timed(work: Callable, times: int, device) -> float:
    """Seconds for `times` calls, including the work they start on an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def measure_machine(device: str) -> dict:
    """What this machine is, and the best rate in half a second of each: large square matmuls in GFLOP/s, a
    copy in GB/s (each byte counted once)."""
    device, limits = distributed.setup(device).device, {}

    def best(work) -> float:
        times, end = [timed(work, 1, device) for _ in range(2)], time.perf_counter() + 0.5
        while time.perf_counter() < end:
            times.append(timed(work, 1, device))
        return min(times)

    for name in ("fp32", "bf16") + ("fp16",) * (device.type == "cuda"):
        limits[name] = 0.0
        for n in (256, 1024, 2048, 8192):
            if limits[name] and 2 * n**3 / limits[name] / 1e9 > 0.25:  # too slow: bf16 may be emulated
                break
            a = torch.randn(n, n, device=device).to(distributed.DTYPES[name])
            limits[name] = max(limits[name], 2 * n**3 / best(lambda a=a: a @ a) / 1e9)
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    limits["copy"] = 4 * source.numel() / best(lambda: target.copy_(source)) / 1e9
    return {"device": device.type, "name": distributed.device_name(device), "limits": limits,
            "dtype": distributed.choose_dtype("auto", device)[0], "torch": torch.__version__,
            "python": sys.version.split()[0], "commit": git_commit()}


def warm_up(step: Callable, device, steps: int) -> int:
    """Run 3 to 8 steps, until one takes at most 1.2 times as long as the fastest. Returns the number of steps
    in a round: `steps`, or about a second's worth for 0."""
    times = []
    while len(times) < 3 or times[-1] > 1.2 * min(times) and len(times) < 8:
        times.append(timed(step, 1, device))
    return steps or max(1, round(1 / min(times)))


def child(pipe, cfg, arm: Arm, folder: str) -> None:
    """An arm's process. On the first message it builds its Runner and describes it, on each later one it runs
    a round. It ends when the pipe closes, so also when the parent is killed. Errors are sent as text."""
    sys.stdout = open(os.devnull, "w")  # only the parent prints
    try:
        pipe.recv()
        runner = arm.make(cfg, arm.shape, folder, **arm.options)
        pipe.send(runner._replace(measure=None, peak=None))
        while True:
            pipe.recv()
            value, own = runner.measure(), distributed.peak_memory(distributed.pick_device(cfg.device))
            pipe.send((value, runner.peak() if runner.peak else own))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception:
        pipe.send(traceback.format_exc())


def race(name: str, arms: list[Arm], cfg, folder: str, bar: tqdm) -> list[Row]:
    racers = []
    for arm in arms:  # all import torch at once; nothing is timed yet
        pipe, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=child, args=(theirs, cfg, arm, folder), daemon=True)
        process.start()
        theirs.close()  # or the pipe would stay open after the child's death
        racers.append((Row(name, arm.label), pipe, process))
    for i in range(cfg.rounds + 1):  # round 0 builds the Runners
        for row, pipe, _ in racers[::-1 if i and i % 2 == 0 else 1]:
            bar.set_description_str(f"{name}, {row.arm}")
            bar.update()
            if row.error:
                continue
            try:
                pipe.send(None)
                answer = pipe.recv()
            except (EOFError, OSError):
                answer = "its process died; out of memory?"
            if isinstance(answer, str):
                print(f"{name}, {row.arm} failed: {answer}", file=sys.stderr)
                row.error = answer.strip().splitlines()[-1]
            elif isinstance(answer, Runner):
                row.arm += f": {answer.note}" if answer.note else ""
                row.unit, row.dtype, row.flops_per_token = answer.unit, answer.dtype, answer.flops
            else:
                row.values.append(answer[0])
                row.peak_gb = answer[1] if row.unit.endswith("/s") else None
    for _, pipe, process in racers:
        pipe.close()
        process.join()  # frees its memory before the next shape
    return [row for row, _, _ in racers]


def compare(rows: list[Row], limits: dict) -> None:
    """Fill in the shares of the limits and the ratios to the first row."""
    first = rows[0]
    for row in rows:
        if not row.unit.endswith("/s") or row.error:
            continue
        row.flops_per_token = row.flops_per_token or first.flops_per_token  # peers' models have the same size
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
