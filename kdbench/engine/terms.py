"""Loss terms with their connectors. Every initial value is a function of (seed, stream)."""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdbench.data.streams import address
from kdbench.engine.data.batch import Sets
from kdbench.engine.networks.build import build_schedule, made
from kdbench.engine.networks.network import compiled, of_compiler
from kdbench.engine.surroundings import Shape, Surroundings
from kdbench.engine.targets import code_of, import_target
from kdbench.errors import UserError, counted
from kdbench.models.places import Unordered
from kdbench.recipe.coded import TargetSpec
from kdbench.recipe.method_specs import TermSpec
from kdbench.schedules import Moment, product
from kdbench.signature import parameters
from kdbench.told import asked

logger = logging.getLogger("kdbench")

# Input set -> hook point -> value, of one network.
Values = Mapping[str, Mapping[str, Tensor]]

_OF_A_CLASS = (
    "a loss that is a class is built with the shapes of what it reads: __init__(self, student_shape, teacher_shape)"
)


@dataclass
class Layer:
    """What one call of a loss takes: a pair of hook points, or several of each network at once.

    Attributes:
        students, teachers: hook points; of a pair one of each.
        connectors: one for each of the students'.
        told: what the loss asked for that is known already.
    """

    students: list[str]
    teachers: list[str]
    connectors: list[nn.Module]
    weight: float
    told: dict[str, Any] = field(default_factory=dict)


class Term(nn.Module):
    """One loss term of a stage: a function of captured values, its layers, and its own modules.

    Calling it gives the unweighted sum over layers (weighted by layer); `weight_at` the term's factor.

    Args:
        place: of the term, stage/name: connectors begin by it.

    Attributes:
        joint: whether the loss takes lists of hook points at once.
        numbers: name -> its value at a moment: what the loss asked for, and its scheduled options.
        most: images of the largest batch that the loss is made for; none for one that takes any.
        graph: the compiled loss, where it is compiled. not_compiled: why it is not, where torch.compile failed.
    """

    def __init__(self, name: str, spec: TermSpec, cell: Surroundings, place: str) -> None:
        super().__init__()
        self.name, self.spec = name, spec
        stage = place.partition("/")[0]
        self.schedules = product([build_schedule(one) for one in spec.weight_schedules])
        target = import_target(spec.loss.target)
        self.call: Callable[..., Tensor] | None = None if inspect.isclass(target) else target
        self.graph: Callable[..., Tensor] | None = None
        self.full, self.not_compiled = 0, ""
        in_call, when_made = (asked(spec.loss.target, called=called) for called in (True, False))
        self.most = cell.spec.protocol.batch_size if "batch_size" in (*in_call, *when_made) else None
        self.numbers = {option: _scheduled(spec, option, one) for option, one in spec.schedules.items()}
        self.numbers |= {told: _NUMBERS[told] for told in in_call if told in _NUMBERS}
        self.joint = isinstance(spec.student, list) or isinstance(spec.teacher, list)
        self.connectors = nn.ModuleList()
        self.functions = nn.ModuleList()
        self.layers: list[Layer] = []
        own = cell.shapes[spec.of]
        for index, layer in enumerate(self._layers(cell, place)):
            students = [own[point] for point in layer.students]
            teachers = [cell.shapes["teacher"][point] for point in layer.teachers]
            for shape in (*students, *teachers):
                if isinstance(shape, Unordered):
                    raise shape.error
            points = {"student": "".join(layer.students[:1]), "teacher": "".join(layer.teachers[:1])}
            layer.told = {one: cell.tell(one, stage, points) for one in in_call if one not in self.numbers}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(address(cell.spec.seed, f"connectors/{place}/{index}"))
                layer.connectors = [
                    self._connector(cell, i, layer, students, teachers, place) for i in range(len(students))
                ]
                if self.call is None:
                    pairs = zip(layer.connectors, students, strict=True)
                    with code_of(f"{place}: its connector"):
                        behind = [_behind(connector, shape) for connector, shape in pairs]
                    shapes = [self._one_or_all(side) for side in (behind, teachers) if side]
                    told = {one: cell.tell(one, stage, points) for one in when_made}
                    of_class = spec.loss.model_copy(update={"options": spec.loss.options | told})
                    self.functions.append(made(of_class, f"{place}: loss '{spec.loss.name}'", _OF_A_CLASS, *shapes))
            self.connectors.extend(nn.Identity() if spec.through else one for one in layer.connectors)
            self.layers.append(layer)
        self.metrics = {name: import_target(target) for name, target in spec.loss.metrics.items()}
        self.references = {name: import_target(target) for name, target in spec.loss.references.items()}

    def _layers(self, cell: Surroundings, place: str) -> list[Layer]:
        """The hook points of each of its calls."""
        spec = self.spec
        students = cell.points(spec.points("student"), spec.of)
        teachers = cell.points(spec.points("teacher"), "teacher") if "teacher" in spec.loss.inputs else []
        if not {"student", "other"} & {*spec.loss.inputs}:
            students = []
        if self.joint:
            if spec.layer_weights != "equal":
                raise UserError(f"{place}: it takes all its hook points at once, so 'layer_weights' cannot be used")
            return [Layer(students, teachers, [], 1.0)]
        if students and teachers and len(students) != len(teachers):
            raise UserError(
                f"{place}: {counted(len(students), 'student layer')} against {counted(len(teachers), 'teacher layer')}",
                hint=f"student: {', '.join(students)}; teacher: {', '.join(teachers)}. Choose as many of each with "
                "'hooks' beside the model's name, 'student: {name: MODEL, hooks: {layer1: MODULE, layer2: MODULE}}', "
                "or beside a teacher's 'name' or 'model'",
            )
        n = max(len(students), len(teachers), 1)
        weights = _layer_weights(spec, n, place)
        return [Layer(students[i : i + 1], teachers[i : i + 1], [], weights[i]) for i in range(n)]

    def _connector(
        self, cell: Surroundings, i: int, layer: Layer, students: list[Shape], teachers: list[Shape], place: str
    ) -> nn.Module:
        """What stands behind one hook point of the student."""
        if self.spec.through is not None:
            return cell.modules[self.spec.through]
        if self.spec.connector is None:
            return nn.Identity()
        if len(students) != len(teachers):
            raise UserError(f"{place}: a connector needs the same number of hook points in both networks")
        at = f"{place}: {layer.students[i]} → {layer.teachers[i]}"
        what = f"{at}: connector '{self.spec.connector.name}' cannot bridge {students[i]} → {teachers[i]}"
        hint = "choose other hook points, or a connector that changes the map's size ('kdbench ls connectors')"
        return made(self.spec.connector, what, hint, students[i], teachers[i])

    def _one_or_all(self, side: Sequence[Any]) -> Any:
        """What a loss gets of a network's side: one value, or all of them."""
        return list(side) if self.joint else side[0]

    def points(self, network: str) -> dict[str, list[str]]:
        """What the term reads of a network ("student" or "teacher"): input set -> hook points."""
        inputs, result = self.spec.loss.inputs, {}
        if network == self.spec.of and {"student", "other"} & {*inputs}:
            own = [point for layer in self.layers for point in layer.students]
            result = {name: own for name in (self.spec.input, self.spec.against) if name is not None}
        if network == "teacher" and "teacher" in inputs:
            here = result.get(self.spec.input, [])
            result[self.spec.input] = [*here, *(point for layer in self.layers for point in layer.teachers)]
        return result

    @property
    def input_sets(self) -> list[str]:
        """Names of the input sets that the term reads."""
        return [self.spec.input, *([self.spec.against] if self.spec.against else [])]

    def weight_at(self, now: Moment) -> float:
        """The term's factor at a moment."""
        return self.spec.weight * self.schedules(now)

    def forward(self, values: Mapping[str, Values], sets: Sets, numbers: Mapping[str, Tensor] | None = None) -> Tensor:
        """Sum over layers of layer weight × loss(inputs). Scalar.

        Args:
            values: network ("student", "teacher") -> input set -> hook point -> value.
            numbers: the present values of `numbers`, on the device; those of the first step where not given.
        """
        # What a user's loss returns; `check_term` tells what is no tensor.
        total: Any = None
        now = {name: torch.tensor(at(Moment())) for name, at in self.numbers.items()} if numbers is None else numbers
        for position, layer in enumerate(self.layers):
            function = self._call(sets) or self.functions[position]
            options = {**self.spec.loss.options, **layer.told, **now} if self.call else {**layer.told, **now}
            inputs = (self._input(name, layer, values, sets) for name in self.spec.loss.inputs)
            value = function(*inputs, **options)
            value = value if layer.weight == 1.0 else layer.weight * value
            total = value if position == 0 else total + value
        return cast(Tensor, total)

    def compile_loss(self, size: int) -> None:
        """Have a loss that is a plain function run as a compiled graph: a few kernels in place of dozens.

        Args:
            size: of a full batch. What an epoch's smaller last one asks is not worth a graph.
        """
        if self.call is not None and not self.spec.loss.by_step:
            self.graph, self.full = compiled(self.call), size

    def _call(self, sets: Sets) -> Callable[..., Tensor] | None:
        """The loss for these sets, where it is a plain function."""
        if self.graph is None or ("data" in sets and len(sets["data"].images) != self.full):
            return self.call
        return self._by_graph

    def _by_graph(self, *values: Any, **options: Any) -> Tensor:
        """The loss by its graph; as it is from now on where torch.compile cannot."""
        assert self.graph is not None and self.call is not None
        try:
            return self.graph(*values, **options)
        except Exception as error:  # noqa: BLE001 - all but the compiler's own are raised
            self.graph, self.not_compiled = None, f"loss '{self.name}': {of_compiler(error)}"
            logger.warning("torch.compile failed on the %s; it runs eagerly", self.not_compiled)
            return self.call(*values, **options)

    @property
    def measured(self) -> bool:
        """Whether the term has metrics, of student and teacher on the data's own images."""
        return bool(self.metrics) and self.spec.input == "data" and self.spec.of == "student"

    def _input(self, name: str, layer: Layer, values: Mapping[str, Values], sets: Sets) -> Any:
        """What the loss gets for one of its inputs."""
        spec = self.spec
        if name == "teacher":
            taught = values["teacher"][spec.input]
            return self._one_or_all([taught[p].detach() if spec.detach else taught[p] for p in layer.teachers])
        if name in ("student", "other"):
            own = values[spec.of][spec.input if name == "student" else spec.against or ""]
            pairs = zip(layer.connectors, layer.students, strict=True)
            return self._one_or_all([connector(own[point]) for connector, point in pairs])
        if (value := getattr(sets[spec.input], name)) is None:
            what = f"the loss '{self.name}' needs '{name}', which the input set '{spec.input}' does not have"
            raise UserError(what)
        return value


# What a loss may be told at every step: its value at a moment.
_NUMBERS: dict[str, Callable[[Moment], float]] = {
    "progress": lambda now: now.progress,
    "epoch": lambda now: float(int(now.epochs + 1e-9)),
}


def build_terms(cell: Surroundings) -> dict[str, dict[str, Term]]:
    """Loss terms of a cell: stage -> name -> term. Their first values are functions of the cell's seed."""
    return {
        stage: {name: Term(name, term, cell, f"{stage}/{name}") for name, term in card.losses.items()}
        for stage, card in cell.spec.method.stages.items()
    }


def _scheduled(spec: TermSpec, option: str, schedule: TargetSpec) -> Callable[[Moment], float]:
    """An option of a loss, multiplied by a schedule."""
    base = spec.loss.options.get(option, parameters(spec.loss.target)[option].default)
    factor = build_schedule(schedule)
    return lambda now: base * factor.at(*now)


def _behind(connector: nn.Module, shape: Shape) -> Shape:
    """The shape of one image's value behind a connector."""
    if isinstance(connector, nn.Identity):
        return shape
    was_training = connector.training
    parameter = next(connector.parameters(), torch.empty(0))
    with torch.no_grad():
        found: Tensor = connector.eval()(torch.zeros(2, *shape, dtype=parameter.dtype, device=parameter.device))
    connector.train(was_training)
    return tuple(found.shape[1:])


def _layer_weights(spec: TermSpec, n: int, place: str) -> list[float]:
    """Weights from the shallowest layer to the deepest."""
    if spec.layer_weights == "equal":
        return [1.0] * n
    if spec.layer_weights == "halving":
        return [0.5 ** (n - 1 - i) for i in range(n)]
    if len(spec.layer_weights) != n:
        raise UserError(f"{place}: {counted(len(spec.layer_weights), 'layer weight')} for {counted(n, 'layer')}")
    return list(spec.layer_weights)
