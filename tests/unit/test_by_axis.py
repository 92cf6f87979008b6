"""Errors over an axis of numbers: which comparisons have the chart, and that it shows what the records say."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from synthetic import make

from kdbench.record import Record
from kdbench.results.by_axis import axis_panels, errors_by_axis
from kdbench.results.comparison import compare
from kdbench.results.page import html
from kdbench.results.tables import build

# Epochs -> accuracies of two seeds.
FALLING = {1: (20.0, 24.0), 10: (70.0, 71.0), 100: (92.0, 93.0)}
EVEN = {1: (90.0, 90.5), 2: (91.0, 91.5), 3: (92.0, 92.5)}


def records(values: dict[Any, tuple[float, ...]], axis: str = "epochs", **over: Any) -> list[Record]:
    return [
        make(method, seed, accuracy, axes={"method": method, axis: value}, order=order, **over)
        for order, method in enumerate(("ce", "kd"))
        for value, accuracies in values.items()
        for seed, accuracy in enumerate(accuracies)
    ]


def drawn(found: list[Record]) -> Axes:
    (panel,) = axis_panels(compare(found))
    axis = Figure().subplots()
    panel.draw(axis)
    return axis


def test_points_are_mean_errors_with_whiskers_of_one_deviation() -> None:
    axis = drawn(records(FALLING))
    for bars in axis.containers:
        points, _, (whiskers,) = bars.lines
        assert points.get_xydata().tolist() == [[1, 78], [10, 29.5], [100, 7.5]]
        # Two values are apart by the root of two deviations.
        ends = [100 - (a + b) / 2 + sign * (b - a) / 2**0.5 for a, b in FALLING.values() for sign in (-1, 1)]
        assert [y for (_, low), (_, high) in whiskers.get_segments() for y in (low, high)] == pytest.approx(ends)
    assert [bars.get_label() for bars in axis.containers] == ["CE", "KD"]
    assert axis.get_ylabel() == "test error (%) ± 1 deviation"
    (teacher,) = [line for line in axis.lines if line.get_label() == "teacher"]
    assert set(teacher.get_ydata()) == {100 - 95.5}


def test_scales_are_logarithmic_where_much_is_spanned() -> None:
    for values, scale in ((FALLING, "log"), (EVEN, "linear")):
        axis = drawn(records(values))
        assert (axis.get_xscale(), axis.get_yscale()) == (scale, scale)
        assert [text.get_text() for text in axis.get_xticklabels()] == [str(value) for value in values]
    # An error of zero has no logarithm; a value of zero stands beside the smallest.
    axis = drawn(records({0: (50.0,), 10: (90.0,), 1000: (100.0,)}, axis="method_free.weight"))
    assert (axis.get_xscale(), axis.get_yscale(), axis.get_xlabel()) == ("symlog", "linear", "weight")
    assert axis.get_ylabel() == "test error (%)"
    zero, smallest, largest = axis.transData.transform([(value, 1) for value in (0, 10, 1000)])[:, 0]
    assert smallest - zero > (largest - zero) / 5


def test_the_page_shows_the_metric_of_its_table() -> None:
    found = records(FALLING, best=99.0)
    (panel,) = axis_panels(compare(found), "best")
    panel.draw(axis := Figure().subplots())
    assert {y for bars in axis.containers for _, y in bars.lines[0].get_xydata()} == {1.0}
    page = html(build(found, metric="best"), found)
    assert "Test error (best test epoch (optimistic)), mean over the seeds" in page


def test_a_teacher_far_away_and_several_teachers_are_not_drawn() -> None:
    def teachers(found: list[Record]) -> list[Any]:
        return [line for line in drawn(found).lines if line.get_label() == "teacher"]

    near = {1: (94.0,), 2: (95.0,), 3: (96.0,)}
    assert len(teachers(records(near))) == 1
    far = {value: (accuracies[0] - 40,) for value, accuracies in near.items()}
    assert not teachers(records(far))
    several = [one for n, value in enumerate(near) for one in records({value: near[value]}, teacher__accuracy=95.0 + n)]
    assert not teachers(several)


def test_many_methods_are_shown_in_groups(tmp_path: Path) -> None:
    found = [
        make(f"m{n}", 0, 90.0 + value + n / 50, axes={"method": f"m{n}", "epochs": value}, order=n)
        for n in range(54)
        for value in (1, 2, 3)
    ]
    panels = axis_panels(compare(found))
    assert [panel.title for panel in panels][::5] == ["Test error by epochs (1 of 6)", "Test error by epochs (6 of 6)"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        errors_by_axis(found, tmp_path)
    names = []
    for panel in panels:
        panel.draw(axis := Figure().subplots())
        names += [bars.get_label() for bars in axis.containers]
    assert sorted({*names}) == sorted(f"M{n}" for n in range(54)) and names.count("M0") == 6


def test_a_seed_alone_and_a_method_that_lacks_a_value_are_drawn() -> None:
    found = [record for record in records(FALLING) if record.cell.method == "ce" or record.cell.axes["epochs"] != 10]
    found = [record for record in found if record.cell.seed == 0 or record.cell.axes["epochs"] != 100]
    points = [bars.lines[0].get_xydata().tolist() for bars in drawn(found).containers]
    assert points == [[[1, 78], [10, 29.5], [100, 8]], [[1, 78], [100, 8]]]


@pytest.mark.parametrize(
    "values",
    [
        {1: (90.0,), 2: (91.0,)},
        {"wrn_16_1": (90.0,), "wrn_16_2": (91.0,), "wrn_16_4": (92.0,)},
        {1: (90.0,), 2: (91.0,), "half": (92.0,)},
    ],
    ids=["two values", "names", "not all numbers"],
)
def test_other_columns_have_no_such_chart(values: dict[Any, tuple[float, ...]], tmp_path: Path) -> None:
    assert not errors_by_axis(records(values), tmp_path) and not list(tmp_path.iterdir())


def test_two_axes_have_no_such_chart() -> None:
    both = [make("ce", 0, 90.0, axes={"method": "ce", "epochs": e, "steps": s}) for e in (1, 2, 3) for s in (1, 2, 3)]
    assert not axis_panels(compare(both))
    assert not axis_panels(compare([make("ce", seed) for seed in range(3)]))


def test_the_file_is_named_after_the_axis_and_the_page_has_the_chart(tmp_path: Path) -> None:
    found = records(EVEN, axis="data.label_fraction")
    assert errors_by_axis(found, tmp_path) == [tmp_path / "by_label_fraction.png"]
    first = (tmp_path / "by_label_fraction.png").read_bytes()
    errors_by_axis(found[::-1], tmp_path)
    assert (tmp_path / "by_label_fraction.png").read_bytes() == first
    assert "Test error by label fraction" in html(build(found), found)
