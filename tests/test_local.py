"""Local attention against the dense mask, and the caches of local layers."""
import math

import model as model_module
from common.attention import fast_attention, flex_mask
from common.config import ConfigError
from common.generation import KVCache
from model import ModelConfig, attention
from tests.test_model import tiny, tokens

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

VARIANTS = [{"pos": "rope", "n_kv_heads": 2, "qk_norm": True}, {"pos": "none", "norm": "rmsnorm"},
            {"pos": "learned", "global_every": 2}]


def dense(q, k, v, window):
    """Attention by definition, one query at a time. q (B, H, T, D), k and v (B, G, S, D)."""
    T, S = q.size(2), k.size(2)
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    rows = []
    for t in range(T):
        here = S - T + t
        seen = slice(max(0, here - window + 1), here + 1)
        scores = q[:, :, t:t + 1] @ k[:, :, seen].transpose(2, 3) / math.sqrt(q.size(3))
        rows.append(scores.softmax(-1) @ v[:, :, seen])
    return torch.cat(rows, 2)


def attend(q, k, v, window, dropout, flash):
    return (fast_attention if flash else attention)(q, k, v, window, None, dropout, None)


def random_qkv(T, S, B=2, H=4, D=8):
    g = torch.Generator().manual_seed(T * 1000 + S)
    return [torch.randn(B, H, n, D, generator=g, requires_grad=True) for n in (T, S, S)]


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("window, T, S", [
    (5, 20, 20), (64, 65, 65), (64, 128, 128), (64, 300, 300), (100, 333, 333), (160, 400, 400), (1, 7, 7),
    (64, 30, 93), (64, 200, 263), (5, 2, 6)])
def test_blocks_equal_the_dense_mask(flash, window, T, S):
    ours, theirs = random_qkv(T, S), random_qkv(T, S)
    got = attend(*ours, window, 0.0, flash)
    expected = dense(*theirs, window)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(0))
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_mask_is_the_same_mask():
    q, k, v = (x.detach() for x in random_qkv(200, 200, D=16))
    got = flex_attention(q, k, v, block_mask=flex_mask(200, 37, q.device))
    torch.testing.assert_close(got, dense(q, k, v, 37), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("flash", [True, False])
def test_dropout_drops_weights_and_keeps_the_mean(flash):
    q, k, v = random_qkv(150, 150, B=1)
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([attend(q, k, v, 64, 0.5, flash) for _ in range(400)])
        expected = dense(q, k, v, 64)
    error = draws.std(0) / math.sqrt(400)
    assert (error > 0).all()
    assert (((draws.mean(0) - expected) / error).abs() < 5).float().mean() > 0.999


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("flash", [True, False])
def test_a_model_with_windows_equals_one_with_dense_masks(options, flash, monkeypatch):
    """Values and gradients of the whole model, and who can see whom."""
    options = options | {"window": 5, "max_seq_len": 90, "flash": flash, "n_layers": 2}
    ours, theirs = tiny(**options), tiny(**options)
    x, y = tokens(2, 90), tokens(2, 90, seed=2)
    ours_loss, _ = ours(x, y)
    ours_loss.backward()
    with monkeypatch.context() as m:
        for name in ("attention", "fast_attention"):
            m.setattr(model_module, name, lambda q, k, v, window, *_: dense(q, k, v, window or 90))
        theirs_loss, _ = theirs(x, y)
        theirs_loss.backward()
    torch.testing.assert_close(ours_loss, theirs_loss)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    inputs = []
    ours.embed.register_forward_hook(lambda m, i, out: (inputs.append(out), out.retain_grad())[0])
    ours(x[:1])[0][0, 80].sum().backward()
    reach = (inputs[0].grad[0].abs().sum(-1) > 0).nonzero().flatten().tolist()
    first = 0 if "global_every" in options else 80 - 2 * 4  # two layers, each four tokens back
    assert reach == list(range(first, 81))


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("window", [1, 3, 8])
def test_decoding_in_pieces_equals_one_pass(options, flash, window):
    model, x = tiny(**options, flash=flash, window=window, max_seq_len=90), tokens(2, 90)
    with torch.no_grad():
        whole = model(x)[0]
        for pieces in ([1] * 90, [40, 1, 1, 30, 2, 3, 13], [2] * 45, [7, 83], [1, 89], [90]):
            state = model.init_state()
            parts = [model(part, state=state)[0] for part in x.split(pieces, dim=1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_a_local_cache_gives_what_is_in_reach_and_stays_small(window):
    given, generator = torch.randn(1, 2, 2000, 4), torch.Generator().manual_seed(window)
    cache, start = KVCache(window), 0
    while start < 2000:
        longest = 3 if torch.rand((), generator=generator) < 0.9 else 150
        stop = min(2000, start + int(torch.randint(1, longest + 1, (), generator=generator)))
        k, v = cache.append(given[:, :, start:stop], -given[:, :, start:stop])
        seen = given[:, :, max(0, start - window + 1):stop]
        assert torch.equal(k, seen) and torch.equal(v, -seen)
        held = cache.k.untyped_storage().nbytes() // (2 * 4 * 4)
        assert held == cache.v.untyped_storage().nbytes() // (2 * 4 * 4) <= max(64, 4 * window)
        start = stop


def test_appending_is_amortised():
    """Each new buffer is paid for by the tokens that came since the last."""
    for window in (0, 50):
        cache, moves, last = KVCache(window), 0, None
        for _ in range(4000):
            cache.append(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
            moves += cache.k is not last
            last = cache.k
        assert moves <= (4000 / 50 + 1 if window else 8)


@pytest.mark.parametrize("length", [1, 4, 9, 30])
@pytest.mark.parametrize("options", VARIANTS + [{"pos": "rope", "window": 0}])
def test_a_fixed_state_goes_on_as_the_growing_one(options, length):
    model, x = tiny(**{"window": 7, "max_seq_len": 48} | options), tokens(2, 48)
    with torch.no_grad():
        whole, state = model(x)[0], model.init_state()
        model(x[:, :length], state=state)
        state.fix(48, x.device)
        shapes = [layer.k.shape for layer in state.layers]
        for t in range(length, 48):
            logits, _ = model(x[:, t:t + 1], state=state)
            torch.testing.assert_close(logits[:, 0], whole[:, t], atol=2e-5, rtol=1e-4)
        assert state.length.tolist() == [48] and shapes == [layer.k.shape for layer in state.layers]
        assert all(s[2] == (layer.window or 48) for s, layer in zip(shapes, state.layers, strict=True))


def test_memory_of_training_is_linear_in_length():
    """What autograd keeps doubles with T, and no tensor made on the way grows with T squared."""
    kept, biggest = {}, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            biggest.extend(o.numel() for o in (out if isinstance(out, (tuple, list)) else [out])
                           if isinstance(o, torch.Tensor))
            return out

    for dropout in (0.0, 0.1):
        for T in (2048, 4096):
            q, k, v = (torch.randn(1, 4, T, 8, requires_grad=True) for _ in range(3))
            sizes = []
            hooks = (lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x)
            with torch.autograd.graph.saved_tensors_hooks(*hooks):
                y = attend(q, k, v, 64, dropout, flash=True)
            kept[T] = sum(sizes)
            with Watch():
                y.sum().backward()
                attend(q, k, v, 64, dropout, flash=True)
        assert 4 * 2048 * 64 < kept[2048] and kept[4096] < 2.02 * kept[2048]
    assert max(biggest) <= 4 * 4096 * 3 * 64  # H T T would be 64 million


def test_flops_count_what_is_seen():
    base, local = tiny(max_seq_len=64), tiny(window=16, global_every=2, max_seq_len=64)
    assert base.flops_per_token(64) - local.flops_per_token(64) == 12 * 32 * (64 - 16)
    assert base.flops_per_token(16) == local.flops_per_token(16)


@pytest.mark.parametrize("options, message", [
    ({"global_every": 2}, "global_every=2 is set, but window=0 makes every layer global"),
    ({"window": -1}, "window must not be negative, got -1"),
    ({"window": 4, "global_every": -2}, "global_every must not be negative, got -2")])
def test_contradictions_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**options)


def test_every_nth_layer_is_global():
    model = tiny(window=4, global_every=3, n_layers=7)
    assert [b.mixer.window for b in model.trunk] == [4, 4, 0, 4, 4, 0, 4]
    x = tokens(1, 20)
    assert not torch.allclose(model(x)[0], tiny(n_layers=7)(x)[0])
    torch.testing.assert_close(model(x[:, :4])[0], tiny(n_layers=7)(x[:, :4])[0])  # nothing is out of reach
