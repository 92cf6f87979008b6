"""Steps recorded as CUDA graphs, on a GPU: `make test-gpu`. The same is asked of a stand-in in
tests/unit/test_capture.py, which needs no GPU.

A recorded run equals an eager one bit for bit where torch has deterministic kernels for all of it; else, and only where
torch says so, to within `TOLERANCE` of each tensor's largest value after the few steps that are taken here.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

# Read when cuBLAS begins: without it its results may differ from call to call.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from captured import (
    METHODS,
    MIXED,
    REGISTRY,
    assert_near,
    assert_same,
    both,
    by_step,
    cell,
    cohort_of,
    evaluated,
    farthest,
    resumed,
    short,
    trained,
    with_drop_rate,
    with_dropout,
)

from kdbench.engine.computing.capture import CapturedProgram
from kdbench.engine.computing.compute import Computing, program_bytes
from kdbench.engine.computing.device import gpus, use
from kdbench.engine.computing.memory import memory_of
from kdbench.engine.computing.recorder import CudaRecorder
from kdbench.engine.program import Cohort, Program
from kdbench.recipe.planning import plan

__all__ = ["short"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not gpus(), reason="needs a GPU that torch can use")]

GPU = torch.device("cuda", 0)
TOLERANCE = 1e-3
# Nothing of the kind is on any other: batch norms with few images magnify the last digit.
IN_ANOTHER_ORDER = "does not have a deterministic implementation"


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[Callable[[Cohort, Cohort], None]]:
    """Deterministic kernels where there are some. Compares bit for bit, unless torch warned that there was none."""
    use(GPU)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")

        def same(a: Cohort, b: Cohort) -> None:
            if any(IN_ANOTHER_ORDER in str(one.message) for one in found):
                assert_near(a, b, TOLERANCE)
            else:
                assert_same(a, b)

        yield same
    torch.use_deterministic_algorithms(False)


Same = Callable[[Cohort, Cohort], None]


@pytest.mark.parametrize("method", METHODS)
def test_every_stage_of_every_method_is_replayed_or_says_why_not(
    method: str, tmp_path: Path, deterministic: Same
) -> None:
    program = both([cell(method)], tmp_path, CudaRecorder(GPU), device=GPU, same=deterministic)
    (of,) = program.cohorts[0].cells
    said = program.eager_stages(of.member)
    assert said == by_step(of.member)


def test_a_cohort_is_what_its_cells_are_alone(tmp_path: Path, deterministic: Same) -> None:
    """Also with cells that are evaluated on the way, and one that cannot be recorded."""
    specs = [evaluated(cell(method, steps=24)) for method in ("kd", "at", "bss", "kdsvd_columns")]
    together = cohort_of(specs, tmp_path / "together", GPU)
    program = CapturedProgram([together], CudaRecorder(GPU))
    trained(program)
    assert all(one.member.log.replayed for one in together.cells[:3])
    assert all(program.evaluations_replayed(one.member) for one in together.cells)
    for one, spec in zip(together.cells, specs, strict=True):
        alone = cohort_of([spec], tmp_path / f"alone {spec.method.name}", GPU)
        trained(CapturedProgram([alone], CudaRecorder(GPU)))
        deterministic(Cohort(together.batches, together.teacher, [one]), alone)


def test_several_seeds_in_one_program_are_what_they_are_alone(tmp_path: Path, deterministic: Same) -> None:
    seeds = [[cell(m).model_copy(update={"seed": seed}) for m in ("kd", "at")] for seed in (0, 1, 2)]
    together = [cohort_of(specs, tmp_path / f"together {i}", GPU) for i, specs in enumerate(seeds)]
    program = CapturedProgram(together, CudaRecorder(GPU))
    trained(program)
    assert len(program.recordings) == 1 and all(program.recordings.values())
    for i, specs in enumerate(seeds):
        alone = cohort_of(specs, tmp_path / f"alone {i}", GPU)
        trained(Program([alone]))
        deterministic(together[i], alone)


@pytest.mark.parametrize("methods", [["kd", "ab"], ["rco"]])
def test_resumed_cells_are_recorded_anew_and_end_as_uninterrupted_ones(
    methods: list[str], tmp_path: Path, deterministic: Same
) -> None:
    specs = [cell(method, steps=30) for method in methods]
    whole = cohort_of(specs, tmp_path / "whole", GPU)
    trained(CapturedProgram([whole], CudaRecorder(GPU)))
    deterministic(resumed(specs, tmp_path, lambda: CudaRecorder(GPU), 12, GPU), whole)


@pytest.mark.parametrize("optimizer", [{"name": "adam", "lr": 0.001}, {"name": "adamw", "lr": 0.001}])
def test_other_optimizers_take_their_rates_from_the_device(
    optimizer: dict[str, Any], tmp_path: Path, deterministic: Same
) -> None:
    if optimizer["name"] not in REGISTRY.names("optimizers"):
        pytest.fail(f"no such optimizer: {', '.join(REGISTRY.names('optimizers'))}")
    protocol = {"name": "digits", "optimizer": optimizer, "schedule": "cosine"}
    program = both([cell("kd", protocol=protocol)], tmp_path, CudaRecorder(GPU), device=GPU, same=deterministic)
    assert program.eager_stages(program.cohorts[0].cells[0].member) == {}


@pytest.mark.parametrize(
    ("method", "more", "changes"),
    [
        # Batches that are mixed, and an average of the weights; also where the processor makes the images ahead.
        ("kd", {"protocol": MIXED}, {}),
        ("kd", {"protocol": MIXED | {"augmentation": {"transforms": ["rand_augment"], "flip": True}}}, {}),
        ("kd", {}, {"streamed": True}),
        # It answers through another head.
        ("simkd", {}, {}),
    ],
)
def test_batches_and_evaluations_of_all_kinds_are_replayed(
    method: str, more: dict[str, Any], changes: dict[str, Any], tmp_path: Path, deterministic: Same
) -> None:
    spec = evaluated(cell(method, **more))
    spec = spec.model_copy(update={"data": spec.data.model_copy(update=changes)})
    program = both([spec], tmp_path, CudaRecorder(GPU), device=GPU, same=deterministic)
    of = program.cohorts[0].cells[0].member
    assert of.log.replayed and (program.evaluations_replayed(of) or changes)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_clipped_gradients_are_replayed(optimizer: str, tmp_path: Path, deterministic: Same) -> None:
    method = {"name": "kd", "stages": {"classification": {"clip": 0.5}}}
    protocol = {"name": "digits", "optimizer": {"name": optimizer, "lr": 0.001}, "schedule": "cosine"}
    program = both([cell(method, protocol=protocol)], tmp_path, CudaRecorder(GPU), device=GPU, same=deterministic)
    assert program.eager_stages(program.cohorts[0].cells[0].member) == {}


def compiled(cohort: Cohort) -> Cohort:
    """The same with compiled losses; the networks are as they were."""
    torch._dynamo.reset()
    for one in cohort.cells:
        for stage in one.member.spec.method.stages:
            for term in one.member.modules.terms_of(stage).values():
                term.compile_loss(one.member.spec.protocol.batch_size)
    return cohort


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_as_a_gpu_is_used(method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In bfloat16 and channels_last, also where a batch has more than two images, by compiled losses. A loss that is
    not finite fails."""
    used = Computing(precision="bfloat16", layout="channels_last", cuda_graphs=True)
    cohort = compiled(cohort_of([evaluated(cell(method, steps=8, batch=16), 2)], tmp_path, GPU, computing=used))
    program = CapturedProgram([cohort], CudaRecorder(GPU))
    trained(program)
    assert program.eager_stages(cohort.cells[0].member).keys() == by_step(cohort.cells[0].member).keys()
    assert not [one.message for one in caplog.records if one.name == "kdbench"]


def stepped(method: str, folder: Path, precision: Literal["float32", "bfloat16"], compile_losses: bool) -> Cohort:
    cohort = cohort_of([cell(method, steps=2, batch=16)], folder, GPU, computing=Computing(precision=precision))
    trained(Program([compiled(cohort) if compile_losses else cohort]))
    return cohort


@pytest.mark.parametrize("method", METHODS)
def test_compiled_losses_train_as_eager_ones(method: str, tmp_path: Path) -> None:
    """The last digit may turn a neuron on or off. DIST is off by 0.0094 then, and by as much on a CPU whose student
    begins with weights that differ by a millionth."""
    eager, other = (stepped(method, tmp_path / str(i), "float32", compile_losses=i == 1) for i in range(2))
    assert_near(eager, other, 20 * TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
def test_compiled_losses_are_as_near_to_float32_as_eager_ones(method: str, tmp_path: Path) -> None:
    """In bfloat16, in which two ways to compute the same differ by some percent after two steps."""
    exact = stepped(method, tmp_path / "exact", "float32", compile_losses=False)
    eager, other = (stepped(method, tmp_path / str(i), "bfloat16", compile_losses=i == 1) for i in range(2))
    assert farthest(exact, other)[0] <= 1.5 * farthest(exact, eager)[0] + 20 * TOLERANCE


# --- what draws at random


def test_a_network_that_draws_has_a_graph_of_its_own(tmp_path: Path, deterministic: Same) -> None:
    specs = [cell("kd"), cell("ce")]
    program = both(specs, tmp_path, CudaRecorder(GPU), with_dropout, GPU, same=deterministic)
    (recording,) = [r for r in program.recordings.values() if r]
    assert [one.member.spec.method.name for one in recording.alone] == ["kd"]
    alone = both(specs[:1], tmp_path / "alone", CudaRecorder(GPU), with_dropout, GPU, same=deterministic)
    first = program.cohorts[0]
    deterministic(Cohort(first.batches, first.teacher, first.cells[:1]), alone.cohorts[0])


def test_timm_with_a_drop_rate_is_the_same_alone_and_in_a_cohort(tmp_path: Path, deterministic: Same) -> None:
    specs = [cell(method, student="timm:resnet10t") for method in ("kd", "ce")]
    program = both(specs, tmp_path, CudaRecorder(GPU), with_drop_rate, GPU, same=deterministic)
    (recording,) = [r for r in program.recordings.values() if r]
    assert len(recording.alone) == 2
    alone = both(specs[1:], tmp_path / "alone", CudaRecorder(GPU), with_drop_rate, GPU, same=deterministic)
    first = program.cohorts[0]
    deterministic(Cohort(first.batches, first.teacher, first.cells[1:]), alone.cohorts[0])


# --- what cannot be recorded


def reads(loss: torch.Tensor) -> None:
    """Eager steps can look at a value, a recording cannot."""
    loss.item()


def takes_too_much(loss: torch.Tensor) -> None:
    torch.empty(2**50, dtype=torch.uint8, device=loss.device)


@pytest.mark.parametrize(("what", "said"), [(reads, "captur"), (takes_too_much, "out of memory")])
def test_a_recording_that_fails_leaves_torch_usable(
    what: Callable[[torch.Tensor], None], said: str, tmp_path: Path, deterministic: Same
) -> None:
    """Its cell goes on eagerly, also with what draws; the other is recorded, and so is what comes later."""

    def when_recorded(cohort: Cohort) -> None:
        with_dropout(cohort)
        term = next(iter(cohort.cells[0].member.stage.terms.values()))
        forward = term.forward

        def looks(*values: Any) -> Any:
            found = forward(*values)
            if torch.cuda.is_current_stream_capturing():
                what(found)
            return found

        term.forward = looks  # type: ignore[method-assign]

    recorder = CudaRecorder(GPU)
    stream = torch.cuda.current_stream(GPU)
    program = both([cell("kd"), cell("at")], tmp_path, recorder, when_recorded, GPU, same=deterministic)
    assert torch.cuda.current_stream(GPU) == stream
    failing, other = program.cohorts[0].cells
    (why,) = program.eager_stages(failing.member).values()
    assert why.startswith("recording failed: CUDA") and said in why
    assert other.member.log.replayed and not program.eager_stages(other.member)
    later = both([cell("at")], tmp_path / "later", recorder, device=GPU, same=deterministic)
    assert later.cohorts[0].cells[0].member.log.replayed


def test_an_evaluation_that_cannot_be_recorded_runs_eagerly(tmp_path: Path, deterministic: Same) -> None:
    def looks(cohort: Cohort) -> None:
        model = cohort.cells[0].member.student.model
        forward = model.forward

        def reads(images: Any) -> Any:
            if torch.cuda.is_current_stream_capturing() and not model.training:
                images.sum().item()
            return forward(images)

        model.forward = reads  # type: ignore[method-assign]

    program = both([evaluated(cell("kd"))], tmp_path, CudaRecorder(GPU), looks, GPU, same=deterministic)
    of = program.cohorts[0].cells[0].member
    assert of.log.replayed and not program.evaluations_replayed(of)


def says_no(_: torch.Tensor) -> None:
    raise ValueError("not while it is recorded")


@pytest.mark.parametrize("what", [reads, says_no])
def test_a_metric_that_a_recording_does_not_bear_is_measured_eagerly(
    what: Callable[[torch.Tensor], None], tmp_path: Path, deterministic: Same
) -> None:
    """A recording would keep a measurement without this metric, and replay it."""

    def measured(metric: Callable[..., torch.Tensor], *values: torch.Tensor) -> torch.Tensor:
        value = metric(*values)
        if torch.cuda.is_current_stream_capturing():
            what(value)
        return value

    def looks(cohort: Cohort) -> None:
        member = cohort.cells[0].member
        for stage in member.spec.method.stages:
            for term in member.modules.terms_of(stage).values():
                term.metrics = {name: partial(measured, metric) for name, metric in term.metrics.items()}

    program = both([evaluated(cell("ab"))], tmp_path, CudaRecorder(GPU), looks, GPU, same=deterministic)
    of = program.cohorts[0].cells[0].member
    assert of.log.replayed and not program.evaluations_replayed(of)
    agreements = [entry["metrics"]["agreement"] for entry in of.log.history]
    assert agreements and all(value is not None for points in agreements for value in points.values())


# --- memory


def test_what_a_program_takes_is_no_more_than_was_announced(tmp_path: Path) -> None:
    recipe = {
        "data": "cifar10",
        "teacher": "wrn_22_4_cifar10",
        "student": "wrn_16_2",
        "protocol": "ab_official",
        "compare": {"method": ["kd", "at", "ab"]},
        "seeds": 2,
    }
    specs = [one.spec for one in plan(recipe, REGISTRY).cells]
    steps = [
        s.model_copy(update={"protocol": s.protocol.model_copy(update={"epochs": None, "steps": 30})}) for s in specs
    ]
    seeds = [[s for s in steps if s.seed == seed] for seed in (0, 1)]
    predicted = program_bytes([[memory_of(s, GPU) for s in of_seed] for of_seed in seeds], at_once=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(GPU)
    before = torch.cuda.memory_reserved(GPU)
    cohorts = [cohort_of(copy.deepcopy(of_seed), tmp_path / str(i), GPU) for i, of_seed in enumerate(seeds)]
    trained(CapturedProgram(cohorts, CudaRecorder(GPU)))
    assert torch.cuda.max_memory_reserved(GPU) - before <= predicted
