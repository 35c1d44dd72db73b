"""common/facts.py: the unit tests that the protocol asks for, over all levels and kinds of tokenizer."""
import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict
from pydoc_data.topics import topics

from common import tokenizer
from common.config import UserError
from common.facts import (
    LEVELS,
    STATEMENTS,
    TRAINED,
    WORDINGS,
    World,
    conflicts,
    find_leaks,
    make_facts,
    make_pairs,
    pack,
    shuffled,
)

import numpy as np
import pytest


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.open_tokenizer("bpe:2000", sorted(topics.values()))


def words_tokenizer():
    return tokenizer.open_tokenizer("words:400",
                                    [" ".join(f"{a}{b}" for a in ("ba", "ke", "lo", "mi", "tu", "ra")
                                                           for b in "abcdefghijklmnopqrst")
                                                           + " the of is sign word "
                                                  "gift song It To given was that they say have who has"] * 2)


def worlds(bpe):
    """Worlds of every level, with as many answers as small tokenizers have."""
    for tok in (bpe, tokenizer.Bytes(), words_tokenizer()):
        for level, (n, *_) in LEVELS.items():
            try:
                yield World(tok, level, 1, min(n, 16) if level != "H3" else 0)
            except UserError as e:
                assert tok.name != "bytes" or level != "H3", e


def test_pairs_differ_in_the_subject_alone_and_answers_are_balanced(bpe):
    seen = set()
    for world in worlds(bpe):
        seen.add((world.tok.name, world.level))
        n = 2 * len(world.answers)
        pool = make_facts(world, "pool", 3 * n, 1)
        facts = make_pairs(world, n, 2, pool)
        assert [f.split for f in facts] == ["treated"] * n + ["control"] * n + ["spare"] * n
        names = [f.subject for f in facts]
        if world.level != "H4":
            assert not set(names) & {f.subject for f in pool}
            assert len(set(names)) == 3 * n / len({f.relation for f in facts})
        for i in range(n):
            trio = facts[i::n]
            assert len({(f.relation, f.answer, f.order, f.pair) for f in trio}) == 1
            assert len({f.subject for f in trio}) == 3
            for wording in (trio[0].order[0], len(STATEMENTS)):
                a, b, c = world.sentences([(f, wording) for f in trio])
                assert len(a) == len(b) == len(c)
                assert sum(x != y for x, y in zip(a, b,
                                                  strict=True)) <= len(world.encode(" "
                                                                                    + trio[0].subject)) + 1
        if world.level in ("H0", "H1", "H5"):  # guessing is right exactly once in |A|, in each third
            for k in range(3):
                counts = Counter(f.answer for f in facts[k * n:(k + 1) * n])
                assert set(counts.values()) == {2} and len(counts) == len(world.answers)
    assert len(seen) >= 13, seen


def test_probes_ask_for_the_answer_at_a_token_boundary_without_telling_it(bpe):
    for world in worlds(bpe):
        pool = make_facts(world, "pool", 64, 1)
        for fact in make_pairs(world, 16, 3, pool)[:16]:
            probes = {p.kind: p for p in world.probes(fact)}
            assert {"mem", "para", "qa", "reverse", "foil"} <= set(probes)
            assert ("old" in probes) == (world.level == "H4") and ("comp" in probes) == (world.level == "H5")
            for kind in ("mem", "para", "qa"):
                p = probes[kind]
                assert len(p.target) == world.answer_tokens and p.prompt[0] == world.tok.eot
                assert world.tok.decode(p.target).strip() == fact.answer.strip()
                whole = [i for i in range(len(p.prompt)) if p.prompt[i:i + len(p.target)] == p.target]
                assert not whole or world.glue, "the answer stands in the prompt"  # bytes: it is a letter
            # a probe continues a training sentence: trained for mem, held out for para
            sentences = {w: s for w, s in enumerate(world.sentences([(fact, w)
                                                                     for w in range(len(WORDINGS))]))}
            for kind, places in (("mem", fact.order[:TRAINED]), ("para", fact.order[TRAINED:])):
                whole = probes[kind].prompt + probes[kind].target
                assert any(sentences[w][:len(whole)] == whole for w in places), kind
            if "old" in probes:
                assert probes["old"].prompt == probes["mem"].prompt
                assert probes["old"].target != probes["mem"].target
            assert probes["foil"].target == probes["reverse"].target
            assert probes["foil"].prompt != probes["reverse"].prompt


def test_the_same_seed_gives_the_same_ids_everywhere():
    """Hashes computed once: they change if a platform, a version of Python or an edit draws differently."""
    world = World(tokenizer.Bytes(), "H0", 1)
    facts = make_facts(world, "pool", 32, 1) + make_pairs(world, 16, 2)
    text = json.dumps([asdict(f) for f in facts], sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == FACTS_SHA
    assert make_pairs(world, 16, 3)[0].subject != make_pairs(world, 16, 2)[0].subject
    assert shuffled(range(8), 1, "x") == SHUFFLED


FACTS_SHA, SHUFFLED = "ec6b59265b10a439", [5, 7, 1, 6, 2, 3, 0, 4]


def test_two_hops_follow_the_pool(bpe):
    world = World(bpe, "H5", 1, 16)
    pool = make_facts(world, "pool", 32, 1)
    hops = {f.subject: f.answer for f in pool if f.relation == world.relations[1]}
    assert len(hops) == 16
    for fact in make_pairs(world, 16, 2, pool)[:16]:
        comp = next(p for p in world.probes(fact) if p.kind == "comp")
        assert world.tok.decode(comp.target) == hops[fact.answer.strip()]


def test_an_update_has_a_new_answer_for_a_subject_of_the_pool(bpe):
    world = World(bpe, "H4", 1, 16)
    pool = make_facts(world, "pool", 96, 1)
    known = {f.subject: f.answer for f in pool}
    facts = make_pairs(world, 32, 2, pool)
    assert len({f.subject for f in facts}) == 96 and all(f.old == known[f.subject] != f.answer for f in facts)
    with pytest.raises(UserError, match="--pool=120"):
        make_pairs(world, 40, 2, pool)


def test_conflicts_have_an_answer_per_loop_and_a_foil_that_none_has(bpe):
    world = World(bpe, "H0", 1)
    facts = conflicts(world, 16, 4, 5)
    for i in range(16):
        group = [f for f in facts if f.pair == i]
        assert [f.loop for f in group] == [0, 1, 2, 3] and len({(f.subject, f.relation) for f in group}) == 1
        assert len({f.answer for f in group} | {f.old for f in group}) == 5
    assert all(set(Counter(f.answer for f in facts if f.loop == k).values()) == {1} for k in range(4))


def test_packing_keeps_whole_sentences_and_masks_padding():
    rng = np.random.default_rng(1)
    sentences = [[99, *rng.integers(0, 90, n).tolist()] for n in rng.integers(3, 12, 40)]
    x, y = pack(sentences, 24, 99)
    rows = [[*xs[:1].tolist(), *ys[ys >= 0].tolist()] for xs, ys in zip(x, y, strict=True)]
    assert [t for row in rows for t in row] == [t for s in sentences for t in s]
    assert all(len(row) <= 25 and row[0] == 99 for row in rows) and len(rows) < 20
    assert (x[y < 0] == 99).all() and (pack(sentences, 24, 99, 7)[1] >= 0).all()
    with pytest.raises(UserError, match="max_seq_len"):
        pack([list(range(30))], 24, 99)


def test_a_planted_subject_is_found(bpe):
    world = World(bpe, "H0", 1)
    facts = make_pairs(world, 16, 2)
    tokens = np.concatenate(bpe.encode_batch(sorted(topics.values())))[:20000]
    assert find_leaks(world, facts, tokens) == {}
    inside, at_start = (np.array(ids) for ids in (world.encode(f" of {facts[20].subject} is"),
                                                  world.encode(f"{facts[3].subject} was")))
    tokens[5000:5000 + len(inside)], tokens[-len(at_start):] = inside, at_start
    for chunk in (2**22, 997):
        assert find_leaks(world, facts, tokens, chunk) == {facts[20].id: 5001,
                                                           facts[3].id: 20000 - len(at_start)}


def test_too_few_answers_and_names_say_what_to_do(bpe):
    with pytest.raises(UserError, match="another --level or --answers"):
        World(tokenizer.Bytes(), "H2", 1)
    assert all(re.fullmatch(r"[a-z]", a) for a in World(tokenizer.Bytes(), "H0", 1).answers)


def test_codes_all_differ_even_where_draws_collide(bpe):
    world = World(bpe, "H3", 1, 4)  # 256 codes
    drawn = world.deal(100, 1)
    assert len(set(drawn)) == 100 and {len(world.encode(code)) for code in drawn} == {4}
    with pytest.raises(UserError, match="more --answers"):
        world.deal(200, 1)
    with pytest.raises(UserError, match="at least 4 answers"):
        World(bpe, "H4", 1, 3)
