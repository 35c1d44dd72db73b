"""Sweeps and ablations: a script over arms and seeds, each arm compared with the config as it is.

    python sweep.py config/demo.py --grid=lr=1e-3,3e-3,1e-2 --seeds=3          # values of one option
    python sweep.py config/demo.py --grid=lr=1e-3,3e-3 --grid=d_ff=256,384     # every combination
    python sweep.py config/demo.py --arm=activation=gelu --arm="optimizer=sgd lr=0.1" --arm=dropout=0.1
    python sweep.py config/mini3.py --max_steps=500 --arm="config/mini7.py max_steps=500"  # a whole config
    python sweep.py config/demo.py --arm=qk_norm --jobs=2 --dry_run            # what it would run
    python sweep.py config/continual.py --arm=replay=0.05 --metric=shakespeare_forgotten --against=loss
    python sweep.py config/demo.py --arm=d_model=192 --equal_seconds=120       # equal time, not equal steps
    python sweep.py config/recipe.py                                           # a study in a config file

Every option of the script (train.py, or --script) works here and holds for all runs. An arm is options on top
of those, or a config file, whose options win; what each arm changes is printed first. The arm `base` changes
nothing and always runs; a grid point that changes nothing is base. Each run is a process of its own,
`python train.py out/NAME_sweep/ARM.py --seed=S --name=NAME_ARM_sS`, where ARM.py holds the arm's config. With
the same seed, all arms see the same data in the same order, so differences are taken seed by seed. With
--setting="OPTION=VALUE ..." all arms run once more under these options, against the base under them.

--equal_seconds gives each arm as many steps as take that long: steps are timed before, alone and in turns,
and their times kept in steps.json, so that every later command has the same arms. Arms that change only
learning rates and the like share one time. A verdict (better, worse, undecided) needs runs of 1,000 steps or
more: short runs rank arms otherwise than long ones (--verdict_steps).

Ctrl-C and SIGTERM make the running runs save and stop (kill -9 leaves them running). The same command
continues: it reads finished runs, continues unfinished ones and refuses runs with other settings. Arms and
seeds can be added later. out/NAME_sweep/ gets table.md, results.jsonl, sweep.png (with --against, against.png
too) and the logs.
"""
import contextlib
import importlib
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from typing import ClassVar

from common import checkpoint, data
from common.config import Config, ConfigError, UserError, launch, load
from common.console import resume_command, say
from common.distributed import Dist
from common.files import make_folder, read_json, write_json, write_text
from common.run import RunConfig, append_to_ledger, differences_to, digest, finite, ledger_row, read_ledger
from common.stats import against_noise_floor, holm, paired_difference
from common.stop import StopRequest
from common.tables import grid, new_figure, save_figure

import torch
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# Config

HERE = os.path.dirname(os.path.abspath(__file__))
SAME_COST = ("data", "train_tokens", "lr", "muon_lr", "embed_lr", "head_lr", "scalar_lr", "schedule",
             "warmup_steps", "min_lr_ratio", "decay_fraction", "weight_decay", "beta1", "beta2",
             "muon_momentum", "muon_warmup_steps", "zero_init")  # whatever their values, a step takes as long
OF_THE_SWEEP = ("name", "out_dir", "seed", "overwrite", "dry_run", "max_minutes")  # no arm may set these


@dataclass
class SweepOptions(Config):
    SCRIPT_CONFIG: ClassVar[type]  # the config class of the script to run
    # sweep
    script: str = "train"  # the script to run, which has the other options
    grid: tuple[str, ...] = ()  # OPTION=VALUE,VALUE,...: an arm per value; repeat it for all combinations
    arm: tuple[str, ...] = ()  # one arm: "OPTION=VALUE ..." or a config file; repeat it for more
    seeds: int = 3  # runs per arm, with seeds seed, seed + 1, ...
    jobs: int = 1  # runs at a time; they share cores, memory (set micro_batch_size) and GPUs
    setting: tuple[str, ...] = ()  # "OPTION=VALUE ...": all arms under these options too; repeat it for more
    equal_seconds: float = 0.0  # training time of each run here, in place of its length; 0 = as configured
    verdict_steps: int = 1000  # no verdict if a run has fewer steps
    metric: str = "loss"  # the result to compare: loss, bits_per_byte or another number that runs report
    against: str = ""  # a second result: also draw the metric against it, a dot per run
    also: tuple[str, ...] = ()  # more results, whose means become columns of the table

    def problems(self) -> list[str]:
        out = super().problems() + self.at_least(1, "seeds", "jobs")
        out += self.at_least(0, "equal_seconds", "verdict_steps")
        if self.equal_seconds and "train_minutes" not in {f.name for f in fields(self)}:
            out.append(f"equal_seconds: {self.script}.py cannot time its steps; use --script=train")
        if self.script != self.SCRIPT_CONFIG.__module__:
            out.append(f"script must be given as the flag --script={self.script}, with '=', or in the first "
                       "config file as script = ...")
        if getattr(self, "max_minutes", 0):
            out.append("max_minutes would end runs halfway; use --max_steps or --epochs")
        return out or make_arms(self)[1]


def sweep_config(script: str) -> type:
    """The config class of a sweep of `script`: SweepOptions and the script's own options."""
    if not re.fullmatch(r"\w+", script) or not os.path.exists(os.path.join(HERE, f"{script}.py")):
        raise UserError(f"no script '{script}.py' to sweep; use --script=train")
    own = next((c for c in vars(importlib.import_module(script)).values() if isinstance(c, type)
                and issubclass(c, RunConfig) and c.__module__ == script and hasattr(c, "resolved")), None)
    if not own or script == "sweep":
        raise UserError(f"{script}.py makes no runs that can be compared; use --script=train")
    return dataclass(type("SweepConfig", (SweepOptions, own), {
        "SCRIPT_CONFIG": own, "__module__": __name__}))


SweepConfig = sweep_config("train")

# ------------------------------------------------------------------------------------------------------------
# Arms and runs


@dataclass
class Arm:
    name: str  # in file and folder names
    text: str  # as typed
    cfg: RunConfig
    changes: list[str]  # "option: value in base -> value here"
    base: str = "base"  # the name of the arm it is compared with


@dataclass
class Run:
    arm: Arm
    seed: int
    name: str  # of its folder in out_dir
    row: dict | None = None  # its line in the ledger, once it has ended
    error: str = ""


def make_arms(cfg: SweepConfig) -> tuple[list[Arm], list[str]]:
    """The arms, each setting's base first, and what is wrong with them."""
    kind = cfg.SCRIPT_CONFIG
    plain = options_of(cfg, kind)
    arms, problems = arms_of(cfg, plain)
    for setting in filter(None, cfg.setting):
        try:
            under = load(kind, as_arguments(setting.split()), plain)
        except ConfigError as e:
            problems += [f"setting '{setting}': {p}" for p in e.problems]
            continue
        name, changes = file_name(setting.split()), under.differences(plain, free=set())
        problems += [f"setting '{setting}': only the whole sweep can set {c}" for c in changes
                     if c.split(":")[0] in of_the_sweep(cfg)]
        more, wrong = arms_of(cfg, options_of(under, kind))
        problems += [f"setting '{setting}': {p}" for p in wrong]
        arms += [replace(a, name=f"{name}_{a.name}", text=f"{a.text}, {setting}", base=f"{name}_base")
                 for a in more]
    for name in {a.name for a in arms if [b.name for b in arms].count(a.name) > 1}:
        problems.append(f"two arms or settings have the same name '{name}'")
    for arm in arms:  # a typed default may contradict init_from as well
        arm.cfg.given |= cfg.given
    return arms, problems


def options_of(cfg: Config, kind: type) -> dict:
    return {f.name: getattr(cfg, f.name) for f in fields(kind)}


def as_arguments(words: list[str]) -> list[str]:
    """The words of an arm or setting as typed on a command line: config files and flags."""
    return [w if w.endswith(".py") else f"--{w}" for w in words]


def file_name(words: list[str]) -> str:
    parts = [os.path.basename(w)[:-3] if w.endswith(".py") else w for w in words]
    return re.sub(r"[^\w.+-]+", "-", "_".join(parts))


def of_the_sweep(cfg: SweepConfig) -> tuple[str, ...]:
    """The options that no arm may set."""
    return OF_THE_SWEEP + ("max_steps", "epochs", "train_minutes") * bool(cfg.equal_seconds)


def arms_of(cfg: SweepConfig, base: dict) -> tuple[list[Arm], list[str]]:
    """The arms under one setting, `base` first. A grid point that changes nothing is base."""
    kind = cfg.SCRIPT_CONFIG
    axes = [(key, values.split(",")) for key, _, values in (text.partition("=") for text in cfg.grid)]
    points = itertools.product(*([f"{key}={value}" for value in values] for key, values in axes))
    text = " ".join(["base", *(f"{key}={base.get(key.replace('-', '_'))}" for key, _ in axes)])
    arms, problems = [Arm("base", text, kind(**base), [])], []
    for text in [*filter(None, map(" ".join, points)), *cfg.arm]:
        words = text.split()
        try:
            arm = load(kind, as_arguments(words), base)
        except ConfigError as e:
            problems += [f"arm '{text}': {p}" for p in e.problems]
            continue
        changes = arm.differences(base, free=set())
        wrong, name = [c for c in changes if c.split(":")[0] in of_the_sweep(cfg)], file_name(words)
        if wrong:
            problems.append(f"arm '{text}': only the whole sweep can set {', '.join(wrong)}")
        elif not changes and text in cfg.arm:
            problems.append(f"arm '{text}' changes nothing: the config has these values already")
        elif name in [a.name for a in arms]:
            problems.append(f"arm '{text}': there is another arm '{name}'")
        elif changes:
            arms.append(Arm(name, text, arm, changes))
    if cfg.metric == "loss" and any(a.cfg.data != base["data"] for a in arms):
        problems.append("losses per token do not compare between data folders: use --metric=bits_per_byte")
    return arms, problems


def threads_of(cfg: SweepConfig) -> int:
    """Threads of each run, so that cfg.jobs of them share the cores."""
    return max(1, torch.get_num_threads() // cfg.jobs)


def for_timing(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the sweep
    torch.set_num_threads(threads)


def seconds_per_step(cfg: RunConfig) -> float:
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        return importlib.import_module("train").main(cfg)["step_seconds"]


def fixed_options(cfg: RunConfig) -> dict:
    return {k: v for k, v in asdict(cfg).items() if k not in cfg.may_change()}


def cost_options(cfg: RunConfig) -> dict:
    """The options that decide how long a step takes; of the data, only the vocabulary does."""
    ready = os.path.exists(os.path.join(cfg.data, "meta.json"))  # a dry run does without
    options = fixed_options(cfg.resolved(data.read_meta(cfg.data) if ready else None))
    return {k: v for k, v in options.items() if k not in SAME_COST}


def fit_to_time(cfg: SweepConfig, arms: list[Arm], folder: str) -> None:
    """Give each arm as many steps as take cfg.equal_seconds: its step is timed alone, in a process of its
    own, in three turns of all arms. Arms whose steps cost the same, such as those with other learning rates,
    share one time, so that noise in timing gives none of them more steps. steps.json keeps the times. A dry
    run times nothing."""
    path, known = os.path.join(folder, "steps.json"), {}
    if os.path.exists(path) and not cfg.overwrite:
        known = read_json(path)
    keys, shared, first = {}, {}, {}  # keys of steps.json: by arm, by cost; and the first arm with each
    for a in arms:
        cost, own = digest(cost_options(a.cfg)), f"{a.name} {digest(fixed_options(a.cfg))}"
        key = keys[a.name] = own if own in known else shared.get(cost, cost)  # `own`: when each arm was timed
        shared.setdefault(cost, key)
        first.setdefault(key, a)
    todo = [a for key, a in first.items() if key not in known and not cfg.dry_run]
    times = {a.name: [] for a in todo}
    bar = tqdm(total=3 * len(todo), unit="arm", desc="timing steps", disable=not sys.stderr.isatty())
    for turn in range(3):
        for arm in todo[::-1 if turn % 2 else 1]:
            trial = replace(arm.cfg, dry_run=True, train_minutes=cfg.equal_seconds / 60)
            with ProcessPoolExecutor(1, get_context("spawn"), for_timing, (threads_of(cfg),)) as pool:
                try:
                    times[arm.name].append(pool.submit(seconds_per_step, trial).result())
                except BrokenProcessPool:
                    raise UserError(f"{arm.text}: the process that timed it died; out of memory?") from None
            bar.update()
    bar.close()
    if todo:
        make_folder(folder)
        known |= {keys[name]: statistics.median(values) for name, values in times.items()}
        write_json(path, known)
    for arm in arms:
        steps, minutes = 0, cfg.equal_seconds / 60  # of a dry run
        if seconds := known.get(keys[arm.name]):
            steps, minutes = max(1, round(cfg.equal_seconds / seconds)), 0.0
        timed = replace(arm.cfg, max_steps=steps, epochs=0.0, train_minutes=minutes)
        arm.cfg, timed.given = timed, arm.cfg.given


def look_up(run: Run, out_dir: str) -> list[str]:
    """Set run.row if the run has ended. Returns how a run in its folder differs from it: in training tokens
    or settings (dtype too, although a continued run of train.py may change it)."""
    path = os.path.join(out_dir, run.name, "last.pt")
    if not os.path.exists(path):
        return []
    saved = checkpoint.load(path, keys=("progress", "config", "data_sha256"))
    cfg, meta = replace(run.arm.cfg, seed=run.seed, name=run.name), data.read_meta(run.arm.cfg.data)
    free = cfg.may_change() - {"dtype"}
    differences = differences_to(saved, cfg.resolved(meta), cfg.data_sha256(meta), free)
    if not differences and saved["progress"]["ended"]:
        run.row = next((r for r in read_ledger(out_dir) if r["run_id"] == saved["progress"]["run_id"]), None)
    return differences


def write_arm(arm: Arm, folder: str) -> None:
    """Write the arm as a config file of all options it sets, or that differ from the script's defaults."""
    lines = [f"# Written by sweep.py: {arm.text}"]
    lines += [f"{f.name} = {getattr(arm.cfg, f.name)!r}" for f in fields(arm.cfg)
              if f.name not in ("name", "seed", "overwrite") and arm.cfg.sets(f.name)]
    write_text(os.path.join(folder, f"{arm.name}.py"), "\n".join([*lines, ""]))


# ------------------------------------------------------------------------------------------------------------
# Running


def start(cfg: SweepConfig, run: Run, folder: str, slot: int) -> subprocess.Popen:
    """Start a run in a session of its own: Ctrl-C in the terminal must reach it once, through the sweep."""
    script, config = os.path.join(HERE, f"{cfg.script}.py"), os.path.join(folder, f"{run.arm.name}.py")
    command = [sys.executable, script, config, f"--seed={run.seed}", f"--name={run.name}",
               *["--overwrite"] * cfg.overwrite]
    env = os.environ | {"OMP_NUM_THREADS": str(threads_of(cfg))}
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
    """Read the result of a process that has exited, or why there is none."""
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
        raise UserError(f"metric={metric} is not a result of {row['script']}.py, which has {known}\n"
                        "all runs are kept: repeat the command with another --metric")
    return row["result"][metric]


def compare(cfg: SweepConfig, arms: list[Arm], runs: list[Run]) -> list[dict]:
    """A row per arm: scores by seed, and the difference to base over the seeds that both have. Unknown
    numbers are nan."""
    results, of_base = [], {}  # of_base: the scores of each setting's base
    for arm in arms:
        rows = {r.seed: r.row for r in runs if r.arm is arm and r.row}
        scores = {seed: score_of(row, cfg.metric) for seed, row in rows.items()}
        others = {name: {seed: score_of(row, name) for seed, row in rows.items()}
                  for name in (*[cfg.against] * bool(cfg.against), *cfg.also)}
        base = of_base.setdefault(arm.base, scores) if arm.name == arm.base else of_base[arm.base]
        seeds = [s for s in scores if s in base] if arm.name != arm.base else []
        effect = paired_difference([scores[s] for s in seeds], [base[s] for s in seeds])
        counts = [row["counts"] for row in rows.values()] or [{}]
        means = {key: statistics.fmean(c.get(key, math.nan) for c in counts)
                 for key in ("parameters", "tokens", "steps")}
        seconds = statistics.fmean([row["seconds"] for row in rows.values()] or [math.nan])
        results.append({
            "arm": arm.text, "changes": arm.changes, **means, "seconds": seconds,
            "tokens_per_second": means["tokens"] / max(seconds, 1e-9), "metric": cfg.metric, "scores": scores,
            "against": others.get(cfg.against, {}),
            "also": {k: statistics.fmean(scored.values() or [math.nan]) for k, scored in others.items()},
            "mean": statistics.fmean(scores.values() or [math.nan]),
            "sd": statistics.stdev(scores.values()) if len(scores) > 1 else math.nan,
            "differences": {s: scores[s] - base[s] for s in seeds}, "difference": effect.mean,
            "low": effect.low, "high": effect.high, "p": effect.p,
            "commits": sorted({row["commit"] for row in rows.values()})})
    for row, p in zip(results, holm([row["p"] for row in results]), strict=True):
        row["p_holm"] = p
    for base in of_base:
        under = [r for a, r in zip(arms, results, strict=True) if a.base == base]
        noise, ps = against_noise_floor([list(r["differences"].values()) for r in under])
        least = min((r["steps"] for r in under if math.isfinite(r["steps"])), default=math.inf)
        for row, p in zip(under, holm(ps), strict=True):
            row |= {"noise": noise, "p_noise": p, "verdict": verdict(cfg, row, p, least)}
    return results


def verdict(cfg: SweepConfig, row: dict, p: float, steps: float) -> str:
    if math.isnan(p):
        return ""
    if steps < cfg.verdict_steps:
        return f"none: under {cfg.verdict_steps:,} steps"
    if p >= 0.05:
        return "undecided"
    words = ("better", "worse") if re.search("loss|perplexity|bits", cfg.metric) else ("lower", "higher")
    return words[row["difference"] > 0]


def table(cfg: SweepConfig, results: list[dict]) -> str:
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    lines = [["arm", "parameters", "tok/s", "minutes", *(f"seed {s}" for s in seeds), "mean", "sd",
              "difference", "95 % from", "to", "p", "p (Holm)", "verdict"]]
    forms = [",.0f", ",.0f", ".1f", *[".4f"] * (cfg.seeds + 2), *["+.4f"] * 3, ".3g", ".3g"]
    for r in results:
        numbers = [r["parameters"], r["tokens_per_second"], r["seconds"] / 60,
                   *(r["scores"].get(s, math.nan) for s in seeds),
                   *(r[key] for key in ("mean", "sd", "difference", "low", "high", "p", "p_holm"))]
        lines.append([r["arm"], *(format(x, form) if math.isfinite(x) else ""
                                  for x, form in zip(numbers, forms, strict=True)), r["verdict"]])
    for name in results[0]["also"]:
        cells = [name, *(f"{r['also'][name]:.4f}" for r in results)]
        lines = [[*line, cell] for line, cell in zip(lines, cells, strict=True)]
    return grid(lines)


def notes(cfg: SweepConfig, results: list[dict], runs: list[Run]) -> list[str]:
    """What a reader of the table must know."""
    unit = {"loss": "nats per token", "bits_per_byte": "bits per byte"}.get(cfg.metric, cfg.metric)
    out = [f"{unit}, best evaluation of the validation split; sd over seeds; runs at a time: {cfg.jobs}"]
    halves = [(r["high"] - r["low"]) / 2 for r in results if math.isfinite(r["p"])]
    if halves:
        out += ["difference: arm - base, seed by seed (negative is better for a loss), with t interval and "
                f"paired t-test; p (Holm) is adjusted for the number of arms, {len(halves)}",
                f"{cfg.seeds} seeds can show differences of about {statistics.median(halves):.4f} or more "
                "(median half-width of the intervals); smaller ones may exist",
                "verdict: 5 %, adjusted for the number of arms, against the noise floor of the seeds: the "
                "differences' standard deviation over seeds, pooled over the arms, "
                + ", ".join(dict.fromkeys(f"{r['noise']:.4f}" for r in results))]
    elif len(results) > 1:
        out.append("one seed shows nothing: the difference may be due to the seed; use --seeds=3 or more")
    if cfg.equal_seconds:
        out.append(f"each run has as many steps as take {cfg.equal_seconds:g} s alone on this machine, by "
                   "steps.json")
    elif len(tokens := {r["tokens"] for r in results if r["scores"]}) > 1:
        out.append(f"the arms trained on unequal numbers of tokens: {min(tokens):,.0f} to {max(tokens):,.0f}")
    if len(commits := sorted({commit for r in results for commit in r["commits"]})) > 1:
        out.append(f"the runs come from different versions of the code: {', '.join(commits)}")
    return out + [f"{r.name} failed: {r.error}" for r in runs if r.error]


def draw(cfg: SweepConfig, arms: list[Arm], results: list[dict], path: str) -> None:
    """Plot score against value for a grid over one number, else each difference to base with its interval."""
    key = cfg.grid[0].split("=")[0].replace("-", "_") if len(cfg.grid) == 1 and not cfg.arm else ""
    curve = key and type(getattr(cfg, key)) in (int, float)
    done = [(a, r) for a, r in zip(arms, results, strict=True) if r["scores" if curve else "differences"]]
    labels = [textwrap.fill(a.text, 40) for a, _ in done]
    height = 1.4 + sum(0.25 + 0.15 * len(label.splitlines()) for label in labels)
    axes = new_figure(7, 4.2 if curve else height).subplots()
    if curve:
        done.sort(key=lambda pair: getattr(pair[0].cfg, key))
        xs = [getattr(a.cfg, key) for a, _ in done]
        axes.plot(xs, [r["mean"] for _, r in done], color="C0")
        dots = [(x, score) for x, (_, r) in zip(xs, done, strict=True) for score in r["scores"].values()]
        if min(xs) > 0 and xs[-1] > 10 * xs[0]:
            axes.set_xscale("log")
        axes.set(xlabel=key, ylabel=f"best validation {cfg.metric}; line: mean, dots: seeds")
    else:
        dots = [(d, y) for y, (_, r) in enumerate(done) for d in r["differences"].values()]
        halves = [r["high"] - r["difference"] if math.isfinite(r["high"]) else 0 for _, r in done]
        axes.errorbar([r["difference"] for _, r in done], range(len(done)), xerr=halves, fmt="|", color="C0",
                      markersize=12)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(done)), labels)
        axes.set(xlabel=f"{cfg.metric}, difference to base with 95 % interval", ylim=(len(done) - 0.5, -0.5))
    axes.plot(*zip(*dots, strict=True), "o", color="C1", markersize=4, alpha=0.7)
    axes.set_title(cfg.name)
    axes.grid(alpha=0.3)
    save_figure(axes.figure, path)


def draw_against(cfg: SweepConfig, results: list[dict], path: str) -> None:
    """Plot the metric against cfg.against: a colour per arm (from the eleventh on, other dots too), a dot per
    seed, a cross for the mean."""
    done = [r for r in results if r["scores"]]
    axes = new_figure(7 + 4 * (len(done) > 10), 4.8).subplots()
    for i, r in enumerate(done):
        xs, ys = [r["against"][s] for s in r["scores"]], list(r["scores"].values())
        axes.plot(xs, ys, "os^D"[i // 10 % 4], color=f"C{i}", markersize=4, alpha=0.6, label=r["arm"])
        axes.plot([statistics.fmean(xs)], [statistics.fmean(ys)], "x", color=f"C{i}")
    axes.set(xlabel=cfg.against, ylabel=cfg.metric, title=f"{cfg.name}; dots: seeds, crosses: means")
    axes.grid(alpha=0.3)
    if len(done) > 10:  # they would cover the dots
        axes.figure.legend(fontsize=8, loc="outside right center")
    else:
        axes.legend(fontsize=8)
    save_figure(axes.figure, path)


# ------------------------------------------------------------------------------------------------------------
# Main


def main(cfg: SweepConfig) -> dict:
    """Run or continue the sweep and return its ledger row. UserError lists the runs that failed."""
    arms, folder = make_arms(cfg)[0], os.path.join(cfg.out_dir, f"{cfg.name}_sweep")
    if cfg.equal_seconds:
        fit_to_time(cfg, arms, folder)
    runs = [Run(arm, seed, f"{cfg.name}_{arm.name}_s{seed}")  # seed by seed: what is done can be compared
            for seed in range(cfg.seed, cfg.seed + cfg.seeds) for arm in arms]
    stale = [] if cfg.overwrite else [f"\n  {r.name}: {d}" for r in runs for d in look_up(r, cfg.out_dir)]
    if stale:
        raise UserError(f"{cfg.out_dir} holds runs of these names with other settings (there -> here)"
                        f"{''.join(stale)}\nnothing was run; use another --name, or delete them: --overwrite")
    for arm in arms:
        steps = f"{arm.cfg.max_steps:,} steps; " if arm.cfg.max_steps else "steps not timed yet; "
        say(f"{arm.text:<30} {steps * bool(cfg.equal_seconds)}{', '.join(arm.changes)}".rstrip("; "))
    todo = [r.name for r in runs if not r.row]
    say(f"arms x seeds = {len(arms)} x {cfg.seeds} = {len(runs)} runs, {len(runs) - len(todo)} already done; "
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
    rows = "".join(json.dumps(row) + "\n" for row in finite(results))
    write_text(os.path.join(folder, "results.jsonl"), rows)
    if any(r["differences"] for r in results):
        draw(cfg, arms, results, os.path.join(folder, "sweep.png"))
    if cfg.against and any(r["scores"] for r in results):
        draw_against(cfg, results, os.path.join(folder, "against.png"))
    say(f"\n{text}in {folder}: table.md, results.jsonl, sweep.png" + ", against.png" * bool(cfg.against))
    if failed := "".join(f"\n  {r.name}: {r.error}" for r in runs if r.error):
        raise UserError(f"these runs failed; the same command tries them again{failed}")
    done = [r.row for r in runs]
    row = ledger_row("sweep", cfg, Dist(0, 1, torch.device("cpu")), result={"arms": results}, dtype=cfg.dtype,
                     counts={"arms": len(arms), "runs": len(runs)}, seconds=sum(r["seconds"] for r in done),
                     run_id=digest([cfg.metric, *(r["run_id"] for r in done)]))
    row["hardware"] = done[0]["hardware"]
    append_to_ledger(cfg.out_dir, row)
    return row


def chosen_config(argv: list[str] | None = None) -> type:
    """For the script named by the flag, or by a line of the first config file, or train."""
    argv = sys.argv[1:] if argv is None else argv
    flags = [a.partition("=")[2] for a in argv if a.startswith("--script=")]
    files = [a for a in argv if a.endswith(".py") and not a.startswith("-") and os.path.isfile(a)]
    for path in files[:1]:
        with open(path, encoding="utf-8", errors="replace") as f:
            flags += re.findall(r"""^script *= *["'](\w+)["']""", f.read(), re.M)
    return sweep_config((flags or ["train"])[0])


if __name__ == "__main__":
    launch(main, chosen_config)
