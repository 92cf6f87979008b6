"""What networks say of made images: every batch counts once, values stay as they were kept, strangers are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdbench.engine.judging import Judge, judge, pools_in
from kdbench.errors import UserError
from kdbench.recipe.planning import plan
from kdbench.recipe.schema import DataSpec
from kdbench.registry import Registry
from kdbench.sources.made import MadeImages

CPU = torch.device("cpu")
KEY: dict[str, Any] = {
    "teacher": "wrn_16_2",
    "classes": [0, 1, 2],
    "image_shape": [1, 8, 8],
    "settings": {"iterations": 5},
}


def digits() -> DataSpec:
    recipe = {"data": "digits", "student": "wrn_10_1", "protocol": "digits", "steps": 1, "method": "ce"}
    return plan(recipe, Registry()).cells[0].spec.data


def written(seen: list[int]) -> Tensor:
    """Images whose first pixel says as which class they will be seen; no pixel of a real image has such values."""
    images = torch.zeros(len(seen), 1, 8, 8)
    images[:, 0, 0, 0] = torch.tensor(seen).float() - 1
    return images


def reader(images: Tensor) -> Tensor:
    return torch.nn.functional.one_hot((images[:, 0, 0, 0] + 1).round().long(), 10).float()


@pytest.fixture
def pools(tmp_path: Path) -> Path:
    """A pool of two batches, what a cell added to it (batches 1 and 2), and one that was begun only."""
    shared = MadeImages(tmp_path / "sources" / "a", KEY)
    shared.begin()
    shared.write(0, written([0, 1, 2]), torch.tensor([0, 1, 2]), {})
    shared.write(1, written([0, 0, 0, 0, 0]), torch.tensor([0, 1, 2, 0, 1]), {})
    added = MadeImages(tmp_path / "cell" / "b", {"added_to": KEY})
    added.begin()
    for number in (1, 2):
        added.write(number, written([number]), torch.tensor([1]), {})
    MadeImages(tmp_path / "sources" / "begun", KEY).begin()
    return tmp_path


def test_every_batch_counts(pools: Path) -> None:
    told: list[str] = []
    network = Judge("reader", digits(), lambda device: reader)
    found = list(judge(pools_in([pools, pools / "sources"]), [network], CPU, told.append))
    assert [(one.pool.name, one.maker, one.judge, one.images) for one in found] == [
        ("b", "wrn_16_2", "reader", 2),
        ("a", "wrn_16_2", "reader", 8),
    ]
    assert [one.right for one in found] == [1 / 2, 5 / 8]
    assert found[0].settings == {"classes": 3, "iterations": 5} and len(told) == 2


def test_a_network_for_other_images_is_told_before_it_is_loaded(pools: Path) -> None:
    def load(device: torch.device) -> Any:
        raise AssertionError("loaded")

    for change in ({"channels": 3}, {"image_size": 32}, {"classes": 2}):
        data = digits().model_copy(update=change)
        with pytest.raises(UserError, match="'stranger' knows .* of classes up to 2"):
            list(judge(pools_in([pools]), [Judge("stranger", data, load)], CPU, print))


def test_a_folder_without_pools_and_a_damaged_one_are_told(pools: Path) -> None:
    with pytest.raises(UserError, match="no made images here"):
        pools_in([pools / "nowhere"])
    (pools / "cell" / "b" / "pool.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        pools_in([pools])
