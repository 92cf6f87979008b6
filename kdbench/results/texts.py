"""The files that show a table, as texts: written after a run, and made again from the records to verify them."""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import get_args

from kdbench.errors import counted
from kdbench.record import Record
from kdbench.results.contents import Table
from kdbench.results.copied import DAGGER
from kdbench.results.facts import ranged
from kdbench.results.frames import records_csv, table_csv
from kdbench.results.latex import ROWS, LatexForm, for_page, label_of
from kdbench.results.layout import ABSENT, layout
from kdbench.results.page import html
from kdbench.results.rendering import rendered

# Notes that begin so say what a sign in the table means.
SIGNS = (f"{DAGGER}:", f"{ABSENT}:")


def markdown(table: Table) -> str:
    """GitHub Markdown: every grid, then the notes as a list."""
    return rendered("table.md", table=table, grids=layout(table))


def latex(table: Table, form: LatexForm = "page", label: str | None = None) -> str:
    """LaTeX that compiles as it stands: every grid as a table of its own, then what letters and signs in it mean, and
    warnings.

    All other notes are in a macro: an author takes them or leaves them.

    Args:
        label: by which the text refers to it; of the title where absent.
    """
    title = table.title or "Comparison"
    grids = list(for_page(layout(table), form))
    label = label or label_of(title)
    grids[0] = replace(grids[0], caption=f"{grids[0].caption}. {in_short(table)}")
    needed = [note for note in table.notes if note.mark or note.warning or note.text.startswith(SIGNS)]
    notes = [note for note in table.notes if note not in needed]
    values = {"title": title, "label": label, "grids": grids, "form": form, "float_rows": ROWS}
    return rendered("table.tex", needed=needed, notes=notes, **values)


def in_short(table: Table) -> str:
    """What a caption says of the accuracies: spread, seeds and budget without what methods take beyond it."""
    cells = [cell for row in table.rows for cell in row.cells if cell is not None]
    counts = sorted({cell.n for cell in cells})
    epochs = sorted({round(cell.budget.epochs - cell.budget.extra_epochs, 3) for cell in cells})
    seeds = "One seed" if counts == [1] else f"± is the sample standard deviation, n = {ranged(counts)} seeds"
    return f"{seeds}, {f'{epochs[0]:g} to ' if len(epochs) > 1 else ''}{counted(epochs[-1], 'epoch', 'g')}"


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
