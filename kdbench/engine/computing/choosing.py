"""Choosing how to compute by measuring: a short trial of the sensible ways, on the comparison's own cells and data."""

import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from kdbench.engine.cell import TrainingCell
from kdbench.engine.computing.capture import WARM, program_of
from kdbench.engine.computing.compute import Chosen, Computing, Steps, candidates
from kdbench.engine.data.batch import Sets
from kdbench.engine.data.batches import Batches
from kdbench.engine.inputs import SourceFiles
from kdbench.engine.member import Member
from kdbench.engine.program import Cohort, Program, make_graphs
from kdbench.engine.step import sets_of, shared_part, train
from kdbench.engine.teachers.teacher import Taught, Teacher
from kdbench.errors import CellError, UserError, failure, first_line
from kdbench.recipe.choices import ComputeChoice
from kdbench.recipe.specs import CellSpec

T = TypeVar("T")

NO_COMPILER = (
    "torch.compile cannot work here, so networks run as they are: on a GPU it needs Triton, on a CPU a compiler"
)

# Below this many seconds of predicted work nothing is tried: the plainest way is taken.
SHORT = 60.0
# Below this many, compiling is not tried: it takes about a minute on CPUs.
COMPILING = {"cpu": 600.0, "cuda": 180.0}
# What a way must save against a plainer one, and what all trying may cost, as shares of the predicted work.
GAIN = 0.05
COST = 0.1
# How far a way's first losses may be from the plainest way's.
OFF = {"float32": 1e-3, "bfloat16": 0.05}
# Replayed steps in a measurement.
REPLAYS = 20
FASTEST = "the fastest that was measured"
# Cells of a cohort that are measured at most: they differ little, and all would take long.
CELLS = 3


@dataclass
class MeasuredWay:
    """A way as it was measured: seconds of one student's step, of one teacher pass, and of compiling."""

    computing: Computing
    student: float = 0.0
    teacher: float = 0.0
    compiling: float = 0.0
    losses: list[float] = field(default_factory=list)
    remark: str = ""
    error: Exception | None = None

    def seconds(self, ahead: Steps) -> float:
        return self.compiling + ahead.of_students * self.student + ahead.with_teacher * self.teacher

    def plain(self, ahead: Steps) -> dict[str, Any]:
        measured = {
            "student_step_seconds": round(self.student, 5),
            "teacher_pass_seconds": round(self.teacher, 5),
            "compiling_seconds": round(self.compiling, 1),
            "predicted_seconds": round(self.seconds(ahead), 1),
        }
        return {"way": self.computing.name, **(measured if self.student else {}), "remark": self.remark}


def choose(
    choice: ComputeChoice,
    specs: Sequence[CellSpec],
    batches: Batches,
    teacher: Callable[[Computing], Teacher | None],
    ahead: Steps,
    device: torch.device,
    tell: Callable[[str], None],
    files: SourceFiles = SourceFiles(),  # noqa: B008 - frozen
) -> Chosen:
    """Measure the ways that a choice leaves open and take the fastest.

    Args:
        specs: cells of one cohort.
        teacher: gives the cohort's teacher, freshly loaded, for a way to compute.
        tell: is told what is being tried.
        files: where the cells' batch sources find what was prepared for them.

    Raises:
        UserError: what is asked for cannot be done here.
    """

    def chosen(computing: Computing, why: str, measured: Sequence[Any] = ()) -> Chosen:
        return Chosen(asked=choice.fixed(), computing=computing, why=why, tried=list(measured))

    ways = candidates(choice, bfloat16_computes(device), compiler_works(device), device.type == "cuda")
    if len(ways) == 1:
        return chosen(_settled(ways[0]), "as the recipe says")
    begin = time.monotonic()
    tried: list[MeasuredWay] = []

    def measured(way: Computing) -> MeasuredWay:
        tell(f"trial of {way.name}")
        tried.append(_measure(way, specs, batches, teacher, device, files))
        _compare(tried[-1], tried[:-1])
        return tried[-1]

    best = measured(ways[0])
    if best.error is not None and len(specs) > 1:
        # There may be memory for one at a time.
        specs, tried = specs[:1], []
        best = measured(ways[0])
    if best.error is not None:
        raise best.error
    why = FASTEST
    for way in ways[1:]:
        if enough := _enough(way, best, ahead, time.monotonic() - begin, device):
            why = enough
            break
        if way.compile and not _promising(way, best, tried, device):
            continue
        one = measured(way)
        if not one.remark and one.seconds(ahead) < (1 - GAIN) * best.seconds(ahead):
            best = one
    way = best.computing
    eager = next((one for one in tried if one.computing == replace(way, compile=False)), None)
    return chosen(_settled(way, best, eager), why, [one.plain(ahead) for one in tried])


def _enough(way: Computing, best: MeasuredWay, ahead: Steps, spent: float, device: torch.device) -> str:
    """Why neither this way nor another is tried; "" where it may be."""
    predicted = best.seconds(ahead)
    if predicted < SHORT:
        return f"about {predicted:.0f} s of work for a worker: too short for a choice to matter"
    if spent > COST * predicted:
        return f"{FASTEST}; trying more would have cost more than it could save"
    if way.compile and not best.computing.compile and predicted < COMPILING[device.type]:
        return f"{FASTEST}; about {predicted:.0f} s of work for a worker are too few to compile for"
    return ""


def _promising(way: Computing, best: MeasuredWay, tried: list[MeasuredWay], device: torch.device) -> bool:
    """Whether a compiled way is worth trying: as the best so far computes, or where eager times say little."""
    if all(one.computing.compile for one in tried):
        return True
    pair = (way.precision, way.layout)
    # On a GPU small networks wait for launches, whatever they compute in; compiled, they do not.
    open_still = device.type == "cuda" and pair == ("bfloat16", "channels_last")
    return open_still or pair == (best.computing.precision, best.computing.layout)


def possible(way: Computing, device: torch.device) -> Computing:
    """A way that was chosen elsewhere, without what this machine lacks: graphs give the numbers of eager networks."""
    if way.compile and not compiler_works(device):
        way = replace(way, compile=False)
    return replace(way, cuda_graphs=False) if way.cuda_graphs and device.type != "cuda" else way


def _settled(way: Computing, compiled: MeasuredWay | None = None, eager: MeasuredWay | None = None) -> Computing:
    """The way, with the number of steps from which a graph of it is worth its compilation."""
    if not way.compile or compiled is None or eager is None:
        return way
    eager_step, step = eager.student + eager.teacher, compiled.student + compiled.teacher
    return replace(way, worth=round(compiled.compiling / max(eager_step - step, 1e-9)))


def _measure(
    way: Computing,
    specs: Sequence[CellSpec],
    batches: Batches,
    load: Callable[[Computing], Teacher | None],
    device: torch.device,
    files: SourceFiles,
) -> MeasuredWay:
    """Time a way on throw-away students. Whatever fails is its remark."""
    one, whose = MeasuredWay(way), "cells"
    if len(specs) > CELLS:
        specs = [specs[i * (len(specs) - 1) // (CELLS - 1)] for i in range(CELLS)]
    try:
        teacher = load(way)
        members = [
            enter_longest_stage(Member(s, batches, teacher if s.teacher else None, device, way, files)) for s in specs
        ]
        make_graphs(members)
        if way.cuda_graphs:
            one.compiling, one.student, one.losses = _replayed(members, batches, teacher, way)
            return one

        def shared() -> tuple[Sets, Taught]:
            batches.seek(members[0].step, members[0].timeline, names)
            batches.feed(names)
            return shared_part(batches, teacher, members)

        names = sets_of(members)
        (sets, taught), first, one.teacher = times(shared, device)
        one.compiling += first - one.teacher
        steps, losses = [], []
        for member in members:
            whose = f"method '{member.spec.method.name}', stage '{member.stage.span.name}'"

            def step(member: Member = member) -> float:
                member.ready(lambda text: None, lambda: False)
                member.prepare(1)
                member.before_step()
                member.after_step(train(member, sets, taught))
                return member.meter.result()["loss"]

            loss, first, again = times(step, device)
            steps.append(again)
            losses.append(loss)
            one.compiling += first - again
        one.student, one.losses = sum(steps) / len(steps), losses
        if not way.compile:
            one.compiling = 0.0
    except (CellError, UserError, RuntimeError, MemoryError) as error:
        # Its traceback would hold the networks, and with them memory that the next ways need.
        one.error = error.with_traceback(None)
        one.remark = f"failed: {first_line(error)}"
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's code can fail in any way
        one.error = UserError(f"the first steps of {whose} cannot be computed: {failure(error)}")
        one.remark = f"failed: {one.error.what}"
    return one


def _replayed(
    members: list[Member], batches: Batches, teacher: Teacher | None, way: Computing
) -> tuple[float, float, list[float]]:
    """Seconds until the members' steps are recorded, seconds of one student in a replayed step (its part of the
    teacher's pass included), and their first losses."""
    step = endless(program_of([Cohort(batches, teacher, [TrainingCell(member) for member in members])], way))

    def taken(steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize(batches.device)
        return time.perf_counter() - begin

    first = taken(1)
    losses = [member.meter.result()["loss"] for member in members]
    recording = first + taken(WARM)
    return recording, min(taken(REPLAYS), taken(REPLAYS)) / REPLAYS / len(members), losses


def times(action: Callable[[], T], device: torch.device) -> tuple[T, float, float]:
    """What the first call gives, its seconds, and those of the faster of two more."""
    taken = []
    results = []
    for _ in range(3):
        begin = time.perf_counter()
        results.append(action())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begin)
    return results[0], taken[0], min(taken[1:])


def _compare(one: MeasuredWay, tried: list[MeasuredWay]) -> None:
    """Strike a way out whose losses are not those of the plainest way."""
    if one.remark or not tried:
        return
    for loss, plain in zip(one.losses, tried[0].losses, strict=True):
        off = abs(loss - plain) / max(abs(plain), 1e-3)
        if not off <= OFF[one.computing.precision]:
            one.remark = f"not used: its first loss is {loss:.6g} where {tried[0].computing.name} gives {plain:.6g}"


def bfloat16_computes(device: torch.device) -> bool:
    """Whether the hardware itself computes in bfloat16; where it is emulated, it only costs."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = (getattr(torch.cpu, f"_is_{what}_supported", None) for what in ("avx512_bf16", "amx_tile"))
    return any(check() for check in found if check is not None)


def compiler_works(device: torch.device) -> bool:
    """Whether torch.compile can build kernels here: on CPUs it needs a C++ compiler, on GPUs Triton."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++"))


def enter_longest_stage(member: Member) -> Member:
    """Have a member at the first step of the stage in which a run mostly is."""
    spans = member.timeline.spans
    longest = max(range(len(spans)), key=lambda i: spans[i].steps)
    member.step = spans[longest].start
    member.enter(longest)
    return member


def endless(program: Program) -> Callable[[], None]:
    """A step of all cells, which can be called any number of times: their stages begin anew before they end.

    Raises:
        RuntimeError: a cell failed.
    """
    cells = program.cells
    starts = [cell.member.step for cell in cells]
    most = max(min(cell.member.stage.span.steps for cell in cells) - 1, 1)
    left = 0

    def step() -> None:
        nonlocal left
        if not left:
            for cell, start in zip(cells, starts, strict=True):
                cell.member.step = start
                cell.member.ready(lambda text: None, lambda: False)
            left = program.prepare(cells, most)
        program.step(cells)
        left -= 1
        for cell in (cell for cell in cells if cell.failure):
            raise RuntimeError(f"method '{cell.member.spec.method.name}': {cell.failure}")

    return step
