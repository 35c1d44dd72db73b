"""Benchmarks of training and generation, against this machine's limits, nanoGPT and transformers.

    python bench.py                                            # tokens/s, share of the limit, peak memory
    python bench.py --shapes=exp3,exp6 --json=bench.json       # selected shapes; results as JSON too
    python bench.py --peer=../nanoGPT --shapes=exp3,d256,exp6  # against a checkout of nanoGPT
    python bench.py --peer=../nanoGPT --peer=transformers --shapes=generate
    python bench.py --shapes=qwen2,qwen2_decode --peer=transformers
    python bench.py --shapes=distill_loss --dtype=bf16
    python bench.py --shapes=context32,context512,scan1,scan8  # recurrent mixers
    python bench.py --shapes=decoding --plot=decoding.png      # memory and time per token at length
    python bench.py --shapes=tiny --rounds=2                   # a smoke test

Shapes
    exp1 .. exp7  the ladder's models (config/expN.py, flash on), 8 x 512 tokens a step, 4 x 512 from exp6 on
    d256          d_model 256, 8 layers, 8 heads, vocabulary 8,192; 16 x 256 tokens a step
    local         window 256 at T = 8,192 and at T = 512, and global attention at T = 8,192; d_model 256,
                  4 layers, 8 heads, RoPE, vocabulary 8,192; 8,192 tokens a step
    muon          config/tinier.py, 16 x 512 tokens a step, with Muon and with AdamW alone
    context32     the gated context vector (2.74M, d_model 256, 6 layers of 512, vocabulary 1,000), 32 x 64
                  tokens a step, against the same model computed entirely in a loop over positions
    context512    the same at 512 x 64 tokens, and torch.nn.LSTM of width 512 (2.35M)
    scan1, scan8  the scan variant, of similar size, at 1 x 1,024 and 8 x 1,024; the gated one and its loop
    decoding      state size, peak memory and ms per token after 1K, 10K and 100K tokens: context, scan, LSTM,
                  attention with and without a window; about 2.7M parameters each, in fp32
    generate      512 new tokens in one sequence with exp6's model; all arms have their weights in --dtype
    int8          the same in INT8 and in fp32; --compile compiles the decoding step of both
    qwen2         a model shaped as Qwen2 (60M: d_model 320, 8 layers, vocabulary 151,936), 4 x 256 tokens a
                  step; with --peer=transformers against its Qwen2 in the same dtype, eager and compiled
    qwen2_decode  128 new tokens in one sequence with the same models
    loading       a folder of Qwen2.5-0.5B's size in bf16 (random weights, written by transformers), read into
                  --dtype until all weights have been summed, by both; GB of the file per second
    distill_loss  forward and backward of KL(teacher || student) through both heads, from hidden states of
                  width 256 and 896; 2,048 tokens, vocabulary 151,936; against nn.KLDivLoss on all logits of
                  both, and with every second token masked
    distill       a step of exp 9's student with its teacher (random weights, 44.6M and 494M parameters), 16 x
                  128 tokens; against nn.KLDivLoss on all logits, and with the teacher's words in a cache
    startup       from `python train.py config/demo.py` to the end of its first step, not compiled
    overhead      share of exp3's step spent outside forward and loss, backward, clipping and optimiser
    tiny          a smoke test

Method: the arms of a shape take turns. Each is a process that warms up and then waits; in a round each arm
runs alone for some steps, and the order reverses from round to round, so that drift affects all arms alike.
Ratios are taken within a round and printed as min-median-max over the rounds. Peak memory is the process's
(on CUDA, what torch allocated). nanoMem trains through common/step.py, as train.py does. Tokens are random.
The limit is the fastest large matmul measured in the same precision; FLOPs are model.flops_per_token's.
"""
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from types import SimpleNamespace
from typing import Literal, NamedTuple

from common import data, distributed
from common.config import UserError, launch, load
from common.console import say
from common.decoding_points import Point, decoding_table, draw_decoding, fit_slope, state_bytes
from common.distill_loss import Mix, cached_loss, two_headed_loss
from common.files import write_json
from common.int8 import to_int8
from common.race import (
    HEAD,
    SPAWN,
    Arm,
    Runner,
    aligned,
    cells,
    compare,
    measure_machine,
    race,
    timed,
    warm_up,
)
from common.run import MachineConfig, append_to_ledger, ledger_row
from common.step import backward, choose_compile, next_token_loss, update, wrap
from common.tokenizer import rank_bpe
from common.written_out import ContextLoop, PlainLSTM
from model import LM, ModelConfig
from muon import make_optimizer, set_learning_rates
from pretrained import config_of
from pretrained import load as load_pretrained
from train import TrainConfig

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# Config

HERE = os.path.dirname(os.path.abspath(__file__))
EIGHT = {"d_model": 256, "n_heads": 8, "vocab_size": 8192}
QWEN2 = {"vocab_size": 151_936, "d_model": 320, "n_layers": 8, "n_heads": 10, "n_kv_heads": 2, "d_ff": 1280,
         "norm": "rmsnorm", "activation": "swiglu", "pos": "rope", "rope_theta": 1e6, "bias": False,
         "attn_bias": "qkv", "head_bias": False}
TEACHER = QWEN2 | {"d_model": 896, "n_layers": 24, "n_heads": 14, "d_ff": 4864}  # Qwen2.5-0.5B
SHAPES = {  # name: sequences per step, the config file, options on top of it
    **{f"exp{n}": (8 if n < 6 else 4, f"exp{n}", {}) for n in range(1, 8)},
    "d256": (16, "", EIGHT | {"max_seq_len": 256, "n_layers": 8}),
    "local": (1, "", EIGHT | {"max_seq_len": 8192, "n_layers": 4, "pos": "rope"}),
    "muon": (16, "tinier", {}), "context32": (32, "newllm_baseline", {}),
    "context512": (512, "newllm_baseline", {}), "scan1": (1, "newllm_scan", {"max_seq_len": 1024}),
    "scan8": (8, "newllm_scan", {"max_seq_len": 1024}), "decoding": (1, "newllm_baseline", {}),
    "qwen2": (4, "", QWEN2 | {"max_seq_len": 256}), "qwen2_decode": (1, "", QWEN2 | {"max_seq_len": 128}),
    "loading": (1, "", TEACHER),
    "distill_loss": (1, "", {"vocab_size": 151_936, "d_model": 256, "max_seq_len": 2048}),
    "distill": (16, "", QWEN2 | {"d_model": 256, "n_layers": 6, "n_heads": 8, "d_ff": 1024,
                                 "max_seq_len": 128}),
    "generate": (1, "exp6", {}), "int8": (1, "exp6", {}), "startup": (8, "demo", {}),
    "overhead": (8, "exp3", {}), "tiny": (2, "", {"max_seq_len": 32, "d_model": 32, "n_layers": 2,
                                                  "n_heads": 2, "vocab_size": 512})}
USUAL = ("exp1", "exp3", "exp6", "d256", "generate", "startup", "overhead")


@dataclass
class BenchConfig(MachineConfig):
    # what to measure
    shapes: tuple[Literal[tuple(SHAPES)], ...] = USUAL  # exp1, exp3, exp6, d256, generate, startup, overhead
    peer: tuple[str, ...] = ()  # the folder of a nanoGPT checkout, or transformers; may be repeated
    json: str = ""  # also write the results to this file; - = print JSON instead of the table
    out_dir: str = "out"  # holds ledger.jsonl
    # how to measure it
    rounds: int = 5  # of the arms taking turns
    steps: int = 0  # training steps of an arm in a round; 0 = about a second's worth
    lengths: tuple[int, ...] = (1_000, 10_000, 100_000)  # decoding: tokens read before the timed ones
    plot: str = ""  # decoding: file for a plot of memory and time against length
    dropout: float = 0.0  # in training, of nanoMem and peers

    def problems(self) -> list[str]:
        out = super().problems() + self.at_least(1, "rounds", "lengths") + self.at_least(0, "steps")
        out += [] if self.lengths else ["lengths needs at least one number"]
        if self.plot and "decoding" not in self.shapes:
            out.append("plot needs the shape decoding; add --shapes=decoding")
        if self.dropout and (plain := {"context32", "context512", "scan1", "scan8"} & set(self.shapes)):
            out.append(f"dropout={self.dropout}: the models that {', '.join(sorted(plain))} race against "
                       "have none; leave it out")
        return out + ([] if 0 <= self.dropout < 1 else [f"dropout must be in [0, 1), got {self.dropout}"])


class Shape(NamedTuple):
    batch: int  # sequences per step
    model: dict  # options of ModelConfig


def shape_of(name: str, config: str = "", **changes) -> Shape:
    """The shape `name`, or with the model of another config file; `changes` are options of the model."""
    batch, file, options = SHAPES[name]
    file = config or file
    ours = load(TrainConfig, [os.path.join(HERE, "config", f"{file}.py")] if file else [])
    model = {f.name: getattr(ours, f.name) for f in fields(ModelConfig)}
    model |= {"flash": True, "vocab_size": ours.vocab_size or 8192, "dropout": 0.0}
    return Shape(batch, model | options | changes)


def write_data(folder: str, vocab_size: int) -> str:
    """A data folder like prepare_data.py's, of random tokens. Its tokenizer has all bytes and then pairs and
    triples of bytes, so that startup loads one of the usual kind and size."""
    os.makedirs(folder, exist_ok=True)
    tok = rank_bpe("bench", [bytes([b]) for b in range(256)]
                   + [i.to_bytes(2 + (i >= 2**16), "big") for i in range(vocab_size - 257)])
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    tok.save(folder)
    rng, splits = np.random.default_rng(1), {}
    for split, n in (("train", 2**20), ("val", 2**14)):
        rng.integers(vocab_size, size=n, dtype=dtype).tofile(os.path.join(folder, f"{split}.bin"))
        splits[split] = {"tokens": n, "bytes": n, "words": n, "sha256": "random"}
    about = {"name": tok.name, "fingerprint": tok.fingerprint, "vocab_size": tok.vocab_size}
    write_json(os.path.join(folder, "meta.json"), {"dtype": np.dtype(dtype).name, "splits": splits,
                                                   "tokenizer": about})
    return folder


# ------------------------------------------------------------------------------------------------------------
# What an arm runs, in its own process


def training(step: Callable, shape: Shape, cfg: BenchConfig, device) -> Callable[[], float]:
    steps = warm_up(step, device, cfg.steps)
    tokens = steps * shape.batch * shape.model["max_seq_len"]
    return lambda: tokens / timed(step, steps, device)


def our_step(cfg: BenchConfig, shape: Shape, folder: str, optimizer: str, clocked: Callable | None = None):
    """(step(), which trains as train.py's loop does; its device, dtype and FLOPs per token). `clocked` wraps
    the pieces of a step: forward and loss, backward, clipping and optimiser."""
    dist = distributed.setup(cfg.device)
    options = shape.model | {"dropout": cfg.dropout, "batch_size": shape.batch, "optimizer": optimizer}
    ours = TrainConfig(**options, epochs=0, max_steps=10**6)
    dtype = distributed.choose_dtype(cfg.dtype, dist.device)[0]
    if dist.device.type == "cpu":
        distributed.keep_freed_memory()
    model = LM(ours).to(dist.device)
    flops = model.flops_per_token(ours.max_seq_len)
    net = wrap(model, choose_compile(cfg.compile, flops * 1e12, dist.device)[0], dist)
    optimizer = make_optimizer(model, ours)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dtype == "fp16")
    windows = data.Windows(data.open_text(folder).train, ours.max_seq_len, seed=1)
    loss_of, apply, scaled = next_token_loss, update, scaler
    if clocked:
        loss_of, apply = clocked(loss_of), clocked(apply)
        scaled = SimpleNamespace(scale=lambda loss: SimpleNamespace(  # all that backward() asks of a scaler
            backward=clocked(scaler.scale(loss).backward)))
    n, batch = 0, windows.batch(0, shape.batch, dist.device)

    def step():
        nonlocal n, batch
        set_learning_rates(optimizer, ours, n, ours.max_steps)
        seeds = [n] if cfg.dropout else None
        loss = backward(net, [batch], dist, dtype, scaled, seeds=seeds, loss_of=loss_of)
        n += 1
        batch = windows.batch(n * shape.batch, shape.batch, dist.device)
        apply(model, optimizer, scaler, ours.grad_clip, loss)
    return step, dist.device, dtype, flops


def note(dtype: str) -> str:
    dynamo = sys.modules.get("torch._dynamo.utils")  # counts the graphs, whoever had them compiled
    return dtype + (", compiled" if dynamo and dynamo.counters["stats"]["unique_graphs"] else "")


def train_ours(cfg: BenchConfig, shape: Shape, folder: str, optimizer: str = "adamw") -> Runner:
    step, device, dtype, flops = our_step(cfg, shape, folder, optimizer)
    return Runner(training(step, shape, cfg, device), note=note(dtype), dtype=dtype, flops=flops)


def overhead(cfg: BenchConfig, shape: Shape, folder: str) -> Runner:
    """Per cent of a step outside its clocked pieces. On an accelerator the clock waits for each piece, so
    host work that would have overlapped counts too."""
    seconds = []

    def clocked(piece: Callable) -> Callable:
        def call(*args, **kwargs):
            result = []
            seconds.append(timed(lambda: result.append(piece(*args, **kwargs)), 1, device))
            return result[0]
        return call

    step, device, dtype, _ = our_step(cfg, shape, folder, "adamw", clocked)
    steps = warm_up(step, device, cfg.steps)

    def measure() -> float:
        seconds.clear()
        whole = timed(step, steps, device)
        return 100 * (1 - sum(seconds) / whole)
    return Runner(measure, unit="% of a step", note=note(dtype))


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
                while not os.path.exists(row) or not os.path.getsize(row):  # written after the first step
                    if process.poll() is not None:
                        raise RuntimeError(f"train.py ended before its first step:\n{process.stderr.read()}")
                    time.sleep(0.002)
                return time.perf_counter() - began
            finally:
                process.kill()
                process.communicate()
    measure()  # fills the file cache and writes Python's bytecode
    return Runner(measure, unit="s")


def generate(cfg: BenchConfig, shape: Shape, folder: str, peer: str = "", compile: bool = False,
             dtype: str = "") -> Runner:
    """Generate max_seq_len tokens from a prompt of one token. nanoMem and transformers decode greedily with a
    KV cache; nanoGPT has no cache and always samples. `dtype`, which may be int8, overrides cfg's."""
    device = distributed.pick_device(cfg.device) if peer else distributed.setup(cfg.device).device
    length = shape.model["max_seq_len"]
    name = dtype or distributed.choose_dtype(cfg.dtype, device)[0]
    model = load_peer(peer, shape, 0.0)[0] if peer else LM(ModelConfig(**shape.model))
    model.to(device, distributed.DTYPES["fp32" if name == "int8" else name]).eval()
    if name == "int8":
        to_int8(model)
    prompt = torch.ones(1, 1, dtype=torch.long, device=device)  # (1, 1)
    options = {} if peer else {"temperature": 0, "compile": compile}
    if peer == "transformers":
        options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
        if compile:  # on a CPU generate() does not compile by itself; a static cache keeps the shapes
            model.forward, options["cache_implementation"] = torch.compile(model.forward), "static"

    def tokens(n):
        return list(model.generate(prompt, max_new_tokens=n, **options))
    tokens(length if compile else 8)  # warm-up; a compiled step is specific to the cache size
    return Runner(lambda: length / timed(lambda: tokens(length), 1, device),
                  note=name + ", compiled" * compile)


def load_once(path: str, dtype: str, device: str, peer: str) -> tuple[float, float]:
    """Seconds to load a folder and sum all weights (so what is mapped is read), and peak memory in GB."""
    device, transformers = distributed.pick_device(device), quiet_transformers() if peer else None
    if peer:
        load_model = transformers.AutoModelForCausalLM.from_pretrained
        options = {"dtype": distributed.DTYPES[dtype]}
        transformers.Qwen2ForCausalLM  # noqa: B018, imported when it is first named
    else:
        load_model, options = load_pretrained, {"dtype": dtype}

    def read():
        for p in load_model(path, **options).to(device).parameters():
            p.sum()
    return timed(read, 1, device), distributed.peak_memory(device)


def loading(cfg: BenchConfig, shape: Shape, folder: str, peer: str = "") -> Runner:
    """load_once in a fresh process each time, as users meet it: memory that a process has is faster."""
    path, peaks = os.path.join(folder, "weights"), []
    if not os.path.exists(path):  # the first arm writes it
        load_peer("transformers", shape, 0.0)[0].to(torch.bfloat16).save_pretrained(path)
    name = distributed.choose_dtype(cfg.dtype, distributed.pick_device(cfg.device))[0]
    size = sum(entry.stat().st_size for entry in os.scandir(path)) / 1e9

    def measure() -> float:
        code = f"import bench; print(*bench.load_once({path!r}, {name!r}, {cfg.device!r}, {peer!r}))"
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        seconds, peak = map(float, done.stdout.split())
        peaks.append(peak)
        return size / seconds
    measure()
    return Runner(measure, "GB/s", name, peak=lambda: max(peaks))


def distill_loss(cfg: BenchConfig, shape: Shape, folder: str, plain: bool = False, masked: bool = False,
                 teacher_width: int = 896) -> Runner:
    """Gradients of one micro-batch's loss. The student's head is in float32 under autocast, as in training;
    the teacher's is in the dtype of the matmuls, as it was loaded."""
    device = distributed.setup(cfg.device).device
    name = distributed.choose_dtype(cfg.dtype, device)[0]
    if device.type == "cpu" and not plain:  # as training does; a plain script would not ask for this
        distributed.keep_freed_memory()
    m, scale = shape.model, 1024.0 if name == "fp16" else 1.0
    N, V, C = shape.batch * m["max_seq_len"], m["vocab_size"], m["d_model"]

    def head_of(width, dtype):  # logits of about unit variance
        x, weight = (torch.randn(n, width, device=device, dtype=dtype) for n in (N, V))
        return x, weight.mul_(width ** -0.5)
    x, weight = (leaf.requires_grad_() for leaf in head_of(C, torch.float32))
    hidden, teacher = head_of(teacher_width, distributed.DTYPES[name])
    targets = torch.randint(V, (N,), device=device)
    if masked:
        targets[::2] = -1

    def loss_of():
        if not plain:
            return two_headed_loss(x, weight, None, targets, [(hidden, teacher, None)], Mix())[0]
        log_q = F.linear(x, weight).log_softmax(dim=-1)  # (N, V)
        with torch.no_grad():
            p = F.linear(hidden, teacher).softmax(dim=-1)  # (N, V)
        return nn.KLDivLoss(reduction="batchmean")(log_q, p)

    def step():
        with distributed.autocast(name, device):
            loss = loss_of()
        (loss * scale).backward()
        grads, x.grad, weight.grad = (x.grad, weight.grad), None, None
        return grads
    return Runner(training(step, shape, cfg, device), note=name, dtype=name,
                  flops=2 * V * (3 * C + teacher_width) / (1 + masked))


def distill_step(cfg: BenchConfig, shape: Shape, folder: str, how: str, draws: int = 32) -> Runner:
    """Training steps on KL(teacher || student), one micro-batch each. how: both heads chunk by chunk
    ("chunks"), all logits ("plain"), or from sampled ids as a cache has them ("cached")."""
    dist = distributed.setup(cfg.device)
    name = distributed.choose_dtype(cfg.dtype, dist.device)[0]
    if dist.device.type == "cpu" and how != "plain":
        distributed.keep_freed_memory()
    ours = TrainConfig(**shape.model, batch_size=shape.batch, epochs=0, max_steps=10**6)
    student, T, V = LM(ours).to(dist.device), ours.max_seq_len, ours.vocab_size
    optimizer, scaler = make_optimizer(student, ours), torch.amp.GradScaler(enabled=False)
    x, y = torch.randint(V, (2, shape.batch, T), device=dist.device)
    flops, teacher = student.flops_per_token(T), None
    if how != "cached":
        teacher = LM(ModelConfig(**TEACHER, max_seq_len=T)).to(dist.device, distributed.DTYPES[name])
        teacher.eval().requires_grad_(False)
        flops += teacher.flops_per_token(T) / 3
    N = y.numel()
    drawn = (torch.randint(V, (N, draws)), torch.full((N, draws), 1 / draws), None, torch.zeros(N))
    drawn = [None if a is None else a.to(dist.device) for a in drawn]

    def loss_of(net, x, y, state=None):
        if how == "plain":
            with torch.no_grad():
                p = teacher(x)[0].softmax(dim=-1).flatten(0, 1)  # (N, V)
            log_q = net(x)[0].log_softmax(dim=-1).flatten(0, 1)  # (N, V)
            return nn.KLDivLoss(reduction="batchmean")(log_q, p), None
        rows = net.hidden(x).flatten(0, 1), net.head.weight, None, y.flatten()
        if how == "cached":
            return cached_loss(*rows, drawn, Mix()), None
        with torch.no_grad():
            said = [(teacher.hidden(x).flatten(0, 1), teacher.head.weight, None)]
        return two_headed_loss(*rows, said, Mix()), None

    def step():
        loss = backward(student, [(x, y)], dist, name, scaler, loss_of=loss_of)
        update(student, optimizer, scaler, ours.grad_clip, loss.flatten()[0])
    return Runner(training(step, shape, cfg, dist.device), note=name, dtype=name, flops=flops)


# ------------------------------------------------------------------------------------------------------------
# Peers: their own models and training steps


WRITTEN_OUT = {"loop": ContextLoop, "nn.LSTM": PlainLSTM}  # as somebody would write them in a plain script


def quiet_transformers():
    """The module transformers, which otherwise prints bars and warnings over the table."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load_peer(peer: str, shape: Shape, dropout: float):
    """(model, loss(net, x, y)) of this shape: a WRITTEN_OUT model, transformers' GPT-2 (with RoPE: Qwen2), or
    the GPT of a nanoGPT checkout."""
    m = shape.model
    if peer in WRITTEN_OUT:
        return WRITTEN_OUT[peer](m), lambda net, x, y: F.cross_entropy(net(x).flatten(0, 1), y.flatten())
    sizes = {"vocab_size": m["vocab_size"], "n_embd": m["d_model"], "n_layer": m["n_layers"],
             "n_head": m["n_heads"]}
    if peer == "transformers":
        transformers = quiet_transformers()
        if m["pos"] == "rope":
            ends = {"bos_token_id": None, "eos_token_id": None}
            model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
                **config_of(ModelConfig(**m), "qwen2", ends, "float32")))
        else:
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
                **sizes, n_positions=m["max_seq_len"], resid_pdrop=dropout, embd_pdrop=dropout,
                attn_pdrop=dropout, bos_token_id=None, eos_token_id=None))
        return model, lambda net, x, y: net(input_ids=x, labels=x, use_cache=False).loss  # it shifts labels
    spec = importlib.util.spec_from_file_location("peer_model", os.path.join(peer, "model.py"))
    module = sys.modules["peer_model"] = importlib.util.module_from_spec(spec)  # `model` is nanoMem's
    spec.loader.exec_module(module)
    model = module.GPT(module.GPTConfig(**sizes, block_size=m["max_seq_len"], dropout=dropout, bias=True))
    return model, lambda net, x, y: net(x, y)[1]


def train_peer(cfg: BenchConfig, shape: Shape, folder: str, peer: str, dtype: str, compile: bool) -> Runner:
    """nanoGPT's training step: each batch from a freshly opened memory map, fetched while a GPU runs the
    forward pass; its own choice of AdamW; gradients clipped at 1. The other peers take the same step with
    fused AdamW, the default of transformers' Trainer."""
    device, length = distributed.pick_device(cfg.device), shape.model["max_seq_len"]
    model, loss_of = load_peer(peer, shape, cfg.dropout)
    model.to(device).train()
    if hasattr(model, "configure_optimizers"):
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device.type)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    net = torch.compile(model) if compile else model
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")

    def next_batch():
        kind = np.uint16 if shape.model["vocab_size"] <= 2**16 else np.uint32
        tokens = np.memmap(os.path.join(folder, "train.bin"), dtype=kind, mode="r")
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

    flops = 0  # the same as our model's
    if peer in WRITTEN_OUT:
        matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        flops = 6 * (matrices - model.embed.weight.numel())
    return Runner(training(step, shape, cfg, device), dtype=dtype, flops=flops)


# ------------------------------------------------------------------------------------------------------------
# Arms


def arms_of(name: str, cfg: BenchConfig, machine: dict) -> list[Arm]:
    """Who takes turns on a shape. Ratios are of the first arm to each of the others."""
    return ARMS.get(name, training_arms)(name, shape_of(name), cfg, machine)


def training_arms(name: str, shape: Shape, cfg: BenchConfig, machine: dict) -> list[Arm]:
    arms = [Arm("nanoMem", train_ours, shape)]
    for peer in cfg.peer:
        if machine["device"] != "cuda" or peer == "transformers":  # nanoGPT as shipped compiles on CUDA
            arms.append(peer_arm(f"{title(peer)} as shipped", shape, peer, "fp32"))
        arms.append(peer_arm(f"{title(peer)} compiled", shape, peer, machine["dtype"], compile=True))
    return arms


def peer_arm(label: str, shape: Shape, peer: str, dtype: str, compile: bool = False) -> Arm:
    return Arm(f"{label}: {dtype}", train_peer, shape, {"peer": peer, "dtype": dtype, "compile": compile})


def title(peer: str) -> str:
    return os.path.basename(os.path.abspath(peer))


def qwen2_arms(name: str, shape: Shape, cfg: BenchConfig, machine: dict) -> list[Arm]:
    dtype = machine["dtype"] if cfg.dtype == "auto" else cfg.dtype
    peers = [peer_arm(f"{title(peer)}{', compiled' * compile}", shape, peer, dtype, compile)
             for peer in cfg.peer if peer == "transformers" for compile in (False, True)]
    return [Arm("nanoMem", train_ours, shape), *peers]


def recurrent_arms(name: str, shape: Shape, cfg: BenchConfig, machine: dict) -> list[Arm]:
    gated = shape_of(name, config="newllm_baseline")
    arms = [Arm("scan", train_ours, shape)] if name.startswith("scan") else []
    arms += [Arm("gated", train_ours, gated), peer_arm("all in the loop", gated, "loop", "fp32")]
    if name == "context512":
        arms += [peer_arm("nn.LSTM", gated, "nn.LSTM", dtype)
                 for dtype in dict.fromkeys(("fp32", machine["dtype"]))]
    return arms


def decoding_arms(name: str, shape: Shape, *_) -> list[Arm]:
    lstm = shape_of(name, "newllm_lstm", context_dim=224, n_layers=3, d_ff=512)  # 2.77M parameters
    attention = shape_of(name, "newllm_transformer", d_ff=512)  # 2.62M
    window = Shape(1, attention.model | {"window": 256})
    return [Arm("context", decode, shape), Arm("context, by generate()", decode, shape, {"generate": True}),
            Arm("scan", decode, shape_of(name, "newllm_scan")), Arm("LSTM", decode, lstm),
            Arm("attention, window 256", decode, window), Arm("attention", decode, attention)]


def generation_arms(name: str, shape: Shape, cfg: BenchConfig, machine: dict) -> list[Arm]:
    ours = [{"compile": True}] * (cfg.compile != "false") + [{"compile": False}]
    peers = [{"peer": peer} | options for peer in cfg.peer
             for options in (ours if peer == "transformers" else ours[-1:])]
    return [*(Arm("nanoMem", generate, shape, options) for options in ours),
            *(Arm(title(options["peer"]), generate, shape, options) for options in peers)]


ARMS = {  # of the shapes that are not simply training against peers
    "startup": lambda name, shape, *_: [Arm("nanoMem", start_up, shape)],
    "overhead": lambda name, shape, *_: [Arm("nanoMem", overhead, shape)],
    "local": lambda name, shape, *_: [
        Arm("window 256, T 8192", train_ours, Shape(1, shape.model | {"window": 256})),
        Arm("window 256, T 512", train_ours, Shape(16, shape.model | {"window": 256, "max_seq_len": 512})),
        Arm("global, T 8192", train_ours, shape)],
    "loading": lambda name, shape, *_: [
        Arm("nanoMem", loading, shape), Arm("transformers", loading, shape, {"peer": "transformers"})],
    "muon": lambda name, shape, *_: [
        Arm(by, train_ours, shape, {"optimizer": by}) for by in ("muon", "adamw")],
    "int8": lambda name, shape, cfg, _: [
        Arm("nanoMem", generate, shape, {"dtype": dtype, "compile": cfg.compile == "true"})
        for dtype in ("int8", "fp32")],
    "distill_loss": lambda name, shape, *_: [
        Arm("two_headed_loss", distill_loss, shape), Arm("all logits", distill_loss, shape, {"plain": True}),
        Arm("half masked", distill_loss, shape, {"masked": True})],
    "distill": lambda name, shape, *_: [Arm(title, distill_step, shape, {"how": how}) for title, how in (
        ("chunk by chunk", "chunks"), ("all logits", "plain"), ("cached", "cached"))],
    **dict.fromkeys(("context32", "context512", "scan1", "scan8"), recurrent_arms),
    "decoding": decoding_arms, "generate": generation_arms, "qwen2": qwen2_arms,
    "qwen2_decode": lambda name, shape, cfg, machine: generation_arms(
        name, shape, replace(cfg, peer=tuple(p for p in cfg.peer if p == "transformers")), machine)}


# ------------------------------------------------------------------------------------------------------------
# Decoding at length


def decode(cfg: BenchConfig, arm: Arm, length: int, piece: int = 512, steps: int = 200) -> Point:
    """Read `length` random tokens in pieces, then time `steps` steps of one token; or, if the arm says so,
    generate() all of them from a prompt of one."""
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
            model.init_state = lambda: state  # generate() fills this one, which is measured below
            stream = model.generate(tokens[:, :1], length + steps, temperature=0)
            for _ in range(length):
                next(stream)
            times = [timed(lambda: next(stream), 1, device) for _ in range(steps)]
        else:
            if model.cfg.mixer == "attention":
                # read with a window of 256: in full, 100,000 tokens take minutes. The state keeps the keys it
                # would keep anyway, and the single tokens timed below attend to all of them
                for block in model.trunk:
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
            with ProcessPoolExecutor(1, SPAWN) as pool:  # a new process: peak memory never goes down
                try:
                    mine.append(pool.submit(decode, cfg, arm, length).result())
                except Exception as e:  # also if the process was killed for its memory
                    print(f"decoding, {arm.label}, {length:,} failed: {e}", file=sys.stderr)
                    mine.append(Point("decoding", arm.label, length, error=f"{type(e).__name__}: {e}"))
            bar.update()
        fit_slope(mine)
        points += mine
    return points


# ------------------------------------------------------------------------------------------------------------
# Limits and results


def check_peers(cfg: BenchConfig) -> None:
    for peer in (*cfg.peer, *["transformers"] * ("loading" in cfg.shapes)):
        if peer == "transformers" and not importlib.util.find_spec(peer):
            raise UserError("transformers is asked for, but the package 'transformers' is not installed\n"
                            "install it with:  pip install transformers")
        if peer != "transformers" and not os.path.isfile(os.path.join(peer, "model.py")):
            raise UserError(f"--peer={peer}: expected transformers, or a folder with nanoGPT's model.py\n"
                            "get it with:  git clone https://github.com/karpathy/nanoGPT")


def main(cfg: BenchConfig) -> dict:
    """Print the table. Returns the ledger row, whose result is what --json writes: machine and rows."""
    check_peers(cfg)
    began, talk = time.perf_counter(), (lambda text: None) if cfg.json == "-" else say
    with SPAWN.Pool(1) as pool:
        machine = pool.apply(measure_machine, [cfg.device])
    rates = ", ".join(f"{k} {v:,.0f} GFLOP/s" for k, v in machine["limits"].items() if k != "copy")
    talk(f"{machine['name']}, torch {machine['torch']}; matmuls {rates}; "
         f"copy {machine['limits']['copy']:.1f} GB/s\n{aligned(HEAD)}")
    races = {name: arms_of(name, cfg, machine) for name in cfg.shapes}
    rows, turns = [], sum(len(arms) * (len(cfg.lengths) if name == "decoding" else cfg.rounds + 1)
                          for name, arms in races.items())
    bar = tqdm(total=turns, unit="turn", leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())
    with tempfile.TemporaryDirectory() as root, bar:
        for name, arms in races.items():
            if name == "decoding":
                found = decode_all(arms, cfg, bar)
                talk(decoding_table(found))
                if cfg.plot:
                    draw_decoding(found, cfg.plot)
            else:
                vocab_size = arms[0].shape.model["vocab_size"]
                folder = write_data(os.path.join(root, str(vocab_size)), vocab_size)
                found = race(name, arms, cfg, folder, bar)
                compare(found, machine["limits"])
                talk("\n".join(aligned(cells(row)) for row in found))
            rows += found
    result = {"machine": machine, "rows": [asdict(row) for row in rows]}
    if cfg.json == "-":
        print(json.dumps({"config": asdict(cfg)} | result, indent=1))
    elif cfg.json:
        write_json(cfg.json, {"config": asdict(cfg)} | result)
    row = ledger_row("bench", cfg, distributed.Dist(0, 1, distributed.pick_device(cfg.device)), result=result,
                     counts={"arms": len(rows)}, seconds=time.perf_counter() - began, dtype=cfg.dtype)
    append_to_ledger(cfg.out_dir, row)
    return row


if __name__ == "__main__":
    launch(main, BenchConfig)
