"""What a command finds around it: folders, home folders, permissions, streams, variables and disks of all kinds."""

from __future__ import annotations

import errno
import getpass
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors import SafetensorError
from shipped import REGISTRY

import kdbench
from kdbench.cli import main
from kdbench.cli.output import write_tables
from kdbench.cli.progress import clock
from kdbench.cli.run import failure, started_by_torchrun
from kdbench.engine import checkpoint
from kdbench.engine.cell import TrainingCell
from kdbench.engine.computing.compute import REFERENCE
from kdbench.engine.networks.weights import save_tensors
from kdbench.engine.options import Listener, Options
from kdbench.engine.scheduling import CellState
from kdbench.engine.teachers.anchors import keep_checkpoint
from kdbench.engine.workers.pool import worker_process
from kdbench.engine.workers.runner import Outcome
from kdbench.engine.workers.session import locked_run
from kdbench.errors import CellError, UserError
from kdbench.files import (
    BEFORE,
    CHECK_PATH,
    CHECKPOINT,
    TEACHERS,
    TRIALS,
    atomic,
    disk_full,
    expanded,
    home,
    sweep,
    workplace,
)
from kdbench.recipe.loading import load
from kdbench.recipe.planning import Plan
from kdbench.record import read_records, unfinished
from kdbench.registry import Registry
from kdbench.results.tables import build
from kdbench.results.texts import texts
from kdbench.signature import parameters
from kdbench.verify.verification import verify

CELLS = ["ce-seed0-dd220819", "kd-seed0-9d9a250a"]
NOBODY = "~nobody_is_called_so"
Said = pytest.CaptureFixture[str]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder `runs` with the run `quickstart` of two cells, and a third cell of an earlier plan of it."""
    folder, committed = tmp_path / "runs" / "quickstart", ROOT / "results" / "quickstart"
    for cell in [*CELLS, "kd-seed1-" + next(committed.glob("kd-seed1-*")).name.rpartition("-")[2]]:
        shutil.copytree(committed / cell, folder / cell)
    about = json.loads((committed / "recipe.json").read_text()) | {"cells": CELLS}
    (folder / "recipe.json").write_text(json.dumps(about))
    return tmp_path / "runs"


def called(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """The exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["kdbench", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.mark.parametrize("why", [None, "KD, seed 0: the loss was not finite at step 5, stage 'a', term x"])
def test_a_table_without_a_failed_cell_is_the_same_whoever_makes_it(why: str | None, runs: Path) -> None:
    """A run, `kdbench table` and `kdbench verify` know that cell by different ways."""
    run = runs / "quickstart"
    for file in (run / CELLS[1]).iterdir():
        file.unlink()
    told = f"Not finished and not in the table: {CELLS[1]}"
    if why is not None:
        told = f"Failed and not in the table: {why}"
        about = json.loads((run / "recipe.json").read_text()) | {"failed": {CELLS[1]: why}}
        (run / "recipe.json").write_text(json.dumps(about))
    write_tables([run / CELLS[0]], run, [CELLS[1]])
    assert f"**{told}.**" in (run / "table.md").read_text()
    assert not [found for found in verify(run, REGISTRY) if found.level == "disagrees" and "table" in found.where]
    again = texts(build(read_records(run), unfinished=unfinished(run)), read_records(run))
    assert again["table.md"] == (run / "table.md").read_text()


def test_a_teacher_that_was_called_otherwise_is_the_same(runs: Path) -> None:
    """Earlier versions called one after its file alone."""
    run = runs / "quickstart"
    file = run / CELLS[1] / "record.json"
    plain = json.loads(file.read_text())
    for part in (plain["cell"], plain["spec"]["teacher"], plain["teacher"]):
        part.update({"teacher" if part is plain["cell"] else "name": "teacher"})
    file.write_text(json.dumps(plain))
    about = json.loads((run / "recipe.json").read_text())
    about["recipe"] |= {"compare": {"method": ["ce", "kd"]}, "seeds": 1}
    (run / "recipe.json").write_text(json.dumps(about))
    found = [finding for finding in verify(run, Registry()) if "teacher" in finding.what]
    assert ("remark", "'teacher' is called 'wrn_16_2_digits' today") in {(one.level, one.what) for one in found}
    kdbench.run("quickstart", ["compare.method=[ce, kd]", "seeds=1"], runs=runs, device="cpu", jobs=1)
    named = read_records(run)[1]
    assert named.teacher is not None
    assert (named.teacher.name, named.cell.teacher) == ("wrn_16_2_digits", "wrn_16_2_digits")


def test_a_table_tells_what_lies_beside_its_cells(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    run = runs / "quickstart"
    shutil.copytree(run / CELLS[0], run / "teacher")
    assert called(monkeypatch, "table", run) == 0
    assert f"{run} holds 1 more finished cell, not of its last command" in capsys.readouterr().out
    about = json.loads((run / "recipe.json").read_text())
    about["cells"] = sorted(cell.name for cell in run.glob("*-seed*"))
    (run / "recipe.json").write_text(json.dumps(about))
    assert called(monkeypatch, "table", run) == 0
    assert "not of its last command" not in capsys.readouterr().out


def test_a_folder_of_runs_is_its_cells_alone(runs: Path) -> None:
    """Neither trials, nor teachers, nor cells of an earlier plan stand beside them."""
    shutil.copytree(runs / "quickstart" / CELLS[0], runs / f"quickstart{TRIALS}" / "ce-seed100-dd220819")
    shutil.copytree(runs / "quickstart" / CELLS[0], runs / TEACHERS / "digits-dd220819")
    assert [record.folder.name for record in read_records(runs) if record.folder] == CELLS
    for begun in (runs / f"quickstart{TRIALS}" / "at-seed100-1", runs / TEACHERS / "other-1"):
        begun.mkdir()
        (begun / "metrics.jsonl").touch()
    assert unfinished([runs]) == []
    # Who names them gets them.
    assert len(read_records(runs / f"quickstart{TRIALS}")) == 1
    assert len(read_records(runs / TEACHERS)) == 1


def test_an_unknown_home_folder_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Said) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        ("run", f"{NOBODY}/my.yaml"),
        ("run", "quickstart", "--data", f"{NOBODY}/data"),
        ("run", "quickstart", f"--runs={NOBODY}/runs"),
        ("check", "quickstart", f"data={NOBODY}/pictures"),
        ("ls", "methods", "--registry", f"{NOBODY}/registry"),
        ("check", "quickstart", "teacher={model: wrn_10_1, " + f"weights: {NOBODY}/w.pt" + "}"),
    ):
        assert called(monkeypatch, *words) == 2, words
        said = capsys.readouterr().err
        assert said.startswith("error: ") and NOBODY in said and "write the whole path" in said, (words, said)
    assert not list(tmp_path.iterdir())
    for variable in ("KDBENCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv("KDBENCH_HOME", raising=False)
        monkeypatch.setenv(variable, f"{NOBODY}/cache")
        with pytest.raises(UserError, match=NOBODY) as caught:
            home()
        assert caught.value.where == variable


def test_home_folders_are_opened_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.yaml").write_text("seeds: 2\n")
    (tmp_path / "over.yaml").write_text("include: ~/my.yaml\n")
    assert load("~/over.yaml").data == {"seeds": 2}
    (tmp_path / "cards").mkdir()
    assert Registry("~/cards").folders[-1] == tmp_path / "cards"
    # What is called so is meant.
    monkeypatch.chdir(tmp_path)
    (tmp_path / NOBODY).mkdir()
    assert expanded(NOBODY) == Path(NOBODY)


def test_the_home_folder_is_not_asked_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user may have none."""

    def nowhere(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.delenv("KDBENCH_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert home() == Path("/somewhere/kdbench")
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(UserError, match="this user has no home folder\n  set KDBENCH_HOME") as caught:
        home()
    assert caught.value.where is None


def test_a_user_without_a_name_has_one_for_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a container that is started with '--user 54321': torch asks for it in an optimizer's first step."""

    def nobody(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    def begins(start: Callable[[], object]) -> None:
        for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
            monkeypatch.setenv(variable, "")
        start()
        assert getpass.getuser() == str(os.getuid())

    monkeypatch.setattr("pwd.getpwuid", nobody)
    begins(lambda: called(monkeypatch, "ls", "methods"))
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: None)
    begins(lambda: worker_process((), 1))


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_files_have_the_permissions_of_new_ones(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with atomic(tmp_path / "ours") as temporary:
            temporary.write_text("text")
        save_tensors(tmp_path / "weights", {"one": torch.ones(1)})
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    assert {file.name for file in tmp_path.iterdir()} == {"ours", "weights", "plain"}
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    save = "import torch; from safetensors.torch import save_file; save_file({'x': torch.ones(99_000_000)}, '.x.part')"
    process = subprocess.Popen([sys.executable, "-c", save], cwd=tmp_path)
    while not [*tmp_path.iterdir()]:
        assert process.poll() is None
    process.kill()
    process.wait()
    sweep(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_what_a_killed_process_was_making_goes_and_what_another_is_making_stays(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with workplace(target) as killed, workplace(target) as other:
        (killed / "half").mkdir(), (other / "half").mkdir()
        shutil.copytree(killed, tmp_path / f"{killed.name[:-4]}gone")
        shutil.copytree(killed, tmp_path / f".made.own{killed.name[-8:]}")
        with workplace(target) as third:
            left = {killed.name, other.name, third.name, f".made.own{killed.name[-8:]}"}
            assert {folder.name for folder in tmp_path.iterdir()} == left
        assert (killed / "half").is_dir() and (other / "half").is_dir()
        # One that was killed in the middle of its last step.
        shutil.copytree(killed, tmp_path / f"{killed.name[:-4]}gone")
        (tmp_path / f"{killed.name[:-4]}gone" / "half").rename(tmp_path / f"{killed.name[:-4]}gone" / BEFORE)
    with workplace(target):
        assert target.is_dir()
    assert {folder.name for folder in tmp_path.iterdir()} == {"made", f".made.own{killed.name[-8:]}"}


def test_a_misspelt_word_of_the_python_api_is_told(runs: Path) -> None:
    """The command line knows its words; here one was an AttributeError, one Student's interval, one absent weights."""
    cell = next((runs / "quickstart").glob("*-seed*"))
    for use in (
        lambda: kdbench.table(runs / "quickstart", metric="bests"),
        lambda: kdbench.table(runs / "quickstart", interval="Bootstrap"),
        lambda: kdbench.load_student(cell, weights="bets"),
    ):
        with pytest.raises(UserError, match="there is no '(bests|Bootstrap|bets)'") as caught:
            use()
        assert "did you mean 'b" in str(caught.value)


def test_one_row_for_each_seed(runs: Path) -> None:
    run = runs / "quickstart"
    frame = kdbench.table(run, each_seed=True)
    assert list(frame["label"]) == ["student", "KD"] and list(frame["seed"]) == [0, 0]
    assert frame["last"].tolist() == [record.result.test.last for record in read_records(run)]
    records = read_records(run)
    assert kdbench.table(records, each_seed=True).equals(frame)
    for other in ({"metric": "best"}, {"published": "datafree_cifar10"}):
        with pytest.raises(UserError, match=f"'{next(iter(other))}' is for a table that compares"):
            kdbench.table(run, each_seed=True, **other)  # type: ignore[arg-type]


def test_a_record_is_shown_in_a_line(runs: Path) -> None:
    record = read_records(runs)[1]
    assert str(record) == repr(record) == f"<Record: KD, seed 0, {record.result.test.last:.2f} %, {record.folder}>"
    assert repr(record.model_copy(update={"folder": None})).endswith(" %>")


def test_one_text_is_no_list_of_letters(runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    run = runs / "quickstart"
    assert len(kdbench.table(str(run))) == len(kdbench.table([run])) == 2
    with pytest.raises(UserError, match="no record has the number 'agreement'"):
        kdbench.table(run, columns="agreement")
    zoo = ROOT / "results" / "ab_wrn_30"
    copied = [kdbench.table(zoo, published=given) for given in ("datafree_cifar10:ce", ["datafree_cifar10:ce"])]
    assert [len(frame) - len(kdbench.table(zoo)) for frame in copied] == [2, 2]
    record = read_records(run)[0]
    assert len(kdbench.table(record)) == 1
    planned: list[object] = []

    def stop(recipe: object, registry: Registry, overrides: tuple[str, ...]) -> None:
        planned.extend([registry.folders[-1], overrides])
        raise UserError("enough")

    (tmp_path / "reg").mkdir()
    with monkeypatch.context() as patch, pytest.raises(UserError, match="enough"):
        patch.setattr("kdbench.recipe.planning.plan", stop)
        kdbench.run("quickstart", "seeds=2", registries="reg")
    assert planned == [Path("reg"), ("seeds=2",)]
    with pytest.raises(UserError, match="there is no registry folder 'nowhere'"):
        kdbench.load_student(run / CELLS[0], registries="nowhere")
    with pytest.raises(UserError, match="a path is a text or a Path, not 3"):
        kdbench.run("quickstart", registries=[3])  # type: ignore[list-item]
    with pytest.raises(UserError, match="an override is a text, not 3"):
        kdbench.run("quickstart", [3])  # type: ignore[list-item]
    with pytest.raises(UserError, match="names a network, and cannot hold one: Linear"):
        kdbench.run({"data": "digits", "student": {"name": torch.nn.Linear(2, 2)}, "method": "ce"})


def test_data_roots_are_one_or_several(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Options] = []

    def stop(planned: object, how: Options, told: Listener | None = None) -> None:
        given.append(how)
        raise UserError("enough")

    monkeypatch.setattr("kdbench.engine.workers.tuning.tuned", stop)
    with pytest.raises(UserError, match="enough"):
        kdbench.run("quickstart", data_roots="pictures", runs="~/runs")
    assert given[0].data_roots == (Path("pictures"),)
    assert given[0].runs == Path("~/runs").expanduser()
    with pytest.raises(UserError, match="enough"):
        kdbench.run("quickstart", device=torch.device("cuda:1"))
    assert given[1].device == "cuda:1"
    with pytest.raises(UserError, match="unknown device 'tpu'"):
        kdbench.run("quickstart", device="tpu")


def test_what_nobody_should_miss_goes_to_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The API has no other place for warnings; how it goes is there for who asks."""

    def stop(planned: Plan, how: Options, told: Listener | None = None) -> None:
        told = told or Listener()
        told.say("always the same class")
        cells = [CellState(cell, at, Path(), f"kd, seed {at}") for at, cell in enumerate(planned.cells[:2])]
        told.begin(cells, "title")
        for cell in cells:
            cell.state, cell.accuracy = "running", 12.345
            told.update(cell)
        cells[0].state, cells[1].state, cells[1].message = "finished", "failed", "no memory"
        for cell in [*cells, *cells]:
            told.update(cell)
        raise UserError("enough")

    monkeypatch.setattr("kdbench.engine.workers.runner.run", stop)
    recipe = {"data": "digits", "student": "wrn_10_1", "method": "ce", "seeds": 2, "steps": 1, "epochs": None}
    normalization = {"mean": [0.0], "std": [1.0]}
    with caplog.at_level("INFO", "kdbench"), pytest.raises(UserError, match="enough"):
        kdbench.run(recipe, {"protocol": {"name": "digits", "normalization": normalization}})
    warned = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert len(warned) == 2
    assert warned[0].startswith("note: the student's images are normalized by")
    assert warned[1] == "always the same class"
    informed = [one.getMessage() for one in caplog.records if one.levelname == "INFO"]
    assert informed == ["title: 2 cells, 0 finished before", "kd, seed 0: 12.35 %", "kd, seed 1: failed: no memory"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("folder.yaml", "'folder.yaml' is no recipe: this is a folder"),
        ("folder", "'folder' is no recipe: this is a folder"),
        ("link.yaml", "'link.yaml' is no recipe: this is a link to '/nowhere'"),
        ("latin.yaml", "latin.yaml: this file is damaged, or not text in UTF-8"),
        ("closed.yaml", "closed.yaml: cannot be read: Permission denied"),
    ],
)
def test_what_is_no_recipe_says_so(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Said
) -> None:
    monkeypatch.chdir(tmp_path)
    odd_files(tmp_path, monkeypatch)
    for words in (("show", "recipes", name), ("cp", name, "copy.yaml")):
        assert called(monkeypatch, *words) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "over.yaml").write_text(f"include: {name}\n")
    with pytest.raises(UserError) as caught:
        load("over.yaml")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("folder.yaml", "folder.yaml: this is a folder"),
        ("link.yaml", "link.yaml: this is a link to '/nowhere'"),
        ("latin.yaml", "latin.yaml: this file is damaged, or not text in UTF-8"),
        ("closed.yaml", "closed.yaml: cannot be read: Permission denied"),
    ],
)
def test_what_is_no_card_file_says_so(name: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cards" / "losses").mkdir(parents=True)
    odd_files(tmp_path, monkeypatch)
    (tmp_path / name).rename(tmp_path / "cards" / "losses" / name)
    with pytest.raises(UserError) as caught:
        Registry(tmp_path / "cards")
    assert said in str(caught.value)


def test_a_file_is_no_registry(tmp_path: Path) -> None:
    (tmp_path / "cards.yaml").touch()
    with pytest.raises(UserError, match=r"cards\.yaml' is a file"):
        Registry(tmp_path / "cards.yaml")


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_bytes(b"\xef\xbb\xbfseeds: 2\n")
    assert load(tmp_path / "my.yaml").data == {"seeds": 2}
    (tmp_path / "cards" / "losses").mkdir(parents=True)
    (tmp_path / "cards" / "losses" / "my.yaml").write_bytes(b"\xef\xbb\xbfmine: {target: 'kdbench.losses:kd'}\n")
    assert "mine" in Registry(tmp_path / "cards").keys("losses")


def test_a_clone_by_git_for_windows_has_the_same_bytes(tmp_path: Path) -> None:
    """It turns line ends where nobody forbids it, and all published results would disagree with their sums."""
    here, file = tmp_path / "here", "table.md"
    here.mkdir()
    for one in (ROOT / "results" / "quickstart" / file, ROOT / ".gitattributes"):
        shutil.copy(one, here)
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "all")):
        subprocess.run(["git", *words], cwd=here, check=True)
    subprocess.run(["git", "clone", "-q", "-c", "core.autocrlf=true", "here", "there"], cwd=tmp_path, check=True)
    assert (tmp_path / "there" / file).read_bytes() == (here / file).read_bytes()


def test_own_python_in_another_encoding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_latin.py").write_bytes(b"def loss(student):\n    return student  # caf\xe9\n")
    with pytest.raises(UserError, match="not text in UTF-8"):
        parameters("own_latin:loss")
    (tmp_path / "own_declared.py").write_bytes(b"# coding: latin-1\ndef loss(student): return student  # caf\xe9\n")
    assert list(parameters("own_declared:loss")) == ["student"]


def odd_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that cannot be read, of every kind. Root may read all: who opens one is answered as others are."""
    (folder / "folder.yaml").mkdir()
    (folder / "folder").mkdir()
    (folder / "link.yaml").symlink_to("/nowhere")
    (folder / "latin.yaml").write_bytes(b"seeds: 2 # caf\xe9\n")
    (folder / "closed.yaml").write_text("seeds: 2\n")
    given = Path.open

    def refusing(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.name == "closed.yaml":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return given(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", refusing)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk on which nothing more can be written. Its writers say that in words of their own."""
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=4096))

    def failing(*_: Any, **named: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 329024 vs 328912")

    monkeypatch.setattr("torch.save", failing)
    monkeypatch.setattr("kdbench.engine.networks.weights.save_file", failing)


def test_a_full_disk_is_named_and_leaves_what_was_there(full: None, tmp_path: Path) -> None:
    file = tmp_path / CHECKPOINT
    file.write_text("the one before")
    with pytest.raises(UserError, match=f"the disk is full: {re.escape(str(file))}") as caught:
        checkpoint.save(tmp_path, {})
    assert caught.value.hint and "make room and repeat the command" in caught.value.hint
    with pytest.raises(UserError, match=r"the disk is full: .*00000003\.safetensors"):
        keep_checkpoint(tmp_path, [], torch.nn.Linear(1, 1), 3, 1.0, None)
    assert file.read_text() == "the one before"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [CHECKPOINT]


def test_a_file_that_is_larger_than_what_is_free_fills_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer asks for the whole room first, so that some is left."""

    def failing(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("kdbench.engine.networks.weights.save_file", failing)
    with pytest.raises(OSError) as caught:
        save_tensors(tmp_path / "student.safetensors", {})
    assert str(disk_full(caught.value)).startswith(f"the disk is full: {tmp_path / 'student.safetensors'}")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_ends_a_cell_without_a_trace(full: None, tmp_path: Path) -> None:
    member: Any = SimpleNamespace(computing=REFERENCE, batches=SimpleNamespace(ranks=SimpleNamespace(size=1)))
    cell = TrainingCell(member, tmp_path, {}, metrics_log=object())  # type: ignore[arg-type]
    with cell.failures():
        save_tensors(tmp_path / "student.safetensors", {})
    assert cell.failure and cell.failure.startswith("the disk is full: ") and "make room" in cell.failure
    assert not list(tmp_path.iterdir())
    # Other faults stay what they are.
    other = TrainingCell(member, tmp_path, {}, None)
    with other.failures(), atomic(tmp_path / "record.json"):
        raise ValueError("Out of range float values")
    assert other.failure and other.failure.startswith("ValueError: Out of range")


@pytest.mark.parametrize(("others", "error"), [("the disk is full: y", UserError), ("ValueError: y", CellError)])
def test_a_run_whose_cells_all_failed_on_a_full_disk_is_for_the_user_to_mend(
    others: str, error: type[Exception]
) -> None:
    states: Any = [
        SimpleNamespace(label="KD", message="the disk is full: x"),
        SimpleNamespace(label="AB", message=others),
    ]
    planned: Any = SimpleNamespace(cells=range(3))
    found = failure(planned, Outcome(Path(), [Path()], states))
    assert type(found) is error
    assert str(found) == f"2 of 3 cells failed, finished: 1\n  KD: the disk is full: x\n  AB: {others}"


CHILD = "import os, sys; os.fstat(2); os.fstat(1); assert sys.stderr and sys.stdout"
SAYING = """
import subprocess, sys, time
from kdbench.cli import keep_streams
keep_streams()
time.sleep({wait})
for _ in range(3):
    print("nobody reads this", file=sys.stderr, flush=True)
done = subprocess.run([sys.executable, "-c", {child!r}])
open("done", "w").write(str(done.returncode))
"""


@pytest.mark.parametrize(("outputs", "wait"), [("2>&-", 0), (">&- 2>&-", 0), ("<&- >&- 2>&-", 0), ("2>&1 | true", 0.3)])
def test_work_goes_on_where_nobody_listens(outputs: str, wait: float, tmp_path: Path) -> None:
    """In this process and in those that it starts."""
    (tmp_path / "saying.py").write_text(SAYING.format(wait=wait, child=CHILD))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} saying.py {outputs}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, timeout=60, capture_output=True)
    assert (tmp_path / "done").read_text() == "0", done
    assert not done.stderr


@pytest.mark.parametrize(("output", "code"), [("| true", 0), ("> /dev/full", 1)])
def test_a_reader_that_has_enough_is_no_fault_of_the_command(output: str, code: int, tmp_path: Path) -> None:
    """But a full disk is, of a table that was asked for."""
    said = "import time\nfrom kdbench.cli import keep_streams\nkeep_streams()\ntime.sleep(0.3)\nprint('x' * 10**6)\n"
    (tmp_path / "table.py").write_text(said)
    command = f"{sys.executable} table.py {output}; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, timeout=60, capture_output=True)
    assert done.returncode == code, done.stderr
    assert (b"Error" in done.stderr) == (code == 1)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "x"}, "RANK is 'x', and must be a whole number from 0 to 1"),
        ({"RANK": "2"}, "RANK is '2'"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "1e3"}, "WORLD_SIZE is '1e3'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is '99999'"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK is 'first'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set, but"),
        ({"RANK": None, "MASTER_PORT": ""}, "RANK and MASTER_PORT are not set, but"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set, but"),
    ],
)
def test_variables_that_torchrun_does_not_set_so(
    variables: dict[str, str | None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}
    for name, value in (whole | variables).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        started_by_torchrun(False, None)
    assert said in caught.value.what and caught.value.where == "environment" and "torchrun" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("table", "quickstart.yaml"), "this is a recipe: give a folder with finished cells, as 'runs/quickstart'"),
        (("plot", "quickstart.yaml"), "this is a recipe: give a folder with finished cells, as 'runs/quickstart'"),
        (("verify", "quickstart.yaml"), "this is a recipe: give a folder that holds one comparison, as 'runs/quick"),
        (("publish", "quickstart.yaml"), "this is a recipe: give the folder of a run, as 'runs/quickstart'"),
        (
            ("export", "quickstart.yaml", "--onnx"),
            f"this is a recipe: give the folder of a finished cell, as 'runs/quickstart/{CELLS[0]}'",
        ),
        (
            ("analyse", "boundary", "quickstart.yaml"),
            "this is a recipe: give a folder with finished cells, as 'runs/quickstart'",
        ),
        (("table", "quickstart"), "there is no such folder\n  give a folder with finished cells, as 'runs/quick"),
        (("publish", "runs"), "give the folder of a run, as 'runs/quickstart'"),
        (("verify", "runs"), "give a folder that holds one comparison, as 'runs/quickstart'"),
        (("export", "runs/quickstart", "--onnx"), f"as 'runs/quickstart/{CELLS[0]}', "),
        (("publish", "nowhere"), "give the folder of a run, which holds a recipe.json"),
    ],
)
def test_the_folder_that_is_probably_meant(
    words: tuple[str, ...], said: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    monkeypatch.chdir(runs.parent)
    (runs.parent / "quickstart.yaml").write_text("seeds: 1\n")
    assert called(monkeypatch, *words) == 2
    found = capsys.readouterr().err
    assert said in found, found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"checkpoint_seconds": float("inf")}, "'checkpoint_seconds' is inf"),
        ({"checkpoint_seconds": float("nan")}, "'checkpoint_seconds' is nan"),
        ({"checkpoint_seconds": -1}, "'checkpoint_seconds' is -1"),
        ({"checkpoint_seconds": "60"}, "'checkpoint_seconds' is '60'"),
        ({"jobs": 0}, "'jobs' is 0, and must be a whole number of at least 1"),
        ({"jobs": 1.5}, "'jobs' is 1.5"),
        ({"threads": 100_000}, "'threads' is 100000, and must be a whole number from 1 to 1024"),
        ({"threads": True}, "'threads' is True"),
    ],
)
def test_numbers_that_mean_nothing(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        Options(**options)
    assert said in caught.value.what


def test_numbers_of_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: Said, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert called(monkeypatch, "run", "quickstart", "--checkpoint-seconds", "inf") == 2
    assert "error: --checkpoint-seconds: " in capsys.readouterr().err
    for words in (
        *(("run", "quickstart", option) for option in ("--checkpoint-seconds=nan", "--jobs=-1", "--threads=inf")),
        *(("bench", option) for option in ("--seconds=inf", "--minutes=inf", "--rounds=1000000000", "--threads=nan")),
        ("verify", "runs", "--tolerance=inf"),
        ("logits", "fill", "quickstart", "--threads=100000"),
    ):
        assert called(monkeypatch, *words) == 2, words
        assert "error: command line: invalid value" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_plots_need_no_backend(backend: str, tmp_path: Path) -> None:
    """A notebook's variable reaches the commands that are started in it."""
    code = "from kdbench.drawing import panels, save, style\nwith style(): save(panels(1, 1, (1, 1))[0], 'plot.png')"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    assert (tmp_path / "plot.png").is_file(), done.stderr


def test_check_counts_published_cells(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    monkeypatch.chdir(runs.parent)
    shutil.copytree(runs, runs.parent / "results")
    shutil.rmtree(runs / "quickstart" / CELLS[1])
    few = ("seeds=1", "compare.method=[ce,kd,at]", "--no-time")
    assert called(monkeypatch, "check", "quickstart", *few) == 0
    said = capsys.readouterr().out
    assert "finished: 2 of 3 cells, 1 of them published in results/quickstart" in said
    assert called(monkeypatch, "check", "quickstart", *few, "--results", "nowhere") == 0
    assert "finished: 1 of 3 cells\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "0 s"),
        (59.6, "1 min 00 s"),
        (1668, "27 min 48 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (100_080, "27 h 48 min"),
    ],
)
def test_a_time_says_its_units(seconds: float, said: str) -> None:
    assert clock(seconds) == said


def test_every_variable_that_is_read_is_documented(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    code = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "kdbench").rglob("*.py"))
    table = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    read = {*re.findall(r"KDBENCH_[A-Z_]+", code)}
    assert read == {*re.findall(r"^\| `(KDBENCH_[A-Z_]+)` \|", table, re.MULTILINE)} and len(read) > 3
    assert called(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in read)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("wrn_16_2", "hook points: stem, layer1, layer1.preact, layer2, layer2.preact, layer3, layer3.preact, pooled"),
        ("wrn_16_2", "depth int 16 width int 2 hook points"),
        ("wrn_16_2", "hooks: {stem: conv1, layer1: block1, layer1.preact: block2.0.bn1, "),
        ("timm:resnet18", "hook points: stem, layer1, layer1.preact, layer2, "),
        ("torchvision:mobilenet_v3_small", "layer5: features.12, pooled: input(classifier.3)}"),
    ],
)
def test_a_models_hook_points_and_options_are_shown(
    model: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    assert called(monkeypatch, "show", "models", model) == 0
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("kd", "stages.classification.losses.kd.temperature 4.0 method.temperature"),
        ("kd", "stages.classification.losses.kd.scale True"),
        ("kd", "stages.classification.losses.ce.weight 0.1 method.gamma"),
        ("rco", "stages.route.anchors.n 4 method.n"),
        ("hnd", "modules.bottleneck.width 12 method.width"),
    ],
)
def test_a_methods_settings_are_shown(method: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    assert called(monkeypatch, "show", "methods", method) == 0
    assert said in " ".join(capsys.readouterr().out.split())


def test_who_waits_for_a_lock_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    with (
        locked_run(tmp_path, waiting=lambda: told.append("first")),
        pytest.raises(UserError, match="another run works in"),
        locked_run(tmp_path, 0, lambda: told.append("second")),
    ):
        pass
    assert told == ["second"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_without_locks_has_files_in_their_place(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_lock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", no_lock)
    with locked_run(tmp_path), pytest.raises(UserError, match="another run works in") as other, locked_run(tmp_path, 0):
        pass
    left = Path(re.findall(r"wait for it, stop it, .* remove (.*)", str(other.value))[0])
    assert left.parent == tmp_path and not left.exists()
    # As a run leaves it that was killed on another machine.
    left.write_text("1\nanother-machine\n1\n", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"remove {left}")), locked_run(tmp_path, 0):
        pass
    left.unlink()
    with locked_run(tmp_path):
        pass


def test_all_locks_are_taken_in_one_way() -> None:
    """There it is known what to do on a file system without locks."""
    files = [file for file in (ROOT / "kdbench").rglob("*.py") if "filelock" in file.read_text(encoding="utf-8")]
    assert files == [ROOT / "kdbench" / "files.py"]


def test_nobody_is_told_to_remove_what_only_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Permissions do not hold for root, so the system's refusal is made here."""
    (tmp_path / "record.json").write_text("{}")

    def refuse(file: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match="Permission denied") as told:
        read_records([tmp_path])
    assert told.value.hint == CHECK_PATH
