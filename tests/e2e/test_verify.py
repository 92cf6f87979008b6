"""A results folder is verified; whatever is changed in it is told; a cell run again gives its number."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, Kdbench
from safetensors.torch import load_file, save_file

from kdbench.files import sha256_of
from kdbench.record import read_records
from kdbench.registry import Registry
from kdbench.results.tables import build
from kdbench.results.writing import write_files
from kdbench.verify import sums
from kdbench.verify.findings import Finding
from kdbench.verify.verification import verify

HERE = Path(__file__).parent
REGISTRY = Registry([HERE / "registry"])

# What stands in one place only, so that no other entry can contradict it. The sums are there for these.
ALONE = {
    "kdbench",
    "compute.python",
    "compute.platform",
    "compute.torchvision",
    "compute.cpu_capability",
    "compute.cohort",
    "compute.peak_memory_bytes",
    "compute.evaluation",
    "compute.seconds",  # told where it falls below the training's own
    "git.dirty",
    "data.origin",  # of another form it would be told, as the others' is
    "result.balanced_accuracy",  # of a teacher, by one in its last digit
    "result.calibration_error",  # of a teacher, by less than rounding of its logits leaves open
    "files.student.safetensors",  # of published records the file itself is not there
}


@pytest.fixture
def finished(tiny_run: Path) -> Path:
    """A published run of two methods and two seeds."""
    return tiny_run / "results" / "tiny"


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "tiny"))


def disagreements(folder: Path) -> list[Finding]:
    return [finding for finding in verify(folder, REGISTRY) if finding.level == "disagrees"]


def test_a_run_that_is_not_finished_is_published_where_that_is_said_and_grows(
    tiny_run: Path, kdbench: Kdbench, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(tiny_run / "runs" / "tiny", tmp_path / "runs" / "tiny"))
    (gone,) = run.glob("ab-seed1-*")
    shutil.rmtree(gone)
    said = kdbench("publish", run, code=2).stderr
    assert f"not finished: 1 of 4 cells, {gone.name} for one" in said and "--unfinished" in said
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    kdbench("publish", run, "--unfinished")
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    made = tmp_path / "results" / "tiny"
    assert f"Not finished and not in the table: {gone.name}" in (made / "table.md").read_text().replace("\\", "")
    assert not disagreements(made)
    assert [f.where for f in verify(made, REGISTRY) if f.level == "remark"] == [gone.name]
    shutil.rmtree(run)
    gone.mkdir(parents=True)
    (gone / "error.txt").write_text("why it failed before")
    grown = kdbench("run", *TINY, "seeds=2", "steps=12", "evaluations=3", "--jobs", "1", "--threads", "1")
    assert "3 cells taken from results/tiny" in grown.stderr and (gone / "record.json").is_file()
    assert not (gone / "error.txt").exists()
    # What was published and is gone is no remark.
    (lost,) = made.glob("ab-seed0-*")
    shutil.rmtree(lost)
    assert (lost.name, "planned, and has no sound record") in [(f.where, f.what) for f in disagreements(made)]
    # Nor does it become one by another call, which changes nothing.
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert "this is the published copy itself" in kdbench("publish", made, "--unfinished", code=2).stderr
    for wrong in (run.parent, tmp_path / "absent", made / "table.md"):
        assert "this is not the folder of a run" in kdbench("publish", wrong, "--unfinished", code=2).stderr
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    shutil.rmtree(made)
    for cell in run.glob("*-seed*"):
        (cell / "record.json").unlink()
    assert "not finished: 4 of 4 cells" in kdbench("publish", run, code=2).stderr
    none = kdbench("publish", run, "--unfinished", code=2).stderr
    assert "not finished: 4 of 4 cells" in none and "without them" not in none


def test_a_table_of_an_earlier_plan_is_not_published(tiny_run: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    """A run of fewer cells, all finished before, that was killed before it wrote its own."""
    run = Path(shutil.copytree(tiny_run / "runs" / "tiny", tmp_path / "runs" / "tiny"))
    kdbench("table", run, "--out", run, "--latex", "wide", "--label", "tab:mine")
    kdbench("publish", run)
    made = tmp_path / "results" / "tiny"
    assert (made / "table.tex").read_bytes() == (run / "table.tex").read_bytes() and not disagreements(made)
    about = json.loads((run / "recipe.json").read_text())
    about["cells"] = [cell for cell in about["cells"] if cell.startswith("kd-seed0-")]
    about["recipe"] |= {"seeds": 1, "compare": {"method": ["kd"]}}
    (run / "recipe.json").write_text(json.dumps(about))
    (run / "own.png").touch()
    kdbench("publish", run, "--replace")
    assert not disagreements(made)
    assert {row["n"] for row in csv.DictReader((made / "table.csv").read_text().splitlines())} == {"1"}
    # A plot of what only the others measured goes too, and one of the user's own stays.
    assert (run / "agreement.png").is_file()
    assert {file.name for file in made.glob("*.png")} == {"own.png", "learning_curves.png", "final_accuracies.png"}


def test_test_logits_may_stay_behind_and_that_is_said(tiny_run: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    run, made = tiny_run / "runs" / "tiny", tmp_path / "results" / "tiny"
    kdbench("publish", run, "--no-logits")
    assert not list(made.glob("*/test_logits*")) and len(list(made.glob("*/record.json"))) == 5
    said = "none beside 5 of 5 records"
    assert {f.what for f in verify(made, REGISTRY) if f.level not in ("agrees", "remark")} == {said}
    (some,) = run.glob("ab-seed0-*/test_logits.safetensors")
    shutil.copy(some, made / some.parent.name)
    sums.write(made)
    found = verify(made, REGISTRY)
    assert {f.what for f in found if f.level == "unchecked"} == {
        said.replace("5 of 5", "4 of 5")
    } and not disagreements(made)
    counted = ", ".join(
        f"{number} of 1 record" for number in ("test.last", "test.loss", "balanced_accuracy", "calibration_error")
    )
    said = f"follow from them: {counted}; not fidelity of 1, "
    assert any(f.what.startswith(said) for f in found)


@pytest.mark.parametrize("other", ["data", "part"])
def test_logits_that_could_not_be_compared_are_not_said_to_agree(folder: Path, other: str) -> None:
    for file in folder.glob("*/record.json"):
        plain = json.loads(file.read_text())
        if other == "data":
            plain["data"]["fingerprint"] = "0" * 64
        else:
            plain["spec"]["data"] |= {"tested_on": "validation", "validation": 10}
        file.write_text(json.dumps(plain))
        logits = file.with_name("test_logits.safetensors")
        save_file({"logits": torch.zeros(3, 2)}, logits)
    found = [finding for finding in verify(folder, REGISTRY) if finding.where == "test_logits.safetensors"]
    assert [(f.level, f.what) for f in found] == [
        ("unchecked", "5 of 5 are not of the test images that are here: not counted again")
    ]


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all numbers, words and truth values; in a list of words the first and the last of them."""
    if isinstance(data, dict | list):
        pairs = [*(data.items() if isinstance(data, dict) else enumerate(data))]
        words = isinstance(data, list) and all(isinstance(value, str) for value in data)
        for key, value in (pairs[0], pairs[-1]) if words and pairs else pairs:
            yield from leaves(value, (*path, key))
    elif data is not None:
        yield path


def changed(data: Any, path: tuple[Any, ...]) -> Any:
    """The data with one digit, letter or truth value changed."""
    copy = json.loads(json.dumps(data))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    value = inner[path[-1]]
    if isinstance(value, bool):
        inner[path[-1]] = not value
    elif isinstance(value, str):
        inner[path[-1]] = value[:-1] + ("1" if value[-1:] != "1" else "2")
    else:
        text = repr(value)
        digits = [i for i, c in enumerate(text) if c.isdigit() and "e" not in text[:i]]
        # Of a float's last digit, two neighbours can be one and the same number: then the digit before it.
        others = (type(value)(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]) for at in reversed(digits))
        inner[path[-1]] = next(other for other in others if other != value)
    return copy


@pytest.mark.parametrize("value", [0.7336739618113522, 0.9913927380188265, 0.5, 1e-07, 9, "a", "1", True])
def test_a_changed_value_is_another_one(value: Any) -> None:
    assert changed({"a": [value]}, ("a", 0)) != {"a": [value]}


@pytest.mark.slow
def test_a_run_and_its_published_copy_are_sound(finished: Path) -> None:
    for folder in (finished, finished.parent.parent / "runs" / "tiny"):
        findings = verify(folder, REGISTRY)
        assert {finding.level for finding in findings} == {"agrees"}, findings
    names = {file.relative_to(finished).as_posix() for file in finished.rglob("*") if file.is_file()}
    assert {"recipe.json", "table.md", "table.csv", "table.tex", "records.csv", "SHA256SUMS"} <= names
    assert {"teacher/record.json", "teacher/metrics.jsonl"} <= names
    assert not [name for name in names if "student" in name or "events" in name or "lock" in name]
    assert "teacher/test_logits.safetensors" in names
    assert any("follow from them: test.last of 5 records" in finding.what for finding in verify(finished, REGISTRY))
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=finished, capture_output=True)
    assert done.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["ab-seed1-*", "teacher"])
def test_every_entry_of_a_record_is_watched(folder: Path, cell: str) -> None:
    file = next(folder.glob(f"{cell}/record.json"))
    record = json.loads(file.read_text())
    unseen = set()
    for path in leaves(record):
        name = ".".join(map(str, path))
        file.write_text(json.dumps(changed(record, path), indent=1))
        assert sums.changed(folder), name
        # Somebody makes the sums fit again: now the other entries have to tell.
        sums.write(folder)
        if not disagreements(folder):
            unseen.add(name)
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        sums.write(folder)
    assert not disagreements(folder)
    if cell == "teacher":
        # It is in no comparison: its names and its machine stand in one place. Its numbers do not.
        unseen = {name for name in unseen if name.split(".")[0] in ("result", "budget", "data", "identity", "schema")}
    assert unseen <= ALONE


@pytest.mark.slow
def test_every_entry_of_the_last_evaluation_and_of_the_recipe_is_watched(folder: Path) -> None:
    file = next(folder.glob("kd-seed0-*/metrics.jsonl"))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    last = lines[-1]
    other = [changed(last, (key,)) for key in ("step", "epoch", "stage")]
    other.append(last | {"seconds": last["seconds"] + 0.02})
    for spoilt in [*other, last | {"test": last["test"] | {"accuracy": last["test"]["accuracy"] + 0.01}}]:
        file.write_text("".join(json.dumps(line) + "\n" for line in [*lines[:-1], spoilt]))
        sums.write(folder)
        assert disagreements(folder), spoilt
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sums.write(folder)
    assert not disagreements(folder)
    recipe = folder / "recipe.json"
    run = json.loads(recipe.read_text())
    for path in leaves(run):
        recipe.write_text(json.dumps(changed(run, path), indent=1))
        sums.write(folder)
        told = verify(folder, REGISTRY)
        # A word that names no card any more cannot be planned: said as a remark.
        assert any(finding.level != "agrees" for finding in told), path
    assert run["recipe"]["steps"] == 12


@pytest.mark.slow
def test_a_changed_table_is_told(folder: Path, kdbench: Kdbench) -> None:
    names = ["table.md", "table.csv", "table.tex", "records.csv"]
    for name in names:
        text = (folder / name).read_text()
        at = max(i for i, c in enumerate(text) if c.isdigit())
        (folder / name).write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
    assert sorted(finding.where for finding in disagreements(folder)) == sorted(["SHA256SUMS"] * 4 + names)
    sums.write(folder)
    assert sorted(finding.where for finding in disagreements(folder)) == sorted(names)
    # As of a table that another version wrote.
    (hint,) = [finding.what for finding in verify(folder, REGISTRY) if finding.level == "remark"]
    kdbench(*shlex.split(hint.split("'")[1])[1:])
    assert not disagreements(folder)


@pytest.mark.slow
def test_a_table_written_in_another_form_of_latex_agrees(folder: Path) -> None:
    records = read_records([folder])
    for form, label in (("wide", None), ("column", "tab:mine"), ("page", "t.1")):
        sums.renew(folder, write_files(build(records), folder, records, form, label))
        assert not disagreements(folder)


@pytest.mark.parametrize("number", ["balanced_accuracy", "calibration_error", "fidelity"])
def test_a_number_that_was_changed_wherever_it_stands_is_told_by_the_logits(folder: Path, number: str) -> None:
    assert not disagreements(folder)
    file = next(folder.glob("kd-seed0-*/record.json"))
    plain = json.loads(file.read_text())
    plain["result"][number] -= 1.5 if plain["result"][number] > 50 else -1.5
    file.write_text(json.dumps(plain))
    records = read_records([folder])
    sums.renew(folder, write_files(build(records), folder, records, None, None))
    sums.write(folder)
    (found,) = disagreements(folder)
    assert found.where == file.parent.name and f"{number} is" in found.what


def test_a_test_loss_that_was_changed_is_told_by_the_logits(folder: Path) -> None:
    file = next(folder.glob("kd-seed0-*/metrics.jsonl"))
    *before, last = file.read_text().splitlines()
    entry = json.loads(last)
    entry["test"]["loss"] *= 1.01
    file.write_text("\n".join([*before, json.dumps(entry), ""]))
    sums.write(folder)
    (found,) = disagreements(folder)
    assert found.where == file.parent.name and "test.loss is" in found.what


@pytest.mark.slow
def test_test_logits_that_say_another_accuracy_are_told(folder: Path) -> None:
    file = next(folder.glob("kd-seed0-*/test_logits.safetensors"))
    record = file.with_name("record.json")
    logits = load_file(file)["logits"]
    assert logits.dtype == torch.float16
    wrong = logits.roll(1, dims=1).contiguous()
    save_file({"logits": wrong}, file)
    assert [f.where for f in disagreements(folder)].count(file.parent.name) == 6, "another file, other numbers"
    # Somebody makes the sha256 and the sums fit again.
    plain = json.loads(record.read_text())
    plain["files"][file.name] = sha256_of(file)
    record.write_text(json.dumps(plain))
    sums.write(folder)
    assert [f.what for f in disagreements(folder) if "the test logits say" in f.what]
    for damaged in (b"nothing", b""):
        file.write_bytes(damaged)
        assert any("cannot be read" in f.what for f in disagreements(folder))
    save_file({"logits": logits[:7].contiguous()}, file)
    assert any("no logits for the" in f.what for f in disagreements(folder))


@pytest.mark.slow
def test_cells_that_are_missing_or_too_many_are_told(folder: Path, kdbench: Kdbench) -> None:
    cell = next(folder.glob("kd-seed0-*"))
    shutil.copytree(cell, folder / "kd-seed7-00000000")
    found = verify(folder, REGISTRY)
    assert any(f.where == "kd-seed7-00000000" and "not among the cells" in f.what for f in found)
    assert {f.where for f in found if f.level == "disagrees"} == {"SHA256SUMS"}
    shutil.rmtree(cell)
    done = kdbench("verify", folder, "--registry", HERE / "registry", code=1)
    assert cell.name in done.stdout and "no sound record" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_cell_run_again_gives_the_recorded_number(folder: Path, kdbench: Kdbench) -> None:
    again = [*TINY[1:], "--rerun"]
    cell = next(folder.glob("ab-seed1-*"))
    done = kdbench("verify", folder, *again, "--cell", cell.name)
    assert "compared exactly" in done.stdout and "everything agrees" in done.stdout
    file = cell / "record.json"
    record = json.loads(file.read_text())
    # On another kind of processor only a tolerance can be asked for.
    record["compute"]["device_name"] = "Another"
    file.write_text(json.dumps(record))
    done = kdbench("verify", folder, *again, "--cell", cell.name, code=1)
    assert "equal bits cannot be expected (device_name: Another → " in done.stdout
    assert "compared within" in done.stdout
    # A number that never came out is told, although its sums, its metrics and its table would fit.
    record["compute"]["device_name"] = json.loads(next(folder.glob("ab-seed0-*/record.json")).read_text())["compute"][
        "device_name"
    ]
    record["result"]["test"]["last"] -= 0.5
    file.write_text(json.dumps(record))
    assert "not equal: the result" in kdbench("verify", folder, *again, "--cell", cell.name, code=1).stdout


def test_what_cannot_be_verified_is_a_mistake_of_the_user(kdbench: Kdbench, tmp_path: Path) -> None:
    assert "there is no recipe.json" in kdbench("verify", tmp_path, code=2).stderr
    (tmp_path / "recipe.json").write_text('{"cells": []}')
    assert "add --rerun" in kdbench("verify", tmp_path, "--cell", "x", code=2).stderr
    done = kdbench("verify", ROOT / "results" / "quickstart", "--rerun", "--cell", "kd-sed0", code=2)
    assert "there is no cell 'kd-sed0'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "folder", sorted(file.parent for file in (ROOT / "results").glob("*/recipe.json")), ids=lambda folder: folder.name
)
def test_the_committed_results_are_sound_and_summed_up(folder: Path) -> None:
    findings = verify(folder, Registry())
    assert not [finding for finding in findings if finding.level == "disagrees"], findings
    assert any(finding.where == "SHA256SUMS" and finding.level == "agrees" for finding in findings)
