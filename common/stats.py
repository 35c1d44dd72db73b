"""Mean differences with intervals and tests: pure functions of numbers, no files, no torch."""
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats


class Effect(NamedTuple):
    """A mean difference, its confidence interval, and the two-sided p-value of no difference."""
    mean: float
    low: float
    high: float
    p: float
    n: int  # pairs


def paired_difference(treated: Sequence[float], control: Sequence[float], level: float = 0.95) -> Effect:
    """Mean of treated[i] - control[i] in the units of the data, with the t interval and the paired t-test
    (Student 1908). They assume independent pairs with normal differences.
    One pair gives an infinite interval and p = nan; no pairs give nan throughout. If the differences agree to
    rounding, the interval is their mean, and p is 1 if all of them are 0, else 0."""
    differences = [a - b for a, b in zip(treated, control, strict=True)]
    if not differences:
        return Effect(math.nan, math.nan, math.nan, math.nan, 0)
    mean = sum(differences) / len(differences)
    if len(differences) == 1:
        return Effect(mean, -math.inf, math.inf, math.nan, 1)
    if max(differences) - min(differences) <= 1e-12 * max(map(abs, [*treated, *control])):  # t would be x / 0
        return Effect(mean, mean, mean, 0.0 if any(differences) else 1.0, len(differences))
    test = stats.ttest_rel(treated, control)
    low, high = test.confidence_interval(level)
    return Effect(mean, float(low), float(high), float(test.pvalue), len(differences))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for the number of tests, in the given order (Holm 1979, step-down): rejecting those
    below alpha rejects a true hypothesis with probability at most alpha, however the tests depend on each
    other. A nan is not a test: it stays nan and is not counted."""
    tests = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, least = list(p_values), 0.0
    for rank, (p, i) in enumerate(tests):
        adjusted[i] = least = max(least, min(1.0, (len(tests) - rank) * p))
    return adjusted


# ------------------------------------------------------------------------------------------------------------
# Effects over seeds and items


def difference_in_differences(treated_before, treated_after, control_before, control_after) -> np.ndarray:
    """Per pair: what the treated one gained beyond its control."""
    a, b, c, d = (np.asarray(x, dtype=float) for x in (treated_before, treated_after, control_before, control_after))
    return (b - a) - (d - c)


def sign_flip(differences, flips: int = 10_000, seed: int = 0) -> float:
    """Two-sided p of a mean of 0 for differences that are symmetric under it: the share of sign patterns whose mean
    is at least as far from 0. All 2^n of them if these are at most `flips`, else (1 + hits) / (1 + flips) of a
    sample. The smallest possible p is 2 / 2^n. nan for no differences."""
    x = np.asarray(differences, dtype=float)
    if not len(x):
        return math.nan
    least = abs(x.mean()) * (1 - 1e-12)
    if 2 ** len(x) <= flips:
        signs = 1 - 2 * (np.arange(2 ** len(x))[:, None] >> np.arange(len(x)) & 1)  # (2^n, n)
        return float((abs(signs @ x / len(x)) >= least).mean())
    rng, hits, block = np.random.default_rng(seed), 0, max(1, 2**20 // len(x))
    for start in range(0, flips, block):
        signs = rng.integers(0, 2, (min(block, flips - start), len(x))) * 2 - 1
        hits += int((abs(signs @ x / len(x)) >= least).sum())
    return (1 + hits) / (1 + flips)


def clustered(by_seed: list, level: float = 0.95) -> Effect:
    """The mean over seeds of the means over items, with the t interval and p of the seeds' means: seeds are the
    unit. From 12 seeds on p is by sign flips; with S seeds that cannot fall below 2 / 2^S, so that Holm over a
    table of tests would leave 6 seeds without any verdict. One seed makes a statement about that run only: its
    items are the unit, p by sign flips."""
    values = [float(np.mean(v)) for v in by_seed] if len(by_seed) > 1 else [float(v) for v in by_seed[0]]
    effect = paired_difference(values, [0.0] * len(values), level)
    flipped = len(by_seed) >= 12 or len(by_seed) == 1 and len(values) > 1
    return effect._replace(p=sign_flip(values)) if flipped else effect


def hierarchical_bootstrap(by_seed: list, draws: int = 10_000, level: float = 0.95, seed: int = 0):
    """(low, high): percentiles of the mean over seeds of the means over items, when seeds are drawn again and then
    the items of each. Too narrow for few seeds (under about 8): print the t interval beside it."""
    rng, S = np.random.default_rng(seed), len(by_seed)
    means = np.stack([np.asarray(v, float)[rng.integers(0, len(v), (draws, S, len(v)))].mean(axis=2)
                      if draws * S * len(v) <= 2**24 else resampled(np.asarray(v, float), draws, S, rng)
                      for v in by_seed])  # (S, draws, S): seed, draw, the place it may take
    chosen = rng.integers(0, S, (draws, S))
    picked = means[chosen, np.arange(draws)[:, None], np.arange(S)]  # (draws, S)
    low, high = np.quantile(picked.mean(axis=1), ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def resampled(v: np.ndarray, draws: int, S: int, rng) -> np.ndarray:
    """(draws, S) means of resamples of v, drawn as counts to save memory."""
    return np.stack([rng.multinomial(len(v), [1 / len(v)] * len(v), draws) @ v / len(v) for _ in range(S)], axis=1)


def variance_components(by_seed: list) -> tuple[float, float]:
    """(standard deviation of the seeds' effects, of items within a seed), by the method of moments; the first is
    nan for one seed."""
    arrays = [np.asarray(v, dtype=float) for v in by_seed]
    within = [v.var(ddof=1) for v in arrays if len(v) > 1]
    item = float(np.mean(within)) if within else math.nan
    if len(arrays) < 2:
        return math.nan, math.sqrt(item)
    between = float(np.var([v.mean() for v in arrays], ddof=1))
    sampling = float(np.mean([(0.0 if math.isnan(item) else item) / len(v) for v in arrays]))
    return math.sqrt(max(0.0, between - sampling)), math.sqrt(item)


# ------------------------------------------------------------------------------------------------------------
# Power


def standard_error(sd_seed: float, sd_item: float, seeds: int, items: int) -> float:
    """Of the mean over seeds; nan for sd_seed (one seed) counts as 0."""
    return math.sqrt((0.0 if math.isnan(sd_seed) else sd_seed) ** 2 / seeds + sd_item ** 2 / (seeds * items))


def freedom(seeds: int, items: int) -> int:
    return seeds - 1 if seeds > 1 else items - 1


def minimum_detectable(sd_seed: float, sd_item: float, seeds: int, items: int, alpha=0.05, power=0.8) -> float:
    """The effect that is found with probability `power`, by (t_{1 - alpha/2} + t_power) standard errors."""
    df = freedom(seeds, items)
    if df < 1:
        return math.inf
    return float(stats.t.ppf(1 - alpha / 2, df) + stats.t.ppf(power, df)) * standard_error(sd_seed, sd_item, seeds, items)


def power_of(effect: float, sd_seed: float, sd_item: float, seeds: int, items: int, alpha=0.05) -> float:
    """The probability that the two-sided t-test finds this effect, by the non-central t distribution."""
    df, se = freedom(seeds, items), standard_error(sd_seed, sd_item, seeds, items)
    if df < 1 or se == 0:
        return float(se == 0 and effect != 0)
    t, shift = stats.t.ppf(1 - alpha / 2, df), effect / se
    return float(stats.nct.sf(t, df, shift) + stats.nct.cdf(-t, df, shift))


def seeds_needed(effect: float, sd_seed: float, sd_item: float, items: int, alpha=0.05, power=0.8, most=1000) -> int:
    """The fewest seeds (at least 2) that find the effect with this power; `most` if that many do not."""
    return next((n for n in range(2, most) if power_of(effect, sd_seed, sd_item, n, items, alpha) >= power), most)


def equivalence(differences, bound: float, level: float = 0.95) -> tuple[float, float, float]:
    """Two one-sided t-tests (Schuirmann 1987) of a mean inside +-bound: (the larger p, and the 2 level - 1
    interval, which lies inside the bound exactly if p < 1 - level). One value: (1, -inf, inf)."""
    x = np.asarray(differences, dtype=float)
    if len(x) < 2:
        return 1.0, -math.inf, math.inf
    mean, se = x.mean(), x.std(ddof=1) / math.sqrt(len(x))
    if se == 0:
        return float(abs(mean) >= bound), float(mean), float(mean)
    p = max(stats.t.sf((mean + bound) / se, len(x) - 1), stats.t.cdf((mean - bound) / se, len(x) - 1))
    half = stats.t.ppf(level, len(x) - 1) * se
    return float(p), float(mean - half), float(mean + half)


def hits_above_chance(hits: int, n: int, chance: float) -> float:
    """One-sided binomial p of at least so many hits by guessing."""
    return float(stats.binom.sf(hits - 1, n, chance)) if n else math.nan


# ------------------------------------------------------------------------------------------------------------
# Curves


def simultaneous_band(curves, level: float = 0.95, flips: int = 2000, seed: int = 0):
    """(low (T,), high (T,)) around the mean of curves (n, T) that hold at all T points at once: the quantile of the
    largest |t| over points when centred curves change sign together."""
    x = np.asarray(curves, dtype=float)
    mean, se = x.mean(axis=0), np.maximum(x.std(axis=0, ddof=1) / math.sqrt(len(x)), 1e-300)
    signs = np.random.default_rng(seed).integers(0, 2, (flips, len(x))) * 2 - 1
    largest = abs(signs @ (x - mean) / len(x) / se).max(axis=1)
    return mean - np.quantile(largest, level) * se, mean + np.quantile(largest, level) * se


class Forgetting(NamedTuple):
    kind: str  # log, power, exponential, or none: too few points or no fit
    parameters: dict
    half_life: float  # steps at which the fitted R falls to 0.5: inf = never; nan = no fit
    bic: dict  # by kind


def forgetting_curve(steps: Sequence[float], retained: Sequence[float]) -> Forgetting:
    """The law of R(t), t >= 1 steps, with the smallest BIC: log, R = b - a log10 t (Chang 2024); power,
    R = A (1 + t)^-k; exponential with a floor, R = B + (1 - B) exp(-t / tau) (Tirumala 2022)."""
    t, r = np.asarray(steps, dtype=float), np.asarray(retained, dtype=float)
    if len(t) < 5:
        return Forgetting("none", {}, math.nan, {})
    laws = {"log": (lambda t, b, a: b - a * np.log10(t), ("b", "a"), (1.0, 0.3), (-np.inf, np.inf)),
            "power": (lambda t, A, k: A * (1 + t) ** -k, ("A", "k"), (1.0, 0.3), (-np.inf, np.inf)),
            "exponential": (lambda t, B, tau: B + (1 - B) * np.exp(-t / tau), ("B", "tau"),
                            (0.1, float(np.median(t))), ((-1, 1e-3), (1, 1e9)))}
    fits, bic = {}, {}
    for kind, (law, names, guess, bounds) in laws.items():
        try:
            found = optimize.curve_fit(law, t, r, guess, bounds=bounds, maxfev=5000)[0]
        except RuntimeError:  # no convergence
            continue
        squares = float(((law(t, *found) - r) ** 2).sum())
        bic[kind] = len(t) * math.log(max(squares, 1e-18) / len(t)) + 2 * math.log(len(t))
        fits[kind] = dict(zip(names, map(float, found), strict=True))
    if not fits:
        return Forgetting("none", {}, math.nan, {})
    kind = min(bic, key=bic.get)
    return Forgetting(kind, fits[kind], half_life(kind, fits[kind]), bic)


def half_life(kind: str, p: dict) -> float:
    if kind == "log":
        power = (p["b"] - 0.5) / p["a"] if p["a"] > 0 else math.inf
        return 10 ** power if power < 300 else math.inf
    if kind == "power":
        return max(0.0, (2 * p["A"]) ** (1 / p["k"]) - 1) if p["A"] > 0 and p["k"] > 1e-3 else math.inf
    if kind == "exponential":
        return -p["tau"] * math.log((0.5 - p["B"]) / (1 - p["B"])) if p["B"] < 0.5 else math.inf
    raise NotImplementedError(f"forgetting law {kind}")


def falling(y: np.ndarray) -> np.ndarray:
    """The non-increasing curve nearest to y (T,), by pooling adjacent violators."""
    blocks = []
    for value in y:
        blocks.append([float(value), 1])
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    return np.concatenate([[a] * n for a, n in blocks])


def largest_rise(curves: np.ndarray):
    """(rise, t1, t2) of each of curves (F, T): the largest y[t2] - y[t1] with t2 > t1."""
    lowest = np.minimum.accumulate(curves, axis=1)
    rises = curves[:, 1:] - lowest[:, :-1]
    t2 = rises.argmax(axis=1) + 1
    t1 = np.array([c[:j].argmin() for c, j in zip(curves, t2, strict=True)])
    return rises.max(axis=1), t1, t2


def revival(treated, control, flips: int = 10_000, seed: int = 0) -> tuple[float, int, int, float]:
    """(rise, t1, t2, p): the largest rise of the mean of treated - control, (n, T) each, without new exposure, and
    how often noise alone rises as much. A maximum over pairs of points is positive for pure noise, so the null is a
    mean that only falls: its isotonic fit, plus the pairs' residual curves with random signs (Freedman-Lane)."""
    d = np.asarray(treated, dtype=float) - np.asarray(control, dtype=float)
    (rise,), (t1,), (t2,) = largest_rise(d.mean(axis=0)[None])
    down = falling(d.mean(axis=0))
    signs = np.random.default_rng(seed).integers(0, 2, (flips, len(d))) * 2 - 1
    noise = largest_rise(down + signs @ (d - d.mean(axis=0)) / len(d))[0]
    return float(rise), int(t1), int(t2), float((1 + (noise >= rise * (1 - 1e-12)).sum()) / (1 + flips))
