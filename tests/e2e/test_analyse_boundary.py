"""`kdbench analyse boundary` and `attack` on the cells of a finished run, as a user types it."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Kdbench, Once, filled

from kdbench.engine.analysis import Analysis
from kdbench.engine.options import Options
from kdbench.methods.bss import analysis

REGISTRY = TINY[1:]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(once: Once, command_line: Kdbench) -> Path:
    """Two seeds of a plain student, of KD and of BSS, behind a teacher that was trained in the same runs."""
    words = ("run", *TINY, "compare.method=[ce, kd, bss]", "seeds=2", "steps=30", "evaluations=1", "--jobs", "1")
    return once("boundary", lambda folder: command_line(*words, cwd=folder)) / "runs" / "tiny"


def test_boundaries_of_finished_cells(finished: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    arguments = [finished, "images=30", "targets=3", "picture=true", "--out", tmp_path / "out", *REGISTRY]
    done = kdbench("analyse", "boundary", *arguments)
    with (tmp_path / "out" / "boundary.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [(line["method"], line["seed"]) for line in lines] == [
        (method, seed) for method in ("ce", "kd", "bss") for seed in ("0", "1")
    ], "the plain student too, against the others' teacher"
    for line in lines:
        assert 0 < int(line["images"]) <= 30 and 0 < int(line["pairs"]) <= 3 * int(line["images"])
        assert 0 < float(line["magnitude"]) < 1 and -1 < float(line["angle"]) < 1
        assert float(line["teacher_arrived"]) > 0.5
    for word in ("magnitude", "angle", "BSS", "±", "in all rows: recipe tiny, seeds 2", "boundary_samples.png"):
        assert word in done.stdout, word
    assert (tmp_path / "out" / "boundary_samples.png").stat().st_size > 10_000
    files = ("boundary.csv", "boundary.json", "boundary_samples.png")
    first = [(tmp_path / "out" / name).read_bytes() for name in files]
    about = json.loads(first[1])
    assert str(tmp_path) not in first[1].decode() and str(finished) not in first[1].decode()
    assert about["command"].startswith("kdbench analyse boundary") and "targets=3" in about["command"]
    assert about["csv"]["sha256"] == hashlib.sha256(first[0]).hexdigest()
    records = {file.parent.name: filled(file) for file in finished.glob("*/record.json")}
    networks = {one["name"]: one["sha256"] for one in about["networks"]}
    teacher = records[next(name for name in records if name.startswith("kd"))]["teacher"]
    assert networks.pop(teacher["name"]) == teacher["sha256"]
    assert networks.keys() == {f"tiny/{name}" for name in records}
    for name, digest in networks.items():
        weights = finished / name.partition("/")[2] / "student.safetensors"
        assert digest == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert {one["fingerprint"] for one in about["data"]} == {
        record["data"]["fingerprint"] for record in records.values()
    }
    kdbench("analyse", "boundary", *arguments)
    assert [(tmp_path / "out" / name).read_bytes() for name in files] == first


def test_the_picture_is_of_a_cell_with_boundary_samples_and_of_several_classes(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(analysis, "boundary_picture", lambda crossings, file: drawn.append((crossings, file)))
    options = Options(runs=finished.parent, registries=(Path(TINY[2]),), device="cpu")

    def drawn_of(*folders: Path) -> Any:
        given = Analysis("boundary", folders, options, tmp_path, print)
        assert list(analysis.boundary(given, images=30, targets=1, picture=True))
        ((crossings, file),) = drawn
        assert file == tmp_path / "boundary_samples.png" and given.pictures == [file]
        drawn.clear()
        return crossings

    shown = drawn_of(finished)
    assert len({crossing.base for crossing in shown}) == len(shown) == 4
    assert all(list(crossing.scores) == ["teacher", "BSS, seed 0"] for crossing in shown)
    plain = drawn_of(*sorted(finished.glob("ce-*")), *finished.glob("kd-*"))
    assert all(list(crossing.scores) == ["teacher", "student, seed 0"] for crossing in plain), "else the first"


def test_the_record_counts_boundary_samples(finished: Path) -> None:
    record = filled(next(finished.glob("bss-seed0*/record.json")))
    counts = record["sources"]["classification"]
    assert 0 < counts["steps"] < record["budget"]["steps"], "none once their weight is nothing"
    assert counts["attacked"] >= counts["crossed"] >= counts["arrived"]
    assert counts["attacked"] - counts["arrived"] == counts["rejected"]


def test_where_the_attacks_on_a_teacher_end(finished: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    (teacher,) = {filled(file)["teacher"]["name"] for file in finished.glob("kd-*/record.json")}
    arguments = [f"teachers={teacher}", "images=40", "targets=2", "--runs", finished.parent, *REGISTRY]
    done = kdbench("analyse", "attack", *arguments)
    with (tmp_path / "attack.csv").open(encoding="utf-8") as file:
        newton, released = csv.DictReader(file)
    assert (newton["step"], newton["rate"], newton["clamp"]) == ("newton", "1", "-2.5 2.5")
    assert (released["step"], released["rate"]) == ("released", "0.3")
    for line in (newton, released):
        assert line["teacher"] == teacher and 0 < int(line["images"]) <= 40
        assert int(line["pairs"]) == 2 * int(line["images"])
        assert 0 <= float(line["arrived"]) <= float(line["crossed"]) <= 1 and float(line["length"]) > 0
    assert float(newton["margin"]) < float(newton["margin_before"])
    assert "released" in done.stdout and "attack.csv, attack.json" in done.stdout
    about = json.loads((tmp_path / "attack.json").read_bytes())
    assert [one["name"] for one in about["networks"]] == [teacher] and len(about["data"]) == 1
    first = (tmp_path / "attack.csv").read_bytes()
    kdbench("analyse", "attack", *arguments)
    assert (tmp_path / "attack.csv").read_bytes() == first
    (tmp_path / "in the way").touch()
    done = kdbench("analyse", "attack", *arguments, "--out", tmp_path / "in the way", code=2)
    assert "released" in done.stdout and "in the way" in done.stderr, "what took long is shown all the same"
    done = kdbench("analyse", "attack", "teachers=[wrn_16_3_digits]", code=2)
    assert "unknown teacher" in done.stderr and "Traceback" not in done.stderr


def test_what_cannot_be_compared_is_told(finished: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    plain = next(finished.glob("ce-seed0*"))
    assert "there is nothing to analyse" in kdbench("analyse", "boundary", code=2).stderr
    assert "images are too few" in kdbench("analyse", "boundary", finished, "images=0", *REGISTRY, code=2).stderr
    done = kdbench("analyse", "boundary", plain, *REGISTRY, code=2)
    assert "no cell has a teacher to compare with" in done.stderr and "Traceback" not in done.stderr
    copied = tmp_path / "runs" / "tiny" / "kd"
    copied.mkdir(parents=True)
    (copied / "record.json").write_bytes(next(finished.glob("kd-seed0*/record.json")).read_bytes())
    done = kdbench("analyse", "boundary", copied, *REGISTRY, code=2)
    assert "is not there" in done.stderr and "--runs" in done.stderr
    done = kdbench("analyse", "boundary", copied, "--runs", finished.parent, *REGISTRY, code=2)
    assert "no weights of this cell's student" in done.stderr
    assert "unknown device" in kdbench("analyse", "boundary", copied, "--device", "abacus", code=2).stderr
