"""Which cells train side by side, and how cohorts are shared out among workers. Imports no torch."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from kdbench.engine.computing import compute
from kdbench.engine.computing.compute import Memory, program_bytes
from kdbench.files import write_json
from kdbench.forms import Strict
from kdbench.reading import read_as
from kdbench.recipe.planning import PlannedCell, cell_name
from kdbench.recipe.specs import CellSpec

# Says how a cell began, so that it goes on in the same way.
BEGUN = "cell.json"
# Of one worker.
MOST_THREADS = 1024
# In place of the folder of a cell that has none.
NOWHERE = Path()


@dataclass
class CellState:
    """A planned cell in a run, and its progress for whoever watches.

    Attributes:
        folder: none of its own where it is only planned.
        name: what it is called where that is not what the comparison calls it.
        state: waiting, running, finished, failed. doing: something long beside its steps, "" in them.
    """

    cell: PlannedCell
    id: int
    folder: Path = NOWHERE
    name: str = ""
    state: str = "waiting"
    step: int = 0
    total: int = 0
    stage: str = ""
    doing: str = ""
    accuracy: float | None = None
    seconds: float = 0.0
    message: str = ""

    @property
    def spec(self) -> CellSpec:
        return self.cell.spec

    @property
    def label(self) -> str:
        """The cell as people call it."""
        return self.name or f"{cell_name(self.spec.method.label, self.cell.axes)}, seed {self.spec.seed}"


Cells = list[CellState]
# What each kind of cell takes, by `kind`.
Memories = dict[str, Memory]


def kind(spec: CellSpec) -> str:
    """What cells that differ in the seed alone have in common."""
    return spec.model_copy(update={"seed": 0}).identity()


def cohorts_of(cells: Cells) -> list[Cells]:
    """Cells that may train behind one teacher pass: the same data, source and target, seed, batches and teacher. A cell
    without a teacher goes along: it costs the others nothing."""
    groups: dict[str, dict[str, Cells]] = {}
    for cell in cells:
        groups.setdefault(_group(cell), {}).setdefault(_teacher([cell]), []).append(cell)
    result = []
    for by_teacher in groups.values():
        untaught = by_teacher.pop("", [])
        first, *others = by_teacher.values() or [[]]
        result += [[*untaught, *first], *others]
    return result


def _group(cell: CellState, seed: bool = True) -> str:
    """What cells must have in common to see the same batches, and to begin alike; without its seed, to see batches of
    one shape."""
    spec = cell.spec
    extra = [(s.extra_epochs, s.extra_share) for s in spec.method.stages.values() if s.extra]
    protocol = spec.protocol.model_dump(mode="json", exclude={"name", "normalization"})
    kept = begun(cell.folder).model_dump()
    domains = [part.model_dump(mode="json") for part in spec.domains]
    return json.dumps([domains, spec.seed if seed else None, protocol, compute.key(spec.compute), extra, kept])


def _teacher(cells: Cells) -> str:
    """Identity of the teacher of a cohort's cells, "" where they have none."""
    return next((cell.spec.teacher.identity() for cell in cells if cell.spec.teacher), "")


def balanced(cohorts: list[Cells], jobs: int) -> list[Cells]:
    """Cohorts for `jobs` workers: one with several workers' share of all cells is split among them, and those that
    would be left for a last, incomplete round are split among all workers."""
    share = sum(map(len, cohorts)) / jobs
    cohorts = [part for cohort in cohorts for part in _split(cohort, round(len(cohort) / share))]
    left = len(cohorts) % jobs
    whole, rest = cohorts[: len(cohorts) - left], cohorts[len(cohorts) - left :]
    return whole + [part for cohort in rest for part in _split(cohort, jobs // left)]


def _split(cohort: Cells, parts: int) -> list[Cells]:
    """A cohort in at most so many parts, its neighbours in different ones."""
    parts = max(1, min(parts, len(cohort)))
    return [cohort[i::parts] for i in range(parts)]


def bytes_of(cohorts: Iterable[Cells], memory: Memories, at_once: bool) -> int:
    """Bytes that a worker needs for cohorts in one program; `at_once` as `program_bytes` takes it."""
    return program_bytes([[memory[kind(cell.spec)] for cell in cohort] for cohort in cohorts], at_once)


def fitting(cohorts: list[Cells], memory: Memories, limit: float | None, at_once: bool) -> list[Cells]:
    """The same cohorts, those that would need more than `limit` bytes split.

    A cell that does not fit by itself is a cohort of its own: what is predicted is not certain.
    """
    if limit is None:
        return cohorts
    result = []
    for cohort in cohorts:
        part: Cells = []
        for cell in cohort:
            if part and bytes_of([[*part, cell]], memory, at_once) > limit:
                result.append(part)
                part = []
            part = [*part, cell]
        result.append(part)
    return result


def joined(cohorts: list[Cells], jobs: int, memory: Memories, limit: float | None, at_once: bool) -> list[list[Cells]]:
    """Cohorts as programs for `jobs` workers: those that differ in their seed alone go together, as far as `limit`
    bytes allow, and while no worker is left without one."""
    most = -(-len(cohorts) // jobs)
    alike: dict[str, list[Cells]] = {}
    for cohort in cohorts:
        alike.setdefault(f"{_group(cohort[0], seed=False)} {_teacher(cohort)}", []).append(cohort)
    result = []
    for of_kind in alike.values():
        programs: list[list[Cells]] = [[] for _ in range(-(-len(of_kind) // most))]
        for cohort in of_kind:

            def takes(program: list[Cells], cohort: Cells = cohort) -> bool:
                seeds = {other[0].spec.seed for other in program}
                fits = limit is None or bytes_of([*program, cohort], memory, at_once) <= limit
                return not program or (cohort[0].spec.seed not in seeds and fits)

            if not any(map(takes, programs)):
                programs.append([])
            min(filter(takes, programs), key=len).append(cohort)
        result += [program for program in programs if program]
    return result


class Begun(Strict):
    """How a cell began: `threads` of its worker, and `logits`, the table that its teacher's logits come from ("" where
    they are computed). Bits depend on both, so it goes on in the same way. Nothing for a cell that did not begin."""

    threads: int | None = Field(default=None, ge=1, le=MOST_THREADS)
    logits: str | None = None


def begun(folder: Path) -> Begun:
    """How a cell began. UserError where its file is damaged."""
    if folder == NOWHERE or not (file := folder / BEGUN).exists():
        return Begun()
    return read_as(Begun, file, "remove the cell's folder: it starts again")


def begin(folder: Path, how: Begun) -> None:
    """Keep how a cell begins."""
    write_json(folder / BEGUN, how.model_dump(exclude_none=True))
