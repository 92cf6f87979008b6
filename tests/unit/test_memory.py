"""What cells take is predicted from above, cohorts that would not fit are split, and nothing grows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from shipped import REGISTRY

from kdbench.engine.checks import cells
from kdbench.engine.checks.cells import check_cell
from kdbench.engine.computing.compute import Memory, program_bytes
from kdbench.engine.computing.device import available_memory
from kdbench.engine.computing.estimate import Estimate
from kdbench.engine.computing.memory import memory_of
from kdbench.engine.inputs import Cost
from kdbench.engine.scheduling import Cells, CellState, cohorts_of, fitting, kind
from kdbench.methods.sskd.source import TurnedImages
from kdbench.recipe.planning import plan

RECIPE: dict[str, Any] = {
    "data": "cifar10",
    "teacher": "wrn_22_4_cifar10",
    "student": "wrn_16_2",
    "protocol": "ab_official",
    "compare": {"method": ["ce", "kd", "ab", "at"]},
}
GB = 10**9


def cohort() -> Cells:
    cells = plan(RECIPE, REGISTRY).cells
    return cohorts_of([CellState(cell, i) for i, cell in enumerate(cells)])[0]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_loss_that_is_made_for_small_batches_is_tried_with_no_more_images(batch_size: int) -> None:
    protocol = {"name": "ab_official", "batch_size": batch_size}
    (cell,) = plan({**RECIPE, "compare": {"method": ["semckd"]}, "protocol": protocol}, REGISTRY).cells
    assert memory_of(cell.spec, torch.device("cpu"), check_cell(cell.spec)).step


def test_members_take_turns() -> None:
    """Parameters add up, activations do not."""
    one = Memory(data=1 * GB, teacher=2 * GB, features=0, member=GB // 10, step=3 * GB)
    more = program_bytes([[one] * 5], at_once=False) - program_bytes([[one]], at_once=False)
    assert 4 * GB // 10 <= more < GB
    # Recorded steps go side by side.
    assert program_bytes([[one] * 5], at_once=True) - program_bytes([[one]], at_once=True) > 4 * one.step


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, [4]), (100 * GB, [4]), (7.5 * GB, [2, 2]), (1 * GB, [1, 1, 1, 1])]
)
def test_a_cohort_that_does_not_fit_is_split(limit: float | None, expected: list[int]) -> None:
    cells = cohort()
    each = Memory(data=GB, teacher=GB, features=0, member=GB, step=0)
    parts = fitting([cells], {kind(cell.spec): each for cell in cells}, limit, at_once=False)
    assert [len(part) for part in parts] == expected
    assert [id(w) for part in parts for w in part] == [id(w) for w in cells]


def memory_with(method: str, **options: Any) -> Memory:
    recipe = RECIPE | {"compare": {"method": [{"name": method, "images": 100, "pool_seed": 0, **options}]}, "epochs": 1}
    return memory_of(plan(recipe, REGISTRY).cells[0].spec, torch.device("cpu"))


def test_a_pool_of_images_is_held_by_each_member() -> None:
    small, large = (memory_with("deep_inversion", batches=batches) for batches in (10, 1010))
    # 100,000 images of 3 × 32 × 32 in float16, and nothing else.
    assert large.member - small.member == 100_000 * 3 * 32 * 32 * 2
    assert asdict(large) | {"member": 0} == asdict(small) | {"member": 0}
    # 391 steps: 9 growths of 100 images, with room for as much again.
    growing = memory_with("adaptive_deep_inversion", batches=10, every=40)
    assert growing.member - small.member == (2 * (1000 + 900) - 1000) * 3 * 32 * 32 * 2


def test_a_source_passes_its_networks_with_gradients() -> None:
    """On top of the step: what grows with the images that a cell synthesizes at once."""

    def per_image(**options: Any) -> float:
        few, many = (
            memory_with("adaptive_deep_inversion", images=n, batches=1, every=40, **options) for n in (9, 1009)
        )
        return (many.step - few.step) / 1000

    teacher_alone, both = per_image(competition=0.0), per_image()
    # Every ReLU and batch norm of WRN-22-4 keeps its map: at the very least the first stage's 2 × 3 × 2 of 64 channels.
    assert teacher_alone > 12 * 64 * 32 * 32 * 4
    # Of WRN-16-2, with 2 × 2 × 2 maps of 32 channels there, they are alive at the same time.
    assert 8 * 32 * 32 * 32 * 4 < both - teacher_alone < teacher_alone


def test_free_memory_is_known_here() -> None:
    free = available_memory()
    assert free is None or 10**8 < free < 10**14


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere the system counts it right: Linux only")
def test_memory_of_the_process_that_started_one_is_not_its_own() -> None:
    """A notebook that holds gigabytes starts workers of megabytes."""
    look = "from kdbench.engine.computing.device import peak_resident; print(peak_resident())"
    code = f"import subprocess, sys; held = b'x' * 400_000_000; subprocess.run([sys.executable, '-c', {look!r}])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 10**6 < int(done.stdout) < 2 * 10**8


PROBE = """
import json, sys, resource
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from tiny import images, untrained_teacher, CPU
from kdbench.engine.data.batches import Batches
from kdbench.engine.cell import TrainingCell
from kdbench.engine.loop import TrainingLoop
from kdbench.engine.log import MetricsLog
from kdbench.engine.member import Member
from kdbench.engine.program import Cohort, Program
from kdbench.engine.computing.memory import peak_memory
from kdbench.recipe.specs import CellSpec
from pathlib import Path
specs = [CellSpec.model_validate(s) for s in json.loads(sys.stdin.read())]
data = images(specs[0].data, per_class=26)
batches = Batches(specs[0], data, CPU)
teacher = next(t for t in map(untrained_teacher, specs) if t)
seats = []
for i, spec in enumerate(specs):
    folder = Path(sys.argv[2]) / str(i)
    member = Member(spec, batches, teacher if spec.teacher else None, CPU)
    seats.append(TrainingCell(member, folder, {}, MetricsLog(folder, [], tensorboard=False)))
at = []
seen = {}
def look(seat):
    if seen.get(seat.folder, 0) != len(seat.member.log.history):
        seen[seat.folder] = len(seat.member.log.history)
        at.append(int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize())
TrainingLoop(Program([Cohort(batches, teacher, seats)]), look, lambda seat: None, lambda: False).run()
print(json.dumps({"peak": peak_memory(CPU), "at": at, "failed": [s.failure for s in seats if s.failure]}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc: Linux only")
def test_a_cohort_stays_within_what_is_predicted_and_does_not_grow(tmp_path: Path) -> None:
    """CIFAR-sized images, a wide teacher, a process with the workers' allocator; the data set itself is a small one."""
    from kdbench.engine.computing.memory import memory_of
    from kdbench.engine.workers.pool import ALLOCATOR

    recipe = RECIPE | {"student": "resnet20", "compare": {"method": ["kd", "ab"]}, "seeds": 1}
    specs = [
        cell.spec.model_copy(
            update={
                "protocol": cell.spec.protocol.model_copy(update={"epochs": None, "steps": 8, "batch_size": 64}),
                "evaluations": 4,
            }
        )
        for cell in plan(recipe, REGISTRY).cells
    ]
    predicted = program_bytes([[memory_of(spec, torch.device("cpu")) for spec in specs]], at_once=False)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(Path(__file__).parent.parent), str(tmp_path)],
        input=json.dumps([spec.model_dump(mode="json") for spec in specs]),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | ALLOCATOR | {"OMP_NUM_THREADS": "1"},
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert not result["failed"]
    assert result["peak"] <= predicted
    # Not from so far above that it would be worth nothing; the data set is a small one here.
    assert result["peak"] > 0.3 * predicted
    # After the first epochs and evaluations, resident memory stays but for where the allocator finds room: one map of
    # an evaluation slice is 64 MiB; a batch's features kept at each step would be over 270 MB in this half.
    assert max(result["at"]) - result["at"][len(result["at"]) // 2] < 0.1 * result["peak"]


def test_sets_with_several_images_for_each_of_the_batch_count_so(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RECIPE | {"compare": {"method": ["sskd"]}, "epochs": 1}
    spec = plan(recipe, REGISTRY).cells[0].spec
    four = memory_of(spec, torch.device("cpu"))
    monkeypatch.setattr(TurnedImages, "cost", lambda source, steps: Cost())
    one = memory_of(spec, torch.device("cpu"))
    assert four.features == 4 * one.features and four.step > 2 * one.step
    seconds = [Estimate(torch.device("cpu"), rate=1e9).passes(spec)]
    monkeypatch.undo()
    assert Estimate(torch.device("cpu"), rate=1e9).passes(spec) == 4 * seconds[0] > 0


def test_banks_that_are_not_filled_hold_nothing_of_what_lay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "LARGE", 10**6)
    # New memory is full of NaN then, as used memory may be.
    torch.use_deterministic_algorithms(True)
    try:
        check_cell(plan(RECIPE | {"compare": {"method": ["crd"]}, "epochs": 1}, REGISTRY).cells[0].spec)
    finally:
        torch.use_deterministic_algorithms(False)


def test_banks_of_a_million_images_are_counted_and_not_filled() -> None:
    recipe = RECIPE | {"compare": {"method": ["crd"]}, "epochs": 1}
    small = plan(recipe, REGISTRY).cells[0].spec
    large = small.model_copy(update={"data": small.data.model_copy(update={"train": 1_000_000})})
    cell = check_cell(large)
    (term,) = (term for terms in cell.terms.values() for term in terms.values() if len(term.functions))
    banks = [value for name, value in term.named_buffers() if name.endswith("bank")]
    assert [tuple(bank.shape) for bank in banks] == [(1_000_000, 128)] * 2
    assert not any(bank[:1000].any() for bank in banks)
    more = memory_of(large, torch.device("cpu"), cell).member - memory_of(small, torch.device("cpu")).member
    # Two banks of 128 numbers, and the labels.
    assert more == (1_000_000 - small.data.train) * (2 * 128 * 4 + 8)
