"""Runs, checkpoints, a sweep and INT8 files made by commit 563f08e still work.

tests/fixtures/made_by_563f08e.tar.gz holds tiny ones, on sonnets in 60 words: data/; out/ with runs stopped
after 6 or 2 steps (one with --max_steps=5000 alone, which at that commit meant one epoch), two finished runs
with their INT8 files, a sweep with half of its runs, a recall probe with one of its two models; whole/ with
the logs of the same runs without a stop.
"""
import json
import math
import os
import shutil
import tarfile

import quantize
import recall_probe
import sample
import sweep
import train
from common.files import read_rows
from common.run import read_ledger
from model import load_model

import pytest
import torch

BASE = {"data": "data/sonnets", "device": "cpu", "dtype": "fp32", "d_model": 8, "n_layers": 2, "n_heads": 2,
        "max_seq_len": 16, "batch_size": 8, "lr": 1e-2, "max_steps": 12, "eval_interval": 5,
        "log_interval": 1, "sample_tokens": 4}
RUNS = {
    "adamw": {"dropout": 0.1, "micro_batch_size": 4, "epochs": 0.0},
    "muon": {"optimizer": "muon", "muon_warmup_steps": 4, "pos": "rope", "activation": "swiglu",
             "norm": "rmsnorm", "bias": False, "n_kv_heads": 1, "tie_embeddings": False, "epochs": 0.0},
    "gated": {"mixer": "context", "pos": "none", "activation": "relu", "tie_embeddings": False,
              "context_dim": 6, "d_ff": 12, "tbptt": 8, "schedule": "wsd", "epochs": 0.0},
    "epoch": {"max_steps": 0, "epochs": 0.05, "optimizer": "sgd"},
    "capped": {"max_steps": 5000, "eval_interval": 20}}


@pytest.fixture
def old(tmp_path, monkeypatch):
    with tarfile.open("tests/fixtures/made_by_563f08e.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def losses(path: str) -> list[list]:
    return [[r["step"], *(r.get(key) for key in ("train_loss", "val_loss", "grad_norm", "lr"))]
            for r in read_rows(path)]


@pytest.mark.parametrize("name", RUNS)
def test_an_unfinished_run_continues(old, name):
    """With the losses of that commit, to rounding: machines differ, most of all where Muon works in bf16."""
    rel_tol = 1e-3 if name == "muon" else 2e-5
    row = train.main(train.TrainConfig(**BASE | RUNS[name] | {"name": name}))
    assert row["status"] == "finished" and row["counts"]["sessions"] == 2
    assert row["counts"]["steps"] == {"epoch": 4, "capped": 64}.get(name, 12)
    now, then = losses(f"out/{name}/metrics.jsonl"), losses(f"whole/{name}/metrics.jsonl")
    assert len(now) == len(then)
    for a, b in zip(now, then, strict=True):
        assert all(x == y or math.isclose(x, y, rel_tol=rel_tol) for x, y in zip(a, b, strict=True)), (a, b)


@pytest.mark.parametrize("name", ["done", "done_gated"])
def test_finished_checkpoints_and_int8_files_load(old, name):
    ledger = {row["name"]: row for row in read_ledger("out")}
    model, saved = load_model(f"out/{name}")
    assert saved["progress"]["ended"] == "finished" and "blocks.0" in "".join(
        torch.load(f"out/{name}/best.pt", weights_only=True)["model"])
    shutil.move(f"out/{name}/int8.pt", "old.pt")
    row = quantize.main(quantize.QuantizeConfig(checkpoint=f"out/{name}", device="cpu", speed_tokens=0))
    assert math.isclose(row["result"]["fp32"]["loss"], ledger[name]["result"]["loss"], rel_tol=1e-5)
    ours, theirs = load_model(f"out/{name}/int8.pt")[0].state_dict(), load_model("old.pt")[0].state_dict()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, msg=key)
    text, = sample.main(sample.SampleConfig(checkpoints=(f"out/{name}",), prompt=("the",), device="cpu",
                                            max_new_tokens=3)).values()
    assert text
    # its weights can start a new run
    new = RUNS["gated"] if "gated" in name else {}
    options = BASE | new | {"name": "next", "init_from": f"out/{name}", "epochs": 0.0, "max_steps": 1}
    assert train.main(train.TrainConfig(**options))["status"] == "finished"


def test_a_finished_run_stays_as_it_is(old):
    before = os.stat("out/done/last.pt").st_mtime_ns
    row = train.main(train.TrainConfig(**BASE | RUNS["adamw"] | {"name": "done"}))
    assert row["status"] == "finished" and os.stat("out/done/last.pt").st_mtime_ns == before
    assert [r["name"] for r in read_ledger("out")].count("done") == 1


def test_a_sweep_reuses_the_runs_that_ended(old):
    cfg = sweep.SweepConfig(**BASE | {"name": "arms", "epochs": 0.0, "arm": ("qk_norm",), "seeds": 2})
    assert sweep.main(sweep.replace(cfg, dry_run=True))["runs"] == ["arms_base_s2", "arms_qk_norm_s2"]
    then = {r["name"]: r["result"]["loss"] for r in read_ledger("out")}
    arms = sweep.main(cfg)["result"]["arms"]
    assert [arm["scores"][1] for arm in arms] == [then["arms_base_s1"], then["arms_qk_norm_s1"]]
    assert all(len(arm["scores"]) == 2 for arm in arms) and math.isfinite(arms[1]["p"])


def test_a_recall_probe_continues(old):
    options = {"sizes": (4,), "seeds": 2, "lrs": (1e-2,), "steps": 10, "batch_size": 8, "pairs": (1, 2),
               "seq_len": 8, "vocab_size": 8, "eval_interval": 5, "eval_sequences": 8, "device": "cpu"}
    first = json.loads(open("out/recall/results.jsonl").readline())
    cfg = recall_probe.RecallConfig(mixers=("attention",), **options)
    (arm,) = recall_probe.main(cfg)["result"]["arms"]
    assert [row["seed"] for row in arm] == [1, 2] and arm[0]["test"] == first["test"]
    found = [r["accuracy"] for r in arm[1]["test"].values()]  # expected: without a stop, up to a query or so
    assert found == pytest.approx([0.21875, 0.265625], abs=0.04)
