"""Losses of several layers, with modules or with memory, against loops and closed forms in float64.

Values and gradients were compared with HobbitLong/RepDistiller b84f547 (FSP, FT), megvii-research/mdistiller a08d46f
(CRD over three steps, ReviewKD, OFD), clovaai/overhaul-distillation 76344a8 and DefangChen/SimKD 2b389c3 too, outside
this project.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import pytest
import torch
from tensors import rand
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.distributions import Normal
from torch.nn import functional as F

from kdbench import losses


class TestFSP:
    def test_matrix_by_loops(self) -> None:
        shallow, deep = rand(2, 3, 2, 4, seed=1), rand(2, 5, 2, 4, seed=2)
        matrix = losses.fsp_matrix(shallow, deep)
        assert matrix.shape == (2, 3, 5)
        for n, i, j in itertools.product(range(2), range(3), range(5)):
            total = sum(float(shallow[n, i, h, w] * deep[n, j, h, w]) for h in range(2) for w in range(4))
            assert matrix[n, i, j].item() == pytest.approx(total / 8, rel=1e-12)

    def test_the_larger_map_is_pooled(self) -> None:
        shallow, deep = rand(2, 3, 4, 4, seed=1), rand(2, 5, 2, 2, seed=2)
        assert torch.equal(losses.fsp_matrix(shallow, deep), losses.fsp_matrix(F.avg_pool2d(shallow, 2), deep))

    def test_sum_over_neighbouring_layers(self) -> None:
        student, teacher = ([rand(2, c, 4, 4, seed=s + c) for c in (2, 3, 5)] for s in (10, 20))
        total = 0.0
        for a, b in ((0, 1), (1, 2)):
            own, taught = (torch.einsum("nihw,njhw->nij", f[a], f[b]) / 16 for f in (student, teacher))
            total += (own - taught).square().mean().item()
        assert losses.fsp(student, teacher).item() == pytest.approx(total, rel=1e-12)

    def test_gradients(self) -> None:
        student, teacher = ([rand(2, c, 2, 2, seed=s + c).requires_grad_() for c in (2, 3)] for s in (10, 20))
        assert gradcheck(lambda *maps: losses.fsp(maps, teacher), tuple(student))
        losses.fsp(student, teacher).backward()
        assert all(f.grad is not None for f in student) and all(f.grad is None for f in teacher)
        assert losses.fsp(teacher, teacher).item() == 0

    def test_shapes_that_do_not_fit(self) -> None:
        one, other = rand(2, 3, 4, 4, seed=1), rand(2, 5, 4, 4, seed=2)
        for student, teacher in (([one], [one]), ([one, one], [one]), ([one, one], [one, other])):
            with pytest.raises(ValueError, match="fsp needs"):
                losses.fsp(student, teacher)


class TestFactorTransfer:
    def test_by_loops(self) -> None:
        student, teacher = rand(3, 2, 2, 2, seed=1), rand(3, 2, 2, 2, seed=2)
        total = 0.0
        for own, taught in zip(student.flatten(1).tolist(), teacher.flatten(1).tolist(), strict=True):
            norms = math.hypot(*own), math.hypot(*taught)
            total += sum(abs(s / norms[0] - t / norms[1]) for s, t in zip(own, taught, strict=True))
        assert losses.factor_transfer(student, teacher).item() == pytest.approx(total / 24, rel=1e-12)

    def test_attention_is_of_mean_squares_over_channels(self) -> None:
        student, teacher = rand(3, 2, 2, 2, seed=1), rand(3, 5, 2, 2, seed=2)
        maps = [f.pow(2).sum(1).flatten(1) for f in (student, teacher)]
        own, taught = (m / m.norm(dim=1, keepdim=True) for m in maps)
        value = losses.factor_transfer(student, teacher, form="attention").item()
        assert value == pytest.approx((own - taught).abs().mean().item(), rel=1e-12)

    @pytest.mark.parametrize("form", ["factors", "attention"])
    def test_scaling_changes_nothing_and_equal_factors_are_the_least(
        self, form: Literal["factors", "attention"]
    ) -> None:
        student, teacher = rand(3, 2, 4, 4, seed=1), rand(3, 2, 2, 2, seed=2)
        value = losses.factor_transfer(student, teacher, form=form).item()
        assert losses.factor_transfer(4 * student, teacher / 3, form=form).item() == pytest.approx(value, rel=1e-12)
        assert value > 0.1 > 1e-15 > losses.factor_transfer(2 * teacher, teacher, form=form).item()

    @pytest.mark.parametrize("batch_norm", [False, True])
    def test_paraphraser_and_translator_have_as_many_factors(self, batch_norm: bool) -> None:
        paraphraser = losses.Paraphraser((10, 4, 4), rate=0.5, batch_norm=batch_norm)
        translator = losses.Translator((4, 4, 4), (10, 4, 4), rate=0.5, batch_norm=batch_norm)
        feature = torch.randn(2, 10, 4, 4)
        assert paraphraser(feature).shape == feature.shape
        assert paraphraser.encoder(feature).shape == translator(torch.randn(2, 4, 4, 4)).shape == (2, 5, 4, 4)
        # Weights 10·10·9 + 10·5·9 + 5·5·9 and back, a bias for each channel, and two numbers for each batch norm.
        channels = 10 + 5 + 5 + 5 + 10 + 10
        expected = 2 * 9 * (100 + 50 + 25) + channels * (3 if batch_norm else 1)
        assert sum(p.numel() for p in paraphraser.parameters()) == expected

    def test_paraphraser_ends_in_a_leaky_relu(self) -> None:
        paraphraser = losses.Paraphraser((2, 4, 4)).double()
        feature = rand(2, 2, 4, 4, seed=1)
        before = paraphraser.decoder[:-1](paraphraser.encoder(feature))
        assert torch.equal(paraphraser(feature), torch.where(before > 0, before, 0.1 * before))

    def test_shapes_and_options_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="numbers of factors"):
            losses.factor_transfer(rand(2, 2, 4, 4, seed=1), rand(2, 3, 4, 4, seed=2))
        with pytest.raises(ValueError, match="'factors' or 'attention'"):
            losses.factor_transfer(rand(2, 2, 4, 4, seed=1), rand(2, 2, 4, 4, seed=2), form="flat")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="leaves no factor"):
            losses.Paraphraser((3, 4, 4), rate=0.2)
        with pytest.raises(ValueError, match="power is 1 or 2"):
            losses.reconstruction(rand(2, 2, 4, 4, seed=1), nn.Identity(), power=3)  # type: ignore[arg-type]
        paraphraser, feature = losses.Paraphraser((4, 4, 4), rate=0.5), torch.randn(2, 4, 4, 4)
        with pytest.raises(ValueError, match="makes 3 factors and the paraphraser 2"):
            losses.paraphrased(torch.randn(2, 3, 4, 4), feature, paraphraser, form="attention")


class TestNoiseContrastive:
    def test_by_loops(self) -> None:
        scores = rand(3, 5, seed=1)
        c, total = 4 / 50, 0.0
        for row in scores.exp().tolist():
            total += math.log(row[0] / (row[0] + c)) + sum(math.log(c / (x + c)) for x in row[1:])
        assert losses.noise_contrastive(scores, 50, eps=0.0).item() == pytest.approx(-total / 3, rel=1e-12)

    def test_eps_stands_in_the_denominators_alone(self) -> None:
        value = losses.noise_contrastive(torch.zeros(1, 2), 4, eps=0.25).item()
        assert value == pytest.approx(-math.log(1 / 1.5) - math.log(0.25 / 1.5))

    def test_is_binary_cross_entropy(self) -> None:
        """With odds x / c of being the pair."""
        scores = rand(3, 5, seed=1)
        target = torch.zeros_like(scores)
        target[:, 0] = 1
        expected = F.binary_cross_entropy_with_logits(scores - math.log(4 / 50), target, reduction="sum").item() / 3
        assert losses.noise_contrastive(scores, 50, eps=0.0).item() == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("shape", [(3,), (3, 1), (0, 4)])
    def test_shapes_that_do_not_fit(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="needs scores"):
            losses.noise_contrastive(torch.zeros(shape), 50)


class TestCRD:
    INDEX = torch.tensor([7, 2, 5])
    NEGATIVES = torch.tensor([[0, 1, 2, 3], [9, 8, 7, 6], [1, 3, 8, 9]])

    def module(self, **options: float) -> losses.ContrastiveRepresentation:
        torch.manual_seed(0)
        return losses.ContrastiveRepresentation((3,), (6,), samples=10, dim=4, **options).double()

    def test_by_loops(self) -> None:
        module, student, teacher = self.module(), rand(3, 3, seed=1), rand(3, 6, seed=2)
        embedded = []
        for features, layer in ((student, module.student), (teacher, module.teacher)):
            e = (features @ layer.weight.T + layer.bias).detach()
            embedded.append(e / e.norm(dim=1, keepdim=True))
        total = 0.0
        for e, bank in ((embedded[0], module.teacher_bank), (embedded[1], module.student_bank)):
            rows = []
            for n, own in enumerate(self.INDEX.tolist()):
                places = [own, *self.NEGATIVES[n].tolist()]
                rows.append([math.exp(float(e[n] @ bank[i]) / 0.07) for i in places])
            z, c = sum(map(sum, rows)) / 15 * 10, 4 / 10
            for row in rows:
                pair, *others = (x / z for x in row)
                total -= math.log(pair / (pair + c + 1e-7)) + sum(math.log(c / (x + c + 1e-7)) for x in others)
        assert module(student, teacher, self.INDEX, self.NEGATIVES).item() == pytest.approx(total / 3, rel=1e-12)

    def test_banks_remember_the_batch(self) -> None:
        module, student, teacher = self.module(momentum=0.25), rand(3, 3, seed=1), rand(3, 6, seed=2)
        before = module.student_bank.clone(), module.teacher_bank.clone()
        module(student, teacher, self.INDEX, self.NEGATIVES)
        for bank, old, features, layer in (
            (module.student_bank, before[0], student, module.student),
            (module.teacher_bank, before[1], teacher, module.teacher),
        ):
            mixed = 0.25 * old[self.INDEX] + 0.75 * F.normalize(layer(features), dim=1)
            assert torch.allclose(bank[self.INDEX], mixed / mixed.norm(dim=1, keepdim=True), atol=1e-14)
            others = [i for i in range(10) if i not in self.INDEX]
            assert torch.equal(bank[others], old[others])

    def test_banks_begin_uniform(self) -> None:
        bank = losses.ContrastiveRepresentation((3,), (6,), samples=2000, dim=12).student_bank
        assert 0.49 < bank.abs().max().item() <= 0.5  # √(3 / 12)
        assert bank.var().item() == pytest.approx(0.25 / 3, rel=0.05)

    def test_constants_are_those_of_the_first_batch(self) -> None:
        module, student, teacher = self.module(), rand(3, 3, seed=1), rand(3, 6, seed=2)
        module(student, teacher, self.INDEX, self.NEGATIVES)
        first = module.log_z.clone()
        module(2 * student + 1, teacher, self.INDEX, self.NEGATIVES)
        assert first.isfinite().all() and torch.equal(module.log_z, first)

    def test_nothing_is_remembered_in_eval_mode(self) -> None:
        module = self.module().eval()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        value = module(rand(3, 3, seed=1), rand(3, 6, seed=2), self.INDEX, self.NEGATIVES)
        assert value.isfinite() and all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    def test_state_goes_on_where_it_was(self) -> None:
        """Banks and constants are in the state dict: a module loaded from it has the same next loss."""
        module, student, teacher = self.module(), rand(3, 3, seed=1), rand(3, 6, seed=2)
        module(student, teacher, self.INDEX, self.NEGATIVES)
        torch.manual_seed(1)
        other = losses.ContrastiveRepresentation((3,), (6,), samples=10, dim=4).double()
        other.load_state_dict(module.state_dict())
        values = [m(student, teacher, self.INDEX, self.NEGATIVES).item() for m in (module, other)]
        assert values[0] == values[1]

    def test_gradients_reach_both_embeddings_and_not_the_teacher(self) -> None:
        module = self.module()
        student, teacher = rand(3, 3, seed=1).requires_grad_(), rand(3, 6, seed=2).requires_grad_()
        module(student, teacher, self.INDEX, self.NEGATIVES).backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
        assert student.grad is not None and teacher.grad is None
        module.eval()
        assert gradcheck(lambda s: module(s, teacher, self.INDEX, self.NEGATIVES), (student,))

    def test_autocast_leaves_float32_alone(self) -> None:
        module, student, teacher = self.module().float().eval(), rand(3, 3, seed=1).float(), rand(3, 6, seed=2).float()
        expected = module(student, teacher, self.INDEX, self.NEGATIVES).item()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module(student, teacher, self.INDEX, self.NEGATIVES).item() == pytest.approx(expected, rel=1e-6)

    def test_shapes_and_options_that_do_not_fit(self) -> None:
        student, teacher = rand(3, 3, seed=1), rand(3, 6, seed=2)
        for index, negatives in ((self.INDEX[:2], self.NEGATIVES), (self.INDEX, self.NEGATIVES[:2])):
            with pytest.raises(ValueError, match="index \\[N\\] and negatives"):
                self.module()(student, teacher, index, negatives)
        for options, message in (
            ({"temperature": 0.0}, "temperature must be positive"),
            ({"momentum": 1.5}, "momentum must lie in"),
            ({"dim": 0}, "dim must be at least 1"),
            ({"samples": 1}, "own must be at least 1"),
        ):
            with pytest.raises(ValueError, match=message):
                losses.ContrastiveRepresentation((3,), (6,), **{"samples": 9, **options})


class TestDrawNegatives:
    CLASSES = torch.tensor([0, 1, 2] * 4)
    LABELS = torch.tensor([0, 2])

    def numbers(self, seed: int = 0) -> Tensor:
        return torch.rand(2, 12, generator=torch.Generator().manual_seed(seed))

    def test_other_classes_without_replacement(self) -> None:
        for seed in range(20):
            drawn = losses.draw_negatives(self.numbers(seed), self.CLASSES, self.LABELS, 8)
            for row, label in zip(drawn.tolist(), self.LABELS.tolist(), strict=True):
                assert sorted(row) == [i for i in range(12) if self.CLASSES[i] != label]

    def test_each_is_drawn_equally_often(self) -> None:
        counts = torch.zeros(12)
        for seed in range(400):
            drawn = losses.draw_negatives(self.numbers(seed), self.CLASSES, self.LABELS, 2)
            counts[drawn[0]] += 1
        others = counts[self.CLASSES != 0]
        # 800 draws from 8: 100 each, deviation √(400 · 1/4 · 3/4) = 8.7.
        assert counts.sum() == others.sum() == 800 and (others - 100).abs().max() < 4 * 8.7

    def test_a_function_of_the_numbers(self) -> None:
        first, again, other = (
            losses.draw_negatives(self.numbers(seed), self.CLASSES, self.LABELS, 3) for seed in (0, 0, 1)
        )
        assert torch.equal(first, again) and not torch.equal(first, other)

    @pytest.mark.parametrize("k", [0, 13])
    def test_arguments_that_do_not_fit(self, k: int) -> None:
        with pytest.raises(ValueError, match="K in 1 to M"):
            losses.draw_negatives(self.numbers(), self.CLASSES, self.LABELS, k)
        with pytest.raises(ValueError, match="numbers \\[N, M\\]"):
            losses.draw_negatives(self.numbers()[:1], self.CLASSES, self.LABELS, 3)


class TestOFD:
    def test_margin_is_the_mean_of_the_negative_half(self) -> None:
        """By numeric integration."""
        weight, bias = torch.tensor([1.0, -0.5, 2.0]).double(), torch.tensor([0.3, -1.0, 4.0]).double()
        margin = losses.batch_norm_margin(weight, bias)
        for sigma, mu, m in zip(weight.abs().tolist(), bias.tolist(), margin.tolist(), strict=True):
            x = torch.linspace(mu - 12 * sigma, 0, 200_001, dtype=torch.float64)
            density = Normal(mu, sigma).log_prob(x).exp()
            mean = torch.trapezoid(x * density, x) / torch.trapezoid(density, x)
            assert m == pytest.approx(mean.item(), rel=1e-6)

    def test_channels_that_are_hardly_negative(self) -> None:
        """Φ(-3.1) = 0.00097 is below 0.001, Φ(-3.08) = 0.00104 above."""
        margin = losses.batch_norm_margin(torch.tensor([2.0, 2.0]).double(), torch.tensor([6.2, 6.16]).double())
        assert margin[0].item() == -6.0 and -1 < margin[1].item() < 0

    @pytest.mark.parametrize(("bias", "margin"), [(-2.0, -2.0), (0.0, 0.0), (3.0, 0.0)])
    def test_a_channel_without_deviation(self, bias: float, margin: float) -> None:
        found = losses.batch_norm_margin(torch.zeros(1), torch.tensor([bias]))
        assert found.item() == pytest.approx(margin, abs=1e-30)

    def test_far_below_zero_the_margin_is_the_mean(self) -> None:
        assert losses.batch_norm_margin(torch.ones(1), torch.tensor([-50.0])).item() == pytest.approx(-50)

    @pytest.mark.parametrize(
        ("student", "teacher", "value"),
        [
            (3.0, 2.0, 1.0),  # on: squared distance
            (1.0, 2.0, 1.0),
            (-0.5, -0.2, 0.0),  # off, and the student below the target
            (0.1, -0.2, 0.09),  # off, and the student above it
            (-0.9, -3.0, 0.01),  # below the margin of -1: the target is -1
            (-1.5, -3.0, 0.0),
        ],
    )
    def test_one_neuron(self, student: float, teacher: float, value: float) -> None:
        maps = (torch.tensor([[[[x]]]], dtype=torch.float64) for x in (student, teacher))
        assert losses.overhaul(*maps, torch.tensor([-1.0])).item() == pytest.approx(value, abs=1e-15)

    def test_sum_over_elements_mean_over_the_batch(self) -> None:
        student, teacher = torch.ones(4, 2, 3, 3), torch.full((4, 2, 3, 3), 3.0)
        assert losses.overhaul(student, teacher, torch.zeros(2)).item() == 4 * 2 * 9

    def test_zero_behind_the_margin_relu(self) -> None:
        teacher, margin = rand(3, 2, 4, 4, seed=1), torch.tensor([-0.3, -0.8]).double()
        assert losses.overhaul(torch.maximum(teacher, margin.view(2, 1, 1)), teacher, margin).item() == 0

    def test_shapes_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="margin for each channel"):
            losses.overhaul(rand(2, 2, 2, 2, seed=1), rand(2, 2, 2, 2, seed=2), torch.zeros(3))
        with pytest.raises(ValueError, match="equal shapes"):
            losses.overhaul(rand(2, 2, 2, 2, seed=1), rand(2, 3, 2, 2, seed=2), torch.zeros(2))
        with pytest.raises(ValueError, match="weight and bias"):
            losses.batch_norm_margin(torch.ones(2), torch.ones(3))


class TestSimKD:
    @pytest.mark.parametrize(
        ("own", "taught"), [((3, 4, 4), (6, 2, 2)), ((3, 2, 2), (6, 4, 4)), ((6, 4, 4), (6, 4, 4))]
    )
    def test_the_larger_map_is_pooled(self, own: tuple[int, ...], taught: tuple[int, ...]) -> None:
        projector = losses.Projector(own, taught).double().eval()
        student, teacher = rand(2, *own, seed=1), rand(2, *taught, seed=2)
        size = min(own[1], taught[1])
        pooled = [F.adaptive_avg_pool2d(f, size) for f in (student, teacher)]
        projected = projector(student)
        assert torch.equal(projected, projector.layers(pooled[0])) and projected.min() >= 0
        expected = (projected - pooled[1]).square().mean().item()
        assert losses.simkd(projected, teacher).item() == pytest.approx(expected, rel=1e-12)

    def test_parameters_of_the_bottleneck(self) -> None:
        """resnet32x4 → resnet8x4: 256 → 128 → 128 → 256, and two numbers for each channel of a batch norm."""
        projector = losses.Projector((256, 8, 8), (256, 8, 8))
        expected = 256 * 128 + 9 * 128 * 128 + 128 * 256 + 2 * (128 + 128 + 256)
        assert sum(p.numel() for p in projector.parameters()) == expected

    def test_a_student_that_projects_onto_the_teachers_map_answers_as_the_teacher(self) -> None:
        projector, classifier = losses.Projector((3, 4, 4), (6, 4, 4)).double().eval(), nn.Linear(6, 5).double()
        student = rand(2, 3, 4, 4, seed=1)
        teacher = projector(student).detach()
        assert losses.simkd(projector(student), teacher).item() == 0
        answers = losses.reused_head(projector, classifier)(student)
        assert torch.allclose(answers, classifier(teacher.mean(dim=(2, 3))), atol=1e-12)

    def test_shapes_and_options_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="maps"):
            losses.Projector((3,), (6,))
        with pytest.raises(ValueError, match="factor must lie"):
            losses.Projector((3, 4, 4), (6, 4, 4), factor=7)
        with pytest.raises(ValueError, match="equal shapes"):
            losses.simkd(rand(2, 3, 4, 4, seed=1), rand(2, 6, 4, 4, seed=2))


class TestHierarchicalContext:
    @pytest.mark.parametrize(
        ("size", "levels"), [(8, [8, 4, 2, 1]), (5, [5, 4, 2, 1]), (4, [4, 2, 1]), (2, [2, 1]), (1, [1])]
    )
    def test_levels_below_the_map(self, size: int, levels: list[int]) -> None:
        student, teacher = rand(3, 2, size, size, seed=1), rand(3, 2, size, size, seed=2)
        weights = [1.0, 0.5, 0.25, 0.125][: len(levels)]
        total = 0.0
        for weight, level in zip(weights, levels, strict=True):
            own, taught = (F.adaptive_avg_pool2d(f, level) for f in (student, teacher))
            total += weight * F.mse_loss(own, taught).item()
        value = losses.hierarchical_context(student, teacher).item()
        assert value == pytest.approx(total / sum(weights), rel=1e-12)

    def test_a_narrow_map_is_not_pooled_to_more_columns_than_it_has(self) -> None:
        """Below 8 × 2 pixels there is 1 × 1 alone, the mean."""
        student, teacher = rand(3, 2, 8, 2, seed=1), rand(3, 2, 8, 2, seed=2)
        gap = student - teacher
        expected = (gap.square().mean() + gap.mean((2, 3)).square().mean() / 2) / 1.5
        for own, taught in ((student, teacher), (student.mT, teacher.mT)):
            assert losses.hierarchical_context(own, taught).item() == pytest.approx(expected.item(), rel=1e-12)

    def test_shapes_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="equal shapes"):
            losses.hierarchical_context(rand(2, 3, 4, 4, seed=1), rand(2, 6, 4, 4, seed=2))
        with pytest.raises(ValueError, match="maps"):
            losses.hierarchical_context(rand(2, 3, seed=1), rand(2, 3, seed=2))


class TestKnowledgeReview:
    OWN, TAUGHT = [(3, 8, 8), (4, 4, 4), (5,)], [(6, 8, 8), (7, 2, 2), (9,)]

    def module(self, **options: int) -> losses.KnowledgeReview:
        torch.manual_seed(0)
        return losses.KnowledgeReview(self.OWN, self.TAUGHT, **options).double()

    def features(self) -> tuple[list[Tensor], list[Tensor]]:
        return [rand(2, *s, seed=i) for i, s in enumerate(self.OWN)], [
            rand(2, *s, seed=9 + i) for i, s in enumerate(self.TAUGHT)
        ]

    def test_fusion_by_hand(self) -> None:
        """Attention of one half for the map and one fourth for the residual, whatever they are."""
        fusion = losses.AttentionFusion(3, 4, 6, (2, 2), fuses=True).double()
        assert fusion.attention is not None
        nn.init.zeros_(fusion.attention[0].weight)
        fusion.attention[0].bias.data = torch.tensor([0.0, -math.log(3)], dtype=torch.float64)
        student, residual = rand(2, 3, 4, 4, seed=1), rand(2, 4, 2, 2, seed=2)
        output, passed = fusion(student, residual)
        larger = residual.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        expected = (fusion.narrow(student) / 2 + larger / 4)[:, :, ::2, ::2]
        assert torch.allclose(passed, expected, atol=1e-12)
        assert torch.allclose(output, fusion.widen(expected), atol=1e-12) and output.shape == (2, 6, 2, 2)

    def test_from_the_deepest_layer_to_the_shallowest(self) -> None:
        module = self.module()
        student, teacher = self.features()
        residual, total = None, 0.0
        for i in (2, 1, 0):
            own, taught = (f[i] if f[i].ndim == 4 else f[i][..., None, None] for f in (student, teacher))
            output, residual = module.layers[i](own, residual)
            total += losses.hierarchical_context(output, taught).item()
        assert module(student, teacher).item() == pytest.approx(total, rel=1e-12)

    def test_every_layer_of_the_student_learns_and_the_teacher_does_not(self) -> None:
        module, (student, teacher) = self.module(), self.features()
        for feature in (*student, *teacher):
            feature.requires_grad_()
        module(student, teacher).backward()
        assert all(f.grad is not None and f.grad.abs().max() > 0 for f in student)
        assert all(f.grad is None for f in teacher)
        assert all(p.grad is not None for p in module.parameters())

    def test_the_residual_is_no_wider_than_the_deepest_layer(self) -> None:
        for module, width in ((self.module(), 5), (self.module(widest=2), 2)):
            assert [layer.narrow[0].out_channels for layer in module.layers] == [width] * 3

    def test_only_the_deepest_layer_fuses_nothing(self) -> None:
        assert [layer.attention is not None for layer in self.module().layers] == [True, True, False]

    def test_convolutions_begin_as_in_the_authors_code(self) -> None:
        """He's uniform with a = 1: the bound is √(3 / fan-in), and the variance 1 / fan-in."""
        torch.manual_seed(0)
        weight = losses.AttentionFusion(64, 64, 64, (4, 4), fuses=False).widen[0].weight
        assert weight.var().item() == pytest.approx(1 / (9 * 64), rel=0.05)
        assert weight.abs().max().item() == pytest.approx(math.sqrt(3 / (9 * 64)), rel=0.01)

    def test_shapes_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="as many layers"):
            losses.KnowledgeReview(self.OWN, self.TAUGHT[:2])
        with pytest.raises(ValueError, match="maps .* and vectors"):
            losses.KnowledgeReview([(3, 8)], [(3, 8)])
        with pytest.raises(ValueError, match="widest must be at least 1"):
            self.module(widest=0)
