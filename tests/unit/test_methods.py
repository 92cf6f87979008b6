"""What the method cards promise about each other, and that every name and path in them leads somewhere."""

import pytest

from kdbench.cards import Anchors, StageCard, TermCard
from kdbench.registry import Registry

REGISTRY = Registry()
METHODS = REGISTRY.names("methods")


def stages(name: str) -> dict:
    return REGISTRY.tree("methods", name).data["stages"]


@pytest.mark.parametrize("name", METHODS)
def test_every_name_and_path_leads_somewhere(name):
    card = REGISTRY.card("methods", name)
    for stage in card.stages.values():
        for term in stage.losses.values():
            loss = REGISTRY.card("losses", term.loss)
            assert set(term.options) <= set(REGISTRY.settable(loss.target, loss))
            if term.connector is not None and term.connector.name in card.modules:
                assert term.connector.name in stage.trains
            elif term.connector is not None:
                connector = REGISTRY.card("connectors", term.connector.name)
                assert set(term.connector.options) <= set(REGISTRY.settable(connector.target, connector))
                assert "connectors" in stage.trains
    tree = REGISTRY.tree("methods", name).data
    for path in card.parameters.values():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node[key]
        known = set(StageCard.model_fields)
        if parents[-1] == "anchors":
            known = set(Anchors.model_fields)
        if parents[-1] in ("source", "begins"):
            source = REGISTRY.card("sources" if parents[-1] == "source" else "operations", node["name"])
            known = set(REGISTRY.settable(source.target, source))
        if parents[-1] == "begins":
            operation = REGISTRY.card("operations", node["name"])
            known = set(REGISTRY.settable(operation.target, operation))
        if parents[-1] == "batch_norm":
            known = {"data", *REGISTRY.card("sources", tree["stages"][parents[1]]["source"]["name"]).gives}
        if parents[0] in ("modules", "predicts") or parents[-1] == "optimizer":
            kind = "optimizers" if parents[-1] == "optimizer" else "connectors"
            named = REGISTRY.card(kind, node["name"])
            known = set(REGISTRY.settable(named.target, named))
        if "loss" in node:
            loss = REGISTRY.card("losses", node["loss"])
            known = {*TermCard.model_fields, *REGISTRY.settable(loss.target, loss)}
        assert last in known, path
    assert card.paper is None or REGISTRY.card("papers", card.paper)


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
