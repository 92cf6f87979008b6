"""Teachers that learn from a teacher of their own, and such that begin untrained and train along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import TINY, Kdbench
from kills import Strike, assert_alike, struck

FEW = ["steps=12", "evaluations=2"]
ONE = ["--jobs", "1", "--threads", "1", "--checkpoint-seconds", "0"]


@pytest.mark.slow
def test_a_chain_of_teachers_each_trained_by_the_one_before(kdbench: Kdbench, tmp_path: Path) -> None:
    """As Mirzadeh et al. (AAAI 2020) have it: a network between teacher and student."""
    cards = tmp_path / "cards"
    cards.mkdir()
    (cards / "teachers.yaml").write_text(
        f"teachers:\n"
        f"  large: {{model: wrn_10_1, data: digits, recipe: {TINY[0].parent / 'tiny_teacher.yaml'}}}\n"
        f"  assistant: {{model: wrn_10_1, data: digits, recipe: {tmp_path / 'assistant.yaml'}}}\n"
    )
    (tmp_path / "assistant.yaml").write_text(
        "data: {name: digits, per_class: 10}\nteacher: large\nstudent: wrn_10_1\nprotocol: digits\nmethod: kd\n"
        "steps: 10\nevaluations: 1\n"
    )
    kdbench("run", TINY[0], "teacher=assistant", "compare.method=[kd]", *FEW, "--registry", cards, *ONE, cwd=tmp_path)
    (record,) = [json.loads(file.read_text()) for file in (tmp_path / "runs" / "tiny").glob("*/record.json")]
    teachers = {
        file.parent.name.rpartition("-")[0]: json.loads(file.read_text())
        for file in tmp_path.glob("runs/teachers/*/record.json")
    }
    assert teachers.keys() == {"large", "assistant"}
    assert record["teacher"]["sha256"] == teachers["assistant"]["files"]["student.safetensors"]
    assert teachers["assistant"]["teacher"]["sha256"] == teachers["large"]["files"]["student.safetensors"]


@pytest.mark.slow
def test_two_networks_that_begin_untrained_teach_each_other(kdbench: Kdbench, tmp_path: Path) -> None:
    recipe = tmp_path / "mutual.yaml"
    recipe.write_text(
        "data: {name: digits, per_class: 10}\nteacher: {model: wrn_10_2, untrained: true}\nstudent: wrn_10_1\n"
        "protocol: digits\nseeds: 2\nsteps: 12\nevaluations: 2\ncompare: {method: [ce, dml]}\n"
    )
    whole, killed = (["run", recipe, "--runs", tmp_path / name, *ONE] for name in ("whole", "killed"))
    kdbench(*whole)
    struck(killed, Strike("checkpoint", 5))
    kdbench(*killed)
    assert_alike(tmp_path / "killed", tmp_path / "whole")
    records = [json.loads(f.read_text()) for f in sorted((tmp_path / "whole" / "mutual").glob("dml*/record.json"))]
    assert [record.get("teacher") for record in records] == [None, None]
    trained = [record["result"]["teacher"]["last"] for record in records]
    assert all(0 <= accuracy <= 100 for accuracy in trained)
    assert "DML" in kdbench("table", tmp_path / "whole" / "mutual").stdout
    kdbench("verify", tmp_path / "whole" / "mutual")
    assert "trains along" in kdbench("check", recipe, "--no-time").stdout


@pytest.mark.slow
def test_several_teachers_at_once(kdbench: Kdbench, tmp_path: Path) -> None:
    """By the mean of their logits, or one term for each; the second teacher changes, and cells know."""
    cards, small = tmp_path / "cards", "data: digits\nprotocol: digits\nmethod: ce\nsteps: 20\nevaluations: 1\n"
    cards.mkdir()
    names = {"first": "wrn_10_1", "second": "wrn_10_2"}
    for name, model in names.items():
        (tmp_path / f"{name}.yaml").write_text(f"{small}student: {model}\n")
    (cards / "teachers.yaml").write_text(
        "teachers:\n"
        + "".join(f"  {n}: {{model: {m}, data: digits, recipe: {tmp_path / n}.yaml}}\n" for n, m in names.items())
    )
    recipe = tmp_path / "both.yaml"
    recipe.write_text(
        "data: {name: digits, per_class: 10}\nteacher: [first, second]\nstudent: wrn_10_1\nprotocol: digits\n"
        "steps: 12\nevaluations: 2\ncompare:\n  method:\n    - kd\n    - name: kd\n      label: each\n"
        "      stages: {classification: {trains: [student, connectors], losses: {kd: {teacher: teacher1.logits}, "
        "second: {loss: fitnets, student: layer3, teacher: teacher2.layer3, connector: conv1x1_bn}}}}\n"
    )
    more = ["--registry", cards]
    kdbench("logits", "fill", recipe, *more, *ONE[2:4])
    whole, killed = (["run", recipe, "--runs", tmp_path / name, *ONE, *more] for name in ("whole", "killed"))
    kdbench(*whole)
    struck(killed, Strike("checkpoint", 5))
    kdbench(*killed)
    assert_alike(tmp_path / "killed", tmp_path / "whole")
    folder = tmp_path / "whole" / "both"
    records = [json.loads(file.read_text()) for file in folder.glob("*/record.json")]
    teacher = {(r["spec"]["teacher"]["name"], *r["teacher"]["members"]) for r in records}
    trained = {
        f.parent.name.rpartition("-")[0]: json.loads(f.read_text())["files"]["student.safetensors"]
        for f in tmp_path.glob("whole/teachers/*/record.json")
    }
    assert teacher == {("first + second", trained["first"], trained["second"])}
    assert "first + second" in kdbench("table", folder, *more).stdout
    kdbench("verify", folder, *more)
    assert "teacher second: trained from its own recipe" in kdbench("check", recipe, "--no-time", *more).stdout
    assert "has no hook points 'layers'" in kdbench("run", recipe, "compare.method=[at]", *more, code=2).stderr
