"""Which fast attention runs where: the same numbers as model.attention, in O(T) memory.

Shapes: B batch, H heads, G key/value heads, T queries, S keys (the queries are the last T of S positions), D
head size, W window"""
import functools

from common.block_attention import block_attention

import torch
import torch.nn.functional as F


def causal_mask(T: int, S: int, window: int, device):
    """(T, S), true where query t, at position S - T + t, sees a key: itself and the window - 1 tokens before
    it, or with window 0 all tokens before it."""
    mask = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return mask.triu(S - T - window + 1) if window else mask


@functools.lru_cache(maxsize=8)
def flex_mask(T: int, window: int, device):
    """The same mask for flex_attention at S = T, as a list of blocks that are not empty."""
    from torch.nn.attention.flex_attention import create_block_mask
    return create_block_mask(lambda b, h, q, k: (k <= q) & (q - k < window), None, None, T, T, device)


@functools.lru_cache(maxsize=1)
def flex_attention():
    from torch.nn.attention import flex_attention as flex
    return torch.compile(flex.flex_attention)


def is_slower(q, filled, sink) -> bool:
    """Whether model.attention is at least as fast for a single query: with a sink, which no kernel supports;
    or in 16 bits on a CPU over a ring of keys, where the kernel takes 297 us for 768 keys and plain attention
    77 (1,000 if the number of keys changes each time)."""
    on_cpu = filled is not None and q.device.type == "cpu" and q.dtype != torch.float32
    return q.size(2) == 1 and (sink is not None or on_cpu)


def fast_attention(q, k, v, window: int, filled, dropout: float, sink):
    """q (B, H, T, D), the last T of the S tokens of k and v (B, G, S, D) -> (B, H, T, D). `filled` (1, S):
    the filled slots of a ring cache, or None; `sink` (H,) or None."""
    (B, H, T, D), (_, G, S, _) = q.shape, k.shape
    if T == 1:  # it sees every key, so the queries of a group can be rows of one matmul
        y = F.scaled_dot_product_attention(q.view(B, G, -1, D), k, v, filled, dropout)  # (B, G, H/G, D)
        return y.view(B, H, T, D)
    window = window if window < S else 0
    flex = (window and q.is_cuda and T == S and sink is None and not dropout and D >= 16
            and torch.cuda.get_device_capability(q.device) >= (8, 0))
    if q.device.type == "cpu" or sink is not None or window and not flex:
        return block_attention(q, k, v, window, dropout, sink)
    if G < H:
        k, v = k.repeat_interleave(H // G, dim=1), v.repeat_interleave(H // G, dim=1)  # (B, H, S, D)
    if flex:
        return flex_attention()(q, k, v, block_mask=flex_mask(T, window, q.device))
    causal = T == S  # then the kernel makes the mask itself
    mask = None if causal else causal_mask(T, S, window, q.device)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
