"""What the nodes of a Ray cluster are sent: a run's own files, data and weights, each where a node has not got it."""

import hashlib
from pathlib import Path
from typing import Any

from kdbench.data.sent import SUFFIX, here, read_listing
from kdbench.engine.folders import teacher_folder
from kdbench.engine.teachers.logit_files import ABOUT, VALUES, tables
from kdbench.engine.workers.messages import GivenData, Message, Task, TrainCells
from kdbench.engine.workers.ray_node import TABLES
from kdbench.files import SHARE, below, files_to_send, find_weights, sha256_of
from kdbench.recipe.specs import CellSpec

# Bytes of pictures that are on their way at once.
AT_ONCE = 64_000_000


class Sending:
    """Sends files to nodes.

    Args:
        ray: the module. runs: the folder that all of a run's own files are in.

    Attributes:
        given: data sets by `DataSpec.images_key`.
    """

    def __init__(self, ray: Any, runs: Path) -> None:
        self.ray, self.runs = ray, runs.resolve()
        self.given: dict[str, GivenData] = {}
        self._sums: dict[Path, tuple[tuple[int, int], str]] = {}
        self._held: dict[str, Any] = {}

    def folders(self, actor: Any, task: Task) -> list[str]:
        """Send the folders that a task works in; their names below a node's folder. Of a cell's nothing else stays."""
        own = [cell.folder for cell in task.cells] if isinstance(task, TrainCells) else []
        others = [folder for name in ("teacher_folder", "shared") if (folder := getattr(task, name, None))]
        several = (spec.teacher for spec in specs_of(task) if spec.teacher is not None and spec.teacher.members)
        others += dict.fromkeys(teacher_folder(one, self.runs) for teacher in several for one in teacher.members)
        for folder in [*own, *others]:
            place, files = self.place(folder), files_to_send(folder.resolve())
            if folder in own:
                self.ray.get(actor.clear.remote(place, [*files]))
            self.put(actor, {f"{place}/{name}": file for name, file in files.items()})
        return [self.place(folder) for folder in [*own, *others]]

    def give(self, actor: Any, base: Path, task: Task) -> dict[str, GivenData]:
        """Send what a task's cells read beside the run's own files, data and weights."""
        given: dict[str, GivenData] = {}
        for spec in specs_of(task):
            for data in spec.domains:
                known = given[data.images_key()] = self.given[data.images_key()]
                place = f"data/{known.file.name}"
                self.put(actor, {place: known.file})
                if known.file.name.endswith(SUFFIX):
                    place = self._pictures(actor, place, known.file)
                given[data.images_key()] = known.model_copy(update={"file": base / place})
            files = {name: file for name in _weights(spec) if (file := find_weights(name)) is not None}
            away = {name: file for name, file in files.items() if SHARE not in file.resolve().parents}
            self.put(actor, {f"weights/{below(name)}": file for name, file in away.items()})
        self._tables(actor, specs_of(task), {one.fingerprint for one in given.values()})
        return given

    def _pictures(self, actor: Any, place: str, listing: Path) -> str:
        """Send the pictures of a listing that a node lacks; the name of its own listing."""
        lacking = self.ray.get(actor.pictures.remote(place))
        if lacking:
            files = read_listing(listing).places()
            sent, size = [], 0
            for digest in lacking:
                content = files[digest].read_bytes()
                sent.append(actor.put.remote(f"pictures/{digest}", digest, content))
                size += len(content)
                if size > AT_ONCE:
                    self.ray.get(sent)
                    sent, size = [], 0
            self.ray.get(sent)
            self.ray.get(actor.pictures.remote(place))
        return f"data/{here(listing).name}"

    def _tables(self, actor: Any, specs: list[CellSpec], data: set[str]) -> None:
        """Have the tables of teacher logits on a node that there are here, of what its task is about."""
        whole = [table for table in tables() if table.sha256 is not None]
        self.ray.get(actor.clear.remote(TABLES, [f"{t.folder.name}/{name}" for t in whole for name in (VALUES, ABOUT)]))
        teachers = {spec.teacher.name for spec in specs if spec.teacher is not None}
        for table in whole:
            if table.name in teachers and table.key["data"] in data:
                folder = f"{TABLES}/{table.folder.name}"
                self.put(actor, {f"{folder}/{name}": table.folder / name for name in (VALUES, ABOUT)})

    def put(self, actor: Any, files: dict[str, Path]) -> None:
        """Send those files that the node lacks."""
        sums = {name: self._sum(file) for name, file in files.items()}
        for name in self.ray.get(actor.lacks.remote(sums)):
            if (sha256 := sums[name]) in self._held:
                self.ray.get(actor.put.remote(name, sha256, self._held[sha256]))
                continue
            # Another worker may have written it anew since its sum was taken.
            content = files[name].read_bytes()
            sha256, held = hashlib.sha256(content).hexdigest(), self.ray.put(content)
            self.ray.get(actor.put.remote(name, sha256, held))
            # Data and weights are for all nodes; what lies in the run's folder may be another thing tomorrow.
            if not name.startswith("runs/"):
                self._held[sha256] = held

    def _sum(self, file: Path) -> str:
        about = file.stat()
        stamp = (about.st_mtime_ns, about.st_size)
        if self._sums.get(file, (None, ""))[0] != stamp:
            self._sums[file] = (stamp, sha256_of(file))
        return self._sums[file][1]

    def place(self, folder: Path) -> str:
        """Of a folder of the run: its name below a node's folder."""
        return str(Path("runs") / folder.resolve().relative_to(self.runs))

    def moved(self, message: Any, base: Path) -> Any:
        """A task with the folders of a node in place of the run's."""
        changes: dict[str, Any] = {}
        for name in type(message).model_fields:
            value = getattr(message, name)
            if isinstance(value, Path):
                changes[name] = base / self.place(value)
            elif isinstance(value, list) and value and isinstance(value[0], Message):
                changes[name] = [self.moved(one, base) for one in value]
        return message.model_copy(update=changes)


def specs_of(task: Task) -> list[CellSpec]:
    """The cells that a task is about."""
    if isinstance(task, TrainCells):
        return [cell.spec for cell in task.cells]
    return [*getattr(task, "specs", []), *([spec] if (spec := getattr(task, "spec", None)) is not None else [])]


def _weights(spec: CellSpec) -> list[str]:
    """Names of the weight files that a cell reads."""
    teachers = [one.weights for one in spec.teachers]
    cards = [weights.file for weights in (spec.student.start, *teachers) if weights is not None]
    return cards + ([spec.student.weights] if spec.student.weights is not None else [])
