"""How networks are computed: precision, memory layout, compilation; chosen once for a run and kept beside its cells.

Imports no torch.

Plain float32, contiguous and eager is the reference; every other way is compared with it by tests and by the trial
that chooses it.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, NonNegativeInt, StrictBool

from kdbench.errors import UserError
from kdbench.files import RECORD, write_json
from kdbench.forms import Strict
from kdbench.reading import of_form, read_as
from kdbench.recipe.choices import ComputeChoice
from kdbench.record import Record

Precision = Literal["float32", "bfloat16"]

# The file of a run in which its ways to compute are kept.
NAME = "compute.json"
_AGAIN = "remove the file: finished cells are kept, the fastest way to compute is measured again"

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


class Chosen(Strict):
    """What was chosen for cells that leave the same things open (`asked`: what they fix), and what was measured."""

    asked: dict[str, Any]
    computing: Computing
    why: str
    tried: list[Any] = []


def kept(folder: Path, choice: ComputeChoice) -> Computing | None:
    """How this run computes what was left open in such a way, if it began already.

    Raises:
        UserError: the file is damaged, or says something else than the recipe does.
    """
    found = _entries(folder).get(key(choice))
    if found is None:
        return None
    computing = found.computing.plain()
    if other := [name for name, value in choice.fixed().items() if computing[name] != value]:
        what = f"it computes with {other[0]} {computing[other[0]]}, the recipe says {choice.fixed()[other[0]]}"
        raise UserError(what, str(folder / NAME), _AGAIN)
    return found.computing


def keep(folder: Path, chosen: Chosen) -> None:
    """Remember a choice in the folder of a run."""
    entries = _entries(folder) | {json.dumps(chosen.asked, sort_keys=True): chosen}
    write_json(folder / NAME, {name: entry.model_dump(mode="json") for name, entry in entries.items()})


def of_record(record: Record) -> Computing:
    """How a finished cell was computed."""
    compute = record.compute
    plain = {"precision": compute.precision, "layout": compute.layout, "compile": compute.compile}
    plain["cuda_graphs"] = compute.device == "cuda"
    where = str(record.folder / RECORD) if record.folder is not None else record.identity[:8]
    return of_form(Computing, plain, where, "remove the cell's folder: it is trained again")


def key(choice: ComputeChoice) -> str:
    return json.dumps(choice.fixed(), sort_keys=True)


def _entries(folder: Path) -> dict[str, Chosen]:
    return read_as(dict[str, Chosen], folder / NAME, _AGAIN) if (folder / NAME).exists() else {}


@dataclass(frozen=True)
class Memory:
    """Bytes that a cell takes.

    Attributes:
        data: the data set and its splits, shared by a cohort.
        teacher: weights and a forward pass, shared by a cohort.
        features: of the teacher, for one batch, as this cell reads them.
        member: parameters, gradients, momentum, and what batch sources hold: all the time.
        step: activations of its own training step, with its batch source's passes, or of a test, while its turn lasts.
    """

    data: int
    teacher: int
    features: int
    member: int
    step: int


@dataclass(frozen=True)
class Steps:
    """What one worker has before it: steps of students, and steps with a teacher."""

    of_students: float
    with_teacher: float


def program_bytes(cohorts: Iterable[Iterable[Memory]], at_once: bool) -> int:
    """Bytes that a worker needs for the cohorts of a program.

    Args:
        at_once: whether all cells take their steps at once, as recorded ones do on a GPU, and not in turns.
    """
    groups = [list(cohort) for cohort in cohorts]
    cells = [cell for group in groups for cell in group]
    data = sum(max(cell.data for cell in group) for group in groups)
    # One copy of the teacher's weights would do; its passes go side by side.
    teacher = sum(max(cell.teacher for cell in group) for group in groups)
    steps = [cell.step for cell in cells]
    held = teacher + sum(cell.features + cell.member for cell in cells) + (sum(steps) if at_once else max(steps))
    return PROCESS + data + round(KEPT * held)
