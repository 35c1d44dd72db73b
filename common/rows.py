"""What a row of a .jsonl file, a .parquet file or a data set holds: a text, or a conversation."""
from typing import NamedTuple

from common.config import UserError

FIELDS = ("messages", "conversations", "turns", "utterances", "dialog", "dialogue")  # where they are
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def items_of(row: dict, key: str, where: str) -> str | list[tuple[str, str]]:
    """A row's field: a string, or the (role, text) of a list of strings (role "") or of turns, which are
    {"role", "content" or "text"} or {"from", "value"}."""
    key = field_of(key, row) if isinstance(row, dict) else key
    if not isinstance(row, dict) or key not in row:
        has = (f"it has: {', '.join(row)}. Choose one with --text_key=..." if isinstance(row, dict)
               else f"the row is a {type(row).__name__}, not an object")
        raise UserError(f"{where}: no field '{key}'; {has}")
    value, found = row[key], []
    if isinstance(value, str):
        return value
    for item in value if isinstance(value, list) else [None]:
        role, text = "", item
        if isinstance(item, dict):
            role = item.get("role", item.get("from"))
            text = item.get("text", item.get("content", item.get("value")))
        if not isinstance(role, str) or not isinstance(text, str):
            raise UserError(f"{where}: field '{key}' is not a string, a list of strings, or a list of turns "
                            f"with \"role\" and \"text\" or \"content\": {str(value)[:80]}")
        found.append((role, text))
    return found


def field_of(key: str, names) -> str:
    """`key`, or where it is empty the first of FIELDS among the names."""
    return key or next((k for k in FIELDS if k in names), "text")


def text_of(row: dict, key: str, where: str) -> str:
    """A row's text; of turns, one per line."""
    items = items_of(row, key, where)
    return items if isinstance(items, str) else "\n".join(f"{r}: {text}" if r else text for r, text in items)


class Dialogue(NamedTuple):
    text: str  # what text_of gives
    turns: list[tuple[str, str]]  # (role, text) as in common/chat.py; [] if it is not one of two speakers


def dialogue_of(row: dict, key: str, where: str) -> Dialogue:
    """A row's conversation. Strings are the user's and the assistant's in turns. Of two speakers with other
    names, the first to speak is the user. Turns in a row by one speaker are joined by a line end."""
    items = items_of(row, key, where)
    if isinstance(items, str):
        raise UserError(f"{where}: expected a list of strings or of turns with \"role\" and \"content\", got "
                        f"the text {items[:60]!r}; leave out --chat to train on it as text")
    roles = [ROLES.get(r.lower(), r) if r else ("user", "assistant")[i % 2] for i, (r, _) in enumerate(items)]
    if not {"user", "assistant"} & set(roles):
        speakers = [r for r in dict.fromkeys(roles) if r != "system"]
        named = dict(zip(speakers, ("user", "assistant"), strict=False))
        roles = [named.get(r, r) for r in roles]
    turns = []
    for role, (_, text) in zip(roles, items, strict=True):
        text = text.strip()
        if role not in ("system", "user", "assistant") or role == "system" and turns:
            return Dialogue(text_of(row, key, where), [])
        if not text:
            continue
        if turns and turns[-1][0] == role:
            turns[-1] = role, turns[-1][1] + "\n" + text
            continue
        if role == "assistant" and (not turns or turns[-1][0] == "system"):
            turns.append(("user", ""))  # it speaks first
        turns.append((role, text))
    while turns and turns[-1][0] != "assistant":
        turns.pop()  # nobody answers
    return Dialogue(text_of(row, key, where), turns)
