"""Comparisons, overrides and identities: which cells a recipe plans, and what makes two cells the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from shipped import DIGITS, REGISTRY

from kdbench.cli import cp
from kdbench.engine.folders import teacher_folder
from kdbench.engine.scheduling import CellState, cohorts_of
from kdbench.errors import UserError
from kdbench.files import SHARE
from kdbench.recipe.loading import load, recipe_names
from kdbench.recipe.planning import Plan, cell_name, plan
from kdbench.recipe.specs import CellSpec


def planned(*overrides: str, **recipe: Any) -> Plan:
    return plan(DIGITS | recipe, REGISTRY, overrides)


def one(*overrides: str, **recipe: Any) -> CellSpec:
    (cell,) = planned(*overrides, **({"method": "kd"} | recipe)).cells
    return cell.spec


def test_a_comparison_is_multiplied_out_and_seeds_stay_together() -> None:
    cells = planned(compare={"method": ["ce", "kd"], "data.per_class": [5, 10]}, seeds=2).cells
    assert [(c.spec.method.name, c.spec.data.per_class, c.spec.seed) for c in cells] == [
        ("ce", 5, 0), ("ce", 5, 1), ("ce", 10, 0), ("ce", 10, 1), ("kd", 5, 0), ("kd", 5, 1), ("kd", 10, 0),
        ("kd", 10, 1),
    ]  # fmt: skip


def test_a_copied_recipe_is_the_same_experiment(tmp_path: Path) -> None:
    """Wherever it lies, what it includes is found, and so is the schema."""
    copy = tmp_path / "copy.yaml"
    for name in recipe_names():
        cp.command(name, copy, force=True)
        (schema,) = re.findall(r"\$schema=(.+)", copy.read_text())
        assert Path(schema) == SHARE / "recipes" / "recipe.schema.json" and Path(schema).is_file()
        assert load(str(copy)).data == load(name).data, name


def test_a_method_that_lacks_a_parameter_is_one_cell() -> None:
    cells = planned(compare={"method": ["ce", "kd"], "method.temperature": [1.0, 2.0, 4.0]}).cells
    assert [c.spec.method.name for c in cells] == ["ce", "kd", "kd", "kd"]
    assert cells[0].axes == {"method": "ce"}
    assert [c.axes["method.temperature"] for c in cells[1:]] == [1.0, 2.0, 4.0]


def test_the_plain_student_is_one_cell_whoever_teaches() -> None:
    cells = planned(
        data="cifar10",
        teacher="resnet56_cifar10",
        student="resnet20",
        protocol="crd",
        compare={"method": ["ce", "kd"], "teacher": ["wrn_22_4_cifar10"]},
    ).cells
    assert cells[0].spec.teacher is None and "teacher" not in cells[0].axes
    assert cells[1].spec.teacher is not None


def test_two_settings_of_a_method_are_told_apart() -> None:
    cells = planned(compare={"method": [{"name": "kd", "temperature": 2.0}, {"name": "kd", "temperature": 8.0}]}).cells
    assert [c.spec.method.label for c in cells] == ["KD, temperature 2.0", "KD, temperature 8.0"]
    with pytest.raises(UserError, match=r"both called 'X': .*\.temperature \(2 and 8\)\n"):
        planned(compare={"method": [{"name": "kd", "temperature": t, "label": "X"} for t in (2.0, 8.0)]})
    with pytest.raises(UserError, match=r"both called 'X': method\.name \(kd and at\)\n"):
        planned(compare={"method": [{"name": name, "label": "X"} for name in ("kd", "at")]})
    with pytest.raises(UserError, match="'X' and 'Y' are the same method under two names"):
        planned(compare={"method": [{"name": "kd", "label": label} for label in "XY"]})


@pytest.mark.parametrize(
    ("path", "bad", "says", "hints"),
    [
        ("method", "{name: kd, temprature: 2.0}", "unknown key 'temprature'", "temperature"),
        ("method", "{name: kd, stages: {classification: {losses: {ce: null}}}}", "ce' cannot be None", "weight: 0"),
        ("protocol", "{name: digits, batch: 2}", "unknown key 'batch'", "batch_size"),
    ],
)
def test_one_of_several_values_has_its_own_line(tmp_path: Path, path: str, bad: str, says: str, hints: str) -> None:
    file = tmp_path / "mine.yaml"
    rest = DIGITS | ({} if path == "method" else {"method": "kd"})
    good = {"method": "kd_only", "protocol": "crd"}[path]
    lines = ["compare:", f"  {path}:", f"    - {good}", f"    - {bad}", *yaml.safe_dump(rest).splitlines()]
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(says)) as error:
        plan(file, REGISTRY)
    assert error.value.where == f"{file}:4" and hints in (error.value.hint or "")


def test_a_cell_is_called_by_its_values_in_words() -> None:
    axes = {"protocol.schedule": {"name": "constant"}, "data.per_class": None, "method.beta": 3, "data.fraction": 0.1}
    assert cell_name("KD", axes) == "KD, protocol.schedule constant, data.per_class none, data.fraction 0.1"


def test_an_override_replaces_what_was_compared() -> None:
    cells = planned("method=kd", compare={"method": ["ce", "kd", "ab"]}).cells
    assert [c.spec.method.name for c in cells] == ["kd"]


def test_a_name_alone_replaces_the_options_beside_the_same_name(tmp_path: Path) -> None:
    said = {
        "data": {"name": "digits", "per_class": 10},
        "teacher": {"name": "wrn_16_2_digits", "trained": True},
        "student": {"name": "wrn_10_1", "image_size": 16},
        "protocol": {"name": "digits", "batch_size": 7, "optimizer": {"name": "sgd", "lr": 0.3}},
        "compute": {"precision": "bfloat16"},
        "method": {"name": "kd", "temperature": 2.0},
    }
    for key, given in said.items():
        word = "reference" if key == "compute" else given["name"]
        alone = {"mode" if key == "compute" else "name": word}
        assert load(said, (f"{key}={word}",)).data == said | {key: alone}
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(said))
        (tmp_path / "own.yaml").write_text(f"include: base.yaml\n{key}: {word}\n")
        assert load(tmp_path / "own.yaml").data == said | {key: alone}
        # A mapping is laid over one of the same name, and so is a dotted key.
        assert load(said, (f"{key}={{name: {word}, x: 1}}",)).data[key] == {**given, "name": word, "x": 1}
    assert load(said, ("protocol.optimizer=sgd",)).data["protocol"]["optimizer"] == {"name": "sgd"}
    assert load(said | {"method": {"temperature": 2.0}}, ("method=kd",)).data["method"]["temperature"] == 2.0
    # A compared name too, whichever path is compared first.
    for compare in ({"data": ["digits"], "data.fraction": [0.5]}, {"data.fraction": [0.5], "data": ["digits"]}):
        data = planned(data=said["data"], method="ce", compare=compare).cells[0].spec.data
        assert (data.per_class, data.fraction) == (None, 0.5)


def test_hook_points_that_a_recipe_names_stand_in_place_of_the_networks_own() -> None:
    hooks = {"layer1": "block1", "layer2": "block2", "layer3": "block3"}
    network = {"weights": __file__, "model": "torchvision:resnet18"}
    beside = one(method="at", teacher={**network, "hooks": {layer: layer for layer in hooks}})
    inside = {"name": "torchvision:resnet18", "hooks": {layer: layer for layer in hooks}}
    assert beside == one(method="at", teacher={**network, "model": inside})
    card = one(method="at", teacher={"name": "wrn_16_2_digits", "hooks": hooks}).teacher
    assert card is not None and card.model.hooks == hooks
    with pytest.raises(UserError, match="'hooks' are given twice"):
        one(method="at", teacher={**network, "model": inside, "hooks": hooks})
    for side, given in (("student", {"name": "wrn_10_1"}), ("teacher", {"name": "wrn_16_2_digits"})):
        with pytest.raises(
            UserError, match=r"no hook point 'pooled'\n.*in place of all of its own: name 'pooled' there"
        ):
            one(method="crd", **{side: given | {"hooks": hooks}})


@pytest.mark.parametrize(
    "overrides",
    [
        ("steps=7", "compare.steps=[3, 4]"),
        ("compare.steps=[3, 4]", "steps=7"),
        ("compare.steps=[3, 4]", "steps=null"),
        ("compare.method.temperature=[3, 4]", "method.temperature=5"),
        ("epochs=7", "compare.steps=[3, 4]"),
        ("compare={steps: [3, 4]}", "steps=7"),
    ],
    ids=" ".join,
)
def test_one_value_and_several_to_compare_are_an_error_in_any_order(overrides: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="is given one value, and there are several to compare"):
        planned(*overrides, method="kd")
    assert len(planned("epochs=null", "compare.steps=[3, 4]", "seeds=1", method="kd").cells) == 2


def test_the_later_of_two_budgets_holds(tmp_path: Path) -> None:
    assert one("epochs=3", steps=10).protocol.steps is None
    (tmp_path / "base.yaml").write_text("data: digits\nstudent: wrn_10_1\nprotocol: digits\nmethod: ce\nepochs: 5\n")
    (tmp_path / "own.yaml").write_text("include: base.yaml\nsteps: 7\n")
    assert plan(tmp_path / "own.yaml", REGISTRY).cells[0].spec.protocol.steps == 7


def test_a_dictionary_includes_recipes_as_a_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("include: quickstart\nseeds: 2\ndata: {per_class: 3}\n")
    own: dict[str, object] = {"include": "base.yaml", "compare": {"method": ["ce", "kd"]}, "data": {"per_class": 4}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    assert load(own).data == load(tmp_path / "own.yaml").data
    assert load(own).data["data"] == {"name": "digits", "per_class": 4}
    with pytest.raises(UserError, match="there is no recipe 'quickstar'"):
        load({"include": "quickstar"})


def test_a_protocols_normalization_for_other_images_is_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match="normalization of 3 channels for the 1 of 'digits'") as error:
        one(protocol="ab_official")
    assert "'protocol.normalization=null'" in str(error.value)
    assert one("protocol.normalization=null", protocol="ab_official").protocol.normalization is not None


@pytest.mark.parametrize(
    "change",
    ["method.temperature=2.0", "protocol.optimizer.lr=0.2", "data.per_class=5", "seeds=[1]", "steps=5",
     "student=wrn_16_1", "protocol.augmentation.flip=true", "compute.precision=bfloat16", "evaluations=3"],
)  # fmt: skip
def test_identity_changes_with_what_affects_numbers(change: str) -> None:
    assert one(change).identity() != one().identity()


@pytest.mark.parametrize("change", ["title=another", "data.root=/elsewhere", "method.label=mine", "baseline=kd"])
def test_identity_does_not_change_with_names_and_folders(change: str) -> None:
    assert one(change).identity() == one().identity()


@pytest.mark.parametrize(
    ("overrides", "title"),
    [
        ((), "Digits, 5 steps"),
        (("steps=7", "data.per_class=5"), "Digits, 5 steps (steps=7, data.per_class=5)"),
        (
            ("steps=6", "steps=7", "seeds=2", "data.root=/elsewhere", "compute.compile=false"),
            "Digits, 5 steps (steps=7)",
        ),
        (("steps=7", "title=Mine"), "Mine"),
        (("tune=null",), "Digits, 5 steps (tune=null)"),
    ],
)
def test_a_title_says_what_was_laid_over_its_recipe(overrides: tuple[str, ...], title: str) -> None:
    recipe = DIGITS | {"method": "kd", "title": "Digits, 5 steps"}
    changed = plan(recipe, REGISTRY, overrides)
    assert changed.title == title
    assert plan(changed.recipe, REGISTRY).title == title, "what recipe.json keeps"
    assert planned(*overrides, method="kd").title in ("", "Mine")


def test_identity_does_not_change_with_a_hook_point_that_nothing_reads() -> None:
    spec = one(method="ab")
    hooks = dict(spec.student.hooks)  # type: ignore[call-overload]
    more = spec.student.model_copy(update={"hooks": hooks | {"layer9": "somewhere"}})
    moved = spec.student.model_copy(update={"hooks": hooks | {"layer1.preact": "somewhere"}})
    assert spec.model_copy(update={"student": more}).identity() == spec.identity()
    assert spec.model_copy(update={"student": moved}).identity() != spec.identity()


def test_identity_changes_with_the_order_of_stages() -> None:
    spec = one(method="ab")
    turned = spec.method.model_copy(update={"stages": dict(reversed(spec.method.stages.items()))})
    assert spec.model_copy(update={"method": turned}).identity() != spec.identity()


def test_teachers_of_one_name_do_not_share_a_cohort(tmp_path: Path) -> None:
    """Every student of kdbench lies in a file called student.safetensors."""
    teachers = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "student.safetensors").write_bytes(name.encode())
        teachers.append({"model": "wrn_16_2", "weights": str(tmp_path / name / "student.safetensors")})
    cells = planned(method="kd", teacher=teachers[0], compare={"teacher": teachers}).cells
    assert len(cells) == 2
    assert len(cohorts_of([CellState(cell, i, tmp_path / str(i)) for i, cell in enumerate(cells)])) == 2
    assert {spec.teacher.name for cell in cells if (spec := cell.spec).teacher} == {"wrn_16_2 (student.safetensors)"}
    # What it is called is part of no identity, and of its folder only as far as any system takes it.
    (one, _), name = (cell.spec for cell in cells), "timm:resnet18 (teacher.pth)"
    assert one.teacher is not None
    renamed = one.model_copy(update={"teacher": one.teacher.model_copy(update={"name": name})})
    assert renamed.identity() == one.identity() and renamed.teacher is not None
    assert teacher_folder(renamed.teacher, tmp_path).name.startswith("timm_resnet18 (teacher.pth)-")


def test_a_teachers_own_normalization_counts() -> None:
    own = {"name": "wrn_16_2_digits", "normalization": {"mean": [0.5], "std": [0.5]}}
    spec = one(teacher=own)
    assert spec.teacher is not None and spec.teacher.normalization.mean == [0.5]
    assert spec.identity() != one().identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [("data.per_class=5000", "too few"), ("data.validation=5000", "too few"), ("data.validation=1.5", "below 1"),
     ("evaluations=-1", "evaluations"), ("protocol.augmentation={padding: 9, mode: reflect}", "reflect padding"),
     ("protocol.optimizer.lr=.inf", "finite")],
)  # fmt: skip
def test_what_cannot_be_is_told_before_anything_runs(change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        one(change)


def test_the_place_of_what_is_wrong_in_a_method_is_the_most_particular_that_the_recipe_has(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "data: digits\nstudent: wrn_10_1\nprotocol:\n  name: digits\n  optimizer: {lr: 0.2}\n"
        "compare:\n  method:\n  - ce\n"
    )
    made = plan(file, REGISTRY)
    for said, line in (("optimizer 'sgd': no", 5), ("loss 'ce' (ce:no) gave nan", 8), ("there is nothing", 8)):
        placed = made.placed(UserError(f"method 'ce', stage 'classification': {said}"))
        assert placed.where == f"{file}:{line}"


TAUGHT, OWN = {"name": "wrn_16_2_digits"}, {"model": "wrn_10_1", "weights": "a.pt"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"name": "digits", "tested_on": "validation"}}, "needs a validation part"),
        ({"teacher": {"several": [TAUGHT, TAUGHT], "classes": 3}}, "write settings beside each"),
        ({"teacher": {"several": [TAUGHT, {"several": [TAUGHT, TAUGHT]}]}}, "cannot hold other lists"),
        ({"teacher": {"model": "wrn_10_1", "untrained": True, "accuracy": 90.0}}, "an untrained teacher has"),
        ({"teacher": {**OWN, "untrained": True}}, "an untrained teacher has"),
        ({"teacher": {"model": "wrn_10_1"}}, "or 'model' and 'weights'"),
        ({"teacher": {"weights": "a.pt"}}, "or 'model' and 'weights'"),
        ({"teacher": TAUGHT | {"model": "wrn_10_1"}}, "brings its own"),
        ({"teacher": TAUGHT | {"weights": "a.pt"}}, "brings its own"),
        ({"teacher": OWN | {"trained": True}}, "with 'weights' is not trained"),
        ({"teacher": TAUGHT | {"accuracy": 90.0}}, "'accuracy' and 'classes' go with 'weights'"),
        ({"teacher": TAUGHT | {"classes": 3}}, "'accuracy' and 'classes' go with 'weights'"),
        ({"teacher": OWN | {"accuracy": 90.0, "classes": 3}}, "other classes cannot be checked"),
        ({"teacher": TAUGHT | {"crop": 3}}, "both networks see one view"),
    ],
)
def test_what_a_recipe_cannot_say_at_once_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        planned(**{"method": "kd"} | changes)


def test_a_wrong_mapping_is_told_where_it_was_written_last(tmp_path: Path) -> None:
    """Whether all its keys were laid over an included one, or one of them."""
    (tmp_path / "base.yaml").write_text("data: {name: digits, per_class: 10}\nstudent: wrn_10_1\nprotocol: digits\n")
    for mine in ("{name: digits, per_class: 10, fraction: 0.5}", "{fraction: 0.5}"):
        (tmp_path / "mine.yaml").write_text(f"include: base.yaml\ndata: {mine}\nmethod: ce\n")
        with pytest.raises(UserError, match="cannot be combined: 'null' takes one away") as error:
            plan(tmp_path / "mine.yaml", REGISTRY)
        assert error.value.where == f"{tmp_path / 'mine.yaml'}:2"
    tune = "tune: {trials: 2, seeds: [9], validation: 0.1, kd.temperature: {low: 1, high: 2}}\n"
    (tmp_path / "tune.yaml").write_text(f"include: base.yaml\nmethod: kd\nteacher: wrn_16_2_digits\n{tune}")
    for text, told in (
        ("{low: 3, high: 2}", "must be below 'high'"),
        ("{low: 0, high: 1, log: true}", "must be below"),
    ):
        with pytest.raises(UserError, match=told) as error:
            plan(tmp_path / "tune.yaml", REGISTRY, (f"tune.kd.temperature={text}",))
        assert error.value.where is not None and error.value.where.startswith("command line")
    with pytest.raises(UserError) as error:
        plan(tmp_path / "tune.yaml", REGISTRY, ("tune.kd.temperature.low=2",))
    assert error.value.hint and not error.value.hint.endswith("keys ")
