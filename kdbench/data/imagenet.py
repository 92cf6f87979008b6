"""ImageNet-1k and Tiny ImageNet in the layouts in which people have them."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from kdbench.data.folder import read
from kdbench.data.images import ImageData, cached
from kdbench.data.listing import class_folders, class_names, find_folder, listing, picture_files
from kdbench.errors import UserError, counted, listed

DEVKIT, TRUTH, META = "ILSVRC2012_devkit_t12", "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_DATA = f"{DEVKIT}/data"
_WANTED = f"{_DATA}/ (or {DEVKIT}.tar.gz), torchvision's meta.bin, or Kaggle's LOC_val_solution.csv"


def splits(root: Path, subset: bool) -> tuple[list[str], list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Classes, and (file, label) of training and validation pictures; labels follow the synsets' numbers, as
    torchvision's do.

    `train/<synset>/*` and `val/<synset>/*`; or the validation pictures flat in `val/`, with what the devkit says.

    Args:
        subset: whether some of the 1,000 classes are enough.

    Raises:
        UserError: classes that are not ImageNet's, or are missing; validation pictures of which nothing is said.
    """
    train = class_folders(root / "train")
    checked(train, subset, root / "train")
    val = root / "val"
    tested = class_folders(val) if class_names(val) else flat(val, root)
    if missing := sorted(train.keys() ^ tested.keys()):
        what = f"{counted(len(missing), 'class')} in only one of 'train' and 'val': {listed(missing, 5)}"
        raise UserError(what, str(root), "unpack both archives again, or remove these folders")
    classes = sorted(train)
    for folder, by_class in ((root / "train", train), (val, tested)):
        if empty := [name for name in classes if not by_class[name]]:
            raise UserError(f"no pictures of {listed(empty, 5)}", where=str(folder), hint="unpack the archive again")
    train_files, val_files = (
        [(file, label) for label, name in enumerate(classes) for file in by_class[name]] for by_class in (train, tested)
    )
    return classes, train_files, val_files


def checked(found: Iterable[str], subset: bool, where: Path) -> None:
    """Raises UserError where classes are not the 1,000 of ImageNet-1k, or (`subset`) some of them."""
    from timm.data.imagenet_info import ImageNetInfo

    known = set(ImageNetInfo("imagenet-1k").label_names())
    names = set(found)
    if strange := sorted(names - known):
        what = f"{counted(len(strange), 'class folder')} of no class of ImageNet-1k: {listed(strange, 5)}"
        hint = "folders must be named by synsets, for example 'n01440764'; for other pictures write 'data: FOLDER'"
        raise UserError(what, str(where), hint)
    if not subset and (missing := sorted(known - names)):
        raise UserError(
            f"{len(missing)} of ImageNet's 1,000 classes are missing: {listed(missing, 5)}",
            where=str(where),
            hint="unpack all of them; of a subset make a card of your own: 'include: imagenet', its numbers of classes "
            "and pictures, and 'args: {folder: FOLDER, official: imagenet_subset}'",
        )


def flat(val: Path, root: Path) -> dict[str, list[Path]]:
    """Validation pictures that lie in one folder, by the classes that belong to their numbers."""
    files = sorted(picture_files(val))
    of = truth(root)
    if of is None:
        what = f"{counted(len(files), 'validation picture')} in no class folder, and no file that names the classes"
        raise UserError(what, str(val), f"put beside 'val' one of: {_WANTED}; or sort them into folders")
    names = [file.stem for file in files]
    if isinstance(of, list):
        if len(of) != len(files):
            what = f"{counted(len(files), 'validation picture')}, and classes of {len(of)}"
            raise UserError(what, where=str(val), hint="unpack it again")
        of = dict(zip(names, of, strict=True))
    if unknown := [name for name in names if name not in of]:
        raise UserError(f"nothing says the class of '{unknown[0]}'", where=str(val), hint="unpack it again")
    found: dict[str, list[Path]] = {}
    for file, name in zip(files, names, strict=True):
        found.setdefault(of[name], []).append(file)
    return found


def truth(root: Path) -> list[str] | dict[str, str] | None:
    """Synsets of the validation pictures, in their order or by their names; None where nothing is said."""
    archive, folder = root / f"{DEVKIT}.tar.gz", root / _DATA
    kaggle, kept = root / "LOC_val_solution.csv", root / "meta.bin"
    try:
        if folder.is_dir():
            return _of_devkit((folder / META).read_bytes(), (folder / TRUTH).read_text())
        if archive.is_file():
            with tarfile.open(archive) as tar:
                meta, lines = (tar.extractfile(f"{_DATA}/{name}") for name in (META, TRUTH))
                assert meta is not None and lines is not None
                return _of_devkit(meta.read(), lines.read().decode())
        if kaggle.is_file():
            rows = [line.split(",") for line in kaggle.read_text().splitlines()[1:] if line.strip()]
            return {name: boxes.split()[0] for name, boxes in rows}
        if kept.is_file():
            return [str(name) for name in torch.load(kept, weights_only=True)[1]]
    except Exception as error:  # noqa: BLE001 - a damaged file can fail in any way inside its reader
        what = f"the validation pictures' classes cannot be read: {error or type(error).__name__}"
        raise UserError(what, str(root), f"get one of these again: {_WANTED}") from None
    return None


def _of_devkit(meta: bytes, lines: str) -> list[str]:
    """The devkit numbers classes in an order of its own; groups of classes have children."""
    from scipy.io import loadmat

    synsets: Any = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    numbers = {int(row[0]): str(row[1]) for row in synsets if int(row[4]) == 0}
    return [numbers[int(line)] for line in lines.split()]


def tiny(roots: list[Path], download: bool, cache: Path, *, folder: str = "tiny-imagenet-200") -> ImageData:
    """Tiny ImageNet as unpacked (`train/<synset>/images/*`, `val/images/*` with `val_annotations.txt`, `wnids.txt`), or
    with its validation pictures sorted into folders. Labels follow the synsets' numbers.

    Args:
        roots: searched for the folder. download: not used, there is nowhere to download from.
        cache: folder for the decoded images.

    Raises:
        UserError: no such folder, classes that are not those of `wnids.txt`, pictures of other sizes.
    """
    found = listing(find_folder(roots, folder)).complete()
    names = found.root / "wnids.txt"
    if names.is_file() and (other := sorted({*names.read_text().split()} ^ {*found.classes})):
        what = f"{counted(len(other), 'class')} in only one of wnids.txt and 'train': {listed(other, 5)}"
        raise UserError(what, str(names), "unpack the archive again")
    return cached(lambda: read(found, folder, 3), cache, folder, found.stamps, "3 channels")
