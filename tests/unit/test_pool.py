"""How tasks are shared out among workers and devices, with workers that only say what they were given."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from kdbench.engine.computing import device as devices
from kdbench.engine.computing.compute import REFERENCE
from kdbench.engine.workers import pool
from kdbench.engine.workers.messages import (
    CellTask,
    CheckCells,
    Doing,
    Event,
    Failed,
    Gone,
    ReadFingerprint,
    Settings,
    Task,
    TrainCells,
    read_line,
)
from kdbench.errors import CellError, UserError
from kdbench.recipe.planning import plan
from kdbench.registry import Registry

WORKER = """
import json, os, sys, time
print("Ready", json.dumps({"cuda": %s}), flush=True)
for line in sys.stdin:
    task = json.loads(line.partition(" ")[2])
    number, dead = task["threads"], %r
    if number == 99:
        open(dead, "w").close()
        os._exit(9)
    while number >= 100 and not os.path.exists(dead):
        time.sleep(0.01)
    # Long enough for every worker to get its part, and for a death to be noticed.
    time.sleep(0.2)
    text = f"{os.getpid()} {task['device']} {number}"
    print("Doing", json.dumps({"text": text}), flush=True)
    print("Done {}", flush=True)
"""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Makes a machine of so many GPUs, of 10 GB each."""
    start = subprocess.Popen

    def of(gpus: int) -> None:
        (tmp_path / "worker.py").write_text(WORKER % ([10_000_000_000] * gpus, str(tmp_path / "dead")))
        stand_in = lambda command, **options: start([sys.executable, str(tmp_path / "worker.py")], **options)  # noqa: E731
        monkeypatch.setattr(pool.subprocess, "Popen", stand_in)

    return of


def done(device: str, jobs: int | None, tasks: list[Task]) -> list[Event]:
    with pool.Pool(device, jobs, (), Settings()) as workers:
        return list(workers.carry_out(tasks))


def where(events: list[Event]) -> list[list[str]]:
    """Worker, device and number of each task that was done."""
    return [event.text.split() for event in events if isinstance(event, Doing)]


def tasks(n: int) -> list[Task]:
    """Tasks that are told apart by their threads."""
    return [CheckCells(specs=[], threads=i) for i in range(n)]


def test_ranks_of_a_node_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun allows each one thread where nobody said anything."""
    monkeypatch.setattr(pool.os, "sched_getaffinity", lambda pid: range(16))
    for allowed, here, threads in (("1", "4", 4), ("3", "4", 3), ("1", "1", 1), ("1", "32", 1)):
        monkeypatch.setenv("OMP_NUM_THREADS", allowed)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        assert pool.Pool("cpu", None, (), Settings()).threads == threads


def test_tasks_spread_over_all_gpus_one_worker_each(machine: Any) -> None:
    machine(3)
    found = where(done("auto", None, tasks(9)))
    by_worker = {worker: device for worker, device, _ in found}
    assert sorted(by_worker.values()) == ["cuda:0", "cuda:1", "cuda:2"]
    assert sorted(int(number) for _, _, number in found) == list(range(9))


def test_more_workers_than_gpus_share_them_and_their_memory(machine: Any) -> None:
    machine(2)
    with pool.Pool("cuda", 4, (), Settings()) as workers:
        found = where(list(workers.carry_out(tasks(8))))
        assert workers.memory == pytest.approx(pool.SHARE * 5e9)
    by_worker = {worker: device for worker, device, _ in found}
    assert Counter(by_worker.values()) == {"cuda:0": 2, "cuda:1": 2}


def test_what_takes_a_dead_workers_place_takes_its_device(machine: Any) -> None:
    machine(2)
    # The others wait for the death.
    first, *rest = [CheckCells(specs=[], threads=100 + i) for i in range(7)]
    found = done("auto", None, [first, CheckCells(specs=[], threads=99), *rest])
    assert sum(isinstance(event, Failed) for event in found) == 1
    by_worker = {worker: device for worker, device, _ in where(found)}
    assert sorted(by_worker.values()) == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(("dead", "begins"), [(2, True), (99, False)])
def test_a_first_worker_whose_node_is_lost_is_replaced_a_few_times(machine: Any, dead: int, begins: bool) -> None:
    class Nodes(pool.Pool):
        def _listen(self, number: int, worker: subprocess.Popen[str]) -> None:
            if number < dead:
                worker.kill()
                worker.wait()
                return self.events.put((number, Gone(code=1, lost=True)))
            return super()._listen(number, worker)

    machine(0)
    ends = nullcontext() if begins else pytest.raises(CellError, match="before it could begin")
    with ends, Nodes("cpu", 1, (), Settings()) as workers:
        assert len(where(list(workers.carry_out(tasks(3))))) == 3


def test_why_a_worker_ended_is_its_last_word(machine: Any, tmp_path: Path) -> None:
    machine(0)
    with pool.Pool("cpu", 1, (), Settings()) as workers:
        ended = 'print(\'Gone {"code": 1, "why": "another rank has ended"}\', flush=True); raise SystemExit(1)'
        (tmp_path / "worker.py").write_text(ended)
        workers._start()
        for _ in range(2):
            assert workers._next()[1] == Gone(code=1, why="another rank has ended")
        # A notebook starts many.
        assert workers.workers[1].stdout.closed


def test_a_failed_task_names_its_cells(machine: Any) -> None:
    machine(0)
    spec = plan("quickstart", Registry(), ("seeds=1", "compare.method=[ce]")).cells[0].spec
    cells = [CellTask(id=i, folder=Path("a"), spec=spec, names={"method": "ce"}) for i in (3, 5)]
    task = TrainCells(
        threads=99, cells=cells, computing=REFERENCE, logits=None, teacher_folder=None, shared=Path("shared")
    )
    (failed,) = [event for event in done("cpu", 1, [task]) if isinstance(event, Failed)]
    assert failed.cells == [3, 5]
    # What goes over the line comes out as it went in.
    read = read_line(Task, task.line())
    assert isinstance(read, TrainCells) and read == task
    assert read.cells[0].spec.identity() == spec.identity()


def test_one_gpu_may_be_named_and_must_be_there(machine: Any) -> None:
    machine(2)
    assert {device for _, device, _ in where(done("cuda:1", None, tasks(2)))} == {"cuda:1"}
    with pytest.raises(UserError, match="no device cuda:2"):
        done("cuda:2", None, tasks(1))


def test_without_a_gpu_auto_is_the_processor_and_cuda_an_error(machine: Any) -> None:
    machine(0)
    assert {device for _, device, _ in where(done("auto", 2, tasks(3)))} == {"cpu"}
    with pytest.raises(UserError, match="no CUDA device"):
        done("cuda", 1, tasks(1))


def test_a_gpu_that_torch_cannot_use_is_told(machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(0)
    script = tmp_path / "worker.py"
    script.write_text(script.read_text().replace('"cuda": []', '"cuda": [], "unusable": "the driver is too old"'))
    with pool.Pool("auto", 1, (), Settings()) as workers:
        assert workers.devices == ["cpu"] and workers.unusable == "the driver is too old"
    with pytest.raises(UserError, match="that torch can use: the driver is too old"):
        done("cuda", 1, tasks(1))
    # What a worker finds out: nothing without a driver, and torch's own reason with one.
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "none")
    assert devices.unusable_gpu() == ""
    monkeypatch.setattr(devices, "DRIVER", script)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def fails() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\nPlease update")

    monkeypatch.setattr(torch.cuda, "init", fails)
    assert devices.unusable_gpu() == "The NVIDIA driver on your system is too old"


@pytest.mark.parametrize(("asked", "chosen"), [("cuda", "cuda:0"), ("auto", "cuda:0"), ("cuda:1", "cuda:1")])
def test_a_gpu_is_always_used_by_its_number(asked: str, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.set_device refuses one without."""
    used: list[torch.device] = []
    monkeypatch.setattr(devices, "gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    device = devices.chosen_device(asked, print)
    assert str(device) == chosen and devices.use(device) == device
    devices.use(torch.device("cuda"))
    assert [str(one) for one in used] == [chosen, "cuda:0"]


def test_a_signal_that_does_not_wake_who_waits_ends_the_run_all_the_same(machine: Any) -> None:
    """As one does that comes between the last look and the wait; here another thread gets it."""
    machine(0)
    with pool.Pool("cpu", 1, (), Settings()) as workers:
        waited = threading.Timer(30, lambda: workers.events.put((0, Gone(code=1))))

        def strike() -> None:
            waited.start()
            time.sleep(0.3)
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)

        threading.Thread(target=strike).start()
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            # Waits for a death that does not come.
            list(workers.carry_out([CheckCells(specs=[], threads=100)]))
        waited.cancel()
        assert time.monotonic() - begin < 15
        for worker in workers.workers.values():
            worker.kill()


def test_a_worker_that_is_starting_is_spared_what_the_whole_group_is_sent(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(0)
    start = pool.subprocess.Popen

    def struck(*command: Any, **options: Any) -> Any:
        worker = start(*command, **options)
        for number in pool.ENDS:
            worker.send_signal(number)
        return worker

    monkeypatch.setattr(pool.subprocess, "Popen", struck)
    assert len(where(done("cpu", 2, tasks(3)))) == 3
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {*pool.ENDS}


def test_workers_are_left_all_at_once(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(0)
    monkeypatch.setattr(pool, "LEAVE_SECONDS", 0.3)
    monkeypatch.setattr(pool, "SPARED_SECONDS", 0.3)
    with pool.Pool("cpu", 5, (), Settings()) as workers:
        for _ in range(4):
            workers._start()
        for number in workers.workers:
            # Wait for a death that does not come.
            assert workers._send(number, CheckCells(specs=[], threads=100))
        begin = time.monotonic()
    assert time.monotonic() - begin < 1.2
    assert all(worker.wait(5) == -signal.SIGKILL for worker in workers.workers.values())


def test_a_worker_with_nothing_to_save_leaves_at_once(tmp_path: Path) -> None:
    """As in the middle of reading data, or of measuring a teacher."""
    (tmp_path / "slow_data.py").write_text(
        "import time\n\n\ndef data(**_):\n    print('reading', flush=True)\n    time.sleep(60)\n"
    )
    card = {"target": "slow_data:data", "classes": 2, "channels": 1, "image_size": 8, "train": 400, "test": 4}
    card |= {"title": "Slow", "normalization": {"mean": [0.5], "std": [0.5]}}
    (tmp_path / "cards.yaml").write_text(json.dumps({"datasets": {"slow": card}}))
    recipe = {"data": "slow", "student": "wrn_10_1", "method": "ce", "protocol": "digits"}
    spec = plan(recipe, Registry([tmp_path])).cells[0].spec
    worker = subprocess.Popen(
        [sys.executable, "-m", "kdbench.engine.workers.worker", str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert worker.stdin is not None and worker.stderr is not None
    worker.stdin.write(ReadFingerprint(data=spec.data, download=False).line())
    worker.stdin.flush()
    assert any("reading" in line for line in worker.stderr)
    begin = time.monotonic()
    worker.stdin.close()
    assert worker.wait(timeout=30) == 0
    assert time.monotonic() - begin < 5
