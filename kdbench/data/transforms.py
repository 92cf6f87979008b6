"""Transforms of single pictures by torchvision, whose draws have an address.

A card of the kind `transforms` names a function that takes options and returns what is called with a Pillow picture and
returns another of the same size and mode: any transform of `torchvision.transforms.v2`, or one's own that draws with
torch's functions. They run on the processor, ahead of the step, in several threads.
torchvision is imported by those that need it: it takes a second.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from kdbench.errors import UserError, failure

Transform = Callable[[Image.Image], Image.Image]
Filter = Literal["nearest", "bilinear", "bicubic"]

# All that draws and takes a generator.
_NAMES = (
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial"),
    *("normal", "poisson", "binomial", "_standard_gamma", "_sample_dirichlet", "uniform_", "normal_", "random_"),
    *("bernoulli_", "exponential_", "geometric_", "cauchy_", "log_normal_"),
)
_DRAW = {getattr(place, name) for place in (torch, torch.Tensor) for name in _NAMES if hasattr(place, name)}
# ImageNet's mean pixel, which a normalized image has as 0.
_MEAN = (0.485, 0.456, 0.406)


class Addressed(TorchFunctionMode):
    """In this thread torch draws from a generator that begins at a seed, and the global one stays as it is."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {} if kwargs is None else kwargs
        return function(*args, **(given | {"generator": self.generator} if function in _DRAW else given))


class Transforms:
    """Several transforms, one after the other.

    Args:
        parts: names and transforms.
    """

    def __init__(self, parts: Sequence[tuple[str, Transform]]) -> None:
        self.parts = parts

    def __call__(self, image: Image.Image, seed: int) -> Image.Image:
        """What a seed makes of a picture.

        Raises:
            UserError: a transform fails, or gives something else than a picture of this size and mode.
        """
        with Addressed(seed):
            for name, part in self.parts:
                try:
                    changed: object = part(image)
                except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's transform can fail in any way
                    what = f"the transform '{name}' fails on a picture of mode {image.mode}: {failure(error, part)}"
                    raise UserError(what, hint="it is called with a Pillow picture") from None
                if not isinstance(changed, Image.Image):
                    what = f"the transform '{name}' gives {type(changed).__name__}, not a Pillow picture"
                    raise UserError(what, hint="torchvision's 'v2.functional.to_pil_image' makes one of a tensor")
                if (changed.size, changed.mode) != (image.size, image.mode):
                    raise UserError(
                        f"the transform '{name}' makes {changed.size} pixels of mode {changed.mode} of {image.size} of "
                        f"mode {image.mode}",
                        hint="size and channels of an image stay; 'resized_crop' crops",
                    )
                image = changed
        return image


def rand_augment(*, num_ops: int = 2, magnitude: int = 9, interpolation: Filter = "bilinear") -> Transform:
    """RandAugment (Cubuk et al. 2020): so many operations of one magnitude, 0 to 30."""
    from torchvision.transforms import InterpolationMode, v2

    return v2.RandAugment(num_ops, magnitude, interpolation=InterpolationMode(interpolation))


def trivial_augment(*, interpolation: Filter = "bilinear") -> Transform:
    """TrivialAugment, wide (Müller & Hutter 2021): one operation of a random magnitude."""
    from torchvision.transforms import InterpolationMode, v2

    return v2.TrivialAugmentWide(interpolation=InterpolationMode(interpolation))


def auto_augment(
    *, policy: Literal["imagenet", "cifar10", "svhn"] = "imagenet", interpolation: Filter = "bilinear"
) -> Transform:
    """AutoAugment (Cubuk et al. 2019): a random one of the policies that were found for a data set."""
    from torchvision.transforms import InterpolationMode, v2

    return v2.AutoAugment(v2.AutoAugmentPolicy(policy), InterpolationMode(interpolation))


def color_jitter(
    *, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0
) -> Transform:
    """Brightness, contrast and saturation times 1 ± their option, hue plus or minus its option (0 to 0.5), in a random
    order."""
    from torchvision.transforms import v2

    return v2.ColorJitter(brightness, contrast, saturation, hue)


def grayscale(*, p: float = 0.1) -> Transform:
    """Grey in all channels, with probability p."""
    from torchvision.transforms import v2

    return v2.RandomGrayscale(p)


def random_erasing(
    *,
    p: float = 0.25,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
    value: tuple[float, ...] = _MEAN,
) -> Transform:
    """Random erasing (Zhong et al. 2020): a rectangle becomes one colour, with probability p.

    Args:
        scale: its share of the image. ratio: of its sides.
        value: the colour, in [0, 1]; the mean pixel stands for torchvision's 0 after normalization.
    """
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional as F

    colour = {"RGB": [round(255 * one) for one in value], "L": [round(255 * sum(value) / len(value))]}
    erasing = {mode: v2.RandomErasing(p, scale, ratio, of_mode) for mode, of_mode in colour.items()}

    def erase(image: Image.Image) -> Image.Image:
        return F.to_pil_image(erasing[image.mode](F.pil_to_tensor(image)))

    return erase
