"""Tables and records as flat rows: CSV files and data frames. The same from the same records, in any order."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from kdbench.files import no_formula
from kdbench.record import Record
from kdbench.results.comparison import recipe_order
from kdbench.results.contents import Entry, Table
from kdbench.results.layout import seeds_text
from kdbench.results.statistics import Summary
from kdbench.tree import text

if TYPE_CHECKING:
    import pandas


def table_csv(table: Table) -> str:
    """One line for every method and column of a table, with full precision. Ends with a newline."""
    return _csv(_flat(table))


def to_frame(table: Table) -> pandas.DataFrame:
    """The table as a data frame, one row for every method and column; the notes are in `frame.attrs["notes"]`."""
    import pandas

    frame = pandas.DataFrame(_flat(table))
    frame.attrs.update(
        title=table.title,
        metric=table.metric_label,
        baseline=table.baseline,
        notes=[f"{note.mark}: {note.text}" if note.mark else note.text for note in table.notes],
    )
    return frame


def records_csv(records: Iterable[Record]) -> str:
    """The long form: one line for every record, whatever a table would leave out. Ends with a newline."""
    return _csv(_lines(records))


def records_frame(records: Iterable[Record]) -> pandas.DataFrame:
    """The same as a data frame."""
    import pandas

    return pandas.DataFrame(_lines(records))


def _lines(records: Iterable[Record]) -> list[dict[str, Any]]:
    return [_line(record) for record in recipe_order(records)]


def _line(record: Record) -> dict[str, Any]:
    cell, result, data, teacher = record.cell, record.result, record.data, record.teacher

    def parts(source: Any, *names: str, prefix: str = "") -> dict[str, Any]:
        return {prefix + name: getattr(source, name, None) for name in names}

    return {
        "recipe": record.recipe,
        **parts(cell, "method", "label", "student", "teacher", "data", "protocol", "seed"),
        **{f"axis.{path}": text(value) for path, value in cell.axes.items()},
        **parts(result.test, "last", "best", "best_step"),
        **parts(result.validation, "last", "best", prefix="validation_"),
        **result.numbers(),
        **{f"also.{name}": value for name, value in result.also().items()},
        **parts(record.budget, "steps", "epochs", "extra_epochs"),
        **parts(teacher, "accuracy", "sha256", prefix="teacher_"),
        "train_images": data.train,
        "validation_images": data.validation,
        "test_images": data.test,
        "data_fingerprint": data.fingerprint,
        **parts(record.models.student, "parameters", "flops"),
        **parts(record.compute, "device", "device_name", "threads", "precision", "seconds", "training_seconds"),
        **parts(record.compute, "images_per_second", "python", "torch"),
        "kdbench": record.kdbench,
        **parts(record.git, "commit", "dirty"),
        "status": record.status,
        "identity": record.identity,
    }


def _flat(table: Table) -> list[dict[str, Any]]:
    """One plain row for every filled cell of a table.

    Copied numbers say where they are from in `copied_from`; nothing measured has that.
    """
    result = []
    teachers: list[dict[str, Any]] = [
        next(
            ({"teacher": t.name, "teacher_accuracy": a} for t in table.teachers if (a := t.accuracies[i]) is not None),
            {"teacher": None, "teacher_accuracy": None},
        )
        for i in range(len(table.columns))
    ]
    across = {
        one.label: {
            "average_rank": _round(one.rank),
            **{
                f"improvement_{field}": _round(getattr(one.improvement, field, None))
                for field in ("probability", "low", "high")
            },
        }
        for one in (table.across.standings if table.across else ())
    }
    for row in table.rows:
        for column, cell, teacher in zip(table.columns, row.cells, teachers, strict=True):
            if cell is not None:
                axes = dict(column.key)
                names = {"method": row.method, "label": row.label, "baseline": row.is_baseline, **axes}
                summed = across.get(row.label, {})
                numbers = {"metric": table.metric, **_numbers(table, cell), **teacher}
                # What a column stands for is said as it was compared, even where it is called like a number.
                result.append({**names, **numbers, **axes, "marks": " ".join(cell.marks) or None, **summed})
    for copied in table.copied:
        for column, entry in zip(table.columns, copied.cells, strict=True):
            if entry is not None:
                names = {"method": copied.method or "teacher", "label": copied.label, "baseline": False}
                numbers = {"n": entry.runs, "mean": entry.mean, "deviation": entry.deviation}
                source = {"marks": " ".join(entry.marks), "copied_from": copied.source}
                result.append({**names, **dict(column.key), **numbers, **source})
    return result


def _numbers(table: Table, cell: Entry) -> dict[str, Any]:
    found = cell.difference
    difference = {"": "mean", "_low": "low", "_high": "high", "_n": "n"}
    return {
        "n": cell.n,
        "seeds": " ".join(map(str, cell.seeds)),
        "mean": _round(cell.mean),
        "deviation": _round(cell.deviation),
        "rank": "best" if cell.best else "second" if cell.second else None,
        **{f"difference{name}": _round(getattr(found, field, None)) for name, field in difference.items()},
        **{name: _round(getattr(found, name, None), 9) for name in ("p", "p_holm")},
        "seeds_needed": seeds_text(found.seeds_needed) if found else None,
        "steps": cell.budget.steps,
        "epochs": _round(cell.budget.epochs),
        "extra_epochs": _round(cell.budget.extra_epochs),
        **{
            name: _mean(cell.numbers.get(name))
            for name in (f"{measure.metric}.{point}" for measure in table.measures for point in measure.points)
        },
        **{f"also.{name}": _mean(cell.also.get(name)) for name in table.also},
        "training_seconds": _round(cell.seconds, 2),
        "images_per_second": _round(cell.images_per_second, 1),
    }


def _mean(summary: Summary | None) -> float | None:
    return None if summary is None else _round(summary.mean)


def _round(value: float | None, digits: int = 6) -> float | None:
    return None if value is None else round(value, digits)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    """Columns in order of first appearance; a missing value is empty."""
    fields = list(dict.fromkeys(field for row in rows for field in row))
    # Columns of one kind (axis.…, also.…, a metric.…) stay together although rows bring them at different times.
    kinds = list(dict.fromkeys(field.partition(".")[0] for field in fields))
    fields.sort(key=lambda field: kinds.index(field.partition(".")[0]))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows({field: no_formula(value) for field, value in row.items()} for row in rows)
    return stream.getvalue()
