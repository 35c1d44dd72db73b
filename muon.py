"""Muon for hidden matrices beside AdamW for the rest, in one optimiser; and which parameter belongs where.

    groups = parameter_groups(model, cfg)     # embeddings, head, scalars, matrices: each its learning rate
    optimizer = Muon(groups, lr=cfg.lr, betas=(0.9, 0.95))

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest
orthogonal one: all its directions move equally far, whatever the gradient's scale. It is for matrices that
map activations to activations. Embeddings, the head, routers, norms and biases go by AdamW.
"""
import math

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

# ------------------------------------------------------------------------------------------------------------
# Groups


def parameter_groups(model, cfg) -> list[dict]:
    """Every parameter of an LM in exactly one of four groups, by rule: `embeddings` (tables, and the factor
    of a factorised one), `head` (an untied one), `scalars` (all vectors: norms, biases, scales; routers,
    short convolutions) and `matrices` (those in blocks). Only matrices and the head decay. `peak_lr` is what
    the schedule scales.
    """
    muon, lr, decay = cfg.optimizer == "muon", cfg.lr, cfg.weight_decay
    groups = {name: {"name": name, "params": [], "peak_lr": peak, "lr": peak, "weight_decay": decay,
                     "kind": "adamw" if muon and name != "matrices" else cfg.optimizer}
              for name, peak, decay in (("matrices", cfg.muon_lr if muon else lr, decay),
                                        ("head", cfg.head_lr or lr, decay),
                                        ("embeddings", cfg.embed_lr or lr, 0.0),
                                        ("scalars", cfg.scalar_lr or lr, 0.0))}
    matrices = []
    for name, p in model.named_parameters():
        if p.dim() == 1 or name.endswith(("bias", "conv.weight")) or ".router." in name:
            kind = "scalars"
        elif name.startswith("blocks.") and p.dim() <= 3:  # a pool of experts is (E, rows, cols)
            kind = "matrices"
            matrices.append((name, p))
        elif name.startswith(("embed", "pos_embed")):
            kind = "embeddings"
        elif name.startswith("head"):
            kind = "head"
        else:
            raise AssertionError(f"no parameter group for {name} {tuple(p.shape)}: add a rule here")
        groups[kind]["params"].append(p)
    if muon:
        groups["matrices"]["parts"] = [parts(name, p, cfg) for name, p in matrices]
    return [g for g in groups.values() if g["params"]]


def parts(name: str, p, cfg) -> list[int]:
    """The rows of a matrix that holds several maps, each of which is to be orthogonal for itself: queries,
    keys and values; the gate and what it multiplies."""
    head_size = cfg.d_model // cfg.n_heads
    qkv = [h * head_size for h in (cfg.n_heads, *[cfg.n_kv_heads or cfg.n_heads] * 2)]
    if ".qkv." in name and p.size(-2) == sum(qkv):
        return qkv
    width, d_ff = cfg.context_dim or cfg.d_model, cfg.d_ff or 4 * cfg.d_model
    if ".gates." in name and p.size(-2) in (3 * width, 4 * width) or ".recur." in name:
        return [width] * (p.size(-2) // width)
    if ".up." in name and cfg.activation == "swiglu" and p.size(-2) == 2 * d_ff:
        return [d_ff, d_ff]
    return [p.size(-2)]


# ------------------------------------------------------------------------------------------------------------
# Optimiser


def fast_bf16(device: torch.device) -> bool:
    """Whether products in bf16 are faster than in fp32 there; five steps of the iteration tolerate it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8  # a T4 only emulates it
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and \
        torch.cpu._is_avx512_bf16_supported()


def orthogonalize(g, dtype=torch.float32, steps: int = 5):
    """Matrices (N, rows, cols) with singular values s -> the same singular vectors with values near 1 (0.7 to
    1.2 after 5 steps, where s was not tiny beside the matrix's norm), in `dtype`.

    Each step applies p(s) = 3.4445 s - 4.775 s^3 + 2.0315 s^5 to the singular values, with products alone
    (Newton-Schulz); the coefficients are Jordan's: steepest at 0, not quite convergent at 1."""
    x = g.to(dtype)
    tall = g.size(-2) > g.size(-1)
    if tall:
        x = x.mT  # the products then are of the smaller size
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(steps):
        a = torch.bmm(x, x.mT)  # (N, rows, rows)
        b = torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315)  # (N, rows, rows)
        x = torch.baddbmm(x, b, x, beta=3.4445)  # (N, rows, cols)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Groups with kind "muon" (matrices, or stacks of them) and kind "adamw" (any) in one optimiser.

    muon: m <- momentum m + (1 - momentum) g; the update is (1 - momentum) g + momentum m (Nesterov),
    orthogonalised, times lr sqrt(max(1, rows / cols)), after p <- p (1 - lr weight_decay). A group's
    `parts` lists for each parameter the rows of the maps it holds. adamw: torch's, fused where there is one.

    Under torch.distributed every process keeps all momentum (it costs one pass over the gradients, which are
    the same everywhere) and orthogonalises its share of the matrices. So the state is whole in each process:
    a checkpoint of one holds everything and goes on with any number of them.
    """

    def __init__(self, groups, lr: float = 1e-3, betas=(0.9, 0.95), eps: float = 1e-8,
                 weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                                  "momentum": momentum, "kind": "adamw"})
        for group in self.param_groups:
            if group["kind"] not in ("muon", "adamw"):
                raise ValueError(f"a group's kind is muon or adamw, got {group['kind']!r}")
            if group["kind"] == "adamw":  # `fused` also tells loading where the counter of steps belongs
                group.setdefault("fused", group["params"][0].device.type in ("cpu", "cuda"))
                continue
            if wrong := [tuple(p.shape) for p in group["params"] if p.dim() not in (2, 3)]:
                raise ValueError(f"Muon is for matrices (rows, cols) or stacks of them; got {wrong}")
            group.setdefault("parts", [[p.size(-2)] for p in group["params"]])

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            raise ValueError("Muon takes no closure: compute the gradients, then call step()")
        for group in self.param_groups:
            (self.muon_step if group["kind"] == "muon" else self.adamw_step)(group)

    def muon_step(self, group) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        moments, grads = [self.state[p]["momentum"] for p in params], [p.grad for p in params]
        torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, moments, group["momentum"])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        rows = {id(p): r for p, r in zip(group["params"], group["parts"], strict=True)}
        alike = {}  # shape -> pieces of parameters and of their updates
        for p, update in zip(params, updates, strict=True):
            for pieces in zip(*(x.split(rows[id(p)], dim=-2) for x in (p, update)), strict=True):
                for piece in zip(*(x.unbind() for x in pieces), strict=True) if p.dim() == 3 else [pieces]:
                    alike.setdefault(piece[0].shape, []).append(piece)
        for shape, pieces in alike.items():
            scale = group["lr"] * math.sqrt(max(1, shape[0] / shape[1]))
            pieces, updates = zip(*pieces, strict=True)
            torch._foreach_add_(pieces, self.shared(updates), alpha=-scale)

    def shared(self, updates) -> list:
        """Orthogonalise matrices of one shape in one batch, each process a part of them."""
        device = updates[0].device
        dtype = torch.bfloat16 if fast_bf16(device) else torch.float32
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return list(orthogonalize(torch.stack(updates), dtype).to(updates[0].dtype).unbind())
        rank, world = dist.get_rank(), dist.get_world_size()
        share = -(-len(updates) // world)
        own = torch.zeros(share, *updates[0].shape, dtype=dtype, device=device)
        if mine := updates[rank * share:(rank + 1) * share]:
            own[:len(mine)] = orthogonalize(torch.stack(mine), dtype)
        every = own.new_empty(world * share, *updates[0].shape)
        dist.all_gather_into_tensor(every, own)
        return list(every[:len(updates)].to(updates[0].dtype).unbind())

    def adamw_step(self, group) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if not self.state[p]:
                step = torch.zeros((), device=p.device if group["fused"] else "cpu")
                self.state[p] |= {"step": step, "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}
        first, second, steps = ([self.state[p][key] for p in params]
                                for key in ("exp_avg", "exp_avg_sq", "step"))
        adamw(params, [p.grad for p in params], first, second, [], steps, fused=group["fused"], foreach=False,
              amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
              weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)
