"""A teacher's accuracy is that with the input it gets here, and what should make its user doubt is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from shipped import REGISTRY
from synthetic import comparison, make
from torch import Tensor
from torch.nn import functional as F

from kdbench.data.images import ImageData
from kdbench.engine.data.resident import ResidentSplit
from kdbench.engine.networks.build import build_model
from kdbench.engine.networks.weight_files import read_weights
from kdbench.engine.teachers import files as teacher_files
from kdbench.engine.teachers.files import TeacherFile, doubts, given_weights, look, with_accuracy
from kdbench.errors import UserError
from kdbench.files import sha256_of
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec
from kdbench.record import Record
from kdbench.results.tables import build

CLASSES = 10


class Answers:
    """A teacher that answers f(label) for images that hold their label."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        self.answer = answer

    def __call__(self, images: Tensor, points: Sequence[str]) -> dict[str, Tensor]:
        return {"logits": F.one_hot(self.answer(images[:, 0, 0, 0].long()), CLASSES).float()}


def said_of(answer: Callable[[Tensor], Tensor], **more: Any) -> tuple[float, str]:
    """Accuracy and doubts of such a teacher on 20 images of each class."""
    labels = torch.arange(CLASSES).repeat(20)
    part = ResidentSplit(labels.to(torch.uint8).view(-1, 1, 1, 1), labels)
    seen = look(Answers(answer), part, CLASSES)  # type: ignore[arg-type]
    known: Any = SimpleNamespace(name="t", known_classes=more.get("known"))
    return seen.accuracy, " ".join(doubts(known, seen, CLASSES, more.get("expected")))


def nine_in_ten(labels: Tensor) -> Tensor:
    """Right answers, but for every tenth image."""
    wrong = torch.arange(len(labels)) // CLASSES % 10 == 0
    return torch.where(wrong, (labels + 3) % CLASSES, labels)


SWAPPED = torch.tensor([1, 0, *range(2, CLASSES)])
# As text is sorted: 1, 10, 2, ….
AS_TEXT = torch.tensor(sorted(range(CLASSES), key=lambda k: str(k + 1)))


@pytest.mark.parametrize(
    ("answer", "accuracy", "holds", "lacks"),
    [
        (nine_in_ten, 90.0, (), ("reaches",)),
        (lambda x: SWAPPED[nine_in_ten(x)], 72.0, ("in another order it would have 90.00 %",), ("chance", "never")),
        (
            lambda x: AS_TEXT[nine_in_ten(x)],
            9.0,
            ("in another order it would have 90.00 %", "near chance, 10.00 %"),
            (),
        ),
        (lambda x: (nine_in_ten(x) + 1) % CLASSES, 0.0, ("in another order it would have 90.00 %", "chance"), ()),
        # Off by one, with a background as class 0: the last class has no output here.
        (lambda x: (x + 1).clamp(max=9), 10.0, ("near chance", "never answers 1 of the 10 classes"), ()),
        (lambda x: x % 5, 50.0, ("never answers 5 of the 10 classes",), ("order", "chance")),
        (lambda x: torch.full_like(x, 3), 10.0, ("near chance", "never answers 9 of the 10"), ("order",)),
    ],
)
def test_a_teacher_that_does_not_know_these_labels_is_doubted(
    answer: Callable[[Tensor], Tensor], accuracy: float, holds: Sequence[str], lacks: Sequence[str]
) -> None:
    found, said = said_of(answer)
    assert found == pytest.approx(accuracy)
    assert all(words in said for words in holds) and not any(words in said for words in lacks), said
    # What was measured is said once.
    assert said.count("reaches") == bool(holds) and "?" not in said[:-1], said


def test_a_teacher_no_better_than_the_most_frequent_class_is_doubted() -> None:
    """Of very unequal classes a useless teacher is far from 1 / classes."""
    labels = torch.tensor([0] * 91 + [*range(1, CLASSES)])
    part = ResidentSplit(torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1), labels)
    known: Any = SimpleNamespace(name="t", known_classes=range(CLASSES))
    for right, doubted in ((90, True), (91, True), (92, False)):
        answers = torch.where(torch.arange(len(labels)) < right, labels, (labels + 1) % CLASSES)
        seen = look(Answers(answers.__getitem__), part, CLASSES)  # type: ignore[arg-type]
        said = " ".join(doubts(known, seen, CLASSES, None))
        assert ("who always answers the most frequent class has 91.00 %" in said) == doubted, (right, said)


def test_classes_that_a_teacher_is_known_not_to_have_learned_are_no_doubt() -> None:
    assert said_of(lambda x: x % 5, known=[0, 1, 2, 3, 4])[1] == ""


def test_a_teacher_off_its_recorded_accuracy_is_doubted() -> None:
    assert (
        "the record of its training says 99.17 %"
        in said_of(nine_in_ten, expected=(99.17, "the record of its training"))[1]
    )
    assert said_of(nine_in_ten, expected=(90.05, "the record of its training"))[1] == ""


# --- under which conditions


def cell(**teacher: Any) -> CellSpec:
    recipe = {"data": "digits", "student": "wrn_10_1", "protocol": "digits", "method": "kd"}
    named = {"name": "wrn_16_2_digits"} if "model" not in teacher else {}
    return plan(recipe | {"teacher": named | teacher}, REGISTRY).cells[0].spec


@pytest.fixture
def data() -> ImageData:
    return tiny.images(cell().data, per_class=5)


def weights(spec: CellSpec, folder: Path) -> Path:
    file = folder / "weights.safetensors"
    assert spec.teacher is not None
    save_file(build_model(spec.teacher.model, spec.data, seed=3).state_dict(), file)
    return file


def by_hand(spec: CellSpec, file: Path, data: ImageData) -> float:
    assert spec.teacher is not None
    model = build_model(spec.teacher.model, spec.data).eval()
    model.load_state_dict(read_weights(file))
    mean, std = (
        torch.tensor(part).view(-1, 1, 1) for part in (spec.teacher.normalization.mean, spec.teacher.normalization.std)
    )
    with torch.no_grad():
        answers = model((data.test_images / 255 - mean) / std).argmax(dim=1)
    return 100 * (answers == data.test_labels).float().mean().item()


def test_a_trained_teachers_accuracy_is_that_with_the_input_it_gets(
    tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = cell()
    assert spec.teacher is not None
    path = weights(spec, tmp_path)
    recorded = TeacherFile(path, sha256_of(path), 99.0, data=data.fingerprint)
    assert with_accuracy(spec.teacher, recorded, tmp_path, spec.data, data, tiny.CPU) == recorded
    other = cell(normalization={"mean": [0.9], "std": [0.01]})
    assert other.teacher is not None
    for case, file in ((other, recorded), (spec, replace(recorded, data="of other data"))):
        assert case.teacher is not None
        found = with_accuracy(case.teacher, file, tmp_path, case.data, data, tiny.CPU)
        assert found.accuracy == pytest.approx(by_hand(case, path, data), abs=1e-3)
        assert any("the record of its training says 99.00 %" in doubt for doubt in found.doubts)
        with monkeypatch.context() as once:
            once.setattr(teacher_files, "load_teacher", None)
            assert with_accuracy(case.teacher, file, tmp_path, case.data, data, tiny.CPU) == found
    # One that was tested on images held out of its training set has another one on the test set.
    assert spec.teacher.trained_by is not None
    held_out = spec.teacher.trained_by.data.model_copy(update={"tested_on": "validation"})
    trained_by = spec.teacher.trained_by.model_copy(update={"data": held_out})
    other_part = spec.teacher.model_copy(update={"trained_by": trained_by})
    found = with_accuracy(other_part, recorded, tmp_path, spec.data, data, tiny.CPU)
    assert found.accuracy == pytest.approx(by_hand(spec, path, data), abs=1e-3)
    # One of other classes has none here.
    foreign = spec.teacher.model_copy(update={"classes": 7})
    assert with_accuracy(foreign, recorded, tmp_path, spec.data, data, tiny.CPU).accuracy is None


def test_an_accuracy_that_a_recipe_states_is_checked(tmp_path: Path, data: ImageData) -> None:
    path = weights(cell(), tmp_path)
    own = {"model": "wrn_16_2", "weights": str(path)}
    right = by_hand(cell(**own), path, data)
    for stated in (right, right + 5):
        spec = cell(**own, accuracy=stated)
        assert spec.identity() == cell(**own).identity() and spec.teacher is not None
        if stated == right:
            assert with_accuracy(
                spec.teacher, given_weights(spec.teacher, False), tmp_path, spec.data, data, tiny.CPU
            ).accuracy == pytest.approx(right)
        else:
            with pytest.raises(UserError, match=f"reaches {right:.2f} % where {stated:.2f} % is stated"):
                with_accuracy(spec.teacher, given_weights(spec.teacher, False), tmp_path, spec.data, data, tiny.CPU)
    with pytest.raises(UserError, match="'teacher'"):
        cell(accuracy=90.0)


def test_a_student_that_teaches_is_held_to_its_record(tmp_path: Path, data: ImageData) -> None:
    path = weights(cell(), tmp_path).rename(tmp_path / "student.safetensors")
    spec = cell().model_dump(mode="json")
    right = by_hand(cell(), path, data)
    for fingerprint, last, said in (
        (data.fingerprint, right, ()),
        (data.fingerprint, 99.0, ("the record beside its weights says 99.00 %",)),
        ("of other data", right, ("was trained on other data of that name",)),
    ):
        record = {"spec": spec, "data": {"fingerprint": fingerprint}, "result": {"test": {"last": last}}}
        (tmp_path / "record.json").write_text(json.dumps(record))
        taught = cell(model="wrn_16_2", weights=str(path))
        assert taught.teacher is not None
        found = with_accuracy(
            taught.teacher, given_weights(taught.teacher, False), tmp_path, taught.data, data, tiny.CPU
        ).doubts
        # Untrained, it is near chance in any case.
        own = [doubt for doubt in found if "record" in doubt or "other data" in doubt]
        assert len(own) == len(said) and all(words in doubt for words, doubt in zip(said, own, strict=True))


# --- below the table


def records(**over: Any) -> list[Any]:
    """Three seeds of the plain student and of KD by a teacher of 90 %."""
    specs = plan(
        {"data": "digits", "student": "wrn_10_1", "protocol": "digits", "teacher": "wrn_16_2_digits"}
        | {"compare": {"method": ["ce", "kd"]}},
        REGISTRY,
    ).cells
    plain = {c.spec.method.name: c.spec.model_dump(mode="json") for c in specs}
    return [
        make(method, seed, value, order=order, spec=plain[method], **(over if method == "kd" else {"teacher": None}))
        for order, (method, value) in enumerate((("ce", 93.0), ("kd", 80.0)))
        for seed in (0, 1, 2)
    ]


def warnings(found: list[Any]) -> str:
    return " ".join(note.text for note in build(found).notes if note.warning)


def test_a_teacher_below_its_plain_student_is_told_below_the_table() -> None:
    assert "is below the plain student" not in warnings(records(teacher__accuracy=92.5))
    assert "The teacher 'wrn_22_4_cifar10', 39.90 %, is below the plain student 'CE'" in warnings(
        records(teacher__accuracy=39.9)
    )
    assert "is below the plain student" not in warnings(comparison({"kd": [30.0], "ab": [93.0]}))
    # Of several plain students the best one counts.
    found = records(teacher__accuracy=92.0)
    worse = found[0].spec | {"method": found[0].spec["method"] | {"name": "worse"}}
    found += [make("worse", seed, 85.0, order=2, spec=worse, teacher=None) for seed in (0, 1, 2)]
    assert "92.00 %, is below the plain student 'CE'" not in warnings(found)
    found = records(teacher__accuracy=91.9) + found[-3:]
    assert "91.90 %, is below the plain student 'CE'" in warnings(found)
    # One that learned from other images is no plain student.
    found = records(teacher__accuracy=39.9)
    for record in found:
        for stage in record.spec["method"]["stages"].values() if record.teacher is None else ():
            stage["losses"]["ce"]["input"] = "boundary"
    assert "is below the plain student" not in warnings(found)


@pytest.mark.parametrize(
    ("held_out", "said"),
    [((), "test accuracies"), (("kd",), "test accuracies"), (("ce", "kd"), "accuracies on the val")],
)
def test_accuracies_are_called_those_of_the_validation_part_where_all_are(held_out: tuple[str, ...], said: str) -> None:
    found = [record.plain() for record in records()]
    for plain in found:
        if plain["spec"]["method"]["name"] in held_out:
            plain["spec"]["data"] = plain["spec"]["data"] | {"tested_on": "validation", "validation": 0.2}
    assert build([*map(Record.model_validate, found)]).notes[0].text.startswith(f"Numbers are {said}")


def test_doubts_and_another_normalization_are_told_below_the_table() -> None:
    assert "It never answers" in warnings(records(teacher__doubts=["it never answers 5 of the 10 classes"]))
    text = " ".join(note.text for note in build(records()).notes)
    assert "of the data card" not in text
    found = records()
    for record in found:
        record.spec["protocol"]["normalization"] = {"mean": [0.5], "std": [0.5]}
    text = " ".join(note.text for note in build(found).notes)
    assert "The student's images are normalized by mean 0.5 and deviation 0.5 (protocol 'digits'), not by" in text
