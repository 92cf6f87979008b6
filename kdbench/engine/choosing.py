"""The runner's side of choosing how to compute: once for a run, kept beside its cells, the same on resume.
Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdbench.cards import Strict
from kdbench.engine.compute import Computing
from kdbench.errors import UserError
from kdbench.files import write_json
from kdbench.reading import of_form, read_as
from kdbench.recipe.schema import ComputeChoice
from kdbench.record import RECORD, read_record

NAME = "compute.json"
_AGAIN = "remove the file: finished cells are kept, the others are tried anew"


class Chosen(Strict):
    """What was chosen for cells that leave the same things open, and what was measured for it."""

    asked: dict[str, Any]
    computing: Computing
    why: str
    tried: list[Any]


def kept(folder: Path, choice: ComputeChoice) -> Computing | None:
    """How this run computes what was left open in such a way, if it began already.

    Raises:
        UserError: the file is damaged, or says something else than the recipe does.
    """
    found = _entries(folder).get(key(choice))
    if found is None:
        return None
    computing = found.computing.plain()
    if other := [name for name, value in choice.fixed().items() if computing[name] != value]:
        raise UserError(
            f"it computes with {other[0]} {computing[other[0]]}, the recipe says {choice.fixed()[other[0]]}",
            where=str(folder / NAME),
            hint=_AGAIN,
        )
    return found.computing


def keep(folder: Path, choice: ComputeChoice, computing: dict[str, Any], why: str, tried: Sequence[Any]) -> Computing:
    """Remember a choice with what was measured for it."""
    chosen = Chosen(asked=choice.fixed(), computing=Computing(**computing), why=why, tried=list(tried))
    entries = _entries(folder) | {key(choice): chosen}
    write_json(folder / NAME, {name: entry.model_dump(mode="json") for name, entry in entries.items()})
    return chosen.computing


def of_records(folders: Sequence[Path]) -> Computing | None:
    """How finished cells were computed, from the first of them."""
    for folder in folders:
        compute = read_record(folder).compute
        plain = {"precision": compute.precision, "layout": compute.layout, "compile": compute.compile}
        plain["cuda_graphs"] = compute.device == "cuda"
        return of_form(Computing, plain, str(folder / RECORD), "remove the cell's folder: it is trained again")
    return None


def key(choice: ComputeChoice) -> str:
    return json.dumps(choice.fixed(), sort_keys=True)


def _entries(folder: Path) -> dict[str, Chosen]:
    return read_as(dict[str, Chosen], folder / NAME, _AGAIN) if (folder / NAME).exists() else {}
