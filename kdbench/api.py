"""The public Python API. What it needs (torch, pydantic, pandas) is imported by the call that needs it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas
    from torch import nn

    from kdbench.record import Record


def run(
    recipe: str | Path | dict[str, Any],
    overrides: str | Iterable[str] | dict[str, Any] = (),
    *,
    runs: str | Path = "runs",
    registries: str | Path | Iterable[str | Path] = (),
    **options: Any,
) -> list[Record]:
    """Train every cell of a recipe that is not finished yet. It writes no table and no plots.

    Warnings and notes go to the log `kdbench`, as warnings, and so does how it goes, at the level INFO.

    Args:
        recipe: A file, the name of a shipped recipe, or a dictionary with the keys of a recipe, whose run is called
            `recipe`: give each of several dictionaries its own `runs`.
        overrides: Strings "dotted.path=value" (or one alone), or a dictionary of dotted paths to values.
        runs: Folder in which the run's folder, `<recipe>/`, is written.
        registries: Folders with your own cards, or one alone. Their Python files are executed.
        options: Fields of `kdbench.engine.options.Options` (jobs, threads, device, data_roots, download, …).

    Returns:
        The records of the finished cells, in the order of the comparison.

    Raises:
        UserError: A mistake in the recipe, missing data or weights, or a full disk.
        CellError: A cell failed. The others are finished and recorded.
    """
    import json

    from kdbench.engine.options import Logged, Options
    from kdbench.engine.workers.runner import run as run_plan
    from kdbench.engine.workers.tuning import tuned
    from kdbench.errors import counted
    from kdbench.files import expanded, failed, paths_of
    from kdbench.recipe.planning import plan
    from kdbench.record import read_records
    from kdbench.registry import Registry
    from kdbench.tree import plain

    folders = paths_of(registries, "registries")
    if isinstance(overrides, dict):
        overrides = [f"{path}={json.dumps(plain(value))}" for path, value in overrides.items()]
    texts = (overrides,) if isinstance(overrides, str) else tuple(overrides)
    planned = plan(plain(recipe) if isinstance(recipe, dict) else recipe, Registry(folders), texts)
    options["data_roots"] = paths_of(options.get("data_roots") or (), "data_roots")
    options["device"] = str(options.get("device", "auto"))
    how, told = Options(runs=expanded(runs, "runs"), registries=folders, **options), Logged()
    for remark in planned.remarks:
        told.say(f"note: {remark}")
    planned = tuned(planned, how, told)
    outcome = run_plan(planned, how, told)
    if outcome.failed:
        said = "; ".join(f"{state.label}: {state.message}" for state in outcome.failed)
        what = f"{len(outcome.failed)} of {counted(len(planned.cells), 'cell')} failed: {said}"
        raise failed(what, [state.message for state in outcome.failed])
    return read_records(outcome.finished)


def table(
    records: str | Path | Record | Iterable[Record | str | Path],
    published: str | Iterable[str] = (),
    registries: str | Path | Iterable[str | Path] = (),
    each_seed: bool = False,
    **options: Any,
) -> pandas.DataFrame:
    """A comparison table of records: mean, deviation, n and paired difference for each method.

    Args:
        records: Records, or folders that hold them; one alone too.
        published: Keys of published tables to show too, or one alone; "key:ce,kd" takes some of its methods.
        registries: Folders with your own cards, if a published table is one of them.
        each_seed: One row for each record, with the columns of `records.csv`, and nothing compared. It goes with no
            published table and no options.
        options: Arguments of `kdbench.results.tables.build` (baseline, metric, interval, columns, …).

    Returns:
        One row for each method and column of the table, with the columns of `table.csv`.

    Raises:
        UserError: There are no records, or they cannot stand in one table.
    """
    from kdbench.errors import UserError
    from kdbench.record import Record, read_records, unfinished
    from kdbench.results.copied import published_tables
    from kdbench.results.frames import records_frame, to_frame
    from kdbench.results.tables import build

    given = [records] if isinstance(records, str | Path | Record) else list(records)
    found = [one for one in given if isinstance(one, Record)]
    paths = [one for one in given if not isinstance(one, Record)]
    found += read_records(paths) if paths else []
    if each_seed:
        if other := [*options, *(["published"] if published else [])]:
            raise UserError(f"'{other[0]}' is for a table that compares", "each_seed", "leave one of the two out")
        return records_frame(found)
    beside = published_tables([published] if isinstance(published, str) else published, registries)
    if paths:
        options.setdefault("unfinished", unfinished(paths))
    return to_frame(build(found, published=beside, **options))


def load_student(
    folder: str | Path | Record,
    registries: str | Path | Iterable[str | Path] = (),
    weights: Literal["last", "best"] = "last",
) -> nn.Module:
    """The trained network of a finished cell, in eval mode, on the CPU.

    It takes float32 images [N, C, H, W], normalized as in training: pixels in [0, 1], minus the mean and divided by the
    deviation in `record.spec["protocol"]["normalization"]`. It returns logits [N, K].

    Args:
        folder: The cell's folder, `runs/<recipe>/<cell>`, or its record, as `run` returns it.
        registries: Folders with your own cards, if the model is one of them.
        weights: "last" for the weights after the last step, "best" for those of the best evaluation, if the recipe said
            `keep: best`.

    Returns:
        The network.

    Raises:
        UserError: There is no finished cell, or its weights are missing or not those of its record.
    """
    from kdbench.engine.networks import trained
    from kdbench.files import expanded
    from kdbench.record import Record

    where = folder.read_from if isinstance(folder, Record) else expanded(folder, "load_student")
    return trained.load_student(where, registries, weights)
