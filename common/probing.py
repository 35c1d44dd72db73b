"""What a model says to probes (common/facts.py): log-probabilities of whole targets, all of them in a few
forward passes. No sampling: the log-probability is the measurement, greedy hits follow from it.

Shapes: N probes of a batch, T tokens, M target tokens of a batch, V vocabulary, A answers
"""
from typing import NamedTuple

from common.distributed import autocast
from common.facts import Probe

import numpy as np
import torch

TOKENS = 2**12  # per forward pass


class Batch(NamedTuple):
    tokens: torch.Tensor  # (N, T), padded on the right
    rows: torch.Tensor  # (M,) the probe of each target token
    places: torch.Tensor  # (M,) where it is predicted
    targets: torch.Tensor  # (M,)
    first: torch.Tensor  # (N,) the index in M of each probe's first target token
    order: np.ndarray  # (N,) which of all probes these are


class Scores(NamedTuple):
    """One value per probe."""
    logp: np.ndarray  # log p of the whole target, nats
    hit: np.ndarray  # every target token is the most probable one: greedy decoding would say it
    rank: np.ndarray  # of the target's first token among the answers A; 0 = the most probable
    guess: np.ndarray  # the most probable answer, an index in A
    confidence: np.ndarray  # the largest probability over all tokens
    answers: np.ndarray  # (N, A) log p of every answer as the target's first token


def batches(probes: list[Probe], pad: int, device) -> list[Batch]:
    """Batches of probes of similar lengths."""
    order, out = sorted(range(len(probes)), key=lambda i: len(probes[i].prompt) + len(probes[i].target)), []
    while order:
        longest, n = 0, 0
        while n < len(order) and (n + 1) * max(longest,
                                               size := sum(map(len, probes[order[n]][2:]))) <= TOKENS:
            longest, n = max(longest, size), n + 1
        some, order = order[:max(n, 1)], order[max(n, 1):]
        rows, places, targets, first = [], [], [], []
        tokens = np.full((len(some), max(sum(map(len, probes[i][2:])) for i in some)), pad)
        for row, i in enumerate(some):
            prompt, target = probes[i][2:]
            tokens[row, :len(prompt) + len(target)] = prompt + target
            first.append(len(rows))
            rows += [row] * len(target)
            places += range(len(prompt) - 1, len(prompt) - 1 + len(target))
            targets += target
        out.append(Batch(*(torch.as_tensor(x, device=device) for x in (tokens, rows, places, targets, first)),
                         np.array(some)))
    return out


@torch.inference_mode()
def score(model, prepared: list[Batch], answer_ids: list[int], dtype: str = "fp32") -> Scores:
    """Scores of all probes, in their order, in eval mode. The trunk runs in `dtype`, the head, where it is
    asked, in fp32."""
    training = model.training
    model.eval()
    found, every, order = [], [], np.concatenate([b.order for b in prepared])
    for tokens, rows, places, targets, first, _ in prepared:
        with autocast(dtype, tokens.device):
            hidden = model.hidden(tokens)[rows, places].float()  # (M, C)
        logits = model.head(hidden[None])[0, :, :model.n_tokens]  # (M, V), padding rows left out
        total, best = logits.logsumexp(dim=-1), logits.max(dim=-1)  # (M,) each
        own = logits.gather(1, targets[:, None])[:, 0] - total  # (M,)
        wrong = (best.indices != targets).float()  # (M,)
        sums = torch.zeros(2, len(tokens), device=own.device).index_add_(1, rows, torch.stack((own, wrong)))
        answers = logits[first][:, answer_ids] - total[first, None]  # (N, A)
        every.append(answers.cpu())
        found.append(torch.stack((
            sums[0], (sums[1] == 0).float(), (answers > own[first][:, None]).sum(dim=1).float(),
            answers.argmax(dim=1).float(), (best.values - total)[first].exp())).cpu())  # (5, N)
    model.train(training)
    values, beliefs = np.empty((5, len(order))), np.empty((len(order), len(answer_ids)))
    values[:, order], beliefs[order] = torch.cat(found, dim=1).numpy(), torch.cat(every).numpy()
    return Scores(*values, beliefs)
