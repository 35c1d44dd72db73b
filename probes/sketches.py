"""Sketches: where the weights go and where each loop's gradient points, in a thousand numbers.

A sketch adds every entry, with a random sign, into one of SIZE random buckets (the count sketch of Charikar,
Chen and Farach-Colton, 2002). It is linear, so a difference of sketches is the sketch of the difference, and
the cosine of two sketches is that of the vectors up to about 1 / sqrt(SIZE) = 0.03.
"""
from probes.loops import Loops, text_of

import torch

SIZE = 1024


@torch.no_grad()
def sketch(tensors) -> list[float]:
    """Of a list of tensors, taken as one vector: SIZE numbers. Buckets and signs are always the same."""
    generator, out = torch.Generator().manual_seed(0), torch.zeros(SIZE, dtype=torch.float64)
    for z in tensors:
        z = z.detach().flatten().cpu().double()
        drawn = torch.randint(2 * SIZE, z.shape, generator=generator)  # of bucket and sign
        out.index_add_(0, drawn % SIZE, torch.where(drawn < SIZE, z, -z))
    return [round(v, 7) for v in out.tolist()]


def gradients(model, loops: Loops, device) -> list[list[float]]:
    """Sketches (K, SIZE) of the gradient of the loss on each loop's text, in fp32, without dropout."""
    trained, training, out = [p for p in model.parameters() if p.requires_grad], model.training, []
    model.eval()
    for x, y in zip(*text_of(loops, device), strict=True):  # (rows, T) each
        found = torch.autograd.grad(model(x, y)[0], trained, allow_unused=True)
        out.append(sketch(torch.zeros_like(p) if g is None else g
                          for g, p in zip(found, trained, strict=True)))
    model.train(training)
    return out
