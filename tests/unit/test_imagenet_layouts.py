"""ImageNet and Tiny ImageNet as people have them on their disks."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision.datasets.imagenet
from picture_files import SYNSETS, write_imagenet, write_tiny_imagenet
from timm.data import ImageNetInfo
from torchvision.datasets import ImageFolder
from torchvision.datasets.imagenet import parse_devkit_archive

from kdbench.data import imagenet, pictures
from kdbench.data.pictures import Pictures
from kdbench.errors import UserError
from kdbench.registry import Registry

DEVKIT = "ILSVRC2012_devkit_t12"


def load(root: Path, official: str = "imagenet_subset") -> Pictures:
    return pictures.load([root.parent], False, root.parent / "cache", folder=root.name, official=official)  # type: ignore[arg-type]


def pairs(data: Pictures) -> list[tuple[str, int]]:
    return sorted((file.name, label) for file, label in zip(data.test_files, data.test_labels.tolist(), strict=True))


def as_archive(root: Path) -> None:
    with tarfile.open(root / f"{DEVKIT}.tar.gz", "w:gz") as tar:
        tar.add(root / DEVKIT, DEVKIT)
    shutil.rmtree(root / DEVKIT)


def as_torchvisions(root: Path) -> None:
    as_archive(root)
    with pytest.MonkeyPatch.context() as patch:
        # A made-up archive has another checksum.
        patch.setattr(torchvision.datasets.imagenet, "_verify_archive", lambda *given: None)
        parse_devkit_archive(root)
    (root / f"{DEVKIT}.tar.gz").unlink()


def as_kaggles(root: Path) -> None:
    names = imagenet.truth(root)
    assert isinstance(names, list)
    rows = [f"ILSVRC2012_val_{i:08},{name} 1 2 3 4 {name} 5 6 7 8" for i, name in enumerate(names, 1)]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]) + "\n")
    shutil.rmtree(root / DEVKIT)


@pytest.mark.parametrize("known_by", [None, as_archive, as_torchvisions, as_kaggles])
def test_validation_pictures_in_one_folder_are_labelled_as_in_folders(
    tmp_path: Path, known_by: Callable[[Path], None] | None
) -> None:
    sorted_out = load(write_imagenet(tmp_path / "a" / "imagenet"))
    assert list(sorted_out.classes) == SYNSETS and sorted_out.train_labels.bincount().tolist() == [4] * 8
    theirs = ImageFolder(str(tmp_path / "a" / "imagenet" / "val")).samples
    assert pairs(sorted_out) == sorted((Path(file).name, label) for file, label in theirs), "labels are torchvision's"
    flat = write_imagenet(tmp_path / "b" / "imagenet", flat=True)
    if known_by is not None:
        known_by(flat)
    found = load(flat)
    assert pairs(found) == pairs(sorted_out) and found.fingerprint == sorted_out.fingerprint


def test_the_thousand_classes_are_checked(tmp_path: Path) -> None:
    few = write_imagenet(tmp_path / "imagenet", train=1, val=1)
    with pytest.raises(UserError, match="992 of ImageNet's 1,000 classes are missing") as error:
        load(few, "imagenet")
    assert "imagenet_subset" in (error.value.hint or "") and error.value.where == str(few / "train")
    (few / "train" / "cats").mkdir()
    with pytest.raises(UserError, match="1 class folder of no class of ImageNet-1k: cats"):
        load(few)
    (few / "train" / "cats").rmdir()
    shutil.rmtree(few / "val" / SYNSETS[2])
    with pytest.raises(UserError, match=f"in only one of 'train' and 'val': {SYNSETS[2]}"):
        load(few)
    names = ImageNetInfo("imagenet-1k").label_names()
    imagenet.checked(names, False, few)
    assert names == sorted(names), "the labels of weights follow the folders' names"


def test_what_is_said_of_flat_pictures_must_fit(tmp_path: Path) -> None:
    root = write_imagenet(tmp_path / "imagenet", flat=True)
    (root / "val" / "ILSVRC2012_val_00000003.JPEG").unlink()
    with pytest.raises(UserError, match="15 validation pictures, and classes of 16"):
        load(root)
    (root / DEVKIT / "data" / "meta.mat").write_bytes(b"no matrix")
    with pytest.raises(UserError, match="classes cannot be read") as error:
        load(root)
    shutil.rmtree(root / DEVKIT)
    with pytest.raises(UserError, match="no file that names the classes") as error:
        load(root)
    assert "meta.bin" in (error.value.hint or "")


def test_tiny_imagenet_as_unpacked_and_sorted(tmp_path: Path) -> None:
    root = write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    data = imagenet.tiny([tmp_path], False, tmp_path / "cache")
    assert list(data.classes) == SYNSETS[:3] and data.train_images.shape == (9, 3, 64, 64)
    assert data.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    for i, name in enumerate(SYNSETS[:3] * 2):
        (root / "val" / name / "images").mkdir(parents=True, exist_ok=True)
        (root / "val" / "images" / f"val_{i}.JPEG").rename(root / "val" / name / "images" / f"val_{i}.JPEG")
    (root / "val" / "images").rmdir()
    again = imagenet.tiny([tmp_path], False, tmp_path / "cache")
    assert again.fingerprint == data.fingerprint and torch.equal(again.test_images, data.test_images)
    (root / "wnids.txt").write_text("n01440764\nn01443537\nn02124075\n")
    with pytest.raises(UserError, match="2 classes in only one of wnids.txt and 'train': n01484850, n02124075"):
        imagenet.tiny([tmp_path], False, tmp_path / "cache")


def test_the_cards_say_what_the_archives_hold() -> None:
    cards = Registry()
    for name, size, train, test, classes in (
        ("imagenet", 224, 1_281_167, 50_000, 1000),
        ("tiny_imagenet", 64, 100_000, 10_000, 200),
    ):
        card = cards.card("datasets", name)
        assert (card.image_size, card.train, card.test, card.classes) == (size, train, test, classes)
