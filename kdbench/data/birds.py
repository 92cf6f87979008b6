"""Caltech-UCSD Birds-200-2011 (Wah et al. 2011): 200 classes, 5,994 training and 5,794 test pictures."""

from pathlib import Path

from kdbench.data.listing import list_lines
from kdbench.data.pictures import Pictures, from_folders, gather, official_or_folders
from kdbench.errors import UserError

TABLES = ("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt")
_NAMES = ("CUB_200_2011", "cub200")
_AGAIN = "unpack the archive again"


def load(roots: list[Path], download: bool, cache: Path, *, short_side: int = 256) -> Pictures:
    """The official split of the whole pictures, without their bounding boxes.

    A folder `cub200/{train,test}/<class>/*` is taken as well. Nothing is downloaded.

    Args:
        roots: searched for the folder CUB_200_2011 that the archive unpacks to (images/ and its tables).
        cache: folder for the files' sums.
        short_side: pixels to which the shorter side of a test picture is brought.

    Raises:
        UserError: no data, tables that do not fit each other, a picture that is not there.
    """
    wanted = "CUB_200_2011/{images/, images.txt, …} or cub200/{train,test}/<class>/*"
    place, official = official_or_folders(
        roots, _NAMES, lambda root: (root / "images.txt").is_file(), "CUB-200-2011 was not found", wanted
    )
    if not official:
        return from_folders(place, "cub200", cache, short_side)
    names, pictures, labels, split = (_table(place / name) for name in TABLES)
    if not pictures.keys() == labels.keys() == split.keys() or not set(labels.values()) <= names.keys():
        raise UserError("its tables do not list the same pictures and classes", str(place), "unpack it again")
    order = sorted(names, key=int)
    parts: dict[str, list[tuple[Path, int]]] = {"1": [], "0": []}
    for number, name in pictures.items():
        if split[number] not in parts or ".." in name:
            raise UserError(f"picture {number} belongs to no split", str(place / TABLES[3]), "unpack it again")
        parts[split[number]].append((place / "images" / name, order.index(labels[number])))
    classes = [names[number] for number in order]
    return gather("cub200", classes, parts["1"], parts["0"], cache, short_side, "official split (train_test_split.txt)")


def _table(file: Path) -> dict[str, str]:
    """Number -> text of a file of lines "number text"."""
    rows: dict[str, str] = {}
    for line, where in list_lines(file, _AGAIN):
        match line.split(maxsplit=1):
            case [number, text] if number.isdecimal():
                rows[number] = text
            case _:
                raise UserError("not a line 'number text'", where=where, hint=_AGAIN)
    return rows
