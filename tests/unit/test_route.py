"""Routes of checkpoints: which are anchors, that one is in memory at a time, that budgets hold, and that no choice
looks at test images."""

from __future__ import annotations

import gc
import io
import json
import math
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shipped import REGISTRY
from tiny import CPU, MadeUpRoute, images, member_of, shortened, step, teacher_for, train, untrained_teacher
from torch import Tensor, nn

from kdbench.engine import checkpoint
from kdbench.engine.cell import TrainingCell
from kdbench.engine.data.batch import SLICE
from kdbench.engine.data.batches import Batches
from kdbench.engine.data.resident import ResidentSplit
from kdbench.engine.log import MetricsLog
from kdbench.engine.loop import TrainingLoop
from kdbench.engine.member import Member
from kdbench.engine.program import Cohort, Program
from kdbench.engine.scheduling import CellState, cohorts_of
from kdbench.engine.teachers.anchors import AnchorTeacher, Route
from kdbench.engine.teachers.loading import fingerprint
from kdbench.errors import CellError, UserError
from kdbench.files import ROUTE, sha256_of
from kdbench.recipe import route
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec
from kdbench.recipe.timeline import planned_timeline
from kdbench.verify.soundness import _route

RECIPE: dict[str, Any] = {
    "data": {"name": "digits", "validation": 100},
    "teacher": "wrn_16_2_digits_route",
    "student": "wrn_10_1",
    "protocol": "digits",
}


def cell(method: str | dict[str, Any] = "rco", **more: Any) -> CellSpec:
    return plan(RECIPE | {"method": method} | more, REGISTRY).cells[0].spec


def short(method: str | dict[str, Any], steps: int = 8, per_class: int | None = None) -> CellSpec:
    return shortened(cell(method), steps, per_class=per_class)


# --- budgets


@pytest.mark.parametrize(("budget", "steps"), [("shared", [8, 8, 24]), ("each", [16, 16, 24])])
def test_anchors_divide_what_other_stages_leave_or_take_it_each(budget: str, steps: list[int]) -> None:
    boundaries = {"share": None, "anchors": {"n": 2, "budget": budget}}
    stages = {"boundaries": boundaries, "classification": {"share": "60%"}}
    line = planned_timeline(cell({"name": "ab", "stages": stages}, steps=40))
    assert [span.steps for span in line.spans] == steps and line.total - line.extra == 40


@pytest.mark.parametrize(("budget", "epochs"), [("shared", 15), ("each", 30)])
def test_anchors_divide_epochs_beyond_the_budget_or_have_them_each(budget: str, epochs: int) -> None:
    stages = {"boundaries": {"anchors": {"n": 2, "budget": budget}}}
    stages = cell({"name": "ab_crd", "stages": stages}).method.stages
    assert [stages[f"boundaries_{n}"].extra_epochs for n in (1, 2)] == [epochs, epochs]


def test_every_stage_after_one_that_trained_the_teacher_has_its_own() -> None:
    learns = {"teacher_ce": {"loss": "cross_entropy", "of": "teacher"}}
    for stage, trains, own in (
        ("boundaries", ["student", "connectors", "teacher"], {"boundaries", "classification"}),
        ("classification", ["student", "teacher"], {"classification"}),
    ):
        method = cell({"name": "ab", "stages": {stage: {"trains": trains, "losses": learns}}}).method
        assert method.own_teacher_stages == own
    assert cell("ab").method.own_teacher_stages == set()


# --- which checkpoints


def test_a_route_is_even_and_ends_with_the_last_step() -> None:
    assert route.points(None, 600) == ()
    assert route.points(4, 600) == (150, 300, 450, 600)
    assert route.points(3, 10) == (3, 7, 10)
    # A training of fewer steps than its route has points keeps each step once.
    assert route.points(20, 3) == (1, 2, 3)


@pytest.mark.parametrize(
    ("checkpoints", "n", "by_hand"),
    [
        # 20 checkpoints of 200 epochs: EEI-4 is epochs 50, 100, 150, 200, EEI-2 is 100, 200.
        (20, 4, [4, 9, 14, 19]),
        (20, 2, [9, 19]),
        # Thirds of 20 are 6.67 and 13.33: checkpoints 7 and 13.
        (20, 3, [6, 12, 19]),
        (24, 4, [5, 11, 17, 23]),
        # Half of 5 lies between 2 and 3.
        (5, 2, [2, 4]),
        (4, 4, [0, 1, 2, 3]),
        (7, 1, [6]),
    ],
)
def test_equal_intervals_by_hand(checkpoints: int, n: int, by_hand: list[int]) -> None:
    assert [route.equal(checkpoints, n, at) for at in range(n)] == by_hand


def test_checkpoints_that_do_not_follow_from_a_records_recipe_are_told() -> None:
    """Its own at a quarter, a half, … of 600 steps; of its teacher's twenty, which lie 30 steps apart, the anchors."""

    def told(method: str, anchors: list[int], own: tuple[int, ...] = (150, 300, 450, 600), off: int = 0) -> list[str]:
        # The second anchor is the first checkpoint above 1.8 times the first's divergence, and the third goes on.
        seen = {1: [1.0, 1.7, 1.9, *[5.0] * 17], 2: [9.0, 9.0, 1.0, 1.7, 1.8, 1.9, *[9.0] * 14]}
        found = [
            SimpleNamespace(stage=f"route_{n + 1}", checkpoint=at, step=30 * (at + 1) + off, divergences=seen.get(n))
            for n, at in enumerate(anchors)
        ]
        kept, budget = [SimpleNamespace(step=step) for step in own], SimpleNamespace(steps=600)
        record = SimpleNamespace(route=kept, budget=budget, anchors=found)
        return [what.split(" is ")[0] for what in _route(record, cell(method, route=4))]  # type: ignore[arg-type]

    assert told("rco", [4, 9, 14, 19]) == told("rco_greedy", [0, 2, 5, 19]) == []
    assert told("rco", [4, 9, 14, 19], (150, 300, 600)) == ["route"]
    assert told("rco", [4, 9, 14]) == ["anchors"]
    assert told("rco", [4, 8, 14, 19]) == ["the anchor of route_2"]
    assert told("rco_greedy", [0, 2, 4, 18]) == ["the anchor of route_3", "the anchor of route_4"]
    assert told("rco", [4, 9, 14, 19], off=1) == [f"the anchor of route_{n}" for n in (1, 2, 3, 4)]


def naive(student: list[list[float]], checkpoints: list[list[list[float]]], present: int, delta: float) -> Any:
    """Mean KL(checkpoint || student) and the next anchor, number by number."""

    def softmax(scores: list[float]) -> list[float]:
        return [1 / sum(math.exp(other - score) for other in scores) for score in scores]

    h = []
    for outputs in checkpoints:
        total = 0.0
        for mine, theirs in zip(student, outputs, strict=True):
            for q, p in zip(softmax(mine), softmax(theirs), strict=True):
                total += p * (math.log(p) - math.log(q))
        h.append(total / len(student))
    for j in range(present + 1, len(h)):
        if (h[j] - h[present]) / h[present] > delta:
            return h, j
    return h, len(h) - 1


class Scores:
    """Stands for a network: made-up logits by image, of the checkpoint that was loaded last."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.at = logits, 0

    def __call__(self, batch: Tensor) -> Tensor:
        return self.logits[self.at][batch[:, 0, 0, 0].long()]


@pytest.mark.parametrize("seed", range(12))
def test_greedy_choice_against_a_naive_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, k = 11, 6
    monkeypatch.setitem(SLICE, "cpu", 4)
    part = ResidentSplit(torch.arange(n).view(n, 1, 1, 1), torch.zeros(n, dtype=torch.int64))
    student = Scores(torch.randn(1, n, 5, generator=generator, dtype=torch.float64))
    # Checkpoints that move away from the student, by steps of random length: some choices are early, some late.
    growth = torch.rand(k, 1, 1, generator=generator, dtype=torch.float64).cumsum(0)
    noise = torch.randn(k, n, 5, generator=generator, dtype=torch.float64)
    anchor = Scores(student.logits + growth * noise)

    class Loaded(Route):
        def weights(self, position: int) -> dict[str, Tensor]:
            anchor.at = position
            return {}

    loaded = Loaded(Path(), tuple({"step": i, "epoch": i, "sha256": str(i)} for i in range(k)))
    spec = cell({"name": "rco_greedy", "n": 5, "delta": 0.5})
    anchors = {name: stage.anchor for name, stage in spec.method.stages.items() if stage.anchor}
    guide = AnchorTeacher(anchors, loaded, nn.Identity(), student, anchor, part)
    chosen: list[int] = []
    for name in anchors:
        guide.begin(name)
        found = guide.chosen[name]
        if name in ("route_1", "route_5"):
            expected = 0 if name == "route_1" else k - 1
        else:
            h, expected = naive(student.logits[0].tolist(), anchor.logits.tolist(), chosen[-1], 0.5)
            assert found["divergences"] == pytest.approx(h, rel=1e-9)
        assert found["checkpoint"] == expected == guide.at == anchor.at
        chosen.append(expected)
    assert chosen == sorted(chosen)


def test_a_search_that_is_through_stays_with_the_converged_teacher() -> None:
    assert route.greedy([0.5, 0.6, 0.7], 0, 0.8) == 2
    assert route.greedy([0.5, 0.91, 2.0], 0, 0.8) == 1
    assert route.greedy([0.5, 0.1, 0.2], 2, 0.8) == 2
    # Nothing is as much as 80 % above nothing.
    assert route.greedy([0.0, 0.0, 0.1], 0, 0.8) == 2


def test_only_so_many_images_are_looked_at() -> None:
    member, batches, teacher = member_of(short({"name": "rco_greedy", "stages": {"route": {"anchors": {"images": 4}}}}))
    assert member.anchors is not None
    seen: list[int] = []
    own = member.anchors.student_logits
    member.anchors.student_logits = lambda images: seen.append(len(images)) or own(images)  # type: ignore[func-returns-value]
    train(member, batches, teacher, 3)
    assert len(batches.validation.labels) == 10 and sum(seen) == 4


# --- budgets and rates


@pytest.mark.parametrize("steps", [8, 600, 601, 602, 603, 1003])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_budget_is_that_of_kd(steps: int, n: int) -> None:
    kd = planned_timeline(cell("kd", steps=steps))
    for name in ("rco", "rco_one_stage", "rco_greedy", "rco_control"):
        line = planned_timeline(cell({"name": name, "n": n}, steps=steps))
        assert (line.total, line.extra) == (kd.total, 0) == (steps, 0)
        assert max(s.steps for s in line.spans) - min(s.steps for s in line.spans) <= n
    line = planned_timeline(cell({"name": "rco_long", "n": n}, steps=steps))
    assert (line.total, line.extra) == (n * steps, (n - 1) * steps)
    assert {span.steps for span in line.spans} == {steps}


def rates(spec: CellSpec) -> list[float]:
    member, batches, teacher = member_of(spec)
    found = []
    while not member.finished:
        step(member, batches, teacher)
        found.append(member.log.rate)
    return found


def test_rates_begin_anew_or_go_on() -> None:
    kd = rates(short("kd", 20))
    assert rates(short({"name": "rco_one_stage", "n": 2}, 20)) == kd
    assert rates(short({"name": "rco", "n": 2}, 20)) == rates(short("kd", 10)) * 2


def test_one_stage_with_the_converged_teacher_throughout_is_kd_bit_for_bit() -> None:
    """SourceStepum, schedule and data order go on; the anchors alone make the difference."""
    ends = []
    for method in ("kd", {"name": "rco_control", "rates": "continue"}, {"name": "rco_control"}, "rco_one_stage"):
        spec = short(method, 12)
        teacher = teacher_for(spec)
        assert isinstance(teacher.route, MadeUpRoute)
        state = teacher.network.model.state_dict()
        own = teacher.route.weights
        last = len(teacher.route) - 1
        teacher.route.__dict__["weights"] = lambda p, own=own, state=state, last=last: state if p == last else own(p)
        member, batches, _ = member_of(spec, teacher=teacher)
        train(member, batches, teacher, 12)
        ends.append(fingerprint(member.student.model))
    assert ends[0] == ends[1]
    assert len(set(ends)) == 3


def test_longer_cells_are_no_cohort_of_the_others_and_routes_share_a_teacher_with_kd() -> None:
    cells = plan(RECIPE | {"compare": {"method": ["ce", "kd", "rco", "rco_long"]}}, REGISTRY).cells
    cohorts = cohorts_of([CellState(c, i) for i, c in enumerate(cells)])
    assert [[c.spec.method.name for c in cohort] for cohort in cohorts] == [["ce", "kd", "rco"], ["rco_long"]]
    member, _, _ = member_of(short("rco"))
    assert all(member.teacher_uses(span.start) == {} for span in member.timeline.spans)


# --- training


def test_each_stage_learns_from_its_anchor_and_the_converged_teacher_stays_as_it_was() -> None:
    spec = short("rco", 8)
    member, batches, teacher = member_of(spec)
    assert teacher is not None and member.modules.own_teacher is not None and isinstance(teacher.route, MadeUpRoute)
    before = fingerprint(teacher.network.model)
    for at, span in enumerate(member.timeline.spans):
        train(member, batches, teacher, span.steps)
        position = route.equal(5, 4, at)
        kept = teacher.route.weights(position)
        own = member.modules.own_teacher.model
        assert all(torch.equal(own.state_dict()[name], value) for name, value in kept.items())
        assert not own.training and not any(p.requires_grad for p in own.parameters())
    assert member.finished and fingerprint(teacher.network.model) == before
    assert [(a["stage"], a["checkpoint"]) for a in member.anchors.record()] == [
        ("route_1", 0), ("route_2", 2), ("route_3", 3), ("route_4", 4)
    ]  # fmt: skip


def test_the_loss_is_taken_against_the_anchor() -> None:
    member, batches, teacher = member_of(short("rco", 8))
    assert teacher is not None and teacher.route is not None
    batch = batches.at(0, member.timeline)
    teacher.network.model.load_state_dict(teacher.route.weights(0))
    with torch.no_grad():
        anchor = teacher(batch.images, ["logits"])["logits"]
        student = member.student.model.train()(member.student.normalizer(batch.images))
    p, q = (anchor / 4).softmax(1), (student / 4).log_softmax(1)
    expected = 16 * (p * (p.log() - q)).sum(1).mean()
    member, batches, teacher = member_of(short("rco", 8))
    step(member, batches, teacher)
    # A small difference of float32 logits: its last digits are the processor's.
    assert member.meter.result()["kd"] == pytest.approx(expected.item(), rel=1e-3)


class OneAtATime(MadeUpRoute):
    """Notices when weights that it gave before are still held somewhere, and counts the networks of a class."""

    def weights(self, position: int) -> dict[str, Tensor]:
        gc.collect()
        held = [ref for ref in self.__dict__.setdefault("given", []) if ref() is not None]
        assert not held, "an earlier checkpoint is still in memory"
        state = super().weights(position)
        self.__dict__["given"] = [weakref.ref(value) for value in state.values()]
        return state


def test_one_anchor_is_in_memory_at_a_time() -> None:
    """Of the method that looks at all checkpoints before it chooses one."""
    spec = short("rco_greedy", 8)
    teacher = teacher_for(spec)
    assert spec.teacher is not None
    teacher.route = OneAtATime(spec.teacher, spec.data)
    member, batches, _ = member_of(spec, teacher=teacher)
    kind = type(teacher.network.model)
    # Only what comes from now on is looked through.
    gc.collect()
    gc.freeze()
    wide = sum(p.numel() for p in teacher.network.model.parameters())

    def networks() -> int:
        gc.collect()
        found = [o for o in gc.get_objects() if type(o) is kind]
        return sum(sum(p.numel() for p in model.parameters()) == wide for model in found)

    before = networks()
    while not member.finished:
        step(member, batches, teacher)
        assert networks() == before
    gc.unfreeze()
    # The last anchor is looked at once more when the cell ends.
    assert member.anchors is not None
    member.anchors.check()
    assert len(teacher.route.__dict__["asked"]) == 4 + 3 + 1 + 2 * 5


class Untouchable:
    """Stands for the test part."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the test part was asked for '{name}'")


class Counted:
    """Stands for the validation part, and counts how often it is read."""

    def __init__(self, part: Any) -> None:
        self.part, self.reads = part, 0

    def __getattr__(self, name: str) -> Any:
        self.reads += 1
        return getattr(self.part, name)


def test_the_choice_is_made_on_images_split_off_the_training_set() -> None:
    spec = short("rco_greedy", 8)
    data = images(spec.data)
    batches = Batches(spec, data, CPU)
    batches.test = Untouchable()  # type: ignore[assignment]
    batches.validation = counted = Counted(batches.validation)  # type: ignore[assignment]
    teacher = untrained_teacher(spec)
    member = Member(spec, batches, teacher, CPU)
    train(member, batches, teacher, 8)
    assert counted.reads > 0
    held_out = torch.cat([found for found, _ in counted.part.slices()])
    rest = batches.train.images
    assert len(held_out) + len(rest) == len(data.train_images)
    assert not any(torch.equal(a, b) for a in held_out for b in rest)
    # Only where H decides: not for the first anchor, nor for the last.
    assert ["divergences" in anchor for anchor in member.anchors.record()] == [False, True, True, False]


def test_looking_at_checkpoints_changes_no_student() -> None:
    """A greedy cell that is made to choose what an equal one has ends with the same bits."""
    ends = []
    for method in ("rco", "rco_greedy"):
        spec = short(method, 8)
        spec = spec.model_copy(update={"data": spec.data.model_copy(update={"validation": 10})})
        member, batches, teacher = member_of(spec)
        if method == "rco_greedy":
            assert member.anchors is not None
            looked = member.anchors.divergences
            positions = iter([2, 3])

            def steered(n: int, looked: Any = looked, positions: Any = positions) -> list[float]:
                looked(n)
                at = next(positions)
                return [0.1 if j < at else 1.0 if j == at else 2.0 for j in range(5)]

            member.anchors.divergences = steered  # type: ignore[method-assign]
        train(member, batches, teacher, 8)
        assert [a["checkpoint"] for a in member.anchors.record()] == [0, 2, 3, 4]
        ends.append(fingerprint(member.student.model))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("method", ["rco", "rco_one_stage", "rco_greedy"])
def test_a_resumed_cell_goes_on_bit_for_bit_across_anchors(method: str) -> None:
    """Killed just where an anchor follows another, after two steps (inside a stage: test_resumed)."""
    spec, at = short(method, 8), 2
    whole, batches, teacher = member_of(spec)
    train(whole, batches, teacher, 8)
    first, _, _ = member_of(spec)
    train(first, batches, teacher, at)
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = Member(spec, batches, untrained_teacher(spec), CPU)
    second.load_state(torch.load(file, weights_only=True))
    train(second, batches, teacher, 8 - at)
    assert fingerprint(second.student.model) == fingerprint(whole.student.model)
    assert second.anchors.record() == whole.anchors.record()
    assert second.meter.result() == whole.meter.result()


def test_a_changed_anchor_is_told() -> None:
    member, batches, teacher = member_of(short("rco", 8))
    step(member, batches, teacher)
    assert member.anchors is not None and member.modules.own_teacher is not None
    member.anchors.check()
    with torch.no_grad():
        next(member.modules.own_teacher.model.parameters()).add_(1e-3)
    with pytest.raises(CellError, match="a frozen anchor changed"):
        member.anchors.check()


def test_a_resumed_cell_notices_another_route() -> None:
    member, batches, teacher = member_of(short("rco", 8))
    step(member, batches, teacher)
    state = member.state()
    state["anchors"][0]["sha256"] = "another"
    other, _, _ = member_of(short("rco", 8))
    other.load_state(state)
    with pytest.raises(UserError, match="not the one with which this cell began"):
        step(other, batches, teacher)


# --- keeping a route


def keeping(folder: Path, spec: CellSpec, batches: Batches, stop_after: int = -1) -> Member:
    """A cell that keeps a route, in a cohort of its own, after it was stopped before a step or ran to its end."""
    folder.mkdir(exist_ok=True)
    member = Member(spec, batches, None, CPU)
    if (state := checkpoint.load(folder, {}, member.state())) is not None:
        member.load_state(state)
    seat = TrainingCell(member, folder, {}, MetricsLog(folder, member.log.history, tensorboard=False))
    stop = lambda: member.step == stop_after  # noqa: E731
    TrainingLoop(Program([Cohort(batches, None, [seat])]), lambda *_: None, lambda _: None, stop, 0.0).run()
    assert seat.failure is None
    return member


def left_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / ROUTE).iterdir()}


def test_a_route_is_kept_bounded_and_the_same_after_interruptions(tmp_path: Path) -> None:
    spec = shortened(cell("ce", route=4), 10)
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"validation": 10})})
    batches = Batches(spec, images(spec.data), CPU)
    assert keeping(tmp_path / "whole", spec, batches).finished
    whole = left_in(tmp_path / "whole")
    steps = [3, 5, 8, 10]
    assert sorted(whole) == [f"{s:08d}.safetensors" for s in steps] + ["index.json"]
    for stop in (1, 3, 4, 8):
        assert not keeping(tmp_path / "parts", spec, batches, stop).finished
    # What a kill between two checkpoints leaves: a file of a step that is done again.
    (tmp_path / "parts" / ROUTE / "00000010.safetensors").write_bytes(b"half")
    assert keeping(tmp_path / "parts", spec, batches).finished
    assert left_in(tmp_path / "parts") == whole


def test_the_index_says_what_was_kept_and_nothing_of_the_test_part(tmp_path: Path) -> None:
    spec = shortened(cell("ce", route=2), 6)
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"validation": 10})})
    batches = Batches(spec, images(spec.data), CPU)
    keeping(tmp_path, spec, batches)
    index = json.loads((tmp_path / ROUTE / route.INDEX).read_text())
    assert [(e["step"], e["epoch"]) for e in index] == [(3, 1.5), (6, 3.0)]
    assert all(set(e) == {"step", "epoch", "file", "sha256", "validation"} for e in index)
    kept = Route(tmp_path / ROUTE, tuple(index))
    for i, entry in enumerate(index):
        assert sha256_of(kept.folder / entry["file"]) == entry["sha256"]
        # Replayed from nothing, the student at that step is what was kept.
        member = Member(spec, batches, None, CPU)
        train(member, batches, None, entry["step"])
        state = member.student.model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in kept.weights(i).items())
        member.student.model.eval()
        part = batches.validation
        with torch.no_grad():
            logits = member.student.model(member.student.normalizer(next(part.slices())[0]))
        assert entry["validation"]["accuracy"] == 100 * int((logits.argmax(1) == part.labels).sum()) / len(part.labels)
    (kept.folder / index[0]["file"]).write_bytes(b"half")
    with pytest.raises(UserError, match="at step 3 is damaged"):
        kept.weights(0)
    (kept.folder / index[1]["file"]).unlink()
    with pytest.raises(UserError, match="at step 6 is gone"):
        kept.weights(1)


def test_keeping_a_route_changes_no_training(tmp_path: Path) -> None:
    ends = set()
    for kept in (None, 3):
        spec = shortened(cell("ce", route=kept), 6)
        member = keeping(tmp_path / str(kept), spec, Batches(spec, images(spec.data), CPU))
        ends.add(fingerprint(member.student.model))
    assert len(ends) == 1


# --- identities and mistakes


def test_a_route_is_part_of_what_a_cell_is() -> None:
    assert len({cell("ce", route=points).identity() for points in (None, 5, 6)}) == 3


def test_what_only_a_search_reads_makes_no_other_cell() -> None:
    a = cell({"name": "rco", "stages": {"route": {"anchors": {"delta": 0.5, "images": 7}}}})
    assert a.identity() == cell("rco").identity()
    b = cell({"name": "rco_greedy", "delta": 0.5})
    assert b.identity() != cell("rco_greedy").identity()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "wrn_16_2_digits"}, "the recipe of 'wrn_16_2_digits' saves none"),
        ({"data": "cifar10", "teacher": "resnet20_cifar10", "protocol": "crd"}, "is a weight file, which has none"),
        ({"method": {"name": "rco", "n": 21}}, "has 21 anchors, the route of 'wrn_16_2_digits_route' 20 checkpoints"),
        ({"data": "digits", "method": "rco_greedy"}, "which this recipe does not split off"),
        ({"route": 101}, "less than or equal to 100"),
        ({"route": 0}, "greater than 0"),
        ({"method": {"name": "rco", "n": 0}}, "greater than 0"),
        ({"method": {"name": "rco", "stages": {"route": {"anchors": {"chose": "greedy"}}}}}, "chose"),
        ({"method": {"name": "rco", "stages": {"route": {"modes": {"teacher": "train"}}}}}, "anchors are frozen"),
        (
            {"method": {"name": "rco_one_stage", "stages": {"route": {"trains": ["student", "connectors"]}}}},
            "connectors are dropped after each anchor",
        ),
        (
            {"method": {"name": "ce", "stages": {"classification": {"anchors": {"n": 2}}}}},
            "no loss that reads the teacher",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        plan(RECIPE | {"method": "rco"} | changes, REGISTRY)
    assert message in str(error.value) and error.value.where


def test_a_teacher_that_lost_its_route_is_told() -> None:
    spec = short("rco")
    teacher = teacher_for(spec)
    teacher.route = None
    with pytest.raises(UserError, match="left no checkpoints"):
        member_of(spec, teacher=teacher)
