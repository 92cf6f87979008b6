"""Methods compared across several pairs of student, teacher and data: average ranks and probability of improvement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.special import ndtr, stdtrit

# Below, one seed left out says too little about the spread.
IMPROVEMENT_SEEDS = 3


@dataclass(frozen=True)
class Improvement:
    """Probability in [0, 1] that a run of a method beats one of the baseline. `low`, `high`: None where the runs do not
    allow an interval."""

    probability: float
    low: float | None = None
    high: float | None = None


def average_ranks(columns: Sequence[Sequence[float]]) -> list[float]:
    """Mean rank of each method over the columns, rank 1 for the highest value, equal values sharing their mean rank.

    Args:
        columns: at least one; each with one value for every method, in the same order.
    """
    values = np.array(columns, dtype=float)
    above = (values[:, None, :] > values[:, :, None]).sum(axis=2)
    equal = (values[:, None, :] == values[:, :, None]).sum(axis=2)
    return [float(rank) for rank in (above + (equal + 1) / 2).mean(axis=0)]


def critical_distance(methods: int, columns: int, alpha: float = 0.05) -> float:
    """Nemenyi's critical distance: were all methods equal, some two average ranks would differ by as much in at most a
    share `alpha` of studies (Demšar, 2006, JMLR 7, section 3.2.2): q √(k (k + 1) / (6 N)), with q the quantile of the
    studentized range for infinitely many degrees of freedom, divided by √2.

    Simulated over 2 to 30 columns, that share is at most 5.7 % from three methods on, and far below with few columns.
    Two methods are too few: the distance of four columns is exceeded in 12.5 % of studies.

    Args:
        methods: k, at least 3.
        columns: N, at least 2, independent of each other.
    """
    if methods < 3 or columns < 2:
        raise ValueError("the critical distance is for at least three methods and two columns")
    return _range_quantile(methods, 1 - alpha) / math.sqrt(2) * math.sqrt(methods * (methods + 1) / (6 * columns))


@cache
def _range_quantile(count: int, share: float) -> float:
    """Quantile of the range of `count` standard normal values, by bisection of its distribution
    k ∫ φ(z) (Φ(z) − Φ(z − q))^(k − 1) dz."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    z, w = 9 * nodes, 9 * weights * np.exp(-((9 * nodes) ** 2) / 2) / math.sqrt(2 * math.pi)
    low, high = 0.0, 20.0
    while high - low > 1e-10:
        middle = (low + high) / 2
        below = count * float((w * (ndtr(z) - ndtr(z - middle)) ** (count - 1)).sum())
        low, high = (middle, high) if below < share else (low, middle)
    return high


def probability_of_improvement(
    columns: Sequence[tuple[Mapping[int, float], Mapping[int, float]]], confidence: float = 0.95
) -> Improvement:
    """Probability that a run of a method beats a run of the baseline of the same column, equal values counting half,
    averaged over the columns (Agarwal et al., 2021, "Deep Reinforcement Learning at the Edge of the Statistical
    Precipice", section 4.3), for these very columns: it says nothing of others.

    The interval is not the paper's stratified bootstrap, which at 5 runs in one column was simulated to cover 67 to
    93 % instead of 95, and which takes columns for independent. Its error comes from leaving out one seed at a time,
    in all columns and on both sides, since runs of one seed may share the initial student, the data order, or be the
    same runs; it is symmetric in the logit and has Student's quantile. Simulated from 3 seeds on, it covers about 95 %
    or more wherever there is one, with columns that are independent, share a seed's luck, or share the baseline's runs
    (a separate error for each column goes down to 73 %). There is none where all runs say the same, or where a column
    has fewer than 3 seeds.

    Args:
        columns: for each, seed -> value of the method and of the baseline.
        confidence: of the interval, in (0, 1).
    """
    mean = _mean_wins(columns)
    fewest = min(min(len(own), len(base)) for own, base in columns)
    seeds = sorted({seed for own, base in columns for seed in own.keys() | base.keys()})
    if fewest < IMPROVEMENT_SEEDS or not 0 < mean < 1:
        return Improvement(mean)
    without = [_mean_wins([(_left_out(own, s), _left_out(base, s)) for own, base in columns]) for s in seeds]
    variance = (len(seeds) - 1) * float(np.var(without))
    if variance < 1e-12:
        return Improvement(mean)
    logit, error = math.log(mean / (1 - mean)), math.sqrt(variance) / (mean * (1 - mean))
    half = float(stdtrit(fewest - 1, (1 + confidence) / 2)) * error
    return Improvement(mean, 1 / (1 + math.exp(half - logit)), 1 / (1 + math.exp(-half - logit)))


def _left_out(values: Mapping[int, float], seed: int) -> dict[int, float]:
    return {other: value for other, value in values.items() if other != seed}


def _mean_wins(columns: Sequence[tuple[Mapping[int, float], Mapping[int, float]]]) -> float:
    return math.fsum(_wins(list(own.values()), list(base.values())) for own, base in columns) / len(columns)


def _wins(own: Sequence[float], base: Sequence[float]) -> float:
    """Share of all pairs in which the first is higher, equal ones counting half."""
    x, y = np.array(own)[:, None], np.array(base)[None, :]
    return float(((x > y) + 0.5 * (x == y)).mean())
