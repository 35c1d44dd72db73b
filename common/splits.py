"""Which document goes to train, val and test: no document to two of them, and the same ones every time."""
import bisect
import functools
import hashlib
import itertools
import os
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from common.config import UserError
from common.corpus import Stream, pieces, read_txt


@dataclass
class Part:
    """A file, or one split of a data set."""
    name: str  # what val_files and test_files match
    read: Callable[[], Stream]
    split: str = ""  # train, val, test; empty: every document goes where the hash of its text says
    size: int = 0  # bytes of text, 0 = not known
    path: str = ""  # of a file


class Piece(typing.NamedTuple):
    split: str
    first: bool  # begins a document
    text: str
    data: bytes  # the same in UTF-8


def split_of(name: str) -> str:
    """The split a file or a data set's split is named after, or "" (valentine.txt is no validation split)."""
    m = re.match(r"(train|training|val|valid|validation|dev|test)(?![a-z])", os.path.basename(name).lower())
    return {"t": "test" if m[1] == "test" else "train", "v": "val", "d": "val"}[m[1][0]] if m else ""


def assign(part: Part, shares: dict[str, float]) -> Iterator[Piece]:
    """The part's pieces with their splits. A document goes by a hash of its start: copies stay together."""
    limits = list(itertools.accumulate(shares.values()))
    split = part.split
    for first, text in pieces(part.read()):
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise UserError(f"{part.name}: {e.object[e.start]!a}, half a character, is no text") from None
        if first and not part.split:
            point = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / 2**64
            split = [*shares, "train"][bisect.bisect_right(limits, point)]
        yield Piece(split, first, text, data)


def hold_out(parts: list[Part], wanted: dict[str, float]) -> list[Part]:
    """Gives whole files to the missing splits, ordered by a hash of their names, until each has its share."""
    total = sum(p.size for p in parts)
    left = sorted(parts, key=lambda p: hashlib.sha256(p.name.encode()).digest())
    for n, (split, share) in enumerate(wanted.items()):
        got, most = 0, 1.5 * share * total
        spare = len(wanted) - n  # the splits after this one and train need a file each
        for part in [p for p in left if p.size <= most] or [min(left, key=lambda p: p.size)]:
            if got == 0 or (got + part.size <= most and got < share * total and len(left) > spare):
                part.split, got = split, got + part.size
                left.remove(part)
        print(f"{split}: whole files " + ", ".join(p.name for p in parts if p.split == split))
    for part in left:
        part.split = "train"
    return parts


def cut_files(parts: list[Part], wanted: dict[str, float]) -> list[Part]:
    """One or two documents, each cut at line ends into train | val | test."""
    cut_up = []
    for part in parts:
        ends, share = [0], 1 - sum(wanted.values())
        with open(part.path, "rb") as f:
            for split in wanted:
                f.seek(int(part.size * share))
                line = f.readline(2**16)
                if not line.endswith(b"\n"):  # no line end near: at least finish the character
                    line = line[:len(line) - len(line.lstrip(bytes(range(128, 192))))]
                ends.append(max(ends[-1], int(part.size * share) + len(line)))
                share += wanted[split]
        ends.append(part.size)
        for split, start, end in zip(["train", *wanted], ends, ends[1:], strict=False):
            if end > start:
                read = functools.partial(read_txt, part.path, start, end)
                cut_up.append(Part(part.name, read, split, end - start))
        print(f"{part.name} is one document: cut into {' | '.join(['train', *wanted])} at bytes "
              + ", ".join(f"{end:,}" for end in ends[1:-1]) + "; --val_files holds out whole files instead")
    return cut_up
