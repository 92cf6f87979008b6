"""Budgets, shares and evaluation points, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
from shipped import DIGITS, REGISTRY

from kdbench.engine.stage import moment_at
from kdbench.errors import UserError
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec
from kdbench.recipe.timeline import batches_per_epoch, timeline, training_images


def cell(method: Any = "kd", **recipe: Any) -> CellSpec:
    return plan(DIGITS | {"method": method} | recipe, REGISTRY).cells[0].spec


@pytest.mark.parametrize(
    ("images", "batch", "last", "expected"),
    [
        (50000, 128, "keep", 391),
        (50000, 128, "drop", 390),
        (50000, 64, "keep", 782),
        (100, 128, "keep", 1),
        (100, 128, "drop", 1),
        (128, 128, "keep", 1),
    ],
)
def test_batches_per_epoch(images: int, batch: int, last: str, expected: int) -> None:
    assert batches_per_epoch(images, batch, last) == expected


def test_the_budget_is_the_total_over_all_stages() -> None:
    one, two = timeline(cell("kd", epochs=200), 50000), timeline(cell("ab", epochs=200), 50000)
    assert one.total == two.total == 200 * 782
    assert [span.name for span in two.spans] == ["boundaries", "classification"]
    assert two.spans[0].steps == round(0.1 * 200 * 782)
    assert two.spans[1].stop == two.total


@pytest.mark.parametrize(("steps", "of_each"), [(5, [2, 3]), (7, [4, 3]), (1000, [500, 500])])
def test_where_all_stages_have_shares_the_last_one_takes_the_rest(steps: int, of_each: list[int]) -> None:
    halves = {"name": "ab", "stages": {name: {"share": "50%"} for name in ("boundaries", "classification")}}
    line = timeline(cell(halves, steps=steps), 100)
    assert line.total == steps and [span.steps for span in line.spans] == of_each


def test_extra_epochs_come_on_top_and_first() -> None:
    line = timeline(cell("ab_crd", epochs=240), 50000)
    assert line.extra == 30 * 782
    assert line.total == 270 * 782
    assert line.spans[0].steps == 30 * 782


def test_images_of_some_classes() -> None:
    chosen = cell("ce", data={"name": "digits", "per_class": 5, "only_classes": [0, 3, 4]})
    assert training_images(chosen.data) == 15


def test_a_share_is_at_least_one_step() -> None:
    line = timeline(cell("ab", steps=3), 100)
    assert [span.steps for span in line.spans] == [1, 2]


@pytest.mark.parametrize("none", ["0%", "0.0 %"])
def test_a_stage_with_no_share_of_the_steps_is_left_out(none: str) -> None:
    without = cell({"name": "ab", "stages": {"boundaries": {"share": none}}}, steps=60)
    assert [(span.name, span.steps) for span in timeline(without, 100).spans] == [("classification", 60)]
    assert without.method.stages == {"classification": cell("ab").method.stages["classification"]}


def test_stage_of_a_step() -> None:
    line = timeline(cell("ab", steps=60), 100)
    assert [line.stage(step) for step in (0, 5, 6, 59)] == [0, 0, 1, 1]


def test_schedules_count_their_stage_and_the_epochs_of_the_data() -> None:
    line = timeline(cell("ab", steps=60), 200)
    assert line.batches_per_epoch == 4 and line.spans[1].start == 6
    # The second stage's second step is the last one of the data's second epoch.
    assert moment_at(7, line.spans[1], line) == (1 / 54, 3 / 4, 1 / 4)


def test_evaluations_are_even_and_include_the_end_of_every_stage() -> None:
    line = timeline(cell("ab", steps=50, evaluations=4), 100)
    assert line.evaluations == (5, 12, 25, 38, 50)
    assert timeline(cell("kd", epochs=3, evaluations="epoch"), 100).evaluations == (2, 4, 6)
    # More of them than steps.
    assert timeline(cell("kd", steps=2, evaluations=10), 100).evaluations == (1, 2)


def test_a_budget_that_nobody_can_train_is_refused() -> None:
    with pytest.raises(UserError, match=r"a budget of 2e\+09 steps is too large"):
        timeline(cell("kd", epochs=1e9), 100)


@pytest.mark.parametrize(
    ("said", "other_images"),
    [
        ({"name": "own"}, True),
        ({"target": "own:load"}, True),
        ({"options": {"side": 16}}, True),
        ({"source_sha256": "ab" * 32}, True),
        ({"root": "elsewhere"}, True),
        # Parts of the same images.
        ({"fraction": 0.5}, False),
        ({"validation": 10, "tested_on": "validation"}, False),
        ({"only_classes": [1], "per_class": 3, "split_seed": 7}, False),
    ],
)
def test_what_tells_which_images_data_are(said: dict[str, Any], other_images: bool) -> None:
    data = cell("ce").data
    assert (data.model_copy(update=said).images_key() != data.images_key()) is other_images
