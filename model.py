"""Every architecture nanoMem trains, by flags: the file to hack.

    from model import LM, ModelConfig
    model = LM(ModelConfig(vocab_size=50257, d_model=128, n_layers=4, n_heads=8))
    loss, _ = model(tokens, targets)                      # (B, T), (B, T) -> scalar
    for token in model.generate(prompt, 100): ...         # (B, T) -> (B, 1) per step, with a KV cache
    for token in model.generate([a, b, c], 100): ...      # prompts (T,) of different lengths, the same yield

LM = embedding -> blocks -> final norm -> head. A block is norm -> mixer -> add, norm -> feed-forward -> add.
(With the gated context vector, embedding -> its loop -> head.) A mixer maps (B, T, C) to (B, T, C), looks
only backward, and keeps what it needs for decoding in a state of its own: to try another one, write a class
with `forward(x, rope, state)` and `init_state()` and put it where Block makes its Attention. A state also has
`fix(size, position)`, which stops the shapes of its tensors from changing, so that the decoding step can be
compiled; where they never change, it does nothing. `past` in it is ShortConv's.

Shapes: B batch, T tokens of this call, S tokens they may see (T and those in the cache), C width (d_model), H
heads, G key/value heads, D head size (C / H), W window, F feed-forward width (d_ff), K context width
(context_dim), V vocabulary
"""
import contextlib
import functools
import math
import re
import warnings
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from torch._subclasses.fake_tensor import FakeTensor

from common import checkpoint, int8
from common.block_attention import block_attention
from common.config import Config
from common.head_loss import cross_entropy
from common.recurrence import gated_loop, linear_scan

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class ModelConfig(Config):
    # model
    vocab_size: int = 0  # rows of the embedding table; 0 = the tokenizer's vocabulary
    n_tokens: int = 0  # ids the tokenizer has; rows above are padding and never sampled; 0 = vocab_size
    max_seq_len: int = 512  # training context in tokens; the size of the position table with pos=learned
    d_model: int = 128  # width C of the residual stream
    n_layers: int = 4  # blocks; with the gated context the ReLU layers of its loop
    mixer: Literal["attention", "context", "lstm"] = "attention"  # the last two have a state of fixed size
    context_update: Literal["gated", "scan"] = "gated"  # gates read context and token, or the token alone
    context_dim: int = 0  # width K of a context vector, or of an LSTM's state; 0 = d_model
    short_conv: int = 0  # a causal convolution over so many tokens before each mixer; 0 = none
    n_heads: int = 4  # attention heads H
    n_kv_heads: int = 0  # heads G of keys and values (grouped queries); 0 = n_heads
    d_ff: int = 0  # hidden width of the feed-forward; 0 = 4 * d_model
    activation: Literal["gelu", "relu", "relu2", "swiglu"] = "gelu"  # relu2 = relu squared
    n_unique_blocks: int = 0  # layer i has the weights of layer i mod n; 0 = each its own
    adapter_rank: int = 0  # each layer adds 0.1 * (C -> rank -> C) of its input, never shared; 0 = none
    proj_rank: int = 0  # matrices of mixer and feed-forward as two, in -> rank -> out; 0 = whole
    qkv_share: int = 0  # so many blocks in a row share a QKV matrix; each layer scales and shifts; 0 = none
    n_experts: int = 0  # feed-forwards in a pool that all layers share, one for each token; 0 = no pool
    expert_balance: float = 0.01  # weight of the loss that keeps the experts' loads even
    embed_rank: int = 0  # the table is V x rank, then rank -> C, and back before the head; 0 = V x C
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # before each mixer and feed-forward, and at the end
    bias: bool = True  # biases on linear layers and LayerNorm
    head_bias: bool = True  # a bias of size V on the output
    tie_embeddings: bool = True  # the head's matrix is the embedding's
    pos: Literal["learned", "rope", "none"] = "learned"  # positions; rope has no length limit
    rope_theta: float = 10000.0  # base of RoPE's wavelengths
    qk_norm: bool = False  # normalise queries and keys per head (no weights of its own)
    attn_scale: bool = False  # a learned factor per head on the scores, 1 at the start
    attn_sink: bool = False  # a learned logit per head that takes part in the softmax and has no value
    window: int = 0  # tokens a local layer sees, the query's own included; 0 = every layer sees all
    global_every: int = 0  # with a window: layers n, 2n, ... (counted from 1) see all; 0 = none does
    flash: bool = True  # scaled_dot_product_attention: O(T) memory; false = written out, the same numbers
    zero_init: bool = False  # the matrices that write to the residual stream start at zero
    dropout: float = 0.0  # on the embedding, attention weights and each block's two outputs

    @property
    def gated(self) -> bool:
        return self.mixer == "context" and self.context_update == "gated"

    @property
    def head_width(self) -> int:
        """Of what the head reads."""
        return self.embed_rank or (self.d_ff or 4 * self.d_model if self.gated else self.d_model)

    def problems(self) -> list[str]:
        out = []
        for name in ("max_seq_len", "d_model", "n_layers", "n_heads"):
            if getattr(self, name) < 1:
                out.append(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("vocab_size", "n_tokens", "n_kv_heads", "d_ff", "window", "global_every", "embed_rank",
                     "n_unique_blocks", "adapter_rank", "proj_rank", "qkv_share", "n_experts",
                     "expert_balance", "context_dim", "short_conv"):
            if getattr(self, name) < 0:
                out.append(f"{name} must not be negative, got {getattr(self, name)}")
        if out:
            return out
        out += self.mixer_problems()
        if self.mixer != "attention":
            pass  # without heads
        elif self.d_model % self.n_heads:
            fits = min((h for h in range(1, self.d_model + 1) if self.d_model % h == 0),
                       key=lambda h: abs(h - self.n_heads))
            out.append(f"n_heads={self.n_heads} does not divide d_model={self.d_model}; n_heads={fits} does")
        elif self.pos == "rope" and self.d_model // self.n_heads % 2:
            out.append("pos=rope rotates pairs, but the head size d_model/n_heads="
                       f"{self.d_model // self.n_heads} is odd")
        if self.n_kv_heads and self.n_heads % self.n_kv_heads:
            out.append(f"n_kv_heads={self.n_kv_heads} does not divide n_heads={self.n_heads}")
        if self.global_every and not self.window:
            out.append(f"global_every={self.global_every} is set, but window=0 makes every layer global")
        if self.n_unique_blocks > self.n_layers:
            out.append(f"n_unique_blocks={self.n_unique_blocks} is more than n_layers={self.n_layers}")
        unique = self.n_unique_blocks or self.n_layers
        if self.qkv_share and unique % self.qkv_share:
            out.append(f"qkv_share={self.qkv_share} does not divide the {unique} blocks (n_unique_blocks, or "
                       "else n_layers)")
        if self.n_experts == 1:
            out.append("n_experts=1 leaves nothing to choose; use 2 or more, or 0 for one feed-forward per "
                       "layer")
        if self.expert_balance != 0.01 and not self.n_experts:
            out.append(f"expert_balance={self.expert_balance} is set, but n_experts=0 has nothing to balance")
        C, d_ff = self.d_model, self.d_ff or 4 * self.d_model
        for name, a, b in (("adapter_rank", C, C), ("proj_rank", C, C), ("proj_rank", C, d_ff),
                           ("embed_rank", self.vocab_size, C)):
            if getattr(self, name) * (a + b) >= a * b > 0:
                out.append(f"{name}={getattr(self, name)} saves nothing on a matrix of {a} x {b}; use at "
                           f"most {(a * b - 1) // (a + b)}, or 0 for none")
        if not 0 <= self.dropout < 1:
            out.append(f"dropout must be in [0, 1), got {self.dropout}")
        if self.rope_theta != 10000.0 and self.pos != "rope":
            out.append(f"rope_theta={self.rope_theta} is set, but pos={self.pos} does not use it")
        if self.vocab_size and self.n_tokens > self.vocab_size:
            out.append(f"n_tokens={self.n_tokens} is more than vocab_size={self.vocab_size}")
        return out

    def mixer_problems(self) -> list[str]:
        """Options that this mixer would ignore, or cannot do without."""
        unused = {"context_dim"} if self.mixer == "attention" else {
            "n_kv_heads", "qkv_share", "qk_norm", "attn_scale", "attn_sink", "window", "global_every"}
        unused |= {"context_update"} if self.mixer != "context" else set()
        unused |= {"proj_rank"} if self.mixer == "lstm" else set()
        needs = {} if self.mixer == "attention" else {"pos": "none"}  # its state knows the order
        if self.gated:
            unused |= {"n_unique_blocks", "adapter_rank", "proj_rank", "n_experts", "zero_init", "short_conv"}
            needs |= {"activation": "relu", "norm": "layernorm", "bias": True}
            if self.tie_embeddings and self.head_width != (self.embed_rank or self.d_model):
                needs["tie_embeddings"] = False  # the head is d_ff wide
        needs |= {name: getattr(ModelConfig, name) for name in sorted(unused)}  # the defaults
        wrong = [f"--{name}={value}" for name, value in needs.items() if getattr(self, name) != value]
        kind = f"mixer={self.mixer}"
        if self.mixer == "context":
            kind += f" with context_update={self.context_update}"
        return [f"{kind} needs {' '.join(wrong)}"] if wrong else []


# ------------------------------------------------------------------------------------------------------------
# Layers


class Linear(nn.Linear):
    """nn.Linear, but a compiled decoding step on a CPU forms the product with its one row as a sum: the
    kernel that comes out reads weights at 45 GB/s where the library's reaches 15 (fp32) or 20 (bf16)."""

    def forward(self, x):
        if torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() == self.in_features:
            row = x.contiguous().as_strided((self.in_features,), (1,))  # makes the compiler store x ...
            y = (self.weight * row).sum(-1)  # (out); ... or it would work x out again for each output
            return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)  # (1, 1, out)
        return super().forward(x)


class ExpertLinear(nn.Module):
    """E linear maps side by side: weight (E, out, in), bias (E, out)."""

    def __init__(self, n_experts: int, n_in: int, n_out: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_experts, n_out)) if bias else None

    def forward(self, x, where):
        """x (N, in) -> (N, out). `where`: how many rows in turn belong to each expert, a list of E numbers;
        or the expert of each row (N,), whose weights are then read for each row."""
        if torch.is_tensor(where):
            y = (self.weight[where] * x[:, None]).sum(-1)  # (N, out)
            return y if self.bias is None else y + self.bias[where]
        biases = [None] * len(where) if self.bias is None else self.bias.unbind()
        parts = zip(x.split(where), self.weight.unbind(), biases, strict=True)
        return torch.cat([F.linear(rows, w, b) for rows, w, b in parts if len(rows)])  # (N, out)


class LowRank(nn.Module):
    """Two linear maps as one: in -> rank -> out."""

    def __init__(self, a: nn.Module, b: nn.Module):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x, *where):
        return self.b(self.a(x, *where), *where)


def linear(cfg: ModelConfig, n_in: int, n_out: int, bias: bool, n_experts: int = 0) -> nn.Module:
    """A linear map of a block, or one for each expert; of rank proj_rank if that is set."""
    make = functools.partial(ExpertLinear, n_experts) if n_experts else Linear
    if cfg.proj_rank:
        return LowRank(make(n_in, cfg.proj_rank, bias=False), make(cfg.proj_rank, n_out, bias=bias))
    return make(n_in, n_out, bias=bias)


def make_norm(cfg: ModelConfig) -> nn.Module:
    if cfg.norm == "rmsnorm":
        return nn.RMSNorm(cfg.d_model, eps=1e-5)
    return nn.LayerNorm(cfg.d_model, bias=cfg.bias)


def rope_angles(positions, head_size: int, theta: float):
    """cos and sin (T, D/2) of positions (T,): pair i turns by positions * theta^(-2i/D) (RoFormer,
    2104.09864). In float32 always: bf16 has 8 bits and cannot tell position 256 from 257."""
    exponents = torch.arange(0, head_size, 2, device=positions.device).float() / head_size  # (D/2,)
    angles = positions.float()[:, None] * theta ** -exponents  # (T, D/2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i + D/2}) of x (B, H, T, D) by its angle: the half-split layout of Llama and
    Qwen."""
    a, b = x.float().chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)  # (B, H, T, D)


def causal_mask(T: int, S: int, window: int, device):
    """(T, S), true where query t, which is token S - T + t, sees a key: itself and the window - 1 tokens
    before, or with window 0 all before."""
    mask = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return mask.triu(S - T - window + 1) if window else mask


@functools.lru_cache(maxsize=8)
def flex_mask(T: int, window: int, device):
    """The same for flex_attention at S = T: a list of the blocks where anything is seen."""
    from torch.nn.attention.flex_attention import create_block_mask
    return create_block_mask(lambda b, h, q, k: (k <= q) & (q - k < window), None, None, T, T, device)


@functools.lru_cache(maxsize=1)
def flex_attention():
    from torch.nn.attention import flex_attention as flex
    return torch.compile(flex.flex_attention)


class KVCache:
    """Keys and values (B, G, S, D) of one layer; the buffer doubles when full, so appending is amortised
    O(1). With a window only the last tokens are kept, and the buffer stays below max(64, 4 W)."""

    def __init__(self, window: int = 0):
        self.window = window
        self.k = self.v = self.position = None
        self.length = 0  # tokens in the buffer
        self.past = None  # for ShortConv

    def append(self, k, v):
        """Add (B, G, T, D) each; returns what the T may see, (B, G, S, D) each: all so far, or with a window
        they and the W - 1 before."""
        T = k.size(2)
        if self.position is not None:
            slot = self.position % self.k.size(2)  # (1,)
            return self.k.index_copy_(2, slot, k), self.v.index_copy_(2, slot, v)
        keep = min(self.length, self.window - 1) if self.window else self.length
        start = self.length - keep
        if self.window and T >= self.window:  # only the end of so many will be seen again
            if keep:
                k = torch.cat((self.k[:, :, start:self.length], k), dim=2)  # (B, G, S, D)
                v = torch.cat((self.v[:, :, start:self.length], v), dim=2)  # (B, G, S, D)
            self.k, self.v = k[:, :, -self.window:].clone(), v[:, :, -self.window:].clone()
            self.length = self.window
            return k, v
        if self.k is None or self.length + T > self.k.size(2):
            shape = (k.size(0), k.size(1), max(64, 2 * (keep + T)), k.size(3))
            old_k, old_v = self.k, self.v
            self.k, self.v = k.new_empty(shape), v.new_empty(shape)
            if keep:
                self.k[:, :, :keep] = old_k[:, :, start:self.length]
                self.v[:, :, :keep] = old_v[:, :, start:self.length]
            start, self.length = 0, keep
        stop = self.length + T
        self.k[:, :, self.length:stop], self.v[:, :, self.length:stop] = k, v
        self.length = stop
        return self.k[:, :, start:stop], self.v[:, :, start:stop]

    def fix(self, size: int, position):
        """From now on tokens come one by one and no shape changes: a ring of `size` slots, or of W if that is
        less. `position` (1,) holds how many tokens were seen; whoever owns it counts on."""
        size = min(size, self.window or size)
        last, seen = min(self.length, size), int(position)
        slots = torch.arange(seen - last, seen, device=self.k.device) % size
        old_k, old_v = self.k, self.v
        self.k, self.v = (x.new_zeros(x.size(0), x.size(1), size, x.size(3)) for x in (old_k, old_v))
        self.k[:, :, slots] = old_k[:, :, self.length - last:self.length]
        self.v[:, :, slots] = old_v[:, :, self.length - last:self.length]
        self.position = position

    def mask(self):
        """(1, size), true for the slots of a ring that are filled; None while the cache grows."""
        if self.position is None:
            return None
        return (torch.arange(self.k.size(2), device=self.k.device) <= self.position)[None]


class Attention(nn.Module):
    """Causal self-attention with grouped queries: each of G key/value heads serves H/G query heads. With a
    window a token sees itself and the window - 1 before it, in O(T W) time and memory."""

    def __init__(self, cfg: ModelConfig, window: int = 0):
        super().__init__()
        self.cfg, self.window = cfg, window
        self.n_heads, self.n_kv_heads = cfg.n_heads, cfg.n_kv_heads or cfg.n_heads
        self.head_size = cfg.d_model // cfg.n_heads
        self.sizes = [n * self.head_size for n in (self.n_heads, self.n_kv_heads, self.n_kv_heads)]
        self.qkv = linear(cfg, cfg.d_model, sum(self.sizes), cfg.bias and not cfg.qkv_share)
        self.qkv_scale, self.qkv_bias = (nn.Parameter(torch.empty(sum(self.sizes))) if cfg.qkv_share else None
                                         for _ in range(2))
        self.proj = linear(cfg, cfg.d_model, cfg.d_model, cfg.bias)
        self.scale = nn.Parameter(torch.empty(self.n_heads)) if cfg.attn_scale else None  # (H,)
        self.sink = nn.Parameter(torch.empty(self.n_heads)) if cfg.attn_sink else None  # (H,)

    def init_state(self) -> KVCache:
        return KVCache(self.window)

    def forward(self, x, rope, state: KVCache | None):
        B, T, C = x.shape
        qkv = self.qkv(x)  # (B, T, C + 2 G D)
        if self.qkv_scale is not None:
            qkv = torch.addcmul(self.qkv_bias.to(qkv.dtype), qkv, self.qkv_scale.to(qkv.dtype))
        q, k, v = qkv.split(self.sizes, dim=-1)
        q = q.view(B, T, self.n_heads, self.head_size).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_kv_heads, self.head_size).transpose(1, 2)  # (B, G, T, D)
        v = v.view(B, T, self.n_kv_heads, self.head_size).transpose(1, 2)  # (B, G, T, D)
        if self.cfg.qk_norm:
            norm = F.rms_norm if self.cfg.norm == "rmsnorm" else F.layer_norm
            q, k = norm(q, (self.head_size,)).to(v.dtype), norm(k, (self.head_size,)).to(v.dtype)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if self.scale is not None:
            q = q * self.scale[:, None, None].to(q.dtype)  # (B, H, T, D)
        mask = None
        if state is not None:
            k, v = state.append(k, v)  # (B, G, S, D)
            mask = state.mask()  # (1, S) or None
        dropout = self.cfg.dropout if self.training else 0.0
        if T == 1:  # it sees all that is there, so the queries of a group can be rows of one product
            q = q.view(B, self.n_kv_heads, -1, self.head_size)  # (B, G, H/G, D)
            y = self.weigh(q, k, v, mask, False, dropout)  # (B, G, H/G, D)
            return self.proj(y.reshape(B, 1, C))  # (B, 1, C)
        y = self.attend(q, k, v, dropout)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)

    def attend(self, q, k, v, dropout: float):
        """q (B, H, T, D), the last T of the S tokens of k and v (B, G, S, D) -> (B, H, T, D)."""
        T, S, flash = q.size(2), k.size(2), self.cfg.flash
        window = self.window if self.window < S else 0
        flex = (window and flash and q.is_cuda and T == S and self.sink is None and not dropout
                and self.head_size >= 16 and torch.cuda.get_device_capability(q.device) >= (8, 0))
        if flash and (q.device.type == "cpu" or self.sink is not None or window and not flex):
            return block_attention(q, k, v, window, dropout, self.sink)
        if self.n_kv_heads < self.n_heads:
            repeats = self.n_heads // self.n_kv_heads
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)  # (B, H, S, D)
        if flex:
            return flex_attention()(q, k, v, block_mask=flex_mask(T, window, q.device))
        causal = flash and T == S  # then the kernel makes the mask itself
        mask = None if causal else causal_mask(T, S, window, q.device)
        return self.weigh(q, k, v, mask, causal, dropout)

    def weigh(self, q, k, v, mask, causal: bool, dropout: float):
        """Softmax of q k / sqrt(D) over the keys that `mask` (T, S) lets through (with flash also `causal`
        without one, for T = S), times v. A sink is one more key, whose score is learned and whose value is 0:
        heads need not attend to anything (gpt-oss, 2508.10925)."""
        # one query over a ring of 768 keys in bf16: the kernel for CPUs takes 297 us, the lines below 77, but
        # 1,000 where S is new each time
        slow = mask is not None and q.size(2) == 1 and q.device.type == "cpu" and q.dtype != torch.float32
        if self.cfg.flash and not slow and self.sink is None:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_size)  # (B, H, T, S)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        if self.sink is not None:
            sink = self.sink.view(1, q.size(1), -1, 1).to(scores.dtype)  # (1, H, 1, 1), T = 1: (1, G, H/G, 1)
            scores = torch.cat((scores, sink.expand(*scores.shape[:-1], 1)), dim=-1)  # (B, H, T, S + 1)
        weights = scores.softmax(dim=-1, dtype=torch.float32)[..., :k.size(2)].to(v.dtype)  # (B, H, T, S)
        return F.dropout(weights, dropout) @ v  # (B, H, T, D)


@dataclass
class RecurrentState:
    """What a recurrent mixer carries: tensors (B, K), whatever came before. It has no gradient, so training
    from one is truncated back-propagation through time."""
    tensors: tuple = ()
    past: torch.Tensor | None = None  # for ShortConv

    def fix(self, size: int, position):
        pass  # no shape ever changes


def one_by_one(x, layer) -> bool:
    """Whether a recurrence reads x (B, T, C) in steps: a single token, which also compiles, and with INT8
    layers, which make products and nothing else."""
    return not torch.is_grad_enabled() and (x.size(1) == 1 or not isinstance(layer, nn.Linear))


class ContextScan(nn.Module):
    """c_t = f_t c_{t-1} + (1 - f_t) u_t, whose gate f and candidate u read the token alone: a linear
    recurrence, so all positions at once (minGRU, 2410.01201). Read through a third gate, silu(o_t) c_t:
    without it the recall probe learned no pair. Deeper layers read what those below remember."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.width = cfg.context_dim or cfg.d_model
        self.gates = linear(cfg, cfg.d_model, 3 * self.width, False)  # f, u, o
        self.forget_bias = nn.Parameter(torch.empty(self.width))  # (K,)
        self.proj = linear(cfg, self.width, cfg.d_model, cfg.bias)

    def init_state(self) -> RecurrentState:
        return RecurrentState()

    def forward(self, x, rope, state: RecurrentState | None):
        f, u, o = self.gates(x).chunk(3, dim=-1)  # (B, T, K) each
        f, u = torch.sigmoid(f.float() + self.forget_bias), u.float()  # float32 for what is summed up over T
        c = state.tensors[0] if state and state.tensors else u.new_zeros(u.size(0), self.width)  # (B, K)
        if x.size(1) == 1:
            y = torch.lerp(u, c[:, None], f)  # (B, 1, K)
        else:
            y = linear_scan(f, (1 - f) * u, c)  # (B, T, K)
        if state:
            state.tensors = (y[:, -1].detach().clone(),)  # not a view, which would keep all of y
        return self.proj(F.silu(o) * y.to(o.dtype))  # (B, T, C)


class LSTM(nn.Module):
    """torch's LSTM of width K, and a product back to C."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.width = cfg.context_dim or cfg.d_model
        self.gates = Linear(cfg.d_model, 4 * self.width, bias=cfg.bias)  # input, forget, cell, output
        self.recur = Linear(self.width, 4 * self.width, bias=False)
        self.proj = Linear(self.width, cfg.d_model, bias=cfg.bias)

    def init_state(self) -> RecurrentState:
        return RecurrentState()

    def forward(self, x, rope, state: RecurrentState | None):
        zeros = x.new_zeros(x.size(0), self.width)
        h, c = (s.to(x.dtype) for s in (state and state.tensors or (zeros, zeros)))  # (B, K) each
        if one_by_one(x, self.gates):
            rows = []
            for x_t in x.unbind(dim=1):
                h, c = self.step(x_t, h, c)
                rows.append(h)
            y = torch.stack(rows, dim=1)  # (B, T, K)
        else:
            weights = [self.gates.weight, self.recur.weight]
            if self.gates.bias is not None:
                weights += [self.gates.bias, torch.zeros_like(self.gates.bias)]  # it wants two
            y, h, c = torch.lstm(x, (h[None], c[None]), weights, has_biases=len(weights) == 4, num_layers=1,
                                 dropout=0.0, train=self.training, bidirectional=False, batch_first=True)
            h, c = h[0], c[0]  # (B, K) each; y is (B, T, K)
        if state:
            state.tensors = (h.detach(), c.detach())
        return self.proj(y)  # (B, T, C)

    def step(self, x, h, c):
        """One token: x (B, C), h and c (B, K) -> h and c."""
        gates = (self.gates(x[:, None]) + self.recur(h[:, None]))[:, 0]  # (B, 4 K)
        i, f, g, o = gates.chunk(4, dim=-1)  # (B, K) each
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class ShortConv(nn.Module):
    """Each channel's sum over the last tokens, with learned weights; at the start the token itself. Mixers
    that compare tokens one by one need it to see pairs (Zoology, 2312.04927)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.taps = cfg.short_conv
        self.weight = nn.Parameter(torch.empty(self.taps, cfg.d_model))

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


class FeedForward(nn.Module):
    """With experts a pool of them, to be told `where` each row goes (see ExpertLinear)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.activation = cfg.activation
        d_ff, d_up = cfg.d_ff or 4 * cfg.d_model, 2 if cfg.activation == "swiglu" else 1
        self.up = linear(cfg, cfg.d_model, d_up * d_ff, cfg.bias, cfg.n_experts)
        self.down = linear(cfg, d_ff, cfg.d_model, cfg.bias, cfg.n_experts)

    def forward(self, x, *where):
        h = self.up(x, *where)  # (..., F), or (..., 2F) with a gate
        if self.activation == "swiglu":
            gate, h = h.chunk(2, dim=-1)
            h = F.silu(gate) * h
        elif self.activation == "gelu":
            h = F.gelu(h)
        else:
            h = F.relu(h).square() if self.activation == "relu2" else F.relu(h)
        return self.down(h, *where)


class Router(nn.Linear):
    """In float32 always: a choice between near equals should not hang on 8 bits (Switch, 2101.03961)."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class Experts(nn.Module):
    """p_e * FFN_e(x) for the most probable expert e of each token, p = softmax(router(x)) (Switch,
    2101.03961). No token is dropped, so that decoding equals one pass."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.router = Router(cfg.d_model, cfg.n_experts, bias=False)
        self.pool = FeedForward(cfg)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C), and in training a loss that is 1 where the experts' loads are even: that
        of Switch, but of each sequence on its own, so that it depends on no micro-batch."""
        p = self.router(x).softmax(dim=-1)  # (B, T, E)
        p_best, expert = p.max(dim=-1)  # (B, T) each
        one_step = torch.compiler.is_compiling() and x.size(1) == 1  # no sizes that depend on data
        y = (self.pool if one_step else self.grouped)(x.flatten(0, 1), expert.flatten())  # (B * T, C)
        y = (y.view(x.shape) * p_best[..., None]).to(x.dtype)  # (B, T, C)
        if not self.training:
            return y, None
        load = F.one_hot(expert, p.size(-1)).float().mean(dim=1)  # (B, E)
        return y, p.size(-1) * (load * p.mean(dim=1)).sum(dim=-1).mean()

    @torch.compiler.disable  # it would be compiled again for each number of rows
    def grouped(self, x, expert):
        """Each row of x (N, C) through its expert (N,), all rows of an expert at once."""
        E, order = self.router.out_features, expert.argsort(stable=True)
        if isinstance(expert, FakeTensor):  # common/memory.py asks for sizes, without data: even loads
            sizes = [len(x) * (e + 1) // E - len(x) * e // E for e in range(E)]
        else:
            sizes = expert.bincount(minlength=E).tolist()
        # index_select: the gradient of x[order] takes three times as long on a CPU
        return self.pool(x.index_select(0, order), sizes).index_select(0, order.argsort())  # (N, C)


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        sees_all = cfg.global_every and (layer + 1) % cfg.global_every == 0
        self.mixer_norm, self.conv = make_norm(cfg), ShortConv(cfg) if cfg.short_conv else None
        if cfg.mixer == "attention":
            self.mixer = Attention(cfg, 0 if sees_all else cfg.window)
        else:
            self.mixer = ContextScan(cfg) if cfg.context_update == "scan" else LSTM(cfg)
        self.ff_norm, self.ff = make_norm(cfg), Experts(cfg) if cfg.n_experts else FeedForward(cfg)
        self.adapter = None
        if cfg.adapter_rank:
            self.adapter = LowRank(Linear(cfg.d_model, cfg.adapter_rank, bias=False),
                                   Linear(cfg.adapter_rank, cfg.d_model, bias=False))
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, rope, state):
        """x (B, T, C) -> (B, T, C), and the loss for even loads of experts or None."""
        given, y = x, self.mixer_norm(x)
        if self.conv is not None:
            y = self.conv(y, state)
        x = x + self.dropout(self.mixer(y, rope, state))
        y = self.ff(self.ff_norm(x))
        y, balance = y if isinstance(y, tuple) else (y, None)
        x = x + self.dropout(y)
        return (x + 0.1 * self.adapter(given) if self.adapter else x), balance

    def init_state(self):
        return self.mixer.init_state()


class GatedContext(nn.Module):
    """A language model's trunk without attention, from (B, T, C) to (B, T, F), in the place of all blocks:

        h_t = n_layers ReLU layers of [x_t; c_{t-1}]
        c_t = clamp(LayerNorm(sigmoid(W_f h_t) c_{t-1} + sigmoid(W_i h_t) W_u h_t), +-10), c_0 = 0

    All it remembers is the context vector c (K)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.d_model, self.width = cfg.d_model, cfg.context_dim or cfg.d_model
        d_ff = cfg.d_ff or 4 * cfg.d_model
        self.layers = nn.ModuleList(Linear(d_ff if i else cfg.d_model + self.width, d_ff)
                                    for i in range(cfg.n_layers))
        self.gates = Linear(d_ff, 3 * self.width)  # W_f, W_i, W_u
        self.context_norm = nn.LayerNorm(self.width)
        self.dropout = nn.Dropout(cfg.dropout)

    def init_state(self) -> RecurrentState:
        return RecurrentState()

    def forward(self, x, rope, state: RecurrentState | None):
        c = state.tensors[0] if state and state.tensors else None
        if c is None:
            c = x.new_zeros(x.size(0), self.width, dtype=torch.float32)  # (B, K)
        if one_by_one(x, self.gates):
            rows = []
            for x_t in x.unbind(dim=1):
                h, c = self.step(x_t, c)
                rows.append(h)
            h = torch.stack(rows, dim=1)  # (B, T, F)
        else:  # the same for all positions, see common/recurrence.py
            first, *others = self.layers
            w_token, w_context = first.weight.split((self.d_model, self.width), dim=1)  # (F, C), (F, K)
            x = F.linear(x.transpose(0, 1), w_token, first.bias)  # (T, B, F)
            h, c = gated_loop(x, c, w_context, self.gates.weight, self.gates.bias, self.context_norm.weight,
                              self.context_norm.bias, *(p for m in others for p in (m.weight, m.bias)))
            h = h.transpose(0, 1)  # (B, T, F)
        if state:
            state.tensors = (c,)
        return self.dropout(h), None

    def step(self, x, c):
        """The equations for one token: x (B, C), c (B, K) in float32 -> h (B, F), c."""
        h = torch.cat((x, c.to(x.dtype)), dim=-1)[:, None]  # (B, 1, C + K): three dimensions, as Linear wants
        for layer in self.layers:
            h = F.relu(layer(h))  # (B, 1, F)
        f, i, u = self.gates(h)[:, 0].float().chunk(3, dim=-1)  # (B, K) each
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * u
        c = F.layer_norm(c, c.shape[1:], self.context_norm.weight.float(), self.context_norm.bias.float())
        return h[:, 0], c.clamp(-10, 10)


def share(ours: nn.Module, theirs: nn.Module, own=()) -> None:
    """Make the parameters of `ours` those of `theirs`, which is built alike, but for those whose name has a
    part in `own`. Modules stay apart, so that each use of a matrix can be counted."""
    for name, p in theirs.named_parameters():
        path, _, last = name.rpartition(".")
        if not set(own) & set(name.split(".")):
            setattr(ours.get_submodule(path), last, p)


@dataclass
class DecodingState:
    """What decoding carries from call to call, for every kind of mixer: tokens seen, and one entry per
    layer."""
    length: int = 0  # once fixed, a tensor (1,)
    layers: list = field(default_factory=list)

    def fix(self, size: int, device):
        """Make every further call take one token and keep all shapes, up to `size` tokens in all."""
        self.length = torch.tensor([self.length], device=device)
        for layer in self.layers:
            layer.fix(size, self.length)


# ------------------------------------------------------------------------------------------------------------
# Model


def factor_std(std: float, rank: int) -> float:
    """Of two random matrices with this inner dimension whose product has the standard deviation `std`; `std`
    itself for rank 0, a whole matrix."""
    return math.sqrt(std / math.sqrt(rank)) if rank else std


class LM(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        if not cfg.vocab_size:
            raise ValueError("vocab_size is 0: set it, or take it from the tokenizer as train.py does")
        self.cfg = cfg
        self.checkpoint_activations = False  # keep only each block's input for backward, and run it again
        self.n_tokens = cfg.n_tokens or cfg.vocab_size
        width = cfg.embed_rank or cfg.d_model
        self.embed = nn.Embedding(cfg.vocab_size, width)
        self.embed_up = Linear(width, cfg.d_model, bias=False) if cfg.embed_rank else None
        self.pos_embed = nn.Embedding(cfg.max_seq_len, cfg.d_model) if cfg.pos == "learned" else None
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList([GatedContext(cfg)] if cfg.gated else
                                    (Block(cfg, i) for i in range(cfg.n_layers)))
        unique = cfg.n_unique_blocks or cfg.n_layers
        for i, block in enumerate(() if cfg.gated else self.blocks):
            if i >= unique:
                share(block, self.blocks[i % unique], own=("adapter", "router", "qkv_scale", "qkv_bias"))
            if cfg.qkv_share:
                share(block.mixer.qkv, self.blocks[i // cfg.qkv_share * cfg.qkv_share].mixer.qkv)
            if cfg.n_experts:
                share(block.ff.pool, self.blocks[0].ff.pool)
        self.final_norm = nn.Identity() if cfg.gated else make_norm(cfg)
        untied = cfg.embed_rank and not cfg.tie_embeddings  # tied, the transpose of embed_up
        self.head_in = Linear(replace(cfg, embed_rank=0).head_width, width, bias=False) if untied else None
        self.head = Linear(cfg.head_width, cfg.vocab_size, bias=cfg.head_bias)
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self) -> None:
        """GPT-2's rules: matrices and embeddings N(0, 0.02), the two matrices of each block that write to the
        residual stream N(0, 0.02 / sqrt(2 * n_layers)) so that its variance does not grow with depth, or with
        zero_init, as for adapters always, 0; norms and scales 1, biases and sinks 0. Where two matrices stand
        for one, their product has its standard deviation. What is repeated along the text keeps the scale of
        its input: He's rule for ReLU layers (1502.01852), 1 / sqrt(fan-in) for gates and the LSTM; and
        embeddings that stand beside a context of standard deviation 1, with no norm before, have that too. A
        parameter that no rule names is an error: a new layer states how it starts."""
        cfg = self.cfg
        for name, p in self.named_parameters():
            whole = re.sub(r"\.[ab]\.weight$", ".weight", name)  # the matrix that LowRank's a and b stand for
            table = name in ("embed.weight", "embed_up.weight", "head_in.weight", "head.weight")
            rank = cfg.embed_rank if table else 0 if whole == name else p.size(-2 if name[-8] == "a" else -1)
            if name.endswith("forget_bias"):  # half-lives of 1 to max_seq_len tokens, log-uniform
                kept = 0.5 ** torch.logspace(0, -math.log10(max(2, cfg.max_seq_len)), len(p), device=p.device)
                p.copy_(torch.logit(kept))
            elif name.endswith(("bias", "sink")):
                p.zero_()
                if cfg.mixer == "lstm" and name.endswith("gates.bias"):
                    p[len(p) // 4:len(p) // 2] = 1.0  # remember, at first (Jozefowicz et al., 2015)
            elif name.endswith("conv.weight"):
                p.zero_()[-1] = 1.0
            elif ".layers." in name:
                p.normal_(0, math.sqrt(2 / p.size(1)))
            elif cfg.gated and not cfg.tie_embeddings and name.startswith("embed"):
                p.normal_(0, factor_std(1.0, rank))
            elif whole.endswith(("gates.weight", "recur.weight")):
                p.normal_(0, factor_std(p.size(-1) ** -0.5, rank))
            elif name.endswith(("norm.weight", "scale")):
                p.fill_(1.0)
            elif whole.endswith(("proj.weight", "down.weight", "adapter.weight")):
                zero = (cfg.zero_init or "adapter" in name) and not name.endswith(".a.weight")
                p.normal_(0, 0.0 if zero else factor_std(0.02 / math.sqrt(2 * cfg.n_layers), rank))
            elif table or whole.endswith(("embed.weight", "qkv.weight", "up.weight", "router.weight")):
                p.normal_(0, factor_std(0.02, rank))
            else:
                raise AssertionError(f"no initialisation rule for {name} {tuple(p.shape)}: add one here")

    def forward(self, tokens, targets=None, state: DecodingState | None = None):
        """tokens (B, T) -> (logits (B, T, V), state), or with targets (B, T) -> (mean loss in nats per token,
        state).

        Targets of -1 do not count. A `state` from init_state() is advanced in place, so that the next call
        continues where this one ended: decoding T tokens one by one equals one pass over T tokens. Without
        one, None is returned. With experts the loss in training mode has expert_balance times the mean of
        the layers' losses for even loads in it.
        """
        balances = []
        x = self.hidden(tokens, state, balances)  # (B, T, C)
        if targets is None:
            return self.head(x), state  # (B, T, V)
        head = self.head  # the loss never holds all logits: see head_loss.py
        loss = cross_entropy(x.flatten(0, 1), head.weight, head.bias, targets.flatten())
        if self.training and self.cfg.n_experts:
            loss = loss + self.cfg.expert_balance * sum(balances) / len(balances)
        return loss, state

    def hidden(self, tokens, state: DecodingState | None = None, balances: list | None = None):
        """tokens (B, T) -> what the head reads: the final norm's output (B, T, C), with embed_rank brought
        down to (B, T, rank). Each layer's loss for even loads of experts is appended to `balances`."""
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
            x = x + self.pos_embed(positions)  # (B, T, C)
        rope = None
        if self.cfg.pos == "rope":
            rope = rope_angles(positions, self.cfg.d_model // self.cfg.n_heads, self.cfg.rope_theta)
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, balance = torch.utils.checkpoint.checkpoint(block, x, rope, None, use_reentrant=False)
            else:
                x, balance = block(x, rope, state.layers[i] if state else None)
            if balances is not None:
                balances.append(balance)
        if state:
            state.length += tokens.size(1)  # in place where it is a tensor
        x = self.final_norm(x)
        if self.embed_up is None:
            return x
        return self.head_in(x) if self.head_in is not None else F.linear(x, self.embed_up.weight.t())

    def init_state(self) -> DecodingState:
        return DecodingState(0, [block.init_state() for block in self.blocks])

    def step(self, tokens, state: DecodingState | None):
        """tokens (B, T) -> logits (B, V) of what follows, in fp32."""
        return self.head(self.hidden(tokens, state)[:, -1:])[:, 0].float()  # (B, V)

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0, repetition_penalty: float = 1.0, stop_tokens=(), generator=None,
                 use_cache: bool = True, compile: bool = False):
        """Yield one (B, 1) of new tokens per step after the prompts `tokens`: (B, T), T >= 1, or a list of B
        tensors (T,) of any lengths; see sample_token for the knobs.

        Every row goes on as it would alone. Prompts share their positions: what one has beyond the shortest
        is read at one token a step while shorter ones already go on, so no mixer has to know of padding. A
        row that has produced one of `stop_tokens` goes on repeating it, and generation ends when all rows
        have. Learned positions end at max_seq_len: past it the model goes on from the last max_seq_len // 2
        tokens, with a warning. use_cache=False recomputes everything at each step (the same tokens, for
        tests). compile=True compiles the decoding step, once for each 256 tokens of final length: it pays
        from some thousand tokens on. Call model.eval() first.
        """
        lengths = [t.numel() if t.dim() == 1 else 0 for t in tokens]
        if min(lengths, default=0) < 1:
            raise ValueError("expected prompts (B, T) of T >= 1 or a list of tensors (T,), got "
                             + str(tuple(tokens.shape) if torch.is_tensor(tokens)
                                   else [tuple(t.shape) for t in tokens]))
        if compile and not use_cache:
            raise ValueError("compile=True compiles the cached step; drop it, or use_cache=False")
        given = nn.utils.rnn.pad_sequence(list(tokens), batch_first=True)  # (B, longest)
        shortest, longest, device = min(lengths), max(lengths), given.device
        ends = torch.tensor(lengths, device=device)[:, None]  # (B, 1)
        limit = self.cfg.max_seq_len if self.pos_embed is not None else math.inf
        size = min(limit, -(-(longest + max_new_tokens) // 256) * 256)
        if compile:  # only then: asking for it imports the compiler
            mode = "reduce-overhead" if device.type == "cuda" else None
            compiled = torch.compile(self.step, fullgraph=True, dynamic=False, mode=mode)
        stops = torch.tensor(list(stop_tokens), device=device, dtype=torch.long)
        done = torch.zeros_like(ends, dtype=torch.bool)  # (B, 1)
        tokens = unseen = given[:, :shortest]  # unseen: not yet in the cache
        keep = longest - shortest + 1  # tokens that are needed again: those that a longer prompt was behind
        if not use_cache or repetition_penalty != 1.0 or limit < math.inf:
            keep = longest + max_new_tokens
        start, state = 0, self.init_state()  # start: where the cache begins
        for t in range(shortest, longest + max_new_tokens):
            if t - start > limit:
                start = t - max(1, limit // 2)
                state, unseen = self.init_state(), tokens[:, start:]
                warnings.warn(f"past max_seq_len={limit}: going on from the last {unseen.size(1)} tokens",
                              stacklevel=2)
            if not use_cache:
                state, unseen = None, tokens[:, start:]
            fixed = state is not None and torch.is_tensor(state.length)
            logits = (compiled if fixed else self.step)(unseen, state)  # (B, V)
            if compile and not fixed:
                state.fix(size, device)
            new = sample_token(logits[:, :self.n_tokens], tokens, temperature, top_k, top_p,
                               repetition_penalty, generator)
            last = tokens[:, -1:]  # (B, 1)
            new = torch.where(torch.isin(last, stops) & (ends < t), last, new)  # (B, 1)
            if t < longest:
                new = torch.where(ends > t, given[:, t:t + 1], new)
            tokens, unseen = torch.cat((tokens[:, max(0, tokens.size(1) - keep + 1):], new), dim=1), new
            if t >= longest:
                new = tokens.gather(1, ends - longest + tokens.size(1) - 1)  # (B, 1)
                yield new
                done |= torch.isin(new, stops)
                if stop_tokens and done.all():
                    return

    def count_parameters(self) -> dict[str, int]:
        """`total`; `non_embedding`: without token and position tables and an untied head's matrix; `matmul`:
        the weights that multiply a token, which set the cost: the head's too, shared ones at each use, those
        of one expert."""
        total = sum(p.numel() for p in self.parameters())
        modules = [m for m in (self.embed, self.pos_embed, self.head) if m is not None]
        tables = {id(m.weight): m.weight.numel() for m in modules}  # a tied matrix counts once
        matmul = sum(m.weight.numel() if isinstance(m, nn.Linear) else m.weight[0].numel()
                     for m in self.modules() if isinstance(m, (nn.Linear, ExpertLinear)))
        if self.embed_up is not None and self.head_in is None:
            matmul += self.embed_up.weight.numel()  # its transpose before the head
        return {"total": total, "non_embedding": total - sum(tables.values()), "matmul": matmul}

    @contextlib.contextmanager
    def expert_usage(self):
        """Counts, while it is open, the tokens that each layer sends to each expert, into the tensor (L, E)
        that it gives."""
        E = self.cfg.n_experts
        counts = torch.zeros(self.cfg.n_layers, E, dtype=torch.long, device=self.embed.weight.device)

        def count(layer, module, inputs, logits):
            counts[layer] += F.one_hot(logits.argmax(dim=-1), E).sum(dim=(0, 1))

        routers = [block.ff.router for block in self.blocks] if E else []
        hooks = [r.register_forward_hook(functools.partial(count, i)) for i, r in enumerate(routers)]
        try:
            yield counts
        finally:
            for hook in hooks:
                hook.remove()

    def flops_per_token(self, seq_len: int) -> float:
        """Forward and backward: 6 per multiplied parameter and 12 C T per layer for attention, not discounted
        for the causal half (PaLM, appendix B, the convention of published MFU figures); W for T where a layer
        is local and sees less."""
        attend = self.blocks if self.cfg.mixer == "attention" else ()
        seen = sum(min(block.mixer.window or seq_len, seq_len) for block in attend)
        return 6 * self.count_parameters()["matmul"] + 12 * self.cfg.d_model * seen


def to_int8(model: LM) -> LM:
    """The model itself, its matrices and tables now in INT8 (common/int8.py) and never trained again. Routers
    stay as they are."""
    return int8.swap(model, {nn.Linear: int8.Int8Linear, Linear: int8.Int8Linear,
                             nn.Embedding: int8.Int8Embedding, ExpertLinear: int8.Int8Experts})


def load_model(path: str, device="cpu", dtype: str = "fp32") -> tuple[LM, dict]:
    """The model of a checkpoint or run folder, in eval mode with its weights in fp32, bf16 or fp16 (those of
    an INT8 file stay INT8, the rest follows), and everything else the checkpoint holds."""
    saved = checkpoint.load(path, keys=("model", "config", "tokenizer"), int8=True)
    names = {f.name for f in fields(ModelConfig)}
    model = LM(ModelConfig(**{k: v for k, v in saved["config"].items() if k in names}))
    if "int8" in saved:
        to_int8(model)
    checkpoint.load_weights(model, saved.pop("model"), path)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    return model.to(device, kind).eval(), saved


# ------------------------------------------------------------------------------------------------------------
# Sampling


def sample_token(logits, context, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
                 generator=None):
    """One token (B, 1) per row from logits (B, V) after `context` (B, S).

    temperature 0 is greedy. repetition_penalty divides the positive and multiplies the negative logits of
    tokens already in the context (CTRL, 1909.05858). top_k keeps the k most probable (0 = all); top_p the
    fewest that hold that much probability together (1909.09751), after top_k. A `generator` makes the draw
    repeatable.
    """
    if repetition_penalty != 1.0:
        seen = logits.gather(1, context)  # (B, S)
        seen = torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty)
        logits = logits.scatter(1, context, seen)
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)  # (B, 1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True, dim=-1)  # (B, V)
        probs = ordered.softmax(dim=-1)
        drop = probs.cumsum(dim=-1) - probs > top_p  # what stands before a token already holds top_p
        logits = logits.masked_fill(drop.scatter(1, order, drop), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)  # (B, 1)
