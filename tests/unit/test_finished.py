"""What counts as finished: for the data and the teacher that are here, with weights that are those of the record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic import make, plain_record, write

from kdbench.engine.analysis import FinishedCell
from kdbench.engine.folders import cell_folders, open_cells
from kdbench.engine.scheduling import CellState
from kdbench.engine.teachers.files import trained
from kdbench.engine.workers.finished import DataHere, Finished
from kdbench.engine.workers.messages import Event, Failed, FingerprintRead, ReadFingerprint
from kdbench.errors import UserError
from kdbench.files import SHARE, sha256_of
from kdbench.recipe.planning import Plan, plan
from kdbench.recipe.specs import recorded
from kdbench.record import Record, finished_record, read_record, read_records, student_file
from kdbench.registry import Registry
from kdbench.results.comparison import compare
from kdbench.verify import sums
from kdbench.verify.adopting import computed_otherwise, published
from kdbench.verify.findings import read_folder
from kdbench.verify.publishing import lost, publish
from kdbench.verify.verification import _files

E2E = Path(__file__).parent.parent / "e2e"
OLD, NEW = "cd" * 32, "ef" * 32
TEACHER = "ab" * 32


class FakePool:
    """Answers what a worker would: a data set's fingerprint, or that it is not here."""

    def __init__(self, fingerprints: dict[str, str]) -> None:
        self.fingerprints = fingerprints
        self.asked: list[tuple[str, bool]] = []

    def carry_out(self, tasks: list[ReadFingerprint]) -> Iterator[Event]:
        name = tasks[0].data.name
        self.asked.append((name, tasks[0].download))
        if name in self.fingerprints:
            yield FingerprintRead(fingerprint=self.fingerprints[name])
        else:
            yield Failed(message=f"there is no {name}", by_user=True)


def planned(*overrides: str) -> Plan:
    recipe = E2E / "recipes" / ("tiny_domains.yaml" if "target" in overrides else "tiny.yaml")
    words = [word for word in overrides if word != "target"]
    return plan(recipe, Registry([E2E / "registry"]), ("compare.method=[kd]", *words))


def leave(folder: Path, identity: str, **over: Any) -> Record:
    """A cell's folder with a record of this identity."""
    names = {"data": "digits", "teacher": "tiny_digits", "student": "wrn_10_1", "protocol": "digits"}
    write(folder, plain_record(**names, **over) | {"identity": identity}, [])
    return read_record(folder)


class Scene:
    """A planned run, whose cells of the first seed are finished."""

    def __init__(self, runs: Path, plan: Plan, here: dict[str, str], taken: bool = False, **over: Any) -> None:
        self.runs, self.said = runs, []
        self.cells = [CellState(cell, i, runs / "run" / cell.slug) for i, cell in enumerate(plan.cells)]
        state = self.cells[0]
        cell = state.cell
        place = runs / "results" / "run" / cell.slug if taken else state.folder
        record = leave(place, cell.spec.identity(), **over)
        self.pool = FakePool(here)
        say: Any = self.said.append
        self.here = DataHere(self.pool, say)  # type: ignore[arg-type]
        self.finished = Finished(self.cells, {cell.slug: record} if taken else {}, runs, say)

    def teacher(self, spec: Any) -> Path:
        return self.runs / "teachers" / f"{spec.name}-{spec.trained_by.identity()[:8]}"

    def leave_teacher(self, weights: bytes, **over: Any) -> Path:
        spec = self.cells[0].spec.teacher
        assert spec is not None and spec.trained_by is not None
        folder = self.teacher(spec)
        leave(folder, spec.trained_by.identity(), **over)
        (folder / "student.safetensors").write_bytes(weights)
        return folder


def test_a_record_that_cannot_be_read_or_is_another_cells_is_not_passed_over(tmp_path: Path) -> None:
    assert finished_record(tmp_path / "kd-seed0-12345678") is None
    folder = tmp_path / "kd-seed0-aaaaaaaa"
    leave(folder, "a" * 64)
    assert finished_record(folder) is not None
    whole = (folder / "record.json").read_text()
    (folder / "record.json").write_text(whole[:300])
    with pytest.raises(UserError, match="damaged"):
        finished_record(folder)
    (folder / "record.json").write_text(whole.replace("a" * 64, "b" * 64))
    with pytest.raises(UserError, match="record of another cell, bbbbbbbb"):
        finished_record(folder)


def test_a_record_that_lies_in_the_folder_of_another_cell_is_in_no_table(tmp_path: Path) -> None:
    folders = [tmp_path / f"kd-seed{seed}-{letter * 8}" for seed, letter in enumerate("ab")]
    for folder, seed in zip(folders, (0, 1), strict=True):
        leave(folder, folder.name[-8] * 64, seed=seed)
    (tmp_path / "recipe.json").write_text(json.dumps({"name": "r", "cells": [folder.name for folder in folders]}))
    assert [record.cell.seed for record in read_records(tmp_path)] == [0, 1]
    (folders[1] / "record.json").write_text((folders[0] / "record.json").read_text())
    for use in (lambda: read_records(tmp_path), lambda: publish(tmp_path, tmp_path / "out")):
        with pytest.raises(UserError, match="record of another cell, aaaaaaaa") as caught:
            use()
        assert caught.value.where == str(folders[1] / "record.json")


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishing makes no tables and plots, which takes seconds."""
    monkeypatch.setattr("kdbench.results.writing.renew_tables", lambda *_: None)


@pytest.mark.usefixtures("no_tables")
def test_publishing_again_keeps_what_somebody_else_put_there(tmp_path: Path) -> None:
    run, cells = tmp_path / "r", [f"kd-seed0-{letter * 8}" for letter in "ab"]
    for cell in cells:
        leave(run / cell, cell[-1] * 64)
    (run / "table.md").write_text("a table")

    def publish_with(*kept: str) -> Path:
        (run / "recipe.json").write_text(json.dumps({"name": "r", "cells": kept}))
        return publish(run, tmp_path / "out", replace=True)

    made = publish_with(*cells)
    own = [made / "notes.md", made / "pictures" / "mine.png", made / "mine.png"]
    for file in own:
        file.parent.mkdir(exist_ok=True)
        file.write_text("my own")
    (run / "table.md").unlink()
    for _ in range(2):
        publish_with(cells[0])
        assert all(file.read_text() == "my own" for file in own)
        # What was published goes with what it is of.
        assert not (made / "table.md").exists() and not (made / cells[1]).exists()
        # As a publishing leaves it that is killed in its last step.
        killed = made.with_name(".r.killed__")
        (killed / "r").mkdir(parents=True)
        (killed / ".lock").touch()
        made.rename(killed / "before")
    publish_with(cells[0])
    assert all(file.read_text() == "my own" for file in own) and [*made.parent.iterdir()] == [made]


@pytest.mark.usefixtures("no_tables")
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_publishing_that_fails_at_its_end_leaves_the_earlier_copy(
    interrupted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an interrupt comes while that is out of its place."""
    run = tmp_path / "r"
    leave(run / "kd-seed0-aaaaaaaa", "a" * 64)
    (run / "recipe.json").write_text(json.dumps({"name": "r", "cells": ["kd-seed0-aaaaaaaa"]}))
    made = publish(run, tmp_path / "out")
    (made / "notes.txt").write_text("mine")
    before = {file: file.read_bytes() for file in made.rglob("*") if file.is_file()}
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == made.name and target == made:
            raise OSError("no space left")
        moved = rename(self, target)
        if self == made and interrupted:
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt if interrupted else OSError):
        publish(run, tmp_path / "out")
    assert [file.name for file in made.parent.iterdir()] == [made.name]
    assert {file: file.read_bytes() for file in made.rglob("*") if file.is_file()} == before


def test_a_teacher_has_the_accuracy_of_its_last_evaluation(tmp_path: Path) -> None:
    scene = Scene(tmp_path, planned(), {"digits": OLD}, data__fingerprint=OLD)
    folder = scene.leave_teacher(b"weights", last=90.2, data__fingerprint=OLD)
    lines = [{"step": step, "epoch": 1, "test": {"accuracy": value}} for step, value in ((1, 99.0), (2, 90.2))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scene.finished.compare_data(scene.here)
    file = folder / "record.json"
    file.write_text(file.read_text().replace('"last": 90.2', '"last": 99.0'))
    with pytest.raises(UserError, match=r"'tiny_digits' has 99.00 % here, and 90.20 % in its metrics.jsonl") as caught:
        scene.finished.compare_data(scene.here)
    assert caught.value.where == str(file)


def test_weights_are_used_only_if_they_are_those_of_the_record(tmp_path: Path) -> None:
    folder = tmp_path / "teacher-aaaaaaaa"
    with pytest.raises(UserError, match="there are no weights of this cell's student"):
        student_file(leave(folder, "a" * 64))
    file = folder / "student.safetensors"
    file.write_bytes(b"weights")
    assert student_file(read_record(folder)) == file, "a record of an earlier version holds no sha256"
    plain = json.loads((folder / "record.json").read_text()) | {"files": {file.name: sha256_of(file)}}
    plain["spec"] = recorded(planned().cells[0].spec)
    (folder / "record.json").write_text(json.dumps(plain))
    found = trained(folder)
    assert found is not None and found.sha256 == sha256_of(file)
    assert [one.level for one in _files(read_folder(tmp_path))] == ["agrees"]
    file.write_bytes(b"weighty")
    for use in (lambda: student_file(read_record(folder)), lambda: trained(folder)):
        with pytest.raises(UserError, match="these weights are not those of their record"):
            use()
    assert [one.level for one in _files(read_folder(tmp_path))] == ["disagrees", "agrees"]
    # The same file named by a recipe, as a start or as a teacher's weights.
    for named in (f"student.weights={file}", f"teacher={{model: wrn_10_1, weights: {file}}}"):
        with pytest.raises(UserError, match="do not match the record next to them"):
            planned(named)


def test_old_records_get_a_remark(tmp_path: Path) -> None:
    leave(tmp_path / "kd-seed0-aaaaaaaa", "a" * 64)
    (tmp_path / "kd-seed0-aaaaaaaa" / "student.safetensors").write_bytes(b"weights")
    assert [(one.level, one.where) for one in _files(read_folder(tmp_path))] == [("remark", "files")]


@pytest.mark.parametrize("seeds", ["seeds=1", "seeds=2"])
@pytest.mark.parametrize(
    ("target", "over", "here"),
    [
        ((), {}, {"digits": NEW}),
        (("target",), {"target": {"name": "mnist_8", "fingerprint": OLD, "train": 1, "test": 1, "classes": 10}},
         {"digits": OLD, "mnist_8": NEW}),
    ],
)  # fmt: skip
def test_finished_cells_count_only_for_their_data(
    tmp_path: Path, seeds: str, target: tuple[str, ...], over: dict[str, Any], here: dict[str, str]
) -> None:
    scene = Scene(tmp_path, planned(seeds, *target), here, **over)
    with pytest.raises(UserError, match=f"made from other data.*{OLD[:12]}, here it has {NEW[:12]}") as error:
        scene.finished.compare_data(scene.here)
    assert error.value.hint is not None and "--runs" in error.value.hint
    same = Scene(tmp_path / "same", planned(seeds, *target), dict.fromkeys(here, OLD), **over)
    same.finished.compare_data(same.here)
    assert same.said == [] and [cell.spec.seed for cell in same.finished.open] == list(range(1, int(seeds[-1])))


def test_a_teacher_counts_only_for_its_data(tmp_path: Path) -> None:
    scene = Scene(tmp_path, planned("seeds=2"), {"digits": NEW}, data__fingerprint=NEW)
    scene.leave_teacher(b"weights", data__fingerprint=OLD)
    with pytest.raises(UserError, match=f"'tiny_digits' was trained on other data.*{OLD[:12]}.*{NEW[:12]}"):
        scene.finished.compare_data(scene.here)


def test_data_that_are_absent_are_told_and_needed_only_for_training(tmp_path: Path) -> None:
    scene = Scene(tmp_path, planned(), {})
    scene.finished.compare_data(scene.here)
    assert scene.said == ["what is finished was not compared with the data 'digits': there is no digits"]
    assert scene.pool.asked == [("digits", False)], "asked once, and nothing is downloaded for it"
    scene = Scene(tmp_path / "more", planned("seeds=2"), {})
    with pytest.raises(UserError, match="there is no digits"):
        scene.finished.compare_data(scene.here)


def test_cells_of_a_run_learned_from_one_teacher(tmp_path: Path) -> None:
    scene = Scene(tmp_path, planned("seeds=2"), {"digits": OLD})
    scene.leave_teacher(b"other weights")
    with pytest.raises(UserError, match=f"taught by another teacher: 'tiny_digits' had the sha256 {TEACHER[:12]}"):
        scene.finished.compare_teachers()
    # None is to be trained, but the finished ones differ.
    cell = scene.cells[1]
    leave(cell.folder, cell.spec.identity(), seed=1, teacher__sha256=NEW)
    with pytest.raises(UserError, match=f"{NEW[:12]}, here it has {TEACHER[:12]}"):
        Finished(scene.cells, {}, scene.runs, print).compare_teachers()


def test_published_cells_are_taken_where_they_fit_and_left_where_they_do_not(tmp_path: Path) -> None:
    for name, fingerprint, taken in (("fits", OLD, 1), ("other", NEW, 0)):
        scene = Scene(tmp_path / name, planned("seeds=2"), {"digits": fingerprint}, taken=True)
        scene.finished.compare_data(scene.here)
        scene.finished.compare_teachers()
        scene.finished.adopt(scene.runs / "results" / "run", scene.runs / "run")
        cell = scene.cells[0]
        assert (finished_record(cell.folder) is not None) == (cell.state == "finished") == bool(taken)
        assert len(scene.finished.open) == 2 - taken
        (said,) = scene.said
        assert ("1 cell taken from" if taken else "not taken, made from other data") in said
    scene = Scene(tmp_path / "taught", planned("seeds=2"), {"digits": OLD}, taken=True)
    scene.leave_teacher(b"other weights")
    scene.finished.compare_teachers()
    assert len(scene.finished.open) == 2 and "not taken, taught by another teacher" in scene.said[0]


@pytest.mark.parametrize("why", ["made from other data", "taught by another teacher"])
@pytest.mark.parametrize("kept", [False, True])
def test_a_copy_of_a_published_cell_is_given_up_where_it_does_not_fit_any_more(
    tmp_path: Path, why: str, kept: bool
) -> None:
    """A run took it when there was nothing else; then a method was added, for which a teacher was trained here."""
    scene = Scene(tmp_path, planned("seeds=2"), {"digits": OLD}, taken=True)
    scene.finished.adopt(scene.runs / "results" / "run", scene.runs / "run")
    copy = scene.cells[0].folder
    (copy / "notes.txt").write_text("mine")
    if kept:
        # Published from this very folder: its weights are nowhere else.
        (copy / "student.safetensors").write_bytes(b"weights")
    scene.pool.fingerprints["digits"] = NEW if "data" in why else OLD
    if "teacher" in why:
        scene.leave_teacher(b"other weights")
    again = Finished(scene.cells, scene.finished.published, scene.runs, scene.said.append)
    assert [cell.spec.seed for cell in again.open] == [1]
    compare = again.compare_teachers if "teacher" in why else lambda: again.compare_data(scene.here)
    if kept:
        with pytest.raises(UserError, match=f"1 cell finished before was {why}"):
            compare()
        assert (copy / "record.json").is_file()
    else:
        compare()
        assert (
            len(again.open) == 2
            and [file.name for file in copy.iterdir()] == ["notes.txt"]
            and f"not taken, {why}" in scene.said[-1]
        )


def test_how_published_cells_were_computed_is_told_where_a_run_computes_otherwise(tmp_path: Path) -> None:
    folder = SHARE / "results" / "ab_wrn_30"
    if not folder.is_dir():
        pytest.skip("results/ is not beside the package")
    way = "compute.precision=bfloat16 compute.layout=channels_last compute.compile=true"
    by_measuring, alike = plan("ab_wrn_30", Registry()), plan("ab_wrn_30", Registry(), tuple(way.split()))
    assert published(by_measuring, folder) == {} and computed_otherwise(by_measuring, folder) == way
    assert len(published(alike, folder)) == 35 and computed_otherwise(alike, folder) is None
    assert computed_otherwise(by_measuring, folder / "absent") is None
    # Nor is it where they were computed by measuring, or in several ways.
    (tmp_path / "recipe.json").write_text("{}")
    file = shutil.copytree(next(folder.glob("kd-seed0-*")), tmp_path / "measured") / "record.json"
    plain = json.loads(file.read_text())
    del plain["spec"]["compute"]
    file.write_text(json.dumps(plain))
    assert computed_otherwise(alike, tmp_path) is None
    shutil.rmtree(file.parent)
    for one in ("ab_wrn_30", "quickstart"):
        shutil.copytree(next((SHARE / "results" / one).glob("kd-seed0-*")), tmp_path / one)
    assert computed_otherwise(by_measuring, tmp_path) is None


def test_a_published_record_that_was_changed_is_not_taken(tmp_path: Path) -> None:
    one = planned()
    folder = tmp_path / "tiny"
    assert published(one, folder) == {}
    leave(folder / one.cells[0].slug, one.cells[0].spec.identity())
    (folder / "recipe.json").write_text("{}")
    sums.write(folder)
    file = folder / one.cells[0].slug / "record.json"
    file.write_text(file.read_text().replace("90.2", "99.2"))
    with pytest.raises(UserError, match=r"cannot be used: kd-\S+/record.json has changed"):
        published(one, folder)
    # With sums that fit: it still says what its metrics do not.
    sums.write(folder)
    with pytest.raises(UserError, match="cannot be used: its metrics.jsonl is empty"):
        published(one, folder)


@pytest.mark.parametrize(
    "over",
    [
        {"data__fingerprint": NEW},
        {"teacher__sha256": NEW},
        {"target": {"name": "mnist_8", "fingerprint": NEW, "train": 1, "test": 1, "classes": 10}},
    ],
)
def test_no_mean_is_taken_over_different_data_or_teachers(over: dict[str, Any]) -> None:
    target = {"name": "mnist_8", "fingerprint": OLD, "train": 1, "test": 1, "classes": 10}
    shared: dict[str, Any] = {"target": target} if "target" in over else {}
    first = make("kd", 0, **shared)
    assert compare([first, make("kd", 1, **shared)]).records
    # Another seed, and the same cell twice: its identity does not know of data that were edited in place.
    for other in (make("kd", 1, **over), make("kd", 0, 91.0, **over)):
        with pytest.raises(UserError, match=f"no mean is taken over them.*{NEW[:12]}"):
            compare([first, other])


def test_an_analysis_is_of_the_data_and_the_teacher_of_the_record() -> None:
    cell = FinishedCell(make("kd", 0), planned().cells[0].spec)
    cell.check_made_from(OLD, "wrn_22_4_cifar10", TEACHER)
    cell.check_made_from(OLD, "another", NEW)
    for here in ((NEW, "wrn_22_4_cifar10", TEACHER), (OLD, "wrn_22_4_cifar10", NEW)):
        with pytest.raises(UserError, match=f"here it is {NEW[:12]}"):
            cell.check_made_from(*here)


def test_a_cell_is_finished_whatever_else_is_compared_today(tmp_path: Path) -> None:
    alone, beside = planned("steps=4", "seeds=1"), planned("compare.steps=[4, 6]", "seeds=1")
    folder, (cell,) = tmp_path / "tiny", alone.cells
    leave(folder / cell.slug, cell.spec.identity())
    (folder / "recipe.json").write_text(json.dumps({"name": "tiny", "cells": [cell.slug]}))

    assert cell.slug not in [other.slug for other in beside.cells]
    assert cell_folders(folder, beside.cells) == [folder / cell.slug, folder / beside.cells[1].slug]
    assert open_cells(beside.cells, folder) == beside.cells[1:]
    assert lost(folder, [other.slug for other in beside.cells]) is None
    assert lost(folder, [beside.cells[1].slug]) is not None
