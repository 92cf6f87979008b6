"""The benchmark: which lanes there are for a recipe, their interleaved rounds, and what comes out. Imports no torch."""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from kdbench.bench.lanes import Lane, Process
from kdbench.engine.computing.compute import Computing, Precision
from kdbench.engine.scheduling import CellState, cohorts_of
from kdbench.errors import CellError, UserError
from kdbench.recipe.planning import Plan
from kdbench.recipe.specs import CellSpec

# Images a second of lanes by name, round by round.
Taken = dict[str, list[float]]


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
class Measured:
    """One lane's result.

    Attributes:
        rates: images a second, round by round; of a cohort, those of all its students.
        against: the baseline's rates in the same rounds.
        networks: FLOPs of one image's forward pass, of the "teacher" and the "student".
    """

    process: Process
    rates: list[float]
    against: list[float]
    networks: dict[str, float]

    @property
    def lane(self) -> Lane:
        return self.process.lane

    @property
    def flops(self) -> float:
        """Of one image in training, the teacher's share of a cohort included."""
        teacher = 0.0 if self.lane.table else self.networks["teacher"] / len(self.lane.specs)
        # Backward costs twice forward.
        return 3 * self.networks["student"] + teacher

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    @property
    def ratio(self) -> float:
        """Median over rounds of the rate over the baseline's."""
        return statistics.median(a / b for a, b in zip(self.rates, self.against, strict=True))


@dataclass(frozen=True)
class Benchmark:
    """All rows of a recipe.

    Attributes:
        roles: which row is the single run, the cohort, and the run with a table.
        peaks: FLOP/s of a large matrix product by precision, the best of those measured between the rounds.
    """

    recipe: str
    title: str
    batch: int
    rows: list[Measured]
    roles: dict[str, Measured]
    peaks: dict[str, float]

    def ceiling(self, row: Measured) -> float:
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
                    "first_steps_seconds": round(row.process.warm, 1),
                }
                for row in self.rows
            ],
            "ratios": {role: round(ratio, 2) for role, ratio in self.ratios.items()},
        }


@dataclass
class LaneTimer:
    """Starts lanes and lets them take turns.

    Attributes:
        threads: of each lane.
        rounds: turns of every lane; in each round all lanes have one. seconds: of one turn.
        peaks: FLOP/s of a large matrix product by precision, the best of those measured between the rounds.
    """

    machine: Machine
    device: str
    threads: int
    rounds: int
    seconds: float
    tell: Callable[[str], None]
    peaks: dict[str, float] = field(init=False)
    started: list[Process] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.peaks = dict.fromkeys(self.machine.precisions, 0.0)

    def start(
        self, lanes: Sequence[Lane], needed: bool = False, wait: float | None = None, at_once: int | None = None
    ) -> list[Process]:
        """Start lanes.

        Args:
            needed: whether one that cannot start is an error. Else it is left out, and that is told.
            wait: seconds after which those that are not ready are left out.
            at_once: how many start at a time, by default as many as threads: most of it is imports and compilation.
        """
        self.tell(f"starting {', '.join(lane.name for lane in lanes)}")
        here = len(self.started)

        def ready(lane: Lane) -> Process:
            process = Process(lane, self.device, self.threads)
            self.started.append(process)
            return process.ready()

        with ThreadPoolExecutor(at_once or self.threads) as pool:
            starting = [pool.submit(ready, lane) for lane in lanes]
            late = {future for future in futures.wait(starting, timeout=wait).not_done if not future.cancel()}
            for process in self.started[here:] if late else ():
                if not process.warm:
                    process.leave_out(f"it was not ready after {wait:.0f} s")
        found = []
        for future in (future for future in starting if not future.cancelled()):
            error = future.exception()
            if error is None:
                found.append(future.result())
            elif needed or not isinstance(error, CellError):
                raise error
            else:
                self.tell(f"left out: {error}")
        return found

    def measure(
        self,
        processes: list[Process],
        what: str,
        until: float = float("inf"),
        after: Callable[[Taken], None] = lambda taken: None,
    ) -> Taken:
        """Images a second of every lane, round by round.

        Args:
            until: no round begins after this time of the monotonic clock, but the first. after: is given what was
                measured so far, after each round.
        """
        taken: Taken = {process.lane.name: [] for process in processes}
        for number in range(self.rounds):
            if number and time.monotonic() >= until:
                break
            self.tell(f"{what}, round {number + 1} of {self.rounds}")
            for precision in self.peaks:
                self.peaks[precision] = max(self.peaks[precision], self.machine.peak(precision))
            for process in processes:
                taken[process.lane.name].append(process.turn(self.seconds))
            after(taken)
        return taken

    def end(self, besides: Sequence[Process] = ()) -> None:
        """End the lanes' processes, but for those."""
        for process in self.started:
            if process not in besides:
                process.end()


def benchmark(plan: Plan, timer: LaneTimer, flops: dict[str, float], peers: bool) -> Benchmark:
    """Time on the CPU the ways to compute one cell, and by the fastest of them the cohort and the run with a table,
    beside peers.

    Each technique is built on the best so far. Times are compared within the same rounds only.

    Args:
        timer: that has started nothing yet.
        flops: of one image's forward pass, of the "teacher" and the "student".
        peers: whether torchdistill and the plain loop take part; without them the first lane is the baseline.
    """
    logit, cells = cells_of(plan)
    one, all_cells = [logit.model_dump(mode="json")], [spec.model_dump(mode="json") for spec in cells]

    def row(process: Process, taken: Taken) -> Measured:
        return Measured(process, taken[process.lane.name], taken[first.lane.name], flops)

    try:
        # A way that does not work here leaves the others their times; a peer must be there.
        peers_here = timer.start(peers_of(one) if peers else [], needed=True)
        ways = timer.start(_ways(one, timer.machine))
        first = (peers_here + ways)[0]
        taken = timer.measure([*peers_here, *ways], "without graphs")
        best = fastest(ways, taken)
        timer.end(besides=(first, best))
        rows = [row(process, taken) for process in (*peers_here, *ways)]
        # Compilation takes a minute: only the best so far is compiled.
        compiled = replace(best.lane.computing, compile=True)
        lane = replace(best.lane, name=compiled.name, computing=compiled)
        if graphs := timer.start([lane] if timer.machine.compiler else []):
            taken = timer.measure([*dict.fromkeys((first, best, *graphs))], "graphs")
            rows += [row(process, taken) for process in graphs]
            best = fastest([best, *graphs], taken)
            timer.end(besides=(first, best))
        way = best.lane
        table = replace(way, name=f"{way.name}, logit table", table=True)
        cohort = replace(way, name=f"{way.name}, {len(cells)} methods as one cohort", specs=all_cells)
        final = [best, *timer.start([cohort, table], needed=True)]
        taken = timer.measure([*dict.fromkeys((first, *final))], "cohort and table")
    finally:
        timer.end()
    roles = {role: row(process, taken) for role, process in zip(("run", "cohort", "table"), final, strict=True)}
    rows += [roles["cohort"], roles["table"]]
    return Benchmark(plan.name, plan.title or plan.name, logit.protocol.batch_size, rows, roles, timer.peaks)


def fastest(processes: Sequence[Process], taken: Taken) -> Process:
    return max(processes, key=lambda process: statistics.median(taken[process.lane.name]))


def peers_of(specs: list[dict[str, Any]]) -> list[Lane]:
    """The lanes of peers, the baseline first."""
    return [
        Lane("torchdistill", "torchdistill", specs, allocator=False, teacher_eval=False),
        Lane("torchdistill, teacher in eval mode", "torchdistill", specs, allocator=False),
        Lane("plain PyTorch loop", "plain", specs, allocator=False),
    ]


def _ways(specs: list[dict[str, Any]], machine: Machine) -> list[Lane]:
    """kdbench's lanes for one cell without graphs, the plain one first."""
    lanes = [
        Lane("kdbench, float32", "kdbench", specs, allocator=False),
        Lane("float32, memory kept", "kdbench", specs),
    ]
    for precision in machine.precisions:
        lanes.append(Lane(f"{precision}, channels_last", "kdbench", specs, Computing(precision, "channels_last")))
    return lanes


def cells_of(plan: Plan) -> tuple[CellSpec, list[CellSpec]]:
    """The first cell that reads its teacher's logits alone, and all cells that train as one cohort with it and have its
    student, so that all cost what it costs.

    Raises:
        UserError: there is no such cell.
    """
    states = [CellState(cell, i) for i, cell in enumerate(plan.cells)]
    for cells in cohorts_of(states):
        logit = next((c.spec for c in cells if c.spec.teacher is not None and _reads(c.spec) == {"logits"}), None)
        if logit is not None:
            return logit, [cell.spec for cell in cells if cell.spec.student == logit.student]
    raise UserError("the benchmark needs a method that reads its teacher's logits alone", where=plan.name)


def _reads(spec: CellSpec) -> set[str]:
    """Hook points of its teacher that a cell's losses read."""
    terms = spec.method.terms
    own = {point for term in terms if term.of == "teacher" for point in term.points("student")}
    return own | {point for term in terms if "teacher" in term.loss.inputs for point in term.points("teacher")}


def speed_table(results: Sequence[Benchmark]) -> str:
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
