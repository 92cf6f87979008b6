"""A new method is one Python file and one YAML card, in a user's folder or in an installed package.

These are the steps of docs/adding-a-method.md, taken from that page, so that it stays true.
"""

from __future__ import annotations

import copy
import json
import re
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT, Kdbench, filled
from tiny import member_of, shortened, train

from kdbench.engine.checks.cells import check_cell
from kdbench.engine.member import Member
from kdbench.engine.teachers.loading import fingerprint
from kdbench.recipe.planning import plan
from kdbench.registry import Registry

TINY = Path(__file__).parent


def blocks(page: str = "docs/adding-a-method.md") -> dict[str, str]:
    """Code blocks of a page whose first line names a file."""
    text = (ROOT / page).read_text(encoding="utf-8")
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


def test_the_method_in_contributing_trains_and_resumes(tmp_path: Path) -> None:
    for name, body in blocks("CONTRIBUTING.md").items():
        (tmp_path / name).write_text(body)
    recipe = {"data": "digits", "teacher": "wrn_16_2_digits", "student": "wrn_10_1", "protocol": "digits"}
    (planned,) = plan(recipe | {"method": {"name": "drawn_near", "power": 3.0}}, Registry([tmp_path])).cells
    spec = shortened(planned.spec, 10)
    check_cell(spec)

    def at(steps: int, state: object = None) -> Member:
        member, batches, teacher = member_of(spec)
        if state is not None:
            member.load_state(copy.deepcopy(state))
        train(member, batches, teacher, steps - member.step)
        return member

    begin, approached, whole = at(0), at(2), at(10)
    assert fingerprint(approached.student.model) == fingerprint(begin.student.model)
    assert fingerprint(approached.modules.of_method["bridge"]) != fingerprint(begin.modules.of_method["bridge"])
    resumed = at(10, at(5, at(1).state()).state())
    for one, other in ((whole.student.model, resumed.student.model), (whole.modules.terms, resumed.modules.terms)):
        assert fingerprint(one) == fingerprint(other)
    near = whole.modules.terms_of("training")["near"]
    assert near.spec.loss.options == {"power": 3.0} and near.points("student")["data"] == ["layer1", "layer2", "layer3"]
    whole.check_finite()
