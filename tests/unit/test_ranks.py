"""Two processes that train a cell together do what one does, whatever its losses read of a batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
import two_ranks
from conftest import ROOT
from tiny import CPU, images, sets_at, untrained_teacher

from kdbench.cli.run import started_by_torchrun
from kdbench.engine.batches import Batches
from kdbench.engine.distributed import refuse
from kdbench.engine.member import Member
from kdbench.engine.ranks import ALONE, Ranks
from kdbench.errors import UserError
from kdbench.recipe.specs import CellSpec

# Of the largest value of a kind: sums over a batch are taken in another order, and convolutions of other sizes.
FIRST_STEP = 2e-5
# What a training makes of that in its next steps, with batch norms over nine samples in some connectors.
LATER = 2e-3


def refused(spec: CellSpec) -> bool:
    try:
        refuse(spec, 2)
    except UserError:
        return True
    return False


def traits(spec: CellSpec) -> set[Any]:
    """What a method has that could go wrong on shares of a batch."""
    found: set[Any] = {("module", module.name) for module in spec.method.modules.values()}
    for stage in spec.method.stages.values():
        found |= {("stage", *stage.trains, stage.alternating, stage.anchor is not None and stage.anchor.choose)}
        for term in stage.losses.values():
            found |= {("loss", term.loss.name), ("reads", term.of, term.input, term.against, term.detach)}
            found |= {("connector", term.connector.name)} if term.connector else set()
    return found


@cache
def covering() -> list[str]:
    """Methods that have all traits of all methods that several ranks may train."""
    left = {name: traits(two_ranks.cell(name)) for name in two_ranks.REGISTRY.names("methods")}
    left = {name: has for name, has in left.items() if not refused(two_ranks.cell(name))}
    missing, chosen = set().union(*left.values()), []
    while missing:
        chosen.append(max(left, key=lambda name: len(left[name] & missing)))
        missing -= left[chosen[-1]]
    return chosen


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
def test_every_loss_on_two_ranks_is_that_on_one() -> None:
    lines = pair(*covering())
    assert [line["method"] for line in lines] == [*covering(), *covering()]
    for line in lines:
        assert "failed" not in line, line["failed"]
        assert line["apart"].pop("images") == 0
        for kind, far in line["apart"].items():
            assert far < (FIRST_STEP if kind.startswith("0 ") else LATER), line


def test_every_loss_is_tested_or_refused() -> None:
    tested = {trait[1] for name in covering() for trait in traits(two_ranks.cell(name)) if trait[0] == "loss"}
    only_refused = {*two_ranks.REGISTRY.names("losses")} - tested
    for name in two_ranks.REGISTRY.names("methods"):
        spec = two_ranks.cell(name)
        if {("loss", loss) for loss in only_refused} & traits(spec):
            assert refused(spec), f"{name} is tested by nothing"


def test_a_batch_source_is_refused_before_anything_trains() -> None:
    with pytest.raises(UserError, match="a batch source is made for one process"):
        refuse(two_ranks.cell("bss"), 2)


@pytest.mark.parametrize("padding", [0, 2])
def test_shares_of_all_ranks_are_the_batches_of_one_process(padding: int) -> None:
    """Also of a smaller last batch, and at a step in the middle."""
    spec = two_ranks.cell("kd")
    views = spec.protocol.augmentation.model_copy(update={"padding": padding, "mode": "reflect" if padding else "none"})
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
    assert started_by_torchrun(False, "auto") == (0, 1)
    with pytest.raises(UserError, match="there are no other ranks"):
        started_by_torchrun(True, None)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    assert started_by_torchrun(True, None) == (1, 2)
    with pytest.raises(UserError, match="do not go together"):
        started_by_torchrun(False, "auto")
