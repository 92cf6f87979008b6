"""N-to-one matching (NORM) against loops and closed forms in float64, and what must not change it.

Values and gradients were compared with OSVAI/NORM (helper/loops.py and its ResNets) too, outside this project.
"""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from tensors import LABELS, logits, rand
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from kdbench import losses


class TestTransform:
    def test_two_products_and_a_shortcut(self) -> None:
        """In eval mode, with statistics that do nothing, by sums over channels."""
        transform = losses.FeatureTransform((3, 2, 2), (4, 2, 2), number=2).double().eval()
        maps = rand(2, 3, 2, 2, seed=1)
        up, down = (layer[0].weight[:, :, 0, 0] for layer in (transform.expansion, transform.contraction))  # type: ignore[index]
        shrunk = 1 / math.sqrt(1 + 1e-5)
        wide = torch.einsum("ec,nchw->nehw", up, maps) * shrunk
        found = transform(maps)
        assert torch.allclose(found[0], wide, atol=1e-12)
        assert torch.allclose(found[1], maps + torch.einsum("ce,nehw->nchw", down, wide) * shrunk, atol=1e-12)

    def test_parameters_and_their_first_values(self) -> None:
        """resnet32x4 → resnet8x4 with N = 8: 256 → 2048 → 256, and two numbers for each channel of a batch norm."""
        torch.manual_seed(0)
        transform = losses.FeatureTransform((256, 8, 8), (256, 8, 8))
        assert sum(p.numel() for p in transform.parameters()) == 2 * 256 * 2048 + 2 * (2048 + 256)
        for layer, wide in ((transform.expansion, 2048), (transform.contraction, 256)):
            assert layer[0].weight.std().item() == pytest.approx(math.sqrt(2 / wide), rel=0.01)

    def test_shapes_and_options_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="maps"):
            losses.FeatureTransform((3,), (4, 2, 2))
        with pytest.raises(ValueError, match="number must be at least 1"):
            losses.FeatureTransform((3, 2, 2), (4, 2, 2), number=0)


class TestNToOne:
    def test_by_loops(self) -> None:
        student, teacher = rand(2, 12, 2, 3, seed=1), rand(2, 4, 2, 3, seed=2)
        total = 0.0
        for part in range(3):
            for n in range(2):
                for c in range(4):
                    own, taught = student[n, 4 * part + c].flatten(), teacher[n, c].flatten()
                    total += sum((s - t) ** 2 for s, t in zip(own.tolist(), taught.tolist(), strict=True))
        # A mean over 2 images, 4 channels and 6 positions for each part.
        assert losses.n_to_one(student, teacher).item() == pytest.approx(total / 48, rel=1e-12)
        assert gradcheck(lambda s: losses.n_to_one(s, teacher), (student.requires_grad_(),))

    def test_copies_of_the_teachers_map_cost_nothing(self) -> None:
        teacher = rand(2, 4, 2, 3, seed=2)
        assert losses.n_to_one(teacher.repeat(1, 3, 1, 1), teacher).item() == 0
        assert losses.n_to_one(teacher.repeat_interleave(3, dim=1), teacher).item() > 0.1

    @pytest.mark.parametrize("side", [4, 5])
    def test_the_larger_map_is_max_pooled(self, side: int) -> None:
        large, small = rand(2, 4, side, side, seed=1), rand(2, 4, 2, 2, seed=2)
        window = -(-side // 2)
        corners = [slice(0, window), slice(side - window, side)]
        pooled = torch.stack([torch.stack([large[:, :, r, c].amax((2, 3)) for c in corners], -1) for r in corners], -2)
        expected = (pooled - small).square().mean().item()
        assert losses.n_to_one(small, large).item() == pytest.approx(expected, rel=1e-12)
        assert losses.n_to_one(large, small).item() == pytest.approx(expected, rel=1e-12)
        if side == 4:
            assert torch.equal(pooled, F.max_pool2d(large, 2))

    def test_shapes_that_do_not_fit(self) -> None:
        student = rand(2, 6, 2, 2, seed=1)
        for taught in (
            rand(2, 4, 2, 2, seed=2),
            rand(3, 3, 2, 2, seed=2),
            rand(2, 3, seed=2),
            rand(2, 12, 2, 2, seed=2),
        ):
            with pytest.raises(ValueError, match=r"student \[2, 6, 2, 2\], teacher \["):
                losses.n_to_one(student, taught)


class TestNormalizedLogits:
    def test_by_loops(self) -> None:
        found = losses.normalized_logits(logits()[0], 2.5)
        for row, z in zip(found.tolist(), logits()[0].tolist(), strict=True):
            deviation = math.sqrt(statistics.pvariance(z) + 1e-7)
            assert row == pytest.approx([2.5 * (one - statistics.mean(z)) / deviation for one in z], rel=1e-12)

    def test_equal_logits_have_a_finite_gradient(self) -> None:
        student = torch.ones(2, 5, requires_grad=True)
        found = losses.normalized_logits(student)
        losses.cross_entropy(found, torch.tensor([0, 1])).backward()
        assert found.abs().max() == 0 and student.grad is not None and student.grad.isfinite().all()

    def test_shapes_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"\[N, K\], not \[5\]"):
            losses.normalized_logits(torch.ones(5))


def given(number: int = 2) -> tuple[Tensor, Tensor, Tensor, losses.FeatureTransform, nn.Linear]:
    """A student's map before its ReLU, a teacher's map and logits, a transform and a classifier."""
    torch.manual_seed(0)
    transform = losses.FeatureTransform((3, 2, 2), (4, 2, 2), number=number).double()
    return rand(6, 3, 2, 2, seed=1), rand(6, 4, 2, 2, seed=2), logits()[1], transform, nn.Linear(3, 5).double()


class TestWhole:
    def test_is_the_weighted_sum_of_its_parts(self) -> None:
        student, teacher, answers, transform, classifier = given()
        expanded, transformed = transform(student.clamp_min(0))
        z = F.layer_norm(classifier(transformed.mean(dim=(2, 3))), (5,), eps=1e-7) * 1.5
        taught = F.layer_norm(answers, (5,), eps=1e-7) * 1.5
        labels = F.nll_loss(z.log_softmax(1), LABELS).item()
        maps = sum((part - teacher).square().mean().item() for part in expanded.chunk(2, dim=1))
        soft = [(one / 3).softmax(1) for one in (z, taught)]
        divergence = 9 * (soft[1] * (soft[1] / soft[0]).log()).sum(1).mean().item()
        options = {"gamma": 0.2, "alpha": 0.7, "beta": 0.3, "temperature": 3.0, "scale": 1.5}
        rest = LABELS, transform, classifier
        alone = losses.norm([student], [teacher], *rest, **options, relu=True)
        assert alone.item() == pytest.approx(0.2 * labels + 0.3 * maps, rel=1e-12)
        both = losses.norm([student], [teacher, answers], *rest, **options, relu=True)
        assert both.item() == pytest.approx(0.2 * labels + 0.3 * maps + 0.7 * divergence, rel=1e-12)
        # The map as it is.
        assert losses.norm([student], [teacher], *rest, **options).item() != pytest.approx(alone.item(), rel=1e-3)

    def test_gradients(self) -> None:
        student, teacher, answers, transform, classifier = given()
        student, teacher, answers = (one.requires_grad_() for one in (student, teacher, answers))
        losses.norm([student], [teacher, answers], LABELS, transform, classifier).backward()
        assert teacher.grad is None and answers.grad is None and student.grad is not None
        learned = [*transform.parameters(), *classifier.parameters()]
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in learned)
        transform.eval()
        assert gradcheck(lambda s: losses.norm([s], [teacher, answers], LABELS, transform, classifier), (student,))

    def test_batch_norms_see_a_batch_once(self) -> None:
        student, teacher, answers, transform, classifier = given()
        losses.norm([student], [teacher, answers], LABELS, transform, classifier)
        assert [layer[1].num_batches_tracked.item() for layer in (transform.expansion, transform.contraction)] == [1, 1]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_full(self, dtype: torch.dtype) -> None:
        *features, transform, classifier = given()
        transform, classifier = transform.float().eval(), classifier.float()
        student, teacher, answers = (one.to(dtype) for one in features)
        found = losses.norm([student], [teacher, answers], LABELS, transform, classifier)
        wide = losses.norm([student.float()], [teacher.float(), answers.float()], LABELS, transform, classifier)
        assert found.dtype == torch.float32 and torch.equal(found, wide)

    def test_one_image_and_equal_features_are_finite(self) -> None:
        _, teacher, answers, transform, classifier = given()
        student = torch.zeros(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
        value = losses.norm([student], [teacher[:1], answers[:1]], LABELS[:1], transform, classifier)
        value.backward()
        assert value.isfinite() and student.grad is not None and student.grad.isfinite().all()

    def test_the_head_answers_with_the_logits_that_were_trained(self) -> None:
        student, teacher, _, transform, classifier = given()
        transform.eval()
        for relu in (False, True):
            answers = losses.TransformedHead(transform, classifier, scale=1.5, relu=relu)(student)
            value = F.cross_entropy(answers, LABELS).item()
            rest = [teacher], LABELS, transform, classifier
            found = losses.norm([student], *rest, gamma=1.0, beta=0.0, scale=1.5, relu=relu)
            assert found.item() == pytest.approx(value, rel=1e-12)
            assert answers.std(dim=1, correction=0).tolist() == pytest.approx([1.5] * 6, rel=1e-5)

    def test_features_that_do_not_fit(self) -> None:
        student, teacher, answers, *rest = given()
        for own, taught in (([student, student], [teacher]), ([student], []), ([student], [teacher, answers, answers])):
            with pytest.raises(ValueError, match="one map of the student"):
                losses.norm(own, taught, LABELS, *rest)
        with pytest.raises(ValueError, match=r"student \[6, 5\], teacher \[6, 4\]"):
            losses.norm([student], [teacher, answers[:, :4]], LABELS, *rest)
