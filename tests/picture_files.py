"""Small picture data sets on disk, in the forms in which real ones come."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from kdbench.data import birds

SIZES = [(40, 30), (30, 40), (33, 33), (90, 20), (20, 90), (64, 48), (47, 61)]


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Smooth noise: neither resizing nor JPEG makes it equal to another."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


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
