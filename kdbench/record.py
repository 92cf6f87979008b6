"""The record that a finished cell leaves, typed, and how records and their metrics are read back.

Tables and plots are made from these files only. A field that this version does not know is kept; a damaged or foreign
file is an error that names it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from kdbench.errors import UserError
from kdbench.files import sha256_of
from kdbench.reading import inside, of_form, parsed, plain_name, read_as, read_json, read_text

SCHEMA = 1
RECORD = "record.json"
METRICS = "metrics.jsonl"
RUN = "recipe.json"
STUDENT = "student.safetensors"
LOGITS = "test_logits.safetensors"
Metric = Literal["last", "best", "mean_last"]
# The mean of the last evaluations is that of AB's authors, over ten epochs. It needs so many evaluations there, and is
# no mean of what was reached where these epochs are much of the training.
LAST_EPOCHS = 10
FEWEST_EVALUATIONS = 3
LARGEST_SHARE = 0.2


class Part(BaseModel):
    """A part of a record. Frozen; keeps what it does not know."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class Cell(Part):
    """Names of the cell and its place in the comparison."""

    method: str
    label: str
    student: str
    teacher: str | None = None
    data: str
    target: str | None = None
    protocol: str
    seed: int
    axes: dict[str, Any] = Field({}, description="compared dotted recipe path -> this cell's value")
    order: int | None = Field(None, description="place of its combination in the recipe")
    baseline: str | None = Field(None, description="method to which the recipe compares")
    title: str = Field("", description="the recipe's own")


class StageSteps(Part):
    name: str
    steps: int = Field(ge=0)


class Budget(Part):
    """Optimizer steps and epochs over all stages; `extra_epochs` of them come on top of the protocol's budget."""

    steps: int = Field(ge=0)
    epochs: float = Field(ge=0)
    extra_epochs: float = Field(0, ge=0)
    stages: list[StageSteps] = []


class Accuracies(Part):
    """Accuracies of one part of the data, in percent: after the last step, and best of all evaluations."""

    last: float = Field(ge=0, le=100)
    best: float = Field(ge=0, le=100)
    best_step: int = Field(ge=0)

    @model_validator(mode="before")
    @classmethod
    def _without_former_mean(cls, data: Any) -> Any:
        """Earlier versions kept a mean of the last evaluations, those of earlier stages among them: nothing may take it
        for the mean over the last epochs."""
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if key not in ("mean_last", "mean_last_of")}


# Metric -> hook point -> value.
Metrics = dict[str, dict[str, float]]


def _with_metrics_by_name(data: Any) -> Any:
    """A result, or a line of metrics.jsonl: earlier versions had one metric, with a key of its own."""
    if not isinstance(data, dict) or "metrics" in data:
        return data
    former = {"agreement": "metrics", "agreement_reference": "references"}
    named = {former[key]: {"agreement": data[key]} for key in former if data.get(key) not in (None, {})}
    return {key: value for key, value in data.items() if key not in former} | named


class Tail(NamedTuple):
    """Mean test accuracy in percent over the evaluations of the last epochs, and how many these are."""

    mean: float
    evaluations: int


class Result(Part):
    test: Accuracies
    validation: Accuracies | None = None
    source: Accuracies | None = Field(None, description="on the source's test part, where `test` is a target domain's")
    teacher: Accuracies | None = Field(None, description="of the teacher that the cell trained, on the test part")
    metrics: Metrics = Field({}, description="metric that a loss card declares -> hook point -> value after training")
    references: Metrics = Field({}, description="the same of a student that ignores its input, where a card has it")
    by_classes: dict[str, float] | None = Field(
        None, description="of a student trained on some classes, in percent: on these (trained_on) and on the others"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_any_version(cls, data: Any) -> Any:
        return _with_metrics_by_name(data)

    def also(self) -> dict[str, float]:
        """Accuracies after the last step beside that on the test part, in percent: source, teacher, trained_on, others,
        those that there are."""
        parts = {"source": self.source, "teacher": self.teacher}
        return {name: part.last for name, part in parts.items() if part is not None} | (self.by_classes or {})


class Teacher(Part):
    name: str
    sha256: str
    accuracy: float | None = Field(None, ge=0, le=100)
    source_accuracy: float | None = Field(None, ge=0, le=100, description="where `accuracy` is on a target domain")
    doubts: list[str] | None = Field(
        None, description="what was seen of it that should make its user doubt, in sentences"
    )


class Data(Part):
    """Images in each part, as they were used (after a subset and a validation split)."""

    name: str
    fingerprint: str
    train: int = Field(ge=0)
    validation: int = Field(0, ge=0)
    test: int = Field(ge=1)
    classes: int = Field(ge=1)
    origin: str = ""


class Size(Part):
    parameters: int = Field(ge=0)
    flops: float = Field(ge=0)


class Models(Part):
    student: Size
    teacher: Size | None = None


class Compute(Part):
    """`seconds`: this cell's own time. `training_seconds`: the same without evaluation."""

    device: str
    device_name: str
    threads: int = Field(ge=0)
    precision: str
    layout: str = "contiguous"
    compile: bool = False
    cuda_graphs: bool = False
    teacher_logits: str = "computed"
    evaluation: str = "float32, eager"
    seconds: float = Field(ge=0)
    training_seconds: float | None = Field(None, ge=0)
    cohort_seconds: float | None = Field(None, ge=0)
    images_per_second: float = Field(ge=0)
    python: str
    torch: str
    torchvision: str = ""
    platform: str = ""


class Git(Part):
    commit: str
    dirty: bool = False


class Checkpoint(Part):
    """A checkpoint that a cell kept of its way, for methods that learn from it."""

    step: int = Field(ge=1)
    epoch: float
    file: str
    sha256: str


class Anchor(Part):
    """The checkpoint of its teacher's route that a stage learned from; `checkpoint` is its position there, from 0."""

    stage: str
    checkpoint: int = Field(ge=0)
    step: int
    epoch: float
    sha256: str
    divergences: list[float] | None = Field(
        None,
        description="mean KL(checkpoint || student) of every checkpoint, in nats, where the choice was made on them",
    )


class _Options(Part):
    at: list[str | float] = []
    gamma: float = 0.1
    momentum: float | None = None


class _Named(Part):
    name: str = ""
    options: _Options | None = None


class _Source(Part):
    target: str | None = None
    gives: list[str] = []


class _Stage(Part):
    optimizer: _Named | None = None
    schedule: _Named | None = None
    source: _Source | None = None


class _Method(Part):
    name: str | None = None
    label: str | None = None
    stages: dict[str, _Stage] | None = None


class _Teacher(Part):
    name: str | None = None
    accuracy: float | None = None
    model: dict[str, Any] | None = None
    weights: dict[str, Any] | None = None


class _Protocol(Part):
    augmentation: dict[str, Any] | None = None


class _Spec(Part):
    """What is read of a resolved recipe in whatever version's form it is."""

    data: dict[str, Any] | None = None
    target: dict[str, Any] | None = None
    student: dict[str, Any] | None = None
    teacher: _Teacher | None = None
    protocol: _Protocol | None = None
    method: _Method | None = None


class _Seeds(Part):
    streams: list[str] | None = None


class Record(Part):
    """What a finished cell leaves in its record.json. `folder` is where it was read from and is not part of it."""

    schema_version: int = Field(alias="schema")
    kdbench: str
    status: str
    identity: str
    recipe: str
    cell: Cell
    spec: dict[str, Any] = {}
    budget: Budget
    result: Result
    teacher: Teacher | None = None
    anchors: list[Anchor] = []
    route: list[Checkpoint] = []
    data: Data
    target: Data | None = Field(None, description="the domain adapted to and tested on; `train` images without labels")
    models: Models
    compute: Compute
    files: dict[str, str] = Field({}, description="name of a file that was left beside the record -> sha256, in hex")
    git: Git | None = None
    folder: Path | None = Field(None, exclude=True, repr=False)

    @field_validator("spec", mode="before")
    @classmethod
    def _of_readable_form(cls, spec: Any) -> Any:
        """It stays as it is: another version's is compared, not understood."""
        _Spec.model_validate(spec)
        return spec

    @model_validator(mode="after")
    def _with_readable_seeds(self) -> Record:
        _Seeds.model_validate((self.model_extra or {}).get("seeds") or {})
        return self

    def accuracy(self, metric: Metric) -> float:
        """Test accuracy in percent.

        Raises:
            UserError: the mean over the last epochs, where there is none (`tail`).
        """
        return self.tail.mean if metric == "mean_last" else getattr(self.result.test, metric)

    @cached_property
    def tail(self) -> Tail:
        """The evaluations of the last `LAST_EPOCHS` epochs, from the metrics beside the record: the same part of every
        training, whatever stages it had before.

        Raises:
            UserError: these epochs are too much of the training or not all of its last stage's, they have too few
                evaluations, or the metrics are absent or damaged.
        """
        where = str(self.folder or self.identity[:8])
        if self.folder is None:
            raise UserError(
                "a record that was not read from a folder has no evaluations",
                where=where,
                hint="read records with kdbench.record.read_records",
            )
        budget = self.budget
        # A whole number; `epochs` is rounded.
        window = LAST_EPOCHS * round(budget.steps / budget.epochs) if budget.epochs else 0
        points = [
            entry["test"]["accuracy"]
            for entry in metrics(self.folder)
            if "test" in entry and entry["step"] > budget.steps - window
        ]
        if LARGEST_SHARE * budget.epochs < LAST_EPOCHS:
            why = f"its training has {budget.epochs:g}, of which these may be a fifth at most"
        elif budget.stages and budget.stages[-1].steps < window:
            why = f"its last stage, '{budget.stages[-1].name}', is shorter"
        elif len(points) < FEWEST_EVALUATIONS:
            why = f"{len(points)} evaluations in its last {LAST_EPOCHS} epochs, {FEWEST_EVALUATIONS} are needed"
        else:
            return Tail(math.fsum(points) / len(points), len(points))
        raise UserError(
            f"'{self.cell.label}' has no mean over the last {LAST_EPOCHS} epochs: {why}",
            where=where,
            hint="take the accuracy after the last step, or run the recipe longer or with evaluations=epoch",
        )

    def plain(self) -> dict[str, Any]:
        """The record as the plain data of its file."""
        return self.model_dump(mode="json", by_alias=True)


def read_record(path: str | Path) -> Record:
    """One record, from its file or from its cell's folder.

    Raises:
        UserError: absent, not JSON, of another program, of a newer kdbench, or damaged; names the file.
    """
    file = Path(path)
    if file.is_dir():
        file = file / RECORD
    where = str(file)
    if not file.exists():
        raise UserError("there is no record", where=where, hint=f"give a folder that holds a {RECORD}")
    plain = read_json(file, _AGAIN)
    if not isinstance(plain, dict) or not isinstance(plain.get("schema"), int) or "kdbench" not in plain:
        raise UserError("this is no record of kdbench", where=where, hint="leave this folder out")
    if plain["schema"] > SCHEMA:
        raise UserError(
            f"this record has schema {plain['schema']}, made by kdbench {plain['kdbench']}; "
            f"this kdbench reads up to {SCHEMA}",
            where=where,
            hint="update kdbench",
        )
    return of_form(Record, {**plain, "folder": file.parent}, where, _AGAIN)


_AGAIN = "remove its folder and run the cell again, or leave it out"


Name = Annotated[str, AfterValidator(plain_name)]


class Run(Part):
    """What recipe.json says of a run: its name, its title, its recipe, and folder names of the planned cells. An older
    version's says less."""

    name: Name | None = None
    title: str = ""
    recipe: dict[str, Any] | None = None
    cells: list[Name] | None = Field(default=None, min_length=1)

    @field_validator("cells")
    @classmethod
    def _each_once(cls, cells: list[str] | None) -> list[str] | None:
        if cells is not None and len({cell.casefold() for cell in cells}) < len(cells):
            raise ValueError("a cell is named twice")
        return cells


def read_run(folder: Path) -> Run:
    """The recipe.json of a run's folder. UserError where it is absent or damaged."""
    return read_as(Run, folder / RUN, "run the recipe again: it is written anew, and finished cells are kept")


def finished_record(folder: Path) -> Record | None:
    """The record of a cell's folder, whose name ends with the cell's identity; None where it is not finished.

    Raises:
        UserError: a record that cannot be read, or one of another cell.
    """
    if not (folder / RECORD).exists():
        return None
    record = read_record(folder)
    if not folder.name.endswith(record.identity[:8]):
        raise UserError(
            f"this is the record of another cell, {record.identity[:8]}",
            where=str(folder / RECORD),
            hint="its folder was renamed or filled by hand: give it back its name, or remove it and run the cell again",
        )
    return record


def student_file(record: Record) -> Path:
    """The weights of a finished cell's student, for whoever uses them. Records of earlier versions hold no sha256.

    Raises:
        UserError: they are not beside the record, or not those that it names.
    """
    assert record.folder is not None
    file = record.folder / STUDENT
    if not file.is_file():
        raise UserError(
            "there are no weights of this cell's student: published results hold records alone",
            where=str(record.folder),
            hint="give a folder of runs; in one, remove this folder and run the recipe again",
        )
    expected = record.files.get(STUDENT)
    if expected is not None and (found := sha256_of(file)) != expected:
        raise UserError(
            f"these weights are not those of their record: sha256 {found[:12]}…, the record says {expected[:12]}…",
            where=str(file),
            hint="the file is damaged or another one: put the right one back, or remove its folder and run the recipe "
            "again",
        )
    return file


def read_records(paths: Iterable[str | Path]) -> list[Record]:
    """All records at or below the given folders and files, each file once: folders in the given order, and inside a
    folder by path.

    Raises:
        UserError: a path that does not exist, no record at all, or a record that cannot be read.
    """
    given = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    files: dict[Path, Path] = {}
    for path in given:
        if not path.exists():
            raise UserError("there is no such folder", where=str(path), hint="give a folder with finished cells")
        for file in _records_below(path) if path.is_dir() else [path]:
            files.setdefault(file.resolve(), file)
    if not files:
        raise UserError(
            "no finished cell was found",
            where=", ".join(map(str, given)) or None,
            hint=f"a finished cell's folder holds a {RECORD}; 'kdbench run RECIPE' makes them",
        )
    return [read_record(file) for file in files.values()]


def _records_below(folder: Path) -> list[Path]:
    """Records below a folder by path; of a run's folder, those of the cells that its last plan had."""
    cells = read_run(folder).cells if (folder / RUN).exists() else None
    if cells is None:
        return sorted(folder.rglob(RECORD))
    return sorted(file for cell in cells if (file := inside(folder, cell) / RECORD).is_file())


def unfinished(paths: Iterable[str | Path]) -> list[Path]:
    """Folders of cells that began (they hold metrics) and have no record, at or below the given folders, by path."""
    given = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    begun = {file.parent for path in given if path.is_dir() for file in path.rglob(METRICS)}
    return sorted(folder for folder in begun if not (folder / RECORD).is_file())


class _Score(Part):
    accuracy: float = Field(default=0, ge=0, le=100)


class _Evaluation(Part):
    """What is read of a line of metrics.jsonl."""

    step: int = Field(ge=0)
    # Absent or of this form; never null.
    epoch: float = 0
    seconds: float = 0
    test: _Score = _Score()
    validation: _Score = _Score()
    source: _Score = _Score()
    teacher: _Score = _Score()
    metrics: Metrics = {}
    references: Metrics = {}


def metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a cell's metrics.jsonl, one for each evaluation, in order of steps, in the form of today: a line of
    an earlier version has its only metric, the agreement, in `metrics` too.

    The last line of a cell that is not finished may be cut off and is then left out.

    Raises:
        UserError: absent or damaged; names file and line.
    """
    file = Path(folder) / METRICS
    text = read_text(file, f"what is made of evaluations needs the {METRICS} beside the record")
    lines = text.splitlines()
    if lines and not text.endswith("\n") and not (file.parent / RECORD).is_file():
        lines.pop()
    entries = []
    for number, line in enumerate(lines, 1):
        # A loss may have grown out of all bounds: it stands there, and no table reads it.
        entries.append(_with_metrics_by_name(parsed(line, f"{file}:{number}", _AGAIN, finite=False)))
        of_form(_Evaluation, entries[-1], f"{file}:{number}", _AGAIN)
    return entries


def summary(history: list[dict[str, Any]], part: str) -> dict[str, Any]:
    """Last and best (the earliest of equals) accuracy on a part, in percent.

    Args:
        history: entries of metrics.jsonl.
        part: "test" or "validation".
    """
    points = [(entry["step"], entry[part]["accuracy"]) for entry in history if part in entry]
    best_step, best = max(points, key=lambda point: (point[1], -point[0]))
    return {"last": round(points[-1][1], 4), "best": round(best, 4), "best_step": best_step}
