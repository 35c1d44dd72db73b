"""Mean differences with intervals and tests: pure functions of numbers, no files, no torch."""
import bisect
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


def against_noise_floor(differences: Sequence[Sequence[float]]) -> tuple[float, list[float]]:
    """Arms' differences to one base, a list of one number per seed for each arm: (their standard deviation
    over seeds, pooled over the arms, and each arm's two-sided p-value of a mean of 0 given that noise). With
    few seeds this decides more than each arm's own t-test; it assumes that all arms scatter alike. nan for
    arms with fewer than two seeds."""
    many = [np.asarray(d, dtype=float) for d in differences if len(d) > 1]
    freedom = sum(len(d) - 1 for d in many)
    if not freedom:
        return math.nan, [math.nan] * len(differences)
    sd = math.sqrt(sum(((d - d.mean()) ** 2).sum() for d in many) / freedom)
    floor = max(sd, 1e-12)
    return sd, [2 * float(stats.t.sf(abs(np.mean(d)) * math.sqrt(len(d)) / floor, freedom))
                if len(d) > 1 else math.nan for d in differences]


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
# Effects over seeds and items. by_seed is a list of one array per seed: its items' effects, all in one unit


def difference_in_differences(treated_before, treated_after, control_before, control_after) -> np.ndarray:
    """Per pair, in the units of the data: what the treated one gained beyond its control."""
    treated = np.subtract(treated_after, treated_before, dtype=float)
    return treated - np.subtract(control_after, control_before, dtype=float)


def random_signs(n: int, flips: int, seed: int, width: int = 1):
    """`flips` rows of n random +-1, in blocks of so many rows that (rows, max(n, width)) takes about 8 MB."""
    rng, block = np.random.default_rng(seed), max(1, 2 ** 20 // max(n, width))
    for start in range(0, flips, block):
        yield rng.integers(0, 2, (min(block, flips - start), n), dtype=np.int8) * 2.0 - 1


def sign_flip(differences, flips: int = 10_000, seed: int = 0) -> float:
    """Two-sided p of a mean of 0, for differences that are symmetric around it (Fisher 1935): the share of
    sign patterns whose mean is at least as far from 0, up to rounding. All 2^n patterns if these are at most
    `flips` (then p is at least 2 / 2^n), else (1 + hits) / (1 + flips) of a random sample. nan for no
    differences, or for a nan among them."""
    x = np.asarray(differences, dtype=float)
    if not len(x) or np.isnan(x).any():
        return math.nan
    least = abs(x.sum()) - 1e-12 * abs(x).sum()
    if 2 ** len(x) <= flips:
        sums = np.zeros(1)
        for value in x:
            sums = np.concatenate([sums + value, sums - value])
        return float((abs(sums) >= least).mean())
    hits = sum(int((abs(signs @ x) >= least).sum()) for signs in random_signs(len(x), flips, seed))
    return (1 + hits) / (1 + flips)


def seeds_of(by_seed: list) -> list[np.ndarray]:
    arrays = [np.asarray(v, dtype=float) for v in by_seed]
    if not all(v.size for v in arrays):
        raise ValueError(f"expected items for every seed, got {[v.size for v in arrays]}")
    return arrays


def clustered(by_seed: list, level: float = 0.95) -> Effect:
    """The mean over seeds of the means over items, with the t interval and p of the seeds' means: seeds are
    the unit, and n counts them. The interval covers at its level if these means are normal. From 12 seeds on
    p is by sign flips; with S seeds that cannot fall below 2 / 2^S, so that Holm over a table of tests would
    leave 6 seeds without any verdict. One seed makes a statement about that run only: its items are the unit,
    p by sign flips. No seeds give nan."""
    arrays = seeds_of(by_seed)
    values = [float(v.mean()) for v in arrays] if len(arrays) != 1 else arrays[0].tolist()
    effect = paired_difference(values, [0.0] * len(values), level)
    flipped = len(arrays) >= 12 or len(arrays) == 1 and len(values) > 1
    return effect._replace(p=sign_flip(values)) if flipped else effect


def hierarchical_bootstrap(by_seed: list, draws: int = 10_000, level: float = 0.95, seed: int = 0):
    """(low, high): percentiles of the mean over seeds of the means over items, when seeds are drawn again and
    then the items of each (Davison and Hinkley 1997, 3.8). Too narrow for few seeds that differ: at 95 % it
    covered 81 % (2 seeds), 88 % (3), 91 % (5), 94 % (8), so print the t interval beside it. Too wide for
    seeds that do not differ (99 % at 5), since the noise of items then counts twice."""
    arrays, rng = seeds_of(by_seed), np.random.default_rng(seed)
    chosen = rng.integers(0, len(arrays), (draws, len(arrays)))
    means = np.empty(chosen.shape)
    for s, v in enumerate(arrays):
        places = np.flatnonzero(chosen == s)
        for part in np.array_split(places, 1 + len(places) * len(v) // 2 ** 20):  # 8 MB
            means.flat[part] = v[rng.integers(0, len(v), (len(part), len(v)))].mean(axis=1)
    low, high = np.quantile(means.mean(axis=1), ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def variance_components(by_seed: list) -> tuple[float, float]:
    """(standard deviation of seeds' true effects, of items within a seed), by the method of moments: unbiased
    squares, the first then cut off at 0. One seed: the first is nan. One item a seed: the second is nan, and
    the first holds both."""
    arrays = seeds_of(by_seed)
    df = sum(len(v) - 1 for v in arrays)
    item = sum(((v - v.mean()) ** 2).sum() for v in arrays) / df if df else math.nan
    if len(arrays) < 2:
        return math.nan, math.sqrt(item)
    sampling = np.mean([item / len(v) for v in arrays]) if df else 0.0
    return math.sqrt(max(0.0, np.var([v.mean() for v in arrays], ddof=1) - sampling)), math.sqrt(item)


# ------------------------------------------------------------------------------------------------------------
# Power: what a design of `seeds` seeds with `items` items each can see; spreads and effects in one unit


def standard_error(sd_seed: float, sd_item: float, seeds: int, items: int) -> float:
    """Of the mean over seeds. A nan of variance_components counts as 0; two of them give nan."""
    known = [(sd, n) for sd, n in ((sd_seed, seeds), (sd_item, seeds * items)) if not math.isnan(sd)]
    return math.sqrt(sum(sd ** 2 / n for sd, n in known)) if known else math.nan


def freedom(seeds: int, items: int) -> int:
    return seeds - 1 if seeds > 1 else items - 1


def minimum_detectable(sd_seed: float, sd_item: float, seeds: int, items: int, alpha: float = 0.05,
                       power: float = 0.8) -> float:
    """The effect that the t-test of `clustered` finds with probability `power`: t_{1 - alpha/2} + t_{power}
    standard errors (Bloom 1995). One seed: items are the unit, sd_seed nan. inf for one unit."""
    if (df := freedom(seeds, items)) < 1:
        return math.inf
    errors = stats.t.ppf(1 - alpha / 2, df) + stats.t.ppf(power, df)
    return float(errors) * standard_error(sd_seed, sd_item, seeds, items)


def power_of(effect: float, sd_seed: float, sd_item: float, seeds: int, items: int,
             alpha: float = 0.05) -> float:
    """The probability that the two-sided t-test finds this effect, by the non-central t distribution."""
    df, se = freedom(seeds, items), standard_error(sd_seed, sd_item, seeds, items)
    if df < 1 or se == 0:
        return float(df > 0 and effect != 0)
    t, shift = stats.t.ppf(1 - alpha / 2, df), abs(effect) / se
    wrong_sign = np.nan_to_num(stats.nct.cdf(-t, df, shift))  # scipy's nan stands for less than 1e-14
    return float(stats.nct.sf(t, df, shift) + wrong_sign)


def seeds_needed(effect: float, sd_seed: float, sd_item: float, items: int, alpha: float = 0.05,
                 power: float = 0.8, most: int = 1000) -> int:
    """The fewest seeds, at least 2, that find the effect with this power; most + 1 if `most` seeds do not."""
    return 2 + bisect.bisect_left(range(2, most + 1), True, key=lambda n: power_of(
        effect, sd_seed, sd_item, n, items, alpha) >= power)


def equivalence(differences, bound: float, level: float = 0.95) -> tuple[float, float, float]:
    """Two one-sided t-tests (Schuirmann 1987) of a mean within +-bound: (the larger p, low, high). The
    interval is that of 2 level - 1 (90 %); it lies within the bound exactly if p < 1 - level. Fewer than two
    differences show nothing: (1, -inf, inf)."""
    if not bound > 0:
        raise ValueError(f"bound: expected a positive number in the units of the data, got {bound}")
    x = np.asarray(differences, dtype=float)
    if len(x) < 2:
        return 1.0, -math.inf, math.inf
    mean, se = x.mean(), x.std(ddof=1) / math.sqrt(len(x))
    p = stats.t.sf((bound - abs(mean)) / se, len(x) - 1) if se else abs(mean) >= bound
    half = stats.t.ppf(level, len(x) - 1) * se
    return float(p), float(mean - half), float(mean + half)


def hits_above_chance(hits: int, n: int, chance: float) -> float:
    """One-sided binomial p: the probability of at least so many hits in n guesses; nan for n = 0."""
    return float(stats.binom.sf(hits - 1, n, chance)) if n else math.nan


# ------------------------------------------------------------------------------------------------------------
# Curves over time


def simultaneous_band(curves, level: float = 0.95, flips: int = 2000, seed: int = 0):
    """(low (T,), high (T,)) around the mean of curves (n, T), which hold the true mean at all T points at
    once: the quantile of the largest |t| when centred curves change sign (Westfall and Young 1993). t has its
    own spread in every flip: with that of the data, 8 curves covered 54 %, not 95 %. Needs 5 curves: 3 have
    too few sign patterns (49 %)."""
    x = np.asarray(curves, dtype=float)
    n, mean, largest = len(x), x.mean(axis=0), []
    if n < 2:
        return mean - math.inf, mean + math.inf
    square = ((x - mean) ** 2).mean(axis=0)  # (T,)
    for signs in random_signs(n, flips, seed, x.shape[1]):
        flipped = signs @ (x - mean) / n  # (some, T)
        error = np.sqrt(np.maximum(square - flipped ** 2, 1e-15 * square) / (n - 1))
        largest.append((abs(flipped) / np.where(error > 0, error, 1.0)).max(axis=1))
    half = np.quantile(np.concatenate(largest), level) * np.sqrt(square / (n - 1))
    return mean - half, mean + half


class Forgetting(NamedTuple):
    kind: str  # log, power or exponential; none = too few points
    parameters: dict
    half_life: float  # steps at which the fitted R falls to 0.5: inf = never; nan = not fitted
    bic: dict  # by kind


def forgetting_curve(steps: Sequence[float], retained: Sequence[float]) -> Forgetting:
    """The law of R(t), the share retained t >= 1 steps after the peak, by least squares and the smallest BIC:
    log, R = b - a log10 t (Chang 2024); power, R = A (1 + t)^-k (Wixted 1991); exponential with a floor, R =
    B + (1 - B) exp(-t / tau), |B| <= 1 (Tirumala 2022). A half-life beyond the last step is extrapolated.
    Fewer than 5 different steps: none."""
    t, r = np.asarray(steps, dtype=float), np.asarray(retained, dtype=float)
    if t.shape != r.shape or (t < 1).any() or not np.isfinite([t, r]).all():
        raise ValueError(f"expected finite steps >= 1 and as many finite shares, got {steps} and {retained}")
    if len(np.unique(t)) < 5:
        return Forgetting("none", {}, math.nan, {})

    def power(k):
        shape = (1 + t) ** -k
        A = shape @ r / (shape @ shape)
        return A * shape, {"A": float(A), "k": k}, (2 * max(A, np.float64(0))) ** (1 / k) - 1

    def exponential(tau):
        rest = np.exp(-t / tau)
        B = np.clip((1 - rest) @ (r - rest) / ((1 - rest) @ (1 - rest)), -1, 1)
        half_life = tau * math.log((1 - B) / (0.5 - B)) if B < 0.5 else math.inf
        return B + (1 - B) * rest, {"B": float(B), "tau": tau}, half_life

    def best(law, low, high):  # by its non-linear parameter: a grid first, to keep out of local minima
        def loss(x):
            return float(((law(math.exp(x))[0] - r) ** 2).sum())
        grid = np.linspace(math.log(low), math.log(high), 100)
        i = int(np.argmin([loss(x) for x in grid[1:-1]]))
        near = optimize.minimize_scalar(loss, bounds=grid[[i, i + 2]], method="bounded",
                                        options={"xatol": 1e-9})
        return law(math.exp(near.x))

    with np.errstate(over="ignore"):
        slope, b = np.polyfit(np.log10(t), r, 1)
        half_life = 10 ** ((b - 0.5) / -slope) if slope < 0 else math.inf if b > 0.5 else 0.0
        fits = {"log": (b + slope * np.log10(t), {"b": float(b), "a": -float(slope)}, half_life),
                "power": best(power, 1e-4, 10),
                "exponential": best(exponential, t.min() / 20, 1000 * t.max())}
    bic = {kind: len(t) * math.log(max(float(((fit - r) ** 2).sum()), 1e-18) / len(t)) + 2 * math.log(len(t))
           for kind, (fit, _, _) in fits.items()}
    kind = min(bic, key=bic.get)
    return Forgetting(kind, fits[kind][1], max(0.0, float(fits[kind][2])), bic)


def revival(treated, control, flips: int = 10_000, seed: int = 0) -> tuple[float, int, int, float]:
    """(rise, t1, t2, p) of curves (n, T): the largest rise, from column t1 to a later t2, of the mean of
    treated - control, in its units; and how often noise around a mean that never rises does as much. That
    noise is the centred curves under random signs, widened for few pairs as t is wider than normal; p is at
    least 2 / 2^n. To its rise from t1 to t2 the null adds the observed fall so far as it is beyond doubt: its
    one-sided 95 % bound, cut off at 0 (moment selection, Andrews and Soares 2010). An isotonic fit instead
    takes noise for falls and rejects 8 % at 5 %; no fall at all is blind to a rise after a steep one."""
    d = np.subtract(treated, control, dtype=float)
    n, T = d.shape
    if n < 2 or T < 2 or not np.isfinite(d).all():
        raise ValueError(f"expected at least 2 pairs and 2 points, all finite, got {n} and {T}: {d}")
    mean = d.mean(axis=0)
    rises = mean - mean[:, None]  # (T, T): from row to column
    covariance = np.cov(d.T) / n
    variance = np.diag(covariance) + np.diag(covariance)[:, None] - 2 * covariance
    falls = np.minimum(0.0, rises + stats.t.ppf(0.95, n - 1) * np.sqrt(np.maximum(variance, 0.0)))
    t1, t2 = np.unravel_index(np.where(np.tri(T, dtype=bool), -np.inf, rises).argmax(), (T, T))
    hits, least = 0, rises[t1, t2] - 1e-12 * abs(d).max()
    wide = math.sqrt(n / (n - 1)) * stats.t.ppf(0.99, n - 1) / stats.norm.ppf(0.99)
    for signs in random_signs(n, flips, seed, T):
        noise = wide * (signs @ (d - mean)) / n  # (some, T)
        found = [(noise[:, [j]] - noise[:, :j] + falls[:j, j]).max(axis=1) for j in range(1, T)]
        hits += int((np.max(found, axis=0) >= least).sum())
    return float(rises[t1, t2]), int(t1), int(t2), max(2.0 ** (1 - n), (1 + hits) / (1 + flips))
