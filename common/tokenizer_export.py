"""A tokenizer as transformers' AutoTokenizer loads it: tokenizer.json of the library `tokenizers`, with the
same ids for the same text."""
import json

from common.tokenizer import (
    CHAT_TOKENS,
    EOT,
    Bytes,
    Chat,
    HuggingFace,
    RankBPE,
    Tokenizer,
    byte_alphabet,
    need,
)

# common/chat.py's format for our own chat tokens
CHAT_TEMPLATE = ("{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}<|end|>{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def library_json(tok: Tokenizer) -> dict:
    """The content of tokenizer.json."""
    if isinstance(tok, HuggingFace):
        return tok.content
    if isinstance(tok, Bytes):
        return byte_level([bytes([b]) for b in range(256)], [], regex=False)
    if isinstance(tok, RankBPE):
        return byte_level(tok.tokens[:-1], merges_of(tok.tokens[:-1]), regex=True)
    if isinstance(tok, Chat):  # transformers takes a literal <|user|> in a text for the token
        lib = need("tokenizers")
        made = lib.Tokenizer.from_str(json.dumps(library_json(tok.base)))
        made.add_special_tokens([lib.AddedToken(t, special=True, normalized=False) for t in CHAT_TOKENS])
        assert all(made.token_to_id(t) == i for t, i in tok.id_of.items()), "chat tokens have other ids"
        return json.loads(made.to_str())
    raise NotImplementedError(f"tokenizer kind {tok.kind}")


def tokenizer_config(tok: Tokenizer, max_seq_len: int) -> dict:
    """The content of tokenizer_config.json."""
    eot = tok.decode([tok.eot])
    out = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": eot, "eos_token": eot,
           "clean_up_tokenization_spaces": False, "model_max_length": max_seq_len}
    if isinstance(tok, Chat):
        out |= {"chat_template": CHAT_TEMPLATE, "eos_token": "<|end|>"}
    if tok.template:
        out |= {key: value for key, value in tok.template.items() if value}
    return out


def byte_level(tokens: list[bytes], merges: list, regex: bool) -> dict:
    """Byte-level BPE whose ids are the places in `tokens`; the end of text is the last id. `regex`: text is
    first cut by GPT-2's rules, which are the library's own."""
    lib, shown = need("tokenizers"), {b: c for c, b in byte_alphabet().items()}

    def text(token: bytes) -> str:
        return "".join(shown[b] for b in token)

    vocab = {text(token): i for i, token in enumerate(tokens)}
    bpe = lib.models.BPE(vocab, [(text(a), text(b)) for a, b in merges], ignore_merges=bool(merges))
    made = lib.Tokenizer(bpe)
    made.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    made.decoder = lib.decoders.ByteLevel()
    made.add_special_tokens([lib.AddedToken(EOT, special=True, normalized=False)])
    return json.loads(made.to_str())


def merges_of(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of two or more bytes was merged from: what is left of its bytes when all
    earlier merges are applied, the earliest first."""
    ranks = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, rank in ranks.items():
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
            if (first := min(pairs)) >= rank:
                break
            i = pairs.index(first)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges
