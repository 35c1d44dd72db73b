"""Facts in the context against facts in the weights."""


def handover(cfg, arms, labels, text, worlds, run, stop):
    raise NotImplementedError


def incontext(cfg, arms, labels, text, worlds, run, stop):
    raise NotImplementedError
