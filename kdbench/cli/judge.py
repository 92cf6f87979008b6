"""`kdbench judge`: what networks that had no part in it say of synthesized images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdbench.cli.options import RegistryOption

if TYPE_CHECKING:
    from kdbench.methods.deep_inversion.judging import Judgement

EXAMPLES = (
    "Examples:  kdbench judge runs/sources --by resnet32_cifar10   ·   "
    "kdbench judge runs/deep_inversion_small runs/sources --by 'runs/deep_inversion_small'"
)
CSV = "judged.csv"


def command(
    folders: Annotated[list[Path], typer.Argument(help="Pools of synthesized images, or folders that hold some.")],
    by: Annotated[
        list[str],
        typer.Option(help="Who judges: a teacher ('kdbench ls teachers'), or a folder of finished cells (repeatable)."),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for what is written (default: the first folder).")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of runs, where trained teachers lie.")] = Path("runs"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or cuda:N.")] = "auto",
    download: Annotated[bool, typer.Option(help="Whether weights may be downloaded.")] = True,
    registry: RegistryOption = None,
) -> None:
    """Let networks classify synthesized images, and say how many they take for what they were made for.

    Images that only the network classifies from which they were made are adversarial noise; those that carry features
    of their classes convince an independently trained one too (Yin et al., CVPR 2020, table 2).
    """
    from kdbench.cli.run import check_device
    from kdbench.registry import Registry

    check_device(device)
    cards = Registry(registry or ())

    import torch

    from kdbench.engine.options import Options
    from kdbench.engine.provenance import Provenance
    from kdbench.methods.deep_inversion.judging import judge, pools_in, students_as_judges, teacher_as_judge

    chosen = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    options = Options(runs=runs, download=download, registries=tuple(registry or ()), device=chosen)

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    # Pools first: who names the wrong folder need not have the networks at hand to be told.
    pools, judges = pools_in(folders), []
    for name in dict.fromkeys(by):
        if Path(name).is_dir():
            judges += students_as_judges(Path(name), options)
        else:
            judges.append(teacher_as_judge(name, cards, options))
    seen = Provenance(torch.device(chosen))
    for one in judges:
        seen.network(one.name, one.weights)
    for name, pool in pools.items():
        seen.pool(name, pool)
    found = list(judge(pools, judges, torch.device(chosen), tell))
    folder = out or folders[0]
    _write_csv(folder / CSV, found)
    about = seen.write(folder / CSV)
    _print(found)
    print(f"written to {folder}: {CSV}, {about.name}")


def _write_csv(file: Path, found: list[Judgement]) -> None:
    """One line for each pool and network."""
    import csv
    import io

    from kdbench.files import write_text

    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    settings = list(dict.fromkeys(name for one in found for name in one.settings))
    lines.writerow(["pool", "maker", "judge", "images", "right", *settings])
    for one in found:
        own = [one.settings.get(name, "") for name in settings]
        lines.writerow([one.pool, one.maker, one.judge, one.images, f"{one.right:.6g}", *own])
    write_text(file, text.getvalue())


def _print(found: list[Judgement]) -> None:
    from rich import box
    from rich.table import Table

    from kdbench.cli.console import console

    # What tells the pools apart: all their settings would not fit.
    differing = [
        name
        for name in dict.fromkeys(name for one in found for name in one.settings)
        if len({str(one.settings.get(name)) for one in found}) > 1
    ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("pool", "made from", *differing, "judge"):
        table.add_column(heading)
    for heading in ("images", "as intended (%)"):
        table.add_column(heading, justify="right")
    for one in found:
        own = [str(one.settings.get(name, "–")) for name in differing]
        table.add_row(one.pool, one.maker, *own, one.judge, str(one.images), f"{100 * one.right:.1f}")
    console().print(table)
