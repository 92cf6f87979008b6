"""`kdbench run --ray`: workers on the nodes of a cluster, with kills. The nodes are on this machine, each with a home
of its own, so that nothing is on a node that was not sent there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from conftest import ROOT, TINY, Kdbench, Once
from kills import assert_alike
from picture_files import write_pictures

from kdbench.engine.options import Cluster
from kdbench.engine.workers import ray_pool
from kdbench.engine.workers.messages import Settings
from kdbench.engine.workers.ray_pool import RayPool
from kdbench.errors import UserError
from kdbench.record import read_record

pytest.importorskip("ray", reason="the extra kdbench[ray] is not installed")
# Whatever the tester's own clusters ask for; and no token is left in the tester's home.
NO_TOKENS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
# A node's actors are killed whenever they have taken so many steps: not half of a cell's.
STRIKE = {"STRIKE_WHEN": "step", "STRIKE_AFTER": "25", "STRIKE_AT_WHOM": "run"}


PICTURES = """
datasets:
  few_pictures:
    target: "kdbench.data.pictures:load"
    streamed: true
    args: {folder: few_pictures, short_side: 28}
    title: A few pictures
    classes: 3
    channels: 3
    image_size: 24
    train: 15
    test: 6
    normalization: {mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
"""
FEW = "{data: few_pictures, student: wrn_10_1, protocol: digits, method: ce, steps: 4, evaluations: 2}"

# A teacher taught by another one keeps its route.
COMMON = "data: {name: digits, per_class: 10}\nstudent: wrn_10_1\nprotocol: digits\nsteps: 12\nevaluations: 2\n"
CHAIN = {
    "cards/cards.yaml": "teachers:\n"
    "  large: {model: wrn_10_1, data: digits, recipe: ../large.yaml}\n"
    "  assistant: {model: wrn_10_1, data: digits, recipe: ../assistant.yaml}\n",
    "large.yaml": f"{COMMON}method: ce\n",
    "assistant.yaml": f"{COMMON}teacher: large\nmethod: kd\nroute: 4\n",
    "chain.yaml": f"{COMMON}teacher: assistant\ncompare: {{method: [kd, rco]}}\n",
    "mutual.yaml": f"{COMMON}teacher: {{model: wrn_10_1, untrained: true}}\nmethod: dml\n",
}


class Nodes:
    """A cluster of this machine."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster as Started

        self.folder, self.number = folder, 0
        os.environ |= NO_TOKENS
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80_000_000}
        self.cluster = Started(initialize_head=True, head_node_args=head)

    def add(self, **environment: str) -> Any:
        """A node with one core, and this environment."""
        self.number += 1
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "killing")])
        own = {"KDBENCH_HOME": str(self.folder / f"node{self.number}"), "PYTHONPATH": paths} | environment
        with pytest.MonkeyPatch.context() as patch:
            for name, value in own.items():
                patch.setenv(name, value)
            return self.cluster.add_node(num_cpus=1, object_store_memory=80_000_000)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    started = Nodes(tmp_path_factory.mktemp("cluster"))
    yield started
    started.cluster.shutdown()


@pytest.fixture
def nodes(head: Nodes) -> Iterator[Nodes]:
    """A cluster in which nobody computes yet."""
    yield head
    for node in [*head.cluster.worker_nodes]:
        head.cluster.remove_node(node, allow_graceful=False)


def words(runs: Path) -> list[str]:
    given = ["run", *TINY, "--runs", runs, "--checkpoint-seconds", "0", "--jobs", "1", "--threads", "1"]
    return [str(word) for word in given]


def on_ray(runs: Path, nodes: Nodes) -> list[str]:
    return [*words(runs), "--jobs", "2", "--ray", nodes.cluster.address]


def start(words: list[str]) -> subprocess.Popen[str]:
    """A command in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "kdbench", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | NO_TOKENS | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def until(condition: Any, run: subprocess.Popen[str], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < end, run.kill()
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_nodes_actors_and_runs_leave_what_a_local_run_leaves(
    once: Once, command_line: Kdbench, nodes: Nodes, tmp_path: Path
) -> None:
    """The run is killed while its teacher trains, whose actors are killed every few steps, and started again; then a
    node is lost with an unfinished cell on it."""
    whole = once("whole", lambda folder: command_line(*words(folder), cwd=folder))
    lost = nodes.add(**STRIKE)
    first = start(on_ray(tmp_path, nodes))
    until(lambda: [*tmp_path.glob("teachers/*/checkpoint.pt")], first)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    again = start(on_ray(tmp_path, nodes))
    until(lambda: [*tmp_path.glob("tiny/*/checkpoint.pt")], again)
    nodes.cluster.remove_node(lost, allow_graceful=False)
    nodes.add()
    nodes.add()
    told = again.communicate(timeout=300)[0]
    assert again.returncode == 0, told
    assert "its node or its actor is lost" in told and "accuracy, last epoch" in told
    assert_alike(tmp_path, whole)


@pytest.mark.slow
def test_what_ends_a_run_leaves_checkpoints_and_no_actors(
    once: Once, command_line: Kdbench, nodes: Nodes, tmp_path: Path
) -> None:
    """None was due; and Ray would answer SIGTERM in its own way. A second signal does not make the run leave without
    them. The one core that there is has to be free for the same command again."""
    whole = once("whole", lambda folder: command_line(*words(folder), cwd=folder))
    shutil.copytree(whole / "teachers", tmp_path / "teachers")
    # Its workers stand still after 25 steps of both cells (of the first run's, some are those of a trial), until their
    # run leaves.
    nodes.add(**STRIKE | {"STRIKE_AFTER": "50", "STRIKE_AT_WHOM": "nobody"})

    def evaluated(step: int) -> Any:
        return lambda: sum(f'"step": {step},' in f.read_text() for f in tmp_path.glob("tiny/*/metrics.jsonl")) == 2

    for numbers, step in (([signal.SIGTERM], 10), ([signal.SIGHUP, signal.SIGTERM], 30)):
        # One worker for both cells, also while Ray still counts the nodes of the test before.
        run = start([*words(tmp_path), "--checkpoint-seconds", "1000", "--ray", nodes.cluster.address])
        until(evaluated(step), run)
        for number in numbers:
            run.send_signal(number)
            time.sleep(0.5)
        told = run.communicate(timeout=300)[0]
        assert run.returncode == 130 and "interrupted: what is finished is kept" in told, told
        kept = [torch.load(file, weights_only=False)["step"] for file in tmp_path.glob("tiny/*/checkpoint.pt")]
        assert "Traceback" not in told and len(kept) == 2 and min(kept) >= step, told
    command_line(*words(tmp_path), cwd=tmp_path)
    assert_alike(tmp_path, whole)


@pytest.mark.slow
def test_on_this_machine_alone(once: Once, command_line: Kdbench, tmp_path: Path) -> None:
    whole = once("whole", lambda folder: command_line(*words(folder), cwd=folder))
    run = start([*words(tmp_path), "--ray", "local"])
    told = run.communicate(timeout=200)[0]
    assert run.returncode == 0, told
    assert_alike(tmp_path, whole)


@pytest.mark.slow
def test_routes_chains_and_networks_that_teach_each_other(command_line: Kdbench, nodes: Nodes, tmp_path: Path) -> None:
    """Teachers by recipe reach nodes that share no folder, whose actors are killed again and again."""
    nodes.add(**STRIKE), nodes.add()
    for name, text in CHAIN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for recipe in ("chain.yaml", "mutual.yaml"):
        given = ["run", recipe, "--registry", "cards", "--jobs", "1", "--threads", "1", "--checkpoint-seconds", "0"]
        command_line(*given, "--runs", "here", cwd=tmp_path)
        command_line(*given, "--runs", "far", "--jobs", "2", "--ray", nodes.cluster.address, cwd=tmp_path)
    assert len([*tmp_path.glob("far/teachers/*/record.json")]) == 2
    assert_alike(tmp_path / "far", tmp_path / "here")


@pytest.mark.slow
def test_pictures_and_tables_of_logits_reach_nodes(
    once: Once, command_line: Kdbench, nodes: Nodes, tmp_path: Path
) -> None:
    nodes.add()
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "cards.yaml").write_text(PICTURES)
    write_pictures(tmp_path / "data" / "few_pictures")
    (tmp_path / "few.yaml").write_text(FEW)
    streamed = ["run", "few.yaml", "--registry", "cards", "--jobs", "1", "--threads", "1"]
    whole = once("whole", lambda folder: command_line(*words(folder), cwd=folder))
    shutil.copytree(whole / "teachers", tmp_path / "a" / "teachers")
    shutil.copytree(whole / "teachers", tmp_path / "b" / "teachers")
    tiny = [*map(str, TINY), "steps=12", "compare.method=[kd]"]
    home = {"KDBENCH_HOME": str(tmp_path / "home")}
    command_line("logits", "fill", *tiny, "--runs", "a", cwd=tmp_path, **home)
    with_table = ["run", *tiny, "--jobs", "1", "--threads", "1"]
    for command in (streamed, with_table):
        command_line(*command, "--runs", "a", cwd=tmp_path, **home)
        command_line(*command, "--runs", "b", "--ray", nodes.cluster.address, cwd=tmp_path, **home)
    (file,) = (tmp_path / "b").glob("tiny/*/record.json")
    assert read_record(file).compute.teacher_logits == "table"
    assert_alike(tmp_path / "b", tmp_path / "a")


@pytest.mark.slow
def test_nodes_of_another_version_are_told_before_training(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.add()
    monkeypatch.setattr(ray_pool, "versions", lambda: {"kdbench": "0.0", "torch": "1.0", "files": "0"})
    pool = RayPool(Cluster(nodes.cluster.address), "cpu", 1, (), Settings(), tmp_path)
    with pytest.raises(UserError, match=r"the node .* has .*, here there is .*'torch': '1.0'"):
        pool.__enter__()


@pytest.mark.long
def test_the_quickstart_on_two_nodes_is_that_of_one_machine(
    command_line: Kdbench, nodes: Nodes, tmp_path: Path
) -> None:
    """To the last digit of its table. The run is killed when a fourth of its cells is finished; when half of them is, a
    node is, and another one comes."""
    whole, far = tmp_path / "whole", tmp_path / "far"
    given = ["run", "quickstart", "--no-adopt", "--threads", "1", "--jobs", "2", "--checkpoint-seconds", "5", "--runs"]
    lost, _ = nodes.add(), nodes.add()
    over = [*given, str(far), "--ray", nodes.cluster.address]

    def finished(cells: int) -> Any:
        return lambda: len([*far.glob("quickstart/*/record.json")]) >= cells

    first = start(over)
    until(finished(10), first, 3600)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    again = start(over)
    until(finished(20), again, 3600)
    nodes.cluster.remove_node(lost, allow_graceful=False)
    nodes.add()
    told = again.communicate(timeout=3600)[0]
    assert again.returncode == 0 and "its node or its actor is lost" in told, told
    command_line(*given, whole, cwd=tmp_path, timeout=3600)
    assert_alike(far, whole)
    tables = [pandas.read_csv(runs / "quickstart" / "table.csv") for runs in (far, whole)]
    pandas.testing.assert_frame_equal(
        *(table.drop(columns=["training_seconds", "images_per_second"]) for table in tables)
    )
    texts = [(runs / "quickstart" / "table.md").read_text().partition("Agreement")[0] for runs in (far, whole)]
    assert texts[0] == texts[1]
