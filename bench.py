"""Speed and memory of training and generation here: against the machine's limits, nanoGPT and transformers.

    python bench.py                                            # tokens/s, share of the limit, peak memory
    python bench.py --shapes=exp3,exp6 --json=bench.json       # some shapes; results for programs too
    python bench.py --peer=../nanoGPT --shapes=exp3,d256,exp6  # against a checkout of nanoGPT
    python bench.py --peer=../nanoGPT --peer=transformers --shapes=generate
    python bench.py --shapes=tiny --rounds=2                   # a smoke test

Shapes
    exp1 .. exp7  the ladder's models (config/expN.py, flash on), 8 x 512 tokens a step, 4 x 512 from exp6 on
    d256          d_model 256, 8 layers, 8 heads, 16 x 256 tokens, vocabulary 8,192
    local         window 256 at T = 8,192, the same at T = 512, and global attention at T = 8,192; d_model
                  256, 4 layers, 8 heads, RoPE, vocabulary 8,192; 8,192 tokens a step each
    muon          config/tinier.py, 16 x 512 tokens a step, by Muon and by AdamW alone
    generate      one sequence of 512 new tokens, exp6's model, weights in --dtype for everyone
    int8          the same in INT8 and in fp32; both with the decoding step compiled by --compile
    startup       from `python train.py config/demo.py` to the end of its first step, not compiled
    overhead      share of exp3's step that is not forward, backward, clipping or optimiser
    tiny          a model of nothing, to see that all this works

Method: what is compared takes turns. Each arm is a process of its own, which warms up and then waits; in
every round each runs alone for some steps, and the order reverses from round to round, so that drift hits
all alike. Ratios are taken within a round and printed as min-median-max over the rounds. Peak memory is the
whole process's (on CUDA, what torch allocated). Ours is timed through train.take_step, the function that
trains. Tokens are random. FLOPs are those of model.flops_per_token, set against the fastest large matrix
product measured in the same precision.
"""
import importlib.util
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import train
from common import data, distributed
from common.config import Config, UserError, load, run
from common.runlog import git_commit, say
from common.tokenizer import rank_bpe
from model import LM, ModelConfig, to_int8
from train import TrainConfig

# ------------------------------------------------------------------------------------------------------------
# Config

HERE = os.path.dirname(os.path.abspath(__file__))
SPAWN = multiprocessing.get_context("spawn")  # a forked process would start with this one's peak memory
SHAPES = (*(f"exp{n}" for n in range(1, 8)), "d256", "local", "muon", "generate", "int8", "startup",
          "overhead", "tiny")


@dataclass
class BenchConfig(Config):
    # what
    shapes: str = ""  # separated by commas; "" = exp1,exp3,exp6,d256,generate,startup,overhead
    peer: tuple[str, ...] = ()  # a nanoGPT checkout's folder, or transformers; may be repeated
    json: str = ""  # also write the results to this file; - = print them in place of the table
    # how
    rounds: int = 5  # alternations of the arms
    steps: int = 0  # training steps of an arm in a round; 0 = about a second of them
    dropout: float = 0.0  # everyone's
    # machine (ours; peers run in fp32 as shipped, and at their best)
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps; everyone's
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of products; generate: of everyone's weights
    compile: Literal["auto", "true", "false"] = "auto"  # as in train.py

    def problems(self) -> list[str]:
        out = [f"no shape '{name}'; there are {', '.join(SHAPES)}"
               for name in self.shapes.split(",") if self.shapes and name not in SHAPES]
        out += [f"{key} must be at least {least}, got {getattr(self, key)}"
                for key, least in (("rounds", 1), ("steps", 0)) if getattr(self, key) < least]
        return out + ([] if 0 <= self.dropout < 1 else [f"dropout must be in [0, 1), got {self.dropout}"])

    def derive(self) -> None:
        self.shapes = self.shapes or "exp1,exp3,exp6,d256,generate,startup,overhead"


class Shape(NamedTuple):
    batch: int  # sequences per step
    model: dict  # options of ModelConfig


def shape_of(name: str) -> Shape:
    if name in ("tiny", "d256", "local"):
        batch, length, d_model, n_layers, n_heads, vocab_size = {
            "tiny": (2, 32, 32, 2, 2, 512), "d256": (16, 256, 256, 8, 8, 8192),
            "local": (1, 8192, 256, 4, 8, 8192)}[name]
        return Shape(batch, {"max_seq_len": length, "d_model": d_model, "n_layers": n_layers,
                             "n_heads": n_heads, "vocab_size": vocab_size,
                             "pos": "rope" if name == "local" else "learned"})
    rungs = {"generate": "exp6", "int8": "exp6", "overhead": "exp3", "startup": "demo", "muon": "tinier"}
    ours = load(TrainConfig, [os.path.join(HERE, "config", f"{rungs.get(name, name)}.py")])
    model = {f.name: getattr(ours, f.name) for f in fields(ModelConfig)}
    return Shape({"generate": 1, "int8": 1, "exp6": 4, "exp7": 4, "muon": 16}.get(name, 8),
                 model | {"flash": True, "vocab_size": ours.vocab_size or 8192})


def write_data(folder: str, vocab_size: int) -> str:
    """A data folder as prepare_data.py would leave it, of random tokens. The tokenizer has all bytes and then
    pairs of bytes, so that starting up loads one of the usual kind and size."""
    os.makedirs(folder, exist_ok=True)
    tok = rank_bpe("bench", [bytes([b]) for b in range(256)]
                   + [bytes(divmod(i, 256)) for i in range(vocab_size - 257)])
    tok.save(folder)
    rng, splits = np.random.default_rng(1), {}
    for split, n in (("train", 2**20), ("val", 2**14)):
        rng.integers(vocab_size, size=n, dtype=np.uint16).tofile(os.path.join(folder, f"{split}.bin"))
        splits[split] = {"tokens": n, "bytes": n, "words": n, "sha256": "random"}
    with open(os.path.join(folder, "meta.json"), "w") as f:
        json.dump({"dtype": "uint16", "splits": splits, "tokenizer": {
            "name": tok.name, "fingerprint": tok.fingerprint, "vocab_size": tok.vocab_size}}, f)
    return folder


# ------------------------------------------------------------------------------------------------------------
# What an arm runs, in a process of its own


class Runner(NamedTuple):
    measure: Callable[[], float]  # one round, in `unit`
    unit: str = "tok/s"
    note: str = ""  # how it came to run
    dtype: str = ""  # whose matrix product rate is the limit
    flops: float = 0.0  # per token


def timed(work: Callable, times: int, device) -> float:
    """Seconds that so many calls take, with what they started on an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def warm_up(step: Callable, device, steps: int) -> int:
    """Runs at least three steps, until one is not much slower than the fastest so far; returns how many make
    a round."""
    times = []
    while len(times) < 3 or times[-1] > 1.2 * min(times) and len(times) < 8:
        times.append(timed(step, 1, device))
    return steps or max(1, round(1 / min(times)))


def training(step: Callable, shape: Shape, cfg: BenchConfig, device) -> Callable[[], float]:
    steps = warm_up(step, device, cfg.steps)
    tokens = steps * shape.batch * shape.model["max_seq_len"]
    return lambda: tokens / timed(step, steps, device)


def load_ours(cfg: BenchConfig, shape: Shape, folder: str, optimizer: str = "adamw"):
    options = shape.model | {"dropout": cfg.dropout, "batch_size": shape.batch, "data": folder,
                             "micro_batch_size": shape.batch, "device": cfg.device, "dtype": cfg.dtype,
                             "compile": cfg.compile, "optimizer": optimizer}
    job = train.load_job(TrainConfig(**options, epochs=0, max_steps=10**6), distributed.setup(cfg.device))
    return job, train.wrap(job)


def describe(job) -> str:
    dynamo = sys.modules.get("torch._dynamo.utils")  # however the compiling is done, it counts its graphs
    return job.dtype + (", compiled" if dynamo and dynamo.counters["stats"]["unique_graphs"] else "")


def train_ours(cfg: BenchConfig, shape: Shape, folder: str, optimizer: str = "adamw") -> Runner:
    job, net = load_ours(cfg, shape, folder, optimizer)
    measure = training(lambda: train.take_step(job, net), shape, cfg, job.dist.device)
    return Runner(measure, note=describe(job), dtype=job.dtype, flops=job.flops_per_token)


def overhead(cfg: BenchConfig, shape: Shape, folder: str) -> Runner:
    """The step as it is, with a clock around each of its four pieces; what no clock saw is overhead. On an
    accelerator each piece is waited for, so what would have run meanwhile counts as well."""
    job, net = load_ours(cfg, shape, folder)
    device, seen = job.dist.device, [0.0]

    def clocked(piece):
        def call(*args, **kwargs):
            result = []
            seen[0] += timed(lambda: result.append(piece(*args, **kwargs)), 1, device)
            return result[0]
        return call

    net = clocked(net)
    torch.Tensor.backward = clocked(torch.Tensor.backward)
    torch.nn.utils.clip_grad_norm_ = clocked(torch.nn.utils.clip_grad_norm_)
    job.optimizer.step = clocked(job.optimizer.step)
    steps = warm_up(lambda: train.take_step(job, net), device, cfg.steps)

    def measure() -> float:
        seen[0] = 0.0
        whole = timed(lambda: train.take_step(job, net), steps, device)
        return 100 * (1 - seen[0] / whole)

    return Runner(measure, unit="% of a step", note=describe(job))


def start_up(cfg: BenchConfig, shape: Shape, folder: str) -> Runner:
    def measure() -> float:
        with tempfile.TemporaryDirectory() as out:
            row, began = os.path.join(out, "demo", "metrics.jsonl"), time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, os.path.join(HERE, "train.py"), os.path.join(HERE, "config", "demo.py"),
                 f"--data={folder}", f"--out_dir={out}", "--compile=false", "--log_interval=1",
                 f"--device={cfg.device}", f"--dtype={cfg.dtype}"], stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True)
            try:
                while not os.path.exists(row) or not os.path.getsize(row):  # written when the step is done
                    if process.poll() is not None:
                        raise RuntimeError(f"train.py ended before its first step:\n{process.stderr.read()}")
                    time.sleep(0.002)
                return time.perf_counter() - began
            finally:
                process.kill()
                process.communicate()

    measure()  # files in the system's cache, Python's compiled ones written
    return Runner(measure, unit="s")


# ------------------------------------------------------------------------------------------------------------
# Peers: their own model and step


def load_peer(peer: str, shape: Shape, dropout: float):
    """(model, its loss as a function of net and batch) of this shape, with learned positions: nanoGPT's GPT
    from its checkout, or transformers' GPT2LMHeadModel."""
    m = shape.model
    sizes = {"vocab_size": m["vocab_size"], "n_embd": m["d_model"], "n_layer": m["n_layers"],
             "n_head": m["n_heads"]}
    if peer == "transformers":
        import transformers
        transformers.logging.set_verbosity_error()
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            **sizes, n_positions=m["max_seq_len"], resid_pdrop=dropout, embd_pdrop=dropout,
            attn_pdrop=dropout, bos_token_id=None, eos_token_id=None))
        return model, lambda net, x, y: net(input_ids=x, labels=x, use_cache=False).loss  # it shifts labels
    spec = importlib.util.spec_from_file_location("peer_model", os.path.join(peer, "model.py"))
    module = sys.modules["peer_model"] = importlib.util.module_from_spec(spec)  # ours is called model
    spec.loader.exec_module(module)
    model = module.GPT(module.GPTConfig(**sizes, block_size=m["max_seq_len"], dropout=dropout, bias=True))
    return model, lambda net, x, y: net(x, y)[1]


def train_peer(cfg: BenchConfig, shape: Shape, folder: str, peer: str, dtype: str, compile: bool) -> Runner:
    """nanoGPT's step: a batch from a freshly opened memory map, fetched while a GPU runs the forward pass;
    its own choice of AdamW; gradients clipped at 1. transformers takes the same step with fused AdamW, the
    default of its Trainer."""
    device, length = distributed.pick_device(cfg.device), shape.model["max_seq_len"]
    model, loss_of = load_peer(peer, shape, cfg.dropout)
    model.to(device).train()
    if peer == "transformers":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    else:
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device.type)
    net = torch.compile(model) if compile else model
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")

    def next_batch():
        tokens = np.memmap(os.path.join(folder, "train.bin"), dtype=np.uint16, mode="r")
        starts = torch.randint(len(tokens) - length, (shape.batch,)).tolist()
        rows = torch.from_numpy(np.stack([tokens[i:i + length + 1] for i in starts]).astype(np.int64))
        return [part.contiguous() for part in data.to_device(rows, device)]  # (B, T) each

    batch = next_batch()

    def step():
        nonlocal batch
        with distributed.autocast(dtype, device):
            loss = loss_of(net, *batch)
        batch = next_batch()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return Runner(training(step, shape, cfg, device), dtype=dtype)


def generate(cfg: BenchConfig, shape: Shape, folder: str, peer: str = "", compile: bool = False,
             dtype: str = "") -> Runner:
    """As many tokens after a prompt of one as there are positions. Ours and transformers' are greedy and have
    a cache; nanoGPT's has none and always samples. `dtype`, which may be int8, is in place of cfg's."""
    device = distributed.pick_device(cfg.device) if peer else distributed.setup(cfg.device).device
    length = shape.model["max_seq_len"]
    name = dtype or distributed.choose_dtype(cfg.dtype, device)[0]
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}
    model = load_peer(peer, shape, 0.0)[0] if peer else LM(ModelConfig(**shape.model))
    model.to(device, kinds[name]).eval()
    if name == "int8":
        to_int8(model)
    prompt = torch.ones(1, 1, dtype=torch.long, device=device)  # (1, 1)
    options = {} if peer else {"temperature": 0, "compile": compile}
    if peer == "transformers":
        options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}

    def tokens(n):
        return list(model.generate(prompt, max_new_tokens=n, **options))

    tokens(length if compile else 8)  # to warm up; a compiled step belongs to one size of the cache
    note = name + ", compiled" * compile
    return Runner(lambda: length / timed(lambda: tokens(length), 1, device), note=note)


# ------------------------------------------------------------------------------------------------------------
# Arms: who runs, and the race


class Arm(NamedTuple):
    label: str
    make: Callable[..., Runner]
    shape: Shape
    options: dict = {}


@dataclass
class Row:
    """One line of the table. What was not measured stays None."""
    shape: str
    arm: str
    unit: str = ""
    dtype: str = ""
    flops_per_token: float = 0.0  # 0 = not counted
    values: list[float] = field(default_factory=list)  # one per round, in `unit`
    peak_gb: float | None = None
    of_limit: float | None = None  # share of the matrix product rate in this dtype
    speed_ratio: tuple[float, ...] | None = None  # tokens/s of the shape's first arm over this one's
    memory_ratio: float | None = None  # peak memory of the shape's first arm over this one's
    error: str = ""


def arms_of(name: str, cfg: BenchConfig, machine: dict) -> list[Arm]:
    """Who takes turns on a shape; the first is the one whose ratios are printed."""
    shape = shape_of(name)
    if name in ("startup", "overhead"):
        return [Arm("nanoMem", start_up if name == "startup" else overhead, shape)]
    if name == "local":
        local = shape.model | {"window": 256}
        return [Arm("window 256, T 8192", train_ours, shape._replace(model=local)),
                Arm("window 256, T 512", train_ours, Shape(16, local | {"max_seq_len": 512})),
                Arm("global, T 8192", train_ours, shape)]
    if name == "muon":
        return [Arm(by, train_ours, shape, {"optimizer": by}) for by in ("muon", "adamw")]
    if name == "int8":
        return [Arm("nanoMem", generate, shape, {"dtype": dtype, "compile": cfg.compile == "true"})
                for dtype in ("int8", "fp32")]
    if name == "generate":
        arms = [Arm("nanoMem", generate, shape, {"compile": yes}) for yes in (True, False)
                if not yes or cfg.compile != "false"]
    else:
        arms = [Arm("nanoMem", train_ours, shape)]
    for peer in cfg.peer:
        title = os.path.basename(os.path.abspath(peer))
        if name == "generate":
            arms.append(Arm(title, generate, shape, {"peer": peer}))
            continue
        best = {"peer": peer, "dtype": machine["dtype"], "compile": True}
        if machine["device"] != "cuda" or peer == "transformers":  # on CUDA nanoGPT is shipped as its best
            arms.append(Arm(f"{title} as shipped: fp32", train_peer, shape,
                            {"peer": peer, "dtype": "fp32", "compile": False}))
        arms.append(Arm(f"{title} compiled: {machine['dtype']}", train_peer, shape, best))
    return arms


def child(pipe, cfg: BenchConfig, arm: Arm, folder: str) -> None:
    """An arm's process: at the first message make its Runner and say what it is, at each further one run a
    round. It ends with the pipe, so when the parent does, however that ends. Errors are sent as text."""
    sys.stdout = open(os.devnull, "w")  # the table is the parent's
    try:
        pipe.recv()
        runner = arm.make(cfg, arm.shape, folder, **arm.options)
        pipe.send(runner._replace(measure=None))
        while True:
            pipe.recv()
            pipe.send((runner.measure(), distributed.peak_memory(distributed.pick_device(cfg.device))))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception:
        pipe.send(traceback.format_exc())


def race(name: str, arms: list[Arm], cfg: BenchConfig, folder: str, bar: tqdm) -> list[Row]:
    rows, pipes, processes = [Row(name, arm.label) for arm in arms], [], []
    for arm in arms:  # all import torch at once; nothing is timed yet
        pipe, theirs = SPAWN.Pipe()
        pipes.append(pipe)
        processes.append(SPAWN.Process(target=child, args=(theirs, cfg, arm, folder), daemon=True))
        processes[-1].start()
        theirs.close()  # else its death would not end the pipe

    def ask(row: Row, pipe):
        bar.set_description_str(f"{name}, {row.arm}")
        bar.update()
        if row.error:
            return None
        try:
            pipe.send(None)
            answer = pipe.recv()
        except (EOFError, OSError):
            answer = "its process died; out of memory?"
        if isinstance(answer, str):
            print(f"{name}, {row.arm} failed: {answer}", file=sys.stderr)
            row.error = answer.strip().splitlines()[-1]
            return None
        return answer

    for row, pipe in zip(rows, pipes, strict=True):
        if made := ask(row, pipe):
            row.arm += f": {made.note}" if made.note else ""
            row.unit, row.dtype, row.flops_per_token = made.unit, made.dtype, made.flops
    for i in range(cfg.rounds):
        for row, pipe in list(zip(rows, pipes, strict=True))[::-1 if i % 2 else 1]:
            if measured := ask(row, pipe):
                row.values.append(measured[0])
                row.peak_gb = measured[1] if row.unit == "tok/s" else None
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.close()
        process.join()  # its memory is the next shape's
    return rows


# ------------------------------------------------------------------------------------------------------------
# Limits and results


def measure_machine(device: str) -> dict:
    """What this is, and the best rates of half a second each: GFLOP/s of a large square matrix product, GB/s
    of a copy (each byte counted once)."""
    device = distributed.setup(device).device
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    n, limits = 2048 if device.type == "cpu" else 8192, {}

    def best(work) -> float:
        timed(work, 2, device)
        times, end = [], time.perf_counter() + 0.5
        while not times or time.perf_counter() < end:
            times.append(timed(work, 1, device))
        return min(times)

    for name in ("fp32", "bf16") + ("fp16",) * (device.type == "cuda"):
        a = torch.randn(n, n, device=device).to(dtypes[name])
        limits[name] = 2 * n**3 / best(lambda a=a: a @ a) / 1e9
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    limits["copy"] = 4 * source.numel() / best(lambda: target.copy_(source)) / 1e9
    return {"device": device.type, "name": distributed.device_name(device), "limits": limits,
            "dtype": distributed.choose_dtype("auto", device)[0], "torch": torch.__version__,
            "python": sys.version.split()[0], "git": git_commit()}


def compare(rows: list[Row], limits: dict) -> None:
    """Fill in what follows from the measured values."""
    first = rows[0]
    for row in rows:
        if row.unit != "tok/s" or row.error:
            continue
        row.flops_per_token = row.flops_per_token or first.flops_per_token  # a peer's model has the same size
        if row.flops_per_token and row.dtype in limits:
            flops = row.flops_per_token * statistics.median(row.values)
            row.of_limit = flops / (limits[row.dtype] * 1e9)
        if row is not first and not first.error:
            ratios = [a / b for a, b in zip(first.values, row.values, strict=True)]
            row.speed_ratio = min(ratios), statistics.median(ratios), max(ratios)
            row.memory_ratio = first.peak_gb / row.peak_gb


HEAD = ("shape", "", "median", "of limit", "peak", "first / this: speed", "memory")


def cells(row: Row) -> tuple[str, ...]:
    median = statistics.median(row.values) if row.values else math.nan
    value = f"{median:,.0f} tok/s" if row.unit == "tok/s" else f"{median:.2f} {row.unit}"
    return (row.shape, row.arm, "failed" if row.error else value,
            f"{row.of_limit:.1%}" if row.of_limit else "n/a",
            f"{row.peak_gb:.2f} GB" if row.peak_gb else "n/a",
            "{:.2f}-{:.2f}-{:.2f}x".format(*row.speed_ratio) if row.speed_ratio else "",
            f"{row.memory_ratio:.2f}x" if row.memory_ratio else "")


def aligned(row: tuple[str, ...]) -> str:
    return "{:<8}  {:<31} {:>16} {:>9} {:>9} {:>20} {:>7}".format(*row).rstrip()


def check_peers(cfg: BenchConfig) -> None:
    for peer in cfg.peer:
        if peer == "transformers" and not importlib.util.find_spec(peer):
            raise UserError("--peer=transformers: the package 'transformers' is not installed\n"
                            "install it with:  pip install transformers")
        if peer != "transformers" and not os.path.isfile(os.path.join(peer, "model.py")):
            raise UserError(f"--peer={peer}: expected transformers, or a folder with nanoGPT's model.py\n"
                            "get it with:  git clone https://github.com/karpathy/nanoGPT")


def main(cfg: BenchConfig) -> dict:
    """Print the table; returns what --json writes: config, machine, rows."""
    check_peers(cfg)
    talk = (lambda text: None) if cfg.json == "-" else say
    with SPAWN.Pool(1) as pool:
        machine = pool.apply(measure_machine, [cfg.device])
    rates = ", ".join(f"{k} {v:,.0f} GFLOP/s" for k, v in machine["limits"].items() if k != "copy")
    talk(f"{machine['name']}, torch {machine['torch']}; matrix products {rates}; "
         f"copy {machine['limits']['copy']:.1f} GB/s\n{aligned(HEAD)}")
    races = {name: arms_of(name, cfg, machine) for name in cfg.shapes.split(",")}
    turns, rows = (cfg.rounds + 1) * sum(len(arms) for arms in races.values()), []
    bar = tqdm(total=turns, unit="turn", leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())
    with tempfile.TemporaryDirectory() as root, bar:
        for name, arms in races.items():
            vocab_size = arms[0].shape.model["vocab_size"]
            folder = write_data(os.path.join(root, str(vocab_size)), vocab_size)
            found = race(name, arms, cfg, folder, bar)
            compare(found, machine["limits"])
            talk("\n".join(aligned(cells(row)) for row in found))
            rows += found
    document = {"config": asdict(cfg), "machine": machine, "rows": [asdict(row) for row in rows]}
    if cfg.json == "-":
        print(json.dumps(document, indent=1))
    elif cfg.json:
        with open(cfg.json, "w") as f:
            json.dump(document, f, indent=1)
    return document


if __name__ == "__main__":
    run(main, BenchConfig)
