"""Small made-up data and teachers for tests that must not wait for real ones."""

from __future__ import annotations

import torch

from kdbench.engine.batches import Batches, Normalizer
from kdbench.engine.build import build_extractor, build_model
from kdbench.engine.member import Member, Teacher
from kdbench.recipe.schema import CellSpec, DataSpec
from kdbench.registry import Registry
from kdbench.sources.images import ImageData, canonical

CPU = torch.device("cpu")


def student_of(method: str) -> str:
    """A student that the method can train under the digits' teacher: the same model if it begins with its weights."""
    return "wrn_16_2" if Registry().card("methods", method).starts_from == "teacher" else "wrn_10_1"


def images(spec: DataSpec, per_class: int = 2, seed: int = 0) -> ImageData:
    """Random bytes in the shape of a data set, with every class in both parts."""
    generator = torch.Generator().manual_seed(seed)
    n = spec.classes * per_class
    shape = (n, spec.channels, spec.image_size, spec.image_size)
    parts = [
        (torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), torch.arange(n) % spec.classes)
        for _ in range(2)
    ]
    return canonical(spec.name, [str(i) for i in range(spec.classes)], *parts, origin="made up")


def shortened(spec: CellSpec, steps: int, batch: int = 8, per_class: int | None = None) -> CellSpec:
    """A cell with a budget of a few small steps on made-up data."""
    protocol = spec.protocol.model_copy(update={"steps": steps, "epochs": None, "batch_size": batch})
    data = spec.data.model_copy(update={"fraction": None, "per_class": per_class, "validation": 0})
    stages = {
        name: stage.model_copy(update={"extra_epochs": None, "share": 0.5}) if stage.extra_epochs else stage
        for name, stage in spec.method.stages.items()
    }
    method = spec.method.model_copy(update={"stages": stages})
    return spec.model_copy(update={"protocol": protocol, "data": data, "method": method, "evaluations": 1})


def untrained_teacher(spec: CellSpec) -> Teacher | None:
    """The cell's teacher with first weights."""
    if spec.teacher is None:
        return None
    known = spec.teacher.knows(spec.data)
    model = build_model(spec.teacher.model, known, seed=1)
    extractor = build_extractor(model, spec.teacher.model, known)
    shape = (spec.data.channels, spec.data.image_size, spec.data.image_size)
    return Teacher(extractor, Normalizer(spec.teacher.normalization, CPU), extractor.shapes(shape))


def member_of(
    spec: CellSpec, data: ImageData | None = None, teacher: Teacher | None = None
) -> tuple[Member, Batches, Teacher | None]:
    """A cell ready to train."""
    batches = Batches(spec, data or images(spec.data), CPU)
    teacher = teacher or untrained_teacher(spec)
    return Member(spec, batches, teacher, CPU), batches, teacher


def train(member: Member, batches: Batches, teacher: Teacher | None, steps: int) -> None:
    """Some steps of the training loop, one member alone."""
    for _ in range(steps):
        step(member, batches, teacher)


def step(member: Member, batches: Batches, teacher: Teacher | None, at: int | None = None) -> None:
    """A step of the training loop, on the member's own batch or that of another step."""
    sets = batches.sets(member.step if at is None else at, member.timeline, member.shared_sets())
    member.train_step(sets, teacher.step(sets, member.teacher_points()) if teacher else {})
