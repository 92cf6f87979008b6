"""What a run shows while it works."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from kdbench.cli import progress
from kdbench.engine.scheduling import CellState
from kdbench.recipe.planning import plan
from kdbench.registry import Registry


def test_what_a_cell_does_beside_its_steps_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {"data": "digits", "student": "wrn_10_1", "protocol": "digits", "steps": 8, "method": "ce"}
    cell = CellState(plan(recipe, Registry()).cells[0], 0, Path(), "ADI, seed 0", "running", 3, 8, "distillation")
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    lines = progress._Lines()
    lines.begin([cell], "title")
    lines.update(cell)
    assert "ADI" not in capsys.readouterr().err
    cell.doing = "adding synthesized images: batch 2 of 5, 12 s each"
    lines.update(cell)
    assert "ADI, seed 0: adding synthesized images: batch 2 of 5, 12 s each" in capsys.readouterr().err

    live = progress._Live()
    live.begin([cell], "title")
    try:
        console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(live._view())
    finally:
        live.end()
    shown = console.export_text()
    assert "batch 2 of 5" in shown and "3/8" in shown
