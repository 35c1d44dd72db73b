"""Plumbing that nobody should need to edit. Scripts import it before torch, whose import takes seconds:
Ctrl-C then prints one line instead of a traceback."""
import sys


def hook(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = hook
