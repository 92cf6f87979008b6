"""What the benchmark makes of the times that it takes: choices, ratios and ceilings by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shipped import DIGITS, REGISTRY

from kdbench.bench import child, compare, machine, made_up
from kdbench.bench.child import Child, Loop
from kdbench.bench.compare import Benchmark, LaneTimer, Machine, benchmark, cells_of
from kdbench.bench.gpu import Pair
from kdbench.bench.lanes import Lane
from kdbench.bench.loading import Rates
from kdbench.engine.computing.compute import Computing
from kdbench.recipe.planning import Plan, plan

FLOPS = {"teacher": 4e6, "student": 1e6}
COHORT = "3 methods as one cohort"
# Images a second in three rounds. Neither the highest nor the mean of bfloat16's is its median.
RATES = {
    "torchdistill": [10.0, 20.0, 40.0],
    "kdbench, float32": [30.0, 20.0, 60.0],
    "float32, memory kept": [50.0, 50.0, 50.0],
    "float32, channels_last": [60.0, 70.0, 80.0],
    "bfloat16, channels_last": [300.0, 65.0, 60.0],
    "float32, channels_last, compiled": [90.0, 90.0, 100.0],
    f"float32, channels_last, compiled, {COHORT}": [200.0, 100.0, 300.0],
    "float32, channels_last, compiled, logit table": [150.0, 110.0, 140.0],
}


class Made:
    """A lane's process that takes no time."""

    warm = 2.0

    def __init__(self, lane: Lane, device: str = "cpu", threads: int = 1) -> None:
        self.lane, self.turns, self.ended = lane, 0, 0

    def ready(self) -> Made:
        return self

    def turn(self, seconds: float) -> float:
        rates = RATES.get(self.lane.name, [1.0])
        self.turns += 1
        return rates[(self.turns - 1) % len(rates)]

    def end(self) -> None:
        self.ended += 1


def planned(**over: Any) -> Plan:
    return plan(DIGITS | {"compare": {"method": ["ce", "kd", "at"]}} | over, REGISTRY)


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> LaneTimer:
    monkeypatch.setattr(compare, "Process", Made)
    # The float32 peak grows and falls again: the best counts.
    peaks = iter([3e9, 1e9, 5e9, 2e9, *[1e9] * 99])
    about = Machine({}, ("float32", "bfloat16"), True, lambda precision: next(peaks))
    return LaneTimer(about, "cpu", 1, 3, 0.1, lambda said: None)


def test_the_fastest_way_by_its_median_is_built_on_and_compared_in_the_same_rounds(timer: LaneTimer) -> None:
    found = benchmark(planned(), timer, FLOPS, peers=True)
    rows = {row.lane.name: row for row in found.rows}
    assert {row.lane.name for row in found.roles.values()} == set(list(RATES)[-3:])
    assert [*found.ratios] == ["run", "cohort", "table"]
    # Medians of 30/10, 20/20, 60/40 and of 90/10, 90/20, 100/40: not the ratios of the medians.
    assert rows["kdbench, float32"].ratio == pytest.approx(1.5)
    assert found.ratios["run"] == pytest.approx(4.5)
    assert found.ratios["cohort"] == pytest.approx(7.5) and found.ratios["table"] == pytest.approx(5.5)
    # An image: three forward passes of the student, one of the teacher, which three methods share and a table saves.
    assert [found.roles[role].flops for role in found.roles] == pytest.approx([7e6, 3e6 + 4e6 / 3, 3e6])
    assert found.peaks == {"float32": 5e9, "bfloat16": 2e9}
    assert found.ceiling(rows["float32, memory kept"]) == pytest.approx(5e9 / 7e6)
    assert found.ceiling(rows["bfloat16, channels_last"]) == pytest.approx(2e9 / 7e6)
    (plain,) = [row for row in found.plain()["rows"] if row["name"] == "bfloat16, channels_last"]
    assert (plain["median"], plain["times_first"], plain["first_steps_seconds"]) == (65.0, 3.25, 2.0)
    assert plain["share_of_peak"] == pytest.approx(65 * 7e6 / 2e9, abs=1e-3)
    assert all(process.ended for process in timer.started)


def test_no_round_begins_when_the_time_is_over_but_the_first(timer: LaneTimer) -> None:
    assert timer.measure([Made(Lane("torchdistill", "plain", []))], "", until=0.0) == {"torchdistill": [10.0]}


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("student", ["wrn_10_1", "wrn_10_2"]),
        ("teacher", ["wrn_16_2_digits", "wrn_16_2_digits_route"]),
        ("data.per_class", [5, 6]),
        ("protocol.batch_size", [8, 16]),
        ("compute.precision", ["float32", "bfloat16"]),
    ],
)
def test_one_cohort_is_what_costs_the_same_in_the_same_batches(path: str, values: list[Any]) -> None:
    logit, cells = cells_of(planned(compare={"method": ["at", "ce", "kd"], path: values}, seeds=2))
    assert logit in cells and sorted((one.method.name, one.seed) for one in cells) == [("at", 0), ("ce", 0), ("kd", 0)]


def of_pair(pair: Pair, rates: dict[str, list[float]]) -> Benchmark:
    pair.choose_lanes(Machine({}, ("float32",), True, lambda precision: 1e9), "", peers=True)
    pair.processes = [Made(lane) for lanes in pair.lanes.values() for lane in lanes]  # type: ignore[misc]
    found = pair.result(rates, {"float32": 1e9})
    assert found is not None
    return found


def test_of_each_role_on_a_gpu_the_fastest_counts_and_whole_runs_follow_from_it() -> None:
    pair = Pair(planned(epochs=2, evaluations=4), FLOPS, evaluation=3.0)
    ways = [Computing("float32", "channels_last", cuda_graphs=True, compile=c).name for c in (False, True)]
    rates = {
        "torchdistill": [10.0, 20.0, 40.0],
        ways[0]: [60.0, 61.0, 62.0],
        ways[1]: [50.0, 51.0, 100.0],
        f"{ways[1]}, {COHORT}": [150.0, 90.0, 160.0],
    }
    found = of_pair(pair, rates)
    assert {role: row.lane.name for role, row in found.roles.items()} == {
        "run": ways[0],
        "cohort": f"{ways[1]}, {COHORT}",
    }
    assert found.ratios["run"] == pytest.approx(61 / 20) and found.ratios["cohort"] == pytest.approx(4.5)
    # Two epochs of whole batches, and four evaluations of three seconds each.
    spec = cells_of(pair.plan)[0]
    images = 2 * -(-spec.data.train // spec.protocol.batch_size) * spec.protocol.batch_size
    whole = pair.whole(found)
    assert whole["run"]["minutes"] == pytest.approx((images / 61 + 12) / 60)
    assert whole["run"]["evaluations"] == pytest.approx(12 / (images / 61 + 12))
    assert whole["cohort"]["minutes"] == pytest.approx((3 * images / 150 + 36) / 60)


def test_several_seeds_at_once_train_on_as_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made_up, "IMAGES", 64)
    (kd,) = [cell.spec for cell in planned().cells if cell.spec.method.name == "kd"]
    small = kd.model_copy(update={"protocol": kd.protocol.model_copy(update={"batch_size": 2})})
    lane = Lane("seeds", "kdbench", [small.model_dump(mode="json")], seeds=2)
    loop = Loop({**vars(lane), "computing": vars(lane.computing)}, torch.device("cpu"))
    assert loop.train() == 4 and [cell.member.spec.seed for cell in loop.cells] == [0, 1]


class Clock:
    """Goes on by so much at every look."""

    def __init__(self, *steps: float) -> None:
        self.now, self.steps = 0.0, [*steps]

    def perf_counter(self) -> float:
        self.now += self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        return self.now


def test_a_peak_counts_two_operations_a_product_in_the_shortest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "time", Clock(0.0, 3.0, 1.0, 0.5, 1.0, 4.0))
    monkeypatch.setattr(machine, "SIZE", {"cpu": 10})
    assert machine._peak("float32", torch.device("cpu")) == 2000 / 0.5


def test_rates_are_images_over_the_time_until_all_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "time", Clock(1.0))
    made = Child.__new__(Child)
    made.device, made.train = torch.device("cpu"), lambda: 7
    made.loop = SimpleNamespace(evaluate=lambda: None)  # type: ignore[assignment]
    # It begins at 1 s and looks at 2, 3 and 4 s whether 2.5 s are over; 5 s is the end.
    assert made.rate(2.5) == 14 / 4
    assert made.evaluation() == pytest.approx(1 / 3)


def test_quartiles_of_any_number_of_rounds_lie_within_them_and_cores_follow_from_the_median() -> None:
    found = Rates({"several": [500.0, 100.0, 200.0, 400.0, 300.0], "two": [50.0, 70.0], "one": [40.0]}, 1.0)
    assert [row.split(" | ")[1:] for row in found.table().splitlines()[2:]] == [
        ["300", "200 to 400", "3.3 |"],
        ["60", "55 to 65", "16.7 |"],
        ["40", "40 to 40", "25.0 |"],
    ]
