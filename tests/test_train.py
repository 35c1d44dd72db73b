"""train.py: exact resume, kills, signals, processes, evaluation, refusals - on real small runs."""
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import train
from common import checkpoint, data, distributed
from common.config import ConfigError, UserError, load
from common.files import read_rows
from common.run import Run
from common.step import backward, update
from model import LM
from muon import Muon, set_learning_rates
from tests.conftest import started

import pytest
import torch

CPU = torch.device("cpu")
CONFIGS = Path("config").resolve()


def losses(cfg) -> list[tuple]:
    """All that a run logged and that must not depend on when it was stopped."""
    rows = read_rows(os.path.join(cfg.out_dir, cfg.name, "metrics.jsonl"))
    return [(r["step"], r.get("train_loss"), r.get("grad_norm"), r.get("val_loss"), r.get("mean_train_loss"))
            for r in rows]


def final(cfg, name="last.pt") -> dict:
    return torch.load(os.path.join(cfg.out_dir, cfg.name, name), weights_only=True)


def assert_equal(a, b, where):
    """Nested values that are equal to the last bit of every tensor."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_run(a, b):
    assert losses(a) == losses(b)
    for name in ("last.pt", "best.pt"):
        one, two = final(a, name), final(b, name)
        for key, value in one["model"].items():
            assert torch.equal(value, two["model"][key]), f"{name}: {key}"
        assert_equal(one["optimizer"], two["optimizer"], f"{name}: optimizer")
        for key in ("best", "step"):
            assert one["progress"][key] == two["progress"][key]


def signal_at(monkeypatch, step, number=signal.SIGTERM, script=train):
    """The process gets a signal while it computes this step."""
    real = script.set_learning_rates

    def set_learning_rates(optimizer, cfg, now, steps):
        if now == step:
            os.kill(os.getpid(), number)
        return real(optimizer, cfg, now, steps)

    monkeypatch.setattr(script, "set_learning_rates", set_learning_rates)


# ------------------------------------------------------------------------------------------------------------
# Stopping and continuing


@pytest.mark.parametrize("number, options", [
    (signal.SIGTERM, {}), (signal.SIGINT, {}),
    (signal.SIGTERM, {"dropout": 0.2, "micro_batch_size": 2, "dtype": "bf16"}),
    (signal.SIGINT, {"dtype": "fp16", "head_samples": 50}),
    (signal.SIGTERM, {"optimizer": "muon", "muon_warmup_steps": 8, "embed_lr": 3e-3}),
    (signal.SIGINT, {"optimizer": "sgd", "schedule": "wsd", "epochs": 0.05, "max_steps": 0,
                     "eval_interval": 0})])
def test_a_stopped_run_continues_as_if_never_stopped(small, monkeypatch, capsys, options, number):
    whole, parts = small(name="whole", **options), small(name="parts", **options)
    train.main(whole)
    signal_at(monkeypatch, 6, number)
    assert train.main(parts)["status"] == "stopped"
    assert "stopped at step 7 of" in capsys.readouterr().out
    assert final(parts)["progress"]["step"] == 7
    monkeypatch.undo()
    summary = train.main(parts)
    assert summary["status"] == "finished" and summary["counts"]["sessions"] == 2
    assert_same_run(whole, parts)


def test_a_stop_during_evaluation_repeats_the_evaluation(small, monkeypatch):
    whole, parts = small(name="whole"), small(name="parts")
    train.main(whole)
    real = data.eval_batches

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from real(*args)

    monkeypatch.setattr(data, "eval_batches", interrupted)
    assert train.main(parts)["status"] == "stopped"
    assert final(parts)["progress"]["step"] == 10 and final(parts)["progress"]["evaluated"] == 0
    monkeypatch.undo()

    def killed(path, state):
        raise RuntimeError("killed")

    monkeypatch.setattr(checkpoint, "save", killed)  # after the evaluation was logged, before it was saved
    with pytest.raises(RuntimeError, match="killed"):
        train.main(parts)
    monkeypatch.undo()
    train.main(parts)
    assert_same_run(whole, parts)


def test_sessions_of_limited_length_give_the_identical_curve(small):
    whole, parts = small(name="whole", dropout=0.1), small(name="parts", dropout=0.1, max_minutes=1e-6)
    train.main(whole)
    sessions = 1
    while train.main(dataclasses.replace(parts))["status"] == "stopped":
        sessions += 1
    assert sessions >= 20  # each ends after its first step
    assert_same_run(whole, parts)
    assert len(read_rows(os.path.join(parts.out_dir, "ledger.jsonl"))) == 2


KILLED_RUNS = """
import os, signal, sys
import matplotlib.figure, torch  # before the forks, so that a session of a tenth of a second gets somewhere
import train

torch.set_num_threads(1)
options = eval(sys.argv[1])

def session(prepare) -> int:
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        prepare()
        try:
            train.main(train.TrainConfig(**options))
            os._exit(0)
        except BaseException as e:
            open(options["out_dir"] + "/error", "a").write(repr(e))
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def die_at(call, name):  # kill -9 at the n-th os.fsync or os.replace: before, between and after the writes
    real, count = getattr(os, name), [0]
    def dying(*args):
        count[0] += 1
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    setattr(os, name, dying)

codes = [session(lambda: die_at(call, name)) for call in range(1, 12) for name in ("fsync", "replace")]
codes.append(session(lambda: None))
print("killed", sum(c == -9 for c in codes), "last", codes[-1])
"""


@pytest.mark.parametrize("minutes, steps", [  # between saves; with 5 an evaluation makes the first one
    (5.0, 20), pytest.param(5.0, 40, marks=pytest.mark.slow), pytest.param(0.0, 40, marks=pytest.mark.slow)])
def test_kill_9_while_files_are_written_loses_nothing(small, minutes, steps):
    """Kills at random moments are in tests/kills.py."""
    options = {"save_minutes": minutes, "max_steps": steps, "dropout": 0.1}
    whole, parts = small(name="whole", **options), small(name="parts", **options)
    os.makedirs(parts.out_dir)
    train.main(whole)
    done = subprocess.run([sys.executable, "-c", KILLED_RUNS, str(dataclasses.asdict(parts))],
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    error = Path(parts.out_dir, "error")
    said = error.read_text() if error.exists() else ""
    assert done.returncode == 0 and not said, done.stderr + said
    killed, last = (int(w) for w in done.stdout.split()[1::2])
    assert killed >= 5 and last == 0
    assert_same_run(whole, parts)


def test_sigterm_exits_with_0_and_prints_the_command(small, tmp_path):
    cfg = small(max_steps=100_000, eval_interval=50_000)
    (tmp_path / "long.py").write_text("\n".join(f"{k} = {v!r}" for k, v in dataclasses.asdict(cfg).items()
                                                if k not in ("name", "vocab_size")))
    process = subprocess.Popen([sys.executable, "train.py", str(tmp_path / "long.py")],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if "starting" in line:
            break
    metrics = tmp_path / "out/long/metrics.jsonl"
    while not metrics.exists() and process.poll() is None:
        pass
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(60) == 0
    assert f"continue with:  python train.py {tmp_path / 'long.py'}" in rest
    assert checkpoint.load(str(tmp_path / "out/long"))["progress"]["step"] > 0


def test_an_ended_run_stays_as_it_is(small):
    first = train.main(small())
    before = Path(small().out_dir, "run/last.pt").read_bytes()
    again = train.main(small())
    assert again["status"] == "finished" and again["run_id"] == first["run_id"]
    assert Path(small().out_dir, "run/last.pt").read_bytes() == before
    assert len(read_rows(os.path.join(small().out_dir, "ledger.jsonl"))) == 1


def test_another_config_is_refused_with_the_differences(small, corpus):
    train.main(small(max_steps=2))
    kept = Path(small().out_dir, "run/last.pt").read_bytes()
    with pytest.raises(UserError, match=r"(?s)another configuration \(at step 2\):.*"
                                        r"lr: 0.003 -> 0.004\n  max_steps: 2 -> 30\n"
                                        r".*--name=OTHER.*--overwrite.*--init_from"):
        train.main(small(max_steps=30, lr=4e-3, save_minutes=1.0))
    assert Path(small().out_dir, "run/last.pt").read_bytes() == kept
    # where and how fast may change
    train.main(small(max_steps=2, micro_batch_size=4, prompts=("x",), device="auto"))
    assert train.main(small(max_steps=3, overwrite=True))["counts"]["steps"] == 3


def test_a_run_with_best_alone_resumes_from_it(small):
    """As after a kill between the first evaluation's two saves, or when somebody deleted last.pt."""
    whole, parts = small(name="whole"), small(name="parts")
    train.main(whole)
    train.main(parts)
    os.remove(os.path.join(parts.out_dir, "parts/last.pt"))
    assert final(parts, "best.pt")["progress"]["step"] > 0
    assert train.main(parts)["status"] == "finished"
    assert_same_run(whole, parts)
    os.remove(os.path.join(parts.out_dir, "parts/last.pt"))
    with pytest.raises(UserError, match="another configuration"):
        train.main(dataclasses.replace(parts, lr=1.0))


def test_two_trainings_in_one_folder_are_refused(small):
    with Run(small(), distributed.Dist(0, 1, CPU), "train"):
        with pytest.raises(UserError, match="another process is working in"):
            train.main(small())
    train.main(small(max_steps=1))


def test_training_goes_on_from_other_weights(small, bpe_corpus):
    train.main(small(name="first"))
    first = small(name="first")
    source = os.path.join(first.out_dir, "first")
    second = small(name="second", init_from=source, max_steps=1, lr=0.0)
    train.main(second)
    weights = final(first, "best.pt")["model"]
    assert all(torch.equal(v, weights[k]) for k, v in final(second)["model"].items())
    with pytest.raises(ConfigError, match="d_model=48, but .*first has d_model=32: leave the option out"):
        train.main(small(name="third", init_from=source, d_model=48))
    with pytest.raises(UserError, match="(?s)was trained with the tokenizer bytes.*"
                                        "is tokenised with bpe:400.*--tokenizer_from"):
        train.main(small(name="fourth", init_from=source, data=bpe_corpus))


# ------------------------------------------------------------------------------------------------------------
# Processes


def torchrun(cfg, world, script="train.py"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}",
               script]
    command += [f"--{k}={value}" for k, v in dataclasses.asdict(cfg).items()
                for value in (v if isinstance(v, tuple) else (v,))]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def assert_close_run(a, b, rel_tol=2e-5):
    assert len(losses(a)) == len(losses(b)) > 20
    for one, two in zip(losses(a), losses(b), strict=True):
        assert [v is None for v in one] == [v is None for v in two]
        pairs = [(x, y) for x, y in zip(one, two, strict=True) if x is not None]
        assert all(math.isclose(x, y, rel_tol=rel_tol) for x, y in pairs), (one, two)


@pytest.mark.parametrize("name, rel_tol", [
    ("adamw", 2e-5), pytest.param("muon", 1e-3, marks=pytest.mark.slow)])  # Muon works in bf16 where fast
def test_two_processes_equal_one_and_continue_on_one(small, name, rel_tol):
    """With dropout, a sampled softmax and accumulation: one process runs 4 micro-batches, each of two runs 2
    of the same. Muon's matrices are shared out, its state is not."""
    options = {"dropout": 0.1, "micro_batch_size": 2, "eval_lens": (16,), "optimizer": name,
               "head_samples": 99}
    one, two, moved = (small(name=n, **options) for n in ("one", "two", "moved"))
    train.main(one)
    out = torchrun(two, 2)
    assert "2 processes x 2 accumulated x 2 = 8 sequences" in out
    assert_close_run(one, two, rel_tol)
    torchrun(dataclasses.replace(moved, max_minutes=1e-6), 2)  # ends after one step
    assert final(moved)["progress"]["step"] == 1
    assert train.main(moved)["status"] == "finished"
    assert_close_run(one, moved, rel_tol)


def test_a_batch_that_does_not_split_is_refused(small):
    message = "batch_size=8 does not split into 3 processes x micro_batch_size=2; use --batch_size=12"
    with pytest.raises(UserError, match=message):
        train.make_plan(small(), 3, 100, 2)
    with pytest.raises(ConfigError, match="micro_batch_size=3 does not divide batch_size=8"):
        small(micro_batch_size=3)


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"pos": "rope", "window": 5, "activation": "swiglu"}])
def test_activations_made_again_give_the_same_run(small, options):
    kept, again = small(name="kept", **options), small(name="again", **options)
    train.main(kept)
    train.main(dataclasses.replace(again, checkpoint_activations=True))
    for one, two in zip(losses(kept), losses(again), strict=True):
        # validation losses are summed in other batches, as less memory is taken to be there
        assert one[:2] == two[:2]
        for a, b in zip(one, two, strict=True):
            assert a == b or math.isclose(a, b, rel_tol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# Evaluation


def test_early_stopping_keeps_the_best(small):
    # nothing is learned at learning rate 0, so the first evaluation stays the best
    summary = train.main(small(lr=0.0, eval_interval=2, patience=3))
    assert summary["status"] == "early stop" and summary["counts"]["steps"] == 8
    assert summary["result"]["step"] == 2
    assert final(small(), "best.pt")["progress"]["step"] == 2
    assert train.main(small(lr=0.0, eval_interval=2, patience=3))["status"] == "early stop"


def test_evaluation_at_other_lengths_and_samples(small):
    cfg = small(pos="rope", eval_lens=(8, 64), prompts=("The ", "if"), max_steps=10)
    train.main(cfg)
    row = [r for r in read_rows(os.path.join(cfg.out_dir, "run/metrics.jsonl")) if "val_loss" in r][-1]
    by_length = row["val_loss_by_length"]
    assert list(by_length) == ["32", "8", "64"] and by_length["32"] == row["val_loss"]
    assert len(set(by_length.values())) == 3
    assert list(row["samples"]) == ["The ", "if"] and all(row["samples"].values())
    assert Path(cfg.out_dir, "run/samples.txt").read_text().startswith("=== step 10, validation loss")
    assert Path(cfg.out_dir, "run/loss.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match="goes past the learned positions"):
        small(eval_lens=(64,))


def test_evaluations_happen_once_an_epoch_or_at_the_interval(small):
    plan = train.Plan(world=1, micro=8, accumulation=1, per_epoch=20, steps=9)
    by_epoch = [s for s in range(1, 10) if plan.evaluates(s, small(eval_interval=0))]
    assert by_epoch == [3, 5, 8, 9]  # 20, 40 and 60 windows are passed in steps 3, 5 and 8; 9 is the end
    assert [s for s in range(1, 10) if plan.evaluates(s, small(eval_interval=4))] == [4, 8, 9]


# ------------------------------------------------------------------------------------------------------------
# Precision, optimiser, guards


def test_bf16_and_fp16_learn_what_fp32_learns(small):
    best = {
        dtype: train.main(small(name=dtype, dtype=dtype, max_steps=60, eval_interval=60))["result"]["loss"]
        for dtype in ("fp32", "bf16", "fp16")
    }
    assert best["fp32"] < 3.4  # from ln 257 = 5.55
    assert all(abs(v - best["fp32"]) < 0.05 for v in best.values()), best


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_optimiser_equals_torch_by_hand(small, name):
    cfg = small(optimizer=name, max_steps=5, eval_interval=5, schedule="constant", weight_decay=0.3,
                grad_clip=0.5, lr=1e-2)
    train.main(cfg)
    cfg.vocab_size = cfg.n_tokens = 257
    torch.manual_seed(cfg.seed)
    model = LM(cfg)
    tokens = data.open_tokens(cfg.data, "train", data.read_meta(cfg.data))
    windows = data.Windows(tokens, 32, cfg.seed)
    decay = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() == 1 or "embed" in n]
    groups = [{"params": decay, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    if name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    elif name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
    else:
        groups[0] |= {"kind": "muon", "lr": 0.02, "parts": [
            [32, 32, 32] if p.size(0) == 96 else [p.size(0)] for p in decay]}
        optimizer = Muon(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(5):
        loss, _ = model(*windows.batch(8 * step, 8, CPU))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if name == "muon":
            groups[0]["momentum"] = 0.85 + 0.1 * step / 300
        optimizer.step()
    for key, value in final(cfg)["model"].items():
        torch.testing.assert_close(value, model.state_dict()[key], atol=3e-5, rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_update(small, monkeypatch):
    message = r"not finite at step \d+: loss .*\n.*--lr=1.0e-03 --warmup_steps=100"  # not a third of 1e30
    with pytest.raises(UserError, match=message):
        train.main(small(name="first", optimizer="sgd", lr=1e30, schedule="constant", grad_clip=0.0))
    cfg, real = small(), LM.forward

    def broken(self, *args, **kwargs):
        loss, state = real(self, *args, **kwargs)
        saved = os.path.exists(os.path.join(cfg.out_dir, "run/last.pt"))
        return (loss * math.nan if self.training and saved else loss), state

    monkeypatch.setattr(LM, "forward", broken)
    with pytest.raises(UserError, match="not finite at step 11: loss nan.*\n.*--init_from=.*last.pt"):
        train.main(cfg)
    assert final(cfg)["progress"]["step"] == 10
    assert all(v.isfinite().all() for v in final(cfg)["model"].values())


def test_a_validation_loss_that_is_not_finite_is_not_saved(small, monkeypatch):
    real = LM.forward

    def broken(self, *args, **kwargs):
        loss, state = real(self, *args, **kwargs)
        return (loss if self.training else loss * math.nan), state

    monkeypatch.setattr(LM, "forward", broken)
    with pytest.raises(UserError, match="not finite at step 11: validation loss nan; not saved"):
        train.main(small())
    assert not os.path.exists(os.path.join(small().out_dir, "run/last.pt"))


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(small):
    train.main(small(name="eager", max_steps=3))
    train.main(small(name="compiled", max_steps=3, compile=True))
    for a, b in zip(losses(small(name="eager")), losses(small(name="compiled")), strict=True):
        assert all(math.isclose(x, y, rel_tol=1e-4) for x, y in zip(a, b, strict=True) if x is not None)


# ------------------------------------------------------------------------------------------------------------
# Plan and configs


def test_dry_run_prints_the_plan_and_writes_nothing(small, capsys):
    cfg = small(dry_run=True, epochs=2.0, max_steps=0, batch_size=16, micro_batch_size=4)
    result, out = train.main(cfg), capsys.readouterr().out
    windows = (data.read_meta(cfg.data)["splits"]["train"]["tokens"] - 32) // 32
    steps, n = math.ceil(2 * windows / 16), result["parameters"]["total"]
    assert result["steps"] == steps and not os.path.exists(cfg.out_dir)
    for expected in (f"parameters  {n:,} (",
                     "1 process x 4 accumulated x 4 = 16 sequences; x 32 = 512 tokens a step",
                     f"{windows:,} windows x 32 = {windows * 32:,} tokens; "
                     f"D/N {windows * 32 / n:.2f}:1 (Chinchilla 20:1)",
                     f"{steps:,} steps = ", f"= {steps * 512:,} tokens; D/N {steps * 512 / n:.2f}:1",
                     "MFLOPs per token", "memory"):
        assert expected in out, expected


def test_a_length_by_time_is_measured_once_and_kept(small, monkeypatch, capsys):
    options = {"epochs": -1.0, "max_steps": 0, "schedule": "wsd", "decay_fraction": 0.5, "min_lr_ratio": 0.0}
    monkeypatch.setattr(train, "step_seconds", lambda *_: 0.5)  # of a machine that is not busy
    cfg = small(name="parts", train_minutes=0.101, **options)  # 12.12 steps of half a second
    signal_at(monkeypatch, 6)
    assert train.main(cfg)["status"] == "stopped"
    assert "12 steps take 0.101 minutes: 500.0 ms each, measured now" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(train, "step_seconds", None)  # it is not called
    assert train.main(cfg)["counts"]["steps"] == 12
    assert "as measured when the run began" in capsys.readouterr().out
    whole = small(name="whole", **options | {"max_steps": 12})
    train.main(whole)
    assert_same_run(whole, cfg)
    monkeypatch.undo()
    planned = train.main(small(name="plan", train_minutes=0.05, dry_run=True, **options))
    assert planned["steps"] == max(1, round(3 / planned["step_seconds"]))
    assert train.main(small(name="plan", train_minutes=0.05, dry_run=True, **options | {
        "max_steps": 3}))["steps"] == 3


def test_dry_run_needs_no_data(tmp_path, capsys, monkeypatch):
    """Will it fit? must be answered before a large corpus is downloaded."""
    monkeypatch.chdir(tmp_path)
    train.main(load(train.TrainConfig, [str(CONFIGS / "exp6.py"), "--dry_run"]))
    out = capsys.readouterr().out
    for expected in ("63,873,617", "memory      about", "unknown: no tokens in data/wikitext103 yet"):
        assert expected in out
    with pytest.raises(data.DataError, match="python prepare_data.py wikitext103"):
        train.main(load(train.TrainConfig, [str(CONFIGS / "exp6.py")]))


def test_less_training_text_and_too_much(small, corpus):
    assert train.main(small(dry_run=True, train_tokens=3232))["per_epoch"] == 100
    with pytest.raises(UserError, match="train_tokens=9,000,000, but .* has"):
        train.main(small(train_tokens=9_000_000))


@pytest.mark.parametrize("options, message", [
    ({"epochs": 0.0, "max_steps": 0}, "the run has no end"),
    ({"head_samples": -1}, "head_samples must not be negative"),
    ({"train_minutes": -1.0}, "train_minutes must not be negative"),
    ({"lr": -1.0}, "lr must not be negative"), ({"lr": math.nan}, "lr: nan is not a number"),
    ({"beta2": 1.0}, "beta2 must be at least 0 and below 1"), ({"name": "a/b"}, "plain folder name"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"eval_lens": (0,)}, "eval_lens must be at least 1")])
def test_contradictions_are_refused(small, options, message):
    with pytest.raises(ConfigError, match=message):
        small(**options)


OTHERS = ("probe", "loop", "steer", "rates", "sweep", "recipe", "exp9", "exp10")  # configs of other scripts
MINE = sorted(p for p in Path("config").glob("[a-z]*.py") if not p.stem.startswith(OTHERS))


@pytest.mark.parametrize("path", MINE, ids=lambda p: p.stem)
def test_every_config_takes_two_steps(path, corpus, tmp_path):
    cfg = load(train.TrainConfig, [
        str(path), f"--data={corpus}", f"--out_dir={tmp_path}", "--batch_size=2", "--max_seq_len=16",
        "--max_steps=2", "--device=cpu", "--train_tokens=0", "--eval_lens=", "--init_from="])
    job = started(cfg)
    before = [p.detach().clone() for p in job.model.parameters()]
    for n in range(2):  # with zero_init, what feeds a matrix of zeros moves only in the second
        set_learning_rates(job.optimizer, job.cfg, n, 2)
        loss = backward(job.model, [job.windows.batch(2 * n, 2, CPU)], job.dist, "fp32", job.scaler)
        norm = update(job.model, job.optimizer, job.scaler, cfg.grad_clip, loss)
        if n == 0:
            # a little below ln V: tied embeddings already favour a repeated byte, texts are full of spaces;
            # with zero_init nothing else has a say yet
            assert -1 - 1.5 * cfg.zero_init < loss - math.log(job.cfg.vocab_size) < 1 and 0 < norm < 100
    assert all(not torch.equal(a, b) for a, b in zip(before, job.model.parameters(), strict=True))


def test_the_ledger_row_says_what_ran(small):
    summary = train.main(small(max_steps=10, seed=5))
    row, = read_rows(os.path.join(small().out_dir, "ledger.jsonl"))
    assert row == json.loads(json.dumps(summary))
    assert row["seed"] == 5 and row["counts"]["tokens"] == 10 * 8 * 32
    assert row["config"]["lr"] == 3e-3 and row["status"] == "finished"
    assert {"script", "question", "config", "counts", "result", "seconds", "hardware", "commit"} <= row.keys()
    metrics = read_rows(os.path.join(small().out_dir, "run/metrics.jsonl"))
    assert row["result"]["loss"] == metrics[-1]["val_loss"]


def test_a_ledger_line_cut_short_by_a_kill_harms_no_other(small):
    os.makedirs(small().out_dir)
    ledger = Path(small().out_dir, "ledger.jsonl")
    ledger.write_text('{"run_id": "whole"}\n{"run_id": "cut sho')
    summary = train.main(small(max_steps=1))
    lines = ledger.read_text().split("\n")
    assert lines[:2] == ['{"run_id": "whole"}', '{"run_id": "cut sho'] and len(lines) == 4 and lines[3] == ""
    assert json.loads(lines[2])["run_id"] == summary["run_id"]


def test_peak_flops_are_those_of_the_named_gpu(monkeypatch):
    for name, peak in (("NVIDIA A100-SXM4-40GB", 312e12), ("Tesla T4", 65e12), ("NVIDIA L4", 121e12),
                       ("NVIDIA L40S", 362e12), ("NVIDIA GeForce RTX 4090", 165e12),
                       ("NVIDIA RTX 4000 Ada Generation", 0.0), ("Tesla V100-SXM2-16GB", 125e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert distributed.peak_flops(torch.device("cuda:0"), "fp16") == peak, name
    assert distributed.peak_flops(CPU, "bf16") == 0.0


def test_precision_follows_the_hardware(monkeypatch):
    for capability, expected in (((7, 5), "fp16"), ((7, 0), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert distributed.choose_dtype("auto", torch.device("cuda:0"))[0] == expected
    assert distributed.choose_dtype("auto", torch.device("mps"))[0] == "fp32"
    assert distributed.choose_dtype("fp16", CPU) == ("fp16", "as asked")


def test_a_device_that_is_not_there():
    for device in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"device={device}, but this torch sees no"):
            distributed.setup(device)
