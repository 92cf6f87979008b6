"""The record that a finished cell leaves, typed, and how records and their metrics are read back.

Tables and plots are made from these files only. A field that this version does not know is kept; a damaged or foreign
file is an error that names it.
"""

import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, field_validator, model_validator

from kdbench import record_parts as parts
from kdbench.errors import UserError, check_word, counted
from kdbench.files import BEST, METRICS, RECORD, RUN, STUDENT, TEACHERS, TRIALS, meant, paths_of, sha256_of
from kdbench.forms import Open
from kdbench.reading import inside, of_form, parsed, plain_name, read_as, read_json, read_text
from kdbench.recipe.specs import CellSpec
from kdbench.record_derived import derived, filled, typed_spec, without

SCHEMA = 1
# What tells data and teachers of one name apart.
DIGEST = {"data": "fingerprint", "teacher": "sha256"}
Metric = Literal["last", "best", "mean_last"]
WhichWeights = Literal["last", "best"]
# The mean of the last evaluations is that of AB's authors, over ten epochs. It needs so many evaluations there, and is
# no mean of what was reached where these epochs are much of the training.
LAST_EPOCHS = 10
FEWEST_EVALUATIONS = 3
LARGEST_SHARE = 0.2


class Record(Open):
    """What a finished cell leaves in its record.json. `folder` is where it was read from and is not part of it.

    What follows from the resolved recipe, `spec`, is not written (`derived`), and is filled in when a record is read.
    Earlier versions wrote it; then it stands as it was written, and `kdbench verify` compares.
    """

    schema_version: int = Field(alias="schema")
    kdbench: str
    status: str
    identity: str
    recipe: str
    cell: parts.Cell
    spec: dict[str, Any] = {}
    budget: parts.Budget
    result: parts.Result
    teacher: parts.RecordedTeacher | None = None
    anchors: list[parts.Anchor] = []
    route: list[parts.Checkpoint] = []
    best: parts.Best | None = Field(None, description="the evaluation whose weights were kept too, by 'keep: best'")
    data: parts.Data
    target: parts.Data | None = Field(
        None, description="the domain adapted to and tested on; `train` images without labels"
    )
    models: parts.Models
    compute: parts.Compute
    sources: dict[str, Any] = Field({}, description="stage -> what its batch source says of itself")
    operations: dict[str, Any] = Field({}, description="stage -> what its operation says of itself")
    modules: dict[str, Any] = Field({}, description="module of the method -> what it says of itself")
    seeds: parts.Seeds = parts.Seeds()
    files: dict[str, str] = Field({}, description="name of a file that was left beside the record -> sha256, in hex")
    git: parts.Git | None = None
    folder: Path | None = Field(None, exclude=True, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _with_what_follows(cls, data: Any) -> Any:
        if isinstance(data, dict) and (spec := typed_spec(data.get("spec"))) is not None:
            try:
                return filled(data, derived(spec))
            except (UserError, ArithmeticError, LookupError) as error:
                what = error.what if isinstance(error, UserError) else str(error)
                raise ValueError(f"its resolved recipe asks for {what}") from None
        return data

    @field_validator("spec", mode="before")
    @classmethod
    def _of_readable_form(cls, spec: Any) -> Any:
        """It stays as it is: another version's is compared, not understood."""
        parts.SpecForm.model_validate(spec)
        return spec

    def __repr__(self) -> str:
        """In short: whole, it fills a screen."""
        at = f", {self.folder}" if self.folder is not None else ""
        return f"<Record: {self.cell.label}, seed {self.cell.seed}, {self.result.test.last:.2f} %{at}>"

    __str__ = __repr__

    @cached_property
    def resolved(self) -> CellSpec | None:
        """The resolved recipe, typed; None where another version wrote it in a form that this one does not know."""
        return typed_spec(self.spec)

    @property
    def place(self) -> str:
        """Its folder, for messages, or where it was read from none the beginning of its identity."""
        return str(self.folder or self.identity[:8])

    @property
    def read_from(self) -> Path:
        """Its folder. UserError for a record that was read from none: it has nothing beside it."""
        if self.folder is None:
            what = "a record that was not read from a folder has no evaluations and no weights"
            raise UserError(what, self.place, "read records with kdbench.record.read_records")
        return self.folder

    def accuracy(self, metric: Metric) -> float:
        """Test accuracy in percent.

        Raises:
            UserError: the mean over the last epochs, where there is none (`tail`).
        """
        return self.tail.mean if metric == "mean_last" else getattr(self.result.test, metric)

    @cached_property
    def tail(self) -> parts.Tail:
        """The evaluations of the last `LAST_EPOCHS` epochs, from the metrics beside the record.

        The same part of every training, whatever stages it had before.

        Raises:
            UserError: these epochs are too much of the training or not all of its last stage's, they have too few
                evaluations, or the metrics are absent or damaged.
        """
        budget = self.budget
        # A whole number; `epochs` is rounded.
        window = LAST_EPOCHS * round(budget.steps / budget.epochs) if budget.epochs else 0
        points = [
            entry["test"]["accuracy"]
            for entry in metrics(self.read_from)
            if "test" in entry and entry["step"] > budget.steps - window
        ]
        if LARGEST_SHARE * budget.epochs < LAST_EPOCHS:
            why = f"its training has {budget.epochs:g}, of which these may be a fifth at most"
        elif budget.stages and budget.stages[-1].steps < window:
            why = f"its last stage, '{budget.stages[-1].name}', is shorter"
        elif len(points) < FEWEST_EVALUATIONS:
            why = f"{counted(len(points), 'evaluation')} in these, {FEWEST_EVALUATIONS} are needed"
        else:
            return parts.Tail(math.fsum(points) / len(points), len(points))
        hint = "take the accuracy after the last step, or run the recipe longer or with evaluations=epoch"
        raise UserError(f"'{self.cell.label}' has no mean over the last {LAST_EPOCHS} epochs: {why}", self.place, hint)

    def plain(self) -> dict[str, Any]:
        """The record as the plain data of its file."""
        whole = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        return whole if self.resolved is None else without(whole, derived(self.resolved))


def read_record(path: str | Path) -> Record:
    """One record, from its file or from its cell's folder.

    Raises:
        UserError: absent, not JSON, of another program, of a newer kdbench, or damaged; names the file.
    """
    file = Path(path)
    if file.is_dir():
        file = file / RECORD
    where = str(file)
    if not file.exists():
        raise UserError("there is no record", where=where, hint=f"give a folder that holds a {RECORD}")
    plain = read_json(file, _AGAIN)
    if not isinstance(plain, dict) or not isinstance(plain.get("schema"), int) or "kdbench" not in plain:
        raise UserError("this is not a record of kdbench", where=where, hint="leave this folder out")
    if plain["schema"] > SCHEMA:
        raise UserError(
            f"this record has schema {plain['schema']}, made by kdbench {plain['kdbench']}; "
            f"this kdbench reads up to {SCHEMA}",
            where=where,
            hint="update kdbench",
        )
    return of_form(Record, {**plain, "folder": file.parent}, where, _AGAIN)


_AGAIN = "remove its folder and run the cell again, or leave it out"


FolderName = Annotated[str, AfterValidator(plain_name)]


class RunFile(Open):
    """What recipe.json says of a run: its name, its title, its recipe, folder names of the planned cells, and label,
    seed and reason of those that failed.

    An older version's says less.
    """

    name: FolderName | None = None
    title: str = ""
    recipe: dict[str, Any] | None = None
    cells: list[FolderName] | None = Field(default=None, min_length=1)
    failed: dict[str, str] = {}

    @field_validator("cells")
    @classmethod
    def _each_once(cls, cells: list[str] | None) -> list[str] | None:
        if cells is not None and len({cell.casefold() for cell in cells}) < len(cells):
            raise ValueError("a cell is named twice")
        return cells


def read_run(folder: Path) -> RunFile:
    """The recipe.json of a run's folder. UserError where it is absent or damaged."""
    return read_as(RunFile, folder / RUN, "run the recipe again: it is written again, and finished cells are kept")


def finished_record(folder: Path) -> Record | None:
    """The record of a cell's folder, whose name ends with the cell's identity; None where it is not finished.

    Raises:
        UserError: a record that cannot be read, or one of another cell.
    """
    if not (folder / RECORD).exists():
        return None
    return _of_its_folder(read_record(folder))


def _of_its_folder(record: Record) -> Record:
    """The record, if its folder's name ends with its identity. UserError where it does not."""
    if not record.read_from.name.endswith(record.identity[:8]):
        what, where = f"this is the record of another cell, {record.identity[:8]}", str(record.read_from / RECORD)
        hint = "its folder was renamed or filled by hand: give it back its name, or remove it and run the cell again"
        raise UserError(what, where, hint)
    return record


def made_from(record: Record) -> dict[tuple[str, str], str]:
    """What it was made from: ("data", name) -> fingerprint, ("teacher", name) -> sha256."""
    found = {("data", part.name): part.fingerprint for part in (record.data, record.target) if part}
    return found | ({("teacher", record.teacher.name): record.teacher.sha256} if record.teacher else {})


def student_file(record: Record, weights: WhichWeights = "last") -> Path:
    """The weights of a finished cell's student, for whoever uses them. Records of earlier versions hold no sha256.

    Args:
        weights: "last", or "best" of a cell that kept those of its best evaluation.

    Raises:
        UserError: they are not beside the record, or not those that it names; or there are no weights of that word.
    """
    check_word(weights, get_args(WhichWeights), "weights")
    if weights == "best" and record.best is None:
        hint = "remove its folder and run the recipe again with keep=best, or take the last weights"
        raise UserError("this cell kept no weights of its best evaluation", str(record.folder), hint)
    file = record.read_from / (STUDENT if weights == "last" else BEST)
    if not file.is_file():
        what = "there are no weights of this cell's student: published results hold none"
        hint = "give a folder of runs; in one, remove this folder and run the recipe again"
        raise UserError(what, str(record.folder), hint)
    expected = record.files.get(file.name)
    if expected is not None and (found := sha256_of(file)) != expected:
        what = f"these weights are not those of their record: sha256 {found[:12]}…, the record says {expected[:12]}…"
        hint = (
            "the file is damaged or another one: restore the right one, or remove its folder and run the recipe again"
        )
        raise UserError(what, str(file), hint)
    return file


def read_records(paths: str | Path | Iterable[str | Path]) -> list[Record]:
    """All records at or below the given folders and files, each file once.

    Folders in the given order, and inside a folder by path.

    Raises:
        UserError: a path that does not exist, no record at all, a record that cannot be read, or one that is not that
            of the planned cell in whose folder it lies.
    """
    given = paths_of(paths)
    files: dict[Path, tuple[Path, bool]] = {}
    for path in given:
        if not path.exists():
            raise UserError("there is no such folder", str(path), meant(path, "a folder with finished cells", RUN))
        if path.is_file() and path.suffix != ".json":
            what = "this is a file, and no record of a cell"
            raise UserError(what, str(path), meant(path, "a folder with finished cells", RUN))
        cells = _cell_folders(path) if path.is_dir() else {}
        below = sorted((cell / RECORD, planned) for cell, planned in cells.items())
        for file, planned in below or [(path, False)]:
            if file.is_file():
                files.setdefault(file.resolve(), (file, planned))
    if not files:
        hint = f"a finished cell's folder holds a {RECORD}; 'kdbench run RECIPE' makes them"
        raise UserError("no finished cell was found", ", ".join(map(str, given)) or None, hint)
    return [_of_its_folder(read_record(file)) if planned else read_record(file) for file, planned in files.values()]


def _cell_folders(folder: Path) -> dict[Path, bool]:
    """The cells' folders at or below a folder, and whether a run planned them. Of a run's folder: of the cells that its
    last plan had. Of a folder of runs: of all but those that try settings, and without the teachers beside them and
    hidden folders."""
    cells = read_run(folder).cells if (folder / RUN).exists() else None
    if cells is not None:
        return {inside(folder, cell): True for cell in cells}
    found = {folder: False} if any((folder / name).is_file() for name in (RECORD, METRICS)) else {}
    for below in folder.iterdir():
        # Hidden is what a killed 'publish' was making.
        apart = below.name.endswith(TRIALS) or below.name == TEACHERS or below.name.startswith(".")
        if below.is_dir() and not below.is_symlink() and not apart:
            found |= _cell_folders(below)
    return found


def unfinished(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """Folders of cells without a record, at or below the given folders, by path: of those that a run planned, else of
    those that began (they hold metrics), and a given folder itself where it has neither."""
    given = paths_of(paths)
    cells = {cell for path in given if path.is_dir() for cell in _cell_folders(path) or [path]}
    return sorted(cell for cell in cells if not (cell / RECORD).is_file())


def left_out(paths: Iterable[str | Path]) -> dict[Path, int]:
    """Runs among the given folders -> how many finished cells lie there that their last plan did not have."""
    plans = {run: read_run(run).cells for run in paths_of(paths) if (run / RUN).is_file()}
    others = {
        run: sum(file.parent.name not in cells for file in run.glob(f"*-seed*/{RECORD}"))
        for run, cells in plans.items()
        if cells is not None
    }
    return {run: number for run, number in others.items() if number}


def failures(cells: Iterable[str | Path]) -> dict[str, str | None]:
    """Folder name of each cell without a record, sorted -> what its run says of why it failed; None where it does not.

    Args:
        cells: their folders, which need not be there.
    """
    folders = [Path(cell) for cell in cells]
    runs = {run: read_run(run).failed for run in {cell.parent for cell in folders} if (run / RUN).is_file()}
    return {cell.name: runs.get(cell.parent, {}).get(cell.name) for cell in sorted(folders, key=lambda one: one.name)}


def metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a cell's metrics.jsonl, one for each evaluation, in order of steps, in the form of today.

    A line of an earlier version has its only metric, the agreement, in `metrics` too.

    The last line of a cell that is not finished may be cut off and is then left out.

    Raises:
        UserError: absent or damaged; names file and line.
    """
    file = Path(folder) / METRICS
    text = read_text(file, f"what is made of evaluations needs the {METRICS} beside the record")
    lines = text.splitlines()
    if lines and not text.endswith("\n") and not (file.parent / RECORD).is_file():
        lines.pop()
    entries = []
    for number, line in enumerate(lines, 1):
        # A loss may have grown out of all bounds: it stands there, and no table reads it.
        entries.append(parts.with_metrics_by_name(parsed(line, f"{file}:{number}", _AGAIN, finite=False)))
        of_form(parts.Evaluation, entries[-1], f"{file}:{number}", _AGAIN)
    return entries


def summary(history: list[dict[str, Any]], part: str) -> dict[str, Any]:
    """Last and best (the earliest of equals) accuracy on a part, in percent.

    Args:
        history: entries of metrics.jsonl.
        part: "test" or "validation".
    """
    points = [(entry["step"], entry[part]["accuracy"]) for entry in history if part in entry]
    best_step, best = max(points, key=lambda point: (point[1], -point[0]))
    return {"last": round(points[-1][1], 4), "best": round(best, 4), "best_step": best_step}
