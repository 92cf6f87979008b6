"""README, documentation and results say what the records say, and every command in them works."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shlex
import shutil
import statistics
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Kdbench
from picture_files import write_pictures

from kdbench.cli.schema import recipe_schema as build_schema
from kdbench.record import metrics, read_records, unfinished
from kdbench.results.frames import table_csv
from kdbench.results.page import html, without_charts
from kdbench.results.tables import build
from kdbench.results.texts import latex, markdown

TABLES = sorted(file.parent for file in (ROOT / "results").glob("*/table.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "results/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def shown(page: str, name: str) -> list[list[str]]:
    """The cells of the table that a page shows between the comments `NAME: begin` and `NAME: end`."""
    text = (ROOT / page).read_text(encoding="utf-8").partition(f"{name}: begin -->")[2].partition("<!--")[0]
    rows = [line for line in text.splitlines() if line.startswith("|") and "--:" not in line]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def test_getting_started_shows_the_quickstarts_own_table() -> None:
    rows = shown("docs/getting-started.md", "results/quickstart/table.md")
    table = (ROOT / "results" / "quickstart" / "table.md").read_text(encoding="utf-8").split("\n")
    assert len(rows) > 5
    assert all("| " + " | ".join(row).replace("|  ", "| ").strip() in _packed(table) for row in rows[1:])


def _packed(lines: list[str]) -> str:
    return "\n".join(re.sub(r"\| +(?=\|)", "| ", line) for line in lines)


def test_the_readmes_first_numbers_are_those_of_the_records() -> None:
    folders = ("ab_wrn", "ab_wrn_30", "ab_data_10_long", "ab_data_small")
    # Student's t, two-sided 5 %.
    quantiles = {3: 4.302653, 5: 2.776445}
    named = "results/ab_wrn, results/ab_wrn_30, results/ab_data_10_long and results/ab_data_small"
    header, (_, *teachers), *rows = shown("README.md", named)
    for column, folder in enumerate(folders, 1):
        records = sorted(read_records([ROOT / "results" / folder]), key=lambda record: record.cell.seed)
        assert {f"{record.teacher.accuracy:.2f}" for record in records if record.teacher} == {teachers[column - 1]}
        data, n = records[0].spec["data"], int(header[column][-1])
        images, epochs = round(data["train"] * data.get("fraction", 1)), round(metrics(records[0].folder)[-1]["epoch"])
        assert header[column] == f"{images:,} images, {epochs} epochs, n = {n}"
        found: dict[str, list[float]] = {}
        for record in records:
            found.setdefault(record.cell.label, []).append(record.result.test.last)
        expected = {}
        for label, values in found.items():
            if label == "student":
                expected[label] = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
            elif len(values) == n:
                gain = [a - b for a, b in zip(values, found["student"], strict=True)]
                mean, half = statistics.mean(gain), quantiles[n] * statistics.stdev(gain) / n**0.5
                expected[label] = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]".replace("-", "−")
        assert {row[0]: row[column] for row in rows if row[column] != "–"} == expected


def test_the_readmes_epochs_are_those_of_the_records() -> None:
    """What so many epochs give, and in the picture."""
    found: dict[tuple[str, Any], list[float]] = {}
    records = read_records([ROOT / "results" / "ab_speed"])
    for record in sorted(records, key=lambda record: record.cell.seed):
        found.setdefault((record.cell.label, record.cell.axes["epochs"]), []).append(record.result.test.last)
    few, many = found["AB + KD + CE", 10], found["student", 20]
    gain = [a - b for a, b in zip(few, many, strict=True)]
    mean, half = statistics.mean(gain), 4.302653 * statistics.stdev(gain) / 3**0.5
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert (
        f"AB + KD + CE reaches {statistics.mean(few):.2f} % in 10 epochs, and the plain student "
        f"{statistics.mean(many):.2f} % in 20, a difference of {mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
    ) in text
    assert {len(seeds) for (_, epochs), seeds in found.items() if epochs < 100} == {3}
    assert {len(seeds) for (_, epochs), seeds in found.items() if epochs == 100} == {1} and "one for 100 epochs" in text


@pytest.mark.parametrize("file", sorted((ROOT / "results" / "speed").glob("*.json")), ids=lambda file: file.stem)
def test_the_ratios_on_the_page_about_speed_are_the_measured_ones(file: Path) -> None:
    _, *rows = shown("docs/speed.md", f"results/speed/{file.name}")
    measured = json.loads(file.read_text(encoding="utf-8"))["results"]
    with_peers = [one for one in measured if one["rows"][0]["name"] == "torchdistill"]
    assert rows == [[one["title"], *(f"{ratio:.2f}" for ratio in one["ratios"].values())] for one in with_peers]


@pytest.mark.parametrize("folder", TABLES, ids=lambda folder: folder.name)
def test_every_committed_table_is_rebuilt_from_its_records(folder: Path) -> None:
    records = read_records([folder])
    table = build(records, unfinished=unfinished([folder]))
    assert markdown(table) == (folder / "table.md").read_text(encoding="utf-8")
    assert table_csv(table) == (folder / "table.csv").read_text(encoding="utf-8")
    assert latex(table) == (folder / "table.tex").read_text(encoding="utf-8")
    page = (folder / "table.html").read_text(encoding="utf-8")
    assert html(table, records, charts=False) == without_charts(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_that_the_documents_name_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    named += re.findall(r"`((?:tests|kdbench|registry|recipes|results)/[\w./]+)", text)
    for name in named:
        if "<" not in name:
            assert (page.parent / name).exists() or (ROOT / name.split("::")[0]).exists(), f"{page}: {name}"
    for file, test in re.findall(r"`(tests/[\w./]+)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{page}: {file}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_page_says_anything_twice(page: Path) -> None:
    """As a slip of an editor leaves it: a section once more, or a paragraph of two lines and more."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    said = re.findall(r"^## .*", text, flags=re.MULTILINE) + [part for part in text.split("\n\n") if "\n" in part]
    assert sorted(said) == sorted({*said})


def test_code_that_the_documents_name_exists() -> None:
    for page in PAGES:
        for name in re.findall(r"`(kdbench(?:\.\w+)+)(?::\w+)?[`(]", page.read_text(encoding="utf-8")):
            module, _, last = name.rpartition(".")
            try:
                found = hasattr(importlib.import_module(module), last) or importlib.import_module(name)
            except ModuleNotFoundError:
                found = False
            assert found, f"{page.name}: {name}"
        for module, name in re.findall(r"`(kdbench[\w.]*):(\w+)`", page.read_text(encoding="utf-8")):
            assert hasattr(importlib.import_module(module), name), f"{page.name}: {module}:{name}"


@pytest.mark.parametrize("page", ["README.md", "docs/recipes.md"])
def test_the_recipe_in_the_documents_is_the_shipped_one(page: str) -> None:
    block = re.findall(r"^```yaml\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S | re.M)[0]
    assert yaml.safe_load(block) == yaml.safe_load((ROOT / "recipes" / "ab_wrn.yaml").read_text(encoding="utf-8"))


def test_the_card_in_the_readme_is_part_of_the_shipped_one() -> None:
    block = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S | re.M)[1]
    card = yaml.safe_load((ROOT / "registry" / "methods" / "ab.yaml").read_text(encoding="utf-8"))["ab"]
    shown = yaml.safe_load(block)["ab"]
    stages = [{key: stage[key] for key in part} for stage, part in zip(card["stages"], shown["stages"], strict=True)]
    assert shown == {key: card[key] for key in shown} | {"stages": stages}


def commands(page: Path) -> Iterator[str]:
    """The shell commands of a page: lines of its code blocks without a language, and those in the text's code."""
    text = page.read_text(encoding="utf-8")
    blocks = [body for language, body in re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.S | re.M) if not language]
    inline = re.findall(r"`((?:kdbench|make|pip) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    for line in [line for block in blocks for line in block.splitlines()] + inline:
        command = " ".join(line.partition(" #")[0].split())
        # Capital words stand for something of the reader's.
        if command.startswith(("kdbench ", "make ", "pip ")) and not re.search(r"\b(NAME|KIND|COMMAND)\b", command):
            yield command


COMMANDS = sorted({command for page in PAGES for command in commands(page)})


def planned(words: list[str]) -> list[str]:
    """What stands for a command that takes long: its plan or its estimate."""
    match words:
        case [_] if words[0] not in ("ls", "schema"):
            return [*words, "--help"]
        case ["run", *rest]:
            return ["check", *(word for word in rest if word != "--no-adopt"), "--no-time"]
        case ["logits", "fill", recipe, *_]:
            return ["check", recipe, "--no-time"]
        case ["analyse", name, *rest]:
            return ["show", "analyses", name, *(rest[-2:] if "--registry" in rest else [])]
        case ["cp", *_]:
            return [*words, "--force"]
        case ["reproduce", *_] if "--cost" not in words:
            return [*words, "--cost"]
        case ["verify", *rest]:
            return ["verify", *(word for word in rest if word != "--rerun")]
        case ["export", *_]:
            return ["export", "--help"]
        case ["data", _]:
            return ["data", "FOLDER", "--force"]
        case ["bench", *_]:
            return ["bench", "--help"]
    return words


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    """A folder as the documents suppose it: a checkout's cards and results, a finished run, and a user's own files."""
    folder = tmp_path_factory.mktemp("documents")
    for name in ("recipes", "registry"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(tiny_run / "runs", folder / "runs")
    (folder / "results").mkdir()
    for result in TABLES:
        (folder / "results" / result.name).symlink_to(result)
    shutil.copy(ROOT / "recipes" / "quickstart.yaml", folder / "my.yaml")
    write_pictures(folder / "FOLDER")
    for page in PAGES:
        # The files of a user's own that a page shows, each with its name in the first line.
        for name, body in re.findall(
            r"^ *# (my_\w+/[\w.]+)\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.S | re.M
        ):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(textwrap.dedent(body), encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_the_documents_works(command: str, place: Path, command_line: Kdbench) -> None:
    program, *words = shlex.split(command)
    if program == "make":
        done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == "pip":
        what = " ".join(words[1:]) or "."
        assert re.fullmatch(r"\.(\[\w+\])?|kdbench\[\w+\]", what)
        for extra in re.findall(r"\[(\w+)\]", what):
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    else:
        command_line(*planned(words), cwd=place)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_in_the_documents_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M):
        exec(compile(block, str(page), "exec"), {})


def test_the_documents_hold_commands() -> None:
    assert "kdbench run recipes/ab_wrn.yaml" in COMMANDS and "make quickstart" in COMMANDS and len(COMMANDS) > 25


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200


def test_the_editors_schema_is_up_to_date() -> None:

    kept = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8"))
    assert kept == build_schema([]), "renew it: kdbench schema recipes/recipe.schema.json"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_begins_with_what_it_shows_its_command_and_its_schema(recipe: Path) -> None:
    lines = recipe.read_text(encoding="utf-8").splitlines()
    comment = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert "kdbench run" in comment[1]
    assert "easured" in comment[2]
    schema = comment[-1].partition("$schema=")[2]
    assert (recipe.parent / schema).is_file()
