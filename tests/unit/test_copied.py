"""Published numbers beside our own: always marked, with the difference of protocols spelled out."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

import pytest
from pydantic import ValidationError
from synthetic import comparison, make

from kdbench.cards import ProtocolCard
from kdbench.errors import UserError
from kdbench.published import PublishedCard
from kdbench.record import Record
from kdbench.registry import Registry
from kdbench.results.contents import Table
from kdbench.results.copied import published_tables
from kdbench.results.frames import table_csv
from kdbench.results.layout import layout
from kdbench.results.tables import build
from kdbench.results.texts import latex, markdown

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


ONLY_STUDENT = {"ce": {"title": "student", "accuracies": [93.9]}}


def records(**over: object) -> list[Record]:
    spec = {"protocol": {"batch_size": 128}, "teacher": {"name": "mine", "model": {"name": "wrn_22_4"}}}
    return comparison(VALUES, spec=spec, **over)


def note_of(table: Table, mark: str) -> str:
    return next(note.text for note in table.notes if note.mark == mark).removesuffix(".")


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
    assert any(note.text == "Source other: A table; somewhere, README. Tuned on the test set." for note in table.notes)
    for row in table.copied:
        for cell in row.cells:
            assert cell is not None and cell.marks


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"train": 50_000_000}, "50,000,000 training images"),
        ({"tested_on": "validation"}, "(here tested on the validation part)"),
        ({"train": 1}, None),
        ({}, None),
    ],
)
def test_a_part_of_the_published_data_is_a_difference(data: dict[str, Any], says: str | None) -> None:
    ours = records()
    spec = {**ours[0].spec, "data": {**ours[0].spec.get("data", {}), **data}}
    table = build([record.model_copy(update={"spec": spec}) for record in ours], published={"other": card()})
    cell = table.copied[1].cells[0]
    assert cell is not None
    note = note_of(table, cell.marks[0])
    assert (says in note and ", data cifar10 (here " in note) if says else "data" not in note


def spelled(published: PublishedCard, protocol: dict[str, Any], stages: dict[str, Any], student: str) -> str:
    """The note on the plain student's protocol."""
    spec = {"protocol": protocol, "method": {"stages": stages}}
    table = build(comparison(VALUES, spec=spec, student=student), published={"other": published})
    cell = next(row for row in table.copied if row.method == "ce").cells[0]
    assert cell is not None
    return note_of(table, cell.marks[0])


def test_how_the_weights_were_moved_is_spelled_out_where_both_sides_are_known() -> None:
    pairs: dict[str, Any] = {
        "a": {"student": {"name": "wrn_16_2"}},
        "b": {"student": {"name": "wrn_16_1"}, "protocol": {"learning_rate": 0.01}},
    }
    protocol = {
        "learning_rate": 0.05,
        "optimizer": "SGD with momentum 0.9",
        "schedule": "× 0.1 at 50 %",
        "augmentation": "crop after padding 4 and flip",
    }
    methods = {"ce": {"title": "student", "accuracies": [93.97, 91.0]}}
    other = card(protocol=protocol, pairs=pairs, methods=methods)
    sgd = {"name": "sgd", "options": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}}
    drops = {"name": "multistep", "options": {"at": ["30%", "62.5%"], "gamma": 0.2}}
    stages = {
        "main": {"optimizer": sgd, "schedule": drops},
        # What has a share of the epochs, or some of its own, is not how the network was trained.
        "part": {"share": 0.1, "optimizer": {"name": "adam", "options": {"lr": 3.0}}, "schedule": {"name": "constant"}},
        "more": {"extra_epochs": 9, "optimizer": {"name": "adam", "options": {"lr": 3.0}}, "schedule": drops},
    }
    padded = {"augmentation": {"padding": 4, "mode": "reflect", "flip": True}}
    note = spelled(other, padded, stages, "wrn_16_2")
    assert (
        "; differs: optimizer SGD with momentum 0.9 (here SGD with Nesterov momentum 0.9), schedule × 0.1 at 50 % "
        "(here × 0.2 at 30/62.5 %), augmentation crop after padding 4 and flip (here crop after reflect padding 4 and "
        "flip); not stated there:"
    ) in note
    assert note.endswith("the same: learning rate 0.05")
    assert "weight decay" not in note, "what the source does not say is no difference"
    assert "learning rate 0.01 (here 0.05)" in spelled(other, padded, stages, "wrn_16_1"), "a pair's own rate"
    plain = spelled(other, {"augmentation": {"padding": 0, "flip": False}}, {"main": {"schedule": drops}}, "wrn_16_2")
    assert "augmentation crop after padding 4 and flip (here none)" in plain
    assert "optimizer" not in plain and "rate" not in plain, "nor what our record does not say"


def test_a_row_departs_from_its_pair_and_a_pair_from_its_table() -> None:
    pairs: dict[str, Any] = {
        "a": {"student": {"name": "x"}},
        "b": {"student": {"name": "y"}, "protocol": {"epochs": 2.0, "batch_size": 2}},
    }
    methods = {
        "ce": {"title": "student", "accuracies": [1.0, 2.0]},
        "kd": {"title": "KD", "accuracies": [1.0, 2.0], "protocol": {"epochs": 3.0}},
    }
    found = card(protocol={"epochs": 1.0, "batch_size": 1, "runs": 1}, pairs=pairs, methods=methods)
    said = {
        (method, name): (lambda p: (p.epochs, p.batch_size, p.runs))(found.protocol_of(method, pair))
        for method in methods
        for name, pair in found.pairs.items()
    }
    assert said == {("ce", "a"): (1, 1, 1), ("ce", "b"): (2, 2, 1), ("kd", "a"): (3, 1, 1), ("kd", "b"): (3, 2, 1)}


@pytest.mark.parametrize(
    ("published", "protocol", "student"),
    [("crd_cifar100", "crd", "wrn_16_2"), ("ab_teacher_cifar10", "ab_official", "wrn_22_4")],
)
def test_a_protocol_card_and_the_published_table_that_it_follows_say_the_same(
    published: str, protocol: str, student: str
) -> None:
    """Both were written from one script, in different words: no difference may come from the words."""
    registry = Registry()
    ours: ProtocolCard = registry.card("protocols", protocol)
    stage = {
        part: {"name": named.name, "options": named.options}
        for part, named in (("optimizer", ours.optimizer), ("schedule", ours.schedule))
    }
    table: PublishedCard = registry.card("published", published)
    table = table.model_copy(update={"data": card().data})
    note = spelled(table, ours.model_dump(), {"training": stage}, student)
    same = note.partition("the same: ")[2]
    for name in ("batch size", "optimizer", "learning rate", "weight decay", "schedule", "augmentation"):
        assert f"{name} " in same, note


def test_the_files_show_the_dagger_and_never_rank_what_is_copied() -> None:
    table = build(records(), published={"other": card()})
    text = markdown(table)
    row = next(line for line in text.splitlines() if line.startswith("| AB (from"))
    assert row == "| AB (from wrn\\_22\\_4) | 94.82 ± 0.12†<sup>c,d</sup> | 5 |  |  |  |  |"
    assert "| *copied†: other* |" in text
    # Ours stays the bold one although the copied number is higher.
    assert "**94.00 ± 0.10**" in text
    tex = latex(table)
    assert r"94.82 $\pm$ 0.12†\textsuperscript{c,d}" in tex
    rows = list(csv.DictReader(io.StringIO(table_csv(table))))
    copied = [r for r in rows if r["copied_from"]]
    assert [tuple(r[name] for name in ("method", "label", "mean", "deviation", "n", "rank")) for r in copied] == [
        ("teacher", "teacher wrn_22_4", "95.49", "", "", ""),
        ("ce", "student (from wrn_22_4)", "93.97", "", "", ""),
        ("ab", "AB (from wrn_22_4)", "94.82", "0.12", "5", ""),
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


def test_pairs_that_say_the_same_keep_their_own_numbers() -> None:
    pair = {"teacher": {"name": "wrn_22_4"}, "student": {"name": "wrn_16_2"}}
    methods = {"ce": {"title": "student", "accuracies": [93.1, 93.9]}}
    table = build(records(), published={"other": card(pairs={"first": pair, "second": pair}, methods=methods)})
    assert [cell.mean for row in table.copied for cell in row.cells if cell is not None] == [93.1, 93.9]


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
    # With the number of runs, where that is stated.
    assert re.search(r"\| AB \(from wrn\\_22\\_4\) \| 94\.82 ± 0\.12† \(5\)<sup>.*</sup> \| – \| – \|", markdown(table))


def test_every_published_table_has_a_block_of_its_own_rows() -> None:
    two = build(records(), published={"one": card(), "two": card(pairs={"a": card().pairs["a"]}, methods=ONLY_STUDENT)})
    firsts = [row[0].text for row in layout(two)[0].rows]
    assert firsts[firsts.index("copied†: one") :] == [
        *("copied†: one", "teacher wrn_22_4", "student (from wrn_22_4)", "AB (from wrn_22_4)"),
        *("copied†: two", "teacher wrn_22_4", "student (from wrn_22_4)"),
    ]


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


def test_every_published_card_says_where_it_is_from_and_how_in_words_that_can_be_compared() -> None:
    registry = Registry()
    words = {
        "optimizer": r"SGD with (Nesterov )?momentum 0\.\d+",
        "schedule": r"× 0\.\d+ at [\d.]+(/[\d.]+)* %|drops at \d+(/\d+)* of \d+ epochs",
        "augmentation": r"crop after (reflect )?padding \d( and flip)?",
    }
    for name in registry.names("published"):
        found: PublishedCard = registry.card("published", name)
        assert "github.com/" in found.source, name
        said = [found.protocol, *(p.protocol for p in found.pairs.values())]
        for protocol in (*said, *(row.protocol for row in found.methods.values())):
            for field, form in words.items():
                text = getattr(protocol, field)
                assert text is None or re.fullmatch(form, text), (name, text)


# Methods of published tables that kdbench has not, or not in that form (Tf-KD: which of its two is not said).
OTHERS = {
    "cckd", "cskd", "distpro", "kd_eid", "mhgd", "norm_crd", "tfkd", "wcord",
}  # fmt: skip


def test_a_published_row_has_the_key_of_our_method() -> None:
    """By it, table.csv and `kdbench.table` put a copied number beside the measured one, and --published finds it."""
    registry = Registry()
    keys = {key for name in registry.names("published") for key in registry.card("published", name).methods}
    assert keys - {*registry.names("methods")} == OTHERS
    assert {*published_tables(["ls_cifar100:lskd,lskd_dkd"])["ls_cifar100"].methods} == {"lskd", "lskd_dkd"}


def test_a_copied_number_stands_under_its_method_in_a_frame() -> None:
    found = list(csv.DictReader(io.StringIO(table_csv(build(records(), published={"other": card()})))))
    of_ce = [(row["copied_from"], float(row["mean"])) for row in found if row["method"] == "ce"]
    assert of_ce == [("", pytest.approx(93.6)), ("other", 93.97)]


@pytest.mark.parametrize(
    ("name", "method", "numbers"),
    [
        ("sdd_cifar100", "rld", [76.02, 74.88, 72.00, 71.67, 74.02, 76.64, 74.93, 69.97, 70.76, 77.56]),
        ("cross_cifar100", "dkd_sdd_ls", [76.94, 79.41, 76.33, 70.55]),
        ("reviewkd_rerun_cifar100", "reviewkd", [71.79, 73.61, 76.02, 76.27, 75.21, 76.94, 77.44, 77.86]),
        ("kdtf_cifar100", "ab", [73.08]),
        ("kdtf_best_cifar100", "ab", [73.41]),
        ("cskd_cub200", "ab", [53.38, 52.10]),
        ("mmrazor_imagenet", "ab", [None, 69.94]),
        ("torchdistill_originals_imagenet", "at", [70.70]),
        ("cls_kd_deit_imagenet", "vitkd_nkd", [77.78, 83.59, 85.41]),
        ("cls_kd_deit_imagenet", "nkd", [76.68, None, 84.96]),
        ("cls_kd_imagenet", "uskd", [70.79, 70.38, 72.41, 70.30, 77.07, 78.54, 77.30, 81.49]),
        # 91.43 of DeepInversion's own pair is in no second source, nor are its plain noise and VGG-11's teacher.
        ("deep_inversion_cifar10", "deep_inversion", [84.16, None, None]),
        ("deep_inversion_cifar10", "adaptive_deep_inversion", [90.78, 90.36, 93.26]),
    ],
)
def test_numbers_as_their_sources_print_them(name: str, method: str, numbers: list[float | None]) -> None:
    found: PublishedCard = Registry().card("published", name)
    assert found.methods[method].accuracies == numbers
