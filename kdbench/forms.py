"""What the typed forms of cards and recipes have in common."""

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from kdbench.models.points import point_name

# What authors of methods call their stages and losses.
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][\w-]*$")]
PointName = Annotated[str, AfterValidator(point_name)]
Percent = Annotated[float, Field(ge=0, le=100, strict=True)]
# What cards and recipes say of the images that a network takes.
IMAGE_SIZE = "side of the images that it takes, if not the data card's: the views are resized for it"
RESIZE = "pixels to which the shorter side of test pictures was resized for that accuracy, if not the data card's"

# Of a weight file, on cards and in recipes.
Entry = Annotated[
    str | None,
    Field(
        description="which of several networks in the weight file to take, for example state_dict_ema; by "
        "default one that is not an average"
    ),
]


T = TypeVar("T")


def listed(said: T | list[T]) -> list[T]:
    """What may be said alone or as a list, as a list."""
    return said if isinstance(said, list) else [said]


class Strict(BaseModel):
    """Unknown keys are errors, text is never taken for a number, values do not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Open(BaseModel):
    """What is read of a file that may say more."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class WithOptions(BaseModel):
    """Options for a target stand beside the model's own keys."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Named(WithOptions):
    """A card's name with options for its target, beside each other: `{name: sgd, lr: 0.1}`."""

    name: str


class NamedModel(Named):
    """A model by name, with its own options and hook points."""

    hooks: dict[PointName, str] | None = Field(
        None, description="hook points in place of all of the network's own, as on a hooks card"
    )


class Card(Strict):
    paper: str | None = Field(None, description="key of a paper card")
    note: str | None = Field(None, description="what a reader should know")
