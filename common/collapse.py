"""Is what a model writes or predicts degenerate? Greedy text that repeats itself; predictions that are flat,
the same everywhere, or not the teacher's.

Shapes: B batch, T tokens, N counted tokens of a batch, R rows of a chunk, C width, V vocabulary, K teachers
"""
import math
from collections import Counter

from common import data
from common.distributed import Dist, autocast
from common.evaluate import LOGITS, measures

import torch
import torch.nn.functional as F


def text_measures(rows: list[list[int]]) -> dict[str, float]:
    """Of greedy continuations, over all rows together; nan without any token, bigram or 4-gram.

    modal_share: share of the most frequent token. Not row by row, so that it says whether the model writes
    one token whatever it reads; a row that repeats words of its own shows in repetition_4
    distinct_2: different bigrams over bigrams (1510.03055); it falls with the amount of text, so compare
    equal amounts
    repetition_4: share of 4-grams that occurred before in the same row"""
    tokens = Counter(token for row in rows for token in row)
    pairs, fours = ([grams(row, n) for row in rows] for n in (2, 4))
    n_pairs, n_fours = (sum(map(len, found)) for found in (pairs, fours))
    return {"modal_share": share(max(tokens.values(), default=0), sum(tokens.values())),
            "distinct_2": share(len(set().union(*pairs)), n_pairs),
            "repetition_4": share(n_fours - sum(len(set(row)) for row in fours), n_fours)}


def grams(row: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(row[i:i + n]) for i in range(len(row) - n + 1)]


def share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


@torch.inference_mode()
def compare(student, teachers: list, tokens, split_counts: dict, vocab_size: int, unigram, seq_len: int,
            batch_size: int, dist: Dist, dtype: str, temperature: float = 1.0, stop=None) -> dict | None:
    """The student's predictions q beside its teachers' p: means over all targets of a split, in nats; None if
    `stop` was requested halfway. As in evaluate(), batch_size and the number of processes change nothing.

    soft: T^2 KL(p || q), both at the temperature T (1503.02531); everything else is at 1
    agreement: share of targets where p and q have the same most probable token
    entropy, teacher_entropy: H(q), H(p)
    to_unigram: KL(q's mean over the targets || unigram), from the training text's counts (V,) plus one each;
    not with unigram=None
    loss, bits_per_byte, top1, and teacher_loss, teacher_bits_per_byte, teacher_top1: on the text

    Probabilities are over the first `vocab_size` ids, those that all models have; p is the teachers' mean.
    Without teachers only the student's own measures are returned."""
    models = [student, *teachers]
    training = [m.training for m in models]
    for m in models:
        m.eval()
    sums, count = torch.zeros(8, dtype=torch.float64), 0
    q_sum = torch.zeros(vocab_size, dtype=torch.float64)
    R = max(1, LOGITS // 8 // vocab_size)  # student, teacher, their softmaxes and temporaries at once
    for x, y in data.eval_batches(tokens, seq_len, batch_size, dist.rank, dist.world, dist.device):
        counted = (y >= 0).flatten()  # (B T,)
        with autocast(dtype, dist.device):
            hidden = [m.hidden(x).flatten(0, 1)[counted].split(R) for m in models]  # parts (R, C) of (N, C)
            for targets, *parts in zip(y.flatten()[counted].split(R), *hidden, strict=True):
                logits = [m.head(h)[:, :vocab_size].float() for m, h in zip(models, parts, strict=True)]
                found, q = row_sums(logits[0], logits[1:], targets, temperature)
                sums += found
                q_sum += q
        count += int(counted.sum())
        if stop and stop.requested:
            break
    for m, was in zip(models, training, strict=True):
        m.train(was)
    *sums, count, stopped = dist.sum(*sums.tolist(), count, float(bool(stop and stop.requested)))
    q_mean = dist.reduce(q_sum).cpu() / max(1, count)
    if stopped:
        return None
    nats, right, entropy, their_nats, their_right, their_entropy, soft, same = sums
    out = {**text_loss(nats, right, count, split_counts), "entropy": entropy / count}
    if unigram is not None:
        seen = torch.as_tensor(unigram).cpu().double() + 1  # (V,)
        log_unigram = torch.log(seen / seen.sum())
        out["to_unigram"] = (torch.xlogy(q_mean, q_mean) - q_mean * log_unigram).sum().item()
    if teachers:
        theirs = text_loss(their_nats, their_right, count, split_counts)
        out |= {"soft": soft / count, "agreement": same / count, "teacher_entropy": their_entropy / count,
                **{f"teacher_{name}": value for name, value in theirs.items()}}
    return out


def text_loss(nats: float, right: float, count: float, split: dict) -> dict[str, float]:
    found = measures(nats, right, count, split)
    return {name: found[name] for name in ("loss", "bits_per_byte", "top1")}


def row_sums(logits, theirs: list, targets, temperature: float):
    """Sums over the rows of a chunk, (8,), and of the student's probabilities, (V,), in float64 on the CPU.
    logits (R, V), the teachers' K x (R, V), targets (R,)."""
    log_q, soft, same = logits.log_softmax(-1), 0.0, 0  # (R, V)
    own, others = text_sums(log_q, targets), [0.0, 0, 0.0]
    if theirs:
        log_p = mean_log_softmax(theirs)  # (R, V)
        others, same = text_sums(log_p, targets), int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    q_sum = log_q.exp_().sum(dim=0).cpu().double()  # (V,)
    if theirs:
        if temperature != 1:
            log_p = mean_log_softmax([z / temperature for z in theirs])
        log_q = (logits / temperature).log_softmax(-1)
        soft = temperature**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
    return torch.tensor([*own, *others, soft, same], dtype=torch.float64), q_sum


def text_sums(log_p, targets) -> list[float]:
    """Over the rows of log-probabilities (R, V): nats of the targets (R,), correct predictions, entropies."""
    return [F.nll_loss(log_p, targets, reduction="sum").item(), int((log_p.argmax(-1) == targets).sum()),
            -(log_p.exp() * log_p).sum().item()]


def mean_log_softmax(logits: list):
    """log of the mean of K softmaxes: K x (R, V) -> (R, V)."""
    total = logits[0].log_softmax(-1)
    for z in logits[1:]:
        total = torch.logaddexp(total, z.log_softmax(-1))
    return total - math.log(len(logits)) if len(logits) > 1 else total
