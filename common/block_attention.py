"""Causal attention, global or local, a block of queries at a time in plain matmuls, with a backward pass.

    y = block_attention(q, k, v, window=256)   # (B, H, T, D), (B, G, S, D), (B, G, S, D) -> (B, H, T, D)

A block of queries multiplies only the keys it may see: half the work of full attention, and with a window
O(T * window) time and memory. On a CPU the batched matmuls are two to three times as fast as
scaled_dot_product_attention in bf16 (forward and backward, T 256-4,096), and they support sinks, and dropout
without the full (T, S) matrix.

Shapes: B batch, H heads, G key/value heads, T queries, S keys (the queries are the last T of S positions), D
head size, Q queries of a block, K keys they may see
"""
import math

from common.layers import not_compiled

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

BLOCK = 128  # queries: 64 to 256 differ little
KEEP_BYTES = 2**22  # of weights in one call; larger ones are recomputed in backward instead of kept


@not_compiled  # the loop over blocks is too long to unroll
def block_attention(q, k, v, window: int = 0, dropout: float = 0.0, sink=None):
    """Softmax attention of q (B, H, T, D) to k and v (B, G, S, D); each query sees itself and the tokens
    before it, at most `window` in all (0 = no limit). `sink` (H,): the score of an extra key whose value is
    0."""
    with torch.autocast(q.device.type, enabled=False):
        return BlockAttention.apply(q, k, v, window or k.size(2), dropout, torch.is_grad_enabled(), sink)


def blocks(T: int, S: int, window: int):
    """(begin, end) of each block of queries and (first, stop) of the keys it may see."""
    size = min(BLOCK, max(16, window))
    for begin in range(0, T, size):
        end = min(T, begin + size)
        yield begin, end, max(0, S - T + begin - window + 1), S - T + end


def weights_of(q, k, position: int, first: int, window: int, sink=None):
    """softmax(q k^T) (B * G, H/G * Q, K) of queries q (B * G, H/G, Q, D), the first at `position`, to keys k
    (B * G, K, D), the first at `first`; with `sink` (B * G, H/G, 1) its weight is an extra last column."""
    Q, K = q.size(2), k.size(1)
    keys = k if sink is None else F.pad(k, (0, 0, 0, 1))  # (B * G, K or K + 1, D)
    z = torch.bmm(q.flatten(1, 2), keys.transpose(1, 2)).view(*q.shape[:3], -1)  # (B * G, H/G, Q, K or K + 1)
    if sink is not None:
        z[..., K] = sink
    above = torch.ones(Q, Q, dtype=torch.bool, device=q.device).triu(1)  # (Q, Q): later than the query
    z[..., K - Q:K].masked_fill_(above, -math.inf)
    if position + Q - window > first:  # some keys are too old for the last queries
        hidden = position - window + 1 - first  # keys too old for the first query (negative: none, and spare)
        width = Q - 1 + hidden
        too_old = torch.ones(Q, width, dtype=torch.bool, device=q.device).tril(hidden - 1)  # (Q, width)
        z[..., :width].masked_fill_(too_old, -math.inf)
    return z.softmax(dim=-1).flatten(1, 2)  # (B * G, H/G * Q, K)


def random_state(device):
    """The state of the device's default generator, to start another one from."""
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.mps.get_rng_state()


def random_keep(x, dropout: float, generator):
    """A dropout mask for x: each element 1 / (1 - dropout), or 0 with probability `dropout`. From 16 random
    bits per element; bernoulli_ takes five times as long on a CPU."""
    dropped = round(dropout * 2**16)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    bits.random_(-2**63, None, generator=generator)
    keep = bits.view(torch.int16)[:x.numel()].view(x.shape) >= dropped - 2**15
    return keep.to(x.dtype).mul_(2**16 / (2**16 - dropped))


class BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, window, dropout, grad, sink):
        (B, H, T, D), (_, G, S, _) = q.shape, k.shape
        q = (q * D ** -0.5).reshape(B * G, H // G, T, D)
        k, v = k.reshape(B * G, S, D), v.reshape(B * G, S, D)
        score = None if sink is None else sink.view(G, H // G, 1).repeat(B, 1, 1)  # (B * G, H/G, 1)
        # laid out as (B, T, H, D), so that the heads of a token are its row without a copy
        y = q.new_empty(B, T, G, H // G, D).permute(0, 2, 3, 1, 4)  # (B, G, H/G, T, D)
        keys = sum((stop - first) * (end - begin) for begin, end, first, stop in blocks(T, S, window))
        keep, kept = grad and B * H * keys * q.itemsize <= KEEP_BYTES, []
        # backward draws the masks again, from here; there are none when common/fit.py counts memory
        start = random_state(q.device) if dropout and grad and not isinstance(q, FakeTensor) else None
        for begin, end, first, stop in blocks(T, S, window):
            p = weights_of(q[:, :, begin:end], k[:, first:stop], S - T + begin, first, window, score)
            seen = p[..., :stop - first]  # (B * G, H/G * Q, K), without the sink
            if dropout:
                seen = seen * random_keep(seen, dropout, None)
            y[:, :, :, begin:end] = torch.bmm(seen, v[:, first:stop]).view(B, G, H // G, end - begin, D)
            kept += [p] * keep
        if grad:
            ctx.save_for_backward(q, k, v, y, score, *kept)
            ctx.window, ctx.dropout, ctx.start = window, dropout, start
            ctx.shapes = (B, H, T, D), (B, G, S, D)
            ctx.sink = None if sink is None else sink.dtype
        return y.view(B, H, T, D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        q, k, v, y, sink, *kept = ctx.saved_tensors
        (B, H, T, D), (_, G, S, _) = ctx.shapes
        inner = (dy.float() * y.view(dy.shape).float()).sum(dim=-1, keepdim=True)  # (B, H, T, 1)
        dy, inner = (a.reshape(B * G, H // G, T, -1) for a in (dy, inner.to(dy.dtype)))
        generator = torch.Generator(q.device).set_state(ctx.start) if ctx.dropout else None
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(k.shape, device=k.device) for _ in range(2))  # summed over blocks in float32
        dsink = None if sink is None else torch.zeros(B, H, device=k.device)
        for i, (begin, end, first, stop) in enumerate(blocks(T, S, ctx.window)):
            qs, d = (a[:, :, begin:end].flatten(1, 2) for a in (q, dy))  # (B * G, H/G * Q, D)
            ks, vs = k[:, first:stop], v[:, first:stop]  # (B * G, K, D)
            p = kept[i] if kept else \
                weights_of(q[:, :, begin:end], ks, S - T + begin, first, ctx.window, sink)
            mask = random_keep(p[..., :stop - first], ctx.dropout, generator) if ctx.dropout else None
            about = inner[:, :, begin:end].flatten(1, 2)  # (B * G, H/G * Q, 1)
            if sink is not None:  # as dz below, with a value of 0
                dsink -= (p[..., -1:] * about).float().view(B, H, end - begin).sum(dim=-1)  # (B, H)
                p = p[..., :-1]  # (B * G, H/G * Q, K)
            dv[:, first:stop] += torch.bmm((p if mask is None else p * mask).transpose(1, 2), d)
            dz = torch.bmm(d, vs.transpose(1, 2))  # (B * G, H/G * Q, K)
            if mask is not None:
                dz *= mask
            dz = dz.sub_(about).mul_(p)
            dq[:, :, begin:end] = torch.bmm(dz, ks).view(B * G, H // G, end - begin, D)
            dk[:, first:stop] += torch.bmm(dz.transpose(1, 2), qs)
        dq = dq.mul_(D ** -0.5).view(B, H, T, D)
        dsink = None if sink is None else dsink.sum(dim=0).to(ctx.sink)  # (H,)
        return dq, dk.to(k.dtype).view(B, G, S, D), dv.to(v.dtype).view(B, G, S, D), None, None, None, dsink
