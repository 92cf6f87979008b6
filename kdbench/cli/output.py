"""Tables on the terminal."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from kdbench.cli.console import page, show
from kdbench.verify import sums

if TYPE_CHECKING:
    from kdbench.results.contents import Table
    from kdbench.results.layout import Text as Entry


def prepare() -> None:
    """Import meanwhile what writing will need, which takes seconds."""

    def load() -> None:
        import kdbench.results.writing  # noqa: F401

    Thread(target=load, daemon=True).start()


def write_tables(folders: list[Path], out: Path, failed: list[str]) -> None:
    """Write the table of finished cells in every form, draw the plots, print it, and say where everything is."""
    from kdbench.results.writing import write_tables_and_plots

    table, files = write_tables_and_plots(folders, out, failed)
    files.append(sums.write(out))
    print_table(table)
    print(f"written to {out}: {', '.join(file.name for file in files)}")


def print_table(table: Table) -> None:
    """The table on the terminal: what the Markdown file holds, in columns."""
    from kdbench.results.layout import layout

    console = page()
    console.print(Text(table.title, style="bold"))
    for grid in layout(table):
        shown = RichTable(title=grid.caption or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for index, header in enumerate(grid.header):
            shown.add_column(header, justify="left" if index == 0 else "right")
        for index, row in enumerate(grid.rows):
            if index in grid.rules:
                shown.add_section()
            shown.add_row(*(_entry(entry) for entry in row), style="bold" if index in grid.headings else None)
        show(console, shown)
    for note in table.notes:
        mark = f"{note.mark}: " if note.mark else ""
        console.print(Text(f"  {mark}{note.text}", style="yellow" if note.warning else "dim"))


def _entry(entry: Entry) -> Text:
    style = "bold" if entry.bold else "underline" if entry.underline else ""
    marks = f" {','.join(entry.marks)}" if entry.marks else ""
    return Text.assemble((entry.text, style), entry.tail + marks)
