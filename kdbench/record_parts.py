"""The parts of a record, typed."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from kdbench.forms import Open


class Tried(Open):
    """A setting that was tried: dotted path -> value, none for the recipe's own.

    `cells`: identities, one for each seed of tuning. `accuracies`: on the validation part in percent after the last
    step; None where the loss was not finite.
    """

    setting: dict[str, Any] = {}
    cells: list[str] = Field(min_length=1)
    accuracies: list[Annotated[float, Field(ge=0, le=100)] | None]

    @property
    def mean(self) -> float | None:
        """Over the seeds; None where one of them failed."""
        found = [accuracy for accuracy in self.accuracies if accuracy is not None]
        return math.fsum(found) / len(found) if found and len(found) == len(self.accuracies) else None


class RecordedTuning(Open):
    """How a cell's setting was chosen, without the test set.

    `validation`: images of the training set to choose by, or their share.
    """

    seeds: list[int]
    validation: float | int
    trials: list[Tried] = Field(min_length=1)

    @property
    def chosen(self) -> Tried:
        """The first of those with the highest mean."""
        return max(self.trials, key=lambda tried: -1.0 if tried.mean is None else tried.mean)


class Cell(Open):
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
    tuning: RecordedTuning | None = None


class StageSteps(Open):
    name: str
    steps: int = Field(ge=0)


class Budget(Open):
    """Optimizer steps and epochs over all stages; `extra_epochs` of them come on top of the protocol's budget."""

    steps: int = Field(ge=0)
    epochs: float = Field(ge=0)
    batches_per_epoch: int | None = None
    extra_epochs: float = Field(0, ge=0)
    stages: list[StageSteps] = []


class Accuracies(Open):
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


# Metric -> hook point -> value; None where it could not be measured.
MetricValues = dict[str, dict[str, float | None]]


def with_metrics_by_name(data: Any) -> Any:
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


# What test logits say beside the accuracy.
OF_LOGITS = ("balanced_accuracy", "top5", "calibration_error", "fidelity")


class Result(Open):
    test: Accuracies
    validation: Accuracies | None = None
    source: Accuracies | None = Field(None, description="on the source's test part, where `test` is a target domain's")
    teacher: Accuracies | None = Field(None, description="of the teacher that the cell trained, on the test part")
    balanced_accuracy: float | None = Field(
        None,
        ge=0,
        le=100,
        description="mean of the classes' accuracies in percent, where they have unequal numbers of images",
    )
    top5: float | None = Field(None, ge=0, le=100, description="top-5 accuracy in percent, of more than ten classes")
    calibration_error: float | None = Field(
        None, ge=0, le=100, description="expected, in percent: 15 bins of confidence (Guo et al. 2017)"
    )
    fidelity: float | None = Field(
        None, ge=0, le=100, description="test images in percent for which the teacher predicts the same class"
    )
    metrics: MetricValues = Field({}, description="metric of a loss card -> hook point -> value after training")
    references: MetricValues = Field({}, description="the same of a student that ignores its input")
    by_classes: dict[str, float] | None = Field(
        None, description="of a student trained on some classes, in percent: on these (trained_on) and on the others"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_any_version(cls, data: Any) -> Any:
        return with_metrics_by_name(data)

    def numbers(self) -> dict[str, float]:
        """What may stand in a column of its own, by name, where it was measured.

        These are balanced_accuracy, top5, calibration_error, fidelity, <metric>.<hook point>, and
        <metric>_reference.<hook point> of a student that ignores its input.
        """
        of_logits = {name: getattr(self, name) for name in OF_LOGITS}
        return {name: value for name, value in of_logits.items() if value is not None} | {
            f"{metric}{suffix}.{point}": value
            for suffix, metrics in (("", self.metrics), ("_reference", self.references))
            for metric, points in sorted(metrics.items())
            for point, value in sorted(points.items())
            if value is not None
        }

    def also(self) -> dict[str, float]:
        """Accuracies after the last step beside that on the test part, in percent.

        Source, teacher, trained_on, others, those that there are.
        """
        parts = {"source": self.source, "teacher": self.teacher}
        return {name: part.last for name, part in parts.items() if part is not None} | (self.by_classes or {})


class RecordedTeacher(Open):
    name: str
    sha256: str
    accuracy: float | None = Field(None, ge=0, le=100)
    source_accuracy: float | None = Field(None, ge=0, le=100, description="where `accuracy` is on a target domain")
    doubts: list[str] | None = Field(
        None, description="what was seen of it that should make its user doubt, in sentences"
    )
    members: list[str] | None = Field(None, description="of several teachers at once: the sha256 of each one's weights")


class Data(Open):
    """Images in each part, as they were used (after a subset and a validation split)."""

    name: str
    fingerprint: str
    train: int = Field(ge=0)
    validation: int = Field(0, ge=0)
    test: int = Field(ge=1)
    classes: int = Field(ge=1)
    class_names: list[str] | None = Field(None, description="in the order of the labels")
    origin: str = ""
    short_side: int | None = Field(
        None, gt=0, description="of pictures: pixels to which the shorter side is brought before the centre is tested"
    )


class ModelSize(Open):
    parameters: int = Field(ge=0)
    flops: float = Field(ge=0)


class Models(Open):
    student: ModelSize
    teacher: ModelSize | None = None


class Compute(Open):
    """`seconds`: this cell's own time.

    `training_seconds`: the same without evaluation. `ranks`: how many processes trained it together, one number after
    the other where that changed.
    """

    device: str
    device_name: str
    threads: int = Field(ge=0)
    precision: str
    layout: str = "contiguous"
    compile: bool = False
    cuda_graphs: bool = False
    teacher_logits: str = "computed"
    ranks: list[int] | None = None
    sync_batch_norm: bool | None = None
    evaluation: str = "float32, eager"
    seconds: float = Field(ge=0)
    training_seconds: float | None = Field(None, ge=0)
    cohort_seconds: float | None = Field(None, ge=0)
    images_per_second: float = Field(ge=0)
    python: str
    torch: str
    torchvision: str = ""
    platform: str = ""
    cpu_capability: str = ""


class Seeds(Open):
    """The cell's seed, the one of its subset and split, and names of the streams that it draws from."""

    seed: int | None = None
    split: int | None = None
    streams: list[str] = []


class Git(Open):
    commit: str
    dirty: bool = False


class Checkpoint(Open):
    """A checkpoint that a cell kept of its way, for methods that learn from it."""

    step: int = Field(ge=1)
    epoch: float
    file: str
    sha256: str


class Best(Open):
    """The evaluation whose weights were kept beside the last ones: the first of the best, on the part that chose it.

    `accuracy`: in percent.
    """

    step: int = Field(ge=1)
    part: Literal["validation", "test"]
    accuracy: float = Field(ge=0, le=100)


class Anchor(Open):
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


class _OptionsForm(Open):
    at: list[str | float] = []
    gamma: float = 0.1
    momentum: float | None = None


class _NamedForm(Open):
    name: str = ""
    options: _OptionsForm | None = None


class _SourceForm(Open):
    target: str | None = None
    gives: list[str] = []


class _StageForm(Open):
    optimizer: _NamedForm | None = None
    schedule: _NamedForm | None = None
    source: _SourceForm | None = None


class _MethodForm(Open):
    name: str | None = None
    label: str | None = None
    stages: dict[str, _StageForm] | None = None


class _TeacherForm(Open):
    name: str | None = None
    accuracy: float | None = None
    model: dict[str, Any] | None = None
    weights: dict[str, Any] | None = None


class _ProtocolForm(Open):
    augmentation: dict[str, Any] | None = None


class SpecForm(Open):
    """What is read of a resolved recipe in whatever version's form it is."""

    data: dict[str, Any] | None = None
    target: dict[str, Any] | None = None
    student: dict[str, Any] | None = None
    teacher: _TeacherForm | None = None
    protocol: _ProtocolForm | None = None
    method: _MethodForm | None = None


class _Score(Open):
    accuracy: float = Field(default=0, ge=0, le=100)
    # It may grow out of all bounds on the way.
    loss: float = Field(default=0, allow_inf_nan=True)


class Evaluation(Open):
    """What is read of a line of metrics.jsonl."""

    step: int = Field(ge=0)
    # Absent or of this form; never null.
    epoch: float = 0
    seconds: float = 0
    test: _Score = _Score()
    validation: _Score = _Score()
    source: _Score = _Score()
    teacher: _Score = _Score()
    metrics: MetricValues = {}
    references: MetricValues = {}

    @model_validator(mode="after")
    def every_tested_part_has_an_accuracy(self) -> Evaluation:
        for name in self.model_fields_set & {"test", "validation"}:
            if "accuracy" not in getattr(self, name).model_fields_set:
                raise ValueError(f"'{name}' has no accuracy")
        return self
