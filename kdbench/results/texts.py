"""The files that show a table, as texts: written after a run, and made again from the records to verify them."""

import re
from collections.abc import Iterable
from typing import get_args

from kdbench.record import Record
from kdbench.results.contents import Table
from kdbench.results.frames import records_csv, table_csv
from kdbench.results.latex import ROWS, LatexForm, for_page, label_of
from kdbench.results.layout import layout
from kdbench.results.page import html
from kdbench.results.rendering import rendered


def markdown(table: Table) -> str:
    """GitHub Markdown: every grid, then the notes as a list."""
    return rendered("table.md", table=table, grids=layout(table))


def latex(table: Table, form: LatexForm = "page", label: str | None = None) -> str:
    """LaTeX that compiles as it stands: every grid as a table of its own, then the notes.

    Args:
        label: by which the text refers to it; of the title where absent.
    """
    title = table.title or "Comparison"
    grids = list(for_page(layout(table), form))
    label = label or label_of(title)
    return rendered("table.tex", table=table, title=title, label=label, grids=grids, form=form, float_rows=ROWS)


def latex_forms(table: Table, text: str) -> list[str]:
    """A table in every form that LaTeX can have it in, with the label that a text gives it."""
    label = re.search(r"\\label\{([\w:.-]+)\}", text, re.ASCII)
    return [latex(table, form, label[1] if label else None) for form in get_args(LatexForm)]


def texts(
    table: Table, records: Iterable[Record], charts: bool = True, form: LatexForm = "page", label: str | None = None
) -> dict[str, str]:
    """File name -> content. The same from the same records, byte for byte.

    Args:
        charts: whether the page has them. form, label: of the LaTeX tables.
    """
    records = list(records)
    return {
        "table.md": markdown(table),
        "table.csv": table_csv(table),
        "table.tex": latex(table, form, label),
        "table.html": html(table, records, charts),
        "records.csv": records_csv(records),
    }
