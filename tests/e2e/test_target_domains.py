"""A comparison with a target domain from end to end: run, killed and resumed, published, verified, run again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Kdbench, Once, filled
from kills import Strike, assert_alike, struck
from test_verify import changed, leaves

from kdbench.registry import Registry
from kdbench.verify import sums
from kdbench.verify.verification import verify

HERE = Path(__file__).parent
REGISTRY = Registry([HERE / "registry"])
OPTIONS = ["--registry", str(HERE / "registry"), "--jobs", "1", "--threads", "1", "--checkpoint-seconds", "0"]
RECIPE = str(HERE / "recipes" / "tiny_domains.yaml")


@pytest.fixture(scope="module")
def finished(once: Once, command_line: Kdbench) -> Path:
    """A run and its published copy."""

    def make(folder: Path) -> None:
        command_line("run", RECIPE, *OPTIONS, cwd=folder)
        command_line("publish", "runs/tiny_domains", cwd=folder)

    return once("domains", make)


def record_of(folder: Path, method: str) -> dict[str, Any]:
    return filled(next(folder.glob(f"{method}-seed0-*/record.json")))


@pytest.mark.slow
def test_records_and_table_say_both_domains(finished: Path) -> None:
    run, published = finished / "runs" / "tiny_domains", finished / "results" / "tiny_domains"
    plain, joint = record_of(run, "source_only"), record_of(run, "uda_kd")
    assert (plain["data"]["name"], plain["data"]["test"]) == ("digits", 599)
    assert {key: plain["target"][key] for key in ("name", "train", "test")} == {
        "name": "mnist_8",
        "train": 4000,
        "test": 1000,
    }
    assert plain["result"]["test"] != plain["result"]["source"] and plain["result"]["teacher"] is None
    assert (
        joint["result"]["teacher"]["last"] > 0 and joint["teacher"]["source_accuracy"] != joint["teacher"]["accuracy"]
    )
    assert (plain["cell"]["data"], plain["cell"]["target"]) == ("digits", "mnist_8")
    teacher = json.loads((published / "teacher" / "record.json").read_text())
    assert joint["teacher"]["source_accuracy"] == teacher["result"]["test"]["last"]
    table = (published / "table.md").read_text()
    source, teacher = (f"{joint['result'][part]['last']:.2f}" for part in ("source", "teacher"))
    assert "| method | on the source | teacher that trained with it |" in table
    assert f"| UDA + KD jointly | {source} | {teacher} |" in table
    assert "digits, 100 training" in table and "mnist\\_8, 4,000 without labels, 1,000 test images" in table


@pytest.mark.slow
def test_what_is_published_agrees_and_what_is_changed_in_it_is_told(finished: Path, tmp_path: Path) -> None:
    assert {f.level for f in verify(finished / "runs" / "tiny_domains", REGISTRY)} == {"agrees"}
    folder = Path(shutil.copytree(finished / "results" / "tiny_domains", tmp_path / "tiny_domains"))
    assert {f.level for f in verify(folder, REGISTRY)} == {"agrees"}
    file = next(folder.glob("uda_kd-seed0-*/record.json"))
    record = json.loads(file.read_text())
    watched = [
        ("target",),
        ("result", "source"),
        ("result", "teacher"),
        ("teacher",),
        ("cell", "target"),
        ("spec", "target"),
    ]
    # Said once each: where the images come from.
    alone = {("target", "origin")}
    for path in leaves(record):
        if any(path[: len(part)] == part for part in watched) and path not in alone:
            file.write_text(json.dumps(changed(record, path), indent=1))
            sums.write(folder)
            assert [f for f in verify(folder, REGISTRY) if f.level == "disagrees"], path
    assert record["spec"]["target"]["name"] == "mnist_8"


@pytest.mark.slow
def test_a_cell_with_a_teacher_of_its_own_comes_back_exactly(finished: Path, kdbench: Kdbench) -> None:
    folder = finished / "results" / "tiny_domains"
    cell = next(folder.glob("uda_kd-seed0-*")).name
    done = kdbench("verify", folder, "--registry", HERE / "registry", "--rerun", "--cell", cell)
    assert "compared exactly" in done.stdout and "everything agrees" in done.stdout


@pytest.mark.slow
def test_a_killed_run_ends_as_an_uninterrupted_one(finished: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    """Weights, logits, records and metrics of all cells, the trained teacher's accuracy among them."""
    run = ["run", RECIPE, *OPTIONS, "--runs", tmp_path]
    struck(run, Strike("step", 50))
    kdbench(*run)
    assert_alike(tmp_path / "tiny_domains", finished / "runs" / "tiny_domains")
