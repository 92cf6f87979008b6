"""Records put in order: which cells stand in which row and column, and which of them belong together as seeds.

Nothing here depends on the order in which the records come. Cells that are different experiments are never pooled.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kdbench.errors import UserError, did_you_mean
from kdbench.recipe.differences import differences
from kdbench.record import Metric, Record
from kdbench.results.sameness import check_made_alike, check_same
from kdbench.results.settings import main_stage
from kdbench.tree import text

# What tells cells of several recipes apart, though none of them compares it.
IMPLIED = ("student", "teacher", "data", "target", "protocol", "training images", "epochs")
# Budgets of so few epochs' difference are one: records round.
SAME_BUDGET = 0.001

Key = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Axis:
    """Something that varies across the columns: a dotted recipe path, and its values as texts in order."""

    path: str
    values: tuple[str, ...]

    @property
    def name(self) -> str:
        """What its values are, in words."""
        return self.path.rpartition(".")[2].replace("_", " ")

    def show(self, value: str) -> str:
        """A value as a column's label: names speak for themselves, numbers get the name of what they count."""
        return value if self.path in ("student", "teacher", "data", "target", "protocol") else f"{self.name} {value}"


@dataclass(frozen=True)
class Row:
    """A method with its compared parameters. `label` is unique in a comparison."""

    method: str
    label: str


@dataclass(frozen=True)
class Column:
    """One combination of the axes' values; the only column of a comparison without axes has no key."""

    key: Key
    label: str


@dataclass(frozen=True)
class Comparison:
    """`cells`: (row label, column key) -> seed -> record.

    A cell to which an axis means nothing (the plain student, where teachers are compared) stands in every column of
    that axis. `asked`: names of numbers to show too.
    """

    rows: tuple[Row, ...]
    axes: tuple[Axis, ...]
    columns: tuple[Column, ...]
    baseline: Row
    cells: Mapping[tuple[str, Key], Mapping[int, Record]]
    records: tuple[Record, ...]
    notes: tuple[str, ...]
    asked: tuple[str, ...] = ()

    def also(self, record: Record) -> dict[str, float]:
        """What is shown beside a record's accuracy, where it was measured."""
        numbers = record.result.numbers()
        return record.result.also() | {name: numbers[name] for name in self.asked if name in numbers}

    def cell(self, row: Row, column: Column) -> Mapping[int, Record]:
        """Seed -> record, in order of seeds; empty where nothing ran."""
        return self.cells.get((row.label, column.key), {})

    def accuracies(self, row: Row, column: Column, metric: Metric) -> dict[int, float]:
        """Seed -> accuracy in percent; empty where nothing ran."""
        return {seed: record.accuracy(metric) for seed, record in self.cell(row, column).items()}

    def places(self) -> Iterator[tuple[Row, Column, Record]]:
        """Every record in every place where it stands, column by column."""
        for column in self.columns:
            for row in self.rows:
                yield from ((row, column, record) for record in self.cell(row, column).values())

    def of_column(self, column: Column) -> list[Record]:
        """The records of all rows in a column."""
        return [record for row in self.rows for record in self.cell(row, column).values()]


def compare(records: Iterable[Record], baseline: str | None = None, asked: str | Iterable[str] = ()) -> Comparison:
    """Arrange finished records in rows (students without a teacher, then those with one, each in the order of the
    recipe) and columns (combinations of everything else that varies).

    Args:
        baseline: key or label of the method to compare with; the recipe's own by default.
        asked: numbers to show beside the accuracies, by name as in records.csv (`top5`, `agreement.layer1.preact`), or
            a metric for all its hook points (`agreement`).

    Raises:
        UserError: no records, an unknown baseline, a number that no record has, or different experiments that would
            stand in one place.
    """
    ordered, notes = _unique(recipe_order(record for record in records if record.status == "finished"))
    if not ordered:
        raise UserError("there are no records to compare", hint="'kdbench run RECIPE' makes them")
    labels = _labels(ordered)
    notes += [f"'{own}' is '{known}' under another name" for (_, own), known in labels.items() if own != known]
    rows = _rows(ordered, labels)
    axes, keys = _axes(ordered)
    columns = _columns(axes, [key for several in keys for key in several])
    cells: dict[tuple[str, Key], dict[int, Record]] = {}
    for record, row, several in zip(ordered, rows, keys, strict=True):
        for key in several:
            group = cells.setdefault((row.label, key), {})
            for other in group.values():
                check_same(row.label, other, record)
                check_made_alike(other, record)
            group[record.cell.seed] = record
    unique_rows = tuple(dict.fromkeys(rows))
    chosen, note = _baseline(unique_rows, ordered, baseline)
    if not any(record.cell.order is not None for record in ordered):
        unique_rows = (chosen, *(row for row in sorted(unique_rows, key=lambda row: row.label) if row != chosen))
    return Comparison(
        _students_first(unique_rows, cells),
        axes,
        columns,
        chosen,
        {place: dict(sorted(group.items())) for place, group in cells.items()},
        tuple(ordered),
        tuple(notes + ([note] if note else [])),
        _asked(ordered, asked),
    )


def _asked(records: list[Record], asked: str | Iterable[str]) -> tuple[str, ...]:
    """Names of numbers that were asked for, a metric's name as those of all its hook points."""
    known = dict.fromkeys(name for record in records for name in record.result.numbers())
    found: dict[str, None] = {}
    for name in [asked] if isinstance(asked, str) else asked:
        own = [one for one in known if one == name or one.startswith(f"{name}.")]
        if not own:
            hint = did_you_mean(name, known) if known else "records of earlier versions have no numbers of this kind"
            raise UserError(f"no record has the number '{name}'", where="columns", hint=hint)
        found |= dict.fromkeys(own)
    return tuple(found)


def recipe_order(records: Iterable[Record]) -> list[Record]:
    """Records in the order of the recipe, the same whatever order they come in."""
    return sorted(records, key=_order)


def _order(record: Record) -> tuple[Any, ...]:
    cell = record.cell
    return (
        record.recipe,
        cell.order or 0,
        cell.label,
        cell.method,
        json.dumps(cell.axes, sort_keys=True),
        cell.seed,
        record.identity,
        record.result.test.last,
        str(record.folder),
        json.dumps(record.plain(), sort_keys=True),
    )


def _unique(records: list[Record]) -> tuple[list[Record], list[str]]:
    """The records without second copies of a cell (a folder given twice, committed results beside their runs)."""
    kept: dict[str, Record] = {}
    copies = different = 0
    for record in records:
        if (first := kept.get(record.identity)) is None:
            kept[record.identity] = record
        else:
            check_made_alike(first, record)
            copies += 1
            different += first.result != record.result
    notes = []
    if copies:
        but = f"; {different} of them with other results" if different else ""
        notes.append(f"{copies} cell{' is' if copies == 1 else 's are'} twice among the records{but}: one is used")
    return list(kept.values()), notes


def _labels(records: list[Record]) -> dict[tuple[str, str], str]:
    """Method and label -> the first label of this very method with these settings: versions may call it otherwise."""
    found: dict[str, dict[str, dict[str, Record]]] = {}
    for record in records:
        by_axes = found.setdefault(record.cell.method, {}).setdefault(record.cell.label, {})
        by_axes.setdefault(json.dumps(record.cell.axes, sort_keys=True), record)
    chosen = {}
    for method, labels in found.items():
        for n, (label, own) in enumerate(labels.items()):
            same = (
                known
                for known, other in [*labels.items()][:n]
                if any(not any(differences(own[axes].spec, other[axes].spec)) for axes in own.keys() & other.keys())
            )
            chosen[method, label] = next(same, label)
    return chosen


def _rows(records: list[Record], labels: Mapping[tuple[str, str], str]) -> list[Row]:
    """The row of each record. Where one label stands for several methods or settings, these are added to it."""
    parts = []
    for record in records:
        compared = {path: text(value) for path, value in record.cell.axes.items() if path.startswith("method.")}
        label = labels[record.cell.method, record.cell.label]
        parts.append((label, record.cell.method, tuple(sorted(compared.items()))))
    rows = []
    for label, method, settings in parts:
        same = {other for other in parts if other[0] == label}
        added = []
        if len({other[1] for other in same}) > 1:
            added.append(method)
        if len({other[2] for other in same if other[1] == method}) > 1:
            added += [f"{path.removeprefix('method.')} {value}" for path, value in settings]
        rows.append(Row(method, f"{label} ({', '.join(added)})" if added else label))
    return rows


def _students_first(rows: tuple[Row, ...], cells: Mapping[tuple[str, Key], Mapping[int, Record]]) -> tuple[Row, ...]:
    """Rows that learn from no teacher, then the others: what a student reaches alone is what these are read against."""
    taught = {label for (label, _), group in cells.items() for record in group.values() if record.teacher is not None}
    return tuple(sorted(rows, key=lambda row: row.label in taught))


def _axes(records: list[Record]) -> tuple[tuple[Axis, ...], list[list[Key]]]:
    """The axes across, and for each record the columns in which it stands."""
    declared = list(
        dict.fromkeys(path for record in records for path in record.cell.axes if path.partition(".")[0] != "method")
    )

    def value_of(record: Record, path: str) -> str | None:
        return text(record.cell.axes[path]) if path in record.cell.axes else _implied(record, path, budgets)

    budgets = _budgets(records)
    values = [{path: value_of(record, path) for path in declared} for record in records]
    for path in [path for path in IMPLIED if path not in declared]:
        implied = [_implied(record, path, budgets) for record in records]
        apart: dict[tuple[str | None, ...], set[str]] = {}
        for own, value in zip(values, implied, strict=True):
            if value is not None:
                apart.setdefault(tuple(own.values()), set()).add(value)
        if any(len(found) > 1 for found in apart.values()):
            declared.append(path)
            for own, value in zip(values, implied, strict=True):
                own[path] = value
    axes = []
    for path in declared:
        found = dict.fromkeys(value for own in values if (value := own[path]) is not None)
        if len(found) > 1:
            axes.append(Axis(path, tuple(_sorted(found))))
    keys = []
    for own in values:
        several: list[Key] = [()]
        for axis in axes:
            value = own[axis.path]
            own_values = axis.values if value is None else (value,)
            several = [(*key, (axis.path, v)) for key in several for v in own_values]
        keys.append(several)
    # A cell to which an axis means nothing stands only in columns that another cell has made.
    made = {several[0] for several in keys if len(several) == 1}
    return tuple(axes), [[key for key in several if key in made] or several for several in keys]


def _implied(record: Record, path: str, budgets: Mapping[str, str]) -> str | None:
    """What a cell has on an axis that its recipe does not compare. None: nothing, such as a plain student's teacher."""
    cell = record.cell
    known: dict[str, Any] = {
        "student": cell.student,
        "teacher": cell.teacher,
        "data": cell.data,
        "target": cell.target,
        "protocol": cell.protocol,
        "epochs": budgets[record.identity],
        "steps": _own_steps(record),
        "training images": record.data.train,
        "data.fraction": _fraction(record),
    }
    first = path.partition(".")[0]
    if first in ("teacher", "target") and known[first] is None:
        return None
    if path in known:
        return None if known[path] is None else text(known[path])
    return _said(record, path)


def _said(record: Record, path: str) -> str:
    """What a record's resolved recipe has at a path of recipes; "default" where it says nothing, as of an option that
    is left to its code."""
    value: Any = record.spec if record.resolved is None else record.resolved.model_dump(mode="json")
    parts = path.split(".")
    if parts[0] == "protocol" and parts[1] in ("optimizer", "schedule"):
        # A protocol's are resolved into the stages.
        value, parts = main_stage(record), parts[1:]
    for part in parts:
        inside = value if isinstance(value, dict) else {}
        inside = (inside.get("options") or {}) | inside
        if part not in inside:
            return "default"
        value = inside[part]
    if isinstance(value, dict) and "target" in value:
        value = {"name": value.get("name"), **(value.get("options") or {})}
    return text(value)


def _fraction(record: Record) -> str | float:
    """Of the training images, all where nothing is said."""
    data = record.spec.get("data") or {}
    return data.get("fraction") or (f"({each} per class)" if (each := data.get("per_class")) else 1)


def _own_steps(record: Record) -> int:
    """Steps of a cell without those that its method takes on top of the protocol's budget."""
    budget = record.budget
    return budget.steps - (round(budget.steps * budget.extra_epochs / budget.epochs) if budget.extra_epochs else 0)


def _budgets(records: Iterable[Record]) -> dict[str, str]:
    """Identity of each record -> its budget in epochs, the same text where it is the same but for rounding."""
    epochs = {}
    for record in records:
        budget = record.budget
        share = _own_steps(record) / budget.steps if budget.steps else 1.0
        epochs[record.identity] = budget.epochs * share
    shown: dict[str, str] = {}
    first = None
    for identity, value in sorted(epochs.items(), key=lambda item: item[1]):
        first = value if first is None or value - first > SAME_BUDGET else first
        shown[identity] = text(round(first, 3))
    return shown


def _sorted(values: Iterable[str]) -> list[str]:
    """Numbers by size, other values in the order in which they first appear."""
    values = list(values)
    try:
        return sorted(values, key=float)
    except ValueError:
        return values


def _columns(axes: tuple[Axis, ...], keys: list[Key]) -> tuple[Column, ...]:
    places = {axis.path: axis for axis in axes}
    ordered = sorted(set(keys), key=lambda key: [places[path].values.index(value) for path, value in key])
    return tuple(
        Column(key, ", ".join(places[path].show(value) for path, value in key) or "accuracy") for key in ordered
    )


def _baseline(rows: tuple[Row, ...], records: list[Record], asked: str | None) -> tuple[Row, str | None]:
    if asked is not None:
        matching = [row for row in rows if row.label == asked] or [row for row in rows if row.method == asked]
        if not matching:
            hint = did_you_mean(asked, {row.method for row in rows} | {row.label for row in rows})
            raise UserError(f"the baseline '{asked}' is not among the methods", "baseline", hint)
    else:
        named = list(dict.fromkeys(record.cell.baseline for record in records if record.cell.baseline is not None))
        if not named:
            return rows[0], None
        matching = [row for row in rows if row.method in named]
        if not matching:
            lacking = f"the recipe's baseline {', '.join(named)} has no finished cell"
            return rows[0], f"{lacking}: differences are to {rows[0].label}"
        if len(named) > 1:
            several = f"the records name several baselines ({', '.join(sorted(named))})"
            return matching[0], f"{several}: differences are to {matching[0].label}"
    if len(matching) > 1:
        return matching[0], f"{len(matching)} rows are the method {matching[0].method}: the first is the baseline"
    return matching[0], None
