"""quantize.py and common/int8.py against rounding in plain loops in float64, and against the float model."""
import copy
import os
import shutil
import statistics

import quantize
import sample
import train
from common import checkpoint, int8
from common.checkpoint import CheckpointError
from common.config import ConfigError, UserError
from common.int8 import to_int8
from common.layers import Embedding, ExpertLinear, Linear
from model import load_model
from quantize import QuantizeConfig
from tests import test_context
from tests.test_generate import joined
from tests.test_model import tiny, tokens
from tests.test_reuse import VARIANTS, every_variant

import pytest
import torch
import torch.nn as nn


def rounded(x):
    """Round each row of x (..., K) to the 255 values of INT8, in float64, one number at a time."""
    out = x.detach().double().clone()
    for row in out.view(-1, out.size(-1)):
        scale = max(map(abs, row.tolist())) / 127
        row.copy_(torch.tensor([round(v / scale) * scale if scale else 0.0 for v in row.tolist()]))
    return out


def reference(model):
    """The float model with rounded matrices, and with the input of each matmul rounded."""
    model, seen = copy.deepcopy(model), set()
    for module in model.modules():
        if type(module) in (Linear, ExpertLinear):
            module.register_forward_pre_hook(lambda _, args: (rounded(args[0]).float(), *args[1:]))
        if type(module) in (Linear, ExpertLinear, Embedding) and module.weight not in seen:
            seen.add(module.weight)
            module.weight.data = rounded(module.weight).float()
    return model, seen


def distance(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


def median_distance(a, b) -> float:
    """Over sequences: in a few of them, a number halfway between two steps is rounded to the other side."""
    return statistics.median(map(distance, a, b))


# ------------------------------------------------------------------------------------------------------------
# Rows and matmuls


def test_rows_are_rounded_separately():
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1)) * torch.logspace(-9, 9, 5)[:, None]
    x[1, 2] = 0
    q, scale = int8.quantize_rows(x)
    assert q.dtype == torch.int8 and scale.shape == (3, 5, 1) and int(q.min()) >= -127
    torch.testing.assert_close(q * scale, rounded(x).float(), rtol=1e-6, atol=0)
    assert ((q * scale - x).abs() <= scale * 0.5001).all()


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_multiplies_the_rounded_numbers_exactly(rows, bias, monkeypatch):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48, bias=bias), torch.randn(2, rows, 64)
    exact = rounded(x) @ rounded(layer.weight).T + (layer.bias.double() if bias else 0)  # (2, N, M)
    ours = int8.swap(nn.Sequential(layer), {nn.Linear: int8.Int8Linear})
    fast = ours(x)
    torch.testing.assert_close(fast.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(fast[1, -1:], ours(x[1, -1:])), "a row depends on the rest of its batch"
    assert distance(exact.float(), x @ layer.weight.T + (layer.bias if bias else 0)) > 1e-3
    monkeypatch.setattr(int8, "HAS_INT_MM", False)
    assert torch.equal(ours(x), fast), "the portable matmul differs"
    assert ours.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16 and ours[0].q.dtype == torch.int8


def test_experts_by_rows_and_by_groups_agree():
    torch.manual_seed(0)
    for bias in (True, False):
        pool = ExpertLinear(3, 16, 12, bias)
        for p in pool.parameters():
            nn.init.normal_(p)
        x, where = torch.randn(6, 16), torch.tensor([0, 0, 2, 2, 2, 2])
        ours = int8.swap(nn.ModuleList([pool]), {ExpertLinear: int8.Int8Experts})[0]
        weight = rounded(pool.weight)
        exact = torch.stack([rounded(row) @ weight[e].T + (pool.bias[e] if bias else 0)
                             for row, e in zip(x, where, strict=True)])
        for y in (ours(x, where), ours(x, [2, 0, 4])):
            torch.testing.assert_close(y.double(), exact.double(), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Models


@every_variant
def test_every_kind_of_model(options):
    model = tiny(**options)
    expected, matrices = reference(model)
    ours = to_int8(copy.deepcopy(model))
    x = tokens(9, 8)
    with torch.no_grad():
        y, state = ours(x)[0], ours.init_state()
        assert median_distance(y, expected(x)[0]) < 1e-5 < 2e-3 < median_distance(y, model(x)[0]) < 0.1
        steps = [ours(x[:, t:t + 1], state=state)[0] for t in range(x.size(1))]
        assert median_distance(torch.cat(steps, 1), y) < 1e-5
    # every matrix is stored once, with one byte per number
    stored = {t.untyped_storage().data_ptr(): t for t in ours.state_dict().values()}.values()
    assert sum(t.numel() for t in stored if t.dtype == torch.int8) == sum(p.numel() for p in matrices)
    assert sum(p.dtype == torch.int8 for p in ours.parameters()) == len(matrices)
    assert all(p.dim() == 1 or name.endswith((".scale", ".bias", "router.weight"))
               for name, p in ours.named_parameters() if p.dtype != torch.int8)


@pytest.mark.parametrize("options", test_context.VARIANTS, ids=test_context.IDS)
def test_every_kind_of_recurrence(options):
    model = test_context.make(**options).eval()
    expected, matrices = reference(model)
    ours, x = to_int8(copy.deepcopy(model)), tokens(9, 8)
    with torch.no_grad():
        y = ours(x)[0]
        steps = {}
        for name, m in (("ours", ours), ("expected", expected)):  # token by token, every matmul is a module's
            state = m.init_state()
            steps[name] = torch.cat([m(x[:, t:t + 1], state=state)[0] for t in range(x.size(1))], 1)
        assert median_distance(steps["ours"], y) < 1e-5
        assert median_distance(y, steps["expected"]) < 1e-4 < median_distance(y, model(x)[0]) < 0.2
    assert sum(p.dtype == torch.int8 for p in ours.parameters()) == len(matrices)
    assert all(p.dim() == 1 or name.endswith((".scale", ".bias", "router.weight", "conv.weight"))
               for name, p in ours.named_parameters() if p.dtype != torch.int8)


def test_each_row_of_a_batch_continues_as_it_would_alone():
    model = to_int8(tiny(**VARIANTS["combined"], max_seq_len=48))
    prompts = [tokens(1, n, seed=n)[0] for n in (9, 2, 5)]
    alone = [joined(model, p[None], 12, temperature=0) for p in prompts]
    assert torch.equal(joined(model, prompts, 12, temperature=0), torch.cat(alone))


@pytest.mark.slow
def test_the_compiled_step_generates_the_same_tokens():
    model = to_int8(tiny(n_layers=1, n_experts=3, embed_rank=6))
    torch._dynamo.reset()
    assert torch.equal(joined(model, tokens(1, 3), 15, temperature=0, compile=True),
                       joined(model, tokens(1, 3), 15, temperature=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_stay_in_float32(dtype):
    """8 bits of a scale would be an error of all of its row."""
    model = to_int8(tiny())
    before = {name: p.clone() for name, p in model.named_parameters() if name.endswith(".scale")}
    model.to(dtype)
    after = dict(model.named_parameters())
    assert len(before) > 5 and all(torch.equal(after[name], scale) for name, scale in before.items())
    assert after["trunk.0.mixer_norm.weight"].dtype == dtype


def test_an_int8_model_cannot_be_trained():
    model = to_int8(tiny())
    with pytest.raises(UserError, match="INT8 weights cannot be trained"):
        model.train()


# ------------------------------------------------------------------------------------------------------------
# The script


@pytest.fixture(scope="module")
def trained(bpe_corpus, tmp_path_factory):
    """A run folder, to be copied, and the run's summary."""
    out = str(tmp_path_factory.mktemp("out"))
    summary = train.main(train.TrainConfig(
        data=bpe_corpus, out_dir=out, name="run", device="cpu", dtype="fp32", d_model=64, n_layers=2,
        n_heads=2, max_seq_len=64, batch_size=8, epochs=0.0, max_steps=80, pos="rope", lr=1e-2))
    return f"{out}/run", summary


def quantized(trained, tmp_path, **options):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    return str(folder), quantize.main(QuantizeConfig(checkpoint=str(folder), device="cpu", **options))


def test_end_to_end(trained, tmp_path, capsys):
    folder, result = quantized(trained, tmp_path, speed_tokens=4)
    text, path = capsys.readouterr().out, f"{folder}/int8.pt"
    summary, (fp32, ours) = trained[1], (result["result"][key] for key in ("fp32", "int8"))
    assert fp32["loss"] == pytest.approx(summary["result"]["loss"], rel=1e-5)
    assert fp32["bits_per_byte"] == pytest.approx(summary["result"]["bits_per_byte"], rel=1e-5)
    assert summary["result"]["perplexity"] < 150, "little was learned: guessing among the 400 tokens has 400"
    assert fp32["perplexity"] != ours["perplexity"] == pytest.approx(fp32["perplexity"], rel=0.01)
    assert fp32["weight_bytes"] == 4 * summary["counts"]["parameters"]
    assert ours["weight_bytes"] < 0.3 * fp32["weight_bytes"]  # biases and scales count in such a small model
    assert ours["weight_bytes"] < os.path.getsize(path) == ours["file_bytes"] < ours["weight_bytes"] + 2e4
    assert min(r["tokens_per_second"] for r in (fp32, ours)) > 0
    floats = sum(p.numel() for p in load_model(folder)[0].parameters() if p.dim() == 1)
    assert sum(result["result"]["kept_bytes"].values()) == 4 * floats
    for shown in ("loss", "perplexity", "tok/s", "final_norm.weight", "trunk.*.mixer.qkv.bias", path):
        assert shown in text

    saved = checkpoint.load(path, keys=("model", "config", "tokenizer"), int8=True)
    assert saved["int8"] == {"source": f"{folder}/best.pt"}
    assert sample.main(sample.SampleConfig(checkpoints=(path,), device="cpu", max_new_tokens=5, seed=3))
    state = {name: tensor.clone() for name, tensor in saved["model"].items()}
    assert all(torch.equal(t, state[k]) for k, t in load_model(path)[0].state_dict().items())


def test_errors(trained, tmp_path, corpus):
    folder, _ = quantized(trained, tmp_path, speed_tokens=0)
    path = f"{folder}/int8.pt"
    with pytest.raises(UserError, match="int8.pt already exists; replace it with --overwrite"):
        quantize.main(QuantizeConfig(checkpoint=folder, device="cpu"))
    with pytest.raises(UserError, match="int8.pt is already in INT8, made from .*best.pt"):
        quantize.main(QuantizeConfig(checkpoint=path, device="cpu"))
    with pytest.raises(UserError, match=r"trained with the tokenizer bpe:400 .*but .* tokenised with bytes"):
        quantize.main(QuantizeConfig(checkpoint=f"{folder}/best.pt", data=corpus, device="cpu"))
    with pytest.raises(ConfigError, match="speed_tokens must not be negative, got -1"):
        QuantizeConfig(speed_tokens=-1)

    options = {**trained[1]["config"], "out_dir": str(tmp_path), "name": "next", "max_steps": 81}
    with pytest.raises(CheckpointError, match="is in INT8, to be read and not trained; use .*best.pt"):
        train.main(train.TrainConfig(**options | {"init_from": path}))
    shutil.copy(path, f"{folder}/last.pt")
    with pytest.raises(CheckpointError, match="is in INT8, to be read and not trained; use .*best.pt"):
        train.main(train.TrainConfig(**options | {"name": "run"}))

    with open(path, "r+b") as f:
        f.truncate(os.path.getsize(path) // 2)
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        load_model(path)
    saved = checkpoint.load(f"{folder}/best.pt")
    saved["model"]["head.bias"][0] = float("nan")
    checkpoint.save(f"{folder}/best.pt", saved)
    with pytest.raises(UserError, match="best.pt contains values that are not finite, in head.bias"):
        quantize.main(QuantizeConfig(checkpoint=folder, device="cpu", overwrite=True))


def test_overwriting_a_run_removes_its_int8_file(trained, tmp_path):
    folder, _ = quantized(trained, tmp_path, speed_tokens=0)
    train.main(train.TrainConfig(**{**trained[1]["config"], "out_dir": str(tmp_path), "max_steps": 1,
                                    "overwrite": True}))
    assert not os.path.exists(f"{folder}/int8.pt")
