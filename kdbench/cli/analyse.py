"""`kdbench analyse`: ask something of finished cells and their weights."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdbench.cli.options import DataOption, DeviceOption, DownloadOption, RegistryOption
from kdbench.errors import UserError

if TYPE_CHECKING:
    from kdbench.engine.analysis import Row
    from kdbench.registry import Registry

EXAMPLES = (
    "Examples:  kdbench analyse boundary runs/bss_small images=1000 picture=true   ·   "
    "kdbench analyse attack teachers=bss_resnet26_cifar10 images=500 targets=1   ·   "
    "kdbench analyse judge runs/sources 'by=[resnet32_cifar10, runs/inversion_cifar_small]'"
)


def command(
    name: Annotated[str, typer.Argument(help="An analysis ('kdbench ls analyses').")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FOLDER]... [KEY=VALUE]...",
            help="Folders with finished cells and their weights, and options ('kdbench show analyses NAME').",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for what is written (default: the first folder, else the current one).")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of runs, where trained teachers are.")] = Path("runs"),
    device: DeviceOption = "auto",
    data: DataOption = None,
    download: DownloadOption = True,
    registry: RegistryOption = None,
) -> None:
    """Run the analysis NAME on finished cells, print its table, and write it as CSV.

    A JSON file beside the CSV holds the command, the versions, and the hashes of all data and networks. To add an
    analysis of your own, put a card and a Python function into a registry folder.
    """
    from kdbench.registry import Registry

    cards = Registry(registry or ())
    given, folders = _options_and_folders(words or ())
    target, options = cards.card("analyses", name, "kdbench analyse").target, _checked(cards, name, given)

    import torch

    from kdbench.engine.analysis import Analysis
    from kdbench.engine.options import Options
    from kdbench.engine.targets import import_target

    chosen = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if chosen.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"there is no device {device}", where="--device", hint="CUDA devices here: 0")
    where = Options(
        runs=runs, data_roots=tuple(data or ()), download=download, registries=tuple(registry or ()), device=chosen
    )
    first = folders[0] if folders else Path()
    into = out or (first if first.is_dir() else first.parent)
    analysis = Analysis(name, folders, where, into, lambda text: print(text, file=sys.stderr, flush=True))
    rows: list[Row] = list(import_target(target)(analysis, **options))
    if not rows:
        raise UserError(f"the analysis '{name}' found nothing", where=", ".join(map(str, folders)))
    files = analysis.write(rows)
    _print(rows)
    print(f"written to {into}: {', '.join(file.name for file in files)}")


def moved(context: typer.Context) -> None:
    """What `kdbench boundary` and `kdbench judge` say."""
    name = context.info_name
    raise UserError(f"this is now 'kdbench analyse {name}'", hint=f"'kdbench show analyses {name}' lists its options")


def _options_and_folders(words: Iterable[str]) -> tuple[dict[str, str], list[Path]]:
    """What is written key=value, as text, and all other words as folders."""
    options: dict[str, str] = {}
    folders = []
    for word in words:
        if re.match(r"[A-Za-z_]\w*=", word) and not Path(word).exists():
            key, _, options[key] = word.partition("=")
        else:
            folders.append(Path(word))
    return options, folders


def _checked(cards: Registry, name: str, given: dict[str, str]) -> dict[str, Any]:
    """Options as the analysis takes them."""
    from kdbench.tree import Tree

    origins = {key: f"command line, '{key}={text}'" for key, text in given.items()}
    plain = {key: Tree.parse(text, origins[key]).data if text.strip() else None for key, text in given.items()}
    paths: dict[tuple[str | int, ...], str] = {(key,): origin for key, origin in origins.items()}
    return cards.options("analyses", Tree(plain | {"name": name}, {(): "kdbench analyse", **paths}))


def _print(rows: Sequence[Row]) -> None:
    """The columns in which rows differ as a table, and below it what is the same in all of them."""
    from rich import box
    from rich.table import Table

    from kdbench.cli.console import console
    from kdbench.engine.analysis import columns_of

    groups = _by_seeds(rows)
    shown = [_shown(group, over_seeds=len(groups) < len(rows)) for group in groups]
    names = columns_of(shown)
    same = [name for name in names if len({row.get(name, "") for row in shown}) == 1]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (differing := [name for name in names if name not in same]):
        numbers = all(_is_number(row.get(name, 0)) for row in rows)
        table.add_column(name, justify="right" if numbers else "left")
    for row in shown:
        table.add_row(*(row.get(name, "–") for name in differing))
    if differing:
        console().print(table)
    facts = [f"{name} {shown[0][name]}" for name in same if shown[0][name]]
    console().print(("in all rows: " if differing else "") + ", ".join(facts), markup=False)


def _by_seeds(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in numbers alone together, if each seed comes once among them; else each row alone."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        texts = {name: value for name, value in row.items() if not _is_number(value)}
        groups.setdefault(str(texts), []).append(row)
    seeds = [[row.get("seed") for row in group] for group in groups.values()]
    paired = all(None not in group and len(set(group)) == len(group) for group in seeds)
    return list(groups.values()) if paired else [[row] for row in rows]


def _shown(group: Sequence[Row], over_seeds: bool) -> dict[str, str]:
    """Texts of a row, or of the means over several seeds."""
    if over_seeds:
        group = [{("n" if name == "seed" else name): value for name, value in row.items()} for row in group]
    texts = {}
    for name, value in group[0].items():
        numbers = [row[name] for row in group] if _is_number(value) else []
        texts[name] = str(len(group)) if over_seeds and name == "n" else _mean(numbers) if numbers else str(value)
    return texts


def _mean(values: Sequence[float]) -> str:
    """Mean ± deviation in four digits; of whole numbers the mean alone."""
    from kdbench.results.statistics import summarize

    finite = [value for value in values if not math.isnan(value)]
    if not finite:
        return "–"
    found = summarize(finite)
    spread = "" if found.deviation is None or isinstance(finite[0], int) else f" ± {found.deviation:.2g}"
    return (f"{found.mean:.0f}" if isinstance(finite[0], int) else f"{found.mean:.4g}") + spread


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
