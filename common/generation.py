"""Decoding: the state carried from token to token, the loop that generates, and how a token is sampled.

    for token in model.generate(prompt, 100): ...   # generate() below; (B, T) -> (B, 1) per step

A layer's state has `fix(size, position)`: from then on its tensors keep their shapes, so that the decoding
step can be compiled. Its `past` belongs to ShortConv.

Shapes: B batch, T tokens of this call, S tokens they may see, G key/value heads, D head size, W window, K
width of a recurrent state, V vocabulary"""
import math
import warnings
from dataclasses import dataclass, field

import torch
import torch.nn as nn

# ------------------------------------------------------------------------------------------------------------
# States


class KVCache:
    """Keys and values (B, G, S, D) of one layer. The buffer doubles when full, so appending is amortised
    O(1). With a window only the last tokens are kept and the buffer stays below max(64, 4 W)."""

    def __init__(self, window: int = 0):
        self.window = window
        self.k = self.v = self.position = None
        self.length = 0  # tokens in the buffer
        self.past = None

    def append(self, k, v):
        """Add keys and values (B, G, T, D); returns those that the T tokens may see, (B, G, S, D): all so
        far, or with a window the T and the W - 1 before them."""
        T = k.size(2)
        if self.position is not None:
            slot = self.position % self.k.size(2)  # (1,)
            return self.k.index_copy_(2, slot, k), self.v.index_copy_(2, slot, v)
        keep = min(self.length, self.window - 1) if self.window else self.length
        start = self.length - keep
        if self.window and T >= self.window:  # only the last of them will be seen again
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
        """From now on tokens come one by one and shapes are constant: a ring of min(size, W) slots.
        `position` (1,) counts the tokens seen; its owner advances it."""
        size = min(size, self.window or size)
        last, seen = min(self.length, size), int(position)
        slots = torch.arange(seen - last, seen, device=self.k.device) % size
        old_k, old_v = self.k, self.v
        self.k, self.v = (x.new_zeros(x.size(0), x.size(1), size, x.size(3)) for x in (old_k, old_v))
        self.k[:, :, slots] = old_k[:, :, self.length - last:self.length]
        self.v[:, :, slots] = old_v[:, :, self.length - last:self.length]
        self.position = position

    def filled(self):
        """(1, size), true for a ring's filled slots; None while the cache still grows."""
        if self.position is None:
            return None
        return (torch.arange(self.k.size(2), device=self.k.device) <= self.position)[None]


@dataclass
class RecurrentState:
    """A recurrent mixer's tensors (B, K), whose size does not depend on the text. They carry no gradient, so
    training from them is truncated back-propagation through time."""
    tensors: tuple = ()
    past: torch.Tensor | None = None

    def fix(self, size: int, position):
        pass  # shapes never change


@dataclass
class DecodingState:
    """What decoding carries from call to call for any trunk: the tokens seen, and an entry per layer."""
    length: int = 0  # once fixed, a tensor (1,)
    layers: list = field(default_factory=list)

    def fix(self, size: int, device):
        """From now on calls take one token and keep all shapes, up to `size` tokens in total."""
        self.length = torch.tensor([self.length], device=device)
        for layer in self.layers:
            layer.fix(size, self.length)


# ------------------------------------------------------------------------------------------------------------
# The loop


class Reader:
    """Next-token logits, from one cached step at a time, or recomputed without a cache."""

    def __init__(self, model, final_length: int, use_cache: bool, compile: bool, device):
        self.model, self.use_cache, self.compile, self.device = model, use_cache, compile, device
        self.limit = model.cfg.max_seq_len if model.pos_embed is not None else math.inf
        self.size = min(self.limit, -(-final_length // 256) * 256)
        self.start, self.state = 0, model.init_state()  # start: where the cache begins
        if compile:  # only then, as it imports the compiler
            mode = "reduce-overhead" if device.type == "cuda" else None
            self.compiled = torch.compile(model.step, fullgraph=True, dynamic=False, mode=mode)

    def logits(self, t: int, tokens, unseen):
        """(B, V) after t tokens, of which the cache lacks `unseen` (B, T). `tokens`: all of them, read when
        positions end or without a cache."""
        if t - self.start > self.limit:
            self.start = t - max(1, self.limit // 2)
            self.state, unseen = self.model.init_state(), tokens[:, self.start:]
            warnings.warn(f"past max_seq_len={self.limit}: continuing from the last {unseen.size(1)} tokens",
                          stacklevel=3)
        if not self.use_cache:
            self.state, unseen = None, tokens[:, self.start:]
        fixed = self.state is not None and torch.is_tensor(self.state.length)
        logits = (self.compiled if fixed else self.model.step)(unseen, self.state)
        if self.compile and not fixed:
            self.state.fix(self.size, self.device)
        return logits[:, :self.model.n_tokens]


def prompt_lengths(tokens) -> list[int]:
    lengths = [t.numel() if t.dim() == 1 else 0 for t in tokens]
    if min(lengths, default=0) < 1:
        shapes = tuple(tokens.shape) if torch.is_tensor(tokens) else [tuple(t.shape) for t in tokens]
        raise ValueError(f"expected prompts (B, T) of T >= 1 or a list of tensors (T,), got {shapes}")
    return lengths


@torch.no_grad()
def generate(model, tokens, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, repetition_penalty: float = 1.0, stop_tokens=(), generator=None,
             use_cache: bool = True, compile: bool = False):
    """Yield (B, 1) new tokens per step after the prompts `tokens`: (B, T) with T >= 1, or a list of B tensors
    (T,) of any lengths. sample_token explains the sampling options.

    Every row continues as it would alone. Prompts are aligned at their start: what a longer one has beyond
    the shortest is read one token per step while shorter ones already continue, so mixers need no padding. A
    row that has produced one of `stop_tokens` repeats it, and generation ends when all rows have. Past
    max_seq_len learned positions end: the model continues from the last max_seq_len // 2 tokens, with a
    warning. use_cache=False recomputes everything at each step (the same tokens; for tests). compile=True
    compiles the decoding step once per 256 tokens of final length, which pays off after a few thousand
    tokens. Call model.eval() first."""
    if compile and not use_cache:
        raise ValueError("compile=True compiles the cached step; drop it, or use_cache=False")
    lengths = prompt_lengths(tokens)
    given = nn.utils.rnn.pad_sequence(list(tokens), batch_first=True)  # (B, longest)
    shortest, longest, device = min(lengths), max(lengths), given.device
    reader = Reader(model, longest + max_new_tokens, use_cache, compile, device)
    ends = torch.tensor(lengths, device=device)[:, None]  # (B, 1)
    stops = torch.tensor(list(stop_tokens), device=device, dtype=torch.long)
    done = torch.zeros_like(ends, dtype=torch.bool)  # (B, 1)
    tokens = unseen = given[:, :shortest]
    keep = longest - shortest + 1  # tokens still needed: those generated while a longer prompt was read
    if not use_cache or repetition_penalty != 1.0 or reader.limit < math.inf:
        keep = longest + max_new_tokens
    for t in range(shortest, longest + max_new_tokens):
        new = sample_token(reader.logits(t, tokens, unseen), tokens, temperature, top_k, top_p,
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


# ------------------------------------------------------------------------------------------------------------
# Sampling


def sample_token(logits, context, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
                 generator=None):
    """One token (B, 1) per row from logits (B, V) after `context` (B, S).

    temperature 0 is greedy. repetition_penalty divides positive and multiplies negative logits of tokens in
    the context (CTRL, 1909.05858). top_k keeps the k most probable tokens (0 = all), then top_p the fewest
    that together have this probability (nucleus sampling, 1909.09751). A `generator` makes the draw
    repeatable."""
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
        drop = probs.cumsum(dim=-1) - probs > top_p  # the more probable ones already have top_p
        logits = logits.masked_fill(drop.scatter(1, order, drop), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)  # (B, 1)
