"""Carries a plan out: teachers first, then cohorts of cells spread over worker processes. Imports no torch.

What is finished is never run again: a cell's folder name holds its identity, and a record in it makes it whole.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from kdbench.errors import CellError, UserError
from kdbench.files import home, write_json
from kdbench.recipe.planning import Plan, PlannedCell
from kdbench.recipe.schema import CellSpec, TeacherSpec

RECORD = "record.json"


@dataclass(frozen=True)
class Options:
    """How to run: everything that is not in the recipe because it changes no number.

    jobs: worker processes (None: one for each CPU core or GPU). threads: of each worker (None: cores shared out).
    """

    runs: Path = Path("runs")
    jobs: int | None = None
    threads: int | None = None
    device: str = "auto"
    data_roots: tuple[Path, ...] = ()
    download: bool = True
    registries: tuple[Path, ...] = ()
    checkpoint_seconds: float = 60.0

    def roots(self) -> list[str]:
        """Folders searched for data, in order."""
        from_env = [Path(part) for part in os.environ.get("KDBENCH_DATA", "").split(os.pathsep) if part]
        return [str(root) for root in (*self.data_roots, *from_env, Path("data"), home() / "data")]


@dataclass
class CellState:
    """Progress of one cell, for whoever watches. `state`: waiting, running, finished, failed."""

    id: int
    label: str
    folder: Path
    state: str = "waiting"
    step: int = 0
    total: int = 0
    stage: str = ""
    accuracy: float | None = None
    seconds: float = 0.0
    message: str = ""


# A cell and its progress.
Work = tuple[PlannedCell, CellState]


class Listener(Protocol):
    """Is told what happens. `update` comes after every change."""

    def begin(self, cells: list[CellState], title: str) -> None: ...
    def doing(self, text: str) -> None: ...
    def update(self, cell: CellState) -> None: ...
    def end(self) -> None: ...


class Silent:
    def begin(self, cells: list[CellState], title: str) -> None: ...
    def doing(self, text: str) -> None: ...
    def update(self, cell: CellState) -> None: ...
    def end(self) -> None: ...


@dataclass
class Outcome:
    """Folders of finished cells in the plan's order, and what failed."""

    folder: Path
    finished: list[Path] = field(default_factory=list)
    failed: list[CellState] = field(default_factory=list)


def run(plan: Plan, options: Options, listener: Listener | None = None) -> Outcome:
    """Run every cell of a plan that is not finished yet.

    Raises:
        UserError: another run works in the same folder; data or weights are not to be had.
        KeyboardInterrupt: after all cells were checkpointed.
    """
    listener = listener or Silent()
    folder = options.runs / plan.name
    with _alone(folder):
        write_json(folder / "recipe.json", {"name": plan.name, "title": plan.title, "recipe": plan.recipe})
        states = [CellState(i, label(cell), folder / cell.slug) for i, cell in enumerate(plan.cells)]
        for state in states:
            if is_finished(state.folder):
                state.state = "finished"
        open_cells = [
            (cell, state) for cell, state in zip(plan.cells, states, strict=True) if state.state != "finished"
        ]
        if open_cells:
            with _Pool(options) as pool:
                _try_out([cell.spec for cell, _ in open_cells], pool)
                _teachers([cell.spec for cell, _ in open_cells], options, pool, listener)
                listener.begin(states, plan.title or plan.name)
                try:
                    _prepare([cell.spec for cell, _ in open_cells], options, pool, listener)
                    _cells(plan, open_cells, options, pool, listener)
                finally:
                    listener.end()
        else:
            listener.begin(states, plan.title or plan.name)
            listener.end()
    return Outcome(
        folder, [s.folder for s in states if s.state == "finished"], [s for s in states if s.state == "failed"]
    )


def label(cell: PlannedCell) -> str:
    """A cell as people call it."""
    others = [f"{path} {value}" for path, value in cell.axes.items() if not path.startswith("method")]
    return ", ".join([cell.spec.method.label, *others, f"seed {cell.spec.seed}"])


def is_finished(folder: Path) -> bool:
    return (folder / RECORD).is_file()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one run works in an output folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".run.lock")
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        raise UserError(
            f"another run works in {folder}", hint="wait for it, stop it, or give another folder: --runs DIR"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _try_out(specs: list[CellSpec], pool: _Pool) -> None:
    """Build every kind of cell once, before anything is trained: what cannot be built is told now."""
    kinds = {spec.model_copy(update={"seed": 0}).identity(): spec for spec in specs}
    task = {"task": "try_out", "specs": [spec.model_dump(mode="json") for spec in kinds.values()], "threads": 1}
    for event in pool.carry_out([task]):
        if event["event"] == "failed":
            raise _error(event)


def _teachers(specs: list[CellSpec], options: Options, pool: _Pool, listener: Listener) -> None:
    """Train the teachers that have a recipe and no weights yet, each in a run of its own."""
    wanted: dict[str, TeacherSpec] = {}
    for spec in specs:
        if spec.teacher is not None and spec.teacher.trained_by is not None:
            wanted.setdefault(spec.teacher.trained_by.identity(), spec.teacher)
    for teacher in wanted.values():
        folder = teacher_folder(teacher, options.runs)
        with _alone(folder):
            if is_finished(folder):
                continue
            assert teacher.trained_by is not None
            cell = PlannedCell(teacher.trained_by, {"method": teacher.trained_by.method.name}, 0)
            state = CellState(0, f"teacher {teacher.name}", folder)
            plan = Plan(f"teacher {teacher.name}", "", [cell], cell.spec.method.name)
            listener.begin([state], f"teacher {teacher.name}")
            try:
                _teachers([cell.spec], options, pool, listener)
                _prepare([cell.spec], options, pool, listener)
                _cells(plan, [(cell, state)], options, pool, listener)
            finally:
                listener.end()
            if state.state != "finished":
                raise CellError(f"the teacher '{teacher.name}' could not be trained: {state.message}")


def teacher_folder(spec: TeacherSpec, runs: Path) -> Path:
    """Folder of a teacher: the records of its training, or its measured accuracy."""
    identity = spec.trained_by.identity() if spec.trained_by else spec.weights.sha256  # type: ignore[union-attr]
    return runs / "teachers" / f"{spec.name}-{identity[:8]}"


def _prepare(specs: list[CellSpec], options: Options, pool: _Pool, listener: Listener) -> None:
    """Data and teachers once in one process, so that several workers do not all fetch them."""
    tasks: dict[str, dict[str, Any]] = {}
    prepared: set[str] = set()
    for spec in sorted(specs, key=lambda spec: spec.teacher is None):
        teacher = spec.teacher
        given = teacher.weights.sha256 if teacher and teacher.weights else None
        data = json.dumps([spec.data.name, spec.data.root])
        if given is None and data in prepared:
            continue
        prepared.add(data)
        key = f"{data} {given}"
        tasks.setdefault(
            key,
            {
                "task": "prepare",
                "spec": spec.model_dump(mode="json"),
                "teacher_folder": str(teacher_folder(teacher, options.runs)) if teacher else None,
                "threads": pool.threads,
            },
        )
    for task in tasks.values():
        for event in pool.carry_out([task]):
            if event["event"] == "doing":
                listener.doing(event["text"])
            elif event["event"] == "failed":
                raise _error(event)


def _cells(plan: Plan, cells: list[Work], options: Options, pool: _Pool, listener: Listener) -> None:
    states = {state.id: state for _, state in cells}
    cohorts = _balanced(_cohorts(cells), pool.jobs)
    busy = min(pool.jobs, len(cohorts))
    tasks = []
    for cohort in cohorts:
        teacher = next((cell.spec.teacher for cell, _ in cohort if cell.spec.teacher is not None), None)
        threads = options.threads or max(1, min(pool.threads, pool.cores // busy))
        tasks.append(
            {
                "task": "cohort",
                "threads": _kept_threads([state.folder for _, state in cohort], threads),
                "teacher_folder": str(teacher_folder(teacher, options.runs)) if teacher else None,
                "cells": [
                    {
                        "id": state.id,
                        "folder": str(state.folder),
                        "spec": cell.spec.model_dump(mode="json"),
                        "cell": names(plan, cell),
                    }
                    for cell, state in cohort
                ],
            }
        )
    for event in pool.carry_out(tasks):
        kind = event["event"]
        if kind == "failed" and (event.get("user") or not event["cells"]):
            raise _error(event)
        if kind == "failed":
            for cell_id in event["cells"]:
                _fail(states[cell_id], event["message"], listener)
        if kind in ("progress", "cell_finished", "cell_failed"):
            state = states[event["cell"]]
            if kind == "cell_failed":
                _fail(state, event["message"], listener)
                continue
            if kind == "progress" and state.state != "finished":
                state.state, state.step, state.total = "running", event["step"], event["total"]
                state.stage, state.accuracy = event["stage"], event["accuracy"]
            elif kind == "cell_finished":
                state.state, state.step, state.accuracy = "finished", state.total, event["accuracy"]
                state.seconds = event["seconds"]
            listener.update(state)


def _fail(state: CellState, message: str, listener: Listener) -> None:
    if state.state != "finished":
        state.state, state.message = "failed", message
        listener.update(state)


def names(plan: Plan, cell: PlannedCell) -> dict[str, Any]:
    """What a record says of its cell's place in the comparison."""
    spec = cell.spec
    return {
        "recipe": plan.name,
        "method": spec.method.name,
        "label": spec.method.label,
        "student": spec.student.name,
        "teacher": spec.teacher.name if spec.teacher else None,
        "data": spec.data.name,
        "protocol": spec.protocol.name,
        "seed": spec.seed,
        "axes": cell.axes,
        "order": cell.order,
        "baseline": plan.baseline,
        "title": plan.title,
    }


def _cohorts(cells: list[Work]) -> list[list[Work]]:
    """Cells that may train behind one teacher pass: the same data, seed, batches and teacher. A cell without a teacher
    goes along: it costs the others nothing."""
    groups: dict[str, dict[str, list[Work]]] = {}
    for cell, state in cells:
        spec = cell.spec
        extra = [stage.extra_epochs for stage in spec.method.stages.values() if stage.extra_epochs]
        protocol = spec.protocol.model_dump(mode="json", exclude={"name", "normalization"})
        base = json.dumps([spec.data.model_dump(mode="json"), spec.seed, protocol, spec.precision, extra])
        teacher = spec.teacher
        key = json.dumps([teacher.name, teacher.normalization.model_dump()]) if teacher else ""
        groups.setdefault(base, {}).setdefault(key, []).append((cell, state))
    result = []
    for by_teacher in groups.values():
        alone = by_teacher.pop("", [])
        first, *others = by_teacher.values() or [[]]
        result += [[*alone, *first], *others]
    return result


def _balanced(cohorts: list[list[Work]], jobs: int) -> list[list[Work]]:
    """Cohorts for `jobs` workers: those that would be left for a last, incomplete round are split among all workers."""
    left = len(cohorts) % jobs
    if not left:
        return cohorts
    whole, rest = cohorts[: len(cohorts) - left], cohorts[len(cohorts) - left :]
    parts = []
    for cohort in rest:
        n = max(1, min(jobs // left, len(cohort)))
        parts += [cohort[i::n] for i in range(n)]
    return whole + parts


def _kept_threads(folders: list[Path], threads: int) -> int:
    """Bits depend on the thread count: a cell that has begun goes on with the one that it began with."""
    for folder in folders:
        file = folder / "cell.json"
        try:
            threads = int(json.loads(file.read_text(encoding="utf-8"))["threads"])
        except (OSError, ValueError, KeyError):
            write_json(file, {"threads": threads})
    return threads


def _error(event: dict[str, Any]) -> Exception:
    user = event.get("user")
    if user:
        return UserError(user["what"], user["where"], user["hint"])
    return CellError(event["message"] + ("\n" + event["trace"] if event.get("trace") else ""))


class _Pool:
    """Worker processes, started when they are needed, stopped with a checkpoint when the block ends."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Who sets OMP_NUM_THREADS shares the machine: more threads than that would only wait for each other.
        self.threads = _omp_threads() or self.cores
        self.events: queue.Queue[tuple[int, dict[str, Any]]] = queue.Queue()
        self.workers: list[subprocess.Popen[str]] = []
        self.devices: list[str] = []
        self._next = 0

    def __enter__(self) -> _Pool:
        self._start()
        ready = self._event()[1]
        gpus = ready["cuda"]
        if self.options.device == "cuda" and not gpus:
            raise UserError("there is no CUDA device", where="--device", hint="use --device cpu or auto")
        if self.options.device.startswith("cuda:"):
            self.devices = [self.options.device]
        elif gpus and self.options.device in ("auto", "cuda"):
            self.devices = [f"cuda:{i}" for i in range(gpus)]
        else:
            self.devices = ["cpu"]
        on_cpu = self.devices == ["cpu"]
        self.jobs = self.options.jobs or (self.cores if on_cpu else len(self.devices))
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        for worker in self.workers:
            try:
                assert worker.stdin is not None
                worker.stdin.close()
            except OSError:
                pass
        for worker in self.workers:
            try:
                worker.wait(timeout=30)
            except subprocess.TimeoutExpired:
                worker.kill()

    def _start(self) -> None:
        number = len(self.workers)
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        path = [str(folder.resolve()) for folder in self.options.registries]
        worker = subprocess.Popen(
            [sys.executable, "-m", "kdbench.engine.worker", *path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        self.workers.append(worker)
        threading.Thread(target=self._listen, args=(number, worker), daemon=True).start()

    def _listen(self, number: int, worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            self.events.put((number, json.loads(line)))
        self.events.put((number, {"event": "gone", "code": worker.wait()}))

    def _event(self) -> tuple[int, dict[str, Any]]:
        while True:
            try:
                return self.events.get(timeout=0.5)
            except queue.Empty:
                continue

    def carry_out(self, tasks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Hand the tasks out to the workers and yield their events until all are done."""
        waiting = list(tasks)
        assigned: dict[int, dict[str, Any]] = {}
        while len(self.workers) < min(self.jobs, len(tasks)):
            self._start()
        idle = list(range(len(self.workers)))
        while waiting or assigned:
            while waiting and idle:
                number = idle.pop(0)
                task = waiting.pop(0)
                self._send(number, task)
                assigned[number] = task
            number, event = self._event()
            task = assigned.get(number, {})
            cells = [cell["id"] for cell in task.get("cells", [])]
            if event["event"] == "gone":
                if number in assigned:
                    del assigned[number]
                    yield {"event": "failed", "cells": cells, "message": _gone(event["code"]), "user": None}
                if len(assigned) == 0 and not idle and waiting:
                    raise CellError(_gone(event["code"]))
                continue
            if event["event"] in ("done", "failed") and number in assigned:
                del assigned[number]
                idle.append(number)
            yield {**event, "cells": cells}

    def _send(self, number: int, task: dict[str, Any]) -> None:
        self._next += 1
        message = {
            "id": self._next,
            "device": self.devices[number % len(self.devices)],
            "data_roots": self.options.roots(),
            "download": self.options.download,
            "cache": str(home() / "cache"),
            "checkpoint_seconds": self.options.checkpoint_seconds,
            **task,
        }
        stdin = self.workers[number].stdin
        assert stdin is not None
        stdin.write(json.dumps(message) + "\n")
        stdin.flush()


def _omp_threads() -> int:
    """Threads that the user allows, 0 where nothing is said."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(first) if first.isdigit() else 0


def _gone(code: int) -> str:
    if code < 0:
        return f"the worker process was ended by signal {-code}" + (
            " (often: not enough memory; try --jobs 1)" if code == -9 else ""
        )
    return f"the worker process ended with code {code}"
