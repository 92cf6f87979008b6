"""What a run and its workers tell each other: tasks one way, events the other, a JSON line each. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from kdbench.engine.compute import Computing
from kdbench.errors import CellError, UserError
from kdbench.recipe.specs import CellSpec, DataSpec


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False)


class Task(Message):
    """What a worker can be asked to do. `threads`: that it may use."""

    threads: int = 1


class TryOut(Task):
    """Build every kind of cell once; told by a `MemoryNeeded` each."""

    kind: Literal["try_out"] = "try_out"
    specs: list[CellSpec]


class ReadFingerprint(Task):
    """Told by a `FingerprintRead`. `download`: whether the data may be downloaded, where the run allows it."""

    kind: Literal["read_fingerprint"] = "read_fingerprint"
    data: DataSpec
    download: bool


class Prepare(Task):
    """Have the data in the cache and the teacher measured."""

    kind: Literal["prepare"] = "prepare"
    spec: CellSpec
    teacher_folder: Path | None


class PrepareSources(Prepare):
    """Make what a cell's batch sources need before it trains, in `shared`."""

    kind: Literal["prepare_sources"] = "prepare_sources"  # type: ignore[assignment]
    shared: Path


class Trial(Task):
    """Choose how to compute by measuring on cells of one cohort; told by a `Chosen`."""

    kind: Literal["trial"] = "trial"
    specs: list[CellSpec]
    student_steps: float
    teacher_steps: float
    teacher_folder: Path | None
    shared: Path


class FillLogits(Task):
    """Fill a table of teacher logits, or with `estimate` only tell what that takes; told by `TableFound`, `Filled`."""

    kind: Literal["fill_logits"] = "fill_logits"
    spec: CellSpec
    computing: Computing
    estimate: bool
    teacher_folder: Path


class CellTask(Message):
    """A cell of a cohort. `names`: what its record says of its place in the comparison."""

    id: int
    folder: Path
    spec: CellSpec
    names: dict[str, Any]


class TrainCohort(Task):
    """Train cells side by side, those of one seed behind one teacher pass. `logits`: the table of teacher logits that
    they began with, "" for none, None for cells that begin now."""

    kind: Literal["train_cohort"] = "train_cohort"
    cells: list[CellTask]
    computing: Computing
    logits: str | None
    teacher_folder: Path | None
    shared: Path


AnyTask = Annotated[
    TryOut | ReadFingerprint | Prepare | PrepareSources | Trial | FillLogits | TrainCohort, Field(discriminator="kind")
]


class Settings(Message):
    """What holds for all tasks of a run."""

    data_roots: list[Path] = []
    download: bool = False
    cache: Path = Path()
    checkpoint_seconds: float = 60.0


class Order(Message):
    """A task for a worker, with the device to do it on."""

    device: str
    settings: Settings
    task: AnyTask

    @classmethod
    def of(cls, task: Task, device: str, settings: Settings) -> Order:
        """The order to do a task."""
        return cls(device=device, settings=settings, task=task)  # type: ignore[arg-type]


class Ready(Message):
    """The worker can take tasks. `cuda`: free bytes of every CUDA device. `unusable`: why a GPU that is there is none
    of them, "" where none is."""

    kind: Literal["ready"] = "ready"
    cuda: list[int]
    unusable: str = ""


class Doing(Message):
    """Something long goes on, of a cell or of the whole task."""

    kind: Literal["doing"] = "doing"
    text: str
    cell: int | None = None


class Note(Message):
    """What nobody should miss."""

    kind: Literal["note"] = "note"
    text: str


class MemoryNeeded(Message):
    """Bytes that a kind of cell takes: fields of `engine.memory.Memory`."""

    kind: Literal["memory_needed"] = "memory_needed"
    key: str
    memory: dict[str, int]


class FingerprintRead(Message):
    kind: Literal["fingerprint_read"] = "fingerprint_read"
    fingerprint: str


class Chosen(Message):
    """How cells compute, why, and what was measured."""

    kind: Literal["chosen"] = "chosen"
    computing: Computing
    why: str
    tried: list[dict[str, Any]]


class TableFound(Message):
    """A table of teacher logits. `seconds`: that filling the rest takes."""

    kind: Literal["table_found"] = "table_found"
    folder: Path
    images: int
    views: int
    classes: int
    bytes: int
    done: int
    seconds: float


class Filled(Message):
    """Images of a table that are done, after so many seconds of this call."""

    kind: Literal["filled"] = "filled"
    done: int
    seconds: float


class Progress(Message):
    kind: Literal["progress"] = "progress"
    cell: int
    step: int
    total: int
    stage: str
    accuracy: float | None


class CellFinished(Message):
    kind: Literal["cell_finished"] = "cell_finished"
    cell: int
    accuracy: float
    seconds: float


class CellFailed(Message):
    kind: Literal["cell_failed"] = "cell_failed"
    cell: int
    message: str


class Done(Message):
    """The task is done."""

    kind: Literal["done"] = "done"


class Failed(Message):
    """The task could not be done.

    Attributes:
        where, hint: of a `UserError`. by_user: whether it is one. trace: of what nobody expected.
        cells: of the task, filled in by the run.
    """

    kind: Literal["failed"] = "failed"
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


class Gone(Message):
    """The worker ended, told by whoever reads its events."""

    kind: Literal["gone"] = "gone"
    code: int


Event = (
    Ready
    | Doing
    | Note
    | MemoryNeeded
    | FingerprintRead
    | Chosen
    | TableFound
    | Filled
    | Progress
    | CellFinished
    | CellFailed
    | Done
    | Failed
    | Gone
)
EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])
