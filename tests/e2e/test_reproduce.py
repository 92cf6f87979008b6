"""A study is run recipe by recipe, published, resumed, and told the cost of beforehand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, Kdbench

from kdbench.cli.reproduce import plans_of
from kdbench.errors import UserError
from kdbench.registry import Registry

HERE = Path(__file__).parent
TINY = ["reproduce", "tiny_study", "--registry", HERE / "registry", "--jobs", "1"]


@pytest.mark.slow
def test_a_study_is_run_published_and_verified(kdbench: Kdbench, tmp_path: Path) -> None:
    told = kdbench(*TINY, "--cost").stdout
    assert "tiny_data" in told and "estimate for what is not finished" in told
    assert not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()
    done = kdbench(*TINY)
    assert "estimate" in done.stdout and done.stdout.count("published: ") == 2
    for name, cells in (("tiny", 2), ("tiny_data", 4)):
        folder = tmp_path / "results" / name
        assert len(json.loads((folder / "recipe.json").read_text())["cells"]) == cells
        assert {file.name for file in folder.rglob("*.safetensors")} == {"test_logits.safetensors"}
        assert "everything agrees" in kdbench("verify", folder, "--registry", HERE / "registry").stdout
    assert "published copy itself" in kdbench("publish", "results/tiny", code=2).stderr
    # The same again runs nothing, and says that nothing is left.
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("record.json")}
    again = kdbench(*TINY, "--profile", "full").stdout
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("record.json")}
    assert "estimate for what is not finished: 0 s" in again


@pytest.mark.slow
def test_a_recipe_that_fails_does_not_stop_the_study(kdbench: Kdbench, tmp_path: Path) -> None:
    (tmp_path / "cards").mkdir()
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    text = "data: {name: digits, per_class: 1}\nstudent: wrn_10_1\nprotocol: digits\nmethod: ce\nsteps: 2\n"
    good.write_text(text)
    bad.write_text(text.replace("protocol: digits", "protocol: {name: digits, optimizer: {name: sgd, lr: 1.0e30}}"))
    (tmp_path / "cards" / "s.yaml").write_text(
        "studies:\n  s:\n    title: S\n    profiles: {full: [../bad.yaml, ../good.yaml]}\n"
    )
    done = kdbench("reproduce", "s", "--registry", "cards", "--jobs", "1", code=1)
    assert "failed: bad" in done.stderr and "1 of 2 recipes: bad" in done.stderr and "Traceback" not in done.stderr
    assert [folder.name for folder in (tmp_path / "results").iterdir()] == ["good"]


@pytest.mark.slow
def test_a_studys_own_numbers_stand_beside_published_ones(kdbench: Kdbench, tmp_path: Path) -> None:
    (tmp_path / "cards").mkdir()
    for student in ("wrn_10_1", "wrn_10_2"):
        text = f"data: {{name: digits, per_class: 1}}\nstudent: {student}\nprotocol: digits\nmethod: ce\nsteps: 2\n"
        (tmp_path / f"{student}.yaml").write_text(text)
    (tmp_path / "cards" / "s.yaml").write_text(
        "studies:\n  s:\n    title: S\n    profiles: {full: [../wrn_10_1.yaml, ../wrn_10_2.yaml]}\n    published: [p]\n"
        "published:\n  p:\n    title: P\n    source: nowhere\n    data: digits\n"
        "    pairs: {a: {student: {name: wrn_10_1}}, b: {student: {name: wrn_10_2}}}\n"
        "    methods: {ce: {title: theirs, accuracies: [12.34, 56.78]}}\n"
    )
    done = kdbench("reproduce", "s", "--registry", "cards", "--jobs", "1")
    assert "written together: results/s" in done.stdout
    (row,) = [line for line in (tmp_path / "results" / "s" / "table.md").read_text().splitlines() if "theirs" in line]
    assert "12.34" in row and "56.78" in row and "†" in row


@pytest.mark.slow
def test_published_cells_that_were_computed_in_another_way_count(kdbench: Kdbench, tmp_path: Path) -> None:
    """Those that are missing are computed as they were: else nothing could be published beside them."""
    (tmp_path / "cards").mkdir()
    text = "data: {name: digits, per_class: 1}\nstudent: wrn_10_1\nprotocol: digits\nmethod: ce\nsteps: 2\n"
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(f"{text}seeds: 2\n")
    (tmp_path / "cards" / "s.yaml").write_text(
        "studies:\n  s:\n    title: S\n    profiles: {full: [../one.yaml, ../two.yaml]}\n"
    )
    way = ("compute.precision=float32", "compute.layout=channels_last", "compute.compile=false")
    kdbench("run", "one.yaml", "seeds=1", "--runs", "there", *way)
    kdbench("publish", "there/one")
    words = ("reproduce", "s", "--registry", "cards", "--jobs", "1")

    def counted(*options: str) -> dict[str, list[str]]:
        """Recipe -> its cells, and those that count as finished."""
        lines = [line.split() for line in kdbench(*words, "--cost", *options).stdout.splitlines()]
        return {line[0]: line[1:3] for line in lines if line[:1] in (["one"], ["two"])}

    assert counted()["one"] == ["2", "1"] and counted()["two"] == ["2", "0"]
    done = kdbench(*words)
    assert f"note: one is computed as its published cells were: {' '.join(way)}" in done.stderr
    assert "1 cell taken from results/one" in done.stderr and done.stdout.count("published: ") == 2
    assert "everything agrees" in kdbench("verify", "results/one").stdout
    # Unless all are to be trained here, as the recipe says. Published ones that these would not replace are kept.
    anew = ("--no-adopt", "--runs", "new")
    assert "not in this run: 2 of 2 cells published there" in kdbench(*words, *anew, code=2).stderr
    assert not (tmp_path / "new").exists()
    shutil.copytree(tmp_path / "results" / "two", tmp_path / "mine" / "two")
    assert counted(*anew, "--results", "mine") == counted("--runs", "x", "--results", "y")
    for _ in range(2):
        new = kdbench(*words, *anew, "--results", "mine")
        assert "taken from" not in new.stderr and new.stdout.count("published: mine/") == 2
    # What cannot be published does not stop the study.
    (tmp_path / "one.yaml").write_text(f"{text}seeds: [5]\n")
    done = kdbench(*words, code=1)
    assert "failed: one: it is finished, and not published: results/one: not in this run: 2 of 2 cells" in done.stderr
    assert done.stdout.count("published: ") == 1


def test_mistakes_are_told_before_anything_runs(kdbench: Kdbench, tmp_path: Path) -> None:
    assert "did you mean 'cifar'" in kdbench("reproduce", "cifra", code=2).stderr
    assert "did you mean 'small'" in kdbench("reproduce", "cifar", "--profile", "smal", code=2).stderr
    assert "not the folder of a run" in kdbench("publish", tmp_path, code=2).stderr
    (tmp_path / "results").write_text("a file")
    told = kdbench(*TINY, code=2)
    assert "results: file exists" in told.stderr and not (tmp_path / "runs").exists()
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    (run / "recipe.json").write_text('{"name": "x", "cells": ["kd-seed0-00000000"]}')
    assert "not finished: 1 of 1 cell," in kdbench("publish", run, code=2).stderr
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "s.yaml").write_text(
        "studies:\n  s:\n    title: S\n    profiles: {full: [quickstart, absent.yaml], none: []}\n"
    )
    with pytest.raises(UserError, match="at least one recipe"):
        plans_of("s", "full", Registry([tmp_path / "cards"]))


def test_the_small_profile_has_seeds_enough_and_the_teacher_that_comes_with_kdbench() -> None:
    small = plans_of("cifar", "small", Registry())
    for spec in (cell.spec for planned in small for cell in planned.cells):
        assert spec.student.name == "wrn_16_2"
        assert spec.teacher is None or spec.teacher.name == "wrn_22_4_cifar10"
    assert [len({cell.spec.seed for cell in planned.cells}) for planned in small] == [5, 3]
    full = plans_of("cifar", "full", Registry())
    assert [planned.name for planned in full][:2] == ["ab_wrn", "ab_wrn_30"] and len(full) == 7
    assert "reproduce cifar --profile $(PROFILE)" in (ROOT / "Makefile").read_text()
