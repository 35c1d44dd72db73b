"""Token files: opening them safely, and batches that are a pure function of (seed, position)."""
import hashlib
import json
import os
from typing import NamedTuple

from common import tokenizer
from common.config import UserError

import numpy as np
import torch


class DataError(UserError):
    pass


def read_meta(folder: str) -> dict:
    """meta.json of a folder made by prepare_data.py."""
    path = os.path.join(folder, "meta.json")
    if not os.path.exists(path):
        name = os.path.basename(folder.rstrip("/")) or "shakespeare"
        raise DataError(f"no tokens in {folder} (looked for meta.json, train.bin and val.bin)\n"
                        f"make them with:  python prepare_data.py {name}")
    try:
        with open(path) as f:
            meta = json.load(f)
        for split in meta["splits"].values():
            split["tokens"], split["bytes"], split["words"]
        meta["dtype"], meta["tokenizer"]["fingerprint"], meta["tokenizer"]["vocab_size"]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(f"{path} is damaged ({type(e).__name__}: {e}); {remake(folder)}") from None
    return meta


def remake(folder: str) -> str:
    name = os.path.basename(folder.rstrip("/"))
    return f"make the folder anew with prepare_data.py --overwrite --name={name}"


def open_tokens(folder: str, split: str, meta: dict) -> np.ndarray:
    """The split's ids as a read-only memory map (the system may count it as used memory; it is cache, not a
    leak). DataError if the file is missing, empty, truncated or not the one that meta.json describes."""
    path = os.path.join(folder, f"{split}.bin")
    if split not in meta["splits"] or not os.path.exists(path):
        raise DataError(f"no {path}; {remake(folder)}")
    expected, dtype = meta["splits"][split], np.dtype(meta["dtype"])
    size, want = os.path.getsize(path), expected["tokens"] * dtype.itemsize
    if size != want:
        said = f"has {size:,} bytes, but meta.json says {expected['tokens']:,} {dtype} tokens"
        what = said if size else "is empty"
        raise DataError(f"{path} {what} ({want:,} bytes): truncated or another corpus; {remake(folder)}")
    with open(path, "rb") as f:
        head = hashlib.sha256(f.read(2**20)).hexdigest()
    if head != expected.get("head_sha256", head):
        raise DataError(f"{path} begins with other tokens than meta.json describes: from another corpus; "
                        f"{remake(folder)}")
    tokens = np.memmap(path, dtype=dtype, mode="r")
    top, vocab_size = int(tokens[:2**24].max()), meta["tokenizer"]["vocab_size"]
    if top >= vocab_size:
        raise DataError(f"{path} holds id {top}, but the tokenizer has {vocab_size} ids; {remake(folder)}")
    return tokens


class Text(NamedTuple):
    """A data folder that was opened."""
    meta: dict
    tok: tokenizer.Tokenizer
    train: np.ndarray
    val: np.ndarray


def open_text(folder: str, train_tokens: int = 0) -> Text:
    """The folder's tokens, of the training split the first `train_tokens` (0 = all)."""
    meta, tok = read_meta(folder), tokenizer.load(folder)
    train, val = (open_tokens(folder, split, meta) for split in ("train", "val"))
    if train_tokens > len(train):
        raise DataError(f"train_tokens={train_tokens:,}, but {folder} has {len(train):,}")
    return Text(meta, tok, train[:train_tokens or None], val)


class Windows:
    """The training text as an endless, seeded stream of windows of seq_len + 1 tokens.

    An epoch is one pass over all non-overlapping windows in a random order, cut at a random offset. Sample i
    of the stream is a pure function of (seed, i), so resuming needs a number, not a state, and any number of
    processes shares it out."""

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int):
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        # a window needs a target after its last token, and up to seq_len - 1 tokens go to the offset
        self.per_epoch = (len(tokens) - seq_len) // seq_len
        self.epoch = -1
        if self.per_epoch < 1:
            raise DataError(f"{len(tokens):,} training tokens are too few for a context of {seq_len}: "
                            f"at least {2 * seq_len:,} are needed; use a smaller --max_seq_len or more text")

    def starts(self, first: int, count: int) -> np.ndarray:
        """Where samples first .. first + count - 1 of the stream begin, (count,)."""
        out = np.empty(count, dtype=np.int64)
        for i in range(count):
            epoch, place = divmod(first + i, self.per_epoch)
            if epoch != self.epoch:
                rng = np.random.default_rng((self.seed, epoch))
                self.epoch, self.offset = epoch, int(rng.integers(self.seq_len))
                self.order = rng.permutation(self.per_epoch)
            out[i] = self.offset + int(self.order[place]) * self.seq_len
        return out

    def batch(self, first: int, count: int, device: torch.device):
        """Inputs and targets (count, T) of samples first .. first + count - 1."""
        index = self.starts(first, count)[:, None] + np.arange(self.seq_len + 1)  # (count, T + 1)
        return to_device(torch.from_numpy(self.tokens[index].astype(np.int64)), device)


def to_device(rows: torch.Tensor, device: torch.device):
    """Rows (B, T + 1) -> inputs and targets (B, T) there, without waiting on CUDA."""
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    else:
        rows = rows.to(device)
    return rows[:, :-1], rows[:, 1:]


def eval_batches(tokens: np.ndarray, seq_len: int, batch_size: int, rank: int, world: int,
                 device: torch.device):
    """Inputs and targets that predict every token but the first exactly once, in windows of seq_len; the
    ranks share the windows out. Targets past the end are -1. The caller sums, so no result depends on
    batch_size or world."""
    starts = np.arange(0, len(tokens) - 1, seq_len)[rank::world]
    for i in range(0, len(starts), batch_size):
        index = starts[i:i + batch_size, None] + np.arange(seq_len + 1)  # (B, T + 1)
        rows = tokens[np.minimum(index, len(tokens) - 1)].astype(np.int64)
        x, y = to_device(torch.from_numpy(rows), device)
        yield x, y.masked_fill(torch.from_numpy(index[:, 1:] >= len(tokens)).to(device), -1)
