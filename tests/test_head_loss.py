"""head_loss.py against F.cross_entropy and F.kl_div on all logits at once."""
from common import head_loss
from common.head_loss import chunked_loss, cross_entropy
from tests.test_model import tiny, tokens

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@pytest.fixture(autouse=True)
def many_chunks_and_slices(monkeypatch):
    """Of a few rows each, so that every test crosses their borders."""
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 5000)
    monkeypatch.setattr(head_loss, "CHUNK_ROWS", 11)
    monkeypatch.setattr(head_loss, "GRADIENT_ROWS", 70)
    monkeypatch.setattr(head_loss, "SLICE_ELEMENTS", 300)


def plain(x, weight, bias, targets):
    return F.cross_entropy(F.linear(x, weight, bias), targets, ignore_index=-1)


def inputs(N, C, V, bias=True, dtype=torch.float32, seed=0):
    """x, weight, bias (or None) and targets; logits of about unit variance."""
    g = torch.Generator().manual_seed(seed)
    x, weight, b = (torch.randn(*shape, generator=g, dtype=dtype) for shape in ((N, C), (V, C), (V,)))
    return x, weight / C ** 0.5, b if bias else None, torch.randint(V, (N,), generator=g)


def run(loss, x, weight, bias, *rest, scale=1.0):
    """The loss of fresh leaves and its gradients: [loss, dx, dweight] and dbias if there is one."""
    leaves = [None if a is None else a.detach().clone().requires_grad_() for a in (x, weight, bias)]
    value = loss(*leaves, *rest)
    (value * scale).backward()
    return [value.detach(), *(a.grad for a in leaves if a is not None)]


def assert_close(got, expected, **tolerance):
    for name, a, b in zip(("loss", "x", "weight", "bias"), got, expected, strict=False):
        torch.testing.assert_close(a, b, **tolerance, check_dtype=False, msg=lambda m, n=name: f"{n}: {m}")
    assert len(got) == len(expected)


class Made(TorchDispatchMode):
    """The number of elements of every tensor that is not a view of an argument."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, new = ([t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
                      for tree in ((args, kwargs), out))
        known = {t.untyped_storage().data_ptr() for t in given}
        self.sizes += [t.numel() for t in new if t.untyped_storage().data_ptr() not in known]
        return out


# ------------------------------------------------------------------------------------------------------------
# The same numbers as on all logits at once


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("N, C, V", [(1, 3, 2), (37, 8, 61), (64, 5, 300), (53, 16, 1999)])
def test_values_and_gradients(N, C, V, bias, dtype):
    """Up to V = 300 a slice has rows to spare, above it is one row of more elements than a slice should have;
    float64 has its losses and sums in float32."""
    data = inputs(N, C, V, bias, dtype)
    assert_close(run(cross_entropy, *data), run(plain, *data), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("counted", [slice(0, 60, 3), slice(41, 42)])
def test_ignored_targets(counted):
    *data, targets = inputs(60, 8, 97)
    some = torch.full_like(targets, -1)
    some[counted] = targets[counted]
    got = run(cross_entropy, *data, some)
    assert_close(got, run(plain, *data, some), atol=1e-6, rtol=1e-5)
    assert not got[1][some < 0].any()


@pytest.mark.parametrize("options", [{}, {"head_bias": False}, {"tie_embeddings": False},
                                     {"tie_embeddings": False, "head_bias": False}])
def test_inside_the_model(options):
    ours, theirs = tiny(**options), tiny(**options)
    x, y = tokens(), tokens(seed=2)
    y[0, :7] = -1
    got = ours(x, y)[0]
    expected = F.cross_entropy(theirs(x)[0].flatten(0, 1), y.flatten(), ignore_index=-1)
    torch.testing.assert_close(got, expected)
    got.backward()
    expected.backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, atol=1e-6, rtol=1e-4,
                                   msg=lambda m, n=name: f"{n}: {m}")


def test_micro_batches_add_up_to_one_batch():
    x, weight, bias, targets = inputs(60, 8, 97)
    targets[::7] = -1

    def in_parts(x, weight, bias, targets):
        parts = zip(x.split(17), targets.split(17), strict=True)
        total = sum(cross_entropy(a, weight, bias, b) * (b >= 0).sum() for a, b in parts)
        return total / (targets >= 0).sum()

    got, expected = (run(f, x, weight, bias, targets) for f in (in_parts, cross_entropy))
    assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_model(backend):
    ours, theirs = tiny(), tiny()
    x, y = tokens(), tokens(seed=2)
    for model in (torch.compile(ours, backend=backend), theirs):
        for _ in range(2):  # gradients add up
            loss = model(x, y)[0]
            loss.backward()
        with torch.no_grad():
            torch.testing.assert_close(model(x, y)[0], loss.detach())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_autocast_errs_no_more_than_the_plain_loss(dtype, bias):
    """Error to float64, over 20 batches; the plain loss in float16 needs its loss scaled, ours does not."""
    squares = torch.zeros(2, 4 if bias else 3, dtype=torch.float64)
    for seed in range(20):
        *data, targets = inputs(120, 16, 97, bias, seed=seed)
        exact = run(plain, *(a if a is None else a.double() for a in data), targets)
        for i, (loss, scale) in enumerate([(cross_entropy, 1.0), (plain, 1024.0)]):
            with torch.autocast("cpu", dtype):
                got = run(loss, *data, targets, scale=scale)
            assert got[1].dtype == got[2].dtype == torch.float32
            got[1:] = [grad / scale for grad in got[1:]]
            squares[i] += torch.stack([(a - b).square().sum() for a, b in zip(got, exact, strict=True)])
    assert (squares[0] > 0).all()  # it did run in 16 bits
    assert (squares[0] < 1.5 ** 2 * squares[1]).all(), (squares[0] / squares[1]).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("margin", [2.0, 8.0, 12.0])
def test_a_target_of_probability_near_one(dtype, margin):
    """p - 1 is formed in float32, so that only the logits and the finished gradient have few bits. Its error
    there is a few of p's last bits, 2.7e-7, which F.cross_entropy in float32 has too."""
    logits = (torch.randn(40, 97, generator=torch.Generator().manual_seed(0)) / 4).to(dtype)
    targets = torch.arange(40)
    logits[targets, targets] = margin
    z = logits.double().requires_grad_()
    expected = F.cross_entropy(z, targets, reduction="none")
    expected.sum().backward()
    assert margin < 12 or expected.max() < 1e-3  # p - 1 would be 0 in 16 bits
    loss = head_loss.nll_rows(logits, targets, grad=True)
    torch.testing.assert_close(loss.double(), expected.detach(), atol=4e-7, rtol=1e-6)
    torch.testing.assert_close(logits.double(), z.grad, atol=4e-7, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("margin", [60.0, 80.0, 200.0, 5000.0])
def test_a_target_whose_probability_vanishes(margin):
    x, weight = torch.eye(4), torch.zeros(4, 4)  # (N, C), (V, C): logits weight.T
    weight[0, :2], weight[1, :2], weight[2, 2] = margin, margin - 1, -3.0
    targets = torch.tensor([3, 2, 2, 1])
    got, expected = (run(f, x, weight, None, targets) for f in (cross_entropy, plain))
    assert got[0] > margin / 2
    assert_close(got, expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_scaled_loss_scales_gradients_exactly(dtype):
    data = inputs(60, 8, 97)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        once, scaled = run(cross_entropy, *data), run(cross_entropy, *data, scale=2.0 ** 16)
    for a, b in zip(once[1:], scaled[1:], strict=True):
        assert torch.equal(a * 2 ** 16, b) and b.isfinite().all() and b.any()


# ------------------------------------------------------------------------------------------------------------
# What is kept, what is refused


def test_logits_of_the_batch_are_never_held():
    N, C, V = 400, 8, 1000
    data = inputs(N, C, V)
    with Made() as made:
        run(cross_entropy, *data)
    assert max(made.sizes) == (C + 1) * V < N * V / 40


@pytest.mark.parametrize("bias", [True, False])
def test_a_tied_embedding_adds_its_gradient_to_the_heads(bias):
    """In place, not into a third (V, C)."""
    model = tiny(head_bias=bias)
    loss, _ = model(tokens(), tokens(seed=2))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        loss.backward()
    sums = [e.name for e in seen.events() if e.input_shapes[:2] == [[*model.head.weight.shape]] * 2]
    assert sums == ["aten::add_"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_are_made(mode):
    N, C, V = 100, 200, 150
    x, weight, bias, targets = inputs(N, C, V, bias=False)
    weight.requires_grad_()
    kept = []
    hooks = (lambda t: kept.append(t) or t, lambda t: t)
    with mode(), Made() as made, torch.autograd.graph.saved_tensors_hooks(*hooks):
        loss = cross_entropy(x, weight, bias, targets)
    assert not loss.requires_grad and not kept
    assert max(made.sizes) < N * C < V * C  # neither dx nor dweight
    torch.testing.assert_close(loss, plain(x, weight, bias, targets).detach())


def test_a_second_backward_is_refused():
    x, weight, bias, targets = inputs(20, 8, 97)
    loss = cross_entropy(x.requires_grad_(), weight.requires_grad_(), bias, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up by its first backward"):
        loss.backward()


def test_a_frozen_head_passes_the_same_gradient_on():
    x, weight, bias, targets = inputs(20, 8, 97)
    grads = []
    for w in (weight.clone().requires_grad_(), weight):
        y = x.clone().requires_grad_()
        cross_entropy(y, w, bias, targets).backward()
        grads.append(y.grad)
    assert torch.equal(*grads) and weight.grad is None


# ------------------------------------------------------------------------------------------------------------
# Another loss through the same chunks


@pytest.mark.parametrize("V", [61, 1999])
def test_distillation_is_a_row_loss(V):
    """Kullback-Leibler divergence from a teacher whose logits are made chunk by chunk from its hidden states,
    at temperature 2, with rows that do not count."""
    x, weight, bias, _ = inputs(53, 8, V)
    hidden, head, head_bias, _ = inputs(53, 12, V, seed=1)
    mask, temperature = (torch.arange(53) % 3 > 0).float(), 2.0

    def kl_rows(logits, hidden, grad):
        student = (logits / temperature).log_softmax(-1)  # (R, V)
        teacher = (F.linear(hidden, head, head_bias) / temperature).log_softmax(-1)  # (R, V)
        if grad:
            logits.copy_((student.exp() - teacher.exp()) / temperature)
        return (teacher.exp() * (teacher - student)).sum(-1)

    def ours(x, weight, bias):
        return chunked_loss(x, weight, bias, mask, kl_rows, hidden)

    def theirs(x, weight, bias):
        student, teacher = ((F.linear(*args) / temperature).log_softmax(-1)
                            for args in ((x, weight, bias), (hidden, head, head_bias)))
        return (F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * mask).sum()

    assert_close(run(ours, x, weight, bias), run(theirs, x, weight, bias), atol=1e-5, rtol=1e-5)
