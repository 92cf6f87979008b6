"""How tasks are shared out among workers and devices, with workers that only say what they were given."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kdbench.engine import pool
from kdbench.errors import UserError

WORKER = """
import json, os, sys, time
print(json.dumps({"event": "ready", "cuda": %s}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    if marker := task.get("dies"):
        open(marker, "w").close()
        os._exit(9)
    while task.get("after") and not os.path.exists(task["after"]):
        time.sleep(0.01)
    # Long enough for a death to be noticed.
    time.sleep(task.get("seconds", 0))
    print(json.dumps({"event": "done", "device": task["device"], "worker": os.getpid()}), flush=True)
"""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Makes a machine of so many GPUs, of 10 GB each."""
    start = subprocess.Popen

    def of(gpus: int) -> None:
        (tmp_path / "worker.py").write_text(WORKER % ([10_000_000_000] * gpus))
        stand_in = lambda command, **options: start([sys.executable, str(tmp_path / "worker.py")], **options)  # noqa: E731
        monkeypatch.setattr(pool.subprocess, "Popen", stand_in)

    return of


def done(device: str, jobs: int | None, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with pool.Pool(device, jobs, (), {}) as workers:
        return ended(workers, tasks)


def ended(workers: pool.Pool, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in workers.carry_out(tasks) if event["event"] in ("done", "failed")]


def tasks(n: int) -> list[dict[str, Any]]:
    return [{"cells": [{"id": i}]} for i in range(n)]


def test_tasks_spread_over_all_gpus_one_worker_each(machine: Any) -> None:
    machine(3)
    found = done("auto", None, tasks(9))
    by_worker = {event["worker"]: event["device"] for event in found}
    assert sorted(by_worker.values()) == ["cuda:0", "cuda:1", "cuda:2"]
    assert sorted(cell for event in found for cell in event["cells"]) == list(range(9))


def test_more_workers_than_gpus_share_them_and_their_memory(machine: Any) -> None:
    machine(2)
    with pool.Pool("cuda", 4, (), {}) as workers:
        found = ended(workers, tasks(8))
        assert workers.memory == pytest.approx(pool.SHARE * 5e9)
    by_worker = {event["worker"]: event["device"] for event in found}
    assert Counter(by_worker.values()) == {"cuda:0": 2, "cuda:1": 2}


def test_what_takes_a_dead_workers_place_takes_its_device(machine: Any, tmp_path: Path) -> None:
    machine(2)
    first, second, *rest = ({**task, "after": str(tmp_path / "dead"), "seconds": 0.2} for task in tasks(8))
    found = done("auto", None, [first, {**second, "dies": str(tmp_path / "dead")}, *rest])
    assert [event["event"] for event in found].count("failed") == 1
    by_worker = {event["worker"]: event["device"] for event in found if event["event"] == "done"}
    assert sorted(by_worker.values()) == ["cuda:0", "cuda:1"]


def test_one_gpu_may_be_named_and_must_be_there(machine: Any) -> None:
    machine(2)
    assert {event["device"] for event in done("cuda:1", None, tasks(2))} == {"cuda:1"}
    with pytest.raises(UserError, match="no device cuda:2"):
        done("cuda:2", None, tasks(1))


def test_without_a_gpu_auto_is_the_processor_and_cuda_an_error(machine: Any) -> None:
    machine(0)
    assert {event["device"] for event in done("auto", 2, tasks(3))} == {"cpu"}
    with pytest.raises(UserError, match="no CUDA device"):
        done("cuda", 1, tasks(1))
