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
    overrides: Iterable[str] | dict[str, Any] = (),
    *,
    runs: str | Path = "runs",
    registries: Iterable[str | Path] = (),
    **options: Any,
) -> list[Record]:
    """Train every cell that a recipe plans and that is not finished yet.

    Args:
        recipe: a file, the name of a shipped recipe, or plain data of the same form.
        overrides: texts "dotted.path=value", or a mapping of dotted paths to values.
        runs: folder under which `runs/<recipe>/` is written.
        registries: further registry folders.
        options: fields of `kdbench.engine.options.Options` (jobs, threads, device, data_roots, download …).

    Returns:
        the records of the finished cells, in the order of the comparison.

    Raises:
        UserError: a mistake in the recipe, missing data or weights.
        CellError: a cell failed (the others are finished and recorded).
    """
    import json

    from kdbench.engine.options import Options
    from kdbench.engine.runner import run as run_plan
    from kdbench.engine.tuning import tuned
    from kdbench.errors import CellError
    from kdbench.recipe.planning import plan
    from kdbench.record import read_records
    from kdbench.registry import Registry
    from kdbench.tree import plain

    folders = tuple(Path(folder) for folder in registries)
    texts = [f"{k}={json.dumps(plain(v))}" for k, v in overrides.items()] if isinstance(overrides, dict) else overrides
    planned = plan(plain(recipe) if isinstance(recipe, dict) else recipe, Registry(folders), tuple(texts))
    how = Options(runs=Path(runs), registries=folders, **options)
    planned = tuned(planned, how)
    outcome = run_plan(planned, how)
    if outcome.failed:
        failed = "; ".join(f"{state.label}: {state.message}" for state in outcome.failed)
        raise CellError(f"{len(outcome.failed)} of {len(planned.cells)} cells failed: {failed}")
    return read_records(outcome.finished)


def table(records: Iterable[Record] | Iterable[str | Path], **options: Any) -> pandas.DataFrame:
    """Records (or folders that hold them) as a comparison table: mean, deviation, n, paired difference.

    Args:
        options: those of `kdbench.results.tables.build` (baseline, metric, interval, published).
    """
    from kdbench.record import Record, read_records
    from kdbench.results.frames import to_frame
    from kdbench.results.tables import build

    given = list(records)
    found = [r for r in given if isinstance(r, Record)]
    paths = [Path(r) for r in given if not isinstance(r, Record)]
    return to_frame(build([*found, *(read_records(paths) if paths else [])], **options))


def load_student(
    folder: str | Path, registries: Iterable[str | Path] = (), weights: Literal["last", "best"] = "last"
) -> nn.Module:
    """The trained network of a finished cell's folder, in eval mode, on the CPU.

    Args:
        registries: folders with the user's own models, if it is one of them.
        weights: after the last step, or of the best evaluation, where the recipe said `keep: best`.

    Its input is normalized as the record's protocol says (`record.spec["protocol"]["normalization"]`).
    """
    from kdbench.engine import trained

    return trained.load_student(Path(folder), registries, weights)
