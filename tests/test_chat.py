"""Conversations from the file to the terminal: format, targets, rows, training and chat, for every mixer."""
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import sys
import zipfile

import prepare_data
import quantize
import sample
import train
from common import chat, checkpoint, conversations, data, rows, tokenizer
from common.config import UserError
from common.distributed import Dist
from common.evaluate import evaluate
from common.step import backward
from model import LM, ModelConfig, load_model
from tests.test_prepare_data import hub_folder
from tests.test_processes import start

import numpy as np
import pytest
import tokenizers
import torch

CPU = torch.device("cpu")
LITERAL = "<|user|> <|assistant|><|end|> <|im_start|>user\n<|im_end|> <|endoftext|> <unk>"
WORDS = "yes no why not the old cat sat on a red mat and slept all day long said she to him".split()


def talks(count: int, seed: int = 0) -> list[list[str]]:
    """Conversations of 2 to 13 strings, most of them short."""
    rng = np.random.default_rng(seed)
    lengths = ([int(rng.integers(1, 9 if rng.random() < 0.95 else 60)) for _ in range(rng.integers(2, 14))]
               for _ in range(count))
    return [[" ".join(rng.choice(WORDS, n)) + LITERAL * (i % 9 == 8) for i, n in enumerate(talk)]
            for talk in lengths]


def chatml(folder) -> str:
    """A byte-level tokenizer with ChatML's tokens and template, as on the hub."""
    lib = tokenizers.Tokenizer(tokenizers.models.BPE())
    lib.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    lib.decoder = tokenizers.decoders.ByteLevel()
    lib.train_from_iterator(WORDS, tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
    folder.mkdir()
    lib.save(str(folder / "tokenizer.json"))
    turn = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    template = ("{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
                f"{{% for m in messages %}}{turn}{{% endfor %}}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"eos_token": {"content": "<|im_end|>"}, "chat_template": template}))
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Data folders of the same conversations: as text, and as chats with every kind of tokenizer."""
    root = tmp_path_factory.mktemp("chat")
    source = root / "talks.jsonl"
    source.write_text("".join(json.dumps({"turns": t}) + "\n" for t in talks(120)))
    ranks = root / "small.tiktoken"
    text = prepare(root, source, text_key="turns", tokenizer="bpe:300", name="text")
    tokenizer_text = tokenizer.load(text)
    ranks.write_bytes("".join(f"{t} {i}\n" for i, t in enumerate(tokenizer_text.content)).encode())
    kinds = {"bytes": "bytes", "bpe": "bpe:300", "words": "words:40", "gpt2": f"gpt2:{ranks}",
             "chatml": f"hf:{chatml(root / 'hf')}"}
    found = {k: prepare(root, source, chat=True, tokenizer=kind, name=k) for k, kind in kinds.items()}
    found["same"] = prepare(root, source, chat=True, tokenizer_from=text, name="same")
    return found | {"text": text}


def prepare(root, source, **options) -> str:
    with contextlib.redirect_stdout(io.StringIO()):
        options |= {"source": str(source), "data_dir": str(root / "data")}
        prepare_data.main(prepare_data.PrepareConfig(**options))
    return str(root / "data" / options["name"])


def opened(folder: str, split: str = "train"):
    return data.open_tokens(folder, split, data.read_meta(folder))


# ------------------------------------------------------------------------------------------------------------
# Rows of a file


def test_shapes_of_a_conversation_and_what_is_left_out():
    def turns(value, key=""):
        return rows.dialogue_of({"messages": value}, key, "f:1").turns

    plain = [("user", "Hi"), ("assistant", "Hello")]
    assert turns([" Hi ", "Hello"]) == plain == turns(["Hi", "Hello", "Are you there?"])  # unanswered
    for role, text in (("role", "content"), ("role", "text"), ("from", "value")):
        for user, assistant in (("user", "assistant"), ("human", "gpt"), ("A", "B")):
            assert turns([{role: user, text: "Hi"}, {role: assistant, text: "Hello"}]) == plain
    a, b = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    assert turns([a, a, b, b]) == [("user", "Hi\nHi"), ("assistant", "Hello\nHello")]
    assert turns([{"role": "system", "content": "Be kind."}, a, b]) == [("system", "Be kind."), *plain]
    assert turns([b, a, b]) == [("user", ""), ("assistant", "Hello"), *plain]  # the assistant begins
    assert turns([a, b, {"role": "tool", "content": "x"}, b]) == turns(["Hi"]) == turns([]) == []
    with pytest.raises(UserError, match="f:1: expected a list of strings or of turns .* leave out --chat"):
        turns("Hi")
    with pytest.raises(UserError, match="no field 'text'; it has: a"):
        rows.dialogue_of({"a": []}, "", "f:1")


def test_text_and_chat_have_the_same_splits(folders):
    """Or the base would have been trained on the chat's validation conversations."""
    text, form = tokenizer.load(folders["text"]), chat.format_of(tokenizer.load(folders["same"]))
    for split in ("train", "val", "test"):
        ids, tok = np.asarray(opened(folders["text"], split)), tokenizer.load(folders["same"])
        plain = [text.decode(d[1:]) for d in np.split(ids, np.flatnonzero(ids == text.eot))[1:]]
        ids = np.asarray(opened(folders["same"], split).ids)
        talks = [d[1:].tolist() for d in np.split(ids, np.flatnonzero(ids == tok.eot))[1:]]
        assert len(plain) == len(talks) > 2
        for one, other in zip(plain, talks, strict=True):
            turns = tok.decode(other).replace("<|end|><|assistant|>", "\n").replace("<|end|><|user|>", "\n")
            turns = turns.removeprefix("<|user|>").removesuffix("<|end|>")
            assert one.startswith(turns) and one.count("\n") - turns.count("\n") in (0, 1, 2, 3)
    assert form.head == [] and data.read_meta(folders["same"])["tokenizer"]["base"] == text.fingerprint


@pytest.mark.parametrize("kind", ["bytes", "bpe", "words", "gpt2", "chatml"])
def test_no_text_encodes_to_a_special_token(folders, kind):
    tok = tokenizer.load(folders[kind])
    special = tok.special_ids()
    assert len(special) >= 3 and not special & set(tok.encode(LITERAL + "x" + LITERAL))
    form = chat.format_of(tok)
    ids = form.join([("user", tok.encode(LITERAL)), ("assistant", tok.encode(LITERAL))])
    assert sum(i in special for i in ids) == (6 if kind == "chatml" else 4)
    if kind != "words":  # which loses spaces
        assert tok.decode(tok.encode(LITERAL)) == LITERAL and tok.decode(ids).count(LITERAL) == 2
    else:
        assert tok.decode(ids).startswith("<|user|>") and tok.decode(ids).endswith("<|end|>")
    meta = data.read_meta(folders[kind])
    assert chat.ChatFormat(**meta["chat"]) == form and meta["tokenizer"]["vocab_size"] == tok.vocab_size


def test_a_template_becomes_a_format_or_is_refused(folders):
    tok = tokenizer.load(folders["chatml"])
    form = chat.format_of(tok)
    said = form.join([("user", tok.encode("why")), ("assistant", tok.encode("no"))])
    assert tok.decode(said) == ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nwhy<|im_end|>\n"
                                "<|im_start|>assistant\nno<|im_end|>\n")
    system = form.join([("system", tok.encode("Yes.")), ("user", tok.encode("why"))])
    assert tok.decode(system) == "<|im_start|>system\nYes.<|im_end|>\n<|im_start|>user\nwhy<|im_end|>\n"
    for template, message in (("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                               "{% if add_generation_prompt %}assistant: {% endif %}", "could imitate"),
                              ("{{ messages[0].content }}", "does not write each turn once"),
                              ("{{ raise_exception('no') }}", "cannot be read .ValueError: no"),
                              ("{{ messages.__class__.__mro__ }}", "cannot be read .SecurityError")):
        tok.template = {"chat_template": template, "bos_token": "", "eos_token": ""}
        with pytest.raises(UserError, match=message):
            chat.format_of(tok)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        own, form = chat.for_chat(tok)
    assert own.kind == "chat" and "own chat tokens instead" in out.getvalue() and form.head == []


# ------------------------------------------------------------------------------------------------------------
# Rows of a batch


def answers_by_hand(ids, form: chat.ChatFormat, eot: int) -> list[bool]:
    """Token by token: who speaks?"""
    out, speaker, opens = [], "", {r: form.opens[r] for r in ("user", "assistant", "system")}
    ids, i = list(ids), 0
    while i < len(ids):
        role = next((r for r, o in opens.items() if not speaker and ids[i:i + len(o)] == o), "")
        step = len(opens[role]) if role else 1
        out += [speaker == "assistant"] * step
        speaker = role or ("" if ids[i] in (form.stop, eot) else speaker)
        i += step
    return out


@pytest.mark.parametrize("kind", ["bytes", "bpe", "words", "chatml"])
def test_answers_are_found_token_by_token(folders, kind):
    for split in ("train", "val"):
        chats = opened(folders[kind], split)
        expected = answers_by_hand(chats.ids, chats.form, chats.eot)
        assert chat.answer_tokens(np.asarray(chats.ids), chats.form).tolist() == expected
        assert sum(expected) == data.read_meta(folders[kind])["splits"][split]["answer_tokens"] > 50


@pytest.mark.parametrize("kind", ["bytes", "chatml"])
@pytest.mark.parametrize("seq_len", [16, 40, 128, 4096])
def test_rows_hold_one_conversation_and_each_answer_token_once(folders, kind, seq_len):
    chats = opened(folders[kind])
    ids = np.asarray(chats.ids)
    counted = chat.answer_tokens(ids, chats.form)
    talk = (ids == chats.eot).cumsum()  # the number of the conversation of each token
    seen = np.zeros(len(ids), dtype=int)
    for a, b, c, d in chats.rows(seq_len):
        assert len({*talk[a:b], *talk[c:d]}) == 1 and chats.eot not in ids[c:d]
        assert b - a + d - c <= seq_len + 1
        (x,), (y,) = chats.pairs(np.array([(a, b, c, d)]), seq_len)
        where = np.concatenate((np.full(b - a, -1), np.arange(c, d)))[1:]  # of each target in ids
        y, x = y[:len(where)], x[:len(where)]
        assert np.array_equal(y >= 0, (where >= 0) & counted[where]) and (y >= 0).any()
        assert np.array_equal(y[y >= 0], ids[where[y >= 0]])
        assert np.array_equal(x, [*ids[a:b], *ids[c:d]][:-1])
        seen[where[y >= 0]] += 1
    assert np.array_equal(seen, counted.astype(int))
    if seq_len == 4096:
        assert len(chats.rows(seq_len)) == (ids == chats.eot).sum()  # whole conversations
    if kind == "chatml" and seq_len == 128:  # a part begins with the system turn
        heads = [r for r in chats.rows(seq_len) if r[1] > r[0]]
        assert heads and all(ids[a:b].tolist() == chats.form.head for a, b, _, _ in heads)


def test_training_rows_are_a_function_of_seed_and_sample(folders):
    chats = opened(folders["bytes"])
    one, two = (conversations.ChatRows(chats, 64, seed=3) for _ in range(2))
    n = one.per_epoch
    whole = one.rows(0, 2 * n)
    for epoch in (whole[:n], whole[n:]):
        assert sorted(map(tuple, epoch)) == sorted(map(tuple, chats.rows(64)))
    assert not np.array_equal(whole[:n], whole[n:])
    assert np.array_equal(two.rows(n - 3, 9), whole[n - 3:n + 6])
    assert np.array_equal(two.rows(1, 2), whole[1:3])
    x, y = one.batch(5, 7, CPU)
    full_x, full_y = map(torch.from_numpy, one.pairs(5, 7))
    assert torch.equal(x, full_x[:, :x.size(1)]) and torch.equal(y, full_y[:, :y.size(1)])
    assert (full_y[:, y.size(1):] == -1).all() and x.size(1) % 8 == 0
    assert "100.0%" not in chats.note(64, 8) and f"{n:,} rows" in chats.note(64, 8)


def test_evaluation_counts_the_answers_alone(folders):
    folder = folders["bytes"]
    chats, split = opened(folder, "val"), data.read_meta(folder)["splits"]["val"]
    torch.manual_seed(0)
    model = LM(ModelConfig(vocab_size=261, d_model=16, n_layers=1, n_heads=2, max_seq_len=48, pos="rope"))
    found = [evaluate(model, chats, split, 48, b, Dist(0, 1, CPU), "fp32", top1=t)
             for b, t in ((1, False), (5, True))]
    for key in ("loss", "bits_per_byte", "word_perplexity"):
        assert math.isclose(found[0][key], found[1][key], rel_tol=1e-5)
    nats, n = 0.0, 0
    for row in chats.rows(48):
        x, y = (torch.from_numpy(p) for p in chats.pairs(row[None], 48))
        valid = int((y >= 0).sum())
        nats, n = nats + model(x, y)[0].item() * valid, n + valid
    assert n == split["answer_tokens"] and math.isclose(found[0]["loss"], nats / n, rel_tol=1e-5)
    assert math.isclose(found[0]["bits_per_byte"], nats / math.log(2) / split["bytes"], rel_tol=1e-5)
    halves = [sum(int((y >= 0).sum()) for _, y in data.eval_batches(chats, 48, 3, r, 2, CPU)) for r in (0, 1)]
    assert sum(halves) == n


MIXERS = {"attention": {"pos": "learned"}, "rope": {"pos": "rope", "window": 8},
          "gated": {"mixer": "context", "pos": "none", "activation": "relu", "tie_embeddings": False},
          "scan": {"mixer": "context", "context_update": "scan", "pos": "none"},
          "lstm": {"mixer": "lstm", "pos": "none", "short_conv": 3}}
TINY = {"vocab_size": 261, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64}  # for bytes


@pytest.mark.parametrize("mixer", MIXERS)
def test_no_conversation_sees_another(folders, mixer):
    """Other words in one conversation leave the logits of all the others as they were, to the bit."""
    chats = opened(folders["bytes"])
    torch.manual_seed(0)
    model = LM(ModelConfig(**TINY | MIXERS[mixer])).eval()
    ids, talk = np.array(chats.ids), (np.asarray(chats.ids) == chats.eot).cumsum()
    some, letters = chats.rows(64)[:24], (ids >= 97) & (ids < 122)
    changed = np.where((talk == 3) & letters, ids + 1, ids)
    other = conversations.Chats(changed, chats.form, chats.eot)
    assert np.array_equal(other.rows(64), chats.rows(64))
    (x, _), (x2, _) = ((torch.from_numpy(a) for a in c.pairs(some, 64)) for c in (chats, other))
    mine = torch.from_numpy(talk[some[:, 2]] == 3)
    assert 0 < mine.sum() < 24 and torch.equal(x[~mine], x2[~mine]) and not torch.equal(x[mine], x2[mine])
    with torch.no_grad():
        a, b = model(x)[0], model(x2)[0]
    assert torch.equal(a[~mine], b[~mine]) and not torch.equal(a[mine], b[mine])


# ------------------------------------------------------------------------------------------------------------
# Training


@pytest.fixture(scope="module")
def base(folders, tmp_path_factory):
    """Options of a tiny base, trained on the conversations as text."""
    out = str(tmp_path_factory.mktemp("out"))
    small = dict(out_dir=out, device="cpu", dtype="fp32", batch_size=8, epochs=0.0, eval_interval=100)
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(train.TrainConfig(**small, name="base", data=folders["text"], d_model=32, n_layers=1,
                                     n_heads=2, max_seq_len=64, pos="rope", lr=1e-2, max_steps=60))
    return small | {"init_from": f"{out}/base"}


def tuned(base, folders, **options) -> dict:
    options = base | {"data": folders["same"], "max_steps": 12, "lr": 3e-3} | options
    with contextlib.redirect_stdout(io.StringIO()):
        return train.main(train.TrainConfig(**options))


def weights(base, name: str) -> dict:
    return checkpoint.load(os.path.join(base["out_dir"], name, "last.pt"))["model"]


def test_a_base_learns_to_answer_and_new_tokens_start_as_the_mean(base, folders):
    result = tuned(base, folders, name="chat", max_steps=60)
    assert result["result"]["loss"] < 3.2
    model, saved = load_model(os.path.join(base["out_dir"], "chat"))
    assert saved["pretrained"] == {"chat": True}  # an export stops where answers end
    assert (model.cfg.vocab_size, model.n_tokens, model.cfg.max_seq_len) == (304, 304, 64)
    old = checkpoint.load(base["init_from"])["model"]
    new = checkpoint.with_new_tokens(old, 300, 304)
    assert torch.equal(new["embed.weight"][:300], old["embed.weight"])
    assert torch.allclose(new["head.weight"][302], old["head.weight"].mean(0))
    assert len(new["head.bias"]) == 304
    spare = checkpoint.with_new_tokens({"embed.weight": torch.eye(6)}, 3, 5)["embed.weight"]
    assert torch.equal(spare[5], torch.eye(6)[5]) and torch.allclose(spare[4], torch.eye(6)[:3].mean(0))
    with pytest.raises(UserError, match="are new to .*base.* leave out lora_rank"):
        tuned(base, folders, name="lora", lora_rank=2)
    with pytest.raises(UserError, match="was trained with the tokenizer bpe:300"):
        tuned(base, folders, name="other", data=folders["words"])


@pytest.mark.parametrize("options", [{}, {"init_from": "", "d_model": 16, "n_layers": 1, "n_heads": 2,
                                          "max_seq_len": 48, "mixer": "lstm", "pos": "none", "tbptt": 20}])
def test_resume_is_exact_and_the_micro_batch_does_not_matter(base, folders, options):
    name = options.get("mixer", "attention")
    tuned(base, folders, **options, name=f"{name}_whole")
    whole = weights(base, f"{name}_whole")

    class Stop:  # after seven steps
        requested, count = False, itertools.count(1)
        __enter__, __exit__ = (lambda self: self), (lambda self, *_: None)

        def agreed(self, dist):
            return next(self.count) == 7

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "StopRequest", lambda minutes: Stop())
        tuned(base, folders, **options, name=f"{name}_stopped")
    tuned(base, folders, **options, name=f"{name}_stopped")
    assert all(torch.equal(w, whole[k]) for k, w in weights(base, f"{name}_stopped").items())
    tuned(base, folders, **options, name=f"{name}_micro", micro_batch_size=2)
    assert all(torch.allclose(w, whole[k], atol=2e-4) for k, w in weights(base, f"{name}_micro").items())


def test_micro_batches_of_unequal_answers_give_the_same_gradient(folders):
    samples = conversations.ChatRows(opened(folders["bytes"]), 64, 1)
    grads = []
    for micro in (8, 2, 1):
        torch.manual_seed(0)
        model = LM(ModelConfig(vocab_size=261, d_model=16, n_layers=1, n_heads=2, max_seq_len=64)).double()
        batches = [samples.batch(i, micro, CPU) for i in range(0, 8, micro)]
        backward(model, batches, Dist(0, 1, CPU), "fp32", torch.amp.GradScaler("cpu", enabled=False))
        grads.append(model.embed.weight.grad)
    assert torch.allclose(grads[0], grads[1], atol=1e-7) and torch.allclose(grads[0], grads[2], atol=1e-7)


@pytest.mark.slow
def test_two_processes_equal_one(base, folders):
    small = {"init_from": "", "d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 64}
    options = {"data": folders["same"], "max_steps": 12, "lr": 3e-3, "name": "two"}
    cfg = train.TrainConfig(**base | small | options)
    said, _ = (two := start(cfg, "--standalone", "--nproc_per_node=2")).communicate(timeout=120)
    assert two.returncode == 0, said
    tuned(base, folders, **small, name="one")
    one = weights(base, "one")
    assert all(torch.allclose(w, one[k], atol=2e-4) for k, w in weights(base, "two").items())


def test_old_text_is_replayed_and_evaluated_beside_conversations(base, folders):
    row = tuned(base, folders, name="replay", replay=0.25, replay_data=folders["text"],
                eval_data=(folders["text"],))
    assert math.isfinite(row["result"]["text_forgotten"])
    new, old = (data.samples(opened(folders[n]), 64, 1) for n in ("same", "text"))
    mixed = data.Mixed(new, old, 0.25)
    x, y = mixed.batch(0, 40, CPU)
    whole = (y >= 0).all(dim=1)
    assert whole.sum() == 10 and x.shape == (40, 64)
    assert torch.equal(x[~whole], torch.from_numpy(new.pairs(0, 30)[0]))


def test_scripts_that_read_text_refuse_conversations(folders):
    with pytest.raises(UserError, match="reads text, but its data folder holds conversations"):
        data.Windows(opened(folders["bytes"]), 16, 1)


# ------------------------------------------------------------------------------------------------------------
# Talking


def test_history_is_trimmed_by_whole_turns(folders):
    for kind in ("bytes", "chatml"):
        tok = tokenizer.load(folders[kind])
        form = chat.format_of(tok)
        turns = [(("user", "assistant")[i % 2], tok.encode(f"{i} cat" * (i + 1))) for i in range(7)]
        system = [("system", tok.encode("sit"))]
        for first in (0, 2, 4, 6):
            whole = form.join(turns[first:]) + form.opens["assistant"]
            more = form.join(turns[max(0, first - 2):]) + form.opens["assistant"]
            for room in {len(whole), len(more) - 1} if first else {len(whole), 10**6}:
                assert form.prompt(turns, room) == whole
        kept = form.join(system + turns[6:]) + form.opens["assistant"]
        assert form.prompt(system + turns, len(kept)) == kept
        least = len(form.join(turns[6:])) + len(form.opens["assistant"])
        cut = form.prompt(turns, least - 5)
        assert len(cut) == least - 5 and cut[-9:] == form.prompt(turns, least)[-9:]
        with pytest.raises(UserError, match="no room for a message"):
            form.prompt(turns, 3)


@pytest.mark.parametrize("mixer", [*MIXERS, "int8"])
def test_chat_for_every_mixer(folders, mixer, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    torch.manual_seed(0)
    config = TINY | MIXERS.get(mixer, {})
    model, tok = LM(ModelConfig(**config)), tokenizer.load(folders["bytes"])
    checkpoint.save(str(folder / "best.pt"), {
        "model": model.state_dict(), "config": config,
        "tokenizer": {"name": tok.name, "fingerprint": tok.fingerprint}})
    tok.save(str(folder))
    path = str(folder)
    if mixer == "int8":
        quantize.main(quantize.QuantizeConfig(checkpoint=path, data=folders["bytes"], speed_tokens=0,
                                              device="cpu"))
        path = str(folder / "int8.pt")
    said = "hello\n\nhow are you?\n/reset\n<|end|> hi\nand now?\n/quit\nno\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    cfg = sample.SampleConfig(checkpoints=(path,), chat=True, device="cpu", max_new_tokens=12)
    turns = sample.main(cfg)[path]
    assert [t for r, t in turns if r == "user"] == ["<|end|> hi", "and now?"]
    assert [r for r, _ in turns] == ["user", "assistant"] * 2
    out = capsys.readouterr().out
    assert "forgotten" in out and all(text in out for _, text in turns[1::2])
    flags = sample.SampleConfig(checkpoints=(path,), chat=True, device="cpu", prompt=("hi " * 40,) * 3,
                                max_new_tokens=40)
    assert len(sample.main(flags)[path]) == 6  # longer than the context, without a warning


def test_a_model_without_chat_tokens_says_what_to_do(base):
    with pytest.raises(UserError, match="(?s)has no chat tokens.*prepare_data.py chitchat.*config/chat.py"):
        sample.main(sample.SampleConfig(checkpoints=(base["init_from"],), chat=True, device="cpu"))


# ------------------------------------------------------------------------------------------------------------
# Sources


def test_dailydialog_through_datasets(tmp_path):
    for split in ("train", "validation", "test"):
        talk = [["Hello.", f"I {split}.", "Bye"]]
        hub_folder(tmp_path / "daily", f"full/{split}", {"0000": talk}, "utterances", readme=False)
    folder = prepare(tmp_path, "dailydialog", hub_path=str(tmp_path / "daily"), chat=True, tokenizer="bytes",
                     name="daily")
    ids = np.asarray(opened(folder, "val").ids)
    said = "<|endoftext|><|user|>Hello.<|end|><|assistant|>I validation.<|end|>"
    assert tokenizer.load(folder).decode(ids) == said


def test_chitchat_is_read_from_the_package(tmp_path, monkeypatch):
    said = [[[{"text": f"{w} {i}", "sender": "x"}] for w in ("hi", "hello", "why")] for i in range(60)]
    said[0][0].append({"text": "there", "sender": "x"})
    talks = {str(i): {"messages": m} for i, m in enumerate([*said, [[{"text": "alone", "sender": "x"}]]])}
    wheel = tmp_path / prepare_data.CHITCHAT
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("chitchat_dataset/dataset.json", json.dumps(talks))

    def download(command, **_):
        shutil.copy(wheel, command[command.index("--dest") + 1])

    monkeypatch.setattr(prepare_data.subprocess, "run", download)
    with pytest.raises(UserError, match="does not have the expected SHA-256"):
        prepare(tmp_path, "chitchat", name="chitchat")
    monkeypatch.setattr(prepare_data, "CHITCHAT_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    text = prepare(tmp_path, "chitchat", tokenizer="bytes", name="chitchat")
    folder = prepare(tmp_path, "chitchat", chat=True, tokenizer_from=text, name="c")
    found, tok = "", tokenizer.load(folder)
    for split in ("train", "val", "test"):
        found += tok.decode(np.asarray(opened(folder, split).ids))
    assert found.count("<|user|>") == found.count("<|assistant|>") == 60 and "alone" not in found
    assert "<|user|>hi 0\nthere<|end|><|assistant|>hello 0<|end|>" in found and "why" not in found
    assert prepare_data.PrepareConfig(source="chitchat", chat=True).name == "chitchat_chat"
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="reads conversations from .jsonl and .parquet files, not from a.txt"):
        prepare(tmp_path, tmp_path / "a.txt", chat=True, name="d")
