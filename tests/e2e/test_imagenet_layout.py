"""A folder in ImageNet's layout and a protocol of today from end to end: killed and resumed, and on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Kdbench, filled
from kills import Strike, struck
from picture_files import EIGHT, write_imagenet

RECIPE = """
data: eight
teacher: {model: "torchvision:resnet18", weights: teacher.safetensors}
student: wrn_10_1
protocol:
  name: crd
  batch_size: 6
  augmentation:
    padding: 0
    resized_crop: [0.2, 1.0]
    flip: true
    transforms: [rand_augment, {name: random_erasing, p: 0.5}]
    mix: {mixup: 0.2, cutmix: 1.0}
  label_smoothing: 0.1
  ema: 0.8
  schedule: {name: cosine, warmup: 20%}
steps: 10
evaluations: 2
seeds: 1
compare:
  method: [ce, kd]
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from safetensors.torch import save_file
    from torchvision.models import resnet18

    folder = tmp_path_factory.mktemp("imagenet")
    write_imagenet(folder / "data" / "imagenet", flat=True)
    (folder / "cards").mkdir()
    (folder / "cards" / "cards.yaml").write_text(EIGHT)
    torch.manual_seed(0)
    save_file(resnet18(num_classes=8).state_dict(), folder / "teacher.safetensors")
    (folder / "recipe.yaml").write_text(RECIPE.replace("teacher.saf", f"{folder}/teacher.saf"))
    return folder


def words(here: Path, runs: Path) -> list[str]:
    given = ["run", here / "recipe.yaml", "--data", here / "data", "--registry", here / "cards", "--runs", runs]
    return [str(word) for word in (*given, "--threads", "1", "--checkpoint-seconds", "0")]


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(here: Path, kdbench: Kdbench) -> None:
    kdbench(*words(here, here / "whole"), "--jobs", "1")
    cells = [file.parent for file in (here / "whole" / "recipe").glob("*/record.json")]
    assert len(cells) == 2
    record = filled(cells[0] / "record.json")
    assert {"resized_crop", "transforms", "mix"} <= {*record["seeds"]["streams"]}
    again = [*words(here, here / "again"), "--jobs", "1"]
    # Two cells a step.
    struck(again, Strike("step", 13, "interrupt"))
    assert [*(here / "again").rglob("checkpoint.pt")]
    kdbench(*again)
    for cell in cells:
        for name in ("student.safetensors", "test_logits.safetensors"):
            resumed = here / "again" / "recipe" / cell.name / name
            assert resumed.read_bytes() == (cell / name).read_bytes(), (cell.name, name)
