"""Charts of a comparison: learning curves, metrics over training, accuracies of all seeds.

Each chart is a panel that is drawn onto axes: several of them make a PNG or PDF file, one of them an SVG in the page.
The same records give the same bytes, in any order. Methods differ by colour (Okabe and Ito's palette, safe for
colour-blind readers), marker and line style, so that charts can be read in grey too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np

from kdbench import drawing
from kdbench.drawing import COLOURS, LINES, MARKERS, PictureForm
from kdbench.reading import inside
from kdbench.record import Record
from kdbench.results import statistics
from kdbench.results.comparison import Column, Comparison, Row, compare
from kdbench.results.curves import Curve, Excerpt, Logs, accuracy_of, curves_of, last_quarter, logs, metric_at
from kdbench.results.facts import metric_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKER_SIZES = {"*": 8.5, "P": 6.5, "X": 6.5}
MARKS_ON_CURVE = 7
ACROSS = 3
# Inches of a chart in the page, where text must be readable on a phone, and of a line of its legend.
CHART = (4.2, 2.7)
LEGEND_LINE = 0.19
# Methods that one chart of curves shows beside the first: as many as have a look of their own.
GROUP = len(COLOURS) - 1

Legend = Literal["below", "beside"]
T = TypeVar("T")


class Look(NamedTuple):
    """Colour, marker and line style, in matplotlib's words."""

    colour: str
    marker: str
    line: Any

    @property
    def marking(self) -> dict[str, Any]:
        return {"color": self.colour, "marker": self.marker, "markersize": MARKER_SIZES.get(self.marker, 5)}


@dataclass(frozen=True)
class Panel:
    """One chart. `draw`: onto axes of any size, without the title."""

    title: str
    draw: Callable[[Axes], None]


def look_of(comparison: Comparison, row: Row) -> Look:
    """A method's look: the same in all charts of a comparison. The first method's is that of no other."""
    i = comparison.rows.index(row)
    i = i and 1 + (i - 1) % GROUP
    return Look(COLOURS[i], MARKERS[i], LINES[i % len(LINES)])


def learning_curves(records: Iterable[Record], file: str | Path) -> Path:
    """Test accuracy over epochs as a file.

    Args:
        records: read from folders that hold metrics.jsonl.
        file: the PNG or PDF to write.

    Raises:
        UserError: a record without metrics.
    """
    comparison = compare(records)
    panels = accuracy_panels(comparison, logs(comparison))
    legend: Legend = "beside" if len(comparison.rows) > GROUP + 1 else "below"
    return save(comparison, panels, file, 2, (4.7, 3.2), legend=legend)


def metric_curves(records: Iterable[Record], folder: Path, form: PictureForm = "png") -> list[Path]:
    """Every metric that the records hold over epochs: a file for each, named after the metric.

    Raises:
        UserError: a record without metrics.
    """
    comparison = compare(records)
    log = logs(comparison)
    found = metrics_of(log).items()
    files = {metric: inside(folder, f"{metric}.{form}") for metric, _ in found}
    return [
        save(comparison, metric_panels(comparison, log, metric), files[metric], len(points), (3.5, 3.0), True)
        for metric, points in found
    ]


def final_accuracies(records: Iterable[Record], file: str | Path) -> Path:
    """Final test accuracy of every seed as a file.

    A point for each, with mean and ± one deviation, a line for each method, a panel for each column.
    """
    comparison = compare(records)
    panels = [_seeds_panel(comparison, column) for column in comparison.columns]
    width, height = 4.4 if len(panels) > 1 else 6.0, 0.9 + 0.36 * len(comparison.rows)
    return save(comparison, panels, file, ACROSS, (width, height), sharey=True, legend=None)


def accuracy_panels(comparison: Comparison, log: Logs) -> list[Panel]:
    """Test accuracy over epochs, mean over the seeds with a band of ± one deviation, for each column of the comparison.

    The whole run, and its last quarter enlarged where every column has evaluations in it. Many methods are shown in
    groups, the first method in each.
    """
    panels = []
    by_column = {column: curves_of(comparison, column, log, accuracy_of) for column in comparison.columns}
    by_column = {column: curves for column, curves in by_column.items() if curves}
    parts = {column: last_quarter(curves) for column, curves in by_column.items()}
    for column, curves in by_column.items():
        name = f"{column.label}: " if comparison.axes else ""
        for which, group in groups_of(comparison, curves):
            for part in (None, parts[column]) if all(parts.values()) else (None,):
                title = name + ("whole run" if part is None else part.title) + which
                panels.append(_curves_panel(comparison, title, group, "test accuracy (%)", part=part))
    return panels


def with_spread(label: str, spread: bool) -> str:
    """The label of an axis on which a band, bar or whisker may stand for a deviation."""
    return f"{label} ± 1 deviation" if spread else label


def groups_of(comparison: Comparison, curves: Mapping[Row, T]) -> list[tuple[str, dict[Row, T]]]:
    """Curves as charts show them together, those of the first method in each group; before each, what its title adds:
    ' (1 of 2)', or nothing for a single one."""
    first, *others = comparison.rows
    chunks = [others[i : i + GROUP] for i in range(0, len(others), GROUP)] or [[]]
    groups = [{row: curves[row] for row in [first, *chunk] if row in curves} for chunk in chunks]
    groups = [group for group in groups if group]
    return [(f" ({i} of {len(groups)})" if len(groups) > 1 else "", group) for i, group in enumerate(groups, 1)]


def metric_panels(comparison: Comparison, log: Logs, metric: str) -> list[Panel]:
    """A metric over epochs, mean over the seeds with a band of ± one deviation.

    A panel for each hook point (and column). Dotted, where it was recorded, the value of a student that ignores its
    input.
    """
    panels = []
    for column in comparison.columns:
        for point in metrics_of(log)[metric]:
            if curves := curves_of(comparison, column, log, metric_at(metric, point)):
                title = f"{column.label}: {point}" if comparison.axes else point
                reference = _reference(comparison, column, metric, point)
                panels.append(_curves_panel(comparison, title, curves, metric.replace("_", " "), reference=reference))
    return panels


def chart(comparison: Comparison, panel: Panel, name: str) -> str:
    """A panel with its legend as an SVG element.

    Args:
        name: different for each chart of a page.
    """
    with drawing.style():
        figure, (axis,) = drawing.panels(1, 1, CHART)
        panel.draw(axis)
        lines = _legend(figure, comparison, [axis])
        figure.set_figheight(CHART[1] + LEGEND_LINE * lines)
        return drawing.svg(figure, " ".join(panel.title.split()), name)


def metrics_of(log: Logs) -> dict[str, list[str]]:
    """Metric -> hook points, of all that was measured."""
    found: dict[str, set[str]] = {}
    for entry in (entry for entries in log.values() for entry in entries):
        for metric, points in entry.get("metrics", {}).items():
            if there := {point for point, value in points.items() if value is not None}:
                found.setdefault(metric, set()).update(there)
    return {metric: sorted(found[metric]) for metric in sorted(found)}


def save(
    comparison: Comparison,
    panels: Sequence[Panel],
    file: str | Path,
    across: int,
    size: tuple[float, float],
    sharey: bool = False,
    legend: Legend | None = "below",
) -> Path:
    """Draw panels into a file.

    Args:
        legend: one below all panels, or, where that would be too long, one beside the last of panels that show the same
            methods.
    """
    with drawing.style():
        figure, axes = drawing.panels(len(panels), across, size, sharey)
        for axis, panel in zip(axes, panels, strict=True):
            panel.draw(axis)
            axis.set_title(panel.title)
            if (place := axis.get_subplotspec()) is not None and not place.is_first_col():
                axis.set_ylabel("")
        if legend == "beside":
            _legends(axes)
        elif legend == "below":
            _legend(figure, comparison, axes)
        return drawing.save(figure, file)


def _curves_panel(
    comparison: Comparison,
    title: str,
    curves: Mapping[Row, Curve],
    label: str,
    part: Excerpt | None = None,
    reference: float | None = None,
) -> Panel:
    def draw(axis: Axes) -> None:
        for row, curve in curves.items():
            _draw_curve(axis, curve, look_of(comparison, row), row.label)
        axis.set_xlabel("epoch")
        axis.set_ylabel(with_spread(label, any(len(values) > 1 for _, values in curves.values())))
        if part is not None:
            axis.set_xlim(*part.epochs)
            axis.set_ylim(*part.values)
        if reference is not None:
            axis.axhline(reference, color="0.35", linewidth=1.0, linestyle=":")
            axis.margins(y=0.08)
            # Above its line, but where a curve ends close above it.
            means = [values.mean(axis=0) for _, values in curves.values()]
            seen = [reference, *(value for mean in means for value in mean)]
            crossed = any(0 < mean[-1] - reference < (max(seen) - min(seen)) / 5 for mean in means)
            place: Any = {"xycoords": axis.get_yaxis_transform(), "textcoords": "offset points"}
            place |= {"xytext": (-3, -3), "va": "top"} if crossed else {"xytext": (-3, 3)}
            axis.annotate("input ignored", (1.0, reference), ha="right", fontsize=7, color="0.35", **place)

    return Panel(title, draw)


def _draw_curve(axis: Axes, curve: Curve, style: Look, label: str) -> None:
    epochs, values = curve
    mean = values.mean(axis=0)
    if len(values) > 1:
        deviation = values.std(axis=0, ddof=1)
        axis.fill_between(epochs, mean - deviation, mean + deviation, color=style.colour, alpha=0.14, linewidth=0)
    every = max(1, math.ceil(len(epochs) / MARKS_ON_CURVE))
    # Markers begin at different places, so that they do not lie on each other.
    start = (MARKERS.index(style.marker) * every) // len(MARKERS)
    axis.plot(epochs, mean, linestyle=style.line, markevery=(start, every), label=label, **style.marking)


def _reference(comparison: Comparison, column: Column, metric: str, point: str) -> float | None:
    """Mean value of students that ignore their input; None where it was not recorded."""
    found = [
        value
        for record in comparison.of_column(column)
        if (value := record.result.references.get(metric, {}).get(point)) is not None
    ]
    return statistics.summarize(found).mean if found else None


def _seeds_panel(comparison: Comparison, column: Column) -> Panel:
    """Every seed of a column. The teacher's accuracy is a dashed line where it is near, else it stands in the title."""
    by_row = [[*comparison.accuracies(row, column, "last").values()] for row in comparison.rows]
    title = column.label if comparison.axes else metric_label(comparison.records, "last")
    everything = [value for values in by_row for value in values]
    teacher = teacher_of(comparison, column)
    room = max(max(everything) - min(everything), 0.5) if everything else 0.0
    near = teacher is not None and bool(everything) and (min(everything) - room <= teacher <= max(everything) + room)
    if teacher is not None and everything:
        title += f"; {'dashed: ' if near else ''}teacher {teacher:.2f}"

    def draw(axis: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        for i, (row, values) in enumerate(zip(comparison.rows, by_row, strict=True)):
            if values:
                _draw_seeds(axis, i, values, look_of(comparison, row))
        if near and teacher is not None:
            axis.axvline(teacher, color="#555555", linestyle=(0, (4, 3)), linewidth=1, zorder=0)
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.set_yticks(range(len(by_row)), [row.label for row in comparison.rows])
        axis.set_ylim(len(by_row) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel(with_spread("test accuracy (%)", any(len(values) > 1 for values in by_row)))

    return Panel(title, draw)


def _draw_seeds(axis: Axes, line: int, values: Sequence[float], style: Look) -> None:
    # Seeds of one line stand a little apart, in their order, so that equal values are seen as several.
    offsets = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else np.zeros(1)
    summary = statistics.summarize(values)
    if summary.deviation is not None:
        ends = [summary.mean - summary.deviation, summary.mean + summary.deviation]
        axis.plot(ends, [line, line], color=style.colour, linewidth=5, alpha=0.25, solid_capstyle="butt", zorder=1)
    axis.plot([summary.mean] * 2, [line - 0.28, line + 0.28], color=style.colour, linewidth=2, zorder=2)
    edge: dict[str, Any] = {"linestyle": "", "markeredgecolor": "white", "markeredgewidth": 0.4, "zorder": 3}
    axis.plot(values, line + offsets, **style.marking, **edge)


def teacher_of(comparison: Comparison, column: Column) -> float | None:
    """The accuracy of a column's teacher in percent; None where there are several, or none was measured."""
    found = {
        (record.teacher.name, record.teacher.accuracy)
        for record in comparison.of_column(column)
        if record.teacher is not None and record.teacher.accuracy is not None
    }
    return found.pop()[1] if len(found) == 1 else None


def _legends(axes: Sequence[Axes]) -> None:
    """A legend to the right of each of the axes, unless the next ones show the same."""
    labels = [axis.get_legend_handles_labels()[1] for axis in axes]
    for axis, own, following in zip(axes, labels, [*labels[1:], None], strict=True):
        if own != following:
            axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, handlelength=3.2)


def _legend(figure: Figure, comparison: Comparison, axes: Sequence[Axes]) -> int:
    """One legend below all panels, in the order of the rows; the number of its lines."""
    known: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    order = [row.label for row in comparison.rows]
    labels = sorted(known, key=lambda label: order.index(label) if label in order else len(order))
    width = figure.get_size_inches()[0]
    longest = max((len(label) for label in labels), default=1)
    across = max(1, min(len(labels), int(width / (0.075 * longest + 0.65))))
    figure.legend(
        [known[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=across,
        frameon=False,
        handlelength=3.2,
    )
    return math.ceil(len(labels) / across)
