"""A target domain beside the source: its images without labels, drawn by address, tested on; and its checks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_files import write_pictures
from tiny import CPU, batches_for, images, member_of, sets_at, shortened, step, train, untrained_teacher

from kdbench.cards import DatasetCard
from kdbench.engine.computing.memory import memory_of
from kdbench.engine.data.batches import Batches
from kdbench.engine.data.datasets import load_data
from kdbench.engine.evaluation import evaluate
from kdbench.engine.finish import streams
from kdbench.engine.member import Member
from kdbench.engine.scheduling import CellState, cohorts_of
from kdbench.engine.teachers.loading import fingerprint
from kdbench.errors import UserError
from kdbench.losses.ab import activation_agreement
from kdbench.recipe.planning import PlannedCell, plan
from kdbench.recipe.specs import CellSpec
from kdbench.registry import Registry
from kdbench.tree import Tree

REGISTRY = Registry()
RECIPE: dict[str, Any] = {
    "data": "mnist_8",
    "target": "digits",
    "teacher": "wrn_16_2_mnist_8",
    "student": "wrn_10_1",
    "protocol": {"name": "digits", "augmentation": {"padding": 1, "mode": "zero", "flip": True}},
}


def cell(method: Any = "uda", steps: int = 8, **more: Any) -> CellSpec:
    return shortened(plan(RECIPE | more | {"method": method}, REGISTRY).cells[0].spec, steps=steps)


class Labels:
    """Labels of a target's training images. Nobody may look at them, not even count them."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the target's training labels were touched: .{name}")

    def _touched(self, *_: Any) -> Any:
        raise AssertionError("the target's training labels were touched")

    __len__ = __getitem__ = __iter__ = __eq__ = __bool__ = __array__ = _touched  # type: ignore[assignment]


@pytest.mark.parametrize(
    "method", ["source_only", "kd", "uda", "kd_then_uda", "uda_then_kd", "uda_kd", "uda_kd_official"]
)
def test_no_label_of_the_target_is_touched_in_training(method: str) -> None:
    spec = cell(method, steps=4)
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"validation": 10}), "evaluations": 2})
    assert spec.target is not None
    data, target = images(spec.data, per_class=4), images(spec.target, seed=1)
    target = replace(target, train_labels=Labels())  # type: ignore[arg-type]
    batches = Batches(spec, data, CPU, target)
    teacher = untrained_teacher(spec)
    member = Member(spec, batches, teacher, CPU)
    while not member.finished:
        step(member, batches, teacher)
        measured = evaluate(member)
    # Tested on the target, selected on the source: neither asked for the guarded labels.
    assert {"test", "source", "validation"} <= set(measured)
    assert torch.equal(batches.validation.labels.sort().values, torch.arange(10))
    member.set_modes(evaluating=True)
    for name, part in (("test", batches.test), ("source", batches.source_test), ("validation", batches.validation)):
        pictures, labels = next(part.slices())  # type: ignore[union-attr]
        loss = torch.nn.functional.cross_entropy(member.student.logits(pictures), labels)
        assert measured[name]["loss"] == pytest.approx(loss.item(), rel=1e-4), name


def test_the_guard_would_tell() -> None:
    spec = cell()
    data = images(spec.data, per_class=4)
    with pytest.raises(AssertionError, match="touched"):
        Batches(spec, replace(data, train_labels=Labels()), CPU, images(spec.target))  # type: ignore[arg-type]


def test_targets_have_images_alone_and_go_round_by_themselves() -> None:
    spec = cell(steps=40)
    assert spec.target is not None
    target = images(spec.target, per_class=2, seed=1)
    source = images(spec.data, per_class=4)
    batches = Batches(spec, source, CPU, target)
    line = member_of(spec, source)[0].timeline
    assert line.batches_per_epoch == 5
    plain = {image.numpy().tobytes() for image in target.train_images}
    for image in list(target.train_images):
        for flip in (False, True):
            padded = torch.nn.functional.pad(image.flip(-1) if flip else image, (1, 1, 1, 1))
            plain |= {
                padded[:, y : y + 8, x : x + 8].contiguous().numpy().tobytes() for y in range(3) for x in range(3)
            }
    sizes = []
    for at in range(9):
        sets = sets_at(batches, at, line, ["data", "target"])
        assert torch.equal(sets["data"].images, batches.at(at, line).images) and sets["data"].labels is not None
        batch = sets["target"]
        assert batch.labels is batch.index is batch.view is batch.mask is None
        assert {image.contiguous().numpy().tobytes() for image in batch.images} <= plain
        sizes.append(len(batch.images))
    # 20 images in batches of 8: the source's epochs of five batches do not count here.
    assert sizes == [8, 8, 4] * 3


def test_a_batch_is_its_address_and_seeds_and_domains_draw_apart() -> None:
    spec = cell(steps=40)
    source, target = images(spec.data, per_class=4), images(spec.data, per_class=4)
    line = member_of(spec)[0].timeline
    batches, again = (Batches(spec, source, CPU, target) for _ in range(2))
    seen = {at: sets_at(batches, at, line, ["target"])["target"].images for at in range(9)}
    for at in (7, 2, 8, 0):
        assert torch.equal(sets_at(again, at, line, ["target"])["target"].images, seen[at])
    other = Batches(spec.model_copy(update={"seed": 1}), source, CPU, target)
    assert not torch.equal(sets_at(other, 0, line, ["target"])["target"].images, seen[0])
    # The same images as the source's, in another order and other views.
    assert not torch.equal(batches.at(0, line).images, seen[0])


def test_the_source_is_drawn_as_without_a_target() -> None:
    spec = cell("source_only")
    plain = cell("ce", target=None)
    data = images(spec.data, per_class=4)
    line = member_of(plain)[0].timeline
    a, b = Batches(plain, data, CPU).at(3, line), Batches(spec, data, CPU, images(spec.target)).at(3, line)  # type: ignore[arg-type]
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)  # type: ignore[arg-type]


def test_the_target_is_tested_and_the_source_beside_it() -> None:
    spec = cell("source_only", steps=2)
    assert spec.target is not None
    source, target = images(spec.data, per_class=4), images(spec.target, per_class=3, seed=1)
    batches = Batches(spec, source, CPU, target)
    assert torch.equal(next(batches.test.slices())[0], target.test_images)
    assert batches.source_test is not None
    assert torch.equal(next(batches.source_test.slices())[0], source.test_images)
    assert not len(sets_at(Batches(cell("ce", target=None), source, CPU), 0, member_of(spec)[0].timeline, []))
    assert Batches(cell("ce", target=None), source, CPU).source_test is None


def test_pictures_are_a_domain_too(tmp_path: Path) -> None:
    """Both domains read while training, and either beside one in memory."""
    found = {}
    for name, seed in (("near", 0), ("far", 50)):
        write_pictures(tmp_path / name, seed=seed)
        card = {
            "target": "kdbench.data.pictures:load",
            "streamed": True,
            "args": {"folder": name, "short_side": 20},
            "title": name,
            **{"classes": 3, "channels": 3, "image_size": 16, "train": 15, "test": 6},
            "normalization": {"mean": [0.5] * 3, "std": [0.25] * 3},
        }
        found[name] = DatasetCard.model_validate(card)
        REGISTRY.trees["datasets"][name] = Tree.of(card, f"{name}.yaml:1")
    try:
        recipe = {"data": "near", "target": "far", "student": "wrn_10_1", "steps": 9, "method": "uda"}
        protocol = {"name": "digits", "batch_size": 4, "augmentation": {"resized_crop": [0.3, 1.0], "flip": True}}
        spec = plan(recipe | {"protocol": protocol}, REGISTRY).cells[0].spec
    finally:
        for name in found:
            del REGISTRY.trees["datasets"][name]
    assert spec.target is not None
    near, far = (load_data(part, [tmp_path], False, tmp_path / "cache") for part in (spec.data, spec.target))
    batches = Batches(spec, near, CPU, far)
    member, _, _ = member_of(spec.model_copy(update={"data": spec.data.model_copy(update={"streamed": False})}))
    line = member.timeline
    seen = [sets_at(batches, at, line, ["data", "target"]) for at in range(6)]
    assert [len(sets["target"].images) for sets in seen] == [4, 4, 4, 3, 4, 4]
    fresh = sets_at(Batches(spec, near, CPU, far), 5, line, ["target"])["target"]
    assert torch.equal(fresh.images, seen[5]["target"].images) and fresh.labels is None
    assert not torch.equal(seen[0]["data"].images, seen[0]["target"].images)
    resident = images(spec.data)
    for pair in ((near, resident), (resident, far)):
        mixed = spec.model_copy(
            update={
                part: getattr(spec, part).model_copy(update={"streamed": data is not resident})
                for part, data in zip(("data", "target"), pair, strict=True)
            }
        )
        sets = sets_at(Batches(mixed, pair[0], CPU, pair[1]), 0, line, ["data", "target"])
        assert sets["data"].images.shape == sets["target"].images.shape == (4, 3, 16, 16)
        assert len(Batches(mixed, pair[0], CPU, pair[1]).test.labels) == 6


def test_the_shared_teacher_stays_while_the_cells_own_learns_and_is_measured() -> None:
    spec = cell("uda_kd", steps=4)
    member, batches, teacher = member_of(spec)
    assert teacher is not None and member.modules.own_teacher is not None
    before = fingerprint(teacher.network.model)
    assert fingerprint(member.modules.own_teacher.model) == before
    train(member, batches, teacher, 4)
    assert fingerprint(teacher.network.model) == before != fingerprint(member.modules.own_teacher.model)
    measured = evaluate(member)
    # Modes are as they were: the next step trains on the batch's own statistics.
    assert member.modules.own_teacher.model.training
    member.modules.own_teacher.model.eval()
    logits = member.modules.own_teacher.network.logits(images(spec.target, seed=1).test_images)  # type: ignore[arg-type]
    labels = images(spec.target, seed=1).test_labels  # type: ignore[arg-type]
    assert measured["teacher"]["accuracy"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    # Whose accuracy may be that of the shared one, by chance.
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert measured["teacher"]["loss"] == pytest.approx(loss, rel=1e-4)


def test_a_metric_compares_with_the_teacher_that_the_cell_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """From which its loss learned, and of which the record has the accuracy. Every image counts alike, though they come
    in parts of 17 and 3."""
    monkeypatch.setattr("kdbench.engine.data.batch.SLICE", {"cpu": 17})
    boundary = {"loss": "activation_boundary", "hook": "layer3.preact", "connector": "conv1x1_bn", "weight": 1e-3}
    stage = {"trains": ["student", "teacher", "connectors"], "losses": {"boundary": boundary}}
    member, batches, teacher = member_of(cell({"name": "uda_kd", "stages": {"adaptation": stage}}, steps=4))
    train(member, batches, teacher, 4)
    measured = evaluate(member)["metrics"]["agreement"]["layer3.preact"]
    member.set_modes(evaluating=True)
    parts = [pictures for pictures, _ in batches.test.slices()]
    assert [len(pictures) for pictures in parts] == [17, 3]
    pictures = torch.cat(parts)
    student, own = member.student, member.modules.trained_teacher
    (layer,) = member.stage.terms["boundary"].layers
    with torch.no_grad():
        value = student(student.normalizer(pictures), layer.students)[layer.students[0]]
        taught = own(own.normalizer(pictures), layer.teachers)[layer.teachers[0]]  # type: ignore[misc, union-attr]
        assert measured == pytest.approx(activation_agreement(layer.connectors[0](value), taught).item())


def test_an_adapted_teacher_stays_the_cells_own_in_the_next_stage() -> None:
    spec = cell("uda_then_kd")
    member, batches, teacher = member_of(spec)
    assert teacher is not None and member.modules.own_teacher is not None
    student = fingerprint(member.student.model)
    train(member, batches, teacher, 4)
    assert member.stage.span.name == "distillation" and fingerprint(member.student.model) == student
    adapted = fingerprint(member.modules.own_teacher.model)
    assert member.stage.teacher_points == {}
    train(member, batches, teacher, 3)
    # Frozen, in eval mode, and not the shared one.
    assert fingerprint(member.modules.own_teacher.model) == adapted != fingerprint(teacher.network.model)
    seen = []
    run = member.modules.own_teacher.model.register_forward_hook(lambda *_: seen.append(1))
    step(member, batches, teacher)
    run.remove()
    assert len(seen) == 2


def test_a_cohort_shares_both_domains() -> None:
    two = [cell("uda"), cell("kd"), cell("uda", target="mnist_8"), cell("ce", target=None)]
    cells = [CellState(PlannedCell(spec, {}, 0), i, Path("nowhere")) for i, spec in enumerate(two)]
    assert [[state.id for state in group] for group in cohorts_of(cells)] == [[0, 1], [2], [3]]


def test_a_target_is_part_of_what_a_cell_is() -> None:
    plain, other, same = cell("ce", target=None), cell("source_only"), cell("ce")
    assert plain.identity() != other.identity() == same.identity()
    assert "target/order" not in streams(plain) and "target/order" in streams(other)
    assert set(streams(plain)) < set(streams(other))


def test_memory_counts_both_domains_and_a_teacher_that_learns() -> None:
    spec = plan(RECIPE | {"method": "uda_kd"}, REGISTRY).cells[0].spec
    alone = plan(RECIPE | {"method": "ce", "target": None}, REGISTRY).cells[0].spec
    joint, frozen, plain = (memory_of(s, CPU) for s in (spec, cell_of("kd"), alone))
    assert joint.data - plain.data == 2 * (1198 + 599) * 64
    assert joint.step > 2 * frozen.step and joint.member > 2 * frozen.member


def cell_of(method: str) -> CellSpec:
    return plan(RECIPE | {"method": method}, REGISTRY).cells[0].spec


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"target": None}, "needs a target domain|add 'target:'"),
        ({"target": "cifar10"}, "target 'cifar10' has 10 classes of 3×32×32|mnist_8"),
        ({"target": "digitz"}, "unknown data set 'digitz'|digits"),
        ({"target": {"name": "digits", "per_class": 3}}, "unknown key 'per_class'"),
        (
            {"method": {"name": "uda", "stages": {"adaptation": {"alternating": True}}}},
            "alternates with the teacher, which it does not train",
        ),
        (
            {"method": {"name": "uda", "stages": {"adaptation": {"losses": {"mmd": {"against": "targt"}}}}}},
            "no input set 'targt'|target",
        ),
    ],
)
def test_mistakes_are_told(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as error:
        plan(RECIPE | {"method": "uda"} | change, REGISTRY)
    for part in expected.split("|"):
        assert part in str(error.value)


def test_made_up_batches_have_a_target() -> None:
    assert batches_for(cell()).target is not None


def test_a_public_teachers_card_speaks_of_the_source() -> None:
    """Its accuracy on the target is another one, and no mistake of the record."""
    from types import SimpleNamespace

    from kdbench.verify.soundness import _origins

    card = SimpleNamespace(accuracy=93.39, weights=None, resize=None, model=SimpleNamespace(image_size=None))
    card.each = [card]
    spec = SimpleNamespace(teacher=card, data=SimpleNamespace(options={}))

    def told(accuracy: float, source: float, target: object) -> list[str]:
        teacher = SimpleNamespace(accuracy=accuracy, source_accuracy=source, members=[], sha256="")
        return list(_origins(SimpleNamespace(teacher=teacher, data=None, target=target), spec))  # type: ignore[arg-type]

    assert told(83.6, 93.39, object()) == []
    assert len(told(83.6, 92.0, object())) == 1
    assert len(told(83.6, 93.39, None)) == 1
