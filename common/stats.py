"""Effects with intervals and tests. Pure functions of numbers: no files, no torch."""
import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats


class Effect(NamedTuple):
    """A mean difference, its confidence interval, and the two-sided p-value of there being none."""
    mean: float
    low: float
    high: float
    p: float
    n: int  # pairs


def paired_difference(treated: Sequence[float], control: Sequence[float], level: float = 0.95) -> Effect:
    """Mean of treated[i] - control[i], with the t interval and the paired t-test (Student 1908), in the units
    of the data.

    Assumes independent pairs with normal differences. From one pair nothing follows: the interval is
    infinite and p is nan; from none, all is nan. Without spread (beyond rounding) the interval is the mean,
    and p is 1 if all pairs are equal, else 0.
    """
    differences = [a - b for a, b in zip(treated, control, strict=True)]
    if not differences:
        return Effect(math.nan, math.nan, math.nan, math.nan, 0)
    mean = sum(differences) / len(differences)
    if len(differences) == 1:
        return Effect(mean, -math.inf, math.inf, math.nan, 1)
    if max(differences) - min(differences) <= 1e-12 * max(map(abs, [*treated, *control])):  # divides by zero
        return Effect(mean, mean, mean, 0.0 if any(differences) else 1.0, len(differences))
    test = stats.ttest_rel(treated, control)
    low, high = test.confidence_interval(level)
    return Effect(mean, float(low), float(high), float(test.pvalue), len(differences))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for having made so many tests, in the order given (Holm 1979, step-down): rejecting
    those below alpha rejects any true hypothesis with probability alpha at most, however they depend on each
    other. nan was no test: it stays and does not count."""
    tests = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, least = list(p_values), 0.0
    for rank, (p, i) in enumerate(tests):
        least = max(least, min(1.0, (len(tests) - rank) * p))
        adjusted[i] = least
    return adjusted
