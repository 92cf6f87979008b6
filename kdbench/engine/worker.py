"""A worker process: tasks come in as JSON lines, events go out as JSON lines.

Started by the runner as `python -m kdbench.engine.worker`. When its input ends (the runner is gone, however it went) it
writes its checkpoints and leaves; so no orphan goes on computing beside a resumed run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from kdbench.errors import CellError, UserError

LOCK_SECONDS = 60.0
LEAVE_SECONDS = 20.0


class Worker:
    """Carries out tasks in order. `events` takes one JSON line an event."""

    def __init__(self, tasks: IO[str], events: IO[str]) -> None:
        self.tasks, self.events = tasks, events
        self.stopping = threading.Event()
        self.queue: list[dict[str, Any] | None] = []
        self.ready = threading.Condition()
        self.data: dict[str, Any] = {}

    def emit(self, **event: Any) -> None:
        self.events.write(json.dumps(event) + "\n")
        self.events.flush()

    def serve(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()
        import torch

        self.emit(event="ready", cuda=torch.cuda.device_count() if torch.cuda.is_available() else 0)
        while True:
            with self.ready:
                self.ready.wait_for(lambda: bool(self.queue))
                task = self.queue.pop(0)
            if task is None:
                return
            try:
                self._carry_out(task)
                self.emit(event="done", task=task["id"], stopped=self.stopping.is_set())
            except (UserError, CellError) as error:
                user = {"what": error.what, "where": error.where, "hint": error.hint} if isinstance(error, UserError) else None
                self.emit(event="failed", task=task["id"], message=str(error), user=user)
            except Exception as error:  # noqa: BLE001 - whatever went wrong, the runner must hear of it
                self.emit(event="failed", task=task["id"], message=f"{type(error).__name__}: {error}", user=None,
                          trace=traceback.format_exc())

    def _listen(self) -> None:
        for line in self.tasks:
            task = json.loads(line)
            if task["task"] == "stop":
                break
            with self.ready:
                self.queue.append(task)
                self.ready.notify()
        self.stopping.set()
        with self.ready:
            self.queue.append(None)
            self.ready.notify()
        time.sleep(LEAVE_SECONDS)
        os._exit(1)

    def _carry_out(self, task: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(task["threads"])
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        device = torch.device(task["device"])
        kinds: dict[str, Callable[[dict[str, Any], Any], None]] = {"prepare": self._prepare, "cohort": self._cohort}
        kinds[task["task"]](task, device)

    def _load(self, spec: Any, task: dict[str, Any]) -> Any:
        """A data set, kept for the next task."""
        from kdbench.engine.batches import load_data

        key = f"{spec.name}:{spec.root}"
        if key not in self.data:
            roots = [Path(spec.root)] if spec.root else [Path(root) for root in task["data_roots"]]
            self.data = {key: load_data(spec, roots, task["download"], Path(task["cache"]))}
        return self.data[key]

    def _prepare(self, task: dict[str, Any], device: Any) -> None:
        """Data in the cache, and the teacher measured, so that later tasks find both."""
        from kdbench.engine.teachers import measured
        from kdbench.recipe.schema import CellSpec

        spec = CellSpec.model_validate(task["spec"])
        self.emit(event="doing", task=task["id"], text=f"data {spec.data.name}")
        data = self._load(spec.data, task)
        if spec.teacher is not None and spec.teacher.weights is not None:
            self.emit(event="doing", task=task["id"], text=f"teacher {spec.teacher.name}")
            measured(spec.teacher, Path(task["teacher_folder"]), task["download"], spec.data, data, device)

    def _cohort(self, task: dict[str, Any], device: Any) -> None:
        from kdbench.engine.batches import Batches
        from kdbench.engine.cohort import Cohort, Seat
        from kdbench.engine.finish import finish, machine
        from kdbench.engine.teachers import load_teacher, measured, trained
        from kdbench.recipe.schema import CellSpec

        specs = [CellSpec.model_validate(cell["spec"]) for cell in task["cells"]]
        folders = [Path(cell["folder"]) for cell in task["cells"]]
        locks = [self._lock(folder) for folder in folders]
        try:
            first = next((spec for spec in specs if spec.teacher is not None), specs[0])
            data = self._load(first.data, task)
            teacher = file = None
            if first.teacher is not None:
                teacher_folder = Path(task["teacher_folder"])
                file = (trained(teacher_folder) if first.teacher.weights is None else
                        measured(first.teacher, teacher_folder, task["download"], first.data, data, device))
                if file is None:
                    raise CellError(f"the teacher '{first.teacher.name}' is not trained: {teacher_folder}")
                teacher = load_teacher(first.teacher, first.data, file.file, device)
                before = fingerprint(teacher.extractor.model)
            batches = Batches(first, data, device)
            compute = machine(device, task["threads"])
            seats: list[Seat] = []
            for spec, folder, cell in zip(specs, folders, task["cells"], strict=True):
                own = teacher if spec.teacher is not None else None
                key = {"identity": spec.identity(), "data": data.fingerprint, "threads": task["threads"],
                       "device": device.type, "teacher": file.sha256 if file and own else None}
                try:
                    seats.append(self._seat(spec, folder, key, batches, own, device))
                except (UserError, CellError, RuntimeError) as error:
                    self.emit(event="cell_failed", cell=cell["id"], message=str(error))
            ids = {str(cell["folder"]): cell["id"] for cell in task["cells"]}

            def report(seat: Seat, entry: dict[str, Any] | None) -> None:
                cell_id = ids[str(seat.folder)]
                if seat.failure is not None:
                    self.emit(event="cell_failed", cell=cell_id, message=seat.failure)
                    return
                member = seat.member
                for other in seats:
                    if other.active or other is seat:
                        self.emit(event="progress", cell=ids[str(other.folder)], step=other.member.step,
                                  total=other.member.timeline.total, stage=other.member.span.name,
                                  accuracy=other.member.history[-1]["test"]["accuracy"] if other.member.history else None)
                del member, entry

            def done(seat: Seat) -> None:
                cell = task["cells"][[str(f) for f in folders].index(str(seat.folder))]
                own_teacher = teacher if seat.member.spec.teacher is not None else None
                if own_teacher is not None and fingerprint(own_teacher.extractor.model) != before:
                    raise CellError("the frozen teacher changed while its students trained: this is a defect of kdbench "
                                    "or of the method's loss")
                record = finish(seat.member, seat.folder, dict(cell["cell"]), batches, data, file if own_teacher else None,
                                own_teacher.extractor.model if own_teacher else None,
                                {**compute, "precision": seat.member.spec.precision, "cohort": len(seats)})
                seat.log.close()
                self.emit(event="cell_finished", cell=cell["id"], accuracy=record["result"]["test"]["last"],
                          seconds=record["compute"]["seconds"])

            Cohort(seats, batches, teacher, report, done, self.stopping.is_set, task["checkpoint_seconds"]).run()
            for seat in seats:
                if seat.failure is not None:
                    self.emit(event="cell_failed", cell=ids[str(seat.folder)], message=seat.failure)
        finally:
            for lock in locks:
                lock.release()

    def _seat(self, spec: Any, folder: Path, key: dict[str, Any], batches: Any, teacher: Any, device: Any) -> Any:
        from kdbench.engine import checkpoint
        from kdbench.engine.cohort import Seat
        from kdbench.engine.log import MetricsLog
        from kdbench.engine.member import Member

        member = Member(spec, batches, teacher, device)
        state = checkpoint.load(folder, key)
        if state is not None:
            member.load_state(state)
        return Seat(member, folder, key, MetricsLog(folder, member.history))

    def _lock(self, folder: Path) -> FileLock:
        """The right to write into a cell's folder. An orphan of a killed run holds it only until it has left."""
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".cell.lock")
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise UserError(f"another process works in {folder}", hint="wait for it, or stop it") from None
        return lock


def fingerprint(model: Any) -> str:
    """sha256 over all parameters and buffers of a network, names included."""
    import hashlib

    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(dtype=_bytes()).numpy().tobytes())
    return digest.hexdigest()


def _bytes() -> Any:
    import torch

    return torch.uint8


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever a library prints must not end up between the events.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.path.extend(sys.argv[1:])
    Worker(sys.stdin, events).serve()


if __name__ == "__main__":
    main()
