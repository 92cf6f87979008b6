"""Networks that take images of another size than the data's: the same views, resized for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import CPU, images, member_of, shortened, step
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import Resize

from kdbench.engine.checks.cells import check_cell
from kdbench.engine.computing.estimate import Estimate
from kdbench.engine.networks.network import Normalizer
from kdbench.engine.teachers.loading import untrained_teacher
from kdbench.engine.teachers.logit_table import table_key
from kdbench.errors import UserError
from kdbench.image_cards import Normalization
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec
from kdbench.registry import Registry


def cell(method: Any = "at", teacher: dict[str, Any] | None = None, **more: Any) -> CellSpec:
    recipe = {
        "data": "digits",
        "teacher": {"name": "wrn_16_2_digits"} | (teacher or {}),
        "student": "wrn_10_1",
        "protocol": "digits",
        "method": method,
    }
    return plan(recipe | more, Registry()).cells[0].spec


def test_views_are_resized_as_torchvision_does_it() -> None:
    made = images(cell().data).train_images
    for size in (5, 8, 12):
        normalizer = Normalizer(Normalization(mean=[0.0], std=[1.0]), (size, size), CPU)
        expected = Resize((size, size), antialias=True)(made.float() / 255)
        torch.testing.assert_close(normalizer(made), expected)


def test_a_teacher_sees_the_students_views_in_its_own_size() -> None:
    spec = shortened(cell(teacher={"image_size": 16}), steps=2)
    member, batches, teacher = member_of(spec)
    seen: list[Tensor] = []
    assert teacher is not None
    teacher.network.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    member.student.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    seen.clear()
    step(member, batches, teacher)
    taught, own = [one for one in seen if one.shape[0] == 8]
    assert taught.shape == (8, 1, 16, 16) and own.shape == (8, 1, 8, 8)
    torch.testing.assert_close(taught, F.interpolate(own, (16, 16), mode="bilinear", antialias=True))
    assert teacher.shapes["layer1"][1:] == (16, 16) and member.student.extractor.shapes((1, 8, 8))["layer1"][1:] == (
        8,
        8,
    )


def test_a_student_may_have_the_other_size() -> None:
    spec = shortened(cell("kd", student={"name": "wrn_10_1", "image_size": 12}), steps=1)
    member, batches, teacher = member_of(spec)
    assert member.student.normalizer(batches.test.images[:2]).shape == (2, 1, 12, 12)
    step(member, batches, teacher)


def test_what_is_planned_measured_and_kept_agrees() -> None:
    plain, larger = cell(), cell(teacher={"image_size": 16})
    assert plain.teacher is not None and larger.teacher is not None
    assert plain.identity() != larger.identity() and plain.teacher.identity() != larger.teacher.identity()
    assert cell(teacher={"image_size": 8}).identity() == plain.identity(), "the data's own size is no other"
    assert check_cell(larger).teacher_shapes["layer1"][1:] == (16, 16)
    flops = [Estimate(CPU, timed=False).size(*one.networks["teacher"]).flops for one in (plain, larger)]
    assert flops[1] > 3 * flops[0]
    data = images(plain.data)
    assert table_key(plain, "", data, "float32") != table_key(larger, "", data, "float32")
    assert untrained_teacher(
        larger.teacher, larger.data, CPU, member_of(plain)[0].computing
    ).network.normalizer.size == (16, 16)


def test_what_is_made_for_the_teacher_is_refused() -> None:
    with pytest.raises(UserError, match="takes 16×16 pixels; the student takes 8×8"):
        cell("bss", teacher={"image_size": 16})
    assert cell("bss", teacher={"image_size": 8})
    with pytest.raises(UserError, match="'crop' cannot be a teacher's own: both networks see one view"):
        cell(teacher={"crop": 224})
    with pytest.raises(UserError, match="'image_size' next to its 'model'"):
        cell("kd", teacher={"name": None, "model": {"name": "wrn_10_1", "image_size": 16}, "untrained": True})
    with pytest.raises(UserError, match="'image_size' of its own, so it cannot be one of several teachers"):
        both = [{"name": "wrn_16_2_digits", "image_size": 16}, "wrn_16_2_digits"]
        plan(
            {"data": "digits", "teacher": both, "student": "wrn_10_1", "protocol": "digits", "method": "kd"}, Registry()
        )
