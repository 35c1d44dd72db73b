"""The artefact lab of memory_probe.py: set-ups that made folklore, beside the ones that measure.

    python memory_probe.py config/probe_artefacts.py                          # all of them, and one page
    python memory_probe.py config/probe_artefacts.py --artefacts=fresh_adam   # one

Each function trains or reads the same base twice, the misleading way and the clean way, and returns what each
would have reported. Nothing here is a straw man: every set-up was used in earnest (the notes behind nanoMem).
"""
import itertools

from common import probing
from common.config import UserError
from common.data import Windows
from common.distributed import choose_dtype
from common.facts import Probe, new_pairs, pack
from common.step import backward, update
from common.tables import grid, new_figure, save_figure
from muon import set_learning_rates
from probes.base import background, bases_of, load_base, named, pool_of, split_batch
from probes.effects import describe, write_report

import numpy as np
import torch

# ------------------------------------------------------------------------------------------------------------
# One step, and what it is asked


class Lab:
    """A copy of the base in training, with facts to write and to ask."""

    def __init__(self, cfg, text, world, base, seed: int, dist):
        self.cfg, self.text, self.world, self.dist, self.seed = cfg, text, world, dist, seed
        self.dtype = choose_dtype(cfg.dtype, dist.device)[0]
        self.model, self.optimizer = load_base(cfg, base, dist, carry=True)
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=self.dtype == "fp16")
        self.windows = Windows(text.train, cfg.max_seq_len, 1000 + seed)
        self.steps, self.moved = 0, []  # the root mean square by which each step moved the weights

    def train(self, written=None, lr_scale: float = 1.0) -> float:
        """One step on background text, some of whose rows are `written`; returns its loss."""
        x, y = background(self.windows, self.steps, self.cfg)
        if written:
            x[:len(written[0])], y[:len(written[0])] = written
        return self.step(x, y, lr_scale)

    def step(self, x, y, lr_scale: float = 1.0) -> float:
        before = [p.detach().clone() for p in self.model.parameters()]
        set_learning_rates(self.optimizer, self.cfg, self.steps, 10**6)
        for group in self.optimizer.param_groups:
            group["lr"] *= lr_scale
        batches = split_batch(x, y, self.cfg, self.dist)
        loss = backward(self.model, batches, self.dist, self.dtype, self.scaler)
        update(self.model, self.optimizer, self.scaler, self.cfg.grad_clip, loss)
        squares = sum(float((p.detach() - b).square().sum())
                      for p, b in zip(self.model.parameters(), before, strict=True))
        self.moved.append((squares / sum(b.numel() for b in before)) ** 0.5)
        self.steps += 1
        return loss.item()

    def ask(self, probes: list) -> probing.Scores:
        prepared = probing.batches(probes, self.world.tok.eot, self.dist.device)
        return probing.score(self.model, prepared, self.world.answer_ids, "fp32")


def two_sets(lab: Lab, pool) -> tuple[list, list]:
    """(facts to write, facts never written), 32 each."""
    facts = new_pairs(lab.world, 32, lab.seed, pool, lab.text.train)[0]
    return facts[:32], facts[32:64]


def mem_probes(world, facts) -> list:
    return [p for f in facts for p in world.probes(f) if p.kind == "mem"]


# ------------------------------------------------------------------------------------------------------------
# The artefacts. Each returns {"artefact": number, "clean": number, "unit": text, "says": text, "curves":
# lists}.

AFTER = (0, 1, 2, 3, 5, 8, 13, 21, 34, 60)  # steps of other text at which facts are asked


def fresh_adam(new_lab, pool) -> dict:
    """A new AdamW for the text after the injection: its first steps move every weight by about the learning
    rate, and what they destroy, of facts never written too, is taken for forgetting."""
    curves, lost = {}, {}
    for mode in ("new optimiser", "new, warm-up", "carried"):
        lab = new_lab()
        written, never = two_sets(lab, pool)
        probes, said = mem_probes(lab.world, written + never), []
        for _ in range(8):
            lab.train()
        for e in range(8):
            sentences = lab.world.sentences([(f, f.order[e]) for f in written])
            lab.train(pack(sentences, lab.cfg.max_seq_len, lab.world.tok.eot))
        if mode != "carried":
            lab.optimizer.state.clear()
        for t in range(AFTER[-1] + 1):
            if t in AFTER:
                said.append(lab.ask(probes).logp)
            lab.train(lr_scale=min(1.0, (t + 1) / 20) if mode == "new, warm-up" else 1.0)
        curves[mode], curves[f"{mode}: never written"] = (
            np.array(said)[:, part].mean(axis=1).tolist() for part in (slice(32), slice(32, 64)))
        lost[mode] = curves[mode][0] - curves[mode][-1]
        curves[f"{mode}: step RMS"] = lab.moved[-AFTER[-1]:]
    first, late = curves["new optimiser: step RMS"][0], curves["carried: step RMS"][0]
    return {"artefact": lost["new optimiser"], "clean": lost["carried"], "curves": curves, "unit": "nats",
            "says": f"log p lost in {AFTER[-1]} steps of other text; the first of them moves weights "
                    f"{first / late:.1f}x as far as with carried state"}


def sampled_accuracy(new_lab, pool) -> dict:
    """Accuracy by sampling (T 0.7, top-k 50), a hit being the answer anywhere in prompt and output: noisy,
    and right for facts nobody wrote. Beside it the exact log p of the same facts."""
    lab = new_lab()
    written, never = two_sets(lab, pool)
    probes, device = mem_probes(lab.world, never), lab.dist.device
    generator = torch.Generator(device).manual_seed(lab.seed)
    lab.model.eval()
    hits, tok = [], lab.world.tok
    for f, p in zip(never, probes, strict=True):
        prompt = torch.tensor([p.prompt] * 16, device=device)
        out = list(lab.model.generate(prompt, 12, temperature=0.7, top_k=50, generator=generator))
        out = torch.cat(out, dim=1)
        hits.append(np.mean([f.answer.strip() in tok.decode(p.prompt[1:] + o.tolist()) for o in out]))
    lab.model.train()
    exact = lab.ask(probes)
    return {"artefact": float(np.mean(hits)), "clean": float(np.exp(exact.logp).mean()), "curves": {},
            "unit": "accuracy",
            "says": "never-written facts: sampled accuracy against the probability of the answer; guessing "
                    f"is right in {1 / len(lab.world.answers):.1%}"}


def unmasked_padding(new_lab, pool) -> dict:
    """One sentence per row, padded to the full length, with the padding in the loss: the loss falls to almost
    nothing because padding is easy, and says nothing about the facts."""
    found = {}
    for mode in ("padding counted", "masked"):
        lab = new_lab()
        written, _ = two_sets(lab, pool)
        eot, losses = lab.world.tok.eot, []
        for e in range(8):
            rows = [pack([s], lab.cfg.max_seq_len, eot, -1 if mode == "masked" else eot)
                    for s in lab.world.sentences([(f, f.order[e % 8]) for f in written])]
            losses.append(lab.step(*(np.concatenate(z) for z in zip(*rows, strict=True))))
        found[mode] = losses, float(lab.ask(mem_probes(lab.world, written)).logp.mean())
    return {"artefact": found["padding counted"][0][-1], "clean": found["masked"][0][-1],
            "unit": "nats of loss", "curves": {k: v[0] for k, v in found.items()},
            "says": "training loss after 8 exposures; log p of the answers is "
                    f"{found['padding counted'][1]:.2f} with padding counted, {found['masked'][1]:.2f} "
                    "masked"}


def last_token(new_lab, pool) -> dict:
    """Sentences of text nobody trained on: the last sub-token, teacher-forced, against the whole last word.
    Their difference needs no memory that fades with distance."""
    lab = new_lab()
    tok, eot = lab.world.tok, lab.world.tok.eot
    probes = []
    for start in range(37 * lab.seed % 200, len(lab.text.val) - 200, 200):  # other words for each seed
        ids = [int(i) for i in lab.text.val[start:start + 32]]
        pieces = tok.encode_batch([" " + w for w in tok.decode(ids).split()[-2:-1]])
        word = pieces[0].tolist() if pieces else []
        ends = [i for i in range(8, len(ids) - len(word)) if ids[i:i + len(word)] == word]
        if len(word) > 1 and ends:
            prompt = [eot, *ids[:ends[-1]]]
            probes += [Probe("", "word", prompt, word), Probe("", "last", prompt + word[:-1], word[-1:])]
    hits = lab.ask(probes).hit
    return {"artefact": float(hits[1::2].mean()), "clean": float(hits[::2].mean()), "unit": "accuracy",
            "curves": {},
            "says": f"{len(probes) // 2} never-trained words of several tokens: right last token, right "
                    "whole word"}


def overlapping_windows(new_lab, pool) -> dict:
    """Loss after minus before a retrain on [a, b], beyond that of far text, by the place of a window:
    windows that begin before b hold trained tokens, and show a memory 'after' b that is none."""
    lab = new_lab()
    T, tokens = lab.cfg.max_seq_len, lab.text.val
    if len(tokens) < 20 * T:
        raise UserError(f"overlapping_windows needs {20 * T:,} tokens of validation text, got "
                        f"{len(tokens):,}")
    a = 2 * T + 977 * lab.seed % (len(tokens) - 16 * T)  # trained: [a, a + 8 T)
    near, far = np.arange(a - 2 * T, a + 10 * T, T // 8), np.arange(0, len(tokens) - T - 1, T)
    far = far[(far < a - 3 * T) | (far > a + 11 * T)][:64]

    def rows(starts) -> np.ndarray:
        return tokens[starts[:, None] + np.arange(T + 1)].astype(np.int64)  # (N, T + 1)

    def losses(starts) -> np.ndarray:
        with torch.inference_mode():
            windows = torch.from_numpy(rows(starts)).to(lab.dist.device)
            return np.array([lab.model(r[None, :-1], r[None, 1:])[0].item() for r in windows])

    before, elsewhere = losses(near), losses(far)
    for _ in range(4):
        trained = rows(np.arange(a, a + 8 * T, T))
        lab.step(trained[:, :-1], trained[:, 1:])
    change = losses(near) - before - (losses(far) - elsewhere).mean()
    end = near + T - (a + 8 * T)  # of the window, tokens after b
    return {"artefact": float(change[(end > 0) & (end < T)].mean()), "clean": float(change[end >= T].mean()),
            "curves": {"change": change.tolist(), "end": end.tolist()}, "unit": "nats",
            "says": f"windows of {T}, stride {T // 8}: those that end within {T} tokens after b, and those "
                    "wholly after b"}


def state_cosines(new_lab, pool) -> dict:
    """Two learners from one base on different text: weights and second moments are almost parallel whatever
    they learned, because they share their start and their sign; displacements and first moments are not."""
    labs, found = [new_lab(), new_lab()], {}
    origin = [p.detach().clone() for p in labs[0].model.parameters()]
    for lab, shift in zip(labs, (0, 10**6), strict=True):
        lab.steps = shift
        for _ in range(40):
            lab.train()

    def cosine(u, v) -> float:
        u, v = (torch.cat([z.double().flatten() for z in x]) for x in (u, v))
        return float(u @ v / (u.norm() * v.norm()))

    def state(lab, key):
        return [lab.optimizer.state[p][key] for p in lab.model.parameters()]

    weights = [list(lab.model.parameters()) for lab in labs]
    found["weights"] = cosine(*[[p.detach() for p in w] for w in weights])
    found["displacements"] = cosine(*[[p.detach() - o for p, o in zip(w, origin, strict=True)]
                                      for w in weights])
    found["second moments"] = cosine(*[state(lab, "exp_avg_sq") for lab in labs])
    found["first moments"] = cosine(*[state(lab, "exp_avg") for lab in labs])
    return {"artefact": found["weights"], "clean": found["displacements"], "unit": "cosine", "curves": {},
            "says": ", ".join(f"{k} {v:.3f}" for k, v in found.items())}


ARTEFACTS = {f.__name__: f for f in (fresh_adam, sampled_accuracy, unmasked_padding, last_token,
                                     overlapping_windows, state_cosines)}

# ------------------------------------------------------------------------------------------------------------
# The page


def artefacts(cfg, arms, labels, text, worlds, run, stop):
    """Every artefact for every seed: (summary, words), or None if asked to stop."""
    done, (arm, *_), (world, *_) = run.finished_parts(), arms, worlds
    seeds, pool = range(cfg.seed, cfg.seed + cfg.seeds), pool_of(arm, world)
    todo = [(s, name) for s, name in itertools.product(seeds, cfg.artefacts) if (s, name) not in done]
    bases = bases_of(arms, [0] * bool(todo), text, worlds, run, stop)
    for seed, name in todo:
        if bases is None or stop.agreed(run.dist):
            return None

        def new_lab(seed=seed):
            return Lab(arm, text, world, bases[0], seed, run.dist)

        with named(f"{name}, seed {seed}"):
            run.finish_part((seed, name), ARTEFACTS[name](new_lab, pool), done)
    rows = {name: [done[s, name] for s in seeds] for name in cfg.artefacts}
    lines, words = [["artefact", "as reported", "95 %", "clean", "95 %", "unit"]], []
    for name, found in rows.items():
        a, b = (describe([np.array([r[key]]) for r in found], cfg.bound) for key in ("artefact", "clean"))
        spans = [(f"{e['mean']:.3f}", f"{e['low']:.3f} to {e['high']:.3f}") for e in (a, b)]
        lines.append([name, *spans[0], *spans[1], found[0]["unit"]])
        words.append(f"{name}: {a['mean']:.3f} as it was reported, {b['mean']:.3f} clean "
                     f"({found[0]['says']})")
    return write_report(run, grid(lines), ["", grid(lines), "", *words], lambda path: draw(rows, path),
                        {"artefacts": rows, "counts": {"parts": len(rows) * len(seeds)}})


def draw(rows: dict[str, list[dict]], path: str) -> None:
    """A panel for each: what was reported beside what is there, dots are seeds; curves where time matters."""
    figure = new_figure(4 * min(3, len(rows)), 3.2 * -(-len(rows) // 3))
    axes = figure.subplots(-(-len(rows) // 3), min(3, len(rows)), squeeze=False).flatten()
    for ax in axes[len(rows):]:
        ax.set_axis_off()
    for ax, (name, found) in zip(axes, rows.items(), strict=False):
        if name == "fresh_adam":
            for mode, color in (("new optimiser", "C3"), ("new, warm-up", "C1"), ("carried", "C0")):
                for key, style in ((mode, "-"), (f"{mode}: never written", ":")):
                    ax.plot(AFTER, np.mean([r["curves"][key] for r in found], axis=0), style, color=color,
                            label=mode if key == mode else None)
            ax.set(xlabel="steps of other text; dotted: facts never written", ylabel="log p, nats")
            ax.legend(fontsize=7)
        else:
            for x, key in enumerate(("artefact", "clean")):
                ax.bar(x, np.mean([r[key] for r in found]), color=("C3", "C0")[x], alpha=0.6)
                ax.plot([x] * len(found), [r[key] for r in found], "o", color="black", markersize=3)
            ax.set_xticks((0, 1), ("as reported", "clean"))
            ax.set_ylabel(found[0]["unit"])
        ax.set_title(name.replace("_", " "), fontsize=10)
        ax.grid(alpha=0.3)
    save_figure(figure, path)
