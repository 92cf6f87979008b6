"""`kdbench plot`: learning curves, metrics over training and final accuracies as PNG or PDF."""

from pathlib import Path
from typing import Annotated

import typer

from kdbench.drawing import PictureForm
from kdbench.record import read_records
from kdbench.verify import sums

EXAMPLES = """
kdbench plot runs/quickstart
kdbench plot runs/ab_wrn --out figures --format pdf
"""


def command(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Folders with finished cells.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures (default: the first folder).")] = None,
    form: Annotated[
        PictureForm, typer.Option("--format", help="Pictures of pixels, or for papers of lines and letters.")
    ] = "png",
) -> None:
    """Draw learning curves, the metrics that losses log (a file for each) and the final accuracies.

    'kdbench table --out' also puts these curves into its HTML page.
    """
    from kdbench.results.writing import write_plots

    out = out or folders[0]
    drawn = write_plots(read_records(folders), out, form)
    # A published folder's plots are PNG: only those are summed up.
    sums.renew(out, drawn if form == "png" else ())
    for file in drawn:
        print(file)
