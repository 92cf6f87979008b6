"""What code of the user's own gives is looked at before anything trains on it: data, transforms, metrics, networks."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from captured import cohort_of
from tiny import CPU, batches_for, member_of, shortened, train, untrained_teacher

from kdbench import cli
from kdbench.data.pictures import Pictures
from kdbench.engine.checks.cells import check_cell, costs_of
from kdbench.engine.computing.choosing import _measure
from kdbench.engine.computing.compute import REFERENCE
from kdbench.engine.data.datasets import load_data
from kdbench.engine.data.domain import split
from kdbench.engine.evaluation import evaluate
from kdbench.engine.inputs import SourceFiles
from kdbench.engine.loop import TrainingLoop
from kdbench.engine.program import Program
from kdbench.engine.workers.messages import Failed
from kdbench.engine.workers.worker import Worker
from kdbench.errors import UserError
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec
from kdbench.registry import Registry

# Data functions, each with one thing wrong, or nothing.
SETS = """
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import torch
from PIL import Image

from kdbench.data.images import ImageData, canonical
from kdbench.data.pictures import Pictures, gather

IMAGES = torch.arange(6 * 3 * 8 * 8).reshape(6, 3, 8, 8).remainder(251).to(torch.uint8)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def made(images=IMAGES, labels=LABELS, test_images=IMAGES, test_labels=LABELS, classes="abc"):
    return canonical("own", classes, (images, labels), (test_images, test_labels), "made up")


def by_hand(**over):
    given = {"train_images": IMAGES, "train_labels": LABELS, "test_images": IMAGES, "test_labels": LABELS}
    return ImageData(name="own", classes=("a", "b", "c"), **given | {"fingerprint": "1", "origin": "made up"} | over)


def good(roots, download, cache): return made(labels=LABELS.to(torch.int32))
def fewer_labels(roots, download, cache): return made(labels=LABELS[:5])
def more_labels(roots, download, cache): return by_hand(test_labels=torch.cat([LABELS, LABELS]))
def column_of_labels(roots, download, cache): return made(labels=LABELS[:, None])
def float_labels(roots, download, cache): return made(labels=LABELS + 0.5)
def yes_or_no(roots, download, cache): return made(labels=LABELS > 0)
def short_labels(roots, download, cache): return by_hand(train_labels=LABELS.to(torch.int32))
def list_of_labels(roots, download, cache): return made(labels=LABELS.tolist())
def from_one(roots, download, cache): return made(labels=LABELS + 1)
def ignored(roots, download, cache): return made(test_labels=LABELS - 1)
def from_one_by_hand(roots, download, cache): return by_hand(train_labels=LABELS + 1)
def float_images(roots, download, cache): return made(images=IMAGES.float())
def share_images(roots, download, cache): return by_hand(test_images=IMAGES / 255)
def long_images(roots, download, cache): return made(images=IMAGES.long())
def not_finite(roots, download, cache): return made(images=IMAGES / 0)
def of_numpy(roots, download, cache): return made(images=IMAGES.numpy())
def grey(roots, download, cache): return made(images=IMAGES[:, 0], test_images=IMAGES[:, 0])
def channels_last(roots, download, cache):
    return made(images=IMAGES.permute(0, 2, 3, 1), test_images=IMAGES.permute(0, 2, 3, 1))
def larger_test(roots, download, cache): return made(test_images=IMAGES.repeat(1, 1, 2, 2))
def other_classes(roots, download, cache): return made(classes="abcd")
def numbers_as_classes(roots, download, cache): return made(classes=range(3))
def no_test(roots, download, cache): return made(test_images=IMAGES[:0], test_labels=LABELS[:0])
def no_training(roots, download, cache): return made(images=IMAGES[:0], labels=LABELS[:0])
def fixed_fingerprint(roots, download, cache): return by_hand()
def no_fingerprint(roots, download, cache): return by_hand(fingerprint=None)
def changed_afterwards(roots, download, cache): return replace(made(), train_images=255 - IMAGES)
def nothing(roots, download, cache): made()
def a_tuple(roots, download, cache): return IMAGES, LABELS, IMAGES, LABELS
def raises(roots, download, cache):
    return {"train": 1}["test"]
def absent_file(roots, download, cache): return torch.load(roots[0] / "absent.pt")
def leaves(roots, download, cache):
    sys.exit("no licence")
def leaves_quietly(roots, download, cache): sys.exit()
def takes_nothing(): return made()
def no_training_of_one(roots, download, cache): return made(labels=LABELS.clamp(max=1))
def no_test_of_one(roots, download, cache): return made(test_labels=LABELS.clamp(max=1))
def of_one_class(roots, download, cache): return made(labels=LABELS * 0, test_labels=LABELS * 0, classes="a")


def pictures(cache, change=lambda data: data):
    files = []
    for number in range(3):
        Image.fromarray(IMAGES[number].permute(1, 2, 0).numpy()).save(file := Path(cache) / f"{number}.png")
        files.append((file, number))
    return change(gather("own", "abc", files, files, cache, 8, "made up"))


def good_pictures(roots, download, cache): return pictures(cache)
def pictures_without_labels(roots, download, cache):
    return pictures(cache, lambda data: replace(data, train_labels=LABELS[:2]))
def pictures_from_one(roots, download, cache):
    return pictures(cache, lambda data: replace(data, test_labels=data.test_labels + 1))
def pictures_of_another_order(roots, download, cache):
    return pictures(cache, lambda data: replace(data, train_labels=data.train_labels.flip(0)))
"""


def own_set(function: str, module: str = "own_sets", **over: Any) -> DataSpec:
    said = {"classes": 3, "channels": 3, "image_size": 8, "train": 6, "test": 6} | over
    normalization = {"mean": [0.5] * 3, "std": [0.25] * 3}
    return DataSpec(name="own", target=f"{module}:{function}", options={}, normalization=normalization, **said)


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_sets.py").write_text(SETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_sets", raising=False)
    return tmp_path


def load(folder: Path, function: str, **over: Any) -> Any:
    return load_data(own_set(function, **over), [folder], False, folder)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("fewer_labels", r"training labels are of shape \[5\] for 6 images"),
        ("more_labels", r"test labels are of shape \[12\] for 6 images"),
        ("column_of_labels", r"training labels are of shape \[6, 1\]"),
        ("float_labels", "training labels are float32, not whole"),
        ("yes_or_no", "training labels are bool"),
        ("short_labels", "training labels are torch.int32, not torch.int64"),
        ("list_of_labels", "training labels are of type list"),
        ("from_one", "training labels are 1 to 3, of 3 classes"),
        ("ignored", "test labels are -1 to 1, of 3 classes"),
        ("from_one_by_hand", "training labels are 1 to 3, of 3 classes"),
        ("float_images", r"training images are float32, not uint8\n.*in \[0, 255\]"),
        ("share_images", r"test images are float32, not uint8\n.*\* 255"),
        ("long_images", "training images are int64, not uint8"),
        ("not_finite", "training images are float32, not uint8"),
        ("of_numpy", "training images are of type ndarray"),
        ("grey", r"training images are of shape \[6, 8, 8\].*\n.*unsqueeze"),
        ("channels_last", r"8 for 'channels', where the card says 3.*\n.*permute"),
        ("larger_test", "training images are 3×8×8, test images 3×16×16"),
        ("other_classes", "4 for 'classes', where the card says 3"),
        ("numbers_as_classes", "the class 0 is no text"),
        ("of_one_class", "has 1 class\n  give two"),
        ("no_test", "'own' has no test images"),
        ("no_training", "'own' has no training images"),
        (
            "no_training_of_one",
            "own_sets:no_training_of_one: .*test images of classes that have no training images: 'c'",
        ),
        ("fixed_fingerprint", "own_sets:fixed_fingerprint: .*its fingerprint 1 is not that of its images"),
        ("no_fingerprint", "its fingerprint None is not that of its images"),
        ("changed_afterwards", "is not that of its images"),
        ("nothing", r"own_sets:nothing: .*its function gives NoneType.*\n.*canonical"),
        ("a_tuple", "its function gives tuple"),
        ("raises", r"'own_sets:raises': KeyError: 'test' \(own_sets.py:56\)"),
        ("absent_file", r"absent.pt' \(own_sets.py:57\)"),
        ("leaves", r"'sys.exit\(no licence\)' \(own_sets.py:59\)"),
        ("leaves_quietly", r"'sys.exit\(\)'"),
        ("takes_nothing", r"keyword argument 'roots' \(own_sets.py:\d+\)\n.*called with roots, download, cache"),
    ],
)
def test_a_wrong_data_set_is_told_before_anything_trains_on_it(function: str, told: str, sets: Path) -> None:
    with pytest.raises(UserError) as error:
        load(sets, function)
    assert "'own'" in error.value.what
    error.match(told)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("pictures_without_labels", r"training labels are of shape \[2\] for 3 images"),
        ("pictures_from_one", "test labels are 1 to 3, of 3 classes"),
        ("pictures_of_another_order", "is not that of its images"),
    ],
)
def test_a_wrong_set_of_pictures_is_told(function: str, told: str, sets: Path) -> None:
    with pytest.raises(UserError, match=told):
        load(sets, function, streamed=True, train=3, test=3)


def test_a_data_set_as_it_should_be_is_taken(sets: Path) -> None:
    assert load(sets, "good").train_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert set(load(sets, "no_test_of_one").test_labels.tolist()) == {0, 1}, "nobody is asked for it"
    assert isinstance(load(sets, "good_pictures", streamed=True, train=3, test=3), Pictures)


@pytest.mark.parametrize("choice", [{"per_class": 5}, {"fraction": 0.05}, {"per_class": 5, "only_classes": [0, 9]}])
def test_images_that_a_class_does_not_have_are_not_counted(choice: dict[str, Any]) -> None:
    """The record would tell more training images and other epochs than there were."""
    recipe = {"data": "digits", "student": "wrn_10_1", "protocol": "digits", "method": "ce"}
    spec = plan(recipe, Registry()).cells[0].spec
    labels = torch.arange(90) % 9
    with pytest.raises(UserError, match="can be chosen; classes without training images: 9"):
        split(spec.data.model_copy(update=choice), labels, 0)
    train, _ = split(spec.data.model_copy(update={"fraction": 0.5}), labels, 0)
    assert len(train) == 45


def test_a_module_that_ends_the_program_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_leaving.py").write_text("import sys\n\nsys.exit()\n\n\ndef load(): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"'own_leaving:load' cannot be imported.*'sys.exit\(\)' \(own_leaving.py:3\)"):
        load_data(own_set("load", "own_leaving"), [], False, tmp_path)


# --- transforms, metrics, networks

CODE = """
import sys

import torch
from torch import nn
from torchvision.transforms.v2 import functional as F

from kdbench.engine.inputs import Source
from kdbench.engine.operations import Operation
from kdbench.schedules import Schedule

CALLS = {"metric": 0, "loss": 0}


def same(): return lambda image: image
def as_tensor(): return F.pil_to_tensor
def gives_nothing(): return lambda image: None
def fails(): return lambda image: image.nowhere
def leaves(): return lambda image: sys.exit()
def smaller(): return lambda image: image.resize((4, 4))
def other_mode(): return lambda image: image.convert("F")
def no_transform(): return None
def cannot_be_made(): raise OSError("no table of colours")


def distance(student, teacher): return (student - teacher.detach()).square().mean()
def of_labels(student, labels): return nn.functional.cross_entropy(student, labels)


def leaves_at_once(student, teacher): sys.exit()
def wrong_key(student, teacher): return {}["absent"]


def leaves_later(student, teacher):
    CALLS["loss"] += 1
    if CALLS["loss"] > 3:
        sys.exit()
    return distance(student, teacher)


def leaving_connector(student_shape, teacher_shape): sys.exit()
def broken_connector(student_shape, teacher_shape): return {}["absent"]
def no_connector(student_shape, teacher_shape): return None
def no_model(classes, channels, image_size): return [classes]
def leaving_schedule(): sys.exit()
def schedule_that_leaves(): return Schedule(lambda progress: sys.exit() if progress > 0.7 else 1.0)
def broken_optimizer(params): return {}["absent"]


class LeavingOptimizer(torch.optim.SGD):
    def step(self): sys.exit()


class LeavingSource(Source):
    by_step = None

    def __init__(self, context, leaves: str = ""):
        self.leaves = leaves
        self.leave("built")

    def leave(self, where):
        if self.leaves == where:
            sys.exit()

    def ready(self, now, tell, stopping):
        self.leave("made ready")
        return True

    def sets(self, now):
        self.leave("asked")
        return {"made": now.sets["data"]}


class LeavingOperation(Operation):
    def __init__(self, leaves: str = "carried out"):
        if leaves == "built":
            sys.exit()

    def perform(self, context): sys.exit()
    def state(self): return {}
    def load_state(self, state, context): ...


class BrokenConnector(nn.Module):
    def __init__(self, student_shape, teacher_shape):
        super().__init__()

    def forward(self, student):
        return {}["absent"]


class OfWrongSizes(nn.Module):
    def __init__(self, student_shape, teacher_shape):
        super().__init__()
        self.last = nn.Linear([3], 4)

    def forward(self, student, teacher):
        return distance(self.last(student), teacher)


class WithWeight(nn.Module):
    def __init__(self, student_shape, teacher_shape):
        super().__init__()
        self.last = nn.Linear(student_shape[0], teacher_shape[0])

    def forward(self, student, teacher):
        return distance(self.last(student), teacher)


def each_image(student, teacher): return (student - teacher).square().mean(1)
def number(student, teacher): return 1.0
def raising(student, teacher): return student.nowhere
def leaving(student, teacher): sys.exit(3)
def doubling(student, teacher): return student.mul_(2).mean()
def not_a_number(student, teacher): return student.mean() * float("nan")
def good(student, teacher): return (student - teacher).abs().mean()


def later(student, teacher):
    CALLS["metric"] += 1
    if CALLS["metric"] > 1:
        raise ValueError("enough")
    return student.mean()


def of_lists(students, teachers):
    return sum((own - taught).square().mean() for own, taught in zip(students, teachers))


def count(students, teachers):
    return torch.tensor(100.0 * len(students) + len(teachers)) + 0 * students[0].mean()


class Reference:
    def add(self, teacher): self.last = teacher.abs().mean()
    def value(self): return float(self.last)


class NoReference(Reference):
    def value(self): return "high"


class Net(nn.Module):
    def __init__(self, classes, channels, image_size, more: int = 0, flat: bool = True, leaves: str = ""):
        super().__init__()
        self.features = nn.Conv2d(channels, 4, 3)
        self.last, self.flat = nn.Linear(4, classes + more), flat

        if leaves == "built":
            sys.exit()
        self.leaves = leaves

    def forward(self, images):
        if self.leaves == "run":
            sys.exit(0)
        logits = self.last(self.features(images).relu().mean((2, 3)))
        return logits if self.flat else logits[:, :, None]
"""

NAMES = ["same", "as_tensor", "gives_nothing", "fails", "leaves", "smaller", "other_mode", "no_transform"]
MEASURED = ["each_image", "number", "raising", "leaving", "doubling", "not_a_number", "good", "later"]

OPTIMIZER = "broken_optimizer"
BOTH = ["student", "connectors"]
CONNECTORS = ["leaving_connector", "broken_connector", "no_connector", "BrokenConnector"]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry with the code above."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_code.py").write_text(CODE)
    losses: dict[str, Any] = {
        name: {"target": "own_code:distance", "metrics": {name: f"own_code:{name}", "good": "own_code:good"}}
        for name in MEASURED
    }
    losses["no_reference"] = losses["good"] | {"references": {"good": "own_code:NoReference"}}
    losses["no_teacher"] = losses["good"] | {"target": "own_code:of_labels"}
    losses["of_lists"] = {
        "target": "own_code:of_lists",
        "metrics": {"apart": "own_code:of_lists", "n": "own_code:count"},
    }
    losses["good"] |= {"references": {"good": "own_code:Reference"}}
    losses |= {
        name: {"target": f"own_code:{name}"}
        for name in ("leaves_at_once", "leaves_later", "wrong_key", "WithWeight", "OfWrongSizes")
    }
    method: dict[str, Any] = {"title": "Own", "stages": [{"name": "training", "losses": {"own": {"loss": "good"}}}]}
    cards = {
        "transforms": {name: {"target": f"own_code:{name}"} for name in [*NAMES, "cannot_be_made"]},
        "losses": losses,
        "connectors": {name: {"target": f"own_code:{name}"} for name in CONNECTORS},
        "schedules": {name: {"target": f"own_code:{name}"} for name in ("leaving_schedule", "schedule_that_leaves")},
        "sources": {"leaving": {"target": "own_code:LeavingSource", "reads": ["data"], "gives": ["made"]}},
        "operations": {"leaving": {"target": "own_code:LeavingOperation"}},
        "methods": {
            "own": method,
            "answers": method | {"predicts": {"name": "BrokenConnector", "student": "pooled"}},
            "optimizer": {
                "title": "Own",
                "stages": [method["stages"][0] | {"optimizer": {"name": "broken_optimizer"}}],
            },
        },
        "optimizers": {name: {"target": f"own_code:{name}"} for name in (OPTIMIZER, "LeavingOptimizer")},
        "models": {
            "own": {"target": "own_code:Net", "hooks": "own"},
            "no": {"target": "own_code:no_model", "hooks": "own"},
        },
        "hooks": {"own": {"points": {"layer1": "features", "pooled": "input(last)"}}},
    }
    (folder / "cards.yaml").write_text(yaml.safe_dump(cards))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.path", [*sys.path])
        yield Registry([folder])


def cell(registry: Registry, loss: str = "good", transforms: list[str] | None = None, **more: Any) -> CellSpec:
    recipe = {"data": "digits", "teacher": "wrn_16_2_digits", "student": "own", "protocol": {"name": "digits"}}
    method = {"name": "own", "stages": {"training": {"losses": {"own": {"loss": loss}}}}}
    if transforms:
        recipe["protocol"] |= {"augmentation": {"transforms": transforms}}  # type: ignore[operator]
    (planned,) = plan(recipe | {"method": method} | more, registry).cells
    return shortened(planned.spec, 4)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("as_tensor", "'as_tensor' gives Tensor, not a Pillow picture"),
        ("gives_nothing", "'gives_nothing' gives NoneType, not a Pillow picture"),
        ("fails", r"'fails' fails on a picture of mode L: AttributeError: .*nowhere.* \(own_code.py:\d+\)"),
        ("leaves", r"'leaves' fails .*'sys.exit\(\)' \(own_code.py:\d+\)"),
        ("smaller", r"'smaller' makes \(4, 4\) pixels"),
        ("other_mode", "'other_mode' makes .* of mode F"),
        ("no_transform", "'own_code:no_transform' gives NoneType"),
        ("cannot_be_made", r"'cannot_be_made' cannot be made .*OSError: no table of colours \(own_code.py:\d+\)"),
    ],
)
def test_a_wrong_transform_is_told_before_training(name: str, told: str, own: Registry) -> None:
    check_cell(cell(own, transforms=["same"]))
    with pytest.raises(UserError, match=told):
        check_cell(cell(own, transforms=["same", name]))


def test_a_transform_that_fails_in_a_thread_is_told_like_any_other(own: Registry) -> None:
    torch.set_num_threads(2)
    member, batches, _ = member_of(cell(own, transforms=["fails"]))
    batches.seek(0, member.timeline)
    with pytest.raises(UserError, match="the transform 'fails' fails"):
        batches.feed(["data"])


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        ("each_image", r"'each_image' .* at logits: TypeError: it gives shape \[8\], .* \(own_code.py:\d+\)"),
        ("number", "it gives float, no scalar tensor"),
        ("raising", r"AttributeError: .*nowhere.* \(own_code.py:\d+\)"),
        ("leaving", r"'sys.exit\(3\)' \(own_code.py:\d+\)"),
        ("doubling", "a metric .*changes what it is given"),
        ("no_reference", "'good_reference' .*ValueError"),
        ("no_teacher", "the metric 'good' .*cannot be measured\n.*a value of the student and one of the teacher"),
    ],
)
def test_a_wrong_metric_is_told_before_training(loss: str, told: str, own: Registry) -> None:
    check_cell(cell(own))
    with pytest.raises(UserError, match=told):
        check_cell(cell(own, loss))


@pytest.mark.parametrize(("loss", "why"), [("not_a_number", "not finite"), ("later", "ValueError: enough")])
def test_a_metric_that_fails_later_costs_its_value_and_not_the_cell(loss: str, why: str, own: Registry) -> None:
    spec = cell(own, loss)
    sys.modules.pop("own_code", None)
    check_cell(spec)
    member, batches, teacher = member_of(spec)
    train(member, batches, teacher, 1)
    found = evaluate(member)
    assert found["metrics"][loss] == {"logits": None} and found["metrics"]["good"]["logits"] > 0
    assert why in found["unmeasured"][loss]["logits"] and "good" not in found["unmeasured"]
    member, batches, teacher = member_of(cell(own))
    found = evaluate(member)
    assert found["references"]["good"]["logits"] > 0 and "unmeasured" not in found


def test_a_metric_of_a_loss_of_several_hook_points_gets_lists_too(own: Registry) -> None:
    term = {"loss": "of_lists", "hook": ["logits", "pooled"], "connector": "conv1x1_bn"}
    spec = cell(own, method={"name": "own", "stages": {"training": {"trains": BOTH, "losses": {"own": term}}}})
    check_cell(spec)
    member, batches, teacher = member_of(spec)
    train(member, batches, teacher, 1)
    found = evaluate(member)
    assert found["metrics"]["n"] == {"logits+pooled": 202.0} and "unmeasured" not in found
    (loss,) = member.modules.terms_of("training").values()
    assert teacher is not None
    total, points = 0.0, ["logits", "pooled"]
    with torch.no_grad():
        for images, labels in batches.test.every(1).slices():
            own_values = member.student(member.student.normalizer(images), points)
            taught = teacher.network(teacher.network.normalizer(images), points)
            for point, connector in zip(points, loss.eval().layers[0].connectors, strict=True):
                total += len(labels) * (connector(own_values[point]) - taught[point]).square().mean().item()
    assert found["metrics"]["apart"] == {"logits+pooled": pytest.approx(total / len(batches.test), rel=1e-5)}


@pytest.mark.parametrize(("options", "told"), [({"more": 2}, "gives 12 logits"), ({"more": -1}, "gives 9 logits")])
def test_a_network_of_other_logits_than_classes_is_told(options: dict[str, Any], told: str, own: Registry) -> None:
    with pytest.raises(UserError, match=f"model 'own' {told}.* 10 classes") as error:
        check_cell(cell(own, student={"name": "own", **options}, method="ce", teacher=None))
    assert error.value.where == "own_code:Net"


def test_logits_of_another_form_are_told(own: Registry) -> None:
    with pytest.raises(UserError, match=r"gives logits of shape \[10, 1\] for an image"):
        check_cell(cell(own, student={"name": "own", "flat": False}, method="ce", teacher=None))


# --- divergence


@pytest.mark.parametrize("ruined", ["weights", "loss"])
def test_what_the_last_step_ruins_is_a_failed_cell_and_no_result(ruined: str, tmp_path: Path) -> None:
    weight = {"stages": {"classification": {"losses": {"ce": {"weight": 1e39}}}}} if ruined == "loss" else {}
    protocol = {"name": "digits", "optimizer": {"lr": 1e38}}
    recipe = {"data": "digits", "student": "wrn_10_1", "protocol": protocol, "method": {"name": "ce", **weight}}
    cohort = cohort_of([shortened(plan(recipe, Registry()).cells[0].spec, 1)], tmp_path)
    finished: list[Any] = []
    TrainingLoop(Program([cohort]), lambda cell: None, finished.append, lambda: False).run()
    (cell,) = cohort.cells
    term = "test/loss; try a smaller" if ruined == "weights" else "the weighted sum; look at the loss itself"
    assert cell.failure is not None and not finished and not cell.member.log.history
    assert cell.failure.startswith(f"the loss was not finite at step 0, stage 'classification', term {term}")
    assert (tmp_path / "0" / "metrics.jsonl").read_text() == ""


# --- code that ends the program

LEAVES = r"it ends the program by 'sys.exit\(0?\)' \(own_code.py:\d+\)"


def stage(**loss: Any) -> dict[str, Any]:
    return {"name": "own", "stages": {"training": {"losses": {"own": loss}}}}


@pytest.mark.parametrize(
    ("over", "told"),
    [
        ({"student": {"name": "own", "leaves": "built"}}, f"model 'own' cannot be built .*{LEAVES}"),
        ({"student": {"name": "own", "leaves": "run"}}, f"model 'own' .*{LEAVES}"),
        ({"method": stage(loss="leaves_at_once")}, f"loss 'own' .*{LEAVES}"),
        ({"method": stage(loss="good", connector="leaving_connector")}, f"connector 'leaving_connector' .*{LEAVES}"),
        ({"method": stage(loss="good", connector="broken_connector")}, r"KeyError: 'absent' \(own_code.py:\d+\)"),
        (
            {"method": stage(loss="good", connector="no_connector")},
            "connector 'no_connector' .* is a NoneType, not a torch",
        ),
        ({"method": stage(loss="OfWrongSizes")}, r"loss 'OfWrongSizes': TypeError: .*\(own_code.py:\d+\)"),
        ({"method": stage(loss="WithWeight", connector="BrokenConnector")}, r"its connector: KeyError: 'absent' \(own"),
        ({"method": "answers"}, r"cannot answer through 'predicts': KeyError: 'absent' \(own"),
        ({"method": "optimizer"}, r"optimizer 'broken_optimizer': KeyError: 'absent' \(own"),
        ({"student": "no"}, "model 'no' cannot be built .* is a list, not a torch.nn.Module"),
        ({"method": stage(loss="good", weight_schedule="leaving_schedule")}, f"schedule 'leaving_schedule' .*{LEAVES}"),
        (
            {"method": stage(loss="good", weight_schedule="schedule_that_leaves")},
            f"schedule 'schedule_that_leaves' of the weight of 'own' fails at step 3 of 4: {LEAVES}",
        ),
        (
            {"protocol": {"name": "digits", "optimizer": {"name": "LeavingOptimizer"}}},
            f"optimizer 'LeavingOptimizer' fails in its first step: {LEAVES}",
        ),
    ],
)
def test_code_that_fails_is_an_error_before_training(over: dict[str, Any], told: str, own: Registry) -> None:
    """That of a method says of which, for a recipe may have many, if it has no place in the recipe."""
    with pytest.raises(UserError, match=told) as error:
        check_cell(cell(own, **over))
    assert error.value.where or "student" in over or re.match(r"method '\w+'[,:]", error.value.what)


def with_source(leaves: str) -> dict[str, Any]:
    own = {"source": {"name": "leaving", "leaves": leaves}, "losses": {"made": {"loss": "kd", "input": "made"}}}
    return {"name": "own", "stages": {"training": own}}


def test_a_source_that_cannot_be_built_says_in_which_method(own: Registry) -> None:
    with pytest.raises(UserError, match=f"^method 'own', stage 'training': source 'leaving' .*{LEAVES}"):
        costs_of(cell(own, method=with_source("built")))


def beginning(leaves: str) -> dict[str, Any]:
    return {"name": "own", "stages": {"training": {"begins": {"name": "leaving", "leaves": leaves}}}}


@pytest.mark.parametrize(
    "method",
    [
        stage(loss="leaves_later"),
        *map(with_source, ["built", "made ready", "asked"]),
        *map(beginning, ["built", "carried out"]),
    ],
    ids=["loss", "source built", "source made ready", "source asked", "operation built", "operation carried out"],
)
def test_code_of_the_steps_that_ends_the_program_fails_its_cell_alone(
    method: dict[str, Any], own: Registry, tmp_path: Path
) -> None:
    sys.modules.pop("own_code", None)
    leaving, good = cell(own, method=method), cell(own)
    check_cell(good)
    try:
        cohort = cohort_of([leaving, good], tmp_path)
    except UserError as error:
        assert re.search(LEAVES, error.what)
        return
    finished: list[Any] = []
    TrainingLoop(Program([cohort]), lambda cell: None, finished.append, lambda: False).run()
    failed, other = cohort.cells
    assert re.search(LEAVES, failed.failure or "") and other.failure is None and finished == [other]


@pytest.mark.parametrize("loss", ["leaves_at_once", "wrong_key"])
def test_a_loss_that_fails_while_ways_are_tried_is_told(loss: str, own: Registry) -> None:
    spec = cell(own, method=stage(loss=loss))
    tried = _measure(REFERENCE, [spec], batches_for(spec), lambda way: untrained_teacher(spec), CPU, SourceFiles())
    assert isinstance(tried.error, UserError)
    said = r"method 'own', stage 'training' cannot .*(sys.exit\(\)'|KeyError: 'absent') \(own_code.py:\d+\)"
    assert re.search(said, tried.error.what)


@pytest.mark.parametrize("end", [SystemExit(), SystemExit(0), KeyboardInterrupt()])
def test_a_worker_tells_what_ended_its_task(end: BaseException) -> None:
    def work() -> None:
        raise end

    told = Worker(io.StringIO(), io.StringIO()).outcome(work)
    assert isinstance(told, Failed) and isinstance(told.error, UserError)
    assert "test_own_data.py" in told.message


@pytest.mark.parametrize("code", [None, 0, 3, "no licence"])
def test_a_command_whose_cards_end_the_program_says_so(
    code: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "app", lambda *_, **__: sys.exit(code))
    monkeypatch.setattr(sys, "argv", ["kdbench"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert re.match(r"error: .*test_own_data.py:\d+: your own code failed: it ends the program by 'sys.exit", said)
