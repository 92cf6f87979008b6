"""Steps of several input sets: made by a source, read by name, with a teacher that may train, and never by accident."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CPU, member_of, shortened, step, train
from torch.nn import functional as F

from kdbench.engine.computing.estimate import Estimate
from kdbench.engine.member import Member
from kdbench.engine.teachers.loading import fingerprint
from kdbench.errors import UserError
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec
from kdbench.registry import Registry

RECIPE: dict[str, Any] = {"data": "digits", "teacher": "wrn_16_2_digits", "student": "wrn_10_1", "protocol": "digits"}

SOURCE = '''
import torch
from kdbench.engine.data.batch import Batch
from kdbench.engine.inputs import Cost, Source

class Mirrored(Source):
    """The data set's images, mirrored, as pixel values."""
    calls = 0

    def __init__(self, place, *, shift: float = 0.0) -> None:
        self.place, self.shift, self.drawn = place, shift, 0

    def sets(self, moment):
        Mirrored.calls += 1
        self.drawn += 1
        batch = moment.sets["data"]
        assert all("logits" in moment.values[network]["data"] for network in ("student", "teacher"))
        images = batch.images.flip(3).float() / 255 + self.shift * self.drawn
        return {"mirror": Batch(images, batch.labels, mask=batch.labels % 2 == 0)}

    def state(self):
        return {"drawn": self.drawn}

    def load_state(self, state):
        self.drawn = state["drawn"]

class Attacked(Mirrored):
    """Asks the teacher, where there is one."""

    def cost(self, steps):
        return Cost(teacher=100.0 * steps)

def distance(student, teacher):
    return (student - teacher).square().mean()
'''

CARDS = """
sources:
  mirrored: {target: "mirrored_source:Mirrored", reads: [data], gives: [mirror]}
  attacked: {target: "mirrored_source:Attacked", reads: [data], gives: [mirror], teacher: false}
losses:
  distance: {target: "mirrored_source:distance", inputs: [student, teacher]}
methods:
  base:
    title: base
    stages:
      - name: training
        source: mirrored
        losses:
          ce: {loss: cross_entropy}
          mirror: {loss: kd, input: mirror, weight: 0.5}
  untaught:
    title: untaught
    stages:
      - name: training
        source: attacked
        losses:
          ce: {loss: cross_entropy, input: mirror}
"""


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    (tmp_path / "mirrored_source.py").write_text(SOURCE)
    (tmp_path / "cards.yaml").write_text(CARDS)
    return Registry([tmp_path])


def cell(registry: Registry, stage: dict[str, Any] | None = None, steps: int = 4) -> CellSpec:
    method = {"name": "base", "stages": {"training": stage or {}}}
    return shortened(plan(RECIPE | {"method": method}, registry).cells[0].spec, steps)


def calls() -> int:
    import sys

    return int(sys.modules["mirrored_source"].Mirrored.calls)


def test_terms_read_the_input_set_that_they_name(registry: Registry) -> None:
    member, batches, teacher = member_of(cell(registry))
    assert teacher is not None
    batch = batches.at(0, member.timeline)
    pixels = batch.images.float() / 255
    own, taught = member.student.normalizer(pixels.flip(3)), teacher.network.normalizer(pixels.flip(3))
    model = member.student.model.train()
    with torch.no_grad():
        ce = F.cross_entropy(model(member.student.normalizer(pixels)), batch.labels)
        student = F.log_softmax(model(own) / 4, dim=1)
        kl = 16 * F.kl_div(student, F.softmax(teacher.network.model(taught) / 4, dim=1), reduction="batchmean")
    member, batches, teacher = member_of(cell(registry))
    step(member, batches, teacher)
    # The KL of first weights is a small difference of float32 logarithms: processors differ in its fifth digit.
    assert member.meter.result() == pytest.approx(
        {"ce": ce.item(), "mirror": kl.item(), "loss": (ce + kl / 2).item()}, rel=1e-4
    )


def test_what_counts_nothing_is_neither_made_nor_computed(registry: Registry) -> None:
    schedule = {"name": "multistep", "at": ["50%"], "gamma": 0.0}
    member, batches, teacher = member_of(cell(registry, {"losses": {"mirror": {"weight_schedule": schedule}}}))
    before = calls()
    train(member, batches, teacher, 4)
    assert calls() - before == 2
    assert member.meter.counts == {"ce": 4, "mirror": 2, "loss": 4}


@pytest.mark.parametrize("policy", ["shared", "frozen", "separate"])
def test_batch_norms_treat_a_made_set_as_the_stage_says(registry: Registry, policy: str) -> None:
    """`shared` is two updates of the running statistics a step, the others are one; `frozen` uses these statistics."""
    stage = {"batch_norm": {"mirror": policy}, "source": {"name": "mirrored", "shift": 0.3}}
    member, batches, teacher = member_of(cell(registry, stage))
    seen: list[tuple[bool, torch.Tensor]] = []
    norm = next(m for m in member.student.model.modules() if isinstance(m, torch.nn.BatchNorm2d))

    def look(module: torch.nn.Module, _: Any, out: torch.Tensor) -> None:
        # The extractor's first look at its network is on two images.
        if len(out) == 8:
            seen.append((module.training, out.mean(dim=(0, 2, 3))))

    norm.register_forward_hook(look)
    step(member, batches, teacher)
    assert norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == (2 if policy == "shared" else 1)
    assert [training for training, _ in seen] == [True, policy != "frozen"]
    # With the batch's own statistics every channel's mean is its bias (0 at first), however far the images are shifted.
    own = bool(seen[1][1].abs().max() < 1e-4)
    assert own == (policy != "frozen")
    assert norm.training and norm.track_running_stats


def trained_teacher(registry: Registry, detach: bool, weight: float = 1.0) -> CellSpec:
    return cell(
        registry,
        {
            "trains": ["student", "teacher"],
            "modes": {"teacher": "train"},
            "teacher_optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
            "losses": {
                "distance": {"loss": "distance", "detach": detach},
                "teacher_ce": {"loss": "cross_entropy", "of": "teacher", "weight": weight},
            },
        },
    )


def test_a_teacher_trains_on_its_own_losses_in_a_copy(registry: Registry) -> None:
    member, batches, teacher = member_of(trained_teacher(registry, detach=True))
    assert teacher is not None and member.modules.own_teacher is not None
    shared = fingerprint(teacher.network.model)
    assert fingerprint(member.modules.own_teacher.model) == shared
    step(member, batches, teacher)
    assert fingerprint(teacher.network.model) == shared
    assert fingerprint(member.modules.own_teacher.model) != shared
    # Its gradient is that of its own loss alone: the student's terms do not reach it.
    other, batches, teacher = member_of(trained_teacher(registry, detach=True))
    assert teacher is not None and other.modules.own_teacher is not None
    batch = batches.at(0, other.timeline)
    model = other.modules.own_teacher.model
    F.cross_entropy(model(teacher.network.normalizer(batch.images)), batch.labels).backward()
    for a, b in zip(member.modules.own_teacher.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_an_attached_teacher_is_trained_by_the_students_terms_too(registry: Registry) -> None:
    (a, batches, teacher), (b, _, _) = (member_of(trained_teacher(registry, detach)) for detach in (True, False))
    for member in (a, b):
        step(member, batches, teacher)
    assert a.modules.own_teacher is not None and b.modules.own_teacher is not None
    pairs = zip(a.modules.own_teacher.model.parameters(), b.modules.own_teacher.model.parameters(), strict=True)
    assert max(float((p.grad - q.grad).abs().max()) for p, q in pairs) > 1e-4


@pytest.mark.parametrize("trains", [False, True])
def test_a_resumed_member_goes_on_bit_for_bit(registry: Registry, trains: bool) -> None:
    """With a source that remembers something, and with a teacher in training."""
    spec = trained_teacher(registry, detach=True) if trains else cell(registry)
    stage = spec.method.stages["training"]
    assert stage.source is not None
    source = stage.source.model_copy(update={"options": {"shift": 0.1}})
    stages = {"training": stage.model_copy(update={"source": source})}
    spec = spec.model_copy(update={"method": spec.method.model_copy(update={"stages": stages})})
    whole, batches, teacher = member_of(spec)
    train(whole, batches, teacher, 4)
    first, _, _ = member_of(spec)
    train(first, batches, teacher, 2)
    second = Member(spec, batches, teacher, CPU)
    second.load_state(first.state())
    train(second, batches, teacher, 2)
    assert fingerprint(second.student.model) == fingerprint(whole.student.model)
    if trains:
        assert second.modules.own_teacher is not None and whole.modules.own_teacher is not None
        assert fingerprint(second.modules.own_teacher.model) == fingerprint(whole.modules.own_teacher.model)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"losses": {"ce": {"input": "mirrored"}}}, "there is no input set 'mirrored'"),
        ({"batch_norm": {"mirrow": "frozen"}}, "there is no input set 'mirrow'"),
        ({"losses": {"ce": {"against": "mirror"}}}, "takes no second input set"),
        ({"losses": {"ce": {"of": "teacher"}}}, "has 'of: teacher', but this stage does not train"),
        ({"trains": ["student", "teacher"]}, "trains the teacher, but no loss has 'of: teacher'"),
        ({"source": "mirored"}, "unknown source 'mirored'"),
    ],
)
def test_mistakes_are_told_before_anything_is_built(registry: Registry, stage: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cell(registry, stage)


def test_a_source_that_would_ask_a_teacher_costs_nothing_without_one(registry: Registry) -> None:
    recipe = {key: value for key, value in RECIPE.items() if key != "teacher"}
    spec = plan(recipe | {"method": "untaught"}, registry).cells[0].spec
    assert spec.teacher is None
    assert Estimate(CPU, timed=False).cell(spec) == 0
