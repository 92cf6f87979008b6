"""Numbers of a result counted again from test logits in float16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from shipped import REGISTRY
from synthetic import make
from torch import Tensor

from kdbench.engine.answers import measured
from kdbench.errors import UserError
from kdbench.files import LOGITS, STUDENT
from kdbench.recipe.planning import plan
from kdbench.verify import recount
from kdbench.verify.recount import counted_again, logits_in, recorded_numbers, spans


def test_logits_that_rounding_made_equal_leave_the_accuracy_open() -> None:
    # Of the last two images the largest logits are one number in float16: 2049 is 2048.
    exact = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2048.0, 2049.0], [2049.0, 2048.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert 100 * (exact.argmax(dim=1) == labels).double().mean().item() == 50.0
    assert spans(exact.half(), labels, None)["test.last"] == (25.0, 75.0)
    assert spans(exact[:2].half(), labels[:2], None)["test.last"] == (50.0, 50.0)


def test_a_label_is_one_of_the_largest_or_not() -> None:
    logits = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0, *[0.0] * 6]] * 3).half()
    # It is the fifth, the sixth, and the third.
    assert spans(logits, torch.tensor([4, 5, 2]), None)["top5"] == pytest.approx((200 / 3, 200 / 3))
    alike, no_numbers = torch.ones(1, 12).half(), torch.full((1, 12), torch.nan).half()
    for unknown in (alike, no_numbers):
        said = spans(unknown, torch.tensor([0]), None)
        assert said["test.last"] == said["top5"] == (0.0, 100.0)


@pytest.mark.parametrize(("classes", "size"), [(2, 0.1), (12, 0.1), (12, 4.0), (12, 30.0), (100, 4.0), (12, 0.0)])
def test_what_is_measured_of_exact_logits_lies_within_what_rounded_ones_say(classes: int, size: float) -> None:
    moved = 0
    for seed in range(50):
        draws = torch.Generator().manual_seed(seed)
        labels = torch.randint(classes, (400,), generator=draws)
        logits, teacher = (size * torch.randn(400, classes, generator=draws) for _ in range(2))
        # Some images have two logits that are nearly one number.
        logits[:100, 1] = logits[:100, 0] + size * 1e-3 * torch.randn(100, generator=draws)
        found, said = measured(logits, labels, teacher), spans(logits.half(), labels, teacher.half())
        found["test.loss"] = F.cross_entropy(logits, labels).item()
        assert {*found} == {*said} - {"test.last"}
        for name, value in found.items():
            assert said[name][0] - 1e-4 <= value <= said[name][1] + 1e-4, name
        moved += measured(logits.half().float(), labels, teacher) != measured(logits, labels, teacher)
        if (classes, size) == (12, 4.0):
            assert said["test.loss"][1] - said["test.loss"][0] < 0.01
            assert all(high - low < 5 for low, high in said.values()), "the spans say something"
    assert moved > 10 or size == 0, "rounding changed no number: this shows nothing"


def test_a_calibration_error_by_hand() -> None:
    # Confidence 0.7311 in both, one of them right.
    logits, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).half(), torch.tensor([0, 1])
    low, high = spans(logits, labels, None)["calibration_error"]
    assert low == pytest.approx(23.106, abs=0.02) and high == pytest.approx(23.106, abs=0.02) and low < high
    assert spans(torch.full((2, 2), torch.inf).half(), labels, None)["calibration_error"] == (0.0, 100.0)


def test_an_image_between_two_bins_may_have_been_in_either() -> None:
    """softmax(log 2, 0) is 2/3, where a bin of 15 ends: an answer that is right is 1/3 off, one that is wrong 2/3, and
    both are 1/6 off in one bin, 1/2 in two."""
    logits = torch.tensor([[2.0, 1.0], [2.0, 1.0]]).log().half()
    for labels, errors in (([0], [100 / 3]), ([1], [200 / 3]), ([0, 1], [100 / 6, 50.0])):
        low, high = spans(logits[: len(labels)], torch.tensor(labels), None)["calibration_error"]
        assert 0 <= low <= min(errors) and max(errors) <= high


def test_a_loss_by_hand() -> None:
    # log(1 + e) and log(1 + 1/e); numbers from 0.5 to 1 are rounded by up to 2^-12, from 1 to 2 by 2^-11.
    logits, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).half(), torch.tensor([0, 1])
    low, high = spans(logits, labels, None)["test.loss"]
    assert low < 0.5 * (0.3132617 + 1.3132617) < high < low + 4 * 2**-11
    assert spans(torch.full((2, 2), torch.nan).half(), labels, None)["test.loss"] == (0.0, torch.inf)


@pytest.mark.parametrize(("number", "half"), [(1.0, 2.0**-11), (2.0**-23, 2.0**-25)])
def test_a_loss_of_logits_that_were_rounded_as_far_as_may_be(number: float, half: float) -> None:
    """Half of the distance between neighbours in float16: above 1, and where it is as small as it gets."""
    for sign in (1, -1):
        exact = torch.tensor([[number + sign * half, -number - sign * half]], dtype=torch.float64)
        rounded, label = torch.tensor([[number, -number]]).half(), torch.tensor([0])
        low, high = spans(rounded, label, None)["test.loss"]
        assert low <= F.cross_entropy(exact, label).item() <= high


def test_classes_that_a_student_was_trained_on_count_apart() -> None:
    logits, labels = torch.eye(4).half(), torch.tensor([0, 1, 3, 3])
    said = spans(logits, labels, None, [0, 1, 2])
    assert said["by_classes.trained_on"] == (100.0, 100.0) and said["by_classes.others"] == (50.0, 50.0)
    # No test image is of class 2.
    assert {*said} - {*spans(logits, labels, None, [0, 1, 3])} == {"by_classes.others"}
    # Nor can the answers of a teacher of five classes be compared.
    assert "fidelity" not in spans(logits, labels, torch.eye(4, 5).half())


def test_a_file_holds_logits_of_these_images_and_classes_or_is_refused(tmp_path: Path) -> None:
    file, labels = tmp_path / "logits", torch.tensor([0, 2, 1])
    save_file({"logits": torch.eye(3)}, file)
    assert logits_in(file, labels).equal(torch.eye(3))
    for other in (torch.ones(3), torch.ones(4, 3), torch.ones(2, 3), torch.ones(3, 2)):
        save_file({"logits": other}, file)
        with pytest.raises(UserError, match="holds no logits for the 3 test images"):
            logits_in(file, labels)


def test_a_loss_that_is_no_number_is_not_compared() -> None:
    record = make("kd", result__fidelity=50.0)
    assert recorded_numbers(record, []) == {"test.last": 90.0, "fidelity": 50.0}
    for loss in (None, float("inf"), float("nan")):
        assert "test.loss" not in recorded_numbers(record, [{"test": {"loss": loss}}])
    assert recorded_numbers(record, [{"test": {"loss": 9.0}}, {"test": {"loss": 0.5}}])["test.loss"] == 0.5


def test_every_record_is_counted_with_the_labels_of_its_own_test_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers 0, 1, 2 of three images, of which data sets have other labels."""
    here = {"digits": (torch.tensor([0, 1, 0]), "dd" * 32), "mnist_8": (torch.tensor([2, 1, 2]), "ee" * 32)}
    monkeypatch.setattr(recount, "labels_of", lambda data, roots: here[data.name])
    digits = plan({"data": "digits", "student": "wrn_10_1", "protocol": "digits", "method": "ce"}, REGISTRY)
    data = digits.cells[0].spec.data
    own, target = {"data__fingerprint": "dd" * 32}, {"name": "mnist_8", "fingerprint": "ee" * 32}
    target |= {"train": 1, "test": 3, "classes": 3}
    some = {"result__by_classes": {"trained_on": 50.0, "others": 50.0}}
    cases: dict[str, tuple[dict[str, Any], dict[str, Any], list[str] | None]] = {
        "two of three": ({"last": 66.6667, **own}, {}, []),
        "nearly": ({"last": 66.67, **own}, {}, ["test.last is 66.67, the test logits say 66.6667"]),
        "adapted": ({"last": 66.6667, **own, "target": target}, {"name": "mnist_8"}, []),
        "other images": ({"last": 66.6667}, {}, None),
        "held out": ({"last": 66.6667, **own}, {"tested_on": "validation"}, None),
        # Of the images of class 0 one is right, and the only other one.
        "some classes": (
            {"last": 66.6667, **own, **some},
            {"only_classes": [0]},
            ["by_classes.others is 50.0, the test logits say 100.0000"],
        ),
    }
    records = {}
    for name, (over, _, _) in cases.items():
        (tmp_path / name).mkdir()
        save_file({"logits": torch.eye(3).half()}, tmp_path / name / LOGITS)
        records[name] = make("ce", teacher=None, **over).model_copy(update={"folder": tmp_path / name})
    numbers = {name: recorded_numbers(record, []) for name, record in records.items()}
    tested = {name: data.model_copy(update=changes) for name, (_, changes, _) in cases.items()}
    found = counted_again(records, numbers, tested, [])
    assert {name: wrong for name, (_, wrong) in found.items()} == {
        name: wrong for name, (_, _, wrong) in cases.items() if wrong is not None
    }


@pytest.mark.parametrize(
    ("teacher", "student", "told"),
    [
        ({}, {}, True),
        ({"files": {STUDENT: "ee" * 32}}, {}, False),
        ({"last": 95.0}, {}, False),
        ({"data__fingerprint": "ee" * 32}, {}, False),
        ({"compute__precision": "bfloat16"}, {"compute__precision": "bfloat16"}, False),
        ({}, {"compute__precision": "bfloat16"}, False),
        ({"spec__data__tested_on": "validation"}, {}, False),
        # The cell trained its teacher itself.
        ({}, {"result__teacher": {"last": 95.5, "best": 95.5, "best_step": 1}}, False),
    ],
)
def test_fidelity_is_counted_where_the_teacher_answered_in_its_own_training(
    teacher: dict[str, Any], student: dict[str, Any], told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = torch.tensor([0, 1, 2, 0])
    monkeypatch.setattr(recount, "labels_of", lambda data, roots: (labels, "cd" * 32))

    def logits(name: str, answers: list[int]) -> Path:
        (tmp_path / name).mkdir()
        save_file({"logits": F.one_hot(Tensor(answers).long(), 3).half()}, tmp_path / name / LOGITS)
        return tmp_path / name

    records = {
        "teacher": make("ce", **{"last": 95.5, "teacher": None, "files": {STUDENT: "ab" * 32}} | teacher),
        "kd": make("kd", last=100.0, result__fidelity=50.0, **student),
    }
    answers = {"teacher": [0, 2, 2, 0], "kd": [0, 1, 2, 0]}
    records = {name: r.model_copy(update={"folder": logits(name, answers[name])}) for name, r in records.items()}
    numbers = {name: recorded_numbers(record, []) for name, record in records.items()}
    data = plan("ab_wrn", REGISTRY).cells[0].spec.data
    tested = {n: data.model_copy(update=r.spec["data"]) for n, r in records.items()}
    found = counted_again(records, numbers, tested, [])
    # Three of four answers are the teacher's.
    wrong = ["fidelity is 50.0, the test logits say 75.0000"] if told else []
    assert found["kd"] == (["test.last", *["fidelity"] * told], wrong)
