"""Predicted memory against measured, and what follows from it: the micro-batch that fits."""
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys

import train
from common import distributed, fit, layers
from common.config import UserError
from common.stop import StopRequest
from model import LM, ModelConfig

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory means something else there")
@pytest.mark.parametrize("options", [
    {"d_model": 256, "n_layers": 8, "max_seq_len": 256, "batch_size": 16, "dtype": "fp32"},
    pytest.param({"d_model": 512, "n_layers": 6, "n_heads": 8, "batch_size": 4, "micro_batch_size": 2,
                  "dtype": "fp32"}, marks=pytest.mark.slow),
    pytest.param({"d_model": 256, "n_layers": 8, "max_seq_len": 1024, "batch_size": 4, "dtype": "fp32",
                  "pos": "rope", "checkpoint_activations": True, "activation": "swiglu"},
                 marks=pytest.mark.slow),
    pytest.param({"mixer": "context", "d_model": 256, "d_ff": 512, "n_layers": 6, "max_seq_len": 64,
                  "batch_size": 256, "pos": "none", "activation": "relu", "tie_embeddings": False,
                  "dtype": "fp32"}, marks=pytest.mark.slow),
    pytest.param({"mixer": "context", "context_update": "scan", "d_model": 256, "d_ff": 512, "n_layers": 4,
                  "max_seq_len": 1024, "batch_size": 8, "tbptt": 512, "pos": "none", "dtype": "fp32"},
                 marks=pytest.mark.slow)])
def test_the_prediction_is_within_15_percent(corpus, tmp_path, options):
    flags = [f"--{k}={v}" for k, v in options.items()]
    done = subprocess.run(
        [sys.executable, "train.py", f"--data={corpus}", f"--out_dir={tmp_path}", "--vocab_size=8192",
         "--epochs=0", "--max_steps=2", "--device=cpu", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    predicted = float(re.search(r"memory +about (\S+) GB", done.stdout)[1])
    measured = json.loads((tmp_path / "ledger.jsonl").read_text())["hardware"]["peak_memory_gb"]
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

    with FakeTensorMode():
        kept = fit.kept_by_autograd(Two(), 3, 11, "fp32")
    n = 3 * 11  # tokens: each an id (8 bytes), 10 and 30 floats, and 2 x 5 of the result and its gradient
    assert kept == n * (8 + 4 * (10 + 30 + 2 * 5))


def test_ctrl_c_waits_until_the_counting_is_done(small):
    """Raised inside, a KeyboardInterrupt makes torch abort the process."""
    built = []

    def make_model(cfg):
        model = LM(cfg)
        signal.raise_signal(signal.SIGINT)
        built.append(model)
        return model

    cfg = small(vocab_size=300, dtype="fp32")
    for work in (lambda: fit.Needs(make_model, cfg, "fp32", CPU),
                 lambda: fit.refuse_hopeless(make_model, cfg, 1e15, 8)):
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            work()
        assert built and signal.getsignal(signal.SIGINT) is before
        built.clear()
    with StopRequest() as stop:  # asks as politely as elsewhere
        fit.Needs(make_model, cfg, "fp32", CPU)
        assert stop.requested


def needs_of(cfg):
    return fit.Needs(LM, cfg, cfg.dtype, torch.device("cpu"))


def test_memory_grows_as_it_should(small):
    cfg = small(vocab_size=300, dtype="fp32")
    needs = needs_of(cfg)
    assert needs.parameters == 4 * LM(cfg).count_parameters()["total"]
    assert needs.peak(2, 1) < needs.peak(8, 1) < needs.peak(8, 2)
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
    sizes = {n: needs.peak(n, 1) for n in (1, 2, 3, 4, 6, 12)}
    for n, needed in sizes.items():
        fits = max(m for m, need in sizes.items() if need <= needed)
        assert fit.largest_micro_batch(needs, dist, needed) == fits >= n
    assert fit.largest_micro_batch(needs, dist, 1e15) == 12
    assert fit.largest_micro_batch(needs_of(dataclasses.replace(cfg, dry_run=True)), dist, 1) == 1
    message = r"one sequence at a time needs about \d+\.\d GB, but there is room for 0\.0"
    with pytest.raises(UserError, match=message):
        fit.largest_micro_batch(needs, dist, 1)


def test_memory_gb_splits_the_batch_and_changes_nothing_else(small, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "resident_memory", lambda *_: 0.3)  # it moves by more than a batch
    whole = train.main(small(max_steps=2, name="whole", dtype="fp32"))
    cfg = small(max_steps=2, name="parts", dtype="fp32")
    needs = needs_of(cfg.__class__(**{**cfg.__dict__, "vocab_size": whole["config"]["vocab_size"]}))
    room = (needs.peak(2, 1) + needs.peak(4, 1)) / 2e9
    assert "it will not fit" not in capsys.readouterr().out
    train.main(small(dry_run=True, memory_gb=0.1))
    assert "of 0.10 GB; it will not fit: try --checkpoint_activations" in capsys.readouterr().out
    parts = train.main(small(max_steps=2, name="parts", dtype="fp32", memory_gb=room))
    assert "1 process x 4 accumulated x 2 = 8 sequences" in capsys.readouterr().out
    assert parts["result"]["loss"] == pytest.approx(whole["result"]["loss"], rel=1e-5)


def test_a_run_goes_on_with_the_micro_batch_it_began_with(small, monkeypatch):
    """With dropout another one would draw other masks, and the run would not be the uninterrupted one."""
    monkeypatch.setattr(distributed, "resident_memory", lambda *_: 0.3)
    options = {"dropout": 0.2, "vocab_size": 300, "max_steps": 4}
    needs = needs_of(small(**options))
    room = (needs.peak(2, 1) + needs.peak(4, 1)) / 2e9
    whole = train.main(small(name="whole", micro_batch_size=2, **options))
    train.main(small(name="parts", memory_gb=room, max_minutes=1e-6, **options))  # one step
    parts = train.main(small(name="parts", **options))
    other = train.main(small(name="other", micro_batch_size=8, **options))
    assert parts["result"]["loss"] == whole["result"]["loss"] != other["result"]["loss"]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_continued_run_that_cannot_keep_its_micro_batch_says_so(small, monkeypatch, capsys, dropout):
    """Less memory than when it began (as a resume in another place), or more processes than its parts."""
    monkeypatch.setattr(distributed, "resident_memory", lambda *_: 0.3)
    options = {"dropout": dropout, "vocab_size": 300, "max_steps": 4}
    train.main(small(name="parts", max_minutes=1e-6, **options))
    needs = needs_of(small(**options))
    room = (needs.peak(2, 1) + needs.peak(4, 1)) / 2e9
    capsys.readouterr()
    train.main(small(name="parts", memory_gb=room, **options))
    effect = "dropout draws other masks" if dropout else "losses agree only up to rounding"
    said = capsys.readouterr().out
    assert f"micro-batch 8 at the start of the run, now 2: 8 no longer fit; {effect}" in said
    two, three = distributed.Dist(0, 2, CPU), distributed.Dist(0, 3, CPU)
    cfg = small(batch_size=12, dropout=dropout, vocab_size=300)
    assert train.choose_micro_batch(cfg, needs_of(cfg), two, 1e15, 6) == (6, "")
    micro, note = train.choose_micro_batch(cfg, needs_of(cfg), three, 1e15, 6)
    assert micro == 4 and "6 do not divide among 3 processes" in note and effect in note
    cfg = dataclasses.replace(cfg, micro_batch_size=2)
    micro, note = train.choose_micro_batch(cfg, needs_of(cfg), two, 1, 6)
    assert micro == 2 and "now 2: as asked" in note


def test_all_processes_take_the_smallest_of_their_micro_batches(small, monkeypatch):
    """Also of one where nothing fits: it must not leave the others waiting."""
    cfg = small(batch_size=12, vocab_size=300, dtype="fp32")
    needs, others = needs_of(cfg), [3.0]
    monkeypatch.setattr(distributed.Dist, "min", lambda self, value: min([value, *others]))
    assert fit.largest_micro_batch(needs, distributed.Dist(0, 1, CPU), 1e15) == 3
    others[0] = 0.0
    with pytest.raises(UserError, match="one sequence at a time needs about"):
        fit.largest_micro_batch(needs, distributed.Dist(0, 1, CPU), 1e15)


# ------------------------------------------------------------------------------------------------------------
# What there is


def test_free_memory_is_what_the_system_says():
    free = fit.free_memory(CPU)
    assert free > 1e8
    if sys.platform == "linux":
        assert free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_containers_and_jobs_count(tmp_path, monkeypatch, version):
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
             2: ("memory.max", "memory.current", "inactive_file")}[version]
    root = tmp_path / "memory" if version == 1 else tmp_path
    own = tmp_path / "own"
    own.write_text("5:cpu,memory:/job/step\n3:devices:/x\n" if version == 1 else "0::/job/step\n")

    def limit(folder, most, used, cached=0):
        folder.mkdir(parents=True, exist_ok=True)
        values = most, used, f"anon 7\n{names[2]} {cached}"
        for name, value in zip((*names[:2], "memory.stat"), values, strict=True):
            (folder / name).write_text(f"{value}\n")

    def free():
        return fit.cgroup_free(str(tmp_path), str(own))

    assert free() == math.inf and fit.cgroup_free(str(tmp_path), str(tmp_path / "none")) == math.inf
    limit(root / "job/step", 4_000, 1_000, cached=300)
    assert free() == 3_300  # cached files are given up when needed
    limit(root / "job", 2_500, 2_000)
    assert free() == 500  # a parent's limit is smaller
    limit(root / "job", "max" if version == 2 else 2**63 - 4096, 2_000)
    assert free() == 3_300
    limit(root / "job/step", 4_000, 4_500)
    assert free() == 0
    monkeypatch.setattr(fit, "cgroup_free", lambda: 123.0)
    assert fit.free_memory(CPU) == 123.0


@pytest.mark.parametrize("options", [
    {"n_layers": 10**9}, {"d_model": 2**40, "n_heads": 2**20}, {"vocab_size": 10**15}, {"max_seq_len": 10**12,
                                                                                   "pos": "rope"},
    {"batch_size": 10**14, "micro_batch_size": 0}, {"d_ff": 2**60},
    {"n_layers": 10**9, "n_unique_blocks": 2}, {"n_layers": 10**9, "qkv_share": 10}])
def test_what_cannot_fit_is_refused_before_it_is_built(small, options, monkeypatch):
    """In a moment, and for a dry run as well; building 1e9 layers would fill the memory first."""
    built, real = [], LM

    def build(cfg):
        built.append(cfg.n_layers)
        return real(cfg)

    monkeypatch.setattr(train, "LM", build)
    for dry_run in (False, True):
        with pytest.raises(UserError, match="needs at least [0-9,]+ GB, but there is room for"):
            train.main(small(dry_run=dry_run, **options))
    assert max(built) <= 20


def test_a_dry_run_of_a_model_too_large_for_this_machine_allocates_nothing(small, capsys):
    before = distributed.resident_memory("VmHWM")
    train.main(small(dry_run=True, d_model=8192, n_layers=24, n_heads=64, vocab_size=50257))
    out = capsys.readouterr().out
    assert "parameters  19,7" in out and "it will not fit" in out
    assert distributed.resident_memory("VmHWM") < before + 1


@pytest.mark.parametrize("options", [
    {}, {"activation": "swiglu", "bias": False}, {"n_experts": 2}, {"proj_rank": 4}, {"dropout": 0.2}])
def test_a_recomputed_activation_changes_nothing_but_memory(options, monkeypatch):
    """The same bits, no further matmul, and a feed-forward that keeps one of its wide tensors less."""
    def step(most: int):
        monkeypatch.setattr(layers, "RECOMPUTE_BYTES", most)
        torch.manual_seed(3)
        model = LM(ModelConfig(vocab_size=61, d_model=32, n_layers=2, max_seq_len=16, **options))
        x = torch.randint(61, (3, 16))
        with FlopCounterMode(display=False) as flops:
            loss = model(x, x)[0]
            loss.backward()
        with FakeTensorMode():
            kept, _ = fit.kept_of(LM(model.cfg), 16, "fp32")
        return [loss.detach(), *(p.grad for p in model.parameters())], flops.get_total_flops(), kept

    (plain, cost, much), (again, same, less) = step(10**12), step(0)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)) and cost == same > 0
    # swiglu: its gate's activation and the product; experts and low rank have more matmuls, and keep all
    width = 0 if {"n_experts", "proj_rank"} & {*options} else 4 * 32 * (1 + ("activation" in options))
    assert much - less == 2 * 16 * 4 * width
