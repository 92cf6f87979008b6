"""Progress of a run: a live table in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
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
    """1:02:03, 4:05, or – when unknown."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Base:
    def begin(self, cells: list[CellState], title: str) -> None:
        self.cells, self.title, self.text = cells, title, "starting"
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
        finished = sum(c.state == "finished" for c in cells)
        print(f"{title}: {len(cells)} cells, {finished} finished before", file=sys.stderr, flush=True)

    def doing(self, text: str) -> None:
        print(f"preparing {text}", file=sys.stderr, flush=True)

    def update(self, cell: CellState) -> None:
        if cell.state in ("finished", "failed") and (cell.id, cell.state) not in self.shown:
            self.shown.add((cell.id, cell.state))
            what = (
                f"{cell.accuracy:.2f} % in {clock(cell.seconds)}"
                if cell.state == "finished"
                else f"failed: {cell.message}"
            )
            print(f"{cell.label}: {what}   [{self.summary()}]", file=sys.stderr, flush=True)
        elif time.monotonic() - self.last >= LINE_SECONDS:
            self.last = time.monotonic()
            beside = f"; {cell.label}: {cell.doing}" if cell.doing else ""
            print(self.summary() + beside, file=sys.stderr, flush=True)

    def end(self) -> None: ...


class _Live(_Base):
    """For terminals: bars of the running cells under one bar for all."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)

    def say(self, text: str) -> None:
        self.console.print(Text(text, style="yellow"))

    def begin(self, cells: list[CellState], title: str) -> None:
        super().begin(cells, title)
        self.all = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("cells"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self.task = self.all.add_task(title, total=len(cells), left="", completed=self._finished())
        self.live = Live(self._view(), console=self.console, refresh_per_second=4, transient=True)
        self.live.start()

    def doing(self, text: str) -> None:
        self.text = f"preparing {text}"
        self.live.update(self._view())

    def update(self, cell: CellState) -> None:
        if cell.state == "failed":
            self.live.console.print(Text(f"{cell.label} failed: {cell.message}", style="red"))
        self.all.update(self.task, completed=self._finished(), left=self.summary().rpartition(";")[2].strip())
        self.live.update(self._view())

    def end(self) -> None:
        self.live.stop()

    def _finished(self) -> int:
        return sum(c.state in ("finished", "failed") for c in self.cells)

    def _view(self) -> Group:
        running = [c for c in self.cells if c.state == "running"]
        table = Table(box=None, show_header=bool(running), header_style="dim", pad_edge=False)
        for column in ("cell", "stage", "progress", "step", "test accuracy"):
            table.add_column(column, justify="right" if column in ("step", "test accuracy") else "left")
        for c in running[:16]:
            share = c.step / max(c.total, 1)
            bar = "━" * round(24 * share)
            table.add_row(
                c.label,
                Text(c.doing or c.stage),
                Text(bar.ljust(24, "╌"), style="cyan"),
                f"{c.step}/{c.total}",
                f"{c.accuracy:.2f} %" if c.accuracy is not None else "–",
            )
        if not running:
            table.add_row(self.text)
        return Group(self.all, table)
