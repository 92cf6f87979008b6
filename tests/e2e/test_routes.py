"""A teacher that keeps its route and students that learn from it, by the command: killed, resumed, tabled, verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Kdbench, Once, filled
from kills import Strike, assert_alike, struck

TEACHER = "data: digits\nstudent: wrn_10_1\nprotocol: digits\nmethod: ce\nsteps: 30\nevaluations: 2\nroute: 5\n"
RECIPE = """\
data: {name: digits, per_class: 10, validation: 100}
teacher: routed
student: wrn_10_1
protocol: digits
steps: 16
evaluations: 2
compute: reference
compare:
  method: [kd, rco, rco_one_stage, rco_greedy, rco_long]
"""
CARDS = "teachers:\n  routed: {model: wrn_10_1, data: digits, recipe: teacher.yaml}\n"


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cards")
    (folder / "cards").mkdir()
    (folder / "cards" / "cards.yaml").write_text(CARDS)
    (folder / "teacher.yaml").write_text(TEACHER)
    (folder / "cards" / "cards.yaml").write_text(CARDS.replace("teacher.yaml", "../teacher.yaml"))
    (folder / "routes.yaml").write_text(RECIPE)
    return folder


def words(cards: Path, runs: Path) -> list[str]:
    where = ["--registry", str(cards / "cards"), "--runs", str(runs)]
    return ["run", str(cards / "routes.yaml"), *where, "--jobs", "1", "--threads", "1", "--checkpoint-seconds", "0"]


@pytest.fixture(scope="module")
def whole(cards: Path, once: Once, command_line: Kdbench) -> Path:
    return once("routes", lambda folder: command_line(*words(cards, folder), cwd=folder))


def records(runs: Path) -> dict[str, Any]:
    found = [filled(f) for f in (runs / "routes").rglob("record.json")]
    return {record["cell"]["method"]: record for record in found}


@pytest.mark.slow
def test_budgets_show_in_the_table(whole: Path) -> None:
    by_method = records(whole)
    steps = {name: record["budget"]["steps"] for name, record in by_method.items()}
    assert steps == {"kd": 16, "rco": 16, "rco_one_stage": 16, "rco_greedy": 16, "rco_long": 64}
    table = (whole / "routes" / "table.md").read_text()
    rows = [line.split(" | ")[1] for line in table.splitlines() if line.startswith("| RCO")]
    # Four methods and their costs: 48 steps of two batches an epoch come on top for the last one alone.
    assert "extra epochs" in table and rows[4:] == ["0", "0", "0", "+24"]
    assert "epochs beyond the protocol's budget" in table


@pytest.mark.slow
def test_records_say_which_checkpoints_were_used(whole: Path) -> None:
    by_method = records(whole)
    teacher = json.loads(next((whole / "teachers").rglob("record.json")).read_text())
    assert [entry["step"] for entry in teacher["route"]] == [6, 12, 18, 24, 30]
    assert teacher["route"][-1]["sha256"] == by_method["kd"]["teacher"]["sha256"], "the last is the converged teacher"
    assert not by_method["kd"]["anchors"]
    for name in ("rco", "rco_one_stage", "rco_long"):
        assert [anchor["step"] for anchor in by_method[name]["anchors"]] == [6, 18, 24, 30]
    for record in by_method.values():
        for anchor in record.get("anchors", []):
            assert anchor["sha256"] == teacher["route"][anchor["checkpoint"]]["sha256"]


@pytest.mark.slow
def test_anchors_reproduce_from_the_record(whole: Path, cards: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    kdbench("publish", whole / "routes", "--out", tmp_path / "results")
    published = tmp_path / "results" / "routes"
    assert not list(published.rglob("student*.safetensors"))
    name = next(folder.name for folder in published.iterdir() if folder.name.startswith("rco_greedy"))
    again = ("--rerun", "--cell", name, "--device", "cpu")
    done = kdbench("verify", published, "--registry", cards / "cards", *again)
    assert "everything agrees" in done.stdout
    # The greedy choice follows from the divergences that stand beside it.
    file = published / name / "record.json"
    record = json.loads(file.read_text())
    record["anchors"][1]["divergences"] = [1.0, 3.0, 3.0, 3.0, 3.0]
    record["anchors"][1]["checkpoint"] = 3
    file.write_text(json.dumps(record))
    wrong = kdbench("verify", published, "--registry", cards / "cards", code=None)
    assert wrong.returncode != 0 and "the anchor of route_2 is" in wrong.stdout + wrong.stderr


@pytest.mark.slow
def test_a_published_teacher_teaches_what_is_added(whole: Path, cards: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    """Trained again on another machine it would be another one, and published cells could not stand beside new ones."""
    kdbench("publish", whole / "routes", "--teachers")
    made = tmp_path / "results" / "routes"
    weights = {file.name: file.read_bytes() for file in (made / "teacher").rglob("*.safetensors")}
    assert len(weights) == 1 + 1 + 5, "its logits, its last weights, its route"
    more = [*words(cards, tmp_path / "runs"), "seeds=2", "compare.method=[kd, rco]"]
    assert "teachers are trained" in kdbench("check", *more[1:4], "seeds=2", "--results", "none").stdout
    assert "teachers are trained" not in kdbench("check", *more[1:4], "seeds=2").stdout
    said = kdbench(*more).stderr
    assert "teacher routed: taken with its weights from results/routes/teacher" in said
    assert "teacher routed: 1 cell" not in said and "2 cells taken from results/routes" in said
    cells = [filled(file) for file in (tmp_path / "runs" / "routes").glob("*-seed*/record.json")]
    assert len(cells) == 4 and len({record["teacher"]["sha256"] for record in cells}) == 1
    kdbench("publish", tmp_path / "runs" / "routes", "--replace")
    # Weights that are published stay, also in place of a run that trained nothing.
    said = kdbench("run", *more[1:4], "--runs", "third", "seeds=2", "compare.method=[kd, rco]").stderr
    assert "4 cells taken" in said and not (tmp_path / "third" / "teachers").exists()
    kdbench("publish", tmp_path / "third" / "routes")
    # And where the run has a record of the teacher alone, as one of an earlier version does.
    (tmp_path / "third" / "routes" / "teacher" / "student.safetensors").unlink()
    shutil.rmtree(tmp_path / "third" / "routes" / "teacher" / "route")
    kdbench("publish", tmp_path / "third" / "routes")
    assert {file.name: file.read_bytes() for file in (made / "teacher").rglob("*.safetensors")} == weights
    assert "everything agrees" in kdbench("verify", made, "--registry", cards / "cards").stdout
    file = made / "teacher" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    wrong = "teacher/student.safetensors has changed"
    assert wrong in kdbench("verify", made, "--registry", cards / "cards", code=1).stdout
    assert wrong in kdbench(*words(cards, tmp_path / "fourth"), "seeds=3", "compare.method=[kd]", code=2).stderr
    for file in tmp_path.rglob("student.safetensors"):
        file.unlink()
    assert "no weights" in kdbench("publish", tmp_path / "runs" / "routes", "--teachers", code=2).stderr


@pytest.mark.slow
@pytest.mark.long
def test_killed_anywhere_it_ends_alike(whole: Path, cards: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    """In the teacher's training, between two points of its route, and in the students', between two anchors."""
    struck(words(cards, tmp_path), Strike("step", 20, "SIGTERM to all"))
    struck(words(cards, tmp_path), Strike("step", 60))
    kdbench(*words(cards, tmp_path))
    assert_alike(tmp_path, whole)


@pytest.mark.slow
def test_a_route_that_is_gone_is_told(whole: Path, cards: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(whole / "teachers", tmp_path / "runs" / "teachers")
    next((tmp_path / "runs" / "teachers").rglob("00000018.safetensors")).unlink()
    done = kdbench(*words(cards, tmp_path / "runs"), "compare.method=[kd, rco]", code=1)
    assert "checkpoint at step 18 is gone" in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_check_tells_the_storage(cards: Path, kdbench: Kdbench) -> None:
    done = kdbench("check", cards / "routes.yaml", "--registry", cards / "cards", "--no-time")
    # 77,562 parameters of four bytes, five times.
    assert "route: 5 checkpoints of wrn_10_1 are kept, 2 MB for each training" in done.stdout
