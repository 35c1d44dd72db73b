"""Sweeps and ablations: a script over arms and seeds, each arm compared with the config as it is.

    python sweep.py config/demo.py --grid=lr=1e-3,3e-3,1e-2 --seeds=3          # every value
    python sweep.py config/demo.py --grid=lr=1e-3,3e-3 --grid=d_ff=256,384     # every combination
    python sweep.py config/demo.py --arm=activation=gelu --arm="optimizer=sgd lr=0.1" --arm=dropout=0.1
    python sweep.py config/mini3.py --max_steps=500 --arm="config/mini7.py max_steps=500"  # a whole config
    python sweep.py config/demo.py --arm=qk_norm --jobs=2 --dry_run            # the runs and their state

Every option of the script (train.py, or --script) is one here too and holds for all runs. An arm is options
on top of those, or a config file, whose options win: what each arm changes is listed before it runs. The arm
`base` changes nothing and always runs; a grid's value that the config has is base. A run is a process of its
own, `python train.py out/NAME_sweep/ARM.py --seed=S --name=NAME_ARM_sS`, where the .py file holds the arm's
configuration. With the same seed all arms see the same data in the same order, so differences are taken seed
by seed.

The same command continues after Ctrl-C or SIGTERM, which the runs get too and save (kill -9 leaves those of
the moment running). Runs that ended are read, half-done ones continued, those with other settings refused;
further arms and more seeds reuse what there is. out/NAME_sweep/ gets table.md, results.jsonl, sweep.png and
the logs.
"""
import importlib
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from common import checkpoint, data
from common.config import Config, ConfigError, UserError, launch, load
from common.console import resume_command, say
from common.distributed import Dist
from common.files import make_folder, write_text
from common.run import RunConfig, append_to_ledger, digest, finite, ledger_row, read_ledger
from common.stats import holm, paired_difference
from common.stop import StopRequest
from common.tables import grid, new_figure, save_figure

import torch
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# Config

HERE = os.path.dirname(os.path.abspath(__file__))
OF_THE_SWEEP = ("name", "out_dir", "seed", "overwrite", "dry_run", "max_minutes")  # not an arm's to set


@dataclass
class SweepOptions(Config):
    SCRIPT_CONFIG: ClassVar[type]  # of the script that is swept
    # sweep
    script: str = "train"  # whose options these are and which is run: any script that saves runs
    grid: tuple[str, ...] = ()  # OPTION=VALUE,VALUE,...: an arm per value; repeated: per combination
    arm: tuple[str, ...] = ()  # "OPTION=VALUE ..." or a config file: one arm; may be repeated
    seeds: int = 3  # runs per arm: seed, seed + 1, ...
    jobs: int = 1  # runs at the same time; they share cores, memory (set micro_batch_size) and GPUs
    metric: str = "loss"  # what is compared: loss, bits_per_byte or another number in the runs' results

    def problems(self) -> list[str]:
        out = super().problems() + self.at_least(1, "seeds", "jobs")
        if getattr(self, "max_minutes", 0):
            out.append("max_minutes would end runs halfway; use --max_steps or --epochs")
        return out or make_arms(self)[1]


def sweep_config(script: str) -> type:
    """The options of a sweep of `script`: its own and SweepOptions."""
    if not re.fullmatch(r"\w+", script) or not os.path.exists(os.path.join(HERE, f"{script}.py")):
        raise UserError(f"no script '{script}.py' to sweep; use --script=train")
    found = [c for c in vars(importlib.import_module(script)).values()
             if isinstance(c, type) and issubclass(c, RunConfig) and c.__module__ == script]
    if not found:
        raise UserError(f"{script}.py saves no runs to sweep over; use --script=train")
    return dataclass(type("SweepConfig", (SweepOptions, found[0]), {
        "SCRIPT_CONFIG": found[0], "__module__": __name__}))


SweepConfig = sweep_config("train")

# ------------------------------------------------------------------------------------------------------------
# Arms and runs


@dataclass
class Arm:
    name: str  # in folder names
    text: str  # as it was typed
    cfg: RunConfig
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
    kind = cfg.SCRIPT_CONFIG
    base = {f.name: getattr(cfg, f.name) for f in fields(kind)}
    axes = [(key, values.split(",")) for key, _, values in (text.partition("=") for text in cfg.grid)]
    points = itertools.product(*([f"{key}={value}" for value in values] for key, values in axes))
    texts = [" ".join(point) for point in points if point] + list(cfg.arm)
    text = " ".join(["base", *(f"{key}={base.get(key.replace('-', '_'))}" for key, _ in axes)])
    arms, problems = [Arm("base", text, kind(**base), [])], []
    for text in texts:
        words = text.split()
        try:
            arm = load(kind, [w if w.endswith(".py") else f"--{w}" for w in words], base)
        except ConfigError as e:
            problems += [f"arm '{text}': {p}" for p in e.problems]
            continue
        changes = arm.differences(base, free=set())
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
    cfg, meta = replace(run.arm.cfg, seed=run.seed), data.read_meta(run.arm.cfg.data)
    differences = cfg.resolved(meta).differences(saved["config"], cfg.may_change() - {"dtype"})
    if saved["data_sha256"] != meta["splits"]["train"]["sha256"]:
        differences.append(f"data: the training tokens in {cfg.data} are not those it began with")
    if not differences and saved["progress"]["ended"]:
        rows = read_ledger(out_dir)
        run.row = next((r for r in rows if r["run_id"] == saved["progress"]["run_id"]), None)
    return differences


def write_arm(arm: Arm, folder: str) -> None:
    """The arm's configuration as a config file: all that is not the script's default."""
    lines = [f"# Written by sweep.py: {arm.text}"]
    lines += [f"{f.name} = {getattr(arm.cfg, f.name)!r}" for f in fields(arm.cfg)
              if f.name not in ("name", "seed", "overwrite") and getattr(arm.cfg, f.name) != f.default]
    write_text(os.path.join(folder, f"{arm.name}.py"), "\n".join([*lines, ""]))


# ------------------------------------------------------------------------------------------------------------
# Running


def start(cfg: SweepConfig, run: Run, folder: str, slot: int) -> subprocess.Popen:
    """The script in a session of its own: the terminal's Ctrl-C reaches it once, through us."""
    script, config = os.path.join(HERE, f"{cfg.script}.py"), os.path.join(folder, f"{run.arm.name}.py")
    command = [sys.executable, script, config, f"--seed={run.seed}", f"--name={run.name}",
               *["--overwrite"] * cfg.overwrite]
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
        score = score_of(run.row, cfg.metric)
        say(f"{run.name:<40} {cfg.metric} {score:.4f}, {run.row['seconds'] / 60:.1f} minutes")
    elif not stopping:
        with open(os.path.join(folder, f"{run.name}.log"), errors="replace") as f:
            lines = f.read().strip().splitlines() or ["no output"]
        run.error = next((line for line in lines if line.startswith("error: ")), lines[-1])
        say(f"{run.name:<40} failed: {run.error} (see {f.name})")


# ------------------------------------------------------------------------------------------------------------
# Report


def score_of(row: dict, metric: str) -> float:
    if not isinstance(row["result"].get(metric), (int, float)):
        known = ", ".join(k for k, v in row["result"].items() if isinstance(v, (int, float)) and k != "step")
        raise UserError(f"metric={metric} is no result of {row['script']}.py; there are {known}\n"
                        "all runs are kept: give the same command with another --metric")
    return row["result"][metric]


def compare(cfg: SweepConfig, arms: list[Arm], runs: list[Run]) -> list[dict]:
    """A row per arm: results by seed, and the difference to base over the seeds that both have. What cannot
    be said is nan."""
    results = []
    for arm in arms:
        rows = {r.seed: r.row for r in runs if r.arm is arm and r.row}
        scores = {seed: score_of(row, cfg.metric) for seed, row in rows.items()}
        base = results[0]["scores"] if results else {}
        seeds = [s for s in scores if s in base]
        effect = paired_difference([scores[s] for s in seeds], [base[s] for s in seeds])
        means = {key: statistics.fmean(row["counts"].get(key, math.nan) for row in rows.values()) if rows
                 else math.nan for key in ("parameters", "tokens")}
        seconds = statistics.fmean(row["seconds"] for row in rows.values()) if rows else math.nan
        results.append({
            "arm": arm.text, "changes": arm.changes, **means, "seconds": seconds,
            "tokens_per_second": means["tokens"] / max(seconds, 1e-9), "metric": cfg.metric, "scores": scores,
            "mean": statistics.fmean(scores.values()) if scores else math.nan,
            "sd": statistics.stdev(scores.values()) if len(scores) > 1 else math.nan,
            "differences": {s: scores[s] - base[s] for s in seeds}, "difference": effect.mean,
            "low": effect.low, "high": effect.high, "p": effect.p,
            "commits": sorted({row["commit"] for row in rows.values()})})
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
    return grid(lines)


def notes(cfg: SweepConfig, results: list[dict], runs: list[Run]) -> list[str]:
    """What a reader of the table must know."""
    unit = {"loss": "nats per token", "bits_per_byte": "bits per byte"}.get(cfg.metric, cfg.metric)
    out = [f"{unit}, best evaluation of the validation split; sd over seeds; runs at a time: {cfg.jobs}"]
    halves = [(r["high"] - r["low"]) / 2 for r in results if math.isfinite(r["p"])]
    if halves:
        out += ["difference: arm - base over equal seeds, of a loss negative = better; t interval and paired "
                "t-test; "
                f"p (Holm) is adjusted for the number of arms, {len(halves)}",
                f"{cfg.seeds} seeds show differences from about {statistics.median(halves):.4f} on (median "
                "half-width of the intervals); smaller ones may be there and are not seen"]
    elif len(results) > 1:
        out.append("one seed says nothing: a difference may be the seed's; use --seeds=3 or more")
    if len(tokens := {r["tokens"] for r in results if r["scores"]}) > 1:
        out.append(f"the arms did not train on equally many tokens: {min(tokens):,.0f} to {max(tokens):,.0f}")
    if len(commits := sorted({commit for r in results for commit in r["commits"]})) > 1:
        out.append(f"the runs come from different versions of the code: {', '.join(commits)}")
    return out + [f"{r.name} failed: {r.error}" for r in runs if r.error]


def draw(cfg: SweepConfig, arms: list[Arm], results: list[dict], path: str) -> None:
    """Score against value for a grid over one number, else the differences to base with their intervals."""
    key = cfg.grid[0].split("=")[0].replace("-", "_") if len(cfg.grid) == 1 and not cfg.arm else ""
    curve = key and type(getattr(cfg, key)) in (int, float)
    done = [(a, r) for a, r in zip(arms, results, strict=True) if r["scores" if curve else "differences"]]
    figure = new_figure(7, 4.2 if curve else 1.4 + 0.4 * len(done))
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
        axes.set(xlabel=f"{cfg.metric}, difference to base with 95 % interval", title=cfg.name)
    axes.grid(alpha=0.3)
    save_figure(figure, path)


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
    make_folder(folder)
    for arm in arms:
        write_arm(arm, folder)
    with StopRequest() as stop:
        run_all(cfg, runs, folder, stop)
    if not all(r.row or r.error for r in runs):
        say(f"stopped; continue with:  {resume_command()}")
        return {"status": "stopped"}
    return report(cfg, arms, runs, folder)


def report(cfg: SweepConfig, arms: list[Arm], runs: list[Run], folder: str) -> dict:
    results = compare(cfg, arms, runs)
    text = f"{table(cfg, results)}\n\n" + "".join(f"- {note}\n" for note in notes(cfg, results, runs))
    write_text(os.path.join(folder, "table.md"), f"    {resume_command()}\n\n{text}")
    rows = finite(results)
    write_text(os.path.join(folder, "results.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    if any(r["differences"] for r in results):
        draw(cfg, arms, results, os.path.join(folder, "sweep.png"))
    say(f"\n{text}in {folder}: table.md, results.jsonl, sweep.png")
    if failed := "".join(f"\n  {r.name}: {r.error}" for r in runs if r.error):
        raise UserError(f"runs failed; the same command tries them again{failed}")
    done = [r.row for r in runs]
    counts = {"arms": len(arms), "runs": len(runs)}
    row = ledger_row("sweep", cfg, Dist(0, 1, torch.device("cpu")), counts=counts,
                     result={"arms": results}, seconds=sum(r["seconds"] for r in done), dtype=cfg.dtype,
                     run_id=digest([cfg.metric, *(r["run_id"] for r in done)]))
    row["hardware"] = done[0]["hardware"]
    append_to_ledger(cfg.out_dir, row)
    return row


def chosen_config() -> type:
    return sweep_config(next((a.partition("=")[2] for a in sys.argv if a.startswith("--script=")), "train"))


if __name__ == "__main__":
    launch(main, chosen_config)
