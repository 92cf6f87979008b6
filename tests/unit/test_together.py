"""Cells of several seeds that one worker trains at once leave what each leaves alone."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from kdbench.engine.build import build_model
from kdbench.engine.compute import REFERENCE
from kdbench.engine.finished import names
from kdbench.engine.messages import CellFailed, CellTask, Event, Settings, TrainCells
from kdbench.engine.tasks import TaskRunner
from kdbench.recipe.planning import Plan, PlannedCell, plan
from kdbench.record import read_record
from kdbench.record_parts import Result
from kdbench.registry import Registry

REGISTRY = Registry()
# Every seed holds out images of its own.
HELD_OUT = {"name": "digits", "per_class": 4, "validation": 100, "tested_on": "validation"}
SMALL = {"data": HELD_OUT, "student": "wrn_10_1", "protocol": "digits", "method": "kd", "steps": 1, "evaluations": 1}


def results(planned: Plan, cells: list[PlannedCell], folder: Path) -> list[Result]:
    """What cells come to that one worker trains at once."""
    task = TrainCells(
        cells=[
            CellTask(id=i, folder=folder / str(i), spec=cell.spec, names=names(planned, cell))
            for i, cell in enumerate(cells)
        ],
        computing=REFERENCE,
        logits=None,
        teacher_folder=folder / "teacher",
        shared=folder,
        settings=Settings(cache=folder.parent),
    )
    told: list[Event] = []
    TaskRunner(told.append, lambda: False).run(task)
    assert not [event for event in told if isinstance(event, CellFailed)]
    return [read_record(cell.folder / "record.json").result for cell in task.cells]


def test_the_share_of_the_teachers_answers_is_that_on_the_images_of_each_seed(tmp_path: Path) -> None:
    model = plan({**SMALL, "method": "ce"}, REGISTRY).cells[0].spec
    save_file(build_model(model.student, model.data, seed=0).state_dict(), tmp_path / "teacher.safetensors")
    teacher = {"model": "wrn_10_1", "weights": str(tmp_path / "teacher.safetensors")}
    planned = plan(SMALL | {"teacher": teacher, "seeds": 2}, REGISTRY)
    alone = [results(planned, [cell], tmp_path / f"alone {cell.spec.seed}")[0] for cell in planned.cells]
    assert results(planned, planned.cells, tmp_path / "together") == alone
    assert alone[0].fidelity
