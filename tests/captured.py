"""Cells that train eagerly and by recorded steps, to be compared: on the CPU by a stand-in, on a GPU by CUDA graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shipped import REGISTRY
from standin import StandIn
from tiny import CPU, images, networks_for, shortened, target_for, untrained_teacher
from torch.nn import functional as F

from kdbench.engine.cell import TrainingCell
from kdbench.engine.computing import capture
from kdbench.engine.computing.capture import CapturedProgram
from kdbench.engine.computing.compute import REFERENCE, Computing
from kdbench.engine.data.batches import Batches
from kdbench.engine.log import MetricsLog
from kdbench.engine.loop import TrainingLoop
from kdbench.engine.member import Member
from kdbench.engine.program import Cohort, Program
from kdbench.engine.teachers.loading import fingerprint
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec

METHODS = REGISTRY.names("methods")
STEPS = 8


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages of a few steps are worth recording here."""
    monkeypatch.setattr(capture, "FEWEST", 3)


def cell(method: str | dict[str, Any], steps: int = STEPS, batch: int = 2, **more: Any) -> CellSpec:
    """A cell whose stages have so many steps each."""
    name = method if isinstance(method, str) else method["name"]
    recipe = {
        # With all that a method may need: validation images, and a route of the teacher.
        "data": {"name": "digits", "validation": 100},
        **networks_for(name),
        # At the protocol's rate some losses' published weights are too much for a made-up teacher.
        "protocol": {
            "name": "digits",
            "augmentation": {"padding": 1, "mode": "reflect", "flip": True},
            "optimizer": {"lr": 0.02},
        },
        "method": method,
    }
    spec = plan(recipe | target_for(name, REGISTRY) | more, REGISTRY).cells[0].spec
    n = len(spec.method.stages)
    spec = shortened(spec, steps=steps * n, batch=batch)
    equal = {
        name: stage.model_copy(update={"share": 1 / n if i < n - 1 else None})
        for i, (name, stage) in enumerate(spec.method.stages.items())
    }
    return spec.model_copy(update={"method": spec.method.model_copy(update={"stages": equal}), "evaluations": 0})


# Images that are mixed, and an average of the weights.
MIXED: dict[str, Any] = {
    "name": "digits",
    "augmentation": {"padding": 1, "flip": True, "mix": {"mixup": 0.5, "cutmix": 1.0}},
    "ema": 0.9,
    "optimizer": {"lr": 0.02},
}


def evaluated(spec: CellSpec, evaluations: int = 5) -> CellSpec:
    return spec.model_copy(update={"evaluations": evaluations})


def cohort_of(
    specs: list[CellSpec],
    folder: Path,
    device: torch.device = CPU,
    per_class: int = 24,
    computing: Computing = REFERENCE,
) -> Cohort:
    data = images(specs[0].data, per_class=per_class)
    target = images(specs[0].target, per_class=8, seed=1) if specs[0].target else None
    batches = Batches(specs[0], data, device, target)
    teacher = next((t for t in (untrained_teacher(spec, device) for spec in specs) if t), None)
    cells = []
    for i, spec in enumerate(specs):
        member = Member(spec, batches, teacher if spec.teacher else None, device, computing)
        cells.append(TrainingCell(member, folder / str(i), {}, MetricsLog(folder / str(i), [], tensorboard=False)))
    return Cohort(batches, teacher, cells)


def with_dropout(cohort: Cohort) -> None:
    for one in cohort.cells[:1]:
        model: Any = one.member.student.model
        model.fc.register_forward_pre_hook(lambda module, args: F.dropout(args[0], 0.3, module.training))


def with_drop_rate(cohort: Cohort) -> None:
    """timm's own dropout, before the last layer."""
    for one in cohort.cells:
        model: Any = one.member.student.model
        assert model.drop_rate == 0.0
        model.drop_rate = 0.3


def by_step(member: Member) -> dict[str, str]:
    """Stages of a member that say that the host must act at every step, and why."""
    acting = {
        name: [member.sources.get(name), *(term.loss for term in stage.losses.values())]
        for name, stage in member.spec.method.stages.items()
    }
    said = {name: [one.by_step for one in ones if one is not None and one.by_step] for name, ones in acting.items()}
    if member.device.type == "cpu":
        for name, stage in member.spec.method.stages.items():
            said[name] += ["its optimizer takes its rates from the host"] * (stage.optimizer.name != "sgd")
    return {name: why[0] for name, why in said.items() if why}


def trained(program: Program, stop: Callable[[], bool] = lambda: False) -> None:
    TrainingLoop(program, lambda cell: None, lambda cell: None, stop).run()
    for cohort in program.cohorts:
        assert [cell.failure for cell in cohort.cells] == [None] * len(cohort.cells)


def metrics(cohort: Cohort) -> list[list[dict[str, Any]]]:
    """What was measured on the way, without times."""
    timeless = ("images_per_second", "seconds")
    return [
        [{key: v for key, v in entry.items() if key not in timeless} for entry in cell.member.log.history]
        for cell in cohort.cells
    ]


def modules(cell: TrainingCell) -> list[torch.nn.Module]:
    """All that training changes."""
    member = cell.member
    return [
        member.student.model,
        member.answers.model,
        member.modules.terms,
        *([member.modules.own_teacher.model] if member.modules.own_teacher else []),
    ]


def outcome(cohort: Cohort) -> list[Any]:
    """All that training leaves: weights, and what was measured on the way."""
    cells = zip(cohort.cells, metrics(cohort), strict=True)
    return [([fingerprint(module) for module in modules(cell)], measured) for cell, measured in cells]


def farthest(a: Cohort, b: Cohort) -> tuple[float, str]:
    """How far one of two trainings' weights is off at most, as a share of its tensor's largest value, and where."""
    found = [(0.0, "nothing")]
    for one, other in zip(a.cells, b.cells, strict=True):
        for module, twin in zip(modules(one), modules(other), strict=True):
            for (name, value), (_, there) in zip(module.state_dict().items(), twin.state_dict().items(), strict=True):
                if value.numel():
                    off = (value.double() - there.double()).abs().max() / value.double().abs().max().clamp(min=1e-3)
                    where = f"{one.member.spec.method.name}: {name}"
                    found.append((float(off) if off.isfinite() else float("inf"), where))
    return max(found)


def assert_near(a: Cohort, b: Cohort, tolerance: float) -> None:
    """The same up to a share of each tensor's largest value, for arithmetic whose order is not settled."""
    off, where = farthest(a, b)
    assert off <= tolerance, f"{where} is off by {off:.2g}"


def both(
    specs: list[CellSpec],
    folder: Path,
    recorder: Any = None,
    change: Callable[[Cohort], None] = lambda cohort: None,
    device: torch.device = CPU,
    per_class: int = 24,
    same: Callable[[Cohort, Cohort], None] | None = None,
) -> CapturedProgram:
    """Train cells eagerly and by recorded steps, and compare. Returns the program that recorded, with the stand-in
    if no recorder is given."""
    eager, recorded = (cohort_of(specs, folder / name, device, per_class) for name in ("eager", "recorded"))
    for cohort in (eager, recorded):
        change(cohort)
    trained(Program([eager]))
    program = CapturedProgram([recorded], recorder or StandIn())
    trained(program)
    (same or assert_same)(recorded, eager)
    return program


def assert_same(a: Cohort, b: Cohort) -> None:
    assert outcome(a) == outcome(b)


def resumed(
    specs: list[CellSpec], folder: Path, recorder: Callable[[], Any], at: int, device: torch.device = CPU
) -> Cohort:
    """Cells that were stopped after some steps and went on from their states in another program."""
    first = cohort_of(specs, folder / "first", device)
    (any_cell, *_) = first.cells
    trained(CapturedProgram([first], recorder()), lambda: any_cell.member.step >= at)
    assert any_cell.member.step == at
    second = cohort_of(specs, folder / "second", device)
    for cell, before in zip(second.cells, first.cells, strict=True):
        cell.member.load_state(copy.deepcopy(before.member.state()))
    trained(CapturedProgram([second], recorder()))
    return second
