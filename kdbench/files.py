"""Files: written atomically, hashed, and found in the folders where users keep weights."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kdbench.errors import UserError

_PACKAGE = Path(__file__).parent
# In a wheel, cards, recipes and small weights lie inside the package; in a checkout, beside it.
SHARE = _PACKAGE / "share" if (_PACKAGE / "share").is_dir() else _PACKAGE.parent


# What a run's folder holds beside those of its cells, and what a cell's holds.
RUN = "recipe.json"
RECORD, METRICS, LOGITS = "record.json", "metrics.jsonl", "test_logits.safetensors"
STUDENT, BEST = "student.safetensors", "student_best.safetensors"
CHECKPOINT, ROUTE, EVENTS = "checkpoint.pt", "route", "events"
# What is published of a finished cell, the record last: it makes a folder whole. Earlier versions kept no logits.
PUBLISHED = (METRICS, LOGITS, RECORD)
# What a cell that goes on elsewhere does not read.
UNREAD = (EVENTS, METRICS, LOGITS)


def files_of(folder: Path) -> dict[str, Path]:
    """All files of a folder by their names below it, without hidden ones."""
    found = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: file for name, file in found.items() if not file.name.startswith(".")}


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def home() -> Path:
    """Folder for what kdbench keeps between runs: `$KDBENCH_HOME`, else the user's cache folder."""
    if set_by_user := os.environ.get("KDBENCH_HOME"):
        return Path(set_by_user).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kdbench"


def folders_in(variable: str) -> list[Path]:
    """Folders that an environment variable names, several separated as in PATH."""
    return [Path(part).expanduser() for part in os.environ.get(variable, "").split(os.pathsep) if part]


def sha256_of(file: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic(file: Path) -> Iterator[Path]:
    """A temporary path beside `file` that takes its place when the block ends well. A reader, or a kill at any moment,
    finds the old file or the new one, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".part", dir=file.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(lock: Path, wait: float, otherwise: UserError) -> Iterator[None]:
    """Hold a lock file against other processes for as long as the block lasts.

    Args:
        wait: seconds to wait for who has it; -1: for ever.
        otherwise: what to raise when that was in vain.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    try:
        held.acquire(timeout=wait)
    except Timeout:
        raise otherwise from None
    try:
        yield
    finally:
        held.release()


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written. Only for who holds the folder's lock."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write text atomically."""
    with atomic(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: Path, data: Any) -> None:
    """Write JSON atomically, indented, keys in their own order. NaN is refused: it is not JSON."""
    write_text(file, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def no_formula(value: Any) -> Any:
    """A value for CSV that no spreadsheet computes: text that begins like a formula gets an apostrophe, which they
    hide."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    try:
        # A number, or several.
        [float(part) for part in value.split(" ")]
    except ValueError:
        return f"'{value}"
    return value


def weight_folders() -> list[Path]:
    """Where weight files are looked for, in order: `$KDBENCH_WEIGHTS` (several with ':'), ./weights, the cache, and
    what comes with kdbench."""
    return [*folders_in("KDBENCH_WEIGHTS"), Path("weights"), home() / "weights", SHARE / "registry" / "weights"]


def find_weights(file: str) -> Path | None:
    """A weight file by name in the weight folders, or by its own path; None when it is nowhere."""
    if os.path.isfile(path := Path(file).expanduser()):
        return path
    for folder in weight_folders():
        if os.path.isfile(found := folder / below(file)):
            return found
    return None


def below(file: str) -> str:
    """A file's name below a folder of weights that were sent from elsewhere: no path leads out of it."""
    return file.lstrip("/").replace("..", "up")
