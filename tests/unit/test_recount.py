"""Numbers of a result counted again from test logits in float16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kdbench.engine.answers import measured
from kdbench.verify.recount import spans


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


def test_a_loss_by_hand() -> None:
    # log(1 + e) and log(1 + 1/e); numbers from 0.5 to 1 are rounded by up to 2^-12, from 1 to 2 by 2^-11.
    logits, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).half(), torch.tensor([0, 1])
    low, high = spans(logits, labels, None)["test.loss"]
    assert low < 0.5 * (0.3132617 + 1.3132617) < high < low + 4 * 2**-11
    assert spans(torch.full((2, 2), torch.nan).half(), labels, None)["test.loss"] == (0.0, torch.inf)


def test_classes_that_a_student_was_trained_on_count_apart() -> None:
    logits, labels = torch.eye(4).half(), torch.tensor([0, 1, 3, 3])
    said = spans(logits, labels, None, [0, 1, 2])
    assert said["by_classes.trained_on"] == (100.0, 100.0) and said["by_classes.others"] == (50.0, 50.0)
