"""Charts of accuracy against cost: training time, and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kdbench.results.comparison import Comparison
from kdbench.results.contents import Table
from kdbench.results.plots import Look, Panel, look_of, with_spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A cost is drawn on a logarithmic axis from this ratio of its largest to its smallest value.
LOG_FROM = 20.0
TEACHER = Look("#595959", "D", "-")


class Point(NamedTuple):
    """A method's accuracy in percent, with its deviation where there is one, against a cost `x` above 0."""

    look: Look
    label: str
    x: float
    y: float
    deviation: float | None


def cost_panels(table: Table, comparison: Comparison) -> list[Panel]:
    """Accuracy against training time and against parameters, for each data set, since accuracies of two data sets have
    no common axis."""
    times: dict[str, list[Point]] = {}
    sizes: dict[str, list[Point]] = {}
    for j, column in enumerate(comparison.columns):
        for i, row in enumerate(comparison.rows):
            if (cell := table.rows[i].cells[j]) is None:
                continue
            record = next(iter(comparison.cell(row, column).values()))
            # Of the set that it is tested on.
            data = (record.target or record.data).name
            style, parameters = look_of(comparison, row), record.models.student.parameters
            if cell.seconds > 0:
                times.setdefault(data, []).append(Point(style, row.label, cell.seconds, cell.mean, cell.deviation))
            if parameters:
                sizes.setdefault(data, []).append(Point(style, row.label, parameters, cell.mean, cell.deviation))
            teacher, network = record.teacher, record.models.teacher
            if teacher is not None and teacher.accuracy is not None and network is not None and network.parameters:
                large = Point(TEACHER, "teacher", network.parameters, teacher.accuracy, None)
                sizes.setdefault(data, []).append(large)
    several = len(times.keys() | sizes.keys()) > 1
    panels = []
    for data in dict.fromkeys([*times, *sizes]):
        name = f"{data}: " if several else ""
        if data in times:
            panels.append(_cost_panel(f"{name}training time of one seed", "seconds", times[data]))
        if data in sizes:
            panels.append(_cost_panel(f"{name}parameters", "parameters", list(dict.fromkeys(sizes[data]))))
    return panels


def _cost_panel(title: str, label: str, points: Sequence[Point]) -> Panel:
    def draw(axis: Axes) -> None:
        from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

        known: set[str] = set()
        for point in points:
            # Once in the legend, though a method has a point for each column.
            name = "" if point.label in known else point.label
            known.add(point.label)
            style: dict[str, Any] = point.look.marking | {"markersize": point.look.marking["markersize"] + 2}
            edge: dict[str, Any] = {
                "markeredgecolor": "white",
                "markeredgewidth": 0.5,
                "elinewidth": 1.0,
                "linestyle": "",
            }
            axis.errorbar(point.x, point.y, point.deviation, label=name, **style, **edge)
        costs = [point.x for point in points]
        scale = ""
        if max(costs) / min(costs) >= LOG_FROM:
            scale = " (logarithmic)"
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        else:
            axis.margins(x=0.08)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=label == "parameters"))
        if label == "parameters":
            axis.xaxis.set_major_formatter(EngFormatter())
        axis.set_xlabel(label + scale)
        axis.set_ylabel(with_spread("test accuracy (%)", any(point.deviation is not None for point in points)))

    return Panel(title, draw)
