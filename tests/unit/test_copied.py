"""Published numbers beside our own: always marked, with the difference of protocols spelled out."""

from __future__ import annotations

import csv
import io

import pytest
from pydantic import ValidationError
from synthetic import comparison, make

from kdbench.cards import PublishedCard
from kdbench.errors import UserError
from kdbench.registry import Registry
from kdbench.results.record import Record
from kdbench.results.renderers import latex, markdown, table_csv
from kdbench.results.tables import Table, build

VALUES = {"ce": [93.5, 93.7, 93.6], "kd": [94.0, 94.1, 93.9]}


def card(**over: object) -> PublishedCard:
    plain = {
        "title": "A table",
        "source": "somewhere, README",
        "note": "tuned on\n the test set.",
        "data": {"name": "cifar10"},
        "protocol": {"epochs": 100.0, "batch_size": 128, "reported": "best"},
        "pairs": {
            "a": {"teacher": {"name": "wrn_22_4", "accuracy": 95.49}, "student": {"name": "wrn_16_2"}},
            "b": {"teacher": {"name": "wrn_40_2"}, "student": {"name": "wrn_16_2"}},
            "c": {"teacher": {"name": "wrn_22_4", "accuracy": 95.49}, "student": {"name": "wrn_16_1"}},
        },
        "methods": {
            "ce": {"title": "student", "accuracies": [93.97, 93.97, 91.0]},
            "ab": {
                "title": "AB",
                "accuracies": [[94.82, 0.12], 94.7, None],
                "protocol": {"extra_epochs": 30.0, "runs": 5, "note": "cross-entropy alone"},
            },
        },
    }
    return PublishedCard.model_validate(plain | over)


def records(**over: object) -> list[Record]:
    spec = {"protocol": {"batch_size": 128}, "teacher": {"name": "mine", "model": {"name": "wrn_22_4"}}}
    return comparison(VALUES, spec=spec, **over)


def note_of(table: Table, mark: str) -> str:
    return next(note.text for note in table.notes if note.mark == mark)


def test_every_copied_number_is_marked_and_its_note_spells_the_protocol_out() -> None:
    table = build(records(), published={"other": card()})
    assert [(row.label, row.method) for row in table.copied] == [
        ("teacher wrn_22_4", None),
        ("student (from wrn_22_4)", "ce"),
        ("AB (from wrn_22_4)", "ab"),
    ]
    ab = table.copied[2].cells[0]
    assert ab is not None and (ab.mean, ab.deviation, ab.runs) == (94.82, 0.12, 5)
    assert note_of(table, ab.marks[0]) == (
        "Copied from other, not measured here; differs: epochs 100 (here 200), reported best epoch (here last epoch), "
        "runs 5 (here 3), teacher wrn_22_4 95.49 % (here wrn_22_4 95.50 %); the same: batch size 128"
    )
    assert note_of(table, ab.marks[1]) == "There: 30 epochs on top of the others'; cross-entropy alone"
    ce = table.copied[1].cells[0]
    assert ce is not None
    assert "not stated there: runs (here 3)" in note_of(table, ce.marks[0])
    assert any(note.text == "other: A table; somewhere, README. Tuned on the test set" for note in table.notes)
    for row in table.copied:
        for cell in row.cells:
            assert cell is not None and cell.marks


def test_the_files_show_the_dagger_and_never_rank_what_is_copied() -> None:
    table = build(records(), published={"other": card()})
    text = markdown(table)
    row = next(line for line in text.splitlines() if line.startswith("| AB (from"))
    assert row == "| AB (from wrn\\_22\\_4) | 94.82 ± 0.12†<sup>c,d</sup> | 5 |  |  |  |  |"
    assert "| *copied†: other* |" in text
    # Ours stays the bold one although the copied number is higher.
    assert "**94.00 ± 0.10**" in text
    tex = latex(table)
    assert r"94.82 $\pm$ 0.12\dag{}$^{\mathrm{c,d}}$" in tex and tex.isascii()
    rows = list(csv.DictReader(io.StringIO(table_csv(table))))
    copied = [r for r in rows if r["copied_from"]]
    assert [(r["method"], float(r["mean"]), r["n"], r["rank"]) for r in copied] == [
        ("teacher", 95.49, "", ""),
        ("ce", 93.97, "", ""),
        ("ab", 94.82, "5", ""),
    ]
    assert not any(r["copied_from"] for r in rows if r not in copied)


def test_without_published_numbers_nothing_changes() -> None:
    assert "†" not in markdown(build(records()))
    assert "copied_from" not in table_csv(build(records()))


def test_the_same_teacher_wins_else_all_teachers_are_shown_apart() -> None:
    both = build(comparison(VALUES), published={"other": card()})
    assert [row.label for row in both.copied] == [
        "teacher wrn_22_4",
        "student (from wrn_22_4)",
        "AB (from wrn_22_4)",
        "student (from wrn_40_2)",
        "AB (from wrn_40_2)",
    ]
    ab = both.copied[4].cells[0]
    assert ab is not None
    assert "teacher wrn_40_2 (here wrn_22_4_cifar10 95.50 %)" in note_of(both, ab.marks[0])


def test_each_column_takes_its_own_pair() -> None:
    several = [
        make("ce", seed, 90 + seed, student=student, axes={"method": "ce", "student": student}, order=i)
        for i, student in enumerate(("wrn_16_2", "wrn_16_1", "wrn_10_1"))
        for seed in (0, 1)
    ]
    table = build(several, published={"other": card()})
    means = {row.label: [cell and cell.mean for cell in row.cells] for row in table.copied}
    assert means["student (from wrn_22_4)"] == [93.97, 91.0, None]
    assert means["AB (from wrn_22_4)"] == [94.82, None, None]
    assert "| student (from wrn\\_22\\_4) | 93.97†" in markdown(table)


def test_a_table_that_has_nothing_to_do_with_ours_is_an_error() -> None:
    with pytest.raises(UserError, match="'other' has no numbers for this table") as error:
        build(records(student="vgg8"), published={"other": card()})
    assert "cifar10: wrn_22_4 → wrn_16_2" in (error.value.hint or "")


@pytest.mark.parametrize("wrong", [[93.0], [93.0, 94.0, 101.0], [93.0, [94.0], 92.0], [93.0, "94", 92.0]])
def test_a_card_with_wrong_numbers_is_refused(wrong: list[object]) -> None:
    with pytest.raises(ValidationError):
        card(methods={"ce": {"title": "student", "accuracies": wrong}})


def test_every_published_card_has_one_student_in_a_pair_and_no_plain_student_twice() -> None:
    """What two rows of one source must agree on: the plain student's number does not depend on its teacher."""
    registry = Registry()
    for name in registry.names("published"):
        found: PublishedCard = registry.card("published", name)
        if "ce" in found.methods:
            numbers: dict[str, set[object]] = {}
            for pair, value in zip(found.pairs.values(), found.methods["ce"].accuracies, strict=True):
                numbers.setdefault(pair.student.name, set()).add(value)
            assert all(len(several) == 1 for several in numbers.values()), name
        teachers: dict[str, set[object]] = {}
        for pair in found.pairs.values():
            if pair.teacher is not None:
                teachers.setdefault(pair.teacher.name, set()).add(pair.teacher.accuracy)
        assert all(len(several) == 1 for several in teachers.values()), name
