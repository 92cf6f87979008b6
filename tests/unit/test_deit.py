"""A student with a token of its own for the teacher: DeiT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import TWO_HEADS, images, member_of, shortened, step
from torch.nn import functional as F

from kdbench.errors import UserError
from kdbench.losses.deit import hard_distillation
from kdbench.models.external import timm_model
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec
from kdbench.registry import Registry


def cell(method: Any = "deit", student: Any = TWO_HEADS) -> CellSpec:
    recipe = {"data": "digits", "teacher": "wrn_16_2_digits", "student": student, "protocol": "digits"}
    return shortened(plan(recipe | {"method": method}, Registry()).cells[0].spec, steps=2)


def test_the_loss_is_the_cross_entropy_with_the_teachers_answer() -> None:
    student = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]], requires_grad=True)
    taught = torch.tensor([[0.0, 3.0, 1.0], [5.0, 1.0, 1.0]])
    expected = (-F.log_softmax(student, 1)[0, 1] - F.log_softmax(student, 1)[1, 0]) / 2
    assert torch.equal(hard_distillation(student, taught), expected)
    with pytest.raises(ValueError, match="hard_distillation"):
        hard_distillation(student, taught[:, :2])


def test_each_head_learns_from_its_own_and_their_mean_answers() -> None:
    member, batches, teacher = member_of(cell())
    model, network = member.student.model, member.student
    shown = network.normalizer(batches.test.images[:4])
    values = network(shown, ["logits.class", "logits.distillation", "logits"])
    mean = (values["logits.class"] + values["logits.distillation"]) / 2
    torch.testing.assert_close(values["logits"], mean)
    torch.testing.assert_close(member.answers.logits(batches.test.images[:4]), mean)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for only, still in (("ce", "head_dist"), ("hard", "head")):
        weights = {"ce": 0.0, "hard": 0.0, only: 1.0}
        losses = {name: {"weight": weight} for name, weight in weights.items()}
        alone, *others = member_of(cell({"name": "deit", "stages": {"classification": {"losses": losses}}}))
        start = {name: value.clone() for name, value in alone.student.model.state_dict().items()}
        step(alone, *others)
        moved = {
            n.partition(".")[0] for n, v in alone.student.model.state_dict().items() if not torch.equal(v, start[n])
        }
        assert still not in moved and {"head", "head_dist"} & moved, "weight decay is on weights that begin at zero"
    step(member, batches, teacher)
    assert not torch.equal(model.state_dict()["head_dist.weight"], before["head_dist.weight"])


def test_a_student_of_one_head_is_told() -> None:
    with pytest.raises(UserError, match=r"no hook point 'logits\.class'"):
        cell(student="wrn_10_1")
    assert cell("hard_kd", student="wrn_10_1")


def test_options_of_timms_networks() -> None:
    model = timm_model("vit_tiny_patch16_224", {"drop_path_rate": 0.2, "depth": 2}, classes=3, image_size=32)
    assert len(model.blocks) == 2 and model.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)  # type: ignore[arg-type, index, union-attr]
    for option in ({"pretrained": True}, {"checkpoint_path": 1.0}):
        with pytest.raises(UserError, match="is no option of 'timm:resnet18' here"):
            timm_model("resnet18", option, classes=3)
    with pytest.raises(UserError, match="cannot be built.*drop_pth"):
        timm_model("vit_tiny_patch16_224", {"drop_pth": 0.2}, classes=3, image_size=32)
    small = timm_model("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}, classes=3)
    assert small.stem[0].out_channels == 8 and len(small.stages[2].blocks) == 1  # type: ignore[arg-type, index, union-attr]
    for option in ({"global_pool": "tree"}, {"act_layer": "tree"}, {"block_fn": "tree"}):
        with pytest.raises(UserError, match="cannot be built") as error:
            timm_model("vit_tiny_patch16_224", option, classes=3, image_size=32)  # type: ignore[arg-type]
        assert f"check its options ({next(iter(option))})" in (error.value.hint or "")
    assert images(cell().data).train_images.shape[-1] == 8


@pytest.mark.parametrize("options", [{"global_pool": "avg"}, {"dims": [8, 8]}, {"drop_rate": 0.1}])
def test_a_recipe_takes_timms_words_and_lists(options: dict[str, Any]) -> None:
    assert cell(student={"name": "timm:resnet18", "options": options}).student.options["options"] == options


def test_the_protocol_turns_and_shears_as_far_as_deits_code() -> None:
    """timm counts magnitudes to 10, torchvision to 30; DeiT's is timm's 9."""
    from timm.data import auto_augment as of_timm
    from torchvision.transforms import v2

    rand, *_ = Registry().tree("protocols", "deit").data["augmentation"]["transforms"]
    ours = v2.RandAugment(rand["num_ops"], rand["magnitude"])
    for name, theirs in (
        ("ShearX", of_timm._shear_level_to_arg(9, {})),
        ("Rotate", of_timm._rotate_level_to_arg(9, {})),
        ("Brightness", [of_timm._enhance_increasing_level_to_arg(9, {})[0] - 1]),
    ):
        magnitudes, _ = ours._AUGMENTATION_SPACE[name]
        strength = magnitudes(ours.num_magnitude_bins, 224, 224)
        assert strength is not None
        assert float(strength[ours.magnitude]) == pytest.approx(abs(theirs[0]), rel=1e-6)
