"""What a cell will be, without training: models built, hook points and connectors tried, sizes and times measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from kdbench.engine.build import build_extractor, build_model
from kdbench.engine.compute import REFERENCE
from kdbench.engine.finish import size_of
from kdbench.engine.inputs import Cost, SourceContext, build_source
from kdbench.engine.optimizers import build_optimizer
from kdbench.engine.teachers import untrained_teacher
from kdbench.engine.terms import build_terms
from kdbench.errors import UserError
from kdbench.recipe.specs import CellSpec, DataSpec, ModelSpec
from kdbench.recipe.timeline import planned_timeline

CPU = torch.device("cpu")
# Images in a timed batch: enough to fill the machine, few enough to be quick.
TIMED = 32


@dataclass(frozen=True)
class Size:
    """A network: parameters, FLOPs of one forward image (a multiply-add is two), seconds an image (0: not timed)."""

    parameters: int
    flops: int
    forward: float = 0.0
    training: float = 0.0


def check_cell(spec: CellSpec) -> None:
    """Build a cell's networks (the teacher without its weights), its connectors, loss terms and optimizers.

    Raises:
        UserError: a model that cannot be built, a hook point that does not exist, a pair that no connector can bridge.
    """
    data = spec.data
    image = (data.channels, data.image_size, data.image_size)
    student = build_model(spec.student.not_started(), data)
    shapes = build_extractor(student, spec.student, data).shapes(image)
    teacher, model = {}, None
    if spec.teacher is not None:
        known = spec.teacher.knows(data)
        model = build_model(spec.teacher.model.untrained(), known)
        teacher = build_extractor(model, spec.teacher.model, known).shapes(image)
    for name, terms in build_terms(spec, shapes, teacher).items():
        stage = spec.method.stages[name]
        trained = [*student.parameters()] if "student" in stage.trains else []
        trains_teacher = "teacher" in stage.trains
        for term in terms.values():
            term.check(shapes, teacher, data.classes)
            if [*term.parameters()] and "connectors" not in stage.trains:
                raise UserError(
                    f"method '{spec.method.name}', stage '{name}': the loss '{term.name}' has parameters of its own, "
                    "which this stage does not train",
                    hint="write 'trains: [student, connectors]'",
                )
            trained += term.parameters() if "connectors" in stage.trains else []
        if not trained and not trains_teacher:
            raise UserError(
                f"method '{spec.method.name}', stage '{name}': nothing to train", hint="add 'student' to its 'trains'"
            )
        if trained:
            build_optimizer(stage.optimizer, trained)
        if trains_teacher and model is not None:
            build_optimizer(stage.teacher_optimizer or stage.optimizer, [*model.parameters()])


def costs_of(spec: CellSpec) -> dict[str, Cost]:
    """Stage -> what its batch source takes, by sources whose teacher has the right shape and knows nothing."""
    named = {name: stage.source for name, stage in spec.method.stages.items() if stage.source is not None}
    if not named:
        return {}
    teacher = untrained_teacher(spec.teacher, spec.data, CPU, REFERENCE) if spec.teacher is not None else None
    frozen = teacher.network if teacher else None
    steps = {span.name: span.steps for span in planned_timeline(spec).spans}
    return {
        name: build_source(source, SourceContext(spec, name, CPU, frozen)).cost(steps[name])
        for name, source in named.items()
    }


def measure(model: ModelSpec, data: DataSpec, timed: bool, device: torch.device) -> Size:
    """Size of a model, and with `timed` its seconds an image: forward alone, and a whole training step."""
    network = build_model(model.untrained(), data).to(device)
    size = size_of(network, data)
    forward = training = 0.0
    if timed:
        images = torch.randn(TIMED, data.channels, data.image_size, data.image_size, device=device)
        labels = torch.zeros(TIMED, dtype=torch.int64, device=device)

        def step() -> None:
            network.zero_grad(set_to_none=True)
            F.cross_entropy(network(images), labels).backward()

        def look() -> None:
            with torch.no_grad():
                network(images)

        network.train()
        training = _seconds(step, device) / TIMED
        network.eval()
        forward = _seconds(look, device) / TIMED
    return Size(int(size["parameters"]), int(size["flops"]), forward, training)


def _seconds(action: object, device: torch.device) -> float:
    """Time of an action, the better of two after a warm-up."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        action()  # type: ignore[operator]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])
