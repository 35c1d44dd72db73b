"""In-context recall against state size: what a state of fixed size can hold, and what it cannot.

    python recall_probe.py                                  # every mixer at every size, three seeds
    python recall_probe.py --dry_run                        # the arms, their state sizes, what is left to run
    python recall_probe.py --mixers=attention,lstm --sizes=32 --pairs=1,2 --steps=500 --name=recall_small
    python recall_probe.py --sizes=16,32,64,128             # later: only the new size runs
    python recall_probe.py --seq_len=64 --pairs=2,4,8,16 --vocab_size=64 --steps=10000 --name=recall_64

Multi-query associative recall (Zoology, 2312.04927). A sequence is N pairs of a key and a value, then N
queries, each repeating one of the keys; at a query the model must predict the value that followed that key.
Each sequence draws its own pairs, so nothing can be memorised: answers are in the decoding state or lost.

    k7 v3 k2 v9 k5 v1  .  k5  .  .  k7 k2  .  .      . is filler; only queries have labels:
                          v1        v3 v9

Attention keeps every token: its state grows with the text. An LSTM or a context vector has the same few
numbers after any text, and the pairs must fit into those. One model per arm (mixer, size) and seed is trained
on all N together, then tested on each N with sequences used for nothing else. Learning rates are tried on the
first seed and chosen by validation accuracy; the other seeds use the chosen one.

How to read recall.png: two levels need no memory of pairs. 1 / values is blind guessing; 1 / N is a model
that knows which values it saw, but not which key each belongs to. Attention should reach 99 % everywhere: if
it does not, the set-up is wrong (steps, learning rates), and the other results mean nothing. The others learn
far more slowly: they stay at 1 / N for a while, then leave it. A low figure only says what was not learned in
this number of steps; that it cannot be held follows only if more --steps change nothing. The default task is
small for that reason: all of it runs in half an hour on two CPU cores.

out/NAME/ gets results.jsonl (one line per finished model), table.md and recall.png. The same command resumes
after Ctrl-C, and reuses existing results when mixers, sizes, seeds or learning rates are added.
"""
import itertools
import math
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from common import fit
from common.config import ConfigError, UserError, launch
from common.console import resume_command, say
from common.distributed import Dist, choose_dtype, keep_freed_memory, setup
from common.files import append_row, read_rows, write_text
from common.run import Run, RunConfig, digest, git_commit
from common.step import NotFinite, backward, choose_compile, update, wrap
from common.stop import StopRequest
from common.tables import grid, new_figure, save_figure
from model import LM, ModelConfig

import numpy as np
import torch
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# Config

MIXERS = {  # flags of model.py
    "attention": {"mixer": "attention", "n_heads": 1, "pos": "rope"},
    "window": {"mixer": "attention", "n_heads": 1, "pos": "rope"},  # and --window
    "lstm": {"mixer": "lstm", "pos": "none"},
    "scan": {"mixer": "context", "context_update": "scan", "pos": "none"},
    "gated": {"mixer": "context", "context_update": "gated", "pos": "none", "activation": "relu"}}
TRAIN, VALIDATION, TEST = range(3)  # independent streams of sequences


@dataclass
class RecallConfig(RunConfig):
    MAY_CHANGE = {"mixers", "sizes", "seeds", "lrs", "seed"}
    # arms
    mixers: tuple[Literal[tuple(MIXERS)], ...] = tuple(MIXERS)  # attention, window, lstm, scan, gated
    sizes: tuple[int, ...] = (16, 32, 64)  # d_model; for scan and gated the context vector's size too
    seeds: int = 3  # models per arm: seed, seed + 1, ...
    lrs: tuple[float, ...] = (3e-3, 1e-2)  # peaks, tried on the first seed until one reaches stop_at
    seed: int = 1  # of weights and sequences
    # task
    pairs: tuple[int, ...] = (1, 2, 4, 8)  # values of N; a batch has equally many sequences of each
    seq_len: int = 32  # tokens T: 2 N of pairs, the rest queries and filler
    vocab_size: int = 32  # ids: 0 is filler, then keys, and values from vocab_size // 2 on
    gap_power: float = 0.01  # a query comes x places after the pairs with weight x ** (gap_power - 1)
    # model
    n_layers: int = 2  # blocks; for gated, ReLU layers
    window: int = 8  # tokens that each layer of the arm `window` sees
    short_conv: int = 3  # tokens of the causal convolution before each mixer (gated has none); 0 = none
    # training
    steps: int = 3000  # at most; warm-up for a tenth of them, then cosine to 0
    batch_size: int = 64  # sequences per step
    eval_interval: int = 100  # steps between validations
    stop_at: float = 0.995  # training stops at this validation accuracy for every N
    eval_sequences: int = 256  # validation sequences of each N; the test has four times as many
    # run and machine: defaults that differ from train.py's
    name: str = "recall"  # the folder in out_dir
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # at these sizes 16 bits are no faster on a CPU

    def problems(self) -> list[str]:
        out = super().problems() + self.at_least(1, "seeds", "steps", "batch_size", "eval_interval",
                                                 "eval_sequences", "window", "seq_len", "n_layers")
        out += [f"{key} needs at least one number, all positive; got {getattr(self, key)}"
                for key in ("sizes", "lrs", "pairs") if min(getattr(self, key), default=0) <= 0]
        out += [] if self.mixers else ["mixers needs at least one mixer"]
        most, half = max(self.pairs, default=0), self.vocab_size // 2
        if most > half - 1:
            out.append(f"pairs={most} needs {most} keys, but vocab_size={self.vocab_size} has {half - 1}; "
                       f"use --vocab_size={2 * most + 2}")
        if 3 * most > self.seq_len:
            out.append(f"pairs={most} takes 2 * {most} tokens and {most} queries, but seq_len="
                       f"{self.seq_len}; use --seq_len={3 * most}")
        if self.pairs and self.batch_size % len(self.pairs):
            out.append(f"batch_size={self.batch_size} is not a multiple of {len(self.pairs)}, the number of "
                       "values in pairs")
        for mixer, size in itertools.product(self.mixers, self.sizes) if not out else ():
            try:
                model_config(self, mixer, size)
            except ConfigError as e:
                out += [f"{mixer} of size {size}: {p}" for p in e.problems]
        return out


def model_config(cfg: RecallConfig, mixer: str, size: int) -> ModelConfig:
    """All mixers have the same kind of blocks around them, except gated, which has none."""
    flags = MIXERS[mixer] | ({"window": cfg.window} if mixer == "window" else {})
    return ModelConfig(**flags, vocab_size=cfg.vocab_size, max_seq_len=cfg.seq_len, d_model=size,
                       n_layers=cfg.n_layers, d_ff=2 * size, tie_embeddings=False,
                       short_conv=0 if mixer == "gated" else cfg.short_conv)


# ------------------------------------------------------------------------------------------------------------
# Task


class Sequences(NamedTuple):
    tokens: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T): the value to predict at a query, -1 elsewhere
    distances: torch.Tensor  # (B, T): tokens from the key in its pair to the query, 0 elsewhere


def sequences(cfg: RecallConfig, n_pairs: int, count: int, rng: np.random.Generator) -> Sequences:
    """`count` sequences of `n_pairs` pairs. Within a sequence all keys differ and all values differ, so a
    guess among the values seen is right once in n_pairs."""
    half, N = cfg.vocab_size // 2, n_pairs

    def draw(ids: int):  # N different ones of 0 .. ids - 1
        return rng.random((count, ids)).argsort(axis=1)[:, :N]  # (B, N)

    keys, values, asked = 1 + draw(half - 1), half + draw(cfg.vocab_size - half), draw(N)
    # weighted draws without replacement: the first N arrivals of a race in which place x arrives at the rate
    # x ** (gap_power - 1); the i-th place to arrive asks for pair asked[i]
    rates = np.arange(1, cfg.seq_len - 2 * N + 1) ** (cfg.gap_power - 1)
    places = 2 * N + (rng.exponential(size=(count, len(rates))) / rates).argsort(axis=1)[:, :N]  # (B, N)

    tokens = np.zeros((count, cfg.seq_len), dtype=np.int64)
    targets, distances = np.full_like(tokens, -1), np.zeros_like(tokens)
    tokens[:, 0:2 * N:2], tokens[:, 1:2 * N:2] = keys, values
    rows = np.arange(count)[:, None]
    tokens[rows, places], targets[rows, places] = keys[rows, asked], values[rows, asked]
    distances[rows, places] = places - 2 * asked
    return Sequences(*map(torch.from_numpy, (tokens, targets, distances)))


def training_batch(cfg: RecallConfig, seed: int, step: int) -> Sequences:
    """A pure function of (seed, step), the same for every mixer, size and learning rate."""
    rng = np.random.default_rng((seed, TRAIN, step))
    parts = [sequences(cfg, N, cfg.batch_size // len(cfg.pairs), rng) for N in cfg.pairs]
    return Sequences(*map(torch.cat, zip(*parts, strict=True)))


# ------------------------------------------------------------------------------------------------------------
# Training and testing


@torch.no_grad()
def test(cfg: RecallConfig, model: LM, seed: int, stream: int) -> dict[str, dict]:
    """For each N (as text, as in JSON) the accuracy over its queries, and `by_distance`, whose i-th entry is
    (right, asked) at distances 2^i .. 2^(i+1) - 1."""
    model.eval()
    results, n_buckets, device = {}, cfg.seq_len.bit_length(), model.embed.weight.device
    for N in cfg.pairs:
        rng = np.random.default_rng((seed, stream, N))
        right, bucket = [], []
        for _ in range(4 if stream == TEST else 1):
            tokens, targets, distances = (x.to(device) for x in sequences(cfg, N, cfg.eval_sequences, rng))
            asked = targets >= 0  # (B, T)
            logits = model.head(model.hidden(tokens)[asked])  # (n, V), at the n queries only
            right.append(logits.argmax(dim=-1) == targets[asked])  # (n,)
            bucket.append(distances[asked].log2().long())  # (n,)
        right, bucket = torch.cat(right).cpu(), torch.cat(bucket).cpu()
        counts = [torch.bincount(b, minlength=n_buckets).tolist() for b in (bucket[right], bucket)]
        results[str(N)] = {"accuracy": right.float().mean().item(),
                           "by_distance": [list(pair) for pair in zip(*counts, strict=True)]}
    model.train()
    return results


def train(cfg: RecallConfig, mixer: str, size: int, lr: float, seed: int, dist: Dist, stop: StopRequest):
    """Train and test one model. Returns its line of results.jsonl, or None if asked to stop."""
    began, dtype = time.perf_counter(), choose_dtype(cfg.dtype, dist.device)[0]
    torch.manual_seed(seed)
    model = LM(model_config(cfg, mixer, size)).to(dist.device)
    net = wrap(model, choose_compile(cfg.compile, cfg.steps * cfg.batch_size * cfg.seq_len
                                     * model.flops_per_token(cfg.seq_len), dist.device)[0], dist)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0,  # no data twice
                                  fused=dist.device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dtype == "fp16")
    warmup, curve = max(1, cfg.steps // 10), []
    bar = tqdm(range(cfg.steps), f"{mixer} {size} lr {lr:g} seed {seed}", leave=False, unit="step",
               dynamic_ncols=True, disable=not sys.stderr.isatty())
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, (1 + math.cos(math.pi * step / cfg.steps)) / 2)
        tokens, targets, _ = (x.to(dist.device) for x in training_batch(cfg, seed, step))  # (B, T) each
        loss = backward(net, [(tokens, targets)], dist, dtype, scaler)
        try:
            update(model, optimizer, scaler, 1.0, loss)
        except NotFinite as e:
            raise UserError(f"{mixer} of size {size}, lr {lr:g}, step {step + 1}: {e}; remove this rate from "
                            "--lrs (finished models are kept)") from None
        if stop.requested:
            return None
        if (step + 1) % cfg.eval_interval == 0 or step + 1 == cfg.steps:
            found = [r["accuracy"] for r in test(cfg, model, seed, VALIDATION).values()]
            curve.append([step + 1, loss.item(), *found])
            bar.set_postfix_str("validation " + " ".join(f"{a:.3f}" for a in found))
            if min(found) >= cfg.stop_at:
                break
    bar.close()
    return {"mixer": mixer, "size": size, "lr": lr, "seed": seed,
            "parameters": model.count_parameters()["total"], "state_numbers": state_numbers(cfg, model),
            "steps": step + 1, "validation": statistics.fmean(found), "solved": min(found) >= cfg.stop_at,
            "test": test(cfg, model, seed, TEST), "curve": curve,  # [step, loss, validation by N ...]
            "seconds": time.perf_counter() - began, "commit": git_commit(), "config": asdict(cfg)}


@torch.no_grad()
def state_numbers(cfg: RecallConfig, model: LM) -> int:
    """How many numbers the decoding state holds after one sequence."""
    state, device = model.init_state(), model.embed.weight.device
    model.hidden(torch.zeros(1, cfg.seq_len, dtype=torch.long, device=device), state)
    state.fix(cfg.seq_len, device)  # without spare room

    def count(x) -> int:
        if torch.is_tensor(x):
            return x.numel() if x.is_floating_point() else 0
        return sum(map(count, x if isinstance(x, (list, tuple)) else getattr(x, "__dict__", {}).values()))

    return count(state.layers)


# ------------------------------------------------------------------------------------------------------------
# Report


def table(cfg: RecallConfig, arms: list[list[dict]]) -> str:
    """Accuracy for each N, then by distance for the largest N."""
    def accuracy(rows, N):
        found = [100 * r["test"][str(N)]["accuracy"] for r in rows]
        return f"{statistics.fmean(found):.1f} ({min(found):.1f}-{max(found):.1f})"

    most, values = max(cfg.pairs), cfg.vocab_size - cfg.vocab_size // 2
    lines = [["mixer", "d_model", "parameters", "state", "lr", "steps", *(f"N = {N}" for N in cfg.pairs)]]
    far = [["mixer", "d_model", *(f"{2**i}-{2**(i + 1) - 1}" for i in range(cfg.seq_len.bit_length()))]]
    for rows in arms:
        r = rows[0]
        lines.append([r["mixer"], str(r["size"]), f"{r['parameters']:,}", f"{r['state_numbers']:,}",
                      f"{r['lr']:g}", f"{statistics.fmean(r['steps'] for r in rows):,.0f}",
                      *(accuracy(rows, N) for N in cfg.pairs)])
        counts = np.sum([r["test"][str(most)]["by_distance"] for r in rows], axis=0)  # (buckets, 2)
        shares = (f"{100 * right / asked:.1f}" if asked else "" for right, asked in counts)
        far.append([r["mixer"], str(r["size"]), *shares])
    columns = [column for column in zip(*far, strict=True) if any(column[1:])]
    notes = [
        f"per cent of queries answered correctly in {4 * cfg.eval_sequences:,} test sequences of each N: "
        f"mean (min-max) over {cfg.seeds} seeds",
        f"chance: {100 / values:.1f} guessing among all values; "
        + ", ".join(f"{100 / N:.1f}" for N in cfg.pairs) + " among the N values of the sequence",
        "state: numbers held while decoding one sequence (4 bytes each in fp32), for attention at "
        f"{cfg.seq_len} tokens",
        f"lr: the best of {', '.join(f'{lr:g}' for lr in cfg.lrs)} on seed {cfg.seed}'s validation "
        "sequences, used for all seeds"]
    low = sorted({r["size"] for rows in arms for r in rows if r["mixer"] == "attention"
                  and min(x["accuracy"] for x in r["test"].values()) < 0.9})
    if low:
        notes.append(f"attention is below 90 % (d_model {', '.join(map(str, low))}): the set-up is at fault, "
                     "so this says nothing about other mixers; use more --steps or other --lrs")
    return (f"{grid(lines)}\n\nBy distance from key to query, N = {most}:\n\n"
            f"{grid(list(zip(*columns, strict=True)))}\n\n" + "".join(f"- {note}\n" for note in notes))


def draw(cfg: RecallConfig, arms: list[list[dict]], path: str) -> None:
    """A panel for each N: accuracy against state size, a dot per model and a line through the means."""
    figure = new_figure(2 + 2.6 * len(cfg.pairs), 3.6)
    panels = figure.subplots(1, len(cfg.pairs), sharey=True, squeeze=False)[0]
    values = cfg.vocab_size - cfg.vocab_size // 2
    for axes, N in zip(panels, cfg.pairs, strict=True):
        for i, mixer in enumerate(cfg.mixers):
            points = sorted((rows[0]["state_numbers"], [r["test"][str(N)]["accuracy"] for r in rows])
                            for rows in arms if rows[0]["mixer"] == mixer)
            means = [statistics.fmean(y) for _, y in points]
            axes.plot([x for x, _ in points], means, color=f"C{i}", label=mixer)
            for x, y in points:
                axes.plot([x] * len(y), y, "o", color=f"C{i}", markersize=3, alpha=0.7)
        for level, style in ((1 / N, "--"), (1 / values, ":")):
            axes.axhline(level, color="black", linewidth=0.8, linestyle=style)
        axes.set_xscale("log", base=2)
        axes.set(title=f"{N} pair{'s' * (N > 1)}", xlabel="numbers in the state", ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of queries answered correctly")
    handles = panels[0].get_legend_handles_labels()[0] + list(panels[0].lines[-2:])
    figure.legend(handles, [*cfg.mixers, "1 / pairs", "1 / values"], loc="outside right center")
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------------------------
# Main


def progress(cfg: RecallConfig, mixer: str, size: int, done: dict) -> tuple[list[dict], tuple | None]:
    """Of one arm, the finished models that count, one per seed, and the (lr, seed) to train next, or None.
    `done`: lines of results.jsonl by (mixer, size, lr, seed)."""
    tried, rows = [], []
    for lr in cfg.lrs:
        if (mixer, size, lr, cfg.seed) not in done:
            return [], (lr, cfg.seed)
        tried.append(done[mixer, size, lr, cfg.seed])
        if tried[-1]["solved"]:
            break
    lr = max(tried, key=lambda row: row["validation"])["lr"]
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        if (mixer, size, lr, seed) not in done:
            return rows, (lr, seed)
        rows.append(done[mixer, size, lr, seed])
    return rows, None


def read_results(cfg: RecallConfig, path: str) -> dict[tuple, dict]:
    done = {}
    for row in read_rows(path):
        if differences := cfg.differences(row["config"]):
            raise UserError(f"{path} holds results of another configuration (saved -> now)\n  "
                            + "\n  ".join(differences)
                            + "\nnothing was run; use another --name, or discard them with --overwrite")
        done[row["mixer"], row["size"], row["lr"], row["seed"]] = row
    return done


def main(cfg: RecallConfig) -> dict:
    """Train what is missing and report. Returns the ledger row, whose result has the models of each arm."""
    with setup(cfg.device) as dist:
        if dist.world > 1:
            raise UserError("recall_probe.py trains in one process: start it with python, not with torchrun")
        folder = os.path.join(cfg.out_dir, cfg.name)
        path = os.path.join(folder, "results.jsonl")
        done = {} if cfg.overwrite else read_results(cfg, path)
        arms = list(itertools.product(cfg.mixers, cfg.sizes))
        most = len(cfg.lrs) + cfg.seeds - 1
        say(f"mixers x sizes = {len(cfg.mixers)} x {len(cfg.sizes)} = {len(arms)} arms, each with at most "
            f"{len(cfg.lrs)} learning rates + {cfg.seeds - 1} more seeds = {most} models: at most "
            f"{len(arms) * most} models of at most {cfg.steps:,} steps, {len(done)} finished; in {folder}")
        for mixer, size in arms:
            fit.refuse_hopeless(LM, model_config(cfg, mixer, size), fit.room_for(0, dist),
                                max(cfg.batch_size, 4 * cfg.eval_sequences))
        if cfg.dry_run:
            for mixer, size in arms:
                model, (rows, todo) = LM(model_config(cfg, mixer, size)), progress(cfg, mixer, size, done)
                say(f"{mixer:<10} d_model {size:<5} {model.count_parameters()['total']:>9,} parameters  "
                    f"{state_numbers(cfg, model):>7,} numbers in the state  "
                    + (f"next: lr {todo[0]:g}, seed {todo[1]}" if todo else f"done, {len(rows)} seeds"))
            return {"status": "planned"}
        keep_freed_memory()
        torch.set_num_threads(min(torch.get_num_threads(), 4))  # the models are tiny
        with Run(cfg, dist, "recall_probe") as run, StopRequest() as stop:
            if cfg.overwrite and os.path.exists(path):
                os.remove(path)
            if not run_arms(cfg, arms, done, path, dist, stop):
                say(f"stopped; the model in training is lost. Continue with:  {resume_command()}")
                return {"status": "stopped"}
            return report(cfg, arms, done, run)


def run_arms(cfg: RecallConfig, arms: list, done: dict, path: str, dist: Dist, stop: StopRequest) -> bool:
    """Train what is not in `done`, adding it there and to the file; False if asked to stop."""
    for mixer, size in arms:
        while todo := progress(cfg, mixer, size, done)[1]:
            lr, seed = todo
            row = train(cfg, mixer, size, lr, seed, dist, stop)
            if row is None:
                return False
            append_row(path, row)
            done[mixer, size, lr, seed] = row
            found = "  ".join(f"{r['accuracy']:.3f}" for r in row["test"].values())
            say(f"{mixer:<10} d_model {size:<4} lr {lr:<6g} seed {seed}  {row['steps']:>5,} steps, "
                f"{row['seconds']:5.1f} s   N = {', '.join(row['test'])}: {found}")
    return True


def report(cfg: RecallConfig, arms: list, done: dict, run: Run) -> dict:
    results = [progress(cfg, mixer, size, done)[0] for mixer, size in arms]
    text = table(cfg, results)
    write_text(run.path("table.md"), f"    {resume_command()}\n\n{text}")
    draw(cfg, results, run.path("recall.png"))
    say(f"\n{text}\nin {run.folder}: table.md, recall.png, results.jsonl")
    lines = [[{k: v for k, v in row.items() if k not in ("curve", "config")} for row in rows]
             for rows in results]
    rows = sum(lines, [])
    run.seconds, run.id = sum(row["seconds"] for row in rows), digest(rows)
    return run.finish("finished", dtype=choose_dtype(cfg.dtype, run.dist.device)[0], result={"arms": lines},
                      counts={"models": len(rows), "steps": sum(row["steps"] for row in rows)})


if __name__ == "__main__":
    launch(main, RecallConfig)
