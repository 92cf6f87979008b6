"""What a cell's losses and modules are told when they ask for it by the name of an argument (`kdbench.told`)."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.data.streams import address
from kdbench.engine.networks.build import made
from kdbench.engine.targets import code_of
from kdbench.errors import UserError
from kdbench.models.hooks import Extractor
from kdbench.models.neighbours import batch_norm_before, classifier
from kdbench.models.points import OF_TOKENS, expand
from kdbench.models.tails import Tail
from kdbench.recipe.method_specs import ModuleSpec
from kdbench.recipe.specs import CellSpec
from kdbench.recipe.timeline import training_images
from kdbench.signature import parameters
from kdbench.told import TOLD, asked

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Surroundings:
    """A cell as its losses and modules see it.

    Attributes:
        student, teacher: its networks; None where it has no teacher. own_teacher: in stages that have a copy of it.
        shapes: network -> hook point -> shape of one image's value.
        labels: gives the labels of the images that it trains on, where they are known yet.
        modules: the method's modules by name.
    """

    spec: CellSpec
    student: Extractor
    teacher: Extractor | None
    shapes: Mapping[str, Mapping[str, Shape]]
    own_teacher: Extractor | None = None
    labels: Callable[[], Tensor] | None = None
    modules: dict[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # One may ask for others, which then stand before it.
        for name, module in self.spec.method.modules.items():
            self.modules[name] = self.built(module, f"modules/{name}")

    def network(self, name: str, stage: str) -> Extractor:
        """The "student", or the "teacher" as a stage has it; UserError where there is none."""
        own = self.own_teacher if stage in self.spec.method.own_teacher_stages else None
        found = self.student if name == "student" else own or self.teacher
        if found is None:
            raise UserError("it asks for a module of the teacher, and the cell has none")
        return found

    def tell(self, name: str, stage: str = "", points: Mapping[str, str] | None = None) -> Any:
        """The value of what is known once the cell is built.

        Args:
            points: network -> the hook point of whoever asks.
        """
        if name in TOLD:
            return _BUILT[name](self, stage, points or {})
        if name not in self.modules:
            hint = f"name '{name}' first under the method's 'modules'"
            raise UserError(f"it needs '{name}', which stands after it", hint=hint)
        return self.modules[name]

    def built(self, spec: ModuleSpec, place: str) -> nn.Module:
        """A module of the method with its first values, on the CPU."""
        points = {"student": spec.student, "teacher": spec.teacher}
        return build_module(
            spec, self.shapes_for(spec), place, self.spec.seed, lambda name: self.tell(name, points=points)
        )

    def points(self, wanted: list[str], network: str) -> list[str]:
        """The hook points of a network that names stand for."""
        model = self.student if network == "student" else self.teacher
        return expand(wanted, self.shapes[network], model.model_name if model else "")

    def shapes_for(self, spec: ModuleSpec) -> dict[str, Shape]:
        """The shapes by which a module is built, `student_shape` and `teacher_shape`."""
        found = {}
        for network, wanted in (("student", spec.student), ("teacher", spec.teacher)):
            if self.shapes[network]:
                point, *others = self.points([wanted], network)
                if others:
                    raise UserError(f"a module is sized by one hook point, and '{wanted}' is {len(others) + 1}")
                found[f"{network}_shape"] = self.shapes[network][point]
        return found


def build_module(
    spec: ModuleSpec, shapes: Mapping[str, Shape], place: str, seed: int, tell: Callable[[str], Any]
) -> nn.Module:
    """A module from its connector's card, whose first values are a function of (seed, place).

    Args:
        shapes: `student_shape` and `teacher_shape`, of which it gets those that it takes.
        tell: gives what else it asks for.
    """
    given = {name: shape for name, shape in shapes.items() if name in parameters(spec.target)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(address(seed, f"connectors/{place}"))
        what = f"{place}: '{spec.name}' cannot be built for {given}"
        try:
            told = {name: tell(name) for name in asked(spec.target, called=False)}
        except UserError as error:
            raise UserError(f"{what}: {error.what}", hint=error.hint) from None
        tokens = any(len(shape) == 2 for shape in given.values())
        return made(spec, what, OF_TOKENS if tokens else None, **given, **told)


def said_of(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What modules of a method say of themselves: name -> what their class's `record` gives, where it has one.

    Numbers that are not finite are given as words: JSON has none.

    Raises:
        UserError: it fails, or gives no plain data.
    """
    found = {}
    for name, module in modules.items():
        if callable(record := getattr(type(module), "record", None)):
            with code_of(f"module '{name}': its 'record'"):
                found[name] = json.loads(json.dumps(record(module)), parse_constant=str)
    return found


def _labels(cell: Surroundings, stage: str, points: Mapping[str, str]) -> Tensor:
    """Before the data are read, as many labels as there will be, all classes alike."""
    if cell.labels is not None:
        return cell.labels().cpu()
    return torch.arange(training_images(cell.spec.data)) % cell.spec.data.classes


def _batch_norm(network: str) -> Callable[[Surroundings, str, Mapping[str, str]], nn.Module]:
    def found(cell: Surroundings, stage: str, points: Mapping[str, str]) -> nn.Module:
        of = cell.network(network, stage)
        return batch_norm_before(of, points[network], cell.spec.networks[network][1].image_shape)

    return found


def _tail(cell: Surroundings, stage: str, points: Mapping[str, str]) -> Tail:
    stages = cell.spec.method.stages
    for name, one in stages.items():
        if one.begins is not None:
            what = f"'{one.begins.name}' changes the student itself, which its 'student_tail' would not follow"
            raise UserError(what, hint="choose a method without such an operation")
        if stage in ("", name) and one.modes.student == "train":
            what = f"'student_tail' is of a student in eval mode, and stage '{name}' trains in train mode"
            raise UserError(what, hint="give the stage 'modes: {student: eval}'")
    (point,) = cell.points([points["teacher"]], "student")
    return Tail(cell.network("student", stage), point, cell.spec.networks["student"][1].image_shape)


_BUILT: dict[str, Callable[[Surroundings, str, Mapping[str, str]], Any]] = {
    "known_classes": lambda cell, stage, points: cell.spec.teacher.known_classes if cell.spec.teacher else None,
    "training_labels": _labels,
    "batch_size": lambda cell, stage, points: cell.spec.protocol.batch_size,
    "student_classifier": lambda cell, stage, points: classifier(cell.network("student", stage)),
    "teacher_classifier": lambda cell, stage, points: classifier(cell.network("teacher", stage)),
    "student_batch_norm": _batch_norm("student"),
    "teacher_batch_norm": _batch_norm("teacher"),
    "student_tail": _tail,
}
