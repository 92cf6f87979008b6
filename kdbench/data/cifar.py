"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), from pickled batches or image folders: the same tensors either way."""

import contextlib
import http.client
import logging
import os
import pickle
import socket
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdbench.data.folder import read
from kdbench.data.images import ImageData, cached, canonical, checked
from kdbench.data.listing import Listing, listing, not_found
from kdbench.errors import UserError, counted, listed
from kdbench.files import workplace

logger = logging.getLogger("kdbench")

_CLASSES_10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CLASSES_100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
_SECONDS = 30.0  # without a byte from a server before the next one is tried


@dataclass(frozen=True)
class Cifar:
    """One of the two sets.

    Attributes:
        batches: folder that the official archive unpacks to.
        files: split -> pickled files in it.
        names: (file, key) of the class names, in the order of the labels.
        labels: key of the labels in the pickled files.
        classes: names in official order, which is alphabetical.
        counts: split -> number of images, the same for every class.
    """

    name: str
    batches: str
    files: dict[str, tuple[str, ...]]
    names: tuple[str, str]
    labels: str
    classes: tuple[str, ...]
    counts: dict[str, int] = field(default_factory=lambda: {"train": 50_000, "test": 10_000})


CIFAR10 = Cifar(
    name="cifar10",
    batches="cifar-10-batches-py",
    files={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
    names=("batches.meta", "label_names"),
    labels="labels",
    classes=tuple(_CLASSES_10.split()),
)

CIFAR100 = Cifar(
    name="cifar100",
    batches="cifar-100-python",
    files={"train": ("train",), "test": ("test",)},
    names=("meta", "fine_label_names"),
    labels="fine_labels",
    classes=tuple(_CLASSES_100.split()),
)


def cifar10(
    roots: list[Path], download: bool, cache: Path, *, mirrors: tuple[str, ...] = (), fingerprint: str | None = None
) -> ImageData:
    """CIFAR-10: 50,000 + 10,000 images [3, 32, 32], 10 classes. Arguments and errors: see `load`."""
    return load(CIFAR10, roots, download, cache, mirrors, fingerprint)


def cifar100(
    roots: list[Path], download: bool, cache: Path, *, mirrors: tuple[str, ...] = (), fingerprint: str | None = None
) -> ImageData:
    """CIFAR-100 with its 100 fine labels: 50,000 + 10,000 images [3, 32, 32]. Arguments and errors: see `load`."""
    return load(CIFAR100, roots, download, cache, mirrors, fingerprint)


def load(
    cifar: Cifar, roots: list[Path], download: bool, cache: Path, mirrors: tuple[str, ...], fingerprint: str | None
) -> ImageData:
    """Read one of the sets.

    Every root is searched, in order, for the batches folder, an image folder `<name>/{train,test}/<class>/*`, either of
    the two as the root itself, and the official archive. What is found first must be whole. Then the archive is
    downloaded, if allowed, and unpacked into `cache`.

    Args:
        roots: folders to search; the cache is searched last.
        download: whether the network may be used.
        cache: folder for the decoded images and what is downloaded.
        mirrors: addresses of the official archive, tried after the official one. One in the environment variable
            KDBENCH_CIFAR_MIRROR (the archive itself or the folder that has it) is tried first. All must have the
            official checksum.
        fingerprint: what the published images give. Another one is a warning, and recorded in `origin`.

    Raises:
        UserError: no data; wrong classes or counts; a damaged file. It says where and what to do.
    """
    for root in [*roots, cache]:
        source = _find(cifar, root) or _archived(cifar, root, cache)
        if source is not None:
            return checked(_read(cifar, source, cache), fingerprint)
    if not download:
        raise UserError(
            f"{cifar.name} was not found, and downloading it is not allowed", hint=not_found(roots, _wanted(cifar))
        )
    return checked(_read(cifar, _download(cifar, roots, cache, mirrors), cache), fingerprint)


def _wanted(cifar: Cifar) -> str:
    return f"{cifar.batches}/, {cifar.name}/{{train,test}}/<class>/* or {_archive(cifar)[1]}"


def _find(cifar: Cifar, root: Path) -> Path | None:
    """The folder in a root, or the root itself, that holds this set in whatever form."""
    if _is_batches(cifar, root / cifar.batches):
        return root / cifar.batches
    if any((root / cifar.name / split).is_dir() for split in cifar.files):
        return root / cifar.name
    if _is_batches(cifar, root):
        return root
    # A root may have {train,test} of something else.
    if any((root / split / name).is_dir() for split in cifar.files for name in cifar.classes):
        return root
    return None


def _is_batches(cifar: Cifar, folder: Path) -> bool:
    return any((folder / file).is_file() for files in cifar.files.values() for file in files)


def _read(cifar: Cifar, source: Path, cache: Path) -> ImageData:
    if _is_batches(cifar, source):
        files = [source / file for files in (*cifar.files.values(), (cifar.names[0],)) for file in files]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise _broken(f"{', '.join(missing)} missing", source)
        stamps = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return cached(lambda: _from_batches(cifar, source), cache, cifar.name, stamps, "batches")
    found = listing(source)
    _check_listing(cifar, found)
    return cached(lambda: read(found, cifar.name, 3, (32, 32)), cache, cifar.name, found.stamps, "images")


def _check_listing(cifar: Cifar, found: Listing) -> None:
    again = "unpack the data set again"
    for split, total in cifar.counts.items():
        here, classes = str(found.root / split), found.files[split]
        odd = {"missing": {*cifar.classes} - {*classes}, "not of this set": {*classes} - {*cifar.classes}}
        if problems := [f"{what}: {listed(sorted(names), 10)}" for what, names in odd.items() if names]:
            what = f"the class folders are not those of {cifar.name} ({'; '.join(problems)})"
            raise UserError(what, where=here, hint=f"{again}, all parts of it")
        each = total // len(cifar.classes)
        for name, files in classes.items():
            if len(files) != each:
                raise UserError(f"{counted(len(files), 'image')} instead of {each}", where=f"{here}/{name}", hint=again)


def _from_batches(cifar: Cifar, folder: Path) -> ImageData:
    names_file = folder / cifar.names[0]
    names = _unpickled(names_file, cifar.names[1])
    if not isinstance(names, list) or sorted(names) != list(cifar.classes):
        raise _broken(f"the class names are not those of {cifar.name}", names_file)
    to_label = torch.tensor([cifar.classes.index(name) for name in names])
    parts = {}
    for split, total in cifar.counts.items():
        images, labels = zip(*(_batch(cifar, folder / file) for file in cifar.files[split]), strict=True)
        parts[split] = torch.cat(images), to_label[torch.cat(labels)]
        counts = torch.bincount(parts[split][1], minlength=len(cifar.classes))
        each = total // len(cifar.classes)
        if (counts != each).any():
            c = int((counts != each).nonzero()[0])
            raise _broken(
                f"{split}: {counted(int(counts[c]), 'image')} of class '{cifar.classes[c]}' instead of {each}", folder
            )
    return canonical(cifar.name, cifar.classes, parts["train"], parts["test"], f"pickled batches ({cifar.batches})")


def _batch(cifar: Cifar, file: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 [n, 3, 32, 32] and the file's labels [n]."""
    data, labels = _unpickled(file, "data"), _unpickled(file, cifar.labels)
    whole = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072
    if not whole or not isinstance(labels, list) or len(labels) != len(data):
        raise _broken("not a batch of 32x32 images and their labels", file)
    numbers = torch.tensor(labels, dtype=torch.int64)
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(cifar.classes):
        raise _broken(f"labels outside 0 … {len(cifar.classes) - 1}", file)
    return torch.from_numpy(np.ascontiguousarray(data)).view(-1, 3, 32, 32), numbers


class _ArraysOnly(pickle.Unpickler):
    """A pickle can run code when it is read; this reads numpy arrays and plain values and refuses the rest."""

    _KNOWN = {
        ("_codecs", "encode"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        *(
            (f"numpy.{core}.{module}", name)
            for core in ("core", "_core")
            for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
        ),
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def _unpickled(file: Path, key: str) -> Any:
    try:
        with file.open("rb") as stream:
            return _ArraysOnly(stream, encoding="latin1").load()[key]
    except (KeyError, TypeError):
        raise _broken(f"the file has no '{key}'", file) from None
    except Exception as error:  # noqa: BLE001 - a damaged file can fail in any way inside the unpickler
        raise _broken(f"the file is damaged or cut short ({error})", file) from None


def _broken(what: str, where: Path) -> UserError:
    return UserError(what, where=str(where), hint="unpack the archive again")


def _archive(cifar: Cifar) -> tuple[str, str, str]:
    """Address, file name and MD5 checksum of the official archive, as torchvision has them."""
    from torchvision import datasets

    official = getattr(datasets, cifar.name.upper())
    return official.url, official.filename, official.tgz_md5


def _archived(cifar: Cifar, root: Path, cache: Path) -> Path | None:
    """Unpack an official archive that lies in a root."""
    from torchvision.datasets.utils import check_integrity

    _, file_name, md5 = _archive(cifar)
    file = root / file_name
    if not file.is_file():
        return None
    if not check_integrity(str(file), md5):
        hint = "download it again, or remove it"
        raise UserError("the archive is damaged: it does not have the official checksum", str(file), hint)
    return _unpack(cifar, file, cache)


def _unpack(cifar: Cifar, archive: Path, cache: Path) -> Path:
    """Unpack into the cache, whole or not at all."""
    target = cache / cifar.batches
    if _is_batches(cifar, target):
        return target
    try:
        with workplace(target) as temporary:
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
            os.replace(temporary / cifar.batches, target)
    except (OSError, tarfile.TarError) as error:
        # Another process may have been first.
        if not _is_batches(cifar, target):
            hint = "make room or permissions there, or choose another cache folder"
            raise UserError(f"the archive cannot be unpacked: {error}", str(target), hint) from None
    return target


def _download(cifar: Cifar, roots: Iterable[Path], cache: Path, mirrors: tuple[str, ...]) -> Path:
    from torchvision.datasets.utils import download_url

    official, file_name, md5 = _archive(cifar)
    failures = []
    for url in [*_own_mirror(file_name), official, *mirrors]:
        try:
            with workplace(cache / file_name) as temporary:
                with _patience():
                    download_url(url, str(temporary), file_name, md5)
                return _unpack(cifar, temporary / file_name, cache)
        except (OSError, http.client.HTTPException, RuntimeError, ValueError) as error:
            failures.append(f"{url}: {error}")
            logger.warning("%s could not be downloaded from %s (%s)", cifar.name, url, error)
    tried = "\n  ".join(failures)
    raise UserError(
        f"{cifar.name} was not found and could not be downloaded",
        hint=f"{tried}\n  {not_found(roots, _wanted(cifar))}\n"
        "  Or name a copy of the archive: environment variable KDBENCH_CIFAR_MIRROR.",
    )


def _own_mirror(file_name: str) -> list[str]:
    url = os.environ.get("KDBENCH_CIFAR_MIRROR", "").strip()
    if not url:
        return []
    if url.endswith(".tar.gz"):
        return [url] if url.endswith(f"/{file_name}") else []
    return [f"{url.rstrip('/')}/{file_name}"]


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """A limit on silence: torchvision's download waits for ever for a network that drops packets."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
