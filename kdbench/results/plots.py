"""Learning curves, agreement over training, and final accuracies as PNG files.

Methods differ by colour (Okabe and Ito's palette, safe for colour-blind readers), marker and line style, so the
pictures can be read in grey too. The same records give the same bytes, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdbench.errors import UserError
from kdbench.files import atomic
from kdbench.results import statistics
from kdbench.results.comparison import Column, Comparison, Row, compare
from kdbench.results.record import Metric, Record, metrics
from kdbench.results.tables import metric_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C2D04", "#3B0F70")
MARKERS = "osD^vP*X<>"
LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
MARKER_SIZES = {"*": 8.5, "P": 6.5, "X": 6.5}
MARKS_ON_CURVE = 7
ACROSS = 3
# A method this many times farther below the median than the best is above it is left out of the enlarged panel.
FAR_BELOW = 3.0
DPI = 160

# Epochs and, for each seed, the values at them.
Curve = tuple[np.ndarray, np.ndarray]


def learning_curves(records: Iterable[Record], file: str | Path, *, baseline: str | None = None) -> Path:
    """Test accuracy over epochs, mean over the seeds with a band of ± one deviation: the whole run, and its last part
    enlarged, for each column of the comparison.

    Args:
        records: read from folders that hold metrics.jsonl.
        file: the PNG to write.

    Raises:
        UserError: a record without metrics.
    """
    comparison = compare(records, baseline)
    log = _logs(comparison)
    curves = {
        column: {
            row: curve
            for row in comparison.rows
            if (curve := _curve(comparison, row, column, log, _test_accuracy)) is not None
        }
        for column in comparison.columns
    }
    with _style():
        figure, axes = _grid(len(comparison.columns) * 2, 2, (4.7, 3.2))
        for i, (column, by_row) in enumerate(curves.items()):
            whole, end = axes[2 * i], axes[2 * i + 1]
            for axis in (whole, end):
                for row, curve in by_row.items():
                    _draw(axis, curve, _look(comparison, row), row.label)
                axis.set_xlabel("epoch")
            whole.set_ylabel("test accuracy (%)")
            name = f"{column.label}: " if comparison.axes else ""
            whole.set_title(f"{name}whole run")
            below = _zoom(end, by_row)
            end.set_title(f"{name}last quarter" + (f" (below: {', '.join(below)})" if below else ""))
        _legend(figure, comparison, axes)
        return _save(figure, file)


def agreement(records: Iterable[Record], file: str | Path, *, baseline: str | None = None) -> Path | None:
    """Share of equal activation signs of student and teacher over epochs, one panel for each hook point (and column),
    mean over the seeds with a band of ± one deviation. None, and no file, where no record has agreement.

    Raises:
        UserError: a record without metrics.
    """
    comparison = compare(records, baseline)
    log = _logs(comparison)
    points = sorted({point for entries in log.values() for entry in entries for point in entry.get("agreement", {})})
    if not points:
        return None
    with _style():
        figure, axes = _grid(len(comparison.columns) * len(points), len(points), (3.5, 3.0), sharey=True)
        drawn: set[Row] = set()
        for i, column in enumerate(comparison.columns):
            for j, point in enumerate(points):
                axis = axes[i * len(points) + j]
                for row in comparison.rows:
                    curve = _curve(comparison, row, column, log, _at(point))
                    if curve is not None:
                        drawn.add(row)
                        _draw(axis, curve, _look(comparison, row), row.label)
                axis.set_title(f"{column.label}: {point}" if comparison.axes else point)
                axis.set_xlabel("epoch")
                if j == 0:
                    axis.set_ylabel("share of equal activation signs")
        _legend(figure, comparison, axes, drawn)
        return _save(figure, file)


def final_accuracies(
    records: Iterable[Record], file: str | Path, *, metric: Metric = "last", baseline: str | None = None
) -> Path:
    """Final test accuracy of every seed as a point, with mean and ± one deviation, one line for each method, one panel
    for each column. The teacher's accuracy is a dashed line where it is near, else it stands in the panel's title."""
    from matplotlib.ticker import MaxNLocator

    comparison = compare(records, baseline)
    rows = comparison.rows
    with _style():
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
                colour, marker, _ = _look(comparison, row)
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
        return _save(figure, file)


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


def _logs(comparison: Comparison) -> dict[str, list[dict[str, Any]]]:
    """Identity of each record -> its evaluations."""
    log = {}
    for record in comparison.records:
        if record.folder is None:
            raise UserError(
                "a record that was not read from a folder has no curve",
                where=record.identity[:8],
                hint="read records with kdbench.results.record.read_records",
            )
        log[record.identity] = metrics(record.folder)
    return log


def _test_accuracy(entry: Mapping[str, Any]) -> float | None:
    return entry.get("test", {}).get("accuracy")


def _at(point: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda entry: entry.get("agreement", {}).get(point)


def _curve(
    comparison: Comparison,
    row: Row,
    column: Column,
    log: Mapping[str, list[dict[str, Any]]],
    value: Callable[[Mapping[str, Any]], float | None],
) -> Curve | None:
    """The seeds' values at the evaluations that all of them have."""
    seeds = []
    for record in comparison.cell(row, column).values():
        points = {
            entry["step"]: (entry.get("epoch", entry["step"]), float(v))
            for entry in log[record.identity]
            if (v := value(entry)) is not None
        }
        if points:
            seeds.append(points)
    steps = sorted(set.intersection(*(set(points) for points in seeds))) if seeds else []
    if not steps:
        return None
    return (
        np.array([seeds[0][step][0] for step in steps], dtype=float),
        np.array([[points[step][1] for step in steps] for points in seeds]),
    )


def _look(comparison: Comparison, row: Row) -> tuple[str, str, Any]:
    """Colour, marker and line style of a method: the same in all pictures of a comparison."""
    i = comparison.rows.index(row)
    return COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], LINES[i % len(LINES)]


def _draw(axis: Axes, curve: Curve, look: tuple[str, str, Any], label: str) -> None:
    epochs, values = curve
    colour, marker, line = look
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


def _zoom(axis: Axes, curves: Mapping[Row, Curve]) -> list[str]:
    """Show the last quarter of the epochs and the values in it, bands included. Methods that end far below most others
    are left out, or the others could not be told apart; returns their labels."""
    if not curves:
        return []
    end = max(epochs[-1] for epochs, _ in curves.values())
    begin = min(0.75 * end, *(epochs[max(0, len(epochs) - 2)] for epochs, _ in curves.values()))
    low, high = [], []
    for epochs, values in curves.values():
        late = values[:, epochs >= begin]
        deviation = late.std(axis=0, ddof=1) if len(late) > 1 else 0
        low.append((late.mean(axis=0) - deviation).min())
        high.append((late.mean(axis=0) + deviation).max())
    final = {row: float(values[:, -1].mean()) for row, (_, values) in curves.items()}
    middle = float(np.median(list(final.values())))
    bottom = max(min(low), middle - FAR_BELOW * (max(high) - middle))
    room = max(0.06 * (max(high) - bottom), 0.05)
    beside = 0.01 * end
    axis.set_xlim(begin - beside, end + beside)
    axis.set_ylim(bottom - room, max(high) + room)
    return [row.label for row, value in final.items() if value < bottom - room]


@contextmanager
def _style() -> Iterator[None]:
    """Our own look, whatever the user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": 9,
                "axes.titlesize": 9,
                "axes.titleweight": "bold",
                "axes.labelsize": 9,
                "legend.fontsize": 9,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "grid.color": "#dddddd",
                "grid.linewidth": 0.6,
                "axes.axisbelow": True,
                "lines.linewidth": 1.5,
                "lines.markersize": 5,
                "axes.formatter.useoffset": False,
                "text.parse_math": False,
            }
        )
        yield


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


def _save(figure: Figure, file: str | Path) -> Path:
    """Write the PNG atomically, without a date or a version in it."""
    file = Path(file)
    with atomic(file) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return file
