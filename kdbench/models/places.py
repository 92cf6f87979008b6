"""Places in a network: a module's input or output, and which axis of the maps found there is which.

A network may keep its maps as [N, C, H, W] or as [N, H, W, C] (Swin and its relatives). Shapes do not tell: of
[N, 8, 8, 8] nothing can be read. So the network is run on images of another size: the axis that stays is the channels',
those that grow are height and width. Where it takes one size only, it is built once more for a larger one.

Tokens [N, T, C] come as they are, or those of the image's patches as a map.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.models.probing import UNSUITABLE, dry_run, watched

# The axes of a map [N, ., ., .] that are its channels, height and width.
Order = tuple[int, int, int]
FIRST: Order = (1, 2, 3)
LAST: Order = (3, 1, 2)
STATED: dict[str, Order] = {"channels_first": FIRST, "channels_last": LAST}

# The other images' height and width, by these factors: unequal, so that the two are told apart, unless that cannot be.
_GROWN = ((2, 3), (2, 2))
# Pixels of an image up to which running a network is quicker than following its shapes alone.
_FEW = 64 * 64
# Maps are [N, C, H, W] by definition before and after these.
_CHANNELS_FIRST = re.compile(r"(Conv|ConvTranspose|BatchNorm|InstanceNorm|\w*Pool)2d|PixelShuffle|Upsample")

_Shapes = dict[str, tuple[int, ...]]


class Place(NamedTuple):
    """A module's output, or its (first) input. `order`: of its axes where it is a map; None: nobody can tell.

    `grid`: height and width of the map that its last tokens are, row by row; others (of a class, of a teacher,
    registers) come before them.
    """

    path: str
    side: Literal["input", "output"]
    order: Order | None = FIRST
    grid: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"input({self.path})" if self.side == "input" else self.path

    def ordered(self, value: Tensor) -> Tensor:
        """A map, also one of tokens, as [N, C, H, W]; anything else as it is."""
        return self.rearranged(value) if self.grid or value.ndim == 4 else value

    def rearranged(self, value: Any) -> Any:
        """The same of a value of that kind, which may be one of a graph."""
        if self.grid:
            height, width = self.grid
            return value[:, -height * width :].transpose(1, 2).unflatten(2, self.grid)
        return value if self.order in (FIRST, None) else value.permute(0, *self.order)  # type: ignore[misc]


class Unordered(tuple[int, ...]):
    """Shape of a map of which nobody can tell which axis is the channels'. `error`: for whoever reads the map."""

    error: UserError


def parse_place(text: str) -> tuple[Place, bool]:
    """A place as hooks cards and recipes write it, and whether the order of its axes is stated there.

    `layer1.-1.relu` is a module's output, `input(layer1.-1.relu)` its input; `channels_last(…)` or `channels_first(…)`
    around it states the order.
    """
    stated = re.fullmatch(rf"({'|'.join(STATED)})\((.+)\)", text)
    inside = stated[2] if stated else text
    match = re.fullmatch(r"input\((.+)\)", inside)
    order = STATED[stated[1]] if stated else FIRST
    return Place(match[1] if match else inside, "input" if match else "output", order), stated is not None


def with_orders(
    model: nn.Module,
    found: Mapping[str, Place],
    stated: set[str],
    model_name: str,
    image_shape: tuple[int, int, int],
    larger: Callable[[int], nn.Module] | None,
) -> dict[str, Place]:
    """The places with the order of their maps' axes.

    Args:
        stated: points whose order the user stated.
        larger: builds the network for another side of images, for such as take one size only.

    Raises:
        UserError: a stated order that is not the network's, or stated of what is no map.
    """
    here = shapes_at(model, found, image_shape)
    maps = {point: place for point, place in found.items() if len(here.get(point, ())) == 4}
    for point in stated & (here.keys() - maps.keys()):
        what = f"hook point '{point}' ({found[point]}) of model '{model_name}' gives {list(here[point])}, no map"
        raise UserError(what, hint=f"leave out '{_word(found[point].order)}'")
    orders: dict[str, Order] = {}
    channels, height, width = image_shape
    for taller, wider in _GROWN:
        if open_points := {point: place for point, place in maps.items() if point not in orders}:
            there = shapes_at(model, open_points, (channels, taller * height, wider * width))
            orders |= _orders(here, there)
    for point, place in maps.items():
        if point not in orders and _CHANNELS_FIRST.match(type(model.get_submodule(place.path)).__name__):
            orders[point] = FIRST
    open_points = {point: place for point, place in maps.items() if point not in orders and point not in stated}
    if open_points and larger is not None:
        orders |= _orders(here, _shapes_of_larger(larger, open_points, (channels, 2 * height, 2 * width)))
    for point in stated & orders.keys():
        if orders[point] != found[point].order:
            raise UserError(
                f"hook point '{point}' ({found[point]}) of model '{model_name}' is not '{_word(found[point].order)}': "
                f"of its map {list(here[point])} other axes grow with the image",
                hint="leave the word out: the order is found by running the network",
            )
    known = {point: orders.get(point, place.order if point in stated else None) for point, place in maps.items()}
    return {point: place._replace(order=known.get(point, FIRST)) for point, place in found.items()}


def unordered(point: str, place: Place, model_name: str, shape: tuple[int, ...]) -> UserError:
    """What to say when a map is read of which nobody can tell which axis is the channels'."""
    return UserError(
        f"hook point '{point}' ({place}) of model '{model_name}' gives maps [N, {', '.join(map(str, shape))}], and "
        "nothing tells which axis is the channels': it cannot be run on images of another size",
        hint=f"state it in the recipe, under the model's 'hooks': '{point}: channels_first({place})' for [N, C, H, W], "
        f"or '{point}: channels_last({place})' for [N, H, W, C]",
    )


def _word(order: Order | None) -> str:
    return next(word for word, one in STATED.items() if one == order)


def _orders(here: _Shapes, there: _Shapes) -> dict[str, Order]:
    """Orders of the maps whose axes can be told by their shapes on images of two sizes, both of two images."""
    orders = {}
    for point, other in there.items():
        shape = here[point]
        if len(shape) != 4 or len(other) != 4 or shape[0] != other[0]:
            continue
        grown = {axis: other[axis] - shape[axis] for axis in (1, 2, 3) if other[axis] != shape[axis]}
        still = [axis for axis in (1, 2, 3) if axis not in grown]
        if len(grown) == 2:
            # The image's width grew more than its height, or as much.
            orders[point] = (still[0], *sorted(grown, key=lambda axis: grown[axis]))
        elif not grown and sum(shape[axis] > 1 for axis in still) < 2:
            # One pixel whatever the image: pooled.
            channels = max(still, key=lambda axis: shape[axis])
            orders[point] = (channels, *(axis for axis in still if axis != channels))
    return orders  # type: ignore[return-value]


def _shapes_of_larger(
    larger: Callable[[int], nn.Module], found: Mapping[str, Place], image_shape: tuple[int, int, int]
) -> _Shapes:
    try:
        try:
            with torch.device("meta"):
                model = larger(image_shape[1])
            return shapes_at(model, found, image_shape)
        except (UserError, *UNSUITABLE):
            return shapes_at(larger(image_shape[1]), found, image_shape)
    except (UserError, *UNSUITABLE):
        return {}


def shapes_at(model: nn.Module, found: Mapping[str, Place], image_shape: tuple[int, int, int]) -> _Shapes:
    """Shapes of what is found at places for two images, as far as the network comes with images of this size. Where it
    would take long, nothing is computed."""
    shapes: _Shapes = {}

    def note(point: str, value: object) -> None:
        if isinstance(value, Tensor):
            shapes[point] = tuple(value.shape)

    places = [(model.get_submodule(place.path), place.side, partial(note, point)) for point, place in found.items()]
    for meta in (True, False) if image_shape[1] * image_shape[2] > _FEW else (False,):
        with watched(places), suppress(*UNSUITABLE):
            dry_run(model, image_shape, meta)
        if shapes.keys() == found.keys():
            break
    return shapes
