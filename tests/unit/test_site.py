"""The documentation builds without a warning, asks for nothing outside itself, and shows what cards and code say."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Once

pytest.importorskip("mkdocs", reason="the documentation needs the extra: pip install 'kdbench[docs]'")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(once: Once) -> Path:
    def make(folder: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return once("site", make)


class Requests(HTMLParser):
    """What a browser asks for when it shows a page: not the links that a reader may follow."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") == "canonical":
            return
        names = ["src", "srcset", "data", "poster", *(["href"] if tag in ("link", "use", "image") else [])]
        self.found += [value for name in names if (value := given.get(name))]


def test_no_page_asks_for_anything_outside_the_site(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        text = page.read_text(encoding="utf-8")
        reader = Requests()
        reader.feed(text)
        assert not [url for url in reader.found if re.match(r"(https?:)?//", url)], page
        assert 'class="mermaid"' not in text, f"{page}: the theme would fetch a script for this"
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet
    assert (site / "assets" / "iframe-worker.js").is_file()


def text_of(page: Path) -> str:
    return unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_every_method_has_its_section_with_formula_paper_and_differences(site: Path) -> None:
    for file in (ROOT / "registry" / "methods").glob("*.yaml"):
        page = site / "methods" / f"{file.stem}.html"
        text = text_of(page)
        assert "<math" in page.read_text(encoding="utf-8") and "arithmatex" not in page.read_text(encoding="utf-8")
        for key, card in yaml.safe_load(file.read_text(encoding="utf-8")).items():
            assert f"Key: {key}\n" in text
            for difference in card.get("departs", []):
                assert " ".join(difference.replace("`", "").split())[1:] in " ".join(text.split()), key


def test_every_loss_of_a_card_has_its_formula() -> None:
    for file in (ROOT / "registry" / "losses").glob("*.yaml"):
        for key, card in yaml.safe_load(file.read_text(encoding="utf-8")).items():
            if "target" in card:
                module, _, name = card["target"].partition(":")
                assert "$$" in (getattr(importlib.import_module(module), name).__doc__ or ""), key


def test_every_command_and_every_loss_has_its_section(site: Path) -> None:
    from kdbench import losses
    from kdbench.cli import app

    commands, api = text_of(site / "commands.html"), text_of(site / "api.html")
    for command in (shown for shown in app.registered_commands if not shown.hidden):
        assert f"kdbench {command.name}" in commands
    for name in losses.__all__:
        assert re.search(rf"\b{name}\b", api), name


def test_every_result_has_its_page(site: Path) -> None:
    for table in (ROOT / "results").glob("*/table.md"):
        page = site / "results" / table.parent.name / "table.html"
        title = table.read_text(encoding="utf-8").split("\n")[0].strip("*").replace("\\", "")
        assert title in text_of(page)
        assert (page.parent / "interactive.html").is_file()
