"""A new method is one Python file and one YAML card, in a user's folder or in an installed package.

These are the steps of docs/adding-a-method.md, taken from that page, so that it stays true.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT, Kdbench, filled

TINY = Path(__file__).parent


def blocks() -> dict[str, str]:
    """Code blocks of docs/adding-a-method.md whose first line names a file."""
    text = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    found = {}
    for indented in re.findall(r"```(?:python|yaml)\n(.*?)```", text, flags=re.S):
        body = textwrap.dedent(indented)
        if match := re.match(r"# ([\w./]+\.(?:py|yaml))\n", body):
            found[match.group(1)] = body
    return found


def write_method(folder: Path) -> None:
    for name, body in blocks().items():
        (folder / Path(name).name).write_text(body)


def test_the_page_holds_one_python_file_and_one_card() -> None:
    assert sorted(Path(name).suffix for name in blocks()) == [".py", ".yaml"]


@pytest.mark.slow
def test_method_from_a_folder(kdbench: Kdbench, tmp_path: Path) -> None:
    methods = tmp_path / "my_methods"
    methods.mkdir()
    write_method(methods)
    listed = kdbench("ls", "methods", "--registry", methods).stdout
    assert "cosine" in listed
    kdbench(
        "run",
        TINY / "recipes" / "tiny.yaml",
        "compare.method=[ce, cosine]",
        "steps=6",
        "evaluations=1",
        "--registry",
        methods,
        "--registry",
        TINY / "registry",
        "--jobs",
        "1",
    )
    records = [filled(file) for file in (tmp_path / "runs" / "tiny").rglob("record.json")]
    assert {record["cell"]["method"] for record in records} == {"ce", "cosine"}
    losses = [
        json.loads(line)
        for file in (tmp_path / "runs" / "tiny").glob("cosine*/metrics.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert 0 <= losses[-1]["train"]["direction"] <= 2


@pytest.mark.slow
def test_method_from_an_installed_package(kdbench: Kdbench, tmp_path: Path) -> None:
    """The entry point group `kdbench.registry` names a package whose folder holds the cards."""
    site = tmp_path / "site"
    package = site / "my_distillation"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    write_method(package)
    card = next(package.glob("*.yaml"))
    module = next(file.stem for file in package.glob("*.py") if file.stem != "__init__")
    card.write_text(card.read_text().replace(f"target: {module}:", f"target: my_distillation.{module}:"))
    info = site / "my_distillation-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-distillation\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kdbench.registry]\nmine = my_distillation\n")
    listed = kdbench("ls", "methods", PYTHONPATH=str(site)).stdout
    assert "cosine" in listed
    kdbench(
        "run",
        TINY / "recipes" / "tiny.yaml",
        "compare.method=[cosine]",
        "steps=6",
        "evaluations=1",
        "--jobs",
        "1",
        "--registry",
        TINY / "registry",
        PYTHONPATH=str(site),
    )
    assert list((tmp_path / "runs" / "tiny").glob("cosine*/record.json"))
