"""Loss terms with their connectors. Every initial value is a function of (seed, stream)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdbench.data.streams import address
from kdbench.engine.batch import Batch, Sets
from kdbench.engine.build import build_schedule
from kdbench.engine.targets import import_target, where_raised
from kdbench.errors import UserError
from kdbench.models.places import Unordered
from kdbench.models.points import expand
from kdbench.recipe.specs import CellSpec, TermSpec
from kdbench.schedules import product
from kdbench.signature import parameters

Shape = tuple[int, ...]
# Input set -> hook point -> value, of one network.
Values = Mapping[str, Mapping[str, Tensor]]


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
                hint=f"student: {', '.join(students)}; teacher: {', '.join(teachers)}. Choose as many of each with "
                "'hooks' beside the model's name: 'student: {name: MODEL, hooks: {layer1: MODULE, layer2: MODULE}}'",
            )
        weights = _layer_weights(spec, len(students), place)
        self.connectors = nn.ModuleList()
        self.functions = nn.ModuleList()
        self.layers: list[Layer] = []
        call = import_target(spec.loss.target)
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
        self.metrics = {name: import_target(target) for name, target in spec.loss.metrics.items()}
        self.references = {name: import_target(target) for name, target in spec.loss.references.items()}

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
            self.train()
        except Exception as error:  # noqa: BLE001 - a user's loss can fail in any way
            own = student if self.spec.of == "student" else teacher
            pairs = ", ".join(
                f"{layer.student} {own.get(layer.student)} against {layer.teacher} {teacher.get(layer.teacher)}"
                for layer in self.layers
            )
            said = str(error).replace(" ", "_")
            for option, given in self.spec.loss.options.items():
                if option in said:
                    raise UserError(f"'{option}' of the loss '{self.name}' cannot be {given!r}: {error}") from None
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
        connector: nn.Module = import_target(spec.connector.target)(*shapes, **spec.connector.options)
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
