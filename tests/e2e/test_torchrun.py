"""`torchrun -m kdbench run`: several processes train each cell together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, Kdbench, Once
from kills import Strike, struck

from kdbench.record import read_record

# As `torchrun --nproc-per-node 2 -m kdbench`, on a port of its own.
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kdbench")


def words(runs: Path) -> list[str]:
    return [str(word) for word in ("run", *TINY, "--runs", runs, "--checkpoint-seconds", "0", "--threads", "1")]


@pytest.fixture(scope="module")
def whole(once: Once, command_line: Kdbench) -> Path:
    """What an uninterrupted run of one process leaves."""
    return once("whole", lambda folder: command_line(*words(folder), "--jobs", "1", cwd=folder))


def start(words: list[str], strike: Strike | None = None, of_rank: int | None = None) -> subprocess.Popen[str]:
    paths = [str(ROOT), *([str(ROOT / "tests" / "killing")] if strike else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    if strike:
        environment |= {"STRIKE_WHEN": strike.when, "STRIKE_AFTER": str(strike.after), "STRIKE_AT_WHOM": strike.whom}
        environment |= {"STRIKE_RANK": "" if of_rank is None else str(of_rank)}
    return subprocess.Popen(
        [*TORCHRUN, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def records(runs: Path) -> list[dict[str, Any]]:
    return [read_record(file).model_dump(mode="json") for file in sorted(runs.glob("tiny/*/record.json"))]


def steps(runs: Path) -> list[list[int]]:
    files = sorted(runs.glob("tiny/*/metrics.jsonl"))
    return [[json.loads(line)["step"] for line in file.read_text().splitlines()] for file in files]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(whole: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    """One process is killed, then two ranks are, and one process goes on."""
    shutil.copytree(whole / "teachers", tmp_path / "teachers")
    struck([*words(tmp_path), "--jobs", "1"], Strike("step", 25))
    killed = start(words(tmp_path), Strike("step", 25))
    told = killed.communicate(timeout=200)[0]
    assert killed.returncode == 1, told
    assert not records(tmp_path)
    kdbench(*words(tmp_path))
    assert [record["compute"]["ranks"] for record in records(tmp_path)] == [[1, 2, 1]] * 2
    assert steps(tmp_path) == [sorted(set(one)) for one in steps(tmp_path)]


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_which_goes_on_with_the_same_command(whole: Path, tmp_path: Path) -> None:
    """Between the steps of two cells, whose teacher is there: the first one's steps are kept without a checkpoint."""
    shutil.copytree(whole / "teachers", tmp_path / "teachers")
    run = start([*words(tmp_path), "--checkpoint-seconds", "1000"], Strike("step", 25, "worker"), of_rank=1)
    told = run.communicate(timeout=200)[0]
    assert run.returncode == 1, told
    # Whichever comes first: torchrun's signal, or that the other rank is gone.
    ends = told.count("another rank has ended") + told.count("interrupted: what is finished is kept")
    assert ends == 1 and "Traceback" not in told.partition("Sending process")[0], told
    assert len([*tmp_path.glob("tiny/*/checkpoint.pt")]) == 1
    again = start(words(tmp_path))
    told = again.communicate(timeout=200)[0]
    assert again.returncode == 0, told
    assert [record["compute"]["ranks"] for record in records(tmp_path)] == [[2]] * 2
    assert told.count("accuracy, last epoch") == 1


@pytest.mark.slow
def test_an_interrupt_leaves_checkpoints_of_all_cells(whole: Path, tmp_path: Path) -> None:
    """Of all ranks alike: at the same step."""
    shutil.copytree(whole / "teachers", tmp_path / "teachers")
    run = start([*words(tmp_path), "steps=2000", "--checkpoint-seconds", "1000"])
    while not [*tmp_path.glob("tiny/*/metrics.jsonl")]:
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    told = run.communicate(timeout=200)[0]
    assert run.returncode != 0, told
    until = time.monotonic() + 60
    while len([*tmp_path.glob("tiny/*/checkpoint.pt")]) < 2:
        assert time.monotonic() < until, told
        time.sleep(0.1)


@pytest.mark.slow
def test_what_ranks_cannot_train_together_is_told_before_anything_trains(tmp_path: Path) -> None:
    run = start([*words(tmp_path), "compare.method=[prune_real]"])
    told = run.communicate(timeout=200)[0]
    assert run.returncode == 1
    assert "'taylor_pruning' is made for one process" in told
    assert not [*tmp_path.rglob("record.json")]
