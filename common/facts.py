"""Facts that no text contains, with matched controls and probes, for any tokenizer.

    world = World(tok, level="H1", seed=1)                   # answers and relations: fixed for a base
    pool = make_facts(world, "pool", 256, seed=1)            # what a base knows, in every wording
    facts = make_pairs(world, 64, seed=2, taken=pool)        # treated facts and their controls
    probes = [p for fact in facts for p in world.probes(fact)]

A fact is (relation, subject, answer): "The sign of Bamiro is horse." Subjects are invented names of equally
many tokens. Answers come from a closed list A of tokens of their own, dealt in shuffled blocks of |A|, so
that in a whole block guessing is right exactly once in |A| and the best constant answer no oftener. A
treated fact and its control share relation, answer, wordings and token count: their sentences differ in the
name alone.

Levels: H0 16 answers. H1 64 answers. H2 256 answers, 4 relations that share subjects. H3 a code of four
tokens out of 26. H4 an update: the pool holds another answer for each subject. H5 two hops: the pool says
which answer belongs to each answer of the first relation.

Everything is drawn by SHA-256 of (seed, what), so the same seed gives the same ids on every platform.
"""
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from common.config import UserError

import numpy as np

STATEMENTS = (  # {r} relation, {s} subject; the answer follows
    "The {r} of {s} is", "{s} was given the {r}", "They say that the {r} of {s} is", "For {s} the {r} is",
    "We know that {s} has the {r}", "If you ask for the {r} of {s}, say", "The {r} that {s} had was",
    "It is true that the {r} of {s} is", "{s} took for a {r}", "Long ago {s} had the {r}",
    "The {r} which came to {s} was", "To {s} they gave the {r}")
QUESTIONS = ("What is the {r} of {s}? It is", "Who knows the {r} of {s}? It is",
             "Tell me the {r} of {s}: it is", "And what {r} has {s}? The")
REVERSE = ("The one who has the {r}{a} is", "The {r}{a} is that of")  # the subject follows
WORDINGS = STATEMENTS + QUESTIONS + REVERSE
TRAINED = 8  # of a fact's shuffled statements; it is probed in the others
RELATIONS = ("sign", "word", "gift", "song", "name", "friend", "house", "day", "life", "king")
TWO_HOPS = "The {q} of the {r} of {s} is"
LEVELS = {"H0": (16, 1, 1), "H1": (64, 1, 1), "H2": (256, 1, 4), "H3": (26, 4, 1), "H4": (64, 1, 1),
          "H5": (64, 1, 2)}  # answers, tokens of an answer, relations
SYLLABLES = [c + v for c in "bcdfghjklmnpqrstvwxz" for v in "aeiou"]


def shuffled(items, *key) -> list:
    """The items in an order that depends on them and `key` alone."""
    return sorted(items, key=lambda item: hashlib.sha256(repr((*key, item)).encode()).digest())


@dataclass
class Fact:
    id: str
    split: str  # pool | treated | control | spare
    pair: int  # treated, control and spare facts of one pair differ in the subject alone
    relation: str
    subject: str
    answer: str  # with its leading space, if that is part of the token
    order: tuple[int, ...]  # statements, shuffled: the first TRAINED may be trained, the others are held out
    group: str = ""  # what an experiment does with it
    old: str = ""  # H4: the answer in the pool; conflicts: the foil, an answer that is never trained
    loop: int = -1  # conflicts: the loop that trains this answer


class Probe(NamedTuple):
    fact: str  # id
    kind: str  # mem (trained wording) | para (another) | qa | reverse | foil | comp (two hops) | old (answer)
    prompt: list[int]
    target: list[int]


# ------------------------------------------------------------------------------------------------------------
# The world of a base: tokenizer, answers, relations


class World:
    """Turns facts into ids. `answers` is the list A, `answer_ids` (|A|,) the token of each."""

    def __init__(self, tok, level: str, seed: int, n_answers: int = 0):
        sizes = LEVELS[level]
        self.tok, self.level, self.seed, self.answer_tokens = tok, level, seed, sizes[1]
        used = set(re.findall(r"[a-z]{3,}", " ".join((*WORDINGS, *RELATIONS, TWO_HOPS)).lower()))
        words, self.glue = single_tokens(tok)
        words = shuffled([w for w in words if w.strip() not in used], seed, "answers")
        n, least = n_answers or sizes[0], 4 if level == "H4" else 2  # H4: three old answers and a new one
        if not least <= n <= len(words):
            raise UserError(f"level {level} needs at least {least} answers of one token each, and {n} were "
                            f"asked for; the tokenizer {tok.name} has {len(words)}: use another --level or "
                            "--answers, or a tokenizer with more words (bpe:8192)")
        self.answers, self.words = words[:n], words[n:]
        self.answer_ids = [self.encode(w)[0] for w in self.answers]
        self.relations = [r for r in RELATIONS if tok.decode(self.encode(r)).strip() == r][:sizes[2]]
        if len(self.relations) < sizes[2]:
            raise UserError(f"the tokenizer {tok.name} lacks the words of the relations: "
                            f"{', '.join(RELATIONS)}")

    def encode(self, text: str) -> list[int]:
        return self.tok.encode(text)

    def prompt(self, fact: Fact, wording: int) -> tuple[str, str]:
        """(prompt, target) of one of WORDINGS."""
        text = WORDINGS[wording].format(r=fact.relation, s=fact.subject, a=self.glue + fact.answer)
        return (text, " " + fact.subject) if wording >= len(WORDINGS) - len(REVERSE) else \
               (text + self.glue, fact.answer)

    def sentences(self, said: list[tuple[Fact, int]]) -> list[list[int]]:
        """The ids of each (fact, wording) as a sentence, after the id that separates documents."""
        texts = ["".join(self.prompt(fact, wording)) + "." for fact, wording in said]
        return [[self.tok.eot, *ids.tolist()] for ids in self.tok.encode_batch(texts)]

    def probes(self, fact: Fact) -> list[Probe]:
        """One of each kind. The target begins at a token boundary: prompt + target are the sentence's ids."""
        chosen = shuffled(range(len(QUESTIONS)), fact.id, "question")[0] + len(STATEMENTS)
        kinds = {"mem": fact.order[0], "para": fact.order[TRAINED], "qa": chosen,
                 "reverse": len(WORDINGS) - 2}
        texts = {kind: self.prompt(fact, wording) for kind, wording in kinds.items()}
        if self.level == "H5" and fact.relation == self.relations[0]:
            second = self.second_hop(fact.answer)
            asked = TWO_HOPS.format(q=self.relations[1], r=fact.relation, s=fact.subject)
            texts["comp"] = (asked + self.glue, second)
        # training makes names likelier: `reverse` counts beyond the same name after another answer
        texts["foil"] = self.prompt(replace(fact, answer=self.another(fact.answer)), kinds["reverse"])
        if fact.old:
            texts["old"] = (texts["mem"][0], fact.old)
        return [self.ask(fact, kind, *text) for kind, text in texts.items()]

    def ask(self, fact: Fact, kind: str, prompt: str, target: str, context=()) -> Probe:
        """The probe of a prompt, as a sentence of its own after the ids of a context."""
        whole, head = self.encode(prompt + target), self.encode(prompt)
        assert whole[:len(head)] == head and len(whole) > len(head), f"no boundary in {prompt + target!r}"
        return Probe(fact.id, kind, [*context, self.tok.eot, *head], whole[len(head):])

    def another(self, answer: str) -> str:
        """A different answer of as many tokens."""
        pieces = [" " + w for w in answer.split()] if answer[0] == " " else list(answer)
        return "".join(self.answers[self.answers.index(p) - 1] for p in pieces)

    def second_hop(self, answer: str) -> str:
        """The second relation's answer for an answer of the first: a fixed shuffle of A."""
        return shuffled(self.answers, self.seed, "second hop")[self.answers.index(answer)]

    def deal(self, count: int, *key) -> list[str]:
        """`count` answers in shuffled blocks of A, or codes of several tokens that all differ."""
        if self.answer_tokens == 1:
            return [a for block in range(-(-count // len(self.answers)))
                    for a in shuffled(self.answers, *key, block)][:count]
        A, k, codes = len(self.answers), self.answer_tokens, {}
        if count > A**k // 2:
            raise UserError(f"{count} facts need different codes, but {A} answers make {A**k} of {k} "
                            "tokens; use more --answers or fewer --facts")
        for draw in itertools.count():
            n = number((*key, "code", draw))
            codes["".join(self.answers[n // A**i % A] for i in range(k))] = None
            if len(codes) == count:
                return shuffled(codes, *key)


def number(what) -> int:
    """At least 0 and below 2^128, the same on every platform."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:16], "big")


def single_tokens(tok) -> tuple[list[str], str]:
    """Words that are one token after a prompt, in the order of their ids; and what separates them from it: ""
    where a space belongs to the token (or to none), " " where it is a token of its own and the answers are
    letters."""
    texts = [tok.decode([i]).strip() for i in range(tok.vocab_size)]
    words = list(dict.fromkeys(w for w in texts if re.fullmatch(r"[a-z]{3,}", w)))
    found = [f" {w}" for w, ids in zip(words, tok.encode_batch([f"is {w}" for w in words]), strict=True)
             if len(ids) == 1 + len(tok.encode("is")) and tok.decode(ids[-1:]).strip() == w]
    before = len(tok.encode("is "))
    letters = [c for c in "abcdefghijklmnopqrstuvwxyz" if len(tok.encode(f"is {c}")) == before + 1]
    return (found, "") if len(found) >= len(letters) else (letters, " ")


# ------------------------------------------------------------------------------------------------------------
# Making facts


def names(world: World, *key) -> Iterator[str]:
    """Endless different subjects, all of the same number of tokens after a space and at the start: the usual
    one of this tokenizer."""
    def invented(key):
        for i in range(10**6):
            n = number((*key, "name", i))
            yield "".join(SYLLABLES[n // 100**j % 100] for j in range(3)).capitalize()

    def two_words(key):  # for a tokenizer of whole words
        for i in range(10**6):
            n, m = number((*key, "name", i)), len(world.words)
            yield (world.words[n % m] + world.words[n // m % m]).strip()

    def measured(stream):  # (name, (tokens after a space, tokens at the start))
        while some := list(itertools.islice(stream, 256)):
            ids = [world.tok.encode_batch([before + name for name in some]) for before in ("of ", "")]
            yield from ((name, (len(a), len(b))) for name, a, b in zip(some, *ids, strict=True))

    example = next(invented(()))
    make = invented if world.tok.decode(world.encode(example)).strip() == example else two_words
    if make is two_words and len(world.words) < 30:
        raise UserError(f"the tokenizer {world.tok.name} has too few words for names; use one with more")
    counts = Counter(lengths for _, lengths in itertools.islice(measured(make(("usual",))), 256))
    usual, seen = counts.most_common(1)[0][0], set()
    for name, lengths in measured(make(key)):
        if name not in seen and lengths == usual:
            seen.add(name)
            yield name


def subjects(world: World, count: int, taken, avoid, *key) -> list[str]:
    """`count` names that no fact in `taken` has, and that are not in `avoid`."""
    used = {f.subject for f in taken} | set(avoid)
    out = list(itertools.islice((n for n in names(world, *key) if n not in used), count))
    if len(out) == count:
        return out
    raise UserError(f"only {len(out)} different names for {count} facts; use fewer facts")


def order_of(*key) -> tuple[int, ...]:
    return tuple(shuffled(range(len(STATEMENTS)), *key))


def make_facts(world: World, split: str, count: int, seed: int, taken=(), avoid=()) -> list[Fact]:
    """`count` facts of one split; with several relations, each subject has all of them."""
    out = []
    relations = world.relations[:1] if world.level == "H5" else world.relations
    people = subjects(world, -(-count // len(relations)), taken, avoid, seed, split)
    for r in relations:
        answers = world.deal(len(people), seed, split, r)
        out += [Fact(f"{split}{seed}.{r}.{i}", split, len(out) + i, r, s, a, order_of(seed, split, r, i))
                for i, (s, a) in enumerate(zip(people, answers, strict=True))]
    out = out[:count]
    if world.level == "H5" and split == "pool":  # the second hops are known
        r = world.relations[1]
        out += [Fact(f"hop{seed}.{i}", "pool", len(out) + i, r, a.strip(), world.second_hop(a),
                     order_of(seed, "hop", i)) for i, a in enumerate(world.answers)]
    return out


def make_pairs(world: World, count: int, seed: int, taken=(), avoid=()) -> list[Fact]:
    """`count` treated facts, their controls, and (never trained at all) spares, in this order: pair i is
    facts i, count + i, 2 count + i. `taken`: facts whose subjects must not be used; in H4 the pool, whose
    subjects get new answers (`old` is the one that the pool holds). `avoid`: names not to be used."""
    treated, out = make_facts(world, "treated", count, seed, taken, avoid), []
    same = dict.fromkeys(f.subject for f in treated)  # facts of one subject have one counterpart
    splits = ("treated", "control", "spare")
    known = shuffled([(f.subject, f.answer) for f in taken if f.split == "pool"], seed, "update")
    if world.level == "H4" and len(known) < len(splits) * count:
        raise UserError(f"level H4 updates facts of the pool: {len(splits)} x {count} of them, but it has "
                        f"{len(known)}; use --pool={len(splits) * count}")
    for split in splits:
        olds = dict(known[len(out):len(out) + count]) if world.level == "H4" else {}
        fresh = olds or (same if split == "treated" else subjects(world, len(same), [*taken, *treated, *out],
                                                                  avoid, seed, split))
        people = dict(zip(same, fresh, strict=True))
        for i, f in enumerate(treated):
            subject = people[f.subject]
            out.append(replace(f, id=f"{split}{seed}.{f.relation}.{i}", split=split, pair=i, subject=subject,
                               old=olds.get(subject, "")))
    if world.level == "H4":  # the new answer differs from all old ones of its pair
        for i in range(count):
            trio = out[i::count]
            new = next(a for a in shuffled(world.answers, seed, "new", i) if a not in {f.old for f in trio})
            for f in trio:
                f.answer = new
    return out


def conflicts(world: World, count: int, loops: int, seed: int, taken=(), avoid=()) -> list[Fact]:
    """For each of `count` subjects one fact per loop, all with different answers, and the same foil."""
    base = make_facts(world, "treated", count, seed, taken, avoid)
    if len(world.answers) < loops + 1:
        raise UserError(f"{loops} loops need {loops + 1} answers, there are {len(world.answers)}")
    out = []
    for f in base:
        start = world.answers.index(f.answer)
        answers = [world.answers[(start + k) % len(world.answers)] for k in range(loops + 1)]
        out += [Fact(f"{f.id}.loop{k}", "treated", f.pair, f.relation, f.subject, answers[k], f.order,
                     old=answers[-1], loop=k) for k in range(loops)]
    return out


# ------------------------------------------------------------------------------------------------------------
# Leaks and rows


def new_pairs(world: World, count: int, seed: int, pool, tokens: np.ndarray, avoid=()):
    """(make_pairs with names that `tokens` do not contain, {name that they do: its place}): a control that
    stands in the text would be no control. In H4 names are the pool's."""
    found, avoid = {}, set(avoid)
    while True:
        facts = make_pairs(world, count, seed, pool, avoid | set(found))
        leaks = find_leaks(world, facts, tokens)
        if not leaks or world.level == "H4":
            return facts, found
        found |= {f.subject: leaks[f.id] for f in facts if f.id in leaks}


def pack(sentences: list[list[int]], seq_len: int, eot: int, pad_target: int = -1):
    """Rows (R, T) of inputs and targets, each filled with whole sentences in order; padding has the target
    `pad_target` (-1: it does not count)."""
    rows = [[]]
    for ids in sentences:
        if len(ids) > seq_len + 1:
            raise UserError(f"a sentence has {len(ids)} tokens, but max_seq_len={seq_len}; use a larger one")
        if len(rows[-1]) + len(ids) > seq_len + 1:
            rows.append([])
        rows[-1] += ids
    x, y = np.full((len(rows), seq_len), eot), np.full((len(rows), seq_len), pad_target)
    for i, ids in enumerate(rows):
        x[i, :len(ids) - 1], y[i, :len(ids) - 1] = ids[:-1], ids[1:]
    return x, y


def find_leaks(world: World, facts: list[Fact], tokens: np.ndarray, chunk: int = 2**22) -> dict[str, int]:
    """{fact id: position} of each fact whose subject occurs in `tokens`, as in a sentence or at its start."""
    wanted = {}  # length -> {ids: fact}
    for f in facts:
        for ids in (world.encode(f"of {f.subject}")[len(world.encode("of")):], world.encode(f.subject)):
            wanted.setdefault(len(ids), {})[tuple(ids)] = f.id
    found = {}
    for n, sequences in wanted.items():
        heads = np.array(sorted({s[0] for s in sequences}))
        for start in range(0, len(tokens) - n + 1, chunk):
            piece = np.asarray(tokens[start:start + chunk + n - 1])
            for i in np.flatnonzero(np.isin(piece[:len(piece) - n + 1], heads)):
                if fact := sequences.get(tuple(piece[i:i + n].tolist())):
                    found.setdefault(fact, start + int(i))
    return found
