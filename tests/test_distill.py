"""distill.py: examples, resuming, where rows come from, controls, caches, reports; the losses themselves are
in test_distill_loss.py."""
import dataclasses
import os
import re

import distill
import train
from common import checkpoint, distill_report
from common.config import ConfigError, UserError, load
from common.data import DataError, open_text
from common.distill_report import ngram_losses
from common.examples import Examples
from common.files import read_rows
from common.run import read_ledger
from model import LM, load_model
from tests.conftest import prepare
from tests.test_train import assert_close_run, assert_same_run, signal_at, torchrun

import numpy as np
import pytest
import torch

CPU = torch.device("cpu")
SMALL = {"device": "cpu", "dtype": "fp32", "max_seq_len": 32, "batch_size": 8, "lr": 3e-3}
SHAPE = {"d_model": 32, "n_layers": 3, "n_heads": 2, "pos": "rope", "norm": "rmsnorm", "bias": False,
         "activation": "swiglu", "d_ff": 48, "head_bias": False}


@pytest.fixture(autouse=True)
def short_reports(monkeypatch, request):
    """Greedy texts are written token by token, figures take a second."""
    monkeypatch.setattr(distill_report, "TOKENS", 8)
    if "leaves" not in request.node.name:
        monkeypatch.setattr(distill, "draw", lambda *a: None)


@pytest.fixture(scope="module")
def teachers(corpus, tmp_path_factory) -> list[str]:
    """Two trained models."""
    out = tmp_path_factory.mktemp("teachers")
    for seed in (1, 2):
        train.main(train.TrainConfig(data=corpus, out_dir=str(out), name=f"t{seed}", seed=seed, max_steps=150,
                                     eval_interval=150, **SMALL, **SHAPE))
    return [str(out / "t1"), str(out / "t2")]


@pytest.fixture
def small(corpus, teachers, tmp_path):
    """Makes configs of a distillation of seconds."""
    def make(**options) -> distill.DistillConfig:
        return distill.DistillConfig(**SMALL | SHAPE | {
            "d_model": 16, "n_layers": 2, "data": corpus, "out_dir": str(tmp_path / "out"), "name": "run",
            "teacher": (teachers[0],), "max_steps": 12, "eval_interval": 6, "log_interval": 1,
            "sample_tokens": 4, "prompts": ("The",)} | options)
    return make


def rows_of(cfg, key: str) -> list:
    return [r[key] for r in read_rows(os.path.join(cfg.out_dir, cfg.name, "metrics.jsonl")) if key in r]


# ------------------------------------------------------------------------------------------------------------
# Examples


def test_windows_hold_every_target_once_and_epochs_differ_in_order_alone(corpus):
    text = open_text(corpus)
    ours = Examples(text.val, text.tok, "windows", 48, seed=3)
    x, y = ours.pairs(np.arange(ours.per_epoch))
    assert np.array_equal(y[y >= 0], text.val[1:]) and ours.counts.sum() == len(text.val) - 1
    assert np.array_equal(x[y >= 0], text.val[:-1]) and (x[y < 0] == text.tok.eot).all()
    one, two = (ours.index(n * ours.per_epoch, ours.per_epoch) for n in (0, 1))
    assert np.array_equal(np.sort(one), np.sort(two)) and not np.array_equal(one, two)
    again = Examples(text.val, text.tok, "windows", 48, seed=3)
    assert np.array_equal(again.index(ours.per_epoch + 5, 3), two[5:8])  # from the number of the sample alone


@pytest.mark.parametrize("kind", ["lines", "documents"])
def test_lines_and_documents_are_those_of_the_text(tmp_path, kind):
    documents = ["One line.\nA second, longer line of text.\n\nThe end", "Short\nanother document"]
    (tmp_path / "text").mkdir()
    for split in ("train", "val"):
        (tmp_path / "text" / split).mkdir()
        for i, document in enumerate(documents):
            (tmp_path / f"text/{split}/{i}.txt").write_text(document)
    text = open_text(prepare(tmp_path, "some", "bytes", count=4, characters=400))
    ids = [i for document in documents for i in (text.tok.eot, *text.tok.encode(document))]
    ours = Examples(np.array(ids, dtype=np.uint16), text.tok, kind, 60, seed=1, min_tokens=6)
    x, y = ours.pairs(np.arange(ours.per_epoch))
    said = [text.tok.decode([i for i in row if i >= 0 and i != text.tok.eot]) for row in y]
    pieces = [p for document in documents for p in (
        document.splitlines(keepends=True) if kind == "lines" else [document])]
    wanted = [p for i, p in enumerate(pieces) if len(text.tok.encode(p)) + (p in documents[:1]) >= 6
              and len(p) <= 60]
    assert said == [p for p in wanted if len(p) >= 6 or p == "Short\n"], (said, wanted)
    assert (x[:, 0] == np.where([p in (documents[0][:10], *documents, "Short\n") for p in said], text.tok.eot,
                                text.tok.encode("\n")[0])).all()
    with pytest.raises(DataError, match=f"no {kind} of 61 to 60 tokens.*--min_tokens"):
        Examples(np.array(ids), text.tok, kind, 60, 1, min_tokens=61)


# ------------------------------------------------------------------------------------------------------------
# Runs


def test_a_run_leaves_what_it_says(small, teachers):
    row = distill.main(small())
    folder = os.path.join(row["config"]["out_dir"], "run")
    found = {"last.pt", "best.pt", "metrics.jsonl", "distill.png", "report.md", "samples.txt",
             "tokenizer.json"}
    assert found <= set(os.listdir(folder))
    result = row["result"]
    assert {"loss", "soft", "agreement", "entropy", "to_unigram", "modal_share", "distinct_2", "repetition_4",
            "compression", "teacher_loss"} <= result.keys()
    assert 0 <= result["agreement"] <= 1 and result["soft"] > 0 and result["loss"] > result["teacher_loss"]
    report = open(os.path.join(folder, "report.md")).read()
    theirs = load_model(teachers[0])[0].count_parameters()["total"]
    last = read_rows(os.path.join(folder, "metrics.jsonl"))[-1]
    assert re.search(rf"^\| 12 .*{last['mean_soft']:.4f}.*{last['val_loss']:.4f} \|$", report, re.M)
    assert f"{theirs:,}" in report and "teacher: The|" in report and "student: The|" in report
    assert read_ledger(row["config"]["out_dir"])[-1]["script"] == "distill"
    assert load_model(folder)[0].cfg.d_model == 16
    assert len(rows_of(small(), "soft")) == len(rows_of(small(), "hard")) == 12


def test_the_student_comes_nearer_to_its_teacher(small):
    cfg = small(max_steps=60, eval_interval=20, alpha=1.0)
    distill.main(cfg)
    soft = rows_of(cfg, "val_soft")
    assert soft[-1] < soft[0] and rows_of(cfg, "mean_soft")[-1] < rows_of(cfg, "mean_soft")[0]


VARIANTS = {"own words": {"on_policy": 0.4, "teacher_text": 0.3, "prompt_tokens": 4},
            "lines, matched": {"examples": "lines", "divergence": "jsd", "match_hidden": 1.0,
                               "match_attention": 1.0},
            "layers, muon, dropout": {"student_layers": (0, 2), "optimizer": "muon", "dropout": 0.2,
                                      "micro_batch_size": 2}}
SLOW = {"plain": {}, "context": {"mixer": "context", "context_update": "scan", "pos": "none", "d_ff": 32}}


@pytest.mark.parametrize("options", [
    *(pytest.param(o, id=name) for name, o in VARIANTS.items()),
    *(pytest.param(o, id=name, marks=pytest.mark.slow) for name, o in SLOW.items())])
def test_a_stopped_run_is_resumed_to_the_bit(small, monkeypatch, options):
    whole, parts = small(name="whole", **options), small(name="parts", **options)
    distill.main(whole)
    signal_at(monkeypatch, 5, script=distill)
    assert distill.main(parts)["status"] == "stopped"
    monkeypatch.undo()
    assert distill.main(parts)["status"] == "finished"
    assert_same_run(whole, parts)


@pytest.mark.slow  # half a minute; the loss on two processes is in test_distill_loss.py
def test_two_processes_find_what_one_does(small, teachers):
    one, two = (small(name=name, examples="lines", teacher=tuple(teachers), micro_batch_size=2, max_steps=24)
                for name in ("one", "two"))
    distill.main(one)
    torchrun(two, 2, "distill.py")
    assert_close_run(one, two)


def test_the_batch_does_not_depend_on_how_it_is_split(small):
    losses = []
    for micro in (8, 1):
        cfg = small(name=f"m{micro}", micro_batch_size=micro, examples="lines", max_steps=6)
        distill.main(cfg)
        losses.append(rows_of(cfg, "train_loss"))
    assert np.allclose(*losses, atol=2e-5)


# ------------------------------------------------------------------------------------------------------------
# What is learned from


def test_all_layers_of_the_teacher_are_the_teacher(small, teachers):
    shape = {k: v for k, v in SHAPE.items() if k not in ("d_model", "n_layers")}
    cfg = small(student_layers=(0, 1, 2), n_layers=3, d_model=32, alpha=1.0, lr=0.0, **shape)
    row = distill.main(cfg)
    assert row["result"]["soft"] < 1e-6 and row["result"]["agreement"] == 1.0
    assert rows_of(cfg, "train_loss")[0] == pytest.approx(0, abs=1e-6)
    assert rows_of(cfg, "val_loss")[0] == pytest.approx(
        checkpoint.load(teachers[0], ("progress",))["progress"]["best"]["loss"], abs=1e-5)


def test_the_architecture_comes_from_the_teacher(small, corpus, teachers, tmp_path):
    cfg = distill.DistillConfig(data=corpus, teacher=(teachers[0],), student_layers=(0, 2), max_steps=1,
                                out_dir=str(tmp_path / "o"), prompts=(), device="cpu", dtype="fp32")
    assert {k: v for k, v in SHAPE.items() if k != "n_layers"}.items() <= distill.main(cfg)["config"].items()
    with pytest.raises(UserError, match="teacher layer 3 does not exist: it has layers 0 to 2"):
        distill.main(small(student_layers=(0, 3)))
    with pytest.raises(UserError, match="n_layers=3, but student_layers names 2"):
        distill.main(small(student_layers=(0, 1), n_layers=3))


def test_steps_are_shared_out_as_asked(small):
    cfg = small(on_policy=0.5, teacher_text=0.2)
    sources = [distill.source_of(cfg, step) for step in range(1000)]
    assert abs(sources.count("student") - 500) <= 2 and abs(sources.count("teacher") - 200) <= 2
    assert abs(sources[:50].count("student") - 25) <= 2  # evenly
    assert set(distill.source_of(small(), step) for step in range(100)) == {"text"}


def test_rows_by_the_student_are_its_own_words(small, teachers):
    model = load_model(teachers[0])[0]
    x = torch.arange(64).view(2, 32)
    cfg = small(prompt_tokens=4, on_policy=1.0, sample_temperature=1e-6)
    ours, y = distill.continued(model, x, 7, cfg)
    assert torch.equal(ours[:, :4], x[:, :4]) and (y[:, :3] == -1).all()
    greedy = torch.cat(list(model.generate(x[:, :4], 29, temperature=0)), dim=1)
    assert torch.equal(y[:, 3:], greedy) and torch.equal(ours[:, 4:], greedy[:, :-1])
    warm = dataclasses.replace(cfg, sample_temperature=1.0)
    again = [distill.continued(model, x, n, warm)[1] for n in (7, 7, 8)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


def test_the_control_reads_no_teacher(small, monkeypatch):
    alone = small(without_teacher="tokens", name="alone")
    loaded = []
    monkeypatch.setattr(distill, "load_teachers", lambda *a: loaded.append(a) or _load(*a))
    distill.main(alone)
    assert len(loaded) == 1  # for the report, after training
    plain = small(alpha=0.0, name="plain")
    distill.main(plain)
    assert rows_of(alone, "train_loss") == rows_of(plain, "train_loss")


_load = distill.load_teachers


def test_equal_compute_counts_the_teacher(small, teachers):
    steps = {}
    for kind in ("no", "tokens", "compute", "cached"):
        steps[kind] = distill.main(small(without_teacher=kind, dry_run=True, max_steps=200))["steps"]
    own = load_model(teachers[0])[0].flops_per_token(32) / 3
    student = LM(small().resolved(open_text(small().data).meta)).flops_per_token(32)
    assert steps["no"] == steps["tokens"] == 200
    assert steps["compute"] == round(200 * (1 + own / student))
    text = open_text(small().data)
    rows = Examples(text.train, text.tok, "windows", 32, 1).per_epoch
    assert steps["cached"] == steps["compute"] and rows > 1600  # no row is read twice
    cfg = small(without_teacher="cached", dry_run=True, max_steps=200, max_examples=100)
    assert distill.main(cfg)["steps"] == round(200 + 100 / 8 * own / student)


def test_two_teachers_are_averaged(small, teachers):
    cfg = small(teacher=tuple(teachers), alpha=1.0, max_steps=1, lr=0.0)
    distill.main(cfg)
    student = load_model(os.path.join(cfg.out_dir, "run"))[0]
    text = open_text(cfg.data)
    x, _ = Examples(text.train, text.tok, "windows", 32, cfg.seed).batch(0, 8, CPU)
    p = sum(load_model(t)[0](x)[0].softmax(-1) for t in teachers) / 2
    q = student(x)[0].log_softmax(-1)
    divergence = (p * (p.log() - q)).sum(-1).mean().item()
    assert rows_of(cfg, "soft")[0] == pytest.approx(divergence, abs=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Caches


def test_a_cache_of_everything_is_the_teacher(small, tmp_path, monkeypatch):
    direct = small(name="direct", alpha=0.7)
    distill.main(direct)
    vocab = load_model(direct.teacher[0])[0].cfg.vocab_size
    cached = small(name="cached", alpha=0.7, cache=str(tmp_path / "said"), cache_kind=f"topk:{vocab}")
    distill.main(cached)
    assert np.allclose(rows_of(direct, "train_loss"), rows_of(cached, "train_loss"), atol=2e-3)  # fp16 in it
    loaded = []
    monkeypatch.setattr(distill, "load_teachers", lambda *a: loaded.append(a) or _load(*a))
    distill.main(dataclasses.replace(cached, name="again"))
    assert len(loaded) == 1  # for the report
    again = small(name="again", alpha=0.7)
    assert rows_of(cached, "train_loss") == rows_of(again, "train_loss")


def test_a_cached_run_is_resumed_to_the_bit(small, tmp_path, monkeypatch):
    options = {"cache": str(tmp_path / "said"), "cache_kind": "sampled:8"}
    whole, parts = small(name="whole", **options), small(name="parts", **options)
    distill.main(whole)
    signal_at(monkeypatch, 5, script=distill)
    assert distill.main(parts)["status"] == "stopped"
    monkeypatch.undo()
    distill.main(parts)
    assert_same_run(whole, parts)


def test_a_cache_of_another_teacher_is_refused(small, teachers, tmp_path):
    options = {"cache": str(tmp_path / "said"), "cache_kind": "topk_tail:4", "max_steps": 1}
    distill.main(small(**options))
    with pytest.raises(UserError, match="teacher"):
        distill.main(small(name="other", teacher=(teachers[1],), **options))


# ------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("options, message", [
    ({"alpha": 1.5}, "alpha must be between 0 and 1"), ({"temperature": 0.0}, "temperature must be above 0"),
    ({"teacher": ()}, "there is no teacher"), ({"beta": 1.0}, "beta must be above 0 and below 1"),
    ({"student_layers": (0,), "init_from": "out/x"}, "use one of the two"),
    ({"cache": "c", "on_policy": 0.5}, "needs the teacher at each step"),
    ({"cache": "c", "divergence": "jsd"}, "forward_kl"),
    ({"cache": "c", "cache_kind": "topk_tail:8", "temperature": 2.0}, "tail"),
    ({"on_policy": 0.5, "examples": "lines"}, "use examples=windows"),
    ({"on_policy": 0.7, "teacher_text": 0.5}, "together at most 1"),
    ({"prompt_tokens": 4}, "has no effect without on_policy"),
    ({"on_policy": 0.5, "prompt_tokens": 32}, "leaves nothing to write"),
    ({"match_attention": 1.0, "mixer": "lstm", "pos": "none"}, "has no attention")])
def test_contradictions_are_refused(small, options, message):
    with pytest.raises(ConfigError, match=message):
        small(**options)


def test_other_tokens_and_other_weights_are_refused(small, bpe_corpus, teachers, tmp_path):
    with pytest.raises(UserError, match="(?s)trained with the tokenizer bytes.*tokenised with bpe:400"):
        distill.main(small(data=bpe_corpus))
    distill.main(small(max_steps=1))
    with pytest.raises(UserError, match="teacher"):
        distill.main(small(max_steps=1, teacher=(teachers[1],)))


def test_the_losses_of_counts_are_those_of_a_loop():
    rng = np.random.default_rng(1)
    train_ids, val = rng.integers(0, 5, 60), rng.integers(0, 5, 20)
    found = ngram_losses(train_ids, val, 5)
    p = [((train_ids == i).sum() + 1) / 65 for i in range(5)]
    assert found["unigram"] == pytest.approx(-np.mean([np.log(p[i]) for i in val[1:]]))

    def bigram(w):
        total = 0.0
        for a, b in zip(val[:-1], val[1:], strict=True):
            both = sum(train_ids[i] == a and train_ids[i + 1] == b for i in range(59))
            total -= np.log((both + w * p[b]) / ((train_ids == a).sum() + w))
        return total / 19
    assert found["bigram"] == pytest.approx(min(bigram(w) for w in (1, 10, 100, 1000)))


@pytest.mark.slow
@pytest.mark.parametrize("exp, parameters", [(9, 44_602_880), (10, 125_002_240)])
def test_the_students_have_the_documents_sizes(exp, parameters):
    cfg = load(distill.DistillConfig, [f"config/exp{exp}.py"])
    with torch.device("meta"):
        model = LM(dataclasses.replace(cfg, vocab_size=151_936))
    assert model.count_parameters()["total"] == parameters
