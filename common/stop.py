"""Stopping without losing work."""
import math
import signal
import time


class StopRequest:
    """SIGTERM, Ctrl-C and the end of `minutes` ask the loop to finish its step, save and exit. A second
    Ctrl-C exits at once."""

    def __init__(self, minutes: float = 0.0):
        self.requested = False  # by a signal, which cuts evaluations short too
        self.deadline = time.perf_counter() + 60 * minutes if minutes else math.inf

    def __enter__(self):
        self.old = {s: signal.signal(s, self.handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def handle(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def agreed(self, dist) -> bool:
        """Whether any process wants to stop, so that all stop at the same step. A collective."""
        return dist.sum(float(self.requested or time.perf_counter() > self.deadline))[0] > 0
