"""recall_probe.py: its sequences against brute force, its choice of rate, a small real experiment."""
import dataclasses
import itertools
import json
import os
import signal
import types

import recall_probe
from common.config import ConfigError, UserError, load
from common.distributed import Dist
from common.files import read_rows
from model import LM
from recall_probe import TEST, TRAIN, VALIDATION, RecallConfig, sequences, training_batch

import numpy as np
import pytest
import torch
import torch.nn.functional as F

SMALL = {"mixers": ("attention",), "sizes": (32,), "pairs": (1, 2), "seq_len": 8, "vocab_size": 16,
         "batch_size": 32, "steps": 300, "eval_interval": 10, "eval_sequences": 64, "lrs": (2e-2,),
         "stop_at": 0.95, "device": "cpu"}


# ------------------------------------------------------------------------------------------------------------
# Sequences


@pytest.mark.parametrize("n_pairs, seq_len, vocab_size", [(1, 8, 32), (5, 20, 32), (4, 12, 11), (7, 21, 16)])
def test_every_query_asks_for_the_value_that_followed_its_key(n_pairs, seq_len, vocab_size):
    cfg = RecallConfig(pairs=(n_pairs,), seq_len=seq_len, vocab_size=vocab_size)
    half, seen, batch = vocab_size // 2, set(), sequences(cfg, n_pairs, 200, np.random.default_rng(0))
    for tokens, targets, distances in zip(*batch, strict=True):
        tokens, targets, distances = tokens.tolist(), targets.tolist(), distances.tolist()
        keys, values = tokens[0:2 * n_pairs:2], tokens[1:2 * n_pairs:2]
        assert len(set(keys)) == len(set(values)) == n_pairs
        assert all(0 < k < half for k in keys) and all(half <= v < vocab_size for v in values)
        assert targets[:2 * n_pairs] == [-1] * 2 * n_pairs
        asked = []
        for t in range(2 * n_pairs, seq_len):
            if tokens[t] == 0:  # filler
                assert targets[t] == -1 and distances[t] == 0
            else:
                place = tokens.index(tokens[t])  # of its pair: not a value, which would leak an answer
                assert place % 2 == 0 and place < 2 * n_pairs
                assert targets[t] == tokens[place + 1] and distances[t] == t - place
                asked.append(tokens[t])
        assert sorted(asked) == sorted(keys)  # each key once
        seen |= {*keys, *values}
    assert seen == set(range(1, vocab_size))


@pytest.mark.parametrize("power", [0.01, 0.6])
def test_distances_follow_the_power_law(power):
    """Two places are drawn without replacement, and each asks for either pair with equal probability."""
    cfg = RecallConfig(pairs=(2,), seq_len=12, gap_power=power)
    p = np.arange(1, 9) ** (power - 1)
    p /= p.sum()
    expected = [p[x] + sum(p[y] * p[x] / (1 - p[y]) for y in range(8) if y != x) for x in range(8)]
    n = 20_000
    batch = sequences(cfg, 2, n, np.random.default_rng(1))
    asked = batch.targets[:, 4:] >= 0
    assert np.allclose(asked.float().mean(dim=0), expected, atol=4 * 0.5 / n ** 0.5)
    first_pair = asked & (batch.tokens[:, 4:] == batch.tokens[:, :1])
    assert np.allclose(first_pair.float().mean(dim=0), np.array(expected) / 2, atol=4 * 0.5 / n ** 0.5)


def test_batches_depend_only_on_seed_and_step():
    cfg = RecallConfig()
    again = training_batch(dataclasses.replace(cfg, sizes=(8,), mixers=("lstm",), lrs=(1.0,), seeds=9), 3, 7)
    assert all(torch.equal(a, b) for a, b in zip(training_batch(cfg, 3, 7), again, strict=True))
    others = [training_batch(cfg, *key).tokens for key in ((3, 7), (3, 8), (4, 7), (7, 3))]
    others += [sequences(cfg, 2, len(others[0]), np.random.default_rng((3, stream, 2))).tokens
               for stream in (TRAIN, VALIDATION, TEST)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(others, 2))
    queries = (others[0].view(len(cfg.pairs), -1, cfg.seq_len) != 0).sum(dim=2).unique(dim=1)
    assert queries[:, 0].tolist() == [3 * N for N in cfg.pairs]


# ------------------------------------------------------------------------------------------------------------
# Testing a model


def oracle(cfg, reach: int):
    """Knows every answer up to `reach` tokens back, and predicts filler beyond."""
    def hidden(tokens):
        answers = torch.zeros_like(tokens)
        for b, t in itertools.product(*map(range, tokens.shape)):
            row = tokens[b].tolist()
            place = row.index(row[t])
            if row[t] and place < t <= place + reach:
                answers[b, t] = row[place + 1]
        return F.one_hot(answers, cfg.vocab_size).float()
    return types.SimpleNamespace(hidden=hidden, head=lambda x: x, embed=torch.nn.Embedding(1, 1),
                                 train=lambda: None, eval=lambda: None)


def test_accuracy_by_distance():
    cfg = RecallConfig(pairs=(1, 4), seq_len=18, vocab_size=32, batch_size=2, eval_sequences=20)
    results = recall_probe.test(cfg, oracle(cfg, 100), 1, TEST)
    assert [r["accuracy"] for r in results.values()] == [1.0, 1.0]
    results = recall_probe.test(cfg, oracle(cfg, 7), 1, TEST)
    buckets = results["4"]["by_distance"]  # 1, 2-3, 4-7, 8-15, 16-31
    assert sum(asked for _, asked in buckets) == 4 * 4 * 20
    assert all(right == (asked if i < 3 else 0) for i, (right, asked) in enumerate(buckets))
    assert all(asked > 0 for _, asked in buckets[1:])
    assert results["4"]["accuracy"] == pytest.approx(sum(right for right, _ in buckets) / (4 * 4 * 20))
    validation = recall_probe.test(cfg, oracle(cfg, 7), 1, VALIDATION)
    assert sum(asked for _, asked in validation["4"]["by_distance"]) == 4 * 20


def test_state_is_counted_at_the_length_of_a_sequence():
    cfg = RecallConfig(seq_len=48, window=10, n_layers=3, short_conv=3, pairs=(2,))
    d, conv = 16, 3 * 2 * 16  # the last two inputs of each layer's convolution
    models = {mixer: LM(recall_probe.model_config(cfg, mixer, d)) for mixer in recall_probe.MIXERS}
    found = {mixer: recall_probe.state_numbers(cfg, model) for mixer, model in models.items()}
    assert found == {"attention": 3 * 2 * 48 * d + conv, "window": 3 * 2 * 10 * d + conv,
                     "lstm": 3 * 2 * d + conv, "scan": 3 * d + conv, "gated": d}


# ------------------------------------------------------------------------------------------------------------
# The experiment


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two seeds of attention, stopped during the second and resumed."""
    cfg = RecallConfig(**SMALL, seeds=2, out_dir=str(tmp_path_factory.mktemp("recall")))
    with pytest.MonkeyPatch.context() as patch:
        def batch(cfg, seed, step):
            if (seed, step) == (2, 10):
                os.kill(os.getpid(), signal.SIGTERM)
            return training_batch(cfg, seed, step)
        patch.setattr(recall_probe, "training_batch", batch)
        assert recall_probe.main(cfg)["status"] == "stopped"
    folder = os.path.join(cfg.out_dir, cfg.name)
    assert [r["seed"] for r in read_rows(f"{folder}/results.jsonl")] == [1]
    return cfg, folder, recall_probe.main(cfg)


def test_attention_learns_to_recall(finished):
    cfg, folder, result = finished
    (rows,) = result["result"]["arms"]
    assert [r["seed"] for r in rows] == [1, 2]
    for row in rows:
        assert row["solved"] and row["steps"] < cfg.steps
        assert row["test"]["2"]["accuracy"] > 0.9  # guessing among the two values: 0.5
    assert all(r["curve"][-1][0] == r["steps"] for r in read_rows(f"{folder}/results.jsonl"))
    assert os.path.getsize(f"{folder}/recall.png") > 5000
    text = open(f"{folder}/table.md").read()
    found = [100 * r["test"]["2"]["accuracy"] for r in rows]
    assert f"{sum(found) / 2:.1f} ({min(found):.1f}-{max(found):.1f})" in text
    assert "12.5 guessing among all values; 100.0, 50.0 among the N values" in text and "at fault" not in text


def test_the_same_command_trains_only_what_is_missing(finished, monkeypatch):
    cfg, folder, result = finished
    trained, rows = [], read_rows(f"{folder}/results.jsonl")

    def train(cfg, mixer, size, lr, seed, dist, stop):
        trained.append((mixer, size, lr, seed))
        return rows[0] | {"mixer": mixer, "size": size, "lr": lr, "seed": seed}

    monkeypatch.setattr(recall_probe, "train", train)
    same = json.loads(json.dumps(result["result"]["arms"]))  # the file has lists for tuples
    again = recall_probe.main(cfg)
    assert again["result"]["arms"] == same and again["run_id"] == result["run_id"] and not trained
    assert len(read_rows(f"{cfg.out_dir}/ledger.jsonl")) == 1
    lines = open(f"{folder}/results.jsonl").read()
    recall_probe.main(dataclasses.replace(cfg, sizes=(32, 8), lrs=(2e-2, 1e-3), seeds=3))
    assert trained == [("attention", 32, 2e-2, 3), *(("attention", 8, 2e-2, seed) for seed in (1, 2, 3))]
    open(f"{folder}/results.jsonl", "w").write(lines)


def test_an_interrupted_run_ends_like_an_uninterrupted_one(finished):
    cfg, _, result = finished
    dist, stop = Dist(0, 1, torch.device("cpu")), types.SimpleNamespace(requested=False)
    again = recall_probe.train(cfg, "attention", 32, 2e-2, 2, dist, stop)
    row = read_rows(f"{cfg.out_dir}/{cfg.name}/results.jsonl")[1]
    assert all(again[key] == row[key] for key in ("steps", "validation", "curve", "solved"))
    assert again["test"]["2"]["accuracy"] == row["test"]["2"]["accuracy"]


def test_results_of_another_configuration_are_refused(finished):
    cfg, _, _ = finished
    with pytest.raises(UserError, match=r"n_layers: 2 -> 1\n  steps: 300 -> 9\nnothing was run; use another"):
        recall_probe.main(dataclasses.replace(cfg, steps=9, n_layers=1))


def test_the_rate_is_chosen_on_the_first_seed():
    cfg, done = RecallConfig(lrs=(3e-3, 1e-3, 1e-2), seeds=2, seed=5), {}

    def after(lr, seed, validation, solved=False):
        done["lstm", 32, lr, seed] = {"lr": lr, "seed": seed, "validation": validation, "solved": solved}
        rows, todo = recall_probe.progress(cfg, "lstm", 32, done)
        return [r["seed"] for r in rows], todo

    assert recall_probe.progress(cfg, "lstm", 32, done) == ([], (3e-3, 5))
    assert after(3e-3, 5, 0.4) == ([], (1e-3, 5))
    assert after(1e-3, 5, 0.6) == ([], (1e-2, 5))
    assert after(1e-2, 5, 0.5) == ([5], (1e-3, 6))
    assert after(1e-3, 6, 0.1) == ([5, 6], None)
    assert after(3e-3, 5, 0.999, solved=True) == ([5], (3e-3, 6))  # then the others need not be tried


def test_all_mistakes_are_reported_together():
    with pytest.raises(ConfigError) as error:
        load(RecallConfig, ["--mixers=attention,lstn", "--pairs=3,4,20", "--vocab-size=40", "--seq-len=50",
                            "--sizes=", "--steps=0"])
    for expected in (
            "flag --mixers: expected one of attention, window, lstm, scan, gated; got 'lstn'; did you",
            "steps must be at least 1, got 0", "pairs=20 takes 2 * 20 tokens and 20 queries",
            "pairs=20 needs 20 keys, but vocab_size=40 has 19; use --vocab_size=42", "use --seq_len=60",
            "batch_size=64 is not a multiple of 3", "sizes needs at least one number"):
        assert expected in str(error.value), expected
    with pytest.raises(ConfigError, match="attention of size 15: pos=rope rotates pairs"):
        RecallConfig(sizes=(15,))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    cfg = RecallConfig(**SMALL | {"lrs": (1e30,), "steps": 10}, out_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"attention of size 32, lr 1e\+30, step \d+: loss nan, .*; remove"):
        recall_probe.main(cfg)


def test_dry_run_shows_what_is_left(finished, capsys):
    cfg, folder, _ = finished
    before = os.listdir(folder)
    recall_probe.main(dataclasses.replace(cfg, sizes=(32, 16), dry_run=True))
    text = capsys.readouterr().out
    assert "1 x 2 = 2 arms" in text and "done, 2 seeds" in text and "next: lr 0.02, seed 1" in text
    assert os.listdir(folder) == before
