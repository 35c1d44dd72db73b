"""One run of a script: its folder and lock, its checkpoints, its logs, its line in the ledger."""
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import time
import uuid
from dataclasses import asdict, dataclass
from typing import Literal

from common import checkpoint, distributed
from common.config import Config, UserError
from common.files import (
    append_row,
    make_folder,
    read_json,
    read_rows,
    write_atomically,
    write_json,
    write_text,
    writing,
)

import torch

# ------------------------------------------------------------------------------------------------------------
# Options that scripts share


@dataclass
class MachineConfig(Config):
    MAY_CHANGE = {"device", "dtype", "compile"}
    # machine (may change when a run is continued)
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of matmuls; trained weights stay fp32
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile; auto = on CUDA, for long runs

    def problems(self) -> list[str]:
        wrong = not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device)
        return super().problems() + [f"device={self.device}: expected auto, cpu, cuda, cuda:1 or mps"] * wrong


@dataclass
class RunConfig(MachineConfig):
    MAY_CHANGE = {"name", "out_dir", "question", "overwrite", "dry_run"}
    # run
    name: str = "run"  # the run's folder in out_dir; default: the config file's name
    out_dir: str = "out"  # holds the run folders and ledger.jsonl
    seed: int = 1  # of everything random
    question: str = ""  # what the run asks, for the ledger; default: the config file's "# Question:" line
    overwrite: bool = False  # delete the run of this name, if there is one
    dry_run: bool = False  # print the plan and stop

    def problems(self) -> list[str]:
        out = super().problems() + self.at_least(0, "seed")
        if not self.name or os.path.basename(self.name) != self.name or self.name in (".", ".."):
            out.append(f"name must be a plain folder name, got '{self.name}'")
        return out if self.out_dir else [*out, "out_dir must name a folder, got ''"]


# ------------------------------------------------------------------------------------------------------------
# The run

LOGS = ("metrics.jsonl", "probes.jsonl")
FILES = ("last.pt", "best.pt", "int8.pt", "merged.pt", *LOGS, "samples.txt", "loss.png", "facts.jsonl",
         "summary.json", "table.md", "effect.png", "config.json", "distill.png", "report.md")


class Run:
    """The folder out_dir/name while a script works in it, locked by `with`. Every process has a Run; only the
    main one writes."""

    def __init__(self, cfg: RunConfig, dist: distributed.Dist, script: str, tokenizer: dict | None = None,
                 data_sha256: str = ""):
        self.cfg, self.dist, self.script = cfg, dist, script
        self.data = {"tokenizer": tokenizer, "data_sha256": data_sha256}
        self.folder = os.path.join(cfg.out_dir, cfg.name)
        self.id, self.seconds, self.sessions = uuid.uuid4().hex[:12], 0.0, 1
        self.saved_at = time.monotonic()

    def __enter__(self) -> "Run":
        if self.dist.is_main:
            make_folder(self.folder)
            with writing(self.folder):
                self.lock = open(self.path("lock"), "w")  # the system frees it however the process ends
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"another process is working in {self.folder}; wait for it, or use another "
                                "--name") from None
        return self

    def __exit__(self, *_) -> None:
        if self.dist.is_main:
            self.lock.close()

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def find(self) -> dict | None:
        """The checkpoint to resume from, or None for a new run. UserError if the folder's run had another
        configuration or other data, or if processes see different runs. A collective."""
        if self.cfg.overwrite:
            return None
        data, saved, step = self.data, None, -1
        if os.path.exists(self.path("config.json")):  # of a script that saves no checkpoint
            self.check(read_json(self.path("config.json")))
        # best.pt alone: a kill came between the first evaluation's two saves
        if path := next(filter(os.path.exists, map(self.path, ("last.pt", "best.pt"))), None):
            saved = checkpoint.load(path, ("model", "optimizer", "scaler", "progress", "config", *data))
            step = saved["progress"]["step"]
            self.check(saved, f" (at step {step:,})", ", or train its weights further in a new run with "
                       f"--init_from={self.folder} --name=OTHER")
        if (self.dist.min(step), -self.dist.min(-step)) != (step, step):
            raise UserError(f"not all processes see the same run in {self.folder}: with several machines it "
                            "must be on a disk they share")
        return saved

    def check(self, saved: dict, where: str = "", way_out: str = "") -> None:
        """UserError if `saved` began with another configuration, tokenizer or data."""
        if self.data["tokenizer"]:
            checkpoint.check_tokenizer(saved["tokenizer"], self.folder, self.data["tokenizer"], self.cfg.data)
        if differences := differences_to(saved, self.cfg, self.data["data_sha256"]):
            raise UserError(f"{self.folder} holds a run with another configuration{where}:\n  "
                            + "\n  ".join(differences) + "\nkeep it and use --name=OTHER, delete it with "
                            "--overwrite" + way_out)

    def finished_parts(self) -> dict[tuple, dict]:
        """{part: row} of probes.jsonl, for scripts whose parts are atomic and log a row when they end; they
        save no checkpoint. UserError as in check(). A collective."""
        path = self.path("config.json")
        self.find()
        if self.dist.is_main and (self.cfg.overwrite or not os.path.exists(path)):
            self.begin(None)
            write_json(path, {"config": asdict(self.cfg), **self.data})
        self.dist.min(0.0)  # wait for the main process
        return {tuple(row.pop("part")): row for row in read_rows(self.path("probes.jsonl"))}

    def finish_part(self, part: tuple, row: dict, done: dict) -> None:
        """Add a part's row to `done`, what finished_parts() gave, and to probes.jsonl."""
        done[part] = row
        if self.dist.is_main:
            append_row(self.path("probes.jsonl"), {"part": part, **row})

    def begin(self, saved: dict | None, keep=lambda row: True) -> None:
        """Resume from `saved`, or delete the old run and start a new one. Resuming drops the rows of LOGS
        that `keep` rejects: a killed run logged them after its last save and repeats them."""
        if saved:
            self.id, self.seconds = saved["progress"]["run_id"], saved["progress"]["seconds"]
            self.sessions = saved["progress"]["sessions"] + 1
        if not self.dist.is_main:
            return
        if saved and not os.path.exists(self.path("last.pt")):
            with open(self.path("best.pt"), "rb") as best:
                write_atomically(self.path("last.pt"), lambda last: shutil.copyfileobj(best, last))
        for log in filter(os.path.exists, map(self.path, LOGS if saved else ())):
            write_text(log, "".join(json.dumps(r) + "\n" for r in read_rows(log) if keep(r)))
        old = [f"{name}.tmp" for name in FILES] + list(FILES) * (not saved)  # .tmp: a kill during a write
        with writing(self.folder):
            for name in filter(os.path.exists, map(self.path, old)):
                os.remove(name)

    def restore(self, saved: dict, model, optimizer, scaler) -> None:
        """Load weights, optimiser and loss scale as saved."""
        checkpoint.load_weights(model, saved["model"], self.folder)
        optimizer.load_state_dict(saved["optimizer"])
        if scaler.is_enabled() and saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])

    def save(self, name: str, model, optimizer, scaler, **progress) -> None:
        """Write a checkpoint, without random state: data order and dropout depend on (seed, sample) only."""
        if self.dist.is_main:
            progress |= {"run_id": self.id, "seconds": self.seconds, "sessions": self.sessions}
            checkpoint.save(self.path(name), {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(), "progress": progress, "config": asdict(self.cfg), **self.data})
        self.saved_at = time.monotonic()

    def save_is_due(self, minutes: float) -> bool:
        return time.monotonic() - self.saved_at >= 60 * minutes

    def metrics(self, **row) -> None:
        if self.dist.is_main:
            append_row(self.path("metrics.jsonl"), row)

    def finish(self, status: str, counts: dict, result: dict, dtype: str) -> dict:
        """The run's summary, which is added to the ledger unless the status is "stopped"."""
        row = ledger_row(self.script, self.cfg, self.dist, status=status, counts=counts, result=result,
                         seconds=self.seconds, dtype=dtype, run_id=self.id)
        if self.dist.is_main and status != "stopped":
            append_to_ledger(self.cfg.out_dir, row)
        return row


def way_back(cfg: RunConfig, run: Run) -> str:
    """What to type after a loss that is not finite."""
    lower = f"--lr={min(cfg.lr / 3, 1e-3):.1e}"
    if cfg.optimizer == "muon":
        lower += f" --muon_lr={min(cfg.muon_lr / 3, 0.02):.1e}"
    if os.path.exists(run.path("last.pt")):
        return (f"the last save is from before; continue from it in a new run with:  "
                f"--init_from={run.path('last.pt')} --name={cfg.name}_lower {lower}")
    return f"nothing was saved yet; try:  {lower} --warmup_steps=100"


def differences_to(saved: dict, cfg: RunConfig, data_sha256: str, free: set[str] | None = None) -> list[str]:
    """Why `cfg`, with training tokens of this hash, cannot resume `saved`; options in `free` may differ."""
    out = cfg.differences(saved["config"], free)
    if saved["data_sha256"] != data_sha256:
        replayed = f" or {cfg.replay_data}" if getattr(cfg, "replay", 0) else ""
        if teachers := getattr(cfg, "teacher", ()):
            replayed += f", or the weights of {', '.join(teachers)},"
        out.append(f"data: the training tokens in {cfg.data}{replayed} are not those the run began with")
    return out


# ------------------------------------------------------------------------------------------------------------
# The ledger


def ledger_row(script: str, cfg: Config, dist: distributed.Dist, *, counts: dict, result: dict,
               seconds: float, dtype: str, status: str = "finished", run_id: str = "") -> dict:
    """What every script reports. `counts` says what it used and did, `result` what came out."""
    return {"run_id": run_id or uuid.uuid4().hex[:12], "script": script, "name": getattr(cfg, "name", ""),
            "question": getattr(cfg, "question", ""), "status": status, "counts": counts, "result": result,
            "seconds": seconds, "hardware": {
                "device": distributed.device_name(dist.device), "processes": dist.world, "dtype": dtype,
                "torch": torch.__version__, "peak_memory_gb": distributed.peak_memory(dist.device)},
            "commit": git_commit(), "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "seed": getattr(cfg, "seed", None), "config": asdict(cfg)}


def digest(value) -> str:
    """A run id computed from the results, so that reporting them again adds no line to the ledger."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def append_to_ledger(out_dir: str, row: dict) -> None:
    """Add `row`, unless its run id is there already."""
    if row["run_id"] not in [r["run_id"] for r in read_ledger(out_dir)]:
        make_folder(out_dir)
        append_row(os.path.join(out_dir, "ledger.jsonl"), finite(row))


def finite(value):
    """`value` with None for nan and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_ledger(out_dir: str) -> list[dict]:
    """The rows of out_dir/ledger.jsonl; old rows of train.py are converted to the shape all scripts share."""
    rows = read_rows(os.path.join(out_dir, "ledger.jsonl"), strict=False)
    counted = ("steps", "tokens", "epochs", "parameters", "parameters_non_embedding", "sessions")
    return [row if "result" in row else {
        **row, "question": "", "result": {k[9:]: v for k, v in row.items() if k.startswith("best_val_")},
        "counts": {k: row.get(k) for k in counted},
        "hardware": {"device": row.get("device"), "processes": row.get("world"), "dtype": row.get("dtype"),
                     "peak_memory_gb": row.get("peak_memory_gb")},
        "commit": row.get("git", "")} for row in rows]


def git_commit() -> str:
    """The commit of the running code, with "+" if tracked files were edited; "" outside a repository."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--exclude=*",
               "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
