"""The batch source of boundary supporting samples (Heo et al., AAAI 2019).

Training images moved to the teacher's decision boundary, where teacher and student disagree most.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kdbench.data.streams import uniform
from kdbench.engine.data.batch import MOST_STEPS, Batch
from kdbench.engine.inputs import Cost, Source, SourceContext, SourceStep
from kdbench.errors import CellError, UserError
from kdbench.methods.bss.attack import again, asks, base_samples, boundary_attack, target_classes

# One number for each image of a step's batch, by (seed, stream, step).
STREAM = "boundary_targets"
# What is counted of the samples, for the record.
COUNTED = ("attacked", "crossed", "arrived", "rejected")


class BoundarySamples(Source):
    """From "data" makes "boundary".

    Of a batch's images that both networks classify correctly, those with the largest distance of the two outputs, each
    moved to the teacher's boundary with a class drawn by the teacher's probabilities.

    Args:
        attack_size: images to attack in a step, at most; the paper's code has 64 of 256.
        step, rate, iterations, epsilon: as in `kdbench.methods.bss.attack.boundary_attack`.
        clamp: lowest and highest value of the teacher's normalized images; null for none.
        reject: leave out what did not reach its target class (the paper); false keeps all (the authors' code).

    The set always has min(attack_size, N) rows: rows that do not count are masked out and repeat those that do, so that
    batch norms see nothing else.
    """

    streams = (STREAM,)

    def __init__(
        self,
        context: SourceContext,
        *,
        attack_size: int = 64,
        step: Literal["newton", "released"] = "newton",
        rate: float | None = None,
        iterations: int = 10,
        epsilon: float = 1e-4,
        clamp: list[float] | None = None,
        reject: bool = True,
    ) -> None:
        if attack_size < 1 or iterations < 1 or epsilon < 0 or (rate is not None and rate <= 0):
            raise UserError(
                f"stage '{context.stage}': boundary samples need attack_size and iterations of at least 1, an epsilon "
                f"of at least 0 and a positive rate, not {attack_size}, {iterations}, {epsilon} and {rate}"
            )
        if clamp is not None and (len(clamp) != 2 or clamp[0] >= clamp[1]):
            what = f"stage '{context.stage}': 'clamp' is the lowest and the highest value, not {clamp}"
            raise UserError(what, hint="write for example clamp: [-2.5, 2.5], or null")
        assert context.teacher is not None
        self.context, self.teacher = context, context.teacher
        self.attack_size, self.reject = attack_size, reject
        self.attack: dict[str, Any] = {
            "step": step,
            "rate": rate,
            "iterations": iterations,
            "epsilon": epsilon,
            "clamp": tuple(clamp) if clamp is not None else None,
        }
        # Steps with an attack, and the samples of COUNTED, which stay on the device: no step waits for them.
        self.steps = torch.zeros((), dtype=torch.int64, device=context.device)
        self.counts = torch.zeros(len(COUNTED), dtype=torch.int64, device=context.device)
        self.by_step = "how many images an attack still moves is asked at every step" if asks(context.device) else None
        # The numbers of the steps from `first` on, a row each, and the row of the coming step.
        shape = (1 if self.by_step else MOST_STEPS, context.spec.protocol.batch_size)
        self.draws = torch.zeros(shape, dtype=torch.float64, device=context.device)
        self.first, self.row = -len(self.draws), torch.zeros(1, dtype=torch.int64, device=context.device)

    def ready(self, now: SourceStep, tell: Callable[[str], None], stopping: Callable[[], bool]) -> bool:
        """Draw for the coming steps."""
        if not self.first <= now.step < self.first + len(self.draws):
            self.first, (rows, size) = now.step, self.draws.shape
            drawn = [uniform(size, self.context.spec.seed, STREAM, now.step + i) for i in range(rows)]
            self.draws.copy_(torch.from_numpy(np.stack(drawn)))
        self.row.fill_(now.step - self.first)
        return True

    def stretch(self, now: SourceStep) -> int:
        return self.first + len(self.draws) - now.step

    def sets(self, now: SourceStep) -> dict[str, Batch]:
        batch = now.sets["data"]
        assert batch.labels is not None
        student, teacher = (now.values[network]["data"]["logits"] for network in ("student", "teacher"))
        rows, mask = base_samples(student, teacher, batch.labels, self.attack_size)
        base = batch.labels[rows]
        # A draw belongs to its image, whatever rank that has among the others.
        drawn = self.draws.index_select(0, self.row).squeeze(0)
        self.row.add_(1)
        target = target_classes(teacher[rows], base, drawn[rows])
        images = self.teacher.normalizer(batch.images[rows])
        found = boundary_attack(self._logits, images, base, target, **self.attack)
        ends = [mask, mask & found.crossed, mask & found.arrived, mask & ~found.arrived & self.reject]
        self.steps.add_(1)
        self.counts.add_(torch.stack(ends).sum(dim=1))
        if self.reject:
            accepted, mask = again(mask & found.arrived)
            rows, base = rows[accepted], base[accepted]
            found = found._replace(images=found.images[accepted])
        index = batch.index[rows] if batch.index is not None else None
        return {"boundary": Batch(self.teacher.normalizer.pixels(found.images), base, index, mask=mask)}

    def cost(self, steps: int) -> Cost:
        """Every image of every attack with all its iterations: most cross the boundary sooner."""
        each = min(self.attack_size, self.context.spec.protocol.batch_size)
        return Cost(teacher=steps * each * self.attack["iterations"], at_once=each)

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "counts": self.counts}

    def load_state(self, state: dict[str, Any]) -> None:
        if state.keys() != self.state().keys():
            raise CellError(
                "this cell began with a version of kdbench that did not count boundary samples: "
                "remove the cell's folder to start again"
            )
        self.steps.fill_(int(state["steps"]))
        self.counts.copy_(state["counts"])

    def record(self) -> dict[str, Any]:
        """Steps with an attack, and the samples of all of them.

        Attacked, crossed (they left their base class), arrived (in their target class), rejected (they did not count).
        """
        return {"steps": int(self.steps), **dict(zip(COUNTED, self.counts.tolist(), strict=True))}

    def _logits(self, images: Tensor) -> Tensor:
        return self.teacher(images, ["logits"])["logits"].float()
