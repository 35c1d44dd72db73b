import base64
import json
import os
import pydoc_data.topics
import random
import subprocess
import sys

from common import tokenizer
from common.config import UserError
from common.stream import StreamDecoder
from common.tokenizer import EOT, load, open_tokenizer

import huggingface_hub
import numpy as np
import pytest
import tiktoken
import tokenizers

TEXTS = list(pydoc_data.topics.topics.values())  # real English that every CPython ships
ODD = "Hi 👩‍👩‍👧 <|endoftext|> <unk>, (<unk>) naïve\r\n\t x²  don't 日本語 \x00 café\u0301 \ufffd  \n\n end "
KINDS = ("gpt2", "bpe", "words", "bytes", "hf")
# the pattern as OpenAI published it with GPT-2, without the possessive quantifiers
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@pytest.fixture(scope="module")
def trained():
    """Byte-level BPE trained and run by the library alone: the reference for ours."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(
        vocab_size=999, initial_alphabet=alphabet, show_progress=False))
    return tok


@pytest.fixture(scope="module")
def rank_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "small.tiktoken"
    tokens = [bytes([b]) for b in range(256)] + [b"th", b"the", b" t", b" the", b"in", b"ing", "é".encode()]
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return path


@pytest.fixture(scope="module")
def toks(trained, rank_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    hf = tokenizers.Tokenizer.from_str(trained.to_str())
    hf.add_special_tokens([EOT, "<|im_end|>"])
    hf.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    specs = {"gpt2": f"gpt2:{rank_file}", "bpe": "bpe:1000", "words": "words:300", "bytes": "bytes",
             "hf": f"hf:{folder}"}
    return {kind: open_tokenizer(spec, iter(TEXTS)) for kind, spec in specs.items()}


def test_sizes_and_separators(toks):
    assert {k: (t.vocab_size, t.eot) for k, t in toks.items()} == {
        "gpt2": (264, 263), "bpe": (1000, 999), "words": (300, 1), "bytes": (257, 256), "hf": (1001, 999)}


def test_bpe_by_tiktoken_equals_bpe_by_tokenizers(toks, trained):
    for text in [*TEXTS, ODD, "a" * 3000, " \n" * 500]:
        assert toks["bpe"].encode(text) == trained.encode(text).ids


def test_ranks_equal_tiktoken_with_the_published_pattern(toks, rank_file):
    ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in rank_file.open("rb"))}
    reference = tiktoken.Encoding("ref", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in [*TEXTS, ODD]:
        assert toks["gpt2"].encode(text) == reference.encode_ordinary(text)


def test_the_librarys_fast_batches_equal_its_slow_ones(toks):
    for kind in ("hf", "words"):
        slow = toks[kind].library.encode_batch([*TEXTS, ODD], add_special_tokens=False)
        assert [e.ids for e in slow] == [a.tolist() for a in toks[kind].encode_batch([*TEXTS, ODD])]


@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_single_and_special_tokens_are_plain_text(toks, kind):
    tok = toks[kind]
    batch = tok.encode_batch([*TEXTS, "", ODD, EOT], threads=3)
    assert [a.tolist() for a in batch] == [tok.encode(t) for t in [*TEXTS, "", ODD, EOT]]
    assert all(a.dtype.kind == "u" for a in batch) and len(batch[len(TEXTS)]) == 0
    assert tok.encode_batch([]) == []
    assert not any(np.any(a == tok.eot) for a in batch)
    assert tok.decode([tok.eot]) == EOT


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "words"])
def test_lossless(toks, kind):
    for text in [*TEXTS, ODD, " leading", "trailing ", "", "\n", "\U0010ffff"]:
        assert toks[kind].decode(toks[kind].encode(text)) == text


def test_words(toks):
    tok = toks["words"]
    small = open_tokenizer("words:4", iter(["the cat sat, <unk> the <unk>", "cat <unk> ran. the end"]))
    assert small.vocab_size == 4 and set(small.content["model"]["vocab"]) == {"<unk>", EOT, "the", "cat"}
    assert small.decode(small.encode("the cat flew")) == "the cat <unk>"
    assert small.encode("x <unk> \"<unk>,") == [0, 0, 0, 0, 0]  # unknown words and the literal share an id
    assert tok.encode("<|endoftext|>").count(tok.eot) == 0
    assert tok.decode(tok.encode("the  name\nof (the) value")) == "the name of ( the ) value"
    again = open_tokenizer("words:300", iter(TEXTS))
    assert again.fingerprint == tok.fingerprint


def test_fewer_words_than_asked_for():
    tok = open_tokenizer("words:1000", iter(["just three words"]))
    assert tok.vocab_size == 5 and max(tok.encode("just three words")) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_a_stream_equals_decoding_at_once(toks, kind):
    tok, rng = toks[kind], random.Random(1)
    runs = [tok.encode(TEXTS[0]), tok.encode(ODD), rng.choices(range(tok.vocab_size), k=3000), [tok.eot], [],
            tok.encode("👩‍👩‍👧")[:-1]]
    for ids in runs:
        stream = StreamDecoder(tok)
        out = [stream.push(i) for i in ids]
        assert "".join([*out, stream.flush()]) == tok.decode(ids)
    shown = map(StreamDecoder(tok).push, tok.encode("naïve 日本語 👩‍👩‍👧"))
    assert not any("\ufffd" in s for s in shown)


def test_stream_of_a_decoder_that_depends_on_neighbours(tmp_path):
    """Like SentencePiece: the text of a space or a single byte depends on its neighbours."""
    vocab = {"<unk>": 0, "</s>": 1, "▁the": 2, "▁cat": 3, "s": 4}
    vocab |= {f"<0x{b:02X}>": 5 + b for b in range(256)}
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tok.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0)])
    tok.save(str(tmp_path / "tokenizer.json"))
    ours = open_tokenizer(f"hf:{tmp_path}/tokenizer.json")
    ids = [2, 3, 4, *(5 + b for b in "né日".encode()), 2, 4]
    stream = StreamDecoder(ours)
    out = [stream.push(i) for i in ids]
    assert ours.eot == 1 and "".join(out) + stream.flush() == ours.decode(ids) == "the catsné日 thes"
    assert "\ufffd" not in "".join(out)


def test_streaming_is_linear(toks):
    """Counts decoded ids, not seconds."""
    tok, seen = toks["words"], 0
    plain = tok._decode

    class Counting(type(tok)):
        def __init__(self):
            self.__dict__.update(tok.__dict__)

        def _decode(self, ids):
            nonlocal seen
            seen += len(ids)
            return plain(ids)

    stream = StreamDecoder(Counting())
    for i in tok.encode(TEXTS[0] * 3)[:3000]:
        stream.push(i)
    assert seen <= 5 * 3000


@pytest.mark.parametrize("kind", KINDS)
def test_saved_in_one_file_and_loaded_without_the_original(toks, kind, tmp_path):
    tok = toks[kind]
    tok.save(str(tmp_path))
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    again = load(str(tmp_path))
    same = ("name", "eot", "vocab_size", "fingerprint")
    assert [getattr(again, a) for a in same] == [getattr(tok, a) for a in same]
    assert [a.tolist() for a in again.encode_batch([*TEXTS[:9], ODD])] == \
        [a.tolist() for a in tok.encode_batch([*TEXTS[:9], ODD])]


def test_fingerprints_differ_when_the_encoding_could(toks, tmp_path):
    assert len({t.fingerprint for t in toks.values()}) == len(toks)
    assert open_tokenizer("bpe:1000", iter(TEXTS)).fingerprint == toks["bpe"].fingerprint
    assert open_tokenizer("bpe:1000", iter(TEXTS[:9])).fingerprint != toks["bpe"].fingerprint
    tokens = toks["gpt2"].content[:]
    tokens[260], tokens[261] = tokens[261], tokens[260]  # the same tokens, merged in another order
    assert tokenizer.RankBPE("gpt2", tokens, 263).fingerprint != toks["gpt2"].fingerprint


def test_ids_out_of_range(toks):
    for tok in toks.values():
        for bad in (-1, tok.vocab_size):
            with pytest.raises(ValueError, match=f"id {bad} is not in 0 .. {tok.vocab_size - 1}"):
                tok.decode([0, bad])


@pytest.mark.parametrize("spec", ["", "gpt3", "bpe", "bpe:", "bpe:x", "gpt2:", "hf:", "bytes:3", "bpe:-5"])
def test_a_bad_spec_lists_the_valid_forms(spec):
    with pytest.raises(UserError, match="is not one of: gpt2, gpt2:PATH.*bpe:8192, words:1000, bytes, hf:"):
        open_tokenizer(spec, iter(TEXTS))


def test_too_few_ids_or_no_text():
    with pytest.raises(UserError, match="at least 257"):
        open_tokenizer("bpe:256", iter(TEXTS))
    with pytest.raises(UserError, match="at least 3"):
        open_tokenizer("words:2", iter(TEXTS))
    with pytest.raises(UserError, match="must be trained on text, but there is none"):
        open_tokenizer("bpe:300")


@pytest.mark.parametrize("content", [b"", b"hello\n", b"aGVsbG8= 0\n", b"{}", b"\xff\xfe 1 2\n", b"!! 0\n"])
def test_a_file_without_ranks_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match="not a rank file: expected a base64 token"):
        open_tokenizer(f"gpt2:{tmp_path}/x")


def test_rank_files_with_gaps_or_duplicates_or_missing(rank_file, tmp_path):
    lines = rank_file.read_bytes().splitlines(keepends=True)
    double = lines[0].replace(b" 0\n", b" 262\n")
    for broken in (lines[:-2] + lines[-1:], lines + lines[-1:], lines[1:], lines[:-1] + [double]):
        (tmp_path / "x").write_bytes(b"".join(broken))
        with pytest.raises(UserError, match="not a rank file"):
            open_tokenizer(f"gpt2:{tmp_path}/x")
    with pytest.raises(UserError, match="gpt2:.*nowhere: No such file"):
        open_tokenizer(f"gpt2:{tmp_path}/nowhere")


def test_gpt2_without_a_network_offers_ways_out(monkeypatch):
    def refuse(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(UserError) as e:
        open_tokenizer("gpt2")
    for way_out in ("--tokenizer=gpt2:PATH/gpt2.tiktoken", "openai-whisper", "--tokenizer=bpe:8192"):
        assert way_out in str(e.value)


def test_gpt2_through_tiktoken(monkeypatch, toks):
    ranks = {base64.b64decode(t): i for i, t in enumerate(toks["gpt2"].content)}
    fake = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": fake}.get)
    tok = open_tokenizer("gpt2")
    assert (tok.name, tok.fingerprint) == ("gpt2", toks["gpt2"].fingerprint)


def test_hf_errors(tmp_path, monkeypatch):
    def refuse(name, **_):
        raise Exception("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match="could not be fetched from the Hugging Face hub; --tokenizer=hf:PA"):
        open_tokenizer("hf:owner/name")
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(UserError, match="is not a tokenizer.json of `tokenizers`"):
        open_tokenizer(f"hf:{tmp_path}")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no known token that separates documents.*eos_token"):
        open_tokenizer(f"hf:{tmp_path}")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    assert open_tokenizer(f"hf:{tmp_path}").eot == 0


def test_missing_and_damaged_files(toks, tmp_path):
    with pytest.raises(UserError, match="no .*tokenizer.json; prepare_data.py writes it"):
        load(str(tmp_path))
    path = tmp_path / "tokenizer.json"
    for kind, tok in toks.items():
        tok.save(str(tmp_path))
        whole = path.read_text()
        path.write_text(whole[:len(whole) // 2])
        with pytest.raises(UserError, match="is damaged"):
            load(str(tmp_path))
        path.write_text(whole.replace('"eot": ', '"eot": 1'))
        with pytest.raises(UserError, match="is damaged"):
            load(str(tmp_path))
        changed = json.loads(whole)
        changed["kind"] = "pickle"
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError, match="is damaged"):
            load(str(tmp_path))
        assert kind


def test_importing_is_light_and_a_missing_package_is_named():
    code = """
import sys
for name in ("tiktoken", "tokenizers", "datasets"):
    sys.modules[name] = None
from common.tokenizer import open_tokenizer, UserError
assert open_tokenizer("bytes").decode(open_tokenizer("bytes").encode("hé")) == "hé"
for spec, package in (("bpe:300", "tokenizers"), ("gpt2", "tiktoken"), ("hf:x", "tokenizers")):
    try:
        open_tokenizer(spec, iter(["a b"]))
    except UserError as e:
        assert f"pip install {package}" in str(e), e
    else:
        raise SystemExit(f"no error for {spec}")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.path.dirname(os.path.dirname(__file__)))
