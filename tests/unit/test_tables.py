"""Tables from records: what stands where, what is said below, and the files made of them."""

from __future__ import annotations

import csv
import io
import os
import random
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic import comparison, make, plain_record, write

from kdbench.errors import UserError
from kdbench.record import Record, metrics, read_records
from kdbench.registry import Registry
from kdbench.results import statistics
from kdbench.results.contents import Entry, Note, Table
from kdbench.results.frames import records_csv, table_csv, to_frame
from kdbench.results.latex import escape, for_page
from kdbench.results.layout import Grid, Text, layout, seeds_text
from kdbench.results.page import html
from kdbench.results.plots import metric_curves
from kdbench.results.rendering import markdown_escaped
from kdbench.results.tables import build
from kdbench.results.texts import latex, markdown
from kdbench.verify.soundness import problems

PACKAGES = r"\usepackage{booktabs,xltabular}"
VALUES = {"ce": [93.5, 93.7, 93.6], "kd": [94.0, 94.1, 93.9], "ab": [94.6, 94.3, 94.6]}
SPECIAL = r"""#$%&~_^\{}<>|"`'[x] → ± − × ≥ α β Ω é ñ Ł ß – … ² 中"""


def cell(table: Table, row: str, column: int = 0) -> Entry:
    found = next(r for r in table.rows if r.label == row).cells[column]
    assert found is not None
    return found


def notes(table: Table) -> str:
    return "\n".join(f"{note.mark or ''} {note.text}" for note in table.notes)


def grid_of(students: list[str], fractions: list[float], **values: list[float]) -> list[Record]:
    """A comparison over students and data fractions; the n-th column is n percent points better."""
    records = []
    for i, (student, fraction) in enumerate((s, f) for s in students for f in fractions):
        for k, (method, several) in enumerate(values.items()):
            for seed, value in enumerate(several):
                axes = {"method": method, "student": student, "data.fraction": fraction}
                records.append(
                    make(
                        method,
                        seed,
                        value + i,
                        order=10 * k + i,
                        axes=axes,
                        student=student,
                        data__train=int(50000 * fraction),
                        spec__data={"fraction": fraction},
                    )
                )
    return records


def test_means_deviations_and_differences() -> None:
    table = build(comparison(VALUES))
    assert [row.label for row in table.rows] == ["CE", "KD", "AB"]
    assert [row.is_baseline for row in table.rows] == [True, False, False]
    assert table.baseline == "CE"
    assert len(table.columns) == 1 and table.axes == ()
    kd = cell(table, "KD")
    assert (kd.n, kd.seeds, kd.values) == (3, (0, 1, 2), (94.0, 94.1, 93.9))
    assert kd.mean == pytest.approx(94.0) and kd.deviation == pytest.approx(0.1)
    # Differences 0.5, 0.4, 0.3: mean 0.4, deviation 0.1, half width 4.3027 · 0.1 / √3, t = 6.9282 with 2 degrees of
    # freedom, whose p is 1 − t / √(2 + t²) = 0.0202; AB: 1.1, 0.6, 1.0: mean 0.9, t = 5.8926, p = 0.0276.
    kd_to_ce, ab_to_ce = kd.difference, cell(table, "AB").difference
    assert kd_to_ce is not None and ab_to_ce is not None
    assert (kd_to_ce.n, kd_to_ce.mean) == (3, pytest.approx(0.4))
    assert (kd_to_ce.low, kd_to_ce.high) == (pytest.approx(0.4 - 0.24841, abs=1e-4), pytest.approx(0.64841, abs=1e-4))
    assert kd_to_ce.p == pytest.approx(0.02020, abs=1e-5)
    assert ab_to_ce.p == pytest.approx(0.02762, abs=1e-5)
    assert kd_to_ce.p_holm == pytest.approx(2 * 0.02020, abs=2e-5)
    assert ab_to_ce.p_holm == kd_to_ce.p_holm
    assert cell(table, "CE").difference is None
    assert "Holm's correction for the 2 comparisons" in notes(table)


def test_intervals_are_the_bootstraps_where_that_is_asked_for_and_tests_stay_students() -> None:
    values = {"ce": [90.0 + s % 7 / 10 for s in range(20)], "kd": [90.5 + s % 5 / 5 for s in range(20)]}
    table = build(comparison(values), interval="bootstrap")
    found, students = (cell(one, "KD").difference for one in (table, build(comparison(values))))
    assert found is not None and students is not None
    assert (found.low, found.high) == statistics.bootstrap(dict(enumerate(values["kd"])), dict(enumerate(values["ce"])))
    assert found.low != students.low and (found.p, found.mean) == (students.p, students.mean)
    assert "bootstrap-t intervals (10,000 draws of the seeds)" in notes(table)


def test_best_and_second_are_by_the_shown_mean() -> None:
    table = build(comparison(VALUES | {"at": [94.001, 94.1, 93.9]}))
    assert [cell(table, label).best for label in ("CE", "KD", "AB", "AT")] == [False, False, True, False]
    assert [cell(table, label).second for label in ("CE", "KD", "AB", "AT")] == [False, True, False, True]
    assert not cell(build(comparison({"kd": [90.0, 91.0]})), "KD").best
    tied = build(comparison({"kd": [90.001, 91.0], "ab": [90.0, 91.0], "ce": [90.0, 90.8]}))
    assert [cell(tied, label).best for label in ("KD", "AB", "CE")] == [True, True, False]
    near = build(comparison({"kd": [90.02, 91.0], "ab": [90.0, 91.0]}))
    assert [cell(near, label).best for label in ("KD", "AB")] == [True, False]


def test_the_metric_is_chosen_and_best_is_marked_as_optimistic() -> None:
    records = comparison(VALUES, best=95.0)
    assert cell(build(records), "KD").mean == pytest.approx(94.0)
    best = build(records, metric="best")
    assert cell(best, "KD").mean == 95.0
    assert best.metric_label == "best test epoch (optimistic)"
    assert best.notes[0].warning and "best test epoch (optimistic)" in best.notes[0].text
    for text in (markdown(best), latex(best)):
        assert "best test epoch (optimistic)" in " ".join(text.split())
    assert "best test epoch (optimistic)" not in markdown(build(records))


def test_the_mean_of_the_last_epochs_is_made_of_the_metrics_and_says_of_how_many(tmp_path: Path) -> None:
    for record in comparison(VALUES):
        # 391 steps an epoch, 200 epochs, an evaluation every two or four.
        every = 2 * 391 if record.cell.method == "kd" else 4 * 391
        steps = range(every, 391 * 200 + 1, every)
        lines = [{"step": s, "test": {"accuracy": record.result.test.last - (s < 391 * 200)}} for s in steps]
        write(tmp_path / f"{record.cell.method}-{record.cell.seed}", record.plain(), lines)
    table = build(read_records([tmp_path]), metric="mean_last")
    assert table.metric_label == "mean of 3 to 5 evaluations in the last 10 epochs"
    assert cell(table, "KD").mean == pytest.approx(94.0 - 4 / 5)
    assert cell(table, "AB").mean == pytest.approx(94.5 - 2 / 3)
    assert "mean of 3 to 5 evaluations in the last 10 epochs" in notes(table)
    assert "mean_last" not in records_csv(read_records([tmp_path]))


def test_accuracies_on_the_validation_part_are_called_so_beside_others_too() -> None:
    def told(**over: Any) -> Note:
        return build([make("ce", 0, **over), make("kd", 0, spec__data__tested_on="validation")]).notes[0]

    assert (
        told(spec__data__tested_on="validation").text
        == "Numbers are accuracies on the validation part in %, last epoch."
    )
    both = told()
    assert both.text == "Numbers are test accuracies and accuracies on the validation part in %, last epoch."
    assert both.warning


def test_a_mean_over_fewer_seeds_than_the_accuracys_is_marked() -> None:
    records = [
        *(make("ce", seed, result__calibration_error=4.0, agreement={"layer1": 0.5}) for seed in range(2)),
        make("kd", 0, 91.0, order=1, result__calibration_error=3.0, agreement={"layer1": 0.6}),
        make("kd", 1, order=1),
    ]
    table = build(records, columns=["calibration_error"])
    assert cell(table, "CE").marks == () and len(cell(table, "KD").marks) == 1
    assert "Over the seeds whose records have them, not over all: agreement.layer1, calibration_error" in notes(table)
    assert cell(build([records[0], records[2]]), "KD").marks == ()


def test_entries_show_signs_and_small_p_values() -> None:
    table = build(
        comparison(
            {
                "ce": [90.0, 90.5, 91.0],
                "kd": [92.0, 92.501, 92.999],
                "ab": [89.9, 90.2, 90.98],
                "at": [90.001, 90.498, 91.001],
            }
        )
    )
    lines = {line.split(" | ")[0]: line for line in markdown(table).split("Cost")[0].splitlines()}
    assert lines["| KD"] == "| KD | **92.50 ± 0.50** | 3 | +2.00 | \\[+2.00, +2.00\\] | \\<0.001 | 2 |"
    assert lines["| AB"].split(" | ")[3] == "−0.14"
    assert lines["| AT"].split(" | ")[3] == "0.00"
    assert lines["| AT"].endswith(" | 1.000 | \\>1000 |")
    # Differences 1.9, 2 and 2.1: t is 2 / (0.1 / √3), and p of it with two degrees of freedom 0.00083.
    small = markdown(build(comparison({"ce": [90.0, 90.5, 91.0], "kd": [92.0, 92.4, 93.1]})))
    assert "| \\<0.001 | 2 |" in small
    # 0.9, 1 and 1.1: 0.0033.
    assert "| 0.003 |" in markdown(build(comparison({"ce": [90.0, 90.5, 91.0], "kd": [91.0, 91.4, 92.1]})))
    assert (seeds_text(1000), seeds_text(1001)) == ("1000", ">1000")


def test_one_seed_has_no_interval_and_no_test() -> None:
    table = build(comparison({"ce": [93.0], "kd": [94.0]}))
    kd = cell(table, "KD")
    assert kd.deviation is None and kd.difference is not None
    assert (kd.difference.mean, kd.difference.low, kd.difference.p_holm, kd.difference.seeds_needed) == (
        1.0,
        None,
        None,
        None,
    )
    assert "There is one seed, so there is no deviation, no interval and no test." in notes(table)
    row = next(line for line in markdown(table).splitlines() if line.startswith("| KD"))
    assert row == "| KD | **94.00** | 1 | +1.00 | – | – | – |"


def test_rows_follow_the_recipe_whatever_the_order_of_the_records() -> None:
    records = comparison({"kd": [94.0, 94.1], "at": [93.0, 93.3], "ab": [95.0, 95.2]})
    for seed in range(5):
        random.Random(seed).shuffle(records)
        assert [row.label for row in build(records).rows] == ["KD", "AT", "AB"]


def test_students_without_a_teacher_stand_directly_below_it() -> None:
    values = {"kd": [94.0, 94.1], "plain": [92.0, 92.1], "ab": [95.0, 95.2], "ce": [93.0, 93.3]}
    records = [
        make(m, seed, v, order=k, teacher=None if m in ("plain", "ce") else "big", baseline="kd")
        for k, (m, several) in enumerate(values.items())
        for seed, v in enumerate(several)
    ]
    for seed in range(3):
        random.Random(seed).shuffle(records)
        table = build(records)
        assert [row.label for row in table.rows] == ["PLAIN", "CE", "KD", "AB"]
        assert table.baseline == "KD"
    firsts = [entry[0].text for entry in layout(table)[0].rows]
    assert firsts == ["teacher big", "PLAIN", "CE", "KD", "AB"]
    assert [row["label"] for row in csv.DictReader(io.StringIO(table_csv(table)))] == firsts[1:]
    for text in (markdown(table), latex(table), html(table, records)):
        places = [re.search(rf"(?m)(^\| |^|>){label}( \||<| &)", text) for label in firsts]
        assert all(places) and [p.start() for p in places] == sorted(p.start() for p in places)  # type: ignore[union-attr]


def test_without_an_order_the_baseline_is_first_and_the_others_by_name() -> None:
    records = [make(m, 0, 90.0, order=None, baseline="kd") for m in ("zz", "ab", "kd")]
    assert [row.label for row in build(records).rows] == ["KD", "AB", "ZZ"]


def test_the_baseline_is_the_asked_one_else_the_recipes_else_the_first() -> None:
    records = comparison(VALUES, baseline="kd")
    assert build(records).baseline == "KD"
    assert build(records, baseline="ab").baseline == "AB"
    assert build(records, baseline="AB").baseline == "AB"
    assert build([make("kd", 0), make("ab", 0, label="kd", order=1)], baseline="kd").baseline == "kd"
    assert build(comparison({"kd": [1.0], "ab": [2.0]}, baseline=None)).baseline == "KD"
    with pytest.raises(UserError, match="'abb' is not among the methods") as error:
        build(records, baseline="abb")
    assert "'ab'" in (error.value.hint or "")
    absent = build(comparison({"kd": [1.0], "ab": [2.0]}, baseline="ce"))
    assert absent.baseline == "KD"
    assert "baseline ce has no finished cell: differences are to KD" in notes(absent)


def test_a_compared_parameter_makes_rows_and_one_label_of_two_methods_is_told_apart() -> None:
    records = [
        make("kd", seed, 90 + t, label=f"KD, temperature {t}", axes={"method": "kd", "method.temperature": t})
        for t in (2, 4)
        for seed in (0, 1)
    ] + [make("ce", s, 89, axes={"method": "ce"}) for s in (0, 1)]
    table = build(records)
    assert {row.label for row in table.rows} == {"CE", "KD, temperature 2", "KD, temperature 4"}
    assert len(table.columns) == 1
    # A path without a short name is not part of the label.
    records = [
        make("kd", 0, 90, label="KD", axes={"method": "kd", "method.stages.a.share": share}, spec__x=share)
        for share in (0.1, 0.25)
    ]
    assert {row.label for row in build(records).rows} == {"KD (stages.a.share 0.1)", "KD (stages.a.share 0.25)"}
    table = build([make("fitnets", 0, 90, label="F"), make("hint", 0, 91, label="F")])
    assert {row.label for row in table.rows} == {"F (fitnets)", "F (hint)"}


def test_other_axes_make_columns() -> None:
    table = build(grid_of(["wrn_16_2", "wrn_16_1"], [0.5, 0.1], ce=[80, 80.5], kd=[81, 81.6]))
    assert table.axes == ("student", "data.fraction")
    assert [column.label for column in table.columns] == [
        "wrn_16_2, fraction 0.1",
        "wrn_16_2, fraction 0.5",
        "wrn_16_1, fraction 0.1",
        "wrn_16_1, fraction 0.5",
    ]
    # The order of values: numbers by size, names by the recipe's order.
    assert [round(cell(table, "KD", i).mean, 2) for i in range(4)] == [82.3, 81.3, 84.3, 83.3]
    assert all(cell(table, "KD", i).best for i in range(4))
    assert "Holm's correction for the 4 comparisons" in notes(table)
    frame = to_frame(table)
    assert list(frame["student"].unique()) == ["wrn_16_2", "wrn_16_1"]
    assert frame.loc[
        (frame.label == "KD") & (frame["data.fraction"] == "0.1") & (frame.student == "wrn_16_1"), "mean"
    ].item() == pytest.approx(84.3)


def test_columns_of_two_axes_are_listed_with_something_else_than_their_own_commas() -> None:
    said = notes(build(grid_of(["wrn_16_2", "wrn_16_1"], [0.5, 0.1], ce=[80, 80.5])))
    assert "(wrn_16_2, fraction 0.1; wrn_16_1, fraction 0.1)" in said


def test_a_cell_to_which_an_axis_means_nothing_stands_in_every_column_and_is_one_test() -> None:
    records = [make("ce", s, 90 + s / 7, teacher=None, axes={"method": "ce"}) for s in range(3)]
    records += [make("none", s, 90.5 + s / 5, teacher=None, axes={"method": "none"}, order=1) for s in range(3)]
    records += [
        make("kd", s, 91 + s / 5, teacher=t, axes={"method": "kd", "teacher": t}, order=2)
        for t in ("big", "huge")
        for s in range(3)
    ]
    table = build(records)
    assert [column.label for column in table.columns] == ["big", "huge"]
    assert cell(table, "CE", 0).values == cell(table, "CE", 1).values
    assert [(t.name, t.accuracies) for t in table.teachers] == [("big", (95.5, None)), ("huge", (None, 95.5))]
    assert "Does not depend on teacher: the same numbers in all these columns" in notes(table)
    assert "Holm's correction for the 3 comparisons" in notes(table)
    # CE against the KD of each teacher is another test in each column; NONE's differences have no spread.
    assert "Holm's correction for the 2 comparisons" in notes(build(records, "kd"))


def test_different_students_of_two_recipes_are_never_pooled() -> None:
    records = comparison(VALUES) + comparison(VALUES, student="wrn_40_1", recipe="other")
    table = build(records)
    assert table.axes == ("student",)
    assert cell(table, "KD", 0).n == cell(table, "KD", 1).n == 3
    budgets = build(comparison(VALUES) + comparison(VALUES, epochs=20.0, recipe="other"))
    assert [column.label for column in budgets.columns] == ["epochs 20", "epochs 200"]
    close = build(comparison(VALUES, epochs=20.25, recipe="one") + comparison(VALUES, epochs=20.0, recipe="other"))
    assert [column.label for column in close.columns] == ["epochs 20", "epochs 20.25"]
    protocols = build(comparison(VALUES) + comparison(VALUES, protocol="crd", recipe="other"))
    assert protocols.axes == ("protocol",)
    assert "Protocol: crd, 200 epochs (crd); ab_official, 200 epochs (ab_official)." in notes(protocols)


def test_two_values_for_one_seed_are_refused() -> None:
    spec: dict[str, Any] = {"protocol": {"batch_size": 128}}
    a = make("kd", 0, 90.0, spec=spec, identity="a")
    b = make("kd", 0, 91.0, spec={"protocol": {"batch_size": 64}}, identity="b")
    with pytest.raises(UserError, match=r"'KD', seed 0.*protocol.batch_size \(128 and 64\)"):
        build([a, b])
    with pytest.raises(UserError, match=r"'KD', seeds 0 and 1.*protocol.batch_size"):
        build([a, make("kd", 1, 91.0, spec={"protocol": {"batch_size": 64}}, identity="c")])
    with pytest.raises(UserError, match="'KD', seed 0, would share one place"):
        build([a, make("kd", 0, 91.0, spec=spec, identity="b")])
    assert build([a, make("kd", 1, 91.0, spec=spec, identity="d")]).rows[0].cells[0] is not None


def test_a_copy_of_a_cell_counts_once_and_is_told() -> None:
    records = comparison(VALUES)
    table = build([*records, *records[:2]])
    assert cell(table, "CE").n == 3
    assert "2 cells are twice among the records: one is used" in notes(table)
    other = make("ce", 0, 12.0, order=0, teacher=None)
    assert other.identity == records[0].identity
    assert "1 cell is twice among the records; 1 of them with other results: one is used" in notes(
        build([*records, other])
    )


def test_fewer_seeds_missing_cells_and_unfinished_cells_are_marked() -> None:
    records = comparison({"ce": [93.0, 93.2, 93.1], "kd": [94.0, 94.3], "ab": [95.0, 95.1, 95.3]})
    table = build([*records, make("kd", 2, 1.0, status="failed", order=1)], unfinished=["runs/x/kd-seed2"])
    kd = cell(table, "KD")
    assert kd.n == 2 and len(kd.marks) == 1
    marked = next(note for note in table.notes if note.mark == kd.marks[0])
    assert marked.text == "2 of 3 seeds: no finished cell for seed 2."
    assert cell(table, "AB").marks == ()
    # Seeds that the baseline lacks are lacking too.
    assert "2 of 3 seeds: no finished cell for seed 2." in notes(build(records, baseline="kd"))
    assert "Not finished and not in the table: kd-seed2; KD, seed 2" in notes(table)
    row = next(line for line in markdown(table).splitlines() if line.startswith("| KD"))
    assert f"<sup>{kd.marks[0]}</sup>" in row
    several = build(
        [
            record
            for record in grid_of(["a", "b"], [1.0], ce=[80, 81], kd=[81, 82])
            if not (record.cell.method == "kd" and record.cell.student == "b")
        ]
    )
    assert several.rows[1].cells[1] is None
    assert "–: no finished cell: KD (b)" in notes(several)


def tried(name: str, *values: Any) -> dict[str, Any]:
    """How a setting was chosen; None: the recipe's own."""
    trials = [
        {"setting": {} if value is None else {f"method.{name}": value}, "cells": ["x"], "accuracies": [50.0]}
        for value in values
    ]
    return {"seeds": [100], "validation": 0.2, "trials": trials}


def test_a_table_says_which_settings_were_tried() -> None:
    def said(**tunings: dict[str, Any]) -> str:
        records = [make(name, label=name, cell__tuning=one, order=k) for k, (name, one) in enumerate(tunings.items())]
        (note,) = (one.text for one in build(records).notes if one.text.startswith("Settings tried: "))
        return note.removeprefix("Settings tried: ")

    few, many = tried("temperature", 8.0, 2.0, 4.0), tried("weight", None, 3.0, 0.1, 31.6, 10.0, 1.0)
    assert said(kd=few) == "temperature 2, 4 or 8."
    assert said(kd=few, ab=many) == "temperature 2, 4 or 8 (kd); weight 0.1 to 31.6, or unchanged (ab)."
    assert said(kd=few, at=few, ab=tried("mode", "a", "b")) == "temperature 2, 4 or 8 (kd, at); mode a or b (ab)."
    # A space that many methods share is said once, and of many spaces the first.
    assert said(**{f"m{k}": many for k in range(76)}) == "weight 0.1 to 31.6, or unchanged."
    long = said(**{f"m{k:02}": tried(f"x{k}", *range(1, 9)) for k in range(76)})
    assert long.endswith("; x5 1 to 8 (m05); 70 more in table.html.") and len(long) < 200


def test_parts_of_a_wide_grid_repeat_the_first_column_and_leave_out_rows_that_say_nothing() -> None:
    def row(name: str, columns: int) -> tuple[Text, ...]:
        return tuple(map(Text, [name, *map(str, range(1, columns + 1)), *[""] * (8 - columns)]))

    rows = (row("KD", 8), row("AB", 6), row("copied", 0), row("AT", 8))
    grid = Grid("Accuracy", ("method", *"abcdefgh"), rows, rules=frozenset({2}), headings=frozenset({2}))
    first, second = for_page([grid], "page")
    assert first == Grid("Accuracy", ("method", *"abcdef"), tuple(r[:7] for r in rows), frozenset({2}), frozenset({2}))
    assert second.caption == "Accuracy (continued)" and second.header == ("method", *"gh")
    assert [[text.text for text in r] for r in second.rows] == [["KD", "7", "8"], ["copied", "", ""], ["AT", "7", "8"]]
    assert second.rules == second.headings == {1}
    # In one of two columns there is room for half as many numbers, and of 41 rows the last stands alone.
    assert [len(part.header) - 1 for part in for_page([grid], "column")] == [3, 3, 2]
    long = replace(grid, header=("method", "a"), rows=(row("KD", 1)[:2],) * 41, rules=frozenset({39, 40}))
    parts = [*for_page([replace(long, headings=frozenset({39}))], "wide")]
    assert [(len(part.rows), {*part.rules}, {*part.headings}) for part in parts] == [
        (40, {39}, {39}),
        (1, set(), set()),
    ]


def test_notes_beyond_z_have_two_letters() -> None:
    table = build([make(f"m{k}", 0, 90.0, order=k, extra_epochs=1.0 + k) for k in range(28)])
    assert [cell(table, f"M{k}").marks for k in (0, 25, 26, 27)] == [("a",), ("z",), ("aa",), ("ab",)]


def test_partly_common_seeds_are_told() -> None:
    records = comparison({"ce": [93.0, 93.2, 93.1]}) + [make("kd", seed, 94 + seed / 10, order=1) for seed in (1, 2, 3)]
    kd = cell(build(records), "KD")
    assert kd.difference is not None and kd.difference.n == 2
    assert "The difference is over the 2 seeds that CE has too" in notes(build(records))
    assert "n = 3 of 4 seeds (0, 1, 2, 3)" in notes(build(records))
    several = grid_of(["a", "b"], [1.0], ce=[93.0, 93.2], kd=[94.0, 94.3, 94.1])
    (differences,) = (grid for grid in layout(build(several)) if grid.caption == "Differences to CE")
    assert [tuple(text.text for text in row[:2]) for row in differences.rows] == [
        ("a", ""), ("KD", "2"), ("b", ""), ("KD", "2")
    ]  # fmt: skip


def test_seeds_needed_are_for_the_level_at_which_the_table_tests() -> None:
    draws = random.Random(0)
    for methods in (1, 4, 12):
        values = {"ce": [draws.gauss(90, 0.3) for _ in range(3)]}
        values |= {f"m{k}": [draws.gauss(90.2 + k / 5, 0.3) for _ in range(3)] for k in range(methods)}
        table = build(comparison(values))
        found = [d for row in table.rows for c in row.cells if c is not None and (d := c.difference) is not None]
        for difference in found:
            assert difference.p_holm is not None and difference.seeds_needed is not None
            # Whoever has the seeds that are needed has found the difference.
            assert difference.p_holm <= 0.05 or difference.seeds_needed > difference.n
        level = "5 %" if methods == 1 else f"5 % / {methods} (Holm's first step)"
        assert f"the difference would be found at a level of {level} with 80 % power" in notes(table)
    # Mean 0.4, deviation 0.1; a second test asks for one seed more.
    one = build(comparison({key: VALUES[key] for key in ("ce", "kd")}))
    alone, beside = (cell(table, "KD").difference for table in (one, build(comparison(VALUES))))
    assert alone is not None and beside is not None
    assert alone.seeds_needed == statistics.seeds_needed(0.4, 0.1)
    assert beside.seeds_needed == statistics.seeds_needed(0.4, 0.1, alpha=0.025)
    assert beside.seeds_needed > alone.seeds_needed  # type: ignore[operator]


def test_seeds_needed_are_not_told_from_two_seeds() -> None:
    two = build(comparison({"ce": [80.0, 80.2, 80.1], "kd": [84.0, 84.5], "ab": [84.0, 84.3, 84.1]}))
    rows = {row[0].text: [entry.text for entry in row] for row in layout(two)[0].rows}
    assert rows["KD"][2] == "2" and rows["KD"][-1] == "–" and float(rows["KD"][-2]) < 1 and rows["AB"][-1].isdigit()
    assert "deviation are as measured; not told below 3 seeds" in notes(two)
    assert "not told below" not in notes(build(comparison(VALUES)))


def test_numbers_that_are_asked_for_stand_beside_the_accuracies() -> None:
    records = [make("ce", seed, 90.0, teacher=None, result__calibration_error=5.0 + seed) for seed in range(2)]
    over = {"result__calibration_error": 3.0, "result__fidelity": 97.5, "agreement": {"layer1.preact": 0.75}}
    records += [make("kd", seed, 91.0, order=1, **over) for seed in range(2)]
    assert not build(records).also
    table = build(records, columns=["fidelity", "calibration_error", "agreement"])
    assert table.also == ("calibration_error", "fidelity", "agreement.layer1.preact")
    shown = markdown(table)
    assert "| method | calibration error | same answer as the teacher | agreement.layer1.preact |" in shown
    assert "| CE | 5.50 ± 0.71 | – | – |" in shown and "| KD | 3.00 ± 0.00 | 97.50 ± 0.00 | 0.75 ± 0.00 |" in shown
    with pytest.raises(UserError, match="(?s)no record has the number 'fidelty'.*did you mean 'fidelity'"):
        build(records, columns=["fidelty"])
    with pytest.raises(UserError, match="'agree'"):
        build(records, columns=["agree"])
    with pytest.raises(UserError, match="records of earlier versions"):
        build(comparison(VALUES), columns=["top5"])


def test_agreement_is_said_beside_what_a_student_has_that_ignores_its_input() -> None:
    agreement = {"layer1.preact": 0.96, "layer2.preact": 0.7}
    said = notes(build(comparison(VALUES, agreement=agreement)))
    assert "The agreement of a student that ignores its input was not recorded." in said
    records = [
        make("ab", seed, agreement=agreement, result__references={"agreement": {"layer1.preact": 0.951 + 0.007 * seed}})
        for seed in (0, 1)
    ]
    said = notes(build(records))
    assert "Agreement is the share of equal activation signs of student (through its connector) and teacher" in said
    assert "A student that ignores its input can reach 95.1 % to 95.8 % at layer1.preact." in said
    rows = csv.DictReader(io.StringIO(records_csv(records)))
    assert [row["agreement_reference.layer1.preact"] for row in rows] == ["0.951", "0.958"]


def test_a_metric_without_a_value_is_absent_and_told(tmp_path: Path) -> None:
    values = {"own": [{"layer1": 0.5, "layer2": None}, {"layer1": None, "layer2": None}], "other": [{"layer1": None}]}
    for m, several in values.items():
        for s, held in enumerate(several):
            lines = [{"step": n, "epoch": n, "test": {"accuracy": 90.0}, "metrics": {"distance": held}} for n in (1, 2)]
            more = {"result__metrics": {"distance": held}, "result__references": {"distance": {"layer1": None}}}
            write(tmp_path / f"{m}-{s}", plain_record(m, s, 90.0, order=len(m), **more), lines)
    records = read_records([tmp_path])
    assert "distance.layer1" in records_csv(records)
    table = build(records)
    assert "| OWN | 0.5 | – |" in markdown(table) and "| OTHER | – | – |" in markdown(table)
    assert "Distance could not be measured at each hook point in 3 cells." in notes(table)
    of = {row["method"]: row for row in csv.DictReader(io.StringIO(table_csv(table)))}
    assert (of["own"]["distance.layer1"], of["own"]["distance.layer2"]) == ("0.5", "")
    assert metric_curves(records, tmp_path) == [tmp_path / "distance.png"] and "distance" in html(table, records)
    without = [record for record in records if record.cell.method == "other"]
    assert not metric_curves(without, tmp_path) and "| OTHER | – |" in markdown(build(without))
    assert html(build(without), without)
    assert not [one for one in problems(records[0], metrics(records[0].folder or "")) if "result.metrics" in one]


def test_any_metric_that_a_record_holds_is_in_every_form_of_the_table(tmp_path: Path) -> None:
    held = {"map_distance": {"layer1": 3.25, "layer2": 0.5}}
    values = {"ce": [90.0, 91.0], "own": [92.0, 94.0]}
    for m, several in values.items():
        for s, v in enumerate(several):
            line = {"step": 1, "epoch": 1.0, "test": {"accuracy": v}, "metrics": held if m == "own" else {}}
            more = {"result__metrics": held} if m == "own" else {}
            write(tmp_path / f"{m}-{s}", plain_record(m, s, v, order=len(m), agreement={}, **more), [line])
    records = read_records([tmp_path])
    table = build(records)
    text = markdown(table)
    assert "Map distance and cost:" in text
    assert "| method | map distance layer1 | map distance layer2 | training seconds |" in text
    assert "| OWN | 3.25 | 0.5 |" in text
    assert "Map distance is a metric of its loss, after the last step." in notes(table)
    of_own = next(row for row in csv.DictReader(io.StringIO(table_csv(table))) if row["method"] == "own")
    assert (of_own["map_distance.layer1"], of_own["map_distance.layer2"]) == ("3.25", "0.5")
    assert "Map distance and cost." in latex(table)
    page = html(table, records)
    assert ">Map distance</h2>" in page and ">map distance ± 1 deviation</text>" in page
    (drawn,) = metric_curves(records, tmp_path)
    assert drawn == tmp_path / "map_distance.png" and drawn.is_file()


def trained(rate: float, schedule: dict[str, Any]) -> dict[str, Any]:
    stage = {"optimizer": {"name": "sgd", "options": {"lr": rate, "momentum": 0.9, "nesterov": False}}}
    stage["schedule"] = schedule
    protocol = {"batch_size": 64, "augmentation": {"padding": 4, "mode": "reflect", "flip": True}}
    return {"spec__protocol": protocol, "spec__method": {"name": "x", "stages": {"whole": stage}}}


def test_a_table_says_how_its_rows_were_trained() -> None:
    drops = {"name": "multistep", "options": {"at": ["30%", "60%"], "gamma": 0.2}}
    common = (
        "batches of 64, SGD with momentum 0.9, learning rate 0.1, rate {}, augmentation: crop after reflect padding 4"
    )
    alike = [make(method, seed, **trained(0.1, drops)) for method in ("ce", "kd") for seed in (0, 1)]
    # What is said is of the stage that has the protocol's epochs, not of those before, of a part, and on top.
    other = {"optimizer": {"name": "adam"}}
    for record in alike:
        whole = record.spec["method"]["stages"]["whole"]
        parts = {key: other | {key: 0.5} for key in ("share", "extra_epochs", "extra_share")}
        record.spec["method"]["stages"] = {"a": other, "whole": whole, **parts}
    assert f"Training: {common.format('× 0.2 at 30/60 %')} and flip." in [note.text for note in build(alike).notes]
    constant = [make("x", seed, **trained(0.1, {"name": "constant"})) for seed in (0, 1)]
    (said,) = (note for note in build([*alike, *constant]).notes if note.text.startswith("Training of X: "))
    assert f"{common.format('constant')} and flip." in said.text and not said.warning
    crd = trained(0.05, {"name": "multistep", "options": {"at": ["62.5%"]}})
    crd["spec__method"]["stages"]["whole"]["optimizer"]["options"]["nesterov"] = True
    crd["spec__protocol"]["augmentation"]["mode"] = "zero"
    (said,) = (note for note in build([make("x", 0, **crd)]).notes if note.text.startswith("Training: "))
    assert "SGD with Nesterov momentum 0.9, learning rate 0.05, rate × 0.1 at 62.5 %," in said.text
    assert "augmentation: crop after padding 4 and flip." in said.text


def test_a_table_says_what_few_rows_were_trained_with() -> None:
    given = trained(0.1, {"name": "cosine", "options": {"warmup": "5%"}})
    given["spec__protocol"] |= {"ema": 0.99}
    given["spec__protocol"]["augmentation"] |= {"mix": {"mixup": 0.2, "cutmix": None}}
    given["spec__method"]["stages"]["whole"] |= {
        "clip": 5.0,
        "losses": {"ce": {"loss": {"options": {"label_smoothing": 0.1}}}, "kd": {"loss": {"options": {"alpha": 1.0}}}},
    }
    (said,) = (note.text for note in build([make("ce", **given)]).notes if note.text.startswith("Training: "))
    assert "rate cosine (warmup 5%), augmentation: crop" in said and "and Mixup 0.2, label smoothing 0.1" in said
    assert said.endswith("gradients clipped at 5, tested with a moving average of the weights (0.99).")


def made(gives: str, steps: int = 200) -> dict[str, Any]:
    """Entries of a cell whose only stage has a batch source."""
    stage = {"source": {"name": "synthesized", "gives": [gives]}}
    return {
        "spec__method": {"name": "x", "stages": {"classification": stage}},
        "seeds__streams": ["init", "connectors", "order", "augmentation", "dropout", "synthesized/order"],
    }


COPIED = {"spec__method": {"name": "x", "starts_from": "teacher", "stages": {"classification": {}}}}


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({}, "Runs of one seed have the same data order, augmentation and initial student."),
        (made("boundary"), "Runs of one seed have the same data order, augmentation and initial student."),
        (made("data"), "the same initial student and the same data order and augmentation (not 'X')."),
        (COPIED, "the same data order and augmentation and the same initial student (not 'X')."),
        (
            {"spec__protocol": {"batch_size": 64}},
            "the same initial student and the same data order and augmentation (not 'X').",
        ),
        (
            {"spec__protocol": {"augmentation": {"flip": True}}},
            "the same data order and initial student and the same augmentation (not 'X').",
        ),
        (
            {"spec__student": {"weights": "own.pt"}},
            "the same data order and augmentation and the same initial student (not 'X').",
        ),
        ({"seeds": {}}, "the same data order, augmentation and initial student (not 'X')."),
        *(
            (over, "the same initial student and the same data order and augmentation (not 'X').")
            for over in (
                {"spec__protocol": {"last_batch": "drop"}},
                {"seeds__split": 9},
                {"target": {"name": "svhn", "fingerprint": "ee" * 32, "train": 1, "test": 1, "classes": 10}},
            )
        ),
    ],
)
def test_the_note_on_pairing_says_what_the_cells_of_a_seed_share(over: dict[str, Any], says: str) -> None:
    records = comparison(VALUES) + [make("x", seed, 94 + seed / 7, order=3, **over) for seed in range(3)]
    assert says in notes(build(records))


def test_cells_that_replace_data_alike_are_paired_and_those_that_share_nothing_are_told() -> None:
    both = {**made("data"), "spec__method": {**made("data")["spec__method"], "starts_from": "teacher"}}
    records = [make(m, s, 90 + k + s / 7, order=k, **both) for k, m in enumerate(("a", "b")) for s in (0, 1)]
    assert "have the same data order, augmentation and initial student." in notes(build(records, baseline="a"))
    other = [make("c", s, 88 + s / 5, order=3, **both, teacher__sha256="ee" * 32) for s in (0, 1)]
    assert "the same data order and augmentation and the same initial student (not 'C')." in notes(
        build([*records, *other], baseline="a")
    )
    records += [make("ce", s, 89 + s / 5, teacher=None, order=2) for s in (0, 1)]
    said = notes(build(records, baseline="a"))
    assert "the same data order, augmentation and initial student (not 'CE')." in said
    said = notes(build(records, baseline="ce"))
    assert "have only its number in common" in said
    # Records that do not say have nothing in common, also where both are silent.
    silent = [make(m, s, 90 + k + s / 7, order=k, seeds={}) for k, m in enumerate(("a", "b")) for s in (0, 1)]
    assert "have only its number in common" in notes(build(silent, baseline="a"))


def test_batches_that_are_replaced_from_another_step_on_are_others() -> None:
    stages = {"first": {}, **made("data")["spec__method"]["stages"]}
    records = [
        make(
            method,
            seed,
            90 + first + seed / 7,
            order=first,
            seeds__streams=made("data")["seeds__streams"],
            spec__method={"name": method, "stages": stages},
            budget__stages=[{"name": "first", "steps": first}, {"name": "classification", "steps": 9}],
        )
        for method, first in (("a", 1), ("b", 2))
        for seed in (0, 1)
    ]
    said = notes(build(records, baseline="a"))
    assert "have the same initial student." in said


def test_equal_differences_have_no_test() -> None:
    table = build(comparison({"ce": [93.0, 93.5], "kd": [94.0, 94.5]}))
    assert "Equal differences for all seeds" in notes(table)
    assert cell(table, "KD").difference is not None and cell(table, "KD").difference.p is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("compute__precision", "bfloat16", "Precision: float32 (CE); bfloat16 (KD)"),
        ("compute__device_name", "Other CPU", "Machine: Model 7 Processor, 1 thread (CE); Other CPU, 1 thread (KD)"),
        ("compute__threads", 4, "4 threads (KD)"),
        ("data__fingerprint", "ee" * 32, "fingerprint eeeeeeeeeeee (KD)"),
        ("kdbench", "0.2.0", "0.2.0, commit 0123456789ab, torch 2.11.0 (KD)"),
        ("compute__torch", "2.12.0", "torch 2.12.0 (KD)"),
        ("git__dirty", True, "with uncommitted changes"),
    ],
)
def test_mixed_values_are_said_with_the_rows_that_have_them(path: str, value: Any, says: str) -> None:
    records = [make("ce", s, 90 + s) for s in (0, 1)]
    records += [make("kd", s, 91 + s, order=1, **{path: value}) for s in (0, 1)]
    warned = [note.text for note in build(records).notes if note.warning]
    assert len(warned) == 1 and says in warned[0]
    assert "this is mixed within the table" in warned[0]


def test_processors_of_one_name_with_other_instructions_are_said() -> None:
    def told(*capabilities: str) -> list[str]:
        records = [
            make(method, s, 90 + s, order=i, compute__cpu_capability=capability)
            for i, (method, capability) in enumerate(zip(("ce", "kd"), capabilities, strict=True))
            for s in (0, 1)
        ]
        return [note.text for note in build(records).notes if "instructions" in note.text]

    (said,) = told("AVX2", "AVX512")
    assert said.startswith("Processor instructions: AVX2 (CE); AVX512 (KD); this is mixed within the table")
    assert told("AVX2", "AVX2") == []


def test_two_protocols_that_are_compared_side_by_side_are_columns() -> None:
    records = [make("ce", 0, 90), make("kd", 0, 91, protocol="crd", order=1)]
    table = build(records)
    assert [column.label for column in table.columns] == ["ab_official", "crd"]
    assert table.rows[0].cells[1] is None and table.rows[1].cells[0] is None


def test_provenance_is_in_the_notes() -> None:
    said = notes(build(comparison(VALUES)))
    for part in (
        "n = 3 seeds (0, 1, 2)",
        "Protocol: ab_official, 200 epochs",
        "last epoch",
        "Precision: float32",
        "wrn_22_4_cifar10, 95.50 %, sha256 abababababab",
        "Model 7 Processor, 1 thread",
        "cifar10, 50,000 training, 10,000 test images, fingerprint cdcdcdcdcdcd",
        "kdbench 0.1.0, commit 0123456789ab",
    ):
        assert part in said
    assert not any(note.warning for note in build(comparison(VALUES)).notes)


def test_extra_budget_agreement_teacher_and_seconds_are_shown() -> None:
    records = comparison({"ce": [93.0, 93.2]}) + [
        make(
            "ab_crd",
            s,
            94.0 + s / 10,
            order=1,
            extra_epochs=30.0,
            agreement={"layer1.preact": 0.80 + s / 100, "layer2.preact": 0.70},
        )
        for s in (0, 1)
    ]
    table = build(records)
    ab = cell(table, "AB_CRD")
    assert (ab.budget.extra_epochs, ab.budget.epochs) == (30.0, 230.0)
    # Training took 120 and 121 seconds; earlier versions noted those with evaluations alone, 130.
    assert ab.seconds == 120.5
    assert "Training seconds are the mean of one seed, without evaluations; " in notes(table)
    older = build(comparison({"ce": [93.0]}, compute__training_seconds=None))
    assert cell(older, "CE").seconds == 130.0 and "without evaluations (but in earlier versions);" in notes(older)
    assert {name: found.mean for name, found in ab.numbers.items()} == {
        "agreement.layer1.preact": pytest.approx(0.805),
        "agreement.layer2.preact": pytest.approx(0.70),
    }
    assert ab.seconds == 120.5
    assert [(t.name, t.accuracies) for t in table.teachers] == [("wrn_22_4_cifar10", (95.5,))]
    assert "Trained 30 epochs beyond the protocol's budget" in notes(table)
    assert "mixed" not in notes(table)
    text = markdown(table)
    assert "| AB\\_CRD | +30 | 80.5 % | 70.0 % | 120 |" in text
    assert "| teacher wrn\\_22\\_4\\_cifar10 | 95.50 |" in text
    assert text.index("teacher wrn") < text.index("| CE")


def test_no_records_is_an_error() -> None:
    with pytest.raises(UserError, match="no records"):
        build([])
    with pytest.raises(UserError, match="no records"):
        build([make(status="failed")])


def test_files_are_the_same_bytes_from_the_same_records_in_any_order() -> None:
    records = grid_of(["wrn_16_2", "wrn_16_1"], [0.1, 1.0], ce=[80, 81, 80.3], kd=[81, 81.9, 82], ab=[82, 82.5, 83])
    expected = [render(build(records)) for render in (markdown, latex, table_csv)] + [records_csv(records)]
    for seed in range(4):
        random.Random(seed).shuffle(records)
        assert [render(build(records)) for render in (markdown, latex, table_csv)] + [records_csv(records)] == expected


def test_the_csv_file_has_full_precision_and_no_text_in_numbers() -> None:
    rows = list(csv.DictReader(io.StringIO(table_csv(build(comparison({"ce": [93.0, 93.1], "kd": [94.0, 94.2]}))))))
    assert [row["method"] for row in rows] == ["ce", "kd"]
    kd = rows[1]
    assert (kd["n"], kd["seeds"], kd["baseline"]) == ("2", "0 1", "False")
    assert float(kd["mean"]) == pytest.approx(94.1) and float(kd["deviation"]) == pytest.approx(0.141421)
    assert float(kd["difference"]) == pytest.approx(1.05)
    assert float(kd["p"]) == pytest.approx(float(kd["p_holm"]))
    assert rows[0]["difference"] == ""


def test_every_number_of_a_line_of_the_csv_file_is_what_its_column_says() -> None:
    """Two columns, in which everything differs; 70 seconds and 5000 images per second are a seed's more and less."""
    values: dict[str, dict[str, list[float]]] = {
        "wrn_16_2": {"ce": [93.01, 93.02, 93.06], "kd": [94.0, 94.3, 94.5], "ab": [93.5, 93.6, 93.9]},
        "wrn_16_1": {"ce": [90.0, 90.1, 90.3], "kd": [90.2, 90.6, 90.5], "ab": [90.9, 91.2, 91.4]},
    }
    records = [
        make(
            method, seed, value, order=k, student=student, recipe=student, teacher__name=f"of {student}",
            teacher__accuracy=95.5 - i, extra_epochs=30.0 * (method == "kd"), label=method.upper(),
            compute__training_seconds=60.0 + 10 * seed, compute__images_per_second=5000.0 - seed,
        )
        for i, (student, methods) in enumerate(values.items())
        for k, (method, several) in enumerate(methods.items())
        for seed, value in enumerate(several)
    ]  # fmt: skip
    rows = {(r["label"], r["student"]): r for r in csv.DictReader(io.StringIO(table_csv(build(records))))}
    found = rows["KD", "wrn_16_1"]
    # Differences 0.2, 0.5, 0.2: deviation √0.03, standard error 0.1, t = 3 with two degrees of freedom.
    expected = {
        "mean": 271.3 / 3, "deviation": (0.13 / 3) ** 0.5, "difference": 0.3, "difference_low": 0.3 - 0.430265,
        "difference_high": 0.3 + 0.430265, "difference_n": 3, "p": 1 - 3 / 11**0.5, "teacher_accuracy": 94.5,
        "epochs": 230.0, "extra_epochs": 30.0, "training_seconds": 70.0, "images_per_second": 4999.0,
        "average_rank": 1.5,
    }  # fmt: skip
    assert {name: float(found[name]) for name in expected} == pytest.approx(expected, abs=1e-6)
    assert (found["rank"], found["teacher"], rows["AB", "wrn_16_1"]["rank"]) == ("second", "of wrn_16_1", "best")
    other = rows["KD", "wrn_16_2"]
    assert (other["teacher"], other["teacher_accuracy"]) == ("of wrn_16_2", "95.5")
    tests = sorted((float(r["p"]), float(r["p_holm"])) for r in rows.values() if r["p"])
    assert [holm for _, holm in tests] == pytest.approx(statistics.holm([one for one, _ in tests]), abs=1e-8)
    assert len(tests) == 4


def test_the_long_csv_file_has_one_row_for_every_record() -> None:
    records = comparison(VALUES, agreement={"layer1.preact": 0.5})
    rows = list(csv.DictReader(io.StringIO(records_csv(records))))
    assert len(rows) == 9
    assert [(row["method"], row["seed"], float(row["last"])) for row in rows[3:6]] == [
        ("kd", "0", 94.0),
        ("kd", "1", 94.1),
        ("kd", "2", 93.9),
    ]
    assert rows[0]["teacher"] == "" and rows[8]["teacher_sha256"] == "ab" * 32
    assert rows[0]["agreement.layer1.preact"] == "0.5" and rows[3]["axis.method"] == "kd"
    assert rows[0]["identity"] == records[0].identity
    apart = make("kd", data__validation=500, result__validation={"last": 88.1, "best": 88.9, "best_step": 5})
    (row,) = csv.DictReader(io.StringIO(records_csv([apart])))
    expected = {
        "last": 90.0, "best": 90.2, "best_step": 77000, "validation_last": 88.1, "validation_best": 88.9,
        "train_images": 50000, "validation_images": 500, "test_images": 10000, "teacher_accuracy": 95.5,
        "parameters": 691674, "flops": 2e8, "seconds": 130.0, "training_seconds": 120.0, "images_per_second": 5100.0,
    }  # fmt: skip
    assert {name: float(row[name]) for name in expected} == expected


def test_the_data_frame_has_the_rows_and_the_notes() -> None:
    frame = to_frame(build(comparison(VALUES)))
    assert list(frame["label"]) == ["CE", "KD", "AB"]
    assert list(frame["mean"].round(2)) == [93.6, 94.0, 94.5]
    assert any("Holm" in note for note in frame.attrs["notes"])


def test_markdown_is_well_formed_with_special_characters() -> None:
    records = comparison(VALUES)
    records = [
        make("kd", r.cell.seed, r.accuracy("last"), label=SPECIAL, order=1) if r.cell.method == "kd" else r
        for r in records
    ]
    text = markdown(build(records, title="a|b"))
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert text.startswith("**a\\|b**\n") and text.endswith("\n") and not text.endswith("\n\n")


def test_latex_has_bold_best_and_underlined_second() -> None:
    text = latex(build(comparison(VALUES), title=SPECIAL))
    lines = text.splitlines()
    assert next(line for line in lines if line.startswith("AB &")).split(" & ")[1] == (
        r"\textbf{\boldmath 94.50 $\pm$ 0.17}"
    )
    assert next(line for line in lines if line.startswith("KD &")).split(" & ")[1] == r"\underline{94.00 $\pm$ 0.10}"
    for need in ("\\toprule", "\\midrule", "\\bottomrule", "\\caption{", "\\label{tab:"):
        assert need in text


def test_markdown_takes_no_label_for_a_formula_an_entity_or_what_is_struck_out() -> None:
    assert markdown_escaped("$x_1$ of ~y~ &lt; z & w") == r"\$x\_1\$ of \~y\~ \&lt; z & w"


def test_escaping() -> None:
    assert escape(r"50% of a_b & c#1 {x} \y ~z^2 $") == (
        r"50\% of a\_b \& c\#1 \{x\} \textbackslash{}y \textasciitilde{}z\textasciicircum{}2 \$"
    )
    assert escape("é") == escape("e\u0301") == "é"
    assert escape("β ≥ Ω") == r"$\beta$ $\geq$ $\Omega$"
    assert escape("中") == "[U+4E2D]"
    assert escape("a\x00b\u200bc") == "abc"


def compiled(folder: Path, body: str, options: str = "") -> str:
    """Compile an article with the packages that the file names; its text. A complaint about width or height fails."""
    if shutil.which("pdflatex") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("pdflatex is not installed, and CI must not skip this")
        pytest.skip("pdflatex is not installed")
    assert PACKAGES in body.partition("\n")[0]
    head = f"\\documentclass[{options}]{{article}}{PACKAGES}"
    source = f"{head}\\begin{{document}}\n{body}\\end{{document}}\n"
    (folder / "t.tex").write_text(source, encoding="utf-8")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"],
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert not re.search(r"Overfull|Float too large|Missing character", done.stdout), done.stdout[-2000:]
    if shutil.which("pdftotext") is None:
        return ""
    return subprocess.run(
        ["pdftotext", "-layout", "t.pdf", "-"], cwd=folder, capture_output=True, text=True, check=True
    ).stdout


# Whoever wants the notes in the paper writes this behind the table.
NOTES = "\\kdbenchnotes\n"
PAPER = {"Mine": 94.0, "Yours": 95.0}


def test_latex_prints_what_a_reader_needs_and_keeps_the_other_notes_ready(tmp_path: Path) -> None:
    records = comparison({"ce": VALUES["ce"], "kd": VALUES["kd"][:2]}, extra_epochs=30.0)
    table = build(records, title="Mine", unfinished=["gone-seed0"])
    source = latex(table)
    assert (
        r"\caption{Mine. Accuracy, last epoch. $\pm$ is the sample standard deviation, n = 2 to 3 seeds, 200 epochs.}"
        in source
    )
    once = latex(build(comparison({"ce": [93.0]}), title="Mine"))
    assert (
        r"\caption{Mine. Accuracy, last epoch. One seed, 200 epochs.}" in once
        and "Notes on" not in once.partition(r"\providecommand")[0]
    )
    two = latex(build(grid_of(["a"], [0.1, 1.0], ce=[80, 81], kd=[81, 82]), title="Mine"))
    assert two.count("sample standard deviation, n = 2") == 1
    # Of what is not asked for there are warnings, and the letters in the table.
    said = [" ".join(compiled(tmp_path, text).split()) for text in (source, source + NOTES)]
    if all(said):
        assert all("no finished cell for seed 2" in text and "gone-seed0" in text for text in said)
        assert ["Numbers are test accuracies" in text for text in said] == [False, True]
        assert [text.count("Machine: Model 7 Processor") for text in said] == [0, 1]


def test_latex_notes_of_several_tables_stand_in_one_place_and_once_each(tmp_path: Path) -> None:
    first, second = (latex(build(comparison({"ce": [93.0, value]}), title=title)) for title, value in PAPER.items())
    together, apart = (
        compiled(tmp_path, body)
        for body in (first + second + NOTES, f"{first}{NOTES}{{{second}}}{NOTES}\\clearpage APPENDIX {NOTES}")
    )
    for text in filter(None, (together, apart)):
        assert text.count("Numbers are test accuracies") == len(PAPER), text
    assert "Notes on" not in apart.partition("APPENDIX")[2]


def test_latex_compiles_with_every_special_character(tmp_path: Path) -> None:
    records = [
        make(
            m,
            s,
            v,
            label=SPECIAL if m == "kd" else f"[{m}]",
            order=i,
            extra_epochs=30.0 * (m == "ab"),
            agreement={f"layer{k}.preact": 0.5 for k in (1, 2, 3)} if m == "ab" else {},
        )
        for i, (m, several) in enumerate(VALUES.items())
        for s, v in enumerate(several)
    ]
    text = compiled(tmp_path, latex(build(records, title=SPECIAL)) + NOTES)
    if text:
        for shown in ("94.50 ± 0.17", "#$%&", "{}", "[ce]", "[U+4E2D]", "+0.40", "layer1"):
            assert shown in text, text


def test_latex_of_columns_with_one_seed_is_no_wider(tmp_path: Path) -> None:
    """Means and deviations take the room, wherever they stand."""
    records = [
        make(method, seed, 91.25 + seed / 3 + k, axes={"method": method, "epochs": epochs}, order=k)
        for k, method in enumerate(("ce", "kd", "ab"))
        for epochs in (1, 5, 10, 20, 50, 100)
        for seed in range(1 if epochs == 100 else 3)
    ]
    compiled(tmp_path, latex(build(records)) + NOTES)


def test_latex_of_copied_numbers_and_of_several_pairs_compiles(tmp_path: Path) -> None:
    registry = Registry()
    records = [
        record
        for i, (student, teacher) in enumerate(
            (("wrn_16_2", "wrn_40_2"), ("crd_resnet20", "crd_resnet56"), ("vgg8", "vgg13"))
        )
        for record in comparison(
            {m: [v + i for v in several] for m, several in VALUES.items()},
            student=student,
            data="cifar100",
            recipe=f"recipe {i}",
            spec__teacher={"name": teacher, "model": {"name": teacher}},
            spec__protocol={"batch_size": 64},
        )
    ]
    cards = {key: registry.card("published", key) for key in ("crd_cifar100", "norm_cifar100")}
    one = build(records[:9], published={"crd_cifar100": cards["crd_cifar100"]})
    assert len(one.columns) == 1
    text = compiled(tmp_path, latex(build(records, published=cards)) + NOTES + latex(one) + NOTES)
    if text:
        # The text of a PDF lacks the dagger and the underscore, which are drawn.
        for shown in ("74.92", "70.66", "copied", "critical distance", "Across the", "30 epochs on top"):
            assert shown in " ".join(text.split()), text


def test_latex_of_notes_longer_than_a_page_fits_its_pages(tmp_path: Path) -> None:
    failed = [f"a rather long name of a cell that did not finish, number {k}" for k in range(6)]
    names = [f"m{k}" for k in range(80)]
    records = comparison({name: [90.0 + k / 80, 91.0, 90.5][: 2 + k % 2] for k, name in enumerate(names)})
    table = build(records, unfinished=failed)
    more = [Note(f"{note.text} " + "and what else is to be said of it " * 9, note.mark) for note in table.notes]
    text = compiled(tmp_path, latex(replace(table, notes=(*table.notes, *more, *more))) + NOTES)
    if text:
        assert " ".join(text.split()).count("and what else is to be said of it") > 100


@pytest.mark.parametrize("size", ["wide", "long", "one seed"])
def test_latex_of_large_tables_fits_its_pages(tmp_path: Path, size: str) -> None:
    draws = random.Random(0)

    def several(n: int) -> list[float]:
        return [90 + draws.gauss(0, 0.3) for _ in range(n)]

    if size == "wide":
        methods = {f"method_{k}": several(3) for k in range(7)}
        records = grid_of([f"student_{i}" for i in range(4)], [0.1, 1.0], **methods)
    elif size == "long":
        records = comparison(
            {f"method_{k}": several(3) for k in range(70)}, agreement={f"layer{i}.preact": 0.5 for i in range(1, 9)}
        )
    else:
        records = comparison({"ce": several(1), "kd": several(1)})
    table = build(records, baseline="method_0" if size != "one seed" else None)
    text = compiled(tmp_path, latex(table) + NOTES)
    if text:
        for row in table.rows:
            for found in row.cells:
                assert found is not None and f"{found.mean:.2f}" in text


@pytest.mark.parametrize("form", ["wide", "column"])
@pytest.mark.parametrize("rows", [3, 70])
def test_latex_in_articles_of_two_columns(form: str, rows: int, tmp_path: Path) -> None:
    values = {f"method_{k}": [90.0 + k / 80, 91.0, 90.5] for k in range(rows)}
    records = comparison(values, agreement={f"layer{i}.preact": 0.5 for i in range(1, 4)})
    table = build(records, baseline="method_0")
    source = latex(table, form, "tab:mine")  # type: ignore[arg-type]
    assert ("\\begin{table*}" in source) == (form == "wide") and "\\label{tab:mine}" in source
    text = compiled(tmp_path, source + NOTES, "twocolumn")
    if text:
        for row in table.rows:
            for found in row.cells:
                assert found is not None and f"{found.mean:.2f}" in text


def test_other_accuracies_stand_beside_the_one_on_the_test_part() -> None:
    def accuracies(last: float) -> dict[str, Any]:
        return {"last": last, "best": last + 1, "best_step": 1}

    records = [
        *(make("ce", seed, 50.0 + seed) for seed in (0, 1)),
        *(
            make("kd", seed, 52.0, order=1, result__by_classes={"trained_on": 90.0 + 2 * seed, "others": 7.0})
            for seed in (0, 1)
        ),
        make("uda", 0, 53.0, order=2, result__source=accuracies(96.5), result__teacher=accuracies(61.25)),
    ]
    table = build(records)
    assert cell(table, "CE").also == {}
    shown = {name: (found.mean, found.deviation) for name, found in cell(table, "KD").also.items()}
    assert shown == {"trained_on": (91.0, pytest.approx(2**0.5)), "others": (7.0, 0.0)}
    text = markdown(table)
    assert "| method | classes trained on here | other classes | on the source | teacher that trained with it |" in text
    assert "| KD | 91.00 ± 1.41 | 7.00 ± 0.00 | – | – |" in text
    assert "| UDA | – | – | 96.50 | 61.25 |" in text
    assert "on the target domain" in notes(table) and "groups of classes" in notes(table)
    of_kd = next(row for row in csv.DictReader(io.StringIO(table_csv(table))) if row["method"] == "kd")
    assert (of_kd["also.trained_on"], of_kd["also.others"], of_kd["also.source"]) == ("91.0", "7.0", "")
    of_uda = next(row for row in csv.DictReader(io.StringIO(records_csv(records))) if row["method"] == "uda")
    assert (of_uda["also.source"], of_uda["also.teacher"]) == ("96.5", "61.25")
    assert "Also measured" not in markdown(build(comparison(VALUES)))


def test_grids_are_rectangular() -> None:
    for table in (
        build(comparison(VALUES)),
        build(grid_of(["a", "b"], [0.1, 1.0], ce=[80, 81], kd=[81, 82.5])),
        build(comparison({"kd": [90.0]})),
    ):
        grids = layout(table)
        assert len(grids) == (2 if len(table.columns) == 1 else 4)
        for grid in grids:
            assert all(len(row) == len(grid.header) for row in grid.rows)
            assert all(0 < rule < len(grid.rows) for rule in grid.rules)
