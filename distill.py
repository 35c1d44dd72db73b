"""Distillation: a small student learns what a large teacher would say, not only what the text says.

    python distill.py config/exp10_small.py                               # teacher: out/demo; minutes
    python distill.py config/exp9.py --dry_run                            # two models: will they fit?
    python distill.py --teacher=out/a --teacher=out/b --d_model=64        # several teachers, averaged
    python distill.py --teacher=out/demo --student_layers=0,3             # start from two of its layers
    python distill.py --teacher=out/demo --alpha=0.5 --temperature=2      # half soft loss, half hard
    python distill.py --teacher=out/qwen --cache=out/qwen_said            # the teacher is run once, then gone
    python distill.py --teacher=out/demo --on_policy=0.5                  # on what the student writes itself
    python distill.py --teacher=out/demo --without_teacher=tokens         # the control: the text alone
    torchrun --standalone --nproc_per_node=2 distill.py config/exp10.py

The loss is alpha * T^2 * D(teacher, student), both at temperature T, plus (1 - alpha) * cross-entropy with
the text, each a mean over the tokens that count; both are logged apart. The full logits of neither model are
ever held. The student has the teacher's tokenizer and any architecture of model.py.

out/NAME/ gets last.pt, best.pt, metrics.jsonl, distill.png and report.md, which compares student and teacher;
the same command resumes, to the bit.
"""
import contextlib
import functools
import math
import time
from dataclasses import asdict, dataclass, field, fields, replace
from typing import ClassVar, Literal, NamedTuple

from common import cache_writer, checkpoint, distributed, fit, matching, student, teacher_cache
from common.collapse import compare
from common.config import UserError, launch
from common.console import StepBar, resume_command, say
from common.data import Text, open_text
from common.distill_loss import DIVERGENCES, Mix, cached_loss, two_headed_loss
from common.distill_report import draw, final_report, ngram_losses
from common.evaluate import evaluate, measures_text
from common.examples import KINDS, Examples
from common.files import read_rows, write_text
from common.plan import Plan, PlanConfig, choose_micro_batch, make_plan
from common.run import Run, RunConfig, way_back
from common.samples import continue_prompts, write_samples
from common.source import architecture, inherit
from common.step import NotFinite, backward, check_gradients, choose_compile, update, wrap
from common.stop import StopRequest
from model import LM, ModelConfig, load_model
from muon import OptimizerConfig, describe_groups, make_optimizer, parameter_groups, set_learning_rates

import torch
import torch.nn as nn

COMPARED = 2**14  # validation tokens on which the teacher is asked too at each evaluation; at the end, on all

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class DistillConfig(PlanConfig, RunConfig, OptimizerConfig, ModelConfig):
    MAY_CHANGE = {"data", "top_tokens"}
    tbptt: ClassVar[int] = 0  # for common/fit.py
    name: str = "distill"  # the run's folder in out_dir; by default the config file's name
    # data
    data: str = "data/shakespeare"  # folder made by prepare_data.py with the teacher's tokenizer
    train_tokens: int = 0  # use only the first N training tokens; 0 = all
    examples: Literal[KINDS] = "windows"  # windows of the text | lines | documents: what a row holds
    min_tokens: int = 0  # leave out shorter lines or documents (and always those longer than max_seq_len)
    max_examples: int = 0  # use only the first N; 0 = all
    count_padding: bool = False  # count padding as targets: a common mistake, to see what it does
    # teacher
    teacher: tuple[str, ...] = ("out/demo",)  # run folders or checkpoints; several: probabilities averaged
    cache: str = ""  # folder for the teacher's predictions, written once; "" = run it at each step
    cache_kind: str = "sampled:32"  # sampled:N | topk:N | topk_tail:N: what is kept of each prediction
    without_teacher: Literal["no", "tokens", "compute", "cached"] = "no"  # control: CE alone at equal ...
    # student, where it does not start at random
    init_from: str = ""  # checkpoint to take weights and architecture from
    student_layers: tuple[int, ...] = ()  # start from these layers of the teacher, 0 = its first
    student_width: Literal["slice", "svd"] = "slice"  # if narrower: main channels | main directions
    # loss
    divergence: Literal[DIVERGENCES] = "forward_kl"  # forward_kl | reverse_kl | jsd | skew_kl | tv
    alpha: float = 0.5  # weight of the soft loss; the rest is cross-entropy with the text
    temperature: float = 1.0  # T of the soft loss, which is scaled by T^2
    beta: float = 0.5  # jsd: weight of the teacher's side
    skew: float = 0.1  # skew_kl: share of the teacher in the mixture
    match_hidden: float = 0.0  # weight of the gap between similarities of hidden states
    match_attention: float = 0.0  # weight of the gap between attention distributions
    on_policy: float = 0.0  # share of steps on continuations by the student; only the soft loss counts there
    teacher_text: float = 0.0  # share of steps on continuations by the teacher, with cross-entropy alone
    prompt_tokens: int = 0  # tokens of text that they continue; 0 = half of max_seq_len
    sample_temperature: float = 1.0  # of those continuations
    # other defaults than train.py, and the report
    batch_size: int = 16  # sequences per optimiser step, over all processes
    prompts: tuple[str, ...] = ("The king",)  # continued at each evaluation and in the report
    top_tokens: int = 5  # rows of the report's table of next tokens

    def problems(self) -> list[str]:
        out = super().problems() + self.at_least(1, "top_tokens")
        out += self.at_least(0, "train_tokens", "min_tokens", "max_examples", "match_hidden",
                             "match_attention", "prompt_tokens", "sample_temperature", "student_layers")
        out += [f"{key} must be between 0 and 1, got {getattr(self, key)}"
                for key in ("alpha", "on_policy", "teacher_text") if not 0 <= getattr(self, key) <= 1]
        out += [f"{key} must be above 0 and below 1, got {getattr(self, key)}"
                for key in ("beta", "skew") if not 0 < getattr(self, key) < 1]
        if not self.temperature > 0:
            out.append(f"temperature must be above 0, got {self.temperature}")
        return out + self.teacher_problems() + self.sampling_problems()

    def teacher_problems(self) -> list[str]:
        out = [] if self.teacher else ["there is no teacher: set teacher=FOLDER"]
        if self.init_from and self.student_layers:
            out.append("the student starts from init_from or from student_layers; use one of the two")
        if self.student_layers and len(self.teacher) > 1:
            out.append(f"student_layers starts from one teacher, got {len(self.teacher)}")
        if not self.student_layers and self.student_width != "slice":
            out.append(f"student_width={self.student_width} has no effect without student_layers")
        if (self.match_hidden or self.match_attention) and len(self.teacher) > 1:
            out.append(f"match_hidden and match_attention take one teacher, got {len(self.teacher)}")
        if (self.match_hidden or self.match_attention) and self.compile == "true":
            out.append("match_hidden and match_attention watch layers of a model that is not compiled; leave "
                       "out compile")
        if self.match_hidden and self.gated:
            out.append(f"match_hidden: mixer={self.mixer} has no blocks whose output could be matched")
        if self.match_attention and self.mixer != "attention":
            out.append(f"match_attention: mixer={self.mixer} has no attention")
        if self.count_padding and (self.cache or self.examples == "windows"):
            out.append("count_padding needs padding, and the teacher at each step: examples=lines or "
                       "documents, and no cache")
        if self.cache:
            out += teacher_cache.cache_problems(self.cache_kind, self.temperature, self.divergence)
            running = [k for k in ("match_hidden", "match_attention", "on_policy", "teacher_text")
                       if getattr(self, k)]
            if running:
                out.append(f"{', '.join(running)}: this needs the teacher at each step; leave out cache")
        return out

    def sampling_problems(self) -> list[str]:
        out, P = [], self.prompt_tokens
        if not (self.on_policy or self.teacher_text):
            return [f"{k} has no effect without on_policy or teacher_text"
                    for k, default in (("prompt_tokens", 0), ("sample_temperature", 1.0))
                    if getattr(self, k) != default]
        if self.on_policy + self.teacher_text > 1:
            out.append(f"on_policy={self.on_policy} and teacher_text={self.teacher_text} are shares of "
                       "steps: together at most 1")
        if self.examples != "windows":
            out.append(f"on_policy and teacher_text continue windows of text; use examples=windows, not "
                       f"{self.examples}")
        if P and not P < self.max_seq_len:
            out.append(f"prompt_tokens={P} leaves nothing to write: it must be below "
                       f"max_seq_len={self.max_seq_len}")
        return out

    @property
    def control(self) -> bool:
        return self.without_teacher != "no"

    @property
    def uses_teacher(self) -> bool:
        """Whether training reads what the teacher says."""
        return not self.control and bool(self.alpha or self.on_policy or self.teacher_text
                                         or self.match_hidden or self.match_attention)

    def resolved(self, meta: dict) -> "DistillConfig":
        """With the architecture it takes from init_from or the teacher, and their vocabulary."""
        theirs = [checkpoint.load(path, ("model", "config", "tokenizer"), mmap=True, int8=True)
                  for path in self.teacher]
        for path, saved in zip(self.teacher, theirs, strict=True):
            checkpoint.check_tokenizer(saved["tokenizer"], path, meta["tokenizer"], self.data)
        rows = min(saved["config"]["vocab_size"] for saved in theirs)
        n_tokens = meta["tokenizer"]["vocab_size"]
        if self.init_from:
            return inherit(self, ModelConfig, meta)
        cfg = self
        if self.student_layers:
            if self.sets("n_layers") and self.n_layers != len(self.student_layers):
                raise UserError(f"n_layers={self.n_layers}, but student_layers names "
                                f"{len(self.student_layers)}")
            taken = {k: v for k, v in architecture(theirs[0]["config"], ModelConfig).items()
                     if not self.sets(k) and k != "dropout"}
            cfg = replace(self, **taken | {"n_layers": len(self.student_layers)})
        if 0 < cfg.vocab_size < n_tokens:
            raise UserError(f"vocab_size={cfg.vocab_size}, but the tokenizer of {cfg.data} has "
                            f"{n_tokens} ids")
        return replace(cfg, vocab_size=self.vocab_size or rows, n_tokens=n_tokens)

    def data_sha256(self, meta: dict) -> str:
        """Of the training tokens, and of the teachers' files."""
        return "+".join([meta["splits"]["train"]["sha256"], *map(checkpoint.file_sha256, self.teacher)])


# ------------------------------------------------------------------------------------------------------------
# Models


class Teaching(NamedTuple):
    """Where soft labels come from."""
    models: list[LM]  # teachers in memory; [] if a cache stands for them, or training reads none
    cache: teacher_cache.TeacherCache | None
    vocab: int  # ids that all models have


class Distiller(nn.Module):
    """The student with its loss, in one call, as DDP needs it. The teachers are not its parameters."""

    def __init__(self, model: LM, teaching: Teaching, cfg: DistillConfig, compiled: bool):
        super().__init__()
        self.model, self.cfg, self.teaching, teachers = model, cfg, teaching, teaching.models
        matched = teachers and (cfg.match_hidden or cfg.match_attention)
        self.pairs = matching.layer_pairs(cfg.n_layers, teachers[0].cfg.n_layers) if matched else []
        self.read = [torch.compile(t.hidden) if compiled else t.hidden for t in teachers]

    def forward(self, x, y, *cached, mix: Mix):
        """x (B, T), y (B, T) and what the cache holds for them -> [loss, soft, hard] (3,), for which see
        common/distill_loss.py. The loss also has what the options add to it."""
        balances, teachers, vocab, cfg = [], self.teaching.models, self.teaching.vocab, self.cfg
        with self.watching(self.model, 0) as ours:
            hidden = self.model.hidden(x, balances=balances).flatten(0, 1)  # (B T, C)
        head = self.model.head
        bias = None if head.bias is None else head.bias[:vocab]
        rows = hidden, head.weight[:vocab], bias, y.flatten()
        if cached:
            ids, probs, entropy, *tail = (part.flatten(0, 1) for part in cached)
            losses = cached_loss(*rows, (ids, probs, tail[0] if tail else None, entropy), mix)
        else:
            with torch.no_grad(), self.watching(teachers[0] if teachers else None, 1) as theirs:
                said = [(read(x).flatten(0, 1), t.head.weight, t.head.bias)
                        for read, t in zip(self.read, teachers, strict=True)]
            losses = two_headed_loss(*rows, said, mix)
        extra = self.model.balance_loss(balances, y)
        if self.pairs:
            extra = extra + matching.gaps(ours, theirs, self.pairs, y >= 0, cfg.match_hidden,
                                          cfg.match_attention)
        return torch.cat((losses[:1] + extra, losses[1:]))

    def watching(self, model: LM | None, side: int):
        """Records the layers of `model` that are matched: of the student (side 0) or the teacher (1)."""
        if not self.pairs:
            return contextlib.nullcontext()
        return matching.watching(model, [pair[side] for pair in self.pairs], self.cfg.match_attention > 0)


def losses_of(net, x, y, *cached, state=None, mix: Mix):
    return net(x, y, *cached, mix=mix), None


def make_student(cfg: DistillConfig, source: dict | None = None, teacher: LM | None = None) -> LM:
    """The student at random, with the weights of init_from = `source`, or from layers of `teacher`."""
    model = LM(cfg)
    if source:
        checkpoint.load_weights(model, source["model"], cfg.init_from)
    if teacher:
        student.from_teacher(model, teacher, cfg.student_layers, cfg.student_width)
    return model


def load_teachers(cfg: DistillConfig, dtype: str, device) -> list[LM]:
    """In eval mode, without gradients; with weights in the precision of the matmuls."""
    models = [load_model(path, device, dtype)[0] for path in cfg.teacher]
    return [model.requires_grad_(False) for model in models]


# ------------------------------------------------------------------------------------------------------------
# Plan: what the run will be, in numbers


def plan_run(cfg: DistillConfig, dist, examples: Examples, needs, teachers: list, room: float,
             began=0) -> Plan:
    """`teachers`: models without memory, for counting."""
    dtype, why = distributed.choose_dtype(cfg.dtype, dist.device)
    micro, note = choose_micro_batch(cfg, needs, dist, room, began)
    plan = make_plan(cfg, dist.world, examples.per_epoch, micro)
    own = needs.model.flops_per_token(cfg.max_seq_len)  # forward and backward
    read = sum(t.flops_per_token(cfg.max_seq_len) for t in teachers) / 3  # forward alone
    plan.steps, flops = cost_of(cfg, plan, own, read)
    plan.run_flops = flops * cfg.max_seq_len
    plan.flops_per_token = flops / (plan.steps * cfg.batch_size)
    plan.peak_flops = distributed.peak_flops(dist.device, dtype) * dist.world
    plan.dtype = dtype
    plan.compiled, why_compile = choose_compile(cfg.compile, plan.run_flops, dist.device)
    if cfg.match_hidden or cfg.match_attention:
        plan.compiled, why_compile = False, "layers are watched"
    plan.notes = [f"device      {distributed.device_name(dist.device)}; {dtype}: {why}; "
                  f"{'compiled' if plan.compiled else 'not compiled'}: {why_compile}",
                  *describe(cfg, plan, examples, needs, teachers, room, (own, read)), *[note] * bool(note)]
    return plan


def cost_of(cfg: DistillConfig, plan: Plan, own: float, read: float) -> tuple[int, float]:
    """(steps, the run's FLOPs over max_seq_len), from a token's FLOPs: training the student, `own`, and
    reading the teachers, `read`. A control at equal compute has as many steps as the teachers' FLOPs buy."""
    rows = plan.steps * cfg.batch_size
    once = cfg.cache or cfg.without_teacher == "cached"  # a row is read once, however often it is trained on
    passes = min(rows, plan.per_epoch) if once else rows
    if cfg.without_teacher in ("compute", "cached"):
        steps = round((rows + passes * read / own) / cfg.batch_size)
        return steps, steps * cfg.batch_size * own
    if not cfg.uses_teacher:
        return plan.steps, rows * own
    return plan.steps, rows * own * (1 + cfg.on_policy / 3) + passes * read + rows * cfg.teacher_text * read


def describe(cfg: DistillConfig, plan: Plan, examples: Examples, needs, teachers: list, room: float,
             flops: tuple[float, float]) -> list[str]:
    n, total = needs.model.count_parameters(), [t.count_parameters()["total"] for t in teachers]
    T, needed = cfg.max_seq_len, needs.peak(plan.micro, plan.world)
    target = "the text alone (control)" if cfg.control else (
        f"{cfg.alpha:g} x {cfg.divergence} at temperature {cfg.temperature:g} + {1 - cfg.alpha:g} x "
        "cross-entropy")
    return [
        f"teacher     {', '.join(cfg.teacher)}: {' + '.join(f'{t:,}' for t in total)} parameters"
        + (f", read once into {cfg.cache}" if cfg.cache else ""),
        f"student     {n['total']:,} parameters ({n['non_embedding']:,} without embeddings), 1/"
        f"{max(total) / n['total']:.1f} of the teacher's" + started(cfg),
        f"loss        {target}", examples.note(),
        f"batch       {plan.world} process{'es' * (plan.world > 1)} x {plan.accumulation} accumulated x "
        f"{plan.micro} = {cfg.batch_size} rows of {T} tokens",
        f"memory      about {needed / 1e9:.2f} GB at its peak, both models" + " a process" * (plan.world > 1)
        + (f", of {room / 1e9:.2f} GB" if room < math.inf else "")
        + ("; it will not fit: try --checkpoint_activations" if needed > room else ""),
        f"cost        {flops[0] / 1e6:.1f} MFLOPs per token for the student, {flops[1] / 1e6:.1f} for the "
        f"teacher; "
        f"{plan.run_flops:.2e} FLOPs for the run",
        *describe_groups(parameter_groups(needs.model, cfg)),
        f"run         {plan.steps:,} steps = {plan.steps * cfg.batch_size / examples.per_epoch:.2f} epochs "
        f"of {examples.per_epoch:,} rows"]


def started(cfg: DistillConfig) -> str:
    if cfg.student_layers:
        return f"; from the teacher's layers {', '.join(map(str, cfg.student_layers))}"
    return f"; from {cfg.init_from}" if cfg.init_from else "; from random weights"


# ------------------------------------------------------------------------------------------------------------
# Training


@dataclass
class Progress:
    """Where a run stands. With weights and optimiser it is all that resuming needs."""
    step: int = 0  # optimiser steps done
    evaluated: int = 0  # the last step that was evaluated; -1: step 0 is to be
    best: dict = field(default_factory=dict)  # the best evaluation, with its step
    bad_evals: int = 0  # evaluations since the best
    sums: list = field(default_factory=lambda: [0, 0.0, 0.0])  # steps on text, their soft and hard losses,
    # since the last evaluation
    micro: int = 0  # sequences per forward pass
    crossed: dict = field(default_factory=dict)  # first evaluation below the unigram's, bigram's loss
    ended: str = ""  # "finished" or "early stop"


def source_of(cfg: DistillConfig, step: int) -> str:
    """Where this step's rows are from: the text, the student or the teacher. Spread evenly; a function of
    the step alone."""
    place = step * 0.6180339887498949 % 1  # the golden ratio's multiples fill [0, 1) evenly
    if cfg.control or place >= cfg.on_policy + cfg.teacher_text:
        return "text"
    return "student" if place < cfg.on_policy else "teacher"


@torch.no_grad()
def continued(model: LM, x, sample: int, cfg: DistillConfig):
    """Inputs and targets (B, T): the first prompt_tokens of x (B, T), and how `model` goes on, drawn with a
    seed of this sample. Only what it wrote counts."""
    T, training = x.size(1), model.training
    prompt = x[:, :cfg.prompt_tokens or max(1, T // 2)]  # (B, P)
    generator = torch.Generator(x.device).manual_seed((cfg.seed * 2**40 + 2**39 + sample) % 2**63)
    model.eval()
    new = model.generate(prompt, T + 1 - prompt.size(1), cfg.sample_temperature, generator=generator)
    rows = torch.cat((prompt, *new), dim=1)  # (B, T + 1)
    model.train(training)
    y = rows[:, 1:].clone()
    y[:, :prompt.size(1) - 1] = -1
    return rows[:, :-1], y


def fetch(cfg: DistillConfig, plan: Plan, examples: Examples, model: LM, teaching: Teaching, source: str,
          step: int, dist) -> list[tuple]:
    """This process's micro-batches of a step."""
    out, teachers = [], teaching.models
    for sample in plan.samples(step, dist.rank):
        x, y = examples.batch(sample, plan.micro, dist.device)
        if source == "student":
            x, y = continued(model, x, sample, cfg)
        if source == "teacher":
            x, y = continued(teachers[sample // plan.micro % len(teachers)], x, sample, cfg)
        kept = ()
        if teaching.cache:
            ids, probs, tail, entropy = teaching.cache.rows(examples.index(sample, plan.micro), dist.device)
            kept = (ids, probs, entropy) if tail is None else (ids, probs, entropy, tail)
        out.append((x, y, *kept))
    return out


def mix_of(cfg: DistillConfig, source: str) -> Mix:
    alpha = {"text": cfg.alpha, "student": 1.0, "teacher": 0.0}[source]  # nobody's words are a target there
    return Mix(cfg.divergence, 0.0 if cfg.control else alpha, cfg.temperature, cfg.beta, cfg.skew)


def distill(cfg: DistillConfig, plan: Plan, text: Text, examples: Examples, model: LM, teaching: Teaching,
            optimizer, scaler, run: Run, progress: Progress, stop: StopRequest, needs) -> None:
    dist, net = run.dist, wrap(Distiller(model, teaching, cfg, plan.compiled), plan.compiled, run.dist)
    baselines = ngram_losses(text.train, text.val, model.n_tokens)

    def save(name: str) -> None:
        run.save(name, model, optimizer, scaler, **asdict(progress))

    with StepBar(progress.step, plan.steps, dist.is_main) as bar:
        while not progress.ended:
            # evaluate if due, or if a stop cut the last evaluation short
            if progress.evaluated < progress.step and plan.evaluates(progress.step, cfg):
                result = evaluate_all(cfg, plan, text, model, teaching.models, dist, stop, needs)
                if result is None:  # stopped halfway: repeated on resuming
                    save("last.pt")
                    break
                if record(cfg, plan, text, model, run, progress, result, baselines, bar.speed):
                    save("best.pt")  # before last.pt, which records the best: a kill between loses nothing
                save("last.pt")
                continue

            # one optimiser step
            began = time.perf_counter()
            lr = set_learning_rates(optimizer, cfg, progress.step, plan.steps)
            source = source_of(cfg, progress.step)
            batches = fetch(cfg, plan, examples, model, teaching, source, progress.step, dist)
            seeds = None
            if cfg.dropout:  # masks are a function of (seed, sample), so a resumed run draws the same
                seeds = [(cfg.seed * 2**40 + i) % 2**63 for i in plan.samples(progress.step, dist.rank)]
            losses = backward(net, batches, dist, plan.dtype, scaler, seeds=seeds,
                              loss_of=functools.partial(losses_of, mix=mix_of(cfg, source)))
            if progress.step == 0:
                check_gradients(model)
            norm = update(model, optimizer, scaler, cfg.grad_clip, losses[0])
            loss, soft, hard = losses.tolist()
            progress.step += 1
            if source == "text":
                progress.sums = [a + b for a, b in zip(progress.sums, (1, soft, hard), strict=True)]
            stopping = stop.agreed(dist)
            run.seconds += time.perf_counter() - began
            bar.tick(time.perf_counter() - began)

            # log for people and programs, save
            if progress.step % cfg.log_interval == 0 or progress.step == plan.steps:
                run.metrics(step=progress.step, tokens=progress.step * cfg.batch_size * cfg.max_seq_len,
                            train_loss=loss, soft=soft, hard=hard, rows_by=source, lr=lr,
                            grad_norm=norm if math.isfinite(norm) else None, seconds=round(run.seconds, 3))
            bar.show(f"epoch {progress.step * cfg.batch_size / plan.per_epoch:.2f}, soft {soft:.3f}, "
                     f"hard {hard:.3f}, lr {lr:.1e}, {plan.speed_text(cfg, bar.speed, dist.device)}")
            if stopping or not plan.evaluates(progress.step, cfg) and run.save_is_due(cfg.save_minutes):
                save("last.pt")
            if stopping:
                break


def evaluate_all(cfg, plan: Plan, text: Text, model: LM, teachers: list[LM], dist, stop,
                 needs) -> dict | None:
    """Measures of the student on the whole validation split, and with teachers in memory how far it is from
    them on its beginning; None if stopped halfway."""
    T, split = cfg.max_seq_len, text.meta["splits"]["val"]
    tokens = max(plan.micro * T, min(2**14, needs.evaluated_at_once(plan.micro) * T))
    batch = max(1, tokens // T)
    result = evaluate(model, text.val, split, T, batch, dist, plan.dtype, stop=stop)
    if result is None:
        return None
    if not math.isfinite(result["loss"]):
        raise NotFinite(f"validation loss {result['loss']}; not saved")
    if teachers:
        beside = compare(model, teachers, text.val[:COMPARED], split, model.n_tokens, None, T, batch, dist,
                         plan.dtype, cfg.temperature, stop)
        return beside and result | {k: beside[k] for k in ("soft", "agreement")}
    return result


def record(cfg, plan: Plan, text: Text, model: LM, run: Run, progress: Progress, result: dict,
           baselines: dict[str, float], speed: float) -> bool:
    """Update the progress with an evaluation, sample, log and draw. Returns whether it is the best so far."""
    step, (n, *sums) = progress.step, progress.sums
    result = {"step": step, **result}
    better = result["loss"] < progress.best.get("loss", math.inf)
    soft, hard = (s / n if n else None for s in sums)
    progress.bad_evals = 0 if better else progress.bad_evals + 1
    progress.best = result if better else progress.best
    progress.evaluated, progress.sums = step, [0, 0.0, 0.0]
    for name, loss in baselines.items():
        if result["loss"] < loss:
            progress.crossed.setdefault(name, step)
    if step == plan.steps:
        progress.ended = "finished"
    elif cfg.patience and progress.bad_evals >= cfg.patience:
        progress.ended = "early stop"
    if not run.dist.is_main:
        return better
    samples = continue_prompts(model, text.tok, cfg, run.dist.device)
    run.metrics(step=step, tokens=step * cfg.batch_size * cfg.max_seq_len,
                epoch=step * cfg.batch_size / plan.per_epoch, mean_soft=soft, mean_hard=hard, **{
                    f"val_{k}": v for k, v in result.items() if k != "step"},
                samples=samples, seconds=round(run.seconds, 3))
    beside = f", soft {result['soft']:.4f}, agrees on {result['agreement']:.1%}" if "soft" in result else ""
    say(f"step {step:>7,}  epoch {step * cfg.batch_size / plan.per_epoch:6.2f} | "
        + (f"train soft {soft:.4f}, hard {hard:.4f}" if n else f"{'before':<12}" * (not step))
        + f" | val hard {result['loss']:.4f}{'*' if better else ' '}{beside}, {measures_text(result)}"
        + f" | {plan.speed_text(cfg, speed, run.dist.device)}" * (step > 0))
    for prompt, continuation in samples.items():
        say(f"              {prompt}|{' '.join(continuation.split()):.180}")
    rows = read_rows(run.path("metrics.jsonl"))
    write_samples(rows, run.path("samples.txt"))
    draw(rows, cfg, baselines, run.path("distill.png"))
    return better


# ------------------------------------------------------------------------------------------------------------
# Main


def main(cfg: DistillConfig) -> dict:
    """Distil, resume or plan. Returns the summary, which for a run that ended is its ledger row."""
    with distributed.setup(cfg.device) as dist:
        text = open_text(cfg.data, cfg.train_tokens)
        cfg = cfg.resolved(text.meta)
        examples = Examples(text.train, text.tok, cfg.examples, cfg.max_seq_len, cfg.seed, cfg.min_tokens,
                            cfg.max_examples, cfg.count_padding)
        if dist.device.type == "cpu" and not cfg.checkpoint_activations:
            distributed.keep_freed_memory()
        dtype, room = distributed.choose_dtype(cfg.dtype, dist.device)[0], fit.room_for(cfg.memory_gb, dist)
        fit.refuse_hopeless(make_student, cfg, room, cfg.batch_size, fit.states_of(cfg), cfg.dry_run)
        configs = [teacher_config(path) for path in cfg.teacher]
        vocab = min(c.vocab_size for c in (cfg, *configs))  # ids that all of them have
        if wrong := student_problems(cfg, configs):
            raise UserError("\n".join(wrong))
        needs = fit.Needs(make_student, cfg, dtype, dist.device)
        beside = [fit.Reading(LM, c, cfg.max_seq_len, dtype) for c in configs]
        needs.beside = beside if cfg.uses_teacher and not cfg.cache else []
        counted = [b.model for b in beside]
        if cfg.dry_run:
            plan = plan_run(cfg, dist, examples, needs, counted, room)
            say("\n".join(plan.notes))
            return {"parameters": needs.model.count_parameters(), **asdict(plan)}
        with Run(cfg, dist, "distill", text.meta["tokenizer"], cfg.data_sha256(text.meta)) as run, \
                StopRequest(cfg.max_minutes) as stop:
            saved = run.find()
            if saved and cfg.epochs < 0:  # not given, so as at the start of the run
                run.cfg = cfg = replace(cfg, epochs=saved["config"]["epochs"])
            began = saved["progress"]["micro"] if saved else 0
            plan = plan_run(cfg, dist, examples, needs, counted, room, began)
            if dist.is_main:
                say("\n".join(plan.notes))
            cache = open_or_write_cache(cfg, plan, text, examples, vocab, dist, stop) if cfg.cache else None
            if cfg.cache and cache is None:  # stopped, on all processes
                if dist.is_main:
                    say(f"stopped while the cache was written; nothing of it is left; begin again with:  "
                        f"{resume_command()}")
                return run.finish("stopped", {}, {}, plan.dtype)
            teachers = load_teachers(cfg, dtype, dist.device) if cfg.uses_teacher and not cache else []
            teaching = Teaching(teachers, cache, vocab)
            model, optimizer, scaler, progress = begin(cfg, plan, text, run, saved)
            del saved
            try:
                distill(cfg, plan, text, examples, model, teaching, optimizer, scaler, run, progress, stop,
                        needs)
            except NotFinite as e:
                message = f"not finite at step {progress.step + 1:,}: {e}\n{way_back(cfg, run)}"
                raise UserError(message) from None
            return finish(cfg, plan, text, teachers, run, progress, model, stop)


def teacher_config(path: str) -> ModelConfig:
    saved = checkpoint.load(path, ("model", "config", "tokenizer"), mmap=True, int8=True)
    return ModelConfig(**architecture(saved["config"], ModelConfig))


def student_problems(cfg: DistillConfig, teachers: list[ModelConfig]) -> list[str]:
    """What about the student does not go with its teachers."""
    out = []
    if cfg.student_layers:
        out += student.problems_between(cfg, teachers[0], cfg.student_layers, cfg.student_width)
    for path, theirs in zip(cfg.teacher, teachers, strict=True):
        if theirs.pos == "learned" and cfg.max_seq_len > theirs.max_seq_len:
            out.append(f"max_seq_len={cfg.max_seq_len}, but the learned positions of {path} end at "
                       f"{theirs.max_seq_len}")
        if cfg.match_attention and theirs.mixer != "attention":
            out.append(f"match_attention: {path} has no attention (mixer={theirs.mixer})")
        if cfg.match_hidden and theirs.gated:
            out.append(f"match_hidden: {path} has no blocks whose output could be matched")
    return out


def open_or_write_cache(cfg: DistillConfig, plan: Plan, text: Text, examples: Examples, vocab: int, dist,
                        stop: StopRequest):
    """The teachers' predictions; None if a stop was requested while they were written."""
    kind = teacher_cache.parse(cfg.cache_kind)
    identity = teacher_cache.identity_of(
        "+".join(map(checkpoint.file_sha256, cfg.teacher)), text.tok.fingerprint,
        text.meta["splits"]["train"]["sha256"], examples, vocab, kind, cfg.temperature)
    cache = teacher_cache.open_cache(cfg.cache, identity)
    if cache is None:
        teachers = load_teachers(cfg, plan.dtype, dist.device)
        source = cache_writer.Source(examples, teachers, vocab, kind, cfg.temperature, cfg.seed, plan.micro,
                                     dist, plan.dtype)
        lines = cache_writer.estimate(cfg.cache, source)
        if dist.is_main:
            say("\n".join(lines))
        if not cache_writer.write(cfg.cache, identity, source, stop):
            return None
        cache = teacher_cache.open_cache(cfg.cache, identity)
    return cache


def begin(cfg: DistillConfig, plan: Plan, text: Text, run: Run, saved: dict | None):
    """(model, optimizer, scaler, progress), new or as saved."""
    device, progress = run.dist.device, Progress()
    torch.manual_seed(cfg.seed)
    source = checkpoint.load(cfg.init_from, mmap=True) if cfg.init_from and not saved else None
    teacher = load_model(cfg.teacher[0])[0] if cfg.student_layers and not saved else None  # in fp32
    model = make_student(cfg, source, teacher).to(device)
    model.trunk.checkpoint_activations = cfg.checkpoint_activations
    optimizer = make_optimizer(model, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=plan.dtype == "fp16")
    if saved:
        run.restore(saved, model, optimizer, scaler)
        names = [f.name for f in fields(Progress)]
        progress = Progress(**{name: saved["progress"][name] for name in names if name in saved["progress"]})
    elif source or teacher:
        progress.evaluated = -1  # the curve begins with what was there
    progress.micro = plan.micro
    run.begin(saved, lambda row: row["step"] <= (progress.evaluated if "val_loss" in row else progress.step))
    if run.dist.is_main:
        text.tok.save(run.folder)  # so that the run folder is enough for sampling
        say(f"{'resuming' if saved else 'starting':<11} {run.folder} at step {progress.step:,} of "
            f"{plan.steps:,}" + (f", {progress.ended}" if progress.ended else ""))
    return model, optimizer, scaler, progress


def finish(cfg: DistillConfig, plan: Plan, text: Text, teachers: list[LM], run: Run, progress: Progress,
           model: LM, stop: StopRequest) -> dict:
    """Compare the best student with its teachers, print the summary and return it; if the run has ended, add
    it to the ledger."""
    counts = {"steps": progress.step, "tokens": progress.step * cfg.batch_size * cfg.max_seq_len,
              "epochs": progress.step * cfg.batch_size / plan.per_epoch, "flops": plan.run_flops,
              "parameters": model.count_parameters()["total"],
              "parameters_non_embedding": model.count_parameters()["non_embedding"],
              "sessions": run.sessions}
    found = None
    if progress.ended:
        run.dist.min(0)  # the main process has written best.pt
        checkpoint.load_weights(model, checkpoint.load(run.path("best.pt"))["model"], run.folder)
        teachers = teachers or load_teachers(cfg, plan.dtype, run.dist.device)
        found = final_report(cfg, plan, text, model, teachers, run, progress, stop)
    if found is None:
        if run.dist.is_main:
            say(f"stopped at step {progress.step:,} of {plan.steps:,} and saved in {run.folder}; continue "
                f"with:  {resume_command()}")
        return run.finish("stopped", counts, progress.best, plan.dtype)
    result, words = found
    row = run.finish(progress.ended, counts, result, plan.dtype)
    if run.dist.is_main:
        write_text(run.path("report.md"), words)
        say(f"\n{words}\n{progress.ended}: {progress.step:,} steps, {run.seconds / 60:.1f} minutes of "
            f"training\nin {run.folder}: best.pt, last.pt, metrics.jsonl, report.md, distill.png; "
            f"look at it with:  python sample.py {run.folder} {cfg.teacher[0]} --prompt=\"The\"")
    return row


if __name__ == "__main__":
    launch(main, DistillConfig)
