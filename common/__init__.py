"""Plumbing that nobody should need to edit. Scripts import it before torch: until they are under way, which
takes seconds, Ctrl-C ends them with a line in place of a traceback through torch's import."""
import sys


def hook(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = hook
