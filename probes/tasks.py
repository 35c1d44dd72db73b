"""What the learners of optimizer_probe.py learn: digits, or real text."""
import math
from dataclasses import replace
from typing import NamedTuple

from common.config import UserError
from common.data import Windows, open_text
from common.distributed import Dist
from common.layers import Linear
from common.step import NotFinite, backward, choose_compile
from model import LM

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class Task(NamedTuple):
    """Batches are pure functions of (seed, learner, step)."""
    make: object  # (seed) -> the model at its start
    batch: object  # (seed, learner, step) -> inputs, targets
    tests: list  # of each learner: held-out inputs, targets
    tokenizer: dict | None = None
    sha256: str = ""


class MLP(nn.Module):
    """64 pixels -> 64 -> 64 -> 10 digits, called like LM."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Linear(n, m, std=math.sqrt(2 / n), group=group) for n, m, group in (
            (64, 64, "matrices"), (64, 64, "matrices"), (64, 10, "head"))])
        for layer in self.layers:
            nn.init.normal_(layer.weight, 0, layer.specs["weight"].start)
            nn.init.zeros_(layer.bias)

    def forward(self, x, targets=None, state=None):
        """x (B, 64) -> logits (B, 10), or with targets (B, 1) the mean loss; and the state, for LM's sake."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        logits = self.layers[-1](x)  # (B, 10)
        return (logits if targets is None else F.cross_entropy(logits, targets[:, 0])), state


def digits(cfg, device) -> Task:
    """scikit-learn's 1,797 images; 360 of them, the same for all seeds, are the test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("task=digits needs scikit-learn, which has the images:  pip install scikit-learn\n"
                        "or use --task=text, after  python prepare_data.py shakespeare") from None
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images / 8 - 1).float().to(device), torch.from_numpy(labels)[:, None].to(device)
    order = np.random.default_rng(0).permutation(len(labels))
    has = [np.isin(labels[order], np.arange(0, 5) if cfg.split == "classes" else labels),
           np.isin(labels[order], np.arange(5, 10) if cfg.split == "classes" else labels)]
    train, test = ([order[part][h[part]] for h in has] for part in (slice(360, None), slice(360)))

    def make(seed: int) -> MLP:
        torch.manual_seed(seed)
        return MLP().to(device)

    def batch(seed: int, who: int, step: int):
        rng = np.random.default_rng((seed, who, step))
        rows = train[who][rng.integers(0, len(train[who]), cfg.batch_size)]
        return x[rows], y[rows]  # (B, 64), (B, 1)

    return Task(make, batch, [(x[rows], y[rows]) for rows in test])


def text(cfg, device) -> Task:
    """A model by model.py's flags. The test is 64 windows, spread over the validation split."""
    text, T = open_text(cfg.data), cfg.max_seq_len
    n = min(64, (len(text.val) - 1) // T)
    if n < 1:
        raise UserError(f"{cfg.data} has {len(text.val):,} validation tokens, too few for max_seq_len={T}")
    starts = np.linspace(0, len(text.val) - T - 1, n).astype(int)
    rows = torch.from_numpy(text.val[starts[:, None] + np.arange(T + 1)].astype(np.int64)).to(device)
    windows = {}

    def make(seed: int) -> LM:
        torch.manual_seed(seed)
        return LM(cfg).to(device)

    def batch(seed: int, who: int, step: int):
        found = windows.setdefault(seed, windows.get(seed) or Windows(text.train, T, seed))
        return found.batch((2 * step + who) * cfg.batch_size, cfg.batch_size, device)  # (B, T) each

    return Task(make, batch, [(rows[:, :-1], rows[:, 1:])] * 2, text.meta["tokenizer"],
                text.meta["splits"]["train"]["sha256"])


TASKS = {"digits": digits, "text": text}


# ------------------------------------------------------------------------------------------------------------
# Gradients

UNSCALED = torch.amp.GradScaler("cpu", enabled=False)


def gradient_of(cfg, model, batch, dist: Dist, dtype: str) -> list:
    """Of the mean loss over a batch, clipped if asked; these are the parameters' grad, in new tensors."""
    model.zero_grad()
    loss = float(backward(model, [batch], dist, dtype, UNSCALED))
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip) if cfg.grad_clip else 0.0
    if not math.isfinite(loss + norm):
        raise NotFinite(f"loss {loss}, gradient norm {float(norm)}; not applied")
    return [p.grad for p in model.parameters()]


def prepared(cfg, model, dist: Dist):
    """The model, compiled in place where that pays; copies of it are not."""
    flops = model.flops_per_token(cfg.max_seq_len) * cfg.max_seq_len if cfg.task == "text" else 0
    if choose_compile(cfg.compile, 2 * cfg.steps * cfg.batch_size * flops, dist.device)[0]:
        model.compile()
    return model


def plain_sgd(cfg):
    """The config for muon.py, whose beta1 is SGD's momentum too."""
    return replace(cfg, beta1=cfg.momentum) if cfg.optimizer == "sgd" else cfg
