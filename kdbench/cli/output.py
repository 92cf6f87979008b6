"""Tables on the terminal and as files, and plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from kdbench.cli.console import page, show
from kdbench.errors import UserError
from kdbench.files import RECORD, write_text
from kdbench.record import Record, read_record, read_records
from kdbench.verify import sums

if TYPE_CHECKING:
    from kdbench.results.contents import Table
    from kdbench.results.latex import LatexForm
    from kdbench.results.layout import Text as Entry


def prepare() -> None:
    """Import meanwhile what writing will need, which takes seconds."""

    def load() -> None:
        import kdbench.results.page
        import kdbench.results.texts  # noqa: F401

    Thread(target=load, daemon=True).start()


def write_tables(folders: list[Path], out: Path, failed: list[str]) -> None:
    """Write the table of finished cells in every form, draw the plots, print it, and say where everything is."""
    table, files = write_tables_and_plots(folders, out, failed)
    files.append(sums.write(out))
    print_table(table)
    print(f"written to {out}: {', '.join(file.name for file in files)}")


def write_tables_and_plots(folders: list[Path], out: Path, missing: list[str]) -> tuple[Table, list[Path]]:
    """The table of finished cells, which names the missing ones, and all files of it that were written."""
    from kdbench.results.tables import build

    records = read_records(folders)
    table = build(records, unfinished=missing)
    files = [*write_files(table, out, records), *write_plots(records, out)]
    remove_old_plots(out, files, out)
    return table, files


def renew_tables(run: Path, folder: Path, missing: list[str]) -> None:
    """Write table and plots of the records in the copy of a run anew. LaTeX in a form that the user chose stays so."""
    from kdbench.results.texts import latex_forms

    tex = folder / "table.tex"
    before = tex.read_text(encoding="utf-8", errors="replace") if tex.is_file() else ""
    table, files = write_tables_and_plots([folder], folder, missing)
    remove_old_plots(folder, files, run)
    if before in latex_forms(table, before):
        write_text(tex, before)


def remove_old_plots(folder: Path, written: Iterable[Path], run: Path) -> None:
    """Remove plots from a run's folder, or from its copy, that earlier tables of the run left and this one lacks."""
    from kdbench.results.by_axis import file_of
    from kdbench.results.comparison import IMPLIED, Axis

    left = {*folder.glob("*.png")} - {*written}
    for file in run.glob(f"*/{RECORD}") if left else ():
        with suppress(UserError):
            record = read_record(file)
            names = {file_of(Axis(path, ())) for path in (*record.cell.axes, *IMPLIED)}
            names |= {f"{metric}.png" for metric in record.result.metrics}
            for old in left & {folder / name for name in names}:
                old.unlink(missing_ok=True)


def write_files(
    table: Table, out: Path, records: Iterable[Record], form: LatexForm = "page", label: str | None = None
) -> list[Path]:
    """table.md, table.csv, table.tex, table.html and records.csv in a folder."""
    from kdbench.results.texts import texts

    written = texts(table, records, form=form, label=label)
    for name, text in written.items():
        write_text(out / name, text)
    return [out / name for name in written]


def write_plots(records: Sequence[Record], out: Path) -> list[Path]:
    """Learning curves, every metric that was logged, errors along an axis of numbers and final accuracies as PNG."""
    from kdbench.results.by_axis import errors_by_axis
    from kdbench.results.plots import final_accuracies, learning_curves, metric_curves

    return [
        learning_curves(records, out / "learning_curves.png"),
        *metric_curves(records, out),
        *errors_by_axis(records, out),
        final_accuracies(records, out / "final_accuracies.png"),
    ]


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
