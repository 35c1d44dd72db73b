"""Pre-training and continued training: the whole loop is in this file.

    python train.py config/demo.py                                    # on a CPU, a Mac or one GPU
    torchrun --standalone --nproc_per_node=2 train.py config/exp6.py  # two GPUs (or two CPU processes)
    torchrun --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_endpoint=HOST train.py config/exp6.py
    python train.py config/exp3.py --dry_run                          # size, cost and plan, without training
    python train.py config/exp3.py --lr=3e-4 --name=exp3_lr3e-4       # a flag overrides the config file
    python train.py config/exp3.py --max_minutes=85                   # stop in time; the same command resumes
    python train.py config/demo.py --train_minutes=10                 # a whole run in ten minutes
    python train.py config/continual.py                               # continue another run, on new text
    python train.py config/continual.py --replay=0.05 --name=replay   # with old text mixed in

A run stopped by Ctrl-C, SIGTERM, --max_minutes or kill -9 is resumed by the same command, with the losses it
would have had without the stop. Its folder out/NAME/ holds last.pt, best.pt, metrics.jsonl, samples.txt and
loss.png; when it ends, a line is added to out/ledger.jsonl.
"""
import math
import os
import statistics
import time
from dataclasses import asdict, dataclass, field, fields, replace

from common import checkpoint, distributed, fit, lora
from common.config import UserError, launch
from common.console import StepBar, resume_command, say
from common.conversations import ChatRows, Chats
from common.data import Mixed, Text, Windows, open_beside, open_text, read_meta, samples
from common.evaluate import evaluate, measures_text
from common.files import read_rows
from common.plan import Plan, PlanConfig, choose_micro_batch, make_plan
from common.run import Run, RunConfig, way_back
from common.sampled_head import HeadSampler
from common.samples import continue_prompts, write_samples
from common.source import carry_moments, inherit
from common.step import NotFinite, backward, check_gradients, choose_compile, update, wrap
from common.stop import StopRequest
from common.tables import draw_losses
from model import LM, ModelConfig
from muon import OptimizerConfig, describe_groups, make_optimizer, parameter_groups, set_learning_rates

import torch

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class TrainConfig(PlanConfig, RunConfig, OptimizerConfig, ModelConfig):
    MAY_CHANGE = {"data", "replay_data", "lora_merge", "eval_data", "eval_lens"}
    name: str = "train"  # the run's folder in out_dir; by default the config file's name
    # length by time
    train_minutes: float = 0.0  # steps that take this long here, measured once at the start; 0 = no limit
    # data
    data: str = "data/shakespeare"  # folder made by prepare_data.py
    train_tokens: int = 0  # use only the first N training tokens (what does data buy?); 0 = all
    # continued training
    init_from: str = ""  # checkpoint or run folder to take weights and architecture from; "" = random weights
    carry_optimizer: bool = False  # start with its optimiser's moments too, instead of fresh ones
    replay: float = 0.0  # share of sequences that come from replay_data
    replay_data: str = ""  # folder of old text in the same tokens
    lora_rank: int = 0  # train low-rank changes (LoRA) of the trunk's matrices alone; 0 = train everything
    lora_alpha: float = 16.0  # LoRA's changes are scaled by lora_alpha / lora_rank
    lora_merge: bool = False  # at the end also write merged.pt: best.pt as a plain model
    # more about batches
    head_samples: int = 0  # tokens sampled for the softmax of a micro-batch (common/sampled_head.py); 0 = all
    tbptt: int = 0  # tokens to back-propagate through; the state is carried along, memory stays flat; 0 = all
    # more to evaluate
    eval_data: tuple[str, ...] = ()  # also evaluate on these folders' validation text: what is forgotten?
    eval_lens: tuple[int, ...] = ()  # also evaluate at these context lengths (rope and none extrapolate)

    def problems(self) -> list[str]:
        out = super().problems() + self.at_least(1, "eval_lens")
        out += self.at_least(0, "tbptt", "train_tokens", "lora_rank", "train_minutes", "head_samples")
        known = self.n_tokens or not self.init_from  # else the architecture is in a checkpoint not read yet
        return out + self.continuation_problems() + (self.architecture_problems() if known else [])

    def continuation_problems(self) -> list[str]:
        out, names = lora.option_problems(self), [text_name(f) for f in self.eval_data]
        if not self.init_from:
            out += [f"{key} needs a trained model: set init_from" for key in ("carry_optimizer", "lora_rank")
                    if getattr(self, key)]
        if not 0 <= self.replay < 1:
            out.append(f"replay must be at least 0 and below 1, got {self.replay}")
        if self.replay and not self.replay_data:
            out.append(f"replay={self.replay} needs the folder of the old text: set replay_data")
        if len(set(names)) < len(names):
            out.append(f"eval_data has two folders of one name, by which their losses are called: {names}")
        if self.lora_rank and self.carry_optimizer:
            out.append("carry_optimizer: LoRA's matrices are new and have no moments; use one of the two")
        if self.lora_merge and not self.lora_rank:
            out.append("lora_merge has nothing to merge: lora_rank is 0")
        return out

    def architecture_problems(self) -> list[str]:
        out = []
        if self.head_lr and self.tie_embeddings:
            out.append(f"head_lr={self.head_lr} is set, but the head is tied to the embedding; use embed_lr, "
                       "or tie_embeddings=False")
        if self.tbptt and self.mixer == "attention":
            out.append(f"tbptt={self.tbptt} carries a fixed-size state, which mixer=attention does not have; "
                       "use mixer=context or mixer=lstm, or a smaller max_seq_len")
        if self.checkpoint_activations and (self.gated or self.tbptt):
            out.append("checkpoint_activations recomputes blocks, but " + (
                "tbptt carries their state along; use one of the two" if self.tbptt else
                "the gated context has none; use tbptt to save memory"))
        if self.pos == "learned" and any(n > self.max_seq_len for n in self.eval_lens):
            out.append(f"eval_lens={self.eval_lens} goes past the learned positions, which end at "
                       f"max_seq_len={self.max_seq_len}; use pos=rope or pos=none")
        return out + lora.model_problems(self)

    def resolved(self, meta: dict | None) -> "TrainConfig":
        """With the architecture of `init_from`, and the vocabulary of the data folder's tokenizer."""
        cfg = inherit(self, ModelConfig, meta) if self.init_from else self
        if not meta:
            return cfg
        n_tokens = meta["tokenizer"]["vocab_size"]
        if self.init_from and (cfg.n_tokens or cfg.vocab_size) < n_tokens:  # new chat tokens
            if self.lora_rank or self.carry_optimizer:
                raise UserError(f"the chat tokens of {cfg.data} are new to {cfg.init_from} and must be "
                                "trained, from new moments: leave out lora_rank and carry_optimizer")
            return replace(cfg, vocab_size=max(cfg.vocab_size, n_tokens), n_tokens=n_tokens)
        if 0 < cfg.vocab_size < n_tokens:
            raise UserError(f"vocab_size={cfg.vocab_size}, but the tokenizer of {cfg.data} has "
                            f"{n_tokens} ids")
        return replace(cfg, vocab_size=cfg.vocab_size or n_tokens, n_tokens=n_tokens)

    def data_sha256(self, meta: dict) -> str:
        """Of the training tokens, and of those replayed."""
        metas = [meta, read_meta(self.replay_data)] if self.replay else [meta]
        return "+".join(m["splits"]["train"]["sha256"] for m in metas)


def text_name(folder: str) -> str:
    """What the losses on a folder's text are called."""
    return os.path.basename(os.path.normpath(folder))


def make_model(cfg: TrainConfig, source: dict | None = None) -> LM:
    """The model to train, with the weights of the checkpoint `source` = init_from, or random ones."""
    model = LM(cfg)
    if source:
        known = source["config"].get("n_tokens") or source["config"]["vocab_size"]
        weights = checkpoint.with_new_tokens(source["model"], known, cfg.n_tokens)
        checkpoint.load_weights(model, weights, cfg.init_from)
    return lora.wrap(model, cfg.lora_rank, cfg.lora_alpha) if cfg.lora_rank else model


def open_texts(cfg: TrainConfig) -> Text:
    """The run's text, with what is evaluated and replayed beside it."""
    text = open_text(cfg.data, cfg.train_tokens)
    others = {text_name(f): open_beside(f, "val", text, cfg.data) for f in cfg.eval_data}
    replayed = open_beside(cfg.replay_data, "train", text, cfg.data)[0] if cfg.replay else None
    return text._replace(others=others, replayed=replayed)


def samples_of(cfg: TrainConfig, text: Text) -> Windows | ChatRows | Mixed:
    """The stream of training samples."""
    new = samples(text.train, cfg.max_seq_len, cfg.seed)
    return Mixed(new, samples(text.replayed, cfg.max_seq_len, cfg.seed), cfg.replay) if cfg.replay else new


# ------------------------------------------------------------------------------------------------------------
# Plan: what the run will be, in numbers


def plan_run(cfg: TrainConfig, dist, text: Text | None, needs: fit.Needs, room: float, began=0,
             fitting=0) -> Plan:
    """Of a run that is resumed: it `began` with this micro-batch, and so many steps are `fitting` into its
    train_minutes."""
    dtype, why = distributed.choose_dtype(cfg.dtype, dist.device)
    windows = samples_of(cfg, text).per_epoch if text else 0
    micro, note = choose_micro_batch(cfg, needs, dist, room, began)
    plan = make_plan(cfg, dist.world, windows, micro, fitting)
    plan.dtype, plan.flops_per_token = dtype, needs.model.flops_per_token(cfg.max_seq_len)
    if cfg.head_samples:
        left_out = max(0, cfg.vocab_size - cfg.head_samples)
        plan.flops_per_token -= 6 * left_out * cfg.head_width
    if cfg.lora_rank:  # frozen matrices have no gradients: 4 FLOPs a weight, not 6
        plan.flops_per_token += 6 * (needs.gradients // 4) - 2 * needs.model.count_parameters()["matmul"]
    plan.peak_flops = distributed.peak_flops(dist.device, dtype) * dist.world
    run_flops = plan.flops_per_token * plan.steps * cfg.batch_size * cfg.max_seq_len
    if cfg.train_minutes and not fitting:
        run_flops = 60 * cfg.train_minutes * 1e13  # a guess for a GPU
    plan.compiled, why_compile = choose_compile(cfg.compile, run_flops, dist.device)
    if cfg.train_minutes and text:
        if not fitting:
            plan.step_seconds = step_seconds(cfg, plan, text, dist)
            fitting = max(1, round(60 * cfg.train_minutes / plan.step_seconds))
        plan.fitting = fitting
        plan.steps = min(n for n in (plan.steps, fitting) if n)
    plan.notes = [f"device      {distributed.device_name(dist.device)}; {dtype}: {why}; "
                  f"{'compiled' if plan.compiled else 'not compiled'}: {why_compile}",
                  *describe(cfg, plan, text, needs, room), *[note] * bool(note)]
    return plan


def step_seconds(cfg: TrainConfig, plan: Plan, text: Text, dist) -> float:
    """Seconds of an optimiser step here, the slowest process's, on a model that is then thrown away: the
    median over five seconds, or over a tenth of train_minutes."""
    model, optimizer, scaler = make_all(cfg, plan, text, dist)
    net, windows, times, count = wrap(model, plan.compiled, dist), samples_of(cfg, text), [], 4
    while len(times) < count:
        began, step = time.perf_counter(), len(times)
        set_learning_rates(optimizer, cfg, 0, 1000)
        batches = [windows.batch(i, plan.micro, dist.device) for i in plan.samples(step, dist.rank)]
        loss = backward(net, batches, dist, plan.dtype, scaler, tbptt=cfg.tbptt)
        update(model, optimizer, scaler, cfg.grad_clip, loss)
        times.append(-dist.min(began - time.perf_counter()))
        if len(times) == 4:  # the first ones are slower
            count = 4 + min(500, max(9, round(min(5, 6 * cfg.train_minutes) / times[-1])))
    return statistics.median(times[4:])


def make_all(cfg: TrainConfig, plan: Plan, text: Text, dist, source: dict | None = None):
    """(model, optimizer, scaler) on the device, as a run begins."""
    model = make_model(cfg, source).to(dist.device)
    model.trunk.checkpoint_activations = cfg.checkpoint_activations
    model.head_sampler = head_sampler(cfg, text, dist)
    return model, make_optimizer(model, cfg), torch.amp.GradScaler(dist.device.type,
                                                                   enabled=plan.dtype == "fp16")


def head_sampler(cfg: TrainConfig, text: Text, dist) -> HeadSampler | None:
    if not cfg.head_samples:
        return None
    ids = text.train.ids if isinstance(text.train, Chats) else text.train
    return HeadSampler(ids, cfg.vocab_size, cfg.head_samples, dist.device)


def describe(cfg: TrainConfig, plan: Plan, text: Text | None, needs: fit.Needs, room: float) -> list[str]:
    """The plan as equations; without data (a dry run) as far as possible."""
    n, seq, flops = needs.model.count_parameters(), cfg.max_seq_len, plan.flops_per_token
    epoch, total = plan.per_epoch * seq, plan.steps * cfg.batch_size * seq
    needed = needs.peak(plan.micro, plan.world)
    trained = f", of which LoRA trains {needs.gradients // 4:,}" if cfg.lora_rank else ""
    lines = [
        f"parameters  {n['total']:,} ({n['non_embedding']:,} without embeddings){trained}",
        f"batch       {plan.world} process{'es' * (plan.world > 1)} x {plan.accumulation} accumulated x "
        f"{plan.micro} = {cfg.batch_size} sequences; x {seq} = {cfg.batch_size * seq:,} tokens a step",
        f"memory      about {needed / 1e9:.2f} GB at its peak" + " a process" * (plan.world > 1)
        + (f", of {room / 1e9:.2f} GB" if room < math.inf else "")
        + ("; it will not fit: try --checkpoint_activations" if needed > room else ""),
        f"cost        {flops / 1e6:.1f} MFLOPs per token"
        + (f", {flops * total:.2e} FLOPs for the run" if epoch else ""),
        *describe_groups(parameter_groups(needs.model, cfg))]
    if not epoch:
        return [*lines, f"epoch       unknown: no tokens in {cfg.data} yet"]
    if text and isinstance(text.train, Chats):
        lines.append(text.train.note(cfg.max_seq_len, plan.micro))
    if cfg.replay:
        lines.append(f"replay      {cfg.replay:.3g} of all sequences, from {cfg.replay_data}; the epoch "
                     "below includes them")
    if cfg.train_minutes:
        lines.append(f"length      {plan.fitting:,} steps take {cfg.train_minutes:g} minutes"
                     + (f": {1000 * plan.step_seconds:.1f} ms each, measured now" if plan.step_seconds else
                        ", as measured when the run began"))
    return [
        *lines,
        f"epoch       {plan.per_epoch:,} windows x {seq} = {epoch:,} tokens; D/N {epoch / n['total']:.2f}:1 "
        "(Chinchilla 20:1)",
        f"run         {plan.steps:,} steps = {total / epoch:.2f} epochs = {total:,} tokens; "
        f"D/N {total / n['total']:.2f}:1"]


# ------------------------------------------------------------------------------------------------------------
# Training


@dataclass
class Progress:
    """Where a run stands. With weights and optimiser it is all that resuming needs."""
    step: int = 0  # optimiser steps done
    evaluated: int = 0  # the last step that was evaluated; -1: step 0 is to be
    first: dict = field(default_factory=dict)  # losses at step 0 on the other texts, by name
    best: dict = field(default_factory=dict)  # the best evaluation, with its step
    bad_evals: int = 0  # evaluations since the best
    loss_sum: float = 0.0  # over the steps since the last evaluation
    micro: int = 0  # sequences per forward pass
    fitting: int = 0  # steps that train_minutes came to
    ended: str = ""  # "finished" or "early stop"


def train(cfg: TrainConfig, plan: Plan, text: Text, model: LM, optimizer, scaler, run: Run,
          progress: Progress, stop: StopRequest, needs: fit.Needs) -> None:
    dist, net = run.dist, wrap(model, plan.compiled, run.dist)
    windows = samples_of(cfg, text)

    def fetch(step: int) -> list:
        return [windows.batch(i, plan.micro, dist.device) for i in plan.samples(step, dist.rank)]

    def save(name: str) -> None:
        run.save(name, model, optimizer, scaler, **asdict(progress))

    batches = fetch(progress.step)
    with StepBar(progress.step, plan.steps, dist.is_main) as bar:
        while not progress.ended:
            # evaluate if due, or if a stop cut the last evaluation short
            if progress.evaluated < progress.step and plan.evaluates(progress.step, cfg):
                results = evaluate_all(cfg, plan, text, model, dist, stop, needs)
                if results is None:  # stopped halfway: repeated on resuming
                    save("last.pt")
                    break
                better = report(cfg, plan, text, model, run, progress, results, bar.speed)
                if better:
                    save("best.pt")  # before last.pt, which records the best: a kill between loses nothing
                save("last.pt")
                continue

            # one optimiser step
            began = time.perf_counter()
            lr = set_learning_rates(optimizer, cfg, progress.step, plan.steps)
            seeds = None
            if cfg.dropout or cfg.head_samples:  # functions of (seed, sample), the same on resuming
                seeds = [(cfg.seed * 2**40 + i) % 2**63 for i in plan.samples(progress.step, dist.rank)]
            loss = backward(net, batches, dist, plan.dtype, scaler, seeds=seeds, tbptt=cfg.tbptt)
            batches = fetch(progress.step + 1)  # meanwhile a GPU still computes
            if progress.step == 0:
                check_gradients(model)
            norm = update(model, optimizer, scaler, cfg.grad_clip, loss)
            progress.step += 1
            progress.loss_sum += loss.item()
            stopping = stop.agreed(dist)
            run.seconds += time.perf_counter() - began
            bar.tick(time.perf_counter() - began)

            # log for people and programs, save
            if progress.step % cfg.log_interval == 0 or progress.step == plan.steps:
                run.metrics(step=progress.step, tokens=progress.step * cfg.batch_size * cfg.max_seq_len,
                            train_loss=loss.item(), lr=lr, grad_norm=norm if math.isfinite(norm) else None,
                            seconds=round(run.seconds, 3))
            bar.show(f"epoch {progress.step * cfg.batch_size / plan.per_epoch:.2f}, loss {loss.item():.3f}, "
                     f"lr {lr:.1e}, {plan.speed_text(cfg, bar.speed, dist.device)}")
            due = plan.evaluates(progress.step, cfg)  # if so, the evaluation saves
            if stopping or not due and run.save_is_due(cfg.save_minutes):
                save("last.pt")
            if stopping:
                break


def evaluate_all(cfg: TrainConfig, plan: Plan, text: Text, model: LM, dist, stop, needs) -> dict | None:
    """{context length, or name of another text: measures on the whole validation split}; None if stopped
    halfway."""
    results, own = {}, (text.val, text.meta["splits"]["val"])
    tasks = {length: (length, *own) for length in (cfg.max_seq_len, *cfg.eval_lens)}
    tasks |= {name: (cfg.max_seq_len, *other) for name, other in text.others.items()}
    for key, (length, val, split) in tasks.items():
        # more fits without gradients: up to 2^14 tokens, or as many as in training
        tokens = needs.evaluated_at_once(plan.micro) * cfg.max_seq_len
        batch_size = max(1, min(tokens, max(plan.micro * cfg.max_seq_len, 2**14)) // length)
        results[key] = evaluate(model, val, split, length, batch_size, dist, plan.dtype, stop=stop)
        if results[key] is None:
            return None
        if not math.isfinite(results[key]["loss"]):
            raise NotFinite(f"validation loss {results[key]['loss']}; not saved")
    return results


def report(cfg: TrainConfig, plan: Plan, text: Text, model: LM, run: Run, progress: Progress, results: dict,
           speed: float) -> bool:
    """Update the progress with an evaluation, sample, log and draw. Returns whether it is the best so far."""
    step, others = progress.step, {name: results[name] for name in text.others}
    if progress.evaluated < 0:
        progress.first = {name: r["loss"] for name, r in others.items()}
    result = {"step": step, **results[cfg.max_seq_len], **on_others(others, progress.first)}
    better = result["loss"] < progress.best.get("loss", math.inf)
    train_loss = progress.loss_sum / (step - progress.evaluated) if step else None
    progress.bad_evals = 0 if better else progress.bad_evals + 1
    progress.best = result if better else progress.best
    progress.evaluated, progress.loss_sum = step, 0.0
    if step == plan.steps:
        progress.ended = "finished"
    elif cfg.patience and progress.bad_evals >= cfg.patience:
        progress.ended = "early stop"
    if not run.dist.is_main:
        return better
    samples = continue_prompts(model, text.tok, cfg, run.dist.device)
    tokens, epoch = step * cfg.batch_size * cfg.max_seq_len, step * cfg.batch_size / plan.per_epoch
    losses = {n: r["loss"] for n, r in results.items() if n not in others}
    by_length = {"val_loss_by_length": {str(n): v for n, v in losses.items()}} if cfg.eval_lens else {}
    run.metrics(step=step, tokens=tokens, epoch=epoch, mean_train_loss=train_loss,
                **{f"val_{k}": v for k, v in result.items() if k != "step"}, **by_length, samples=samples,
                seconds=round(run.seconds, 3))
    say(f"step {step:>7,}  epoch {epoch:6.2f} | "
        + (f"train {train_loss:.4f}" if step else f"{'before':<12}") + f" | val {result['loss']:.4f}"
        f"{'*' if better else ' '} {measures_text(result)}"
        + f" | {plan.speed_text(cfg, speed, run.dist.device)}" * (step > 0))
    for name in others:
        lost = f", {result[f'{name}_forgotten']:+.4f} since step 0" * (name in progress.first)
        say(f"              {name}: loss {result[f'{name}_loss']:.4f}{lost}")
    if cfg.eval_lens:
        say("              loss by context length: " + ", ".join(f"{n}: {v:.4f}" for n, v in losses.items()))
    for i, shares in enumerate(result.get("expert_usage", [])):
        say(f"              layer {i + 1}: tokens per expert " + " ".join(f"{share:.0%}" for share in shares))
    for prompt, continuation in samples.items():  # on one line here, verbatim in samples.txt
        say(f"              {prompt}|{' '.join(continuation.split()):.180}")
    rows = read_rows(run.path("metrics.jsonl"))
    write_samples(rows, run.path("samples.txt"))
    draw_losses(rows, f"{cfg.name}: {model.count_parameters()['total']:,} parameters", run.path("loss.png"),
                text.others)
    return better


def on_others(others: dict, first: dict) -> dict:
    """Measures on other texts, as the log and the ledger name them; `forgotten` is the loss gained since
    step 0, in nats per token."""
    out = {}
    for name, r in others.items():
        out |= {f"{name}_{key}": r[key] for key in ("loss", "bits_per_byte")}
        if name in first:
            out[f"{name}_forgotten"] = r["loss"] - first[name]
    return out


# ------------------------------------------------------------------------------------------------------------
# Main


def main(cfg: TrainConfig) -> dict:
    """Train, resume or plan. Returns the summary, which for a run that ended is its ledger row."""
    with distributed.setup(cfg.device) as dist:
        without_data = cfg.dry_run and (cfg.vocab_size or cfg.init_from) and not os.path.exists(cfg.data)
        text = None if without_data else open_texts(cfg)
        cfg = cfg.resolved(text.meta if text else None)
        if dist.device.type == "cpu" and not cfg.checkpoint_activations:  # it costs up to a quarter of memory
            distributed.keep_freed_memory()
        room = fit.room_for(cfg.memory_gb, dist)
        fit.refuse_hopeless(make_model, cfg, room * (4 if cfg.micro_batch_size else 1), cfg.batch_size,
                            fit.states_of(cfg), cfg.dry_run)
        needs = fit.Needs(make_model, cfg, distributed.choose_dtype(cfg.dtype, dist.device)[0], dist.device)
        if cfg.dry_run:
            plan = plan_run(cfg, dist, text, needs, room)
            say("\n".join(plan.notes))
            return {"parameters": needs.model.count_parameters(), **asdict(plan)}
        meta = text.meta
        with Run(cfg, dist, "train", meta["tokenizer"], cfg.data_sha256(meta)) as run, \
                StopRequest(cfg.max_minutes) as stop:
            saved = run.find()
            if saved and cfg.epochs < 0:  # not given, so as at the start of the run
                run.cfg = cfg = replace(cfg, epochs=saved["config"]["epochs"])
            began = saved["progress"] if saved else {}
            plan = plan_run(cfg, dist, text, needs, room, began.get("micro", 0), began.get("fitting", 0))
            if dist.is_main:
                say("\n".join(plan.notes))
            model, optimizer, scaler, progress = begin(cfg, plan, text, run, saved)
            del saved
            try:
                train(cfg, plan, text, model, optimizer, scaler, run, progress, stop, needs)
            except NotFinite as e:
                message = f"not finite at step {progress.step + 1:,}: {e}\n{way_back(cfg, run)}"
                raise UserError(message) from None
            return finish(cfg, plan, run, progress, model)


def begin(cfg: TrainConfig, plan: Plan, text: Text, run: Run, saved: dict | None):
    """(model, optimizer, scaler, progress), new or as saved."""
    progress = Progress()
    torch.manual_seed(cfg.seed)
    source = checkpoint.load(cfg.init_from, mmap=True) if cfg.init_from and not saved else None
    model, optimizer, scaler = make_all(cfg, plan, text, run.dist, source)
    if saved:
        run.restore(saved, model, optimizer, scaler)
        names = [f.name for f in fields(Progress)]
        progress = Progress(**{name: saved["progress"][name] for name in names if name in saved["progress"]})
    elif source:
        if cfg.carry_optimizer:
            carry_moments(optimizer, source, cfg.init_from, cfg.optimizer)
        progress.evaluated = -1  # the curve begins with what was there
    progress.micro, progress.fitting = plan.micro, plan.fitting
    # for an export: what its config.json and others said, and that it stops where answers end
    answers = {"chat": True} if isinstance(text.train, Chats) else {}
    run.data["pretrained"] = (saved or source or {}).get("pretrained", {}) | answers
    run.begin(saved, lambda row: row["step"] <= (progress.evaluated if "val_loss" in row else progress.step))
    if run.dist.is_main:
        text.tok.save(run.folder)  # so that the run folder is enough for sampling
        say(f"{'resuming' if saved else 'starting':<11} {run.folder} at step {progress.step:,} of "
            f"{plan.steps:,}" + (f", {progress.ended}" if progress.ended else ""))
    return model, optimizer, scaler, progress


def finish(cfg: TrainConfig, plan: Plan, run: Run, progress: Progress, model: LM) -> dict:
    """Print the summary and return it; if the run has ended, add it to the ledger."""
    n, tokens = model.count_parameters(), progress.step * cfg.batch_size * cfg.max_seq_len
    row = run.finish(progress.ended or "stopped", dtype=plan.dtype, result=progress.best, counts={
        "steps": progress.step, "tokens": tokens, "epochs": progress.step * cfg.batch_size / plan.per_epoch,
        "parameters": n["total"], "parameters_non_embedding": n["non_embedding"], "sessions": run.sessions})
    if progress.ended and cfg.lora_merge and run.dist.is_main:
        best = checkpoint.load(run.path("best.pt"), keys=("model", "config", "tokenizer"))
        config = best["config"] | {"lora_rank": 0, "lora_merge": False}
        kept = {key: best[key] for key in ("tokenizer", "pretrained") if key in best}
        kept |= {"model": lora.merged(best["model"]), "config": config}
        checkpoint.save(run.path("merged.pt"), kept)
    if progress.ended and run.dist.is_main:
        say(f"{progress.ended}: {progress.step:,} steps, {tokens:,} tokens, "
            f"{run.seconds / 60:.1f} minutes of training, {tokens / max(run.seconds, 1e-9):,.0f} tok/s\n"
            f"best at step {progress.best['step']:,}: validation loss {progress.best['loss']:.4f}, "
            f"{measures_text(progress.best)}\nin {run.folder}: best.pt, last.pt, metrics.jsonl, loss.png; "
            f"look at it with:  python sample.py {run.folder}")
    elif run.dist.is_main:
        say(f"stopped at step {progress.step:,} of {plan.steps:,} and saved in {run.folder}; "
            f"continue with:  {resume_command()}")
    return row


if __name__ == "__main__":
    launch(main, TrainConfig)
