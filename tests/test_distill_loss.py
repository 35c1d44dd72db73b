"""distill_loss.py against the plain formulas on all logits at once, in float64."""
import itertools
import math
import socket

from common import head_loss
from common.distill_loss import DIVERGENCES, Mix, cached_loss, two_headed_loss
from common.distributed import Dist
from common.step import backward
from model import LM, ModelConfig

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

N, C, V = 23, 6, 61
MASKS = {"none": [], "some": [0, 3, 4, 5, 11, 22], "all": list(range(N))}  # the rows that do not count
CHUNKS = (1, 5000, 2**27)  # bytes: a row at a time, several rows and a rest, everything at once


@pytest.fixture(autouse=True)
def several_slices(monkeypatch):
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 5000)
    monkeypatch.setattr(head_loss, "SLICE_ELEMENTS", 150)  # two rows


def student(bias=True, mask="none", seed=0, scale=2.0):
    """x, weight, bias (or None) and targets; logits of this standard deviation."""
    g = torch.Generator().manual_seed(seed)
    x, weight, b = (torch.randn(*shape, generator=g) for shape in ((N, C), (V, C), (V,)))
    targets = torch.randint(V, (N,), generator=g)
    targets[MASKS[mask]] = -1
    return x, scale * weight / C ** 0.5, b if bias else None, targets


def teachers(count=1, mask="none", dtype=torch.float32):
    """The first has a bias, and more rows than the student's vocabulary. Hidden states of masked rows are
    nan."""
    g = torch.Generator().manual_seed(9)
    heads = []
    for width, more in ((9, 3), (4, 0))[:count]:
        hidden, weight, bias = (torch.randn(*shape, generator=g) for shape in
                                ((N, width), (V + more, width), (V + more,)))
        hidden[MASKS[mask]] = math.nan
        heads.append((hidden.to(dtype), weight.to(dtype), bias.to(dtype) if more else None))
    return heads


def kl(p, q):
    return nn.KLDivLoss(reduction="none")(q.log(), p).sum(-1)


def plain_divergence(mix, p, q):
    """Row by row, of probabilities."""
    if mix.divergence == "forward_kl":
        return kl(p, q)
    if mix.divergence == "reverse_kl":
        return kl(q, p)
    if mix.divergence == "jsd":
        m = mix.beta * p + (1 - mix.beta) * q
        return mix.beta * kl(p, m) + (1 - mix.beta) * kl(q, m)
    if mix.divergence == "skew_kl":
        return kl(p, mix.skew * p + (1 - mix.skew) * q)
    return (p - q).abs().sum(-1) / 2


def plain(x, weight, bias, targets, heads, mix):
    """[loss, soft, hard] from all logits; in float64 if its arguments are."""
    rows, T = targets >= 0, mix.temperature
    z = F.linear(x, weight, bias)[rows]  # (N', V)
    if not rows.any():
        return z.sum() * torch.zeros(3, dtype=z.dtype)
    hard, soft = F.cross_entropy(z, targets[rows]), z.new_zeros(())
    if heads:
        p = sum(torch.log_softmax(F.linear(h[rows], w, b)[:, :V] / T, dim=-1).exp()
                for h, w, b in heads) / len(heads)
        soft = T ** 2 * plain_divergence(mix, p, torch.log_softmax(z / T, dim=-1).exp()).mean()
    return torch.stack((mix.alpha * soft + (1 - mix.alpha) * hard, soft, hard))


def run(loss, x, weight, bias, *rest, scale=1.0):
    """The three values and the gradients [values, dx, dweight] and dbias if there is one, of fresh leaves."""
    leaves = [None if a is None else a.detach().clone().requires_grad_() for a in (x, weight, bias)]
    values = loss(*leaves, *rest)
    (values[0] * scale).backward()
    return [values.detach(), *(a.grad for a in leaves if a is not None)]


def double(tree):
    if isinstance(tree, (list, tuple)) and not isinstance(tree, Mix):
        return type(tree)(double(a) for a in tree)
    return tree.double() if torch.is_tensor(tree) and tree.is_floating_point() else tree


def assert_close(got, expected, case="", atol=3e-6, rtol=2e-5):
    for name, a, b in zip(("values", "x", "weight", "bias"), got, expected, strict=len(got) == 4):
        torch.testing.assert_close(a.double(), b.double(), atol=atol, rtol=rtol,
                                   msg=lambda m, n=name: f"{n} {case}: {m}")


# ------------------------------------------------------------------------------------------------------------
# Both heads


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_values_and_gradients(kind, temperature, alpha, mask, monkeypatch):
    mix = Mix(kind, alpha, temperature, beta=0.3, skew=0.2)
    for bias, count in itertools.product((True, False), (1, 2)):
        data = (*student(bias, mask), teachers(count, mask), mix)
        expected = run(plain, *double(data))
        for chunk in CHUNKS:
            monkeypatch.setattr(head_loss, "CHUNK_BYTES", chunk)
            got = run(two_headed_loss, *data)
            assert_close(got, expected, f"bias {bias}, teachers {count}, chunk {chunk}")
            assert not got[1][MASKS[mask]].any()


@pytest.mark.parametrize("alpha", [1.0, 0.25, 0.0])
def test_without_teachers_it_is_the_cross_entropy(alpha):
    data = (*student(mask="some"), [], Mix(alpha=alpha, temperature=2.0))
    got = run(two_headed_loss, *data)
    assert_close(got, run(plain, *double(data)))
    assert got[0][1] == 0 and got[0][0].item() == pytest.approx((1 - alpha) * got[0][2].item())


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("count", [1, 2])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(kind, count):
    x, weight, bias, targets = student()
    loss, *grads = run(two_headed_loss, x, weight, bias, targets, [(x, weight, bias)] * count,
                       Mix(kind, temperature=2.0))
    assert abs(loss[0]) < 1e-5 and all(g.abs().max() < 1e-6 for g in grads)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_finite_differences(kind):
    """The gradient along a random direction, without a formula for it; float32 allows about 3 digits."""
    x, weight, bias, targets = student(mask="some", scale=1.0)
    given = targets, teachers(2, "some"), Mix(kind, 0.7, 1.5)
    step = 2e-3 if kind == "tv" else 1e-2  # |p - q| has a kink wherever a step makes p cross q
    _, dx, dweight, dbias = run(two_headed_loss, x, weight, bias, *given)
    along = [torch.randn(a.shape, generator=torch.Generator().manual_seed(3)) for a in (x, weight, bias)]
    up, down = (two_headed_loss(*(a + s * d for a, d in zip((x, weight, bias), along, strict=True)), *given)
                for s in (step, -step))
    slope = sum((g * d).sum() for g, d in zip((dx, dweight, dbias), along, strict=True))
    assert slope.item() == pytest.approx((up - down)[0].item() / (2 * step), rel=5e-3)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("margin", [50.0, 200.0, 3000.0])
def test_probabilities_that_underflow(kind, margin):
    """Teacher and student each sure of something else: p and q are 0 in float32, their logarithms are not."""
    x, targets = torch.eye(4), torch.tensor([0, 1, 2, 3])
    ours, theirs = torch.zeros(4, 4), torch.zeros(4, 4)  # logits transposed
    ours[0, 0], ours[1, 1], theirs[1, 0], theirs[1, 1] = margin, margin, margin, margin / 2
    data = (x, ours, None, targets, [(x, theirs, None)], Mix(kind, alpha=0.5))
    got = run(two_headed_loss, *data)
    assert all(a.isfinite().all() for a in got)
    if margin == 50:  # beyond it the plain formula underflows in float64 too
        assert_close(got, run(plain, *double(data)))
    if kind.endswith("e_kl") or kind == "forward_kl":
        assert got[0][1] > margin / 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_autocast_errs_no_more_than_the_plain_loss(kind, dtype):
    """Error of value and gradients to float64 over 10 batches, alpha 1 and 0.5; the plain loss needs scaling
    in float16."""
    squares = torch.zeros(2, 4, dtype=torch.float64)
    for seed in range(10):
        data = (*student(seed=seed), teachers(2), Mix(kind, 1 - seed % 2 / 2, temperature=2.0))
        exact = run(plain, *double(data))
        for i, (loss, scale) in enumerate([(two_headed_loss, 1.0), (plain, 64.0)]):
            with torch.autocast("cpu", dtype):
                got = run(loss, *data, scale=scale)
            assert got[0].dtype == got[1].dtype == got[2].dtype == torch.float32
            got[1:] = [grad / scale for grad in got[1:]]
            squares[i] += torch.stack([(a - b).square().sum() for a, b in zip(got, exact, strict=True)])
    assert (squares[0] > 0).all()  # it did run in 16 bits
    assert (squares[0] < 1.5 ** 2 * squares[1]).all(), (squares[0] / squares[1]).sqrt()


def test_logits_of_the_batch_are_never_held(monkeypatch):
    from tests.test_head_loss import Made  # here, or the processes below would import transformers too
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 40_000)
    g = torch.Generator().manual_seed(0)
    x, weight, hidden, head = (torch.randn(*shape, generator=g) for shape in
                               ((400, 8), (1000, 8), (400, 12), (1000, 12)))
    with Made() as made:
        run(two_headed_loss, x, weight, None, torch.arange(400), [(hidden, head, None)], Mix())
    assert max(made.sizes) == 8 * 1000 < 400 * 1000 / 40


def test_a_frozen_head_and_no_gradients_at_all():
    x, weight, bias, targets = student()
    given, grads = (bias, targets, teachers(), Mix("jsd", 0.5)), []
    for w in (weight.clone().requires_grad_(), weight):
        y = x.clone().requires_grad_()
        loss = two_headed_loss(y, w, *given)
        loss[0].backward()
        grads.append(y.grad)
    assert torch.equal(*grads) and weight.grad is None
    with torch.no_grad():
        values = two_headed_loss(x.clone().requires_grad_(), weight, *given)
    assert torch.equal(values, loss.detach()) and not values.requires_grad


def test_an_unknown_divergence_is_refused():
    with pytest.raises(ValueError, match="expected one of forward_kl, .*; got 'kl'"):
        two_headed_loss(*student(), teachers(), Mix("kl"))


# ------------------------------------------------------------------------------------------------------------
# From a cache


def dense_cached(x, weight, bias, targets, cached, mix):
    """cached_loss, with both distributions over the ids, and the rest as one class if there is a tail."""
    ids, probs, tail, entropy = cached
    rows, z = targets >= 0, F.linear(x, weight, bias)
    q = torch.softmax(z / mix.temperature, dim=-1)
    kept = q.gather(1, ids)
    if tail is None:
        soft = -(probs * kept.log()).sum(-1) - entropy
    else:
        rest = 1 - kept.sum(-1)
        soft = kl(probs, kept) + torch.where(tail > 0, tail * (tail / rest).log(), 0.0)
    soft, hard = mix.temperature ** 2 * soft[rows].mean(), F.cross_entropy(z, targets, ignore_index=-1)
    return torch.stack((mix.alpha * soft + (1 - mix.alpha) * hard, soft, hard))


def probabilities(temperature=1.0, seed=5):
    z = 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))
    p = torch.softmax(z.double() / temperature, dim=-1)
    return p.float(), -(p * p.log()).sum(-1).float()


def top(K, with_tail=True):
    p, entropy = probabilities()
    probs, ids = p.topk(K)
    return (ids, probs, (1 - probs.sum(-1)).clamp(min=0) if with_tail else None, entropy)


def sampled(n, seed=0):
    p, entropy = probabilities()
    ids = torch.multinomial(p, n, replacement=True, generator=torch.Generator().manual_seed(seed))
    return ids, torch.full(ids.shape, 1 / n), None, entropy


CACHES = {"top 7 and a tail": top(7), "top 7 alone": top(7, with_tail=False), "3 samples": sampled(3),
          "40 samples, which repeat": sampled(40)}


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("mask", ["none", "some"])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("name", CACHES)
def test_cached_values_and_gradients(name, alpha, mask, chunk, monkeypatch):
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", chunk)
    ids, probs, tail, entropy = CACHES[name]
    for temperature, bias in ((1.0, True), (1.0, False), (2.5, True)):
        if temperature != 1 and tail is not None:
            continue
        data = (*student(bias, mask), (ids, probs, tail, entropy), Mix("forward_kl", alpha, temperature))
        assert_close(run(cached_loss, *data), run(dense_cached, *double(data)))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_cache_of_everything_is_the_full_divergence(temperature):
    p, entropy = probabilities(temperature)
    x, weight, bias, targets = student(mask="some")
    logits = (p.log() * temperature, torch.eye(V), None)  # a teacher whose logits are its hidden states
    mix = Mix(alpha=0.8, temperature=temperature)
    expected = run(two_headed_loss, x, weight, bias, targets, [logits], mix)
    ids = torch.arange(V).expand(N, V)
    for tail in (None, torch.zeros(N), torch.full((N,), 1e-7)):
        if tail is None or temperature == 1:
            got = run(cached_loss, x, weight, bias, targets, (ids, p, tail, entropy), mix)
            assert_close(got, expected, atol=1e-5)


def test_nothing_in_the_cache_counts_in_masked_rows():
    ids, probs, tail, entropy = (a.clone() for a in top(7))
    for a in (probs, tail, entropy):
        a[MASKS["some"]] = math.nan
    x, weight, bias, targets = student(mask="some")
    got, expected = (run(cached_loss, x, weight, bias, targets, cached, Mix(alpha=0.5))
                     for cached in ((ids, probs, tail, entropy), top(7)))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("tail", [0.0, 1e-3])
@pytest.mark.parametrize("margin", [10.0, 90.0, 1000.0])
def test_a_tail_that_vanishes(tail, margin):
    """The student's mass outside the ids is exp(-margin) or so: tail * margin remains."""
    x, weight = torch.ones(1, 1), torch.zeros(V, 1)
    weight[0], weight[1] = margin, margin
    cached = torch.tensor([[0, 1]]), torch.full((1, 2), (1 - tail) / 2), torch.tensor([tail]), torch.ones(1)
    values, dx, dweight = run(cached_loss, x, weight, None, torch.tensor([0]), cached, Mix())
    entropy = -(1 - tail) * math.log((1 - tail) / 2) - (tail * math.log(tail) if tail else 0)
    total = margin + math.log(2 + (V - 2) * math.exp(-margin))
    cross = (1 - tail) * (total - margin) + tail * (total - math.log(V - 2))
    assert values[1].item() == pytest.approx(cross - entropy, rel=1e-3, abs=1e-4)
    share = math.exp(-total) - tail / (V - 2)
    torch.testing.assert_close(dweight[2:, 0], torch.full((V - 2,), share), atol=1e-7, rtol=1e-3)


def test_sampled_ids_give_the_full_gradient_on_average():
    """Over many draws of 5 ids a token; a bias of 4 standard errors in the largest of the numbers is seen."""
    p, entropy = probabilities()
    x, weight, bias, targets = student(mask="some")
    logits, draws, sums = (p.log(), torch.eye(V), None), 400, None
    exact = run(two_headed_loss, x, weight, bias, targets, [logits], Mix())
    for i in range(draws):
        got = run(cached_loss, x, weight, bias, targets, sampled(5, seed=i), Mix())
        flat = torch.cat([got[0][1:2], *(a.flatten() for a in got[1:])]).double()
        sums = torch.zeros(2, len(flat), dtype=torch.float64) if sums is None else sums
        sums += torch.stack((flat, flat ** 2))
    mean, square = sums / draws
    error = ((square - mean ** 2).clamp(min=0) / draws).sqrt() + 1e-7
    off = (mean - torch.cat([exact[0][1:2], *(a.flatten() for a in exact[1:])])) / error
    # 4 standard errors are exceeded by 1 in 16,000 numbers; here are about 570
    assert off.abs().max() < 4 and 0.8 < off.square().mean().sqrt() < 1.2
    assert abs(off[0]) < 3


def test_what_a_cache_cannot_give_is_refused():
    for mix in (Mix("jsd"), Mix(temperature=2.0)):
        with pytest.raises(ValueError, match="forward_kl only"):
            cached_loss(*student(), top(7), mix)


# ------------------------------------------------------------------------------------------------------------
# In a step


class Distilled(nn.Module):
    """A student, whose forward is the loss against two teachers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.student, *self.heads = (LM(ModelConfig(vocab_size=V, d_model=d, n_layers=1, n_heads=2,
                                                    max_seq_len=20)) for d in (16, 16, 24))

    def forward(self, x, y, state=None):
        with torch.no_grad():
            heads = [(t.hidden(x).flatten(0, 1), t.head.weight, t.head.bias) for t in self.heads]
        head = self.student.head
        loss = two_headed_loss(self.student.hidden(x).flatten(0, 1), head.weight, head.bias, y.flatten(),
                               heads, Mix("jsd", alpha=0.6, temperature=2.0))
        return loss, state


def step_of(net, batches, dist):
    """[mean losses (3,), gradient] of one optimiser step."""
    off = torch.amp.GradScaler("cpu", enabled=False)
    values = backward(net, batches, dist, "fp32", off)
    return [values, torch.cat([p.grad.flatten() for p in net.parameters()])]


def batch_with_gaps():
    """Row i of 8 has i targets that count, so the first has none."""
    x, y = torch.randint(V, (2, 8, 20), generator=torch.Generator().manual_seed(1))
    for i in range(8):
        y[i, i:] = -1
    return x, y


def one_of_two(rank, port, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x, y = (part[rank::2] for part in batch_with_gaps())
    net = nn.parallel.DistributedDataParallel(Distilled())
    found = step_of(net, list(zip(x.split(1), y.split(1), strict=True)), Dist(rank, 2, torch.device("cpu")))
    results[rank] = [a.tolist() for a in found]
    torch.distributed.destroy_process_group()


def test_a_step_is_the_mean_over_its_counted_targets():
    """However it is cut, into micro-batches (one without any target) and onto two processes."""
    one, (x, y) = Dist(0, 1, torch.device("cpu")), batch_with_gaps()
    whole = step_of(Distilled(), [(x, y)], one)
    values, soft, hard = whole[0].tolist()
    assert whole[0].shape == (3,) and values == pytest.approx(0.6 * soft + 0.4 * hard)
    found = [step_of(Distilled(), list(zip(x.split(n), y.split(n), strict=True)), one) for n in (1, 4)]
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        torch.multiprocessing.spawn(one_of_two, (port, results), nprocs=2)
        found += [[torch.tensor(a, dtype=torch.float64) for a in results[rank]] for rank in (0, 1)]
    for got in found:
        assert_close(got, whole, atol=2e-6, rtol=1e-4)
