"""Pictures in folders of their classes: where they lie, and what of a folder is read. Imports no torch.

`<folder>/{train,test}/<class>/**`, or `<folder>/<class>/**` in one piece. Pictures may lie in folders below their
class's. `val`, `valid` and `validation` are taken for `test`, and so is a split whose pictures a file
`<split>_annotations.txt` names (Tiny ImageNet's).
"""

from __future__ import annotations

import contextlib
import os
import stat
import unicodedata
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from kdbench.errors import UserError, counted, listed

# What is read, and endings of pictures that are not.
SUFFIXES = (
    *(".webp", ".png", ".bmp", ".jpg", ".jpeg", ".jfif", ".jpe", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
)
NOT_READ = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".raw", ".dng", ".cr2", ".nef", ".arw")
# Endings of lists that may say which class a picture has. Folders say it here.
LISTS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xls", ".xlsx")
# What the test split's folder may be called, and what no class is called.
TEST_FOLDERS = ("test", "val", "valid", "validation")
SPLITS = ("train", "training", "testing", *TEST_FOLDERS)
# Folders that systems leave behind, with pictures of their own.
_OF_SYSTEMS = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN"}
# Levels of folders below a class: whoever names a whole disk is told soon.
DEEPEST = 6
# Share of a folder in one piece that is held out for testing.
HELD_OUT = 0.2

# These name no file, and say nothing that concerns us.
warnings.filterwarnings("ignore", "Palette images with Transparency")
warnings.filterwarnings("ignore", "Corrupt EXIF data")
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

_MODES = {3: "RGB", 1: "L"}
_READABLE = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}


@dataclass(frozen=True)
class Listing:
    """What a folder holds, before any picture is opened.

    Attributes:
        files: split -> class -> picture files, both sorted by name. One split "all" where it is in one piece.
        folders: split -> its folder.
        unused: folders beside these with pictures of such classes, or called as a test split is; lists that may hold
            classes.
        loose: pictures in no class's folder, in words.
        stamps: (path below the folder, bytes, modification time in ns) of every picture, and of lists of their classes.
    """

    root: Path
    files: dict[str, dict[str, list[Path]]]
    folders: dict[str, Path]
    stamps: list[tuple[str, int, int]]
    unused: list[str]
    loose: list[str]

    @property
    def classes(self) -> list[str]:
        return sorted({name for classes in self.files.values() for name in classes})

    @property
    def kinds(self) -> list[str]:
        """File types, without the dot."""
        names = (file.name for by_class in self.files.values() for files in by_class.values() for file in files)
        return sorted({os.path.splitext(name)[1][1:].lower() for name in names})

    def complete(self) -> Listing:
        """This listing, if every split has pictures of every class, of two at least. UserError says what is missing."""
        for split, by_class in self.files.items():
            where = str(self.folders[split])
            if not self.folders[split].is_dir():
                hint = f"beside 'train' there must be one of: {', '.join(TEST_FOLDERS)}"
                raise UserError("there is no such folder", where, hint)
            if not self.classes:
                raise UserError("no class folders", where, "put pictures into folders named after their class")
            if empty := [name for name in self.classes if not by_class.get(name)]:
                like = {_plain(name): name for name in by_class}
                others = [f"'{like[_plain(name)]}'" for name in empty if _plain(name) in like and name not in by_class]
                spelling = f"there is {', '.join(others)}, of another spelling"
                hint = spelling if others else f"images end in {', '.join(SUFFIXES[:5])}, or the like"
                raise UserError(f"no images of class {listed([repr(name) for name in empty], 10)}", where, hint)
            if split == "all" and (alone := [name for name, files in by_class.items() if len(files) < 2]):
                hint = "some of each class are held out for testing: remove the class, or add pictures"
                raise UserError(f"there is one picture of class '{alone[0]}'", where, hint)
        if len(self.classes) == 1:
            hint = "; not used: ".join(["put those of every class into a folder of their own", *self.loose])
            raise UserError(f"all pictures are of one class, '{self.classes[0]}'", str(self.root), hint)
        return self


def listing(root: Path, in_one: bool = False) -> Listing:
    """List a folder. Hidden files and files that are no pictures are left out.

    Args:
        in_one: whether its folders are classes, where there is none for training.

    Raises:
        UserError: a link to nothing, a file that is none, a picture of a kind that is not read; it is named.
    """
    unused: list[str] = []
    if in_one and not (root / "train").is_dir():
        folders = {"all": root}
        for name in class_names(root):
            if name.casefold() in SPLITS:
                what = f"'{name}' is a split rather than a class"
                raise UserError(what, str(root), "call the two folders 'train' and 'test'")
            if name not in TEST_FOLDERS and (root / name / "train").is_dir():
                raise UserError("the pictures are one folder below", str(root), f"give '{root / name}'")
    else:
        train = class_names(root / "train")
        tests = [root / name for name in TEST_FOLDERS if (root / name).is_dir()]
        own = [test for test in tests if _annotated(test) or train & class_names(test)]
        folders = {"train": root / "train", "test": [*own, *tests, root / "test"][0]}
        unused = _beside(root, train, {folder.name for folder in folders.values()})
    every = dict.fromkeys((root, *folders.values()))
    unused += [found for folder in every for found in _lists(folder, root)]
    loose = [found for folder in every for found in _loose(folder, root)]
    files = {split: class_folders(folder) for split, folder in folders.items()}
    found = [file for by_class in files.values() for images in by_class.values() for file in images]
    lists = [_list(folder) for folder in folders.values() if _annotated(folder) is not None]
    stats = [(file, file.stat()) for file in (*found, *lists)]
    stamps = [(file.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns) for file, status in stats]
    return Listing(root, files, folders, stamps, unused, loose)


def _beside(root: Path, classes: set[str], taken: set[str]) -> list[str]:
    """Folders that look like a split and are none that is taken."""
    found = []
    for place in sorted(root.iterdir()) if root.is_dir() else []:
        with contextlib.suppress(OSError):  # What is not used need not be readable.
            names = {unicodedata.normalize("NFC", name) for name in os.listdir(place)} if place.is_dir() else set()
            if place.name not in taken and names and (place.name in TEST_FOLDERS or names & classes):
                found.append(place.name)
    return found


def _lists(folder: Path, root: Path) -> list[str]:
    """Lists that lie in a folder and may be thought to say classes."""
    with contextlib.suppress(UserError):  # What is not used need not be readable.
        files = sorted(place for place in entries(folder) if place.suffix.lower() in LISTS and place.is_file())
        return [f"{file.relative_to(root).as_posix()} (classes are those of the folders)" for file in files]
    return []


def _loose(folder: Path, root: Path) -> list[str]:
    """Pictures that lie in a folder, beside those of its classes."""
    with contextlib.suppress(UserError):  # What is not used need not be readable.
        where = folder.relative_to(root).as_posix() if folder != root else "the folder itself"
        pictures = picture_files(folder)
        return [f"{counted(len(pictures), 'picture')} in no class's folder, in {where}"] if pictures else []
    return []


def find(roots: Iterable[Path], names: Collection[str], holds: Callable[[Path], bool]) -> Path | None:
    """The first folder that holds what is wanted: one of these names below a root, or the root itself.

    Args:
        holds: called with a folder, says whether it is the wanted one.
    """
    for root in roots:
        for place in (*(root / name for name in names), *([root] if root.name in names else [])):
            if holds(place):
                return place
    return None


def find_folder(roots: Sequence[Path], folder: str) -> Path:
    """The folder of that name below a root, or the root of that name. UserError where there is none with pictures."""
    place = find(roots, [folder], lambda place: bool(class_names(place)))
    if place is not None:
        return place
    wanted = f"{folder}/{{train,test}}/<class>/* or {folder}/<class>/*"
    here = "\n  There is one in this folder: give '--data .'" if Path(folder).is_dir() else ""
    raise UserError(f"there is no image folder '{folder}'", hint=not_found(roots, wanted) + here)


def held_out(pictures: int, classes: int) -> int:
    """Test pictures of so many in one piece: a fifth, but one of each class at least."""
    return max(round(HELD_OUT * pictures), classes)


def in_folders(root: Path) -> bool:
    """Whether a folder holds one for training and one for testing."""
    return (root / "train").is_dir() and any((root / name).is_dir() for name in TEST_FOLDERS)


def class_names(split: Path) -> set[str]:
    return {unicodedata.normalize("NFC", name) for name in _folders(split)}


def class_folders(split: Path) -> dict[str, list[Path]]:
    """Images of a folder by the names of its folders, which are classes, in composed Unicode; both sorted."""
    if (named := _annotated(split)) is not None:
        return named
    found: dict[str, Path] = {}
    for name in sorted(_folders(split)):
        composed = unicodedata.normalize("NFC", name)
        if composed in found:
            what = f"two class folders are called '{composed}', in two forms of Unicode"
            raise UserError(what, where=str(split), hint="move their pictures into one of them")
        found[composed] = split / name
    return {name: sorted(_pictures(found[name], ())) for name in sorted(found)}


def entries(folder: Path) -> list[Path]:
    """What is in a folder, without hidden files; nothing where there is no such folder.

    Raises:
        UserError: a folder that cannot be read, or a name that no file and no terminal can show.
    """
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(".") and name not in _OF_SYSTEMS]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"the folder cannot be read: {error.strerror}", where=str(folder)) from None
    for name in names:
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
            what = f"a name with control characters, or not in UTF-8: {os.fsencode(name)!r}"
            raise UserError(what, where=str(folder), hint="rename it")
    return [folder / name for name in names]


def _folders(split: Path) -> list[str]:
    """Names of the folders in a folder. UserError for a link to nothing."""
    found = entries(split)
    for place in found:
        if not os.path.exists(place):
            _regular(place)
    return [place.name for place in found if os.path.isdir(place)]


def _pictures(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """Pictures in a folder and those below it."""
    real = os.path.realpath(folder)
    if len(above) > DEEPEST:
        what = f"folders below a class are nested more than {DEEPEST} deep"
        raise UserError(what, where=str(folder), hint="give a folder of pictures in folders of their classes")
    if real in above:
        raise UserError("a link that leads back to a folder above it", where=str(folder), hint="remove the link")
    for file in entries(folder):
        name = file.name.lower()
        if os.path.isdir(file):
            yield from _pictures(file, (*above, real))
        elif name.endswith(NOT_READ):
            hint = "convert them to PNG or JPEG, or move them away"
            raise UserError(f"pictures that end in {file.suffix} are not read", where=str(file), hint=hint)
        elif name.endswith(SUFFIXES):
            yield _regular(file)


def _regular(file: Path) -> Path:
    """The file, if it is one that can be read. Another kind (a pipe) would be waited for."""
    try:
        regular = stat.S_ISREG(file.stat().st_mode)
    except OSError as error:
        what = "a link to nothing" if file.is_symlink() else f"it cannot be read: {error.strerror}"
        raise UserError(what, where=str(file), hint="restore the picture, or remove this link") from None
    if not regular:
        raise UserError("this is not a regular file", where=str(file), hint="remove it")
    return file


def picture_files(folder: Path) -> list[Path]:
    """Pictures that lie in a folder itself."""
    return [file for file in entries(folder) if os.path.isfile(file) and file.name.lower().endswith(SUFFIXES)]


def _list(split: Path) -> Path:
    """The file that may say which class the pictures of a split have."""
    return split / f"{split.name}_annotations.txt"


def _annotated(split: Path) -> dict[str, list[Path]] | None:
    """Images by the classes that `<split>_annotations.txt` gives them, a line "file<tab>class…" each; None without."""
    file = _list(split)
    if not file.is_file() or not (split / "images").is_dir():
        # Scripts that sort the pictures into folders leave the list behind.
        return None
    found: dict[str, list[Path]] = {}
    for line, where in list_lines(file, "unpack it again"):
        name, tab, rest = line.partition("\t")
        if not tab or "/" in name or "\\" in name or name.startswith("."):
            raise UserError("not a line 'file<tab>class'", where=where, hint="unpack it again")
        found.setdefault(rest.partition("\t")[0].strip(), []).append(_regular(split / "images" / name))
    return {name: sorted(found[name]) for name in sorted(found)}


def list_lines(file: Path, hint: str) -> list[tuple[str, str]]:
    """Lines of a text file that lists pictures, each with its place (file:number); empty ones are left out.

    Args:
        hint: for a file that cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the list cannot be read: {error}", where=str(file), hint=hint) from None
    return [(line.strip(), f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _plain(name: str) -> str:
    """A name without what the eye may miss."""
    return unicodedata.normalize("NFKC", name).casefold().strip()


def opened(file: Path) -> Image.Image:
    """An image file, its header read. UserError for what is no image."""
    try:
        return Image.open(file)
    except Exception as error:  # noqa: BLE001 - a damaged header can fail in any way inside a decoder
        raise damaged(file, error) from None


def converted(image: Image.Image, channels: int, file: Path) -> Image.Image:
    """An image decoded to RGB (3 channels) or grey (1), as it is stored: not turned as its EXIF data may say.

    Raises:
        UserError: pixels that do not fit into bytes, or a file that is cut short; it is named.
    """
    if image.mode not in _READABLE:
        what = f"the image has pixels of type '{image.mode}', which do not fit into bytes"
        raise UserError(what, where=str(file), hint="save it with 8 bits a channel")
    try:
        image.load()
        return image if image.mode == _MODES[channels] else image.convert(_MODES[channels])
    except Exception as error:  # noqa: BLE001 - as above
        raise damaged(file, error) from None


def damaged(file: Path, error: Exception) -> UserError:
    """What is said of a file that cannot be decoded."""
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        what = f"the image has more than {most} million pixels, or a damaged header"
        return UserError(what, str(file), "make it smaller, or remove it")
    if isinstance(error, PermissionError | IsADirectoryError | FileNotFoundError):
        return UserError(f"the image cannot be read: {error.strerror}", str(file), "correct this, or remove the file")
    what = str(error) or type(error).__name__
    return UserError(f"the image is damaged or cut short ({what})", where=str(file), hint="copy or unpack it again")


def pixels(file: Path, channels: int, size: tuple[int, int]) -> np.ndarray:
    """An image's bytes [height, width, channels]. UserError where it has another size than (height, width)."""
    with opened(file) as image:
        if (image.height, image.width) != size:
            what = f"the image has {image.height}x{image.width} pixels instead of {size[0]}x{size[1]}"
            raise UserError(what, where=str(file), hint="all images of a data set have one size")
        return np.asarray(converted(image, channels, file)).reshape(*size, channels)


def centred(image: Image.Image, short_side: int, size: int) -> Image.Image:
    """The picture with its shorter side brought to `short_side`, and of it the middle, size × size.

    Pictures of which less than `size` pixels are left in a direction are padded with zeros there.
    """
    width, height = image.size
    width, height = (
        (short_side, int(short_side * height / width))
        if width <= height
        else (int(short_side * width / height), short_side)
    )
    image = image.resize((max(width, 1), max(height, 1)), Image.Resampling.BILINEAR)
    left, top = _offset(width, size), _offset(height, size)
    # PIL fills with zeros what lies outside.
    return image.crop((left, top, left + size, top + size))


def _offset(length: int, size: int) -> int:
    """Where the middle begins; outside the picture where it is the smaller one."""
    return -((size - length) // 2) if length < size else round((length - size) / 2.0)


def not_found(roots: Iterable[Path], wanted: str) -> str:
    """The hint for data that no root has: what was looked for, where, and how to point kdbench to it."""
    tried = ", ".join(str(root) for root in roots) or "no folder is set"
    return (
        f"looked for {wanted}\n  in: {tried}\n"
        "  Say where the data are: recipe key `data.root`, option `--data DIR`, or the environment's KDBENCH_DATA."
    )
