"""Several teachers at once: what a recipe says of them, and what they give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shipped import DIGITS, REGISTRY

from kdbench.engine.networks.build import build_extractor, build_model
from kdbench.errors import UserError
from kdbench.recipe.loading import load, override
from kdbench.recipe.planning import plan
from kdbench.recipe.recorded import cell_of
from kdbench.recipe.specs import CellSpec, recorded

BOTH = ["wrn_16_2_digits", {"name": "wrn_16_2_digits_route", "normalization": {"mean": [0.2], "std": [0.4]}}]
RECIPE = DIGITS | {"teacher": BOTH}


def cell(method: Any = "kd", **more: Any) -> CellSpec:
    return plan(RECIPE | {"method": method} | more, REGISTRY).cells[0].spec


def test_they_give_the_mean_of_their_logits_and_hook_points_by_number() -> None:
    spec = cell()
    assert spec.teacher is not None
    model = build_model(spec.teacher.model, spec.data, seed=3).eval()
    for number, (part, one) in enumerate(zip(model.parts, spec.teacher.members, strict=True)):  # type: ignore[arg-type]
        part.network.load_state_dict(build_model(one.model, spec.data, seed=number).state_dict())
    images = torch.rand(4, 1, 8, 8)
    points = ["teacher1.logits", "teacher2.logits", "teacher2.layer2", "logits"]
    found = build_extractor(model, spec.teacher.model, spec.data)(images, points)
    each = []
    for number, member in enumerate(spec.teacher.members):
        network = build_model(member.model, spec.data, seed=number).eval()
        mean, std = (torch.tensor(value) for value in (member.normalization.mean[0], member.normalization.std[0]))
        values = build_extractor(network, member.model, spec.data)((images - mean) / std, ["layer2", "logits"])
        each.append(values)
        torch.testing.assert_close(found[f"teacher{number + 1}.logits"], values["logits"])
    torch.testing.assert_close(found["teacher2.layer2"], each[1]["layer2"])
    torch.testing.assert_close(found["logits"], (each[0]["logits"] + each[1]["logits"]) / 2)
    assert not torch.allclose(each[0]["logits"], each[1]["logits"])


def test_their_cells_have_an_identity_by_all_of_them_and_stay_when_they_are_read_again() -> None:
    spec = cell()
    others = [cell(teacher=teacher) for teacher in (BOTH[:1][0], BOTH[::-1], [BOTH[0], BOTH[0]])]
    assert len({one.identity() for one in (spec, *others)}) == 4
    assert cell_of(recorded(spec), REGISTRY, "here") == spec
    renamed = recorded(spec)
    renamed["teacher"]["name"] = "another"
    with pytest.raises(UserError, match="other teachers"):
        cell_of(renamed, REGISTRY, "here")
    of_second = {"hook": None, "student": "layers", "teacher": "teacher2.layers"}
    at = cell({"name": "at", "stages": {"classification": {"losses": {"at": of_second}}}})
    assert at.identity() == CellSpec.model_validate_json(at.model_dump_json()).identity()


def test_a_list_replaces_one_teacher_and_one_a_list() -> None:
    tree = load(RECIPE | {"method": "kd"})
    assert override(tree, "teacher=wrn_16_2_digits").data["teacher"] == {"name": "wrn_16_2_digits"}
    one = load(RECIPE | {"method": "kd", "teacher": "wrn_16_2_digits"})
    names = [each["name"] for each in override(one, "teacher=[a, {name: b}]").data["teacher"]["several"]]
    assert names == ["a", "b"]


@pytest.mark.parametrize(
    ("teacher", "method", "message"),
    [
        (BOTH[:1], "kd", "has two or more"),
        ([BOTH[0], {"model": "wrn_10_1", "untrained": True}], "kd", "begins untrained"),
        ([BOTH[0], "wrn_16_2_digits_0_to_4"], "kd", "does not know all classes"),
        ([BOTH[0], "wrn_16_2_digit"], "kd", "unknown teacher 'wrn_16_2_digit'"),
        ([BOTH[0], BOTH], "kd", "list"),
        (BOTH, "prune_none", "starts from its teacher, and this recipe has several"),
    ],
)
def test_what_several_teachers_cannot_be_is_said(teacher: Any, method: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cell(method, teacher=teacher)
