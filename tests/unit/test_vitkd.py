"""Distillation between transformers by their patches: ViTKD, and who cannot take part."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import TRANSFORMER, TWO_HEADS, WIDER, member_of, shortened, train

from kdbench.engine.checks.cells import check_cell
from kdbench.errors import UserError
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec
from kdbench.registry import Registry


def cell(student: Any = TRANSFORMER, teacher: Any = WIDER, method: Any = "vitkd", **more: Any) -> CellSpec:
    # Teachers are made up here, so any file is good for their weights.
    recipe = {"data": "digits", "student": student, "teacher": {"model": teacher, "weights": __file__}}
    spec = plan(recipe | {"protocol": "digits", "method": method} | more, Registry()).cells[0].spec
    return shortened(spec, steps=2, batch=4, per_class=1)


def test_networks_with_other_tokens_before_the_patches_and_other_widths() -> None:
    """The teacher has one token before the patches, the student two."""
    member, batches, teacher = member_of(cell(TWO_HEADS, method="vitkd_nkd"))
    before = {name: p.clone() for name, p in member.modules.terms.named_parameters()}
    # Three linear maps, and the token in place of those that are left out.
    small = [tuple(p.shape) for p in before.values() if p.ndim > 1 and p.shape[-1] == 1]
    assert sorted(small) == [(1, 16, 1, 1), *[(16, 12, 1, 1)] * 3]
    train(member, batches, teacher, 2)
    member.check_finite()
    assert not [name for name, p in member.modules.terms.named_parameters() if p.equal(before[name])]


@pytest.mark.parametrize(
    ("student", "teacher", "whose"),
    [("wrn_10_1", WIDER, "wrn_10_1"), (TRANSFORMER, "wrn_10_1", "wrn_10_1"), ("timm:resnet18", WIDER, "timm:resnet18")],
)
def test_a_network_without_patches_is_told_and_what_to_do(student: Any, teacher: Any, whose: str) -> None:
    with pytest.raises(UserError, match=rf"'{whose}' has no (hook point )?'layer1\.patches'") as error:
        check_cell(cell(student, teacher))
    hint = error.value.hint or ""
    assert "timm:deit_tiny_patch16_224" in hint and "layers.patches" not in hint


def test_other_numbers_of_patches_are_told_and_the_size_of_images_can_mend_it() -> None:
    coarse = {"name": TRANSFORMER["name"], "options": TRANSFORMER["options"] | {"patch_size": 8}}
    with pytest.raises(UserError, match="the student's is 1×1, the teacher's 2×2.*image_size"):
        check_cell(cell(coarse))
    check_cell(cell(coarse | {"image_size": 16}))


def test_a_recipe_can_name_places_of_its_own() -> None:
    """Of Swin and its relatives, say, whose layers are maps already."""
    both = {"name": "resnet8", "hooks": {"layer1.patches": "layer1", "last.patches": "layer2"}}
    shallow = ["layer1.patches", "last.patches"]
    spec = cell(both, both, {"name": "vitkd", "shallow": shallow})
    assert spec.method.stages["classification"].losses["mimicking"].points("student") == shallow
    check_cell(spec)


@pytest.mark.parametrize(
    ("name", "stage", "loss"), [("hint", "classification", "hint"), ("at", "classification", "at"), ("simkd", "", "")]
)
def test_methods_of_maps_tell_where_a_transformer_has_them(name: str, stage: str, loss: str) -> None:
    """A connector, a loss and a method's own module get tokens; with the map in their place they fit."""

    def taught(point: str) -> CellSpec:
        read = {"hook": None, "student": "layer1", "teacher": point}
        method = {"name": name} | ({"stages": {stage: {"losses": {loss: read}}}} if loss else {})
        return cell("wrn_10_1", method=method)

    with pytest.raises(UserError) as error:
        check_cell(taught("layer1"))
    assert "'layerK.patches'" in (error.value.hint or ""), error.value
    if loss:
        check_cell(taught("layer1.patches"))
