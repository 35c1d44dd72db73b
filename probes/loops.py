"""The loops of loop_train.py: in what order, which facts are written when, what is asked.

Shapes: K loops, P probed steps, Q questions, F other facts, R rows of a loop's text, T tokens, A answers
"""
import re

from common import probing
from common.config import UserError
from common.data import Text, Windows
from common.distributed import autocast
from common.facts import TRAINED, Fact, World, conflicts, find_leaks, new_pairs
from probes.base import CPU

import numpy as np
import torch

TEXT_ROWS = 8  # of each loop, whose loss is asked


class Loops:
    """One seed of one arm."""

    def __init__(self, cfg, world: World, facts: dict[str, list[Fact]], x, y, seed: int):
        self.cfg, self.seed, self.x, self.y = cfg, seed, x, y  # (blocks, R, T)
        self.questions, self.written, self.controls = (facts[k] for k in ("questions", "written", "controls"))
        self.answers = world.answers
        self.order = order_of(cfg, seed)  # of segments: the loop, -1 for none of them
        self.blocks = [k if k >= 0 else cfg.loops + g for g, k in enumerate(self.order)]
        self.writes = [g < cfg.cycles * cfg.loops or k == cfg.loops for g, k in enumerate(self.order)]
        self.length, self.shares = len(self.order) * cfg.segment, cfg.start != "none"
        self.due, self.log = {}, []  # {step: [(fact, wording)]}, [(step, fact)]
        self.plan()
        offsets = {round(i * cfg.segment / cfg.probes) for i in range(cfg.probes)}
        offsets |= {2} if cfg.probes > 1 else set()  # soon after a switch
        self.asks = {g * cfg.segment + o for g in range(len(self.order)) for o in offsets} | {self.length}
        last = (cfg.cycles - 1) * cfg.loops
        self.cues = {(last + i) * cfg.segment for i in range(cfg.loops)} if self.questions else set()
        self.told = {id(f) for _, f in self.log}  # the facts of a loop that never comes are not written
        self.lessons = [(f, f.order[0]) for i, f in enumerate(self.written)
                        if self.is_own(f) and i % 2 == 0]
        self.last_ask = self.length + bool(self.lessons)

    @property
    def facts(self) -> list[Fact]:
        return [*self.questions, *self.written, *self.controls]

    def is_own(self, fact: Fact) -> bool:
        """Whether it is one loop's own and was written."""
        return fact.group.startswith("own") and id(fact) in self.told

    def plan(self) -> None:
        """Fill in what is written when: `exposures` times in a segment, at the fact's phase."""
        cfg, times, said = self.cfg, {}, []
        S, phases = cfg.segment, cfg.phases
        for g, loop in enumerate(self.order):
            n = times[loop] = times.get(loop, -1) + 1  # so often has this loop come
            for i, f in enumerate([*self.questions, *self.written]) if self.writes[g] else ():
                if f.loop != loop and not (f.group == "shared" and 0 <= loop < cfg.loops):
                    continue
                begin = g * S + min(S - cfg.exposures, int(phases[f.pair % len(phases)] * S))
                said += [(begin + j, i, f, f.order[(n * cfg.exposures + j) % TRAINED])
                         for j in range(cfg.exposures)]
        if cfg.order == "mixed":  # as often, anywhere in the cycle
            rng = np.random.default_rng((self.seed, 32))
            said = [(int(cycle * cfg.cycle + rng.integers(cfg.cycle)), i, f,
                     f.order[(cycle * cfg.exposures + j) % TRAINED])
                    for cycle in range(cfg.cycles) for i, f in enumerate([*self.questions, *self.written])
                    for j in range(cfg.exposures * (cfg.loops if f.group == "shared" else 1))]
        for step, _, fact, wording in sorted(said, key=lambda what: what[:2]):
            self.due.setdefault(step, []).append((fact, wording))
            self.log.append((step, fact))

    def loop_at(self, step: int) -> int:
        """The loop whose segment a step is in; -1 if it is none's."""
        return self.order[min(step, self.length - 1) // self.cfg.segment]

    def loop_of_row(self, step: int, rows: int) -> np.ndarray:
        """The block of text (rows,) that each row of a batch is from."""
        if self.cfg.order == "mixed":
            return np.random.default_rng((self.seed, 31, step)).integers(self.cfg.loops, size=rows)
        return np.full(rows, self.blocks[step // self.cfg.segment])

    # what is asked, in this order: questions, written facts, controls

    def prepare(self, world: World, cue: bool, device) -> list:
        """Batches of probes; `cue`: of questions after text of each loop."""
        if not cue:
            asked = [*self.questions[:self.cfg.questions], *self.written, *self.controls]
            probes = [world.ask(f, "mem", *world.prompt(f, f.order[0])) for f in asked]
        else:
            half, questions = self.x.shape[2] // 2, self.questions[:self.cfg.questions]
            probes = [world.ask(f, "mem", *world.prompt(f, f.order[0]), self.x[k, i % self.x.shape[1], :half])
                      for k in range(self.cfg.loops) for i, f in enumerate(questions)]
        return probing.batches(probes, world.tok.eot, device) if probes else []

    def choices(self, scores: np.ndarray) -> np.ndarray:
        """log p (Q, K + 1) of each loop's answer to the questions, and of the foil, from (Q, A)."""
        Q, K = self.cfg.questions, self.cfg.loops
        columns = np.array([[self.answers.index(self.questions[k * Q + i].answer) for k in range(K)]
                            + [self.answers.index(self.questions[i].old)] for i in range(Q)], dtype=int)
        return np.take_along_axis(scores[:Q], columns.reshape(Q, K + 1), axis=1)

    def read(self, scores: np.ndarray) -> dict:
        """A row of probes.jsonl, from log p (Q + 2 F, A)."""
        Q, n = self.cfg.questions, len(self.written)
        choices, best = self.choices(scores), scores[:Q].argmax(axis=1)
        own = np.array([self.answers.index(f.answer) for f in (*self.written, *self.controls)], dtype=int)
        found = scores[Q:][np.arange(2 * n), own].round(5).tolist()
        said = [[self.questions[k * Q + i].answer for k in range(self.cfg.loops)] for i in range(Q)]
        guess = [of.index(self.answers[b]) if self.answers[b] in of else -1
                 for of, b in zip(said, best, strict=True)]
        return {"choices": choices.round(5).tolist(), "guess": guess, "facts": found[:n],
                "controls": found[n:]}

    def read_cues(self, scores: np.ndarray) -> list:
        """(K prefixes, Q, K + 1)"""
        Q = self.cfg.questions
        return [self.choices(scores[k * Q:(k + 1) * Q]).round(5).tolist() for k in range(self.cfg.loops)]

    def recall(self, row: dict) -> list[float]:
        """Share of the questions whose most probable answer is each loop's."""
        return [float(np.mean([g == k for g in row["guess"]])) for k in range(self.cfg.loops)] \
            if row.get("guess") else []

    def covered(self, asked: list[int], reached: int) -> bool:
        """Whether all rows up to the step `reached` were logged; an arm may begin at its new loop."""
        first = self.cfg.new_at if self.shares and min(asked, default=0) >= self.cfg.new_at else 0
        return all(s in asked for s in self.asks if first <= s < reached)


def order_of(cfg, seed: int) -> list[int]:
    """The loop of each segment; -1 for text of no loop. A new loop, number K, comes after the cycles."""
    rng, K, out = np.random.default_rng((seed, 30)), cfg.loops, []
    for cycle in range(cfg.cycles + cfg.tail):
        loops = list(range(K))
        if cfg.order == "shuffled":
            loops = rng.permutation(K).tolist()
        elif cfg.order == "random":
            for i in range(K):
                before = loops[i - 1] if i else out[-1] if out else -1
                loops[i] = int(rng.choice([k for k in range(K) if k != before]))
        elif cfg.order == "reversed" and cycle >= (cfg.cycles + 1) // 2:
            loops.reverse()
        elif cfg.order == "mixed":
            loops = [-1] * K
        elif cfg.order == "single":
            loops = [0] + [-1] * (K - 1)
        out += [K] * (cycle == cfg.cycles and cfg.start != "none") + loops
    return out + [K] * (not cfg.tail and cfg.start != "none")


def make_loops(cfg, world: World, pool: list[Fact], text: Text, seed: int) -> Loops:
    """Facts and texts of one seed."""
    K, new, avoid = cfg.loops, cfg.start != "none", set()
    while cfg.questions:
        questions = conflicts(world, cfg.questions, K, seed, pool, avoid)
        found = find_leaks(world, questions, text.train)
        if not found:
            break
        avoid |= {f.subject for f in questions if f.id in found}
    else:
        questions = []
    questions = [f for k in range(K) for f in questions if f.loop == k]
    groups = [(k, f"own{k}") for k in range(K + new) for _ in range(cfg.own)] + [(-2, "shared")] * cfg.shared
    pairs = new_pairs(world, len(groups), seed, [*pool, *questions], text.train, avoid)[0] if groups else []
    for f in pairs:
        f.loop, f.group = groups[f.pair]
        f.group = "new" if f.loop == K else f.group
    n = len(groups)
    facts = {"questions": questions, "written": pairs[:n], "controls": pairs[n:2 * n]}
    windows = Windows(getattr(text, cfg.text_split), cfg.max_seq_len, 1000 + seed)
    rows, blocks = cfg.rows or cfg.segment * cfg.batch_size, K + new
    if cfg.order == "single":
        blocks += (cfg.cycles + cfg.tail) * K
    if cfg.rows and blocks * rows > windows.per_epoch:
        raise UserError(f"{blocks} loops of {rows} rows need {blocks * rows:,} rows of {cfg.max_seq_len} "
                        f"tokens, but the {cfg.text_split} text has {windows.per_epoch:,}; use fewer --rows "
                        "or --loops")
    x, y = (z.numpy().reshape(blocks, rows, -1) for z in windows.batch(0, blocks * rows, CPU))
    loops = Loops(cfg, world, facts, x, y, seed)
    for step, said in loops.due.items():
        sentences = sum(map(len, world.sentences(said)))
        if sentences > cfg.batch_size * cfg.max_seq_len // 2:
            raise UserError(f"step {step} writes {len(said)} facts, {sentences} tokens: more than half of "
                            f"the batch; use more --phases, fewer facts or a larger --batch_size")
    return loops


def text_of(loops: Loops, device) -> list:
    """The first rows of each loop's text: inputs and targets (K, rows, T)."""
    return [torch.from_numpy(z[:loops.cfg.loops, :TEXT_ROWS]).to(device) for z in (loops.x, loops.y)]


@torch.inference_mode()
def row_losses(model, loops: Loops, device, dtype: str) -> list[float]:
    """The mean loss on each loop's text, in nats per token."""
    K, training = loops.cfg.loops, model.training
    x, y = (z.flatten(0, 1) for z in text_of(loops, device))  # (K rows, T)
    model.eval()
    with autocast(dtype, device):
        hidden = model.hidden(x)
    logits = model.head(hidden.float()).transpose(1, 2)  # (rows, V, T)
    losses = torch.nn.functional.cross_entropy(logits, y, reduction="none")
    model.train(training)
    return losses.view(K, -1).mean(dim=1).double().cpu().numpy().round(5).tolist()


def find_parts(cfg, model) -> list[list]:
    """For each of cfg.parts the parameters that it does not train."""
    patterns = {"ffn": r"\.ff(_norm)?\.", "attention": r"\.mixer(_norm)?\.", "adapter": r"\.adapter\."}
    out = []
    for part in cfg.parts:
        word = part.removeprefix("not-")
        pattern = patterns.get(word, rf"^trunk\.(layers\.)?{word}\." if word.isdigit() else None)
        inside = {name for name, _ in model.named_parameters() if pattern and re.search(pattern, name)}
        if not inside:
            raise UserError(f"parts={part}: this model has none such; expected the number of a block, "
                            f"{', '.join(patterns)}, or one of them after not-")
        out.append([p for name, p in model.named_parameters() if (name in inside) == part.startswith("not-")])
    return out
