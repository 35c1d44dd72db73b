"""A teacher's predictions on disk, so that a student learns from them with no teacher in memory. Here are the
format and the reading; common/cache_writer.py writes it.

    topk:50        the 50 most probable ids, renormalised: cheap, but biased (2503.16870)
    topk_tail:50   their probabilities as they are, and the mass of all other ids
    sampled:32     32 ids drawn by the teacher's probability, with replacement, 1/32 each: unbiased

Only counted targets take space, a record each in tokens.bin: ids in 2 bytes (3 if V > 65,536) and numbers in
fp16, with a relative error up to 2^-11: probabilities and the tail's mass, or the entropy. At V = 151,936 a
record of sampled:32 has 98 bytes. counted.bin has a bit per position: does its target count? offsets.bin has
the first record of each row.

Shapes: B rows, T tokens of a row, R rows in all, M counted targets of some rows, N of all, m of a chunk, K
ids of a record, V vocabulary
"""
import difflib
import os
from typing import Literal, NamedTuple, get_args

from common.config import UserError
from common.files import read_json

import numpy as np
import torch

# ------------------------------------------------------------------------------------------------------------
# Kinds


class Kind(NamedTuple):
    name: Literal["topk", "topk_tail", "sampled"]
    n: int  # ids per target

    def __str__(self) -> str:
        return f"{self.name}:{self.n}"


NAMES = get_args(Kind.__annotations__["name"])


def parse(spec: str) -> Kind:
    """'sampled:32' as a Kind, or UserError."""
    name, _, n = spec.partition(":")
    if name not in NAMES or not (n.isascii() and n.isdigit() and int(n) >= 1):
        near = difflib.get_close_matches(name, NAMES, n=1)
        raise UserError(f"cache kind '{spec}': expected topk:N, topk_tail:N or sampled:N with N >= 1 ids per "
                        f"token, such as {near[0] if near else 'sampled'}:32")
    return Kind(name, int(n))


def cache_problems(spec: str, temperature: float, divergence: str) -> list[str]:
    """What is wrong with options that ask for a cache."""
    out = []
    try:
        kind = parse(spec)
        if kind.name == "topk_tail" and temperature != 1:
            out.append(f"{kind} knows only the mass of the tail, which does not tell what is left of it at "
                       f"temperature {temperature:g}: use temperature 1, topk:{kind.n} or sampled:{kind.n}")
    except UserError as e:
        out.append(str(e))
    if divergence != "forward_kl":
        out.append(f"divergence={divergence} needs the teacher's probability of every id, and a cache has "
                   "only some: use divergence=forward_kl, or no cache")
    return out


def identity_of(teacher: str, tokenizer: str, data: str, examples, vocab_size: int, kind: Kind,
                temperature: float) -> dict:
    """What a cache is of; one with another identity is refused. The seed is not part of it: runs with other
    seeds share one cache, and so its draws."""
    return {"teacher": teacher, "tokenizer": tokenizer, "data": data, "vocabulary": vocab_size,
            "windows": f"{examples.per_epoch} x {examples.seq_len}, {examples.fingerprint}",
            "kind": str(kind), "temperature": float(temperature)}


# ------------------------------------------------------------------------------------------------------------
# Records


def id_bytes(vocab_size: int) -> int:
    assert vocab_size <= 2**24, f"{vocab_size} ids do not fit in 3 bytes"
    return 2 if vocab_size <= 2**16 else 3


def record_bytes(kind: Kind, vocab_size: int) -> int:
    halves = {"topk": kind.n, "topk_tail": kind.n + 1, "sampled": 1}[kind.name]
    return kind.n * id_bytes(vocab_size) + 2 * halves


def draw(p, u):
    """Ids (m, K) drawn from p (m, V) by inverting its cumulative sum at u (m, K) in [0, 1). In float64: in
    float32 a boundary near 1 is off by up to 3e-8, which is more than many an id's probability."""
    sums = p.double().cumsum(dim=-1)  # (m, V)
    return torch.searchsorted(sums, u * sums[:, -1:], right=True).clamp(max=p.size(1) - 1)


def encode(p, kind: Kind, u=None) -> np.ndarray:
    """Records (m, bytes) of probabilities p (m, V); u (m, K) in [0, 1) decides what is sampled."""
    if kind.name == "sampled":
        ids, halves = draw(p, u), torch.special.entr(p).sum(dim=-1, keepdim=True)  # (m, K), (m, 1)
    elif kind.name in ("topk", "topk_tail"):
        top, ids = p.topk(kind.n)  # (m, K) each
        mass = top.sum(dim=-1, keepdim=True)  # (m, 1)
        # the tail is stored too: 1 minus rounded probabilities would be off by as much as a small tail
        halves = top / mass if kind.name == "topk" else torch.cat((top, (1 - mass).clamp(min=0)), dim=-1)
    else:
        raise NotImplementedError(kind.name)
    m, width = len(p), id_bytes(p.size(1))
    ids = ids.cpu().numpy().astype("<u4").view(np.uint8).reshape(m, kind.n, 4)[:, :, :width]
    halves = halves.half().cpu().numpy().astype("<f2").view(np.uint8)
    return np.concatenate((ids.reshape(m, kind.n * width), halves), axis=1)


def decode(records: np.ndarray, kind: Kind, vocab_size: int):
    """Records (M, bytes) -> ids (M, K), probabilities (M, K), the tail's mass (M,) or None, and the entropy
    in nats (M,): of these probabilities and the tail; for sampled, of the teacher's full distribution."""
    M, K, width = len(records), kind.n, id_bytes(vocab_size)
    ids = np.zeros((M, K, 4), dtype=np.uint8)
    ids[:, :, :width] = records[:, :K * width].reshape(M, K, width)
    ids = torch.from_numpy(ids.view("<u4")[:, :, 0].astype(np.int64))  # (M, K)
    halves = np.ascontiguousarray(records[:, K * width:]).view("<f2").astype(np.float32)
    halves = torch.from_numpy(halves)  # (M, K), (M, K + 1) or (M, 1)
    if kind.name == "sampled":
        return ids, torch.full((M, K), 1 / K), None, halves[:, 0]
    halves = halves / halves.sum(dim=-1, keepdim=True)  # fp16 rounded their sum
    tail = halves[:, K] if kind.name == "topk_tail" else None  # (M,)
    return ids, halves[:, :K], tail, torch.special.entr(halves).sum(dim=-1)


# ------------------------------------------------------------------------------------------------------------
# Reading


def open_cache(folder: str, identity: dict) -> "TeacherCache | None":
    """The cache in `folder`, or None if there is none. UserError if it is of something else or damaged."""
    folder = os.path.normpath(folder)
    if not os.path.exists(folder):
        return None
    way_out = f"use another --cache=FOLDER, or remove this one to write it anew:  rm -r {folder}"
    try:
        meta = read_json(os.path.join(folder, "meta.json"))
        saved, sizes = meta["identity"], meta["sizes"]
        found = {name: os.path.getsize(os.path.join(folder, name)) for name in sizes}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder} is no whole teacher cache ({type(e).__name__}: {e})\n{way_out}") from None
    if differ := [k for k in saved | identity if saved.get(k) != identity.get(k)]:
        lines = [f"\n  {k}: {saved.get(k)} in the cache, {identity.get(k)} now" for k in differ]
        raise UserError(f"the cache {folder} was written for something else{''.join(lines)}\n{way_out}")
    if cut := [f"{k} has {found[k]:,} bytes, not {sizes[k]:,}" for k in sizes if found[k] != sizes[k]]:
        raise UserError(f"the cache {folder} is damaged: {', '.join(cut)}\n{way_out}")
    return TeacherCache(folder, meta)


class TeacherCache:
    """Reads by memory map: the system counts what was read as used memory, but it is only cached."""

    def __init__(self, folder: str, meta: dict):
        self.kind, self.vocab_size = parse(meta["identity"]["kind"]), meta["identity"]["vocabulary"]
        self.seq_len = meta["seq_len"]
        self.offsets = np.fromfile(os.path.join(folder, "offsets.bin"), dtype="<i8")  # (R + 1,)
        shapes = {"counted": (len(self.offsets) - 1, -(-self.seq_len // 8)),
                  "tokens": (int(self.offsets[-1]), record_bytes(self.kind, self.vocab_size))}
        self.counted, self.records = (
            np.memmap(os.path.join(folder, f"{name}.bin"), np.uint8, "r", shape=shape)
            for name, shape in shapes.items())

    def rows(self, index, device):
        """As decode(), of the rows `index` (B,): ids (B, T, K), probabilities (B, T, K), tail (B, T) or None,
        entropy (B, T). 0 where the target does not count. `sampled` may hold an id twice."""
        counted = np.unpackbits(self.counted[index], axis=1, count=self.seq_len).astype(bool)  # (B, T)
        records = np.concatenate([self.records[self.offsets[i]:self.offsets[i + 1]] for i in index])
        counted = torch.from_numpy(counted).to(device)

        def spread(values):
            out = values.new_zeros(*counted.shape, *values.shape[1:], device=device)  # (B, T) or (B, T, K)
            out[counted] = values.to(device)
            return out

        return tuple(None if a is None else spread(a) for a in decode(records, self.kind, self.vocab_size))
