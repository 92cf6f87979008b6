"""The runner knows no method, model or data set by name: what is special about one stands on its card."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from kdbench.tree import Tree

RUNNER = sorted(file for part in ("engine", "recipe", "cli") for file in (ROOT / "kdbench" / part).rglob("*.py"))
# Keys that are also words of Python, and where: the mode of a file.
WORDS = {("teachers/logit_table.py", "ab")}
# A hook point of every network, too: where a file says so, it means that.
HOOKS = {"logits"}


def keys() -> dict[str, re.Pattern[str]]:
    """Keys of all cards, as patterns: a key with {parameters} stands for many names."""
    found = {}
    for kind in ("methods", "models", "datasets"):
        for file in sorted((ROOT / "registry" / kind).glob("*.yaml")):
            for key in Tree.read(file).data:
                parts = re.split(r"{\w+}", key)
                found[key] = re.compile(r"\w+".join(map(re.escape, parts)))
    return found


def literals(source: str) -> Iterator[tuple[int, str]]:
    """Line and value of every string constant that is no docstring; of an f-string also its constant parts."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def named(source: str) -> list[tuple[int, str, str]]:
    """Line, constant and key of every string constant that is a card's name. Sentences and examples of commands that
    contain one are none."""
    patterns = keys()
    return [
        (line, text, key)
        for line, text in literals(source)
        for key, pattern in patterns.items()
        if key not in HOOKS and (pattern.fullmatch(text) or text == key)
    ]


@pytest.mark.parametrize("file", RUNNER, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_of_the_runner_names_a_card(file: Path) -> None:
    place = "/".join(file.parts[-2:])
    found = [
        f"{place}:{line}: '{text}' is a card ({key})"
        for line, text, key in named(file.read_text(encoding="utf-8"))
        if (place, text) not in WORDS
    ]
    assert found == []


def test_the_check_sees_names_and_patterns_and_leaves_docstrings() -> None:
    source = """
def loop(method):
    '''ab'''
    if method == "ab" or method in {"rco_greedy": 1}:
        print("kdbench run ab_wrn", "a sentence on kd")
    return {"wrn_16_2", "resnet56", "cifar10", "timm:resnet18", "training"}
"""
    assert sorted(text for _, text, _ in named(source)) == sorted(
        ["ab", "rco_greedy", "wrn_16_2", "resnet56", "cifar10", "timm:resnet18"]
    )


def test_every_exception_is_still_one() -> None:
    found = {
        ("/".join(file.parts[-2:]), text) for file in RUNNER for _, text, _ in named(file.read_text(encoding="utf-8"))
    }
    assert found == WORDS
