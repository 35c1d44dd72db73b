"""common/run.py and common/files.py: what a run resumes from, its ledger, disks that refuse writes."""
import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import train
from common import files, run
from common.config import UserError, load
from common.distributed import Dist
from common.files import DiskError, append_row, read_rows, write_text
from common.run import Run, RunConfig, append_to_ledger, finite, read_ledger

import pytest
import torch

DIST = Dist(0, 1, torch.device("cpu"))


@dataclasses.dataclass
class Example(RunConfig):
    MAY_CHANGE = {"speed"}
    width: int = 4  # how wide
    speed: float = 1.0  # how fast
    lens: tuple[int, ...] = ()  # some


# ------------------------------------------------------------------------------------------------------------
# Continuing


def test_an_option_that_did_not_exist_had_its_default():
    """Else adding any flag would strand every unfinished run."""
    old = {"width": 4, "name": "x"}  # saved before `lens` and most options of RunConfig existed
    assert Example().differences(old) == []
    assert Example(width=5, lens=(1, 2), speed=9.0, name="other", device="cpu").differences(old) == [
        "lens: [] -> [1, 2]", "width: 4 -> 5"]
    assert Example(lens=(1,)).differences(old | {"lens": [1]}) == []
    assert Example().differences(old | {"gone": 3}) == ["gone: 3 -> (no longer an option)"]
    assert Example(speed=2.0).differences(old, free=set()) == ["name: x -> run", "speed: 1.0 -> 2.0"]


def test_a_run_from_before_an_option_was_added_continues(small):
    train.main(small(max_minutes=1e-6))
    path = os.path.join(small().out_dir, "run/last.pt")
    saved = torch.load(path, weights_only=True)
    for option in ("attn_sink", "question", "tbptt", "short_conv", "muon_lr"):
        del saved["config"][option]
    torch.save(saved, path)
    assert train.main(small())["counts"]["steps"] == 20


def test_an_explicit_length_wins_over_a_default(small):
    """--max_steps alone: no epoch ends the run. With both, whichever ends first."""
    flags = [f"--{k}={v}" for k, v in dataclasses.asdict(small()).items()
             if k in ("data", "out_dir", "name", "d_model", "max_seq_len", "device", "dtype", "batch_size")]
    plan = train.main(load(train.TrainConfig, [*flags, "--max_steps=5000", "--dry_run"]))
    assert plan["steps"] == 5000 > 3 * plan["per_epoch"] / 8
    one = train.main(load(train.TrainConfig, [*flags, "--dry_run"]))
    assert one["steps"] == -(-one["per_epoch"] // 8)
    both = train.main(load(train.TrainConfig, [*flags, "--max_steps=5000", "--epochs=2", "--dry_run"]))
    assert both["steps"] == -(-2 * both["per_epoch"] // 8)


def test_processes_that_see_different_folders_are_refused(small, monkeypatch):
    cfg = small(max_minutes=1e-6)
    train.main(cfg)
    elsewhere = [-1.0]  # another machine, whose disk has no such run
    monkeypatch.setattr(Dist, "min", lambda self, value: min([value, *elsewhere]))
    message = "not all processes see the same run in .*must be on a disk they share"
    with pytest.raises(UserError, match=message):
        train.main(small())


def test_a_new_run_leaves_other_files_alone(small):
    folder = Path(small().out_dir, "run")
    folder.mkdir(parents=True)
    for name in ("notes.txt", "metrics.jsonl", "last.pt.tmp", "samples.txt"):
        (folder / name).write_text("old")
    train.main(small(max_steps=1, log_interval=1))
    assert (folder / "notes.txt").read_text() == "old" and not (folder / "last.pt.tmp").exists()
    assert [r["step"] for r in read_rows(str(folder / "metrics.jsonl"))] == [1, 1]
    assert not (folder / "samples.txt").read_text().startswith("old")


# ------------------------------------------------------------------------------------------------------------
# The ledger


def test_a_row_says_what_ran_and_is_written_once(tmp_path):
    cfg = Example(out_dir=str(tmp_path), question="why?", seed=3)
    row = run.ledger_row("probe", cfg, DIST, counts={"steps": 2}, result={"loss": float("nan"), "all": [1.5]},
                         seconds=0.5, dtype="fp32")
    for _ in range(2):
        append_to_ledger(str(tmp_path), row)
    saved, = read_ledger(str(tmp_path))
    assert saved == finite(json.loads(json.dumps(row | {"result": {"loss": None, "all": [1.5]}})))
    assert (saved["script"], saved["question"], saved["seed"]) == ("probe", "why?", 3)
    assert {"config", "counts", "result", "seconds", "hardware", "commit", "status"} <= saved.keys()
    assert saved["hardware"]["processes"] == 1 and saved["hardware"]["torch"] == torch.__version__


def test_old_rows_are_converted(tmp_path):
    old = {"run_id": "a", "script": "train", "name": "demo", "status": "finished", "steps": 20, "tokens": 99,
           "parameters": 7, "best_val_loss": 2.5, "best_val_step": 20, "best_val_bits_per_byte": 1.5,
           "seconds": 3.0, "sessions": 2, "peak_memory_gb": 0.3, "device": "cpu, 2 threads", "dtype": "fp32",
           "world": 1, "seed": 1, "git": "563f08e", "config": {"lr": 1e-3}}
    append_row(str(tmp_path / "ledger.jsonl"), old)
    row, = read_ledger(str(tmp_path))
    assert row["result"] == {"loss": 2.5, "step": 20, "bits_per_byte": 1.5} and row["commit"] == "563f08e"
    assert row["counts"]["tokens"] == 99 and row["counts"]["parameters"] == 7
    assert row["config"] == {"lr": 1e-3}
    assert row["hardware"] == {"device": "cpu, 2 threads", "processes": 1, "dtype": "fp32",
                               "peak_memory_gb": 0.3}


def test_the_question_of_a_config_file_reaches_the_ledger(small, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("# Question: does it work?\n# Changed: nothing.\nwidth = 6\n")
    assert load(Example, [str(path)]).question == "does it work?"
    assert load(Example, [str(path), "--question=other"]).question == "other"


# ------------------------------------------------------------------------------------------------------------
# Disks

FULL = """
import resource, signal, sys
import torch; torch.set_num_threads(1)
import train
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write beyond the limit fails, as on a full disk
real, saves = train.Run.save, []
def save(self, *args, **progress):
    saves.append(progress["step"])
    if len(saves) == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    real(self, *args, **progress)
train.Run.save = save
from common.config import launch
launch(train.main, train.TrainConfig)
"""


def test_a_full_disk_loses_nothing_and_says_what_to_do(small):
    """A limit on file size stands in for it: torch's writer fails in the middle of a checkpoint."""
    whole, cfg = small(name="whole", save_minutes=0.0), small(save_minutes=0.0)
    train.main(whole)
    flags = [f"--{k}={v}" for k, v in dataclasses.asdict(cfg).items() if v not in ((), "")]
    done = subprocess.run([sys.executable, "-c", FULL, *flags], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    for expected in ("error: could not write", "last.pt", "larger than is allowed here",
                     "what was saved before is intact: fix this and repeat the command"):
        assert expected in done.stderr, done.stderr
    folder = Path(cfg.out_dir, "run")
    assert not list(folder.glob("*.tmp"))
    assert torch.load(folder / "last.pt", weights_only=True)["progress"]["step"] == 2
    assert train.main(cfg)["status"] == "finished"
    rows = [[(r["step"], r.get("train_loss"), r.get("val_loss")) for r in read_rows(
        os.path.join(c.out_dir, c.name, "metrics.jsonl"))] for c in (whole, cfg)]
    assert rows[0] == rows[1]


def test_a_failed_write_says_which_file_and_why(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("I am a file")
    with pytest.raises(DiskError, match="could not write .*file/x: its folder is a file"):
        write_text(str(tmp_path / "file" / "x"), "text")
    with pytest.raises(DiskError, match="out/run: its folder is a file|out/run: that is a file"):
        (tmp_path / "out").write_text("")
        with Run(Example(out_dir=str(tmp_path / "out")), DIST, "probe"):
            pass
    path = str(tmp_path / "kept")
    write_text(path, "before")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
        with pytest.raises(DiskError, match="Too many open files"):
            write_text(path, "after")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert open(path).read() == "before" and sorted(os.listdir(tmp_path)) == ["file", "kept", "out"]


@pytest.mark.parametrize("number, reason", [(errno.ENOSPC, "the disk is full; free some space"),
                                            (errno.EROFS, "the disk is read-only")])
@pytest.mark.parametrize("file", ["last.pt", "metrics.jsonl"])
def test_a_disk_that_refuses_in_the_middle_of_a_run(small, monkeypatch, number, reason, file):
    """Checkpoint or log: one message, and the last save stays whole."""
    cfg = small(save_minutes=0.0)
    train.main(small(save_minutes=0.0, max_minutes=1e-6))  # a single step
    before = Path(cfg.out_dir, "run/last.pt").read_bytes()
    real_replace = os.replace

    def replace(source, target):
        if target.endswith(file):
            raise OSError(number, os.strerror(number), target)
        real_replace(source, target)

    def opened(path, *mode, **options):
        if str(path).endswith(file) and mode == ("ab+",):
            raise OSError(number, os.strerror(number), path)
        return open(path, *mode, **options)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(files, "open", opened, raising=False)
    with pytest.raises(DiskError, match=f"could not write .*{file}: {reason}\nwhat was saved before is"):
        train.main(cfg)
    assert Path(cfg.out_dir, "run/last.pt").read_bytes() == before
    assert not list(Path(cfg.out_dir, "run").glob("*.tmp"))
    monkeypatch.undo()
    assert train.main(cfg)["counts"]["steps"] == 20


def test_a_full_disk_while_text_is_prepared(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times.\n" * 3000)
    code = ("import resource, signal, prepare_data; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY)); "
            "from common.config import launch; launch(prepare_data.main, prepare_data.PrepareConfig)")
    done = subprocess.run([sys.executable, "-c", code, str(text), f"--data_dir={tmp_path}/data",
                           "--tokenizer=bytes"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: could not write" in done.stderr and "--data_dir" in done.stderr
    assert os.listdir(tmp_path / "data") == []


# ------------------------------------------------------------------------------------------------------------
# Ctrl-C before there is anything to save


@pytest.mark.parametrize("command", [["train.py", "config/demo.py"], ["prepare_data.py", "TEXT"]])
def test_ctrl_c_while_a_script_starts_ends_with_a_line(tmp_path, command):
    """At any moment of the import, which takes seconds, and of the work after it."""
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times.\n" * 100_000)
    command = [c.replace("TEXT", str(text)) for c in command]
    started = []
    for i in range(5):
        where = [f"--data_dir={tmp_path}/{i}", "--tokenizer=bpe:2000"] if "prepare" in command[0] else []
        started.append(subprocess.Popen([sys.executable, *command, *where], stdout=subprocess.DEVNULL,
                                        stderr=subprocess.PIPE, text=True))
    time.sleep(0.5)  # until Python has begun with the script, on a busy machine too
    for process in started:
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    said = [process.communicate(timeout=60)[1] for process in started]
    assert all("Traceback" not in text for text in said) and sum("interrupted" in text for text in said) >= 2
    assert {process.returncode for process in started} <= {0, 2, 130, -signal.SIGINT}, said
