"""The typed form of a recipe: what a user writes, short forms written out."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from kdbench.forms import IMAGE_SIZE, RESIZE, Entry, NamedModel, PointName, Strict, WithOptions
from kdbench.image_cards import Normalization

# Settings that every method tries at most: each is planned before anything is trained.
MOST_TRIALS = 1000
# Checkpoints that a cell keeps at most: a bound on what one training leaves on the disk.
ROUTE_MOST = 100
# Of one cell.
MOST_EVALUATIONS = 10**5

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class DataPart(BaseModel):
    """What a recipe and a cell say of data: which they are, and which part of their labelled training set."""

    name: str = Field(description="key of a data card")
    fraction: float | None = Field(None, gt=0, le=1, description="share of the training set, stratified by class")
    per_class: int | None = Field(None, gt=0, description="training images of each class")
    only_classes: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, min_length=1, description="labels to train on; tests are of all classes. Goes with 'per_class'"
    )
    validation: float | int = Field(0, ge=0, description="images (or share below 1) split off the training set")
    tested_on: Literal["test", "validation"] = Field(
        "test", description="the test set, or the validation part instead, to make choices without the test set"
    )
    split_seed: int | None = Field(None, description="seed of subset and split; by default the cell's seed")
    root: str | None = Field(None, description="folder that holds the data")


class DataChoice(DataPart, Strict):
    """Which data, and how much of its labelled training set."""

    @model_validator(mode="after")
    def one_subset(self) -> DataChoice:
        if self.fraction is not None and self.per_class is not None:
            raise ValueError("'fraction' and 'per_class' cannot be combined: 'null' takes one away that is inherited")
        if self.only_classes is not None and self.per_class is None:
            raise ValueError("'only_classes' needs 'per_class': a data card does not say how many images a class has")
        if self.tested_on == "validation" and not self.validation:
            raise ValueError("'tested_on: validation' needs a validation part: add 'validation'")
        return self


class TargetChoice(Strict):
    """The domain to adapt to: its training images without their labels, and its test set. The labels of its training
    images are not for use, so they cannot be split by."""

    name: str = Field(description="key of a data card with the same classes and image size")
    root: str | None = Field(None, description="folder that holds the data")


class TeacherChoice(Strict):
    """A teacher card by name, or a network with the user's own weights."""

    name: str | None = Field(None, description="key of a teacher card")
    several: list[TeacherChoice] | None = Field(
        default=None, description="several teachers; you can also write a list instead of a mapping"
    )
    model: NamedModel | None = None
    hooks: dict[PointName, str] | None = Field(
        default=None, description="beside 'model' or 'name': hook points in place of all of the network's own"
    )
    weights: str | None = Field(
        default=None, description="file with a state dict (.safetensors, or .pt with weights only)"
    )
    entry: Entry = None
    normalization: Normalization | None = None
    image_size: int | None = Field(default=None, gt=0, description=IMAGE_SIZE)
    untrained: bool = Field(
        default=False, description="beside 'model': start from random weights, for methods that train the teacher too"
    )
    trained: bool = Field(False, description="train it with its card's recipe, even if the card has weights")
    accuracy: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="beside 'weights': expected test accuracy in percent, checked after loading",
    )
    resize: int | None = Field(default=None, gt=0, description="beside 'accuracy': " + RESIZE)
    classes: int | None = Field(
        default=None,
        gt=0,
        description="beside 'weights': number of classes that it was trained on, if not those of the data. Its "
        "features can then teach, its logits cannot",
    )

    @model_validator(mode="before")
    @classmethod
    def one_view(cls, data: Any) -> Any:
        if isinstance(data, dict) and (own := [key for key in ("crop", "transforms", "augmentation") if key in data]):
            raise ValueError(
                f"'{own[0]}' cannot be a teacher's own: both networks see one view of an image, or they would answer "
                "to different pictures; 'image_size' and 'normalization' can be"
            )
        return data

    @property
    def own_hooks(self) -> dict[str, str] | None:
        """The hook points that it is given, beside its model or inside."""
        return self.hooks if self.hooks is not None or self.model is None else self.model.hooks

    @model_validator(mode="after")
    def one_form(self) -> TeacherChoice:
        if self.several is not None:
            if self != TeacherChoice.model_construct(several=self.several):
                raise ValueError("with several teachers, write settings beside each of them")
            if any(one.several for one in self.several):
                raise ValueError("a list of teachers cannot hold other lists")
            if len(self.several) < 2:
                raise ValueError(
                    "a list of teachers has two or more, which teach together; one is written without a list, and to "
                    "compare teachers: 'compare: {teacher: […]}'"
                )
            return self
        if self.hooks is not None and self.model is not None and self.model.hooks is not None:
            raise ValueError("a teacher's 'hooks' are given twice: keep those beside 'model'")
        if self.untrained and (self.name is not None or self.weights is not None or self.accuracy is not None):
            raise ValueError("an untrained teacher has a 'model' and nothing else")
        if self.name is None and (self.model is None or (self.weights is None and not self.untrained)):
            raise ValueError(
                "a teacher is the name of a teacher card, or 'model' and 'weights' (or 'untrained: true'), or a list"
            )
        if self.name is not None and (self.model is not None or self.weights is not None):
            raise ValueError("a teacher card brings its own model and weights: leave out 'model' and 'weights'")
        if self.trained and self.name is None:
            raise ValueError("a teacher with 'weights' is not trained: leave out 'trained'")
        if self.name is not None and (self.accuracy is not None or self.classes is not None):
            raise ValueError("'accuracy' and 'classes' go with 'weights'; a teacher card has its own")
        if self.weights is None and self.entry is not None:
            raise ValueError("'entry' goes with 'weights'; a teacher card has its own")
        if self.resize is not None and self.accuracy is None:
            raise ValueError("'resize' says how the 'accuracy' was measured: give both")
        if self.accuracy is not None and self.classes is not None:
            raise ValueError("the accuracy of a teacher of other classes cannot be checked on these data")
        return self


class StudentChoice(NamedModel):
    """A model by name, with its own options, hook points and first weights."""

    image_size: int | None = Field(default=None, gt=0, description=IMAGE_SIZE)
    weights: str | None = Field(None, description="file with a state dict to start from")
    entry: Entry = None
    start: str | None = Field(
        None, description="teacher card of the same model to start from; with other classes, with a new last layer"
    )

    @model_validator(mode="after")
    def one_start(self) -> StudentChoice:
        if self.weights is not None and self.start is not None:
            raise ValueError("'weights' and 'start' cannot be combined")
        if self.weights is None and self.entry is not None:
            raise ValueError("'entry' goes with 'weights'")
        return self


class ComputeChoice(Strict):
    """How networks are computed. What is left open is measured once for a run ("auto"), or plain ("reference")."""

    mode: Literal["auto", "reference"] = Field(
        default="auto",
        description="for everything that is not set below: auto measures what is fastest, reference is "
        "float32, contiguous, eager",
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


class Range(Strict):
    """Numbers to try: evenly spread between two, or over their logarithm."""

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def some_width(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("'low' must be below 'high', and above 0 with 'log'")
        return self


class Tune(WithOptions):
    """Settings that every method tries before the comparison. Beside these keys, write parameters of one method
    (`at.beta`) or of all methods (`method.beta`), or fields of the protocol, each with a list or a range."""

    __pydantic_extra__: dict[str, Range | list[Any]] = Field(init=False)

    trials: int = Field(8, gt=1, le=MOST_TRIALS, description="settings that every method tries")
    seeds: list[int] = Field([100], min_length=1, description="seeds of the trials; the table must use others")
    validation: float | int = Field(
        0.2, gt=0, description="images (or share below 1) of the training set to choose by, unless 'data' sets one"
    )

    @model_validator(mode="before")
    @classmethod
    def lists_or_ranges(cls, given: Any) -> Any:
        for key, space in given.items() if isinstance(given, dict) else ():
            if key not in cls.model_fields and not isinstance(space, list | dict | Range):
                raise ValueError(f"'{key}' needs a list of values, as [1, 10], or a range, as {{low: 1, high: 10}}")
        return given

    @model_validator(mode="after")
    def something_once(self) -> Tune:
        if not self.spaces:
            raise ValueError("nothing is tuned: add a path with its values, as 'at.beta: [10.0, 100.0]'")
        if few := [key for key, space in self.spaces.items() if isinstance(space, list) and len(space) < 2]:
            raise ValueError(f"'{few[0]}' needs two values or more")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is given twice")
        return self

    @property
    def spaces(self) -> dict[str, Range | list[Any]]:
        """Dotted path -> what is tried there."""
        return dict(self.__pydantic_extra__)


class Recipe(Strict):
    """What a user writes. `compare` takes dotted paths of this very structure."""

    # Keys that are no part of a single cell.
    not_compared: ClassVar[tuple[str, ...]] = ("compare", "tune", "seeds", "title", "baseline")

    title: str = Field("", description="shown above the table")
    data: DataChoice
    target: TargetChoice | None = Field(
        None, description="unlabelled domain to adapt to; the table then shows the accuracy on its test set"
    )
    teacher: TeacherChoice | None = None
    student: StudentChoice
    protocol: dict[str, Any] = Field(description="a protocol card by name, with any of its fields beside it")
    method: dict[str, Any] = Field({}, description="a method card by name, with any of its fields or parameters")
    compare: dict[str, list[Any]] = Field({}, description="dotted recipe path -> the values to compare")
    tune: Tune | None = Field(None, description="settings that every method tries first, without the test set")
    baseline: str | None = Field(None, description="method that the table compares with; by default the first")
    seeds: Annotated[int, Field(ge=1)] | list[Seed] = Field(1, description="a count, or the seeds themselves")
    epochs: float | None = Field(None, gt=0, description="budget over all stages, in place of the protocol's")
    steps: int | None = Field(None, gt=0, description="budget over all stages, in optimizer steps")
    evaluations: Annotated[int, Field(ge=0, le=MOST_EVALUATIONS)] | Literal["epoch"] = Field(
        50, description="number of evenly spaced tests during the training, or 'epoch' for a test after every epoch"
    )
    compute: ComputeChoice = Field(ComputeChoice(), description="auto, reference, or a mapping that fixes parts")
    route: int | None = Field(
        None,
        gt=0,
        le=ROUTE_MOST,
        description="number of evenly spaced checkpoints of the student to keep, the last step included",
    )
    keep: Literal["best"] | None = Field(
        None,
        description="also keep the weights of the best evaluation: best on the validation part if there is one, else "
        "on the test set",
    )

    @model_validator(mode="after")
    def one_budget(self) -> Recipe:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("the budget is either 'epochs' or 'steps'")
        if self.target is not None and (self.tune is not None or self.data.tested_on == "validation"):
            raise ValueError("a target domain has no labels to choose by: leave out 'tune' and 'data.tested_on'")
        return self
