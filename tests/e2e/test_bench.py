"""`kdbench bench` from end to end on small batches: every lane runs, and a program can read what it prints."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from conftest import Kdbench

RECIPE = """\
data: cifar10
teacher: wrn_22_4_cifar10
student: wrn_10_1
protocol: {name: crd, batch_size: 2}
compare:
  method: [ce, kd, at]
"""
QUICK = ("--rounds", "2", "--seconds", "0.2", "--threads", "1", "--no-compiled")


@pytest.mark.slow
def test_all_lanes(kdbench: Kdbench, tmp_path: Path) -> None:
    if importlib.util.find_spec("torchdistill") is None:
        pytest.skip("torchdistill is not installed: make peers")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    done = kdbench("bench", "tiny.yaml", *QUICK, "--json", "speed.json", timeout=600)
    last = done.stdout.splitlines()[-1]
    ratios = re.fullmatch(r"RATIO run=(\S+) cohort=(\S+) table=(\S+)", last)
    assert ratios is not None, last
    result = json.loads((tmp_path / "speed.json").read_text())["results"][0]
    names = [row["name"] for row in result["rows"]]
    assert names[:3] == ["torchdistill", "torchdistill, teacher in eval mode", "plain PyTorch loop"]
    assert names[3] == "kdbench, float32" and "float32, channels_last" in names
    assert names[-2].endswith("3 methods as one cohort") and names[-1].endswith("logit table")
    for row in result["rows"]:
        assert len(row["images_per_second"]) == 2 and min(row["images_per_second"]) > 0
    assert [f"{result['ratios'][role]:.2f}" for role in ("run", "cohort", "table")] == list(ratios.groups())


def test_a_recipe_without_a_logit_method_is_told(kdbench: Kdbench, tmp_path: Path) -> None:
    (tmp_path / "at.yaml").write_text(RECIPE.replace("[ce, kd, at]", "[at]"))
    done = kdbench("bench", "at.yaml", "--no-peers", code=2)
    assert "logits alone" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("device", ["cuda:99", "tpu"])
def test_a_device_that_is_not_there_is_told(kdbench: Kdbench, device: str) -> None:
    done = kdbench("bench", "--no-peers", "--device", device, code=2)
    assert device in done.stderr and "Traceback" not in done.stderr
