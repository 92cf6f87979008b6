"""Folders of pictures as people have them: what either loader reads of them, and the card that this makes."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Kdbench
from picture_files import moments, photo, write_tiny_imagenet
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms.functional import center_crop, resize

from kdbench.cards import DatasetCard
from kdbench.data import folder, pictures
from kdbench.data.decoding import as_bytes, picture
from kdbench.data.listing import centred, listing
from kdbench.data.survey import survey
from kdbench.engine.data.datasets import load_data
from kdbench.errors import UserError
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.planning import plan
from kdbench.record import read_record
from kdbench.registry import Registry
from kdbench.tree import Tree


def write(root: Path, sizes: list[tuple[int, int]] | None = None, mode: str = "RGB", **splits: int) -> Path:
    """`root/<split>/{ant,bee}/*.png`; a split called "all" is the root itself."""
    number = 0
    for split, count in (splits or {"train": 6, "test": 2}).items():
        for c in ("ant", "bee"):
            place = root / c if split == "all" else root / split / c
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                number += 1
                size = sizes[number % len(sizes)] if sizes else (32, 32)
                photo(*size, number).convert(mode).save(place / f"{i}.png")
    return root


def resident(root: Path) -> Any:
    return folder.load([root.parent], False, root.parent / "cache", folder=root.name)


def streamed(root: Path) -> Any:
    return pictures.load([root.parent], False, root.parent / "cache", folder=root.name)


BOTH = pytest.mark.parametrize("load", [resident, streamed])
Loader = Callable[[Path], Any]


def counts(data: Any) -> list[list[int]]:
    return [torch.bincount(labels).tolist() for labels in (data.train_labels, data.test_labels)]


@BOTH
@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_the_test_split_may_be_called_otherwise(load: Loader, name: str, tmp_path: Path) -> None:
    assert counts(load(write(tmp_path / "x", train=3, **{name: 2}))) == [[3, 3], [2, 2]]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (("train", "val", "test"), "not used: val;"),
        (("train", "valid", "validation", "test", "more"), "not used: more, valid, validation;"),
        (("train", "val"), None),
    ],
)
def test_what_is_not_used_of_a_folder_is_told(parts: tuple[str, ...], said: str | None, tmp_path: Path) -> None:
    root = write(tmp_path / "x", **dict.fromkeys(parts, 2))
    (root / "notes").mkdir()
    (root / "notes" / "old").symlink_to(tmp_path / "nowhere")
    found = "; ".join(survey(root, tmp_path / "cache").sentences())
    assert said in found if said else "not used" not in found
    shutil.rmtree(root / parts[1])
    if said:
        assert said not in "; ".join(survey(root, tmp_path / "cache").sentences())


@pytest.mark.parametrize("whole", [False, True])
def test_lists_and_pictures_beside_the_folders_of_classes_are_told(whole: bool, tmp_path: Path) -> None:
    root = write(tmp_path / "x", **({"all": 6} if whole else {"train": 2, "test": 2}))
    split = root if whole else root / "train"
    (root / "README.txt").write_text("nothing")
    assert "not used" not in "; ".join(survey(root, tmp_path / "cache").sentences())
    (split / "Labels.CSV").write_text("file,class\n")
    shutil.copy(next(split.glob("*/*.png")), split / "alone.png")
    said = "; ".join(survey(root, tmp_path / "cache").sentences())
    assert f"; not used: {'' if whole else 'train/'}Labels.CSV (classes are those of the folders);" in said
    where = "the folder itself" if whole else "train"
    assert f"; warning: not used: 1 picture in no class's folder, in {where}: put those of a class into a" in said


@pytest.mark.parametrize("whole", [False, True])
def test_a_folder_of_one_class_is_refused(whole: bool, tmp_path: Path) -> None:
    """As where the pictures of the other lie beside its folder."""
    root = write(tmp_path / "x", **({"all": 6} if whole else {"train": 2, "test": 2}))
    for bees in [*root.rglob("bee")]:
        for file in bees.iterdir():
            file.rename(bees.parent / file.name)
        bees.rmdir()
    where = "6 pictures in no class's folder, in the folder" if whole else "2 pictures in .*, in train; not used: 2"
    for read in (resident, streamed, lambda root: survey(root, tmp_path / "cache")):
        with pytest.raises(UserError, match=f"all pictures are of one class, 'ant'\n.*; not used: {where}"):
            read(root)


def test_test_pictures_that_are_trained_on_are_told(tmp_path: Path) -> None:
    root = write(tmp_path / "x", train=6, test=2)
    assert survey(root, tmp_path / "cache").copies == 0
    for number, other in ((0, "ant"), (3, "bee")):
        shutil.copy(root / f"train/ant/{number}.png", root / f"test/{other}/copy{number}.png")
    shutil.copy(root / "test/ant/0.png", root / "test/ant/again.png")
    seen = survey(root, tmp_path / "cache")
    assert seen.copies == 2
    assert "test pictures that are training pictures too, which makes accuracies too high: 2" in seen.sentences()
    whole = write(tmp_path / "y", all=6)
    for name in ("a", "b"):
        shutil.copy(whole / "ant/0.png", whole / f"ant/{name}.png")
    assert "copies among them, so that some may be in both parts: 2" in survey(whole, tmp_path / "cache").sentences()


@BOTH
def test_pictures_below_their_class_and_of_all_usual_kinds_are_read(load: Loader, tmp_path: Path) -> None:
    root = write(tmp_path / "x")
    (deep := root / "train" / "bee" / "more" / "yet").mkdir(parents=True)
    for i, kind in enumerate(("tif", "TIFF", "gif", "ppm", "jfif", "webp", "bmp", "jpeg")):
        photo(32, 32, 100 + i).save(deep / f"x.{kind}", "JPEG" if kind == "jfif" else None)
    (root / "train" / "bee" / "notes.txt").write_text("no picture")
    (root / "train" / "bee" / ".hidden.png").write_text("none")
    assert counts(load(root)) == [[6, 14], [2, 2]]


@BOTH
def test_tiny_imagenet_as_it_is_unpacked(load: Loader, tmp_path: Path) -> None:
    root = write_tiny_imagenet(tmp_path / "tiny", ["n01", "n02"])
    assert [file.name for file in listing(root).files["test"]["n01"]] == ["val_0.JPEG", "val_2.JPEG"]
    data = load(root)
    assert data.classes == ("n01", "n02") and counts(data) == [[3, 3], [2, 2]]
    for line in ("val_0.JPEG n01", "x/../../../train/n01/images/n01_0.JPEG\tn01"):
        (root / "val" / "val_annotations.txt").write_text(f"{line}\n")
        with pytest.raises(UserError, match="not a line") as error:
            load(root)
        assert error.value.where == f"{root}/val/val_annotations.txt:1"


def test_a_corrected_list_of_classes_counts(tmp_path: Path) -> None:
    """Decoded images are kept, and their labels with them: they were those of the first list for ever."""
    root = write(tmp_path / "x", train=3)
    for i in range(2):
        (root / "val" / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (100 * i, 0, 0)).save(root / "val" / "images" / f"{i}.png")
    for classes in (("ant", "bee"), ("bee", "ant")):
        lines = (f"{i}.png\t{name}\t0\t0\t31\t31\n" for i, name in enumerate(classes))
        (root / "val" / "val_annotations.txt").write_text("".join(lines))
        data = resident(root)
        red = dict(zip(data.test_labels.tolist(), data.test_images[:, 0, 0, 0].tolist(), strict=True))
        assert {data.classes[label]: value // 100 for label, value in red.items()} == {
            c: i for i, c in enumerate(classes)
        }
        assert data.origin == "image folder (png)"


def test_of_a_folder_in_one_piece_a_fifth_of_each_class_is_held_out_whatever_files_are_called(tmp_path: Path) -> None:
    root = write(tmp_path / "x", all=10)
    first = resident(root), streamed(root)
    for number, file in enumerate(sorted(root.rglob("*.png"), reverse=True)):
        file.rename(file.with_name(f"_{number}.png"))
    again = resident(root), streamed(root)
    for one, other in zip(first, again, strict=True):
        assert counts(one) == counts(other) == [[8, 8], [2, 2]] and one.fingerprint == other.fingerprint
    held_out = {file.read_bytes() for file in again[1].test_files}
    assert len(held_out) == 4 and not held_out & {file.read_bytes() for file in again[1].train_files}


@BOTH
def test_names_in_two_forms_of_unicode_are_one_class(load: Loader, tmp_path: Path) -> None:
    root = write(tmp_path / "x")
    one, other = unicodedata.normalize("NFC", "guêpe"), unicodedata.normalize("NFD", "guêpe")
    (root / "train" / "bee").rename(root / "train" / one)
    (root / "test" / "bee").rename(root / "test" / other)
    assert load(root).classes == ("ant", one)
    (root / "train" / other).mkdir()
    with pytest.raises(UserError, match="two forms of Unicode"):
        load(root)


def put_damage(root: Path, what: str) -> Path:
    file = root / "train" / "bee" / "0.png"
    file.unlink()
    if what == "link to nothing":
        file.symlink_to("/nowhere/x.png")
    elif what == "pipe":
        os.mkfifo(file)
    elif what == "HEIC":
        file = file.with_suffix(".heic")
        file.write_bytes(b"x")
    elif what == "link to itself":
        file.symlink_to("0.png")
    elif what == "class that is a link to nothing":
        file = root / "train" / "cat"
        file.symlink_to("/nowhere")
    elif what == "control characters":
        file.with_name("a\x1b[31m.png").write_bytes(b"")
        file = file.parent
    elif what == "Latin-1":
        os.close(os.open(os.fsencode(file.parent) + b"/\xe9.png", os.O_CREAT))
        file = file.parent
    elif what == "link to a folder above":
        file = root / "train" / "bee" / "loop"
        file.symlink_to(root / "train" / "bee")
    elif what == "too large":
        Image.new("1", (20_000, 20_000)).save(file)
    elif what == "no picture":
        file.write_text("hello")
    elif what == "cut short":
        photo(32, 32, 1).save(file)
        os.truncate(file, 60)
    elif what == "16 bits":
        Image.fromarray(np.zeros((32, 32), dtype=np.uint16)).save(file)
    return file


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("link to nothing", "a link to nothing"),
        ("link to itself", "a link to nothing"),
        ("class that is a link to nothing", "a link to nothing"),
        ("control characters", r"control characters, or not in UTF-8: b'a\\x1b\[31m.png'"),
        ("Latin-1", r"control characters, or not in UTF-8: b'\\xe9.png'"),
        ("pipe", "not a regular file"),
        ("HEIC", r"end in \.heic are not read"),
        ("link to a folder above", "leads back"),
        ("too large", "more than 178 million pixels"),
        ("no picture", "damaged"),
        ("cut short", "damaged or cut short"),
        ("16 bits", "do not fit into bytes"),
    ],
)
def test_what_cannot_be_read_is_named_by_both_loaders_and_the_survey(what: str, said: str, tmp_path: Path) -> None:
    root = write(tmp_path / "x")
    file = put_damage(root, what)

    def decoded() -> None:
        for one in streamed(root).train_files:
            centred(picture(one), 32, 32)

    for read in (lambda: resident(root), decoded, lambda: survey(root, tmp_path / "cache")):
        with pytest.raises(UserError, match=said) as error:
            read()
        assert error.value.where == str(file) and error.value.hint


@pytest.mark.parametrize(
    ("folders", "said", "way"),
    [
        (("Train/a", "Train/b", "Test/a", "Test/b"), "is a split rather than a class", "'train' and 'test'"),
        (("training/a", "testing/a"), "is a split rather than a class", "'train' and 'test'"),
        (("x/train/a", "x/test/a"), "one folder below", "give '.*x'"),
        (("train/a", "train/b"), "no such folder", "beside 'train' there must be one of: test, val"),
        (("a", "b"), "there is one picture of class 'a'", "some of each class are held out"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_layout_that_would_be_misread_is_told(folders: tuple[str, ...], said: str, way: str, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    for place in folders:
        (root / place).mkdir(parents=True)
        photo(32, 32, 1).save(root / place / "1.png")
    for read in (resident, streamed, lambda root: survey(root, tmp_path / "cache")):
        with pytest.raises(UserError, match=said) as error:
            read(root)
        assert re.search(way, error.value.hint or "") and error.value.where.startswith(str(root))


@BOTH
@pytest.mark.parametrize("each, train, test", [(2, [1, 1], [1, 1]), (7, [5, 6], [2, 1])])
def test_of_few_pictures_in_one_piece_the_nearest_to_a_fifth_and_one_of_each_class_are_held_out(
    each: int, train: list[int], test: list[int], load: Loader, tmp_path: Path
) -> None:
    root = write(tmp_path / "x", all=each)
    (root / "__MACOSX").mkdir()
    (root / "ant" / "@eaDir").mkdir()
    photo(32, 32, 1).save(root / "ant" / "@eaDir" / "thumbnail.png")
    assert counts(load(root)) == [train, test]
    assert survey(root, tmp_path / "cache").total == {"train": sum(train), "test": sum(test)}


def test_a_disk_is_no_folder_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "x" / "usr" / "/".join("abcdefgh")).mkdir(parents=True)
    with pytest.raises(UserError, match="nested more than 6 deep"):
        survey(tmp_path / "x", tmp_path / "cache")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_data_make_no_picture_damaged(tmp_path: Path) -> None:
    root = write(tmp_path / "x")
    photo(32, 32, 50).save(root / "train" / "ant" / "exif.png", exif=b"Exif\0\0junk")
    seen = survey(root, tmp_path / "cache")
    assert (seen.total["train"], seen.turned) == (13, 0)


@BOTH
def test_a_class_of_another_spelling_is_told(load: Loader, tmp_path: Path) -> None:
    root = write(tmp_path / "x")
    (root / "test" / "bee").rename(root / "test" / "Bee ")
    with pytest.raises(UserError, match="no images of class") as error:
        load(root)
    assert "of another spelling" in str(error.value)


@pytest.mark.parametrize("kind", ["png", "bmp", "jpg", "gif", "tif", "webp", "ppm"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_pictures_of_every_kind_are_one_message(kind: str, tmp_path: Path) -> None:
    """Whatever a decoder raises: 60 damaged files of each kind give a picture or a message that names them."""
    photo(40, 30, 1).save(whole := tmp_path / f"whole.{kind}")
    file, draw, failed = tmp_path / f"x.{kind}", random.Random(kind), 0
    for _ in range(60):
        content = bytearray(whole.read_bytes())
        for _ in range(draw.choice((1, 4, 40))):
            content[draw.randrange(min(len(content), draw.choice((40, 4000))))] = draw.randrange(256)
        file.write_bytes(content[: draw.choice((len(content), draw.randrange(len(content))))])
        try:
            assert np.asarray(centred(picture(file), 32, 32)).shape == (32, 32, 3)
        except UserError as error:
            failed += 1
            assert error.where == str(file) and error.hint
    assert failed


def test_the_survey_of_images_of_one_size_measures_what_the_loader_gives(tmp_path: Path) -> None:
    root = write(tmp_path / "x", mode="L")
    for number, grey in enumerate(("1", "LA")):
        photo(32, 32, 50 + number).convert(grey).save(root / "train" / "ant" / f"{number}.png")
    seen = survey(root, tmp_path / "cache")
    data = folder.load([tmp_path], False, tmp_path / "cache", folder="x", channels=1)
    mean, deviation = moments(data.train_images)
    assert seen.card("x") == {
        "target": "kdbench.data.folder:load",
        "args": {"folder": "x", "channels": 1},
        "title": "x",
        "classes": 2,
        "channels": 1,
        "image_size": 32,
        "train": 12,
        "test": 4,
        "normalization": {"mean": [round(mean[0], 4)], "std": [round(deviation[0], 4)]},
    }


def test_the_survey_of_pictures_of_many_sizes_reads_them_while_training(tmp_path: Path) -> None:
    root = write(tmp_path / "x", sizes=[(96, 110), (130, 66), (300, 200)], all=10)
    turned = photo(80, 64, 5)
    turned.getexif()[0x0112] = 6
    turned.save(root / "bee" / "turned.jpg", exif=turned.getexif())
    photo(70, 90, 6).convert("L").save(root / "bee" / "grey.png")
    seen = survey(root, tmp_path / "cache")
    card = seen.card("x")
    assert card["streamed"] and card["image_size"] == 96 and card["args"] == {"folder": "x", "short_side": 110}
    assert card["channels"] == 3
    centres = [
        center_crop(resize(Image.open(file).convert("RGB"), 110), [96, 96])
        for c in ("ant", "bee")
        for file in (root / c).iterdir()
    ]
    mean, deviation = moments(torch.stack([as_bytes(image) for image in centres]))
    assert card["normalization"]["mean"] == pytest.approx(mean, abs=1e-4)
    assert card["normalization"]["std"] == pytest.approx(deviation, abs=1e-4)
    assert (card["train"], card["test"]) == (18, 4) and counts(streamed(root)) == [[8, 10], [2, 2]]
    said = "; ".join(seen.sentences())
    assert "a fifth" in said and "1 are to be turned" in said and "96×96" in said
    assert picture(root / "bee" / "turned.jpg").size == (80, 64)


def test_large_pictures_of_one_size_are_read_while_training_and_one_colour_is_divided_by_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, four = write(tmp_path / "x", train=1, test=1), 4 * 3 * 256**2
    for side, memory in ((256, four), (256, four - 1), (257, 1 << 30)):
        monkeypatch.setattr("kdbench.data.survey.MOST_IN_MEMORY", memory)
        for file in root.rglob("*.png"):
            Image.new("RGB", (side, side), (255, 0, 51)).save(file)
        seen = survey(root, tmp_path / f"cache_{side}_{memory}")
        assert seen.streamed == ((side, memory) != (256, four))
    assert seen.image_size == 224
    assert (seen.mean, seen.std) == ([1.0, 0.0, 0.2], [1.0, 1.0, 1.0])


def test_means_of_many_pictures_are_of_as_many_as_it_says_whoever_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20 training and 10 test pictures, every fifth training picture stands for all. `kdbench data`, which decodes
    all of them, and a recipe that names the folder get one card."""
    monkeypatch.setattr("kdbench.data.survey.SAMPLE", 4)
    root = write(tmp_path / "x", train=10, test=5)
    files = [file for c in ("ant", "bee") for file in sorted((root / "train" / c).iterdir())]
    pixels = np.stack([np.asarray(Image.open(file)) for file in files[::5]]) / 255
    for all_of_them in (False, True):
        seen = survey(root, tmp_path / f"cache_{all_of_them}", all_of_them)
        assert seen.mean == pytest.approx(pixels.mean(axis=(0, 1, 2)), abs=1e-4)
        assert seen.std == pytest.approx(pixels.std(axis=(0, 1, 2)), abs=1e-4)
    # A picture that stands for none is decoded where all are asked for, whatever was seen before.
    damaged = root / "train" / "ant" / "99.jpg"
    photo(32, 32, 99).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    survey(root, tmp_path / "cache")
    with pytest.raises(UserError, match="damaged"):
        survey(root, tmp_path / "cache", all_of_them=True)


RECIPE = {"student": "wrn_10_1", "protocol": "ab_official", "method": "ce", "steps": 2}


def test_a_folder_is_data_in_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDBENCH_HOME", str(tmp_path / "home"))
    write(tmp_path / "shapes")
    (other := tmp_path / "elsewhere").mkdir()
    write(other / "cifar10")
    monkeypatch.chdir(tmp_path)
    cells = {}
    for name in (str(tmp_path / "shapes"), "./shapes", "shapes", "elsewhere/cifar10"):
        planned = plan(RECIPE | {"data": {"name": name, "per_class": 2}}, Registry())
        assert any("12 training and 4 test pictures of 2 classes" in note for note in planned.notes)
        cells[name] = planned.cells[0].spec
    # Every cell knows where they are, however many there are.
    several = plan(RECIPE | {"data": "shapes", "compare": {"steps": [2, 3]}}, Registry())
    assert {cell.spec.data.root for cell in several.cells} == {str(tmp_path)} and len(several.cells) == 2
    first, *others, shipped = cells.values()
    assert (first.data.name, first.data.classes, first.data.train, first.data.per_class) == ("shapes", 2, 12, 2)
    assert {spec.identity() for spec in others} == {first.identity()}
    assert shipped.data.name == "my_cifar10" and shipped.data.options["folder"] == "cifar10"
    for name, said in (("./nothing", "there is no folder"), ("shapez", "unknown data set 'shapez'")):
        with pytest.raises(UserError, match=said):
            plan(RECIPE | {"data": name}, Registry())


def test_own_pictures_without_python(kdbench: Kdbench, tmp_path: Path) -> None:
    write(tmp_path / "shapes", sizes=[(40, 33), (64, 50)])
    (tmp_path / "my.yaml").write_text("data: shapes\n" + "".join(f"{k}: {v}\n" for k, v in RECIPE.items()))
    done = kdbench("run", "my.yaml", "compute=reference", "--jobs", "1")
    assert "12 training and 4 test pictures of 2 classes" in done.stderr
    (cell,) = (file.parent for file in (tmp_path / "runs" / "my").glob("*/record.json"))
    assert read_record(cell).data.class_names == ["ant", "bee"]
    done = kdbench("data", "shapes")
    assert (tmp_path / "cards" / "datasets" / "shapes.yaml").is_file(), done.stderr
    assert re.search(r"ant +6 +2", done.stdout)
    again = kdbench("run", "my.yaml", "compute=reference", "--registry", "cards", "--data", ".")
    assert "1 finished before" in again.stderr, again.stderr
    # What it says to use can be typed as it stands, whatever the folders are called.
    (tmp_path / "two words").mkdir()
    shutil.copytree(tmp_path / "shapes", tmp_path / "two words" / "shapes")
    told = kdbench("data", "two words/shapes", "--out", "my cards").stdout
    words = shlex.split(told.partition("kdbench run my.yaml ")[2])
    assert words[:4] == ["--registry", "my cards", "--data", str(tmp_path / "two words")]
    (tmp_path / "shapes" / "train" / "ant" / "0.png").write_bytes(b"x")
    (tmp_path / "shapes" / "train" / "bee" / "0.png").write_bytes(b"x")
    done = kdbench("data", "shapes", "--force", code=2)
    assert "ant/0.png" in done.stderr and "bee/0.png" in done.stderr


@pytest.mark.parametrize("name", ["2024", "1e3", "[new] ones"])
def test_what_is_said_to_use_can_be_written_as_it_stands(kdbench: Kdbench, tmp_path: Path, name: str) -> None:
    """A folder called after a year: 'data: 2024' is a number, which no data set is."""
    write(tmp_path / name, sizes=[(40, 33), (64, 50)])
    line = kdbench("data", name).stdout.partition("use it:")[2].partition("and   kdbench")[0].strip()
    recipe = Tree.parse(line, "recipe").data | RECIPE
    assert plan(recipe, Registry([tmp_path / "cards"])).cells[0].spec.data.name == name


def test_rectangular_images_are_refused_with_the_reason_and_the_way(tmp_path: Path) -> None:
    card = {
        "target": "kdbench.data.folder:load",
        "args": {"folder": "wide"},
        "title": "Wide",
        **{"classes": 2, "channels": 3, "train": 2, "test": 2},
        "normalization": {"mean": [0.5] * 3, "std": [0.25] * 3},
    }
    with pytest.raises(ValidationError, match="one number of pixels; images are square here"):
        DatasetCard.model_validate(card | {"image_size": [24, 48]})
    for split in ("train", "test"):
        for number in range(2):
            (tmp_path / "wide" / split / f"c{number}").mkdir(parents=True)
            photo(48, 24, number + 7 * len(split)).save(tmp_path / "wide" / split / f"c{number}" / "1.png")
    said = {key: value for key, value in card.items() if key not in ("args", "title")}
    spec = DataSpec(name="wide", options=card["args"], image_size=24, **said)
    with pytest.raises(UserError, match="24×48 for 'image_size'") as error:
        load_data(spec, [tmp_path], False, tmp_path / "cache")
    assert "images are square here" in (error.value.hint or "") and "streamed" in (error.value.hint or "")
