"""From specs to networks and schedules. Every initial value is a function of (seed, stream)."""

from __future__ import annotations

import torch
from torch import nn

from kdbench.data.streams import address
from kdbench.engine.targets import import_target
from kdbench.engine.weights import load_weights, read_weights, start_from_card, weight_file
from kdbench.errors import UserError
from kdbench.models.hooks import Extractor, places
from kdbench.models.places import Place
from kdbench.recipe.specs import DataSpec, ModelSpec, TargetSpec
from kdbench.schedules import Schedule

# Places of the hook points of networks that were built before: they are found by running the network.
_places: dict[str, dict[str, Place]] = {}


def build_model(spec: ModelSpec, data: DataSpec, seed: int = 0, stream: str = "init") -> nn.Module:
    """A network with initial values fixed by (seed, stream), or from the spec's weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(address(seed, stream))
        try:
            model: nn.Module = import_target(spec.target)(
                **spec.options, classes=data.classes, channels=data.channels, image_size=data.image_size
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(
                f"model '{spec.name}' cannot be built for {data.name} ({data.channels}×{data.image_size}×"
                f"{data.image_size}, {data.classes} classes): {error}",
                hint="'kdbench show models' lists what its options mean",
            ) from None
    if spec.weights is not None:
        load_weights(model, read_weights(weight_file(spec)), spec.name, spec.weights)
    if spec.start is not None:
        start_from_card(model, spec.start, spec.name)
    return model


def build_extractor(model: nn.Module, spec: ModelSpec, data: DataSpec) -> Extractor:
    shape = (data.channels, data.image_size, data.image_size)
    untrained = spec.untrained()
    key = f"{untrained.model_dump_json()} {data.classes} {shape}"
    if key not in _places:

        def larger(side: int) -> nn.Module:
            return build_model(untrained, data.model_copy(update={"image_size": side}))

        _places[key] = places(model, spec.hooks, spec.name, shape, larger)
    return Extractor(model, _places[key], spec.name)


def build_schedule(spec: TargetSpec | None) -> Schedule:
    """A schedule; none stands for a constant."""
    return Schedule(lambda progress: 1.0) if spec is None else import_target(spec.target)(**spec.options)
