"""The numbers of shipped code on fixed inputs, kept beside the version of its card.

Cells are hashed by a card's key and version: code whose numbers change under one version would lend old cells' numbers
to new ones, unseen. This test only says that numbers changed; whether they are right, the tests of each loss say.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from torch import Tensor, nn

from kdbench import losses
from kdbench.engine.targets import import_target
from kdbench.errors import UserError
from kdbench.registry import Registry
from kdbench.signature import REQUIRED, Parameter, parameters
from kdbench.told import asked

FILE = Path(__file__).with_name("reference_values.json")
COMMAND = "python tests/unit/test_reference_values.py"
REGISTRY = Registry()
# Kinds whose code is a matter of milliseconds; sources, operations and data sets are not.
KINDS = ("losses", "connectors", "schedules", "optimizers", "models")
# No processor's rounding in float64 comes near it. Initial values are drawn in float32.
TOLERANCE, DRAWN = 1e-6, 1e-3
# Values of options that have no default, and of those whose default does nothing.
GIVEN: dict[str, Any] = {
    "at": ["30%", "60%"], "start": 0.2, "end": 0.7, "lr": 0.1, "known_classes": [0, 2, 3], "momentum": 0.9,
    "weight_decay": 0.01, "warmup": "20%", "levels": 4, "until": "50%", "label_smoothing": 0.1, "masked": 0.5,
    "correct": 0.7, "alpha": 0.7, "epochs": 2.5, "first": 0, "delta": 0.075, "confidence_temperature": 2.0,
    "smoothing": 0.3, "after": "40%", "factors": [0.5, 1.0, 0.2],
}  # fmt: skip
# Small ones of each function that is not another package's.
MODELS = (
    "wrn_10_1", "resnet8", "bss_resnet8", "resnet8x4", "vgg8", "mobilenetv2_half", "shufflenet_v1", "shufflenet_v2",
    "mobilenetv1",
)  # fmt: skip


# Behind a bottleneck: one layer, and logits.
TAIL = SimpleNamespace(
    at_layer=True,
    points=["layer3"],
    layers=lambda value: [value.mean((2, 3))[:, [0, 1, 2, 3, 0]]],
    logits=lambda value: value.mean((2, 3)),
)


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Uniform in (-1, 1), float64: the same bits everywhere."""
    return 2 * torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 1


def filled(module: nn.Module) -> nn.Module:
    """A module in float64 whose parameters are no matter of chance."""
    for number, parameter in enumerate(module.double().parameters()):
        fan = max(1, parameter.numel() // len(parameter)) if parameter.ndim else 1
        parameter.data = rand(*parameter.shape, seed=number + 1) / math.sqrt(fan) + (parameter.ndim == 1)
    return module


def digest(tensor: Tensor) -> float:
    """One number that every element's change changes."""
    flat = tensor.detach().double().flatten()
    return float((flat * (1.5 + rand(len(flat), seed=99))).sum())


def told(target: str, called: bool, width: int = 6, own: int | None = None) -> dict[str, Any]:
    """What code is told when it asks for it; `known_classes` counts as an option."""
    values: dict[str, Callable[[], Any]] = {
        "training_labels": lambda: torch.arange(6) % 5,
        "teacher_batch_norm": lambda: filled(nn.BatchNorm2d(4)),
        "student_classifier": lambda: filled(nn.Linear(own or width, 5)),
        "teacher_classifier": lambda: filled(nn.Linear(width, 5)),
        "batch_size": lambda: 8,
        "student_head": lambda: filled(nn.Linear(width, 3)),
        "teacher_head": lambda: filled(nn.Linear(width, 3)),
        "epoch": lambda: torch.tensor(3.0),
        "paraphraser": lambda: filled(losses.Paraphraser((4, 4, 4), rate=1.0)),
        "transform": lambda: filled(losses.FeatureTransform((4, 4, 4), (4, 4, 4), number=2)),
        "projector": lambda: filled(nn.Conv2d(4, 6, 1)),
        "bottleneck": lambda: filled(losses.Bottleneck((4, 6, 6), (6, 3, 3), TAIL)),
        "student_tail": lambda: TAIL,
    }
    return {name: values[name]() for name in asked(target, called) if name != "known_classes"}


def cases(kind: str, card: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Options to try: what must be given, and each other option once at another value."""
    # What the engine tells a loss is no option of a card, and this counts as one here.
    as_option = {name: p for name, p in parameters(card.target).items() if name == "known_classes"}
    known: dict[str, Parameter] = {**REGISTRY.settable(card), **as_option}
    needed = {p.name: GIVEN[p.name] for p in known.values() if p.default is REQUIRED and p.name in GIVEN}
    base = {**getattr(card, "args", {}), **needed}
    yield "", base
    # Another package's options come and go with its versions, which records name.
    for p in known.values() if card.target.startswith("kdbench.") else ():
        values: list[Any] = []
        if p.name in GIVEN:
            values = [GIVEN[p.name]]
        elif isinstance(p.default, bool):
            values = [not base.get(p.name, p.default)]
        elif get_origin(p.type) is Literal:
            values = [value for value in get_args(p.type) if value != p.default]
        elif isinstance(p.default, int | float):
            values = [p.default * 2 + 1]
        for value in values if p.name not in needed else []:
            yield f"{p.name}={value}", {**base, p.name: value}


def of_loss(card: Any, options: dict[str, Any]) -> dict[str, float]:
    """On logits, on maps and on several of these, those that it takes: its value, its gradient, and its metrics."""
    found = {}
    for what, shape in (
        ("logits", (6, 5)),
        ("maps", (6, 4, 4, 4)),
        ("several maps", (6, 4, 4, 4)),
        ("a student's all", (6, 4, 4, 4)),
        ("a student's maps and logits", (6, 4, 4, 4)),
        ("a map and logits", (6, 4, 4, 4)),
        ("fours", (8, 5)),
    ):
        if what in ("a map and logits", "fours") and found:
            continue
        student, teacher, other = (3 * rand(*shape, seed=seed) for seed in (1, 2, 3))
        values = {"student": student.requires_grad_(), "teacher": teacher, "other": other}
        values |= {"labels": torch.arange(len(student)) % 5}
        values |= {"index": torch.arange(len(student)), "mask": torch.arange(len(student)) % 3 > 0}
        sizes: list[Any] = [student.shape[1:], teacher.shape[1:]]
        if what == "several maps":
            values |= {name: [values[name], values[name].flip(1)] for name in ("student", "teacher")}
            sizes = [[size, size] for size in sizes]
        if what == "a map and logits":
            values |= {"student": [student], "teacher": [teacher, 3 * rand(6, 5, seed=4)]}
        if what.startswith("a student's"):
            if "teacher" in card.inputs:
                continue
            pooled = [student.mean(dim=(2, 3))] * (2 if what == "a student's all" else 1)
            values |= {"student": [student, student.flip(1), *pooled], "labels": torch.arange(6) % 4}
            sizes = [[one.shape[1:] for one in values["student"]]]
        inputs: list[Any] = [values[name] for name in card.inputs]
        loss = import_target(card.target)
        torch.manual_seed(0)  # of a loss that draws
        try:
            now = told(card.target, True, shape[1])
            if inspect.isclass(loss):
                value = filled(loss(*sizes, **told(card.target, called=False), **options))(*inputs, **now)
            else:
                value = loss(*inputs, **now, **options)
        except (ValueError, RuntimeError, IndexError, TypeError, AttributeError):
            continue
        # One that trains a module alone reads no student.
        trained = (
            student if "student" in card.inputs else next(p for module in now.values() for p in module.parameters())
        )
        (gradient,) = torch.autograd.grad(value, trained)
        found |= {what: float(value.detach()), f"gradient of {what}": digest(gradient)}
        found |= {f"{name} of {what}": float(import_target(target)(*inputs)) for name, target in card.metrics.items()}
    return found


def of_connector(card: Any, options: dict[str, Any]) -> dict[str, float]:
    found = {}
    for shapes in (((4, 6, 6), (6, 6, 6)), ((4, 6, 6), (6, 3, 3)), ((4, 3, 3), (6, 6, 6)), ((4, 6, 6), (4, 6, 6))):
        try:
            sizes = dict(zip(("student_shape", "teacher_shape"), shapes, strict=True))
            taken = {name: size for name, size in sizes.items() if name in parameters(card.target)}
            module = import_target(card.target)(**taken, **told(card.target, called=False, own=4), **options)
        except (ValueError, UserError):
            continue
        of = shapes[1] if [*taken] == ["teacher_shape"] else shapes[0]
        given = filled(module)(rand(3, *of))
        parts = given if isinstance(given, tuple) else (given,)
        found[f"{shapes[0]} to {shapes[1]}"] = digest(torch.cat([part.flatten() for part in parts]))
    return found


def of_schedule(card: Any, options: dict[str, Any]) -> dict[str, float]:
    schedule = import_target(card.target)(**options)
    return {f"at {at}": schedule.at(at, at, 4 * at) for at in (0.0, 0.1, 0.37, 0.65, 1.0)}


def of_optimizer(card: Any, options: dict[str, Any]) -> dict[str, float]:
    parameter = nn.Parameter(rand(8))
    needed = {"momentum": GIVEN["momentum"]} if options.get("nesterov") or options.get("delta") else {}
    optimizer = import_target(card.target)([parameter], **{"lr": GIVEN["lr"], **needed, **options})
    for step in range(3):
        parameter.grad = rand(8, seed=step)
        optimizer.step()
    return {"after 3 steps": digest(parameter)}


def of_model(name: str) -> dict[str, float]:
    options = REGISTRY.fields("models", name)
    torch.manual_seed(0)
    card = REGISTRY.card("models", name)
    model = import_target(card.target)(**{**card.args, **options}, classes=5, channels=3, image_size=32)
    drawn = sum(float(parameter.detach().double().pow(2).sum()) for parameter in model.parameters())
    return {"initial": drawn, "logits": digest(filled(model).eval()(rand(2, 3, 32, 32)))}


OF = {"losses": of_loss, "connectors": of_connector, "schedules": of_schedule, "optimizers": of_optimizer}


def measured(kind: str, name: str) -> dict[str, Any]:
    """A card's version, and its numbers."""
    if kind == "models":
        return {"version": REGISTRY.code(kind, name)["version"], **of_model(name)}
    card = REGISTRY.card(kind, name)
    found = {
        ", ".join(part for part in (what, where) if part): value
        for what, options in cases(kind, card)
        for where, value in OF[kind](card, options).items()
    }
    return {"version": REGISTRY.code(kind, name)["version"], **found}


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value if isinstance(value, int) else float(f"{value:.10g}") for key, value in found.items()}


def names(kind: str) -> tuple[str, ...] | list[str]:
    return MODELS if kind == "models" else REGISTRY.keys(kind)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in names(kind)])
def test_numbers_change_with_the_version_alone(kind: str, name: str) -> None:
    expected, found = json.loads(FILE.read_text(encoding="utf-8")).get(kind, {}).get(name, {}), measured(kind, name)
    renew = f"renew {FILE.name} with: {COMMAND}"
    assert len(found) > 1, f"{kind}: '{name}' takes none of the inputs that are tried here: add such"
    assert expected, f"{kind}: '{name}' has no reference values: {renew}"
    assert expected["version"] == found["version"], f"{kind}: '{name}' has another version than its values: {renew}"
    tolerance = {key: DRAWN if key == "initial" else TOLERANCE for key in found}
    other = {
        key: (expected.get(key), found.get(key))
        for key in {**expected, **found}
        if key not in expected
        or key not in found
        or not math.isclose(expected[key], found[key], rel_tol=tolerance[key], abs_tol=1e-9)
    }
    assert not other, (
        f"{kind}: '{name}' has other numbers: raise `version` on the card, then {renew}. Before and now: {other}"
    )


def test_every_function_of_a_model_is_among_them() -> None:
    targets = {tree.data["target"] for tree in REGISTRY.trees["models"].values()}
    others = {target for target in targets if ".external:" in target}
    assert targets - others <= {REGISTRY.card("models", name).target for name in MODELS}


if __name__ == "__main__":
    values = {kind: {name: rounded(measured(kind, name)) for name in names(kind)} for kind in KINDS}
    FILE.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
