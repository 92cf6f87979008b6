"""What the method cards promise about each other, and that every name and path in them leads somewhere."""

import pytest
from shipped import REGISTRY

from kdbench.engine.networks.build import build_schedule
from kdbench.recipe.planning import plan


def stages(name: str) -> dict:
    return REGISTRY.tree("methods", name).data["stages"]


def test_only_the_hint_differs_between_fitnets_and_kd():
    assert stages("fitnets")["classification"] == stages("kd")["classification"]


def test_only_the_initial_student_differs_between_ab_with_kd_and_kd():
    terms, expected = stages("ab_kd_ce")["classification"]["losses"], stages("kd")["classification"]["losses"]
    assert terms["ce"] == expected["ce"]
    assert terms["kd"] == expected["kd"] | {"temperature": 4.0, "scale": True}


def test_first_stages_of_one_family_agree_and_come_first():
    for name in ("ab_ce", "ab_kd_ce"):
        assert stages(name)["boundaries"] == stages("ab")["boundaries"]
    assert stages("ab_teacher_train")["boundaries"] == stages("ab")["boundaries"] | {"modes": {"teacher": "train"}}
    for name in ("ab", "ab_ce", "ab_crd", "ab_kd_ce", "ab_teacher_train"):
        assert list(stages(name)) == ["boundaries", "classification"]


def test_two_stage_methods_share_the_budget_alike():
    shares = {
        REGISTRY.card("methods", name).stages[stage].share
        for name, stage in (("ab", "boundaries"), ("ab_ce", "boundaries"), ("fitnets", "hints"))
    }
    assert shares == {"10%"}


def test_ab_follows_the_official_script():
    boundary, classification = REGISTRY.card("methods", "ab").stages.values()
    term = boundary.losses["boundary"]
    assert (term.weight, term.layer_weights, term.options) == (3 / 1000, "halving", {})
    assert set(classification.losses) == {"kd"}
    assert classification.losses["kd"].options == {"temperature": 3.0, "scale": False}


def test_the_protocol_of_at_is_the_scripts():
    """Its loop counts epochs from 1: in those that it lists, it begins a new optimizer at a fifth of the rate."""
    recipe = {"data": "cifar10", "student": "wrn_16_1", "protocol": "at_official", "method": "ce"}
    (stage,) = plan(recipe, REGISTRY, ("seeds=1",)).cells[0].spec.method.stages.values()
    schedule = build_schedule(stage.schedule)
    rate, rates, begun = 0.1, [], []
    for epoch in range(1, 201):
        if epoch in (60, 120, 160):
            rate, begun = rate * 0.2, [*begun, (epoch - 1) / 200]
        rates.append(rate)
    assert stage.optimizer.options == {"lr": 0.1, "momentum": 0.9, "weight_decay": 5.0e-4}
    assert [0.1 * schedule.factor((epoch - 1) / 200) for epoch in range(1, 201)] == pytest.approx(rates)
    assert schedule.resets == pytest.approx(begun)
