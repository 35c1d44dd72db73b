"""Writing what common/data.py reads: each split's tokens with their counts, in a folder that appears only
when complete."""
import contextlib
import hashlib
import os
import re
import shutil
import tempfile

from common.config import UserError
from common.corpus import FAR, cut
from common.files import make_folder, sync, writing
from common.splits import Piece
from common.tokenizer import Tokenizer

import numpy as np

MIN_LINE = 40  # characters: shorter lines repeat by chance ("Enter a messenger.")
MAX_LINES = 2_000_000  # of val or test that are checked, so that memory stays flat


class SplitWriter:
    """One split's file of tokens, its counts, and hashes of its lines for the overlap."""

    def __init__(self, folder: str, split: str, tok: Tokenizer, limit: int):
        self.tok, self.limit, self.full = tok, limit, False  # limit: of tokens, 0 = none
        self.path = os.path.join(folder, f"{split}.bin")
        self.file = open(self.path, "wb")
        self.dtype = np.dtype(np.uint16 if tok.vocab_size <= 2**16 else np.uint32)
        self.sha, self.text_sha = hashlib.sha256(), hashlib.sha256()
        self.tokens = self.bytes = self.words = self.documents = 0
        self.in_word, self.line = False, ""  # how the last piece ended
        self.lines = tempfile.TemporaryFile(dir=folder)  # an int64 each, for a corpus may have any number

    def add(self, piece: Piece, ids: np.ndarray) -> None:
        """Appends a piece and its ids, or the beginning that the limit allows."""
        if self.limit and not self.full and self.tokens + piece.first + len(ids) > self.limit:
            piece, ids = self.shorten(piece)
            self.full = True
        elif self.full:
            return
        if not piece.text:
            return
        with writing(self.path):
            self.write(piece, ids)

    def write(self, piece: Piece, ids: np.ndarray) -> None:
        data = np.array([self.tok.eot], self.dtype).tobytes() * piece.first + ids.astype(self.dtype).tobytes()
        self.file.write(data)
        self.sha.update(data)
        self.text_sha.update(piece.data)
        self.tokens += piece.first + len(ids)
        self.bytes += len(piece.data)
        self.documents += piece.first
        # as in WikiText's published figures: what whitespace separates, and line ends
        goes_on = self.in_word and not piece.first and not piece.data[:1].isspace()
        self.words += len(piece.data.split()) - goes_on + piece.data.count(b"\n")
        self.in_word = not piece.data[-1:].isspace()
        self.add_lines("\n" * piece.first + piece.text)

    def shorten(self, piece: Piece) -> tuple[Piece, np.ndarray]:
        """The beginning of a piece that still fits, to within a few words."""
        text, ids = "", []
        for part in cut(piece.text, 64, 512):
            new = self.tok.encode(part)
            if self.tokens + piece.first + len(ids) + len(new) > self.limit:
                break
            text, ids = text + part, ids + new
        return piece._replace(text=text, data=text.encode()), np.array(ids, dtype=np.uint32)

    def add_lines(self, text: str) -> None:
        *lines, self.line = (self.line + text).split("\n")
        if len(self.line) > FAR:
            lines, self.line = [*lines, self.line], ""
        hashes = [hash(line) for line in lines if len(line) >= MIN_LINE]
        self.lines.write(np.array(hashes, dtype=np.int64).tobytes())

    def finish(self) -> dict:
        """The split's entry in meta.json."""
        with writing(self.path):
            self.add_lines("\n")
            self.file.close()
        with open(self.path, "rb") as f:
            head = hashlib.sha256(f.read(2**20)).hexdigest()
        return {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "words": self.words,
                "sha256": self.sha.hexdigest(), "head_sha256": head, "text_sha256": self.text_sha.hexdigest()}

    def overlap(self, train: "SplitWriter") -> dict:
        """How many of this finished split's lines of MIN_LINE or more characters occur verbatim in train."""
        self.lines.seek(0)
        hashes = np.frombuffer(self.lines.read(8 * MAX_LINES), dtype=np.int64)
        mine, counts = np.unique(hashes, return_counts=True)
        seen = np.zeros(len(mine), dtype=bool)
        train.lines.seek(0)
        while block := train.lines.read(2**23):
            seen |= np.isin(mine, np.frombuffer(block, dtype=np.int64))
        found = int(counts[seen].sum())
        return {"lines": len(hashes), "in_train": found, "fraction": found / max(1, len(hashes))}


# ------------------------------------------------------------------------------------------------------------
# The folder


@contextlib.contextmanager
def new_folder(folder: str, overwrite: bool):
    """A temporary folder to fill, which takes the place of `folder` once everything in it is on disk."""
    parent, name = os.path.split(folder)
    tmp, old = (os.path.join(parent, f".{name}.{kind}-{os.getpid()}") for kind in ("tmp", "old"))
    make_folder(tmp)
    try:
        yield tmp
        if os.path.exists(folder) and not overwrite:
            raise UserError(f"{folder} was made by another run in the meantime; this run's result is dropped")
        for path in [*(os.path.join(tmp, f) for f in os.listdir(tmp)), tmp]:
            sync(path)
        if os.path.exists(folder):
            os.rename(folder, old)
        os.rename(tmp, folder)
        sync(parent or ".")
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def clean_up(folder: str) -> None:
    """Removes what killed runs left beside `folder`, and puts it back if they were about to replace it."""
    parent, name = os.path.split(folder)
    for found in os.listdir(parent or "."):
        m = re.fullmatch(rf"\.{re.escape(name)}\.(tmp|old)-(\d+)", found)
        if m and not alive(int(m[2])):
            if m[1] == "old" and not os.path.exists(folder):
                os.rename(os.path.join(parent, found), folder)
            else:
                shutil.rmtree(os.path.join(parent, found), ignore_errors=True)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as e:
        return isinstance(e, PermissionError)  # another user's process
    return True
