"""Optimisers, parameter groups and schedules: Muon for hidden matrices with AdamW for the rest, AdamW, SGD.

    optimizer = make_optimizer(model, cfg)                # cfg has the options of OptimizerConfig
    lr = set_learning_rates(optimizer, cfg, step, steps)  # before each step

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest
orthogonal matrix, so that all directions move equally far, whatever the gradient's scale. It is for matrices
that map activations to activations; embeddings, head, routers, norms and biases go to AdamW. To add an
optimiser, write a function like `sgd_of` and add it to OPTIMIZERS.
"""
import math
from dataclasses import dataclass
from typing import Literal

from common.config import Config
from common.layers import declared

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class OptimizerConfig(Config):
    # optimiser
    optimizer: "Literal[tuple(OPTIMIZERS)]" = "adamw"  # adamw | muon (with adamw for non-matrices) | sgd
    lr: float = 1e-3  # peak learning rate
    muon_lr: float = 0.02  # for Muon's matrices
    embed_lr: float = 0.0  # for embeddings; 0 = lr
    head_lr: float = 0.0  # for an untied head; 0 = lr
    scalar_lr: float = 0.0  # for norms, biases, other vectors and routers; 0 = lr
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"  # cosine | linear | constant | wsd
    warmup_steps: int = 0  # steps of linear warm-up
    min_lr_ratio: float = 0.1  # final learning rate of cosine, linear and wsd, as a fraction of lr
    decay_fraction: float = 0.2  # wsd (warm-up, stable, decay): the last fraction, in which lr decays
    weight_decay: float = 0.1  # of matrices and an untied head; embeddings, norms and biases have none
    beta1: float = 0.9  # decay of Adam's first moment, or SGD's momentum
    beta2: float = 0.95  # decay of Adam's second moment
    muon_momentum: float = 0.95  # Muon's final momentum, ...
    muon_warmup_steps: int = 300  # ... reached from 0.85 in this many steps
    grad_clip: float = 1.0  # largest gradient norm; 0 = no clipping

    def problems(self) -> list[str]:
        out = super().problems() + self.at_least(
            0, "lr", "muon_lr", "embed_lr", "head_lr", "scalar_lr", "warmup_steps", "muon_warmup_steps",
            "weight_decay", "grad_clip")
        out += [f"{key} must be between 0 and 1, got {getattr(self, key)}"
                for key in ("min_lr_ratio", "decay_fraction") if not 0 <= getattr(self, key) <= 1]
        return out + [f"{key} must be at least 0 and below 1, got {getattr(self, key)}"
                      for key in ("beta1", "beta2", "muon_momentum") if not 0 <= getattr(self, key) < 1]


# ------------------------------------------------------------------------------------------------------------
# Groups, optimiser, schedule


def parameter_groups(model, cfg: OptimizerConfig) -> list[dict]:
    """Each trained parameter in exactly one of four groups, as its layer declares (common/layers.py):
    `matrices`, an untied `head`, `embeddings`, `scalars` (norms, biases, other vectors, routers). Only
    matrices and the head have weight decay. The schedule scales `peak_lr`; `parts` lists for each of Muon's
    matrices the rows of the maps in it."""
    muon, lr, decay = cfg.optimizer == "muon", cfg.lr, cfg.weight_decay
    groups = {name: {"name": name, "params": [], "peak_lr": peak, "lr": peak, "weight_decay": decay,
                     "kind": "adamw" if muon and name != "matrices" else cfg.optimizer}
              for name, peak, decay in (("matrices", cfg.muon_lr if muon else lr, decay),
                                        ("head", cfg.head_lr or lr, decay),
                                        ("embeddings", cfg.embed_lr or lr, 0.0),
                                        ("scalars", cfg.scalar_lr or lr, 0.0))}
    if muon:
        groups["matrices"]["parts"] = []
    for _, p, spec in declared(model):
        if not p.requires_grad:  # frozen, by LoRA
            continue
        groups[spec.group]["params"].append(p)
        if muon and spec.group == "matrices":
            groups["matrices"]["parts"].append(list(spec.maps) or [p.size(-2)])
    grouped, total = (sum(p.numel() for p in ps) for ps in (
        [p for g in groups.values() for p in g["params"]],
        [p for p in model.parameters() if p.requires_grad]))
    assert grouped == total, f"{grouped:,} of {total:,} parameters are in optimiser groups"
    return [g for g in groups.values() if g["params"]]


def adamw_of(groups: list[dict], cfg: OptimizerConfig, fused: bool):
    return torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), fused=fused)


def muon_of(groups: list[dict], cfg: OptimizerConfig, fused: bool):
    return Muon(groups, betas=(cfg.beta1, cfg.beta2))


def sgd_of(groups: list[dict], cfg: OptimizerConfig, fused: bool):
    return torch.optim.SGD(groups, momentum=cfg.beta1, fused=fused)


OPTIMIZERS = {"adamw": adamw_of, "muon": muon_of, "sgd": sgd_of}


def make_optimizer(model, cfg: OptimizerConfig) -> torch.optim.Optimizer:
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return OPTIMIZERS[cfg.optimizer](parameter_groups(model, cfg), cfg, fused)


def describe_groups(groups: list[dict]) -> list[str]:
    lines = ["optimiser   group       tensors  parameters  by       learning rate  weight decay"]
    for g in groups:
        size = sum(p.numel() for p in g["params"])
        lines.append(f"            {g['name']:<10} {len(g['params']):8,} {size:11,}  {g['kind']:<6} "
                     f"{g['peak_lr']:15g} {g['weight_decay']:13g}")
    return lines


def lr_fraction(step: int, cfg: OptimizerConfig, steps: int) -> float:
    """The fraction of each group's peak learning rate that step 0 .. steps - 1 uses."""
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)  # 0 .. 1 after the warm-up
    if cfg.schedule == "constant":
        return 1.0
    if cfg.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    elif cfg.schedule == "linear":
        left = 1 - done
    elif cfg.schedule == "wsd":
        left = min(1.0, (1 - step / steps) / max(cfg.decay_fraction, 1e-9))
    else:
        raise NotImplementedError(f"schedule={cfg.schedule}")
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * left


def set_learning_rates(optimizer, cfg: OptimizerConfig, step: int, steps: int) -> float:
    """Set every group's learning rate, and Muon's momentum, for step 0 .. steps - 1. Returns the rate of
    groups whose peak is cfg.lr."""
    fraction = lr_fraction(step, cfg, steps)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * fraction
        if group["kind"] == "muon":
            warm = min(1.0, step / max(1, cfg.muon_warmup_steps))
            group["momentum"] = 0.85 + (cfg.muon_momentum - 0.85) * warm
    return cfg.lr * fraction


# ------------------------------------------------------------------------------------------------------------
# Muon


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matmuls are faster than fp32 ones there; the five iterations tolerate bf16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8  # a T4 only emulates it
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and \
        torch.cpu._is_avx512_bf16_supported()


def orthogonalize(g, dtype=torch.float32, steps: int = 5):
    """Matrices (N, rows, cols) -> the same singular vectors with singular values near 1 (0.7 to 1.2 after 5
    steps, except for values tiny beside the matrix's norm), in `dtype`.

    Each step applies p(s) = 3.4445 s - 4.775 s^3 + 2.0315 s^5 to the singular values, by matmuls alone
    (Newton-Schulz). The coefficients are Jordan's: steep at 0, not quite convergent at 1."""
    x = g.to(dtype)
    tall = g.size(-2) > g.size(-1)
    if tall:
        x = x.mT  # so that x x^T is of the smaller size
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(steps):
        a = torch.bmm(x, x.mT)  # (N, rows, rows)
        b = torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315)  # (N, rows, rows)
        x = torch.baddbmm(x, b, x, beta=3.4445)  # (N, rows, cols)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Groups of kind "muon" (matrices, or stacks of them) and kind "adamw" (anything) in one optimiser.

    muon: m <- momentum m + (1 - momentum) g. The update (1 - momentum) g + momentum m (Nesterov) is
    orthogonalised and scaled by lr sqrt(max(1, rows / cols)), after p <- p (1 - lr weight_decay). A group's
    `parts` lists for each parameter the rows of the maps in it. adamw: torch's, fused where available.

    Under torch.distributed every process keeps all momentum (one pass over the gradients, which are the same
    everywhere) and orthogonalises its share of the matrices. Each process thus has the whole state: any of
    them can save a checkpoint, and any number can resume from it.
    """

    def __init__(self, groups, lr: float = 1e-3, betas=(0.9, 0.95), eps: float = 1e-8,
                 weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                                  "momentum": momentum, "kind": "adamw"})
        for group in self.param_groups:
            if group["kind"] not in ("muon", "adamw"):
                raise ValueError(f"a group's kind is muon or adamw, got {group['kind']!r}")
            if group["kind"] == "adamw":  # load_state_dict reads `fused` to place the step counters
                group.setdefault("fused", group["params"][0].device.type in ("cpu", "cuda"))
                continue
            if wrong := [tuple(p.shape) for p in group["params"] if p.dim() not in (2, 3)]:
                raise ValueError(f"Muon is for matrices (rows, cols) or stacks of them; got {wrong}")
            group.setdefault("parts", [[p.size(-2)] for p in group["params"]])

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            raise ValueError("Muon takes no closure; compute the gradients, then call step()")
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
        """Orthogonalise matrices of one shape as one batch; each process does a share of them."""
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
