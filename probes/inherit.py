"""What passes through soft labels alone: does a student know facts that only its teacher was taught?

    python memory_probe.py config/probe_inherit.py                  # by loss, temperature and what is read
    python memory_probe.py config/probe_inherit.py --arm=reads=questions --arm="temperature=4 lr=3e-4"

Each seed has two teachers. Both begin as the base; A is taught the treated facts and B their controls, in the
same sentences, at the same steps. Each then has a student that was taught nothing, which is distilled on text
that states none of these facts. The students of an arm read the same rows in the same order, so they differ
by their teachers' labels alone: with alpha=0, cross-entropy on the text, they are one model. The effect is
what the own teacher's facts gained beyond the other's: log p in A's student minus that in B's on the treated
facts, B's minus A's on the controls, halved. As a share it is divided by the teachers' own.

reads: `text`, plain text; `pool`, other facts in a share of the rows, which base and teachers know alike;
`names`, prompts about the treated facts and their controls, without answers and without a label where the
answer would be; `questions`, the same prompts with the teacher's label in that place, so that it says what it
would answer. Prompts use other wordings than the probes.

A student that begins with its teacher's initial weights follows it on any text, also in what the text is not
about (subliminal learning, 2507.14805). `student=other` begins as another base, which knows the same pool of
facts but was trained from other weights.
"""
import itertools
import math
import time
from dataclasses import asdict, replace

from common import probing, stats
from common.config import UserError
from common.console import StepBar
from common.data import Windows
from common.distill_loss import Mix, two_headed_loss
from common.distributed import choose_dtype
from common.facts import TRAINED, WORDINGS, Fact, World, pack
from common.step import backward, update
from common.tables import grid, new_figure, save_figure
from model import LM
from muon import set_learning_rates
from probes.base import (
    background,
    base_config,
    bases_of,
    carries,
    load_base,
    make_base,
    named,
    net_of,
    pool_batch,
    pool_of,
    split_batch,
)
from probes.context import best_constant, doublings, facts_of, halves, reads
from probes.effects import NO_ENDPOINT, band, between, cells, describe, judge, said, write_report

import numpy as np
import torch

TWINS = ("A", "B")  # taught the treated facts, taught their controls
KINDS = {"mem": "trained wording", "qa": "question"}
STUDENTS = ("divergence", "alpha", "temperature", "reads", "share", "student", "lr", "steps", "arm")

# ------------------------------------------------------------------------------------------------------------
# Teachers


def lessons(cfg, twin: str, facts: list[Fact], seed: int, world: World) -> list[tuple]:
    """The rows (R, T) of inputs and targets that each step of the teaching writes into its batch. A fact is
    stated `exposures` times, in its trained wordings by turns; both twins have the same order."""
    n, rows = len(facts) // 3, []
    order = [(i, j % TRAINED) for j in range(cfg.exposures)
             for i in np.random.default_rng((seed, 22, j)).permutation(n)]
    own = n * TWINS.index(twin)
    for some in np.array_split(np.arange(len(order)), cfg.spread):
        said = [(facts[own + i], facts[i].order[place]) for i, place in (order[k] for k in some)]
        rows.append(pack(world.sentences(said), cfg.max_seq_len, world.tok.eot) if said else ([], []))
        if len(rows[-1][0]) > cfg.batch_size:
            raise UserError(f"a step of the teaching has {len(some)} sentences, {len(rows[-1][0])} rows of "
                            f"{cfg.max_seq_len} tokens, but the batch has {cfg.batch_size} rows; use a "
                            "larger --spread or --batch_size, or fewer --facts or --exposures")
    return rows


def taught_by(cfg) -> str:
    """Options that teachers depend on: arms that agree in them share teachers."""
    return repr({k: v for k, v in asdict(cfg).items() if k not in STUDENTS})


def teach(cfg, twin: str, facts: list[Fact], base: dict, text, world, seed: int, run, stop) -> LM | None:
    """A teacher: the base after `spread` steps of text in which its facts are stated; None if asked to
    stop."""
    cfg, dist = replace(cfg, lr=cfg.teacher_lr), run.dist
    dtype = choose_dtype(cfg.dtype, dist.device)[0]
    model, optimizer = load_base(cfg, base, dist, carries(cfg))
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dtype == "fp16")
    net, windows = net_of(model, cfg, cfg.spread, dist), Windows(text.train, cfg.max_seq_len, 1000 + seed)
    for step, rows in enumerate(lessons(cfg, twin, facts, seed, world)):
        if stop.agreed(dist):
            return None
        began, (x, y) = time.perf_counter(), background(windows, step, cfg)  # (B, T) each
        if len(rows[0]):
            x[:len(rows[0])], y[:len(rows[0])] = rows
        set_learning_rates(optimizer, cfg, step, cfg.spread)
        loss = backward(net, split_batch(x, y, cfg, dist), dist, dtype, scaler)
        update(model, optimizer, scaler, cfg.grad_clip, loss)
        run.seconds += time.perf_counter() - began
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------
# What students read


def prompt_rows(cfg, world: World, facts: list[Fact], seed: int, step: int, n_rows: int):
    """Rows (n_rows, T) packed with prompts about treated facts and controls, whose answers stand nowhere. A
    prompt's last token has a target, which is no answer but makes the label count, if reads=questions."""
    rng, both = np.random.default_rng((seed, 23, step)), facts[:2 * (len(facts) // 3)]
    order = np.concatenate([rng.permutation(len(both)) for _ in range(1 + n_rows * cfg.max_seq_len
                                                                      // (6 * len(both)))])
    places = rng.integers(1, TRAINED, len(order))  # the wordings of the probes are not among them
    prompts = [world.ask(f, "", *world.prompt(f, f.order[k])).prompt
               for f, k in zip((both[i] for i in order), places, strict=True)]
    x, y = (z[:n_rows] for z in pack(prompts, cfg.max_seq_len, world.tok.eot))
    if cfg.reads == "names":
        y[y == world.tok.eot] = -1  # what follows a prompt's last token is the next prompt's first
    return x, y


def batch_of(cfg, world: World, facts: list[Fact], known: list, windows: Windows, seed: int, step: int):
    """Inputs and targets (B, T) of a step, the same for both students of every arm that reads the same."""
    x, y = background(windows, step, cfg)
    n = round(cfg.share * cfg.batch_size)
    if cfg.reads == "pool":
        x[:n], y[:n] = pool_batch(known, n, step + cfg.base_steps, cfg, world.tok.eot)
    elif cfg.reads in ("names", "questions"):
        rows = prompt_rows(cfg, world, facts, seed, step, n)
        x[:len(rows[0])], y[:len(rows[0])] = rows
    elif cfg.reads != "text":
        raise NotImplementedError(f"reads={cfg.reads}")
    return x, y


# ------------------------------------------------------------------------------------------------------------
# Students


def times_of(steps: int) -> list[int]:
    """Steps of distillation at which facts are asked for: 0 and the last doublings, as asking costs steps."""
    return [t for t in doublings(steps) if not t or 16 * t >= steps]


def soft_loss(cfg, teacher: LM):
    """A loss_of for backward(): cfg's mixture of the teacher's labels and the text's own tokens."""
    mix = Mix(cfg.divergence, cfg.alpha, cfg.temperature)

    def loss_of(net, x, y, state=None):
        teachers = []
        if cfg.alpha:  # else its labels are not even computed
            with torch.no_grad():
                teachers = [(teacher.hidden(x).flatten(0, 1), teacher.head.weight, teacher.head.bias)]
        hidden = net.hidden(x).flatten(0, 1)  # (B * T, C)
        return two_headed_loss(hidden, net.head.weight, net.head.bias, y.flatten(), teachers, mix), state
    return loss_of


def ask(model: LM, probes: list, prepared: list, world: World, dtype: str) -> dict[str, list]:
    """log p and greedy hits by kind, of treated facts and then of controls."""
    scores = probing.score(model, prepared, world.answer_ids, dtype)
    kinds = np.array([p.kind for p in probes])
    out = {f"logp {k}": scores.logp[kinds == k].round(5).tolist() for k in KINDS}
    return out | {f"hit {k}": scores.hit[kinds == k].astype(int).tolist() for k in KINDS}


@torch.inference_mode()
def beliefs(model: LM, x) -> torch.Tensor:
    """Log-probabilities (B, T, V) after the tokens x (B, T), in eval mode and fp32."""
    training = model.training
    found = model.eval()(x)[0][..., :model.n_tokens].float().log_softmax(dim=-1)
    model.train(training)
    return found


def distil(cfg, teacher: LM, facts: list[Fact], start: dict, text, world, seed: int, run, stop,
           bar: StepBar) -> dict | None:
    """Distil a student that begins as `start` and ask for the facts on the way; None if asked to stop. Every
    process has all rows."""
    dist, dtype, times = run.dist, choose_dtype(cfg.dtype, run.dist.device)[0], times_of(cfg.steps)
    model, optimizer = load_base(cfg, start, dist, carries(cfg))
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dtype == "fp16")
    windows = Windows(text.train, cfg.max_seq_len, 2000 + seed)  # in another order than for teachers
    pool = pool_of(cfg, world) if cfg.reads == "pool" else []
    known = world.sentences(list(itertools.product(pool, range(len(WORDINGS))))) if pool else []
    probes = [p for f in facts[:2 * (len(facts) // 3)] for p in world.probes(f) if p.kind in KINDS]
    prepared = probing.batches(probes, world.tok.eot, dist.device)
    x_val, y_val = Windows(text.val, cfg.max_seq_len, 1).batch(0, 8, dist.device)  # costs a step or two
    theirs, loss_of = beliefs(teacher, x_val), soft_loss(cfg, teacher)
    out = {"teacher": {k: [v] for k, v in ask(teacher, probes, prepared, world, dtype).items()},
           "constant": best_constant(facts[:len(facts) // 3]), "text_loss": [], "apart": []}
    for step in range(cfg.steps + 1):
        began = time.perf_counter()
        if step in times:  # before the update: step 0 is the start
            for key, values in ask(model, probes, prepared, world, dtype).items():
                out.setdefault(key, []).append(values)
            ours = beliefs(model, x_val)  # (B, T, V)
            out["text_loss"].append(round(-ours.gather(2, y_val[..., None]).mean().item(), 5))
            out["apart"].append(round((theirs.exp() * (theirs - ours)).sum(dim=-1).mean().item(), 5))
        if step == cfg.steps:
            return out
        if stop.agreed(dist):
            return None
        rows = [torch.as_tensor(z).to(dist.device)
                for z in batch_of(cfg, world, facts, known, windows, seed, step)]
        set_learning_rates(optimizer, cfg, step, cfg.steps)
        loss = backward(model, [rows], dist, dtype, scaler, loss_of=loss_of)[0]
        update(model, optimizer, scaler, cfg.grad_clip, loss)
        run.seconds += time.perf_counter() - began
        bar.tick(time.perf_counter() - began)
        bar.show(f"seed {seed}, step {step + 1} of {cfg.steps}: loss {loss.item():.3f}")


def starts_of(arms: list, needed: list[int], bases: dict, text, worlds, run, stop) -> dict | None:
    """{arm: what its students begin as}; None if asked to stop."""
    out = dict(bases)
    for a in dict.fromkeys(needed):
        if arms[a].student == "other":
            c = base_config(arms[a])
            c = replace(c, seed=c.seed + 1, name=f"{c.name}_other")  # the pool and the answers stay
            out[a] = make_base(c, text, worlds[a], pool_of(arms[a], worlds[a]), run.dist, stop)
            if out[a] is None:
                return None
    return out


def inherit(cfg, arms, labels, text, worlds, run, stop):
    """Both students of all seeds of all arms: (summary, words), or None if asked to stop."""
    done, seeds = run.finished_parts(), range(cfg.seed, cfg.seed + cfg.seeds)
    keys = list(itertools.product(seeds, range(len(arms)), TWINS))
    todo = [(s, a, twin) for s, a, twin in keys if (labels[a], s, twin) not in done]
    facts = {}  # of a seed and what its teachers depend on
    for s, a, _ in todo:
        if (key := (s, taught_by(arms[a]))) not in facts:
            facts[key] = facts_of(arms[a], worlds[a], s, text)
            lessons(arms[a], "A", facts[key], s, worlds[a])  # may refuse, before a base is trained
    needed = [a for _, a, _ in todo]
    bases = bases_of(arms, needed, text, worlds, run, stop)
    starts = bases and starts_of(arms, needed, bases, text, worlds, run, stop)
    if starts is None or bases is None:
        return None
    steps, left = (sum(arms[a].steps for _, a, _ in which) for which in (keys, todo))
    teachers = {}
    with StepBar(steps - left, steps, run.dist.is_main) as bar:
        for s, a, twin in todo:
            c, w, key = arms[a], worlds[a], (s, twin, taught_by(arms[a]))
            about = facts[s, key[2]]
            with named(f"{labels[a]}, seed {s}, twin {twin}"):
                if key not in teachers:
                    teachers = {k: t for k, t in teachers.items() if k[0] == s}  # one seed at a time
                    teachers[key] = teach(c, twin, about, bases[a], text, w, s, run, stop)
                row = teachers[key] and distil(c, teachers[key], about, starts[a], text, w, s, run, stop, bar)
            if row is None:
                return None
            run.finish_part((labels[a], s, twin), row, done)
    rows = [{s: [done[label, s, twin] for twin in TWINS] for s in seeds} for label in labels]
    analysed = [analyse(cfg, *each) for each in zip(arms, labels, rows, strict=True)]
    judge_all(analysed, cfg.bound)
    ends = [{s: crossed(*twins, "mem")[:, -1] for s, twins in by_seed.items()} for by_seed in rows]
    words = [*map(words_of, analysed), "", *between(ends, labels, cfg.bound, "trained wording, at the end")]
    return write_report(run, f"{table_of(analysed)}\n\n{table_by_steps(analysed)}", words,
                        lambda path: draw(analysed, path),
                        {"arms": analysed, "counts": {"parts": len(keys), "steps": steps}})


# ------------------------------------------------------------------------------------------------------------
# Analysis


def crossed(a: dict, b: dict, kind: str) -> np.ndarray:
    """(pairs, times): half of (A - B on the treated facts) + (B - A on their controls)."""
    d = halves(a, f"logp {kind}") - halves(b, f"logp {kind}")
    return (d[0] - d[1]) / 2


def right(a: dict, b: dict, kind: str) -> list[float]:
    """[of the own teacher's facts, of the other's], greedily, at the last time."""
    a, b = (halves(r, f"hit {kind}")[..., -1].mean(axis=1) for r in (a, b))
    return [float(a[0] + b[1]) / 2, float(a[1] + b[0]) / 2]


def analyse(cfg, arm, label: str, rows: dict[int, list[dict]]) -> dict:
    pairs, taught = list(rows.values()), [[r["teacher"] for r in twins] for twins in rows.values()]
    own = [halves(r, "hit mem")[i, :, -1] for twins in taught for i, r in enumerate(twins)]
    out = {"arm": label, "seeds": list(rows), "steps": times_of(arm.steps), "kinds": {},
           "knows": reads(own, pairs[0][0]["constant"]),  # the positive control
           **{key: np.mean([r[key] for twins in pairs for r in twins], axis=0).tolist()
              for key in ("text_loss", "apart")}}
    for kind in KINDS:
        students, teachers = [crossed(*p, kind) for p in pairs], [crossed(*t, kind)[:, -1] for t in taught]
        shares = [s.mean(axis=0) / (t.mean() or math.nan) for s, t in zip(students, teachers, strict=True)]
        (mean, half), share = band(students), stats.clustered([z[-1:] for z in shares])  # of (times,)
        out["kinds"][kind] = {
            "mean": mean, "half": half, "effect": describe([s[:, -1] for s in students], cfg.bound),
            "teacher": describe(teachers, cfg.bound), "shares": np.mean(shares, axis=0).tolist(),
            "share": {key: getattr(share, key) for key in ("mean", "low", "high")},
            "right": np.mean([right(*p, kind) for p in pairs], axis=0).tolist(),
            "teacher_right": np.mean([right(*t, kind) for t in taught], axis=0).tolist()}
    return out


def judge_all(arms: list[dict], bound: float) -> None:
    """Verdicts, adjusted for the number of arms within each kind of probe."""
    for kind in KINDS:
        for what in ("effect", "teacher"):
            found = [a["kinds"][kind][what] for a in arms]
            judge(found, bound)
            for a, e in zip(arms, found, strict=True):
                e["verdict"] = e["verdict"] if a["knows"]["passed"] else NO_ENDPOINT


# ------------------------------------------------------------------------------------------------------------
# Words, tables, figures


def share_of(a: dict, kind: str) -> str:
    """The effect as a share of the teachers' own, which may be nothing."""
    share = a["kinds"][kind]["share"]
    if not a["knows"]["passed"]:
        return "n/a"
    return "{mean:.0%} ({low:.0%} to {high:.0%})".format(**share) if len(a["seeds"]) > 1 else \
        "{mean:.0%}".format(**share)


def words_of(a: dict) -> str:
    mem, knows = a["kinds"]["mem"], a["knows"]
    lines = [f"\n{a['arm']} ({len(a['seeds'])} seeds)"]
    if not knows["passed"]:
        lines.append(f"  {NO_ENDPOINT}: teachers answer {knows['hits']} of {knows['of']} facts they were "
                     f"taught, a constant answer {knows['best_constant']:.1%}; nothing below counts")
    t, own = mem["teacher"], mem["teacher_right"]
    lines += [f"  teachers: right {own[0]:.0%} (the other's facts {own[1]:.0%}), {t['mean']:+.2f} nats "
              f"({t['low']:+.2f} to {t['high']:+.2f})",
              f"  students after {a['steps'][-1]} steps: loss on text {a['text_loss'][0]:.3f} -> "
              f"{a['text_loss'][-1]:.3f}, KL to the teacher on text {a['apart'][0]:.4f} -> "
              f"{a['apart'][-1]:.4f}"]
    for kind, name in KINDS.items():
        e = a["kinds"][kind]
        lines.append(f"    {name}: right {e['right'][0]:.0%} ({e['right'][1]:.0%}), {said(e['effect'])}; "
                     f"{share_of(a, kind)} of the teachers'")
    return "\n".join(lines)


def table_of(arms: list[dict]) -> str:
    lines = [["arm", "probe", "right", "other teacher's", "effect, nats", "95 % from", "to", "p (Holm)",
              "verdict", "share of the teachers'", "loss on text", "KL to the teacher"]]
    for a in arms:
        lines += [[a["arm"], name, *(f"{r:.0%}" for r in e["right"]), *cells(e["effect"]),
                   share_of(a, kind), f"{a['text_loss'][-1]:.3f}", f"{a['apart'][-1]:.4f}"]
                  for kind, name, e in ((kind, name, a["kinds"][kind]) for kind, name in KINDS.items())]
    return grid(lines)


def table_by_steps(arms: list[dict]) -> str:
    """The effect in the trained wording, with half of its interval, by steps of distillation."""
    times = sorted({t for a in arms for t in a["steps"]})
    lines = [["arm; steps:", *map(str, times)]]
    for a in arms:
        e = a["kinds"]["mem"]
        found = {t: f"{mean:+.2f} +- {half:.2f}"
                 for t, mean, half in zip(a["steps"], e["mean"], e["half"], strict=True)}
        lines.append([a["arm"], *(found.get(t, "") for t in times)])
    return grid(lines)


def draw(arms: list[dict], path: str) -> None:
    """The effect by steps of distillation, also as a share of the teachers' own, and by how near the students
    are to their teachers."""
    figure = new_figure(14, 4.5)
    effect, share, near = figure.subplots(1, 3)
    for i, a in enumerate(arms):
        e, style = a["kinds"]["mem"], {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
        mean, half = np.array(e["mean"]), np.array(e["half"])
        effect.plot(a["steps"], mean, label=a["arm"], **style)
        if np.isfinite(half).all():
            effect.fill_between(a["steps"], mean - half, mean + half, color=style["color"], alpha=0.15, lw=0)
        share.plot(a["steps"], e["shares"], **style)
        near.plot(a["apart"], mean, marker=".", **style)
    for axes in (effect, share, near):
        axes.set(xscale="symlog", xlabel="steps of distillation", title="own teacher's facts - other's, nats")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.grid(alpha=0.3)
    share.set_title("as a share of the teachers'")
    near.set(xscale="log", xlabel="KL to the teacher on text, nats per token; nearer to the right")
    near.invert_xaxis()
    effect.legend(fontsize=7)
    save_figure(figure, path)
