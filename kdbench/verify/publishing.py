"""From a run's folder to what is worth keeping of it: tables, plots, records, metrics and test logits."""

import shutil
from collections.abc import Collection
from pathlib import Path

from kdbench.engine.folders import teacher_folder
from kdbench.errors import UserError, counted
from kdbench.files import BEFORE, LOGITS, PUBLISHED, RECORD, RUN, meant, weight_files, workplace
from kdbench.reading import inside
from kdbench.recipe.planning import identity_of
from kdbench.record import finished_record, metrics, read_record, read_run, student_file
from kdbench.verify import sums


def publish(
    run: Path, out: Path, replace: bool = False, unfinished: bool = False, logits: bool = True, teachers: bool = False
) -> Path:
    """Copy a finished run to `out/<name>`, with the records of teachers that were trained for it, and sum it up.

    An earlier copy is replaced, but for files of one's own. Teachers' records go into `teacher/` or `teacher-<name>/`.

    Args:
        replace: whether cells of the earlier copy that the run does not have may go.
        unfinished: whether cells may be missing.
        logits: whether test logits are copied too.
        teachers: whether weights of teachers trained for the run are copied too; those published already stay.

    Raises:
        UserError: no run, no weights of a teacher, cells that are not finished and none that are, links that leave the
            run, or something else than results in the way.
    """
    from kdbench.results.writing import renew_tables

    plan = read_run(run) if (run / RUN).is_file() else None
    if plan is None or plan.name is None or not plan.cells:
        raise UserError("this is not the folder of a run", str(run), meant(run, "the folder of a run", RUN))
    cells, name = [cell for cell in plan.cells if finished_record(inside(run, cell, RECORD).parent)], plan.name
    open_cells = [cell for cell in plan.cells if cell not in cells]
    if open_cells and not (unfinished and cells):
        what = f"not finished: {len(open_cells)} of {counted(len(plan.cells), 'cell')}, {open_cells[0]} for one"
        hint = "run the recipe again: it continues where it stopped"
        hint += ". Or publish without them: --unfinished" if cells else ""
        raise UserError(what, str(run), hint)
    with workplace(inside(out, name)) as temporary:
        target = _target(inside(out, name), run, cells, replace)
        made = temporary / name
        made.mkdir()
        for file in sums.published_files(run):
            if file.parent == run and (file.name == RUN or not open_cells):
                shutil.copy(file, made)
        taught = _teachers(run, cells)
        for folder, copy in [*((run / cell, cell) for cell in cells), *taught]:
            inside(made, copy).mkdir()
            # What cannot be read again is not worth keeping.
            read_record(inside(folder, RECORD)), metrics(folder)
            for file_name in PUBLISHED:
                if (logits or file_name != LOGITS) and (file := inside(folder, file_name)).is_file():
                    shutil.copy(file, made / copy)
        for folder, copy in taught:
            if teachers or weight_files(target / copy):
                _copy_weights(folder, target / copy, made / copy)
        # The run's own may be of an earlier plan: one that was cut off leaves them.
        renew_tables(run, made, open_cells)
        sums.write(made)
        _take_the_place(made, target, temporary / BEFORE)
    return target


def _take_the_place(made: Path, target: Path, before: Path) -> None:
    """Put a copy in the place of an earlier one, which goes to `before`, with what somebody put there: notes, pictures,
    whatever no publishing summed up. The workplace gives it back where this is cut off."""
    if target.exists():
        _copy_own(target, made)
        target.rename(before)
    made.rename(target)


def _copy_own(target: Path, made: Path) -> None:
    summed = sums.read_sums(target)
    published = {*sums.published_files(target)} if summed is None else {target / name for name in summed}
    for file in {*target.rglob("*")} - published - {target / sums.NAME}:
        copy = made / file.relative_to(target)
        if (file.is_file() or file.is_symlink()) and not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy, follow_symlinks=False)


def _copy_weights(folder: Path, before: Path, copy: Path) -> None:
    """Copy a teacher's weights, from the earlier copy where its own folder has none. UserError where none are its."""
    source = folder if weight_files(folder) else before
    student_file(read_record(folder).model_copy(update={"folder": source}))
    for file in weight_files(source):
        place = file.relative_to(source)
        (copy / place).parent.mkdir(exist_ok=True)
        shutil.copy(inside(source, *place.parts), copy / place)


def _target(target: Path, run: Path, cells: list[str], replace: bool) -> Path:
    """The folder that the copy may take the place of, or UserError."""
    if target.resolve() == run.resolve():
        raise UserError("this is the published copy itself", where=str(run), hint="give the run: runs/<recipe>")
    if target.exists() and not (target / RUN).is_file():
        raise UserError("this is not a folder of results, so nothing was written", str(target), "give another --out")
    if target.exists() and not replace and (what := lost(target, cells)):
        hint = "run the recipe with all of them, or say 'kdbench publish' with another --out, or --replace"
        raise UserError(what, str(target), hint)
    return target


def lost(published: Path, cells: Collection[str]) -> str | None:
    """Which published cells a run of these cells does not have, in words."""
    if not (published / RUN).is_file():
        return None
    before = [cell for cell in read_run(published).cells or () if inside(published, cell, RECORD).is_file()]
    kept = {identity_of(cell) for cell in cells}
    if not (gone := [cell for cell in before if identity_of(cell) not in kept]):
        return None
    return f"not in this run: {len(gone)} of {counted(len(before), 'cell')} published there, {gone[0]} for one"


def _teachers(run: Path, cells: list[str]) -> list[tuple[Path, str]]:
    """Folders of the teachers that were trained for these cells, and what their copies are called."""
    found = {}
    for cell in cells:
        spec = read_record(run / cell).resolved
        for teacher in spec.teachers if spec is not None else ():
            if (trained := teacher.trained_by) is None:
                continue
            # One that was not trained here may have come with published cells, as a record.
            for folder in (teacher_folder(teacher, run.parent), *sorted(run.glob("teacher*"))):
                if (folder / RECORD).is_file() and read_record(folder).identity == trained.identity():
                    found[folder] = teacher.name
                    break
    if len(found) == 1:
        return [(next(iter(found)), "teacher")]
    return [(folder, f"teacher-{name}") for folder, name in found.items()]
