"""Tuned runs: killed among its trials one chooses what it would have chosen, and no trial reads a test label."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import END_TO_END, Kdbench, Once
from kills import Strike, assert_alike, struck

from kdbench.record import Record, read_record, read_records
from kdbench.verify import sums

TUNE = (
    "tune.trials=3",
    "tune.kd.temperature=[1.0, 4.0, 16.0]",
    "tune.ab.weight={low: 1.0e+30, high: 1.0e+38, log: true}",
)
FEW = ("seeds=2", "steps=12", "evaluations=3", "compute=reference")


def words(runs: Path) -> list[str | Path]:
    tiny = (END_TO_END / "recipes" / "tiny.yaml", "--registry", END_TO_END / "registry")
    how = ("--runs", runs, "--checkpoint-seconds", "0", "--jobs", "1", "--threads", "1")
    return ["run", *tiny, *how, *TUNE, *FEW]


@pytest.fixture(scope="module")
def whole(once: Once, command_line: Kdbench) -> Path:
    """What an uninterrupted run leaves, and its table in `said`."""

    def make(folder: Path) -> None:
        done = command_line(*words(folder), cwd=folder)
        (folder / "said").write_text(done.stdout)

    return once("tuned", make)


def of_method(runs: Path, method: str) -> list[Record]:
    return [record for record in read_records([runs / "tiny"]) if record.cell.method == method]


@pytest.mark.slow
def test_the_best_setting_of_each_method_comes_into_the_table(whole: Path) -> None:
    for method, path in (("kd", "method.temperature"), ("ab", "method.weight")):
        records = of_method(whole, method)
        assert [record.cell.seed for record in records] == [0, 1]
        tuning = records[0].cell.tuning
        assert tuning is not None and records[1].cell.tuning == tuning
        assert (tuning.seeds, len(tuning.trials)) == ([100], 3)
        trials = {r.identity: r for r in read_records([whole / "tiny.trials"])}
        for tried in tuning.trials:
            accuracy = trials[tried.cells[0]].result.test.last if tried.cells[0] in trials else None
            assert tried.accuracies == [accuracy]
        best = max(tuning.trials, key=lambda one: one.mean or 0.0)
        assert tuning.chosen == best
        stages = records[0].spec["method"]["stages"]
        value = best.setting.get(path, 3.0e-3)
        given = (
            stages["classification"]["losses"]["kd"]["loss"]["options"]["temperature"]
            if method == "kd"
            else stages["boundaries"]["losses"]["boundary"]["weight"]
        )
        assert given == value
    # One weight was far too large: its loss was not finite, which is a result.
    ab = of_method(whole, "ab")[0].cell.tuning
    assert ab is not None and None in [tried.mean for tried in ab.trials]


@pytest.mark.slow
def test_table_and_page_say_what_was_tried(whole: Path) -> None:
    said = " ".join((whole / "said").read_text().split())
    assert "Tuned: 3 trials each on seed 100, by accuracy on 20 % of the training images" in said
    assert "Settings tried: temperature 1, 4 or 16 (KD); weight 1e+32 or 1e+34, or unchanged (AB" in said
    assert "tuned setting" in said and "Not tuned" not in said
    page = (whole / "tiny" / "table.html").read_text()
    section = page[page.index('id="tuning"') : page.index('id="cells"')]
    assert section.count("<tr>") == 7 and section.count("chosen</td>") == 2 and "not finite" in section


@pytest.mark.slow
@pytest.mark.long
def test_killed_among_its_trials(whole: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    """Inside a trial, between two records of trials, and inside the table's cells."""
    struck(words(tmp_path), Strike("checkpoint", 9, "run"))
    struck(words(tmp_path), Strike("record", 2))
    struck(words(tmp_path), Strike("record", 2, "SIGHUP to all"))
    kdbench(*words(tmp_path))
    (tmp_path / "said").touch()
    assert_alike(tmp_path, whole)


@pytest.mark.slow
def test_published_results_say_the_choice_so_that_nothing_is_tried_again(
    whole: Path, kdbench: Kdbench, tmp_path: Path
) -> None:
    kdbench("publish", whole / "tiny", "--out", tmp_path / "results")
    assert (
        "everything agrees"
        in kdbench("verify", tmp_path / "results" / "tiny", "--registry", END_TO_END / "registry").stdout
    )
    more = [word for word in words(tmp_path / "runs") if word != "seeds=2"]
    done = kdbench(*more, "seeds=3", "--results", tmp_path / "results")
    assert "4 cells taken from" in done.stderr
    assert not (tmp_path / "runs" / "tiny.trials").exists()
    assert len(read_records([tmp_path / "runs" / "tiny"])) == 6
    tiny = more[1:4]
    said = kdbench("check", *tiny, *TUNE, *FEW[1:], "seeds=3", "--results", tmp_path / "results", "--no-time").stdout
    assert "finished: 6 of 6 cells" in said and "are tried" not in said
    # Of a method that is new to the table its own settings are tried.
    grown = ("compare.method=[kd, ab, at]", "tune.at.beta=[1.0, 10.0, 100.0]", "--results", tmp_path / "results")
    said = kdbench("check", *tiny, *TUNE, *FEW, *grown, "--no-time").stdout
    assert "first, settings of 1 method are tried, tested on images of the training set: 3 cells" in " ".join(
        said.split()
    )
    assert "finished: 4 of 6 cells" in said
    done = kdbench(*words(tmp_path / "grown"), *grown)
    assert "accuracies of 6 of 9 trials taken from published results" in done.stderr
    assert {record.cell.method for record in read_records([tmp_path / "grown" / "tiny.trials"])} == {"at"}
    of_at = [record for record in read_records([tmp_path / "grown" / "tiny"]) if record.cell.method == "at"]
    assert len(of_at) == 2 and of_at[0].cell.tuning is not None and len(of_at[0].cell.tuning.trials) == 3
    # They have no tables, but their plan.
    own = kdbench("verify", tmp_path / "grown" / "tiny.trials", "--registry", END_TO_END / "registry", code=1)
    assert "planned with the cards of today it gives these very cells" in own.stdout
    # Of another teacher's students nothing is taken.
    for record in (tmp_path / "results" / "tiny").glob("*/record.json"):
        record.write_text(record.read_text().replace(of_at[0].teacher.sha256, 64 * "a"))  # type: ignore[union-attr]
    sums.write(tmp_path / "results" / "tiny")
    seeds = ("seeds=3", *grown[2:])
    for name, added, methods in (("anew", grown, {"kd", "ab", "at"}), ("all_known", seeds, {"kd", "ab"})):
        done = kdbench(*[word for word in words(tmp_path / name) if word != "seeds=2" or added == grown], *added)
        assert "accuracies of published trials are not taken: 'tiny_digits' had the sha256 aaaaaaaaaaaa" in done.stderr
        assert "cells of published results not taken, taught by another teacher" in done.stderr
        assert {record.cell.method for record in read_records([tmp_path / name / "tiny.trials"])} == methods
    # Nor when all is finished.
    assert "trials are not taken" in kdbench(*words(tmp_path / "all_known"), *grown[2:]).stderr
    # Another setting would have been chosen: then the cells are not those of the recipe.
    for record in (tmp_path / "results" / "tiny").glob("kd-*/record.json"):
        best = read_record(record).cell.tuning.chosen.mean  # type: ignore[union-attr]
        plain = json.loads(record.read_text())
        for tried in plain["cell"]["tuning"]["trials"]:
            tried["accuracies"] = [0.0 if tried["accuracies"] == [best] else 99.0]
        record.write_text(json.dumps(plain))
    assert "disagrees" in kdbench("verify", tmp_path / "results" / "tiny", code=1).stdout
    for command in (words(tmp_path / "again"), ["check", *tiny, *TUNE, *FEW, "--no-time"]):
        done = kdbench(*command, "--results", tmp_path / "results", code=2)
        assert "this published record cannot be used" in done.stderr and "kd-seed" in done.stderr


SEALED = '''
import dataclasses
from pathlib import Path

import torch

from kdbench.data import digits

ROOT = Path(__file__).parent


class Sealed(torch.Tensor):
    """May be counted, and not looked at."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if (ROOT / "sealed").exists() and getattr(function, "__name__", "") not in ("__len__", "__get__"):
            raise RuntimeError(f"the test set was looked at, by {function}")
        return super().__torch_function__(function, types, args, kwargs or {})


def load(roots, download, cache):
    data = digits.load(roots=roots, download=download, cache=cache)
    sealed = {name: getattr(data, name).as_subclass(Sealed) for name in ("test_labels", "test_images")}
    return dataclasses.replace(data, **sealed)
'''
CARDS = """
datasets:
  sealed:
    title: digits whose test set may be sealed
    target: sealed_digits:load
    classes: 10
    channels: 1
    image_size: 8
    train: 1198
    test: 599
    normalization: {mean: [0.30506], std: [0.37582]}
teachers:
  sealed_teacher: {model: wrn_10_1, data: sealed, recipe: ../teacher.yaml}
"""
RECIPE = """
data: {name: sealed, per_class: 10}
teacher: sealed_teacher
student: wrn_10_1
protocol: digits
compute: reference
steps: 8
evaluations: 2
keep: best
compare: {method: [ce, kd]}
"""


@pytest.mark.slow
def test_no_trial_looks_at_the_test_set(kdbench: Kdbench, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    registry.mkdir()
    (registry / "sealed_digits.py").write_text(SEALED)
    (registry / "cards.yaml").write_text(CARDS)
    teacher = (
        "{data: sealed, student: wrn_10_1, protocol: digits, compute: reference, method: ce, steps: 8, evaluations: 1}"
    )
    (tmp_path / "teacher.yaml").write_text(teacher)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    call = ("run", "mine.yaml", "--registry", registry, "--jobs", "1", "--threads", "1")
    tune = ("tune.trials=2", "tune.kd.temperature=[1.0, 4.0]")
    # The teacher is trained, and tested, before.
    kdbench(*call, "seeds=[7]")
    (registry / "sealed").touch()
    done = kdbench(*call, *tune, code=1)
    assert "the test set was looked at" in done.stderr
    assert len(list((tmp_path / "runs" / "mine.trials").glob("*/record.json"))) == 2
    assert not list((tmp_path / "runs" / "mine").glob("*seed0*/record.json"))
    tried = {r.identity: r.result.test.last for r in read_records([tmp_path / "runs" / "mine.trials"])}
    (registry / "sealed").unlink()
    kdbench(*call, *tune)
    (record,) = [r for r in read_records([tmp_path / "runs" / "mine"]) if r.cell.method == "kd" and r.cell.seed == 0]
    assert record.cell.tuning is not None
    assert {one.cells[0]: one.mean for one in record.cell.tuning.trials} == tried
