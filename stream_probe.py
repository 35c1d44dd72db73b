"""Memory of running text: sentences in a rolling window, and what retraining a stretch leaves around it."""


def window(cfg, arms, labels, text, worlds, run, stop):
    raise NotImplementedError


def trace(cfg, arms, labels, text, worlds, run, stop):
    raise NotImplementedError
