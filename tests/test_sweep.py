"""sweep.py: its table against the runs' own logs, stopping and continuing, refusals; on real small runs."""
import dataclasses
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time

import sweep
import train
from common import checkpoint
from common.config import ConfigError, UserError, load
from common.files import read_rows
from common.stats import paired_difference
from sweep import SweepConfig

import pytest
import scipy.stats
import torch

SMALL = {"name": "tiny", "device": "cpu", "dtype": "fp32", "d_model": 32, "n_layers": 1, "n_heads": 2,
         "max_seq_len": 32, "batch_size": 8, "lr": 3e-3, "epochs": 0.0, "max_steps": 20, "eval_interval": 10,
         "log_interval": 5}


def options(corpus, out_dir, **more) -> dict:
    return SMALL | {"data": corpus, "out_dir": str(out_dir)} | more


def files_of(out_dir) -> dict[str, float]:
    return {p.name: (p / "last.pt").stat().st_mtime_ns for p in out_dir.iterdir() if (p / "last.pt").exists()}


def no_more_runs(monkeypatch):
    def start(cfg, run, *args):
        raise AssertionError(f"started {run.name}")
    monkeypatch.setattr(sweep, "start", start)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """Two learning rates x two seeds, stopped by SIGTERM after the first run, then continued."""
    out_dir = tmp_path_factory.mktemp("sweep")
    cfg = SweepConfig(**options(corpus, out_dir, grid=("lr=3e-3,3e-4",), seeds=2, jobs=2))
    with pytest.MonkeyPatch.context() as patch:
        real = sweep.settle

        def settle(*args):
            real(*args)
            os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(sweep, "settle", settle)
        assert sweep.main(dataclasses.replace(cfg, jobs=1))["status"] == "stopped"
    before = files_of(out_dir)
    ended = [r["name"] for r in read_rows(str(out_dir / "ledger.jsonl"))]
    assert ended == ["tiny_base_s1"] and not (out_dir / "tiny_sweep" / "table.md").exists()
    result = sweep.main(cfg)
    after = files_of(out_dir)
    assert after["tiny_base_s1"] == before["tiny_base_s1"] and len(after) == 4
    return cfg, out_dir, result["result"]["arms"]


# ------------------------------------------------------------------------------------------------------------
# Arms


def test_arms_of_grids_and_of_flags(tmp_path):
    (tmp_path / "wide.py").write_text("d_model = 64\nn_heads = 4\n")
    cfg = SweepConfig(lr=1e-3, d_model=32, grid=("lr=1e-3,1e-2", "d-model=32,64"),
                      arm=("activation=relu2 qk_norm", f"{tmp_path}/wide.py n_heads=8"))
    arms, problems = sweep.make_arms(cfg)
    assert not problems
    grid = ["lr-1e-3_d-model-64", "lr-1e-2_d-model-32", "lr-1e-2_d-model-64"]
    assert [a.name for a in arms] == ["base", *grid, "activation-relu2_qk_norm", "wide_n_heads-8"]
    assert arms[0].text == "base lr=0.001 d-model=32"
    assert arms[3].changes == ["d_model: 32 -> 64", "lr: 0.001 -> 0.01"] and arms[3].cfg.lr == 0.01
    assert arms[4].cfg == dataclasses.replace(arms[0].cfg, activation="relu2", qk_norm=True)
    assert (arms[5].cfg.d_model, arms[5].cfg.n_heads, arms[5].cfg.lr) == (64, 8, 1e-3)


def test_an_arm_is_written_as_a_config_file(tmp_path):
    cfg = load(SweepConfig, ["config/mini7.py", "--prompts=a 'quoted' \"one\"", "--arm=qk_norm flash=false",
                             "--beta2=0.123456789012345"])
    arm = sweep.make_arms(cfg)[0][1]
    sweep.write_arm(arm, str(tmp_path))
    path = str(tmp_path / f"{arm.name}.py")
    assert load(train.TrainConfig, [path, "--name=mini7"]) == arm.cfg
    assert arm.cfg.eval_lens == (64, 256, 512) and not arm.cfg.flash and arm.cfg.qk_norm


def test_a_default_typed_for_the_whole_sweep_is_written_for_every_arm(tmp_path):
    cfg = load(SweepConfig, ["--d_model=128", "--init_from=out/other", "--arm=dropout=0.1"])
    for arm in sweep.make_arms(cfg)[0]:
        sweep.write_arm(arm, str(tmp_path))
        written = load(train.TrainConfig, [str(tmp_path / f"{arm.name}.py")])
        assert written.sets("d_model") and not written.sets("n_layers")  # so inherit() compares it


def test_all_mistakes_are_reported_before_anything_runs():
    with pytest.raises(ConfigError) as error:
        load(SweepConfig, ["config/demo.py", "--arm=activation=relu3", "--arm=drpout=0.1",
                           "--arm=d_model=130", "--grid=lr=1e-3,fast", "--arm=seed=7", "--arm=lr=3e-3",
                           "--arm=qk_norm", "--arm=qk_norm", "--arm=data=data/other"])
    for expected in (
            "8 problems", "arm 'activation=relu3': flag --activation: expected one of",
            "arm 'drpout=0.1': flag: no option 'drpout'; did you mean 'dropout'?",
            "arm 'd_model=130': n_heads=4 does not divide d_model=130",
            "arm 'lr=fast': flag --lr: expected float, got 'fast'",
            "arm 'seed=7': only the whole sweep can set seed: 1 -> 7",
            "arm 'lr=3e-3' changes nothing", "there is another arm 'qk_norm'", "--metric=bits_per_byte"):
        assert expected in str(error.value), expected
    with pytest.raises(ConfigError, match="arm 'lr=': flag --lr: expected float, got ''"):
        SweepConfig(grid=("lr",))
    with pytest.raises(ConfigError, match="seeds must be at least 1, got 0(?s:.*)max_minutes would end"):
        SweepConfig(seeds=0, max_minutes=3)
    with pytest.raises(ConfigError, match="script must be given as the flag --script=quantize, with '='"):
        SweepConfig(script="quantize")


@pytest.mark.parametrize("script, message", [
    ("nowhere", "no script 'nowhere.py' to sweep"), ("muon", "muon.py makes no runs that can be compared"),
    ("recall_probe", "recall_probe.py makes no runs that"), ("sweep", "sweep.py makes no runs that")])
def test_scripts_that_cannot_be_swept_are_refused(script, message):
    with pytest.raises(UserError, match=message):
        sweep.sweep_config(script)


# ------------------------------------------------------------------------------------------------------------
# Runs and their table


def test_the_table_shows_what_the_runs_logged(finished, corpus):
    cfg, out_dir, results = finished
    best = {}
    for arm in ("base", "lr-3e-4"):
        for seed in (1, 2):
            rows = read_rows(str(out_dir / f"tiny_{arm}_s{seed}" / "metrics.jsonl"))
            best[arm, seed] = min(r["val_loss"] for r in rows if "val_loss" in r)
    assert len(set(best.values())) == 4
    base, slow = results
    assert base["scores"] == {s: best["base", s] for s in (1, 2)}
    assert slow["scores"] == {s: best["lr-3e-4", s] for s in (1, 2)}
    differences = [best["lr-3e-4", s] - best["base", s] for s in (1, 2)]
    assert slow["difference"] == pytest.approx(sum(differences) / 2) and slow["difference"] > 0.1
    assert slow["low"] < min(differences) < max(differences) < slow["high"]
    assert slow["p_holm"] == slow["p"] and math.isnan(base["p"])
    assert slow["sd"] == pytest.approx(abs(best["lr-3e-4", 1] - best["lr-3e-4", 2]) / math.sqrt(2))
    text = (out_dir / "tiny_sweep" / "table.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| lr=3e-4"))
    for seed in (1, 2):
        assert f" {best['lr-3e-4', seed]:.4f} " in row
    assert f" {statistics.fmean(slow['scores'].values()):.4f} " in row and f" {slow['p']:.3g} " in row
    assert "2 seeds can show differences of about" in text and "runs at a time: 2" in text
    saved = [json.loads(line) for line in open(out_dir / "tiny_sweep" / "results.jsonl")]
    assert saved[1]["p"] == slow["p"] and saved[0]["difference"] is None
    assert (out_dir / "tiny_sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")



def test_a_run_of_a_sweep_equals_the_run_of_train(finished, corpus, tmp_path):
    _, _, results = finished
    alone = train.main(train.TrainConfig(**options(corpus, tmp_path, lr=3e-4, seed=2)))
    assert results[1]["scores"][2] == alone["result"]["loss"]
    assert all(results[1][key] == alone["counts"][key] for key in ("parameters", "tokens"))


def test_repeating_a_sweep_runs_nothing(finished, monkeypatch):
    cfg, out_dir, results = finished
    before, text = files_of(out_dir), (out_dir / "tiny_sweep" / "table.md").read_text()
    no_more_runs(monkeypatch)
    ledger = read_rows(str(out_dir / "ledger.jsonl"))
    assert str(sweep.main(cfg)["result"]["arms"]) == str(results)
    assert files_of(out_dir) == before and (out_dir / "tiny_sweep" / "table.md").read_text() == text
    assert [row["script"] for row in ledger][:5] == ["train"] * 4 + ["sweep"]
    assert read_rows(str(out_dir / "ledger.jsonl")) == ledger


def test_one_result_against_another(finished):
    cfg, out_dir, results = finished
    again = sweep.main(dataclasses.replace(cfg, metric="bits_per_byte", against="loss"))["result"]["arms"]
    assert [r["against"] for r in again] == [r["scores"] for r in results]
    assert (out_dir / "tiny_sweep" / "against.png").read_bytes()[:4] == b"\x89PNG"
    head, _, *rows = (out_dir / "tiny_sweep" / "table.md").read_text().splitlines()[2:6]
    assert head.split("|")[-2].strip() == "loss"
    assert [float(r.split("|")[-2]) for r in rows] == [round(r["mean"], 4) for r in results]
    sweep.main(cfg)


@pytest.mark.parametrize("change, message", [
    ({"weight_decay": 0.2}, "tiny_base_s1: weight_decay: 0.1 -> 0.2"),
    ({"dtype": "bf16"}, "tiny_base_s1: dtype: fp32 -> bf16")])
def test_runs_with_other_settings_are_reported_and_not_used(finished, monkeypatch, change, message):
    cfg, _, _ = finished
    no_more_runs(monkeypatch)
    with pytest.raises(UserError, match=message):
        sweep.main(dataclasses.replace(cfg, **change))


def test_runs_on_other_data_are_reported_and_not_used(finished, bpe_corpus, monkeypatch):
    cfg, _, _ = finished
    no_more_runs(monkeypatch)
    with pytest.raises(UserError, match="tiny_base_s1: data: the training tokens in .* are not those"):
        sweep.main(dataclasses.replace(cfg, data=bpe_corpus))


def test_a_failing_arm_is_named_and_the_others_are_kept(finished, corpus):
    cfg, out_dir, results = finished
    more = dataclasses.replace(cfg, grid=(), arm=("train_tokens=999999999", "lr=3e-4"), seeds=1)
    planned = sweep.main(dataclasses.replace(more, dry_run=True))  # it reuses the grid's runs
    assert planned["runs"] == ["tiny_train_tokens-999999999_s1"]
    with pytest.raises(UserError) as error:
        sweep.main(more)
    assert "tries them again\n  tiny_train_tokens-999999999_s1: error: train_tokens=999,999,999, but" \
        in str(error.value)
    rows = [json.loads(line) for line in open(out_dir / "tiny_sweep" / "results.jsonl")]
    assert [r["arm"] for r in rows] == ["base", "train_tokens=999999999", "lr=3e-4"]
    assert rows[1]["scores"] == {} and rows[1]["p"] is None
    assert rows[2]["difference"] == results[1]["differences"][1] and rows[2]["low"] is None
    assert "s1 failed: error: train_tokens" in (out_dir / "tiny_sweep" / "table.md").read_text()


def test_ctrl_c_reaches_the_runs_which_save(corpus, tmp_path):
    flags = [f"--{k}={v}" for k, v in options(corpus, tmp_path / "out", max_steps=1000000).items()]
    command = [sys.executable, "sweep.py", *flags, "--arm=dropout=0.1", "--seeds=1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    log = tmp_path / "out" / "tiny_base_s1" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 60
        while not log.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "stopped; continue with:  python sweep.py" in out
    saved = checkpoint.load(str(log.parent / "last.pt"), keys=("progress",))["progress"]
    assert saved["step"] >= read_rows(str(log))[-1]["step"] > 0 and not saved["ended"]
    assert not (tmp_path / "out" / "tiny_dropout-0.1_s1").exists()


# ------------------------------------------------------------------------------------------------------------
# Comparisons, threads and GPUs


def made(scores: dict[str, list]) -> tuple[SweepConfig, list[sweep.Arm], list[sweep.Run]]:
    """Runs that ended with these scores (None: failed) for seeds 1, 2, ..."""
    cfg = SweepConfig(seeds=len(scores["base"]), grid=("lr=1e-4,1e-2",))
    arms = [sweep.Arm(name, name, dataclasses.replace(train.TrainConfig(), lr=10.0 ** -i), [])
            for i, name in enumerate(scores)]
    row = {"script": "train", "counts": {"parameters": 1, "tokens": 5}, "seconds": 60.0, "commit": "abc"}
    runs = [sweep.Run(arm, s, f"{arm.name}_{s}", None if x is None else row | {"result": {"loss": x}})
            for arm in arms for s, x in enumerate(scores[arm.name], 1)]
    return cfg, arms, runs


def test_differences_are_taken_seed_by_seed():
    cfg, arms, runs = made({"base": [1.0, 5.0, None, 3.0], "a": [0.9, 4.8, 7.0, None],
                            "b": [1.1, 5.2, 2.0, 3.05], "c": [None] * 4})
    base, a, b, c = sweep.compare(cfg, arms, runs)
    assert a["differences"] == pytest.approx({1: -0.1, 2: -0.2}) and a["difference"] == pytest.approx(-0.15)
    assert list(b["differences"]) == [1, 2, 4]
    assert b["p"] == paired_difference([1.1, 5.2, 3.05], [1.0, 5.0, 3.0]).p
    low, high = sorted([a["p"], b["p"]])
    assert sorted([a["p_holm"], b["p_holm"]]) == pytest.approx([2 * low, max(2 * low, high)])
    assert math.isnan(c["mean"]) and math.isnan(c["p_holm"]) and base["mean"] == 3.0


def test_one_seed_shows_nothing(tmp_path):
    cfg, arms, runs = made({"base": [1.0], "a": [0.9]})
    results = sweep.compare(cfg, arms, runs)
    assert results[1]["difference"] == pytest.approx(-0.1)
    assert sweep.table(cfg, results).splitlines()[3].rstrip(" |").endswith("-0.1000")  # no p, no verdict
    assert "one seed shows nothing" in " ".join(sweep.notes(cfg, results, runs))


def test_verdicts_need_a_difference_beyond_the_noise_and_long_runs():
    scores = {"base": [1.0, 1.1, 1.2], "a": [0.90, 1.01, 1.09], "b": [1.02, 1.09, 1.21],
              "c": [1.3, 1.4, 1.52]}
    cfg, arms, runs = made(scores)
    for run in runs:
        run.row |= {"counts": {"parameters": 1, "tokens": 5, "steps": 1000}}
    got = sweep.compare(cfg, arms, runs)
    assert [r["verdict"] for r in got] == ["", "better", "undecided", "worse"]
    pooled = math.sqrt(statistics.fmean(statistics.variance(r["differences"].values()) for r in got[1:]))
    assert got[1]["noise"] == pytest.approx(pooled)
    t = got[2]["difference"] * math.sqrt(3) / pooled
    assert got[2]["p_noise"] == pytest.approx(2 * scipy.stats.t.sf(t, 6))
    assert sweep.compare(dataclasses.replace(cfg, metric="recall"), arms, [
        dataclasses.replace(r, row=r.row | {"result": {"recall": r.row["result"]["loss"]}}) for r in runs
    ])[3]["verdict"] == "higher"
    runs[4].row |= {"counts": {"parameters": 1, "tokens": 5, "steps": 999}}
    assert {r["verdict"] for r in sweep.compare(cfg, arms, runs)[1:]} == {"none: under 1,000 steps"}
    shorter = dataclasses.replace(cfg, verdict_steps=999)
    assert sweep.compare(shorter, arms, runs)[1]["verdict"] == "better"


def test_settings_have_bases_of_their_own():
    cfg = SweepConfig(arm=("qk_norm",), setting=("d_model=64 lr=1e-2",), grid=("lr=1e-3,1e-2",), lr=1e-3)
    arms, problems = sweep.make_arms(cfg)
    assert not problems
    assert [(a.name, a.base) for a in arms] == [
        ("base", "base"), ("lr-1e-2", "base"), ("qk_norm", "base"),
        *((f"d_model-64_lr-1e-2_{n}", "d_model-64_lr-1e-2_base") for n in ("base", "lr-1e-3", "qk_norm"))]
    assert [(a.cfg.d_model, a.cfg.lr, a.cfg.qk_norm) for a in arms[3:]] == [
        (64, 1e-2, False), (64, 1e-3, False), (64, 1e-2, True)]
    _, _, runs = made({"base": [1.0, 2.0]})
    runs = [sweep.Run(a, s, "", runs[0].row | {"result": {"loss": 10.0 * (a.base != "base") + i % 3 + s}})
            for s in (1, 2) for i, a in enumerate(arms)]
    assert [r["difference"] for r in sweep.compare(cfg, arms, runs)][1:] == pytest.approx(
        [1, 2, math.nan, 1, 2], nan_ok=True)
    with pytest.raises(ConfigError, match="setting 'd_mode=3': flag: no option 'd_mode'"):
        SweepConfig(setting=("d_mode=3",))
    with pytest.raises(ConfigError, match="setting 'seed=3': only the whole sweep can set seed: 1 -> 3"):
        SweepConfig(setting=("seed=3",))


def test_equal_seconds_give_steps_by_measured_times(corpus, tmp_path, monkeypatch):
    times = iter([0.1, 0.2, 0.21, 0.11, 0.12, 0.22])  # in turns: base, wide; wide, base; base, wide

    class Pool:
        def __init__(self, *_): pass
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def submit(self, work, cfg): return type("Future", (), {"result": lambda _: next(times)})()

    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Pool)
    cfg = SweepConfig(**options(corpus, tmp_path, arm=("d_ff=64",), seeds=1, equal_seconds=2.2,
                                train_minutes=1e-5))  # the config's own length gives way
    sweep.main(cfg)
    counts = {r["name"]: r["counts"]["steps"] for r in read_rows(str(tmp_path / "ledger.jsonl"))
              if r["script"] == "train"}
    assert counts == {"tiny_base_s1": 20, "tiny_d_ff-64_s1": 10}
    no_more_runs(monkeypatch)  # nor times: the iterator is at its end
    assert "2.2 s alone" in (tmp_path / "tiny_sweep" / "table.md").read_text()
    sweep.main(cfg)
    with pytest.raises(UserError, match="max_steps: 20 -> 40"):
        sweep.main(dataclasses.replace(cfg, equal_seconds=4.4))
    with pytest.raises(ConfigError, match="only the whole sweep can set max_steps"):
        SweepConfig(equal_seconds=1.0, arm=("max_steps=5",))
    with pytest.raises(ConfigError, match="cannot time its steps"):
        sweep.sweep_config("distill")(script="distill", equal_seconds=1.0)


def test_arms_whose_steps_cost_the_same_share_one_time(corpus, tmp_path):
    """And the steps.json of a sweep that timed each arm still counts."""
    cfg = SweepConfig(**options(corpus, tmp_path, arm=("beta1=0.8 zero_init=true", "d_ff=64"),
                                equal_seconds=1.2))
    arms = sweep.make_arms(cfg)[0]
    costs = [sweep.digest(sweep.cost_options(a.cfg)) for a in arms]
    assert costs[0] == costs[1] != costs[2]
    own = [f"{a.name} {sweep.digest(sweep.fixed_options(a.cfg))}" for a in arms]
    for known, steps in (({costs[0]: 0.1, costs[2]: 0.3}, [12, 12, 4]),
                         ({own[0]: 0.1, own[1]: 0.2, own[2]: 0.3}, [12, 6, 4]),
                         ({own[0]: 0.1, own[2]: 0.3}, [12, 12, 4])):  # an arm added to such a sweep
        (tmp_path / "steps.json").write_text(json.dumps(known))
        again = sweep.make_arms(cfg)[0]
        sweep.fit_to_time(cfg, again, str(tmp_path))
        assert [a.cfg.max_steps for a in again] == steps


def test_a_step_is_timed_in_a_process_of_its_own(corpus, tmp_path):
    cfg = SweepConfig(**options(corpus, tmp_path, seeds=1, equal_seconds=0.05))
    assert sweep.main(dataclasses.replace(cfg, dry_run=True))["runs"] == ["tiny_base_s1"]
    assert not list(tmp_path.iterdir())
    row = sweep.main(cfg)["result"]["arms"][0]
    seconds = json.loads((tmp_path / "tiny_sweep" / "steps.json").read_text())
    (key, each), = seconds.items()
    assert key == sweep.digest(sweep.cost_options(sweep.make_arms(cfg)[0][0].cfg))
    assert row["steps"] == max(1, round(0.05 / each))


def test_unequal_tokens_and_code_are_reported():
    cfg, arms, runs = made({"base": [1.0, 2.0], "a": [0.9, 1.9]})
    plain = " ".join(sweep.notes(cfg, sweep.compare(cfg, arms, runs), runs))
    assert "tokens:" not in plain and "versions" not in plain
    runs[3].row |= {"counts": {"parameters": 1, "tokens": 9}, "commit": "def"}
    text = " ".join(sweep.notes(cfg, sweep.compare(cfg, arms, runs), runs))
    assert "unequal numbers of tokens: 5 to 7" in text and "different versions of the code: abc, def" in text


@pytest.mark.filterwarnings("error:constrained_layout")
def test_a_long_arm_leaves_room_for_its_plot(tmp_path):
    cfg, arms, runs = made({"base": [1.0, 2.0], "config/speedrun.py " + 9 * "data=data/books ": [0.9, 1.9]})
    cfg = dataclasses.replace(cfg, grid=(), arm=("lr=1",))
    sweep.draw(cfg, arms, sweep.compare(cfg, arms, runs), str(tmp_path / "sweep.png"))
    assert (tmp_path / "sweep.png").exists()


def test_jobs_share_threads_and_gpus(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, env, **_: started.append(env))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    _, _, (run, *_) = made({"base": [1.0]})
    sweep.start(SweepConfig(jobs=1), run, str(tmp_path), 0)
    assert started[-1]["OMP_NUM_THREADS"] == "6" and "CUDA_VISIBLE_DEVICES" not in started[-1]
    for slot, gpu in enumerate("0101"):
        sweep.start(SweepConfig(jobs=4), run, str(tmp_path), slot)
        assert (started[-1]["OMP_NUM_THREADS"], started[-1]["CUDA_VISIBLE_DEVICES"]) == ("1", gpu)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    sweep.start(SweepConfig(jobs=2), run, str(tmp_path), 1)
    assert started[-1]["CUDA_VISIBLE_DEVICES"] == "5"
