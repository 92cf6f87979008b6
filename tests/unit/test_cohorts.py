"""Which cells train behind one teacher pass, and how cohorts are shared out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdbench.engine.runner import CellState, Work, _balanced, cohorts_of
from kdbench.recipe.planning import plan
from kdbench.registry import Registry

REGISTRY = Registry()
RECIPE: dict[str, Any] = {"data": "digits", "teacher": "wrn_16_2_digits", "student": "wrn_10_1", "protocol": "digits"}


def work(**recipe: Any) -> list[Work]:
    cells = plan(RECIPE | recipe, REGISTRY).cells
    return [(cell, CellState(i, "", Path())) for i, cell in enumerate(cells)]


def methods(cohorts: list[list[Work]]) -> list[list[str]]:
    return [[cell.spec.method.name for cell, _ in cohort] for cohort in cohorts]


def test_cells_of_one_seed_form_a_cohort_with_the_plain_student() -> None:
    cohorts = cohorts_of(work(compare={"method": ["ce", "kd", "ab"]}, seeds=2))
    assert methods(cohorts) == [["ce", "kd", "ab"]] * 2
    assert [{cell.spec.seed for cell, _ in cohort} for cohort in cohorts] == [{0}, {1}]


@pytest.mark.parametrize(
    "compare",
    [
        {"data.per_class": [5, 10]},
        {"protocol.batch_size": [16, 32]},
        {"steps": [10, 20]},
        {"precision": ["float32", "bfloat16"]},
        {"method": ["kd", "ab_crd"], "epochs": [2]},
    ],
)
def test_cells_with_other_batches_do_not(compare: dict[str, list[Any]]) -> None:
    cohorts = cohorts_of(work(compare={"method": ["kd"]} | compare))
    assert [len(cohort) for cohort in cohorts] == [1, 1]


def test_another_student_goes_along() -> None:
    assert [len(c) for c in cohorts_of(work(method="kd", compare={"student": ["wrn_10_1", "wrn_16_1"]}))] == [2]


@pytest.mark.parametrize(("seeds", "jobs", "expected"), [(5, 2, 6), (4, 2, 4), (1, 2, 2), (1, 1, 1), (3, 4, 3)])
def test_an_incomplete_last_round_is_split(seeds: int, jobs: int, expected: int) -> None:
    cohorts = cohorts_of(work(compare={"method": ["ce", "kd", "ab"]}, seeds=seeds))
    shared = _balanced(cohorts, jobs)
    assert len(shared) == expected
    assert sorted(id(w) for c in shared for w in c) == sorted(id(w) for c in cohorts for w in c)
