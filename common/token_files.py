"""Token files and their counts for common/data.py, written to a folder that appears only when complete."""
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

MIN_LINE = 40  # characters; shorter lines repeat by chance ("Enter a messenger.")
MAX_LINES = 2_000_000  # lines checked in val and in test, to bound memory


class SplitWriter:
    """Writes one split's token file, counts what it writes, and hashes the lines for the overlap."""

    def __init__(self, folder: str, split: str, tok: Tokenizer, limit: int):
        self.tok, self.limit, self.full = tok, limit, False  # limit in tokens, 0 = none
        self.path = os.path.join(folder, f"{split}.bin")
        self.file = open(self.path, "wb")
        self.dtype = np.dtype(np.uint16 if tok.vocab_size <= 2**16 else np.uint32)
        self.sha, self.text_sha = hashlib.sha256(), hashlib.sha256()
        self.tokens = self.bytes = self.words = self.documents = 0
        self.in_word, self.line = False, ""  # the state at the end of the last piece
        self.lines = tempfile.TemporaryFile(dir=folder)  # one int64 hash per line, on disk to bound memory

    def add(self, piece: Piece, ids: np.ndarray) -> None:
        """Append a piece and its ids, or as much of its beginning as the limit allows."""
        if self.full:
            return
        if self.limit and self.tokens + piece.first + len(ids) > self.limit:
            piece, ids = self.shorten(piece)
            self.full = True
        if not piece.text:
            return
        data = np.array([self.tok.eot], self.dtype).tobytes() * piece.first + ids.astype(self.dtype).tobytes()
        with writing(self.path):
            self.file.write(data)
            self.add_lines("\n" * piece.first + piece.text)
        self.sha.update(data)
        self.text_sha.update(piece.data)
        self.tokens += piece.first + len(ids)
        self.bytes += len(piece.data)
        self.documents += piece.first
        # as in WikiText's published counts: words separated by whitespace, plus one for each line end
        split_word = self.in_word and not piece.first and not piece.data[:1].isspace()
        self.words += len(piece.data.split()) - split_word + piece.data.count(b"\n")
        self.in_word = not piece.data[-1:].isspace()

    def shorten(self, piece: Piece) -> tuple[Piece, np.ndarray]:
        """As much of the piece's beginning as fits, to within a few words."""
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
        """How many of this finished split's lines of at least MIN_LINE characters also occur in train."""
        self.lines.seek(0)
        hashes = np.frombuffer(self.lines.read(8 * MAX_LINES), dtype=np.int64)
        mine, counts = np.unique(hashes, return_counts=True)
        seen = np.zeros(len(mine), dtype=bool)
        train.lines.seek(0)
        while block := train.lines.read(2**23):
            seen |= np.isin(mine, np.frombuffer(block, dtype=np.int64))
        found = int(counts[seen].sum())
        return {"lines": len(hashes), "in_train": found, "fraction": found / max(1, len(hashes))}


@contextlib.contextmanager
def new_folder(folder: str, overwrite: bool):
    """A temporary folder to fill, which replaces `folder` once everything in it is on disk."""
    parent, name = os.path.split(folder)
    tmp, old = (os.path.join(parent, f".{name}.{kind}-{os.getpid()}") for kind in ("tmp", "old"))
    make_folder(tmp)
    try:
        yield tmp
        if os.path.exists(folder) and not overwrite:
            raise UserError(f"another run made {folder} in the meantime; this run's result is discarded")
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
    """Remove what killed runs left beside `folder`, and restore `folder` if one was about to replace it."""
    parent, name = os.path.split(folder)
    for found in os.listdir(parent or "."):
        if m := re.fullmatch(rf"\.{re.escape(name)}\.(tmp|old)-(\d+)", found):
            try:
                os.kill(int(m[2]), 0)  # is the process alive?
            except PermissionError:
                pass  # yes, and it is another user's
            except ProcessLookupError:
                if m[1] == "old" and not os.path.exists(folder):
                    os.rename(os.path.join(parent, found), folder)
                else:
                    shutil.rmtree(os.path.join(parent, found), ignore_errors=True)
