"""The runner's side of choosing how to compute: once for a run, kept beside its cells, the same on resume.
Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdbench.engine.compute import Computing
from kdbench.errors import UserError
from kdbench.files import write_json
from kdbench.recipe.schema import ComputeChoice

NAME = "compute.json"


def kept(folder: Path, choice: ComputeChoice) -> Computing | None:
    """How this run computes what was left open in such a way, if it began already."""
    entry = _entries(folder).get(key(choice))
    try:
        return Computing(**entry["computing"]) if entry else None
    except (TypeError, KeyError):
        raise UserError(
            "how this run computes is written in a form that this version does not know",
            where=str(folder / NAME),
            hint="remove the file: finished cells are kept, the others are tried anew",
        ) from None


def keep(folder: Path, choice: ComputeChoice, computing: dict[str, Any], why: str, tried: Sequence[Any]) -> Computing:
    """Remember a choice with what was measured for it."""
    entries = _entries(folder)
    entries[key(choice)] = {"asked": choice.fixed(), "computing": computing, "why": why, "tried": list(tried)}
    write_json(folder / NAME, entries)
    return Computing(**computing)


def of_records(folders: Sequence[Path]) -> Computing | None:
    """How finished cells were computed, from the first record that says it."""
    for folder in folders:
        try:
            compute = json.loads((folder / "record.json").read_text(encoding="utf-8"))["compute"]
            return Computing(
                compute["precision"], compute.get("layout", "contiguous"), bool(compute.get("compile", False))
            )
        except (OSError, ValueError, KeyError):
            continue
    return None


def key(choice: ComputeChoice) -> str:
    return json.dumps(choice.fixed(), sort_keys=True)


def _entries(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
