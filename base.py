"""Bases for memory experiments: small models trained until they answer a pool of facts in every wording.

    base = make_base(cfg, text, world, pool, dist, stop)    # a checkpoint, cached in out_dir/base_HASH

A model that has not learned what facts look like learns that first, and a probe would measure it (the plateau of
Zucchet 2025, 2503.21676). So training ends at the gate, not after a number of steps: when the base answers a share
`gate` of its pool in the trained, the held-out and the question wording. The pool's rows are packed full of
sentences; with one sentence a row the plateau lasts for thousands of steps.
"""
import copy
import itertools
import json
import os
import time
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

from common import checkpoint, probing
from common.config import UserError
from common.console import StepBar, say
from common.data import Text, Windows
from common.distributed import Dist, choose_dtype
from common.facts import LEVELS, WORDINGS, Fact, World
from common.files import read_rows, write_json
from common.run import Run, RunConfig, digest
from common.step import backward, update, wrap
from model import LM, ModelConfig
from muon import OptimizerConfig, make_optimizer, set_learning_rates

import numpy as np
import torch

# ------------------------------------------------------------------------------------------------------------
# Config

CPU = torch.device("cpu")


@dataclass
class BaseConfig(RunConfig, OptimizerConfig, ModelConfig):
    MAY_CHANGE = {"save_minutes", "micro_batch_size"}
    # base: what knows the form of facts before any is written
    data: str = "data/shakespeare"  # folder made by prepare_data.py: the text in the background
    base: str = ""  # start from this checkpoint or run folder, whose architecture it has; "" = random weights
    pool: int = 256  # facts it learns in every wording; 0 = none: the base is used as it is
    pool_share: float = 0.25  # of its rows that hold them, packed full
    gate: float = 0.95  # share of the pool it must answer, in every wording
    base_steps: int = 3000  # at most; training ends at the gate
    level: Literal[tuple(LEVELS)] = "H1"  # of facts: H0 | H1 | H2 | H3 | H4 | H5 (common/facts.py)
    answers: int = 0  # answers to choose from; 0 = as the level says
    batch_size: int = 32  # rows per step
    micro_batch_size: int = 0  # rows per forward pass; 0 = all of a process's rows
    save_minutes: float = 5.0  # between saves of last.pt; 0 = every step
    # model: defaults that differ from model.py's
    max_seq_len: int = 64  # tokens T of a row
    pos: Literal["learned", "rope", "none"] = "rope"  # learned | rope (no length limit) | none
    # run: defaults that differ from train.py's
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "constant"  # cosine | linear | constant | wsd

    def problems(self) -> list[str]:
        out = super().problems() + self.at_least(1, "batch_size", "base_steps")
        out += self.at_least(0, "pool", "micro_batch_size", "save_minutes", "answers")
        out += [f"{key} must be between 0 and 1, got {getattr(self, key)}" for key in ("pool_share", "gate")
                if not 0 <= getattr(self, key) <= 1]
        if not self.pool and not self.base:
            out.append("pool=0 needs a base that knows something: --base=CHECKPOINT")
        if self.answers == 1:
            out.append("answers=1 leaves nothing to remember; use 2 or more")
        return out

    @property
    def pool_rows(self) -> int:
        return round(self.pool_share * self.batch_size) if self.pool else 0


# ------------------------------------------------------------------------------------------------------------
# Training


def architecture(cfg: BaseConfig, meta: dict) -> BaseConfig:
    """With the vocabulary of the data, or everything about the model from the checkpoint in `base`."""
    if not cfg.base:
        n = meta["tokenizer"]["vocab_size"]
        return replace(cfg, vocab_size=cfg.vocab_size or n, n_tokens=n)
    saved = checkpoint.load(cfg.base, keys=("model", "config", "tokenizer"))
    checkpoint.check_tokenizer(saved["tokenizer"], cfg.base, meta["tokenizer"], cfg.data)
    has = {f.name: saved["config"][f.name] for f in fields(ModelConfig) if f.name in saved["config"]}
    if has.get("pos") != "learned":
        has.pop("max_seq_len", None)  # nothing limits it
    return replace(cfg, **has)


def base_config(cfg) -> BaseConfig:
    """The base that a probe's config asks for (with its base_optimizer, base_lr and base_seed), named by a hash
    of everything it depends on."""
    values = {f.name: getattr(cfg, f.name) for f in fields(BaseConfig)}
    values |= {f.name: f.default for f in fields(OptimizerConfig)}  # the probe's optimiser is not the base's
    values |= {"optimizer": cfg.base_optimizer, "lr": cfg.base_lr, "schedule": "constant", "warmup_steps": 50,
               "seed": cfg.base_seed, "question": "", "overwrite": False, "dry_run": False}
    free = ("name", "out_dir", "device", "dtype", "compile", "save_minutes", "micro_batch_size")
    name = digest({k: v for k, v in values.items() if k not in free})
    return BaseConfig(**values | {"name": f"base_{name}"})


def pool_batch(sentences: list[list[int]], n_rows: int, step: int, cfg: BaseConfig, eot: int):
    """Rows (n_rows, T) packed with the pool's sentences in an endless seeded order: a function of the step."""
    tries = (cfg.max_seq_len + 1) // min(map(len, sentences))
    x, y = (np.full((n_rows, cfg.max_seq_len), fill) for fill in (eot, -1))
    for row in range(n_rows):
        epoch, place = divmod((step * n_rows + row) * tries, len(sentences))
        order = np.random.default_rng((cfg.seed, 7, epoch)).permutation(len(sentences))
        left, chosen = cfg.max_seq_len + 1, []
        for i in order[place:place + tries]:
            if len(sentences[i]) <= left:
                chosen.append(sentences[i])
                left -= len(sentences[i])
        if chosen:
            ids = sum(chosen, [])
            x[row, :len(ids) - 1], y[row, :len(ids) - 1] = ids[:-1], ids[1:]
    return x, y


def background(windows: Windows, step: int, cfg: BaseConfig):
    """The batch of a step as arrays (B, T), to write rows into: windows.batch gives two views of one array."""
    return [z.numpy().copy() for z in windows.batch(step * cfg.batch_size, cfg.batch_size, CPU)]


def split_batch(x, y, cfg: BaseConfig, dist: Dist) -> list:
    """This process's rows as micro-batches on its device."""
    mine = [torch.as_tensor(z)[dist.rank::dist.world].to(dist.device) for z in (x, y)]
    return list(zip(*(z.split(cfg.micro_batch_size or len(z)) for z in mine), strict=True))


def make_base(cfg: BaseConfig, text: Text, world: World, pool: list[Fact], dist: Dist, stop) -> dict | None:
    """The checkpoint of a base that knows the pool, trained here unless it is cached. None if asked to stop."""
    if not pool:
        return checkpoint.load(cfg.base, keys=("model", "config", "optimizer"))
    dtype, T = choose_dtype(cfg.dtype, dist.device)[0], cfg.max_seq_len
    sha256, path = text.meta["splits"]["train"]["sha256"], os.path.join(cfg.out_dir, cfg.name, "last.pt")
    if os.path.exists(path):  # without the lock: several scripts may read one base
        saved = checkpoint.load(path, keys=("model", "config", "optimizer", "progress", "data_sha256"))
        if saved["progress"]["recall"] >= cfg.gate and saved["data_sha256"] == sha256:
            return saved
    with Run(cfg, dist, "memory_probe", text.meta["tokenizer"], sha256) as run:
        saved = run.find()
        torch.manual_seed(cfg.seed)
        model = LM(cfg).to(dist.device)
        optimizer = make_optimizer(model, cfg)
        scaler = torch.amp.GradScaler(dist.device.type, enabled=dtype == "fp16")
        step, recall, net = 0, 0.0, wrap(model, False, dist)
        if saved:
            run.restore(saved, model, optimizer, scaler)
            step, recall = saved["progress"]["step"], saved["progress"]["recall"]
        elif cfg.base:
            checkpoint.load_weights(model, checkpoint.load(cfg.base)["model"], cfg.base)
        run.begin(saved, lambda row: row["step"] <= step)
        if dist.is_main:
            text.tok.save(run.folder)
        windows, eot = Windows(text.train, T, cfg.seed), text.tok.eot
        sentences = world.sentences(list(itertools.product(pool, range(len(WORDINGS)))))
        asked = [p for fact in pool for p in world.probes(fact) if p.kind in ("mem", "para", "qa")]
        prepared = probing.batches(asked, eot, dist.device)
        with StepBar(step, cfg.base_steps, dist.is_main) as bar:
            while step < cfg.base_steps and recall < cfg.gate:
                began = time.perf_counter()
                x, y = background(windows, step, cfg)  # (B, T) each
                x[:cfg.pool_rows], y[:cfg.pool_rows] = pool_batch(sentences, cfg.pool_rows, step, cfg, eot)
                set_learning_rates(optimizer, cfg, step, cfg.base_steps)
                loss = backward(net, split_batch(x, y, cfg, dist), dist, dtype, scaler)
                update(model, optimizer, scaler, cfg.grad_clip, loss)
                step += 1
                if step % 50 == 0 or step == cfg.base_steps:
                    hits = probing.score(model, prepared, world.answer_ids).hit
                    recall = min(float(hits[[p.kind == kind for p in asked]].mean()) for kind in ("mem", "para", "qa"))
                    run.metrics(step=step, train_loss=loss.item(), recall=recall)
                run.seconds += time.perf_counter() - began
                bar.tick(time.perf_counter() - began)
                bar.show(f"base: loss {loss.item():.3f}, recall of the pool {recall:.2f} of {cfg.gate:.2f}")
                stopping = stop.agreed(dist)
                if stopping or run.save_is_due(cfg.save_minutes):
                    run.save("last.pt", model, optimizer, scaler, step=step, recall=recall)
                if stopping:
                    return None
        run.save("last.pt", model, optimizer, scaler, step=step, recall=recall)
        if recall < cfg.gate:
            raise UserError(f"the base in {run.folder} answers {recall:.0%} of its pool after {step:,} steps, not "
                            f"{cfg.gate:.0%}: this endpoint does not work, and no verdict would mean anything\n"
                            "try a larger --pool_share, a smaller --pool or --level, a higher --base_lr, or more "
                            "--base_steps")
        if dist.is_main:
            say(f"base {run.folder}: {model.count_parameters()['total']:,} parameters, answers {recall:.1%} of "
                f"{len(pool)} pool facts in every wording after {step:,} steps")
        run.finish("finished", {"steps": step}, {"recall": recall}, dtype)
        return checkpoint.load(run.path("last.pt"))


def load_base(cfg, base: dict, dist: Dist, carry: bool):
    """(model, optimizer) of a base's checkpoint, for a probe's config. `carry`: with the optimiser state of the
    base, but the probe's rates."""
    names = {f.name for f in fields(ModelConfig)}
    model = LM(ModelConfig(**{k: v for k, v in base["config"].items() if k in names})).to(dist.device)
    checkpoint.load_weights(model, base["model"], "the base")
    optimizer = make_optimizer(model, replace(cfg, beta2=cfg.probe_beta2))
    if carry:
        own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        optimizer.load_state_dict(copy.deepcopy(base["optimizer"]))
        for group, settings in zip(optimizer.param_groups, own, strict=True):
            group.update(settings)
    return model, optimizer


def carries(cfg) -> bool:
    """Whether the probe goes on with the optimiser state of the base."""
    return cfg.state == "carry" and cfg.optimizer == cfg.base_optimizer and not (cfg.base and not cfg.pool)


def finished_parts(cfg, run: Run) -> dict[tuple, dict]:
    """{part: row} of probes.jsonl, for experiments whose parts are atomic: each adds its row when it ends.
    UserError if the folder's run had another configuration."""
    path, log = run.path("config.json"), run.path("probes.jsonl")
    if run.dist.is_main:
        for old in (path, log) if cfg.overwrite else ():
            if os.path.exists(old):
                os.remove(old)
        if os.path.exists(path):
            with open(path) as f:
                if differences := cfg.differences(json.load(f)):
                    raise UserError(f"{run.folder} holds a run with another configuration:\n  "
                                    + "\n  ".join(differences) + "\nkeep it and use --name=OTHER, or delete it with "
                                    "--overwrite")
        else:
            write_json(path, asdict(cfg))
    return {tuple(row["part"]): row for row in read_rows(log)}
