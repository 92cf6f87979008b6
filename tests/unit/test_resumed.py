"""Every method goes on from its state as if it had not been stopped, with draws, statistics and memories of losses."""

from __future__ import annotations

import copy

import pytest
from captured import METHODS, cell
from tiny import member_of, train

from kdbench.engine.member import Member
from kdbench.engine.teachers import fingerprint
from kdbench.recipe.specs import CellSpec


def at(spec: CellSpec, steps: int, state: object = None) -> Member:
    """The cell's member at a step, from the beginning or from a state."""
    member, batches, teacher = member_of(spec)
    if state is not None:
        member.load_state(copy.deepcopy(state))
    train(member, batches, teacher, steps - member.step)
    return member


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_exactly(method: str) -> None:
    spec = cell(method, steps=4)
    end = spec.protocol.steps
    assert end is not None
    whole = at(spec, end)
    # In the middle of the last stage, with that of the middle of the first one behind it.
    stopped = at(spec, end - 2, at(spec, 2).state())
    resumed = at(spec, end, stopped.state())
    for one, other in ((whole.student.model, resumed.student.model), (whole.terms, resumed.terms)):
        assert fingerprint(one) == fingerprint(other)


def test_a_state_of_an_older_version_may_lack_options_of_its_optimizer() -> None:
    spec = cell("kd", steps=4)
    whole, stopped = at(spec, 4), at(spec, 2)
    state = stopped.state()
    for group in state["optimizers"][0]["param_groups"]:
        del group["delta"]
    assert fingerprint(at(spec, 4, state).student.model) == fingerprint(whole.student.model)


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
