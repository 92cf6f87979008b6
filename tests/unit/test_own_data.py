"""What code of the user's own gives is looked at before anything trains on it: data, transforms, metrics, networks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from kdbench.data.pictures import Pictures
from kdbench.engine.materials import load_data
from kdbench.errors import UserError
from kdbench.recipe.specs import DataSpec

# Data functions, each with one thing wrong, or nothing.
SETS = """
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import torch
from PIL import Image

from kdbench.data.images import ImageData, canonical
from kdbench.data.pictures import Pictures, gather

IMAGES = torch.arange(6 * 3 * 8 * 8).reshape(6, 3, 8, 8).remainder(251).to(torch.uint8)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def made(images=IMAGES, labels=LABELS, test_images=IMAGES, test_labels=LABELS, classes="abc"):
    return canonical("own", classes, (images, labels), (test_images, test_labels), "made up")


def by_hand(**over):
    given = {"train_images": IMAGES, "train_labels": LABELS, "test_images": IMAGES, "test_labels": LABELS}
    return ImageData(name="own", classes=("a", "b", "c"), **given | {"fingerprint": "1", "origin": "made up"} | over)


def good(roots, download, cache): return made(labels=LABELS.to(torch.int32))
def fewer_labels(roots, download, cache): return made(labels=LABELS[:5])
def more_labels(roots, download, cache): return by_hand(test_labels=torch.cat([LABELS, LABELS]))
def column_of_labels(roots, download, cache): return made(labels=LABELS[:, None])
def float_labels(roots, download, cache): return made(labels=LABELS + 0.5)
def yes_or_no(roots, download, cache): return made(labels=LABELS > 0)
def short_labels(roots, download, cache): return by_hand(train_labels=LABELS.to(torch.int32))
def list_of_labels(roots, download, cache): return made(labels=LABELS.tolist())
def from_one(roots, download, cache): return made(labels=LABELS + 1)
def ignored(roots, download, cache): return made(test_labels=LABELS - 1)
def from_one_by_hand(roots, download, cache): return by_hand(train_labels=LABELS + 1)
def float_images(roots, download, cache): return made(images=IMAGES.float())
def share_images(roots, download, cache): return by_hand(test_images=IMAGES / 255)
def long_images(roots, download, cache): return made(images=IMAGES.long())
def not_finite(roots, download, cache): return made(images=IMAGES / 0)
def of_numpy(roots, download, cache): return made(images=IMAGES.numpy())
def grey(roots, download, cache): return made(images=IMAGES[:, 0], test_images=IMAGES[:, 0])
def channels_last(roots, download, cache):
    return made(images=IMAGES.permute(0, 2, 3, 1), test_images=IMAGES.permute(0, 2, 3, 1))
def larger_test(roots, download, cache): return made(test_images=IMAGES.repeat(1, 1, 2, 2))
def other_classes(roots, download, cache): return made(classes="abcd")
def numbers_as_classes(roots, download, cache): return made(classes=range(3))
def no_test(roots, download, cache): return made(test_images=IMAGES[:0], test_labels=LABELS[:0])
def no_training(roots, download, cache): return made(images=IMAGES[:0], labels=LABELS[:0])
def fixed_fingerprint(roots, download, cache): return by_hand()
def no_fingerprint(roots, download, cache): return by_hand(fingerprint=None)
def changed_afterwards(roots, download, cache): return replace(made(), train_images=255 - IMAGES)
def nothing(roots, download, cache): made()
def a_tuple(roots, download, cache): return IMAGES, LABELS, IMAGES, LABELS
def raises(roots, download, cache):
    return {"train": 1}["test"]
def absent_file(roots, download, cache): return torch.load(roots[0] / "absent.pt")
def leaves(roots, download, cache):
    sys.exit("no licence")
def leaves_quietly(roots, download, cache): sys.exit()
def takes_nothing(): return made()


def pictures(cache, change=lambda data: data):
    files = []
    for number in range(3):
        Image.fromarray(IMAGES[number].permute(1, 2, 0).numpy()).save(file := Path(cache) / f"{number}.png")
        files.append((file, number))
    return change(gather("own", "abc", files, files, cache, 8, "made up"))


def good_pictures(roots, download, cache): return pictures(cache)
def pictures_without_labels(roots, download, cache):
    return pictures(cache, lambda data: replace(data, train_labels=LABELS[:2]))
def pictures_from_one(roots, download, cache):
    return pictures(cache, lambda data: replace(data, test_labels=data.test_labels + 1))
def pictures_of_another_order(roots, download, cache):
    return pictures(cache, lambda data: replace(data, train_labels=data.train_labels.flip(0)))
"""


def own_set(function: str, module: str = "own_sets", **over: Any) -> DataSpec:
    said = {"classes": 3, "channels": 3, "image_size": 8, "train": 6, "test": 6} | over
    normalization = {"mean": [0.5] * 3, "std": [0.25] * 3}
    return DataSpec(name="own", target=f"{module}:{function}", options={}, normalization=normalization, **said)


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_sets.py").write_text(SETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_sets", raising=False)
    return tmp_path


def load(folder: Path, function: str, **over: Any) -> Any:
    return load_data(own_set(function, **over), [folder], False, folder)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("fewer_labels", r"training labels are of shape \[5\] for 6 images"),
        ("more_labels", r"test labels are of shape \[12\] for 6 images"),
        ("column_of_labels", r"training labels are of shape \[6, 1\]"),
        ("float_labels", "training labels are float32, not whole"),
        ("yes_or_no", "training labels are bool"),
        ("short_labels", "training labels are torch.int32, not torch.int64"),
        ("list_of_labels", "training labels are of type list"),
        ("from_one", "training labels are 1 to 3, of 3 classes"),
        ("ignored", "test labels are -1 to 1, of 3 classes"),
        ("from_one_by_hand", "training labels are 1 to 3, of 3 classes"),
        ("float_images", r"training images are float32, not uint8\n.*in \[0, 255\]"),
        ("share_images", r"test images are float32, not uint8\n.*\* 255"),
        ("long_images", "training images are int64, not uint8"),
        ("not_finite", "training images are float32, not uint8"),
        ("of_numpy", "training images are of type ndarray"),
        ("grey", r"training images are of shape \[6, 8, 8\].*\n.*unsqueeze"),
        ("channels_last", r"8 for 'channels', where the card says 3.*\n.*permute"),
        ("larger_test", "training images are 3×8×8, test images 3×16×16"),
        ("other_classes", "4 for 'classes', where the card says 3"),
        ("numbers_as_classes", "the class 0 is no text"),
        ("no_test", "'own' has no test images"),
        ("no_training", "'own' has no training images"),
        ("fixed_fingerprint", "own_sets:fixed_fingerprint: .*its fingerprint 1 is not that of its images"),
        ("no_fingerprint", "its fingerprint None is not that of its images"),
        ("changed_afterwards", "is not that of its images"),
        ("nothing", r"own_sets:nothing: .*its function gives NoneType.*\n.*canonical"),
        ("a_tuple", "its function gives tuple"),
        ("raises", r"'own_sets:raises': KeyError: 'test' \(own_sets.py:56\)"),
        ("absent_file", r"absent.pt' \(own_sets.py:57\)"),
        ("leaves", r"'sys.exit\(no licence\)' \(own_sets.py:59\)"),
        ("leaves_quietly", r"'sys.exit\(\)'"),
        ("takes_nothing", r"unexpected keyword argument 'roots'.*\n.*called with roots, download, cache"),
    ],
)
def test_a_wrong_data_set_is_told_before_anything_trains_on_it(function: str, told: str, sets: Path) -> None:
    with pytest.raises(UserError) as error:
        load(sets, function)
    assert "'own'" in error.value.what
    error.match(told)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("pictures_without_labels", r"training labels are of shape \[2\] for 3 images"),
        ("pictures_from_one", "test labels are 1 to 3, of 3 classes"),
        ("pictures_of_another_order", "is not that of its images"),
    ],
)
def test_a_wrong_set_of_pictures_is_told(function: str, told: str, sets: Path) -> None:
    with pytest.raises(UserError, match=told):
        load(sets, function, streamed=True, train=3, test=3)


def test_a_data_set_as_it_should_be_is_taken(sets: Path) -> None:
    assert load(sets, "good").train_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert isinstance(load(sets, "good_pictures", streamed=True, train=3, test=3), Pictures)


def test_a_module_that_ends_the_program_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_leaving.py").write_text("import sys\n\nsys.exit()\n\n\ndef load(): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"'own_leaving:load' cannot be imported.*'sys.exit\(\)' \(own_leaving.py:3\)"):
        load_data(own_set("load", "own_leaving"), [], False, tmp_path)
