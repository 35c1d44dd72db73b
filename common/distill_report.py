"""What came of a distillation: student and teacher side by side, in numbers, next tokens and texts."""
import math

from common.collapse import compare, text_measures
from common.files import read_rows
from common.samples import continue_prompts, next_token_table, next_tokens
from common.tables import grid, new_figure, save_figure

import numpy as np
import torch

GREEDY, TOKENS, PROMPT = 16, 200, 8  # greedy texts, their length, tokens of validation text they continue


def final_report(cfg, plan, text, model, teachers: list, run, progress, stop) -> tuple[dict, str] | None:
    """(results, Markdown) of the best student against its teachers; None if stopped halfway. A collective."""
    dist, split = run.dist, text.meta["splits"]["val"]
    T, batch = cfg.max_seq_len, max(1, 2**13 // cfg.max_seq_len)
    unigram = token_counts(text.train, model.n_tokens)
    both = compare(model, teachers, text.val, split, model.n_tokens, unigram, T, batch, dist, plan.dtype,
                   cfg.temperature, stop)
    if both is None:
        return None
    collapse, teacher_collapse = (text_measures(greedy_texts(m, text, dist.device))
                                  for m in (model, teachers[0]))
    sizes = [t.count_parameters()["total"] for t in teachers]
    own = model.count_parameters()["total"]
    result = progress.best | {k: both[k] for k in ("soft", "agreement", "entropy", "to_unigram", "top1")}
    result |= collapse | {"compression": max(sizes) / own, "teacher_loss": both["teacher_loss"],
                          **{f"steps_to_{name}": step for name, step in progress.crossed.items()}}
    rows = [["", "teacher", "student"], ["parameters", " + ".join(f"{n:,}" for n in sizes), f"{own:,}"],
            ["loss on the text (hard), nats per token", f"{both['teacher_loss']:.4f}",
             f"{result['loss']:.4f}"]]
    rows += [["perplexity", f"{math.exp(both['teacher_loss']):.2f}", f"{result['perplexity']:.2f}"],
             ["bits per byte", f"{both['teacher_bits_per_byte']:.3f}", f"{result['bits_per_byte']:.3f}"]]
    rows += [["most probable token is the next one", f"{both['teacher_top1']:.1%}", f"{both['top1']:.1%}"],
             ["entropy of the predictions, nats", f"{both['teacher_entropy']:.3f}", f"{both['entropy']:.3f}"],
             ["KL of the mean prediction to the unigram", "", f"{both['to_unigram']:.3f}"]]
    rows += [[name, f"{teacher_collapse[key]:.1%}", f"{collapse[key]:.1%}"] for name, key in (
        ("modal token's share of greedy text", "modal_share"), ("distinct bigrams", "distinct_2"),
        ("4-grams that repeat", "repetition_4"))]
    words = [f"# {cfg.name}: {', '.join(cfg.teacher)} -> {own:,} parameters, 1/{max(sizes) / own:.1f}", "",
             grid(rows), "",
             f"The student's most probable token is the teacher's on {both['agreement']:.1%} of the "
             f"validation text; forward KL at temperature {cfg.temperature:g}, times T^2 (soft): "
             f"{both['soft']:.4f} nats.",
             (f"{len(sizes)} teachers: their probabilities are averaged; the greedy text is the first one's. "
              if len(sizes) > 1 else "") + f"Greedy text: {GREEDY} continuations of {TOKENS} tokens.",
             "", *curve(read_rows(run.path("metrics.jsonl"))),
             *prompts(cfg, text, model, teachers[0], dist.device)]
    return result, "\n".join(words)


def curve(rows: list[dict]) -> list[str]:
    """Soft and hard loss at each evaluation: in training since the one before, and on the validation text."""
    keys = ("mean_soft", "mean_hard", "val_soft", "val_loss")
    lines = [["step", "epoch", "soft, training", "hard, training", "soft, validation", "hard, validation"]]
    for r in (r for r in rows if "val_loss" in r):
        numbers = ("" if r.get(k) is None else f"{r[k]:.4f}" for k in keys)
        lines.append([f"{r['step']:,}", f"{r['epoch']:.2f}", *numbers])
    return [grid(lines)]


def greedy_texts(model, text, device) -> list[list[int]]:
    """Continuations of validation text without sampling."""
    starts = np.linspace(0, len(text.val) - PROMPT, GREEDY).astype(int)
    ids = torch.from_numpy(np.stack([np.asarray(text.val[s:s + PROMPT]) for s in starts]).astype(np.int64))
    room = model.cfg.max_seq_len - PROMPT if model.pos_embed is not None else TOKENS
    training = model.training
    model.eval()
    new = list(model.generate(ids.to(device), max(1, min(TOKENS, room)), temperature=0))
    model.train(training)
    return torch.cat(new, dim=1).tolist()


def prompts(cfg, text, model, teacher, device) -> list[str]:
    """For each prompt the most probable next tokens and a continuation, teacher beside student."""
    lines, samples, training = [], {}, model.training
    for name, m in (("teacher", teacher), ("student", model)):
        samples[name] = continue_prompts(m, text.tok, cfg, device)
        m.eval()
    for prompt in cfg.prompts:
        ids = torch.tensor([[text.tok.eot, *text.tok.encode(prompt)]], device=device)  # (1, T)
        columns = {name: next_tokens(m, text.tok, ids, cfg.top_tokens)
                   for name, m in (("teacher", teacher), ("student", model))}
        lines += ["", f"## {prompt!r}", "", "```", next_token_table(columns)]
        lines += [f"{name}: {prompt}|{' '.join(samples[name][prompt].split())}" for name in samples]
        lines.append("```")
    model.train(training)
    return lines


def token_counts(tokens, vocab_size: int) -> np.ndarray:
    """How often each id occurs (V,)."""
    return sum(np.bincount(tokens[i:i + 2**24], minlength=vocab_size) for i in range(0, len(tokens), 2**24))


def ngram_losses(train, val, vocab_size: int) -> dict[str, float]:
    """Nats per token on `val` of the frequencies of `train` plus one, and of a bigram model that leans on
    them with the best of four weights."""
    train, val = (np.asarray(part[:2**24]).astype(np.int64) for part in (train, val))
    counts = np.bincount(train, minlength=vocab_size)
    unigram = (counts + 1) / (len(train) + vocab_size)  # (V,)
    pairs, seen = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    wanted = val[:-1] * vocab_size + val[1:]
    place = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    found = np.where(pairs[place] == wanted, seen[place], 0)
    p, before = unigram[val[1:]], counts[val[:-1]]
    bigram = min(-np.log((found + w * p) / (before + w)).mean() for w in (1, 10, 100, 1000))
    return {"unigram": float(-np.log(p).mean()), "bigram": float(bigram)}


def draw(rows: list[dict], cfg, baselines: dict[str, float], path: str) -> None:
    """Soft and hard loss against tokens, in training and on the validation text, with the losses of a unigram
    and a bigram model."""
    axes = new_figure(7, 4.2).subplots()
    for i, name in enumerate(("hard", "soft")):
        train = [(r["tokens"], r[f"mean_{name}"]) for r in rows if r.get(f"mean_{name}") is not None]
        key = {"hard": "val_loss", "soft": "val_soft"}[name]
        val = [(r["tokens"], r[key]) for r in rows if key in r]
        if train and (cfg.uses_teacher or name == "hard"):
            axes.plot(*zip(*train, strict=True), color=f"C{i}", alpha=0.5, label=f"{name}, training")
        if val:
            axes.plot(*zip(*val, strict=True), "o-", color=f"C{i}", markersize=3, label=f"{name}, validation")
    for name, loss in baselines.items():
        axes.axhline(loss, color="gray", linestyle=":", linewidth=0.8)
        axes.annotate(name, (1, loss), xycoords=("axes fraction", "data"), fontsize=7, ha="right",
                      va="bottom")
    axes.set(xlabel="tokens seen", ylabel="nats per token", title=f"{cfg.name}: hard loss and soft loss")
    axes.set_ylim(0, 1.3 * max(baselines.values()))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(axes.figure, path)
