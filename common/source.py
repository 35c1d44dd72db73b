"""What a run starts from: the architecture and the optimiser's moments of another checkpoint."""
import copy
import os
from dataclasses import fields, replace

from common import checkpoint
from common.config import ConfigError, UserError

FREE = {"dropout", "window", "global_every", "flash", "expert_balance", "rope_theta"}  # change no shape


def architecture(config: dict, kind) -> dict:
    """The options of `kind` (ModelConfig) in a saved config; one that it lacks had its default."""
    return {f.name: config.get(f.name, f.default) for f in fields(kind)}


def own_checkpoint(cfg) -> str:
    """The checkpoint that the run of this config would resume from; "" for a new run."""
    names = () if cfg.overwrite else ("last.pt", "best.pt")
    paths = (os.path.join(cfg.out_dir, cfg.name, name) for name in names)
    return next(filter(os.path.exists, paths), "")


def inherit(cfg, kind, meta: dict | None):
    """`cfg` with the options of `kind` that the user did not set as in the run's own checkpoint, else as in
    `init_from`: a run that is resumed does not need its source. ConfigError for options set otherwise than in
    `init_from`, unless they change no shape; UserError for data, described by `meta`, in other tokens."""
    own = own_checkpoint(cfg)
    source = checkpoint.load(own or cfg.init_from, ("model", "config", "tokenizer"), mmap=True)
    theirs = architecture(source["config"], kind)
    if meta and not own:
        checkpoint.check_tokenizer(source["tokenizer"], cfg.init_from, meta["tokenizer"], cfg.data, new=True)
    free = FREE | ({"max_seq_len"} if theirs["pos"] != "learned" else set())
    unset = [k for k in theirs if not cfg.sets(k) or k in ("vocab_size", "n_tokens") and not getattr(cfg, k)]
    taken = {k: theirs[k] for k in unset}
    wrong = [f"{k}={getattr(cfg, k)}, but {cfg.init_from} has {k}={v}: leave the option out, or init_from"
             for k, v in theirs.items() if k not in taken and k not in free and getattr(cfg, k) != v]
    if wrong and not own:  # Run.find() says how a config differs from the run's own
        raise ConfigError(wrong)
    return replace(cfg, **taken)


def carry_moments(optimizer, source: dict, path: str, kind: str) -> None:
    """Give `optimizer`, which is a `kind`, the moments saved in the checkpoint `source`, read from `path`.
    UserError if there are none that fit."""
    has = source["config"].get("optimizer", "adamw")
    problem = "it was written without an optimiser's state" if "optimizer" not in source else \
        f"its moments are those of optimizer={has}, not {kind}" if has != kind else \
        "its moments are those of LoRA's matrices" if source["config"].get("lora_rank") else ""
    if problem:
        raise UserError(f"carry_optimizer: {path}: {problem}; leave --carry_optimizer out for fresh moments")
    load_moments(optimizer, source["optimizer"])


def load_moments(optimizer, state: dict) -> None:
    """Load a saved optimiser's state; learning rates and other settings stay the optimiser's own."""
    own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(copy.deepcopy(state))
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
