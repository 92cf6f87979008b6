"""Means of what a member trains by, and the first step at which it was not finite, all on the device."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


class Meter:
    """Sums since the last evaluation. Nothing is read before somebody asks.

    Args:
        names: of everything that may be added.

    Attributes:
        step: int64 [], the number of the present step. images: that were trained on since the last evaluation.
    """

    def __init__(self, names: Iterable[str], device: torch.device) -> None:
        self.names = list(dict.fromkeys(names))
        self.sums = torch.zeros(len(self.names), device=device)
        self.bad = torch.full((len(self.names),), -1, dtype=torch.int64, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.counts = dict.fromkeys(self.names, 0)
        self.images = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add the values of a step, scalars by name, and go on to the next one. All on the device."""
        nothing = self.sums.new_zeros(())
        row = torch.stack([values[name].detach().float() if name in values else nothing for name in self.names])
        self.sums.add_(row)
        self.bad.copy_(torch.where((self.bad < 0) & ~torch.isfinite(row), self.step, self.bad))
        self.step.add_(1)

    def count(self, names: Iterable[str], images: int) -> None:
        """Note on the host that a step added these."""
        for name in names:
            self.counts[name] += 1
        self.images += images

    def result(self) -> dict[str, float]:
        """Mean of every value that was added. Waits for the device."""
        sums = self.sums.tolist()
        return {n: total / self.counts[n] for n, total in zip(self.names, sums, strict=True) if self.counts[n]}

    def clear(self) -> None:
        """Begin new sums, in the same tensors."""
        self.sums.zero_()
        self.counts = dict.fromkeys(self.names, 0)
        self.images = 0

    def not_finite(self) -> dict[str, int]:
        """Names whose value was not finite, each with the first step at which it was so. Waits for the device."""
        return {name: step for name, step in zip(self.names, self.bad.tolist(), strict=True) if step >= 0}

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums, "bad": self.bad, "counts": self.counts, "images": self.images}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state. ValueError for one of other values."""
        if [*state["counts"]] != [*self.names]:
            raise ValueError(f"it measures {', '.join(state['counts'])}")
        self.sums.copy_(state["sums"])
        self.bad.copy_(state["bad"])
        self.counts, self.images = dict(state["counts"]), state["images"]
