"""A comparison as a table: means, deviations, paired differences, and everything a reader must know beside them.

`build` makes the table from records; `kdbench.results.layout` lays it out as grids of text that every renderer shares.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from string import ascii_lowercase
from typing import get_args

from kdbench.cards import LossCard
from kdbench.errors import UserError, check_word, counted
from kdbench.published import PublishedCard
from kdbench.record import Metric, Record, failures
from kdbench.registry import Registry
from kdbench.results import statistics
from kdbench.results.across import across
from kdbench.results.comparison import Column, Comparison, Row, compare
from kdbench.results.contents import Entry, Measure, MethodRow, Note, Table, TeacherRow
from kdbench.results.copied import copied_rows
from kdbench.results.facts import listed, metric_label
from kdbench.results.notes import Interval, across_notes, as_notes, copied_notes, missing, notes_of
from kdbench.results.statistics import Paired, Summary

ALPHA = 0.05


class _Marks(dict[str, str]):
    """What is said of a cell -> the letter of its note (a … z, aa, ab …), given when it is first said."""

    def __missing__(self, said: str) -> str:
        tens, ones = divmod(len(self), 26)
        self[said] = (ascii_lowercase[tens - 1] if tens else "") + ascii_lowercase[ones]
        return self[said]


def build(
    records: Iterable[Record],
    baseline: str | None = None,
    metric: Metric = "last",
    *,
    title: str | None = None,
    unfinished: Sequence[str | Path] = (),
    interval: Interval = "student",
    published: Mapping[str, PublishedCard] | None = None,
    columns: str | Iterable[str] = (),
) -> Table:
    """The table of all records: rows are methods, columns the combinations of everything else that varies.

    Args:
        records: in any order.
        baseline: key or label of the method to compare with; by default the recipe's.
        metric: "last" (after the last step), "best" (best test epoch, marked as optimistic) or "mean_last" (mean of the
            evaluations in the last 10 epochs).
        title: shown above; by default the names of teacher, student and data.
        unfinished: folders of cells without a record; a note says so, and why they failed if their run's folder does.
        interval: of the differences: Student's, or a bootstrap's where every difference has 20 seeds.
        published: key -> card of published tables whose numbers are shown too, marked as copied.
        columns: names of numbers to show too, see `comparison.compare`.

    Raises:
        UserError: no finished record, an unknown baseline, cells that cannot stand in one table, too few seeds for a
            bootstrap, no mean over the last epochs, or a published table that has nothing to do with this one.
    """
    given = list(records)
    comparison = compare(given, baseline, columns)
    failed = sorted(f"{r.cell.label}, seed {r.cell.seed}" for r in given if r.status != "finished")
    marks = _Marks()
    differences, tests = _differences(comparison, metric, interval)
    rows = _rows(comparison, metric, differences, marks.__getitem__)
    label = metric_label(comparison.records, metric)
    copied = copied_rows(comparison, published or {}, label, marks.__getitem__)
    summed = across(comparison, metric)
    measures = _measures(comparison.records)
    said = [
        *notes_of(comparison, rows, metric, tests, measures, interval),
        *missing(comparison, failures(unfinished) | dict.fromkeys(failed)),
        *across_notes(summed, comparison.baseline.label),
        *copied_notes(copied, published or {}),
        *(Note(text, letter) for text, letter in marks.items()),
    ]
    return Table(
        title=title if title is not None else _title(comparison),
        metric=metric,
        metric_label=label,
        baseline=comparison.baseline.label,
        axes=tuple(axis.path for axis in comparison.axes),
        columns=comparison.columns,
        teachers=_teachers(comparison),
        rows=rows,
        copied=copied,
        across=summed,
        measures=measures,
        also=tuple(dict.fromkeys(name for record in comparison.records for name in comparison.also(record))),
        notes=as_notes(said),
    )


def _rows(
    comparison: Comparison, metric: Metric, differences: Mapping[tuple[str, Column], Paired], mark: Callable[[str], str]
) -> tuple[MethodRow, ...]:
    def entry(row: Row, column: Column) -> Entry | None:
        records = tuple(comparison.cell(row, column).values())
        if not records:
            return None
        values = tuple(record.accuracy(metric) for record in records)
        difference = differences.get((row.label, column))
        return Entry(
            records=records,
            values=values,
            **asdict(statistics.summarize(values)),
            difference=difference,
            numbers=_summaries(record.result.numbers() for record in records),
            also=_summaries(comparison.also(record) for record in records),
            seconds=statistics.summarize([_seconds(record) for record in records]).mean,
            images_per_second=statistics.summarize([record.compute.images_per_second for record in records]).mean,
            marks=tuple(map(mark, _remarks(comparison, row, column, difference))),
        )

    ranked = [_ranked([entry(row, column) for row in comparison.rows]) for column in comparison.columns]
    return tuple(
        MethodRow(row.method, row.label, row == comparison.baseline, tuple(cells[i] for cells in ranked))
        for i, row in enumerate(comparison.rows)
    )


def _differences(
    comparison: Comparison, metric: Metric, interval: Interval
) -> tuple[dict[tuple[str, Column], Paired], int]:
    """Every method's difference to the baseline of its column, p values after Holm over all tests of the table, and the
    number of these tests. A cell that stands in several columns beside the same baseline is one test."""
    check_word(metric, get_args(Metric), "metric")
    check_word(interval, get_args(Interval), "interval")
    found: dict[tuple[str, Column], Paired] = {}
    tests: dict[tuple[frozenset[str], frozenset[str]], float] = {}
    keys: dict[tuple[str, Column], tuple[frozenset[str], frozenset[str]]] = {}
    for column, row in itertools.product(comparison.columns, comparison.rows):
        values, base = (comparison.accuracies(one, column, metric) for one in (row, comparison.baseline))
        if row == comparison.baseline or (pair := statistics.paired(values, base)) is None:
            continue
        if interval == "bootstrap":
            pair = _bootstrapped(pair, values, base, row.label)
        place = (row.label, column)
        found[place] = pair
        if pair.p is not None:
            own, other = (comparison.cell(one, column).values() for one in (row, comparison.baseline))
            keys[place] = frozenset(r.identity for r in own), frozenset(r.identity for r in other)
            tests[keys[place]] = pair.p
    adjusted = dict(zip(tests, statistics.holm(list(tests.values())), strict=True))
    for place, key in keys.items():
        pair = found[place]
        needed = None
        if pair.n >= statistics.FEWEST_TO_PLAN and pair.deviation is not None:
            needed = statistics.seeds_needed(pair.mean, pair.deviation, ALPHA / len(tests))
        found[place] = replace(pair, p_holm=adjusted[key], seeds_needed=needed)
    return found, len(tests)


def _bootstrapped(pair: Paired, values: Mapping[int, float], baseline: Mapping[int, float], label: str) -> Paired:
    if pair.n < statistics.BOOTSTRAP_SEEDS:
        raise UserError(
            f"a bootstrap interval needs {statistics.BOOTSTRAP_SEEDS} seeds, and that of '{label}' would have {pair.n}",
            where="interval",
            hint="with fewer seeds it covers far less than it says: keep Student's interval, or run more seeds",
        )
    low, high = statistics.bootstrap(values, baseline) or (None, None)
    return replace(pair, low=low, high=high)


def _remarks(comparison: Comparison, row: Row, column: Column, difference: Paired | None) -> list[str]:
    """What must be said of one cell."""
    group = comparison.cell(row, column)
    said = []
    expected = sorted({record.cell.seed for record in comparison.of_column(column)})
    if absent := [seed for seed in expected if seed not in group]:
        said.append(f"{len(group)} of {counted(len(expected), 'seed')}: no finished cell for seed {listed(absent)}")
    if extra := next(iter(group.values())).budget.extra_epochs:
        said.append(f"trained {counted(extra, 'epoch', 'g')} beyond the protocol's budget")
    if free := [axis.path for axis in comparison.axes if _is_free(comparison, group, row.label, axis.path)]:
        said.append(f"does not depend on {listed(free)}: the same numbers in all these columns")
    shown = [_beside_accuracy(comparison, record) for record in group.values()]
    if partly := sorted(shown[0].union(*shown) - shown[0].intersection(*shown)):
        said.append(f"over the seeds whose records have them, not over all: {listed(partly, 6)}")
    if difference is not None and difference.n < len(group):
        said.append(
            f"the difference is over the {counted(difference.n, 'seed')} that {comparison.baseline.label} has too"
        )
    if difference is not None and difference.n > 1 and difference.p is None:
        said.append("equal differences for all seeds: no spread, so no interval and no test")
    return said


def _beside_accuracy(comparison: Comparison, record: Record) -> set[str]:
    """Names of the numbers that are shown beside a record's accuracy."""
    metrics = record.result.metrics
    return {*comparison.also(record), *(name for name in record.result.numbers() if name.partition(".")[0] in metrics)}


def _measures(records: Iterable[Record]) -> tuple[Measure, ...]:
    """All metrics that the records hold, by name."""
    points: dict[str, set[str]] = {}
    shares = _shipped_shares()
    for record in records:
        for metric, values in record.result.metrics.items():
            points.setdefault(metric, set()).update(values)
        for term in record.resolved.method.terms if record.resolved is not None else ():
            shares = shares | term.loss.shares
    return tuple(Measure(metric, tuple(sorted(points[metric])), shares.get(metric)) for metric in sorted(points))


@cache
def _shipped_shares() -> dict[str, str]:
    """Which metrics of the shipped loss cards are shares, and of what: records of earlier versions do not say."""
    registry = Registry()
    cards: list[LossCard] = [registry.card("losses", name) for name in registry.names("losses")]
    return {metric: of for card in cards for metric, of in card.shares.items()}


def _summaries(numbers: Iterable[Mapping[str, float]]) -> dict[str, Summary]:
    """Of each number, over the records that have it."""
    values: dict[str, list[float]] = {}
    for name, value in (item for own in numbers for item in own.items()):
        values.setdefault(name, []).append(value)
    return {name: statistics.summarize(found) for name, found in values.items()}


def _ranked(cells: list[Entry | None]) -> list[Entry | None]:
    """With the highest and second highest mean told, as shown with two decimals."""
    means = [None if cell is None else round(cell.mean, 2) for cell in cells]
    first, second = [*sorted({mean for mean in means if mean is not None}, reverse=True), None, None][:2]
    if sum(mean is not None for mean in means) < 2:
        return cells
    return [cell and replace(cell, best=m == first, second=m == second) for cell, m in zip(cells, means, strict=True)]


def _teachers(comparison: Comparison) -> tuple[TeacherRow, ...]:
    """Accuracies by teacher and column."""
    seen = [(column, record.teacher) for _, column, record in comparison.places() if record.teacher is not None]
    measured = {(one.name, column): one.accuracy for column, one in reversed(seen) if one.accuracy is not None}
    names = dict.fromkeys(one.name for _, one in seen)
    return tuple(TeacherRow(name, tuple(measured.get((name, c)) for c in comparison.columns)) for name in names)


def _title(comparison: Comparison) -> str:
    """The recipe's title where all records have the same.

    Else teacher → student, data, without what varies across the columns.
    """
    titles = {record.cell.title for record in comparison.records}
    if len(titles) == 1 and "" not in titles:
        return titles.pop()
    axes = {axis.path for axis in comparison.axes}

    def names(path: str, values: Iterable[str]) -> str:
        return "" if path in axes else " and ".join(dict.fromkeys(values))

    teacher = names("teacher", [r.teacher.name for r in comparison.records if r.teacher is not None])
    student = names("student", [r.cell.student for r in comparison.records])
    data = names("data", [r.data.name for r in comparison.records])
    target = names("target", [r.target.name for r in comparison.records if r.target is not None])
    data = " → ".join(part for part in (data, target) if part)
    return ", ".join(part for part in (" → ".join(part for part in (teacher, student) if part), data) if part)


def _is_free(comparison: Comparison, group: Mapping[int, Record], label: str, path: str) -> bool:
    """Whether an axis means nothing to a cell: its records stand in several of the axis' values."""
    identity = next(iter(group.values())).identity
    values = {
        dict(key)[path]
        for (row, key), other in comparison.cells.items()
        if row == label and any(record.identity == identity for record in other.values())
    }
    return len(values) > 1


def _seconds(record: Record) -> float:
    compute = record.compute
    return compute.seconds if compute.training_seconds is None else compute.training_seconds
