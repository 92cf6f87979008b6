"""Made images on disk: a folder that grows batch by batch, each whole or absent, each with how it was made.

`pool.json` says what the batches have in common, `batch_00000.safetensors` holds images (float16 pixel values on the
scale of [0, 1], which they may leave), labels, and what else belongs to them, `batch_00000.json` its sha256, final
terms, seconds and machine. A batch counts once its JSON file is there. `grid.png` shows some of the images.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdbench.errors import UserError
from kdbench.files import atomic, sha256_of, sha256_of_data, sweep, write_json
from kdbench.forms import Open
from kdbench.reading import read_as, read_json

# Images on a side of the picture.
SIDE = 8
# How many times as large as its pixels it is.
ZOOM = 2
POOL = "pool.json"
_AGAIN = "remove its folder: the images are made again"


class About(Open):
    """What a batch's JSON file says of it."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    terms: dict[str, float] = {}
    seconds: float = Field(0.0, ge=0)


class Making(Open):
    """What is read of how a pool was made."""

    teacher: str
    classes: list[int] = Field(min_length=1)
    image_shape: list[int] = Field(min_length=3, max_length=3)
    settings: dict[str, Any]


class PoolFile(Open):
    """What is read of a pool.json.

    How a pool was made, or to which pool a cell added its images, and with which settings.
    """

    added_to: Making | None = None
    settings: dict[str, Any]
    data_classes: int | None = None


class MadeImages:
    """A folder of batches of one kind.

    Args:
        folder: its own.
        key: what all its batches have in common, as plain data.
        notes: what else `pool.json` says of them, without telling two pools apart.
    """

    def __init__(self, folder: Path, key: dict[str, Any], notes: dict[str, Any] | None = None) -> None:
        self.folder, self.key, self.notes = folder, key, notes or {}

    @classmethod
    def among(cls, folder: Path, key: dict[str, Any], notes: dict[str, Any] | None = None) -> MadeImages:
        """The folder for this key beside those of other keys."""
        return cls(folder / sha256_of_data(key)[:16], key, notes)

    @classmethod
    def at(cls, folder: Path) -> MadeImages:
        """The pool that lies in a folder. UserError where its pool.json is damaged."""
        found = read_as(PoolFile, folder / POOL, _AGAIN)
        if found.added_to is None:
            read_as(Making, folder / POOL, _AGAIN)
        return cls(folder, read_json(folder / POOL))

    def file(self, batch: int) -> Path:
        return self.folder / f"batch_{batch:05d}.safetensors"

    @property
    def done(self) -> int:
        """Batches from the first one on that are whole."""
        count = 0
        while self.file(count).with_suffix(".json").is_file() and self.file(count).is_file():
            count += 1
        return count

    def whole(self) -> list[int]:
        """Numbers of all batches that are whole, in order, wherever they begin."""
        names = [re.fullmatch(r"batch_(\d{5,9})", file.stem) for file in sorted(self.folder.glob("batch_*.json"))]
        return [number for name in names if name and self.file(number := int(name[1])).is_file()]

    def begin(self) -> None:
        """Make the folder, or clear what a killed process left half-written. For whoever holds the lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        if not (self.folder / POOL).is_file():
            write_json(self.folder / POOL, self.key | self.notes)

    def write(
        self, batch: int, images: Tensor, labels: Tensor, about: dict[str, Any], more: dict[str, Tensor] | None = None
    ) -> str:
        """Add a batch, or replace it.

        Args:
            more: other tensors that belong to it.

        Returns:
            sha256 of its file.
        """
        tensors = {"images": halves(images), "labels": labels} | (more or {})
        with atomic(self.file(batch)) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        digest = sha256_of(self.file(batch))
        write_json(self.file(batch).with_suffix(".json"), {"sha256": digest, "images": len(labels), **about})
        return digest

    def about(self, batch: int) -> About:
        """What a batch's JSON file says. UserError where it is absent or damaged."""
        return read_as(About, self.file(batch).with_suffix(".json"), _AGAIN)

    def digest(self, batches: Iterable[int]) -> str:
        """sha256 of batches: that of their own in hex, one a line, in their order."""
        return hashlib.sha256("".join(f"{self.about(batch).sha256}\n" for batch in batches).encode()).hexdigest()

    def read(self, batch: int) -> tuple[Tensor, Tensor]:
        """Images, float16 [N, C, H, W], and labels, int64 [N], of a batch, as `read_all` gives them."""
        images, labels, _ = self.read_all(batch)
        return images, labels

    def read_all(self, batch: int, sha256: str | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Images, float16 [N, C, H, W], labels, int64 [N], and what else belongs to a batch.

        Args:
            sha256: that the file must have, in place of the one that its JSON file says.

        Raises:
            UserError: it is not there, or is not what was written.
        """
        file, expected = self.file(batch), sha256 or self.about(batch).sha256
        if not file.is_file() or sha256_of(file) != expected:
            raise UserError(
                "a batch of images is missing or has changed since it was made", where=str(file), hint=_AGAIN
            )
        try:
            found = load_file(file)
            images, labels = found.pop("images"), found.pop("labels")
        except (SafetensorError, KeyError) as error:
            raise UserError(f"a batch of images is damaged: {error}", where=str(file), hint=_AGAIN) from None
        form = (images.dtype, images.ndim, labels.dtype, labels.shape)
        if form != (torch.float16, 4, torch.int64, images.shape[:1]):
            raise UserError("a batch of synthesized images holds something else", where=str(file), hint=_AGAIN)
        return images, labels, found

    def picture(self, batches: Sequence[int], each: int) -> None:
        """Draw the first `each` images of some batches, 64 images in all, eight in a row, into `grid.png`.

        Where these are too many batches, the first and the last are among those that are drawn, at even distances.
        """
        most = -(-(SIDE**2) // each)
        if len(batches) > most > 1:
            batches = [batches[round(i * (len(batches) - 1) / (most - 1))] for i in range(most)]
        images: list[Tensor] = []
        for batch in batches[:most]:
            images += self.read(batch)[0][: min(each, SIDE**2 - len(images))]
        if images:
            with atomic(self.folder / "grid.png") as temporary:
                grid(torch.stack(images)).save(temporary, format="PNG")


def halves(images: Tensor) -> Tensor:
    """Pixel values as they are kept: float16, within 1/2000 of a value below 1, an eighth of a byte's step."""
    return images.detach().to(torch.float16)


def grid(images: Tensor) -> Image.Image:
    """Images [N, C, H, W] of one or three channels on the scale of [0, 1], cut off outside, eight in a row."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    sheet = make_grid(images.float().clamp(0, 1), nrow=SIDE, padding=1, pad_value=1.0)
    picture = to_pil_image((sheet[: images.shape[1]] * 255).round().to(torch.uint8))
    return picture.resize((picture.width * ZOOM, picture.height * ZOOM), Image.Resampling.NEAREST)
