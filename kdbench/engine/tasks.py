"""What a worker can be asked to do: try cells out, prepare data and teachers, train a cohort."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from kdbench.engine import checkpoint, logits
from kdbench.engine.batches import Batches, load_data
from kdbench.engine.build import choices_of, resolve
from kdbench.engine.cohort import Cohort, Seat
from kdbench.engine.compute import REFERENCE, Computing
from kdbench.engine.dry import try_out
from kdbench.engine.finish import finish, machine
from kdbench.engine.inputs import Workplace
from kdbench.engine.log import MetricsLog
from kdbench.engine.logit_files import table_at
from kdbench.engine.member import Member, Places, Teacher
from kdbench.engine.memory import memory_of, peak_memory
from kdbench.engine.network import Network
from kdbench.engine.pool import LEAVE_SECONDS
from kdbench.engine.scheduling import BEGUN
from kdbench.engine.streamed import batches_of
from kdbench.engine.teachers import (
    TeacherFile,
    as_used,
    fingerprint,
    load_teacher,
    locate,
    measured,
    on_target,
    trained,
    untrained_teacher,
)
from kdbench.engine.trial import Work, choose, possible
from kdbench.errors import CellError, UserError
from kdbench.files import sweep, write_json
from kdbench.recipe.schema import CellSpec, DataSpec
from kdbench.sources.images import ImageData
from kdbench.sources.pictures import Pictures

# How long to wait for a cell's folder: an orphan of a killed run holds it only until it has left.
LOCK_SECONDS = 2 * LEAVE_SECONDS


class Desk:
    """Carries tasks out in one process.

    Args:
        emit: sends an event (keywords become its fields).
        stopping: whether the run is being stopped; asked before every step.
    """

    def __init__(self, emit: Callable[..., None], stopping: Callable[[], bool]) -> None:
        self.emit, self.stopping = emit, stopping
        self.data: dict[str, ImageData | Pictures] = {}

    def carry_out(self, task: dict[str, Any]) -> None:
        """Do a task. UserError and CellError say what went wrong with the whole of it."""
        torch.set_num_threads(task["threads"])
        # float32 means float32: TensorFloat-32 keeps ten bits of the mantissa.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        device = torch.device(task["device"])
        kinds = {
            "try_out": self.try_out,
            "prepare": self.prepare,
            "sources": self.prepare_sources,
            "trial": self.trial,
            "fill": self.fill,
            "cohort": self.train,
        }
        kinds[task["task"]](task, device)

    def try_out(self, task: dict[str, Any], device: torch.device) -> None:
        """Build every kind of cell once, and tell what memory it will take."""
        for spec in map(CellSpec.model_validate, task["specs"]):
            try_out(spec)
            self.emit(event="memory", key=spec.identity(), memory=asdict(memory_of(spec, device)))

    def prepare(self, task: dict[str, Any], device: torch.device) -> None:
        """Data in the cache and the teacher measured, so that later tasks find both."""
        spec = CellSpec.model_validate(task["spec"])
        self.emit(event="doing", task=task["id"], text=f"data {spec.data.name}")
        data, _ = self._domains(spec, task)
        if spec.student.start is not None:
            locate(spec.student.start, task["download"])
        if spec.teacher is not None:
            self.emit(event="doing", task=task["id"], text=f"teacher {spec.teacher.name}")
            file = self._teacher_file(spec, data, task, device)
            for doubt in file.doubts if file else ():
                self.emit(event="note", text=f"warning: {doubt}")
        for choice in choices_of(spec):
            self.emit(event="note", text=f"note: {choice}")

    def prepare_sources(self, task: dict[str, Any], device: torch.device) -> None:
        """What a cell's batch sources need before it trains."""
        spec = CellSpec.model_validate(task["spec"])
        data = self._load(spec.data, task)
        file = self._teacher_file(spec, data, task, device)
        teacher = self._teacher(spec, file, device, REFERENCE)

        def tell(text: str) -> None:
            self.emit(event="doing", task=task["id"], text=text)

        for name, stage in spec.method.stages.items():
            if stage.source is not None:
                place = Workplace(spec, name, device, teacher.eyes() if teacher else None, **_places(task, file))
                resolve(stage.source.target).prepare(place, tell, self.stopping, **stage.source.options)
        if self.stopping():
            raise CellError("stopped; the same command goes on from here")

    def trial(self, task: dict[str, Any], device: torch.device) -> None:
        """Choose how to compute, by measuring on cells of one cohort."""
        specs = [CellSpec.model_validate(spec) for spec in task["specs"]]
        first = next((spec for spec in specs if spec.teacher is not None), specs[0])
        data, target = self._domains(first, task)
        batches = batches_of(first, data, device, target)
        file = self._teacher_file(first, data, task, device)

        def teacher(way: Computing) -> Teacher | None:
            loaded = self._teacher(first, file, device, way)
            self._logits(first, file, data, batches, loaded, None, device)
            return loaded

        choice = choose(
            first.compute,
            specs,
            batches,
            teacher,
            Work(**task["work"]),
            device,
            lambda text: self.emit(event="doing", task=task["id"], text=text),
            _places(task, file),
        )
        self.emit(event="chosen", computing=choice.computing.plain(), why=choice.why, tried=choice.tried)

    def fill(self, task: dict[str, Any], device: torch.device) -> None:
        """Fill a table of teacher logits, or with `estimate` only tell what that takes."""
        spec = CellSpec.model_validate(task["spec"])
        assert spec.teacher is not None
        data = self._load(spec.data, task)
        if isinstance(data, Pictures):
            raise UserError(f"'{spec.data.name}' is read while training: its pictures have no finite set of views")
        way = possible(Computing(**task["computing"]), device)
        if task["estimate"]:
            # Time and size are the same for any weights; its own may not be trained yet.
            teacher, sha256 = untrained_teacher(spec.teacher, spec.data, device, way), ""
        else:
            file = self._teacher_file(spec, data, task, device)
            assert file is not None
            teacher, sha256 = load_teacher(spec.teacher, spec.data, file.file, device, way), file.sha256
        table = table_at(logits.table_key(spec, sha256, data, way.precision), spec.teacher.name)
        images, views, classes = table.shape
        about = {"folder": str(table.folder), "images": images, "views": views, "classes": classes}
        each = 0.0 if table.complete else logits.seconds_an_image(table, teacher, data, spec.protocol, device)
        left = images - table.done
        self.emit(event="table", **about, bytes=table.bytes, done=table.done, seconds=left * each)
        if task["estimate"] or table.complete:
            return

        def tell(done: int, seconds: float) -> None:
            self.emit(event="filled", **about, done=done, seconds=seconds)

        if not logits.fill(table, teacher, data, spec.protocol, device, tell, self.stopping):
            raise CellError("stopped; the same command goes on from here")

    def train(self, task: dict[str, Any], device: torch.device) -> None:
        """Train a cohort. Members' failures are told as events; the others go on."""
        cells = task["cells"]
        specs = [CellSpec.model_validate(cell["spec"]) for cell in cells]
        first = next((spec for spec in specs if spec.teacher is not None), specs[0])
        with ExitStack() as locks:
            for cell in cells:
                locks.enter_context(_alone(Path(cell["folder"])))
            # An orphan of a killed run may have finished a cell while this task waited for its folder.
            for cell in [cell for cell in cells if (Path(cell["folder"]) / "record.json").is_file()]:
                record = json.loads((Path(cell["folder"]) / "record.json").read_text(encoding="utf-8"))
                self._finished(cell["id"], record)
                specs.pop(cells.index(cell))
                cells.remove(cell)
            if not cells:
                return
            data, target = self._domains(first, task)
            batches = batches_of(first, data, device, target)
            computing = possible(Computing(**task["computing"]), device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            file = self._teacher_file(first, data, task, device)
            teacher = self._teacher(first, file, device, computing)
            source = self._logits(first, file, data, batches, teacher, task["logits"], device)
            for cell in cells:
                write_json(Path(cell["folder"]) / BEGUN, {"threads": task["threads"], "logits": source})
            before = fingerprint(teacher.network.model) if teacher else None
            seats: dict[int, Seat] = {}
            for cell, spec in zip(cells, specs, strict=True):
                try:
                    seats[cell["id"]] = _seat(
                        spec, Path(cell["folder"]), batches, (data, target), teacher, file, task, device, computing
                    )
                except Exception as error:  # noqa: BLE001 - one cell's user code must not end the others
                    self.emit(event="cell_failed", cell=cell["id"], message=str(error) or type(error).__name__)
            ids = {id(seat): cell_id for cell_id, seat in seats.items()}
            names = {cell["id"]: cell["cell"] for cell in cells}

            def report(seat: Seat, entry: dict[str, Any] | None) -> None:
                for cell_id, other in seats.items():
                    if other.active or other is seat:
                        self._progress(cell_id, other)

            def tell(seat: Seat, text: str) -> None:
                self.emit(event="doing", cell=ids[id(seat)], text=text)

            def done(seat: Seat) -> None:
                own = teacher if seat.member.spec.teacher is not None else None
                if own is not None and fingerprint(own.network.model) != before:
                    raise CellError(
                        "the frozen teacher changed while its students trained: a defect of the method's "
                        "loss, or of kdbench"
                    )
                if seat.member.guide is not None:
                    seat.member.guide.check()
                compute = {
                    **machine(device, task["threads"]),
                    **_way(seat.member, own),
                    "cohort": len(seats),
                    "peak_memory_bytes": peak_memory(device),
                }
                record = finish(
                    seat.member,
                    seat.folder,
                    dict(names[ids[id(seat)]]),
                    batches,
                    (data, target),
                    file if own else None,
                    own.network.model if own else None,
                    compute,
                )
                seat.log.close()
                self._finished(ids[id(seat)], record)

            Cohort(
                list(seats.values()), batches, teacher, report, done, self.stopping, task["checkpoint_seconds"], tell
            ).run()
            for seat in seats.values():
                if seat.failure is not None:
                    self.emit(event="cell_failed", cell=ids[id(seat)], message=seat.failure)

    def _finished(self, cell_id: int, record: dict[str, Any]) -> None:
        accuracy, seconds = record["result"]["test"]["last"], record["compute"]["seconds"]
        self.emit(event="cell_finished", cell=cell_id, accuracy=accuracy, seconds=seconds)

    def _progress(self, cell_id: int, seat: Seat) -> None:
        if seat.failure is not None:
            self.emit(event="cell_failed", cell=cell_id, message=seat.failure)
            return
        member = seat.member
        self.emit(
            event="progress",
            cell=cell_id,
            step=member.step,
            total=member.timeline.total,
            stage=member.span.name,
            accuracy=member.history[-1]["test"]["accuracy"] if member.history else None,
        )

    def _load(self, spec: DataSpec, task: dict[str, Any]) -> ImageData | Pictures:
        """A data set; it is kept for the next task."""
        roots = [spec.root] if spec.root else task["data_roots"]
        key = f"{spec.name} {spec.options} {roots}"
        if key not in self.data:
            data = load_data(spec, [Path(root) for root in roots], task["download"], Path(task["cache"]))
            # Two at most: a cell's domains.
            self.data = dict([*self.data.items()][-1:]) | {key: data}
        return self.data[key]

    def _domains(
        self, spec: CellSpec, task: dict[str, Any]
    ) -> tuple[ImageData | Pictures, ImageData | Pictures | None]:
        """A cell's data set, and its target domain."""
        data = self._load(spec.data, task)
        if spec.target is None:
            return data, None
        target = self._load(spec.target, task)
        if target.classes != data.classes:
            raise UserError(
                f"the classes of '{spec.data.name}' and of '{spec.target.name}' are called differently: "
                f"{', '.join(data.classes[:3])} … against {', '.join(target.classes[:3])} …",
                hint="both domains have the same classes, in the same order",
            )
        return data, target

    def _teacher_file(
        self, spec: CellSpec, data: ImageData | Pictures, task: dict[str, Any], device: torch.device
    ) -> TeacherFile | None:
        if spec.teacher is None:
            return None
        folder = Path(task["teacher_folder"])
        file = (
            trained(folder)
            if spec.teacher.weights is None
            else measured(spec.teacher, folder, task["download"], spec.data, data, device)
        )
        if file is None:
            raise CellError(f"the teacher '{spec.teacher.name}' is not trained: there is no record in {folder}")
        if spec.teacher.trained_by is not None:
            file = as_used(spec.teacher, file, folder, spec.data, data, device)
        if spec.target is not None:
            target = self._load(spec.target, task)
            file = on_target(spec.teacher, file, folder, spec.data, spec.target, target, device)
        return file

    def _teacher(
        self, spec: CellSpec, file: TeacherFile | None, device: torch.device, computing: Computing
    ) -> Teacher | None:
        """The teacher of a cohort."""
        if spec.teacher is None or file is None:
            return None
        teacher = load_teacher(spec.teacher, spec.data, file.file, device, computing)
        teacher.route = file.route
        return teacher

    def _logits(
        self,
        spec: CellSpec,
        file: TeacherFile | None,
        data: ImageData | Pictures,
        batches: Batches,
        teacher: Teacher | None,
        kept: str | None,
        device: torch.device,
    ) -> str:
        """Give a teacher the table of its logits, where there is a whole one or the cells began with it.

        Args:
            kept: name of the table that they began with, "" for none, None for cells that begin now.

        Returns:
            the name of the table, "" for none.
        """
        if kept == "" or teacher is None or spec.teacher is None or file is None or isinstance(data, Pictures):
            return ""
        key = logits.table_key(spec, file.sha256, data, teacher.computing.precision)
        table = table_at(key, spec.teacher.name)
        if kept is not None and not (table.complete and table.folder.name == kept):
            raise UserError(
                f"these cells began with the table of teacher logits '{kept}', which is not there any more",
                where=str(table.folder),
                hint="fill it again ('kdbench logits fill RECIPE'), or remove the unfinished cells' folders",
            )
        if not table.complete:
            return ""
        values = logits.opened(table, teacher, data, spec.protocol, device)
        teacher.logits = logits.PartLogits(values, batches.positions)
        return table.folder.name


def _places(task: dict[str, Any], file: TeacherFile | None, folder: Path | None = None) -> Places:
    """Where batch sources keep their files."""
    return {"teacher_sha256": file.sha256 if file else "", "folder": folder, "shared": Path(task["shared"])}


def _way(member: Member, teacher: Teacher | None) -> dict[str, Any]:
    """How a member was computed, as its record says it."""
    way = member.computing
    spans = member.timeline.spans
    asks = any("logits" in member.teacher_points(span.start).get("data", []) for span in spans)
    networks = [member.student, *([teacher.network] if teacher else [])]
    return {
        "precision": way.precision,
        "layout": way.layout,
        # Where a way with graphs was chosen, but no stage here is long enough for one, there are none.
        "compile": any(network.graphs for network in networks),
        "cuda_graphs": way.cuda_graphs and any(network.graphs for network in networks),
        "teacher_logits": "table" if asks and teacher is not None and teacher.logits is not None else "computed",
        "evaluation": "float32, eager",
        **({"not_compiled": network.untraceable} if (network := _untraceable(networks)) else {}),
    }


def _untraceable(networks: list[Network]) -> Network | None:
    return next((network for network in networks if network.untraceable), None)


def _seat(
    spec: CellSpec,
    folder: Path,
    batches: Batches,
    domains: tuple[ImageData | Pictures, ImageData | Pictures | None],
    teacher: Teacher | None,
    file: TeacherFile | None,
    task: dict[str, Any],
    device: torch.device,
    computing: Computing,
) -> Seat:
    """A cell's place in a cohort, from its checkpoint if there is one."""
    own = teacher if spec.teacher is not None else None
    data, target = domains
    key = {
        "identity": spec.identity(),
        "data": data.fingerprint,
        **({"target": target.fingerprint} if target else {}),
        "threads": task["threads"],
        "computing": computing.plain(),
        "device": device.type,
        "teacher": file.sha256 if file and own else None,
    }
    member = Member(spec, batches, own, device, computing, _places(task, file if own else None, folder))
    state = checkpoint.load(folder, key, member.state())
    if state is not None:
        member.load_state(state)
    return Seat(member, folder, key, MetricsLog(folder, member.history))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The right to write into a cell's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".cell.lock")
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise UserError(f"another process works in {folder}", hint="wait for it, or stop it") from None
    try:
        sweep(folder)
        yield
    finally:
        lock.release()
