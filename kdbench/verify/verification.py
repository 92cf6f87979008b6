"""Whether a results folder still agrees with itself: recipe, records, metrics, table, and the sums over all of them.

Imports torch only where there are test logits. What cannot be checked (a record of an older version) is said, in the
verdict too, never passed over.
"""

import functools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdbench.engine.workers.finished import names
from kdbench.engine.workers.tuning import chosen, known_of, tried_plan
from kdbench.errors import CellError, UserError, counted
from kdbench.files import BEST, LOGITS, RECORD, RUN, STUDENT, TRIALS, meant, sha256_of
from kdbench.recipe.planning import Plan, PlannedCell, identity_of, plan
from kdbench.recipe.recorded import NotHere, cell_of
from kdbench.recipe.specs import CellSpec, recorded
from kdbench.record import Record
from kdbench.registry import Registry
from kdbench.results.page import without_charts
from kdbench.results.tables import build
from kdbench.results.texts import latex_forms, texts
from kdbench.verify import sums
from kdbench.verify.findings import Finding, Folder, is_cell, read_folder
from kdbench.verify.soundness import problems


def verify(path: Path, registry: Registry, roots: Iterable[Path] = ()) -> list[Finding]:
    """Every check of a folder that `kdbench run` or `kdbench publish` wrote.

    Args:
        roots: folders searched for data, whose labels test logits are compared with.

    Raises:
        UserError: this is no such folder.
    """
    if not (path / RUN).is_file():
        raise UserError(f"there is no {RUN}", str(path), meant(path, "a folder that holds one comparison", RUN))
    folder = read_folder(path)
    # Those that cannot be built are refused anew by each check.
    cell = functools.cache(lambda name: cell_of(folder.records[name].spec, registry, name))
    checks: list[Iterable[Finding]] = [
        *(check(folder) for check in (_sums, _plan_is_there, _sound, _files, _identities, _shared, _tables)),
        _logits(folder, cell, roots),
        _cards(folder, cell),
        _planned_again(folder, registry),
    ]
    return [*folder.unread, *(finding for check in checks for finding in _told(check))]


def _told(check: Iterable[Finding]) -> list[Finding]:
    """What a check found: what disagrees, or that everything agrees."""
    findings = list(check)
    wrong = any(finding.level == "disagrees" for finding in findings)
    return [finding for finding in findings if not (wrong and finding.level == "agrees")]


def _sums(folder: Folder) -> Iterator[Finding]:
    if (summed := sums.read_sums(folder.path)) is None:
        what = "there is none, so a digit that stands in one place only can change unseen"
        yield Finding("unchecked", what, sums.NAME, "sums of the files")
        return
    yield from (Finding("disagrees", what, sums.NAME) for what in sums.changed(folder.path))
    yield Finding("agrees", f"{counted(len(summed), 'file')} as summed up", sums.NAME)


def _plan_is_there(folder: Folder) -> Iterator[Finding]:
    """Every planned cell has a record, but for those that had none when the folder was summed up; what else has one is
    said."""
    cells = folder.run.cells
    if cells is None:
        what = "it names no cells (an older version wrote it): all records here are taken for its"
        yield Finding("unchecked", what, RUN, "which cells were planned")
        return
    extra = [name for name in folder.records if name not in cells and is_cell(name)]
    absent = [cell for cell in cells if cell not in folder.records]
    summed = sums.read_sums(folder.path)
    for cell in absent:
        if summed is None or f"{cell}/{RECORD}" in summed:
            yield Finding("disagrees", "planned, and has no sound record", cell)
        else:
            yield Finding("remark", "planned, and not finished: not in the table", cell)
    # A run's folder keeps what an earlier plan trained; of a published one, the sums tell.
    yield from (
        Finding("remark", f"has a record, is not among the cells of {RUN}: not in the table", name) for name in extra
    )
    finished = counted(len(cells) - len(absent), "finished cell" if absent else "cell")
    yield Finding("agrees", f"its {finished} with records", RUN)


def _sound(folder: Folder) -> Iterator[Finding]:
    """Each record against its own metrics and its own resolved recipe."""
    for name, record in folder.records.items():
        if name not in folder.histories:
            continue
        try:
            found = list(problems(record, folder.histories[name]))
        except UserError as error:
            found = [f"its resolved recipe asks for {error.what}"]
        if record.status != "finished":
            found.append(f"its status is '{record.status}'")
        if name in folder.planned:
            if not name.endswith(f"-{record.identity[:8]}"):
                found.append(f"its folder is not named after its identity, {record.identity[:8]}")
            if record.recipe != folder.run.name:
                found.append(f"its recipe is '{record.recipe}', {RUN} says '{folder.run.name}'")
        yield from (Finding("disagrees", what, name) for what in found)
    if not folder.records:
        yield Finding("unchecked", "there is none that can be read", "records", "records")
        return
    foreign = [name for name, record in folder.records.items() if record.resolved is None]
    if foreign:
        what = f"resolved recipes of {len(foreign)} have another version's form, {foreign[0]}'s for one"
        yield Finding("unchecked", what, "records", "records against their resolved recipes")
    known = "" if foreign else " and recipes"
    yield Finding("agrees", f"{counted(len(folder.records), 'record')}, as the metrics{known} say", "records")


def _files(folder: Folder) -> Iterator[Finding]:
    """Weights and logits beside the records, where there are any, are those that the records name."""
    held, nameless = 0, 0
    for name, record in folder.records.items():
        for file in filter(Path.is_file, (folder.path / name / left for left in (STUDENT, BEST, LOGITS))):
            expected = record.files.get(file.name)
            held += expected is not None
            nameless += expected is None
            if expected is not None and sha256_of(file) != expected:
                yield Finding("disagrees", f"{file.name} is not the file that its record names", name)
    if nameless:
        what = f"{nameless} of weights and logits have no sha256 in their records, which an older version wrote"
        yield Finding("remark", what, "files")
    if held:
        yield Finding("agrees", f"{held} of weights and logits compared with the sha256 in their records", "files")


def _logits(folder: Folder, cell: Callable[[str], CellSpec], roots: Iterable[Path]) -> Iterator[Finding]:
    """What records say of their answers follows from the logits beside them, where the data are here.

    Args:
        cell: builds that of a record from the cards that it names.
    """
    held = {name: record for name, record in folder.records.items() if (folder.path / name / LOGITS).is_file()}
    check = "results against the test logits"
    if lacking := len(folder.records) - len(held):
        yield Finding("unchecked", f"none beside {lacking} of {counted(len(folder.records), 'record')}", LOGITS, check)
    if not held:
        return
    from kdbench.verify.recount import counted_again, recorded_numbers

    try:
        data = {name: cell(name).tested for name in held}
        numbers = {name: recorded_numbers(record, folder.histories.get(name, [])) for name, record in held.items()}
        found = counted_again(held, numbers, data, roots)
    except UserError as error:
        yield Finding("unchecked", f"results were not counted again, for want of labels: {error.what}", LOGITS, check)
        return
    if foreign := len(held) - len(found):
        what = f"{foreign} of {len(held)} are not of the test images that are here: not counted again"
        yield Finding("unchecked", what, LOGITS, check)
    yield from (Finding("disagrees", what, name) for name, (_, wrong) in found.items() for what in wrong)
    recounted = Counter(number for same, _ in found.values() for number in same)
    left = Counter(number for name in found for number in numbers[name]) - recounted
    if recounted:
        what = "follow from them: " + ", ".join(
            f"{number} of {counted(times, 'record')}" for number, times in recounted.items()
        )
        if left:
            what += f"; not {', '.join(f'{number} of {times}' for number, times in left.items())}"
            what += ", for want of the teacher's in float32"
        yield Finding("agrees", what, LOGITS)


def _identities(folder: Folder) -> Iterator[Finding]:
    """Identities recomputed.

    Where none of a commit's can be, that commit's version computed them in another way; where some can, the others'
    resolved recipes were changed.
    """
    by_version: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)
    for name, record in folder.records.items():
        writer = (record.kdbench, record.git.commit[:12] if record.git else "unknown")
        by_version[writer][name] = _is_recomputed(record)
    equal = 0
    for (version, commit), same in by_version.items():
        if not any(same.values()):
            yield Finding(
                "unchecked",
                f"those of {counted(len(same), 'record')} cannot be recomputed: kdbench {version}, commit {commit}, "
                "wrote them, and this version identifies cells in another way",
                "identities",
                "identities",
            )
            continue
        for name in (name for name, found in same.items() if not found):
            yield Finding("disagrees", "its identity is not that of its resolved recipe", name)
        equal += sum(same.values())
    if equal:
        yield Finding("agrees", f"{equal} recomputed from the resolved recipes", "identities")


def _cards(folder: Folder, cell: Callable[[str], CellSpec]) -> Iterator[Finding]:
    """Each record against the cards that it names: only what these are is ever built."""
    absent: dict[str, list[str]] = defaultdict(list)
    for name in folder.records:
        try:
            cell(name)
        except NotHere as error:
            absent[f"{error.what}; {error.hint}"].append(name)
        except UserError as error:
            yield Finding("disagrees", error.what, name)
    for what, cells in absent.items():
        yield Finding("unchecked", f"{counted(len(cells), 'record')}, {cells[0]} for one: {what}", "cards", "cards")
    if folder.records and not absent:
        yield Finding("agrees", "what the records name are cards of this installation, as they are today", "cards")


def _shared(folder: Folder) -> Iterator[Finding]:
    """What is one and the same thing in several records is the same in all: data, teachers, networks."""
    groups: dict[tuple[str, Hashable], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))

    def add(cell: str, what: str, key: Hashable, value: Any) -> None:
        groups[(what, key)][json.dumps(value, sort_keys=True)].append(cell)

    others = [record for name, record in folder.records.items() if name not in folder.planned]
    for name, record in folder.records.items():
        for domain in filter(None, (record.data, record.target)):
            for what in ("fingerprint", "origin", "class_names"):
                if (value := getattr(domain, what)) is not None:
                    add(name, f"data {what.replace('_', ' ')}", domain.name, value)
        if record.teacher is not None:
            # A card may have weights, and a recipe to train by instead. Read as it stands: of any version's form.
            described = record.spec.get("teacher") or {}
            teacher = (record.teacher.name, bool(described.get("trained_by")))
            images = record.spec.get("target") or record.spec.get("data") or {}
            tested = _given(images, described.get("normalization"), described.get("model") or {})
            add(name, "teacher hash", teacher, record.teacher.sha256)
            add(name, "teacher accuracy", (teacher, tested), record.teacher.accuracy)
            add(name, "size of the teacher", teacher, record.models.teacher and record.models.teacher.model_dump())
        spec = record.resolved
        if spec is None:
            continue
        # A student that answers through other modules is as large as these and its teacher have it.
        answers = [recorded(spec.method.predicts), record.spec["teacher"]] if spec.method.predicts else []
        student = json.dumps([record.spec["student"], spec.data.image_size, *answers], sort_keys=True)
        add(name, "size of the student", student, record.models.student.model_dump())
        # Batch sources and second views have streams of their own.
        drawing = (record.kdbench, record.target is None, spec.method.name, json.dumps(record.spec["protocol"]))
        add(name, "list of random streams", drawing, record.seeds.streams)
        if record.teacher is None or spec.teacher is None:
            continue
        of = spec.teacher.trained_by
        # In the form of today: versions differ in what they leave out.
        add(name, "teacher's description", teacher, recorded(spec.teacher))
        identities = of.identities() if of else ()
        trained = next((r for r in others if r.identity in identities), None)
        if trained is None or name not in folder.planned:
            continue
        if (weights := trained.files.get(STUDENT)) is not None:
            add(name, "teacher hash", teacher, weights)
        # A teacher that was tested on its source alone is measured once more on the cells' target.
        on_source = record.target is not None and record.teacher.source_accuracy is not None
        key = teacher if on_source else (teacher, tested)
        add(name, "teacher accuracy", key, record.teacher.source_accuracy if on_source else record.teacher.accuracy)
        own = trained.resolved
        if own is None or own.data.tested_on == "test":
            given = _given(trained.spec["data"], trained.spec["protocol"].get("normalization"), trained.spec["student"])
            add(name, "teacher accuracy", key if on_source else (teacher, given), trained.result.test.last)
    different = [(what, key, values) for (what, key), values in groups.items() if len(values) > 1]
    for what, _, values in different:
        fewest = min(values.values(), key=len)
        shown = " and ".join(value.strip('"')[:60] for value in values)
        yield Finding("disagrees", f"the {what} is not one: {shown}", ", ".join(dict.fromkeys(fewest[:3])))
    if groups:
        yield Finding("agrees", "data, teachers and networks are the same in all records that share them", "records")


def _given(data: dict[str, Any], normalization: Any, model: dict[str, Any]) -> str:
    """How a network was given the images that it was tested on: its accuracy depends on that too."""
    sizes = data.get("image_size"), (data.get("options") or {}).get("short_side"), model.get("image_size")
    return json.dumps([data.get("name"), sizes, normalization], sort_keys=True)


def _tables(folder: Folder) -> Iterator[Finding]:
    """The table's files, made again from the records."""
    records = list(folder.planned.values())
    if not records:
        yield Finding("unchecked", "there is no record to make it from", "table.md", "the table's files")
        return
    try:
        missing = [folder.path / name for name in folder.run.cells or () if name not in folder.planned]
        table = build(records, unfinished=missing)
        made = texts(table, records, charts=False)
    except UserError as error:
        yield Finding("disagrees", f"no table can be made of the records: {error.what}", "table.md")
        return
    other = False
    for name, text in made.items():
        file = folder.path / name
        there = without_charts(file.read_bytes().decode("utf-8", "replace")) if file.is_file() else None
        if there is None:
            yield Finding("disagrees", "it is not there", name)
        elif there != text and not (name == "table.tex" and there in latex_forms(table, there)):
            other = True
            yield Finding("disagrees", "it is not what the records give", name)
    if other:
        yield Finding("remark", f"'kdbench table {folder.path} --out {folder.path}' writes this version's", "table")
    yield Finding("agrees", "made again from the records, the page without its charts", ", ".join(made))


def _planned_again(folder: Folder, registry: Registry) -> Iterator[Finding]:
    """What the recorded recipe plans with today's cards."""
    check = "what its recipe plans today"
    recipe, cells = folder.run.recipe, folder.run.cells
    if recipe is None or cells is None:
        lacks = "recipe" if recipe is None else "cells"
        yield Finding("unchecked", f"not planned again: it holds no {lacks}", RUN, check)
        return
    try:
        # Nothing is trained: the teachers' weights need not be here.
        today = _as_run(plan(recipe, registry, weights_must_exist=False), folder)
    except UserError as error:
        yield Finding("unchecked", f"its recipe cannot be planned here: {error.what}", RUN, check)
        return
    there = {identity_of(name): name for name in cells}
    by_slug = {
        next((there[end] for slug in cell.slugs if (end := identity_of(slug)) in there), cell.slug): cell
        for cell in today.cells
    }
    if list(by_slug) != cells:
        ours = any(map(_is_recomputed, folder.planned.values()))
        other = len(set(by_slug) - set(cells))
        yield Finding(
            "disagrees" if ours else "unchecked",
            f"its recipe, planned with the cards of today, gives {counted(len(by_slug), 'cell')}, {other} of them other"
            + ("" if ours else " (an older version wrote it)"),
            RUN,
            "" if ours else check,
        )
        return
    yield from _named_otherwise(folder, today, by_slug)
    if folder.run.title != today.title:
        yield Finding("disagrees", "its title is not that of its recipe", RUN)
    yield Finding("agrees", "planned with the cards of today it gives these very cells", RUN)


def _named_otherwise(folder: Folder, today: Plan, by_slug: dict[str, PlannedCell]) -> Iterator[Finding]:
    """What records say of their cells' names and places that a plan of today says otherwise."""
    renamed: dict[str, None] = {}
    present = {slug: folder.records[slug] for slug in by_slug if slug in folder.records}
    # A cell may have been trained as part of a larger comparison: what counts is which cells come before which.
    planned_places = _places({slug: by_slug[slug].order for slug in present})
    recorded_places = _places({slug: record.cell.order for slug, record in present.items()})
    for slug, record in present.items():
        cell = by_slug[slug]
        expected = names(today, cell)["cell"]
        in_record = record.cell.model_dump(mode="json")
        if recorded_places[slug] == planned_places[slug]:
            expected.pop("order")
        for key, value in json.loads(json.dumps(expected)).items():
            if in_record.get(key) == value:
                continue
            if key in ("label", "teacher") and in_record.get(key) and value:
                renamed[f"'{in_record[key]}' is called '{value}' today"] = None
            else:
                yield Finding("disagrees", f"cell.{key} is {in_record.get(key)}, its recipe plans {value}", slug)
    yield from (Finding("remark", what, "labels") for what in renamed)


def _as_run(today: Plan, folder: Folder) -> Plan:
    """A plan under a folder's name; of one that tunes, what the accuracies in its records choose, or what it tries.

    Raises:
        UserError: an accuracy is in no record.
    """
    name = str(folder.run.name)
    if today.candidates and name.endswith(TRIALS):
        # What published records said already was not tried there.
        tried, there = tried_plan(today), {identity_of(cell) for cell in folder.run.cells or ()}
        cells = [cell for cell in tried.cells if there & {identity_of(slug) for slug in cell.slugs}]
        return replace(tried, name=name, cells=cells)
    try:
        return replace(chosen(today, known_of(folder.planned.values())), name=name)
    except (KeyError, CellError) as error:
        raise UserError(f"its records do not say how all settings were chosen ({error})", where=RUN) from None


def _places(orders: dict[str, int | None]) -> dict[str, int]:
    """Orders counted without gaps."""
    among = sorted({order or 0 for order in orders.values()})
    return {name: among.index(order or 0) for name, order in orders.items()}


def _is_recomputed(record: Record) -> bool:
    """Whether a record's identity is that of its resolved recipe, as this version computes it."""
    return record.resolved is not None and record.identity in record.resolved.identities()
