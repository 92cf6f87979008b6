"""The facts below a table, one sentence each: what its numbers are, and what a reader must know before comparing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from kdbench.published import PublishedCard
from kdbench.recipe.remarks import replaced_normalization
from kdbench.record import Metric, Record
from kdbench.results import settings, statistics
from kdbench.results.across import Across
from kdbench.results.comparison import Comparison
from kdbench.results.contents import Measure, MethodRow, Note
from kdbench.results.copied import CopiedRow
from kdbench.results.facts import FACTS, SHORT, joined, listed, metric_label, ranged
from kdbench.results.sharing import unlike_baseline
from kdbench.results.tuned import tuning_notes

Interval = Literal["student", "bootstrap"]
# Percentage points by which a plain student must be better than a teacher to be told.
_BELOW = 1.0

_INTERVALS: dict[Interval, str] = {
    "student": "Student's t intervals",
    "bootstrap": f"bootstrap-t intervals ({statistics.RESAMPLES:,} draws of the seeds)",
}


def notes_of(
    comparison: Comparison,
    rows: Sequence[MethodRow],
    metric: Metric,
    tests: int,
    measures: Sequence[Measure],
    interval: Interval,
) -> list[Note]:
    """Everything but what belongs to single cells, to the columns taken together and to copied numbers.

    Args:
        tests: how many differences were tested.
    """
    records = comparison.records
    notes = [
        *_accuracies(records, rows, metric),
        *_differences(comparison, rows, tests, interval),
        *tuning_notes(comparison),
        *_settings(comparison),
        *_teachers_in_doubt(comparison),
    ]
    if any(record.result.source is not None for record in records):
        notes.append(Note("The test accuracy is the target domain's, no label of which was used in training"))
    if any(record.result.by_classes for record in records):
        notes.append(
            Note("Accuracies on groups of classes are of the test images of these classes, with all classes competing")
        )
    for measure in measures:
        notes += _measure(records, measure)
    notes.append(
        Note("Seconds are the mean training time of one seed; methods that train together share their teacher's passes")
    )
    return notes + [Note(text, warning=True) for text in comparison.notes]


def _accuracies(records: Sequence[Record], rows: Sequence[MethodRow], metric: Metric) -> list[Note]:
    cells = [cell for row in rows for cell in row.cells if cell is not None]
    counts = sorted({cell.n for cell in cells})
    seeds = sorted({seed for cell in cells for seed in cell.seeds})
    held_out = all(record.resolved is not None and record.resolved.data.tested_on == "validation" for record in records)
    what = "accuracies on the validation part" if held_out else "test accuracies"
    notes = [Note(f"Numbers are {what} in %, {metric_label(records, metric)}", warning=metric == "best")]
    if counts == [1]:
        notes.append(Note("There is one seed, so there is no deviation, no interval and no test"))
    else:
        shown = f"n = {ranged(counts)} seeds ({listed(seeds)})"
        notes.append(Note(f"± is the sample standard deviation over the seeds, {shown}"))
    if len(rows) > 1:
        notes.append(Note("Bold is the highest mean, underlined the second; neither says that a difference is real"))
    return notes


def _differences(comparison: Comparison, rows: Sequence[MethodRow], tests: int, interval: Interval) -> list[Note]:
    if not any(cell is not None and cell.difference is not None for row in rows for cell in row.cells):
        return []
    notes = [
        Note(f"Differences are in percentage points to {comparison.baseline.label}, seed by seed"),
        Note(_paired(comparison, rows)),
    ]
    if tests:
        level = "5 %" if tests == 1 else f"5 % / {tests} (Holm's first step)"
        notes += [
            Note(f"Intervals are 95 % {_INTERVALS[interval]} of the paired differences"),
            Note(
                "The p values are of two-sided paired t tests, after Holm's correction for the "
                f"{'1 comparison' if tests == 1 else f'{tests} comparisons'} of this table"
            ),
            Note(
                "The number of seeds needed gives an 80 % chance to show the difference at a level of "
                f"{level}, if its true size and deviation are the measured ones"
            ),
        ]
    return notes


def _paired(comparison: Comparison, rows: Sequence[MethodRow]) -> str:
    """What cells of one seed have in common, and in which rows they do not."""
    compared = {
        row.label for row in rows if any(cell is not None and cell.difference is not None for cell in row.cells)
    }
    by_exceptions: dict[tuple[str, ...], list[str]] = {}
    for what, labels in unlike_baseline(comparison).items():
        by_exceptions.setdefault(tuple(labels), []).append(what)
    said = [
        f"the same {joined(common)}" + (f" (not {listed([repr(label) for label in labels], 6)})" if labels else "")
        for labels, common in sorted(by_exceptions.items(), key=lambda one: len(one[0]))
        if set(labels) != compared
    ]
    if not said:
        return "With one seed, methods have only its number in common, so pairing them gains nothing"
    return f"With one seed, methods have {' and '.join(said)}"


def _settings(comparison: Comparison) -> list[Note]:
    """How the cells were trained and computed. Where methods are trained in different ways it is their own doing, no
    mistake; every other fact that differs within a column is a warning."""
    notes = []
    for name in FACTS:
        notes += _fact(comparison, name)
        if name == "Protocol":
            notes += _training(comparison)
    specs = [spec for record in comparison.records if (spec := record.resolved) is not None]
    said = dict.fromkeys(remark for spec in specs for remark in replaced_normalization(spec))
    return notes + [Note(remark) for remark in said]


def _fact(comparison: Comparison, name: str) -> list[Note]:
    """One fact of all records: its values, with the columns or (as a warning) the rows that have them."""
    columns: dict[str, dict[str, None]] = {}
    rows: dict[str, dict[str, None]] = {}
    mixed = False
    for column in comparison.columns:
        here = set()
        for row in comparison.rows:
            for record in comparison.cell(row, column).values():
                if value := FACTS[name](record, SHORT):
                    here.add(value)
                    columns.setdefault(value, {})[column.label] = None
                    rows.setdefault(value, {})[row.label] = None
        mixed |= len(here) > 1
    if not rows:
        return []
    if len(rows) == 1:
        return [Note(f"{name}: {next(iter(rows))}")]
    where = rows if mixed else columns
    shown = "; ".join(f"{value} ({listed(list(places), 6)})" for value, places in where.items())
    if mixed:
        shown = f"{shown}; this is mixed within the table, so differences may come from it"
    return [Note(f"{name}: {shown}", warning=mixed)]


def _training(comparison: Comparison) -> list[Note]:
    rows: dict[str, dict[str, None]] = {}
    for row in comparison.rows:
        for column in comparison.columns:
            for record in comparison.cell(row, column).values():
                if said := settings.in_a_line(record):
                    rows.setdefault(said, {})[row.label] = None
    if len(rows) == 1:
        return [Note(f"Training: {next(iter(rows))}")]
    return [Note(f"Training of {listed(list(labels), 6)}: {said}") for said, labels in rows.items()]


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
    return [Note(text, warning=True) for text in found]


def _plain(record: Record) -> bool:
    """Whether a student learned from labelled images alone."""
    spec = record.resolved if record.teacher is None else None
    stages = list(spec.method.stages.values()) if spec is not None else []
    terms = [term for stage in stages for term in stage.losses.values()]
    return bool(terms) and all({*term.loss.inputs} <= {"student", "labels"} and term.input == "data" for term in terms)


def _measure(records: Sequence[Record], measure: Measure) -> list[Note]:
    """What a metric is, and what it must be compared with."""
    what = "a metric of its loss" if measure.share_of is None else f"the share of {measure.share_of}"
    notes = [Note(f"{measure.title} is {what}, after the last step")]
    shown = []
    for point in measure.points:
        values = [v for r in records if (v := r.result.references.get(measure.metric, {}).get(point)) is not None]
        if values:
            ends = dict.fromkeys(str(measure.show(value)) for value in (min(values), max(values)))
            shown.append(f"{' to '.join(ends)} at {point}")
    if shown:
        notes.append(Note(f"For comparison, a student that ignores its input can reach {listed(shown, 8)}"))
    elif measure.share_of is not None:
        notes.append(Note(f"The {measure.title} of a student that ignores its input was not recorded"))
    return notes


def missing(comparison: Comparison, unfinished: Sequence[str]) -> list[Note]:
    """Warnings of cells that are not there."""
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


def across_notes(found: Across | None, baseline: str) -> list[Note]:
    """How the columns were taken together."""
    if found is None:
        return []
    notes = []
    if found.columns:
        notes.append(Note(f"Average rank is over {found.columns} columns: 1 for the highest mean, ties share theirs"))
        if found.critical_distance is None:
            notes.append(Note(f"There is no critical distance of ranks: {found.why_no_distance}"))
        else:
            notes.append(
                Note(
                    f"Methods whose average ranks differ by less than {found.critical_distance:.2f}, the critical "
                    "distance, cannot be told apart at 5 % over all pairs of methods (Nemenyi)"
                )
            )
            but = f", which they are only in part: some have {joined(found.shared)} in common" if found.shared else ""
            notes.append(Note(f"The critical distance takes the columns for independent{but}"))
    return [
        *notes,
        Note(
            f"Probability of improvement is that a method beats {baseline} in the same column when their seeds differ: "
            "the share among pairs of different seeds, averaged over the columns that have both"
        ),
        Note(
            "Its 95 % interval comes from leaving out one seed at a time, and is of these columns only; there is none "
            "where the seeds allow none"
        ),
    ]


def copied_notes(copied: Sequence[CopiedRow], published: Mapping[str, PublishedCard]) -> list[Note]:
    """Where copied numbers are from; nothing where there are none."""
    if not copied:
        return []
    notes = [Note("†: numbers of other people, copied; never bold or underlined")]
    for key, card in published.items():
        more = [" ".join(note.split()).rstrip(".") for note in (card.note, card.protocol.note) if note]
        said = [f"Source {key}: {card.title}; {card.source}", *(note[:1].upper() + note[1:] for note in more)]
        notes.append(Note(". ".join(said)))
    return notes
