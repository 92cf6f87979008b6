"""Carries out `kdbench logits fill`: teachers first, then their tables, one after the other. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable

from kdbench.engine import choosing
from kdbench.engine.compute import plainest
from kdbench.engine.finished import DataHere
from kdbench.engine.messages import Failed, Filled, FillLogits, TableFound
from kdbench.engine.runner import (
    Listener,
    Options,
    alone,
    computings_for,
    is_finished,
    label,
    pool_for,
    prepare,
    teacher_folder,
    train_teachers,
    try_out,
)
from kdbench.engine.scheduling import CellState, Work
from kdbench.errors import UserError
from kdbench.recipe.planning import Plan
from kdbench.recipe.specs import TermSpec


def fill_logits(
    plan: Plan,
    options: Options,
    estimate: bool,
    told: Callable[[str, TableFound], None],
    filled: Callable[[int, float], None],
    listener: Listener,
) -> None:
    """Fill the tables of teacher logits that the cells of a plan can use; with `estimate` only tell what that takes.

    Args:
        told: is given every teacher and its table before that is filled.
        filled: is given images done and seconds of this call, now and then.
    """
    wanted: dict[str, Work] = {}
    for i, cell in enumerate(plan.cells):
        spec = cell.spec
        terms = [term for stage in spec.method.stages.values() for term in stage.losses.values()]
        if spec.teacher is not None and any(_reads_logits(t) for t in terms):
            parts = [spec.teacher.identity(), spec.data.name, spec.protocol.augmentation, choosing.key(spec.compute)]
            wanted.setdefault(str(parts), (cell, CellState(i, label(cell), options.runs / plan.name / cell.slug)))
    if not wanted:
        raise UserError("no method of this recipe reads its teacher's logits", where=plan.name)
    folder = options.runs / plan.name
    with alone(folder), pool_for(options) as pool:
        specs = [cell.spec for cell, _ in wanted.values()]
        try_out(specs, pool)
        if not estimate:
            train_teachers(specs, options, pool, listener, DataHere(pool, listener.say))
            prepare(specs, options, pool, listener)
        teachers = {spec.teacher.identity() for spec in specs if spec.teacher}
        known = [c for c in plan.cells if c.spec.teacher is None or c.spec.teacher.identity() in teachers]
        work = [(c, CellState(i, label(c), folder / c.slug)) for i, c in enumerate(known)]
        done = [state.folder for _, state in work if is_finished(state.folder)]
        if estimate:
            keys = {choosing.key(spec.compute): spec.compute for spec in specs}
            computings = {key: choosing.kept(folder, choice) or plainest(choice) for key, choice in keys.items()}
        else:
            computings = computings_for(folder, work, done, options, pool, listener)
        for cell, _ in wanted.values():
            assert cell.spec.teacher is not None
            task = FillLogits(
                spec=cell.spec,
                computing=computings[choosing.key(cell.spec.compute)],
                estimate=estimate,
                teacher_folder=teacher_folder(cell.spec.teacher, options.runs),
                threads=options.threads or pool.threads,
            )
            for event in pool.carry_out([task]):
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, TableFound):
                    told(cell.spec.teacher.name, event)
                elif isinstance(event, Filled):
                    filled(event.done, event.seconds)


def _reads_logits(term: TermSpec) -> bool:
    """Whether a term takes its teacher's logits on the data set's own views."""
    return term.input == "data" and "teacher" in term.loss.inputs and term.teacher == "logits"
