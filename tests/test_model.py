"""model.py against transformers, dense masks, plain loops and the counts of the ladder."""
import cmath
import itertools
import math
import warnings

import model as model_module
from common.config import ConfigError, load
from common.generation import KVCache, sample_token
from model import LM, ModelConfig, rope_angles, rotate
from muon import lr_fraction, make_optimizer
from train import TrainConfig

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VARIANTS = [
    {},
    {"pos": "rope", "n_kv_heads": 2, "qk_norm": True},
    {"pos": "none", "activation": "relu2", "norm": "rmsnorm", "n_kv_heads": 1},
    {"pos": "rope", "activation": "swiglu", "norm": "rmsnorm", "bias": False, "head_bias": False,
     "tie_embeddings": False, "qk_norm": True},
    {"activation": "relu", "bias": False, "norm": "layernorm"},
]


TINY = {"vocab_size": 61, "max_seq_len": 24, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48}


def tiny(seed=0, **options) -> LM:
    torch.manual_seed(seed)
    model = LM(ModelConfig(**TINY | options)).eval()
    for p in model.parameters():  # larger than at initialisation, so that every part matters in a comparison
        p.data += 0.1 * torch.randn_like(p)
    return model


def tokens(batch=2, length=20, vocab=61, seed=1):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------
# Counts and initialisation


@pytest.mark.parametrize("exp, count", [
    (1, 869_153), (2, 869_153), (3, 7_342_033), (4, 16_206_673), (5, 19_365_713), (6, 63_873_617),
    (7, 63_611_473)])
def test_ladder_parameter_counts(exp, count):
    with torch.device("meta"):
        model = LM(load(TrainConfig, [f"config/exp{exp}.py"]))
    assert model.count_parameters()["total"] == count


@pytest.mark.parametrize("exp, count", [(1, 868_718), (3, 7_341_312)])
def test_the_best_of_a_rung_has_no_more_parameters(exp, count):
    with torch.device("meta"):
        own, notes = (LM(load(TrainConfig, [f"config/{name}{exp}.py"])) for name in ("best", "exp"))
    most = notes.count_parameters()["total"]
    assert own.count_parameters()["total"] == count and 0.999 * most < count <= most


def test_tinier_and_qwen_student_parameter_counts():
    with torch.device("meta"):
        tinier = LM(ModelConfig(vocab_size=8192, d_model=192, n_layers=9, n_heads=3, d_ff=384, pos="rope",
                                activation="swiglu", bias=False, head_bias=False, qk_norm=True))
    assert tinier.count_parameters() == {"total": 4_894_272, "matmul": 4_894_272 - 19 * 192,
                                         "non_embedding": 4_894_272 - 8192 * 192}


def test_initialisation_is_as_documented():
    torch.manual_seed(0)
    model = LM(ModelConfig(vocab_size=1000, d_model=128, n_layers=8, n_heads=4, tie_embeddings=False))
    for name, p in model.named_parameters():
        std = 0.02 / math.sqrt(16) if name.endswith(("proj.weight", "down.weight")) else 0.02
        if name.endswith("norm.weight"):
            assert (p == 1).all(), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        else:
            assert abs(p.std().item() / std - 1) < 0.05 and abs(p.mean()) < std / 10, name


def test_a_parameter_without_a_rule_is_refused(monkeypatch):
    class Odd(model_module.FeedForward):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.mystery = nn.Parameter(torch.empty(3, 3))

    monkeypatch.setattr(model_module, "FeedForward", Odd)
    with pytest.raises(
        AssertionError,
        match=r"trunk.0.ff.mystery \(3, 3\) has no Spec .*add 'mystery' to the `specs` of the layer",
    ):
        tiny()


@pytest.mark.parametrize("options", VARIANTS)
def test_initial_loss_is_ln_vocabulary(options):
    torch.manual_seed(0)
    model = LM(ModelConfig(vocab_size=1000, d_model=64, n_layers=2, n_heads=4, **options))
    x = tokens(4, 65, 1000)
    loss, state = model(x[:, :-1], x[:, 1:])
    assert abs(loss.item() - math.log(1000)) < 0.1 and state is None


# ------------------------------------------------------------------------------------------------------------
# The same numbers as independent implementations


def test_logits_equal_gpt2_of_transformers():
    ours = tiny(head_bias=False)
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=4, n_inner=48, activation_function="gelu",
        attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)).eval()
    t, names = theirs.transformer, {"mixer_norm": "ln_1", "ff_norm": "ln_2", "mixer.qkv": "attn.c_attn",
                                    "mixer.proj": "attn.c_proj", "ff.up": "mlp.c_fc", "ff.down": "mlp.c_proj"}
    weights = {"wte.weight": ours.embed.weight, "wpe.weight": ours.pos_embed.weight,
               "ln_f.weight": ours.final_norm.weight, "ln_f.bias": ours.final_norm.bias}
    for i, (a, b) in itertools.product(range(2), names.items()):
        layer = ours.trunk[i].get_submodule(a)
        matrix = isinstance(layer, nn.Linear)  # theirs is (in, out)
        weights[f"h.{i}.{b}.weight"] = layer.weight.T if matrix else layer.weight
        weights[f"h.{i}.{b}.bias"] = layer.bias
    t.load_state_dict(weights)
    x = tokens()
    torch.testing.assert_close(ours(x)[0], theirs(x).logits, atol=1e-5, rtol=1e-5)


def test_logits_equal_llama_of_transformers():
    ours = tiny(pos="rope", rope_theta=5000.0, norm="rmsnorm", activation="swiglu", bias=False,
                head_bias=False, n_kv_heads=2, tie_embeddings=False)
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0})).eval()
    weights = {"model.embed_tokens.weight": ours.embed.weight, "model.norm.weight": ours.final_norm.weight,
               "lm_head.weight": ours.head.weight}
    for i, block in enumerate(ours.trunk):
        q, k, v = block.mixer.qkv.weight.split([32, 16, 16])
        gate, up = block.ff.up.weight.chunk(2)
        weights |= {f"model.layers.{i}.{name}.weight": w for name, w in (
            ("self_attn.q_proj", q), ("self_attn.k_proj", k), ("self_attn.v_proj", v),
            ("self_attn.o_proj", block.mixer.proj.weight),
            ("mlp.gate_proj", gate), ("mlp.up_proj", up), ("mlp.down_proj", block.ff.down.weight),
            ("input_layernorm", block.mixer_norm.weight), ("post_attention_layernorm", block.ff_norm.weight))}
    theirs.load_state_dict(weights)
    x = tokens()
    torch.testing.assert_close(ours(x)[0], theirs(x).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", VARIANTS)
def test_flash_equals_written_out_attention(options):
    a, b = tiny(flash=True, **options), tiny(flash=False, **options)
    x, y = tokens(), tokens(seed=2)
    torch.testing.assert_close(a(x)[0], b(x)[0], atol=1e-5, rtol=1e-5)
    for model in (a, b):
        model(x, y)[0].backward()
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4,
                                   msg=lambda m, name=name: f"{name}: {m}")


def written_out(model: LM, tokens):
    """Logits (B, T, V) in plain formulas and float64: every head, query and key by itself."""
    cfg, w = model.cfg, {name: p.double() for name, p in model.state_dict().items()}
    D, G = cfg.head_size or cfg.d_model // cfg.n_heads, cfg.n_kv_heads or cfg.n_heads
    act = {"gelu": lambda h: h * (1 + torch.erf(h / math.sqrt(2))) / 2, "gelu_tanh": lambda h: h / 2 * (
        1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))}[cfg.activation]

    def affine(x, name):
        y = x @ w[name + ".weight"].T
        return y + w[name + ".bias"] if name + ".bias" in w else y

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True) if cfg.norm == "layernorm" else x
        y = x / (x.pow(2).mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * w[name + ".weight"]
        return y + w[name + ".bias"] if name + ".bias" in w else y

    def turn(x, position):  # (D,)
        R, x = int(D * cfg.rope_fraction), x.clone()
        for i in range(R // 2 if cfg.pos == "rope" else 0):
            z = torch.complex(x[i], x[i + R // 2]) * cmath.exp(1j * position * cfg.rope_theta ** (-2 * i / R))
            x[i], x[i + R // 2] = z.real, z.imag
        return x

    def mix(x, name):  # (T, C)
        q, k, v = affine(x, name + ".qkv").split([cfg.n_heads * D, G * D, G * D], dim=-1)
        heads = []
        for h in range(cfg.n_heads):
            g = h * G // cfg.n_heads  # the key/value head it shares
            qh, kh, vh = (m[:, i * D:(i + 1) * D] for m, i in ((q, h), (k, g), (v, g)))  # (T, D)
            if cfg.qk_norm_weights:
                qh, kh = norm(qh, name + ".q_norm"), norm(kh, name + ".k_norm")
            qh, kh = (torch.stack([turn(row, t) for t, row in enumerate(m)]) for m in (qh, kh))
            heads.append(torch.stack([(kh[:t + 1] @ qh[t] / math.sqrt(D)).softmax(0) @ vh[:t + 1]
                                      for t in range(len(x))]))
        return affine(torch.cat(heads, -1), name + ".proj")

    rows = []
    for row in tokens:
        x = w["embed.weight"][row]
        if cfg.pos == "learned":
            x = x + w["pos_embed.weight"][cfg.pos_offset:cfg.pos_offset + len(row)]
        for i in range(cfg.n_layers):
            name = f"trunk.{i}"
            mixed = x + mix(norm(x, name + ".mixer_norm"), name + ".mixer")
            inner = norm(x if cfg.parallel_residual else mixed, name + ".ff_norm")
            x = mixed + affine(act(affine(inner, name + ".ff.up")), name + ".ff.down")
        rows.append(affine(norm(x, "final_norm"), "head"))
    return torch.stack(rows)


@pytest.mark.parametrize("options", [
    {}, {"norm_eps": 0.3}, {"norm_eps": 0.3, "norm": "rmsnorm"}, {"activation": "gelu_tanh"},
    {"bias": False, "attn_bias": "qkv"}, {"bias": False, "attn_bias": "all"},
    {"pos": "rope", "rope_fraction": 0.5}, {"parallel_residual": True}, {"pos_offset": 3}, {"head_size": 12},
    {"head_size": 6, "n_kv_heads": 2, "pos": "rope"},
    {"qk_norm": True, "qk_norm_weights": True, "norm_eps": 0.1},
    {"qk_norm": True, "qk_norm_weights": True, "norm": "rmsnorm", "norm_eps": 0.1}])
def test_each_flag_of_the_pretrained_families_equals_plain_formulas(options):
    model, x = tiny(n_layers=2, **options), tokens(2, 9)
    expected = written_out(model, x)
    torch.testing.assert_close(model(x)[0].double(), expected, atol=1e-5, rtol=1e-5)
    plain = tiny(n_layers=2, flash=False, **options)
    torch.testing.assert_close(plain(x)[0].double(), expected, atol=1e-5, rtol=1e-5)
    state = model.init_state()
    parts = [model(part, state=state)[0] for part in x.split([4, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1).double(), expected, atol=1e-5, rtol=1e-5)
    cfg = TrainConfig(**TINY | options, optimizer="muon")  # every parameter is in a group and is trained
    model, before = tiny(**options), tiny(**options).state_dict()
    optimizer = make_optimizer(model, cfg)
    model(x, x)[0].backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_loss_ignores_masked_targets():
    model, x, y = tiny(), tokens(), tokens(seed=2)
    y[:, ::3] = -1
    logits = model(x)[0].double()
    picked = logits.log_softmax(-1).gather(2, y.clamp(min=0)[..., None])[..., 0]
    assert math.isclose(model(x, y)[0].item(), -picked[y >= 0].mean().item(), rel_tol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Time runs one way


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("flash", [True, False])
def test_nothing_attends_forward(options, flash):
    model = tiny(flash=flash, **options)
    inputs = []
    model.embed.register_forward_hook(lambda m, i, out: (inputs.append(out), out.retain_grad())[0])
    logits = model(tokens(1))[0]
    for t in (0, 7, 19):
        logits[0, t].sum().backward(retain_graph=True)
        reach = inputs[0].grad[0].abs().sum(-1) > 0
        assert reach[:t + 1].all() and not reach[t + 1:].any()
        inputs[0].grad = None


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("flash", [True, False])
def test_decoding_in_pieces_equals_one_pass(options, flash):
    model, x = tiny(flash=flash, **options), tokens(length=24)
    whole = model(x)[0]
    for pieces in ([1] * 24, [9, 1, 1, 13], [20, 4]):
        state = model.init_state()
        parts = [model(part, state=state)[0] for part in x.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-4)
        assert state.length == 24


def test_cache_keeps_what_it_was_given():
    cache, given = KVCache(), torch.randn(2, 3, 300, 4)
    for start, stop in ((0, 5), (5, 6), (6, 130), (130, 131), (131, 300)):
        k, v = cache.append(given[:, :, start:stop], -given[:, :, start:stop])
        assert torch.equal(k, given[:, :, :stop]) and torch.equal(v, -given[:, :, :stop])


def test_rope_depends_on_relative_positions_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(m, n):
        (cm, sm), (cn, sn) = (rope_angles(torch.tensor([p]), 16, 10000.0) for p in (m, n))
        return (rotate(q, cm, sm) * rotate(k, cn, sn)).sum().item()

    assert abs(score(5, 2) - score(1005, 1002)) < 1e-3 < abs(score(5, 2) - score(5, 3))
    model, x = tiny(pos="rope"), tokens()
    shifted = model.init_state()
    shifted.length = 1000  # the same tokens, a thousand positions later
    torch.testing.assert_close(model(x, state=shifted)[0], model(x)[0], atol=2e-4, rtol=1e-3)


def test_learned_positions_end_and_say_so():
    with pytest.raises(ValueError, match="25 tokens, but learned positions end at max_seq_len=24"):
        tiny()(tokens(length=25))
    assert tiny(pos="rope")(tokens(length=25))[0].shape == (2, 25, 61)


# ------------------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("options", VARIANTS)
def test_cached_and_uncached_generation_agree(options):
    model, prompt = tiny(**options), tokens(3, 5)
    for temperature in (0.0, 1.0):
        runs = [torch.cat(list(model.generate(prompt, 18, temperature, use_cache=cached,
                                              generator=torch.Generator().manual_seed(3))), 1)
                for cached in (True, False)]
        assert torch.equal(*runs) and runs[0].shape == (3, 18)
    x = prompt
    for _ in range(18):  # greedy, by hand
        x = torch.cat((x, model(x)[0][:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(torch.cat(list(model.generate(prompt, 18, temperature=0)), 1), x[:, 5:])


def test_generation_goes_on_past_learned_positions():
    model = tiny(max_seq_len=8)
    with pytest.warns(UserWarning, match="past max_seq_len=8: continuing from the last 4 tokens"):
        cached = torch.cat(list(model.generate(tokens(2, 3), 20, temperature=0)), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = torch.cat(list(model.generate(tokens(2, 3), 20, temperature=0, use_cache=False)), 1)
    assert cached.shape == (2, 20) and torch.equal(cached, plain)


def test_generation_stops_at_stop_tokens():
    model, prompt = tiny(), tokens(2, 4)
    free = torch.cat(list(model.generate(prompt, 15, temperature=0)), 1)
    stop = int(free[0, 3])
    stopped = torch.cat(list(model.generate(prompt, 15, temperature=0, stop_tokens=[stop])), 1)
    for row, full in zip(stopped.tolist(), free.tolist(), strict=True):
        end = full.index(stop) + 1 if stop in full[:len(row)] else len(row)
        assert row[:end] == full[:end] and all(t == stop for t in row[end:])
    alone = list(model.generate(prompt[:1], 15, temperature=0, stop_tokens=[stop]))
    assert len(alone) == free[0].tolist().index(stop) + 1


def test_padded_vocabulary_is_never_sampled():
    model = tiny(n_tokens=50)
    model.head.bias.data[50:] = 100.0  # the model would love to
    out = torch.cat(list(model.generate(tokens(8, 3, 50), 12, temperature=2.0)), 1)
    assert out.max() < 50


def test_sampling_filters_equal_those_of_transformers():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 40, generator=g) / 2.5  # flat enough that 4,000 draws visit all that is allowed
    context = torch.randint(40, (6, 9), generator=g)

    def support(**options):  # the tokens that 4,000 draws per row can reach, as a mask
        drawn = torch.cat([sample_token(logits, context, generator=g, **options) for _ in range(4000)], 1)
        return torch.zeros_like(logits, dtype=torch.bool).scatter(1, drawn, True)

    assert torch.equal(support(top_k=5), TopKLogitsWarper(5)(context, logits).isfinite())
    assert torch.equal(support(top_p=0.6), TopPLogitsWarper(0.6)(context, logits).isfinite())
    penalised = RepetitionPenaltyLogitsProcessor(1.7)(context, logits)
    greedy = sample_token(logits, context, temperature=0, repetition_penalty=1.7)
    assert torch.equal(greedy[:, 0], penalised.argmax(-1))
    draws = torch.cat([sample_token(logits, context, 0.7, repetition_penalty=1.7, generator=g)
                       for _ in range(4000)], 1)
    observed = F.one_hot(draws, 40).float().mean(1)
    expected = (penalised / 0.7).softmax(-1)
    assert (observed - expected).abs().max() < 5 * math.sqrt(0.25 / 4000)


# ------------------------------------------------------------------------------------------------------------
# Learning, and refusing


@pytest.mark.parametrize("options", VARIANTS)
def test_one_repeated_batch_is_learned_by_heart(options):
    torch.manual_seed(0)
    model = LM(ModelConfig(vocab_size=61, max_seq_len=24, d_model=32, n_layers=2, n_heads=4, **options))
    x = tokens(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss, _ = model(x[:, :-1], x[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02


@pytest.mark.parametrize("options, message", [
    ({"n_heads": 5, "d_model": 32}, "n_heads=5 does not divide d_model=32; n_heads=4 does"),
    ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads=3 does not divide n_heads=4"),
    ({"pos": "rope", "d_model": 12, "n_heads": 4}, "head size d_model/n_heads=3 is odd"),
    ({"pos": "none", "rope_theta": 5.0}, "rope_theta=5.0 is set, but pos=none"),
    ({"dropout": 1.0}, "dropout must be in"),
    ({"attn_bias": "qkv"}, "attn_bias=qkv is set, but bias=True"),
    ({"attn_bias": "all", "bias": False, "qkv_share": 2}, "attn_bias=all is set, but with qkv_share"),
    ({"qk_norm_weights": True}, "qk_norm_weights is set, but qk_norm=False"),
    ({"norm_eps": 0.0}, "norm_eps must be in"),
    ({"rope_fraction": 0.5}, "rope_fraction=0.5 is set, but pos=learned"),
    ({"pos": "rope", "rope_fraction": 1.5}, "rope_fraction must be in"),
    ({"pos": "rope", "rope_fraction": 0.1}, "the part rope_fraction=0.1 of the head size .*=32 is 3"),
    ({"pos": "rope", "pos_offset": 2}, "pos_offset=2 is set, but pos=rope"),
    ({"mixer": "lstm", "pos": "none", "head_size": 8}, "mixer=lstm needs --head_size=0"),
    ({"activation": "swigul"}, "expected one of gelu, relu, relu2, gelu_tanh, swiglu.*did you mean 'swiglu'"),
    ({"n_layers": 0}, "n_layers must be at least 1"),
    ({"vocab_size": 10, "n_tokens": 11}, "n_tokens=11 is more than vocab_size=10"),
])
def test_contradictions_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**options)


@pytest.mark.parametrize("option", ["activation", "mixer", "norm", "pos", "schedule", "optimizer"])
def test_a_value_that_nobody_handles_raises(option):
    """As after adding one to its Literal alone: nothing falls through to the last branch."""
    cfg = TrainConfig(vocab_size=9, d_model=8, n_heads=2)
    object.__setattr__(cfg, option, "another")
    with pytest.raises((KeyError, NotImplementedError), match="another"):
        make_optimizer(LM(cfg), cfg)
        lr_fraction(0, cfg, 10)


def test_learning_rate_schedules():
    def cfg(**options):
        return TrainConfig(lr=1.0, min_lr_ratio=0.1, **options)

    constant = cfg(schedule="constant", warmup_steps=4)
    assert [lr_fraction(s, constant, 10) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [round(lr_fraction(s, cfg(schedule="linear"), 4), 6) for s in range(4)] == [1, 0.775, 0.55, 0.325]
    # torch's own cosine, started after the warm-up
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=0.1)
    for s in range(10, 100):
        ours = lr_fraction(s, cfg(schedule="cosine", warmup_steps=10), 100)
        assert math.isclose(ours, optimizer.param_groups[0]["lr"], rel_tol=1e-6)
        optimizer.step()
        scheduler.step()
    wsd = [lr_fraction(s, cfg(schedule="wsd", decay_fraction=0.25), 100) for s in range(100)]
    assert wsd[:76] == [1.0] * 76 and math.isclose(wsd[88], 0.1 + 0.9 * 12 / 25) and wsd[99] < 0.14
