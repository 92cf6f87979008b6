"""The files that show a table, as texts: written after a run, and made again from the records to verify them."""

from __future__ import annotations

from collections.abc import Iterable

from kdbench.record import Record
from kdbench.results.contents import Table
from kdbench.results.latex import Form, latex
from kdbench.results.page import html
from kdbench.results.renderers import markdown, records_csv, table_csv


def texts(
    table: Table, records: Iterable[Record], charts: bool = True, form: Form = "page", label: str | None = None
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
