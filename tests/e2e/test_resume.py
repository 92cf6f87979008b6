"""A run killed at any moment goes on with the same command, to bit-identical weights and the same record."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Kdbench

HERE = Path(__file__).parent
TIMES = {"seconds", "training_seconds", "images_per_second", "cohort", "git", "peak_memory_bytes"}


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        "run",
        str(HERE / "recipes" / "tiny.yaml"),
        "--registry",
        str(HERE / "registry"),
        "--runs",
        str(folder),
        "--checkpoint-seconds",
        "0",
        "--jobs",
        "1",
        "--threads",
        "1",
        *more,
    ]


# As a shell without job control starts a background job. Whoever starts the tests, this is what the run gets.
INTERRUPTS_IGNORED = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"]


def start(folder: Path, *more: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*INTERRUPTS_IGNORED, sys.executable, "-m", "kdbench", *arguments(folder, *more)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | environment,
    )


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def left_by(folder: Path) -> dict[str, Any]:
    """What a run left, cell by cell: weights and logits as bytes, record and metrics without times."""
    found = {}
    for record in sorted(folder.rglob("record.json")):
        cell = record.parent
        found[cell.name] = {
            "weights": (cell / "student.safetensors").read_bytes(),
            "logits": (cell / "test_logits.safetensors").read_bytes(),
            "record": without_times(json.loads(record.read_text())),
            "metrics": [without_times(json.loads(line)) for line in (cell / "metrics.jsonl").read_text().splitlines()],
        }
        assert not list(cell.glob("*.part")) and not list(cell.glob(".*.part"))
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], float]]:
    """What an uninterrupted run leaves, and how long it takes."""
    folder = tmp_path_factory.mktemp("whole")
    begin = time.monotonic()
    assert start(folder).wait(timeout=300) == 0
    yield left_by(folder), time.monotonic() - begin


def same(folder: Path, expected: dict[str, Any]) -> None:
    got = left_by(folder)
    assert got.keys() == expected.keys()
    for cell, parts in expected.items():
        for part, value in parts.items():
            assert got[cell][part] == value, f"{cell}: {part} differs"


@pytest.mark.slow
def test_killed_at_random_moments(uninterrupted: tuple[dict[str, Any], float], tmp_path: Path) -> None:
    """Twenty kills spread over few runs: each run is killed until it is through, alternately the command alone (its
    worker has to notice) and the whole process group."""
    expected, whole = uninterrupted
    chance = random.Random(0)
    kills = 0
    number = 0
    while kills < 20:
        folder = tmp_path / str(number)
        number += 1
        for attempt in range(40):
            run = start(folder)
            try:
                # Late enough that every attempt gets somewhere, early enough to hit all parts of the run.
                code = run.wait(timeout=chance.uniform(0.3, 1.0) * whole)
            except subprocess.TimeoutExpired:
                if attempt % 2:
                    os.killpg(run.pid, signal.SIGKILL)
                else:
                    run.kill()
                run.wait()
                kills += 1
                continue
            assert code == 0
            break
        same(folder, expected)


KILLER = """
import os, signal
moment, count = os.environ.get("KILL_AT", ""), int(os.environ.get("KILL_COUNT", "0"))

def strike():
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), signal.SIGKILL)

def arm():
    import kdbench.engine.checkpoint as checkpoint, kdbench.engine.finish as finish, torch
    from kdbench.engine.member import Member
    if moment == "write":
        save = torch.save
        def half(state, file):
            save(state, file)
            with open(file, "r+b") as stream:
                stream.truncate(os.path.getsize(file) // 2)
            strike()
            save(state, file)
        torch.save = half
    elif moment == "replace":
        replace = os.replace
        def after(source, target):
            replace(source, target)
            if str(target).endswith("checkpoint.pt"):
                strike()
        os.replace = after
    elif moment == "stage":
        enter = Member.enter
        def at_switch(self, stage):
            if stage == 1:
                strike()
            enter(self, stage)
        Member.enter = at_switch
    elif moment == "record":
        write = finish.write_json
        def before(file, data):
            strike()
            write(file, data)
        finish.write_json = before

if moment:
    import sys, importlib.abc
    class Hook(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name == "kdbench.engine.cohort" and self in sys.meta_path:
                sys.meta_path.remove(self)
                arm()
    sys.meta_path.insert(0, Hook())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "count"), [("write", 7), ("write", 25), ("replace", 11), ("stage", 0), ("record", 1), ("record", 2)]
)
def test_killed_at_bad_moments(
    moment: str, count: int, uninterrupted: tuple[dict[str, Any], float], tmp_path: Path
) -> None:
    """Inside the write of a checkpoint, right after it took its place, at a switch of stages, before a record."""
    expected, _ = uninterrupted
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    run = start(tmp_path / "runs", KILL_AT=moment, KILL_COUNT=str(count), PYTHONPATH=str(tmp_path))
    assert run.wait(timeout=300) != 0, "the run was not killed: the test tests nothing"
    assert left_by(tmp_path / "runs") != expected
    assert start(tmp_path / "runs").wait(timeout=300) == 0
    same(tmp_path / "runs", expected)


@pytest.mark.slow
def test_interrupt_leaves_a_checkpoint_and_130(tmp_path: Path) -> None:
    run = start(tmp_path, "steps=2000", "--checkpoint-seconds", "1000")
    deadline = time.monotonic() + 120
    # The students' own, not the teacher's: between the two there is nothing to checkpoint.
    while not list(tmp_path.glob("tiny/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(timeout=60) == 130
    assert list(tmp_path.glob("tiny/*/checkpoint.pt"))


@pytest.mark.slow
def test_finished_cells_do_not_run_again(kdbench: Kdbench, tmp_path: Path) -> None:
    kdbench(*arguments(tmp_path / "runs"))
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("record.json")}
    begin = time.monotonic()
    done = kdbench(*arguments(tmp_path / "runs"))
    assert time.monotonic() - begin < 8
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("record.json")} == before
    assert "2 finished before" in done.stderr


@pytest.mark.slow
def test_finished_cells_take_the_names_that_their_recipe_has_today(kdbench: Kdbench, tmp_path: Path) -> None:
    """A title or label says nothing of the numbers, so it trains nothing anew; the table shows the new one."""
    short = ("steps=4", "evaluations=1")
    kdbench(*arguments(tmp_path / "runs", "compare.method=[ce, kd, ab]", *short))
    weights = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("student.safetensors")}
    renamed = ("compare.method=[ab, {name: kd, label: Hinton}, ce]", "title=Other words", "baseline=ce")
    done = kdbench(*arguments(tmp_path / "runs", *renamed, *short))
    assert "3 finished before" in done.stderr
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("student.safetensors")} == weights
    table = (tmp_path / "runs" / "tiny" / "table.md").read_text()
    # The plain student is on top in any case; the others are in today's order.
    assert "**Other words**" in table and table.index("| AB |") < table.index("| Hinton |")
    verified = kdbench("verify", tmp_path / "runs" / "tiny", "--registry", HERE / "registry")
    assert "everything agrees" in verified.stdout


@pytest.mark.slow
def test_two_runs_on_one_folder(kdbench: Kdbench, tmp_path: Path, uninterrupted: tuple[dict[str, Any], float]) -> None:
    """The second says so and leaves with 2; the first is not disturbed."""
    expected, _ = uninterrupted
    first = start(tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "tiny" / ".run.lock").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    second = kdbench(*arguments(tmp_path), code=2)
    assert "another run works in" in second.stderr
    assert first.wait(timeout=300) == 0
    same(tmp_path, expected)
