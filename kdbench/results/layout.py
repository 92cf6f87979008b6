"""A table as grids of text. Markdown, LaTeX and the terminal show the same grids, so that they agree."""

from __future__ import annotations

from dataclasses import dataclass

from kdbench.results.copied import DAGGER, CopiedCell, CopiedRow
from kdbench.results.tables import Cell, Table, seeds_text

ABSENT = "–"
# Accuracies beside the one on the test part, as a record names them.
ALSO = {
    "source": "on the source",
    "teacher": "teacher that trained with it",
    "trained_on": "classes trained on here",
    "others": "other classes",
    "top5": "top-5",
    "calibration_error": "calibration error",
    "fidelity": "same answer as the teacher",
}


@dataclass(frozen=True)
class Text:
    """One entry. `tail`: what follows, never bold or underlined. `marks`: letters of the notes that belong to it.
    `place`: row and column of the table whose runs the entry is of."""

    text: str
    bold: bool = False
    underline: bool = False
    tail: str = ""
    marks: tuple[str, ...] = ()
    place: tuple[int, int] | None = None


@dataclass(frozen=True)
class Grid:
    """The first column is text, aligned left; all others are numbers, aligned right. `rules`: indices of the rows that
    a line separates from the row above. `headings`: rows that hold only a first entry, the title of the rows below."""

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


def accuracy(cell: Cell | None) -> str:
    """Mean ± deviation, with the sign of a missing value where there is none."""
    return ABSENT if cell is None else _spread(cell.mean, cell.deviation)


def difference(cell: Cell | None) -> tuple[str, str, str, str]:
    """Difference, its interval, its p value and the number of seeds needed, as texts."""
    found = cell.difference if cell is not None else None
    if found is None:
        return ABSENT, ABSENT, ABSENT, ABSENT
    interval = ABSENT if found.low is None or found.high is None else f"[{_signed(found.low)}, {_signed(found.high)}]"
    p = ABSENT if found.p_holm is None else "<0.001" if found.p_holm < 0.001 else f"{found.p_holm:.3f}"
    return _signed(found.mean), interval, p, seeds_text(found.seeds_needed) or ABSENT


def common_suffix(points: tuple[str, ...]) -> str:
    """ ".preact" of layer1.preact, layer2.preact; "" where they have none in common."""
    suffixes = {point.partition(".")[2] for point in points}
    suffix = suffixes.pop() if len(suffixes) == 1 else ""
    return f".{suffix}" if suffix else ""


def _single(table: Table) -> Grid:
    rows: list[tuple[Text, ...]] = [
        (Text(f"teacher {teacher.name}"), Text(_percent(teacher.accuracies[0])), *[Text("")] * 5)
        for teacher in table.teachers
    ]
    rules = frozenset({len(rows)} if rows else ())
    for i, row in enumerate(table.rows):
        cell = row.cells[0]
        compared = ("", "", "", "") if row.is_baseline else difference(cell)
        n = Text(str(cell.n) if cell else ABSENT)
        rows.append((Text(row.label), _entry(cell, (i, 0)), n, *map(Text, compared)))
    header: tuple[str, ...] = (
        "method",
        f"accuracy, {table.metric_label}",
        "n",
        f"difference to {table.baseline}",
        "95 % interval",
        "p",
        "seeds needed",
    )
    if all(row.cells[0] is None or row.is_baseline or row.cells[0].difference is None for row in table.rows):
        header, rows = header[:3], [row[:3] for row in rows]
    return _with_copied(table, Grid(f"Accuracy, {table.metric_label}", header, tuple(rows), rules))


def _accuracies(table: Table) -> Grid:
    rows: list[tuple[Text, ...]] = [
        (Text(f"teacher {teacher.name}"), *(Text(_percent(value)) for value in teacher.accuracies))
        for teacher in table.teachers
    ]
    rules = frozenset({len(rows)} if rows else ())
    rows += [
        (Text(row.label), *(_entry(cell, (i, j), f" ({cell.n})" if cell else "") for j, cell in enumerate(row.cells)))
        for i, row in enumerate(table.rows)
    ]
    return _with_copied(
        table,
        Grid(
            f"Accuracy, {table.metric_label}: mean ± deviation (n)",
            ("method", *(column.label for column in table.columns)),
            tuple(rows),
            rules,
        ),
    )


def _with_copied(table: Table, grid: Grid) -> Grid:
    """The grid with a block for each published table below it."""
    rows, rules, headings = list(grid.rows), set(grid.rules), set(grid.headings)
    across = len(grid.header) - 1
    for source in dict.fromkeys(row.source for row in table.copied):
        rules.add(len(rows))
        headings.add(len(rows))
        rows.append((Text(f"copied{DAGGER}: {source}"), *[Text("")] * across))
        for row in table.copied:
            if row.source == source:
                rows.append((Text(row.label), *_copied_entries(table, row, across)))
    return Grid(grid.caption, grid.header, tuple(rows), frozenset(rules), frozenset(headings))


def _copied_entries(table: Table, row: CopiedRow, across: int) -> list[Text]:
    if len(table.columns) > 1:
        return [
            Text(ABSENT) if cell is None else _copied_entry(cell, f" ({cell.runs})" if cell.runs else "")
            for cell in row.cells
        ]
    cell = row.cells[0]
    if cell is None:
        return [Text(ABSENT), *[Text("")] * (across - 1)]
    n = "" if row.method is None else str(cell.runs) if cell.runs else ABSENT
    return [_copied_entry(cell), Text(n), *[Text("")] * (across - 2)]


def _copied_entry(cell: CopiedCell, tail: str = "") -> Text:
    return Text(_spread(cell.mean, cell.deviation), tail=f"{DAGGER}{tail}", marks=cell.marks)


def _across(table: Table) -> Grid:
    """Average ranks and probabilities of improvement; no rows where there is nothing to sum up."""
    found = table.across
    if found is None:
        return Grid("", ("",), ())
    ranked = bool(found.columns)
    rows = []
    for one in found.standings:
        better = one.improvement
        share = ABSENT if better is None else f"{better.probability:.2f}"
        interval = (
            ABSENT
            if better is None or better.low is None or better.high is None
            else f"[{better.low:.2f}, {better.high:.2f}]"
        )
        if better is None and one.label == table.baseline:
            share = interval = ""
        rank = [Text(ABSENT if one.rank is None else f"{one.rank:.2f}")] if ranked else []
        rows.append((Text(one.label), *rank, Text(share), Text(interval)))
    header = (
        "method",
        *(["average rank"] if ranked else []),
        f"probability of improvement over {table.baseline}",
        "95 % interval",
    )
    return Grid(f"Across the {len(table.columns)} columns", header, tuple(rows))


def _differences(table: Table) -> Grid:
    blocks = [
        [
            (
                Text(row.label),
                Text(str(cell.difference.n)),
                *(Text(text, place=(k, i) if n == 0 else None) for n, text in enumerate(difference(cell))),
            )
            for k, row in enumerate(table.rows)
            if not row.is_baseline and (cell := row.cells[i]) is not None and cell.difference is not None
        ]
        for i in range(len(table.columns))
    ]
    header = ("method", "n", f"difference to {table.baseline}", "95 % interval", "p", "seeds needed")
    return _blocks(table, f"Differences to {table.baseline}", header, blocks)


def _also(table: Table) -> Grid:
    """Accuracies on other images or of other networks; no rows where there are none."""
    blocks = [
        [
            (
                Text(row.label),
                *(Text(_spread(*cell.also[name]) if name in cell.also else ABSENT) for name in table.also),
            )
            for row in table.rows
            if (cell := row.cells[i]) is not None and cell.also
        ]
        for i in range(len(table.columns))
    ]
    header = ("method", *(ALSO.get(name, name) for name in table.also))
    return _blocks(table, "Other accuracies, last step: mean ± deviation", header, blocks)


def _details(table: Table) -> Grid:
    suffix = common_suffix(table.agreement)
    extra = any(cell is not None and cell.extra_epochs for row in table.rows for cell in row.cells)
    header = (
        "method",
        *(["extra epochs"] if extra else []),
        *(f"agreement {point.removesuffix(suffix)}" for point in table.agreement),
        "seconds",
    )
    blocks = [
        [
            (
                Text(row.label),
                *([Text(f"+{cell.extra_epochs:g}" if cell.extra_epochs else "0")] if extra else []),
                *(
                    Text(f"{100 * cell.agreement[point]:.1f} %" if point in cell.agreement else ABSENT)
                    for point in table.agreement
                ),
                Text(f"{cell.seconds:,.0f}" if cell.seconds >= 100 else f"{cell.seconds:.1f}", place=(k, i)),
            )
            for k, row in enumerate(table.rows)
            if (cell := row.cells[i]) is not None
        ]
        for i in range(len(table.columns))
    ]
    at = f" (at {suffix[1:]} of each layer)" if suffix else ""
    return _blocks(table, f"Agreement with the teacher{at} and cost" if table.agreement else "Cost", header, blocks)


def _blocks(table: Table, caption: str, header: tuple[str, ...], blocks: list[list[tuple[Text, ...]]]) -> Grid:
    """One block of rows for each column of the table, headed by the column where there are several."""
    rows: list[tuple[Text, ...]] = []
    rules, headings = set(), set()
    for column, block in zip(table.columns, blocks, strict=True):
        if block and len(table.columns) > 1:
            rules.add(len(rows))
            headings.add(len(rows))
            rows.append((Text(column.label), *[Text("")] * (len(header) - 1)))
        rows += block
    return Grid(caption, header, tuple(rows), frozenset(rules - {0}), frozenset(headings))


def _entry(cell: Cell | None, place: tuple[int, int], tail: str = "") -> Text:
    return Text(ABSENT) if cell is None else Text(accuracy(cell), cell.best, cell.second, tail, cell.marks, place)


def _spread(mean: float, deviation: float | None) -> str:
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"


def _signed(value: float) -> str:
    """With a sign, the typographic minus; zero has none."""
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")
