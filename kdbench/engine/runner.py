"""Carries a plan out: teachers first, then cohorts of cells spread over worker processes. Imports no torch.

What is finished is never run again: a cell's folder name holds its identity, and a record in it makes it whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from kdbench.engine import choosing
from kdbench.engine.compute import Computing, plainest
from kdbench.engine.pool import Pool
from kdbench.engine.scheduling import BEGUN, CellState, Memories, Work, balanced, begun, cohorts_of, fitting, kind
from kdbench.engine.timeline import planned_timeline
from kdbench.errors import CellError, UserError
from kdbench.files import home, write_json
from kdbench.recipe.planning import Plan, PlannedCell
from kdbench.recipe.schema import CellSpec, ComputeChoice, TeacherSpec

RECORD = "record.json"
# Folder beside the runs for what batch sources make once for several cells.
SOURCES = "sources"


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


class Listener(Protocol):
    """Is told what happens. `update` comes after every change; `say` is for what nobody should miss, at any time."""

    def say(self, text: str) -> None: ...
    def begin(self, cells: list[CellState], title: str) -> None: ...
    def doing(self, text: str) -> None: ...
    def update(self, cell: CellState) -> None: ...
    def end(self) -> None: ...


class Silent:
    def say(self, text: str) -> None: ...
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
    with alone(folder):
        write_json(
            folder / "recipe.json",
            {
                "name": plan.name,
                "title": plan.title,
                "recipe": plan.recipe,
                "cells": [cell.slug for cell in plan.cells],
            },
        )
        states = [CellState(i, label(cell), folder / cell.slug) for i, cell in enumerate(plan.cells)]
        for cell, state in zip(plan.cells, states, strict=True):
            if is_finished(state.folder):
                state.state = "finished"
                _rename(state.folder / RECORD, names(plan, cell))
        open_cells = [
            (cell, state) for cell, state in zip(plan.cells, states, strict=True) if state.state != "finished"
        ]
        if open_cells:
            with pool_for(options) as pool:
                memory = try_out([cell.spec for cell, _ in open_cells], pool)
                train_teachers([cell.spec for cell, _ in open_cells], options, pool, listener)
                listener.begin(states, plan.title or plan.name)
                try:
                    prepare([cell.spec for cell, _ in open_cells], options, pool, listener)
                    done = [state.folder for state in states if state.state == "finished"]
                    computings = computings_for(folder, open_cells, done, options, pool, listener)
                    _cells(plan, open_cells, computings, memory, options, pool, listener)
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


def pool_for(options: Options) -> Pool:
    settings = {
        "data_roots": options.roots(),
        "download": options.download,
        "cache": str(home() / "cache"),
        "checkpoint_seconds": options.checkpoint_seconds,
    }
    return Pool(options.device, options.jobs, options.registries, settings)


@contextmanager
def alone(folder: Path, wait: float = 0.5) -> Iterator[None]:
    """Only one run works in an output folder; another waits that many seconds for it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".run.lock")
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        raise UserError(
            f"another run works in {folder}", hint="wait for it, stop it, or give another folder: --runs DIR"
        ) from None
    try:
        yield
    finally:
        lock.release()


def try_out(specs: list[CellSpec], pool: Pool) -> Memories:
    """Build every kind of cell once, before anything is trained: what cannot be built is told now."""
    kinds = {kind(spec): spec.model_copy(update={"seed": 0}) for spec in specs}
    task = {"task": "try_out", "specs": [spec.model_dump(mode="json") for spec in kinds.values()], "threads": 1}
    memory: Memories = {}
    for event in pool.carry_out([task]):
        if event["event"] == "failed":
            raise error_of(event)
        if event["event"] == "memory":
            memory[event["key"]] = event["memory"]
    return memory


def train_teachers(specs: list[CellSpec], options: Options, pool: Pool, listener: Listener) -> None:
    """Train the teachers that have a recipe and no weights yet, each in a run of its own."""
    wanted: dict[str, TeacherSpec] = {}
    for spec in specs:
        if spec.teacher is not None and spec.teacher.trained_by is not None:
            wanted.setdefault(spec.teacher.trained_by.identity(), spec.teacher)
    for teacher in wanted.values():
        folder = teacher_folder(teacher, options.runs)
        # Another run may be training this very teacher: what it leaves is what this one needs.
        with alone(folder, wait=-1):
            if is_finished(folder):
                continue
            assert teacher.trained_by is not None
            cell = PlannedCell(teacher.trained_by, {"method": teacher.trained_by.method.name}, 0)
            state = CellState(0, f"teacher {teacher.name}", folder)
            plan = Plan(f"teacher {teacher.name}", "", [cell], cell.spec.method.name)
            train_teachers([cell.spec], options, pool, listener)
            listener.begin([state], f"teacher {teacher.name}")
            try:
                prepare([cell.spec], options, pool, listener)
                work: list[Work] = [(cell, state)]
                computings = computings_for(folder, work, [], options, pool, listener)
                _cells(plan, work, computings, try_out([cell.spec], pool), options, pool, listener)
            finally:
                listener.end()
            if state.state != "finished":
                raise CellError(f"the teacher '{teacher.name}' could not be trained: {state.message}")


def teacher_folder(spec: TeacherSpec, runs: Path) -> Path:
    """Folder of a teacher: the records of its training, or its measured accuracy."""
    identity = spec.trained_by.identity() if spec.trained_by else spec.weights.sha256  # type: ignore[union-attr]
    return runs / "teachers" / f"{spec.name}-{identity[:8]}"


def prepare(specs: list[CellSpec], options: Options, pool: Pool, listener: Listener) -> None:
    """Data and teachers once in one process, so that several workers do not all fetch them."""
    tasks: dict[str, dict[str, Any]] = {}
    prepared: set[str] = set()
    for spec in sorted(specs, key=lambda spec: spec.teacher is None):
        teacher = spec.teacher
        starts = [spec.student.start.sha256] if spec.student.start else []
        starts += [spec.student.weights_sha256] if spec.student.weights_sha256 else []
        given = " ".join([*([teacher.identity()] if teacher else []), *starts]) or None
        data = json.dumps([[part.name, part.root] for part in (spec.data, spec.target) if part is not None])
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
    # One after the other, so that several workers do not all fetch the same.
    for task in tasks.values():
        _carry_out([task], pool, listener)
    _carry_out(list(_sources(specs, options, pool).values()), pool, listener)


def _sources(specs: list[CellSpec], options: Options, pool: Pool) -> dict[str, dict[str, Any]]:
    """A task for each kind of batch source, teacher and seed: what is made before cells train."""
    tasks: dict[str, dict[str, Any]] = {}
    for spec in specs:
        sources = [stage.source.model_dump(mode="json") for stage in spec.method.stages.values() if stage.source]
        teacher = spec.teacher.identity() if spec.teacher else ""
        if sources:
            task: dict[str, Any] = {
                "task": "sources",
                "spec": spec.model_dump(mode="json"),
                "teacher_folder": str(teacher_folder(spec.teacher, options.runs)) if spec.teacher else None,
                "shared": str(options.runs / SOURCES),
            }
            domains = [part.model_dump(mode="json") for part in (spec.data, spec.target) if part is not None]
            key = json.dumps([sources, teacher, domains, spec.seed], sort_keys=True)
            tasks.setdefault(key, task)
    busy = max(min(pool.jobs, len(tasks)), 1)
    for task in tasks.values():
        task["threads"] = options.threads or max(1, min(pool.threads, pool.cores // busy))
    return tasks


def _carry_out(tasks: list[dict[str, Any]], pool: Pool, listener: Listener) -> None:
    for event in pool.carry_out(tasks):
        if event["event"] == "doing":
            listener.doing(event["text"])
        elif event["event"] == "note":
            listener.say(event["text"])
        elif event["event"] == "failed":
            raise error_of(event)


def computings_for(
    folder: Path, cells: list[Work], finished: list[Path], options: Options, pool: Pool, listener: Listener
) -> dict[str, Computing]:
    """How cells compute, by what their recipe leaves open: as this run began, else as a short trial finds fastest."""
    result: dict[str, Computing] = {}
    by_choice: dict[str, list[Work]] = {}
    for cell, state in cells:
        by_choice.setdefault(choosing.key(cell.spec.compute), []).append((cell, state))
    for key, work in by_choice.items():
        choice = work[0][0].spec.compute
        if choice.settled:
            result[key] = plainest(choice)
            continue
        found = choosing.kept(folder, choice) or choosing.of_records([f for f in finished if _chose(f, key)])
        result[key] = found or _trial(folder, choice, work, options, pool, listener)
    return result


def _chose(folder: Path, key: str) -> bool:
    """Whether a finished cell left the same things open."""
    try:
        spec = json.loads((folder / RECORD).read_text(encoding="utf-8"))["spec"]
        return choosing.key(CellSpec.model_validate(spec).compute) == key
    except (OSError, ValueError, KeyError):
        return False


def _trial(
    folder: Path, choice: ComputeChoice, cells: list[Work], options: Options, pool: Pool, listener: Listener
) -> Computing:
    """Let a worker measure on the cohort with the most steps, and keep what it chooses."""
    cohorts = balanced(cohorts_of(cells), pool.jobs)
    busy = min(pool.jobs, len(cohorts))
    steps = {state.id: planned_timeline(cell.spec).total for cell, state in cells}
    largest = max(cohorts, key=lambda cohort: sum(steps[state.id] for _, state in cohort))
    teacher_steps = sum(
        max((steps[state.id] for cell, state in cohort if cell.spec.teacher is not None), default=0)
        for cohort in cohorts
    )
    kinds = {kind(cell.spec): cell.spec for cell, _ in largest}
    task = {
        "task": "trial",
        "specs": [spec.model_dump(mode="json") for spec in kinds.values()],
        "work": {"student_steps": sum(steps.values()) / busy, "teacher_steps": teacher_steps / busy},
        "threads": options.threads or max(1, min(pool.threads, pool.cores // busy)),
        "teacher_folder": _teacher_folder_of(largest, options),
        "shared": str(options.runs / SOURCES),
    }
    for event in pool.carry_out([task]):
        if event["event"] == "doing":
            listener.doing(event["text"])
        elif event["event"] == "failed":
            raise error_of(event)
        elif event["event"] == "chosen":
            chosen = choosing.keep(folder, choice, event["computing"], event["why"], event["tried"])
            listener.doing(f"cells in {chosen.name} ({event['why']})")
    return chosen


def _teacher_folder_of(cohort: list[Work], options: Options) -> str | None:
    teacher = next((cell.spec.teacher for cell, _ in cohort if cell.spec.teacher is not None), None)
    return str(teacher_folder(teacher, options.runs)) if teacher else None


def _cells(
    plan: Plan,
    cells: list[Work],
    computings: dict[str, Computing],
    memory: Memories,
    options: Options,
    pool: Pool,
    listener: Listener,
) -> None:
    states = {state.id: state for _, state in cells}
    cohorts = fitting(balanced(cohorts_of(cells), pool.jobs), memory, pool.memory)
    busy = min(pool.jobs, len(cohorts))
    tasks = []
    for cohort in cohorts:
        threads = options.threads or max(1, min(pool.threads, pool.cores // busy))
        kept = begun(cohort[0][1].folder)
        threads = kept.get("threads", threads)
        for _, state in cohort:
            write_json(state.folder / BEGUN, kept | {"threads": threads})
        tasks.append(
            {
                "task": "cohort",
                "threads": threads,
                "logits": kept.get("logits"),
                "computing": computings[choosing.key(cohort[0][0].spec.compute)].plain(),
                "teacher_folder": _teacher_folder_of(cohort, options),
                "shared": str(options.runs / SOURCES),
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
            raise error_of(event)
        if kind == "failed":
            for cell_id in event["cells"]:
                _fail(states[cell_id], event["message"], listener)
        if kind in ("progress", "doing", "cell_finished", "cell_failed"):
            state = states[event["cell"]]
            if kind == "cell_failed":
                _fail(state, event["message"], listener)
                continue
            if kind == "progress" and state.state != "finished":
                state.state, state.step, state.total = "running", event["step"], event["total"]
                state.stage, state.accuracy, state.doing = event["stage"], event["accuracy"], ""
            elif kind == "doing":
                state.state, state.doing = "running", event["text"]
            elif kind == "cell_finished":
                state.state, state.step, state.accuracy = "finished", state.total, event["accuracy"]
                state.seconds = event["seconds"]
            listener.update(state)


def _fail(state: CellState, message: str, listener: Listener) -> None:
    if state.state not in ("finished", "failed"):
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
        "target": spec.target.name if spec.target else None,
        "protocol": spec.protocol.name,
        "seed": spec.seed,
        "axes": cell.axes,
        "order": cell.order,
        "baseline": plan.baseline,
        "title": plan.title,
    }


def _rename(file: Path, place: dict[str, Any]) -> None:
    """Let the record of a cell that was finished before say what the recipe calls it today, and no more than that."""
    try:
        text = file.read_text(encoding="utf-8")
        record = json.loads(text)
        record |= {"recipe": place["recipe"], "cell": {key: value for key, value in place.items() if key != "recipe"}}
        record["spec"]["method"]["label"] = place["label"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # Whoever reads the records tells what is wrong with it.
    if record != json.loads(text):
        write_json(file, record)


def error_of(event: dict[str, Any]) -> Exception:
    user = event.get("user")
    if user:
        return UserError(user["what"], user["where"], user["hint"])
    return CellError(event["message"] + ("\n" + event["trace"] if event.get("trace") else ""))
