"""Several pairs summed up, and when the sum may not be read."""

from __future__ import annotations

from typing import Any

import pytest
from scipy import stats
from synthetic import comparison, make

from kdbench.record import Record
from kdbench.results.across import Across
from kdbench.results.frames import table_csv
from kdbench.results.tables import build
from kdbench.results.texts import latex, markdown

PAIRS = ("wrn_16_1", "wrn_16_2", "wrn_40_1", "resnet20")
VALUES = {"ce": [90.0, 90.4, 90.2], "kd": [90.3, 91.0, 90.1], "ab": [92.0, 91.4, 91.8]}


def pairs(**over: Any) -> list[Record]:
    """Four students, each with its own teacher, in as many record folders' worth of recipes; KD is below the plain
    student on the last."""
    found = []
    for i, student in enumerate(PAIRS):
        values = {m: [v + i for v in several] for m, several in VALUES.items()}
        if i == 3:
            values["kd"] = [92.9, 93.0, 93.1]
        for record in comparison(values, student=student, recipe=f"recipe {i}", **{"teacher": f"big {i}"} | over):
            plain = record.cell.method == "ce"
            kept = {"teacher": None, "cell": record.cell.model_copy(update={"teacher": None})} if plain else {}
            found.append(record.model_copy(update=kept))
    return found


def summed(records: list[Record], **options: Any) -> Across:
    found = build(records, **options).across
    assert found is not None
    return found


def test_ranks_distance_and_probabilities() -> None:
    found = summed(pairs())
    assert build(pairs()).axes == ("student",), "each has one teacher, and a plain student has none"
    # CE 3 3 3 2, KD 2 2 2 3, AB always 1.
    assert {s.label: s.rank for s in found.standings} == {"CE": 2.75, "KD": 2.25, "AB": 1.0}
    assert found.columns == 4
    # Demšar's q for three methods.
    assert found.critical_distance == pytest.approx(2.343 * (3 * 4 / 24) ** 0.5, rel=5e-4)
    ce, kd, ab = found.standings
    assert ce.improvement is None
    # Of the six pairs of different seeds.
    once = wins(VALUES["kd"], VALUES["ce"]) / 6
    last = wins([92.9, 93.0, 93.1], [93.0, 93.4, 93.2]) / 6
    assert kd.improvement is not None
    assert kd.improvement.probability == pytest.approx((3 * once + last) / 4)
    assert kd.improvement.low is not None and kd.improvement.low < kd.improvement.probability
    assert ab.improvement is not None
    assert (ab.improvement.probability, ab.improvement.low) == (1.0, None)
    low, high = (f"{end:.2f}" for end in (kd.improvement.low, kd.improvement.high or 0.0))
    assert f"| KD | 2.25 | {kd.improvement.probability:.2f} | \\[{low}, {high}\\] |" in markdown(build(pairs()))


def wins(own: list[float], base: list[float]) -> float:
    """Mann and Whitney's statistic without the pairs of one seed, none of which is equal."""
    return float(stats.mannwhitneyu(own, base).statistic) - sum(x > y for x, y in zip(own, base, strict=True))


def test_means_that_are_shown_alike_share_a_rank() -> None:
    """A reader who ranks the table's numbers finds these ranks."""
    records = [
        make(m, s, v + s / 10, order=k, student=student, recipe=student)
        for student in PAIRS[:2]
        for k, (m, v) in enumerate({"ce": 90.0, "kd": 91.001, "ab": 91.004}.items())
        for s in range(2)
    ]
    assert {one.label: one.rank for one in summed(records).standings} == {"CE": 3.0, "KD": 1.5, "AB": 1.5}


def test_columns_of_one_teacher_its_data_and_its_seeds_have_no_distance() -> None:
    found = summed(pairs(teacher="big"))
    assert found.columns == 4 and found.critical_distance is None
    assert "all columns have teacher, data and seeds in common" in (found.why_no_distance or "")
    said = markdown(build(pairs(teacher="big")))
    assert "There is no critical distance of ranks: all columns have teacher, data and seeds in common" in said


def test_columns_that_share_only_a_part_have_a_distance_and_say_which() -> None:
    found = summed(pairs())
    assert found.critical_distance is not None and found.shared == ("data", "seeds")
    assert "only in part: some have data and seeds in common" in markdown(build(pairs()))
    apart = []
    for i, student in enumerate(PAIRS):
        for k, (method, values) in enumerate(VALUES.items()):
            own = {"student": student, "teacher": f"big {i}", "data": f"set {i}", "recipe": f"recipe {i}"}
            apart += [make(method, 10 * i + s, v, order=k, **own) for s, v in enumerate(values)]
    assert summed(apart).shared == ()
    one_more = [make(m, 12, 92.0, order=k, teacher="big 0", data="set 0", student=PAIRS[0], recipe="recipe 0")
                for k, m in enumerate(VALUES)]  # fmt: skip
    assert summed(apart + one_more).shared == ("seeds",)
    assert "The critical distance assumes that the columns are independent.\n" in markdown(build(apart))


def test_one_run_each_has_no_probability_of_improvement() -> None:
    single = [r for r in pairs() if r.cell.seed == 0]
    assert [one.improvement for one in summed(single).standings] == [None] * 3
    assert "| AB | 1.00 | – | – |" in markdown(build(single))


def test_one_column_or_one_method_has_no_sum() -> None:
    assert build(comparison(VALUES)).across is None
    assert build([r for r in pairs() if r.cell.method == "kd"]).across is None
    apart = [make("ce", 0, student="a", recipe="a"), make("kd", 0, student="b", recipe="b", order=1)]
    assert len(build(apart).columns) == 2 and build(apart).across is None


def test_a_column_without_every_method_is_not_ranked() -> None:
    some = [r for r in pairs() if not (r.cell.method == "ab" and r.cell.student == "wrn_16_1")]
    found = summed(some)
    assert found.columns == 3
    assert {s.label: s.rank for s in found.standings}["CE"] == pytest.approx((3 + 3 + 2) / 3)
    assert found.critical_distance == pytest.approx(2.343 * (3 * 4 / 18) ** 0.5, rel=5e-4)
    lonely = [r for r in pairs() if r.cell.method != "ab" or r.cell.student == "wrn_16_1"]
    found = summed(lonely)
    assert found.columns == 0 and found.standings[0].rank is None and found.critical_distance is None
    assert found.standings[1].improvement is not None
    # AB, in one column alone, is there above each run of CE.
    assert found.standings[2].improvement is not None and found.standings[2].improvement.probability == 1.0
    assert "average rank" not in markdown(build(lonely))


def test_budgets_of_one_pair_have_ranks_and_no_distance() -> None:
    budgets = comparison(VALUES, epochs=20.0, recipe="short") + comparison(VALUES)
    found = summed(budgets)
    assert found.columns == 2 and found.critical_distance is None
    assert "not all different pairs" in (found.why_no_distance or "")
    assert "There is no critical distance of ranks: the columns are not all different pairs" in markdown(build(budgets))


@pytest.mark.parametrize("part", ["teacher", "data"])
def test_columns_of_another_teacher_or_other_data_are_other_pairs(part: str) -> None:
    records = [
        make(m, s, v, order=k, baseline="kd", recipe=f"recipe {i}", **{part: f"{part} {i}"})
        for i in range(3)
        for k, (m, values) in enumerate({"kd": VALUES["kd"], "ab": VALUES["ab"], "at": VALUES["ce"]}.items())
        for s, v in enumerate(values)
    ]
    found = summed(records)
    assert found.critical_distance is not None and part not in found.shared


def test_columns_without_a_teacher_have_that_in_common() -> None:
    records = [
        make(m, s, v, order=k, student=student, recipe=student, teacher=None)
        for student in PAIRS
        for k, (m, values) in enumerate(VALUES.items())
        for s, v in enumerate(values)
    ]
    assert "all columns have teacher, data and seeds in common" in (summed(records).why_no_distance or "")


def test_two_methods_have_no_distance() -> None:
    found = summed([r for r in pairs() if r.cell.method != "ab"])
    assert found.critical_distance is None and "paired test" in (found.why_no_distance or "")


def test_shared_runs_have_no_distance() -> None:
    records = [make("ce", s, 90 + s / 7, teacher=None, axes={"method": "ce"}) for s in range(3)]
    records += [
        make(m, s, 90.2 + s / 5 - i / 9, teacher=t, axes={"method": m, "teacher": t}, order=2)
        for i, m in enumerate(("kd", "ab"))
        for t in ("big", "huge")
        for s in range(3)
    ]
    found = summed(records)
    assert found.critical_distance is None and "several columns" in (found.why_no_distance or "")


def test_the_files_show_it() -> None:
    table = build(pairs())
    text = markdown(table)
    assert "Across the 4 columns:" in text
    assert "| AB | 1.00 | 1.00 | – |" in text
    assert "| CE | 2.75 |  |  |" in text
    assert "differ by less than the critical distance, 1.66," in text and "for these columns only" in text
    assert "Across the 4 columns" in latex(table)
    assert "average_rank" in table_csv(table).splitlines()[0]
    assert "average_rank" not in table_csv(build(comparison(VALUES)))


def test_the_chosen_metric_is_summed() -> None:
    records = pairs(best=95.0)
    assert {s.rank for s in summed(records, metric="best").standings} == {2.0}
