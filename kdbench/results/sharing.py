"""What cells of one seed have in common besides its number, told from their records."""

import json
from collections.abc import Callable
from typing import Any

from kdbench.record import Record
from kdbench.results.comparison import Comparison


def unlike_baseline(comparison: Comparison) -> dict[str, list[str]]:
    """What may be common to the runs of one seed, each with the labels of the rows in which some run differs in it from
    the baseline's of the same column and seed, or whose records do not say; in the order of the rows."""
    found: dict[str, dict[str, None]] = {what: {} for what in _DRAWN}
    for row, column, record in comparison.places():
        base = comparison.cell(comparison.baseline, column).get(record.cell.seed)
        for what, of in _DRAWN.items():
            if base is not None and ((own := of(record)) is None or own != of(base)):
                found[what][row.label] = None
    order = [row.label for row in comparison.rows]
    return {what: sorted(labels, key=order.index) for what, labels in found.items()}


def _data_order(record: Record) -> str | None:
    """Which images come in which order: by one stream for all that draw batches of one size from the same images,
    unless a batch source puts its own in their place."""
    protocol = record.spec.get("protocol") or {}
    target = record.target
    return _drawn(
        record,
        "order",
        [
            record.data.fingerprint,
            record.data.train,
            record.seeds.split,
            target and [target.fingerprint, target.train],
            protocol.get("batch_size"),
            protocol.get("last_batch"),
            _replaced(record),
        ],
    )


def _augmentation(record: Record) -> str | None:
    order = _data_order(record)
    return order and _drawn(record, "augmentation", [order, (record.spec.get("protocol") or {}).get("augmentation")])


def _initial_student(record: Record) -> str | None:
    """Drawn for its architecture, given by weights, or a copy of the teacher."""
    copied = (record.spec.get("method") or {}).get("starts_from")
    teacher = record.teacher.sha256 if copied and record.teacher is not None else None
    # Earlier versions wrote down fewer of the fields that are empty.
    model = {key: value for key, value in (record.spec.get("student") or {}).items() if value not in ([], {}, None)}
    return _drawn(record, "init", [record.cell.student, model, copied, teacher])


_DRAWN: dict[str, Callable[[Record], str | None]] = {
    "data order": _data_order,
    "augmentation": _augmentation,
    "initial student": _initial_student,
}


def _drawn(record: Record, stream: str, settings: list[Any]) -> str | None:
    """Two cells of one seed with the same stream and settings draw the same; None where a record names no streams."""
    return json.dumps(settings, sort_keys=True) if stream in record.seeds.streams else None


def _replaced(record: Record) -> list[Any]:
    """Steps whose batches of data come from a source of the method's own, and that source."""
    stages = (record.spec.get("method") or {}).get("stages") or {}
    steps = {stage.name: stage.steps for stage in record.budget.stages}
    found, start = [], 0
    for name, stage in stages.items():
        source = stage.get("source")
        if source is not None and "data" in source.get("gives", ()):
            found.append([start, steps.get(name), source])
        start += steps.get(name, 0)
    return found
