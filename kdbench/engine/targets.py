"""The objects that cards name, and where they fail."""

import importlib
import os
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from kdbench.errors import UserError, first_line

# Folders of code that is nobody's own: kdbench's, Python's, and installed packages.
_OTHERS = tuple(f"{folder}{os.sep}" for folder in (Path(__file__).parents[1], sysconfig.get_path("stdlib")))
_PACKAGES = {"site-packages", "dist-packages"}


def import_target(target: str) -> Any:
    """The object that a card's target (`module:object`) names."""
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # noqa: BLE001 - a user's module can fail in any way when it is imported
        raise UserError(f"target '{target}' cannot be imported: {type(error).__name__}: {error}") from None


def where_raised(error: BaseException) -> str:
    """(file:line) of the last frame outside torch, where an error is most likely to be mended."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}torch{os.sep}" not in f.filename]
    return f"({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def raised_by_own_code(error: BaseException) -> UserError | None:
    """What an exception says that code of the user's own raised, or led to; None for any other."""

    def own(file: str) -> bool:
        # What was made while running has a name like '<string>'.
        return not file.startswith(("<", *_OTHERS)) and not _PACKAGES & {*Path(file).parts}

    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if own(frame.filename)]
    if not frames:
        return None
    last = frames[-1]
    what = f"{type(error).__name__}: {first_line(error)}"
    return UserError(f"your own code failed: {what}", f"{last.filename}:{last.lineno}", f"in {last.name}: {last.line}")
