"""Model flags that contradict each other, or that the chosen mixer would ignore: named, with what to type."""


def model_problems(cfg, core) -> list[str]:
    """All that is wrong with the flags of a ModelConfig. `core`: its mixer's class, which says what it
    `refuses` (flags that must keep their default) and `needs`."""
    out = cfg.at_least(1, "max_seq_len", "d_model", "n_layers", "n_heads") + cfg.at_least(
        0, "vocab_size", "n_tokens", "n_kv_heads", "d_ff", "window", "global_every", "embed_rank",
        "n_unique_blocks", "adapter_rank", "proj_rank", "qkv_share", "n_experts", "expert_balance",
        "context_dim", "short_conv")
    return out or core_problems(cfg, core) + sharing_problems(cfg) + rank_problems(cfg) + number_problems(cfg)


def core_problems(cfg, core) -> list[str]:
    needs = dict(core.needs)
    if cfg.gated and cfg.tie_embeddings and cfg.head_width != (cfg.embed_rank or cfg.d_model):
        needs["tie_embeddings"] = False  # the head's input is d_ff wide
    needs |= {name: type(cfg).default(name) for name in sorted(core.refuses)}
    wrong = [f"--{name}={value}" for name, value in needs.items() if getattr(cfg, name) != value]
    kind = f"mixer={cfg.mixer}" + f" with context_update={cfg.context_update}" * (cfg.mixer == "context")
    out = [f"{kind} needs {' '.join(wrong)}"] if wrong else []
    if "n_kv_heads" in core.refuses:
        pass  # a mixer without heads
    elif cfg.d_model % cfg.n_heads:
        fits = min((h for h in range(1, min(cfg.d_model, 4096) + 1) if cfg.d_model % h == 0),
                   key=lambda h: abs(h - cfg.n_heads))
        out.append(f"n_heads={cfg.n_heads} does not divide d_model={cfg.d_model}; n_heads={fits} does")
    elif cfg.pos == "rope" and cfg.d_model // cfg.n_heads % 2:
        out.append("pos=rope rotates pairs, but the head size d_model/n_heads="
                   f"{cfg.d_model // cfg.n_heads} is odd")
    if cfg.n_kv_heads and cfg.n_heads % cfg.n_kv_heads:
        out.append(f"n_kv_heads={cfg.n_kv_heads} does not divide n_heads={cfg.n_heads}")
    if cfg.global_every and not cfg.window:
        out.append(f"global_every={cfg.global_every} is set, but window=0 makes every layer global")
    return out


def sharing_problems(cfg) -> list[str]:
    out, unique = [], cfg.n_unique_blocks or cfg.n_layers
    if cfg.n_unique_blocks > cfg.n_layers:
        out.append(f"n_unique_blocks={cfg.n_unique_blocks} is more than n_layers={cfg.n_layers}")
    if cfg.qkv_share and unique % cfg.qkv_share:
        out.append(f"qkv_share={cfg.qkv_share} does not divide the {unique} blocks (n_unique_blocks, or else "
                   "n_layers)")
    if cfg.n_experts == 1:
        out.append("n_experts=1 leaves nothing to choose; use 2 or more, or 0 for one feed-forward per layer")
    if cfg.expert_balance != type(cfg).default("expert_balance") and not cfg.n_experts:
        out.append(f"expert_balance={cfg.expert_balance} is set, but n_experts=0 has nothing to balance")
    return out


def rank_problems(cfg) -> list[str]:
    C, d_ff, out = cfg.d_model, cfg.d_ff or 4 * cfg.d_model, []
    for name, a, b in (("adapter_rank", C, C), ("proj_rank", C, C), ("proj_rank", C, d_ff),
                       ("embed_rank", cfg.vocab_size, C)):
        if getattr(cfg, name) * (a + b) >= a * b > 0:
            out.append(f"{name}={getattr(cfg, name)} saves nothing on a matrix of {a} x {b}; use at most "
                       f"{(a * b - 1) // (a + b)}, or 0 for none")
    return out


def number_problems(cfg) -> list[str]:
    out = []
    if not 0 <= cfg.dropout < 1:
        out.append(f"dropout must be in [0, 1), got {cfg.dropout}")
    if cfg.rope_theta != type(cfg).default("rope_theta") and cfg.pos != "rope":
        out.append(f"rope_theta={cfg.rope_theta} is set, but pos={cfg.pos} does not use it")
    if not 0 < cfg.rope_theta < float("inf"):
        out.append(f"rope_theta must be a positive number, got {cfg.rope_theta}")
    if cfg.vocab_size and cfg.n_tokens > cfg.vocab_size:
        out.append(f"n_tokens={cfg.n_tokens} is more than vocab_size={cfg.vocab_size}")
    return out
