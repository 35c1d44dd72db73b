"""Mixers without attention: the context vector, gated and as a scan, and the LSTM."""
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import train
from common.config import ConfigError, load
from common.fit import Needs
from common.recurrence import gated_loop, linear_scan
from common.step import backward
from model import LM, ModelConfig
from muon import parameter_groups
from tests.conftest import started
from tests.test_model import tokens

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

SMALL = {"vocab_size": 61, "max_seq_len": 24, "d_model": 32, "n_layers": 3, "d_ff": 48, "pos": "none"}
GATED = {"mixer": "context", "activation": "relu", "tie_embeddings": False}
SCAN = {"mixer": "context", "context_update": "scan"}
LSTM = {"mixer": "lstm"}
VARIANTS = [GATED | {"context_dim": 20}, GATED | {"d_ff": 32, "tie_embeddings": True},
            GATED | {"embed_rank": 8, "n_layers": 1}, SCAN | {"context_dim": 20, "short_conv": 3},
            SCAN | {"proj_rank": 4, "n_unique_blocks": 2, "adapter_rank": 4, "n_experts": 2},
            LSTM | {"context_dim": 20}, LSTM | {"bias": False, "short_conv": 4, "zero_init": True}]
IDS = [",".join(f"{k}={v}" for k, v in variant.items()) for variant in VARIANTS]


def make(seed=1, **options) -> LM:
    """With weights larger than at the start, so that all gates matter."""
    torch.manual_seed(seed)
    model = LM(ModelConfig(**SMALL | options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def joined(model, *args, **options):
    return torch.cat(list(model.generate(*args, temperature=0, **options)), dim=1)  # (B, T)


def relative(a, b) -> float:
    return float((a - b).detach().norm() / b.detach().norm().clamp(min=1e-12))


# ------------------------------------------------------------------------------------------------------------
# The gated context vector of FACTS


@pytest.mark.parametrize("context_dim, n_layers, parameters", [
    (256, 6, 2_739_432), (512, 12, 4_840_936), (1024, 12, 5_892_072)])
def test_parameter_counts_of_the_documents(context_dim, n_layers, parameters):
    cfg = ModelConfig(**GATED, pos="none", vocab_size=1000, d_model=256, d_ff=512, context_dim=context_dim,
                      n_layers=n_layers)
    assert LM(cfg).count_parameters()["total"] == parameters


@pytest.mark.parametrize("name, parameters", [
    ("baseline", 2_739_432), ("advanced", 4_840_936), ("1024", 5_892_072), ("scan", 2_734_792),
    ("lstm", 2_740_696), ("transformer", 2_736_840)])
def test_parameter_counts_of_the_configs(name, parameters):
    assert LM(load(train.TrainConfig, [f"config/newllm_{name}.py"])).count_parameters()["total"] == parameters
    assert f"{parameters:,}" in Path(f"config/newllm_{name}.py").read_text()


def written_out(model: LM, ids):
    """FACTS' equations, token by token, with a matrix for each gate: logits (B, T, V), contexts (B, T, K)."""
    trunk, K = model.trunk, model.trunk.width
    w_f, w_i, w_u = trunk.gates.weight.split(K)
    b_f, b_i, b_u = trunk.gates.bias.split(K)
    norm, context, sigmoid = trunk.context_norm, torch.zeros(ids.size(0), K), torch.sigmoid
    logits, contexts = [], []
    for t in range(ids.size(1)):
        h = torch.cat((model.embed.weight[ids[:, t]], context), dim=1)
        for layer in trunk.layers:
            h = torch.relu(h @ layer.weight.t() + layer.bias)
        logits.append(h @ model.head.weight.t() + model.head.bias)
        s = sigmoid(h @ w_f.t() + b_f) * context + sigmoid(h @ w_i.t() + b_i) * (h @ w_u.t() + b_u)
        s = (s - s.mean(1, keepdim=True)) / torch.sqrt(s.var(1, keepdim=True, unbiased=False) + 1e-5)
        context = torch.clamp(s * norm.weight + norm.bias, -10, 10)
        contexts.append(context)
    return torch.stack(logits, dim=1), torch.stack(contexts, dim=1)


def test_logits_and_gradients_are_those_of_the_equations():
    model, ids, targets = make(**GATED, context_dim=20), tokens(4, 15), tokens(4, 15, seed=2)
    with torch.no_grad():
        model.trunk.context_norm.weight.mul_(8)  # so that some contexts reach the clamp
    expected, contexts = written_out(model, ids)
    assert 0.02 < (contexts.abs() == 10).float().mean() < 0.9
    state = model.init_state()
    assert relative(model(ids, state=state)[0], expected) < 1e-4  # rounding grows along the text
    assert relative(state.layers[0].tensors[0], contexts[:, -1]) < 1e-4
    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    theirs = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model(ids, targets)[0].backward()
    for name, p in model.named_parameters():
        assert relative(p.grad, theirs[name]) < 1e-3, name


def test_gradient_of_the_context_that_the_loop_starts_from():
    torch.manual_seed(1)
    T, B, H, K = 5, 3, 12, 7
    x, weight, c = torch.randn(T, B, H), torch.randn(T, B, H), torch.randn(B, K, requires_grad=True)
    w_context, w_gates, b_gates = torch.randn(H, K), torch.randn(3 * K, H) / 3, torch.randn(3 * K)
    rows, context = [], c
    for x_t in x:
        rows.append(F.relu(x_t + context @ w_context.t()))
        f, i, u = F.linear(rows[-1], w_gates, b_gates).chunk(3, dim=1)
        context = F.layer_norm(torch.sigmoid(f) * context + torch.sigmoid(i) * u, (K,)).clamp(-10, 10)
    y, _ = gated_loop(x, c, w_context, w_gates, b_gates, torch.ones(K), torch.zeros(K))
    assert torch.allclose(y, torch.stack(rows), atol=1e-5)
    ours, theirs = (torch.autograd.grad((h * weight).sum(), c)[0] for h in (y, torch.stack(rows)))
    assert relative(ours, theirs) < 1e-5


# ------------------------------------------------------------------------------------------------------------
# The linear recurrence


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 16, 17, 97])
def test_scan_is_the_loop_with_all_gradients(T):
    torch.manual_seed(T)
    f, b, weight = torch.randn(3, 2, T, 5, dtype=torch.float64)
    c = torch.randn(2, 5, dtype=torch.float64)
    f = torch.sigmoid(3 * f)
    f[:, ::3, 0], f[:, ::4, 1] = 0.0, 1.0  # forget all, or nothing
    given = [a.requires_grad_() for a in (f, b, c)]
    before, rows = c, []
    for t in range(T):
        before = f[:, t] * before + b[:, t]
        rows.append(before)
    expected = torch.stack(rows, dim=1)
    ours = linear_scan(*given)
    assert torch.allclose(ours, expected, rtol=1e-12, atol=1e-12)
    for a, e in zip(*(torch.autograd.grad((y * weight).sum(), given) for y in (ours, expected)), strict=True):
        assert torch.allclose(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", [1e-30, 0.5, 1 - 2**-20])
def test_scan_is_safe_where_products_of_gates_vanish(gate):
    T = 20_000
    y = linear_scan(torch.full((1, T, 1), gate), torch.full((1, T, 1), 1 - gate), torch.zeros(1, 1))[0, :, 0]
    expected = 1 - torch.tensor(gate, dtype=torch.float64) ** torch.arange(1, T + 1)
    assert torch.allclose(y.double(), expected, rtol=1e-3, atol=1e-6) and bool(y.isfinite().all())


def test_memory_of_the_scan_is_linear_in_time_and_half_lives_cover_the_context():
    model = LM(ModelConfig(**SMALL | SCAN | {"max_seq_len": 1024, "context_dim": 11}))
    half_lives = -1 / torch.log2(torch.sigmoid(model.trunk[0].mixer.forget_bias.double()))
    assert torch.allclose(half_lives, 2.0 ** torch.arange(11, dtype=torch.float64), rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# All of them


def test_lstm_is_torchs():
    model, x = make(**LSTM, context_dim=20), torch.randn(3, 9, 32)
    mixer, peer = model.trunk[0].mixer, nn.LSTM(32, 20, batch_first=True)
    with torch.no_grad():
        peer.weight_ih_l0.copy_(mixer.gates.weight)
        peer.weight_hh_l0.copy_(mixer.recur.weight)
        peer.bias_ih_l0.copy_(mixer.gates.bias)
        peer.bias_hh_l0.zero_()
        assert torch.allclose(mixer(x, None, None), mixer.proj(peer(x)[0]), atol=1e-6)
        state = mixer.init_state()
        y = torch.cat([mixer(x[:, t:t + 1], None, state) for t in range(9)], dim=1)  # our own cell
        assert torch.allclose(y, mixer.proj(peer(x)[0]), atol=1e-5)
        assert torch.allclose(state.tensors[1], peer(x)[1][1][0], atol=1e-5)


@pytest.mark.parametrize("options", VARIANTS, ids=IDS)
def test_decoding_in_pieces_of_any_size_is_one_pass(options):
    model, ids = make(**options).eval(), tokens(3, 21)
    expected = model(ids)[0]
    for size in (1, 4, 21):
        for mode in (torch.no_grad, torch.enable_grad):
            with mode():
                state = model.init_state()
                logits = torch.cat([model(piece, state=state)[0] for piece in ids.split(size, dim=1)], dim=1)
            assert torch.allclose(logits, expected, atol=1e-4), (size, mode)
            assert state.length == 21 and not any(t.requires_grad for s in state.layers for t in s.tensors)


@pytest.mark.parametrize("options", VARIANTS, ids=IDS)
def test_later_tokens_change_nothing_before(options):
    model, a = make(**options).eval(), tokens(2, 17)
    b = a.clone()
    b[:, 9:] = (b[:, 9:] + 1) % 61
    with torch.no_grad():
        x, y = model(a)[0], model(b)[0]
    # experts take their rows in one matmul, whose rounding may depend on how many there are
    assert torch.allclose(x[:, :9], y[:, :9], atol=1e-6 if "n_experts" in options else 0, rtol=0)
    assert not torch.allclose(x[:, 9], y[:, 9])


@pytest.mark.parametrize("options", VARIANTS, ids=IDS)
def test_every_parameter_has_a_rule_a_group_and_a_gradient(options):
    torch.manual_seed(1)
    model = LM(ModelConfig(**SMALL | options))
    model(tokens(4, 15), tokens(4, 15, seed=2))[0].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    for optimizer in ("adamw", "muon"):
        cfg = train.TrainConfig(**SMALL | options, optimizer=optimizer)
        groups = parameter_groups(model, cfg)
        assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
        for p, rows in zip(groups[0]["params"], groups[0].get("parts", []), strict=False):
            assert sum(rows) == p.size(-2)


def test_muon_takes_each_gate_for_itself():
    for options, name, n in ((GATED, "gates", 3), (SCAN, "0.mixer.gates", 3),
                             (LSTM, "0.mixer.gates", 4), (LSTM, "0.mixer.recur", 4)):
        cfg = train.TrainConfig(**SMALL | options, context_dim=20, optimizer="muon")
        model = LM(cfg)
        group = parameter_groups(model, cfg)[0]
        rows = {id(p): r for p, r in zip(group["params"], group["parts"], strict=True)}
        assert rows[id(model.trunk.get_submodule(name).weight)] == [20] * n


@pytest.mark.parametrize("options", VARIANTS, ids=IDS)
def test_the_state_has_one_size_for_any_length_and_generation_keeps_no_tokens(options):
    model, sizes = make(**options).eval(), set()
    with torch.no_grad():
        state = model.init_state()
        for piece in tokens(1, 300).split([1, 9, 290], dim=1):
            model(piece, state=state)
            sizes.add(sum(t.numel() for s in state.layers for t in (*s.tensors, s.past) if t is not None))
    assert len(sizes) == 1
    prompts = [tokens(1, 9), tokens(1, 2, seed=2)]
    together = joined(model, [p[0] for p in prompts], 40)
    alone = [joined(model, p, 40, use_cache=False) for p in prompts]
    assert torch.equal(together, torch.cat(alone))  # beyond max_seq_len=24: there is no limit


@pytest.mark.parametrize("options", [
    pytest.param(VARIANTS[i], id=IDS[i], marks=[pytest.mark.slow] * (i > 0)) for i in (0, 3, 5)])
def test_the_compiled_step_makes_the_same_tokens(options):
    model = make(**options).eval()
    assert torch.equal(joined(model, tokens(1, 5), 30, compile=True), joined(model, tokens(1, 5), 30))


@pytest.mark.parametrize("options, message", [
    ({"mixer": "context"}, "=gated needs --pos=none --activation=relu --tie_embeddings=False"),
    (GATED | {"pos": "none", "short_conv": 3, "n_experts": 4}, "needs --n_experts=0 --short_conv=0"),
    (SCAN, "mixer=context with context_update=scan needs --pos=none"),
    (LSTM | {"pos": "none", "window": 8, "qk_norm": True}, "lstm needs --qk_norm=False --window=0"),
    (LSTM | {"pos": "none", "context_update": "scan"}, "mixer=lstm needs --context_update=gated"),
    ({"context_dim": 64}, "mixer=attention needs --context_dim=0"),
    ({"short_conv": -1}, "short_conv must not be negative"),
    ({"tbptt": 16}, "tbptt=16 carries a fixed-size state"),
    (SCAN | {"pos": "none", "tbptt": 8, "checkpoint_activations": True}, "tbptt carries their state along"),
    (GATED | {"pos": "none", "checkpoint_activations": True}, "use tbptt to save memory")])
def test_what_makes_no_sense_is_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        train.TrainConfig(**options)


# ------------------------------------------------------------------------------------------------------------
# Training


def step_gradients(cfg):
    job = started(cfg)
    batches = [job.windows.batch(i, 4, torch.device("cpu")) for i in (0, 4)]
    loss = backward(job.model, batches, job.dist, "fp32", job.scaler, tbptt=cfg.tbptt)
    return loss.item(), {name: p.grad for name, p in job.model.named_parameters()}


@pytest.mark.parametrize("options", [VARIANTS[i] for i in (0, 3, 5)], ids=[IDS[i] for i in (0, 3, 5)])
def test_truncated_back_propagation(options, small):
    cfg = small(**SMALL | {"vocab_size": 0} | options)
    loss, whole = step_gradients(cfg)
    for tbptt in (24, 100, 5):
        loss_t, grads = step_gradients(dataclasses.replace(cfg, tbptt=tbptt))
        assert loss_t == pytest.approx(loss, rel=1e-5)  # the state is carried: forward is the same
        error = max(relative(grads[name], g) for name, g in whole.items())
        assert error < 1e-5 if tbptt >= 24 else error > 1e-3
    # by hand: pieces of 5, whose states are cut off from what came before
    job = started(cfg)
    x, y = job.windows.batch(0, 8, torch.device("cpu"))
    state = job.model.init_state()
    for a, b in zip(x.split(5, dim=1), y.split(5, dim=1), strict=True):
        (job.model(a, b, state)[0] * a.size(1) / 24).backward()
    for name, p in job.model.named_parameters():
        assert relative(grads[name], p.grad) < 1e-4, name


def test_memory_of_truncated_back_propagation_does_not_grow_with_length(small):
    def per_sequence(**options):
        cfg = small(vocab_size=100, dtype="bf16", pos="none", **GATED | options)
        return Needs(LM, cfg, "bf16", torch.device("cpu")).per_sequence

    base = per_sequence(max_seq_len=64)
    assert per_sequence(max_seq_len=100_000, tbptt=64) == base
    assert per_sequence(max_seq_len=1024) == pytest.approx(16 * base, rel=0.1)


@pytest.mark.parametrize("options", [GATED | {"dropout": 0.1}, SCAN | {"tbptt": 10}])
def test_sessions_of_limited_length_give_the_identical_curve(options, small, monkeypatch):
    def losses(name):
        rows = map(json.loads, open(f"{cfg.out_dir}/{name}/metrics.jsonl"))
        return [{k: r[k] for k in ("step", "train_loss", "val_loss", "grad_norm") if k in r} for r in rows]

    cfg = small(**{"pos": "none", "max_steps": 12, "eval_interval": 5} | options)
    train.main(cfg)
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock.__setitem__(0, clock[0] + 1) or clock[0])
    parts = dataclasses.replace(cfg, name="parts", max_minutes=9 / 60)  # of a clock that runs by calls
    summaries = [train.main(parts)]
    while summaries[-1]["status"] == "stopped":
        summaries.append(train.main(parts))
        assert len(summaries) < 20
    assert len(summaries) > 2 and losses("parts") == losses("run")


@pytest.mark.slow
def test_two_processes_are_one(small, tmp_path, corpus):
    options = {**SCAN, "tbptt": 12, "short_conv": 2, "pos": "none", "d_model": 16, "max_seq_len": 24,
               "dtype": "fp32", "data": corpus, "out_dir": str(tmp_path), "max_steps": 4, "epochs": 0,
               "batch_size": 8,
               "micro_batch_size": 2, "device": "cpu", "log_interval": 1}
    flags = [f"--{k}={v}" for k, v in options.items()]
    for name, start in (("one", [sys.executable]), ("two", [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])):
        subprocess.run([*start, "train.py", *flags, f"--name={name}"], check=True, capture_output=True)
    one, two = ([row["train_loss"] for row in map(json.loads, open(tmp_path / name / "metrics.jsonl"))
                 if "train_loss" in row] for name in ("one", "two"))
    assert len(one) >= 4 and one == pytest.approx(two, rel=1e-5)
