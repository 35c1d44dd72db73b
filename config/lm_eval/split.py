"""What split.yaml needs. The harness puts its prefix token where the split has the separator before its first
document; its windows are then those of common/evaluate.py, but for the last: it fills that up with earlier
text, so up to max_seq_len - 1 targets have a longer context than here."""
from common.config import UserError
from common.data import open_tokens, read_meta

from datasets import Dataset
from transformers import AutoTokenizer


def whole(data: str, split: str, pretrained: str, **_) -> dict:
    """The split of a data folder as one text, with what `measures` divides by."""
    meta, tok = read_meta(data), AutoTokenizer.from_pretrained(pretrained)
    ids = open_tokens(data, split, meta)[1:].tolist()
    text = tok.decode(ids, clean_up_tokenization_spaces=False)
    if tok.encode(text, add_special_tokens=False) != ids:
        raise UserError(f"the tokenizer of {pretrained} does not give back the tokens of {data}: they are of "
                        "another tokenizer, or of one that loses text, such as words:1000")
    return {"test": Dataset.from_list([{"text": text, "targets": len(ids)} | meta["splits"][split]])}


def measures(doc: dict, results: list[float]) -> dict:
    """As in common/evaluate.py. The harness divides a pair of log-likelihood and weight itself."""
    return {"perplexity": results[0] / doc["targets"], "bits_per_byte": (results[0], doc["bytes"]),
            "word_perplexity": (results[0], doc["words"])}
