"""`kdbench boundary`: how alike the decision boundaries of students and their teacher are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdbench.cli.options import RegistryOption
from kdbench.errors import UserError

if TYPE_CHECKING:
    from kdbench.engine.boundaries import Similarity
    from kdbench.results.record import Record

EXAMPLES = (
    "Examples:  kdbench boundary runs/bss_small   ·   kdbench boundary runs/bss --images 1000 --picture   ·   "
    "kdbench boundary runs/bss/kd-seed0-1a2b3c4d"
)
CSV = "boundary.csv"
PICTURE = "boundary_samples.png"
# Field of a similarity -> heading, decimals.
SHOWN = {
    "magnitude": ("MagSim", 4),
    "angle": ("AngSim", 4),
    "student_arrived": ("student arrived", 3),
    "teacher_arrived": ("teacher arrived", 3),
    "student_length": ("student L2", 3),
    "teacher_length": ("teacher L2", 3),
}


def command(
    folders: Annotated[list[Path], typer.Argument(help="Folders with finished cells and their weights.")],
    images: Annotated[int, typer.Option(min=1, help="Evenly spaced test images to attack.")] = 200,
    targets: Annotated[
        int | None, typer.Option(min=1, help="Classes that an image is moved to, the likeliest (default: all others).")
    ] = None,
    picture: Annotated[bool, typer.Option("--picture", help="Also draw some images on their way.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for what is written (default: the first folder).")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of runs, where trained teachers lie.")] = Path("runs"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or cuda:N.")] = "auto",
    data: Annotated[list[Path] | None, typer.Option(help="Folder that holds data sets (repeatable).")] = None,
    download: Annotated[bool, typer.Option(help="Whether data and weights may be downloaded.")] = True,
    registry: RegistryOption = None,
) -> None:
    """Attack students and their teacher from the same test images, and compare the ways to both boundaries.

    MagSim is the mean ratio of the ways' lengths, AngSim the mean cosine between them (Heo et al., AAAI 2019), over the
    images that both classify correctly and the classes that both attacks reach. Lengths are L2 of pixel values in
    [0, 1]. A plain student, which has no teacher, is held against that of the other cells.
    """
    from kdbench.cli.run import check_device
    from kdbench.registry import Registry
    from kdbench.results.record import read_records

    check_device(device)
    # Cards of the user's: their models are needed to load what was trained.
    Registry(registry or ())
    # Of each recipe in the order of its comparison, as tables show it.
    records = sorted(read_records(folders), key=lambda one: (one.recipe, one.cell.order or 0, one.cell.seed))

    import torch

    from kdbench.engine.boundaries import of_cells
    from kdbench.engine.runner import Options
    from kdbench.results.boundary_picture import boundary_picture

    chosen = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if chosen.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"there is no device {device}", where="--device", hint="CUDA devices here: 0")
    options = Options(
        runs=runs, data_roots=tuple(data or ()), download=download, registries=tuple(registry or ()), device=chosen
    )

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    found: list[tuple[Record, Similarity]] = []
    looks = []
    for record, one, seen in of_cells(
        records, options, images, targets, torch.device(chosen), tell, pictures=4 if picture else 0
    ):
        looks += seen
        if one is None:
            tell(
                f"{record.cell.label}, seed {record.cell.seed}: left out, no single teacher of its data to compare with"
            )
        else:
            found.append((record, one))
    if not found:
        raise UserError("no cell has a teacher to compare with", where=", ".join(map(str, folders)))
    folder = out or (folders[0] if folders[0].is_dir() else folders[0].parent)
    written = [_write_csv(folder / CSV, found)]
    if picture:
        written.append(boundary_picture(looks, folder / PICTURE))
    _print(found)
    print(f"written to {folder}: {', '.join(file.name for file in written)}")


def _write_csv(file: Path, found: list[tuple[Record, Similarity]]) -> Path:
    """One line a cell."""
    import csv
    import io
    from dataclasses import asdict

    from kdbench.files import write_text

    text = io.StringIO()
    names = ["recipe", "method", "label", "axes", "seed", "student", *asdict(found[0][1])]
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(names)
    for record, one in found:
        values = [f"{value:.6g}" if isinstance(value, float) else value for value in asdict(one).values()]
        cell = record.cell
        lines.writerow([record.recipe, cell.method, cell.label, _axes(record), cell.seed, cell.student, *values])
    write_text(file, text.getvalue())
    return file


def _print(found: list[tuple[Record, Similarity]]) -> None:
    """Mean ± deviation over the seeds of each method (and combination of what else was compared)."""
    import math

    from rich import box
    from rich.table import Table

    from kdbench.cli.console import console
    from kdbench.results.statistics import summarize

    groups: dict[tuple[str, str], list[Similarity]] = {}
    for record, one in found:
        groups.setdefault((record.cell.label, _axes(record)), []).append(one)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    several = any(axes for _, axes in groups)
    for index, heading in enumerate(["method", *(["compared"] if several else []), "n", "images", "pairs"]):
        table.add_column(heading, justify="left" if index < 1 + several else "right")
    for heading, _ in SHOWN.values():
        table.add_column(heading, justify="right")
    for (label, axes), ones in groups.items():
        row = [label, *([axes] if several else []), str(len(ones))]
        row += [f"{summarize([float(getattr(one, name)) for one in ones]).mean:.0f}" for name in ("images", "pairs")]
        for name, (_, decimals) in SHOWN.items():
            values = [float(getattr(one, name)) for one in ones if not math.isnan(getattr(one, name))]
            if not values:
                row.append("–")
                continue
            summary = summarize(values)
            spread = f" ± {summary.deviation:.{decimals}f}" if summary.deviation is not None else ""
            row.append(f"{summary.mean:.{decimals}f}{spread}")
        table.add_row(*row)
    console().print(table)


def _axes(record: Record) -> str:
    """What a cell's combination has beside its method."""
    others = {path: value for path, value in record.cell.axes.items() if path.partition(".")[0] != "method"}
    own = {path: value for path, value in record.cell.axes.items() if path.startswith("method.")}
    return ", ".join(f"{path} {value}" for path, value in {**others, **own}.items())
