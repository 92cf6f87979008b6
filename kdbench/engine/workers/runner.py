"""Carries a plan out: teachers first, then cohorts of cells spread over worker processes. Imports no torch.

What is finished is never run again: a cell's folder name holds its identity, and a sound record in it makes it whole,
for the data and the teacher that the record names.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

from kdbench.engine.computing import compute
from kdbench.engine.folders import cell_states
from kdbench.engine.options import Listener, Options
from kdbench.engine.scheduling import Cells, CellState, begun
from kdbench.engine.workers.finished import DataHere, Finished, names
from kdbench.engine.workers.session import Session, locked_run
from kdbench.errors import UserError
from kdbench.files import RECORD, RUN, write_json
from kdbench.reading import same_name
from kdbench.recipe.planning import Plan
from kdbench.record import Record, read_record

# Characters that are kept of why a cell failed.
LONGEST_REASON = 200


@dataclass
class Outcome:
    """Folders of finished cells in the plan's order, and what failed."""

    folder: Path
    finished: list[Path] = field(default_factory=list)
    failed: list[CellState] = field(default_factory=list)


def run(
    plan: Plan,
    options: Options,
    listener: Listener | None = None,
    results: Path = Path(),
    published: Mapping[str, Record] | None = None,
    trials: Iterable[Record] = (),
) -> Outcome:
    """Run every cell of a plan that is not finished yet.

    Args:
        results, published: a folder of published results, and records in it by the names of their cells' folders: such
            a cell is taken over in place of training it, where it fits to the data and the teacher here.
        trials: published records by whose accuracies of tried cells the plan's settings were chosen.

    Raises:
        OtherTrials: data or teacher of these trials are other ones than those here.
        UserError: another run works there; data or weights are not to be had; a damaged record, or one that was made
            from other data or by another teacher than those here.
        KeyboardInterrupt: after all cells were checkpointed.
    """
    listener = listener or Listener()
    folder = options.runs / plan.name
    _check_case(folder)
    with locked_run(folder):
        cells = cell_states(folder, plan.cells)
        finished = Finished(cells, published or {}, options.runs, listener.say)
        # What is damaged of the way in which they began is told before a teacher is trained.
        for cell in finished.open:
            begun(cell.folder), compute.kept(folder, cell.spec.compute)
        # Who only wants a table need not have the device.
        if not finished.open and not finished.taken:
            options = replace(options, device="cpu")
        with Session(options, listener) as session:
            try:
                session.check_cells(finished.open)
            except UserError as error:
                raise plan.placed(error) from None
            here = DataHere(session.pool, listener.say)
            finished.compare_data(here)
            session.train_teachers(finished.open, here, finished.teachers)
            finished.compare_teachers()
            finished.check_trials(trials, here)
            finished.adopt(results, folder)
            for cell in (cell for cell in cells if cell.state == "finished"):
                _rename(cell.folder / RECORD, names(plan, cell.cell))
            # Published cells that were not taken are open now.
            session.check_cells(finished.open)
            # A plan that was refused leaves the last one's table as it is.
            write_json(folder / RUN, _about(plan, cells))
            listener.begin(cells, plan.title or plan.name)
            try:
                if finished.open:
                    done = [cell.folder for cell in cells if cell.state == "finished"]
                    session.train(plan, folder, finished.open, done)
            finally:
                listener.end()
                _tell_failed(folder / RUN, _about(plan, cells), cells)
    done = [cell.folder for cell in cells if cell.state == "finished"]
    return Outcome(folder, done, [cell for cell in cells if cell.state == "failed"])


def _about(plan: Plan, cells: Cells) -> dict[str, Any]:
    """What a run's folder says of it."""
    about = {"name": plan.name, "title": plan.title, "recipe": plan.recipe}
    return about | {"cells": [cell.folder.name for cell in cells]}


def _tell_failed(file: Path, about: dict[str, Any], cells: Cells) -> None:
    """Keep why cells failed, without the advice that follows, for whoever makes a table of the others."""
    failed = [(cell, cell.message.partition("\n")[0].partition("; ")[0]) for cell in cells if cell.state == "failed"]
    if failed:
        said = {cell.folder.name: f"{cell.label}: {shorten(why, LONGEST_REASON)}" for cell, why in failed}
        # On a full disk a table names them by their folders.
        with suppress(OSError):
            write_json(file, about | {"failed": said})


def _check_case(folder: Path) -> None:
    """Refuse a folder beside which another lies whose name many systems take for the same."""
    for other in folder.parent.iterdir() if folder.parent.is_dir() else ():
        if other.name != folder.name and same_name(other.name, folder.name):
            what = f"there is another run, '{other.name}', whose name is the same on other systems"
            raise UserError(what, str(folder), "rename the recipe's file, or give another folder: --runs DIR")


def _rename(file: Path, place: dict[str, Any]) -> None:
    """Let the record of a cell that was finished before say what the recipe calls it and its teacher today, and no more
    than that."""
    try:
        before = read_record(file).plain()
    except UserError:
        return  # Whoever reads the records tells what is wrong with it.
    spec = before["spec"] | {"method": (before["spec"].get("method") or {}) | {"label": place["cell"]["label"]}}
    if spec.get("teacher"):
        spec["teacher"] = spec["teacher"] | {"name": place["cell"]["teacher"]}
    record = Record.model_validate(before | place | {"spec": spec}).plain()
    if record != before:
        write_json(file, record)
