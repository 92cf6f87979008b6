"""A record is data: what it names is built from cards, and whatever else it says is refused, unexecuted."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_files import photo, write_pictures
from shipped import REGISTRY

import kdbench
from kdbench.cli import data
from kdbench.engine.analysis import Analysis
from kdbench.engine.options import Options
from kdbench.errors import UserError
from kdbench.recipe.planning import plan
from kdbench.recipe.recorded import cell_of
from kdbench.recipe.specs import recorded
from kdbench.record import Record, read_record
from kdbench.registry import SHARE, Registry
from kdbench.verify.rerun import cell_to_rerun
from kdbench.verify.verification import verify

CPU = torch.device("cpu")
# Methods that have between them whatever a record can name, and what their recipe needs beside.
METHODS = ("ab", "uda_kd", "bss", "prune_data_free")


@functools.cache
def spec_of(method: str) -> dict[str, Any]:
    recipe = {"data": "digits", "teacher": "wrn_16_2_digits", "protocol": "digits", "method": method}
    recipe["student"] = "wrn_16_2" if method.startswith("prune") else "wrn_10_1"
    target = {"target": "digits", "data": "mnist_8", "teacher": "wrn_16_2_mnist_8"} if method == "uda_kd" else {}
    (cell,) = plan(recipe | target, REGISTRY).cells
    plain: dict[str, Any] = json.loads(json.dumps(recorded(cell.spec)))
    return plain


def code_in(plain: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a record's spec names code."""
    for key, value in plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ():
        if isinstance(value, str) and (key == "target" or path[-1:] == ("metrics",)):
            yield (*path, key)
        yield from code_in(value, (*path, key))


def put(plain: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = at = copy.deepcopy(plain)
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return changed


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A target whose import, like its call, leaves a mark. The test fails if the mark is there."""
    mark = tmp_path / "executed"
    (tmp_path / "evil_module.py").write_text(
        f"open({str(mark)!r}, 'w').close()\ndef run(*a, **k):\n    raise SystemExit\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "evil_module:run"
    assert not mark.exists()


@pytest.mark.parametrize("method", METHODS)
def test_no_code_but_that_of_cards(method: str, evil: str) -> None:
    plain = spec_of(method)
    cell_of(plain, REGISTRY, "cell")
    places = list(code_in(plain))
    assert len(places) > 8
    for place in places:
        for target in (evil, "subprocess:Popen", "kdbench.losses.at:nothing"):
            with pytest.raises(UserError, match="is not that of the card"):
                cell_of(put(plain, place, target), REGISTRY, "cell")


def test_all_places_are_tried() -> None:
    """A kind of thing that a spec names and no method above has would go unwatched."""
    places = [place for method in METHODS for place in code_in(spec_of(method))]
    found = {next(part for part in reversed(place[:-1]) if isinstance(part, str)) for place in places}
    assert found >= {
        "data", "target", "student", "model", "loss", "metrics", "connector", "source", "begins", "optimizer",
        "schedule", "weight_schedule", "teacher_optimizer", "teacher_schedule",
    }  # fmt: skip


SCHEDULE = ("method", "stages", "classification", "schedule")
WEIGHTS = {"file": "../../stolen.pt", "sha256": "0" * 64, "url": "https://example.org/evil"}


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (SCHEDULE, {"name": "popen", "target": "subprocess:Popen"}, "unknown schedule 'popen'"),
        ((*SCHEDULE, "options"), {"args": ["touch", "mark"]}, "unknown key 'args'"),
        ((*SCHEDULE, "version"), 2, "has version 1 here, and 2 in the record"),
        ((*SCHEDULE, "counts_as"), {"subprocess:Popen": "kdbench.schedules:multistep"}, None),
        (("method", "stages", "boundaries", "losses", "boundary", "loss", "by_step"), "the host looks on", None),
        ((*SCHEDULE, "source_sha256"), "0" * 64, "the code of the schedule 'multistep' is not that of the record"),
        (("student", "options"), {"depth": "ten", "width": 1}, "'depth'"),
        (("student", "start"), WEIGHTS, "no teacher card here has the weights"),
        (("teacher", "weights"), WEIGHTS, "no teacher card here has the weights"),
        (("teacher", "weights"), {"file": "t.pt", "sha256": "0" * 64, "layout": "os:system"}, "no teacher card"),
        (("teacher", "name"), "../../../somewhere", "a teacher cannot be called"),
        (("data", "classes"), 3, "'classes' of the data set 'digits' is not what its card says"),
        (("data", "options"), {"folder": "/"}, "options of the data set 'digits' are not those"),
        (("route",), 10**9, "'route'"),
        (("protocol",), None, "'protocol'"),
    ],
)
def test_what_cards_say_otherwise(place: tuple[str, ...], value: Any, said: str | None) -> None:
    plain = put(spec_of("ab"), place, value)
    if said is None:
        # Names are the cards' own, whatever a record calls them.
        assert cell_of(plain, REGISTRY, "cell") == cell_of(spec_of("ab"), REGISTRY, "cell")
        return
    with pytest.raises(UserError, match=said) as refused:
        cell_of(plain, REGISTRY, "cell")
    assert refused.value.where == "cell"
    assert refused.value.hint


def test_whatever_a_record_says_is_built_or_refused() -> None:
    plain = spec_of("prune_data_free")
    tried = 0
    for place in leaves({key: plain[key] for key in ("data", "student", "method", "route") if key in plain}):
        for value in (None, [":"], {"a": ":"}, -1, "\0:"):
            tried += 1
            try:
                cell_of(put(plain, place, value), REGISTRY, "cell")
            except UserError as refused:
                assert refused.hint, place
    assert tried > 100
    for nothing in (None, [], {}, "spec", {"student": {}}):
        with pytest.raises(UserError):
            cell_of(nothing, REGISTRY, "cell")


def leaves(plain: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(plain, dict) and plain:
        for key, value in plain.items():
            yield from leaves(value, (*path, key))
    else:
        yield path


def test_weights_of_the_user_s_own_are_data(tmp_path: Path) -> None:
    weights = {"file": str(tmp_path / "mine.pt"), "sha256": "0" * 64}
    plain = put(spec_of("ab"), ("teacher", "weights"), weights)
    assert cell_of(plain, REGISTRY, "cell").teacher.weights.file == weights["file"]  # type: ignore[union-attr]
    hooks = {"layer1": "group1", "layer1.preact": "input(group2)"}
    assert cell_of(put(plain, ("student", "hooks"), hooks), REGISTRY, "cell").student.hooks == hooks


@pytest.mark.parametrize(("sizes", "name"), [("equal", "mine"), ("different", "mine"), ("equal", "digits")])
def test_a_record_of_own_pictures_is_built_with_the_card_of_their_folder(sizes: str, name: str, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / name)
    for file in pictures.rglob("*.jpg") if sizes == "equal" else ():
        photo(16, 16, 0).save(file)
    recipe = {"data": str(pictures), "student": "resnet8", "method": "ce", "epochs": 1}
    spec = plan(recipe | {"protocol": {"name": "digits", "normalization": None}}, Registry()).cells[0].spec
    data.command(pictures, out=tmp_path / "cards")
    assert cell_of(json.loads(json.dumps(recorded(spec))), Registry((tmp_path / "cards",)), "cell").data == spec.data


# Every door through which a folder's record comes to be built.


def rerun(folder: Path) -> None:
    cell_to_rerun({folder.name: read_record(folder)}, None, REGISTRY)


def analysed(folder: Path) -> None:
    cell = Analysis("mine", [], Options(device="cpu"), folder, print).cells_below(folder)[0]
    raise AssertionError(f"{cell.name} was built")


def hub(folder: Path) -> dict[str, Any]:
    """What torch.hub executes of a folder."""
    (folder / "hubconf.py").write_text("import evil_module\ndef net(**k): pass\n")
    options = {"repo_or_dir": str(folder), "model": "net", "source": "local"}
    return {"target": "torch.hub:load", "options": options}


@pytest.mark.parametrize("way", ["import", "hub"])
@pytest.mark.parametrize("door", [rerun, kdbench.load_student, analysed])
def test_every_door(door: Callable[[Path], object], way: str, evil: str, tmp_path: Path) -> None:
    folder = cell_folder(tmp_path)
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    change = {"target": evil} if way == "import" else hub(folder)
    record["spec"]["student"] |= change
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UserError, match="the code of the model 'wrn_10_1' is not that of the card"):
        door(folder)


def test_verify_tells_of_it_and_runs_nothing(evil: str, tmp_path: Path) -> None:
    folder = cell_folder(tmp_path)
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    record["spec"]["student"]["target"] = evil
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    (folder.parent / "recipe.json").write_text(json.dumps({"name": "quickstart", "cells": [folder.name]}))
    found = [finding for finding in verify(folder.parent, REGISTRY) if "not that of the card" in finding.what]
    assert [(finding.level, finding.where) for finding in found] == [("disagrees", folder.name)]


def cell_folder(tmp_path: Path) -> Path:
    """A finished cell, with a file where its student's weights would be."""
    published = sorted((SHARE / "results" / "quickstart").glob("kd-seed0-*"))
    if not published:
        pytest.skip("results/ is not beside the package")
    folder = tmp_path / "run" / published[0].name
    shutil.copytree(published[0], folder)
    (folder / "student.safetensors").touch()
    assert isinstance(read_record(folder), Record)
    return folder
