"""Every card and recipe is used for two steps a stage, so that nothing can be added untested."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from card_checks import check_card
from shipped import REGISTRY
from tiny import images, member_of, networks_for, shortened, small, target_for, train
from torch import Tensor, nn

from kdbench.cards import KINDS
from kdbench.engine.checks.cells import Known, check_cell
from kdbench.engine.computing.memory import memory_of
from kdbench.engine.teachers.loading import fingerprint
from kdbench.recipe.loading import recipe_names
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec

CARDS = [(kind, name) for kind in KINDS for name in REGISTRY.names(kind)]
METHODS = REGISTRY.names("methods")


def two_steps(spec: CellSpec) -> CellSpec:
    """A cell with two small steps a stage, on few and small images, in which budgets and subsets make no difference."""
    stages = len(spec.method.stages)
    spec = shortened(spec, steps=2 * stages)
    equal = {
        name: small(stage.model_copy(update={"share": 1 / stages if i < stages - 1 else None}), always=True)
        for i, (name, stage) in enumerate(spec.method.stages.items())
    }
    # Larger pictures would take a minute each, and show no more of a recipe; a ConvNeXt shrinks them 32 times.
    shrinks = spec.teacher is not None and "convnext" in spec.teacher.model.name
    size = min(spec.data.image_size, 32 if shrinks else 16)
    fewer = {"image_size": size, "streamed": False}
    return spec.model_copy(
        update={
            "method": spec.method.model_copy(update={"stages": equal}),
            "data": spec.data.model_copy(update=fewer),
            "target": spec.target and spec.target.model_copy(update=fewer),
        }
    )


def cells() -> dict[str, dict[str, CellSpec]]:
    """Recipe -> its cells, with two steps a stage. Those that another recipe has too are left out."""
    seen: set[str] = set()
    found: dict[str, dict[str, CellSpec]] = {}
    for name in recipe_names():
        found[name] = {}
        for cell in plan(name, REGISTRY, ("seeds=1",), weights_must_exist=False).cells:
            spec = two_steps(cell.spec)
            if (identity := spec.identity()) not in seen:
                seen.add(identity)
                found[name][cell.slug] = spec
    return found


def shown(recipe: str, spec: CellSpec) -> set[str]:
    """What training a cell shows: its recipe, its two networks, and its method and each stage of it in whatever form a
    recipe gives it, but for the numbers in it."""
    teacher = spec.teacher and spec.teacher.model.name
    rest = spec.method.model_dump_json(exclude={"label", "stages"})
    forms = [rest, *(stage.model_dump_json() for stage in spec.method.stages.values())]
    return {recipe, f"{teacher} {spec.student.name}"} | {re.sub(r"\d+(\.\d+)?(e-?\d+)?", "0", form) for form in forms}


def covering(cells: dict[str, dict[str, CellSpec]]) -> dict[str, CellSpec]:
    """So many cells that whatever one of them shows is shown."""
    of = {f"{name}-{slug}": (name, spec) for name, specs in cells.items() for slug, spec in specs.items()}
    shows = {key: shown(*one) for key, one in of.items()}
    missing: set[str] = set().union(*shows.values())
    chosen = {}
    while missing:
        key = max(shows, key=lambda key: len(shows[key] & missing))
        chosen[key] = of[key][1]
        missing -= shows[key]
    return chosen


CELLS = cells()
TRAINED = covering(CELLS)


@pytest.mark.parametrize(("kind", "name"), CARDS, ids=[f"{kind}-{name}" for kind, name in CARDS])
def test_card_is_sound(kind: str, name: str) -> None:
    check_card(REGISTRY, kind, name)


@torch.no_grad()
def measure_statistics(model: nn.Module, images: Tensor) -> None:
    """Have the batch norms of an untrained teacher know what comes to them: a deep one's features overflow else."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    model.train()(images)
    model.eval()


def train_two_steps(spec: CellSpec) -> None:
    member, batches, teacher = member_of(spec)
    if teacher is not None:
        measure_statistics(teacher.network.model, teacher.network.normalizer(images(spec.data).train_images))
    before = fingerprint(teacher.network.model) if teacher else None
    for span in member.timeline.spans:
        assert span.steps == 2
        terms = member.modules.terms[f"stage:{span.name}"]
        connectors = {k: v.clone() for k, v in terms.state_dict().items()}
        modules = {name: copy.deepcopy(module.state_dict()) for name, module in member.modules.of_method.items()}
        trains = spec.method.stages[span.name].trains
        networks = {"student": member.student, "teacher": member.modules.own_teacher}
        learns = {name: net.model for name, net in networks.items() if net is not None and name in trains}
        assert learns or connectors or modules
        values = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in learns.items()}
        train(member, batches, teacher, 2)
        changed = {k for k, v in terms.state_dict().items() if not torch.equal(v, connectors[k])}
        if "connectors" in trains:
            assert changed or not connectors, f"stage {span.name}: the connectors did not learn"
        else:
            assert not changed, f"stage {span.name}: {changed} changed although not trained"
        for name, module in member.modules.of_method.items():
            moved = any(not torch.equal(v, modules[name][k]) for k, v in module.state_dict().items())
            assert moved == (name in trains), f"stage {span.name}: module {name}"
        for name, model in learns.items():
            assert any(not torch.equal(v, values[name][k]) for k, v in model.state_dict().items()), name
    member.check_finite()
    assert member.finished
    if teacher:
        assert fingerprint(teacher.network.model) == before, "the frozen teacher changed"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method: str) -> None:
    recipe = {
        "data": {"name": "digits", "validation": 100},
        **networks_for(method),
        "protocol": "digits",
        "method": method,
    } | target_for(method, REGISTRY)
    spec = plan(recipe, REGISTRY).cells[0].spec
    assert memory_of(spec, torch.device("cpu"), check_cell(spec)).step > 0
    train_two_steps(two_steps(spec))


@pytest.mark.parametrize("recipe", [name for name, specs in CELLS.items() if specs])
def test_every_cell_of_every_recipe_can_be_built_and_computed(recipe: str) -> None:
    known: Known = {}
    for spec in CELLS[recipe].values():
        check_cell(spec, known)


@pytest.mark.parametrize("name", TRAINED)
def test_every_recipe_trains(name: str) -> None:
    train_two_steps(TRAINED[name])
