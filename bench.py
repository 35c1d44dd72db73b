"""Speed and memory of training and generation here: against the machine's limits, nanoGPT and transformers.

    python bench.py                                            # tokens/s, share of the limit, peak memory
    python bench.py --shapes=exp3,exp6 --json=bench.json       # some shapes; results for programs too
    python bench.py --peer=../nanoGPT --shapes=exp3,d256,exp6  # against a checkout of nanoGPT
    python bench.py --peer=../nanoGPT --peer=transformers --shapes=generate
    python bench.py --shapes=context32,context512,scan1,scan8  # mixers without attention
    python bench.py --shapes=decoding --plot=decoding.png      # their memory and time per token at length
    python bench.py --shapes=tiny --rounds=2                   # a smoke test

Shapes
    exp1 .. exp7  the ladder's models (config/expN.py, flash on), 8 x 512 tokens a step, 4 x 512 from exp6 on
    d256          d_model 256, 8 layers, 8 heads, 16 x 256 tokens, vocabulary 8,192
    local         window 256 at T = 8,192, the same at T = 512, and global attention at T = 8,192; d_model
                  256, 4 layers, 8 heads, RoPE, vocabulary 8,192; 8,192 tokens a step each
    muon          config/tinier.py, 16 x 512 tokens a step, by Muon and by AdamW alone
    context32     the gated context vector (2.74M, d_model 256, 6 layers of 512, vocabulary 1,000), 32 x 64
                  tokens a step, against the same model with everything inside a loop over positions
    context512    the same at 512 x 64, and torch.nn.LSTM of width 512 (2.35M)
    scan1, scan8  its scan variant at 1 x 1,024 and 8 x 1,024, of about that size; the gated one, both ways
    decoding      bytes of the state, peak memory and ms per token after 1K, 10K and 100K tokens: context,
                  scan, LSTM, attention with a window and without, about 2.7M parameters each, in fp32
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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
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
SHAPES = (*(f"exp{n}" for n in range(1, 8)), "d256", "local", "muon", "context32", "context512", "scan1",
          "scan8", "decoding", "generate", "int8", "startup", "overhead", "tiny")
NEWLLM = {"vocab_size": 1000, "max_seq_len": 64, "d_model": 256, "d_ff": 512, "tie_embeddings": False}
GATED = NEWLLM | {"mixer": "context", "context_dim": 256, "n_layers": 6, "activation": "relu", "pos": "none"}
SCAN = NEWLLM | {"mixer": "context", "context_update": "scan", "n_layers": 4, "d_ff": 568, "pos": "none"}


@dataclass
class BenchConfig(Config):
    # what
    shapes: str = ""  # separated by commas; "" = exp1,exp3,exp6,d256,generate,startup,overhead
    peer: tuple[str, ...] = ()  # a nanoGPT checkout's folder, or transformers; may be repeated
    json: str = ""  # also write the results to this file; - = print them in place of the table
    # how
    rounds: int = 5  # alternations of the arms
    steps: int = 0  # training steps of an arm in a round; 0 = about a second of them
    lengths: tuple[int, ...] = (1_000, 10_000, 100_000)  # decoding: tokens read before the measured ones
    plot: str = ""  # decoding: draw memory and time against length into this file
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
        if min(self.lengths, default=0) < 1:
            out.append(f"lengths must be 1 or more, got {self.lengths}")
        if self.plot and "decoding" not in self.shapes.split(","):
            out.append("plot draws the shape decoding; add --shapes=decoding")
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
    if name in ("context32", "context512", "decoding"):
        return Shape({"context32": 32, "context512": 512}.get(name, 1), GATED)
    if name in ("scan1", "scan8"):
        return Shape(int(name[4:]), SCAN | {"max_seq_len": 1024})
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


class ContextLoop(nn.Module):
    """The gated context vector as its equations read, everything inside a loop over positions."""

    def __init__(self, m: dict):
        super().__init__()
        C, d_ff, K = m["d_model"], m["d_ff"], m["context_dim"]
        self.embed = nn.Embedding(m["vocab_size"], C)
        self.layers = nn.ModuleList(nn.Linear(d_ff if i else C + K, d_ff) for i in range(m["n_layers"]))
        self.forget, self.input, self.update = (nn.Linear(d_ff, K) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(K), nn.Linear(d_ff, m["vocab_size"])

    def forward(self, tokens):
        """(B, T) -> logits (B, T, V)"""
        logits, c = [], self.norm.weight.new_zeros(len(tokens), len(self.norm.weight))  # (B, K)
        for t in range(tokens.size(1)):
            h = torch.cat((self.embed(tokens[:, t]), c), dim=1)  # (B, C + K)
            for layer in self.layers:
                h = F.relu(layer(h))  # (B, F)
            logits.append(self.head(h))  # (B, V)
            c = torch.sigmoid(self.forget(h)) * c + torch.sigmoid(self.input(h)) * self.update(h)  # (B, K)
            c = self.norm(c).clamp(-10, 10)
        return torch.stack(logits, dim=1)  # (B, T, V)


class PlainLSTM(nn.Module):
    """Embedding, torch's LSTM of width d_ff, head."""

    def __init__(self, m: dict):
        super().__init__()
        self.embed = nn.Embedding(m["vocab_size"], m["d_model"])
        self.lstm = nn.LSTM(m["d_model"], m["d_ff"], batch_first=True)
        self.head = nn.Linear(m["d_ff"], m["vocab_size"])

    def forward(self, tokens):
        """(B, T) -> logits (B, T, V)"""
        return self.head(self.lstm(self.embed(tokens))[0])


WRITTEN_OUT = {"loop": ContextLoop, "nn.LSTM": PlainLSTM}  # as a user's own script would have them


def load_peer(peer: str, shape: Shape, dropout: float):
    """(model, its loss as a function of net and batch) of this shape: nanoGPT's GPT from its checkout or
    transformers' GPT2LMHeadModel, with learned positions; or one that is written out above."""
    m = shape.model
    if peer in WRITTEN_OUT:
        return WRITTEN_OUT[peer](m), lambda net, x, y: F.cross_entropy(net(x).flatten(0, 1), y.flatten())
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
    its own choice of AdamW; gradients clipped at 1. The others take the same step with fused AdamW, the
    default of transformers' Trainer."""
    device, length = distributed.pick_device(cfg.device), shape.model["max_seq_len"]
    model, loss_of = load_peer(peer, shape, cfg.dropout)
    model.to(device).train()
    if peer == "transformers" or peer in WRITTEN_OUT:
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

    flops = 0  # that of our model
    if peer in WRITTEN_OUT:
        matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        flops = 6 * (matrices - model.embed.weight.numel())
    return Runner(training(step, shape, cfg, device), dtype=dtype, flops=flops)


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
    if name in ("context32", "context512", "scan1", "scan8"):
        gated = shape._replace(model=GATED | {"max_seq_len": shape.model["max_seq_len"]})
        plain = [("all in the loop", "loop", "fp32")]
        plain += [("nn.LSTM", "nn.LSTM", dtype) for dtype in ("fp32", "bf16")] * (name == "context512")
        arms = [Arm("scan", train_ours, shape)] if name.startswith("scan") else []
        return arms + [Arm("gated", train_ours, gated)] + [
            Arm(f"{label}: {dtype}", train_peer, gated, {"peer": peer, "dtype": dtype, "compile": False})
            for label, peer, dtype in plain]
    if name == "decoding":
        lstm = NEWLLM | {"mixer": "lstm", "context_dim": 224, "n_layers": 3, "pos": "none"}  # 2.77M
        attention = NEWLLM | {"n_layers": 4, "pos": "rope"}  # 2.62M
        return [Arm(label, decode, Shape(1, model), options) for label, model, options in (
            ("context", GATED, {}), ("context, by generate()", GATED, {"generate": True}), ("scan", SCAN, {}),
            ("LSTM", lstm, {}), ("attention, window 256", attention | {"window": 256}, {}),
            ("attention", attention, {}))]
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
# Decoding at length


@dataclass
class Point:
    """One model after `length` tokens, in a process of its own; of a failure there is only `error`."""
    shape: str
    arm: str
    length: int
    parameters: int = 0
    state_bytes: int = 0  # all buffers the decoding state holds, filled or not
    peak_gb: float = 0.0  # of the process
    grown_gb: float = 0.0  # that peak, over what was in memory before the first token
    ms_per_token: float = 0.0  # median
    slope: float | None = None  # of log(state_bytes) against log(length), a fit over the arm's lengths
    error: str = ""


def state_bytes(state) -> int:
    parts = [part for layer in state.layers for value in vars(layer).values()
             for part in (value if isinstance(value, tuple) else (value,)) if torch.is_tensor(part)]
    return sum({part.data_ptr(): part.untyped_storage().nbytes() for part in parts}.values())


def decode(cfg: BenchConfig, arm: Arm, length: int, piece: int = 512, steps: int = 200) -> Point:
    """Read `length` random tokens in pieces, then time so many steps of one token. Or generate() it all,
    token by token, from a prompt of one."""
    device = distributed.setup(cfg.device).device
    model = LM(ModelConfig(**arm.shape.model)).to(device).eval()
    tokens = torch.randint(model.n_tokens, (1, length), device=device)  # (1, T)
    with torch.no_grad():
        state = model.init_state()
        for warm in (tokens[:, :piece], tokens[:, :1], tokens[:, :1]):
            model.step(warm, state)
        before = distributed.resident_memory() if device.type == "cpu" else distributed.peak_memory(device)
        state = model.init_state()
        if arm.options.get("generate"):
            model.init_state = lambda: state  # to look at afterwards
            stream = model.generate(tokens[:, :1], length + steps, temperature=0)
            for _ in range(length):
                next(stream)
            times = [timed(lambda: next(stream), 1, device) for _ in range(steps)]
        else:
            if model.cfg.mixer == "attention":
                # keys are kept as the state says, but here each reads 256 of them: to read 100,000 tokens in
                # full takes minutes. A single token then sees all that is kept
                for block in model.blocks:
                    block.mixer.window = 256
            for part in tokens.split(piece, dim=1):
                model.hidden(part, state)
            times = [timed(lambda: model.step(tokens[:, :1], state), 1, device) for _ in range(steps)]
    peak = distributed.peak_memory(device)
    return Point("decoding", arm.label, length, model.count_parameters()["total"], state_bytes(state), peak,
                 peak - before, 1000 * statistics.median(times))


def decode_all(arms: list[Arm], cfg: BenchConfig, bar: tqdm) -> list[Point]:
    points = []
    for arm in arms:
        mine = []
        for length in cfg.lengths:
            bar.set_description_str(f"decoding, {arm.label}, {length:,}")
            with ProcessPoolExecutor(1, SPAWN) as pool:  # a peak never goes down again
                try:
                    mine.append(pool.submit(decode, cfg, arm, length).result())
                except Exception as e:  # also of a process that was killed for its memory
                    print(f"decoding, {arm.label}, {length:,} failed: {e}", file=sys.stderr)
                    mine.append(Point("decoding", arm.label, length, error=f"{type(e).__name__}: {e}"))
            bar.update()
        fit_slope(mine)
        points += mine
    return points


def fit_slope(points: list[Point]) -> None:
    good = [p for p in points if not p.error]
    if len({p.length for p in good}) > 1:
        slope = np.polyfit(np.log([p.length for p in good]), np.log([p.state_bytes for p in good]), 1)[0]
        for p in good:
            p.slope = round(float(slope), 3) + 0.0  # not -0.0


def decoding_table(points: list[Point]) -> str:
    row = "{:<8}  {:<24} {:>10} {:>9} {:>14} {:>9} {:>10} {:>11} {:>6}"
    lines = [row.format("decoding", "", "parameters", "tokens", "state", "peak", "grown by", "per token",
                        "slope")]
    for p in points:
        values = ("failed",) if p.error else (
            f"{p.state_bytes:,} B", f"{1000 * p.peak_gb:.0f} MB", f"{1000 * p.grown_gb:.1f} MB",
            f"{p.ms_per_token:.2f} ms", "n/a" if p.slope is None else f"{p.slope:.2f}")
        lines.append(row.format(p.shape, p.arm, f"{p.parameters:,}", f"{p.length:,}", *values,
                                *[""] * (5 - len(values))).rstrip())
    return "\n".join(lines)


def draw_decoding(points: list[Point], path: str) -> None:
    """Memory (the state's, and dashed the whole process's peak) and ms per token against length."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (memory, speed) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for i, arm in enumerate(dict.fromkeys(p.arm for p in points)):
        mine = [p for p in points if p.arm == arm and not p.error]
        lengths, style = [p.length for p in mine], {"color": f"C{i}", "marker": "o", "markersize": 4}
        memory.plot(lengths, [p.state_bytes / 1e6 for p in mine], label=arm, **style)
        memory.plot(lengths, [1000 * p.peak_gb for p in mine], linestyle="--", **style)
        speed.plot(lengths, [p.ms_per_token for p in mine], label=arm, **style)
    for axes, label in ((memory, "MB: state; dashed: peak of the process"), (speed, "ms per token")):
        axes.set(xscale="log", yscale="log", xlabel="tokens read", ylabel=label)
        axes.grid(alpha=0.3)
    speed.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
    rows, turns = [], sum(len(arms) * (len(cfg.lengths) if name == "decoding" else cfg.rounds + 1)
                          for name, arms in races.items())
    bar = tqdm(total=turns, unit="turn", leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())
    with tempfile.TemporaryDirectory() as root, bar:
        for name, arms in races.items():
            if name == "decoding":
                points = decode_all(arms, cfg, bar)
                talk(decoding_table(points))
                if cfg.plot:
                    draw_decoding(points, cfg.plot)
                rows += points
                continue
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
