"""Turning one vector to a target cosine with another. Vectors are lists of tensors: a model's gradients, the
changes of its weights, its displacement from where it began.

    new = steered(g, r, c, "global", generator)     # |new| = |g|, cos(new, r) = c

With u = r / |r| and n the unit vector along what g has across u, new = |g| (c u + sqrt(1 - c^2) n): of all
vectors of g's norm at that cosine, the closest to g. Target cosines of gradients are GradVac's idea (ICLR
2021, 2010.05874); there a multiple of r is added, and the norm grows without bound as c nears 1.

Scope "global" takes the list as one vector, "tensor" steers each tensor by its counterpart. Sums are float64.
"""
import math

import torch

AS_IT_IS = 1e-6  # a cosine this close to the target is left alone
PARALLEL = 1e-8  # of g's squared norm, across r: below it float32 has lost the direction


def products(g: list, r: list, scope: str) -> list[tuple[float, float, float]]:
    """(g.g, g.r, r.r) of each tensor or, with scope "global", of the whole."""
    if scope == "global":
        g, r = ([torch.cat([x.flatten() for x in z])] for z in (g, r))  # one call instead of one per tensor
    elif scope != "tensor":
        raise NotImplementedError(f"scope={scope}")
    pairs = [(x.flatten().double(), y.flatten().double()) for x, y in zip(g, r, strict=True)]
    found = torch.stack([p for x, y in pairs for p in (x.dot(x), x.dot(y), y.dot(y))]).tolist()
    return list(zip(found[::3], found[1::3], found[2::3], strict=True))


def cosines(g: list, r: list, scope: str) -> list[float]:
    """One of each tensor, or of the whole; nan where a vector is 0, or a tensor is a single number."""
    found = [gr / math.sqrt(gg * rr) if gg * rr else math.nan for gg, gr, rr in products(g, r, scope)]
    return found if scope == "global" else [math.nan if x.numel() == 1 else phi
                                            for x, phi in zip(g, found, strict=True)]


def law(phi: float, c: float) -> float:
    """cos(arccos phi - arccos c): the share of a gradient step's first-order decrease of the loss that is
    left when it is turned from the cosine phi to c. 1 at c = phi; for phi = 0, sqrt(1 - c^2)."""
    return phi * c + math.sqrt(max(0.0, 1 - phi * phi) * (1 - c * c))


def turn(gg: float, gr: float, rr: float, c: float) -> tuple[float, float] | None:
    """(a, b) such that a g + b r has g's norm and the cosine c with r. (1, 0) if g is to stay: it has that
    cosine, or g or r is 0. None if g has no direction across r."""
    if not gg * rr or abs(gr / math.sqrt(gg * rr) - c) <= AS_IT_IS:
        return 1.0, 0.0
    across = gg - gr * gr / rr  # squared norm of g's part across r
    if across <= PARALLEL * gg:
        return (0.0, c * math.sqrt(gg / rr)) if abs(c) == 1 else None
    a = math.sqrt(gg * (1 - c * c) / across)
    return a, (math.sqrt(gg) * c - a * gr / math.sqrt(rr)) / math.sqrt(rr)


@torch.no_grad()
def steered(g: list, r: list, c: float, scope: str, generator: torch.Generator) -> list:
    """The list g turned to the cosine c with r. A tensor that is to stay is returned itself, as is a single
    number with scope "tensor". Where g is parallel to r, the generator draws a direction across r."""
    if scope == "global":
        whole, other = (torch.cat([x.flatten() for x in z]) for z in (g, r))
        [new] = steered([whole], [other], c, "tensor", generator)
        pieces = new.split([x.numel() for x in g])
        return g if new is whole else [z.view_as(x) for z, x in zip(pieces, g, strict=True)]
    out = []
    for x, y, dots in zip(g, r, products(g, r, scope), strict=True):
        found = turn(*dots, c) if x.numel() > 1 else (1.0, 0.0)
        if found is None:
            noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            out += steered([noise * (x.norm() / noise.norm())], [y], c, scope, generator)
        else:
            a, b = found
            out.append(x if found == (1.0, 0.0) else torch.add(x, y, alpha=b / a).mul_(a) if a else y * b)
    return out
