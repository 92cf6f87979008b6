"""ImageNet's recipes from end to end on a folder of 8 classes in its layout, with small networks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Kdbench, filled
from kills import Strike, struck
from picture_files import EIGHT, write_imagenet

from kdbench.files import sha256_of

CARDS = f"""{EIGHT}teachers:
  small:
    model: mobilenetv2_half
    data: eight
    weights: {{file: %s, sha256: %s}}
    accuracy: %s
  of_timm:
    model: "timm:test_convnext"
    data: eight
    weights: {{file: %s, sha256: %s}}
"""
# Smaller networks with as many layers; the real ones are built and trained by tests/cards.
WORDS = ["data=eight", "teacher=small", "student=mobilenetv2_half", "steps=4", "protocol.batch_size=8", "evaluations=2"]
FILES = ("student.safetensors", "test_logits.safetensors")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import timm
    import torch
    from safetensors.torch import save_file

    from kdbench.models.mobilenetv2 import mobilenet_v2

    folder = tmp_path_factory.mktemp("imagenet")
    write_imagenet(folder / "data" / "imagenet")
    torch.manual_seed(0)
    weights, own = folder / "teacher.safetensors", folder / "timm.safetensors"
    save_file(mobilenet_v2(width=0.5, classes=8).state_dict(), weights)
    # The form in which timm publishes them: its own names of parameters.
    save_file(timm.create_model("test_convnext", num_classes=8).state_dict(), own)
    (folder / "cards").mkdir()
    # An untrained network answers one class of eight.
    (folder / "cards" / "cards.yaml").write_text(CARDS % (weights, sha256_of(weights), 12.5, own, sha256_of(own)))
    return folder


def words(here: Path, recipe: str, runs: Path) -> list[str | Path]:
    paths = ["--data", here / "data", "--registry", here / "cards", "--runs", runs]
    return ["run", f"imagenet/{recipe}", *WORDS, *paths, "--jobs", "1", "--threads", "1"]


@pytest.mark.slow
def test_all_methods_train(here: Path, kdbench: Kdbench) -> None:
    done = kdbench(*words(here, "imagenet_small", here / "whole"), "data.fraction=null")
    runs = here / "whole" / "imagenet_small"
    cells = [file.parent for file in runs.glob("*/record.json")]
    assert len(cells) == 11, done.stderr
    taught = [record for cell in cells if (record := filled(cell / "record.json"))["teacher"]]
    assert len(taught) == 10 and {record["teacher"]["accuracy"] for record in taught} == {12.5}


@pytest.mark.long
def test_a_killed_run_ends_with_the_same_bits(here: Path, kdbench: Kdbench) -> None:
    some = ["compare.method=[ce, crd, ab_ce]", "--checkpoint-seconds", "0"]
    struck([*words(here, "imagenet_resnet34_resnet18", here / "again"), *some], Strike("checkpoint", 1, "run"))
    assert not list((here / "again").rglob("record.json")) and list((here / "again").rglob("checkpoint.pt"))
    kdbench(*words(here, "imagenet_resnet34_resnet18", here / "again"), *some)
    kdbench(*words(here, "imagenet_resnet34_resnet18", here / "beside"), *some)
    again = [file.parent for file in (here / "again" / "imagenet_resnet34_resnet18").glob("*/record.json")]
    assert len(again) == 3
    for cell in again:
        for name in FILES:
            assert (cell / name).read_bytes() == (
                here / "beside" / "imagenet_resnet34_resnet18" / cell.name / name
            ).read_bytes()


@pytest.mark.slow
def test_two_ranks_train_deit_are_killed_and_go_on(here: Path, kdbench: Kdbench) -> None:
    """Mixed, augmented and averaged, with a teacher of timm that takes another size."""
    own = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
    student = json.dumps({"name": "timm:deit_tiny_distilled_patch16_224", "options": own})
    more = [
        "teacher=of_timm",
        "teacher.image_size=40",
        f"student={student}",
        "compare.method=[ce, deit]",
        "--checkpoint-seconds",
        "0",
    ]
    line = [str(word) for word in [*words(here, "imagenet_deit", here / "ranks"), *more] if word not in ("--jobs", "1")]
    del line[line.index("--threads")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kdbench"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "killing")])
    strike = {"PYTHONPATH": paths, "STRIKE_WHEN": "step", "STRIKE_AFTER": "5", "STRIKE_AT_WHOM": "worker"}
    killed = subprocess.run(
        [*torchrun, *line, "--threads", "1"], env=os.environ | strike, capture_output=True, text=True, timeout=200
    )
    assert killed.returncode == 1, killed.stderr
    runs = here / "ranks" / "imagenet_deit"
    assert not [*runs.glob("*/record.json")] and [*runs.glob("*/checkpoint.pt")]
    kdbench(*words(here, "imagenet_deit", here / "ranks"), *more)
    records = [filled(file) for file in sorted(runs.glob("*/record.json"))]
    assert [record["compute"]["ranks"] for record in records] == [[2, 1]] * 2
    model, weights = records[1]["spec"]["teacher"]["model"], here / "timm.safetensors"
    assert (model["options"]["name"], model["image_size"]) == ("test_convnext", 40)
    assert records[1]["teacher"]["sha256"] == sha256_of(weights)
    assert {"mix", "transforms", "resized_crop"} <= {*records[0]["seeds"]["streams"]}


@pytest.mark.slow
def test_a_wrong_accuracy_of_a_card_ends_the_run(here: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    (tmp_path / "cards").mkdir()
    text = (here / "cards" / "cards.yaml").read_text()
    (tmp_path / "cards" / "cards.yaml").write_text(text.replace("12.5", "73.31"))
    line = words(here, "imagenet_resnet34_resnet18", tmp_path / "runs")
    line[line.index(here / "cards")] = tmp_path / "cards"
    done = kdbench(*line, "compare.method=[kd]", code=2)
    assert "the teacher 'small' reaches 12.50 % where 73.31 % is stated" in done.stderr
    assert not [*tmp_path.rglob("record.json")] and "Traceback" not in done.stderr
