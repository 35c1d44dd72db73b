"""One optimiser step in two leaf functions; what an experiment changes stands between them in its own loop.

    loss = backward(net, batches, dist, dtype, scaler)      # gradients of the whole step, on all processes
    norm = update(model, optimizer, scaler, clip, loss)     # clipped and applied, or NotFinite

The loss of a step is the sum over its counted targets divided by their number, over all micro-batches and
processes: nothing depends on how the batch was cut, or on where masked targets fell.
"""
import contextlib
import importlib.util
import math

from common.config import UserError
from common.distributed import Dist, autocast

import torch
from torch.nn.parallel import DistributedDataParallel


class NotFinite(UserError):
    """A loss or gradient that is not finite; nothing was applied."""


def choose_compile(compile: str, flops: float, device) -> tuple[bool, str]:
    """(whether to compile; the reason), for a run of so many FLOPs."""
    if compile != "auto":
        return compile == "true", "as asked"
    if device.type != "cuda":
        return False, "saves nothing here"  # measured on CPU: the loss and attention are not compiled anyway
    if not importlib.util.find_spec("triton"):
        return False, "triton is not installed"
    # a minute of compiling against a fifth or more of the time; small GPUs reach about 1e13 FLOP/s
    return (True, "a long run") if flops > 5e15 else (False, "the run is too short to earn it back")


def wrap(model, compiled: bool, dist: Dist):
    """The model as backward() calls it: compiled, and in DDP under torchrun."""
    net = torch.compile(model) if compiled else model
    if dist.grouped:
        own = [dist.device.index] if dist.device.type == "cuda" else None
        net = DistributedDataParallel(net, device_ids=own, gradient_as_bucket_view=True)
    return net


def next_token_loss(net, x, y, state=None):
    """(mean loss over the counted targets, the state after them) of net(x, y, state)."""
    return net(x, y, state)


def backward(net, batches: list[tuple], dist: Dist, dtype: str, scaler, *, loss_of=next_token_loss,
             seeds=None, tbptt: int = 0):
    """Add up the gradients of one optimiser step; returns its mean loss over all processes, a tensor in
    float64 for which nothing has waited yet.

    batches: this process's micro-batches (x (B, T), y (B, T), more if loss_of takes more); targets y of -1 do
    not count. loss_of(net, x, y, ..., state=None) -> (mean over the counted targets of this micro-batch,
    state). seeds: of the random generator before each micro-batch, so that dropout is a function of the
    samples. tbptt: tokens to back-propagate through at a time, while net's state is carried on; 0 = all. """
    device, mean = dist.device, 0.0
    pieces = [(i, *piece) for i, batch in enumerate(batches)
              for piece in zip(*(part.split(tbptt or part.size(1), dim=1) for part in batch), strict=True)]
    counts = torch.stack([(y >= 0).sum() for _, _, y, *_ in pieces]).float()  # a large step has 2^20 targets
    shares = counts * dist.world / dist.reduce(counts.sum()).to(device).clamp(min=1)  # DDP averages
    for n, (i, *piece) in enumerate(pieces):
        if n == 0 or i != pieces[n - 1][0]:  # a new micro-batch
            if seeds is not None:
                torch.manual_seed(seeds[i])
            state = unwrap(net).init_state() if tbptt else None
        last = n == len(pieces) - 1
        with contextlib.nullcontext() if last or not dist.grouped else net.no_sync():
            with autocast(dtype, device):
                loss, state = loss_of(net, *piece, state=state)
            scaler.scale(loss * shares[n]).backward()
        mean = mean + loss.detach() * shares[n]
    return dist.reduce(mean.double() / dist.world)


def unwrap(net):
    """The model inside torch.compile and DDP."""
    net = getattr(net, "module", net)
    return getattr(net, "_orig_mod", net)


def update(model, optimizer, scaler, grad_clip: float, loss) -> float:
    """Clip the gradients at this norm (0 = not), apply and drop them; returns their norm before. NotFinite,
    and nothing applied, if the loss or the norm is not (with loss scaling an infinite norm skips the
    step)."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item()
    loss = float(loss)
    if not math.isfinite(loss) or not (scaler.is_enabled() or math.isfinite(norm)):
        raise NotFinite(f"loss {loss}, gradient norm {norm}; not applied")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_gradients(model) -> None:
    """A guard for the first step: whatever is to be trained must have received a gradient."""
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, f"parameters without a gradient: {idle}"
