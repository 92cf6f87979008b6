"""Without kdbench's extras every command works, and what needs one says what to install."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY
from packaging.requirements import Requirement

from kdbench.cli import app

# Also for workers: nothing finds these modules, as if they were not installed.
HIDDEN = """
import os, sys

class Hiding:
    def __init__(self, finder):
        self.finder, self.hidden = finder, {*os.environ["HIDDEN"].split()}

    def find_spec(self, name, *more):
        return None if name.partition(".")[0] in self.hidden else self.finder.find_spec(name, *more)

    def find_distributions(self, context):
        find = getattr(self.finder, "find_distributions", None)
        return find(context) if find and context.name not in self.hidden else []

sys.meta_path[:] = map(Hiding, sys.meta_path)
"""
# All in one process, which imports torch once.
COMMANDS = """
import contextlib, io, json, sys
from kdbench.cli import main

for words in json.loads(sys.argv[1]):
    sys.argv[1:], told, code = words, io.StringIO(), 0
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            main()
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, told.getvalue()]), flush=True)
"""


def with_what_they_need(texts: list[str], found: set[str]) -> set[str]:
    """Names of installed packages, in one spelling, with all that they need."""
    for one in map(Requirement, texts):
        if spelled(one.name) not in found and (not one.marker or one.marker.evaluate({"extra": ""})):
            with suppress(importlib.metadata.PackageNotFoundError):
                needs = importlib.metadata.requires(one.name) or []
                found.add(spelled(one.name))
                with_what_they_need(needs, found)
    return found


def spelled(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def hidden_modules() -> set[str]:
    """Modules of packages that come with extras alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for of in project["optional-dependencies"].values() for text in of]
    only = with_what_they_need(extras, set()) - with_what_they_need(project["dependencies"], set())
    modules = importlib.metadata.packages_distributions().items()
    return {name for name, packages in modules if {spelled(package) for package in packages} <= only}


def carried_out(folder: Path, *commands: list[Any]) -> list[tuple[int, str]]:
    (folder / "sitecustomize.py").write_text(HIDDEN)
    own = {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "HIDDEN": " ".join(hidden_modules())}
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, words], cwd=folder, env=os.environ | own, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_every_command_works_and_says_what_to_install(tmp_path: Path) -> None:
    assert {"ray", "onnx", "onnxruntime", "mlxtend", "pytest"} <= hidden_modules()
    helps = [
        [command.name or command.callback.__module__.rpartition(".")[2], "--help"]
        for command in app.registered_commands
    ]
    helps += [["logits", "fill", "--help"], ["--help"]]
    run = ["run", *TINY, "compare.method=[ce]", "steps=2", "evaluations=1", "--jobs", "1", "--threads", "1"]
    works = [*helps, ["check", *TINY, "--no-time"], run, ["table", "runs/tiny"], ["plot", "runs/tiny"]]
    works += [["publish", "runs/tiny"], ["verify", "results/tiny", *TINY[1:]], ["ls"], ["show", "methods", "ab"]]
    (tmp_path / "mnist.yaml").write_text("{data: mnist_8, student: wrn_10_1, protocol: digits, method: ce, steps: 2}")
    for command, (code, told) in zip(works, carried_out(tmp_path, *works), strict=True):
        assert code == 0 and "Traceback" not in told, (command, told)
    (cell,) = (tmp_path / "runs" / "tiny").glob("ce-*")
    needs = {
        "ray": [*run, "--ray", "local"],
        "export": ["export", cell, "--onnx"],
        "domains": ["run", "mnist.yaml"],
        "peers": ["bench", "--seconds", "1"],
    }
    for (extra, command), (code, told) in zip(needs.items(), carried_out(tmp_path, *needs.values()), strict=True):
        assert code == 2 and f"pip install 'kdbench[{extra}]'" in told and "Traceback" not in told, (command, told)
    ((code, told),) = carried_out(tmp_path, ["bench", "nope"])
    assert code == 2 and "no recipe 'nope'" in told and "pip" not in told, "what would not help is not asked for"
