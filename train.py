"""Pre-training and continued training: the whole loop is in this file.

    python train.py config/demo.py                                    # CPU, Mac or one GPU: whatever is there
    torchrun --standalone --nproc_per_node=2 train.py config/exp6.py  # two GPUs (or two CPU processes)
    python train.py config/exp3.py --dry_run                          # size, cost, plan; trains nothing
    python train.py config/exp3.py --lr=3e-4 --name=exp3_lr3e-4       # a flag overrides the config file
    python train.py config/exp3.py --max_minutes=85                   # a session; the same command goes on

The same command continues a run that was stopped by Ctrl-C, SIGTERM, --max_minutes or kill -9: its losses are
those of the run that was never stopped. Everything a run leaves is in out/NAME/: last.pt, best.pt,
metrics.jsonl, samples.txt, loss.png; a run that ends adds its line to out/ledger.jsonl.
"""
import contextlib
import importlib.util
import math
import os
import shlex
import sys
import time
import uuid
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import checkpoint, data, distributed, memory, tokenizer
from common.checkpoint import CheckpointError
from common.config import UserError, run
from common.runlog import RunLog, git_commit, say
from common.stop import StopRequest
from model import LM, ModelConfig
from muon import Muon, parameter_groups

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class TrainConfig(ModelConfig):
    # run
    name: str = "train"  # its folder in out_dir; by default the config file's name
    out_dir: str = "out"  # holds the run folders and ledger.jsonl
    data: str = "data/shakespeare"  # folder made by prepare_data.py
    train_tokens: int = 0  # use only the first so many training tokens (what does data buy?); 0 = all
    init_from: str = ""  # start a new run from the weights of this checkpoint or run folder; "" = at random
    seed: int = 1  # of initialisation, data order and dropout
    overwrite: bool = False  # throw away the run of this name, if there is one
    dry_run: bool = False  # print the plan and stop
    # machine (may change when a run is continued)
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of products; weights stay fp32
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile; auto = on CUDA, for long runs
    checkpoint_activations: bool = False  # run each block again in backward: less memory, more time
    memory_gb: float = 0.0  # what micro_batch_size=0 may fill; 0 = what is free now
    # length: whichever ends first
    epochs: float = 1.0  # passes over the training windows; 0 = no limit
    max_steps: int = 0  # optimiser steps; 0 = no limit
    max_minutes: float = 0.0  # length of this session, which is saved and can be continued; 0 = no limit
    # batch
    batch_size: int = 32  # sequences per optimiser step, over all processes
    micro_batch_size: int = 0  # sequences one process runs at once; 0 = the most that fit in memory
    tbptt: int = 0  # tokens to back-propagate through; the state goes on, memory stays flat; 0 = max_seq_len
    # optimiser
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"  # muon: of matrices, adamw for the rest; see muon.py
    lr: float = 1e-3  # peak learning rate
    muon_lr: float = 0.02  # of Muon's matrices
    embed_lr: float = 0.0  # of embeddings; 0 = lr
    head_lr: float = 0.0  # of an untied head; 0 = lr
    scalar_lr: float = 0.0  # of norms, biases, other vectors, and routers; 0 = lr
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"  # wsd = warm-up, stable, decay
    warmup_steps: int = 0  # linear warm-up
    min_lr_ratio: float = 0.1  # where cosine, linear and wsd end, as a fraction of lr
    decay_fraction: float = 0.2  # wsd: the last part of the run, in which lr decays
    weight_decay: float = 0.1  # of matrices and an untied head; embeddings, norms and biases have none
    beta1: float = 0.9  # Adam's first moment, or SGD's momentum
    beta2: float = 0.95  # Adam's second moment
    muon_momentum: float = 0.95  # Muon's, ...
    muon_warmup_steps: int = 300  # ... reached after so many steps, from 0.85
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = no clipping
    # evaluation and output
    eval_interval: int = 0  # steps between evaluations on the whole validation split; 0 = once an epoch
    eval_lens: tuple[int, ...] = ()  # also evaluate at these context lengths (rope and none extrapolate)
    patience: int = 0  # stop after this many evaluations without a new best; 0 = never
    prompts: tuple[str, ...] = ()  # continued at each evaluation
    sample_tokens: int = 40  # length of those samples, drawn with temperature 0.8, top_k 50
    log_interval: int = 10  # steps between rows of metrics.jsonl
    save_minutes: float = 5.0  # between saves of last.pt; evaluations save it too; 0 = each step

    def problems(self) -> list[str]:
        out = super().problems()
        for key in ("batch_size", "log_interval"):
            if getattr(self, key) < 1:
                out.append(f"{key} must be at least 1, got {getattr(self, key)}")
        for key in ("micro_batch_size", "tbptt", "epochs", "max_steps", "max_minutes", "warmup_steps",
                    "eval_interval", "patience", "sample_tokens", "train_tokens", "save_minutes",
                    "weight_decay", "grad_clip", "lr", "seed", "memory_gb", "muon_lr", "embed_lr", "head_lr",
                    "scalar_lr", "muon_warmup_steps"):
            if not 0 <= getattr(self, key) < math.inf:
                out.append(f"{key} must be a number that is not negative, got {getattr(self, key)}")
        for key in ("min_lr_ratio", "decay_fraction", "beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, key) <= 1:
                out.append(f"{key} must be between 0 and 1, got {getattr(self, key)}")
        if self.head_lr and self.tie_embeddings:
            out.append(f"head_lr={self.head_lr} is set, but the head's matrix is the embedding's; "
                       "use embed_lr, or tie_embeddings=False")
        if not self.epochs and not self.max_steps:
            out.append("the run has no end: set epochs or max_steps (max_minutes only ends a session)")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            out.append(f"micro_batch_size={self.micro_batch_size} does not divide "
                       f"batch_size={self.batch_size}")
        if self.tbptt and self.mixer == "attention":
            out.append(f"tbptt={self.tbptt} carries a state of fixed size, but mixer=attention has none; use "
                       "mixer=context or mixer=lstm, or a smaller max_seq_len")
        if self.checkpoint_activations and (self.gated or self.tbptt):
            out.append("checkpoint_activations runs blocks again, but " + (
                "tbptt carries their state on; use one of them" if self.tbptt else
                "the gated context is a single one; use tbptt to save memory"))
        if any(n < 1 for n in self.eval_lens):
            out.append(f"eval_lens must be positive, got {self.eval_lens}")
        if self.pos == "learned" and any(n > self.max_seq_len for n in self.eval_lens):
            out.append(f"eval_lens={self.eval_lens} goes past the learned positions, which end at "
                       f"max_seq_len={self.max_seq_len}; use pos=rope or pos=none")
        if not self.name or os.path.basename(self.name) != self.name:
            out.append(f"name must be a plain folder name, got '{self.name}'")
        return out


# A continued run may differ in these: where and how fast it computes and what it prints, not what it learns.
MAY_CHANGE = {"name", "out_dir", "data", "overwrite", "dry_run", "device", "dtype", "compile", "memory_gb",
              "checkpoint_activations", "micro_batch_size", "max_minutes", "eval_lens", "prompts",
              "sample_tokens", "log_interval", "save_minutes"}


# ------------------------------------------------------------------------------------------------------------
# Plan: what the run will be, in numbers


@dataclass
class Plan:
    world: int
    micro: int  # sequences per forward pass
    accumulation: int  # forward passes per step and process
    per_epoch: int  # training windows in an epoch
    steps: int  # optimiser steps of the whole run

    def evaluates(self, step: int, cfg: TrainConfig) -> bool:
        """Whether step (1 = after the first) ends with an evaluation."""
        if step == self.steps or cfg.eval_interval:
            return step == self.steps or step % cfg.eval_interval == 0
        return step * cfg.batch_size // self.per_epoch > (step - 1) * cfg.batch_size // self.per_epoch


def make_plan(cfg: TrainConfig, world: int, per_epoch: int, micro: int = 0) -> Plan:
    micro = cfg.micro_batch_size or micro or max(1, cfg.batch_size // world)
    if cfg.batch_size % (micro * world):
        fits = math.ceil(cfg.batch_size / (micro * world)) * micro * world
        raise UserError(f"batch_size={cfg.batch_size} does not split into {world} processes x "
                        f"micro_batch_size={micro}; use --batch_size={fits}")
    ends = [max(1, math.ceil(cfg.epochs * per_epoch / cfg.batch_size))] if cfg.epochs else []
    ends += [cfg.max_steps] if cfg.max_steps else []
    return Plan(world, micro, cfg.batch_size // (micro * world), per_epoch, min(ends))


def peak_memory(cfg: TrainConfig, needs: memory.Needs, world: int, micro: int) -> float:
    return needs.peak(micro, gradients_stay=world > 1 or micro * world < cfg.batch_size)


def largest_micro_batch(cfg: TrainConfig, needs: memory.Needs, dist, room: float) -> int:
    """The largest part of a process's share of the batch that fits into `room` bytes."""
    share = max(1, cfg.batch_size // dist.world)
    fits = [n for n in range(1, share + 1) if share % n == 0
            and peak_memory(cfg, needs, dist.world, n) <= room]
    if not fits and not cfg.dry_run:
        least = peak_memory(cfg, needs, dist.world, 1)
        raise UserError(f"one sequence at a time needs about {least / 1e9:.1f} GB, but there is room for "
                        f"{room / 1e9:.1f} GB on {dist.device.type}; use --checkpoint_activations, a smaller "
                        "--max_seq_len or model, or --micro_batch_size=1 to try it nevertheless")
    return int(dist.sum(max(fits, default=1) if dist.is_main else 0)[0])  # the same everywhere


def choose_compile(cfg: TrainConfig, flops: float, device) -> tuple[bool, str]:
    """(whether to compile; the reason), for a run of so many FLOPs."""
    if cfg.compile != "auto":
        return cfg.compile == "true", "as asked"
    if device.type != "cuda":
        return False, "saves nothing here"  # measured on CPU: the loss and attention are not compiled anyway
    if not importlib.util.find_spec("triton"):
        return False, "triton is not installed"
    # a minute of compiling against a fifth or more of the time; small GPUs reach about 1e13 FLOP/s
    return (True, "a long run") if flops > 5e15 else (False, "the run is too short to earn it back")


# ------------------------------------------------------------------------------------------------------------
# Optimiser and schedule


def make_optimizer(cfg: TrainConfig, model: LM):
    groups = parameter_groups(model, cfg)
    grouped = sum(p.numel() for g in groups for p in g["params"])
    assert grouped == model.count_parameters()["total"], f"{grouped:,} parameters are in optimiser groups"
    if cfg.optimizer == "muon":
        return Muon(groups, betas=(cfg.beta1, cfg.beta2))
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=cfg.beta1, fused=fused)
    return torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), fused=fused)


def lr_fraction(step: int, cfg: TrainConfig, steps: int) -> float:
    """What step 0 .. steps - 1 uses of each group's peak learning rate."""
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)  # 0 .. 1 after the warm-up
    if cfg.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    elif cfg.schedule == "linear":
        left = 1 - done
    elif cfg.schedule == "wsd":
        left = min(1.0, (1 - step / steps) / max(cfg.decay_fraction, 1e-9))
    else:
        return 1.0
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * left


# ------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.inference_mode()
def evaluate(model: LM, tokens, split: dict, seq_len: int, batch_size: int, dist, dtype: str, stop):
    """Loss (nats per token), perplexity, bits per byte and word perplexity over a whole split, or None if
    stopped halfway.

    Bits per byte and word perplexity do not depend on the tokenizer: all nats are divided by the bytes, or
    words, of the text. Sums are reduced over the processes and divided last, so nothing depends on batch_size
    or their number.
    """
    model.eval()
    nats, count = 0.0, 0
    batches = data.eval_batches(tokens, seq_len, batch_size, dist.rank, dist.world, dist.device)
    total = math.ceil(len(tokens) / seq_len / batch_size / dist.world)
    with model.expert_usage() as usage:
        for x, y in tqdm(batches, total=total, desc="evaluating", leave=False, delay=5,
                         disable=not dist.is_main or not sys.stderr.isatty()):
            with distributed.autocast(dtype, dist.device):
                loss, _ = model(x, y)
            valid = int((y >= 0).sum())
            nats, count = nats + loss.item() * valid, count + valid
            if stop.requested:
                break
    model.train()
    nats, count, stopped, *used = dist.sum(nats, count, float(stop.requested), *usage.flatten().tolist())
    if stopped:
        return None
    used = torch.tensor(used).view(usage.shape)  # (L, E)
    shares = {"expert_usage": (used / used.sum(dim=1, keepdim=True)).tolist()} if used.numel() else {}
    return {**shares, "loss": nats / count, "perplexity": math.exp(min(700, nats / count)),
            "bits_per_byte": nats / math.log(2) / split["bytes"],
            "word_perplexity": math.exp(min(700, nats / split["words"]))}


def sample_prompts(model: LM, tok, cfg: TrainConfig, device) -> dict[str, str]:
    """Each configured prompt and its continuation; the same seed at every evaluation, so that texts can be
    compared."""
    model.eval()
    texts = {}
    for prompt in cfg.prompts:
        ids = torch.tensor([[tok.eot, *tok.encode(prompt)]], device=device)  # (1, T)
        room = cfg.max_seq_len - ids.size(1) if cfg.pos == "learned" else cfg.sample_tokens
        new = model.generate(ids, min(cfg.sample_tokens, room), temperature=0.8, top_k=50,
                             stop_tokens=[tok.eot], generator=torch.Generator(device).manual_seed(cfg.seed))
        texts[prompt] = tok.decode([i for i in (int(t) for t in new) if i != tok.eot])
    model.train()
    return texts


# ------------------------------------------------------------------------------------------------------------
# Starting, saving, continuing


@dataclass
class Progress:
    """Where a run stands: with the weights and the optimiser, all that continuing it needs. Data order and
    dropout are functions of (seed, step), so there is no state of a sampler or random generator to keep."""
    run_id: str
    step: int = 0  # optimiser steps done
    evaluated: int = 0  # the last step that was evaluated
    best: dict = field(default_factory=dict)  # the best evaluation, and its step
    bad_evals: int = 0  # evaluations since the best
    loss_sum: float = 0.0  # of the steps since the last evaluation
    seconds: float = 0.0  # spent in steps, all sessions
    sessions: int = 0
    micro: int = 0  # sequences per forward pass when it began
    ended: str = ""  # "finished" or "early stop"


@dataclass
class Job:
    """What a run is made of."""
    cfg: TrainConfig
    dist: distributed.Dist
    dtype: str
    meta: dict
    tok: object
    windows: data.Windows
    val_tokens: object
    plan: Plan
    needs: memory.Needs  # of memory
    room: float  # bytes that this process may take
    compiled: bool
    model: LM
    flops_per_token: float
    peak_flops: float  # of all devices together, 0 where not known
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    log: RunLog | None = None  # only in the main process
    ahead: dict[int, tuple] = field(default_factory=dict)  # the next micro-batch by its first sample

    def save(self, name: str) -> None:
        if self.log:
            checkpoint.save(self.log.path(name), {
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "progress": asdict(self.progress),
                "config": asdict(self.cfg), "tokenizer": self.meta["tokenizer"],
                "data_sha256": self.meta["splits"]["train"]["sha256"]})


def load_job(cfg: TrainConfig, dist) -> Job:
    """All a new run starts from: data, plan, initialised model, optimiser; nothing written yet."""
    dtype, why = distributed.choose_dtype(cfg.dtype, dist.device)
    if cfg.dry_run and cfg.vocab_size and not os.path.exists(cfg.data):
        meta = tok = windows = val_tokens = None
    else:
        meta, tok = data.read_meta(cfg.data), tokenizer.load(cfg.data)
        if 0 < cfg.vocab_size < tok.vocab_size:
            raise UserError(f"vocab_size={cfg.vocab_size}, but the tokenizer of {cfg.data} has "
                            f"{tok.vocab_size} ids")
        cfg = replace(cfg, vocab_size=cfg.vocab_size or tok.vocab_size, n_tokens=tok.vocab_size)
        train_tokens, val_tokens = (data.open_tokens(cfg.data, split, meta) for split in ("train", "val"))
        if cfg.train_tokens > len(train_tokens):
            raise UserError(f"train_tokens={cfg.train_tokens:,}, but {cfg.data} has {len(train_tokens):,}")
        windows = data.Windows(train_tokens[:cfg.train_tokens or None], cfg.max_seq_len, cfg.seed)
    if dist.device.type == "cpu" and not cfg.checkpoint_activations:  # up to a quarter more memory: holes
        distributed.keep_freed_memory()
    needs = memory.Needs(lambda: LM(cfg), cfg, dtype, dist.device)
    room = 1e9 * cfg.memory_gb or needs.base + 0.9 * memory.free_memory(dist.device) / (
        dist.world if dist.device.type == "cpu" else 1)
    micro = cfg.micro_batch_size or largest_micro_batch(cfg, needs, dist, room)
    plan = make_plan(cfg, dist.world, windows.per_epoch if windows else 0, micro)
    torch.manual_seed(cfg.seed)
    model = LM(cfg).to(dist.device)
    model.checkpoint_activations = cfg.checkpoint_activations
    flops = model.flops_per_token(cfg.max_seq_len)
    tokens = plan.steps * cfg.batch_size * cfg.max_seq_len
    compiled, why_compile = choose_compile(cfg, flops * tokens, dist.device)
    job = Job(cfg, dist, dtype, meta, tok, windows, val_tokens, plan, needs, room, compiled, model,
              flops_per_token=flops, peak_flops=distributed.peak_flops(dist.device, dtype) * dist.world,
              optimizer=make_optimizer(cfg, model),
              scaler=torch.amp.GradScaler(dist.device.type, enabled=dtype == "fp16"),
              progress=Progress(run_id=uuid.uuid4().hex[:12]))
    if dist.is_main:
        say(describe(job, why, why_compile))
    return job


def describe(job: Job, why: str, why_compile: str) -> str:
    """The plan in equations; without data (dry_run only) what can be said without."""
    cfg, plan, device = job.cfg, job.plan, job.dist.device
    n, seq, name = job.model.count_parameters(), cfg.max_seq_len, distributed.device_name(device)
    epoch, total, flops = plan.per_epoch * seq, plan.steps * cfg.batch_size * seq, job.flops_per_token
    many, needed = "es" * (plan.world > 1), peak_memory(cfg, job.needs, plan.world, plan.micro) / 1e9
    lines = [
        f"device      {name}; {job.dtype}: {why}; {'compiled' if job.compiled else 'not compiled'}: "
        f"{why_compile}",
        f"parameters  {n['total']:,} ({n['non_embedding']:,} without embeddings)",
        f"batch       {plan.world} process{many} x {plan.accumulation} accumulated x {plan.micro} = "
        f"{cfg.batch_size} sequences; x {seq} = {cfg.batch_size * seq:,} tokens a step",
        f"memory      about {needed:.2f} GB at its peak" + " a process" * (plan.world > 1)
        + (f", of {job.room / 1e9:.2f} GB" if job.room < math.inf else "")
        + ("; it will not fit: try --checkpoint_activations" if 1e9 * needed > job.room else ""),
        f"cost        {flops / 1e6:.1f} MFLOPs per token"
        + (f", {flops * total:.2e} FLOPs for the run" if epoch else "")]
    lines += ["optimiser   group       tensors  parameters  by       learning rate  weight decay"]
    for g in job.optimizer.param_groups:
        size = sum(p.numel() for p in g["params"])
        lines.append(f"            {g['name']:<10} {len(g['params']):8,} {size:11,}  {g['kind']:<6} "
                     f"{g['peak_lr']:15g} {g['weight_decay']:13g}")
    if not epoch:
        return "\n".join([*lines, f"epoch       not known: no tokens in {cfg.data} yet"])
    return "\n".join([
        *lines,
        f"epoch       {plan.per_epoch:,} windows x {seq} = {epoch:,} tokens; D/N {epoch / n['total']:.2f}:1 "
        "(Chinchilla 20:1)",
        f"run         {plan.steps:,} steps = {total / epoch:.2f} epochs = {total:,} tokens; "
        f"D/N {total / n['total']:.2f}:1"])


def begin_or_continue(job: Job) -> None:
    """Take the run's folder; if it holds a run, go on from that one's weights, optimiser and progress."""
    cfg, folder = job.cfg, os.path.join(job.cfg.out_dir, job.cfg.name)
    job.log = RunLog(folder) if job.dist.is_main else None
    saved = None if cfg.overwrite else load_existing(cfg, folder, job.meta)
    if saved:
        checkpoint.load_weights(job.model, saved["model"], folder)
        job.optimizer.load_state_dict(saved["optimizer"])
        if job.scaler.is_enabled() and saved["scaler"]:
            job.scaler.load_state_dict(saved["scaler"])
        job.progress = Progress(**saved["progress"])
        began, world = job.progress.micro, job.dist.world
        if not cfg.micro_batch_size and 0 < began < job.plan.micro and cfg.batch_size % (began * world) == 0:
            # more fits than when it began, but dropout masks are drawn for a micro-batch: keep its size
            job.plan = make_plan(cfg, world, job.plan.per_epoch, began)
    elif cfg.init_from:
        source = checkpoint.load(cfg.init_from, keys=("model", "config", "tokenizer"))
        check_tokenizer(source, job.meta, cfg.init_from, cfg.data)
        checkpoint.load_weights(job.model, source["model"], cfg.init_from)
    if job.log:
        job.log.begin(job.progress.step if saved else None, job.progress.evaluated)
        job.tok.save(folder)  # a run folder is enough to sample from
        say(f"{'continuing' if saved else 'starting':<11} {folder} at step {job.progress.step:,} of "
            f"{job.plan.steps:,}" + (f", {job.progress.ended}" if job.progress.ended else ""))
    job.progress.sessions += 1
    job.progress.micro = job.plan.micro


def load_existing(cfg: TrainConfig, folder: str, meta: dict) -> dict | None:
    """The checkpoint to continue from, or None for a new run; refuses to continue a run that differs from
    this config."""
    last, best = os.path.join(folder, "last.pt"), os.path.join(folder, "best.pt")
    if not os.path.exists(last):
        if os.path.exists(best):
            raise CheckpointError(f"{folder} has best.pt but no last.pt; go on from it with:  "
                                  f"cp {best} {last}\nor start anew with --overwrite, or use another --name")
        return None
    saved = checkpoint.load(last, keys=("model", "optimizer", "scaler", "progress", "config", "tokenizer",
                                        "data_sha256"))
    check_tokenizer(saved, meta, folder, cfg.data)
    differences = checkpoint.config_differences(saved["config"], asdict(cfg), MAY_CHANGE)
    if saved["data_sha256"] != meta["splits"]["train"]["sha256"]:
        differences.append(f"data: the training tokens in {cfg.data} are not those the run began with")
    if differences:
        raise UserError(f"{folder} holds a run with another configuration (at step "
                        f"{saved['progress']['step']:,}):\n  " + "\n  ".join(differences)
                        + "\nstart beside it with --name=OTHER, throw it away with --overwrite, or train its "
                        f"weights further in a new run with --init_from={folder} --name=OTHER")
    return saved


def check_tokenizer(saved: dict, meta: dict, path: str, folder: str) -> None:
    ours, theirs = meta["tokenizer"], saved["tokenizer"]
    if ours["fingerprint"] != theirs["fingerprint"]:
        raise UserError(f"{path} was trained with the tokenizer {theirs['name']} "
                        f"({theirs['fingerprint'][:12]}), but {folder} is tokenised with {ours['name']} "
                        f"({ours['fingerprint'][:12]}): the same ids mean other text\n"
                        "make the data with the model's tokenizer:  "
                        f"python prepare_data.py ... --tokenizer_from={path}")


def resume_command() -> str:
    args = [a for a in sys.argv if not a.startswith("--overwrite")]
    world = os.environ.get("WORLD_SIZE")
    start = ["torchrun", "--standalone", f"--nproc_per_node={world}"] if world else ["python"]
    return shlex.join(start + args)


# ------------------------------------------------------------------------------------------------------------
# Training


def main(cfg: TrainConfig) -> dict:
    """Train, or continue, or plan. Returns the summary, which is the ledger row of a run that ended."""
    dist, job = distributed.setup(cfg.device), None
    try:
        job = load_job(cfg, dist)
        if cfg.dry_run:
            return {"parameters": job.model.count_parameters(), **asdict(job.plan)}
        with StopRequest() as stop:
            begin_or_continue(job)
            train(job, stop)
        return finish(job)
    finally:
        if job and job.log:
            job.log.close()
        dist.close()


def train(job: Job, stop: StopRequest) -> None:
    cfg, dist, plan, progress = job.cfg, job.dist, job.plan, job.progress
    net = wrap(job)
    deadline = time.perf_counter() + 60 * cfg.max_minutes if cfg.max_minutes else math.inf
    saved_at = said_at = time.monotonic()
    stopping, speed, terminal = False, 0.0, sys.stderr.isatty()
    bar = tqdm(total=plan.steps, initial=progress.step, unit="step", dynamic_ncols=True,
               disable=not dist.is_main or not terminal)

    def wants_to_stop() -> bool:
        return stop.requested or time.perf_counter() > deadline

    while not progress.ended and not stopping:
        # an evaluation that is due (in a continued run: that a stop cut short)
        if progress.evaluated < progress.step and plan.evaluates(progress.step, cfg):
            stopping = not evaluate_and_save(job, stop, speed)
            saved_at = time.monotonic()
            continue

        # one optimiser step
        began = time.perf_counter()
        loss, norm, lr, stopping = take_step(job, net, wants_to_stop)
        seconds = time.perf_counter() - began
        progress.seconds += seconds
        speed = 1 / seconds if not speed else 0.9 * speed + 0.1 / seconds  # steps per second, smoothed

        # what people and programs read
        if job.log:
            if progress.step % cfg.log_interval == 0 or progress.step == plan.steps:
                job.log.metrics(step=progress.step, tokens=progress.step * cfg.batch_size * cfg.max_seq_len,
                                train_loss=loss, lr=lr, grad_norm=norm if math.isfinite(norm) else None,
                                seconds=round(progress.seconds, 3))
            epoch = progress.step * cfg.batch_size / plan.per_epoch
            text = f"epoch {epoch:.2f}, loss {loss:.3f}, lr {lr:.1e}, {speed_text(job, speed)}"
            bar.set_postfix_str(text, refresh=False)
            bar.update()
            if not terminal and time.monotonic() - said_at > 60:  # a line a minute in a log file
                left = (plan.steps - progress.step) / speed / 60
                say(f"step {progress.step:>7,}  {text}, {left:.0f} minutes left")
                said_at = time.monotonic()
            due = plan.evaluates(progress.step, cfg)  # then the evaluation saves, or is repeated after a stop
            if stopping or not due and time.monotonic() - saved_at >= 60 * cfg.save_minutes:
                job.save("last.pt")
                saved_at = time.monotonic()
    bar.close()


def wrap(job: Job):
    """The model as steps call it: compiled, and in DDP under torchrun."""
    net = torch.compile(job.model) if job.compiled else job.model
    if job.dist.grouped:
        own = [job.dist.device.index] if job.dist.device.type == "cuda" else None
        net = DistributedDataParallel(net, device_ids=own, gradient_as_bucket_view=True)
    return net


def take_step(job: Job, net, wants_to_stop=lambda: False) -> tuple[float, float, float, bool]:
    """One optimiser step on all processes: (mean loss, gradient norm, learning rate, whether any of them
    wants to stop, so that all do at the same step)."""
    cfg, step = job.cfg, job.progress.step
    fraction = lr_fraction(step, cfg, job.plan.steps)
    for group in job.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * fraction
        if group["kind"] == "muon":
            warm = min(1.0, step / max(1, cfg.muon_warmup_steps))
            group["momentum"] = 0.85 + (cfg.muon_momentum - 0.85) * warm
    lr = cfg.lr * fraction
    loss, norm = gradients(job, net)
    loss, stopping = job.dist.sum(loss / job.dist.world, float(wants_to_stop()))
    if not math.isfinite(loss) or not (job.scaler.is_enabled() or math.isfinite(norm)):
        raise_not_finite(job, f"loss {loss}, gradient norm {norm}, learning rate {lr:.3e}; not applied")
    job.scaler.step(job.optimizer)
    job.scaler.update()
    job.optimizer.zero_grad(set_to_none=True)
    job.progress.step += 1
    job.progress.loss_sum += loss
    return loss, norm, lr, bool(stopping)


def gradients(job: Job, net) -> tuple[float, float]:
    """Accumulate this step's gradients and clip them; returns this process's mean loss and the gradient's
    norm."""
    cfg, dist, plan, first = job.cfg, job.dist, job.plan, job.progress.step * job.cfg.batch_size
    first += dist.rank * plan.micro * plan.accumulation
    total = 0.0
    for i in range(plan.accumulation):
        sample = first + i * plan.micro
        x, y = job.ahead.pop(sample, None) or job.windows.batch(sample, plan.micro, dist.device)
        if cfg.dropout:
            # dropout is a function of (seed, sample): a continued run, or one on more processes, draws the
            # same masks
            torch.manual_seed((cfg.seed * 2**40 + sample) % 2**63)
        last = i == plan.accumulation - 1
        state = job.model.init_state() if cfg.tbptt else None
        pieces = list(zip(*(part.split(cfg.tbptt or x.size(1), dim=1) for part in (x, y)), strict=True))
        for j, (x_piece, y_piece) in enumerate(pieces):
            share = x_piece.size(1) / x.size(1) / plan.accumulation
            final = last and j == len(pieces) - 1
            with contextlib.nullcontext() if final or not dist.grouped else net.no_sync():
                with distributed.autocast(job.dtype, dist.device):
                    loss, state = net(x_piece, y_piece, state)
                job.scaler.scale(loss * share).backward()
            total = total + loss.detach() * share
        after = sample + (plan.micro if not last else cfg.batch_size - i * plan.micro)
        job.ahead = {after: job.windows.batch(after, plan.micro, dist.device)}  # while a GPU still computes
    if job.progress.step == 0:
        idle = [name for name, p in job.model.named_parameters() if p.grad is None]
        assert not idle, f"parameters without a gradient: {idle}"
    job.scaler.unscale_(job.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(job.model.parameters(), cfg.grad_clip or math.inf)
    return total.item(), norm.item()


def raise_not_finite(job: Job, what: str) -> None:
    saved = os.path.join(job.cfg.out_dir, job.cfg.name, "last.pt")
    if os.path.exists(saved):
        back = (f"the last save is from before it; go on from there in a new run with:  --init_from={saved} "
                f"--name={job.cfg.name}_lower --lr={job.cfg.lr / 3:.1e}")
    else:
        back = f"nothing was saved yet; try:  --lr={job.cfg.lr / 3:.1e} --warmup_steps=100"
    raise UserError(f"not finite at step {job.progress.step + 1:,}: {what}\n{back}")


def evaluate_and_save(job: Job, stop: StopRequest, speed: float) -> bool:
    """Evaluate at each length, sample, log and save; False if a stop was asked for meanwhile (the run is
    saved, and the evaluation is done when it is continued)."""
    cfg, progress, results = job.cfg, job.progress, {}
    for length in dict.fromkeys((cfg.max_seq_len, *cfg.eval_lens)):
        # without gradients more fits; up to 2^14 tokens at once, or what training takes
        tokens = job.needs.evaluated_at_once(job.plan.micro) * cfg.max_seq_len
        batch_size = max(1, min(tokens, max(job.plan.micro * cfg.max_seq_len, 2**14)) // length)
        results[length] = evaluate(job.model, job.val_tokens, job.meta["splits"]["val"], length, batch_size,
                                   job.dist, job.dtype, stop)
        if results[length] is None:
            job.save("last.pt")
            return False
    result = {"step": progress.step, **results[cfg.max_seq_len]}
    if not math.isfinite(result["loss"]):
        raise_not_finite(job, f"validation loss {result['loss']}; not saved")
    better = result["loss"] < progress.best.get("loss", math.inf)
    train_loss = progress.loss_sum / (progress.step - progress.evaluated)
    progress.bad_evals = 0 if better else progress.bad_evals + 1
    progress.best = result if better else progress.best
    progress.evaluated, progress.loss_sum = progress.step, 0.0
    if progress.step == job.plan.steps:
        progress.ended = "finished"
    elif cfg.patience and progress.bad_evals >= cfg.patience:
        progress.ended = "early stop"
    if job.log:
        samples = sample_prompts(job.model, job.tok, cfg, job.dist.device)
        report(job, result, {n: r["loss"] for n, r in results.items()}, train_loss, better, samples, speed)
    if better:
        job.save("best.pt")  # before last.pt, which knows the best: a kill between the two must not lose it
    job.save("last.pt")
    return True


def report(job: Job, result: dict, losses: dict, train_loss: float, better: bool, samples: dict, speed):
    cfg, step = job.cfg, result["step"]
    tokens, epoch = step * cfg.batch_size * cfg.max_seq_len, step * cfg.batch_size / job.plan.per_epoch
    by_length = {"val_loss_by_length": {str(n): v for n, v in losses.items()}} if cfg.eval_lens else {}
    job.log.metrics(step=step, tokens=tokens, epoch=epoch, mean_train_loss=train_loss,
                    **{f"val_{k}": v for k, v in result.items() if k != "step"}, **by_length, samples=samples,
                    seconds=round(job.progress.seconds, 3))
    say(f"step {step:>7,}  epoch {epoch:6.2f} | train {train_loss:.4f} | val {result['loss']:.4f}"
        f"{'*' if better else ' '} {measures(result)} | {speed_text(job, speed)}")
    if cfg.eval_lens:
        say("              loss by context length: " + ", ".join(f"{n}: {v:.4f}" for n, v in losses.items()))
    for i, shares in enumerate(result.get("expert_usage", [])):
        say(f"              layer {i + 1}: tokens per expert " + " ".join(f"{share:.0%}" for share in shares))
    for prompt, text in samples.items():  # on one line here; as it is in samples.txt
        say(f"              {prompt}|{' '.join(text.split()):.180}")
    job.log.draw(f"{cfg.name}: {job.model.count_parameters()['total']:,} parameters")


def speed_text(job: Job, speed: float) -> str:
    """tokens/s, MFU where the machine's peak is known, and peak memory, from steps per second."""
    tokens = speed * job.cfg.batch_size * job.cfg.max_seq_len
    mfu = f", MFU {job.flops_per_token * tokens / job.peak_flops:.0%}" if job.peak_flops else ""
    return f"{tokens:,.0f} tok/s{mfu}, {distributed.peak_memory(job.dist.device):.2f} GB"


def measures(result: dict) -> str:
    return (f"perplexity {result['perplexity']:.2f}, {result['bits_per_byte']:.3f} bits/byte, "
            f"word perplexity {result['word_perplexity']:.1f}")


def finish(job: Job) -> dict:
    """The run's summary; printed, and appended to the ledger if the run has ended."""
    cfg, progress, n, plan = job.cfg, job.progress, job.model.count_parameters(), job.plan
    tokens = progress.step * cfg.batch_size * cfg.max_seq_len
    summary = {
        "run_id": progress.run_id, "script": "train", "name": cfg.name, "status": progress.ended or "stopped",
        "steps": progress.step, "tokens": tokens, "epochs": progress.step * cfg.batch_size / plan.per_epoch,
        "parameters": n["total"], "parameters_non_embedding": n["non_embedding"],
        "tokens_per_parameter": tokens / n["total"], **{f"best_val_{k}": v for k, v in progress.best.items()},
        "seconds": progress.seconds, "sessions": progress.sessions,
        "tokens_per_second": tokens / max(progress.seconds, 1e-9),
        "peak_memory_gb": distributed.peak_memory(job.dist.device),
        "device": distributed.device_name(job.dist.device), "dtype": job.dtype, "world": plan.world,
        "seed": cfg.seed, "git": git_commit(), "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "config": asdict(cfg)}
    if job.log and progress.ended:
        job.log.ledger(summary)
        say(f"{progress.ended}: {progress.step:,} steps, {tokens:,} tokens, "
            f"{progress.seconds / 60:.1f} minutes of training, {summary['tokens_per_second']:,.0f} tok/s\n"
            f"best at step {progress.best['step']:,}: validation loss {progress.best['loss']:.4f}, "
            f"{measures(progress.best)}\nin {job.log.folder}: best.pt, last.pt, metrics.jsonl, loss.png; "
            f"look at it with:  python sample.py {job.log.folder}")
    elif job.log:
        say(f"stopped at step {progress.step:,} of {plan.steps:,} and saved in {job.log.folder}; "
            f"go on with:  {resume_command()}")
    return summary


if __name__ == "__main__":
    run(main, TrainConfig)
