"""`kdbench analyse`: ask something of finished cells and their weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from kdbench.cli.console import page, show, tell
from kdbench.cli.options import DataOption, DeviceOption, DownloadOption, RegistryOption
from kdbench.engine.options import Options
from kdbench.errors import UserError
from kdbench.registry import Registry
from kdbench.tree import Tree

if TYPE_CHECKING:
    import pandas

    from kdbench.engine.analysis import AnalysisRow

EXAMPLES = """
kdbench analyse boundary runs/bss_small images=1000 picture=true
kdbench analyse attack teachers=bss_resnet26_cifar10 images=500 targets=1
kdbench analyse judge runs/sources 'by=[resnet32_cifar10, runs/inversion_cifar_small]'
"""


def command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An analysis ('kdbench ls analyses').")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FOLDER|KEY=VALUE",
            help="Folders with finished cells and their weights, and options ('kdbench show analyses NAME').",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to (default: the first folder, else the current one).")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of runs that holds trained teachers.")] = Path("runs"),
    device: DeviceOption = "auto",
    data: DataOption = None,
    download: DownloadOption = True,
    registry: RegistryOption = None,
) -> None:
    """Run the analysis NAME on finished cells, print its table, and write it as CSV.

    A JSON file beside the CSV holds the command, the versions, and the hashes of all data and networks. To add an
    analysis of your own, put a card and a Python function into a registry folder.
    """
    cards = Registry(registry or ())
    given, folders = _options_and_folders(words or ())
    target, options = cards.card("analyses", name, "kdbench analyse").target, _checked(cards, name, given)

    from kdbench.engine.analysis import Analysis
    from kdbench.engine.computing.device import chosen_device
    from kdbench.engine.targets import import_target

    chosen = str(chosen_device(device, tell))
    where = Options(
        runs=runs, data_roots=tuple(data or ()), download=download, registries=tuple(registry or ()), device=chosen
    )
    first = folders[0] if folders else Path()
    into = out or (first if first.is_dir() else first.parent)
    analysis = Analysis(name, folders, where, into, tell)
    rows: list[AnalysisRow] = list(import_target(target)(analysis, **options))
    if not rows:
        raise UserError(f"the analysis '{name}' found nothing", where=", ".join(map(str, folders)))
    # What took long is shown, also where it cannot be written.
    _print(rows)
    files = analysis.write(rows)
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
    origins = {key: f"command line, '{key}={text}'" for key, text in given.items()}
    plain = {key: Tree.parse(text, origins[key]).data if text.strip() else None for key, text in given.items()}
    paths: dict[tuple[str | int, ...], str] = {(key,): origin for key, origin in origins.items()}
    return cards.options("analyses", Tree(plain | {"name": name}, {(): "kdbench analyse", **paths}))


def _print(rows: Sequence[AnalysisRow]) -> None:
    """The columns in which rows differ as a table, and below it what is the same in all of them.

    Rows that differ in numbers alone are one, with mean ± deviation, if each seed comes once among them.
    """
    import pandas
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    frame = pandas.DataFrame(rows)
    texts = [name for name in map(str, frame) if is_bool_dtype(frame[name]) or not is_numeric_dtype(frame[name])]
    frame[texts] = frame[texts].astype(object).where(frame[texts].notna(), "–").astype(str)
    over_seeds = "seed" in frame and bool(texts) and not frame.duplicated([*texts, "seed"]).any()
    # Each row alone is the mean of itself.
    groups: Any = frame.groupby(texts if over_seeds else frame.index, sort=False)
    shown = pandas.DataFrame({name: groups[name].agg("first" if name in texts else _mean) for name in frame})
    if over_seeds and len(shown) < len(frame):
        shown["seed"] = groups.size().astype(str)
        shown = shown.rename(columns={"seed": "seeds"})
    differing = [name for name in map(str, shown) if shown[name].nunique() > 1]
    if differing:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in differing:
            table.add_column(name, justify="left" if name in texts else "right")
        for row in shown[differing].itertuples(index=False):
            table.add_row(*row)
        show(page(), table)
    facts = [f"{name} {shown[name].iloc[0]}" for name in shown if name not in differing and shown[name].iloc[0]]
    page().print(("in all rows: " if differing else "") + ", ".join(facts))


def _mean(values: pandas.Series[Any]) -> str:
    """Mean ± deviation in a few digits; a whole number as it is."""
    from pandas.api.types import is_integer_dtype

    if (found := values.dropna()).empty:
        return "–"
    whole = is_integer_dtype(found)
    if whole and found.nunique() == 1:
        return str(found.iloc[0])
    return f"{found.mean():{'.1f' if whole else '.4g'}}" + (f" ± {found.std():.2g}" if len(found) > 1 else "")
