"""Losses that read classifiers, epochs, several layers at once or turned images, against loops and closed forms in
float64.

Values and gradients were compared with DefangChen/SimKD 2b389c3 (SRRL, SemCKD), jingyang2017/KD_SRRL d2e802f,
zhengli97/CTKD 7d52522, shicaiwei123/SDD-CVPR2024 e412036, iversonshao/DSKD d60df7d (SDD of standardized logits),
GzyAftermath/CAT-KD 4467073, sunshangquan/logit-standardization-KD f6e5aa5 (MLKD) and
yoshitomo-matsubara/torchdistill 3e4373c (SSKD) too, outside this project.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from tensors import LABELS, logits, rand
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from kdbench import losses
from kdbench.losses.ctkd import against
from kdbench.losses.sskd import turned_similarities

HEADS = nn.Identity(), nn.Identity()


def classifier(inputs: int, classes: int = 5) -> nn.Linear:
    torch.manual_seed(inputs)
    return nn.Linear(inputs, classes).double()


class TestSRRL:
    def module(self, *student: int, beta: float = 2.0) -> losses.SoftmaxRegression:
        torch.manual_seed(0)
        return losses.SoftmaxRegression(student, (7,), beta=beta).double()

    def test_a_map_by_its_formula(self) -> None:
        module, student, teacher, head = (
            self.module(3, 2, 2),
            rand(4, 3, 2, 2, seed=1),
            rand(4, 7, seed=2),
            classifier(7),
        )
        convolution, *_ = module.connector
        mixed = torch.einsum("kc,nchw->nkhw", convolution.weight[:, :, 0, 0], student)
        mean, var = mixed.mean((0, 2, 3), keepdim=True), mixed.var((0, 2, 3), keepdim=True, unbiased=False)
        adapted = ((mixed - mean) / (var + 1e-5).sqrt()).relu().mean((2, 3))
        gap = adapted - teacher
        through = gap @ head.weight.T  # the biases cancel
        expected = gap.square().mean() + 2 * through.square().mean()
        assert module(student, teacher, head).item() == pytest.approx(expected.item(), rel=1e-9)

    def test_a_pooled_feature_is_a_map_of_one_position(self) -> None:
        vector, maps, head = self.module(3), self.module(3, 1, 1), classifier(7)
        maps.load_state_dict(vector.state_dict())
        student, teacher = rand(4, 3, seed=1), rand(4, 7, seed=2)
        value = vector(student, teacher, head).item()
        assert maps(student[:, :, None, None], teacher, head).item() == pytest.approx(value, rel=1e-12)

    def test_initial_values_of_a_map(self) -> None:
        weight = losses.SoftmaxRegression((300, 2, 2), (50,)).connector[0].weight
        assert weight.std().item() == pytest.approx(math.sqrt(2 / 50), rel=0.02)

    def test_no_gradient_reaches_the_teachers_feature(self) -> None:
        teacher = rand(4, 7, seed=2).requires_grad_()
        self.module(3)(rand(4, 3, seed=1), teacher, classifier(7)).backward()
        assert teacher.grad is None

    def test_shapes_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="vector of the teacher"):
            losses.SoftmaxRegression((3,), (7, 2, 2))


class TestCTKD:
    def module(self, **options: Any) -> losses.CurriculumTemperature:
        return losses.CurriculumTemperature((5,), (5,), **options).double()

    @pytest.mark.parametrize("standardize", [False, True])
    def test_is_kd_at_its_temperature(self, standardize: bool) -> None:
        """At first 1 + 20 sigmoid(1) = 15.62."""
        temperature = 1 + 20 / (1 + math.exp(-1))
        assert temperature == pytest.approx(15.62, abs=0.01)
        expected = (losses.standardized_kd if standardize else losses.kd)(*logits(), temperature).item()
        value = self.module(standardize=standardize)(*logits(), torch.tensor(3.0)).item()
        assert value == pytest.approx(expected, rel=1e-9)

    def test_the_student_makes_the_loss_smaller_and_the_temperature_larger(self) -> None:
        """A step of an optimizer along both gradients: the student's lowers the loss, that of θ raises it."""
        module, (student, teacher) = self.module(), logits()
        late = torch.tensor(50.0)
        before = module(student.requires_grad_(), teacher, late)
        of_student, of_theta = torch.autograd.grad(before, [student, module.theta])
        assert module(student - 0.01 * of_student, teacher, late) < before
        with torch.no_grad():
            module.theta -= 0.1 * of_theta
        assert module(student, teacher, late) > before

    def test_gradient_of_theta_by_finite_differences(self) -> None:
        module, step = self.module(), 1e-6
        (found,) = torch.autograd.grad(module(*logits(), torch.tensor(50.0)), module.theta)
        values = []
        for sign in (1, -1):
            module.theta.data.fill_(1 + sign * step)
            values.append(module(*logits(), torch.tensor(50.0)).item())
        assert found.item() == pytest.approx(-(values[0] - values[1]) / (2 * step), rel=1e-6)

    def test_the_curriculum_rises_over_its_epochs(self) -> None:
        """Epochs count from 1: (1 - cos(π e / 4)) / 2 of the whole, all of it from the fourth on."""
        module = self.module(epochs=4.0)
        found = [
            torch.autograd.grad(module(*logits(), torch.tensor(float(e))), module.theta)[0].item() for e in range(6)
        ]
        shares = [value / found[-1] for value in found]
        assert shares == pytest.approx([(1 - math.cos(math.pi * min(e, 4) / 4)) / 2 for e in range(1, 7)], rel=1e-6)

    def test_a_gradient_is_turned_round(self) -> None:
        x = torch.tensor(0.1, requires_grad=True)
        value = against(x, torch.tensor(0.3))
        value.backward()
        assert value.item() == x.item() and x.grad is not None and x.grad.item() == pytest.approx(-0.3)

    def test_options_out_of_range(self) -> None:
        for options in ({"epochs": 0.0}, {"least": 0.0}, {"span": -1.0}):
            with pytest.raises(ValueError, match="above 0"):
                self.module(**options)


class TestSDD:
    def regions(self) -> tuple[Tensor, Tensor]:
        return 2 * rand(6, 3, 5, seed=1), 2 * rand(6, 3, 5, seed=2)

    def test_kd_by_loops(self) -> None:
        student, teacher = self.regions()
        total, doubled = 0.0, 0
        for n, r in itertools.product(range(6), range(3)):
            right = [int(teacher[n, place].argmax()) == int(LABELS[n]) for place in (0, r)]
            doubled += right[0] != right[1]
            value = losses.kd(student[n, r : r + 1], teacher[n, r : r + 1], 4.0).item()
            total += (2 if right[0] != right[1] else 1) * value
        assert 0 < doubled < 12
        assert losses.scale_decoupled(student, teacher, LABELS).item() == pytest.approx(total / 18, rel=1e-12)

    @pytest.mark.parametrize("host", ["kd", "dkd", "nkd", "rld"])
    def test_one_region_is_the_loss_itself(self, host: Any) -> None:
        student, teacher = logits()
        expected = {
            "kd": lambda: losses.kd(student, teacher, 3.0),
            "dkd": lambda: losses.dkd(student, teacher, LABELS, 0.5, 2.0, 3.0),
            "nkd": lambda: losses.nkd(student, teacher, LABELS, 2.0, 3.0),
            "rld": lambda: losses.rld(student, teacher, LABELS, 0.5, 2.0, 3.0),
        }[host]().item()
        value = losses.scale_decoupled(student[:, None], teacher[:, None], LABELS, host, 3.0, 0.5, 2.0).item()
        assert value == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("host", ["kd", "dkd", "nkd", "rld"])
    def test_each_region_is_standardized_for_itself(self, host: Any) -> None:
        student, teacher = self.regions()
        standard = [torch.stack([losses.standardized(z[:, r]) for r in range(3)], dim=1) for z in (student, teacher)]
        options: dict[str, Any] = {"host": host, "temperature": 2.0, "alpha": 0.5, "beta": 2.0}
        value = losses.scale_decoupled(student, teacher, LABELS, **options, standardize=True).item()
        assert value == pytest.approx(losses.scale_decoupled(*standard, LABELS, **options).item(), rel=1e-12)
        assert value != pytest.approx(losses.scale_decoupled(student, teacher, LABELS, **options).item(), rel=1e-3)
        maps, heads = (rand(6, 3, 4, 4, seed=1), rand(6, 4, 4, 4, seed=2)), (classifier(3), classifier(4))
        of_maps = [losses.sdd(*maps, LABELS, *heads, standardize=standardize).item() for standardize in (False, True)]
        assert of_maps[0] != pytest.approx(of_maps[1], rel=1e-3)

    def test_regions_are_means_of_the_map(self) -> None:
        student, teacher = rand(6, 3, 8, 8, seed=1), rand(6, 4, 8, 8, seed=2)
        heads = classifier(3), classifier(4)
        places = [(slice(0, 8), slice(0, 8)), *itertools.product((slice(0, 4), slice(4, 8)), repeat=2)]
        of_regions = [
            torch.stack([head(f[:, :, rows, columns].mean((2, 3))) for rows, columns in places], dim=1)
            for f, head in zip((student, teacher), heads, strict=True)
        ]
        expected = losses.scale_decoupled(*of_regions, LABELS).item()
        assert losses.sdd(student, teacher, LABELS, *heads).item() == pytest.approx(expected, rel=1e-12)
        expected = losses.sdd(student.relu(), teacher.relu(), LABELS, *heads, scales=(1, 2, 4)).item()
        value = losses.sdd(student, teacher, LABELS, *heads, scales=(1, 2, 4), relu=True).item()
        assert value == pytest.approx(expected, rel=1e-12) and value != pytest.approx(
            losses.sdd(student, teacher, LABELS, *heads, scales=(1, 2, 4)).item(), rel=1e-3
        )

    def test_gradients(self) -> None:
        student, teacher = rand(6, 3, 4, 4, seed=1).requires_grad_(), rand(6, 4, 4, 4, seed=2).requires_grad_()
        heads = classifier(3), classifier(4)
        assert gradcheck(lambda s: losses.sdd(s, teacher, LABELS, *heads), (student,))
        losses.sdd(student, teacher, LABELS, *heads).backward()
        assert teacher.grad is None and heads[0].weight.grad is not None

    def test_what_does_not_fit(self) -> None:
        student, teacher = self.regions()
        with pytest.raises(ValueError, match="logits of regions"):
            losses.scale_decoupled(student, teacher[:, :2], LABELS)
        soft = F.one_hot(LABELS, 5).double()
        for labels in (LABELS[:5], LABELS.double(), soft, soft[:, 0]):
            with pytest.raises(ValueError, match="scale_decoupled needs logits"):
                losses.scale_decoupled(student, teacher, labels)
        for host in ("kd", "dkd", "nkd", "rld"):
            with pytest.raises(ValueError, match="at least two classes"):
                losses.scale_decoupled(student[:, :, :1], teacher[:, :, :1], 0 * LABELS, host)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="'kd', 'dkd', 'nkd' or 'rld'"):
            losses.scale_decoupled(student, teacher, LABELS, "at")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="first of the scales"):
            losses.sdd(rand(6, 3, 4, 4, seed=1), teacher, LABELS, classifier(3), classifier(4), scales=(2, 4))


class TestCATKD:
    def test_by_loops(self) -> None:
        student, teacher, heads = rand(2, 3, 4, 4, seed=1), rand(2, 4, 2, 2, seed=2), (classifier(3), classifier(4))
        total = 0.0
        for n, k, i, j in itertools.product(range(2), range(5), range(2), range(2)):
            window = student[n, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2))
            difference = heads[0].weight[k] @ window - heads[1].weight[k] @ teacher[n, :, i, j]
            total += difference.item() ** 2
        assert losses.cat_kd(student, teacher, *heads).item() == pytest.approx(total / 40, rel=1e-12)

    def test_the_mean_of_a_class_map_is_the_logit_without_bias(self) -> None:
        student, teacher, heads = rand(2, 3, 4, 4, seed=1), rand(2, 4, 4, 4, seed=2), (classifier(3), classifier(4))
        own, taught = (head(f.mean((2, 3))) - head.bias for f, head in zip((student, teacher), heads, strict=True))
        value = losses.cat_kd(student, teacher, *heads, resolution=1).item()
        assert value == pytest.approx((own - taught).square().mean().item(), rel=1e-12)

    def test_normalized_maps_have_no_scale(self) -> None:
        student, teacher = rand(2, 5, 4, 4, seed=1), rand(2, 5, 4, 4, seed=2)
        value = losses.class_attention(student, teacher, normalize=True).item()
        assert losses.class_attention(3 * student, teacher, normalize=True).item() == pytest.approx(value, rel=1e-12)
        assert losses.class_attention(3 * teacher, teacher, normalize=True).item() == pytest.approx(0, abs=1e-15)

    def test_gradients_reach_the_students_classifier_alone(self) -> None:
        student, teacher = rand(2, 3, 4, 4, seed=1).requires_grad_(), rand(2, 4, 4, 4, seed=2).requires_grad_()
        heads = classifier(3), classifier(4).requires_grad_(False)
        assert gradcheck(lambda s: losses.cat_kd(s, teacher, *heads, relu=True), (student,))
        losses.cat_kd(student, teacher, *heads).backward()
        assert teacher.grad is None and heads[0].weight.grad is not None

    def test_what_does_not_fit(self) -> None:
        with pytest.raises(ValueError, match="linear classifier"):
            losses.cat_kd(rand(2, 3, 4, 4, seed=1), rand(2, 3, 4, 4, seed=2), nn.Identity(), nn.Identity())
        with pytest.raises(ValueError, match="equal shapes"):
            losses.class_attention(rand(2, 3, 4, 4, seed=1), rand(2, 4, 4, 4, seed=2))
        with pytest.raises(ValueError, match="resolution must be at least 1"):
            losses.class_attention(rand(2, 3, 4, 4, seed=1), rand(2, 3, 4, 4, seed=2), resolution=0)


class TestMLKD:
    @pytest.mark.parametrize("form", ["code", "described"])
    def test_by_loops(self, form: Any) -> None:
        student, teacher = logits()
        sure = F.softmax(teacher, dim=1)
        total = 0.0
        images = [float(x) for x in sure.amax(1)]
        classes = [float(x) for x in sure.sum(0)]
        chosen = []
        for values in (images, classes):
            middle = sorted(values)[(len(values) - 1) // 2 : len(values) // 2 + 1]
            chosen.append([x <= sum(middle) / len(middle) for x in values])
        shares = [sum(one) / len(one) for one in chosen]
        assert shares == [0.5, 0.6]

        def factor(which: int, at: int) -> float:
            return shares[which] if form == "code" else float(chosen[which][at])

        for t in (2.0, 3.0):
            p, q = F.softmax(student / t, dim=1), F.softmax(teacher / t, dim=1)
            for n in range(6):
                total += factor(0, n) * losses.kd(student[n : n + 1], teacher[n : n + 1], t).item() / 6
            for a, b in itertools.product(range(6), repeat=2):
                total += factor(0, b) * float(p[a] @ p[b] - q[a] @ q[b]) ** 2 / 6
            for a, b in itertools.product(range(5), repeat=2):
                total += factor(1, b) * float(p[:, a] @ p[:, b] - q[:, a] @ q[:, b]) ** 2 / 5
        value = losses.multi_level(student, teacher, (2.0, 3.0), form).item()
        assert value == pytest.approx(total, rel=1e-12)

    def test_standardization_is_of_the_first_part_alone(self) -> None:
        student, teacher = logits()
        kinds = [losses.multi_level(student, teacher, (2.0,), standardize=one).item() for one in (False, True)]
        firsts = [loss(student, teacher, 2.0).item() for loss in (losses.kd, losses.standardized_kd)]
        assert kinds[0] - kinds[1] == pytest.approx((firsts[0] - firsts[1]) / 2, rel=1e-9)

    def test_sum_over_temperatures(self) -> None:
        expected = sum(losses.kd(*logits(), t).item() for t in (2.0, 6.0))
        assert losses.kd_at_temperatures(*logits(), (2.0, 6.0)).item() == pytest.approx(expected, rel=1e-12)
        expected = losses.standardized_kd(*logits(), 2.0).item()
        assert losses.kd_at_temperatures(*logits(), (2.0,), standardize=True).item() == pytest.approx(expected)

    def test_a_form_that_there_is_not(self) -> None:
        with pytest.raises(ValueError, match="'code' or 'described'"):
            losses.multi_level(*logits(), form="paper")  # type: ignore[arg-type]

    @pytest.mark.parametrize("loss", [losses.multi_level, losses.kd_at_temperatures])
    def test_temperatures_out_of_range(self, loss: Any) -> None:
        for temperatures, message in (((), "at least one"), ((2.0, 0.0), "positive"), ((-2.0,), "positive")):
            with pytest.raises(ValueError, match=message):
                loss(*logits(), temperatures)


class TestSemCKD:
    def layers(self) -> tuple[list[Tensor], list[Tensor]]:
        student = [rand(4, 2, 4, 4, seed=1), rand(4, 3, 2, 2, seed=2)]
        return student, [rand(4, c, s, s, seed=c) for c, s in ((4, 4), (5, 2), (6, 1))]

    def module(self, batch_size: int = 4, soft: float = 0.5) -> losses.SemanticCalibration:
        torch.manual_seed(0)
        student, teacher = ([tuple(f.shape[1:]) for f in side] for side in self.layers())
        return losses.SemanticCalibration(student, teacher, batch_size=batch_size, soft=soft, factor=2).double()

    def test_by_loops(self) -> None:
        module, (student, teacher) = self.module(), self.layers()

        def unit(embed: nn.Module, feature: Tensor, n: int) -> Tensor:
            similarities = torch.stack([(feature[n] * feature[m]).sum() for m in range(4)])
            hidden = embed[0](similarities).relu()  # type: ignore[index,operator]
            found = embed[2](hidden)  # type: ignore[index,operator]
            return found / found.norm()

        total = 0.0
        for n, i in itertools.product(range(4), range(2)):
            query = unit(module.queries[i], student[i], n)
            scores = [float(query @ unit(module.keys[j], teacher[j], n)) / 0.5 for j in range(3)]
            weights = [math.exp(score) / sum(math.exp(one) for one in scores) for score in scores]
            for j in range(3):
                size = min(student[i].shape[2], teacher[j].shape[2])
                own, taught = (F.adaptive_avg_pool2d(f, size) for f in (student[i], teacher[j]))
                projected = module.projections[3 * i + j](own)
                total += weights[j] * float((projected[n] - taught[n]).square().mean().item())
        assert module(student, teacher).item() == pytest.approx(total / 8, rel=1e-9)

    def test_a_smaller_batch_is_filled_up(self) -> None:
        """As if there were images whose features are 0, in the similarities."""
        module, (student, teacher) = self.module(batch_size=6), self.layers()
        assert module(student, teacher).isfinite()
        with pytest.raises(ValueError, match="at most 3"):
            self.module(batch_size=3)(student, teacher)

    def test_gradients(self) -> None:
        module, (student, teacher) = self.module().eval(), self.layers()
        assert gradcheck(lambda *s: module(s, teacher), tuple(f.requires_grad_() for f in student))
        module(student, [f.requires_grad_() for f in teacher]).backward()
        assert all(f.grad is None for f in teacher)
        assert all(p.grad is not None for name, p in module.named_parameters() if "projections" in name)

    def test_what_does_not_fit(self) -> None:
        with pytest.raises(ValueError, match="lists of maps"):
            losses.SemanticCalibration([(3,)], [(3, 2, 2)], batch_size=4)
        with pytest.raises(ValueError, match="at least 1"):
            losses.SemanticCalibration([(3, 2, 2)], [(3, 2, 2)], batch_size=4, factor=0)


class TestSSKD:
    """Three images four times, the first of each upright."""

    LABELS = torch.tensor([0, 2, 1]).repeat_interleave(4)
    TURNED = (1, 2, 3, 5, 6, 7, 9, 10, 11)

    def outputs(self) -> tuple[Tensor, Tensor]:
        return 2 * rand(12, 4, seed=1), 2 * rand(12, 4, seed=4)

    def selected(self, teacher: Tensor, truth: Tensor, ratio: float) -> list[int]:
        """Rows that count, by the definition."""
        ranks = [int((row > row[t]).sum()) for row, t in zip(teacher, truth.tolist(), strict=True)]
        right = [i for i, rank in enumerate(ranks) if rank == 0]
        wrong = sorted((i for i, rank in enumerate(ranks) if rank > 0), key=lambda i: ranks[i])
        assert right and len(wrong) > 2
        return right + wrong[: int(len(wrong) * ratio)]

    def test_upright_images(self) -> None:
        student, teacher = self.outputs()
        expected = F.cross_entropy(student[[0, 4, 8]], torch.tensor([0, 2, 1])).item()
        assert losses.upright_cross_entropy(student, self.LABELS).item() == pytest.approx(expected, rel=1e-12)
        every = -F.log_softmax(student[[0, 4, 8]], dim=1).mean().item()
        smooth = losses.upright_cross_entropy(student, self.LABELS, label_smoothing=0.2).item()
        assert smooth == pytest.approx(0.8 * expected + 0.2 * every, rel=1e-12)
        expected = losses.kd(student[[0, 4, 8]], teacher[[0, 4, 8]], 3.0).item()
        assert losses.upright_kd(student, teacher, 3.0).item() == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
    def test_turned_images(self, ratio: float) -> None:
        student, teacher = (f[[*self.TURNED]] for f in self.outputs())
        rows = self.selected(teacher, self.LABELS[[*self.TURNED]], ratio)
        expected = losses.kd(student[rows], teacher[rows], 3.0).item()
        value = losses.turned_kd(*self.outputs(), self.LABELS, 3.0, ratio).item()
        assert value == pytest.approx(expected, rel=1e-12)

    def test_similarities_are_cosines_with_the_upright_images(self) -> None:
        feature = rand(12, 3, seed=1)
        found = turned_similarities(feature)
        for row, turned in enumerate(self.TURNED):
            expected = [F.cosine_similarity(feature[turned], feature[n], dim=0).item() for n in (0, 4, 8)]
            assert found[row].tolist() == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("ratio", [0.0, 0.75])
    def test_similarity_kd(self, ratio: float) -> None:
        student, teacher = rand(12, 3, seed=1), rand(12, 5, seed=2)
        own, taught = turned_similarities(student), turned_similarities(teacher)
        rows = self.selected(taught, torch.arange(3).repeat_interleave(3), ratio)
        expected = losses.kd(own[rows], taught[rows], 0.5).item()
        assert losses.similarity_kd(student, teacher, *HEADS, 0.5, ratio).item() == pytest.approx(expected, rel=1e-12)

    def test_recognition(self) -> None:
        feature = rand(12, 3, seed=1)
        expected = F.cross_entropy(turned_similarities(feature), torch.arange(3).repeat_interleave(3)).item()
        assert losses.recognize_turned(feature, nn.Identity()).item() == pytest.approx(expected, rel=1e-12)
        perfect = torch.eye(3).repeat_interleave(4, dim=0)
        assert losses.recognize_turned(perfect, nn.Identity()).item() < expected

    def test_gradients(self) -> None:
        student, teacher = self.outputs()
        features = rand(12, 3, seed=1), rand(12, 5, seed=2).requires_grad_()
        assert gradcheck(lambda s: losses.turned_kd(s, teacher, self.LABELS, 3.0, 0.5), (student.requires_grad_(),))
        assert gradcheck(lambda s: losses.similarity_kd(s, features[1], *HEADS), (features[0].requires_grad_(),))
        losses.similarity_kd(*features, *HEADS).backward()
        assert features[1].grad is None

    def test_what_does_not_fit(self) -> None:
        student, teacher = self.outputs()
        for call in (
            lambda: losses.upright_kd(student[:-1], teacher[:-1]),
            lambda: losses.turned_kd(student[:6], teacher[:6], self.LABELS[:6]),
            lambda: losses.similarity_kd(student[:6], teacher[:6], *HEADS),
        ):
            with pytest.raises(ValueError, match="in fours"):
                call()
        with pytest.raises(ValueError, match="ratio must lie in"):
            losses.similarity_kd(student, teacher, *HEADS, ratio=2.0)


class TestBYOT:
    SHAPES = ((3, 8, 8), (4, 4, 4), (5, 2, 2), (5,), (4,))

    def features(self) -> list[Tensor]:
        return [rand(6, *shape, seed=seed) for seed, shape in enumerate(self.SHAPES)]

    def module(self) -> losses.BeYourOwnTeacher:
        torch.manual_seed(0)
        return losses.BeYourOwnTeacher(self.SHAPES, alpha=0.3, beta=0.1, temperature=2.0).double()

    def test_by_its_formula(self) -> None:
        module, features, labels = self.module(), self.features(), torch.tensor([0, 1, 2, 3, 0, 1])
        *maps, _, pooled, ends = features
        soft = F.softmax(ends / 2, dim=1)
        total = 0.0
        for i, feature in enumerate(maps):
            own = module.exits[i](feature)
            assert own.shape == (6, 5)
            answers = module.classifiers[i](own)
            total += 0.7 * F.cross_entropy(answers, labels).item()
            total -= 0.3 * (soft * F.log_softmax(answers / 2, dim=1)).sum(1).mean().item()
            if i == 0:
                total += 0.1 * math.sqrt((module.adapters[0](own) - pooled).square().sum().item())
        assert len(module.adapters) == 1
        assert module(features, labels).item() == pytest.approx(total, rel=1e-9)

    def test_labels_of_the_exits_are_smoothed(self) -> None:
        """As the labels of the network's own end are: with ε, some of each exit's loss is the mean over all classes."""
        module, features, labels = self.module(), self.features(), torch.tensor([0, 1, 2, 3, 0, 1])
        plain = module(features, labels).item()
        module.label_smoothing = 0.2
        apart = 0.0
        for leave, classify, feature in zip(module.exits, module.classifiers, features[:2], strict=True):
            answers = F.log_softmax(classify(leave(feature)), dim=1)
            apart += (answers[range(6), labels] - answers.mean(dim=1)).mean().item()
        assert module(features, labels).item() - plain == pytest.approx(0.7 * 0.2 * apart, rel=1e-9)
        with pytest.raises(ValueError, match="label_smoothing must lie in"):
            losses.BeYourOwnTeacher(self.SHAPES, label_smoothing=1.5)

    def test_exits_reduce_a_map_to_the_last_ones_size(self) -> None:
        module = self.module()
        for leave, shape in zip(module.exits, self.SHAPES[:2], strict=True):
            assert isinstance(leave, nn.Sequential)
            assert leave[:-2](rand(2, *shape, seed=1)).shape == (2, 5, 2, 2)

    def test_the_networks_end_is_not_taught(self) -> None:
        features = [f.requires_grad_() for f in self.features()]
        module = self.module()
        module(features, torch.tensor([0, 1, 2, 3, 0, 1])).backward()
        assert [f.grad is not None for f in features] == [True, True, False, False, False]
        assert all(p.grad is not None for p in module.parameters())

    def test_what_does_not_fit(self) -> None:
        with pytest.raises(ValueError, match="two maps or more"):
            losses.BeYourOwnTeacher(((3, 4, 4), (5,), (4,)))
        with pytest.raises(ValueError, match="alpha must lie in"):
            losses.BeYourOwnTeacher(self.SHAPES, alpha=1.5)
