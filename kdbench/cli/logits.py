"""`kdbench logits`: fill, list and clear the tables of teacher logits."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdbench.cli.console import page, plain_table
from kdbench.cli.options import (
    DataOption,
    DeviceOption,
    DownloadOption,
    Overrides,
    RecipeArgument,
    RegistryOption,
    RunsOption,
    one_a_line,
)
from kdbench.cli.progress import clock, listener
from kdbench.engine.options import Options
from kdbench.errors import UserError, counted, did_you_mean
from kdbench.recipe.planning import plan
from kdbench.registry import Registry

if TYPE_CHECKING:
    from kdbench.engine.workers.messages import TableFound

EXAMPLES = """
kdbench logits fill ab_wrn --estimate
kdbench logits fill ab_wrn
kdbench logits ls
kdbench logits clear --all
"""

app = typer.Typer(
    no_args_is_help=True,
    help="Compute a teacher's logits once, for every crop and flip of the training images, and use them in later runs.",
    epilog=one_a_line(EXAMPLES),
)


@app.command("fill", epilog=one_a_line(EXAMPLES))
def fill(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only print the size and the time.")] = False,
    runs: RunsOption = Path("runs"),
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads (default: all cores).")] = None,
    device: DeviceOption = "auto",
    data: DataOption = None,
    download: DownloadOption = True,
    registry: RegistryOption = None,
) -> None:
    """Compute and save the logits of RECIPE's teacher for every crop and flip of the images that its cells train with.

    KD and other methods that use only the teacher's logits then train without running the teacher. Later runs use the
    saved table if teacher, data, augmentation and precision are the same. Size and time are printed first. The command
    can be interrupted; repeat it to continue.
    """
    from kdbench.engine.workers.filling import fill_logits

    folders = tuple(registry or ())
    planned = plan(recipe, Registry(folders), tuple(overrides or ()))
    options = Options(
        runs=runs,
        jobs=1,
        threads=threads,
        device=device,
        data_roots=tuple(data or ()),
        download=download,
        registries=folders,
    )
    progress = _FillDisplay()
    fill_logits(planned, options, estimate, progress.table_found, progress.filled, listener())


class _FillDisplay:
    """Prints each teacher's table, and how far it is filled."""

    teacher: str
    table: TableFound
    shown = 0.0

    def table_found(self, teacher: str, table: TableFound, shown: int) -> None:
        self.teacher, self.table = teacher, table
        what = (
            f"{teacher}: {counted(table.images, 'image')} × {counted(table.views, 'view')} × "
            f"{counted(table.classes, 'class')}, {table.bytes / 1e6:,.1f} MB in {table.folder}"
        )
        if table.done >= table.images:
            print(f"{what}: already complete")
        else:
            so_far = f", {table.done / table.images:.0%} are there" if table.done else ""
            print(f"{what}{so_far}: about {clock(table.seconds)} here", flush=True)
            if shown < (lacking := (table.images - table.done) * table.views):
                views = counted(shown, "view", ",")
                few = f"one run of these cells shows the teacher {views}, fewer than the {lacking:,} of the table"
                print(f"note: {few}, which pays only for more runs than that", flush=True)

    def filled(self, done: int, seconds: float) -> None:
        table, live = self.table, sys.stderr.isatty()
        complete = done >= table.images
        if complete or time.monotonic() - self.shown > (2 if live else 30):
            self.shown = time.monotonic()
            left = seconds / max(done - table.done, 1) * (table.images - done)
            text = (
                f"complete after {clock(seconds)}"
                if complete
                else f"{done / table.images:.1%}, about {clock(left)} left"
            )
            end = "\r" if live and not complete else "\n"
            print(f"  {self.teacher}: {text}   ", end=end, file=sys.stderr, flush=True)


@app.command("ls", epilog=one_a_line(EXAMPLES))
def ls() -> None:
    """List the saved tables on this machine."""
    from kdbench.engine.teachers.logit_files import tables, tables_folder

    found = tables()
    if not found:
        print(f"no tables in {tables_folder()}; 'kdbench logits fill RECIPE' makes one")
        return
    shown = plain_table("table", "images × views × classes", "precision", "MB", "filled", "time")
    for table in found:
        shown.add_row(
            table.folder.name,
            " × ".join(str(n) for n in table.shape),
            table.key["precision"],
            f"{table.done * table.image_bytes / 1e6:,.1f}",
            ("all images" if table.done == table.shape[0] else f"{counted(table.done, 'image', ',')}")
            + ("" if table.sha256 else ", cut off"),
            clock(table.seconds),
        )
    page().print(shown)


@app.command("clear", epilog=one_a_line(EXAMPLES))
def clear(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="TABLE", help="As 'kdbench logits ls' names them.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Delete all of them.")] = False,
) -> None:
    """Delete saved tables. Later runs compute the teacher again; finished cells stay as they are."""
    from kdbench.engine.teachers import logit_files

    known = {table.folder.name: table for table in logit_files.tables()}
    if not names and not everything:
        raise UserError("no tables are named", where="kdbench logits clear", hint="name the tables, or use --all")
    for name in names or ():
        if name not in known:
            raise UserError(f"there is no table '{name}'", hint=did_you_mean(name, known))
    for name in known if everything else names or ():
        logit_files.clear(known[name])
        print(f"removed {name} ({known[name].bytes / 1e6:,.1f} MB)")
