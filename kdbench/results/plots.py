"""Learning curves, agreement over training, and final accuracies as PNG files. The same records give the same bytes,
in any order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdbench.drawing import DPI, MARKERS, save, style
from kdbench.record import Metric, Record
from kdbench.results import statistics
from kdbench.results.comparison import Column, Comparison, Row, compare
from kdbench.results.curves import (
    MARKS_ON_CURVE,
    Curve,
    Look,
    accuracy_of,
    agreement_at,
    curve_of,
    last_quarter,
    logs,
    look,
)
from kdbench.results.notes import metric_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKER_SIZES = {"*": 8.5, "P": 6.5, "X": 6.5}
ACROSS = 3


def learning_curves(records: Iterable[Record], file: str | Path, *, baseline: str | None = None) -> Path:
    """Test accuracy over epochs, mean over the seeds with a band of ± one deviation, for each column of the comparison:
    the whole run, and its last quarter enlarged where every column has evaluations in it.

    Args:
        records: read from folders that hold metrics.jsonl.
        file: the PNG to write.

    Raises:
        UserError: a record without metrics.
    """
    comparison = compare(records, baseline)
    log = logs(comparison)
    curves = {
        column: {
            row: curve
            for row in comparison.rows
            if (curve := curve_of(comparison, row, column, log, accuracy_of)) is not None
        }
        for column in comparison.columns
    }
    parts = {column: last_quarter(by_row) for column, by_row in curves.items()}
    # In each row of panels the same ones, or none could be found.
    enlarged = all(parts.values())
    panels = [(column, shown) for column, part in parts.items() for shown in ((None, part) if enlarged else (None,))]
    with style():
        figure, axes = _grid(len(panels), 2, (4.7, 3.2))
        for axis, (column, part) in zip(axes, panels, strict=True):
            for row, curve in curves[column].items():
                _draw(axis, curve, look(comparison, row), row.label)
            axis.set_xlabel("epoch")
            name = f"{column.label}: " if comparison.axes else ""
            if part is None:
                axis.set_ylabel("test accuracy (%)")
                axis.set_title(f"{name}whole run")
            else:
                axis.set_xlim(*part.epochs)
                axis.set_ylim(*part.values)
                axis.set_title(name + part.title("\n"))
        _legend(figure, comparison, axes)
        return save(figure, file)


def agreement(records: Iterable[Record], file: str | Path, *, baseline: str | None = None) -> Path | None:
    """Share of equal activation signs of student and teacher over epochs, one panel for each hook point (and column),
    mean over the seeds with a band of ± one deviation; dotted, where it was recorded, what a student has that ignores
    its input. None, and no file, where no record has agreement.

    Raises:
        UserError: a record without metrics.
    """
    comparison = compare(records, baseline)
    log = logs(comparison)
    entries = [entry for several in log.values() for entry in several]
    points = sorted({point for entry in entries for point in entry.get("metrics", {}).get("agreement", {})})
    if not points:
        return None
    with style():
        figure, axes = _grid(len(comparison.columns) * len(points), len(points), (3.5, 3.0), sharey=True)
        drawn: set[Row] = set()
        for i, column in enumerate(comparison.columns):
            for j, point in enumerate(points):
                axis = axes[i * len(points) + j]
                for row in comparison.rows:
                    curve = curve_of(comparison, row, column, log, agreement_at(point))
                    if curve is not None:
                        drawn.add(row)
                        _draw(axis, curve, look(comparison, row), row.label)
                if references := [
                    share[point]
                    for row in comparison.rows
                    for record in comparison.cell(row, column).values()
                    if point in (share := record.result.references.get("agreement", {}))
                ]:
                    axis.axhline(statistics.summarize(references).mean, color="0.35", linewidth=1.0, linestyle=":")
                    axis.annotate(
                        "input ignored",
                        (1.0, statistics.summarize(references).mean),
                        xycoords=axis.get_yaxis_transform(),
                        xytext=(-3, 3),
                        textcoords="offset points",
                        ha="right",
                        fontsize=7,
                        color="0.35",
                    )
                axis.set_title(f"{column.label}: {point}" if comparison.axes else point)
                axis.set_xlabel("epoch")
                if j == 0:
                    axis.set_ylabel("share of equal activation signs")
        _legend(figure, comparison, axes, drawn)
        return save(figure, file)


def final_accuracies(
    records: Iterable[Record], file: str | Path, *, metric: Metric = "last", baseline: str | None = None
) -> Path:
    """Final test accuracy of every seed as a point, with mean and ± one deviation, one line for each method, one panel
    for each column. The teacher's accuracy is a dashed line where it is near, else it stands in the panel's title."""
    from matplotlib.ticker import MaxNLocator

    comparison = compare(records, baseline)
    rows = comparison.rows
    with style():
        height = 0.9 + 0.36 * len(rows)
        figure, axes = _grid(
            len(comparison.columns), ACROSS, (4.4 if len(comparison.columns) > 1 else 6.0, height), sharey=True
        )
        for axis, column in zip(axes, comparison.columns, strict=False):
            everything = []
            for i, row in enumerate(rows):
                values = [record.accuracy(metric) for record in comparison.cell(row, column).values()]
                if not values:
                    continue
                everything += values
                colour, marker, _ = look(comparison, row)
                # Seeds of one line stand a little apart, in their order, so that equal values are seen as several.
                offsets = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else np.zeros(1)
                summary = statistics.summarize(values)
                if summary.deviation is not None:
                    ends = [summary.mean - summary.deviation, summary.mean + summary.deviation]
                    axis.plot(ends, [i, i], color=colour, linewidth=5, alpha=0.25, solid_capstyle="butt", zorder=1)
                axis.plot([summary.mean] * 2, [i - 0.28, i + 0.28], color=colour, linewidth=2, zorder=2)
                axis.plot(
                    values,
                    i + offsets,
                    linestyle="",
                    marker=marker,
                    color=colour,
                    zorder=3,
                    markersize=MARKER_SIZES.get(marker, 5),
                    markeredgecolor="white",
                    markeredgewidth=0.4,
                )
            axis.xaxis.set_major_locator(MaxNLocator(6))
            axis.set_yticks(range(len(rows)), [row.label for row in rows])
            axis.set_ylim(len(rows) - 0.5, -0.5)
            axis.grid(axis="y", visible=False)
            axis.set_xlabel("test accuracy (%)")
            axis.set_title(_with_teacher(axis, comparison, column, everything, metric))
        return save(figure, file)


def _with_teacher(axis: Axes, comparison: Comparison, column: Column, values: Sequence[float], metric: Metric) -> str:
    """Draw the teacher's line if it is near the values; the panel's title."""
    title = [column.label if comparison.axes else metric_label(comparison.records, metric)]
    found = sorted(
        {
            (record.teacher.name, record.teacher.accuracy)
            for row in comparison.rows
            for record in comparison.cell(row, column).values()
            if record.teacher is not None and record.teacher.accuracy is not None
        }
    )
    if len(found) == 1 and values:
        accuracy = found[0][1]
        room = max(max(values) - min(values), 0.5)
        if min(values) - room <= accuracy <= max(values) + room:
            axis.axvline(accuracy, color="#555555", linestyle=(0, (4, 3)), linewidth=1, zorder=0)
            title.append(f"dashed: teacher {accuracy:.2f}")
        else:
            title.append(f"teacher {accuracy:.2f}")
    return "; ".join(title)


def _draw(axis: Axes, curve: Curve, style: Look, label: str) -> None:
    epochs, values = curve
    colour, marker, line = style
    mean = values.mean(axis=0)
    if len(values) > 1:
        deviation = values.std(axis=0, ddof=1)
        axis.fill_between(epochs, mean - deviation, mean + deviation, color=colour, alpha=0.14, linewidth=0)
    every = max(1, math.ceil(len(epochs) / MARKS_ON_CURVE))
    # Markers begin at different places, so that they do not lie on each other.
    start = (MARKERS.index(marker) * every) // len(MARKERS)
    axis.plot(
        epochs,
        mean,
        color=colour,
        linestyle=line,
        marker=marker,
        markevery=(start, every),
        markersize=MARKER_SIZES.get(marker, 5),
        label=label,
    )


def _grid(count: int, across: int, size: tuple[float, float], sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, at most `across` in a row, each of `size` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(across, count)
    down = -(-count // across)
    figure = Figure(figsize=(size[0] * across, size[1] * down), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(down, across, squeeze=False, sharey="row" if sharey else False).flat)
    for axis in axes[count:]:
        figure.delaxes(axis)
    return figure, axes[:count]


def _legend(figure: Figure, comparison: Comparison, axes: Sequence[Axes], shown: set[Row] | None = None) -> None:
    """One legend below all panels, in the order of the rows."""
    known: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    labels = [row.label for row in comparison.rows if row.label in known and (shown is None or row in shown)]
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
