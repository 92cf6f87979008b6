"""Where the cells of a run and its teachers lie, and which have finished there. Imports no torch."""

from collections.abc import Iterable
from pathlib import Path

from kdbench.files import TEACHERS
from kdbench.reading import inside
from kdbench.recipe.planning import PlannedCell
from kdbench.recipe.specs import TeacherSpec
from kdbench.record import finished_record


def cell_folder(folder: Path, cell: PlannedCell) -> Path:
    """A cell's folder in a run's, also where an earlier version finished it under another name."""
    return _finished_or_first([inside(folder, slug) for slug in cell.slugs])


def open_cells(cells: Iterable[PlannedCell], folder: Path) -> list[PlannedCell]:
    """Those of a run's cells that have not finished in its folder."""
    return [cell for cell in cells if finished_record(cell_folder(folder, cell)) is None]


def teacher_folder(spec: TeacherSpec, runs: Path) -> Path:
    """Folder of a teacher: the records of its training, or its measured accuracy (of several: all their weights)."""
    if spec.members:
        return inside(runs / TEACHERS, f"{spec.name}-{spec.identity()[:8]}")
    if (own := spec.trained_by) is None:
        which = spec.identity()[:8] if spec.choice else spec.weights.sha256[:8] if spec.weights else "untrained"
        return inside(runs / TEACHERS, f"{spec.name}-{which}")
    names = [f"{spec.name}-{own.identity(earlier)[:8]}" for earlier in (False, True)]
    return _finished_or_first([inside(runs / TEACHERS, name) for name in names])


def _finished_or_first(folders: list[Path]) -> Path:
    return next((folder for folder in folders if finished_record(folder) is not None), folders[0])
