"""What a run shows while it works."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
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
        assert live.bars is not None
        console.print(live.bars)
    finally:
        live.end()
    shown = console.export_text()
    assert "batch 2 of 5" in shown and "3/8" in shown


@pytest.mark.parametrize("trains", [False, True])
def test_what_is_prepared_while_nothing_trains_is_shown(trains: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """As by 'kdbench logits fill', before or after a teacher was trained for it."""
    live = progress._Live()
    if trains:
        live.begin([], "teacher")
        live.end()
    live.doing("data digits")
    assert "preparing data digits" in capsys.readouterr().err


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the display sees, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def running(count: int, total: int = 800, **over: Any) -> list[CellState]:
    recipe = {"data": "digits", "student": "wrn_10_1", "protocol": "digits", "steps": 8, "method": "ce"}
    cell = plan(recipe, Registry()).cells[0]
    return [CellState(cell, i, Path(), state="running", total=total, **over) for i in range(count)]


def test_running_cells_never_have_no_time_left(clock: list[float]) -> None:
    cells = running(2)
    lines = progress._Lines()
    lines.begin(cells, "title")
    for step, said in (
        (0, "not known yet"),
        (50, "not known yet"),
        (425, "about 1 min 15 s left"),
        (799, "almost done"),
        (800, "almost"),
    ):
        for cell in cells:
            cell.step = step
            clock[0] = 1000 + step / 5
            lines.update(cell)
        assert said in lines.summary() and " 0 s" not in lines.summary()


def test_what_compiling_takes_is_not_taken_for_the_speed_of_the_rest(clock: list[float]) -> None:
    """Four steps of a GPU's program in two minutes, then a hundred a second."""
    (cell,) = cells = running(1, total=100_000)
    lines = progress._Lines()
    lines.begin(cells, "title")
    for second, step, said in (
        (60, 1, "not known yet"),
        (120, 4, "not known yet"),
        (121, 104, "not known yet"),
        (131, 1104, "about 16 min 29 s"),
    ):
        clock[0], cell.step = 1000.0 + second, step
        lines.update(cell)
        assert said in lines.summary()


def test_one_step_of_one_of_many_cells_is_no_speed(clock: list[float]) -> None:
    """Cells of one program tell of their steps one after the other: the first would make months of hours."""
    cells = running(24, total=4000)
    lines = progress._Lines()
    lines.begin(cells, "title")
    for second, step, tell, said in (
        (100, 50, cells, "not known yet"),
        (103, 52, cells[:1], "not known yet"),
        (103, 52, cells, "about 1 h 38 min left"),
    ):
        for cell in tell:
            clock[0], cell.step = 1000.0 + second, step
            lines.update(cell)
        assert said in lines.summary()


def test_steps_of_checkpoints_and_cells_finished_before_do_not_count(clock: list[float], tmp_path: Path) -> None:
    """A cell goes on at step 700, and a later one at 300; of two others one was finished before."""
    old, continued, later, new = running(4)
    for cell in (continued, later):
        cell.folder = tmp_path / str(cell.id)
        cell.folder.mkdir()
        (cell.folder / "checkpoint.pt").touch()
    old.state, old.total, later.state, new.state, new.total = "finished", 0, "waiting", "waiting", 0
    lines = progress._Lines()
    lines.begin([old, continued, later, new], "title")
    # Something else is said before its first step.
    lines.update(continued)
    for second, step in ((1, 700), (11, 750), (15, 770)):
        clock[0], continued.step = 1000.0 + second, step
        lines.update(continued)
    # 30, 800 and 800 steps, 5 a second: what the later one has done is not known yet.
    assert "1/4 cells finished" in lines.summary() and "about 5 min 26 s left" in lines.summary()
    clock[0], continued.step, continued.state, continued.accuracy = 1021.0, 800, "finished", 50.0
    lines.update(continued)
    for second, step in ((22, 300), (26, 320)):
        clock[0], later.step, later.state = 1000.0 + second, step, "running"
        lines.update(later)
    assert "about 4 min 34 s left" in lines.summary()  # 480 and 800 steps; 70 in 15 seconds


def test_a_failed_cell_is_neither_made_nor_left(clock: list[float]) -> None:
    failing, other = cells = running(2, total=1000)
    lines = progress._Lines()
    lines.begin(cells, "title")
    for second, step in ((100, 100), (200, 200)):
        clock[0] = 1000.0 + second
        for cell in cells:
            cell.step = step
            lines.update(cell)
    failing.state = "failed"
    lines.update(failing)
    assert "about 6 min 40 s left" in lines.summary()  # 800 steps; both made one a second
    other.state = "failed"
    lines.update(other)
    assert lines.summary() == "0/2 cells finished, 0 running, 0 waiting, 2 failed"


def test_a_cell_that_ends_before_its_fiftieth_step_sets_the_clock(clock: list[float]) -> None:
    cells = running(4, total=8, accuracy=50.0)
    lines = progress._Lines()
    lines.begin(cells, "title")
    for cell, second in zip(cells[:3], (10, 20, 30), strict=True):
        clock[0], cell.step, cell.state = 1000.0 + second, 8, "finished"
        lines.update(cell)
    assert "about 10 s left" in lines.summary()


def test_nothing_is_left_of_a_run_whose_only_cell_took_no_time(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    (cell,) = cells = running(1, total=8, accuracy=50.0)
    lines = progress._Lines()
    lines.begin(cells, "title")
    cell.step, cell.state = 8, "finished"
    lines.update(cell)
    assert lines.summary() == "1/1 cell finished, 0 running, 0 waiting"
    assert ": 50.00 % in 0 s, evaluations included   [1/1 cell finished" in capsys.readouterr().err


@pytest.mark.parametrize("display", [progress._Lines, progress._Live])
def test_cells_that_go_on_from_checkpoints_are_named_in_one_line(
    display: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged checkpoint is told when its cell begins."""
    cells = running(5)
    for cell in cells:
        cell.name, cell.folder = f"cell {cell.id}", tmp_path / str(cell.id)
        cell.folder.mkdir()
        names = OrderedDict(weight=torch.nn.Parameter(torch.ones(2)))
        state = {"key": {"identity": "1"}, "terms": names, "step": cell.id + 2, "log": {"step": 7}}
        torch.save(state, cell.folder / "checkpoint.pt")
    cells[0].state = "finished"
    (cells[1].folder / "checkpoint.pt").write_bytes(b"PK damaged")
    (cells[2].folder / "checkpoint.pt").unlink()
    shown = display()
    shown.begin(cells, "title")
    shown.end()
    said = capsys.readouterr().err
    line = "2 cells continue from their checkpoints: cell 3 at step 5 of 8, cell 4 at step 6 of 8"
    assert said.count("continue") == 1 and line in " ".join(said.split())
    (cells[4].folder / "checkpoint.pt").unlink()
    display().begin(cells[:4], "title")
    assert "1 cell continues from its checkpoint: cell 3 at step 5 of 8" in " ".join(capsys.readouterr().err.split())


def test_one_cell_is_not_called_cells(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"data": "digits", "student": "wrn_10_1", "protocol": "digits", "steps": 8, "method": "ce"}
    cells = [CellState(plan(recipe, Registry()).cells[0], number) for number in range(2)]
    for some, said in ((cells[:1], "title: 1 cell, 0 finished before\n"), (cells, "title: 2 cells, 0 finished")):
        progress._Lines().begin(some, "title")
        assert capsys.readouterr().err.startswith(said)
