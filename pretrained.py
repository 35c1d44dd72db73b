"""Weights of transformers <-> a run folder, so that every script here works on models from the hub, and back.

    python pretrained.py Qwen/Qwen2.5-0.5B --name=qwen      # a name on the hub, or a folder -> out/qwen
    python pretrained.py Qwen/Qwen2.5-0.5B --dry_run        # parameters and memory, from config.json alone
    python sample.py out/qwen --prompt="The capital of France is"
    python prepare_data.py NOTES.txt --tokenizer_from=out/qwen --name=notes      # text in the model's tokens,
    python train.py --init_from=out/qwen --data=data/notes --max_seq_len=512     # to train it further
    python pretrained.py out/demo --export=demo_hf          # AutoModelForCausalLM.from_pretrained("demo_hf")

Families: GPT-2, Llama, Mistral, Qwen2 (and 2.5), Qwen3, GPT-NeoX (Pythia), OPT. The tables below say which
keys of config.json are which flags of model.py, and which weights are which. What cannot be expressed is
refused, naming the key or flag in the way. Weights keep their dtype, and are the same after a round trip bit
for bit. They are read from safetensors, or from .bin files as data (weights_only), never as code.

Padding rows of a vocabulary (Qwen2.5 has 151,936 rows for 151,665 tokens) are kept and never sampled; the
loss is over all rows, as in transformers. Dropout is not imported: it belongs to training.

config/lm_eval/split.yaml is a task for the lm-evaluation-harness, which runs on an exported folder.
"""
import functools
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import ClassVar, Literal, NamedTuple

from common import checkpoint, tokenizer
from common.chat import format_of
from common.config import Config, ConfigError, UserError, launch
from common.console import say
from common.distributed import DTYPES
from common.files import make_folder, read_json, write_json
from common.tokenizer_export import library_json, tokenizer_config
from common.weights import WeightsError, open_weights, write_safetensors
from model import GATED_ACTIVATIONS, LM, ModelConfig

import torch

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class PretrainedConfig(Config):
    POSITIONAL: ClassVar[str] = "source"
    # what
    source: str = ""  # a name on the hub or a folder of transformers; with --export a run folder or .pt file
    export: str = ""  # write the folder's model here, for transformers
    tokenizer: str = ""  # as for prepare_data.py, if the source has none: hf:NAME_OR_PATH, gpt2:PATH, ...
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the weights written; auto = as they are
    max_seq_len: int = 0  # training context of the run folder, with pos=rope; 0 = the model's
    # where
    name: str = ""  # the run's folder in out_dir; "" = the last part of source
    out_dir: str = "out"  # holds the run folders
    overwrite: bool = False  # replace best.pt, or the exported files
    dry_run: bool = False  # print what the model is and what it needs, and stop

    def problems(self) -> list[str]:
        out = self.at_least(0, "max_seq_len")
        if not self.source:
            out.append("no model named; for example:  python pretrained.py Qwen/Qwen2.5-0.5B --name=qwen")
        if os.path.basename(self.name) != self.name or self.name in (".", ".."):
            out.append(f"name must be a plain folder name, got '{self.name}'")
        if self.export and (self.name or self.max_seq_len):
            out.append("name and max_seq_len are for the import; --export=FOLDER says where to write")
        return out


# ------------------------------------------------------------------------------------------------------------
# The families


class Family(NamedTuple):
    architecture: str
    keys: dict  # key of config.json: our flag, or (our flag, the value where the key is missing or null)
    fixed: dict  # our flags that all its models share
    only: dict  # key: the one value that we can express
    weights: dict  # our module: theirs, several where ours is one matrix
    layers: str  # what precedes a layer's number
    prefix: str  # of all but the head; base models are stored without it
    choices: tuple = (({}, {}),)  # (keys, our flags) that go together, one pair of which must hold
    qkv: str = "rows"  # rows | transposed: all matrices are (in, out) | interleaved: q, k, v of each head
    windows: str = ""  # "" | all: sliding_window is for every layer | types: use_sliding_window, layer_types
    rotary: float | None = None  # share of a head that turns by default, None = always all of it


TRANSFORMER = {"vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "n_layers",
               "num_attention_heads": "n_heads", "max_position_embeddings": "max_seq_len"}
LLAMA_KEYS = TRANSFORMER | {
    "intermediate_size": "d_ff", "num_key_value_heads": ("n_kv_heads", 0), "head_dim": ("head_size", 0),
    "hidden_act": ("activation", "silu"), "rms_norm_eps": ("norm_eps", 1e-6),
    "tie_word_embeddings": ("tie_embeddings", False)}
LLAMA_FIXED = {"pos": "rope", "norm": "rmsnorm", "head_bias": False}
LLAMA_WEIGHTS = {
    "embed": "embed_tokens", "final_norm": "norm", "head": "lm_head",
    "mixer_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
    "mixer.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mixer.proj": "self_attn.o_proj",
    "ff.up": ("mlp.gate_proj", "mlp.up_proj"), "ff.down": "mlp.down_proj"}
NO_BIAS, QKV_BIAS = {"bias": False, "attn_bias": "none"}, {"bias": False, "attn_bias": "qkv"}
ATTN_BIAS, BIAS = {"bias": False, "attn_bias": "all"}, {"bias": True, "attn_bias": "none"}
LAYERNORM_BIASES = (({}, BIAS), ({}, NO_BIAS))  # without biases a model is exported with biases of 0
QWEN3_WEIGHTS = LLAMA_WEIGHTS | {"mixer.q_norm": "self_attn.q_norm", "mixer.k_norm": "self_attn.k_norm"}

FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        keys={"vocab_size": "vocab_size", "n_embd": "d_model", "n_layer": "n_layers", "n_head": "n_heads",
              "n_positions": "max_seq_len", "n_inner": ("d_ff", 0),
              "tie_word_embeddings": ("tie_embeddings", True),
              "activation_function": ("activation", "gelu_new"), "layer_norm_epsilon": ("norm_eps", 1e-5)},
        fixed={"pos": "learned", "norm": "layernorm", "head_bias": False},
        only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
              "add_cross_attention": False},
        weights={"embed": "wte", "pos_embed": "wpe", "final_norm": "ln_f", "head": "lm_head",
                 "mixer_norm": "ln_1", "mixer.qkv": "attn.c_attn", "mixer.proj": "attn.c_proj",
                 "ff_norm": "ln_2", "ff.up": "mlp.c_fc", "ff.down": "mlp.c_proj"},
        layers="h", prefix="transformer.", choices=LAYERNORM_BIASES, qkv="transposed"),
    "llama": Family(
        "LlamaForCausalLM", LLAMA_KEYS, LLAMA_FIXED, {}, LLAMA_WEIGHTS, layers="layers", prefix="model.",
        choices=(({"attention_bias": False, "mlp_bias": False}, NO_BIAS),
                 ({"attention_bias": True, "mlp_bias": False}, ATTN_BIAS),
                 ({"attention_bias": True, "mlp_bias": True}, BIAS))),
    "mistral": Family(
        "MistralForCausalLM", LLAMA_KEYS | {"num_key_value_heads": ("n_kv_heads", 8)},
        LLAMA_FIXED | NO_BIAS, {}, LLAMA_WEIGHTS, layers="layers", prefix="model.", windows="all"),
    "qwen2": Family(
        "Qwen2ForCausalLM", LLAMA_KEYS, LLAMA_FIXED | QKV_BIAS, {}, LLAMA_WEIGHTS, layers="layers",
        prefix="model.", windows="types"),
    "qwen3": Family(
        "Qwen3ForCausalLM", LLAMA_KEYS | {"head_dim": ("head_size", 128)},
        LLAMA_FIXED | {"qk_norm": True, "qk_norm_weights": True}, {}, QWEN3_WEIGHTS, layers="layers",
        prefix="model.", windows="types",
        choices=(({"attention_bias": False}, NO_BIAS), ({"attention_bias": True}, ATTN_BIAS))),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        keys=TRANSFORMER | {
            "intermediate_size": "d_ff", "hidden_act": ("activation", "gelu"),
            "layer_norm_eps": ("norm_eps", 1e-5), "tie_word_embeddings": ("tie_embeddings", False),
            "use_parallel_residual": ("parallel_residual", True)},
        fixed={"pos": "rope", "norm": "layernorm", "head_bias": False}, only={"attention_bias": True},
        weights={"embed": "embed_in", "final_norm": "final_layer_norm", "head": "embed_out",
                 "mixer_norm": "input_layernorm", "mixer.qkv": "attention.query_key_value",
                 "mixer.proj": "attention.dense", "ff_norm": "post_attention_layernorm",
                 "ff.up": "mlp.dense_h_to_4h", "ff.down": "mlp.dense_4h_to_h"},
        layers="layers", prefix="gpt_neox.", choices=LAYERNORM_BIASES, qkv="interleaved", rotary=0.25),
    "opt": Family(
        "OPTForCausalLM",
        keys=TRANSFORMER | {"ffn_dim": "d_ff", "activation_function": ("activation", "relu"),
                            "tie_word_embeddings": ("tie_embeddings", True)},
        fixed={"pos": "learned", "pos_offset": 2, "norm": "layernorm", "head_bias": False},
        only={"do_layer_norm_before": True, "_remove_final_layer_norm": False, "enable_bias": True,
              "layer_norm_elementwise_affine": True},
        weights={"embed": "decoder.embed_tokens", "pos_embed": "decoder.embed_positions",
                 "final_norm": "decoder.final_layer_norm", "head": "lm_head",
                 "mixer_norm": "self_attn_layer_norm",
                 "mixer.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                 "mixer.proj": "self_attn.out_proj", "ff_norm": "final_layer_norm", "ff.up": "fc1",
                 "ff.down": "fc2"},
        layers="decoder.layers", prefix="model.", choices=LAYERNORM_BIASES),
}
# theirs -> ours; ours is exported as the first of its names
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
               "gelu_fast": "gelu_tanh", "relu": "relu", "relu2": "relu2", "silu": "swiglu",
               "swish": "swiglu"}
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.attn(ention)?\.(masked_)?bias$")  # of old versions: no weights


def split_key(entry) -> tuple:
    """(our flag, the default) of an entry of `keys`; ... for a key that config.json must have."""
    return entry if isinstance(entry, tuple) else (entry, ...)


# ------------------------------------------------------------------------------------------------------------
# config.json -> flags


def model_config(config: dict, where: str) -> ModelConfig:
    """The flags for a config.json of transformers 4 or 5. UserError with every obstacle."""
    kind, problems = config.get("model_type"), []
    if kind not in FAMILIES:
        raise UserError(f"{where}: model_type={kind!r} is not a family known here: {', '.join(FAMILIES)}")
    family, flags = FAMILIES[kind], {}
    for key, entry in family.keys.items():
        flag, default = split_key(entry)
        flags[flag] = default if config.get(key) is None else config[key]
        if flags[flag] is ...:
            problems.append(f"{key} is missing")
    flags |= family.fixed
    if flags["activation"] in ACTIVATIONS and is_gated(family, ACTIVATIONS[flags["activation"]]):
        flags["activation"] = ACTIVATIONS[flags["activation"]]
    else:
        fits = [k for k, v in ACTIVATIONS.items() if is_gated(family, v)]
        problems.append(f"the activation {flags['activation']!r} is none of {', '.join(fits)}")
    only = family.only | ({"word_embed_proj_dim": config.get("hidden_size")} if kind == "opt" else {})
    problems += [f"{key}={config[key]!r}, but only {value!r} can be expressed" for key, value in only.items()
                 if config.get(key, value) not in (value, None)]
    given = family.choices[0][0] | {k: config[k] for k in family.choices[0][0] if k in config}
    chosen = [ours for theirs, ours in family.choices if theirs.items() <= given.items()]
    if not chosen:
        problems.append(" with ".join(f"{k}={v}" for k, v in given.items()) + " cannot be expressed")
    flags |= chosen[0] if chosen else {}
    if flags["pos"] == "rope":
        flags |= rope_flags(config, family, problems)
    if family.windows:
        flags |= window_flags(config, family, problems)
    if problems:
        raise UserError(f"{where} ({kind}) cannot be imported:\n  - " + "\n  - ".join(problems))
    for flag, same in (("head_size", flags["d_model"] // flags["n_heads"]), ("n_kv_heads", flags["n_heads"])):
        flags[flag] = 0 if flags.get(flag) == same else flags.get(flag, 0)
    try:
        return ModelConfig(**flags)
    except ConfigError as e:
        raise UserError(f"{where} ({kind}) cannot be imported:\n  - " + "\n  - ".join(e.problems)) from None


def is_gated(family: Family, activation: str) -> bool:
    """Whether the activation has a gate exactly if the family has one."""
    return (activation in GATED_ACTIVATIONS) == isinstance(family.weights["ff.up"], tuple)


def rope_flags(config: dict, family: Family, problems: list[str]) -> dict:
    """transformers 4: rope_theta, rope_scaling, rotary_pct. transformers 5: all in rope_parameters."""
    inner = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    rope = {k: v for k, v in (config | inner).items() if v is not None}
    kind = inner.get("rope_type", inner.get("type", "default"))
    if kind != "default" or any(isinstance(v, dict) for v in inner.values()):
        key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        problems.append(f"{key} of type {kind!r}: scaled or mixed rotary embeddings are not implemented")
    share = rope.get("partial_rotary_factor", rope.get("rotary_pct", family.rotary or 1.0))
    if family.rotary is None and share != 1:
        problems.append(f"partial_rotary_factor={share}, which this family does not have")
    return {"rope_theta": float(rope.get("rope_theta", rope.get("rotary_emb_base", 10000.0))),
            "rope_fraction": float(share)}


def window_flags(config: dict, family: Family, problems: list[str]) -> dict:
    """A window for all layers, for none, or for all but every n-th."""
    W, n = config.get("sliding_window", 4096) or 0, config.get("num_hidden_layers", 0)
    if family.windows == "all":
        types = config.get("layer_types") or ["sliding_attention" if W else "full_attention"] * n
    else:
        first = config.get("max_window_layers", 28)
        types = config.get("layer_types") or [
            "sliding_attention" if config.get("use_sliding_window") and W and i >= first else "full_attention"
            for i in range(n)]
    if set(types) <= {"full_attention"}:
        return {"window": 0}
    for every in (0, *range(2, n + 1)):
        if list(types) == layer_types(n, W, every):
            return {"window": W, "global_every": every}
    problems.append("layer_types (or max_window_layers) mix full and sliding attention in a pattern that "
                    "window and global_every cannot express: every n-th layer full, the others sliding")
    return {}


def layer_types(n_layers: int, window: int, global_every: int) -> list[str]:
    return ["full_attention" if not window or global_every and (i + 1) % global_every == 0 else
            "sliding_attention" for i in range(n_layers)]


# ------------------------------------------------------------------------------------------------------------
# Flags -> config.json

FREE = {"n_tokens", "dropout", "flash", "zero_init"}  # not part of what the weights mean


def obstacles(cfg: ModelConfig, family: Family) -> list[str]:
    """Our flags that this family cannot express."""
    free = {split_key(entry)[0] for entry in family.keys.values()} | FREE
    if family.fixed["pos"] == "rope":
        free |= {"rope_theta"} if family.rotary is None else {"rope_theta", "rope_fraction"}
    free |= {"window"} if family.windows else set()
    free |= {"global_every"} if family.windows == "types" else set()
    chosen = [ours for _, ours in family.choices if all(getattr(cfg, k) == v for k, v in ours.items())]
    free |= set(family.choices[0][1]) if chosen else set()
    same = {"n_kv_heads": cfg.n_heads, "head_size": cfg.d_model // cfg.n_heads}  # as good as 0
    out = []
    for f in fields(ModelConfig):
        value, expected = getattr(cfg, f.name), family.fixed.get(f.name, f.default)
        if f.name not in free and value not in (expected, same.get(f.name, expected)):
            out.append(f"{f.name}={value}, where it has {expected}")
    if not is_gated(family, cfg.activation):
        fits = [a for a in dict.fromkeys(ACTIVATIONS.values()) if is_gated(family, a)]
        out.append(f"activation={cfg.activation}, where it has {' or '.join(fits)}")
    return out


def choose_family(cfg: ModelConfig, first: str = "") -> str:
    """The first family that can express the model, `first` before others. UserError with what stands in the
    way of the nearest one."""
    found = {kind: obstacles(cfg, FAMILIES[kind]) for kind in dict.fromkeys((first, *FAMILIES)) if kind}
    best = min(found, key=lambda kind: len(found[kind]))
    if found[best]:
        raise UserError(f"no family of transformers here can express this model; the nearest, {best}, cannot "
                        "because of:\n  - " + "\n  - ".join(found[best])
                        + "\na model trained with these flags as it has them can be exported")
    return best


def config_of(cfg: ModelConfig, kind: str, extra: dict, dtype: str) -> dict:
    """config.json of transformers 5, with the keys that transformers 4 reads too. `extra`: its other keys."""
    family, flags = FAMILIES[kind], asdict(cfg)
    flags |= {"d_ff": cfg.d_ff or 4 * cfg.d_model, "n_kv_heads": cfg.n_kv_heads or cfg.n_heads,
              "head_size": cfg.head_size or cfg.d_model // cfg.n_heads,
              "activation": next(k for k, v in ACTIVATIONS.items() if v == cfg.activation)}
    out = {**extra, "model_type": kind, "architectures": [family.architecture], "torch_dtype": dtype,
           "dtype": dtype, **family.only}
    out |= {key: flags[split_key(entry)[0]] for key, entry in family.keys.items()}
    out |= next(theirs for theirs, ours in family.choices if all(flags[k] == v for k, v in ours.items()))
    if kind == "opt":
        out["word_embed_proj_dim"] = cfg.d_model
    if cfg.pos == "rope":
        out |= {"rope_theta": cfg.rope_theta, "rope_scaling": None,
                "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta}}
        if family.rotary is not None:
            out["rope_parameters"]["partial_rotary_factor"] = cfg.rope_fraction
            out |= {"rotary_pct": cfg.rope_fraction, "rotary_emb_base": cfg.rope_theta}
    if family.windows:
        out |= {"sliding_window": cfg.window or None}
    if family.windows == "types":
        types = layer_types(cfg.n_layers, cfg.window, cfg.global_every)
        full = types.index("sliding_attention") if "sliding_attention" in types else cfg.n_layers
        out |= {"use_sliding_window": bool(cfg.window), "max_window_layers": full, "layer_types": types}
    return out


# ------------------------------------------------------------------------------------------------------------
# Weights


class Place(NamedTuple):
    """Where one of our parameters is in their file."""
    names: tuple[str, ...]  # theirs, whose rows ours has in this order
    rows: tuple[int, ...]  # of each
    layout: str  # rows | transposed | interleaved
    heads: int  # for interleaved


def places(model: LM, family: Family) -> dict[str, Place]:
    """{our parameter: its place}, shared ones once."""
    out = {}
    for name, p in model.named_parameters():
        layer, module, kind = re.fullmatch(r"(?:trunk\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
        parts = family.weights[module]
        parts, path = parts if isinstance(parts, tuple) else (parts,), name.rpartition(".")[0]
        start = "" if layer is None else f"{family.layers}.{layer}."
        maps = model.get_submodule(path).specs["weight"].maps if len(parts) > 1 else (len(p),)
        layout = "rows"
        if layer is not None and family.qkv == "transposed" and p.dim() == 2:
            layout = "transposed"
        elif module == "mixer.qkv" and family.qkv == "interleaved":
            layout = "interleaved"
        out[name] = Place(tuple(f"{start}{part}.{kind}" for part in parts), maps, layout, model.cfg.n_heads)
    return out


def their_shapes(p, place: Place) -> list[tuple]:
    if place.layout == "transposed":
        return [tuple(p.t().shape)]
    return [(n, *p.shape[1:]) for n in place.rows]


def to_ours(theirs, place: Place):
    """A whole tensor of theirs in our layout: (in, out) -> (out, in); or rows of head 1's q, k, v, head 2's
    q, k, v ... (H 3 D) -> all heads' q, all heads' k, all heads' v (3 H D)."""
    if place.layout == "transposed":
        return theirs.t()
    return theirs.unflatten(0, (place.heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def to_theirs(ours, place: Place):
    if place.layout == "transposed":
        return ours.t()
    if place.layout == "interleaved":
        return ours.unflatten(0, (3, place.heads, -1)).transpose(0, 1).flatten(0, 2)
    return ours


def read_weights(folder: str, model: LM, family: Family, dtype: str) -> dict:
    """{our parameter: tensor} of a model on the meta device: parts of the files' memory maps where possible,
    so the files must not be changed meanwhile. WeightsError that lists what does not fit."""
    source = open_weights(folder)
    names = {name.removeprefix(family.prefix): name for name in source.shapes if not BUFFERS.search(name)}
    wanted, needed = places(model, family), {}
    for name, p in model.named_parameters():
        needed |= dict(zip(wanted[name].names, their_shapes(p, wanted[name]), strict=True))
    tied = family.weights["head"] + ".weight" if model.cfg.tie_embeddings else None
    problems = [f"{n}: missing in the file" for n in needed if n not in names]
    problems += [f"{names[n]}: not in this model" for n in names if n not in needed and n != tied]
    problems += [f"{names[n]}: {source.shapes[names[n]]} in the file, {shape} by config.json"
                 for n, shape in needed.items() if n in names and source.shapes[names[n]] != shape]
    if problems:
        more = f"\n  ... and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise WeightsError(f"the weights in {folder} do not fit its config.json:\n  "
                           + "\n  ".join(problems[:5]) + more)
    stored = [source.dtypes[names[n]] for n in needed]
    kept = functools.reduce(torch.promote_types, stored) if dtype == "auto" else DTYPES[dtype]
    out = {name: read_weight(source, p, place, [names[n] for n in place.names], kept)
           for (name, p), place in zip(model.named_parameters(), wanted.values(), strict=True)}
    if tied in names:
        p = model.embed.weight
        head = read_weight(source, p, Place((tied,), (len(p),), "rows", 0), [names[tied]], kept)
        if not torch.equal(head, out["embed.weight"]):
            raise WeightsError(f"{folder}: {names[tied]} differs from the embedding, but config.json says "
                               "tie_word_embeddings=true; set it to false there to use both")
    source.close()
    return out


def read_weight(source, p, place: Place, names: list[str], dtype):
    """A tensor like the parameter `p` (on the meta device) from their tensors `names`."""
    if place.layout != "rows":
        theirs = torch.empty(their_shapes(p, place)[0], dtype=dtype)
        source.read_into(names[0], theirs)
        return to_ours(theirs, place).contiguous()
    if (mapped := source.mapped(names, dtype)) is not None:
        return mapped
    out = torch.empty(p.shape, dtype=dtype)
    for name, part in zip(names, out.split(place.rows), strict=True):
        source.read_into(name, part)
    return out


def zeros_for(model: LM, family: Family) -> dict:
    """Their biases where ours has none, as zeros: {their name: shape}."""
    if model.cfg.bias or family.choices is not LAYERNORM_BIASES:
        return {}
    out = {}
    for name, place in places(model, family).items():
        if not name.startswith(("embed", "pos_embed", "head")):
            out |= {n.removesuffix("weight") + "bias": (rows,)
                    for n, rows in zip(place.names, place.rows, strict=True)}
    return out


def load(folder: str, dtype: str = "auto") -> LM:
    """The model of a folder of transformers, in eval mode; its weights exist once."""
    config = read_json(os.path.join(folder, "config.json"))
    with torch.device("meta"):
        model = LM(model_config(config, folder))
    weights = read_weights(folder, model, FAMILIES[config["model_type"]], dtype)
    checkpoint.assign_weights(model, with_head(weights, model.cfg), folder)
    return model.eval()


def with_head(weights: dict, cfg: ModelConfig) -> dict:
    return weights | {"head.weight": weights["embed.weight"]} if cfg.tie_embeddings else weights


# ------------------------------------------------------------------------------------------------------------
# Files

CONFIG = "config.json"
EXTRA = "generation_config.json", "tokenizer_config.json"  # kept in the checkpoint, for the way back
WANTED = (CONFIG, *EXTRA, *tokenizer.FILES)


def fetch(source: str, config_only: bool) -> str:
    """The folder `source` itself, or one with the files of this name on the hub."""
    if os.path.exists(path := os.path.expanduser(source)):
        return path
    hub = tokenizer.need("huggingface_hub")
    try:
        if config_only:
            return os.path.dirname(hub.hf_hub_download(source, CONFIG))
        files = [f for f in hub.list_repo_files(source) if "/" not in f]
        end = ".safetensors" if any(f.endswith(".safetensors") for f in files) else ".bin"
        weights = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?" + re.escape(end) + r"(\.index\.json)?")
        return hub.snapshot_download(source, allow_patterns=[
            f for f in files if f in WANTED or weights.fullmatch(f)])
    except Exception as e:  # the library has many kinds of errors
        raise UserError(f"{source} is not a local folder and could not be fetched from the Hugging Face hub "
                        f"({type(e).__name__}: {str(e):.200})\nwithout a network, name a folder that holds "
                        f"{CONFIG}, the weights and tokenizer.json") from None


def read_optional(folder: str, name: str) -> dict:
    path = os.path.join(folder, name)
    return read_json(path) if os.path.exists(path) else {}


def read_config(folder: str) -> dict:
    if not os.path.exists(path := os.path.join(folder, CONFIG)):
        raise UserError(f"no {CONFIG} in {folder}" + (
            "; to write this run for transformers, add --export=FOLDER" if os.path.isfile(
                os.path.join(folder, "best.pt")) else ": expected a folder that transformers wrote"))
    try:
        return read_json(path)
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}); copy it again") from None


def read_tokenizer(cfg: PretrainedConfig, folder: str) -> tokenizer.Tokenizer:
    has = any(os.path.exists(os.path.join(folder, f)) for f in (tokenizer.FILE, "merges.txt"))
    if not has and not cfg.tokenizer:
        raise UserError(f"no {tokenizer.FILE} in {folder}; name a tokenizer with --tokenizer=hf:NAME_OR_PATH "
                        "(or gpt2:PATH/gpt2.tiktoken)")
    tok = tokenizer.open_tokenizer(cfg.tokenizer or f"hf:{folder}")
    if not cfg.tokenizer:
        tok.name = f"hf:{cfg.source}"
    return tok


# ------------------------------------------------------------------------------------------------------------
# Main


def describe(cfg: ModelConfig) -> dict:
    """Print and return parameters and memory, without allocating them."""
    with torch.device("meta"):
        model = LM(cfg)
    n = model.count_parameters()
    heads, size = cfg.n_kv_heads or cfg.n_heads, cfg.head_size or cfg.d_model // cfg.n_heads
    say(f"parameters  {n['total']:,} ({n['non_embedding']:,} without embeddings)\n"
        f"weights     {2e-9 * n['total']:.2f} GB in 16 bits, {4e-9 * n['total']:.2f} GB in fp32\n"
        f"cache       {1e-6 * 1000 * 4 * cfg.n_layers * heads * size:,.1f} MB per 1,000 tokens in 16 bits\n"
        f"training    {16e-9 * n['total']:.2f} GB with AdamW in fp32, and activations: "
        "train.py --dry_run counts them")
    return n


def import_model(cfg: PretrainedConfig) -> dict:
    name = cfg.name or os.path.basename(os.path.normpath(cfg.source))
    target = os.path.join(cfg.out_dir, name)
    if os.path.exists(os.path.join(target, "best.pt")) and not (cfg.overwrite or cfg.dry_run):
        raise UserError(f"{target} already holds a run; replace its best.pt with --overwrite, or use another "
                        "--name")
    folder = fetch(cfg.source, cfg.dry_run)
    config = read_config(folder)
    model_cfg = model_config(config, cfg.source)
    if cfg.max_seq_len and model_cfg.pos == "learned":
        raise UserError(f"max_seq_len={cfg.max_seq_len}: this model has {model_cfg.max_seq_len} learned "
                        "positions; leave it out")
    counts = describe(model_cfg)
    if cfg.dry_run:
        return {"parameters": counts, "config": asdict(model_cfg)}
    tok = read_tokenizer(cfg, folder)
    if tok.vocab_size > model_cfg.vocab_size:
        raise UserError(f"the tokenizer has {tok.vocab_size:,} ids, but the model only "
                        f"{model_cfg.vocab_size:,} rows: they do not belong together")
    with torch.device("meta"):
        model = LM(model_cfg)
    weights = read_weights(folder, model, FAMILIES[config["model_type"]], cfg.dtype)
    flags = replace(model_cfg, n_tokens=tok.vocab_size, max_seq_len=cfg.max_seq_len or model_cfg.max_seq_len)
    make_folder(target)
    tok.save(target)
    checkpoint.save(os.path.join(target, "best.pt"), {
        "model": with_head(weights, model_cfg), "config": asdict(flags) | {"data": ""},
        "tokenizer": {k: getattr(tok, k) for k in ("name", "fingerprint", "vocab_size", "eot")},
        "progress": {"step": 0},
        "pretrained": {CONFIG: config, **{f: read_optional(folder, f) for f in EXTRA}}})
    padding = model_cfg.vocab_size - tok.vocab_size
    say(f"wrote {target}" + f" ({padding:,} padding rows of the vocabulary, never sampled)" * (padding > 0)
        + f"; try it with:  python sample.py {target}")
    return {"folder": target, "parameters": counts, "config": asdict(flags)}


def export_model(cfg: PretrainedConfig) -> dict:
    if os.path.exists(os.path.join(cfg.export, CONFIG)) and not (cfg.overwrite or cfg.dry_run):
        raise UserError(f"{cfg.export} already holds a model; replace it with --overwrite")
    saved = checkpoint.load(cfg.source, ("model", "config", "tokenizer"), mmap=True)
    names = {f.name for f in fields(ModelConfig)}
    model_cfg = ModelConfig(**{k: v for k, v in saved["config"].items() if k in names})
    with torch.device("meta"):
        model = LM(model_cfg)
    checkpoint.assign_weights(model, saved.pop("model"), cfg.source)
    if model_cfg.head_bias and not model.head.bias.any():  # a bias of zeros is none
        model.head.bias, model_cfg = None, replace(model_cfg, head_bias=False)
    origin = saved.get("pretrained", {})
    kind = choose_family(model_cfg, origin.get(CONFIG, {}).get("model_type", ""))
    family = FAMILIES[kind]
    folder = cfg.source if os.path.isdir(cfg.source) else os.path.dirname(cfg.source) or "."
    tok = tokenizer.load(folder)
    ours = {"name": tok.name, "fingerprint": tok.fingerprint}
    checkpoint.check_tokenizer(saved["tokenizer"], cfg.source, ours, folder)
    say(f"{cfg.source} as {kind} ({family.architecture})")
    if cfg.dry_run:
        return {"family": kind, "parameters": describe(model_cfg)}
    if cfg.dtype != "auto":
        model.to(DTYPES[cfg.dtype])
    make_folder(cfg.export)
    write_export(cfg.export, model, replace(model_cfg, n_tokens=model.n_tokens), kind, tok, origin)
    say(f'wrote {cfg.export}; load it with:  AutoModelForCausalLM.from_pretrained("{cfg.export}")')
    return {"folder": cfg.export, "family": kind}


def write_export(folder: str, model: LM, cfg: ModelConfig, kind: str, tok, origin: dict) -> None:
    """The weights, config.json last, so that a folder with it is whole."""
    family, tensors, dtype = FAMILIES[kind], {}, model.embed.weight.dtype
    own, head = dict(model.named_parameters()), family.weights["head"] + ".weight"
    for name, place in places(model, family).items():
        tensors |= dict(zip(place.names, to_theirs(own[name].detach(), place).split(
            place.rows if place.layout == "rows" else own[name].numel()), strict=True))
    tensors |= {name: torch.zeros(shape, dtype=dtype) for name, shape in zeros_for(model, family).items()}
    write_safetensors(os.path.join(folder, "model.safetensors"), {
        name if name == head else family.prefix + name: t for name, t in tensors.items()})
    write_json(os.path.join(folder, tokenizer.FILE), library_json(tok))
    write_json(os.path.join(folder, "tokenizer_config.json"), tokenizer_settings(cfg, tok, origin))
    generation = generation_settings(tok, origin)
    if cfg.n_tokens < cfg.vocab_size:  # padding rows of the vocabulary
        generation["suppress_tokens"] = list(range(cfg.n_tokens, cfg.vocab_size))
    write_json(os.path.join(folder, "generation_config.json"), generation)
    written = settings(cfg, kind, tok, origin.get(CONFIG, {}), str(dtype).removeprefix("torch."))
    write_json(os.path.join(folder, CONFIG), written)


def settings(cfg: ModelConfig, kind: str, tok, theirs: dict, dtype: str) -> dict:
    """The content of config.json: the original, `theirs`, but for what training has changed."""
    if theirs.get("model_type") != kind:
        ids = {"bos_token_id": tok.eot, "eos_token_id": tok.eot, "pad_token_id": None}
        return config_of(cfg, kind, ids, dtype)
    was = model_config(theirs, CONFIG)
    if cfg.pos == "rope":  # training on shorter texts does not shorten its context
        cfg = replace(cfg, max_seq_len=max(cfg.max_seq_len, was.max_seq_len))
    before, now = config_of(was, kind, {}, ""), config_of(cfg, kind, {}, dtype)
    return now | {k: v for k, v in theirs.items() if k != "architectures" and now.get(k) == before.get(k)}


def tokenizer_settings(cfg: ModelConfig, tok, origin: dict) -> dict:
    """The content of tokenizer_config.json: the original, unless chat tokens were added."""
    ours, theirs = tokenizer_config(tok, cfg.max_seq_len), origin.get("tokenizer_config.json")
    if not theirs or isinstance(tok, tokenizer.Chat):
        return ours
    return {k: v for k, v in ours.items() if k == "chat_template"} | theirs


def generation_settings(tok, origin: dict) -> dict:
    """The content of generation_config.json: the original. A model that learned to answer here stops where
    an answer ends, too."""
    ids = {"bos_token_id": tok.eot, "eos_token_id": tok.eot}
    ids |= {k: v for k, v in origin.get(CONFIG, {}).items() if k in (*ids, "pad_token_id")}
    out = origin.get("generation_config.json") or ids
    if origin.get("chat") or isinstance(tok, tokenizer.Chat):
        ends = out.get("eos_token_id", tok.eot)
        ends = [*(ends if isinstance(ends, list) else [ends]), format_of(tok).stop]
        out["eos_token_id"] = list(dict.fromkeys(ends))
    return out


def main(cfg: PretrainedConfig) -> dict:
    return export_model(cfg) if cfg.export else import_model(cfg)


if __name__ == "__main__":
    launch(main, PretrainedConfig)
