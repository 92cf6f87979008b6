"""A comparison as a table: means, deviations, paired differences, and everything a reader must know beside them.

`build` makes the table from records; `kdbench.results.layout` lays it out as grids of text that every renderer shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kdbench.cards import PublishedCard
from kdbench.errors import UserError
from kdbench.results import statistics
from kdbench.results.across import Across, across
from kdbench.results.comparison import Column, Comparison, compare
from kdbench.results.copied import CopiedRow, copied_rows
from kdbench.results.record import Metric, Record

if TYPE_CHECKING:
    import pandas

CONFIDENCE = 0.95
CAP = 1000

Interval = Literal["student", "bootstrap"]


@dataclass(frozen=True)
class Difference:
    """To the baseline of the same column, over the seeds that both have, in percent points.

    `low`, `high`, `p`, `p_holm` are None with one pair of seeds or without spread. `seeds_needed`: pairs with which the
    seen difference would be found with 80 % power; None without a test, CAP + 1 for more than CAP.
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
    `agreement`: mean over the seeds. `seconds`: mean training time of a seed."""

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
class Note:
    """A sentence below the table. `mark`: letter by which cells refer to it. `warning`: not to be missed."""

    text: str
    mark: str | None = None
    warning: bool = False


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
) -> Table:
    """The table of all records: rows are methods, columns the combinations of everything else that varies.

    Args:
        records: in any order.
        baseline: key or label of the method to compare with; by default the recipe's.
        metric: "last" (after the last step), "best" (best test epoch, marked as optimistic) or "mean_last" (mean of the
            last evaluations).
        title: shown above; by default the names of teacher, student and data.
        unfinished: cells that began and have no record; a note says so.
        interval: of the differences: Student's, or a bootstrap's where every difference has 20 seeds.
        published: key -> card of published tables whose numbers are shown too, marked as copied.

    Raises:
        UserError: no finished record, an unknown baseline, cells that cannot stand in one table, too few seeds for a
            bootstrap, or a published table that has nothing to do with this one.
    """
    given = list(records)
    comparison = compare(given, baseline)
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
    points = tuple(sorted({point for record in comparison.records for point in record.result.agreement}))
    notes = [*_notes(comparison, rows, metric, tests, points, interval), *_missing(comparison, names)]
    notes += _across_notes(summed, comparison.baseline.label)
    if copied:
        notes.append(Note("†: numbers of other people, copied; never bold or underlined"))
        notes += [Note(_said_source(key, card)) for key, card in (published or {}).items()]
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


def metric_label(records: Sequence[Record], metric: Metric) -> str:
    """What the accuracies are, in words."""
    if metric == "last":
        return "last epoch"
    if metric == "best":
        return "best test epoch (optimistic)"
    counts = sorted({record.result.test.mean_last_of for record in records})
    return f"mean of the last {_range(counts)} evaluations"


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
            needed = statistics.seeds_needed(pair.mean, pair.deviation, cap=CAP) or CAP + 1
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


def _said_source(key: str, card: PublishedCard) -> str:
    notes = [" ".join(note.split()).rstrip(".") for note in (card.note, card.protocol.note) if note]
    return ". ".join([f"{key}: {card.title}; {card.source}", *(note[:1].upper() + note[1:] for note in notes)])


def _across_notes(found: Across | None, baseline: str) -> list[Note]:
    if found is None:
        return []
    notes = []
    if found.columns:
        distance = (
            f"no critical distance: {found.why_no_distance}"
            if found.critical_distance is None
            else f"critical distance {found.critical_distance:.2f}: methods whose average ranks differ by less cannot "
            "be told apart at 5 % over all pairs of methods (Nemenyi), with the columns as independent draws"
        )
        notes.append(
            Note(f"Average rank over {found.columns} columns, 1 for the highest mean, ties sharing theirs; {distance}")
        )
    notes.append(
        Note(
            f"Probability of improvement: that a run of a method beats a run of {baseline} in the same column, "
            "averaged over the columns that both have, and for these columns only; 95 % interval from leaving out one "
            "seed at a time in all of them, where the runs allow one"
        )
    )
    return notes


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
    if missing := [seed for seed in expected if seed not in group]:
        said.append(f"{summary.n} of {len(expected)} seeds: no finished cell for seed {_list(missing)}")
    if budget.extra_epochs:
        said.append(f"trained {budget.extra_epochs:g} epochs beyond the protocol's budget")
    if free := [axis.path for axis in comparison.axes if _is_free(comparison, group, label, axis.path)]:
        said.append(f"does not depend on {_list(free)}: the same runs in every such column")
    difference = differences.get((label, column))
    if difference is not None and difference.n < summary.n:
        said.append(f"difference over the {difference.n} of its seeds that {comparison.baseline.label} has too")
    if difference is not None and difference.n > 1 and difference.p is None:
        said.append("equal differences for all seeds: no spread, so no interval and no test")
    points = sorted({point for record in records for point in record.result.agreement})
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
            point: _mean([r.result.agreement[point] for r in records if point in r.result.agreement])
            for point in points
        },
        seconds=_mean([_seconds(record) for record in records]),
        images_per_second=_mean([record.compute.images_per_second for record in records]),
        marks=tuple(marks.setdefault(text, _letter(len(marks))) for text in said),
    )


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
    return ", ".join(part for part in (" → ".join(part for part in (teacher, student) if part), data) if part)


def _notes(
    comparison: Comparison, rows: Sequence[Row], metric: Metric, tests: int, points: Sequence[str], interval: Interval
) -> list[Note]:
    records = comparison.records
    cells = [cell for row in rows for cell in row.cells if cell is not None]
    counts = sorted({cell.n for cell in cells})
    label = metric_label(records, metric)
    seeds = sorted({seed for cell in cells for seed in cell.seeds})
    spread = (
        "one seed, so no deviation, no interval and no test"
        if counts == [1]
        else (f"mean ± sample deviation, n = {_range(counts)} seeds ({_list(seeds)})")
    )
    notes = [Note(f"Test accuracy in %, {label}: {spread}", warning=metric == "best")]
    differences = [cell.difference for cell in cells if cell.difference is not None]
    if differences:
        how = (
            ""
            if not tests
            else (
                f"; {_INTERVALS[interval]} and two-sided paired t test, p after Holm over the {tests} "
                f"{'comparison' if tests == 1 else 'comparisons'} of this table; seeds needed: for 80 % power in one "
                "such test, were the seen difference and its deviation the true ones"
            )
        )
        notes.append(
            Note(
                f"Differences are to {comparison.baseline.label}, paired by seed (same data order, "
                f"augmentation and initial student){how}"
            )
        )
    if len(rows) > 1:
        notes.append(Note("Bold: highest mean, underlined: second; neither says that a difference is real"))
    notes += [note for attribute in _ATTRIBUTES if (note := _attribute(comparison, *attribute)) is not None]
    if points:
        notes.append(
            Note(
                "Agreement: share of equal activation signs of student (through its connector) and teacher, "
                "after the last epoch"
            )
        )
    notes.append(
        Note("Seconds: mean training time of one seed; cells that train side by side share their teacher's passes")
    )
    notes += [Note(text[:1].upper() + text[1:], warning=True) for text in comparison.notes]
    return notes


_INTERVALS: dict[Interval, str] = {
    "student": "Student's 95 % interval",
    "bootstrap": f"bootstrap-t 95 % interval ({statistics.RESAMPLES:,} draws of the seeds)",
}


def _missing(comparison: Comparison, unfinished: Sequence[str]) -> list[Note]:
    notes = []
    empty = [
        f"{row.label} ({column.label})" if comparison.axes else row.label
        for row in comparison.rows
        for column in comparison.columns
        if not comparison.cell(row, column)
    ]
    if empty:
        notes.append(Note(f"–: no finished cell: {_list(empty)}", warning=True))
    if unfinished:
        notes.append(Note(f"Not finished and not in the table: {_list(unfinished, 6)}", warning=True))
    return notes


def _said_protocol(record: Record) -> str:
    budget = record.budget
    return f"{record.cell.protocol}, {budget.epochs - budget.extra_epochs:g} epochs"


def _said_teacher(record: Record) -> str | None:
    teacher = record.teacher
    if teacher is None:
        return None
    accuracy = "accuracy not measured" if teacher.accuracy is None else f"{teacher.accuracy:.2f} %"
    return f"{teacher.name}, {accuracy}, sha256 {teacher.sha256[:12]}"


def _said_data(record: Record) -> str:
    data = record.data
    validation = f"{data.validation:,} validation, " if data.validation else ""
    return (
        f"{data.name}, {data.train:,} training, {validation}{data.test:,} test images, "
        f"fingerprint {data.fingerprint[:12]}"
    )


def _said_machine(record: Record) -> str:
    compute = record.compute
    if compute.device != "cpu":
        return compute.device_name
    return f"{compute.device_name}, {compute.threads} {'thread' if compute.threads == 1 else 'threads'}"


def _said_version(record: Record) -> str:
    git = record.git
    commit = "" if git is None else f", commit {git.commit[:12]}{' with uncommitted changes' if git.dirty else ''}"
    return f"{record.kdbench}{commit}, torch {record.compute.torch}"


# What must be the same within a column for its cells to be comparable, said in any case and warned of where it is not.
_ATTRIBUTES: tuple[tuple[str, Callable[[Record], str | None]], ...] = (
    ("Protocol", _said_protocol),
    ("Teacher", _said_teacher),
    ("Data", _said_data),
    ("Machine", _said_machine),
    ("Precision", lambda record: record.compute.precision),
    ("kdbench", _said_version),
)


def _attribute(comparison: Comparison, name: str, say: Callable[[Record], str | None]) -> Note | None:
    """One attribute of all records: its value, or its values with the columns, or (as a warning) the rows, that have
    them."""
    by_value: dict[str, None] = {}
    columns: dict[str, list[str]] = {}
    rows: dict[str, list[str]] = {}
    mixed = False
    for column in comparison.columns:
        here = set()
        for row in comparison.rows:
            for record in comparison.cell(row, column).values():
                if (value := say(record)) is not None:
                    here.add(value)
                    by_value[value] = None
                    rows.setdefault(value, []).append(row.label)
        mixed |= len(here) > 1
        for value in here:
            columns.setdefault(value, []).append(column.label)
    values = list(by_value)
    if not values:
        return None
    if len(values) == 1:
        return Note(f"{name}: {values[0]}" if name != "kdbench" else f"kdbench {values[0]}")
    where = rows if mixed else columns
    shown = "; ".join(f"{value} ({_list(list(dict.fromkeys(where[value])), 6)})" for value in values)
    if mixed:
        return Note(f"Mixed within the table, so differences may come from it. {name}: {shown}", warning=True)
    return Note(f"{name}: {shown}")


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


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _list(values: Sequence[Any], most: int = 12) -> str:
    shown = [str(value) for value in values[:most]]
    return ", ".join(shown) + (f" and {len(values) - most} more" if len(values) > most else "")


def _letter(index: int) -> str:
    """a … z, aa, ab …"""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return letters
