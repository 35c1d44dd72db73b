"""A token file as a fixed set of examples: windows of text, lines or documents, one to a row.

Unlike data.Windows, whose windows start elsewhere in each epoch, every epoch has the same rows, in another
order: what a teacher says about a row can be kept (common/teacher_cache.py).

Shapes: N tokens of the file, R rows, B sequences, T tokens of a row
"""
import hashlib

from common import conversations
from common.data import DataError

import numpy as np
import torch

KINDS = ("windows", "lines", "documents")


class Examples:
    """The training text as an endless, seeded stream of rows; sample i is a pure function of (seed, i).

    `windows` of seq_len + 1 tokens follow each other with one token in common, so that every token but the
    first is a target once. So do lines, which end with a token that has a line end in its text, and
    documents, which end with the tokenizer's end of text; those of fewer than `min_tokens` or more than
    seq_len targets are left out, and rows are padded with targets of -1. `limit` keeps the first so many
    (0 = all). `count_padding` makes the padding targets too: a mistake, to see what it does."""

    def __init__(self, tokens, tok, kind: str, seq_len: int, seed: int, min_tokens: int = 0, limit: int = 0,
                 count_padding: bool = False):
        if isinstance(tokens, conversations.Chats):
            raise DataError("distill.py reads text, but its data folder holds conversations; make text of "
                            "them with prepare_data.py without --chat")
        self.tokens, self.seq_len, self.seed, self.eot = tokens, seq_len, seed, tok.eot
        self.kind, self.epoch, self.filler = kind, -1, tok.eot if count_padding else -1
        if kind == "windows":
            starts = np.arange(0, len(tokens) - 1, seq_len)
            self.spans = np.stack((starts, np.minimum(starts + seq_len + 1, len(tokens))), axis=1)  # (R, 2)
        else:
            ends = np.append(ends_of(tokens, tok, kind), len(tokens) - 1)
            spans = np.stack((ends[:-1], ends[1:] + 1), axis=1)  # (R, 2)
            targets, least = spans[:, 1] - spans[:, 0] - 1, max(1, min_tokens)  # (R,)
            self.left_out = int((targets < least).sum()), int((targets > seq_len).sum())
            self.spans = spans[(targets >= least) & (targets <= seq_len)]
        self.spans = self.spans[:limit or None]
        self.per_epoch = len(self.spans)
        if not self.per_epoch:
            raise DataError(f"no {kind} of {max(1, min_tokens)} to {seq_len} tokens in the training text; "
                            "use another --max_seq_len or --min_tokens, or --examples=windows")
        self.counts = self.spans[:, 1] - self.spans[:, 0] - 1  # (R,) targets
        self.fingerprint = hashlib.sha256(np.ascontiguousarray(self.spans).tobytes()
                                          + f"{seq_len}".encode()).hexdigest()

    def index(self, first: int, count: int) -> np.ndarray:
        """The row numbers of samples first .. first + count - 1, (count,)."""
        out = np.empty(count, dtype=np.int64)
        for i in range(count):
            epoch, place = divmod(first + i, self.per_epoch)
            if epoch != self.epoch:
                rng = np.random.default_rng((self.seed, epoch))
                self.epoch, self.order = epoch, rng.permutation(self.per_epoch)
            out[i] = self.order[place]
        return out

    def pairs(self, index: np.ndarray):
        """Inputs and targets of rows by their numbers, (B, T) each; padding is (eot, -1)."""
        starts, stops = self.spans[index].T[..., None]  # (B, 1) each
        places = starts + np.arange(self.seq_len + 1)  # (B, T + 1)
        ids = self.tokens[np.minimum(places, len(self.tokens) - 1)].astype(np.int64)
        y = np.where(places[:, 1:] < stops, ids[:, 1:], self.filler)
        return np.where(places[:, :-1] < stops - 1, ids[:, :-1], self.eot), y

    def batch(self, first: int, count: int, device: torch.device):
        """Inputs and targets, (count, T) each, of samples first .. first + count - 1."""
        return conversations.on_device(self.pairs(self.index(first, count)), device)

    def note(self) -> str:
        """What there is, for people."""
        counted = int(self.counts.sum())
        text = f"examples    {self.per_epoch:,} {self.kind}, {counted:,} targets"
        if self.kind == "windows":
            return text
        short, long = self.left_out
        padding = 1 - counted / (self.per_epoch * self.seq_len)
        return (f"{text}; {padding:.0%} of their rows is padding; {short:,} shorter and {long:,} longer ones "
                "left out")


def ends_of(tokens, tok, kind: str) -> np.ndarray:
    """Where in tokens (N,) a line or document ends, in order; the text begins with an end of text."""
    ends = np.zeros(tok.vocab_size, dtype=bool)
    ends[tok.eot] = True
    if kind == "lines":
        ends |= np.array(["\n" in tok.decode([i]) for i in range(tok.vocab_size)])
    parts = range(0, len(tokens), 2**24)
    return np.concatenate([np.flatnonzero(ends[tokens[i:i + 2**24]]) + i for i in parts])

