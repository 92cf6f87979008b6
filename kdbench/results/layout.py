"""A table as grids of text. Markdown, LaTeX, the page and the terminal show the same grids, so that they agree."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from kdbench.results.contents import Entry, MethodRow, Table
from kdbench.results.copied import DAGGER, CopiedCell, CopiedRow
from kdbench.results.statistics import MOST_SEEDS, Summary
from kdbench.results.tuned import setting_text

ABSENT = "–"
# Numbers beside the accuracy on the test part, as a record names them.
ALSO = {
    "source": "on the source",
    "teacher": "teacher that trained with it",
    "trained_on": "classes trained on here",
    "others": "other classes",
    "balanced_accuracy": "balanced accuracy",
    "top5": "top-5",
    "calibration_error": "calibration error",
    "fidelity": "same answer as the teacher",
}


@dataclass(frozen=True)
class Text:
    """One entry.

    `tail`: what follows, never bold or underlined. `marks`: letters of the notes that belong to it. `place`: row and
    column of the table whose cells the entry is of.
    """

    text: str
    bold: bool = False
    underline: bool = False
    tail: str = ""
    marks: tuple[str, ...] = ()
    place: tuple[int, int] | None = None


@dataclass(frozen=True)
class Grid:
    """The first column is text, aligned left; all others are numbers, aligned right.

    `rules`: indices of the rows that a line separates from the row above. `headings`: rows that hold only a first
    entry, the title of the rows below.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Text, ...], ...]
    rules: frozenset[int] = frozenset()
    headings: frozenset[int] = frozenset()


def layout(table: Table) -> list[Grid]:
    """Accuracies (with the differences where there is one column), differences, methods across the columns, accuracies
    beside these, and details."""
    grids = [_single(table)] if len(table.columns) == 1 else [_accuracies(table), _differences(table), _across(table)]
    return [grid for grid in (*grids, _also(table), _details(table)) if grid.rows]


def seeds_text(needed: int | None) -> str | None:
    """Number of seeds as text, ">1000" above the largest."""
    return None if needed is None else f">{MOST_SEEDS}" if needed > MOST_SEEDS else str(needed)


def _single(table: Table) -> Grid:
    teachers = [(Text(f"teacher {t.name}"), Text(_percent(t.accuracies[0])), *_empty(5)) for t in table.teachers]
    rows: list[tuple[Text, ...]] = list(teachers)
    for i, row in enumerate(table.rows):
        cell = row.cells[0]
        compared = [Text("")] * 4 if row.is_baseline else _difference(cell)
        rows.append((Text(row.label), _accuracy(cell, (i, 0)), Text(str(cell.n) if cell else ABSENT), *compared))
    header: tuple[str, ...] = (
        "method",
        f"accuracy, {table.metric_label}",
        "n",
        f"difference to {table.baseline}",
        "95 % interval",
        "p",
        "seeds needed",
    )
    if all(row.cells[0] is None or row.cells[0].difference is None for row in table.rows):
        header, rows = header[:3], [row[:3] for row in rows]
    rules = frozenset({len(teachers)} - {0})
    return _with_copied(table, Grid(f"Accuracy, {table.metric_label}", header, tuple(rows), rules))


def _accuracies(table: Table) -> Grid:
    teachers = [(Text(f"teacher {t.name}"), *(Text(_percent(value)) for value in t.accuracies)) for t in table.teachers]
    rows = [
        (Text(row.label), *(_accuracy(c, (i, j), f" ({c.n})" if c else "") for j, c in enumerate(row.cells)))
        for i, row in enumerate(table.rows)
    ]
    caption = f"Accuracy, {table.metric_label}: mean ± deviation (n)"
    header = ("method", *(column.label for column in table.columns))
    return _with_copied(table, Grid(caption, header, (*teachers, *rows), frozenset({len(teachers)} - {0})))


def _with_copied(table: Table, grid: Grid) -> Grid:
    """The grid with a block for each published table below it."""
    rows, rules, headings = list(grid.rows), set(grid.rules), set(grid.headings)
    across = len(grid.header) - 1
    for source in dict.fromkeys(row.source for row in table.copied):
        rules.add(len(rows))
        headings.add(len(rows))
        rows.append((Text(f"copied{DAGGER}: {source}"), *_empty(across)))
        for row in table.copied:
            if row.source == source:
                entries = _copied_entries(table, row)
                rows.append((Text(row.label), *entries, *_empty(across - len(entries))))
    return replace(grid, rows=tuple(rows), rules=frozenset(rules), headings=frozenset(headings))


def _copied_entries(table: Table, row: CopiedRow) -> list[Text]:
    def entry(cell: CopiedCell | None, tail: str = "") -> Text:
        if cell is None:
            return Text(ABSENT)
        return Text(_spread(cell), tail=f"{DAGGER}{tail}", marks=cell.marks)

    if len(table.columns) > 1:
        return [entry(cell, f" ({cell.runs})" if cell and cell.runs else "") for cell in row.cells]
    cell = row.cells[0]
    n = "" if row.method is None or cell is None else str(cell.runs) if cell.runs else ABSENT
    return [entry(cell), Text(n)]


def _across(table: Table) -> Grid:
    """Average ranks and probabilities of improvement; no rows where there is nothing to sum up."""
    found = table.across
    if found is None:
        return Grid("", ("",), ())
    ranked = bool(found.columns)
    rows = []
    for one in found.standings:
        better = one.improvement
        share, interval = (ABSENT if better is None else f"{better.probability:.2f}"), ABSENT
        if better is not None and better.low is not None and better.high is not None:
            interval = f"[{better.low:.2f}, {better.high:.2f}]"
        if better is None and one.label == table.baseline:
            share = interval = ""
        rank = [Text(ABSENT if one.rank is None else f"{one.rank:.2f}")] if ranked else []
        rows.append((Text(one.label), *rank, Text(share), Text(interval)))
    improvement = f"probability of improvement over {table.baseline}"
    header = ("method", *(["average rank"] if ranked else []), improvement, "95 % interval")
    return Grid(f"Across the {len(table.columns)} columns", header, tuple(rows))


def _differences(table: Table) -> Grid:
    def entries(row: MethodRow, cell: Entry, place: tuple[int, int]) -> list[Text]:
        if cell.difference is None:
            return []
        first, *others = _difference(cell)
        return [Text(str(cell.difference.n)), replace(first, place=place), *others]

    header = ("n", f"difference to {table.baseline}", "95 % interval", "p", "seeds needed")
    return _blocks(table, f"Differences to {table.baseline}", header, entries)


def _also(table: Table) -> Grid:
    """Accuracies on other images or of other networks, and what was asked for; no rows where there are none."""

    def entries(row: MethodRow, cell: Entry, place: tuple[int, int]) -> list[Text]:
        shown = [cell.also.get(name) for name in table.also]
        return [Text(ABSENT if found is None else _spread(found)) for found in shown] if cell.also else []

    header = tuple(ALSO.get(name, name) for name in table.also)
    return _blocks(table, "Also measured, last step: mean ± deviation", header, entries)


def _details(table: Table) -> Grid:
    """Tuned settings, metrics of the losses, and what a method costs beyond the protocol's budget and in time."""
    cells = [cell for row in table.rows for cell in row.cells if cell is not None]
    extra = any(cell.budget.extra_epochs for cell in cells)
    tuned = any(cell.tuning is not None for cell in cells)

    def entries(row: MethodRow, cell: Entry, place: tuple[int, int]) -> list[Text]:
        shown = [ABSENT if cell.tuning is None else setting_text(cell.tuning.chosen)] if tuned else []
        shown += [f"+{cell.budget.extra_epochs:g}" if cell.budget.extra_epochs else "0"] if extra else []
        for measure in table.measures:
            means = [cell.numbers.get(f"{measure.metric}.{point}") for point in measure.points]
            shown += [ABSENT if found is None else measure.show(found.mean) for found in means]
        seconds = f"{cell.seconds:,.0f}" if cell.seconds >= 100 else f"{cell.seconds:.1f}"
        return [*map(Text, shown), Text(seconds, place=place)]

    header = (["tuned setting"] if tuned else []) + (["extra epochs"] if extra else [])
    captions = []
    for measure in table.measures:
        # ".preact" of layer1.preact, layer2.preact is said once.
        suffixes = {point.partition(".")[2] for point in measure.points}
        suffix = suffixes.pop() if len(suffixes) == 1 else ""
        captions.append(measure.title + (f" (at {suffix} of each layer)" if suffix else ""))
        header += [f"{measure.title} {point.removesuffix(f'.{suffix}')}" for point in measure.points]
    caption = ", ".join((["tuned setting"] if tuned else []) + captions)
    caption = f"{caption[:1].upper()}{caption[1:]} and cost" if caption else "Cost"
    return _blocks(table, caption, (*header, "training seconds"), entries)


def _blocks(
    table: Table,
    caption: str,
    header: tuple[str, ...],
    entries: Callable[[MethodRow, Entry, tuple[int, int]], list[Text]],
) -> Grid:
    """One block of rows for each column of the table, headed by the column where there are several.

    Where a cell has no entries, its row is left out.
    """
    rows: list[tuple[Text, ...]] = []
    rules, headings = set(), set()
    for i, column in enumerate(table.columns):
        block = [
            (Text(row.label), *found)
            for k, row in enumerate(table.rows)
            if (cell := row.cells[i]) is not None and (found := entries(row, cell, (k, i)))
        ]
        if block and len(table.columns) > 1:
            rules.add(len(rows))
            headings.add(len(rows))
            rows.append((Text(column.label), *_empty(len(header))))
        rows += block
    return Grid(caption, ("method", *header), tuple(rows), frozenset(rules - {0}), frozenset(headings))


def _accuracy(cell: Entry | None, place: tuple[int, int], tail: str = "") -> Text:
    if cell is None:
        return Text(ABSENT)
    return Text(_spread(cell), cell.best, cell.second, tail, cell.marks, place)


def _difference(cell: Entry | None) -> list[Text]:
    """Difference, its interval, its p value and the number of seeds needed."""
    found = cell.difference if cell is not None else None
    if found is None:
        return [Text(ABSENT)] * 4
    interval = ABSENT if found.low is None or found.high is None else f"[{_signed(found.low)}, {_signed(found.high)}]"
    p = ABSENT if found.p_holm is None else "<0.001" if found.p_holm < 0.001 else f"{found.p_holm:.3f}"
    return [Text(_signed(found.mean)), Text(interval), Text(p), Text(seeds_text(found.seeds_needed) or ABSENT)]


def _empty(count: int) -> list[Text]:
    return [Text("")] * count


def _spread(found: Entry | CopiedCell | Summary) -> str:
    return f"{found.mean:.2f}" + ("" if found.deviation is None else f" ± {found.deviation:.2f}")


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"


def _signed(value: float) -> str:
    """With a sign, the typographic minus; zero has none."""
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")
