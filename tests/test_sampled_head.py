"""common/sampled_head.py: its candidates against counting, its loss against that of the whole softmax."""
import math

import train
from common.data import Chats
from common.head_loss import cross_entropy
from common.sampled_head import HeadSampler
from model import LM, ModelConfig

import numpy as np
import pytest
import torch

CPU = torch.device("cpu")
V, N, SIZE = 12, 6, 8
SHARES = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.08, 0.05, 0.04, 0.03, 0.02, 0.02, 0.01, 0.0])


def sampler(size: int = SIZE) -> HeadSampler:
    tokens = np.repeat(np.arange(V), (SHARES * 1000).round().int().numpy()).astype(np.uint16)
    return HeadSampler(tokens, V, size, CPU)


def test_candidates_are_the_targets_and_a_random_choice_of_others():
    torch.manual_seed(1)
    targets = torch.tensor([3, -1, 7, 3, 0])
    seen = set()
    for _ in range(50):
        candidates, log_p, places = sampler(5).draw(targets)
        assert len(candidates) == 5 and len(set(candidates.tolist())) == 5 and (log_p <= 0).all()
        assert candidates[places[targets >= 0]].tolist() == [3, 7, 3, 0] and places[1] == -1
        seen |= set(candidates.tolist())
    assert seen == set(range(V))
    assert len(sampler(2).draw(torch.arange(4))[0]) == 4  # never without a target


def test_how_often_a_token_is_a_candidate():
    """Each one weighs 1 on average if it counts 1 / p when drawn. Not exactly: p takes the number of
    different targets as given."""
    torch.manual_seed(2)
    own, drawn, weighed, times = sampler(), torch.zeros(V), torch.zeros(V), 10_000
    for _ in range(times):
        candidates, log_p, _ = own.draw(torch.multinomial(SHARES, N, replacement=True))
        drawn[candidates] += 1 / times
        weighed[candidates] += (-log_p).exp() / times
    assert (weighed - 1).abs().max() < 0.03
    assert drawn.min() < 0.55 and drawn.max() > 0.9


def test_the_true_probabilities_have_no_gradient_on_average():
    """The best answer of the sampled softmax is that of the whole one; without the correction it is not."""
    torch.manual_seed(3)
    own, truth = sampler(), (SHARES + 1e-4).log()[:, None]  # logits of width 1: x is 1

    def mean_gradient(corrected: bool) -> torch.Tensor:
        total = torch.zeros(V)
        for _ in range(4_000):
            weight, targets = truth.clone().requires_grad_(), torch.multinomial(SHARES, N, replacement=True)
            w, b, places = own(weight, None, targets)
            cross_entropy(torch.ones(N, 1), w, b if corrected else None, places).backward()
            total += weight.grad[:, 0]
        return total / 4_000

    assert mean_gradient(True).abs().max() < 0.01 < 0.03 < mean_gradient(False).abs().max()


@pytest.mark.parametrize("bias", [True, False])
def test_with_all_tokens_it_is_the_whole_softmax(bias):
    torch.manual_seed(4)
    weight, x = torch.randn(V, 5, requires_grad=True), torch.randn(N, 5, requires_grad=True)
    b = torch.randn(V, requires_grad=True) if bias else None
    targets = torch.tensor([1, 2, -1, 11, 0, 5])
    expected = torch.nn.functional.cross_entropy(x @ weight.T + (0 if b is None else b), targets,
                                                 ignore_index=-1)
    own = [v for v in (weight, x, b) if v is not None]
    want = torch.autograd.grad(expected, own)
    loss = cross_entropy(x, *sampler(V)(weight, b, targets))
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-6)
    for a, e in zip(torch.autograd.grad(loss, own), want, strict=True):
        assert torch.allclose(a, e, atol=1e-6)


def test_evaluation_is_over_the_whole_vocabulary():
    torch.manual_seed(5)
    model = LM(ModelConfig(vocab_size=V, max_seq_len=8, d_model=16, n_layers=1, n_heads=2))
    x = torch.randint(V, (2, 8))
    with torch.no_grad():
        whole = model.eval()(x, x)[0]
        model.head_sampler = sampler(6)
        assert torch.equal(model(x, x)[0], whole)
        assert not torch.equal(model.train()(x, x)[0], whole)


def test_training_with_it_learns_and_says_what_it_costs(small, capsys):
    whole = train.main(small(name="whole", lr=3e-3))
    cost = float(capsys.readouterr().out.split("cost ")[1].split("MFLOPs")[0])
    sampled = train.main(small(name="sampled", lr=3e-3, head_samples=160))
    cheaper = float(capsys.readouterr().out.split("cost ")[1].split("MFLOPs")[0])
    cfg = small().resolved(train.open_text(small().data).meta)
    assert cost - cheaper == pytest.approx(6 * (cfg.vocab_size - 160) * cfg.d_model / 1e6, abs=0.11)
    assert sampled["result"]["loss"] < math.log(cfg.vocab_size) - 1
    assert abs(sampled["result"]["loss"] - whole["result"]["loss"]) < 0.15


def test_frequencies_of_conversations_and_of_long_texts(monkeypatch):
    monkeypatch.setattr("common.sampled_head.CHUNK", 3)
    tokens = np.array([1, 1, 2, 5, 1, 0, 2], dtype=np.uint16)
    got = HeadSampler(tokens, 6, 4, CPU).log_absent
    assert torch.allclose(got, torch.log1p(-torch.tensor([1, 3, 2, 0, 0, 1]) / 7))
    text = type("Text", (), {"train": Chats(tokens, None, 0)})
    cfg = train.TrainConfig(vocab_size=6, head_samples=4)
    assert torch.equal(train.head_sampler(cfg, text, type("Dist", (), {"device": CPU})).log_absent, got)
