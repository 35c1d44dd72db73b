"""common/step.py: the gradient of a step is that of all its counted targets, however the batch is cut."""
import contextlib
import math
from types import SimpleNamespace

from common import step
from common.distributed import Dist
from common.step import NotFinite, backward, update
from model import LM, ModelConfig
from tests.conftest import started
from tests.test_model import tiny, tokens

import pytest
import torch
import torch.nn.functional as F

CPU = torch.device("cpu")
OFF = torch.amp.GradScaler("cpu", enabled=False)


def masked_batch(rows=8, length=20):
    """Inputs and targets whose counted targets are as unevenly spread as they can be: row i has the first
    i."""
    x, y = tokens(rows, length), tokens(rows, length, seed=2)
    for i in range(rows):
        y[i, i:] = -1
    return x, y


def gradients_of(model, batches, dist=None, **options):
    model.zero_grad(set_to_none=True)
    loss = backward(model, batches, dist or Dist(0, 1, CPU), "fp32", OFF, **options)
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("options", [{}, {"n_experts": 3, "expert_balance": 0.5}])
def test_a_step_is_the_mean_over_its_counted_targets(options):
    """A mean over means of micro-batches would weigh the few targets of the first rows as much as all
    others."""
    model, (x, y) = tiny(**options).train(), masked_batch()
    whole, expected = gradients_of(model, [(x, y)])
    if not options:
        plain = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten(), ignore_index=-1)
        assert whole == pytest.approx(plain.item(), rel=1e-5)
        torch.testing.assert_close(torch.cat([g.flatten() for g in torch.autograd.grad(
            plain, list(model.parameters()))]), expected, atol=1e-6, rtol=1e-4)
    for size in (1, 2, 4):  # with 1 the first micro-batch has no target at all
        loss, gradient = gradients_of(model, list(zip(x.split(size), y.split(size), strict=True)))
        assert loss == pytest.approx(whole, rel=1e-5)
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


def test_two_processes_are_one(monkeypatch):
    """Each process's share is weighed by the targets of both: what DDP then averages is the whole
    gradient."""
    model, (x, y) = tiny().train(), masked_batch()
    whole, expected = gradients_of(model, [(x, y)])
    total, losses, gradients = float((y >= 0).sum()), [], []
    for rank in range(2):
        dist = Dist(rank, 2, CPU)
        monkeypatch.setattr(Dist, "grouped", True)
        monkeypatch.setattr(
            Dist, "reduce", lambda self, t, *_: torch.tensor(total) if t.dtype == torch.float32 else t
        )  # the counts are added up; each process's part of the loss is looked at
        model.no_sync = contextlib.nullcontext
        loss, gradient = gradients_of(
            model, [(x[rank::2][:2], y[rank::2][:2]), (x[rank::2][2:], y[rank::2][2:])], dist
        )
        losses.append(loss)
        gradients.append(gradient)
    assert sum(losses) == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(sum(gradients) / 2, expected, atol=1e-6, rtol=1e-4)


def test_a_step_without_any_target_is_zero():
    model, (x, y) = tiny().train(), masked_batch()
    loss, gradient = gradients_of(model, [(x, torch.full_like(y, -1))])
    assert loss == 0 and not gradient.any()


def test_accumulation_gives_the_gradient_of_the_whole_batch(small):
    job, grads = started(small(grad_clip=0.0)), []
    for micro in (8, 2, 1):
        batches = [job.windows.batch(i, micro, CPU) for i in range(0, 8, micro)]
        loss, gradient = gradients_of(job.model, batches)
        assert math.isclose(loss, job.model(*job.windows.batch(0, 8, CPU))[0].item(), rel_tol=1e-5)
        grads.append(gradient)
        norm = update(job.model, job.optimizer, OFF, 0.0, 0.0) if micro == 1 else gradient.norm().item()
        assert math.isclose(norm, gradient.norm().item(), rel_tol=1e-5)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(grads[0], grads[2], atol=1e-6, rtol=1e-4)


def test_a_loss_of_ones_own_and_dropout_by_sample():
    """What an experiment changes: any loss of (net, x, y, ...), and masks that are a function of the
    seeds."""
    model, (x, y) = tiny(dropout=0.3).train(), masked_batch()
    weights = torch.rand(x.shape)

    def weighted(net, x, y, weights, state=None):
        nats = F.cross_entropy(net(x)[0].transpose(1, 2), y, ignore_index=-1, reduction="none")
        return (nats * weights).sum() / (y >= 0).sum(), state

    batches = list(zip(x.split(4), y.split(4), weights.split(4), strict=True))
    runs = [gradients_of(model, batches, loss_of=weighted, seeds=seeds) for seeds in ([5, 6], [5, 6], [5, 7])]
    assert runs[0][0] == runs[1][0] != runs[2][0] and torch.equal(runs[0][1], runs[1][1])
    torch.manual_seed(5)
    first = weighted(model, *batches[0])[0] * (batches[0][1] >= 0).sum()
    torch.manual_seed(6)
    second = weighted(model, *batches[1])[0] * (batches[1][1] >= 0).sum()
    assert runs[0][0] == pytest.approx(((first + second) / (y >= 0).sum()).item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------
# The update


def test_what_is_not_finite_is_not_applied():
    model = tiny().train()
    optimizer, before = torch.optim.SGD(model.parameters(), lr=1.0), [p.clone() for p in model.parameters()]
    for broken_loss, broken_gradient in ((math.nan, False), (math.inf, False), (1.0, True)):
        gradients_of(model, [masked_batch()])
        if broken_gradient:
            model.head.bias.grad[3] = math.inf
        with pytest.raises(NotFinite, match="not applied"):
            update(model, optimizer, OFF, 1.0, torch.tensor(broken_loss))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    gradients_of(model, [masked_batch()])
    norm = update(model, optimizer, OFF, 1e-3, torch.tensor(1.0))
    moved = torch.cat(
        [(a - b).detach().flatten() for a, b in zip(before, model.parameters(), strict=True)]
    ).norm()
    assert norm > 1e-3 and moved == pytest.approx(1e-3, rel=1e-3)
    assert all(p.grad is None for p in model.parameters())


def test_with_loss_scaling_an_infinite_gradient_skips_the_step():
    model, scaler = tiny().train(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer, before = torch.optim.SGD(model.parameters(), lr=1.0), [p.clone() for p in model.parameters()]
    loss = backward(model, [masked_batch()], Dist(0, 1, CPU), "fp32", scaler)
    model.head.bias.grad[3] = math.inf
    assert update(model, optimizer, scaler, 1.0, loss) == math.inf
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(NotFinite, match="loss nan"):
        backward(model, [masked_batch()], Dist(0, 1, CPU), "fp32", scaler)
        update(model, optimizer, scaler, 1.0, torch.tensor(math.nan))


def test_a_parameter_without_a_gradient_is_named():
    model = tiny()
    gradients_of(model, [masked_batch()])
    step.check_gradients(model)
    model.trunk[1].mixer.qkv.weight.grad = None
    with pytest.raises(AssertionError, match="trunk.1.mixer.qkv.weight"):
        step.check_gradients(model)
    model.trunk[1].mixer.qkv.weight.requires_grad_(False)  # frozen on purpose
    step.check_gradients(model)


@pytest.mark.parametrize("option, device, flops, expected", [
    ("auto", "cpu", 1e20, (False, "no gain here")), ("true", "cpu", 1, (True, "as asked")),
    ("false", "cuda", 1e20, (False, "as asked")), ("auto", "mps", 1e20, (False, "no gain here")),
    ("auto", "cuda", 1e20, (True, "a long run")),
    ("auto", "cuda", 1e12, (False, "the run is too short to gain"))])
def test_compiling_is_for_long_runs_on_cuda(monkeypatch, option, device, flops, expected):
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: name)
    assert step.choose_compile(option, flops, torch.device(device)) == expected
    if expected[1] == "a long run":
        monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: None)
        assert step.choose_compile(option, flops, torch.device(device)) == (False, "triton is not installed")


def test_the_model_inside_is_found():
    model = LM(ModelConfig(vocab_size=11, d_model=8, n_layers=1, n_heads=1))
    assert step.unwrap(model) is model and step.unwrap(SimpleNamespace(module=model)) is model
    assert step.unwrap(SimpleNamespace(_orig_mod=model)) is model
