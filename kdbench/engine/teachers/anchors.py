"""The route of a teacher: keeping it while the teacher trains, and learning from its checkpoints, one at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.engine.data.batch import Split, at_most
from kdbench.engine.networks.weight_files import read_weights
from kdbench.engine.networks.weights import load_weights, save_tensors, weights_of
from kdbench.errors import CellError, UserError
from kdbench.files import ROUTE, disk_full, sha256_of, write_json
from kdbench.reading import inside
from kdbench.recipe import route
from kdbench.recipe.method_specs import AnchorSpec


@dataclass(frozen=True)
class Route:
    """Checkpoints of a training, in its order, the converged network last. Weights are read when they are asked for.

    Attributes:
        folder: that holds them. entries: as `keep_checkpoint` made them.
    """

    folder: Path
    entries: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return len(self.entries)

    def weights(self, position: int) -> dict[str, Tensor]:
        """State dict of a checkpoint, in float32.

        Raises:
            UserError: the file is gone, or is not what was kept.
        """
        entry = self.entries[position]
        file = inside(self.folder, entry["file"])
        if not file.is_file() or sha256_of(file) != entry["sha256"]:
            what = f"the teacher's checkpoint at step {entry['step']} is {'damaged' if file.is_file() else 'gone'}"
            raise UserError(what, str(file), "remove the teacher's folder: it is trained again, and keeps its route")
        return read_weights(file)


def keep_checkpoint(
    folder: Path,
    kept: list[dict[str, Any]],
    model: nn.Module,
    step: int,
    epoch: float,
    measured: dict[str, float] | None,
) -> None:
    """Keep a checkpoint below a cell's folder, and add it to `kept` and to the index.

    A resumed cell keeps again what came after its last checkpoint, in the place of the same files.

    Args:
        measured: accuracy and loss on the validation split, where there is one. Never on the test split: whoever
            chooses among checkpoints must not see it.
    """
    name = f"{step:08d}.safetensors"
    file = folder / ROUTE / name
    try:
        digest = save_tensors(file, weights_of(model))
        entry = {"step": step, "epoch": round(epoch, 4), "file": name, "sha256": digest}
        kept.append(entry | ({"validation": measured} if measured is not None else {}))
        write_json(folder / ROUTE / route.INDEX, kept)
    except OSError as error:
        if full := disk_full(error):
            raise full from None
        raise CellError(f"a checkpoint of the route could not be written to {folder}: {error}") from None


class AnchorTeacher:
    """A member's own teacher, which is one anchor after another: one network, whose weights are read from disk.

    Args:
        anchors: stage -> its anchor, in order.
        network: frozen and in eval mode; its weights are replaced.
        student_logits, anchor_logits: logits of images, bytes [N, C, H, W], of the student and of this network.
        validation: split off the training set; the greedy choice is made on it. The test split is not given at all.
    """

    def __init__(
        self,
        anchors: dict[str, AnchorSpec],
        checkpoints: Route,
        network: nn.Module,
        student_logits: Callable[[Tensor], Tensor],
        anchor_logits: Callable[[Tensor], Tensor],
        validation: Split,
    ) -> None:
        self.anchors, self.route, self.network = anchors, checkpoints, network
        self.student_logits, self.anchor_logits = student_logits, anchor_logits
        self.validation = validation
        self.chosen: dict[str, dict[str, Any]] = {}
        # The stage whose anchor the network is, and that anchor's position.
        self.stage: str | None = None
        self.at = -1

    def record(self) -> list[dict[str, Any]]:
        """The anchors so far, as a record lists them."""
        return list(self.chosen.values())

    def begin(self, stage: str) -> None:
        """Make the network the anchor of a stage, which is chosen now if it never was. The student is in eval mode.

        Raises:
            UserError: the checkpoint is gone or not the one that was chosen. CellError: the last anchor was changed.
        """
        self.check()
        if stage not in self.chosen:
            self.chosen[stage] = {"stage": stage, **self._choose(stage)}
        chosen = self.chosen[stage]
        known = self.route.entries[chosen["checkpoint"]]
        if chosen["sha256"] != known["sha256"]:
            what = f"the teacher's checkpoint at step {known['step']} is not the one with which this cell began"
            raise UserError(what, str(self.route.folder), "remove the cell's folder")
        self._load(chosen["checkpoint"])
        self.stage = stage

    def check(self) -> None:
        """Raises CellError when the present anchor is not bit by bit what was kept of it."""
        if self.stage is None:
            return
        found, kept = self.network.state_dict(), self.route.weights(self.at)
        if any(not torch.equal(found[name].cpu(), value) for name, value in kept.items()):
            raise CellError(
                "a frozen anchor changed while its student trained: a defect of the method's loss, or of kdbench"
            )

    def _choose(self, stage: str) -> dict[str, Any]:
        anchor = self.anchors[stage]
        found: dict[str, list[float]] = {}

        def divergences() -> list[float]:
            found["divergences"] = self.divergences(anchor.images or len(self.validation.labels))
            return found["divergences"]

        # A trial begins in any stage; a cell has had the anchor before.
        present = next(reversed(self.chosen.values()), {"checkpoint": 0})["checkpoint"]
        position = route.position(anchor, len(self.route), present, divergences)
        entry = self.route.entries[position]
        return {"checkpoint": position} | {key: entry[key] for key in ("step", "epoch", "sha256")} | found

    @torch.no_grad()
    def divergences(self, images: int) -> list[float]:
        """H of every checkpoint: mean KL(checkpoint || student) of their outputs at temperature 1, in nats.

        Args:
            images: at most so many of the validation split, evenly spaced in its seeded random choice.
        """
        part = at_most(images, self.validation)
        student = torch.cat([self.student_logits(x) for x, _ in part.slices()])
        found = []
        for position in range(len(self.route)):
            self._load(position)
            anchor = torch.cat([self.anchor_logits(x) for x, _ in part.slices()])
            each = (anchor.softmax(1) * (anchor.log_softmax(1) - student.log_softmax(1))).sum(dim=1)
            found.append(max(each.double().mean().item(), 0.0))
        return found

    def _load(self, position: int) -> None:
        load_weights(self.network, self.route.weights(position), "the teacher", str(self.route.folder))
        self.at = position
