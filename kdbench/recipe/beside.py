"""The record next to a weight file: how the images of a student that kdbench trained were normalized, their size, and
which classes it knows."""

from pathlib import Path

from pydantic import AliasPath, BaseModel, ConfigDict, Field

from kdbench.errors import UserError
from kdbench.files import RECORD, ROUTE, STUDENT, sha256_of
from kdbench.image_cards import Normalization
from kdbench.reading import read_as


class _RecordedPart(BaseModel):
    """As much of a record as is needed here."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class _RecordedData(_RecordedPart):
    name: str
    classes: int
    only_classes: list[int] | None = None
    image_size: int | None = None


class _RecordedCheckpoint(_RecordedPart):
    file: str
    sha256: str


class Origin(_RecordedPart):
    """How a student was trained, as the record beside its weights says.

    `normalization`: of the student's images. `own_size`: their pixels, where not those of the data. `fingerprint`: of
    the data. `accuracy`: on the test set of `target`, or of `data` where there is none; None for a checkpoint of a
    route.
    """

    data: _RecordedData = Field(validation_alias=AliasPath("spec", "data"))
    target: _RecordedData | None = Field(None, validation_alias=AliasPath("spec", "target"))
    normalization: Normalization = Field(validation_alias=AliasPath("spec", "protocol", "normalization"))
    own_size: int | None = Field(None, validation_alias=AliasPath("spec", "student", "image_size"))
    fingerprint: str = Field(validation_alias=AliasPath("data", "fingerprint"))
    accuracy: float | None = Field(ge=0, le=100, validation_alias=AliasPath("result", "test", "last"))
    files: dict[str, str] = {}
    route: list[_RecordedCheckpoint] = []

    @property
    def image_size(self) -> int | None:
        """Pixels of the sides of the images that it took; None where an older record does not say."""
        return self.own_size or self.data.image_size

    def knows(self, data: str, classes: int) -> bool:
        """Whether its classes are those of a data set."""
        return any((part.name, part.classes) == (data, classes) for part in (self.data, self.target) if part)


def origin_of(file: Path) -> Origin | None:
    """The training that left a weight file, a student's or one of the checkpoints on its way; None for any other file.

    Raises:
        UserError: a record that cannot be read, or of other weights.
    """
    inside_route = file.parent.name == ROUTE
    record = (file.parent.parent if inside_route else file.parent) / RECORD
    if not record.is_file() or not (inside_route or file.name == STUDENT):
        return None
    training = read_as(Origin, record, "copy the weights to another folder to use them without it")
    hashes = {kept.file: kept.sha256 for kept in training.route} if inside_route else training.files
    if (expected := hashes.get(file.name)) is not None and expected != sha256_of(file):
        hint = "restore the right file, or copy this one to another folder to use it without the record"
        raise UserError("these weights do not match the record next to them (different sha256)", str(file), hint)
    return training.model_copy(update={"accuracy": None}) if inside_route else training
