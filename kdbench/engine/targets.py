"""The objects that cards name, and what their code may do when it runs."""

import importlib
from typing import Any

from kdbench.errors import UserError, failure


def import_target(target: str) -> Any:
    """The object that a card's target (`module:object`) names."""
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's module can fail in any way when it is imported
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
        raise UserError(f"target '{target}' cannot be imported: {failure(error)}") from None
