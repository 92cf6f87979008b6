"""From specs to networks and schedules. Every initial value is a function of (seed, stream)."""

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from kdbench.data.streams import address
from kdbench.engine.networks.weights import load_file, load_teacher_file, locate, start_from, weight_file
from kdbench.engine.targets import import_target, in_words
from kdbench.errors import ON_DEVICE, UserError, counted
from kdbench.files import find_weights
from kdbench.models.hooks import Extractor, places
from kdbench.models.places import Place
from kdbench.models.several import Part, Several
from kdbench.recipe.coded import TargetSpec
from kdbench.recipe.model_specs import DataSpec, ModelSpec
from kdbench.recipe.specs import CellSpec
from kdbench.schedules import Schedule

# Places of the hook points of networks that were built before: they are found by running the network.
_places: dict[str, dict[str, Place]] = {}


def build_model(spec: ModelSpec, data: DataSpec, seed: int = 0, stream: str = "init") -> nn.Module:
    """A network with initial values fixed by (seed, stream), or from the spec's weights. Of weights with other classes
    the last layer keeps its initial values."""
    return _built(spec, data, seed, stream)[0]


def weight_notes(spec: CellSpec) -> list[str]:
    """What the user should know of the weight files of a cell that are here: which of several networks in one was
    taken, and what was left out.

    Raises:
        UserError: weights that cannot be read or do not fit.
    """
    found: list[str] = []
    student, teacher = spec.student, spec.teacher
    if student.weights is not None or (student.start is not None and find_weights(student.start.file) is not None):
        found += _built(student, student.takes(spec.data))[1]
    for one in teacher.each if teacher is not None else ():
        if one.weights is not None and (file := find_weights(one.weights.file)) is not None:
            model = build_model(one.model.untrained(), one.knows(spec.data))
            found += load_teacher_file(model, file, one, spec.data)
    return found


def _built(spec: ModelSpec, data: DataSpec, seed: int = 0, stream: str = "init") -> tuple[nn.Module, list[str]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(address(seed, stream))
        if spec.parts:
            each = [(build_model(part.model, data, seed, stream), part.normalization) for part in spec.parts]
            return Several([Part(network, of.mean, of.std) for network, of in each]), []
        model = made(
            spec,
            f"model '{spec.name}' cannot be built for {data.name} ({data.channels}×{data.image_size}×"
            f"{data.image_size}, {counted(data.classes, 'class')})",
            f"its class or function takes 'classes', 'channels' and 'image_size', and the options that 'kdbench show "
            f"models {spec.name}' lists",
            classes=data.classes,
            channels=data.channels,
            image_size=data.image_size,
        )
    notes = []
    if spec.weights is not None:
        notes = load_file(model, weight_file(spec), spec.name, entry=spec.entry, new_classes=True, classes=data.classes)
    if spec.start is not None:
        file = locate(spec.start, download=False)
        layout, entry = spec.start.layout, spec.start.entry
        notes = load_file(model, file, spec.name, layout, entry, new_classes=True, classes=data.classes)
    return model, notes


def made(spec: TargetSpec, what: str, hint: str | None = None, *given: Any, **more: Any) -> nn.Module:
    """The module that a spec's target makes of what is given and its options.

    Args:
        what: begins the message of its failure. hint: for that.

    Raises:
        UserError: it fails, or makes no module whose parameters have their sizes.
    """
    try:
        module = import_target(spec.target)(*given, **more, **spec.options)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's class can fail in any way
        reason, advice = in_words(error, spec.target)
        raise UserError(f"{what}: {reason}", hint=advice or hint) from None
    if not isinstance(module, nn.Module):
        raise UserError(f"{what}: it is a {type(module).__name__}, not a torch.nn.Module", hint=hint)
    if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
        hint = "name the sizes: nn.Linear(64, 10) for nn.LazyLinear(10)"
        raise UserError(f"{what}: the sizes of lazy layers are known after a first batch only", hint=hint)
    kinds = {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}
    if elsewhere := kinds - {"cpu", torch.get_default_device().type}:
        raise UserError(f"{what}: it lies on the device '{min(elsewhere)}'", hint=ON_DEVICE)
    return module


def build_student(spec: CellSpec, teacher: nn.Module | None) -> nn.Module:
    """The student of a cell with its first values, which may be those of its teacher."""
    student = build_model(spec.student, spec.student.takes(spec.data), spec.seed)
    if spec.method.starts_from == "teacher":
        assert teacher is not None and spec.teacher is not None
        weights = {name: value.cpu() for name, value in teacher.state_dict().items()}
        start_from(student, weights, spec.student.name, spec.teacher.model.name, spec.teacher.known_classes)
    return student


def build_extractor(model: nn.Module, spec: ModelSpec, data: DataSpec) -> Extractor:
    shape = data.image_shape
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
