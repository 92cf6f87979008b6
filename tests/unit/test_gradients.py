"""Gradients of the label's logit as hook points: what they are, that they can be differentiated again, and what is told
of a cell that reads them, counted and refused."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import two_ranks
from captured import cell, cohort_of, outcome, trained
from tensors import rand
from torch import Tensor, nn

from kdbench import losses
from kdbench.engine.checks.cells import check_cell
from kdbench.engine.computing.compute import Computing
from kdbench.engine.computing.estimate import Estimate
from kdbench.engine.computing.memory import memory_of
from kdbench.engine.program import Program, make_graphs
from kdbench.engine.workers.distributed import refuse
from kdbench.engine.workers.training import way_of
from kdbench.errors import UserError
from kdbench.models.hooks import Extractor, places
from kdbench.models.points import expand
from kdbench.recipe.planning import plan
from kdbench.registry import Registry

LABELS = torch.tensor([2, 0, 1])


class Small(nn.Module):
    """Logits of a layer with a ReLU between two matrices; the ReLU overwrites what it gets."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.first, self.relu, self.last = nn.Linear(12, 5), nn.ReLU(inplace), nn.Linear(5, 4, bias=False)
        self.aside = nn.Linear(12, 2)
        for number, parameter in enumerate(self.parameters()):
            parameter.data = rand(*parameter.shape, seed=number)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        self.aside(images.flatten(1))
        logits: Tensor = self.last(self.relu(self.first(images.flatten(1))))
        return logits


def small(**options: Any) -> Extractor:
    model = Small(**options)
    hooks = {"layer1.preact": "first", "layer1": "relu", "pooled": "aside"}
    return Extractor(model, places(model, hooks, "small", (3, 2, 2)), "small")


def images() -> Tensor:
    return rand(3, 3, 2, 2, seed=8)


def test_names_stand_for_all_layers_or_for_the_images() -> None:
    known = ["layer1", "layer2", "pooled", "logits"]
    assert expand(["layers.gradient", "images.gradient"], known) == [
        "layer1.gradient",
        "layer2.gradient",
        "images.gradient",
    ]
    assert expand(["layers.last.gradient"], known) == ["layer2.gradient"]
    for wrong, told in {
        "layer3.gradient": "'layer3'",
        "logits.gradient": "'logits.gradient'",
        "images": "'images'",
    }.items():
        with pytest.raises(UserError, match=f"has no .*{told}"):
            expand([wrong], known)
    several = ["teacher1.layer1", "teacher2.layer1", "logits"]
    with pytest.raises(UserError, match=r"has no 'teacher2.layer1.gradient': several teachers have one gradient"):
        expand(["teacher2.layer1.gradient"], several)


def test_gradients_are_those_of_a_closed_form_also_by_what_is_overwritten() -> None:
    network, x = small(), images()
    model: Any = network.model
    found = network(x, ["images.gradient", "layer1.preact.gradient", "layer1.gradient", "layer1.preact"], LABELS)
    of_layer = model.last.weight[LABELS]
    by_preact = of_layer * (found["layer1.preact"] > 0)
    assert found["layer1.preact"].min() < 0
    torch.testing.assert_close(found["layer1.gradient"], of_layer)
    torch.testing.assert_close(found["layer1.preact.gradient"], by_preact)
    torch.testing.assert_close(found["images.gradient"], (by_preact @ model.first.weight).view_as(x))
    # A gradient by shares of the classes is that of both logits, each by its share.
    shares = torch.tensor([[0.3, 0.7, 0.0, 0.0]], dtype=torch.float64).expand(3, 4)
    mixed = network(x, ["layer1.gradient"], shares)["layer1.gradient"]
    torch.testing.assert_close(mixed, (shares @ model.last.weight))
    assert network.shapes((3, 2, 2))["images.gradient"] == (3, 2, 2)


def test_they_are_differentiated_again_as_differences_say() -> None:
    """By a weight and by the images' own network alone: nothing reaches the teacher."""
    student, teacher, x = small(), small(), images()
    model: Any = student.model
    teacher.model.requires_grad_(False)
    with torch.no_grad():
        for parameter in teacher.model.parameters():
            parameter.neg_()
        taught = teacher(x, ["images.gradient"], LABELS)["images.gradient"]
    assert not taught.requires_grad

    def loss() -> Tensor:
        found = student(x, ["images.gradient", "logits"], LABELS)
        return losses.jacobian_matching(found["images.gradient"], taught) + found["logits"].square().mean()

    (gradient,) = torch.autograd.grad(loss(), model.first.weight)
    for place in ((0, 0), (3, 7), (4, 11)):
        sides = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                model.first.weight[place] += step
            sides.append(loss().item())
            with torch.no_grad():
                model.first.weight[place] -= step
        assert gradient[place].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize(
    ("point", "labels", "told"),
    [
        ("layer1.gradient", None, "read an input set whose images have labels"),
        ("pooled.gradient", LABELS, "logits of model 'small' do not depend on its hook point 'pooled'"),
        ("layer2.gradient", LABELS, "has no hook point 'layer2'"),
    ],
)
def test_a_gradient_that_there_is_not(point: str, labels: Tensor | None, told: str) -> None:
    with pytest.raises(UserError, match=told):
        small()(images(), [point], labels)


def test_jacobian_matching_is_the_chord_of_an_angle() -> None:
    angles = torch.tensor([0.0, 0.3, 3.1], dtype=torch.float64)
    student = 5 * torch.stack([angles.cos(), angles.sin(), 0 * angles], dim=1)
    teacher = torch.tensor([[0.1, 0.0, 0.0]], dtype=torch.float64).expand(3, 3)
    expected = (2 - 2 * angles.cos()).mean().item() / 3
    assert losses.jacobian_matching(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("with_feature", [False, True])
def test_attention_distillation_is_that_of_a_loop(with_feature: bool) -> None:
    sides = [[rand(3, c, 2, 3, seed=seed) for seed in (c, c + 1)][: 1 + with_feature] for c in (4, 6)]
    units = []
    for side in sides:
        gradient, weighted = side[0], side[-1]
        flat = []
        for n in range(3):
            weights = [gradient[n, c].mean() for c in range(gradient.shape[1])]
            summed = sum(w * weighted[n, c] for c, w in enumerate(weights))
            positive = summed.clamp(min=0).flatten()  # type: ignore[union-attr]
            flat.append(positive / positive.square().sum().sqrt())
        units.append(torch.stack(flat))
    expected = (units[0] - units[1]).abs().sum().item() / (3 * 2 * 3)
    assert losses.attention_distillation(*sides).item() == pytest.approx(expected, rel=1e-12)


def test_attention_distillation_takes_one_map_or_two() -> None:
    one, other = rand(2, 3, 4, 4, seed=1), rand(2, 3, 2, 2, seed=2)
    for student, teacher in (([one], [one, one]), ([one] * 3, [one] * 3), ([one, other], [one, one])):
        with pytest.raises(ValueError, match="attention_distillation"):
            losses.attention_distillation(student, teacher)


@pytest.mark.parametrize("methods", [("jacobian", "kd"), ("lwm", "at")])
def test_members_that_read_gradients_leave_the_others_as_they_are(methods: tuple[str, str], tmp_path: Path) -> None:
    alone = [cohort_of([cell(method, steps=4)], tmp_path / method) for method in methods]
    together = cohort_of([cell(method, steps=4) for method in methods], tmp_path / "together")
    for cohort in (*alone, together):
        trained(Program([cohort]))
    assert outcome(together) == [outcome(cohort)[0] for cohort in alone]


def test_a_record_says_why_nothing_was_compiled(tmp_path: Path) -> None:
    """Networks whose gradients are read; not those of other members."""
    specs = [cell(method, steps=4) for method in ("jacobian", "kd")]
    cohort = cohort_of(specs, tmp_path, computing=Computing(compile=True))
    members = [one.member for one in cohort.cells]
    assert cohort.teacher is not None
    cohort.teacher.network.computing = members[0].computing
    make_graphs(members)
    ways = [way_of(member, Program([cohort])) for member in members]
    assert "a loss reads gradients" in ways[0]["not_compiled"] and "not_compiled" not in ways[1]
    # What is alike is compiled together, for what may be asked of a graph.
    networks = [*(member.student for member in members), cohort.teacher.network]
    assert [[*network.graphs] for network in networks] == [[frozenset({"logits"})]] * 3


# A loss on the images of another domain.
ON_TARGET: dict[str, Any] = {"stages": {"classification": {"losses": {"lwm": {"input": "target"}}}}}


def planned(student: Any = "wrn_10_1", **method: Any) -> Any:
    recipe = {"data": "digits", "teacher": "wrn_16_2_digits", "student": student, "protocol": "digits"}
    recipe |= {"target": "mnist_8"} if "stages" in method else {}
    return plan(recipe | {"method": method}, Registry()).cells[0].spec


@pytest.mark.parametrize(
    ("student", "method", "told"),
    [
        ({"name": "wrn_10_1", "image_size": 16}, {"name": "jacobian"}, "student: images.gradient (1, 16, 16)"),
        ("wrn_10_1", {"name": "lwm", "hook": ["layer2", "layer2.gradient"]}, "its gradients stand behind"),
        ("wrn_10_1", {"name": "lwm", "hook": "layer2.gradient"}, "takes lists of maps"),
        ("wrn_10_1", {"name": "lwm", **ON_TARGET}, "images of the input set 'target' have no labels"),
        ("wrn_10_1", {"name": "lwm", "hook": ["layer9.gradient"]}, "has no hook point 'layer9'"),
        ("wrn_10_1", {"name": "lwm", "hook": ["logits.gradient"]}, "has no 'logits.gradient'"),
    ],
)
def test_what_cannot_be_is_told_before_training(student: Any, method: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        check_cell(planned(student, **method))
    assert told in f"{error.value} {error.value.hint}"


def test_attention_is_differentiated_twice_where_it_is_computed_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2}
    spec = planned({"name": "timm:vit_tiny_patch16_224", "options": options}, name="jacobian")
    check_cell(spec)
    # As a user's own layers may be: torch's other ways to compute attention have no second derivative.
    monkeypatch.setattr("kdbench.models.hooks.sdpa_kernel", lambda way: nullcontext())
    with pytest.raises(UserError, match="reads images.gradient of model 'timm:vit.*', of which torch has no gradient"):
        check_cell(spec)


def test_synchronized_batch_norms_are_refused() -> None:
    """torch has no second derivative of them. Those in eval mode are as any others."""
    for method in ("jacobian", "lwm"):
        refuse(two_ranks.cell(method, still=False), 2)
        refuse(two_ranks.cell(method), 2, sync_batch_norm=True)
        with pytest.raises(UserError, match="the loss '(jacobian|lwm)' reads gradients"):
            refuse(two_ranks.cell(method, still=False), 2, sync_batch_norm=True)
    refuse(two_ranks.cell("at", still=False), 2, sync_batch_norm=True)
    # Those of a teacher that a term trains too.
    spec = two_ranks.cell("lwm")
    stage = spec.method.stages["classification"]
    modes = stage.modes.model_copy(update={"teacher": "train"})
    for detach in (True, False):
        terms = {name: term.model_copy(update={"detach": detach}) for name, term in stage.losses.items()}
        stages = {"classification": stage.model_copy(update={"losses": terms, "modes": modes})}
        changed = spec.model_copy(update={"method": spec.method.model_copy(update={"stages": stages})})
        with nullcontext() if detach else pytest.raises(UserError, match="the loss 'lwm' reads gradients"):
            refuse(changed, 2, sync_batch_norm=True)


def test_passes_back_to_the_images_are_counted() -> None:
    estimate = Estimate(torch.device("cpu"), rate=1e9)
    plain, reading = planned(name="kd"), planned(name="jacobian")
    tests = plain.data.test * estimate.size(*plain.networks["student"]).forward * plain.evaluations
    assert estimate.cell(reading) - tests == pytest.approx(2.5 * (estimate.cell(plain) - tests))
    assert estimate.passes(reading) == 2 * estimate.passes(plain)
    device = torch.device("cpu")
    plain_memory, memory = memory_of(plain, device), memory_of(reading, device)
    # At the least the eight maps of WRN-16-2's first stage, 32 channels of 8 × 8, for each image.
    assert memory.teacher - plain_memory.teacher > plain.protocol.batch_size * 8 * 32 * 8 * 8 * 4
    assert memory.step > 1.5 * plain_memory.step
