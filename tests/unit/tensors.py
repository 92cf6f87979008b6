"""Fixed random tensors in float64, for tests of losses."""

import torch
from torch import Tensor

LABELS = torch.tensor([0, 4, 2, 2, 1, 3])


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def vectors() -> tuple[Tensor, Tensor]:
    """A narrow student's features and a wide teacher's."""
    return rand(5, 3, seed=1), rand(5, 7, seed=2)


def maps() -> tuple[Tensor, Tensor]:
    """The same as maps, of which the teacher's are smaller."""
    return rand(3, 2, 4, 4, seed=3), rand(3, 5, 2, 2, seed=4)


def equal_maps() -> tuple[Tensor, Tensor]:
    return rand(3, 4, 2, 3, seed=1), rand(3, 4, 2, 3, seed=2)


def logits() -> tuple[Tensor, Tensor]:
    return 3 * rand(6, 5, seed=5), 3 * rand(6, 5, seed=6)
