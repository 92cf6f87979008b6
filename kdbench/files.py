"""Files: written atomically, hashed, and found in the folders where users keep weights."""

import errno
import getpass
import glob
import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from kdbench.errors import CellError, UserError, shortened

PACKAGE = Path(__file__).parent
# In a wheel, cards, recipes and small weights lie inside the package; in a checkout, beside it.
SHARE = PACKAGE / "share" if (PACKAGE / "share").is_dir() else PACKAGE.parent


# Bytes that are left on a disk on which nothing more can be written, at most.
FULL = 1 << 16

# What a run's folder holds beside those of its cells, and what a cell's holds.
RUN = "recipe.json"
RECORD, METRICS, LOGITS = "record.json", "metrics.jsonl", "test_logits.safetensors"
STUDENT, BEST = "student.safetensors", "student_best.safetensors"
CHECKPOINT, ROUTE, EVENTS, ERROR = "checkpoint.pt", "route", "events", "error.txt"
# Of these, what a finished cell has none of any more: where it stopped, and why it once failed.
UNFINISHED = (CHECKPOINT, ERROR)
# What is published of a finished cell, the record last: it makes a folder whole. Earlier versions kept no logits.
PUBLISHED = (METRICS, LOGITS, RECORD)
# What only people read.
UNREAD = (EVENTS, METRICS, LOGITS)
# Folders beside those of runs: of trained teachers, and of what batch sources make once for several cells.
TEACHERS, SOURCES = OWN_FOLDERS = ("teachers", "sources")
# What the name of a run ends with that tries settings for another.
TRIALS = ".trials"


def files_of(folder: Path) -> dict[str, Path]:
    """All files of a folder by their names below it, without hidden ones."""
    found = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: file for name, file in found.items() if not file.name.startswith(".")}


def files_to_send(folder: Path) -> dict[str, Path]:
    """Those from which a cell goes on elsewhere, or learns: all but what only people read."""
    return {name: file for name, file in files_of(folder).items() if not name.startswith(UNREAD)}


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def expanded(path: str | Path, where: str | None = None) -> Path:
    """A path that the user gave, with `~` and `~name` as the home folders that they stand for.

    Args:
        where: it stands.

    Raises:
        UserError: nobody knows that home folder, and nothing here is called so.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        if os.path.lexists(path):
            return Path(path)
        what = f"there is no home folder '{Path(path).parts[0]}', as '{path}' has it"
        raise UserError(what, where, "write the whole path") from None


def no_file(path: Path) -> str | None:
    """What stands at a path in place of a file; None where nothing does."""
    if path.is_dir():
        return "this is a folder, not a regular file"
    if path.is_symlink():
        return f"this is a link to '{os.readlink(path)}', where nothing is"
    return "this is not a regular file" if path.exists() else None


def is_recipe(path: Path) -> bool:
    """Whether a path is named as recipes are."""
    return path.suffix in (".yaml", ".yml")


def meant(path: Path, wanted: str, holds: str) -> str:
    """A hint where a command got another path than it takes: which folders it takes, and which are probably meant.

    Args:
        holds: the file that such a folder holds: of a run, or of a cell.
    """
    name = path.stem if is_recipe(path) else path.name
    below = (holds, f"*/{holds}") if holds == RUN else (holds, f"*/{holds}", f"*/*/{holds}")
    folders = [folder for folder in (path, Path("runs") / name, Path("results") / name) if folder.is_dir()]
    found = [file.parent for folder in folders for place in below for file in sorted(folder.glob(place))]
    shown = [f"'{one}'" for one in dict.fromkeys(found) if one.parent.name != TEACHERS]
    as_these = f", as {', '.join(shown[:3])}{' …' if len(shown) > 3 else ''}" if shown else f", which holds a {holds}"
    return f"{'this is a recipe: ' if is_recipe(path) else ''}give {wanted}{as_these}"


def paths_of(given: str | Path | Iterable[str | Path], where: str | None = None) -> tuple[Path, ...]:
    """Paths that the user gave: one, or several.

    Args:
        where: they stand.

    Raises:
        UserError: something else than a path, or an unknown home folder.
    """
    each = (given,) if isinstance(given, str | Path) else tuple(given)
    if other := [one for one in each if not isinstance(one, str | os.PathLike)]:
        raise UserError(f"a path is a text or a Path, not {shortened(other[0])}", where)
    return tuple(expanded(one, where) for one in each)


def home() -> Path:
    """Folder for what kdbench keeps between runs: `$KDBENCH_HOME`, else the user's cache folder."""
    if set_by_user := os.environ.get("KDBENCH_HOME"):
        return expanded(set_by_user, "KDBENCH_HOME")
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return expanded(cache, "XDG_CACHE_HOME") / "kdbench"
    try:
        return Path.home() / ".cache" / "kdbench"
    except RuntimeError:
        hint = "set KDBENCH_HOME to a folder for what kdbench keeps between runs"
        raise UserError("this user has no home folder", hint=hint) from None


def name_user() -> None:
    """Give a user without a name, as containers have them, its number for a name: torch cannot train without one."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        if sys.platform != "win32":
            os.environ["USER"] = str(os.getuid())


def folders_in(variable: str) -> list[Path]:
    """Folders that an environment variable names, several separated as in PATH."""
    return [expanded(part, variable) for part in os.environ.get(variable, "").split(os.pathsep) if part]


def sha256_of(file: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def damaged_part(file: Path) -> str | None:
    """Of a zip archive, as torch.save writes, a part whose bytes are not those that were written; None of other files.
    torch.load compares no checksums, and takes wrong values for right ones."""
    if not zipfile.is_zipfile(file):
        return None
    try:
        with zipfile.ZipFile(file) as parts:
            return parts.testzip()
    except Exception:  # noqa: BLE001 - zipfile fails in many ways on wrong headers
        return file.name


_DISK_FULL = "the disk is full"


def disk_full(error: BaseException) -> UserError | None:
    """What is said of an error where it is a full disk; None for any other."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    # Writers in Rust, as safetensors', say the number in their words.
    if getattr(error, "errno", None) not in codes and not any(f"(os error {code})" in str(error) for code in codes):
        return None
    # Of a copy the second is written.
    file = getattr(error, "filename2", None) or getattr(error, "filename", None)
    what = f"{_DISK_FULL}: {file or 'nothing more can be written'}"
    return UserError(what, hint="make room and repeat the command: what is finished is kept")


def failed(what: str, why: Collection[str]) -> UserError | CellError:
    """What to raise where cells failed: what the user can mend, where a full disk is why all of them did.

    Args:
        what: is said. why: what was said of each cell.
    """
    return UserError(what) if all(one.startswith(_DISK_FULL) for one in why) else CellError(what)


# What to do about a path that the system refuses.
CHECK_PATH = "check that the path exists, is not too long, and can be read or written"


def refused(error: BaseException) -> UserError | None:
    """What is said of an error where the system refuses a path, as on a full disk; None for any other."""
    if full := disk_full(error):
        return full
    if not isinstance(error, OSError) or error.strerror is None or error.filename is None:
        return None
    return UserError(error.strerror.lower(), str(error.filename), CHECK_PATH)


def weight_files(folder: Path) -> list[Path]:
    """The last weights that a finished cell left in its folder, and its route; none where they are not kept."""
    return [file for file in (folder / STUDENT, *sorted((folder / ROUTE).glob("*"))) if file.is_file()]


@contextmanager
def atomic(file: Path) -> Iterator[Path]:
    """A temporary path beside `file` that takes its place when the block ends well. A reader, or a kill at any moment,
    finds the old file or the new one, never a part.

    Raises:
        OSError: whoever wrote it failed on a full disk, whatever they call that.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    try:
        # Made here, so that it has the permissions of any new file, whoever writes it.
        temporary.touch(exist_ok=False)
    except OSError as error:
        # The name that is known.
        error.filename = str(file)
        raise
    permissions = temporary.stat().st_mode
    try:
        yield temporary
        # Some writers put a file of their own in its place, as safetensors does, which only its owner may read.
        temporary.chmod(permissions)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except (UserError, TypeError, ValueError):
        raise
    except Exception as error:
        if disk_full(error) is None and shutil.disk_usage(file.parent).free >= FULL:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from error
    finally:
        temporary.unlink(missing_ok=True)


# What file systems say that know no locks, as some of clusters.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


def _acquire(held: BaseFileLock, wait: float, otherwise: UserError, waiting: Callable[[], None]) -> None:
    """Take a lock, as `locked` says."""
    try:
        held.acquire(timeout=0)
    except Timeout:
        waiting()
        try:
            held.acquire(timeout=wait)
        except Timeout:
            if not isinstance(held, SoftFileLock):
                raise otherwise from None
            # Nobody gives such a lock back for who was killed on another machine.
            advice = f"if nothing works there any more, remove {held.lock_file}"
            hint = f"{otherwise.hint}; {advice}" if otherwise.hint else advice
            raise UserError(otherwise.what, otherwise.where, hint) from None


@contextmanager
def locked(lock: Path, wait: float, otherwise: UserError, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock file against other processes for as long as the block lasts.

    Args:
        wait: seconds to wait for who has it; -1: for ever.
        otherwise: what to raise when that was in vain.
        waiting: called where there is something to wait for.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    held: BaseFileLock = FileLock(lock)
    try:
        _acquire(held, wait, otherwise, waiting)
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in _NO_LOCKS:
            raise
        # Under another name: the file of a lock that was given back stays, and would count as held.
        held = SoftFileLock(f"{lock}ed")
        _acquire(held, wait, otherwise, waiting)
    try:
        yield
    finally:
        held.release()


# In a workplace: held for as long as somebody works there; and what was in the place that is to be taken.
_AT_WORK, BEFORE = ".lock", "before"


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target`, in which to make what takes its place. It is removed at the end.

    Who had moved what was there to `BEFORE`, and put nothing in its place, gives that back. What killed processes left
    of theirs goes first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}.????????"):
        # Nobody makes anything there without holding the lock.
        if {file.name for file in left.glob("*")} > {_AT_WORK}:
            with suppress(UserError, OSError), locked(left / _AT_WORK, 0, UserError("somebody works there")):
                _give_back(left, target)
                shutil.rmtree(left)
    with (
        tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary,
        locked(Path(temporary) / _AT_WORK, -1, UserError("somebody works there", temporary)),
    ):
        try:
            yield Path(temporary)
        finally:
            _give_back(Path(temporary), target)


def _give_back(place: Path, target: Path) -> None:
    if (place / BEFORE).exists() and not target.exists():
        (place / BEFORE).rename(target)


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written. Only for who holds the folder's lock."""
    # The second is how safetensors calls what it writes.
    for part in (*folder.glob(".*.part"), *folder.glob(".tmp??????")):
        part.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write text atomically."""
    with atomic(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: Path, data: Any) -> None:
    """Write JSON atomically, indented, keys in their own order. NaN is refused: it is not JSON."""
    write_text(file, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_summed(file: Path, data: dict[str, Any]) -> None:
    """Write JSON with its own sum: nothing else would tell that a number in it has changed (`reading.read_summed`)."""
    write_json(file, data | {"sum": sha256_of_data(data)})


def sha256_of_data(data: Any) -> str:
    """sha256 of plain data as JSON, in hex. The order of keys does not count."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


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


def find_weights(file: str, where: str | None = None) -> Path | None:
    """A weight file by name in the weight folders, or by its own path; None when it is nowhere. `where`: its name
    stands."""
    if os.path.isfile(path := expanded(file, where)):
        return path
    for folder in weight_folders():
        if os.path.isfile(found := folder / below(file)):
            return found
    return None


def below(file: str) -> str:
    """A file's name below a folder of weights that were sent from elsewhere: no path leads out of it."""
    return file.lstrip("/").replace("..", "up")
