"""Progress of a run: live bars in a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from kdbench.engine.folders import checkpoint_step
from kdbench.engine.options import Listener
from kdbench.engine.scheduling import CellState
from kdbench.errors import counted, listed
from kdbench.files import CHECKPOINT
from kdbench.recipe.timeline import planned_timeline

LINE_SECONDS = 15.0
# A program's first steps compile its networks and record the others: their time says nothing about what is left.
FIRST_STEPS = 50
# Seconds from which a speed is known.
SHORTEST = 2.0
ENDED = ("finished", "failed")
# Cells that go on from checkpoints and are named.
MOST_NAMED = 6


def listener() -> Listener:
    """The display that suits the output."""
    return _Live() if sys.stderr.isatty() else _Lines()


def clock(seconds: float) -> str:
    """1 h 02 min, 4 min 05 s, or 7 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def continuing(cells: Iterable[CellState]) -> str:
    """Which cells go on from checkpoints, and from where; "" where none does."""
    steps = ((cell, checkpoint_step(cell.folder)) for cell in cells)
    found = [f"{c.label} at step {at} of {planned_timeline(c.spec).total}" for c, at in steps if at is not None]
    if not found:
        return ""
    go_on = "continues from its checkpoint" if len(found) == 1 else "continue from their checkpoints"
    return f"{counted(len(found), 'cell')} {go_on}: {listed(found, MOST_NAMED)}"


class _Base(Listener):
    def begin(self, cells: list[CellState], title: str) -> None:
        self.cells = cells
        self.open = [c for c in cells if c.state != "finished"]
        # Cell -> the step from which its steps count as made. Those before a checkpoint were made by another command.
        self.begun = {c.id: 0 for c in self.open if not (c.folder / CHECKPOINT).is_file()}
        self.since: float | None = None
        self.asked: set[int] = set()

    def update(self, cell: CellState) -> None:
        if cell.step and cell.state == "running" and (cell.id in self.asked or cell.id not in self.begun):
            self.begun[cell.id] = cell.step
        self.asked -= {cell.id}
        made = cell.step - self.begun.get(cell.id, cell.step)
        if self.since is None and (cell.state in ENDED or made >= min(FIRST_STEPS, cell.total / 10) > 0):
            self.since = time.monotonic()
            self.begun |= {c.id: c.step for c in self.open if c.id in self.begun}
            # Those that run beside it tell in a moment where they are now.
            self.asked = {c.id for c in self.open if c.state == "running"} - {cell.id}

    def _left(self) -> float | None:
        """Seconds left at the speed since the first steps; None before there is anything to go by."""
        waiting = [cell for cell in self.open if cell.state not in ENDED]
        if self.since is None:
            return None
        known = [c.total for c in self.cells if c.total]
        typical = sum(known) / len(known) if known else 0
        made = sum(c.step - self.begun.get(c.id, c.step) for c in self.open)
        left = sum((c.total or typical) - c.step for c in waiting)
        elapsed = time.monotonic() - self.since
        # Cells of one program tell one after the other.
        told = made >= max(sum(cell.state == "running" for cell in waiting), 1)
        return elapsed * left / made if told and elapsed >= SHORTEST else None

    def summary(self) -> str:
        count = {
            state: sum(c.state == state for c in self.cells) for state in ("finished", "running", "waiting", "failed")
        }
        failed = f", {count['failed']} failed" if count["failed"] else ""
        counts = (
            f"{count['finished']}/{counted(len(self.cells), 'cell')} finished, {count['running']} running, "
            f"{count['waiting']} waiting{failed}"
        )
        return "; ".join(filter(None, (counts, self.time_left())))

    def time_left(self) -> str:
        """In words; "" where no cell is left."""
        if all(cell.state in ENDED for cell in self.open):
            return ""
        if (left := self._left()) is None:
            return "time left not known yet"
        # Tests and checkpoints take time beside the steps that are counted.
        return f"about {clock(left)} left" if left >= 1 else "almost done"


class _Lines(_Base):
    """For logs and pipes: one line when a cell ends, and one now and then."""

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def begin(self, cells: list[CellState], title: str) -> None:
        super().begin(cells, title)
        self.last = time.monotonic()
        self.shown: set[tuple[int, str]] = set()
        self.say(f"{title}: {counted(len(cells), 'cell')}, {len(cells) - len(self.open)} finished before")
        if said := continuing(self.open):
            self.say(said)

    def doing(self, text: str) -> None:
        self.say(f"preparing {text}")

    def update(self, cell: CellState) -> None:
        super().update(cell)
        if cell.state in ENDED and (cell.id, cell.state) not in self.shown:
            self.shown.add((cell.id, cell.state))
            said = f"failed: {cell.message}"
            if cell.state == "finished":
                said = f"{cell.accuracy:.2f} % in {clock(cell.seconds)}, evaluations included"
            self.say(f"{cell.label}: {said}   [{self.summary()}]")
        elif time.monotonic() - self.last >= LINE_SECONDS:
            self.last = time.monotonic()
            self.say(self.summary() + (f"; {cell.label}: {cell.doing}" if cell.doing else ""))


class _Live(_Base):
    """For terminals: a bar for all cells, and one for each that is running."""

    # There while cells train.
    bars: Progress | None = None

    def __init__(self) -> None:
        self.console = Console(stderr=True)

    def say(self, text: str) -> None:
        self.console.print(Text(text, style="yellow"))

    def begin(self, cells: list[CellState], title: str) -> None:
        super().begin(cells, title)
        if said := continuing(self.open):
            self.say(said)
        name, text = (TextColumn(f"{{task.{what}}}", markup=False) for what in ("description", "fields[text]"))
        columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), text)
        self.bars = Progress(*columns, console=self.console, transient=True)
        self.all = self.bars.add_task(title, total=len(cells), completed=len(cells) - len(self.open), text="cells")
        self.running: dict[int, TaskID] = {}
        self.bars.start()

    def doing(self, text: str) -> None:
        if self.bars is None:
            self.console.print(Text(f"preparing {text}"))
        else:
            self.bars.update(self.all, text=f"preparing {text}")

    def update(self, cell: CellState) -> None:
        super().update(cell)
        assert self.bars is not None
        if cell.state == "running":
            if cell.id not in self.running:
                self.running[cell.id] = self.bars.add_task(cell.label, text="")
            accuracy = "" if cell.accuracy is None else f"{cell.accuracy:.2f} %"
            said = ", ".join(filter(None, (cell.doing or cell.stage, accuracy)))
            self.bars.update(self.running[cell.id], completed=cell.step, total=max(cell.total, 1), text=said)
        elif cell.id in self.running:
            self.bars.remove_task(self.running.pop(cell.id))
        if cell.state == "failed":
            self.console.print(Text(f"{cell.label} failed: {cell.message}", style="red"))
        ended = sum(c.state in ENDED for c in self.cells)
        self.bars.update(self.all, completed=ended, text=self.time_left())

    def end(self) -> None:
        if self.bars is not None:
            self.bars.stop()
        self.bars = None
