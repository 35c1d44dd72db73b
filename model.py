"""Every architecture nanoMem trains, by flags: the file to hack.

    from model import LM, ModelConfig
    model = LM(ModelConfig(vocab_size=50257, d_model=128, n_layers=4, n_heads=8))
    loss, _ = model(tokens, targets)                      # (B, T), (B, T) -> scalar
    for token in model.generate(prompt, 100): ...         # (B, T) -> (B, 1) per step, with a KV cache

LM = embedding -> trunk -> final norm -> head. The trunk is a stack of blocks, x + mixer(norm(x)) and then
x + ff(norm(x)), or the gated context vector, a loop over tokens. To try another mixer, write a class like
Attention and add it to MIXERS. A layer declares in `specs` how its parameters start and which maps a matrix
holds (common/layers.py). Not architecture, so elsewhere: decoding (common/generation.py), fast attention
(common/attention.py), checks for contradictory flags (common/checks.py).

Shapes: B batch, T tokens of this call, S tokens they may see (T plus the cached ones), C width (d_model), H
heads, G key/value heads, D head size (head_size or C / H), R the part RoPE turns, W window, F feed-forward
width (d_ff), K context width (context_dim), E experts, V vocabulary
"""
import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from common import checkpoint, generation, int8, layers
from common.attention import causal_mask, fast_attention, is_slower
from common.checks import model_problems
from common.config import Config
from common.distributed import DTYPES
from common.generation import DecodingState, KVCache, RecurrentState
from common.head_loss import cross_entropy
from common.layers import ONES, ZEROS, Embedding, Linear, Spec, factor_std, linear, share
from common.recurrence import gated_loop, linear_scan, one_by_one, step_by_step

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recomputed

NORMS = {"layernorm": lambda width, eps, bias: nn.LayerNorm(width, eps, bias=bias),
         "rmsnorm": lambda width, eps, bias: nn.RMSNorm(width, eps)}
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "relu2": lambda h: F.relu(h).square(),
               "gelu_tanh": lambda h: F.gelu(h, approximate="tanh")}
GATED_ACTIVATIONS = {"swiglu": F.silu}  # act(gate) * h

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class ModelConfig(Config):
    # model
    vocab_size: int = 0  # rows of the embedding table; 0 = the tokenizer's vocabulary
    n_tokens: int = 0  # ids the tokenizer has; rows above are padding, never sampled; 0 = vocab_size
    max_seq_len: int = 512  # training context in tokens; rows of the position table with pos=learned
    d_model: int = 128  # width C of the residual stream
    n_layers: int = 4  # blocks; for the gated context, ReLU layers inside its loop
    mixer: "Literal[tuple(MIXERS)]" = "attention"  # attention | context | lstm (fixed-size states)
    context_update: "Literal[tuple(MIXERS['context'])]" = "gated"  # gated | scan: gates read the token alone
    context_dim: int = 0  # width K of the context vector or the LSTM's state; 0 = d_model
    short_conv: int = 0  # causal convolution over this many tokens before each mixer; 0 = none
    n_heads: int = 4  # attention heads H
    n_kv_heads: int = 0  # key/value heads G (grouped queries); 0 = n_heads
    head_size: int = 0  # size D of a head; 0 = d_model / n_heads
    d_ff: int = 0  # hidden width of the feed-forward; 0 = 4 * d_model
    activation: Literal[(*ACTIVATIONS, *GATED_ACTIVATIONS)] = "gelu"  # gelu[_tanh] | relu | relu2 | swiglu
    n_unique_blocks: int = 0  # layer i reuses the weights of layer i mod n; 0 = no reuse
    adapter_rank: int = 0  # each layer adds 0.1 * (C -> rank -> C) of its input, never shared; 0 = none
    proj_rank: int = 0  # matrices of mixer and feed-forward factorised as in -> rank -> out; 0 = full rank
    qkv_share: int = 0  # this many consecutive blocks share a QKV matrix, each scales and shifts it; 0 = none
    n_experts: int = 0  # feed-forwards in one pool for all layers, one used per token; 0 = no pool
    expert_balance: float = 0.01  # weight of the loss that keeps the experts evenly loaded
    embed_rank: int = 0  # embedding factorised as V x rank, rank x C, and the head likewise; 0 = V x C
    parallel_residual: bool = False  # mixer and feed-forward both read the block's input, and are summed
    norm: Literal[tuple(NORMS)] = "layernorm"  # layernorm | rmsnorm: before mixer, feed-forward, head
    norm_eps: float = 1e-5  # added to the variance in these norms
    bias: bool = True  # biases on linear layers and LayerNorm
    attn_bias: Literal["none", "qkv", "all"] = "none"  # with bias=False: biases in attention, on qkv or all
    head_bias: bool = True  # a bias of size V on the logits
    tie_embeddings: bool = True  # head and embedding share one matrix
    pos: Literal["learned", "rope", "none"] = "learned"  # learned | rope (no length limit) | none
    pos_offset: int = 0  # row of position 0 in the table of learned positions
    rope_theta: float = 10000.0  # base of RoPE's wavelengths
    rope_fraction: float = 1.0  # share of each head, from its start, that RoPE turns
    qk_norm: bool = False  # normalise queries and keys per head
    qk_norm_weights: bool = False  # with weights and norm_eps; else without weights, torch's epsilon
    attn_scale: bool = False  # learnable factor per head on the scores, 1 at the start
    attn_sink: bool = False  # learnable score per head for an extra key without a value
    window: int = 0  # tokens a local layer sees, the query's own included; 0 = every layer sees all
    global_every: int = 0  # with a window: every n-th layer sees all tokens; 0 = none does
    flash: bool = True  # fused attention, O(T) memory; false = written out, the same numbers
    zero_init: bool = False  # matrices that write to the residual stream start at zero
    dropout: float = 0.0  # on the embedding, the attention weights and each block's two outputs

    @property
    def core(self) -> type[nn.Module]:
        """The mixer's class; for the gated context the class of the whole trunk."""
        mixer = MIXERS[self.mixer]
        return mixer[self.context_update] if isinstance(mixer, dict) else mixer

    @property
    def gated(self) -> bool:
        return self.core is GatedContext

    @property
    def rope_size(self) -> int:
        """Dimensions of a head that RoPE turns."""
        return int((self.head_size or self.d_model // self.n_heads) * self.rope_fraction)

    @property
    def head_width(self) -> int:
        """Width of the head's input."""
        return self.embed_rank or (self.d_ff or 4 * self.d_model if self.gated else self.d_model)

    def problems(self) -> list[str]:
        return super().problems() + model_problems(self, self.core)


# ------------------------------------------------------------------------------------------------------------
# Attention


def attention(q, k, v, window: int, filled, dropout: float, sink):
    """Softmax attention, written out: q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D). The queries are
    the last T of the S tokens; each sees itself and what came before, at most `window` tokens. A single query
    sees all keys, or the slots of a ring cache that are `filled` (1, S). `sink` (H,) scores one more key,
    whose value is 0, so that a head need not attend to anything (gpt-oss, 2508.10925)."""
    (B, H, T, D), (_, G, S, _) = q.shape, k.shape
    mask = filled if T == 1 else causal_mask(T, S, window if window < S else 0, q.device)
    if T == 1:  # the queries of a group become rows of one matmul
        q = q.view(B, G, H // G, D)
    elif G < H:
        k, v = k.repeat_interleave(H // G, dim=1), v.repeat_interleave(H // G, dim=1)  # (B, H, S, D)
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if sink is not None:
        sink = sink.view(1, q.size(1), -1, 1).to(scores.dtype)  # (1, H, 1, 1); for T = 1: (1, G, H/G, 1)
        scores = torch.cat((scores, sink.expand(*scores.shape[:-1], 1)), dim=-1)  # (B, H, T, S + 1)
    weights = scores.softmax(dim=-1, dtype=torch.float32)[..., :S].to(v.dtype)  # (B, H, T, S)
    return (F.dropout(weights, dropout) @ v).view(B, H, T, D)


class Attention(nn.Module):
    """Causal self-attention with grouped queries: each of G key/value heads serves H/G query heads. With a
    window a token sees itself and the window - 1 before it, in O(T W) time and memory.

    A mixer maps (B, T, C) to (B, T, C), looks only backward, and keeps what decoding needs in a state of its
    own (common/generation.py). `refuses` names the flags it would ignore, `needs` those it depends on.
    """

    refuses, needs = ("context_dim", "context_update"), {}

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        sees_all = cfg.global_every and (layer + 1) % cfg.global_every == 0
        self.cfg, self.window = cfg, 0 if sees_all else cfg.window
        self.n_heads, self.n_kv_heads = cfg.n_heads, cfg.n_kv_heads or cfg.n_heads
        self.head_size = cfg.head_size or cfg.d_model // cfg.n_heads
        self.sizes = tuple(n * self.head_size for n in (self.n_heads, self.n_kv_heads, self.n_kv_heads))
        biased = (cfg.bias or cfg.attn_bias != "none") and not cfg.qkv_share
        self.qkv = linear(cfg.d_model, sum(self.sizes), biased, maps=self.sizes, rank=cfg.proj_rank)
        self.qkv_scale, self.qkv_bias = (nn.Parameter(torch.empty(sum(self.sizes))) if cfg.qkv_share else None
                                         for _ in range(2))
        self.proj = residual_linear(cfg, self.sizes[0], bias=cfg.bias or cfg.attn_bias == "all")
        self.q_norm = make_norm(cfg, self.head_size, bias=False) if cfg.qk_norm_weights else None
        self.k_norm = make_norm(cfg, self.head_size, bias=False) if cfg.qk_norm_weights else None
        self.scale = nn.Parameter(torch.empty(self.n_heads)) if cfg.attn_scale else None  # (H,)
        self.sink = nn.Parameter(torch.empty(self.n_heads)) if cfg.attn_sink else None  # (H,)
        self.specs = {"qkv_scale": ONES, "qkv_bias": ZEROS, "scale": ONES, "sink": ZEROS}
        self.watch = None  # called with q and k as they are scored (common/matching.py)

    def init_state(self) -> KVCache:
        return KVCache(self.window)

    def forward(self, x, rope, state: KVCache | None):
        B, T, _ = x.shape
        qkv = self.qkv(x)  # (B, T, H D + 2 G D)
        if self.qkv_scale is not None:
            qkv = torch.addcmul(self.qkv_bias.to(qkv.dtype), qkv, self.qkv_scale.to(qkv.dtype))
        q, k, v = qkv.split(self.sizes, dim=-1)
        q = q.view(B, T, self.n_heads, self.head_size).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_kv_heads, self.head_size).transpose(1, 2)  # (B, G, T, D)
        v = v.view(B, T, self.n_kv_heads, self.head_size).transpose(1, 2)  # (B, G, T, D)
        if self.q_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        elif self.cfg.qk_norm:
            norm = F.rms_norm if self.cfg.norm == "rmsnorm" else F.layer_norm
            q, k = norm(q, (self.head_size,)).to(v.dtype), norm(k, (self.head_size,)).to(v.dtype)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if self.scale is not None:
            q = q * self.scale[:, None, None].to(q.dtype)  # (B, H, T, D)
        if self.watch is not None:
            self.watch(q, k)
        filled = None
        if state is not None:
            k, v = state.append(k, v)  # (B, G, S, D)
            filled = state.filled()  # (1, S) or None
        attend = fast_attention if self.cfg.flash and not is_slower(q, filled, self.sink) else attention
        y = attend(q, k, v, self.window, filled, self.cfg.dropout if self.training else 0.0, self.sink)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)

    def extra_flops(self, seq_len: int) -> int:
        """Forward and backward per token, beyond matmuls with weights; not halved for the causal mask, as in
        published MFU figures (PaLM, appendix B); min(T, W) keys."""
        return 12 * self.sizes[0] * min(self.window or seq_len, seq_len)


def rope_angles(positions, size: int, theta: float):
    """cos and sin (T, R/2) of positions (T,) for the R = `size` dimensions of a head that turn: pair i by
    positions * theta^(-2i/R) (RoFormer, 2104.09864). Always in float32: bf16 cannot tell position 256 from
    257."""
    exponents = torch.arange(0, size, 2, device=positions.device).float() / size  # (R/2,)
    angles = positions.float()[:, None] * theta ** -exponents  # (T, R/2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i + R/2}), i < R/2, of x (B, H, T, D) by its angle: the half-split layout of
    Llama and Qwen. The last D - R dimensions stay."""
    half, rest = cos.size(-1), x.size(-1) - 2 * cos.size(-1)
    a, b, *rest = x.float().split((half, half, rest) if rest else half, dim=-1)  # (B, H, T, R/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin, *rest), dim=-1).to(x.dtype)  # (B, H, T, D)


# ------------------------------------------------------------------------------------------------------------
# Recurrent mixers

ATTENTION_FLAGS = ("n_kv_heads", "head_size", "attn_bias", "qkv_share", "qk_norm", "qk_norm_weights",
                   "attn_scale", "attn_sink", "window", "global_every")


class ContextScan(nn.Module):
    """c_t = f_t c_{t-1} + (1 - f_t) u_t, where the gate f and the candidate u depend on the token alone: a
    linear recurrence, computed for all positions at once (minGRU, 2410.01201). It is read through a third
    gate, silu(o_t) c_t: without it the recall probe learned nothing. Deeper layers read what those below
    remember."""

    refuses, needs = ATTENTION_FLAGS, {"pos": "none"}  # the state itself encodes order
    init_state = RecurrentState
    unseen_memory = 1.1  # memory of the scan's buffers, which autograd's hooks do not see; measured

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.width = cfg.context_dim or cfg.d_model
        self.gates = linear(cfg.d_model, 3 * self.width, std=cfg.d_model ** -0.5, maps=(self.width,) * 3,
                            rank=cfg.proj_rank)  # f, u, o
        self.forget_bias = nn.Parameter(torch.empty(self.width))  # (K,)
        self.proj = residual_linear(cfg, self.width)
        longest = math.log10(max(2, cfg.max_seq_len))

        def half_lives(p):  # of 1 to max_seq_len tokens, log-uniform
            return p.copy_(torch.logit(0.5 ** torch.logspace(0, -longest, len(p), device=p.device)))

        self.specs = {"forget_bias": Spec(half_lives)}

    def forward(self, x, rope, state: RecurrentState | None):
        f, u, o = self.gates(x).chunk(3, dim=-1)  # (B, T, K) each
        f, u = torch.sigmoid(f.float() + self.forget_bias), u.float()  # float32, since they add up over T
        c = state.tensors[0] if state and state.tensors else u.new_zeros(u.size(0), self.width)  # (B, K)
        y = linear_scan(f, (1 - f) * u, c)  # (B, T, K)
        if state:
            state.tensors = (y[:, -1].detach().clone(),)  # a view would keep all of y alive
        return self.proj(F.silu(o) * y.to(o.dtype))  # (B, T, C)


class LSTM(nn.Module):
    """torch's LSTM of width K and a matmul back to C."""

    refuses, needs = (*ATTENTION_FLAGS, "context_update", "proj_rank"), {"pos": "none"}
    init_state = RecurrentState
    unseen_memory = 1.5  # activations that autograd's hooks do not see: measured 1.36 in fp32, 1.6 in bf16

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.width = cfg.context_dim or cfg.d_model
        maps, std = (self.width,) * 4, self.width ** -0.5  # input, forget, cell, output
        self.gates = Linear(cfg.d_model, 4 * self.width, cfg.bias, cfg.d_model ** -0.5, maps)
        self.recur = Linear(self.width, 4 * self.width, False, std, maps)
        self.proj = residual_linear(cfg, self.width)
        # forget gates start open (Jozefowicz et al., 2015)
        self.gates.specs["bias"] = Spec(lambda p: p.zero_()[self.width:2 * self.width].fill_(1.0))

    def forward(self, x, rope, state: RecurrentState | None):
        zeros = x.new_zeros(x.size(0), self.width)
        h, c = (s.to(x.dtype) for s in (state and state.tensors or (zeros, zeros)))  # (B, K) each
        if one_by_one(x, self.gates):
            y, h, c = step_by_step(self.step, x, h, c)  # (B, T, K), (B, K) each
        else:
            weights = [self.gates.weight, self.recur.weight]
            if self.gates.bias is not None:
                weights += [self.gates.bias, torch.zeros_like(self.gates.bias)]  # torch wants two biases
            y, h, c = torch.lstm(x, (h[None], c[None]), weights, has_biases=len(weights) == 4, num_layers=1,
                                 dropout=0.0, train=self.training, bidirectional=False, batch_first=True)
            h, c = h[0], c[0]  # (B, K) each; y is (B, T, K)
        if state:
            state.tensors = (h.detach(), c.detach())
        return self.proj(y)  # (B, T, C)

    def step(self, x, h, c):
        """One token: x (B, C), h and c (B, K) -> the next h and c."""
        gates = (self.gates(x[:, None]) + self.recur(h[:, None]))[:, 0]  # (B, 4 K)
        i, f, g, o = gates.chunk(4, dim=-1)  # (B, K) each
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class ShortConv(nn.Module):
    """A causal convolution over the last few tokens, separately for each channel; it starts as the identity.
    Mixers that compare tokens one by one need it to see pairs (Zoology, 2312.04927)."""

    unseen_memory = 1.28  # gradients of its shifted copies: measured 1.18 in fp32, 1.39 in bf16

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.taps = cfg.short_conv
        self.weight = nn.Parameter(torch.empty(self.taps, cfg.d_model))
        self.specs = {"weight": Spec(lambda p: p.zero_()[-1].fill_(1.0))}

    def forward(self, x, state):
        """x (B, T, C) -> (B, T, C)"""
        T = x.size(1)
        if state is None or state.past is None:
            seen = F.pad(x, (0, 0, self.taps - 1, 0))  # (B, taps - 1 + T, C)
        else:
            seen = torch.cat((state.past, x), dim=1)
        if state is not None:
            state.past = seen[:, T:].detach().clone()  # (B, taps - 1, C)
        weights = self.weight.to(x.dtype)
        return sum(weights[i] * seen[:, i:i + T] for i in range(self.taps))


# ------------------------------------------------------------------------------------------------------------
# Blocks


class FeedForward(nn.Module):
    """With experts a pool of them: `where` then says which rows go to which (see layers.ExpertLinear)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        d_ff = cfg.d_ff or 4 * cfg.d_model
        self.gated = cfg.activation in GATED_ACTIVATIONS
        self.activation = (GATED_ACTIVATIONS if self.gated else ACTIVATIONS)[cfg.activation]
        maps = (d_ff, d_ff) if self.gated else (d_ff,)
        self.up = linear(cfg.d_model, sum(maps), cfg.bias, maps=maps, rank=cfg.proj_rank,
                         n_experts=cfg.n_experts)
        self.down = residual_linear(cfg, d_ff, cfg.n_experts)

    def forward(self, x, *where):
        h = self.up(x, *where)  # (..., F), or (..., 2F) with a gate
        if isinstance(self.down, Linear):  # one matmul; else recomputing would repeat others
            return layers.keeping_input(self.activated, h)
        return self.activated(h, *where)

    def activated(self, h, *where):
        if self.gated:
            gate, h = h.chunk(2, dim=-1)
            return self.down(self.activation(gate) * h, *where)
        return self.down(self.activation(h), *where)


class Experts(nn.Module):
    """p_e * FFN_e(x) for the most probable expert e of each token, p = softmax(router(x)) (Switch,
    2101.03961). No token is dropped, so that decoding token by token equals one pass."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.router = layers.Router(cfg.d_model, cfg.n_experts, bias=False)
        self.pool = FeedForward(cfg)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C), and in training each sequence's balance loss (B,), which is 1 for evenly
        loaded experts. Switch takes it over the batch; per sequence it does not depend on the micro-batch."""
        p = self.router(x).softmax(dim=-1)  # (B, T, E)
        p_best, expert = p.max(dim=-1)  # (B, T) each
        rows, where = x.flatten(0, 1), expert.flatten()  # (B * T, C), (B * T,)
        if torch.compiler.is_compiling() and x.size(1) == 1:  # sizes that depend on data do not compile
            y = self.pool(rows, where)  # (B * T, C)
        else:
            y = layers.by_expert(self.pool, rows, where, p.size(-1))  # (B * T, C)
        y = (y.view(x.shape) * p_best[..., None]).to(x.dtype)  # (B, T, C)
        if not self.training:
            return y, None
        load = F.one_hot(expert, p.size(-1)).float().mean(dim=1)  # (B, E)
        return y, (load * p.mean(dim=1)).sum(dim=-1)  # (B,)


def residual_linear(cfg: ModelConfig, n_in: int, n_experts: int = 0, bias=None) -> nn.Module:
    """A map to the residual stream, smaller at the start in deeper models, so that the stream's variance does
    not grow with depth (GPT-2)."""
    bias = cfg.bias if bias is None else bias
    return linear(n_in, cfg.d_model, bias, std=0.02 / math.sqrt(2 * cfg.n_layers), zero=cfg.zero_init,
                  rank=cfg.proj_rank, n_experts=n_experts)


def make_norm(cfg: ModelConfig, width: int = 0, bias=None) -> nn.Module:
    norm = NORMS[cfg.norm](width or cfg.d_model, cfg.norm_eps, cfg.bias if bias is None else bias)
    norm.specs = {"weight": ONES, "bias": ZEROS}
    return norm


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.mixer_norm, self.conv = make_norm(cfg), ShortConv(cfg) if cfg.short_conv else None
        self.mixer = cfg.core(cfg, layer)
        self.ff_norm, self.ff = make_norm(cfg), Experts(cfg) if cfg.n_experts else FeedForward(cfg)
        self.adapter = linear(cfg.d_model, cfg.d_model, std=0.02 / math.sqrt(2 * cfg.n_layers), zero=True,
                              rank=cfg.adapter_rank) if cfg.adapter_rank else None
        self.dropout, self.parallel = nn.Dropout(cfg.dropout), cfg.parallel_residual

    def forward(self, x, rope, state):
        """x (B, T, C) -> (B, T, C), and the experts' balance loss (B,) or None."""
        given, y = x, self.mixer_norm(x)
        if self.conv is not None:
            y = self.conv(y, state)
        x = x + self.dropout(self.mixer(y, rope, state))
        y = self.ff(self.ff_norm(given if self.parallel else x))
        y, balance = y if isinstance(y, tuple) else (y, None)
        x = x + self.dropout(y)
        return (x + 0.1 * self.adapter(given) if self.adapter else x), balance


class Blocks(nn.ModuleList):
    """A stack of blocks, some of which may share weights."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(Block(cfg, i) for i in range(cfg.n_layers))
        self.cfg, self.depth = cfg, cfg.n_layers
        self.checkpoint_activations = False  # keep only each block's input for backward, recompute the rest
        unique = cfg.n_unique_blocks or cfg.n_layers
        for i, block in enumerate(self):
            if i >= unique:
                share(block, self[i % unique], own=("adapter", "router", "qkv_scale", "qkv_bias"))
            if cfg.qkv_share:
                share(block.mixer.qkv, self[i // cfg.qkv_share * cfg.qkv_share].mixer.qkv)
            if cfg.n_experts:
                share(block.ff.pool, self[0].ff.pool)

    def init_state(self) -> list:
        return [block.mixer.init_state() for block in self]

    def forward(self, x, positions, states: list | None, balances: list | None = None):
        """x (B, T, C) at positions (T,) -> (B, T, C). Each layer's balance loss (B,) is appended to
        `balances`."""
        cfg = self.cfg
        rope = rope_angles(positions, cfg.rope_size, cfg.rope_theta) if cfg.pos == "rope" else None
        for i, block in enumerate(self):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, balance = recomputed(block, x, rope, None, use_reentrant=False)
            else:
                x, balance = block(x, rope, states[i] if states else None)
            if balances is not None:
                balances.append(balance)
        return x


class GatedContext(nn.Module):
    """A trunk without attention, (B, T, C) to (B, T, F):

        h_t = n_layers ReLU layers of [x_t; c_{t-1}]
        c_t = clamp(LayerNorm(sigmoid(W_f h_t) c_{t-1} + sigmoid(W_i h_t) W_u h_t), +-10), c_0 = 0

    The context vector c (K) is all it remembers. Initial scales keep the size of its input and of what is
    repeated along the text: He's rule for ReLU layers (1502.01852), 1 / sqrt(fan-in) for gates."""

    refuses = (*ATTENTION_FLAGS, "n_unique_blocks", "adapter_rank", "proj_rank", "n_experts", "zero_init",
               "short_conv", "parallel_residual", "norm_eps")
    needs = {"pos": "none", "activation": "relu", "norm": "layernorm", "bias": True}
    depth = 2  # for common/fit.py: its backward holds gradients of all layers, about half of the total

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.d_model, self.width = cfg.d_model, cfg.context_dim or cfg.d_model
        d_ff = cfg.d_ff or 4 * cfg.d_model
        sizes = [cfg.d_model + self.width, *[d_ff] * (cfg.n_layers - 1)]
        self.layers = nn.ModuleList(Linear(n, d_ff, std=math.sqrt(2 / n)) for n in sizes)
        self.gates = Linear(d_ff, 3 * self.width, std=d_ff ** -0.5, maps=(self.width,) * 3)  # W_f, W_i, W_u
        self.context_norm = nn.LayerNorm(self.width)
        self.context_norm.specs = {"weight": ONES, "bias": ZEROS}
        self.dropout = nn.Dropout(cfg.dropout)

    def init_state(self) -> list[RecurrentState]:
        return [RecurrentState()]

    def forward(self, x, positions, states: list | None, balances: list | None = None):
        state = states[0] if states else None
        c = state.tensors[0] if state and state.tensors else x.new_zeros(len(x), self.width).float()  # (B, K)
        if one_by_one(x, self.gates):
            h, _, c = step_by_step(self.step, x, None, c)  # (B, T, F)
        else:  # the same for all positions, see common/recurrence.py
            first, *others = self.layers
            w_token, w_context = first.weight.split((self.d_model, self.width), dim=1)  # (F, C), (F, K)
            x = F.linear(x.transpose(0, 1), w_token, first.bias)  # (T, B, F)
            h, c = gated_loop(x, c, w_context, self.gates.weight, self.gates.bias, self.context_norm.weight,
                              self.context_norm.bias, *(p for m in others for p in (m.weight, m.bias)))
            h = h.transpose(0, 1)  # (B, T, F)
        if state:
            state.tensors = (c,)
        return self.dropout(h)

    def step(self, x, _, c):
        """The equations for one token: x (B, C), c (B, K) in float32 -> h (B, F), c."""
        h = torch.cat((x, c.to(x.dtype)), dim=-1)[:, None]  # (B, 1, C + K): Linear wants three dimensions
        for layer in self.layers:
            h = F.relu(layer(h))  # (B, 1, F)
        f, i, u = self.gates(h)[:, 0].float().chunk(3, dim=-1)  # (B, K) each
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * u
        c = F.layer_norm(c, c.shape[1:], self.context_norm.weight.float(), self.context_norm.bias.float())
        return h[:, 0], c.clamp(-10, 10)


MIXERS = {"attention": Attention, "context": {"gated": GatedContext, "scan": ContextScan}, "lstm": LSTM}

# ------------------------------------------------------------------------------------------------------------
# Model


class LM(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        if not cfg.vocab_size:
            raise ValueError("vocab_size is 0: set it, or take it from the tokenizer as train.py does")
        self.cfg, self.n_tokens = cfg, cfg.n_tokens or cfg.vocab_size
        width, table_std = cfg.embed_rank or cfg.d_model, factor_std(0.02, cfg.embed_rank)
        # the gated context has standard deviation 1 and no norm before it, so embeddings match that
        embed_std = factor_std(1.0, cfg.embed_rank) if cfg.gated and not cfg.tie_embeddings else table_std
        self.embed = Embedding(cfg.vocab_size, width, embed_std)
        self.embed_up = self.pos_embed = self.head_in = None
        if cfg.embed_rank:
            self.embed_up = Linear(width, cfg.d_model, False, embed_std, (), "embeddings")
        if cfg.pos == "learned":
            self.pos_embed = Embedding(cfg.max_seq_len + cfg.pos_offset, cfg.d_model)
        elif cfg.pos not in ("rope", "none"):
            raise NotImplementedError(f"pos={cfg.pos}")
        self.dropout = nn.Dropout(cfg.dropout)
        self.trunk = cfg.core(cfg) if cfg.gated else Blocks(cfg)
        self.final_norm = nn.Identity() if cfg.gated else make_norm(cfg)
        if cfg.embed_rank and not cfg.tie_embeddings:  # tied, it is the transpose of embed_up
            self.head_in = Linear(replace(cfg, embed_rank=0).head_width, width, False, table_std, (), "head")
        self.head = Linear(cfg.head_width, cfg.vocab_size, cfg.head_bias, table_std, (), "head")
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight
        self.head_sampler = None  # for training on a sample of the vocabulary (common/sampled_head.py)
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self) -> None:
        """As each layer's specs say: normal with a standard deviation, or by a function."""
        for _, p, spec in layers.declared(self):
            spec.start(p) if callable(spec.start) else p.normal_(0, spec.start)

    def forward(self, tokens, targets=None, state: DecodingState | None = None):
        """tokens (B, T) -> (logits (B, T, V), state), or with targets (B, T) -> (mean loss in nats per
        target, state).

        Targets of -1 do not count. A `state` from init_state() is advanced in place, so that the next call
        continues where this one ended: decoding T tokens one by one equals one pass over T tokens. The loss
        includes balance_loss.
        """
        balances = []
        x = self.hidden(tokens, state, balances)  # (B, T, C)
        if targets is None:
            return self.head(x), state  # (B, T, V)
        # fused: all logits are never held at once
        head = self.head.weight, self.head.bias, targets.flatten()
        weight, bias, places = self.head_sampler(*head) if self.training and self.head_sampler else head
        loss = cross_entropy(x.flatten(0, 1), weight, bias, places)
        loss = loss + self.balance_loss(balances, targets)
        return loss, state

    def balance_loss(self, balances: list, targets):
        """expert_balance times the layers' mean balance loss in training mode, else 0; a sequence weighs as
        much as it has targets (B, T) that count."""
        if not self.training or not self.cfg.n_experts:
            return 0.0
        counted = (targets >= 0).sum(dim=1) / (targets >= 0).sum().clamp(min=1)  # (B,)
        uneven = sum(self.cfg.n_experts * (b * counted).sum() for b in balances) / len(balances)
        return self.cfg.expert_balance * uneven

    def hidden(self, tokens, state: DecodingState | None = None, balances: list | None = None):
        """tokens (B, T) -> the head's input: the final norm's output (B, T, C), with embed_rank reduced to
        (B, T, rank). Each layer's balance loss (B,) is appended to `balances`."""
        start = state.length if state else 0
        stop = start + tokens.size(1)
        if self.pos_embed is not None and isinstance(stop, int) and stop > self.cfg.max_seq_len:
            raise ValueError(f"{stop} tokens, but learned positions end at max_seq_len="
                             f"{self.cfg.max_seq_len}; use fewer, or train with pos=rope or pos=none")
        positions = start + torch.arange(tokens.size(1), device=tokens.device)  # (T,)
        x = self.embed(tokens)  # (B, T, C), or (B, T, rank) with embed_rank
        if self.embed_up is not None:
            x = self.embed_up(x)  # (B, T, C)
        if self.pos_embed is not None:
            x = x + self.pos_embed(positions + self.cfg.pos_offset)  # (B, T, C)
        x = self.trunk(self.dropout(x), positions, state.layers if state else None, balances)
        if state:
            state.length += tokens.size(1)  # in place where it is a tensor
        x = self.final_norm(x)
        if self.embed_up is None:
            return x
        return self.head_in(x) if self.head_in is not None else F.linear(x, self.embed_up.weight.t())

    generate = generation.generate

    def init_state(self) -> DecodingState:
        return DecodingState(0, self.trunk.init_state())

    def step(self, tokens, state: DecodingState | None):
        """tokens (B, T) -> logits (B, V) of the next token, in fp32."""
        return self.head(self.hidden(tokens, state)[:, -1:])[:, 0].float()  # (B, V)

    def count_parameters(self) -> dict[str, int]:
        """`total`; `non_embedding`: without token and position tables and an untied head's matrix; `matmul`:
        weights that multiply a token and so set the cost: shared ones at each use, one expert of a pool."""
        total = sum(p.numel() for p in self.parameters())
        tables = {m.weight for m in (self.embed, self.pos_embed, self.head) if m is not None}  # tied: one
        matmul = layers.matmul_weights(self)
        if self.embed_up is not None and self.head_in is None:
            matmul += self.embed_up.weight.numel()  # its transpose before the head
        return {"total": total, "non_embedding": total - sum(w.numel() for w in tables), "matmul": matmul}

    def flops_per_token(self, seq_len: int) -> float:
        """Forward and backward: 6 per multiplied weight, plus attention's own."""
        extra = sum(m.extra_flops(seq_len) for m in self.modules() if hasattr(m, "extra_flops"))
        return 6 * self.count_parameters()["matmul"] + extra


def load_model(path: str, device="cpu", dtype: str = "fp32") -> tuple[LM, dict]:
    """The model of a checkpoint or run folder, in eval mode, with weights in fp32, bf16 or fp16 (INT8 stays
    INT8); and everything else the checkpoint holds."""
    saved = checkpoint.load(path, keys=("model", "config", "tokenizer"), int8=True)
    names = {f.name for f in fields(ModelConfig)}
    with torch.device("meta"):  # without memory or random numbers: the file's tensors become its own
        model = LM(ModelConfig(**{k: v for k, v in saved["config"].items() if k in names}))
        if "int8" in saved:
            int8.to_int8(model)
    checkpoint.assign_weights(model, saved.pop("model"), path)
    return model.to(device, DTYPES[dtype]).eval(), saved
