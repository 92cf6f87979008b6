"""What a node of a cluster is sent, and what comes back of it, without a cluster: its calls are made at once."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import two_ranks
from picture_files import write_pictures

from kdbench.cli import with_address
from kdbench.data.pictures import from_folders, load_listing, save_listing
from kdbench.data.sent import SUFFIX
from kdbench.engine.computing.compute import REFERENCE
from kdbench.engine.options import Cluster
from kdbench.engine.teachers.logit_files import ABOUT, VALUES, table_at
from kdbench.engine.workers.messages import CellTask, Failed, GivenData, TrainCells
from kdbench.engine.workers.ray_node import TABLES, Node, files_of
from kdbench.engine.workers.ray_pool import MOST_LOSSES, Losses, RayPool, RayWorker
from kdbench.engine.workers.ray_sending import Sending
from kdbench.errors import UserError
from kdbench.files import find_weights
from kdbench.reading import LARGEST

NOW: Any = SimpleNamespace(get=lambda value: value, put=lambda value: value)


class Called:
    """An actor whose calls are those of its object; `sent` lists the files that it was given."""

    def __init__(self, node: Node) -> None:
        self.node, self.sent = node, []

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Any:
            if name == "put":
                self.sent.append(arguments[0])
            return getattr(self.node, name)(*arguments)

        return SimpleNamespace(remote=remote)


@pytest.fixture
def actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Called:
    monkeypatch.setenv("KDBENCH_HOME", str(tmp_path / "home"))
    return Called(Node("run"))


def task(runs: Path, **changes: Any) -> TrainCells:
    spec = two_ranks.cell("kd").model_copy(update=changes)
    cell = CellTask(id=3, folder=runs / "mine" / "kd", spec=spec, names={})
    folders = {"teacher_folder": runs / "teachers" / "t", "shared": runs / "sources"}
    return TrainCells(cells=[cell], computing=REFERENCE, logits=None, **folders)


def written(folder: Path, **files: str) -> None:
    for name, text in files.items():
        file = folder / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_a_node_has_what_a_cell_goes_on_from_and_nothing_else(actor: Called, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    written(runs, mine__kd__checkpoint="whole", mine__kd__events__1="long", teachers__t__weights="w", other__kd__x="no")
    written(actor.node.folder / "runs", mine__kd__checkpoint="ahead", mine__kd__left="over")
    sending = Sending(NOW, runs)
    assert sending.folders(actor, task(runs)) == ["runs/mine/kd", "runs/teachers/t", "runs/sources"]
    there = {name: file.read_text() for name, file in files_of(actor.node.folder).items()}
    assert there == {"runs/mine/kd/checkpoint": "whole", "runs/teachers/t/weights": "w"}
    before = [*actor.sent]
    sending.folders(actor, task(runs))
    assert actor.sent == before, "what is there already is not sent again"


def test_tasks_name_the_nodes_folders(tmp_path: Path) -> None:
    moved = Sending(NOW, tmp_path).moved(task(tmp_path), Path("/node"))
    assert moved.cells[0].folder == Path("/node/runs/mine/kd")
    assert (moved.teacher_folder, moved.shared) == (Path("/node/runs/teachers/t"), Path("/node/runs/sources"))


def test_data_and_given_weights_are_sent_once(actor: Called, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, data="images", own__w="weights")
    weights = str(tmp_path / "own" / "w")
    order = task(tmp_path)
    spec = order.cells[0].spec
    order = task(tmp_path, student=spec.student.model_copy(update={"weights": weights}))
    sending = Sending(NOW, tmp_path)
    sending.given[spec.data.images_key()] = GivenData(fingerprint="f", file=tmp_path / "data")
    given = sending.give(actor, actor.node.folder, order)[spec.data.images_key()]
    assert given.file is not None and given.file.read_text() == "images" and given.fingerprint == "f"
    assert given.file.is_relative_to(actor.node.folder)
    before = [*actor.sent]
    sending.give(actor, actor.node.folder, order)
    assert actor.sent == before and len(before) == 2
    given.file.write_text("damaged on the node")
    sending.give(actor, actor.node.folder, order)
    assert given.file.read_text() == "images"
    # As a worker there finds it, whose run's own files it does not see.
    (tmp_path / "own" / "w").unlink()
    monkeypatch.setenv("KDBENCH_WEIGHTS", str(actor.node.folder / "weights"))
    found = find_weights(weights)
    assert found is not None and found.read_text() == "weights"


def test_pictures_are_used_where_they_lie_or_sent(actor: Called, tmp_path: Path) -> None:
    """By their content: a node has the same picture in the same place, another one there, or none."""
    root = write_pictures(tmp_path / "mine" / "some", classes=2, train=2, test=1)
    # As long as the listing of a million pictures, longer than other files may be.
    data = replace(from_folders(root, "some", tmp_path, 28), origin="x" * LARGEST)
    save_listing(listing := tmp_path / f"{data.fingerprint}{SUFFIX}", data, tmp_path)
    order = task(tmp_path)
    source = order.cells[0].spec.data.images_key()
    sending = Sending(NOW, tmp_path)
    sending.given[source] = GivenData(fingerprint=data.fingerprint, file=listing)
    # The driver's own places, of which the node lacks one and has another picture in a second.
    kept = [file.read_bytes() for file in data.train_files]
    lookup = {place: place.read_bytes() for place in (*data.train_files, *data.test_files)}
    gone, other = data.train_files[:2]
    settle_here = actor.node.pictures

    def pictures_there(name: str) -> list[str]:
        gone.unlink(missing_ok=True)
        other.write_bytes(b"another")
        try:
            return settle_here(name)
        finally:
            for place, content in lookup.items():
                place.write_bytes(content)

    actor.node.pictures = pictures_there  # type: ignore[method-assign]
    given = sending.give(actor, actor.node.folder, order)[source]
    assert sum(name.startswith("pictures/") for name in actor.sent) == 2
    found = load_listing(given.file)
    assert found.fingerprint == data.fingerprint and [file.read_bytes() for file in found.train_files] == kept
    assert {file.is_relative_to(actor.node.folder) for file in found.train_files[:2]} == {True}
    assert found.train_files[2:] == data.train_files[2:] and found.test_files == data.test_files
    before = [*actor.sent]
    sending.give(actor, actor.node.folder, order)
    assert actor.sent == before, "what is there already is not sent again"


def test_tables_of_teacher_logits_are_those_of_the_run(
    actor: Called, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = task(tmp_path)
    spec = order.cells[0].spec
    assert spec.teacher is not None
    key = {"images": 2, "views": 1, "classes": 1, "precision": "float32", "data": "f"}
    for name, data in ((spec.teacher.name, "f"), (spec.teacher.name, "other"), ("another teacher", "f")):
        table = table_at(key | {"data": data}, name)
        written(table.folder, **{VALUES: "12345678"})
        (table.folder / ABOUT).write_text(
            json.dumps({"name": name, "key": table.key, "done": 2, "seconds": 1.0, "sha256": "x"})
        )
    written(actor.node.folder / TABLES, old__x="cleared since")
    sending = Sending(NOW, tmp_path)
    written(tmp_path, data="images")
    sending.given[spec.data.images_key()] = GivenData(fingerprint="f", file=tmp_path / "data")
    sending.give(actor, actor.node.folder, order)
    wanted = table_at(key, spec.teacher.name)
    assert {*files_of(actor.node.folder / TABLES)} == {f"{wanted.folder.name}/{name}" for name in (VALUES, ABOUT)}
    assert table_at(key, spec.teacher.name, actor.node.folder / TABLES).done == 2


def test_a_node_that_cannot_keep_what_it_is_sent_is_told(tmp_path: Path) -> None:
    class Full(Exception):
        cause = OSError(28, "No space left on device")

    def fails(*_: Any) -> None:
        raise Full

    pool = RayPool(Cluster("auto"), "cpu", 1, (), two_ranks.Settings(), tmp_path)
    pool.ray = SimpleNamespace(exceptions=SimpleNamespace(RayTaskError=Full, RayError=Exception))
    pool.sending = SimpleNamespace(folders=fails)  # type: ignore[assignment]
    pool.workers[0] = RayWorker(None, tmp_path)
    assert not pool._send(0, task(tmp_path))
    _, event = pool.events.get_nowait()
    assert isinstance(event, Failed) and event.by_user and "No space left on device" in event.message


def test_what_arrives_damaged_is_refused(actor: Called) -> None:
    with pytest.raises(ValueError, match="another sha256"):
        actor.node.put("data/x", "0" * 64, b"content")
    assert not (actor.node.folder / "data" / "x").exists()


def test_what_a_worker_writes_comes_back_records_last(actor: Called, tmp_path: Path) -> None:
    node = actor.node
    node.worker = SimpleNamespace(stdin=SimpleNamespace(write=lambda line: None, flush=lambda: None))  # type: ignore[assignment]
    written(node.folder / "runs", a__checkpoint="1", b__other="task")
    node.send("", ["runs/a"])
    assert node.poll()[1] == []
    written(node.folder / "runs", a__record="r", a__student="s", b__other="changed")
    (node.folder / "runs" / "a" / "record").rename(node.folder / "runs" / "a" / "record.json")
    (node.folder / "runs" / "a" / "checkpoint").unlink()
    changed = dict(node.poll()[1])
    assert changed == {"runs/a/student": b"s", "runs/a/checkpoint": None, "runs/a/record.json": b"r"}
    assert [*changed][-1] == "runs/a/record.json"
    # The next task's folder is another one, and nothing of this one is gone by that.
    node.send("", ["runs/b"])
    assert node.poll()[1] == []


def test_a_node_writes_into_the_runs_folder_only(tmp_path: Path) -> None:
    pool = RayPool(Cluster("auto"), "cpu", 1, (), two_ranks.Settings(), tmp_path / "runs")
    pool._take("runs/a/checkpoint.pt", b"1")
    pool._take("runs/a/student", b"2")
    pool._take("runs/a/error.txt", b"3")
    for name in ("runs/a/checkpoint.pt", "runs/a/student", "runs/a/error.txt"):
        pool._take(name, None)
    assert {*files_of(tmp_path)} == {"runs/a/student"}
    # A run that was killed had received half of a file.
    half = tmp_path / "runs" / "a" / ".metrics.jsonl.1.part"
    half.touch()
    pool._take("runs/a/record.json", b"{}")
    assert not half.exists()
    for name in ("runs/../x", "other/x"):
        with pytest.raises(Exception, match=r"outside|subpath"):
            pool._take(name, b"x")


def test_a_task_that_kills_every_worker_is_given_up(tmp_path: Path) -> None:
    losses = Losses()
    for step in range(3 * MOST_LOSSES):
        losses.steps[3] = step
        assert losses.again(task(tmp_path)), "it comes further each time"
    assert [losses.again(task(tmp_path)) for _ in range(MOST_LOSSES)] == [True] * (MOST_LOSSES - 2) + [False] * 2


@pytest.mark.parametrize(
    ("there", "asked", "jobs", "expected"),
    [
        ({"CPU": 16.0, "GPU": 4.0}, {}, None, (4, 4, 1.0)),
        ({"CPU": 16.0, "GPU": 4.0}, {"gpus": 0.5}, None, (8, 2, 0.5)),
        ({"CPU": 16.0, "GPU": 4.0}, {"cpus": 8}, None, (2, 8, 1.0)),
        ({"CPU": 16.0, "GPU": 4.0}, {}, 3, (3, 4, 1.0)),
        ({"CPU": 6.0}, {}, None, (6, 1, 0.0)),
        ({"CPU": 6.0}, {"cpus": 4}, 8, (1, 4, 0.0)),
    ],
)
def test_workers_are_as_many_as_fit(
    there: dict[str, float], asked: dict[str, Any], jobs: int | None, expected: tuple[int, int, float], tmp_path: Path
) -> None:
    pool = RayPool(Cluster("auto", **asked), "auto", jobs, (), two_ranks.Settings(), tmp_path)
    pool._share_out(there)
    assert (pool.jobs, pool.threads, pool.gpus) == expected


def test_what_no_cluster_has_is_told(tmp_path: Path) -> None:
    for device, cluster, match in (
        ("cuda", Cluster("auto"), "no node of the cluster has a GPU"),
        ("cuda:1", Cluster("auto", gpus=1), "a cluster has no device cuda:1"),
        ("cpu", Cluster("auto", cpus=3), "no worker of 3 cores"),
        ("auto", Cluster("auto", gpus=1), "no worker of 1 core and 1 GPU fits"),
    ):
        pool = RayPool(cluster, device, None, (), two_ranks.Settings(), tmp_path)
        with pytest.raises(UserError, match=match):
            pool._share_out({"CPU": 2.0})


def test_nobody_at_an_address_is_told_at_once(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra kdbench[ray] is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pool = RayPool(Cluster(f"127.0.0.1:{port}"), "cpu", 1, (), two_ranks.Settings(), tmp_path)
    begin = time.monotonic()
    with pytest.raises(UserError, match=f"no Ray cluster at '127.0.0.1:{port}' .*refused"):
        pool.__enter__()
    assert time.monotonic() - begin < 20


def test_ray_alone_means_the_cluster_of_this_machine() -> None:
    for words, expected in (
        ("run R --ray", "run R --ray auto"),
        ("run R --ray --jobs 2", "run R --ray auto --jobs 2"),
        ("run R --ray seeds=1", "run R --ray auto seeds=1"),
        ("run R --ray 10.0.0.1:6379 seeds=1", "run R --ray 10.0.0.1:6379 seeds=1"),
    ):
        assert with_address(words.split()) == expected.split()
