"""Which document goes to train, val or test: never to two of them, and to the same one every time."""
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from common.config import UserError
from common.corpus import Stream, pieces, read_txt


@dataclass
class Part:
    """A file, or one split of a data set."""
    name: str  # what val_files and test_files match
    read: Callable[[], Stream]
    split: str = "train"  # or val, test
    size: int = 0  # bytes of text, 0 = unknown
    path: str = ""  # if it is a file


class Piece(NamedTuple):
    split: str
    first: bool  # starts a document
    text: str
    data: bytes  # the text in UTF-8


def split_of(name: str) -> str:
    """The split that a file or a data set's split is named after, or "" (valentine.txt is not "val")."""
    m = re.match(r"(?:(?P<train>train|training)|(?P<val>val|valid|validation|dev)|(?P<test>test))(?![a-z])",
                 os.path.basename(name).lower())
    return m.lastgroup if m else ""


def assign(part: Part, shares: dict[str, float]) -> Iterator[Piece]:
    """The part's pieces and their splits. `shares` ({split: fraction}) of the documents of a train part go to
    other splits. The hash of a document's first piece decides, so copies of a document stay together."""
    split = part.split
    for first, text in pieces(part.read()):
        data = utf8(text, part.name)
        if first and part.split == "train" and shares:
            split = draw_split(data, shares)
        yield Piece(split, first, text, data)


def assign_dialogues(part: Part, shares: dict[str, float]) -> Iterator[tuple[str, list]]:
    """(split, turns) of the part's conversations, in the splits in which `assign` puts them as text."""
    for dialogue, _ in part.read():
        start = next((text for _, text in pieces(iter([(dialogue.text, True)]))), "")
        drawn = part.split == "train" and shares
        yield draw_split(utf8(start, part.name), shares) if drawn else part.split, dialogue.turns


def utf8(text: str, where: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(f"{where}: {e.object[e.start]!a} is an unpaired surrogate") from None


def draw_split(data: bytes, shares: dict[str, float]) -> str:
    """The split that the hash of a document's first piece falls into."""
    point = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / 2**64
    limits = zip(shares, itertools.accumulate(shares.values()), strict=True)
    return next((name for name, limit in limits if point < limit), "train")


def hold_out(parts: list[Part], wanted: dict[str, float]) -> list[Part]:
    """Give each missing split whole files, in the order of a hash of their names, up to its share."""
    total = sum(p.size for p in parts)
    left = sorted(parts, key=lambda p: hashlib.sha256(p.name.encode()).digest())
    for n, (split, share) in enumerate(wanted.items()):
        got, most, spare = 0, 1.5 * share * total, len(wanted) - n  # train and each later split need a file
        some = [p for p in left if p.size] or left  # an empty file is nothing to hold out
        for part in [p for p in some if p.size <= most] or [min(some, key=lambda p: p.size)]:
            first = not any(p.split == split for p in parts)
            if first or (got + part.size <= most and got < share * total and len(left) > spare):
                part.split, got = split, got + part.size
                left.remove(part)
        print(f"{split}: whole files " + ", ".join(p.name for p in parts if p.split == split))
    return parts


def cut_files(parts: list[Part], wanted: dict[str, float]) -> list[Part]:
    """Cut each of one or two documents at line ends into train | val | test."""
    cut_up = []
    for part in parts:
        ends, share = [0], 1 - sum(wanted.values())
        with open(part.path, "rb") as f:
            for split in wanted:
                at = f.seek(int(part.size * share))
                line = f.readline(2**16)
                if not line.endswith(b"\n"):  # no line end nearby: at least finish the character
                    line = re.match(rb"[\x80-\xbf]*", line)[0]
                ends.append(max(ends[-1], at + len(line)))
                share += wanted[split]
        ends.append(part.size)
        for split, (start, end) in zip(["train", *wanted], itertools.pairwise(ends), strict=True):
            read = functools.partial(read_txt, part.path, start, end)
            cut_up.append(Part(part.name, read, split, end - start))
        print(f"{part.name} is a single document: cut into {' | '.join(['train', *wanted])} at bytes "
              + ", ".join(f"{end:,}" for end in ends[1:-1])
              + "; --val_files holds out whole files instead" * (len(parts) > 1))
    return cut_up
