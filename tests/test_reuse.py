"""The flags of small models - sinks, scales, recycled blocks, low rank, shared QKV, experts, factorised
embeddings - alone and together, against a slow model written out here from the same parameters."""
import math

import train
from common import distributed
from common.config import ConfigError
from common.evaluate import expert_usage
from common.fit import Needs, kept_by_autograd
from model import LM, Experts, ModelConfig, load_model
from tests.test_generate import joined
from tests.test_model import TINY, tiny, tokens
from tests.test_train import assert_close_run, assert_same_run, final, signal_at, torchrun

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

COMBINED = {"n_layers": 6, "n_unique_blocks": 2, "adapter_rank": 3, "proj_rank": 5, "qkv_share": 2,
            "n_experts": 3, "expert_balance": 0.5, "embed_rank": 6, "attn_scale": True, "attn_sink": True,
            "zero_init": True, "pos": "rope", "qk_norm": True, "n_kv_heads": 2, "activation": "swiglu",
            "window": 5, "global_every": 2}
VARIANTS = {
    "scale": {"attn_scale": True},
    "sink": {"attn_sink": True, "n_kv_heads": 2},
    "sink_local": {"attn_sink": True, "window": 4, "pos": "rope"},
    "zero_init": {"zero_init": True},
    "recycled": {"n_layers": 5, "n_unique_blocks": 2, "window": 4, "global_every": 2},
    "adapters": {"n_layers": 3, "adapter_rank": 3},
    "low_rank": {"proj_rank": 5, "activation": "swiglu"},
    "qkv_share": {"n_layers": 4, "qkv_share": 2, "n_kv_heads": 2},
    "qkv_share_without_biases": {"n_layers": 4, "n_unique_blocks": 2, "qkv_share": 1, "bias": False},
    "experts": {"n_experts": 4, "expert_balance": 0.5},
    "embed_rank": {"embed_rank": 6},
    "embed_rank_untied": {"embed_rank": 6, "tie_embeddings": False, "pos": "rope"},
    "combined": COMBINED,
    "combined_otherwise": COMBINED | {"pos": "learned", "tie_embeddings": False, "activation": "relu2",
                                      "bias": False, "norm": "rmsnorm", "window": 0, "global_every": 0},
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


# ------------------------------------------------------------------------------------------------------------
# The slow model


def slow(model: LM, x, y):
    """(logits, loss in training mode, tokens per layer and expert), by loops over sequences, queries, heads
    and tokens."""
    c, P = model.cfg, dict(model.named_parameters())  # each parameter once, by its first name
    unique, D, G = c.n_unique_blocks or c.n_layers, c.d_model // c.n_heads, c.n_kv_heads or c.n_heads

    def whole(name):
        return P[f"{name}.weight"] if f"{name}.weight" in P else P[f"{name}.b.weight"] @ P[f"{name}.a.weight"]

    def shift(name):
        return P.get(f"{name}.bias", P.get(f"{name}.b.bias"))

    def norm(h, name):
        if c.norm == "rmsnorm":
            return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * P[f"{name}.weight"]
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return h * P[f"{name}.weight"] + P.get(f"{name}.bias", 0)

    def unit(h):
        eps = torch.finfo(h.dtype).eps if c.norm == "rmsnorm" else 1e-5
        h = h if c.norm == "rmsnorm" else h - h.mean()
        return h / (h.square().mean() + eps).sqrt()

    def turn(h, t):
        angle = t * c.rope_theta ** (-torch.arange(0, D, 2) / D)
        a, b = h[:D // 2], h[D // 2:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))

    def feed_forward(h, up, up_bias, down, down_bias):
        h = F.linear(h, up, up_bias)
        if c.activation == "swiglu":
            gate, h = h.chunk(2)
            h = F.silu(gate) * h
        else:
            h = F.relu(h).square() if c.activation == "relu2" else F.gelu(h)
        return F.linear(h, down, down_bias)

    table = P["embed.weight"] @ P["embed_up.weight"].T if c.embed_rank else P["embed.weight"]
    head = table if c.tie_embeddings else P["head.weight"]
    if c.embed_rank and not c.tie_embeddings:
        head = head @ P["head_in.weight"]
    used, balances, logits = torch.zeros(c.n_layers, c.n_experts), [], []
    for row in x:
        h = table[row] + (P["pos_embed.weight"][:len(row)] if c.pos == "learned" else 0)
        for i in range(c.n_layers):
            own, at, before = f"trunk.{i}", f"trunk.{i % unique}", h
            sees_all = not c.window or c.global_every and (i + 1) % c.global_every == 0
            window = len(row) if sees_all else c.window
            u = norm(h, f"{at}.mixer_norm")
            if c.qkv_share:
                first = i % unique - i % unique % c.qkv_share
                qkv = u @ whole(f"trunk.{first}.mixer.qkv").T
                qkv = qkv * P[f"{own}.mixer.qkv_scale"] + P[f"{own}.mixer.qkv_bias"]
            else:
                qkv = F.linear(u, whole(f"{at}.mixer.qkv"), shift(f"{at}.mixer.qkv"))
            q, k, v = (z.unflatten(1, (-1, D)) for z in qkv.split([c.d_model, G * D, G * D], 1))  # (T, H, D)
            out = []
            for t in range(len(row)):
                seen = range(max(0, t - window + 1), t + 1)
                for n in range(c.n_heads):
                    query, keys = q[t, n], [k[s, n * G // c.n_heads] for s in seen]
                    if c.qk_norm:
                        query, keys = unit(query), [unit(key) for key in keys]
                    if c.pos == "rope":
                        query = turn(query, t)
                        keys = [turn(key, s) for key, s in zip(keys, seen, strict=True)]
                    if c.attn_scale:
                        query = query * P[f"{at}.mixer.scale"][n]
                    weights = (torch.stack(keys) @ query / math.sqrt(D)).exp()
                    total = weights.sum() + (P[f"{at}.mixer.sink"][n].exp() if c.attn_sink else 0)
                    out.append(weights / total @ v[seen.start:seen.stop, n * G // c.n_heads])
            out = torch.stack(out).view(len(row), c.d_model)
            h = h + F.linear(out, whole(f"{at}.mixer.proj"), shift(f"{at}.mixer.proj"))
            u, fed, shares, probs = norm(h, f"{at}.ff_norm"), [], torch.zeros(c.n_experts), []
            for token in u:
                where = "trunk.0.ff.pool" if c.n_experts else f"{at}.ff"
                parts = [whole(f"{where}.up"), shift(f"{where}.up"), whole(f"{where}.down"),
                         shift(f"{where}.down")]
                p = 1
                if c.n_experts:
                    probs.append((P[f"{own}.ff.router.weight"] @ token).softmax(0))
                    e = int(probs[-1].argmax())
                    p, parts = probs[-1][e], [part if part is None else part[e] for part in parts]
                    shares[e] += 1 / len(row)
                    used[i, e] += 1
                fed.append(p * feed_forward(token, *parts))
            h = h + torch.stack(fed)
            if c.adapter_rank:
                h = h + 0.1 * before @ whole(f"{own}.adapter").T
            if c.n_experts:
                balances.append(c.n_experts * (shares * torch.stack(probs).mean(0)).sum())
        logits.append(F.linear(norm(h, "final_norm"), head, P.get("head.bias")))
    logits = torch.stack(logits)
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    return logits, loss + (c.expert_balance * torch.stack(balances).mean() if c.n_experts else 0), used


@every_variant
@pytest.mark.parametrize("flash", [True, False])
def test_logits_and_gradients_equal_the_slow_model(options, flash):
    model, x, y = tiny(flash=flash, **options), tokens(2, 12), tokens(2, 12, seed=2)
    logits, loss, used = slow(model, x, y)
    with expert_usage(model) as usage:
        torch.testing.assert_close(model(x)[0], logits, atol=2e-5, rtol=1e-4)
    assert torch.equal(usage, used.long()) if model.cfg.n_experts else not usage.numel()
    if model.cfg.n_experts:
        assert model(x, y)[0] < model.train()(x, y)[0]  # the loss for balance is in training only
    ours = model.train()(x, y)[0]
    torch.testing.assert_close(ours, loss)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = [torch.autograd.grad(value, parameters) for value in (ours, loss)]
    model.trunk.checkpoint_activations = True
    grads.append(torch.autograd.grad(model(x, y)[0], parameters))
    for name, a, b, again in zip(names, *grads, strict=True):
        assert torch.equal(a, again), name
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------------------------------------------
# Decoding


@every_variant
@pytest.mark.parametrize("flash", [True, False])
@torch.no_grad()
def test_decoding_equals_one_pass(options, flash):
    model, x = tiny(flash=flash, **options), tokens(length=24)
    whole = model(x)[0]
    for pieces in ([1] * 24, [9, 1, 1, 13]):
        state = model.init_state()
        parts = [model(part, state=state)[0] for part in x.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)
    state = model.init_state()
    model(x[:, :10], state=state)
    state.fix(24, x.device)
    for t in range(10, 24):
        logits, _ = model(x[:, t:t + 1], state=state)
        torch.testing.assert_close(logits[:, 0], whole[:, t], atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_compiled_step_makes_the_same_tokens():
    model, prompt = tiny(**COMBINED | {"n_layers": 1, "n_unique_blocks": 1, "qkv_share": 1}), tokens(2, 4)
    expected = joined(model, prompt, 18, temperature=0)
    assert torch.equal(joined(model, prompt, 18, temperature=0, compile=True), expected)


# ------------------------------------------------------------------------------------------------------------
# Parameters


@every_variant
def test_initialisation(options):
    torch.manual_seed(0)
    model = LM(ModelConfig(**{"vocab_size": 600, "d_model": 128, "n_layers": 4, "n_heads": 4} | options))
    cfg = model.cfg
    for name, p in model.named_parameters():
        std, rank = 0.02, 0
        if ".a." in name:
            rank = p.shape[-2]
        elif ".b." in name:
            rank = p.shape[-1]
        elif "embed" in name and "pos" not in name or "head" in name:
            rank = cfg.embed_rank
        if "proj" in name or "down" in name or "adapter" in name:
            std /= math.sqrt(2 * cfg.n_layers)
            if ".a." not in name and (cfg.zero_init or "adapter" in name):
                std = 0
        if name.endswith(("bias", "sink")):
            assert not p.any(), name
        elif name.endswith(("norm.weight", "scale")):
            assert (p == 1).all(), name
        else:
            std = std and (math.sqrt(std / math.sqrt(rank)) if rank else std)
            assert abs(p.std() - std) <= 0.1 * std, name
    if cfg.proj_rank:
        product = model.trunk[0].mixer.qkv.b.weight @ model.trunk[0].mixer.qkv.a.weight
        assert abs(product.std() / 0.02 - 1) < 0.25  # few ranks make few independent numbers


COUNTS = {  # V 61, C 32, F 48, L 2, biases; outside the tables (total), in products (matmul)
    "scale": (2 * 4, 0),
    "sink": (2 * 4 - 2 * (32 + 1) * 32, -2 * 32 * 32),
    "zero_init": (0, 0),
    "recycled": (0, 3 * (4 * 32 * 32 + 2 * 32 * 48)),
    "adapters": (3 * 2 * 32 * 3 + (4 * 32 * 33 + 2 * 32 * 48 + 48 + 32 + 4 * 32), 3 * 2 * 32 * 3
                 + 4 * 32 * 32 + 2 * 32 * 48),
    "experts": (3 * (2 * 32 * 48 + 48 + 32) - (2 * 32 * 48 + 48 + 32) + 2 * 32 * 4, 2 * 32 * 4),
    "embed_rank": (6 * 32, 2 * 6 * 32 + 61 * (6 - 32)),
    "embed_rank_untied": (2 * 6 * 32, 2 * 6 * 32 + 61 * (6 - 32)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_differ_from_the_plain_model_as_computed(name):
    with torch.device("meta"):
        plain, model = tiny(), tiny(**VARIANTS[name])
    a, b = plain.count_parameters(), model.count_parameters()
    assert (b["non_embedding"] - a["non_embedding"], b["matmul"] - a["matmul"]) == COUNTS[name]
    tables = 61 * (model.cfg.embed_rank or 32) * (1 if model.cfg.tie_embeddings else 2)
    tables += 24 * 32 * (model.cfg.pos == "learned")
    assert b["total"] - b["non_embedding"] == tables
    seen = sum(min(block.mixer.window or 24, 24) for block in model.trunk)
    assert model.flops_per_token(24) == 6 * b["matmul"] + 12 * 32 * seen


def test_counts_of_the_combined_model():
    C, D, H, G, L, r, E, ff, V = 32, 8, 4, 2, 6, 5, 3, 48, 61
    qkv, proj = r * (C + C + 2 * G * D), r * 2 * C
    expert = r * (C + 2 * ff) + r * (ff + C)
    layer = 2 * (C + 2 * G * D) + C * E + 2 * 3 * C  # QKV's scale and bias, router, adapter
    block = proj + C + 2 * H + 4 * C  # its bias, scales and sinks, two norms
    got = tiny(**COMBINED).count_parameters()
    outside = qkv + 2 * block + L * layer + E * (expert + 2 * ff + C) + 2 * C + V + 6 * C
    assert got == {"non_embedding": outside, "total": outside + 6 * V,
                   "matmul": L * (qkv + proj + expert + C * E + 6 * C) + 2 * 6 * C + 6 * V}


@pytest.mark.parametrize("options, message", [
    ({"n_unique_blocks": 5}, "n_unique_blocks=5 is more than n_layers=4"),
    ({"n_unique_blocks": -1}, "n_unique_blocks must not be negative"),
    ({"n_unique_blocks": 3, "qkv_share": 2}, "qkv_share=2 does not divide the 3 blocks"),
    ({"proj_rank": 64}, "proj_rank=64 saves nothing on a matrix of 128 x 128; use at most 63"),
    ({"proj_rank": 30, "d_ff": 32}, "proj_rank=30 saves nothing on a matrix of 128 x 32; use at most 25"),
    ({"adapter_rank": 70}, "adapter_rank=70 saves nothing"),
    ({"embed_rank": 120, "vocab_size": 1000}, "embed_rank=120 saves nothing on a matrix of 1000 x 128"),
    ({"n_experts": 1}, "n_experts=1 leaves nothing to choose"),
    ({"expert_balance": 0.1}, "expert_balance=0.1 is set, but n_experts=0"),
    ({"expert_balance": -1.0, "n_experts": 2}, "expert_balance must not be negative"),
])
def test_contradictions_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**options)


# ------------------------------------------------------------------------------------------------------------
# Training


def test_every_parameter_has_a_gradient_when_one_expert_takes_all():
    model = tiny(**COMBINED | {"proj_rank": 0}).train()
    for block in model.trunk:
        block.ff.router.weight.data[1:] = block.ff.router.weight.data[:1]  # equal: the first is taken
    x, y = tokens(), tokens(seed=2)
    model(x, y)[0].backward()
    assert all(p.grad is not None for p in model.parameters())
    grad = model.trunk[0].ff.pool.up.weight.grad
    assert grad[0].any() and not grad[1:].any()


def test_balance_is_one_where_loads_are_even_and_lowers_uneven_ones():
    layer = Experts(ModelConfig(d_model=16, n_experts=4, n_heads=1))
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.1)
    layer.router.weight.data = torch.eye(4, 16) * 5
    x = torch.eye(16)[None, :4].repeat(2, 3, 1)  # each expert's favourite, three times
    torch.testing.assert_close(4 * layer(x)[1], torch.ones(2))
    uneven = x[:, torch.tensor([0, 0, 0, 0, 0, 0, 1, 2])]
    before = 4 * layer(uneven)[1].mean()
    before.backward()
    layer.router.weight.data -= 0.1 * layer.router.weight.grad
    assert 4 * layer(uneven)[1].mean() < before > 1
    # a sequence counts by itself, with whatever others it is run
    parts = [layer(torch.cat((x, uneven), 1)[i:i + 1])[1] for i in range(2)]
    torch.testing.assert_close(layer(torch.cat((x, uneven), 1))[1], torch.cat(parts))


@every_variant
def test_bf16_is_finite_and_near_fp32(options):
    model, x, y = tiny(**options).train(), tokens(), tokens(seed=2)
    exact = model(x, y)[0]
    exact_grads = torch.autograd.grad(exact, tuple(model.parameters()))
    with distributed.autocast("bf16", x.device):
        loss = model(x, y)[0]
    grads = torch.autograd.grad(loss, tuple(model.parameters()))
    assert abs(loss - exact) < 0.02 * exact
    assert all(torch.isfinite(g).all() for g in grads)
    a, b = (torch.cat([g.flatten() for g in gs]) for gs in (grads, exact_grads))
    assert F.cosine_similarity(a, b, dim=0) > 0.98


def test_memory_is_predicted_for_even_loads(small):
    def kept(**options):
        with FakeTensorMode():
            return kept_by_autograd(LM(ModelConfig(**TINY | options)), 4, 24, "fp32")

    plain, experts = kept(), kept(n_experts=4)
    assert plain < experts < 1.5 * plain  # also probabilities and the sorted rows; not four times
    assert kept(**COMBINED) > 0
    sizes = [Needs(LM, cfg, "fp32", torch.device("cpu")).head
             for cfg in (small(vocab_size=300), small(vocab_size=300, embed_rank=8))]
    assert sizes[0] == 4 * sizes[1]


def test_a_stopped_run_and_two_processes_give_the_same_run(small, monkeypatch, capsys):
    """And its checkpoint is the model, each shared tensor once."""
    options = COMBINED | {"n_layers": 4, "d_ff": 48, "n_heads": 4, "dropout": 0.1, "micro_batch_size": 2}
    whole, parts, two = (small(name=n, **options) for n in ("whole", "parts", "two"))
    train.main(whole)
    assert "layer 4: tokens per expert" in capsys.readouterr().out
    signal_at(monkeypatch, 6)
    assert train.main(parts)["status"] == "stopped"
    monkeypatch.undo()
    train.main(parts)
    assert_same_run(whole, parts)
    torchrun(two, 2)
    assert_close_run(whole, two)
    usage, both = (final(cfg)["progress"]["best"]["expert_usage"] for cfg in (whole, two))
    torch.testing.assert_close(torch.tensor(usage), torch.tensor(both), atol=1e-3, rtol=0)
    assert len(usage) == 4 and all(math.isclose(sum(shares), 1, rel_tol=1e-6) for shares in usage)
    folder, saved = f"{whole.out_dir}/whole", final(whole, "best.pt")["model"]
    model, half = load_model(folder)[0], load_model(folder, dtype="bf16")[0]
    assert sum(v.numel() for v in {v.data_ptr(): v for v in saved.values()}.values()) \
        == sum(p.numel() for p in half.parameters()) == model.count_parameters()["total"]
    assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters())
    logits = half(tokens(1, 24))[0]
    assert logits.dtype == torch.bfloat16 and F.cosine_similarity(
        logits.float().flatten(), model(tokens(1, 24))[0].flatten(), dim=0) > 0.98
