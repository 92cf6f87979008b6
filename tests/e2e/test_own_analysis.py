"""An analysis of the user's own is one Python file and one card in a registry folder."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from conftest import TINY, Kdbench, filled

CARDS = """\
analyses:
  confidence:
    target: confidence:confidence
    title: how sure students are
  drawn:
    target: confidence:Drawn
    title: a class that draws a picture
"""
CODE = '''\
import torch


def confidence(analysis, *, images: int = 100, temperature: float = 1.0):
    """The mean of the largest probability on test images."""
    for cell in analysis.cells:
        test = analysis.test_images(cell.spec.data, images)
        with torch.no_grad():
            logits = analysis.student(cell)(test.pixels)
        sure = (logits / temperature).softmax(1).amax(1)
        right = (logits.argmax(1) == test.labels).float()
        yield {**cell.columns, "images": len(sure), "sure": sure.mean().item(), "right": right.mean().item()}


class Drawn:
    def __init__(self, analysis, *, names: list[str]):
        self.analysis, self.names = analysis, names

    def __iter__(self):
        self.analysis.picture("empty").write_bytes(b"png")
        yield from ({"name": name, "seed": 0, "layer": 0.25 + layer} for layer, name in enumerate(self.names))
'''

pytestmark = pytest.mark.slow


@pytest.fixture
def own(tmp_path: Path) -> list[str | Path]:
    folder = tmp_path / "my_analyses"
    folder.mkdir()
    (folder / "cards.yaml").write_text(CARDS)
    (folder / "confidence.py").write_text(CODE)
    return ["--registry", folder, *TINY[1:]]


def test_an_analysis_of_ones_own(tiny_run: Path, own: list[str | Path], kdbench: Kdbench, tmp_path: Path) -> None:
    assert "how sure students are" in kdbench("ls", "analyses", *own).stdout
    shown = kdbench("show", "analyses", "confidence", *own).stdout
    assert "temperature" in shown and "float" in shown and "analysis " not in shown
    runs = tiny_run / "runs" / "tiny"
    done = kdbench("analyse", "confidence", runs, "images=1000", "--out", tmp_path / "out", *own)
    with (tmp_path / "out" / "confidence.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    records = {file.parent.name: filled(file) for file in runs.glob("*/record.json")}
    # All test images: the accuracy of the record.
    accuracies = {
        (one["cell"]["method"], one["cell"]["seed"]): one["result"]["test"]["last"] for one in records.values()
    }
    assert {(line["method"], int(line["seed"])) for line in lines} == accuracies.keys() and len(lines) == 4
    for line in lines:
        assert 100 * float(line["right"]) == pytest.approx(accuracies[line["method"], int(line["seed"])], abs=1e-3)
        assert 0.1 < float(line["sure"]) < 1
    assert "±" in done.stdout and "in all rows: recipe tiny, seeds 2" in done.stdout
    about = json.loads((tmp_path / "out" / "confidence.json").read_text(encoding="utf-8"))
    assert {one["name"] for one in about["networks"]} == {f"tiny/{name}" for name in records}
    (data,) = about["data"]
    assert data["fingerprint"] == next(iter(records.values()))["data"]["fingerprint"]
    cooler = tmp_path / "cooler"
    kdbench("analyse", "confidence", runs, "temperature=0.5", "--out", cooler, *own)
    with (cooler / "confidence.csv").open(encoding="utf-8") as file:
        assert all(float(a["sure"]) > float(b["sure"]) for a, b in zip(csv.DictReader(file), lines, strict=True))


def test_it_may_be_a_class_and_draw(own: list[str | Path], kdbench: Kdbench, tmp_path: Path) -> None:
    done = kdbench("analyse", "drawn", "names=[a, b]", *own)
    assert (tmp_path / "drawn_empty.png").read_bytes() == b"png"
    assert "written to .: drawn.csv, drawn.json, drawn_empty.png" in done.stdout
    assert (tmp_path / "drawn.csv").read_text() == "name,seed,layer\na,0,0.25\nb,0,1.25\n"
    assert "list[str]" in kdbench("show", "analyses", "drawn", *own).stdout


def test_rows_of_one_seed_are_not_averaged(own: list[str | Path], kdbench: Kdbench) -> None:
    """They differ in something that is no repetition, here in the layer."""
    said = kdbench("analyse", "drawn", "names=[a, a]", *own).stdout
    assert "0.25" in said and "1.25" in said and "±" not in said
    assert "in all rows: name a, seed 0" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["confidnce"], ["unknown analysis 'confidnce'", "confidence"]),
        (["confidence", "image=3"], ["unknown key 'image'", "'image=3'", "images"]),
        (["confidence", "images=many"], ["cannot be 'many'", "'images=many'", "int"]),
        (["drawn"], ["needs 'names'"]),
        (["drawn", "names=[]"], ["found nothing"]),
        (["confidence"], ["there is nothing to analyse"]),
        (["confidence", "nowhere"], ["there is no such folder", "nowhere"]),
    ],
)
def test_mistakes_are_told(words: list[str], told: list[str], own: list[str | Path], kdbench: Kdbench) -> None:
    said = kdbench("analyse", *words, *own, code=2).stderr
    assert all(text in said for text in told) and "Traceback" not in said, said


def test_the_old_commands_name_the_new_ones(kdbench: Kdbench) -> None:
    for name in ("boundary", "judge"):
        said = kdbench(name, "runs/tiny", "--by", "somebody", code=2).stderr
        assert f"kdbench analyse {name}" in said and len(said.splitlines()) <= 2
    assert "boundary" not in kdbench("--help").stdout
