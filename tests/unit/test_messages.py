"""What a user can cause is one message with its place and a way out, told soon; output fits where it goes."""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from conftest import ROOT
from fuzzing import Found, folders, recipes
from rich.console import Console
from rich.table import Table
from shipped import REGISTRY
from synthetic import comparison

from kdbench import api, cli
from kdbench.__main__ import main
from kdbench.cards import LossCard, MethodCard
from kdbench.cli import analyse, check, output, publish
from kdbench.cli import show as showing
from kdbench.cli.console import show
from kdbench.engine.checks.cells import check_cell
from kdbench.engine.computing.device import available_memory, peak_resident
from kdbench.engine.options import check_device
from kdbench.engine.workers.messages import Failed
from kdbench.engine.workers.worker import Worker
from kdbench.errors import UserError, counted
from kdbench.files import no_formula, refused, write_text
from kdbench.recipe.choices import Recipe
from kdbench.recipe.planning import plan
from kdbench.registry import Registry
from kdbench.results.tables import build
from kdbench.tree import Tree, plain
from kdbench.validation import validated

RECIPE = """data: digits
teacher: wrn_16_2_digits
student: wrn_10_1
protocol: digits
steps: 20
"""


def written(folder: Path, more: str) -> str:
    keys = {line.partition(":")[0] for line in more.splitlines()}
    kept = [line for line in RECIPE.splitlines() if line.partition(":")[0] not in keys]
    (folder / "r.yaml").write_text("\n".join([*kept, more]), encoding="utf-8")
    return str(folder / "r.yaml")


@pytest.mark.parametrize(
    ("more", "line", "said"),
    [
        ("method: {name: kd, label: 3}", 6, "a label is a text, not 3"),
        ("method: kd\nprotocol:\n\tname: digits", 7, "indent with spaces"),
        ("method: kd\nprotocol: {name: digits, optimizer: SGD}", 6, "did you mean 'sgd'?"),
        ("method: kd\nprotocol: {name: digits, schedule: {name: multistep, at: [150]}}", 6, "a share its sign: '30%'"),
        ("method: kd\nstudent: mynet", 6, "your own network: 'timm:NAME'"),
        ("compare: {method: [ce, {name: kd, label: 2020-01-01}]}", 6, "a label is a text"),
        ("method: {name: 3}", 6, "the name of a method is a text, not 3"),
        ("method: {name: {name: kd}}", 6, "the name of a method is a text"),
        ("method: {name: null}", 6, "the name of a method is a text, not None"),
        ("method: kd\nteacher: [wrn_16_2_digits, wrn_10_1]", 6, "unknown teacher 'wrn_10_1'"),
        ("method: kd\nseeds: 100000000", 7, "100,000,000 cells, more than 10,000"),
        ("method: kd\nseeds: 10000000000000000000000000", 7, "number is too large"),
        (f"method: kd\ndata: {{name: digits, validation: {10**400}}}", 6, "number is too large"),
        ("method: kd\nevaluations: 100000000", 7, "less than or equal to 100000"),
        ("compare: {method: [kd], data.split_seed: [1, 2, 3], steps: &s [1,1,1,1], seeds: *s}", 6, "unknown path"),
        ("method: kd\nprotocol: {name: ab_official, augmentation: {resized_crop: [0.1, 1.0]}}", 6, "padding: 0"),
        ("method: kd\ntemperature: 4", 7, "'method.temperature'"),
        ("method: kd\nseed: 4", 7, "'seeds=[42]' is the one seed 42"),
        ("method: kd\nlr: 4", 7, "'protocol.optimizer.lr'"),
        ("method: {name: ce, stages: {classification: {losses: {loss: {loss: kd}}}}}", 6, "be called 'loss'"),
        ("method: {name: kd}\nstudent: 2024", 6, "must be in quotes"),
        ("method: no", 6, "must be in quotes"),
        ("method: kd\ntitle: on", 7, "must be in quotes"),
        ("method: kd\ntitle: 2024-01-01", 7, "cannot be 2024-01-01"),
        ("method: kd\nsteps: 017", 6, "'017' would be read as 15"),
        ("method: kd\nsteps: 1:30", 6, "'1:30' would be read as 90"),
        ("method: kd\nprotocol: {name: digits, optimizer: {lr: 1:30.5}}", 6, "would be read as 90.5"),
        *(
            (
                f"method: {{name: ab, stages: {{boundaries: {{share: {given}}}}}}}",
                6,
                "a share is written like '30%', not ",
            )
            for given in ("0.1", "true", "ten %")
        ),
        ("method: kd\nseeds: -1", 7, "'seeds' cannot be -1\n"),
        ("method: kd\nevaluations: -1", 7, "'evaluations' cannot be -1\n"),
        (
            "method: kd\ndata: {name: digits, per_class: 300}",
            6,
            "too few for this choice\n  'per_class' can be 119 at most",
        ),
        ('method: kd\ntitle: "a\\u001b[31m"', 7, r"a text contains the character"),
        *(
            (f"method: kd\n{more}", 7 if more.startswith("evaluations") else 6, f"one thing, not a list\n  {hint}")
            for more, hint in (
                ("data: {name: digits, fraction: [0.1, 1.0]}", "to compare several: 'compare: {data.fraction: […]}'"),
                ("evaluations: [1, 2]", "to compare several: 'compare: {evaluations: […]}'"),
                ("protocol: [crd, digits]", "to compare several: 'compare: {protocol: […]}'"),
                (
                    "protocol: {name: digits, optimizer: [sgd, adam]}",
                    "to compare several: 'compare: {protocol.optimizer: […]}'",
                ),
            )
        ),
        ("method: [ce, kd]", 6, "to compare several: 'compare: {method: […]}'"),
        ("method: {name: kd, temperature: [1, 2]}", 6, "to compare several, list them under 'compare'"),
        ("method: kd\ntitle: [a, b]", 7, "one thing, not a list\n  input should be a valid string"),
        ("method: kd\nseeds: [1, 1.5]", 7, "'seeds.1' cannot be 1.5"),
        ("method: kd\nteacher: [wrn_16_2_digits]", 6, "to compare teachers: 'compare: {teacher: […]}'"),
        ("method: kd\nteacher: {model: {name: wrn_10_1, hooks: 3}, weights: w.pt}", 6, "'teacher.model.hooks' cannot"),
    ],
)
def test_mistakes_are_told_with_their_line_and_a_way_out(more: str, line: int, said: str, tmp_path: Path) -> None:
    before = time.monotonic()
    with pytest.raises(UserError) as error:
        plan(written(tmp_path, more), REGISTRY)
    assert time.monotonic() - before < 2
    assert said in str(error.value) and str(error.value.where).endswith(f"r.yaml:{line}"), error.value


def test_what_is_left_to_a_stage_and_where_a_teachers_recipe_lies_is_told(tmp_path: Path) -> None:
    stages = [{"name": name, "losses": {"ce": {"loss": "cross_entropy"}}} for name in ("first", "second")]
    stages[0] |= {"share": "100%"}
    cards = {
        "methods": {"two": {"title": "Two", "stages": stages}},
        "teachers": {"mine": {"model": "wrn_10_1", "data": "digits", "recipe": "my_tech"}},
        "losses": {"strange": {"target": "strange:strange"}},
    }
    (tmp_path / "cards.yaml").write_text(yaml.safe_dump(cards))
    (tmp_path / "strange.py").write_text("def strange(features, targets):\n    return features\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.path", [*sys.path])
        own = Registry([tmp_path])
        with pytest.raises(UserError, match="sum to 100%, which leaves nothing to 'second'"):
            plan(written(tmp_path, "method: two"), own)
        with pytest.raises(
            UserError, match=r"cards.yaml:\d+: teacher 'mine': there is no recipe 'my_tech'\n  put it bes"
        ):
            plan(written(tmp_path, "method: kd\nteacher: mine"), own)
        more = "method: {name: kd, stages: {classification: {losses: {kd: {loss: strange}}}}}"
        with pytest.raises(UserError, match="needs 'features'\n.*begin with student, teacher or other"):
            plan(written(tmp_path, more), own)
    with pytest.raises(UserError, match=r"there is no recipe file 'abwrn.yaml'\n  did you mean 'ab_wrn'"):
        plan("abwrn.yaml", REGISTRY)


CARDS = """models:
  one: {target: "own:Flat", hooks: nohook}
  two: {target: "own:Flat"}
  three: {target: "own:Flat", width: 3}
connectors:
  bridge: {target: "own:Bridge"}
losses:
  far: {target: "own:far", args: {power: 3.0}}
  near: {target: "own:far"}
teachers:
  of_no_data: {model: wrn_16_2, data: nodata, recipe: quickstart}
  of_no_hooks: {model: {name: wrn_16_2, hooks: wrn}, data: digits, recipe: quickstart}
methods:
  bent:
    title: bent
    stages:
      - name: training
        trains: [student, connectors]
        losses:
          ce: {loss: cross_entropy}
          near: {loss: near, hook: layer2, connector: bridge}
  far: {title: far, stages: [{name: training, losses: {far: {loss: far}}}]}
  lost:
    title: lost
    parameters: {temperature: stages.training.losses.far.temperature}
    stages: [{name: training, losses: {far: {loss: nowhere}}}]
  alone: {title: alone, stages: [{name: training, losses: {it: {loss: near, hook: layer2}}}]}
"""
CODE = """from torch import nn


def far(student, teacher, *, power: float = 2.0):
    return (student - teacher).abs().pow(power).mean()


def Bridge(student_shape, teacher_shape):
    raise RuntimeError("no bridge")


class Flat(nn.Sequential):
    def __init__(self, *, classes, channels, image_size, width: int = 4):
        pixels = channels * image_size**2
        super().__init__(nn.Flatten(), nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, classes))
"""


@pytest.mark.parametrize(
    ("more", "line", "said"),
    [
        ("method: ce\nstudent: one", 2, "unknown hooks 'nohook'"),
        ("method: ce\nstudent: three", 4, "unknown key 'width'\n.*Options of its target stand under 'args'"),
        ("method: bent", 21, "method 'bent': training/near: .*connector 'bridge' cannot bridge"),
        ("method: far", 8, "unknown key 'args'\n.*stand where a method names it: '{loss: KEY"),
        ("method: kd\nteacher: of_no_data", 11, "unknown data set 'nodata'"),
        ("method: kd\nteacher: of_no_hooks", 12, "'model.hooks' cannot be 'wrn'\n  write a mapping"),
        ("method: alone", 27, "method 'alone', stage 'training': loss 'it' .*cannot be computed"),
        ("method: lost", 26, "unknown loss 'nowhere'"),
        ("method: at\nstudent: two", 0, "'two' has no hook points 'layers'\n.*'student: {name: MODEL, hooks: {layer1:"),
        ("method: kd\nstudent: two", 0, ""),
    ],
)
def test_what_is_wrong_on_a_card_is_told_with_its_line(more: str, line: int, said: str, tmp_path: Path) -> None:
    name = f"own_{tmp_path.name.strip('_').replace('-', '_')}"
    (tmp_path / "cards.yaml").write_text(CARDS.replace("own:", f"{name}:"))
    (tmp_path / f"{name}.py").write_text(CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.path", [*sys.path])
        own = Registry([tmp_path])

        def checked() -> None:
            planned = plan(written(tmp_path, more), own)
            try:
                check_cell(planned.cells[0].spec)
            except UserError as error:
                raise planned.placed(error) from None

        if not said:
            return checked()
        with pytest.raises(UserError, match=said) as error:
            checked()
    assert not line or str(error.value.where).endswith(f"cards.yaml:{line}"), error.value


@pytest.mark.parametrize(
    ("more", "place", "said"),
    [
        ("method: {name: kd, temperature: 0}", "r.yaml:6", "'temperature' of the loss 'kd' cannot be 0"),
        ("method: kd\nstudent: timm:nonsense", "r.yaml:6", "timm has no model 'nonsense'"),
        ("method: kd\nprotocol: {name: digits, optimizer: {lr: -1.0}}", "r.yaml:6", "learning rate must be at least 0"),
    ],
)
def test_what_is_found_when_networks_are_built_has_a_line_too(more: str, place: str, said: str, tmp_path: Path) -> None:
    planned = plan(written(tmp_path, more), REGISTRY)
    with pytest.raises(UserError) as error:
        check_cell(planned.cells[0].spec)
    placed = planned.placed(error.value)
    assert said in str(placed)
    assert str(placed.where).endswith(place), placed


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"data": {"name": "digits", "per_class": 13}, "protocol": {"batch_size": 43}}, "130 images, 43 each"),
        ({"data": {"name": "digits", "per_class": 10}, "protocol": {"batch_size": 1}}, "every batch is one image"),
        ({"data": {"name": "digits", "per_class": 13}, "protocol": {"batch_size": 43, "last_batch": "drop"}}, ""),
        ({"data": {"name": "digits", "per_class": 13}, "protocol": {"batch_size": 42}}, ""),
        ({"data": {"name": "digits", "per_class": 13}, "protocol": {"batch_size": 43}, "student": "wrn_10_1"}, ""),
    ],
)
def test_a_last_batch_of_one_image_is_told_before_training(over: dict[str, Any], said: str) -> None:
    recipe = {"student": "torchvision:resnet18", "method": "ce", "steps": 2} | over
    recipe["protocol"] = {"name": "digits", **over["protocol"]}
    spec = plan(recipe, REGISTRY).cells[0].spec
    if not said:
        check_cell(spec)
        return
    with pytest.raises(UserError, match=said) as error:
        check_cell(spec)
    assert "last_batch: drop" in str(error.value)


def test_numbers_of_numpy_and_paths_are_plain_ones() -> None:
    given = {"a": np.int64(3), "b": [np.float32(0.5), torch.tensor(2)], "c": Path("x"), "d": (True, np.bool_(False))}
    found = plain(given)
    assert found == {"a": 3, "b": [0.5, 2], "c": "x", "d": [True, False]}
    assert [type(value) for value in (found["a"], found["b"][1], found["d"][1])] == [int, int, bool]


def test_the_api_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    def stop(recipe: Any, registry: Any, overrides: tuple[str, ...]) -> None:
        taken.extend([recipe, overrides])
        raise UserError("enough")

    monkeypatch.setattr("kdbench.recipe.planning.plan", stop)
    with pytest.raises(UserError, match="enough"):
        api.run({"steps": np.int64(4)}, {"steps": np.int64(3), "data.root": Path("x")})
    assert taken == [{"steps": 4}, ("steps=3", 'data.root="x"')]


def test_a_module_is_not_called_as_what_every_method_has() -> None:
    card = REGISTRY.tree("methods", "simkd").put(("modules", "teacher"), Tree.of({"name": "linear"}, "card"))
    with pytest.raises(UserError, match="a module cannot be called 'teacher'"):
        validated(MethodCard, card, "method")


def test_a_metric_is_not_called_as_the_reference_of_another() -> None:
    place, target = ("metrics", "agreement_reference"), "kdbench.losses.ab:activation_agreement"
    card = REGISTRY.tree("losses", "activation_boundary").put(place, Tree.of(target, "card"))
    with pytest.raises(UserError, match="a metric cannot be called 'agreement_reference'"):
        validated(LossCard, card, "loss")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_of_every_encoding(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kdbench", "table", str(ROOT / "results" / "continual_small")],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    text = done.stdout.decode(encoding)
    assert ("+/-" if encoding == "ascii" else "±") in text


@pytest.mark.parametrize("width", [20, 40, 60, 100, 200])
def test_narrow_terminals_leave_out_columns_not_digits(width: int) -> None:
    table = Table("method", "accuracy", "difference", "interval")
    table.add_row("KD", "94.09 ± 1.06", "+4.71", "[+2.33, +7.08]")
    page = Console(width=width, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    show(page, table)
    text = page.export_text()
    shown = [value for value in ("94.09 ± 1.06", "+4.71", "[+2.33, +7.08]") if value in text]
    assert len(shown) == {20: 1, 40: 2, 60: 3, 100: 3, 200: 3}[width] or width == 20
    assert ("no room here for" in text) == (width < 60)


def test_brackets_in_titles_and_labels_are_no_markup(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    label = "KD [X] [/B]"
    recipe = written(tmp_path, f"title: 'T [/b]'\ncompare: {{method: [ce, {{name: kd, label: '{label}'}}]}}")
    check.command(recipe, time=False)
    output.print_table(build(comparison({"ce": [90.0, 91.0], label: [92.0, 93.5]}), baseline=label))
    said = capsys.readouterr().out
    assert said.startswith("T [/b]: 2 cells\n")
    assert {line.split("  ")[0].strip() for line in said.splitlines() if "[X]" in line} >= {label}
    assert f"difference to {label}" in said


def test_runs_of_one_name_are_not_published_over_each_other(tmp_path: Path) -> None:
    runs = [tmp_path / place / "run" for place in ("a", "b")]
    for run in runs:
        write_text(run / "recipe.json", '{"name": "run", "cells": ["kd-seed0-12345678"]}')
    with pytest.raises(UserError, match="one in place of the other"):
        publish.command(runs, tmp_path / "out", replace=True)
    with pytest.raises(UserError, match="not finished: 1 of 1 cell,"):
        publish.command([runs[0], tmp_path / "b" / ".." / "a" / "run"], tmp_path / "out", replace=True)


@pytest.mark.parametrize(("name", "option"), [("judge", "by"), ("attack", "teachers")])
def test_an_option_that_an_analysis_needs_is_told_as_it_is_written(name: str, option: str) -> None:
    with pytest.raises(UserError, match=f"analysis '{name}' needs '{option}'") as error:
        analyse.command(name, ["runs"])
    assert error.value.hint == f"write '{option}=VALUE': 'kdbench show analyses {name}' tells which"
    assert f"`{option}`" in REGISTRY.card("analyses", name).note


def test_one_of_a_thing_is_not_several() -> None:
    told = [counted(1, "cell"), counted(0, "cell"), counted(1, "class"), counted(2, "class"), counted(2, "batch")]
    assert told == ["1 cell", "0 cells", "1 class", "2 classes", "2 batches"]
    assert (counted(0.5, "epoch", "g"), counted(1.0, "epoch", "g"), counted(1000, "step", ",")) == (
        *("0.5 epochs", "1 epoch", "1,000 steps"),
    )


def test_no_text_in_csv_is_a_formula() -> None:
    assert [no_formula(value) for value in ("=1+1", "+4.71", "-3", "-2.5 2.5", "-x", "@a", "KD", -1.5, None)] == [
        *("'=1+1", "+4.71", "-3", "-2.5 2.5", "'-x", "'@a", "KD", -1.5, None)
    ]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("ls methods >&-", 0, ""),
        ("ls methods >&- 2>&-", 0, ""),
        ("ls methods >/dev/full", 2, "the disk is full"),
        (f"table {ROOT / 'results' / 'quickstart'} >/dev/full", 2, "the disk is full"),
        ("check quickstart steps=x 2>/dev/full", 2, ""),
        ("check quickstart $'title=\\xe9'", 2, r"command line: not in UTF-8: b'title=\xe9'"),
        ("check quickstart steps=", 2, "command line, 'steps=': there is no value\n  write 'steps=null' for no value"),
    ],
)
def test_odd_words_and_closed_or_full_outputs(words: str, code: int, said: str) -> None:
    command = f"{sys.executable} -m kdbench {words}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, env=environment, text=True, timeout=300)
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert done.stderr or not said


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), "the disk is full: runs/x\n  make room"),
        (OSError(errno.ENOSPC, "No space left", "runs/x", None, "results/x"), "the disk is full: results/x\n"),
        # As safetensors says it, and timm lets through.
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full: nothing more can be"),
        (OSError(errno.EACCES, "Permission denied", "runs/x"), "runs/x: permission denied\n  check that the path"),
        (OSError(errno.ENOENT, "No such file or directory"), "the folder in which this was started is no longer"),
    ],
)
def test_what_the_system_refuses_in_words(
    raised: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(cli, "app", full)
    monkeypatch.setattr(sys, "argv", ["kdbench"])
    with pytest.raises(SystemExit) as error:
        cli.main()
    assert error.value.code == 2 and f"error: {said}" in capsys.readouterr().err
    if isinstance(raised, OSError) and raised.filename:
        told = Worker(io.StringIO(), io.StringIO()).outcome(full)
        assert isinstance(told, Failed) and told.by_user and not told.trace


def test_characters_that_are_not_seen_are_shown() -> None:
    """As they come with text from a web page or a document; and no text of a file commands a terminal."""
    with pytest.raises(UserError) as error:
        REGISTRY.card("models", "wrn_10_1\u200b")
    assert "unknown model 'wrn_10_1\\u200b'" in str(error.value) and "did you mean 'wrn_10_1'" in str(error.value)
    assert str(UserError("ä – „漢字“\x1b[31m\nred\xa0", "x\ty", "ok")) == "x\\ty: ä – „漢字“\\x1b[31m\nred\\xa0\n  ok"


def test_a_file_that_must_not_be_written_has_the_name_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(path: Path, **_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refusing)
    with pytest.raises(PermissionError) as error:
        write_text(tmp_path / "table.md", "")
    assert str(refused(error.value)).startswith(f"{tmp_path / 'table.md'}: permission denied")


@pytest.mark.parametrize("device", ["mps", "mps:0", "xpu", "gpu"])
def test_other_accelerators_are_refused(device: str) -> None:
    with pytest.raises(UserError, match="does not compute on") as error:
        check_device(device)
    assert "Apple's GPU" in str(error.value)


def test_no_module_of_unix_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: there is neither /proc nor 'resource'."""

    def absent(*_: Any, **__: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(sys, "platform", "win32")
    assert peak_resident() == 0 and available_memory() is None


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("teachers/mine.yaml", "mine"),
        ("teachers/mine.yaml", "mine.yaml"),
        ("recipes/mine.yaml", "mine"),
        ("recipes/mine.yaml", "../recipes/mine.yaml"),
        ("elsewhere.yaml", "quickstart_teacher"),
    ],
)
def test_a_teachers_recipe_is_found_beside_its_card_and_by_name(place: str, name: str, tmp_path: Path) -> None:
    for folder in ("teachers", "recipes"):
        (tmp_path / folder).mkdir()
    (tmp_path / place).write_text("data: digits\nstudent: wrn_16_2\nprotocol: digits\nmethod: ce\nsteps: 5\n")
    (tmp_path / "teachers" / "cards.yaml").write_text(f"my_teacher: {{model: wrn_16_2, data: digits, recipe: {name}}}")
    recipe = {"data": "digits", "teacher": "my_teacher", "student": "wrn_10_1", "protocol": "digits", "method": "kd"}
    if place == "elsewhere.yaml":
        with pytest.raises(UserError, match="there is no recipe 'quickstart_teacher'"):
            plan(recipe, Registry([tmp_path]))
        return
    teacher = plan(recipe, Registry([tmp_path])).cells[0].spec.teacher
    assert teacher is not None and teacher.trained_by is not None and teacher.trained_by.protocol.steps == 5


def test_a_control_character_in_a_key() -> None:
    with pytest.raises(UserError, match="a key contains"):
        Tree.parse('"a\\u0007": 1', "x")


def test_hundreds_of_wrong_recipes_give_no_traceback(tmp_path: Path) -> None:
    """The whole: make fuzz."""
    found = Found(tmp_path / "found")
    recipes(300, 5, found)
    assert not found.faults, found.faults


def test_dozens_of_wrong_run_folders_give_no_traceback(tmp_path: Path) -> None:
    found = Found(tmp_path / "found")
    folders(30, 5, found, ROOT / "results" / "continual_small")
    assert not found.faults, found.faults


def test_an_interrupt_while_the_command_is_imported_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class Importing(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "kdbench.cli", Importing("kdbench.cli"))
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["data", "."], "kdbench.data.survey.survey"),
        (["check", "quickstart"], "kdbench.recipe.planning.plan"),
        (["run", "quickstart"], "kdbench.engine.workers.tuning.tuned"),
        (["logits", "fill", "quickstart"], "kdbench.engine.workers.filling.fill_logits"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_command_says_that_it_was_interrupted(
    words: list[str], where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(where, interrupted)
    monkeypatch.setattr(sys, "argv", ["kdbench", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    kept = (
        "interrupted: what is finished is kept, and checkpoints of what was training; repeat the command to continue\n"
    )
    assert end.value.code == 130 and said.endswith(kept) and "Trace" not in said


def test_a_worker_that_has_nothing_to_do_leaves_before_it_has_imported_torch() -> None:
    """Where its run has ended already."""
    words = [sys.executable, "-m", "kdbench.engine.workers.worker"]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("kind", ["losses", "recipes"])
def test_a_kind_alone_is_no_card(kind: str) -> None:
    with pytest.raises(UserError, match=f"(?s)which of the {kind}.*'kdbench ls {kind}' lists them"):
        showing.command(kind, None, None)


@pytest.mark.parametrize(("words", "way"), [(("--epochs", "3"), "epochs=3"), (("--seeds=[1]",), "seeds=[1]")])
def test_an_override_that_is_written_as_an_option_is_told(
    words: tuple[str, ...], way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kdbench", "run", "ab_wrn", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and f"write '{way}', without dashes" in capsys.readouterr().err
    cli.check_overrides(["run", "ab_wrn", "epochs=3", "--data", "x", "--jobs=2"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run"], "missing argument 'RECIPE'"),
        (["run", "quickstart", "--threads", "0"], "invalid value for '--threads': "),
        (["check", "quickstart", "--jobs", "0"], "invalid value for '--jobs': "),
        (["check", "quickstart", "--nope"], "no such option: --nope"),
        (["logits", "nope"], "no such command 'nope'"),
        (["run", "quickstart", "--data"], "option '--data' requires an argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words_that_no_command_knows_are_told_as_any_other_error(
    words: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kdbench", *words])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert re.fullmatch(rf"error: command line: {told}.*\n  see '.* --help'\n", said), said


def test_no_option_of_a_command_is_a_key_of_a_recipe() -> None:
    """But the folder of the data sets, which is left alone: any other would be refused."""
    commands = typer.main.get_command(cli.app).commands
    options = {word for name in ("run", "check") for one in commands[name].params for word in one.opts}
    assert options & {f"--{key}" for key in Recipe.model_fields} <= {"--data"}
