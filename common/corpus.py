"""Documents out of files, and pieces of documents that can be encoded one by one.

A stream is text in chunks of any size, in which None ends a document, so that a document may be larger than
the memory. Whatever cannot be read is a UserError with its file and line, row or byte: nothing is replaced.
"""
import codecs
import itertools
import json
import re
from collections.abc import Iterator

from common.config import UserError
from common.tokenizer import EOT, need

Stream = Iterator[str | None]

# ------------------------------------------------------------------------------------------------------------
# Files


def read_txt(path: str, start: int = 0, end: int | None = None) -> Stream:
    """Documents are what <|endoftext|> separates; the end of the mark's line belongs to the mark."""
    mark, hold, text = re.compile(re.escape(EOT) + r"(\r?\n)?"), len(EOT) + 3, ""
    for chunk in itertools.chain(decode_file(path, start, end), [None]):
        text, at = text + (chunk or ""), 0
        for m in mark.finditer(text):
            if chunk is not None and m.end() >= len(text) - 1:
                break  # the line end may still come
            yield text[at:m.start()]
            yield None
            at = m.end()
        keep = max(at, len(text) - hold) if chunk is not None else len(text)  # a mark may be half read
        yield text[at:keep]
        text = text[keep:]


def decode_file(path: str, start: int, end: int | None) -> Iterator[str]:
    """The text of bytes start to end, 1 MB at a time."""
    rest, at = b"", start
    with open(path, "rb") as f:
        f.seek(start)
        while True:
            block = f.read(2**20 if end is None else min(2**20, end - at))
            try:
                text, used = codecs.utf_8_decode(rest + block, "strict", not block)
            except UnicodeDecodeError as e:
                raise UserError(f"{path} is not UTF-8 at byte {at - len(rest) + e.start:,} ({e.reason});\n"
                                f"convert it:  iconv -f LATIN1 -t UTF-8 {path} > fixed.txt") from None
            yield text.removeprefix("\ufeff") if at == 0 else text
            rest, at = (rest + block)[used:], at + len(block)
            if not block:
                return


def has_mark(path: str) -> bool:
    """Whether <|endoftext|> occurs in the file."""
    with open(path, "rb") as f:
        tail = b""
        while block := f.read(2**20):
            if EOT.encode() in tail + block:
                return True
            tail = block[-len(EOT):]
    return False


def read_jsonl(path: str, key: str) -> Stream:
    at = 0
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            try:
                row = json.loads(line.decode("utf-8-sig")) if line.strip() else None
            except UnicodeDecodeError as e:
                raise UserError(f"{path}:{n} is not UTF-8 at byte {at + e.start:,} ({e.reason})") from None
            except ValueError as e:
                raise UserError(f"{path}:{n} is not JSON ({e}); expected one document a line, "
                                f'such as {{"{key}": "..."}}') from None
            at += len(line)
            if row is not None:
                yield text_of(row, key, f"{path}:{n}")
                yield None


def read_parquet(path: str, key: str) -> Stream:
    try:
        table = need("pyarrow.parquet").ParquetFile(path)
        if key not in table.schema_arrow.names:
            raise UserError(f"{path}: no column '{key}'; it has: {', '.join(table.schema_arrow.names)}. "
                            "Choose one with --text_key=...")
        rows = itertools.count()
        for batch in table.iter_batches(batch_size=256, columns=[key], use_threads=False):
            for value in batch.column(0).to_pylist():
                yield text_of({key: value}, key, f"{path} row {next(rows)}")
                yield None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is no readable parquet file ({e})") from None


# ------------------------------------------------------------------------------------------------------------
# Data sets


def read_rows(rows, key: str, where: str, documents) -> Stream:
    """Rows of a split of `datasets`; `documents` (one_each or articles) makes documents of their texts."""
    try:
        yield from documents(text_of(row, key, f"{where} row {n}") for n, row in enumerate(rows))
    except UserError:
        raise
    except Exception as e:  # network, decompression, Arrow: each library has its own
        raise UserError(f"{where}: reading stopped ({type(e).__name__}: {str(e)[:300]})") from e


def one_each(texts: Iterator[str]) -> Stream:
    for text in texts:
        yield text
        yield None


def articles(texts: Iterator[str]) -> Stream:
    """WikiText's lines as articles. One begins at ` = Title = ` between blank lines (else it is a table row).
    The hub has the file's blank lines, a space and a line end, as empty rows: they are put back, and counts
    of words come out as published."""
    before, line, begun = " \n", None, False
    for after in itertools.chain(texts, [""]):
        after = after or " \n"
        if line is not None:
            heading = re.fullmatch(r" = (?!= ).*(?<! =) = \n", line)
            if heading and not before.strip() and not after.strip():
                if begun:
                    yield None
                begun = True
            yield line
            before = line
        line = after


def text_of(row: dict, key: str, where: str) -> str:
    """A row's text: a string, a list of strings (a line each) or of turns ({"role", "text" or "content"})."""
    if not isinstance(row, dict) or key not in row:
        has = ", ".join(row) if isinstance(row, dict) else f"no fields, it is a {type(row).__name__}"
        raise UserError(f"{where}: no field '{key}'; it has: {has}. Choose one with --text_key=...")
    value, lines = row[key], []
    if isinstance(value, str):
        return value
    for item in value if isinstance(value, list) else [None]:
        if isinstance(item, dict) and isinstance(item.get("role"), str):
            text = item.get("text", item.get("content"))
            item = f"{item['role']}: {text}" if isinstance(text, str) else None
        if not isinstance(item, str):
            raise UserError(f"{where}: field '{key}' is neither text, a list of texts, nor a list of turns "
                            f"with \"role\" and \"text\" or \"content\": {str(value)[:80]}")
        lines.append(item)
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# Pieces

# tokens begin at a space between letters, so encoding the pieces equals encoding the whole
BOUNDARY = re.compile(r" (?<=[^\W\d_] )(?=[^\W\d_])")
PIECE, FAR = 2**15, 2**18  # characters: a piece, and where it is cut hard for want of a boundary


def pieces(stream: Stream) -> Iterator[tuple[bool, str]]:
    """(begins a document, text) in pieces of bounded size, however long the documents."""
    first, held, size = True, [], 0
    for chunk in itertools.chain(stream, [None]):
        if chunk is not None:
            held.append(chunk)
            size += len(chunk)
            if size < FAR:
                continue
        *done, rest = cut("".join(held), PIECE, FAR)
        for text in done + [rest] * (chunk is None):
            if text:
                yield first, text
                first = False
        held, size = ([], 0) if chunk is None else ([rest], len(rest))
        first = first or chunk is None


def cut(text: str, piece: int, far: int) -> Iterator[str]:
    """Pieces of about `piece` characters, cut at boundaries; last the rest, which may have none yet."""
    start = 0
    while len(text) - start > piece:
        m = BOUNDARY.search(text, start + piece, start + far)
        if m is None and len(text) - start < far:
            break
        end = m.start() if m else start + far
        yield text[start:end]
        start = end
    yield text[start:]
