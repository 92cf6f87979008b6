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


def program_bytes(cohorts: Iterable[Iterable[Mapping[str, int]]], at_once: bool) -> int:
    """Bytes that a worker needs for the cohorts of a program (fields of `memory.Memory` of each cell, as plain data).

    Args:
        at_once: whether all cells take their steps at once, as recorded ones do on a GPU, and not in turns.
    """
    groups = [list(memories) for memories in cohorts]
    cells = [one for group in groups for one in group]
    data = sum(max(one["data"] for one in group) for group in groups)
    # One copy of the teacher's weights would do; its passes go side by side.
    teacher = sum(max(one["teacher"] for one in group) for group in groups)
    steps = [one["step"] for one in cells]
    held = teacher + sum(one["features"] + one["member"] for one in cells) + (sum(steps) if at_once else max(steps))
    return PROCESS + data + round(KEPT * held)
