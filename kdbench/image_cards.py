"""What cards say of images: their normalization, and how those of training are augmented."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from kdbench.forms import Named, Strict

# The deviation of values in [0, 1] is 0.5 at most, a little more where it was estimated. 1 leaves the scale as it is,
# and 1 / 255 = 0.0039 brings pixels to 0 to 255; half of that and less was divided by 255 once too often.
_DEVIATIONS = (0.002, 0.501)


def _mean_of_pixels(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{_PIXELS}{_scale(value)}")
    return value


def _deviation_of_pixels(value: float) -> float:
    if not (_DEVIATIONS[0] <= value <= _DEVIATIONS[1] or value == 1):
        lost = "; it seems to be divided by 255 once too often" if value < _DEVIATIONS[0] else ""
        raise ValueError(f"{_PIXELS}, where a deviation is above 0 and at most 0.5, or 1 for none{_scale(value)}{lost}")
    return value


_PIXELS = "it must be for pixel values in [0, 1]"


def _scale(value: float) -> str:
    return f"; if it is on the scale 0 to 255, divide it by 255: {value / 255:.4f}" if 1 < value <= 255 else ""


class Normalization(Strict):
    """Per-channel mean and standard deviation of pixel values in [0, 1]; mean 0 and deviation 1 leave them as they are.

    Numbers that cannot belong to such values (those of the scale 0 to 255) are errors.
    """

    mean: list[Annotated[float, AfterValidator(_mean_of_pixels)]]
    std: list[Annotated[float, Field(gt=0), AfterValidator(_deviation_of_pixels)]]


# Why pictures of one rectangular size are brought to squares.
SQUARE = (
    "images are square here: networks, hook points and connectors are built for one number of pixels. A card with "
    "'streamed: true' takes rectangular pictures: of each a square is cropped, or with 'resized_crop' a part that is "
    "brought to a square, and tests take the middle"
)


def _pixel_size(value: Any) -> Any:
    if isinstance(value, list | tuple):
        raise ValueError(f"it is one number of pixels; {SQUARE}")
    return value


PixelSize = Annotated[int, BeforeValidator(_pixel_size)]


class Mix(Strict):
    """Mixup and CutMix: every image of a batch is mixed with the one before it, and its label with that one's.

    Where both are given, each batch takes one of them, with probability one half. Labels become shares of the classes,
    so losses with labels are those whose card says `soft_labels` (`ce`).
    """

    mixup: float | None = Field(None, gt=0, description="alpha: the share is drawn from Beta(alpha, alpha)")
    cutmix: float | None = Field(None, gt=0, description="alpha: a rectangle of that share of the image is replaced")
    probability: float = Field(1.0, gt=0, le=1, description="share of the batches that are mixed")

    @model_validator(mode="after")
    def something(self) -> Mix:
        if self.mixup is None and self.cutmix is None:
            raise ValueError("'mix' says 'mixup', 'cutmix' or both, each with its alpha, as {mixup: 0.2, cutmix: 1.0}")
        return self


class AugmentationFields(BaseModel):
    """Crop and mirror (torchvision's RandomCrop or RandomResizedCrop, and RandomHorizontalFlip), and mixing.

    In this order: crop, mirror, the `transforms` of a card, mixing. Everything is drawn by address: which views a batch
    has is a function of seed, epoch and position.
    """

    padding: int = Field(0, ge=0, description="pixels added around an image before it is cropped to its size again")
    mode: Literal["zero", "reflect"] = "zero"
    flip: bool = False
    resized_crop: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None, description="lowest and highest share of the area, as in RandomResizedCrop"
    )
    decoder: Literal["torchvision"] | None = Field(
        None, description="torchvision decodes and resizes what 'resized_crop' crops: faster than Pillow, other pixels"
    )
    mix: Mix | None = None

    @model_validator(mode="after")
    def one_crop(self) -> AugmentationFields:
        if self.resized_crop is not None:
            if len(self.resized_crop) != 2 or self.resized_crop[0] > self.resized_crop[1]:
                raise ValueError("'resized_crop' is the lowest and the highest share of the area, as [0.08, 1.0]")
            if self.padding:
                raise ValueError("'resized_crop' and 'padding' are two ways to crop: choose one ('padding: 0')")
        elif self.decoder is not None:
            raise ValueError("'decoder' is of pictures that 'resized_crop' crops; all others are decoded by Pillow")
        return self


class AugmentationCard(AugmentationFields, Strict):
    """What a protocol says of its images' views."""

    transforms: list[Named] | None = Field(
        None, description="transforms cards, applied in this order to each picture after crop and flip"
    )
