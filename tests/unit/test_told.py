"""What a loss can have: several hook points at once, what it asks for by name, modules of its method, an own head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from captured import both, by_step, cell, short
from PIL import Image
from shipped import DIGITS, REGISTRY
from tiny import images, member_of, shortened, train
from torch import nn
from torch.nn import functional as F

from kdbench import losses
from kdbench.data.transforms import Transforms
from kdbench.engine.checks.cells import check_cell
from kdbench.engine.finish import size_of, streams
from kdbench.engine.member import Member
from kdbench.engine.networks.build import build_extractor, build_model
from kdbench.engine.networks.predicting import Predictor
from kdbench.engine.surroundings import _BUILT, said_of
from kdbench.engine.targets import import_target
from kdbench.engine.teachers.loading import fingerprint
from kdbench.engine.terms import _NUMBERS
from kdbench.errors import UserError
from kdbench.models.neighbours import batch_norm_before, classifier
from kdbench.models.points import expand
from kdbench.recipe.method_specs import ModuleSpec, OperationSpec
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec
from kdbench.registry import Registry
from kdbench.signature import check_options, parameters
from kdbench.told import TOLD, inputs_of

__all__ = ["short"]

OWN = '''
from torch import Tensor, nn


def several(student: list[Tensor], teacher: list[Tensor], progress: Tensor, scale: float = 1.0) -> Tensor:
    """Distances of mean values, rising."""
    pairs = zip(student, teacher, strict=True)
    return scale * (1 + progress) * sum((s.mean() - t.detach().mean()) ** 2 for s, t in pairs)


def epochs(student: Tensor, epoch: Tensor) -> Tensor:
    return (student * epoch).sum()


def detached(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.detach() - teacher).square().mean()


class Detached(nn.Module):
    """Has parameters, so it has a gradient, and none of the student."""

    def __init__(self, student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Linear(student_shape[0], teacher_shape[0])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (self.weight(student.detach()) - teacher).square().mean()


class Behind(nn.Module):
    def __init__(self, student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shapes = (student_shape, teacher_shape)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        assert self.shapes == (student.shape[1:], teacher.shape[1:])
        return (student - teacher).square().mean()


def shifted(student: Tensor, teacher: Tensor, shift: nn.Module) -> Tensor:
    return (shift(student) - teacher.detach()).square().mean()


class HoldsShift(nn.Module):
    def __init__(self, student_shape: tuple[int, ...], teacher_shape: tuple[int, ...], shift: nn.Module) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return shifted(student, teacher, self.shift)


class Whole(HoldsShift):
    def forward(self, student: Tensor) -> Tensor:
        return self.shift(student)


def shifted_whole(student: Tensor, teacher: Tensor, whole: nn.Module) -> Tensor:
    return shifted(student, teacher, whole)


def classified(
    student: Tensor, teacher: Tensor, student_classifier: nn.Module, teacher_classifier: nn.Module
) -> Tensor:
    return (student_classifier(student) - teacher_classifier(teacher)).square().mean()


class HoldsClassifiers(nn.Module):
    def __init__(
        self,
        student_shape: tuple[int, ...],
        teacher_shape: tuple[int, ...],
        student_classifier: nn.Module,
        teacher_classifier: nn.Module,
    ) -> None:
        super().__init__()
        self.student, self.teacher = student_classifier, teacher_classifier

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return classified(student, teacher, self.student, self.teacher)


def dropping_head(shift: nn.Module, teacher_classifier: nn.Module) -> nn.Module:
    return nn.Sequential(shift, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), teacher_classifier)
'''


def own(folder: Path, stage: dict[str, Any], **more: Any) -> Registry:
    """A registry with the losses above and a method `own` of one stage."""
    (folder / "own_losses.py").write_text(OWN)
    method = {"title": "own", "stages": [{"name": "training", **stage}], **more}
    (folder / "own.yaml").write_text(yaml.safe_dump({"methods": {"own": method}}))
    return Registry([folder])


def spec_of(registry: Registry, method: Any = "own", steps: int = 4, **more: Any) -> CellSpec:
    recipe = DIGITS
    (planned,) = plan(recipe | {"method": method} | more, registry).cells
    return shortened(planned.spec, steps)


def trained(spec: CellSpec, steps: int) -> Member:
    member, batches, teacher = member_of(spec)
    train(member, batches, teacher, steps)
    return member


def test_all_that_a_loss_can_ask_for_is_told() -> None:
    assert TOLD.keys() == _BUILT.keys() | _NUMBERS.keys() and not _BUILT.keys() & _NUMBERS.keys()


def test_inputs_are_read_from_signatures() -> None:
    cards = REGISTRY
    for name in cards.names("losses"):
        card = cards.card("losses", name)
        assert card.inputs[: len(found := inputs_of(card.target))] == found, name


def test_tensors_of_a_loss_may_be_called_by_the_plural(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "plural_loss.py").write_text(
        "def one(students, teachers_of_all, other_view, labels, scale: float): ...\ndef two(student, otherwise): ...\n"
    )
    assert inputs_of("plural_loss:one") == ["student", "teacher", "other", "labels"]
    assert inputs_of("plural_loss:two") == ["student"]


def test_a_type_with_a_name_of_its_own_is_checked_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "named_types.py").write_text(
        "Form = Literal['code', 'described']\nFormOrNone: TypeAlias = Form | None\nLoop = Loop\nSIZES = [1]\n"
        "def loss(student, form: Form = 'code', other: FormOrNone = None, sizes: Map = SIZES, loop: Loop = 1,\n"
        "         betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.99)): ...\n"
    )
    known = parameters("named_types:loss")
    written = {"form": "Literal['code', 'described']", "other": "Literal['code', 'described'] | None", "loop": "Loop"}
    assert {name: known[name].annotation for name in written} == written
    for name, wrong in (("form", "x"), ("other", "x"), ("betas", "x"), ("betas", [0.9])):
        with pytest.raises(UserError, match=f"'{name}' of it cannot be .*") as error:
            check_options({name: wrong}, known, lambda _: "here", "it", if_missing="")
        assert error.value.hint is not None and error.value.hint.startswith("it must be ")


def test_a_loss_takes_several_hook_points_and_what_it_is_told(tmp_path: Path) -> None:
    terms = {
        "far": {
            "loss": "own_losses:several",
            "student": ["stem", "layers"],
            "teacher": ["layers", "pooled"],
            "scale": 2.0,
        },
        "epochs": {"loss": "own_losses:epochs"},
    }
    spec = spec_of(own(tmp_path, {"losses": terms}), steps=8)
    term = spec.method.stages["training"].losses["far"]
    assert (term.loss.inputs, term.loss.options) == (["student", "teacher"], {"scale": 2.0})
    assert term.loss.counts_as["own_losses:several"].startswith("several@")
    check_cell(spec)
    member, batches, teacher = member_of(spec)
    assert teacher is not None
    points = member.modules.terms_of("training")["far"].points
    assert points("student") == {"data": ["stem", "layer1", "layer2", "layer3"]}
    assert points("teacher") == {"data": ["layer1", "layer2", "layer3", "pooled"]}
    train(member, batches, teacher, 5)
    # 20 images in batches of 8: three a pass, so the sixth step is in the second.
    values = {"student": torch.ones(2, 3), "teacher": torch.zeros(2, 3)}
    far = {network: {p: value for ps in points(network).values() for p in ps} for network, value in values.items()}
    member.stage.prepare(5, 1)
    told = member.stage.next_numbers().told
    assert (told["far"]["progress"].item(), told["epochs"]["epoch"].item()) == (5 / 8, 1.0)
    found = member.modules.terms_of("training")["far"](
        {network: {"data": points} for network, points in far.items()}, {"data": None}, told["far"]
    )
    assert found.item() == pytest.approx(2 * (1 + 5 / 8) * 4)


def test_a_loss_that_does_not_depend_on_the_student_is_found_whatever_it_has(tmp_path: Path) -> None:
    for loss in ("detached", "Detached"):
        stage: dict[str, Any] = {
            "trains": ["student", "connectors"],
            "losses": {"own": {"loss": f"own_losses:{loss}", "hook": "pooled"}},
        }
        folder = tmp_path / loss
        folder.mkdir()
        if loss == "detached":
            stage["losses"]["own"] |= {"connector": "conv"}
        with pytest.raises(UserError, match="does not depend on the student"):
            check_cell(spec_of(own(folder, stage)))


@pytest.mark.parametrize("given", ["student", "teacher", "labels"])
def test_a_loss_that_changes_what_others_read_is_found(given: str, tmp_path: Path) -> None:
    stage = {"trains": ["student"], "losses": {"own": {"loss": f"in_place:of_{given}", "hook": "logits"}}}
    registry = own(tmp_path, stage)
    (tmp_path / "in_place.py").write_text(
        "from torch.nn import functional as F\n\n\n"
        "def of_student(student, teacher):\n    return F.mse_loss(student.mul_(2), teacher)\n\n\n"
        "def of_teacher(student, teacher):\n    return F.mse_loss(student, teacher.mul_(0))\n\n\n"
        "def of_labels(student, labels):\n    return F.cross_entropy(student, labels.zero_())\n"
    )
    said = rf"^method 'own', stage 'training': loss 'own' \(in_place:of_{given}\) changes what it is given, in place"
    with pytest.raises(UserError, match=said):
        check_cell(spec_of(registry))


def test_a_loss_with_parameters_gets_the_shape_behind_its_connector(tmp_path: Path) -> None:
    term = {"loss": "own_losses:Behind", "hook": "layer2", "connector": "conv1x1_bn"}
    spec = spec_of(own(tmp_path, {"trains": ["student", "connectors"], "losses": {"own": term}}))
    cell = check_cell(spec)
    assert cell.shapes["layer2"] != cell.teacher_shapes["layer2"]
    module: Any = cell.terms["training"]["own"].functions[0]
    assert module.shapes == (cell.teacher_shapes["layer2"],) * 2


def test_options_change_by_schedules() -> None:
    changing = {"schedules": {"temperature": {"name": "linear", "start": 1.0, "end": 0.5}}}
    method = {"name": "kd", "stages": {"classification": {"losses": {"kd": changing}, "clip": 0.5}}}
    spec = cell(method, steps=12)
    assert [member_of(spec)[0].stage.numbers(step) for step in (0, 6)] == [[4.0], [3.0]]


def losses_with_numbers() -> list[tuple[str, str, str, list[str]]]:
    """For every loss with numbers that can change while training: a method, a stage and a term that have it."""
    registry, found = REGISTRY, dict[str, tuple[str, str, str, list[str]]]()
    for method in registry.names("methods"):
        for stage, card in registry.card("methods", method).stages.items():
            for term, entry in card.losses.items():
                loss = registry.card("losses", entry.loss)
                in_call = parameters(loss.target, called=True)
                settable = [one for one in registry.settable(loss) if one in in_call]
                if numbers := [one for one in settable if isinstance(in_call[one].default, float)]:
                    found.setdefault(entry.loss, (method, stage, term, numbers))
    return list(found.values())


@pytest.mark.parametrize(("method", "stage", "term", "options"), losses_with_numbers())
def test_every_number_of_every_loss_can_change_where_steps_are_recorded(
    method: str, stage: str, term: str, options: list[str], tmp_path: Path
) -> None:
    """Nothing reads it on the host. At first it is what the card says."""
    schedules = {option: {"name": "linear", "start": 1.0, "end": 0.9} for option in options}
    spec = cell({"name": method, "stages": {stage: {"losses": {term: {"schedules": schedules}}}}}, steps=8)
    program = both([spec], tmp_path)
    of = program.cohorts[0].cells[0].member
    assert stage not in program.eager_stages(of) or stage in by_step(of)


def test_a_number_that_leaves_its_range_is_said_before_anything_trains(tmp_path: Path) -> None:
    for end in (-1.0, 0.5):
        falling = {"schedules": {"temperature": {"name": "linear", "start": 1.0, "end": end}}}
        spec = spec_of(REGISTRY, {"name": "kd", "stages": {"classification": {"losses": {"kd": falling}}}})
        if end > 0:
            check_cell(spec)
        else:
            with pytest.raises(UserError, match="temperature must be positive"):
                check_cell(spec)


def test_what_cannot_change_or_is_not_there_is_said(tmp_path: Path) -> None:
    linear = {"name": "linear", "start": 1.0, "end": 0.5}
    for method, loss, option in (("kd", "kd", "scale_"), ("vid", "vid", "variance")):
        override = {"classification": {"losses": {loss: {"schedules": {option: linear}}}}}
        with pytest.raises(UserError, match=f"no option '{option}' with a schedule"):
            spec_of(REGISTRY, {"name": method, "stages": override})
    shift = {"losses": {"own": {"loss": "own_losses:shifted", "hook": "pooled"}}}
    with pytest.raises(UserError, match="needs the module 'shift'"):
        spec_of(own(tmp_path, shift))
    with pytest.raises(UserError, match="trains 'paraphrase', which the method does not have"):
        spec_of(REGISTRY, {"name": "ft", "stages": {"paraphrasing": {"trains": ["paraphrase"]}}})
    with pytest.raises(UserError, match="equal channels"):
        check_cell(spec_of(REGISTRY, "fsp"))


def test_warm_up_counts_epochs() -> None:
    schedule = {"weight_schedule": {"name": "warmup", "epochs": 4, "first": 0}}
    spec = spec_of(REGISTRY, {"name": "kd", "stages": {"classification": {"losses": {"kd": schedule}}}}, steps=24)
    stage = member_of(spec)[0].stage
    # Three steps an epoch.
    assert [stage.weights(step)["kd"] / 0.9 for step in (0, 2, 3, 6, 12, 23)] == pytest.approx([0, 0, 0.25, 0.5, 1, 1])


def test_what_a_card_says_itself_no_pair_of_what_it_includes_changes(tmp_path: Path) -> None:
    """Of the pair WRN-40-2 and WRN-16-2 the card dkd says β = 6."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "own.yaml").write_text(
        "mine: {include: dkd, stages: [{name: classification, losses: {dkd: {beta: 3.0}}}]}\n"
        "warm: {include: dkd, title: Warm, stages: [{name: classification, losses: {dkd: {temperature: 2.0}}}]}\n"
        "other: {include: mine, title: Other, pairs: [{teacher: wrn_40_2, student: wrn_16_2, beta: 5.0}]}\n"
    )
    registry = Registry([tmp_path])
    found = {}
    for method in ("dkd", "mine", "warm", "other"):
        recipe = {"data": "cifar100", "teacher": "wrn_40_2_cifar100", "student": "wrn_16_2", "protocol": "crd"}
        spec = plan(recipe | {"method": method, "seeds": 1}, registry).cells[0].spec
        found[method] = spec.method.stages["classification"].losses["dkd"].loss.options["beta"]
    assert found == {"dkd": 6.0, "mine": 3.0, "warm": 6.0, "other": 5.0}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"name": "warmup", "epochs": 4}, [0.25, 0.25, 0.5, 0.75, 1, 1]),
        ({"name": "sigmoid_ramp", "per": "epoch"}, [0, 0.9974, 0, 0, 0, 0.9974]),
    ],
)
def test_rates_count_epochs_as_weights_do(schedule: dict[str, Any], expected: list[float]) -> None:
    spec = spec_of(REGISTRY, {"name": "ce", "stages": {"classification": {"schedule": schedule}}}, steps=24)
    stage = member_of(spec)[0].stage
    base = stage.optimizers[0].base_rates[0]
    assert [stage.rate(step) / base for step in (0, 2, 3, 6, 12, 23)] == pytest.approx(expected, abs=1e-4)


def test_gradients_are_clipped_together() -> None:
    def moved(clip: float | None) -> float:
        changes = {"optimizer": {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}}
        method = {"name": "ce", "stages": {"classification": changes | ({"clip": clip} if clip else {})}}
        member, batches, teacher = member_of(spec_of(REGISTRY, method))
        before = [p.detach().clone() for p in member.student.model.parameters()]
        train(member, batches, teacher, 1)
        parameters = zip(before, member.student.model.parameters(), strict=True)
        return torch.cat([(old - new.detach()).flatten() for old, new in parameters]).norm().item()

    free = moved(None)
    assert moved(free / 3) == pytest.approx(free / 3, rel=1e-3)
    assert moved(2 * free) == pytest.approx(free, rel=1e-6)


def test_the_paraphraser_of_the_first_stage_is_that_of_the_second() -> None:
    spec = cell("ft_official", steps=3)
    member, batches, teacher = member_of(spec)
    student, paraphraser = member.student.model, member.modules.of_method["paraphraser"]
    begin = {"student": fingerprint(student), "paraphraser": fingerprint(paraphraser)}
    train(member, batches, teacher, 2)
    assert fingerprint(student) == begin["student"] and fingerprint(paraphraser) != begin["paraphraser"]
    train(member, batches, teacher, 1)
    assert member.stage.span.name == "classification" and not paraphraser.training
    first, second = member.stage.optimizers
    own = {id(p) for p in member.modules.of_method["translator"].parameters()}
    assert {id(p) for group in second.optimizer.param_groups for p in group["params"]} == own
    assert not own & {id(p) for group in first.optimizer.param_groups for p in group["params"]}
    ready = fingerprint(paraphraser)
    train(member, batches, teacher, 2)
    assert fingerprint(paraphraser) == ready and fingerprint(student) != begin["student"]
    term = member.modules.terms_of("classification")["ft"]
    assert teacher is not None
    feature, taught = torch.randn(2, 64, 2, 2), torch.randn(2, 128, 2, 2)
    values = {"student": {"data": {"layer3": feature}}, "teacher": {"data": {"layer3": taught}}}
    translator: Any = member.modules.of_method["translator"]
    expected = losses.factor_transfer(translator(feature), paraphraser.encoder(taught))  # type: ignore[operator]
    assert torch.equal(term(values, {"data": None}), expected)


def test_banks_have_the_size_of_the_part_that_is_trained_on() -> None:
    recipe = {"data": {"name": "digits", "per_class": 3, "validation": 20}}
    spec = shortened(spec_of(REGISTRY, "crd", **recipe), 3, per_class=3)
    member, batches, teacher = member_of(spec, images(spec.data, per_class=6))
    module: Any = member.modules.terms_of("classification")["crd"].functions[0]
    assert len(module.contrast.student_bank) == len(batches.train) == 30 and module.negatives == 27
    assert torch.equal(module.training_labels, batches.train.labels)
    before = module.contrast.student_bank.clone()
    train(member, batches, teacher, 1)
    changed = (module.contrast.student_bank != before).any(dim=1)
    batches.seek(0, member.timeline)
    assert sorted(changed.nonzero().flatten().tolist()) == sorted(batches.sets(["data"])["data"].index.tolist())
    kept = {name for name in member.state()["terms"] if "crd" in name}
    assert {name.rpartition(".")[2] for name in kept} == {"student_bank", "teacher_bank", "log_z", "weight", "bias"}


def test_noise_comes_from_other_classes_and_is_drawn_by_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    module = losses.ContrastiveDistillation((4,), (6,), training_labels=torch.arange(40) % 5, negatives=10)
    chosen: list[Any] = []
    module.contrast.register_forward_pre_hook(lambda _, args: chosen.append(args[3]))
    labels = torch.tensor([0, 3])
    for seed, at_once in ((1, 2), (2, 2), (1, 2), (1, 1)):
        monkeypatch.setattr(losses.crd, "DRAWN", at_once * 40)
        torch.manual_seed(seed)
        module(torch.randn(2, 4), torch.randn(2, 6), torch.tensor([0, 3]), labels)
    assert (chosen[0] % 5 != labels[:, None]).all() and all(len({*row}) == 10 for row in chosen[0].tolist())
    assert torch.equal(chosen[0], chosen[2]) and not torch.equal(chosen[0], chosen[1])
    assert torch.equal(chosen[0], chosen[3]), "of a large training set a batch draws in parts"


def test_a_student_answers_through_its_projector_and_the_teachers_classifier() -> None:
    member, batches, teacher = member_of(cell("simkd", steps=3))
    assert teacher is not None
    own_head = {k: v.clone() for k, v in member.student.model.fc.state_dict().items()}  # type: ignore[union-attr]
    train(member, batches, teacher, 3)
    member.set_modes(evaluating=True)
    pictures = torch.rand(3, 1, 8, 8)
    feature = member.student(member.student.normalizer(pictures), ["layer3"])["layer3"]
    projected = member.modules.of_method["projector"](feature).mean(dim=(2, 3))
    expected = F.linear(projected, *teacher.network.model.fc.parameters())  # type: ignore[union-attr]
    assert torch.allclose(member.answers.logits(pictures), expected, atol=1e-6)
    assert all(torch.equal(v, own_head[k]) for k, v in member.student.model.fc.state_dict().items())  # type: ignore[union-attr]
    model = member.answers.model
    assert isinstance(model, Predictor)
    used = sum(p.numel() for p in model.used(pictures))
    parts = [member.modules.of_method["projector"], teacher.network.model.fc]
    student: Any = member.student.model
    count = sum(p.numel() for part in [student, *parts] for p in part.parameters())
    # Behind layer3 of a WRN there are a batch norm and the classifier.
    assert used == count - sum(p.numel() for part in (student.bn1, student.fc) for p in part.parameters())
    assert size_of(model, member.spec.data)["parameters"] == used, "a record says so"
    assert not any(p.requires_grad for p in teacher.network.model.parameters())


@pytest.mark.parametrize("method", ["norm", "norm_kd"])
def test_a_student_answers_through_its_transform_and_its_own_classifier(method: str) -> None:
    member, batches, teacher = member_of(cell(method, steps=3))
    assert teacher is not None
    student: Any = member.student.model
    transform: Any = member.modules.of_method["transform"]
    begins = [p.detach().clone() for p in (student.fc.weight, transform.expansion[0].weight)]
    train(member, batches, teacher, 3)
    # Of each step's batch norms once, whatever the loss is made of.
    assert transform.expansion[1].num_batches_tracked == transform.contraction[1].num_batches_tracked == 3
    ends = student.fc.weight, transform.expansion[0].weight
    assert not any(torch.equal(*pair) for pair in zip(begins, ends, strict=True))
    member.set_modes(evaluating=True)
    pictures = torch.rand(3, 1, 8, 8)
    feature = member.student(member.student.normalizer(pictures), ["layer3.preact"])["layer3.preact"].relu()
    wide = transform.expansion[1](F.conv2d(feature, transform.expansion[0].weight))
    feature = feature + transform.contraction[1](F.conv2d(wide, transform.contraction[0].weight))
    logits = F.linear(feature.mean(dim=(2, 3)), student.fc.weight, student.fc.bias)
    logits = logits - logits.mean(dim=1, keepdim=True)
    expected = 2.5 * logits / (logits.square().mean(dim=1, keepdim=True) + 1e-7).sqrt()
    assert torch.allclose(member.answers.logits(pictures), expected, atol=1e-5)
    model = member.answers.model
    assert isinstance(model, Predictor)
    count = sum(p.numel() for part in (student, transform) for p in part.parameters())
    assert sum(p.numel() for p in model.used(pictures)) == count


def test_a_head_answers_in_eval_mode_whatever_it_is_made_of(tmp_path: Path) -> None:
    stage = {"trains": ["student", "shift"], "losses": {"own": {"loss": "own_losses:shifted", "hook": "layer3"}}}
    shift = {"name": "conv1x1_bn", "student": "layer3", "teacher": "layer3"}
    head = {"name": "dropping_head", "student": "layer3"}
    (tmp_path / "head.yaml").write_text("connectors: {dropping_head: {target: 'own_losses:dropping_head'}}")
    member = trained(spec_of(own(tmp_path, stage, modules={"shift": shift}, predicts=head)), 2)
    member.set_modes(evaluating=True)
    pictures = torch.rand(8, 1, 8, 8)
    assert torch.equal(*(member.answers.logits(pictures) for _ in range(2)))


@pytest.mark.parametrize(
    ("told", "holder", "trains", "of_shift"),
    [
        ("shifted", "HoldsShift", ["shift"], {}),
        ("shifted", "HoldsShift", ["shift", "connectors"], {}),
        ("shifted", "HoldsShift", ["shift", "connectors"], {"optimizer": {"name": "sgd", "lr": 0.02}}),
        ("shifted", "shifted_whole", ["shift", "whole"], {}),
        ("classified", "HoldsClassifiers", ["connectors"], {}),
    ],
)
def test_what_a_loss_or_module_was_told_trains_once_also_where_its_class_holds_it(
    told: str, holder: str, trains: list[str], of_shift: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "whole.yaml").write_text("connectors: {whole: {target: 'own_losses:Whole'}}")
    at = {"student": "layer3", "teacher": "layer3"}
    modules = {"shift": {"name": "conv1x1_bn"} | at | of_shift, "whole": {"name": "whole"} | at}
    members = []
    for loss in (told, holder):
        asked = {name: one for name, one in modules.items() if name in (*trains[:1], loss.partition("_")[2])}
        losses = {"own": {"loss": f"own_losses:{loss}", "hook": "layer3" if asked else "pooled"}}
        stage = {"trains": ["student", *(one for one in trains if one != "whole" or one in asked)], "losses": losses}
        spec = spec_of(own(tmp_path, stage, modules=asked))
        check_cell(spec)
        members.append(trained(spec, 3))
    assert len({fingerprint(member.student.model) for member in members}) == 1
    assert len({fingerprint(member.modules.of_method["shift"]) for member in members if asked}) <= 1
    assert members[1].teacher is not None
    network = members[1].teacher.network.model
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_module_that_only_holds_others_is_nothing_to_train(tmp_path: Path) -> None:
    (tmp_path / "whole.yaml").write_text("connectors: {whole: {target: 'own_losses:Whole'}}")
    at = {"student": "layer3", "teacher": "layer3"}
    modules = {"shift": {"name": "conv1x1_bn"} | at, "whole": {"name": "whole"} | at}
    stage = {"trains": ["whole"], "losses": {"own": {"loss": "own_losses:shifted", "hook": "layer3"}}}
    with pytest.raises(UserError, match="there is nothing to train"):
        check_cell(spec_of(own(tmp_path, stage, modules=modules)))


def test_a_module_before_the_one_that_it_needs_is_said(tmp_path: Path) -> None:
    (tmp_path / "whole.yaml").write_text("connectors: {whole: {target: 'own_losses:Whole'}}")
    at = {"student": "layer3", "teacher": "layer3"}
    modules = {"before": {"name": "whole"} | at, "shift": {"name": "conv1x1_bn"} | at}
    stage = {"trains": ["student"], "losses": {"own": {"loss": "own_losses:shifted", "hook": "layer3"}}}
    spec = spec_of(own(tmp_path, stage, modules=modules))
    with pytest.raises(UserError, match=r"modules/before: 'whole' .* needs 'shift', which stands after it") as error:
        check_cell(spec)
    assert error.value.hint == "name 'shift' first under the method's 'modules'"


@pytest.mark.parametrize("method", ["hnd", "ghnd"])
def test_a_bottleneck_alone_trains_between_layers_of_the_teacher(method: str) -> None:
    member, batches, teacher = member_of(cell(method, steps=3))
    assert teacher is not None
    student: Any = member.student.model
    bottleneck: Any = member.modules.of_method["bottleneck"]
    begin = [p.detach().clone() for p in bottleneck.parameters()]
    train(member, batches, teacher, 3)
    assert not any(map(torch.equal, begin, bottleneck.parameters()))
    # Weights and statistics, bit for bit.
    assert fingerprint(student) == fingerprint(teacher.network.model)
    assert bottleneck.training and not any(module.training for module in student.modules())
    member.set_modes(evaluating=True)
    pictures = torch.rand(3, 1, 8, 8)
    value = bottleneck(student.conv1(member.student.normalizer(pictures)))
    assert value.shape == (3, 64, 4, 4)
    features = student.bn1(student.block3(value)).relu().mean(dim=(2, 3))
    assert torch.allclose(member.answers.logits(pictures), student.fc(features), atol=1e-5)
    model = member.answers.model
    assert isinstance(model, Predictor)
    parts = (student.conv1, bottleneck, student.block3, student.bn1, student.fc)
    assert size_of(model, member.spec.data)["parameters"] == sum(p.numel() for part in parts for p in part.parameters())


def test_a_bottleneck_takes_the_place_that_the_recipe_names() -> None:
    spec = cell({"name": "hnd", "split": "layer3", "input": "layer1", "width": 3})
    term = spec.method.stages["distillation"].losses["layers"]
    assert (term.student, term.teacher) == ("layer1", "layer3")
    assert spec.method.predicts is not None and spec.method.predicts.student == "layer1"
    member = member_of(spec)[0]
    assert said_of(member.modules.of_method)["bottleneck"]["map"] == "3 × 3 × 3"
    told = check_cell(spec).said["bottleneck"]
    assert told == said_of(member.modules.of_method)["bottleneck"] and told["values of an image"] == 27
    wrong = cell({"name": "ghnd", "split": "layer2.preact"})
    with pytest.raises(UserError, match="takes the place of a whole layer"):
        check_cell(wrong)


def test_what_a_module_says_of_itself_is_plain() -> None:
    def saying(record: Any) -> nn.Module:
        return type("Own", (nn.Identity,), {"record": record})()

    for record, why in ((lambda self: 1 / 0, "division by zero"), (lambda self: {"net": self}, "JSON")):
        with pytest.raises(UserError, match=f"module 'own': its 'record'.*{why}"):
            said_of({"silent": nn.Identity(), "own": saying(record)})
    # What a user's module holds under this name is not what it says.
    holding: Any = nn.Identity()
    holding.record = nn.Conv2d(1, 1, 1)
    far = saying(lambda self: {"far": float("inf")})
    assert said_of({"holding": holding, "far": far}) == {"far": {"far": "Infinity"}}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"modes": {"student": "train"}}, "'student_tail' is of a student in eval mode"),
        ({"begins": {"name": "reset_layer"}}, "'reset_layer' changes the student itself"),
    ],
)
def test_a_tail_is_of_a_student_that_stays_as_it_is(changed: dict[str, Any], told: str) -> None:
    spec = cell({"name": "hnd", "stages": {"distillation": changed}} if "modes" in changed else "hnd")
    if "begins" in changed:
        stage = spec.method.stages["distillation"]
        operation = OperationSpec(name="reset_layer", target="torch.nn:Identity", teacher=False)
        stages = {"distillation": stage.model_copy(update={"begins": operation})}
        spec = spec.model_copy(update={"method": spec.method.model_copy(update={"stages": stages})})
    with pytest.raises(UserError, match=told):
        check_cell(spec)


def test_a_head_is_made_of_modules_that_train_and_gives_logits() -> None:
    spec = spec_of(REGISTRY, "simkd")
    card = REGISTRY.card("connectors", "conv")
    own = ModuleSpec(name="conv", target=card.target, student="pooled", teacher="pooled")
    other = ModuleSpec(name="same", target="torch.nn.modules.linear:Identity", student="pooled")
    for head, what in ((own, "parameters of its own"), (other, r"gives \[2, 64\] for two images, not \[2, 10\]")):
        method = spec.method.model_copy(update={"predicts": head})
        with pytest.raises(UserError, match=what):
            check_cell(spec.model_copy(update={"method": method}))


@pytest.mark.parametrize(
    ("model", "point", "norm", "head"),
    [
        ("resnet20", "layer2.preact", "layer2.2.bn2", "linear"),
        ("resnet8x4", "layer2.preact", "layer2.0.bn2", "linear"),
        ("wrn_16_2", "layer2.preact", "block3.0.bn1", "fc"),
        ("vgg8", "layer1.preact", "block1.1", "classifier"),
        ("mobilenetv2_half", "layer1.preact", "blocks.2.0.conv.1", "classifier"),
        ("torchvision:resnet18", "layer4.preact", "layer4.1.bn2", "fc"),
    ],
)
def test_the_batch_norm_of_a_hook_point_and_the_classifier(model: str, point: str, norm: str, head: str) -> None:
    recipe = {"data": "cifar10", "student": model, "protocol": "crd", "method": "ce"}
    extractor = check_cell(plan(recipe, REGISTRY).cells[0].spec).student
    names = {id(module): name for name, module in extractor.model.named_modules()}
    assert names[id(batch_norm_before(extractor, point, (3, 32, 32)))] == norm
    assert names[id(classifier(extractor))] == head


def test_a_point_without_a_batch_norm_is_said() -> None:
    recipe = {"data": "cifar10", "student": "wrn_10_1", "protocol": "crd", "method": "ce"}
    extractor = check_cell(plan(recipe, REGISTRY).cells[0].spec).student
    with pytest.raises(UserError, match="no batch norm before 'stem'"):
        batch_norm_before(extractor, "stem", (3, 32, 32))


def test_overhaul_takes_its_margin_from_the_teachers_batch_norm() -> None:
    member, _, teacher = member_of(cell("ofd_eval"))
    assert teacher is not None
    term = member.modules.terms_of("classification")["ofd"]
    norm: Any = teacher.network.model.get_submodule("block2.0.bn1")
    assert term.layers[0].told["teacher_batch_norm"] is norm
    nn.init.uniform_(norm.bias, -1, 1)
    margin = losses.batch_norm_margin(norm.weight, norm.bias)
    student, taught = torch.randn(2, 32, 4, 4), torch.randn(2, 32, 4, 4)
    assert torch.equal(losses.ofd(student, taught, norm), losses.overhaul(student, taught, margin))
    # A teacher in train mode is a copy, whose batch norms are asked.
    own = member_of(cell("ofd"))[0]
    assert own.modules.own_teacher is not None
    copied = own.modules.own_teacher.model.get_submodule("block2.0.bn1")
    assert own.modules.terms_of("classification")["ofd"].layers[0].told["teacher_batch_norm"] is copied


def test_weights_of_a_pair_are_those_of_its_source_unless_the_recipe_says_others() -> None:
    recipe = {"data": "cifar100", "teacher": "wrn_40_2_cifar100", "student": "wrn_16_2", "protocol": "crd"}

    def beta(method: Any, **other: str) -> float:
        (planned,) = plan(recipe | other | {"method": method}, REGISTRY, weights_must_exist=False).cells
        loss: float = planned.spec.method.stages["classification"].losses["dkd"].loss.options["beta"]
        return loss

    assert beta("dkd") == 6.0 and beta({"name": "dkd", "beta": 3.0}) == 3.0
    assert beta("dkd", student="vgg8") == 8.0
    assert beta("dkd", teacher="crd_resnet56_cifar100", student="crd_resnet20") == 2.0


def test_two_views_of_the_same_images(tmp_path: Path) -> None:
    stage = {"losses": {"ce": {"loss": "cross_entropy"}, "again": {"loss": "cross_entropy", "input": "second"}}}
    stage["losses"]["kd"] = {"loss": "kd", "input": "second"}
    protocol = {"name": "digits", "augmentation": {"padding": 1, "mode": "zero", "flip": True}}
    spec = spec_of(own(tmp_path, stage), steps=12, protocol=protocol)
    check_cell(spec)
    member, batches, teacher = member_of(spec)
    names = ["data", "second"]
    for step in (0, 1, 5):
        batches.seek(step, member.timeline, names)
        batches.feed(names)
        first, second = batches.sets(names).values()
        assert torch.equal(first.index, second.index) and torch.equal(first.labels, second.labels)
        assert not torch.equal(first.view, second.view) and not torch.equal(first.images, second.images)
    assert batches.second.train is batches.source.train
    train(member, batches, teacher, 12)
    assert streams(spec) == ["init", "connectors", "order", "augmentation", "second/augmentation", "dropout"]
    program = both([cell_of_two_views(spec)], tmp_path / "runs")
    assert any(program.recordings.values())


def cell_of_two_views(spec: CellSpec) -> CellSpec:
    """The same in batches that divide the made-up images."""
    protocol = spec.protocol.model_copy(update={"batch_size": 2})
    return spec.model_copy(update={"protocol": protocol, "evaluations": 0})


def test_an_untrained_teacher_begins_by_the_seed_and_trains_along() -> None:
    recipe: dict[str, Any] = {"teacher": {"model": "wrn_10_2", "untrained": True}}
    first, second = (spec_of(REGISTRY, "dml", seeds=[seed], **recipe) for seed in (0, 1))
    assert first.teacher is not None and first.teacher.untrained
    check_cell(first)
    members = [member_of(spec)[0] for spec in (first, first, second)]
    begun = [fingerprint(member.modules.own_teacher.model) for member in members if member.modules.own_teacher]
    assert begun[0] == begun[1] != begun[2]
    member = trained(first, 2)
    assert member.modules.own_teacher is not None and fingerprint(member.modules.own_teacher.model) != begun[0]
    for method, more in (("kd", {}), ("finetune_new_classes", {"student": "wrn_10_2"})):
        with pytest.raises(UserError, match="needs a trained teacher"):
            spec_of(REGISTRY, method, **recipe, **more)


def test_each_of_two_networks_learns_from_the_other_who_stands_still() -> None:
    a, b = (torch.randn(5, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    p, q = a.softmax(1), b.softmax(1)
    expected = (q * (q / p).log() + p * (p / q).log()).sum(1).mean()
    assert losses.mutual(a, b).item() == pytest.approx(expected.item(), rel=1e-12)
    losses.mutual(a, b).backward()
    # The gradient of KL(constant || softmax(z)) is softmax(z) - constant.
    assert a.grad is not None and b.grad is not None
    assert torch.allclose(a.grad, (p - q).detach() / 5) and torch.allclose(b.grad, (q - p).detach() / 5)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_strong_view_is_cut_out_at_the_address_of_its_draws(mode: str) -> None:
    spec = (
        plan({"data": "cifar100", "student": "crd_resnet8", "method": "ce", "protocol": "crd_mlkd"}, REGISTRY)
        .cells[0]
        .spec
    )
    assert spec.protocol.second is not None
    (transform,) = spec.protocol.second.transforms
    assert (transform.name, spec.protocol.epochs, spec.protocol.batch_size) == ("mlkd_strong", 480, 64)
    image = Image.new(mode, (32, 32), 0 if mode == "L" else (0, 0, 0))
    view = Transforms([("mlkd_strong", import_target(transform.target)(operations=0))])
    first, again, other = (np.array(view(image, seed)) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()
    for cut in (first, other):
        rows, columns = (np.unique(at) for at in np.nonzero(cut.reshape(32, 32, -1)[..., 0])[:2])
        assert len(rows) <= 17 and len(columns) <= 17, "at most half of each side"
        assert (
            cut[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == (121 if mode == "L" else (125, 123, 114))
        ).all()
    several = Transforms([("mlkd_strong", import_target(transform.target)())])
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, len(mode)), dtype=np.uint8).squeeze())
    assert len({np.array(several(noise, seed)).tobytes() for seed in range(20)}) == 20


@pytest.mark.parametrize("student", ["mobilenetv2_half", "shufflenet_v2", "shufflenet_v1", "wrn_16_2", "vgg8"])
@pytest.mark.parametrize("method", ["sdd", "cat_kd"])
def test_the_map_of_a_method_is_what_the_classifier_pools(method: str, student: str) -> None:
    recipe = {"data": "cifar100", "teacher": "resnet32x4_cifar100", "student": student, "protocol": "crd"}
    spec = plan(recipe | {"method": method}, REGISTRY, weights_must_exist=False).cells[0].spec
    term = spec.method.stages["classification"].losses["sdd" if method == "sdd" else "cat"]
    extractor = build_extractor(build_model(spec.student, spec.data).eval(), spec.student, spec.data)
    (point,) = expand(term.points("student"), ["stem", *extractor.places])
    values = extractor(torch.randn(2, 3, 32, 32), [point, "pooled"])
    torch.testing.assert_close(values[point].relu().mean(dim=(2, 3)), values["pooled"])
