"""Kills runs at random moments with SIGKILL, SIGTERM and SIGINT, resumes them until they end, and compares
each with the same run left alone: every logged number, every tensor of last.pt and best.pt, the ledger.

    PYTHONPATH=. python tests/kills.py FOLDER CORPUS 1000        # prints a line of JSON

Sessions are forked from this process, which has imported torch once, so that one takes a tenth of a second.
"""
import itertools
import json
import os
import random
import signal
import sys
import time

import train
from common.config import UserError
from common.files import read_rows
from tests.test_train import assert_same_run

import matplotlib.figure  # noqa: F401, before the forks
import torch

torch.set_num_threads(1)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
COMMON = {"device": "cpu", "dtype": "fp32", "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 32,
          "batch_size": 8, "lr": 3e-3, "epochs": 0.0, "max_steps": 40, "eval_interval": 7, "log_interval": 1,
          "sample_tokens": 4, "prompts": ("the",), "save_minutes": 0.0}
VARIANTS = {
    "adamw": {"dropout": 0.1, "micro_batch_size": 2, "patience": 3},
    "muon": {"optimizer": "muon", "muon_warmup_steps": 8, "n_experts": 3, "window": 8, "pos": "rope",
             "dropout": 0.1},
    "gated": {"mixer": "context", "pos": "none", "activation": "relu", "tie_embeddings": False, "tbptt": 16,
              "dropout": 0.1, "schedule": "wsd"},
    "fp16": {"dtype": "fp16", "n_unique_blocks": 1, "adapter_rank": 4, "save_minutes": 5.0},
    "scan": {"mixer": "context", "context_update": "scan", "pos": "none", "short_conv": 3, "optimizer": "sgd",
             "max_steps": 0, "epochs": 0.05},
    "lstm": {"mixer": "lstm", "pos": "none", "dtype": "bf16", "eval_lens": (16,), "save_minutes": 0.002}}


def session(cfg, seconds: float | None, number=signal.SIGKILL) -> int:
    """The exit code of a forked process that starts or resumes the run; the signal comes after `seconds`."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # shells' background jobs ignore it
            sys.stdout = sys.stderr = open(os.path.join(cfg.out_dir, "said"), "w", buffering=1)
            train.main(cfg)
            code = 0
        except KeyboardInterrupt:
            code = 130
        except UserError as e:
            print(f"error: {e}")
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_until_it_ends(cfg, rng: random.Random) -> dict[str, int]:
    """Sessions of random length until one ends by itself, growing slowly so that there is progress; how often
    each signal came while the session still ran."""
    kills = {}
    for n in itertools.count():
        number = rng.choice(SIGNALS)
        code = session(cfg, rng.uniform(0.01, 0.15 + 0.03 * n), number)
        # SIGTERM and SIGINT save and exit with 0; SIGINT before the loop interrupts with 130
        assert code in (0, -number, 130), f"{cfg.name}: {signal.Signals(number).name} gave {code}"
        if code == 0 and any(r["name"] == cfg.name for r in read_rows(f"{cfg.out_dir}/ledger.jsonl")):
            return kills
        kills[signal.Signals(number).name] = kills.get(signal.Signals(number).name, 0) + 1
        assert n < 400, f"{cfg.name} makes no progress"


def main(folder: str, corpus: str, wanted: int, seed: int = 7) -> None:
    rng, counts, runs = random.Random(seed), {}, 0
    while sum(counts.values()) < wanted:
        for name, options in VARIANTS.items():
            cfgs = []
            for label in ("whole", "parts"):
                out = os.path.join(folder, f"{name}_{runs}_{label}")
                os.makedirs(out)
                own = {"data": corpus, "out_dir": out, "name": name}
                cfgs.append(train.TrainConfig(**COMMON | options | own))
            whole, parts = cfgs
            assert session(whole, None) == 0
            for key, value in kill_until_it_ends(parts, rng).items():
                counts[key] = counts.get(key, 0) + value
            assert_same_run(whole, parts)
            files = [sorted(os.listdir(os.path.join(cfg.out_dir, name))) for cfg in cfgs]
            assert files[0] == files[1], files
            assert len(read_rows(os.path.join(parts.out_dir, "ledger.jsonl"))) == 1
            runs += 1
            if sys.stderr.isatty() or os.environ.get("SHOW"):
                print(runs, name, counts, file=sys.stderr)
            if sum(counts.values()) >= wanted:
                break
    print(json.dumps({"runs": runs, "kills": counts, "seed": seed}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
