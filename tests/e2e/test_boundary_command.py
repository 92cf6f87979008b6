"""`kdbench boundary` on the cells of a finished run, as a user types it."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Kdbench

HERE = Path(__file__).parent
REGISTRY = ["--registry", HERE / "registry"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of a plain student, of KD and of BSS, behind a teacher that was trained in the same runs."""
    folder = tmp_path_factory.mktemp("boundary")
    recipe = [HERE / "recipes" / "tiny.yaml", "compare.method=[ce, kd, bss]", "seeds=2", "steps=30", "evaluations=1"]
    command = [sys.executable, "-m", "kdbench", "run", *map(str, [*recipe, *REGISTRY])]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny"


def test_boundaries_of_finished_cells(finished: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    arguments = [finished, "--images", 30, "--targets", 3, "--picture", "--out", tmp_path / "out", *REGISTRY]
    done = kdbench("boundary", *arguments)
    with (tmp_path / "out" / "boundary.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [(line["method"], line["seed"]) for line in lines] == [
        (method, seed) for method in ("ce", "kd", "bss") for seed in ("0", "1")
    ], "the plain student too, against the others' teacher"
    for line in lines:
        assert 0 < int(line["images"]) <= 30 and 0 < int(line["pairs"]) <= 3 * int(line["images"])
        assert 0 < float(line["magnitude"]) < 1 and -1 < float(line["angle"]) < 1
        assert float(line["teacher_arrived"]) > 0.5
    for word in ("MagSim", "AngSim", "BSS", "±", "boundary_samples.png"):
        assert word in done.stdout, word
    assert (tmp_path / "out" / "boundary_samples.png").stat().st_size > 10_000
    first = (tmp_path / "out" / "boundary.csv").read_bytes()
    kdbench("boundary", *arguments)
    assert (tmp_path / "out" / "boundary.csv").read_bytes() == first


def test_what_cannot_be_compared_is_told(finished: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    plain = next(finished.glob("ce-seed0*"))
    done = kdbench("boundary", plain, *REGISTRY, code=2)
    assert "no cell has a teacher to compare with" in done.stderr and "Traceback" not in done.stderr
    copied = tmp_path / "runs" / "tiny" / "kd"
    copied.mkdir(parents=True)
    (copied / "record.json").write_bytes(next(finished.glob("kd-seed0*/record.json")).read_bytes())
    done = kdbench("boundary", copied, *REGISTRY, code=2)
    assert "is not there" in done.stderr and "--runs" in done.stderr
    done = kdbench("boundary", copied, "--runs", finished.parent, *REGISTRY, code=2)
    assert "no weights of this cell's student" in done.stderr
    assert "unknown device" in kdbench("boundary", copied, "--device", "abacus", code=2).stderr
