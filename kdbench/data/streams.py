"""Addressed randomness: every draw is a function of (seed, stream, index), whatever was drawn before it.

The address becomes a SHA-256 digest of the text `kdbench/<seed>/<stream>/<index>`. `generator` seeds a torch generator
with its first eight bytes. `words` and `permutation` use its first sixteen bytes as the key of a Philox 4x64-10
counter generator, whose output is the same in every numpy version, and never ask numpy or torch for a distribution.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def digest(seed: int, stream: str, index: int = 0) -> bytes:
    """The 32 bytes that an address stands for; streams are names ("order"), the index is a step or an epoch."""
    return hashlib.sha256(f"kdbench/{int(seed)}/{stream}/{int(index)}".encode()).digest()


def address(seed: int, stream: str, index: int = 0) -> int:
    """The seed, a 64-bit number, that an address gives to a torch generator."""
    return int.from_bytes(digest(seed, stream, index)[:8], "little")


def generator(seed: int, stream: str, index: int = 0) -> torch.Generator:
    """A fresh torch generator for an address.

    Torch's CPU generator keeps the lower 32 bits of the seed. Two addresses among k then share their numbers with
    probability k² / 2³³, so an index per epoch (draw for the whole epoch at once) is better than one per step.
    """
    return torch.Generator().manual_seed(address(seed, stream, index))


def words(n: int, seed: int, stream: str, index: int = 0) -> np.ndarray:
    """n independent uniform 64-bit words, uint64 [n]. The first words do not depend on n."""
    key = int.from_bytes(digest(seed, stream, index)[:16], "little")
    return np.random.Philox(key=key).random_raw(n)


def uniform(n: int, seed: int, stream: str, index: int = 0) -> np.ndarray:
    """n independent uniform numbers in [0, 1), float64 [n], multiples of 2⁻⁵³."""
    return (words(n, seed, stream, index) >> np.uint64(11)) * 2.0**-53


def permutation(n: int, seed: int, stream: str, index: int = 0) -> Tensor:
    """A uniform permutation of 0 … n - 1, int64 [n] on the CPU: the stable order of n random words."""
    return torch.from_numpy(np.argsort(words(n, seed, stream, index), kind="stable"))


def seed_draws(seed: int, device: torch.device) -> None:
    """Let draws of networks and losses begin at a seed: `torch.manual_seed` without a look at other devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
