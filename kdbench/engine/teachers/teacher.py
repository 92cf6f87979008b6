"""A stage's teacher: the one that a cohort shares, or one of a member's own.

Both are called for the values on images of a member's own. The shared one runs once a step for all members of a cohort
(`shared`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kdbench.engine.computing.compute import REFERENCE, Computing
from kdbench.engine.data.batch import Batch, Sets
from kdbench.engine.networks.build import build_model
from kdbench.engine.networks.freezing import let_train, note_frozen
from kdbench.engine.networks.network import Network, Normalizer, autocast
from kdbench.engine.ranks import Ranks
from kdbench.engine.teachers.anchors import Route
from kdbench.models.hooks import Extractor
from kdbench.models.points import place_of_gradient
from kdbench.recipe.specs import CellSpec

# Input set -> hook point -> value.
PointValues = dict[str, dict[str, Tensor]]
# Gives what a cohort's teacher says on a step's input sets, and waits for it where it runs beside its students.
Taught = Callable[[], PointValues]


class SplitLogits:
    """A table's logits for the images of one training split.

    Args:
        logits: [images of the whole training set, views, classes].
        positions: int64 [images of the split], their places in the whole.
    """

    def __init__(self, logits: Tensor, positions: Tensor) -> None:
        self.logits, self.positions = logits, positions

    def at(self, index: Tensor, view: Tensor) -> Tensor:
        """Logits [N, classes] of views of the split's images, in the precision in which the teacher computed them."""
        where, device = self.positions[index], index.device
        if self.logits.device != device:
            where, view = where.to(self.logits.device), view.to(self.logits.device)
        return self.logits[where, view].to(device)


class Teacher:
    """A frozen network in eval mode, shared by all cells that learn from it.

    Args:
        shapes: of its hook points, per image.
        route: the checkpoints of its training, where they were kept.

    Attributes:
        logits: the table of its logits for the training split, where there is one.
    """

    shared_with_others = True

    def __init__(
        self,
        extractor: Extractor,
        normalizer: Normalizer,
        shapes: Mapping[str, tuple[int, ...]],
        computing: Computing = REFERENCE,
        route: Route | None = None,
    ) -> None:
        self.shapes, self.route = shapes, route
        self.logits: SplitLogits | None = None
        self.network = Network(extractor, normalizer, computing, frozen=True)
        note_frozen(self.network.model)
        self.network.model.eval().requires_grad_(False)

    def with_logits(self, table: Tensor, positions: Tensor) -> Teacher:
        """The same teacher, network and all, with a table of its logits for one training split (see `SplitLogits`)."""
        found = copy.copy(self)
        found.logits = SplitLogits(table, positions)
        return found

    def __call__(self, images: Tensor, points: Sequence[str], labels: Tensor | None = None) -> dict[str, Tensor]:
        """Values of hook points for bytes [N, C, H, W], without gradients, in the precision of whoever asks."""
        with torch.no_grad():
            return self.network(self.network.normalizer(images), points, labels)

    def shared(self, sets: Sets, asked: Mapping[str, Sequence[str]]) -> PointValues:
        """Values of hook points on a step's input sets, for all members at once, in the run's precision.

        Logits of the data set come from their table where there is one, everything else from one pass that runs no
        further than it must; and gradients from another.

        Args:
            asked: input set -> hook points.
        """
        return {name: self._shared(name, sets[name], points) for name, points in asked.items()}

    def _shared(self, name: str, batch: Batch, points: Sequence[str]) -> dict[str, Tensor]:
        found = {}
        if self.logits is not None and name == "data" and "logits" in points:
            assert batch.index is not None and batch.view is not None
            found["logits"] = self.logits.at(batch.index, batch.view)
        rest = [point for point in points if point not in found]
        # Gradients need a pass of their own kind. So nothing else depends on whether another member asks for some.
        gradients = [point for point in rest if place_of_gradient(point) is not None]
        for alike in ([point for point in rest if point not in gradients], gradients):
            if alike:
                with torch.no_grad(), autocast(self.network.computing.precision, batch.images.device):
                    found |= self.network.step(self.network.normalizer(batch.images), alike, batch.labels)
        return found

    def logits_elsewhere(self, device: torch.device) -> bool:
        """Whether its table of logits is too large for the device that trains."""
        return self.logits is not None and self.logits.logits.device.type != device.type


class OwnTeacher:
    """A copy of the shared teacher that belongs to one member: in train mode, trained along, or another checkpoint.

    Attributes:
        trains: whether gradients go to its weights.
    """

    shared_with_others = False

    def __init__(self, teacher: Teacher, computing: Computing, device: torch.device) -> None:
        extractor = teacher.network.extractor
        model = copy.deepcopy(extractor.model).train().to(device)
        let_train([*model.parameters()], True, like=[*extractor.model.parameters()])
        copied = Extractor(model, extractor.places, extractor.model_name)
        self.network = Network(copied, teacher.network.normalizer, computing)
        self.trains = False

    @property
    def model(self) -> torch.nn.Module:
        return self.network.model

    def __call__(self, images: Tensor, points: Sequence[str], labels: Tensor | None = None) -> dict[str, Tensor]:
        with torch.set_grad_enabled(self.trains):
            return self.network(self.network.normalizer(images), points, labels)


StageTeacher = Teacher | OwnTeacher


def own_teacher_of(
    spec: CellSpec, teacher: Teacher | None, computing: Computing, device: torch.device, ranks: Ranks
) -> OwnTeacher | None:
    """The copy that a cell's stages need, with first values of its own where the teacher begins untrained."""
    if teacher is None or spec.teacher is None or not spec.method.own_teacher_stages:
        return None
    found = OwnTeacher(teacher, computing, device)
    ranks.synchronize(found.network.extractor, spec.teacher.knows(spec.data).image_shape)
    if spec.teacher.untrained:
        first = build_model(spec.teacher.model, spec.teacher.knows(spec.data), spec.seed, "init/teacher")
        found.model.load_state_dict(first.state_dict())
    return found
