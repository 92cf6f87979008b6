"""What the verdict of a verification says of checks that could not be made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from shipped import REGISTRY
from synthetic import comparison, make, write

from kdbench.cards import TEACHER_TOLERANCE
from kdbench.record import Record, metrics, read_record
from kdbench.results.tables import build
from kdbench.results.texts import texts
from kdbench.verify import sums
from kdbench.verify.findings import Finding, verdict
from kdbench.verify.rerun import cell_to_rerun, reproduction
from kdbench.verify.soundness import problems
from kdbench.verify.verification import verify

AGREES = Finding("agrees", "made again", "table.md")
VALUES = {"ce": [93.5, 93.7], "kd": [94.0, 94.1]}


def test_the_verdict_tells_what_was_not_checked() -> None:
    assert verdict([AGREES]) == "everything agrees"
    assert verdict([AGREES, Finding("remark", "an extra cell")]) == "everything agrees"
    skipped = Finding("unchecked", "an older version wrote it", "recipe.json", "what its recipe plans today")
    sums_absent = Finding("unchecked", "there is none", "SHA256SUMS", "sums of the files")
    assert verdict([AGREES, skipped, skipped, sums_absent]) == (
        "everything checked agrees; not checked: what its recipe plans today, sums of the files"
    )
    wrong = Finding("disagrees", "it is not what the records give", "table.md")
    assert verdict([wrong, AGREES]) == "1 disagreement"
    assert verdict([wrong, wrong, skipped]) == "2 disagreements; not checked: what its recipe plans today"


def results(folder: Path, run: dict[str, object]) -> Path:
    """A results folder whose table and sums are those of its records."""
    records = comparison(VALUES)
    for record in records:
        write(folder / f"{record.cell.method}-seed{record.cell.seed}-{record.identity[:8]}", record.plain(), [])
    (folder / "recipe.json").write_text(json.dumps(run))
    for name, text in texts(build(records), records).items():
        (folder / name).write_bytes(text.encode())
    sums.write(folder)
    return folder


def unchecked(folder: Path) -> set[str]:
    return {finding.check for finding in verify(folder, REGISTRY) if finding.level == "unchecked"}


def test_a_recipe_that_names_no_cells_or_no_recipe_is_told(tmp_path: Path) -> None:
    cells = [f"{r.cell.method}-seed{r.cell.seed}-{r.identity[:8]}" for r in comparison(VALUES)]
    today, planned = "what its recipe plans today", "which cells were planned"
    assert {today, planned} <= unchecked(results(tmp_path / "a", {"name": "synthetic", "recipe": {}}))
    found = unchecked(results(tmp_path / "b", {"name": "synthetic", "cells": cells}))
    assert today in found and planned not in found
    # A recipe of which nothing can be planned here.
    found = unchecked(results(tmp_path / "c", {"name": "synthetic", "cells": cells, "recipe": {"data": "nowhere"}}))
    assert today in found


def test_identities_are_counted_in_one_line_whoever_wrote_the_records() -> None:
    """Cells of `crd_small` come from two commits."""
    folder = ROOT / "results" / "crd_small"
    found = [finding.what for finding in verify(folder, REGISTRY) if finding.where == "identities"]
    assert found == [f"{len([*folder.glob('*/record.json')])} recomputed from the resolved recipes"]


def test_records_of_another_form_and_a_folder_without_sums_or_cells_are_told(tmp_path: Path) -> None:
    folder = results(tmp_path / "a", {"name": "synthetic", "recipe": {}})
    found = unchecked(folder)
    # Resolved recipes of synthetic records are none.
    assert {"identities", "records against their resolved recipes"} <= found and "sums of the files" not in found
    (folder / "SHA256SUMS").unlink()
    assert "sums of the files" in unchecked(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "recipe.json").write_text("{}")
    assert {"the table's files", "records"} <= unchecked(empty)


@pytest.mark.parametrize(
    ("described", "agrees"),
    [
        ({}, False),
        ({"teacher": {"normalization": {"mean": [0.5], "std": [0.5]}}}, True),
        ({"data": {"image_size": 12}}, True),
        ({"data": {"options": {"short_side": 12}}}, True),
    ],
)
def test_a_teacher_has_one_accuracy_for_images_that_are_given_to_it_alike(
    described: dict[str, dict[str, Any]], agrees: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "quickstart"
    shutil.copytree(ROOT / "results" / "quickstart", folder, ignore=shutil.ignore_patterns("*.png", "*.html"))
    file = next(folder.glob("kd-seed0-*")) / "record.json"
    record = json.loads(file.read_text())
    record["teacher"]["accuracy"] -= 1.0
    for part, fields in described.items():
        record["spec"][part] |= fields
    file.write_text(json.dumps(record))
    told = [finding.what for finding in verify(folder, REGISTRY) if "the teacher accuracy is not" in finding.what]
    assert bool(told) is not agrees


# Far enough from the card's accuracy to be told, and near enough not to be.
FAR, NEAR = 1.1 * TEACHER_TOLERANCE, 0.9 * TEACHER_TOLERANCE


@pytest.mark.parametrize(
    ("cell", "path", "change", "told"),
    [
        ("ab_wrn_30/kd-seed0", "data/fingerprint", "0" * 64, "data.fingerprint"),
        ("ab_wrn_30/kd-seed0", "teacher/sha256", "0" * 64, "teacher.sha256"),
        ("ab_wrn_30/kd-seed0", "teacher/accuracy", FAR, "teacher.accuracy"),
        ("ab_wrn_30/kd-seed0", "teacher/accuracy", -FAR, "teacher.accuracy"),
        ("ab_wrn_30/kd-seed0", "teacher/accuracy", NEAR, ""),
        ("ab_wrn_30/kd-seed0", "teacher/accuracy", -NEAR, ""),
        ("ab_wrn_30/kd-seed0", "compute/training_seconds", 0.5, "compute.training_seconds"),
        ("ab_wrn_30/kd-seed0", "compute/training_seconds", -0.5, "compute.training_seconds"),
        ("ab_wrn_30/kd-seed0", "compute/seconds", -5.0, "compute.seconds"),
        ("ab_wrn_30/ab-seed0", "result/references/agreement/layer1.preact", 1.0, "result.references"),
        ("ab_wrn_30/ab-seed0", "result/metrics/agreement/layer1.preact", 1.0, "result.metrics"),
    ],
)
def test_what_a_record_says_beside_its_metrics_is_compared_with_cards_and_metrics(
    cell: str, path: str, change: float | str, told: str
) -> None:
    (folder,) = (ROOT / "results").glob(f"{cell}-*")
    history, plain = metrics(folder), json.loads((folder / "record.json").read_text())
    assert [*problems(read_record(folder), history)] == []
    *parents, last = path.split("/")
    inner = plain
    for key in parents:
        inner = inner[key]
    inner[last] = change if isinstance(change, str) else inner[last] + change
    found = [*problems(Record.model_validate(plain), history)]
    assert len(found) == bool(told) and all(text.startswith(told) for text in found)


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"fingerprint": "0" * 64, "origin": "folder; not the published images (expected fingerprint …)"}},
        {"teacher": {"accuracy": 50.0}, "spec/teacher": {"resize": 40}},
        {"teacher": {"accuracy": 50.0}, "spec/teacher/model": {"image_size": 40}},
    ],
)
def test_what_was_read_or_shown_in_another_way_is_not_compared_with_the_card(
    changes: dict[str, dict[str, Any]],
) -> None:
    (folder,) = (ROOT / "results").glob("ab_wrn_30/kd-seed0-*")
    plain = json.loads((folder / "record.json").read_text())
    for path, fields in changes.items():
        inner = plain
        for key in path.split("/"):
            inner = inner[key]
        inner |= fields
    assert [*problems(Record.model_validate(plain), metrics(folder))] == []


def test_every_one_of_several_teachers_is_that_of_its_card() -> None:
    (folder,) = (ROOT / "results").glob("ab_wrn_30/kd-seed0-*")
    plain = json.loads((folder / "record.json").read_text())
    one = plain["spec"]["teacher"]
    sha256 = one["weights"]["sha256"]
    plain["spec"]["teacher"] = {**one, "weights": None, "members": [one, one]}

    def told(*members: str) -> list[str]:
        plain["teacher"]["members"] = members
        return [*problems(Record.model_validate(plain), metrics(folder))]

    assert told(sha256, sha256) == []
    assert [what.split(" is ")[0] for what in told(sha256, "0" * 64)] == ["teacher.members.1"]
    assert [what.split(" is ")[0] for what in told(sha256)] == ["teacher.members"]


def test_kept_weights_are_those_of_the_best_evaluation() -> None:
    (folder,) = (ROOT / "results").glob("ab_data_small/kd-*seed0-*")
    plain, history = json.loads((folder / "record.json").read_text()), metrics(folder)
    accuracies = {entry["step"]: entry["test"]["accuracy"] for entry in history}
    step = max(accuracies, key=lambda step: (accuracies[step], -step))
    assert accuracies[step] > accuracies[history[-1]["step"]] > accuracies[history[0]["step"]]

    def told(step: int, accuracy: float) -> list[str]:
        best = {"best": {"part": "test", "step": step, "accuracy": accuracy}}
        return [*problems(Record.model_validate(plain | best), history)]

    assert told(step, accuracies[step]) == []
    (one,) = told(step, accuracies[step] - 0.01)
    (other,) = told(history[-1]["step"], accuracies[history[-1]["step"]])
    assert one.startswith("best is") and other.startswith("best is")


@pytest.mark.parametrize(
    ("recorded", "again", "differing", "unequal"),
    [
        ({}, {}, "", ""),
        # What says how long it took and where is no condition of equal bits.
        ({"compute__seconds": 7.0, "compute__python": "3.13", "compute__platform": "Another"}, {}, "", ""),
        ({"compute__threads": 2}, {}, "threads: 2 → 1", ""),
        ({"data__fingerprint": "0" * 64}, {}, "data: 000000000000 → cdcdcdcdcdcd", ""),
        # A version that records one condition less or more.
        ({"compute__own": "x"}, {}, "own: x → None", ""),
        ({}, {"compute__own": "x"}, "own: None → x", ""),
        *(
            ({f"compute__{key}": value}, {f"compute__{key}": value}, said, "")
            for key, value, said in (
                ("precision", "bfloat16", "bfloat16 on cpu is not exact"),
                ("compile", True, "float32, compiled, on cpu is not exact"),
                ("device", "cuda", "float32 on cuda is not exact"),
                ("teacher_logits", "table", "a table of teacher logits may have been computed in other batches"),
            )
        ),
        ({"best": 91.0}, {}, "", "the result (last, best, validation or metrics)"),
        ({"teacher__sha256": "0" * 64}, {}, "", "the teacher"),
        (
            {"route": [{"step": 9, "epoch": 1.0, "file": "9.safetensors", "sha256": "0" * 64}]},
            {},
            "",
            "the anchors, or the route that was kept",
        ),
        (
            {"anchors": [{"stage": "a", "checkpoint": 3, "step": 9, "epoch": 1.0, "sha256": "0" * 64}]},
            {},
            "",
            "the anchors, or the route that was kept",
        ),
    ],
)
def test_a_cell_run_again_is_exact_where_nothing_else_can_change_bits(
    recorded: dict[str, Any], again: dict[str, Any], differing: str, unequal: str
) -> None:
    found = reproduction(make(**recorded), make(**again), [])
    assert (", ".join(found.differing), ", ".join(found.unequal)) == (differing, unequal)
    # Where bits may differ, one seed has no deviation: a point is allowed.
    assert found.tolerance == bool(differing) and found.agrees is not bool(unequal)


def test_another_accuracy_agrees_up_to_three_deviations_of_the_seeds_or_a_point() -> None:
    """Deviations by hand: of 90, 91, 92 it is 1; of 90.1, 90, 89.9 it is 0.1."""
    here = {"compute__threads": 2}
    for values, allowed in (([90.0, 91.0, 92.0], 3.0), ([90.1, 90.0, 89.9], 1.0)):
        siblings = [make(seed=seed, last=value) for seed, value in enumerate(values)]
        for sign in (-1, 1):
            for change, agrees in ((allowed - 0.1, True), (allowed + 0.1, False)):
                found = reproduction(siblings[0], make(last=values[0] + sign * change, **here), siblings)
                assert found.tolerance == pytest.approx(allowed) and found.agrees is agrees
    assert not reproduction(siblings[0], make(last=90.4, **here), siblings, tolerance=0.2).agrees


def test_the_cell_to_run_again_is_one_whose_teacher_is_here_and_of_these_the_fastest() -> None:
    folder, records = ROOT / "results" / "ab_wrn_30_epochs_h200", {}
    for name, seconds in (("kd", 1.0), ("ab", 2.0), ("ce", 3.0)):
        record = read_record(next(folder.glob(f"{name}-seed0-*")))
        records[name] = record.model_copy(update={"compute": record.compute.model_copy(update={"seconds": seconds})})
    assert cell_to_rerun(records, None, REGISTRY)[0] == "ce"
    del records["ce"]
    assert cell_to_rerun(records, None, REGISTRY)[0] == "kd"
    # One of another version, of which nothing can be built.
    records["old"] = make("ce", compute__seconds=0.5)
    assert cell_to_rerun(records, None, REGISTRY)[0] == "kd"


def test_evaluations_of_a_cell_run_again_are_compared_without_their_times(tmp_path: Path) -> None:
    lines = [{"step": step, "test": {"accuracy": 50.0 + step}, "seconds": 1.0} for step in (1, 2, 3)]
    later = [line | {"seconds": 2.0, "new": 1} for line in lines]
    other = [*lines[:1], *({**line, "test": {"accuracy": 9.0}} for line in lines[1:])]
    folders = [write(tmp_path / str(n), make().plain(), found) for n, found in enumerate((lines, later, other))]
    first, same, changed = map(read_record, folders)
    assert reproduction(first, same, []).unequal == ()
    assert reproduction(first, changed, []).unequal == ("the evaluation at step 2",)
