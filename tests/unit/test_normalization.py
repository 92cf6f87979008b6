"""Whose normalization images get, and that it can belong to pixels in [0, 1]."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from shipped import REGISTRY

from kdbench.errors import UserError
from kdbench.files import sha256_of
from kdbench.image_cards import Normalization
from kdbench.recipe.planning import plan
from kdbench.recipe.remarks import remarks
from kdbench.recipe.specs import CellSpec
from kdbench.registry import Registry

CARDS = """\
datasets:
  mine:
    target: kdbench.data.digits:load
    title: digits by another name
    classes: 10
    channels: 1
    image_size: 8
    train: 1198
    test: 599
    normalization: {mean: [0.3], std: [0.3]}
protocols:
  own:
    batch_size: 8
    optimizer: {name: sgd, lr: 0.1}
    schedule: constant
    steps: 2
    normalization: {mean: [0.3], std: [0.3]}
teachers:
  known:
    model: wrn_16_2
    data: mine
    weights: {file: none.safetensors, sha256: "0000000000000000000000000000000000000000000000000000000000000000"}
    normalization: {mean: [0.3], std: [0.3]}
"""
RECIPE = """\
data: mine
student: wrn_10_1
protocol: {name: own, normalization: {mean: [0.3], std: [0.3]}}
teacher: {name: known, normalization: {mean: [0.3], std: [0.3]}}
method: kd
"""


def planned(folder: Path, cards: str = CARDS, recipe: str = RECIPE) -> CellSpec:
    (folder / "cards").mkdir(exist_ok=True)
    (folder / "cards" / "mine.yaml").write_text(cards)
    (folder / "recipe.yaml").write_text(recipe)
    registry = Registry((folder / "cards",))
    return plan(folder / "recipe.yaml", registry, weights_must_exist=False).cells[0].spec


@pytest.mark.parametrize(("file", "line"), [("cards", 10), ("cards", 17), ("cards", 23), ("recipe", 3), ("recipe", 4)])
@pytest.mark.parametrize(
    ("old", "new", "key"), [("mean: [0.3]", "mean: [123.675]", "mean"), ("std: [0.3]", "std: [58.395]", "std")]
)
def test_numbers_of_the_scale_0_to_255_are_refused_wherever_they_are_written(
    file: str, line: int, old: str, new: str, key: str, tmp_path: Path
) -> None:
    # A card's own numbers count where the recipe has none.
    override = "protocol: {name: own, normalization: {mean: [0.3], std: [0.3]}}"
    texts = {"cards": CARDS, "recipe": RECIPE if file == "recipe" else RECIPE.replace(override, "protocol: own")}
    lines = texts[file].splitlines()
    lines[line - 1] = lines[line - 1].replace(old, new)
    with pytest.raises(UserError, match=rf"normalization\.{key}\.0' cannot be") as error:
        planned(tmp_path, **(texts | {file: "\n".join(lines)}))
    name = "cards/mine.yaml" if file == "cards" else "recipe.yaml"
    assert error.value.where is not None and error.value.where.endswith(f"{name}:{line}")
    assert "divide it by 255: " + ("0.4850" if key == "mean" else "0.2290") in (error.value.hint or "")


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (-0.1, 0.2),
        (1.1, 0.2),
        (0.5, 0.0),
        (0.5, 0.6),
        (0.5, 1.5),
        # 0.485 / 255 and 0.229 / 255: divided once too often.
        (0.0019, 0.0009),
    ],
)
def test_what_no_pixels_in_0_to_1_can_have(mean: float, std: float) -> None:
    with pytest.raises(ValueError, match=r"pixel values in \[0, 1\]|greater than 0"):
        Normalization(mean=[mean], std=[std])


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (0.485, 0.229),
        (0.5, 0.5),
        # Left as they are; centred only; brought to the scale 0 to 255 for a network that takes it.
        (0, 1),
        (0.485, 1.0),
        (0.485, 1 / 255),
        # Half of the pixels black and half white, estimated of few.
        (0.5, 0.5005),
    ],
)
def test_what_pixels_or_networks_may_have(mean: float, std: float) -> None:
    assert Normalization(mean=[mean], std=[std]).std == [std]


def of(**recipe: Any) -> list[str]:
    base = {"data": "digits", "student": "wrn_10_1", "protocol": "digits", "method": "ce"}
    return remarks([plan(base | recipe, REGISTRY).cells[0].spec])


def test_a_protocol_that_replaces_the_data_cards_normalization_says_so() -> None:
    assert of() == []
    other = {"name": "digits", "normalization": {"mean": [0.5], "std": [0.25]}}
    assert of(protocol=other) == [
        "the student's images are normalized by mean 0.5 and deviation 0.25 (protocol 'digits'), not by mean 0.3051 "
        "and deviation 0.3758 of the data card 'digits'"
    ]
    # The AB authors' numbers are those of CIFAR-10's card before they were rounded.
    assert of(data="cifar10", student="wrn_16_2", protocol="ab_official") == []
    assert (
        "deviation 0.2023 0.1994 0.201 (protocol 'bss_official')"
        in of(data="cifar10", student="wrn_16_2", protocol="bss_official")[0]
    )


def test_an_overridden_normalization_of_a_teacher_that_is_trained_here_is_said() -> None:
    teacher = {"name": "wrn_16_2_digits", "normalization": {"mean": [0.5], "std": [0.25]}}
    assert of(method="kd", teacher=teacher) == [
        "the teacher 'wrn_16_2_digits' takes images normalized by mean 0.5 and deviation 0.25; in its training it was "
        "mean 0.3051 and deviation 0.3758"
    ]


# --- students of kdbench, used again


def student(folder: Path, **changes: Any) -> Path:
    """Weights of a student and the record that kdbench leaves beside them."""
    folder.mkdir()
    file = folder / "student.safetensors"
    save_file({"weight": torch.zeros(1)}, file)
    own = {"mean": [0.5], "std": [0.25]}
    recipe = {"data": "digits", "student": "wrn_10_1", "protocol": {"name": "digits", "normalization": own}}
    spec = plan(recipe | {"method": "ce"}, REGISTRY).cells[0].spec.model_dump(mode="json", exclude_none=True)
    spec["data"] |= changes.pop("data", {})
    spec["student"] |= changes.pop("student", {})
    record = {
        "spec": spec,
        "data": {"fingerprint": "ab" * 32},
        "result": {"test": {"last": 90.0}},
        "files": {file.name: sha256_of(file)},
    } | changes
    (folder / "record.json").write_text(json.dumps(record))
    return file


def taught_by(file: Path, method: str = "kd", **teacher: Any) -> CellSpec:
    recipe = {
        "data": "digits",
        "student": "wrn_10_1",
        "protocol": "digits",
        "method": method,
        "teacher": {"model": "wrn_10_1", "weights": str(file)} | teacher,
    }
    return plan(recipe, REGISTRY).cells[0].spec


def test_a_student_that_teaches_brings_its_normalization_along(tmp_path: Path) -> None:
    file = student(tmp_path / "cell")
    spec = taught_by(file)
    assert spec.teacher is not None and (spec.teacher.normalization.mean, spec.teacher.normalization.std) == (
        [0.5],
        [0.25],
    )
    assert spec.teacher.known_classes is None
    assert remarks([spec]) == [
        "the teacher 'wrn_10_1 (student.safetensors)' takes images normalized by mean 0.5 and deviation 0.25, as in "
        "its training, by the record beside its weights"
    ]
    other = taught_by(file, normalization={"mean": [0.1], "std": [0.2]})
    assert other.teacher is not None and other.teacher.normalization.mean == [0.1]
    assert "in its training, by the record beside its weights it was mean 0.5 and deviation 0.25" in remarks([other])[0]


def test_other_weights_have_the_data_cards_normalization(tmp_path: Path) -> None:
    file = student(tmp_path / "cell").rename(tmp_path / "cell" / "others.safetensors")
    spec = taught_by(file)
    assert spec.teacher is not None and spec.teacher.normalization == spec.data.normalization
    (said,) = remarks([spec])
    assert (
        "images normalized by mean 0.3051 and deviation 0.3758, as on the data" in said
        and "'normalization' beside" in said
    )
    # What is stated is no guess, and a stated accuracy is measured.
    assert remarks([taught_by(file, normalization={"mean": [0.5], "std": [0.25]})]) == []
    assert remarks([taught_by(file, accuracy=90.0)]) == []


def test_a_student_brings_its_classes_along(tmp_path: Path) -> None:
    part = taught_by(student(tmp_path / "part", data={"only_classes": [0, 1, 2]}))
    assert part.teacher is not None and part.teacher.known_classes == [0, 1, 2]
    for name, changes in (("count", {"classes": 5}), ("name", {"name": "cifar10"})):
        with pytest.raises(UserError, match="by the record beside them, not the 10 of 'digits'"):
            taught_by(student(tmp_path / name, data=changes))


def test_a_student_brings_the_size_of_its_images_along(tmp_path: Path) -> None:
    """A teacher that was trained on digits of 16 pixels saw those of 8 here, and was right in 10 % where it had 99."""
    plain, larger = student(tmp_path / "plain"), student(tmp_path / "larger", student={"image_size": 16})
    of_data = student(tmp_path / "of_data", data={"image_size": 12})
    for file, given, size in (
        (plain, {}, None),
        (larger, {}, 16),
        (of_data, {}, 12),
        (larger, {"image_size": 32}, 32),
        (larger, {"classes": 10}, None),
    ):
        teacher = taught_by(file, **given, method="at" if "classes" in given else "kd").teacher
        assert teacher is not None and teacher.model.image_size == size, (file, given)
    assert "takes images of 16×16 pixels, normalized by mean 0.5 " in remarks([taught_by(larger)])[0]


def test_weights_that_are_not_those_of_the_record_beside_them_are_refused(tmp_path: Path) -> None:
    file = student(tmp_path / "flipped")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(UserError, match="do not match the record next to them"):
        taught_by(file)
    # Earlier versions kept no sha256.
    assert taught_by(student(tmp_path / "before", files={})).teacher is not None
    damaged = student(tmp_path / "damaged", spec={})
    with pytest.raises(UserError, match="damaged"):
        taught_by(damaged)


def test_a_start_from_such_a_student_says_when_images_are_normalized_otherwise(tmp_path: Path) -> None:
    start = {"name": "wrn_10_1", "weights": str(student(tmp_path / "cell"))}
    assert (
        "weights that were trained on images normalized by mean 0.5 and deviation 0.25; here it is mean 0.3051"
        in of(student=start)[0]
    )
    same = {"name": "digits", "normalization": {"mean": [0.5], "std": [0.25]}}
    assert not any("weights" in remark for remark in of(student=start, protocol=same))
