"""The losses of the usual tables against loops, closed forms and other formulas in float64, and what must not change
them. Values and gradients were compared with HobbitLong/RepDistiller b84f547, megvii-research/mdistiller a08d46f,
hunto/image_classification_sota 6f7a70a, AberHu/Knowledge-Distillation-Zoo 65470c8 and (DIST+, but for the sign of its
channels) yoshitomo-matsubara/torchdistill 3e4373c too, outside this project."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from tensors import LABELS, logits, maps, rand, vectors
from torch import Tensor
from torch.autograd import gradcheck
from torch.distributions import Normal
from torch.nn import functional as F

from kdbench import losses

Loss = Callable[..., Tensor]
CORNERS = tuple(itertools.product(range(2), repeat=2))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / math.sqrt(float(a @ a) * float(b @ b)))


def huber(x: float) -> float:
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


class TestSimilarityPreserving:
    def test_by_loops(self) -> None:
        student, teacher = vectors()
        total = 0.0
        for i in range(5):
            rows = []
            for f in (student, teacher):
                row = [float(f[i] @ f[j]) for j in range(5)]
                norm = math.sqrt(sum(g * g for g in row))
                rows.append([g / norm for g in row])
            total += sum((s - t) ** 2 for s, t in zip(*rows, strict=True))
        assert losses.similarity_preserving(student, teacher).item() == pytest.approx(total / 25, rel=1e-12)

    def test_the_largest_value(self) -> None:
        """Two images: opposite for the student, equal for the teacher; rows (1, -1) / √2 and (1, 1) / √2."""
        student, teacher = torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0], [1.0]])
        assert losses.similarity_preserving(student, teacher).item() == pytest.approx(2 * 2 / 4)

    def test_scaling_and_rotation_change_nothing(self) -> None:
        student, teacher = vectors()
        rotation = torch.linalg.qr(rand(3, 3, seed=9)).Q
        value = losses.similarity_preserving(student, teacher).item()
        assert losses.similarity_preserving(7 * student @ rotation, 0.1 * teacher).item() == pytest.approx(value)

    def test_a_shift_changes_it(self) -> None:
        student, teacher = vectors()
        value = losses.similarity_preserving(student, teacher).item()
        assert losses.similarity_preserving(student + 1, teacher).item() != pytest.approx(value, rel=1e-3)


class TestRKD:
    def test_distances_by_loops(self) -> None:
        def relative(f: Tensor) -> dict[tuple[int, int], float]:
            found = {(i, j): math.dist(f[i], f[j]) for i, j in itertools.permutations(range(5), 2)}
            mean = sum(found.values()) / len(found)
            return {pair: distance / mean for pair, distance in found.items()}

        student, teacher = vectors()
        own, taught = relative(student), relative(teacher)
        total = sum(huber(own[pair] - taught[pair]) for pair in own)
        assert losses.rkd_distance(student, teacher).item() == pytest.approx(total / 25, rel=1e-12)

    def test_angles_by_loops(self) -> None:
        student, teacher = vectors()
        total = 0.0
        for i, j, k in itertools.product(range(5), repeat=3):
            if i not in (j, k):
                angles = [cosine(f[j] - f[i], f[k] - f[i]) for f in (student, teacher)]
                total += huber(angles[0] - angles[1])
        assert losses.rkd_angle(student, teacher).item() == pytest.approx(total / 125, rel=1e-12)

    def test_large_differences_are_taken_linearly(self) -> None:
        """Three points on a line, the middle one at its place or beyond an end: cosines -1 against 1, Huber 1.5."""
        student, teacher = torch.tensor([[0.0], [1.0], [-1.0]]), torch.tensor([[0.0], [1.0], [2.0]])
        # From 0: -1 against 1. From the second: 1 against -1. From the third: 1 against 1. Twice each, (j, k), (k, j).
        assert losses.rkd_angle(student, teacher).item() == pytest.approx(2 * 2 * 1.5 / 27)

    @pytest.mark.parametrize("loss", [losses.rkd_distance, losses.rkd_angle])
    def test_rotation_shift_and_scale_change_nothing(self, loss: Loss) -> None:
        student, teacher = vectors()
        rotation = torch.linalg.qr(rand(3, 3, seed=9)).Q
        moved = 5 * student @ rotation + 2
        assert loss(moved, 0.3 * teacher - 1).item() == pytest.approx(loss(student, teacher).item(), rel=1e-11)

    @pytest.mark.parametrize("loss", [losses.rkd_distance, losses.rkd_angle])
    def test_equal_images_have_finite_gradients(self, loss: Loss) -> None:
        student, teacher = rand(4, 3, seed=1).float(), rand(4, 3, seed=2).float()
        student[1] = student[0]
        student.requires_grad_()
        loss(student, teacher).backward()
        assert student.grad is not None and student.grad.isfinite().all() and student.grad.abs().max() < 10

    def test_distances_that_products_would_lose(self) -> None:
        """Features around 1000 with differences of a thousandth: float32 inner products have no digit of them."""
        near = rand(4, 3, seed=1)
        single = (near * 2**-10 + 1024).float()
        exact = losses.rkd_distance(single.double(), rand(4, 3, seed=2)).item()
        assert losses.rkd_distance(single, rand(4, 3, seed=2).float()).item() == pytest.approx(exact, rel=1e-5)


class TestPKT:
    @pytest.mark.parametrize("eps", [1e-7, 0.1])
    def test_by_loops(self, eps: float) -> None:
        def row(f: Tensor, i: int) -> list[float]:
            unit = [x / (math.sqrt(float(x @ x)) + eps) for x in f]
            kernel = [(float(unit[i] @ unit[j]) + 1) / 2 for j in range(5)]
            return [k / sum(kernel) for k in kernel]

        student, teacher = vectors()
        pairs = [pair for i in range(5) for pair in zip(row(student, i), row(teacher, i), strict=True)]
        total = sum(t * math.log((t + eps) / (s + eps)) for s, t in pairs)
        assert losses.pkt(student, teacher, eps=eps).item() == pytest.approx(total / 25, rel=1e-9)

    def test_its_mean_over_rows_is_kl_divergence_over_the_batch_size(self) -> None:
        student, teacher = vectors()
        own, taught = ((F.cosine_similarity(f[:, None], f[None], dim=2) + 1) for f in (student, teacher))
        own, taught = (k / k.sum(1, keepdim=True) for k in (own, taught))
        divergence = F.kl_div(own.log(), taught, reduction="batchmean")
        assert losses.pkt(student, teacher).item() == pytest.approx(divergence.item() / 5, rel=1e-4)

    def test_opposite_images_do_not_end_in_infinity(self) -> None:
        student = torch.tensor([[1.0], [-1.0]], requires_grad=True)
        value = losses.pkt(student, torch.tensor([[1.0], [1.0]]))
        value.backward()
        assert value.isfinite() and student.grad is not None and student.grad.isfinite().all()

    def test_rounding_takes_no_cosine_below_its_least(self) -> None:
        """Shares are 0 and 1 for opposite features, 1/2 for equal ones. A share of 0 that rounds up lowers the loss."""
        most = (math.log(0.5) + math.log(0.5 / 1e-7)) / 4
        for seed in range(20):
            one = rand(4096, seed=seed).float()
            opposite = torch.stack([one, -2.3 * one]).requires_grad_()
            value = losses.pkt(opposite, torch.ones(2, 1))
            value.backward()
            assert most / 2 < value.item() < most * (1 + 1e-6)
            assert opposite.grad is not None and opposite.grad.isfinite().all()
            assert losses.pkt(torch.ones(2, 1), opposite).item() == pytest.approx(math.log(2) / 2, rel=1e-4)

    def test_a_feature_of_zeros_has_a_gradient(self) -> None:
        student, teacher = vectors()
        student[2] = 0
        student.requires_grad_()
        losses.pkt(student, teacher).backward()
        assert student.grad is not None and student.grad.isfinite().all()


class TestIRG:
    """Several layers of five images: a student's maps and vectors, and a wider teacher's."""

    def layers(self) -> tuple[list[Tensor], list[Tensor]]:
        student = [rand(5, 2, 4, 4, seed=1), rand(5, 4, 2, 2, seed=2), rand(5, 4, seed=3)]
        return student, [rand(5, 3, 4, 4, seed=4), rand(5, 6, 2, 2, seed=5), rand(5, 6, seed=6)]

    def test_edges_by_loops(self) -> None:
        def edges(feature: Tensor) -> dict[tuple[int, int], float]:
            rows = feature.flatten(1).tolist()
            found = {(i, j): math.dist(rows[i], rows[j]) ** 2 for i, j in itertools.product(range(5), repeat=2)}
            return {pair: distance / max(found.values()) for pair, distance in found.items()}

        student, teacher = self.layers()
        total = 0.0
        for own, taught in zip(student, teacher, strict=True):
            ours, theirs = edges(own), edges(taught)
            total += sum((ours[pair] - theirs[pair]) ** 2 for pair in ours) / 25
        assert losses.instance_edges(student, teacher).item() == pytest.approx(total / 3, rel=1e-12)
        alone = [losses.instance_edges([s], [t]).item() for s, t in zip(student, teacher, strict=True)]
        assert sum(alone) == pytest.approx(total, rel=1e-12)

    def test_edges_are_of_what_lies_between_images(self) -> None:
        """Rotation, a shift and a scale of a layer change nothing, also far from 0 in float32."""
        student, teacher = self.layers()
        value = losses.instance_edges(student, teacher).item()
        rotation = torch.linalg.qr(rand(4, 4, seed=7)).Q
        moved = [student[0] + 5, -2 * student[1], 3 * student[2] @ rotation - 7]
        assert losses.instance_edges(moved, teacher).item() == pytest.approx(value, rel=1e-10)
        assert losses.instance_edges([s.exp() for s in student], teacher).item() != pytest.approx(value, rel=1e-2)
        far = [(s + 300).float() for s in student]
        assert losses.instance_edges(far, [t.float() for t in teacher]).item() == pytest.approx(value, rel=1e-3)

    def moves(self, first: Tensor, second: Tensor, pooled: Callable[[Tensor], Tensor]) -> list[float]:
        """Of a map of 4 × 4 to one of 2 × 2, whose channels `pooled` brings to the number of the first one's."""
        found = []
        for n in range(5):
            small = torch.stack([first[n][:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2)) for i, j in CORNERS])
            next_map = torch.stack([pooled(second[n][:, i, j]) for i, j in CORNERS])
            found.append(sum(x * x for x in (next_map - small).flatten().tolist()))
        return [distance / max(found) for distance in found]

    def test_transformation_by_loops(self) -> None:
        student, teacher = (layers[:2] for layers in self.layers())
        ours, theirs = (
            self.moves(*layers, lambda c: torch.stack([(c[k] + c[k + 1]) / 2 for k in range(0, len(c), 2)]))
            for layers in (student, teacher)
        )
        expected = sum((s - t) ** 2 for s, t in zip(ours, theirs, strict=True)) / 5
        value = losses.instance_transformation(student, teacher).item()
        assert value == pytest.approx(expected, rel=1e-12)
        narrow = [teacher[0], rand(5, 5, 2, 2, seed=8)]  # three windows of two channels: 0 and 1, 1 to 3, 3 and 4
        other = self.moves(*narrow, lambda c: torch.stack([c[:2].mean(), c[1:4].mean(), c[3:].mean()]))
        expected = sum((s - t) ** 2 for s, t in zip(ours, other, strict=True)) / 5
        assert losses.instance_transformation(student, narrow).item() == pytest.approx(expected, rel=1e-12)

    def test_more_layers_are_more_steps(self) -> None:
        student, teacher = ([*layers[:2], 2 * layers[1].square()] for layers in self.layers())
        steps = [losses.instance_transformation(student[i : i + 2], teacher[i : i + 2]).item() for i in (0, 1)]
        assert steps[0] != pytest.approx(steps[1], rel=1e-2)
        assert losses.instance_transformation(student, teacher).item() == pytest.approx(sum(steps) / 2, rel=1e-12)

    def test_gradients_go_through_the_largest_distance(self) -> None:
        student, teacher = self.layers()
        for features in (student, teacher):
            for feature in features:
                feature.requires_grad_()
        assert gradcheck(lambda *s: losses.instance_edges(s, teacher), tuple(student))
        assert gradcheck(lambda *s: losses.instance_transformation(s, teacher[:2]), tuple(student[:2]))
        (losses.instance_edges(student, teacher) + losses.instance_transformation(student[:2], teacher[:2])).backward()
        assert all(t.grad is None for t in teacher)

    def test_equal_images_have_no_distance(self) -> None:
        teacher = self.layers()[1]
        student = [torch.ones(5, 2, n, n, dtype=torch.float64, requires_grad=True) for n in (4, 2)]
        values = losses.instance_edges(student, teacher[:2]), losses.instance_transformation(student, teacher[:2])
        sum(values).backward()
        for own in student:
            assert own.grad is not None and own.grad.isfinite().all()
        edges = [losses.instance_edges([own], [0 * own]).item() for own in student]
        assert edges == [0, 0] and values[0].item() > 0

    def test_layers_that_do_not_fit(self) -> None:
        student, teacher = self.layers()
        for loss in (losses.instance_edges, losses.instance_transformation):
            with pytest.raises(ValueError, match="lists of features"):
                loss(student[0], teacher[0])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="3 of the student and 2 of the teacher"):
            losses.instance_edges(student, teacher[:2])
        with pytest.raises(ValueError, match="at least 1"):
            losses.instance_edges([], [])
        with pytest.raises(ValueError, match="at least 2"):
            losses.instance_transformation(student[:1], teacher[:1])
        with pytest.raises(ValueError, match=r"needs maps \[N, C, H, W\], not \[5, 6\]"):
            losses.instance_transformation(student[:2], [teacher[0], teacher[2]])
        with pytest.raises(ValueError, match=r"student \[5, 2, 4, 4\], teacher \[4, 3, 4, 4\]"):
            losses.instance_transformation(student[:2], [t[:4] for t in teacher[:2]])


class TestNST:
    def test_is_the_squared_distance_of_mean_outer_products(self) -> None:
        """(aᵀ b)² is the inner product of a aᵀ and b bᵀ, so the discrepancy is that of their means over channels."""
        student, teacher = rand(3, 2, 3, 2, seed=3), rand(3, 4, 3, 2, seed=4)
        total = 0.0
        for own, taught in zip(student.flatten(2), teacher.flatten(2), strict=True):
            means = [torch.stack([torch.outer(a, a) / (a @ a) for a in channels]).mean(0) for channels in (own, taught)]
            total += float((means[0] - means[1]).square().sum())
        assert losses.neuron_selectivity(student, teacher).item() == pytest.approx(total / 3, rel=1e-12)

    def test_order_sign_and_size_of_channels_change_nothing(self) -> None:
        student, teacher = maps()
        other = student.flip(1) * torch.tensor([-3.0, 0.5], dtype=torch.float64).view(1, 2, 1, 1)
        value = losses.neuron_selectivity(student, teacher).item()
        assert losses.neuron_selectivity(other, teacher).item() == pytest.approx(value, rel=1e-12)

    def test_a_dead_channel_has_a_gradient(self) -> None:
        student, teacher = maps()
        student[:, 0] = 0
        student.requires_grad_()
        losses.neuron_selectivity(student, teacher).backward()
        assert student.grad is not None and student.grad.isfinite().all()


class TestCC:
    def test_neighbours_by_loops(self) -> None:
        student, teacher = rand(4, 3, seed=1), rand(4, 3, seed=2)
        total = 0.0
        for i in range(3):
            for d in range(3):
                total += abs(float(student[i, d] - teacher[i, d])) * abs(float(student[i + 1, d] - teacher[i + 1, d]))
        assert losses.neighbour_congruence(student, teacher).item() == pytest.approx(total / 3, rel=1e-12)

    def test_the_order_of_the_batch_matters(self) -> None:
        student, teacher = rand(4, 3, seed=1), rand(4, 3, seed=2)
        order = torch.tensor([0, 2, 1, 3])
        value = losses.neighbour_congruence(student, teacher).item()
        assert losses.neighbour_congruence(student[order], teacher[order]).item() != pytest.approx(value, rel=1e-3)

    def test_both_embeddings_learn_and_the_teacher_does_not(self) -> None:
        module = losses.NeighbourCongruence((3,), (7,), dim=4).double()
        student, teacher = (feature.requires_grad_() for feature in vectors())
        module(student, teacher).backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
        assert student.grad is not None and teacher.grad is None

    def test_the_module_is_the_function_of_linear_embeddings(self) -> None:
        module = losses.NeighbourCongruence((2, 4, 4), (5, 2, 2), dim=4).double()
        student, teacher = maps()
        embedded = [
            features.flatten(1) @ layer.weight.T + layer.bias
            for features, layer in ((student, module.student), (teacher, module.teacher))
        ]
        assert module(student, teacher).item() == pytest.approx(losses.neighbour_congruence(*embedded).item())

    def test_a_batch_of_one_has_no_neighbours(self) -> None:
        assert losses.neighbour_congruence(torch.ones(1, 3), torch.zeros(1, 3)).item() == 0

    def test_high_order_is_the_gaussian_kernel(self) -> None:
        student, teacher = (F.normalize(f, dim=1) for f in vectors())
        own, taught = (torch.exp(-0.4 * torch.cdist(f, f).square()) for f in (student, teacher))
        expected = (own - taught).square().mean().item()
        assert losses.kernel_congruence(*vectors(), gamma=0.4, order=30).item() == pytest.approx(expected, rel=1e-10)

    def test_second_order_by_loops(self) -> None:
        def kernel(a: Tensor, b: Tensor) -> float:
            x = 2 * 0.4 * cosine(a, b)
            return math.exp(-2 * 0.4) * (1 + x + x * x / 2)

        student, teacher = vectors()
        pairs = list(itertools.product(range(5), repeat=2))
        total = sum((kernel(student[i], student[j]) - kernel(teacher[i], teacher[j])) ** 2 for i, j in pairs)
        assert losses.kernel_congruence(student, teacher).item() == pytest.approx(total / 25, rel=1e-12)
        # As a recipe gives it that schedules it.
        scheduled = losses.kernel_congruence(student, teacher, gamma=torch.tensor(0.4, dtype=torch.float64))  # type: ignore[arg-type]
        assert scheduled.item() == pytest.approx(total / 25, rel=1e-12)

    def test_first_order_leaves_the_square_out(self) -> None:
        student, teacher = vectors()
        own, taught = (F.normalize(f, dim=1) @ F.normalize(f, dim=1).T for f in (student, teacher))
        expected = (math.exp(-0.8) * 0.8) ** 2 * (own - taught).square().mean().item()
        assert losses.kernel_congruence(student, teacher, order=1).item() == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("options", [{"gamma": 0.0}, {"gamma": math.nan}, {"order": 0}])
    def test_options_out_of_range(self, options: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="must be (positive|at least 1), not"):
            losses.kernel_congruence(*vectors(), **options)


class TestVID:
    def test_is_the_likelihood_of_a_gaussian(self) -> None:
        mean, teacher = rand(3, 2, 4, 4, seed=1), rand(3, 2, 4, 4, seed=2)
        variance = torch.tensor([0.3, 4.0], dtype=torch.float64)
        likelihood = Normal(mean, variance.sqrt().view(1, 2, 1, 1)).log_prob(teacher).mean().item()
        expected = -likelihood - math.log(2 * math.pi) / 2
        assert losses.gaussian_nll(mean, teacher, variance).item() == pytest.approx(expected, rel=1e-12)

    def test_the_best_variance_is_the_mean_squared_error(self) -> None:
        mean, teacher = rand(3, 2, 4, 4, seed=1), rand(3, 2, 4, 4, seed=2)
        best = (mean - teacher).square().mean(dim=(0, 2, 3)).requires_grad_()
        losses.gaussian_nll(mean, teacher, best).backward()
        assert best.grad is not None and best.grad.abs().max() < 1e-15

    def test_variances_begin_where_they_should_and_learn(self) -> None:
        module = losses.VariationalInformation((2, 4, 4), (5, 2, 2), variance=5.0).double()
        assert module.variance.tolist() == pytest.approx([5.0] * 5, rel=1e-6)
        module(*maps()).backward()
        assert module.before_softplus.grad is not None and module.before_softplus.grad.abs().min() > 0

    @pytest.mark.parametrize("variance", [2e-5, 0.5, 300.0])
    def test_any_first_variance(self, variance: float) -> None:
        module = losses.VariationalInformation((2, 4, 4), (5, 2, 2), variance=variance)
        assert module.variance.tolist() == pytest.approx([variance] * 5, rel=1e-5)

    def test_fixed_variances_are_no_parameters(self) -> None:
        module = losses.VariationalInformation((2, 4, 4), (5, 2, 2), learned=False).double()
        assert [name for name, _ in module.named_parameters() if "regressor" not in name] == []
        student, teacher = maps()
        error = (module.regressor(F.avg_pool2d(student, 2)) - teacher).square().mean().item()
        assert module(student, teacher).item() == pytest.approx(error / 10 + math.log(5) / 2, rel=1e-6)

    def test_the_regressor_is_three_convolutions_of_the_teachers_width(self) -> None:
        module = losses.VariationalInformation((2, 4, 4), (5, 2, 2)).double()
        shapes = [tuple(p.shape) for p in module.regressor.parameters()]
        assert shapes == [(5, 2, 1, 1), (5, 5, 1, 1), (5, 5, 1, 1)]
        weights = [p.flatten(1) for p in module.regressor.parameters()]
        student, teacher = maps()
        pixels = F.avg_pool2d(student, 2).movedim(1, -1)
        mean = (pixels @ weights[0].T).relu() @ weights[1].T
        mean = (mean.relu() @ weights[2].T).movedim(-1, 1)
        expected = losses.gaussian_nll(mean, teacher, module.variance).item()
        assert module(student, teacher).item() == pytest.approx(expected, rel=1e-12)

    def test_shapes_and_options_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="maps"):
            losses.VariationalInformation((2,), (5,))
        with pytest.raises(ValueError, match="variance must be above eps"):
            losses.VariationalInformation((2, 4, 4), (5, 2, 2), variance=1e-6)
        with pytest.raises(ValueError, match=r"mean \[3, 2, 4, 4\], teacher \[3, 5, 2, 2\]"):
            losses.gaussian_nll(*maps(), torch.ones(2))


class TestDKD:
    def test_by_loops(self) -> None:
        student, teacher = logits()
        total = 0.0
        for s, t, y in zip(student / 2, teacher / 2, LABELS.tolist(), strict=True):
            p_s, p_t = s.softmax(0).tolist(), t.softmax(0).tolist()
            target = p_t[y] * math.log(p_t[y] / p_s[y]) + (1 - p_t[y]) * math.log((1 - p_t[y]) / (1 - p_s[y]))
            others = 0.0
            for k in range(5):
                if k != y:
                    q_s, q_t = p_s[k] / (1 - p_s[y]), p_t[k] / (1 - p_t[y])
                    others += q_t * math.log(q_t / q_s)
            total += 4 * (0.7 * target + 3 * others)
        value = losses.dkd(student, teacher, LABELS, alpha=0.7, beta=3.0, temperature=2.0).item()
        assert value == pytest.approx(total / 6, rel=1e-12)

    def test_with_the_teachers_doubt_as_weight_it_is_kd(self) -> None:
        student, teacher = logits()
        doubts = 1 - F.softmax(teacher / 4, dim=1)[torch.arange(6), LABELS]
        each = [
            losses.dkd(student[[i]], teacher[[i]], LABELS[[i]], beta=float(doubt)).item()
            for i, doubt in enumerate(doubts)
        ]
        assert sum(each) / 6 == pytest.approx(losses.kd(student, teacher, temperature=4.0).item(), rel=1e-12)

    def test_the_labels_logit_is_nothing_to_the_others(self) -> None:
        student, teacher = logits()
        shifted = student.clone()
        shifted[torch.arange(6), LABELS] += 5
        value = losses.dkd(student, teacher, LABELS, alpha=0.0).item()
        assert losses.dkd(shifted, teacher, LABELS, alpha=0.0).item() == pytest.approx(value, rel=1e-12)

    def test_certain_networks_end_in_no_infinity(self) -> None:
        student = torch.tensor([[200.0, 0.0, 0.0], [0.0, 0.0, 900.0]], requires_grad=True)
        value = losses.dkd(student, torch.tensor([[300.0, 1.0, 0.0], [0.0, 800.0, 0.0]]), torch.tensor([0, 1]))
        value.backward()
        assert value.isfinite() and student.grad is not None and student.grad.isfinite().all()

    def test_two_classes_have_one_other(self) -> None:
        student, teacher = rand(3, 2, seed=1), rand(3, 2, seed=2)
        value = losses.dkd(student, teacher, torch.tensor([0, 1, 1]), beta=100.0).item()
        assert value == pytest.approx(losses.kd(student, teacher).item(), rel=1e-12)

    @pytest.mark.parametrize("labels", [torch.tensor([1]), torch.rand(6, 5), torch.rand(6)])
    def test_labels_must_be_indices(self, labels: Tensor) -> None:
        with pytest.raises(ValueError, match="class indices"):
            losses.dkd(*logits(), labels)

    def test_options_out_of_range(self) -> None:
        with pytest.raises(ValueError, match="temperature must be positive"):
            losses.dkd(*logits(), LABELS, temperature=0.0)
        with pytest.raises(ValueError, match="at least two classes"):
            losses.dkd(torch.ones(2, 1), torch.ones(2, 1), torch.tensor([0, 0]))


class TestDIST:
    def test_is_of_correlations_of_rows_and_columns(self) -> None:
        """torch.corrcoef in place of sums."""
        own, taught = (F.softmax(z / 2, dim=1) for z in logits())
        rows = torch.corrcoef(torch.cat([own, taught]))[:6, 6:].diagonal().mean().item()
        columns = torch.corrcoef(torch.cat([own, taught], dim=1).T)[:5, 5:].diagonal().mean().item()
        value = losses.dist(*logits(), beta=0.5, gamma=2.0, temperature=2.0, eps=0.0).item()
        assert value == pytest.approx(4 * (0.5 * (1 - rows) + 2 * (1 - columns)), rel=1e-10)

    def test_affine_maps_of_probabilities_change_nothing(self) -> None:
        """Of those of an image, or of a class: a mixture with the uniform distribution is one."""
        student, teacher = logits()
        mixed = (0.3 * F.softmax(student, dim=1) + 0.7 / 5).log()
        value = losses.dist(student, teacher, temperature=1.0, eps=0.0).item()
        assert losses.dist(mixed, teacher, temperature=1.0, eps=0.0).item() == pytest.approx(value, rel=1e-10)

    def test_scale(self) -> None:
        value = losses.dist(*logits(), temperature=3.0, scale=False).item()
        assert losses.dist(*logits(), temperature=3.0).item() == pytest.approx(9 * value, rel=1e-12)

    def test_uniform_outputs_have_a_gradient(self) -> None:
        student = torch.zeros(4, 5, requires_grad=True)
        losses.dist(student, rand(4, 5, seed=1).float()).backward()
        assert student.grad is not None and student.grad.isfinite().all()

    def test_options_out_of_range(self) -> None:
        with pytest.raises(ValueError, match="temperature must be positive"):
            losses.dist(*logits(), temperature=-1.0)


class TestDISTPlus:
    def test_channels_are_correlated_at_each_position(self) -> None:
        """torch.corrcoef in place of sums."""
        own, taught = rand(3, 4, 2, 3, seed=1), rand(3, 4, 2, 3, seed=2)
        found = [
            torch.corrcoef(torch.stack([own[n, :, h, w], taught[n, :, h, w]]))[0, 1].item()
            for n, h, w in itertools.product(range(3), range(2), range(3))
        ]
        value = losses.channel_relation(own, taught, eps=0.0).item()
        assert value == pytest.approx(1 - sum(found) / 18, rel=1e-10)

    def test_sums_of_channels_are_correlated_over_the_batch(self) -> None:
        own, taught = rand(5, 2, 2, 3, seed=1), rand(5, 4, 2, 3, seed=2)
        found = [
            torch.corrcoef(torch.stack([f[:, :, h, w].sum(dim=1) for f in (own, taught)]))[0, 1].item()
            for h, w in itertools.product(range(2), range(3))
        ]
        value = losses.spatial_relation(own, taught, eps=0.0).item()
        assert value == pytest.approx(1 - sum(found) / 6, rel=1e-10)

    @pytest.mark.parametrize("loss", [losses.channel_relation, losses.spatial_relation])
    def test_equal_maps_cost_least_and_opposite_ones_most(self, loss: Loss) -> None:
        one = rand(5, 4, 2, 3, seed=1)
        assert loss(3 * one + 1, one).item() == pytest.approx(0, abs=1e-7)
        assert loss(-one, one).item() == pytest.approx(2, abs=1e-7)

    def test_a_scale_and_a_shift_of_each_position_change_no_relation_of_channels(self) -> None:
        own, taught = rand(3, 4, 2, 3, seed=1), rand(3, 4, 2, 3, seed=2)
        scale, shift = rand(3, 1, 2, 3, seed=3).exp(), rand(3, 1, 2, 3, seed=4)
        value = losses.channel_relation(own, taught, eps=0.0).item()
        assert losses.channel_relation(scale * own + shift, taught, eps=0.0).item() == pytest.approx(value, rel=1e-10)
        assert losses.channel_relation(own * rand(1, 4, 1, 1, seed=5), taught, eps=0.0).item() != pytest.approx(value)

    def test_only_the_sum_of_channels_counts_for_positions(self) -> None:
        own, taught = rand(5, 2, 2, 3, seed=1), rand(5, 4, 2, 3, seed=2)
        moved = rand(5, 1, 2, 3, seed=3) * torch.tensor([1.0, -1.0]).view(2, 1, 1)
        value = losses.spatial_relation(own, taught).item()
        assert losses.spatial_relation(own + moved, taught).item() == pytest.approx(value, rel=1e-10)
        assert losses.spatial_relation(own + moved.abs(), taught).item() != pytest.approx(value, rel=1e-3)

    @pytest.mark.parametrize("loss", [losses.channel_relation, losses.spatial_relation])
    def test_equal_channels_and_images_have_no_gradient(self, loss: Loss) -> None:
        student = torch.ones(3, 4, 2, 2, requires_grad=True)
        loss(student, rand(3, 4, 2, 2, seed=1).float()).backward()
        assert student.grad is not None and not student.grad.any()

    def test_one_image_says_nothing_of_the_batch(self) -> None:
        student = rand(1, 4, 2, 2, seed=1).requires_grad_()
        value = losses.spatial_relation(student, rand(1, 4, 2, 2, seed=2))
        value.backward()
        assert value.item() == 1 and student.grad is not None and not student.grad.any()

    def test_channels_must_agree_where_they_are_compared(self) -> None:
        with pytest.raises(ValueError, match=r"equal channels: student \[3, 2, 2, 2\], teacher \[3, 1, 2, 2\]"):
            losses.channel_relation(rand(3, 2, 2, 2, seed=1), rand(3, 1, 2, 2, seed=2))
