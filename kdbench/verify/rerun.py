"""One recorded cell trained again, to see whether its number comes back. Imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdbench.engine.computing import compute
from kdbench.engine.computing.compute import Chosen
from kdbench.engine.folders import teacher_folder
from kdbench.engine.options import Listener, Options
from kdbench.engine.scheduling import Begun, begin
from kdbench.engine.workers.runner import run
from kdbench.errors import CellError, UserError, did_you_mean
from kdbench.reading import of_form
from kdbench.recipe.planning import Plan, PlannedCell
from kdbench.recipe.recorded import cell_of
from kdbench.recipe.specs import CellSpec
from kdbench.record import Record, metrics, read_record
from kdbench.registry import Registry
from kdbench.results import statistics

# Of `compute`, what says how long it took and what does not touch a number. All else is a condition of equal bits.
_NO_CONDITION = {
    "seconds",
    "training_seconds",
    "cohort_seconds",
    "images_per_second",
    "cohort",
    "peak_memory_bytes",
    "python",
    "torchvision",
    "platform",
}

# Where bits may differ, training drifts apart as two seeds do: so many deviations of the seeds, and at least one point.
DEVIATIONS = 3.0
LEAST = 1.0


@dataclass(frozen=True)
class Again:
    """A recorded cell beside the same cell run again.

    Attributes:
        differing: conditions of equal bits that differ, "name: recorded → here"; none where exactness is claimed.
        tolerance: in percent points; 0 where exactness is claimed.
        recorded, found: test accuracy after the last step, in percent.
        unequal: what else differs although the bits should be equal (evaluation points, teacher).
    """

    differing: tuple[str, ...]
    tolerance: float
    recorded: float
    found: float
    unequal: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        return abs(self.found - self.recorded) <= self.tolerance and not self.unequal


def cell_to_rerun(records: dict[str, Record], name: str | None, registry: Registry) -> tuple[str, Record, CellSpec]:
    """The cell to run again: the named one, or the cheapest: without a teacher to train, in the shortest time.

    Args:
        records: folder name -> record.

    Raises:
        UserError: no such cell, or one that cannot be built from the cards here.
    """
    if name is not None and name not in records:
        raise UserError(f"there is no cell '{name}'", where="--cell", hint=did_you_mean(name, records))
    if name is None:

        def cost(cell: str) -> tuple[bool, bool, float, str]:
            spec = records[cell].resolved
            trains = spec is not None and any(one.trained_by for one in spec.teachers)
            return spec is None, trains, records[cell].compute.seconds, cell

        name = min(records, key=cost)
    return name, records[name], cell_of(records[name].spec, registry, name)


def rerun(
    record: Record,
    spec: CellSpec,
    siblings: Iterable[Record],
    teachers: Iterable[Record],
    options: Options,
    listener: Listener,
    tolerance: float | None = None,
) -> Again:
    """Train a recorded cell again, alone, with as many threads, and compare.

    Args:
        siblings: records of all seeds of its method, whose deviation gives the tolerance.
        teachers: records of teachers that were trained for the comparison, where they are at hand. This cell's teacher
            is taken with its weights where they are beside it, else trained again as it was.
        options: `runs` is an empty folder.
        tolerance: in percent points, in place of that where equal bits cannot be expected.

    Raises:
        UserError: data or weights are not to be had. CellError: the cell failed.
    """
    cell = PlannedCell(spec, dict(record.cell.axes), record.cell.order or 0)
    plan = Plan("again", f"{record.cell.label}, seed {record.cell.seed}, again", [cell], spec.method.name)
    _as_it_was(options.runs / plan.name / cell.slug, record)
    way = compute.of_record(record)
    chosen = Chosen(asked=spec.compute.fixed(), computing=way, why="as the record says")
    compute.keep(options.runs / plan.name, chosen)
    for one in spec.teachers:
        if (trained := one.trained_by) is not None:
            for teacher in teachers:
                if teacher.identity in trained.identities():
                    _as_it_was(teacher_folder(one, options.runs), teacher)
    outcome = run(plan, replace(options, jobs=1), listener, published={one.identity: one for one in teachers})
    if outcome.failed:
        raise CellError(outcome.failed[0].message)
    return reproduction(record, read_record(outcome.finished[0]), siblings, tolerance)


def reproduction(record: Record, again: Record, siblings: Iterable[Record], tolerance: float | None = None) -> Again:
    """Exactly where all conditions of equal bits agree and it is float32 on a CPU, else within the tolerance."""
    old, new = (_conditions(r) for r in (record, again))
    differing = [f"{key}: {old.get(key)} → {new.get(key)}" for key in sorted(old | new) if old.get(key) != new.get(key)]
    if record.data.fingerprint != again.data.fingerprint:
        differing.append(f"data: {record.data.fingerprint[:12]} → {again.data.fingerprint[:12]}")
    if not differing and (old["device"] != "cpu" or old["precision"] != "float32" or old["compile"]):
        how = f"{old['precision']}{', compiled,' if old['compile'] else ''} on {old['device']}"
        differing.append(f"{how} is not exact")
    if old["teacher_logits"] == "table":
        differing.append("a table of teacher logits may have been computed in other batches")
    recorded, found = record.result.test.last, again.result.test.last
    if differing:
        values = [r.result.test.last for r in siblings]
        deviation = statistics.summarize(values).deviation if values else None
        allowed = max(LEAST, DEVIATIONS * (deviation or 0.0)) if tolerance is None else tolerance
        return Again(tuple(differing), allowed, recorded, found, ())
    unequal = []
    # What the record holds: a later version may measure more.
    before, after = (r.result.model_dump(exclude_none=True) for r in (record, again))
    if any(after.get(name) != value for name, value in before.items()):
        unequal.append("the result (last, best, validation or metrics)")
    if record.teacher != again.teacher:
        unequal.append("the teacher")
    if (record.anchors, record.route) != (again.anchors, again.route):
        unequal.append("the anchors, or the route that was kept")
    if record.folder is not None and again.folder is not None:
        points = [_measured(folder) for folder in (record.folder, again.folder)]
        unequal += [
            f"the evaluation at step {a['step']}"
            for a, b in zip(*points, strict=False)
            if any(b.get(name) != value for name, value in a.items())
        ][:1]
    return Again((), 0.0, recorded, found, tuple(unequal))


def _as_it_was(folder: Path, record: Record) -> None:
    """A cell that began goes on in the way in which it began: with as many threads."""
    if record.compute.device == "cpu":
        hint = "leave this cell out: --cell NAME"
        begin(folder, of_form(Begun, {"threads": record.compute.threads}, record.place, hint))


def _conditions(record: Record) -> dict[str, Any]:
    compute = record.compute.model_dump(mode="json")
    return {key: value for key, value in compute.items() if key not in _NO_CONDITION}


def _measured(folder: Path) -> list[dict[str, Any]]:
    """The evaluations without their times."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in metrics(folder)]
