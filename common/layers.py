"""The linear layers that model.py builds on, and how a layer declares its parameters.

A module that owns parameters has `specs`, a Spec for each: how it starts, how it is optimised, which maps its
rows hold. Initialisation (model.py), the optimiser's groups and Muon (muon.py) read these, never names. A
parameter without a Spec is an error that says where to add it.

Shapes: N rows of an activation, E experts
"""
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class Spec(NamedTuple):
    """What a layer declares about one of its parameters."""
    start: float | Callable  # the standard deviation of normal values, or a function that fills the tensor
    group: str = "scalars"  # its learning rate and decay (muon.py): matrices, embeddings, head or scalars
    maps: tuple[int, ...] = ()  # rows of each map in this matrix, orthogonalised separately; () = one map


# Like torch.compiler.disable, but that imports the compiler at once, which is half of a script's start. This
# one imports it when the function is first called.
not_compiled = torch._disable_dynamo

ZEROS, ONES = Spec(torch.Tensor.zero_), Spec(lambda p: p.fill_(1.0))


def declared(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Spec]]:
    """(name, parameter, Spec) of each parameter, shared ones once, in the order of named_parameters()."""
    for name, p in model.named_parameters():
        path, _, own = name.rpartition(".")
        spec = getattr(model.get_submodule(path), "specs", {}).get(own)
        if spec is None:
            raise AssertionError(f"{name} {tuple(p.shape)} has no Spec (start, group, maps): add '{own}' to "
                                 "the `specs` of the layer that makes it")
        yield name, p, spec


def factor_std(std: float, rank: int) -> float:
    """The standard deviation of two random matrices of inner dimension `rank` whose product has the standard
    deviation `std`; for rank 0, a whole matrix, `std` itself."""
    return math.sqrt(std / math.sqrt(rank)) if rank else std


class Linear(nn.Linear):
    """nn.Linear with specs. In a compiled decoding step on a CPU its single row is computed as a sum: that
    kernel reads weights at 45 GB/s, the library's matmul at 15 (fp32) or 20 (bf16)."""

    def __init__(self, n_in: int, n_out: int, bias: bool = True, std: float | Callable = 0.02, maps=(),
                 group: str = "matrices"):
        super().__init__(n_in, n_out, bias)
        self.specs = {"weight": Spec(std, group, maps), "bias": ZEROS}

    def forward(self, x):
        if torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() == self.in_features:
            row = x.contiguous().as_strided((self.in_features,), (1,))  # stored, not recomputed per output
            y = (self.weight * row).sum(-1)  # (out,)
            return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)  # (1, 1, out)
        return super().forward(x)


RECOMPUTE_BYTES = 2**22  # smaller inputs are not worth the time


def keeping_input(f, x):
    """f(x), which keeps x alone for backward. There f runs again up to its last matmul, whose output nothing
    needs; so f should be cheap up to there, as an activation is."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or x.nbytes < RECOMPUTE_BYTES:
        return f(x)
    return checkpoint(f, x, use_reentrant=False, preserve_rng_state=False, determinism_check="none")


class Embedding(nn.Embedding):
    """nn.Embedding with specs."""

    def __init__(self, rows: int, width: int, std: float = 0.02):
        super().__init__(rows, width)
        self.specs = {"weight": Spec(std, "embeddings")}


class ExpertLinear(nn.Module):
    """E linear maps side by side: weight (E, out, in), bias (E, out)."""

    def __init__(self, n_experts: int, n_in: int, n_out: int, bias: bool, std: float = 0.02, maps=()):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_experts, n_out)) if bias else None
        self.specs = {"weight": Spec(std, "matrices", maps), "bias": ZEROS}

    def forward(self, x, where):
        """x (N, in) -> (N, out). `where`: how many consecutive rows belong to each expert, a list of E
        numbers; or the expert of each row (N,), whose weights are then read once per row."""
        if torch.is_tensor(where):
            y = (self.weight[where] * x[:, None]).sum(-1)  # (N, out)
            return y if self.bias is None else y + self.bias[where]
        biases = [None] * len(where) if self.bias is None else self.bias.unbind()
        parts = zip(x.split(where), self.weight.unbind(), biases, strict=True)
        return torch.cat([F.linear(rows, w, b) for rows, w, b in parts if len(rows)])  # (N, out)


class LowRank(nn.Module):
    """A linear map factorised as in -> rank -> out."""

    def __init__(self, a: nn.Module, b: nn.Module):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x, *where):
        return self.b(self.a(x, *where), *where)


def linear(n_in: int, n_out: int, bias: bool = False, *, std: float = 0.02, zero: bool = False, maps=(),
           rank: int = 0, n_experts: int = 0) -> nn.Module:
    """A linear map, or one per expert; with a rank, factorised. `zero`: the (last) matrix starts at 0."""
    make, factor = functools.partial(ExpertLinear, n_experts) if n_experts else Linear, factor_std(std, rank)
    first = make(n_in, rank, False, factor) if rank else None
    last = make(rank or n_in, n_out, bias, 0.0 if zero else factor, maps)
    return LowRank(first, last) if rank else last


def share(ours: nn.Module, theirs: nn.Module, own=()) -> None:
    """Make the parameters of `ours` those of `theirs`, a module of the same structure, except where a part of
    the name is in `own`. The modules stay separate, so that each use of a matrix is counted."""
    for name, p in theirs.named_parameters():
        path, _, last = name.rpartition(".")
        if not set(own) & set(name.split(".")):
            setattr(ours.get_submodule(path), last, p)


@not_compiled  # it would recompile for each number of rows
def by_expert(pool, x, expert, n_experts: int):
    """pool's output (N, out) for each row of x (N, in) by its expert (N,), all rows of an expert at once."""
    order = expert.argsort(stable=True)
    if isinstance(expert, torch._subclasses.FakeTensor):  # no values, when common/fit.py counts memory
        sizes = [len(x) * (e + 1) // n_experts - len(x) * e // n_experts for e in range(n_experts)]
    else:
        sizes = expert.bincount(minlength=n_experts).tolist()
    # index_select: the gradient of x[order] takes three times as long on a CPU
    return pool(x.index_select(0, order), sizes).index_select(0, order.argsort())


class Router(nn.Linear):
    """Always in float32: a choice between near equals should not depend on bf16's 8 bits (Switch,
    2101.03961)."""

    specs = {"weight": Spec(0.02)}

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


def matmul_weights(model: nn.Module) -> int:
    """How many weights multiply a token: shared matrices count at each use, of a pool's experts one."""
    return sum(m.weight.numel() if isinstance(m, nn.Linear) else m.weight[0].numel()
               for m in model.modules() if isinstance(m, (nn.Linear, ExpertLinear)))
