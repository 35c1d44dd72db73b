"""bench.py: small real races against a stand-in for nanoGPT, and the arithmetic of the table."""
import dataclasses
import importlib.util
import itertools
import json
import math
import statistics

import bench
from bench import BenchConfig
from common import data, race, tokenizer
from common.config import ConfigError, UserError, help_text
from common.race import Row
from model import LM

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

STAND_IN = '''
import os
from dataclasses import dataclass
import torch
from torch import nn

def refuse(model):
    raise ValueError("no compiler here")

torch.compile = refuse

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config == GPTConfig(32, 512, 2, 2, 32, 0.0, True)
        print("number of parameters")  # must not appear in the table
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, idx, targets):
        assert idx.shape == targets.shape == (2, 32) and torch.equal(idx[:, 1:], targets[:, :-1])
        logits = self.head(self.embed(idx))
        return logits, nn.functional.cross_entropy(logits.view(-1, 512), targets.view(-1))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        assert (weight_decay, betas, device_type) == (0.1, (0.9, 0.95), "cpu")
        return torch.optim.AdamW(self.parameters(), lr=learning_rate)

    def generate(self, idx, max_new_tokens):
        assert not self.training
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3:  # after the warm-up and one round
            os._exit(1)
        for _ in range(max_new_tokens):
            idx = torch.cat((idx, self.head(self.embed(idx[:, -1:])).argmax(-1)), dim=1)
        return idx
'''


@pytest.mark.slow
def test_races_against_a_peer_that_fails_to_compile_and_then_dies(tmp_path, monkeypatch, capfd):
    (tmp_path / "standin").mkdir()
    (tmp_path / "standin" / "model.py").write_text(STAND_IN)
    tiny, out = bench.shape_of("tiny"), tmp_path / "bench.json"
    monkeypatch.setattr(bench, "shape_of", lambda name, **_: tiny)
    row = bench.main(BenchConfig(
        shapes=("tiny", "generate"), peer=(str(tmp_path / "standin"),), rounds=2, steps=1, device="cpu",
        dtype="fp32", compile="false", json=str(out), out_dir=str(tmp_path)))
    result = row["result"]
    assert json.loads(out.read_text()) == json.loads(json.dumps({"config": row["config"]} | result))
    ours, shipped, compiled, text, peer_text = result["rows"]
    limits = result["machine"]["limits"]
    assert limits.keys() == {"fp32", "bf16", "copy"} and all(v > 0 for v in limits.values())

    assert [r["arm"] for r in result["rows"][:2]] == ["nanoMem: fp32", "standin as shipped: fp32"]
    for row in (ours, shipped, text):
        assert not row["error"] and len(row["values"]) == 2 and min(row["values"]) > 0 < row["peak_gb"]
    assert len(shipped["speed_ratio"]) == 3 and text["of_limit"] is None
    model = bench.LM(bench.ModelConfig(**tiny.model))
    assert ours["flops_per_token"] == shipped["flops_per_token"] == model.flops_per_token(32)
    assert ours["of_limit"] == pytest.approx(
        model.flops_per_token(32) * statistics.median(ours["values"]) / limits["fp32"] / 1e9)
    assert shipped["memory_ratio"] == ours["peak_gb"] / shipped["peak_gb"]

    assert compiled["error"] == "ValueError: no compiler here" and compiled["values"] == []
    assert "died" in peer_text["error"] and len(peer_text["values"]) == 1 and not peer_text["speed_ratio"]
    assert compiled["speed_ratio"] is compiled["of_limit"] is compiled["peak_gb"] is None
    printed, errors = capfd.readouterr()
    assert "in refuse\n" in errors and "standin: fp32 failed: its process died" in errors
    lines = printed.splitlines()
    assert len(lines) == 7 and "copy" in lines[0] and "number of parameters" not in printed
    assert lines[4].split()[-3:] == ["failed", "n/a", "n/a"] and "failed" in lines[6]
    assert f"{statistics.median(ours['values']):,.0f} tok/s" in lines[2]
    assert "{:.2f}-{:.2f}-{:.2f}x".format(*shipped["speed_ratio"]) in lines[3]
    assert len({line.rindex(" GB") for line in lines[2:4] + lines[5:]}) == 1, "columns are not aligned"


def test_ratios_and_shares_match_a_calculation_by_hand():
    rng = np.random.default_rng(0)
    ours, peer, other = (Row("s", name, "tok/s", dtype, flops, list(rng.uniform(1, 9, 5)), gb)
                         for name, dtype, flops, gb in
                         (("a", "bf16", 2e9, 1.0), ("b", "fp32", 0.0, 4.0), ("c", "fp16", 0.0, 2.0)))
    bench.compare([ours, peer, other], {"fp32": 100.0, "bf16": 400.0})
    assert ours.speed_ratio is None and ours.of_limit == sorted(ours.values)[2] * 2e9 / 400e9
    assert peer.of_limit == sorted(peer.values)[2] * 2e9 / 100e9 and other.of_limit is None
    quotients = sorted(ours.values[i] / peer.values[i] for i in range(5))
    assert peer.speed_ratio == (quotients[0], quotients[2], quotients[4]) and peer.memory_ratio == 0.25


def test_a_failed_arm_has_no_ratios_or_shares():
    good, failed = Row("s", "a", "tok/s", "fp32", 1e9, [1.0], 1.0), Row("s", "b", error="boom")
    for rows in ([good, failed], [failed, good]):
        bench.compare(rows, {"fp32": 100.0})
        assert failed.speed_ratio is failed.of_limit is good.speed_ratio is good.memory_ratio is None
    assert good.of_limit == 0.01 and bench.cells(failed)[2:] == ("failed", "n/a", "n/a", "", "")
    seconds = Row("startup", "a", "s", values=[3.0, 1.0, 2.5])
    bench.compare([seconds], {"fp32": 1.0})
    assert bench.cells(seconds)[2:] == ("2.50 s", "n/a", "n/a", "", "")


def test_written_out_models_compute_the_same_as_ours():
    def size(model):
        return sum(p.numel() for p in model.parameters())

    shape = bench.shape_of("context32")
    assert (shape.batch, bench.shape_of("context512").batch) == (32, 512)
    for name in ("context32", "decoding"):
        ours = bench.LM(bench.ModelConfig(**bench.shape_of(name).model))
        assert ours.count_parameters()["total"] == size(bench.load_peer("loop", shape, 0.0)[0]) == 2_739_432
    assert size(bench.load_peer("nn.LSTM", shape, 0.0)[0]) == 2_345_960

    shape = bench.Shape(3, shape.model | {"vocab_size": 300, "d_model": 8, "d_ff": 12, "context_dim": 5})
    ours, tokens = bench.LM(bench.ModelConfig(**shape.model)), torch.randint(300, (2, 3, 11))
    plain, loss_of = bench.load_peer("loop", shape, 0.0)
    trunk = ours.trunk
    theirs = [ours.embed, *trunk.layers, trunk.gates, trunk.context_norm, ours.head]
    with torch.no_grad():
        plain.norm.weight.mul_(6)  # so that some contexts are clamped
        gates = [torch.cat([getattr(gate, kind) for gate in (plain.forget, plain.input, plain.update)])
                 for kind in ("weight", "bias")]
        own = [plain.embed.weight, *(p for layer in plain.layers for p in layer.parameters()), *gates,
               *plain.norm.parameters(), *plain.head.parameters()]
        for p, q in zip((p for module in theirs for p in module.parameters()), own, strict=True):
            p.copy_(q)
    assert torch.allclose(plain(tokens[0]), ours(tokens[0])[0], atol=1e-5)
    loss = loss_of(plain, *tokens)
    assert torch.allclose(loss, F.cross_entropy(ours(tokens[0])[0].transpose(1, 2), tokens[1]))
    assert torch.allclose(loss, ours(*tokens)[0])


def test_recurrent_arms_take_a_step(tmp_path, monkeypatch):
    real = bench.shape_of
    monkeypatch.setattr(bench, "shape_of", lambda name, **changes: bench.Shape(
        2, real(name, **changes).model | {"max_seq_len": 6}))
    cfg, runners = BenchConfig(device="cpu", dtype="fp32", compile="false", steps=1), {}
    folder = bench.write_data(str(tmp_path), 1000)
    for name in ("context512", "scan1"):
        for arm in bench.arms_of(name, cfg, {"dtype": "fp32"}):
            runners[name, arm.label] = arm.make(cfg, arm.shape, folder, **arm.options)
    assert [label for name, label in runners if name == "context512"] == [
        "gated", "all in the loop: fp32", "nn.LSTM: fp32"]
    fast = bench.arms_of("context512", cfg, {"dtype": "bf16"})
    assert [arm.label for arm in fast][2:] == ["nn.LSTM: fp32", "nn.LSTM: bf16"]
    assert [label for name, label in runners if name == "scan1"] == ["scan", "gated", "all in the loop: fp32"]
    assert all(runner.measure() > 0 for runner in runners.values())
    flops = {label: runner.flops for (_, label), runner in runners.items()}
    assert flops["gated"] == flops["all in the loop: fp32"] != flops["nn.LSTM: fp32"]
    assert flops["nn.LSTM: fp32"] == 6 * (4 * 512 * (256 + 512) + 512 * 1000)


def test_decoding_measures_what_each_state_keeps():
    arms = {arm.label: arm for arm in bench.arms_of("decoding", BenchConfig(), {})}
    sizes = {label: bench.LM(bench.ModelConfig(**arm.shape.model)).count_parameters()["total"]
             for label, arm in arms.items()}
    assert all(0.95 < n / 2_739_432 < 1.05 for n in sizes.values())
    context, token = 256 * 4, 4 * 2 * 256 * 4  # bytes of a context vector, of a token's keys and values

    def held(label, length):
        point = bench.decode(BenchConfig(device="cpu"), arms[label], length, piece=16, steps=2)
        assert point.ms_per_token > 0 < point.peak_gb and point.parameters == sizes[label]
        return point.state_bytes

    kept = {label: [held(label, length) for length in (70, 300)] for label in arms}
    assert kept["context"] == kept["context, by generate()"] == [context] * 2
    assert kept["scan"] == [4 * context] * 2 and kept["LSTM"] == [3 * 2 * 224 * 4] * 2
    for (short, long), most in ((kept["attention"], math.inf), (kept["attention, window 256"], 1024 * token)):
        assert 72 * token <= short <= 2 * 72 * token + 32 * token and 257 * token <= long <= most
    assert kept["attention"][1] >= 302 * token


def test_attention_reads_in_windows_but_a_token_then_sees_all():
    """decode() relies on this: the caches hold every key, and a single query attends to all of them."""
    shape = bench.shape_of("decoding", config="newllm_transformer", n_layers=1)
    model = bench.LM(bench.ModelConfig(**shape.model)).eval()
    tokens = torch.randint(1000, (1, 400))
    with torch.no_grad():  # in a single layer, keys do not depend on the window
        state = model.init_state()
        model.trunk[0].mixer.window = 256
        model.hidden(tokens[:, :399], state)
        logits = model.step(tokens[:, 399:], state)
        model.trunk[0].mixer.window = 0
        assert torch.allclose(logits, model(tokens)[0][:, -1], atol=1e-5)


@pytest.mark.slow
def test_decoding_end_to_end_with_an_arm_that_fails(tmp_path, monkeypatch, capsys):
    context = bench.shape_of("decoding", d_model=16).model
    learned = {"vocab_size": 100, "max_seq_len": 16, "n_heads": 2}
    monkeypatch.setattr(bench, "arms_of", lambda *_: [
        bench.Arm(name, bench.decode, bench.Shape(1, model))
        for name, model in (("context", context), ("learned", learned))])
    out = tmp_path / "bench.json"
    row = bench.main(BenchConfig(shapes=("decoding",), lengths=(30,), plot=str(tmp_path / "d.png"),
                                 json=str(out), device="cpu", out_dir=str(tmp_path)))
    result = row["result"]
    assert json.loads(out.read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    assert (tmp_path / "d.png").exists()
    good, bad = result["rows"]
    assert good["state_bytes"] == 1024 and good["peak_gb"] > good["grown_gb"] and not good["error"]
    assert "learned positions end at max_seq_len=16" in bad["error"]
    printed, errors = capsys.readouterr()
    assert "learned, 30 failed" in errors and printed.splitlines()[-1].endswith("failed")


def test_slopes_table_and_plot(tmp_path):
    def point(arm, length, size, **options):
        return bench.Point("decoding", arm, length, 10, size, 0.3, 0.001, 0.5, **options)

    flat, cache = ([point(arm, n, size(n)) for n in (10, 100, 1000)]
                   for arm, size in (("flat", lambda n: 64), ("cache", lambda n: 8 * n)))
    failed = [point("flat", 10, 64), bench.Point("decoding", "flat", 100, error="boom")]
    for points in (flat, cache, failed):
        bench.fit_slope(points)
    assert flat[0].slope == pytest.approx(0, abs=1e-9) and cache[2].slope == pytest.approx(1)
    assert failed[0].slope is failed[1].slope is None
    lines = bench.decoding_table(flat + failed).splitlines()
    assert lines[1].split() == ["decoding", "flat", "10", "10", "64", "B", "300", "MB", "1.0", "MB", "0.50",
                                "ms", "0.00"] and lines[4].endswith("n/a") and lines[5].endswith("failed")
    bench.draw_decoding(flat + cache + failed, str(tmp_path / "d.png"))
    assert (tmp_path / "d.png").stat().st_size > 10_000


def test_warm_up_continues_until_step_times_are_steady(monkeypatch):
    def steps(*seconds):
        times = iter(seconds)
        monkeypatch.setattr(race, "timed", lambda *_: next(times))
        assert race.warm_up(None, None, 7) == 7
        return len(seconds) - len(list(times))

    assert steps(9, 1, 1, 1) == 3 and steps(9, 9, 3, 1, 5, 1.1, 1) == 3
    assert steps(1, 1, 5, 1.1, 1) == 4 and steps(*([1] + [2] * 20)) == 8
    for seconds, expected in ((0.1, 10), (3.0, 1)):
        monkeypatch.setattr(race, "timed", lambda *_, seconds=seconds: seconds)
        assert race.warm_up(None, None, 0) == expected


@pytest.mark.parametrize("vocab_size", [512, 8192, 50257])
def test_training_can_read_the_data_folder(tmp_path, vocab_size):
    folder = bench.write_data(str(tmp_path), vocab_size)
    meta, tok = data.read_meta(folder), tokenizer.load(folder)
    assert tok.vocab_size == vocab_size and tok.fingerprint == meta["tokenizer"]["fingerprint"]
    tokens = data.open_tokens(folder, "train", meta)
    assert vocab_size * 0.99 < tokens.max() < vocab_size and len(np.unique(tokens)) > 0.99 * vocab_size
    assert len(data.open_tokens(folder, "val", meta)) > 1


def test_shapes_are_as_the_docstring_says():
    def of(name):
        shape = bench.shape_of(name)
        keys = ("max_seq_len", "d_model", "n_layers", "n_heads", "vocab_size")
        return shape.batch, *(shape.model[k] for k in keys)

    assert of("exp3") == of("overhead") == (8, 512, 128, 4, 8, 50257)
    assert of("exp6") == (4, 512, 512, 12, 8, 50257) and of("generate") == of("int8") == (1, *of("exp6")[1:])
    assert of("d256") == (16, 256, 256, 8, 8, 8192) and bench.shape_of("exp7").model["pos"] == "rope"
    assert of("muon") == (16, 512, 192, 9, 3, 8192)
    heads = bench.shape_of("distill_loss").model
    assert (heads["d_model"], heads["max_seq_len"], heads["vocab_size"]) == (256, 2048, 151_936)
    assert all(bench.shape_of(name).model.get("flash", True) for name in bench.SHAPES)
    assert ", ".join(bench.USUAL) in help_text(BenchConfig)
    arms = bench.arms_of("local", BenchConfig(), {})
    assert [(a.shape.batch, a.shape.model["max_seq_len"], a.shape.model.get("window", 0)) for a in arms] == [
        (1, 8192, 256), (16, 512, 256), (1, 8192, 0)]


def test_arms_of_each_shape():
    cfg = BenchConfig(peer=("x/nanoGPT/", "transformers"))
    for device, dtype in (("cpu", "bf16"), ("cuda", "fp16")):
        arms = bench.arms_of("exp3", cfg, {"device": device, "dtype": dtype})
        shipped = ["nanoGPT as shipped: fp32"] * (device == "cpu")
        assert [a.label for a in arms] == ["nanoMem", *shipped, f"nanoGPT compiled: {dtype}",
                                           "transformers as shipped: fp32", f"transformers compiled: {dtype}"]
        assert [a.options.get("compile") for a in arms[1:]] == [False, True, False, True][-len(arms) + 1:]
    arms = bench.arms_of("generate", cfg, {})
    assert [(a.label, a.options.get("compile")) for a in arms] == [
        ("nanoMem", True), ("nanoMem", False), ("nanoGPT", False), ("transformers", True),
        ("transformers", False)]
    by = [a.options["optimizer"] for a in bench.arms_of("muon", cfg, {})]
    assert by == ["muon", "adamw"]
    for compile in ("auto", "true"):
        arms = bench.arms_of("int8", dataclasses.replace(cfg, compile=compile), {})
        assert [(a.options["dtype"], a.options["compile"]) for a in arms] == [
            ("int8", compile == "true"), ("fp32", compile == "true")]
    eager = dataclasses.replace(cfg, compile="false")
    assert [a.label for a in bench.arms_of("generate", eager, {})] == ["nanoMem", "nanoGPT", "transformers"]


def test_arms_of_distillation_take_the_same_gradient(monkeypatch):
    """The masked one that of every second row, for half of the work."""
    monkeypatch.setattr(bench, "training", lambda step, *_: step)
    shape = bench.Shape(1, bench.shape_of("distill_loss").model | {"vocab_size": 97, "max_seq_len": 30})
    found = []
    for arm in bench.arms_of("distill_loss", BenchConfig(), {}):
        torch.manual_seed(0)
        found.append(arm.make(BenchConfig(device="cpu", dtype="fp32"), shape, "", **arm.options))
    ours, plain, masked = (runner.measure() for runner in found)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)
    assert not masked[0][::2].any()
    torch.testing.assert_close(masked[0][1::2], 2 * ours[0][1::2])
    assert found[0].flops == found[1].flops == 2 * found[2].flops == 2 * 97 * (3 * 256 + 896)


def test_a_step_of_distillation_is_the_same_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr(bench, "training", lambda step, *_: step)
    small = {"vocab_size": 97, "d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24}
    monkeypatch.setattr(bench, "TEACHER", bench.TEACHER | small | {"d_model": 24})
    shape = bench.Shape(2, bench.shape_of("distill").model | small | {"max_seq_len": 12})
    made, heads = [], {}
    monkeypatch.setattr(bench, "LM", lambda cfg: made.append(LM(cfg)) or made[-1])
    for arm in bench.arms_of("distill", BenchConfig(), {}):
        made.clear()
        torch.manual_seed(0)
        arm.make(BenchConfig(device="cpu", dtype="fp32"), shape, "", **arm.options).measure()
        heads[arm.label] = made[0].head.weight.detach()
        assert len(made) == (1 if arm.label == "cached" else 2)
    torch.testing.assert_close(heads["chunk by chunk"], heads["all logits"], atol=1e-5, rtol=1e-3)
    assert not torch.equal(heads["chunk by chunk"], heads["cached"])


def test_the_loading_arms_sum_the_same_weights(tmp_path, monkeypatch):
    small = {"vocab_size": 97, "d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24}
    shape, sums, folder = bench.Shape(1, bench.shape_of("loading").model | small), [], tmp_path / "weights"
    arm = bench.arms_of("loading", BenchConfig(), {})[0]
    runner = arm.make(BenchConfig(device="cpu", dtype="fp32"), shape, str(tmp_path), **arm.options)
    assert (runner.unit, runner.note) == ("GB/s", "fp32") and runner.measure() > 0 < runner.peak()
    monkeypatch.setattr(torch.Tensor, "sum", lambda p: sums.append(p.double().mean().item() * p.numel()))
    for peer in ("", "transformers"):
        sums.clear()
        seconds, peak = bench.load_once(str(folder), "fp32", "cpu", peer)
        assert seconds > 0 < peak and sum(sums) == pytest.approx(model_sum(folder), rel=1e-6)


def model_sum(folder) -> float:
    """By the package's own reader, which neither arm uses."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    return sum(w.double().mean().item() * w.numel() for w in weights.values())


def test_the_int8_arm_generates_with_int8_weights(monkeypatch):
    made = []
    monkeypatch.setattr(bench, "LM", lambda cfg: made.append(LM(cfg)) or made[0])
    runner = bench.generate(BenchConfig(device="cpu"), bench.shape_of("tiny"), "", dtype="int8")
    assert runner.note == "int8" and made[0].head.q.dtype == torch.int8 and runner.measure() > 0


def test_errors_say_what_to_type(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"(?s)--peer=.*nowhere.*model.py.*git clone .*nanoGPT"):
        bench.main(BenchConfig(peer=(str(tmp_path / "nowhere"),)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"(?s)not installed.*pip install transformers"):
        bench.main(BenchConfig(peer=("transformers",)))
    with pytest.raises(ConfigError, match="shapes: expected one of exp1, exp2, .*; got 'exp8'"):
        BenchConfig(shapes=("exp8", "tiny"))
    with pytest.raises(ConfigError, match="plot needs the shape decoding") as other:
        BenchConfig(plot="d.png", lengths=(0,))
    assert "lengths must be at least 1" in str(other.value)
    with pytest.raises(ConfigError) as error:
        BenchConfig(rounds=0, dropout=1.0)
    assert "rounds must be at least 1" in str(error.value) and "dropout must be in" in str(error.value)


def test_overhead_is_the_time_outside_the_clocked_pieces(tmp_path, monkeypatch):
    """The clock advances by one per reading, so the share can be counted."""
    shape = bench.shape_of("tiny")
    runner = bench.overhead(BenchConfig(device="cpu", dtype="fp32", compile="false", steps=2), shape,
                            bench.write_data(str(tmp_path), 512))
    ticks = itertools.count()
    monkeypatch.setattr(race.time, "perf_counter", lambda: next(ticks))
    # two steps of three pieces: of the 13 ticks between the first and the last reading, 6 are inside pieces
    assert runner.measure() == pytest.approx(100 * (1 - 6 / 13)) and math.isfinite(runner.measure())
