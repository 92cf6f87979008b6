"""README and results say what the records say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

from kdbench.cli.schema import build as build_schema
from kdbench.record import read_records
from kdbench.results.page import html, without_charts
from kdbench.results.renderers import latex, markdown, table_csv
from kdbench.results.tables import build

TABLES = sorted(file.parent for file in (ROOT / "results").glob("*/table.md"))


def test_the_readme_shows_the_quickstarts_own_table() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("table.md: begin -->")[2].partition("<!--")[0].split("\n")
    rows = [line for line in shown if line.startswith("|")]
    table = (ROOT / "results" / "quickstart" / "table.md").read_text(encoding="utf-8").split("\n")
    assert len(rows) > 5
    assert all(row in table for row in rows)


def test_the_readmes_first_numbers_are_those_of_the_records() -> None:
    folder = ROOT / "results" / "ab_wrn_30_epochs_h200"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme.partition(f"results/{folder.name}: begin -->")[2].partition("<!--")[0].splitlines()
    names, _, numbers = [[cell.strip() for cell in row.strip("|").split("|")] for row in shown if row.startswith("|")]
    records = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*-seed0-*/record.json")]
    expected = {record["cell"]["label"]: f"{record['result']['test']['last']:.2f}" for record in records}
    (teacher,) = {record["teacher"]["accuracy"] for record in records if record["teacher"]}
    assert len(records) == 7 and dict(zip(names, numbers, strict=True)) == expected | {"teacher": f"{teacher:.2f}"}


@pytest.mark.parametrize("folder", TABLES, ids=lambda folder: folder.name)
def test_every_committed_table_is_rebuilt_from_its_records(folder: Path) -> None:
    records = read_records([folder])
    table = build(records)
    assert markdown(table) == (folder / "table.md").read_text(encoding="utf-8")
    assert table_csv(table) == (folder / "table.csv").read_text(encoding="utf-8")
    assert latex(table) == (folder / "table.tex").read_text(encoding="utf-8")
    page = (folder / "table.html").read_text(encoding="utf-8")
    assert html(table, records, charts=False) == without_charts(page)


def test_every_file_that_the_documents_name_exists() -> None:

    for page in ("README.md", "CONTRIBUTING.md", "results/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        named = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(
            r"`((?:tests|kdbench|registry|recipes|results)/[\w./]+)", text
        )
        for name in named:
            if "<" not in name:
                found = (ROOT / page).parent / name
                assert found.exists() or (ROOT / name.split("::")[0]).exists(), f"{page}: {name}"


def test_the_editors_schema_is_up_to_date() -> None:

    kept = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8"))
    assert kept == build_schema([]), "renew it: kdbench schema recipes/recipe.schema.json"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_begins_with_what_it_shows_its_command_and_its_schema(recipe: Path) -> None:
    comment = [line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert "kdbench run" in comment[1]
    assert "easured" in comment[2]
    schema = comment[-1].partition("$schema=")[2]
    assert (recipe.parent / schema).is_file()
