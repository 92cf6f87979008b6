"""What a plan will cost is summed up as it is run: side by side behind one teacher pass, teachers once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from shipped import REGISTRY
from synthetic import plain_record, write

from kdbench.cli import check
from kdbench.engine.computing import estimate as estimating
from kdbench.engine.computing.estimate import Estimate, Size
from kdbench.engine.data.domain import split
from kdbench.engine.folders import teacher_folder
from kdbench.engine.networks.build import build_model
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.planning import PlannedCell, plan
from kdbench.recipe.timeline import training_images, validation_images

RECIPE = {
    "data": {"name": "digits", "per_class": 10},
    "teacher": "wrn_16_2_digits",
    "student": "wrn_10_1",
    "protocol": "digits",
    "steps": 10,
    "evaluations": 1,
    "compare": {"method": ["ce", "kd", "at"]},
    "seeds": 2,
}


@pytest.fixture
def estimate(monkeypatch: pytest.MonkeyPatch) -> Estimate:
    """A forward image takes a second, a training image ten; of a teacher 100."""
    made = Estimate(torch.device("cpu"))
    sizes = {"wrn_10_1": Size(1, 1, 1.0, 10.0), "wrn_16_2": Size(1, 1, 100.0, 1000.0)}
    monkeypatch.setattr(made, "size", lambda model, data: sizes[model.name])
    return made


def test_cells_of_one_seed_share_their_teachers_passes(estimate: Estimate) -> None:
    cells = plan(RECIPE, REGISTRY).cells
    # 10 steps of 64 images, and the 599 test images once.
    alone = 10 * 64 * 10.0 + 599
    assert estimate.cell(cells[0].spec) == alone
    assert estimate.passes(cells[0].spec) == 0 and estimate.passes(cells[2].spec) == 10 * 64 * 100.0
    assert estimate.cells(cells) == 2 * (3 * alone + 10 * 64 * 100.0)
    assert estimate.cells([]) == 0


def test_a_network_is_sized_for_the_classes_and_channels_of_each_data_set() -> None:
    """Of a data set with other classes it has another last layer, and of grey images another first one."""
    data = plan(RECIPE, REGISTRY).cells[0].spec.data
    others = [data, *(data.model_copy(update=other) for other in ({"classes": 100}, {"channels": 3}))]
    student, real = plan(RECIPE, REGISTRY).cells[0].spec.student, Estimate(torch.device("cpu"), timed=False)
    found = [real.size(student, one).parameters for one in others]
    assert found == [sum(p.numel() for p in build_model(student, one).parameters()) for one in others]
    assert len({*found}) == 3


def test_planned_cells_are_in_no_folder(estimate: Estimate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in the folder in which a command was started says nothing of cells that only are planned."""
    cells = plan(RECIPE, REGISTRY).cells
    before = estimate.cells(cells)
    (tmp_path / "cell.json").write_text('{"name": "of the user"}')
    monkeypatch.chdir(tmp_path)
    assert estimate.cells(cells) == before


def test_a_teacher_is_trained_once_and_only_where_it_is_not_there(estimate: Estimate, tmp_path: Path) -> None:
    cells = plan(RECIPE, REGISTRY).cells
    known: set[str] = set()
    once = estimate.teachers(cells, tmp_path, known)
    # Its recipe: 600 steps of 64 images, ten evaluations.
    assert once == 600 * 64 * 1000.0 + 10 * 599 * 100.0
    assert estimate.teachers(cells, tmp_path, known) == 0
    teacher = cells[-1].spec.teacher
    assert teacher is not None and teacher.trained_by is not None
    folder = teacher_folder(teacher, tmp_path)
    write(folder, plain_record() | {"identity": teacher.trained_by.identity()}, [])
    assert estimate.teachers(cells, tmp_path, set()) == 0


def test_check_plans_for_the_workers_that_a_run_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says which cells continue, and nothing of the seconds that a large GPU would take."""
    monkeypatch.setattr(estimating, "cores", lambda: 4)
    # Of the whole process.
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    recipe = {"data": "digits", "student": "wrn_10_1", "protocol": "digits", "steps": 8, "compare": {"method": ["ce"]}}
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(recipe | {"seeds": 2}))
    (cell, _) = plan(file, REGISTRY).cells
    folder = tmp_path / "mine" / cell.slug
    folder.mkdir(parents=True)
    torch.save({"step": 3}, folder / "checkpoint.pt")
    words = {"runs": tmp_path, "results": tmp_path / "none"}
    for given, told in (({}, "on 2 workers of 3 threads"), ({"jobs": 1}, "on 1 worker of 3 threads")):
        check.command(str(file), device="cpu", **words, **given)
        said = capsys.readouterr().out
        assert told in said and "everything on one" not in said
        assert f"1 cell continues from its checkpoint: {cell.spec.method.label}, seed 0 at step 3 of 8; " in said
    assert (estimating.threads_of(2), estimating.threads_of(4), estimating.threads_of(4, 7)) == (2, 1, 7)


def cells_with(method: dict[str, object], **changes: object) -> list[PlannedCell]:
    return plan(RECIPE | {"compare": {"method": [method]}} | changes, REGISTRY).cells


def test_attacks_are_counted_at_their_longest(estimate: Estimate) -> None:
    (cell,) = cells_with({"name": "bss", "attack_size": 16, "iterations": 7}, seeds=1)
    # Beside the student on both sets: 10 steps of 16 images, 7 times to the teacher and back.
    assert estimate.cell(cell.spec) == 2 * 10 * 64 * 10.0 + 599 + 10 * 16 * 7 * 1000.0
    assert estimate.prepared([cell]) == 0


def test_a_pool_is_made_once_and_grows_in_each_cell(estimate: Estimate) -> None:
    pool = {"batches": 3, "images": 8, "iterations": 5, "pool_seed": 0}
    plain, adaptive = cells_with({"name": "deep_inversion", **pool}), []
    adaptive = cells_with({"name": "adaptive_deep_inversion", "every": 4, **pool})
    alone = 10 * 64 * 10.0 + 599
    assert [estimate.cell(cell.spec) for cell in plain] == [alone] * 2
    # Before steps 4 and 8, by both networks.
    assert [estimate.cell(cell.spec) for cell in adaptive] == [alone + 2 * 8 * 5 * (1000.0 + 10.0)] * 2
    once = 3 * 8 * 5 * 1000.0
    assert estimate.prepared(plain) == once and estimate.prepared([*plain, *adaptive]) == once
    # A larger pool of the same images goes on from the smaller one.
    larger = cells_with({"name": "deep_inversion", **pool, "batches": 5})
    assert estimate.prepared([*larger, *plain]) == estimate.prepared([*plain, *larger]) == 5 * 8 * 5 * 1000.0
    of_each_seed = cells_with({"name": "deep_inversion", **pool, "pool_seed": None})
    assert estimate.prepared(of_each_seed) == 2 * once
    assert estimate.prepared(cells_with({"name": "noise_kd", "batches": 3})) == 0


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"fraction": 0.001},
        {"fraction": 0.29},
        {"fraction": 0.005},
        {"per_class": 3},
        {"validation": 0.15},
        {"validation": 100, "fraction": 0.5},
    ],
)
def test_planned_numbers_of_images_are_those_of_the_split(choice: dict[str, float]) -> None:
    labels = torch.arange(1050) % 7
    spec: DataSpec = plan(RECIPE | {"data": {"name": "digits"}}, REGISTRY).cells[0].spec.data
    spec = spec.model_copy(update={"classes": 7, "train": 1050} | choice)
    train, held_out = split(spec, labels, 0)
    assert (training_images(spec), validation_images(spec)) == (len(train), len(held_out))
