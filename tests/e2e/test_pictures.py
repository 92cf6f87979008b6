"""The recipe of the MIT indoor scenes from end to end: its loader, streamed pictures, a teacher of other classes."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Kdbench, filled
from picture_files import write_scenes

from kdbench.files import sha256_of

CARDS = """
datasets:
  small_scenes: {include: mit67, image_size: 32, train: 134, test: 67, args: {short_side: 36}}
teachers:
  untrained: {include: resnet50_imagenet, model: "torchvision:resnet18", weights: {file: %s, sha256: %s}}
"""
WORDS = ["ab_scenes", "data=small_scenes", "teacher=untrained", "seeds=1", "steps=8", "evaluations=4"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in the archive's form, an untrained ResNet-18 of 1000 classes, and cards for both."""
    import torch
    from safetensors.torch import save_file
    from torchvision.models import resnet18

    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder / "data" / "indoorCVPR_09")
    torch.manual_seed(0)
    weights = folder / "untrained.safetensors"
    save_file(resnet18(num_classes=1000).state_dict(), weights)
    (folder / "cards").mkdir()
    (folder / "cards" / "cards.yaml").write_text(CARDS % (weights, sha256_of(weights)))
    return folder


def words(here: Path, runs: Path) -> list[str | Path]:
    return ["run", *WORDS, "--data", here / "data", "--registry", here / "cards", "--jobs", "1", "--runs", runs]


@pytest.mark.slow
def test_scenes_train(here: Path, kdbench: Kdbench) -> None:
    kdbench(*words(here, here / "whole"), "compare.method=[ab_transfer, at]", "--threads", "1")
    cells = [file.parent for file in (here / "whole" / "ab_scenes").glob("*/record.json")]
    assert len(cells) == 2
    record = filled(cells[0] / "record.json")
    assert record["data"]["train"] == 134 and record["data"]["classes"] == 67 and record["data"]["short_side"] == 36
    assert record["teacher"]["accuracy"] is None and record["result"]["fidelity"] is None
    assert record["result"]["top5"] >= record["result"]["test"]["last"], "of 67 classes"
    assert "resized_crop" in record["seeds"]["streams"]
    assert "accuracy not measured" in (here / "whole" / "ab_scenes" / "table.md").read_text()


@pytest.mark.slow
def test_what_is_absent_is_told(here: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    words = ("run", *WORDS, "compare.method=[ab_transfer]", "--registry", here / "cards", "--jobs", "1")
    done = kdbench(*words, "--data", tmp_path, code=2)
    assert "MIT indoor scenes are not here" in done.stderr and "TrainImages.txt" in done.stderr
    # The weights are looked for only when there are data to teach.
    done = kdbench(*words, "teacher=resnet50_imagenet", "--data", here / "data", "--no-download", code=2)
    assert "there is no weight file 'resnet50-0676ba61.pth'" in done.stderr and "download" in done.stderr
    done = kdbench("check", "ab_scenes", "method.temperature=2", "compare.method=[kd]", "--no-time", code=2)
    assert "its own 1000 classes, not of the 67" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_damaged_picture_ends_the_run_with_its_name(here: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    copy = tmp_path / "data" / "indoorCVPR_09"
    write_scenes(copy)
    broken = copy / "Images" / "room03" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:150])
    arguments = words(here, tmp_path / "runs")
    arguments[arguments.index(here / "data")] = tmp_path / "data"
    done = kdbench(*arguments, "compare.method=[ce]", "--threads", "1", code=2)
    assert str(broken) in done.stderr and "damaged or cut short" in done.stderr and "Traceback" not in done.stderr
