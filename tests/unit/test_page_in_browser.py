"""The HTML page in a real browser: it sorts, its numbers lead to their cells, and nothing leaves the page."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic import finished

from kdbench.results.page import POLICY, html
from kdbench.results.tables import build

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
VALUES = {"ce": [93.5, 93.7, 93.6], "kd": [94.0, 94.1, 93.9], "ab": [94.6, 94.3, 94.6]}


class Browser:
    """Chromium behind its driver, over the plain WebDriver protocol."""

    def __init__(self, driver: str, profile: Path) -> None:
        self.driver = driver
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--window-size=1200,900",
            f"--user-data-dir={profile}",
        ]
        wanted = {"goog:chromeOptions": {"args": flags}, "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"}}
        answer = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/session/{answer['sessionId']}"

    def call(self, verb: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.driver + path, data, {"Content-Type": "application/json"}, method=verb)
        # The driver is on this machine: no proxy of the environment may stand between.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path) -> None:
        self.logged("performance")
        self.call("POST", f"{self.session}/url", {"url": page.as_uri()})

    def script(self, code: str, *arguments: Any) -> Any:
        return self.call("POST", f"{self.session}/execute/sync", {"script": code, "args": list(arguments)})

    def click(self, css: str) -> None:
        found = self.call("POST", f"{self.session}/element", {"using": "css selector", "value": css})
        self.call("POST", f"{self.session}/element/{found[ELEMENT]}/click", {})

    def logged(self, kind: str) -> list[dict[str, Any]]:
        return self.call("POST", f"{self.session}/se/log", {"type": kind})

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last page was opened."""
        messages = [json.loads(entry["message"])["message"] for entry in self.logged("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if absent:
        reason = f"not installed: {', '.join(absent)} (Debian: chromium, chromium-driver)"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}, and CI must not skip this")
        pytest.skip(reason)
    process = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = next(line for line in process.stdout if "started successfully on port" in line)
        port = said.rpartition("port ")[2].strip().rstrip(".")
        yield (found := Browser(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("profile")))
        found.call("DELETE", found.session)
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    records = finished(folder / "runs", VALUES)
    file = folder / "table.html"
    file.write_text(html(build(records), records), encoding="utf-8")
    return file


def methods(browser: Browser) -> list[str]:
    """First entries of the first table as they stand."""
    return browser.script(
        "return [...document.querySelector('table.sortable').querySelectorAll('tbody tr')]"
        ".map(r => r.cells[0].innerText)"
    )


def test_a_click_on_a_title_sorts_and_the_third_click_restores(browser: Browser, page: Path) -> None:
    browser.open(page)
    teacher = "teacher wrn_22_4_cifar10"
    assert methods(browser) == [teacher, "CE", "KD", "AB"]
    second = "table.sortable th:nth-child(2) button"
    browser.click(second)
    assert methods(browser) == [teacher, "AB", "KD", "CE"]
    sorted_by = "return document.querySelector('table.sortable th:nth-child(2)').getAttribute('aria-sort')"
    assert browser.script(sorted_by) == "descending"
    browser.click(second)
    assert methods(browser) == [teacher, "CE", "KD", "AB"]
    browser.click("table.sortable th:nth-child(1) button")
    assert methods(browser) == [teacher, "AB", "CE", "KD"]
    assert browser.script(sorted_by) is None
    for _ in range(2):
        browser.click("table.sortable th:nth-child(1) button")
    assert methods(browser) == [teacher, "CE", "KD", "AB"]


def test_the_keyboard_sorts_too(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.script("document.querySelector('table.sortable th:nth-child(2) button').focus()")
    keys = [{"type": kind, "value": "\ue007"} for kind in ("keyDown", "keyUp")]
    browser.call("POST", f"{browser.session}/actions", {"actions": [{"type": "key", "id": "k", "actions": keys}]})
    assert methods(browser)[1] == "AB"


def test_a_number_leads_to_its_cells_with_recipe_seeds_and_provenance(browser: Browser, page: Path) -> None:
    browser.open(page)
    link = "table.sortable tbody tr:last-child td a.cells"
    target = browser.script(f"return document.querySelector('{link}').hash")
    browser.click(link)
    assert browser.script("return location.hash") == target
    # The browser scrolls to it, and what is folded there unfolds.
    shown = browser.script("const t = document.querySelector(':target'); return [t.tagName, t.innerText]")
    assert shown[0] == "ARTICLE"
    words = "AB, 94.60, 94.30, synthetic, Model 7 Processor, 0123456789abcdef, fingerprint, label: AB"
    for word in words.split(", "):
        assert word in shown[1], word
    on_screen = "const r = document.querySelector(':target').getBoundingClientRect(); return [r.top, innerHeight]"
    for _ in range(50):
        top, height = browser.script(on_screen)
        if -5 <= top < height:
            break
    assert -5 <= top < height
    browser.click(":target h3 a")
    assert browser.script("return location.hash") == "#table"


def test_nothing_leaves_the_page_and_nothing_complains(browser: Browser, page: Path) -> None:
    browser.logged("browser")
    browser.open(page)
    browser.script("window.scrollTo(0, document.body.scrollHeight)")
    assert browser.requests() == [page.as_uri()]
    assert browser.script("return performance.getEntriesByType('resource').length") == 0
    assert browser.logged("browser") == []


def test_a_request_would_be_seen_and_the_page_forbids_it(browser: Browser, page: Path) -> None:
    """The test above can fail: the same page with a picture from elsewhere asks for it, unless its policy is kept."""
    picture = '<img src="http://127.0.0.1:9/picture.png">'
    text = page.read_text(encoding="utf-8").replace("<main>", f"<main>{picture}")
    open_page, kept = page.with_name("open.html"), page.with_name("kept.html")
    open_page.write_text(text.replace(POLICY, "default-src * 'unsafe-inline'"), encoding="utf-8")
    kept.write_text(text, encoding="utf-8")
    browser.open(open_page)
    assert "http://127.0.0.1:9/picture.png" in browser.requests()
    browser.logged("browser")
    browser.open(kept)
    assert any("Content Security Policy" in entry["message"] for entry in browser.logged("browser"))


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_is_as_wide_as_the_screen_and_its_charts_are_drawn(browser: Browser, page: Path, width: int) -> None:
    browser.open(page)
    # A window is never as narrow as a phone; a frame is.
    browser.call(
        "POST",
        f"{browser.session}/goog/cdp/execute",
        {
            "cmd": "Emulation.setDeviceMetricsOverride",
            "params": {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600},
        },
    )
    assert browser.script("return document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    boxes = browser.script(
        "return [...document.querySelectorAll('svg.chart')].map(c => c.getBoundingClientRect())"
        ".map(b => [b.width, b.height])"
    )
    assert len(boxes) == 5
    assert all(250 < w <= width and h > 150 for w, h in boxes)
    drawn = browser.script(
        "return [...document.querySelectorAll('svg.chart')]"
        ".map(s => [...s.querySelectorAll('use, path')]"
        ".filter(e => e.getBoundingClientRect().width > 0).length)"
    )
    assert len(drawn) == 5 and all(count >= 20 for count in drawn)
    smallest = browser.script(
        "const words = [...document.querySelectorAll('svg.chart text')];"
        "return Math.min(...words.map(t => t.getBoundingClientRect().height))"
    )
    assert smallest >= 9, "words too small to read"


def test_printed_it_keeps_the_table_and_drops_what_only_a_screen_has_use_for(browser: Browser, page: Path) -> None:
    if shutil.which("pdftotext") is None:
        pytest.skip("pdftotext is not installed")
    browser.open(page)
    pdf = base64.b64decode(browser.call("POST", f"{browser.session}/print", {"background": False}))
    file = page.with_name("page.pdf")
    file.write_bytes(pdf)
    text = subprocess.run(["pdftotext", "-layout", str(file), "-"], check=True, capture_output=True, text=True).stdout
    for kept in ("AB", "94.50", "Learning curves", "Provenance", "sample standard deviation over the seeds"):
        assert kept in text, kept
    assert "A click on a title sorts" not in text
