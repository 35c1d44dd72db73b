"""INT8 modules: weights in one byte each, activations rounded to one byte on the fly, each row separately.

    int8.to_int8(model)   # in place

A row is q * scale, with q from -127 to 127 and scale = max|row| / 127. Rows of a weight are its output
channels (of a table, its entries). Rows of an activation are tokens, so a token's result does not depend on
the rest of the batch. Integer matmuls are exact. Scales stay in float32 whatever the dtype of the rest:
rounding them to bf16 would lose about as much as rounding to q does.

Shapes: N rows of an activation, K inputs, M outputs, E experts, B batch, T time
"""
from common import layers
from common.config import UserError

import torch
import torch.nn as nn
import torch.nn.functional as F

# torch._int_mm uses oneDNN on x86; on CUDA it needs at least 17 rows, elsewhere it is missing or slow.
# Microseconds for one row, quantising and scaling included (2 cores with AVX512-VNNI, torch 2.13):
#                           50,257 x 512    1,536 x 512
#   fp32                           7,260             66
#   torch._int_mm                    303             23
#   _weight_int8pack_mm              475             18   rows in bf16, not quantised
#   quantized.linear_dynamic         177             16   deprecated; one scale for all rows; packed weights
#   onednn.qlinear_pointwise         288             33   packed weights; 100 times slower for signed rows
# Packed weights would be a second copy of the table that a tied head shares. 512 rows of 1,536 x 512: fp32
# 4,530, _int_mm 2,660, the others 700 to 4,210. In a compiled step of 64M parameters _int_mm makes twice the
# tokens/s of a multiply and sum as in layers.Linear.
HAS_INT_MM = (hasattr(torch, "_int_mm") and torch.backends.mkldnn.is_available()
              and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"))


def quantize_rows(x):
    """x (..., K) -> q (..., K) in int8, scale (..., 1) in float32; q * scale is within scale / 2 of x."""
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-30).div_(127)  # (..., 1); rows of 0 stay 0
    return (x / scale).round_().char(), scale


def matmul(a, q):
    """a (N, K), q (M, K), both int8 -> a @ q.T (N, M), in int32 or, without _int_mm, in float32, which is as
    exact up to 2^24."""
    if HAS_INT_MM and a.device.type == "cpu":
        return torch._int_mm(a, q.t())  # (N, M)
    return F.linear(a.float(), q.float())  # (N, M)


def linear(x, q, scale, bias=None):
    """x (..., K) @ (q (M, K) * scale (M,)).T + bias (M,) -> (..., M) in x's dtype."""
    a, x_scale = quantize_rows(x.reshape(-1, x.size(-1)))  # (N, K), (N, 1)
    y = (matmul(a, q) * x_scale).mul_(scale)  # (N, M) in float32
    if bias is not None:
        y.add_(bias)
    return y.to(x.dtype).view(*x.shape[:-1], -1)  # (..., M)


class Int8Module(nn.Module):
    """Replaces a float module. q and scale are parameters without a gradient, so that modules which share a
    matrix still share it after model.to()."""

    def __init__(self, module: nn.Module, quantize):
        super().__init__()
        self.q, self.scale = quantize(module.weight)  # (..., M, K), (..., M)
        self.bias = getattr(module, "bias", None)

    @property
    def weight(self):
        """The matrix in floats, for code that does not call the module: slower."""
        return self.q * self.scale[..., None]  # (..., M, K)

    def _apply(self, fn, recurse: bool = True):
        scale = self.scale.data
        super()._apply(fn, recurse)
        self.scale.data = scale.to(self.scale.device)
        return self

    def train(self, mode: bool = True):
        if mode:
            raise UserError("INT8 weights cannot be trained; train the checkpoint they were made from")
        return super().train(mode)


class Int8Linear(Int8Module):
    def forward(self, x):
        return linear(x, self.q, self.scale, self.bias)


class Int8Embedding(Int8Module):
    def forward(self, tokens):
        return self.q[tokens] * self.scale[tokens][..., None]  # (B, T, K)


class Int8Experts(Int8Module):
    """Replaces E linear maps side by side: weight (E, M, K), bias (E, M) or None."""

    def forward(self, x, where):
        """x (N, K) -> (N, M). `where` as in layers.ExpertLinear."""
        if torch.is_tensor(where):
            a, x_scale = quantize_rows(x)
            y = (self.q[where].int() * a[:, None].int()).sum(-1) * x_scale * self.scale[where]  # (N, M)
            return (y if self.bias is None else y + self.bias[where]).to(x.dtype)
        biases = [None] * len(where) if self.bias is None else self.bias
        parts = zip(x.split(where), self.q, self.scale, biases, strict=True)
        return torch.cat([linear(rows, *weights) for rows, *weights in parts if len(rows)])  # (N, M)


def swap(model: nn.Module, classes: dict) -> nn.Module:
    """Replace the modules of `model` whose type is a key, in place. A weight that several share is quantised
    once and stays shared. Returns the model in eval mode, which it cannot leave."""
    done = {}

    def quantize(weight):
        if weight not in done:
            q, scale = quantize_rows(weight.detach())
            done[weight] = [nn.Parameter(t, requires_grad=False) for t in (q, scale[..., 0])]
        return done[weight]

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) in classes:
                setattr(module, name, classes[type(child)](child, quantize))
    return model.eval()


def to_int8(model: nn.Module) -> nn.Module:
    """The model itself with its matrices and tables in INT8, for good. Routers and vectors stay as they
    are."""
    return swap(model, {nn.Linear: Int8Linear, layers.Linear: Int8Linear, nn.Embedding: Int8Embedding,
                        layers.Embedding: Int8Embedding, layers.ExpertLinear: Int8Experts})
