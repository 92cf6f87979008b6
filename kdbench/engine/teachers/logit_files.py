"""Tables of teacher logits as files: where they lie, how far they are filled. Imports no torch."""

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
from kdbench.files import home, locked, sha256_of_data, write_summed
from kdbench.forms import Open, Strict
from kdbench.reading import read_summed

logger = logging.getLogger("kdbench")

ABOUT = "table.json"
VALUES = "logits.bin"
# Bytes of a stored logit, by the precision in which it was computed.
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class LogitTable:
    """A table on disk.

    Attributes:
        key: everything that its values depend on.
        filled: images that it holds, as the bits of a number.
        seconds: that it took so far.
        sha256: of the whole file; None while it is being filled, and where that was cut off.
    """

    folder: Path
    name: str
    key: dict[str, Any]
    filled: int
    seconds: float
    sha256: str | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(images, views, classes)."""
        return self.key["images"], self.key["views"], self.key["classes"]

    @property
    def done(self) -> int:
        """How many images it holds."""
        return self.filled.bit_count()

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return math.prod(self.shape[1:]) * BYTES[self.key["precision"]]

    @property
    def bytes(self) -> int:
        """Size of the file. Images that it does not hold are holes in it and take no room."""
        return self.shape[0] * self.image_bytes

    def serves(self, images: int) -> bool:
        """Whether it can be used for images, given as the bits of a number."""
        return self.sha256 is not None and not images & ~self.filled


def table_at(key: dict[str, Any], name: str, among: Path | None = None) -> LogitTable:
    """The table of a key, as far as it is filled.

    Args:
        among: where it lies; None: where this machine keeps its own.
    """
    plain = re.sub(r"[^\w.-]", "_", name)
    folder = (among or tables_folder()) / f"{plain}-{key['precision']}-{sha256_of_data(key)[:10]}"
    found = read_table(folder)
    if found is not None and found.key != key:
        raise UserError("this table of teacher logits does not match its folder's name", str(folder), _AGAIN)
    return found or LogitTable(folder, name, key, 0, 0.0)


def note(table: LogitTable) -> None:
    """Write down what is known of a table beside its values."""
    about = {"name": table.name, "key": table.key, "done": table.done, "seconds": round(table.seconds, 1)}
    some = {"filled": f"{table.filled:x}"} if table.filled != _first(table.done) else {}
    whole = {"sha256": table.sha256} if table.sha256 is not None else {}
    write_summed(table.folder / ABOUT, about | some | whole)


def _first(n: int) -> int:
    """The first n images, as the bits of a number."""
    return (1 << n) - 1


def tables_folder() -> Path:
    return home() / "teacher_logits"


def tables() -> list[LogitTable]:
    """All tables on this machine, whole or not, by name. A damaged one is told and left out."""
    found = []
    for folder in sorted(tables_folder().glob("*")):
        try:
            found.append(read_table(folder))
        except UserError as error:
            logger.warning("%s", error)
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
    # Where these are not the first ones.
    filled: str | None = Field(default=None, pattern="^[0-9a-f]+$")
    seconds: float = Field(ge=0)
    sha256: str | None = None


_AGAIN = "remove its folder and fill it again ('kdbench logits fill RECIPE')"


def read_table(folder: Path) -> LogitTable | None:
    """The table of a folder; None where there is none. UserError where what it says of itself is damaged."""
    if not (folder / ABOUT).exists():
        return None
    about = read_summed(_TableFile, folder / ABOUT, _AGAIN)
    filled = _first(min(about.done, about.key.images)) if about.filled is None else int(about.filled, 16)
    if filled.bit_count() != about.done or filled >> about.key.images:
        what = "this table of teacher logits is damaged: it says that it holds other images than there are"
        raise UserError(what, str(folder), _AGAIN)
    return LogitTable(folder, about.name, about.key.model_dump(), filled, about.seconds, about.sha256)


def filling(folder: Path) -> AbstractContextManager[None]:
    """The right to change a table. UserError where another process has it."""
    taken = UserError("another process fills this table", where=str(folder), hint="wait for it, or stop it")
    return locked(folder.with_name(f".{folder.name}.lock"), 0.5, taken)
