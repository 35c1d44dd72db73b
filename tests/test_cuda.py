"""What only a GPU can show: `make test-gpu`, a few minutes on one GPU. It ends with a table to paste.

TEST_DEVICE=cpu runs the tests on the CPU instead (slowly), to check the tests themselves.
"""
import dataclasses
import json
import os
import re
import subprocess
import sys
import time

import bench
import train
from common import distributed
from common.attention import fast_attention
from common.files import read_rows
from common.fit import Needs
from common.recurrence import GRAPHS, gated_loop, linear_scan
from common.tables import grid
from model import LM, ModelConfig, attention
from tests.test_context import GATED, LSTM, SCAN
from tests.test_generate import joined
from tests.test_model import TINY, tokens
from tests.test_train import final, losses, torchrun

import pytest
import torch

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))
CPU = torch.device("cpu")
REAL = DEVICE.type == "cuda"
BF16 = not REAL or torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(REAL and not torch.cuda.is_available(), reason="there is no CUDA GPU here")]
DTYPES = ["fp32", "fp16", *["bf16"] * BF16]
MEASURED = []  # (what, figure)
NO_POS = {"pos": "none"}
RECURRENT = {"gated": GATED | NO_POS, "scan": SCAN | NO_POS, "lstm": LSTM | NO_POS}
KINDS = {"attention": {"pos": "rope", "n_kv_heads": 2},
         "window": {"pos": "rope", "window": 6, "global_every": 2},
         "sink": {"attn_sink": True, "window": 6, "pos": "rope"}, "experts": {"n_experts": 3}, **RECURRENT}


@pytest.fixture(scope="module", autouse=True)
def table():
    began = time.time()
    if REAL:
        torch.set_num_threads(os.cpu_count() or 1)
    yield
    if MEASURED:
        name = distributed.device_name(DEVICE)
        rows = [["on the GPU", name], *MEASURED, ("all tests", f"{time.time() - began:.0f} s, torch "
                                                               f"{torch.__version__}")]
        print(f"\n\n{grid([list(row) for row in rows])}")


@pytest.fixture
def exact():
    """fp32 matmuls without TF32, so that CPU and GPU agree closely."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def on_device(small):
    return lambda **options: small(**{"device": DEVICE.type} | options)


def pair(**options) -> tuple[LM, LM]:
    """One model on the CPU and on the device."""
    torch.manual_seed(1)
    cfg = ModelConfig(**TINY | {"max_seq_len": 24} | options)
    here, there = LM(cfg), LM(cfg)
    there.load_state_dict(here.state_dict())
    return here, there.to(DEVICE)


def relative(a, b) -> float:
    """The distance of two tensors over the norm of the second, on the CPU."""
    a, b = a.detach().float().cpu(), b.detach().float().cpu()
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


# ------------------------------------------------------------------------------------------------------------
# Attention and recurrences against what is written out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, S, window, sink", [
    (200, 200, 0, False), (200, 200, 37, False), (40, 170, 0, False), (40, 170, 30, False), (1, 90, 0, False),
    (200, 200, 0, True), (200, 200, 37, True), (40, 170, 30, True)])
def test_fast_attention_equals_the_written_out_one(exact, dtype, T, S, window, sink):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, heads, n, 32) for heads, n in ((4, T), (2, S), (2, S)))
    score, weight = torch.randn(4) if sink else None, torch.randn(2, 4, T, 32)

    def run(attend, device, dtype):
        given = [x.detach().to(device, distributed.DTYPES[dtype]).requires_grad_() for x in (q, k, v)]
        given += [score.detach().to(device).requires_grad_()] if sink else []
        y = attend(*given[:3], window, None, 0.0, given[3] if sink else None)
        return [y, *torch.autograd.grad((y.float() * weight.to(device)).sum(), given)]

    expected = run(attention, CPU, "fp32")
    for got, want in zip(run(fast_attention, DEVICE, dtype), expected, strict=True):
        assert relative(got, want) < {"fp32": 1e-5, "fp16": 5e-3, "bf16": 3e-2}[dtype]


@pytest.mark.parametrize("name", KINDS)
def test_losses_and_gradients_are_those_of_the_cpu(exact, name):
    here, there = pair(**KINDS[name])
    x, y = tokens(3, 20), tokens(3, 20, seed=2)
    for model, device in ((here, CPU), (there, DEVICE)):
        model(x.to(device), y.to(device))[0].backward()
    for (key, a), (_, b) in zip(there.named_parameters(), here.named_parameters(), strict=True):
        assert relative(a.grad, b.grad) < 1e-3, key


def test_graphs_of_both_recurrences_replay_what_the_loop_computes(exact):
    """Each set of shapes is captured once and then replayed with other numbers; old graphs are dropped."""
    for T, B in ((5, 3), (9, 2), (5, 3), (9, 2), *((t, 2) for t in range(10, 16)), (5, 3)):
        torch.manual_seed(T)
        f, b, c = torch.rand(B, T, 7), torch.randn(B, T, 7), torch.randn(B, 7)
        loop = [torch.randn(T, B, 12), torch.randn(B, 7), torch.randn(12, 7) / 3, torch.randn(21, 12) / 3,
                torch.randn(21), torch.ones(7), torch.zeros(7), torch.randn(12, 12) / 3, torch.randn(12)]
        for call, tensors in ((linear_scan, [f, b, c]), (lambda *t: gated_loop(*t)[0], loop)):
            grads = []
            for device in (CPU, DEVICE):
                given = [t.to(device).requires_grad_() for t in tensors]
                y = call(*given)
                grads.append([y, *torch.autograd.grad(y.square().sum(), given)])
            assert all(relative(theirs, ours) < 1e-4 for ours, theirs in zip(*grads, strict=True))
    assert not REAL or 1 <= len(GRAPHS) <= 8


def test_the_gated_loop_at_the_size_of_the_documents(exact):
    """Its speed is reported, not asserted."""
    sizes = {"vocab_size": 1000, "d_model": 256, "d_ff": 512, "context_dim": 256, "n_layers": 6}
    model = LM(ModelConfig(**RECURRENT["gated"] | sizes)).to(DEVICE)
    x = torch.randint(1000, (32, 64), device=DEVICE)

    def step():
        model(x, x)[0].backward()

    step()
    began = time.perf_counter()
    for _ in range(3):
        step()
    if REAL:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / 3
    assert all(p.grad.isfinite().all() for p in model.parameters())
    MEASURED.append(("gated context, 2.7M, forward and backward, 32 x 64, fp32",
                     f"{2048 / seconds:,.0f} tok/s"))


# ------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("kind", ["attention", "window", "lstm", "scan", "gated"])
def test_every_precision_learns_what_fp32_on_the_cpu_learns(on_device, kind):
    best = {}
    for dtype in ["cpu", *(d for d in DTYPES if REAL or (kind, d) != ("lstm", "fp16"))]:  # no CPU kernel
        where = {"device": "cpu", "dtype": "fp32"} if dtype == "cpu" else {"dtype": dtype}
        cfg = on_device(name=dtype, max_steps=60, eval_interval=60, **KINDS[kind] | where)
        best[dtype] = train.main(cfg)["result"]["loss"]
        if dtype == "fp16":
            assert final(cfg)["scaler"]["scale"] > 0 and final(cfg)["optimizer"]["state"]
    assert best["cpu"] < 4.0  # from ln 257 = 5.55
    assert all(abs(loss - best["cpu"]) < 0.06 for loss in best.values()), best
    MEASURED.append((f"{kind}: loss after 60 steps", ", ".join(f"{k} {v:.3f}" for k, v in best.items())))


@pytest.mark.parametrize("options", [{}, {"dtype": "fp16", "dropout": 0.1}, {"optimizer": "muon"},
                                     {"optimizer": "sgd"}])
def test_a_resumed_run_is_the_uninterrupted_one(on_device, options):
    """Fused AdamW keeps its step counters on the GPU. Equal up to rounding: some CUDA kernels add in any
    order."""
    whole, parts = on_device(name="whole", **options), on_device(name="parts", **options)
    train.main(whole)
    train.main(dataclasses.replace(parts, max_minutes=1e-6))  # a single step
    assert final(parts)["progress"]["step"] == 1
    assert train.main(parts)["counts"]["sessions"] == 2
    tolerance = 1e-3 if options else 1e-4
    for a, b in zip(losses(whole), losses(parts), strict=True):
        pairs = list(zip(a, b, strict=True))
        assert a[0] == b[0] and all(x == y or x == pytest.approx(y, rel=tolerance) for x, y in pairs)
    one, two = (final(cfg)["optimizer"]["state"] for cfg in (whole, parts))
    for a, b in zip(one.values(), two.values(), strict=True):
        assert a.get("step") is None or float(a["step"]) == float(b["step"]) == 20


@pytest.mark.parametrize("kind", ["attention", "window", "scan"])
def test_compiled_training_has_the_same_losses(on_device, kind):
    runs = [on_device(name=name, compile=name, max_steps=4, dtype="fp32", max_seq_len=32, **KINDS[kind])
            for name in ("false", "true")]
    for cfg in runs:
        train.main(cfg)
    for a, b in zip(*map(losses, runs), strict=True):
        assert all(x == pytest.approx(y, rel=1e-3) for x, y in zip(a, b, strict=True) if x is not None)


def test_muon_is_that_of_the_cpu(on_device):
    results = {}
    for device in ("cpu", DEVICE.type):
        cfg = on_device(name=f"on_{device}", device=device, optimizer="muon", dtype="fp32", max_steps=10)
        results[device] = train.main(cfg)["result"]["loss"]
    assert abs(results["cpu"] - results[DEVICE.type]) < 0.02, results


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_processes_of_a_group_are_one(on_device, optimizer):
    """NCCL with one process, and with two where there are two GPUs."""
    worlds = [1, 2] if not REAL or torch.cuda.device_count() > 1 else [1]
    runs = {world: on_device(name=f"world{world}", optimizer=optimizer, dtype="fp32", dropout=0.1,
                             micro_batch_size=2, max_steps=10) for world in (0, *worlds)}
    train.main(runs[0])
    for world in worlds:
        torchrun(runs[world], world)
        for a, b in zip(losses(runs[0]), losses(runs[world]), strict=True):
            assert all(x == pytest.approx(y, rel=2e-3) for x, y in zip(a, b, strict=True) if x is not None)
    MEASURED.append((f"{optimizer}: one process = a group of", " and ".join(map(str, worlds))))


# ------------------------------------------------------------------------------------------------------------
# Decoding


@pytest.mark.parametrize("name", KINDS)
def test_generation_is_that_of_the_cpu_compiled_or_not(exact, name):
    here, there = (model.eval() for model in pair(**KINDS[name] | {"max_seq_len": 64}))
    prompt = tokens(1, 5)
    expected = joined(here, prompt, 40, temperature=0)
    assert torch.equal(joined(there, prompt.to(DEVICE), 40, temperature=0).cpu(), expected)
    if name in ("attention", "window", "scan", "gated"):  # the others compile the same code
        compiled = joined(there, prompt.to(DEVICE), 40, temperature=0, compile=True)
        assert torch.equal(compiled.cpu(), expected)


# ------------------------------------------------------------------------------------------------------------
# Memory and speed


@pytest.mark.skipif(not REAL, reason="torch counts allocations on CUDA")
@pytest.mark.parametrize("options", [
    {"d_model": 512, "n_layers": 12, "n_heads": 8, "batch_size": 16, "vocab_size": 50257},
    {"d_model": 512, "n_layers": 12, "n_heads": 8, "batch_size": 16, "vocab_size": 50257,
     "checkpoint_activations": True},
    {"d_model": 256, "n_layers": 8, "max_seq_len": 2048, "batch_size": 8, "window": 256, "pos": "rope"}])
def test_memory_is_predicted(corpus, tmp_path, options):
    """Never much too little; what a kernel does not keep is counted, so it may be too much."""
    flags = [f"--{k}={v}" for k, v in options.items()]
    done = subprocess.run(
        [sys.executable, "train.py", f"--data={corpus}", f"--out_dir={tmp_path}", "--max_steps=3",
         "--device=cuda", "--compile=false", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    predicted = float(re.search(r"memory +about (\S+) GB", done.stdout)[1])
    measured = json.loads((tmp_path / "ledger.jsonl").read_text())["hardware"]["peak_memory_gb"]
    changed = ", ".join(f"{k}={v}" for k, v in options.items() if k != "vocab_size")
    MEASURED.append((f"memory, {changed}", f"{predicted:.2f} GB predicted, {measured:.2f} measured"))
    assert 0.9 < predicted / measured < 2.5


def test_a_batch_too_large_for_the_device_is_run_in_pieces_that_fit(on_device):
    cfg = on_device(batch_size=2048, d_model=128, n_layers=8, max_steps=1, memory_gb=2.0)
    row = train.main(cfg)
    micro = final(cfg)["progress"]["micro"]
    assert row["counts"]["steps"] == 1 and 1 <= micro < 2048
    if REAL:  # on a CPU the prediction includes what this process held before
        needs = Needs(LM, dataclasses.replace(cfg, vocab_size=257), row["hardware"]["dtype"], DEVICE)
        assert needs.peak(micro, 1) <= 2e9 < needs.peak(2 * micro, 1)


@pytest.mark.parametrize("shape", ["exp3", "exp6", "generate"] if REAL else ["tiny"])
def test_speed_is_measured_with_mfu(tmp_path, shape):
    """The table's figures; nothing is asserted of time."""
    out = str(tmp_path / "bench.json")
    bench.main(bench.BenchConfig(shapes=(shape,), rounds=3 if REAL else 1, steps=0 if REAL else 1, json=out,
                                 out_dir=str(tmp_path), device=DEVICE.type))
    with open(out) as f:
        rows = json.load(f)["rows"]
    assert rows and not any(row["error"] for row in rows)
    for row in rows:
        median, dtype = sorted(row["values"])[len(row["values"]) // 2], row["dtype"] or "fp32"
        peak = distributed.peak_flops(DEVICE, dtype)
        mfu = f", MFU {row['flops_per_token'] * median / peak:.1%}" if peak and row["flops_per_token"] else ""
        limit = f", {row['of_limit']:.1%} of its matmul rate" if row["of_limit"] else ""
        MEASURED.append((f"{shape}, {row['arm']}", f"{median:,.0f} {row['unit']}{mfu}{limit}"))


def test_the_log_of_a_run_has_its_speed(on_device, capsys):
    train.main(on_device(max_steps=10))
    assert "tok/s" in capsys.readouterr().out
    assert read_rows(os.path.join(on_device().out_dir, "run/metrics.jsonl"))[-1]["seconds"] > 0
