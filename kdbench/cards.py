"""What a card of each kind may say. Every unknown key is an error."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from kdbench.forms import IMAGE_SIZE, RESIZE, Card, Entry, Name, Named, NamedModel, PointName, Strict, WithOptions
from kdbench.image_cards import AugmentationCard, Normalization, PixelSize
from kdbench.published import PaperCard, PublishedCard
from kdbench.schedules import share


def _share(text: str) -> str:
    share(text)
    return text


def _target(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
        raise ValueError("a target is written module:object")
    return text


def _term(name: str) -> str:
    if name == "loss":
        raise ValueError("a loss term cannot be called 'loss': metrics.jsonl calls the sum of all terms so")
    return name


def _module(name: str) -> str:
    if name in ("student", "teacher", "connectors"):
        raise ValueError(f"a module cannot be called '{name}': in 'trains' that is what every method has")
    return name


Share = Annotated[str, BeforeValidator(_share)]
Target = Annotated[str, AfterValidator(_target)]
TermName = Annotated[Name, AfterValidator(_term)]
ModuleName = Annotated[Name, AfterValidator(_module)]
Mode = Literal["train", "eval"]
Side = Literal["student", "teacher"]
Statistics = Literal["shared", "frozen", "separate"]


class CodeCard(Card):
    """A card that names code. Cells are hashed by its key and version, not by where the code lies."""

    target: Target
    version: int = Field(1, ge=1, description="raised whenever the code's numbers change for the same arguments")


class TargetCard(CodeCard):
    """A target with fixed options: connectors, schedules, optimizers."""

    options_of_target: ClassVar[str] = "Options of its target stand under 'args'"
    args: dict[str, Any] = {}


class ModelCard(TargetCard):
    hooks: str = Field("derived", description="key of a hooks card, or 'derived' to find them by running the network")
    examples: list[str] = Field([], description="names that a template key stands for")


class HookCard(Card):
    points: dict[PointName, str] = Field(
        description="hook point -> module path (its output), or input(path); around it channels_last(…)"
        " or channels_first(…), where running the network cannot tell the order of a map's axes"
    )


class LossCard(CodeCard):
    options_of_target: ClassVar[str] = "Options of a loss stand where a method names it: '{loss: KEY, OPTION: VALUE}'"
    inputs: list[Literal["student", "teacher", "other", "labels", "index", "mask"]] | None = Field(
        None, description="what its first arguments take, if their names do not say it"
    )
    soft_labels: bool = Field(
        False, description="its `labels` can be shares of the classes [N, K], as Mixup and CutMix make them"
    )
    by_step: str | None = Field(
        None, description="why the host must act at every step, so that a GPU cannot replay it; leave out if it can"
    )
    metrics: dict[Name, Target] = Field({}, description="logged at every evaluation, from the same tensors")
    references: dict[str, Target] = Field(
        {},
        description="metric -> class that computes what a student that ignores its input reaches; logged "
        "beside the metric",
    )
    shares: dict[str, str] = Field({}, description="metric in [0, 1] -> what it is a share of; shown in percent")

    @model_validator(mode="after")
    def _references_stand_beside_metrics(self) -> LossCard:
        for name, beside in (("references", self.references), ("shares", self.shares)):
            if strange := sorted(beside.keys() - self.metrics.keys()):
                there = ", ".join(self.metrics)
                raise ValueError(f"'{name}.{strange[0]}' belongs to no metric; known: {there}")
        if odd := next((name for name in self.metrics if name.endswith("_reference")), None):
            raise ValueError(f"a metric cannot be called '{odd}': the column of a metric's reference is called so")
        return self


class SourceCard(TargetCard):
    """A batch source: what makes a stage's input sets beside, or in place of, those of the data set."""

    settings: Target | None = Field(None, description="a dataclass whose fields are further options of the target")
    reads: list[Name] = Field([], description="input sets that it gets")
    logits: bool = Field(True, description="whether it also gets both networks' logits on these")
    gives: list[Name] = Field(description="input sets that it makes")
    teacher: bool = Field(True, description="whether it needs a teacher")


class OperationCard(TargetCard):
    """What a stage may do to its student before its first step."""

    teacher: bool = Field(True, description="whether it needs a teacher")


class AnalysisCard(TargetCard):
    """What may be asked of finished cells (`kdbench analyse`)."""

    title: str


class DataFields(BaseModel):
    """What a data card and the data of a cell both say."""

    classes: int
    channels: int
    image_size: PixelSize
    train: int = Field(description="images of the whole training set")
    test: int = Field(description="images of the test set")
    normalization: Normalization
    streamed: bool = Field(False, description="read from disk while training, for data larger than memory")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.image_size, self.image_size


class DatasetCard(DataFields, TargetCard):
    title: str
    licence: str | None = None
    source: str | None = None


class ProtocolCard(Card):
    """Everything about training that is not the method: a method departs from it only visibly."""

    follows: str | None = None
    batch_size: int = Field(gt=0)
    last_batch: Literal["keep", "drop"] = "keep"
    augmentation: AugmentationCard = AugmentationCard(padding=0, resized_crop=None, decoder=None, transforms=None)
    second: AugmentationCard | None = Field(
        None,
        description="augmentation of the input set `second`, other views of the batch's images; by default the same",
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay per step of a moving average of the student's weights, which is tested and kept "
        "instead of them",
    )
    label_smoothing: float | None = Field(
        None, ge=0, le=1, description="for every loss that has this option, unless its term sets it"
    )
    normalization: Normalization | None = Field(None, description="the student's; by default the data card's")
    optimizer: Named
    schedule: Named
    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def one_budget(self) -> ProtocolCard:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("the budget is either 'epochs' or 'steps', exactly one of them")
        return self


class Weights(Strict):
    file: str = Field(description="file name looked for in the weight folders, or a path")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    url: str | None = None
    layout: str | None = Field(default=None, description="module:object that turns the file's state dict into ours")
    entry: Entry = None


# A teacher's accuracy on its card is exact; other hardware may round a few images to the other side (percent points).
TEACHER_TOLERANCE = 0.1


class TeacherCard(Card):
    """A trained network.

    Weights by hash, a recipe that trains such, or both: the weights are used unless a recipe asks for training.
    """

    model: NamedModel
    data: Named
    weights: Weights | None = None
    recipe: str | None = None
    normalization: Normalization | None = None
    accuracy: float | None = Field(None, description="expected test accuracy in percent, checked after loading")
    image_size: int | None = Field(default=None, gt=0, description=IMAGE_SIZE)
    resize: int | None = Field(default=None, gt=0, description="beside 'accuracy': " + RESIZE)
    transfers: bool = Field(False, description="its features can teach on other data, its logits only on its own")
    licence: str | None = None
    source: str | None = None

    @model_validator(mode="after")
    def some_origin(self) -> TeacherCard:
        if self.weights is None and self.recipe is None:
            raise ValueError("a teacher has 'weights', or the 'recipe' that trains them, or both")
        return self


class TermFields(BaseModel):
    """What a loss term says on a card and in a cell."""

    input: Name = Field("data", description="input set whose values (and labels) the term takes")
    of: Side = Field(
        "student", description="network that gives the loss's `student`; `teacher` makes a term that trains the teacher"
    )
    against: Name | None = Field(None, description="input set on which the same network gives the loss's `other`")
    detach: bool = Field(True, description="no gradient goes through the loss's `teacher`")
    weight: float = 1.0
    layer_weights: Literal["equal", "halving"] | list[float] = "equal"


# A hook point, or a group of them of which each is taken by itself; or a list of both, taken at once.
Points = str | list[str]


class TermCard(TermFields, WithOptions):
    """One loss term. The loss function's own options stand beside these keys."""

    loss: str = Field(description="key of a loss card; or module:object of a loss without a card")
    hook: Points | None = Field(
        None, description="hook point or group, in both networks; for a list, the loss takes all of them at once"
    )
    student: Points | None = Field(None, description="hook point or group of the student alone")
    teacher: Points | None = Field(None, description="hook point or group of the teacher alone")
    connector: Named | None = Field(None, description="a connector card, or one of the method's modules")
    weight_schedule: Named | list[Named] | None = Field(
        None, description="factor of the weight; several are multiplied"
    )
    schedules: dict[str, Named] = Field(
        {}, description="option of the loss -> schedule that multiplies it over the stage"
    )


class ModuleCard(WithOptions):
    """A module of a method, alive over terms and stages: a connector that losses ask for by its name.

    The connector's own options stand beside these keys.
    """

    name: str = Field(description="key of a connector card")
    student: str = Field("logits", description="hook point of the student, for the module's size")
    teacher: str = Field("logits", description="hook point of the teacher, for the module's size")
    optimizer: Named | None = Field(None, description="its own optimizer; by default the student's")


class PredictsCard(WithOptions):
    """What the student answers through, in place of its own head.

    The connector's own options stand beside these keys.
    """

    name: str = Field(description="key of a connector card: it takes the student's hook point and gives logits")
    student: str = Field(description="hook point of the student")


class Modes(Strict):
    teacher: Mode = "eval"
    student: Mode = "train"


class Anchors(Strict):
    """Checkpoints of the teacher's own training, in whose order a stage learns: the stage becomes one stage for each.

    The last anchor is the converged teacher.
    """

    n: int = Field(gt=0, description="number of anchors; with greedy, at most so many until the converged teacher")
    choose: Literal["equal", "greedy", "converged"] = Field(
        "equal",
        description="equal intervals of the route; greedy, each where its distance to the student has grown; or the "
        "converged teacher each time, as a control",
    )
    rates: Literal["restart", "continue"] = Field(
        "restart", description="a new optimizer and the whole schedule for each anchor, or one over all of them"
    )
    budget: Literal["shared", "each"] = Field(
        "shared",
        description="divide the stage's steps evenly, or give all of them to each anchor, on top of the budget",
    )
    delta: float = Field(0.8, gt=0, description="greedy: relative growth of the divergence that ends an interval")
    images: int = Field(10_000, gt=0, description="greedy: number of images of the validation part to use, at most")


class StageFields(BaseModel):
    """What a stage says on a card and in a cell."""

    extra_epochs: float | None = Field(None, gt=0, description="budget on top of the protocol's, instead of a share")
    trains: list[Name] = Field(
        ["student"],
        description="student, connectors (those of the stage's own terms), teacher, or modules of the method",
    )
    clip: float | None = Field(None, gt=0, description="maximum norm of all gradients of an optimizer together")
    alternating: bool = Field(
        False,
        description="each step trains the teacher first; then everything is computed again for the student's terms",
    )
    modes: Modes = Modes()
    batch_norm: dict[Name, Statistics] = Field(
        {},
        description="what the student's batch norms do with an input set: add it to their running statistics (shared), "
        "use these without changing them (frozen), or use the batch's own statistics and change nothing (separate)",
    )


class StageCard(StageFields, Strict):
    share: Share | None = Field(
        None, description="part of the steps; one stage leaves it out and takes the rest; one with 0% is left out"
    )
    source: Named | None = Field(None, description="a batch source, beside the data set or in its place")
    anchors: Anchors | None = Field(
        None, description="learn from checkpoints of the teacher's route, one after another"
    )
    begins: Named | None = Field(None, description="an operation on the student, before the first step")
    losses: dict[TermName, TermCard]
    optimizer: Named | None = None
    schedule: Named | None = None
    teacher_optimizer: Named | None = Field(None, description="of a teacher that is trained; by default `optimizer`")
    teacher_schedule: Named | None = Field(None, description="of a teacher that is trained; by default `schedule`")


class PairCard(WithOptions):
    """What a source says of a pair of networks: values of the method's parameters stand beside these keys."""

    teacher: str | list[str] = Field(description="keys of model cards")
    student: str | list[str] = Field(description="keys of model cards")


class MethodCard(Card):
    title: str
    follows: str | None = Field(None, description="the source that this card follows")
    departs: list[str] = Field([], description="where paper, code and this card differ")
    parameters: dict[str, str | list[str]] = Field({}, description="short name -> dotted path in this card, or several")
    pairs: list[PairCard] = Field([], description="parameters that the source sets by pair of networks")
    starts_from: Literal["teacher"] | None = Field(
        None,
        description="the student starts from the teacher's weights and normalization; a classifier of more "
        "classes gets new rows",
    )
    modules: dict[ModuleName, ModuleCard] = Field({}, description="modules that terms and stages share, by name")
    predicts: PredictsCard | None = Field(
        None, description="module that the student predicts through, if not its own classifier"
    )
    stages: dict[Name, StageCard]


class StudyCard(Card):
    """Recipes that belong together: what `kdbench reproduce` runs."""

    title: str
    profiles: dict[Name, list[str]] = Field(description="profile -> recipes, by name or by path from the card's file")
    published: list[str] = Field([], description="keys of published tables to show beside the study's own numbers")

    @model_validator(mode="after")
    def some_recipes(self) -> StudyCard:
        if not self.profiles or not all(self.profiles.values()):
            raise ValueError("a study has at least one profile, and a profile at least one recipe")
        return self


KINDS: dict[str, type[BaseModel]] = {
    "models": ModelCard,
    "hooks": HookCard,
    "losses": LossCard,
    "sources": SourceCard,
    "operations": OperationCard,
    "analyses": AnalysisCard,
    "connectors": TargetCard,
    "methods": MethodCard,
    "schedules": TargetCard,
    "optimizers": TargetCard,
    "datasets": DatasetCard,
    "teachers": TeacherCard,
    "protocols": ProtocolCard,
    "transforms": TargetCard,
    "studies": StudyCard,
    "papers": PaperCard,
    "published": PublishedCard,
}
