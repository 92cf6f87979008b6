"""The typed form of a recipe: what a user writes, short forms written out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kdbench.cards import Normalization, PointName
from kdbench.forms import Named, Strict

# Checkpoints that a cell keeps at most: a bound on what one training leaves on the disk.
ROUTE_MOST = 100


class DataChoice(Strict):
    """Which data, and how much of its labelled training set."""

    name: str = Field(description="key of a data card")
    fraction: float | None = Field(None, gt=0, le=1, description="share of the training set, stratified by class")
    per_class: int | None = Field(None, gt=0, description="training images of each class")
    only_classes: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, min_length=1, description="labels to train on; tests are of all classes. Goes with 'per_class'"
    )
    validation: float | int = Field(0, ge=0, description="images (or share below 1) split off the training set")
    split_seed: int | None = Field(None, description="seed of subset and split; the cell's seed where absent")
    root: str | None = Field(None, description="folder that holds the data")

    @model_validator(mode="after")
    def one_subset(self) -> DataChoice:
        if self.fraction is not None and self.per_class is not None:
            raise ValueError("'fraction' and 'per_class' cannot be combined")
        if self.only_classes is not None and self.per_class is None:
            raise ValueError("'only_classes' needs 'per_class': a data card does not say how many images a class has")
        return self


class TargetChoice(Strict):
    """The domain to adapt to: its training images without their labels, and its test set. The labels of its training
    images are not for use, so they cannot be split by."""

    name: str = Field(description="key of a data card with the same classes and image size")
    root: str | None = Field(None, description="folder that holds the data")


class TeacherChoice(Strict):
    """A teacher card by name, or a network with the user's own weights."""

    name: str | None = Field(None, description="key of a teacher card")
    model: Named | None = None
    weights: str | None = Field(
        default=None, description="file with a state dict (.safetensors, or .pt with weights only)"
    )
    normalization: Normalization | None = None
    trained: bool = Field(False, description="train it by its card's recipe, though the card has weights")
    accuracy: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="beside 'weights': expected test accuracy in percent, checked after loading",
    )
    classes: int | None = Field(
        default=None,
        gt=0,
        description="beside 'weights': classes of its training, where they are not those of the data: its features can "
        "teach, its logits cannot",
    )

    @model_validator(mode="after")
    def one_form(self) -> TeacherChoice:
        if self.name is None and (self.model is None or self.weights is None):
            raise ValueError("a teacher is the name of a teacher card, or 'model' together with 'weights'")
        if self.name is not None and (self.model is not None or self.weights is not None):
            raise ValueError("a teacher card brings its own model and weights: leave out 'model' and 'weights'")
        if self.trained and self.name is None:
            raise ValueError("a teacher with 'weights' is not trained: leave out 'trained'")
        if self.name is not None and (self.accuracy is not None or self.classes is not None):
            raise ValueError("'accuracy' and 'classes' stand beside 'weights'; a teacher card has its own")
        if self.accuracy is not None and self.classes is not None:
            raise ValueError("the accuracy of a teacher of other classes cannot be checked on these data")
        return self


class StudentChoice(Named):
    """A model by name, with its own options, hook points (for models without a hooks card) and first weights."""

    hooks: dict[PointName, str] | None = None
    weights: str | None = Field(None, description="file with a state dict to start from")
    start: str | None = Field(
        None, description="teacher card of the same model to start from; with other classes, with a new last layer"
    )

    @model_validator(mode="after")
    def one_start(self) -> StudentChoice:
        if self.weights is not None and self.start is not None:
            raise ValueError("'weights' and 'start' cannot be combined")
        return self


class ComputeChoice(Strict):
    """How networks are computed. What is left open is measured once for a run ("auto"), or plain ("reference")."""

    mode: Literal["auto", "reference"] = Field(
        default="auto",
        description="for what is not said below: the fastest by a short trial, or float32, contiguous, eager",
    )
    precision: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="of convolutions and products in training; parameters, losses and tests stay float32"
    )
    layout: Literal["contiguous", "channels_last"] | None = Field(
        default=None, description="order of feature maps in memory"
    )
    compile: bool | None = Field(default=None, description="whether torch.compile makes a graph of each network")

    def fixed(self) -> dict[str, Any]:
        """What is settled without measuring."""
        plain = {"precision": "float32", "layout": "contiguous", "compile": False} if self.mode == "reference" else {}
        return plain | self.model_dump(exclude={"mode"}, exclude_none=True)

    @property
    def settled(self) -> bool:
        """Whether nothing is left to measure. Graphs are not: on a GPU there are two kinds."""
        fixed = self.fixed()
        return {"precision", "layout"} <= set(fixed) and fixed.get("compile") is False


class Recipe(Strict):
    """What a user writes. `compare` takes dotted paths of this very structure."""

    title: str = Field("", description="shown above the table")
    data: DataChoice
    target: TargetChoice | None = Field(
        None, description="unlabelled domain to adapt to; its test set is then the one that counts"
    )
    teacher: TeacherChoice | None = None
    student: StudentChoice
    protocol: dict[str, Any] = Field(description="a protocol card by name, with any of its fields beside it")
    method: dict[str, Any] = Field({}, description="a method card by name, with any of its fields or parameters")
    compare: dict[str, list[Any]] = Field({}, description="dotted recipe path -> the values to compare")
    baseline: str | None = Field(None, description="method to which the table compares; the first one where absent")
    seeds: int | list[int] = Field(1, description="a count, or the seeds themselves")
    epochs: float | None = Field(None, gt=0, description="budget over all stages, in place of the protocol's")
    steps: int | None = Field(None, gt=0, description="budget over all stages, in optimizer steps")
    evaluations: Annotated[int, Field(ge=0)] | Literal["epoch"] = Field(
        50, description="even points at which to test, or after every epoch"
    )
    compute: ComputeChoice = Field(ComputeChoice(), description="auto, reference, or a mapping that fixes parts")
    route: int | None = Field(
        None,
        gt=0,
        le=ROUTE_MOST,
        description="keep the student's weights at so many even points, the last step included",
    )
    keep: Literal["best"] | None = Field(
        None,
        description="beside the last weights keep those of the best evaluation: on the validation part where there is "
        "one, else on the test part",
    )

    @model_validator(mode="after")
    def one_budget(self) -> Recipe:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("the budget is either 'epochs' or 'steps'")
        return self
