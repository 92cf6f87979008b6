"""What a run and its workers tell each other: tasks one way, events the other, a line each. Imports no torch."""

from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict

from kdbench.engine.computing.compute import Chosen, Computing, Memory, Steps
from kdbench.errors import CellError, UserError
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.specs import CellSpec

M = TypeVar("M", bound="Message")


class Message(BaseModel):
    """On the line: the name of its class, a space, and its fields as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def line(self) -> str:
        return f"{type(self).__name__} {self.model_dump_json()}\n"


def read_line(form: type[M], line: str) -> M:
    """The message of a line.

    Args:
        form: `Task` or `Event`.

    Raises:
        ValueError: there is no such message, or it has other fields.
    """
    name, _, fields = line.partition(" ")
    kinds = {kind.__name__: kind for kind in form.__subclasses__()}
    if name not in kinds:
        raise ValueError(f"no message '{name[:40]}' is known")
    return kinds[name].model_validate_json(fields)


class GivenData(Message):
    """A data set that a run has: its fingerprint, and a file that holds all of it, or lists its pictures."""

    fingerprint: str
    file: Path


class Settings(Message):
    """What holds for all tasks of a run.

    Attributes:
        ranks: processes that train every cell together. sync_batch_norm: whether their batch norms take the whole
            batch.
        given: data sets by `DataSpec.images_key`, for workers elsewhere.
        versions: of kdbench and what it needs, in whoever sends the tasks (`versions`); empty: not known.
        tables: where these find tables of teacher logits; None: where this machine keeps its own.
    """

    data_roots: list[Path] = []
    download: bool = False
    cache: Path = Path()
    checkpoint_seconds: float = 60.0
    ranks: int = 1
    sync_batch_norm: bool = False
    given: dict[str, GivenData] = {}
    versions: dict[str, str] = {}
    tables: Path | None = None


class Task(Message):
    """What a worker can be asked to do.

    Attributes:
        threads: that it may use. device, settings: filled in by whoever sends it.
        saves: whether it leaves something for the next run when it is stopped in the middle.
    """

    saves: ClassVar[bool] = False

    threads: int = 1
    device: str = "cpu"
    settings: Settings = Settings()


class CheckCells(Task):
    """Build every kind of cell once; answered by a `MemoryNeeded` each."""

    specs: list[CellSpec]


class ReadFingerprint(Task):
    """Answered by a `FingerprintRead`. `download`: whether the data may be downloaded, where the run allows it."""

    data: DataSpec
    download: bool


class SaveData(Task):
    """Keep a data set in one file of the cache; answered by a `DataSaved`."""

    data: DataSpec


class Prepare(Task):
    """Have the data in the cache and the teacher measured."""

    spec: CellSpec
    teacher_folder: Path | None


class PrepareSources(Task):
    """Make what a cell's batch sources need before it trains, in `shared`."""

    saves = True
    spec: CellSpec
    teacher_folder: Path | None
    shared: Path


class ChooseComputing(Task):
    """Choose how to compute by measuring on cells of one cohort; answered by a `ComputingChosen`."""

    specs: list[CellSpec]
    ahead: Steps
    teacher_folder: Path | None
    shared: Path


class FillLogits(Task):
    """Fill a table of teacher logits, or with `estimate` only tell what that takes.

    Answered by `TableFound` and `Filled`.

    `specs`: of cells with one teacher on one data set, for whose images it is.
    """

    saves = True
    specs: list[CellSpec]
    computing: Computing
    estimate: bool
    teacher_folder: Path


class CellTask(Message):
    """A cell of a cohort. `names`: what its record says of its place in the comparison."""

    id: int
    folder: Path
    spec: CellSpec
    names: dict[str, Any]


class TrainCells(Task):
    """Train cells side by side, those of one seed behind one teacher pass.

    `logits`: the table of teacher logits that they began with, "" for none, None for cells that begin now.
    """

    saves = True
    cells: list[CellTask]
    computing: Computing
    logits: str | None
    teacher_folder: Path | None
    shared: Path


class Event(Message):
    """What a worker tells."""


class Ready(Event):
    """The worker can take tasks.

    `cuda`: free bytes of every CUDA device. `unusable`: why a GPU that is there is none of them, "" where none is.
    """

    cuda: list[int]
    unusable: str = ""


class Doing(Event):
    """Something long goes on, of a cell or of the whole task."""

    text: str
    cell: int | None = None


class Announcement(Event):
    """What nobody should miss."""

    text: str


class MemoryNeeded(Event):
    """What a kind of cell takes (`scheduling.kind`)."""

    kind: str
    memory: Memory


class FingerprintRead(Event):
    fingerprint: str


class DataSaved(Event):
    given: GivenData


class ComputingChosen(Event):
    chosen: Chosen


class TableFound(Event):
    """A table of teacher logits. `images`: those that it is filled for; `done`: how many of them it holds.
    `seconds`: that filling the rest takes."""

    folder: Path
    images: int
    views: int
    classes: int
    bytes: int
    done: int
    seconds: float


class Filled(Event):
    """Images of a table that are done, after so many seconds of this call."""

    done: int
    seconds: float


class Progress(Event):
    cell: int
    step: int
    total: int
    stage: str
    accuracy: float | None


class CellFinished(Event):
    cell: int
    accuracy: float
    seconds: float


class CellFailed(Event):
    cell: int
    message: str


class Done(Event):
    """The task is done."""


class Failed(Event):
    """The task could not be done.

    Attributes:
        where, hint: of a `UserError`. by_user: whether it is one. trace: of what nobody expected.
        cells: of the task, filled in by the run.
    """

    message: str
    by_user: bool = False
    where: str | None = None
    hint: str | None = None
    trace: str = ""
    cells: list[int] = []

    @property
    def error(self) -> UserError | CellError:
        """What to raise."""
        if self.by_user:
            return UserError(self.message, self.where, self.hint)
        return CellError(self.message + (f"\n{self.trace}" if self.trace else ""))


class Gone(Event):
    """The worker ended; told by whoever reads its events.

    `why`: where more is known than its exit code. `lost`: with its node, so that another worker may well do what it had
    to do.
    """

    code: int
    why: str = ""
    lost: bool = False
