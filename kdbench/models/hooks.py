"""Hook points: named places in a network, and the values found there.

`stem`, `layer1` … `layerN`, `layer1.preact` … `layerN.preact`, `pooled` and `logits` mean the same for every model;
`layers` and `layers.preact` stand for all of them in order. `layerK` is the output of stage K. `layerK.preact` is the
tensor that enters the layer's last ReLU, signs and all: losses on activation boundaries need it before the ReLU has
taken the negative half away. `layerK.gradient` is the gradient of the label's logit with respect to the output of stage
K, `images.gradient` that with respect to the images. `layerK.patches` are a transformer's tokens as a map.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdbench.errors import UserError, did_you_mean
from kdbench.models.derived import derived_places
from kdbench.models.places import Place, Unordered, parse_place, unordered, with_orders
from kdbench.models.points import IMAGES, LOGITS, existing, gradient_at, in_order, needed_for, place_of_gradient
from kdbench.models.probing import (
    DRY,
    UNSUITABLE,
    cannot_take,
    dry_call,
    dry_images,
    dry_run,
    kind_of,
    logits_of,
    undisturbed,
    watched,
)


def places(
    model: nn.Module,
    hooks: Mapping[str, str] | Literal["derived"],
    model_name: str,
    image_shape: tuple[int, int, int],
    larger: Callable[[int], nn.Module] | None = None,
) -> dict[str, Place]:
    """Every hook point that a model has, without `logits`, in the order stem, layer1, layer1.preact, …, pooled.

    Maps come as [N, C, H, W], whatever the network keeps them as; tokens [N, T, C] come as they are, and at `.patches`
    those of the image's patches as a map.

    Args:
        hooks: hook point -> module path or `input(path)`, where a part of a path may be a negative index; or 'derived',
            which finds stages, pre-activations and the classifier's input by looking at how the network runs. Around a
            place, `channels_last(…)` or `channels_first(…)` states the order of axes where running cannot tell it.
        image_shape: (channels, height, width).
        larger: builds the network anew for another side of images, for such as take one size only.
    """
    if hooks == "derived":
        return in_order(derived_places(model, model_name, image_shape, larger))
    found, stated = {}, set()
    for point, text in hooks.items():
        if point == LOGITS:
            raise UserError(f"model '{model_name}': 'logits' is what the model returns, and no place of its own")
        place, states_order = parse_place(text)
        path = _resolved(model, place.path)
        if path is None:
            what = f"hook point '{point}': model '{model_name}' has no module '{place.path}'"
            raise UserError(what, hint=did_you_mean(place.path, [name for name, _ in model.named_modules() if name]))
        found[point] = place._replace(path=path)
        stated |= {point} if states_order else set()
    return in_order(with_orders(model, found, stated, model_name, image_shape, larger))


class Extractor:
    """A network together with its hook points. Shares the network's modules, and owns none of its modes.

    What a point gives is the value at the moment when the module produced it (or took it): points whose tensor the
    network overwrites later are known from a dry forward, and copied. Of a module that runs several times in one
    forward, the last time counts.
    """

    def __init__(self, model: nn.Module, places: Mapping[str, Place], model_name: str) -> None:
        self.model, self.places, self.model_name = model, dict(places), model_name
        self._behaviours: dict[str, _Behaviour] | None = None

    def place(self, point: str) -> Place:
        """Where a hook point is. UserError for one that the model has not."""
        return self.places[existing(point, [*self.places], f"model '{self.model_name}'")]

    def shapes(self, image_shape: tuple[int, int, int]) -> PointShapes:
        """Shapes of all points and of `logits`, of one sample, by a dry forward of two images in eval mode.

        Raises:
            UserError: an image that the network cannot take; a point that is not reached, gives no tensor, gives
                something else than one value for each image, or values that are not finite.
        """
        run = _Pass(self, list(self.places), checking=True)
        try:
            with run.watching():
                logits = dry_run(self.model, image_shape)
        except UNSUITABLE as error:
            raise cannot_take(self.model_name, image_shape, error) from None
        values = {name: run.value(name) for name in self.places}
        values[LOGITS] = logits_of(self.model_name, logits)
        if not torch.isfinite(values[LOGITS]).all():
            raise UserError(
                f"model '{self.model_name}' gives logits that are not finite", hint="check its weights for NaN"
            )
        return PointShapes(image_shape, {name: self._shape_of(name, value) for name, value in values.items()})

    def _shape_of(self, point: str, value: Tensor) -> tuple[int, ...]:
        if value.shape[:1] != (DRY,):
            raise UserError(
                f"hook point '{point}' ({self.places.get(point, 'output')}) of model '{self.model_name}' gives "
                f"{list(value.shape)} for {DRY} images: its first axis is not the images'",
                hint="choose a module that gives one value for each image",
            )
        place, shape = self.places.get(point), tuple(value.shape[1:])
        if place is None or place.order is not None:
            return shape
        nobody_knows = Unordered(shape)
        nobody_knows.error = unordered(point, place, self.model_name, shape)
        return nobody_knows

    def __call__(self, images: Tensor, points: Sequence[str], labels: Tensor | None = None) -> dict[str, Tensor]:
        """Run the network and return what was found at the points.

        Unless `logits` are needed, it runs no further than the last point: in train mode, batch norms behind that do
        not see the batch.

        Args:
            images: [N, C, H, W].
            points: hook points of this model (no groups), or `logits`; and gradients with respect to these or to the
                images, which can be differentiated again unless gradients are off around the call.
            labels: of the images, int64 [N] or shares of the classes [N, K], where gradients are among the points.

        Raises:
            UserError: A point that the model has not, or at which there is no gradient; gradients without labels.
        """
        needed = needed_for(points)
        for point in needed:
            if point != LOGITS and point not in self.places:
                existing(point, [*self.places, LOGITS], f"model '{self.model_name}'")
        if not points:
            return {}
        if self._behaviours is None:
            self._behaviours = self._study(images)
        asked = [point for point in needed if point != LOGITS]
        gradients = [place for point in points if (place := place_of_gradient(point)) is not None]
        again = torch.is_grad_enabled()
        given = images if images.requires_grad or not gradients else images.detach().requires_grad_()
        run = _Pass(self, asked, behaviours=self._behaviours, stops=LOGITS not in needed, edges=bool(gradients))
        logits: object = None
        # Of attention, torch has second derivatives only where it is computed step by step.
        attention = sdpa_kernel(SDPBackend.MATH) if gradients and again else nullcontext()
        with run.watching(), suppress(_Stop), attention, torch.set_grad_enabled(again or bool(gradients)):
            # A copy, since a network may change its images in place.
            logits = self.model(given.clone() if gradients else given)
        values = {point: run.value(point) for point in asked}
        if LOGITS in needed:
            values[LOGITS] = logits_of(self.model_name, logits)
        if gradients:
            values |= self._gradients(run, gradients, given, values[LOGITS], labels, again)
            values = values if again else {point: value.detach() for point, value in values.items()}
        return {point: values[point] for point in points}

    def _gradients(
        self, run: _Pass, places: list[str], images: Tensor, logits: Tensor, labels: Tensor | None, again: bool
    ) -> dict[str, Tensor]:
        """Gradients of the logits of the images' labels, by the names of their points.

        Args:
            again: whether they can be differentiated.
        """
        if labels is None:
            what = f"the gradients of model '{self.model_name}' are of the logit of each image's label"
            raise UserError(what, hint="read an input set whose images have labels")
        with torch.enable_grad():
            # Of shares of the classes, the sum of their logits, each by its share.
            own = logits * labels if labels.is_floating_point() else logits.gather(1, labels.unsqueeze(1))
            score = own.sum()
        at = [get_gradient_edge(images) if place == IMAGES else run.edge(place) for place in places]
        gradients = torch.autograd.grad(score, at, create_graph=again, allow_unused=True)
        found = {}
        for place, gradient in zip(places, gradients, strict=True):
            if gradient is None:
                what = f"the logits of model '{self.model_name}' do not depend on its hook point '{place}'"
                raise UserError(what, hint="choose a place on the way from the images to the logits")
            found[gradient_at(place)] = gradient if place == IMAGES else self.places[place].ordered(gradient)
        return found

    def made_by(self, image_shape: tuple[int, int, int], training: bool = False) -> dict[str, Node | None]:
        """The autograd node of each point and of `logits`, in train or in eval mode; None where no gradient gets there.

        Empty for a network that cannot run so on noise.
        """
        found: dict[str, Node | None] = {}

        def note(point: str, value: object) -> None:
            # At once: an operation in place would make the tensor its own.
            found[point] = value.grad_fn if isinstance(value, Tensor) else None

        at = {point: (self.model.get_submodule(place.path), place.side) for point, place in self.places.items()}
        try:
            with (
                undisturbed(self.model, training),
                torch.enable_grad(),
                watched([(*where, partial(note, point)) for point, where in at.items()]),
            ):
                # A copy, since a network may change its images in place.
                note(LOGITS, dry_call(self.model, dry_images(self.model, image_shape).requires_grad_().clone()))
        except UNSUITABLE:
            return {}
        return found

    def overwritten(self, image_shape: tuple[int, int, int]) -> set[str]:
        """Points whose tensor the network overwrites after it was produced."""
        if self._behaviours is None:
            self._behaviours = self._study(dry_images(self.model, image_shape))
        return {name for name, behaviour in self._behaviours.items() if behaviour.overwritten}

    def _study(self, images: Tensor) -> dict[str, _Behaviour]:
        """How often each point is reached and whether its tensor is overwritten, in eval and in train mode."""
        shape = (images.shape[1], images.shape[2], images.shape[3])
        found = []
        for training in (False, True):
            try:
                with undisturbed(self.model, training), _Pass(self, list(self.places)).watching() as run:
                    dry_call(self.model, dry_images(self.model, shape).to(images.device))
            except UNSUITABLE:
                # The real run will say what is wrong, if anything is: networks exist that fail on noise only.
                return dict.fromkeys(self.places, _Behaviour(calls=None, overwritten=True))
            found.append({name: _Behaviour(run.calls[name], run.overwritten(name)) for name in self.places})
        both = {name: (found[0][name], found[1][name]) for name in self.places}
        return {
            name: _Behaviour(calm.calls if calm.calls == busy.calls else None, calm.overwritten or busy.overwritten)
            for name, (calm, busy) in both.items()
        }


@dataclass(frozen=True)
class _Behaviour:
    """What a network does with a point: in how many calls it is reached (None: it varies), and whether the tensor is
    overwritten after that."""

    calls: int | None
    overwritten: bool


class PointShapes(dict[str, tuple[int, ...]]):
    """Hook point -> shape of one image's value. A gradient has that of its place.

    Args:
        image_shape: (channels, height, width).
    """

    def __init__(self, image_shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(shapes)
        self.image_shape = image_shape

    def __missing__(self, point: str) -> tuple[int, ...]:
        place = place_of_gradient(point)
        if place is None:
            raise KeyError(point)
        return self.image_shape if place == IMAGES else self[place]


@dataclass
class _Found:
    value: Tensor
    # The tensor as the network holds it, and its version when it was found.
    original: Tensor
    version: int | None
    # What made it: an operation in place would make the tensor its own.
    edge: GradientEdge | None


class _Stop(BaseException):
    """Ends a forward when all that was asked for is found. No Exception: a network may catch those."""


class _Active(threading.local):
    """The runs under way in this thread, innermost last. Hooks of all others are neutral."""

    def __init__(self) -> None:
        self.runs: list[_Pass] = []


_ACTIVE = _Active()


@dataclass(eq=False)
class _Pass:
    """One forward with hooks at some points. They are there while it is `watching`."""

    extractor: Extractor
    points: list[str]
    behaviours: Mapping[str, _Behaviour] | None = None
    stops: bool = False
    checking: bool = False
    edges: bool = False
    calls: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.calls = dict.fromkeys(self.points, 0)
        self._found: dict[str, _Found] = {}
        self._waiting = set(self.points)

    @contextmanager
    def watching(self) -> Iterator[_Pass]:
        """Inside, hooks are there."""
        model, at = self.extractor.model, self.extractor.places
        with watched([(model.get_submodule(at[p].path), at[p].side, partial(self._take, p)) for p in self.points]):
            _ACTIVE.runs.append(self)
            try:
                yield self
            finally:
                _ACTIVE.runs.remove(self)

    def value(self, point: str) -> Tensor:
        """What was found at a point. UserError when it was not reached."""
        found = self._found.get(point)
        if found is None:
            hint = "choose a module that the network's forward calls"
            raise UserError(f"{self._where(point)} is not reached when the network runs", hint=hint)
        if self.behaviours is not None and found.value is found.original and self.overwritten(point):
            raise RuntimeError(f"{self._where(point)}: the network overwrote the value, but not so in its dry run")
        place = self.extractor.places[point]
        if place.order is None and not self.checking:
            raise unordered(point, place, self.extractor.model_name, tuple(found.value.shape[1:]))
        return place.ordered(found.value)

    def edge(self, point: str) -> GradientEdge:
        """What the value at a point is to autograd. UserError where no gradient gets there."""
        edge = self._found[point].edge
        if edge is None:
            hint = "choose a place behind the images, or behind what is trained"
            raise UserError(f"no gradient gets to {self._where(point)}", hint=hint)
        return edge

    def overwritten(self, point: str) -> bool:
        found = self._found.get(point)
        return found is not None and found.version is not None and found.original._version != found.version

    def _take(self, point: str, value: object) -> None:
        if _ACTIVE.runs[-1:] != [self]:
            return
        if not isinstance(value, Tensor):
            raise UserError(
                f"{self._where(point)} gives {kind_of(value)}, not a tensor", hint="choose a module inside or after it"
            )
        if self.checking and not torch.isfinite(value).all():
            raise UserError(
                f"{self._where(point)} gives values that are not finite", hint="check the model's weights for NaN"
            )
        self.calls[point] += 1
        behaviour = self.behaviours[point] if self.behaviours is not None else _Behaviour(None, False)
        last = behaviour.calls == self.calls[point]
        copy = behaviour.overwritten and (last or behaviour.calls is None)
        version = None if value.is_inference() else value._version
        edge = get_gradient_edge(value) if self.edges and value.requires_grad else None
        self._found[point] = _Found(value.clone() if copy else value, value, version, edge)
        if last:
            self._waiting.discard(point)
            if self.stops and not self._waiting:
                raise _Stop

    def _where(self, point: str) -> str:
        return f"hook point '{point}' ({self.extractor.places[point]}) of model '{self.extractor.model_name}'"


def _resolved(model: nn.Module, path: str) -> str | None:
    """A path with negative indices replaced by names, or None when there is no such module."""
    module, names = model, []
    for part in path.split("."):
        children = dict(module.named_children())
        if re.fullmatch(r"-\d+", part) and len(children) >= -int(part):
            part = list(children)[int(part)]
        if part not in children:
            return None
        names.append(part)
        module = children[part]
    return ".".join(names)
