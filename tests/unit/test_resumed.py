"""Every method goes on from its state as if it had not been stopped, with draws, statistics and memories of losses; and
it trains beside others as alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from captured import METHODS, REGISTRY, cell
from tiny import CPU, member_of, networks_for, step_together, target_for, train

from kdbench.engine.member import Member
from kdbench.engine.teachers.loading import fingerprint
from kdbench.recipe.specs import CellSpec


def at(spec: CellSpec, steps: int, state: object = None, folder: Path | None = None) -> Member:
    """The cell's member at a step, from the beginning or from a state, and what its source left in a folder."""
    member, batches, teacher = member_of(spec, folder=folder)
    if state is not None:
        member.load_state(copy.deepcopy(state))
    train(member, batches, teacher, steps - member.step)
    return member


def same(a: Member, b: Member) -> bool:
    """Whether two members have the same networks, modules and means of losses."""
    found = []
    for member in (a, b):
        networks = [one.network.model for one in (member.modules.own_teacher,) if one is not None]
        modules = [member.student.model, member.modules.terms, *networks]
        found.append(([fingerprint(module) for module in modules], member.meter.result()))
    return found[0] == found[1]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_exactly(method: str, tmp_path: Path) -> None:
    spec = cell(method, steps=4)
    end = spec.protocol.steps
    assert end is not None
    whole = at(spec, end)
    # In the middle of the last stage, with that of the middle of the first one behind it.
    stopped = at(spec, end - 2, at(spec, 2, folder=tmp_path).state(), tmp_path)
    assert same(at(spec, end, stopped.state(), tmp_path), whole)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_beside_others_what_it_is_alone(method: str) -> None:
    """The values of the cohort's shared teacher, and real images, lie there for the others, and are not taken."""
    spec = cell(method, steps=2)
    end = spec.protocol.steps
    assert end is not None
    alone, batches, teacher = member_of(spec)
    train(alone, batches, teacher, end)
    beside: tuple[Any, ...] = ("kd", "at")
    more = target_for(method, REGISTRY)
    if method.startswith("vitkd"):
        # Under a transformer, what AT compares are the maps of its patches.
        of_patches = {"losses": {"at": {"hook": "layers.patches"}}}
        beside, more = ("kd", {"name": "at", "stages": {"classification": of_patches}}), more | networks_for(method)
    others = [cell(one, steps=end, **more) for one in beside]
    members = [Member(one, batches, teacher or member_of(one)[2], CPU) for one in (spec, *others)]
    for _ in range(end):
        step_together(members, batches, members[1].teacher)
    assert same(members[0], alone)


def test_a_state_of_an_older_version_may_lack_options_of_its_optimizer() -> None:
    spec = cell("kd", steps=4)
    whole, stopped = at(spec, 4), at(spec, 2)
    state = stopped.state()
    for group in state["optimizers"][0]["param_groups"]:
        del group["delta"]
    assert fingerprint(at(spec, 4, state).student.model) == fingerprint(whole.student.model)


def test_a_state_from_a_gpu_is_resumed_on_the_cpu() -> None:
    spec = cell("kd", steps=4, protocol={"name": "digits", "optimizer": {"name": "adam", "lr": 0.01}})
    state = at(spec, 2).state()
    for group in state["optimizers"][0]["param_groups"]:
        group |= {"capturable": True, "lr": torch.tensor(0.01)}
    assert fingerprint(at(spec, 4, state).student.model) == fingerprint(at(spec, 4).student.model)


@pytest.mark.parametrize("lost", ["momentum", "meter", "terms", "log", "sources"])
def test_a_state_that_lacks_what_training_reads_is_refused_before_it_trains(lost: str) -> None:
    spec = cell("bss" if lost == "sources" else "kd", steps=4)
    state = copy.deepcopy(at(spec, 2).state())
    if lost == "momentum":
        del state["optimizers"][0]["state"][0]["momentum_buffer"]
    elif lost == "meter":
        # As long as its own: sums would be those of other terms.
        state["meter"]["counts"] = {f"old {name}": n for name, n in state["meter"]["counts"].items()}
    elif lost == "terms":
        state["terms"]["more"] = state["meter"]["sums"]
    elif lost == "log":
        state["log"]["older"] = []
    else:
        state["sources"] = {}
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError, RuntimeError)):
        member_of(spec)[0].load_state(state)


def test_the_best_weights_are_those_of_the_whole_training_or_none() -> None:
    """Also where a recipe asks for them, or no longer does, after the cell was stopped."""

    def evaluated(member: Member, accuracies: list[float]) -> Member:
        for step, accuracy in enumerate(accuracies, len(member.log.history) + 1):
            member.log.history.append({"step": step, "test": {"accuracy": accuracy}})
            member.keep_best()
        return member

    plain, spec = cell("ce"), cell("ce", keep="best")
    begun = evaluated(member_of(plain)[0], [50.0, 70.0]).state()
    asked = member_of(spec)[0]
    asked.load_state(begun)
    assert evaluated(asked, [60.0]).log.best is None
    best = evaluated(asked, [80.0, 80.0]).log.best
    assert best is not None and best["step"] == 4
    # Nobody who chooses sees the test set where there is a validation part.
    chooses = member_of(spec)[0]
    for step, (test, validation) in enumerate([(60.0, 71.0), (50.0, 73.0), (90.0, 72.0)], 1):
        chooses.log.history.append({"step": step, "test": {"accuracy": test}, "validation": {"accuracy": validation}})
        chooses.keep_best()
    assert chooses.log.best is not None
    assert {**chooses.log.best, "weights": None} == {"step": 2, "part": "validation", "accuracy": 73.0, "weights": None}
    asks_no_more = member_of(plain)[0]
    asks_no_more.load_state(asked.state())
    assert evaluated(asks_no_more, [90.0]).log.best is None
