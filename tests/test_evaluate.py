"""common/evaluate.py against a loop over single predictions and closed forms."""
import math

from common import data
from common.distributed import Dist
from common.evaluate import evaluate, expert_usage
from model import LM

import numpy as np
import pytest
import torch

DIST = Dist(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("by_logits", [False, True])
def test_it_equals_a_loop_over_single_predictions(small, corpus, by_logits):
    cfg, meta = small(vocab_size=257), data.read_meta(corpus)
    torch.manual_seed(0)
    model = LM(cfg)
    tokens, split = data.open_tokens(corpus, "val", meta)[:200], {"bytes": 190, "words": 30}
    nats, right = 0.0, 0
    for target in range(1, 200):
        start = (target - 1) // 32 * 32
        context = torch.from_numpy(tokens[start:target].astype(np.int64))[None]
        logits = model(context)[0][0, -1]
        nats -= logits.log_softmax(-1)[int(tokens[target])].item()
        right += int(logits.argmax()) == int(tokens[target])
    for batch_size in (1, 3, 64):
        got = evaluate(model, tokens, split, 32, batch_size, DIST, "fp32", by_logits=by_logits)
        assert math.isclose(got["loss"], nats / 199, rel_tol=1e-5)
        assert math.isclose(got["perplexity"], math.exp(nats / 199), rel_tol=1e-4)
        assert math.isclose(got["bits_per_byte"], nats / math.log(2) / 190, rel_tol=1e-5)
        assert math.isclose(got["word_perplexity"], math.exp(nats / 30), rel_tol=1e-3)
        assert ("top1" in got) == by_logits and got.get("top1", right / 199) == right / 199
    asked = evaluate(model, tokens, split, 32, 8, DIST, "fp32", top1=True)
    assert asked["top1"] == right / 199 and math.isclose(asked["loss"], nats / 199, rel_tol=1e-5)
    assert model.training


def test_a_uniform_model_has_the_closed_form(small, corpus):
    cfg, meta = small(vocab_size=257), data.read_meta(corpus)
    model, tokens = LM(cfg), data.open_tokens(corpus, "val", meta)
    for p in model.parameters():
        p.data.zero_()
    val = meta["splits"]["val"]
    got = evaluate(model, tokens, val, 32, 16, DIST, "fp32")
    assert math.isclose(got["loss"], math.log(257), rel_tol=1e-6)
    # bytes and one separator per document, of which the first is not predicted
    predicted = val["bytes"] + val["documents"] - 1
    assert predicted == len(tokens) - 1
    assert math.isclose(got["bits_per_byte"], predicted * math.log2(257) / val["bytes"], rel_tol=1e-6)


def test_tokens_per_expert_are_counted(small, corpus):
    cfg, meta = small(vocab_size=257, n_experts=3), data.read_meta(corpus)
    model, tokens = LM(cfg), data.open_tokens(corpus, "val", meta)[:100]
    got = evaluate(model, tokens, meta["splits"]["val"], 32, 2, DIST, "fp32")["expert_usage"]
    assert len(got) == cfg.n_layers and all(math.isclose(sum(shares), 1) for shares in got)
    with torch.no_grad(), expert_usage(model) as usage:
        model(torch.from_numpy(tokens[:64].astype(np.int64)).view(2, 32))
    assert usage.sum(dim=1).tolist() == [64] * cfg.n_layers
