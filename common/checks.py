"""Model flags that contradict each other or that the mixer would ignore: named, with what to type instead."""


def model_problems(cfg, core) -> list[str]:
    """What is wrong with the flags of a ModelConfig. `core` is its mixer's class, with the flags it `refuses`
    (they must keep their defaults) and those it `needs`."""
    out = cfg.at_least(1, "max_seq_len", "d_model", "n_layers", "n_heads") + cfg.at_least(
        0, "vocab_size", "n_tokens", "n_kv_heads", "head_size", "d_ff", "window", "global_every",
        "embed_rank", "n_unique_blocks", "adapter_rank", "proj_rank", "qkv_share", "n_experts",
        "expert_balance", "short_conv", "context_dim", "pos_offset")
    if getattr(cfg, "init_from", "") and not cfg.n_tokens:  # most of it is in that checkpoint, not read yet
        return out
    return out or [text for wrong, text in (*core_rules(cfg, core), *bias_rules(cfg), *sharing_rules(cfg),
                                            *number_rules(cfg)) if wrong]


def core_rules(cfg, core):
    """Yield (whether the rule is broken, what to say then), as the next three do."""
    needs = dict(core.needs)
    if cfg.gated and cfg.tie_embeddings and cfg.head_width != (cfg.embed_rank or cfg.d_model):
        needs["tie_embeddings"] = False  # the head's input is d_ff wide
    needs |= {name: getattr(type(cfg), name) for name in sorted(core.refuses)}
    wrong = [f"--{name}={value}" for name, value in needs.items() if getattr(cfg, name) != value]
    kind = f"mixer={cfg.mixer}" + f" with context_update={cfg.context_update}" * (cfg.mixer == "context")
    yield wrong, f"{kind} needs {' '.join(wrong)}"
    C, H = cfg.d_model, cfg.n_heads
    if "n_kv_heads" not in core.refuses:  # the mixer has heads
        fits = min((h for h in range(1, min(C, 4096) + 1) if C % h == 0), key=lambda h: abs(h - H))
        fitting = cfg.head_size or C % H == 0
        yield not fitting, f"n_heads={H} does not divide d_model={C}; n_heads={fits} does, or set head_size"
        what = f"head_size={cfg.head_size}" if cfg.head_size else f"head size d_model/n_heads={C // H}"
        part = f"the part rope_fraction={cfg.rope_fraction} of " * (cfg.rope_fraction != 1)
        yield (cfg.pos == "rope" and fitting and (cfg.rope_size % 2 or cfg.rope_size < 1),
               f"pos=rope rotates pairs, but {part}the {what} is " + (f"{cfg.rope_size}" if part else "odd"))
    yield cfg.n_kv_heads and H % cfg.n_kv_heads, f"n_kv_heads={cfg.n_kv_heads} does not divide n_heads={H}"
    yield (cfg.global_every and not cfg.window,
           f"global_every={cfg.global_every} is set, but window=0 makes every layer global")


def bias_rules(cfg):
    yield (cfg.attn_bias != "none" and cfg.bias,
           f"attn_bias={cfg.attn_bias} is set, but bias=True puts biases everywhere already; use bias=False")
    yield (cfg.attn_bias != "none" and cfg.qkv_share,
           f"attn_bias={cfg.attn_bias} is set, but with qkv_share each layer has a shift of its own already")


def sharing_rules(cfg):
    unique, C, d_ff = cfg.n_unique_blocks or cfg.n_layers, cfg.d_model, cfg.d_ff or 4 * cfg.d_model
    yield (cfg.n_unique_blocks > cfg.n_layers,
           f"n_unique_blocks={cfg.n_unique_blocks} is more than n_layers={cfg.n_layers}")
    yield (cfg.qkv_share and unique % cfg.qkv_share,
           f"qkv_share={cfg.qkv_share} does not divide the {unique} blocks (n_unique_blocks or n_layers)")
    yield (cfg.n_experts == 1,
           "n_experts=1 leaves nothing to choose; use 2 or more, or 0 for one feed-forward per layer")
    yield (cfg.expert_balance != type(cfg).expert_balance and not cfg.n_experts,
           f"expert_balance={cfg.expert_balance} is set, but n_experts=0 has nothing to balance")
    for name, a, b in (("adapter_rank", C, C), ("proj_rank", C, C), ("proj_rank", C, d_ff),
                       ("embed_rank", cfg.vocab_size, C)):
        yield (getattr(cfg, name) * (a + b) >= a * b > 0,
               f"{name}={getattr(cfg, name)} saves nothing on a matrix of {a} x {b}; use at most "
               f"{(a * b - 1) // (a + b)}, or 0 for none")


def number_rules(cfg):
    yield (cfg.qk_norm_weights and not cfg.qk_norm, "qk_norm_weights is set, but qk_norm=False has no norms")
    yield not 0 < cfg.norm_eps < 1, f"norm_eps must be in (0, 1), got {cfg.norm_eps}"
    yield not 0 <= cfg.dropout < 1, f"dropout must be in [0, 1), got {cfg.dropout}"
    yield (cfg.rope_theta != type(cfg).rope_theta and cfg.pos != "rope",
           f"rope_theta={cfg.rope_theta} is set, but pos={cfg.pos} does not use it")
    yield (cfg.rope_fraction != 1 and cfg.pos != "rope",
           f"rope_fraction={cfg.rope_fraction} is set, but pos={cfg.pos} does not use it")
    yield not 0 < cfg.rope_fraction <= 1, f"rope_fraction must be in (0, 1], got {cfg.rope_fraction}"
    yield (cfg.pos_offset and cfg.pos != "learned",
           f"pos_offset={cfg.pos_offset} is set, but pos={cfg.pos} has no table of positions")
    yield not 0 < cfg.rope_theta < float("inf"), f"rope_theta must be a positive number, got {cfg.rope_theta}"
    yield (cfg.vocab_size and cfg.n_tokens > cfg.vocab_size,
           f"n_tokens={cfg.n_tokens} is more than vocab_size={cfg.vocab_size}")
