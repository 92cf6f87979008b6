"""The sentences below a table: what its numbers are, and what a reader must know before comparing them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kdbench.published import PublishedCard
from kdbench.recipe.remarks import replaced_normalization
from kdbench.record import LAST_EPOCHS, Metric, Record
from kdbench.results import statistics, training
from kdbench.results.across import Across
from kdbench.results.comparison import Comparison
from kdbench.results.sharing import unlike_baseline

if TYPE_CHECKING:
    from kdbench.results.tables import Row

Interval = Literal["student", "bootstrap"]
# Percentage points by which a plain student must be better than a teacher to be told.
_BELOW = 1.0


@dataclass(frozen=True)
class Note:
    """A sentence below the table. `mark`: letter by which cells refer to it. `warning`: not to be missed."""

    text: str
    mark: str | None = None
    warning: bool = False


def metric_label(records: Sequence[Record], metric: Metric) -> str:
    """What the accuracies are, in words."""
    if metric == "last":
        return "last epoch"
    if metric == "best":
        return "best test epoch (optimistic)"
    counts = sorted({record.tail.evaluations for record in records})
    return f"mean of {ranged(counts)} evaluations in the last {LAST_EPOCHS} epochs"


def notes_of(
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
        else (f"mean ± sample deviation, n = {ranged(counts)} seeds ({listed(seeds)})")
    )
    notes = [Note(f"Test accuracy in %, {label}: {spread}", warning=metric == "best")]
    differences = [cell.difference for cell in cells if cell.difference is not None]
    if differences:
        level = "5 %" if tests == 1 else f"5 % / {tests}, Holm's first step"
        how = (
            ""
            if not tests
            else (
                f"; {_INTERVALS[interval]} and two-sided paired t test, p after Holm over the {tests} "
                f"{'comparison' if tests == 1 else 'comparisons'} of this table; seeds needed: for 80 % power at "
                f"{level}, were the seen difference and its deviation the true ones"
            )
        )
        notes.append(Note(f"Differences are to {comparison.baseline.label}, {_paired(comparison, rows)}{how}"))
    if len(rows) > 1:
        notes.append(Note("Bold: highest mean, underlined: second; neither says that a difference is real"))
    for name, say in _ATTRIBUTES:
        notes += [note] if (note := _attribute(comparison, name, say)) is not None else []
        notes += [note] if name == "Protocol" and (note := _training(comparison)) is not None else []
    notes += _normalizations(comparison) + _teachers_in_doubt(comparison)
    if any(record.result.source is not None for record in comparison.records):
        notes.append(Note("The test accuracy is the target domain's, no label of which was used in training"))
    if any(record.result.by_classes for record in comparison.records):
        notes.append(Note("Accuracies on groups of classes are of test images of these, all classes competing"))
    if points:
        notes.append(
            Note(
                "Agreement: share of equal activation signs of student (through its connector) and teacher, "
                f"after the last epoch; {_reference(records, points)}"
            )
        )
    notes.append(
        Note("Seconds: mean training time of one seed; cells that train side by side share their teacher's passes")
    )
    notes += [Note(text[:1].upper() + text[1:], warning=True) for text in comparison.notes]
    return notes


def _paired(comparison: Comparison, rows: Sequence[Row]) -> str:
    """What pairing by seed means here: what runs of one seed have in common, and in which rows they do not."""
    compared = {
        row.label for row in rows if any(cell is not None and cell.difference is not None for cell in row.cells)
    }
    by_exceptions: dict[tuple[str, ...], list[str]] = {}
    for what, labels in unlike_baseline(comparison).items():
        by_exceptions.setdefault(tuple(labels), []).append(what)
    said = [
        f"same {_joined(common)}" + (f" except in {listed([repr(label) for label in labels], 6)}" if labels else "")
        for labels, common in sorted(by_exceptions.items(), key=lambda one: len(one[0]))
        if set(labels) != compared
    ]
    return f"paired by seed ({'; '.join(said)})" if said else "paired by the number of the seed alone"


def _joined(words: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


_INTERVALS: dict[Interval, str] = {
    "student": "Student's 95 % interval",
    "bootstrap": f"bootstrap-t 95 % interval ({statistics.RESAMPLES:,} draws of the seeds)",
}


def _reference(records: Sequence[Record], points: Sequence[str]) -> str:
    """What agreement must be held against."""
    found = {
        point: [share[point] for r in records if point in (share := r.result.references.get("agreement", {}))]
        for point in points
    }
    shares = [f"{_percent(values)} at {point}" for point, values in found.items() if values]
    if not shares:
        return "what a student reaches that ignores its input was not recorded"
    return f"a student that ignores its input, each neuron on its teacher's more frequent side, has {listed(shares, 8)}"


def _percent(values: Sequence[float]) -> str:
    low, high = (f"{100 * value:.1f}" for value in (min(values), max(values)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _normalizations(comparison: Comparison) -> list[Note]:
    """Where students did not get the data card's normalization."""
    specs = [spec for record in comparison.records if (spec := record.resolved) is not None]
    said = dict.fromkeys(remark for spec in specs for remark in replaced_normalization(spec))
    return [Note(remark[:1].upper() + remark[1:]) for remark in said]


def _teachers_in_doubt(comparison: Comparison) -> list[Note]:
    """What was seen of a teacher before it taught, and where students that had none are better than it."""
    found = dict.fromkeys(
        doubt for r in comparison.records if r.teacher is not None for doubt in r.teacher.doubts or ()
    )
    for column in comparison.columns:
        alone: dict[str, list[float]] = {}
        teachers: dict[str, float] = {}
        for row in comparison.rows:
            for record in comparison.cell(row, column).values():
                if record.teacher is not None and record.teacher.accuracy is not None:
                    teachers[record.teacher.name] = record.teacher.accuracy
                elif _plain(record):
                    alone.setdefault(row.label, []).append(record.result.test.last)
        means = {label: math.fsum(values) / len(values) for label, values in alone.items()}
        best = max(means, key=lambda label: means[label], default="")
        for name, accuracy in teachers.items():
            if best and accuracy < means[best] - _BELOW:
                place = f" ({column.label})" if comparison.axes else ""
                found[f"the teacher '{name}', {accuracy:.2f} %, is below the plain student '{best}'{place}"] = None
    return [Note(text[:1].upper() + text[1:], warning=True) for text in found]


def _plain(record: Record) -> bool:
    """Whether a student learned from labelled images alone."""
    spec = record.resolved if record.teacher is None else None
    stages = list(spec.method.stages.values()) if spec is not None else []
    terms = [term for stage in stages for term in stage.losses.values()]
    return bool(terms) and all({*term.loss.inputs} <= {"student", "labels"} and term.input == "data" for term in terms)


def missing(comparison: Comparison, unfinished: Sequence[str]) -> list[Note]:
    notes = []
    empty = [
        f"{row.label} ({column.label})" if comparison.axes else row.label
        for row in comparison.rows
        for column in comparison.columns
        if not comparison.cell(row, column)
    ]
    if empty:
        notes.append(Note(f"–: no finished cell: {listed(empty)}", warning=True))
    if unfinished:
        notes.append(Note(f"Not finished and not in the table: {listed(unfinished, 6)}", warning=True))
    return notes


def _said_protocol(record: Record) -> str:
    budget = record.budget
    return f"{record.cell.protocol}, {budget.epochs - budget.extra_epochs:g} epochs"


def said_computing(record: Record) -> str:
    """How networks were computed, as far as it was not plainly."""
    compute = record.compute
    parts = [compute.precision, "" if compute.layout == "contiguous" else compute.layout]
    parts += ["compiled" if compute.compile else "", "CUDA graphs" if compute.cuda_graphs else ""]
    parts += ["" if compute.teacher_logits == "computed" else f"teacher logits from a {compute.teacher_logits}"]
    return ", ".join(part for part in parts if part)


def _training(comparison: Comparison) -> Note | None:
    """How the rows were trained in their main stages: where methods differ here it is their own doing, no mistake."""
    rows: dict[str, dict[str, None]] = {}
    for row in comparison.rows:
        for column in comparison.columns:
            for record in comparison.cell(row, column).values():
                if said := training.settings(record):
                    rows.setdefault(said, {})[row.label] = None
    if not rows:
        return None
    alone = len(rows) == 1
    return Note("Training: " + "; ".join(said + (f" ({listed([*of], 6)})" * (not alone)) for said, of in rows.items()))


def _said_teacher(record: Record) -> str | None:
    teacher = record.teacher
    if teacher is None:
        return None
    accuracy = "accuracy not measured" if teacher.accuracy is None else f"{teacher.accuracy:.2f} %"
    return f"{teacher.name}, {accuracy}, sha256 {teacher.sha256[:12]}"


def _said_data(record: Record) -> str:
    data = record.data
    validation = f"{data.validation:,} validation, " if data.validation else ""
    if (target := record.target) is not None:
        return (
            f"{data.name}, {data.train:,} training, {validation}fingerprint {data.fingerprint[:12]} → {target.name}, "
            f"{target.train:,} without labels, {target.test:,} test images, fingerprint {target.fingerprint[:12]}"
        )
    return (
        f"{data.name}, {data.train:,} training, {validation}{data.test:,} test images, "
        f"fingerprint {data.fingerprint[:12]}"
    )


def said_machine(record: Record) -> str:
    """Device, and the threads of a processor."""
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
    ("Machine", said_machine),
    ("Precision", said_computing),
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
    shown = "; ".join(f"{value} ({listed(list(dict.fromkeys(where[value])), 6)})" for value in values)
    if mixed:
        return Note(f"Mixed within the table, so differences may come from it. {name}: {shown}", warning=True)
    return Note(f"{name}: {shown}")


def source_note(key: str, card: PublishedCard) -> Note:
    notes = [" ".join(note.split()).rstrip(".") for note in (card.note, card.protocol.note) if note]
    return Note(". ".join([f"{key}: {card.title}; {card.source}", *(note[:1].upper() + note[1:] for note in notes)]))


def across_notes(found: Across | None, baseline: str) -> list[Note]:
    if found is None:
        return []
    notes = []
    if found.columns:
        distance = (
            f"no critical distance: {found.why_no_distance}"
            if found.critical_distance is None
            else f"critical distance {found.critical_distance:.2f}: methods whose average ranks differ by less cannot "
            "be told apart at 5 % over all pairs of methods (Nemenyi), with the columns as independent draws"
            + (f", which they are only in part: some have {_joined(found.shared)} in common" if found.shared else "")
        )
        notes.append(
            Note(f"Average rank over {found.columns} columns, 1 for the highest mean, ties sharing theirs; {distance}")
        )
    notes.append(
        Note(
            f"Probability of improvement: that a run of a method beats an independent run of {baseline} in the same "
            "column, from all pairs of different seeds, averaged over the columns that both have, and for these "
            "columns only; 95 % interval from leaving out one seed at a time in all of them, where the runs allow one"
        )
    )
    return notes


def ranged(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def listed(values: Sequence[Any], most: int = 12) -> str:
    shown = [str(value) for value in values[:most]]
    return ", ".join(shown) + (f" and {len(values) - most} more" if len(values) > most else "")
