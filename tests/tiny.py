"""Small made-up data and teachers for tests that must not wait for real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shipped import REGISTRY
from torch import Tensor

from kdbench.data.images import ImageData, canonical
from kdbench.engine import checkpoint
from kdbench.engine.data.batch import Sets
from kdbench.engine.data.batches import Batches
from kdbench.engine.inputs import SourceFiles
from kdbench.engine.member import Member
from kdbench.engine.networks.build import build_extractor, build_model
from kdbench.engine.networks.network import Normalizer
from kdbench.engine.step import shared_part
from kdbench.engine.step import train as train_member
from kdbench.engine.teachers.anchors import Route
from kdbench.engine.teachers.teacher import Teacher
from kdbench.recipe.method_specs import StageSpec
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.specs import CellSpec, TeacherSpec
from kdbench.recipe.timeline import Timeline
from kdbench.registry import Registry

CPU = torch.device("cpu")
# A small network with a class token and a distillation token.
TWO_HEADS = {
    "name": "timm:deit_tiny_distilled_patch16_224",
    "options": {"patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2},
}
# Two small transformers of other widths and as many patches.
TRANSFORMER, WIDER = (
    {"name": f"timm:{name}", "options": {"patch_size": 4, "embed_dim": width, "depth": 3, "num_heads": 2}}
    for name, width in (("deit_tiny_patch16_224", 12), ("deit3_small_patch16_224", 16))
)


def networks_for(method: str) -> dict[str, Any]:
    """A teacher of the digits and a student that the method can train under it."""
    if method.startswith("vitkd"):
        # Made-up teachers read no weights, so any file is good for them.
        return {"teacher": {"model": WIDER, "weights": __file__}, "student": TRANSFORMER}
    return {"teacher": "wrn_16_2_digits_route", "student": _student_of(method)}


def _student_of(method: str) -> Any:
    """The same model as the teacher if the method begins with its weights."""
    if method == "deit":
        return TWO_HEADS
    if REGISTRY.card("methods", method).starts_from == "teacher":
        return "wrn_16_2"
    # Some losses compare channel by channel.
    return "wrn_10_2" if method in ("fsp", "kdsvd") else "wrn_10_1"


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


# Options of batch sources that would take long.
SMALL: dict[str, dict[str, Any]] = {"inverted": {"images": 8, "iterations": 2, "every": 3, "head": 8}}


def small(stage: StageSpec, always: bool = False) -> StageSpec:
    """A stage whose source takes moments; `always`: also where a recipe says otherwise."""
    if stage.source is None or stage.source.name not in SMALL:
        return stage
    few, own = SMALL[stage.source.name], stage.source.options
    options = own | few if always else few | own
    return stage.model_copy(update={"source": stage.source.model_copy(update={"options": options})})


def shortened(spec: CellSpec, steps: int, batch: int = 8, per_class: int | None = None) -> CellSpec:
    """A cell with a budget of a few small steps on made-up data."""
    protocol = spec.protocol.model_copy(update={"steps": steps, "epochs": None, "batch_size": batch})
    # Few images are too few for a part that nobody looks at.
    looked_at = any(stage.anchor and stage.anchor.choose == "greedy" for stage in spec.method.stages.values())
    split = {"per_class": per_class, "validation": spec.data.classes if looked_at else 0}
    data = spec.data.model_copy(update={"fraction": None, **split})
    inside = {"extra_epochs": None, "extra_share": None, "share": 1 / len(spec.method.stages)}
    stages = {
        name: small(stage.model_copy(update=inside) if stage.extra else stage)
        for name, stage in spec.method.stages.items()
    }
    method = spec.method.model_copy(update={"stages": stages})
    changes = {"protocol": protocol, "data": data, "method": method, "student": spec.student.not_started()}
    return spec.model_copy(update=changes | {"evaluations": 1})


def target_for(method: str, registry: Registry) -> dict[str, str]:
    """What a recipe of this method must say of a target domain."""
    terms = [term for stage in registry.card("methods", method).stages.values() for term in stage.losses.values()]
    return {"target": "digits"} if any("target" in (term.input, term.against) for term in terms) else {}


def batches_for(spec: CellSpec, data: ImageData | None = None) -> Batches:
    """A cell's batches, of made-up data where none are given; a target domain's are always made up."""
    return Batches(spec, data or images(spec.data), CPU, images(spec.target, seed=1) if spec.target else None)


class MadeUpRoute(Route):
    """A route of so many networks, each with weights of its own; `asked` lists the positions that were read."""

    def __init__(self, teacher: TeacherSpec, data: DataSpec, n: int = 5) -> None:
        super().__init__(Path("made up"), tuple({"step": i, "epoch": i, "sha256": str(i)} for i in range(1, n + 1)))
        self.__dict__.update(first=build_model(teacher.model, data, seed=100).state_dict(), asked=[])

    def weights(self, position: int) -> dict[str, Tensor]:
        self.__dict__["asked"].append(position)
        first: dict[str, Tensor] = self.__dict__["first"]
        less = 1 - position / 50
        return {name: value * less if value.is_floating_point() else value.clone() for name, value in first.items()}


def untrained_teacher(spec: CellSpec, device: torch.device = CPU) -> Teacher | None:
    """The cell's teacher with first weights, and a made-up route where it is to have one."""
    if spec.teacher is None:
        return None
    known = spec.teacher.knows(spec.data)
    model = build_model(spec.teacher.model, known, seed=1)
    extractor = build_extractor(model.to(device), spec.teacher.model, known)
    shape = known.image_shape
    routed = spec.teacher.trained_by is not None and spec.teacher.trained_by.route is not None
    route = MadeUpRoute(spec.teacher, known) if routed else None
    return Teacher(
        extractor, Normalizer(spec.teacher.normalization, shape[1:], device), extractor.shapes(shape), route=route
    )


def teacher_for(spec: CellSpec) -> Teacher:
    """The same of a cell that has one."""
    teacher = untrained_teacher(spec)
    assert teacher is not None
    return teacher


def member_of(
    spec: CellSpec, data: ImageData | None = None, teacher: Teacher | None = None, folder: Path | None = None
) -> tuple[Member, Batches, Teacher | None]:
    """A cell ready to train; its source's files lie in a folder, if it has one."""
    batches = batches_for(spec, data)
    teacher = teacher or untrained_teacher(spec)
    return Member(spec, batches, teacher, CPU, files=SourceFiles(folder=folder)), batches, teacher


def train(member: Member, batches: Batches, teacher: Teacher | None, steps: int) -> None:
    """Some steps of the training loop, one member alone."""
    for _ in range(steps):
        step(member, batches, teacher)


def killed(
    build: Callable[[], Member], batches: Batches, teacher: Teacher | None, folder: Path, at: int, beyond: int = 0
) -> Member:
    """A cell that was killed some steps beyond the checkpoint of a step, then built anew and trained to its end."""
    first = build()
    train(first, batches, teacher, at)
    checkpoint.save(folder, {"key": {}, **first.state()})
    train(first, batches, teacher, beyond)
    second = build()
    state = checkpoint.load(folder, {}, second.state())
    assert state is not None
    second.load_state(state)
    train(second, batches, teacher, second.timeline.total - at)
    return second


def sets_at(batches: Batches, at: int, timeline: Timeline, names: list[str]) -> Sets:
    """The input sets of any step."""
    batches.seek(at, timeline, names)
    batches.feed(names)
    return batches.sets(names)


def step(member: Member, batches: Batches, teacher: Teacher | None, at: int | None = None) -> None:
    """A step of the training loop, on the member's own batch or that of another step."""
    step_together([member], batches, teacher, at)


def step_together(members: list[Member], batches: Batches, teacher: Teacher | None, at: int | None = None) -> None:
    """The same of a cohort."""
    names = dict.fromkeys(name for member in members for name in member.stage.shared_sets)
    for member in members:
        assert member.ready(lambda text: None, lambda: False)
        member.prepare(1)
    batches.seek(members[0].step if at is None else at, members[0].timeline, names)
    batches.feed(names)
    sets, taught = shared_part(batches, teacher, members)
    for member in members:
        member.before_step()
        member.after_step(train_member(member, sets, taught))


def changed_at(whole: bytes, part: bytes) -> bytes:
    """A file's bytes with one bit changed, inside a part that they hold."""
    changed = bytearray(whole)
    changed[whole.index(part) + len(part) // 2] ^= 1
    return bytes(changed)
