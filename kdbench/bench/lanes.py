"""Lanes: processes that each train one thing in one way, a few seconds at a time, when it is their turn.

Imports no torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from kdbench.engine.computing.compute import Computing
from kdbench.engine.workers.pool import ALLOCATOR
from kdbench.errors import CellError


@dataclass(frozen=True)
class Lane:
    """What a process trains, and how.

    Attributes:
        name: as the report shows it.
        kind: "kdbench", "torchdistill" or "plain".
        specs: cells as plain data; more than one train as a cohort.
        seeds: how often these train, in one program.
        computing: of kdbench's own lanes.
        allocator: whether memory is kept as in kdbench's workers.
        table: whether teacher logits come from a table.
        whole_test: whether there are as many test images as the data set has, to time an evaluation.
        teacher_eval: of peers, whether their teacher is in eval mode.
    """

    name: str
    kind: str
    specs: list[dict[str, Any]]
    computing: Computing = field(default_factory=Computing)
    allocator: bool = True
    table: bool = False
    seeds: int = 1
    whole_test: bool = False
    teacher_eval: bool = True


class Process:
    """A lane's process. It warms up when it starts and then waits for its turns.

    Attributes:
        warm: seconds until it was ready.
    """

    def __init__(self, lane: Lane, device: str, threads: int) -> None:
        self.lane = lane
        # Lanes that compile at once share the cores.
        own = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
        environment = (ALLOCATOR if lane.allocator else {}) | os.environ | own
        # A file, not a pipe: what nobody reads would fill a pipe and stop the process.
        self.errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8")  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kdbench.bench.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        self.warm = 0.0
        self._late = ""
        self._say({"lane": asdict(lane), "device": device, "threads": threads})

    def ready(self) -> Process:
        """Itself, when it is warm."""
        self.warm = self._answer()
        return self

    def turn(self, seconds: float) -> float:
        """Train for about that long; images a second."""
        self._say(seconds)
        return self._answer()

    def evaluation(self) -> float:
        """Seconds of one evaluation of one student."""
        self._say("evaluation")
        return self._answer()

    def leave_out(self, why: str) -> None:
        """End it while somebody waits for it, who is told why."""
        self._late = why
        self.process.kill()

    def end(self) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        self.process.wait()

    def _say(self, question: Any) -> None:
        assert self.process.stdin is not None
        # What is gone is told by its answer, which does not come.
        with suppress(OSError):
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()

    def _answer(self) -> float:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            last = self._late or "".join(self.errors.read().strip().splitlines()[-1:])
            raise CellError(f"the lane '{self.lane.name}' ended: {last}")
        answer: float = json.loads(line)
        return answer
