"""Runs that end at a chosen moment, whatever the speed of the machine: their worker kills or interrupts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

# As a shell without job control starts a background job. Whoever starts the tests, this is what the run gets.
INTERRUPTS_IGNORED = ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")
TIMES = {"seconds", "training_seconds", "images_per_second", "cohort", "seeds_together", "git", "peak_memory_bytes"}


class Strike(NamedTuple):
    """When, after how many such moments, and at whom."""

    when: Literal["step", "second stage", "record", "half a checkpoint", "checkpoint"]
    after: int
    whom: Literal["worker", "run", "everybody", "interrupt", "SIGTERM to all", "SIGHUP to all"] = "worker"


CODES = {"worker": 1, "run": -signal.SIGKILL, "everybody": -signal.SIGKILL}
CODES |= dict.fromkeys(("interrupt", "SIGTERM to all", "SIGHUP to all"), 130)


def start(words: Sequence[str | Path], strike: Strike | None = None) -> subprocess.Popen[bytes]:
    """A command in a session of its own."""
    environment = dict(os.environ)
    if strike is not None:
        paths = [str(Path(__file__).parent / "killing"), os.environ.get("PYTHONPATH", "")]
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "STRIKE_WHEN": strike.when}
        environment |= {"STRIKE_AFTER": str(strike.after), "STRIKE_AT_WHOM": strike.whom}
    return subprocess.Popen(
        [*INTERRUPTS_IGNORED, sys.executable, "-m", "kdbench", *map(str, words)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )


def struck(words: Sequence[str | Path], strike: Strike) -> None:
    """Start a command and see it end by a strike."""
    run = start(words, strike)
    try:
        code = run.wait(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise
    assert code == CODES[strike.whom], f"{code} after {strike}"


def without_times(value: Any) -> Any:
    """A record without what differs between two runs of one cell."""
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def left_by(runs: Path) -> dict[str, Any]:
    """What a run left, by the file's place: weights, routes and logits as bytes, records and metrics without times."""
    found: dict[str, Any] = {}
    for file in sorted(runs.rglob("*")):
        # A picture that was being written stays beside the cells, hidden; a cell that is finished is tidy.
        assert not (file.name.endswith(".part") and (file.parent / "record.json").exists()), file
        name = str(file.relative_to(runs))
        if file.suffix == ".safetensors":
            found[name] = file.read_bytes()
        elif file.name in ("record.json", "index.json"):
            found[name] = without_times(json.loads(file.read_text()))
        elif file.name == "metrics.jsonl":
            found[name] = [without_times(json.loads(line)) for line in file.read_text().splitlines()]
    return found


def assert_alike(runs: Path, whole: Path) -> None:
    """Two folders hold the same."""
    got, expected = left_by(runs), left_by(whole)
    assert got.keys() == expected.keys() and expected
    assert [name for name, value in expected.items() if got[name] != value] == []
