"""Records put in order: which cells stand in which row and column, and which of them belong together as seeds.

Nothing here depends on the order in which the records come. Cells that are different experiments are never pooled.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kdbench.errors import UserError, did_you_mean
from kdbench.recipe.specs import recorded
from kdbench.record import Metric, Record

# Parts of a resolved recipe that change no number, or that differ between the cells of a row on purpose.
_NAMES_ONLY = {"label", "root", "file", "url", "accuracy", "shares", "keep"}

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
        return [record for _, own, record in self.places() if own == column]


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
    rows = _rows(ordered)
    axes, keys = _axes(ordered)
    columns = _columns(axes, [key for several in keys for key in several])
    cells: dict[tuple[str, Key], dict[int, Record]] = {}
    for record, row, several in zip(ordered, rows, keys, strict=True):
        for key in several:
            group = cells.setdefault((row.label, key), {})
            for other in (group.get(record.cell.seed), next(iter(group.values()), None)):
                if other is not None:
                    _check_same(row, other, record)
                    _check_made_alike(other, record)
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


def text(value: Any) -> str:
    """A compared value as text: a mapping by its name and its other entries, a float without noise."""
    if isinstance(value, Mapping):
        rest = [f"{key} {text(part)}" for key, part in value.items() if key != "name"]
        return ", ".join([*([str(value["name"])] if "name" in value else []), *rest])
    if isinstance(value, list | tuple):
        return ", ".join(text(part) for part in value)
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted paths at which two resolved recipes differ in what affects numbers; the seed does not count."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            if key not in _NAMES_ONLY and (path or key != "seed"):
                yield from differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif a != b:
        yield path, a, b


def recipe_order(records: Iterable[Record]) -> list[Record]:
    """Records in the order of the recipe, the same whatever order they come in."""
    return sorted(records, key=_order)


def _order(record: Record) -> tuple[Any, ...]:
    cell = record.cell
    return (
        record.recipe,
        cell.order if cell.order is not None else 0,
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
            _check_made_alike(first, record)
            copies += 1
            different += first.result != record.result
    notes = []
    if copies:
        but = f"; {different} of them with other results" if different else ""
        notes.append(f"{copies} cell{' is' if copies == 1 else 's are'} twice among the records{but}: one is used")
    return list(kept.values()), notes


def _rows(records: list[Record]) -> list[Row]:
    """The row of each record. Where one label stands for several methods or settings, these are added to it."""
    parts = []
    for record in records:
        compared = {path: text(value) for path, value in record.cell.axes.items() if path.startswith("method.")}
        parts.append((record.cell.label, record.cell.method, tuple(sorted(compared.items()))))
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
    by_recipe: dict[str, set[str]] = {}
    for record in records:
        by_recipe.setdefault(record.recipe, set()).update(record.cell.axes)

    # None: the axis means nothing to the cell. An axis that its recipe does not compare has a value all the same.
    def value_of(record: Record, path: str) -> str | None:
        if path in record.cell.axes:
            return text(record.cell.axes[path])
        return None if path in by_recipe[record.recipe] else _implied(record, path)

    values = [{path: value_of(record, path) for path in declared} for record in records]
    for path in ("student", "teacher", "data", "target", "protocol", "epochs", "training images"):
        implied = [_implied(record, path) for record in records]
        apart: dict[tuple[str | None, ...], set[str]] = {}
        for own, value in zip(values, implied, strict=True):
            if value is not None:
                apart.setdefault(tuple(own.values()), set()).add(value)
        if path not in declared and any(len(found) > 1 for found in apart.values()):
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


def _implied(record: Record, path: str) -> str | None:
    """What a cell has on an axis that its recipe does not compare. None: nothing, such as a plain student's teacher."""
    cell, budget = record.cell, record.budget
    known: dict[str, Any] = {
        "student": cell.student,
        "teacher": cell.teacher,
        "data": cell.data,
        "target": cell.target,
        "protocol": cell.protocol,
        "epochs": round(budget.epochs - budget.extra_epochs, 3),
        "training images": record.data.train,
    }
    if path in known:
        return None if known[path] is None else text(known[path])
    value: Any = record.spec
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return "default" if value is None else text(value)


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
        matching = [row for row in rows if row.method in named or row.label in named]
        if not matching:
            lacking = f"the recipe's baseline {', '.join(named)} has no finished cell"
            return rows[0], f"{lacking}: differences are to {rows[0].label}"
        if len(named) > 1:
            several = f"the records name several baselines ({', '.join(sorted(named))})"
            return matching[0], f"{several}: differences are to {matching[0].label}"
    if len(matching) > 1:
        return matching[0], f"{len(matching)} rows are the method {matching[0].method}: the first is the baseline"
    return matching[0], None


def _check_same(row: Row, a: Record, b: Record) -> None:
    """Refuse to pool different experiments, or to have two values for one seed."""
    # A field that came with a later version is absent from older records.
    drift = a.kdbench != b.kdbench
    own, other = a.spec, b.spec
    if any(differences(own, other)):
        # With what one leaves out as a default, and own code by its content.
        own, other = (one.spec if one.resolved is None else recorded(one.resolved) for one in (a, b))
    found = [(path, x, y) for path, x, y in differences(own, other) if not (drift and (x is None or y is None))]
    if not found and a.cell.seed != b.cell.seed:
        return
    shown = "; ".join(f"{path} ({text(x)} and {text(y)})" for path, x, y in found[:3])
    shown += "; …" if len(found) > 3 else ""
    seeds = f"seed {a.cell.seed}" if a.cell.seed == b.cell.seed else f"seeds {a.cell.seed} and {b.cell.seed}"
    raise UserError(
        f"two cells of '{row.label}', {seeds}, would share one place in the table, but are different experiments"
        + (f": {shown}" if shown else ""),
        where=" and ".join(str(record.folder or record.identity[:8]) for record in (a, b)),
        hint="give the folders of one comparison, or take one of the two out",
    )


def _check_made_alike(a: Record, b: Record) -> None:
    """Refuse to average over, or to take for one cell, what was made from different data or by different teachers of
    one name."""
    for what, kept, digest in (
        ("data", "fingerprint", lambda record: {p.name: p.fingerprint for p in (record.data, record.target) if p}),
        ("teacher", "sha256", lambda record: {p.name: p.sha256 for p in (record.teacher,) if p}),
    ):
        found: list[dict[str, str]] = [digest(record) for record in (a, b)]
        for name in found[0].keys() & found[1].keys():
            if found[0][name] != found[1][name]:
                raise UserError(
                    f"two cells of '{a.cell.label}', seeds {a.cell.seed} and {b.cell.seed}, were made from different "
                    f"{what} '{name}', so no mean is taken over them: {kept} {found[0][name][:12]} and "
                    f"{found[1][name][:12]}",
                    where=" and ".join(str(record.folder or record.identity[:8]) for record in (a, b)),
                    hint="give the folders of one comparison, or take one of the two out: of a run, remove its folder, "
                    "and 'kdbench run' trains it again",
                )
