"""What a run leaves behind: metrics.jsonl, samples.txt, loss.png, one line in the ledger, and a lock while it
runs."""
import fcntl
import json
import os
import subprocess
import sys

from common.checkpoint import write_atomically
from common.config import UserError


class RunLog:
    """The folder of one run. Only the main process makes one."""

    def __init__(self, folder: str):
        os.makedirs(folder, exist_ok=True)
        self.folder = folder
        self.lock = open(os.path.join(folder, "lock"), "w")  # freed by the system however the process ends
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is training in {folder}; "
                            "wait for it, or use another --name") from None

    def close(self) -> None:
        self.lock.close()

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def begin(self, step: int | None, evaluated: int = 0) -> None:
        """Continue at `step`, last evaluated at step `evaluated`: drop the rows after these, which a killed
        run logged and will now repeat. None: a new run, so whatever an earlier one left is removed."""
        if step is None:
            for name in ("last.pt", "best.pt", "int8.pt", "metrics.jsonl", "samples.txt", "loss.png"):
                if os.path.exists(self.path(name)):
                    os.remove(self.path(name))
            return
        rows = [r for r in read_jsonl(self.path("metrics.jsonl"))
                if r["step"] <= (evaluated if "val_loss" in r else step)]
        text = "".join(json.dumps(r) + "\n" for r in rows)
        write_atomically(self.path("metrics.jsonl"), lambda f: f.write(text.encode()))

    def metrics(self, **row) -> None:
        append_line(self.path("metrics.jsonl"), json.dumps(row))

    def ledger(self, row: dict) -> None:
        """Append the run's line to ledger.jsonl beside the run folders, once per run id."""
        path, known = os.path.join(os.path.dirname(self.folder), "ledger.jsonl"), ""
        if os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                known = f.read()
        if f'"run_id": "{row["run_id"]}"' not in known:
            append_line(path, json.dumps(row))

    def draw(self, title: str) -> None:
        """samples.txt, and loss.png: training loss (each logged step and smoothed) and validation loss
        against tokens seen. Both are made anew from metrics.jsonl each time."""
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from matplotlib.ticker import EngFormatter
        rows = read_jsonl(self.path("metrics.jsonl"))
        train = [(r["tokens"], r["train_loss"]) for r in rows if "train_loss" in r]
        val = [(r["tokens"], r["val_loss"]) for r in rows if "val_loss" in r]
        samples = [f"=== step {r['step']:,}, validation loss {r['val_loss']:.4f}\n"
                   + "".join(f"{prompt}|{text}\n" for prompt, text in r["samples"].items())
                   for r in rows if r.get("samples")]
        write_atomically(self.path("samples.txt"), lambda f: f.write("\n".join(samples).encode()))
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        if train:
            tokens, losses = zip(*train, strict=True)
            half = len(losses) // 40  # the mean of the 5 % of points around each
            windows = [losses[max(0, i - half):i + half + 1] for i in range(len(losses))]
            smooth = [sum(w) / len(w) for w in windows]
            axes.plot(tokens, losses, color="C0", alpha=0.25, linewidth=0.8)
            axes.plot(tokens, smooth, color="C0", label="train")
        if val:
            tokens, losses = zip(*val, strict=True)
            label = f"validation (best {min(losses):.3f})"
            axes.plot(tokens, losses, "o-", color="C1", markersize=3, label=label)
        axes.set(xlabel="tokens seen", ylabel="loss, nats per token", title=title)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1.5M, not 1.5 and a lonely 1e6
        axes.grid(alpha=0.3)
        if train or val:
            axes.legend()
        figure.savefig(self.path("loss.png.tmp"), format="png", dpi=120)
        plt.close(figure)
        os.replace(self.path("loss.png.tmp"), self.path("loss.png"))


def append_line(path: str, line: str) -> None:
    with open(path, "ab+") as f:
        if f.tell():
            f.seek(-1, os.SEEK_END)
            line = line if f.read(1) == b"\n" else "\n" + line  # after a line that a kill cut short
        f.write((line + "\n").encode())


def read_jsonl(path: str) -> list[dict]:
    """The rows of a .jsonl file ([] if it is not there). A last line cut short by a kill is left out."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as f:
        lines = f.read().split("\n")
    rows = []
    for i, line in enumerate(lines):
        try:
            rows += [json.loads(line)] if line else []
        except ValueError:
            if i < len(lines) - 1:
                raise UserError(f"{path}:{i + 1} is not JSON: {line[:60]!r}; "
                                "mend or remove that line") from None
    return rows


def git_commit() -> str:
    """The commit of the code that ran, with '+' if it was edited; '' outside a repository."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        run = [subprocess.run(["git", "-C", here, *c], capture_output=True, text=True, timeout=10)
               for c in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))]
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run[0].stdout.strip() + "+" * bool(run[1].stdout.strip()) if run[0].returncode == 0 else ""


def say(text: str) -> None:
    """Print a line without breaking a progress bar."""
    from tqdm import tqdm
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
