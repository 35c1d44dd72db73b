"""Two learners held at a target cosine; what the optimiser makes of it; and learning rates that differ.

    python optimizer_probe.py                               # 50 targets from -1 to 1, digits, SGD
    python optimizer_probe.py config/steer_adam.py          # steered before Adam: the updates do not follow
    python optimizer_probe.py config/steer_adam.py --steer=update --name=steer_update
    python optimizer_probe.py --steer=displacement --name=displacement
    python optimizer_probe.py config/steer_text.py          # a small language model on real text
    python optimizer_probe.py config/rates.py               # learning rates by entry, tensor and depth
    python optimizer_probe.py --cost                        # a steered step against two plain ones

Learners A and B take turns. A's step is plain. B's is turned, with its norm kept, until it has the target
cosine with A's: what is turned is said by --steer.

grad          B's gradient, against A's. B's optimiser sees what was turned, as in most published methods
              (GradVac, 2010.05874). Adam rescales it by moments of other gradients, and the cosine is lost.
update        the change that B's optimiser makes from its raw gradient, against A's last change: whatever the
              optimiser, and its moments never see a turned gradient (why that matters: 2604.22407).
displacement  two networks from a common start: B's way from there, against A's. Never the weights themselves,
              whose cosine is near 1 because of the common start.

The law. Turning a gradient g from its own cosine phi to c leaves cos(arccos phi - arccos c) of the decrease
of B's loss, to first order. Along the unsteered run each target's step is tried, and the decrease of the loss
on B's batch is measured: for a step so small that first order is all there is, and for the whole one. Halves
of a batch agree in their gradient only up to a cosine, too: targets above it are marked "not measurable".

The text needs prepare_data.py, the digits scikit-learn. out/NAME/ gets probes.jsonl (one line per finished
run), summary.json, table.md and effect.png. The same command resumes.
"""
import copy
import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import Literal

from common import fit
from common.config import UserError, launch
from common.console import StepBar, resume_command, say
from common.data import open_text
from common.distributed import Dist, autocast, choose_dtype, keep_freed_memory, setup
from common.files import write_json
from common.run import Run, RunConfig, digest, finite
from common.steering import cosines, law, products, steered
from common.step import check_gradients
from common.stop import StopRequest
from model import LM, ModelConfig
from muon import OPTIMIZERS, OptimizerConfig, make_optimizer, set_learning_rates
from probes.base import named
from probes.effects import write_report
from probes.rates import in_turns, rates
from probes.steer_report import analyse, draw, table_of, words_of
from probes.tasks import TASKS, Task, gradient_of, plain_sgd, prepared

import numpy as np
import torch
import torch.nn.functional as F
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

# ------------------------------------------------------------------------------------------------------------
# Config

LR = {"sgd": 0.05}  # where lr is 0; other optimisers: 1e-3
PROFILES = ("entries", "tensors", "rising", "falling", "scaled")
MOST = 10_000  # seeds, targets: beyond any use
EMA = 0.9  # decay of the averaged reference
EVERY = 10  # steps between measured cosines
TINY = 1e-5  # of the loss: the decrease for which a small step of the law is made


@dataclass
class SteerConfig(RunConfig, OptimizerConfig, ModelConfig):
    MAY_CHANGE = {"seeds", "seed", "bound", "cost"}
    # experiment
    study: Literal["steer", "rates"] = "steer"  # steer | rates
    task: Literal["digits", "text"] = "digits"  # digits (8 x 8 images, an MLP) | text (a language model)
    data: str = "data/shakespeare"  # text: the folder made by prepare_data.py
    seeds: int = 4  # seed, seed + 1, ...: other weights, other batches
    steps: int = 100  # of each learner
    batch_size: int = 64  # images or rows of text per step
    # steering
    steer: Literal["grad", "update", "displacement"] = "grad"  # grad | update | displacement
    scope: Literal["global", "tensor"] = "global"  # the whole vector | each tensor by its counterpart
    targets: int = 50  # cosines, evenly from -1 to 1
    reference: Literal["last", "ema"] = "last"  # A's last gradient or change | its moving average
    split: Literal["same", "classes"] = "same"  # both see all digits | A sees 0-4, B sees 5-9
    points: int = 5  # of the unsteered run, at which the law is measured
    cost: bool = False  # time a steered step of both learners against two plain ones, and stop
    # rates
    profiles: tuple[Literal[PROFILES], ...] = PROFILES  # entries | tensors | rising | falling | scaled
    fraction: float = 0.1  # of entries or tensors that learn at the other rate
    factor: float = 10.0  # times the learning rate; by depth from 1 / factor to factor
    # verdict
    bound: float = 0.02  # nats below which an effect on the test loss counts as none
    # optimiser: defaults that differ from train.py's
    optimizer: Literal[tuple(OPTIMIZERS)] = "sgd"  # sgd | adamw | muon (with adamw for non-matrices)
    lr: float = 0.0  # peak learning rate; 0 = 0.05 for sgd, else 1e-3
    momentum: float = 0.0  # of sgd, in place of beta1
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "constant"  # cosine | linear | constant | wsd
    weight_decay: float = 0.0  # of matrices and an untied head
    grad_clip: float = 0.0  # largest gradient norm, before steering; 0 = no clipping
    # model of the text, run and machine: defaults that differ from train.py's
    max_seq_len: int = 64  # tokens T of a row
    pos: Literal["learned", "rope", "none"] = "rope"  # learned | rope (no length limit) | none
    name: str = "steer"  # the folder in out_dir
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # of matmuls

    def problems(self) -> list[str]:
        out = super().problems() + self.at_least(1, "seeds", "steps", "points") + self.at_least(
            2, "targets", "batch_size")
        out += [f"{key}={getattr(self, key):,} is more than {MOST:,}, the most there can be"
                for key in ("seeds", "targets") if getattr(self, key) > MOST]
        out += [f"{key} must be above 0, got {getattr(self, key)}" for key in ("bound", "factor")
                if not getattr(self, key) > 0]
        if not 0 < self.fraction < 1:
            out.append(f"fraction must be between 0 and 1, got {self.fraction}")
        if not 0 <= self.momentum < 1:
            out.append(f"momentum must be at least 0 and below 1, got {self.momentum}")
        if self.steer == "displacement" and self.reference == "ema":
            out.append("steer=displacement is against where A is: use --reference=last")
        if self.split == "classes" and self.task != "digits":
            out.append(f"split=classes is for --task=digits, not {self.task}")
        if self.study == "rates" and (self.cost or not self.profiles):
            out.append("study=rates needs profiles, and always says what they cost: leave out --cost")
        if self.dtype == "fp16":
            out.append("dtype=fp16 needs scaled gradients, whose overflow would be steered; use bf16 or fp32")
        return out

    def derive(self) -> None:
        self.lr = self.lr or LR.get(self.optimizer, 1e-3)

    @property
    def aims(self) -> list[float]:
        return [round(float(c), 6) for c in np.linspace(-1, 1, self.targets)]

    @property
    def stops(self) -> set[int]:
        """Steps at which the law is measured."""
        return {round(s) for s in np.linspace(0, self.steps - 1, min(self.points, self.steps))}


# ------------------------------------------------------------------------------------------------------------
# Two learners


@torch.no_grad()
def difference(after: list, before: list) -> list:
    return [a - b for a, b in zip(after, before, strict=True)]


class Pair:
    """Learners A (0) and B (1): two optimisers of one network, or for displacements two networks."""

    def __init__(self, cfg: SteerConfig, model, seed: int, dist: Dist):
        self.cfg, self.dist, self.dtype = cfg, dist, choose_dtype(cfg.dtype, dist.device)[0]
        twin = copy.deepcopy(model) if cfg.steer == "displacement" else model
        self.models = [prepared(cfg, m, dist) for m in (model, twin)]
        self.params = [list(m.parameters()) for m in self.models]
        self.optimizers = [make_optimizer(m, plain_sgd(cfg)) for m in self.models]
        self.origin = self.weights(0)
        self.generator = torch.Generator(dist.device).manual_seed(seed)  # for directions where there is none
        self.reference = None

    def gradient(self, who: int, batch) -> list:
        return gradient_of(self.cfg, self.models[who], batch, self.dist, self.dtype)

    @torch.no_grad()
    def weights(self, who: int) -> list:
        """A copy: of each tensor, or with scope "global" one vector, since a call per tensor is what small
        networks spend time on. (torch joins and cuts gradients so for its own DistributedDataParallel.)"""
        if self.cfg.scope == "tensor":
            return [p.clone() for p in self.params[who]]
        return [_flatten_dense_tensors(self.params[who])]

    def apply(self, who: int, step: int, keep: bool) -> list | None:
        """The optimiser's step, with the gradients as they are. Returns the weights before it if asked."""
        before = self.weights(who) if keep else None
        set_learning_rates(self.optimizers[who], self.cfg, step, self.cfg.steps)
        self.optimizers[who].step()
        return before

    def first(self, step: int, batch, log: bool = False) -> None:
        """A's step. Keeps what B is turned against and, with `log`, what B is compared with."""
        steer = self.cfg.steer
        gradient = self.gradient(0, batch)
        if step == 0:
            check_gradients(self.models[0])
        before = self.apply(0, step, log or steer == "update")
        self.of_a = {"grad": gradient if log or steer == "grad" else None,  # else its memory is used again
                     "update": before and difference(self.weights(0), before)}
        if steer == "displacement":
            self.reference = difference(self.weights(0), self.origin)
        elif self.reference is None or self.cfg.reference == "last":
            self.reference = self.of_a[steer]
        else:
            self.reference = [new.lerp(r, EMA) for new, r in zip(self.of_a[steer], self.reference,
                                                                 strict=True)]

    def second(self, step: int, batch, target: float | None, log: bool = False) -> dict[str, tuple]:
        """B's step, turned unless `target` is None. With `log`: {kind: (B's vector, A's)}, as applied."""
        steer, params = self.cfg.steer, self.params[1]
        gradient = self.gradient(1, batch)
        if steer == "grad" and target is not None:
            gradient = steered(gradient, self.reference, target, self.cfg.scope, self.generator)
            for p, g in zip(params, gradient, strict=True):
                p.grad = g
        before = self.apply(1, step, log or steer == "update")
        if steer != "grad" and target is not None:
            self.turn_way_from(before if steer == "update" else self.origin, target)
        if not log:
            return {}
        found = {"grad": (gradient, self.of_a["grad"]),
                 "update": (difference(self.weights(1), before), self.of_a["update"])}
        if steer == "displacement":
            found[steer] = (difference(self.weights(1), self.origin), self.reference)
        return found | {steer: (found[steer][0], self.reference)}

    @torch.no_grad()
    def turn_way_from(self, start: list, target: float) -> None:
        """Write B's weights so that their way from `start` has the target cosine with the reference."""
        way = difference(self.weights(1), start)
        turned = steered(way, self.reference, target, "tensor", self.generator)  # of the vectors they are
        new = [s + t if t is not w else None for s, w, t in zip(start, way, turned, strict=True)]
        if self.cfg.scope == "global" and new[0] is not None:
            new = _unflatten_dense_tensors(new[0], self.params[1])
        changed = [(p, z) for p, z in zip(self.params[1], new, strict=False) if z is not None]
        if changed:  # the others are not even rounded
            torch._foreach_copy_(*map(list, zip(*changed, strict=True)))


# ------------------------------------------------------------------------------------------------------------
# The law


def tried(cfg: SteerConfig, pair: Pair, step: int, batch) -> dict:
    """What B's next step does to the loss of its batch, for each target. Decreases are divided by |gradient|
    |change|: 1 is the steepest descent with a change of that size. `law` is what cos(arccos phi - arccos c)
    makes of the unsteered step, `first` the first order of the change as it is made; `small` and `whole` are
    measured in float64, the first for a small multiple of the change."""
    device = torch.device("cpu") if pair.dist.device.type == "mps" else pair.dist.device  # has no float64
    x, y = (z.double().to(device) if z.is_floating_point() else z.to(device) for z in batch)
    model = copy.deepcopy(pair.models[1]).double().to(device)
    start = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def loss_after(change: list, size: float) -> float:
        for p, s, d in zip(model.parameters(), start, change, strict=True):
            p.copy_(s + size * d.double().to(device))
        logits = model(x)[0]  # LM's fused loss would be float32
        return F.cross_entropy(logits.flatten(0, -2), y.flatten()).item()

    def change_for(target: float | None) -> list:
        twin = copy.deepcopy(pair)
        twin.second(step, batch, target)
        return difference(twin.params[1], pair.params[1])

    gradient, raw = copy.deepcopy(pair).gradient(1, batch), change_for(None)
    [(gg, own, dd)] = products(gradient, raw, "global")
    loss, scale = loss_after(raw, 0.0), math.sqrt(gg * dd)
    small = TINY * loss / scale
    phis = cosines(gradient if cfg.steer == "grad" else raw, pair.reference, cfg.scope)
    shares = [d[1] for d in products(gradient, raw, cfg.scope)]
    out = {"law": [], "first": [], "small": [], "whole": []}
    for c in cfg.aims:
        change = change_for(c)
        out["law"].append(-sum(s * (1.0 if math.isnan(phi) else law(phi, c))
                               for s, phi in zip(shares, phis, strict=True)) / scale)
        out["first"].append(-products(gradient, change, "global")[0][1] / scale)
        for key, size in (("small", small), ("whole", 1.0)):
            out[key].append((loss - loss_after(change, size)) / (size * scale))
    return out | {"plain": -own / scale}


def halves_agree(pair: Pair, batch) -> float:
    """The cosine of the gradients of B's loss on the two halves of a batch."""
    half, twin = len(batch[0]) // 2, copy.deepcopy(pair)
    one, other = (twin.gradient(1, [z[part] for z in batch]) for part in (slice(half), slice(half, None)))
    return cosines(one, other, "global")[0]


# ------------------------------------------------------------------------------------------------------------
# Steering


def train(cfg: SteerConfig, task: Task, seed: int, target: float | None, run: Run, stop, bar) -> dict | None:
    """One run at one target; None: unsteered, and the law is measured on the way. None if asked to stop."""
    pair, cos, laws, halves, worst = Pair(cfg, task.make(seed), seed, run.dist), {}, [], [], 0.0
    for step in range(cfg.steps):
        if stop.agreed(run.dist):
            return None
        began, log = time.perf_counter(), step % EVERY == 0 or step == cfg.steps - 1
        pair.first(step, task.batch(seed, 0, step), log)
        batch = task.batch(seed, 1, step)
        if target is None and step in cfg.stops:
            halves.append(halves_agree(pair, batch))
            laws += [tried(cfg, pair, step, batch)] * (cfg.steer != "displacement")
        for kind, (mine, other) in pair.second(step, batch, target, log).items():
            found = [c for c in cosines(mine, other, cfg.scope) if not math.isnan(c)] or [math.nan]
            cos.setdefault(kind, []).append(statistics.fmean(found))
            if kind == cfg.steer and target is not None:
                worst = max(worst, *(abs(c - target) for c in found))
        run.seconds += time.perf_counter() - began
        bar.tick(time.perf_counter() - began)
        bar.show(f"seed {seed}, target {'none' if target is None else f'{target:+.2f}'}")
    losses, apart = compared(pair, task)
    return {"cosines": cos, "worst": worst, "losses": losses, "apart": apart, "laws": laws, "halves": halves}


@torch.no_grad()
def compared(pair: Pair, task: Task) -> tuple[list[float], float]:
    """(test losses of A and B on what they learn; KL divergence of B's outputs from A's, in nats)."""
    losses, outputs = [], []
    for model, (x, y) in zip(pair.models, task.tests, strict=True):
        model.eval()
        with autocast(pair.dtype, pair.dist.device):
            losses.append(model(x, y)[0].item())
            outputs.append(model(task.tests[0][0])[0].float().log_softmax(dim=-1).flatten(0, -2))  # (N, V)
        model.train()
    return losses, F.kl_div(outputs[1], outputs[0], log_target=True, reduction="batchmean").item()


def steer(cfg: SteerConfig, task: Task, run: Run, stop) -> tuple[dict, str] | None:
    """All targets and the unsteered run of all seeds: (summary, words), or None if asked to stop."""
    done, seeds = run.finished_parts(), range(cfg.seed, cfg.seed + cfg.seeds)
    todo = [(s, c) for s in seeds for c in ("none", *cfg.aims)]
    left = [part for part in todo if part not in done]
    with StepBar((len(todo) - len(left)) * cfg.steps, len(todo) * cfg.steps, True) as bar:
        for seed, c in left:
            with named(f"seed {seed}, target {c}"):
                row = train(cfg, task, seed, None if c == "none" else c, run, stop, bar)
            if row is None:
                return None
            run.finish_part((seed, c), row, done)
    found = analyse(cfg, {c: [done[s, c] for s in seeds] for c in ("none", *cfg.aims)})
    table = table_of(cfg, found)
    words = words_of(cfg, found)
    return write_report(run, table, words, lambda path: draw(cfg, found, path),
                        {**found, "counts": {"runs": len(todo), "steps": 2 * len(todo) * cfg.steps}})


# ------------------------------------------------------------------------------------------------------------
# Main


def resolved(cfg: SteerConfig, dist: Dist) -> SteerConfig:
    """With the vocabulary of the text; UserError for what cannot work."""
    if dist.world > 1:
        raise UserError("optimizer_probe.py trains in one process: start it with python, not with torchrun")
    if choose_dtype(cfg.dtype, dist.device)[0] == "fp16":
        raise UserError("this GPU would train in fp16, whose scaled gradients can overflow; use --dtype=fp32")
    if cfg.task != "text":
        return cfg
    n = open_text(cfg.data).meta["tokenizer"]["vocab_size"]
    cfg = replace(cfg, vocab_size=cfg.vocab_size or n, n_tokens=n)
    fit.refuse_hopeless(LM, cfg, fit.room_for(0.0, dist), cfg.batch_size, 2 * fit.states_of(cfg) + 2)
    return cfg


def cost_of(cfg: SteerConfig, task: Task, dist: Dist) -> str:
    """A step of A and a steered step of B, against the same without steering, in turns."""
    def mover(cfg, target):
        pairs = {}

        def move(i: int) -> None:
            step = i % cfg.steps
            if step == 0:  # or gradients would vanish, and denormal numbers are slow
                pairs[0] = Pair(cfg, task.make(cfg.seed), cfg.seed, dist)
            pairs[0].first(step, task.batch(cfg.seed, 0, step))
            if target is None:  # plain steps keep no gradient
                pairs[0].of_a = pairs[0].reference = None
            pairs[0].second(step, task.batch(cfg.seed, 1, step), target)
        return move

    plain = replace(cfg, steer="grad", reference="last")  # keeps nothing
    found = in_turns({"plain": mover(plain, None), "steered": mover(cfg, 0.3)})["steered"]
    return (f"cost        {cfg.task}, {cfg.optimizer}, {cfg.steer} steered ({cfg.scope}): "
            f"{statistics.median(found):.3f} times two plain steps ({min(found):.3f} to {max(found):.3f} in "
            f"{len(found)} rounds)")


def describe(cfg: SteerConfig) -> str:
    runs = (1 + (cfg.targets if cfg.study == "steer" else len(cfg.profiles))) * cfg.seeds
    what = f"{cfg.steer} steered ({cfg.scope}): ({cfg.targets} targets + unsteered)" \
        if cfg.study == "steer" else f"rates: (plain + {', '.join(cfg.profiles)})"
    return (f"experiment  {what} x {cfg.seeds} seeds = {runs:,} runs of {cfg.steps:,} steps of each learner\n"
            f"training    {cfg.task}, {cfg.batch_size} rows a step, {cfg.optimizer} lr {cfg.lr:g} "
            f"{cfg.schedule}, weight decay {cfg.weight_decay:g}")


def main(cfg: SteerConfig) -> dict:
    """Run or resume the experiment and report. Returns the summary, which is the ledger row."""
    with setup(cfg.device) as dist:
        cfg = resolved(cfg, dist)
        task = TASKS[cfg.task](cfg, dist.device)
        say(describe(cfg))
        if cfg.dry_run:
            return {"status": "planned"}
        if dist.device.type == "cpu":
            keep_freed_memory()
        if cfg.task == "digits":
            torch.set_num_threads(1)  # on such a network two threads mostly wait for each other
        if cfg.cost:
            say(cost_of(cfg, task, dist))
            return {"status": "timed"}
        with Run(cfg, dist, "optimizer_probe", task.tokenizer, task.sha256) as run, StopRequest() as stop:
            done = {"steer": steer, "rates": rates}[cfg.study](cfg, task, run, stop)
            if done is None:
                say(f"stopped and saved in {run.folder}; continue with:  {resume_command()}")
                return run.finish("stopped", {}, {}, cfg.dtype)
            summary, words = done
            counts = summary.pop("counts")  # with times, which differ between machines
            write_json(run.path("summary.json"), finite({"experiment": cfg.study, **summary}))
            say(words)
            run.id = digest(finite(summary))
            return run.finish("finished", counts, summary, choose_dtype(cfg.dtype, dist.device)[0])


if __name__ == "__main__":
    launch(main, SteerConfig)
