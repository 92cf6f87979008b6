"""What counts as finished.

Cells whose records were made from the data that are here, and by the teacher that others learn from. Imports no torch.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from kdbench.engine.folders import teacher_folder
from kdbench.engine.scheduling import Cells, CellState
from kdbench.engine.workers.messages import Failed, FingerprintRead, ReadFingerprint
from kdbench.engine.workers.pool import Pool
from kdbench.errors import UserError, counted
from kdbench.files import METRICS, PUBLISHED, RECORD, atomic, sha256_of, weight_files
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.planning import Plan, PlannedCell
from kdbench.recipe.specs import CellSpec, TeacherSpec
from kdbench.record import DIGEST, Record, finished_record, made_from, metrics, student_file
from kdbench.record_derived import derived


class OtherTrials(Exception):
    """Settings were chosen by published trials of other data, or of another teacher's students, than those here."""


def differing(then: Iterable[Record], now: Mapping[tuple[str, str], str]) -> str:
    """How data or teacher of records differ from those here (as of `made_from`); "" where they do not."""
    for (what, name), before in (one for record in then for one in made_from(record).items()):
        if (found := now.get((what, name), before)) != before:
            return f"'{name}' had the {DIGEST[what]} {before[:12]}, here it has {found[:12]}"
    return ""


class DataHere:
    """Fingerprints of the data sets that are at hand, each asked of a worker once.

    Args:
        say: is told which could not be read.
    """

    def __init__(self, pool: Pool, say: Callable[[str], None]) -> None:
        self.pool, self.say = pool, say
        self.known: dict[str, str | None] = {}

    def fingerprint(self, spec: DataSpec, needed: bool = False) -> str | None:
        """A data set's fingerprint, None where it cannot be read.

        Args:
            needed: something is to be trained on it, so it is an error if it cannot be read, and may be downloaded.
        """
        key = spec.images_key()
        if key not in self.known:
            found = None
            for event in self.pool.carry_out([ReadFingerprint(data=spec, download=needed)]):
                if isinstance(event, FingerprintRead):
                    found = event.fingerprint
                elif isinstance(event, Failed):
                    if needed:
                        raise event.error
                    why = str(event.error).splitlines()[0]
                    self.say(f"what is finished was not compared with the data '{spec.name}': {why}")
            self.known[key] = found
        return self.known[key]

    def unlike(self, spec: CellSpec, record: Record) -> str:
        """How the data here differ from those that a record was made from; "" where they do not, or are not here."""
        for part, made in ((spec.data, record.data), (spec.target, record.target)):
            if part is not None and made is not None:
                now = self.fingerprint(part)
                if now is not None and now != made.fingerprint:
                    return f"'{made.name}' had the fingerprint {made.fingerprint[:12]}, here it has {now[:12]}"
        return ""


class Finished:
    """The cells of a run that need no training: those that lie in its folder, and those that published results hold.

    A cell of the folder that does not belong to the data or the teacher here is an error: whoever removed it or gave it
    an average with others would lose something or tell something wrong. A published one is left where it is, and its
    copy, which a run before took into the folder, is removed: nothing is lost by that. What else lies there stays.

    Args:
        cells: all of the run.
        published: name of a cell's folder, or a teacher's, -> its record there.
        runs: the folder that holds the teachers' folders.
        say: is told what was not taken, and why.
    """

    def __init__(self, cells: Cells, published: Mapping[str, Record], runs: Path, say: Callable[[str], None]) -> None:
        self.cells, self.published, self.runs, self.say = cells, published, runs, say
        found = {cell.id: finished_record(cell.folder) for cell in cells}
        self.own = {number: record for number, record in found.items() if record is not None}
        self.taken = {
            cell.id: published[cell.cell.slug]
            for cell in cells
            if cell.id not in self.own and cell.cell.slug in published
        }
        self.copies = {
            cell.id: cell.folder
            for cell in cells
            if cell.id in self.own and _copied(self.own[cell.id], published.get(cell.cell.slug))
        }

    @property
    def open(self) -> Cells:
        """Cells that are to be trained."""
        known = self.own.keys() | self.taken.keys()
        return [cell for cell in self.cells if cell.id not in known]

    @property
    def recorded(self) -> list[tuple[CellState, Record]]:
        """Cells that need no training, those trained in the folder first: they say what published ones must fit to."""
        records = self.own | self.taken
        found = [(cell, records[cell.id]) for cell in self.cells if cell.id in records]
        return sorted(found, key=lambda of: of[0].id not in self.own or of[0].id in self.copies)

    @property
    def teachers(self) -> list[Record]:
        """Published teachers whose weights are there too."""
        others = self.published.keys() - {cell.cell.slug for cell in self.cells}
        return [self.published[name] for name in sorted(others) if weight_files(self.published[name].read_from)]

    def compare_data(self, here: DataHere) -> None:
        """Raises UserError for cells of the folder, or teachers that were trained for it, that were made from other
        data."""
        for cell in self.open:
            for part in cell.spec.domains:
                here.fingerprint(part, needed=True)
        self._sort_out(
            "made from other data", {cell.id: here.unlike(cell.spec, record) for cell, record in self.recorded}
        )
        for one in {one.identity(): one for cell in self.cells for one in cell.spec.teachers}.values():
            if one.trained_by is not None and (record := finished_record(teacher_folder(one, self.runs))):
                check_teacher(one, record, here)

    def compare_teachers(self) -> None:
        """Raises UserError for cells of the folder that learned from other weights of a trained teacher than those
        from which the open cells would learn, or than each other."""
        expected: dict[str, str] = {}
        for teacher in (one for cell in self.open for one in cell.spec.teachers):
            if teacher.trained_by is None or teacher.identity() in expected:
                continue
            if record := finished_record(teacher_folder(teacher, self.runs)):
                expected[teacher.identity()] = sha256_of(student_file(record))
        reasons = {}
        for cell, record in self.recorded:
            if record.teacher is None:
                continue
            found = record.teacher.members or [record.teacher.sha256]
            for one, before in zip(cell.spec.teachers, found, strict=False):
                sha256 = expected.setdefault(one.identity(), before)
                if sha256 != before:
                    reasons[cell.id] = f"'{one.name}' had the sha256 {before[:12]}, here it has {sha256[:12]}"
        self._sort_out("taught by another teacher", reasons)

    def check_trials(self, trials: Iterable[Record], here: DataHere) -> None:
        """Raises OtherTrials where cells of the folder are of other data, or of another teacher, than the records of
        published trials, by whose accuracies their settings were chosen: others may be the best."""
        now = {key: sha for record in self.own.values() for key, sha in made_from(record).items()}
        for spec in (cell.spec for cell in self.open):
            now |= {("data", part.name): here.fingerprint(part, needed=True) or "" for part in spec.domains}
            for teacher in spec.teachers:
                if teacher.trained_by is not None and (record := finished_record(teacher_folder(teacher, self.runs))):
                    now["teacher", teacher.name] = sha256_of(student_file(record))
        if why := differing(trials, now):
            raise OtherTrials(why)

    def adopt(self, results: Path, folder: Path) -> None:
        """Copy the published cells into the run's folder, with the records of teachers that were trained for them."""
        for cell, record in self.recorded:
            if cell.id in self.taken:
                take(record, cell.folder)
            cell.state = "finished"
        if self.taken:
            for teacher in self.published.keys() - {cell.cell.slug for cell in self.cells}:
                take(self.published[teacher], folder / teacher)
            self.say(
                f"{counted(len(self.taken), 'cell')} taken from {results}, records without weights; with --no-adopt "
                "they are trained here"
            )

    def _sort_out(self, what: str, reasons: Mapping[int, str]) -> None:
        """Leave published cells for which there is a reason, and remove copies of such; raise UserError for those that
        were trained in the folder."""
        folders = {cell.id: str(cell.folder) for cell in self.cells}
        found = [number for number, why in reasons.items() if why]
        left = [number for number in found if number in self.taken or number in self.copies]
        for number in left:
            if number in self.copies:
                # The record first: without it the folder counts for nothing, whenever this is killed.
                for name in (RECORD, *PUBLISHED):
                    (self.copies[number] / name).unlink(missing_ok=True)
                del self.copies[number]
                del self.own[number]
            else:
                del self.taken[number]
        if left:
            self.say(f"{counted(len(left), 'cell')} of published results not taken, {what}: {reasons[left[0]]}")
        if own := [number for number in found if number in self.own]:
            more = f" and {len(own) - 3} more" if len(own) > 3 else ""
            raise UserError(
                f"{counted(len(own), 'cell')} finished before {'was' if len(own) == 1 else 'were'} {what}: "
                f"{reasons[own[0]]}",
                where=", ".join(folders[number] for number in own[:3]) + more,
                hint="nothing is averaged over both: give this run another folder (--runs DIR), bring back what it "
                "was made from, or remove the folders of these cells, which are then trained again",
            )


def _copied(record: Record, published: Record | None) -> bool:
    """Whether a record was taken from published ones, which hold all that lies beside it."""
    if published is None or (record.result, record.compute) != (published.result, published.compute):
        return False
    return len(weight_files(record.read_from)) <= len(weight_files(published.read_from))


def names(plan: Plan, cell: PlannedCell) -> dict[str, Any]:
    """What a record says of its cell's place in the comparison, in the form of the record."""
    place = {"axes": cell.axes, "order": cell.order, "baseline": plan.baseline, "title": plan.title}
    tuning = {"tuning": cell.tuning} if cell.tuning is not None else {}
    return {"recipe": plan.name, "cell": derived(cell.spec)["cell"] | place | tuning}


def check_teacher(teacher: TeacherSpec, record: Record, here: DataHere) -> None:
    """Raises UserError for a teacher that was trained on other data than those that are here, or whose record says
    another accuracy than its evaluations do: its students' records would repeat it."""
    assert teacher.trained_by is not None
    # What was sent to another machine has no evaluations beside it.
    history = metrics(record.read_from) if (record.read_from / METRICS).is_file() else []
    seen = [round(entry["test"]["accuracy"], 4) for entry in history if "test" in entry][-1:]
    if history and seen != [record.result.test.last]:
        last = f"{seen[0]:.2f} %" if seen else "none"
        raise UserError(
            f"the teacher '{teacher.name}' has {record.result.test.last:.2f} % here, and {last} in its {METRICS}",
            where=str(record.read_from / RECORD),
            hint="one of the two files was changed: bring it back, or remove this folder: the teacher is then trained "
            "again",
        )
    if why := here.unlike(teacher.trained_by, record):
        raise UserError(
            f"the teacher '{teacher.name}' was trained on other data: {why}",
            where=str(record.read_from),
            hint="give this run another folder (--runs DIR), bring back the data, or remove this folder: the teacher "
            "is then trained again",
        )


def take(record: Record, target: Path) -> None:
    """Copy what is published of a cell or teacher, its record last: it makes a folder whole."""
    source = record.read_from
    for file in (*weight_files(source), *(source / name for name in PUBLISHED)):
        if file.is_file():
            with atomic(target / file.relative_to(source)) as temporary:
                shutil.copyfile(file, temporary)
