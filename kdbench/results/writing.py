"""Tables and plots as files: in a run's folder, and anew in its published copy."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from kdbench.drawing import PictureForm
from kdbench.errors import UserError
from kdbench.files import RECORD, write_text
from kdbench.record import Record, read_record, read_records
from kdbench.results.by_axis import errors_by_axis, file_of
from kdbench.results.comparison import IMPLIED, Axis
from kdbench.results.contents import Table
from kdbench.results.latex import LatexForm
from kdbench.results.plots import final_accuracies, learning_curves, metric_curves
from kdbench.results.tables import build
from kdbench.results.texts import latex_forms, texts


def write_tables_and_plots(folders: list[Path], out: Path, missing: list[str]) -> tuple[Table, list[Path]]:
    """The table of finished cells, which names the missing ones, and all files of it that were written."""
    records = read_records(folders)
    table = build(records, unfinished=[out / cell for cell in missing])
    files = [*write_files(table, out, records), *write_plots(records, out)]
    _remove_old_plots(out, files, out)
    return table, files


def renew_tables(run: Path, folder: Path, missing: list[str]) -> None:
    """Write table and plots of the records in the copy of a run anew. LaTeX in a form that the user chose stays so."""
    tex = folder / "table.tex"
    before = tex.read_text(encoding="utf-8", errors="replace") if tex.is_file() else ""
    table, files = write_tables_and_plots([folder], folder, missing)
    _remove_old_plots(folder, files, run)
    if before in latex_forms(table, before):
        write_text(tex, before)


def _remove_old_plots(folder: Path, written: Iterable[Path], run: Path) -> None:
    """Remove plots from a run's folder, or from its copy, that earlier tables of the run left and this one lacks."""
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
    written = texts(table, records, form=form, label=label)
    for name, text in written.items():
        write_text(out / name, text)
    return [out / name for name in written]


def write_plots(records: Sequence[Record], out: Path, form: PictureForm = "png") -> list[Path]:
    """Learning curves, every metric that was logged, errors along an axis of numbers and final accuracies."""
    return [
        learning_curves(records, out / f"learning_curves.{form}"),
        *metric_curves(records, out, form),
        *errors_by_axis(records, out, form),
        final_accuracies(records, out / f"final_accuracies.{form}"),
    ]
