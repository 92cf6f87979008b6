"""What a recipe tunes: which settings are tried, on what, and which is chosen."""

from __future__ import annotations

from typing import Any

import pytest
from shipped import DIGITS, REGISTRY

from kdbench.engine.scheduling import CellState, cohorts_of
from kdbench.engine.workers.tuning import chosen, known_of, tried_plan
from kdbench.errors import CellError, UserError
from kdbench.recipe.planning import Plan, plan
from kdbench.recipe.timeline import planned_timeline
from kdbench.recipe.tuning import value_at
from kdbench.record_parts import RecordedTuning

RECIPE = DIGITS | {"data": {"name": "digits", "per_class": 10}, "compare": {"method": ["ce", "kd", "at"]}}
LISTS = {"trials": 2, "kd.temperature": [2.0, 8.0], "at.beta": [10.0, 100.0]}


def planned(*overrides: str, tune: dict[str, Any] | None = None, **recipe: Any) -> Plan:
    given = RECIPE | recipe | ({"tune": tune} if tune else {})
    return plan(given, REGISTRY, overrides)


def settings(found: Plan, method: str) -> list[dict[str, Any]]:
    (candidates,) = [c for c in found.candidates.values() if c[0].cells[0].spec.method.name == method]
    return [candidate.setting for candidate in candidates]


def test_a_list_is_tried_as_it_stands() -> None:
    found = planned(tune=LISTS)
    assert settings(found, "kd") == [{"method.temperature": 2.0}, {"method.temperature": 8.0}]
    assert settings(found, "at") == [{"method.beta": 10.0}, {"method.beta": 100.0}]
    assert len(found.candidates) == 2 and len(found.tried) == 4


def test_every_value_of_a_list_has_its_place_whatever_floating_point_makes_of_it() -> None:
    assert all(value_at([*range(n)], k / n) == k for n in range(2, 100) for k in range(n))


def test_lists_are_multiplied_out() -> None:
    found = planned(tune={"trials": 6, "kd.temperature": [1.0, 2.0, 4.0], "kd.alpha": [0.5, 0.9]})
    assert [list(one.values()) for one in settings(found, "kd")] == [
        [1.0, 0.5], [1.0, 0.9], [2.0, 0.5], [2.0, 0.9], [4.0, 0.5], [4.0, 0.9],
    ]  # fmt: skip


def test_a_range_begins_with_the_cards_own_and_is_filled_evenly() -> None:
    tune = {"at.beta": {"low": 2.0, "high": 2e8, "log": True}, "kd.temperature": {"low": 1.0, "high": 9.0}}
    found = planned(tune=tune)
    assert settings(found, "at")[0] == settings(found, "kd")[0] == {}
    assert sorted(one["method.beta"] for one in settings(found, "at")[1:]) == [2 * 10.0**n for n in range(1, 8)]
    assert sorted(one["method.temperature"] for one in settings(found, "kd")[1:]) == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    own = {cell.spec.identity() for cell in planned().cells}
    assert {cell.spec.identity() for cell in found.cells} == own


def test_a_setting_that_is_the_cards_own_is_tried_once_and_another_takes_its_place() -> None:
    found = planned(tune={"at.beta": {"low": 1.0, "high": 1e8, "log": True}})
    tried = [one["method.beta"] for one in settings(found, "at")[1:]]
    assert 1000.0 not in tried and sorted(tried) == [3.16, 10.0, 100.0, 1e4, 1e5, 1e6, 1e7]


def test_ranges_of_several_parameters_and_a_list_beside_them() -> None:
    tune = {"trials": 16, "kd.temperature": {"low": 1.0, "high": 9.0}, "kd.alpha": [0.5, 0.9, 0.99]}
    found = settings(planned(tune=tune), "kd")[1:]
    assert len(found) == 15
    for half in (
        [one for one in found if one["method.temperature"] < 5],
        [o for o in found if o["method.temperature"] > 5],
    ):
        assert {one["method.alpha"] for one in half} == {0.5, 0.9, 0.99}


def test_a_path_of_the_recipe_is_tuned_for_all_and_a_shared_parameter_for_those_that_have_it() -> None:
    found = planned(tune={"trials": 2, "method.temperature": [2.0, 8.0]})
    assert [c[0].cells[0].spec.method.name for c in found.candidates.values()] == ["kd"]
    found = planned(tune={"trials": 2, "protocol.optimizer.lr": [0.01, 0.1]})
    assert [[one.cells[0].spec.method.stages["classification"].optimizer.options["lr"] for one in c]
            for c in found.candidates.values()] == [[0.01, 0.1]] * 3  # fmt: skip


def test_a_setting_is_tried_on_other_seeds_and_on_the_validation_part() -> None:
    found = planned(seeds=3, tune=LISTS | {"seeds": [100, 101]})
    assert {cell.spec.seed for cell in found.tried} == {100, 101}
    for cell in found.tried:
        assert (cell.spec.data.tested_on, cell.spec.data.validation) == ("validation", 0.2)
        # As many images and steps as in the table.
        assert planned_timeline(cell.spec) == planned_timeline(found.cells[0].spec)
    assert {cell.spec.data.tested_on for cell in found.cells} == {"test"}
    own = planned(tune=LISTS, data={"name": "digits", "per_class": 10, "validation": 50})
    assert {cell.spec.data.validation for cell in own.tried} == {50}


def test_what_is_tried_trains_side_by_side() -> None:
    found = planned(tune=LISTS | {"seeds": [100, 101]})
    cohorts = cohorts_of([CellState(cell, i) for i, cell in enumerate(found.tried)])
    assert [len(cohort) for cohort in cohorts] == [4, 4]
    assert len({cell.slug for cell in found.tried}) == 8
    assert tried_plan(found).name == "recipe.trials"


def accuracies(found: Plan, *values: float | None) -> dict[str, float | None]:
    return {cell.spec.identity(): value for cell, value in zip(found.tried, values, strict=True)}


def test_the_highest_mean_is_chosen_of_equal_ones_the_first() -> None:
    found = planned(seeds=2, tune=LISTS | {"seeds": [100, 101]})
    # KD: 2.0 has 80 and 84, 8.0 has 83 and 83; AT: equal.
    best = chosen(found, accuracies(found, 80.0, 84.0, 83.0, 83.0, 70.0, 71.0, 71.0, 70.0))
    kd, at = (next(c for c in best.cells if c.spec.method.name == name) for name in ("kd", "at"))
    assert kd.spec.method.stages["classification"].losses["kd"].loss.options["temperature"] == 8.0
    assert at.spec.method.stages["classification"].losses["at"].weight == 10.0
    assert [(c.spec.method.name, c.spec.seed) for c in best.cells] == [
        ("ce", 0), ("ce", 1), ("kd", 0), ("kd", 1), ("at", 0), ("at", 1),
    ]  # fmt: skip
    assert not best.candidates and best.cells[0].tuning is None
    tuning = RecordedTuning.model_validate(kd.tuning)
    assert [(tried.setting, tried.accuracies) for tried in tuning.trials] == [
        ({"method.temperature": 2.0}, [80.0, 84.0]), ({"method.temperature": 8.0}, [83.0, 83.0]),
    ]  # fmt: skip
    assert tuning.chosen.mean == 83.0
    # A chosen setting is the cell of whoever writes it by hand.
    by_hand = planned("method.temperature=8.0", compare={"method": ["kd"]}).cells[0]
    assert kd.spec.identity() == by_hand.spec.identity()


def test_a_setting_that_diverged_is_not_chosen() -> None:
    found = planned(tune=LISTS)
    best = chosen(found, accuracies(found, None, 10.0, 20.0, None))
    by_name = {cell.spec.method.name: RecordedTuning.model_validate(cell.tuning) for cell in best.cells[1:]}
    assert by_name["kd"].chosen.setting == {"method.temperature": 8.0}
    assert by_name["at"].chosen.setting == {"method.beta": 10.0}
    with pytest.raises(CellError, match="'KD': no setting"):
        chosen(found, accuracies(found, None, None, 20.0, 20.0))


def test_one_seed_of_several_that_diverged_is_enough() -> None:
    found = planned(tune=LISTS | {"seeds": [100, 101]})
    best = chosen(found, accuracies(found, 90.0, None, 10.0, 10.0, 1.0, 1.0, 1.0, 1.0))
    assert RecordedTuning.model_validate(best.cells[1].tuning).chosen.setting == {"method.temperature": 8.0}


def test_a_method_that_a_comparison_has_twice_is_tried_once() -> None:
    tune = {"trials": 2, "at.beta": [10.0, 100.0]}
    found = planned(tune=tune, compare={"method": ["kd", "at"], "method.temperature": [1.0, 2.0]})
    assert len(found.candidates) == 1 and len(found.tried) == 2


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"at.bta": [1.0, 2.0]}, "unknown key 'bta' for method 'at'"),
        ({"hint.beta": [1.0, 2.0]}, "'hint.beta' is no option of the methods of this comparison"),
        ({"method.margin": [1.0, 2.0]}, "'method.margin' is no option"),
        ({"method": [1.0, 2.0]}, "'method' is no option"),
        ({"at.beta": [1.0, 2.0, 3.0]}, "at.beta: 3 settings, and every method tries 2"),
        ({"at.beta": [1.0, 1.0]}, "at.beta: 1 setting, and"),
        ({"at.beta": [1.0]}, "needs two values or more"),
        ({"at.beta": 5.0}, "'at.beta' needs a list of values, as .*, or a range"),
        ({"at.beta.low": 5.0}, "'at.beta.low' needs a list of values, as .*, or a range"),
        ({"at.beta": {"low": 1.0, "high": 1.001}, "trials": 9}, "settings, and every method tries 9"),
        ({}, "nothing is tuned"),
        ({"at.beta": [1.0, 2.0], "seeds": [0]}, "seed 0 is also a seed of the table"),
        ({"at.beta": [1.0, 2.0], "seeds": [100, 100]}, "a seed is given twice"),
        ({"at.beta": [1.0, 2.0], "seeds": []}, "'tune.seeds' is invalid"),
        ({"at.beta": {"low": 2.0, "high": 1.0}}, "'tune.at.beta' is invalid"),
        ({"at.beta": {"low": 0.0, "high": 1.0, "log": True}}, "'tune.at.beta' is invalid"),
        ({"at.beta": [1.0, "x"]}, "cannot be the text 'x'"),
        ({"data.fraction": [0.1, 0.2]}, "'data.fraction' is no option"),
        ({"at.beta": {"low": 1.0, "high": 2.0}, "trials": 1001}, "'tune.trials' cannot be 1001"),
        (
            {"at.beta": {"low": 1.0, "high": 2.0}, "trials": 1000, "seeds": [*range(100, 104)]},
            "12,000 cells to tune by, more than 10,000",
        ),
    ],
)
def test_mistakes_are_said(tune: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned(tune={"trials": 2} | tune)


def test_what_is_compared_is_not_tuned_too() -> None:
    with pytest.raises(UserError, match=r"'method.beta' is both compared and tuned"):
        planned(tune={"trials": 2, "at.beta": [1.0, 2.0]}, compare={"method": [{"name": "at", "beta": 5.0}]})
    with pytest.raises(UserError, match=r"'protocol.batch_size' is both"):
        compare = {"method": ["kd"], "protocol.batch_size": [32, 64]}
        planned(tune={"trials": 2, "protocol.batch_size": [8, 16]}, compare=compare)


def test_a_tried_path_can_be_given_on_the_command_line() -> None:
    found = planned("tune.trials=2", "tune.kd.temperature=[3.0, 5.0]")
    assert settings(found, "kd") == [{"method.temperature": 3.0}, {"method.temperature": 5.0}]


def test_a_target_domain_cannot_be_tuned() -> None:
    with pytest.raises(UserError, match="recipe: is invalid") as error:
        planned(tune=LISTS, target="mnist_8")
    assert "no labels to choose by" in str(error.value)


def test_records_vouch_for_what_was_tried(tmp_path: Any) -> None:
    found = planned(tune=LISTS)
    known = accuracies(found, 80.0, 81.0, None, 70.0)
    best = chosen(found, known)

    class Stub:
        def __init__(self, cell: Any) -> None:
            self.cell = type("Cell", (), {"tuning": cell.tuning and RecordedTuning.model_validate(cell.tuning)})

    assert known_of([Stub(cell) for cell in best.cells]) == known  # type: ignore[list-item]


def test_one_end_of_a_range_can_be_overridden() -> None:
    tune = {"at.beta": {"low": 2.0, "high": 2e8, "log": True}}
    found = planned("tune.at.beta.low=20", tune=tune)
    assert settings(found, "at")[1]["method.beta"] >= 20
    assert found.tune and found.tune.model_dump()["at.beta"] == {"low": 20.0, "high": 2e8, "log": True}
    for given in (tune, None):
        with pytest.raises(UserError, match="'kd.alpha.low' needs a list of values"):
            planned("tune.kd.alpha.low=1", tune=given)


@pytest.mark.parametrize("size", [1, 1500, 0.001, 1.5])
def test_a_part_to_choose_by_that_cannot_be_is_told_before_anything_is_trained(size: float) -> None:
    for said in ("tune", "data"):
        with pytest.raises(UserError) as error:
            planned(f"{said}.validation={size}", tune=LISTS)
        assert error.value.where == f"command line, '{said}.validation={size}'"


@pytest.mark.parametrize("compared", [False, True])
def test_settings_are_not_chosen_by_the_images_that_the_table_shows(compared: bool) -> None:
    data = {"name": "digits", "validation": 0.2} | ({} if compared else {"tested_on": "validation"})
    compare = RECIPE["compare"] | ({"data.tested_on": ["test", "validation"]} if compared else {})
    with pytest.raises(UserError, match="on which the table is tested too"):
        planned(tune=LISTS, data=data, compare=compare)
