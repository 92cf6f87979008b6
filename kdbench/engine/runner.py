"""Carries a plan out: teachers first, then cohorts of cells spread over worker processes. Imports no torch.

What is finished is never run again: a cell's folder name holds its identity, and a sound record in it makes it whole,
for the data and the teacher that the record names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout
from pydantic import ValidationError

from kdbench.engine import choosing
from kdbench.engine.compute import Computing, plainest
from kdbench.engine.finished import DataHere, Finished, check_teacher
from kdbench.engine.messages import (
    CellFailed,
    CellFinished,
    CellTask,
    Chosen,
    Doing,
    Event,
    Failed,
    MemoryNeeded,
    Note,
    Prepare,
    PrepareSources,
    Progress,
    Settings,
    Task,
    TrainCohort,
    Trial,
    TryOut,
)
from kdbench.engine.pool import Pool
from kdbench.engine.scheduling import (
    Begun,
    CellState,
    Memories,
    Work,
    balanced,
    begin,
    begun,
    cohorts_of,
    fitting,
    joined,
    kind,
)
from kdbench.errors import CellError, UserError
from kdbench.files import home, write_json
from kdbench.reading import inside, read_json, same_name
from kdbench.recipe.planning import SOURCES, TEACHERS, Plan, PlannedCell
from kdbench.recipe.schema import ComputeChoice
from kdbench.recipe.specs import CellSpec, TeacherSpec
from kdbench.recipe.timeline import planned_timeline
from kdbench.record import RECORD, Record, finished_record, read_record, student_file


@dataclass(frozen=True)
class Options:
    """How to run: everything that is not in the recipe because it changes no number.

    jobs: worker processes (None: one for each CPU core or GPU). threads: of each worker (None: cores shared out).
    seeds_together: whether a worker trains several seeds of a comparison at once, as memory allows (None: on a GPU).
    """

    runs: Path = Path("runs")
    jobs: int | None = None
    threads: int | None = None
    seeds_together: bool | None = None
    device: str = "auto"
    data_roots: tuple[Path, ...] = ()
    download: bool = True
    registries: tuple[Path, ...] = ()
    checkpoint_seconds: float = 60.0

    def roots(self) -> list[Path]:
        """Folders searched for data, in order."""
        from_env = [Path(part) for part in os.environ.get("KDBENCH_DATA", "").split(os.pathsep) if part]
        return [*self.data_roots, *from_env, Path("data"), home() / "data"]


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


def run(
    plan: Plan,
    options: Options,
    listener: Listener | None = None,
    results: Path = Path(),
    published: Mapping[str, Record] | None = None,
) -> Outcome:
    """Run every cell of a plan that is not finished yet.

    Args:
        results, published: a folder of published results, and records in it by the names of their cells' folders: such
            a cell is taken over in place of training it, where it fits to the data and the teacher here.

    Raises:
        UserError: another run works in the same folder; data or weights are not to be had; a damaged record, or one
            that was made from other data or by another teacher than those here.
        KeyboardInterrupt: after all cells were checkpointed.
    """
    listener = listener or Silent()
    folder, folder_of = options.runs / plan.name, partial(teacher_folder, runs=options.runs)
    _check_case(folder)
    with alone(folder):
        states = [CellState(i, label(cell), _place(folder, cell)) for i, cell in enumerate(plan.cells)]
        write_json(
            folder / "recipe.json",
            {
                "name": plan.name,
                "title": plan.title,
                "recipe": plan.recipe,
                "cells": [state.folder.name for state in states],
            },
        )
        finished = Finished(list(zip(plan.cells, states, strict=True)), published or {}, listener.say)
        # What is damaged of the way in which they began is told before a teacher is trained.
        for cell, state in finished.open:
            begun(state.folder), choosing.kept(folder, cell.spec.compute)
        # Who only wants a table need not have the device.
        with pool_for(options if finished.open or finished.taken else replace(options, device="cpu")) as pool:
            memory = try_out([cell.spec for cell, _ in finished.open], pool)
            here = DataHere(pool, listener.say)
            finished.compare_data(here, folder_of)
            train_teachers([cell.spec for cell, _ in finished.open], options, pool, listener, here)
            finished.compare_teachers(folder_of)
            finished.adopt(results, folder)
            for cell, state in zip(plan.cells, states, strict=True):
                if state.state == "finished":
                    _rename(state.folder / RECORD, names(plan, cell))
            if any(kind(cell.spec) not in memory for cell, _ in finished.open):
                memory = try_out([cell.spec for cell, _ in finished.open], pool)
            listener.begin(states, plan.title or plan.name)
            try:
                if finished.open:
                    if pool.unusable:
                        listener.say(f"warning: there is a GPU that torch cannot use: {pool.unusable}")
                    _train(plan, finished.open, states, memory, options, pool, listener)
            finally:
                listener.end()
    return Outcome(
        folder, [s.folder for s in states if s.state == "finished"], [s for s in states if s.state == "failed"]
    )


def _train(
    plan: Plan,
    cells: list[Work],
    states: list[CellState],
    memory: Memories,
    options: Options,
    pool: Pool,
    listener: Listener,
) -> None:
    """Train the cells of a run that are not finished."""
    prepare([cell.spec for cell, _ in cells], options, pool, listener)
    done = [state.folder for state in states if state.state == "finished"]
    computings = computings_for(options.runs / plan.name, cells, done, options, pool, listener)
    _cells(plan, cells, computings, memory, options, pool, listener)


def _check_case(folder: Path) -> None:
    """Refuse a folder beside which another lies whose name many systems take for the same."""
    for other in folder.parent.iterdir() if folder.parent.is_dir() else ():
        if other.name != folder.name and same_name(other.name, folder.name):
            raise UserError(
                f"there is another run, '{other.name}', whose name is the same on other systems",
                where=str(folder),
                hint="rename the recipe's file, or give another folder: --runs DIR",
            )


def label(cell: PlannedCell) -> str:
    """A cell as people call it."""
    others = [f"{path} {value}" for path, value in cell.axes.items() if not path.startswith("method")]
    return ", ".join([cell.spec.method.label, *others, f"seed {cell.spec.seed}"])


def _place(folder: Path, cell: PlannedCell) -> Path:
    """A cell's folder, also where an earlier version finished it under another name."""
    places = [inside(folder, slug) for slug in cell.slugs]
    return next((place for place in places if is_finished(place)), places[0])


def is_finished(folder: Path) -> bool:
    """UserError for a record that cannot be read."""
    return finished_record(folder) is not None


def pool_for(options: Options) -> Pool:
    settings = Settings(
        data_roots=options.roots(),
        download=options.download,
        cache=home() / "cache",
        checkpoint_seconds=options.checkpoint_seconds,
    )
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
    if not kinds:
        return {}
    memory: Memories = {}
    for event in pool.carry_out([TryOut(specs=list(kinds.values()))]):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, MemoryNeeded):
            memory[event.key] = event.memory
    return memory


def train_teachers(specs: list[CellSpec], options: Options, pool: Pool, listener: Listener, here: DataHere) -> None:
    """Train the teachers that have a recipe and no weights yet, each in a run of its own. UserError for one that was
    trained before and whose weights are gone or damaged, or that was trained on other data."""
    wanted: dict[str, TeacherSpec] = {}
    for spec in specs:
        if spec.teacher is not None and spec.teacher.trained_by is not None:
            wanted.setdefault(spec.teacher.trained_by.identity(), spec.teacher)
    for teacher in wanted.values():
        folder = teacher_folder(teacher, options.runs)
        # Another run may be training this very teacher: what it leaves is what this one needs.
        with alone(folder, wait=-1):
            if (record := finished_record(folder)) is not None:
                student_file(record)
                check_teacher(teacher, record, here)
                continue
            assert teacher.trained_by is not None
            cell = PlannedCell(teacher.trained_by, {"method": teacher.trained_by.method.name}, 0)
            state = CellState(0, f"teacher {teacher.name}", folder)
            plan = Plan(f"teacher {teacher.name}", "", [cell], cell.spec.method.name)
            train_teachers([cell.spec], options, pool, listener, here)
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
    if (own := spec.trained_by) is None:
        return inside(runs / TEACHERS, f"{spec.name}-{spec.weights.sha256[:8]}")  # type: ignore[union-attr]
    places = [inside(runs / TEACHERS, f"{spec.name}-{own.identity(earlier)[:8]}") for earlier in (False, True)]
    return next((place for place in places if is_finished(place)), places[0])


def prepare(specs: list[CellSpec], options: Options, pool: Pool, listener: Listener) -> None:
    """Data and teachers once in one process, so that several workers do not all fetch them."""
    tasks: dict[str, Task] = {}
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
            Prepare(
                spec=spec,
                teacher_folder=teacher_folder(teacher, options.runs) if teacher else None,
                threads=pool.threads,
            ),
        )
    # One after the other, so that several workers do not all fetch the same.
    for task in tasks.values():
        _carry_out([task], pool, listener)
    _carry_out(_sources(specs, options, pool), pool, listener)


def _sources(specs: list[CellSpec], options: Options, pool: Pool) -> list[Task]:
    """A task for each kind of batch source, teacher and seed: what is made before cells train."""
    kinds: dict[str, CellSpec] = {}
    for spec in specs:
        sources = [stage.source.model_dump(mode="json") for stage in spec.method.stages.values() if stage.source]
        teacher = spec.teacher.identity() if spec.teacher else ""
        if sources:
            domains = [part.model_dump(mode="json") for part in (spec.data, spec.target) if part is not None]
            key = json.dumps([sources, teacher, domains, spec.seed], sort_keys=True)
            kinds.setdefault(key, spec)
    busy = max(min(pool.jobs, len(kinds)), 1)
    return [
        PrepareSources(
            spec=spec,
            teacher_folder=teacher_folder(spec.teacher, options.runs) if spec.teacher else None,
            shared=options.runs / SOURCES,
            threads=options.threads or max(1, min(pool.threads, pool.cores // busy)),
        )
        for spec in kinds.values()
    ]


def _carry_out(tasks: list[Task], pool: Pool, listener: Listener) -> None:
    for event in pool.carry_out(tasks):
        if isinstance(event, Doing):
            listener.doing(event.text)
        elif isinstance(event, Note):
            listener.say(event.text)
        elif isinstance(event, Failed):
            raise event.error


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
        return choosing.key(CellSpec.model_validate(read_record(folder).spec).compute) == key
    except ValidationError:
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
    task = Trial(
        specs=list(kinds.values()),
        student_steps=sum(steps.values()) / busy,
        teacher_steps=teacher_steps / busy,
        threads=options.threads or max(1, min(pool.threads, pool.cores // busy)),
        teacher_folder=_teacher_folder_of(largest, options),
        shared=options.runs / SOURCES,
    )
    for event in pool.carry_out([task]):
        if isinstance(event, Doing):
            listener.doing(event.text)
        elif isinstance(event, Failed):
            raise event.error
        elif isinstance(event, Chosen):
            chosen = choosing.keep(folder, choice, event.computing.plain(), event.why, event.tried)
            listener.doing(f"cells in {chosen.name} ({event.why})")
    return chosen


def _teacher_folder_of(cohort: list[Work], options: Options) -> Path | None:
    teacher = next((cell.spec.teacher for cell, _ in cohort if cell.spec.teacher is not None), None)
    return teacher_folder(teacher, options.runs) if teacher else None


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
    on_gpu = pool.devices != ["cpu"]
    cohorts = fitting(balanced(cohorts_of(cells), pool.jobs), memory, pool.memory, at_once=on_gpu)
    programs = [[cohort] for cohort in cohorts]
    if options.seeds_together if options.seeds_together is not None else on_gpu:
        programs = joined(cohorts, pool.jobs, memory, pool.memory, at_once=on_gpu)
    busy = min(pool.jobs, len(programs))
    tasks = []
    for cohort in ([work for cohort in program for work in cohort] for program in programs):
        threads = options.threads or max(1, min(pool.threads, pool.cores // busy))
        kept = begun(cohort[0][1].folder)
        threads = kept.threads or threads
        for _, state in cohort:
            begin(state.folder, Begun(threads=threads, logits=kept.logits))
        tasks.append(
            TrainCohort(
                cells=[
                    CellTask(id=state.id, folder=state.folder, spec=cell.spec, names=names(plan, cell))
                    for cell, state in cohort
                ],
                computing=computings[choosing.key(cohort[0][0].spec.compute)],
                logits=kept.logits,
                teacher_folder=_teacher_folder_of(cohort, options),
                shared=options.runs / SOURCES,
                threads=threads,
            )
        )
    for event in pool.carry_out(tasks):
        if isinstance(event, Failed) and (event.by_user or not event.cells):
            raise event.error
        _follow(event, states, listener)


def _follow(event: Event, states: dict[int, CellState], listener: Listener) -> None:
    """Let an event of a cohort change the states of its cells."""
    if isinstance(event, Note):
        listener.say(event.text)
    elif isinstance(event, Failed):
        for cell in event.cells:
            _fail(states[cell], str(event.error), listener)
    elif isinstance(event, CellFailed):
        _fail(states[event.cell], event.message, listener)
    elif isinstance(event, Doing | Progress | CellFinished) and event.cell is not None:
        state = states[event.cell]
        if isinstance(event, Doing):
            state.state, state.doing = "running", event.text
        elif isinstance(event, CellFinished):
            state.state, state.step, state.accuracy = "finished", state.total, event.accuracy
            state.seconds = event.seconds
        elif state.state != "finished":
            state.state, state.step, state.total = "running", event.step, event.total
            state.stage, state.accuracy, state.doing = event.stage, event.accuracy, ""
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
        read_record(file)
    except UserError:
        return  # Whoever reads the records tells what is wrong with it.
    before = read_json(file)
    record = before | {"recipe": place["recipe"], "cell": {k: v for k, v in place.items() if k != "recipe"}}
    method = record["spec"].get("method") or {}
    record["spec"] |= {"method": method | {"label": place["label"]}}
    if record != before:
        write_json(file, record)
