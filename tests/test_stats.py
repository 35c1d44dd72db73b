"""common/stats.py: against closed forms and brute force."""
import itertools
import math
import random

from common.stats import holm, paired_difference

import pytest


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
