"""A metric that a loss card of one's own declares, with its reference, reaches the record, the evaluations and the CSV
files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from conftest import TINY, Kdbench

from kdbench.record import metrics, read_record

CODE = '''
import torch
from torch.nn import functional as F


def distance(student, teacher):
    return (1 - F.cosine_similarity(student, teacher.detach(), dim=1)).mean()


def likeness(student, teacher):
    """Mean cosine over the channels."""
    return F.cosine_similarity(student, teacher, dim=1).mean()


class OfZeros:
    """The value of a student that gives nothing."""

    def __init__(self):
        self.images = 0

    def add(self, teacher):
        self.images += len(teacher)

    def value(self):
        return 0.25 if self.images else 1.0
'''
CARD = """
losses:
  turned:
    target: turned:distance
    inputs: [student, teacher]
    metrics: {likeness: "turned:likeness"}
    references: {likeness: "turned:OfZeros"}
    shares: {likeness: the longest likeness}
methods:
  turned:
    title: turned features
    stages:
      - name: training
        trains: [student, connectors]
        losses:
          ce: {loss: cross_entropy}
          direction: {loss: turned, hook: layer3, connector: conv1x1_bn, weight: 10.0}
"""


@pytest.mark.slow
def test_a_metric_of_ones_own_reaches_record_and_csv(kdbench: Kdbench, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "turned.py").write_text(CODE)
    (own / "turned.yaml").write_text(CARD)
    registries = ["--registry", own, *TINY[1:]]
    kdbench("run", TINY[0], "compare.method=[ce, turned]", "steps=6", "evaluations=2", *registries, "--jobs", "1")
    run = tmp_path / "runs" / "tiny"
    folder = next(run.glob("turned-*"))
    result = read_record(folder).result
    assert result.metrics.keys() == {"likeness"} and -1 <= result.metrics["likeness"]["layer3"] <= 1
    assert result.references == {"likeness": {"layer3": 0.25}}
    lines = metrics(folder)
    assert len(lines) == 2 and lines[-1]["metrics"] == result.metrics and lines[-1]["references"] == result.references
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["metrics"] == result.metrics

    with (run / "records.csv").open(encoding="utf-8") as file:
        by_method = {line["method"]: line for line in csv.DictReader(file)}
    assert float(by_method["turned"]["likeness.layer3"]) == result.metrics["likeness"]["layer3"]
    assert float(by_method["turned"]["likeness_reference.layer3"]) == 0.25
    assert by_method["ce"]["likeness.layer3"] == ""

    # A share is shown in percent, as its card says, and by whoever has the records and not the card.
    shown = kdbench("table", run).stdout
    assert f"{100 * result.metrics['likeness']['layer3']:.1f} %" in shown
    assert "Likeness is the share of the longest likeness" in shown
    assert "A student that ignores its input can reach 25.0 % at layer3" in shown

    # What the test logits say stands there too: of ten classes no top-5, of a student without a teacher no fidelity.
    assert result.top5 is None and "top5" not in by_method["turned"]
    assert float(by_method["turned"]["calibration_error"]) == result.calibration_error
    assert float(by_method["turned"]["fidelity"]) == result.fidelity
    assert 0 < float(by_method["ce"]["calibration_error"]) < 100 and by_method["ce"]["fidelity"] == ""
    shown = kdbench("table", run, "--columns", "likeness,fidelity").stdout
    assert "likeness.layer3" in shown and "same answer as the teacher" in shown
    assert "did you mean 'fidelity'" in kdbench("table", run, "--columns", "fidelty", code=2).stderr
    assert "everything agrees" in kdbench("verify", run, "--registry", own, *TINY[1:]).stdout
