"""Small picture data sets on disk, in the forms in which real ones come."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image
from torch import Tensor

from kdbench.data import birds

# The card of what `write_imagenet` writes.
EIGHT = """
datasets:
  eight:
    include: imagenet
    classes: 8
    image_size: 32
    train: 32
    test: 16
    args: {folder: imagenet, official: imagenet_subset, short_side: 36}
"""
SIZES = [(40, 30), (30, 40), (33, 33), (90, 20), (20, 90), (64, 48), (47, 61)]


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Smooth noise: neither resizing nor JPEG makes it equal to another."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def moments(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and deviation per channel of bytes [N, C, H, W], on the scale of [0, 1]."""
    counts = np.stack([channel.bincount(minlength=256).numpy() for channel in images.transpose(0, 1).flatten(1)])
    share, values = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = share @ values
    return mean.tolist(), np.sqrt(share @ values**2 - mean**2).tolist()


def write_pictures(root: Path, classes: int = 3, train: int = 5, test: int = 2, seed: int = 0) -> Path:
    """`root/{train,test}/<class>/*.jpg`, each picture of another size."""
    number = seed
    for split, count in (("train", train), ("test", test)):
        for c in range(classes):
            (root / split / f"c{c}").mkdir(parents=True)
            for i in range(count):
                photo(*SIZES[number % len(SIZES)], number).save(root / split / f"c{c}" / f"{i}.jpg", quality=95)
                number += 1
    return root


def write_scenes(root: Path, classes: int = 67) -> Path:
    lists: dict[str, list[str]] = {"TrainImages.txt": [], "TestImages.txt": []}
    for c in range(classes):
        folder = root / "Images" / f"room{c:02}"
        folder.mkdir(parents=True)
        for i, name in enumerate([*["TrainImages.txt"] * 2, "TestImages.txt", None]):
            photo(8, 8, 4 * c + i).save(folder / f"{i}.jpg")
            if name:
                lists[name].append(f"room{c:02}/{i}.jpg")
    for name, lines in lists.items():
        (root / name).write_text("\n".join(lines) + "\n")
    return root


def write_birds(root: Path) -> Path:
    (root / "images").mkdir(parents=True)
    rows: dict[str, list[str]] = {name: [] for name in birds.TABLES}
    number = 0
    # Numbers, not alphabetical order, decide about labels.
    for c, name in enumerate(["010.Zebra_Finch", "002.Auk"], 1):
        rows["classes.txt"].append(f"{c} {name}")
        (root / "images" / name).mkdir()
        for i in range(3):
            number += 1
            photo(9, 8, number).save(root / "images" / name / f"{i}.jpg")
            rows["images.txt"].append(f"{number} {name}/{i}.jpg")
            rows["image_class_labels.txt"].append(f"{number} {c}")
            rows["train_test_split.txt"].append(f"{number} {int(i > 0)}")
    for name, lines in rows.items():
        (root / name).write_text("\n".join(lines) + "\n")
    return root


# Of ImageNet, in the order of its labels.
SYNSETS = ["n01440764", "n01443537", "n01484850", "n01491361", "n01494475", "n01496331", "n01498041", "n01514668"]


def write_imagenet(root: Path, classes: list[str] = SYNSETS, train: int = 4, val: int = 2, flat: bool = False) -> Path:
    """`root/train/<synset>/*`, and `root/val` in folders too, or flat, with the devkit that says their classes."""
    number = 0
    listed = []
    for name in classes:
        (root / "train" / name).mkdir(parents=True)
        for i in range(train):
            photo(*SIZES[number % len(SIZES)], number).save(root / "train" / name / f"{name}_{i}.JPEG", "jpeg")
            number += 1
    for i in range(val * len(classes)):
        name = classes[(3 * i + 1) % len(classes)]
        folder = root / "val" / ("" if flat else name)
        folder.mkdir(parents=True, exist_ok=True)
        photo(*SIZES[number % len(SIZES)], number).save(folder / f"ILSVRC2012_val_{i + 1:08}.JPEG", "jpeg")
        number += 1
        listed.append(name)
    if flat:
        data = root / "ILSVRC2012_devkit_t12" / "data"
        data.mkdir(parents=True)
        # The devkit has an order of its own, and groups of classes among them.
        order = [*reversed(classes), "n00001740"]
        kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
        rows = [(i, name, "a word", "what it is", int(name == "n00001740")) for i, name in enumerate(order, 1)]
        scipy.io.savemat(data / "meta.mat", {"synsets": np.array(rows, dtype=kind)})
        lines = "".join(f"{order.index(name) + 1}\n" for name in listed)
        (data / "ILSVRC2012_validation_ground_truth.txt").write_text(lines)
    return root


def write_tiny_imagenet(root: Path, classes: list[str] = SYNSETS[:3], train: int = 3, val: int = 2) -> Path:
    """As Tiny ImageNet's archive unpacks."""
    for c, name in enumerate(classes):
        (root / "train" / name / "images").mkdir(parents=True)
        (root / "train" / name / f"{name}_boxes.txt").write_text("")
        for i in range(train):
            photo(64, 64, 10 * c + i).save(root / "train" / name / "images" / f"{name}_{i}.JPEG", "jpeg")
    for split in ("val", "test"):
        (root / split / "images").mkdir(parents=True)
        for i in range(val * len(classes)):
            photo(64, 64, 500 + i).save(root / split / "images" / f"{split}_{i}.JPEG", "jpeg")
    lines = (f"val_{i}.JPEG\t{classes[i % len(classes)]}\t0\t0\t9\t9\n" for i in range(val * len(classes)))
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(reversed(classes)) + "\n")
    (root / "words.txt").write_text("".join(f"{name}\ta word\n" for name in classes))
    return root
