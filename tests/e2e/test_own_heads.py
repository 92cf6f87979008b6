"""A student that answers through modules of its method: trained, killed, resumed, recorded, loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, Kdbench
from kills import Strike, assert_alike, struck
from safetensors.torch import load_file

from kdbench import load_student
from kdbench.data.augment import normalize
from kdbench.data.digits import load
from kdbench.errors import UserError
from kdbench.files import LOGITS, STUDENT


@pytest.mark.slow
def test_what_is_loaded_answers_as_the_trained_student_did(kdbench: Kdbench, tmp_path: Path) -> None:
    methods = ["compare.method=[simkd, crd, ft_official]", "steps=24", "evaluations=2"]
    options = ["--checkpoint-seconds", "0", "--jobs", "1", "--threads", "1"]
    whole, killed = (["run", *TINY, *methods, "--runs", tmp_path / name, *options] for name in ("whole", "killed"))
    kdbench(*whole)
    struck(killed, Strike("checkpoint", 9))
    struck(killed, Strike("record", 1))
    kdbench(*killed)
    assert_alike(tmp_path / "killed", tmp_path / "whole")
    (folder,) = (tmp_path / "whole" / "tiny").glob("simkd*")
    record = json.loads((folder / "record.json").read_text())
    student = load_student(folder)
    pixels = load(roots=[], download=False, cache=tmp_path).test_images.float() / 255
    normalization = record["spec"]["protocol"]["normalization"]
    images = normalize(pixels, torch.tensor(normalization["mean"]), torch.tensor(normalization["std"]))
    with torch.no_grad():
        logits = student(images)
    kept = load_file(folder / LOGITS)["logits"]
    assert torch.allclose(logits.half(), kept, atol=1e-2) and (logits.argmax(1) == kept.argmax(1)).float().mean() > 0.99
    # wrn_10_1 with 64 channels under itself: projector 64·32 + 9·32·32 + 32·64 and 2·128 of batch norms, head 650.
    plain = json.loads(next((tmp_path / "whole" / "tiny").glob("crd*/record.json")).read_text())["models"]["student"]
    unused = 2 * 64 + 650
    projector = 64 * 32 + 9 * 32 * 32 + 32 * 64 + 2 * (32 + 32 + 64)
    assert record["models"]["student"]["parameters"] == plain["parameters"] - unused + projector + 650
    weights = load_file(folder / STUDENT)
    assert {key.partition(".")[0] for key in weights} == {"student", "head"}


def test_such_a_student_cannot_teach(tmp_path: Path) -> None:
    from kdbench.recipe.planning import plan
    from kdbench.registry import Registry

    (cards := tmp_path / "cards").mkdir()
    (cards / "own.yaml").write_text(
        "teachers:\n  own:\n    model: wrn_10_1\n    data: digits\n    recipe: ../recipe.yaml\n"
    )
    (tmp_path / "recipe.yaml").write_text(
        "data: digits\nteacher: wrn_16_2_digits\nstudent: wrn_10_1\nprotocol: digits\nmethod: simkd\n"
    )
    recipe = {"data": "digits", "teacher": "own", "student": "wrn_10_1", "protocol": "digits", "method": "kd"}
    with pytest.raises(UserError, match="cannot teach"):
        plan(recipe, Registry([cards]))


@pytest.mark.slow
def test_a_student_with_a_bottleneck_is_its_teacher_but_for_that(kdbench: Kdbench, tmp_path: Path) -> None:
    few = ["data=digits", "compare.method=[ghnd]", "steps=120", "evaluations=1"]
    fast = "method.stages.distillation.optimizer.lr=0.01"
    done = kdbench("run", *TINY, *few, fast, "--jobs", "1", "--threads", "1")
    assert "Module 'bottleneck' of GHND: values of an image 300, map 12 × 5 × 5" in " ".join(done.stdout.split())
    (folder,) = (tmp_path / "runs" / "tiny").glob("ghnd*")
    record = json.loads((folder / "record.json").read_text())
    assert record["result"]["test"]["last"] > 60, "chance is 10 %"
    student = load_student(folder)
    teacher, own = load_file(next(tmp_path.rglob(f"teachers/*/{STUDENT}"))), load_file(folder / STUDENT)
    assert all(torch.equal(value, own[f"student.{key}"]) for key, value in teacher.items())
    assert {*own} - {f"student.{key}" for key in teacher} == {
        key for key in student.state_dict() if key.startswith("head.bottleneck.")
    }
    # The network stops at its stem, which no exporter can follow.
    assert "student.onnx" in kdbench("export", folder, "--onnx", "--out", "out").stdout
