"""`kdbench bench` from end to end on small batches: every lane runs, and a program can read what it prints."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Kdbench
from shipped import DIGITS, REGISTRY

from kdbench.bench.compare import Benchmark, LaneTimer, Machine, cells_of
from kdbench.bench.gpu import Pair, bench_gpu, result_lines
from kdbench.bench.lanes import Lane
from kdbench.cli.bench import measured_plans
from kdbench.engine.computing.compute import Computing
from kdbench.recipe.planning import plan

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


def test_what_stands_for_all_on_a_gpu() -> None:
    pair, crd = measured_plans(None, REGISTRY, gpu=True)
    assert len(cells_of(pair)[1]) == 7 and len(cells_of(crd)[1]) == 5
    assert crd.cells[0].spec.protocol.batch_size == 64


def test_a_device_that_is_not_there_is_told(kdbench: Kdbench) -> None:
    done = kdbench("bench", "--no-peers", "--device", "cuda:99", code=2)
    assert "cuda:99" in done.stderr and "Traceback" not in done.stderr


def test_what_a_gpu_measures_is_made_of_lanes_that_start_at_once(tmp_path: Path) -> None:
    """Here on the processor, which records no steps: the lanes, their turns, and what is left out in time are the
    same."""
    recipe = DIGITS | {"protocol": {"name": "digits", "batch_size": 2}, "compare": {"method": ["ce", "kd"]}}
    machine = Machine({}, ("float32",), False, lambda precision: 1e9)
    pairs = [Pair(plan(recipe, REGISTRY), {"teacher": 2e6, "student": 1e6})]
    # A lane that is never ready is left out, and said so; the others keep their times.
    pairs[0].lanes["late"] = [Lane("sleeps", "plain", [], Computing())]
    said: list[str] = []
    kept: list[dict[str, Any]] = []

    def keep(results: list[Benchmark], times: dict[str, Any]) -> None:
        kept.append({"rows": [one.plain() for one in results], "times": dict(times)})

    results, times = bench_gpu(pairs, LaneTimer(machine, "cpu", 2, 2, 0.1, said.append), 2.2, False, False, keep)
    (result,) = results
    assert set(result.roles) == {"run", "cohort"} and all(len(row.rates) == 2 for row in result.rows)
    assert any("left out" in line and "sleeps" in line for line in said)
    (whole,) = times.values()
    assert 0 < whole["run"]["evaluations"] < 1
    # Round by round, so that who is cut off has what was measured.
    assert len(kept) == 3 and kept[0]["rows"][0]["rows"][0]["images_per_second"]
    text = result_lines(results, times)
    assert "one run in full" in text and "2 side by side in full" in text
