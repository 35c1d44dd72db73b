"""Hidden states and attention of a student beside its teacher's, as losses without parameters of their own:
widths and numbers of heads may differ.

    pairs = layer_pairs(student.cfg.n_layers, teacher.cfg.n_layers)
    with watching(teacher, [j for _, j in pairs], attention=True) as theirs, torch.no_grad():
        teacher(x)
    with watching(student, [i for i, _ in pairs], attention=True) as ours:
        loss, _ = student(x, y)
    loss = loss + gaps(ours, theirs, pairs, y >= 0, hidden=1.0, attention=1.0)

Shapes: B batch, T tokens, C width, H heads, G key/value heads, D head size; of the student or the teacher
"""
import contextlib
import functools
import math
from dataclasses import dataclass, field

from common.attention import causal_mask

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recomputed

UNSEEN = -1e30  # the score of a key that a query does not see: its weight is 0, its logarithm finite


def layer_pairs(n_student: int, n_teacher: int) -> list[tuple[int, int]]:
    """(student layer, teacher layer), one for each of the student's, evenly spaced, last to last."""
    return [(i, -(-(i + 1) * n_teacher // n_student) - 1) for i in range(n_student)]


@dataclass
class Seen:
    """What the watched layers, by number, computed in the last forward pass."""
    hidden: dict = field(default_factory=dict)  # a block's output (B, T, C)
    queries: dict = field(default_factory=dict)  # (B, H, T, D), as they are scored: normalised and turned
    keys: dict = field(default_factory=dict)  # (B, G, T, D)
    windows: dict = field(default_factory=dict)  # tokens a query sees; 0 = all before it


@contextlib.contextmanager
def watching(model, layers, attention: bool = False):
    """Records these layers in each forward pass of an LM (not compiled) while open, in the Seen it yields;
    with `attention` queries and keys too. Graphs stay: run a teacher under no_grad (not inference_mode, whose
    tensors no backward pass may use). ValueError if the model has no blocks, or not attention in them."""
    if model.cfg.gated:
        raise ValueError(f"mixer={model.cfg.mixer}: this model has no blocks whose output could be matched")
    if attention and model.cfg.mixer != "attention":
        raise ValueError(f"mixer={model.cfg.mixer} has no attention to match")
    seen, hooks = Seen(), []

    def keep_output(layer, block, inputs, output):
        seen.hidden[layer] = output[0]  # beside the experts' balance loss

    def keep_scored(layer, q, k):
        seen.queries[layer], seen.keys[layer] = q, k

    try:
        for layer in layers:
            block = model.trunk[layer]
            hooks.append(block.register_forward_hook(functools.partial(keep_output, layer)))
            if attention:
                block.mixer.watch = functools.partial(keep_scored, layer)
                seen.windows[layer] = block.mixer.window
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers if attention else ():
            model.trunk[layer].mixer.watch = None


def gaps(ours: Seen, theirs: Seen, pairs, counted, hidden: float, attention: float):
    """The mean over the pairs of layers of both gaps, times these weights."""
    total = 0.0
    for i, j in pairs:
        if hidden:
            total = total + hidden * hidden_gap(ours.hidden[i], theirs.hidden[j], counted)
        if attention:
            window = min((w for w in (ours.windows[i], theirs.windows[j]) if w), default=0)
            total = total + attention * attention_gap(ours.queries[i], ours.keys[i], theirs.queries[j],
                                                      theirs.keys[j], counted, window)
    return total / len(pairs)


def hidden_gap(hs, ht, counted):
    """Mean squared difference between the cosine similarities of the student's states hs (B, T, C_s) and of
    the teacher's ht (B, T, C_t), over all ordered pairs of counted tokens (B, T) of the same sequence, a
    token's with itself included: 0 to 4. Similarity-preserving distillation (1907.09682) compares examples of
    a batch like this."""
    with torch.autocast(hs.device.type, enabled=False):  # bf16 cannot tell similarities near 1 apart
        ours, theirs = cosines(hs), cosines(ht.detach())  # (B, T, T) each
    pairs = (counted[:, :, None] & counted[:, None, :]).float()  # (B, T, T)
    return ((ours - theirs).square() * pairs).sum() / pairs.sum().clamp(min=1)


def cosines(h):
    """(B, T, C) -> (B, T, T)"""
    h = F.normalize(h.float(), dim=-1)
    return h @ h.transpose(1, 2)


def attention_gap(qs, ks, qt, kt, counted, window: int = 0):
    """KL(teacher's || student's) of attention weights averaged over heads, in nats: its mean over the counted
    queries (B, T). Queries (B, H, T, D) and keys (B, G, T, D); H, G and D may differ between the two.

    Every query sees itself and what came before, with a window at most that many tokens: pass the narrower of
    the two models'. Padding follows the text, so that no counted query sees it; sinks are left out. One
    sequence at a time, recomputed in the backward pass: (H, T, T) of a whole batch would be too much."""
    mask = causal_mask(qs.size(2), qs.size(2), window, qs.device)  # (T, T)
    rows = zip(qs, ks, qt.detach(), kt.detach(), counted, strict=True)
    total = sum(recomputed(sequence_gap, *row, mask, use_reentrant=False, preserve_rng_state=False)
                for row in rows)
    return total / counted.sum().clamp(min=1)


def sequence_gap(qs, ks, qt, kt, counted, mask):
    """attention_gap's sum over the queries of one sequence; counted (T,), mask (T, T)."""
    ours, theirs = log_weights(qs, ks, mask), log_weights(qt, kt, mask)  # (T, T) each
    return (theirs.exp() * (theirs - ours)).sum(dim=-1)[counted].sum()


def log_weights(q, k, mask):
    """log of the attention weights' mean over heads: q (H, T, D), k (G, T, D), mask (T, T) -> (T, T)."""
    (H, _, D), G = q.shape, len(k)
    with torch.autocast(q.device.type, enabled=False):
        scores = q.float() @ k.float().repeat_interleave(H // G, dim=0).transpose(1, 2)  # (H, T, T)
    scores = (scores / math.sqrt(D)).masked_fill(~mask, UNSEEN)
    return scores.log_softmax(dim=-1).logsumexp(dim=0) - math.log(H)
