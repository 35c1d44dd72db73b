"""Continued training: what is taken from the source, replay, old text beside the new, LoRA."""
import dataclasses
import os
import shutil

import train
from common import checkpoint, fit, lora, source
from common.config import ConfigError, UserError, load
from common.data import Mixed, Windows
from common.files import read_rows
from common.run import read_ledger
from model import LM, ModelConfig, load_model
from muon import make_optimizer
from tests.conftest import prepare, started
from tests.test_model import tiny, tokens
from tests.test_train import assert_equal, assert_same_run, final, losses, signal_at, torchrun

import numpy as np
import pytest
import torch

CPU = torch.device("cpu")
ODD = {"d_model": 24, "n_layers": 3, "n_heads": 2, "pos": "rope", "activation": "swiglu", "window": 9,
       "tie_embeddings": False, "norm": "rmsnorm"}


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory) -> str:
    """A trained run of an unusual architecture."""
    out = tmp_path_factory.mktemp("base")
    train.main(train.TrainConfig(
        data=corpus, out_dir=str(out), name="base", device="cpu", dtype="fp32", max_seq_len=32, batch_size=8,
        lr=5e-3, max_steps=100, eval_interval=100, **ODD))
    return str(out / "base")


@pytest.fixture(scope="module")
def other(corpus, tmp_path_factory) -> str:
    """Other text in the same tokens."""
    return prepare(tmp_path_factory.mktemp("other"), "other", "bytes", count=60, characters=1500)


@pytest.fixture
def continued(base, other, tmp_path):
    """Makes configs that continue `base` on `other` and say nothing of the architecture."""
    def make(**options) -> train.TrainConfig:
        return train.TrainConfig(**{
            "data": other, "out_dir": str(tmp_path / "out"), "name": "run", "device": "cpu", "dtype": "fp32",
            "init_from": base, "batch_size": 8, "lr": 1e-3, "max_steps": 20, "eval_interval": 10,
            "log_interval": 1, "sample_tokens": 4} | options)
    return make


def rows_of(cfg) -> list[dict]:
    return read_rows(os.path.join(cfg.out_dir, cfg.name, "metrics.jsonl"))


# ------------------------------------------------------------------------------------------------------------
# The source


def test_the_architecture_and_the_first_loss_come_from_the_source(continued, base, corpus):
    row = train.main(continued(data=corpus))
    assert {k: row["config"][k] for k in ODD} == ODD and row["config"]["max_seq_len"] == 32
    first = rows_of(continued())[0]
    assert first["step"] == first["tokens"] == 0 and first["mean_train_loss"] is None
    assert first["val_loss"] == checkpoint.load(base, ("progress",))["progress"]["best"]["loss"]
    assert [r["step"] for r in rows_of(continued()) if "val_loss" in r] == [0, 10, 20]
    # what changes no shape may differ
    row = train.main(continued(name="free", dropout=0.1, window=4, max_seq_len=48, max_steps=1))
    assert row["config"]["window"] == 4 and row["config"]["max_seq_len"] == 48


def test_contradictions_to_the_source_are_refused(continued, base, bpe_corpus):
    with pytest.raises(ConfigError, match=rf"(?s)2 problems.*d_model=48, but {base} has d_model=24: leave "
                                          "the option out.*n_heads=3, but .* has n_heads=2"):
        train.main(continued(d_model=48, n_heads=3))
    flags = [f"--init_from={base}", f"--data={continued().data}", f"--out_dir={continued().out_dir}"]
    for given in ("--d_model=128", "--pos=learned"):  # a default, but somebody typed it
        with pytest.raises(ConfigError, match=f"{given[2:]}, but .* has"):
            train.main(load(train.TrainConfig, [*flags, given]))
    assert load(train.TrainConfig, [*flags, "--head_lr=1e-3", "--eval_lens=999"])  # right for this source
    with pytest.raises(ConfigError, match="goes past the learned positions"):
        load(train.TrainConfig, ["--eval_lens=999"])
    with pytest.raises(ConfigError, match="embed_lr, or tie_embeddings=False"):
        cfg = train.TrainConfig(data=continued().data, out_dir=continued().out_dir, name="tied", max_steps=1,
                                max_seq_len=16, d_model=16)
        train.main(cfg)
        train.main(dataclasses.replace(cfg, init_from=f"{cfg.out_dir}/tied", name="next", head_lr=1e-3))
    with pytest.raises(UserError, match="(?s)trained with the tokenizer bytes.*tokenised with bpe:400"):
        train.main(continued(data=bpe_corpus))


def test_a_continued_run_resumes_without_its_source(continued, base, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "source")
    options = {"init_from": str(tmp_path / "source"), "lora_rank": 2}
    whole, parts = (continued(name=name, **options) for name in ("whole", "parts"))
    train.main(whole)
    signal_at(monkeypatch, 6)
    assert train.main(parts)["status"] == "stopped"
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "source")
    assert train.main(parts)["status"] == "finished"
    assert_same_run(whole, parts)
    with pytest.raises(UserError, match=r"(?s)another configuration.*d_model: 24 -> 48"):
        train.main(dataclasses.replace(parts, d_model=48))
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint at"):
        train.main(dataclasses.replace(parts, name="new"))


def test_a_run_saved_before_there_were_these_options_resumes(small, monkeypatch):
    whole, parts = small(name="whole"), small(name="parts")
    train.main(whole)
    signal_at(monkeypatch, 6)
    train.main(parts)
    monkeypatch.undo()
    saved = final(parts)
    del saved["progress"]["first"]
    for key in ("carry_optimizer", "replay", "replay_data", "lora_rank", "lora_alpha", "lora_merge",
                "eval_data"):
        del saved["config"][key]
    torch.save(saved, os.path.join(parts.out_dir, "parts/last.pt"))
    train.main(parts)
    assert_same_run(whole, parts)
    assert [r["step"] for r in rows_of(parts) if "val_loss" in r] == [10, 20]  # none at step 0


def test_moments_are_carried(continued, base):
    cfg = continued(carry_optimizer=True, max_steps=1, schedule="constant")
    train.main(cfg)
    saved = checkpoint.load(base, ("model", "config", "optimizer"))
    job = started(cfg)
    checkpoint.load_weights(job.model, saved["model"], base)
    source.load_moments(job.optimizer, saved["optimizer"])
    loss, _ = job.model(*job.windows.batch(0, 8, CPU))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(job.model.parameters(), cfg.grad_clip)
    job.optimizer.step()
    assert job.optimizer.param_groups[0]["lr"] == 1e-3  # not the source's
    for key, value in final(cfg)["model"].items():
        torch.testing.assert_close(value, job.model.state_dict()[key], atol=1e-7, rtol=1e-5)
    with pytest.raises(UserError, match="its moments are those of optimizer=adamw, not sgd"):
        train.main(continued(carry_optimizer=True, optimizer="sgd", name="sgd"))
    with pytest.raises(UserError, match="written without an optimiser's state; leave --carry_optimizer out"):
        source.carry_moments(job.optimizer, {"config": saved["config"]}, base, "adamw")


# ------------------------------------------------------------------------------------------------------------
# Old text


@pytest.mark.parametrize("share", [0.01, 0.05, 1 / 3, 0.5, 0.9])
def test_replayed_sequences_are_those_of_a_plain_loop(share):
    """Order and contents, in batches of any size, at the start and far along; counts; epochs."""
    new, old = Windows(np.arange(1000), 8, 3), Windows(np.arange(50_000, 53_000), 8, 3)
    mixed, expected, n_new, n_old = Mixed(new, old, share), [], 0, 0
    for i in range(3000):
        if mixed.phase + (i + 1) * mixed.share >= (n_old + 1) * 10**6:
            expected.append(old.rows(n_old, 1))
            n_old += 1
        else:
            expected.append(new.rows(n_new, 1))
            n_new += 1
    expected = np.concatenate(expected)
    is_old = expected[:, 0] >= 50_000
    for first, count in ((0, 1), (0, 64), (13, 7), (1250, 500), (2980, 20)):
        x, y = mixed.batch(first, count, CPU)
        assert np.array_equal(x, expected[first:first + count, :-1])
        assert np.array_equal(y, expected[first:first + count, 1:])
    for n in (20, 100, 2000):  # in any stretch
        counts = np.convolve(is_old, np.ones(n), "valid")
        assert abs(counts - n * share).max() <= 1
    epoch = expected[:mixed.per_epoch][~is_old[:mixed.per_epoch]]
    assert len({int(r[0]) for r in epoch[:new.per_epoch]}) >= new.per_epoch - 1 and \
        abs(len(epoch) - new.per_epoch) <= 1
    phases = {Mixed(Windows(np.arange(99), 8, seed), old, share).phase for seed in range(9)}
    assert len(phases) == 9


def test_old_text_is_measured_and_replayed_and_both_survive_a_stop(continued, corpus, monkeypatch):
    options = {"replay": 0.3, "replay_data": corpus, "eval_data": (corpus, continued().data), "batch_size": 4,
               "micro_batch_size": 2, "dropout": 0.1}
    whole, parts = (continued(name=name, **options) for name in ("whole", "parts"))
    row = train.main(whole)
    signal_at(monkeypatch, 6)
    assert train.main(parts)["status"] == "stopped"
    monkeypatch.undo()
    train.main(parts)
    assert_same_run(whole, parts)
    rows = [[{k: v for k, v in r.items() if k != "seconds"} for r in rows_of(c)] for c in (whole, parts)]
    assert rows[0] == rows[1]
    evals = [r for r in rows[0] if "val_loss" in r]
    assert len(evals) == 3 and all(r["val_other_loss"] == r["val_loss"] for r in evals)
    assert [r["val_topics_forgotten"] for r in evals] == [
        r["val_topics_loss"] - evals[0]["val_topics_loss"] for r in evals]
    assert row["result"]["topics_loss"] == evals[-1]["val_topics_loss"] > 0
    assert {"topics_bits_per_byte", "topics_forgotten"} <= read_ledger(whole.out_dir)[0]["result"].keys()
    assert row["status"] == "finished" and train.main(dataclasses.replace(whole, replay=0.0, name="none"))
    with pytest.raises(UserError, match=r"the training tokens in .*other or .*other are not those"):
        train.main(dataclasses.replace(whole, replay_data=continued().data))


def test_text_in_other_tokens_is_refused(continued, bpe_corpus):
    for options in ({"eval_data": (bpe_corpus,)}, {"replay": 0.1, "replay_data": bpe_corpus}):
        with pytest.raises(UserError, match="(?s)topics_bpe is tokenised with bpe:400 .*, but .*other is "
                                            "tokenised with bytes.*one of them.*--tokenizer_from=.*other"):
            train.main(continued(**options))


@pytest.mark.slow
def test_two_processes_replay_and_adapt_as_one_does(small, other, tmp_path):
    train.main(small(name="source"))
    options = {"data": other, "init_from": f"{small().out_dir}/source", "micro_batch_size": 2, "replay": 0.3,
               "replay_data": small().data, "lora_rank": 4, "max_steps": 10, "eval_interval": 5,
               "eval_data": (small().data,)}
    one, two = small(name="one", **options), small(name="two", **options)
    train.main(one)
    torchrun(two, 2)
    assert len(losses(one)) == 13
    for a, b in zip(rows_of(one), rows_of(two), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() & {"train_loss", "val_loss", "val_topics_loss", "grad_norm"}:
            assert a[key] == pytest.approx(b[key], rel=2e-5)


# ------------------------------------------------------------------------------------------------------------
# LoRA

LORA = {"plain": {}, "swiglu": ODD, "recycled": {"n_layers": 4, "n_unique_blocks": 2, "adapter_rank": 3},
        "qkv_share": {"n_layers": 4, "qkv_share": 2, "n_kv_heads": 2}, "low_rank": {"proj_rank": 5},
        "scan": {"mixer": "context", "context_update": "scan", "pos": "none", "short_conv": 3}}


@pytest.mark.parametrize("options", LORA.values(), ids=LORA)
def test_lora_starts_as_the_source_and_its_gradient_is_that_of_the_dense_model(options):
    model, x, y = tiny(**options), tokens(2, 12), tokens(2, 12, seed=2)
    before = model(x)[0].clone()
    frozen = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(1)
    lora.wrap(model, 2, alpha=6.0)
    assert torch.equal(model(x)[0], before)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(map(lora.is_lora, trained))
    for name, p in trained.items():  # away from B = 0, where A has no gradient
        p.data += 0.05 * torch.randn_like(p) * name.endswith("lora_b")
    dense = LM(model.cfg)
    checkpoint.load_weights(dense, model.state_dict(), "here")
    torch.testing.assert_close(dense.eval()(x)[0], model.eval()(x)[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(dense(x)[0], before, atol=1e-3)
    for m in (model.train(), dense.train()):
        m(x, y)[0].backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)
    gradients = dict(dense.named_parameters())
    for name in [n.removesuffix("lora_a") for n in trained if n.endswith("lora_a")]:
        dw, a, b = gradients[f"{name}weight"].grad, trained[f"{name}lora_a"], trained[f"{name}lora_b"]
        torch.testing.assert_close(a.grad, 3 * b.T @ dw, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(b.grad, 3 * dw @ a.T, atol=1e-6, rtol=1e-4)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in frozen.items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_lora_run_trains_and_reads_as_a_plain_model(continued, base, optimizer):
    cfg = continued(lora_rank=3, lora_merge=True, lr=3e-3, muon_lr=3e-3, optimizer=optimizer)
    row = train.main(cfg)
    started_with, ended = torch.load(f"{base}/best.pt", weights_only=True)["model"], final(cfg, "best.pt")
    assert all(torch.equal(ended["model"][k], v) for k, v in started_with.items())
    assert row["result"]["loss"] < rows_of(cfg)[0]["val_loss"] - 0.002
    n = sum(p.numel() for k, p in ended["model"].items() if k.endswith(("lora_a", "lora_b")))
    assert sum(v["exp_avg" if optimizer == "adamw" else "momentum"].numel()
               for v in ended["optimizer"]["state"].values()) == n  # states of A and B alone
    folder = os.path.join(cfg.out_dir, "run")
    merged, plain = load_model(folder)[0], load_model(f"{folder}/merged.pt")[0]
    assert_equal(dict(merged.state_dict()), dict(plain.state_dict()), "merged.pt")
    with torch.no_grad():
        whole = lora.wrap(LM(merged.cfg), 3, cfg.lora_alpha)
        checkpoint.load_weights(whole, ended["model"], folder)
        ids = tokens(2, 20)
        torch.testing.assert_close(merged(ids)[0], whole.eval()(ids)[0], atol=1e-5, rtol=1e-5)
    if optimizer == "adamw":  # a LoRA run as the source of another, whole or with new A and B
        for rank in (0, 2):
            after = continued(init_from=folder, name=f"after{rank}", lora_rank=rank, max_steps=1)
            train.main(after)
            assert rows_of(after)[0]["val_loss"] == pytest.approx(row["result"]["loss"], rel=1e-5)


def test_lora_needs_less_memory():
    cfg = train.TrainConfig(vocab_size=300, d_model=64, max_seq_len=32, batch_size=4, init_from="x",
                            lora_rank=2)
    whole = fit.Needs(LM, cfg, "fp32", CPU)
    small = fit.Needs(train.make_model, cfg, "fp32", CPU)
    trained = sum(p.numel() for p in small.model.parameters() if p.requires_grad)
    assert small.states == 8 * trained < whole.states / 10
    assert small.parameters == whole.parameters + 4 * trained and small.peak(4, 1) < whole.peak(4, 1)
    model = lora.wrap(LM(ModelConfig(vocab_size=300, d_model=64)), 2, 1.0)
    names = [g["name"] for g in make_optimizer(model, cfg).param_groups]
    assert names == ["matrices"]


@pytest.mark.parametrize("options, message", [
    ({"lora_rank": 2, "init_from": ""}, "lora_rank needs a trained model: set init_from"),
    ({"carry_optimizer": True, "init_from": ""}, "carry_optimizer needs a trained model"),
    ({"lora_rank": 2, "carry_optimizer": True}, "LoRA's matrices are new"),
    ({"lora_rank": 2, "head_lr": 1.0}, "have no use: lora_rank trains matrices alone"),
    ({"lora_merge": True}, "nothing to merge"), ({"lora_rank": 2, "lora_alpha": 0.0}, "must be above 0"),
    ({"replay": 0.1}, "needs the folder of the old text: set replay_data"),
    ({"replay": 1.0, "replay_data": "x"}, "at least 0 and below 1"),
    ({"eval_data": ("a/x", "b/x/")}, "two folders of one name"),
    ({"lora_rank": 2, "n_experts": 2, "n_tokens": 9}, "matrices of n_experts=2 are read by a kernel")])
def test_contradictions_are_refused(continued, options, message):
    with pytest.raises(ConfigError, match=message):
        continued(**options)
