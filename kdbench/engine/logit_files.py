"""Tables of teacher logits as files: where they lie, how far they are filled. Imports no torch."""

import hashlib
import json
import logging
import math
import re
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from kdbench.errors import UserError
from kdbench.files import home, locked
from kdbench.forms import Open, Strict
from kdbench.reading import read_as

log = logging.getLogger("kdbench")

ABOUT = "table.json"
VALUES = "logits.bin"
# Bytes of a stored logit, by the precision in which it was computed.
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class LogitTable:
    """A table on disk.

    Attributes:
        key: everything that its values depend on.
        done: images that are filled.
        seconds: that it took so far.
        sha256: of the whole file, once it is whole.
    """

    folder: Path
    name: str
    key: dict[str, Any]
    done: int
    seconds: float
    sha256: str | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(images, views, classes)."""
        return self.key["images"], self.key["views"], self.key["classes"]

    @property
    def complete(self) -> bool:
        return self.done >= self.key["images"]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.key["precision"]]


def table_at(key: dict[str, Any], name: str, among: Path | None = None) -> LogitTable:
    """The table of a key, as far as it is filled.

    Args:
        among: where it lies; None: where this machine keeps its own.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    plain = re.sub(r"[^\w.-]", "_", name)
    folder = (among or tables_folder()) / f"{plain}-{key['precision']}-{digest[:10]}"
    found = read_table(folder)
    if found is not None and found.key != key:
        raise UserError("this table of teacher logits does not match its folder's name", str(folder), _AGAIN)
    return found or LogitTable(folder, name, key, 0, 0.0)


def tables_folder() -> Path:
    return home() / "teacher_logits"


def tables() -> list[LogitTable]:
    """All tables on this machine, whole or not, by name. A damaged one is told and left out."""
    found = []
    for folder in sorted(tables_folder().glob("*")):
        try:
            found.append(read_table(folder))
        except UserError as error:
            log.warning("%s", error)
    return [table for table in found if table is not None]


def clear(table: LogitTable) -> None:
    """Remove a table. UserError when it is being filled."""
    with filling(table.folder):
        (table.folder / ABOUT).unlink(missing_ok=True)
        shutil.rmtree(table.folder)


class _TableKey(Open):
    """What is read of a table's key."""

    images: int = Field(ge=1, strict=True)
    views: int = Field(ge=1, strict=True)
    classes: int = Field(ge=1, strict=True)
    precision: Literal["float32", "bfloat16"]


class _TableFile(Strict):
    name: str
    key: _TableKey
    done: int = Field(ge=0)
    seconds: float = Field(ge=0)
    sha256: str | None = None


_AGAIN = "remove its folder and fill it again ('kdbench logits fill RECIPE')"


def read_table(folder: Path) -> LogitTable | None:
    """The table of a folder; None where there is none. UserError where what it says of itself is damaged."""
    if not (folder / ABOUT).exists():
        return None
    about = read_as(_TableFile, folder / ABOUT, _AGAIN)
    return LogitTable(folder, about.name, about.key.model_dump(), about.done, about.seconds, about.sha256)


def filling(folder: Path) -> AbstractContextManager[None]:
    """The right to change a table. UserError where another process has it."""
    taken = UserError("another process fills this table", where=str(folder), hint="wait for it, or stop it")
    return locked(folder.with_name(f".{folder.name}.lock"), 0.5, taken)
