"""Progress of a run: live bars in a terminal, a line now and then elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from kdbench.engine.options import Listener
from kdbench.engine.scheduling import CellState

LINE_SECONDS = 15.0


def listener() -> Listener:
    """The display that suits the output."""
    return _Live() if sys.stderr.isatty() else _Lines()


def remaining(cells: list[CellState], elapsed: float, done_before: float) -> float | None:
    """Seconds left, from the share of steps done since the display began; None before there is anything to go by."""
    known = [c.total for c in cells if c.total]
    if not known or elapsed < 2:
        return None
    typical = sum(known) / len(known)
    whole = sum(c.total or typical for c in cells)
    done = _done(cells, typical) - done_before
    return elapsed * (whole - done_before - done) / done if done > 0 else None


def _done(cells: list[CellState], typical: float) -> float:
    return sum((c.total or typical) if c.state in ("finished", "failed") else c.step for c in cells)


def clock(seconds: float | None) -> str:
    """1 h 02 min, 4 min 05 s, 7 s, or – when unknown."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


class _Base(Listener):
    def begin(self, cells: list[CellState], title: str) -> None:
        self.cells = cells
        self.started = time.monotonic()
        self.before = float(sum(1 for c in cells if c.state == "finished"))

    def summary(self) -> str:
        count = {
            state: sum(c.state == state for c in self.cells) for state in ("finished", "running", "waiting", "failed")
        }
        known = [c.total for c in self.cells if c.total]
        before = self.before * (sum(known) / len(known) if known else 0)
        left = remaining(self.cells, time.monotonic() - self.started, before)
        failed = f", {count['failed']} failed" if count["failed"] else ""
        # Tests and checkpoints take time beside the steps that are counted.
        time_left = "almost done" if left is not None and left < 1 else f"about {clock(left)} left"
        return (
            f"{count['finished']}/{len(self.cells)} cells finished, {count['running']} running, "
            f"{count['waiting']} waiting{failed}; {time_left}"
        )


class _Lines(_Base):
    """For logs and pipes: one line when a cell ends, and one now and then."""

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def begin(self, cells: list[CellState], title: str) -> None:
        super().begin(cells, title)
        self.last = time.monotonic()
        self.shown: set[tuple[int, str]] = set()
        self.say(f"{title}: {len(cells)} cells, {sum(c.state == 'finished' for c in cells)} finished before")

    def doing(self, text: str) -> None:
        self.say(f"preparing {text}")

    def update(self, cell: CellState) -> None:
        if cell.state in ("finished", "failed") and (cell.id, cell.state) not in self.shown:
            self.shown.add((cell.id, cell.state))
            said = f"failed: {cell.message}"
            if cell.state == "finished":
                said = f"{cell.accuracy:.2f} % in {clock(cell.seconds)}"
            self.say(f"{cell.label}: {said}   [{self.summary()}]")
        elif time.monotonic() - self.last >= LINE_SECONDS:
            self.last = time.monotonic()
            self.say(self.summary() + (f"; {cell.label}: {cell.doing}" if cell.doing else ""))


class _Live(_Base):
    """For terminals: a bar for all cells, and one for each that is running."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)

    def say(self, text: str) -> None:
        self.console.print(Text(text, style="yellow"))

    def begin(self, cells: list[CellState], title: str) -> None:
        super().begin(cells, title)
        name, text = (TextColumn(f"{{task.{what}}}", markup=False) for what in ("description", "fields[text]"))
        columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), text)
        self.bars = Progress(*columns, console=self.console, transient=True)
        self.all = self.bars.add_task(title, total=len(cells), completed=int(self.before), text="cells")
        self.running: dict[int, TaskID] = {}
        self.bars.start()

    def doing(self, text: str) -> None:
        self.bars.update(self.all, text=f"preparing {text}")

    def update(self, cell: CellState) -> None:
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
        ended = sum(c.state in ("finished", "failed") for c in self.cells)
        self.bars.update(self.all, completed=ended, text=self.summary().rpartition(";")[2].strip())

    def end(self) -> None:
        self.bars.stop()
