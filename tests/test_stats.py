"""common/stats.py: against closed forms, brute force, other routines of scipy, and simulated experiments."""
import itertools
import math
import random

from common.stats import (
    clustered,
    difference_in_differences,
    equivalence,
    forgetting_curve,
    hierarchical_bootstrap,
    hits_above_chance,
    holm,
    minimum_detectable,
    paired_difference,
    power_of,
    revival,
    seeds_needed,
    sign_flip,
    simultaneous_band,
    standard_error,
    variance_components,
)

import numpy as np
import pytest
from scipy import optimize, stats


def t_of(differences):
    n, mean = len(differences), sum(differences) / len(differences)
    sd = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1))
    return mean, sd / math.sqrt(n)


def test_two_pairs_against_the_cauchy_distribution():
    effect = paired_difference([3.0, 5.5], [2.0, 4.0])
    mean, error = t_of([1.0, 1.5])
    assert effect.mean == mean == 1.25 and effect.n == 2
    assert effect.p == pytest.approx(1 - 2 / math.pi * math.atan(mean / error))
    half = error * math.tan(math.pi * 0.475)
    assert (effect.low, effect.high) == pytest.approx((mean - half, mean + half))


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_three_pairs_against_the_closed_form(level):
    treated, control = [4.1, 4.0, 4.3], [4.2, 4.3, 4.4]  # t with 2 degrees: F(t) = 1/2 + t / 2 sqrt(2 + t^2)
    effect = paired_difference(treated, control, level)
    mean, error = t_of([a - b for a, b in zip(treated, control, strict=True)])
    t = abs(mean) / error
    assert effect.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    half = error * level * math.sqrt(2 / (1 - level ** 2))
    assert (effect.low, effect.high) == pytest.approx((mean - half, mean + half))


def test_noise_shared_by_a_pair_cancels_and_the_sign_is_treated_minus_control():
    noise = [0.0, 100.0, -50.0, 7.0]
    effect = paired_difference([x - 1 + e for x, e in zip(noise, (0.1, -0.1, 0.1, -0.1), strict=True)], noise)
    assert effect.mean == pytest.approx(-1) and effect.high < -0.8 and effect.p < 0.001
    back = paired_difference(noise, [x - 1 for x in noise])
    assert back == (1, 1, 1, 0.0, 4)  # no spread at all
    rounded = paired_difference([0.9, 1.9], [1.0, 2.0])  # -0.1 twice, up to the last bits
    assert rounded.low == rounded.high == rounded.mean == pytest.approx(-0.1) and rounded.p == 0


def test_too_few_pairs_and_no_spread():
    one = paired_difference([3.0], [4.0])
    assert one.mean == -1 and (one.low, one.high) == (-math.inf, math.inf) and math.isnan(one.p)
    assert paired_difference([3.0, 4.0], [3.0, 4.0]) == (0, 0, 0, 1.0, 2)
    none = paired_difference([], [])
    assert none.n == 0 and all(math.isnan(x) for x in none[:4])
    with pytest.raises(ValueError):
        paired_difference([1.0, 2.0], [1.0])


def test_holm_is_the_closure_of_bonferroni():
    """A hypothesis is rejected if every set that contains it is rejected by its smallest p (Marcus 1976)."""
    rng = random.Random(1)
    for n in (1, 2, 3, 5):
        for _ in range(20):
            p = [round(rng.random() ** 3, 2) for _ in range(n)]  # with ties
            sets = [s for k in range(1, n + 1) for s in itertools.combinations(range(n), k)]
            closed = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(n)]
            assert holm(p) == pytest.approx(closed)


def test_holm_does_not_count_nan():
    assert holm([]) == []
    adjusted = holm([0.04, math.nan, 0.01])
    assert adjusted[0] == 0.04 and math.isnan(adjusted[1]) and adjusted[2] == 0.02


# ------------------------------------------------------------------------------------------------------------
# Effects over seeds and items


def rejections(p_values, alpha=0.05):
    """How many, and the most that 999 of 1,000 tests of true hypotheses allow."""
    p_values = list(p_values)
    return sum(p <= alpha for p in p_values), stats.binom.ppf(0.999, len(p_values), alpha)


def draw(rng, seeds, items, sd_seed=0.0, sd_item=1.0, effect=0.0):
    return effect + sd_seed * rng.normal(size=(seeds, 1)) + sd_item * rng.normal(size=(seeds, items))


def test_difference_in_differences_cancels_what_both_gain():
    rng = np.random.default_rng(0)
    before, other, drift = rng.normal(size=(3, 5))
    gain = difference_in_differences(before, before + drift + 2, other, other + drift)
    assert gain == pytest.approx([2] * 5)
    assert difference_in_differences([1], [4], [10], [11]).tolist() == [2]


def test_sign_flip_against_enumeration():
    rng = random.Random(2)
    for n in range(1, 9):
        x = [rng.choice([-2, -1, 0, 1, 3, 5]) for _ in range(n)]  # integers: exact, with ties
        sums = [abs(sum(s * v for s, v in zip(signs, x, strict=True)))
                for signs in itertools.product((-1, 1), repeat=n)]
        exact = sum(s >= abs(sum(x)) for s in sums) / 2 ** n
        assert sign_flip(x) == exact
    assert sign_flip([0.1] * 10 + [-0.1]) == (2 + 2 * 11) / 2 ** 11  # equal sums that differ by rounding
    assert [sign_flip([0.3] * n) for n in (5, 6, 8)] == [2 / 2 ** n for n in (5, 6, 8)]
    assert math.isnan(sign_flip([])) and math.isnan(sign_flip([1.0, math.nan]))


def test_sampled_sign_flips_estimate_the_exact_p():
    x = np.random.default_rng(3).normal(0.4, 1, 13)
    exact, flips = sign_flip(x, 2 ** 13), 2 ** 13 - 1
    sampled = [sign_flip(x, flips, seed) for seed in range(3)]
    assert sampled[0] == sign_flip(x, flips, 0) and len(set(sampled)) == 3
    assert sampled == pytest.approx([exact] * 3, abs=4 * math.sqrt(exact * (1 - exact) / flips))
    assert sign_flip([1.0] * 64, 500) == 1 / 501  # never 0


def test_clustered_takes_seeds_as_the_unit():
    rng = np.random.default_rng(4)
    by_seed = [rng.normal(0.2, 1, n) for n in (3, 50, 7, 20)]
    effect, means = clustered(by_seed, 0.9), [v.mean() for v in by_seed]
    test = stats.ttest_1samp(means, 0)
    assert effect.mean == pytest.approx(np.mean(means)) and effect.n == 4
    assert effect.p == pytest.approx(test.pvalue)
    assert (effect.low, effect.high) == pytest.approx(tuple(test.confidence_interval(0.9)))
    assert clustered([v + 9 for v in rng.normal(size=(12, 2))]).p == 2 / 2 ** 12
    assert clustered([v + 9 for v in rng.normal(size=(11, 2))]).p < 2 / 2 ** 11  # by the t-test: not floored


def test_clustered_with_one_seed_takes_items_as_the_unit():
    x = np.random.default_rng(5).normal(0.5, 1, 9)
    effect = clustered([x])
    assert (effect.low, effect.high) == pytest.approx(tuple(stats.ttest_1samp(x, 0).confidence_interval()))
    assert effect.n == 9 and effect.p == sign_flip(x)
    assert clustered([[2.0]])[:3] == (2, -math.inf, math.inf) and clustered([]).n == 0
    with pytest.raises(ValueError, match=r"items for every seed, got \[1, 0\]"):
        clustered([[1.0], []])


def test_variance_components_against_one_way_anova():
    x = draw(np.random.default_rng(6), 5, 8, 1.0, 2.0)
    within = x.var(axis=1, ddof=1).mean()
    sd_seed, sd_item = variance_components(list(x))
    assert sd_item == pytest.approx(math.sqrt(within))
    assert sd_seed ** 2 == pytest.approx((stats.f_oneway(*x).statistic - 1) * within / 8)
    same = [[-1.0, 1.0], [1.0, -1.0]]  # less between than the items explain
    assert variance_components(same) == (0, pytest.approx(math.sqrt(2)))
    alone = variance_components([[1.0, 3.0]])
    assert math.isnan(alone[0]) and alone[1] == pytest.approx(math.sqrt(2))
    both = variance_components([[1.0], [3.0]])
    assert both[0] == pytest.approx(math.sqrt(2)) and math.isnan(both[1])
    assert standard_error(*both, 2, 1) == pytest.approx(1)
    assert math.isnan(standard_error(math.nan, math.nan, 1, 1))


def test_variance_components_are_unbiased_for_unequal_numbers_of_items():
    rng, sizes, found = np.random.default_rng(7), (4, 8, 40, 12), []
    for _ in range(2000):
        found.append(variance_components([rng.normal(2 * rng.normal(), 3, n) for n in sizes]))
    seed, item = (np.array(found) ** 2).mean(axis=0)
    assert item == pytest.approx(9, abs=0.15) and seed == pytest.approx(4, abs=0.4)


def coverage(rng, seeds, items, sd_seed, repeats, draws=400):
    """Shares of 95 % intervals, by t and by the bootstrap, that hold the true effect 0."""
    hits = np.zeros(2)
    for i in range(repeats):
        x = list(draw(rng, seeds, items, sd_seed))
        effect, (low, high) = clustered(x), hierarchical_bootstrap(x, draws, seed=i)
        hits += effect.low <= 0 <= effect.high, low <= 0 <= high
    return hits / repeats


@pytest.mark.parametrize(("seeds", "sd_seed", "low", "high"), [
    (3, 0.5, 0.80, 0.90), (8, 0.5, 0.89, 0.96), (5, 0.0, 0.97, 1.0), (1, 0.0, 0.87, 0.95)])
def test_the_t_interval_covers_and_the_bootstrap_needs_many_seeds_that_differ(seeds, sd_seed, low, high):
    t, bootstrap = coverage(np.random.default_rng(8), seeds, 16 if seeds > 1 else 12, sd_seed, 600)
    assert t == pytest.approx(0.95, abs=0.03) and low < bootstrap < high  # 3 standard errors: 0.027


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "bootstrap"), [(2, 0.81), (3, 0.875), (5, 0.91), (8, 0.935), (16, 0.945)])
def test_coverage_is_what_the_docstring_says(seeds, bootstrap):
    found = coverage(np.random.default_rng(9), seeds, 32, 0.3, 4000, 600)
    assert found == pytest.approx([0.95, bootstrap], abs=0.015)


def test_bootstrap_draws_seeds_and_items():
    """Its variance: of seed means over S, plus that of items within seeds over S n (divisors S and n)."""
    x = draw(np.random.default_rng(10), 6, 20, 1.0, 3.0)
    variance = x.mean(axis=1).var() / 6 + x.var(axis=1).mean() / (6 * 20)
    low, high = hierarchical_bootstrap(list(x), 20_000, 0.6826895)
    assert (high - low) / 2 == pytest.approx(math.sqrt(variance), rel=0.03)
    assert (low + high) / 2 == pytest.approx(x.mean(), abs=0.05)
    assert hierarchical_bootstrap(list(x), 200) == hierarchical_bootstrap(list(x), 200)
    narrow = hierarchical_bootstrap([[1.0] * 3, [5.0] * 300], 500)  # items do not weigh seeds
    assert narrow == (1, 5)


def test_relabelling_untrained_facts_finds_nothing():
    """The A/A gate: 200 random choices of the treated fact of each pair, at 5 %: 10 positives expected."""
    rng, n = np.random.default_rng(11), 64
    fact = rng.normal(-7, 1.5, (2, n)) + rng.normal(0, 1, n)  # nats; a pair shares its template
    before, after = fact + rng.normal(0, 0.2, (2, n)), fact - 0.4 + rng.standard_t(4, (2, n))
    positives = 0
    for i in range(200):
        a = rng.integers(0, 2, n)
        pairs = np.arange(n)
        gain = difference_in_differences(before[a, pairs], after[a, pairs], before[1 - a, pairs],
                                         after[1 - a, pairs])
        positives += sign_flip(gain, 1000, i) <= 0.05
    assert 2 <= positives <= 16


# ------------------------------------------------------------------------------------------------------------
# Power and equivalence


def test_the_numbers_of_the_design():
    for seeds, multiplier in ((5, 3.72), (8, 3.26), (10, 3.15)):
        assert minimum_detectable(1, 0, seeds, 1) * math.sqrt(seeds) == pytest.approx(multiplier, abs=0.005)
    assert standard_error(0.1, 1, 8, 128) == pytest.approx(0.047, abs=0.0005)
    assert minimum_detectable(0.1, 1, 8, 128) == pytest.approx(0.15, abs=0.005)
    one = minimum_detectable(math.nan, 1, 1, 128)  # items are the unit: 127 degrees of freedom
    assert one == pytest.approx((1.9788 + 0.8442) / math.sqrt(128), rel=1e-3)
    assert minimum_detectable(0.1, 1, 1, 1) == math.inf and power_of(1, 0.1, 1, 1, 1) == 0
    for hits, n, choices, p in ((5, 100, 64, 0.021), (3, 100, 256, 0.007)):
        exact = sum(math.comb(n, k) * (choices - 1) ** (n - k) for k in range(hits, n + 1)) / choices ** n
        assert hits_above_chance(hits, n, 1 / choices) == pytest.approx(exact) == pytest.approx(p, abs=5e-4)
    assert hits_above_chance(4, 100, 1 / 64) > 0.05 and hits_above_chance(0, 9, 0.1) == 1
    assert math.isnan(hits_above_chance(0, 0, 0.1))


def test_power_against_integration_over_the_sample_variance():
    du = 1e-3
    u = np.arange(du / 2, 150, du)  # chi-squared
    for seeds, effect in ((3, 0.5), (3, -3.0), (6, 1.5), (20, 0.7), (20, 5.0)):
        df, shift = seeds - 1, effect * math.sqrt(seeds)
        t = stats.t.ppf(0.975, df) * np.sqrt(u / df)
        found = stats.norm.sf(t - shift) + stats.norm.cdf(-t - shift)
        integral = (found * stats.chi2.pdf(u, df)).sum() * du
        assert power_of(effect, 1, 0, seeds, 9) == pytest.approx(integral, abs=1e-4)
    assert power_of(0, 1, 1, 4, 9) == pytest.approx(0.05)
    rising = [power_of(e, 1, 0, 8, 1) for e in (*np.linspace(0, 40, 200), 1e3, 1e6)]  # where nct.cdf is nan
    assert np.isfinite(rising).all() and (np.diff(rising) > -1e-9).all() and rising[-1] == 1


def test_seeds_needed_is_the_first_that_suffices():
    for effect in (0.08, 0.2, 0.5, 3, 50):
        enough = [n for n in range(2, 200) if power_of(effect, 0.1, 1, n, 32) >= 0.8]
        assert seeds_needed(effect, 0.1, 1, 32) == enough[0]
    assert seeds_needed(0.5, 1, 0, 9, most=33) == 34 and seeds_needed(0.5, 1, 0, 9, most=34) == 34
    assert seeds_needed(0.0, 1, 1, 9, most=40) == 41


@pytest.mark.parametrize(("seeds", "items", "sd_seed"), [(8, 16, 0.3), (3, 16, 0.3), (1, 40, math.nan)])
def test_power_is_what_simulated_experiments_find(seeds, items, sd_seed):
    rng, effect = np.random.default_rng(12), minimum_detectable(sd_seed, 1, seeds, items)
    found = 0
    for _ in range(1000):
        x = draw(rng, seeds, items, 0.0 if math.isnan(sd_seed) else sd_seed, 1, effect)
        found += clustered(list(x))[3] <= 0.05 if seeds > 1 else sign_flip(x[0], 300) <= 0.05
    assert found / 1000 == pytest.approx(power_of(effect, sd_seed, 1, seeds, items), abs=0.04)  # 3 s.e.
    assert found / 1000 == pytest.approx(0.8, abs=0.04 if seeds != 3 else 0.1)  # the formula is rough for 3


def test_equivalence_against_two_scipy_tests():
    rng = np.random.default_rng(13)
    for _ in range(20):
        x, bound = rng.normal(0.1, 0.3, 7), rng.uniform(0.1, 0.6)
        p, low, high = equivalence(x, bound)
        above = stats.ttest_1samp(x, -bound, alternative="greater").pvalue
        below = stats.ttest_1samp(x, bound, alternative="less").pvalue
        assert p == pytest.approx(max(above, below))
        assert (low, high) == pytest.approx(tuple(stats.ttest_1samp(x, 0).confidence_interval(0.9)))
        assert (p < 0.05) == (-bound < low and high < bound)
    assert equivalence([0.1], 1) == (1, -math.inf, math.inf)
    assert equivalence([0.0, 0.0], 1) == (0, 0, 0) and equivalence([2.0, 2.0], 1)[0] == 1
    with pytest.raises(ValueError, match="bound"):
        equivalence([1.0, 2.0], 0)


def test_sizes_of_sign_flip_and_equivalence():
    rng = np.random.default_rng(14)
    flipped, most = rejections(sign_flip(rng.laplace(size=9)) for _ in range(1500))
    assert 45 < flipped <= most
    at_bound, most = rejections(equivalence(rng.normal(1, 0.5, 12), 1)[0] for _ in range(1500))
    assert 45 < at_bound <= most


# ------------------------------------------------------------------------------------------------------------
# Curves


def test_band_is_the_quantile_of_the_largest_t_over_all_sign_patterns():
    rng = np.random.default_rng(15)
    x = rng.normal(size=(8, 3)).cumsum(axis=1)
    centred, mean, error = x - x.mean(axis=0), x.mean(axis=0), stats.sem(x, axis=0)
    largest = [abs(stats.ttest_1samp(np.array(s)[:, None] * centred, 0).statistic).max()
               for s in itertools.product((-1, 1), repeat=8)]
    low, high = simultaneous_band(x, 0.8, 20_000)
    assert high - mean == pytest.approx(mean - low)
    widths = [np.quantile(largest, q) for q in (0.78, 0.82)]  # 0.8 up to Monte-Carlo error
    assert all(widths[0] <= w <= widths[1] for w in (high - mean) / error)
    x[:, 1] = 4  # no spread: no width, no nan
    low, high = simultaneous_band(x)
    assert low[1] == high[1] == 4 and np.isfinite([low, high]).all()
    assert np.isinf(simultaneous_band(x[:1])).all()


@pytest.mark.parametrize("n", [6, 24])
def test_band_covers_the_whole_curve(n):
    rng, T, hits = np.random.default_rng(16), 10, 0
    for i in range(600):
        low, high = simultaneous_band(rng.normal(size=(n, T)) * np.arange(1, T + 1), flips=400, seed=i)
        hits += ((low <= 0) & (0 <= high)).all()
    assert hits / 600 == pytest.approx(0.95, abs=0.03)


STEPS = np.array([1, 2, 3, 5, 8, 13, 21, 34, 55, 100, 200, 400, 1000])
LAWS = {"log": ({"b": 1.0, "a": 0.25}, lambda t, b, a: b - a * np.log10(t), 100),
        "power": ({"A": 1.2, "k": 0.3}, lambda t, A, k: A * (1 + t) ** -k, 2.4 ** (1 / 0.3) - 1),
        "exponential": ({"B": 0.2, "tau": 40.0}, lambda t, B, tau: B + (1 - B) * np.exp(-t / tau),
                        40 * math.log(0.8 / 0.3))}


@pytest.mark.parametrize("kind", LAWS)
def test_forgetting_curve_finds_the_law(kind):
    parameters, law, half = LAWS[kind]
    rng = np.random.default_rng(17)
    for _ in range(10):
        r = law(STEPS, **parameters) + rng.normal(0, 0.01, len(STEPS))
        fit = forgetting_curve(STEPS, r)
        assert fit.kind == kind == min(fit.bic, key=fit.bic.get)
        assert fit.parameters == pytest.approx(parameters, rel=0.12)
        assert fit.half_life == pytest.approx(half, rel=0.12)
        found, _ = optimize.curve_fit(law, STEPS, r, list(parameters.values()))  # Levenberg-Marquardt
        squares = ((law(STEPS, *found) - r) ** 2).sum()
        assert fit.bic[kind] == pytest.approx(13 * math.log(squares / 13) + 2 * math.log(13), abs=1e-5)
    assert forgetting_curve(STEPS, law(STEPS, **parameters)).half_life == pytest.approx(half, rel=1e-5)


def test_forgetting_that_never_halves_or_cannot_be_fitted():
    assert forgetting_curve(STEPS, 0.6 + 0.4 * np.exp(-STEPS / 20)).half_life == math.inf
    assert forgetting_curve(STEPS, np.ones(13)).half_life == math.inf
    assert forgetting_curve(STEPS, 0.9 + 0.02 * np.log10(STEPS)).half_life == math.inf
    assert forgetting_curve(STEPS, np.full(13, -0.1)).half_life == 0  # gone before the first step
    slow = forgetting_curve(STEPS, 1.01 * (1 + STEPS) ** -0.002)
    assert slow.kind == "power" and slow.half_life > 1e100
    for steps in ([1, 2, 3, 4], [1, 1, 1, 2, 2, 3, 4], []):
        few = forgetting_curve(steps, [0.5] * len(steps))
        assert few[:2] == ("none", {}) and math.isnan(few.half_life) and few.bic == {}
    for steps, shares in (([0, 1, 2, 3, 4], [1] * 5), ([1, 2], [1]), ([1, 2, 3], [1, 1, math.nan])):
        with pytest.raises(ValueError, match="expected finite steps >= 1"):
            forgetting_curve(steps, shares)


def test_revival_is_the_largest_rise_of_the_mean_difference():
    rng = np.random.default_rng(18)
    for T in (2, 5, 9):
        treated, control = rng.normal(size=(2, 6, T))
        mean = (treated - control).mean(axis=0)
        rise, t1, t2 = max((mean[j] - mean[i], i, j) for i in range(T) for j in range(i + 1, T))
        found = revival(treated, control, 50)
        assert found[0] == pytest.approx(rise) and found[1:3] == (t1, t2)
        assert found == revival(treated, control, 50) and 1 / 51 <= found[3] <= 1
    falling = np.linspace(3, 0, 8) + np.zeros((4, 8))
    assert revival(falling, 0 * falling, 50)[0] < 0 and revival(falling, 0 * falling, 50)[3] == 1
    assert revival(d := np.array([0, 9]) + rng.normal(size=(5, 2)), 0 * d, 500)[3] == 2 / 2 ** 5  # not below
    for curves in ([[1, 2]], [[1], [2]], [[1, 2], [1, math.nan]]):
        with pytest.raises(ValueError, match="at least 2 pairs and 2 points, all finite"):
            revival(curves, np.zeros_like(curves))


def test_revival_against_all_sign_patterns_and_scipys_bounds_of_the_falls():
    rng, n, T = np.random.default_rng(22), 9, 4
    wide = math.sqrt(n / (n - 1)) * stats.t.ppf(0.99, n - 1) / stats.norm.ppf(0.99)
    pairs = list(itertools.combinations(range(T), 2))
    for fall in (0.0, 0.6, 0.6, 1.2):
        d = rng.normal(size=(n, T)) - fall * np.arange(T) + [0, 0, 0, fall + 0.3]
        high = [stats.ttest_1samp(d[:, j] - d[:, i], 0).confidence_interval(0.9).high for i, j in pairs]
        hits = 0
        for signs in itertools.product((-1, 1), repeat=n):
            noise = wide * (np.array(signs)[:, None] * (d - d.mean(axis=0))).mean(axis=0)
            largest = max(noise[j] - noise[i] + min(0, h) for (i, j), h in zip(pairs, high, strict=True))
            hits += largest >= max(d[:, j].mean() - d[:, i].mean() for i, j in pairs)
        exact = max(2, hits) / 2 ** n
        assert revival(d, 0 * d, 20_000)[3] == pytest.approx(exact, abs=4 * math.sqrt(exact / 20_000))


def memories(rng, n, T, rise=0.0):
    """Curves as experiments give them: a steep fall that differs between facts, little noise, a late rise."""
    t = np.arange(T)
    noise = 0.3 * rng.normal(size=(n, T))
    return rng.lognormal(1.5, 0.5, (n, 1)) * np.exp(-t / 2) + noise + rise * (t >= T * 2 // 3)


def test_revival_is_found_after_a_steep_fall_and_not_without_one():
    rng = np.random.default_rng(19)
    control = 0.3 * rng.normal(size=(64, 12))
    rise, t1, t2, p = revival(memories(rng, 64, 12, 0.5), control, 2000)
    assert p < 0.01 and t1 < 8 <= t2 and 0.3 < rise < 0.7
    assert revival(control, memories(rng, 64, 12, 0.5), 200)[1:] == (0, 7, 1 / 201)  # the other way round
    assert revival(memories(rng, 64, 12), control, 200)[3] > 0.1
    found = sum(revival(d := memories(rng, 32, 12, 0.3), 0 * d, 200)[3] <= 0.05 for _ in range(100))
    assert found > 50  # a flat null finds none of them


FALLS = {"flat": np.zeros(8), "step": np.repeat([0.0, -3.0], 4), "small step": np.repeat([0.0, -0.5], 4),
         "log": -np.log10(1 + np.arange(8.0))}


@pytest.mark.parametrize("fall", FALLS)
def test_size_of_revival(fall):
    rng = np.random.default_rng(20)
    curves = FALLS[fall] + rng.normal(size=(300, 8, 8))
    found, most = rejections(revival(d, 0 * d, 200, i)[3] for i, d in enumerate(curves))
    assert found <= most


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 5, 8, 16, 32, 64])
@pytest.mark.parametrize("walk", [False, True])
def test_size_of_revival_where_it_is_largest(n, walk):
    rng, p_values = np.random.default_rng(21), []
    for i in range(2000):
        for T in (3, 8):
            noise = rng.normal(size=(n, T))
            d = noise.cumsum(axis=1) if walk else noise
            p_values.append(revival(d, 0 * d, 300, i)[3])
    assert sum(p <= 0.05 for p in p_values) / len(p_values) < 0.06
    assert sum(p <= 0.01 for p in p_values) / len(p_values) < 0.015
