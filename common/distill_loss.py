"""Losses of distillation, through both heads chunk by chunk (common/head_loss.py): logits of the whole batch
never exist, neither the student's nor the teachers'.

    loss, soft, hard = two_headed_loss(hidden, head.weight, head.bias, targets, teachers, Mix("forward_kl"))

Divergences between a token's distributions p = softmax(teacher's logits / T) and q = softmax(student's / T):
    forward_kl  KL(p || q): Hinton et al. 1503.02531; q covers all that p does
    reverse_kl  KL(q || p): MiniLLM 2306.08543; q stays where p is
    jsd         beta KL(p || M) + (1 - beta) KL(q || M), M = beta p + (1 - beta) q: GKD 2306.13649
    skew_kl     KL(p || skew p + (1 - skew) q): DistiLLM 2402.03898
    tv          total variation, sum |p - q| / 2
Each is multiplied by T^2, which keeps the size of its gradient about the same at any temperature T.

Shapes: N tokens, R tokens of a slice, C width, V vocabulary, K cached probabilities of a token
"""
import math
from functools import partial
from typing import NamedTuple

from common.head_loss import chunked_loss
from common.layers import not_compiled

import torch

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "tv")


class Mix(NamedTuple):
    """What is trained on: alpha * T^2 * D_T(teacher, student) + (1 - alpha) * cross-entropy."""
    divergence: str = "forward_kl"
    alpha: float = 1.0  # in [0, 1]
    temperature: float = 1.0
    beta: float = 0.5  # of jsd, in (0, 1)
    skew: float = 0.1  # of skew_kl, in [0, 1)


def two_headed_loss(x, weight, bias, targets, teachers, mix: Mix):
    """[loss, soft, hard] (3,) in float32: loss = alpha soft + (1 - alpha) hard is differentiable in x, weight
    and bias; soft = T^2 D and hard, the cross-entropy at temperature 1, are for the log. In nats (tv: a
    probability), means over the targets that count (-1 does not); 0 if none counts.

    x (N, C), weight (V, C), bias (V,) or None: the student's; targets (N,). teachers: their (hidden (N, C'),
    weight (V or more, C'), bias or None), without gradients; their probabilities are averaged. Without
    teachers soft is 0. Matmuls run in autocast's dtype, or else x's, the rest in float32."""
    V, (x, targets, *hidden) = weight.size(0), drop_masked(targets, x, targets, *(h for h, _, _ in teachers))
    others = [(h, w[:V], None if b is None else b[:V])
              for h, (_, w, b) in zip(hidden, teachers, strict=True)]
    return mean(x, weight, bias, partial(two_headed_rows, mix), targets, others=others)


def cached_loss(x, weight, bias, targets, cached, mix: Mix):
    """The same from a teacher's cached probabilities; only forward_kl.

    cached: ids (N, K) int64, probs (N, K) float32, tail (N,) float32 or None, entropy (N,) float32.
    Without a tail, KL = sum_k probs_k (-log q[ids_k]) - entropy. ids may repeat: n ids sampled from p have
    probs 1/n each, and with p's entropy that is an unbiased estimate of KL(p || q).
    With one, the ids beyond the K (which must differ) are one more class, of the teacher's mass `tail`:
    KL = sum_k probs_k log(probs_k / q[ids_k]) + tail log(tail / q's mass outside ids); entropy is not used.
    A temperature other than 1 needs probs and entropy of that temperature, and no tail."""
    ids, probs, tail, entropy = cached
    if mix.divergence != "forward_kl" or tail is not None and mix.temperature != 1:
        raise ValueError("cached probabilities give forward_kl only, with a tail at temperature 1 only; got "
                         f"{mix.divergence}, temperature {mix.temperature}")
    if tail is not None:
        tail = tail if ids.size(1) < weight.size(0) else torch.zeros_like(tail)  # no id is left for it
        entropy = -torch.xlogy(probs, probs).sum(dim=-1) - torch.xlogy(tail, tail)  # (N,)
    given = (targets, ids, probs, entropy, *(() if tail is None else (tail,)))
    x, *given = drop_masked(targets, x, *given)
    return mean(x, weight, bias, partial(cached_rows, mix), *given)


@not_compiled  # the number of rows depends on the data
def drop_masked(targets, *tensors) -> list:
    """The rows of the tensors (N, ...) whose target counts; no copy if all do."""
    counts = targets >= 0
    if counts.all():
        return list(tensors)
    rows = counts.nonzero()[:, 0]
    return [t.index_select(0, rows) for t in tensors]


def mean(x, weight, bias, row_loss, *row_args, others=()):
    ones = torch.ones(len(x), device=x.device)
    total = chunked_loss(x, weight, bias, ones, row_loss, *row_args, others=others, logged=2) / max(1, len(x))
    return torch.cat((total[:1], total[1:].detach()))


# ------------------------------------------------------------------------------------------------------------
# Row losses: (R, 3) of a slice's logits (R, V), which `grad` overwrites with the loss's gradient


def two_headed_rows(mix: Mix, logits, targets, *teachers, grad: bool):
    z = logits.float()  # (R, V)
    soft, d_soft, log_q = z.new_zeros(len(z)), None, None
    if teachers:
        log_q, log_p = log_softmax(z, mix.temperature), mixture(teachers, mix.temperature)  # (R, V) each
        soft, d_soft = divergence(mix, log_p, log_q, grad and mix.alpha != 0)
    return mixed(mix, logits, z, targets, soft, d_soft, log_q, grad)


def cached_rows(mix: Mix, logits, targets, ids, probs, entropy, tail=None, *, grad: bool):
    z = logits.float()  # (R, V)
    log_q = log_softmax(z, mix.temperature)  # (R, V)
    soft, mass = -(probs * log_q.gather(1, ids)).sum(dim=-1) - entropy, probs.sum(dim=-1)  # (R,) each
    if tail is not None:
        outside = log_q.scatter(1, ids, -math.inf)  # (R, V)
        log_tail = outside.logsumexp(dim=-1).clamp(min=-1e30)  # (R,): -inf if ids are all there are
        soft, mass = soft - tail * log_tail, mass + tail
    d_soft = None
    if grad and mix.alpha != 0:
        d_soft = log_q.exp() * mass[:, None]  # (R, V)
        if tail is not None:
            d_soft -= (outside - log_tail[:, None]).exp_() * tail[:, None]
        d_soft.scatter_add_(1, ids, -probs)
    return mixed(mix, logits, z, targets, mix.temperature ** 2 * soft, d_soft, log_q, grad)


def log_softmax(logits, temperature: float):
    scaled = logits if temperature == 1 else logits.float() / temperature
    return torch.log_softmax(scaled, dim=-1, dtype=torch.float32)


def mixture(teachers, temperature: float):
    """Logarithms (R, V) of the average of the teachers' probabilities."""
    first, *rest = (log_softmax(logits, temperature) for logits in teachers)
    for log_p in rest:
        first = torch.logaddexp(first, log_p)
    return first - math.log(len(teachers)) if rest else first


def divergence(mix: Mix, log_p, log_q, grad: bool):
    """T^2 D (R,) between the distributions, and (with grad, else None) D's gradient (R, V) with respect to
    the student's logits / T. All ratios are differences of logarithms, so that p or q may underflow.

    With w = q dD/dq, up to a constant times q, that gradient is w - q sum(w)."""
    q, kind = log_q.exp(), mix.divergence
    if kind == "forward_kl":
        p = log_p.exp()
        D, w = (p * (log_p - log_q)).sum(dim=-1), p.neg_()
    elif kind == "reverse_kl":
        w = q * (log_q - log_p)
        D = w.sum(dim=-1)
    elif kind == "jsd":
        beta = mix.beta
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        w = (1 - beta) * q * (log_q - log_m)
        D = (beta * log_p.exp() * (log_p - log_m) + w).sum(dim=-1)
    elif kind == "skew_kl":
        own = log_q + math.log(1 - mix.skew)  # the student's part of the mixture M
        log_m = torch.logaddexp(log_p + math.log(mix.skew), own) if mix.skew else own
        p = log_p.exp()
        D, w = (p * (log_p - log_m)).sum(dim=-1), -p * (own - log_m).exp()
    elif kind == "tv":
        difference = q - log_p.exp()
        # p and q that are equal but for rounding have no sign: a student that is the teacher stays so
        sign = difference.sign() * (difference.abs() > 1e-5 * q)
        D, w = difference.abs().sum(dim=-1) / 2, q * sign / 2
    else:
        raise ValueError(f"divergence: expected one of {', '.join(DIVERGENCES)}; got {kind!r}")
    d_logits = torch.addcmul(w, q, w.sum(dim=-1, keepdim=True), value=-1) if grad else None
    return mix.temperature ** 2 * D, d_logits


def mixed(mix: Mix, logits, z, targets, soft, d_soft, log_q, grad: bool):
    """[loss, soft, hard] (R, 3) from soft (R,) and its gradient. log_q (R, V), the logarithms of softmax(z /
    T), serves again if T is 1."""
    at = torch.arange(len(z), device=z.device), targets
    learns = grad and mix.alpha != 1
    if log_q is None or mix.temperature != 1:
        log_q = torch.log_softmax(z, dim=-1) if learns else None
    hard = torch.logsumexp(z, dim=-1) - z[at] if log_q is None else -log_q[at]  # (R,)
    if grad:
        total, factor = torch.zeros_like(z) if d_soft is None else d_soft, mix.alpha * mix.temperature
        total = total if factor == 1 else total.mul_(factor)
        if learns:
            d_hard = log_q.exp()
            d_hard[at] -= 1
            total.add_(d_hard, alpha=1 - mix.alpha)
        logits.copy_(total)
    return torch.stack((mix.alpha * soft + (1 - mix.alpha) * hard, soft, hard), dim=-1)
