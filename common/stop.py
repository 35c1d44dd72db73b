"""Stopping without losing work."""
import signal


class StopRequest:
    """SIGTERM and Ctrl-C ask the loop to finish its step, save and exit; a second Ctrl-C exits at once."""

    requested = False

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
