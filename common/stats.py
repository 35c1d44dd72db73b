"""Mean differences with intervals and tests: pure functions of numbers, no files, no torch."""
import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats


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
