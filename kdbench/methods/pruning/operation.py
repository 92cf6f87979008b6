"""Pruning by importance without labels: filters whose absence changes the distance to the teacher least.

Yin et al., CVPR 2020, section 4.4: the Taylor criterion of Molchanov et al. (CVPR 2019) with KL in place of the
cross-entropy, on whatever images the stage has.
"""

from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from kdbench.engine.operations import Operation, OperationContext
from kdbench.errors import UserError, counted
from kdbench.losses.kd import kd
from kdbench.methods.pruning.filters import filters, importance, least_important, size_without, switch_off


class TaylorPruning(Operation):
    """Switches off a share of the student's filters; see `kdbench.methods.pruning.filters`.

    Args:
        share: of all filters, in (0, 1); every layer keeps one at least.
        batches: of the stage, from its first on, over which squared first-order changes are averaged, in each round.
        rounds: the share is reached in so many equal parts. A student that is its teacher's copy has no gradient of the
            KL but for its batch norms' use of the batch (in train mode), so later rounds tell more than the first.
        temperature: of the KL.
    """

    def __init__(self, *, share: float, batches: int = 8, rounds: int = 4, temperature: float = 1.0) -> None:
        if not 0 < share < 1 or batches < 1 or rounds < 1 or not temperature > 0:
            raise UserError(
                f"taylor_pruning cannot take a share of {share} in {counted(rounds, 'round')} of "
                f"{counted(batches, 'batch')} at temperature {temperature}",
                hint="a share lies between 0 and 1; rounds and batches are at least 1, the temperature is positive",
            )
        self.share, self.batches, self.rounds, self.temperature = share, batches, rounds, temperature
        self.kept: dict[str, torch.Tensor] = {}
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def perform(self, context: OperationContext) -> None:
        model, teacher = context.student.model, context.teacher
        assert teacher is not None
        found = filters(model, context.image_shape)
        if not found:
            raise UserError(f"stage '{context.stage}': the student has no convolution with a batch norm to prune")
        norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, _BatchNorm) and name in found}
        self.kept = {name: torch.ones_like(norm.weight, dtype=torch.bool).cpu() for name, norm in norms.items()}
        self.before = size_without(model, context.image_shape, self.kept)
        # Statistics of batch norms are the training's business: these passes leave them.
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        for number in range(1, self.rounds + 1):
            scores = {name: torch.zeros_like(norm.weight) for name, norm in norms.items()}
            for batch in range(self.batches):
                images = context.batch(batch).images
                with torch.no_grad():
                    target = teacher.logits(images)
                model.zero_grad(set_to_none=True)
                kd(context.student.logits(images), target, self.temperature, scale=False).backward()
                for name, norm in norms.items():
                    scores[name] += importance(norm)
            self.kept = least_important(scores, self.kept, self.share * number / self.rounds)
            for name, norm in norms.items():
                with torch.no_grad():
                    norm.weight.mul_(self.kept[name].to(norm.weight.device))
                    norm.bias.mul_(self.kept[name].to(norm.bias.device))
        with torch.no_grad():
            for name, value in model.named_buffers():
                value.copy_(buffers[name])
        model.zero_grad(set_to_none=True)
        self._hold(context)

    def _hold(self, context: OperationContext) -> None:
        switch_off(context.student.model, self.kept)
        self.after = size_without(context.student.model, context.image_shape, self.kept)

    def state(self) -> dict[str, Any]:
        return {"kept": self.kept, "before": self.before}

    def load_state(self, state: dict[str, Any], context: OperationContext) -> None:
        self.kept, self.before = state["kept"], state["before"]
        if self.kept:
            self._hold(context)

    def record(self) -> dict[str, Any]:
        """Filters and the share of them that is off; parameters and FLOPs of an image with and without."""
        total = sum(len(mask) for mask in self.kept.values())
        off = sum(int((~mask).sum()) for mask in self.kept.values())
        return {
            "filters": total,
            "removed": off,
            "share_removed": off / max(total, 1),
            "before": self.before,
            "after": self.after,
            "by_layer": {name: int((~mask).sum()) for name, mask in self.kept.items()},
        }
