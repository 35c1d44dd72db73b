"""What bench.py measures of decoding at length: its points, their slope, table and plot."""
from dataclasses import dataclass

from common.tables import new_figure, save_figure

import numpy as np
import torch


@dataclass
class Point:
    """One model after `length` tokens, in its own process; after a failure only `error` is filled in."""
    shape: str
    arm: str
    length: int
    parameters: int = 0
    state_bytes: int = 0  # of all buffers of the decoding state, full or not
    peak_gb: float = 0.0  # of the process
    grown_gb: float = 0.0  # of that peak, what came after the warm-up
    ms_per_token: float = 0.0  # median
    slope: float | None = None  # of log(state_bytes) against log(length), fitted over the arm's lengths
    error: str = ""


def state_bytes(state) -> int:
    parts = [part for layer in state.layers for value in vars(layer).values()
             for part in (value if isinstance(value, tuple) else (value,)) if torch.is_tensor(part)]
    return sum({part.data_ptr(): part.untyped_storage().nbytes() for part in parts}.values())


def fit_slope(points: list[Point]) -> None:
    good = [p for p in points if not p.error]
    if len({p.length for p in good}) > 1:
        slope = np.polyfit(np.log([p.length for p in good]), np.log([p.state_bytes for p in good]), 1)[0]
        for p in good:
            p.slope = round(float(slope), 3) + 0.0  # not -0.0


def decoding_table(points: list[Point]) -> str:
    row = "{:<8}  {:<24} {:>10} {:>9} {:>14} {:>9} {:>10} {:>11} {:>6}"
    lines = [row.format("decoding", "", "parameters", "tokens", "state", "peak", "grown by", "per token",
                        "slope")]
    for p in points:
        values = ("failed", "", "", "", "") if p.error else (
            f"{p.state_bytes:,} B", f"{1000 * p.peak_gb:.0f} MB", f"{1000 * p.grown_gb:.1f} MB",
            f"{p.ms_per_token:.2f} ms", "n/a" if p.slope is None else f"{p.slope:.2f}")
        lines.append(row.format(p.shape, p.arm, f"{p.parameters:,}", f"{p.length:,}", *values).rstrip())
    return "\n".join(lines)


def draw_decoding(points: list[Point], path: str) -> None:
    """Memory (solid: the state; dashed: the process's peak) and ms per token against length."""
    figure = new_figure(10, 4.2)
    memory, speed = figure.subplots(1, 2)
    for i, arm in enumerate(dict.fromkeys(p.arm for p in points)):
        mine = [p for p in points if p.arm == arm and not p.error]
        lengths, style = [p.length for p in mine], {"color": f"C{i}", "marker": "o", "markersize": 4}
        memory.plot(lengths, [p.state_bytes / 1e6 for p in mine], label=arm, **style)
        memory.plot(lengths, [1000 * p.peak_gb for p in mine], linestyle="--", **style)
        speed.plot(lengths, [p.ms_per_token for p in mine], label=arm, **style)
    for axes, label in ((memory, "MB: state; dashed: peak of the process"), (speed, "ms per token")):
        axes.set(xscale="log", yscale="log", xlabel="tokens read", ylabel=label)
        axes.grid(alpha=0.3)
    speed.legend(fontsize=8)
    save_figure(figure, path)
