"""The chat format: conversations as tokens.

A conversation is a list of turns (role, text): perhaps one of "system", then "user" and "assistant" in turns,
the last an assistant's. As tokens it is

    head, then for each turn opens[role], the tokens of its text, closes[role]

A tokenizer without a chat template of its own gets four tokens above its vocabulary: <|system|>, <|user|>
and <|assistant|> open a turn, <|end|> closes it, and head is empty. A tokenizer with a template (Qwen's is
ChatML: <|im_start|>user, a line end, the text, <|im_end|>, a line end) keeps it. What opens and closes an
answer has a token that no text encodes to, so a text cannot end its turn or speak for another; a literal
<|end|> is text.
"""
import functools
import re
import time
from dataclasses import dataclass

from common.config import UserError
from common.tokenizer import Chat, Tokenizer, need, with_chat_tokens

import numpy as np

Turns = list[tuple[str, str]]  # (role, text)
MARK = "qxzq"  # stands for a text when a template is taken apart


@dataclass(frozen=True)
class ChatFormat:
    head: list[int]  # before a conversation without a system turn
    opens: dict[str, list[int]]  # by role; a template may have no "system"
    closes: dict[str, list[int]]

    @property
    def stop(self) -> int:
        """The token that ends an answer."""
        return self.closes["assistant"][0]

    def join(self, turns: list[tuple[str, list[int]]]) -> list[int]:
        """The tokens of a conversation whose turns are (role, ids)."""
        if turns and turns[0][0] == "system" and "system" not in self.opens:
            raise UserError("this model's chat template has no system turn; leave it out of the conversation")
        out = [] if turns and turns[0][0] == "system" else list(self.head)
        for role, ids in turns:
            out += [*self.opens[role], *ids, *self.closes[role]]
        return out

    def prompt(self, turns: list[tuple[str, list[int]]], room: int) -> list[int]:
        """What an answer follows: the conversation, without as many of its oldest exchanges as it takes to
        fit `room` tokens. If the last message alone is too long, its beginning is cut off."""
        system, turns = [t for t in turns if t[0] == "system"], [t for t in turns if t[0] != "system"]
        while True:
            ids = self.join([*system, *turns]) + self.opens["assistant"]
            if len(ids) <= room:
                return ids
            if len(turns) > 1:
                turns = turns[2:]
                continue
            (role, last), over = turns[0], len(ids) - room
            if over >= len(last):
                raise UserError(f"a context of {room} tokens has no room for a message")
            turns = [(role, last[over:])]


def format_of(tok: Tokenizer) -> ChatFormat | None:
    """The chat format of a tokenizer; None if it has no chat tokens. UserError for a template that a text
    could imitate or that is not one turn after another."""
    if tok.template:
        return template_format(tok)
    if not isinstance(tok, Chat):
        return None
    system, user, assistant, end = ([i] for i in tok.id_of.values())
    return ChatFormat([], {"system": system, "user": user, "assistant": assistant},
                      {"system": end, "user": end, "assistant": end})


def for_chat(tok: Tokenizer) -> tuple[Tokenizer, ChatFormat]:
    """The tokenizer to prepare conversations with, and its format: chat tokens are added where needed."""
    try:
        found = format_of(tok)
    except UserError as e:
        print(f"{e}: using nanoMem's own chat tokens instead")
        tok.template = found = None
    if found is None:
        tok = with_chat_tokens(tok)
        found = format_of(tok)
    return tok, found


# ------------------------------------------------------------------------------------------------------------
# Templates of pretrained models


def template_format(tok: Tokenizer) -> ChatFormat:
    """Take the tokenizer's template apart by rendering texts that stand for any text."""
    parts, same = functools.partial(render, tok.template), f"the chat template of {tok.name}"
    first, user_to_assistant, close_a = parts("user", "assistant")
    *_, assistant_to_user, close_u = parts("user", "assistant", "user")
    opens = {"user": assistant_to_user.removeprefix(close_a),
             "assistant": user_to_assistant.removeprefix(close_u)}
    closes, head = {"user": close_u, "assistant": close_a}, first.removesuffix(opens["user"])
    one, two = close_u + opens["assistant"], close_a + opens["user"]
    if parts("user", "assistant", "user", "assistant", "user", answer=True) != [
            head + opens["user"], one, two, one, two, one]:
        raise UserError(f"{same} is not one turn after another")
    if found := parts("system", "user"):
        opens["system"], closes["system"] = found[0], found[1].removesuffix(opens["user"])
    opens, closes = ({role: tok.encode_template(t) for role, t in part.items()} for part in (opens, closes))
    head, special = tok.encode_template(head), tok.special_ids()
    unique = [opens["user"], opens["assistant"], closes["assistant"][:1]]
    if not all(special & set(ids) for ids in unique):
        raise UserError(f"{same} opens or closes turns with ordinary text, which a message could imitate")
    if tok.eot in sum([*opens.values(), *closes.values()], head):
        raise UserError(f"{same} uses the token that separates documents")
    return ChatFormat(head, opens, closes)


def render(template: dict, *roles: str, answer: bool = False) -> list[str]:
    """What the template writes before, between and after the texts of turns in these roles. [] if it refuses
    a system turn; UserError if it cannot be read."""
    jinja = need("jinja2.sandbox")  # a template is data: it may compute text, nothing else
    env = jinja.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    messages = [{"role": role, "content": f"{MARK}{i}{MARK}"} for i, role in enumerate(roles)]
    try:
        text = env.from_string(template["chat_template"]).render(
            messages=messages, add_generation_prompt=answer, bos_token=template["bos_token"],
            eos_token=template["eos_token"])
    except Exception as e:  # a template may raise anything
        if "system" in roles:
            return []
        raise UserError(f"the chat template cannot be read ({type(e).__name__}: {str(e)[:200]})") from None
    found = re.split(f"{MARK}(\\d+){MARK}", text)
    if found[1::2] != [str(i) for i in range(len(roles))]:
        raise UserError("the chat template does not write each turn once, in order")
    return found[::2]


def refuse(message: str):
    raise ValueError(message)


def find(ids, pattern: list[int]) -> np.ndarray:
    """Where `pattern` begins in ids (N,), in order."""
    hits = np.flatnonzero(ids[:max(0, len(ids) - len(pattern) + 1)] == pattern[0])
    for i, token in enumerate(pattern):
        hits = hits[ids[hits + i] == token]
    return hits


def answer_tokens(ids, form: ChatFormat) -> np.ndarray:
    """(N,) bool: what the model is to say itself, an answer's text and the token that ends it."""
    begins = find(ids, form.opens["assistant"]) + len(form.opens["assistant"])
    stops = np.append(np.flatnonzero(ids == form.stop), len(ids) - 1)  # the last one may be cut off
    begins = begins[begins < len(ids)]
    change = np.zeros(len(ids) + 1, dtype=np.int8)
    change[begins] = 1
    np.add.at(change, stops[np.searchsorted(stops, begins)] + 1, -1)
    return change[:-1].cumsum(dtype=np.int8) > 0
