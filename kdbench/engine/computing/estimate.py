"""What a plan will cost, from a few timed steps of each network. Time of one worker; whoever has several divides."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional as F

from kdbench.engine.checks.cells import costs_of, multiples
from kdbench.engine.computing.choosing import times
from kdbench.engine.computing.compute import Memory
from kdbench.engine.finish import size_of
from kdbench.engine.folders import teacher_folder
from kdbench.engine.inputs import Cost
from kdbench.engine.networks.build import build_model
from kdbench.engine.scheduling import CellState, balanced, bytes_of, cohorts_of
from kdbench.files import cores
from kdbench.models.points import any_gradient
from kdbench.recipe.method_specs import StageSpec
from kdbench.recipe.model_specs import DataSpec, ModelSpec
from kdbench.recipe.planning import PlannedCell
from kdbench.recipe.specs import CellSpec
from kdbench.recipe.timeline import planned_timeline, training_images
from kdbench.record import finished_record

# A GPU, and floating-point operations a second there of cohorts with recorded steps in bfloat16: ResNet-32x4 → 8x4 and
# WRN-22-4 → WRN-16-2 had 0.9e14 to 1.4e14, alone and side by side. Smaller networks have less.
GPU, GPU_RATE = "NVIDIA H200", 1e14
# Seconds from which its time is told: of less the start alone takes most.
SHORTEST_TOLD = 60.0
# A training step is a forward pass and two as long backwards.
PASSES = 3
# With gradients of the images it took 2.4 to 2.7 times as long on a CPU (WRN-16-2, ResNet-8x4, VGG-8), with those of a
# later layer less; a teacher's pass took twice as long.
WITH_GRADIENTS, TAUGHT_GRADIENTS = 2.5, 2
# Images in a timed batch: enough to fill the machine, on a CPU as few as a forward pass takes in SECONDS.
TIMED, FEWEST = 32, 2
SECONDS = 0.15


@dataclass(frozen=True)
class Size:
    """A network: parameters, FLOPs of one forward image (a multiply-add is two), seconds an image (0: not timed)."""

    parameters: int
    flops: int
    forward: float = 0.0
    training: float = 0.0


class Estimate:
    """Sizes and times of networks, each measured once, and sums of them.

    Args:
        timed: measure times too; without, all costs are 0.
        rate: floating-point operations a second of another machine, in place of measuring.
    """

    def __init__(self, device: torch.device, timed: bool = True, rate: float | None = None) -> None:
        self.device, self.timed, self.rate = device, timed and rate is None, rate
        self.sizes: dict[tuple[str, str, int, tuple[int, ...]], Size] = {}
        self.sources: dict[str, dict[str, Cost]] = {}

    def size(self, model: ModelSpec, data: DataSpec) -> Size:
        key = (model.name, str(model.options), data.classes, data.image_shape)
        if key not in self.sizes:
            found = measure(model, data, self.timed, self.device)
            if self.rate is not None:
                each = found.flops / self.rate
                found = replace(found, forward=each, training=PASSES * each)
            self.sizes[key] = found
        return self.sizes[key]

    def cell(self, spec: CellSpec) -> float:
        """Seconds of one cell: training and evaluation, without its teacher."""
        size, line = self.size(*spec.networks["student"]), planned_timeline(spec)
        tests = [part.test for part in spec.domains]
        total = len(line.evaluations) * sum(tests) * size.forward
        many = multiples(spec, self.costs(spec))
        for span in line.spans:
            stage, images = spec.method.stages[span.name], span.steps * _batch(spec)
            seen = {
                name: sum(
                    many.get(one, 1) * (WITH_GRADIENTS if read else 1) for one, read in _sets(stage, name).items()
                )
                for name in ("student", "teacher")
            }
            total += images * seen["student"] * size.training
            if spec.teacher is not None and "teacher" in stage.trains:
                own = self.size(*spec.networks["teacher"])
                # In turns, it runs for its own step and again for the student's.
                total += images * seen["teacher"] * (own.training + own.forward * stage.alternating)
                total += len(line.evaluations) * spec.tested.test * own.forward / len(line.spans)
        for cost in self.costs(spec).values():
            total += (cost.student + cost.operations / (PASSES * size.flops)) * size.training
            if cost.teacher and spec.teacher is not None:
                total += cost.teacher * self.size(*spec.networks["teacher"]).training
        return total

    def costs(self, spec: CellSpec) -> dict[str, Cost]:
        """Stage -> what its batch source takes at most; a pass to the images is counted as a training step's."""
        key = spec.identity() if spec.method.sources else ""
        if key not in self.sources:
            self.sources[key] = costs_of(spec)
        return self.sources[key]

    def prepared(self, cells: Iterable[PlannedCell]) -> float:
        """Seconds of what batch sources make before cells train, none of it made yet."""
        taken: dict[str, float] = {}
        for cell in cells:
            teacher = cell.spec.teacher
            for cost in self.costs(cell.spec).values():
                if cost.prepared and teacher is not None:
                    each = self.size(*cell.spec.networks["teacher"]).training
                    key = f"{teacher.identity()} {cost.key}"
                    taken[key] = max(taken.get(key, 0.0), cost.prepared * each)
        return sum(taken.values())

    def passes(self, spec: CellSpec) -> float:
        """Seconds of the teacher's passes for one cell that has them for itself."""
        if spec.teacher is None:
            return 0.0
        many = multiples(spec, self.costs(spec))
        sets = [one for stage in spec.method.stages.values() for one in _sets(stage, "teacher").items()]
        most = max((many.get(name, 1) * (TAUGHT_GRADIENTS if read else 1) for name, read in sets), default=1)
        return planned_timeline(spec).total * _batch(spec) * most * self.size(*spec.networks["teacher"]).forward

    def cells(self, cells: Iterable[PlannedCell]) -> float:
        """Seconds of several cells: a cohort pays for its teacher's passes once."""
        total = 0.0
        for cohort in cohorts_of([CellState(cell, i) for i, cell in enumerate(cells)]):
            specs = [cell.spec for cell in cohort]
            total += sum(map(self.cell, specs)) + max(map(self.passes, specs))
        return total

    def teachers(self, cells: Iterable[PlannedCell], runs: Path, known: set[str]) -> float:
        """Seconds of training the cells' teachers that are not trained yet.

        Args:
            known: identities of teachers that are counted already; extended.
        """
        total = 0.0
        for teacher in (one for cell in cells for one in cell.spec.teachers):
            if teacher.trained_by is None or teacher.identity() in known:
                continue
            known.add(teacher.identity())
            if finished_record(teacher_folder(teacher, runs)) is None:
                inner = PlannedCell(teacher.trained_by, {}, 0)
                total += self.cells([inner]) + self.teachers([inner], runs, known)
        return total


def memory(cells: Iterable[PlannedCell], taken: dict[str, Memory], jobs: int, device: torch.device) -> int:
    """Bytes that the largest cohort takes when so many workers share the cells out.

    On a GPU several of one comparison train as one program, where these fit.

    Args:
        taken: what each `kind` of cell takes.
    """
    states = [CellState(cell, i) for i, cell in enumerate(cells)]
    cohorts = balanced(cohorts_of(states), jobs)
    return max(bytes_of([cohort], taken, device.type == "cuda") for cohort in cohorts)


def workers(device: torch.device, cells: int, jobs: int | None = None) -> int:
    """How many workers of a run of so many cells compute at once: one for each GPU, or each core, at most `jobs`."""
    at_most = torch.cuda.device_count() if device.type == "cuda" else min(cores(), cells)
    return max(min(at_most, jobs or at_most), 1)


def threads_of(at_once: int, threads: int | None = None) -> int:
    """How many threads each of so many workers on the CPU has; `threads`: as they were asked for."""
    return threads or max(min(torch.get_num_threads(), cores() // at_once), 1)


def _batch(spec: CellSpec) -> int:
    return min(spec.protocol.batch_size, training_images(spec.data))


def _sets(stage: StageSpec, network: str) -> dict[str, bool]:
    """Input sets on which a stage runs a network, and whether gradients are read there."""
    found: dict[str, bool] = {}
    for term in stage.losses.values():
        reads = []
        if term.of == network:
            reads = [(one, term.points("student")) for one in (term.input, term.against) if one]
        if network == "teacher" and "teacher" in term.loss.inputs:
            reads.append((term.input, term.points("teacher")))
        for name, points in reads:
            found[name] = found.get(name, False) or any_gradient(points)
    return found


def measure(model: ModelSpec, data: DataSpec, timed: bool, device: torch.device) -> Size:
    """Size of a model, and with `timed` its seconds an image: forward alone, and a whole training step."""
    network = build_model(model.untrained(), data).to(device)
    size = size_of(network, data)
    forward = training = 0.0
    if timed:
        images = torch.randn(TIMED, *data.image_shape, device=device)
        labels = torch.zeros(TIMED, dtype=torch.int64, device=device)
        n = FEWEST

        def step() -> None:
            network.zero_grad(set_to_none=True)
            F.cross_entropy(network(images[:n]), labels[:n]).backward()

        def look() -> None:
            with torch.no_grad():
                network(images[:n])

        network.eval()
        fewest = times(look, device)[2]
        n = TIMED if device.type == "cuda" else max(FEWEST, min(TIMED, int(FEWEST * SECONDS / fewest)))
        forward = times(look, device)[2] / n
        network.train()
        training = times(step, device)[2] / n
    return Size(int(size["parameters"]), int(size["flops"]), forward, training)
