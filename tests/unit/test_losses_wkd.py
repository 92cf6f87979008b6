"""The Wasserstein distances of WKD against loops, closed forms and transport on a line in float64.

Values and gradients were compared with JiamingLv/WKD (distillers/WKD.py, its loss in float64) too, outside
this project.
"""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from tensors import LABELS, equal_maps, logits, rand
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench import losses

HEAD = nn.Linear(7, 5).double()
HEAD.weight.data = rand(5, 7, seed=9)


def wkd(student: Tensor, teacher: Tensor, labels: Tensor = LABELS, head: nn.Module = HEAD, **options: float) -> Tensor:
    return losses.wasserstein_logits(student, teacher, labels, head, **options)  # type: ignore[arg-type]


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(z) for z in row]
    return [p / sum(powers) for p in powers]


class TestClassDistances:
    def test_by_angles(self) -> None:
        """Rows at 0°, 60°, 90° and 180° from the first, of several lengths."""
        rows = torch.tensor([[1.0, 0.0], [3.0, 27**0.5], [0.0, 0.1], [-2.0, 0.0]], dtype=torch.float64)
        assert losses.class_distances(rows, 0.0)[0].tolist() == pytest.approx([0, 0.5, 1, 2], abs=1e-12)
        expected = [0, 1 - math.exp(-1.5), 1 - math.exp(-3), 1 - math.exp(-6)]
        assert losses.class_distances(rows, 3.0)[0].tolist() == pytest.approx(expected, abs=1e-12)
        assert torch.equal(losses.class_distances(rows), losses.class_distances(rows).t())

    def test_a_row_of_zeros_has_no_direction(self) -> None:
        rows = torch.stack([torch.zeros(3), torch.ones(3)])
        assert losses.class_distances(rows, 0.0).tolist() == [[1, 1], [1, pytest.approx(0, abs=1e-6)]]

    def test_shapes_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"\[K, D\], not \[5\]"):
            losses.class_distances(torch.ones(5))


class TestSinkhorn:
    def test_by_loops(self) -> None:
        student, teacher = (z.softmax(dim=1) for z in logits())
        cost = rand(5, 5, seed=3).abs()
        found = losses.sinkhorn_cost(student, teacher, cost, 0.4, 3, eps=1e-2)
        for row, own, taught in zip(found.tolist(), student.tolist(), teacher.tolist(), strict=True):
            kernel = [[math.exp(-c / 0.4) for c in line] for line in cost.tolist()]
            u = [0.2] * 5
            for _ in range(3):
                v = [taught[j] / (sum(kernel[i][j] * u[i] for i in range(5)) + 1e-2) for j in range(5)]
                u = [own[i] / (sum(kernel[i][j] * v[j] for j in range(5)) + 1e-2) for i in range(5)]
            total = sum(u[i] * kernel[i][j] * v[j] * float(cost[i, j]) for i in range(5) for j in range(5))
            assert row == pytest.approx(total, rel=1e-12)

    def test_on_a_line_it_is_the_area_between_the_sums(self) -> None:
        """Without entropy and with patience: W of |i - j| is the sum of |F_S - F_T| of the cumulated probabilities."""
        student, teacher = (z.softmax(dim=1) for z in (logits()[0], logits()[1]))
        places = torch.arange(5, dtype=torch.float64)
        cost = (places[:, None] - places).abs()
        expected = (student.cumsum(dim=1) - teacher.cumsum(dim=1)).abs().sum(dim=1)
        found = losses.sinkhorn_cost(student, teacher, cost, 0.02, 4000, eps=0.0)
        assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-3)

    def test_two_classes_by_hand(self) -> None:
        """One iteration from u = ½: v_j = q_j / (½ (1 + k)), and the student's side is then exact."""
        student, teacher = (torch.tensor([row], dtype=torch.float64) for row in ([0.9, 0.1], [0.3, 0.7]))
        cost, k = torch.tensor([[0.0, 0.5], [0.5, 0.0]]).double(), math.exp(-0.5)
        moved = 0.9 * 0.7 * k / (0.3 + 0.7 * k) + 0.1 * 0.3 * k / (0.3 * k + 0.7)
        found = losses.sinkhorn_cost(student, teacher, cost, 1.0, 1, eps=0.0)
        assert found.item() == pytest.approx(0.5 * moved, rel=1e-12)

    def test_classes_that_take_no_part_might_as_well_not_be_there(self) -> None:
        student, teacher = (z[:, :4].softmax(dim=1) for z in logits())
        cost = rand(5, 5, seed=3).abs()
        wide = [F.pad(one, (0, 1)) for one in (student, teacher)]
        classes = (torch.arange(5) < 4).expand(6, 5)
        found = losses.sinkhorn_cost(*wide, cost, 0.3, 2, classes)
        expected = losses.sinkhorn_cost(student, teacher, cost[:4, :4], 0.3, 2)
        assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-12)
        # They count in where the first iteration begins.
        assert losses.sinkhorn_cost(*wide, cost, 0.3, 2).tolist() != pytest.approx(expected.tolist(), rel=1e-9)

    def test_arguments_that_do_not_fit(self) -> None:
        rows, cost = torch.full((6, 5), 0.2), torch.ones(5, 5)
        for other in (cost[:4], cost[:, :1], cost[0]):
            with pytest.raises(ValueError, match=r"\[6, 5\], \["):
                losses.sinkhorn_cost(rows, rows, other)
        with pytest.raises(ValueError, match=r"student \[6, 5\], teacher \[6, 4\]"):
            losses.sinkhorn_cost(rows, rows[:, :4], cost)
        with pytest.raises(ValueError, match="iterations must be at least 1"):
            losses.sinkhorn_cost(rows, rows, cost, iterations=0)
        with pytest.raises(ValueError, match="regularization must be positive"):
            losses.sinkhorn_cost(rows, rows, cost, regularization=0.0)


class TestLogits:
    def test_is_the_cost_of_each_image_without_its_label(self) -> None:
        """Rows and costs really made smaller, image by image."""
        distances = losses.class_distances(HEAD.weight.detach(), 2.0).clamp_min(0) + 1e-8
        total = 0.0
        for own, taught, y in zip(*(z.tolist() for z in logits()), LABELS.tolist(), strict=True):
            others = [k for k in range(5) if k != y]
            rows = [torch.tensor([softmax([z[k] / 3 for k in others])]).double() for z in (own, taught)]
            total += losses.sinkhorn_cost(*rows, distances[others][:, others], 0.1, 4).item()
        found = wkd(*logits(), temperature=3.0, sharpness=2.0, regularization=0.1, iterations=4)
        assert found.item() == pytest.approx(total / 6, rel=1e-6)

    def test_the_labels_logits_and_shifts_change_nothing(self) -> None:
        student, teacher = logits()
        value = wkd(student, teacher).item()
        at_label = F.one_hot(LABELS, 5).double()
        moved = [z + 7 * at_label * rand(6, 1, seed=1) + rand(6, 1, seed=2) for z in (student, teacher)]
        assert wkd(*moved).item() == pytest.approx(value, rel=1e-12)
        assert wkd(student.flip(1), teacher).item() != pytest.approx(value, rel=1e-3)

    def test_the_order_of_classes_changes_nothing(self) -> None:
        order = torch.tensor([3, 0, 4, 1, 2])
        head = nn.Linear(7, 5).double()
        head.weight.data = HEAD.weight.data[order]
        moved = [z[:, order] for z in logits()]
        assert wkd(*moved, labels=order.argsort()[LABELS], head=head).item() == pytest.approx(
            wkd(*logits()).item(), rel=1e-12
        )

    def test_a_class_like_the_teachers_costs_less_than_another(self) -> None:
        """The teacher says class 1; class 2 has nearly its direction, class 3 the opposite one."""
        head = nn.Linear(2, 4)
        head.weight.data = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]])
        teacher, labels = torch.tensor([[0.0, 9.0, 0.0, 0.0]]), torch.tensor([0])
        near, far = (9 * F.one_hot(torch.tensor([k]), 4).float() for k in (2, 3))
        costs = [wkd(z, teacher, labels, head, temperature=1.0).item() for z in (teacher, near, far)]
        # 1 - exp(-(1 - cos)): at most 0.005 for 6°, 0.86 for 180°.
        assert costs[0] < costs[1] < 0.02 and costs[2] == pytest.approx(1 - math.exp(-2), rel=0.01)

    def test_the_classifier_gets_no_gradient(self) -> None:
        HEAD.weight.grad = None
        wkd(logits()[0].requires_grad_(), logits()[1]).backward()
        assert HEAD.weight.grad is None

    def test_two_classes_leave_one_and_nothing_to_move(self) -> None:
        student = torch.tensor([[1.0, -2.0]], requires_grad=True)
        value = wkd(student, torch.tensor([[0.0, 3.0]]), torch.tensor([1]), nn.Linear(3, 2))
        value.backward()
        assert value.item() == pytest.approx(0, abs=1e-6)
        assert student.grad is not None and student.grad.abs().max() < 1e-6

    def test_float32_has_the_digits_of_float64(self) -> None:
        """A hundred classes; the smallest of the kernel's numbers is e^-17."""
        student, teacher, head = 5 * rand(8, 100, seed=1), 5 * rand(8, 100, seed=2), nn.Linear(16, 100).double()
        head.weight.data = rand(100, 16, seed=3)
        labels = torch.arange(8)
        found = []
        for dtype in (torch.float32, torch.float64):
            own = student.to(dtype).requires_grad_()
            wkd(own, teacher.to(dtype), labels, head, temperature=2.0).backward()
            assert own.grad is not None
            found.append(own.grad.double())
        assert (found[0] - found[1]).abs().max() < 1e-4 * found[1].abs().max()

    def test_arguments_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="linear classifier, not Sequential"):
            wkd(*logits(), head=nn.Sequential(HEAD))
        with pytest.raises(ValueError, match=r"\[6, 5\], \[4, 4\]"):
            wkd(*logits(), head=nn.Linear(7, 4))
        with pytest.raises(ValueError, match="temperature must be positive"):
            wkd(*logits(), temperature=0.0)


class TestGaussian:
    def test_by_loops(self) -> None:
        student, teacher = equal_maps()
        total = 0.0
        for n in range(3):
            for c in range(4):
                own, taught = ([float(x) for x in side[n, c].flatten()] for side in (student, teacher))
                deviations = [math.sqrt(statistics.variance(side) + 1e-5) for side in (own, taught)]
                total += 4 * (statistics.mean(own) - statistics.mean(taught)) ** 2
                total += (deviations[0] - deviations[1]) ** 2
        assert losses.wasserstein_gaussian(student, teacher).item() == pytest.approx(total / 3, rel=1e-12)

    @pytest.mark.parametrize(("size", "grid"), [((8, 8), 4), ((7, 7), 4), ((5, 3), 2), ((3, 3), 4)])
    def test_regions_are_those_of_adaptive_pooling(self, size: tuple[int, int], grid: int) -> None:
        """Means by torch's own pooling; deviations by loops."""
        student = rand(2, 3, *size, seed=1)
        teacher = student + rand(2, 3, 1, 1, seed=2)
        means = [F.adaptive_avg_pool2d(one, grid) for one in (student, teacher)]
        expected = 5 * (means[0] - means[1]).square().sum().item() / (2 * grid**2)
        found = losses.wasserstein_gaussian(student, teacher, 5.0, grid)
        assert found.item() == pytest.approx(expected, rel=1e-12)
        other = rand(2, 3, *size, seed=3)
        expected = 0.0
        for i in range(grid):
            for j in range(grid):
                rows, columns = (
                    slice(n * at // grid, math.ceil(n * (at + 1) / grid)) for n, at in zip(size, (i, j), strict=True)
                )
                regions = [one[:, :, rows, columns].flatten(2).flatten(0, 1).tolist() for one in (student, other)]
                for pair in zip(*regions, strict=True):
                    variances = [statistics.variance(one) if len(one) > 1 else 0.0 for one in pair]
                    expected += (math.sqrt(variances[0] + 1e-5) - math.sqrt(variances[1] + 1e-5)) ** 2
        expected /= 2 * grid**2
        found = losses.wasserstein_gaussian(student, other, 0.0, grid)
        assert found.item() == pytest.approx(expected, rel=1e-9)

    def test_the_order_of_positions_changes_nothing(self) -> None:
        student, teacher = equal_maps()
        value = losses.wasserstein_gaussian(student, teacher).item()
        assert losses.wasserstein_gaussian(student.flip(2, 3), teacher).item() == pytest.approx(value, rel=1e-12)
        assert losses.wasserstein_gaussian(student.flip(1), teacher).item() != pytest.approx(value, rel=1e-3)

    def test_a_map_of_single_positions_has_means_alone(self) -> None:
        student, teacher = rand(2, 3, 2, 2, seed=1).requires_grad_(), rand(2, 3, 2, 2, seed=2)
        value = losses.wasserstein_gaussian(student, teacher, 1.0, grid=2)
        value.backward()
        assert value.item() == pytest.approx((student - teacher).square().sum().item() / 8, rel=1e-12)
        assert student.grad is not None and torch.allclose(student.grad, (student - teacher) / 4)

    def test_constant_channels_have_a_finite_gradient(self) -> None:
        student = torch.ones(2, 3, 4, 4, requires_grad=True)
        losses.wasserstein_gaussian(student, torch.randn(2, 3, 4, 4)).backward()
        assert student.grad is not None and student.grad.isfinite().all()

    def test_arguments_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"maps \[N, C, H, W\]: student \[2, 3\]"):
            losses.wasserstein_gaussian(torch.ones(2, 3), torch.ones(2, 3))
        with pytest.raises(ValueError, match="grid must be at least 1"):
            losses.wasserstein_gaussian(*equal_maps(), grid=0)
        with pytest.raises(ValueError, match="eps must be positive"):
            losses.wasserstein_gaussian(*equal_maps(), eps=0.0)
