"""How networks are computed: precision, memory layout, compilation. Imports no torch.

Plain float32, contiguous and eager is the reference; every other way is held to it by tests and by the trial that
chooses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pydantic import ConfigDict, NonNegativeInt, StrictBool

from kdbench.recipe.schema import ComputeChoice

Precision = Literal["float32", "bfloat16"]

# What a process holds before it has any data: Python and torch with its libraries.
PROCESS = 900_000_000
# What an allocator holds beyond what is in use, as a factor.
KEPT = 1.6


@dataclass(frozen=True)
class Computing:
    """A way to compute.

    Attributes:
        precision: "float32" or "bfloat16", of convolutions and products in training. Parameters, connectors' losses,
            optimizer states and every test stay float32.
        layout: "contiguous" or "channels_last", of images, feature maps and convolutions' weights.
        compile: whether networks run as graphs made by torch.compile, where they can be traced.
        cuda_graphs: whether whole steps are recorded as CUDA graphs and replayed: always on a GPU, where it can be had.
        worth: steps from which on a graph is worth its compilation; what is used for fewer runs eagerly.
    """

    # Where one is read from a file: no other keys.
    __pydantic_config__ = ConfigDict(extra="forbid")

    precision: Precision = "float32"
    layout: Literal["contiguous", "channels_last"] = "contiguous"
    compile: StrictBool = False
    cuda_graphs: StrictBool = False
    worth: NonNegativeInt = 0

    @property
    def name(self) -> str:
        """As people read it: "bfloat16, channels_last, compiled"."""
        how = ["compiled"] if self.compile else []
        return ", ".join([self.precision, self.layout, *how, *(["CUDA graphs"] if self.cuda_graphs else [])])

    def plain(self) -> dict[str, Any]:
        return asdict(self)


REFERENCE = Computing()


def plainest(choice: ComputeChoice) -> Computing:
    """The way that a choice leaves open and that is nearest to the reference. On a CPU its steps are not recorded."""
    return candidates(choice, bfloat16=False, compiler=False, cuda=True)[0]


def candidates(choice: ComputeChoice, bfloat16: bool, compiler: bool, cuda: bool) -> list[Computing]:
    """Sensible ways that a choice leaves open, from the plainest to the most demanding.

    Args:
        bfloat16: whether the hardware computes in it. Where it does not, only an explicit choice uses it.
        compiler: whether torch.compile can work here.
        cuda: whether on a CUDA device, where steps are recorded and replayed.
    """
    fixed = choice.fixed()
    hardware = ["float32", *(["bfloat16"] if bfloat16 else [])]
    precisions: list[Any] = [fixed["precision"]] if "precision" in fixed else hardware
    layouts: list[Any] = [fixed["layout"]] if "layout" in fixed else ["contiguous", "channels_last"]
    compiled = [fixed["compile"]] if "compile" in fixed else [False, *([True] if compiler else [])]
    ways = [Computing(p, layout, c) for c in compiled for p in precisions for layout in layouts]
    # The reference is eager everywhere.
    return [replace(way, cuda_graphs=cuda and choice.mode == "auto") for way in ways]


def cohort_bytes(memories: Iterable[Mapping[str, int]]) -> int:
    """Bytes that a worker needs for a cohort (fields of `memory.Memory`, as plain data): its members take turns."""
    members = list(memories)
    shared = max(m["teacher"] for m in members) + sum(m["features"] + m["member"] for m in members)
    return PROCESS + max(m["data"] for m in members) + round(KEPT * (shared + max(m["step"] for m in members)))
