"""A comparison as a table: means, deviations, paired differences, and everything a reader must know beside them.

`build` makes the table from records; `kdbench.results.layout` lays it out as grids of text that every renderer shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdbench.errors import UserError
from kdbench.published import PublishedCard
from kdbench.record import Metric, Record
from kdbench.results import statistics
from kdbench.results.across import Across, across
from kdbench.results.comparison import Column, Comparison, compare
from kdbench.results.copied import CopiedRow, copied_rows
from kdbench.results.notes import Interval, Note, across_notes, listed, metric_label, missing, notes_of, source_note

if TYPE_CHECKING:
    import pandas

CONFIDENCE = 0.95
ALPHA = 0.05
CAP = 1000


@dataclass(frozen=True)
class Difference:
    """To the baseline of the same column, over the seeds that both have, in percent points.

    `low`, `high`, `p`, `p_holm` are None with one pair of seeds or without spread. `seeds_needed`: pairs with which the
    seen difference would be found with 80 % power at Holm's first step, `ALPHA` over the number of the table's tests;
    None without a test, CAP + 1 for more than CAP.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    seeds_needed: int | None


@dataclass(frozen=True)
class Cell:
    """The seeds of one method in one column. `values`: accuracy in percent of each seed. `deviation`: None with one
    seed. `best`, `second`: by the mean as it is shown, in this column. `marks`: of the notes that belong to it.
    `agreement`: mean over the seeds. `also`: accuracies beside the one on the test part, mean and deviation.
    `seconds`: mean training time of a seed."""

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    n: int
    mean: float
    deviation: float | None
    best: bool
    second: bool
    difference: Difference | None
    steps: int
    epochs: float
    extra_epochs: float
    agreement: Mapping[str, float]
    also: Mapping[str, tuple[float, float | None]]
    seconds: float
    images_per_second: float
    marks: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A method; `cells` in the order of the table's columns, None where nothing is finished."""

    method: str
    label: str
    is_baseline: bool
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class TeacherRow:
    """A teacher's accuracy in percent in each column, None where it does not teach or was not measured."""

    name: str
    accuracies: tuple[float | None, ...]


@dataclass(frozen=True)
class Table:
    """`axes`: dotted paths that vary across the columns, none where there is one column. `copied`: published numbers,
    never ranked among ours. `across`: None with one column."""

    title: str
    metric: Metric
    metric_label: str
    baseline: str
    axes: tuple[str, ...]
    columns: tuple[Column, ...]
    teachers: tuple[TeacherRow, ...]
    rows: tuple[Row, ...]
    copied: tuple[CopiedRow, ...]
    across: Across | None
    agreement: tuple[str, ...]
    also: tuple[str, ...]
    notes: tuple[Note, ...]


def build(
    records: Iterable[Record],
    baseline: str | None = None,
    metric: Metric = "last",
    *,
    title: str | None = None,
    unfinished: Sequence[str | Path] = (),
    interval: Interval = "student",
    published: Mapping[str, PublishedCard] | None = None,
    columns: Iterable[str] = (),
) -> Table:
    """The table of all records: rows are methods, columns the combinations of everything else that varies.

    Args:
        records: in any order.
        baseline: key or label of the method to compare with; by default the recipe's.
        metric: "last" (after the last step), "best" (best test epoch, marked as optimistic) or "mean_last" (mean of the
            evaluations in the last 10 epochs).
        title: shown above; by default the names of teacher, student and data.
        unfinished: cells that began and have no record; a note says so.
        interval: of the differences: Student's, or a bootstrap's where every difference has 20 seeds.
        published: key -> card of published tables whose numbers are shown too, marked as copied.
        columns: names of numbers to show too, see `comparison.compare`.

    Raises:
        UserError: no finished record, an unknown baseline, cells that cannot stand in one table, too few seeds for a
            bootstrap, a cell without a mean over the last epochs, or a published table that has nothing to do with this
            one.
    """
    given = list(records)
    comparison = compare(given, baseline, columns)
    names = [str(folder) for folder in unfinished]
    names += sorted(f"{r.cell.label}, seed {r.cell.seed}" for r in given if r.status != "finished")
    marks: dict[str, str] = {}
    differences, tests = _differences(comparison, metric, interval)
    rows = _rows(comparison, metric, differences, marks)

    def mark(said: str) -> str:
        return marks.setdefault(said, _letter(len(marks)))

    copied = copied_rows(comparison, published or {}, metric_label(comparison.records, metric), mark)
    summed = across(comparison, metric)
    teachers = _teachers(comparison)
    points = tuple(sorted({point for r in comparison.records for point in r.result.metrics.get("agreement", {})}))
    notes = [*notes_of(comparison, rows, metric, tests, points, interval), *missing(comparison, names)]
    notes += across_notes(summed, comparison.baseline.label)
    if copied:
        notes.append(Note("†: numbers of other people, copied; never bold or underlined"))
        notes += [source_note(key, card) for key, card in (published or {}).items()]
    notes += [Note(said, letter) for said, letter in marks.items()]
    return Table(
        title if title is not None else _title(comparison),
        metric,
        metric_label(comparison.records, metric),
        comparison.baseline.label,
        tuple(axis.path for axis in comparison.axes),
        comparison.columns,
        teachers,
        rows,
        copied,
        summed,
        points,
        tuple(dict.fromkeys(name for record in comparison.records for name in comparison.also(record))),
        tuple(notes),
    )


def flat(table: Table) -> list[dict[str, Any]]:
    """One plain row for every filled cell of a table: the content of the CSV file and of `to_frame`. Copied numbers
    say where they are from in `copied_from`; nothing measured has that."""
    result: list[dict[str, Any]] = []
    across_by_label = {
        one.label: {
            "average_rank": _round(one.rank),
            "improvement_probability": _round(one.improvement.probability) if one.improvement else None,
            "improvement_low": _round(one.improvement.low) if one.improvement else None,
            "improvement_high": _round(one.improvement.high) if one.improvement else None,
        }
        for one in (table.across.standings if table.across else ())
    }
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells, strict=True):
            if cell is None:
                continue
            d = cell.difference
            teacher = next(
                (
                    (t.name, accuracy)
                    for t in table.teachers
                    if (accuracy := t.accuracies[table.columns.index(column)]) is not None
                ),
                (None, None),
            )
            result.append(
                {
                    "method": row.method,
                    "label": row.label,
                    "baseline": row.is_baseline,
                    **dict(column.key),
                    "metric": table.metric,
                    "n": cell.n,
                    "seeds": " ".join(map(str, cell.seeds)),
                    "mean": _round(cell.mean),
                    "deviation": _round(cell.deviation),
                    "rank": "best" if cell.best else "second" if cell.second else None,
                    "difference": _round(d.mean) if d else None,
                    "difference_low": _round(d.low) if d else None,
                    "difference_high": _round(d.high) if d else None,
                    "difference_n": d.n if d else None,
                    "p": _round(d.p, 9) if d else None,
                    "p_holm": _round(d.p_holm, 9) if d else None,
                    "seeds_needed": seeds_text(d.seeds_needed) if d else None,
                    "steps": cell.steps,
                    "epochs": _round(cell.epochs),
                    "extra_epochs": _round(cell.extra_epochs),
                    **{f"agreement.{point}": _round(cell.agreement.get(point)) for point in table.agreement},
                    **{f"also.{name}": _round(cell.also.get(name, (None,))[0]) for name in table.also},
                    "seconds": _round(cell.seconds, 2),
                    "images_per_second": _round(cell.images_per_second, 1),
                    "teacher": teacher[0],
                    "teacher_accuracy": teacher[1],
                    "marks": " ".join(cell.marks) or None,
                    **across_by_label.get(row.label, {}),
                }
            )
    for copied in table.copied:
        for column, entry in zip(table.columns, copied.cells, strict=True):
            if entry is not None:
                result.append(
                    {
                        "method": copied.method or "teacher",
                        "label": copied.label,
                        "baseline": False,
                        **dict(column.key),
                        "n": entry.runs,
                        "mean": entry.mean,
                        "deviation": entry.deviation,
                        "marks": " ".join(entry.marks),
                        "copied_from": copied.source,
                    }
                )
    return result


def to_frame(table: Table) -> pandas.DataFrame:
    """The table as a data frame, one row for every method and column; the notes are in `frame.attrs["notes"]`."""
    import pandas

    frame = pandas.DataFrame(flat(table))
    frame.attrs.update(
        title=table.title,
        metric=table.metric_label,
        baseline=table.baseline,
        notes=[f"{note.mark}: {note.text}" if note.mark else note.text for note in table.notes],
    )
    return frame


def seeds_text(needed: int | None) -> str | None:
    """Number of seeds as text, ">1000" above the cap."""
    return None if needed is None else f">{CAP}" if needed > CAP else str(needed)


def _rows(
    comparison: Comparison, metric: Metric, differences: Mapping[tuple[str, Column], Difference], marks: dict[str, str]
) -> tuple[Row, ...]:
    by_column = [
        [_cell(comparison, label.label, column, metric, differences, marks) for label in comparison.rows]
        for column in comparison.columns
    ]
    ranked = [_ranked(cells) for cells in by_column]
    return tuple(
        Row(row.method, row.label, row == comparison.baseline, tuple(cells[i] for cells in ranked))
        for i, row in enumerate(comparison.rows)
    )


def _differences(
    comparison: Comparison, metric: Metric, interval: Interval
) -> tuple[dict[tuple[str, Column], Difference], int]:
    """Every method's difference to the baseline of its column, p values after Holm over all tests of the table, and the
    number of these tests. A cell that stands in several columns beside the same baseline is one test."""
    found: dict[tuple[str, Column], statistics.Paired] = {}
    tests: dict[tuple[frozenset[str], frozenset[str]], float] = {}
    keys: dict[tuple[str, Column], tuple[frozenset[str], frozenset[str]]] = {}
    for column in comparison.columns:
        base = comparison.cell(comparison.baseline, column)
        for row in comparison.rows:
            own = comparison.cell(row, column)
            if row == comparison.baseline:
                continue
            values = {seed: r.accuracy(metric) for seed, r in own.items()}
            base_values = {seed: r.accuracy(metric) for seed, r in base.items()}
            pair = statistics.paired(values, base_values, CONFIDENCE)
            if pair is None:
                continue
            if interval == "bootstrap":
                pair = _bootstrapped(pair, values, base_values, row.label)
            place = (row.label, column)
            found[place] = pair
            if pair.p is not None:
                keys[place] = (
                    frozenset(r.identity for r in own.values()),
                    frozenset(r.identity for r in base.values()),
                )
                tests[keys[place]] = pair.p
    adjusted = dict(zip(tests, statistics.holm(list(tests.values())), strict=True))
    result = {}
    for place, pair in found.items():
        needed = None
        if pair.p is not None and pair.deviation is not None:
            alpha = ALPHA / len(tests)
            needed = statistics.seeds_needed(pair.mean, pair.deviation, alpha=alpha, cap=CAP) or CAP + 1
        result[place] = Difference(
            pair.n, pair.mean, pair.low, pair.high, pair.p, adjusted[keys[place]] if place in keys else None, needed
        )
    return result, len(tests)


def _bootstrapped(
    pair: statistics.Paired, values: Mapping[int, float], baseline: Mapping[int, float], label: str
) -> statistics.Paired:
    if pair.n < statistics.BOOTSTRAP_SEEDS:
        raise UserError(
            f"a bootstrap interval needs {statistics.BOOTSTRAP_SEEDS} seeds, and that of '{label}' would have {pair.n}",
            where="interval",
            hint="with fewer seeds it covers far less than it says: keep Student's interval, or run more seeds",
        )
    low, high = statistics.bootstrap(values, baseline, CONFIDENCE) or (None, None)
    return replace(pair, low=low, high=high)


def _cell(
    comparison: Comparison,
    label: str,
    column: Column,
    metric: Metric,
    differences: Mapping[tuple[str, Column], Difference],
    marks: dict[str, str],
) -> Cell | None:
    group = comparison.cells.get((label, column.key), {})
    if not group:
        return None
    records = list(group.values())
    summary = statistics.summarize([record.accuracy(metric) for record in records])
    budget = records[0].budget
    said = []
    expected = _seeds(comparison, column)
    if absent := [seed for seed in expected if seed not in group]:
        said.append(f"{summary.n} of {len(expected)} seeds: no finished cell for seed {listed(absent)}")
    if budget.extra_epochs:
        said.append(f"trained {budget.extra_epochs:g} epochs beyond the protocol's budget")
    if free := [axis.path for axis in comparison.axes if _is_free(comparison, group, label, axis.path)]:
        said.append(f"does not depend on {listed(free)}: the same runs in every such column")
    difference = differences.get((label, column))
    if difference is not None and difference.n < summary.n:
        said.append(f"difference over the {difference.n} of its seeds that {comparison.baseline.label} has too")
    if difference is not None and difference.n > 1 and difference.p is None:
        said.append("equal differences for all seeds: no spread, so no interval and no test")
    points = sorted({point for record in records for point in record.result.metrics.get("agreement", {})})
    return Cell(
        seeds=tuple(group),
        values=tuple(record.accuracy(metric) for record in records),
        n=summary.n,
        mean=summary.mean,
        deviation=summary.deviation,
        best=False,
        second=False,
        difference=difference,
        steps=budget.steps,
        epochs=budget.epochs,
        extra_epochs=budget.extra_epochs,
        agreement={
            point: _mean([shares[point] for r in records if point in (shares := r.result.metrics.get("agreement", {}))])
            for point in points
        },
        also=_also(comparison, records),
        seconds=_mean([_seconds(record) for record in records]),
        images_per_second=_mean([record.compute.images_per_second for record in records]),
        marks=tuple(marks.setdefault(text, _letter(len(marks))) for text in said),
    )


def _also(comparison: Comparison, records: Sequence[Record]) -> dict[str, tuple[float, float | None]]:
    values: dict[str, list[float]] = {}
    for record in records:
        for name, accuracy in comparison.also(record).items():
            values.setdefault(name, []).append(accuracy)
    return {name: (found.mean, found.deviation) for name, v in values.items() if (found := statistics.summarize(v))}


def _ranked(cells: list[Cell | None]) -> list[Cell | None]:
    """With the highest and second highest mean told, as shown with two decimals."""
    shown = sorted({round(cell.mean, 2) for cell in cells if cell is not None}, reverse=True)
    if sum(cell is not None for cell in cells) < 2:
        return cells
    return [
        None
        if cell is None
        else replace(
            cell, best=round(cell.mean, 2) == shown[0], second=len(shown) > 1 and round(cell.mean, 2) == shown[1]
        )
        for cell in cells
    ]


def _teachers(comparison: Comparison) -> tuple[TeacherRow, ...]:
    """Accuracies by teacher and column."""
    found: dict[str, dict[Column, float | None]] = {}
    for column in comparison.columns:
        for record in _in_column(comparison, column):
            if record.teacher is not None:
                known = found.setdefault(record.teacher.name, {})
                if known.get(column) is None:
                    known[column] = record.teacher.accuracy
    return tuple(
        TeacherRow(name, tuple(by_column.get(column) for column in comparison.columns))
        for name, by_column in found.items()
    )


def _title(comparison: Comparison) -> str:
    """The recipe's title where all records have the same; else teacher → student, data, without what varies across the
    columns."""
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
    if not group:
        return False
    identity = next(iter(group.values())).identity
    values = {
        dict(key)[path]
        for (row, key), other in comparison.cells.items()
        if row == label and any(record.identity == identity for record in other.values())
    }
    return len(values) > 1


def _in_column(comparison: Comparison, column: Column) -> list[Record]:
    return [record for row in comparison.rows for record in comparison.cell(row, column).values()]


def _seeds(comparison: Comparison, column: Column) -> list[int]:
    return sorted({record.cell.seed for record in _in_column(comparison, column)})


def _seconds(record: Record) -> float:
    compute = record.compute
    return compute.seconds if compute.training_seconds is None else compute.training_seconds


def _mean(values: Sequence[float]) -> float:
    return statistics.summarize(values).mean


def _round(value: float | None, digits: int = 6) -> float | None:
    return None if value is None else round(value, digits)


def _letter(index: int) -> str:
    """a … z, aa, ab …"""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return letters
