"""The facts below a table, one sentence each: what its numbers are, and what a reader must know before comparing."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from kdbench.errors import counted
from kdbench.published import PublishedCard
from kdbench.recipe.differences import differences
from kdbench.recipe.remarks import replaced_normalization
from kdbench.record import Metric, Record
from kdbench.results import settings, statistics
from kdbench.results.across import Across
from kdbench.results.comparison import Comparison
from kdbench.results.contents import Measure, MethodRow, Note
from kdbench.results.copied import CopiedRow
from kdbench.results.facts import FACTS, SHORT, grouped, in_words, instructions, listed, metric_label, ranged, sentence
from kdbench.results.sharing import unlike_baseline
from kdbench.results.tuned import tuning_notes
from kdbench.tree import text

Interval = Literal["student", "bootstrap"]
# Notes, those that are nothing but a sentence as texts.
Said = Iterator[str | Note]
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
) -> Said:
    """Everything but what belongs to single cells, to the columns taken together and to copied numbers.

    Args:
        tests: how many differences were tested.
    """
    records = comparison.records
    yield from _accuracies(records, rows, metric)
    if any(cell is not None and cell.difference is not None for row in rows for cell in row.cells):
        yield from _differences(comparison, rows, tests, interval)
    yield from tuning_notes(comparison)
    yield from _settings(comparison)
    yield from _unlike_columns(comparison)
    yield from _teachers_in_doubt(comparison)
    if any(record.result.source is not None for record in records):
        yield "The test accuracy is on the target domain, whose labels were not used in training"
    if any(record.result.by_classes for record in records):
        yield "Accuracies on groups of classes are on their test images, classified among all classes"
    for measure in measures:
        yield from _measure(records, measure)
    yield from _modules(comparison)
    yield _seconds(records)
    yield from (Note(text, warning=True) for text in comparison.notes)


def as_notes(said: Iterable[str | Note]) -> tuple[Note, ...]:
    """Every note a whole sentence."""
    notes = (one if isinstance(one, Note) else Note(one) for one in said)
    return tuple(replace(note, text=sentence(note.text)) for note in notes)


def _accuracies(records: Sequence[Record], rows: Sequence[MethodRow], metric: Metric) -> Said:
    cells = [cell for row in rows for cell in row.cells if cell is not None]
    counts = sorted({cell.n for cell in cells})
    seeds = sorted({seed for cell in cells for seed in cell.seeds})
    held_out = sorted({settings.on_validation(record) for record in records})
    what = " and ".join("accuracies on the validation part" if one else "test accuracies" for one in held_out)
    warning = metric == "best" or len(held_out) > 1
    yield Note(f"Numbers are {what} in %, {metric_label(records, metric)}", warning=warning)
    if counts == [1]:
        yield "There is one seed, so there is no deviation, no interval and no test"
    else:
        n = ranged(counts) if counts[-1] == len(seeds) else f"{ranged(counts)} of {len(seeds)}"
        yield f"± is the sample standard deviation over the seeds, n = {n} seeds ({listed(seeds)})"
    if len(rows) > 1:
        yield "The highest mean is bold, the second underlined; neither says that a difference is real"


def _differences(comparison: Comparison, rows: Sequence[MethodRow], tests: int, interval: Interval) -> Said:
    yield f"Differences to {comparison.baseline.label} are in percentage points, taken seed by seed"
    yield _paired(comparison, rows)
    if tests:
        level = "5 %" if tests == 1 else f"5 % / {tests} (Holm's first step)"
        compared = counted(tests, "comparison")
        pairs = [cell.difference for row in rows for cell in row.cells if cell is not None and cell.difference]
        few = any(pair.n < statistics.FEWEST_TO_PLAN for pair in pairs)
        yield f"Intervals are 95 % {_INTERVALS[interval]} of the paired differences"
        yield f"p values are of two-sided paired t tests, with Holm's correction for the {compared} of this table"
        yield (
            f"Seeds needed: with so many, the difference would be found at a level of {level} with 80 % power, if its "
            "true size and deviation are as measured"
            + (f"; not told below {statistics.FEWEST_TO_PLAN} seeds" if few else "")
        )


def _paired(comparison: Comparison, rows: Sequence[MethodRow]) -> str:
    """What cells of one seed have in common, and in which rows they do not."""
    compared = {
        row.label for row in rows if any(cell is not None and cell.difference is not None for cell in row.cells)
    }
    by_exceptions = grouped((tuple(labels), what) for what, labels in unlike_baseline(comparison).items())
    said = [
        f"the same {in_words(common)}" + (f" (not {listed([repr(label) for label in labels], 6)})" if labels else "")
        for labels, common in sorted(by_exceptions.items(), key=lambda one: len(one[0]))
        if not compared <= {*labels}
    ]
    if not said:
        return "Runs of one seed have only its number in common, so pairing them gains nothing"
    return f"Runs of one seed have {' and '.join(said)}"


def _settings(comparison: Comparison) -> Said:
    """How the cells were trained and computed.

    Where methods are trained in different ways it is their own doing, no mistake; every other fact that differs within
    a column is a warning.
    """
    for name in FACTS:
        yield from _fact(comparison, name, FACTS[name])
        if name == "Protocol":
            yield from _training(comparison)
    # Worth a line only where it differs.
    yield from (said for said in _fact(comparison, "Processor instructions", instructions) if isinstance(said, Note))
    specs = [spec for record in comparison.records if (spec := record.resolved) is not None]
    yield from dict.fromkeys(remark for spec in specs for remark in replaced_normalization(spec))


def _fact(comparison: Comparison, name: str, of: Callable[[Record, int | None], str]) -> Said:
    """One fact of all records: its values, with the columns or (as a warning) the rows that have them."""
    said = [(row, column, of(record, SHORT)) for row, column, record in comparison.places()]
    rows = grouped((value, row.label) for row, _, value in said if value)
    columns = grouped((value, column.label) for _, column, value in said if value)
    by_column = grouped((column, value) for _, column, value in said if value)
    mixed = any(len(values) > 1 for values in by_column.values())
    if len(rows) == 1:
        yield f"{name}: {next(iter(rows))}"
    elif rows:
        shown = "; ".join(f"{value} ({listed(labels, 6)})" for value, labels in (rows if mixed else columns).items())
        warned = "; this is mixed within the table, so differences may come from it" if mixed else ""
        yield Note(f"{name}: {shown}{warned}", warning=mixed)


def _training(comparison: Comparison) -> Said:
    places = sorted(comparison.places(), key=lambda place: comparison.rows.index(place[0]))
    rows = grouped((said, row.label) for row, _, record in places if (said := settings.in_a_line(record)))
    for said, labels in rows.items():
        yield f"Training: {said}" if len(rows) == 1 else f"Training of {listed(labels, 6)}: {said}"


def _modules(comparison: Comparison) -> Said:
    """What modules of methods say of themselves."""
    places = [(row.label, record.modules) for row, _, record in comparison.places()]
    said = grouped(((name, text(facts)), label) for label, modules in places for name, facts in modules.items())
    for (name, facts), labels in said.items():
        yield f"Module '{name}' of {listed(labels, 6)}: {facts}"


def _unlike_columns(comparison: Comparison) -> Said:
    """Rows whose losses have other settings in one column than in another, unless they were tuned."""
    for row in comparison.rows:
        cells = [next(iter(cell.values())) for column in comparison.columns if (cell := comparison.cell(row, column))]
        untuned = [_losses(record) for record in cells if record.cell.tuning is None]
        found = {
            path: f"{path} {' and '.join('default' if value is None else text(value) for value in values)}"
            for one in untuned
            for path, *values in differences(untuned[0], one)
        }
        if found:
            yield f"{row.label} has other settings in other columns: {listed([*found.values()], 4)}"


def _losses(record: Record) -> dict[str, Any]:
    """Stage -> loss term -> its weight and options."""
    return {
        name: {
            term: {"weight": own.get("weight")} | ((own.get("loss") or {}).get("options") or {})
            for term, own in (stage.get("losses") or {}).items()
        }
        for name, stage in ((record.spec.get("method") or {}).get("stages") or {}).items()
    }


def _teachers_in_doubt(comparison: Comparison) -> Said:
    """What was seen of a teacher before it taught, and where students that had none are better than it."""
    found = dict.fromkeys(doubt for r in comparison.records if r.teacher for doubt in r.teacher.doubts or ())
    for column in comparison.columns:
        records = comparison.of_column(column)
        teachers = {r.teacher.name: r.teacher.accuracy for r in records if r.teacher and r.teacher.accuracy is not None}
        alone = {
            row.label: math.fsum(values) / len(values)
            for row in comparison.rows
            if (values := [r.result.test.last for r in comparison.cell(row, column).values() if _plain(r)])
        }
        best = max(alone, key=lambda label: alone[label], default="")
        for name, accuracy in teachers.items():
            if best and accuracy < alone[best] - _BELOW:
                place = f" ({column.label})" if comparison.axes else ""
                found[f"the teacher '{name}', {accuracy:.2f} %, is below the plain student '{best}'{place}"] = None
    yield from (Note(text, warning=True) for text in found)


def _plain(record: Record) -> bool:
    """Whether a student learned from labelled images alone."""
    spec = record.resolved if record.teacher is None else None
    terms = spec.method.terms if spec is not None else []
    return bool(terms) and all({*term.loss.inputs} <= {"student", "labels"} and term.input == "data" for term in terms)


def _measure(records: Sequence[Record], measure: Measure) -> Said:
    """What a metric is, and what it must be compared with."""
    what = "a metric of its loss" if measure.share_of is None else f"the share of {measure.share_of}"
    yield f"{measure.title} is {what}, after the last step"
    shown = []
    for point in measure.points:
        values = [v for r in records if (v := r.result.references.get(measure.metric, {}).get(point)) is not None]
        if values:
            ends = dict.fromkeys(measure.show(value) for value in (min(values), max(values)))
            shown.append(f"{' to '.join(ends)} at {point}")
    if shown:
        yield f"A student that ignores its input can reach {listed(shown, 8)}"
    elif measure.share_of is not None:
        yield f"The {measure.title} of a student that ignores its input was not recorded"
    if unmeasured := sum(None in record.result.metrics.get(measure.metric, {}).values() for record in records):
        cells = counted(unmeasured, "cell")
        yield Note(f"{measure.title} could not be measured at each hook point in {cells}", warning=True)


def _seconds(records: Sequence[Record]) -> str:
    """What a table's times hold and leave out."""
    older = any(record.compute.training_seconds is None for record in records)
    but = " (but in earlier versions)" if older else ""
    return (
        f"Training seconds are the mean of one seed, without evaluations{but}; methods that train together share their "
        "teacher's passes"
    )


def missing(comparison: Comparison, unfinished: Mapping[str, str | None]) -> Said:
    """Warnings of cells that are not there; `unfinished`: their names -> why they failed, None where they did not."""
    empty = [
        f"{row.label} ({column.label})" if comparison.axes else row.label
        for row in comparison.rows
        for column in comparison.columns
        if not comparison.cell(row, column)
    ]
    if empty:
        yield Note(f"–: no finished cell: {listed(empty)}", warning=True)
    if failed := [why for why in unfinished.values() if why is not None]:
        yield Note(f"Failed and not in the table: {listed(failed, 6)}", warning=True)
    if left := [name for name, why in unfinished.items() if why is None]:
        yield Note(f"Not finished and not in the table: {listed(left, 6)}", warning=True)


def across_notes(found: Across | None, baseline: str) -> Said:
    """How the columns were taken together."""
    if found is None:
        return
    if found.columns:
        yield f"Average rank is over {found.columns} columns: 1 for the highest mean, ties share theirs"
    if found.columns and found.critical_distance is None:
        yield f"There is no critical distance of ranks: {found.why_no_distance}"
    elif found.columns:
        yield (
            f"Average ranks that differ by less than the critical distance, {found.critical_distance:.2f}, are not "
            "significantly different at 5 % over all pairs of methods (Nemenyi)"
        )
        but = f", which they are only in part: some have {in_words(found.shared)} in common" if found.shared else ""
        yield f"The critical distance assumes that the columns are independent{but}"
    yield (
        f"Probability of improvement: the share of pairs of runs with different seeds in which a method beats "
        f"{baseline}, averaged over the columns that have both"
    )
    yield "Its 95 % interval leaves out one seed at a time and is for these columns only; few seeds may allow none"


def copied_notes(copied: Sequence[CopiedRow], published: Mapping[str, PublishedCard]) -> Said:
    """Where copied numbers are from; nothing where there are none."""
    if copied:
        yield "†: copied from other people's publications; never bold or underlined"
        for key, card in published.items():
            more = [" ".join(note.split()).rstrip(".") for note in (card.note, card.protocol.note) if note]
            said = [f"Source {key}: {card.title}; {card.source}", *(note[:1].upper() + note[1:] for note in more)]
            yield ". ".join(said)
