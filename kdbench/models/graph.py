"""A network as a torch.fx graph that returns its hook points: what torch.compile can take whole.

The graph shares the network's modules, ends after the last point asked for, and gives what a module's hook would see.
Networks whose code depends on values cannot be traced; they keep running with hooks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from kdbench.errors import first_line
from kdbench.models.hooks import Extractor
from kdbench.models.places import Place
from kdbench.models.points import LOGITS
from kdbench.models.probing import dry_call, dry_images, undisturbed


class Untraceable(Exception):
    """This network cannot be traced; the message says why."""


def traced(extractor: Extractor, points: Collection[str], training: bool, image_shape: tuple[int, int, int]) -> Traced:
    """The graph that gives these points, with the network's own modules.

    Args:
        points: hook points of the extractor, or `logits`.
        training: the mode that it will run in; functions such as dropout are traced with it.
        image_shape: (channels, height, width), for the comparison with the hooks' values.

    Raises:
        Untraceable: the network cannot be traced, or the graph gives other values than its hooks.
    """
    asked = sorted(set(points), key=[*extractor.places, LOGITS].index)
    copied = extractor.overwritten(image_shape)
    tracer = PointTracer({point: extractor.places[point] for point in asked if point != LOGITS}, copied)
    try:
        with undisturbed(extractor.model, training):
            graph = tracer.trace(extractor.model)
    except Exception as error:  # noqa: BLE001 - tracing runs a network's code with stand-ins, which can fail anyhow
        raise Untraceable(f"{extractor.model_name}: {type(error).__name__}: {first_line(error)}") from None
    missing = [point for point in asked if point != LOGITS and point not in tracer.found]
    if missing:
        raise Untraceable(f"{extractor.model_name}: {', '.join(missing)} is not in the traced graph")
    end = next(node for node in graph.nodes if node.op == "output")
    order = {node: i for i, node in enumerate(graph.nodes)}
    values = [end.args[0] if point == LOGITS else tracer.found[point] for point in asked]
    depths = {point: order[value] for point, value in zip(asked, values, strict=True) if isinstance(value, fx.Node)}
    if len(depths) != len(asked):
        raise Untraceable(f"{extractor.model_name}: it does not return one tensor")
    end.args = (tuple(values),)
    module = fx.GraphModule(extractor.model, graph)
    # What comes after the last point is not run. Should this drop an operation that matters, the comparison tells.
    module.graph.eliminate_dead_code()
    module.recompile()
    result = Traced(module, asked, max(asked, key=depths.__getitem__))
    _compare(extractor, result, training, image_shape)
    return result


class Traced(NamedTuple):
    """Images [N, C, H, W] -> a value for each of `points`. `last`: the point that it runs to."""

    module: fx.GraphModule
    points: list[str]
    last: str


class PointTracer(fx.Tracer):
    """Notes, for every hook point, the value that its module takes or gives. Of several calls the last counts.

    Attributes:
        found: hook point -> its value as hooks give it. raw: the same as the network goes on with it.
    """

    def __init__(self, places: Mapping[str, Place], copied: Collection[str]) -> None:
        super().__init__()
        self.places, self.copied = places, copied
        self.found: dict[str, fx.Node] = {}
        self.raw: dict[str, fx.Node] = {}

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        here = {point: place.side for point, place in self.places.items() if place.path == path}
        for point, side in here.items():
            if side == "input":
                self._note(point, next(iter((*args, *kwargs.values())), None))
        result = super().call_module(m, forward, args, kwargs)
        for point, side in here.items():
            if side == "output":
                self._note(point, result)
        return result

    def _note(self, point: str, value: object) -> None:
        if isinstance(value, fx.Proxy):
            self.raw[point] = value.node
            # Where the network overwrites the tensor afterwards, the graph keeps a copy of this moment.
            value = value.clone() if point in self.copied else value
            self.found[point] = self.places[point].rearranged(value).node


def _compare(extractor: Extractor, traced: Traced, training: bool, image_shape: tuple[int, int, int]) -> None:
    """Raises Untraceable unless graph and hooks give the same bits on noise."""
    with undisturbed(extractor.model, training):
        images = dry_images(extractor.model, image_shape, n=4)
        # Dropout draws the same in both, on every device; `undisturbed` puts the generators back.
        torch.manual_seed(0)
        buffers = {name: buffer.clone() for name, buffer in extractor.model.named_buffers()}
        by_hooks = extractor(images, traced.points)
        for name, buffer in extractor.model.named_buffers():
            buffer.copy_(buffers[name])
        torch.manual_seed(0)
        values: Any = dry_call(traced.module, images)
    for point, value in zip(traced.points, values, strict=True):
        if not isinstance(value, Tensor) or not torch.equal(value, by_hooks[point]):
            raise Untraceable(f"{extractor.model_name}: the traced graph gives other values at '{point}'")
