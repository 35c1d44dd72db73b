"""Markdown tables and figures."""
import io
import itertools

from common.files import write_atomically


def grid(lines: list[list[str]]) -> str:
    """A Markdown table: the first line is its header, the first column is left-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [[c.ljust(w) if c is line[0] else c.rjust(w) for c, w in zip(line, widths, strict=True)]
             for line in lines]
    lines.insert(1, ["-" * (w - 1) + (":" if i else "-") for i, w in enumerate(widths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def new_figure(width: float, height: float):
    from matplotlib.figure import Figure  # not pyplot: no state, no display; importing it takes a second
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path: str) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, lambda f: f.write(picture.getvalue()))


def draw_losses(rows: list[dict], title: str, path: str, others=()) -> None:
    """Training loss, raw and as a moving average, and validation loss against tokens seen; also on the texts
    named in `others`."""
    from matplotlib.ticker import EngFormatter
    axes = new_figure(7, 4.2).subplots()
    if train := [(r["tokens"], r["train_loss"]) for r in rows if "train_loss" in r]:
        tokens, losses = zip(*train, strict=True)
        axes.plot(tokens, losses, color="C0", alpha=0.25, linewidth=0.8)
        sums, half = [0.0, *itertools.accumulate(losses)], len(losses) // 40
        ends = [(max(0, i - half), min(len(losses), i + half + 1)) for i in range(len(losses))]
        axes.plot(tokens, [(sums[b] - sums[a]) / (b - a) for a, b in ends], color="C0", label="train")
    if val := [(r["tokens"], r["val_loss"]) for r in rows if "val_loss" in r]:
        tokens, losses = zip(*val, strict=True)
        label = f"validation (best {min(losses):.3f})"
        axes.plot(tokens, losses, "o-", color="C1", markersize=3, label=label)
    for i, name in enumerate(others):
        if old := [(r["tokens"], r[f"val_{name}_loss"]) for r in rows if f"val_{name}_loss" in r]:
            axes.plot(*zip(*old, strict=True), "o-", color=f"C{2 + i}", markersize=3,
                      label=f"{name} ({old[-1][1]:.3f} at the end)")
    axes.set(xlabel="tokens seen", ylabel="loss, nats per token", title=title)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1.5M, not 1.5 and a lonely 1e6
    axes.grid(alpha=0.3)
    if train or val:
        axes.legend()
    save_figure(axes.figure, path)
