"""What networks say of made images: every batch counts once, values stay as they were kept, strangers are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdbench.errors import UserError
from kdbench.methods.deep_inversion.analysis import Judge, judged, pools_below
from kdbench.methods.deep_inversion.made import MadeImages
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.planning import plan
from kdbench.registry import Registry

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
    added = MadeImages(tmp_path / "cell" / "b", {"added_to": KEY, "settings": {"iterations": 5, "competition": 10.0}})
    added.begin()
    for number in (1, 2):
        added.write(number, written([number]), torch.tensor([1]), {})
    MadeImages(tmp_path / "sources" / "begun", KEY).begin()
    return tmp_path


def network(name: str = "reader", classes: range = range(10), **changes: int) -> Judge:
    return Judge(name, digits().model_copy(update=changes), frozenset(classes), reader)


def test_every_batch_counts(pools: Path) -> None:
    found = list(judged(pools_below([pools]), [network()], CPU, print))
    assert [(one["pool"], one["maker"], one["judge"], one["images"]) for one in found] == [
        ("cell/b", "wrn_16_2", "reader", 2),
        ("sources/a", "wrn_16_2", "reader", 8),
    ]
    assert [one["right"] for one in found] == [1 / 2, 5 / 8]
    settings = [dict(list(one.items())[5:]) for one in found]
    assert settings == [{"classes": 3, "iterations": 5, "competition": 10.0}, {"classes": 3, "iterations": 5}]


def test_a_pool_may_be_named_itself(pools: Path) -> None:
    assert list(pools_below([pools / "sources" / "a", pools / "cell"])) == ["a", "b"]


def test_pools_of_one_name_in_two_folders_are_both_judged(pools: Path, tmp_path: Path) -> None:
    other = MadeImages(tmp_path / "other" / "a", KEY)
    other.begin()
    other.write(0, written([5]), torch.tensor([0]), {})
    found = list(judged(pools_below([tmp_path / "sources", tmp_path / "other"]), [network()], CPU, print))
    assert [(one["pool"], one["right"]) for one in found] == [("a", 5 / 8), (str(tmp_path / "other" / "a"), 0.0)]


@pytest.mark.parametrize(
    ("stranger", "reason"),
    [
        (network("stranger", channels=3), "images of 1×8×8, where it knows 3×8×8"),
        (network("stranger", image_size=32), "where it knows 1×32×32"),
        (network("stranger", classes=range(1, 10)), "classes that it was not trained on: 0"),
    ],
)
def test_images_that_a_network_does_not_know_are_left_out(pools: Path, stranger: Judge, reason: str) -> None:
    told: list[str] = []
    with pytest.raises(UserError, match=f"'stranger' can judge none of these images: .*{reason}"):
        list(judged(pools_below([pools]), [network(), stranger], CPU, told.append))
    assert not told, "told before anything was judged"
    own = KEY | {"image_shape": [stranger.data.channels, stranger.data.image_size, stranger.data.image_size]}
    other = MadeImages(pools / "other", own | {"classes": [1, 2]})
    other.begin()
    shape = (2, *own["image_shape"])
    other.write(0, torch.zeros(shape), torch.tensor([1, 2]), {})
    found = list(judged(pools_below([pools]), [stranger], CPU, told.append))
    assert [(one["pool"], one["right"]) for one in found] == [("other", 1 / 2)]
    assert len([line for line in told if "left out" in line and reason in line]) == 2


def test_networks_of_one_name_are_asked_for_themselves(pools: Path) -> None:
    for judges in ([network(channels=3), network()], [network(), network(channels=3)]):
        with pytest.raises(UserError, match="where it knows 3×8×8"):
            list(judged(pools_below([pools]), judges, CPU, print))


def test_data_of_another_number_of_classes_are_left_out(pools: Path) -> None:
    many = MadeImages(pools / "many", KEY, {"data": "hundred", "data_classes": 100})
    many.begin()
    many.write(0, written([0]), torch.tensor([0]), {})
    with pytest.raises(UserError, match="data of 100 classes, where it knows 10"):
        list(judged(pools_below([pools / "many"]), [network()], CPU, print))


def test_a_folder_without_pools_and_a_damaged_one_are_told(pools: Path) -> None:
    with pytest.raises(UserError, match="no synthesized images here"):
        pools_below([pools / "nowhere"])
    with pytest.raises(UserError, match="no synthesized images here"):
        pools_below([pools, pools / "sources" / "begun"])
    (pools / "cell" / "b" / "pool.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        pools_below([pools])
