"""Published numbers beside our own: which of a published table's pairs belong to which column, and what differs."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kdbench.errors import UserError, counted, did_you_mean
from kdbench.published import PublishedCard, PublishedPair, PublishedProtocol
from kdbench.record import Record
from kdbench.registry import Registry
from kdbench.results import settings
from kdbench.results.comparison import Column, Comparison

DAGGER = "†"


@dataclass(frozen=True)
class CopiedCell:
    """Accuracy in percent as its source prints it.

    `runs`: None where the source does not say. `marks`: of the notes that say where it is from and how its protocol
    differs.
    """

    mean: float
    deviation: float | None
    runs: int | None
    marks: tuple[str, ...]


@dataclass(frozen=True)
class CopiedRow:
    """A row of a published table. `method`: None for the teacher's row. `cells`: in the order of the columns."""

    source: str
    method: str | None
    label: str
    cells: tuple[CopiedCell | None, ...]


def published_tables(
    texts: Iterable[str], registries: str | Path | Iterable[str | Path] = ()
) -> dict[str, PublishedCard]:
    """Published tables by their keys, each with all methods or with those named after a colon: 'key:ce,kd'."""
    if not (wanted := list(texts)):
        return {}
    cards = Registry(registries)
    return dict(_published(cards, text) for text in wanted)


def _published(cards: Registry, text: str) -> tuple[str, PublishedCard]:
    key, _, names = text.partition(":")
    card: PublishedCard = cards.card("published", key, "published")
    wanted = [name for name in names.split(",") if name]
    for name in wanted:
        if name not in card.methods:
            raise UserError(f"'{key}' has no method '{name}'", "published", did_you_mean(name, card.methods))
    rows = {name: row for name, row in card.methods.items() if name in wanted} if wanted else card.methods
    return key, card.model_copy(update={"methods": rows})


def copied_rows(
    comparison: Comparison, published: Mapping[str, PublishedCard], reported: str, mark: Callable[[str], str]
) -> tuple[CopiedRow, ...]:
    """The rows of published tables that stand beside a comparison's columns: those with a column's student and data.

    Where a published pair has the column's teacher too, pairs with other teachers are left out.

    Args:
        published: key -> card, in the order in which they are shown.
        reported: what our own accuracies are of, in words.
        mark: gives the letter of a note.

    Raises:
        UserError: a published table without any such pair.
    """
    rows: list[CopiedRow] = []
    for key, card in published.items():
        found = {column: _pairs(comparison, column, card) for column in comparison.columns}
        if not any(found.values()):
            pairs = [_arrow(pair) for pair in card.pairs.values()]
            raise UserError(
                f"'{key}' has no numbers for this table",
                where="published",
                hint=f"it has {card.data.name}: {', '.join(pairs[:8])}" + (", …" if len(pairs) > 8 else ""),
            )
        # One row a method, and one more for every further teacher of the same student.
        for place in range(max(map(len, found.values()))):
            chosen = {column: pairs[place] for column, pairs in found.items() if len(pairs) > place}
            teachers = {one.name for pair in chosen.values() if (one := card.pairs[pair].teacher) is not None}
            teacher = teachers.pop() if len(teachers) == 1 else None
            rows += _rows(comparison, key, card, chosen, teacher, reported, mark)
    return tuple(rows)


def _pairs(comparison: Comparison, column: Column, card: PublishedCard) -> list[str]:
    """Keys of the pairs that belong to a column."""
    records = comparison.of_column(column)
    students = {record.cell.student for record in records if record.data.name == card.data.name}
    ours = {_teacher_model(record) for record in records} - {None}
    same = {key: pair.teacher for key, pair in card.pairs.items() if pair.student.name in students}
    exact = [key for key, teacher in same.items() if teacher is not None and teacher.name in ours]
    return exact or [*same]


def _rows(
    comparison: Comparison,
    key: str,
    card: PublishedCard,
    chosen: Mapping[Column, str],
    teacher: str | None,
    reported: str,
    mark: Callable[[str], str],
) -> list[CopiedRow]:
    """The rows of one card. `chosen`: column -> key of its pair. `teacher`: of all these pairs, where it is one."""
    order = list(card.pairs)
    rows = []
    for method in [None, *card.methods]:
        cells: list[CopiedCell | None] = []
        for column in comparison.columns:
            pair = card.pairs[chosen[column]] if column in chosen else None
            value: float | list[float] | None = None
            if pair is not None and method is None and pair.teacher is not None:
                value = pair.teacher.accuracy
            elif pair is not None and method is not None:
                value = card.methods[method].accuracies[order.index(chosen[column])]
            if pair is None or value is None:
                cells.append(None)
                continue
            mean, deviation = (value[0], value[1]) if isinstance(value, list) else (value, None)
            said, runs = [f"Copied from {key}, not measured here"], None
            if method is not None:
                theirs = card.protocol_of(method, pair)
                runs = theirs.runs
                said[0] += f"; {_beside_ours(theirs, pair, comparison.of_column(column), reported)}"
                # Apart, so that rows which differ in nothing else share the note on the protocol.
                said += _own(theirs, card.protocol)
            cells.append(CopiedCell(mean, deviation, runs, tuple(map(mark, said))))
        if any(cells):
            if method is None:
                label = " ".join(filter(None, ("teacher", teacher)))
            else:
                label = card.methods[method].title + (f" (from {teacher})" if teacher else "")
            rows.append(CopiedRow(key, method, label, tuple(cells)))
    return rows


def _beside_ours(theirs: PublishedProtocol, pair: PublishedPair, records: list[Record], reported: str) -> str:
    """A copied number's protocol beside that of our column's records: where it differs, what its source does not say,
    and what is the same."""
    runs = Counter(record.cell.label for record in records)
    teachers = {f"{_teacher_model(r)}{_accuracy(r.teacher.accuracy)}" for r in records if r.teacher is not None}
    lines = [
        ("epochs", _number(theirs.epochs), _range(r.budget.epochs - r.budget.extra_epochs for r in records)),
        (
            "batch size",
            _number(theirs.batch_size),
            _range(b for r in records if (b := settings.batch_size(r)) is not None),
        ),
        ("reported", theirs.reported and f"{theirs.reported} epoch", reported),
        ("runs", _number(theirs.runs), _range(runs.values())),
    ]
    if pair.teacher is not None:
        own = f"{pair.teacher.name}{_accuracy(pair.teacher.accuracy)}"
        lines.append(("teacher", own, ", ".join(sorted(teachers)) or "none"))
    # A column belongs to the published data by their name, also where it has only a part of them.
    if parts_of_data := ", ".join(dict.fromkeys(filter(None, map(_part, records)))):
        lines.append(("data", records[0].data.name, parts_of_data))
    # What few sources say: where one side is unknown, there is nothing to spell out.
    ours = {name: " or ".join(dict.fromkeys(filter(None, map(said, records)))) for name, said in settings.SAID.items()}
    rest = {
        "optimizer": theirs.optimizer,
        "learning rate": _number(theirs.learning_rate),
        "weight decay": _number(theirs.weight_decay),
        "schedule": theirs.schedule,
        "augmentation": theirs.augmentation,
    }
    lines += [(name, their, ours[name]) for name, their in rest.items() if their is not None and ours[name]]
    parts = [
        ("differs", [f"{name} {their} (here {our})" for name, their, our in lines if their not in (None, our)]),
        ("not stated there", [f"{name} (here {our})" for name, their, our in lines if their is None]),
        ("the same", [f"{name} {their}" for name, their, our in lines if their == our]),
    ]
    return "; ".join(f"{what}: {', '.join(entries)}" for what, entries in parts if entries)


def _part(record: Record) -> str:
    """Which part of its data a cell was trained or tested on; empty where it had all, or made its own images."""
    whole = (record.spec.get("data") or {}).get("train") or 0
    said = f"{record.data.train:,} of {whole:,} training images" if 0 < record.data.train < whole else ""
    tested = "tested on the validation part" if settings.on_validation(record) else ""
    return ", ".join(filter(None, (said, tested)))


def _own(theirs: PublishedProtocol, table: PublishedProtocol) -> list[str]:
    """What a row says of itself, beyond the protocol of its table."""
    extra = "" if theirs.extra_epochs is None else f"{counted(theirs.extra_epochs, 'epoch', 'g')} on top of the others'"
    note = "" if theirs.note in (None, table.note) else str(theirs.note)
    said = "; ".join(part for part in (extra, note) if part)
    return [f"There: {said}"] if said else []


def _teacher_model(record: Record) -> str | None:
    """Name of the teacher's network; of its card where the record does not say."""
    if record.teacher is None:
        return None
    model = (record.spec.get("teacher") or {}).get("model") or {}
    return str(model.get("name", record.teacher.name))


def _accuracy(value: float | None) -> str:
    return "" if value is None else f" {value:.2f} %"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def _range(values: Iterable[float]) -> str:
    """One value, or the lowest and the highest."""
    known = sorted(values)
    return " to ".join(dict.fromkeys(f"{value:g}" for value in (*known[:1], *known[-1:]))) or "not recorded"


def _arrow(pair: PublishedPair) -> str:
    return f"{pair.teacher.name} → {pair.student.name}" if pair.teacher is not None else pair.student.name
