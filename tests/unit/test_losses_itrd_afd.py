"""ITRD and the two methods that are called AFD, against loops, closed forms and finite differences in float64.

Values and gradients were compared with roymiles/ITRD 5d08c6b and its copy in zkxufo/TTM fe457b3,
AberHu/Knowledge-Distillation-Zoo 65470c8 and clovaai/attention-feature-distillation dd990d0 too, outside this project.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from statistics import fmean, stdev

import pytest
import torch
from tensors import equal_maps, maps, rand, vectors
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from kdbench import losses


class TestITRDCorrelation:
    def test_by_loops(self) -> None:
        student, teacher = rand(6, 4, seed=1), rand(6, 4, seed=2)
        total = 0.0
        for own, taught in zip(student.T.tolist(), teacher.T.tolist(), strict=True):
            means, deviations = [fmean(own), fmean(taught)], [stdev(own), stdev(taught)]
            pairs = zip(own, taught, strict=True)
            v = sum((s - means[0]) / deviations[0] * (t - means[1]) / deviations[1] for s, t in pairs) / 6
            total += abs(v - 1) ** 3.2
        assert losses.itrd_correlation(student, teacher, 1.6).item() == pytest.approx(math.log2(total), rel=1e-12)

    @pytest.mark.parametrize("order", [0.4, 1.01, 1.5])
    def test_full_correlation_is_the_least_value_and_its_opposite_the_largest(self, order: float) -> None:
        """What is left of v - 1 is 1/N, or (2 N - 1) / N: the deviations divide by N - 1 but the mean by N."""
        teacher = rand(5, 7, seed=1)
        for sign, rest in ((3.0, 1 / 5), (-3.0, 9 / 5)):
            student = (sign * teacher + 2).requires_grad_()
            value = losses.itrd_correlation(student, teacher, order)
            value.backward()
            assert value.item() == pytest.approx(math.log2(7 * rest ** (2 * order)), rel=1e-9)
            assert student.grad is not None and student.grad.abs().max() < 1e-9
        other = losses.itrd_correlation(teacher + 0.3 * rand(5, 7, seed=2), teacher, order)
        assert math.log2(7 * 0.2 ** (2 * order)) + 1e-3 < other.item() < math.log2(7 * 1.8 ** (2 * order))

    def test_scale_and_shift_of_a_channel_change_nothing(self) -> None:
        student, teacher = rand(6, 4, seed=1), rand(6, 4, seed=2)
        value = losses.itrd_correlation(student, teacher).item()
        scale, shift = rand(4, seed=3).exp(), rand(4, seed=4)
        for own, taught in ((scale * student + shift, teacher), (student, scale * teacher + shift)):
            assert losses.itrd_correlation(own, taught).item() == pytest.approx(value, rel=1e-12)

    def test_a_constant_channel_counts_as_not_correlated(self) -> None:
        """As a channel that is dead after its ReLU: |0 - 1| to any power is 1, and nothing is to be learned."""
        student, teacher = rand(6, 2, seed=1), rand(6, 2, seed=2)
        alone = 2 ** losses.itrd_correlation(student[:, :1], teacher[:, :1]).item()
        for side in range(2):
            pair = [student.clone().requires_grad_(), teacher.clone()]
            with torch.no_grad():
                pair[side][:, 1] = 0.7
            value = losses.itrd_correlation(*pair)
            value.backward()
            assert value.item() == pytest.approx(math.log2(alone + 1), rel=1e-12)
            gradient = pair[0].grad
            assert gradient is not None and gradient[:, 0].abs().min() > 0 and gradient[:, 1].abs().max() == 0

    @pytest.mark.parametrize("value", [0.1, 1.3, 3.7, 11.1])
    def test_equal_images_in_float32_are_constant(self, value: float) -> None:
        """The mean of equal numbers is off by a rounding, whose reciprocal would be the gradient."""
        for n in (3, 7, 50, 64, 128):
            student = torch.full((n, 3), value).requires_grad_()
            loss = losses.itrd_correlation(student, torch.rand(n, 3, generator=torch.Generator().manual_seed(1)))
            loss.backward()
            assert loss.item() == pytest.approx(math.log2(3)) and student.grad is not None
            assert student.grad.abs().max() == 0

    def test_a_batch_of_one_is_not_correlated(self) -> None:
        assert losses.itrd_correlation(rand(1, 8, seed=1), rand(1, 8, seed=2)).item() == 3

    def test_what_does_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"equal shapes: student \[5, 3\], teacher \[5, 7\]"):
            losses.itrd_correlation(*vectors())
        with pytest.raises(ValueError, match="order must be positive"):
            losses.itrd_correlation(*equal_maps(), order=0)


class TestITRDMutual:
    def test_by_loops(self) -> None:
        student, teacher = vectors()
        n = len(student)
        own, taught = (
            [[float(F.cosine_similarity(f[i], f[j], dim=0)) for j in range(n)] for i in range(n)]
            for f in (student, teacher)
        )
        both = [[s * t for s, t in zip(*rows, strict=True)] for rows in zip(own, taught, strict=True)]
        alone, shared = (
            sum((g / sum(matrix[i][i] for i in range(n))) ** 2 for g in itertools.chain(*matrix))
            for matrix in (own, both)
        )
        assert losses.itrd_mutual(student, teacher).item() == pytest.approx(alone - shared, rel=1e-12)

    def test_where_it_is_nothing(self) -> None:
        """Images that are orthogonal for the student, or parallel for the teacher; not a student like its teacher."""
        features = rand(4, 4, seed=1)
        orthogonal = torch.linalg.qr(features).Q
        parallel = torch.tensor([[1.0], [-2.0], [3.0], [0.5]], dtype=torch.float64) * features[:1]
        assert losses.itrd_mutual(orthogonal, features).item() == pytest.approx(0, abs=1e-12)
        assert losses.itrd_mutual(features, parallel).item() == pytest.approx(0, abs=1e-12)
        assert losses.itrd_mutual(features, features).item() > 0.01

    def test_two_images(self) -> None:
        """Cosines c and d: (2 + 2 c²) / 4 - (2 + 2 c² d²) / 4. For parallel and orthogonal ones 1/2."""
        one, other = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[1.0, 0.0], [0.8, 0.6]])
        assert losses.itrd_mutual(one, other).item() == pytest.approx(0.36 * (1 - 0.64) / 2)
        assert losses.itrd_mutual(torch.ones(2, 3), torch.eye(2)).item() == pytest.approx(0.5)

    def test_rotation_and_scale_of_each_image_change_nothing(self) -> None:
        student, teacher = vectors()
        value = losses.itrd_mutual(student, teacher).item()
        rotation, scales = torch.linalg.qr(rand(3, 3, seed=9)).Q, rand(5, 1, seed=8).exp()
        assert losses.itrd_mutual(scales * student @ rotation, 3 * teacher).item() == pytest.approx(value, rel=1e-12)

    def test_features_of_zeros_are_finite(self) -> None:
        student, teacher = vectors()
        for own, taught in ((0 * student, teacher), (student, 0 * teacher), (0 * student, 0 * teacher)):
            value = losses.itrd_mutual(own.requires_grad_(), taught)
            value.backward()
            assert value.isfinite() and own.grad is not None and own.grad.isfinite().all()


class TestITRD:
    def test_sum_of_both_of_the_embedded_feature(self) -> None:
        module = losses.InformationTheoretic((3,), (7,), correlation=2.5, mutual=0.3, order=1.2).double()
        student, teacher = vectors()
        own = student @ module.embedding.weight.T + module.embedding.bias
        expected = 2.5 * losses.itrd_correlation(own, teacher, 1.2) + 0.3 * losses.itrd_mutual(own, teacher)
        assert module(student, teacher).item() == pytest.approx(expected.item(), rel=1e-12)

    def test_cosines_of_the_feature_itself_where_widths_agree(self) -> None:
        module = losses.InformationTheoretic((4,), (4,), correlation=0.0, mutual=3.0).double()
        student, teacher = rand(5, 4, seed=1), rand(5, 4, seed=2)
        assert module(student, teacher).item() == pytest.approx(3 * losses.itrd_mutual(student, teacher).item())

    def test_what_does_not_fit(self) -> None:
        with pytest.raises(ValueError, match="takes vectors"):
            losses.InformationTheoretic((3, 2, 2), (7,))
        with pytest.raises(ValueError, match="order must be positive"):
            losses.InformationTheoretic((3,), (7,), order=0.0)
        with pytest.raises(ValueError, match=r"student \[4, 3\], teacher \[5, 7\]"):
            losses.InformationTheoretic((3,), (7,))(torch.ones(4, 3), torch.ones(5, 7))


class TestAttendedChannels:
    def test_by_loops(self) -> None:
        (student, teacher), shares = equal_maps(), rand(3, 4, seed=3).exp()
        total = 0.0
        for n, c in itertools.product(range(3), range(4)):
            own, taught = student[n, c].flatten().tolist(), teacher[n, c].flatten().tolist()
            norms = math.hypot(*own) + 0.1, math.hypot(*taught) + 0.1
            squares = [(s / norms[0] - t / norms[1]) ** 2 for s, t in zip(own, taught, strict=True)]
            total += shares[n, c].item() * sum(squares) / 6
        found = losses.attended_channels(student, teacher, shares, eps=0.1).item()
        assert found == pytest.approx(total / 3, rel=1e-12)

    def test_scale_changes_nothing_and_opposite_channels_are_the_largest(self) -> None:
        (student, teacher), shares = equal_maps(), torch.full((3, 4), 0.25, dtype=torch.float64)
        loss: Callable[..., Tensor] = losses.attended_channels
        scales = rand(3, 4, 1, 1, seed=3).exp()
        value = loss(student, teacher, shares, eps=0.0).item()
        assert loss(scales * student, 5 * teacher, shares, eps=0.0).item() == pytest.approx(value, rel=1e-12)
        assert loss(2 * teacher, teacher, shares, eps=0.0).item() == pytest.approx(0, abs=1e-15)
        assert loss(-2 * teacher, teacher, shares).item() == pytest.approx(4 / 6, rel=1e-5)

    def test_dead_channels_have_a_finite_gradient(self) -> None:
        student, teacher = equal_maps()
        student[:, 0] = 0
        teacher[:, 1] = 0
        value = losses.attended_channels(student.requires_grad_(), teacher, torch.ones(3, 4))
        value.backward()
        assert value.isfinite() and student.grad is not None and student.grad.isfinite().all()

    def test_what_does_not_fit(self) -> None:
        one, other = equal_maps()
        with pytest.raises(ValueError, match=r"teacher \[3, 4, 2, 3\], shares \[3, 1\]"):
            losses.attended_channels(one, other, torch.ones(3, 1))
        with pytest.raises(ValueError, match=r"student \[3, 2, 2, 2\], teacher \[3, 5, 2, 2\]"):
            losses.attended_channels(*maps(), torch.ones(3, 5))


class TestAFD:
    def module(self, student: int = 4, factor: float = 1.0) -> losses.AttendedChannels:
        torch.manual_seed(0)
        return losses.AttendedChannels((student, 2, 3), (4, 2, 3), factor=factor).double()

    def test_shares_by_loops(self) -> None:
        module, (student, teacher) = self.module(factor=1.6), equal_maps()
        first, _, last = module.attention
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear) and first.out_features == 6
        with torch.no_grad():
            for layer in (first, last):
                layer.bias += rand(len(layer.bias), seed=5)
        shares = torch.empty(3, 4, dtype=torch.float64)
        for n in range(3):
            means = torch.stack([channel.mean() for channel in teacher[n]])
            hidden = (first.weight @ means + first.bias).clamp_min(0)
            parts = [1 / (1 + math.exp(-z)) for z in (last.weight @ hidden + last.bias).tolist()]
            shares[n] = torch.tensor([part / sum(parts) for part in parts], dtype=torch.float64)
        assert torch.allclose(module.shares(teacher), shares, rtol=1e-12)
        expected = losses.attended_channels(student, teacher, shares).item()
        assert module(student, teacher).item() == pytest.approx(expected, rel=1e-12)

    def test_shares_far_below_zero_are_not_zero_divided_by_zero(self) -> None:
        module, (student, teacher) = self.module().float(), equal_maps()
        last = module.attention[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        last.bias.data = torch.tensor([-200.0, -200.0, -300.0, -200.0])
        assert module.shares(teacher.float()).tolist() == [pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])] * 3
        assert module(student.float(), teacher.float()).isfinite()

    def test_attention_begins_by_the_fan_out(self) -> None:
        torch.manual_seed(0)
        first, _, last = losses.AttendedChannels((256, 2, 2), (256, 2, 2), factor=0.5).attention
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        for layer, fan in ((first, 128), (last, 256)):
            assert layer.weight.var().item() == pytest.approx(2 / fan, rel=0.05) and not layer.bias.any()

    def test_other_channels_and_sizes(self) -> None:
        """A convolution for the channels, and the larger map is pooled; equal ones need neither."""
        assert [*self.module().align.parameters()] == []
        module = losses.AttendedChannels((2, 4, 4), (5, 2, 2)).double()
        student, teacher = maps()
        aligned = torch.einsum("oi,nihw->nohw", module.align.weight[:, :, 0, 0], F.avg_pool2d(student, 2))
        expected = losses.attended_channels(aligned, teacher, module.shares(teacher)).item()
        assert module(student, teacher).item() == pytest.approx(expected, rel=1e-12)

    def test_a_batch_of_one(self) -> None:
        student, teacher = (one[:1] for one in equal_maps())
        module = self.module()
        module(student.requires_grad_(), teacher).backward()
        assert student.grad is not None and student.grad.isfinite().all() and student.grad.any()

    def test_what_does_not_fit(self) -> None:
        with pytest.raises(ValueError, match="takes maps"):
            losses.AttendedChannels((4,), (4,))
        with pytest.raises(ValueError, match="factor must be positive"):
            self.module(factor=0)


def layers() -> tuple[list[Tensor], list[Tensor]]:
    """Two of a student, and three of a teacher, of which one is larger and one smaller than any of the student's."""
    student = [rand(4, 2, 4, 4, seed=1), rand(4, 3, 2, 2, seed=2)]
    return student, [rand(4, c, s, s, seed=c) for c, s in ((4, 8), (5, 2), (6, 1))]


class TestMatchedAttention:
    def test_by_loops(self) -> None:
        (student, teacher), shares = layers(), rand(4, 3, 2, seed=9).exp()
        total = 0.0
        for n, j, i in itertools.product(range(4), range(3), range(2)):
            taught = (teacher[j][n] ** 2).mean(0)
            own = F.adaptive_avg_pool2d((student[i][n] ** 2).mean(0)[None], taught.shape)[0]
            errors = own / own.norm() - taught / taught.norm()
            total += float(shares[n, j, i] * errors.square().mean())
        assert losses.matched_attention(student, teacher, shares).item() == pytest.approx(total / 4, rel=1e-12)

    def test_a_smaller_map_is_repeated(self) -> None:
        """To the teacher's height and width, which may not be alike."""
        student, teacher = rand(3, 2, 2, 2, seed=1), rand(3, 5, 4, 6, seed=2)
        repeated = student.repeat_interleave(2, dim=2).repeat_interleave(3, dim=3)
        own, taught = ((one**2).mean(1).flatten(1) for one in (repeated, teacher))
        expected = (own / own.norm(dim=1, keepdim=True) - taught / taught.norm(dim=1, keepdim=True)).square().mean()
        found = losses.matched_attention([student], [teacher], torch.ones(3, 1, 1)).item()
        assert found == pytest.approx(expected.item(), rel=1e-12)

    def test_scale_sign_and_order_of_channels_change_nothing(self) -> None:
        (student, teacher), shares = layers(), rand(4, 3, 2, seed=9).exp()
        value = losses.matched_attention(student, teacher, shares).item()
        others = [-3 * one.flip(1) for one in student], [2 * one.flip(1) for one in teacher]
        assert losses.matched_attention(*others, shares).item() == pytest.approx(value, rel=1e-12)
        alike = [teacher[0].flip(1)], [teacher[0]]
        assert losses.matched_attention(*alike, shares[:, :1, :1]).item() == pytest.approx(0, abs=1e-15)

    def test_gradients_of_the_student_and_the_shares(self) -> None:
        (student, teacher), shares = layers(), rand(4, 3, 2, seed=9).exp().requires_grad_()
        inputs = (*(one.requires_grad_() for one in student), shares)
        assert gradcheck(lambda *given: losses.matched_attention(given[:2], teacher, given[2]), inputs)
        losses.matched_attention(student, [one.requires_grad_() for one in teacher], shares).backward()
        assert all(one.grad is None for one in teacher)

    def test_maps_of_zeros_are_finite(self) -> None:
        student, teacher = layers()
        student = [torch.zeros_like(one).requires_grad_() for one in student]
        losses.matched_attention(student, teacher, torch.ones(4, 3, 2)).backward()
        assert all(one.grad is not None and one.grad.isfinite().all() for one in student)

    def test_what_does_not_fit(self) -> None:
        student, teacher = layers()
        shares = torch.ones(4, 3, 2)
        none = [one[:0] for one in student], [one[:0] for one in teacher]
        uneven = [student[0], student[1][:3]]
        for own, taught in (([], teacher), (student, []), (uneven, teacher), (student, [shares]), none):
            with pytest.raises(ValueError, match=r"lists of maps .* of one batch: student"):
                losses.matched_attention(own, taught, shares)
        with pytest.raises(ValueError, match=r"shares \[4, 3, 2\] .*, not \[4, 2, 3\]"):
            losses.matched_attention(student, teacher, shares.mT)


class TestShowAttendDistill:
    def module(self, relu: bool = False) -> losses.AttentionMatching:
        torch.manual_seed(0)
        student, teacher = ([tuple(f.shape[1:]) for f in side] for side in layers())
        module = losses.AttentionMatching(student, teacher, dim=5, relu=relu).double()
        for seed, (name, parameter) in enumerate(module.named_parameters()):
            if "norm" in name:
                parameter.data = rand(*parameter.shape, seed=seed)
        return module

    def test_shares_by_loops(self) -> None:
        module, (student, teacher) = self.module(), layers()

        def normed(rows: Tensor, of: nn.Module) -> Tensor:
            norm = of.norm
            assert isinstance(norm, nn.BatchNorm1d)
            rows = of.linear(rows)  # type: ignore[operator]
            deviations = (rows.var(0, unbiased=False) + 1e-5).sqrt()
            return norm.weight * (rows - rows.mean(0)) / deviations + norm.bias

        queries = [normed(teacher[j].flatten(2).mean(2), module.queries[j]) for j in range(3)]
        hidden = [normed(student[i].flatten(2).mean(2), module.keys[i]).clamp_min(0) for i in range(2)]
        keys = normed(torch.cat(hidden), module.bilinear)  # one batch norm for the rows of both layers
        found = module.shares(student, teacher)
        for n, j in itertools.product(range(4), range(3)):
            scores = []
            for i in range(2):
                alike = (keys[4 * i + n, 5 * j : 5 * j + 5] @ queries[j][n]).item()
                scores.append((alike + (module.teacher_layers[j] @ module.student_layers[i]).item()) / math.sqrt(5))
            expected = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
            assert found[n, j].tolist() == pytest.approx(expected, rel=1e-9)

    def test_is_the_distance_by_its_shares(self) -> None:
        module, (student, teacher) = self.module(relu=True), layers()
        own, taught = ([one.clamp_min(0) for one in side] for side in (student, teacher))
        expected = losses.matched_attention(own, taught, module.shares(own, taught)).item()
        assert module(student, teacher).item() == pytest.approx(expected, rel=1e-12)
        assert self.module()(student, teacher).item() != pytest.approx(expected, rel=1e-3)

    def test_gradients(self) -> None:
        """In the train mode of batch norms too, where each image's shares depend on the batch."""
        module, (student, teacher) = self.module(), layers()
        assert gradcheck(lambda *own: module(own, teacher), tuple(one.requires_grad_() for one in student))
        module(student, [one.requires_grad_() for one in teacher]).backward()
        assert all(one.grad is None for one in teacher)
        assert all(parameter.grad is not None for parameter in module.parameters())
        moved = [module.queries[0].linear.weight, module.keys[1].linear.weight, module.student_layers]  # type: ignore[union-attr]
        assert all(one.grad.abs().max() > 1e-9 for one in moved)  # type: ignore[union-attr]

    def test_a_single_image_is_normalized_by_running_statistics(self) -> None:
        """A batch norm cannot take the deviation of one row; the student's two layers still are two rows for one."""
        student, teacher = layers()
        shapes = [[tuple(f.shape[1:]) for f in side] for side in (student[:1], teacher)]
        module = losses.AttentionMatching(*shapes, dim=5).double()
        module(student[:1], teacher)
        state = {name: value.clone() for name, value in module.state_dict().items()}
        own = student[0][:1].requires_grad_()
        value = module([own], [one[:1] for one in teacher])
        value.backward()
        assert own.grad is not None and own.grad.isfinite().all() and own.grad.any()
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
        assert module.eval()([own], [one[:1] for one in teacher]).item() == value.item()
        assert self.module()([one[:1] for one in student], [one[:1] for one in teacher]).isfinite()

    def test_layers_begin_as_xaviers_normal(self) -> None:
        torch.manual_seed(0)
        module = losses.AttentionMatching([(2, 1, 1)] * 16, [(2, 1, 1)] * 32, dim=512)
        for vectors_of, count in ((module.student_layers, 16), (module.teacher_layers, 32)):
            assert vectors_of.shape == (count, 512)
            assert vectors_of.var().item() == pytest.approx(2 / (count + 512), rel=0.05)

    def test_what_does_not_fit(self) -> None:
        with pytest.raises(ValueError, match="lists of maps"):
            losses.AttentionMatching([(3,)], [(3, 2, 2)])
        with pytest.raises(ValueError, match="dim must be at least 1"):
            losses.AttentionMatching([(3, 2, 2)], [(3, 2, 2)], dim=0)
        student, teacher = layers()
        with pytest.raises(ValueError, match="of one batch: student"):
            self.module()(student, [one[:3] for one in teacher])
