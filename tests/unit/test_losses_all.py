"""What holds for every loss of a feature or of logits: gradients, a teacher left alone, precision, and batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from tensors import LABELS, equal_maps, logits, maps, rand, vectors
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from kdbench import losses
from kdbench.registry import Registry

Loss = Callable[[Tensor, Tensor], Tensor]


def labelled(loss: Callable[..., Tensor], **options: float) -> Loss:
    return lambda student, teacher: loss(student, teacher, LABELS[: len(student)], **options)


CLASSIFIER = nn.Linear(7, 5).double()
CLASSIFIER.weight.data = rand(5, 7, seed=9)

LABELLED: dict[str, Loss] = {
    "standardized_dkd": labelled(losses.standardized_dkd),
    "dkd": labelled(losses.dkd),
    "nkd": labelled(losses.nkd, temperature=2.0),
    "wsld": labelled(losses.weighted_soft_labels),
    "rld": labelled(losses.rld, confidence_temperature=2.0),
    "customized_others": labelled(losses.customized_others),
    "customized_others, probabilities": lambda student, teacher: losses.customized_others(
        student, teacher, LABELS[: len(student)], "probabilities"
    ),
    "wkd_l": labelled(partial(losses.wasserstein_logits, teacher_classifier=CLASSIFIER)),
}
OF_LOGITS: dict[str, Loss] = {
    "kd": losses.kd,
    "kd without scale": partial(losses.kd, temperature=2.0, scale=False),
    "centred_mse": losses.centred_mse,
    "mean_absolute": losses.mean_absolute,
    "standardized_kd": losses.standardized_kd,
    **LABELLED,
    "ttm": losses.transformed_teacher,
    "wttm": partial(losses.transformed_teacher, weighted=True),
    "kd_over_elements": losses.kd_over_elements,
    "dist": losses.dist,
    "mlkd": losses.multi_level,
    "mlkd described": partial(losses.multi_level, form="described"),
    "gram_direction": losses.gram_direction,
    "skd": losses.skd,
    "skd described": partial(losses.skd, form="described"),
}
OF_VECTORS: dict[str, Loss] = {
    "sp": losses.similarity_preserving,
    "rkd_distance": losses.rkd_distance,
    "rkd_angle": losses.rkd_angle,
    "pkt": losses.pkt,
    "cc": losses.kernel_congruence,
    "itrd_mutual": losses.itrd_mutual,
    "irg": lambda student, teacher: losses.instance_edges([student], [teacher]),
}
OF_MAPS: dict[str, Loss] = {
    "nst": losses.neuron_selectivity,
    "at": losses.attention_transfer,
    "at of the paper": partial(losses.attention_transfer, form="paper"),
    "at, p = 3": partial(losses.attention_transfer, p=3),
    "irg's steps": lambda student, teacher: losses.instance_transformation([student, -student], [teacher, -teacher]),
    "spatial_relation": losses.spatial_relation,
    "lwm": lambda student, teacher: losses.attention_distillation([student], [teacher]),
    "grad-cam": lambda student, teacher: losses.attention_distillation([student, student], [teacher, teacher]),
}
OF_EQUAL_MAPS: dict[str, Loss] = {
    "ab": losses.activation_boundary,
    "fitnets": losses.fitnets,
    "jacobian": losses.jacobian_matching,
    "hnd": losses.hnd,
    "ickd": losses.inter_channel_correlation,
    "cwd": losses.channel_wise,
    "channel_relation": losses.channel_relation,
    "pkd": losses.map_correlation,
    "ft": losses.factor_transfer,
    "simkd": losses.simkd,
    "wkd_f": losses.wasserstein_gaussian,
    "wkd_f of regions": partial(losses.wasserstein_gaussian, grid=2),
    "reviewkd": losses.hierarchical_context,
    "itrd_correlation": losses.itrd_correlation,
    "afd": lambda student, teacher: losses.attended_channels(student, teacher, torch.full(student.shape[:2], 0.25)),
    "ofd": lambda student, teacher: losses.overhaul(student, teacher, torch.linspace(-0.8, -0.2, 4).double()),
}
# The student may have several times the teacher's channels.
OF_PARTS: dict[str, Loss] = {"norm": losses.n_to_one}
LOSSES = OF_LOGITS | OF_VECTORS | OF_MAPS | OF_EQUAL_MAPS | OF_PARTS
PAIRS = {
    **dict.fromkeys(OF_LOGITS, logits),
    **dict.fromkeys(OF_VECTORS, vectors),
    **dict.fromkeys(OF_MAPS, maps),
    **dict.fromkeys(OF_EQUAL_MAPS | OF_PARTS, equal_maps),
}
# Their least value is not that of a student like its teacher.
ELSEWHERE = {
    "nkd", "wsld", "rld", "wkd_l", "ttm", "wttm", "ab", "ofd", "at of the paper", "itrd_correlation", "itrd_mutual",
    "customized_others", "customized_others, probabilities",
}  # fmt: skip
# They compare images with each other.
RELATIONAL = {
    "dist", "mlkd", "mlkd described", "itrd_correlation", "irg's steps", "gram_direction", "skd", "skd described",
    "spatial_relation", "pkd",
}  # fmt: skip
# They add up images, where the others take the mean.
SUMMED = {"hnd"}
# Of two maps, the larger one is pooled to the smaller.
POOLED = [
    "nst", "at", "at of the paper", "at, p = 3", "spatial_relation", "channel_relation", "afd", "cwd", "ft", "ofd",
    "simkd", "lwm", "pkd",
]  # fmt: skip
MODULES: list[tuple[type[nn.Module], tuple[int, ...], tuple[int, ...]]] = [
    (losses.AttendedChannels, (2, 4, 4), (5, 2, 2)),
    (losses.InformationTheoretic, (4,), (4,)),
    (losses.MaskedGeneration, (3, 4, 4), (3, 4, 4)),
    (losses.PatchGeneration, (3, 4, 4), (5, 4, 4)),
    (losses.PrimeAware, (4,), (4,)),
    (losses.SimpleRecipe, (4,), (4,)),
    (losses.VariationalInformation, (2, 4, 4), (5, 2, 2)),
]


@pytest.mark.parametrize("name", LOSSES)
class TestAll:
    def test_gradients_are_of_the_student_alone_and_nothing_is_changed(self, name: str) -> None:
        loss, (student, teacher) = LOSSES[name], PAIRS[name]()
        before = student.clone(), teacher.clone()
        loss(student.requires_grad_(), teacher.requires_grad_()).backward()
        assert student.grad is not None and student.grad.abs().max() > 0 and teacher.grad is None
        assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
        # Its weights move with the student, and count as constants.
        assert name == "wsld" or gradcheck(lambda s: loss(s, teacher), (student,))

    def test_half_precision_is_computed_in_full(self, name: str) -> None:
        loss = LOSSES[name]
        for dtype in (torch.float16, torch.bfloat16):
            student, teacher = (feature.to(dtype) for feature in PAIRS[name]())
            value = loss(student, teacher)
            assert value.dtype == torch.float32
            assert value.item() == pytest.approx(loss(student.double(), teacher.double()).item(), rel=1e-4, abs=1e-6)

    def test_autocast_leaves_float32_alone(self, name: str) -> None:
        student, teacher = (feature.float() for feature in PAIRS[name]())
        expected = LOSSES[name](student, teacher).item()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert LOSSES[name](student, teacher).item() == pytest.approx(expected, rel=1e-6)

    def test_a_batch_of_one_is_finite(self, name: str) -> None:
        student, teacher = (feature[:1] for feature in PAIRS[name]())
        value = LOSSES[name](student.requires_grad_(), teacher)
        value.backward()
        assert value.isfinite() and student.grad is not None and student.grad.isfinite().all()

    def test_batches_that_do_not_fit(self, name: str) -> None:
        """Nothing is broadcast, and both shapes are named."""
        student, teacher = PAIRS[name]()
        others = [teacher[:-1], teacher[:1], teacher[:0], teacher[0, 0]]
        if name not in OF_VECTORS | OF_MAPS | OF_PARTS:
            others += [teacher[:, :-1], teacher[:, :1], teacher[..., None]]
        for own, taught in [*((student, other) for other in others), (student[:0], teacher[:0])]:
            with pytest.raises(ValueError, match=r"student \[.*\], teacher \[|numbers of factors"):
                LOSSES[name](own, taught)


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - ELSEWHERE))
def test_a_student_like_its_teacher_is_at_the_least_value(name: str) -> None:
    loss, (_, teacher) = LOSSES[name], PAIRS[name]()
    student = teacher.clone().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5)  # the small numbers that keep quotients finite
    assert student.grad is not None and student.grad.abs().max() < 1e-6
    for seed in range(20, 25):
        assert loss(teacher + 0.3 * rand(*teacher.shape, seed=seed), teacher).item() > value.item() + 1e-5


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - OF_VECTORS.keys() - RELATIONAL - SUMMED - LABELLED.keys()))
def test_a_batch_has_the_mean_loss_of_its_images(name: str) -> None:
    student, teacher = PAIRS[name]()
    each = [LOSSES[name](student[i : i + 1], teacher[i : i + 1]).item() for i in range(len(student))]
    assert LOSSES[name](student, teacher).item() == pytest.approx(sum(each) / len(each), rel=1e-12)


@pytest.mark.parametrize("name", POOLED)
def test_the_larger_map_is_pooled(name: str) -> None:
    large, small = rand(3, 4, 4, 4, seed=1), rand(3, 4, 2, 2, seed=2)
    value, other = LOSSES[name](F.avg_pool2d(large, 2), small), LOSSES[name](small, F.avg_pool2d(large, 2))
    assert torch.equal(LOSSES[name](large, small), value) and torch.equal(LOSSES[name](small, large), other)


@pytest.mark.parametrize("name", OF_LOGITS)
def test_extreme_logits_are_finite(name: str) -> None:
    student = torch.tensor([[300.0, -300.0, 0.0, 0.0, 0.0]] * 6, requires_grad=True)
    value = OF_LOGITS[name](student, -student.detach())
    value.backward()
    assert value.isfinite() and student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize(("module", "own", "taught"), MODULES)
def test_gradients_of_modules(module: type[nn.Module], own: tuple[int, ...], taught: tuple[int, ...]) -> None:
    loss = module(own, taught).double().eval()
    student, teacher = rand(3, *own, seed=1).requires_grad_(), rand(3, *taught, seed=2).requires_grad_()

    def value(s: Tensor) -> Tensor:
        torch.manual_seed(1)  # of a loss that draws
        return loss(s, teacher)

    assert gradcheck(value, (student,))
    value(student).backward()
    assert teacher.grad is None and all(p.grad is not None for p in loss.parameters())


# Every module of kdbench.losses that is a loss, with the shapes of what it reads, and the call of a batch of six.
WHOLE: list[tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], Callable[..., Tensor]]] = [
    *((partial(module, own, taught), (own, taught), nn.Module.__call__) for module, own, taught in MODULES),
    (partial(losses.CurriculumTemperature, (5,), (5,)), ((5,), (5,)), lambda m, s, t: m(s, t, torch.ones(()))),
    (partial(losses.NeighbourCongruence, (3, 2, 2), (5,)), ((3, 2, 2), (5,)), nn.Module.__call__),
    (
        partial(losses.ContrastiveDistillation, (3,), (5,), training_labels=LABELS),
        ((3,), (5,)),
        lambda m, s, t: m(s, t, torch.arange(6), LABELS),
    ),
    (partial(losses.KnowledgeReview, [(3, 4, 4)], [(2, 2, 2)]), ((3, 4, 4), (2, 2, 2)), lambda m, s, t: m([s], [t])),
    (
        partial(losses.SemanticCalibration, [(3, 4, 4)], [(2, 2, 2)], batch_size=6),
        ((3, 4, 4), (2, 2, 2)),
        lambda m, s, t: m([s], [t]),
    ),
    (partial(losses.PatchMimicking, [(3, 4, 4)], [(5, 4, 4)]), ((3, 4, 4), (5, 4, 4)), lambda m, s, t: m([s], [t])),
    (partial(losses.AttentionMatching, [(3, 4, 4)], [(2, 2, 2)]), ((3, 4, 4), (2, 2, 2)), lambda m, s, t: m([s], [t])),
    *(
        (partial(losses.SoftmaxRegression, own, (5,)), (own, (5,)), lambda m, s, t: m(s, t, HEAD))
        for own in ((3,), (3, 4, 4))
    ),
    (
        partial(losses.BeYourOwnTeacher, [(3, 4, 4), (4, 2, 2), (4, 2, 2), (4,), (5,)]),
        ((3, 4, 4), (4, 2, 2), (4, 2, 2), (4,), (5,)),
        lambda m, *student: m(student, LABELS),
    ),
    (
        partial(losses.CustomizedSoftLabels, [(3, 4, 4), (4, 2, 2), (5,)]),
        ((3, 4, 4), (4, 2, 2), (5,)),
        lambda m, *student: m(student, LABELS),
    ),
]
HEAD = nn.Linear(5, 5)


@pytest.mark.parametrize(("build", "shapes", "call"), WHOLE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_module_takes_half_precision(
    build: Callable[[], nn.Module], shapes: tuple[tuple[int, ...], ...], call: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    """Networks may run in autocast, the loss outside of it: the numbers are those of the same features in float32."""
    module = build()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    features = [rand(6, *shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]
    found = []
    for given in (features, [feature.float() for feature in features]):
        module.load_state_dict(state)
        torch.manual_seed(1)  # of a loss that draws
        found.append(call(module, *given))
    assert found[0].dtype == torch.float32 and found[0].isfinite() and torch.equal(*found)


@pytest.mark.parametrize("label", [-1, 5])
@pytest.mark.parametrize("name", [*LABELLED, "virtual_teacher"])
def test_a_label_that_is_no_class_is_an_error(name: str, label: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison with all classes would find none, and the loss would be finite."""
    monkeypatch.setitem(globals(), "LABELS", LABELS.clone().index_fill_(0, torch.tensor(2), label))
    loss = LABELLED.get(name, lambda student, _: losses.virtual_teacher(student, LABELS))
    with pytest.raises((IndexError, RuntimeError), match="out of (bounds|range)"):
        loss(*logits())


def test_every_card_of_a_loss_names_what_the_package_exports() -> None:
    registry = Registry()
    targets = {registry.card("losses", name).target for name in registry.trees["losses"]}
    assert {target.partition(":")[2] for target in targets} <= {*losses.__all__}


def test_the_modules_above_are_all_that_are_losses() -> None:
    given = {type(build()) for build, _, _ in WHOLE}
    # Connectors, modules of a method, a part of a loss, and the loss whose noise is drawn elsewhere.
    parts: set[type[nn.Module]] = {losses.Paraphraser, losses.Translator, losses.Projector, losses.AttentionFusion}
    parts |= {losses.FeatureTransform, losses.TransformedHead, losses.Bottleneck, losses.BottleneckHead}
    known = {
        one for name in losses.__all__ if isinstance(one := getattr(losses, name), type) and issubclass(one, nn.Module)
    }
    assert known - parts - {losses.ContrastiveRepresentation} == given
