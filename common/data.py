"""Opening token files safely, and batches that are a pure function of (seed, position)."""
import hashlib
import math
import os
from typing import NamedTuple

from common import checkpoint, conversations, tokenizer
from common.chat import ChatFormat
from common.config import UserError
from common.conversations import ChatRows, Chats

import numpy as np
import torch

REMAKE = "repeat the prepare_data.py command that made the folder, adding --overwrite"


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
        meta = tokenizer.read_json(path)
        for split in meta["splits"].values():
            split["tokens"], split["bytes"], split["words"]
        meta["dtype"], meta["tokenizer"]["fingerprint"], meta["tokenizer"]["vocab_size"]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(f"{path} is damaged ({type(e).__name__}: {e}); {REMAKE}") from None
    return meta


def open_tokens(folder: str, split: str, meta: dict) -> np.ndarray | Chats:
    """The split's ids as a read-only memory map (counted by the system as used memory, but only cache).
    DataError if the file is missing, empty, truncated or not the one that meta.json describes."""
    path = os.path.join(folder, f"{split}.bin")
    if split not in meta["splits"] or not os.path.exists(path):
        raise DataError(f"no {path}; {REMAKE}")
    expected, dtype = meta["splits"][split], np.dtype(meta["dtype"])
    size, want = os.path.getsize(path), expected["tokens"] * dtype.itemsize
    if size != want:
        what = f"has {size:,} bytes" if size else "is empty"
        raise DataError(f"{path} {what}, but meta.json says {expected['tokens']:,} {dtype} tokens "
                        f"({want:,} bytes): truncated or from another corpus; {REMAKE}")
    with open(path, "rb") as f:
        head = hashlib.sha256(f.read(2**20)).hexdigest()
    if head != expected.get("head_sha256", head):
        raise DataError(f"{path} does not start with the tokens that meta.json describes: it is from another "
                        f"corpus; {REMAKE}")
    tokens = np.memmap(path, dtype=dtype, mode="r")
    top, vocab_size = int(tokens[:2**24].max()), meta["tokenizer"]["vocab_size"]
    if top >= vocab_size:
        raise DataError(f"{path} contains id {top}, but the tokenizer has {vocab_size} ids; {REMAKE}")
    return Chats(tokens, ChatFormat(**meta["chat"]), meta["tokenizer"]["eot"]) if "chat" in meta else tokens


class Text(NamedTuple):
    meta: dict
    tok: tokenizer.Tokenizer
    train: np.ndarray | Chats
    val: np.ndarray | Chats
    others: dict = {}  # {name: (validation tokens, their counts)} of texts evaluated beside it
    replayed: np.ndarray | None = None  # training tokens mixed in


def open_text(folder: str, train_tokens: int = 0) -> Text:
    """The folder's tokens, with only the first `train_tokens` of the training split (0 = all)."""
    meta, tok = read_meta(folder), tokenizer.load(folder)
    train, val = (open_tokens(folder, split, meta) for split in ("train", "val"))
    if train_tokens > len(train):
        raise DataError(f"train_tokens={train_tokens:,}, but {folder} has {len(train):,} training tokens")
    return Text(meta, tok, train[:train_tokens or None], val)


def open_beside(folder: str, split: str, text: Text, data: str) -> tuple[np.ndarray, dict]:
    """(tokens, counts) of another folder's split. UserError unless it has the tokenizer of `text`, which is
    from the folder `data`."""
    meta = read_meta(folder)
    checkpoint.check_tokenizer(meta["tokenizer"], folder, text.meta["tokenizer"], data, new=True,
                               has="is tokenised with", fix="make one of them with the other's tokenizer:  "
                               f"python prepare_data.py ... --tokenizer_from={data}")
    return open_tokens(folder, split, meta), meta["splits"][split]


class Windows:
    """The training text as an endless, seeded stream of windows of seq_len + 1 tokens.

    An epoch is one pass in random order over non-overlapping windows that start at a random offset. Sample i
    is a pure function of (seed, i), so a run resumes from i alone, on any number of processes."""

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int):
        if isinstance(tokens, Chats):
            raise DataError("this script reads text, but its data folder holds conversations; make text of "
                            "them with prepare_data.py without --chat")
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        # a window needs a target after its last token, and the offset skips up to seq_len - 1 tokens
        self.per_epoch, self.epoch = (len(tokens) - seq_len) // seq_len, -1
        if self.per_epoch < 1:
            raise DataError(f"{len(tokens):,} training tokens are too few for a context of {seq_len}: "
                            f"at least {2 * seq_len:,} are needed; use a smaller --max_seq_len or more text")

    def starts(self, first: int, count: int) -> np.ndarray:
        """Where samples first .. first + count - 1 of the stream start, (count,)."""
        out = np.empty(count, dtype=np.int64)
        for i in range(count):
            epoch, place = divmod(first + i, self.per_epoch)
            if epoch != self.epoch:
                rng = np.random.default_rng((self.seed, epoch))
                self.epoch, self.offset = epoch, int(rng.integers(self.seq_len))
                self.order = rng.permutation(self.per_epoch)
            out[i] = self.offset + int(self.order[place]) * self.seq_len
        return out

    def rows(self, first: int, count: int) -> np.ndarray:
        """Samples first .. first + count - 1, (count, T + 1)."""
        index = self.starts(first, count)[:, None] + np.arange(self.seq_len + 1)  # (count, T + 1)
        return self.tokens[index].astype(np.int64)

    def pairs(self, first: int, count: int):
        """Inputs and targets, (count, T) each, as arrays."""
        rows = self.rows(first, count)
        return rows[:, :-1], rows[:, 1:]

    def batch(self, first: int, count: int, device: torch.device):
        """Inputs and targets, (count, T) each, of samples first .. first + count - 1."""
        return to_device(torch.from_numpy(self.rows(first, count)), device)


class Mixed:
    """Windows of new text with a share of windows of old text among them, as evenly as can be.

    Of samples 0 .. i - 1, floor(share i + phase) are old; the seed sets the phase. So which samples are old,
    and how many windows of each text were read before, are functions of (seed, i). Each text keeps its own
    order: the new one's is that of a run without replay. An epoch is one pass over the new text."""

    PARTS = 10**6  # the share's resolution; integers, so that nothing is rounded

    def __init__(self, new: Windows, old: Windows, share: float):
        self.new, self.old, self.share = new, old, round(share * self.PARTS)
        self.phase = int(np.random.default_rng((new.seed, 23)).integers(self.PARTS))
        self.per_epoch = math.ceil(new.per_epoch * self.PARTS / (self.PARTS - self.share))

    def old_before(self, i):
        """How many of samples 0 .. i - 1 are old; i is a number or an array."""
        return (i * self.share + self.phase) // self.PARTS

    def batch(self, first: int, count: int, device: torch.device):
        """Inputs and targets, (count, T) each, of samples first .. first + count - 1."""
        before = self.old_before(first + np.arange(count + 1))  # (count + 1,)
        is_old, n = before[1:] > before[:-1], int(before[-1] - before[0])  # (count,)
        pairs = np.empty((2, count, self.new.seq_len), dtype=np.int64)
        pairs[:, is_old] = self.old.pairs(int(before[0]), n)
        pairs[:, ~is_old] = self.new.pairs(first - int(before[0]), count - n)
        return conversations.on_device(pairs, device)


def samples(tokens: np.ndarray | Chats, seq_len: int, seed: int) -> Windows | ChatRows:
    """A training split as a stream of samples."""
    found = ChatRows(tokens, seq_len, seed) if isinstance(tokens, Chats) else Windows(tokens, seq_len, seed)
    if not found.per_epoch:
        raise DataError("the training split has no answers; use more conversations")
    return found


def to_device(rows: torch.Tensor, device: torch.device):
    """Rows (B, T + 1) -> inputs and targets (B, T) on the device; a CUDA copy does not block."""
    cuda = device.type == "cuda"
    rows = (rows.pin_memory() if cuda else rows).to(device, non_blocking=cuda)
    return rows[:, :-1], rows[:, 1:]


def eval_batches(tokens: np.ndarray | Chats, seq_len: int, batch_size: int, rank: int, world: int,
                 device: torch.device):
    """This rank's inputs and targets, (B, T) each. Over all ranks, each token but the first is a target once.
    Targets past the end are -1. Callers sum, so that results do not depend on batch_size or world."""
    if isinstance(tokens, Chats):
        yield from conversations.eval_batches(tokens, seq_len, batch_size, rank, world, device)
        return
    starts = np.arange(0, len(tokens) - 1, seq_len)[rank::world]
    for i in range(0, len(starts), batch_size):
        index = starts[i:i + batch_size, None] + np.arange(seq_len + 1)  # (B, T + 1)
        rows = tokens[np.minimum(index, len(tokens) - 1)].astype(np.int64)
        x, y = to_device(torch.from_numpy(rows), device)
        yield x, y.masked_fill(torch.from_numpy(index[:, 1:] >= len(tokens)).to(device), -1)
