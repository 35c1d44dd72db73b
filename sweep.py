"""Sweeps and ablations: train.py over arms and seeds, each arm compared with the config as it is.

    python sweep.py config/demo.py --grid=lr=1e-3,3e-3,1e-2 --seeds=3          # every value
    python sweep.py config/demo.py --grid=lr=1e-3,3e-3 --grid=d_ff=256,384     # every combination
    python sweep.py config/demo.py --arm=activation=gelu --arm="optimizer=sgd lr=0.1" --arm=dropout=0.1
    python sweep.py config/mini3.py --max_steps=500 --arm="config/mini7.py max_steps=500"  # a whole config
    python sweep.py config/demo.py --arm=qk_norm --jobs=2 --dry_run            # the runs and their state

Every option of train.py is one here too and holds for all runs. An arm is options on top of those, or a
config file, whose options win: what each arm changes is listed before it runs. The arm `base` changes nothing
and always runs; a grid's value that the config has is base. A run is a process of its own, `python train.py
out/NAME_sweep/ARM.py --seed=S --name=NAME_ARM_sS`, where the .py file holds the arm's configuration. With the
same seed all arms see the same data in the same order, so differences are taken seed by seed.

The same command goes on after Ctrl-C or SIGTERM, which the runs get too and save (kill -9 leaves those of the
moment going). Runs that ended are read, half-done ones continued, those with other settings refused; further
arms and more seeds reuse what there is. out/NAME_sweep/ gets table.md, results.jsonl, sweep.png and the logs.
"""
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from typing import Literal

import torch
from tqdm import tqdm

from common import checkpoint, data
from common.config import ConfigError, UserError, load, run
from common.runlog import read_jsonl, say
from common.stats import holm, paired_difference
from common.stop import StopRequest
from train import MAY_CHANGE, TrainConfig, resume_command

# ------------------------------------------------------------------------------------------------------------
# Config

HERE = os.path.dirname(os.path.abspath(__file__))
OF_THE_SWEEP = ("name", "out_dir", "seed", "overwrite", "dry_run", "max_minutes")  # not an arm's to set


@dataclass
class SweepConfig(TrainConfig):
    # sweep
    grid: tuple[str, ...] = ()  # OPTION=VALUE,VALUE,...: an arm per value; repeated: per combination
    arm: tuple[str, ...] = ()  # "OPTION=VALUE ..." or a config file: one arm; may be repeated
    seeds: int = 3  # runs per arm: seed, seed + 1, ...
    jobs: int = 1  # runs at the same time; they share cores, memory (set micro_batch_size) and GPUs
    metric: Literal["loss", "bits_per_byte"] = "loss"  # of the best evaluation, by loss; lower is better

    def problems(self) -> list[str]:
        out = super().problems()
        out += [f"{key} must be at least 1, got {getattr(self, key)}" for key in ("seeds", "jobs")
                if getattr(self, key) < 1]
        if self.max_minutes:
            out.append("max_minutes would end runs halfway; use --max_steps or --epochs")
        return out or make_arms(self)[1]


# ------------------------------------------------------------------------------------------------------------
# Arms and runs


@dataclass
class Arm:
    name: str  # in folder names
    text: str  # as it was typed
    cfg: TrainConfig
    changes: list[str]  # "option: base's value -> this arm's"


@dataclass
class Run:
    arm: Arm
    seed: int
    name: str  # its folder in out_dir
    row: dict | None = None  # its line in the ledger, once it has ended
    error: str = ""


def make_arms(cfg: SweepConfig) -> tuple[list[Arm], list[str]]:
    """Base and the arms, and all that is wrong with them. A grid's value that the config has is base."""
    base = {f.name: getattr(cfg, f.name) for f in fields(TrainConfig)}
    axes = [(key, values.split(",")) for key, _, values in (text.partition("=") for text in cfg.grid)]
    points = itertools.product(*([f"{key}={value}" for value in values] for key, values in axes))
    texts = [" ".join(point) for point in points if point] + list(cfg.arm)
    text = " ".join(["base", *(f"{key}={base.get(key.replace('-', '_'))}" for key, _ in axes)])
    arms, problems = [Arm("base", text, TrainConfig(**base), [])], []
    for text in texts:
        words = text.split()
        try:
            arm = load(TrainConfig, [w if w.endswith(".py") else f"--{w}" for w in words], base)
        except ConfigError as e:
            problems += [f"arm '{text}': {p}" for p in e.problems]
            continue
        changes = checkpoint.config_differences(base, asdict(arm))
        own = [c for c in changes if c.split(":")[0] in OF_THE_SWEEP]
        parts = [os.path.basename(w)[:-3] if w.endswith(".py") else w for w in words]
        name = re.sub(r"[^\w.+-]+", "-", "_".join(parts))
        if own:
            problems.append(f"arm '{text}': only the whole sweep can set {', '.join(own)}")
        elif not changes and text in cfg.arm:
            problems.append(f"arm '{text}' changes nothing: the config says so already")
        elif name in [a.name for a in arms]:
            problems.append(f"arm '{text}': there is another arm '{name}'")
        elif changes:
            arms.append(Arm(name, text, arm, changes))
    if cfg.metric == "loss" and any(a.cfg.data != cfg.data for a in arms):
        problems.append("losses per token do not compare between data folders: use --metric=bits_per_byte")
    return arms, problems


def look_up(run: Run, out_dir: str) -> list[str]:
    """Set run.row if the run has ended. Returns in what a run of that name differs from what it should be:
    settings (dtype too, which train.py lets a continued run change) and training tokens."""
    path = os.path.join(out_dir, run.name, "last.pt")
    if not os.path.exists(path):
        return []
    saved = checkpoint.load(path, keys=("progress", "config", "data_sha256"))
    meta, cfg = data.read_meta(run.arm.cfg.data), asdict(run.arm.cfg) | {"seed": run.seed}
    n_tokens = meta["tokenizer"]["vocab_size"]
    cfg |= {"vocab_size": cfg["vocab_size"] or n_tokens, "n_tokens": n_tokens}  # as train.py resolves them
    differences = checkpoint.config_differences(saved["config"], cfg, MAY_CHANGE - {"dtype"})
    if saved["data_sha256"] != meta["splits"]["train"]["sha256"]:
        differences.append(f"data: the training tokens in {run.arm.cfg.data} are not those it began with")
    if not differences and saved["progress"]["ended"]:
        rows = read_jsonl(os.path.join(out_dir, "ledger.jsonl"))
        run.row = next((r for r in rows if r["run_id"] == saved["progress"]["run_id"]), None)
    return differences


def write_arm(arm: Arm, folder: str) -> None:
    """The arm's configuration as a config file: all that is not train.py's default."""
    lines = [f"# Written by sweep.py: {arm.text}"]
    lines += [f"{f.name} = {getattr(arm.cfg, f.name)!r}" for f in fields(TrainConfig)
              if f.name not in ("name", "seed", "overwrite") and getattr(arm.cfg, f.name) != f.default]
    write(os.path.join(folder, f"{arm.name}.py"), "\n".join([*lines, ""]))


def write(path: str, text: str) -> None:
    checkpoint.write_atomically(path, lambda f: f.write(text.encode()))


# ------------------------------------------------------------------------------------------------------------
# Running


def start(cfg: SweepConfig, run: Run, folder: str, slot: int) -> subprocess.Popen:
    """train.py in a session of its own: the terminal's Ctrl-C reaches it once, through us."""
    command = [sys.executable, os.path.join(HERE, "train.py"), os.path.join(folder, f"{run.arm.name}.py"),
               f"--seed={run.seed}", f"--name={run.name}"] + ["--overwrite"] * cfg.overwrite
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // cfg.jobs))}
    gpus = torch.cuda.device_count()
    if cfg.jobs > 1 and gpus > 1:
        visible = env.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
    with open(os.path.join(folder, f"{run.name}.log"), "w") as log:
        return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log,
                                stderr=subprocess.STDOUT, start_new_session=True)


def run_all(cfg: SweepConfig, runs: list[Run], folder: str, stop: StopRequest) -> None:
    """Run what has not ended, cfg.jobs at a time. A run that fails keeps its error and stops no other."""
    waiting, running, stopping = [r for r in runs if not r.row], {}, False  # running: slot -> (run, process)
    bar = tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run", dynamic_ncols=True,
               disable=not sys.stderr.isatty())
    try:
        while running or (waiting and not stop.requested):
            while waiting and len(running) < cfg.jobs and not stop.requested:
                slot = min(set(range(cfg.jobs)) - running.keys())
                running[slot] = waiting[0], start(cfg, waiting.pop(0), folder, slot)
            if stop.requested and not stopping:
                stopping = True
                for _, process in running.values():
                    process.terminate()  # it saves and exits
            bar.set_postfix_str(", ".join(r.name for r, _ in running.values()))
            time.sleep(0.1)
            for slot, (r, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    settle(cfg, r, folder, stopping)
                    bar.update()
    finally:
        for _, process in running.values():  # after an error here, or a second Ctrl-C
            process.kill()
        bar.close()


def settle(cfg: SweepConfig, run: Run, folder: str, stopping: bool) -> None:
    look_up(run, cfg.out_dir)
    if run.row:
        score = run.row[f"best_val_{cfg.metric}"]
        say(f"{run.name:<40} {cfg.metric} {score:.4f}, {run.row['seconds'] / 60:.1f} minutes")
    elif not stopping:
        with open(os.path.join(folder, f"{run.name}.log"), errors="replace") as f:
            lines = f.read().strip().splitlines() or ["no output"]
        run.error = next((line for line in lines if line.startswith("error: ")), lines[-1])
        say(f"{run.name:<40} failed: {run.error} (see {f.name})")


# ------------------------------------------------------------------------------------------------------------
# Report


def compare(cfg: SweepConfig, arms: list[Arm], runs: list[Run]) -> list[dict]:
    """A row per arm: results by seed, and the difference to base over the seeds that both have. What cannot
    be said is nan."""
    results = []
    for arm in arms:
        rows = {r.seed: r.row for r in runs if r.arm is arm and r.row}
        scores = {seed: row[f"best_val_{cfg.metric}"] for seed, row in rows.items()}
        base = results[0]["scores"] if results else {}
        seeds = [s for s in scores if s in base]
        effect = paired_difference([scores[s] for s in seeds], [base[s] for s in seeds])
        means = {key: statistics.fmean(row[key] for row in rows.values()) if rows else math.nan
                 for key in ("parameters", "tokens_per_second", "seconds", "tokens")}
        results.append({
            "arm": arm.text, "changes": arm.changes, **means, "metric": cfg.metric, "scores": scores,
            "mean": statistics.fmean(scores.values()) if scores else math.nan,
            "sd": statistics.stdev(scores.values()) if len(scores) > 1 else math.nan,
            "differences": {s: scores[s] - base[s] for s in seeds}, "difference": effect.mean,
            "low": effect.low, "high": effect.high, "p": effect.p,
            "git": sorted({row["git"] for row in rows.values()})})
    for row, p in zip(results, holm([row["p"] for row in results]), strict=True):
        row["p_holm"] = p
    return results


def table(cfg: SweepConfig, results: list[dict]) -> str:
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    lines = [["arm", "parameters", "tok/s", "minutes", *(f"seed {s}" for s in seeds), "mean", "sd",
              "difference", "95 % from", "to", "p", "p (Holm)"]]
    forms = [",.0f", ",.0f", ".1f", *[".4f"] * (cfg.seeds + 2), *["+.4f"] * 3, ".3g", ".3g"]
    for r in results:
        numbers = [r["parameters"], r["tokens_per_second"], r["seconds"] / 60,
                   *(r["scores"].get(s, math.nan) for s in seeds),
                   *(r[key] for key in ("mean", "sd", "difference", "low", "high", "p", "p_holm"))]
        lines.append([r["arm"], *(format(x, form) if math.isfinite(x) else ""
                                  for x, form in zip(numbers, forms, strict=True))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [[c.ljust(w) if c is line[0] else c.rjust(w) for c, w in zip(line, widths, strict=True)]
             for line in lines]
    lines.insert(1, ["-" * (w - 1) + (":" if i else "-") for i, w in enumerate(widths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def notes(cfg: SweepConfig, results: list[dict], runs: list[Run]) -> list[str]:
    """What a reader of the table must know."""
    unit = "nats per token" if cfg.metric == "loss" else "bits per byte"
    out = [f"{unit}, best evaluation of the validation split; sd over seeds; runs at a time: {cfg.jobs}"]
    halves = [(r["high"] - r["low"]) / 2 for r in results if math.isfinite(r["p"])]
    if halves:
        out += ["difference: arm - base over equal seeds, negative = better; t interval and paired t-test; "
                f"p (Holm) is adjusted for the number of arms, {len(halves)}",
                f"{cfg.seeds} seeds show differences from about {statistics.median(halves):.4f} on (median "
                "half-width of the intervals); smaller ones may be there and are not seen"]
    elif len(results) > 1:
        out.append("one seed says nothing: a difference may be the seed's; use --seeds=3 or more")
    if len(tokens := {r["tokens"] for r in results if r["scores"]}) > 1:
        out.append(f"the arms did not train on equally many tokens: {min(tokens):,.0f} to {max(tokens):,.0f}")
    if len(commits := sorted({commit for r in results for commit in r["git"]})) > 1:
        out.append(f"the runs come from different versions of the code: {', '.join(commits)}")
    return out + [f"{r.name} failed: {r.error}" for r in runs if r.error]


def draw(cfg: SweepConfig, arms: list[Arm], results: list[dict], path: str) -> None:
    """Score against value for a grid over one number, else the differences to base with their intervals."""
    from matplotlib.figure import Figure
    key = cfg.grid[0].split("=")[0].replace("-", "_") if len(cfg.grid) == 1 and not cfg.arm else ""
    curve = key and type(getattr(cfg, key)) in (int, float)
    done = [(a, r) for a, r in zip(arms, results, strict=True) if r["scores" if curve else "differences"]]
    figure = Figure(figsize=(7, 4.2 if curve else 1.4 + 0.4 * len(done)), layout="constrained")
    axes = figure.subplots()
    dots = {"linestyle": "", "marker": "o", "color": "C1", "markersize": 4, "alpha": 0.7}
    if curve:
        done.sort(key=lambda pair: getattr(pair[0].cfg, key))
        xs = [getattr(a.cfg, key) for a, _ in done]
        axes.plot(xs, [r["mean"] for _, r in done], color="C0")
        for x, (_, r) in zip(xs, done, strict=True):
            axes.plot([x] * len(r["scores"]), list(r["scores"].values()), **dots)
        if min(xs) > 0 and xs[-1] > 10 * xs[0]:
            axes.set_xscale("log")
        axes.set(xlabel=key, ylabel=f"best validation {cfg.metric}; line: mean, dots: seeds", title=cfg.name)
    else:
        for y, (_, r) in enumerate(done):
            axes.plot(list(r["differences"].values()), [y] * len(r["differences"]), **dots)
            half = r["high"] - r["difference"] if math.isfinite(r["high"]) else 0
            axes.errorbar(r["difference"], y, xerr=half, fmt="|", color="C0", markersize=12)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(done)), [a.text for a, _ in done])
        axes.set_ylim(len(done) - 0.5, -0.5)  # the first on top
        axes.set(xlabel=f"{cfg.metric}, difference to base with 95 % interval; left = better", title=cfg.name)
    axes.grid(alpha=0.3)
    figure.savefig(f"{path}.tmp", format="png", dpi=120)
    os.replace(f"{path}.tmp", path)


# ------------------------------------------------------------------------------------------------------------
# Main


def main(cfg: SweepConfig) -> dict:
    """Run, or go on with, the sweep. Returns its state and the table's rows; UserError names failed runs."""
    arms, folder = make_arms(cfg)[0], os.path.join(cfg.out_dir, f"{cfg.name}_sweep")
    runs = [Run(arm, seed, f"{cfg.name}_{arm.name}_s{seed}")  # seed by seed: whatever there is compares
            for seed in range(cfg.seed, cfg.seed + cfg.seeds) for arm in arms]
    stale = [] if cfg.overwrite else [f"{r.name}: {d}" for r in runs for d in look_up(r, cfg.out_dir)]
    if stale:
        raise UserError(f"{cfg.out_dir} holds runs of these names with other settings (there -> here)\n  "
                        + "\n  ".join(stale)
                        + "\nnothing was run; use another --name, or throw them away with --overwrite")
    for arm in arms:
        say(f"{arm.text:<30} {', '.join(arm.changes)}".rstrip())
    todo = [r.name for r in runs if not r.row]
    say(f"arms x seeds = {len(arms)} x {cfg.seeds} = {len(runs)} runs, {len(runs) - len(todo)} of them done; "
        f"{cfg.jobs} at a time, output in {folder}")
    if cfg.dry_run:
        return {"status": "planned", "runs": todo}
    os.makedirs(folder, exist_ok=True)
    for arm in arms:
        write_arm(arm, folder)
    with StopRequest() as stop:
        run_all(cfg, runs, folder, stop)
    if not all(r.row or r.error for r in runs):
        say(f"stopped; go on with:  {resume_command()}")
        return {"status": "stopped"}

    results = compare(cfg, arms, runs)
    text = f"{table(cfg, results)}\n\n" + "".join(f"- {note}\n" for note in notes(cfg, results, runs))
    write(os.path.join(folder, "table.md"), f"    {resume_command()}\n\n{text}")
    rows = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()}
            for r in results]  # JSON has no nan
    write(os.path.join(folder, "results.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    if any(r["differences"] for r in results):
        draw(cfg, arms, results, os.path.join(folder, "sweep.png"))
    say(f"\n{text}in {folder}: table.md, results.jsonl, sweep.png")
    if failed := "".join(f"\n  {r.name}: {r.error}" for r in runs if r.error):
        raise UserError(f"runs failed; the same command tries them again{failed}")
    return {"status": "finished", "results": results}


if __name__ == "__main__":
    run(main, SweepConfig)
