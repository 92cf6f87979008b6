"""The benchmark: which lanes there are for a recipe, their interleaved rounds, and what comes out. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdbench.bench.lanes import Lane, Process
from kdbench.engine.compute import Computing
from kdbench.errors import CellError, UserError
from kdbench.recipe.planning import Plan
from kdbench.recipe.schema import CellSpec


@dataclass(frozen=True)
class Machine:
    """What is known of the machine, and how its peak is measured.

    Attributes:
        about: name, threads, versions.
        precisions: in which its hardware computes.
        compiler: whether torch.compile works here.
        peak: measures the FLOP/s of a large matrix product in a precision.
    """

    about: dict[str, Any]
    precisions: tuple[str, ...]
    compiler: bool
    peak: Callable[[str], float]


@dataclass(frozen=True)
class Row:
    """One lane's result.

    Attributes:
        rates: images a second, round by round; of a cohort, those of all its students.
        against: the baseline's rates in the same rounds.
        warm: seconds until the lane had done its first steps.
        flops: of one image in training, the teacher's share of a cohort included.
    """

    lane: Lane
    rates: list[float]
    against: list[float]
    warm: float
    flops: float

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    @property
    def ratio(self) -> float:
        """Median over rounds of the rate over the baseline's."""
        return statistics.median(a / b for a, b in zip(self.rates, self.against, strict=True))


@dataclass(frozen=True)
class Result:
    """All rows of a recipe.

    Attributes:
        roles: which row is the single run, the cohort, and the run with a table.
        peaks: FLOP/s of a large matrix product by precision, the best of those measured between the rounds.
    """

    recipe: str
    title: str
    batch: int
    rows: list[Row]
    roles: dict[str, Row]
    peaks: dict[str, float]

    def ceiling(self, row: Row) -> float:
        """Images a second that arithmetic alone would allow."""
        return self.peaks[row.lane.computing.precision] / row.flops

    @property
    def ratios(self) -> dict[str, float]:
        return {role: row.ratio for role, row in self.roles.items()}

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "recipe": self.recipe,
            "title": self.title,
            "batch": self.batch,
            "peaks": self.peaks,
            "rows": [
                {
                    "name": row.lane.name,
                    "computing": row.lane.computing.name,
                    "images_per_second": [round(rate, 2) for rate in row.rates],
                    "median": round(row.median, 2),
                    "times_first": round(row.ratio, 3),
                    "ceiling": round(self.ceiling(row), 1),
                    "share_of_peak": round(row.median / self.ceiling(row), 3),
                    "first_steps_seconds": round(row.warm, 1),
                }
                for row in self.rows
            ],
            "ratios": {role: round(ratio, 2) for role, ratio in self.ratios.items()},
        }


def compare(
    plan: Plan,
    machine: Machine,
    flops: dict[str, float],
    device: str,
    threads: int,
    rounds: int,
    seconds: float,
    peers: bool,
    tell: Callable[[str], None],
) -> Result:
    """Time the techniques one after the other switched on, the cohort, the table, and the peers.

    Args:
        flops: of one image's forward pass, of the "teacher" and the "student".
        rounds: turns of every lane; in each round all lanes have one.
        seconds: of one turn.
        peers: whether torchdistill and the plain loop take part; without them the first lane is the baseline.
    """
    cells = _first_seed(plan)
    with_teacher = [spec for spec in cells if spec.teacher is not None]
    logit = next((spec for spec in with_teacher if _reads(spec) == {"logits"}), None)
    if logit is None:
        raise UserError("the benchmark needs a method that reads its teacher's logits alone", where=plan.name)
    one, all_cells = [logit.model_dump(mode="json")], [spec.model_dump(mode="json") for spec in cells]
    ladder = _ladder(one, machine, device)
    others = []
    if peers:
        others = [
            Lane("torchdistill", "torchdistill", one, allocator=False, teacher_eval=False),
            Lane("torchdistill, teacher in eval mode", "torchdistill", one, allocator=False),
            Lane("plain PyTorch loop", "plain", one, allocator=False),
        ]
    started: list[Process] = []

    def start(lane: Lane) -> Process:
        tell(f"starting {lane.name}")
        started.append(Process(lane, device, threads))
        return started[-1]

    peaks = dict.fromkeys(machine.precisions, 0.0)

    def in_turn(processes: list[Process], what: str) -> dict[str, list[float]]:
        taken: dict[str, list[float]] = {process.lane.name: [] for process in processes}
        for number in range(rounds):
            tell(f"{what}, round {number + 1} of {rounds}")
            for precision in peaks:
                peaks[precision] = max(peaks[precision], machine.peak(precision))
            for process in processes:
                taken[process.lane.name].append(process.turn(seconds))
        return taken

    def row(process: Process, taken: dict[str, list[float]], first: Process) -> Row:
        lane = process.lane
        teacher = 0.0 if lane.table else flops["teacher"] / len(lane.specs)
        # Backward costs twice forward.
        work = 3 * flops["student"] + teacher
        return Row(lane, taken[lane.name], taken[first.lane.name], process.warm["seconds"], work)

    try:
        for lane in [*others, *ladder]:
            try:
                start(lane)
            except CellError as error:
                # A technique that does not work here leaves the others their times; a peer must be there.
                if lane in others or not lane.computing.compile:
                    raise
                tell(f"left out: {error}")
        techniques = list(started)
        taken = in_turn(techniques, "techniques")
        rows = [row(process, taken, techniques[0]) for process in techniques]
        best = max(techniques[len(others) :], key=lambda process: statistics.median(taken[process.lane.name]))
        for process in techniques[1:]:
            if process is not best:
                process.end()
        way = best.lane
        table = start(replace(way, name=f"{way.name}, logit table", table=True))
        cohort = start(replace(way, name=f"{way.name}, {len(cells)} methods as one cohort", specs=all_cells))
        final = in_turn([techniques[0], best, cohort, table], "cohort and table")
        roles = {
            role: row(process, final, techniques[0])
            for role, process in (("run", best), ("cohort", cohort), ("table", table))
        }
    finally:
        for process in started:
            process.end()
    rows += [roles["cohort"], roles["table"]]
    return Result(plan.name, plan.title or plan.name, logit.protocol.batch_size, rows, roles, peaks)


def _ladder(specs: list[dict[str, Any]], machine: Machine, device: str) -> list[Lane]:
    """kdbench's lanes for one cell, each with one technique more than the one before."""
    way = Computing()
    lanes = [Lane("kdbench, float32", "kdbench", specs, way, allocator=False)]
    if device == "cpu":
        lanes.append(Lane("+ memory kept", "kdbench", specs, way))
    way = replace(way, layout="channels_last")
    lanes.append(Lane("+ channels_last", "kdbench", specs, way))
    if "bfloat16" in machine.precisions:
        way = replace(way, precision="bfloat16")
        lanes.append(Lane("+ bfloat16", "kdbench", specs, way))
    if machine.compiler:
        way = replace(way, compile=True)
        lanes.append(Lane("+ compiled", "kdbench", specs, way))
        if device != "cpu":
            lanes.append(Lane("+ CUDA graphs", "kdbench", specs, replace(way, cuda_graphs=True)))
    return lanes


def _first_seed(plan: Plan) -> list[CellSpec]:
    """The cells of the plan's first seed that could train as one cohort."""
    specs = [cell.spec for cell in plan.cells]
    teacher = next((spec.teacher.identity() for spec in specs if spec.teacher), None)
    return [
        spec
        for spec in specs
        if spec.seed == specs[0].seed
        and spec.data == specs[0].data
        and (spec.teacher is None or spec.teacher.identity() == teacher)
    ]


def _reads(spec: CellSpec) -> set[str]:
    """Hook points of its teacher that a cell's losses read."""
    terms = [term for stage in spec.method.stages.values() for term in stage.losses.values()]
    own = {term.student for term in terms if term.of == "teacher"}
    return own | {term.teacher for term in terms if "teacher" in term.loss.inputs}


def table(results: Sequence[Result]) -> str:
    """The results as Markdown."""
    parts = []
    for result in results:
        lines = [
            f"**{result.title}**, batch {result.batch}: images a second, data included, a cohort's students together",
            "",
            "| lane | median | lowest | highest | times the first | of the peak | arithmetic allows |",
            "|:--|--:|--:|--:|--:|--:|--:|",
        ]
        for row in result.rows:
            lines.append(
                f"| {row.lane.name} | {row.median:.1f} | {min(row.rates):.1f} | {max(row.rates):.1f} | "
                f"{row.ratio:.2f} | {row.median / result.ceiling(row):.0%} | {result.ceiling(row):.0f} |"
            )
        peaks = ", ".join(f"{name} {peak / 1e12:.2f} TFLOP/s" for name, peak in result.peaks.items())
        parts.append("\n".join([*lines, "", f"Peak, by a large matrix product: {peaks}."]))
    return "\n\n".join(parts) + "\n"
