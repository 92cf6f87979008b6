"""What a card of a paper, and of somebody else's published numbers, may say."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from kdbench.errors import counted
from kdbench.forms import Card, Name, Named, Percent, Strict

MeanDeviation = Annotated[list[Percent], Field(min_length=2, max_length=2)]


def _words(value: Any) -> Any:
    return value["name"] if isinstance(value, dict) and list(value) == ["name"] else value


# Of keys that hold a card elsewhere: the registry writes a plain text out as a card's name.
Words = Annotated[str, BeforeValidator(_words)]


class PaperCard(Strict):
    title: str
    authors: str
    venue: str
    year: int
    url: str | None = None
    arxiv: str | None = None


class PublishedProtocol(Strict):
    """How published numbers came about. What a source does not say is absent."""

    epochs: float | None = Field(default=None, gt=0)
    extra_epochs: float | None = Field(default=None, gt=0, description="on top of `epochs`")
    batch_size: int | None = Field(default=None, gt=0)
    reported: Literal["last", "best"] | None = Field(default=None, description="last, or best on the test set")
    runs: int | None = Field(default=None, gt=0)
    optimizer: Words | None = Field(
        default=None, description="as 'SGD with momentum 0.9', or '… Nesterov momentum 0.9'"
    )
    learning_rate: float | None = Field(default=None, gt=0, description="the first one")
    weight_decay: float | None = Field(default=None, ge=0)
    schedule: Words | None = Field(
        default=None, description="of the learning rate, as '× 0.1 at 50/75 %': times gamma at shares of `epochs`"
    )
    augmentation: str | None = Field(
        default=None, description="as 'crop after padding 4 and flip', or '… reflect padding 4 …'"
    )
    note: str | None = None


class PublishedNetwork(Strict):
    name: str = Field(description="key of a model card where there is one")
    accuracy: Percent | None = None


class PublishedPair(Strict):
    """A column of a published table."""

    teacher: PublishedNetwork | None = None
    student: PublishedNetwork
    protocol: PublishedProtocol = Field(PublishedProtocol(), description="where this column departs from the table's")


class PublishedRow(Strict):
    """A method's row: one entry for each pair, null where the source has none."""

    title: str
    accuracies: list[Percent | MeanDeviation | None] = Field(description="or [mean, deviation]")
    protocol: PublishedProtocol = Field(PublishedProtocol(), description="where this row departs from the table's")


class PublishedCard(Card):
    """A table of somebody else's, copied: test accuracies in percent."""

    title: str
    source: str = Field(description="where the numbers were read")
    data: Named
    protocol: PublishedProtocol = PublishedProtocol()
    pairs: dict[Name, PublishedPair]
    methods: dict[Name, PublishedRow] = Field(description="under the key of a method card where there is one")

    @model_validator(mode="after")
    def one_entry_for_each_pair(self) -> PublishedCard:
        for name, row in self.methods.items():
            if len(row.accuracies) != len(self.pairs):
                raise ValueError(
                    f"'{name}': {len(row.accuracies)} in 'accuracies' for {counted(len(self.pairs), 'pair')}"
                )
        return self

    def protocol_of(self, method: str, pair: PublishedPair) -> PublishedProtocol:
        """The table's protocol with what the pair's column says otherwise, and the method's row after it."""
        found = self.protocol
        for own in (pair.protocol, self.methods[method].protocol):
            found = found.model_copy(update=own.model_dump(exclude_unset=True))
        return found
