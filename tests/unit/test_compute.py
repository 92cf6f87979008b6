"""The fast ways to compute are held to plain float32; what is chosen is the fastest that is sound, and stays chosen."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from shipped import REGISTRY
from tiny import CPU, batches_for, images, networks_for, shortened, step, target_for, train, untrained_teacher

from kdbench.engine.computing import choosing, compute
from kdbench.engine.computing.choosing import MeasuredWay, bfloat16_computes, choose, compiler_works
from kdbench.engine.computing.compute import REFERENCE, Chosen, Computing, Steps, candidates
from kdbench.engine.data.batches import Batches
from kdbench.engine.member import Member
from kdbench.engine.program import Program, make_graphs
from kdbench.engine.teachers.teacher import Teacher
from kdbench.errors import UserError
from kdbench.recipe.choices import ComputeChoice
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec

METHODS = REGISTRY.names("methods")
RECIPE: dict[str, Any] = {
    # With all that a method may need: validation images, and a route of the teacher.
    "data": {"name": "digits", "validation": 100},
    "teacher": "wrn_16_2_digits_route",
    "student": "wrn_10_1",
    "protocol": "digits",
}
BATCH = 16


def cell(method: str, **more: Any) -> CellSpec:
    recipe = RECIPE | networks_for(method) | target_for(method, REGISTRY) | more | {"method": method}
    spec = plan(recipe, REGISTRY).cells[0].spec
    return shortened(spec, steps=6, batch=BATCH)


def teacher_of(spec: CellSpec, way: Computing) -> Teacher | None:
    plain = untrained_teacher(spec)
    return plain and Teacher(plain.network.extractor, plain.network.normalizer, plain.shapes, way, route=plain.route)


def gradients(specs: list[CellSpec], way: Computing, stages: list[int]) -> list[tuple[float, list[torch.Tensor]]]:
    """Loss and gradients of every cell's first step in a stage, all computed in one way."""
    # Cells with the same data share their batches; the images are the same in all.
    made = {str((spec.data, spec.target)): spec for spec in specs}
    of_data = {key: batches_for(spec, images(spec.data, per_class=4)) for key, spec in made.items()}
    own_batches = [of_data[str((spec.data, spec.target))] for spec in specs]
    taught = {spec.teacher.name: spec for spec in specs if spec.teacher}
    made_up = {name: teacher_of(spec, way) for name, spec in taught.items()}
    teachers = [made_up[spec.teacher.name] if spec.teacher else None for spec in specs]
    members = [
        Member(spec, batches, teacher, CPU, way)
        for spec, batches, teacher in zip(specs, own_batches, teachers, strict=True)
    ]
    for member, stage in zip(members, stages, strict=True):
        member.step = member.timeline.spans[stage].start
        member.enter(stage)
    make_graphs(members)
    result = []
    for member, batches, teacher in zip(members, own_batches, teachers, strict=True):
        # A generator keeps its first weights, too: Adam's first step has the rate's size, and where a gradient is near
        # 0, rounding decides its sign.
        generators = [source.optimizer for source in member.sources.values() if hasattr(source, "optimizer")]
        for optimizer in [*(one.optimizer for one in member.stage.optimizers), *generators]:
            optimizer.step = lambda *_, **__: None  # type: ignore[method-assign]
        step(member, batches, teacher, at=0)
        own = [member.modules.own_teacher.model] if member.modules.own_teacher else []
        trained = [p for module in (member.student.model, member.modules.terms, *own) for p in module.parameters()]
        result.append((member.meter.result()["loss"], [p.grad.clone() for p in trained if p.grad is not None]))
    return result


def stages_of(methods: list[str]) -> tuple[list[CellSpec], list[int]]:
    """Every stage of every method once."""
    pairs = [(spec, i) for spec in map(cell, methods) for i in range(len(spec.method.stages))]
    return [spec for spec, _ in pairs], [stage for _, stage in pairs]


@cache
def plain_gradients(method: str) -> list[tuple[float, list[torch.Tensor]]]:
    """The reference's, for each stage of a method."""
    specs, stages = stages_of([method])
    return gradients(specs, REFERENCE, stages)


def hold(way: Computing, loss_off: float, gradient_off: float, methods: list[str] = METHODS) -> None:
    specs, stages = stages_of(methods)
    of_stages = [one for method in methods for one in plain_gradients(method)]
    for spec, stage, plain, fast in zip(specs, stages, of_stages, gradients(specs, way, stages), strict=True):
        what = f"{spec.method.name}, stage {stage}"
        # A student that begins as its teacher has a loss near 0, of which differences of logits are no small share; nor
        # are they of a loss at a temperature of 15, times its square.
        assert fast[0] == pytest.approx(plain[0], rel=loss_off, abs=loss_off), what
        assert len(fast[1]) == len(plain[1]) > 0, what
        a, b = (torch.cat([g.flatten() for g in side[1]]) for side in (plain, fast))
        assert (a - b).norm() / a.norm() < gradient_off, what


def test_channels_last_gives_the_losses_and_gradients_of_the_reference() -> None:
    hold(Computing(layout="channels_last"), 1e-5, 1e-4)


def test_bfloat16_gives_the_losses_and_gradients_of_the_reference_within_its_digits() -> None:
    """Eight bits of mantissa: 0.4 % a rounding; a gradient passes through every layer twice.

    The classifier gives rounded logits of regions, and standardizing divides what was rounded by their deviation.
    """
    way, of_regions = Computing("bfloat16", "channels_last"), ["kd_sdd_ls", "dkd_sdd_ls", "rld_sdd_ls"]
    hold(way, 0.005, 0.35, [method for method in METHODS if method not in of_regions])
    hold(way, 0.01, 0.35, of_regions)


@pytest.mark.slow
@pytest.mark.skipif(not compiler_works(CPU), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("methods", [["ab"], pytest.param(METHODS, marks=pytest.mark.long)], ids=["ab", "all"])
def test_compiled_graphs_give_the_losses_and_gradients_of_the_reference(methods: list[str]) -> None:
    """AB has a stage that reads features before their ReLUs and one that reads logits; no loss is compiled."""
    hold(Computing(layout="channels_last", compile=True), 1e-4, 1e-4, methods)


@pytest.mark.slow
def test_students_trained_in_bfloat16_are_as_good(tmp_path: Path) -> None:
    """Digits, two seeds: their test accuracies differ from plain ones by no more than seeds do among themselves."""
    from kdbench.engine.data.datasets import load_data
    from kdbench.engine.evaluation import scores

    differences, plain = [], []
    for seed in range(2):
        spec = plan(RECIPE | {"method": "ce", "seeds": [seed]}, REGISTRY, ("steps=120",)).cells[0].spec
        data = load_data(spec.data, [], False, tmp_path)
        accuracies = []
        for way in (REFERENCE, Computing("bfloat16", "channels_last")):
            batches = Batches(spec, data, CPU)
            member = Member(spec, batches, None, CPU, way)
            train(member, batches, None, 120)
            member.student.model.eval()
            accuracies.append(scores(member.student, batches.test).plain()["accuracy"])
        plain.append(accuracies[0])
        differences.append(accuracies[1] - accuracies[0])
    assert min(plain) > 80, "the plain students learned nothing: the comparison would show nothing"
    assert abs(sum(differences) / len(differences)) < 4


# --- choosing


def chosen_for(choice: ComputeChoice, computing: Computing) -> Chosen:
    return Chosen(asked=choice.fixed(), computing=computing, why="because")


def way(student: float, teacher: float = 0.0, compiling: float = 0.0, losses: tuple[float, ...] = (1.0,)) -> Any:
    return {"student": student, "teacher": teacher, "compiling": compiling, "losses": list(losses)}


def chosen(
    monkeypatch: pytest.MonkeyPatch,
    measured: dict[str, Any],
    steps: float,
    choice: ComputeChoice | None = None,
    passes: float = 0,
) -> Chosen:
    """What is chosen where every way takes as long as said here."""

    def measure(computing: Computing, *_: Any) -> MeasuredWay:
        one = measured[computing.name]
        return MeasuredWay(computing, remark=one) if isinstance(one, str) else MeasuredWay(computing, **one)

    monkeypatch.setattr(choosing, "_measure", measure)
    monkeypatch.setattr(choosing, "bfloat16_computes", lambda device: True)
    monkeypatch.setattr(choosing, "compiler_works", lambda device: True)
    return choose(
        choice or ComputeChoice(),
        [cell("ce")],
        None,
        lambda w: None,
        Steps(steps, passes),
        CPU,
        lambda text: None,  # type: ignore[arg-type]
    )


PLAIN, LAST = "float32, contiguous", "float32, channels_last"
HALF, HALF_LAST = "bfloat16, contiguous", "bfloat16, channels_last"
ALL = {
    PLAIN: way(1.0),
    LAST: way(0.8),
    HALF: way(0.7),
    HALF_LAST: way(0.4),
    f"{HALF_LAST}, compiled": way(0.2, compiling=60),
}


def test_the_fastest_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = chosen(monkeypatch, ALL, 1e4)
    assert choice.computing.name == f"{HALF_LAST}, compiled"
    assert [one["way"] for one in choice.tried] == list(ALL)
    # 60 s of compiling against 0.2 s saved a step.
    assert choice.computing.worth == 300


def test_a_teachers_pass_counts_as_often_as_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = dict.fromkeys((PLAIN, HALF, HALF_LAST), way(1.0, teacher=1.0)) | {LAST: way(1.2, teacher=0.2)}
    ways |= {f"{name}, compiled": one for name, one in ways.items()}
    for passes, name in ((0, PLAIN), (100, PLAIN), (1000, LAST)):
        assert chosen(monkeypatch, ways, 1000, ComputeChoice(compile=False), passes).computing.name == name


def test_a_short_run_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = chosen(monkeypatch, ALL, 50)
    assert choice.computing == REFERENCE and "too short" in choice.why and len(choice.tried) == 1


def test_a_run_that_is_shorter_than_compiling_pays_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = chosen(monkeypatch, ALL, 1000)
    assert choice.computing.name == HALF_LAST and "too few to compile" in choice.why
    # Long enough to try it, and then it does not pay.
    slow = ALL | {f"{HALF_LAST}, compiled": way(0.39, compiling=600)}
    assert chosen(monkeypatch, slow, 1e4).computing.name == HALF_LAST


def test_what_gains_next_to_nothing_is_not_worth_leaving_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    even = {name: way(0.97) for name in (LAST, HALF, HALF_LAST)} | {PLAIN: way(1.0), f"{PLAIN}, compiled": way(1.0)}
    assert chosen(monkeypatch, even, 1e4).computing == REFERENCE


def test_a_way_that_computes_something_else_is_struck_out(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ALL | {HALF_LAST: way(0.1, losses=(1.2,)), LAST: way(0.1, losses=(1.01,)), HALF: way(0.5, losses=(1.01,))}
    choice = chosen(monkeypatch, wrong, 1000)
    assert choice.computing.name == HALF
    remarks = {one["way"]: one["remark"] for one in choice.tried}
    assert "not used" in remarks[HALF_LAST] and "not used" in remarks[LAST] and not remarks[HALF]


def test_a_way_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = chosen(monkeypatch, ALL | {HALF_LAST: "failed: out of memory"}, 800)
    assert choice.computing.name == HALF
    assert "failed: out of memory" in [one["remark"] for one in choice.tried]


def test_cells_that_fail_together_are_tried_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several take more memory than one."""
    tried: list[int] = []

    def measure(computing: Computing, specs: list[CellSpec], *_: Any) -> MeasuredWay:
        tried.append(len(specs))
        if len(specs) > 1:
            return MeasuredWay(computing, remark="failed: out of memory", error=MemoryError("out of memory"))
        return MeasuredWay(computing, **way(1.0))

    monkeypatch.setattr(choosing, "_measure", measure)
    monkeypatch.setattr(choosing, "bfloat16_computes", lambda device: False)
    monkeypatch.setattr(choosing, "compiler_works", lambda device: False)
    specs = [cell("ce"), cell("kd")]
    choice = choose(ComputeChoice(), specs, None, lambda w: None, Steps(10, 0), CPU, lambda text: None)  # type: ignore[arg-type]
    assert choice.computing == REFERENCE and tried == [2, 1]


def test_what_the_recipe_fixes_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = chosen(monkeypatch, ALL, 1e4, ComputeChoice(precision="float32", compile=False))
    assert [one["way"] for one in choice.tried] == [PLAIN, LAST]
    choice = chosen(monkeypatch, ALL, 1e4, ComputeChoice(mode="reference"))
    assert choice.computing == REFERENCE and not choice.tried


def test_a_fixed_compilation_leaves_the_rest_to_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = {f"{name}, compiled": one | {"compiling": 60} for name, one in ALL.items() if "compiled" not in name}
    choice = chosen(monkeypatch, compiled, 1e4, ComputeChoice(compile=True))
    assert len(choice.tried) == 4 and choice.computing.name == f"{HALF_LAST}, compiled"


def test_what_was_chosen_elsewhere_is_done_as_far_as_it_can_be_here(monkeypatch: pytest.MonkeyPatch) -> None:
    way = Computing("bfloat16", "channels_last", compile=True, cuda_graphs=True, worth=9)
    monkeypatch.setattr(choosing, "compiler_works", lambda device: True)
    assert choosing.possible(way, CPU) == Computing("bfloat16", "channels_last", compile=True, worth=9)
    monkeypatch.setattr(choosing, "compiler_works", lambda device: False)
    assert choosing.possible(way, CPU) == Computing("bfloat16", "channels_last", worth=9)


def test_a_choice_of_another_version_is_told(tmp_path: Path) -> None:
    compute.keep(tmp_path, chosen_for(ComputeChoice(), REFERENCE))
    file = tmp_path / compute.NAME
    file.write_text(file.read_text().replace('"layout": "contiguous",', '"layuot": "contiguous",', 1))
    with pytest.raises(UserError, match="layuot.*Unexpected keyword"):
        compute.kept(tmp_path, ComputeChoice())


def test_bfloat16_is_a_candidate_only_where_the_hardware_computes_in_it() -> None:
    assert {w.precision for w in candidates(ComputeChoice(), False, False, False)} == {"float32"}
    assert {w.precision for w in candidates(ComputeChoice(), True, False, False)} == {"float32", "bfloat16"}
    # Who asks for it gets it.
    assert {w.precision for w in candidates(ComputeChoice(precision="bfloat16"), False, False, False)} == {"bfloat16"}


def test_the_hardware_is_asked_for_its_instructions() -> None:
    """The kernel's own list of what the processor can do."""
    flags = next(
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))
    )
    assert bfloat16_computes(CPU) == any(flag in flags.split() for flag in ("avx512_bf16", "amx_bf16"))


def test_the_trial_measures_real_ways() -> None:
    """Not a stand-in: all eager ways on a real cohort, none struck out."""
    specs = [cell(method) for method in ("ce", "kd", "ab", "at")]
    batches = Batches(specs[0], images(specs[0].data, per_class=4), CPU)
    choice = choose(
        ComputeChoice(compile=False),
        specs,
        batches,
        lambda w: teacher_of(specs[1], w),
        Steps(1e6, 1e6),
        CPU,
        lambda t: None,
    )
    assert len(choice.tried) >= 2 and not any(one["remark"] for one in choice.tried)
    assert all(one["student_step_seconds"] > 0 and one["teacher_pass_seconds"] > 0 for one in choice.tried)


def test_a_choice_is_kept_and_belongs_to_what_was_asked(tmp_path: Path) -> None:
    auto, fixed = ComputeChoice(), ComputeChoice(precision="float32")
    way = Computing("bfloat16", "channels_last", compile=True, worth=7)
    assert compute.kept(tmp_path, auto) is None
    compute.keep(tmp_path, chosen_for(auto, way))
    assert compute.kept(tmp_path, auto) == way and compute.kept(tmp_path, fixed) is None
    compute.keep(tmp_path, chosen_for(fixed, REFERENCE))
    assert compute.kept(tmp_path, auto) == way and compute.kept(tmp_path, fixed) == REFERENCE


def test_the_same_computing_said_differently_is_the_same_cell() -> None:
    reference = cell("ce", compute="reference").identity()
    spelt = cell("ce", compute={"precision": "float32", "layout": "contiguous", "compile": False}).identity()
    assert reference == spelt != cell("ce").identity()
    assert cell("ce", compute="auto").identity() == cell("ce").identity()


# --- what a step must not do


@pytest.mark.parametrize("way", [REFERENCE, Computing(layout="channels_last")])
def test_networks_run_no_further_than_a_stage_needs(way: Computing) -> None:
    """FitNets' first stage ends at layer2 on both sides."""
    spec = cell("fitnets")
    batches = Batches(spec, images(spec.data, per_class=4), CPU)
    teacher = teacher_of(spec, way)
    assert teacher is not None
    member = Member(spec, batches, teacher, CPU, way)
    ran: list[str] = []
    for net, name in ((member.student, "student"), (teacher.network, "teacher")):
        for module in ("block2", "block3", "fc"):
            net.model.get_submodule(module).register_forward_hook(lambda *_, at=f"{name} {module}": ran.append(at))
    # Extractors look once at how their network runs.
    for network in (member.student, teacher.network):
        network(torch.zeros(2, 1, 8, 8), ["logits"])
    ran.clear()
    step(member, batches, teacher)
    assert [at for at in ran if "block3" in at or "fc" in at] == []
    assert {"student block2", "teacher block2"} <= set(ran)


@pytest.mark.parametrize(("worth", "compiled"), [(0, True), (10**9, False)])
def test_a_record_says_compiled_only_where_there_was_a_graph(worth: int, compiled: bool) -> None:
    from kdbench.engine.workers.training import way_of

    spec, way = cell("kd"), Computing(compile=True, worth=worth)
    batches, teacher = batches_for(spec), teacher_of(spec, way)
    member = Member(spec, batches, teacher, CPU, way)
    make_graphs([member])
    assert way_of(member, Program([]))["compile"] is compiled
    # Also where what is left after a stop is not worth a graph any more.
    resumed = Member(spec, batches, teacher_of(spec, way), CPU, way)
    resumed.load_state(member.state())
    assert way_of(resumed, Program([]))["compile"] is compiled
