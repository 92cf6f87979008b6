"""Losses of logits of 2020 to 2025 against loops, closed forms and other losses in float64, and what must not change
them.

Values and gradients were compared with sunshangquan/logit-standardization-KD f6e5aa5, yzd-v/cls_KD 1e5d48f, zkxufo/TTM
fe457b3, zju-SWJ/RLD d54578f, yuanli2333/Teacher-free-Knowledge-Distillation d000ab3, HyunJunSik/StreamLined 7458628 and
yoshitomo-matsubara/torchdistill 3e4373c (SKD) too, outside this project.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Literal

import pytest
import torch
from tensors import LABELS, logits, rand
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from kdbench import losses
from kdbench.registry import Registry


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(z / temperature) for z in row]
    return [p / sum(powers) for p in powers]


class TestLogitStandardization:
    def test_by_loops(self) -> None:
        found = losses.standardized(logits()[0])
        for row, expected in zip(found.tolist(), logits()[0].tolist(), strict=True):
            mean, deviation = statistics.mean(expected), statistics.stdev(expected)
            assert row == pytest.approx([(z - mean) / (deviation + 1e-7) for z in expected], rel=1e-12)

    def test_a_scale_and_a_shift_of_each_image_change_nothing(self) -> None:
        student, teacher = logits()
        scale, shift = rand(6, 1, seed=1).exp(), rand(6, 1, seed=2)
        for loss in (losses.standardized_kd, lambda s, t: losses.standardized_dkd(s, t, LABELS)):
            value = loss(student, teacher).item()
            assert loss(scale * student + shift, teacher).item() == pytest.approx(value, rel=1e-6)
            assert loss(student, scale * teacher + shift).item() == pytest.approx(value, rel=1e-6)
            assert loss(-student, teacher).item() != pytest.approx(value, rel=1e-2)

    def test_is_the_loss_behind_it_where_logits_are_standard(self) -> None:
        student, teacher = (losses.standardized(z, eps=0.0) for z in logits())
        value = losses.standardized_kd(student, teacher, 3.0).item()
        assert value == pytest.approx(losses.kd(student, teacher, 3.0).item(), rel=1e-6)
        value = losses.standardized_dkd(student, teacher, LABELS, 0.5, 4.0, 3.0).item()
        assert value == pytest.approx(losses.dkd(student, teacher, LABELS, 0.5, 4.0, 3.0).item(), rel=1e-6)

    def test_equal_logits_have_a_finite_gradient(self) -> None:
        student = torch.ones(6, 5, requires_grad=True)
        losses.standardized_kd(student, logits()[1].float()).backward()
        assert student.grad is not None and student.grad.isfinite().all()

    def test_one_class_has_no_deviation(self) -> None:
        with pytest.raises(ValueError, match="two classes"):
            losses.standardized_kd(torch.ones(2, 1), torch.ones(2, 1))
        with pytest.raises(ValueError, match="two classes"):
            losses.standardized(torch.ones(5))

    @pytest.mark.parametrize(
        "loss",
        [
            partial(losses.kd_at_temperatures, standardize=True),
            partial(losses.multi_level, standardize=True),
            lambda s, t: losses.CurriculumTemperature((1,), (1,), standardize=True)(s, t, torch.ones(())),
        ],
    )
    def test_one_class_has_none_in_the_losses_that_standardize_either(self, loss: Callable[..., Tensor]) -> None:
        with pytest.raises(ValueError, match="two classes"):
            loss(torch.ones(2, 1), torch.ones(2, 1))


class TestRLD:
    def by_loops(self, alpha: float, beta: float, temperature: float, confidence: float) -> float:
        total = 0.0
        for student, teacher, label in zip(*(z.tolist() for z in (*logits(), LABELS)), strict=True):
            sure, own = max(softmax(teacher, confidence)), softmax(student, confidence)[label]
            scd = sure * math.log(sure / own) + (1 - sure) * math.log((1 - sure) / (1 - own))
            below = [k for k, z in enumerate(teacher) if z < teacher[label]]
            p, q = (softmax([z[k] for k in below], temperature) for z in (teacher, student))
            mcd = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            total += alpha * confidence**2 * scd + beta * temperature**2 * mcd
        return total / len(LABELS)

    def test_by_loops(self) -> None:
        below = (logits()[1] < logits()[1].gather(1, LABELS[:, None])).sum(1)
        assert len(set(below.tolist())) > 2  # of several kinds: none, some and all of the others are left
        value = losses.rld(*logits(), LABELS, 0.7, 3.0, 2.0, 1.5).item()
        assert value == pytest.approx(self.by_loops(0.7, 3.0, 2.0, 1.5), rel=1e-12)
        assert losses.rld(*logits(), LABELS).item() == pytest.approx(self.by_loops(1.0, 8.0, 4.0, 4.0), rel=1e-12)

    def test_of_a_teacher_that_is_right_it_is_dkd(self) -> None:
        student, teacher = logits()
        right = teacher.scatter(1, LABELS[:, None], teacher.max(dim=1, keepdim=True).values + 0.1)
        found, expected = (
            torch.autograd.grad(loss(z, right, LABELS, 0.7, 3.0, 2.0), z)[0]
            for loss in (losses.rld, losses.dkd)
            for z in [student.clone().requires_grad_()]
        )
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)
        assert losses.rld(student, right, LABELS).item() == pytest.approx(
            losses.dkd(student, right, LABELS).item(), rel=1e-12
        )
        assert losses.rld(student, teacher, LABELS).item() != pytest.approx(
            losses.dkd(student, teacher, LABELS).item(), rel=1e-2
        )

    def test_which_wrong_class_the_teacher_prefers_does_not_matter(self) -> None:
        """Two likelier classes than the label: exchanged, or nearer to each other, they say the same of the others."""
        student = logits()[0]
        teacher = torch.tensor([[3.0, 1.0, 2.0, 0.0, -1.0]]).double().expand(6, 5)
        labels = torch.ones(6, dtype=torch.int64)
        value = losses.rld(student, teacher, labels).item()
        assert losses.rld(student, teacher[:, [2, 1, 0, 3, 4]], labels).item() == pytest.approx(value, rel=1e-12)
        moved = teacher + torch.tensor([0.0, 0.0, 0.5, 0.0, 0.0])
        assert losses.rld(student, moved, labels, alpha=0.0).item() == pytest.approx(
            losses.rld(student, teacher, labels, alpha=0.0).item(), rel=1e-12
        )

    def test_the_second_part_pulls_at_no_class_that_is_as_likely_as_the_label(self) -> None:
        student, teacher = logits()
        teacher = torch.cat([teacher, teacher.gather(1, LABELS[:, None])], dim=1)  # a tie is left out too
        student = torch.cat([student, student[:, :1]], dim=1).requires_grad_()
        losses.rld(student, teacher, LABELS, alpha=0.0).backward()
        left_out = teacher >= teacher.gather(1, LABELS[:, None])
        assert student.grad is not None and left_out[:, -1].all() and not student.grad[left_out].any()
        several = ~left_out & ((~left_out).sum(dim=1, keepdim=True) > 1)
        assert several.any() and student.grad[several].all()

    def test_an_image_whose_label_is_the_least_likely_has_no_second_part(self) -> None:
        student = logits()[0].requires_grad_()
        teacher = logits()[1].scatter(1, LABELS[:, None], -20.0)
        value = losses.rld(student, teacher, LABELS, alpha=0.0)
        value.backward()
        assert value.item() == 0 and student.grad is not None and not student.grad.any()

    def test_a_batch_has_the_mean_loss_of_its_images(self) -> None:
        student, teacher = logits()
        each = [losses.rld(student[[i]], teacher[[i]], LABELS[[i]]).item() for i in range(6)]
        assert losses.rld(student, teacher, LABELS).item() == pytest.approx(statistics.mean(each), rel=1e-12)

    def test_temperatures_are_positive(self) -> None:
        with pytest.raises(ValueError, match="^temperature must be positive"):
            losses.rld(*logits(), LABELS, temperature=0.0, confidence_temperature=1.0)
        with pytest.raises(ValueError, match="confidence_temperature must be positive"):
            losses.rld(*logits(), LABELS, confidence_temperature=-1.0)


class TestNKD:
    def test_by_loops(self) -> None:
        total = 0.0
        for own, taught, y in zip(*(z.tolist() for z in logits()), LABELS.tolist(), strict=True):
            total -= softmax(taught)[y] * math.log(softmax(own)[y])
            rest = [softmax([z for k, z in enumerate(row) if k != y], 3.0) for row in (own, taught)]
            total -= 3.5 * 9 * sum(t * math.log(s) for s, t in zip(*rest, strict=True))
        value = losses.nkd(*logits(), LABELS, gamma=3.5, temperature=3.0).item()
        assert value == pytest.approx(total / 6, rel=1e-12)

    def test_the_label_is_not_among_the_others(self) -> None:
        """Where a copy of this loss keeps it: the teacher's logit of the label moves the second part."""
        student, teacher = logits()
        moved = teacher.scatter_add(1, LABELS.unsqueeze(1), torch.full((6, 1), 1.0, dtype=torch.float64))
        first = [losses.nkd(student, t, LABELS, gamma=0.0).item() for t in (teacher, moved)]
        both = [losses.nkd(student, t, LABELS, gamma=2.0).item() for t in (teacher, moved)]
        assert both[1] - both[0] == pytest.approx(first[1] - first[0], abs=1e-12)

    def test_its_second_part_is_least_at_the_teachers(self) -> None:
        _, teacher = logits()
        student = teacher.clone().requires_grad_()
        value = losses.nkd(student, teacher, LABELS, temperature=2.0) - losses.nkd(student, teacher, LABELS, gamma=0.0)
        (gradient,) = torch.autograd.grad(value, student)
        assert gradient.abs().max() < 1e-12 and value > 0.1


class TestWSLD:
    def test_by_loops(self) -> None:
        total = 0.0
        for own, taught, y in zip(*(z.tolist() for z in logits()), LABELS.tolist(), strict=True):
            weight = 1 - math.exp(math.log(softmax(own)[y]) / (-math.log(softmax(taught)[y]) + 1e-7))
            pairs = zip(softmax(own, 2.0), softmax(taught, 2.0), strict=True)
            total -= weight * sum(t * math.log(s) for s, t in pairs)
        value = losses.weighted_soft_labels(*logits(), LABELS, temperature=2.0).item()
        assert value == pytest.approx(4 * total / 6, rel=1e-10)

    def test_no_gradient_flows_through_the_weights(self) -> None:
        """That of each image is its weight times the gradient of a cross-entropy with soft targets."""
        student, teacher = logits()
        losses.weighted_soft_labels(student.requires_grad_(), teacher, LABELS, temperature=2.0).backward()
        own, taught = (F.cross_entropy(z.detach(), LABELS, reduction="none") for z in (student, teacher))
        weights = 1 - torch.exp(-own / taught)
        expected = 2 * weights.unsqueeze(1) * (F.softmax(student.detach() / 2, 1) - F.softmax(teacher / 2, 1)) / 6
        assert student.grad is not None and torch.allclose(student.grad, expected, rtol=1e-5)

    def test_a_student_who_is_sure_to_be_right_is_left_alone(self) -> None:
        student = torch.tensor([[200.0, 0.0]], requires_grad=True)
        losses.weighted_soft_labels(student, torch.tensor([[0.5, 0.0]]), torch.tensor([0])).backward()
        assert student.grad is not None and student.grad.abs().max() == 0


class TestTransformedTeacher:
    def test_by_loops(self) -> None:
        gamma, plain, weighted = 0.3, 0.0, 0.0
        for own, taught in zip(*(z.tolist() for z in logits()), strict=True):
            powers = [p**gamma for p in softmax(taught)]
            q = [p / sum(powers) for p in powers]
            divergence = sum(t * math.log(t / s) for s, t in zip(softmax(own), q, strict=True))
            plain, weighted = plain + divergence, weighted + sum(powers) * divergence
        assert losses.transformed_teacher(*logits(), gamma).item() == pytest.approx(plain / 6, rel=1e-12)
        value = losses.transformed_teacher(*logits(), gamma, weighted=True).item()
        assert value == pytest.approx(weighted / 6, rel=1e-12)

    def test_with_power_1_is_kd_without_temperature_weighted_or_not(self) -> None:
        expected = losses.kd(*logits(), temperature=1.0).item()
        for weighted in (False, True):
            value = losses.transformed_teacher(*logits(), 1.0, weighted=weighted).item()
            assert value == pytest.approx(expected, rel=1e-12)

    def test_is_least_at_the_softened_teacher(self) -> None:
        _, teacher = logits()
        assert losses.transformed_teacher(0.2 * teacher, teacher, 0.2, weighted=True).item() == pytest.approx(
            0, abs=1e-12
        )

    def test_power_out_of_range(self) -> None:
        with pytest.raises(ValueError, match="gamma must be positive"):
            losses.transformed_teacher(*logits(), 0.0)


class TestTeacherFree:
    def test_mean_over_elements_is_torchs(self) -> None:
        student, teacher = logits()
        own, taught = F.log_softmax(student / 6, dim=1), F.softmax(teacher / 6, dim=1)
        expected = 36 * F.kl_div(own, taught, reduction="none").mean().item()
        assert losses.kd_over_elements(student, teacher).item() == pytest.approx(expected, rel=1e-12)

    def test_virtual_teacher_by_loops(self) -> None:
        total, student = 0.0, logits()[0]
        for own, y in zip(student.tolist(), LABELS.tolist(), strict=True):
            q = softmax([0.9 if k == y else 0.1 / 4 for k in range(5)], 2.0)
            total += sum(t * math.log(t / s) for s, t in zip(softmax(own, 1.5), q, strict=True))
        value = losses.virtual_teacher(student, LABELS, 2.0, 1.5, 0.9).item()
        assert value == pytest.approx(total / 30, rel=1e-12)

    def test_virtual_teacher_is_almost_uniform(self) -> None:
        """As the authors' code has it: a student without any knowledge is close to it."""
        assert 0 < losses.virtual_teacher(torch.zeros(6, 5), LABELS, 20.0).item() < 1e-4

    def test_virtual_teacher_at_one_class_per_image_pulls_towards_the_label(self) -> None:
        student = torch.zeros(6, 5, dtype=torch.float64, requires_grad=True)
        losses.virtual_teacher(student, LABELS, 1.0).backward()
        assert student.grad is not None and torch.equal(student.grad.argmin(dim=1), LABELS)
        assert gradcheck(lambda s: losses.virtual_teacher(s, LABELS, 1.0), (student,))

    @pytest.mark.parametrize("options", [{"temperature": 0.0}, {"student_temperature": 0.0}, {"correct": 1.5}])
    def test_options_out_of_range(self, options: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="positive|must lie in"):
            losses.virtual_teacher(logits()[0], LABELS, **options)


class TestSquaredErrorOfLogits:
    """What the method card `logits` trains: the loss of FitNets, of logits."""

    def test_by_loops(self) -> None:
        student, teacher = logits()
        total = sum((student[n, k].item() - teacher[n, k].item()) ** 2 for n in range(6) for k in range(5))
        assert losses.fitnets(student, teacher).item() == pytest.approx(total / 30, rel=1e-12)

    def test_is_twice_kd_of_a_high_temperature(self) -> None:
        """Of logits whose mean is 0 in every image, as Hinton et al. derive in section 2.1; so are the gradients."""
        student, teacher = (z - z.mean(dim=1, keepdim=True) for z in logits())
        found = []
        for loss, factor in ((losses.fitnets, 1.0), (partial(losses.kd, temperature=1e4), 2.0)):
            own = student.clone().requires_grad_()
            value = factor * loss(own, teacher)
            value.backward()
            found.append((value.item(), own.grad))
        (value, gradient), (other, expected) = found
        assert other == pytest.approx(value, rel=1e-3) and torch.allclose(gradient, expected, rtol=1e-2, atol=1e-5)

    def test_the_card_is_cross_entropy_and_a_tenth_of_it(self) -> None:
        (stage,) = Registry().card("methods", "logits").stages.values()
        terms = {name: (term.loss, term.hook, term.weight) for name, term in stage.losses.items()}
        assert terms == {"ce": ("cross_entropy", None, 1.0), "mse": ("fitnets", None, 0.1)}


class TestSKD:
    def test_direction_by_an_inverse_matrix(self) -> None:
        """The covariance by statistics.covariance, and no factorization."""

        def cosine(z: Tensor, i: int, j: int) -> float:
            a, b = z[i].tolist(), z[j].tolist()
            return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

        student, teacher = logits()
        apart = [[cosine(student, i, j) - cosine(teacher, i, j) for j in range(6)] for i in range(6)]
        columns = list(zip(*apart, strict=True))
        covariance = torch.tensor(
            [[statistics.covariance(a, b) for b in columns] for a in columns], dtype=torch.float64
        )
        inverse = torch.linalg.inv(covariance + 0.3 * torch.eye(6, dtype=torch.float64))
        rows = torch.tensor(apart, dtype=torch.float64)
        expected = statistics.mean(math.sqrt(float(d @ inverse @ d)) for d in rows)
        assert losses.gram_direction(*logits(), tikhonov=0.3).item() == pytest.approx(expected, rel=1e-9)

    def test_two_images_in_closed_form(self) -> None:
        """Rows (0, δ) and (δ, 0): Σ is δ² along their difference, and 0 along their sum."""
        angles = 0.3, 1.1
        student, teacher = (torch.tensor([[1, 0], [math.cos(a), math.sin(a)]], dtype=torch.float64) for a in angles)
        delta, ridge = math.cos(angles[0]) - math.cos(angles[1]), 0.2
        expected = math.sqrt(delta**2 / 2 * (1 / ridge + 1 / (delta**2 + ridge)))
        value = losses.gram_direction(student, teacher, tikhonov=ridge).item()
        assert value == pytest.approx(expected, rel=1e-9)

    def test_sizes_of_logits_and_a_rotation_change_no_direction(self) -> None:
        student, teacher = logits()
        value = losses.gram_direction(student, teacher).item()
        rotation, sizes = torch.linalg.qr(rand(5, 5, seed=9)).Q, rand(6, 1, seed=8).exp()
        assert losses.gram_direction(sizes * student @ rotation, 3 * teacher).item() == pytest.approx(value, rel=1e-9)
        assert losses.gram_direction(student + 1, teacher).item() != pytest.approx(value, rel=1e-3)

    def test_division_by_the_classes_is_a_larger_ridge(self) -> None:
        """(D / K) and Σ / K² + λ: the same as D, Σ and λ K²."""
        value = losses.gram_direction(*logits(), tikhonov=0.1, over_classes=True).item()
        assert value == pytest.approx(losses.gram_direction(*logits(), tikhonov=0.1 * 25).item(), rel=1e-9)

    def test_forms_by_their_parts(self) -> None:
        student, teacher = logits()
        sure = [softmax(row) for row in teacher.tolist()]
        shares = []
        for confidence in ([max(row) for row in sure], [math.fsum(column) for column in zip(*sure, strict=True)]):
            median = statistics.median(confidence)
            shares.append(statistics.mean(float(one <= median) for one in confidence))
        assert shares == [3 / 6, 3 / 5]
        instance = losses.kd(student, teacher, 2.0).item()
        direction = losses.gram_direction(student, teacher, 0.2 * 25).item()
        value = losses.skd(student, teacher, 2.0, 0.2).item()
        assert value == pytest.approx(shares[0] * instance + shares[1] * direction, rel=1e-9)
        described = instance / 4 + losses.gram_direction(student, teacher, 0.2).item()
        assert losses.skd(student, teacher, 2.0, 0.2, "described").item() == pytest.approx(described, rel=1e-9)

    def test_a_teacher_as_sure_of_every_image_counts_all(self) -> None:
        student, teacher = logits()[0], 3 * torch.eye(6, 6).double()[:, :5]
        teacher[5, 0] = 3.0
        instance = losses.kd(student, teacher).item()
        assert (
            instance < losses.skd(student, teacher).item() < instance + losses.gram_direction(student, teacher).item()
        )

    def test_the_least_of_it_has_a_gradient(self) -> None:
        """Where torch's square root has an infinite slope, and so the codes' no number."""
        student = logits()[1].requires_grad_()
        losses.gram_direction(student, logits()[1]).backward()
        assert student.grad is not None and not student.grad.any()

    def test_options_out_of_range(self) -> None:
        with pytest.raises(ValueError, match="tikhonov must be positive"):
            losses.gram_direction(*logits(), tikhonov=0.0)
        with pytest.raises(ValueError, match="temperature must be positive"):
            losses.skd(*logits(), temperature=0.0)
        with pytest.raises(ValueError, match="'code' or 'described'"):
            losses.skd(*logits(), form="paper")  # type: ignore[arg-type]

    def test_a_small_ridge_is_not_lost_in_rounding(self) -> None:
        """Float32 has no factor of such a matrix, or a wrong one."""
        student, teacher = rand(256, 5, seed=1), rand(256, 5, seed=2)
        expected = losses.gram_direction(student, teacher, tikhonov=1e-7).item()
        value = losses.gram_direction(student.float(), teacher.float(), tikhonov=1e-7)
        assert value.dtype == torch.float32 and value.item() == pytest.approx(expected, rel=1e-3)


class TestUSKD:
    SHAPES = ((3, 8, 8), (4, 4, 4), (6, 2, 2), (5,))

    def features(self) -> list[Tensor]:
        return [2 * rand(6, *shape, seed=seed) for seed, shape in enumerate(self.SHAPES)]

    def module(self, **options: float) -> losses.CustomizedSoftLabels:
        torch.manual_seed(0)
        return losses.CustomizedSoftLabels(self.SHAPES, **options).double()  # type: ignore[arg-type]

    def test_target_by_loops(self) -> None:
        p = [softmax(row)[y] for row, y in zip(logits()[0].tolist(), LABELS.tolist(), strict=True)]
        mean = statistics.mean(one**2 for one in p)
        expected = -statistics.mean((one**2 + 1 - mean) * math.log(one) for one in p)
        assert losses.customized_target(logits()[0], LABELS).item() == pytest.approx(expected, rel=1e-12)

    def test_the_targets_are_constants_of_mean_one(self) -> None:
        student = logits()[0].requires_grad_()
        losses.customized_target(student, LABELS).backward()
        assert student.grad is not None
        p = F.softmax(student.detach(), dim=1)
        at_label = p[range(6), LABELS]
        targets = -6 * student.grad[range(6), LABELS] / (1 - at_label)
        assert targets.mean().item() == pytest.approx(1, rel=1e-9)
        assert torch.equal(targets.argsort(), at_label.argsort())

    def test_a_batch_of_one_has_its_cross_entropy(self) -> None:
        one, label = logits()[0][:1], LABELS[:1]
        value = losses.customized_target(one, label).item()
        assert value == pytest.approx(F.cross_entropy(one, label).item(), rel=1e-12)

    @pytest.mark.parametrize("ranking", ["logarithms", "probabilities"])
    def test_others_by_loops(self, ranking: Literal["logarithms", "probabilities"]) -> None:
        total, (student, weak) = 0.0, logits()
        for own, other, y in zip(student.tolist(), weak.tolist(), LABELS.tolist(), strict=True):
            p, w = softmax(own), softmax(other)
            said = [math.log(one) for one in p] if ranking == "logarithms" else p
            worth = [w[k] / (1 - w[y] + 1e-6) + said[k] / (1 - said[y] + 1e-6) for k in range(5)]
            zipf = [1 / (1 + sum(one > worth[k] for one in worth)) for k in range(5)]
            rest = [k for k in range(5) if k != y]
            logs = {k: own[k] - math.log(sum(math.exp(own[j]) for j in rest)) for k in rest}
            total -= sum(zipf[k] * logs[k] for k in rest) / sum(zipf[k] for k in rest)
        value = losses.customized_others(student, weak, LABELS, ranking).item()
        assert value == pytest.approx(total / 6, rel=1e-12)

    def test_rankings_differ_where_the_networks_disagree(self) -> None:
        """By logarithms an unlikely class is far below another one, by probabilities the weak classifier decides."""
        student, weak = torch.tensor([[0.0, -5.0, -3.0]]), torch.tensor([[-9.0, 3.0, 0.0]])
        first, second = F.log_softmax(student[0, 1:], dim=0).tolist()
        for ranking, expected in (
            ("logarithms", 0.4 * first + 0.6 * second),
            ("probabilities", 0.6 * first + 0.4 * second),
        ):
            value = losses.customized_others(student, weak, torch.tensor([0]), ranking).item()
            assert value == pytest.approx(-expected, rel=1e-5)

    @pytest.mark.parametrize(("at_label", "share"), [(9.0, 3 / 5), (-9.0, 2 / 3)])
    def test_the_label_keeps_its_place(self, at_label: float, share: float) -> None:
        """First of three it leaves 1/2 and 1/3 to the others, last it leaves 1 and 1/2."""
        both = torch.tensor([[at_label, 1.0, 0.0]]).double()
        logs = F.log_softmax(both[0, 1:], dim=0).tolist()
        value = losses.customized_others(both, both, torch.tensor([0])).item()
        assert value == pytest.approx(-(share * logs[0] + (1 - share) * logs[1]), rel=1e-9)

    def test_whole_by_its_formula(self) -> None:
        module, features = self.module(alpha=0.3, beta=0.7, mu=0.2), self.features()
        weak = features[1].flatten(2).mean(dim=2) @ module.classifier.weight.T + module.classifier.bias
        smooth = torch.full((6, 5), 0.1 / 5).double()
        smooth[range(6), LABELS] += 0.9
        expected = 0.3 * losses.customized_target(features[-1], LABELS).item()
        expected += 0.7 * losses.customized_others(features[-1], weak, LABELS).item()
        expected -= 0.2 * (smooth * F.log_softmax(weak, dim=1)).sum(dim=1).mean().item()
        assert module(features, LABELS).item() == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("mu", [0.0, 0.5])
    def test_the_labels_alone_train_the_weak_classifier(self, mu: float) -> None:
        module, features = self.module(mu=mu), [f.requires_grad_() for f in self.features()]
        module(features, LABELS).backward()
        assert [f.grad is not None for f in features] == [False, True, False, True]
        for one in (features[1].grad, module.classifier.weight.grad):
            assert one is not None and one.any().item() == (mu > 0)

    def test_what_does_not_fit(self) -> None:
        for shapes in (((3, 4, 4), (5,)), ((3, 4, 4), (5,), (5,)), ((3, 4, 4), (3, 4, 4), (3, 4, 4))):
            with pytest.raises(ValueError, match="two maps or more"):
                losses.CustomizedSoftLabels(shapes)
        with pytest.raises(ValueError, match="smoothing must lie in"):
            self.module(smoothing=1.5)
        with pytest.raises(ValueError, match="'logarithms' or 'probabilities'"):
            losses.customized_others(*logits(), LABELS, "ranks")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="class indices"):
            losses.customized_target(logits()[0], LABELS.float())
