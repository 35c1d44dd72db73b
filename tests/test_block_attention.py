"""block_attention.py against attention with a dense mask, and the statistics of its dropout."""
import itertools
import math

from common import block_attention as module
from common.block_attention import block_attention, random_keep
from tests.test_head_loss import Made

import pytest
import torch


def dense(q, k, v, window, keep=None, sink=None):
    """By definition, with all (T, S) weights, optionally times `keep` (B, H, T, S). window 0: all before.
    exp(sink) (H,) is one more term of the sum that the weights are divided by."""
    T, S = q.size(2), k.size(2)
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))  # (B, H, S, D)
    query, key = torch.arange(S - T, S)[:, None], torch.arange(S)
    hidden = (key > query) | (key <= query - (window or S))  # (T, S)
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.size(3))).masked_fill(hidden, -math.inf)
    if sink is not None:
        scores = torch.cat((scores, sink[:, None, None].expand(*scores.shape[:3], 1).to(scores)), 3)
    weights = scores.softmax(-1)[..., :S]  # (B, H, T, S)
    return (weights if keep is None else weights * keep) @ v


def random_qkv(T, S, H=4, G=4, B=2, D=8, dtype=torch.float32):
    """Laid out as the model's are: heads beside each other for each token."""
    g = torch.Generator().manual_seed(T * 1000 + S)
    return [torch.randn(B, n, heads, D, generator=g).to(dtype).transpose(1, 2).requires_grad_()
            for n, heads in ((T, H), (S, G), (S, G))]


def random_sink(H=4):
    return torch.linspace(-1, 2, H).requires_grad_()


def run(attention, qkv, *rest, **options):
    """[y, dq, dk, dv and, with one, dsink] for one random gradient of y."""
    y = attention(*qkv, *rest, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    inputs = [*qkv, options["sink"]] if options.get("sink") is not None else qkv
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def assert_close(got, expected, **tolerance):
    for name, a, b in zip("y q k v sink".split()[:len(got)], got, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------------------------------------------
# The same numbers as the dense mask


@pytest.mark.parametrize("block, keep_bytes", [(128, 2**22), (16, 0), (7, 2**11)])
@pytest.mark.parametrize("H, G", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("T, S", [(1, 1), (7, 7), (50, 50), (130, 130), (1, 40), (33, 90)])
def test_equals_the_dense_mask(T, S, H, G, block, keep_bytes, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "KEEP_BYTES", keep_bytes)
    qkv = random_qkv(T, S, H, G)
    for window, sink in itertools.product((0, 1, 2, 17, S, S + 5), (None, random_sink(H))):
        assert_close(run(block_attention, qkv, window, sink=sink), run(dense, qkv, window, sink=sink),
                     atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 20])
def test_float64(window):
    """The output is as exact as that; in the gradients sums over blocks are in float32."""
    qkv = random_qkv(150, 150, dtype=torch.float64)
    got, expected = run(block_attention, qkv, window), run(dense, qkv, window)
    torch.testing.assert_close(got[0], expected[0], atol=1e-12, rtol=1e-12)
    assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_bf16_errs_no_more_than_dense_bf16(scale, window, monkeypatch):
    """Scores of standard deviation 1 and 9: both round them to 8 bits. Many blocks, for sums over them."""
    monkeypatch.setattr(module, "BLOCK", 4)
    q, k, v = (x.detach() for x in random_qkv(300, 300, D=16, dtype=torch.bfloat16))
    low, sink = [x.requires_grad_() for x in (q * scale, k * scale, v)], random_sink()
    exact = run(dense, [x.detach().double().requires_grad_() for x in low], window, sink=sink)
    for name, a, b, c in zip("y q k v sink".split(), run(block_attention, low, window, sink=sink),
                             run(dense, low, window, sink=sink), exact, strict=True):
        assert a.dtype == (torch.float32 if name == "sink" else torch.bfloat16)
        assert (a - c).norm() < 1.3 * (b - c).norm() < 0.1 * c.norm(), name


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("window", [0, 20])
def test_weights_made_again_are_those_that_were_kept(window, dropout, monkeypatch):
    qkv, results = random_qkv(150, 150, H=4, G=2), []
    for most in (0, 10**9):
        monkeypatch.setattr(module, "KEEP_BYTES", most)
        torch.manual_seed(0)
        results.append(run(block_attention, qkv, window, dropout=dropout, sink=random_sink()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_backward_can_be_repeated():
    qkv = random_qkv(150, 150)
    y = block_attention(*qkv, 20, 0.2)
    one, two = (torch.autograd.grad(y.sum(), qkv, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("window, dropout", [(64, 0.0), (64, 0.1), (0, 0.0)])
def test_no_matrix_of_all_weights(window, dropout):
    """A window's blocks are all that is made, and few enough to be kept; those of T = 2,048 without a window
    are not."""
    T, H, D, kept = 2048, 4, 8, []
    qkv = random_qkv(T, T, H, H, B=1, D=D)
    hooks = (lambda x: kept.append(x.numel()) or x, lambda x: x)
    with Made() as made, torch.autograd.graph.saved_tensors_hooks(*hooks):
        block_attention(*qkv, window, dropout).sum().backward()
    assert max(made.sizes) <= H * max(T * D, 64 * 128 if window else 128 * T)  # blocks of 64 or 128 queries
    assert 4 * T * H * D <= sum(kept) <= 4 * T * H * D + (T * H * 128 if window else 0)


# ------------------------------------------------------------------------------------------------------------
# Dropout


@pytest.mark.parametrize("T, S, G, window", [(150, 150, 4, 0), (150, 150, 2, 20), (40, 90, 1, 17)])
@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_gradients_are_those_of_the_drawn_weights(T, S, G, window, dropout, monkeypatch):
    """Put what random_keep drew for each block into its place of the whole matrix, and differentiate that."""
    drawn, qkv = [], random_qkv(T, S, 4, G)
    monkeypatch.setattr(module, "random_keep",
                        lambda *args: drawn.append(random_keep(*args)) or drawn[-1])
    sink = random_sink()
    got = run(block_attention, qkv, window, dropout, sink=sink)
    keep, masks = torch.zeros(2, 4, T, S), iter(drawn)
    for begin, end, first, stop in module.blocks(T, S, window or S):
        keep[:, :, begin:end, first:stop] = next(masks).view(2, 4, end - begin, stop - first)
    assert keep.any() and all(torch.equal(a, b) for a, b in zip(masks, drawn, strict=False))  # backward's
    assert len(drawn) == 2 * len(list(module.blocks(T, S, window or S)))
    assert_close(got, run(dense, qkv, window, keep, sink=sink), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
@pytest.mark.parametrize("window", [0, 40])
def test_share_and_scale_of_what_is_kept(window, dropout):
    """Equal scores and the identity for values show each weight: n that are seen are 1 / n or 0, and those
    kept are larger by 1 / (1 - dropout), which keeps the mean."""
    T, H = 150, 8
    q, k, v = torch.zeros(1, H, T, T), torch.zeros(1, 1, T, T), torch.eye(T)[None, None]
    torch.manual_seed(0)
    y, other = (block_attention(q, k, v, window, dropout) for _ in range(2))
    assert not torch.equal(y, other)
    torch.manual_seed(0)
    assert torch.equal(block_attention(q, k, v, window, dropout), y)
    seen = dense(q, k, v, window)[0, 0]  # (T, T): 1 / n, or 0 where not seen
    ratios = (y[0] / seen)[:, seen > 0]  # (H, n of seen pairs)
    kept = ratios > 0
    expected = torch.full_like(ratios[kept], 1 / (1 - dropout))
    torch.testing.assert_close(ratios[kept], expected, atol=0, rtol=2e-5)
    assert abs(kept.float().mean() - (1 - dropout)) < 5 * math.sqrt(dropout * (1 - dropout) / kept.numel())


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_keep(dropout, dtype):
    """Sizes that four 16-bit numbers in one draw do not divide; neighbours, from one draw or two, are
    independent."""
    torch.manual_seed(0)
    for size in (1, 2, 3, 5):
        assert random_keep(torch.zeros(size, 1, dtype=dtype), dropout, None).shape == (size, 1)
    keep = random_keep(torch.zeros(333, 1001, dtype=dtype), dropout, None)
    assert keep.dtype == dtype and keep.unique().numel() == 2 and keep.min() == 0
    n, p = keep.numel(), 1 - dropout
    assert math.isclose(keep.max(), 1 / p, rel_tol=2 ** -17 / p + torch.finfo(dtype).eps / 2)  # p has 16 bits
    centred = (keep.flatten() > 0).double() - p
    assert abs(centred.mean()) < 5 * math.sqrt(p * dropout / n)
    for lag in range(1, 9):
        assert abs((centred[lag:] * centred[:-lag]).mean()) < 5 * p * dropout / math.sqrt(n)
