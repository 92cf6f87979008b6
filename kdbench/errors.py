"""Errors: what the user can fix, and a cell that failed."""

import difflib
import inspect
import math
import os
import re
import sysconfig
import traceback
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

# Folders of code that is nobody's own: kdbench's, Python's, and installed packages.
_OTHERS = tuple(f"{folder}{os.sep}" for folder in (Path(__file__).parent, sysconfig.get_path("stdlib")))
# Of code that only calls that of others.
_CALLING = ("engine", "recipe", "data/transforms.py", "models/hooks.py", "models/probing.py")
_CALLERS = tuple(str(Path(__file__).parent / part) for part in _CALLING)
_PACKAGES = {"site-packages", "dist-packages"}
_ENDLESS = re.compile(r"(\S{300})\S{200,}")


class UserError(Exception):
    """Something the user can fix. Becomes one message and exit code 2, never a traceback.

    Args:
        what: what is wrong, in one sentence.
        where: file and line, model and hook point, or command line.
        hint: what to do about it.
    """

    def __init__(self, what: str, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = _readable(what), where and _readable(where), hint and _readable(hint)
        super().__init__(self.what)

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  {self.hint}" if self.hint else head

    def __reduce__(self) -> tuple[type, tuple[str, str | None, str | None]]:
        return type(self), (self.what, self.where, self.hint)


class SharedChange(UserError):
    """A cell changed in place what other cells of its step are given: no cell can go on from there."""


# What a cell's failure begins with whose loss grew out of all bounds.
NOT_FINITE = "the loss was not finite"


class CellError(Exception):
    """A cell that cannot go on (a loss that is not finite). The other cells continue; exit code 1."""


def _readable(text: str) -> str:
    """A message in which no word goes on for ever, as a name in a damaged file may, and all characters are seen."""
    seen = (one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text)
    return _ENDLESS.sub(r"\1…", "".join(seen))


def shortened(value: object) -> str:
    """A value as it is shown in a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def counted(number: float, thing: str, form: str = "") -> str:
    """'1 cell', '2 cells', '3 classes': a number, in this form, with the thing that it counts."""
    ending = "es" if thing.endswith(("s", "x", "tch")) else "s"
    return f"{number:{form}} {thing}{'' if number == 1 else ending}"


def number_meant(text: str) -> str:
    """How to write the number that a text seems to mean."""
    for meant, said in (
        (text, "write a number without quotes"),
        (text.replace(",", ""), "write a number without commas, with a decimal point"),
        (text.removesuffix("%"), "write a number without %"),
    ):
        with suppress(ValueError):
            if math.isfinite(float(meant)):
                return said
    return "write a number"


def listed(words: Sequence[str], most: int) -> str:
    """'a, b, …': so many of some words at most."""
    return ", ".join(words[:most]) + (", …" if len(words) > most else "")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def failure(error: BaseException, called: object = None) -> str:
    """How code of the user's failed, in one line: with what, what it said, and the place (file:line) of the user's own
    code, or else of the last frame outside torch.

    Args:
        called: what kdbench called there, or its name. Where the call itself fails, as by a wrong argument, the place
            is its own, and never kdbench's call.
    """
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith("<")]
    torch, callers = f"{os.sep}torch{os.sep}", () if called is None else _CALLERS
    others = (one for one in frames if torch not in one.filename and not one.filename.startswith(callers))
    chosen = [one for one in frames if _own(one.filename)] or [*others]
    place = (chosen[-1].filename, chosen[-1].lineno) if chosen else _written_at(called)
    return _told(error) + (f" ({Path(place[0]).name}:{place[1]})" if place else "")


def _written_at(called: object) -> tuple[str, int] | None:
    """The file of a class or function and its line there; None of anything else."""
    try:
        return inspect.getfile(called), inspect.getsourcelines(called)[1]  # type: ignore[arg-type]
    except (OSError, TypeError):
        return None


def _own(file: str) -> bool:
    """Whether a file is the user's own code. What was made while running has a name like '<string>'."""
    return not file.startswith(("<", *_OTHERS)) and not _PACKAGES & {*Path(file).parts}


def _told(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it ends the program by 'sys.exit({'' if error.code is None else error.code})'"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


# What to do about code that chooses a device by itself.
ON_DEVICE = (
    "no .cuda() and no .to(device): kdbench moves networks itself; a new tensor takes 'device=x.device' of another"
)


def device_advice(error: BaseException) -> str | None:
    """What to do about code of the user's that chose a device by itself; None of other errors."""
    signs = ("same device", "NVIDIA driver", "with CUDA enabled", "No CUDA GPUs")
    return ON_DEVICE if any(sign in str(error) for sign in signs) else None


def raised_by_own_code(error: BaseException) -> UserError | None:
    """What an exception says that code of the user's own raised, or led to; None for any other."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _own(frame.filename)]
    if not frames:
        return None
    last = frames[-1]
    what = f"your own code failed: {_told(error)}"
    return UserError(what, f"{last.filename}:{last.lineno}", f"in {last.name}: {last.line}")


def check_word(word: str, known: Collection[str], where: str) -> None:
    """Raises UserError for an argument of the Python API that is none of these words."""
    if word not in known:
        raise UserError(f"there is no '{word}'", where, did_you_mean(str(word), known))


def did_you_mean(word: str, known: Iterable[str], own: str = "") -> str:
    """A hint that names the nearest known words, or when none is near all of them, and how one makes one's own."""
    known = sorted(known)
    near = [one for one in known if one.lower() == word.lower()]
    near = near or difflib.get_close_matches(word[:100], known, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    return (f"known: {listed(known, 20)}" if known else "nothing is known there") + (f"; {own}" if own else "")
