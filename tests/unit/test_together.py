"""Cells of several seeds that one worker trains at once leave what each leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shipped import REGISTRY

from kdbench.api import load_student
from kdbench.data.images import ImageData
from kdbench.engine.computing.compute import REFERENCE
from kdbench.engine.networks.build import build_model
from kdbench.engine.teachers import logit_table
from kdbench.engine.teachers.logit_files import table_at
from kdbench.engine.workers.finished import names
from kdbench.engine.workers.materials import Materials
from kdbench.engine.workers.messages import CellFailed, CellTask, Event, Settings, TrainCells
from kdbench.engine.workers.tasks import TaskRunner
from kdbench.recipe.planning import Plan, PlannedCell, plan
from kdbench.record import metrics, read_record
from kdbench.record_parts import Result

# Every seed holds out images of its own.
HELD_OUT = {"name": "digits", "per_class": 4, "validation": 100, "tested_on": "validation"}
SMALL = {"data": HELD_OUT, "student": "wrn_10_1", "protocol": "digits", "method": "kd", "steps": 1, "evaluations": 1}


def results(planned: Plan, cells: list[PlannedCell], folder: Path, tables: Path = Path("none")) -> list[Result]:
    """What cells come to that one worker trains at once.

    Args:
        tables: of teachers' logits.
    """
    task = TrainCells(
        cells=[
            CellTask(id=i, folder=folder / str(i), spec=cell.spec, names=names(planned, cell))
            for i, cell in enumerate(cells)
        ],
        computing=REFERENCE,
        logits=None,
        teacher_folder=folder / "teacher",
        shared=folder,
        settings=Settings(cache=folder.parent, tables=tables),
    )
    told: list[Event] = []
    TaskRunner(told.append, lambda: False).run(task)
    assert not [event for event in told if isinstance(event, CellFailed)]
    return [read_record(cell.folder / "record.json").result for cell in task.cells]


def taught(folder: Path) -> Plan:
    """Two seeds that learn from a teacher with first weights."""
    model = plan({**SMALL, "method": "ce"}, REGISTRY).cells[0].spec
    save_file(build_model(model.student, model.data, seed=0).state_dict(), folder / "teacher.safetensors")
    teacher = {"model": "wrn_10_1", "weights": str(folder / "teacher.safetensors")}
    return plan(SMALL | {"teacher": teacher, "seeds": 2}, REGISTRY)


def test_the_share_of_the_teachers_answers_is_that_on_the_images_of_each_seed(tmp_path: Path) -> None:
    planned = taught(tmp_path)
    alone = [results(planned, [cell], tmp_path / f"alone {cell.spec.seed}")[0] for cell in planned.cells]
    assert results(planned, planned.cells, tmp_path / "together") == alone
    assert alone[0].fidelity


def test_each_seed_looks_up_the_logits_of_its_own_training_images(tmp_path: Path) -> None:
    planned, materials = taught(tmp_path), Materials()
    materials.settings = Settings(cache=tmp_path, tables=tmp_path / "tables")
    spec = planned.cells[0].spec
    file, data = materials.teacher_file(spec, tmp_path / "teacher"), materials.data(spec.data)
    teacher = materials.teacher(spec, file, REFERENCE)
    assert file is not None and teacher is not None and spec.teacher is not None and isinstance(data, ImageData)
    key = logit_table.table_key(spec, file.sha256, data, "float32")
    table = table_at(key, spec.teacher.name, materials.settings.tables)
    cpu = torch.device("cpu")
    # The images of one seed are too few for both.
    for way, cells in (("computed", planned.cells[:1]), ("looked up", planned.cells)):
        images = logit_table.images_of([cell.spec for cell in cells], data)
        assert logit_table.fill(table, images, teacher, data, spec.protocol, cpu, lambda *_: None, lambda: False)
        results(planned, planned.cells, tmp_path / way, tmp_path / "tables")
    for seed in ("0", "1"):
        ways = [tmp_path / way / seed for way in ("computed", "looked up")]
        assert [read_record(folder / "record.json").compute.teacher_logits for folder in ways] == ["computed", "table"]
        computed, looked_up = (metrics(folder)[-1]["train"]["kd"] for folder in ways)
        assert looked_up == pytest.approx(computed, rel=1e-4)


def test_weights_and_logits_beside_a_record_are_of_the_average_that_was_tested(tmp_path: Path) -> None:
    recipe = SMALL | {"data": {"name": "digits", "per_class": 4}, "method": "ce", "steps": 8}
    planned = plan(recipe | {"protocol": {"name": "digits", "ema": 0.75}}, REGISTRY)
    (result,) = results(planned, planned.cells, tmp_path)
    spec, materials = planned.cells[0].spec, Materials()
    data = materials.data(spec.data)
    assert isinstance(data, ImageData)
    given, kept = spec.protocol.normalization, load_file(tmp_path / "0" / "test_logits.safetensors")["logits"].float()
    pixels = (data.test_images / 255 - torch.tensor(given.mean)) / torch.tensor(given.std)
    torch.testing.assert_close(load_student(tmp_path / "0")(pixels).detach(), kept, atol=5e-3, rtol=5e-3)
    assert 100 * (kept.argmax(1) == data.test_labels).float().mean().item() == pytest.approx(result.test.last, abs=0.3)
    _is_the_same_whatever_is_set_for_all_of_torch(tmp_path / "0", pixels)


def _is_the_same_whatever_is_set_for_all_of_torch(folder: Path, pixels: torch.Tensor) -> None:
    """As a notebook may have: the network is in float32, on the CPU, and learns."""
    expected, before = load_student(folder)(pixels), torch.get_default_dtype()
    for dtype, device, inference in (
        (torch.bfloat16, "cpu", False),
        (torch.float64, "meta", False),
        (before, "cpu", True),
    ):
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device), torch.inference_mode(inference):
                student = load_student(read_record(folder))
            assert torch.get_default_dtype() == dtype
        finally:
            torch.set_default_dtype(before)
        assert torch.equal(student(pixels), expected)
        student(pixels).sum().backward()
        assert all(one.grad is not None for one in student.parameters())
