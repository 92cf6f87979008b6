"""Curves of a comparison over the epochs, and the part of them that is worth enlarging."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdbench.files import METRICS
from kdbench.record import metrics
from kdbench.results.comparison import Column, Comparison, Row

# A method this many times farther below the median than the best is above it is left out of the enlarged part.
FAR_BELOW = 3.0

# Epochs and, for each seed, the values at them.
Curve = tuple[np.ndarray, np.ndarray]
Logs = Mapping[str, list[dict[str, Any]]]
Value = Callable[[Mapping[str, Any]], float | None]


@dataclass(frozen=True)
class Excerpt:
    """A part of the curves: limits of epochs and of values, and the labels of methods that end below or before it."""

    epochs: tuple[float, float]
    values: tuple[float, float]
    below: tuple[str, ...]
    before: tuple[str, ...]

    @property
    def title(self) -> str:
        """What it is, and in parentheses who is not in it."""
        absent = {"below": self.below, "ended before": self.before}
        said = "; ".join(f"{how}: {', '.join(labels)}" for how, labels in absent.items() if labels)
        return f"last quarter\n({said})" if said else "last quarter"


def logs(comparison: Comparison, required: bool = True) -> dict[str, list[dict[str, Any]]]:
    """Identity of each record -> its evaluations.

    Without `required`, records whose metrics are not beside them are left out.

    Raises:
        UserError: damaged metrics; absent ones where they are required.
    """
    log = {}
    for record in comparison.records:
        if not required and (record.folder is None or not (record.folder / METRICS).is_file()):
            continue
        log[record.identity] = metrics(record.read_from)
    return log


def accuracy_of(entry: Mapping[str, Any]) -> float | None:
    """Of one evaluation, in percent."""
    return entry.get("test", {}).get("accuracy")


def metric_at(metric: str, point: str) -> Value:
    """Of one evaluation: a metric's value at a hook point."""
    return lambda entry: entry.get("metrics", {}).get(metric, {}).get(point)


def curves_of(comparison: Comparison, column: Column, log: Logs, value: Value) -> dict[Row, Curve]:
    """Of each method that has any: its seeds' values at the evaluations that all of them have."""
    curves = {}
    for row in comparison.rows:
        seeds = []
        for record in comparison.cell(row, column).values():
            points = {
                entry["step"]: (entry.get("epoch", entry["step"]), float(v))
                for entry in log.get(record.identity, ())
                if (v := value(entry)) is not None
            }
            if points:
                seeds.append(points)
        if steps := sorted(set.intersection(*(set(points) for points in seeds))) if seeds else []:
            epochs = np.array([seeds[0][step][0] for step in steps], dtype=float)
            curves[row] = (epochs, np.array([[points[step][1] for step in steps] for points in seeds]))
    return curves


def last_quarter(curves: Mapping[Row, Curve]) -> Excerpt | None:
    """The last quarter of the epochs with the values in it, bands of ± one deviation included.

    Methods that end far below most others are left out, or the others could not be told apart, and so are methods that
    trained for a shorter time. None without curves, and where one of the others has fewer than two evaluations in that
    quarter.
    """
    if not curves:
        return None
    end = max(epochs[-1] for epochs, _ in curves.values())
    # Evaluations lie on whole steps: one meant for three quarters may lie a little before.
    begin = 0.74 * end
    before = tuple(row.label for row, (epochs, _) in curves.items() if epochs[-1] < begin)
    curves = {row: curve for row, curve in curves.items() if row.label not in before}
    if any((epochs >= begin).sum() < 2 for epochs, _ in curves.values()):
        return None
    low, high = [], []
    for epochs, values in curves.values():
        late = values[:, epochs >= begin]
        deviation = late.std(axis=0, ddof=1) if len(late) > 1 else 0
        low.append((late.mean(axis=0) - deviation).min())
        high.append((late.mean(axis=0) + deviation).max())
    final = {row: float(values[:, -1].mean()) for row, (_, values) in curves.items()}
    middle = float(np.median(list(final.values())))
    # One curve has none to be told from.
    bottom = max(min(low), middle - FAR_BELOW * (max(high) - middle)) if len(final) > 1 else min(low)
    room = max(0.06 * (max(high) - bottom), 0.05)
    beside = 0.01 * end
    return Excerpt(
        (float(begin - beside), float(end + beside)),
        (float(bottom - room), float(max(high) + room)),
        tuple(row.label for row, value in final.items() if value < bottom - room),
        before,
    )
