"""Operations: what a stage does to its student once, before its first step, and what holds from then on."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kdbench.engine.data.batch import Batch
from kdbench.engine.networks.network import Network
from kdbench.engine.targets import code_of, import_target
from kdbench.recipe.method_specs import OperationSpec


@dataclass(frozen=True)
class OperationContext:
    """What an operation is given.

    Attributes:
        student: in train mode or as the stage says; its weights may be changed. teacher: None for a cell without one.
        image_shape: (channels, height, width).
        batch: the stage's own batch "data" of its n-th step, made or of the data set.
        stage: its name, for messages.
    """

    student: Network
    teacher: Network | None
    image_shape: tuple[int, int, int]
    device: torch.device
    batch: Callable[[int], Batch]
    stage: str


class Operation(ABC):
    """A card's target is a subclass, built with its options as keywords.

    A resumed cell does not do it again: it gets the state, and must make hold what the operation made hold.
    """

    performed = False

    @abstractmethod
    def perform(self, context: OperationContext) -> None:
        """Change the student."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What was done, as tensors and plain data."""

    @abstractmethod
    def load_state(self, state: dict[str, Any], context: OperationContext) -> None:
        """Make it hold again, for a student whose weights are restored already."""

    def record(self) -> dict[str, Any]:
        """What a finished cell's record says of it, as plain data."""
        return {}


def build_operation(spec: OperationSpec) -> Operation:
    with code_of(f"operation '{spec.name}' ({spec.target})", spec.target):
        operation: Operation = import_target(spec.target)(**spec.options)
    return operation
