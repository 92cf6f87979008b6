"""From specs to modules: networks, connectors, loss terms. Every initial value is a function of (seed, stream)."""

from __future__ import annotations

import importlib
import inspect
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.cards import Weights
from kdbench.data.streams import address
from kdbench.engine.batches import Batch, Sets
from kdbench.errors import UserError
from kdbench.files import find_weights, sha256_of
from kdbench.models.hooks import Extractor, places
from kdbench.models.places import Place, Unordered
from kdbench.models.points import expand
from kdbench.recipe.specs import CellSpec, DataSpec, ModelSpec, TargetSpec, TermSpec
from kdbench.schedules import Schedule, product
from kdbench.signature import parameters

Shape = tuple[int, ...]
# Places of the hook points of networks that were built before: they are found by running the network.
_places: dict[str, dict[str, Place]] = {}
# Input set -> hook point -> value, of one network.
Values = Mapping[str, Mapping[str, Tensor]]


def resolve(target: str) -> Any:
    """The object that a target names."""
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # noqa: BLE001 - a user's module can fail in any way when it is imported
        raise UserError(f"target '{target}' cannot be imported: {type(error).__name__}: {error}") from None


def build_model(spec: ModelSpec, data: DataSpec, seed: int = 0, stream: str = "init") -> nn.Module:
    """A network with initial values fixed by (seed, stream), or from the spec's weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(address(seed, stream))
        try:
            model: nn.Module = resolve(spec.target)(
                **spec.options, classes=data.classes, channels=data.channels, image_size=data.image_size
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(
                f"model '{spec.name}' cannot be built for {data.name} ({data.channels}×{data.image_size}×"
                f"{data.image_size}, {data.classes} classes): {error}",
                hint="'kdbench show models' lists what its options mean",
            ) from None
    if spec.weights is not None:
        load_weights(model, read_weights(_weight_file(spec)), spec.name, spec.weights)
    if spec.start is not None:
        _start_from(model, spec.start, spec.name)
    return model


def _start_from(model: nn.Module, weights: Weights, name: str) -> None:
    """Load a card's weights; the one layer that has other classes there keeps its first values."""
    file = find_weights(weights.file)
    if file is None or sha256_of(file) != weights.sha256:
        raise UserError(
            f"there is no weight file '{weights.file}' of the sha256 that its card says",
            hint="'kdbench run' fetches it where that is allowed; or put it into a folder of KDBENCH_WEIGHTS",
        )
    state = read_weights(file)
    state = resolve(weights.layout)(state) if weights.layout is not None else state
    own = model.state_dict()
    new = {key: own[key] for key in state if key in own and own[key].shape != state[key].shape}
    if len({key.rpartition(".")[0] for key in new}) > 1:
        raise UserError(
            f"these weights do not fit '{name}': {', '.join(list(new)[:4])} have other shapes",
            where=str(file),
            hint="only its last layer may have other classes",
        )
    load_weights(model, state | new, name, str(file))


def _weight_file(spec: ModelSpec) -> Path:
    assert spec.weights is not None
    file = find_weights(spec.weights)
    if file is None:
        raise UserError(f"there is no weight file '{spec.weights}'")
    if spec.weights_sha256 is not None and sha256_of(file) != spec.weights_sha256:
        raise UserError(f"the weight file '{file}' has changed since this run began")
    return file


def read_weights(file: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a torch file (tensors only, nothing is executed)."""
    return weights_and_choice(file)[0]


def weights_and_choice(file: Path) -> tuple[dict[str, Tensor], str | None]:
    """The same, and a sentence where the file holds several and one was chosen (weights and their moving average)."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file), None
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a damaged file can fail in any way inside the unpickler
        raise UserError(
            f"the weight file cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}",
            where=str(file),
            hint="it must hold a state dict (.safetensors, or torch.save of tensors)",
        ) from None
    choice = None
    if isinstance(loaded, Mapping) and isinstance(taken := loaded.get("state_dict"), Mapping):
        others = [key for key, value in loaded.items() if value is not taken and _alike(value, taken)]
        if others:
            not_taken = ", ".join(f"'{key}'" for key in others)
            choice = f"{file} holds several networks' weights: 'state_dict' is taken, not {not_taken}"
        loaded = taken
    if not isinstance(loaded, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        held = f"the entries {', '.join(map(repr, [*loaded][:5]))}" if isinstance(loaded, Mapping) else "no entries"
        raise UserError(
            f"the weight file holds no state dict: a {type(loaded).__name__} with {held}",
            where=str(file),
            hint="save the network's state_dict() alone",
        )
    return {key.removeprefix("module."): value for key, value in loaded.items()}, choice


def choices_of(spec: CellSpec) -> list[str]:
    """Of a cell's weight files that are here: a sentence for each that holds several networks' weights."""
    teacher = spec.teacher.weights if spec.teacher is not None else None
    names = [spec.student.weights, *(weights.file for weights in (spec.student.start, teacher) if weights is not None)]
    files = {file for name in names if name is not None and (file := find_weights(name)) is not None}
    return [choice for file in sorted(files) if (choice := weights_and_choice(file)[1]) is not None]


def _alike(one: object, other: Mapping[str, Tensor]) -> bool:
    """Whether something holds tensors by the same names."""
    names = {str(key).removeprefix("module.") for key in other}
    return isinstance(one, Mapping) and names <= {str(key).removeprefix("module.") for key in one}


def load_weights(model: nn.Module, state: dict[str, Tensor], name: str, where: str) -> None:
    """Load a state dict that must fit exactly."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise UserError(
            f"these weights do not fit '{name}': {' '.join(lines)}",
            where=where,
            hint="check the model's name and options; two networks of one name can differ",
        ) from None


def start_from(
    model: nn.Module, state: Mapping[str, Tensor], name: str, teacher: str, known_classes: list[int] | None = None
) -> None:
    """Give a network another one's weights. Of a tensor with more rows than the other's (a classifier of more classes)
    the first ones are taken over, the others keep their first values.

    Args:
        name, teacher: what the two are called, for messages.
        known_classes: those that the other one was trained on; rows of others in the classifier (the last linear layer)
            keep their first values too. None: all.

    Raises:
        UserError: networks that differ in anything else.
    """
    own = model.state_dict()
    bad = list(own.keys() ^ state.keys())
    wider = [
        key
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
        and not (own[key].ndim and own[key].shape[1:] == state[key].shape[1:] and len(own[key]) > len(state[key]))
    ]
    if bad or wider:
        at = min([*bad, *wider])
        raise UserError(
            f"the student '{name}' cannot begin with the weights of its teacher '{teacher}': they differ at '{at}'",
            hint="choose the same model for both (the student may have more classes)",
        )
    rows = None if known_classes is None else torch.tensor(known_classes)
    classifier = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    if rows is not None and not classifier:
        raise UserError(f"the student '{name}' has no linear classifier whose rows could be told apart by class")
    with torch.no_grad():
        for key, value in own.items():
            if rows is not None and key.rpartition(".")[0] in classifier:
                value[rows] = state[key][rows]
            elif value.ndim:
                value[: len(state[key])] = state[key]
            else:
                value.copy_(state[key])


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
    return Schedule(lambda progress: 1.0) if spec is None else resolve(spec.target)(**spec.options)


@dataclass
class Layer:
    """One pair of hook points of a loss term, with the connector between them and its weight."""

    student: str
    teacher: str
    connector: nn.Module
    weight: float


class Term(nn.Module):
    """One loss term of a stage: a function of captured values, its layers, and its own modules.

    Calling it gives the unweighted sum over layers (weighted by layer); `weight_at` the term's factor.
    """

    def __init__(
        self,
        name: str,
        spec: TermSpec,
        student_shapes: Mapping[str, Shape],
        teacher_shapes: Mapping[str, Shape],
        place: str,
        seed: int,
        names: tuple[str, str],
        known_classes: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.spec = name, spec
        # A loss that has this argument is told; no card sets it.
        told = {"known_classes": known_classes} if "known_classes" in parameters(spec.loss.target) else {}
        self.options = {**spec.loss.options, **told}
        given = spec.weight_schedule or []
        self.schedules = product([build_schedule(one) for one in (given if isinstance(given, list) else [given])])
        with_teacher = "teacher" in spec.loss.inputs
        own = (student_shapes, names[0]) if spec.of == "student" else (teacher_shapes, names[1])
        students = expand([spec.student], *own)
        teachers = expand([spec.teacher], teacher_shapes, names[1]) if with_teacher else students
        if len(students) != len(teachers):
            raise UserError(
                f"{place}: {len(students)} student layers against {len(teachers)} teacher layers",
                hint=f"student: {', '.join(students)}; teacher: {', '.join(teachers)}",
            )
        weights = _layer_weights(spec, len(students), place)
        self.connectors = nn.ModuleList()
        self.functions = nn.ModuleList()
        self.layers: list[Layer] = []
        call = resolve(spec.loss.target)
        self.call: Callable[..., Tensor] | None = None if inspect.isclass(call) else call
        for index, (student, teacher, weight) in enumerate(zip(students, teachers, weights, strict=True)):
            shapes = (own[0][student], teacher_shapes[teacher] if with_teacher else ())
            for shape in shapes:
                if isinstance(shape, Unordered):
                    raise shape.error
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(address(seed, f"connectors/{place}/{index}"))
                connector = _connector(spec, shapes, f"{place}: {student} → {teacher}")
                if self.call is None:
                    self.functions.append(call(*(s for s in shapes if s), **self.options))
            self.connectors.append(connector)
            self.layers.append(Layer(student, teacher, connector, weight))
        self.metrics = {name: resolve(target) for name, target in spec.loss.metrics.items()}
        self.references = {name: resolve(target) for name, target in spec.loss.references.items()}

    def points(self, network: str) -> dict[str, list[str]]:
        """What the term reads of a network ("student" or "teacher"): input set -> hook points."""
        inputs, result = self.spec.loss.inputs, {}
        if network == self.spec.of and {"student", "other"} & {*inputs}:
            own = [layer.student for layer in self.layers]
            result = {name: own for name in (self.spec.input, self.spec.against) if name is not None}
        if network == "teacher" and "teacher" in inputs:
            here = result.get(self.spec.input, [])
            result[self.spec.input] = [*here, *(layer.teacher for layer in self.layers)]
        return result

    @property
    def input_sets(self) -> list[str]:
        """Names of the input sets that the term reads."""
        return [self.spec.input, *([self.spec.against] if self.spec.against else [])]

    def weight_at(self, progress: float, epoch: float = 0.0) -> float:
        """The term's factor at a progress of its stage, and of the epoch."""
        return self.spec.weight * self.schedules(progress, epoch)

    def forward(self, values: Mapping[str, Values], sets: Sets) -> Tensor:
        """Sum over layers of layer weight × loss(inputs). Scalar.

        Args:
            values: network ("student", "teacher") -> input set -> hook point -> value.
        """
        total: Tensor | None = None
        for position, layer in enumerate(self.layers):
            function = self.call or self.functions[position]
            value = function(*self._inputs(layer, values, sets), **(self.options if self.call else {}))
            value = value if layer.weight == 1.0 else layer.weight * value
            total = value if total is None else total + value
        assert total is not None
        return total

    @property
    def measured(self) -> bool:
        """Whether the term has metrics, of student and teacher on the data's own images."""
        return bool(self.metrics) and self.spec.input == "data" and self.spec.of == "student"

    def measure(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The loss's metrics: metric -> student hook point -> value."""
        return {
            name: {
                layer.student: metric(layer.connector(student[layer.student]), teacher[layer.teacher])
                for layer in self.layers
            }
            for name, metric in self.metrics.items()
        }

    def check(self, student: Mapping[str, Shape], teacher: Mapping[str, Shape], classes: int) -> None:
        """Compute the term once on random values of the right shapes.

        Raises:
            UserError: it cannot be computed, is no finite scalar, or does not depend on the student.
        """
        self.eval()
        what = f"loss '{self.name}' ({self.spec.loss.target})"
        values: dict[str, dict[str, dict[str, Tensor]]] = {"student": {}, "teacher": {}}
        sets: Sets = {}
        for name in self.input_sets:
            for network, shapes in (("student", student), ("teacher", teacher)):
                values[network][name] = {p: torch.randn(2, *shape) for p, shape in shapes.items()}
            labels = torch.tensor([0, classes - 1])
            sets[name] = Batch(torch.empty(0), labels, torch.tensor([0, 1]), mask=torch.tensor([True, True]))
        for points in values[self.spec.of].values():
            for value in points.values():
                value.requires_grad_()
        try:
            result = self(values, sets)
        except Exception as error:  # noqa: BLE001 - a user's loss can fail in any way
            own = student if self.spec.of == "student" else teacher
            pairs = ", ".join(
                f"{layer.student} {own.get(layer.student)} against {layer.teacher} {teacher.get(layer.teacher)}"
                for layer in self.layers
            )
            raise UserError(
                f"{what} cannot be computed: {type(error).__name__}: {error} {where_raised(error)}",
                hint=f"student against teacher: {pairs}; a connector can change channels and sizes "
                "('kdbench ls connectors')",
            ) from None
        if not isinstance(result, Tensor) or result.dim():
            given = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise UserError(f"{what} returned {given}", hint="a loss returns a scalar tensor: take .mean() or .sum()")
        if not torch.isfinite(result):
            raise UserError(f"{what} gave {result.item()} on random values", hint="a loss must be finite")
        if not result.requires_grad:
            raise UserError(
                f"{what} does not depend on the {self.spec.of}", hint=f"is the {self.spec.of}'s value detached?"
            )

    def _inputs(self, layer: Layer, values: Mapping[str, Values], sets: Sets) -> list[Tensor]:
        spec, batch = self.spec, sets[self.spec.input]
        found: list[Tensor] = []
        for name in spec.loss.inputs:
            if name == "student":
                value: Tensor | None = layer.connector(values[spec.of][spec.input][layer.student])
            elif name == "other":
                assert spec.against is not None
                value = layer.connector(values[spec.of][spec.against][layer.student])
            elif name == "teacher":
                value = values["teacher"][spec.input][layer.teacher]
                value = value.detach() if spec.detach else value
            else:
                value = getattr(batch, name)
            if value is None:
                raise UserError(f"the loss '{self.name}' needs '{name}', which the input set '{spec.input}' has not")
            found.append(value)
        return found


def where_raised(error: BaseException) -> str:
    """(file:line) of the last frame outside torch, where an error is most likely to be mended."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}torch{os.sep}" not in f.filename]
    return f"({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def build_terms(
    spec: CellSpec, student: Mapping[str, Shape], teacher: Mapping[str, Shape]
) -> dict[str, dict[str, Term]]:
    """Loss terms of a cell: stage -> name -> term. Their first values are functions of the cell's seed.

    Args:
        student, teacher: shapes of all hook points, per image; none for a cell without a teacher.
    """
    names = (spec.student.name, spec.teacher.model.name if spec.teacher else "")
    known = spec.teacher.known_classes if spec.teacher else None
    try:
        return {
            stage: {
                name: Term(name, term, student, teacher, f"{stage}/{name}", spec.seed, names, known)
                for name, term in card.losses.items()
            }
            for stage, card in spec.method.stages.items()
        }
    except UserError as error:
        raise UserError(f"method '{spec.method.name}': {error.what}", error.where, error.hint) from None


def _connector(spec: TermSpec, shapes: tuple[Shape, Shape], place: str) -> nn.Module:
    if spec.connector is None:
        return nn.Identity()
    try:
        connector: nn.Module = resolve(spec.connector.target)(*shapes, **spec.connector.options)
    except (UserError, ValueError) as error:
        what, hint = (error.what, error.hint) if isinstance(error, UserError) else (str(error), None)
        raise UserError(
            f"{place}: connector '{spec.connector.name}' cannot bridge {shapes[0]} → {shapes[1]}: {what}",
            hint=hint
            or "choose other hook points, or a connector that changes the map's size ('kdbench ls connectors')",
        ) from None
    return connector


def _layer_weights(spec: TermSpec, n: int, place: str) -> list[float]:
    """Weights from the shallowest layer to the deepest."""
    if spec.layer_weights == "equal":
        return [1.0] * n
    if spec.layer_weights == "halving":
        return [0.5 ** (n - 1 - i) for i in range(n)]
    if len(spec.layer_weights) != n:
        raise UserError(f"{place}: {len(spec.layer_weights)} layer weights for {n} layers")
    return list(spec.layer_weights)
