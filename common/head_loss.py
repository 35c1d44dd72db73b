"""The head's matmul and the loss in one pass, without holding the logits of the whole batch.

    loss = cross_entropy(hidden, head.weight, head.bias, targets)  # = F.cross_entropy(head(hidden), targets)

With a vocabulary of 50,257 the logits of 4,096 tokens, their log-softmax and their gradient take 2.5 GB in
float32, and moving them costs more time than the rest of a small model. Here each chunk of rows goes all the
way, from logits to its part of the three gradients. Those are formed in the forward pass: the loss is a
scalar, so backward only scales them (the idea of Liger-Kernel, 2410.10989).

Shapes: N tokens, R tokens of a chunk, C width, V vocabulary
"""
from common.layers import not_compiled

import torch

CHUNK_BYTES = 2**27  # of logits: large enough to hide the cost of accumulating the (V, C) gradient
CHUNK_ROWS = 2**10  # on a CPU, where more rows are no faster
GRADIENT_ROWS = 2**13  # of the (V, C) gradient, added at a time
SLICE_ELEMENTS = 2**21  # per softmax on a CPU: 8 MB of float32, which stay in its cache


def cross_entropy(x, weight, bias, targets):
    """Mean of -log softmax(x @ weight.T + bias)[target] in nats: x (N, C), weight (V, C), bias (V,) or None,
    targets (N,), where -1 does not count; 0 if none counts. Matmuls run in autocast's dtype, or else x's, the
    softmax in float32."""
    counts = (targets >= 0).float()  # (N,)
    return chunked_loss(x, weight, bias, counts, nll_rows, targets.clamp(min=0)) / counts.sum().clamp(min=1)


def nll_rows(logits, targets, grad: bool):
    """-log softmax(logits)[target] (R,) of logits (R, V), targets (R,). With `grad`, overwrites the logits
    with its gradient."""
    rows = torch.arange(len(targets), device=targets.device)
    p = torch.softmax(logits, dim=-1, dtype=torch.float32)  # (R, V)
    p_target = p[rows, targets]  # (R,)
    loss = -p_target.log()
    vanished = p_target < 1e-30
    if vanished.any():  # near float32's smallest number: compute from the logits instead
        z = logits.float()
        exact = z.amax(dim=-1) - z[rows, targets] - p.amax(dim=-1).log()
        loss = torch.where(vanished, exact, loss)
    if grad:
        logits.copy_(p)
        logits[rows, targets] = (p_target - 1).to(logits.dtype)  # in float32 first: p may be near 1
    return loss


def chunked_loss(x, weight, bias, row_weights, row_loss, *row_args, others=(), logged: int = 0):
    """Sum over rows of row_weights (N,) * row_loss(the row's logits): a float32 scalar, differentiable in x,
    weight and bias.

    row_loss(logits (R, V), *row_args of these rows, grad) returns (R,) in float32 and, with grad, overwrites
    the logits with its gradient. row_args: tensors of N rows without gradients (targets).
    others: more heads (hidden (N, C'), weight (V, C'), bias or None), without gradients. Their logits (R, V)
    are made chunk by chunk too, and row_loss takes them after row_args.
    logged: row_loss returns (R, 1 + logged). So many more sums come with the loss (1 + logged,), which is
    differentiable through its first entry only."""
    columns = (1 + logged,) if logged else ()
    return sum_over_chunks(torch.is_grad_enabled(), x, weight, bias, row_weights, row_loss, row_args, others,
                           columns)


@not_compiled  # its loop would be unrolled for no gain
def sum_over_chunks(grad: bool, *args):
    return ChunkedLoss.apply(grad, *args)


class ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, x, weight, bias, row_weights, row_loss, row_args, others, columns):
        (N, C), V, kind = x.shape, weight.size(0), x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        losses = torch.empty(N, *columns, device=x.device)  # what stays is allocated before what does not
        dx = torch.empty_like(x) if grad else None
        learns = grad and any(ctx.needs_input_grad[2:4])  # not so under LoRA
        dw = torch.zeros(V, C, device=x.device) if learns else None  # in float32, as is db
        db = None if dw is None or bias is None else torch.zeros(V, device=x.device)
        with torch.autocast(kind, enabled=False):
            inputs = x.detach().to(dtype)
            if bias is None:
                w = weight.detach().to(dtype)
            else:  # the bias as an extra input of 1: faster than adding it to the logits
                w = weight.new_empty(V, C + 1, dtype=dtype)
                w[:, :C], w[:, C] = weight.detach(), bias.detach()
                inputs = torch.cat((inputs, inputs.new_ones(N, 1)), dim=1)  # (N, C + 1)
            others = [Head(dtype, *other) for other in others]
            chunks = max(1, -(-N * V * w.itemsize * (1 + len(others)) // CHUNK_BYTES),
                         -(-N // CHUNK_ROWS) if kind == "cpu" else 1)
            R = max(1, -(-N // chunks))
            step = max(1, SLICE_ELEMENTS // V) if kind == "cpu" else R
            buffers = [w.new_empty(R, V) for _ in range(1 + len(others))]
            for start in range(0, N, R):
                rows = inputs[start:start + R]  # (R, C or C + 1)
                logits, *more = (buffer[:len(rows)] for buffer in buffers)  # (R, V) each
                torch.mm(rows, w.t(), out=logits)
                for head, out in zip(others, more, strict=True):
                    head.logits(slice(start, start + R), out)
                for i in range(0, len(rows), step):
                    own = slice(start + i, start + min(i + step, len(rows)))
                    losses[own] = row_loss(logits[i:i + step], *(a[own] for a in row_args),
                                           *(a[i:i + step] for a in more), grad=grad)
                if grad:
                    factor = row_weights[start:start + R, None]  # (R, 1)
                    dx[start:start + R] = (logits @ w[:, :C]) * factor
                if learns:
                    # a mean within the chunk: a sum over many rows may exceed fp16's 65,504
                    scaled = (rows * (factor / R)).to(dtype)  # (R, C or C + 1)
                    if dtype == dw.dtype:
                        dw.addmm_(logits.t(), scaled[:, :C], alpha=R)
                        if db is not None:
                            db.addmv_(logits.t(), scaled[:, C], alpha=R)
                        continue
                    for first in range(0, V, GRADIENT_ROWS):  # all at once would take another (V, C)
                        some = slice(first, first + GRADIENT_ROWS)
                        part = logits[:, some].t() @ scaled  # (GRADIENT_ROWS, C or C + 1)
                        dw[some].add_(part[:, :C], alpha=R)
                        if db is not None:
                            db[some].add_(part[:, C], alpha=R)
            total = row_weights @ losses  # () or (1 + logged,)
        if grad:
            ctx.gradients = dx, dw, db  # not saved tensors: theirs would be a second reference to dw
            ctx.weight, ctx.bias = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        if ctx.gradients is None:
            raise RuntimeError("this loss's gradients were used up by its first backward; compute it again")
        (dx, dw, db), ctx.gradients = ctx.gradients, None
        scale = scale.flatten()[0]
        if dw is not None:  # contiguous: a tied embedding's gradient is added in place
            dw = dw.mul_(scale).to(ctx.weight)
        if db is not None:
            db = db.mul_(scale).to(ctx.bias)
        return None, dx.mul_(scale), dw, db, *(None,) * 5


class Head:
    """One of the `others` of chunked_loss."""

    def __init__(self, dtype, hidden, weight, bias):
        self.hidden, self.weight = hidden.detach(), weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)

    def logits(self, rows: slice, out) -> None:
        hidden = self.hidden[rows].to(out.dtype)  # (R, C')
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=out)
