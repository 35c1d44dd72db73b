"""Writing a teacher's predictions to a folder that appears only when whole (format: common/teacher_cache.py),
and what that will cost, before. Shapes as there."""
import contextlib
import os
import shutil
import time
from typing import NamedTuple

from common.config import UserError
from common.console import say
from common.distributed import Dist, autocast
from common.files import make_folder, write_json, writing
from common.teacher_cache import Kind, decode, encode, record_bytes
from common.token_files import clean_up, new_folder

import numpy as np
import torch
from tqdm import tqdm

LOGITS = 2**24  # probabilities held at once: 64 MB in float32, and twice that in float64 to draw from them
SAMPLE = 2**14  # tokens that estimate() looks at, about
BINS = 15  # of the calibration error

# ------------------------------------------------------------------------------------------------------------
# The teachers' predictions


class Source(NamedTuple):
    """What a cache is made from."""
    examples: object  # per_epoch rows of seq_len tokens, pairs(index), counts
    teachers: list  # models in eval mode, whose probabilities are averaged
    vocab_size: int  # rows of a head above it are padding
    kind: Kind
    temperature: float
    seed: int  # of what is sampled
    batch_size: int  # rows at once; what is written does not depend on it, but for the last bits of logits
    dist: Dist
    dtype: str

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        R, N = self.examples.per_epoch, int(self.examples.counts.sum())
        return {"tokens.bin": N * record_bytes(self.kind, self.vocab_size),
                "counted.bin": R * -(-self.examples.seq_len // 8), "offsets.bin": 8 * (R + 1)}

    def records(self, order):
        """Yields of this process's part of the rows `order`: row numbers (B,), targets (B, T) as an array,
        and an iterator over chunks of the counted ones: probabilities (m, V) and records (m, bytes). Equally
        often on every process, so the last may have no rows."""
        each = self.batch_size * self.dist.world
        for first in range(0, len(order), each):
            index = order[first:first + each][self.dist.rank::self.dist.world]
            x, y = self.examples.pairs(index) if len(index) else np.zeros((2, 0, 1), dtype=np.int64)
            yield index, y, self.chunks(index, x, y >= 0) if (y >= 0).any() else ()

    def chunks(self, index, x, counted):
        last, done, u = int(np.nonzero(counted)[1].max()) + 1, 0, None
        if self.kind.name == "sampled":  # a pure function of (seed, row, position)
            u = np.concatenate([np.random.default_rng((self.seed, int(row))).random((len(c), self.kind.n))[c]
                                for row, c in zip(index, counted, strict=True)])  # (M, K)
        inputs = (torch.from_numpy(a[:, :last]).to(self.dist.device) for a in (x, counted))
        for p in self.probabilities(*inputs):
            p = p.cpu() if p.device.type == "mps" else p  # which has no float64 to draw in
            own = None if u is None else torch.from_numpy(u[done:done + len(p)]).to(p.device)
            yield p, encode(p, self.kind, own)
            done += len(p)

    @torch.inference_mode()
    def probabilities(self, x, counted):
        """Yields the mean softmax(logits / temperature) at the counted positions (B, T) of x (B, T), in
        chunks (m, V)."""
        with autocast(self.dtype, x.device):
            hidden = [teacher.hidden(x)[counted] for teacher in self.teachers]  # (M, C) each
        step = max(1, LOGITS // self.vocab_size)
        for start in range(0, len(hidden[0]), step):
            p = 0.0
            for teacher, h in zip(self.teachers, hidden, strict=True):
                with autocast(self.dtype, x.device):
                    logits = teacher.head(h[start:start + step])[:, :self.vocab_size]  # (m, V)
                p = p + (logits.float() / self.temperature).softmax(dim=-1)
            yield p / len(self.teachers)


# ------------------------------------------------------------------------------------------------------------
# Before writing


def calibration(confidence, right):
    """(BINS, 2): sums of confidence (m,) and of right predictions (m,) in each of BINS equal intervals."""
    where = (confidence * BINS).long().clamp(max=BINS - 1)  # (m,)
    both = torch.stack((confidence, right.to(confidence.dtype)), dim=1).double()  # (m, 2)
    return torch.zeros(BINS, 2, dtype=torch.float64).index_add_(0, where, both)


def calibration_error(sums, count: float) -> float:
    """Mean over targets of |accuracy - mean confidence| of their interval (ECE, 1706.04599)."""
    return float((sums[:, 0] - sums[:, 1]).abs().sum() / count)


def check_room(folder: str, source: Source) -> float:
    """Bytes free for `folder`; UserError if the cache does not fit."""
    need, path = sum(source.sizes().values()), os.path.abspath(folder)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    if need > (free := shutil.disk_usage(path).free):
        raise UserError(f"the cache {folder} needs {need / 1e9:,.3f} GB for {source.kind}, but its disk "
                        f"has {free / 1e9:,.3f} GB free: use fewer ids per token, less data, or "
                        "--cache=FOLDER on another disk")
    return free


def estimate(folder: str, source: Source) -> list[str]:
    """Lines to print before writing: the size on disk and, on a sample of rows, how far the cache is from
    the teacher. UserError if it does not fit. A collective."""
    kind, V, R = source.kind, source.vocab_size, source.examples.per_epoch
    if kind.name != "sampled" and kind.n > V:
        raise UserError(f"{kind}: the vocabulary has only {V} ids; use {kind.name}:{V}")
    free, need = check_room(folder, source), sum(source.sizes().values())
    N = int(source.examples.counts.sum())
    sample = np.random.default_rng(source.seed).permutation(R)[:max(1, SAMPLE * R // N)]
    bins, sums = torch.zeros(2, BINS, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for _, y, chunks in source.records(np.sort(sample)):
        targets, done = torch.from_numpy(y[y >= 0]), 0  # (M,)
        for p, records in chunks:
            ids, probs, tail, _ = (a if a is None else a.to(p.device) for a in decode(records, kind, V))
            q = torch.zeros_like(p) if tail is None else (tail / max(1, V - kind.n))[:, None].expand_as(p)
            q = q.scatter(1, ids, 0.0).scatter_add(1, ids, probs)  # (m, V): the cache's, a tail spread evenly
            for own, (best, chosen) in zip(bins, (p.max(dim=-1), q.max(dim=-1)), strict=True):
                own += calibration(best.cpu(), chosen.cpu() == targets[done:done + len(p)])
            variance = (1 - p.square().sum(dim=-1)) / kind.n  # (m,): of q, summed over ids
            sums += torch.tensor([len(p), *(float(a.double().sum()) for a in (
                p.gather(1, ids), (p - q).abs() / 2, variance))])
            done += len(p)
    all_sums = source.dist.sum(*sums.tolist(), *bins.flatten().tolist())
    (count, mass, distance, variance), bins = all_sums[:4], torch.tensor(all_sums[4:]).view(2, BINS, 2)
    if kind.name == "sampled":
        error = (f"unbiased, standard error {(variance / count) ** 0.5:.4f} (root of the variances' sum over "
                 "ids)")
    else:
        error = (f"{mass / count:.2%} of the mass kept, total variation from the teacher "
                 f"{distance / count:.4f}" + " if the tail is spread evenly" * (kind.name == "topk_tail"))
    return [f"cache {folder}: {N:,} tokens x {need / N:.1f} bytes = {need / 1e9:,.3f} GB of "
            f"{free / 1e9:,.1f} GB free, {kind} at temperature {source.temperature:g}",
            f"  on {count:,.0f} tokens of {len(sample)} rows: {error}",
            f"  calibration error (ECE, {BINS} bins): {calibration_error(bins[0], count):.4f} of the "
            f"teacher, {calibration_error(bins[1], count):.4f} of the cache"]


# ------------------------------------------------------------------------------------------------------------
# Writing


class Stopped(Exception):
    pass


def write(folder: str, identity: dict, source: Source, stop=None) -> bool:
    """Write all rows; False if `stop` was requested: then nothing is left. A collective: the processes share
    the rows, on one machine or on a shared disk."""
    folder, started = os.path.normpath(folder), time.perf_counter()
    assert (identity["kind"], identity["temperature"]) == (str(source.kind), source.temperature), identity
    main, sizes = source.dist.is_main, source.sizes()
    offsets = np.cumsum([0, *source.examples.counts], dtype="<i8")  # (R + 1,)
    if os.path.exists(folder):
        raise UserError(f"{folder} already exists; remove it, or choose another --cache=FOLDER")
    check_room(folder, source)
    if main:
        make_folder(os.path.dirname(folder) or ".")
        clean_up(folder)
    try:
        with new_folder(folder, False) if main else contextlib.nullcontext() as tmp:
            if main:
                for name, size in sizes.items():
                    with writing(os.path.join(tmp, name)), open(os.path.join(tmp, name), "wb") as f:
                        f.write(offsets.tobytes() if name == "offsets.bin" else b"")
                        f.truncate(size)
                write_json(os.path.join(tmp, "meta.json"), {
                    "identity": identity, "seed": source.seed, "seq_len": source.examples.seq_len,
                    "sizes": sizes})
            shared = [tmp]
            if source.dist.grouped:
                torch.distributed.broadcast_object_list(shared)
            fill(shared[0], source, offsets, stop)
    except Stopped:
        return False
    source.dist.sum(0.0)  # wait for the rename
    if main:
        speed = offsets[-1] / (time.perf_counter() - started)
        say(f"{folder}: {offsets[-1]:,} tokens, {sum(sizes.values()) / 1e9:,.3f} GB, {speed:,.0f} tokens/s")
    return True


def fill(tmp: str, source: Source, offsets, stop) -> None:
    """Write this process's records to the files in `tmp`; returns when all processes have. Not by memory map,
    where a full disk is a SIGBUS."""
    width, T = record_bytes(source.kind, source.vocab_size), source.examples.seq_len
    paths = [os.path.join(tmp, f"{name}.bin") for name in ("tokens", "counted")]
    with (writing(paths[0]), open(paths[0], "r+b") as tokens, open(paths[1], "r+b") as counted,
          tqdm(total=int(offsets[-1]), unit="token", unit_scale=True, desc="teacher's predictions",
               disable=None if source.dist.is_main else True) as bar):
        for index, y, chunks in source.records(np.arange(source.examples.per_epoch)):
            records, done = b"".join(r.tobytes() for _, r in chunks), 0
            for row, is_counted in zip(index, y >= 0, strict=True):
                bits, size = np.packbits(is_counted).tobytes(), int(is_counted.sum()) * width
                assert len(is_counted) == T and size == (offsets[row + 1] - offsets[row]) * width, (
                    f"row {row}: targets unlike examples.seq_len and examples.counts")
                counted.seek(row * len(bits))
                counted.write(bits)
                tokens.seek(offsets[row] * width)
                tokens.write(records[done:done + size])
                done += size
            bar.update(int(source.dist.sum(len(records) / width)[0]))
            if stop is not None and stop.agreed(source.dist):
                raise Stopped
    source.dist.sum(0.0)
