"""`kdbench table`: rebuild a table from records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdbench.errors import UserError, did_you_mean

EXAMPLES = "Examples:  kdbench table runs/quickstart   ·   kdbench table runs/a runs/b --baseline kd --out tables"
METRICS = ("last", "best", "mean_last")


def command(
    folders: Annotated[list[Path], typer.Argument(help="Folders with finished cells.")],
    baseline: Annotated[str | None, typer.Option(help="Method to compare with (default: the recipe's).")] = None,
    metric: Annotated[str, typer.Option(help="last, best (marked as optimistic) or mean_last.")] = "last",
    out: Annotated[Path | None, typer.Option(help="Folder for table.md, table.csv, table.tex.")] = None,
) -> None:
    """Print the table of all records below FOLDERS, and write it with --out."""
    from kdbench.cli.output import print_table, write_files
    from kdbench.results import sums
    from kdbench.results.record import read_records, unfinished
    from kdbench.results.tables import build

    if metric not in METRICS:
        raise UserError(f"unknown metric '{metric}'", where="--metric", hint=did_you_mean(metric, METRICS))
    table = build(read_records(folders), baseline, metric, unfinished=unfinished(folders))  # type: ignore[arg-type]
    print_table(table)
    if out is not None:
        sums.renew(out, write_files(table, out, folders))
