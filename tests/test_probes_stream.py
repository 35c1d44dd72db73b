"""probes/stream.py against computations by hand, on a tiny model; planted effects are found."""
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import memory_probe
import train
from common.config import ConfigError, UserError
from common.data import open_text
from common.distributed import Dist
from common.files import read_rows
from common.run import Run
from memory_probe import ProbeConfig, changed
from model import load_model
from probes import stream
from probes.base import architecture
from probes.stream import (
    Places,
    lags_of,
    make_stream,
    profile,
    reading,
    sentences_of,
    stride_of,
    token_losses,
)
from train import TrainConfig

import numpy as np
import pytest
import torch

CPU = Dist(0, 1, torch.device("cpu"))
SMALL = {"device": "cpu", "dtype": "fp32", "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 32,
         "batch_size": 8, "pos": "rope", "lr": 3e-3}
WINDOW = {"experiment": "window", "window_size": 4, "stride": 2, "sentences": 16, "lead": 1, "seeds": 2}
TRACE = {"experiment": "trace", "stretch": 96, "reach": 128, "intervals": 3, "seeds": 2, "retrain_steps": 4}


@pytest.fixture(scope="module")
def place(bpe_corpus, tmp_path_factory):
    """A text with enough sentences, and a base that knows a little of it."""
    out, text = str(tmp_path_factory.mktemp("stream")), open_text(bpe_corpus)
    train.main(TrainConfig(**SMALL, data=bpe_corpus, out_dir=out, name="base", epochs=0.0, max_steps=40,
                           eval_interval=40, sample_tokens=0))
    text = text._replace(val=text.train)
    return SimpleNamespace(text=text, out=out, data=bpe_corpus, found=sentences_of(text))


def config(place, name: str, **options) -> ProbeConfig:
    return ProbeConfig(**SMALL | {"data": place.data, "out_dir": place.out, "name": name, "pool": 0,
                                  "base": f"{place.out}/base"} | options)


def measure(place, cfg, parts=99):
    """The experiment's (summary, words), asked to stop in the part after `parts`."""
    arms = [architecture(c, place.text.meta) for c in (cfg, *(changed(cfg, a) for a in cfg.arm))]
    with Run(replace(arms[0], arm=cfg.arm), CPU, "memory_probe") as run:
        stop = SimpleNamespace(agreed=lambda dist: len(read_rows(run.path("probes.jsonl"))) >= parts)
        experiment = getattr(stream, cfg.experiment)
        return experiment(cfg, arms, ["as it is", *cfg.arm], place.text, [None] * len(arms), run, stop)


# ------------------------------------------------------------------------------------------------------------
# Sentences and scores


def test_last_words_lie_on_token_boundaries(place):
    tok = place.text.tok
    assert len(place.found) > 100 and len({tuple(s.ids) for s in place.found}) == len(place.found)
    assert len({len(s.target) for s in place.found}) > 2
    for s in place.found:
        end = s.start + len(s.target)
        assert s.ids[s.start:end] == s.target and len(s.ids) in range(8, 41)
        assert tok.decode(s.target) == f" {s.word}" and re.fullmatch("[.!?]", tok.decode(s.ids[end:]))


def one_by_one(model, context, s, tok):
    """The four scores by separate forward passes over one sentence, with a greedy loop written out."""
    prompt = [tok.eot, *context, *s.ids[:s.start]]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + s.target]))[0][0]  # (T, V)
        logp = logits.log_softmax(dim=-1)[len(prompt) - 1:-1]  # (k, V)
        ids = list(prompt)
        for _ in range(len(s.target) + 8):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    own = [float(row[t]) for row, t in zip(logp, s.target, strict=True)]
    hits = [int(row.argmax()) == t for row, t in zip(logp, s.target, strict=True)]
    said = re.match(r"\s*(\w+(?:['’-]\w+)*)", tok.decode(ids[len(prompt):]))
    return [hits[-1], all(hits), bool(said) and said[1] == s.word, sum(own)]


def test_scores_equal_one_sentence_at_a_time_and_a_greedy_loop(place):
    model, tok, some = load_model(f"{place.out}/base")[0].train(), place.text.tok, place.found[:32]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor([tok.eot, *s.ids]) for s in some[:16]], True, -1)
    for _ in range(60):  # half of them by heart, so that all answers occur
        model(rows[:, :-1].clamp(min=0), rows[:, 1:])[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    contexts = [place.found[40].ids if i % 3 == 0 else [] for i in range(len(some))]
    found = stream.ask(model, contexts, some, tok, CPU.device)
    assert model.training
    model.eval()
    expected = [one_by_one(model, c, s, tok) for c, s in zip(contexts, some, strict=True)]
    expected = np.array(expected, dtype=float).T
    assert (found[:3] == expected[:3]).all() and np.allclose(found[3], expected[3], atol=1e-4)
    assert 0 < found[1].mean() < found[0].mean() < 1 and 0 < found[2].mean()


def test_a_longer_word_is_another_word(place, monkeypatch):
    """The tokens of "in" are right in both cases, but one greedy text goes on to "inside"."""
    tok = place.text.tok
    s = stream.Sentence([], 0, tok.encode(" in"), "in")
    for text, right in ((" inside", False), (" in the", True), (" it", False)):
        ids = tok.encode(text)
        monkeypatch.setattr(stream, "read", lambda model, asked, pad, device, ids=ids:
                            [(0.0, [ids[len(prompt) - 1]]) for prompt, _ in asked])
        assert stream.says(None, [[tok.eot]], [[]], [s], tok, None) == [right], text


# ------------------------------------------------------------------------------------------------------------
# The rolling window


@pytest.mark.parametrize("W, s, context, times", [(4, 2, 0, {2}), (4, 4, 1, {1}), (5, 2, 2, {2, 3})])
def test_the_stream_trains_what_it_says(place, W, s, context, times):
    cfg = config(place, "none", **WINDOW | {"window_size": W, "stride": s, "context": context})
    eot = place.text.tok.eot
    stream, other = (make_stream(cfg, place.found, seed, eot) for seed in (1, 2))
    rows = [x[:(y >= 0).nonzero()[0].max() + 1].tolist() + [int(y[y >= 0][-1])]
            for x, y in zip(stream.x, stream.y, strict=True)]
    trained = {}  # sentence -> steps
    for step in range(stream.steps):
        for i in range(step * s, step * s + W):
            ids = tuple(stream.y[i][stream.y[i] >= 0].tolist())  # the context and padding do not count
            trained.setdefault(ids, []).append(step)
            assert rows[i][-len(ids):] == list(ids) and (len(rows[i]) == 1 + len(ids)) == (context == 0)
    for i, (a, b) in enumerate(stream.pairs):
        steps = trained[tuple(a.ids)]
        assert len(steps) == stream.exposures[i] in times and steps[-1] == stream.last[i]
        assert tuple(b.ids) not in trained
        assert steps == list(range(steps[0], steps[0] + len(steps)))
        if context:
            assert any(row == [eot, *stream.contexts[i], *a.ids] for row in rows)
    assert set(stream.exposures) == times and stream.steps == max(stream.last) + max(lags_of(cfg)) + 1
    sizes = [[len(s.target) for s in pair] for pair in stream.pairs]
    assert sum(abs(a - b) for a, b in sizes) <= np.max(sizes) - np.min(sizes)  # as few as can be differ
    assert [p[0].ids for p in stream.pairs] != [p[0].ids for p in other.pairs]


def test_a_planted_memory_is_found_and_a_rate_of_0_leaves_nothing(place, monkeypatch):
    def measured_alone(cfg, found, seed, eot):  # again and again
        stream = make_stream(cfg, found, seed, eot)
        again = 4 + np.arange(len(stream.x)) % 8
        return stream._replace(x=stream.x[again], y=stream.y[again])

    monkeypatch.setattr(stream, "make_stream", measured_alone)
    summary, words = measure(place, config(place, "planted", **WINDOW | {"seeds": 3}, lr=1e-2, arm=("lr=0",)))
    strong, none = (a["scores"] for a in summary["arms"])
    assert strong["log p"]["at"]["20"]["mean"] > 2 and strong["log p"]["at"]["20"]["verdict"] == "signal"
    assert strong["last token"]["streamed"][-1] > strong["last token"]["never"][-1] + 0.2
    for entry in none.values():
        assert all(v == 0 for v in entry["mean"]) and entry["streamed"][0] == entry["before"][0]
        assert all(e["verdict"].startswith("none larger than 0") for e in entry["at"].values())
    assert "each sentence is trained 2 times" in words and "lr=0 - as it is, log p" in words
    table = open(f"{place.out}/planted/table.md").read()
    assert "greedy word" in table and open(f"{place.out}/planted/effect.png", "rb").read(4)[1:] == b"PNG"


def test_update_factors_scale_what_is_applied(place, monkeypatch):
    model = load_model(f"{place.out}/base")[0]
    cfg = SimpleNamespace(lr_profile="random", n_layers=2)
    for p, factor in stream.rate_factors(cfg, model, 1).items():
        assert p.dim() == 2 and set(factor.unique().tolist()) == {1.0, 10.0}
        assert abs((factor == 10).float().mean() - 0.1) < 0.03
    cfg.lr_profile, names = "depth", {p: n for n, p in model.named_parameters()}
    layers = {names[p][:7]: f for p, f in stream.rate_factors(cfg, model, 1).items()}
    assert layers == {"trunk.0": pytest.approx(0.1), "trunk.1": pytest.approx(10)}
    monkeypatch.setattr(stream, "rate_factors", lambda cfg, m, seed: dict.fromkeys(m.parameters(), 0.0))
    summary, _ = measure(place, config(place, "still", **WINDOW | {"seeds": 1}, lr=2e-2))
    assert all(v == 0 for v in summary["arms"][0]["scores"]["log p"]["mean"])  # nothing was applied


# ------------------------------------------------------------------------------------------------------------
# The trace of a stretch


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
def test_exactly_the_tokens_read_with_trained_ones_are_left_out(place, overlap):
    cfg, at = config(place, "none", **TRACE, overlap=overlap), Places(5000, 5095, 0, np.array([0]))
    starts, places, begins = reading(cfg, at)
    assert len(set(places)) == len(places) and {*range(5000 - 128, 5096 + 128)} <= {*places}
    assert (places - begins <= 32).all() and (places - begins > 32 - stride_of(cfg)).all()  # tokens before it
    shares = {int(p) - at.b for p, begin in zip(places, begins, strict=True)  # after one of [a, b]
              if p > at.b and {*range(begin, p)} & {*range(at.a, at.b + 1)}}
    for exclude in (True, False):
        new = replace(cfg, exclude_overlap=exclude)
        found = profile(new, (places - at.b).astype(float), places, begins, at)
        assert shares == {*range(1, len(shares) + 1)} and found["first"] - 1 == len(shares) * exclude
        for k in range(4):  # bins of 32 distances from the first that counts
            middle = found["first"] + 32 * k + 15.5
            assert found["ahead"][k] == middle and found["behind"][k] == at.a - at.b - middle


def test_losses_are_those_of_each_token_after_its_window(place):
    cfg, (model, _) = config(place, "none", **TRACE), load_model(f"{place.out}/base")
    starts, tokens = np.array([100, 700]), place.text.train
    found, s = token_losses(cfg, model, tokens, starts, CPU.device).reshape(2, -1), stride_of(cfg)
    model.eval()
    for i, start in enumerate(starts):
        for j, place_ in enumerate(range(start + 32 - s + 1, start + 33)):
            with torch.no_grad():
                logits = model(torch.from_numpy(tokens[start:place_].astype(np.int64))[None])[0][0, -1]
            loss = -float(logits.log_softmax(dim=-1)[int(tokens[place_])])
            assert found[i, j] == pytest.approx(loss, abs=1e-4)


def test_a_trace_is_inside_and_symmetric_and_none_without_training(place):
    summary, words = measure(place, config(place, "trace", **TRACE, arm=("lr=0",)))
    own, still = (a["retrained"] for a in summary["arms"])
    assert own["sequence"]["inside"] < -0.1 < own["elsewhere"]["inside"]
    assert {"low", "high", "p"} == set(own["sequence"]["asymmetry"]["over_seeds"])
    for r in still.values():
        assert r["inside"] == r["asymmetry"]["mean"] == 0 and not any(r["ahead"] + r["behind"])
    assert "became easier" not in words and "6 stretches" in words


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_planted_asymmetry_is_found_with_its_sign(place, monkeypatch, sign):
    def texts(cfg, tokens, at, seed, i):
        ahead, behind = tokens[at.b + 1:at.b + 200], tokens[at.a - 200:at.a]
        return {"sequence": np.asarray(ahead if sign < 0 else behind), "shuffled": np.asarray(tokens[:96]),
                "elsewhere": np.asarray(tokens[-96:])}

    monkeypatch.setattr(stream, "texts_of", texts)
    cfg = config(place, f"planted{sign}", **TRACE | {"intervals": 4, "retrain_steps": 8}, lr=1e-2)
    summary, words = measure(place, cfg)
    e = summary["arms"][0]["retrained"]["sequence"]["asymmetry"]
    assert e["mean"] * sign > 0.3 and e["verdict"] == "signal"
    assert ("became easier" in words) == (sign < 0)


# ------------------------------------------------------------------------------------------------------------
# Parts and options


@pytest.mark.parametrize("options", [WINDOW, TRACE | {"intervals": 2}], ids=["window", "trace"])
def test_a_stopped_run_resumes_to_the_same_summary_whatever_the_order(place, options):
    name = options["experiment"]
    whole, again = (config(place, f"{name}_{which}", **options) for which in ("whole", "again"))
    expected = measure(place, whole)[0]
    assert measure(place, again, parts=1) is None
    log = f"{place.out}/{again.name}/probes.jsonl"
    first = open(log).read()
    assert len(read_rows(log)) == 1
    assert measure(place, again)[0] == expected and open(log).read().startswith(first)
    with open(log, "w") as f:
        f.writelines(json.dumps(r) + "\n" for r in read_rows(f"{place.out}/{whole.name}/probes.jsonl")[::-1])
    assert json.dumps(measure(place, again)[0]) == json.dumps(expected)
    with pytest.raises(UserError, match="holds a run with another configuration:\n  lr: 0.003 -> 0.1"):
        measure(place, replace(again, lr=0.1))


def test_what_cannot_be_measured_is_refused(place):
    for options, message in (
            ({"experiment": "window", "stride": 9, "window_size": 4}, "stride=9 leaves out sentences"),
            ({"sentences": 7}, "sentences must be even"), ({"overlap": 1.0}, "overlap must be"),
            ({"context": -1}, "context must not be negative"), ({"intervals": 0}, "intervals must be"),
            ({"experiment": "trace", "reach": 20}, "reach must be at least 64")):
        with pytest.raises(ConfigError, match=message):
            config(place, "none", **options)
    with pytest.raises(UserError, match="different ones of 8 to 40 tokens; use fewer --sentences"):
        measure(place, config(place, "few", **WINDOW | {"sentences": 2000}))
    with pytest.raises(UserError, match="use a smaller --reach"):
        measure(place, config(place, "short", **TRACE | {"reach": 20000}))
    with pytest.raises(UserError, match=r"as it is, seed 1: loss .*not applied; use a lower --lr"):
        measure(place, config(place, "broken", **WINDOW, lr=1e12))
    assert memory_probe.OTHERS["window"] is stream.window
    assert memory_probe.OTHERS["trace"] is stream.trace
