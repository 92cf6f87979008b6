"""What test logits say beside the accuracy, against numbers worked out by other means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from kdbench.engine.answers import calibration_error, measured


def with_confidence(confidences: list[float]) -> torch.Tensor:
    """Logits of two classes that answer the first with these probabilities."""
    return torch.tensor([[math.log(c / (1 - c)), 0.0] for c in confidences], dtype=torch.float64)


def test_calibration_of_one_confidence_is_its_distance_to_the_accuracy() -> None:
    # Ten answers, all with 80 %; six are right: |0.6 - 0.8|.
    labels = torch.tensor([0] * 6 + [1] * 4)
    assert calibration_error(with_confidence([0.8] * 10), labels) == pytest.approx(20.0)
    assert calibration_error(with_confidence([0.6] * 10), labels) == pytest.approx(0.0, abs=1e-9)


def test_gaps_of_different_bins_do_not_cancel_and_those_of_one_bin_do() -> None:
    # 90 % sure and always wrong, 60 % sure and always right: 0.5 * 0.9 + 0.5 * 0.4.
    labels = torch.tensor([1, 1, 0, 0])
    assert calibration_error(with_confidence([0.9, 0.9, 0.6, 0.6]), labels) == pytest.approx(65.0)
    # In the bin (0.6, 0.667] two right and one wrong: |2/3 - (0.61 + 0.62 + 0.66) / 3|.
    found = calibration_error(with_confidence([0.61, 0.62, 0.66]), torch.tensor([0, 0, 1]))
    assert found == pytest.approx(100 * abs(2 / 3 - 0.63))


def test_calibration_agrees_with_the_definition_written_out() -> None:
    """Guo et al. 2017, equation 5, in numpy and bin by bin."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 12, generator=generator)
    labels = torch.randint(12, (500,), generator=generator)
    shifted = np.exp(logits.double().numpy() - logits.double().numpy().max(axis=1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels.numpy()
    expected = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert expected > 0.05
    assert calibration_error(logits, labels) == pytest.approx(100 * expected, abs=1e-9)


def test_one_sided_logits_are_sure_and_calibrated_where_they_are_right() -> None:
    logits = 1000 * torch.eye(4)
    assert calibration_error(logits, torch.arange(4)) == 0.0
    assert calibration_error(logits, torch.tensor([1, 2, 3, 0])) == pytest.approx(100.0)


def test_top5_counts_labels_among_the_five_largest_logits() -> None:
    # The label's rank is the image's number: 0 to 10.
    logits = torch.stack([torch.arange(11.0, 0.0, -1.0)] * 11)
    labels = torch.arange(11)
    assert measured(logits, labels, None)["top5"] == pytest.approx(100 * 5 / 11, abs=1e-4)
    assert "top5" not in measured(logits[:10, :10], labels[:10], None)


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_balanced_accuracy_is_that_of_scikit_learn() -> None:
    draws = torch.Generator().manual_seed(0)
    # Classes of about 200, 150, no, 100 and 50 images.
    labels = torch.multinomial(torch.tensor([4.0, 3.0, 0.0, 2.0, 1.0]), 500, replacement=True, generator=draws)
    logits = torch.randn(500, 5, generator=draws) + 2 * torch.nn.functional.one_hot(labels, 5) * (labels < 2)[:, None]
    expected = 100 * balanced_accuracy_score(labels.numpy(), logits.argmax(dim=1).numpy())
    found = measured(logits, labels, None)["balanced_accuracy"]
    assert found == pytest.approx(expected, abs=1e-4)
    assert abs(found - 100 * accuracy_score(labels.numpy(), logits.argmax(dim=1).numpy())) > 5, "another number"
    assert "balanced_accuracy" not in measured(logits[:4], torch.tensor([0, 2, 2, 0]), None), "the accuracy itself"


def test_fidelity_is_the_share_of_predictions_that_are_the_teachers() -> None:
    logits = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
    teacher = torch.tensor([[0.3, 0.2, 0.1], [0.0, 1.0, 0.0], [0.0, 0.0, 9.0], [0.0, 0.0, 0.1]])
    # Labels do not matter to it.
    for labels in (torch.tensor([0, 1, 2, 1]), torch.tensor([2, 2, 2, 2])):
        assert measured(logits, labels, teacher)["fidelity"] == 75.0
    assert "fidelity" not in measured(logits, labels, teacher[:, :2]), "a teacher of other classes"
    assert "fidelity" not in measured(logits, labels, None)
