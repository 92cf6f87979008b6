"""Schedules and optimizers of the user's own: tried before anything is trained."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from kdbench.engine.checks.cells import check_cell
from kdbench.errors import UserError
from kdbench.recipe.planning import plan
from kdbench.registry import Registry

OWN = """
from kdbench.schedules import Schedule
import torch


def text(): return Schedule(lambda progress: "much")
def nothing(): return Schedule(lambda progress: None)
def nan(): return Schedule(lambda progress: float("nan"))
def infinite(): return Schedule(lambda progress: float("inf") if progress > 0.5 else 1.0)
def negative(): return Schedule(lambda progress: 0.5 - progress)
def dividing(): return Schedule(lambda progress: 1 / progress)
def short(): return Schedule(lambda epochs: [1.0, 0.5][int(epochs)], clock="epochs")
def clockless(): return Schedule(lambda progress: 1.0, clock="day")
def plain(): return 0.5
def failing(): return {}["rate"]
def sound(): return Schedule(lambda epochs: 1.0 if epochs < 3 else 0.1, clock="epochs")


class Raising(torch.optim.Optimizer):
    def __init__(self, params): raise KeyError("rate")


class Other:
    def __init__(self, params): pass


class Stepless(torch.optim.Optimizer):
    def __init__(self, params, *, lr=0.1): super().__init__(params, {"lr": lr})


class Asking(Stepless):
    def step(self, images): pass


class Rateless(torch.optim.Optimizer):
    def __init__(self, params): super().__init__(params, {"rate": 0.1})
    def step(self, closure=None): pass


class Flat(Stepless):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data += parameter.grad.view(1, -1) @ parameter.grad.view(-1)[:2]


class Keeping(Stepless):
    def step(self, closure=None): self.state[self.param_groups[0]["params"][0]]["kept"] = Other([])


class Forgetting(Stepless):
    taken = 0  # In no state dict.

    def step(self, closure=None):
        self.taken += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= group["lr"] * self.taken


class Counting(torch.optim.Optimizer):
    def __init__(self, params, *, lr=0.1): super().__init__(params, {"lr": lr, "taken": 0})
    def step(self, closure=None):
        for group in self.param_groups:
            group["taken"] += 1
            for parameter in group["params"]:
                parameter.data -= group["lr"] * group["taken"]


class Sound(Stepless):
    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(group["lr"] * parameter.grad)
                    self.state[parameter]["steps"] = torch.ones(1)
"""
SCHEDULES = {
    "text": "'much' at step 0 of 12",
    "nothing": "gives None at step 0 of 12",
    "nan": "gives nan at step 0 of 12",
    "infinite": "gives inf at step 7 of 12",
    "negative": "gives -0.0833333 at step 7 of 12",
    "dividing": "fails at step 0 of 12: ZeroDivisionError",
    "short": "fails at step 6 of 12: IndexError",
    "clockless": "fails at step 0 of 12: KeyError: 'day'",
    "plain": "is no schedule: 0.5",
    "failing": "KeyError: 'rate'",
}
OPTIMIZERS = {
    "Raising": "KeyError: 'rate'",
    "Other": "is no torch.optim.Optimizer",
    "Stepless": "fails in its first step: NotImplementedError",
    "Asking": "fails in its first step: TypeError",
    "Rateless": "has no rate 'lr' in its parameter groups",
    "Flat": "fails in its first step: RuntimeError",
    "Keeping": "keeps something that no checkpoint gives back",
    "Forgetting": "keeps something that no checkpoint gives back",
}


@pytest.fixture(scope="module")
def own_cards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """Cards of optimizers and schedules of all kinds, sound ones too."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_training.py").write_text(OWN)
    cards: dict[str, Any] = {
        "schedules": {name: {"target": f"own_training:{name}"} for name in [*SCHEDULES, "sound"]},
        "optimizers": {name: {"target": f"own_training:{name}"} for name in [*OPTIMIZERS, "Sound", "Counting"]},
    }
    (folder / "cards.yaml").write_text(json.dumps(cards))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        yield Registry(folder)


def checked(cards: Registry, *overrides: str) -> None:
    recipe = {"data": "digits", "student": "wrn_10_1", "protocol": "digits", "method": "ce", "seeds": 1, "steps": 12}
    few = ("data.per_class=10", "protocol.batch_size=40", *overrides)
    check_cell(plan({**recipe}, cards, few).cells[0].spec)


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [("schedule", *one) for one in SCHEDULES.items()] + [("optimizer", *one) for one in OPTIMIZERS.items()],
)
def test_what_does_not_work_is_told_before_training(kind: str, name: str, said: str, own_cards: Registry) -> None:
    with pytest.raises(UserError) as caught:
        checked(own_cards, f"protocol.{kind}={name}")
    assert f"{kind} '{name}'" in str(caught.value) and said in str(caught.value)


def test_schedules_of_losses_are_asked_too(own_cards: Registry) -> None:
    with pytest.raises(UserError, match="the schedule 'nan' of the weight of 'ce' gives nan"):
        checked(own_cards, "method.stages.classification.losses.ce.weight_schedule=nan")


def test_sound_ones_pass(own_cards: Registry) -> None:
    checked(own_cards, "protocol.optimizer=Sound", "protocol.schedule=sound")
    checked(own_cards, "protocol.optimizer=Counting")
    # Weights may be negative, rates not.
    checked(own_cards, "method.stages.classification.losses.ce.weight_schedule=negative")


def test_the_parts_of_the_documentation_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an option that a class inherits is told from a misspelt one."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    page = (ROOT / "docs" / "cards.md").read_text()
    for name, text in re.findall(r"```\w+\n# my_parts/(\S+)\n(.*?)```", page, re.DOTALL):
        (tmp_path / name).write_text(text)
    heir = "\n\nclass Heir(torch.optim.SGD):\n    pass\n"
    (tmp_path / "own.py").write_text((tmp_path / "own.py").read_text() + heir)
    (tmp_path / "heir.yaml").write_text("optimizers: {heir: {target: 'own:Heir'}}")
    cards = Registry(tmp_path)
    few = (
        "data.per_class=4",
        "compare.method=[own]",
        "steps=4",
        "protocol.optimizer=sign_sgd",
        "protocol.schedule=power",
    )
    check_cell(plan("quickstart", cards, few).cells[0].spec)
    with pytest.raises(UserError, match="(?s)unknown key 'lr' for optimizer 'heir'.*its class's own '__init__'"):
        plan("quickstart", cards, ("protocol.optimizer={name: heir, lr: 0.1}",))
