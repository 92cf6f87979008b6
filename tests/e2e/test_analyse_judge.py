"""`kdbench analyse judge` on the pools of a finished run, as a user types it."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import pytest
from conftest import TINY, Kdbench, Once

from kdbench.data.digits import load
from kdbench.methods.deep_inversion.made import MadeImages

REGISTRY = TINY[1:]
METHODS = (
    "compare.method=[ce, {name: deep_inversion, batches: 1, images: 20, iterations: 120, feature: 1.0, jitter: 0},"
    " {name: noise_kd, batches: 1, images: 20}]"
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(once: Once, command_line: Kdbench) -> Path:
    words = ("run", *TINY, METHODS, "seeds=1", "steps=60", "evaluations=1", "--jobs", "1")
    return once("judge", lambda folder: command_line(*words, cwd=folder)) / "runs"


def judged(folder: Path) -> list[dict[str, str]]:
    with (folder / "judge.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_student_judges_as_it_was_tested(finished: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    """Real test images as a pool: the accuracy of the record, but for images that float16 changes."""
    (pool,) = (file.parent for file in finished.rglob("pool.json") if '"iterations": 120' in file.read_text())
    data = load([], download=False, cache=tmp_path)
    real = MadeImages(tmp_path / "real", json.loads((pool / "pool.json").read_text()))
    real.begin()
    real.write(0, data.test_images.float() / 255, data.test_labels, {})
    plain = next((finished / "tiny").glob("ce-*"))
    done = kdbench("analyse", "judge", tmp_path / "real", f"by={plain}", "--out", tmp_path, *REGISTRY)
    (line,) = judged(tmp_path)
    accuracy = json.loads((plain / "record.json").read_text())["result"]["test"]["last"]
    assert int(line["images"]) == len(data.test_labels)
    assert 100 * float(line["right"]) == pytest.approx(accuracy, abs=0.4)
    assert f"right {float(line['right']):.4g}" in done.stdout and "judge student, seed 0" in done.stdout
    about = json.loads((tmp_path / "judge.json").read_text(encoding="utf-8"))
    weights = hashlib.sha256((plain / "student.safetensors").read_bytes()).hexdigest()
    assert about["networks"] == [{"name": f"tiny/{plain.name}", "sha256": weights}]
    batch = hashlib.sha256((tmp_path / "real" / "batch_00000.safetensors").read_bytes()).hexdigest()
    digest = hashlib.sha256(f"{batch}\n".encode()).hexdigest()
    assert about["pools"] == [{"name": "real", "batches": 1, "sha256": digest}]
    assert about["csv"]["sha256"] == hashlib.sha256((tmp_path / "judge.csv").read_bytes()).hexdigest()
    assert str(tmp_path) not in json.dumps(about) and str(finished) not in json.dumps(about)


def test_the_maker_sees_its_images_and_noise_differently(finished: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    teacher = next(file.parent for file in (finished / "teachers").rglob("student.safetensors"))
    kdbench("analyse", "judge", finished / "sources", f"by=[{teacher}]", "--out", tmp_path, *REGISTRY)
    right = {line["iterations"]: float(line["right"]) for line in judged(tmp_path)}
    assert right["120"] > 0.5 > right["0"]


def test_bad_input_is_told(finished: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    done = kdbench("analyse", "judge", tmp_path, "by=wrn_16_2_digits", code=2)
    assert "no synthesized images here" in done.stderr
    done = kdbench("analyse", "judge", finished, "by=wrn_16_3_digits", code=2)
    assert "unknown teacher" in done.stderr and "wrn_16_2_digits" in done.stderr
    done = kdbench("analyse", "judge", finished, "by=wrn_16_2_digits", "--runs", tmp_path, code=2)
    assert "run its recipe" in done.stderr and "Traceback" not in done.stderr
