"""Recurrences at the speed of matmuls: the gated context vector, and linear recurrences as a parallel scan.

    h, c = gated_loop(x, c, ...)   # only what depends on the previous context is inside the loop
    c = linear_scan(f, b, c)       # c_t = f_t c_{t-1} + b_t for all t, in about 3 sqrt(T) operations

Under autograd a loop over positions is slow: it sums the gradients of the weights T times and records every
small operation. Here forward and backward run unrecorded and save what backward needs; the gradient of each
weight is one matmul over all positions at the end. On CUDA a loop is captured as a graph, so that its
thousands of kernels become one launch.

Shapes: B batch, T tokens, H hidden width, K context width, L layers
"""
import itertools
import math

from common.layers import not_compiled

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

LIMIT = 10.0  # the context is clamped to +-LIMIT
EPS = 1e-5  # of its LayerNorm
GRAPHS = {}  # (loop, what it was captured for) -> (inputs, graph, outputs)


def one_by_one(x, layer) -> bool:
    """Whether a recurrence reads x (B, T, C) token by token: for a single token, which this way compiles too,
    and with INT8 layers, which have no float weights for all positions at once."""
    return not torch.is_grad_enabled() and (x.size(1) == 1 or not isinstance(layer, torch.nn.Linear))


def step_by_step(step, x, h, c):
    """h, c = step(x_t, h, c) for each token of x (B, T, C). Returns all h (B, T, K), the last h and c."""
    rows = []
    for x_t in x.unbind(dim=1):
        h, c = step(x_t, h, c)
        rows.append(h)
    return torch.stack(rows, dim=1), h, c


def graphed(loop, tensors: list) -> list:
    """loop(tensors), a list of tensors; on CUDA captured once per set of shapes, then replayed."""
    if tensors[0].device.type != "cuda":
        return loop(tensors)
    key = (loop, *((t.device, t.shape, t.stride(), t.dtype) for t in tensors))
    if key not in GRAPHS:
        inputs, graph, side = [t.clone() for t in tensors], torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # before the capture, so that libraries choose their kernels
            loop(inputs)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's thread may run
            outputs = loop(inputs)
        if len(GRAPHS) >= 8:  # each holds its buffers
            GRAPHS.pop(next(iter(GRAPHS)))
        GRAPHS[key] = inputs, graph, outputs
    inputs, graph, outputs = GRAPHS[key]
    for static, given in zip(inputs, tensors, strict=True):
        static.copy_(given)
    graph.replay()
    return [t.clone() for t in outputs]  # the next replay overwrites them


# ------------------------------------------------------------------------------------------------------------
# The gated context vector


@not_compiled  # unrolled, it takes minutes to compile
def gated_loop(x, c, w_context, w_gates, b_gates, w_norm, b_norm, *layers):
    """x (T, B, H): the first layer's output from the tokens alone, bias included; c (B, K): the context
    before them; layers: w, b, w, b, ... of the other layers. Returns the last layer's outputs (T, B, H) and
    the context after the last token, which carries no gradient:

        h = relu(x_t + w_context c_{t-1}), then h = relu(w h + b) for each of `layers`
        f, i, u = w_gates h + b_gates, (K) each
        c_t = clamp(LayerNorm(sigmoid(f) c_{t-1} + sigmoid(i) u), +-10)

    Matmuls run in the dtype of x, all else in float32."""
    weights = [w.to(x.dtype) for w in (w_context, w_gates, b_gates, *layers)]
    tensors = [x, c.float(), w_norm.float(), b_norm.float(), *weights]
    with torch.autocast(x.device.type, enabled=False):
        if torch.is_grad_enabled():
            h, c = GatedLoop.apply(*tensors)
        else:
            *_, h, contexts, _, _, _ = forward_loop(tensors, keep=False)
            c = contexts[-1]
    return h, c.detach()


def forward_loop(tensors, keep: bool = True) -> list:
    """-> h of each layer (T, B, H), contexts (T + 1, B, K), gates before their sigmoids (T, B, 3 K), means
    and 1 / std of the norm (T, B, 1). Without `keep`, all but the last layer hold a single token."""
    x, c, w_norm, b_norm, w_context, w_gates, b_gates, *layers = tensors
    (T, B, H), K, L = x.shape, c.size(1), 1 + len(layers) // 2
    n = T if keep else 1
    h = [x.new_empty(T if i == L - 1 else n, B, H) for i in range(L)]
    contexts, gates = c.new_empty(n + 1, B, K), x.new_empty(n, B, 3 * K)
    means, scales = [], []
    contexts[0] = c
    # views are made before the loop: inside, they cost as much as the small operations
    w_context, w_gates, weights = w_context.t(), w_gates.t(), [w.t() for w in layers[::2]]
    h_rows, gate_rows, context_rows = [a.unbind() for a in h], gates.unbind(), contexts[1:].unbind()
    for t, x_t in enumerate(x.unbind()[:1] if isinstance(x, FakeTensor) else x.unbind()):  # fit.py: sizes
        y = torch.addmm(x_t, c.to(x.dtype), w_context, out=h_rows[0][t % len(h_rows[0])]).relu_()  # (B, H)
        for w, b, rows in zip(weights, layers[1::2], h_rows[1:], strict=True):
            y = torch.addmm(b, y, w, out=rows[t % len(rows)]).relu_()  # (B, H)
        s, _ = update(c, torch.addmm(b_gates, y, w_gates, out=gate_rows[t % n]))  # (B, K)
        c, mean, scale = torch.native_layer_norm(s, (K,), w_norm, b_norm, EPS)
        c = torch.clamp(c, -LIMIT, LIMIT, out=context_rows[t % n])
        means[t % n:], scales[t % n:] = [mean], [scale]
    return [*h, contexts, gates, torch.stack(means), torch.stack(scales)]


def update(c, gates):
    """sigmoid(f) c + sigmoid(i) u (B, K) from the context c (B, K) and gates f, i, u side by side (B, 3 K);
    and the gates after their sigmoids, in float32."""
    g, K = gates.to(torch.float32, copy=True), c.size(1)
    g[:, :2 * K].sigmoid_()
    f, i, u = g.split(K, dim=1)
    return torch.mul(f, c).addcmul_(i, u), g


def backward_loop(tensors) -> list:
    """-> gradients of each layer before its ReLU (T, B, H), of the gates before their sigmoids (T, B, 3 K),
    of the first context (B, K), of the norm's weight and bias (K)."""
    dy, w_norm, b_norm, w_context, w_gates, contexts, gates, means, scales, *rest = tensors
    B, K, L = dy.size(1), contexts.size(2), (len(rest) + 1) // 2
    h, weights, aten = rest[:L], rest[L:], torch.ops.aten
    dh, dgates = [torch.empty_like(a) for a in h], torch.empty_like(gates)
    dw, db, dc = torch.zeros_like(w_norm), torch.zeros_like(b_norm), contexts.new_zeros(B, K)
    rows = [a.unbind() for a in (dy, contexts[:-1], contexts[1:], gates, dgates, means, scales)]
    h_rows, dh_rows = zip(*(a.unbind() for a in h), strict=True), zip(*(a.unbind() for a in dh), strict=True)
    steps = list(zip(*rows, h_rows, dh_rows, strict=True))
    for dy_t, c, after, pre, dpre, mean, scale, h_t, dh_t in reversed(steps):
        s, g = update(c, pre)  # (B, K), (B, 3 K)
        f, i, u = g.split(K, dim=1)
        dc = aten.hardtanh_backward(dc, after, -LIMIT, LIMIT)  # (B, K)
        ds, dw_t, db_t = aten.native_layer_norm_backward(dc, s, (K,), mean, scale, w_norm, b_norm,
                                                         (True, True, True))
        dw += dw_t
        db += db_t
        dc = ds * f  # (B, K)
        dg = torch.cat((ds * c, ds * u, ds * i), dim=1)  # (B, 3 K)
        aten.sigmoid_backward.grad_input(dg[:, :2 * K], g[:, :2 * K], grad_input=dg[:, :2 * K])
        d = torch.addmm(dy_t, dpre.copy_(dg), w_gates, out=dh_t[-1])  # (B, H)
        for j in reversed(range(L)):
            aten.threshold_backward.grad_input(d, h_t[j], 0, grad_input=d)
            if j:
                d = torch.mm(d, weights[j - 1], out=dh_t[j - 1])  # (B, H)
        dc += d @ w_context
    return [*dh, dgates, dc, dw, db]


class GatedLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, c, w_norm, b_norm, w_context, w_gates, b_gates, *layers):
        tensors = [x, c, w_norm, b_norm, w_context, w_gates, b_gates, *layers]
        *h, contexts, gates, means, scales = graphed(forward_loop, tensors)
        ctx.save_for_backward(w_norm, b_norm, w_context, w_gates, contexts, gates, means, scales, *h,
                              *layers[::2])
        last = contexts[-1].clone()  # a view would keep all contexts alive
        ctx.mark_non_differentiable(last)
        return h[-1], last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, _):
        w_norm, b_norm, w_context, w_gates, contexts, gates, means, scales, *rest = ctx.saved_tensors
        *dh, dgates, dc, dw_norm, db_norm = graphed(backward_loop, [dy, *ctx.saved_tensors])
        h = rest[:len(dh)]

        def weight(d, a):
            """The weight gradient of a layer with input a (T, B, in) and output gradient d (T, B, out)."""
            return d.flatten(0, 1).t() @ a.flatten(0, 1)  # (out, in)

        layers = []
        for d, a in zip(dh[1:], h[:-1], strict=True):
            layers += [weight(d, a), d.flatten(0, 1).sum(dim=0)]
        return (dh[0], dc, dw_norm, db_norm, weight(dh[0], contexts[:-1].to(dy.dtype)), weight(dgates, h[-1]),
                dgates.flatten(0, 1).sum(dim=0), *layers)


# ------------------------------------------------------------------------------------------------------------
# The linear recurrence


def linear_scan(f, b, c):
    """c_t = f_t c_{t-1} + b_t: f, b (B, T, K) with f in [0, 1], c (B, K) before the first -> (B, T, K).

    Chunks of sqrt(T) tokens: first within all chunks at once, then from chunk to chunk, then each chunk's
    incoming value is added to its tokens. It never divides by a product of gates, which may vanish, so for
    any T the result equals the loop's up to rounding."""
    if b.size(1) == 1:
        return torch.addcmul(b, f, c[:, None])
    return LinearScan.apply(f, b, c)


def scan_loop(tensors, reverse: bool = False) -> list:
    """The same without a gradient, overwriting b, as a list; `reverse` runs from last token to first."""
    f, b, c = tensors
    B, T, K = b.shape
    size = math.isqrt(T - 1) + 1
    n = -(-T // size)  # chunks
    if n * size > T:  # pad with tokens that change nothing, at the end of the run
        pad = (0, 0, n * size - T, 0) if reverse else (0, 0, 0, n * size - T)
        f, b = F.pad(f, pad, value=1.0), F.pad(b, pad)
    f, b = (a.view(B, n, size, K) for a in (f, b))
    steps, chunks = (range(size)[::-1], range(n)[::-1]) if reverse else (range(size), range(n))
    a = torch.empty_like(f)  # (B, n, size, K), product of a chunk's gates up to each token
    a[:, :, steps[0]] = f[:, :, steps[0]]
    for before, now in itertools.pairwise(steps):
        torch.mul(a[:, :, before], f[:, :, now], out=a[:, :, now])
        b[:, :, now].addcmul_(f[:, :, now], b[:, :, before])
    given = torch.empty_like(b[:, :, 0])  # (B, n, K), the value each chunk starts from
    for j in chunks:
        given[:, j] = c
        c = torch.addcmul(b[:, j, steps[-1]], a[:, j, steps[-1]], c)  # (B, K)
    b.addcmul_(a, given[:, :, None])
    b = b.view(B, n * size, K)
    return [b[:, -T:] if reverse else b[:, :T]]


def reversed_scan_loop(tensors) -> list:
    return scan_loop(tensors, reverse=True)


class LinearScan(torch.autograd.Function):
    @staticmethod
    @not_compiled
    def forward(ctx, f, b, c):
        y, = graphed(scan_loop, [f, b.clone(), c])  # (B, T, K)
        ctx.save_for_backward(f, y, c)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        f, y, c = ctx.saved_tensors
        later = torch.cat((f[:, 1:], f.new_zeros(f[:, :1].shape)), dim=1)  # (B, T, K)
        db, = graphed(reversed_scan_loop, [later, dy.clone(), torch.zeros_like(c)])  # (B, T, K)
        before = torch.cat((c[:, None], y[:, :-1]), dim=1)  # (B, T, K)
        return db * before, db, f[:, 0] * db[:, 0]
