"""The benchmark: which lanes there are for a recipe, their interleaved rounds, and what comes out. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from kdbench.bench.lanes import Lane, Process
from kdbench.engine.compute import Computing, Precision
from kdbench.errors import CellError, UserError
from kdbench.recipe.planning import Plan
from kdbench.recipe.specs import CellSpec


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
    precisions: tuple[Precision, ...]
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
    """Time the ways to compute one cell, and by the fastest of them the cohort and the run with a table, beside peers.

    Each technique is built on the best so far. Times are compared within the same rounds only.

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
    others = []
    if peers:
        others = [
            Lane("torchdistill", "torchdistill", one, allocator=False, teacher_eval=False),
            Lane("torchdistill, teacher in eval mode", "torchdistill", one, allocator=False),
            Lane("plain PyTorch loop", "plain", one, allocator=False),
        ]
    rounds_of = Rounds(machine, device, threads, rounds, seconds, tell)

    def row(process: Process, taken: dict[str, list[float]]) -> Row:
        lane = process.lane
        teacher = 0.0 if lane.table else flops["teacher"] / len(lane.specs)
        # Backward costs twice forward.
        work = 3 * flops["student"] + teacher
        return Row(lane, taken[lane.name], taken[first.lane.name], process.warm["seconds"], work)

    try:
        # A way that does not work here leaves the others their times; a peer must be there.
        peers_here, ways = rounds_of.start(others, needed=True), rounds_of.start(_ways(one, machine, device))
        first = (peers_here + ways)[0]
        taken = rounds_of.measure([*peers_here, *ways], "without graphs")
        best = fastest(ways, taken)
        rounds_of.end(besides=(first, best))
        rows = [row(process, taken) for process in (*peers_here, *ways)]
        # Compilation takes a minute: only the best so far is compiled.
        if graphs := rounds_of.start(_graphs(best.lane, machine, device)):
            taken = rounds_of.measure(_each_once(first, best, *graphs), "graphs")
            rows += [row(process, taken) for process in graphs]
            best = fastest([best, *graphs], taken)
            rounds_of.end(besides=(first, best))
        way = best.lane
        table = replace(way, name=f"{way.name}, logit table", table=True)
        cohort = replace(way, name=f"{way.name}, {len(cells)} methods as one cohort", specs=all_cells)
        final = [best, *rounds_of.start([cohort, table], needed=True)]
        taken = rounds_of.measure(_each_once(first, *final), "cohort and table")
    finally:
        rounds_of.end()
    roles = {role: row(process, taken) for role, process in zip(("run", "cohort", "table"), final, strict=True)}
    rows += [roles["cohort"], roles["table"]]
    return Result(plan.name, plan.title or plan.name, logit.protocol.batch_size, rows, roles, rounds_of.peaks)


def fastest(processes: Sequence[Process], taken: dict[str, list[float]]) -> Process:
    return max(processes, key=lambda process: statistics.median(taken[process.lane.name]))


def _each_once(*processes: Process) -> list[Process]:
    return list(dict.fromkeys(processes))


class Rounds:
    """Starts lanes and lets them take turns.

    Args:
        rounds: turns of every lane; in each round all lanes have one. seconds: of one turn.

    Attributes:
        peaks: FLOP/s of a large matrix product by precision, the best of those measured between the rounds.
    """

    def __init__(
        self, machine: Machine, device: str, threads: int, rounds: int, seconds: float, tell: Callable[[str], None]
    ) -> None:
        self.machine, self.device, self.threads = machine, device, threads
        self.rounds, self.seconds, self.tell = rounds, seconds, tell
        self.peaks: dict[str, float] = dict.fromkeys(machine.precisions, 0.0)
        self.started: list[Process] = []

    def start(self, lanes: Sequence[Lane], needed: bool = False) -> list[Process]:
        """Start lanes, as many at a time as there are cores: most of it is imports and compilation.

        Args:
            needed: whether one that cannot start is an error. Else it is left out, and that is told.
        """
        self.tell(f"starting {', '.join(lane.name for lane in lanes)}")
        with ThreadPoolExecutor(self.threads) as pool:
            starting = [pool.submit(Process, lane, self.device, self.threads) for lane in lanes]
        found = [future.result() for future in starting if future.exception() is None]
        self.started += found
        for error in (future.exception() for future in starting):
            if error is not None and (needed or not isinstance(error, CellError)):
                raise error
            if error is not None:
                self.tell(f"left out: {error}")
        return found

    def measure(self, processes: list[Process], what: str) -> dict[str, list[float]]:
        """Images a second of every lane, round by round."""
        taken: dict[str, list[float]] = {process.lane.name: [] for process in processes}
        for number in range(self.rounds):
            self.tell(f"{what}, round {number + 1} of {self.rounds}")
            for precision in self.peaks:
                self.peaks[precision] = max(self.peaks[precision], self.machine.peak(precision))
            for process in processes:
                taken[process.lane.name].append(process.turn(self.seconds))
        return taken

    def end(self, besides: Sequence[Process] = ()) -> None:
        """End the lanes' processes, but for those."""
        for process in self.started:
            if process not in besides:
                process.end()


def _ways(specs: list[dict[str, Any]], machine: Machine, device: str) -> list[Lane]:
    """kdbench's lanes for one cell without graphs, the plain one first."""
    lanes = [Lane("kdbench, float32", "kdbench", specs, allocator=False)]
    if device == "cpu":
        lanes.append(Lane("float32, memory kept", "kdbench", specs))
    for precision in machine.precisions:
        lanes.append(Lane(f"{precision}, channels_last", "kdbench", specs, Computing(precision, "channels_last")))
    return lanes


def _graphs(best: Lane, machine: Machine, device: str) -> list[Lane]:
    """The best lane so far as a graph, in every way that this machine has."""
    compiled = [replace(best.computing, compile=True)] if machine.compiler else []
    # Whole steps are recorded with compiled networks and without.
    recorded = [] if device == "cpu" else [replace(way, cuda_graphs=True) for way in (best.computing, *compiled)]
    return [replace(best, name=way.name, computing=way) for way in compiled + recorded]


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
