"""Resolved data sets and networks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field

from kdbench.cards import DataFields, Weights
from kdbench.files import expanded
from kdbench.forms import IMAGE_SIZE
from kdbench.image_cards import Normalization
from kdbench.models.points import POINT_GROUPS, numbered
from kdbench.names import is_content
from kdbench.recipe.choices import DataPart
from kdbench.recipe.coded import Coded, Spec, TargetSpec


class DataSpec(DataPart, DataFields, TargetSpec):
    def images_key(self) -> str:
        """What tells which images they are, before any are left out."""
        return self.model_dump_json(include={"name", "target", "options", "source_sha256", "root"})

    def roots(self, others: Iterable[Path]) -> list[Path]:
        """Folders searched for these data: its own, else the others."""
        return [expanded(self.root, "data.root")] if self.root else [expanded(other, "--data") for other in others]


class WeightsSpec(Coded, Weights):
    """The weights of a teacher card."""

    @property
    def choice(self) -> dict[str, str]:
        """What decides beside the file which weights are read: empty for most."""
        code = self.counts_as.get(self.layout or "", "")
        return {
            **({"entry": self.entry} if self.entry is not None else {}),
            # A card's own code is as old as its file's sha256, a user's may change.
            **({"weights_layout": code} if is_content(code) else {}),
        }


class ModelSpec(TargetSpec):
    hooks: dict[str, str] | Literal["derived"]
    image_size: int | None = Field(default=None, description=IMAGE_SIZE)
    weights: str | None = None
    weights_sha256: str | None = None
    entry: str | None = None
    start: WeightsSpec | None = None
    parts: list[PartSpec] = Field(default=[], description="of several networks as one, by whom they are")

    def untrained(self) -> ModelSpec:
        """This model with first weights."""
        return self.model_copy(update={"weights": None, "entry": None, "start": None})

    def not_started(self) -> ModelSpec:
        """This model without the card's weights that it will start from, which may not be here yet."""
        return self.model_copy(update={"start": None})

    def takes(self, data: DataSpec) -> DataSpec:
        """The data as this model takes them: with its own size of images."""
        own = self.image_size
        return data if own in (None, data.image_size) else data.model_copy(update={"image_size": own})

    def seen_with(self, data: DataSpec) -> ModelSpec:
        """This model for those data, whose own size of images is said by them alone."""
        return self if self.image_size != data.image_size else self.model_copy(update={"image_size": None})

    def reading(self, points: set[str]) -> ModelSpec:
        """This model with only those hook points (or members of groups) that are read."""
        if isinstance(self.hooks, str):
            return self
        groups = [
            (numbered(name)[0], POINT_GROUPS[numbered(name)[1]]) for name in points if numbered(name)[1] in POINT_GROUPS
        ]

        def read(point: str) -> bool:
            number, own = numbered(point)
            return point in points or any(number == of and group.fullmatch(own) for of, group in groups)

        return self.model_copy(update={"hooks": {p: at for p, at in self.hooks.items() if read(p)}})


class PartSpec(Spec):
    """One of several networks that are one."""

    model: ModelSpec
    normalization: Normalization
