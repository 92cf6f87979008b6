"""Chooses the settings of a recipe that tunes.

The candidates' cells are trained, as a run of their own, and the table gets the best of each method. Imports no torch.

The candidates are tested on a validation part in place of the test set, which nothing here touches.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from kdbench.engine.options import Listener, Options
from kdbench.engine.workers.finished import OtherTrials, differing
from kdbench.engine.workers.runner import run
from kdbench.errors import NOT_FINITE, CellError, counted
from kdbench.files import TRIALS, failed
from kdbench.recipe.planning import Candidate, Plan, PlannedCell
from kdbench.record import Record, made_from, read_record
from kdbench.record_parts import RecordedTuning

# Identity of a tried cell -> its accuracy, None where its loss was not finite.
Known = Mapping[str, float | None]


def tuned(
    plan: Plan, options: Options, listener: Listener | None = None, published: Mapping[str, Record] | None = None
) -> Plan:
    """A plan whose cells have the best of the settings that its recipe tries; the plan itself where it tries none.

    Args:
        published: name of a folder of published results -> the record there, of cells that hold accuracies of tried
            ones, and of teachers. What they hold is not trained again, if data and teachers here are theirs.

    Raises:
        OtherTrials: they are not, as far as it was seen here: `run` sees it of a plan whose trials are all known.
        CellError: a candidate failed otherwise than by a loss that is not finite, or none of a method did not.
        UserError, KeyboardInterrupt: as of `run`.
    """
    if not plan.candidates:
        return plan
    before, trials = published or {}, tried_plan(plan)
    known, teachers = known_of(before.values()), {name: one for name, one in before.items() if one.cell.tuning is None}
    left = [cell for cell in trials.cells if cell.spec.identity() not in known]
    if not left:
        return chosen(plan, known)
    found = _trained(replace(trials, cells=left), options, listener, teachers)
    now = {key: sha for record in found.records for key, sha in made_from(record).items()}
    if known and (why := differing(before.values(), now)):
        raise OtherTrials(why)
    if known:
        among = f"{len(trials.cells) - len(left)} of {counted(len(trials.cells), 'trial')}"
        (listener or Listener()).say(f"accuracies of {among} taken from published results")
    return chosen(plan, known | found.known)


def tried_plan(plan: Plan) -> Plan:
    """The run of a plan's candidates: a folder beside its own."""
    title = ": ".join(filter(None, [plan.title, "settings, tried on the validation part"]))
    return Plan(f"{plan.name}{TRIALS}", title, plan.tried, plan.baseline, plan.recipe)


class _Found(NamedTuple):
    known: dict[str, float | None]
    records: list[Record]


def _trained(trials: Plan, options: Options, listener: Listener | None, published: Mapping[str, Record]) -> _Found:
    outcome = run(trials, options, listener, published=published)
    if broken := [state for state in outcome.failed if not state.message.startswith(NOT_FINITE)]:
        what = f"{len(broken)} of {counted(len(trials.cells), 'cell')} of tuning failed, so nothing was chosen: "
        raise failed(f"{what}{broken[0].label}: {broken[0].message}", [state.message for state in broken])
    records = [read_record(folder) for folder in outcome.finished]
    none: dict[str, float | None] = {state.spec.identity(): None for state in outcome.failed}
    return _Found(none | {record.identity: record.result.test.last for record in records}, records)


def chosen(plan: Plan, known: Known) -> Plan:
    """A plan whose cells have the best settings.

    Raises:
        CellError: all that a method tried had losses that were not finite.
        KeyError: an accuracy is not known.
    """
    cells: dict[str, PlannedCell] = {}
    for order in sorted({cell.order for cell in plan.cells}):
        own = [cell for cell in plan.cells if cell.order == order]
        if order in plan.candidates:
            own = _best(plan, plan.candidates[order], known)
        for cell in own:
            cells.setdefault(cell.spec.identity(), cell)
    return replace(plan, cells=list(cells.values()), candidates={})


def _best(plan: Plan, candidates: list[Candidate], known: Known) -> list[PlannedCell]:
    assert plan.tune is not None
    trials: list[dict[str, Any]] = []
    for candidate in candidates:
        identities = [cell.spec.identity() for cell in candidate.tried]
        trials.append(
            {"setting": candidate.setting, "cells": identities, "accuracies": [known[one] for one in identities]}
        )
    validation = candidates[0].tried[0].spec.data.validation
    tuning = RecordedTuning.model_validate({"seeds": plan.tune.seeds, "validation": validation, "trials": trials})
    if tuning.chosen.mean is None:
        raise CellError(f"'{candidates[0].cells[0].spec.method.label}': no setting has finite losses")
    best = candidates[tuning.trials.index(tuning.chosen)]
    return [replace(cell, tuning=tuning.model_dump(mode="json")) for cell in best.cells]


def known_of(records: Iterable[Record]) -> dict[str, float | None]:
    """The accuracies of tried cells that records of a table hold."""
    return {
        identity: accuracy
        for record in records
        if record.cell.tuning is not None
        for tried in record.cell.tuning.trials
        for identity, accuracy in zip(tried.cells, tried.accuracies, strict=True)
    }
