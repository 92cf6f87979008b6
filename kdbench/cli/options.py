"""Arguments that several commands share."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from kdbench.engine.options import check_device


def note_absent(folders: list[Path] | None) -> list[Path] | None:
    """Folders as they are. One that is not there may be on other machines of a cluster, or misspelt: that is noted."""
    for folder in folders or ():
        if not folder.is_dir():
            print(f"note: --data: there is no folder {folder}", file=sys.stderr)
    return folders


def one_a_line(commands: str, title: str = "Examples:") -> str:
    """Lines of commands as the last words of a help text: there, too, each has a line of its own, to be copied."""
    # Square brackets are markup in a help text.
    return title + commands.replace("[", "\\[").rstrip()


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Overrides of the recipe.")]
RegistryOption = Annotated[
    list[Path] | None,
    typer.Option(help="Folder with your own cards and their Python files. Its code is executed (repeatable)."),
]
RunsOption = Annotated[Path, typer.Option(help="Folder for runs/<recipe>/.")]
JobsOption = Annotated[int | None, typer.Option(min=1, help="Worker processes (default: one for each core or GPU).")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, max=1024, help="Threads of each worker.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, or cuda:N.", callback=check_device)]
DataOption = Annotated[
    list[Path] | None, typer.Option(help="Folder that holds data sets (repeatable).", callback=note_absent)
]
DownloadOption = Annotated[bool, typer.Option(help="Whether data and weights may be downloaded.")]
RayOption = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Run on a Ray cluster: auto, local, or HOST:PORT.")
]
CpusOption = Annotated[int | None, typer.Option(min=1, help="On Ray: cores of each worker.")]
GpusOption = Annotated[float | None, typer.Option(min=0, help="On Ray: GPUs of each worker, or a fraction of one.")]
SyncBatchNormOption = Annotated[
    bool, typer.Option("--sync-batch-norm", help="Under torchrun, on GPUs: batch norms use the whole batch.")
]
AdoptOption = Annotated[bool, typer.Option(help="Whether published cells of a recipe count as finished.")]
