"""Steps are recorded once and replayed, without a GPU by a stand-in that fails on all that a graph would get wrong: for
every method and stage, replayed steps are the eager ones bit for bit. What cannot be recorded says why, and loses
nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captured import (
    METHODS,
    MIXED,
    STEPS,
    both,
    by_step,
    cell,
    cohort_of,
    evaluated,
    outcome,
    resumed,
    short,
    trained,
    with_drop_rate,
    with_dropout,
)
from standin import Broken, StandIn

from kdbench.engine.cell import TrainingCell
from kdbench.engine.computing.capture import CapturedProgram
from kdbench.engine.loop import TrainingLoop
from kdbench.engine.member import Member
from kdbench.engine.program import Cohort, Program
from kdbench.engine.teachers.loading import fingerprint
from kdbench.engine.workers.training import way_of
from kdbench.methods.bss import attack
from kdbench.methods.sskd.source import TurnedImages

__all__ = ["short"]


@pytest.mark.parametrize("method", METHODS)
def test_every_stage_of_every_method_is_replayed_or_says_why_not(method: str, tmp_path: Path) -> None:
    program = both([cell(method)], tmp_path)
    (of,) = program.cohorts[0].cells
    recorder: Any = program.recorder
    said = program.eager_stages(of.member)
    assert said == by_step(of.member)
    assert {name for _, name in program.done} == of.member.spec.method.stages.keys() - said.keys()
    assert recorder.replayed >= len(program.done) or len(said) == len(of.member.spec.method.stages)


@pytest.mark.parametrize("method", ["bss", "bss_released", "bss_keep"])
def test_an_attack_that_asks_nothing_is_replayed(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU. The record counts what became of the samples of all steps."""
    monkeypatch.setattr(attack, "ASKED", ())
    program = both([cell(method, batch=8)], tmp_path)
    (of,) = program.cohorts[0].cells
    assert of.member.log.replayed and not program.eager_stages(of.member)
    eager = cohort_of([cell(method, batch=8)], tmp_path / "again")
    trained(Program([eager]))
    counted, expected = (one.member.sources["classification"].record() for one in (of, *eager.cells))
    assert counted == expected and counted["steps"] > 5


def test_a_cohort_is_one_recording_and_members_that_leave_make_another(tmp_path: Path) -> None:
    """AB's stages end in the middle of the others' only one."""
    specs = [cell(method, steps=2 * STEPS if i else STEPS) for i, method in enumerate(("ab", "ce", "kd", "at"))]
    program = both(specs, tmp_path)
    assert len([r for r in program.recordings.values() if r]) == 2


def test_seeds_side_by_side_are_the_cells_alone(tmp_path: Path) -> None:
    specs = [cell("kd").model_copy(update={"seed": seed}) for seed in (0, 1)]
    alone = [cohort_of([spec], tmp_path / f"alone{spec.seed}") for spec in specs]
    for cohort in alone:
        trained(Program([cohort]))
    together = [cohort_of([spec], tmp_path / f"together{spec.seed}") for spec in specs]
    program = CapturedProgram(together, StandIn())
    trained(program)
    assert [outcome(cohort) for cohort in together] == [outcome(cohort) for cohort in alone]
    assert len(program.recordings) == 1 and all(program.recordings.values())


@pytest.mark.parametrize("transforms", [None, ["rand_augment"]])
def test_mixed_batches_and_averages_are_replayed(transforms: list[str] | None, tmp_path: Path) -> None:
    """Of images on the device, and of those that the processor makes ahead."""
    protocol = MIXED | {"augmentation": MIXED["augmentation"] | {"transforms": transforms}}
    program = both([evaluated(cell("kd", protocol=protocol))], tmp_path)
    assert any(program.recordings.values())


def test_a_smaller_last_batch_is_a_recording_of_its_own_or_eager(tmp_path: Path) -> None:
    """50 images in batches of 8: six whole ones and one of two, in every epoch."""
    spec = cell("kd", steps=28, batch=8)
    program = both([spec], tmp_path, per_class=5)
    sizes = {key[-1] for key in program.recordings if key}
    assert (8,) in sizes


def test_steps_that_change_in_turns_are_recorded_too(tmp_path: Path) -> None:
    """Ten images in batches of 6: a batch of six, one of four, and again."""
    program = both([cell("kd", steps=28, batch=6)], tmp_path, per_class=1)
    assert {key[-1] for key, recording in program.recordings.items() if recording} == {(6,), (4,)}
    assert program.eager_stages(program.cohorts[0].cells[0].member) == {}


def test_a_network_that_draws_is_replayed_by_itself_with_draws_of_its_own_address(tmp_path: Path) -> None:
    program = both([cell("kd"), cell("ce")], tmp_path, change=with_dropout)
    (recording,) = [r for r in program.recordings.values() if r]
    assert [c.member.spec.method.name for c in recording.alone] == ["kd"]
    alone = both([cell("kd")], tmp_path / "alone", change=with_dropout)
    assert outcome(alone.cohorts[0])[0] == outcome(program.cohorts[0])[0]


def test_timm_with_a_drop_rate_is_the_same_alone_and_in_a_cohort(tmp_path: Path) -> None:
    specs = [cell(method, student="timm:resnet10t") for method in ("kd", "ce")]
    program = both(specs, tmp_path, change=with_drop_rate)
    (recording,) = [r for r in program.recordings.values() if r]
    assert len(recording.alone) == 2
    alone = both(specs[1:], tmp_path / "alone", change=with_drop_rate)
    assert outcome(alone.cohorts[0])[0] == outcome(program.cohorts[0])[1]


def test_resumed_cells_are_recorded_anew_and_end_as_uninterrupted_ones(tmp_path: Path) -> None:
    specs = [cell(method, steps=20) for method in ("kd", "ab")]
    whole = cohort_of(specs, tmp_path / "whole")
    trained(CapturedProgram([whole], StandIn()))
    assert outcome(resumed(specs, tmp_path, StandIn, 9)) == outcome(whole)


def test_a_record_says_that_steps_were_replayed_also_before_a_stop(tmp_path: Path) -> None:
    """After which too few are left for a recording."""
    (one,) = resumed([cell("kd", steps=20)], tmp_path, StandIn, 18).cells
    assert way_of(one.member, Program([]))["cuda_graphs"] is True


def test_a_recording_that_fails_ends_no_run(tmp_path: Path) -> None:
    class Fails(StandIn):
        def record(self, call: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    program = both([evaluated(cell("kd"))], tmp_path, recorder=Fails())
    (why,) = program.eager_stages(program.cohorts[0].cells[0].member).values()
    assert why == "recording failed: CUDA error: operation not permitted when stream is capturing"
    assert not program.cohorts[0].cells[0].member.log.replayed
    assert not program.evaluations_replayed(program.cohorts[0].cells[0].member)


def test_a_cell_that_fails_between_stretches_is_replayed_no_more(tmp_path: Path) -> None:
    """Evaluated every ten steps: the first ten record both cells, before the next ones one of them fails."""
    specs = [evaluated(cell(method, steps=30), 3) for method in ("kd", "ce")]
    cohort = cohort_of(specs, tmp_path / "both", per_class=2)
    failing, other = cohort.cells
    prepare, left = failing.member.prepare, []

    def fails(steps: int) -> None:
        if failing.member.step:
            left.append(fingerprint(failing.member.student.model))
            raise ValueError("a schedule that ends")
        prepare(steps)

    failing.member.prepare = fails  # type: ignore[method-assign]
    program = CapturedProgram([cohort], StandIn())
    TrainingLoop(program, lambda cell: None, lambda cell: None, lambda: False).run()
    assert failing.member.log.replayed and "a schedule that ends" in str(failing.failure)
    assert left == [fingerprint(failing.member.student.model)]
    alone = cohort_of(specs[1:], tmp_path / "alone", per_class=2)
    trained(Program([alone]))
    assert outcome(cohort)[1] == outcome(alone)[0] and other.failure is None


def test_rates_of_an_optimizer_that_takes_numbers_are_no_stretch(tmp_path: Path) -> None:
    protocol = {"name": "digits", "optimizer": {"name": "adam", "lr": 0.001}, "schedule": "cosine"}
    program = both([cell("kd", protocol=protocol)], tmp_path)
    assert program.eager_stages(program.cohorts[0].cells[0].member) == {
        "classification": "its optimizer takes its rates from the host"
    }


# --- what a graph would get wrong without a word


def clear_momentum(member: Member) -> None:
    for one in member.stage.optimizers:
        for kept in one.optimizer.state.values():
            kept["momentum_buffer"] = torch.zeros_like(kept["momentum_buffer"])


def load_optimizer(member: Member) -> None:
    for one in member.stage.optimizers:
        one.optimizer.load_state_dict(one.optimizer.state_dict())


def rate_as_number(member: Member) -> None:
    one = member.stage.optimizers[0]
    one.on_device = False
    one.optimizer.param_groups[0]["lr"] = torch.tensor(0.1)


def order_replaced(member: Member) -> None:
    epoch = member.batches.source.epoch
    epoch.order = epoch.order.clone()


def position_replaced(member: Member) -> None:
    member.batches.source.epoch.first = member.batches.source.epoch.first.clone()


def statistics_replaced(member: Member) -> None:
    norm = next(m for m in member.student.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.running_mean = norm.running_mean.clone()  # type: ignore[union-attr]


def weight_as_number(member: Member) -> None:
    now = member.stage.next_numbers

    def next_numbers() -> Any:
        numbers = now()
        return numbers._replace(weights=dict.fromkeys(numbers.weights, 1.0 + member.step))

    member.stage.next_numbers = next_numbers  # type: ignore[method-assign]


def sums_replaced(member: Member) -> None:
    member.meter.sums = torch.zeros_like(member.meter.sums)


def term_with_a_count(member: Member) -> None:
    term = next(iter(member.stage.terms.values()))
    forward = term.forward
    term.forward = lambda *given: forward(*given) * (1 + member.step)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "trap",
    [
        clear_momentum,
        load_optimizer,
        rate_as_number,
        order_replaced,
        position_replaced,
        statistics_replaced,
        weight_as_number,
        sums_replaced,
        term_with_a_count,
    ],
)
def test_what_would_break_a_graph_in_silence_is_found(trap: Callable[[Member], None], tmp_path: Path) -> None:
    cohort = cohort_of([cell("kd")], tmp_path)
    program = CapturedProgram([cohort], StandIn())
    (one,) = cohort.cells
    assert one.member.ready(lambda text: None, lambda: False)
    assert program.prepare(cohort.cells) > 5
    for _ in range(4):
        program.step(cohort.cells)
    assert one.member.log.replayed and one.failure is None
    trap(one.member)
    with pytest.raises(Broken, match="stale"):
        program.step(cohort.cells)
        program.step(cohort.cells)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda value: value * value.item(), "reads values"),
        (lambda value: value * value.tolist(), "host's side.*tolist"),
        (lambda value: value * value.to("cpu"), "host's side.*to"),
        (lambda value: value * torch.tensor(2.0), "host's numbers"),
        (lambda value: value * torch.ones(()), "host's side.*ones"),
        (lambda value: value.expand(2)[value.expand(2) > 0].sum(), "has the host count"),
        (lambda value: value.repeat_interleave((value > 0).long()).sum(), "has the host count"),
        (lambda value: value + value.detach().unique().sum(), "reads values"),
    ],
)
def test_what_a_graph_cannot_hold_is_found_when_it_is_recorded(
    loss: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    cohort = cohort_of([cell("kd")], tmp_path)
    program = CapturedProgram([cohort], StandIn())
    term = next(iter(cohort.cells[0].member.stage.terms.values()))
    forward = term.forward
    term.forward = lambda *given: loss(forward(*given))  # type: ignore[method-assign]
    cohort.cells[0].member.ready(lambda text: None, lambda: False)
    program.prepare(cohort.cells)
    with pytest.raises(Broken, match=message):
        for _ in range(4):
            program.step(cohort.cells)


def test_steps_on_memory_that_a_source_has_left_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a set of made images grows: else every size would hold its memory to the end."""
    monkeypatch.setattr(TurnedImages, "stretch", lambda self, now: 7 - now.step % 7)
    monkeypatch.setattr(TurnedImages, "ready", lambda self, now, tell, stopping: setattr(self, "at", now.step) or True)
    monkeypatch.setattr(TurnedImages, "memory", lambda self: self.at // 7)
    program = both([cell("sskd", steps=28)], tmp_path)
    recorder: Any = program.recorder
    stages = {kind[0][0][0] for kind in program.recordings}
    assert len(program.recordings) == len(stages) and recorder.recorded > len(stages) and recorder.replayed


def test_a_cell_that_only_tries_something_out_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tried = TrainingCell(cohort_of([cell("kd")], tmp_path).cells[0].member)
    with tried.failures():
        raise ZeroDivisionError("out of memory")
    assert "out of memory" in (tried.failure or "") and not (tmp_path / "error.txt").exists()


# --- a cell that cannot be recorded, in a program with others


def test_a_cell_that_cannot_be_recorded_steps_beside_the_recorded_ones(tmp_path: Path) -> None:
    """BSS attacks by what its networks answer; KD beside it is replayed, and both are what they are alone."""
    specs = [cell(method, steps=24) for method in ("bss", "kd")]
    specs = [spec.model_copy(update={"evaluations": 2}) for spec in specs]
    program = both(specs, tmp_path)
    bss, kd = program.cohorts[0].cells
    assert kd.member.log.replayed and program.eager_stages(kd.member) == {}
    said = program.eager_stages(bss.member)
    assert not bss.member.log.replayed and all("an attack" in why for why in said.values()) and said
    alone = cohort_of(specs[1:], tmp_path / "alone")
    trained(Program([alone]))
    assert outcome(alone)[0] == outcome(program.cohorts[0])[1]


@pytest.mark.parametrize("change", [lambda cohort: None, with_dropout])
def test_a_cell_whose_recording_fails_leaves_the_others_theirs(
    change: Callable[[Cohort], None], tmp_path: Path
) -> None:
    class Notices(StandIn):
        recording = False

        def record(self, call: Callable[[], None]) -> Callable[[], None]:
            self.recording = True
            try:
                return super().record(call)
            finally:
                self.recording = False

    recorder = Notices()

    def asks(cohort: Cohort) -> None:
        change(cohort)
        term = next(iter(cohort.cells[0].member.stage.terms.values()))
        forward = term.forward

        def looks(*values: Any) -> Any:
            if recorder.recording:
                raise RuntimeError("operation not permitted when stream is capturing")
            return forward(*values)

        term.forward = looks  # type: ignore[method-assign]

    program = both([cell(method) for method in ("kd", "ce", "at")], tmp_path, change=asks, recorder=recorder)
    failing, *others = program.cohorts[0].cells
    (why,) = program.eager_stages(failing.member).values()
    assert why == "recording failed: operation not permitted when stream is capturing"
    assert all(one.member.log.replayed and not program.eager_stages(one.member) for one in others)
    assert not failing.member.log.replayed


def test_a_cell_that_fails_beside_recorded_ones_leaves_them_theirs(tmp_path: Path) -> None:
    specs = [cell(method, steps=24) for method in ("bss", "kd")]
    cohort = cohort_of(specs, tmp_path / "both")
    failing, other = cohort.cells
    make = failing.member.make

    def fails(*args: Any) -> Any:
        if failing.member.step == 10:
            raise ValueError("an attack that ends")
        return make(*args)

    failing.member.make = fails  # type: ignore[method-assign]
    program = CapturedProgram([cohort], StandIn())
    TrainingLoop(program, lambda cell: None, lambda cell: None, lambda: False).run()
    assert "an attack that ends" in str(failing.failure) and failing.member.step == 10
    assert other.failure is None and other.member.log.replayed
    alone = cohort_of(specs[1:], tmp_path / "alone")
    trained(Program([alone]))
    assert outcome(alone)[0] == outcome(cohort)[1]


# --- evaluations


@pytest.mark.parametrize("method", ["kd", "ab", "ab_kd_ce", "at", "fitnets", "uda_kd", "rco"])
def test_evaluations_are_replayed_and_measure_what_eager_ones_do(method: str, tmp_path: Path) -> None:
    """Of weights that a step moves in place, of batch norms' statistics, of connectors of stages that are over; `both`
    compares all that was measured."""
    spec = cell(method)
    stages = len(spec.method.stages)
    program = both([evaluated(spec, 5 * stages)], tmp_path)
    (of,) = program.cohorts[0].cells
    losses = [entry["test"]["loss"] for entry in of.member.log.history]
    assert len(losses) == 5 * stages and len(set(losses)) > 3
    # One recording for every set of stages that are measured.
    assert [kind[1] for kind in program.evaluations] == [tuple(spec.method.stages)[: i + 1] for i in range(stages)]
    assert all(program.evaluations.values()) and program.evaluations_replayed(of.member)


def test_a_single_evaluation_is_not_worth_recording(tmp_path: Path) -> None:
    program = both([evaluated(cell("kd"), 2)], tmp_path)
    assert not program.evaluations


def test_weights_that_lie_elsewhere_are_evaluated_anew(tmp_path: Path) -> None:
    """As after an operation that prunes, or whatever else replaces a parameter."""

    def replaces(cohort: Cohort) -> None:
        (of,) = cohort.cells
        before, model = of.member.before_step, of.member.student.model

        def moved() -> None:
            before()
            if of.member.step == 6:
                for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
                    norm.running_mean = norm.running_mean.clone()  # type: ignore[union-attr]

        of.member.before_step = moved  # type: ignore[method-assign]

    specs = [
        evaluated(cell("kd", steps=14, protocol={"name": "digits", "optimizer": {"name": "adam", "lr": 0.001}}), 7)
    ]
    program = both(specs, tmp_path, change=replaces)
    (of,) = program.cohorts[0].cells
    assert len(program.evaluations) == 2 and all(program.evaluations.values())


def test_a_metric_that_reads_a_value_would_be_found(tmp_path: Path) -> None:
    cohort = cohort_of([evaluated(cell("ab"))], tmp_path)
    terms = cohort.cells[0].member.modules.terms_of("boundaries")
    for term in terms.values():
        term.metrics = {"agreement": lambda student, teacher: torch.full((), (student > 0).float().mean().item())}
    with pytest.raises(Broken, match="reads values"):
        trained(CapturedProgram([cohort], StandIn()))
