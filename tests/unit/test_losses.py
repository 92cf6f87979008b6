"""The losses against closed forms, autograd in float64, their invariances, and other implementations' values.

Numbers marked "run" were computed by running the named repository's own function in float64 on `wave` tensors:
bhheo/AB_distillation a7701d3, HobbitLong/RepDistiller b84f547, szagoruyko/attention-transfer 893df54,
megvii-research/mdistiller a08d46f.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from kdbench import losses


def wave(*shape: int, step: float, start: float = 0.0, height: float = 2.0) -> Tensor:
    """height · sin(step · i + start) for i = 0, 1, …, float64: a fixed tensor without a random generator."""
    count = torch.arange(math.prod(shape), dtype=torch.float64)
    return height * torch.sin(step * count + start).reshape(shape)


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return wave(*shape, step=0.7), wave(*shape, step=1.3, start=0.5)


def logit_pair() -> tuple[Tensor, Tensor]:
    return wave(4, 10, step=0.7, height=6.0), wave(4, 10, step=1.3, start=0.5, height=6.0)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


class TestCentredMSE:
    def test_the_closed_form(self) -> None:
        """(1, 3) without its mean is (-1, 1), (0, 6) is (-3, 3): both differ by 2."""
        assert losses.centred_mse(row(1.0, 3.0), row(0.0, 6.0)).item() == pytest.approx(4.0, rel=1e-14)

    def test_a_constant_on_all_logits_is_not_seen(self) -> None:
        student, teacher = logit_pair()
        shifted = student + torch.arange(4, dtype=torch.float64)[:, None]
        assert losses.centred_mse(shifted, teacher).item() == pytest.approx(
            losses.centred_mse(student, teacher).item(), rel=1e-12
        )

    def test_it_is_the_mean_variance_of_the_differences(self) -> None:
        student, teacher = logit_pair()
        variances = (student - teacher).var(dim=1, correction=0)
        assert losses.centred_mse(student, teacher).item() == pytest.approx(variances.mean().item(), rel=1e-12)


class TestActivationBoundary:
    @pytest.mark.parametrize(
        ("student", "teacher", "value"),
        [
            (0.25, 3.0, 0.75**2),  # active teacher: (1 - s)²
            (-2.0, 0.1, 9.0),
            (1.5, 7.0, 0.0),  # beyond the margin on the right side
            (0.25, -3.0, 1.25**2),  # inactive teacher: (1 + s)²
            (-1.5, -0.1, 0.0),
            (0.25, 0.0, 1.25**2),  # zero counts as inactive
        ],
    )
    def test_one_neuron(self, student, teacher, value):
        assert losses.activation_boundary(row(student), row(teacher)).item() == pytest.approx(value, abs=1e-15)

    def test_sum_over_elements_mean_over_batch(self):
        student = torch.zeros(4, 3, 2, 2)
        assert losses.activation_boundary(student, torch.ones(4, 3, 2, 2)).item() == 3 * 2 * 2

    @pytest.mark.parametrize(
        ("margin", "value"), [(0.5, 81.62826027439566), (1.0, 131.22488602917775), (2.0, 280.49515630767456)]
    )
    def test_official_code(self, margin, value):
        # AB_distillation, criterion_alternative_L2 / batch size, run; RepDistiller's ABLoss gives the same × 3/1000.
        assert losses.activation_boundary(*pair(2, 3, 4, 4), margin=margin).item() == pytest.approx(value, rel=1e-13)

    def test_three_layers_of_repdistiller(self):
        # RepDistiller, sum(ABLoss(3)(students, teachers)), run: weights 1/4, 1/2, 1 and 3/1000.
        layers = [
            (wave(2, 4, 8, 8, step=0.7), wave(2, 4, 8, 8, step=1.3, start=0.5)),
            (wave(2, 6, 4, 4, step=0.9), wave(2, 6, 4, 4, step=1.1, start=0.2)),
            (wave(2, 8, 2, 2, step=0.3), wave(2, 8, 2, 2, step=1.7, start=1.0)),
        ]
        total = sum(
            weight * losses.activation_boundary(s, t) for weight, (s, t) in zip([0.25, 0.5, 1.0], layers, strict=True)
        )
        assert 0.003 * total.item() == pytest.approx(1.2143337659029352, rel=1e-13)

    def test_gradient_pushes_towards_the_teachers_side(self):
        student = row(0.5, 0.5, 3.0, -3.0, 3.0).requires_grad_()
        teacher = row(2.0, -2.0, 2.0, -2.0, -2.0)
        losses.activation_boundary(student, teacher).backward()
        # -2 y max(0, 1 - y s): up for an active teacher, down for an inactive one, none beyond the margin.
        assert student.grad.tolist() == [[-1.0, 3.0, 0.0, 0.0, 8.0]]

    def test_only_signs_of_the_teacher_matter(self):
        student, teacher = pair(3, 5)
        assert losses.activation_boundary(student, teacher) == losses.activation_boundary(student, 100 * teacher)

    def test_zero_exactly_when_agreement_holds_with_margin(self):
        _, teacher = pair(3, 5)
        assert losses.activation_boundary(1.01 * teacher.sign(), teacher) == 0
        assert losses.activation_boundary(0.99 * teacher.sign(), teacher) > 0

    def test_half_precision_sums_in_float32(self):
        student = torch.zeros(1, 5000, dtype=torch.bfloat16)
        value = losses.activation_boundary(student, torch.ones_like(student))
        assert value.dtype == torch.float32 and value.item() == 5000  # bfloat16 has no 5000

    @pytest.mark.parametrize("margin", [0.0, -1.0, math.nan])
    def test_impossible_margin(self, margin):
        with pytest.raises(ValueError, match="margin"):
            losses.activation_boundary(row(1.0), row(1.0), margin=margin)


class TestActivationAgreement:
    def test_by_hand(self):
        # Zero is inactive on both sides: agrees with zero and negative, not with positive.
        assert losses.activation_agreement(row(1.0, -1.0, 0.0, 0.0), row(2.0, 2.0, 0.0, 2.0)).item() == 0.5

    def test_official_code(self):
        # AB_distillation, 1 - ((s > 0) ^ (t > 0)).sum() / t.nelement(), run: 46 of 96.
        assert losses.activation_agreement(*pair(2, 3, 4, 4)).item() == pytest.approx(46 / 96, rel=1e-6)

    def test_negation_takes_the_complement(self):
        student, teacher = wave(2, 3, 4, 4, step=0.7, start=0.1), wave(2, 3, 4, 4, step=1.3, start=0.5)
        share = losses.activation_agreement(student, teacher).item()
        assert losses.activation_agreement(-student, teacher).item() == pytest.approx(1 - share, rel=1e-6)

    @pytest.mark.parametrize(
        ("student", "teacher"), [((4, 3), (4, 1)), ((4, 3), (1, 3)), ((4, 3), (4, 3, 1)), ((0, 3), (0, 3))]
    )
    def test_wrong_shapes_name_both_and_nothing_broadcasts(self, student, teacher):
        with pytest.raises(ValueError) as error:
            losses.activation_agreement(torch.ones(student), torch.ones(teacher))
        assert f"student {list(student)}" in str(error.value) and f"teacher {list(teacher)}" in str(error.value)


class TestConstantAgreement:
    def test_by_hand(self):
        reference = losses.ConstantAgreement()
        # Active on 3 of 4, 0 of 4 (zero is inactive) and 2 of 4 images, in two batches.
        reference.add(torch.tensor([[1.0, 0.0, 1.0], [2.0, -1.0, 3.0], [-1.0, -2.0, -1.0]]))
        reference.add(torch.tensor([[5.0, 0.0, -4.0]]))
        assert reference.value() == pytest.approx((3 / 4 + 1 + 1 / 2) / 3)

    def test_is_the_best_of_all_constants(self):
        teacher = wave(6, 2, 1, 2, step=1.3, start=0.4)
        reference = losses.ConstantAgreement()
        reference.add(teacher)
        constants = (torch.tensor(signs, dtype=torch.float64) for signs in itertools.product((-1, 1), repeat=4))
        shares = [
            losses.activation_agreement(signs.reshape(1, 2, 1, 2).expand_as(teacher), teacher).item()
            for signs in constants
        ]
        assert reference.value() == pytest.approx(max(shares))

    def test_needs_images(self):
        with pytest.raises(ValueError, match="needs images"):
            losses.ConstantAgreement().value()


class TestKD:
    def test_two_classes_by_hand(self):
        # Teacher (3/4, 1/4), student (1/2, 1/2) at T = 1.
        value = losses.kd(row(0.0, 0.0), row(math.log(3), 0.0), temperature=1.0).item()
        assert value == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-14)

    @pytest.mark.parametrize(
        ("temperature", "value"), [(1.0, 5.260584477370484), (3.0, 12.461714163357577), (4.0, 14.300659406362191)]
    )
    def test_other_implementations(self, temperature, value):
        # RepDistiller DistillKL(T) and mdistiller kd_loss, run, equal to 1e-15.
        assert losses.kd(*logit_pair(), temperature=temperature).item() == pytest.approx(value, rel=1e-13)

    def test_official_code_of_ab_has_no_factor(self):
        # AB_distillation, train_KD at T = 3, run.
        value = losses.kd(*logit_pair(), temperature=3.0, scale=False).item()
        assert value == pytest.approx(1.384634907039731, rel=1e-13)

    def test_weighted_with_cross_entropy(self):
        # attention-transfer, utils.distillation(y, teacher_scores, labels, T=4, alpha=0.9), run.
        student, teacher = logit_pair()
        labels = torch.tensor([1, 0, 7, 9])
        value = 0.9 * losses.kd(student, teacher) + 0.1 * losses.cross_entropy(student, labels)
        assert value.item() == pytest.approx(13.20445754089593, rel=1e-13)

    def test_shift_of_logits_changes_nothing(self):
        student, teacher = logit_pair()
        value = losses.kd(student, teacher).item()
        assert losses.kd(student + 7, teacher - 3).item() == pytest.approx(value, rel=1e-12)

    def test_gradient_in_closed_form(self):
        student, teacher = logit_pair()
        student.requires_grad_()
        losses.kd(student, teacher, temperature=3.0).backward()
        expected = 3.0 * ((student / 3).softmax(1) - (teacher / 3).softmax(1)) / len(student)
        assert torch.allclose(student.grad, expected.detach(), rtol=1e-12, atol=1e-15)

    def test_high_temperature_limit_is_half_the_squared_distance_over_classes(self):
        # Section 2.1 of the paper: T² KL -> ‖centred difference‖² / (2 K).
        student, teacher = logit_pair()
        difference = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
        limit = difference.square().sum(1).mean() / (2 * 10)
        assert losses.kd(student, teacher, temperature=1e4).item() == pytest.approx(limit.item(), rel=1e-3)

    def test_finite_for_huge_logits(self):
        student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
        value = losses.kd(student, torch.tensor([[-1e4, 1e4, 0.0]]), temperature=1.0)
        value.backward()
        assert value.item() == pytest.approx(2e4) and torch.isfinite(student.grad).all()

    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
    def test_impossible_temperature(self, temperature):
        with pytest.raises(ValueError, match="temperature"):
            losses.kd(*logit_pair(), temperature=temperature)

    def test_needs_logits(self):
        with pytest.raises(ValueError, match=r"\[2, 3, 4, 4\].*\[2, 3, 4, 4\]"):
            losses.kd(*pair(2, 3, 4, 4))


class TestFitnets:
    def test_by_hand(self):
        assert losses.fitnets(row(1.0, 2.0, 3.0, 4.0), row(1.0, 0.0, 0.0, 4.0)).item() == (4 + 9) / 4

    def test_other_implementation(self):
        # RepDistiller HintLoss, run.
        assert losses.fitnets(*pair(2, 3, 4, 4)).item() == pytest.approx(3.942520224409298, rel=1e-13)


class TestAttentionTransfer:
    def test_by_hand(self):
        # Maps (3, 4) / 5 and (1, 0): one channel, p = 1, one row of two positions.
        student = torch.tensor([[[[3.0, -4.0]]]], dtype=torch.float64)
        teacher = torch.tensor([[[[-2.0, 0.0]]]], dtype=torch.float64)
        squared = 0.4**2 + 0.8**2
        assert losses.attention_transfer(student, teacher, p=1).item() == pytest.approx(squared / 2, rel=1e-14)
        paper = losses.attention_transfer(student, teacher, p=1, form="paper").item()
        assert paper == pytest.approx(math.sqrt(squared), rel=1e-14)

    def test_exponent_by_hand(self):
        # Channels (1, 2) at one position and (2, 2) at the other: Σ A² = (5, 8), Σ A⁴ = (17, 32).
        student = torch.tensor([[[[1.0, 2.0]], [[2.0, 2.0]]]], dtype=torch.float64)
        teacher = torch.tensor([[[[0.0, 1.0]]]], dtype=torch.float64)
        for p, (a, b) in ((2, (5, 8)), (4, (17, 32))):
            norm = math.hypot(a, b)
            expected = ((a / norm) ** 2 + (b / norm - 1) ** 2) / 2
            assert losses.attention_transfer(student, teacher, p=p).item() == pytest.approx(expected, rel=1e-13)

    @pytest.mark.parametrize(("p", "value"), [(2, 0.002568828191261662), (4, 0.005877259612726752)])
    def test_other_implementations(self, p, value):
        # attention-transfer at_loss (p = 2), RepDistiller Attention(p), mdistiller single_stage_at_loss, run.
        student, teacher = wave(2, 3, 4, 4, step=0.7), wave(2, 5, 4, 4, step=1.3, start=0.5)
        assert losses.attention_transfer(student, teacher, p=p).item() == pytest.approx(value, rel=1e-12)

    def test_larger_map_is_pooled(self):
        # RepDistiller Attention() and mdistiller single_stage_at_loss, run, both ways round.
        small, large = wave(2, 3, 4, 4, step=0.7), wave(2, 5, 8, 8, step=1.3, start=0.5)
        assert losses.attention_transfer(small, large).item() == pytest.approx(0.0034449895220891617, rel=1e-12)
        assert losses.attention_transfer(large, small).item() == pytest.approx(0.0034449895220891617, rel=1e-12)

    def test_each_side_may_be_the_larger_one(self):
        student, teacher = wave(2, 3, 4, 8, step=0.7), wave(2, 5, 8, 4, step=1.3, start=0.5)
        pooled = losses.attention_transfer(
            student.reshape(2, 3, 4, 4, 2).mean(-1), teacher.reshape(2, 5, 4, 2, 4).mean(3)
        )
        assert losses.attention_transfer(student, teacher).item() == pytest.approx(pooled.item(), rel=1e-12)

    @pytest.mark.parametrize("form", ["code", "paper"])
    @pytest.mark.parametrize("p", [1, 2, 3])
    def test_scale_of_either_side_changes_nothing(self, form, p):
        student, teacher = pair(2, 3, 4, 4)
        value = losses.attention_transfer(student, teacher, p=p, form=form).item()
        scaled = losses.attention_transfer(5 * student, 0.2 * teacher, p=p, form=form).item()
        assert scaled == pytest.approx(value, rel=1e-12)

    def test_signs_and_order_of_channels_change_nothing(self):
        student, teacher = pair(2, 3, 4, 4)
        value = losses.attention_transfer(student, teacher, p=3).item()
        assert losses.attention_transfer(-student.flip(1), teacher, p=3).item() == pytest.approx(value, rel=1e-12)

    @pytest.mark.parametrize("form", ["code", "paper"])
    def test_zero_and_finite_gradient_at_equality(self, form):
        student, _ = pair(2, 3, 4, 4)
        student.requires_grad_()
        value = losses.attention_transfer(student, student.detach().clone(), form=form)
        value.backward()
        assert value == 0 and torch.isfinite(student.grad).all()

    @pytest.mark.parametrize("form", ["code", "paper"])
    def test_dead_feature_is_not_nan(self, form):
        student = torch.zeros(2, 3, 4, 4, requires_grad=True)
        value = losses.attention_transfer(student, torch.ones(2, 3, 4, 4), form=form)
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(student.grad).all()

    @pytest.mark.parametrize(("student", "teacher"), [((2, 3, 4), (2, 3, 4)), ((2, 3, 4, 4), (3, 3, 4, 4))])
    def test_wrong_shapes(self, student, teacher):
        with pytest.raises(ValueError) as error:
            losses.attention_transfer(torch.ones(student), torch.ones(teacher))
        assert str(list(student)) in str(error.value) and str(list(teacher)) in str(error.value)

    @pytest.mark.parametrize("options", [{"p": 0.5}, {"form": "both"}])
    def test_impossible_options(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            losses.attention_transfer(*pair(2, 3, 4, 4), **options)


class TestCrossEntropy:
    def test_by_hand(self):
        # softmax of (log 3, 0) is (3/4, 1/4).
        student = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]], dtype=torch.float64)
        value = losses.cross_entropy(student, torch.tensor([0, 1])).item()
        assert value == pytest.approx((math.log(4 / 3) + math.log(4)) / 2, rel=1e-14)

    def test_smoothing_by_hand(self):
        # ε = 0.2, K = 2: targets (0.9, 0.1).
        value = losses.cross_entropy(row(math.log(3), 0.0), torch.tensor([0]), label_smoothing=0.2).item()
        assert value == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4), rel=1e-14)

    def test_soft_targets(self):
        student, _ = logit_pair()
        labels = torch.tensor([1, 0, 7, 9])
        hard = losses.cross_entropy(student, labels).item()
        one_hot = torch.nn.functional.one_hot(labels, 10)
        assert losses.cross_entropy(student, one_hot.float()).item() == pytest.approx(hard, rel=1e-14)
        smooth = losses.cross_entropy(student, 0.9 * one_hot.double() + 0.01).item()
        assert losses.cross_entropy(student, labels, label_smoothing=0.1).item() == pytest.approx(smooth, rel=1e-14)

    def test_is_kd_plus_the_teachers_entropy(self):
        student, teacher = logit_pair()
        target = teacher.softmax(1)
        entropy = -(target * target.log()).sum(1).mean()
        value = losses.cross_entropy(student, target).item()
        assert value == pytest.approx((losses.kd(student, teacher, temperature=1.0) + entropy).item(), rel=1e-12)

    @pytest.mark.parametrize(
        "labels", [torch.zeros(3, dtype=torch.int64), torch.zeros(4, 10, dtype=torch.int64), torch.zeros(4, 9)]
    )
    def test_wrong_labels(self, labels):
        with pytest.raises(ValueError, match=r"student \[4, 10\], labels"):
            losses.cross_entropy(torch.zeros(4, 10), labels)

    def test_impossible_smoothing(self):
        with pytest.raises(ValueError, match="label_smoothing"):
            losses.cross_entropy(torch.zeros(1, 2), torch.tensor([0]), label_smoothing=1.5)

    def test_gradient(self):
        student, teacher = (logits.requires_grad_() for logits in logit_pair())
        assert gradcheck(lambda s: losses.cross_entropy(s, torch.tensor([1, 0, 7, 9])), (student,))
        assert gradcheck(lambda s: losses.cross_entropy(s, teacher.softmax(1), label_smoothing=0.1), (student,))
