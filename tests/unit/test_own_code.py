"""Code of the user's own that does what it must not: it is told, and changes no number of anything else."""

from __future__ import annotations

import hashlib
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from captured import cohort_of, trained
from conftest import ROOT
from shipped import DIGITS
from tiny import member_of, shortened, train

from kdbench.engine.checks.cells import Known, check_cell
from kdbench.engine.computing.compute import REFERENCE
from kdbench.engine.finish import git_state
from kdbench.engine.program import Program
from kdbench.engine.workers import messages
from kdbench.engine.workers.tasks import TaskRunner
from kdbench.engine.workers.versions import versions
from kdbench.errors import CellError, SharedChange, UserError
from kdbench.own_code import _packages_with_cards, own_code_sha256
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec
from kdbench.registry import Registry

NETS = '''
import torch
from torch import nn


class Frozen(nn.Module):
    """A network whose first layer its author froze."""

    def __init__(self, classes: int, channels: int, image_size: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, classes)
        self.stem.requires_grad_(False)

    def forward(self, images):
        return self.head(self.stem(images))


class Drawn(Frozen):
    """Has a scale that is drawn when it is built, and that its state dict lacks."""

    def __init__(self, classes: int, channels: int, image_size: int) -> None:
        super().__init__(classes, channels, image_size)
        self.scale = torch.rand(4)

    def forward(self, images):
        return self.head(self.scale * self.stem(images))


class Kept(Drawn):
    """The same with a buffer."""

    def __init__(self, classes: int, channels: int, image_size: int) -> None:
        super().__init__(classes, channels, image_size)
        scale = self.scale
        del self.scale
        self.register_buffer("scale", scale)
'''


NETS += '''

class Twice(Kept):
    """One module stands in two places."""

    def __init__(self, classes: int, channels: int, image_size: int) -> None:
        super().__init__(classes, channels, image_size)
        self.first = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.second = self.first

    def forward(self, images):
        return super().forward(self.second(self.first(images)))


class Lazy(Frozen):
    def __init__(self, classes: int, channels: int, image_size: int) -> None:
        super().__init__(classes, channels, image_size)
        self.head = nn.LazyLinear(classes)


class Moved(Frozen):
    def __init__(self, classes: int, channels: int, image_size: int) -> None:
        super().__init__(classes, channels, image_size)
        self.to("meta")


class Mixes(Frozen):
    """As where a GPU is."""

    def forward(self, images):
        raise RuntimeError("Expected all tensors to be on the same device, but found cuda:0 and cpu!")


class Raises(nn.Module):
    def __init__(self, classes: int, channels: int, image_size: int) -> None:
        raise KeyError("mine")


class RaisesLater(Frozen):
    def forward(self, images):
        raise KeyError("mine")


class Nothing(Frozen):
    def forward(self, images):
        pass


class Complex(Frozen):
    def forward(self, images):
        return super().forward(images) * 1j


class NoModule:
    def __init__(self, classes: int, channels: int, image_size: int) -> None:
        pass


class Ungraded(Frozen):
    @torch.no_grad()
    def forward(self, images):
        return super().forward(images)


class GradedInTraining(Frozen):
    """Spares the graph where it is not trained."""

    def forward(self, images):
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return super().forward(images)


class Softmaxed(Frozen):
    def forward(self, images):
        return super().forward(images).softmax(1)


class KeepsMaps(nn.Module):
    """Remembers what it computed, as for class activation maps."""

    def __init__(self, classes: int, channels: int, image_size: int) -> None:
        super().__init__()
        self.conv, self.relu, self.head = nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Linear(4, classes)

    def forward(self, images):
        self.maps = self.relu(self.conv(images))
        return self.head(self.maps.mean((2, 3)))


class KeepsProbabilities(KeepsMaps):
    def forward(self, images):
        return super().forward(images).softmax(1)


class Halved(KeepsMaps):
    def __init__(self, classes: int, channels: int, image_size: int) -> None:
        super().__init__(classes, channels, image_size)
        self.bfloat16()


class Bounded(nn.Linear):
    """Its bound is a tensor that moves, which no gradient goes back through."""

    def forward(self, values):
        low = torch.full((), -9.0)
        values = super().forward(values).clamp(min=low)
        low += 1
        return values


class KeepsBounded(KeepsMaps):
    def __init__(self, classes: int, channels: int, image_size: int) -> None:
        super().__init__(classes, channels, image_size)
        self.head = Bounded(4, classes)


class Block(nn.Conv2d):
    """Ends in a ReLU that is no module."""

    def forward(self, images):
        return super().forward(images).relu()


class Clamped(nn.Conv2d):
    def forward(self, images):
        return super().forward(images).clamp(0, 6)


class Activated(nn.Module):
    """Layers that end in all kinds of ReLU."""

    def __init__(self, classes: int, channels: int, image_size: int) -> None:
        super().__init__()
        self.block, self.clamped = Block(channels, 4, 3, padding=1), Clamped(4, 4, 3, padding=1)
        self.conv, self.relu6 = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU6(inplace=True)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.signed, self.head = nn.Hardtanh(), nn.Linear(4, classes)

    def forward(self, images):
        maps = self.relu6(self.conv(self.clamped(self.block(images))))
        # As in residual networks whose last norm begins with zeros: no negative value yet.
        maps = self.relu(maps + 0 * self.norm(maps))
        return self.head(self.signed(maps).mean((2, 3)))


class OtherNames(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
'''

LOSSES = """
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def nothing(student: Tensor, teacher: Tensor):
    pass


def number(student: Tensor, teacher: Tensor):
    return F.mse_loss(student, teacher).item()


def listed(student: Tensor, teacher: Tensor):
    return [F.mse_loss(student, teacher)]


def vector(student: Tensor, teacher: Tensor):
    return (student - teacher).square().mean(1)


def complex_number(student: Tensor, teacher: Tensor):
    return student.sum() * 1j


def whole_number(student: Tensor, teacher: Tensor):
    return student.argmax()


def not_a_number(student: Tensor, teacher: Tensor):
    return (student - teacher).mean() * float("nan")


def misspelt(student: Tensor, teacher: Tensor):
    return no_such_name


def absent(student: Tensor, teacher: Tensor):
    return student.no_such_thing(teacher)


def unlike(student: Tensor, teacher: Tensor):
    return F.mse_loss(student[:, :5], teacher)


class NoShapes(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor):
        return F.mse_loss(student, teacher)


class Raises(NoShapes):
    def __init__(self, student_shape, teacher_shape):
        raise KeyError("mine")


class Lazy(NoShapes):
    def __init__(self, student_shape, teacher_shape):
        super().__init__()
        self.layer = nn.LazyLinear(10)


def weighted(student: Tensor, teacher: Tensor, weight: float = 1.0):
    return weight * F.mse_loss(student, teacher)


def tempered(student: Tensor, teacher: Tensor, student_temp: float):
    return F.mse_loss(student / student_temp, teacher)
"""

IN_PLACE = """
from kdbench.engine.data.batch import Batch
from kdbench.engine.inputs import Source
from torch import Tensor
from torch.nn import functional as F

calls = 0


class Darker(Source):
    by_step = None

    def __init__(self, context):
        pass

    def sets(self, now):
        data = now.sets["data"]
        data.images.mul_(0.5) if data.images.is_floating_point() else data.images.floor_divide_(2)
        return {"darker": data}


def third_time(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    global calls
    calls += 1
    return F.mse_loss(student, teacher.mul_(2) if calls > 3 else teacher)


def labels_at_last(student: Tensor, labels: Tensor, progress: Tensor) -> Tensor:
    if progress > 0.5:
        labels.zero_()
    return F.cross_entropy(student, labels)
"""
SOURCE = {"sources": {"darker": {"target": "in_place:Darker", "reads": ["data"], "gives": ["darker"]}}}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A registry folder of its own, forgotten by Python afterwards."""
    before = [*sys.path], {*sys.modules}
    yield tmp_path
    sys.path[:] = before[0]
    for name in {*sys.modules} - before[1]:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


def registry(folder: Path, cards: dict[str, Any], **modules: str) -> Registry:
    """Cards and modules of the user's own."""
    folder.mkdir(exist_ok=True)
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "own.yaml").write_text(yaml.safe_dump(cards))
    return Registry([folder])


def spec_of(cards: Registry, steps: int = 4, **recipe: Any) -> CellSpec:
    (planned,) = plan(DIGITS | {"method": "kd"} | recipe, cards).cells
    return shortened(planned.spec, steps)


def network(name: str) -> dict[str, Any]:
    return {"models": {"own": {"target": f"own_nets:{name}", "hooks": "derived"}}}


def hooked(name: str, points: dict[str, str]) -> dict[str, Any]:
    """Cards of a network, with hook points of its own."""
    return {"models": {"own": {"target": f"own_nets:{name}", "hooks": "own"}}, "hooks": {"own": {"points": points}}}


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.named_parameters()}


@pytest.mark.parametrize("name", ["Frozen", "GradedInTraining"])
def test_what_a_network_s_author_froze_is_not_trained(folder: Path, name: str) -> None:
    cards = registry(folder, network(name), own_nets=NETS)
    spec = spec_of(cards, student="own")
    check_cell(spec)
    member, batches, teacher = member_of(spec)
    before = weights(member.student.model)
    train(member, batches, teacher, 3)
    changed = {name for name, value in weights(member.student.model).items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_nor_in_a_teacher_that_is_trained_along(folder: Path) -> None:
    cards = registry(folder, network("Frozen"), own_nets=NETS)
    teacher = {"model": "own", "untrained": True}
    member, batches, shared = member_of(spec_of(cards, teacher=teacher, method="dml"))
    assert member.modules.own_teacher is not None
    before = weights(member.modules.own_teacher.model)
    train(member, batches, shared, 3)
    after = weights(member.modules.own_teacher.model)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"head.weight", "head.bias"}


def test_weights_that_do_not_say_all_of_a_network_are_refused(folder: Path) -> None:
    cards = registry(folder, network("Drawn"), own_nets=NETS)
    with pytest.raises(UserError, match="state dict lacks"):
        check_cell(spec_of(cards, student="own"))
    (folder / "own.yaml").write_text(yaml.safe_dump(network("Kept")))
    check_cell(spec_of(Registry([folder]), student="own"))


@pytest.mark.parametrize(
    ("stage", "what"),
    [
        ({"source": "darker", "losses": {"ce": {"loss": "cross_entropy", "input": "darker"}}}, "'images' of input set"),
        ({"losses": {"own": {"loss": "in_place:third_time"}}}, "'logits' of the teacher"),
        ({"losses": {"own": {"loss": "in_place:labels_at_last"}}}, "'labels' of input set 'data'"),
    ],
)
def test_a_step_that_changes_what_others_read_ends_the_run(folder: Path, stage: dict[str, Any], what: str) -> None:
    method = {"title": "own", "stages": [{"name": "training", **stage}]}
    cards = registry(folder / "cards", SOURCE | {"methods": {"own": method}}, in_place=IN_PLACE)
    specs = [spec_of(cards, method=name) for name in ("own", "kd")]
    check_cell(specs[0])
    program = Program([cohort_of(specs, folder)])
    with pytest.raises(SharedChange, match=f"method 'own', stage 'training'.*{what}"):
        trained(program)
    assert not any((cell.folder / "record.json").exists() for cell in program.cells)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Lazy", r"lazy layers.*\n.*nn.Linear"),
        ("Raises", r"cannot be built for digits.*KeyError: 'mine' \(own_nets.py:\d+\)"),
        ("Moved", r"it lies on the device 'meta'\n.*no \.cuda\(\)"),
        ("Mixes", r"same device.*\n.*'device=x.device'"),
        ("RaisesLater", r"KeyError: 'mine' \(own_nets.py:\d+\)"),
        ("Nothing", "returns nothing, not logits"),
        ("Complex", "returns a tensor of torch.complex64, not logits"),
        ("NoModule", "is a NoModule, not a torch.nn.Module"),
        ("Softmaxed", "returns probabilities, not logits: a Softmax's\n"),
        ("Ungraded", r"cannot be trained: no gradient.*\n.*torch.no_grad\(\)"),
        ("OtherNames", r"argument 'classes' \(own_nets.py:\d+\)\n.*takes 'classes', 'channels' and 'image_size'"),
    ],
)
def test_a_network_that_cannot_be_used_is_told(folder: Path, name: str, said: str) -> None:
    cards = registry(folder, network(name), own_nets=NETS)
    with pytest.raises(UserError) as told:
        check_cell(spec_of(cards, student="own"))
    assert re.search(said, str(told.value))


def test_a_teacher_needs_no_gradient(folder: Path) -> None:
    cards = registry(folder, network("Ungraded"), own_nets=NETS)
    file = folder / "weights.pt"
    torch.save(importlib.import_module("own_nets").Ungraded(10, 1, 8).state_dict(), file)
    check_cell(spec_of(cards, teacher={"model": "own", "weights": str(file)}))
    with pytest.raises(UserError, match="cannot be trained"):
        check_cell(spec_of(cards, teacher={"model": "own", "untrained": True}, method="dml"))


def activated(folder: Path, place: str) -> Registry:
    """Cards of a network of many kinds of ReLU, with a place for its pre-activation."""
    return registry(folder, hooked("Activated", {"layer1": "relu", "layer1.preact": place}), own_nets=NETS)


@pytest.mark.parametrize("place", ["block", "clamped", "relu6", "relu", "input(norm)", "input(signed)"])
def test_what_a_relu_gave_is_no_pre_activation(folder: Path, place: str) -> None:
    """Else AB would learn boundaries that are not there, without a word."""
    with pytest.raises(UserError) as told:
        check_cell(spec_of(activated(folder, place), student="own"))
    said = rf"'layer1.preact' \({re.escape(place)}\) of model 'own' is what a ReLU gives.*\n.*'input\(PATH\)'"
    assert re.search(said, str(told.value))


@pytest.mark.parametrize("place", ["conv", "input(relu6)", "input(relu)", "signed"])
def test_what_no_relu_gave_is_a_pre_activation(folder: Path, place: str) -> None:
    check_cell(spec_of(activated(folder, place), student="own"))


def test_a_frozen_teacher_may_do_what_no_gradient_goes_back_through(folder: Path) -> None:
    """The look at its graph ended with torch's own error."""
    cards = registry(folder, hooked("KeepsBounded", {"layer1": "relu", "layer1.preact": "head"}), own_nets=NETS)
    file = folder / "weights.pt"
    torch.save(importlib.import_module("own_nets").KeepsBounded(10, 1, 8).state_dict(), file)
    check_cell(spec_of(cards, teacher={"model": "own", "weights": str(file)}))


def test_probabilities_that_nobody_reads(folder: Path) -> None:
    """SimKD's student answers through its teacher's head."""
    cards = registry(folder, hooked("KeepsProbabilities", {"layer1": "relu"}), own_nets=NETS)
    known: Known = {}
    check_cell(spec_of(cards, student="own", method="simkd"), known)
    with pytest.raises(UserError, match="returns probabilities"):
        check_cell(spec_of(cards, student="own"), known)


@pytest.mark.parametrize("name", ["KeepsMaps", "Halved"])
def test_batches_of_one_image(folder: Path, name: str) -> None:
    """Maps with gradients, which a network keeps of its last forward, cannot be copied; and not each takes float32."""
    spec = spec_of(registry(folder, hooked(name, {"layer1": "relu"}), own_nets=NETS), student="own")
    check_cell(spec.model_copy(update={"protocol": spec.protocol.model_copy(update={"batch_size": 1})}))


def test_one_module_may_stand_in_two_places(folder: Path) -> None:
    """A look at its shapes leaves its values and its statistics as they are."""
    cards = registry(folder, network("Twice"), own_nets=NETS)
    spec = spec_of(cards, student="own")
    check_cell(spec)
    member, batches, teacher = member_of(spec)
    state = member.student.model.state_dict()
    assert state["first.1.num_batches_tracked"] == 0 and state["first.1.running_mean"].eq(0).all()
    train(member, batches, teacher, 2)
    assert member.student.model.state_dict()["second.1.num_batches_tracked"] == 4


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "returned nothing"),
        ("number", "returned a float\n  a loss returns one float in a tensor, with its gradient"),
        ("listed", "returned a list"),
        ("vector", r"returned torch.float32 \[8\]"),
        ("complex_number", r"returned torch.complex64 \[\]"),
        ("whole_number", r"returned torch.int64 \[\]"),
        ("not_a_number", "gave nan"),
        ("misspelt", "cannot be computed: NameError"),
        ("absent", r"(?s)^method 'own', stage 'training': .*AttributeError.* \(10,\); teacher: logits \(10,\)$"),
        ("unlike", r"^method 'own', stage 'training': .*\n.*; a connector can change channels and sizes"),
        ("NoShapes", r"NoShapes.__init__\(\) takes .* \(own_losses.py:\d+\)\n.*\(self, student_shape, teacher_shape\)"),
        ("Raises", r"KeyError: 'mine' \(own_losses.py:\d+\)"),
        ("Lazy", r"lazy layers.*\n.*nn.Linear"),
        ("weighted", "has a parameter 'weight', which nobody can set"),
        ("tempered", "needs 'student_temp'"),
    ],
)
def test_a_loss_that_cannot_be_used_is_told(folder: Path, name: str, said: str) -> None:
    losses = {"own": {"loss": f"own_losses:{name}"}}
    method = {"title": "own", "stages": [{"name": "training", "trains": ["student", "connectors"], "losses": losses}]}
    cards = registry(folder, {"methods": {"own": method}}, own_losses=LOSSES)
    with pytest.raises(UserError) as told:
        check_cell(spec_of(cards, method="own"))
    assert re.search(said, str(told.value))


def test_what_own_code_raises_anywhere_in_a_task_is_told_with_its_place(folder: Path) -> None:
    """Of what a batch source says that it costs, which nothing else looks at."""
    source = (
        "from kdbench.engine.inputs import Source\n\n\nclass Own(Source):\n"
        "    def __init__(self, context):\n        pass\n\n"
        "    def sets(self, now):\n        pass\n\n    def cost(self, steps):\n        raise KeyError('mine')\n"
    )
    stage = {"name": "training", "source": "own", "losses": {"ce": {"loss": "cross_entropy", "input": "made"}}}
    cards = registry(
        folder,
        {
            "sources": {"own": {"target": "own_source:Own", "reads": ["data"], "gives": ["made"]}},
            "methods": {"own": {"title": "own", "stages": [stage]}},
        },
        own_source=source,
    )
    task = messages.CheckCells(
        specs=[spec_of(cards, method="own")], threads=1, device="cpu", settings=messages.Settings()
    )
    with pytest.raises(UserError) as told:
        TaskRunner(lambda event: None, lambda: False).run(task)
    assert str(told.value) == (
        f"{folder / 'own_source.py'}:12: your own code failed: KeyError: 'mine'\n  in cost: raise KeyError('mine')"
    )


def test_a_module_of_two_registries_is_refused(folder: Path) -> None:
    """Python would run the first one's code for both."""
    first, second = folder / "first", folder / "second"
    registry(first, network("Kept"), own_nets=NETS)
    cards = network("Kept")["models"]["own"]
    again = registry(second, {"models": {"other": cards}}, own_nets=NETS)
    assert again.card("models", "other")
    (second / "own_nets.py").write_text(NETS + "\n")
    with pytest.raises(UserError, match=f"{second / 'own_nets.py'} would not be used, for Python takes {first}"):
        Registry([second]).card("models", "other")


def test_code_that_was_written_again_is_read_again(folder: Path) -> None:
    """As in a notebook: a student of other code is another student."""
    before = spec_of(registry(folder, network("Kept"), own_nets=NETS), student="own")
    (folder / "own_nets.py").write_text(NETS.replace("channels, 4, 3", "channels, 4, 3, 2"))
    after = spec_of(Registry([folder]), student="own")
    assert before.student.source_sha256 != after.student.source_sha256


def test_files_that_own_code_imports_count_with_it(folder: Path) -> None:
    """Also by way of packages and of other files; what it does not import, and an empty file, changes nothing."""

    def hashed() -> Any:
        return spec_of(Registry([folder]), student="own").student.source_sha256

    (folder / "parts" / "deep").mkdir(parents=True)
    (folder / "loose").mkdir()
    (folder / "kdbench").symlink_to(ROOT / "kdbench")
    for name, text in {
        "own_tools": "import parts.deep.inner\nimport random, loose.one, kdbench.losses.kd\n",
        "random": "WIDTH = 1\n",
        "loose/one": "WIDTH = 2\n",
        "parts/__init__": "",
        "parts/deep/__init__": "from .. import outer\n",
        "parts/deep": "WIDTH = 3\n",
        "parts/deep/inner": "from . import inmost\n",
        "parts/deep/inmost": "WIDTH = 4\n",
        "parts/outer": "from own_tools import *\nfrom .absent import nothing\n",
        "parts/beside": "WIDTH = 5\n",
    }.items():
        (folder / f"{name}.py").write_text(text)
    alone = spec_of(registry(folder, network("Kept"), own_nets=NETS), student="own").student.source_sha256
    assert alone == hashlib.sha256((folder / "own_nets.py").read_bytes()).hexdigest()
    registry(folder, network("Kept"), own_nets="def later():\n    from own_tools import WIDTH\n\n" + NETS)
    seen = [alone, hashed()]
    counting = ["own_tools", "loose/one", "parts/outer", "parts/deep/__init__", "parts/deep/inmost", "parts/__init__"]
    for name in counting:
        file = folder / f"{name}.py"
        file.write_text(file.read_text() + "# more\n")
        seen.append(hashed())
    for name in ("random", "parts/beside", "parts/deep"):
        (folder / f"{name}.py").write_text("WIDTH = 6\n")
    assert hashed() == seen[-1]
    # Two that change places.
    one, other = (folder / "loose" / "one.py", folder / "parts" / "deep" / "inmost.py")
    text = one.read_text()
    one.write_text(other.read_text())
    other.write_text(text)
    assert len({*seen, hashed()}) == len(counting) + 3


def test_an_installed_package_with_cards_counts_as_it_does_in_its_authors_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    (tmp_path / "other.py").write_text("WIDTH = 3\n")
    for place in ("source", "site-packages", "linked/site-packages"):
        package = tmp_path / place / "shared_cards"
        if place.startswith("linked"):
            # As uv can install: each file is a link into its cache.
            (tmp_path / "cache").mkdir()
            package.parent.mkdir(parents=True)
            package.symlink_to(tmp_path / "cache")
        else:
            package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "losses.py").write_text("import beside_it\nfrom .tools import WIDTH\n")
        (package / "tools.py").write_text("WIDTH = 1\n")
        about = tmp_path / place / "shared_cards-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: shared-cards\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text("[kdbench.registry]\nshared = shared_cards\n")
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(tmp_path / place))
            _packages_with_cards.cache_clear()
            found.append(own_code_sha256("shared_cards.losses:loss"))
            (package / "tools.py").write_text("WIDTH = 2\n")
            assert own_code_sha256("shared_cards.losses:loss") != found[-1]
            if place.endswith("site-packages"):
                # Whatever else is installed beside it is not followed.
                (tmp_path / place / "beside_it.py").symlink_to(tmp_path / "other.py")
                (package / "tools.py").write_text("WIDTH = 1\n")
                assert own_code_sha256("shared_cards.losses:loss") == found[-1]
    _packages_with_cards.cache_clear()
    assert len({*found}) == 1


def test_a_module_that_an_installed_one_hides_is_refused(folder: Path) -> None:
    cards = registry(folder, network("Kept"), own_nets="import filelock\n" + NETS, filelock="WIDTH = 4\n")
    with pytest.raises(UserError, match=f"{folder / 'filelock.py'} would not be used, for Python takes .*/filelock"):
        cards.card("models", "own")


def test_a_module_of_two_registries_that_own_code_imports_is_refused(folder: Path) -> None:
    first, second = folder / "first", folder / "second"
    registry(first, {}, own_tools="WIDTH = 4\n")
    cards = registry(second, network("Kept"), own_nets="from own_tools import WIDTH\n" + NETS, own_tools="WIDTH = 4\n")
    assert cards.card("models", "own")
    (second / "own_tools.py").write_text("WIDTH = 5\n")
    with pytest.raises(UserError, match=f"{second / 'own_tools.py'} would not be used, for Python takes {first}"):
        Registry([second]).card("models", "own")


def test_code_that_changed_after_a_run_had_begun_is_not_trained(folder: Path, tmp_path: Path) -> None:
    """A worker that begins later would import what stands there by then; one that took it before goes on with it."""
    file, method = folder / "own_losses.py", {"title": "own", "stages": [{"name": "training", "losses": {}}]}
    method["stages"][0]["losses"]["own"] = {"loss": "own_losses:tempered", "hook": "logits", "student_temp": 2.0}
    spec = spec_of(registry(folder, {"methods": {"own": method}}, own_losses=LOSSES), method="own")
    here: dict[str, Any] = {"threads": 1, "device": "cpu"}
    task = messages.CheckCells(specs=[spec], **here, settings=messages.Settings(versions=versions()))
    before = TaskRunner(lambda event: None, lambda: False)
    before.run(task)
    file.write_text(LOSSES.replace("/ student_temp", "/ student_temp / 2"))
    before.run(task)
    train = messages.TrainCells(
        cells=[messages.CellTask(id=0, folder=tmp_path / "cell", spec=spec, names={})],
        computing=REFERENCE, logits="", teacher_folder=None, shared=tmp_path, **here,
    )  # fmt: skip
    for order, error in ((task, UserError), (train, CellError)):
        with pytest.raises(error, match="the code of 'own_losses:tempered' was changed after this run had begun"):
            TaskRunner(lambda event: None, lambda: False).run(order)
    file.write_text(LOSSES)
    TaskRunner(lambda event: None, lambda: False).run(task)
    other = messages.Settings(versions=versions() | {"files": "0" * 12})
    with pytest.raises(UserError, match="kdbench was changed after this run had begun"):
        before.run(task.model_copy(update={"settings": other}))


def test_a_record_names_the_commit_that_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one that somebody pulled while a long run went on."""
    at = {"commit": "loaded"}
    monkeypatch.setattr(subprocess, "run", lambda words, **how: SimpleNamespace(stdout=at.get("commit", "")))
    git_state.cache_clear()
    TaskRunner(lambda event: None, lambda: False)
    at["commit"] = "pulled"
    found = git_state()
    git_state.cache_clear()
    assert found is not None and found["commit"] == "loaded"
