"""Records and metrics read back, and what is said of damaged and foreign files."""

from __future__ import annotations

import json
import subprocess
import sys
from math import inf
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from synthetic import make, plain_record, write

from kdbench.errors import UserError
from kdbench.files import TEACHERS, TRIALS
from kdbench.reading import DEEPEST
from kdbench.recipe.planning import plan
from kdbench.record import Record, metrics, read_record, read_records, student_file, summary, unfinished
from kdbench.record_derived import derived
from kdbench.registry import Registry
from kdbench.verify.soundness import problems


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    plain = plain_record("ab", 2, 94.1234, agreement={"layer1.preact": 0.83}, extra_epochs=30.0)
    plain["result"]["validation"] = {"last": 93.0, "best": 93.5, "best_step": 5}
    record = read_record(write(tmp_path / "cell", plain))
    assert record.cell.method == "ab"
    assert record.accuracy("last") == 94.1234
    assert record.result.metrics == {"agreement": {"layer1.preact": 0.83}}
    assert record.result.validation is not None and record.result.validation.best == 93.5
    assert record.budget.extra_epochs == 30.0
    assert record.folder == tmp_path / "cell"
    written = without_nothing(json.loads(json.dumps(record.plain())))
    plain["result"]["references"] = {}
    expected = without_nothing(plain | {"cell": {**plain["cell"], "title": ""}})
    assert {key: written[key] for key in expected} == expected


COMMITTED = [next(folder.parent.glob("*/record.json")) for folder in sorted((ROOT / "results").glob("*/recipe.json"))]


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.parent.parent.name)
def test_what_follows_from_the_resolved_recipe_is_not_written_and_comes_back(tmp_path: Path, file: Path) -> None:
    record = read_record(file)
    plain = json.loads(json.dumps(record.plain()))
    assert "budget" not in plain and plain["cell"].keys() <= {"axes", "order", "baseline", "title", "tuning"}
    assert plain["data"].keys() == {"fingerprint", "origin"} and plain["seeds"].keys() == {"streams"}
    again = read_record(write(tmp_path / "cell", plain))
    assert again.model_copy(update={"folder": record.folder}) == record
    assert again.budget.steps == record.budget.steps > 0 and again.cell.label == record.cell.label


def test_what_follows_from_a_resolved_recipe_by_hand() -> None:
    """Digits have 1198 images for training and 599 for tests, mnist_8 has 4000 and 1000."""
    recipe = {"student": "wrn_10_1", "protocol": "digits", "seeds": [3], "steps": 60}
    held_out = {"name": "digits", "validation": 100, "tested_on": "validation", "split_seed": 7}
    taught = {"data": held_out, "teacher": {"model": "wrn_10_2", "untrained": True}, "method": "dml"}
    found = derived(plan(recipe | taught, Registry()).cells[0].spec)
    # 1098 images are 17 batches of 64 and a smaller one.
    assert (found["budget"]["batches_per_epoch"], found["budget"]["epochs"]) == (18, 3.3333)
    assert found["data"] == {"name": "digits", "classes": 10, "train": 1098, "validation": 100, "test": 100}
    assert (found["teacher"], found["target"], found["seeds"]) == (None, None, {"seed": 3, "split": 7})
    longer = {"name": "ab_crd", "stages": {"boundaries": {"extra_epochs": 0.3}}}
    found = derived(
        plan(recipe | {"data": held_out, "teacher": "wrn_16_2_digits", "method": longer}, Registry()).cells[0].spec
    )
    # 0.3 epochs are 5.4 steps.
    assert [stage["steps"] for stage in found["budget"]["stages"]] == [5, 60] and found["budget"]["steps"] == 65
    assert (found["budget"]["extra_epochs"], found["budget"]["epochs"]) == (0.2778, 3.6111)
    adapted = {"data": "mnist_8", "target": "digits", "method": "source_only"}
    found = derived(plan(recipe | adapted, Registry()).cells[0].spec)
    assert found["data"] == {"name": "mnist_8", "classes": 10, "train": 4000, "validation": 0, "test": 1000}
    assert found["target"] == {"name": "digits", "classes": 10, "train": 1198, "validation": 0, "test": 599}
    assert found["seeds"] == {"seed": 3, "split": 3}


def test_a_copy_in_an_earlier_record_that_contradicts_its_recipe_is_told(tmp_path: Path) -> None:
    file = next((ROOT / "results" / "quickstart").glob("ab-seed0-*/record.json"))
    plain = json.loads(file.read_text(encoding="utf-8"))
    history = metrics(file.parent)
    assert not list(problems(read_record(file), history))
    for part, name, value in (
        ("cell", "label", "AB2"),
        ("cell", "seed", 3),
        ("budget", "steps", 601),
        ("budget", "batches_per_epoch", 3),
        ("data", "train", 101),
        ("seeds", "split", 1),
        ("teacher", "name", "another"),
    ):
        spoilt = write(tmp_path / f"{part}-{name}", plain | {part: plain[part] | {name: value}})
        assert f"{part}.{name} is {value}, it follows" in "; ".join(problems(read_record(spoilt), history))
        assert read_record(spoilt).plain()[part][name] == value, "it is not mended in passing"


def evaluated(folder: Path, steps: list[int], stages: list[tuple[str, int]], per_epoch: int = 10) -> Record:
    """A record of these stages with evaluations at some steps, whose accuracies are a tenth of the step."""
    total = sum(length for _, length in stages)
    budget = {"steps": total, "epochs": total / per_epoch, "batches_per_epoch": per_epoch}
    plain = plain_record(budget={**budget, "stages": [{"name": name, "steps": n} for name, n in stages]})
    return read_record(write(folder, plain, [{"step": s, "test": {"accuracy": s / 10}} for s in steps]))


def test_the_mean_of_the_last_epochs_is_of_the_same_window_whatever_stages_a_method_has(tmp_path: Path) -> None:
    # AB's measure: an evaluation each epoch, the mean over the last ten of these.
    each = evaluated(tmp_path / "each", list(range(10, 801, 10)), [("all", 800)])
    assert each.tail.evaluations == 10
    assert each.accuracy("mean_last") == pytest.approx(sum(range(71, 81)) / 10)
    # Ten of fifty are a fifth.
    assert evaluated(tmp_path / "fifth", list(range(10, 501, 10)), [("all", 500)]).tail.evaluations == 10
    even = evaluated(tmp_path / "even", [0, 600, 640, 700, 720, 760, 800], [("all", 800)])
    # The end of the first stage is an evaluation of that stage, at the begin of the window and before it.
    for first in (700, 640, 100):
        stages = [("hints", first), ("classification", 800 - first)]
        steps = sorted({0, 600, 640, 700, 720, 760, 800, first})
        staged = evaluated(tmp_path / str(first), steps, stages)
        assert staged.tail == even.tail
    assert even.tail.evaluations == 3 and even.accuracy("mean_last") == pytest.approx(76.0)


@pytest.mark.parametrize(
    ("steps", "stages", "says"),
    [
        ([196, 391], [("hints", 39), ("classification", 352)], "its training has 39.1, of which these may be a fifth"),
        (
            [700, 750, 770, 800],
            [("hints", 720), ("classification", 80)],
            "its last stage, 'classification', is shorter",
        ),
        ([400, 750, 800], [("classification", 800)], "2 evaluations in these, 3 are needed"),
    ],
)
def test_where_the_last_epochs_say_nothing_their_mean_is_refused(
    tmp_path: Path, steps: list[int], stages: list[tuple[str, int]], says: str
) -> None:
    record = evaluated(tmp_path / "cell", steps, stages)
    with pytest.raises(UserError, match=says) as error:
        record.accuracy("mean_last")
    assert "cell" in str(error.value.where) and error.value.hint
    for needs in (lambda record: record.accuracy("mean_last"), student_file):
        with pytest.raises(UserError, match="read from a folder"):
            needs(make())


def test_the_mean_that_earlier_versions_kept_is_not_read(tmp_path: Path) -> None:
    old = plain_record()
    old["result"]["test"] |= {"mean_last": 12.3, "mean_last_of": 2}
    record = read_record(write(tmp_path / "cell", old))
    assert record.result == make().result and "mean_last" not in json.dumps(record.plain())


def without_nothing(data: Any) -> Any:
    """Plain data without entries that are null: a field that came later is that in a record from before."""
    return {k: without_nothing(v) for k, v in data.items() if v is not None} if isinstance(data, dict) else data


def test_a_field_of_a_later_version_is_kept(tmp_path: Path) -> None:
    record = read_record(write(tmp_path / "cell", plain_record(result__calibration=0.02, novelty="x")))
    assert record.plain()["novelty"] == "x"
    assert record.plain()["result"]["calibration"] == 0.02


def test_a_tree_is_read_once_in_the_given_order(tmp_path: Path) -> None:
    for name in ("b/x", "b/a", "a/deep/er"):
        write(tmp_path / name, plain_record(recipe=name))
    found = read_records([tmp_path / "b", tmp_path / "a", tmp_path, tmp_path / "b" / "a" / "record.json"])
    assert [record.recipe for record in found] == ["b/a", "b/x", "a/deep/er"]
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    assert len(read_records(tmp_path)) == 3
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert len(read_records([tmp_path / "link", tmp_path / "b"])) == 2
    assert [record.recipe for record in read_records(str(tmp_path / "a"))] == ["a/deep/er"]
    assert [record.recipe for record in read_records(tmp_path / "b" / "x" / "record.json")] == ["b/x"]


def test_teachers_trials_and_what_a_killed_publish_left_are_no_results(tmp_path: Path) -> None:
    for name in ("whole/a", ".half.x1/half/b", f"whole{TRIALS}/c", f"{TEACHERS}/d"):
        write(tmp_path / name, plain_record(recipe=name))
    assert [record.recipe for record in read_records(tmp_path)] == ["whole/a"]


def damaged(**over: Any) -> str:
    return json.dumps(plain_record(**over))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "damaged"),
        ('{"schema": 1, "kdb', "damaged"),
        ("[1, 2]", "not a record of kdbench"),
        ("{}", "not a record of kdbench"),
        ('{"accuracy": 93.1}', "not a record of kdbench"),
        ('{"schema": "1", "kdbench": "0.1.0"}', "not a record of kdbench"),
        ('{"schema": 1, "kdbench": "0.1.0"}', "'status'"),
        (damaged(schema=2), "schema 2.*reads up to 1"),
        (damaged(result__test={}), "'result.test.last'"),
        (damaged(cell__seed="x"), "'cell.seed'"),
        (damaged(budget__steps=None), "'budget.steps'"),
        (damaged(last=101.0), "'result.test.last'"),
        (damaged(result__test__last=float("nan")), "'result.test.last'"),
        (damaged(data__test=-1), "'data.test'"),
        (damaged(novelty="HERE").replace('"HERE"', "[" * DEEPEST + "]" * DEEPEST), "nested more than"),
        (damaged(budget__steps=10**400), "damaged"),
        (damaged(result__test__last="HERE").replace('"HERE"', "1e999"), "inf is not a number"),
        (damaged(label="\ud800"), "a text contains the character"),
        (damaged(spec__student=[1]), "'spec.student'"),
        (damaged(spec__method__stages="x"), "'spec.method.stages'"),
        (damaged(seeds=[1]), "'seeds'"),
        (damaged(seeds__streams=5), "'seeds.streams'"),
    ],
)
def test_a_damaged_or_foreign_file_is_named(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "record.json").write_text(content, encoding="utf-8")
    for read in (lambda: read_record(tmp_path), lambda: read_records([tmp_path])):
        with pytest.raises(UserError, match=f"(?s){says}") as error:
            read()
        assert error.value.where == str(tmp_path / "record.json")
        assert error.value.hint


def test_absent_folders_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder") as error:
        read_records([tmp_path / "absent"])
    assert error.value.where == str(tmp_path / "absent")
    with pytest.raises(UserError, match="no finished cell"):
        read_records([tmp_path])
    with pytest.raises(UserError, match="no finished cell"):
        read_records([])
    with pytest.raises(UserError, match="no record"):
        read_record(tmp_path)


def test_unfinished_cells_are_found(tmp_path: Path) -> None:
    write(tmp_path / "whole", plain_record(), [{"step": 1}])
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert unfinished([tmp_path]) == [tmp_path / "begun"]
    assert unfinished(tmp_path / "whole") == []
    (tmp_path / "never").mkdir()
    assert unfinished([tmp_path / "whole", tmp_path / "never"]) == [tmp_path / "never"]
    assert unfinished(tmp_path) == [tmp_path / "begun"]


def test_metrics_are_read(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"step": 391, "epoch": 1.0, "test": {"accuracy": 10.0, "loss": inf}},
        {"step": 782, "metrics": {"agreement": {"layer1.preact": 0.7}}, "references": {}},
    ]
    assert metrics(write(tmp_path / "cell", plain_record(), lines)) == lines


def test_records_and_metrics_of_earlier_versions_have_their_agreement_among_the_metrics(tmp_path: Path) -> None:
    plain = plain_record("ab")
    former = {"agreement": {"layer1.preact": 0.83}, "agreement_reference": {"layer1.preact": 0.7}}
    plain["result"] = {"test": plain["result"]["test"], **former}
    folder = write(tmp_path / "cell", plain, [{"step": 1, **former}, {"step": 2, "agreement": {}}])
    named = {"metrics": {"agreement": {"layer1.preact": 0.83}}, "references": {"agreement": {"layer1.preact": 0.7}}}
    result = read_record(folder).result
    assert {"metrics": result.metrics, "references": result.references} == named
    assert not result.model_extra
    assert metrics(folder) == [{"step": 1, **named}, {"step": 2}]
    plain["result"] |= {"agreement": {}, "agreement_reference": None}
    assert read_record(write(tmp_path / "none", plain)).result.metrics == {}


def test_the_best_evaluation_is_the_first_of_equals_and_the_first_of_all_counts() -> None:
    accuracies = {0: 200 / 3, 5: 50.0, 9: 200 / 3, 12: 60.0}
    history: list[dict[str, Any]] = [{"step": step, "test": {"accuracy": a}} for step, a in accuracies.items()]
    history.append({"step": 13, "validation": {"accuracy": 99.0}})
    assert summary(history, "test") == {"last": 60.0, "best": 66.6667, "best_step": 0}
    assert summary(history, "validation") == {"last": 99.0, "best": 99.0, "best_step": 13}


def test_a_line_that_is_being_written_is_left_out_only_where_the_cell_is_not_finished(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "te')
    assert metrics(tmp_path) == [{"step": 1}]
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(UserError, match="damaged") as error:
        metrics(tmp_path)
    assert error.value.where == f"{file}:2"


@pytest.mark.parametrize(
    "content",
    [
        '{"step": 1}\nnot json\n{"step": 3}\n',
        '{"step": 1}\n[3]\n',
        '{"step": 1}\n{"a": 1}\n',
        '{"step": 1}\n{"step": 2, "validation": {"loss": 1}}\n',
        *(
            f'{{"step": 1}}\n{line}\n'
            for line in (
                "[" * 100_000 + "]" * 100_000,
                '{"step": 2, "test": {"accuracy": "x"}}',
                '{"step": 2, "test": {"accuracy": 1, "loss": "x"}}',
                '{"step": 2, "test": {"accuracy": NaN}}',
                '{"step": 2, "test": null}',
                '{"step": 1%s}' % ("0" * 400),
                '{"step": 2, "metrics": {"m": [1]}}',
                '{"step": 2, "agreement": [1]}',
            )
        ),
    ],
    ids=lambda content: content[:60],
)
def test_damaged_metrics_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError) as error:
        metrics(tmp_path)
    assert error.value.where == f"{tmp_path / 'metrics.jsonl'}:2"


def test_absent_metrics_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read") as error:
        metrics(tmp_path)
    assert error.value.where == str(tmp_path / "metrics.jsonl")


def test_records_are_frozen() -> None:
    record = make()
    with pytest.raises(ValueError, match="frozen"):
        record.kdbench = "9"  # type: ignore[misc]
    assert isinstance(record, Record)


def test_results_need_no_torch() -> None:
    code = (
        "import sys, kdbench.record, kdbench.results.statistics, kdbench.results.tables, "
        "kdbench.results.layout, kdbench.results.frames, kdbench.results.plots, kdbench.results.page, "
        "kdbench.verify.verification, kdbench.verify.publishing, kdbench.verify.rerun\n"
        "print([m for m in ('torch', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
