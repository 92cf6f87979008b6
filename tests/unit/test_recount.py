"""Accuracies counted again from test logits in float16."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from kdbench.verify.recount import accuracies


def test_logits_that_rounding_made_equal_leave_the_accuracy_open(tmp_path: Path) -> None:
    # Of the last two images the largest logits are one number in float16: 2049 is 2048.
    exact = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2048.0, 2049.0], [2049.0, 2048.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert 100 * (exact.argmax(dim=1) == labels).double().mean().item() == 50.0
    file = tmp_path / "test_logits.safetensors"
    save_file({"logits": exact.half()}, file)
    assert accuracies(file, labels) == (25.0, 75.0)
    save_file({"logits": exact[:2].half()}, file)
    assert accuracies(file, labels[:2]) == (50.0, 50.0)
