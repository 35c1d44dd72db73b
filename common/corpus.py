"""Documents read from files and data sets, and cut into pieces that can be encoded separately.

A stream yields chunks as (text, whether a document ends there), so a document may be larger than memory.
Unreadable input is a UserError naming the file and the line, row or byte; nothing is replaced.
"""
import codecs
import itertools
import json
import math
import re
from collections.abc import Iterator

from common.config import UserError
from common.rows import field_of, text_of
from common.tokenizer import EOT, need

Stream = Iterator[tuple[str, bool]]


def read_txt(path: str, start: int = 0, end: float = math.inf) -> Stream:
    """Documents separated by <|endoftext|>; a line end right after the mark belongs to the mark."""
    mark, hold, text = re.compile(re.escape(EOT) + r"(\r?\n)?"), len(EOT) + 3, ""
    for chunk in itertools.chain(decode_file(path, start, end), [None]):
        text, at = text + (chunk or ""), 0
        for m in mark.finditer(text):
            if chunk is not None and m.end() >= len(text) - 1:
                break  # its line end may be in the next chunk
            yield text[at:m.start()], True
            at = m.end()
        keep = max(at, len(text) - hold) if chunk is not None else len(text)  # may end in half a mark
        yield text[at:keep], False
        text = text[keep:]


def decode_file(path: str, start: int, end: float) -> Iterator[str]:
    """The text of bytes start to end, 1 MB at a time."""
    rest, at, block = b"", start, None
    with open(path, "rb") as f:
        f.seek(start)
        while block != b"":
            block = f.read(min(2**20, end - at))
            try:
                text, used = codecs.utf_8_decode(rest + block, "strict", not block)
            except UnicodeDecodeError as e:
                raise UserError(f"{path} is not UTF-8 at byte {at - len(rest) + e.start:,} ({e.reason});\n"
                                f"convert it:  iconv -f LATIN1 -t UTF-8 {path} > fixed.txt") from None
            yield text.removeprefix("\ufeff") if at == 0 else text
            rest, at = (rest + block)[used:], at + len(block)


def has_mark(path: str) -> bool:
    """Whether <|endoftext|> occurs in the file."""
    with open(path, "rb") as f:
        blocks = itertools.chain([b""], iter(lambda: f.read(2**20), b""))
        return any(EOT.encode() in a[-len(EOT):] + b for a, b in itertools.pairwise(blocks))


def read_jsonl(path: str, key: str, value_of=text_of) -> Stream:
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            try:
                text = line.decode("utf-8-sig").strip()
                row = json.loads(text) if text else None
            except UnicodeDecodeError as e:
                at = f.tell() - len(line) + e.start
                raise UserError(f"{path}:{n} is not UTF-8 at byte {at:,} ({e.reason})") from None
            except ValueError as e:
                raise UserError(f"{path}:{n} is not JSON ({e}); expected one document per line, "
                                f'such as {{"{key}": "..."}}') from None
            if text:
                yield value_of(row, key, f"{path}:{n}"), True


def read_parquet(path: str, key: str, value_of=text_of) -> Stream:
    try:
        table = need("pyarrow.parquet").ParquetFile(path)
        key = field_of(key, table.schema_arrow.names)
        if key not in table.schema_arrow.names:
            raise UserError(f"{path}: no column '{key}'; it has: {', '.join(table.schema_arrow.names)}. "
                            "Choose one with --text_key=...")
        batches = table.iter_batches(batch_size=256, columns=[key], use_threads=False)
        for n, value in enumerate(value for batch in batches for value in batch.column(0).to_pylist()):
            yield value_of({key: value}, key, f"{path} row {n}"), True
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is not a readable parquet file ({e})") from None


def read_rows(rows, key: str, where: str, is_lines: bool = False, value_of=text_of) -> Stream:
    """A split of a `datasets` data set. Its rows are documents or, with `is_lines`, lines of articles."""
    try:
        texts = (value_of(row, key, f"{where} row {n}") for n, row in enumerate(rows))
        yield from articles(texts) if is_lines else zip(texts, itertools.repeat(True))
    except UserError:
        raise
    except Exception as e:  # network, decompression and Arrow each raise errors of their own
        raise UserError(f"{where}: reading stopped ({type(e).__name__}: {str(e)[:300]})") from e


def articles(texts: Iterator[str]) -> Stream:
    """WikiText's lines, joined into articles. An article starts at ` = Title = ` between blank lines (without
    them it is a table row). The hub stores the original's blank lines (a space and a line end) as empty rows;
    restoring them gives the published word counts."""
    before, begun = " \n", False
    for line, after in itertools.pairwise(itertools.chain((text or " \n" for text in texts), [" \n"])):
        heading = re.fullmatch(r" = (?!= ).*(?<! =) = \n", line)
        if heading and not before.strip() and not after.strip():
            yield "", begun
            begun = True
        yield line, False
        before = line


# tokens start at a space between two letters, so encoding the pieces equals encoding the whole
BOUNDARY = re.compile(r" (?<=[^\W\d_] )(?=[^\W\d_])")
PIECE, FAR = 2**15, 2**18  # characters: a piece, and the length at which it is cut without a boundary


def pieces(stream: Stream) -> Iterator[tuple[bool, str]]:
    """(starts a document, text) in pieces of bounded size, however long the documents."""
    first, text = True, ""
    for chunk, ends in itertools.chain(stream, [("", True)]):
        text += chunk
        if len(text) < FAR and not ends:
            continue
        *done, text = cut(text, PIECE, FAR)
        if ends:
            done, text = [*done, text], ""
        for piece in filter(None, done):
            yield first, piece
            first = False
        first = first or ends


def cut(text: str, piece: int, far: int) -> Iterator[str]:
    """Pieces of about `piece` characters, cut at boundaries; the last is the rest, which may be longer."""
    start = 0
    while len(text) - start > piece:
        m = BOUNDARY.search(text, start + piece, start + far)
        if m is None and len(text) - start < far:
            break
        end = m.start() if m else start + far
        yield text[start:end]
        start = end
    yield text[start:]
