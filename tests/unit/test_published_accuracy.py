"""A teacher's stated accuracy is measured before it teaches, on pictures as they were tested on for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_files import write_pictures
from safetensors.torch import save_file

from kdbench.data import pictures
from kdbench.engine.data.streamed import StreamedSplit
from kdbench.engine.networks.build import build_model
from kdbench.engine.networks.network import Normalizer
from kdbench.engine.teachers.files import TeacherFile, look, with_accuracy
from kdbench.engine.teachers.loading import load_teacher
from kdbench.errors import UserError
from kdbench.files import sha256_of
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec
from kdbench.registry import Registry

CPU = torch.device("cpu")
# Of a network that answers pictures of two sizes differently.
SEED = 5
CARDS = """
datasets:
  eight:
    include: imagenet
    classes: 8
    image_size: 16
    train: 16
    test: 32
    args: {short_side: 18}
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet's layout with 8 classes, and an untrained network with some accuracy on it."""
    folder = tmp_path_factory.mktemp("published")
    write_pictures(folder / "imagenet", classes=8, train=2, test=4)
    (folder / "imagenet" / "test").rename(folder / "imagenet" / "val")
    (folder / "cards").mkdir()
    (folder / "cards" / "cards.yaml").write_text(CARDS)
    return folder


def spec_of(here: Path, **teacher: Any) -> CellSpec:
    recipe = {
        "data": "eight",
        "teacher": {"model": "wrn_10_1", "weights": str(here / "teacher.safetensors")} | teacher,
        "student": "wrn_10_1",
        "protocol": "imagenet",
        "method": "kd",
    }
    return plan(recipe, Registry([here / "cards"])).cells[0].spec


def measured(here: Path, to: Path, **teacher: Any) -> TeacherFile:
    spec = spec_of(here, **teacher)
    assert spec.teacher is not None
    file = TeacherFile(here / "teacher.safetensors", sha256_of(here / "teacher.safetensors"), None)
    data = pictures.load([here], False, here / "cache", folder="imagenet", short_side=18)
    return with_accuracy(spec.teacher, file, to, spec.data, data, CPU)


def written(here: Path) -> tuple[Path, pictures.Pictures]:
    """The teacher's weights, and the pictures."""
    first = here / "teacher.safetensors"
    save_file({"none": torch.zeros(1)}, first)
    spec = spec_of(here)
    assert spec.teacher is not None
    model = build_model(spec.teacher.model, spec.data, seed=SEED)
    data = pictures.load([here], False, here / "cache", folder="imagenet", short_side=18)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    # Batch norms know the pictures, so that it does not answer one class alone.
    ((shown, _),) = StreamedSplit(data.test_files, data.test_labels, 18, 16, 3).slices()
    with torch.no_grad():
        model.train()(Normalizer(spec.teacher.normalization, (16, 16), CPU)(shown))
    save_file(model.state_dict(), first)
    return first, data


def test_a_wrong_accuracy_is_told_and_a_right_one_is_that_of_its_own_view(here: Path, tmp_path: Path) -> None:
    first, data = written(here)

    def accuracy(short_side: int, size: int) -> float:
        split = StreamedSplit(data.test_files, data.test_labels, short_side, size, 3)
        spec = spec_of(here, image_size=size)
        assert spec.teacher is not None
        return look(load_teacher(spec.teacher, spec.data, first, CPU), split, 8).accuracy

    usual, own = accuracy(18, 16), accuracy(40, 32)
    assert usual != own, "the case tells them apart"
    found = measured(here, tmp_path / "a", accuracy=usual)
    assert found.accuracy == usual
    with pytest.raises(UserError, match=rf"reaches {usual:.2f} % where 99.00 % is stated"):
        measured(here, tmp_path / "b", accuracy=99.0)
    # Of larger pictures: checked by these, and shown by the views that it gets here.
    found = measured(here, tmp_path / "c", accuracy=own, image_size=32, resize=40)
    assert found.accuracy != own and (tmp_path / "c" / "as_published.json").exists()
    with pytest.raises(UserError, match=rf"reaches {own:.2f} % where {usual:.2f} % is stated"):
        measured(here, tmp_path / "d", accuracy=usual, image_size=32, resize=40)
    assert any("the accuracy that is stated" in doubt for doubt in found.doubts)


def test_how_an_accuracy_was_measured_stands_beside_it(here: Path) -> None:
    with pytest.raises(UserError, match="'resize' says how the 'accuracy' was measured"):
        spec_of(here, resize=20)


def test_an_accuracy_that_was_kept_is_not_that_of_other_sizes_of_the_same_pictures(here: Path, tmp_path: Path) -> None:
    first, data = written(here)
    spec = spec_of(here)
    assert spec.teacher is not None
    file = TeacherFile(first, sha256_of(first), None)

    def accuracy(to: Path, short_side: int, size: int) -> float | None:
        tested = spec.data.model_copy(update={"image_size": size})
        assert spec.teacher is not None
        return with_accuracy(spec.teacher, file, to, tested, replace(data, short_side=short_side), CPU).accuracy

    sizes = [(18, 16), (40, 16), (40, 32)]
    alone = [accuracy(tmp_path / str(i), *of) for i, of in enumerate(sizes)]
    assert alone[0] != alone[1] != alone[2], "the case tells them apart"
    assert [accuracy(tmp_path / "one", *of) for of in sizes] == alone
