"""Ranks, critical distance and probability of improvement against SciPy, printed tables and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from kdbench.results import ranking


def test_average_ranks_share_ties() -> None:
    draws = np.random.default_rng(0)
    # Integers, so that many are equal.
    values = draws.integers(0, 6, (20, 5)).astype(float)
    expected = np.mean([stats.rankdata(-column) for column in values], axis=0)
    assert ranking.average_ranks(values.tolist()) == pytest.approx(expected.tolist())
    assert ranking.average_ranks([[90.0, 91.0, 90.0]]) == [2.5, 1.0, 2.5]


# Demšar (2006), table 5(a): the studentized range divided by √2, α = 0.05.
PRINTED = {3: 2.343, 4: 2.569, 5: 2.728, 6: 2.850, 7: 2.949, 8: 3.031, 9: 3.102, 10: 3.164}


@pytest.mark.parametrize("methods", [3, 4, 5, 7, 10, 30])
def test_critical_distance_is_scipys_and_the_printed_one(methods: int) -> None:
    for columns, alpha in ((2, 0.05), (13, 0.05), (13, 0.10)):
        q = stats.studentized_range.ppf(1 - alpha, methods, np.inf) / math.sqrt(2)
        expected = q * math.sqrt(methods * (methods + 1) / (6 * columns))
        assert ranking.critical_distance(methods, columns, alpha) == pytest.approx(expected, rel=1e-5)
    if methods in PRINTED:
        expected = PRINTED[methods] * math.sqrt(methods * (methods + 1) / (6 * 14))
        assert ranking.critical_distance(methods, 14) == pytest.approx(expected, rel=5e-4)


def test_the_critical_distance_refuses_what_it_does_not_hold_for() -> None:
    for methods, columns in ((2, 10), (5, 1)):
        with pytest.raises(ValueError, match="three methods and two columns"):
            ranking.critical_distance(methods, columns)


@pytest.mark.parametrize(("methods", "columns"), [(3, 4), (3, 13), (5, 6), (5, 13), (14, 13), (8, 30)])
def test_equal_methods_are_told_apart_in_at_most_five_percent(methods: int, columns: int) -> None:
    draws = np.random.default_rng(1)
    studies = 4000
    ranks = draws.random((studies, columns, methods)).argsort(axis=2).mean(axis=1)
    apart = ranks.max(axis=1) - ranks.min(axis=1) >= ranking.critical_distance(methods, columns)
    # Three standard errors; the asymptotic quantile itself is up to half a point too small.
    assert apart.mean() < 0.055 + 3 * math.sqrt(0.05 * 0.95 / studies)


def test_a_better_method_is_found() -> None:
    values = np.random.default_rng(2).normal([0, 0, 0, 3.0], 1, (13, 4))
    ranks = ranking.average_ranks(values.tolist())
    assert ranks[3] == min(ranks)
    assert min(ranks[:3]) - ranks[3] > 0.5 * ranking.critical_distance(4, 13)


def column(own: list[float], base: list[float], shared: bool = True) -> tuple[dict[int, float], dict[int, float]]:
    """Runs of a method and of the baseline, of the same seeds or of different ones."""
    return dict(enumerate(own)), dict(enumerate(base, 0 if shared else len(own)))


def improvement(*columns: tuple[dict[int, float], dict[int, float]]) -> ranking.Improvement:
    found = ranking.probability_of_improvement(columns)
    assert found is not None
    return found


def test_probability_of_improvement_is_the_mann_whitney_statistic_of_runs_that_share_no_seed() -> None:
    draws = np.random.default_rng(3)
    own, base = draws.integers(0, 9, (2, 4, 6)).astype(float)
    columns = [column(x.tolist(), y.tolist(), shared=False) for x, y in zip(own, base, strict=True)]
    expected = np.mean([stats.mannwhitneyu(x, y).statistic / 36 for x, y in zip(own, base, strict=True)])
    assert improvement(*columns).probability == pytest.approx(expected)


def test_runs_of_one_seed_are_no_pair() -> None:
    # Each run is a little above that of its seed, and above half of the others.
    a, b = column([90.1, 91.1, 92.1, 93.1], [90.0, 91.0, 92.0, 93.0])
    assert improvement((a, b)).probability == 0.5
    # Seed 1 alone is common: 5 pairs of 6 are left, and 3 of them won.
    assert improvement(({0: 91.0, 1: 93.0}, {1: 92.0, 2: 90.0, 3: 92.5})).probability == pytest.approx(3 / 5)
    assert ranking.probability_of_improvement([column([95.0], [94.0])]) is None
    assert improvement(column([95.0], [94.0]), column([95.0, 96.0], [94.0, 97.0])).probability == 0.5


@pytest.mark.parametrize("correlation", [0.0, 0.9])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_its_mean_is_the_true_probability_whatever_runs_of_a_seed_share(seeds: int, correlation: float) -> None:
    draws = np.random.default_rng(5)
    shift = stats.norm.ppf(0.6) * math.sqrt(2)
    luck, own, base = draws.normal(0, 1, (3, 2000, seeds))
    own, base = (math.sqrt(correlation) * luck + math.sqrt(1 - correlation) * noise for noise in (own, base))
    found = [improvement(column(x, y)).probability for x, y in zip((own + shift).tolist(), base.tolist(), strict=True)]
    assert np.mean(found) == pytest.approx(0.6, abs=3 * np.std(found) / math.sqrt(len(found)))


def test_its_interval_mirrors_when_the_sides_are_swapped_and_holds_the_estimate() -> None:
    a, b = column([94.0, 93.5, 94.4, 93.8, 94.1], [93.7, 93.6, 94.2, 93.1, 93.9])
    one, other = (improvement(pair) for pair in ((a, b), (b, a)))
    assert one.low is not None and one.high is not None
    assert 0 < one.low < one.probability < one.high < 1
    assert (other.low, other.probability, other.high) == pytest.approx((1 - one.high, 1 - one.probability, 1 - one.low))


@pytest.mark.parametrize("copies", [1, 3])
def test_its_interval_by_hand(copies: int) -> None:
    a, b = column([94.0, 93.5, 94.4], [93.7, 93.6, 94.3])
    found = improvement(*[(a, b)] * copies)
    # Wins: 94.0 over 93.6, 93.5 over none, 94.4 over 93.7 and 93.6. Without seed 0, 1, 2: of the two pairs 1, 1, 1.
    assert found == ranking.Improvement(0.5)
    a, b = column([94.0, 93.65, 94.4], [93.7, 93.6, 94.3])
    b[2] = 93.63
    found = improvement(*[(a, b)] * copies)
    # Wins: 94.0 over both, 93.65 over seed 2's, 94.4 over both: 5 of 6. Without seed 0, 1, 2: of two pairs 2, 2, 1.
    without = np.array([2, 2, 1]) / 2
    drawn = (5 / 6 * 3 + 0.5) / 4
    variance = 2 / 3 * ((without - without.mean()) ** 2).sum() + drawn * (1 - drawn) / 9 / copies
    error = math.sqrt(variance) / (5 / 6 * 1 / 6)
    assert found.low is not None and found.high is not None
    assert found.probability == pytest.approx(5 / 6)
    # Student's printed quantile at two degrees of freedom.
    assert math.log(found.high / (1 - found.high)) == pytest.approx(math.log(5) + 4.303 * error, rel=1e-3)
    assert math.log(found.low / (1 - found.low)) == pytest.approx(math.log(5) - 4.303 * error, rel=1e-3)


def test_the_column_with_the_fewest_seeds_gives_the_degrees_of_freedom() -> None:
    short = column([94.0, 93.65, 94.4], [93.7, 93.6, 93.63])
    long = column([95.0 + k for k in range(10)], [85.0 - k for k in range(10)])
    found = improvement(short, long)
    assert found.low is not None and found.high is not None
    without = (np.array([1, 1, 1 / 2] + [5 / 6] * 7) + 1) / 2
    three, ten = (5 / 6 * 3 + 0.5) / 4, (10 + 0.5) / 11
    seen = 9 / 10 * ((without - without.mean()) ** 2).sum()
    error = math.sqrt(seen + (three * (1 - three) / 9 + ten * (1 - ten) / 100) / 4)
    mean = (5 / 6 + 1) / 2
    expected = math.log(mean / (1 - mean)) + 4.303 * error / (mean * (1 - mean))
    assert math.log(found.high / (1 - found.high)) == pytest.approx(expected, rel=1e-3)


def test_the_side_with_fewer_runs_gives_the_degrees_of_freedom_and_what_was_not_seen() -> None:
    own, base = {0: 94.0, 1: 93.65, 2: 94.4}, {0: 93.7, 1: 93.6, 2: 93.63, 3: 94.1, 4: 93.5}

    def share(left_out: int | None = None) -> float:
        pairs = [x > y for i, x in own.items() for j, y in base.items() if i != j and left_out not in (i, j)]
        return sum(pairs) / len(pairs)

    mean, without = share(), np.array([share(seed) for seed in range(5)])
    drawn = (mean * 3 + 0.5) / 4
    error = math.sqrt(4 / 5 * ((without - without.mean()) ** 2).sum() + drawn * (1 - drawn) / 9)
    found = improvement((own, base))
    assert found.probability == pytest.approx(mean) and found.high is not None
    expected = math.log(mean / (1 - mean)) + 4.303 * error / (mean * (1 - mean))
    assert math.log(found.high / (1 - found.high)) == pytest.approx(expected, rel=1e-3)


def test_there_is_no_interval_where_the_runs_do_not_allow_one() -> None:
    clear = column([95.0, 95.1, 95.2], [90.0, 90.1, 90.2])
    assert improvement(clear) == ranking.Improvement(1.0)
    few = column([95.0, 93.1], [94.0, 94.1])
    assert improvement(few) == ranking.Improvement(0.5)
    enough = column([95.0, 93.1, 94.05], [94.0, 94.1, 93.0])
    assert improvement(enough).low is not None
    assert improvement(enough, few).low is None


SHARED = ("nothing", "a seed's luck across columns", "the baseline's runs", "luck", "luck across columns")


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("seeds", [3, 5, 20])
@pytest.mark.parametrize("true", [(0.75,), (0.5,) * 6, (0.95, 0.95, 0.95, 0.6)], ids=str)
def test_its_interval_covers_at_least_as_often_as_it_says(shared: str, seeds: int, true: tuple[float, ...]) -> None:
    """Luck: what a method and the baseline share in a seed, as where both begin with the same student and see the data
    in the same order; their runs correlate to 0.9."""
    draws = np.random.default_rng(4)
    shift = stats.norm.ppf(true)[:, None] * math.sqrt(2)
    shape = (len(true), seeds)
    hits = found = 0
    for _ in range(400):
        own, base = draws.normal(0, 1, (2, *shape))
        if shared == "a seed's luck across columns":
            luck = draws.normal(0, 1, (2, 1, seeds))
            own, base = (own + luck[0]) / math.sqrt(2), (base + luck[1]) / math.sqrt(2)
        elif shared == "the baseline's runs":
            base = np.broadcast_to(base[:1], shape)
        elif shared.startswith("luck"):
            luck = draws.normal(0, 1, (1, seeds) if "across" in shared else shape)
            own, base = (math.sqrt(0.9) * luck + math.sqrt(0.1) * noise for noise in (own, base))
        one = improvement(*(column(x, y) for x, y in zip((own + shift).tolist(), base.tolist(), strict=True)))
        if one.low is not None and one.high is not None:
            found += 1
            hits += one.low <= float(np.mean(true)) <= one.high
    assert found > 150
    assert hits / found > 0.95 - 3 * math.sqrt(0.05 * 0.95 / found)
