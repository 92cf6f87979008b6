"""`kdbench verify`: check that table, records and recipe of a results folder agree."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from kdbench.cli.console import page
from kdbench.cli.options import DataOption, DeviceOption, DownloadOption, RegistryOption
from kdbench.cli.progress import listener
from kdbench.engine.options import Options
from kdbench.errors import UserError
from kdbench.files import RECORD
from kdbench.record import read_record
from kdbench.registry import Registry
from kdbench.verify.findings import Finding, read_folder, verdict

EXAMPLES = """
kdbench verify results/quickstart
kdbench verify results/quickstart --rerun
kdbench verify results/quickstart --rerun --cell kd-seed0-9d9a250a
"""
COLOURS = {"agrees": "green", "remark": "yellow", "unchecked": "yellow", "disagrees": "red"}


def command(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A folder of results/ or runs/ that holds one comparison.")
    ],
    rerun: Annotated[bool, typer.Option(help="Also train one cell again and compare its accuracy.")] = False,
    cell: Annotated[
        str | None, typer.Option(help="The cell to train again (default: the one that took the least time).")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="Allowed difference in percentage points where a rerun cannot be exact, as on another processor "
            "(default: 3 standard deviations over the seeds, at least 1).",
        ),
    ] = None,
    device: DeviceOption = "auto",
    data: DataOption = None,
    download: DownloadOption = True,
    registry: RegistryOption = None,
) -> None:
    """Check that the files in FOLDER agree: the table with the records, the records with their metrics and recipe.

    With --rerun, one cell is also trained again and its accuracy compared. Exit codes: 0 everything agrees, 1 something
    disagrees, 2 FOLDER cannot be checked.
    """
    from kdbench.verify.verification import verify

    if cell is not None and not rerun:
        raise UserError("'--cell' is for reruns", where="--cell", hint="add --rerun")
    folders = tuple(registry or ())
    cards = Registry(folders)
    console = page()
    options = Options(
        device=device, data_roots=tuple(data or ()), download=download, registries=folders, checkpoint_seconds=1e9
    )
    findings = verify(folder, cards, options.roots())
    for finding in findings:
        about = f"{finding.where}: " if finding.where else ""
        console.print(Text.assemble((f"{finding.level:<10}", COLOURS[finding.level]), f"{about}{finding.what}"))
    if rerun and not _rerun(folder, cell, tolerance, options, cards):
        findings.append(Finding("disagrees", "a cell run again does not give its number"))
    print(verdict(findings))
    if any(finding.level == "disagrees" for finding in findings):
        raise typer.Exit(1)


def _rerun(folder: Path, cell: str | None, tolerance: float | None, options: Options, cards: Registry) -> bool:
    """Train a cell again in a temporary folder, say what came out, and whether it agrees."""
    from kdbench.verify.rerun import cell_to_rerun, rerun

    # A damaged record is told already; the others can be run.
    records = read_folder(folder).planned
    if not records:
        raise UserError("there is no intact record to run again", where=str(folder))
    name, record, spec = cell_to_rerun(records, cell, cards)
    place = record.cell.label, record.cell.axes | {"method": None}
    siblings = [r for r in records.values() if (r.cell.label, r.cell.axes | {"method": None}) == place]
    teachers = [read_record(file) for file in folder.glob(f"teacher*/{RECORD}")]
    with tempfile.TemporaryDirectory(prefix="kdbench-verify-") as temporary:
        here = replace(options, runs=Path(temporary))
        again = rerun(record, spec, siblings, teachers, here, listener(), tolerance)
    print(f"{name} again: {again.found:.2f} %, recorded {again.recorded:.2f} %")
    if again.differing:
        why = "; ".join(again.differing)
        print(f"  equal bits cannot be expected ({why}): compared within {again.tolerance:.2f} points")
    else:
        print("  same processor kind, torch, threads and precision: compared exactly, every evaluation")
    for what in again.unequal:
        print(f"  not equal: {what}")
    return again.agrees
