"""Wrong invocations, generated from the scripts' own options: each option x wrong type, negative, huge, nan,
empty, a missing file, a file or folder of the wrong kind. None may end in a traceback, hang, or damage
existing files.

    PYTHONPATH=. python tests/wrong_invocations.py OUT CORPUS FINISHED_RUN [COUNT [SEED]]

COUNT of them are sampled (0 = all) with SEED, by default the date as YYYYMMDD. Each runs in a forked child of
this process, which has imported all scripts, with small settings. What is accepted (a huge number of steps is
not wrong) is interrupted after some seconds, as by Ctrl-C. Prints a line of JSON, with the seed.
"""
import datetime
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import typing

import bench
import distill
import loop_train
import memory_probe
import optimizer_probe
import prepare_data
import quantize
import recall_probe
import sample
import sweep
import train
from common.config import launch, option_types

import matplotlib.figure  # noqa: F401, before the forks
import torch

torch.set_num_threads(1)
SMALL = ["--device=cpu", "--dtype=fp32", "--d_model=8", "--n_layers=1", "--n_heads=1", "--max_seq_len=16",
         "--batch_size=2", "--epochs=0", "--max_steps=2", "--sample_tokens=2"]
SECONDS = 4.0  # after which an accepted invocation is interrupted


def scripts(out: str, corpus: str, run: str) -> dict[str, tuple]:
    """name -> (main, config class, arguments of a small invocation that works)."""
    text = os.path.join(out, "text.txt")
    with open(text, "w") as f:
        f.write("It was the best of times, it was the worst of times.\n" * 300)
    return {
        "train": (train.main, train.TrainConfig, [*SMALL, f"--data={corpus}", f"--out_dir={out}/out"]),
        "distill": (distill.main, distill.DistillConfig, [
            *SMALL, f"--data={corpus}", f"--out_dir={out}/out", f"--teacher={run}"]),
        "sample": (sample.main, sample.SampleConfig, [run, "--device=cpu", "--max_new_tokens=2"]),
        "quantize": (quantize.main, quantize.QuantizeConfig, [run, "--device=cpu", "--speed_tokens=0"]),
        "sweep": (sweep.main, sweep.SweepConfig, [
            *SMALL, f"--data={corpus}", f"--out_dir={out}/out", "--dry_run", "--seeds=1"]),
        "recall_probe": (recall_probe.main, recall_probe.RecallConfig, [
            "--device=cpu", f"--out_dir={out}/out", "--mixers=lstm", "--sizes=4", "--seeds=1", "--steps=2",
            "--pairs=1", "--seq_len=4", "--vocab_size=8", "--batch_size=2", "--eval_sequences=2"]),
        "memory_probe": (memory_probe.main, memory_probe.ProbeConfig, [
            "--device=cpu", "--dtype=fp32", f"--data={corpus}", f"--out_dir={out}/out", "--level=H0",
            "--pool=4", "--gate=0", "--facts=8", "--seeds=1", "--chaos_seeds=0", "--spread=8", "--steps=2",
            "--d_model=8", "--n_layers=1", "--n_heads=1", "--batch_size=64"]),
        "loop_train": (loop_train.main, loop_train.LoopConfig, [
            "--device=cpu", "--dtype=fp32", f"--data={corpus}", f"--out_dir={out}/out", "--level=H0",
            "--pool=4", "--gate=0", "--seeds=1", "--loops=2", "--segment=2", "--cycles=1", "--tail=0",
            "--questions=2", "--own=2", "--shared=0", "--probes=1", "--d_model=8", "--n_layers=1",
            "--n_heads=1", "--batch_size=32"]),
        "optimizer_probe": (optimizer_probe.main, optimizer_probe.SteerConfig, [
            "--device=cpu", "--task=text", f"--data={corpus}", f"--out_dir={out}/out", "--seeds=1",
            "--steps=2", "--targets=2", "--points=1", "--d_model=8", "--n_layers=1", "--n_heads=1",
            "--max_seq_len=16", "--batch_size=2"]),
        "bench": (bench.main, bench.BenchConfig, [
            "--device=cpu", "--shapes=tiny", "--rounds=1", "--steps=1", f"--out_dir={out}/out"]),
        "prepare_data": (prepare_data.main, prepare_data.PrepareConfig, [
            text, f"--data_dir={out}/data", "--tokenizer=bytes", "--threads=1"])}


def values(kind, out: str) -> list[str]:
    """Wrong, or at least strange, values of an option of this type."""
    if kind in (int, float):
        return ["x", "-1", "1e18", "1" + "0" * 30, "1" + "0" * 400, "nan", "-inf", ""]
    if kind is bool:
        return ["maybe", ""]
    if kind is str:
        return ["", "/nowhere/at/all", f"{out}/binary.pt", f"{out}/folder", f"{out}/text.txt/below", "../x",
                "a" * 5000, "\x01\u20ac"]
    if typing.get_origin(kind) is tuple:
        return [*values(typing.get_args(kind)[0], out), ",", "1,x", "0"]
    return ["x", "", "TRUE,"]  # a Literal


def cases(out: str, corpus: str, run: str) -> list[tuple[str, list[str]]]:
    """All of them: (script, its arguments)."""
    found = []
    for name, (_, cls, good) in scripts(out, corpus, run).items():
        for option, kind in option_types(cls).items():
            found += [(name, [*good, f"--{option}={value}"]) for value in values(kind, out)]
        found += [(name, [*good, *extra]) for extra in (
            [f"{out}/no_such_config.py"], [f"{out}/binary.py"], ["--"], ["-x"], ["--no_such_option=1"],
            ["--seed"], ["=", "\x01"])]
    for path in ("binary.pt", "folder", "text.txt", "half.pt", "nowhere.pt"):
        found += [("sample", [f"{out}/{path}"]), ("quantize", [f"{out}/{path}", "--speed_tokens=0"])]
        found += [("train", [*SMALL, f"--data={out}/{path}", f"--out_dir={out}/out"]),
                  ("prepare_data", [f"{out}/{path}", f"--data_dir={out}/data", "--tokenizer=bytes"])]
    return found


def fingerprint(folder: str) -> str:
    """A hash of everything in `folder` that scripts must not change."""
    digest = hashlib.sha256()
    for path, _, names in sorted(os.walk(folder)):
        for name in sorted(set(names) - {"int8.pt", "lock"}):  # quantize and Run may write these
            digest.update(name.encode() + open(os.path.join(path, name), "rb").read())
    return digest.hexdigest()


def invoke(main, cls, argv: list[str], out: str) -> tuple[int, str, float]:
    """(exit code, stderr, seconds) of a script with these arguments."""
    log, began = os.path.join(out, "stderr"), time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
            signal.signal(signal.SIGINT, signal.default_int_handler)  # shells' background jobs ignore it
            for descriptor, path in ((0, os.devnull), (1, os.devnull), (2, log)):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
            sys.stdin, sys.stdout, sys.stderr = (
                os.fdopen(i, "w" if i else "r", buffering=1) for i in range(3))
            sys.argv = ["script.py", *argv]
            launch(main, cls)
            code = 0
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    asked = False
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        time.sleep(0.01)
        waited = time.monotonic() - began
        if waited > SECONDS and not asked:
            os.kill(pid, signal.SIGINT)
            asked = True
        if waited > SECONDS + 40:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -9, "hung: SIGINT did not end it", waited
    said = open(log, errors="replace").read()
    return os.waitstatus_to_exitcode(ended[1]), said, time.monotonic() - began


def main(out: str, corpus: str, run: str, count: int = 0, seed: int | None = None) -> None:
    os.makedirs(os.path.join(out, "folder"))
    for name in ("binary.pt", "binary.py"):
        with open(os.path.join(out, name), "wb") as f:
            f.write(random.Random(1).randbytes(3000))
    known, before, failures = scripts(out, corpus, run), fingerprint(run), []
    with open(os.path.join(run, "last.pt"), "rb") as whole, open(os.path.join(out, "half.pt"), "wb") as half:
        half.write(whole.read()[:2000])
    seed = int(datetime.date.today().strftime("%Y%m%d")) if seed is None else seed
    todo = cases(out, corpus, run)
    todo = random.Random(seed).sample(todo, count) if count else todo
    slowest = (0.0, "")
    for n, (name, argv) in enumerate(todo):
        entry, cls, _ = known[name]
        code, said, seconds = invoke(entry, cls, argv, out)
        slowest = max(slowest, (seconds, f"{name}.py {argv[-1]}"))
        explained = {0: "", 2: "^error: ", 130: "^interrupted"}  # by exit code
        wrong = "Traceback" in said or code not in explained or not re.search(explained[code], said, re.M)
        if wrong or fingerprint(run) != before:
            failures.append(f"{name}.py {' '.join(argv)[-160:]!r} -> {code}: {said[-600:]}")
        for folder in ("out", "data"):
            shutil.rmtree(os.path.join(out, folder), ignore_errors=True)
        if sys.stderr.isatty() or os.environ.get("SHOW"):
            print(f"{n + 1}/{len(todo)} {seconds:.1f}s {len(failures)} failed  {name} {argv[-1][:70]!r}",
                  file=sys.stderr)
    print(json.dumps({"seed": seed, "tried": len(todo), "failures": failures, "slowest": slowest}))


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
