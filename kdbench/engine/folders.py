"""Where the cells of a run and its teachers lie, and which have finished there. Imports no torch."""

import pickle
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kdbench.engine.scheduling import CellState
from kdbench.files import CHECKPOINT, TEACHERS
from kdbench.reading import inside
from kdbench.recipe.planning import PlannedCell, identity_of
from kdbench.recipe.specs import TeacherSpec
from kdbench.record import finished_record


def cell_folders(folder: Path, cells: Iterable[PlannedCell]) -> list[Path]:
    """Cells' folders in a run's, also where they finished under another name: in an earlier version, or when other
    things were compared."""
    there: dict[str, list[str]] = {}
    for name in sorted(other.name for other in folder.iterdir()) if folder.is_dir() else ():
        there.setdefault(identity_of(name), []).append(name)
    names = (
        [*cell.slugs, *(name for slug in cell.slugs for name in there.get(identity_of(slug), ()))] for cell in cells
    )
    return [_finished_or_first([inside(folder, name) for name in of_cell]) for of_cell in names]


def cell_states(folder: Path, cells: Sequence[PlannedCell]) -> list[CellState]:
    """The cells of a run with their folders."""
    folders = cell_folders(folder, cells)
    return [CellState(cell, i, own) for i, (cell, own) in enumerate(zip(cells, folders, strict=True))]


def open_cells(cells: Sequence[PlannedCell], folder: Path) -> list[PlannedCell]:
    """Those of a run's cells that have not finished in its folder."""
    folders = cell_folders(folder, cells)
    return [cell for cell, own in zip(cells, folders, strict=True) if finished_record(own) is None]


class _Skipped(dict[Any, Any]):
    """In place of tensors, and of whatever else is no plain data."""

    def __init__(self, *given: Any) -> None:
        super().__init__()


class _PlainData(pickle.Unpickler):
    """Reads the plain data of what torch saved. Nothing that it names is imported or called."""

    def find_class(self, module: str, name: str) -> type:
        return _Skipped

    def persistent_load(self, pid: Any) -> None:
        return None


def checkpoint_step(folder: Path) -> int | None:
    """The step of a cell's checkpoint; None where there is none that can be read. Whether it fits to the cell is seen
    when the cell trains (`kdbench.engine.checkpoint`)."""
    try:
        with zipfile.ZipFile(folder / CHECKPOINT) as parts:
            (name,) = (part for part in parts.namelist() if part.endswith("/data.pkl"))
            with parts.open(name) as file:
                step = _PlainData(file).load()["step"]
    except Exception:  # noqa: BLE001 - a damaged file can fail in any way
        return None
    return step if type(step) is int else None


def teacher_folder(spec: TeacherSpec, runs: Path) -> Path:
    """Folder of a teacher: the records of its training, or its measured accuracy (of several: all their weights)."""
    # A model of timm's has a colon in its name.
    name = spec.name.replace(":", "_")
    if spec.members:
        return inside(runs / TEACHERS, f"{name}-{spec.identity()[:8]}")
    if (own := spec.trained_by) is None:
        which = spec.identity()[:8] if spec.choice else spec.weights.sha256[:8] if spec.weights else "untrained"
        return inside(runs / TEACHERS, f"{name}-{which}")
    names = [f"{spec.name}-{identity[:8]}" for identity in own.identities()]
    return _finished_or_first([inside(runs / TEACHERS, name) for name in names])


def _finished_or_first(folders: list[Path]) -> Path:
    return next((folder for folder in folders if finished_record(folder) is not None), folders[0])
