"""The objects that cards name, and where they fail."""

import importlib
import os
import traceback
from pathlib import Path
from typing import Any

from kdbench.errors import UserError


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
