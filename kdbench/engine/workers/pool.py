"""Worker processes and the tasks that they share. Imports no torch."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kdbench.engine.computing.device import available_memory
from kdbench.engine.workers.messages import (
    Announcement,
    Done,
    Event,
    Failed,
    Gone,
    Ready,
    Settings,
    Task,
    TrainCells,
    read_line,
)
from kdbench.errors import CellError, UserError
from kdbench.files import cores, name_user

# How many workers are tried for the first: its node may be lost, which a cluster notices late.
MOST_STARTS = 5
# How long a worker that was told to stop may take to leave: it may be in the middle of an evaluation.
LEAVE_SECONDS = 120.0
# Of that, how long a second interrupt does not make the run leave without them.
SPARED_SECONDS = 10.0
# How often who waits for events looks up. A signal that comes in the instant before a wait begins does not end it.
LOOK_UP_SECONDS = 0.5
# What ends a run, and reaches the whole process group.
ENDS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
# Of the memory that is free, what workers plan with.
SHARE = 0.85

# A training step asks for the same large blocks again and again. By default the C library gives each back to the system
# and gets fresh pages, cleared one by one, the next time; so told, it keeps them, in pages of 2 MB where it may.
ALLOCATOR = {
    "GLIBC_TUNABLES": ":".join(
        (
            "glibc.malloc.mmap_max=0",
            "glibc.malloc.trim_threshold=1099511627776",
            "glibc.malloc.top_pad=67108864",
            "glibc.malloc.hugetlb=1",
        )
    )
}


class Pool:
    """Worker processes, started when they are needed, stopped with a checkpoint when the block ends.

    A worker that dies (killed, out of memory) fails the task that it had; another takes its place for the rest.

    Args:
        device: auto, cpu, cuda or cuda:N.
        jobs: most workers at once; by default one for each core, or each GPU.
        paths: folders that workers import users' modules from.
        settings: that every task carries.

    Attributes:
        unusable: why a GPU that is there cannot be used, "" where there is none such.
    """

    def __init__(self, device: str, jobs: int | None, paths: tuple[Path, ...], settings: Settings) -> None:
        self.device, self.paths, self.settings = device, paths, settings
        self.cores = cores()
        # Who sets OMP_NUM_THREADS shares the machine: more threads than that would only wait for each other.
        self.threads = _omp_threads(self.cores) or self.cores
        self.jobs = jobs or self.cores
        self._one_for_each_gpu = jobs is None
        # Of C: an interrupt between two lines of queue.Queue leaves its lock undone.
        self.events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        # Processes, or what stands for them.
        self.workers: dict[int, Any] = {}
        self.devices: list[str] = []
        self._on: dict[int, str] = {}
        self._started = self._sent = 0

    def __enter__(self) -> Pool:
        try:
            for _ in range(MOST_STARTS):
                self._start()
                number, ready = self._next()
                if not (isinstance(ready, Gone) and ready.lost):
                    break
                self.workers.pop(number, None)
            if isinstance(ready, Failed):
                raise ready.error
            if not isinstance(ready, Ready):
                gone = ready if isinstance(ready, Gone) else Gone(code=1)
                raise CellError(f"{_gone(gone)} before it could begin; what it printed stands above")
            self.unusable = ready.unusable
            self._choose_devices(len(ready.cuda))
            self.memory = self._memory(ready.cuda)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, kind: Any = None, *_: Any) -> None:
        # A terminal that closes says so twice, and a scheduler may.
        with spared():
            for worker in self.workers.values():
                self._dismiss(worker)
            self._wait(SPARED_SECONDS)
        for worker in self._wait(LEAVE_SECONDS):
            worker.kill()
        # torchrun interrupts all ranks when one has ended: that is what happened, and not all progress is saved.
        while kind is KeyboardInterrupt and self.settings.ranks > 1 and self.workers:
            number, event = self._next()
            if isinstance(event, Gone):
                self.workers.pop(number, None)
                if event.code:
                    raise CellError(_gone(event)) from None

    def _dismiss(self, worker: Any) -> None:
        """Let a worker write its checkpoints and leave."""
        with suppress(OSError):
            worker.stdin.close()

    def _wait(self, seconds: float) -> list[Any]:
        """Those of the workers that have not left after so many seconds."""
        end = time.monotonic() + seconds
        while left := [worker for worker in self.workers.values() if worker.poll() is None]:
            if time.monotonic() >= end:
                break
            time.sleep(0.02)
        return left

    def _next(self) -> tuple[int, Event]:
        while True:
            try:
                return self.events.get(timeout=LOOK_UP_SECONDS)
            except queue.Empty:
                continue

    def carry_out(self, tasks: Sequence[Task]) -> Iterator[Event]:
        """Hand the tasks out and yield the workers' events until all are done. `Failed` names the cells of its task."""
        waiting = list(tasks)
        assigned: dict[int, Task] = {}
        while waiting or assigned:
            for number in [n for n in self.workers if n not in assigned]:
                if waiting and self._send(number, waiting[0]):
                    assigned[number] = waiting.pop(0)
            if waiting and len(self.workers) < self.jobs:
                self._start()
                continue
            number, event = self._next()
            if isinstance(event, Gone):
                self.workers.pop(number, None)
                if self.settings.ranks > 1 and event.code:
                    # The other ranks had met this one, and will meet no other.
                    raise CellError(_gone(event))
                if number not in assigned:
                    if event.code and self._died_idle():
                        raise CellError(_gone(event))
                    continue
                if event.lost and self._again(assigned[number]):
                    waiting.append(assigned.pop(number))
                    yield Announcement(
                        text=f"warning: {_gone(event)}; its cells continue elsewhere from their last checkpoint"
                    )
                    continue
                event = Failed(message=_gone(event))
            if isinstance(event, Done | Failed):
                task = assigned.pop(number, None)
                if isinstance(event, Failed) and isinstance(task, TrainCells):
                    event = event.model_copy(update={"cells": [cell.id for cell in task.cells]})
            yield event

    def _again(self, task: Task) -> bool:
        """Whether a task is given to another worker when the one that had it is lost."""
        return False

    def _died_idle(self) -> bool:
        """Whether workers die without ever getting to work, so that starting more would go on for ever."""
        return self._started > 3 * self.jobs + self._sent

    def _choose_devices(self, gpus: int) -> None:
        if self.device.startswith("cuda:"):
            if int(self.device[5:]) >= gpus:
                raise UserError(
                    f"there is no device {self.device}", where="--device", hint=f"CUDA devices here: {gpus}"
                )
            self.devices = [self.device]
        elif self.device == "cuda" and not gpus:
            raise UserError(
                "there is no CUDA device" + (f" that torch can use: {self.unusable}" if self.unusable else ""),
                where="--device",
                hint="use --device cpu or auto" + (", or a torch that fits the driver" if self.unusable else ""),
            )
        elif gpus and self.device in ("auto", "cuda"):
            self.devices = [f"cuda:{i}" for i in range(gpus)]
        else:
            self.devices = ["cpu"]
        if self._one_for_each_gpu and self.devices != ["cpu"]:
            self.jobs = len(self.devices)

    def _memory(self, gpus: list[int]) -> float | None:
        """Bytes that one worker may take, None where that is not known."""
        if self.devices != ["cpu"]:
            # Workers that share a GPU share its memory.
            sharing = -(-self.jobs // len(self.devices))
            return SHARE * min(gpus[int(device.partition(":")[2] or 0)] for device in self.devices) / sharing
        free = available_memory()
        return None if free is None else SHARE * free / self.jobs

    def _start(self) -> None:
        number = self._started
        self._started += 1
        with spared():
            worker = self.workers[number] = worker_process(self.paths, self.threads)
            threading.Thread(target=self._listen, args=(number, worker), daemon=True).start()

    def _listen(self, number: int, worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        last: Event | None = None
        try:
            with worker.stdout as lines:
                for line in lines:
                    last = read_line(Event, line)
                    self.events.put((number, last))
        except ValueError:
            # Of another version, as when the package was changed under a run: the rest is not understood either.
            worker.kill()
        code = worker.wait()
        # Why it ended is told, also where an interrupt hides what it said itself.
        self.events.put((number, last if isinstance(last, Gone) else Gone(code=code)))

    def _send(self, number: int, task: Task) -> bool:
        """Give a task to a worker. False when the worker is gone: its end arrives as an event."""
        stdin = self.workers[number].stdin
        assert stdin is not None
        try:
            order = task.model_copy(update={"device": self._device(number), "settings": self.settings})
            stdin.write(order.line())
            stdin.flush()
        except OSError:
            return False
        self._sent += 1
        return True

    def _device(self, number: int) -> str:
        """The device of a worker, which it keeps: the one that fewest others have, so that what takes the place of a
        dead worker takes its device too."""
        if number not in self._on:
            used = [self._on[other] for other in self.workers if other in self._on]
            self._on[number] = min(self.devices, key=used.count)
        return self._on[number]


def worker_process(paths: Iterable[Path], threads: int, **more: str) -> subprocess.Popen[str]:
    """A worker; `paths`: folders from which it imports users' modules, `more`: of its environment."""
    name_user()
    return subprocess.Popen(
        [sys.executable, "-m", "kdbench.engine.workers.worker", *(str(path.resolve()) for path in paths)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=ALLOCATOR | os.environ | {"OMP_NUM_THREADS": str(threads)} | more,
    )


@contextmanager
def spared() -> Iterator[None]:
    """What ends a run waits until the block has ended; a process that is started in it gets none of it before it says
    what it does about it."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)

    def wait(number: int, _: Any) -> None:
        # Another thread, as one of Ray's, has taken what this one blocks.
        signal.pthread_kill(threading.get_ident(), number)

    try:
        with own_signals() as answered:
            for number in answered:
                signal.signal(number, wait)
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def own_signals() -> Iterator[list[int]]:
    """How this process answers what ends a run is after the block as it was before. Yields what it answers itself."""
    here = threading.current_thread() is threading.main_thread()
    answers = {number: answer for number in ENDS if here and callable(answer := signal.getsignal(number))}
    try:
        yield [*answers]
    finally:
        for number, answer in answers.items():
            signal.signal(number, answer)


def _omp_threads(cores: int) -> int:
    """Threads that the user allows, 0 where nothing is said."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if first == "1" and (here := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > 1:
        # That is what torchrun says where the user says nothing: one thread cannot decode pictures for a GPU.
        return max(cores // here, 1)
    return int(first) if first.isdigit() else 0


def _gone(event: Gone) -> str:
    if event.why:
        return f"a worker ended: {event.why}"
    if (code := event.code) < 0:
        return f"the worker process was ended by signal {-code}" + (
            " (often: not enough memory; try fewer --jobs, or smaller batches)" if code == -9 else ""
        )
    return f"the worker process ended with code {code}"
