"""ImageNet's recipes from end to end on a folder of 8 classes in its layout, with small networks."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Kdbench, filled
from picture_files import write_pictures

from kdbench.files import sha256_of

CARDS = """
datasets:
  eight: {include: imagenet, classes: 8, image_size: 32, train: 40, test: 16, args: {short_side: 36}}
teachers:
  small:
    model: mobilenetv2_half
    data: eight
    weights: {file: %s, sha256: %s}
    accuracy: %s
"""
# Smaller networks with as many layers; the real ones are built and trained by tests/cards.
WORDS = ["data=eight", "teacher=small", "student=mobilenetv2_half", "steps=4", "protocol.batch_size=8", "evaluations=2"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from safetensors.torch import save_file

    from kdbench.models.mobilenetv2 import mobilenet_v2

    folder = tmp_path_factory.mktemp("imagenet")
    write_pictures(folder / "data" / "imagenet", classes=8, train=5, test=2)
    (folder / "data" / "imagenet" / "test").rename(folder / "data" / "imagenet" / "val")
    torch.manual_seed(0)
    weights = folder / "teacher.safetensors"
    save_file(mobilenet_v2(width=0.5, classes=8).state_dict(), weights)
    (folder / "cards").mkdir()
    # An untrained network answers one class of eight.
    (folder / "cards" / "cards.yaml").write_text(CARDS % (weights, sha256_of(weights), 12.5))
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
