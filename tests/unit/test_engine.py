"""What the training engine promises: pairing, bit-equality, isolation, modes, and failures that name their place."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shipped import DIGITS, REGISTRY
from tiny import CPU, changed_at, images, killed, member_of, sets_at, shortened, train, untrained_teacher

from kdbench.engine import checkpoint
from kdbench.engine.cell import TrainingCell
from kdbench.engine.data.batches import Batches
from kdbench.engine.evaluation import evaluate
from kdbench.engine.log import MetricsLog
from kdbench.engine.loop import TrainingLoop
from kdbench.engine.member import Member
from kdbench.engine.meter import Meter
from kdbench.engine.program import Cohort, Program
from kdbench.engine.teachers.loading import fingerprint
from kdbench.engine.teachers.teacher import Teacher
from kdbench.errors import UserError
from kdbench.losses.ab import activation_boundary
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec
from kdbench.schedules import Moment


def cell(method: str | dict[str, Any], seed: int = 0, steps: int = 8, **more: Any) -> CellSpec:
    spec = plan(DIGITS | more | {"method": method, "seeds": [seed]}, REGISTRY).cells[0].spec
    return shortened(spec, steps)


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return fingerprint(a) == fingerprint(b)


def test_cells_of_one_seed_are_paired() -> None:
    """The same initial student, the same order and views, whatever the method draws."""
    specs = [
        cell(method, protocol={"name": "digits", "augmentation": {"padding": 2, "mode": "zero", "flip": True}})
        for method in ("ce", "kd", "ab", "fitnets")
    ]
    made = [member_of(spec) for spec in specs]
    for member, batches, teacher in made[1:]:
        assert same_state(member.student.model, made[0][0].student.model)
        train(member, batches, teacher, 3)
        for step in (0, 1, 5):
            a, b = batches.at(step, member.timeline), made[0][1].at(step, made[0][0].timeline)
            assert torch.equal(a.images, b.images) and torch.equal(a.index, b.index)


def test_another_seed_is_another_student_and_order() -> None:
    (a, batches_a, _), (b, batches_b, _) = member_of(cell("ce", 0)), member_of(cell("ce", 1))
    assert not same_state(a.student.model, b.student.model)
    assert not torch.equal(batches_a.at(0, a.timeline).index, batches_b.at(0, b.timeline).index)


def test_another_seed_is_another_subset_but_with_a_seed_for_all() -> None:
    for split_seed, same in ((None, False), (0, True), (7, True)):
        parts = []
        for seed in (0, 1):
            spec = cell("ce", seed, data={"name": "digits", "split_seed": split_seed})
            spec = spec.model_copy(update={"data": spec.data.model_copy(update={"per_class": 2})})
            parts.append(Batches(spec, images(spec.data, per_class=6), CPU).positions)
        assert torch.equal(*parts) is same, split_seed


def test_connectors_and_draws_are_those_of_a_seed_and_draws_of_a_step() -> None:
    a, b, again, other = (member_of(cell(*one))[0] for one in (("ab", 0), ("ab", 1), ("ab", 0), ("at", 0)))
    assert same_state(a.modules.terms, again.modules.terms) and not same_state(a.modules.terms, b.modules.terms)

    def drawn(member: Member, step: int) -> float:
        member.step = step
        member.before_step()
        return torch.rand(()).item()

    assert drawn(a, 0) == drawn(other, 0), "methods are paired"
    assert len({drawn(a, 0), drawn(a, 1), drawn(b, 0), drawn(b, 1)}) == 4


def test_a_term_is_the_sum_of_its_layers_of_which_the_deepest_weighs_most() -> None:
    """AB's: 1/4, 1/2 and 1, from the shallowest to the deepest."""
    member, batches, teacher = member_of(cell("ab"))
    assert teacher is not None
    term = member.stage.terms["boundary"]
    sets = sets_at(batches, 0, member.timeline, ["data"])
    values = {
        name: {"data": network(network.normalizer(sets["data"].images), [f"layer{i}.preact" for i in (1, 2, 3)])}
        for name, network in (("student", member.student), ("teacher", teacher.network))
    }
    expected = 0.0
    for weight, (i, layer) in zip((0.25, 0.5, 1.0), enumerate(term.layers, 1), strict=True):
        student, taught = (values[name]["data"][f"layer{i}.preact"] for name in ("student", "teacher"))
        expected += weight * activation_boundary(layer.connectors[0](student), taught).item()
    assert term(values, sets).item() == pytest.approx(expected, rel=1e-5)


def test_an_epoch_sees_every_image_once() -> None:
    cropped = {"name": "digits", "augmentation": {"padding": 2, "mode": "zero", "flip": True}}
    member, batches, _ = member_of(cell("ce", protocol=cropped))
    line = member.timeline
    seen = torch.cat([batches.at(step, line).index for step in range(line.batches_per_epoch)])
    assert sorted(seen.tolist()) == list(range(len(batches.train.labels)))
    later = torch.cat([batches.at(line.batches_per_epoch + step, line).index for step in range(line.batches_per_epoch)])
    assert sorted(later.tolist()) == sorted(seen.tolist()) and later.tolist() != seen.tolist()
    each = line.batches_per_epoch
    views = [torch.cat([batches.at(n * each + step, line).view for step in range(each)]) for n in (0, 1)]  # type: ignore[misc]
    assert views[0].tolist() != views[1].tolist()


def test_steps_of_an_extra_budget_do_not_shift_the_others() -> None:
    spec = plan(DIGITS | {"method": "ab_crd", "epochs": 2}, REGISTRY).cells[0].spec
    plain = plan(DIGITS | {"method": "ce", "epochs": 2}, REGISTRY).cells[0].spec
    data = images(spec.data)
    extra, base = Batches(spec, data, CPU), Batches(plain, data, CPU)
    member, other = Member(spec, extra, untrained_teacher(spec), CPU), Member(plain, base, None, CPU)
    assert member.timeline.extra > 0
    # Its own first epoch is another one.
    assert not torch.equal(extra.at(0, member.timeline).index, base.at(0, other.timeline).index)  # type: ignore[arg-type]
    a, b = extra.at(member.timeline.extra, member.timeline), base.at(0, other.timeline)
    assert torch.equal(a.index, b.index)


def cohort_of(specs: list[CellSpec], folder: Path, stop: Callable[[], bool] = lambda: False) -> list[TrainingCell]:
    data = images(specs[0].data)
    batches = Batches(specs[0], data, CPU)
    teacher = next((t for t in map(untrained_teacher, specs) if t), None)
    seats = []
    for i, spec in enumerate(specs):
        member = Member(spec, batches, teacher if spec.teacher else None, CPU)
        seats.append(TrainingCell(member, folder / str(i), {}, MetricsLog(folder / str(i), [], tensorboard=False)))
    TrainingLoop(Program([Cohort(batches, teacher, seats)]), lambda seat: None, lambda seat: None, stop).run()
    return seats


def test_a_cohort_gives_the_bits_of_its_cells_alone(tmp_path: Path) -> None:
    """Members in different stages, with and without teacher, share one teacher pass and change nothing else."""
    specs = [cell(method) for method in ("ce", "kd", "ab", "fitnets", "at", "hint")]
    together = cohort_of(specs, tmp_path / "together")
    for i, spec in enumerate(specs):
        alone = cohort_of([spec], tmp_path / f"alone{i}")[0]
        assert same_state(together[i].member.student.model, alone.member.student.model), spec.method.name
        assert [e["test"] for e in together[i].member.log.history] == [e["test"] for e in alone.member.log.history]


def test_a_member_that_fails_leaves_the_others_untouched(tmp_path: Path) -> None:
    bad = cell("kd", protocol={"name": "digits", "optimizer": {"lr": 1.0e30}})
    seats = cohort_of([bad, cell("kd")], tmp_path / "both")
    assert seats[0].failure is not None and "not finite at step" in seats[0].failure
    assert "stage 'training'" in seats[0].failure or "stage '" in seats[0].failure
    assert seats[1].failure is None and seats[1].member.finished
    alone = cohort_of([cell("kd")], tmp_path / "alone")[0]
    assert same_state(seats[1].member.student.model, alone.member.student.model)


@pytest.mark.parametrize("method", ["ab", "ab_teacher_train", "fitnets"])
@pytest.mark.parametrize("at", [1, 4, 5])
def test_state_goes_on_bit_identically(method: str, at: int, tmp_path: Path) -> None:
    spec = cell({"name": method, "share": "50%"}, steps=8)
    whole, batches, teacher = member_of(spec)
    train(whole, batches, teacher, 8)
    second = killed(lambda: member_of(spec, teacher=teacher)[0], batches, teacher, tmp_path, at)
    assert same_state(second.student.model, whole.student.model)
    assert second.meter.result() == whole.meter.result()


def test_a_checkpoint_of_something_else_is_set_aside(tmp_path: Path) -> None:
    member, _, _ = member_of(cell("ce"))
    checkpoint.save(tmp_path, {"key": {"a": 1}, **member.state()})
    told: list[str] = []
    assert checkpoint.load(tmp_path, {"a": 2}, member.state(), told.append) is None
    assert (tmp_path / "checkpoint.unusable").is_file()
    (tmp_path / "checkpoint.pt").write_bytes(b"half of a file")
    assert checkpoint.load(tmp_path, {"a": 1}, member.state(), told.append) is None
    assert checkpoint.load(tmp_path, {"a": 1}, member.state(), told.append) is None
    assert [text.partition(": set aside as")[0] for text in told] == [
        "its checkpoint is of other a",
        "its checkpoint is damaged",
    ]


def test_a_checkpoint_with_a_wrong_byte_is_set_aside(tmp_path: Path) -> None:
    """torch reads it without a word."""
    member, _, _ = member_of(cell("ce"))
    checkpoint.save(tmp_path, {"key": {}, **member.state()})
    weights = member.student.model.state_dict()["fc.weight"].numpy().tobytes()
    (tmp_path / "checkpoint.pt").write_bytes(changed_at((tmp_path / "checkpoint.pt").read_bytes(), weights))
    assert torch.load(tmp_path / "checkpoint.pt").keys() == {"key", *member.state()}
    told: list[str] = []
    assert checkpoint.load(tmp_path, {}, member.state(), told.append) is None
    assert told[0].startswith("its checkpoint is damaged: set aside as")


@pytest.mark.parametrize("change", ["without an entry", "with one more"])
def test_a_checkpoint_of_another_version_is_set_aside(change: str, tmp_path: Path) -> None:
    member, _, _ = member_of(cell("ce"))
    state = {"key": {"a": 1}, **member.state()}
    if change == "without an entry":
        del state["anchors"]
    else:
        state["compass"] = []
    checkpoint.save(tmp_path, state)
    assert checkpoint.load(tmp_path, {"a": 1}, member.state()) is None
    assert (tmp_path / "checkpoint.unusable").is_file()


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member, _, _ = member_of(cell("ce"))
    checkpoint.save(tmp_path, {"key": {}, **member.state()})
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(state: object, file: Path) -> None:
        file.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="the disk is full"):
        checkpoint.save(tmp_path, {"key": {}, **member.state()})
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_meter_gives_means_since_it_was_cleared_and_the_first_step_that_was_not_finite() -> None:
    meter = Meter(["ce", "kd"], CPU)

    def add(**values: float) -> None:
        meter.add({name: torch.tensor(value) for name, value in values.items()})
        meter.count(values, 8)

    add(ce=1.0)
    add(ce=3.0, kd=5.0)
    assert meter.result() == {"ce": 2.0, "kd": 5.0} and meter.images == 16
    meter.clear()
    assert meter.result() == {} and meter.images == 0
    add(ce=7.0)
    assert meter.result() == {"ce": 7.0} and meter.not_finite() == {}
    add(ce=4.0, kd=math.inf)
    add(ce=math.nan, kd=math.nan)
    assert meter.not_finite() == {"ce": 4, "kd": 3}


@pytest.mark.parametrize(("tested_on", "parts"), [("test", {"test", "validation"}), ("validation", {"test"})])
def test_a_validation_part_is_measured_beside_the_test_part_or_in_its_place(
    tested_on: str, parts: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdbench.engine.data.batch.SLICE", {"cpu": 17})
    data = {"name": "digits", "validation": 20, "tested_on": tested_on}
    spec = plan(DIGITS | {"method": "ce", "data": data}, REGISTRY).cells[0].spec
    member, batches, _ = member_of(spec, images(spec.data, per_class=4))
    found = evaluate(member)
    assert {*found} == parts
    pictures, labels = (torch.cat(several) for several in zip(*batches.test.slices(), strict=True))
    assert len(labels) == (40 if tested_on == "test" else 20), "they come 17 at a time"
    logits = member.student.model.eval()(member.student.normalizer(pictures)).detach()
    expected = {
        "accuracy": 100 * (logits.argmax(1) == labels).float().mean().item(),
        "loss": torch.nn.functional.cross_entropy(logits, labels).item(),
    }
    assert found["test"] == pytest.approx(expected, rel=1e-4)


def test_evaluation_changes_nothing() -> None:
    member, batches, teacher = member_of(cell({"name": "ab", "share": "50%"}))
    train(member, batches, teacher, 2)
    before, modes = copy.deepcopy(member.state()), [m.training for m in member.student.model.modules()]
    measured = evaluate(member)
    assert set(measured) == {"test", "metrics", "references"}
    shares, of_constant = measured["metrics"]["agreement"], measured["references"]["agreement"]
    assert set(shares) == set(of_constant) == {"layer1.preact", "layer2.preact", "layer3.preact"}
    assert all(0 <= share <= 1 for share in shares.values())
    assert all(0.5 <= share <= 1 for share in of_constant.values())
    assert [m.training for m in member.student.model.modules()] == modes
    for part, module in (("student", member.student.model), ("terms", member.modules.terms)):
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[part][name]), name


def test_a_metric_may_be_called_loss(tmp_path: Path) -> None:
    spec = cell("ab", steps=4).model_copy(deep=True)
    for term in spec.method.terms:
        for target in [*term.loss.metrics.values()]:
            term.loss.metrics["loss"] = target
    (seat,) = cohort_of([spec], tmp_path)
    assert seat.failure is None
    last = seat.member.log.history[-1]["metrics"]
    assert last["loss"] == last["agreement"]


def test_a_stage_that_needs_features_runs_no_further() -> None:
    """In AB's first stage the last layer's logits are not computed: the classifier gets no gradient."""
    member, batches, teacher = member_of(cell({"name": "ab", "share": "50%"}))
    train(member, batches, teacher, 1)
    calls: list[int] = []
    last = list(member.student.model.modules())[-1]
    last.register_forward_hook(lambda *_: calls.append(1))
    train(member, batches, teacher, 3)
    assert not calls
    train(member, batches, teacher, 1)
    assert calls


def test_learning_rate_and_momentum_resets() -> None:
    spec = cell(
        "ce",
        steps=10,
        protocol={
            "name": "digits",
            "schedule": {"name": "multistep", "at": ["30%", "60%"], "gamma": 0.5, "reset_momentum": True},
        },
    )
    member, batches, teacher = member_of(spec)
    rates, momenta = [], []
    for _ in range(10):
        train(member, batches, teacher, 1)
        rates.append(member.log.rate)
        # Right after momentum was forgotten it is the gradient, to which the weights' decay was added.
        parameter, kept = next(iter(member.stage.optimizers[0].optimizer.state.items()))
        momenta.append(not torch.allclose(kept["momentum_buffer"], parameter.grad, atol=1e-3, rtol=0))
    assert rates == pytest.approx([0.1] * 3 + [0.05] * 3 + [0.025] * 4)
    assert [i for i, kept in enumerate(momenta) if not kept] == [0, 3, 6]


def test_stretches_of_steps_are_the_steps_one_by_one(tmp_path: Path) -> None:
    """A stretch ends where momentum is forgotten, and where a term begins or ceases to count."""
    until_half = {"weight_schedule": {"name": "multistep", "at": ["50%"], "gamma": 0.0}}
    schedule = {"name": "multistep", "at": ["30%", "80%"], "gamma": 0.5, "reset_momentum": True}
    stages = {name: {"losses": {"kd": until_half}} for name in REGISTRY.card("methods", "kd").stages}
    spec = cell({"name": "kd", "stages": stages}, steps=10, protocol={"name": "digits", "schedule": schedule})
    alone, batches, teacher = member_of(spec)
    assert [alone.stage.alike(step, 10) for step in (0, 2, 3, 5, 8)] == [3, 1, 2, 3, 2]
    train(alone, batches, teacher, 10)
    (seat,) = cohort_of([spec], tmp_path)
    assert same_state(seat.member.student.model, alone.student.model)
    assert seat.member.log.history[-1]["train"] == alone.meter.result()
    assert alone.meter.counts == {"ce": 10, "kd": 5, "loss": 10}


def test_weight_schedule_over_a_stage() -> None:
    method = {
        "name": "kd",
        "stages": {
            name: {"losses": {"kd": {"weight": 2.0, "weight_schedule": {"name": "linear", "start": 1.0, "end": 0.0}}}}
            for name in REGISTRY.card("methods", "kd").stages
        },
    }
    member, _, _ = member_of(cell(method, steps=4))
    term = member.stage.terms["kd"]
    assert [term.weight_at(Moment(step / 4)) for step in range(4)] == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_teacher_and_student_each_get_their_own_normalization() -> None:
    spec = cell("kd")
    assert spec.teacher is not None
    other = spec.teacher.normalization.model_copy(update={"mean": [0.9], "std": [0.1]})
    spec = spec.model_copy(update={"teacher": spec.teacher.model_copy(update={"normalization": other})})
    member, batches, teacher = member_of(spec)
    assert isinstance(teacher, Teacher)
    got: dict[str, torch.Tensor] = {}
    member.student.model.register_forward_pre_hook(lambda _, args: got.__setitem__("student", args[0]))
    teacher.network.model.register_forward_pre_hook(lambda _, args: got.__setitem__("teacher", args[0]))
    train(member, batches, teacher, 1)
    pixels = batches.at(0, member.timeline).images.float() / 255
    assert torch.allclose(got["teacher"], (pixels - 0.9) / 0.1, atol=1e-5)
    own = spec.protocol.normalization
    assert torch.allclose(got["student"], (pixels - own.mean[0]) / own.std[0], atol=1e-5)


def test_a_pair_that_no_connector_can_bridge_is_told_with_its_place() -> None:
    from kdbench.engine.checks.cells import check_cell

    method = {"name": "ab", "stages": {"boundaries": {"losses": {"boundary": {"connector": "conv1x1_bn"}}}}}
    spec = (
        plan(
            DIGITS
            | {
                "student": "vgg8",
                "data": "cifar10",
                "teacher": "wrn_22_4_cifar10",
                "protocol": "crd",
                "method": method,
            },
            REGISTRY,
        )
        .cells[0]
        .spec
    )
    with pytest.raises(UserError) as error:
        check_cell(spec)
    assert "boundaries/boundary" in str(error.value) or "layer" in str(error.value)


@pytest.mark.filterwarnings("error")
def test_a_folder_that_is_removed_while_a_cell_trains_costs_only_earlier_events(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "cell", [{"step": 1}])
    log.flush()
    shutil.rmtree(tmp_path / "cell")
    for step in (2, 3):
        log.append({"step": step, "loss": 0.5})
        log.flush()
    log.close()
    lines = (tmp_path / "cell" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert [*(tmp_path / "cell" / "events").iterdir()]
