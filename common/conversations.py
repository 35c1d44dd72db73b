"""Training and evaluation on conversations in the chat format: one to a row, only the answers count.

No row holds tokens of two conversations, so no attention and no state crosses between them, whatever the
mixer. A conversation longer than a row is cut before a user's turn, and each part begins with the system turn
(or the template's head); an exchange longer than a row goes on in the next. Every token of an answer, and the
token that ends it, is a target exactly once. Rows are padded, with targets of -1, to the longest of a batch,
and rows of similar length are batched together.

Shapes: N tokens of a split, R rows, B sequences, T tokens of a row
"""
import itertools

from common.chat import ChatFormat, answer_tokens, find

import numpy as np
import torch

GROUP, POOL = 64, 4096  # rows of similar length that follow each other; rows among which lengths are sorted


class Chats:
    """The ids (N,) of a split of conversations, each preceded by the token `eot`."""

    def __init__(self, ids, form: ChatFormat, eot: int):
        self.ids, self.form, self.eot, self.cuts = ids, form, eot, {}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> "Chats":
        return Chats(self.ids[part], self.form, self.eot)

    def rows(self, seq_len: int) -> np.ndarray:
        """(R, 4): each row is ids[a:b] and then ids[c:d], at most seq_len + 1 tokens, for its a, b, c, d."""
        if seq_len not in self.cuts:
            ids, user = np.asarray(self.ids), self.form.opens["user"]
            self.counted = answer_tokens(ids, self.form)  # (N,)
            starts = np.flatnonzero(ids == self.eot) + 1
            stops, turns = np.append(starts[1:] - 1, len(ids)), find(ids, user)
            turns = np.split(turns, np.searchsorted(turns, starts[1:]))
            talks = zip(starts.tolist(), stops.tolist(), turns, strict=True)
            rows = [row for start, stop, at in talks for row in cut(start, stop, at.tolist(), seq_len + 1)]
            rows = np.array(rows, dtype=np.int64).reshape(-1, 4)
            before = np.append(0, self.counted.cumsum())  # (N + 1,)
            targets = before[rows[:, 3]] - before[rows[:, 2] + (rows[:, 0] == rows[:, 1])]  # (R,)
            self.cuts[seq_len] = rows[targets > 0]
        return self.cuts[seq_len]

    def pairs(self, rows: np.ndarray, width: int):
        """Inputs and targets of some rows, (B, width) each; padding is (eot, -1)."""
        x = np.full((len(rows), width), self.eot, dtype=np.int64)
        y = np.full((len(rows), width), -1, dtype=np.int64)
        for n, (a, b, c, d) in enumerate(rows):
            ids = np.concatenate((self.ids[a:b], self.ids[c:d])).astype(np.int64)
            counted = np.concatenate((np.zeros(b - a, dtype=bool), self.counted[c:d]))
            x[n, :len(ids) - 1] = ids[:-1]
            y[n, :len(ids) - 1] = np.where(counted[1:], ids[1:], -1)
        return x, y

    def note(self, seq_len: int, batch: int) -> str:
        """What an epoch has, for people."""
        rows, n = self.rows(seq_len), lengths(self.rows(seq_len))
        order = in_groups(n, np.random.default_rng(0))
        used = sum(width_of(n[order[i:i + batch]], seq_len) * len(order[i:i + batch])
                   for i in range(0, len(n), batch))
        talks = int((np.asarray(self.ids) == self.eot).sum())
        share = self.counted.mean()
        return (f"chats       {talks:,} conversations in {len(rows):,} rows; {share:.0%} of the tokens are "
                f"answers and count; {1 - (n - 1).sum() / used:.1%} of a batch is padding "
                f"({1 - (n - 1).mean() / seq_len:.1%} if all rows had {seq_len} tokens)")


def cut(start: int, stop: int, turns: list[int], size: int):
    """The rows (a, b, c, d) of the conversation in tokens start to stop, with user turns from `turns` on."""
    head = turns[0] if turns and turns[0] - start <= size // 4 else start
    a, b, c = start, start, start  # the first row has the head in it
    for this, following in itertools.pairwise([start, *turns[1:], stop]):
        if this > c and b - a + following - c > size:  # this exchange begins a row
            yield a, b, c, this
            a, b, c = start, head, this
        while b - a + following - c > size:  # it is longer than a row
            d = c + size - (b - a)
            yield a, b, c, d
            a, b, c = start, start, d - 1  # the row's last target is the next one's first input
    yield a, b, c, stop


def lengths(rows: np.ndarray) -> np.ndarray:
    return rows[:, 1] - rows[:, 0] + rows[:, 3] - rows[:, 2]  # (R,)


def width_of(lengths: np.ndarray, seq_len: int) -> int:
    """Tokens to pad rows of these lengths to: at most eight different numbers, for compiled models."""
    step = -(-seq_len // 8)
    return min(seq_len, -(-(int(lengths.max()) - 1) // step) * step)


def in_groups(lengths: np.ndarray, rng) -> np.ndarray:
    """A random order (R,) of rows in which each GROUP has similar lengths."""
    order = rng.permutation(len(lengths))
    pools = (order[i:i + POOL] for i in range(0, len(order), POOL))
    order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    groups = [order[i:i + GROUP] for i in range(0, len(order), GROUP)]
    return np.concatenate([groups[i] for i in rng.permutation(len(groups))])


class ChatRows:
    """The rows of a training split as an endless, seeded stream, like data.Windows: an epoch is one pass in
    random order, and sample i is a pure function of (seed, i)."""

    def __init__(self, chats: Chats, seq_len: int, seed: int):
        self.chats, self.seq_len, self.seed = chats, seq_len, seed
        self.all, self.epoch = chats.rows(seq_len), -1
        self.per_epoch, self.lengths = len(self.all), lengths(self.all)

    def rows(self, first: int, count: int) -> np.ndarray:
        """Of samples first .. first + count - 1, (count, 4)."""
        out = np.empty((count, 4), dtype=np.int64)
        for i in range(count):
            epoch, place = divmod(first + i, self.per_epoch)
            if epoch != self.epoch:
                rng = np.random.default_rng((self.seed, epoch))
                self.epoch, self.order = epoch, in_groups(self.lengths, rng)
            out[i] = self.all[self.order[place]]
        return out

    def pairs(self, first: int, count: int):
        """Inputs and targets, (count, seq_len) each."""
        return self.chats.pairs(self.rows(first, count), self.seq_len)

    def batch(self, first: int, count: int, device: torch.device):
        """Inputs and targets, (count, T) each, as long as the longest row needs."""
        rows = self.rows(first, count)
        return on_device(self.chats.pairs(rows, width_of(lengths(rows), self.seq_len)), device)


def eval_batches(chats: Chats, seq_len: int, batch_size: int, rank: int, world: int,
                 device: torch.device):
    """This rank's inputs and targets, (B, T) each; over all ranks, each answer's tokens are targets once."""
    rows = chats.rows(seq_len)
    rows = rows[np.argsort(lengths(rows), kind="stable")][rank::world]
    for i in range(0, len(rows), batch_size):
        some = rows[i:i + batch_size]
        yield on_device(chats.pairs(some, width_of(lengths(some), seq_len)), device)


def on_device(pairs, device: torch.device):
    """Arrays of inputs and targets as tensors; a CUDA copy does not block."""
    both, cuda = torch.from_numpy(np.stack(pairs)), device.type == "cuda"  # (2, B, T)
    x, y = (both.pin_memory() if cuda else both).to(device, non_blocking=cuda)
    return x, y
