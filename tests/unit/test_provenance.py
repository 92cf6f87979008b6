"""What stands beside the CSV of an analysis."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

import kdbench
from kdbench.engine.provenance import Provenance, command_line
from kdbench.methods.deep_inversion.made import MadeImages


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["judge", "runs/sources", "--by", "a card"], "judge runs/sources --by 'a card'"),
        (["/home/me/work/runs/a", "--out=/home/me/work/out", "--n", "3"], "runs/a --out=out --n 3"),
        (["--data", "/tmp/sets", "--runs=/elsewhere/runs", "/home/me/work"], "--data '…/sets' '--runs=…/runs' ."),
        (["--rate=0.1", "a=/b", "--picture"], "--rate=0.1 a=/b --picture"),
    ],
)
def test_a_command_names_no_place_of_the_machine(arguments: list[str], shown: str) -> None:
    assert command_line(arguments, Path("/home/me/work")) == shown


def test_all_that_was_looked_at_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kdbench", "judge", str(tmp_path / "pool"), "--by", "somebody"])
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"weights")
    pool = MadeImages(tmp_path / "pool", {})
    pool.begin()
    digests = [pool.write(number, torch.zeros(2, 1, 4, 4), torch.zeros(2).long(), {}) for number in (0, 1)]
    csv = tmp_path / "found.csv"
    csv.write_text("a,b\n1,2\n", encoding="utf-8")
    seen = Provenance(torch.device("cpu"))
    seen.data["digits"] = "0123"
    seen.network("somebody", weights)
    seen.pool("pool", pool)
    file = seen.write(csv)
    assert file == tmp_path / "found.json"
    about = json.loads(file.read_text(encoding="utf-8"))
    assert about["command"] == "kdbench judge pool --by somebody"
    assert about["kdbench"] == kdbench.__version__ and about["git"] is None or len(about["git"]["commit"]) == 40
    assert about["machine"]["torch"] == torch.__version__ and about["machine"]["device"] == "cpu"
    assert about["data"] == [{"name": "digits", "fingerprint": "0123"}]
    assert about["networks"] == [{"name": "somebody", "sha256": hashlib.sha256(b"weights").hexdigest()}]
    of_all = hashlib.sha256("".join(f"{one}\n" for one in digests).encode()).hexdigest()
    assert about["pools"] == [{"name": "pool", "batches": 2, "sha256": of_all}]
    assert about["csv"] == {"name": "found.csv", "sha256": hashlib.sha256(csv.read_bytes()).hexdigest()}
    assert str(tmp_path) not in file.read_text(encoding="utf-8")
    first = file.read_bytes()
    assert seen.write(csv).read_bytes() == first, "the same analysis, the same file"
