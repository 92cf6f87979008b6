"""Whole runs on a GPU, by the command line: what the records say, two at once, and a GPU that torch cannot use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Kdbench
from kills import Strike, struck

from kdbench.engine.computing.device import gpus

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not gpus(), reason="needs a GPU that torch can use")]
WAYS = ("compute={precision: float32, layout: contiguous, compile: false}", "steps=120", "evaluations=8")


def words(runs: Path, *more: str) -> list[str | Path]:
    return ["run", *TINY, "--runs", runs, *WAYS, *more]


def computes(runs: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text())["compute"] for file in sorted((runs / "tiny").glob("*/record.json"))]


def test_seeds_of_a_comparison_train_at_once_and_the_records_say_how(kdbench: Kdbench, tmp_path: Path) -> None:
    kdbench(*words(tmp_path, "seeds=3"))
    found = computes(tmp_path)
    assert len(found) == 6
    for compute in found:
        assert compute["device"] == "cuda" and compute["cuda_graphs"]
        # AB's first stage has twelve steps, which are not worth a recording.
        assert {*compute.get("eager", {})} <= {"boundaries"}
        assert compute["cohort"] == 2 and compute["seeds_together"] == 3
        assert compute["evaluation"] == "float32, replayed"


def test_a_killed_run_goes_on(kdbench: Kdbench, tmp_path: Path) -> None:
    several = words(tmp_path, "seeds=2", "--checkpoint-seconds", "0")
    struck(several, Strike("second stage", 1))
    struck(several, Strike("record", 1))
    kdbench(*several)
    assert len(computes(tmp_path)) == 4


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "kdbench", *map(str, words(tmp_path / name, "seeds=2"))],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for run in runs:
        _, said = run.communicate(timeout=300)
        assert run.returncode == 0, said
    for name in ("one", "two"):
        assert all(compute["cuda_graphs"] for compute in computes(tmp_path / name))


@pytest.mark.parametrize(
    "command",
    [
        ("run", *TINY, "steps=4", "evaluations=1", "--runs", "runs"),
        ("logits", "fill", TINY[0], "--registry", TINY[2], "--estimate"),
        ("check", TINY[0], "--registry", TINY[2], "--no-time"),
        ("bench", "ab_wrn", "--no-peers", "--no-compiled", "--rounds", "1", "--seconds", "0.1"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_said_aloud(
    command: tuple[str | Path, ...], kdbench: Kdbench, tmp_path: Path
) -> None:
    """Hidden from torch, with its driver still there."""
    if not os.path.exists("/dev/nvidiactl"):
        pytest.skip("needs a GPU whose driver shows itself")
    if command[0] != "check":
        asked = kdbench(*command, "--device", "cuda", CUDA_VISIBLE_DEVICES="", code=2)
        assert "cuda" in asked.stderr.lower() and "Traceback" not in asked.stderr
    done = kdbench(*command, CUDA_VISIBLE_DEVICES="", timeout=600)
    assert "there is a GPU that torch cannot use" in done.stderr + done.stdout
