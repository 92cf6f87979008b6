"""Workers on the nodes of a Ray cluster, in place of local ones. Imports no torch, and ray only when it is used.

Every worker has a folder on its node, to which a task's files are sent by content, and from which all that it writes
comes back into the run's own folder. So nothing that reads runs sees a difference, and no file system is shared.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from kdbench.engine.options import Cluster
from kdbench.engine.workers.messages import (
    CheckCells,
    DataSaved,
    Event,
    Failed,
    Gone,
    Progress,
    ReadFingerprint,
    SaveData,
    Settings,
    Task,
    TrainCells,
    read_line,
)
from kdbench.engine.workers.pool import SHARE, Pool, own_signals, spared
from kdbench.engine.workers.ray_node import TABLES, Node
from kdbench.engine.workers.ray_sending import Sending, specs_of
from kdbench.engine.workers.versions import versions
from kdbench.errors import CellError, UserError, counted, first_line
from kdbench.files import RECORD, UNFINISHED, atomic, expanded, files_of, sweep
from kdbench.recipe.model_specs import DataSpec

logger = logging.getLogger("kdbench")

# Seconds after which it is told that a worker still waits for its place.
PATIENCE = 30.0
# How often the same task may be lost at the same steps.
MOST_LOSSES = 5


class Losses:
    """How far cells are, by their number, and which tasks were lost when their cells were how far."""

    def __init__(self) -> None:
        self.steps: dict[int, int] = {}
        self.lost: list[tuple[str, int]] = []

    def again(self, task: Task) -> bool:
        """Whether to do a lost task again. Not one that is lost again and again without coming any further: it is what
        kills its workers, by taking more memory than there is, for example."""
        cells = [cell.id for cell in task.cells] if isinstance(task, TrainCells) else []
        far = sum(self.steps.get(cell, 0) for cell in cells)
        self.lost.append((str(cells), far))
        return sum(of == str(cells) and step >= far for of, step in self.lost) < MOST_LOSSES


@dataclass(eq=False)
class RayWorker:
    """What stands for a process: an actor, its folder on its node once it is there, and who listens to its end."""

    actor: Any
    folder: Path | None = None
    listener: threading.Thread = field(default_factory=threading.Thread)
    kill: Callable[[], None] = lambda: None

    def poll(self) -> int | None:
        """None while it is there, as a process has it."""
        return None if self.listener.is_alive() else 0


class RayPool(Pool):
    """A `Pool` whose workers are on nodes. A worker that is lost with its node or its actor loses the steps since its
    last checkpoint: its task is given to another one.

    Args:
        runs: the folder that all of a run's own files are in.
    """

    def __init__(
        self, cluster: Cluster, device: str, jobs: int | None, paths: tuple[Path, ...], settings: Settings, runs: Path
    ) -> None:
        super().__init__(device, jobs, paths, settings)
        self.cluster, self.runs = cluster, runs.resolve()
        self.local = Pool("cpu", 1, paths, settings)
        self.losses = Losses()

    def __enter__(self) -> RayPool:
        self.ray = _ray()
        self.sending = Sending(self.ray, self.runs)
        try:
            _reach(self.cluster.address)
            alone = {"include_dashboard": False} if self.cluster.address == "local" else {}
            # Ray's answer to SIGTERM is to leave at once.
            with own_signals():
                self.ray.init(address=self.cluster.address, log_to_driver=False, logging_level="error", **alone)
        except (OSError, ValueError, RuntimeError, self.ray.exceptions.RayError) as error:
            raise UserError(
                f"there is no Ray cluster at '{self.cluster.address}' that lets this run in: {first_line(error)}",
                where="--ray",
                hint="start one with 'ray start --head', or give its address; "
                "if it wants a token, set RAY_AUTH_MODE=token and have its ~/.ray/auth_token",
            ) from None
        try:
            self._share_out(self.ray.cluster_resources())
            self.local.__enter__()
        except BaseException:
            self.__exit__()
            raise
        super().__enter__()
        return self

    def __exit__(self, kind: Any = None, *_: Any) -> None:
        try:
            super().__exit__(kind)
        finally:
            # Ray that is interrupted in its end ends the process.
            with spared():
                self.local.__exit__()
                self.ray.shutdown()
        while not self.events.empty():
            event = self.events.get()[1]
            if isinstance(event, Gone) and event.lost:
                logger.warning("%s while the run was stopping: it goes on from the last checkpoint", event.why)

    def _dismiss(self, worker: RayWorker) -> None:
        # What it writes comes back as well.
        worker.actor.close.remote() if worker.folder is not None else worker.kill()

    def carry_out(self, tasks: Sequence[Task]) -> Iterator[Event]:
        here = [task for task in tasks if isinstance(task, CheckCells | ReadFingerprint)]
        away = [task for task in tasks if task not in here]
        if here:
            yield from self.local.carry_out(here)
        for spec in (spec for task in away for spec in specs_of(task)):
            for data in spec.domains:
                if data.images_key() not in self.sending.given:
                    yield from self._save(data)
        for event in super().carry_out(away):
            if isinstance(event, Progress):
                self.losses.steps[event.cell] = event.step
            yield event

    def _again(self, task: Task) -> bool:
        return self.losses.again(task)

    def _save(self, data: DataSpec) -> Iterator[Event]:
        """Have a data set as one file, which nodes can be sent."""
        for event in self.local.carry_out([SaveData(data=data)]):
            if isinstance(event, DataSaved):
                self.sending.given[data.images_key()] = event.given
            else:
                yield event

    def _share_out(self, there: dict[str, float]) -> None:
        """How many workers the cluster can have, and what each gets of it."""
        cpus, gpus = int(there.get("CPU", 0)), there.get("GPU", 0.0) if self.device != "cpu" else 0.0
        self.gpus = self.cluster.gpus if self.cluster.gpus is not None else float(gpus > 0)
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"a cluster has no device {self.device}", where="--device", hint="give cuda")
        if self.device == "cuda" and not self.gpus:
            raise UserError("no node of the cluster has a GPU", where="--device", hint="use --device cpu or auto")
        most = int(gpus / self.gpus) if self.gpus else None
        self.threads = self.cluster.cpus or (max(1, cpus // most) if most else 1)
        most = min(cpus // self.threads, cpus if most is None else most)
        if most < 1:
            raise UserError(
                f"no worker of {counted(self.threads, 'core')} and {counted(self.gpus, 'GPU', 'g')} fits a cluster of "
                f"{cpus} and {gpus:g}",
                where="--ray",
                hint="ask for less with --cpus-per-worker or --gpus-per-worker",
            )
        self.jobs = min(self.jobs, most) if not self._one_for_each_gpu else most
        self.cores = self.threads * self.jobs
        self._bytes = there.get("memory", 0.0) * self.threads / max(cpus, 1)

    def _choose_devices(self, gpus: int) -> None:
        # Ray shows each worker its own GPU alone.
        self.devices = ["cuda:0"] if self.gpus and gpus else ["cpu"]

    def _memory(self, gpus: list[int]) -> float | None:
        if self.devices != ["cpu"]:
            return SHARE * min(gpus) * min(self.gpus, 1.0)
        return SHARE * self._bytes or None

    def _start(self) -> None:
        number = self._started
        self._started += 1
        kind = self.ray.remote(Node).options(
            num_cpus=self.threads, num_gpus=self.gpus, max_concurrency=4, scheduling_strategy="SPREAD"
        )
        key = hashlib.sha256(f"{platform.node()} {self.runs}".encode()).hexdigest()[:12]
        worker = self.workers[number] = RayWorker(actor := kind.remote(key), kill=partial(self.ray.kill, actor))
        worker.listener = threading.Thread(target=self._attend, args=(number, worker), daemon=True)
        worker.listener.start()

    def _attend(self, number: int, worker: RayWorker) -> None:
        """Pass on what a worker tells and writes, to its end."""
        actor, code = worker.actor, None
        try:
            asked = actor.about.remote()
            if not self.ray.wait([asked], timeout=PATIENCE)[0]:
                logger.warning(
                    "a worker waits for %d cores and %g GPUs to be free on the cluster", self.threads, self.gpus
                )
            about = self.ray.get(asked)
            if about["versions"] != versions():
                raise UserError(
                    f"the node {about['name']} has {about['versions']}, here there is {versions()}",
                    hint="install the same versions on all nodes",
                )
            paths = [f"registries/{i}" for i in range(len(self.paths))]
            for place, folder in zip(paths, self.paths, strict=True):
                self.sending.put(actor, {f"{place}/{name}": file for name, file in files_of(folder.resolve()).items()})
            self.ray.get(actor.begin.remote(paths, self.threads))
            worker.folder = Path(about["folder"])
            while code is None:
                lines, files, code = self.ray.get(actor.poll.remote())
                for name, content in files:
                    self._take(name, content)
                for line in lines:
                    self.events.put((number, read_line(Event, line)))
            self.events.put((number, Gone(code=code)))
        except UserError as error:
            self.events.put((number, Failed(message=error.what, by_user=True, where=error.where, hint=error.hint)))
        except self.ray.exceptions.RayError as error:
            self.events.put(
                (number, Gone(code=1, why=f"its node or its actor is lost: {first_line(error)}", lost=True))
            )
        except Exception as error:  # noqa: BLE001 - whoever waits for this worker must hear of it
            self.events.put((number, Gone(code=1, why=f"{type(error).__name__}: {error}")))
        finally:
            with suppress(Exception):
                self.ray.kill(actor)

    def _take(self, name: str, content: bytes | None) -> None:
        """Write what a worker wrote into the run's own folder."""
        file = self.runs / Path(name).relative_to("runs")
        if not file.resolve().is_relative_to(self.runs):
            raise CellError(f"a node sent a file outside of the run's folder: {name}")
        if content is None:
            # A finished cell has none any more. Nothing else is ever taken away.
            if file.name in UNFINISHED:
                file.unlink(missing_ok=True)
            return
        with atomic(file) as temporary:
            temporary.write_bytes(content)
        if file.name == RECORD:
            # What a run that was killed had half received.
            sweep(file.parent)

    def _send(self, number: int, task: Task) -> bool:
        """False also for a worker whose node is not there yet."""
        worker = self.workers[number]
        if worker.folder is None:
            return False
        roots = [expanded(root, "--data").resolve() for root in self.settings.data_roots]
        try:
            watched = self.sending.folders(worker.actor, task)
            given = self.sending.give(worker.actor, worker.folder, task)
            own = {"given": given, "data_roots": roots, "cache": worker.folder / "cache"}
            own["tables"] = worker.folder / TABLES
            order = {"device": self.devices[0], "settings": self.settings.model_copy(update=own)}
            line = self.sending.moved(task, worker.folder).model_copy(update=order).line()
            self.ray.get(worker.actor.send.remote(line, watched))
        except self.ray.exceptions.RayTaskError as error:
            # The actor is there, but could not do it: its disk is full, for example.
            why = f"a node could not be sent what its cells need: {error.cause}"
            self.events.put((number, Failed(message=why, by_user=True)))
            return False
        except self.ray.exceptions.RayError:
            return False
        self._sent += 1
        return True


def _ray() -> Any:
    # Nobody is asked, and nothing is sent.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError(
            "Ray is not installed", where="--ray", hint="install it with: pip install 'kdbench[ray]'"
        ) from None
    return ray


def _reach(address: str) -> None:
    """OSError where nobody listens at HOST:PORT. Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=20).close()
