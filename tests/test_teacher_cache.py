"""common/teacher_cache.py and cache_writer.py: against dense probabilities, unbiased, whole or absent."""
import os
import re
import shutil
import socket
import time
from types import SimpleNamespace

from common import cache_writer, teacher_cache
from common.cache_writer import Source, estimate, write
from common.config import UserError
from common.distill_loss import Mix, cached_loss, two_headed_loss
from common.distributed import Dist
from common.teacher_cache import (
    Kind,
    cache_problems,
    decode,
    draw,
    encode,
    identity_of,
    open_cache,
    parse,
    record_bytes,
)
from model import LM, ModelConfig

import numpy as np
import pytest
import torch

ROWS, T, V = 11, 20, 57  # V: below the 61 rows of the heads
CPU = Dist(0, 1, torch.device("cpu"))


class Examples:
    """Rows of random ids. Of every third the targets are scattered, of another none counts."""
    per_epoch, seq_len, fingerprint = ROWS, T, "abc"

    def __init__(self):
        rng = np.random.default_rng(0)
        self.x, self.y = rng.integers(V, size=(2, ROWS, T))
        self.y[::3][rng.random((len(self.y[::3]), T)) < 0.5] = -1
        self.y[1, 5:], self.y[4] = -1, -1
        self.counts = (self.y >= 0).sum(axis=1)

    def pairs(self, index):
        return self.x[index], self.y[index]


def teacher(seed: int) -> LM:
    torch.manual_seed(seed)
    model = LM(ModelConfig(vocab_size=61, d_model=16, n_layers=1, n_heads=2, max_seq_len=T)).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def source(kind="topk:5", temperature=1.0, batch_size=4, dist=CPU, seeds=(0, 1), examples=None) -> Source:
    return Source(examples or Examples(), [teacher(seed) for seed in seeds], V, parse(kind), temperature, 7,
                  batch_size, dist, "fp32")


def identity(s: Source, **changed) -> dict:
    return identity_of("out/big", "bytes", "data/x", s.examples, V, s.kind, s.temperature) | changed


def written(folder, s: Source):
    assert write(str(folder), identity(s), s)
    return open_cache(str(folder), identity(s))


@torch.no_grad()
def dense(s: Source):
    """(R, T, V): the mean of the teachers' probabilities, by a full softmax."""
    x = torch.from_numpy(s.examples.x)
    return torch.stack([(t(x)[0][..., :V] / s.temperature).softmax(-1) for t in s.teachers]).mean(0)


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch):
    monkeypatch.setattr(cache_writer, "LOGITS", 9 * V)


# ------------------------------------------------------------------------------------------------------------
# What is in it


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["topk:5", "topk_tail:5", "sampled:6", f"topk:{V}", f"topk_tail:{V}"])
def test_against_dense_probabilities(kind, temperature, tmp_path):
    """Two teachers, heads with padding rows, rows without targets; fp16 has a relative error of 2^-11."""
    s = source(kind, temperature)
    cache, p, index = written(tmp_path / "a" / "c", s), dense(s), np.array([3, 0, 4, 10, 3, 1])
    ids, probs, tail, entropy = cache.rows(index, torch.device("cpu"))
    p, counted = p[index], torch.from_numpy(s.examples.y[index] >= 0)
    for part in (ids, probs, entropy, *(() if tail is None else (tail,))):
        assert not part[~counted].any() and part.isfinite().all() and part.shape[:2] == (6, T)
    ids, probs, entropy, p = ids[counted], probs[counted], entropy[counted], p[counted]
    assert ids.dtype == torch.int64 and probs.dtype == entropy.dtype == torch.float32 and ids.max() < V
    top = p.topk(min(s.kind.n, V))
    if s.kind.name == "sampled":
        assert tail is None and (probs == 1 / s.kind.n).all()
        torch.testing.assert_close(entropy, torch.special.entr(p).sum(-1), rtol=2**-11, atol=1e-5)
        return
    assert torch.equal(ids, top.indices)
    expected = top.values
    if s.kind.name == "topk":
        assert tail is None
        expected = expected / expected.sum(-1, keepdim=True)
        full = probs
    else:
        torch.testing.assert_close(tail[counted], 1 - expected.sum(-1), rtol=2**-10, atol=1e-6)
        full = torch.cat((probs, tail[counted][:, None]), dim=-1)
    torch.testing.assert_close(probs, expected, rtol=2**-10, atol=1e-6)
    torch.testing.assert_close(full.sum(-1), torch.ones(len(p)))
    torch.testing.assert_close(entropy, torch.special.entr(full).sum(-1))


@pytest.mark.parametrize("vocab_size", [2**16, 2**16 + 1, 151_936, 2**20])
@pytest.mark.parametrize("kind", [Kind("topk", 3), Kind("topk_tail", 3), Kind("sampled", 4)])
def test_large_ids_make_a_round_trip(kind, vocab_size):
    p = torch.zeros(2, vocab_size)
    p[0, -1], p[0, 7], p[0, 300], p[1, vocab_size // 2] = 0.7, 0.2, 0.1, 1.0
    records = encode(p, kind, torch.tensor([[0.0, 0.15, 0.25, 0.999]]).expand(2, 4).double())
    assert records.shape == (2, record_bytes(kind, vocab_size)) and records.dtype == np.uint8
    ids = decode(records, kind, vocab_size)[0]
    expected = [7, 7, 300, vocab_size - 1] if kind.name == "sampled" else [vocab_size - 1, 7, 300]
    assert ids[0].tolist() == expected and ids[1, 0] == vocab_size // 2


def test_bytes_per_token():
    """The bar for sampled:32 at Qwen's vocabulary, everything in the folder counted: 130."""
    kind = parse("sampled:32")
    assert record_bytes(kind, 151_936) == 98 and record_bytes(kind, 50_257) == 66
    examples = SimpleNamespace(per_epoch=1000, seq_len=512, counts=np.full(1000, 100))  # mostly padding
    assert sum(Source(examples, [], 151_936, kind, 1.0, 0, 1, CPU, "fp32").sizes().values()) / 1e5 < 99


def test_unbiased():
    """Over many draws the mean distribution is the teacher's within 4 standard errors, unlike topk's."""
    kind, draws = Kind("sampled", 8), 20_000
    p = (2 * torch.randn(1, 12, generator=torch.Generator().manual_seed(0))).softmax(-1)
    u = torch.from_numpy(np.random.default_rng(1).random((draws, 8)))
    ids, probs, *_ = decode(encode(p.expand(draws, -1), kind, u), kind, 12)
    mean = torch.zeros(draws, 12).scatter_add(1, ids, probs).mean(0)
    error = (p * (1 - p) / 8 / draws).sqrt()
    assert ((mean - p).abs() < 4 * error).all()
    ids, probs, *_ = decode(encode(p, Kind("topk", 8)), Kind("topk", 8), 12)
    assert ((torch.zeros(1, 12).scatter_add(1, ids, probs) - p).abs() > 4 * error).any()


def test_the_mean_gradient_over_draws_is_the_full_gradient():
    """Of a student's head, over 400 draws at temperature 2, within 4.5 standard errors for every weight; one
    draw's is off by more than its own size for a fifth of them."""
    s, mix, student = source("sampled:3", 2.0), Mix("forward_kl", 1.0, 2.0), teacher(5)
    x, y = (torch.from_numpy(a) for a in s.examples.pairs(np.arange(ROWS)))
    weight, counted = student.head.weight[:V].detach().requires_grad_(), y >= 0
    p = torch.cat(list(s.probabilities(x, counted)))
    with torch.no_grad():
        h, *theirs = (model.hidden(x)[counted] for model in (student, *s.teachers))

    def loss_and_gradient(loss, given):
        value = loss(h, weight, None, y[counted], given, mix)[0]
        return value.item(), torch.autograd.grad(value, weight)[0]

    def one_draw(seed):
        u = torch.from_numpy(np.random.default_rng(seed).random((len(p), 3)))
        return loss_and_gradient(cached_loss, decode(encode(p, s.kind, u), s.kind, V))

    loss, expected = loss_and_gradient(two_headed_loss, [(a, t.head.weight, t.head.bias)
                                                         for a, t in zip(theirs, s.teachers, strict=True)])
    losses, gradients = zip(*map(one_draw, range(400)), strict=True)
    gradients = torch.stack(gradients)  # (400, V, C)
    assert ((gradients.mean(dim=0) - expected).abs() < 4.5 * gradients.std(dim=0) / 20 + 1e-7).all()
    assert ((gradients[0] - expected).abs() > expected.abs()).float().mean() > 0.2
    assert abs(np.mean(losses) - loss) < 4 * np.std(losses) / 20 + 4e-3  # entropies are in fp16


def test_draws_of_small_probabilities():
    """100,000 ids of 1e-8 each after one of 0.999: in float32 many of them could never be drawn."""
    p = torch.full((1, 100_001), 1e-8)
    p[0, 0] = 0.999
    total = p.double().sum()
    u = (p[0].double().cumsum(0) / total - 0.5e-8)[None, 1:]  # the middle of each one's interval
    assert torch.equal(draw(p, u), torch.arange(1, 100_001)[None])
    assert draw(p, torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64)).tolist() == [[0, 100_000]]


def files(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("tokens.bin", "counted.bin", "offsets.bin")}


def test_independent_of_batch_size(tmp_path):
    for batch_size in (1, 3, 64):
        written(tmp_path / str(batch_size), source("sampled:6", 2.0, batch_size))
    assert files(tmp_path / "1") == files(tmp_path / "3") == files(tmp_path / "64")


def one_of_two(rank, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    with Dist(rank, 2, torch.device("cpu")) as dist:
        s = source("sampled:6", 2.0, 3, dist)
        lines = estimate(folder, s)
        assert open_cache(folder, identity(s)) is None
        assert written(folder, s) and (rank or not lines.append("")) and "sampled:6" in lines[0]
        assert not write(folder + "_stopped", identity(s), s, stop=stop_at(2 if rank else 99, dist))


def stop_at(batch: int, dist=CPU):
    """A stop request that comes in this batch."""
    count = iter(range(1, 100))
    return SimpleNamespace(agreed=lambda d: dist.sum(float(next(count) >= batch))[0] > 0)


def test_two_processes_write_what_one_writes(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    args = (port, str(tmp_path / "two"))  # by fork, since importing torch takes longer than all the rest
    torch.multiprocessing.start_processes(one_of_two, args, nprocs=2, start_method="fork")
    written(tmp_path / "one", source("sampled:6", 2.0))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


# ------------------------------------------------------------------------------------------------------------
# Options and estimates


@pytest.mark.parametrize("spec", ["", "topk", "topk:", "topk:0", "topk:-3", "sampled:1.5", "top:5",
                                  "sampled:8:9", "topk+tail:5", "sampled:²"])
def test_wrong_kinds(spec):
    with pytest.raises(UserError, match="expected topk:N, topk_tail:N or sampled:N"):
        parse(spec)
    assert len(cache_problems(spec, 1.0, "forward_kl")) == 1


def test_option_problems():
    for spec, temperature in (("topk:5", 1.0), ("topk:5", 2.0), ("topk_tail:5", 1.0), ("sampled:5", 2.0)):
        assert not cache_problems(spec, temperature, "forward_kl")
    found = cache_problems("topk_tail:5", 2.0, "reverse_kl")
    assert len(found) == 2 and "temperature 1, topk:5 or sampled:5" in found[0] and "forward_kl" in found[1]


def brute_force_ece(p, y) -> float:
    total = 0.0
    for b in range(15):
        inside = [i for i in range(len(p)) if b / 15 <= float(p[i].max()) < (b + 1) / 15 or
                  b == 14 and float(p[i].max()) == 1]
        if inside:
            confidence = sum(float(p[i].max()) for i in inside) / len(inside)
            accuracy = sum(int(p[i].argmax()) == int(y[i]) for i in inside) / len(inside)
            total += len(inside) / len(p) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("kind", ["topk:5", "topk_tail:5", "sampled:6"])
def test_estimate(kind, tmp_path):
    """Fewer rows than the sample has: it is then all of them."""
    s = source(kind)
    s.examples.y[s.examples.y >= 0] = dense(s).argmax(-1).numpy()[s.examples.y >= 0]  # so that some are right
    size, error, calibration = estimate(str(tmp_path / "c"), s)
    counted = torch.from_numpy(s.examples.y >= 0)
    p, y = dense(s)[counted], torch.from_numpy(s.examples.y)[counted]
    ids, probs, tail, _ = (a if a is None else a[counted]
                           for a in written(tmp_path / "c", s).rows(np.arange(ROWS), "cpu"))
    q = torch.zeros_like(p).scatter_add(1, ids, probs)
    if tail is not None:
        q[q == 0] = (tail / (V - 5)).repeat_interleave(V - 5)
    said = [float(a) for a in re.findall(r"(\d\.\d+) of the", calibration)]
    assert said == [pytest.approx(brute_force_ece(a, y), abs=6e-5) for a in (p, q)]
    on_disk = sum(e.stat().st_size for e in os.scandir(tmp_path / "c") if e.name != "meta.json")
    assert f"{len(y):,} tokens x {on_disk / len(y):.1f} bytes" in size and "GB free" in size
    if s.kind.name == "sampled":
        assert f"standard error {((1 - p.square().sum(-1)).mean() / 6) ** 0.5:.4f}" in error
    else:
        assert f"{p.topk(5).values.sum(-1).mean():.2%} of the mass" in error
        assert f"total variation from the teacher {((p - q).abs().sum(-1) / 2).mean():.4f}" in error


def test_a_full_disk_is_seen_before(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    s = source()
    for action in (lambda: estimate(str(tmp_path / "x" / "c"), s), lambda: write(str(tmp_path / "c"), {
            "kind": "topk:5", "temperature": 1.0}, s)):
        with pytest.raises(UserError, match="needs 0.000 GB for topk:5, but its disk has 0.000 GB free"):
            action()
    assert not os.listdir(tmp_path)


def test_more_ids_than_the_vocabulary(tmp_path):
    with pytest.raises(UserError, match=f"only {V} ids; use topk:{V}"):
        estimate(str(tmp_path / "c"), source(f"topk:{V + 1}"))


# ------------------------------------------------------------------------------------------------------------
# Whole or absent


def test_another_identity(tmp_path):
    s, folder = source(), str(tmp_path / "c")
    written(folder + "/", s)
    other = identity(s, teacher="out/small", tokenizer="bpe", data="y", windows="w", kind="topk:6",
                     temperature=2.0, vocabulary=99)
    with pytest.raises(UserError) as e:
        open_cache(folder, other)
    for key, value in other.items():
        assert f"\n  {key}: {identity(s)[key]} in the cache, {value} now" in str(e.value)
    assert f"rm -r {folder}" in str(e.value)
    with pytest.raises(UserError, match="already exists"):
        write(folder, identity(s), s)


@pytest.mark.parametrize("name", ["tokens.bin", "counted.bin", "offsets.bin", "meta.json"])
@pytest.mark.parametrize("missing", [True, False])
def test_a_damaged_file(name, missing, tmp_path):
    s = source()
    written(tmp_path / "c", s)
    os.remove(tmp_path / "c" / name) if missing else os.truncate(tmp_path / "c" / name, 30)
    with pytest.raises(UserError, match=f"{name}|JSON|whole") as e:
        open_cache(str(tmp_path / "c"), identity(s))
    assert "rm -r" in str(e.value)


def test_an_error_or_a_stop_leaves_nothing(tmp_path, monkeypatch):
    s, folder = source(batch_size=2), str(tmp_path / "c")
    assert not write(folder, identity(s), s, stop=stop_at(3))
    calls = iter(range(5))
    monkeypatch.setattr(cache_writer, "encode", lambda *a: next(calls) < 4 and encode(*a))
    with pytest.raises(AttributeError):
        write(folder, identity(s), s)
    assert open_cache(folder, identity(s)) is None and not os.listdir(tmp_path)


def test_a_killed_writer(tmp_path):
    """kill -9 halfway leaves no folder of that name; the next writer removes what is left."""
    folder = str(tmp_path / "c")
    s, slowly = source(batch_size=1), SimpleNamespace(agreed=lambda dist: time.sleep(0.2))
    args = folder, identity(s), s, slowly
    writer = torch.multiprocessing.get_context("fork").Process(target=write, args=args)
    writer.start()
    while not os.listdir(tmp_path):
        assert writer.is_alive()
        time.sleep(0.05)
    time.sleep(0.3)
    writer.kill()
    writer.join()
    assert os.listdir(tmp_path) == [f".c.tmp-{writer.pid}"]
    assert open_cache(folder, identity(s)) is None
    assert written(folder, s) and os.listdir(tmp_path) == ["c"]


def test_counts_that_are_not_those_of_the_targets(tmp_path):
    examples = Examples()
    examples.counts[2] -= 1
    with pytest.raises(AssertionError, match="row 2"):
        written(tmp_path / "c", source(examples=examples))
    assert not os.listdir(tmp_path)


def test_a_kind_without_code_is_refused():
    with pytest.raises(NotImplementedError, match="other"):
        encode(torch.ones(1, 3), teacher_cache.Kind("other", 1))
