"""Which cells stand together: what a recipe does not compare, what is one method, and what is another experiment."""

from __future__ import annotations

from typing import Any

import pytest
from synthetic import make

from kdbench.errors import UserError
from kdbench.recipe.differences import differences
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import recorded
from kdbench.record import Record
from kdbench.registry import Registry
from kdbench.results.comparison import compare
from kdbench.results.frames import to_frame
from kdbench.results.tables import build


def by_epochs(method: str, *epochs: int, order: int = 0, extra: float = 0.0) -> list[Record]:
    return [
        make(
            method,
            seed,
            80 + e / 10 + seed,
            axes={"method": method, "epochs": e},
            order=order,
            epochs=float(e),
            extra_epochs=extra,
        )
        for e in epochs
        for seed in (0, 1)
    ]


def shown(records: list[Record]) -> dict[str, list[int]]:
    """Row -> its cells' numbers of seeds, column by column."""
    table = build(records)
    return {row.label: [cell.n if cell else 0 for cell in row.cells] for row in table.rows}


def test_a_cell_stands_in_no_column_that_it_was_not_trained_for() -> None:
    """Cells of one recipe, of which another command compared no epochs."""
    alone = [make("at", seed, 95.0 + seed, epochs=200.0, order=2) for seed in (0, 1)]
    records = [*by_epochs("ce", 10, 20), *by_epochs("kd", 10, 20, order=1), *alone]
    assert [column.label for column in compare(records).columns] == ["epochs 10", "epochs 20", "epochs 200"]
    assert shown(records) == {"CE": [2, 2, 0], "KD": [2, 2, 0], "AT": [0, 0, 2]}
    # As do those of which no command says what part of the images they have: all.
    share = [make("ce", 0, axes={"method": "ce", "data.fraction": f}, spec__data={"fraction": f}) for f in (0.1, 0.5)]
    whole = make("kd", 0, order=1, spec__data={"name": "cifar10"})
    assert shown([*share, whole]) == {"CE": [1, 1, 0], "KD": [0, 0, 1]}
    assert [column.label for column in compare([*share, whole]).columns][-1] == "fraction 1"


def test_images_of_each_class_are_said() -> None:
    share = [make("ce", 0, axes={"method": "ce", "data.fraction": f}, spec__data={"fraction": f}) for f in (0.1, 0.5)]
    each = make("ce", 0, spec__data={"per_class": 10})
    assert [column.label for column in compare([*share, each]).columns][-1] == "fraction (10 per class)"
    # Of two numbers of images for equal steps the budgets in epochs are a consequence.
    few, many = make("ce", 0, data__train=100, epochs=10.0), make("ce", 0, data__train=1000, epochs=1.0)
    assert [column.label for column in compare([few, many]).columns] == ["training images 100", "training images 1000"]


def test_a_plain_student_stands_in_every_column_of_teachers() -> None:
    records = [make("ce", seed, teacher=None) for seed in (0, 1)]
    records += [
        make("kd", s, axes={"method": "kd", "teacher": t}, teacher=t, order=1) for s in (0, 1) for t in ("a", "b")
    ]
    assert shown(records) == {"CE": [2, 2], "KD": [2, 2]}
    # But in none that nobody made: each student has its own teacher.
    own = [make("ce", 0, axes={"method": "ce", "student": s}, student=s, teacher=None) for s in ("one", "two")]
    for student, teacher in (("one", "a"), ("two", "b")):
        axes = {"method": "kd", "student": student, "teacher": teacher}
        own.append(make("kd", 0, axes=axes, student=student, teacher=teacher, order=1))
    assert [column.label for column in compare(own).columns] == ["one, a", "two, b"]
    assert shown(own) == {"CE": [1, 1], "KD": [1, 1]}
    # And of what is compared of one.
    plain = make("ce", 0, teacher=None)
    routes = [make("kd", 0, axes={"method": "kd", "teacher.route": n}, order=1, spec__route=n) for n in (1, 2)]
    assert shown([plain, *routes]) == {"CE": [1, 1], "KD": [1, 1]}


def test_a_budget_in_steps_is_said_where_it_is_not_compared() -> None:
    default = make("ce", 0, epochs=50.0, budget__steps=2000)
    longer = [make("ce", 0, axes={"method": "ce", "steps": s}, budget__steps=s, epochs=s / 40) for s in (4000, 8000)]
    assert [column.label for column in compare([*longer, default]).columns] == [
        "steps 2000",
        "steps 4000",
        "steps 8000",
    ]


def test_one_budget_is_one_column_though_records_round() -> None:
    """300 steps of 19 an epoch, with and without 30 epochs before."""
    plain = make("ce", 0, budget={"steps": 300, "epochs": 15.7895, "stages": []})
    longer = make("ab", 0, order=1, budget={"steps": 870, "epochs": 45.7895, "extra_epochs": 30.0, "stages": []})
    assert not compare([plain, longer]).axes


def test_an_axis_keeps_its_own_values_in_data_frames() -> None:
    """A method with ten epochs more stands where it was compared; of teachers nobody measured, two are two."""
    frame = to_frame(build([*by_epochs("ce", 20, 30), *by_epochs("ab", 20, 30, order=1, extra=10.0)]))
    assert [*zip(frame["method"], frame["epochs"].astype(str), frame["extra_epochs"], strict=True)] == [
        ("ce", "20", 0.0),
        ("ce", "30", 0.0),
        ("ab", "20", 10.0),
        ("ab", "30", 10.0),
    ]
    taught = [
        make("kd", 0, axes={"method": "kd", "teacher": t}, teacher=t, **{"teacher__accuracy": None}) for t in "ab"
    ]
    assert sorted(to_frame(build(taught))["teacher"]) == ["a", "b"]


def test_one_method_under_two_names_is_one_row() -> None:
    before = [make("ab", seed, 90.0 + seed / 5, label="AB + CE") for seed in (0, 1, 2)]
    now = [make("ab", seed, 90.0 + seed / 5, label="AB, then CE", identity=f"{seed}") for seed in (2, 3, 4)]
    for record in now:
        record.spec["method"]["label"] = "AB, then CE"
    table = build([*before, *now[1:]])
    assert [(row.label, row.cells[0].n) for row in table.rows if row.cells[0]] == [("AB + CE", 5)]
    assert "'AB, then CE' is 'AB + CE' under another name" in " ".join(note.text for note in table.notes)
    # Two settings are two rows.
    for record in now:
        record.spec["method"]["temperature"] = 9
    assert [row.label for row in compare([*before, *now[1:]]).rows] == ["AB + CE", "AB, then CE"]


@pytest.mark.parametrize(
    "path",
    [
        ("method", "stages", "a", "losses", "kd", "loss", "options", "keep"),
        ("method", "stages", "a", "source", "options", "file"),
        ("method", "stages", "a", "losses", "keep"),
        ("method", "stages", "label"),
        ("method", "stages", "a", "source", "options", "seed"),
    ],
    ids=".".join,
)
def test_what_a_card_calls_as_a_name_is_none(path: tuple[str, ...]) -> None:
    records = [make("kd", seed) for seed in range(2)]
    for record, value in zip(records, ("last", "best"), strict=True):
        place = record.spec
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    assert [found for found, _, _ in differences(*(record.spec for record in records))] == [".".join(path)]
    with pytest.raises(UserError, match="are different experiments"):
        compare(records)


def test_lists_of_other_lengths_are_a_difference() -> None:
    assert [*differences({"hook": ["a", "b"]}, {"hook": ["a"]})] == [("hook", ["a", "b"], ["a"])]


@pytest.mark.parametrize("path", ["data.options.root", "target.options.url", "teacher.file", "keep", "method.label"])
def test_names_and_folders_are_no_differences(path: str) -> None:
    def nested(value: str) -> Any:
        found: Any = value
        for key in reversed(path.split(".")):
            found = {key: found}
        return found

    assert not [*differences(nested("a"), nested("b"))]
    assert not [*differences({"teacher": {"members": [nested("a")]}}, {"teacher": {"members": [nested("b")]}})]


def test_no_two_cells_of_a_mean_are_different_experiments() -> None:
    """An older version's record lacks the field in which two newer ones differ."""
    old, *new = (make("kd", seed, kdbench=version) for seed, version in enumerate(("0.1.0", "0.2.0", "0.2.0")))
    for record, beta in zip(new, (1, 100), strict=True):
        record.spec["method"]["beta"] = beta
    with pytest.raises(UserError, match="method.beta"):
        compare([old, *new])
    new[1].spec["method"]["beta"] = 1
    assert len(compare([old, *new]).cells) == 1


DIGITS = {"data": "digits", "student": "wrn_10_1", "protocol": "digits", "method": "ce"}


def as_planned(seed: int = 0, **over: Any) -> list[Record]:
    """Records of a recipe's cells, as a run would leave them; `made`: what `make` takes."""
    made = over.pop("made", {})
    cells = plan({**DIGITS, "seeds": [seed], **over}, Registry()).cells
    names = {"data": "digits", "protocol": "digits", "teacher": None} | made
    return [make("ce", seed, axes={"method": "ce"} | cell.axes, spec=recorded(cell.spec), **names) for cell in cells]


def test_what_an_older_record_leaves_out_is_its_default_and_no_unknown() -> None:
    old = as_planned(0, made={"kdbench": "0.1.0"})
    assert "ema" not in old[0].spec["protocol"]
    assert len(compare([*old, *as_planned(1, made={"kdbench": "0.2.0"})]).cells) == 1
    averaged = as_planned(1, protocol={"name": "digits", "ema": 0.9}, made={"kdbench": "0.2.0"})
    with pytest.raises(UserError, match=r"protocol\.ema \(none and 0\.9\)"):
        compare([*old, *averaged])


def test_what_a_card_has_come_to_say_since_changes_no_number() -> None:
    path, value = "method.stages.classification.losses.kd.loss.by_step", "its decomposition reads"
    (old,), (new,) = (as_planned(seed, method="kd", teacher="wrn_16_2_digits") for seed in (0, 1))
    place = new.spec
    for key in path.split(".")[:-1]:
        place = place[key]
    place[path.split(".")[-1]] = value
    new = Record.model_validate(new.model_dump(mode="json", by_alias=True))
    assert [found for found, _, _ in differences(old.spec, new.spec)] == [path]
    assert len(compare([old, new]).cells) == 1


def test_the_last_layer_under_its_number_and_by_its_place_is_one_row() -> None:
    """As of a run that was begun when the method said the number, and goes on."""
    taught = {"teacher": "wrn_16_2_digits"}
    (first, other), last = (
        (as_planned(0, method={"name": "sp", "hook": hook}, **taught) for hook in ("layer3", "layer2")),
        as_planned(1, method="sp", **taught),
    )
    assert len(compare([*first, *last]).cells) == 1
    with pytest.raises(UserError, match=r"student \(layer2 and layer3\)"):
        compare([*other, *last])


@pytest.mark.parametrize(
    ("path", "values", "other", "label"),
    [
        ("protocol.optimizer.lr", [0.1, 0.01], {"protocol": {"name": "digits", "optimizer": {"lr": 0.5}}}, "lr 0.5"),
        ("protocol.schedule.gamma", [0.3, 0.4], {}, "gamma 0.2"),
        ("student.width", [1, 2], {"student": {"name": "wrn_10_1", "width": 4}}, "width 4"),
        ("protocol.optimizer.delta", [0.05, 0.075], {}, "delta default"),
        ("protocol.ema", [0.5, None], {"protocol": {"name": "digits", "ema": 0.9}}, "ema 0.9"),
        ("protocol.ema", [0.5, 0.9], {}, "ema none"),
        (
            "protocol.optimizer",
            [{"name": "adam", "lr": 0.1}, {"name": "adam", "lr": 0.2}],
            {},
            "optimizer sgd, lr 0.1, momentum 0.9, nesterov true, weight_decay 0.0005",
        ),
    ],
)
def test_a_recipe_that_compares_less_stands_under_what_it_has(
    path: str, values: list[Any], other: dict[str, Any], label: str
) -> None:
    found = compare([*as_planned(0, compare={path: values}), *as_planned(1, **other)])
    labels = {column.label for column in found.columns if 1 in found.cell(found.rows[0], column)}
    assert labels == {label} and len(found.columns) == 3


def test_a_method_that_has_other_settings_in_another_column_says_so() -> None:
    def kd(epochs: int, **options: float) -> list[Record]:
        losses = {"kd": {"weight": 0.9, "loss": {"name": "kd", "options": options}}}
        return [
            make(
                "kd",
                seed,
                axes={"method": "kd", "epochs": epochs},
                spec__method={"stages": {"main": {"losses": losses}}},
            )
            for seed in (0, 1)
        ]

    def said(*records: Record) -> list[str]:
        return [note.text for note in build(records).notes if "other columns" in note.text]

    assert said(*kd(10, temperature=8.0), *kd(30, temperature=8.0)) == []
    told = said(*kd(10), *kd(30, temperature=8.0))
    assert told == ["KD has other settings in other columns: main.kd.temperature default and 8."]
