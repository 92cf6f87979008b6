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
        live.update(cell)
        console.print(live.bars)
    finally:
        live.end()
    shown = console.export_text()
    assert "batch 2 of 5" in shown and "3/8" in shown


def test_running_cells_never_have_no_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"data": "digits", "student": "wrn_10_1", "protocol": "digits", "steps": 8, "method": "ce"}
    cells = [CellState(plan(recipe, Registry()).cells[0], i, Path(), state="running", total=800) for i in range(2)]
    lines = progress._Lines()
    lines.begin(cells, "title")
    lines.started -= 100
    for step, said in ((0, "about – left"), (400, "about 1 min 40 s left"), (799, "almost done"), (800, "almost done")):
        for cell in cells:
            cell.step = step
        assert said in lines.summary() and " 0 s" not in lines.summary()
