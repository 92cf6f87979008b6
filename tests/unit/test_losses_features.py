"""Losses of features of 2018 to 2024 against loops, closed forms and finite differences in float64, and what must not
change them.

Values and gradients were compared with ADLab-AutoDrive/ICKD 403b8d3, open-mmlab/mmrazor 90c7af1, yzd-v/cls_KD 1e5d48f,
roymiles/Simple-Recipe-Distillation 31e8477, yoshitomo-matsubara/torchdistill 3e4373c (PAD), HobbitLong/RepDistiller
b84f547 and megvii-research/mdistiller a08d46f (KDSVD, with the signs of singular vectors fixed as here) too, outside
this project.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import pytest
import torch
from tensors import equal_maps as maps
from tensors import rand
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from kdbench import losses


class TestInterChannelCorrelation:
    def test_by_loops(self) -> None:
        student, teacher = maps()
        total = 0.0
        for n in range(3):
            for i in range(4):
                rows = []
                for feature in (student, teacher):
                    row = [float((feature[n, i] * feature[n, j]).sum()) for j in range(4)]
                    rows.append([value / math.hypot(*row) for value in row])
                total += sum((s - t) ** 2 for s, t in zip(*rows, strict=True))
        assert losses.inter_channel_correlation(student, teacher).item() == pytest.approx(total / 12, rel=1e-12)

    def test_scale_and_order_of_positions_change_nothing(self) -> None:
        student, teacher = maps()
        value = losses.inter_channel_correlation(student, teacher).item()
        moved = 5 * rand(3, 1, 1, 1, seed=3).abs() * student.flip(2, 3)
        assert losses.inter_channel_correlation(moved, teacher).item() == pytest.approx(value, rel=1e-12)
        assert losses.inter_channel_correlation(student.flip(1), teacher).item() != pytest.approx(value, rel=1e-3)

    def test_maps_of_another_size(self) -> None:
        """Each position twice: every inner product doubles, and the rows of unit length stay."""
        student, teacher = maps()
        value = losses.inter_channel_correlation(student, teacher).item()
        doubled = student.repeat_interleave(2, dim=3)
        assert losses.inter_channel_correlation(doubled, teacher).item() == pytest.approx(value, rel=1e-12)

    def test_channels_that_differ(self) -> None:
        with pytest.raises(ValueError, match="equal channels"):
            losses.inter_channel_correlation(maps()[0], maps()[1][:, :3])


class TestChannelWise:
    def test_by_loops(self) -> None:
        student, teacher = maps()
        total = 0.0
        for own, taught in zip(*(f.flatten(2).flatten(0, 1).tolist() for f in (student, teacher)), strict=True):
            p, q = ([math.exp(x / 2) for x in row] for row in (own, taught))
            total += sum(t / sum(q) * math.log(t / sum(q) * sum(p) / s) for s, t in zip(p, q, strict=True))
        assert losses.channel_wise(student, teacher, 2.0).item() == pytest.approx(4 * total / 12, rel=1e-12)

    def test_a_constant_of_each_channel_changes_nothing(self) -> None:
        student, teacher = maps()
        value = losses.channel_wise(student, teacher).item()
        moved = student + rand(3, 4, 1, 1, seed=3)
        assert losses.channel_wise(moved, teacher).item() == pytest.approx(value, rel=1e-12)


class TestMapCorrelation:
    def test_is_one_minus_the_mean_correlation_of_channels_over_the_batch(self) -> None:
        student, teacher = maps()
        rows = [torch.stack([student[:, c].flatten(), teacher[:, c].flatten()]) for c in range(4)]
        correlations = [torch.corrcoef(both)[0, 1].item() for both in rows]
        assert losses.map_correlation(student, teacher).item() == pytest.approx(1 - sum(correlations) / 4, rel=1e-12)

    def test_scale_and_shift_of_a_channel_change_nothing(self) -> None:
        student, teacher = maps()
        scale, shift = 0.5 + rand(1, 4, 1, 1, seed=3).abs(), rand(1, 4, 1, 1, seed=4)
        value = losses.map_correlation(student, teacher).item()
        assert losses.map_correlation(scale * student + shift, teacher).item() == pytest.approx(value, rel=1e-12)
        assert losses.map_correlation(-student, teacher).item() == pytest.approx(2 - value, rel=1e-12)

    def test_constant_channels_add_a_half_or_nothing_and_have_no_gradient(self) -> None:
        """As where values are divided by their deviation plus a little."""
        still = torch.full((3, 4, 4, 4), 0.1).double().requires_grad_()
        assert losses.map_correlation(still, maps()[1]).item() == pytest.approx(0.5, rel=1e-12)
        value = losses.map_correlation(still, torch.ones(3, 4, 4, 4).double())
        value.backward()
        assert value.item() == 0.0 and still.grad is not None and not still.grad.any()


class TestMaskedGeneration:
    def module(self, student: int = 3, masked: float = 0.5) -> losses.MaskedGeneration:
        torch.manual_seed(0)
        return losses.MaskedGeneration((student, 4, 4), (5, 4, 4), masked=masked).double()

    def test_is_the_squared_error_of_what_it_generates(self) -> None:
        """The draws are a channel's, and the same at the same place of the generator."""
        module, student, teacher = self.module(), rand(2, 3, 4, 4, seed=1), rand(2, 5, 4, 4, seed=2)
        torch.manual_seed(7)
        value = module(student, teacher).item()
        torch.manual_seed(7)
        mask = (torch.rand(2, 5, 1, 1) >= 0.5).double()
        assert 0 < mask.mean() < 1
        first, _, second = module.generation
        hidden = F.conv2d(module.align(student) * mask, first.weight, first.bias, padding=1).relu()
        generated = F.conv2d(hidden, second.weight, second.bias, padding=1)
        assert value == pytest.approx((generated - teacher).pow(2).sum().item() / 2, rel=1e-12)

    def test_how_many_channels_are_left_out(self) -> None:
        module = losses.MaskedGeneration((40, 1, 1), (40, 1, 1), masked=0.15)
        seen: list[Tensor] = []
        module.generation.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        module(torch.ones(500, 40, 1, 1), torch.zeros(500, 40, 1, 1))
        assert set(seen[0].unique().tolist()) == {0.0, 1.0}
        assert seen[0].mean().item() == pytest.approx(0.85, abs=0.01)

    def test_nothing_and_everything_left_out(self) -> None:
        student, teacher = rand(2, 3, 4, 4, seed=1), rand(2, 5, 4, 4, seed=2)
        without, alone = self.module(masked=0.0), self.module(masked=1.0)
        assert without(student, teacher).item() == without(student, teacher).item()
        assert alone(student, teacher).item() == alone(2 * student, teacher).item()

    def test_equal_channels_need_no_alignment(self) -> None:
        assert isinstance(self.module(student=5).align, nn.Identity)
        assert self.module(student=3).align.weight.shape == (5, 3, 1, 1)

    def test_shapes_and_options_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="takes maps"):
            losses.MaskedGeneration((3,), (5,))
        with pytest.raises(ValueError, match=r"masked must lie in \[0, 1\]"):
            losses.MaskedGeneration((3, 4, 4), (5, 4, 4), masked=1.5)


class TestPatchMimicking:
    def test_is_the_squared_error_of_every_patch_through_a_linear_map_of_its_layer(self) -> None:
        module = losses.PatchMimicking([(3, 2, 4), (3, 2, 4)], [(5, 2, 4), (3, 2, 4)]).double()
        student = [rand(2, 3, 2, 4, seed=seed) for seed in (1, 2)]
        teacher = [rand(2, 5, 2, 4, seed=3), rand(2, 3, 2, 4, seed=4)]
        first, second = module.align
        total = 0.0
        for n, y, x in product(range(2), range(2), range(4)):
            mapped = first.weight[:, :, 0, 0] @ student[0][n, :, y, x] + first.bias
            total += (mapped - teacher[0][n, :, y, x]).square().sum().item()
            total += (student[1][n, :, y, x] - teacher[1][n, :, y, x]).square().sum().item()
        assert module(student, teacher).item() == pytest.approx(total / 2, rel=1e-12)
        assert isinstance(second, nn.Identity), "equal channels need none"

    def test_shapes_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="takes maps"):
            losses.PatchMimicking([(4, 17)], [(4, 17)])
        with pytest.raises(ValueError, match="the student's is 4×4, the teacher's 7×7.*image_size"):
            losses.PatchMimicking([(3, 4, 4)], [(5, 7, 7)])
        with pytest.raises(ValueError, match="as many layers"):
            losses.PatchMimicking([(3, 4, 4)], [(5, 4, 4)] * 2)
        with pytest.raises(ValueError, match="patch_mimicking needs equal shapes"):
            losses.PatchMimicking([(3, 4, 4)], [(3, 4, 4)])([torch.ones(2, 3, 4, 4)], [torch.ones(1, 3, 4, 4)])


class TestPatchGeneration:
    def module(self, masked: float = 0.5) -> losses.PatchGeneration:
        torch.manual_seed(0)
        module = losses.PatchGeneration((3, 4, 4), (5, 4, 4), masked=masked).double()
        assert not module.token.any()
        module.token.data = rand(1, 5, 1, 1, seed=9)
        return module

    @pytest.mark.parametrize("masked", [0.3, 1.0])
    def test_is_the_squared_error_of_what_it_generates_where_patches_were_left_out(self, masked: float) -> None:
        """As lists of tokens. The draws are the same at the same place of the generator."""
        module, student, teacher = self.module(masked), rand(2, 3, 4, 4, seed=1), rand(2, 5, 4, 4, seed=2)
        torch.manual_seed(7)
        value = module(student, teacher).item()
        torch.manual_seed(7)
        left_out = torch.rand(2, 16).argsort(dim=1)[:, math.floor(16 * (1 - masked)) :].tolist()
        first, _, second = module.generation
        total = 0.0
        for own, taught, places in zip(student, teacher, left_out, strict=True):
            tokens = F.linear(own.flatten(1).T, module.align.weight[:, :, 0, 0], module.align.bias).tolist()
            for place in places:
                tokens[place] = module.token.flatten().tolist()
            made = torch.tensor(tokens, dtype=torch.float64).T.view(5, 4, 4)
            hidden = F.conv2d(made, first.weight, first.bias, padding=1).relu()
            generated = F.conv2d(hidden, second.weight, second.bias, padding=1).flatten(1)
            total += sum((generated[:, i] - taught.flatten(1)[:, i]).square().sum().item() for i in places)
        assert value == pytest.approx(total / (2 * masked), rel=1e-12)

    def test_every_patch_is_left_out_as_often_and_as_many_of_each_image(self) -> None:
        module = losses.PatchGeneration((1, 4, 4), (1, 4, 4), masked=0.3)
        seen: list[Tensor] = []
        module.generation.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        module(torch.ones(4000, 1, 4, 4), torch.zeros(4000, 1, 4, 4))
        # 11.2 of 16 are kept, that is 11.
        assert set(seen[0].sum(dim=(1, 2, 3)).tolist()) == {11.0}
        assert seen[0].mean(dim=0).flatten().tolist() == pytest.approx([11 / 16] * 16, abs=0.04)

    def test_shapes_and_options_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="one grid.*the student's is 4×4, the teacher's 2×8"):
            losses.PatchGeneration((3, 4, 4), (5, 2, 8))
        with pytest.raises(ValueError, match="patch_generation needs equal shapes"):
            losses.PatchGeneration((3, 4, 4), (3, 4, 4))(torch.ones(2, 3, 4, 4), torch.ones(1, 3, 4, 4))
        for masked in (0.0, 1.5):
            with pytest.raises(ValueError, match="masked must"):
                losses.PatchGeneration((3, 4, 4), (5, 4, 4), masked=masked)


class TestPrimeAware:
    def test_by_loops(self) -> None:
        student, teacher, v = rand(3, 4, seed=1), rand(3, 4, seed=2), rand(3, 4, seed=3)
        triples = zip(*(x.flatten().tolist() for x in (student, teacher, v)), strict=True)
        total = sum((t - s) ** 2 / (0.1 + math.exp(a)) + a for s, t, a in triples)
        assert losses.adaptive_mse(student, teacher, v, eps=0.1).item() == pytest.approx(total / 12, rel=1e-12)

    def test_the_best_variance_is_the_squared_error(self) -> None:
        """d/dv of e² exp(-v) + v is 0 at v = log e²; there the loss is 1 + log e²."""
        student, teacher = rand(3, 4, seed=1), rand(3, 4, seed=2)
        best = (student - teacher).square().log().requires_grad_()
        value = losses.adaptive_mse(student, teacher, best, eps=0.0)
        value.backward()
        assert best.grad is not None and best.grad.abs().max() < 1e-12
        assert value.item() == pytest.approx(1 + best.mean().item(), rel=1e-12)

    def test_without_variance_it_is_the_mean_squared_error(self) -> None:
        student, teacher = rand(3, 4, seed=1), rand(3, 4, seed=2)
        value = losses.adaptive_mse(student, teacher, torch.zeros_like(student), eps=0.0).item()
        assert value == pytest.approx(losses.fitnets(student, teacher).item(), rel=1e-12)

    def test_the_head_reads_the_student(self) -> None:
        module, student, teacher = losses.PrimeAware((4,), (4,)).double(), rand(6, 4, seed=1), rand(6, 4, seed=2)
        linear = student @ module.head[0].weight.T + module.head[0].bias
        v = (linear - linear.mean(0)) / (linear.var(0, unbiased=False) + 1e-5).sqrt()
        expected = losses.adaptive_mse(student, teacher, v).item()
        assert module(student, teacher).item() == pytest.approx(expected, rel=1e-9)

    def test_widths_that_differ(self) -> None:
        with pytest.raises(ValueError, match="one width"):
            losses.PrimeAware((4,), (6,))
        with pytest.raises(ValueError, match="needs a variance"):
            losses.adaptive_mse(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3))


class TestSimpleRecipe:
    def test_by_loops(self) -> None:
        own, taught = rand(3, 4, seed=1), rand(3, 4, seed=2)
        total = sum(abs(u - v) ** 3 for u, v in zip(own.flatten().tolist(), taught.flatten().tolist(), strict=True))
        assert losses.log_power_sum(own, taught, 3.0).item() == pytest.approx(math.log(total), rel=1e-12)

    def test_features_are_normalized_over_the_batch(self) -> None:
        module = losses.SimpleRecipe((3,), (4,), eps=0.1).double()
        student, teacher = rand(6, 3, seed=1), rand(6, 4, seed=2)
        own = student @ module.projector.weight.T + module.projector.bias
        normal = [(f - f.mean(0)) / (f.var(0, unbiased=False) + 0.1).sqrt() for f in (own, teacher)]
        expected = math.log((normal[0] - normal[1]).pow(4).sum().item())
        assert module(student, teacher).item() == pytest.approx(expected, rel=1e-9)
        assert {name for name, _ in module.named_parameters()} == {"projector.weight", "projector.bias"}

    def test_a_shift_and_a_scale_of_the_teachers_feature_change_nothing(self) -> None:
        module = losses.SimpleRecipe((3,), (4,), eps=1e-12).double()
        student, teacher = rand(6, 3, seed=1), rand(6, 4, seed=2)
        value = module(student, teacher).item()
        assert module(student, 3 * teacher + 2).item() == pytest.approx(value, rel=1e-9)

    def test_what_does_not_fit(self) -> None:
        with pytest.raises(ValueError, match="takes vectors"):
            losses.SimpleRecipe((3, 4, 4), (4, 4, 4))
        for call in (partial(losses.log_power_sum, *maps()), partial(losses.SimpleRecipe, (3,), (4,))):
            with pytest.raises(ValueError, match="exponent must be at least 1"):
                call(exponent=0.5)

    def test_equal_elements_have_a_finite_gradient(self) -> None:
        """Of the lowest exponent too: the slope is the sign of a difference over the sum, 0 where they are equal."""
        student = torch.tensor([[0.0, 1.0, 3.0]], requires_grad=True)
        losses.log_power_sum(student, torch.tensor([[0.0, 2.0, 2.0]]), 1.0).backward()
        assert student.grad is not None and student.grad.tolist() == [[0.0, -0.5, 0.5]]


def leading(feature: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Singular values and right vectors of one image's map as [H W, C], the largest entry of each positive."""
    _, values, rows = torch.linalg.svd(feature.flatten(1).T, full_matrices=False)
    vectors = rows.T[:, :k]
    return values[:k], vectors * torch.stack([v[v.abs().argmax()].sign() for v in vectors.T])


class TestSingularVectors:
    def layers(self) -> tuple[list[Tensor], list[Tensor]]:
        return [rand(2, c, 3, 3, seed=c) for c in (4, 5, 6)], [rand(2, c, 3, 3, seed=10 + c) for c in (4, 5, 6)]

    @pytest.mark.parametrize("k", [1, 2])
    def test_by_loops(self, k: int) -> None:
        student, teacher = self.layers()
        total = 0.0
        for n in range(2):
            found = []
            for own, taught in zip(student, teacher, strict=True):
                values, theirs = leading(taught[n], k)
                _, candidates = leading(own[n], k + 3)
                ours = []
                for v in theirs.T:
                    cosines = [float(v @ c) for c in candidates.T]
                    best = max(cosines, key=abs)
                    ours.append(candidates[:, cosines.index(best)] * math.copysign(1, best))
                scales = values / values.norm()
                found.append((torch.stack(ours, 1) * scales, theirs * scales))
            for (s0, t0), (s1, t1) in zip(found[:-1], found[1:], strict=True):
                for m in range(k):
                    pairs = ((s0, s1), (t0, t1))
                    relations = [torch.exp(-((b[:, m, None] - a[None, :, m]) ** 2) / 8) for a, b in pairs]
                    total += float((relations[0] - relations[1]).square().sum())
        assert losses.singular_vectors(student, teacher, k).item() == pytest.approx(total / 2, rel=1e-10)

    def test_gradients_are_those_of_finite_differences(self) -> None:
        student, teacher = self.layers()
        assert gradcheck(lambda *s: losses.singular_vectors(s, teacher), tuple(f.requires_grad_() for f in student))

    def test_equal_maps_are_the_least_whatever_their_scale(self) -> None:
        student, teacher = self.layers()
        assert losses.singular_vectors(student, teacher).item() > 1e-2
        assert losses.singular_vectors([-3 * f for f in teacher], teacher).item() == pytest.approx(0, abs=1e-20)

    def test_dead_channels_have_a_finite_gradient(self) -> None:
        """Several singular values are 0 there; the gradient of a full decomposition is not a number."""
        student, teacher = self.layers()
        dead = [torch.cat([f[:, :2], torch.zeros_like(f[:, 2:])], dim=1).float().requires_grad_() for f in student]
        losses.singular_vectors(dead, [f.float() for f in teacher]).backward()
        assert all(f.grad is not None and f.grad.isfinite().all() for f in dead)
        assert any(f.grad.abs().max() > 0 for f in dead if f.grad is not None)

    def test_columns_need_no_equal_channels(self) -> None:
        student, teacher = self.layers()
        wide = [torch.cat([f, f], dim=1) for f in teacher]
        value = losses.singular_vectors(student, teacher, matrix="columns").item()
        # Each row of the matrix twice: vectors stay, singular values grow alike.
        assert losses.singular_vectors(student, wide, matrix="columns").item() == pytest.approx(value, rel=1e-9)
        assert value != pytest.approx(losses.singular_vectors(student, teacher).item(), rel=1e-2)
        with pytest.raises(ValueError, match="equal channels"):
            losses.singular_vectors(student, wide)

    def test_what_does_not_fit(self) -> None:
        student, teacher = self.layers()
        with pytest.raises(ValueError, match="at least two"):
            losses.singular_vectors(student[:1], teacher[:1])
        with pytest.raises(ValueError, match="'channels' or 'columns'"):
            losses.singular_vectors(student, teacher, matrix="rows")  # type: ignore[arg-type]
