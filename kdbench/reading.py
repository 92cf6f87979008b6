"""Reads files that anybody may have written. They are data: limited in size and depth, of a known form, and names in
them stay inside their folder. Anything else is one message that names the file.
"""

from __future__ import annotations

import errno
import json
import math
import re
import unicodedata
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from kdbench.errors import UserError, shortened
from kdbench.files import CHECK_PATH, no_file, sha256_of_data

# Bytes of a file, levels of its nesting, and size of its whole numbers and of others (whose squares must be finite), at
# most. A record has 15 kB and ten levels.
LARGEST = 1 << 25
DEEPEST = 100
WIDEST = 1 << 63
HIGHEST = 1e100
# Bytes of a name: file systems take 255, and temporary files have longer names than those that they replace.
LONGEST = 200

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)

T = TypeVar("T")


def read_text(file: Path, hint: str | None = None, most: int = LARGEST) -> str:
    """The text of a regular file of at most so many bytes.

    Raises:
        UserError: absent, no regular file, too large, not UTF-8.
    """
    try:
        if not file.is_file() and (what := no_file(file)):
            raise UserError(what, where=str(file), hint=hint)
        with file.open("rb") as stream:
            content = stream.read(most + 1)
        if len(content) > most:
            raise UserError(f"this file is too large: more than {most >> 20} MB", where=str(file), hint=hint)
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError("cannot be read: there is no such file", where=str(file), hint=hint) from None
    except UnicodeError as error:
        what = f"this file is damaged, or not text in UTF-8: {error}"
        raise UserError(what, where=str(file), hint=hint or "save it as text in UTF-8") from None
    except OSError as error:
        # Not by the hint, which may say to remove the file: nothing is wrong with it.
        raise UserError(f"cannot be read: {error.strerror or error}", str(file), CHECK_PATH) from None
    except ValueError as error:
        raise UserError(f"this file is damaged: {error}", where=str(file), hint=hint) from None


def parsed(text: str, where: str, hint: str | None = None, finite: bool = True) -> Any:
    """JSON as plain data.

    Args:
        finite: refuse NaN and infinite numbers.

    Raises:
        UserError: no JSON, a key given twice, nested too deeply, a number or text that no program of ours writes.
    """
    try:
        data = json.loads(text, object_pairs_hook=_once)
        _check((), data, finite)
    except RecursionError:
        raise UserError(f"this file is damaged: nested more than {DEEPEST} deep", where=where, hint=hint) from None
    except ValueError as error:
        raise UserError(f"this file is damaged: {error}", where=where, hint=hint) from None
    return data


def read_json(file: Path, hint: str | None = None, most: int = LARGEST) -> Any:
    """A JSON file as plain data. UserError as `read_text` and `parsed` have it."""
    return parsed(read_text(file, hint, most), str(file), hint)


def read_as(form: type[T], file: Path, hint: str | None = None, most: int = LARGEST) -> T:
    """A JSON file as an instance of a model or another type.

    Raises:
        UserError: what `read_json` refuses, or another form; it names the place in the file.
    """
    return of_form(form, read_json(file, hint, most), str(file), hint)


def read_summed(form: type[T], file: Path, hint: str | None = None) -> T:
    """The same of a file by `files.write_summed`. UserError also where its sum is another; earlier versions wrote
    none."""
    plain = read_json(file, hint)
    if isinstance(plain, dict) and (written := plain.pop("sum", None)) not in (None, sha256_of_data(plain)):
        what = f"this file is damaged: its sum is not the one that was written, {shortened(written)}"
        raise UserError(what, where=str(file), hint=hint)
    return of_form(form, plain, str(file), hint)


def of_form(form: type[T], data: Any, where: str, hint: str | None = None) -> T:
    """Plain data as an instance of a model or another type. UserError with the place of what does not fit."""
    try:
        return TypeAdapter(form).validate_python(data)
    except ValidationError as error:
        raise UserError(f"this file is damaged: {fault(error)}", where=where, hint=hint) from None


def fault(error: ValidationError) -> str:
    """The first thing that pydantic found in data, and where."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    mapping = first["type"] in ("model_type", "dataclass_type", "dict_type")
    said = "this should be a mapping" if mapping else first["msg"]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return (f"'{place}': {said}" if place else said) + more


def plain_name(name: str) -> str:
    """`name`, if it can name a folder on every system and nothing else. ValueError says why it cannot."""
    shown = repr(name if len(name) <= 60 else f"{name[:60]}…")
    if not name.strip(". "):
        raise ValueError(f"{shown} cannot be a folder name")
    if name[0] == "." or name[0].isspace() or name[-1] == "." or name[-1].isspace():
        raise ValueError(f"the name {shown} begins with a dot or a space, or ends with one")
    if bad := re.search(r'[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff<>:"/\\|?*]', name):
        raise ValueError(f"the name {shown} holds {bad[0]!r}, which not every system takes")
    if _DEVICES.fullmatch(name):
        raise ValueError(f"the name {shown} is that of a device on Windows")
    if len(name.encode()) > LONGEST:
        raise ValueError(f"the name {shown} has more than {LONGEST} bytes")
    return name


def same_name(a: str, b: str) -> bool:
    """Whether two names are one folder on a system that tells neither cases nor forms of Unicode apart."""
    a, b = (unicodedata.normalize("NFC", name).casefold() for name in (a, b))
    return a == b


def inside(folder: Path, *names: str, where: str | None = None) -> Path:
    """The path below a folder to which names lead that came from data.

    Args:
        where: they stand; the folder where absent.

    Raises:
        UserError: a name that is no plain one, or a link on the way that leaves the folder.
    """
    try:
        path = folder.joinpath(*map(plain_name, names))
    except ValueError as error:
        hint = "names in it must stay inside this folder"
        raise UserError(str(error), where=where or str(folder), hint=hint) from None
    try:
        # Python 3.13 resolves a link to itself without an error.
        within = path.resolve().is_relative_to(folder.resolve()) and not _circular(path)
    except (OSError, RuntimeError):
        within = False
    if not within:
        raise UserError(
            f"'{'/'.join(names)}' is a link that points outside the folder",
            where=where or str(folder),
            hint="replace the link by what it points to",
        )
    return path


def _circular(path: Path) -> bool:
    """Whether a link leads to itself."""
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _check(path: tuple[Any, ...], value: Any, finite: bool) -> None:
    """Raises ValueError for a number or text that no program of ours writes, RecursionError for too deep a nesting."""
    if len(path) >= DEEPEST:
        raise RecursionError
    texts = [value, *path[-1:]]
    if bad := next((found for text in texts if isinstance(text, str) and (found := CONTROL.search(text))), None):
        raise ValueError(f"a text contains the character {bad[0]!r}")
    place = ".".join(map(str, path))
    if isinstance(value, float) and finite and not math.isfinite(value):
        raise ValueError(f"'{place}': {value} is not a number")
    if isinstance(value, float) and math.isfinite(value) and abs(value) > HIGHEST:
        raise ValueError(f"'{place}': this number is too large")
    if isinstance(value, int) and abs(value) > WIDEST:
        raise ValueError(f"'{place}': this number is too large")
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check((*path, key), inner, finite)
