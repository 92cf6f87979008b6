"""A moving average of the student's weights, which is tested and kept in its place (a protocol's `ema`)."""

from typing import Any

import torch

from kdbench.engine.networks.network import Network
from kdbench.models.hooks import Extractor


class Average(Network):
    """After every optimizer step: average = decay · average + (1 - decay) · weights; it begins as the student does.

    Running statistics are averaged too, as torchvision and timm do with those of batch norms. Counts are copied.

    Args:
        extractor: of a copy of the student's model.
    """

    def __init__(self, student: Network, extractor: Extractor, decay: float) -> None:
        super().__init__(extractor, student.normalizer, student.computing)
        self.decay = decay
        self.model.eval().requires_grad_(False)
        own, present = self.model.state_dict(), student.model.state_dict()
        pairs = [(value, present[name]) for name, value in own.items()]
        self.averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self.copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def follow(self) -> None:
        if self.averaged:
            own, present = (list(side) for side in zip(*self.averaged, strict=True))
            torch._foreach_lerp_(own, present, 1 - self.decay)
        for value, now in self.copied:
            value.copy_(now)

    def state(self) -> dict[str, Any]:
        return {"average": self.model.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["average"])
