"""The benchmark on a GPU, in minutes: all lanes start at once and then take turns.

What there is no time for is left out. Imports no torch.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdbench.bench.compare import Benchmark, LaneTimer, Machine, Measured, Taken, cells_of, peers_of
from kdbench.bench.lanes import Lane, Process
from kdbench.engine.computing.compute import Computing
from kdbench.errors import CellError
from kdbench.recipe.planning import Plan
from kdbench.recipe.timeline import planned_timeline

# Shares of the time: until then lanes may get ready, and rounds may begin. The rest is the quickstart's.
READY, MEASURED = 0.45, 0.7
# Threads of a lane: its host only launches.
THREADS = 2
SEEDS = 5


@dataclass
class Pair:
    """What is measured of a recipe.

    Args:
        flops: of one image's forward pass, of the "teacher" and the "student".

    Attributes:
        lanes: by role; of each role the fastest counts. processes: of those that are ready.
        evaluation: seconds of one evaluation of one student.
    """

    plan: Plan
    flops: dict[str, float]
    lanes: dict[str, list[Lane]] = field(default_factory=dict)
    processes: list[Process] = field(default_factory=list)
    evaluation: float | None = None

    def choose_lanes(self, machine: Machine, prefix: str, peers: bool) -> None:
        """Peers, and every role in the ways that pay on a GPU; a single run also in float32, eager and recorded."""
        logit, cells = cells_of(self.plan)
        one, every = [logit.model_dump(mode="json")], [spec.model_dump(mode="json") for spec in cells]
        recorded = Computing(machine.precisions[-1], "channels_last", cuda_graphs=True)
        ways = [recorded, *([replace(recorded, compile=True)] if machine.compiler else [])]
        plain = [Computing(), Computing(cuda_graphs=True)] if peers else []

        def lanes(what: str, ways: Sequence[Computing], **more: Any) -> list[Lane]:
            return [Lane(f"{prefix}{way.name}{what}", "kdbench", computing=way, **more) for way in ways]

        if peers:
            self.lanes["peers"] = peers_of(one)
        self.lanes["run"] = lanes("", [*plain, *ways], specs=one, whole_test=True)
        if len(every) > 1:
            self.lanes["cohort"] = lanes(f", {len(every)} methods as one cohort", ways, specs=every)
        if peers:
            self.lanes["table"] = lanes(", logit table", ways, specs=one, table=True)
            self.lanes["seeds"] = lanes(f", {SEEDS} seeds at once", ways, specs=one, seeds=SEEDS)

    def result(self, taken: Taken, peaks: dict[str, float]) -> Benchmark | None:
        """What was measured so far; None where nothing was."""
        here = [process for process in self.processes if taken.get(process.lane.name)]
        if not here:
            return None
        first = taken[here[0].lane.name]
        rows = {p.lane.name: Measured(p, taken[p.lane.name], first, self.flops) for p in here}
        roles = {}
        for role, lanes in self.lanes.items():
            of_role = [rows[lane.name] for lane in lanes if lane.name in rows]
            if of_role and role != "peers":
                roles[role] = max(of_role, key=lambda row: row.median)
        batch = cells_of(self.plan)[0].protocol.batch_size
        return Benchmark(self.plan.name, self.plan.title or self.plan.name, batch, list(rows.values()), roles, peaks)

    def whole(self, result: Benchmark) -> dict[str, dict[str, float]]:
        """What a single run and a cohort take in full, by what a stretch of steps took.

        Minutes, and the share that is evaluations.
        """
        spec, _ = cells_of(self.plan)
        line = planned_timeline(spec)
        found: dict[str, dict[str, float]] = {}
        for role in ("run", "cohort"):
            if role in result.roles:
                row = result.roles[role]
                students = len(row.lane.specs)
                training = line.total * spec.protocol.batch_size * students / row.median
                tests = len(line.evaluations) * students * (self.evaluation or 0.0)
                found[role] = {"minutes": (training + tests) / 60, "evaluations": tests / (training + tests)}
        return found


def bench_gpu(
    pairs: Sequence[Pair],
    timer: LaneTimer,
    minutes: float,
    peers: bool,
    quick: bool,
    keep: Callable[[list[Benchmark], dict[str, Any]], None],
) -> tuple[list[Benchmark], dict[str, Any]]:
    """Time pairs in at most so many minutes.

    Args:
        timer: that has started nothing yet.
        peers: whether torchdistill and the plain loop take part, for the first pair.
        quick: whether the quickstart is timed too.
        keep: is given what was measured so far, again and again: results of the pairs, and times.

    Returns:
        the same in the end. Times: recipe -> what `Pair.whole` gives, and "quickstart_seconds".
    """
    begin = time.monotonic()
    for number, pair in enumerate(pairs):
        pair.choose_lanes(timer.machine, f"{pair.plan.name}: " if number else "", peers and not number)
    lanes = [lane for pair in pairs for of_role in pair.lanes.values() for lane in of_role]
    times: dict[str, Any] = {}
    taken: Taken = {}

    def results() -> list[Benchmark]:
        found = [(pair, pair.result(taken, timer.peaks)) for pair in pairs]
        times.update({pair.plan.name: pair.whole(result) for pair, result in found if result is not None})
        return [result for _, result in found if result is not None]

    def note(so_far: Taken) -> None:
        taken.update(so_far)
        keep(results(), times)

    try:
        started = {p.lane.name: p for p in timer.start(lanes, wait=READY * minutes * 60, at_once=len(lanes))}
        for pair in pairs:
            names = [lane.name for of_role in pair.lanes.values() for lane in of_role]
            pair.processes = [started[name] for name in names if name in started]
        timer.measure([*started.values()], "all lanes", begin + MEASURED * minutes * 60, note)
        for pair in pairs:
            result = pair.result(taken, {})
            if result is not None and "run" in result.roles:
                pair.evaluation = result.roles["run"].process.evaluation()
        note(taken)
    finally:
        timer.end()
    if quick:
        left = minutes * 60 - (time.monotonic() - begin)
        timer.tell(f"the quickstart, for {left:.0f} s at most")
        times["quickstart_seconds"] = quickstart(timer.device, left)
        keep(results(), times)
    return results(), times


def quickstart(device: str, limit: float) -> float | None:
    """Wall time of the quickstart in seconds, its teacher's training included.

    None where it takes longer than the limit.

    Raises:
        CellError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = ["run", "quickstart", "--no-adopt", "--device", device, "--runs", str(Path(folder) / "runs")]
        begin = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "kdbench", *words], cwd=folder, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return None
        if done.returncode:
            raise CellError(f"the quickstart failed: {done.stderr.strip()[-500:]}")
        return time.monotonic() - begin


def result_lines(results: Sequence[Benchmark], times: dict[str, Any]) -> str:
    """Ratios and times, a line each; the ratios of the first result last, for programs."""
    lines = []
    ratios = [" ".join(f"{role}={ratio:.2f}" for role, ratio in result.ratios.items()) for result in results]
    for result, of_result in zip(results, ratios, strict=True):
        lines.append(f"{result.title}, against {result.rows[0].lane.name}: {of_result}")
        for role, whole in times.get(result.recipe, {}).items():
            students = len(result.roles[role].lane.specs)
            what = "one run" if students == 1 else f"{students} side by side"
            lines.append(
                f"  {what} in full: {whole['minutes']:.1f} min by extrapolation, "
                f"{whole['evaluations']:.1%} of it evaluations"
            )
    if "quickstart_seconds" in times:
        taken = times["quickstart_seconds"]
        lines.append("quickstart: " + (f"{taken:.0f} s" if taken is not None else "not done in the time that was left"))
    lines += [f"RATIO {of_result}" for of_result in ratios[:1]]
    return "\n".join(lines)
