"""Learning new classes from a network that knows others: loss, data, student, and images of the old classes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded import without
from shipped import REGISTRY
from test_deep_inversion import QUICK, files, member_in, pooled, prepared
from tiny import CPU, images, killed, shortened, teacher_for, train

from kdbench.engine.data.batches import Batches
from kdbench.engine.evaluation import evaluate
from kdbench.engine.finish import by_classes
from kdbench.engine.inputs import SourceFiles
from kdbench.engine.member import Member
from kdbench.engine.teachers.loading import fingerprint
from kdbench.errors import UserError
from kdbench.losses import kd, kd_over_classes
from kdbench.recipe.planning import plan
from kdbench.recipe.timeline import training_images

RECIPE: dict[str, Any] = {
    "data": {"name": "digits", "only_classes": [5, 6, 7, 8, 9], "per_class": 3},
    "teacher": "wrn_16_2_digits_0_to_4",
    "student": "wrn_16_2",
    "protocol": "digits",
}


def cell(method: Any, steps: int = 4) -> Any:
    return shortened(plan(RECIPE | {"method": method}, REGISTRY).cells[0].spec, steps, per_class=3)


def test_kd_over_classes_in_closed_form() -> None:
    teacher = torch.tensor([[0.6, 0.3, 99.0, 0.1]], dtype=torch.float64).log()
    student = torch.tensor([[0.2, 0.2, 0.5, 0.1]], dtype=torch.float64).log()
    among = 0.6 * math.log(0.6 / 0.4) + 0.3 * math.log(0.3 / 0.4) + 0.1 * math.log(0.1 / 0.2)
    of_all = 0.6 * math.log(0.6 / 0.2) + 0.3 * math.log(0.3 / 0.2) + 0.1 * math.log(0.1 / 0.1)
    known = [0, 1, 3]
    assert kd_over_classes(student, teacher, known).item() == pytest.approx(among, rel=1e-9)
    assert kd_over_classes(student, teacher, known, conditional=False).item() == pytest.approx(of_all, rel=1e-9)
    a, b = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    for conditional in (True, False):
        whole = kd_over_classes(a, b, None, 2.0, conditional)
        assert whole.item() == pytest.approx(kd(a, b, 2.0, scale=False).item(), rel=1e-9)
        assert kd_over_classes(a, b, [0, 1, 2, 3], 2.0, conditional).item() == pytest.approx(whole.item(), rel=1e-9)
        with pytest.raises(IndexError):
            kd_over_classes(a, b, [1, 4], 2.0, conditional)
        a.requires_grad_()
        assert torch.autograd.gradcheck(lambda v, c=conditional: kd_over_classes(v, b, [1, 3], 2.0, c), [a])


def test_training_is_of_some_classes_and_tests_of_all() -> None:
    spec = cell("finetune_new_classes")
    batches = Batches(spec, images(spec.data, per_class=6), CPU)
    assert sorted(batches.train.labels.unique().tolist()) == [5, 6, 7, 8, 9]
    assert len(batches.train.labels) == 15 == training_images(spec.data)
    assert sorted(batches.test.labels.unique().tolist()) == list(range(10))
    assert spec.teacher.known_classes == [0, 1, 2, 3, 4]


def test_classes_that_there_are_not_and_counts_that_are_not_said() -> None:
    for data, what in (
        ({"name": "digits", "only_classes": [3, 10], "per_class": 3}, "no class 10"),
        ({"name": "digits", "only_classes": [3]}, "needs 'per_class'"),
    ):
        with pytest.raises(UserError, match=what):
            plan(RECIPE | {"data": data, "method": "ce"}, REGISTRY)


def test_the_student_begins_with_what_the_teacher_knows() -> None:
    spec = cell("finetune_new_classes")
    teacher = teacher_for(spec)
    member = Member(spec, Batches(spec, images(spec.data, per_class=4), CPU), teacher, CPU)
    own, old = member.student.model.state_dict(), teacher.network.model.state_dict()
    for name, value in own.items():
        if name.startswith("fc."):
            assert torch.equal(value[:5], old[name][:5]) and (
                value.ndim == 1 or not torch.equal(value[5:], old[name][5:])
            )
        else:
            assert torch.equal(value, old[name])


def test_losses_are_told_the_classes() -> None:
    spec = cell("lwf_new_classes")
    teacher = teacher_for(spec)
    member = Member(spec, Batches(spec, images(spec.data, per_class=4), CPU), teacher, CPU)
    assert member.stage.terms["keep"].layers[0].told["known_classes"] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="unknown key 'known_classes'"):
        plan(
            RECIPE
            | {
                "method": {
                    "name": "lwf_new_classes",
                    "stages": {"new_classes": {"losses": {"keep": {"known_classes": [1]}}}},
                }
            },
            REGISTRY,
        )


def test_old_images_stand_beside_new_ones_and_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    spec = cell({"name": "deep_inversion_new_classes", **QUICK}, steps=4)
    teacher, whole, batches = pooled(spec, tmp_path)
    assert len(files(tmp_path)) == 2
    seen: list[Any] = []
    source: Any = whole.sources["new_classes"]
    made = source.sets
    source.sets = lambda moment: seen.append(made(moment)) or seen[-1]
    train(whole, batches, teacher, 4)
    assert [list(sets) for sets in seen] == [["old_images"]] * 4
    assert {int(label) for sets in seen for label in sets["old_images"].labels} <= {0, 1, 2, 3, 4}
    assert {"ce", "keep", "old"} <= set(whole.meter.result())
    second = killed(lambda: member_in(spec, teacher, tmp_path)[0], batches, teacher, tmp_path, at=2)
    assert fingerprint(second.student.model) == fingerprint(whole.student.model)


@pytest.mark.parametrize("method", ["finetune_new_classes", "lwf_new_classes", "deep_inversion_new_classes"])
def test_no_image_or_label_of_an_old_class_is_read(method: str, tmp_path: Path) -> None:
    spec = cell({"name": method, **(QUICK if method.startswith("deep") else {})}, steps=4)
    teacher = teacher_for(spec)
    if method.startswith("deep"):
        prepared(spec, teacher, tmp_path)
    old = list(range(5))
    batches = Batches(spec, without(images(spec.data, per_class=6), old), CPU)
    files = SourceFiles("abc", tmp_path / "cell", tmp_path / "shared")
    member = Member(spec, batches, teacher, CPU, files=files)
    train(member, batches, teacher, 4)
    assert evaluate(member)["test"]["accuracy"] >= 0 and member.finished
    # The guard guards: a cell that is given all classes, as the oracle's is, reads them.
    everything = plan(RECIPE | {"data": {"name": "digits", "per_class": 3}, "method": "ce"}, REGISTRY).cells[0].spec
    with pytest.raises(AssertionError, match="guarded value was read"):
        Batches(everything, without(images(spec.data, per_class=6), old), CPU).at(0, member.timeline)


def test_accuracies_of_both_groups() -> None:
    data = cell("ce").data
    labels = torch.tensor([5, 5, 6, 1, 2, 3, 4, 0])
    guessed = torch.tensor([5, 6, 6, 1, 1, 1, 1, 1])
    logits = torch.nn.functional.one_hot(guessed, 10).float()
    found = by_classes(data, logits, labels)
    assert found["trained_on"] == pytest.approx(200 / 3, rel=1e-5) and found["others"] == pytest.approx(20, rel=1e-5)
    assert by_classes(data.model_copy(update={"only_classes": None}), logits, labels) is None
    # A number that is none could not be recorded, and the cell would be lost after its last step.
    assert by_classes(data, logits[:3], labels[:3]) == {"trained_on": pytest.approx(200 / 3, rel=1e-5)}


def test_all_classes_are_no_choice_among_them() -> None:
    """Such a cell has no other classes to report, and is the one that says nothing of classes."""
    given = RECIPE | {"data": {"name": "digits", "only_classes": list(range(10)), "per_class": 3}, "method": "ce"}
    spec = plan(given, REGISTRY).cells[0].spec
    assert spec.data.only_classes is None and by_classes(spec.data, torch.zeros(2, 10), torch.tensor([0, 1])) is None
