"""Picture sets of several domains with the same classes: Office-31 and ImageCLEF-DA.

Neither has a split. As in the papers of domain adaptation, all pictures of a domain are its training part (the source
with labels, the target without) and all are its test part.
"""

from pathlib import Path
from typing import Literal

from kdbench.data.listing import SUFFIXES, class_folders, find, list_lines, not_found
from kdbench.data.pictures import Pictures, gather
from kdbench.errors import UserError, counted

_OFFICE = ("office31", "domain_adaptation_images", "Original_images", "office")
_CLEF = ("image_CLEF", "imageclef", "image-clef")
_CLASSES = {"office31": 31, "imageclef": 12}


def office31(
    roots: list[Path],
    download: bool,
    cache: Path,
    *,
    domain: Literal["amazon", "dslr", "webcam"],
    short_side: int = 256,
) -> Pictures:
    """A domain of Office-31 (Saenko et al. 2010): `<folder>/<domain>/images/<class>/*`, or without `images/`.

    Args:
        roots: searched for the folder of all domains (office31, or as archives call it). Nothing is downloaded.
        cache: folder for the files' sums.
        short_side: pixels to which the shorter side of a test picture is brought.

    Raises:
        UserError: no data, or another number of classes than 31.
    """
    place = find(roots, _OFFICE, lambda root: (root / domain).is_dir())
    if place is None:
        raise UserError(
            f"Office-31 ({domain}) was not found", hint=not_found(roots, f"office31/{domain}/images/<class>/*")
        )
    inner = place / domain / "images"
    return _of_folders(inner if inner.is_dir() else place / domain, "office31", domain, cache, short_side)


def imageclef(
    roots: list[Path], download: bool, cache: Path, *, domain: Literal["b", "c", "i", "p"], short_side: int = 256
) -> Pictures:
    """A domain of ImageCLEF-DA (2014): pictures that a list names, or folders of classes.

    A list is `<folder>/list/<domain>List.txt` of lines "<picture below folder> <number of its class>"; without one,
    `<folder>/<domain>/<class>/*` is read.

    Args:
        roots: searched for the folder of all domains (image_CLEF). Nothing is downloaded.
        cache: folder for the files' sums.
        domain: b (Bing), c (Caltech-256), i (ImageNet ILSVRC 2012), or p (Pascal VOC 2012).
        short_side: pixels to which the shorter side of a test picture is brought.

    Raises:
        UserError: no data, a line that is none, or another number of classes than 12.
    """
    place = find(roots, _CLEF, lambda root: (root / domain).is_dir())
    if place is None:
        wanted = f"image_CLEF/{{list/{domain}List.txt, {domain}/*}} or image_CLEF/{domain}/<class>/*"
        raise UserError(f"ImageCLEF-DA ({domain}) was not found", hint=not_found(roots, wanted))
    file = place / "list" / f"{domain}List.txt"
    if not file.is_file():
        return _of_folders(place / domain, "imageclef", domain, cache, short_side)
    pictures = []
    for line, where in list_lines(file, "unpack it again"):
        match line.split():
            case [name, label] if label.isdecimal() and ".." not in name:
                pictures.append((place / name.lstrip("/"), int(label)))
            case _:
                raise UserError("not a line '<picture> <class>'", where=where, hint="unpack it again")
    if {label for _, label in pictures} != set(range(_CLASSES["imageclef"])):
        raise UserError("the classes in it are not 0 to 11", where=str(file), hint="unpack it again")
    classes = [str(label) for label in range(_CLASSES["imageclef"])]
    return gather(f"imageclef_{domain}", classes, pictures, pictures, cache, short_side, f"list ({file.name})")


def _of_folders(root: Path, data: str, domain: str, cache: Path, short_side: int) -> Pictures:
    found = class_folders(root)
    empty = [name for name, files in found.items() if not files]
    if len(found) != _CLASSES[data] or empty:
        without = f", {empty[0]} without pictures" if empty else ""
        what = f"{counted(len(found), 'class folder')}{without}, not {_CLASSES[data]}"
        raise UserError(what, str(root), f"pictures end in {', '.join(SUFFIXES)}")
    pictures = [(file, label) for label, files in enumerate(found.values()) for file in files]
    return gather(f"{data}_{domain}", found, pictures, pictures, cache, short_side, "picture folder")
