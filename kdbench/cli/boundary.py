"""`kdbench boundary`: how alike the decision boundaries of students and their teacher are, and where attacks end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdbench.cli.options import RegistryOption
from kdbench.errors import UserError

if TYPE_CHECKING:
    from kdbench.methods.bss.analysis import Ends, Similarity
    from kdbench.record import Record

EXAMPLES = (
    "Examples:  kdbench boundary runs/bss_small   ·   kdbench boundary runs/bss --images 1000 --picture   ·   "
    "kdbench boundary runs/bss/kd-seed0-1a2b3c4d   ·   "
    "kdbench boundary --attack bss_resnet26_cifar10 --images 500 --targets 1"
)
CSV = "boundary.csv"
ATTACKS = "attack.csv"
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
# The same of where attacks end.
SHOWN_ENDS = {
    "crossed": ("crossed", 3),
    "arrived": ("arrived", 3),
    "margin_before": ("margin before", 4),
    "margin": ("margin", 4),
    "length": ("L2", 3),
}


def command(
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders with finished cells and their weights.")] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="A teacher ('kdbench ls teachers') to attack by each step there is (repeatable)."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Evenly spaced test images to attack.")] = 200,
    targets: Annotated[
        int | None, typer.Option(min=1, help="Classes that an image is moved to, the likeliest (default: all others).")
    ] = None,
    picture: Annotated[bool, typer.Option("--picture", help="Also draw some images on their way.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for what is written (default: the first folder, else the current one).")
    ] = None,
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

    With --attack: how many of the samples made from a teacher leave their class and arrive in the one they are moved
    to, within ten steps of either kind; medians of the margin between the two largest logits; mean L2 of normalized
    pixel values.
    """
    from kdbench.cli.run import check_device
    from kdbench.record import read_records
    from kdbench.registry import Registry

    check_device(device)
    if not folders and not attack:
        raise UserError(
            "there is nothing to look at", hint="give a folder with finished cells, or a teacher with --attack"
        )
    if picture and not folders:
        raise UserError("a picture shows a student of a finished cell", where="--picture", hint="give its folder")
    # Cards of the user's: their models are needed to load what was trained.
    cards = Registry(registry or ())
    # Of each recipe in the order of its comparison, as tables show it.
    records = read_records(folders) if folders else []
    records.sort(key=lambda one: (one.recipe, one.cell.order or 0, one.cell.seed))

    import torch

    from kdbench.engine.options import Options
    from kdbench.engine.provenance import Provenance
    from kdbench.methods.bss.analysis import of_cells, of_teacher
    from kdbench.methods.bss.picture import boundary_picture

    chosen = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if chosen.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"there is no device {device}", where="--device", hint="CUDA devices here: 0")
    options = Options(
        runs=runs, data_roots=tuple(data or ()), download=download, registries=tuple(registry or ()), device=chosen
    )
    on = torch.device(chosen)

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    folder = out or (folders[0] if folders and folders[0].is_dir() else folders[0].parent if folders else Path())
    written: list[Path] = []
    if folders:
        found: list[tuple[Record, Similarity]] = []
        looks, seen = [], Provenance(on)
        for record, one, ways in of_cells(
            records, options, images, targets, on, tell, seen, pictures=4 if picture else 0
        ):
            looks += ways
            if one is None:
                tell(
                    f"{record.cell.label}, seed {record.cell.seed}: left out, no single teacher of its data to compare "
                    "with"
                )
            else:
                found.append((record, one))
        if not found:
            raise UserError("no cell has a teacher to compare with", where=", ".join(map(str, folders)))
        _write_csv(folder / CSV, found)
        written += [folder / CSV, seen.write(folder / CSV)]
        if picture:
            written.append(boundary_picture(looks, folder / PICTURE))
        _print(found)
    if attack:
        attacked: list[tuple[str, str, Ends]] = []
        seen = Provenance(on)
        for name in dict.fromkeys(attack):
            tell(f"{name}: attacks from {images} test images")
            of_data, ends = of_teacher(name, cards, options, images, targets, on, seen)
            attacked += [(name, of_data, one) for one in ends]
        _write_attacks(folder / ATTACKS, attacked)
        written += [folder / ATTACKS, seen.write(folder / ATTACKS)]
        _print_attacks(attacked)
    print(f"written to {folder}: {', '.join(file.name for file in written)}")


def _write_csv(file: Path, found: list[tuple[Record, Similarity]]) -> None:
    """One line a cell."""
    from dataclasses import asdict

    names = ["recipe", "method", "label", "axes", "seed", "student", *asdict(found[0][1])]
    lines: list[list[Any]] = []
    for record, one in found:
        cell = record.cell
        own = [record.recipe, cell.method, cell.label, _axes(record), cell.seed, cell.student]
        lines.append([*own, *asdict(one).values()])
    _write_lines(file, [names, *lines])


def _write_attacks(file: Path, attacked: list[tuple[str, str, Ends]]) -> None:
    """One line for each teacher and kind of step."""
    from dataclasses import asdict

    names = ["teacher", "data", *asdict(attacked[0][2])]
    lines: list[list[Any]] = [[name, of_data, *asdict(one).values()] for name, of_data, one in attacked]
    _write_lines(file, [names, *lines])


def _write_lines(file: Path, lines: list[list[Any]]) -> None:
    import csv
    import io

    from kdbench.files import write_text

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for line in lines:
        writer.writerow([_shown(value) for value in line])
    write_text(file, text.getvalue())


def _shown(value: Any) -> Any:
    """Numbers to six digits, a range as its ends."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(f"{part:.6g}" for part in value) if isinstance(value, tuple) else value


def _print_attacks(attacked: list[tuple[str, str, Ends]]) -> None:
    from rich import box
    from rich.table import Table

    from kdbench.cli.console import console

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("teacher", "step"):
        table.add_column(heading)
    for heading in ("images", "pairs", *(heading for heading, _ in SHOWN_ENDS.values())):
        table.add_column(heading, justify="right")
    for name, _, one in attacked:
        values = [f"{getattr(one, field):.{decimals}f}" for field, (_, decimals) in SHOWN_ENDS.items()]
        table.add_row(name, one.step, str(one.images), str(one.pairs), *values)
    console().print(table)


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
