"""What the method cards promise about each other, and that every name and path in them leads somewhere."""

from kdbench.registry import Registry

REGISTRY = Registry()


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
