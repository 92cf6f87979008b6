"""Pictures that stay on disk: decoded as torchvision decodes them, drawn by address, the official splits."""

from __future__ import annotations

import io
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_files import SIZES, photo, write_birds, write_pictures, write_scenes
from PIL import Image
from scipy import stats
from tiny import CPU, teacher_for, train
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from kdbench.bench import loading
from kdbench.data import birds, pictures, scenes, sums
from kdbench.data.decoding import NUMBERS, as_bytes, crop_box, decoded_crop, picture, resized_crop
from kdbench.data.images import ImageData
from kdbench.data.listing import centred, not_found
from kdbench.data.streams import uniform
from kdbench.engine.data.batch import SLICE, at_most, at_once
from kdbench.engine.data.batches import Batches
from kdbench.engine.data.datasets import load_data
from kdbench.engine.data.resident import ResidentSplit
from kdbench.engine.data.streamed import StreamedDomain, StreamedSplit, split_for_testing
from kdbench.engine.evaluation import evaluate
from kdbench.engine.member import Member
from kdbench.engine.ranks import ALONE, Ranks
from kdbench.errors import UserError
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec
from kdbench.recipe.timeline import timeline
from kdbench.registry import Registry

CARDS = """
datasets:
  tiny_pictures:
    target: "kdbench.data.pictures:load"
    streamed: true
    args: {folder: tiny_pictures, short_side: 28}
    title: Tiny pictures
    classes: 3
    channels: 3
    image_size: 24
    train: 15
    test: 6
    normalization: {mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
teachers:
  other_classes:
    model: wrn_10_1
    data: cifar10
    weights: {file: nowhere.pt, sha256: "%s"}
    transfers: true
"""


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "cards.yaml").write_text(CARDS % ("0" * 64))
    return Registry([tmp_path / "cards"])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "data" / "tiny_pictures")
    return tmp_path / "data"


def spec_of(registry: Registry, **over: Any) -> CellSpec:
    recipe = {
        "data": "tiny_pictures",
        "student": "wrn_10_1",
        "protocol": {
            "name": "ab_official",
            "batch_size": 4,
            "augmentation": {"padding": 0, "mode": "zero", "flip": True, "resized_crop": [0.08, 1.0]},
        },
        "method": "ce",
        "steps": 9,
        "evaluations": 2,
    }
    return plan(recipe | over, registry).cells[0].spec


def read(spec: CellSpec, root: Path) -> Any:
    return load_data(spec.data, [root], False, root / "cache")


# --- decoding


@pytest.mark.parametrize("width, height", SIZES)
def test_a_crop_and_a_centre_are_torchvisions_bit_for_bit(width: int, height: int) -> None:
    image = photo(width, height, 7)
    box = crop_box(uniform(NUMBERS, 1, "t", width).tolist(), height, width, (0.2, 0.9))
    expected = F.resized_crop(image, *box, [24, 24], InterpolationMode.BILINEAR)
    assert torch.equal(as_bytes(resized_crop(image, box, 24)), F.pil_to_tensor(expected))
    for short_side, size in ((28, 24), (24, 24), (16, 24)):
        expected = F.center_crop(F.resize(image, short_side, InterpolationMode.BILINEAR), [size, size])
        assert torch.equal(as_bytes(centred(image, short_side, size)), F.pil_to_tensor(expected)), short_side


@pytest.mark.parametrize("channels", [3, 1])
def test_torchvisions_decoder_makes_almost_the_same_pixels_and_is_another_identity(
    registry: Registry, root: Path, channels: int
) -> None:
    file, numbers = root / "photo.jpg", uniform(NUMBERS, 1, "t").tolist()
    photo(90, 70, 7).save(file, quality=95)
    image = picture(file, channels)
    exact = as_bytes(resized_crop(image, crop_box(numbers, image.height, image.width, (0.2, 0.9)), 24))
    fast = decoded_crop(file, numbers, (0.2, 0.9), 24, channels)
    off = (fast.int() - exact.int()).abs()
    assert fast.shape == exact.shape and int(off.max()) <= 2 and (off == 0).float().mean() > 0.8
    plain = {"padding": 0, "mode": "zero", "flip": True, "resized_crop": [0.08, 1.0]}
    protocols = [
        {"name": "ab_official", "batch_size": 4, "augmentation": plain | d} for d in ({}, {"decoder": "torchvision"})
    ]
    specs = [spec_of(registry, protocol=protocol) for protocol in protocols]
    assert specs[0].identity() == spec_of(registry).identity() != specs[1].identity()
    data = read(specs[0], root)
    pillow, other = (Batches(spec, data, CPU).at(0, timeline(spec, 15)).images.int() for spec in specs)
    assert 0 < (pillow - other).abs().float().mean() < 1, "the same crops, not the same bits"
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(UserError, match="damaged or cut short") as error:
        decoded_crop(file, numbers, (0.2, 0.9), 24, channels)
    assert error.value.where == str(file)
    with pytest.raises(UserError, match="'decoder' is of pictures that 'resized_crop' crops"):
        spec_of(registry, protocol={"name": "crd", "augmentation": {"decoder": "torchvision"}})


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize(
    "kind", ["x.bmp", "x.tif", "x.ppm", "x.tga", "x.gif", "x.webp", "animated.gif", "animated.webp"]
)
def test_what_torchvision_does_not_decode_pillow_does(tmp_path: Path, kind: str, channels: int) -> None:
    """It was called damaged, or ended the run with torch's own words."""
    image, numbers = photo(90, 70, 7), uniform(NUMBERS, 1, "t").tolist()
    frames = {"save_all": True, "append_images": [image.rotate(90)]} if kind.startswith("animated") else {}
    image.save(tmp_path / kind, **frames)
    of_pillow = picture(tmp_path / kind, channels)
    exact = as_bytes(resized_crop(of_pillow, crop_box(numbers, 70, 90, (0.2, 0.9)), 24)).int()
    fast = decoded_crop(tmp_path / kind, numbers, (0.2, 0.9), 24, channels)
    assert fast.shape == exact.shape and int((fast.int() - exact).abs().max()) <= 2


def test_pixels_of_16_bits_are_told_by_either_decoder(tmp_path: Path) -> None:
    Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="do not fit into bytes"):
        decoded_crop(tmp_path / "deep.png", [0.5] * NUMBERS, (0.2, 0.9), 24, 3)


@pytest.mark.parametrize("width, height", [(60, 40), (400, 30)])
def test_crops_are_distributed_as_torchvisions(width: int, height: int) -> None:
    n = 3000
    numbers = uniform(n * NUMBERS, 3, "crops").reshape(n, NUMBERS)
    ours = np.array([crop_box(row, height, width, (0.08, 1.0)) for row in numbers.tolist()])
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]  # (top, left, h, w)
    )
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3, column
    # Every place is reached, the outermost too.
    last = crop_box([0.0, 0.5] * 10 + [1 - 2**-53] * 2, height, width, (0.01, 1.0))
    assert (last[0] + last[2], last[1] + last[3]) == (height, width)
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    # Where no try fits, the largest centred one of a ratio that is allowed, of wide and of tall pictures.
    for sides in ((height, width), (width, height)):
        expected = RandomResizedCrop.get_params(torch.zeros(3, *sides), [1.0, 1.0], [3 / 4, 4 / 3])
        assert crop_box([0.5] * NUMBERS, *sides, (1.0, 1.0)) == expected


def test_grey_pictures_become_colours_and_broken_ones_are_named(tmp_path: Path) -> None:
    photo(20, 20, 1).convert("L").save(tmp_path / "grey.jpg")
    assert picture(tmp_path / "grey.jpg").mode == "RGB"
    whole = io.BytesIO()
    photo(90, 90, 1).save(whole, "jpeg")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:600])
    (tmp_path / "none.jpg").write_bytes(b"no picture")
    for name in ("cut.jpg", "none.jpg"):
        with pytest.raises(UserError, match="damaged or cut short") as error:
            picture(tmp_path / name)
        assert name in str(error.value.where)


# --- batches


def test_the_data_card_chooses_the_source(registry: Registry, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SLICE, "cpu", 4)
    spec = spec_of(registry)
    batches = Batches(spec, read(spec, root), CPU)
    assert isinstance(batches.source, StreamedDomain)
    assert len(batches.train.labels) == 15 and len(batches.test.labels) == 6
    parts = list(batches.test.slices())
    assert [tuple(images.shape) for images, _ in parts] == [(4, 3, 24, 24), (2, 3, 24, 24)]
    assert torch.cat([labels for _, labels in parts]).tolist() == [0, 0, 1, 1, 2, 2]
    assert batches.test.every(2).labels.tolist() == at_most(4, batches.test).labels.tolist() == [0, 1, 2]
    assert len(split_for_testing(spec.data, read(spec, root), CPU).labels) == 6
    resident = spec.data.model_copy(update={"streamed": False})
    with pytest.raises(UserError, match="correct 'streamed'"):
        load_data(resident, [root], False, root / "cache")


def test_a_batch_is_a_function_of_seed_and_step(registry: Registry, root: Path) -> None:
    """In order, out of order, with decoding threads or without: so a resumed cell sees what it would have seen."""
    spec = spec_of(registry)
    data = read(spec, root)
    line = timeline(spec, 15)
    batches = Batches(spec, data, CPU)
    in_order = [batches.at(step, line) for step in range(line.total)]
    assert [len(batch.labels) for batch in in_order] == [4, 4, 4, 3, 4, 4, 4, 3, 4]
    assert sorted(torch.cat([batch.index for batch in in_order[:4]]).tolist()) == list(range(15))
    for batch in in_order:
        assert torch.equal(batch.labels, data.train_labels[batch.index])
    fresh = Batches(spec, data, CPU)
    torch.set_num_threads(2)
    try:
        for step in (5, 6, 2, 8, 0):
            again = fresh.at(step, line)
            for name in ("images", "labels", "index", "view"):
                assert torch.equal(getattr(again, name), getattr(in_order[step], name)), (step, name)
    finally:
        torch.set_num_threads(1)
    other = Batches(spec.model_copy(update={"seed": 1}), data, CPU).at(0, line)
    assert not torch.equal(other.images, in_order[0].images)
    first = {int(i): image for batch in in_order[:4] for i, image in zip(batch.index, batch.images, strict=True)}
    second = {int(i): image for batch in in_order[4:8] for i, image in zip(batch.index, batch.images, strict=True)}
    assert not any(torch.equal(first[i], second[i]) for i in first), "the crops of two epochs are the same"


def test_cells_that_end_at_other_steps_share_their_batches(registry: Registry, root: Path) -> None:
    """As stages' shares of a budget, each rounded to steps, may make them."""
    shorter, longer = (spec_of(registry, steps=steps) for steps in (4, 6))
    data = read(longer, root)
    batches, alone = (Batches(longer, data, CPU) for _ in range(2))
    for step in range(6):
        line = timeline(shorter if step < 4 else longer, 15)
        assert torch.equal(batches.at(step, line).images, alone.at(step, timeline(longer, 15)).images)


def test_shares_of_several_ranks_are_the_batch_of_one_process(registry: Registry, root: Path) -> None:
    spec = spec_of(registry)
    data = read(spec, root)
    line = timeline(spec, 15)
    whole, *parts = (Batches(spec, data, CPU, None, ranks) for ranks in (ALONE, Ranks(0, 2), Ranks(1, 2)))
    for step in (0, 3, 5):
        one, *shares = (batches.at(step, line) for batches in (whole, *parts))
        assert [len(share.labels) for share in shares] == ([2, 1] if step == 3 else [2, 2])
        for name in ("images", "labels", "index", "view"):
            assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(one, name)), (step, name)


def test_without_a_resized_crop_the_centres_are_cropped_as_resident_images_are(registry: Registry, root: Path) -> None:
    augmentation = {"padding": 2, "mode": "reflect", "flip": True}
    protocol = {"name": "ab_official", "batch_size": 4, "augmentation": augmentation}
    spec = spec_of(registry, protocol=protocol)
    data = read(spec, root)
    centres = [
        torch.stack([as_bytes(centred(picture(file), 28, 24)) for file in files])
        for files in (data.train_files, data.test_files)
    ]
    resident = ImageData("x", data.classes, centres[0], data.train_labels, centres[1], data.test_labels, "", "")
    line = timeline(spec, 15)
    streamed, expected = Batches(spec, data, CPU), Batches(spec, resident, CPU)
    for step in range(6):
        assert torch.equal(streamed.at(step, line).images, expected.at(step, line).images), step


def test_subsets_and_validation_are_split_off(registry: Registry, root: Path) -> None:
    spec = spec_of(registry, data={"name": "tiny_pictures", "validation": 3, "per_class": 2})
    batches = Batches(spec, read(spec, root), CPU)
    assert batches.train.labels.tolist() == [0, 0, 1, 1, 2, 2] and len(batches.validation.labels) == 3


def test_a_cell_trains_on_pictures(registry: Registry, root: Path) -> None:
    spec = spec_of(registry)
    batches = Batches(spec, read(spec, root), CPU)
    member = Member(spec, batches, None, CPU)
    train(member, batches, None, 9)
    member.check_finite()
    assert 0 <= evaluate(member)["test"]["accuracy"] <= 100


@pytest.mark.parametrize("threads", [1, 2])
def test_a_broken_picture_is_one_clear_error(registry: Registry, root: Path, threads: int) -> None:
    spec = spec_of(registry)
    broken = root / "tiny_pictures" / "train" / "c1" / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    batches = Batches(spec, read(spec, root), CPU)
    torch.set_num_threads(threads)
    try:
        with pytest.raises(UserError, match="damaged or cut short") as error:
            for step in range(4):
                batches.at(step, timeline(spec, 15))
    finally:
        torch.set_num_threads(1)
    assert error.value.where == str(broken) and "Traceback" not in str(error.value)


# --- data sets


def test_names_and_places_of_files_do_not_matter(tmp_path: Path) -> None:
    first = pictures.load([write_pictures(tmp_path / "a" / "x")], False, tmp_path / "cache", folder="x")
    renamed = write_pictures(tmp_path / "b" / "x")
    for file in sorted((renamed / "train" / "c0").iterdir()):
        file.rename(file.with_name(f"{9 - int(file.stem)}.JPEG"))
    second = pictures.load([tmp_path / "b"], False, tmp_path / "cache", folder="x")
    assert first.fingerprint == second.fingerprint and torch.equal(first.train_labels, second.train_labels)
    assert [f.read_bytes() for f in first.train_files] == [f.read_bytes() for f in second.train_files]
    (renamed / "test" / "c0" / "0.jpg").write_bytes((renamed / "test" / "c1" / "0.jpg").read_bytes())
    assert pictures.load([tmp_path / "b"], False, tmp_path / "cache", folder="x").fingerprint != first.fingerprint


def test_files_are_read_once_for_their_sums_and_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "x")
    first = pictures.load([tmp_path], False, tmp_path / "cache", folder="x")
    with monkeypatch.context() as unread:
        unread.setattr(sums, "sha256_of", None)
        assert pictures.load([tmp_path], False, tmp_path / "cache", folder="x").fingerprint == first.fingerprint
    changed = first.test_files[0]
    changed.write_bytes(changed.read_bytes()[::-1])
    os.utime(changed, (0, 0))
    assert pictures.load([tmp_path], False, tmp_path / "cache", folder="x").fingerprint != first.fingerprint


def test_scenes_take_the_official_lists(tmp_path: Path) -> None:
    write_scenes(tmp_path / "indoorCVPR_09")
    data = scenes.load([tmp_path], False, tmp_path / "cache")
    assert (len(data.classes), len(data.train_labels), len(data.test_labels)) == (67, 134, 67)
    assert data.train_labels.tolist() == [c for c in range(67) for _ in range(2)]
    for file, label in zip(data.test_files, data.test_labels.tolist(), strict=True):
        assert file.name == "2.jpg" and file.parent.name == data.classes[label]
    folders = write_pictures(tmp_path / "other" / "mit67")
    assert len(scenes.load([folders], False, tmp_path / "cache").classes) == 3


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("absent", "MIT indoor scenes are not here"),
        ("no list", "the list cannot be read"),
        ("a class less", "66 classes instead of 67"),
        ("no picture", "a listed picture cannot be read"),
        ("strange line", "TrainImages.txt:1: not a line <class>/<picture>"),
    ],
)
def test_broken_scenes(tmp_path: Path, what: str, message: str) -> None:
    if what != "absent":
        root = write_scenes(tmp_path / "mit67", 66 if what == "a class less" else 67)
        if what == "no list":
            (root / "TestImages.txt").unlink()
        elif what == "no picture":
            (root / "Images" / "room03" / "1.jpg").unlink()
        elif what == "strange line":
            (root / "TrainImages.txt").write_text("../secret/x.jpg\n")
    with pytest.raises(UserError) as error:
        scenes.load([tmp_path], False, tmp_path / "cache")
    assert message in str(error.value) and error.value.hint


def test_birds_take_the_official_tables(tmp_path: Path) -> None:
    write_birds(tmp_path / "CUB_200_2011")
    data = birds.load([tmp_path], False, tmp_path / "cache")
    assert data.classes == ("010.Zebra_Finch", "002.Auk")
    assert data.train_labels.tolist() == [0, 0, 1, 1] and [f.name for f in data.test_files] == ["0.jpg", "0.jpg"]
    assert [f.parent.name for f in data.test_files] == list(data.classes)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("absent", "CUB-200-2011 was not found"),
        ("no table", "classes.txt: the list cannot be read"),
        ("a row less", "do not list the same pictures"),
        ("strange split", "belongs to no split"),
        ("strange row", "images.txt:1: not a line"),
    ],
)
def test_broken_birds(tmp_path: Path, what: str, message: str) -> None:
    if what != "absent":
        root = write_birds(tmp_path / "CUB_200_2011")
        if what == "no table":
            (root / "classes.txt").unlink()
        elif what == "a row less":
            (root / "image_class_labels.txt").write_text("1 1\n")
        elif what == "strange split":
            table = root / "train_test_split.txt"
            table.write_text(table.read_text().replace("1 0", "1 7"))
        elif what == "strange row":
            (root / "images.txt").write_text("one\n")
    with pytest.raises(UserError) as error:
        birds.load([tmp_path], False, tmp_path / "cache")
    assert message in str(error.value) and error.value.hint
    assert "KDBENCH_DATA" in not_found([], "x")


# --- what recipes may ask for


def test_two_ways_to_crop_are_refused(registry: Registry) -> None:
    for wrong in ({"resized_crop": [0.5]}, {"resized_crop": [0.9, 0.1]}, {"resized_crop": [0.1, 1.0], "padding": 4}):
        with pytest.raises(UserError, match="resized_crop"):
            spec_of(registry, protocol={"name": "ab_official", "augmentation": {"mode": "zero"} | wrong})


def test_a_teacher_of_other_classes_teaches_its_features_only(
    registry: Registry, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nowhere.pt").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    spec = spec_of(registry, teacher="other_classes", method="at")
    assert spec.teacher is not None and spec.teacher.classes == 10
    # Gradients are of the label's logit.
    for method in ("kd", "jacobian", "lwm"):
        with pytest.raises(UserError, match="the logits of 'other_classes' are of its own 10 classes, not of the 3"):
            spec_of(registry, teacher="other_classes", method=method)
    teacher = teacher_for(spec)
    assert teacher.shapes["logits"] == (10,)
    batches = Batches(spec, read(spec, root), CPU)
    member = Member(spec, batches, teacher, CPU)
    train(member, batches, teacher, 2)
    member.check_finite()


def test_the_official_splits_are_on_the_cards() -> None:
    cards = Registry()
    for name, train_images, test_images, classes in (("mit67", 5360, 1340, 67), ("cub200", 5994, 5794, 200)):
        card = cards.card("datasets", name)
        assert (card.train, card.test, card.classes, card.streamed) == (train_images, test_images, classes, True)


def test_all_ways_of_reading_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "made_up_pictures", partial(loading.made_up_pictures, pictures=4))
    monkeypatch.setattr(loading, "BATCH", 2)
    found = loading.measured(2, lambda text: None)
    assert len(found.rates) == 7 and all(len(rates) == 2 and min(rates) > 0 for rates in found.rates.values())
    assert found.table().count("\n") == 8 and found.kilobytes > 50


def test_fewer_large_pictures_are_looked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 pictures of 224 pixels would take tens of gigabytes."""
    sizes = (32, 64, 224, 1024)
    assert [at_once(torch.device("cuda"), side) for side in sizes] == [2000, 500, 250, 250]
    monkeypatch.setitem(SLICE, "cpu", 40)
    for side, expected in ((8, [40, 10]), (64, [10] * 5), (256, [5] * 10)):
        pictures, labels = torch.zeros(50, 1, side, side, dtype=torch.uint8), torch.zeros(50, dtype=torch.int64)
        for part in (ResidentSplit(pictures, labels), StreamedSplit(pictures, labels, side, side, 1)):
            assert [len(shown) for shown, _ in part.slices()] == expected
