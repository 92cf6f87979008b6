"""Checks of the settings of batch sources. Each raises a ValueError that names the setting and its value."""

from typing import Any


def at_least(settings: Any, least: float, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) >= least:
            raise ValueError(f"'{name}' cannot be {getattr(settings, name)}: it is at least {least}")


def above(settings: Any, bound: float, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) > bound:
            raise ValueError(f"'{name}' cannot be {getattr(settings, name)}: it lies above {bound}")


def two_betas(settings: Any) -> None:
    """Of Adam: `betas`, as many as there are in the class's default."""
    if len(settings.betas) != 2:
        raise ValueError(f"Adam has two betas, not {len(settings.betas)}: write betas: {[*type(settings).betas]}")
