"""The objects that cards name, and what their code may do when it runs."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kdbench.errors import CellError, UserError, device_advice, failure


def import_target(target: str) -> Any:
    """The object that a card's target (`module:object`) names. UserError where it cannot be imported."""
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's module can fail in any way when it is imported
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
        raise UserError(f"target '{target}' cannot be imported: {failure(error)}") from None


@contextmanager
def code_of(what: str, target: str = "") -> Iterator[None]:
    """Inside runs code that a card names: whatever it raises is an error of it that says where.

    Args:
        what: the card, as "source 'x'". target: of the card, where that is what is called.
    """
    try:
        yield
    except (UserError, CellError):
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's code can fail in any way
        reason, advice = in_words(error, target)
        raise UserError(f"{what}: {reason}", hint=advice) from None


@contextmanager
def told_in(what: str) -> Iterator[None]:
    """An error inside says what it is in.

    Args:
        what: as "method 'x', stage 'y'".
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error.what}", error.where, error.hint) from None


def in_words(error: BaseException, target: str = "") -> tuple[str, str | None]:
    """What a card's code says by an error, and what to do: a `ValueError` is meant to be read, others say where.

    Args:
        target: what was called, where it is known.
    """
    if isinstance(error, UserError):
        return error.what, error.hint
    if isinstance(error, ValueError):
        return str(error), device_advice(error)
    return failure(error, import_target(target) if target else None), device_advice(error)
