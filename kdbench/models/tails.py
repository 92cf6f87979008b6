"""What a network computes behind a hook point, on a value that stands in place of its own there."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from kdbench.errors import UserError, first_line
from kdbench.models.graph import PointTracer
from kdbench.models.hooks import Extractor
from kdbench.models.places import FIRST
from kdbench.models.points import LOGITS, POINT_GROUPS
from kdbench.models.probing import dry_images, undisturbed


class Tail:
    """The part of a network behind one of its hook points. It shares the network's modules and owns none of them.

    It is traced in eval mode: what a network does by itself in train mode, outside its modules, it does not.

    Attributes:
        points: the network's `layerK` behind the hook point, in their order. at_layer: whether it is one itself.

    Raises:
        UserError: there is no such hook point, or what is behind it cannot be run on its value alone.
    """

    def __init__(self, extractor: Extractor, point: str, image_shape: tuple[int, int, int]) -> None:
        extractor.place(point)  # UserError where there is none
        layers = [name for name in extractor.places if POINT_GROUPS["layers"].fullmatch(name)]
        try:
            self.at_layer = point in layers
            self.points = _behind(extractor, point, layers, image_shape)
            self._to_layers = _graph(extractor, point, self.points, image_shape)
            self._to_logits = _graph(extractor, point, [LOGITS], image_shape)
            with undisturbed(extractor.model, training=False):
                images = dry_images(extractor.model, image_shape)
                given = extractor(images, [point, *self.points, LOGITS])
                made = [*self.layers(given[point]), self.logits(given[point])]
            if not all(map(torch.equal, made, [*(given[name] for name in self.points), given[LOGITS]])):
                raise RuntimeError("it gives other values than the whole network")
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - tracing runs a network's code with stand-ins, which can fail anyhow
            what = f"what model '{extractor.model_name}' does behind '{point}' cannot be run alone: {first_line(error)}"
            raise UserError(what, hint="choose another hook point, or another model") from None

    def layers(self, value: Tensor) -> list[Tensor]:
        """Values at `points`, as the network's hook points give them.

        Args:
            value: in place of the hook point's, in the form in which hook points give it.
        """
        return list(self._to_layers(value)) if self.points else []

    def logits(self, value: Tensor) -> Tensor:
        """Logits [N, K]; as `layers`."""
        (found,) = self._to_logits(value)
        return found


class _Opening(PointTracer):
    """Goes into no module but those around a place: whatever else is in a network need not be traceable."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(place.path.startswith(f"{module_qualified_name}.") for place in self.places.values())


def _traced(
    extractor: Extractor, points: Iterable[str], image_shape: tuple[int, int, int]
) -> tuple[_Opening, fx.Graph]:
    places = {name: extractor.places[name] for name in points if name != LOGITS}
    tracer = _Opening(places, extractor.overwritten(image_shape))
    with undisturbed(extractor.model, training=False):
        return tracer, tracer.trace(extractor.model)


def _behind(extractor: Extractor, point: str, layers: list[str], image_shape: tuple[int, int, int]) -> list[str]:
    """Those of some layers whose value is made of a hook point's."""
    tracer, _ = _traced(extractor, [point, *layers], image_shape)
    reached: set[fx.Node] = set()
    waiting = [tracer.raw[point]]
    while waiting:
        new = set(waiting.pop().users) - reached
        reached |= new
        waiting += new
    return [name for name in layers if tracer.raw[name] in reached]


def _graph(extractor: Extractor, point: str, points: list[str], image_shape: tuple[int, int, int]) -> fx.GraphModule:
    """From the value of one hook point to those of others behind it."""
    tracer, graph = _traced(extractor, [point, *points], image_shape)
    images, end = next(iter(graph.nodes)), next(node for node in graph.nodes if node.op == "output")
    end.args = (tuple(end.args[0] if name == LOGITS else tracer.found[name] for name in points),)
    place, cut = extractor.places[point], tracer.raw[point]
    with graph.inserting_before(images):
        value = graph.placeholder("value")
        if place.order is not None and place.order != FIRST:
            # From [N, C, H, W] to what the network keeps.
            value = graph.call_method("permute", (value, *((0, *place.order).index(axis) for axis in range(4))))
        if point in tracer.copied:
            value = graph.call_method("clone", (value,))
    cut.replace_all_uses_with(value)
    module = fx.GraphModule(extractor.model, graph)
    module.graph.eliminate_dead_code()
    for node in [node for node in module.graph.nodes if node.op == "placeholder" and node.target != "value"]:
        if node.users:
            raise RuntimeError(f"it needs more of '{extractor.model_name}' than this value")
        module.graph.erase_node(node)
    module.recompile()
    return module
