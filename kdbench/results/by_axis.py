"""A chart of errors over the numbers that a comparison's columns stand for: budgets, shares of the training images."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdbench.drawing import PictureForm
from kdbench.reading import inside
from kdbench.record import Metric, Record
from kdbench.results import statistics
from kdbench.results.comparison import Axis, Column, Comparison, Row, compare
from kdbench.results.plots import Panel, groups_of, look_of, save, teacher_of, with_spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# With fewer values there is no curve to see.
FEWEST_VALUES = 3
# What spans a larger factor is drawn on a logarithmic scale.
SPAN_OF_VALUES, SPAN_OF_ERRORS = 10, 4


def errors_by_axis(records: Iterable[Record], folder: Path, form: PictureForm = "png") -> list[Path]:
    """Test error over the numbers that the columns compare (budgets, shares of the data): a file named after them.

    No file where the columns differ in something else, or are fewer than three.
    """
    comparison = compare(records)
    if not (panels := axis_panels(comparison)):
        return []
    file = inside(folder, file_of(comparison.axes[0], form))
    return [save(comparison, panels, file, 2, (6.0, 4.2), legend="beside" if len(panels) > 1 else "below")]


def file_of(axis: Axis, form: PictureForm = "png") -> str:
    """The name of an axis's chart."""
    return f"by_{axis.name.replace(' ', '_')}.{form}"


def axis_panels(comparison: Comparison, metric: Metric = "last") -> list[Panel]:
    """Test error over an axis of numbers: mean over the seeds, with whiskers of ± one deviation.

    Errors that become some times smaller are seen as that: then the scale is logarithmic. Many methods are shown in
    groups, the first method in each.
    """
    if len(comparison.axes) != 1 or len(comparison.columns) < FEWEST_VALUES:
        return []
    (axis,) = comparison.axes
    try:
        values = {column: float(column.key[0][1]) for column in comparison.columns}
    except ValueError:
        return []
    curves = {row: _errors(comparison, row, values, metric) for row in comparison.rows}
    teachers = {found for column in comparison.columns if (found := teacher_of(comparison, column)) is not None}
    return [
        Panel(f"Test error by {axis.name}{which}", partial(_draw_errors, comparison, axis.name, group, teachers))
        for which, group in groups_of(comparison, {row: curve for row, curve in curves.items() if curve})
    ]


def _errors(
    comparison: Comparison, row: Row, values: Mapping[Column, float], metric: Metric
) -> dict[float, statistics.Summary]:
    """Of a method: value of the axis -> its test errors in percent, summed up over the seeds."""
    found = {value: comparison.accuracies(row, column, metric).values() for column, value in values.items()}
    return {value: statistics.summarize([100 - a for a in seeds]) for value, seeds in found.items() if seeds}


def _draw_errors(
    comparison: Comparison,
    name: str,
    curves: Mapping[Row, Mapping[float, statistics.Summary]],
    teachers: Collection[float],
    axis: Axes,
) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    for row, curve in curves.items():
        look = look_of(comparison, row)
        means, deviations = [s.mean for s in curve.values()], [s.deviation or 0.0 for s in curve.values()]
        whiskers: dict[str, Any] = {"elinewidth": 0.8, "capsize": 2}
        axis.errorbar(list(curve), means, deviations, linestyle=look.line, label=row.label, **whiskers, **look.marking)
    errors = [summary.mean for curve in curves.values() for summary in curve.values()]
    # One far away would leave no room for the methods.
    room = max(errors) - min(errors)
    if len(teachers) == 1 and min(errors) - room <= 100 - next(iter(teachers)) <= max(errors) + room:
        axis.axhline(100 - next(iter(teachers)), color="#555555", linestyle=(0, (4, 3)), linewidth=1, label="teacher")
    values = sorted({value for curve in curves.values() for value in curve})
    smallest = next((value for value in values if value > 0), 0)
    if values[0] >= 0 and values[-1] > SPAN_OF_VALUES * smallest > 0:
        # Zero has a place of its own beside the smallest.
        axis.set_xscale(**({"value": "log"} if values[0] else {"value": "symlog", "linthresh": smallest}))
        axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(values, [f"{value:g}" for value in values])
    if min(errors) > 0 and max(errors) > SPAN_OF_ERRORS * min(errors):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_locator(NullLocator())
    axis.set_xlabel(name)
    spread = any(summary.deviation is not None for curve in curves.values() for summary in curve.values())
    axis.set_ylabel(with_spread("test error (%)", spread))
