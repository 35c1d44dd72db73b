"""One optimiser step as two leaf functions; an experiment's loop puts its own code between them.

    loss = backward(net, batches, dist, dtype, scaler)      # gradients of the whole step, on all processes
    norm = update(model, optimizer, scaler, clip, loss)     # clipped and applied, or NotFinite

The loss of a step is the sum over its counted targets divided by their number, across all micro-batches and
processes. It does not depend on how the batch was split or where masked targets fell.
"""
import contextlib
import importlib.util
import math

from common.config import UserError
from common.distributed import Dist, autocast

import torch
from torch.nn.parallel import DistributedDataParallel


class NotFinite(UserError):
    """The loss or gradient is not finite; the update was not applied."""


def choose_compile(compile: str, flops: float, device) -> tuple[bool, str]:
    """(whether to compile, the reason), for a run that costs this many FLOPs."""
    if compile != "auto":
        return compile == "true", "as asked"
    if device.type != "cuda":
        return False, "no gain here"  # measured on CPU; the loss and attention are not compiled anyway
    if not importlib.util.find_spec("triton"):
        return False, "triton is not installed"
    # compiling takes a minute and saves a fifth or more; small GPUs reach about 1e13 FLOP/s
    return (True, "a long run") if flops > 5e15 else (False, "the run is too short to gain")


def wrap(model, compiled: bool, dist: Dist):
    """The model for backward(): compiled if asked, in DDP under torchrun."""
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
    """Accumulate the gradients of one optimiser step. Returns its mean loss over all processes, a float64
    tensor that has not waited for the GPU.

    batches: this process's micro-batches (x (B, T), y (B, T), and whatever else loss_of takes); targets y of
    -1 do not count. loss_of(net, x, y, ..., state=None) -> (mean over the micro-batch's counted targets,
    state); if that mean is a vector, its first entry is trained on, and a vector of the same means is
    returned. seeds: for the random generator before each micro-batch, so that dropout is a function of the
    samples. tbptt: tokens to back-propagate through at a time, carrying net's state along; 0 = all."""
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
            trained = loss[0] if loss.dim() else loss
            scaler.scale(trained * shares[n]).backward()
        mean = mean + loss.detach() * shares[n]
    return dist.reduce(mean.double() / dist.world)


def unwrap(net):
    """The model inside torch.compile and DDP."""
    net = getattr(net, "module", net)
    return getattr(net, "_orig_mod", net)


def update(model, optimizer, scaler, grad_clip: float, loss) -> float:
    """Clip the gradients to this norm (0 = no clipping), apply and clear them; returns their norm before
    clipping. Raises NotFinite, with nothing applied, if the loss or the norm is not finite (with loss scaling
    the scaler skips a step with infinite gradients instead)."""
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
    """A guard for the first step: every trainable parameter must have received a gradient."""
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, f"parameters without a gradient: {idle}"
