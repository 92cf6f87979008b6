"""Means, paired differences and what they can tell with few seeds.

Cells of one seed draw data order, augmentation and initial student from the same streams where they draw them at all,
so methods are compared by the differences of equal seeds. The interval and the test are Student's: at 3 to 5 seeds a
percentile bootstrap covers far less than it says, so a bootstrap is offered only from 20 seeds. With one seed there is
neither interval nor test.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.special import ndtr, stdtr, stdtrit

# Records hold accuracies in percent with four decimals: a smaller spread is rounding.
NO_SPREAD = 1e-4

# With fewer pairs their deviation is too uncertain to plan by.
FEWEST_TO_PLAN = 3
# Numbers of seeds above it are not told apart.
MOST_SEEDS = 1000
BOOTSTRAP_SEEDS = 20
RESAMPLES = 10_000


@dataclass(frozen=True)
class Summary:
    """`deviation`: sample standard deviation (n − 1); None with one value."""

    n: int
    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Paired:
    """Mean of the differences of equal seeds.

    `deviation`, `low`, `high`, `p` are None with one pair; `low`, `high`, `p` also where all differences are equal,
    since the t statistic has no meaning then. In a table, `p_holm` is p after Holm over all its tests, and
    `seeds_needed` the pairs with which the seen difference would be found with 80 % power at Holm's first step; both
    None without p, and the latter with fewer than `FEWEST_TO_PLAN` pairs.
    """

    n: int
    mean: float
    deviation: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    seeds_needed: int | None = None


def summarize(values: Sequence[float]) -> Summary:
    """Number, mean and sample deviation of at least one value; ValueError for none."""
    n = len(values)
    if n == 0:
        raise ValueError("no values to summarize")
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(1, mean, None)
    return Summary(n, mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)))


def paired(values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95) -> Paired | None:
    """Differences `values − baseline` over the seeds that both have.

    Mean, Student's t interval, two-sided p value of the hypothesis of no difference.

    Args:
        values, baseline: seed -> value.
        confidence: of the interval, in (0, 1).

    Returns:
        None where no seed is common.
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    summary = summarize([values[seed] - baseline[seed] for seed in seeds])
    n, mean, deviation = summary.n, summary.mean, summary.deviation
    if deviation is None or deviation < NO_SPREAD:
        return Paired(n, mean, deviation)
    error = deviation / math.sqrt(n)
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * error
    return Paired(n, mean, deviation, mean - half, mean + half, 2 * float(stdtr(n - 1, -abs(mean) / error)))


def bootstrap(
    values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95
) -> tuple[float, float] | None:
    """Bootstrap-t interval of the mean difference of equal seeds (Efron and Tibshirani, 1993, section 12.5).

    Seeds are drawn with replacement, and the mean is studentized in each draw, so that skewed differences get a skewed
    interval. The draws are fixed: equal values give the equal interval.

    Args:
        values, baseline: seed -> value, with at least `BOOTSTRAP_SEEDS` seeds in common.
        confidence: of the interval, in (0, 1).

    Returns:
        low and high; None where all differences are equal.

    Raises:
        ValueError: fewer seeds in common.
    """
    seeds = sorted(values.keys() & baseline.keys())
    n = len(seeds)
    if n < BOOTSTRAP_SEEDS:
        raise ValueError(f"a bootstrap interval needs {BOOTSTRAP_SEEDS} seeds, not {n}")
    found = np.array([values[seed] - baseline[seed] for seed in seeds])
    error = float(found.std(ddof=1)) / math.sqrt(n)
    if error * math.sqrt(n) < NO_SPREAD:
        return None
    drawn = found[np.random.default_rng(0).integers(0, n, (RESAMPLES, n))]
    errors = drawn.std(axis=1, ddof=1) / math.sqrt(n)
    # A draw of one value over and over has no spread; so rare from 20 seeds on that leaving it out changes nothing.
    usable = errors > 0
    t = (drawn.mean(axis=1)[usable] - found.mean()) / errors[usable]
    low, high = np.quantile(t, [(1 + confidence) / 2, (1 - confidence) / 2])
    mean = float(found.mean())
    return mean - float(low) * error, mean - float(high) * error


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the given order.

    Rejecting the hypotheses whose value is at most `a` keeps the family-wise error strongly: whichever of the
    hypotheses are true, the probability that any true one is rejected is at most `a`, whatever the dependence between
    the tests (Holm, 1979).
    """
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


@np.errstate(under="ignore")
def power(effect: float, n: int, alpha: float = 0.05) -> float:
    """Power of the two-sided paired t test with n pairs: 1 − P(|T| ≤ critical) for T of the noncentral t distribution.

    T = (Z + δ) / S with Z standard normal, δ = effect · √n and S² a χ² over its n − 1 degrees of freedom, so the power
    is an integral over S. (Library functions for the distribution return NaN in places that are needed here.)

    Args:
        effect: mean of the differences divided by their deviation.
        n: pairs, at least 2.
    """
    freedom = n - 1
    critical = float(stdtrit(freedom, 1 - alpha / 2))
    shift = abs(effect) * math.sqrt(n)
    low, high = max(0.0, 1 - 12 / math.sqrt(2 * freedom)), 1 + 12 / math.sqrt(2 * freedom)
    nodes, weights = _quadrature()
    s = low + (nodes + 1) / 2 * (high - low)
    log_density = (
        math.log(2)
        + freedom / 2 * math.log(freedom / 2)
        - math.lgamma(freedom / 2)
        + (freedom - 1) * np.log(s)
        - freedom * s**2 / 2
    )
    missed = np.exp(log_density) * (ndtr(critical * s - shift) - ndtr(-critical * s - shift))
    return 1 - float((weights * missed).sum()) * (high - low) / 2


@cache
def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.legendre.leggauss(400)
    return nodes, weights


def seeds_needed(mean: float, deviation: float, alpha: float = 0.05) -> int:
    """Smallest number of pairs with which the two-sided paired t test would find a difference of this mean and
    deviation with 80 % power; one more than `MOST_SEEDS` where so many are too few.

    The power grows with n, so the number is found by bisection.

    Args:
        mean, deviation: of the differences; a deviation that is not above 0 is a ValueError.
        alpha: level of the test. Of one among m tests that Holm corrects, α / m, his first step: a difference found
            there is found whatever the other tests say.
    """
    if deviation <= 0:
        raise ValueError("the deviation must be above 0")
    return bisect_left(range(MOST_SEEDS + 1), 0.8, lo=2, key=lambda n: power(mean / deviation, n, alpha))
