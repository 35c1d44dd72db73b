"""common/collapse.py against texts counted by hand and a loop over single predictions."""
import math

from common import collapse
from common.collapse import compare, text_measures
from common.distributed import Dist
from model import LM, ModelConfig

import numpy as np
import pytest
import torch

DIST = Dist(0, 1, torch.device("cpu"))
SPLIT = {"bytes": 70, "words": 20}


def test_texts_counted_by_hand():
    assert text_measures([[5, 5, 5, 5, 5, 5]] * 2) == {"modal_share": 1, "distinct_2": 0.1,
                                                       "repetition_4": 4 / 6}
    # each row repeats a word of its own: no token is frequent overall, and no 4-gram is new twice
    assert text_measures([[i] * 7 for i in range(4)]) == {"modal_share": 0.25, "distinct_2": 4 / 24,
                                                          "repetition_4": 0.75}
    got = text_measures([[1, 2, 3, 4, 1, 2, 3, 4, 9], [1, 2, 3, 4]])  # the second row's 4-gram is its first
    assert got == {"modal_share": 3 / 13, "distinct_2": 5 / 11, "repetition_4": 1 / 7}
    assert text_measures([[1, 2], []])["distinct_2"] == 1
    assert all(math.isnan(v) for v in text_measures([[]]).values()) and text_measures([]).keys()
    assert math.isnan(text_measures([[1, 2, 3]])["repetition_4"])


def models():
    """A student and two teachers of other widths; the second has three more ids, of padding."""
    out = []
    for seed, (width, vocab) in enumerate(((16, 61), (32, 61), (24, 64))):
        torch.manual_seed(seed)
        model = LM(ModelConfig(vocab_size=vocab, d_model=width, n_layers=1, n_heads=2, max_seq_len=16))
        for p in model.parameters():
            p.data += 0.2 * torch.randn_like(p)
        out.append(model)
    return out


def brute_force(student, teachers, tokens, unigram, seq_len, temperature):
    """One target at a time, in float64."""
    sums, q_all = {}, []
    for target in range(1, len(tokens)):
        start = (target - 1) // seq_len * seq_len
        context = torch.from_numpy(tokens[start:target].astype(np.int64))[None]
        z, *others = (m.eval()(context)[0][0, -1, :61].double() for m in (student, *teachers))
        q, y = z.softmax(0), int(tokens[target])
        q_all.append(q)
        row = {"entropy": -(q * q.log()).sum(), "loss": -q[y].log(), "top1": q.argmax() == y}
        if teachers:
            p = torch.stack([t.softmax(0) for t in others]).mean(0)
            p_t = torch.stack([(t / temperature).softmax(0) for t in others]).mean(0)
            soft = (p_t * (p_t.log() - (z / temperature).log_softmax(0))).sum()
            row |= {"teacher_entropy": -(p * p.log()).sum(), "teacher_loss": -p[y].log(),
                    "teacher_top1": p.argmax() == y, "agreement": p.argmax() == q.argmax(),
                    "soft": temperature**2 * soft}
        for name, value in row.items():
            sums[name] = sums.get(name, 0) + float(value)
    n = len(tokens) - 1
    out = {name: value / n for name, value in sums.items()}
    for name in ("", "teacher_") if teachers else ("",):
        out[name + "bits_per_byte"] = out[name + "loss"] * n / math.log(2) / SPLIT["bytes"]
    u, q = (unigram.double() + 1) / (unigram.sum() + 61), torch.stack(q_all).mean(0)
    return out | {"to_unigram": float((q * (q / u).log()).sum())}


@pytest.mark.parametrize("n_teachers, temperature", [(0, 1.0), (1, 1.0), (1, 3.0), (2, 1.0), (2, 2.0)])
def test_it_equals_a_loop_over_single_predictions(n_teachers, temperature, monkeypatch):
    student, *teachers = models()
    tokens = np.random.default_rng(0).integers(61, size=71).astype(np.uint16)  # the last window is short
    unigram = torch.from_numpy(np.bincount(tokens, minlength=61))
    student.train()
    with torch.no_grad():
        want = brute_force(student, teachers[:n_teachers], tokens, unigram, 16, temperature)
    student.train()
    for batch_size, logits in ((2, 2**25), (64, 8 * 61 * 7)):  # all rows at once, and seven
        monkeypatch.setattr(collapse, "LOGITS", logits)
        got = compare(student, teachers[:n_teachers], tokens, SPLIT, 61, unigram, 16, batch_size, DIST,
                      "fp32", temperature)
        assert got.keys() == want.keys()
        for name in want:
            assert math.isclose(got[name], want[name], rel_tol=2e-5, abs_tol=1e-6), name
    assert student.training


def test_a_model_agrees_with_itself_and_a_uniform_one_has_the_closed_form():
    student, teacher, _ = models()
    tokens, unigram = np.arange(61, dtype=np.uint16), torch.zeros(61)
    got = compare(teacher, [teacher, teacher], tokens, SPLIT, 61, unigram, 16, 3, DIST, "fp32", 2.0)
    assert abs(got["soft"]) < 1e-6 and got["agreement"] == 1
    assert math.isclose(got["entropy"], got["teacher_entropy"], rel_tol=1e-6)
    for p in student.parameters():
        p.data.zero_()
    got = compare(student, [], tokens, SPLIT, 61, unigram, 16, 3, DIST, "fp32")
    assert math.isclose(got["entropy"], math.log(61), rel_tol=1e-6) and abs(got["to_unigram"]) < 1e-6


def test_two_shares_of_the_batches_add_up(monkeypatch):
    """The sums that ranks 0 and 1 bring to the reductions are together those of one process."""
    student, teacher, _ = models()
    tokens, brought = np.random.default_rng(1).integers(61, size=100).astype(np.uint16), []

    class Recording(Dist):
        def reduce(self, total, *_):
            brought.append(total.clone())
            return total

    for rank, world in ((0, 1), (0, 2), (1, 2)):
        compare(student, [teacher], tokens, SPLIT, 61, torch.zeros(61), 16, 2,
                Recording(rank, world, DIST.device), "fp32")
    for one, a, b in zip(brought[:2], brought[2:4], brought[4:], strict=True):
        torch.testing.assert_close(a + b, one, rtol=1e-5, atol=1e-5)


def test_a_stop_gives_none():
    class Stop:
        requested = True

    student, teacher, _ = models()
    tokens = np.zeros(50, dtype=np.uint16)
    assert compare(student, [teacher], tokens, SPLIT, 61, torch.zeros(61), 16, 1, DIST, "fp32",
                   stop=Stop()) is None
