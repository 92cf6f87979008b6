"""Carries out `kdbench logits fill`: teachers first, then their tables, one after the other. Imports no torch."""

from collections.abc import Callable

from kdbench.engine.computing import compute
from kdbench.engine.computing.compute import plainest
from kdbench.engine.folders import cell_states, teacher_folder
from kdbench.engine.options import Listener, Options
from kdbench.engine.scheduling import CellState, cohorts_of
from kdbench.engine.workers.finished import DataHere
from kdbench.engine.workers.messages import Filled, FillLogits, TableFound
from kdbench.engine.workers.session import Session, locked_run
from kdbench.errors import UserError
from kdbench.recipe.method_specs import TermSpec
from kdbench.recipe.planning import Plan
from kdbench.recipe.timeline import planned_timeline
from kdbench.record import finished_record


def fill_logits(
    plan: Plan,
    options: Options,
    estimate: bool,
    told: Callable[[str, TableFound, int], None],
    filled: Callable[[int, float], None],
    listener: Listener,
) -> None:
    """Fill the tables of teacher logits that the cells of a plan can use; with `estimate` only tell what that takes.

    Args:
        told: is given every teacher, its table before that is filled, and the number of views that the teacher would be
            shown by a run of these cells without a table.
        filled: is given images done and seconds of this call, now and then.
    """
    folder = options.runs / plan.name
    cells = cell_states(folder, plan.cells)
    wanted: dict[str, list[CellState]] = {}
    for cell in cells:
        spec = cell.spec
        if spec.teacher is not None and any(map(_reads_logits, spec.method.terms)):
            images, way = spec.data.images_key(), compute.key(spec.compute)
            parts = [spec.teacher.identity(), images, spec.protocol.augmentation, way]
            wanted.setdefault(str(parts), []).append(cell)
    if not wanted:
        raise UserError("no method of this recipe uses the teacher's logits", where=plan.name)
    first = [same[0] for same in wanted.values()]
    with locked_run(folder), Session(options, listener) as session:
        session.check_cells(first)
        if estimate:
            choices = {compute.key(cell.spec.compute): cell.spec.compute for cell in first}
            computings = {key: compute.kept(folder, choice) or plainest(choice) for key, choice in choices.items()}
        else:
            session.train_teachers(first, DataHere(session.pool, listener.say))
            session.prepare(first)
            teachers = {cell.spec.teacher.identity() for cell in first if cell.spec.teacher}
            known = [c for c in cells if c.spec.teacher is None or c.spec.teacher.identity() in teachers]
            session.check_cells(known)
            done = [cell.folder for cell in known if finished_record(cell.folder) is not None]
            computings = session.computings(folder, known, done)
        for same in wanted.values():
            spec = same[0].spec
            assert spec.teacher is not None
            task = FillLogits(
                specs=[cell.spec for cell in same],
                computing=computings[compute.key(spec.compute)],
                estimate=estimate,
                teacher_folder=teacher_folder(spec.teacher, options.runs),
                threads=options.threads or session.pool.threads,
            )
            for event in session.events([task]):
                if isinstance(event, TableFound):
                    told(spec.teacher.name, event, _shown(same))
                elif isinstance(event, Filled):
                    filled(event.done, event.seconds)


def _shown(cells: list[CellState]) -> int:
    """Views that cells of one teacher show it: those of a cohort train side by side, behind one pass."""
    specs = ([cell.spec for cell in cohort] for cohort in cohorts_of(cells))
    return sum(max(planned_timeline(spec).total * spec.protocol.batch_size for spec in cohort) for cohort in specs)


def _reads_logits(term: TermSpec) -> bool:
    """Whether a term takes its teacher's logits on the data set's own views."""
    return term.input == "data" and "teacher" in term.loss.inputs and term.teacher == "logits"
