"""Tokenizers behind one interface, made from the strings that --tokenizer takes:

    gpt2            GPT-2's byte-pair encoding (tiktoken); gpt2:PATH/gpt2.tiktoken reads a local rank file
    bpe:8192        byte-level BPE with 8192 ids, trained on the training split, with GPT-2's rules
    words:1000      the most frequent words; the 1000 ids include <unk> and <|endoftext|>
    bytes           256 bytes and <|endoftext|>
    hf:NAME_OR_PATH a tokenizer.json of the `tokenizers` library: a file, a folder, or a name on the hub

Whatever the kind, `save` writes one self-contained tokenizer.json: data and run folders can be moved freely.
"""
import base64
import hashlib
import importlib
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor

from common.config import UserError
from common.files import read_json, write_text

import numpy as np

EOT = "<|endoftext|>"
UNK = "<unk>"
CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
FILE = "tokenizer.json"
FILES = (FILE, "vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.jinja")  # on the hub
FORMS = "gpt2, gpt2:PATH/gpt2.tiktoken, bpe:8192, words:1000, bytes, hf:NAME_OR_PATH"
# OpenAI's r50k pattern: a space belongs to the word after it, so text may be cut at a space between letters
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
WORD_PATTERN = rf"{UNK}|\w+|(?:(?!{UNK})[^\w\s])+"


def need(module: str):
    """Import a module only when it is used; UserError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(f"this needs the package '{module}' ({e})\n"
                        f"install it with:  pip install {module.partition('.')[0]}") from None


# ------------------------------------------------------------------------------------------------------------
# The kinds


class Tokenizer:
    """ids are 0 .. vocab_size - 1; `eot` is the id placed before every document.

    `content` (JSON) fully describes how text becomes ids. `fingerprint` is the SHA-256 of kind, eot and
    content: it differs between tokenizers that could encode differently, whatever their names. `template` is
    the chat template that came with it ({"chat_template", "bos_token", "eos_token"}), or None."""

    template = None

    def __init__(self, name: str, content, eot: int, vocab_size: int):
        self.name, self.content, self.eot, self.vocab_size = name, content, eot, vocab_size
        canonical = json.dumps([self.kind, eot, content], sort_keys=True, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: list[str], threads: int = 0) -> list[np.ndarray]:
        """Unsigned ids of each text, in parallel (threads=0: all cores). Special tokens are plain text."""
        raise NotImplementedError

    def decode(self, ids) -> str:
        """The text of any ids; broken UTF-8 becomes U+FFFD. ValueError if an id is out of range."""
        ids = [int(i) for i in ids]
        if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"id {bad[0]} is not in 0 .. {self.vocab_size - 1}, the ids of {self.name}")
        return self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", "replace")

    def token_bytes(self, i: int) -> bytes | None:
        """The bytes of one id, or None if they depend on its neighbours."""
        raise NotImplementedError

    def special_ids(self) -> set[int]:
        """Ids that no text encodes to."""
        return {self.eot}

    def save(self, folder: str) -> None:
        keys = ["kind", "name", "eot", "vocab_size", "fingerprint", "content"]
        keys += ["template"] * bool(self.template)
        data = json.dumps({key: getattr(self, key) for key in keys}, ensure_ascii=False)
        write_text(os.path.join(folder, FILE), data)


class Bytes(Tokenizer):
    kind = "bytes"

    def __init__(self, name: str = "bytes", content=None, eot: int = 256):
        super().__init__(name, content, eot, 257)

    def encode_batch(self, texts, threads=0):
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def token_bytes(self, i):
        return EOT.encode() if i == self.eot else bytes([i])


class RankBPE(Tokenizer):
    """Byte-pair encoding by ranks, GPT-2's or our own: the id of a token is its rank, eot is the last id.

    Our own is trained by `tokenizers` but also encoded by tiktoken, which gives the same ids (tested) several
    times faster on 2 cores."""
    kind = "ranks"

    def __init__(self, name: str, content: list[str], eot: int):
        super().__init__(name, content, eot, len(content) + 1)
        self.tokens = [base64.b64decode(t, validate=True) for t in content] + [EOT.encode()]
        ranks = {token: i for i, token in enumerate(self.tokens[:-1])}
        if eot != len(content) or len(ranks) != eot or not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError("ranks must be unique, have no gaps, and cover all 256 bytes")
        self.encoding = need("tiktoken").Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                                  special_tokens={EOT: eot})

    def encode_batch(self, texts, threads=0):
        def work(group):  # into arrays, because tiktoken encodes without the GIL but fills lists under it
            return [self.encoding.encode_to_numpy(text, disallowed_special=()) for text in group]

        if len(texts) < 32:  # starting threads takes longer
            return work(texts)
        threads = threads or os.cpu_count() or 1
        step = -(-len(texts) // (8 * threads)) or 1
        with ThreadPoolExecutor(threads) as pool:
            groups = pool.map(work, (texts[i:i + step] for i in range(0, len(texts), step)))
            return [ids for group in groups for ids in group]

    def token_bytes(self, i):
        return self.tokens[i]


class HuggingFace(Tokenizer):
    """hf:... and words:N, run by `tokenizers`: RAYON_NUM_THREADS sets its threads, `threads` does not."""
    kind = "tokenizers"

    def __init__(self, name: str, content: dict, eot: int):
        self.library = need("tokenizers").Tokenizer.from_str(json.dumps(content))
        self.library.no_truncation()
        self.library.no_padding()
        self.library.encode_special_tokens = True  # special tokens in a text are plain text
        vocab = self.library.get_vocab(with_added_tokens=True)
        super().__init__(name, content, eot, max(vocab.values()) + 1)
        self.bytes_of = None  # id -> bytes, if these do not depend on neighbours
        if (content.get("decoder") or {}).get("type") == "ByteLevel":
            byte_of, added = byte_alphabet(), {t["id"] for t in content.get("added_tokens", [])}
            self.bytes_of = {i: token.encode() if i in added else bytes(byte_of[c] for c in token)
                             for token, i in vocab.items()}

    def encode_batch(self, texts, threads=0):
        found = self.library.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, dtype=np.uint32) for e in found]

    def _decode(self, ids):
        return self.library.decode(ids, skip_special_tokens=False)

    def token_bytes(self, i):
        return None if self.bytes_of is None else self.bytes_of.get(i, b"")

    def special_ids(self) -> set[int]:
        return {self.eot, *(t["id"] for t in self.content.get("added_tokens", []) if t["special"])}

    def encode_template(self, text: str) -> list[int]:
        """Ids of trusted text, in which special tokens are special."""
        self.library.encode_special_tokens = False
        try:
            return self.library.encode(text, add_special_tokens=False).ids
        finally:
            self.library.encode_special_tokens = True


class Chat(Tokenizer):
    """Another tokenizer, the `base`, with CHAT_TOKENS above its ids. No text encodes to them, as the base
    encodes it; a literal <|user|> is ordinary text."""
    kind = "chat"

    def __init__(self, name: str, content: dict, eot: int):
        self.base = KINDS[content["kind"]](name.removesuffix("+chat"), content["content"], eot)
        super().__init__(name, content, eot, self.base.vocab_size + len(CHAT_TOKENS))
        self.id_of = {token: self.base.vocab_size + i for i, token in enumerate(CHAT_TOKENS)}

    def encode_batch(self, texts, threads=0):
        return self.base.encode_batch(texts, threads)

    def _decode(self, ids):
        runs = itertools.groupby(ids, lambda i: i < self.base.vocab_size)
        return "".join(self.base._decode(list(run)) if plain else "".join(map(self.chat_token, run))
                       for plain, run in runs)

    def token_bytes(self, i):
        return self.base.token_bytes(i) if i < self.base.vocab_size else self.chat_token(i).encode()

    def special_ids(self):
        return self.base.special_ids() | set(self.id_of.values())

    def chat_token(self, i: int) -> str:
        return CHAT_TOKENS[i - self.base.vocab_size]


KINDS = {c.kind: c for c in (Bytes, RankBPE, HuggingFace, Chat)}


def with_chat_tokens(tok: Tokenizer) -> Chat:
    return Chat(f"{tok.name}+chat", {"kind": tok.kind, "content": tok.content}, tok.eot)


def byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte -> the byte: printable bytes are themselves, others start at U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(rest)}


# ------------------------------------------------------------------------------------------------------------
# Making and loading


def open_tokenizer(spec: str, train_texts=None) -> Tokenizer:
    """The tokenizer that a --tokenizer string names; bpe:N and words:N learn from `train_texts` (strings)."""
    kind, _, rest = spec.partition(":")
    if kind in ("bpe", "words") and rest.isdecimal():
        train, least = (train_bpe, 257) if kind == "bpe" else (train_words, 3)
        if int(rest) < least:
            raise UserError(f"--tokenizer={spec}: {kind} needs at least {least} ids")
        if train_texts is None:
            raise UserError(f"--tokenizer={spec} must be trained on text, but there is none here")
        print(f"training the tokenizer {spec} on the training text")
        return train(train_texts, int(rest))
    if spec == "bytes":
        return Bytes()
    if kind == "gpt2" and (rest or spec == "gpt2"):
        return gpt2(rest)
    if kind == "hf" and rest:
        return hugging_face(rest)
    raise UserError(f"--tokenizer={spec} is not one of: {FORMS}")


def rank_bpe(name: str, tokens: list[bytes]) -> RankBPE:
    return RankBPE(name, [base64.b64encode(t).decode() for t in tokens], len(tokens))


def gpt2(path: str) -> RankBPE:
    """From a .tiktoken file (a base64 token and its rank per line) or, without a path, by tiktoken."""
    if not path:
        try:
            ranks = need("tiktoken").get_encoding("gpt2")._mergeable_ranks
        except (OSError, ValueError) as e:
            raise UserError(
                f"tiktoken could not download GPT-2's ranks ({type(e).__name__}); without a network, use\n"
                "  --tokenizer=gpt2:PATH/gpt2.tiktoken  a rank file: whisper/assets/gpt2.tiktoken from\n"
                "                                       `pip download --no-deps openai-whisper`\n"
                "  --tokenizer=bpe:8192                 trained on your text, no download") from None
        return rank_bpe("gpt2", sorted(ranks, key=ranks.get))
    try:
        with open(path, "rb") as f:
            words = f.read().split()
        pairs = sorted(zip(map(int, words[1::2]), words[::2], strict=True))
        if [rank for rank, _ in pairs] != list(range(len(pairs))):
            raise ValueError("ranks have gaps")
        name = "gpt2" if len(pairs) == 50256 else f"gpt2:{os.path.basename(path)}"
        return RankBPE(name, [token.decode() for _, token in pairs], len(pairs))
    except OSError as e:
        raise UserError(f"--tokenizer=gpt2:{path}: {e.strerror}") from None
    except ValueError:
        raise UserError(f"--tokenizer=gpt2:{path} is not a rank file: expected a base64 token and its rank\n"
                        "per line, ranks without gaps, and all 256 single bytes among the tokens") from None


def train_bpe(texts, vocab_size: int) -> RankBPE:
    """Byte-level BPE with `vocab_size` ids (fewer if the text runs out of pairs)."""
    lib = need("tokenizers")
    tok = lib.Tokenizer(lib.models.BPE())
    tok.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = lib.pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(texts, lib.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False))
    vocab, byte_of = tok.get_vocab(), byte_alphabet()
    return rank_bpe(f"bpe:{vocab_size}", [bytes(byte_of[c] for c in t) for t in sorted(vocab, key=vocab.get)])


def train_words(texts, vocab_size: int) -> HuggingFace:
    """The most frequent words and runs of punctuation. A literal <unk> is the id <unk>; line ends vanish."""
    lib = need("tokenizers")
    tok = lib.Tokenizer(lib.models.WordLevel())
    tok.pre_tokenizer = lib.pre_tokenizers.Split(lib.Regex(WORD_PATTERN), behavior="removed", invert=True)
    tok.train_from_iterator(texts, lib.trainers.WordLevelTrainer(vocab_size=vocab_size, show_progress=False))
    found = tok.get_vocab()
    words = [w for w in sorted(found, key=found.get) if w != UNK][:vocab_size - 2]
    tok.model = lib.models.WordLevel({w: i for i, w in enumerate([UNK, EOT, *words])}, unk_token=UNK)
    return HuggingFace(f"words:{vocab_size}", json.loads(tok.to_str()), eot=1)


def hugging_face(where: str) -> HuggingFace:
    """From a tokenizer.json, a folder that contains one, or the hub."""
    library, path = need("tokenizers").Tokenizer, os.path.expanduser(where)
    local = os.path.isfile(path) or any(os.path.exists(os.path.join(path, f)) for f in (FILE, "merges.txt"))
    try:
        if not local:
            path = need("huggingface_hub").snapshot_download(where, allow_patterns=[*FILES])
        folder, path = path, os.path.join(path, FILE) if os.path.isdir(path) else path
        old = not os.path.exists(path) and os.path.exists(os.path.join(folder, "merges.txt"))  # OPT
        config = os.path.join(os.path.dirname(path), "tokenizer_config.json")
        content = from_merges(folder) if old else read_json(path)
        vocab = library.from_str(json.dumps(content)).get_vocab(with_added_tokens=True)
        eos = read_json(config).get("eos_token") if os.path.exists(config) else None
    except Exception as e:  # `tokenizers` raises bare Exceptions
        what = "is not a tokenizer.json of `tokenizers`" if local else (
            "is not a local file or folder and could not be fetched from the Hugging Face hub; "
            "--tokenizer=hf:PATH/tokenizer.json needs no network")
        raise UserError(f"--tokenizer=hf:{where} {what} ({type(e).__name__}: {str(e)[:200]})") from None
    eos = eos.get("content") if isinstance(eos, dict) else eos
    # a chat model's eos ends a turn (<|im_end|>); prefer the token that separated pre-training documents
    for token in (EOT, "<|end_of_text|>", eos, "</s>", "<eos>", "[SEP]"):
        if token in vocab:
            tok = HuggingFace(f"hf:{where}", content, vocab[token])
            tok.template = chat_template(os.path.dirname(path))
            return tok
    raise UserError(f"--tokenizer=hf:{where} has no known token that separates documents; name one as "
                    '"eos_token" in a tokenizer_config.json next to tokenizer.json')


def from_merges(folder: str) -> dict:
    """The content of tokenizer.json for a folder of GPT-2's older files, vocab.json and merges.txt."""
    lib, paths = need("tokenizers"), [os.path.join(folder, name) for name in ("vocab.json", "merges.txt")]
    tok = lib.Tokenizer(lib.models.BPE.from_file(*paths))
    tok.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = lib.decoders.ByteLevel()
    special = [t for t in (EOT, "<s>", "<pad>", "</s>", "<unk>") if t in tok.get_vocab()]
    tok.add_special_tokens([lib.AddedToken(t, special=True, normalized=False) for t in special])
    return json.loads(tok.to_str())


def load(path: str) -> Tokenizer:
    """The tokenizer saved in a data or run folder, or next to a file; UserError if missing or damaged."""
    path = os.path.join(os.path.dirname(path) if os.path.isfile(path) else path, FILE)
    try:
        saved = read_json(path)
        tok = KINDS[saved["kind"]](saved["name"], saved["content"], saved["eot"])
        tok.template = saved.get("template")
        if tok.fingerprint != saved["fingerprint"]:
            raise ValueError("its content does not match its fingerprint")
        return tok
    except FileNotFoundError:
        raise UserError(f"no {path}; prepare_data.py writes it next to the tokens") from None
    except UserError:
        raise
    except Exception as e:  # `tokenizers` raises bare Exceptions
        raise UserError(f"{path} is damaged ({type(e).__name__}: {str(e)[:200]})\ncopy it again from where "
                        "it was made, or recreate its folder with prepare_data.py --overwrite") from None


def chat_template(folder: str) -> dict | None:
    """Tokenizer.template from a folder's tokenizer_config.json and, in newer ones, chat_template.jinja."""
    config, path = (os.path.join(folder, name) for name in ("tokenizer_config.json", "chat_template.jinja"))
    settings = read_json(config) if os.path.exists(config) else {}
    found = settings.get("chat_template")
    if isinstance(found, list):  # named ones
        found = next((t["template"] for t in found if t["name"] == "default"), None)
    if not found and os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            found = f.read()
    tokens = {key: settings.get(key) or "" for key in ("bos_token", "eos_token")}
    tokens = {key: t["content"] if isinstance(t, dict) else t for key, t in tokens.items()}
    return {"chat_template": found, **tokens} if found else None
