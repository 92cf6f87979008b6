"""A run killed at any moment goes on with the same command, to bit-identical weights and the same record."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, Kdbench, Once
from filelock import FileLock
from kills import Strike, assert_alike, start, struck

from kdbench import load_student
from kdbench.data.augment import normalize
from kdbench.data.digits import load
from kdbench.errors import UserError
from kdbench.record import read_record


def words(runs: Path) -> list[str | Path]:
    return ["run", *TINY, "--runs", runs, "--checkpoint-seconds", "0", "--jobs", "1", "--threads", "1"]


@pytest.fixture(scope="module")
def whole(once: Once, command_line: Kdbench) -> Path:
    """What an uninterrupted run leaves."""
    return once("whole", lambda folder: command_line(*words(folder), cwd=folder))


@pytest.mark.slow
def test_killed_at_bad_moments(whole: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    """One run, killed again and again: inside the write of a checkpoint, while the teacher trains; at a switch of
    stages; right after a checkpoint took its place, the command alone, which its worker has to notice; and between two
    records."""
    struck(words(tmp_path), Strike("half a checkpoint", 7))
    struck(words(tmp_path), Strike("second stage", 0, "everybody"))
    struck(words(tmp_path), Strike("checkpoint", 11, "run"))
    struck(words(tmp_path), Strike("record", 1))
    kdbench(*words(tmp_path))
    assert_alike(tmp_path, whole)


def test_a_scheduler_or_a_closed_terminal_ends_a_run_as_an_interrupt_does(
    whole: Path, kdbench: Kdbench, tmp_path: Path
) -> None:
    """SIGTERM and SIGHUP to the whole group of processes leave a checkpoint, though none was due."""
    rarely = [*words(tmp_path), "--checkpoint-seconds", "1000"]
    for number, whom in ((30, "SIGTERM to all"), (90, "SIGHUP to all")):
        struck(rarely, Strike("step", number, whom))  # type: ignore[arg-type]
        assert [*tmp_path.rglob("checkpoint.pt")]
    kdbench(*words(tmp_path))
    assert_alike(tmp_path, whole)


def test_who_ends_a_run_may_say_so_until_it_has_left(whole: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    """Its last moments too, in which Python takes itself apart."""
    run = start([*words(tmp_path), "--checkpoint-seconds", "1000"])
    while not [*tmp_path.glob("tiny/*/metrics.jsonl")]:
        assert run.poll() is None
        time.sleep(0.05)
    while run.poll() is None:
        run.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert run.returncode == 130 and [*tmp_path.glob("tiny/*/checkpoint.pt")]
    said = kdbench(*words(tmp_path)).stderr
    assert re.search(r"continues? from (its|their) checkpoints?: .*, seed 0 at step \d+ of 60", said), said
    assert_alike(tmp_path, whole)


@pytest.mark.slow
def test_several_seeds_in_one_program_are_the_cells_alone_also_when_killed(
    once: Once, command_line: Kdbench, kdbench: Kdbench, tmp_path: Path
) -> None:
    """By default that is so on a GPU alone; the records say it, and nothing else differs."""
    few = ("seeds=2", "steps=30", "evaluations=3")
    alone = once("two seeds", lambda folder: command_line(*words(folder), *few, cwd=folder))
    together = [*words(tmp_path), *few, "--seeds-together"]
    struck(together, Strike("second stage", 1))
    struck(together, Strike("record", 2))
    kdbench(*together)
    records = [json.loads(file.read_text()) for file in (tmp_path / "tiny").glob("*/record.json")]
    assert len(records) == 4 and {record["compute"]["cohort"] for record in records} <= {1, 2}
    assert 2 in {record["compute"].get("seeds_together") for record in records}
    assert_alike(tmp_path, alone)


@pytest.mark.slow
def test_the_best_weights_are_kept_also_when_killed(
    once: Once, command_line: Kdbench, kdbench: Kdbench, tmp_path: Path
) -> None:
    few = ("compare.method=[ab]", "steps=24", "evaluations=6", "keep=best")
    alone = once("best", lambda folder: command_line(*words(folder), *few, cwd=folder))
    folder = next((alone / "tiny").glob("ab-*"))
    record = read_record(folder)
    best = record.best
    assert best is not None and best.part == "test" and best.step == record.result.test.best_step
    assert best.accuracy == pytest.approx(record.result.test.best, abs=1e-4)
    # It is the same cell as without them, with the same last weights.
    assert record.resolved is not None
    assert record.identity == record.resolved.model_copy(update={"keep": None}).identity()
    data = load(roots=[], download=False, cache=tmp_path)
    own = record.resolved.protocol.normalization
    for weights, expected in (("last", record.result.test.last), ("best", record.result.test.best)):
        student = load_student(folder, weights=weights)  # type: ignore[arg-type]
        with torch.no_grad():
            answers = student(normalize(data.test_images, own.mean, own.std)).argmax(dim=1)
        assert 100 * (answers == data.test_labels).double().mean().item() == pytest.approx(expected, abs=1e-3)
    struck([*words(tmp_path), *few], Strike("checkpoint", 11, "run"))
    struck([*words(tmp_path), *few], Strike("record", 0))
    kdbench(*words(tmp_path), *few)
    assert_alike(tmp_path, alone)
    again = next((tmp_path / "tiny").glob("ab-*"))
    assert len(list(again.glob("*.safetensors"))) == 3
    # A changed record is told.
    verified = kdbench("verify", tmp_path / "tiny", *TINY[1:])
    assert "everything agrees" in verified.stdout
    plain = json.loads((again / "record.json").read_text())
    plain["best"]["step"] += 1
    (again / "record.json").write_text(json.dumps(plain))
    assert "best is" in kdbench("verify", tmp_path / "tiny", *TINY[1:], code=1).stdout
    # A cell that kept none has none to load.
    del plain["best"]
    (again / "record.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match="kept no weights of its best"):
        load_student(again, weights="best")


@pytest.mark.long
def test_killed_at_random_moments(whole: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    """Twenty kills spread over few runs: each run is killed until it is through, alternately the command alone and the
    whole process group."""
    chance = random.Random(0)
    begin = time.monotonic()
    assert start(words(tmp_path / "measured")).wait(timeout=300) == 0
    seconds = time.monotonic() - begin
    kills = number = 0
    while kills < 20:
        folder = tmp_path / str(number)
        number += 1
        for attempt in range(40):
            run = start(words(folder))
            try:
                # Late enough that every attempt gets somewhere, early enough to hit all parts of the run.
                code = run.wait(timeout=chance.uniform(0.3, 1.0) * seconds)
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
        assert_alike(folder, whole)


@pytest.mark.slow
def test_finished_cells_do_not_run_again_and_take_the_names_that_their_recipe_has_today(
    kdbench: Kdbench, tmp_path: Path
) -> None:
    """A title or label says nothing of the numbers, so it trains nothing anew; the table shows the new one."""
    short = ("steps=4", "evaluations=1")
    kdbench(*words(tmp_path / "runs"), "compare.method=[ce, kd, ab]", *short)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.safetensors")}
    renamed = ("compare.method=[ab, {name: kd, label: Hinton}, ce]", "title=Other words", "baseline=ce")
    done = kdbench(*words(tmp_path / "runs"), *renamed, *short)
    assert "3 finished before" in done.stderr
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.safetensors")} == files
    table = (tmp_path / "runs" / "tiny" / "table.md").read_text()
    # The plain student is on top in any case; the others are in today's order.
    assert "**Other words**" in table and table.index("| AB |") < table.index("| Hinton |")
    verified = kdbench("verify", tmp_path / "runs" / "tiny", *TINY[1:])
    assert "everything agrees" in verified.stdout


def test_a_second_run_on_one_folder_leaves(kdbench: Kdbench, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    with FileLock(tmp_path / "tiny" / ".run.lock"):
        done = kdbench(*words(tmp_path), code=2)
    assert "another run works in" in done.stderr
    assert [file.name for file in (tmp_path / "tiny").iterdir()] == [".run.lock"]
