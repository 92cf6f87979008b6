"""The HTML page as text: it needs nothing else, every link has its place, and every record is in it."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as xml
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic import comparison, finished, make, plain_record, write

from kdbench.drawing import COLOURS, LINES, MARKERS
from kdbench.errors import UserError
from kdbench.record import read_records
from kdbench.results import svg
from kdbench.results.curves import Look
from kdbench.results.page import html, sort_value
from kdbench.results.tables import build

VALUES = {"ce": [93.5, 93.7, 93.6], "kd": [94.0, 94.1, 93.9], "ab": [94.6, 94.3, 94.6]}
SPECIAL = """<script>alert("x")</script> & 'a' → é"""


class Page(HTMLParser):
    """Tags that are open, ids, addresses and words of a page."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "srcset", "action", "data", "poster", "xlink:href"):
                self.addresses.append((tag, value or ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_well_formed_and_every_address_is_a_place_in_it(tmp_path: Path) -> None:
    records = finished(tmp_path / "a", VALUES) + finished(tmp_path / "b", VALUES, student="wrn_16_1", recipe="other")
    text = html(build(records), records)
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert page.addresses
    for tag, address in page.addresses:
        assert address.startswith("#") and address[1:] in page.ids, (tag, address)
    # No address in styles, scripts or attributes either; a namespace is a name.
    assert not re.findall(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)|//cdn|fetch\(|XMLHttp|import\(", text)


def test_every_number_of_the_table_leads_to_its_seeds(tmp_path: Path) -> None:
    records = finished(tmp_path, VALUES)
    text = html(build(records), records)
    for i, label in enumerate(("CE", "KD", "AB")):
        article = text.partition(f'<article id="runs-{i}-0"')[2].partition("</article>")[0]
        assert f">{label}<a" in article
        row = re.search(rf'<tr><th scope="row" data-value="{label}">.*?</tr>', text)
        assert row is not None and f'href="#runs-{i}-0"' in row[0]
        for record in records:
            here = record.cell.label == label
            assert (f"<td>{record.identity[:12]}</td>" in article) == here
            assert (f"<td>{record.result.test.last:.2f}</td>" in article) or not here
        assert "Provenance and resolved recipe" in article
    for fact in ("ab" * 32, "cd" * 32, "0123456789abcdef", "Model 7 Processor, 1 thread", "float32", "synthetic"):
        assert fact in text.partition('id="provenance"')[2]


def test_the_page_says_how_networks_were_computed_in_the_words_of_the_table(tmp_path: Path) -> None:
    how = {"compute__precision": "bfloat16", "compute__layout": "channels_last", "compute__compile": True}
    for seed in (0, 1):
        write(tmp_path / str(seed), plain_record("kd", seed, 90 + seed, **how))
    records = read_records([tmp_path])
    table = build(records)
    said = "bfloat16, channels_last, compiled"
    assert f"Precision: {said}" in [note.text for note in table.notes]
    facts = html(table, records).partition('id="provenance"')[2]
    assert f"<dt>Precision</dt><dd>{said}</dd>" in facts
    assert "<dt>Machine</dt><dd>Model 7 Processor, 1 thread</dd>" in facts


def test_nothing_that_a_record_says_becomes_markup(tmp_path: Path) -> None:
    for seed in (0, 1):
        plain = plain_record("kd", seed, 90 + seed, label=SPECIAL, order=0, compute__device_name=SPECIAL)
        write(tmp_path / str(seed), plain, [{"step": s, "epoch": s, "test": {"accuracy": 50 + s}} for s in (1, 2, 3)])
    records = read_records([tmp_path])
    text = html(build(records, title=SPECIAL), records)
    page = Page(text)
    assert text.count("<script") == 1 and "alert(" not in text.partition("<script>")[2]
    assert any(SPECIAL in words for words in page.words)


def test_the_same_bytes_from_the_same_records_in_any_order(tmp_path: Path) -> None:
    records = finished(tmp_path, VALUES)
    expected = html(build(records), records)
    for seed in range(3):
        random.Random(seed).shuffle(records)
        assert html(build(records), records) == expected


def test_records_without_metrics_have_no_curve_and_the_page_says_so(tmp_path: Path) -> None:
    records = finished(tmp_path, VALUES)
    (tmp_path / "kd-1" / "metrics.jsonl").unlink()
    text = html(build(records), records)
    assert "1 of 9 runs have no metrics.jsonl beside their record." in text
    assert text.count("<polyline") == 3 * 2 + 3
    bare = html(build(comparison(VALUES)), comparison(VALUES))
    assert "9 of 9 runs have no metrics.jsonl" in bare and "<polyline" not in bare
    Page(bare)
    (tmp_path / "ab-0" / "metrics.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="damaged"):
        html(build(records), records)


def test_one_seed_and_one_method_make_a_page_too() -> None:
    records = [make("kd", 0, 90.0, compute__training_seconds=0.0, models__teacher=None)]
    page = Page(html(build(records), records))
    assert any("no deviation" in words for words in page.words)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("94.50 ± 0.17", 94.5),
        ("−16.73", -16.73),
        ("[−21.61, −11.85]", -21.61),
        ("<0.001", 0.001),
        (">1000", 1000),
        ("12,345", 12345),
        ("77.8 %", 77.8),
        ("+30", 30),
        ("–", None),
        ("", None),
    ],
)
def test_entries_are_sorted_by_their_first_number(text: str, value: float | None) -> None:
    assert sort_value(text) == value


def shapes(chart: str) -> xml.Element:
    return xml.fromstring(chart)


def test_a_line_lies_where_its_values_are() -> None:
    line = svg.Line(Look("#000000", "o", "-"), "a", [0, 50, 100], [80.0, 90.0, 85.0], [1.0, 2.0, 1.0])
    chart = shapes(svg.lines([line], "t", ("epoch", "accuracy"), (0, 100), (80, 100)))
    drawn = next(e for e in chart.iter() if e.tag.endswith("polyline")).attrib["points"]
    places = [tuple(map(float, pair.split(","))) for pair in drawn.split()]
    left, right, top, bottom = svg.LEFT, svg.WIDTH - svg.RIGHT, svg.TOP, svg.HEIGHT - svg.BOTTOM
    middle = (left + right) / 2
    assert places == [
        (left, bottom),
        (middle, (top + bottom) / 2),
        (right, pytest.approx(bottom - (bottom - top) / 4, abs=0.06)),
    ]
    band = next(e for e in chart.iter() if e.tag.endswith("polygon")).attrib["points"].split()
    assert len(band) == 6


def test_points_lead_somewhere_and_wide_ranges_are_logarithmic() -> None:
    def point(x: float) -> svg.Point:
        return svg.Point(Look("#000000", "s", "-"), x, 90.0, 0.5, f"{x} s", "#runs-0-0")

    near, far = (svg.points([point(1.0), point(x)], "t", ("seconds", "accuracy")) for x in (9.0, 900.0))
    assert "logarithmic" not in near and "seconds (logarithmic)" in far
    chart = shapes(far)
    links = [e for e in chart.iter() if e.tag.endswith("}a")]
    assert [link.attrib["href"] for link in links] == ["#runs-0-0"] * 2
    texts = [e.text for e in chart.iter() if e.tag.endswith("text")]
    assert {"1", "10", "100"} <= set(texts)


def test_every_look_has_its_own_shape() -> None:
    swatches = [svg.swatch(Look(COLOURS[0], marker, LINES[0])) for marker in MARKERS]
    assert len(set(swatches)) == len(MARKERS)
    dashes = {svg.swatch(Look(COLOURS[0], "o", line)) for line in LINES}
    assert len(dashes) == len(LINES)
    for swatch in swatches:
        shapes(swatch)


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 1, False), (93.2, 94.9, False), (0.001, 0.0012, False), (3, 5e6, True), (1, 30, True)]
)
def test_ticks_are_inside_even_and_told_apart(low: float, high: float, log: bool) -> None:
    axis = svg.Axis(low, high, 0, 100, log)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 10
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    texts = axis.texts(ticks)
    assert len(set(texts)) == len(texts)


def test_ticks_in_words() -> None:
    linear, log = svg.Axis(0, 1, 0, 1), svg.Axis(1, 2, 0, 1, True)
    assert linear.texts([0.0, 500_000.0, 1_000_000.0]) == ["0", "0.5 M", "1.0 M"]
    assert linear.texts([-5.0, 0.0, 5.0]) == ["−5", "0", "5"]
    assert linear.texts([0.75, 0.8]) == ["0.75", "0.80"]
    assert log.texts([1.0, 200.0, 10_000.0, 5e6]) == ["1", "200", "10 k", "5 M"]
