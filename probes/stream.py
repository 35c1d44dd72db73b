"""Memory of running text: sentences in a rolling window, and what retraining a stretch leaves around it.

    python memory_probe.py config/probe_window.py                   # what a stream of sentences leaves behind
    python memory_probe.py config/probe_window.py --arm=stride=32 --arm=lr_profile=random --arm=context=2
    python memory_probe.py config/probe_trace.py                    # is text ahead of a stretch easier?
    python memory_probe.py config/probe_trace.py --arm=state=fresh  # with a new optimiser

window: real sentences of the validation text pass through a window, and each step trains on all that are in
it. Their last words are asked before the stream, when they leave the window and at lags after that, together
with those of matched sentences that are never trained. The effect is what the streamed sentences gained
beyond their partners: most of what a model gets right about a last token needs no memory of the sentence.
With Adam an effect peaks some ten steps after the last exposure, as momentum carries the weights on.

trace: D(p) is the loss of token p after minus before a retrain on a stretch [a, b] of the training text.
K(+d) is the mean D at distance d behind b, which is ahead in reading order, K(-d) at d before a, both minus D
on far text. What the topic explains is symmetric. Memory of the order is an asymmetry K(+d) - K(-d) below 0
that goes when the stretch's tokens are shuffled.
"""
import itertools
import re
import time
from typing import NamedTuple

from common import stats
from common.config import UserError
from common.console import StepBar
from common.distributed import choose_dtype
from common.step import backward, update
from common.tables import grid, new_figure, save_figure
from common.tokenizer import EOT
from muon import set_learning_rates
from probes.base import bases_of, carries, load_base, named, net_of, rescale, split_batch
from probes.effects import band, between, cells, describe, early_and_late, judge, pooled, said, write_report

import numpy as np
import torch
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------------------
# Sentences

SENTENCE = re.compile(r"[A-Z][^.!?]*[.!?](?=\s|$)")
LAST_WORD = re.compile(r"(.*) ([^\W\d_]{2,})[.!?]")
FIRST_WORD = re.compile(r"\w+(?:['’-]\w+)*")
TOKENS = range(8, 41)  # of a sentence
SCORES = ("last token", "word", "greedy word", "log p")  # 0 or 1, and nats


class Sentence(NamedTuple):
    ids: list[int]
    start: int  # of the last word in ids
    target: list[int]  # its ids, with the space before it
    word: str


def sentences_of(text) -> list[Sentence]:
    """The different sentences of the validation text whose last word begins and ends at a token boundary."""
    tok, seen = text.tok, {}
    for paragraph in re.split(r"\n\s*\n", tok.decode(text.val[:2**20]).replace(EOT, "\n\n")):
        seen |= {s: LAST_WORD.fullmatch(s) for s in SENTENCE.findall(" ".join(paragraph.split()))}
    found = [(s, m[1], m[2]) for s, m in seen.items() if m]
    wholes, heads, boths = ([ids.tolist() for ids in tok.encode_batch(texts)] for texts in (
        [s for s, _, _ in found], [head for _, head, _ in found], [f"{head} {w}" for _, head, w in found]))
    return [Sentence(ids, len(head), both[len(head):], word)
            for (_, _, word), ids, head, both in zip(found, wholes, heads, boths, strict=True)
            if len(ids) in TOKENS and ids[:len(both)] == both and both[:len(head)] == head
            and tok.decode(both[len(head):]).strip() == word]


class Stream(NamedTuple):
    pairs: list[tuple[Sentence, Sentence]]  # (streamed, never trained)
    contexts: list[list[int]]  # of each pair
    x: np.ndarray  # (rows, T), a sentence each, in the order of the stream
    y: np.ndarray  # targets, -1 in padding and contexts
    steps: int  # step t trains rows t * stride ... t * stride + window_size - 1
    last: list[int]  # the step in which each pair is trained last
    exposures: list[int]  # of each pair


def lags_of(cfg) -> list[int]:
    """Steps after a sentence left the window: 0, 1, 2, 3, 5, 8, ... up to the length of ten windows."""
    passing = -(-cfg.window_size // cfg.stride)
    return sorted({passing, *early_and_late(10 * passing)})


def make_stream(cfg, found: list[Sentence], seed: int, eot: int) -> Stream:
    """Sentences in random order: others for `lead` steps, so that the model knows their form, the measured
    ones, and others until the last lag. Partners have words of equally many tokens as far as possible; every
    second seed swaps them. A context is what the stream had before, for the partner too."""
    n, W, s, C = cfg.sentences // 2, cfg.window_size, cfg.stride, cfg.context
    first = W - s + cfg.lead * s  # the row of the first pair
    last = [(first + i) // s for i in range(n)]
    steps = last[-1] + max(lags_of(cfg)) + 1
    length = C + (steps - 1) * s + W
    if len(found) < length + n:
        raise UserError(f"this needs {length + n:,} sentences, but the validation text has {len(found):,} "
                        f"different ones of {TOKENS[0]} to {TOKENS[-1]} tokens; use fewer --sentences, a "
                        "smaller --window_size, or more text")
    order = [found[i] for i in np.random.default_rng((seed, 17)).permutation(len(found))]
    alike, others = sorted(order[:2 * n], key=lambda x: len(x.target)), order[2 * n:]
    pairs = [(alike[2 * i], alike[2 * i + 1])[::1 - 2 * ((i + seed) % 2)]
             for i in np.random.default_rng((seed, 18)).permutation(n)]
    line = [*others[:C + first], *(a for a, _ in pairs), *others[C + first:length - n]]
    contexts = [sum((x.ids for x in line[i - C:i]), []) for i in range(C, length)]
    rows = [[eot, *before, *x.ids] for before, x in zip(contexts, line[C:], strict=True)]
    T = max(map(len, rows)) - 1
    if cfg.pos == "learned" and T > cfg.max_seq_len:
        raise UserError(f"a row has {T} tokens, but learned positions end at max_seq_len={cfg.max_seq_len}; "
                        "use less --context, or a base with pos=rope")
    x, y = (np.full((len(rows), T), fill) for fill in (eot, -1))
    for i, (ids, before) in enumerate(zip(rows, contexts, strict=True)):
        x[i, :len(ids) - 1], y[i, len(before):len(ids) - 1] = ids[:-1], ids[1 + len(before):]
    trained = np.bincount(np.concatenate([np.arange(t * s, t * s + W) for t in range(steps)]))
    return Stream(pairs, contexts[first:first + n], x, y, steps, last, trained[first:first + n].tolist())


# ------------------------------------------------------------------------------------------------------------
# Asking for last words


@torch.inference_mode()
def read(model, asked: list[tuple[list[int], list[int]]], pad: int, device) -> list[tuple[float, list[int]]]:
    """Of each (prompt, target): log p of the target in nats, and the most probable token at each of its
    places, given the target's tokens before it; in fp32."""
    training, out = model.training, []
    model.eval()
    for some in (asked[i:i + 64] for i in range(0, len(asked), 64)):
        tokens = np.full((len(some), max(len(p) + len(t) for p, t in some)), pad)
        for row, (prompt, target) in zip(tokens, some, strict=True):
            row[:len(prompt) + len(target)] = prompt + target
        rows = np.repeat(np.arange(len(some)), [len(t) for _, t in some])  # (M,) of each token of a target
        places = np.concatenate([len(p) - 1 + np.arange(len(t)) for p, t in some])  # (M,)
        hidden = model.hidden(torch.from_numpy(tokens).to(device))[rows, places].float()  # (M, C)
        logits = model.head(hidden[None])[0, :, :model.n_tokens]  # (M, V)
        own = logits.log_softmax(dim=-1)[np.arange(len(rows)), tokens[rows, places + 1]].double().cpu()
        ends, best = np.cumsum([len(t) for _, t in some])[:-1], logits.argmax(dim=-1).cpu().numpy()
        out += [(float(o.sum()), b.tolist())
                for o, b in zip(np.split(own.numpy(), ends), np.split(best, ends), strict=True)]
    model.train(training)
    return out


def says(model, prompts: list, texts: list, asked: list[Sentence], tok, device) -> list[bool]:
    """Whether greedy decoding, which begins with the ids `texts`, says a sentence's last word first and then
    ends it. Another split of the word into tokens counts, a longer word does not."""
    right, undecided, texts = [False] * len(prompts), range(len(prompts)), list(texts)
    for _ in range(max(len(s.target) for s in asked) + 2):
        starts = {i: tok.decode(texts[i]).lstrip().rstrip("\ufffd") for i in undecided}
        for i, text in starts.items():
            first = FIRST_WORD.match(text)
            right[i] = first is not None and first[0] == asked[i].word != text
        undecided = [i for i, text in starts.items() if not right[i] and asked[i].word.startswith(text)]
        found = read(model, [(prompts[i] + texts[i], [tok.eot]) for i in undecided], tok.eot, device)
        for i, (_, best) in zip(undecided, found, strict=True):
            texts[i] = texts[i] + best
    return right


def ask(model, contexts: list[list[int]], asked: list[Sentence], tok, device) -> np.ndarray:
    """SCORES of the last words of sentences after their contexts, (4, N): the last token and all tokens,
    given those before them; the whole word in greedy decoding; log p of the word."""
    prompts = [[tok.eot, *context, *s.ids[:s.start]] for context, s in zip(contexts, asked, strict=True)]
    found = read(model, [(p, s.target) for p, s in zip(prompts, asked, strict=True)], tok.eot, device)
    hits = [[a == b for a, b in zip(best, s.target, strict=True)]
            for (_, best), s in zip(found, asked, strict=True)]
    greedy = [best[:[*h, False].index(False) + 1] for (_, best), h in zip(found, hits, strict=True)]
    return np.array([[h[-1] for h in hits], [all(h) for h in hits],
                     says(model, prompts, greedy, asked, tok, device),
                     [round(logp, 5) for logp, _ in found]], dtype=float)


# ------------------------------------------------------------------------------------------------------------
# The rolling window


def rate_factors(cfg, model, seed: int) -> dict:
    """{parameter: what its updates are multiplied by}: 10 for a random tenth of the entries of each matrix;
    or from 0.1 in the first layer to 10 in the last."""
    generator, factors = torch.Generator().manual_seed(seed), {}
    for name, p in model.named_parameters() if cfg.lr_profile != "none" else ():
        layer = re.match(r"trunk\.(?:layers\.)?(\d+)\.", name)
        if cfg.lr_profile == "random" and p.dim() >= 2:
            factors[p] = torch.where(torch.rand(p.shape, generator=generator) < 0.1, 10.0, 1.0).to(p.device)
        elif cfg.lr_profile == "depth" and layer:
            factors[p] = 10.0 ** (2 * int(layer[1]) / max(1, cfg.n_layers - 1) - 1)
    return factors


def pass_through(cfg, seed: int, stream: Stream, base: dict, tok, run, stop, bar: StepBar) -> dict | None:
    """Train along the stream and ask on the way; None if asked to stop."""
    dist, dtype, lags = run.dist, choose_dtype(cfg.dtype, run.dist.device)[0], lags_of(cfg)
    model, optimizer = load_base(cfg, base, dist, carries(cfg))
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dtype == "fp16")
    net, factors = net_of(model, cfg, stream.steps, dist), rate_factors(cfg, model, seed)
    n = len(stream.pairs)

    def ask_pairs(pairs) -> np.ndarray:  # (4, streamed or not, pairs)
        asked = [stream.pairs[i][side] for side in (0, 1) for i in pairs]
        return ask(model, [stream.contexts[i] for i in pairs] * 2, asked, tok, dist.device).reshape(4, 2, -1)

    before, after = ask_pairs(range(n)), np.full((4, 2, n, len(lags)), np.nan)
    for step in range(stream.steps):
        if stop.agreed(dist):
            return None
        began, rows = time.perf_counter(), slice(step * cfg.stride, step * cfg.stride + cfg.window_size)
        set_learning_rates(optimizer, cfg, step, stream.steps)
        loss = backward(net, split_batch(stream.x[rows], stream.y[rows], cfg, dist), dist, dtype, scaler)
        old = [p.detach().clone() for p in factors]
        update(model, optimizer, scaler, cfg.grad_clip, loss)
        rescale(factors, old)
        due = [(i, lags.index(step - t)) for i, t in enumerate(stream.last) if step - t in lags]
        if due:
            pairs, places = zip(*due, strict=True)
            after[:, :, pairs, places] = ask_pairs(pairs)
        run.seconds += time.perf_counter() - began
        bar.tick(time.perf_counter() - began)
        bar.show(f"seed {seed}, step {step + 1} of {stream.steps}: loss {loss.item():.3f}")
    return {"exposures": [min(stream.exposures), max(stream.exposures)],
            "word_tokens": float(np.mean([len(s.target) for pair in stream.pairs for s in pair])),
            "before": before.tolist(), "after": after.tolist()}


def window(cfg, arms, labels, text, worlds, run, stop):
    """All seeds of all arms: (summary, words), or None if asked to stop."""
    done, found = run.finished_parts(), sentences_of(text)
    keys = list(itertools.product(range(cfg.seed, cfg.seed + cfg.seeds), range(len(arms))))
    streams = {(s, a): make_stream(arms[a], found, s, text.tok.eot) for s, a in keys}
    todo = [(s, a) for s, a in keys if (labels[a], s) not in done]
    bases = bases_of(arms, [a for _, a in todo], text, worlds, run, stop)
    if bases is None:
        return None
    steps = sum(streams[key].steps for key in keys)
    with StepBar(steps - sum(streams[key].steps for key in todo), steps, run.dist.is_main) as bar:
        for s, a in todo:
            with named(f"{labels[a]}, seed {s}"):
                row = pass_through(arms[a], s, streams[s, a], bases[a], text.tok, run, stop, bar)
            if row is None:
                return None
            run.finish_part((labels[a], s), row, done)
    rows = [{s: done[label, s] for s in range(cfg.seed, cfg.seed + cfg.seeds)} for label in labels]
    analysed = [analyse_window(cfg, *each) for each in zip(arms, labels, rows, strict=True)]
    logp = [{s: gains(r)[3, :, 0] for s, r in by_seed.items()} for by_seed in rows]
    words = [*map(words_of_window, analysed), *between(logp, labels, cfg.bound, "log p, leaving the window")]
    return write_report(run, table_of_window(analysed), words, lambda path: draw_window(analysed, path),
                 {"arms": analysed, "counts": {"parts": len(keys), "steps": steps}})


def gains(row: dict) -> np.ndarray:
    """(4, pairs, lags): what the streamed sentences gained since before the stream, beyond their partners."""
    before, after = np.array(row["before"])[..., None], np.array(row["after"])
    return stats.difference_in_differences(before[:, 0], after[:, 0], before[:, 1], after[:, 1])


def analyse_window(cfg, arm, label: str, rows: dict[int, dict]) -> dict:
    lags, passing = lags_of(arm), -(-arm.window_size // arm.stride)
    out = {"arm": label, "seeds": list(rows), "lags": lags, "scores": {},
           "exposures": [f(r["exposures"][i] for r in rows.values()) for i, f in enumerate((min, max))],
           "word_tokens": float(np.mean([r["word_tokens"] for r in rows.values()]))}
    before, after = (np.mean([np.mean(r[key], axis=2) for r in rows.values()], axis=0)
                     for key in ("before", "after"))  # (4, 2) and (4, 2, lags)
    effects = [gains(r) for r in rows.values()]  # (4, pairs, lags) each
    for k, name in enumerate(SCORES):
        mean, half = band([e[k] for e in effects])
        out["scores"][name] = entry = {
            "before": before[k].tolist(), "streamed": after[k, 0].tolist(), "never": after[k, 1].tolist(),
            "mean": mean, "half": half,
            "at": {str(lag): describe([e[k][:, lags.index(lag)] for e in effects], cfg.bound)
                   for lag in dict.fromkeys((0, passing, 10 * passing))}}
        judge(list(entry["at"].values()), cfg.bound)
    return out


# ------------------------------------------------------------------------------------------------------------
# The trace of a stretch


class Places(NamedTuple):
    a: int  # the stretch's first token
    b: int  # its last
    elsewhere: int  # the first token of another stretch
    far: np.ndarray  # (64,) where windows of far text begin


def places_of(cfg, tokens, seed: int, i: int) -> Places:
    """A random stretch; another, and windows of far text, all at least twice `reach` apart."""
    T, L, rng = cfg.max_seq_len, cfg.stretch, np.random.default_rng((seed, 19, i))
    margin, apart, need = cfg.reach + 3 * T, 2 * cfg.reach, 16 * cfg.reach + 4 * L + 16 * T
    if len(tokens) < need:
        raise UserError(f"this needs {need:,} training tokens, but there are {len(tokens):,}; use a smaller "
                        "--reach or --stretch, or more text")

    def clear(starts: np.ndarray, length: int, of: int) -> np.ndarray:
        return (starts + length < of - apart) | (starts > of + L + apart)

    a = int(rng.integers(margin, len(tokens) - margin - L))
    others = rng.integers(margin, len(tokens) - margin - L, 1000)
    c = int(others[clear(others, L, a)][0])
    far = rng.integers(0, len(tokens) - T - 1, 1000)
    return Places(a, a + L - 1, c, far[clear(far, T, a) & clear(far, T, c)][:64])


def texts_of(cfg, tokens, at: Places, seed: int, i: int) -> dict[str, np.ndarray]:
    """What is retrained: the stretch, and two controls."""
    stretch = np.asarray(tokens[at.a:at.b + 1])
    return {"sequence": stretch, "shuffled": np.random.default_rng((seed, 20, i)).permutation(stretch),
            "elsewhere": np.asarray(tokens[at.elsewhere:at.elsewhere + cfg.stretch])}


def stride_of(cfg) -> int:
    """Tokens from one window to the next."""
    return max(1, cfg.max_seq_len - round(cfg.overlap * cfg.max_seq_len))


def windows_in(cfg, tokens: np.ndarray) -> np.ndarray:
    """(N, T + 1): the windows of a text, the last one at its end."""
    end = len(tokens) - cfg.max_seq_len - 1
    starts = np.unique([*range(0, end, stride_of(cfg)), end])
    return tokens[starts[:, None] + np.arange(cfg.max_seq_len + 1)].astype(np.int64)


def reading(cfg, at: Places):
    """Windows around a stretch, one of which begins right behind it: where they begin (N,), and of each token
    that is read in them its place and where its window begins. A token is read in the window that has most
    tokens before it."""
    T, s = cfg.max_seq_len, stride_of(cfg)
    back, ahead = -(-(cfg.stretch + cfg.reach + 2 * T) // s), -(-(cfg.reach + T) // s)
    starts = at.b + 1 + s * np.arange(-back, ahead)
    return starts, (starts[:, None] + np.arange(T - s + 1, T + 1)).flatten(), np.repeat(starts, s)


@torch.inference_mode()
def token_losses(cfg, model, tokens, starts: np.ndarray, device) -> np.ndarray:
    """(N * s,): losses, in nats, of the last s = stride_of(cfg) targets of windows, in fp32."""
    out, s, T = [], stride_of(cfg), cfg.max_seq_len
    model.eval()
    for some in np.array_split(starts, -(-len(starts) // 64)):
        rows = torch.from_numpy(tokens[some[:, None] + np.arange(T + 1)].astype(np.int64)).to(device)
        logits = model.head(model.hidden(rows[:, :-1])[:, -s:])[..., :model.n_tokens].float()  # (n, s, V)
        out.append(F.cross_entropy(logits.flatten(0, 1), rows[:, -s:].flatten(), reduction="none").cpu())
    model.train()
    return torch.cat(out).double().numpy()


def profile(cfg, change: np.ndarray, places: np.ndarray, begins: np.ndarray, at: Places) -> dict:
    """Means of D inside the stretch, and by distance in bins of max_seq_len tokens. Tokens behind the stretch
    whose window holds tokens of it are left out, with those as far before it."""
    shared = (places > at.b) & (begins <= at.b)
    first = 1 + int((places[shared] - at.b).max(initial=0)) * cfg.exclude_overlap
    out = {"first": first, "inside": float(change[(places >= at.a) & (places <= at.b)].mean())}
    for side, distance in (("ahead", places - at.b), ("behind", at.a - places)):
        bins = (distance - first) // cfg.max_seq_len
        used = (distance >= first) & (bins < cfg.reach // cfg.max_seq_len)
        out[side] = (np.bincount(bins[used], change[used]) / np.bincount(bins[used])).tolist()
    return out


def retrain(cfg, seed: int, i: int, base: dict, tokens, run, stop, bar: StepBar) -> dict | None:
    """Profiles around one stretch after training on it, and on the controls; None if asked to stop."""
    dist, dtype, out = run.dist, choose_dtype(cfg.dtype, run.dist.device)[0], {}
    at = places_of(cfg, tokens, seed, i)
    starts, places, begins = reading(cfg, at)
    for name, trained in texts_of(cfg, tokens, at, seed, i).items():
        began = time.perf_counter()
        model, optimizer = load_base(cfg, base, dist, carries(cfg))
        scaler = torch.amp.GradScaler(dist.device.type, enabled=dtype == "fp16")
        net, rows = net_of(model, cfg, cfg.retrain_steps, dist), windows_in(cfg, trained)  # (N, T + 1)
        if not out:
            before = [token_losses(cfg, model, tokens, z, dist.device) for z in (starts, at.far)]
        for step in range(cfg.retrain_steps):
            if stop.agreed(dist):
                return None
            set_learning_rates(optimizer, cfg, step, cfg.retrain_steps)
            loss = backward(net, split_batch(rows[:, :-1], rows[:, 1:], cfg, dist), dist, dtype, scaler)
            update(model, optimizer, scaler, cfg.grad_clip, loss)
        near, far = (token_losses(cfg, model, tokens, z, dist.device) - old
                     for z, old in zip((starts, at.far), before, strict=True))
        out[name] = {"far": float(far.mean()), **profile(cfg, near, places, begins, at)}
        run.seconds += time.perf_counter() - began
        bar.tick(time.perf_counter() - began)
        bar.show(f"seed {seed}, stretch {i + 1} of {cfg.intervals}, {name}: loss {loss.item():.3f}")
    return {"a": at.a, "b": at.b, "retrained": out}


def trace(cfg, arms, labels, text, worlds, run, stop):
    """All stretches of all seeds of all arms: (summary, words), or None if asked to stop."""
    done, seeds = run.finished_parts(), range(cfg.seed, cfg.seed + cfg.seeds)
    keys = [(s, a, i) for s in seeds for a, c in enumerate(arms) for i in range(c.intervals)]
    for s, a, i in keys:
        places_of(arms[a], text.train, s, i)  # before a base is trained for nothing
    todo = [(s, a, i) for s, a, i in keys if (labels[a], s, i) not in done]
    bases = bases_of(arms, [a for _, a, _ in todo], text, worlds, run, stop)
    if bases is None:
        return None
    with StepBar(3 * (len(keys) - len(todo)), 3 * len(keys), run.dist.is_main) as bar:
        for s, a, i in todo:
            with named(f"{labels[a]}, seed {s}, stretch {i + 1}"):
                row = retrain(arms[a], s, i, bases[a], text.train, run, stop, bar)
            if row is None:
                return None
            run.finish_part((labels[a], s, i), row, done)
    rows = [{s: [done[label, s, i]["retrained"] for i in range(c.intervals)] for s in seeds}
            for c, label in zip(arms, labels, strict=True)]
    analysed = [analyse_trace(cfg, *each) for each in zip(arms, labels, rows, strict=True)]
    found = [{s: asymmetries(r, "sequence") for s, r in by_seed.items()} for by_seed in rows]
    words = [*map(words_of_trace, analysed), *between(found, labels, cfg.bound, "ahead - before", pooled)]
    return write_report(run, table_of_trace(analysed), words, lambda path: draw_trace(analysed, path),
                 {"arms": analysed, "counts": {"parts": len(keys)}})


def asymmetries(stretches: list[dict], name: str) -> np.ndarray:
    """(stretches,): the mean over distances of K(+d) - K(-d), from which D on far text cancels."""
    return np.array([np.mean(r[name]["ahead"]) - np.mean(r[name]["behind"]) for r in stretches])


def analyse_trace(cfg, arm, label: str, rows: dict[int, list[dict]]) -> dict:
    every, T = [r for stretches in rows.values() for r in stretches], arm.max_seq_len
    first = every[0]["sequence"]["first"]
    out = {"arm": label, "seeds": list(rows), "stretches": len(every), "left_out": first - 1, "retrained": {},
           "distances": (np.arange(arm.reach // T) * T + first + (T - 1) / 2).tolist()}
    for name in every[0]:
        K = np.array([np.subtract([r[name]["behind"], r[name]["ahead"]], r[name]["far"]) for r in every])
        low, high = stats.simultaneous_band(K.reshape(len(K), -1)) if len(K) > 1 else \
            np.full((2, K[0].size), np.nan)  # K is (stretches, 2, distances)
        out["retrained"][name] = {
            "inside": float(np.mean([r[name]["inside"] - r[name]["far"] for r in every])),
            "behind": K[:, 0].mean(axis=0).tolist(), "ahead": K[:, 1].mean(axis=0).tolist(),
            "low": low.reshape(2, -1).tolist(), "high": high.reshape(2, -1).tolist(),
            "asymmetry": pooled([asymmetries(r, name) for r in rows.values()], cfg.bound)}
    out["order"] = pooled([asymmetries(r, "sequence") - asymmetries(r, "shuffled") for r in rows.values()],
                          cfg.bound)
    near = [np.array([r["sequence"]["ahead"][0] - r["sequence"]["behind"][0] for r in stretches])
            for stretches in rows.values()]
    out["nearest"] = pooled(near, cfg.bound)
    judge([*(r["asymmetry"] for r in out["retrained"].values()), out["order"], out["nearest"]], cfg.bound)
    return out


# ------------------------------------------------------------------------------------------------------------
# Words, tables, figures


def words_of_window(a: dict) -> str:
    times, lags = " to ".join(map(str, dict.fromkeys(a["exposures"]))), a["lags"]
    lines = [f"\n{a['arm']} ({len(a['seeds'])} seeds; each sentence is trained {times} times; last words "
             f"have {a['word_tokens']:.1f} tokens)"]
    for i, when in ((0, "as they leave the window"), (-1, f"{lags[-1]} steps later")):
        streamed, never = (", ".join(f"{name} {100 * a['scores'][name][side][i]:.0f}" for name in SCORES[:3])
                           for side in ("streamed", "never"))
        lines.append(f"  {when}, right of 100: {streamed}; never trained: {never}. Added by the stream:")
        lines += [f"    {name}: {said(entry['at'][str(lags[i])])}" for name, entry in a["scores"].items()]
    curve = a["scores"]["log p"]["mean"]
    return "\n".join([*lines, f"  the added log p is largest after {lags[np.argmax(curve)]} steps: "
                      f"{max(curve):+.2f} nats"])


def table_of_window(arms: list[dict]) -> str:
    lines = [["arm", "exposures", "score", "steps after", "streamed", "never trained", "added", "95 % from",
              "to", "p (Holm)", "verdict"]]
    for a in arms:
        for name, entry in a["scores"].items():
            for lag, e in entry["at"].items():
                i = a["lags"].index(int(lag))
                lines.append([a["arm"], "-".join(map(str, dict.fromkeys(a["exposures"]))), name, lag,
                              f"{entry['streamed'][i]:.3f}", f"{entry['never'][i]:.3f}", *cells(e)])
    return grid(lines)


def draw_window(arms: list[dict], path: str) -> None:
    """A column per score: streamed and never-trained sentences above, what the stream added below."""
    figure = new_figure(13, 6)
    for column, name in zip(figure.subplots(2, len(SCORES), sharex=True).T, SCORES, strict=True):
        for i, a in enumerate(arms):
            e, color = a["scores"][name], f"C{i}"
            mean, half = np.array(e["mean"]), np.array(e["half"])
            column[0].plot(a["lags"], e["streamed"], color=color, label=a["arm"])
            column[0].plot(a["lags"], e["never"], color=color, linestyle=":")
            column[1].plot(a["lags"], mean, color=color)
            column[1].fill_between(a["lags"], mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
        column[0].set_title(f"{name}, nats" if name == "log p" else f"{name}, share right", fontsize=10)
        column[1].axhline(0, color="black", linewidth=0.8)
        column[1].set(xscale="symlog", xlabel="steps after it left the window")
        for axes in column:
            axes.grid(alpha=0.3)
        if name == SCORES[0]:
            column[0].set_ylabel("streamed; dotted: never trained")
            column[1].set_ylabel("added by the stream, 95 %")
            column[0].legend(fontsize=7)
    save_figure(figure, path)


def words_of_trace(a: dict) -> str:
    lines = [f"\n{a['arm']} ({len(a['seeds'])} seeds, {a['stretches']} stretches; the {a['left_out']} tokens "
             "nearest to a stretch are left out on both sides)"]
    for name, r in a["retrained"].items():
        lines.append(f"  {name}: {r['inside']:+.3f} nats inside the stretch, {np.mean(r['behind']):+.4f} "
                     f"before it, {np.mean(r['ahead']):+.4f} ahead of it; "
                     f"ahead - before {said(r['asymmetry'])}")
    e, own = a["order"], a["retrained"]["sequence"]["asymmetry"]
    lines += [f"  the same, sequence - shuffled: {said(e)}",
              f"  ahead - before in the nearest tokens alone: {said(a['nearest'])}"]
    if e["verdict"] == own["verdict"] == "signal" and max(e["mean"], own["mean"]) < 0:
        lines.append("  text ahead became easier than text before, because of the order of the stretch")
    return "\n".join(lines)


def table_of_trace(arms: list[dict]) -> str:
    lines = [["arm", "retrained", "inside", "before", "ahead", "ahead - before", "95 % from", "to",
              "p (Holm)", "verdict"]]
    for a in arms:
        lines += [[a["arm"], name, *(f"{np.mean(r[side]):+.4f}" for side in ("inside", "behind", "ahead")),
                   *cells(r["asymmetry"])] for name, r in a["retrained"].items()]
        lines += [[a["arm"], name, "", "", "", *cells(a[key])]
                  for name, key in (("sequence - shuffled", "order"), ("sequence, nearest", "nearest"))]
    return grid(lines)


def draw_trace(arms: list[dict], path: str) -> None:
    """K against distance, a panel per arm; bands hold at all distances at once; grey is the control."""
    figure = new_figure(7 * len(arms), 4)
    for axes, a in zip(figure.subplots(1, len(arms), squeeze=False, sharey=True)[0], arms, strict=True):
        d = np.array(a["distances"])
        for name, color in (("elsewhere", "grey"), ("shuffled", "C1"), ("sequence", "C0")):
            r = a["retrained"][name]
            for k, (side, x) in enumerate((("behind", -d), ("ahead", d))):
                axes.plot(x, r[side], color=color, label=name if k else None)
                if name != "shuffled":
                    axes.fill_between(x, r["low"][k], r["high"][k], color=color, alpha=0.2, linewidth=0)
        axes.axvspan(-a["left_out"], a["left_out"], color="black", alpha=0.15, linewidth=0)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(f"{a['arm']}; inside: {a['retrained']['sequence']['inside']:+.2f} nats", fontsize=9)
        axes.set(xlabel="tokens before or ahead of the stretch", ylabel="K, nats per token")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, path)
