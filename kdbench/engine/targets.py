"""The objects that cards name."""

import importlib
from typing import Any

from kdbench.errors import UserError


def import_target(target: str) -> Any:
    """The object that a card's target (`module:object`) names."""
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # noqa: BLE001 - a user's module can fail in any way when it is imported
        raise UserError(f"target '{target}' cannot be imported: {type(error).__name__}: {error}") from None
