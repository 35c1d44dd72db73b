"""The head's product and the loss in one pass, without ever holding the logits of the whole batch.

    loss = cross_entropy(hidden, head.weight, head.bias, targets)  # = F.cross_entropy(head(hidden), targets)

With 50,257 words the logits of 4,096 tokens, their log-softmax and their gradient take 2.5 GB in float32, and
moving them costs more time than the rest of a small model. Here a chunk of rows at a time goes all the way:
logits, softmax, and what the chunk adds to the three gradients, which are formed in the forward pass, as the
loss is a scalar and backward has only to scale them (the idea of Liger-Kernel, 2410.10989).

Shapes: N tokens, R tokens of a chunk, C width, V vocabulary
"""
import torch

CHUNK_BYTES = 2**27  # of logits: large enough that adding up the (V, C) gradient does not show
SLICE_ELEMENTS = 2**21  # of a softmax on the CPU: 8 MB of float32 stay in its cache


def cross_entropy(x, weight, bias, targets):
    """Mean of -log softmax(x @ weight.T + bias)[target] in nats: x (N, C), weight (V, C), bias (V,) or None,
    targets (N,), of which -1 do not count (0 if none does). Products run in autocast's dtype, or else x's;
    the softmax in float32."""
    counts = (targets >= 0).float()  # (N,)
    return chunked_loss(x, weight, bias, counts, nll_rows, targets.clamp(min=0)) / counts.sum().clamp(min=1)


def nll_rows(logits, targets, grad: bool):
    """-log softmax(logits)[target] of logits (R, V), targets (R,); with `grad`, logits are overwritten by its
    gradient."""
    rows = torch.arange(len(targets), device=targets.device)
    p = torch.softmax(logits, dim=-1, dtype=torch.float32)  # (R, V)
    p_target = p[rows, targets]  # (R,)
    loss = -p_target.log()
    vanished = p_target < 1e-30
    if vanished.any():  # near float32's smallest number: take the loss from the logits themselves
        z = logits.float()
        exact = z.amax(dim=-1) - z[rows, targets] - p.amax(dim=-1).log()
        loss = torch.where(vanished, exact, loss)
    if grad:
        logits.copy_(p)
        logits[rows, targets] = (p_target - 1).to(logits.dtype)  # in float32 first: p may be near 1
    return loss


def chunked_loss(x, weight, bias, row_weights, row_loss, *row_args):
    """Sum over rows of row_weights (N,) * row_loss(logits of the row): a scalar in float32, differentiable in
    x, weight and bias.

    row_loss(logits (R, V), *row_args of these rows, grad) returns (R,) in float32 and, if grad is set,
    overwrites the logits by its gradient; row_args are tensors of N rows (targets, a teacher's hidden states)
    that receive none."""
    return sum_over_chunks(torch.is_grad_enabled(), x, weight, bias, row_weights, row_loss, row_args)


@torch.compiler.disable  # its loop has nothing to gain, and would be unrolled
def sum_over_chunks(grad: bool, *args):
    return ChunkedLoss.apply(grad, *args)


class ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, x, weight, bias, row_weights, row_loss, row_args):
        (N, C), V, kind = x.shape, weight.size(0), x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            w, inputs = weight.detach().to(dtype), x.detach().to(dtype)
            if bias is not None:  # one more input that is always 1: adding it to the logits takes longer
                w = torch.cat((w, bias.detach().to(dtype)[:, None]), dim=1)  # (V, C + 1)
                inputs = torch.cat((inputs, inputs.new_ones(N, 1)), dim=1)  # (N, C + 1)
            chunks = max(1, -(-N * V * w.itemsize // CHUNK_BYTES))
            R = max(1, -(-N // chunks))
            step = max(1, SLICE_ELEMENTS // V) if kind == "cpu" else R
            buffer = w.new_empty(R, V)
            losses = torch.empty(N, device=x.device)
            dx = torch.empty_like(x) if grad else None
            dw = torch.zeros(w.size(1), V, device=x.device) if grad else None  # (C or C + 1, V), float32
            for start in range(0, N, R):
                rows = inputs[start:start + R]  # (R, C or C + 1)
                logits = torch.mm(rows, w.t(), out=buffer[:len(rows)])  # (R, V)
                for i in range(0, len(rows), step):
                    own = slice(start + i, start + min(i + step, len(rows)))
                    losses[own] = row_loss(logits[i:i + step], *(a[own] for a in row_args), grad=grad)
                if grad:
                    factor = row_weights[start:start + R, None]  # (R, 1)
                    dx[start:start + R] = (logits @ w[:, :C]) * factor
                    # a mean within the chunk: a sum over many rows may pass fp16's 65,504
                    dw.add_((rows * (factor / R)).to(dtype).t().contiguous() @ logits, alpha=R)
            total = torch.dot(losses, row_weights)
        if grad:
            ctx.save_for_backward(dx, dw)
            ctx.weight, ctx.bias = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        dx, dw = ctx.saved_tensors
        dw.mul_(scale)  # in place: a second backward through it is refused, as what was saved has changed
        C = dx.size(1)
        dweight = dw[:C].t().contiguous().to(ctx.weight)  # (V, C)
        return None, dx * scale, dweight, None if ctx.bias is None else dw[C].to(ctx.bias), None, None, None
