"""`kdbench publish`: keep a finished run's tables, records and test logits, without its students' weights."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from kdbench.errors import UserError
from kdbench.files import RUN
from kdbench.record import read_run
from kdbench.verify.publishing import publish

EXAMPLES = """
kdbench publish runs/quickstart
kdbench publish runs/ab_wrn --out paper/results
"""


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders runs/<recipe> of finished runs.")],
    out: Annotated[Path, typer.Option(help="Folder for <recipe>/.")] = Path("results"),
    replace: Annotated[bool, typer.Option("--replace", help="Let published cells go that RUN does not have.")] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Cells may be missing: the table is made without them and names them.")
    ] = False,
    logits: Annotated[
        bool, typer.Option(help="Whether test logits are copied too: 'verify' counts the accuracies again from them.")
    ] = True,
    teachers: Annotated[
        bool,
        typer.Option(
            "--teachers",
            help="Also copy the weights of teachers that were trained for RUN: with these 'kdbench run' adds seeds to "
            "the table on any machine. Weights that are published already stay.",
        ),
    ] = False,
) -> None:
    """Copy tables, plots, records, metrics and test logits of finished RUNs to results/, with SHA256SUMS of all files.

    Tables and plots are made anew from the records. All is small enough to commit. The logits are the largest part:
    with ten classes, 20 bytes for each test image and cell. 'kdbench table' rebuilds the table from the records, and
    'kdbench verify' checks all of it.
    """
    _check_apart(runs)
    for run in runs:
        print(publish(run, out, replace, unfinished, logits, teachers))


def _check_apart(runs: Iterable[Path]) -> None:
    """Raises UserError where two runs have one name, and so one place among the results."""
    named: dict[str | None, Path] = {}
    for run in runs:
        if (run / RUN).is_file() and not (other := named.setdefault(read_run(run).name, run)).samefile(run):
            what = f"'{other}' and '{run}' would be published in one folder, one in place of the other"
            raise UserError(what, "kdbench publish", "publish them one by one, with another --out for each")
