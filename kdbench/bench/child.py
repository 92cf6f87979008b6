"""The inside of a lane's process: builds what the lane trains, and trains it for some seconds when it is asked to."""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from kdbench.bench.made_up import made_up
from kdbench.bench.peers import plain_loop, torchdistill_loop
from kdbench.engine.cell import TrainingCell
from kdbench.engine.computing import capture
from kdbench.engine.computing.capture import program_of
from kdbench.engine.computing.choosing import endless, enter_longest_stage
from kdbench.engine.computing.compute import Computing
from kdbench.engine.computing.device import use
from kdbench.engine.data.batches import Batches
from kdbench.engine.data.domain import augmentation_of
from kdbench.engine.member import Member
from kdbench.engine.program import Cohort, Program, make_graphs
from kdbench.engine.teachers.loading import untrained_teacher
from kdbench.engine.teachers.teacher import Teacher
from kdbench.recipe.specs import CellSpec

# Steps before the first measured one: compilation, and on a GPU those before a recording and two replays.
WARM = {"cpu": 1, "cuda": capture.WARM + 3}


class Loop:
    """The engine's own steps for a lane's cells.

    Args:
        lane: as plain data. Its cells train once for each of its seeds, all in one program.
    """

    def __init__(self, lane: dict[str, Any], device: torch.device) -> None:
        # As in a worker; the peers keep torch's own settings.
        use(device)
        self.specs = [CellSpec.model_validate(spec) for spec in lane["specs"]]
        self.computing, self.device = Computing(**lane["computing"]), device
        self.first = next(spec for spec in self.specs if spec.teacher is not None)
        assert self.first.teacher is not None
        self.data = made_up(self.first.data, self.first.data.test if lane["whole_test"] else 64)
        teacher = untrained_teacher(self.first.teacher, self.first.data, device, self.computing)
        table = self._table() if lane["table"] else None
        cohorts = [self._cohort(seed, teacher, table) for seed in range(lane["seeds"])]
        self.program: Program = program_of(cohorts, self.computing)
        self.cells = self.program.cells
        make_graphs([cell.member for cell in self.cells])
        self.step = endless(self.program)

    def train(self) -> int:
        """Train one batch; its images, once a student."""
        self.step()
        return self.first.protocol.batch_size * len(self.cells)

    def evaluate(self) -> None:
        """Evaluate one student."""
        self.program.evaluate(self.cells[0])

    def _table(self) -> torch.Tensor:
        views = augmentation_of(self.first.protocol).views
        table = torch.randn(len(self.data.train_labels), views, self.first.data.classes)
        return table.to(getattr(torch, self.computing.precision)).to(self.device)

    def _cohort(self, seed: int, teacher: Teacher, table: torch.Tensor | None) -> Cohort:
        specs = [spec.model_copy(update={"seed": seed}) for spec in self.specs]
        batches = Batches(specs[0], self.data, self.device)
        if table is not None:
            teacher = teacher.with_logits(table, batches.positions)
        members = [Member(s, batches, teacher if s.teacher else None, self.device, self.computing) for s in specs]
        return Cohort(batches, teacher, [TrainingCell(enter_longest_stage(one)) for one in members])


PEERS: dict[str, Callable[[dict[str, Any], torch.device], Callable[[], int]]] = {
    "torchdistill": torchdistill_loop,
    "plain": plain_loop,
}


class Child:
    """Answers questions about one lane."""

    def __init__(self, question: dict[str, Any]) -> None:
        torch.set_num_threads(question["threads"])
        self.device = torch.device(question["device"])
        lane = question["lane"]
        self.loop = Loop(lane, self.device) if lane["kind"] == "kdbench" else None
        self.train = self.loop.train if self.loop else PEERS[lane["kind"]](lane, self.device)
        for _ in range(WARM[self.device.type] + 1):
            self.train()
        self.finish()

    def finish(self) -> None:
        """Wait for what a GPU still has before it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def rate(self, seconds: float) -> float:
        """Train for about so long; images a second."""
        images, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            images += self.train()
        self.finish()
        return images / (time.perf_counter() - begin)

    def evaluation(self) -> float:
        """Seconds of one evaluation, after those that record it."""
        assert self.loop is not None
        for _ in range(2):
            self.loop.evaluate()
        begin = time.perf_counter()
        for _ in range(3):
            self.loop.evaluate()
        return (time.perf_counter() - begin) / 3


def main() -> None:
    # What libraries print must not end up between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    child: Child | None = None
    for line in sys.stdin:
        question = json.loads(line)
        if child is None:
            begin = time.perf_counter()
            child = Child(question)
            answer = time.perf_counter() - begin
        elif question == "evaluation":
            answer = child.evaluation()
        else:
            answer = child.rate(question)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
