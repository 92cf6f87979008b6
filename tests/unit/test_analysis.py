"""What an analysis writes: its rows, and beside them what they were made from."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

import kdbench
from kdbench.cli import analyse
from kdbench.engine.analysis import Analysis, as_csv, command_line
from kdbench.engine.options import Options


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["analyse", "judge", "runs/sources", "by=a card"], "analyse judge runs/sources 'by=a card'"),
        (["/home/me/work/runs/a", "--out=/home/me/work/out", "--n", "3"], "runs/a --out=out --n 3"),
        (["--data", "/tmp/sets", "--runs=/elsewhere/runs", "/home/me/work"], "--data '…/sets' '--runs=…/runs' ."),
        (["--rate=0.1", "a=b/c", "--picture"], "--rate=0.1 a=b/c --picture"),
        (["by=[/a/my card, ../b, '/home/me/work/runs']"], """'by=[…/my card, ../b, '"'"'runs'"'"']'"""),
    ],
)
def test_a_command_names_no_place_of_the_machine(arguments: list[str], shown: str) -> None:
    assert command_line(arguments, Path("/home/me/work")) == shown


def test_rows_may_have_different_columns() -> None:
    rows = [{"name": "a, b", "share": 1 / 3, "range": [-2.5, 2.5]}, {"name": "c", "count": 3}]
    assert as_csv(rows) == 'name,share,range,count\n"a, b",0.333333,"[-2.5, 2.5]",\nc,,,3\n'


def test_whole_numbers_that_differ_have_a_deviation_too(capsys: pytest.CaptureFixture[str]) -> None:
    images, share = {"kd": (19, 16), "ab": (18, 18)}, {"kd": (0.25, 0.75), "ab": (1.0, 1.0)}
    analyse._print(
        [
            {"method": method, "seed": seed, "images": images[method][seed], "share": share[method][seed]}
            for method in images
            for seed in (0, 1)
        ]
    )
    said = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    rows = {words[0].strip(): [word.strip() for word in words[1:] if word.strip()] for words in said}
    # Deviations of two numbers: their distance over the root of 2.
    assert rows["kd"] == ["17.5 ± 2.1", "0.5 ± 0.35"] and rows["ab"] == ["18", "1 ± 0"]


def test_all_that_was_analysed_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kdbench", "analyse", "mine", str(tmp_path / "runs"), "by=somebody"])
    monkeypatch.chdir(tmp_path)
    analysis = Analysis("mine", [tmp_path / "runs"], Options(device="cpu"), tmp_path / "out", print)
    analysis.note("networks", name="somebody", sha256="01")
    analysis.note("pools", name="pool", batches=2, sha256="23")
    analysis.note("networks", name="somebody", sha256="01")
    table, file, picture = analysis.write([{"a": 1, "b": 2}]) + [analysis.picture("samples")]
    assert (table, file) == (tmp_path / "out" / "mine.csv", tmp_path / "out" / "mine.json")
    assert picture == tmp_path / "out" / "mine_samples.png"
    with table.open(encoding="utf-8") as lines:
        assert list(csv.DictReader(lines)) == [{"a": "1", "b": "2"}]
    about = json.loads(file.read_text(encoding="utf-8"))
    assert about["command"] == "kdbench analyse mine runs by=somebody"
    assert about["kdbench"] == kdbench.__version__ and about["git"] is None or len(about["git"]["commit"]) == 40
    assert about["machine"]["torch"] == torch.__version__ and about["machine"]["device"] == "cpu"
    assert about["networks"] == [{"name": "somebody", "sha256": "01"}] and about["data"] == []
    assert about["pools"] == [{"name": "pool", "batches": 2, "sha256": "23"}]
    assert about["csv"] == {"name": "mine.csv", "sha256": hashlib.sha256(table.read_bytes()).hexdigest()}
    assert str(tmp_path) not in file.read_text(encoding="utf-8")
    first = file.read_bytes()
    assert analysis.write([{"a": 1, "b": 2}])[1].read_bytes() == first, "the same analysis, the same file"
