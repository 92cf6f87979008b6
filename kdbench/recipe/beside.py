"""What stands beside a weight file: a student that kdbench trained brings along how its images were normalized, and the
classes that it knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from kdbench.cards import Normalization
from kdbench.errors import UserError
from kdbench.files import sha256_of

_RECORD, _STUDENT, _ROUTE = "record.json", "student.safetensors", "route"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Data(_Part):
    name: str
    classes: int
    only_classes: list[int] | None = None


class _Protocol(_Part):
    normalization: Normalization


class Training(_Part):
    """How a student was trained, as the record beside its weights says."""

    data: _Data
    target: _Data | None = None
    protocol: _Protocol

    @property
    def normalization(self) -> Normalization:
        """That of the student's images."""
        return self.protocol.normalization

    def knows(self, data: str, classes: int) -> bool:
        """Whether its classes are those of a data set."""
        return any((part.name, part.classes) == (data, classes) for part in (self.data, self.target) if part)


def training_of(file: Path) -> Training | None:
    """The training that left a weight file, a student's or one of the checkpoints on its way; None for any other file.

    Raises:
        UserError: a record that cannot be read, or of other weights.
    """
    inside_route = file.parent.name == _ROUTE
    record = (file.parent.parent if inside_route else file.parent) / _RECORD
    if not record.is_file() or not (inside_route or file.name == _STUDENT):
        return None
    try:
        plain: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        training = Training.model_validate(plain["spec"])
        hashes = {kept["file"]: kept["sha256"] for kept in plain.get("route") or ()} if inside_route else {}
        expected = (hashes if inside_route else plain.get("files") or {}).get(file.name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise UserError(
            f"the record beside the weights cannot be read: {next(iter(str(error).splitlines()), '')}",
            where=str(record),
            hint="copy the weights to another folder to use them without it",
        ) from None
    if expected is not None and expected != sha256_of(file):
        raise UserError(
            "these weights are not those of the record beside them: another sha256",
            where=str(file),
            hint="put the right file back, or copy this one to another folder to use it without the record",
        )
    return training
