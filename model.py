"""Every architecture nanoMem trains, by flags: the file to hack.

    from model import LM, ModelConfig
    model = LM(ModelConfig(vocab_size=50257, d_model=128, n_layers=4, n_heads=8))
    loss, _ = model(tokens, targets)                      # (B, T), (B, T) -> scalar
    for token in model.generate(prompt, 100): ...         # (B, T) -> (B, 1) per step, with a KV cache
    for token in model.generate([a, b, c], 100): ...      # prompts (T,) of different lengths, the same yield

LM = embedding -> blocks -> final norm -> head. A block is norm -> mixer -> add, norm -> feed-forward -> add.
A mixer maps (B, T, C) to (B, T, C), looks only backward, and keeps what it needs for decoding in a state of
its own: to try another one, write a class with `forward(x, rope, state)` and `init_state()` and put it where
Block makes its Attention. A state also has `fix(size, position)`, which stops the shapes of its tensors from
changing, so that the decoding step can be compiled; where they never change, it does nothing.

Shapes: B batch, T tokens of this call, S tokens they may see (T and those in the cache), C width (d_model), H
heads, G key/value heads, D head size (C / H), W window, F feed-forward width (d_ff), V vocabulary
"""
import functools
import math
import warnings
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from common import checkpoint
from common.block_attention import block_attention
from common.config import Config
from common.head_loss import cross_entropy

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class ModelConfig(Config):
    # model
    vocab_size: int = 0  # rows of the embedding table; 0 = the tokenizer's vocabulary
    n_tokens: int = 0  # ids the tokenizer has; rows above are padding and never sampled; 0 = vocab_size
    max_seq_len: int = 512  # training context in tokens; the size of the position table with pos=learned
    d_model: int = 128  # width C of the residual stream
    n_layers: int = 4  # blocks
    n_heads: int = 4  # attention heads H
    n_kv_heads: int = 0  # heads G of keys and values (grouped queries); 0 = n_heads
    d_ff: int = 0  # hidden width of the feed-forward; 0 = 4 * d_model
    activation: Literal["gelu", "relu", "relu2", "swiglu"] = "gelu"  # relu2 = relu squared
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # before each mixer and feed-forward, and at the end
    bias: bool = True  # biases on linear layers and LayerNorm
    head_bias: bool = True  # a bias of size V on the output
    tie_embeddings: bool = True  # the head's matrix is the embedding's
    pos: Literal["learned", "rope", "none"] = "learned"  # positions; rope has no length limit
    rope_theta: float = 10000.0  # base of RoPE's wavelengths
    qk_norm: bool = False  # normalise queries and keys per head (no weights of its own)
    window: int = 0  # tokens a local layer sees, the query's own included; 0 = every layer sees all
    global_every: int = 0  # with a window: layers n, 2n, ... (counted from 1) see all; 0 = none does
    flash: bool = True  # scaled_dot_product_attention: O(T) memory; false = written out, the same numbers
    dropout: float = 0.0  # on the embedding, attention weights and each block's two outputs

    def problems(self) -> list[str]:
        out = []
        for name in ("max_seq_len", "d_model", "n_layers", "n_heads"):
            if getattr(self, name) < 1:
                out.append(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("vocab_size", "n_tokens", "n_kv_heads", "d_ff", "window", "global_every"):
            if getattr(self, name) < 0:
                out.append(f"{name} must not be negative, got {getattr(self, name)}")
        if out:
            return out
        if self.d_model % self.n_heads:
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
        if not 0 <= self.dropout < 1:
            out.append(f"dropout must be in [0, 1), got {self.dropout}")
        if self.rope_theta != 10000.0 and self.pos != "rope":
            out.append(f"rope_theta={self.rope_theta} is set, but pos={self.pos} does not use it")
        if self.vocab_size and self.n_tokens > self.vocab_size:
            out.append(f"n_tokens={self.n_tokens} is more than vocab_size={self.vocab_size}")
        return out


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
        self.qkv = Linear(cfg.d_model, sum(self.sizes), bias=cfg.bias)
        self.proj = Linear(cfg.d_model, cfg.d_model, bias=cfg.bias)

    def init_state(self) -> KVCache:
        return KVCache(self.window)

    def forward(self, x, rope, state: KVCache | None):
        B, T, C = x.shape
        q, k, v = self.qkv(x).split(self.sizes, dim=-1)
        q = q.view(B, T, self.n_heads, self.head_size).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_kv_heads, self.head_size).transpose(1, 2)  # (B, G, T, D)
        v = v.view(B, T, self.n_kv_heads, self.head_size).transpose(1, 2)  # (B, G, T, D)
        if self.cfg.qk_norm:
            norm = F.rms_norm if self.cfg.norm == "rmsnorm" else F.layer_norm
            q, k = norm(q, (self.head_size,)).to(v.dtype), norm(k, (self.head_size,)).to(v.dtype)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
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
        flex = (window and flash and q.is_cuda and T == S and not dropout and self.head_size >= 16
                and torch.cuda.get_device_capability(q.device) >= (8, 0))
        if flash and (q.device.type == "cpu" or window and not flex):
            return block_attention(q, k, v, window, dropout)
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
        without one, for T = S), times v."""
        # one query over a ring of 768 keys in bf16: the kernel for CPUs takes 297 us, the lines below 77, but
        # 1,000 where S is new each time
        slow = mask is not None and q.size(2) == 1 and q.device.type == "cpu" and q.dtype != torch.float32
        if self.cfg.flash and not slow:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_size)  # (B, H, T, S)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
        return F.dropout(weights, dropout) @ v  # (B, H, T, D)


class FeedForward(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.activation = cfg.activation
        d_ff = cfg.d_ff or 4 * cfg.d_model
        self.up = Linear(cfg.d_model, 2 * d_ff if cfg.activation == "swiglu" else d_ff, bias=cfg.bias)
        self.down = Linear(d_ff, cfg.d_model, bias=cfg.bias)

    def forward(self, x):
        h = self.up(x)  # (B, T, F), or (B, T, 2F) with a gate
        if self.activation == "swiglu":
            gate, h = h.chunk(2, dim=-1)
            return self.down(F.silu(gate) * h)
        if self.activation == "gelu":
            return self.down(F.gelu(h))
        h = F.relu(h)
        return self.down(h.square() if self.activation == "relu2" else h)


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        sees_all = cfg.global_every and (layer + 1) % cfg.global_every == 0
        self.mixer_norm, self.mixer = make_norm(cfg), Attention(cfg, 0 if sees_all else cfg.window)
        self.ff_norm, self.ff = make_norm(cfg), FeedForward(cfg)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, rope, state):
        x = x + self.dropout(self.mixer(self.mixer_norm(x), rope, state))
        return x + self.dropout(self.ff(self.ff_norm(x)))


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


class LM(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        if not cfg.vocab_size:
            raise ValueError("vocab_size is 0: set it, or take it from the tokenizer as train.py does")
        self.cfg = cfg
        self.checkpoint_activations = False  # keep only each block's input for backward, and run it again
        self.n_tokens = cfg.n_tokens or cfg.vocab_size
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.pos_embed = nn.Embedding(cfg.max_seq_len, cfg.d_model) if cfg.pos == "learned" else None
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layers))
        self.final_norm = make_norm(cfg)
        self.head = Linear(cfg.d_model, cfg.vocab_size, bias=cfg.head_bias)
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self) -> None:
        """GPT-2's rules: matrices and embeddings N(0, 0.02), the two matrices of each block that write to the
        residual stream N(0, 0.02 / sqrt(2 * n_layers)) so that its variance does not grow with depth, norms
        1, biases 0. A parameter that no rule names is an error: a new layer states how it starts."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif name.endswith("norm.weight"):
                p.fill_(1.0)
            elif name.endswith(("proj.weight", "down.weight")):
                p.normal_(0, 0.02 / math.sqrt(2 * self.cfg.n_layers))
            elif name.endswith(("embed.weight", "qkv.weight", "up.weight", "head.weight")):
                p.normal_(0, 0.02)
            else:
                raise AssertionError(f"no initialisation rule for {name} {tuple(p.shape)}: add one here")

    def forward(self, tokens, targets=None, state: DecodingState | None = None):
        """tokens (B, T) -> (logits (B, T, V), state), or with targets (B, T) -> (mean loss in nats per token,
        state).

        Targets of -1 do not count. A `state` from init_state() is advanced in place, so that the next call
        continues where this one ended: decoding T tokens one by one equals one pass over T tokens. Without
        one, None is returned.
        """
        x = self.hidden(tokens, state)  # (B, T, C)
        if targets is None:
            return self.head(x), state  # (B, T, V)
        head = self.head  # the loss never holds all logits: see head_loss.py
        return cross_entropy(x.flatten(0, 1), head.weight, head.bias, targets.flatten()), state

    def hidden(self, tokens, state: DecodingState | None = None):
        """tokens (B, T) -> the final norm's output (B, T, C), which the head reads."""
        start = state.length if state else 0
        stop = start + tokens.size(1)
        if self.pos_embed is not None and isinstance(stop, int) and stop > self.cfg.max_seq_len:
            raise ValueError(f"{stop} tokens, but learned positions end at max_seq_len="
                             f"{self.cfg.max_seq_len}; use fewer, or train with pos=rope or pos=none")
        positions = start + torch.arange(tokens.size(1), device=tokens.device)  # (T,)
        x = self.embed(tokens)  # (B, T, C)
        if self.pos_embed is not None:
            x = x + self.pos_embed(positions)  # (B, T, C)
        rope = None
        if self.cfg.pos == "rope":
            rope = rope_angles(positions, self.cfg.d_model // self.cfg.n_heads, self.cfg.rope_theta)
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, rope, None, use_reentrant=False)
            else:
                x = block(x, rope, state.layers[i] if state else None)
        if state:
            state.length += tokens.size(1)  # in place where it is a tensor
        return self.final_norm(x)

    def init_state(self) -> DecodingState:
        return DecodingState(0, [block.mixer.init_state() for block in self.blocks])

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
            tokens, unseen = torch.cat((tokens, new), dim=1), new
            if t >= longest:
                new = tokens.gather(1, ends + t - longest)  # (B, 1)
                yield new
                done |= torch.isin(new, stops)
                if stop_tokens and done.all():
                    return

    def count_parameters(self) -> dict[str, int]:
        """`total`; `non_embedding`: without token and position tables and an untied head's matrix; `matmul`:
        the weights that multiply every token, head included, which set the cost."""
        total = sum(p.numel() for p in self.parameters())
        modules = [m for m in (self.embed, self.pos_embed, self.head) if m is not None]
        tables = {id(m.weight): m.weight.numel() for m in modules}  # a tied matrix counts once
        matmul = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return {"total": total, "non_embedding": total - sum(tables.values()), "matmul": matmul}

    def flops_per_token(self, seq_len: int) -> float:
        """Forward and backward: 6 per multiplied parameter and 12 C T per layer for attention, not discounted
        for the causal half (PaLM, appendix B, the convention of published MFU figures); W for T where a layer
        is local and sees less."""
        seen = sum(min(block.mixer.window or seq_len, seq_len) for block in self.blocks)
        return 6 * self.count_parameters()["matmul"] + 12 * self.cfg.d_model * seen


def load_model(path: str, device="cpu", dtype: str = "fp32") -> tuple[LM, dict]:
    """The model of a checkpoint or run folder, in eval mode with its weights in fp32, bf16 or fp16, and
    everything else the checkpoint holds."""
    saved = checkpoint.load(path, keys=("model", "config", "tokenizer"))
    names = {f.name for f in fields(ModelConfig)}
    model = LM(ModelConfig(**{k: v for k, v in saved["config"].items() if k in names}))
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
