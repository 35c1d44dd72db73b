"""Terminal output: lines that do not break a progress bar, a bar over steps, the command to type next."""
import os
import shlex
import sys
import time

from tqdm import tqdm


def say(text: str) -> None:
    """Print a line without breaking a progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class StepBar(tqdm):
    """Progress over a run's optimiser steps: a bar in a terminal, one line a minute in a log file."""

    def __init__(self, done: int, total: int, shown: bool):
        self.done, self.steps, self.said_at = done, total, time.monotonic()
        self.speed = 0.0  # steps per second, smoothed
        self.lines = shown and not sys.stderr.isatty()
        super().__init__(total=total, initial=done, unit="step", dynamic_ncols=True,
                         disable=not shown or self.lines)

    def tick(self, seconds: float) -> None:
        """One more step is done, in `seconds`."""
        self.done += 1
        self.speed = 0.9 * self.speed + 0.1 / seconds if self.speed else 1 / seconds
        self.update()

    def show(self, text: str) -> None:
        self.set_postfix_str(text, refresh=False)
        if self.lines and time.monotonic() - self.said_at > 60:
            left = (self.steps - self.done) / self.speed / 60
            say(f"step {self.done:>7,}  {text}, {left:.0f} minutes left")
            self.said_at = time.monotonic()


def resume_command() -> str:
    """The command that was typed, without --overwrite; with several machines, the one to type on each."""
    args = [a for a in sys.argv if not a.startswith("--overwrite")]
    local, nodes = os.environ.get("LOCAL_WORLD_SIZE"), int(os.environ.get("GROUP_WORLD_SIZE", 1))
    if not local:
        return shlex.join(["python", *args])
    where = ["--standalone"] if nodes == 1 else [f"--nnodes={nodes}", "--rdzv_endpoint=HOST:PORT"]
    return shlex.join(["torchrun", *where, f"--nproc_per_node={local}", *args])
