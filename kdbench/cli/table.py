"""`kdbench table`: rebuild a table from records alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from kdbench.cli.options import RegistryOption
from kdbench.cli.output import print_table
from kdbench.errors import UserError, counted
from kdbench.record import Metric, left_out, read_records, unfinished
from kdbench.verify import sums

EXAMPLES = """
kdbench table runs/quickstart
kdbench table runs/a runs/b --baseline kd --out tables
kdbench table results/ab_wrn_30 --published datafree_cifar10:ce,cmi
"""


def command(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Folders with finished cells.")],
    baseline: Annotated[str | None, typer.Option(help="Method to compare with (default: the recipe's).")] = None,
    metric: Annotated[
        Metric, typer.Option(help="Accuracy: last, best (marked as optimistic) or mean_last (of the last 10 epochs).")
    ] = "last",
    interval: Annotated[
        Literal["student", "bootstrap"], typer.Option(help="Of differences: student, or bootstrap (from 20 seeds on).")
    ] = "student",
    published: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY[:METHOD,…]",
            help="Published table to show too, or some of its methods ('kdbench ls published').",
        ),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,…",
            help="Numbers to show too: balanced_accuracy, top5, calibration_error, fidelity (share of predictions that "
            "equal the teacher's), or any metric of a loss card.",
        ),
    ] = None,
    latex: Annotated[
        Literal["page", "wide", "column"],
        typer.Option(help="table.tex for a page (one column), wide (table*, across two columns), or column."),
    ] = "page",
    label: Annotated[str | None, typer.Option(help="Label in table.tex, as tab:ab (default: from the title).")] = None,
    registry: RegistryOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for table.md, .csv, .tex and .html, and records.csv.")
    ] = None,
) -> None:
    """Print the table of the last run in each FOLDER, and write it with --out."""
    from kdbench.results.copied import published_tables
    from kdbench.results.tables import build
    from kdbench.results.writing import write_files

    if label is not None and not re.fullmatch(r"[\w:.-]+", label, re.ASCII):
        raise UserError(f"'{label}' is not a LaTeX label", where="--label", hint="letters, digits, and : . -")
    records = read_records(folders)
    table = build(
        records,
        baseline,
        metric,
        unfinished=unfinished(folders),
        interval=interval,
        columns=[name for text in columns or () for name in text.split(",") if name],
        published=published_tables(published or (), registry or ()),
    )
    if out is not None:
        sums.renew(out, write_files(table, out, records, latex, label))
    print_table(table)
    for run, number in left_out(folders).items():
        print(
            f"{run} holds {counted(number, 'more finished cell')}, not of its last command and not in this table: "
            "'kdbench run' with all methods and seeds makes a table of all"
        )
