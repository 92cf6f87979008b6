"""From published results back into a run: which cells of a plan need no training, because their records are there."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from kdbench.engine.folders import cell_folders, open_cells
from kdbench.engine.workers.tuning import Known, chosen, known_of, tried_plan
from kdbench.errors import UserError
from kdbench.files import RECORD, RUN, weight_files
from kdbench.recipe.planning import Plan, PlannedCell
from kdbench.record import Record, finished_record, metrics, read_record, read_records
from kdbench.verify import sums
from kdbench.verify.soundness import problems


def tried(plan: Plan, folder: Path) -> dict[str, Record]:
    """Of a plan that tunes: the published records that hold accuracies of its tried cells, and those of teachers.

    Raises:
        UserError: a record that holds some is damaged, or was changed since.
    """
    if not plan.candidates or not (folder / RUN).is_file():
        return {}
    asked = {cell.spec.identity() for cell in plan.tried}
    records = [record for record in read_records([folder]) if asked & known_of([record]).keys()]
    return _checked({record.read_from.name: record for record in records}, folder)


def computed_otherwise(plan: Plan, folder: Path) -> str | None:
    """How the published cells of a plan's name were computed, as overrides, where the plan computes in another way."""
    if not (folder / RUN).is_file():
        return None
    specs = [record.resolved for record in read_records([folder])]
    ways = [spec.compute.fixed() for spec in specs if spec is not None]
    asked = [{}, *(cell.spec.compute.fixed() for cell in plan.cells)]
    if not ways or ways[0] in asked or any(way != ways[0] for way in ways):
        return None
    return " ".join(f"compute.{key}={str(value).lower()}" for key, value in ways[0].items())


class Left(NamedTuple):
    """What a run of a plan would do.

    Attributes:
        plan: it, with the settings that are chosen, of methods whose trials are all known.
        tried: cells that it would train first, to choose settings.
        cells: that it would train then.
        taken: how many it would take from published results instead.
        teachers: identities of the teachers that it would take from there.
    """

    plan: Plan
    tried: list[PlannedCell]
    cells: list[PlannedCell]
    taken: int
    teachers: frozenset[str]


def left_of(plan: Plan, runs: Path, results: Path | None) -> Left:
    """What is left of a plan."""
    known = _known(plan, runs, results)
    trials = [cell for cell in plan.tried if cell.spec.identity() not in known]
    if plan.candidates:
        unknown = {cell.spec.identity() for cell in trials}
        ready = {
            order: several
            for order, several in plan.candidates.items()
            if not unknown & {cell.spec.identity() for one in several for cell in one.tried}
        }
        rest = {order: several for order, several in plan.candidates.items() if order not in ready}
        plan = replace(chosen(replace(plan, candidates=ready), known), candidates=rest)
    open_here = open_cells(plan.cells, runs / plan.name)
    found = published(plan, results / plan.name) if results is not None else {}
    cells = [cell for cell in open_here if cell.slug not in found]
    there = {record.identity for record in found.values() if record.folder and weight_files(record.folder)}
    teachers = [one for cell in cells for one in cell.spec.teachers]
    theirs = frozenset(one.identity() for one in teachers if (own := one.trained_by) and own.identity() in there)
    return Left(plan, trials, cells, len(open_here) - len(cells), theirs)


def _known(plan: Plan, runs: Path, results: Path | None) -> Known:
    """The accuracies of tried cells that published results hold, or finished trials here."""
    if not plan.candidates:
        return {}
    folders = cell_folders(runs / tried_plan(plan).name, plan.tried)
    known = {one.identity: one.result.test.last for own in folders if (one := finished_record(own)) is not None}
    return known | known_of(tried(plan, results / plan.name).values()) if results is not None else known


def published(plan: Plan, folder: Path) -> dict[str, Record]:
    """The records of a plan's cells in a folder that `kdbench publish` wrote, and those of teachers there, by the names
    of their folders; none where there is no such folder.

    Raises:
        UserError: one of them is damaged, or was changed since.
    """
    if not (folder / RUN).is_file():
        return {}
    found = {}
    for cell, own in zip(plan.cells, cell_folders(folder, plan.cells), strict=True):
        if (record := finished_record(own)) is not None:
            found[cell.slug] = record
    return _checked(found, folder)


def _checked(found: dict[str, Record], folder: Path) -> dict[str, Record]:
    """These published records, and those of teachers beside them; none where there are none.

    Raises:
        UserError: one of them is damaged, or was changed since.
    """
    if found:
        found |= {file.parent.name: read_record(file) for file in sorted(folder.glob(f"teacher*/{RECORD}"))}
    changed = sums.changed(folder) if found else []
    for record in found.values():
        place = record.read_from
        wrong = [what for what in changed if what.startswith(f"{place.name}/")]
        wrong += problems(record, metrics(place))
        if wrong:
            hint = "'kdbench verify' tells more; with --no-adopt every cell is trained here"
            raise UserError(f"this published record cannot be used: {wrong[0]}", str(place), hint)
    return found
