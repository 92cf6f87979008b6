"""Statistics against closed forms, printed tables, other definitions, and simulation."""

from __future__ import annotations

import itertools
import math
import statistics as standard

import numpy as np
import pytest

from kdbench.results import statistics


def seeds(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_mean_and_sample_deviation() -> None:
    found = statistics.summarize([94.1, 93.7, 94.5, 93.9])
    assert (found.n, found.mean) == (4, pytest.approx(94.05))
    assert found.deviation == pytest.approx(standard.stdev([94.1, 93.7, 94.5, 93.9]))
    assert found.deviation == pytest.approx(math.sqrt((0.05**2 + 0.35**2 + 0.45**2 + 0.15**2) / 3))


def test_one_seed_has_no_deviation_no_interval_and_no_test() -> None:
    assert statistics.summarize([94.1]) == statistics.Summary(1, 94.1, None)
    found = statistics.paired(seeds(94.0), seeds(93.0))
    assert found == statistics.Paired(1, 1.0)
    assert found.low is found.high is found.p is None


def test_no_values_and_no_common_seed() -> None:
    with pytest.raises(ValueError, match="no values"):
        statistics.summarize([])
    assert statistics.paired({0: 94.0}, {1: 93.0}) is None


# Quantiles of Student's t at 0.975, as every textbook prints them.
@pytest.mark.parametrize(("n", "quantile"), [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (10, 2.262), (31, 2.042)])
def test_interval_has_the_printed_quantiles(n: int, quantile: float) -> None:
    values = {seed: 90.0 + (-1) ** seed for seed in range(n)}
    found = statistics.paired(values, dict.fromkeys(range(n), 90.0))
    assert found is not None and found.low is not None and found.high is not None
    half = quantile * standard.stdev([(-1.0) ** seed for seed in range(n)]) / math.sqrt(n)
    assert found.high - found.mean == pytest.approx(half, rel=3e-4)
    assert found.mean - found.low == pytest.approx(half, rel=3e-4)


@pytest.mark.parametrize("t", [0.1, 0.7, 2.0, 15.0])
def test_p_value_has_the_closed_forms_of_one_and_two_degrees_of_freedom(t: float) -> None:
    # Differences with mean t · s / √n for s = 1: {m − √½, m + √½} and {m − 1, m, m + 1}.
    one = statistics.paired(seeds(t / math.sqrt(2) - math.sqrt(0.5), t / math.sqrt(2) + math.sqrt(0.5)), seeds(0, 0))
    two = statistics.paired(seeds(t / math.sqrt(3) - 1, t / math.sqrt(3), t / math.sqrt(3) + 1), seeds(0, 0, 0))
    assert one is not None and two is not None
    assert one.p == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-9)
    assert two.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)


def test_p_value_and_interval_agree() -> None:
    values, base = seeds(94.3, 94.0, 94.4, 94.1), seeds(93.9, 93.8, 94.1, 94.2)
    found = statistics.paired(values, base)
    assert found is not None and found.p is not None
    at_edge = statistics.paired(values, base, confidence=1 - found.p)
    assert at_edge is not None
    assert at_edge.low == pytest.approx(0, abs=1e-9)
    swapped = statistics.paired(base, values)
    assert swapped is not None
    assert (swapped.mean, swapped.low, swapped.p) == pytest.approx((-found.mean, -found.high, found.p))  # type: ignore


def test_seeds_are_paired_by_number_not_by_place() -> None:
    found = statistics.paired({2: 95.0, 0: 93.0, 7: 99.0}, {0: 92.0, 2: 93.0, 5: 10.0})
    assert found is not None
    assert (found.n, found.mean) == (2, 1.5)


# Of the second, floating point makes three differences, and of the third the four decimals of records.
@pytest.mark.parametrize("values", [(90.1, 91.1, 92.1), (2.3, 20.2, 92.1), (90.1001, 91.1, 92.1)])
def test_differences_without_spread_have_no_test(values: tuple[float, float, float]) -> None:
    found = statistics.paired(seeds(*values), seeds(*[round(value - 0.1, 1) for value in values]))
    assert found is not None
    assert (found.n, found.low, found.p) == (3, None, None)
    assert found.mean == pytest.approx(0.1, abs=1e-4)


def test_one_image_of_50000_is_a_spread() -> None:
    found = statistics.paired(seeds(90.1, 90.102), seeds(90.0, 90.0))
    # The mean is 0.101 and its error 0.001.
    assert found is not None and found.p == pytest.approx(1 - 2 / math.pi * math.atan(101), rel=1e-6)


def test_interval_covers_as_often_as_it_says_and_pairing_matters() -> None:
    draws = np.random.default_rng(0)
    runs, hits, widths, unpaired = 4000, 0, 0.0, 0.0
    for _ in range(runs):
        common = draws.normal(0, 1, 4)
        base = 90 + common + draws.normal(0, 0.2, 4)
        own = 90.5 + common + draws.normal(0, 0.2, 4)
        found = statistics.paired(dict(enumerate(own)), dict(enumerate(base)))
        assert found is not None and found.low is not None and found.high is not None
        hits += found.low <= 0.5 <= found.high
        widths += found.high - found.low
        unpaired += 2 * 2.447 * math.sqrt((own.var(ddof=1) + base.var(ddof=1)) / 4)
    # Four standard errors of a share at 4000 runs.
    assert abs(hits / runs - 0.95) < 0.014
    assert widths < 0.5 * unpaired


def test_holm_by_hand() -> None:
    # Holm (1979): 0.005·4; max(0.01·3, …); 0.03·2 and 0.04 raised to it.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.5]) == [1.0, 1.0]
    assert statistics.holm([0.04]) == [0.04]
    assert statistics.holm([]) == []


def test_holm_is_the_closed_test_with_bonferroni() -> None:
    """Another definition: the adjusted p of H is the largest Bonferroni p over all sets of hypotheses that hold H."""
    draws = np.random.default_rng(1)
    for _ in range(50):
        p = draws.uniform(0, 0.4, 5).tolist()
        sets = [s for size in range(1, 6) for s in itertools.combinations(range(5), size)]
        closed = [max(min(1.0, len(s) * min(p[i] for i in s)) for s in sets if h in s) for h in range(5)]
        assert statistics.holm(p) == pytest.approx(closed)


def test_false_positives_of_a_whole_table_stay_below_five_percent() -> None:
    """Six methods without any effect against one baseline: their differences share the baseline's noise."""
    draws = np.random.default_rng(2)
    tables, single, family = 3000, 0, 0
    for _ in range(tables):
        values = 90 + draws.normal(0, 0.2, (7, 5))
        base = dict(enumerate(values[0]))
        p = []
        for own in values[1:]:
            found = statistics.paired(dict(enumerate(own)), base)
            assert found is not None and found.p is not None
            p.append(found.p)
        single += min(p) < 0.05
        family += min(statistics.holm(p)) < 0.05
    assert single / tables > 0.10
    assert family / tables < 0.05 + 3 * math.sqrt(0.05 * 0.95 / tables)


def test_holm_keeps_the_error_where_some_methods_have_an_effect() -> None:
    """Strongly: no matter which of six methods have an effect, one of the others is seldom found."""
    draws = np.random.default_rng(6)
    tables = 2000
    for real in (1, 3, 5):
        wrong = 0
        for _ in range(tables):
            values = 90 + draws.normal(0, 0.2, (7, 5))
            values[1 : 1 + real] += 5
            base = dict(enumerate(values[0]))
            found = [statistics.paired(dict(enumerate(own)), base) for own in values[1:]]
            wrong += (
                min(statistics.holm([one.p for one in found if one is not None and one.p is not None])[real:]) < 0.05
            )
        assert wrong / tables < 0.05 + 3 * math.sqrt(0.05 * 0.95 / tables)


# Sample sizes of the two-sided paired t test at 5 % and 80 % power that G*Power and Cohen's readers know.
@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_needed_has_the_known_sample_sizes(effect: float, pairs: int) -> None:
    assert statistics.seeds_needed(effect * 0.3, 0.3) == pairs
    assert statistics.seeds_needed(-effect * 0.3, 0.3) == pairs


def test_seeds_needed_is_capped() -> None:
    assert statistics.seeds_needed(0.0, 0.3) == 1001
    assert statistics.seeds_needed(0.08, 1.0) == 1001
    assert statistics.seeds_needed(0.0887, 1.0) == 1000
    assert statistics.seeds_needed(100.0, 0.1) == 2
    with pytest.raises(ValueError, match="above 0"):
        statistics.seeds_needed(1.0, 0.0)


@pytest.mark.parametrize(("effect", "n"), [(0.0, 4), (0.3, 3), (1.0, 5), (2.0, 3), (1.6, 2), (0.2, 60)])
def test_power_by_simulation(effect: float, n: int) -> None:
    draws = np.random.default_rng(3)
    runs = 20_000
    differences = draws.normal(effect, 1, (runs, n))
    t = differences.mean(axis=1) / differences.std(axis=1, ddof=1) * math.sqrt(n)
    quantile = {2: 12.7062, 3: 4.30265, 4: 3.18245, 5: 2.77645, 60: 2.00100}[n]
    seen = float((abs(t) > quantile).mean())
    assert statistics.power(effect, n) == pytest.approx(seen, abs=4 * math.sqrt(0.25 / runs))


def test_power_is_finite_at_its_extremes() -> None:
    with np.errstate(all="raise"):  # as a notebook may have set: a density times a probability may be below all floats
        assert statistics.power(3.0, 50) == pytest.approx(1, abs=1e-9)
    assert statistics.power(0.0, 2) == pytest.approx(0.05, abs=1e-9)
    assert statistics.power(0.0, 1000) == pytest.approx(0.05, abs=1e-6)
    assert statistics.power(1e5, 2) == pytest.approx(1, abs=1e-3)
    assert statistics.power(13.0, 10) == pytest.approx(1, abs=1e-9)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(statistics.power(0.4, n) for n in range(2, 200)))


def test_the_bootstrap_is_refused_below_twenty_seeds() -> None:
    values = {seed: 90 + seed % 7 / 10 for seed in range(25)}
    base = {seed: 89.5 + seed % 5 / 10 for seed in range(19)}
    with pytest.raises(ValueError, match="needs 20 seeds, not 19"):
        statistics.bootstrap(values, base)
    assert statistics.bootstrap(values, base | {19: 90.0}) is not None
    spread = {seed: 10 + 3.3 * seed for seed in range(20)}
    assert statistics.bootstrap({seed: value + 0.1 for seed, value in spread.items()}, spread) is None


def test_the_bootstrap_by_hand_and_the_same_every_time() -> None:
    """Another derivation: one draw at a time, with the standard library."""
    draws = np.random.default_rng(5)
    differences = (draws.gamma(1.5, 0.3, 24) - 0.2).tolist()
    values, base = seeds(*[90 + d for d in differences]), seeds(*[90.0] * 24)
    found = statistics.bootstrap(values, base)
    assert found is not None and found == statistics.bootstrap(values, base)
    mean, error = standard.fmean(differences), standard.stdev(differences) / math.sqrt(24)
    t = []
    for places in np.random.default_rng(0).integers(0, 24, (10_000, 24)).tolist():
        drawn = [differences[place] for place in places]
        t.append((standard.fmean(drawn) - mean) / (standard.stdev(drawn) / math.sqrt(24)))
    t.sort()
    assert found == pytest.approx((mean - t[9749] * error, mean - t[250] * error), rel=0, abs=2e-3 * error)
    narrower = (mean - t[9499] * error, mean - t[500] * error)
    assert statistics.bootstrap(values, base, 0.9) == pytest.approx(narrower, rel=0, abs=2e-3 * error)
    assert found[1] - mean > mean - found[0], "to the right-skewed differences belongs an interval longer on the right"


def test_the_bootstrap_covers_as_often_as_it_says_from_twenty_seeds() -> None:
    draws = np.random.default_rng(6)
    runs, hits = 800, 0
    for _ in range(runs):
        found = statistics.bootstrap(seeds(*draws.normal(0.5, 0.3, 20)), seeds(*[0.0] * 20))
        assert found is not None
        hits += found[0] <= 0.5 <= found[1]
    assert abs(hits / runs - 0.95) < 3.5 * math.sqrt(0.05 * 0.95 / runs)
