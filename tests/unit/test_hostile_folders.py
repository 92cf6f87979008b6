"""Folders are only data: whatever stands in one, every command that takes it says what is wrong and where, with no
traceback, writes nothing outside and takes no other number for it."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from shipped import REGISTRY

import kdbench
from kdbench.cli import main
from kdbench.engine.computing import compute
from kdbench.engine.folders import teacher_folder
from kdbench.engine.networks.weight_files import read_weights
from kdbench.engine.options import Listener, Options
from kdbench.engine.teachers import files as teacher_files
from kdbench.engine.teachers import logit_files
from kdbench.engine.teachers.anchors import Route
from kdbench.engine.workers import runner
from kdbench.errors import UserError
from kdbench.files import sha256_of
from kdbench.methods.deep_inversion.made import MadeImages
from kdbench.reading import LARGEST, inside, parsed, plain_name, read_json
from kdbench.recipe.choices import ComputeChoice
from kdbench.recipe.planning import Plan, plan, run_name
from kdbench.recipe.specs import CellSpec
from kdbench.record import read_record
from kdbench.results.tables import build
from kdbench.results.texts import texts
from kdbench.tree import Tree
from kdbench.verify.rerun import rerun

CELLS = ["ce-seed0-dd220819", "kd-seed0-9d9a250a"]
CE, KD = CELLS
SECRET = "what nobody gave to publish"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/quickstart, of two finished cells, that verifies, and a secret outside of runs."""
    root = tmp_path_factory.mktemp("sound")
    folder, committed = root / "runs" / "quickstart", ROOT / "results" / "quickstart"
    for cell in CELLS:
        shutil.copytree(committed / cell, folder / cell)
    records = [read_record(folder / cell) for cell in CELLS]
    about = json.loads((committed / "recipe.json").read_text()) | {"cells": CELLS}
    about["recipe"] |= {"seeds": 1, "compare": {"method": ["ce", "kd"]}}
    (folder / "recipe.json").write_text(json.dumps(about))
    for name, text in texts(build(records), records).items():
        (folder / name).write_text(text)
    teacher = CellSpec.model_validate(records[1].spec).teacher
    assert teacher is not None
    shutil.copytree(committed / "teacher", teacher_folder(teacher, root / "runs"))
    pool = MadeImages(root / "runs" / "sources" / "synthesized" / "a", dict(POOL))
    pool.begin()
    pool.write(0, torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), {})
    (root / "outside" / "cell").mkdir(parents=True)
    (root / "outside" / "secret").write_text(SECRET)
    return root


@pytest.fixture
def run(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of its runs/quickstart to spoil, below the working folder."""
    shutil.copytree(sound, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here" / "runs" / "quickstart"


POOL: dict[str, Any] = {
    "teacher": "wrn_16_2",
    "classes": [0, 1],
    "image_shape": [1, 8, 8],
    "settings": {"iterations": 5},
}
COMMANDS: dict[str, list[str]] = {
    "verify": ["verify", "runs/quickstart"],
    "table": ["table", "runs/quickstart", "--out", "tables"],
    "publish": ["publish", "runs/quickstart"],
    "plot": ["plot", "runs/quickstart", "--out", "tables"],
    "boundary": ["analyse", "boundary", "runs/quickstart", "--no-download", "--device", "cpu"],
    "judge": ["analyse", "judge", "runs/sources", "by=runs/quickstart", "--no-download", "--device", "cpu"],
}
# All that read records.
READERS = ("table", "publish", "plot", "boundary", "judge", "load_student")


def call(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of a command, in this process: a traceback ends the test."""
    if command == "load_student":
        try:
            kdbench.load_student(Path("runs/quickstart") / KD)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    monkeypatch.setattr(sys, "argv", ["kdbench", *COMMANDS[command]])
    try:
        main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def put(path: str, content: str | bytes) -> Callable[[Path], None]:
    """Write a file of the run's folder."""

    def spoil(folder: Path) -> None:
        (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())

    spoil.file = Path(path).name  # type: ignore[attr-defined]
    return spoil


def change(path: str, dotted: str, value: Any) -> Callable[[Path], None]:
    """Set one entry of a JSON file; a value may be text that json.dumps would not write."""

    def spoil(folder: Path) -> None:
        data = json.loads((folder / path).read_text())
        inner = data
        *parents, leaf = dotted.split(".")
        for key in parents:
            inner = inner[key]
        inner[leaf] = "HERE" if isinstance(value, Raw) else value
        text = json.dumps(data)
        (folder / path).write_text(text.replace('"HERE"', value, 1) if isinstance(value, Raw) else text)

    spoil.file = Path(path).name  # type: ignore[attr-defined]
    return spoil


class Raw(str):
    """JSON as it stands."""


def link(path: str, to: str) -> Callable[[Path], None]:
    """Put a link in a file's or folder's place."""

    def spoil(folder: Path) -> None:
        place = folder / path
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        place.symlink_to(to)

    return spoil


def cell_elsewhere(folder: Path) -> None:
    shutil.move(folder / KD, folder.parent.parent / "outside" / "moved")
    (folder / KD).symlink_to("../../outside/moved")


def pipe(folder: Path) -> None:
    """A reader would wait forever."""
    (folder / KD / "record.json").unlink()
    os.mkfifo(folder / KD / "record.json")


def named_twice(folder: Path) -> None:
    text = (folder / KD / "record.json").read_text()
    (folder / KD / "record.json").write_text(text.replace('"last":', '"last": 99.9,\n "last":', 1))


DEEP = "[" * 100_000 + "]" * 100_000
RECORD, METRICS = f"{KD}/record.json", f"{KD}/metrics.jsonl"
POOL_FILE = "../sources/synthesized/a/pool.json"

# What is done to the folder, and the commands that must refuse it. How each file is read is tested below and in
# test_record.
VARIANTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    # recipe.json: names are no paths.
    "name is a path up": (change("recipe.json", "name", "../evil"), ("publish", "verify", "table")),
    "name is a number": (change("recipe.json", "name", 5), ("publish", "verify")),
    "name has an escape": (change("recipe.json", "name", "\x1b[2Jx"), ("publish", "verify")),
    "a cell is a path up": (change("recipe.json", "cells", [CE, "../../outside/cell"]), ("publish", "verify", "table")),
    "a cell is a number": (change("recipe.json", "cells", [CE, 7]), ("publish", "verify", "table")),
    "a cell is there twice": (change("recipe.json", "cells", [CE, KD, CE]), ("publish", "verify", "table")),
    "cells are a mapping": (change("recipe.json", "cells", {CE: 1}), ("publish", "verify", "table")),
    "cells are a text": (change("recipe.json", "cells", CE), ("publish", "verify", "table")),
    "cells are none": (change("recipe.json", "cells", []), ("publish", "table")),
    "title is a list": (change("recipe.json", "title", [1]), ("publish", "verify", "table")),
    "recipe.json is null": (put("recipe.json", "null"), ("publish", "verify", "table")),
    "recipe.json is no JSON": (put("recipe.json", "{"), ("publish", "verify", "table")),
    "recipe.json is deep": (put("recipe.json", DEEP), ("publish", "verify", "table")),
    "recipe.json is huge": (put("recipe.json", b"[" + b"0," * LARGEST + b"0]"), ("publish", "verify", "table")),
    "recipe.json is binary": (put("recipe.json", b"\xff\xfe\x00"), ("publish", "verify", "table")),
    # Links.
    "a cell is a link that leaves": (cell_elsewhere, ("publish", "verify", "table")),
    "a table is a link that leaves": (link("table.md", "../../outside/secret"), ("publish",)),
    "metrics are a link that leaves": (link(METRICS, "../../../outside/secret"), ("publish", "verify", "plot")),
    "a cell is a link to itself": (link(KD, KD), ("publish", "verify", "table")),
    # SHA256SUMS.
    "sums lead outside": (put("SHA256SUMS", f"{'0' * 64}  ../../outside/secret\n"), ("verify",)),
    "sums are absolute": (put("SHA256SUMS", f"{'0' * 64}  /dev/zero\n"), ("verify",)),
    "sums are binary": (put("SHA256SUMS", b"\xff\x00"), ("verify",)),
    # record.json.
    "a record is a pipe": (pipe, ("publish", "verify")),
    "a record is deep": (put(RECORD, '{"schema": 1, "kdbench": ' + DEEP + "}"), ("verify", *READERS)),
    "an accuracy is NaN": (change(RECORD, "result.test.last", float("nan")), ("verify", "table")),
    "an accuracy stands twice": (named_twice, ("verify", "table")),
    "a label has an escape": (change(RECORD, "cell.label", "\x1b[2J"), ("verify", "table")),
    "a schedule is a number": (change(RECORD, "spec.method.stages.classification.schedule", 5), ("verify", "table")),
    "no data": (change(RECORD, "spec.data", None), ("verify",)),
    "a budget of forever": (change(RECORD, "spec.protocol.epochs", 1e306), ("verify",)),
    "tests without end": (change(RECORD, "spec.evaluations", 10**9), ("verify",)),
    "no training images": (change(RECORD, "data.train", 0), ("verify",)),
    "the teacher's name is a path": (change(RECORD, "spec.teacher.name", "../../../outside"), ("verify", "publish")),
    # metrics.jsonl.
    "metrics have a list": (put(METRICS, "[1]\n"), ("verify", "publish", "plot")),
    "metrics have no accuracy": (put(METRICS, '{"step": 1, "test": {"acc": 5}}\n'), ("verify", "publish")),
    # Pools of made images.
    "a pool is a list": (put(POOL_FILE, "[]"), ("judge",)),
    "a batch has no number": (put("../sources/synthesized/a/batch_x.json", "{}"), ()),
}


def tree(folder: Path) -> dict[str, str]:
    """Files that are not of the run or of what is to be written."""
    own = ("runs/quickstart/", "results/", "tables/")
    files = (file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    named = {file.relative_to(folder).as_posix(): file for file in files}
    return {name: file.read_bytes().hex()[:200] for name, file in named.items() if not name.startswith(own)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_hostile_folder_is_refused(
    variant: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, refusing = VARIANTS[variant]
    spoil(run)
    before = tree(run.parent.parent)
    for command in dict.fromkeys(("publish", "verify", *refusing)):
        code = call(command, monkeypatch)
        said = capsys.readouterr()
        assert code in ((0, 1, 2) if command == "verify" else (0, 2)), (command, said)
        if command in refusing:
            assert code, (command, said)
            message = said.out if code == 1 else said.err
            assert ("disagrees " if code == 1 else "error: ") in message, (command, message)
            # It names the file, or the name that is none.
            spoilt = getattr(spoil, "file", None) if code == 2 else None
            assert spoilt is None or spoilt in message or "the name" in message, (command, message)
            assert "instance of" not in message and len(message) < 5000, (command, message)
            if command == "publish":
                assert not list(Path("results").glob("*")), command
    assert tree(run.parent.parent) == before
    kept = [file for file in Path().glob("results/**/*") if file.is_file()]
    assert not [file for file in kept if SECRET in file.read_text(errors="replace")]


def test_the_folder_as_it_was_is_taken(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing above is refused for another reason. A link that stays in the folder is none that leaves it."""
    assert call("verify", monkeypatch) == call("table", monkeypatch) == call("plot", monkeypatch) == 0
    (run / "more.png").symlink_to("table.md")
    assert call("publish", monkeypatch) == 0
    published = {file.relative_to("results/quickstart").as_posix() for file in Path("results").rglob("*.json")}
    assert published == {"recipe.json", *(f"{cell}/record.json" for cell in CELLS), "teacher/record.json"}


class Trained(Exception):
    """Stands for training: everything that was read before is believed."""


def begun_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kdbench run` on a prepared folder, up to the first thing that a worker would be asked to do."""

    def session(options: Options, listener: Listener) -> None:
        raise Trained

    monkeypatch.setattr(runner, "Session", session)
    runner.run(planned(), Options(runs=folder.parent))


@functools.cache
def planned() -> Plan:
    recipe = {"data": "digits", "student": "wrn_10_1", "protocol": "digits", "steps": 1, "method": "ce"}
    return plan(recipe, REGISTRY)


KEY = compute.key(ComputeChoice())
PLAIN = {"precision": "float32", "layout": "contiguous", "compile": False, "cuda_graphs": False, "worth": 0}


def chosen(**over: Any) -> str:
    entry = {"asked": {}, "computing": PLAIN | over, "why": "", "tried": []}
    return json.dumps({KEY: entry})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("compute.json", "null"),
        ("compute.json", "{"),
        ("compute.json", DEEP),
        ("compute.json", json.dumps({KEY: None})),
        ("compute.json", json.dumps({KEY: {"computing": PLAIN}})),
        ("compute.json", chosen(precision="int4")),
        ("compute.json", chosen(precision=None)),
        ("compute.json", chosen(layout="diagonal")),
        ("compute.json", chosen(compile="yes")),
        ("compute.json", chosen(worth=-1)),
        ("compute.json", chosen(speed="ludicrous")),
        ("cell.json", "null"),
        ("cell.json", '{"threads"'),
        ("cell.json", "[1]"),
        ("cell.json", '{"threads": "many"}'),
        ("cell.json", '{"threads": -1}'),
        ("cell.json", '{"threads": 0}'),
        ("cell.json", '{"threads": 1000000000}'),
        ("cell.json", '{"threads": 1.5}'),
        ("cell.json", '{"threads": true}'),
        ("cell.json", '{"threads": 1, "logits": 3}'),
        ("cell.json", '{"threads": 1, "seed": 3}'),
    ],
)
def test_how_a_run_began_is_not_believed_unread(
    name: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "recipe" / (name if name == "compute.json" else f"{planned().cells[0].slug}/{name}")
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(UserError) as error:
        begun_run(tmp_path / "recipe", monkeypatch)
    assert error.value.where == str(file) and error.value.hint and "remove" in error.value.hint


def test_a_choice_against_the_recipe_is_refused(tmp_path: Path) -> None:
    choice = ComputeChoice(precision="bfloat16")
    (tmp_path / "compute.json").write_text(chosen().replace(json.dumps(KEY), json.dumps(compute.key(choice))))
    with pytest.raises(UserError, match="precision float32, the recipe says bfloat16"):
        compute.kept(tmp_path, choice)


def test_a_sound_beginning_and_a_link_of_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = tmp_path / "runs" / "recipe" / planned().cells[0].slug
    cell.mkdir(parents=True)
    (cell / "cell.json").write_text('{"threads": 3, "logits": ""}')
    (cell.parent / "compute.json").write_text(chosen())
    with pytest.raises(Trained):
        begun_run(cell.parent, monkeypatch)
    shutil.move(cell, tmp_path / "elsewhere")
    cell.symlink_to("../../elsewhere")
    with pytest.raises(UserError, match="points outside the folder"):
        begun_run(cell.parent, monkeypatch)


def test_threads_of_a_record_are_not_believed_unread(run: Path) -> None:
    change(RECORD, "compute.threads", 10**9)(run)
    record = read_record(run / KD)
    spec = CellSpec.model_validate(record.spec)
    with pytest.raises(UserError, match="threads"):
        rerun(record, spec, [], [], Options(runs=Path("again")), Listener())


@pytest.mark.parametrize(
    "name", ["..yaml", "...yaml", ".yaml", "teachers.yaml", "Sources.yaml", "CON.yaml", "a .yaml", "a\tb.yaml",
             "a:b.yaml", "a\u202eb.yaml", ". ..yaml", "nul.x.yaml", f"{'x' * 300}.yaml"],
)  # fmt: skip
def test_a_run_is_called_so_that_it_has_a_folder_of_its_own(name: str) -> None:
    with pytest.raises(UserError, match="folder named after the recipe") as error:
        run_name(f"somewhere/{name}")
    assert error.value.hint == "rename the recipe's file"


def test_a_recipe_with_such_a_name_is_refused_and_others_are_not(tmp_path: Path) -> None:
    recipe = "{data: digits, student: wrn_10_1, protocol: digits, steps: 1, method: ce}"
    (tmp_path / "teachers.yaml").write_text(recipe)
    with pytest.raises(UserError, match="keep shared files"):
        plan(tmp_path / "teachers.yaml", REGISTRY)
    for name in ("a b", "kd.v2", "-x", "дистилляция", "100%", "teachers2"):
        assert run_name(f"x/{name}.yaml") == name


def test_runs_whose_names_differ_in_case_alone_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Recipe").mkdir()
    with pytest.raises(UserError, match="another run, 'Recipe'"):
        begun_run(tmp_path / "recipe", monkeypatch)


def test_a_cell_of_many_words_has_a_name_that_file_systems_take(tmp_path: Path) -> None:
    recipe = {"data": "digits", "student": "wrn_10_1", "protocol": "digits", "steps": 1, "method": "ce"}
    long = [{"root": letter * 150} for letter in "äb"]
    cells = plan({**recipe, "compare": {"data.root": [one["root"] for one in long]}}, REGISTRY).cells
    many = plan({**recipe, "compare": {"data.root": ["ж" * 150]}}, REGISTRY).cells
    for cell in [*cells, *many]:
        inside(tmp_path, cell.slug).mkdir()
        assert cell.slug.endswith(cell.spec.identity()[:8])


@pytest.mark.parametrize(
    "accuracy",
    ["99", None, -1, 100.5, [1], True, Raw("NaN"), Raw("1e999"), Raw(DEEP), Raw("")],
    ids=lambda v: str(v)[:8],
)
def test_a_teachers_kept_accuracy_of_another_form_is_measured_again_and_told(
    accuracy: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, key = tmp_path / "teacher.json", {"sha256": "a", "data": "b"}

    def kept(key: dict[str, str]) -> teacher_files.Seen:
        return teacher_files.kept(file, key, {}, lambda: teacher_files.Seen(12.5))

    seen = key | {"accuracy": 93.5, "reordered": None, "unused": 0}
    for before in (seen, seen | {"data": "c"}):
        file.write_text(json.dumps(before))
        assert kept(key).accuracy == (93.5 if before is seen else 12.5)
    change("teacher.json", "accuracy", accuracy)(tmp_path)
    assert kept(key).accuracy == 12.5
    assert "measured again" in caplog.text


def test_a_teachers_kept_accuracy_that_was_changed_is_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, key = tmp_path / "teacher.json", {"sha256": "a", "data": "b"}
    measured = iter([teacher_files.Seen(93.5), teacher_files.Seen(93.5)])
    for _ in range(2):
        assert teacher_files.kept(file, key, {"name": "mine"}, lambda: next(measured)).accuracy == 93.5
    file.write_text(file.read_text().replace("93.5", "83.5"))
    assert teacher_files.kept(file, key, {"name": "mine"}, lambda: next(measured)).accuracy == 93.5
    assert "measured again" in caplog.text and not [*measured]


@pytest.mark.parametrize(
    "over",
    [{"done": "all"}, {"done": -1}, {"done": 10**12}, {"key": []},
     {"filled": "1"}, {"filled": "5"}, {"filled": "0x3"}, {"filled": 3},
     {"key": {"images": 0, "views": 1, "classes": 1, "precision": "float32"}},
     {"seconds": None}, {"name": 5}, {"more": 1}],
    ids=str,
)  # fmt: skip
def test_a_table_of_logits_is_not_believed_unread(
    over: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KDBENCH_HOME", str(tmp_path))
    key = {"images": 2, "views": 3, "classes": 4, "precision": "float32"}
    table = logit_files.table_at(key, "a")
    table.folder.mkdir(parents=True)
    about = {"name": "a", "key": key, "done": 2, "seconds": 1.0}
    (table.folder / "table.json").write_text(json.dumps(about))
    assert logit_files.table_at(key, "a").done == 2 and len(logit_files.tables()) == 1
    (table.folder / "table.json").write_text(json.dumps(about | over))
    with pytest.raises(UserError, match="damaged"):
        logit_files.table_at(key, "a")
    assert not logit_files.tables() and "damaged" in caplog.text
    # Of another teacher, with more images …: its folder's name alone is no proof.
    (table.folder / "table.json").write_text(json.dumps(about | {"key": key | {"weights": "x"}}))
    with pytest.raises(UserError, match="does not match its folder"):
        logit_files.table_at(key, "a")


@pytest.mark.parametrize("about", ["{}", "null", DEEP, '{"sha256": "../x"}', '{"sha256": 5}'], ids=lambda v: v[:18])
def test_what_a_batch_of_made_images_says_is_not_believed_unread(about: str, tmp_path: Path) -> None:
    pool = MadeImages(tmp_path, dict(POOL))
    pool.begin()
    pool.write(0, torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), {})
    (tmp_path / "batch_00000.json").write_text(about)
    with pytest.raises(UserError, match="damaged") as error:
        pool.read(0)
    assert error.value.where == str(tmp_path / "batch_00000.json") and error.value.hint


@pytest.mark.parametrize(
    "tensors",
    [{}, {"images": torch.zeros(2, 1, 8, 8)}, {"images": torch.zeros(2, 8).half(), "labels": torch.zeros(2).long()},
     {"images": torch.zeros(2, 1, 8, 8).half(), "labels": torch.zeros(3).long()}],
)  # fmt: skip
def test_made_images_of_another_form_are_refused_though_their_sum_fits(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    pool = MadeImages(tmp_path, dict(POOL))
    save_file(tensors, pool.file(0))
    pool.file(0).with_suffix(".json").write_text(json.dumps({"sha256": sha256_of(pool.file(0))}))
    with pytest.raises(UserError, match="batch of (synthesized )?images") as error:
        pool.read(0)
    assert error.value.where == str(pool.file(0)) and error.value.hint


@pytest.mark.parametrize(
    "about",
    ["{}", DEEP, json.dumps(POOL | {"classes": "x"}), json.dumps(POOL | {"image_shape": [1]})],
    ids=lambda v: v[:18],
)
def test_what_a_pool_of_made_images_says_is_not_believed_unread(about: str, tmp_path: Path) -> None:
    (tmp_path / "pool.json").write_text(about)
    with pytest.raises(UserError, match="damaged") as error:
        MadeImages.at(tmp_path)
    assert error.value.where == str(tmp_path / "pool.json") and error.value.hint


def test_a_file_of_weights_that_holds_something_else_is_told(tmp_path: Path) -> None:
    for content in ([1, 2], torch.zeros(2), {1: torch.zeros(2)}, {"a": torch.zeros(2), "epoch": 3}, {"a": "text"}):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(UserError, match="holds no state dict") as error:
            read_weights(tmp_path / "w.pth")
        assert error.value.where == str(tmp_path / "w.pth") and error.value.hint


def test_yaml_without_end_is_refused(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefgh")
    )
    for text, says in (("[" * 5000 + "]" * 5000, "nest"), (bomb, "aliases"), ("{a: " * 999, "YAML")):
        with pytest.raises(UserError, match=says):
            Tree.parse(text, "here")


def test_a_checkpoint_of_a_route_lies_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    for name in ("../x", str(tmp_path / "x")):
        with pytest.raises(UserError, match="the name"):
            Route(tmp_path / "route", ({"file": name, "sha256": "", "step": 1},)).weights(0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": {"b": [0, NaN]}}', "'a.b.1': nan is not a number"),
        ('{"a": -Infinity}', "'a': -inf"),
        ('{"a": 1e400}', "'a': inf"),
        (f'{{"a": {10**30}}}', "'a': this number is too large"),
        ('{"a": 1e308}', "'a': this number is too large"),
        ('{"a": 1, "a": 2}', "given twice"),
        ('{"a\\u0007": 1}', "the character"),
        ('{"a": "\\ud83d"}', "the character"),
        ("[" * 101 + "]" * 101, "nested more than 100"),
        ("1" * 5000, "damaged"),
        ("", "damaged"),
    ],
)
def test_what_no_program_of_ours_writes_is_refused_with_its_place(text: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        parsed(text, "here")
    assert says in error.value.what and error.value.where == "here"


def test_what_ours_write_comes_back(tmp_path: Path) -> None:
    data = {"a": [1, -2.5, True, None, "é\n\t😀"], "b": {"c": "[" * 99}}
    assert parsed(json.dumps(data), "") == data
    assert parsed("[" * 100 + "]" * 100, "")
    assert str(parsed('{"loss": NaN}', "", finite=False)["loss"]) == "nan"


def test_no_file_and_a_folder_are_told(tmp_path: Path) -> None:
    for place, says in (
        (tmp_path / "absent", "no such file"),
        (tmp_path, "not a regular file"),
        (Path("/dev/null"), "not a regular file"),
    ):
        with pytest.raises(UserError, match=says) as error:
            read_json(place, "do this")
        assert error.value.where == str(place) and error.value.hint == "do this"


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".git", "a/b", "/a", "a\\b", "a\0b", "a\n", " a", "a.", "aux.txt", "x" * 201]
)
def test_a_name_from_data_leads_to_nowhere_else(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        plain_name(name)
    with pytest.raises(UserError) as error:
        inside(tmp_path, "a", name)
    assert error.value.where == str(tmp_path) and error.value.hint
