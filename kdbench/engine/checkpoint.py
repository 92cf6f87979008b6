"""Checkpoints: written whole or not at all, read without executing anything."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from kdbench.errors import CellError
from kdbench.files import CHECKPOINT, atomic, damaged_part, disk_full


def save(folder: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint of a cell. A full disk leaves the old one and ends the cell with a clear message."""
    try:
        with atomic(folder / CHECKPOINT) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:
        if full := disk_full(error):
            raise full from None
        raise CellError(f"the checkpoint could not be written to {folder}: {error}") from None


def load(
    folder: Path, key: dict[str, Any], entries: Collection[str], tell: Callable[[str], None] = lambda text: None
) -> dict[str, Any] | None:
    """The checkpoint of a cell, or None when there is none that can be used.

    Args:
        key: what must be equal for the state to fit (identity, teacher and data hashes); a checkpoint of another key
            or a damaged file is set aside, and the cell begins anew.
        entries: names of what the state must consist of. Another version of kdbench may have kept other things, and
            then its checkpoints are set aside as well.
        tell: is told of a checkpoint that was set aside.
    """
    file = folder / CHECKPOINT
    if not file.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        other = [name for name in key if state["key"].get(name) != key[name]]
        why = f"of other {', '.join(other)}" if other else "damaged" if damaged_part(file) else ""
        if not why and (state["key"] != key or state.keys() != {"key", *entries}):
            why = "of another version of kdbench"
    except Exception:  # noqa: BLE001 - a damaged file can fail in any way inside the unpickler
        why = "damaged"
    if why:
        tell(f"its checkpoint is {why}: set aside as {file.replace(file.with_suffix('.unusable'))}, it starts again")
        return None
    return state
