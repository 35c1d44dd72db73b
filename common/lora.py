"""Low-rank adaptation (LoRA, 2106.09685): a trained trunk's matrices stay, a small change of each trains.

    model = lora.wrap(LM(cfg), rank=8, alpha=16)  # y = W x + (alpha / rank) B A x, with W frozen and B = 0
    weights = lora.merged(model.state_dict())     # W + (alpha / rank) B A in W's place, as without LoRA

The Linear layers of the trunk that declare the group `matrices` get A (rank, in) and B (out, rank), low-rank
factors included; layers that share a matrix share its A and B. Embeddings, head, norms, biases and routers
are frozen. Checkpoints hold W, A and B; checkpoint.load_weights merges them for a model without LoRA. `peft`
does not fit: it needs transformers, and its layers would lose what ours declare (`specs`)."""
from common.layers import ZEROS, Linear, Spec

import torch
import torch.nn as nn
import torch.nn.functional as F

PARTS = ("lora_a", "lora_b", "lora_scale")


class LoraLinear(Linear):
    """`layer` with its own weight and bias, plus A, B and the scale of their product."""

    def __init__(self, layer: Linear, a: nn.Parameter, b: nn.Parameter, scale: torch.Tensor):
        with torch.device("meta"):  # the weights made here are replaced at once
            super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.weight, self.bias, self.lora_a, self.lora_b = layer.weight, layer.bias, a, b
        self.register_buffer("lora_scale", scale)
        maps = layer.specs["weight"].maps
        self.specs = layer.specs | {"lora_a": Spec(layer.in_features ** -0.5, "matrices"),
                                    "lora_b": ZEROS._replace(group="matrices", maps=maps)}

    def forward(self, x):
        change = F.linear(F.linear(x, self.lora_a), self.lora_b)  # (..., out)
        return super().forward(x) + self.lora_scale.to(change.dtype) * change


def option_problems(cfg) -> list[str]:
    """What contradicts cfg.lora_rank, whatever the model."""
    if not cfg.lora_rank:
        return []
    out = [f"lora_alpha must be above 0, got {cfg.lora_alpha}"] if not cfg.lora_alpha > 0 else []
    if cfg.embed_lr or cfg.head_lr or cfg.scalar_lr:
        out.append("embed_lr, head_lr and scalar_lr have no use: lora_rank trains matrices alone")
    return out


def model_problems(cfg) -> list[str]:
    """What about the model contradicts cfg.lora_rank."""
    if not cfg.lora_rank or not (cfg.n_experts or cfg.gated or cfg.mixer == "lstm"):
        return []
    what = f"n_experts={cfg.n_experts}" if cfg.n_experts else f"mixer={cfg.mixer}"
    return [f"lora_rank: the matrices of {what} are read by a kernel of its own, past LoRA; train everything"]


@torch.no_grad()
def wrap(model, rank: int, alpha: float):
    """`model` with LoRA in place: all it had is frozen, A is random (torch's generator) and B zero."""
    model.requires_grad_(False)
    made = {}  # weight -> its A, B and scale
    for name, layer in list(model.trunk.named_modules()):
        if not isinstance(layer, Linear) or layer.specs["weight"].group != "matrices":
            continue
        w = layer.weight
        if w not in made:
            a = w.new_empty(rank, w.size(1)).normal_(0, w.size(1) ** -0.5)
            b = w.new_zeros(w.size(0), rank)
            made[w] = nn.Parameter(a), nn.Parameter(b), w.new_tensor(alpha / rank)
        parent, _, own = name.rpartition(".")
        setattr(model.trunk.get_submodule(parent), own, LoraLinear(layer, *made[w]))
    return model


def is_lora(name: str) -> bool:
    return name.rpartition(".")[2] in PARTS


def merged(weights: dict) -> dict:
    """A state dict without LoRA's tensors, their change added to the matrices; others as they are."""
    out = {name: w for name, w in weights.items() if not is_lora(name)}
    for name in filter(lambda n: n.endswith(".lora_a"), weights):
        at = name.removesuffix("lora_a")
        a, b, scale = (weights[at + part].float() for part in PARTS)
        out[at + "weight"] = (out[at + "weight"] + scale * b @ a).to(out[at + "weight"].dtype)
    return out
