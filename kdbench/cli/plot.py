"""`kdbench plot`: learning curves, metrics over training and final accuracies as PNG."""

from pathlib import Path
from typing import Annotated

import typer

from kdbench.record import read_records
from kdbench.verify import sums

EXAMPLES = """
kdbench plot runs/quickstart
kdbench plot runs/ab_wrn --out figures
"""


def command(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Folders with finished cells.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures (default: the first folder).")] = None,
) -> None:
    """Draw learning curves, the metrics that losses log (a file for each) and the final accuracies.

    'kdbench table --out' also puts these curves into its HTML page.
    """
    from kdbench.results.writing import write_plots

    drawn = write_plots(read_records(folders), out or folders[0])
    sums.renew(out or folders[0], drawn)
    for file in drawn:
        print(file)
