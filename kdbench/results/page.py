"""A comparison as one HTML page that needs nothing else: sortable tables, every number leading to its cells, curves,
costs, and where everything comes from. Byte for byte the same from the same records, in any order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from kdbench.recipe.loading import dump
from kdbench.record import Record
from kdbench.results.comparison import Comparison, compare
from kdbench.results.contents import Note, Table
from kdbench.results.curves import logs
from kdbench.results.facts import FACTS
from kdbench.results.layout import Grid, Text, layout
from kdbench.results.plots import Panel, accuracy_panels, chart, cost_panels, metric_panels, metrics_of
from kdbench.results.tuned import trials

# Nothing may be loaded, from anywhere: what the page needs is in it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
CURVES = "Test accuracy, mean over the seeds ± one deviation (band)."
METRIC = "At each hook point, mean over the seeds ± one deviation (band)."
COSTS = (
    "Mean accuracy ± one deviation (whisker). Time is one seed's own training, without evaluation; cells that train "
    "side by side share their teacher's passes."
)


def html(table: Table, records: Iterable[Record], charts: bool = True) -> str:
    """The page of a table and the records that it was built from. Records whose metrics are not beside them have no
    curve, and the page says so.

    Args:
        charts: whether to draw them, which takes a second: what is left without is what `without_charts` leaves.

    Raises:
        UserError: damaged metrics.
    """
    records = list(records)
    comparison = compare(records, table.baseline)
    log = logs(comparison, required=False)
    lacking = len(comparison.records) - len(log)
    missing = f" {lacking} of {len(comparison.records)} cells have no metrics.jsonl beside their record." * bool(
        lacking
    )

    def drawn(key: str, said: str, panels: Sequence[Panel]) -> str:
        figures = (
            f"<figure><figcaption>{escape(panel.title)}</figcaption>"
            f"{chart(comparison, panel, f'{key}-{n}') if charts else ''}</figure>"
            for n, panel in enumerate(panels)
        )
        return f'<p class="small">{said}</p>\n<div class="charts">{"".join(figures)}</div>'

    sections = [
        ("table", "Table", _tables(table)),
        ("curves", "Learning curves", drawn("curves", CURVES + missing, accuracy_panels(comparison, log))),
        *(
            (f"metric-{n}", metric.replace("_", " ").capitalize(), drawn(f"metric-{n}", METRIC + missing, panels))
            for n, metric in enumerate(metrics_of(log))
            if (panels := metric_panels(comparison, log, metric))
        ),
        ("cost", "Accuracy against time and size", drawn("cost", COSTS, cost_panels(table, comparison))),
        *([("tuning", "Tuning", _tuning(tried))] if (tried := trials(comparison)) else []),
        ("cells", "Cells", _cells(table, comparison)),
        ("provenance", "Provenance", _provenance(comparison)),
    ]
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in sections)
    bodies = "\n".join(
        f'<section id="{key}" aria-labelledby="{key}-title">\n<h2 id="{key}-title">{title}</h2>\n{body}\n</section>'
        for key, title, body in sections
    )
    title = escape(table.title or "Comparison")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n"
        f'<header>\n<h1>{title}</h1>\n<p class="sub">{escape(table.notes[0].text)}</p>\n'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n</header>\n<main>\n{bodies}\n</main>\n'
        f"<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


def without_charts(page: str) -> str:
    """A page's data. Its charts are made of the same records, and look otherwise in another version of matplotlib."""
    return re.sub(r'<svg class="chart".*?</svg>', "", page, flags=re.DOTALL)


def sort_value(text: str) -> float | None:
    """The number by which an entry is sorted: its first, whatever stands around it; None where there is none."""
    found = re.search(r"[−+-]?\d[\d,]*(?:\.\d+)?", text)
    return None if found is None else float(found[0].replace(",", "").replace("−", "-"))


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _tables(table: Table) -> str:
    grids = "\n".join(_grid(grid) for grid in layout(table))
    notes = "".join(_note(note) for note in table.notes)
    return (
        f'<p class="small hint">A click on a title sorts. A number with dots below it leads to its cells.</p>\n'
        f'<div class="grids">{grids}</div>\n'
        f'<ul class="notes">{notes}</ul>'
    )


def _grid(grid: Grid) -> str:
    heads = "".join(f'<th scope="col"><button type="button">{escape(title)}</button></th>' for title in grid.header)
    blocks = sorted({0, *grid.rules, len(grid.rows)})
    bodies = []
    for begin, end in zip(blocks, blocks[1:], strict=False):
        rows = [_row(grid, n) for n in range(begin, end)]
        bodies.append(f"<tbody>{''.join(rows)}</tbody>")
    caption = escape(grid.caption)
    return (
        f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table class="sortable">'
        f"<caption>{caption}</caption><thead><tr>{heads}</tr></thead>{''.join(bodies)}</table></div>"
    )


def _row(grid: Grid, n: int) -> str:
    first, *rest = grid.rows[n]
    if n in grid.headings:
        title = escape(first.text)
        return f'<tr class="heading"><th scope="rowgroup" colspan="{len(grid.header)}">{title}</th></tr>'
    label = escape(first.text)
    return f'<tr><th scope="row" data-value="{label}">{_entry(first)}</th>{"".join(map(_number, rest))}</tr>\n'


def _number(entry: Text) -> str:
    value = sort_value(entry.text)
    sort = "" if value is None else f' data-value="{value:g}"'
    return f"<td{sort}>{_entry(entry)}</td>"


def _entry(entry: Text) -> str:
    shown = escape(entry.text)
    if entry.bold:
        shown = f"<strong>{shown}</strong>"
    elif entry.underline:
        shown = f"<u>{shown}</u>"
    if entry.place is not None:
        shown = f'<a class="cells" href="#{_anchor(*entry.place)}">{shown}</a>'
    marks = ",".join(f'<a href="#note-{mark}">{mark}</a>' for mark in entry.marks)
    return shown + escape(entry.tail) + (f"<sup>{marks}</sup>" if marks else "")


def _note(note: Note) -> str:
    mark = f'<sup id="note-{note.mark}">{note.mark}</sup> ' if note.mark else ""
    kind = ' class="warning"' if note.warning else ""
    return f"<li{kind}>{mark}{escape(note.text)}</li>"


def _anchor(row: int, column: int) -> str:
    return f"cells-{row}-{column}"


def _tuning(tried: Sequence[Sequence[str]]) -> str:
    head = ("method", "setting", "mean", "of each seed", "")
    return (
        '<p class="small">Every setting that was tried, with its accuracy in % on the validation part.</p>\n'
        f'<div class="scroll" role="region" aria-label="Settings that were tried" tabindex="0">'
        f"{_plain_table(head, tried)}</div>"
    )


def _cells(table: Table, comparison: Comparison) -> str:
    articles = []
    for i, row in enumerate(comparison.rows):
        for j, column in enumerate(comparison.columns):
            group = comparison.cell(row, column)
            if group:
                name = row.label + (f" · {column.label}" if comparison.axes else "")
                articles.append(_article(_anchor(i, j), name, list(group.values())))
    return "\n".join(articles)


def _article(anchor: str, name: str, records: list[Record]) -> str:
    """All that is known of the cells behind one number."""
    head = ("seed", "last", "best", "at step", "training s", "images/s", "folder", "identity")
    rows = [
        (
            str(record.cell.seed),
            f"{record.result.test.last:.2f}",
            f"{record.result.test.best:.2f}",
            f"{record.result.test.best_step:,}",
            f"{record.compute.training_seconds or record.compute.seconds:,.1f}",
            f"{record.compute.images_per_second:,.1f}",
            record.folder.name if record.folder is not None else "–",
            record.identity[:12],
        )
        for record in records
    ]
    first = records[0]
    budget = f"{first.budget.steps:,} steps, {first.budget.epochs:g} epochs"
    budget += f" ({', '.join(f'{s.name} {s.steps:,}' for s in first.budget.stages)})" if first.budget.stages else ""
    facts = [
        ("Method", f"{first.cell.label} ({first.cell.method})"),
        ("Student", f"{first.cell.student}, {first.models.student.parameters:,} parameters"),
        ("Budget", budget),
    ]
    spec = {key: value for key, value in first.spec.items() if key != "seed"}
    return (
        f'<article id="{anchor}" aria-labelledby="{anchor}-title">\n<h3 id="{anchor}-title">{escape(name)}'
        f'<a href="#table">to the table</a></h3>\n'
        f'<div class="scroll" role="region" aria-label="Seeds of {escape(name)}" tabindex="0">'
        f"{_plain_table(head, rows)}</div>\n{_list(facts)}\n"
        f"<details><summary>Provenance and resolved recipe</summary>{_list(_facts(records))}"
        f"<pre>{escape(dump(spec))}</pre></details>\n</article>"
    )


def _plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    titles = "".join(f'<th scope="col" class="plain">{title}</th>' for title in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{escape(entry)}</td>" for entry in row[1:])}</tr>'
        for row in rows
    )
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def _list(facts: Iterable[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in facts)}</dl>"


def _facts(records: Sequence[Record]) -> list[tuple[str, str]]:
    """What the cells were made with; several values where they differ."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        compute = record.compute
        for name, value in (
            ("Recipe", record.recipe),
            *((name, say(record, None)) for name, say in FACTS.items()),
            ("Platform", f"Python {compute.python}, {compute.platform}"),
        ):
            if value:
                found.setdefault(name, {})[value] = None
    return [(name, "; ".join(values)) for name, values in found.items()]


def _provenance(comparison: Comparison) -> str:
    records = comparison.records
    seeds = sorted({record.cell.seed for record in records})
    facts = [("Cells", f"{len(records)}, seeds {', '.join(map(str, seeds))}"), *_facts(records)]
    return (
        "<p>Every measured number above is made from the records of these cells, and nothing else: "
        "<code>kdbench table FOLDER --out FOLDER</code>, with the options that it had, makes this page again.</p>\n"
        + _list(facts)
    )
