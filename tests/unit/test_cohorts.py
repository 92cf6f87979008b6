"""Which cells train behind one teacher pass, and how cohorts are shared out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from shipped import DIGITS, REGISTRY

from kdbench.engine.computing.compute import Memory
from kdbench.engine.scheduling import Begun, Cells, CellState, Memories, balanced, begin, cohorts_of, joined, kind
from kdbench.recipe.planning import plan


def work(**recipe: Any) -> Cells:
    cells = plan(DIGITS | recipe, REGISTRY).cells
    return [CellState(cell, i) for i, cell in enumerate(cells)]


def methods(cohorts: list[Cells]) -> list[list[str]]:
    return [[cell.spec.method.name for cell in cohort] for cohort in cohorts]


def memory_of(cells: Cells, gigabytes: int) -> Memories:
    one = Memory(data=0, teacher=0, features=0, member=gigabytes * 10**9, step=0)
    return {kind(cell.spec): one for cell in cells}


def seeds(programs: list[list[Cells]]) -> list[list[int]]:
    return [[cohort[0].spec.seed for cohort in program] for program in programs]


@pytest.mark.parametrize(
    ("jobs", "limit", "expected"),
    [
        (1, None, [[0, 1, 2, 3, 4]]),
        (2, None, [[0, 2, 4], [1, 3]]),
        (5, None, [[0], [1], [2], [3], [4]]),
        # Three cells of 1 GB each, and what a process and its allocator take: two cohorts in 15 GB.
        (1, 15e9, [[0, 1], [2, 3], [4]]),
        # One that does not fit even alone trains alone.
        (1, 1e9, [[0], [1], [2], [3], [4]]),
    ],
)
def test_seeds_go_together_as_memory_and_workers_allow(jobs: int, limit: float | None, expected: Any) -> None:
    cells = work(compare={"method": ["ce", "kd", "ab"]}, seeds=5)
    programs = joined(cohorts_of(cells), jobs, memory_of(cells, 1), limit, at_once=True)
    assert seeds(programs) == expected
    assert sorted(w.id for p in programs for c in p for w in c) == [w.id for w in cells]


def test_what_differs_in_more_than_its_seed_goes_in_another_program() -> None:
    cells = work(method="kd", compare={"data.per_class": [5, 10]}, seeds=2)
    programs = joined(cohorts_of(cells), 1, memory_of(cells, 1), None, at_once=True)
    assert [{cohort[0].spec.data.per_class for cohort in program} for program in programs] == [{5}, {10}]
    # Parts of one cohort were parted for their memory: they do not come together again.
    parts = [[one] for one in work(compare={"method": ["kd", "ab"]}, seeds=1)]
    assert len(joined(parts, 1, memory_of([w for p in parts for w in p], 1), None, at_once=True)) == 2


def test_cells_of_one_seed_form_a_cohort_with_the_plain_student() -> None:
    cohorts = cohorts_of(work(compare={"method": ["ce", "kd", "ab"]}, seeds=2))
    assert methods(cohorts) == [["ce", "kd", "ab"]] * 2
    assert [{cell.spec.seed for cell in cohort} for cohort in cohorts] == [{0}, {1}]


@pytest.mark.parametrize(
    "compare",
    [
        {"data.per_class": [5, 10]},
        {"protocol.batch_size": [16, 32]},
        {"steps": [10, 20]},
        {"compute.precision": ["float32", "bfloat16"]},
        {"method": ["kd", "ab_crd"], "epochs": [2]},
    ],
)
def test_cells_with_other_batches_do_not(compare: dict[str, list[Any]]) -> None:
    cohorts = cohorts_of(work(compare={"method": ["kd"]} | compare))
    assert [len(cohort) for cohort in cohorts] == [1, 1]


def test_cells_of_other_targets_and_cells_that_began_otherwise_train_apart(tmp_path: Path) -> None:
    adapting = [*work(method="kd", target="mnist_8"), *work(method="kd")]
    assert [len(cohort) for cohort in cohorts_of(adapting)] == [1, 1]
    cells = work(compare={"method": ["kd", "ab"]})
    cells[0].folder = tmp_path
    begin(tmp_path, Begun(threads=3))
    assert [len(cohort) for cohort in cohorts_of(cells)] == [1, 1]


def test_another_student_goes_along() -> None:
    assert [len(c) for c in cohorts_of(work(method="kd", compare={"student": ["wrn_10_1", "wrn_16_1"]}))] == [2]


@pytest.mark.parametrize(("seeds", "jobs", "expected"), [(5, 2, 6), (4, 2, 4), (1, 2, 2), (1, 1, 1), (3, 4, 3)])
def test_an_incomplete_last_round_is_split(seeds: int, jobs: int, expected: int) -> None:
    cohorts = cohorts_of(work(compare={"method": ["ce", "kd", "ab"]}, seeds=seeds))
    shared = balanced(cohorts, jobs)
    assert len(shared) == expected
    assert sorted(id(w) for c in shared for w in c) == sorted(id(w) for c in cohorts for w in c)


def test_a_large_cohort_beside_a_small_one_is_split() -> None:
    """Otherwise one of two workers has nothing to do for most of the run."""
    cells = work(compare={"method": ["kd"], "method.temperature": list(range(1, 13))}, seeds=1)
    small = work(compare={"method": ["ab_crd"]}, seeds=1)
    assert [len(cohort) for cohort in balanced([cells, small], 2)] == [6, 6, 1]
