"""Data sets: every way of storing one gives the same tensors, and whatever is wrong with the files is said."""

from __future__ import annotations

import ast
import functools
import hashlib
import http.server
import io
import logging
import os
import pickle
import shutil
import socket
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from picture_files import moments
from PIL import Image

from kdbench.data import cifar, digits, folder, images
from kdbench.data.images import ImageData
from kdbench.errors import UserError

CARDS = yaml.safe_load((Path(__file__).parents[2] / "registry/datasets/image_sets.yaml").read_text(encoding="utf-8"))
SMALL = replace(cifar.CIFAR10, counts={"train": 100, "test": 20})
SMALL100 = replace(cifar.CIFAR100, counts={"train": 200, "test": 100})
Splits = dict[str, tuple[np.ndarray, np.ndarray]]


def splits_of(spec: cifar.Cifar, seed: int = 0) -> Splits:
    """Shuffled random images uint8 [N, 3, 32, 32] and labels, the same number of every class."""
    rng = np.random.default_rng(seed)
    result = {}
    for split, total in spec.counts.items():
        labels = rng.permutation(np.arange(total) % len(spec.classes))
        result[split] = rng.integers(0, 256, (total, 3, 32, 32), dtype=np.uint8), labels
    return result


protocol2 = functools.partial(pickle.dumps, protocol=2)


def write_batches(root: Path, spec: cifar.Cifar, data: Splits, dump: Callable[[dict], bytes] = protocol2) -> Path:
    place = root / spec.batches
    place.mkdir(parents=True)
    (place / spec.names[0]).write_bytes(dump({spec.names[1]: list(spec.classes)}))
    for split, files in spec.files.items():
        pixels, labels = data[split]
        for file, rows in zip(files, np.array_split(np.arange(len(labels)), len(files)), strict=True):
            batch = {"data": pixels[rows].reshape(-1, 3072), spec.labels: labels[rows].tolist()}
            (place / file).write_bytes(dump(batch))
    return place


def write_images(place: Path, spec: cifar.Cifar, data: Splits, suffix: str = "png", **how) -> Path:
    for split, (pixels, labels) in data.items():
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            file = place / split / spec.classes[label] / f"{i:04d}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(file, **how)
    return place


def python2_pickle(batch: dict) -> bytes:
    """A batch in the opcodes that Python 2 wrote: text as byte strings, numpy by its old module names."""

    def text(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    def integer(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    def value_of(value) -> bytes:
        if isinstance(value, str):
            return text(value.encode())
        if isinstance(value, list):
            return b"](" + b"".join(integer(v) if isinstance(v, int) else text(v.encode()) for v in value) + b"e"
        head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + integer(0) + b"\x85" + text(b"b") + b"tR("
        shape = integer(1) + integer(value.shape[0]) + integer(value.shape[1]) + b"\x86"
        dtype = b"cnumpy\ndtype\n(" + text(b"u1") + integer(0) + integer(1) + b"tR("
        dtype += integer(3) + text(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
        return head + shape + dtype + b"\x89" + text(value.tobytes()) + b"tb"

    return b"\x80\x02}(" + b"".join(text(k.encode()) + value_of(v) for k, v in batch.items()) + b"u."


def load(
    spec: cifar.Cifar,
    *roots: Path,
    cache: Path,
    download: bool = False,
    mirrors: tuple[str, ...] = (),
    fingerprint: str | None = None,
) -> ImageData:
    return cifar.load(spec, list(roots), download, cache, mirrors, fingerprint)


def same(a: ImageData, b: ImageData) -> bool:
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    return a.fingerprint == b.fingerprint and all(torch.equal(getattr(a, key), getattr(b, key)) for key in keys)


# --- canonical order and fingerprint


def test_canonical_order_is_by_label_then_pixel_bytes_as_unsigned_numbers():
    pixels = torch.tensor([[200, 0], [3, 255], [3, 4], [0, 0]], dtype=torch.uint8).view(4, 1, 1, 2)
    data = images.canonical("x", "ab", (pixels, torch.tensor([0, 0, 0, 1])), (pixels[:1], torch.tensor([0])), "here")
    assert data.train_images.flatten(1).tolist() == [[3, 4], [3, 255], [200, 0], [0, 0]]
    assert data.train_labels.tolist() == [0, 0, 0, 1]
    assert (data.classes, data.origin) == (("a", "b"), "here")


def test_fingerprint_is_the_documented_hash():
    pixels = torch.tensor([[7], [5]], dtype=torch.uint8).view(2, 1, 1, 1)
    data = images.canonical("x", "ab", (pixels, torch.tensor([1, 0])), (pixels[:1], torch.tensor([1])), "")
    one, zero = (1).to_bytes(8, "little"), bytes(8)
    by_hand = b"(2, 1, 1, 1)\n" + zero + one + bytes([5, 7]) + b"(1, 1, 1, 1)\n" + one + bytes([7])
    assert data.fingerprint == hashlib.sha256(by_hand).hexdigest()


# --- digits


@pytest.fixture(scope="module")
def digit_data() -> ImageData:
    return digits.load([], False, Path("unused"))


def test_digits_are_scikit_learns_and_the_levels_come_back(digit_data):
    from sklearn.datasets import load_digits

    raw = load_digits()
    both = torch.cat((digit_data.train_images, digit_data.test_images)).double()
    labels = torch.cat((digit_data.train_labels, digit_data.test_labels))
    levels = (both * 16 / 255).round()[:, 0]
    ours = sorted((int(y), tuple(x.flatten().tolist())) for x, y in zip(levels, labels, strict=True))
    theirs = sorted((int(y), tuple(x.flatten().tolist())) for x, y in zip(raw.images, raw.target, strict=True))
    assert ours == theirs
    assert digit_data.train_images.dtype == torch.uint8 and int(both.max()) == 255
    assert not Path("unused").exists()


def test_digits_split_is_a_stratified_third(digit_data):
    assert (digit_data.train_images.shape, digit_data.test_images.shape) == ((1198, 1, 8, 8), (599, 1, 8, 8))
    test = torch.bincount(digit_data.test_labels)
    every = test + torch.bincount(digit_data.train_labels)
    assert (test - every / 3).abs().max() < 1


def test_digits_do_not_depend_on_the_order_of_scikit_learn(digit_data, monkeypatch):
    import sklearn.datasets

    raw = sklearn.datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(raw.target))
    raw.images, raw.target = raw.images[order], raw.target[order]
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: raw)
    assert same(digits.load([], False, Path("unused")), digit_data)


def test_digits_card_says_what_the_data_are(digit_data):
    card = CARDS["digits"]
    mean, std = moments(digit_data.train_images)
    assert card["normalization"]["mean"] == pytest.approx(mean, abs=5e-6)
    assert card["normalization"]["std"] == pytest.approx(std, abs=5e-6)
    assert (card["train"], card["test"]) == (len(digit_data.train_labels), len(digit_data.test_labels))


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="scikit-learn, which is not installed"):
        digits.load([], False, Path("unused"))


def test_modules_load_neither_scikit_learn_nor_torchvision():
    for file in Path(images.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {"sklearn", "torchvision"} & {name.partition(".")[0] for name in names}, file


# --- CIFAR: all forms give the same


@pytest.fixture(scope="module")
def small() -> Splits:
    return splits_of(SMALL)


@pytest.fixture(scope="module")
def reference(small, tmp_path_factory) -> ImageData:
    root = tmp_path_factory.mktemp("reference")
    write_batches(root, SMALL, small)
    return load(SMALL, root, cache=root / "cache")


def test_batches_are_what_torchvision_reads(small, tmp_path, monkeypatch, reference):
    from torchvision.datasets import CIFAR10

    place = write_batches(tmp_path, SMALL, small)

    def with_md5(file: str) -> list[str]:
        return [file, hashlib.md5((place / file).read_bytes()).hexdigest()]

    monkeypatch.setattr(CIFAR10, "train_list", [with_md5(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [with_md5("test_batch")])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": with_md5("batches.meta")[1]})
    for train, ours, labels in (
        (True, reference.train_images, reference.train_labels),
        (False, reference.test_images, reference.test_labels),
    ):
        theirs = CIFAR10(str(tmp_path), train=train)
        pairs = sorted((y, x.transpose(2, 0, 1).tobytes()) for x, y in zip(theirs.data, theirs.targets, strict=True))
        assert [(int(y), x.numpy().tobytes()) for x, y in zip(ours, labels, strict=True)] == pairs
        assert tuple(theirs.classes) == reference.classes


@pytest.mark.parametrize("suffix, how", [("png", {}), ("webp", {"lossless": True}), ("bmp", {})])
def test_image_folder_gives_the_same_as_batches(small, tmp_path, reference, suffix, how):
    write_images(tmp_path / "cifar10", SMALL, small, suffix, **how)
    data = load(SMALL, tmp_path / "absent", tmp_path, cache=tmp_path / "cache")
    assert same(data, reference)
    assert data.origin == f"image folder ({suffix})"


def test_the_root_itself_may_be_either_form(small, tmp_path, reference):
    # What is in the cache comes last.
    write_batches(
        tmp_path / "cache", SMALL, {split: (255 - pixels, labels) for split, (pixels, labels) in small.items()}
    )
    batches = write_batches(tmp_path / "a", SMALL, small)
    pictures = write_images(tmp_path / "b" / "some name", SMALL, small)
    assert same(load(SMALL, batches, cache=tmp_path / "cache"), reference)
    assert same(load(SMALL, pictures, cache=tmp_path / "cache"), reference)


@pytest.mark.parametrize("dump", [python2_pickle, functools.partial(pickle.dumps, protocol=5)])
def test_batches_as_python_2_and_as_new_pickles_write_them(small, tmp_path, reference, dump):
    write_batches(tmp_path, SMALL, small, dump)
    assert same(load(SMALL, tmp_path, cache=tmp_path / "cache"), reference)


def test_labels_follow_the_class_names_not_their_numbers(small, tmp_path, reference):
    shuffled = replace(SMALL, classes=tuple(reversed(SMALL.classes)))
    renumbered = {split: (pixels, 9 - labels) for split, (pixels, labels) in small.items()}
    write_batches(tmp_path, shuffled, renumbered)
    assert same(load(SMALL, tmp_path, cache=tmp_path / "cache"), reference)


def test_cifar100_by_the_same_code(tmp_path):
    data = splits_of(SMALL100)
    write_batches(tmp_path / "a", SMALL100, data)
    write_images(tmp_path / "b" / "cifar100", SMALL100, data)
    first = load(SMALL100, tmp_path / "a", cache=tmp_path / "cache")
    assert same(first, load(SMALL100, tmp_path / "b", cache=tmp_path / "cache"))
    assert torch.equal(torch.bincount(first.train_labels), torch.full((100,), 2))
    assert first.classes == tuple(sorted(first.classes)) and len(set(first.classes)) == 100
    assert (first.classes[1], first.classes[47], first.classes[99]) == ("aquarium_fish", "maple_tree", "worm")


@pytest.mark.slow
def test_real_cifar10_is_what_its_card_says(tmp_path, cifar10_root):
    source, card = cifar10_root / "cifar10", CARDS["cifar10"]
    data = cifar.cifar10([source], False, tmp_path / "cache", **card["args"])
    assert data.fingerprint == card["args"]["fingerprint"] and data.origin == "image folder (webp)"
    mean, std = moments(data.train_images)
    assert card["normalization"] == {"mean": [round(m, 4) for m in mean], "std": [round(s, 4) for s in std]}
    assert (len(data.train_labels), len(data.test_labels)) == (card["train"], card["test"])
    pixels = {
        "train": (data.train_images.numpy(), data.train_labels.numpy()),
        "test": (data.test_images.numpy(), data.test_labels.numpy()),
    }
    write_batches(tmp_path / "b", cifar.CIFAR10, pixels)
    assert same(cifar.cifar10([tmp_path / "b"], False, tmp_path / "cache"), data)


# --- CIFAR: what can be wrong


def test_absent_and_not_downloaded_names_the_folders_and_the_ways_out(tmp_path):
    with pytest.raises(UserError) as error:
        load(SMALL, tmp_path / "one", tmp_path / "two", cache=tmp_path / "cache")
    for word in ("one", "two", "cifar-10-batches-py", "cifar-10-python.tar.gz", "data.root", "--data", "KDBENCH_DATA"):
        assert word in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_a_root_with_train_and_test_of_something_else_is_passed_over(small, tmp_path, reference):
    for split in ("train", "test"):
        (tmp_path / "other" / split / "zebra").mkdir(parents=True)
    write_batches(tmp_path, SMALL, small)
    assert same(load(SMALL, tmp_path / "other", tmp_path, cache=tmp_path / "cache"), reference)


def break_folder(place: Path, what: str) -> None:
    first = sorted((place / "train" / "cat").iterdir())[0]
    if what == "one image less":
        first.unlink()
    elif what == "one image more":
        shutil.copy(first, first.with_name("copy.png"))
    elif what == "a class less":
        (place / "test" / "truck").rename(place / "truck")
    elif what == "a class more":
        (place / "train" / "zebra").mkdir()
    elif what == "cut short":
        first.write_bytes(first.read_bytes()[:1500])
    elif what == "empty":
        first.write_bytes(b"")
    elif what == "other size":
        Image.new("RGB", (31, 32)).save(first)
    elif what == "16 bits":
        Image.fromarray(np.zeros((32, 32), dtype=np.uint16)).save(first)


@pytest.mark.parametrize(
    "what, message",
    [
        ("one image less", "train/cat: 9 images instead of 10"),
        ("one image more", "train/cat: 11 images instead of 10"),
        ("a class less", "test: .*missing: truck"),
        ("a class more", "train: .*not of this set: zebra"),
        ("cut short", "train/cat/.*png: .*cut short"),
        ("empty", "train/cat/.*png: .*damaged"),
        ("other size", "train/cat/.*png: .*32x31 pixels instead of 32x32"),
        ("16 bits", "train/cat/.*png: .*do not fit into bytes"),
    ],
)
def test_broken_image_folder(small, tmp_path, what, message):
    place = write_images(tmp_path / "cifar10", SMALL, small)
    break_folder(place, what)
    with pytest.raises(UserError, match=message):
        load(SMALL, tmp_path, cache=tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


class Harmful:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize(
    "what, message",
    [
        ("file missing", "data_batch_3 missing"),
        ("cut short", "test_batch: .*damaged or cut short"),
        ("no labels", "data_batch_2: the file has no 'labels'"),
        ("other shape", "data_batch_2: not a batch"),
        ("label out of range", "data_batch_2: labels outside 0 … 9"),
        ("fewer images", "train: .* images of class"),
        ("fewer images than labels", "data_batch_2: not a batch"),
        ("other names", "batches.meta: the class names are not those of cifar10"),
        ("harmful", "data_batch_2: .*mkdir"),
    ],
)
def test_broken_batches(small, tmp_path, what, message):
    place = write_batches(tmp_path, SMALL, small)
    second = place / "data_batch_2"
    batch = pickle.loads(second.read_bytes())
    if what == "file missing":
        (place / "data_batch_3").unlink()
    elif what == "cut short":
        (place / "test_batch").write_bytes((place / "test_batch").read_bytes()[:5000])
    elif what == "other names":
        (place / "batches.meta").write_bytes(pickle.dumps({"label_names": [*SMALL.classes[:9], "zebra"]}))
    else:
        if what == "no labels":
            del batch["labels"]
        elif what == "other shape":
            batch["data"] = batch["data"][:, :100]
        elif what == "label out of range":
            batch["labels"][0] = 10
        elif what == "fewer images":
            batch = {"data": batch["data"][1:], "labels": batch["labels"][1:]}
        elif what == "fewer images than labels":
            batch["data"] = batch["data"][1:]
        elif what == "harmful":
            batch["more"] = Harmful(tmp_path / "harm")
        second.write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(UserError, match=message):
        load(SMALL, tmp_path, cache=tmp_path / "cache")
    assert not (tmp_path / "harm").exists()


def test_lossy_images_are_warned_of_once_and_recorded(small, tmp_path, reference, caplog):
    write_images(tmp_path / "cifar10", SMALL, small, "jpg")
    with caplog.at_level(logging.WARNING, logger="kdbench"):
        data = [load(SMALL, tmp_path, cache=tmp_path / "cache", fingerprint=reference.fingerprint) for _ in range(2)]
    assert sum("not the published data set" in r.message for r in caplog.records) == 1
    assert all("not the published images" in d.origin and "(jpg)" in d.origin for d in data)
    assert data[0].fingerprint == data[1].fingerprint != reference.fingerprint


def test_expected_fingerprint_is_silent(small, tmp_path, reference, caplog):
    write_batches(tmp_path, SMALL, small)
    data = load(SMALL, tmp_path, cache=tmp_path / "cache", fingerprint=reference.fingerprint)
    assert data.origin == "pickled batches (cifar-10-batches-py)" and not caplog.records


# --- the official archive: in a root, and downloaded


@pytest.fixture
def archive(small, tmp_path, monkeypatch) -> Path:
    """A small archive that torchvision's constants describe; its official address leads nowhere."""
    from torchvision.datasets import CIFAR10

    place = write_batches(tmp_path / "packed", SMALL, small)
    file = tmp_path / "served" / CIFAR10.filename
    file.parent.mkdir()
    with tarfile.open(file, "w:gz") as tar:
        tar.add(place, SMALL.batches)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(file.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.delenv("KDBENCH_CIFAR_MIRROR", raising=False)
    return file


@pytest.fixture
def server(tmp_path) -> Iterator[tuple[str, list[str]]]:
    """Address of a web server for tmp_path, and the paths asked of it."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None:
            if self.command == "GET":
                asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path)) as site:
        thread = threading.Thread(target=site.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{site.server_port}", asked
        site.shutdown()
        thread.join()


def test_archive_in_a_root_is_unpacked_into_the_cache(archive, tmp_path, reference):
    cache = tmp_path / "cache"
    assert same(load(SMALL, archive.parent, cache=cache), reference)
    assert (cache / "cifar-10-batches-py" / "test_batch").is_file()
    assert [p.name for p in archive.parent.iterdir()] == [archive.name]
    archive.unlink()
    assert same(load(SMALL, archive.parent, cache=cache), reference)


def test_damaged_archive_in_a_root(archive, tmp_path):
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(UserError, match="tar.gz: the archive is damaged"):
        load(SMALL, archive.parent, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_mirrors_are_tried_in_order_and_must_have_the_checksum(archive, server, tmp_path, reference, monkeypatch):
    address, asked = server
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / archive.name).write_bytes(b"something else")
    monkeypatch.setenv("KDBENCH_CIFAR_MIRROR", f"{address}/bad")
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", f"{address}/official/{archive.name}")
    mirrors = (f"{address}/absent/{archive.name}", f"{address}/served/{archive.name}", f"{address}/never")
    cache = tmp_path / "cache"
    assert same(load(SMALL, cache=cache, download=True, mirrors=mirrors), reference)
    assert list(dict.fromkeys(asked)) == [f"/{p}/{archive.name}" for p in ("bad", "official", "absent", "served")]
    assert sorted(p.suffix for p in cache.iterdir()) == ["", ".safetensors"]
    asked.clear()
    assert same(load(SMALL, cache=cache, download=True), reference)
    assert not asked


@pytest.mark.parametrize(
    "value, expected",
    [
        ("", []),
        ("http://host/a/", ["http://host/a/x.tar.gz"]),
        ("http://host/x.tar.gz", ["http://host/x.tar.gz"]),
        ("http://host/y.tar.gz", []),
    ],
)
def test_own_mirror_is_an_archive_or_its_folder(monkeypatch, value, expected):
    monkeypatch.setenv("KDBENCH_CIFAR_MIRROR", value)
    assert cifar._own_mirror("x.tar.gz") == expected


def test_no_address_answers(archive, tmp_path):
    mirror = "http://127.0.0.1:9/mirror/cifar-10-python.tar.gz"
    with pytest.raises(UserError) as error:
        load(SMALL, tmp_path / "one", cache=tmp_path / "cache", download=True, mirrors=(mirror,))
    for word in ("could not be downloaded", "http://127.0.0.1:9/cifar", mirror, "one", "KDBENCH_DATA", "CIFAR_MIRROR"):
        assert word in str(error.value)
    assert not list((tmp_path / "cache").iterdir())


def test_a_server_that_says_nothing_is_not_waited_for(archive, tmp_path, monkeypatch):
    limits = []

    def silent(*_):
        limits.append(socket.getdefaulttimeout())
        raise TimeoutError("timed out")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", silent)
    with pytest.raises(UserError, match="could not be downloaded"):
        load(SMALL, cache=tmp_path / "cache", download=True)
    assert limits == [30.0] and socket.getdefaulttimeout() is None


# --- the cache of decoded images


@pytest.fixture
def kept(small, tmp_path) -> tuple[Path, ImageData, Path]:
    """An image folder that was loaded once: its root, the data, the cache file."""
    write_images(tmp_path / "cifar10", SMALL, small)
    data = load(SMALL, tmp_path, cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    return tmp_path, data, file


def test_second_load_decodes_nothing_and_maps_the_file(kept, monkeypatch):
    root, data, file = kept
    monkeypatch.setattr(folder, "decode", None)
    again = load(SMALL, root, cache=root / "cache")
    assert same(again, data) and again.origin == data.origin and again.classes == data.classes
    assert file.name.startswith("cifar10-") and file.suffix == ".safetensors"
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(file) in maps.read_text()


@pytest.mark.parametrize("damage", ["cut short", "header", "one byte", "empty"])
def test_damaged_cache_is_built_anew(kept, damage, caplog):
    root, data, file = kept
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[-1000 if damage == "one byte" else 20] ^= 1
    broken = {"cut short": whole[:-5000], "header": b"\xff" * 8 + whole[8:], "one byte": bytes(changed), "empty": b""}
    file.write_bytes(broken[damage])
    assert same(load(SMALL, root, cache=root / "cache"), data)
    assert "damaged" in caplog.text
    caplog.clear()
    assert same(load(SMALL, root, cache=root / "cache"), data)
    assert not caplog.records and [p.name for p in (root / "cache").iterdir()] == [file.name]


def test_changed_image_is_seen(kept):
    root, data, _ = kept
    image = sorted((root / "cifar10" / "train" / "dog").iterdir())[0]
    stamp = image.stat()
    Image.new("RGB", (32, 32), (1, 2, 3)).save(image)
    os.utime(image, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    changed = load(SMALL, root, cache=root / "cache")
    assert not torch.equal(changed.train_images, data.train_images)
    assert torch.equal(changed.test_images, data.test_images)


def test_cache_that_cannot_be_written_is_only_a_warning(kept, caplog):
    root, data, file = kept
    assert same(load(SMALL, root, cache=file / "below a file"), data)
    assert "could not be kept" in caplog.text


def test_failed_write_leaves_nothing(kept, monkeypatch):
    root, data, file = kept
    file.unlink()

    def full_disk(tensors: dict, path: Path, metadata: dict) -> None:
        assert path != file and path.parent == file.parent
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images, "save_file", full_disk)
    assert same(load(SMALL, root, cache=root / "cache"), data)
    assert not list((root / "cache").iterdir())


# --- image folders of one's own


def write_shapes(place: Path, size: tuple[int, int] = (6, 5), mode: str = "L") -> None:
    for value, name in enumerate(("square", "circle", "arrow")):
        for split, count in (("train", 3), ("test", 1)):
            (place / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new(mode, size, 10 * value + i).save(place / split / name / f"{i}.png")


def test_image_folder_of_ones_own(tmp_path):
    write_shapes(tmp_path / "shapes")
    (tmp_path / "shapes" / "train" / "arrow" / "notes.txt").write_text("no image")
    (tmp_path / "shapes" / "train" / ".thumbnails").mkdir()
    data = folder.load([tmp_path], False, tmp_path / "cache", folder="shapes", channels=1)
    assert data.name == "shapes" and data.classes == ("arrow", "circle", "square")
    assert data.train_images.shape == (9, 1, 5, 6) and data.test_images.shape == (3, 1, 5, 6)
    assert data.train_images[:, 0, 0, 0].tolist() == [20, 21, 22, 10, 11, 12, 0, 1, 2]
    coloured = folder.load([tmp_path / "shapes"], False, tmp_path / "cache", folder="shapes")
    assert torch.equal(coloured.train_images, data.train_images.expand(9, 3, 5, 6))


def test_image_folder_transposes_to_channels_rows_columns(tmp_path):
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "x" / place).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "x" / place / "0.bmp")
    data = folder.load([tmp_path], False, tmp_path / "cache", folder="x")
    assert data.train_images[0].tolist() == pixels.transpose(2, 0, 1).tolist()


@pytest.mark.parametrize(
    "what, message",
    [
        ("absent", "there is no image folder 'shapes'\n.*shapes/.*KDBENCH_DATA"),
        ("other size", "x.png: .*9x6 pixels in"),
        ("class without test", "test: no images of class 'new'"),
        ("no classes", "train: no class folders"),
    ],
)
def test_broken_image_folder_of_ones_own(tmp_path, what, message):
    if what == "no classes":
        for split in ("train", "test"):
            (tmp_path / "shapes" / split).mkdir(parents=True)
    elif what != "absent":
        write_shapes(tmp_path / "shapes")
    if what == "other size":
        Image.new("L", (6, 9)).save(tmp_path / "shapes" / "test" / "square" / "x.png")
    elif what == "class without test":
        (tmp_path / "shapes" / "train" / "new").mkdir()
        Image.new("L", (6, 5)).save(tmp_path / "shapes" / "train" / "new" / "x.png")
    with pytest.raises(UserError, match=f"(?s){message}"):
        folder.load([tmp_path], False, tmp_path / "cache", folder="shapes", channels=1)


def test_decode_keeps_the_order_of_many_files(tmp_path):
    files = []
    for i in range(600):
        buffer = io.BytesIO()
        Image.new("L", (1, 1), i % 251).save(buffer, "png")
        files.append(tmp_path / f"{i}.png")
        files[-1].write_bytes(buffer.getvalue())
    assert folder.decode(files, 1, (1, 1)).flatten().tolist() == [i % 251 for i in range(600)]
