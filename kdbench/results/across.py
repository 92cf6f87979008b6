"""A comparison of several columns summed up: average ranks, probability of improvement, and when these may be read."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdbench.record import Metric
from kdbench.results.comparison import Column, Comparison, Row
from kdbench.results.ranking import Improvement, average_ranks, critical_distance, probability_of_improvement
from kdbench.results.statistics import summarize


@dataclass(frozen=True)
class Standing:
    """A method across the columns.

    `rank`: 1 is best; None where it was not ranked. `improvement`: over the baseline; None for the baseline itself and
    where the two have no column in common.
    """

    label: str
    rank: float | None
    improvement: Improvement | None


@dataclass(frozen=True)
class Across:
    """`columns`: how many the ranks are over, 0 for no ranks.

    `critical_distance`: None where `why_no_distance` says why. `shared`: what some of these columns have in common
    although the distance takes them for independent.
    """

    standings: tuple[Standing, ...]
    columns: int
    critical_distance: float | None
    why_no_distance: str | None
    shared: tuple[str, ...]


def across(comparison: Comparison, metric: Metric) -> Across | None:
    """Every method over all columns; None with one column or one method."""
    rows, columns = comparison.rows, comparison.columns
    if len(columns) < 2 or len(rows) < 2:
        return None
    full = [column for column in columns if all(comparison.cell(row, column) for row in rows)]
    # Ranks in one column would say what its means say.
    full = full if len(full) > 1 else []
    # By the means as they are shown, so that a reader can rank them again.
    ranked = [[_shown_mean(comparison, row, column, metric) for row in rows] for column in full]
    ranks: list[float] | list[None] = average_ranks(ranked) if full else [None] * len(rows)
    drawn = [_drawn_with(comparison, column) for column in full]
    why = _why_no_distance(len(rows), drawn)
    standings = tuple(
        Standing(row.label, rank, _improvement(comparison, row, metric)) for row, rank in zip(rows, ranks, strict=True)
    )
    if all(one.rank is None and one.improvement is None for one in standings):
        return None
    return Across(
        standings,
        len(full),
        critical_distance(len(rows), len(full)) if why is None else None,
        why,
        tuple(part for part in _PARTS if any(a[part] & b[part] for a, b in itertools.combinations(drawn, 2))),
    )


def _shown_mean(comparison: Comparison, row: Row, column: Column, metric: Metric) -> float:
    return round(summarize([*comparison.accuracies(row, column, metric).values()]).mean, 2)


def _improvement(comparison: Comparison, row: Row, metric: Metric) -> Improvement | None:
    if row == comparison.baseline:
        return None
    return probability_of_improvement(
        [
            (comparison.accuracies(row, column, metric), comparison.accuracies(comparison.baseline, column, metric))
            for column in comparison.columns
        ]
    )


# What columns that are taken for independent draws may have in common all the same.
_PARTS = ("teacher", "data", "seeds")

# What of a column -> which.
Drawn = Mapping[str, frozenset[str | int | None]]


def _drawn_with(comparison: Comparison, column: Column) -> Drawn:
    """Students, teachers (None where there are none), data sets, seeds and cells of a column."""
    records = comparison.of_column(column)
    return {
        "student": frozenset(record.cell.student for record in records),
        "teacher": frozenset(r.cell.teacher for r in records if r.cell.teacher is not None) or frozenset([None]),
        "data": frozenset(record.data.name for record in records),
        "seeds": frozenset(record.cell.seed for record in records),
        "cells": frozenset(record.identity for record in records),
    }


def _why_no_distance(methods: int, drawn: Sequence[Drawn]) -> str | None:
    """What keeps Nemenyi's distance from holding: it takes the columns for independent draws of pairs.

    Args:
        drawn: what `_drawn_with` tells of each column.
    """
    if len(drawn) < 2:
        return "fewer than two columns have every method"
    if methods < 3:
        return "two methods have a paired test, and the distance is not kept with so few"
    if any(a["cells"] & b["cells"] for a, b in itertools.combinations(drawn, 2)):
        return "some numbers stand in several columns"
    if len({(one["student"], one["teacher"], one["data"]) for one in drawn}) < len(drawn):
        return "the columns are not all different pairs of student, teacher and data"
    if all(frozenset.intersection(*(one[part] for one in drawn)) for part in _PARTS):
        return "all columns have teacher, data and seeds in common, so they are not independent of each other"
    return None
