"""Predicted memory against measured, and what follows from it: the micro-batch that fits."""
import json
import re
import subprocess
import sys

import pytest
import torch

import train
from common import distributed, memory
from common.config import UserError
from model import LM


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory means something else there")
@pytest.mark.parametrize("options", [
    {"d_model": 256, "n_layers": 8, "max_seq_len": 256, "batch_size": 16, "dtype": "bf16"},
    {"d_model": 512, "n_layers": 6, "n_heads": 8, "batch_size": 4, "micro_batch_size": 2, "dtype": "fp32"},
    {"d_model": 256, "n_layers": 8, "max_seq_len": 1024, "batch_size": 4, "dtype": "fp32", "pos": "rope",
     "checkpoint_activations": True, "activation": "swiglu"},
    {"mixer": "context", "d_model": 256, "d_ff": 512, "n_layers": 6, "max_seq_len": 64, "batch_size": 256,
     "pos": "none", "activation": "relu", "tie_embeddings": False, "dtype": "fp32"},
    {"mixer": "context", "context_update": "scan", "d_model": 256, "d_ff": 512, "n_layers": 4,
     "max_seq_len": 1024, "batch_size": 8, "tbptt": 512, "pos": "none", "dtype": "fp32"}])
def test_the_prediction_is_within_15_percent(corpus, tmp_path, options):
    flags = [f"--{k}={v}" for k, v in options.items()]
    done = subprocess.run(
        [sys.executable, "train.py", f"--data={corpus}", f"--out_dir={tmp_path}", "--vocab_size=8192",
         "--epochs=0", "--max_steps=3", "--device=cpu", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    predicted = float(re.search(r"memory +about (\S+) GB", done.stdout)[1])
    measured = json.loads((tmp_path / "ledger.jsonl").read_text())["peak_memory_gb"]
    assert measured > 0.7, "too small to tell a good prediction from the libraries' own memory"
    assert 0.85 < predicted / measured < 1.15, (predicted, measured)


def test_what_autograd_keeps_is_counted_exactly(small):
    """Two linear layers with a relu between keep their two inputs and the relu's output, which is one of
    them."""
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(7, 10)
            self.a, self.b = torch.nn.Linear(10, 30), torch.nn.Linear(30, 5)

        def hidden(self, tokens):
            return self.b(torch.relu(self.a(self.embed(tokens))))

    n = 3 * 11  # tokens: each an id (8 bytes), 10 and 30 floats, and 2 x 5 of the result and its gradient
    assert memory.kept_by_autograd(Two, 3, 11, "fp32") == n * (8 + 4 * (10 + 30 + 2 * 5))


def needs_of(cfg):
    return memory.Needs(lambda: LM(cfg), cfg, cfg.dtype, torch.device("cpu"))


def test_memory_grows_as_it_should(small):
    cfg = small(vocab_size=300, dtype="fp32")
    needs = needs_of(cfg)
    assert needs.parameters == 4 * LM(cfg).count_parameters()["total"]
    assert needs.peak(2, False) < needs.peak(4, False) < needs.peak(4, True)
    assert needs_of(small(vocab_size=300, dtype="fp32", optimizer="sgd")).states == needs.states / 2
    deep = {"vocab_size": 300, "dtype": "fp32", "n_layers": 12, "max_seq_len": 64}
    again = needs_of(small(**deep, checkpoint_activations=True))
    assert again.per_sequence < 0.4 * needs_of(small(**deep)).per_sequence
    local = [needs_of(small(**deep | {"max_seq_len": T}, pos="rope", window=64)).per_sequence
             for T in (512, 1024, 2048)]
    assert local[2] - local[1] == pytest.approx(2 * (local[1] - local[0]), rel=0.01)


def test_the_largest_micro_batch_that_fits_is_taken(small):
    dist = distributed.Dist(0, 1, torch.device("cpu"))
    cfg = small(batch_size=12, vocab_size=300, dtype="fp32")
    needs = needs_of(cfg)
    sizes = {n: train.peak_memory(cfg, needs, 1, n) for n in (1, 2, 3, 4, 6, 12)}
    for n, needed in sizes.items():
        fits = max(m for m, need in sizes.items() if need <= needed)
        assert train.largest_micro_batch(cfg, needs, dist, needed) == fits >= n
    assert train.largest_micro_batch(cfg, needs, dist, 1e15) == 12
    assert train.largest_micro_batch(small(batch_size=12, dry_run=True), needs, dist, 1) == 1
    message = r"one sequence at a time needs about \d+\.\d GB, but there is room for 0\.0"
    with pytest.raises(UserError, match=message):
        train.largest_micro_batch(cfg, needs, dist, 1)


def test_memory_gb_splits_the_batch_and_changes_nothing_else(small, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "resident_memory", lambda *_: 0.3)  # it moves by more than a batch
    whole = train.main(small(max_steps=2, name="whole", dtype="fp32"))
    cfg = small(max_steps=2, name="parts", dtype="fp32")
    needs = needs_of(cfg.__class__(**{**cfg.__dict__, "vocab_size": whole["config"]["vocab_size"]}))
    room = (train.peak_memory(cfg, needs, 1, 2) + train.peak_memory(cfg, needs, 1, 4)) / 2e9
    assert "it will not fit" not in capsys.readouterr().out
    train.main(small(dry_run=True, memory_gb=0.1))
    assert "of 0.10 GB; it will not fit: try --checkpoint_activations" in capsys.readouterr().out
    parts = train.main(small(max_steps=2, name="parts", dtype="fp32", memory_gb=room))
    assert "1 process x 4 accumulated x 2 = 8 sequences" in capsys.readouterr().out
    assert parts["best_val_loss"] == pytest.approx(whole["best_val_loss"], rel=1e-5)


def test_a_run_goes_on_with_the_micro_batch_it_began_with(small, monkeypatch):
    """With dropout another one would draw other masks, and the run would not be the uninterrupted one."""
    monkeypatch.setattr(distributed, "resident_memory", lambda *_: 0.3)
    options = {"dropout": 0.2, "vocab_size": 300, "max_steps": 4}
    needs = needs_of(small(**options))
    room = (train.peak_memory(small(), needs, 1, 2) + train.peak_memory(small(), needs, 1, 4)) / 2e9
    whole = train.main(small(name="whole", micro_batch_size=2, **options))
    train.main(small(name="parts", memory_gb=room, max_minutes=1e-6, **options))  # one step
    parts = train.main(small(name="parts", **options))
    other = train.main(small(name="other", micro_batch_size=8, **options))
    assert parts["best_val_loss"] == whole["best_val_loss"] != other["best_val_loss"]


def test_a_micro_batch_that_does_not_split_over_more_processes_is_not_kept(small):
    """Begun with micro-batches of 4 of 12 on one process; two processes have 6 each."""
    train.main(small(batch_size=12, micro_batch_size=4, max_minutes=1e-6))
    job = train.load_job(small(batch_size=12), distributed.Dist(1, 2, torch.device("cpu")))
    job.plan = train.make_plan(job.cfg, 2, job.plan.per_epoch, 6)
    train.begin_or_continue(job)
    assert job.progress.step == 1 and job.plan.micro == 6


def test_free_memory_is_what_the_system_says():
    free = memory.free_memory(torch.device("cpu"))
    assert free > 1e8
    if sys.platform == "linux":
        import os
        assert free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
