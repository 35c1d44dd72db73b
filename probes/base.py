"""Bases for memory experiments: small models trained until they answer a pool of facts in every wording.

    base = make_base(cfg, text, world, pool, dist, stop)    # a checkpoint, cached in out_dir/base_HASH

A model that has not learned what facts look like learns that first, and a probe would measure it (the
plateau of Zucchet 2025, 2503.21676). So training ends at the gate, not after a number of steps: when the
base answers a share `gate` of its pool in the trained, the held-out and the question wording (and with
context_share as many questions about facts that only its context states). The pool's rows are packed full of
sentences; with one sentence a row the plateau lasts for thousands of steps.
"""
import contextlib
import itertools
import os
import time
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Literal

from common import checkpoint, lora, probing, source
from common.config import ConfigError, UserError, option_types, parse
from common.console import StepBar, say
from common.data import Text, Windows
from common.distributed import Dist, choose_dtype
from common.facts import LEVELS, QUESTIONS, STATEMENTS, WORDINGS, Fact, Probe, World, make_facts, names, pack
from common.run import Run, RunConfig, digest
from common.step import NotFinite, backward, choose_compile, update, wrap
from model import LM, ModelConfig
from muon import OPTIMIZERS, OptimizerConfig, make_optimizer, set_learning_rates

import numpy as np
import torch

# ------------------------------------------------------------------------------------------------------------
# Config

CPU = torch.device("cpu")
MOST = 100_000  # facts, steps of an injection, seeds: beyond any use
CONTEXT_FACTS = 3  # at most, stated in a row before they are asked: to tell them apart, names must be read
NAMES, GATE_NAMES = 2048, 384  # subjects of context rows and, never in a row, of their gate
FORWARD = len(STATEMENTS) + len(QUESTIONS)  # wordings whose target is the answer


@dataclass
class BaseConfig(RunConfig, OptimizerConfig, ModelConfig):
    MAY_CHANGE = {"save_minutes", "micro_batch_size"}
    # base: what knows the form of facts before any is written
    data: str = "data/shakespeare"  # folder made by prepare_data.py: the text in the background
    base: str = ""  # start from this checkpoint or run folder, whose architecture it has; "" = random weights
    pool: int = 256  # facts it learns in every wording; 0 = none: the base is used as it is
    pool_share: float = 0.25  # of its rows that hold them, packed full
    gate: float = 0.95  # share of the pool it must answer, in every wording
    context_share: float = 0.0  # of its rows that state unknown facts and ask for them: reading
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
        out += [f"{key} must be between 0 and 1, got {getattr(self, key)}" for key in ("pool_share", "gate",
                "context_share") if not 0 <= getattr(self, key) <= 1]
        if self.pool_share + self.context_share > 1:
            out.append(f"pool_share={self.pool_share} and context_share={self.context_share} are more than "
                       "a batch")
        out += [f"{key}={getattr(self, key):,} is more than the {MOST:,} that names and memory last for"
                for key in ("pool", "batch_size") if getattr(self, key) > MOST]
        if not self.pool and not self.base:
            out.append("pool=0 needs a base that knows something: --base=CHECKPOINT")
        if self.answers == 1:
            out.append("answers=1 leaves nothing to remember; use 2 or more")
        return out

    @property
    def pool_rows(self) -> int:
        return round(self.pool_share * self.batch_size) if self.pool else 0

    @property
    def context_rows(self) -> int:
        return round(self.context_share * self.batch_size)


FIRST = "as it is"  # the arm that changes nothing


@dataclass
class ProbeOptions(BaseConfig):
    """What every experiment on a base has: seeds, arms, an optimiser of its own."""
    MAY_CHANGE = {"seeds", "seed", "arm", "bound"}
    # arms and seeds
    seeds: int = 4  # seed, seed + 1, ...: other facts, other background
    arm: tuple[str, ...] = ()  # options changed in another arm, as "optimizer=sgd lr=0.3"; repeat for more
    bound: float = 0.1  # nats below which an effect counts as none
    # probe's optimiser (the base has its own)
    state: Literal["carry", "fresh"] = "carry"  # carry the base's state where the optimiser is the same
    lora_rank: int = 0  # the probe trains low-rank changes (LoRA) of the trunk's matrices alone; 0 = all
    lora_alpha: float = 16.0  # LoRA's changes are scaled by lora_alpha / lora_rank
    beta2_tokens: int = 0  # tokens in which Adam's second moment halves; 0 = as beta2 says
    base_optimizer: Literal[tuple(OPTIMIZERS)] = "adamw"  # adamw | muon | sgd
    base_lr: float = 2e-3  # peak learning rate of the base
    base_batch_size: int = 0  # rows per step of the base; 0 = as batch_size
    base_seed: int = 1  # of the base's weights, pool and answers

    def problems(self) -> list[str]:
        out = super().problems() + self.at_least(1, "seeds") + self.at_most_counts(("seeds",))
        out += self.at_least(0, "beta2_tokens", "base_lr", "base_seed", "base_batch_size", "lora_rank")
        out += lora.option_problems(self) + lora.model_problems(self)
        if not self.bound > 0:
            out.append(f"bound must be above 0, got {self.bound}")
        if len({"", *self.arm}) <= len(self.arm):
            out.append(f"two arms are the same: {', '.join(self.arm)}")
        return out

    def at_most_counts(self, names) -> list[str]:
        return [f"{key}={getattr(self, key):,} is more than {MOST:,}, the most there can be" for key in names
                if getattr(self, key) > MOST]

    def arm_problems(self) -> list[str]:
        """Of the arms, whose other options are right."""
        out = []
        for text in self.arm:
            try:
                c = changed(replace(self, arm=()), text)
            except ConfigError as e:
                out += [f"arm '{text}': {p}" for p in e.problems]
                continue
            out += [f"arm '{text}': {key} has no effect, because base={c.base} has its own; leave it out"
                    for key in given_by_base(c) if getattr(c, key) != getattr(self, key)]
        return out

    @property
    def probe_beta2(self) -> float:
        """Adam's decay per step, whose half-life is `beta2_tokens` where that is set (2507.07101)."""
        tokens = self.batch_size * self.max_seq_len
        return 0.5 ** (tokens / self.beta2_tokens) if self.beta2_tokens else self.beta2


def changed(cfg, text: str):
    """`cfg` with the options of an arm, such as "optimizer=sgd lr=0.3"; lists as "parts=0 parts=1"."""
    kinds, values, problems = option_types(type(cfg)), {}, []
    for word in text.split():
        key, _, value = word.removeprefix("--").partition("=")
        if key not in kinds or key in ("arm", "name", "seed", "seeds", "out_dir", "data"):
            problems.append(f"'{key}' is not an option of an arm")
            continue
        try:
            new = parse(value or "true", kinds[key], key)
            values[key] = values[key] + new if key in values and isinstance(new, tuple) else new
        except ValueError as e:
            problems.append(str(e))
    if problems:
        raise ConfigError(problems)
    return replace(cfg, **values, arm=())  # arms need not fit each other


# ------------------------------------------------------------------------------------------------------------
# Training


class BelowGate(UserError):
    """The base did not reach its gate."""


def architecture(cfg: BaseConfig, meta: dict) -> BaseConfig:
    """With the vocabulary of the data, or everything about the model from the checkpoint in `base`."""
    if not cfg.base:
        n = meta["tokenizer"]["vocab_size"]
        return replace(cfg, vocab_size=cfg.vocab_size or n, n_tokens=n)
    saved = checkpoint.load(cfg.base, keys=("model", "config", "tokenizer"))
    checkpoint.check_tokenizer(saved["tokenizer"], cfg.base, meta["tokenizer"], cfg.data)
    has = source.architecture(saved["config"], ModelConfig)
    if has["pos"] != "learned":
        del has["max_seq_len"]  # nothing limits it
    if not cfg.pool and hasattr(cfg, "base_optimizer"):  # the checkpoint is the base
        has["base_optimizer"] = saved["config"].get("optimizer", cfg.base_optimizer)
    return replace(cfg, **has)


def given_by_base(cfg) -> list[str]:
    """The options that architecture() takes from `base`, whatever they are set to."""
    if not cfg.base:
        return []
    shape = [f.name for f in fields(ModelConfig) if f.name != "max_seq_len"]
    return shape if cfg.pool else [*shape, "base_optimizer"]


def base_config(cfg) -> BaseConfig:
    """The base that a probe's config asks for (with its base_optimizer, base_lr and base_seed), named by a
    hash of everything it depends on."""
    values = {f.name: getattr(cfg, f.name) for f in fields(BaseConfig)}
    values |= {f.name: f.default for f in fields(OptimizerConfig)}  # the probe's optimiser is not the base's
    values |= {"optimizer": cfg.base_optimizer, "lr": cfg.base_lr, "schedule": "constant", "warmup_steps": 50,
               "seed": cfg.base_seed, "batch_size": cfg.base_batch_size or cfg.batch_size, "question": "",
               "overwrite": False, "dry_run": False}
    free = ("name", "out_dir", "device", "dtype", "compile", "save_minutes", "micro_batch_size")
    name = digest({k: v for k, v in values.items() if k not in free and (v or k != "context_share")})
    return BaseConfig(**values | {"name": f"base_{name}"})


def pool_batch(sentences: list[list[int]], n_rows: int, step: int, cfg: BaseConfig, eot: int):
    """Rows (n_rows, T) packed with the pool's sentences in an endless seeded order, a function of step."""
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


def context_names(world: World, pool: list[Fact], seed: int) -> tuple[list[str], list[str]]:
    """(subjects of context rows, subjects of the gate's contexts)."""
    known, n = {f.subject for f in pool}, NAMES + GATE_NAMES
    found = list(itertools.islice((s for s in names(world, seed, "context") if s not in known), n))
    if len(found) < n:
        raise UserError(f"the tokenizer {world.tok.name} has names for {len(found)} facts, and a base that "
                        f"reads from its context needs {n}; use one with more words")
    return found[:NAMES], found[NAMES:]


def passing_facts(world: World, people: list[str], count: int, rng) -> list[Fact]:
    """Facts that hold in one row alone."""
    k, A = world.answer_tokens, len(world.answers)
    drawn = rng.choice(A, (count, k), replace=count * k > A)
    return [Fact("", "context", 0, world.relations[rng.integers(len(world.relations))], people[i],
                 "".join(world.answers[j] for j in js), ())
            for i, js in zip(rng.choice(len(people), count, replace=False), drawn, strict=True)]


def context_batch(world: World, people: list[str], n_rows: int, step: int, cfg: BaseConfig):
    """Rows (n_rows, T) that state one to CONTEXT_FACTS facts and ask for them in other wordings until they
    are full. Every row draws its own facts, so that answers can only be read. A function of the step."""
    x, y = (np.full((n_rows, cfg.max_seq_len), fill) for fill in (world.tok.eot, -1))
    for row in range(n_rows):
        rng = np.random.default_rng((cfg.seed, 13, step, row))
        facts = passing_facts(world, people, int(rng.integers(1, CONTEXT_FACTS + 1)), rng)
        said = [(f, int(rng.integers(len(STATEMENTS)))) for f in facts]
        while len(said) < cfg.max_seq_len // 6:
            said += [(facts[i], int(rng.integers(FORWARD))) for i in rng.permutation(len(facts))]
        packed = pack(world.sentences(said), cfg.max_seq_len, world.tok.eot)
        x[row], y[row] = packed[0][0], packed[1][0]
    return x, y


def context_probes(world: World, people: list[str]) -> list[Probe]:
    """Of kind `context`: one of CONTEXT_FACTS stated facts, asked in another wording."""
    out, rng = [], np.random.default_rng((world.seed, 14))
    for i in range(0, len(people) - CONTEXT_FACTS + 1, CONTEXT_FACTS):
        facts = passing_facts(world, people[i:i + CONTEXT_FACTS], CONTEXT_FACTS, rng)
        said = rng.choice(len(STATEMENTS), CONTEXT_FACTS, replace=False).tolist()
        context = sum(world.sentences(list(zip(facts, said, strict=True))), [])
        wording = int(rng.choice([w for w in range(FORWARD) if w not in said]))
        fact = facts[rng.integers(CONTEXT_FACTS)]
        out.append(world.ask(fact, "context", *world.prompt(fact, wording), context))
    return out


def background(windows: Windows, step: int, cfg: BaseConfig):
    """The batch of a step as arrays (B, T) to write into: windows.batch gives two views of one array."""
    return [z.numpy().copy() for z in windows.batch(step * cfg.batch_size, cfg.batch_size, CPU)]


def net_of(model: LM, cfg: BaseConfig, steps: int, dist: Dist):
    """The model for backward(), compiled if that is asked or pays off in so many steps."""
    flops = model.flops_per_token(cfg.max_seq_len) * steps * cfg.batch_size * cfg.max_seq_len
    return wrap(model, choose_compile(cfg.compile, flops, dist.device)[0], dist)


@torch.no_grad()
def rescale(factors: dict, old: list) -> None:
    """Multiply by its factor what a step changed of each parameter; `old`: the parameters before it."""
    for (p, factor), was in zip(factors.items(), old, strict=True):
        p.copy_(was + factor * (p - was))


def split_batch(x, y, cfg: BaseConfig, dist: Dist) -> list:
    """This process's rows as micro-batches on its device."""
    mine = [torch.as_tensor(z)[dist.rank::dist.world].to(dist.device) for z in (x, y)]
    return list(zip(*(z.split(cfg.micro_batch_size or len(z)) for z in mine), strict=True))


def gate_probes(cfg: BaseConfig, world: World, pool: list[Fact]) -> list[Probe]:
    """What a base must answer, each kind in a share `gate`: its pool, and with context_share its contexts."""
    asked = [p for fact in pool for p in world.probes(fact) if p.kind in ("mem", "para", "qa")]
    return asked + (context_probes(world, context_names(world, pool, cfg.seed)[1]) if cfg.context_rows
                    else [])


@dataclass
class Standing:
    """Where the training of a base stands."""
    step: int = 0
    recall: float = 0.0  # the smallest of `recalls`
    recalls: dict = field(default_factory=dict)  # share answered, by kind of probe


def train_base(cfg: BaseConfig, text: Text, world: World, pool: list[Fact], model: LM, optimizer, scaler,
               run: Run,
               at: Standing, stop) -> bool:
    """Train to the gate, or base_steps; False if asked to stop. Ends with a save."""
    dist, dtype = run.dist, choose_dtype(cfg.dtype, run.dist.device)[0]
    net, windows = net_of(model, cfg, cfg.base_steps, dist), Windows(text.train, cfg.max_seq_len, cfg.seed)
    sentences, asked = world.sentences(list(itertools.product(pool, range(len(WORDINGS))))), \
        gate_probes(cfg, world, pool)
    kinds, prepared = np.array([p.kind for p in asked]), probing.batches(asked, text.tok.eot, dist.device)
    people = context_names(world, pool, cfg.seed)[0] if cfg.context_rows else []
    stopping = False
    with StepBar(at.step, cfg.base_steps, dist.is_main) as bar:
        while at.step < cfg.base_steps and at.recall < cfg.gate and not stopping:
            began = time.perf_counter()
            x, y = background(windows, at.step, cfg)  # (B, T) each
            x[:cfg.pool_rows], y[:cfg.pool_rows] = pool_batch(sentences, cfg.pool_rows, at.step, cfg,
                                                              text.tok.eot)
            if n := cfg.context_rows:
                x[-n:], y[-n:] = context_batch(world, people, n, at.step, cfg)
            set_learning_rates(optimizer, cfg, at.step, cfg.base_steps)
            loss = backward(net, split_batch(x, y, cfg, dist), dist, dtype, scaler)
            update(model, optimizer, scaler, cfg.grad_clip, loss)
            at.step += 1
            if at.step % 50 == 0 or at.step == cfg.base_steps:
                hits = probing.score(model, prepared, world.answer_ids).hit
                at.recalls = {kind: float(hits[kinds == kind].mean())
                              for kind in dict.fromkeys(kinds.tolist())}
                at.recall = min(at.recalls.values())
                run.metrics(step=at.step, train_loss=loss.item(), recall=at.recall, **at.recalls)
            run.seconds += time.perf_counter() - began
            bar.tick(time.perf_counter() - began)
            bar.show(f"base: loss {loss.item():.3f}, recall of the pool {at.recall:.2f} of {cfg.gate:.2f}")
            stopping = stop.agreed(dist)
            if not stopping and run.save_is_due(cfg.save_minutes):
                run.save("last.pt", model, optimizer, scaler, **asdict(at))
    run.save("last.pt", model, optimizer, scaler, **asdict(at))
    dist.min(0.0)  # the others read what the main process saved
    return not stopping


def make_base(cfg: BaseConfig, text: Text, world: World, pool: list[Fact], dist: Dist, stop) -> dict | None:
    """The checkpoint of a base that knows the pool, trained here unless cached. None if asked to stop."""
    if not pool:
        return checkpoint.load(cfg.base, keys=("model", "config"))
    sha256, path = text.meta["splits"]["train"]["sha256"], os.path.join(cfg.out_dir, cfg.name, "last.pt")
    if os.path.exists(path):  # without the lock: several scripts may read one base
        saved = checkpoint.load(path, keys=("model", "config", "optimizer", "progress", "data_sha256"))
        if saved["progress"]["recall"] >= cfg.gate and saved["data_sha256"] == sha256:
            return saved
    with Run(cfg, dist, "memory_probe", text.meta["tokenizer"], sha256) as run:
        saved, at, dtype = run.find(), Standing(), choose_dtype(cfg.dtype, dist.device)[0]
        torch.manual_seed(cfg.seed)
        model = LM(cfg).to(dist.device)
        optimizer = make_optimizer(model, cfg)
        scaler = torch.amp.GradScaler(dist.device.type, enabled=dtype == "fp16")
        if saved:
            run.restore(saved, model, optimizer, scaler)
            at = Standing(**{f.name: saved["progress"][f.name] for f in fields(Standing)
                             if f.name in saved["progress"]})
        elif cfg.base:
            checkpoint.load_weights(model, checkpoint.load(cfg.base)["model"], cfg.base)
        run.begin(saved, lambda row: row["step"] <= at.step)
        if dist.is_main:
            text.tok.save(run.folder)
        if not train_base(cfg, text, world, pool, model, optimizer, scaler, run, at, stop):
            return None
        if at.recall < cfg.gate:
            found = ", ".join(f"{kind} {value:.2f}" for kind, value in at.recalls.items())
            share = "--context_share or --pool_share" if cfg.context_rows else "--pool_share"
            raise BelowGate(f"after {at.step:,} steps the base in {run.folder} answers {at.recall:.0%} in "
                            f"one of its wordings, not {cfg.gate:.0%} ({found}): this endpoint does not "
                            f"work, and no verdict would mean anything\ntry a larger {share}, a smaller "
                            "--pool or --level, a higher --base_lr, or more --base_steps")
        if dist.is_main:
            say(f"base {run.folder}: {model.count_parameters()['total']:,} parameters, answers "
                f"{at.recall:.1%} of {len(pool)} pool facts in every wording after {at.step:,} steps")
        run.finish("finished", {"steps": at.step}, {"recall": at.recall}, dtype)
        return checkpoint.load(run.path("last.pt"))


def pool_of(cfg: BaseConfig, world: World) -> list[Fact]:
    return make_facts(world, "pool", cfg.pool, world.seed) if cfg.pool else []


def worlds_of(arms: list, text: Text) -> list[World]:
    """Of each arm; most share one."""
    made = {}
    return [made.setdefault(key, made.get(key) or World(text.tok, *key))
            for key in ((c.level, c.base_seed, c.answers) for c in arms)]


def bases_of(arms: list, needed: list[int], text: Text, worlds: list[World], run: Run, stop) -> dict | None:
    """{arm: its base} of the arms in `needed`; None if asked to stop."""
    bases = {}
    for a in dict.fromkeys(needed):
        pool = pool_of(arms[a], worlds[a])
        bases[a] = make_base(base_config(arms[a]), text, worlds[a], pool, run.dist, stop)
        if bases[a] is None:
            return None
    return bases


def load_base(cfg, base: dict, dist: Dist, carry: bool):
    """(model, optimizer) of a base's checkpoint, for a probe's config. `carry`: with the optimiser state of
    the base, but the probe's rates."""
    model = LM(ModelConfig(**source.architecture(base["config"], ModelConfig))).to(dist.device)
    checkpoint.load_weights(model, base["model"], "the base")
    if cfg.lora_rank:
        torch.manual_seed(cfg.seed)
        lora.wrap(model, cfg.lora_rank, cfg.lora_alpha)
    optimizer = make_optimizer(model, replace(cfg, beta2=cfg.probe_beta2))
    if carry and "optimizer" not in base:
        say("the base has no optimiser state (it was imported): moments start at zero")
    elif carry:
        source.load_moments(optimizer, base["optimizer"])
    return model, optimizer


def carries(cfg) -> bool:
    """Whether the probe goes on with the optimiser state of the base. LoRA's matrices have none there."""
    return cfg.state == "carry" and cfg.optimizer == cfg.base_optimizer and not cfg.lora_rank


@contextlib.contextmanager
def named(what: str):
    """Say whose loss was not finite."""
    try:
        yield
    except NotFinite as e:
        raise UserError(f"{what}: {e}; use a lower --lr") from None
