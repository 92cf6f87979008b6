"""What comes with kdbench in registry/weights is what its cards say, and is used where no recipe asks for training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from card_checks import check_card
from conftest import ROOT
from safetensors.torch import load_file
from shipped import REGISTRY
from synthetic import plain_record, write

from kdbench.engine.networks.weights import locate
from kdbench.engine.teachers.loading import load_teacher
from kdbench.errors import UserError
from kdbench.files import SHARE
from kdbench.recipe.planning import plan, teacher_of_card
from kdbench.verify.verification import verify

FOLDER = SHARE / "registry" / "weights"
FILES = sorted(FOLDER.glob("*.safetensors"))


def test_the_folder_holds_two_teachers_and_stays_small() -> None:
    assert [file.stem for file in FILES] == ["bss_resnet26_cifar10", "wrn_22_4_cifar10"]
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 10.5e6


@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_every_file_is_its_cards_and_loads_exactly(name: str) -> None:
    """The card's hash, and every value, also of float16 in float32 parameters; counters stay whole numbers."""
    spec, data = teacher_of_card(name, REGISTRY, "here")
    assert spec.weights is not None and spec.trained_by is None and spec.accuracy is not None
    file = locate(spec.weights, download=False)
    assert file == FOLDER / f"{name}.safetensors"
    found = load_teacher(spec, data, file, torch.device("cpu")).network.model.state_dict()
    for key, value in load_file(file).items():
        assert found[key].dtype == (torch.float32 if value.is_floating_point() else torch.int64), key
        assert torch.equal(found[key].double(), value.double()), key


def test_recipes_use_the_weights_unless_they_ask_for_training() -> None:
    teachers = {
        cell.spec.teacher.identity(): cell.spec.teacher for cell in plan("ab_wrn", REGISTRY).cells if cell.spec.teacher
    }
    assert [teacher.trained_by for teacher in teachers.values()] == [None]
    routes = {cell.spec.teacher.trained_by.route for cell in plan("rco", REGISTRY).cells if cell.spec.teacher}
    assert routes == {20}


def test_the_published_teacher_is_what_the_card_trains() -> None:
    """The record beside the weights is that of this very training, by the identity that it was written with."""
    record = json.loads((FOLDER / "wrn_22_4_cifar10.json").read_text(encoding="utf-8"))
    cells = plan("ab_wrn", REGISTRY, ("teacher.trained=true", "compare.method=[kd]", "seeds=1")).cells
    teacher = cells[0].spec.teacher
    assert teacher is not None and teacher.trained_by is not None and teacher.weights is None
    assert teacher.trained_by.identity() == record["identity"]
    assert teacher.accuracy is None, "the card's accuracy is that of its weights"
    published = ROOT / "results" / "ab_wrn_30_epochs_h200" / "teacher" / "record.json"
    assert json.loads(published.read_text(encoding="utf-8")) == record


def test_what_cannot_be_trained_is_told() -> None:
    with pytest.raises(UserError, match="'resnet56_cifar10' has no recipe"):
        plan("ab_resnet", REGISTRY, ("teacher.trained=true",))
    with pytest.raises(UserError, match="leave out 'trained'"):
        plan("ab_resnet", REGISTRY, ("teacher={model: resnet56, weights: x.pt, trained: true}",))
    with pytest.raises(UserError, match="is a weight file") as told:
        plan("rco", REGISTRY, ("teacher.trained=false",))
    assert "trained: true" in (told.value.hint or "")
    check_card(REGISTRY, "teachers", "wrn_22_4_cifar10")


@pytest.mark.parametrize("trained", [{}, {"step": 1}], ids=["weights", "trained"])
def test_verify_tells_two_teachers_of_one_card_apart(tmp_path: Path, trained: dict[str, int]) -> None:
    """One teacher has one hash; a card's weights and what its recipe trains are two."""
    for seed, by in enumerate(({}, trained)):
        record = plain_record("kd", seed, spec__teacher__trained_by=by, teacher__sha256=str(seed) * 64)
        write(tmp_path / f"kd-{seed}", record, [])
    (tmp_path / "recipe.json").write_text("{}")
    told = [finding.what for finding in verify(tmp_path, REGISTRY) if "teacher hash" in finding.what]
    assert bool(told) == (not trained)
