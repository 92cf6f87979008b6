"""A run's workers at work: cells checked, data and teachers prepared, ways to compute chosen, cells trained. Imports no
torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from kdbench.engine import scheduling
from kdbench.engine.computing import compute
from kdbench.engine.computing.compute import Computing, Steps, plainest
from kdbench.engine.computing.device import not_used
from kdbench.engine.folders import teacher_folder
from kdbench.engine.options import Listener, Options
from kdbench.engine.workers import messages
from kdbench.engine.workers.finished import DataHere, check_teacher, names, take
from kdbench.engine.workers.pool import Pool
from kdbench.engine.workers.ray_pool import RayPool
from kdbench.engine.workers.versions import versions
from kdbench.errors import UserError
from kdbench.files import SOURCES, failed, home, locked
from kdbench.recipe.planning import Plan, PlannedCell
from kdbench.recipe.specs import CellSpec, TeacherSpec
from kdbench.recipe.timeline import planned_timeline
from kdbench.record import Record, finished_record, read_record, student_file


class Session:
    """What a run has its workers do.

    Attributes:
        memory: what the kinds of cells take that were checked.
    """

    def __init__(self, options: Options, listener: Listener) -> None:
        self.options, self.listener = options, listener
        settings = messages.Settings(
            data_roots=options.roots(),
            download=options.download,
            cache=home() / "cache",
            checkpoint_seconds=options.checkpoint_seconds,
            ranks=options.ranks,
            sync_batch_norm=options.sync_batch_norm,
            versions=versions(),
        )
        # Several ranks are one worker, which the others follow.
        jobs = 1 if options.ranks > 1 else options.jobs
        self.pool = (
            Pool(options.device, jobs, options.registries, settings)
            if options.cluster is None
            else RayPool(options.cluster, options.device, jobs, options.registries, settings, options.runs)
        )
        self.memory: scheduling.Memories = {}

    def __enter__(self) -> Session:
        self.pool.__enter__()
        if self.pool.unusable and self.options.device == "auto":
            self.listener.say(not_used(self.pool.unusable))
        return self

    def __exit__(self, *about: object) -> None:
        self.pool.__exit__(*about)

    def events(self, tasks: Sequence[messages.Task]) -> Iterator[messages.Event]:
        """Have tasks done. Yields what concerns cells, or answers; the rest is told to the listener.

        Raises:
            UserError, CellError: a task failed that is not the training of cells, or that the user can mend.
        """
        for event in self.pool.carry_out(tasks):
            if isinstance(event, messages.Doing) and event.cell is None:
                self.listener.doing(event.text)
            elif isinstance(event, messages.Announcement):
                self.listener.say(event.text)
            elif isinstance(event, messages.Failed) and (event.by_user or not event.cells):
                raise event.error
            else:
                yield event

    def check_cells(self, cells: scheduling.Cells) -> None:
        """Build every kind of cell once, before anything is trained: what cannot be built is told now."""
        kinds = {scheduling.kind(cell.spec): cell.spec.model_copy(update={"seed": 0}) for cell in cells}
        unknown = [spec for name, spec in kinds.items() if name not in self.memory]
        for event in self.events([messages.CheckCells(specs=unknown)] if unknown else []):
            if isinstance(event, messages.MemoryNeeded):
                self.memory[event.kind] = event.memory

    def train_teachers(self, cells: scheduling.Cells, here: DataHere, published: Sequence[Record] = ()) -> None:
        """Train the teachers that have a recipe and no weights yet, each in a run of its own.

        Args:
            published: teachers with weights beside their records; one that was trained on the data here is taken.

        Raises:
            UserError: for one that was trained before: its weights are gone or damaged, or it saw other data.
        """
        wanted: dict[str, TeacherSpec] = {}
        for teacher in (one for cell in cells for one in cell.spec.teachers):
            if teacher.trained_by is not None:
                wanted.setdefault(teacher.trained_by.identity(), teacher)
        for teacher in wanted.values():
            folder = teacher_folder(teacher, self.options.runs)
            # Another run may be training this very teacher: what it leaves is what this one needs.
            said = f"another run trains the teacher '{teacher.name}': waiting for it ({folder})"
            with locked_run(folder, -1, partial(self.listener.say, said)):
                if finished_record(folder) is None:
                    self._take_teacher(teacher, folder, here, published)
                if (record := finished_record(folder)) is not None:
                    student_file(record)
                    check_teacher(teacher, record, here)
                else:
                    self._train_teacher(teacher, folder, here, published)

    def _take_teacher(self, teacher: TeacherSpec, folder: Path, here: DataHere, published: Sequence[Record]) -> None:
        assert teacher.trained_by is not None
        for record in published:
            if record.identity == teacher.trained_by.identity() and not here.unlike(teacher.trained_by, record):
                take(record, folder)
                self.listener.say(f"teacher {teacher.name}: taken with its weights from {record.folder}")

    def _train_teacher(self, teacher: TeacherSpec, folder: Path, here: DataHere, published: Sequence[Record]) -> None:
        assert teacher.trained_by is not None
        title = f"teacher {teacher.name}"
        planned = PlannedCell(teacher.trained_by, {"method": teacher.trained_by.method.name}, 0)
        cell = scheduling.CellState(planned, 0, folder, title)
        plan = Plan(title, "", [planned], planned.spec.method.name)
        self.train_teachers([cell], here, published)
        self.listener.begin([cell], title)
        try:
            self.check_cells([cell])
            self.train(plan, folder, [cell])
        finally:
            self.listener.end()
        if cell.state != "finished":
            raise failed(f"the teacher '{teacher.name}' could not be trained: {cell.message}", [cell.message])

    def prepare(self, cells: scheduling.Cells) -> None:
        """Data, teachers and what batch sources share, each once, so that several workers do not all fetch them."""
        tasks: dict[tuple[str, ...], messages.Task] = {}
        for spec in sorted((cell.spec for cell in cells), key=lambda spec: spec.teacher is None):
            data = json.dumps([[part.name, part.root] for part in spec.domains])
            given = [spec.teacher.identity()] if spec.teacher else []
            given += [spec.student.start.sha256] if spec.student.start else []
            given += [spec.student.weights_sha256] if spec.student.weights_sha256 else []
            if given or all(key[0] != data for key in tasks):
                once = messages.Prepare(spec=spec, teacher_folder=self._teacher_of(spec), threads=self.pool.threads)
                tasks.setdefault((data, *given), once)
        for task in tasks.values():
            list(self.events([task]))
        list(self.events(self._source_tasks(cells)))

    def _source_tasks(self, cells: scheduling.Cells) -> list[messages.Task]:
        """A task for each kind of batch source, teacher and seed: what is made before cells train."""
        kinds: dict[str, CellSpec] = {}
        for spec in (cell.spec for cell in cells):
            sources = [source.model_dump(mode="json") for source in spec.method.sources.values()]
            if sources:
                teacher = spec.teacher.identity() if spec.teacher else ""
                domains = [part.model_dump(mode="json") for part in spec.domains]
                kinds.setdefault(json.dumps([sources, teacher, domains, spec.seed], sort_keys=True), spec)
        threads = self._threads(len(kinds))
        shared = self.options.runs / SOURCES
        return [
            messages.PrepareSources(spec=spec, teacher_folder=self._teacher_of(spec), shared=shared, threads=threads)
            for spec in kinds.values()
        ]

    def computings(self, folder: Path, cells: scheduling.Cells, finished: Sequence[Path]) -> dict[str, Computing]:
        """How cells compute, by what their recipe leaves open (`compute.key`): as this run began, else as its finished
        cells were computed, else as a short trial finds fastest."""
        result: dict[str, Computing] = {}
        open_alike: dict[str, scheduling.Cells] = {}
        for cell in cells:
            open_alike.setdefault(compute.key(cell.spec.compute), []).append(cell)
        for key, alike in open_alike.items():
            choice = alike[0].spec.compute
            # What several ranks would take is not tried: the trial measures one process.
            if choice.settled or self.options.ranks > 1:
                result[key] = plainest(choice)
                continue
            before = (
                compute.of_record(record)
                for record in map(read_record, finished)
                if record.resolved is not None and compute.key(record.resolved.compute) == key
            )
            result[key] = compute.kept(folder, choice) or next(before, None) or self._measured(folder, alike)
        return result

    def _measured(self, folder: Path, cells: scheduling.Cells) -> Computing:
        """Let a worker measure on the cohort with the most steps, and keep what it chooses."""
        cohorts = self._cohorts(cells)
        busy = min(self.pool.jobs, len(cohorts))
        steps = {cell.id: planned_timeline(cell.spec).total for cell in cells}
        taught = [[steps[cell.id] for cell in cohort if cell.spec.teacher is not None] for cohort in cohorts]
        largest = max(cohorts, key=lambda cohort: sum(steps[cell.id] for cell in cohort))
        task = messages.ChooseComputing(
            specs=list({scheduling.kind(cell.spec): cell.spec for cell in largest}.values()),
            ahead=Steps(sum(steps.values()) / busy, sum(max(steps, default=0) for steps in taught) / busy),
            threads=self._threads(busy),
            teacher_folder=self._teacher_of(*(cell.spec for cell in largest)),
            shared=self.options.runs / SOURCES,
        )
        (chosen,) = [event.chosen for event in self.events([task]) if isinstance(event, messages.ComputingChosen)]
        compute.keep(folder, chosen)
        self.listener.doing(f"cells in {chosen.computing.name} ({chosen.why})")
        return chosen.computing

    def train(self, plan: Plan, folder: Path, cells: scheduling.Cells, finished: Sequence[Path] = ()) -> None:
        """Train cells that were checked, whose teachers are there.

        Args:
            folder: of the run. finished: folders of its cells that need no training.
        """
        self.prepare(cells)
        computings = self.computings(folder, cells, finished)
        states = {cell.id: cell for cell in cells}
        programs = self._programs(cells)
        tasks = []
        for cohort in ([cell for cohort in program for cell in cohort] for program in programs):
            kept = scheduling.begun(cohort[0].folder)
            threads = kept.threads or self._threads(len(programs))
            for cell in cohort:
                scheduling.begin(cell.folder, scheduling.Begun(threads=threads, logits=kept.logits))
            tasks.append(
                messages.TrainCells(
                    cells=[
                        messages.CellTask(id=c.id, folder=c.folder, spec=c.spec, names=names(plan, c.cell))
                        for c in cohort
                    ],
                    computing=computings[compute.key(cohort[0].spec.compute)],
                    logits=kept.logits,
                    teacher_folder=self._teacher_of(*(cell.spec for cell in cohort)),
                    shared=self.options.runs / SOURCES,
                    threads=threads,
                )
            )
        for event in self.events(tasks):
            self._follow(event, states)

    def _programs(self, cells: scheduling.Cells) -> list[list[scheduling.Cells]]:
        """Cells as cohorts, and these as programs: what a worker trains at once."""
        cohorts = self._cohorts(cells)
        together = self.options.seeds_together
        if together if together is not None else self.on_gpu:
            return scheduling.joined(cohorts, self.pool.jobs, self.memory, self.pool.memory, at_once=self.on_gpu)
        return [[cohort] for cohort in cohorts]

    def _cohorts(self, cells: scheduling.Cells) -> list[scheduling.Cells]:
        """Cells that share what they can, as far as there is memory."""
        cohorts = scheduling.balanced(scheduling.cohorts_of(cells), self.pool.jobs)
        return scheduling.fitting(cohorts, self.memory, self.pool.memory, at_once=self.on_gpu)

    @property
    def on_gpu(self) -> bool:
        return self.pool.devices != ["cpu"]

    def _follow(self, event: messages.Event, states: dict[int, scheduling.CellState]) -> None:
        """Let an event of a cohort change the states of its cells."""
        if isinstance(event, messages.Failed):
            for cell in event.cells:
                self._fail(states[cell], str(event.error))
        elif isinstance(event, messages.CellFailed):
            self._fail(states[event.cell], event.message)
        elif isinstance(event, messages.Doing | messages.Progress | messages.CellFinished) and event.cell is not None:
            state = states[event.cell]
            if isinstance(event, messages.Doing):
                state.state, state.doing = "running", event.text
            elif isinstance(event, messages.CellFinished):
                state.state, state.step, state.accuracy = "finished", state.total, event.accuracy
                state.seconds = event.seconds
            elif state.state != "finished":
                state.state, state.step, state.total = "running", event.step, event.total
                state.stage, state.accuracy, state.doing = event.stage, event.accuracy, ""
            self.listener.update(state)

    def _fail(self, state: scheduling.CellState, message: str) -> None:
        if state.state not in ("finished", "failed"):
            state.state, state.message = "failed", message
            self.listener.update(state)

    def _threads(self, tasks: int) -> int:
        """Threads of each of so many tasks."""
        busy = max(min(self.pool.jobs, tasks), 1)
        return self.options.threads or max(1, min(self.pool.threads, self.pool.cores // busy))

    def _teacher_of(self, *specs: CellSpec) -> Path | None:
        """The folder of the teacher of these cells."""
        teacher = next((spec.teacher for spec in specs if spec.teacher is not None), None)
        return teacher_folder(teacher, self.options.runs) if teacher else None


def locked_run(
    folder: Path, wait: float = 0.5, waiting: Callable[[], None] = lambda: None
) -> AbstractContextManager[None]:
    """A lock: only one run works in an output folder; another waits that many seconds for it (-1: for ever)."""
    hint = "wait for it, stop it, or give another folder: --runs DIR"
    return locked(folder / ".run.lock", wait, UserError(f"another run works in {folder}", hint=hint), waiting)
