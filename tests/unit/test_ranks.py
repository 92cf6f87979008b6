"""Two processes that train a cell together do what one does, whatever its losses read of a batch."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import two_ranks
from conftest import ROOT
from tiny import CPU, images, sets_at, untrained_teacher
from torch.nn.modules.batchnorm import _BatchNorm

from kdbench.cli.run import started_by_torchrun
from kdbench.engine.computing.compute import REFERENCE
from kdbench.engine.data.batches import Batches
from kdbench.engine.member import Member
from kdbench.engine.networks.build import build_extractor, build_model
from kdbench.engine.ranks import ALONE, Ranks
from kdbench.engine.workers import distributed
from kdbench.engine.workers.distributed import device_here, join, refuse
from kdbench.engine.workers.finished import names
from kdbench.engine.workers.messages import CellFinished, CellTask, Event, Settings, TrainCells
from kdbench.engine.workers.tasks import TaskRunner
from kdbench.errors import UserError
from kdbench.models.hooks import Extractor
from kdbench.recipe.planning import plan
from kdbench.record import read_record

# Of the largest value of a kind: sums over a batch are taken in another order, and convolutions of other sizes.
FIRST_STEP = 2e-5
# What a training makes of that in its next steps, with batch norms over nine samples in some connectors.
LATER = 2e-3


@cache
def methods() -> dict[str, bool]:
    """All methods, and whether several ranks may train them."""
    found = {}
    for name in two_ranks.REGISTRY.names("methods"):
        try:
            refuse(two_ranks.cell(name), 2)
        except UserError:
            found[name] = False
        else:
            found[name] = True
    return found


def enough() -> list[str]:
    """Methods that have among them every loss, connector, source and kind of stage that several ranks may train."""
    has = {name: {*kinds(name)} for name, may in methods().items() if may}
    left, found = set().union(*has.values()), []
    while left:
        found.append(max(has, key=lambda name: len(has[name] & left)))
        left -= has[found[-1]]
    return found


def kinds(method: str) -> Iterator[Any]:
    for stage in two_ranks.cell(method).method.stages.values():
        yield stage.alternating, *stage.trains, stage.optimizer and stage.optimizer.name
        yield stage.source and stage.source.target
        for term in stage.losses.values():
            yield term.loss.target, term.connector and term.connector.target


def pair(*methods: str) -> list[dict[str, Any]]:
    """What both processes found, first one and then the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    words = [sys.executable, str(ROOT / "tests" / "two_ranks.py"), *methods]
    started = [
        subprocess.Popen(words, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=600)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [json.loads(line) for text in told for line in text.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])
def test_methods_on_two_ranks_are_what_they_are_on_one(every: bool) -> None:
    """Losses, gradients and what was trained. Batch norms keep their statistics: those of two ranks are of shares."""
    tested = [name for name, may in methods().items() if may] if every else enough()
    lines = pair(*tested)
    assert [line["method"] for line in lines] == tested * 2
    for line in lines:
        assert "failed" not in line, line["failed"]
        assert line["apart"].pop("images") == 0
        for kind, far in line["apart"].items():
            assert far < (FIRST_STEP if kind.startswith("0 ") else LATER), line
    # What losses are given is gathered as it was computed, and added up in the same order. Some processors compute half
    # a batch otherwise, by the last bit, and so some of the losses.
    exact = [line["method"] for line in lines if line["apart"]["0 loss"] == 0]
    assert len(exact) > (0.8 if all(line["alike"] for line in lines) else 0.6) * len(lines), exact


def test_every_loss_is_tested_with_some_method_and_only_pruning_is_refused() -> None:
    stages = {name: [*two_ranks.cell(name).method.stages.values()] for name in methods()}
    tested = {term.loss.name for name in enough() for stage in stages[name] for term in stage.losses.values()}
    used = {t.loss.name for of in stages.values() for s in of for t in s.losses.values()}
    assert tested == used
    assert {name for name, may in methods().items() if not may} == {
        name for name, of in stages.items() if any(stage.begins for stage in of)
    }
    with pytest.raises(UserError, match="'taylor_pruning' is made for one process, here are 2 ranks"):
        refuse(two_ranks.cell("prune_data_free"), 2)


@pytest.mark.parametrize(
    ("train", "last_batch", "ranks", "told"),
    [
        (46, "keep", 2, "a batch of 1 image, as the last one of an epoch is (batches have 9), cannot"),
        (46, "drop", 2, None),
        (47, "keep", 2, None),
        (45, "keep", 9, None),
        (45, "keep", 10, "a batch of 9 images cannot be shared out among 10 ranks"),
        (3, "drop", 4, "a batch of 3 images"),
    ],
)
def test_every_rank_has_images_of_every_batch(train: int, last_batch: str, ranks: int, told: str | None) -> None:
    spec = two_ranks.cell("kd")
    data = spec.data.model_copy(update={"train": train})
    spec = spec.model_copy(
        update={"data": data, "protocol": spec.protocol.model_copy(update={"last_batch": last_batch})}
    )
    with pytest.raises(UserError, match=re.escape(told)) if told else nullcontext():
        refuse(spec, ranks)


def test_batch_norms_are_synchronized_where_they_are_asked_to_be() -> None:
    """Of the student and of a teacher in train mode. Connectors get the whole batch as it is."""
    spec = two_ranks.cell("ab_teacher_train", still=False)
    data = images(spec.data, per_class=4)
    for sync in (False, True):
        member = Member(spec, Batches(spec, data, CPU, None, Ranks(sync_batch_norm=sync)), untrained_teacher(spec), CPU)
        assert member.modules.own_teacher is not None
        for module, kind in (
            (member.student.model, torch.nn.SyncBatchNorm if sync else torch.nn.BatchNorm2d),
            (member.modules.own_teacher.model, torch.nn.SyncBatchNorm if sync else torch.nn.BatchNorm2d),
            (member.modules.terms, torch.nn.BatchNorm2d),
        ):
            assert {type(m) for m in module.modules() if isinstance(m, _BatchNorm)} == {kind}


def test_batch_norms_with_an_activation_keep_it_and_unknown_ones_are_refused() -> None:
    ranks, shape = Ranks(sync_batch_norm=True), (3, 32, 32)
    recipe = {"data": "cifar10", "student": "timm:mobilenetv3_small_050", "protocol": "crd", "method": "ce"}
    spec = plan(recipe, two_ranks.REGISTRY).cells[0].spec
    extractor = build_extractor(build_model(spec.student, spec.data), spec.student, spec.data)
    extractor.model.eval()
    pictures = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    before = extractor(pictures, [*extractor.places, "logits"])
    ranks.synchronize(extractor, shape)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in extractor.model.modules())
    for point, value in extractor(pictures, [*before]).items():
        assert torch.equal(value, before[point]), point

    class Own(torch.nn.BatchNorm2d):
        pass

    with pytest.raises(UserError, match="'mine' are of a kind of their own, Own"):
        ranks.synchronize(Extractor(torch.nn.Sequential(Own(3)), {}, "mine"), shape)


def test_synchronized_batch_norms_are_recorded(tmp_path: Path) -> None:
    recipe = {"data": "digits", "student": "wrn_10_1", "protocol": "digits", "method": "ce", "steps": 1}
    planned = plan(recipe, two_ranks.REGISTRY)
    (cell,) = planned.cells
    order = TrainCells(
        cells=[CellTask(id=0, folder=tmp_path / "ce", spec=cell.spec, names=names(planned, cell))],
        computing=REFERENCE,
        logits=None,
        teacher_folder=None,
        shared=tmp_path,
        settings=Settings(cache=tmp_path),
    )
    told: list[Event] = []
    TaskRunner(told.append, lambda: False, Ranks(sync_batch_norm=True)).run(order)
    assert isinstance(told[-1], CellFinished), told
    assert read_record(tmp_path / "ce" / "record.json").compute.sync_batch_norm is True


@pytest.mark.parametrize("local", [0, 1])
def test_ranks_with_gpus_meet_by_nccl_each_on_the_gpu_of_its_number(
    local: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for what there is on no CPU."""
    began: list[Any] = []
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setattr(distributed, "gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: began.append(device))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: began.append(backend))
    monkeypatch.setattr(dist, "new_group", lambda backend, timeout: backend)
    monkeypatch.setattr(dist, "get_rank", lambda: local)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def gather(found: list[Any], mine: Any, group: str) -> None:
        assert group == "gloo"
        found[:] = [mine, mine]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    device = device_here("auto")
    assert device == f"cuda:{local}" and began[0] == local, "its own GPU before any other is touched"
    ranks = join(Settings(ranks=2, sync_batch_norm=True), device)
    assert began[-1] == "cpu:gloo,cuda:nccl" and ranks.sync_batch_norm and ranks.size == 2
    assert device_here("cpu") == "cpu"
    join(Settings(ranks=2), "cpu")
    assert began[-1] == "gloo"
    with pytest.raises(UserError, match=r"(?s)each rank uses the GPU of its own number.*CUDA_VISIBLE_DEVICES"):
        join(Settings(ranks=2), f"cuda:{1 - local}")
    with pytest.raises(UserError, match="torch synchronizes batch norms on GPUs only"):
        join(Settings(ranks=2, sync_batch_norm=True), "cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="there is no GPU 2 for local rank 2"):
        device_here("cuda")


def test_versions_that_differ_are_told_by_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"init_process_group": None, "new_group": "gloo", "get_rank": 0, "get_world_size": 2}.items():
        monkeypatch.setattr(dist, name, lambda *_, value=value, **__: value)

    def gather(found: list[Any], mine: Any, group: str) -> None:
        found[:] = [mine, ("there", mine[1] | {"python": "2.7"})]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(UserError, match=r"rank 1 on there has .*'python': '2.7'.*(?s:.)*same versions on all nodes"):
        join(Settings(ranks=2), "cpu")


@pytest.mark.parametrize("padding", [0, 2])
def test_shares_of_all_ranks_are_the_batches_of_one_process(padding: int) -> None:
    """Also of a smaller last batch, and at a step in the middle."""
    spec = two_ranks.cell("kd")
    views = spec.protocol.augmentation.model_copy(update={"padding": padding, "mode": "reflect" if padding else "zero"})
    spec = spec.model_copy(update={"protocol": spec.protocol.model_copy(update={"augmentation": views})})
    data = images(spec.data, per_class=4)
    whole, *parts = (Batches(spec, data, CPU, None, ranks) for ranks in (ALONE, *(Ranks(i, 4) for i in range(4))))
    member = Member(spec, whole, untrained_teacher(spec), CPU)
    for step in (0, 1, 3, 4, 5, 17):
        sets = [sets_at(batches, step, member.timeline, ["data"])["data"] for batches in (whole, *parts)]
        for name in ("images", "labels", "index", "view"):
            one, *shares = (getattr(batch, name) for batch in sets)
            assert torch.equal(torch.cat(shares), one) and len(shares[0]) >= len(shares[-1]) > 0
        assert {batches.sizes(["data"]) for batches in (whole, *parts)} == {(len(sets[0].images),)}
    assert len(sets[0].images) == two_ranks.BATCH


def test_options_that_do_not_belong_to_a_run_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    # An address alone makes no ranks.
    monkeypatch.setenv("MASTER_PORT", "x")
    assert started_by_torchrun(False, "auto") == (0, 1)
    with pytest.raises(UserError, match="there are no other ranks"):
        started_by_torchrun(True, None)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    assert started_by_torchrun(True, None) == started_by_torchrun(False, None) == (1, 2)
    with pytest.raises(UserError, match="cannot be combined"):
        started_by_torchrun(False, "auto")


def test_a_rank_that_waits_for_others_ends_when_it_is_told_to() -> None:
    """They may never come. There is nothing to save yet."""
    code = "from kdbench.engine.workers.follower import follow, Settings; follow((), Settings(ranks=2), 'cpu')"
    with socket.create_server(("127.0.0.1", 0)) as first:
        first.settimeout(120)
        variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        variables["MASTER_PORT"] = str(first.getsockname()[1])
        rank = subprocess.Popen([sys.executable, "-c", code], env=os.environ | variables)
        connection, _ = first.accept()
        with connection:
            rank.terminate()
            try:
                assert rank.wait(timeout=10) == -signal.SIGTERM
            finally:
                rank.kill()
