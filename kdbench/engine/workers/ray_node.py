"""What a Ray actor does: it has one worker process on its node, and passes on tasks, events and files.

The worker is the one of a local run, in a folder of this node. Nothing here or above imports torch or ray.
"""

import hashlib
import os
import platform
import queue
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress

from kdbench.data.sent import settle
from kdbench.engine.workers.pool import worker_process
from kdbench.engine.workers.versions import versions
from kdbench.files import RECORD, atomic, files_of, folders_in, home, sha256_of

# Seconds between looks at a worker's files.
LOOK = 0.5
# Where tables of teacher logits lie.
TABLES = "teacher_logits"
# A file's name below a folder, and its bytes; None where it is gone.
Content = tuple[str, bytes | None]


class Node:
    """A worker and its folder on a node.

    Args:
        key: tells runs apart that use this node.
    """

    def __init__(self, key: str) -> None:
        self.folder = home() / "ray" / key
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.worker: subprocess.Popen[str] | None = None
        # Of the present task. Calls come from several threads.
        self.watched: list[str] = []
        self.seen: dict[str, tuple[int, ...]] = {}
        self.looking = threading.Lock()

    def about(self) -> dict[str, object]:
        """What its run must know of this node."""
        return {"name": platform.node(), "folder": str(self.folder), "versions": versions()}

    def lacks(self, files: dict[str, str]) -> list[str]:
        """Names of those files that are not here, or not with this sha256."""
        there = {name: self.folder / name for name in files}
        return [name for name, file in there.items() if not file.is_file() or sha256_of(file) != files[name]]

    def put(self, name: str, sha256: str, content: bytes) -> None:
        """Keep a file. ValueError where it is not what was sent."""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(f"{name} arrived on {platform.node()} with another sha256")
        with atomic(self.folder / name) as temporary:
            temporary.write_bytes(content)

    def pictures(self, listing: str) -> list[str]:
        """The sha256 of the pictures of a listing that are not on this node; the worker's listing where all are."""
        return settle(self.folder / listing, self.folder / "pictures", self.folder / "cache")

    def begin(self, paths: Sequence[str], threads: int) -> None:
        """Start the worker.

        Args:
            paths: folders below this node's from which it imports users' modules.
        """
        weights = os.pathsep.join(map(str, [self.folder / "weights", *folders_in("KDBENCH_WEIGHTS")]))
        folders = [self.folder / path for path in paths]
        worker = self.worker = worker_process(folders, threads, KDBENCH_WEIGHTS=weights)

        def listen() -> None:
            assert worker.stdout is not None
            for line in worker.stdout:
                self.lines.put(line)
            self.lines.put(None)

        threading.Thread(target=listen, daemon=True).start()

    def send(self, line: str, watched: Sequence[str]) -> None:
        """Give the worker a task.

        Args:
            watched: folders whose changes the run is told of.
        """
        with self.looking:
            self.watched = [*watched]
            self._changed()
        assert self.worker is not None and self.worker.stdin is not None
        # Its end is told by `poll`.
        with suppress(OSError):
            self.worker.stdin.write(line)
            self.worker.stdin.flush()

    def clear(self, folder: str, keep: Sequence[str]) -> None:
        """Remove what a worker before left in a folder, all but some files. Nothing is watched until the next task."""
        with self.looking:
            self.watched, self.seen = [], {}
        for name, file in files_of(self.folder / folder).items():
            if name not in keep:
                file.unlink(missing_ok=True)

    def poll(self) -> tuple[list[str], list[Content], int | None]:
        """Events since the last call, what changed in the files before that, and the worker's exit code if it ended."""
        lines: list[str | None] = []
        with suppress(queue.Empty):
            lines.append(self.lines.get(timeout=LOOK))
            while True:
                lines.append(self.lines.get_nowait())
        code = None
        if None in lines:
            assert self.worker is not None
            code = self.worker.wait()
        with self.looking:
            return [line for line in lines if line is not None], self._changed(), code

    def close(self) -> None:
        """Let the worker write its checkpoints and end."""
        if self.worker is not None and self.worker.stdin is not None:
            self.worker.stdin.close()

    def _changed(self) -> list[Content]:
        now: dict[str, tuple[int, ...]] = {}
        changed: list[Content] = []
        for folder in self.watched:
            for below, file in files_of(self.folder / folder).items():
                name = f"{folder}/{below}"
                try:
                    about = file.stat()
                    now[name] = (about.st_mtime_ns, about.st_size, about.st_ino)
                    if self.seen.get(name) != now[name]:
                        changed.append((name, file.read_bytes()))
                except FileNotFoundError:
                    now.pop(name, None)
        here = tuple(f"{folder}/" for folder in self.watched)
        changed += [(name, None) for name in self.seen if name not in now and name.startswith(here)]
        self.seen = now
        # A record makes its cell whole, so it comes after what it speaks of.
        return sorted(changed, key=lambda one: one[0].endswith(RECORD))
