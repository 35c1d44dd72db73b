"""Training on a sample of the vocabulary: the loss's softmax over a few thousand tokens in place of all.

With 50,257 tokens and a width of 128 the head is four fifths of a step's FLOPs. A micro-batch's own targets
and a random choice of the other tokens make the candidates S. A token w is a candidate with probability

    p(w) = 1 - (1 - f(w))^N (1 - r)      f: its frequency in the training text, N: targets, r: share of others

and log p(w) is subtracted from its logit. "Which candidate is this row's target, given S?" then has the same
best answer as the whole softmax, log-probabilities up to a constant (sampled softmax: Jean et al., 1412.2007;
here the targets of the other rows are candidates too). Evaluation is always over the whole vocabulary.

Shapes: N targets, V vocabulary, S candidates, C width
"""
from common.layers import not_compiled

import numpy as np
import torch

CHUNK = 2**24  # tokens counted at a time


class HeadSampler:
    """Called with the head's weight (V, C), bias (V,) or None and targets (N,), where -1 does not count:
    returns the candidates' weights (S, C), biases (S,) and the targets' places among them (N,). S is `size`,
    or the number of different targets if that is larger. Draws from torch's global generator."""

    def __init__(self, tokens, vocab_size: int, size: int, device):
        """tokens: the ids of the training text, on disk or in memory."""
        counts = np.zeros(vocab_size)
        for i in range(0, len(tokens), CHUNK):
            counts += np.bincount(tokens[i:i + CHUNK], minlength=vocab_size)
        self.size = size
        share = torch.tensor(counts / max(1, counts.sum()))
        self.log_absent = torch.log1p(-share.clamp(max=1 - 1e-9)).to(torch.float32).to(device)  # (V,)

    @not_compiled  # how many targets differ is data
    def __call__(self, weight, bias, targets):
        candidates, log_p, places = self.draw(targets)
        bias = 0.0 if bias is None else bias.index_select(0, candidates)
        return weight.index_select(0, candidates), bias - log_p, places

    def draw(self, targets):
        """(candidates (S,), the logarithm of each one's probability to be among them (S,), places (N,))."""
        V, counted = len(self.log_absent), targets[targets >= 0]
        order = torch.rand(V, device=targets.device)
        order[counted] = 2.0  # before all others
        present = int((order == 2.0).sum())
        S = min(V, max(self.size, present))
        candidates = order.topk(S).indices.sort().values  # (S,)
        others = (S - present) / max(1, V - present)
        p = 1 - torch.exp(len(counted) * self.log_absent[candidates]) * (1 - others)  # (S,)
        place = torch.zeros(V, dtype=torch.long, device=targets.device)
        place[candidates] = torch.arange(S, device=targets.device)
        return candidates, p.clamp(min=1e-9).log(), torch.where(targets >= 0, place[targets.clamp(min=0)], -1)
