"""What a folder of pictures holds, and the data card that this makes. Imports no torch."""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kdbench.data.listing import Listing, centred, converted, held_out, listing, opened, pixels
from kdbench.errors import UserError, counted
from kdbench.files import cores, sha256_of_data, write_summed
from kdbench.reading import plain_name, read_summed

# Bytes of decoded images that are kept in memory at most, and pictures that stand for all others in means.
MOST_IN_MEMORY, SAMPLE = 1 << 30, 4000
LARGEST_SIDE = 256
# Sides of images that pictures of many sizes are brought to, and what torchvision tests ImageNet's 224 from.
SIDES, SHORT_SIDE = (32, 64, 96, 128, 160, 192, 224), 256 / 224
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Survey:
    """A sound folder of pictures.

    Attributes:
        counts: split -> class -> pictures. sizes: smallest, middle and largest height and width.
        modes: Pillow's word for the kind of pixels -> pictures. kinds: endings of files.
        unused, loose: as of a listing.
        copies: test pictures that are training pictures too, byte for byte; of a folder in one piece, pictures that are
            copies of others. None where there was too much to read.
        turned: pictures whose EXIF data say that they are to be turned, which is not done.
        channels, image_size, streamed, mean, std: as the card says.
    """

    counts: dict[str, dict[str, int]]
    sizes: list[tuple[int, int]]
    modes: dict[str, int]
    kinds: list[str]
    unused: list[str]
    loose: list[str]
    copies: int | None
    turned: int
    channels: int
    image_size: int
    streamed: bool
    mean: list[float]
    std: list[float]

    @property
    def total(self) -> dict[str, int]:
        """Split -> pictures, after a fifth of a folder in one piece is held out."""
        found = {split: sum(by_class.values()) for split, by_class in self.counts.items()}
        if "all" not in found:
            return found
        test = held_out(found["all"], len(self.counts["all"]))
        return {"train": found["all"] - test, "test": test}

    def card(self, folder: str) -> dict[str, Any]:
        """The data card of such a folder, found below a data folder."""
        args: dict[str, Any] = {"folder": folder}
        if self.streamed:
            args["short_side"] = round(SHORT_SIDE * self.image_size)
        else:
            args["channels"] = self.channels
        return {
            "target": f"kdbench.data.{'pictures' if self.streamed else 'folder'}:load",
            "args": args,
            "title": folder,
            "classes": len(next(iter(self.counts.values()))),
            "channels": self.channels,
            "image_size": self.image_size,
            **self.total,
            "normalization": {"mean": self.mean, "std": self.std},
            **({"streamed": True} if self.streamed else {}),
        }

    def sentences(self) -> list[str]:
        """What was taken, and how."""
        total, classes = self.total, len(next(iter(self.counts.values())))
        small, middle, large = (f"{width}×{height}" for height, width in self.sizes)
        said = [
            f"{total['train']} training and {counted(total['test'], 'test picture')} of {counted(classes, 'class')}"
        ]
        if "all" in self.counts:
            said.append("there is no folder 'train': a fifth of each class is held out for testing")
        if self.unused:
            said.append(f"not used: {', '.join(self.unused)}")
        if self.copies and "all" in self.counts:
            said.append(f"copies among them, so that some may be in both parts: {self.copies}")
        elif self.copies:
            said.append(f"test pictures that are training pictures too, which makes accuracies too high: {self.copies}")
        said.append(
            f"all pictures have {small} pixels"
            if small == large
            else f"pictures have {small} to {large} pixels, {middle} in the middle"
        )
        if self.streamed:
            said.append(f"they are read while training, and brought to {self.image_size}×{self.image_size} pixels")
        if self.turned:
            said.append(f"{self.turned} are to be turned by their EXIF data, which is not done: save them upright")
        todo = "put those of a class into a folder named after it, or move them away"
        return said + [f"warning: not used: {one}: {todo}" for one in self.loose]


def folder_name(folder: Path) -> str:
    """What a folder's data set is called. UserError for what no data set can be called."""
    try:
        return plain_name(folder.resolve().name)
    except ValueError as error:
        raise UserError(f"data sets are called after their folder: {error}", str(folder), "rename the folder") from None


def survey(
    folder: Path, cache: Path, all_of_them: bool = False, tell: Callable[[str], None] = lambda text: None
) -> Survey:
    """Look at a folder of pictures; what was seen is kept while no file changes.

    Args:
        all_of_them: decode every picture, to find damaged ones. Otherwise as many as means need.
        tell: is told of damaged pictures.

    Raises:
        UserError: no folder, no classes, or pictures that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder '{folder}'", hint="give a folder of pictures in folders of their classes")
    found = listing(folder, in_one=True).complete()
    digest = sha256_of_data(["4", found.stamps, found.unused, found.loose])
    kept = cache / f"survey-{digest[:32]}.json"
    if kept.is_file() and not all_of_them:
        with contextlib.suppress(UserError):
            return read_summed(Survey, kept)
    seen = _look(found, all_of_them, tell)
    with contextlib.suppress(OSError):  # It only saves time.
        write_summed(kept, asdict(seen))
    return seen


def _look(found: Listing, all_of_them: bool, tell: Callable[[str], None]) -> Survey:
    files = [file for by_class in found.files.values() for files in by_class.values() for file in files]
    with ThreadPoolExecutor(cores()) as pool:
        heads = _sound(files, list(pool.map(_tried(_head), files)), tell)
        sizes = sorted((height, width) for height, width, _, _ in heads)
        modes = Counter(mode for _, _, mode, _ in heads)
        channels = 1 if modes.keys() <= {"1", "L", "LA"} else 3
        height, width = sizes[0]
        alike = sizes[0] == sizes[-1] and height == width <= LARGEST_SIDE
        streamed = not alike or len(files) * height * width * channels > MOST_IN_MEMORY
        side = height if alike else _side(sizes)
        measured = _evenly([file for by_class in next(iter(found.files.values())).values() for file in by_class])
        chosen, used = files if all_of_them else measured, set(measured)

        def histograms(file: Path) -> np.ndarray:
            if not streamed:
                values = pixels(file, channels, (height, width))
            else:
                with opened(file) as image:
                    values = np.asarray(centred(converted(image, channels, file), round(SHORT_SIDE * side), side))
            return np.stack([np.bincount(v.ravel(), minlength=256) for v in values.reshape(-1, channels).T])

        counts = _sound(chosen, list(pool.map(_tried(histograms), chosen)), tell)
    total = sum(count for file, count in zip(chosen, counts, strict=True) if file in used)
    values = np.arange(256) / 255
    share = np.asarray(total) / np.asarray(total).sum(axis=1, keepdims=True)
    mean = share @ values
    std = np.sqrt(np.maximum(share @ values**2 - mean**2, 0))
    return Survey(
        counts={split: {c: len(files) for c, files in by_class.items()} for split, by_class in found.files.items()},
        sizes=[sizes[0], sizes[len(sizes) // 2], sizes[-1]],
        modes=dict(modes.most_common()),
        kinds=found.kinds,
        unused=found.unused,
        loose=found.loose,
        copies=_copies(found) if all_of_them or sum(size for _, size, _ in found.stamps) <= MOST_IN_MEMORY else None,
        turned=sum(turned for *_, turned in heads),
        channels=channels,
        image_size=side,
        streamed=streamed,
        mean=[round(float(value), 4) for value in mean],
        # Of pictures of one colour nothing is divided.
        std=[round(float(value), 4) if value > 0.002 else 1.0 for value in std],
    )


def _copies(found: Listing) -> int:
    """Test pictures that are training pictures too; of a folder in one piece, pictures that are copies of others."""
    parts = [[file for files in by_class.values() for file in files] for by_class in found.files.values()]
    sizes = Counter(size for _, size, _ in found.stamps)

    def content(file: Path) -> str:
        # What no other has the size of is no copy.
        return hashlib.sha256(file.read_bytes()).hexdigest() if sizes[file.stat().st_size] > 1 else str(file)

    with ThreadPoolExecutor(cores()) as pool:
        first, *second = (list(pool.map(content, part)) for part in parts)
    known = {*first}
    return sum(one in known for one in second[0]) if second else len(first) - len(known)


def _head(file: Path) -> tuple[int, int, str, bool]:
    with opened(file) as image:
        return image.height, image.width, image.mode, _turned(image, file)


def _turned(image: Image.Image, file: Path) -> bool:
    """Whether the picture is to be turned by its EXIF data. UserError for a picture that is damaged."""
    try:
        return image.getexif().get(_ORIENTATION, 1) not in (0, 1)
    except Exception:  # noqa: BLE001 - EXIF data lie behind a PNG's pixels, and damaged ones can fail in any way
        converted(image, 3, file)  # A sound picture is used, whatever its EXIF data are.
        return False


def _tried(action: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """What an action gives, or the error that it raises."""

    def attempt(file: Path) -> Any:
        try:
            return action(file)
        except UserError as error:
            return error

    return attempt


def _sound(files: list[Path], results: list[Any], tell: Callable[[str], None]) -> list[Any]:
    """Results of which none is an error. The first error is raised, after all were told."""
    errors = [result for result in results if isinstance(result, UserError)]
    for error in errors[1:]:
        tell(str(error).splitlines()[0])
    if errors:
        more = f" (and {counted(len(errors) - 1, 'other damaged file')})" if errors[1:] else ""
        raise UserError(f"{errors[0].what}{more}", errors[0].where, errors[0].hint)
    return results


def _evenly(files: list[Path]) -> list[Path]:
    return files[:: max(1, -(-len(files) // SAMPLE))]


def _side(sizes: list[tuple[int, int]]) -> int:
    """The largest usual side that half of the pictures have."""
    shorter = sorted(min(size) for size in sizes)[len(sizes) // 2]
    return max([side for side in SIDES if side <= shorter], default=SIDES[0])
