"""The HTML page as text: it needs nothing else, every link has its place, and every record is in it."""

from __future__ import annotations

import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic import comparison, finished, make, plain_record, write

from kdbench.errors import UserError
from kdbench.record import read_records
from kdbench.results.page import html, without_charts
from kdbench.results.rendering import sort_value
from kdbench.results.tables import build

VALUES = {"ce": [93.5, 93.7, 93.6], "kd": [94.0, 94.1, 93.9], "ab": [94.6, 94.3, 94.6]}
SPECIAL = """<script>alert("x")</script> & 'a' → é"""


COSTS = ["training time of one seed", "parameters"]


def charts_of(text: str) -> list[str]:
    """Titles of the charts that are drawn."""
    return re.findall(r'<figcaption>([^<]*)</figcaption><svg class="chart"', text)


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
    clips = re.findall(r"url\(([^)]*)\)", text)
    assert clips and all(clip[0] == "#" and clip[1:] in page.ids for clip in clips)
    # No address in styles, scripts or attributes either; a namespace is a name.
    namespace = r"(?!www\.w3\.org/(?:2000/svg|1999/xlink)\")"
    assert not re.findall(rf"@import|https?://{namespace}|//cdn|fetch\(|XMLHttp|import\(", text)


def test_every_number_of_the_table_leads_to_its_seeds(tmp_path: Path) -> None:
    records = finished(tmp_path, VALUES)
    text = html(build(records), records)
    for i, label in enumerate(("CE", "KD", "AB")):
        article = text.partition(f'<article id="cells-{i}-0"')[2].partition("</article>")[0]
        assert f">{label}<a" in article
        row = re.search(rf'<tr><th scope="row" data-value="{label}">.*?</tr>', text)
        assert row is not None and f'href="#cells-{i}-0"' in row[0]
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
    assert f"Precision: {said}." in [note.text for note in table.notes]
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
    assert "No metrics.jsonl beside the record of 1 of 9 cells." in text
    assert charts_of(text) == ["whole run", "last quarter", "layer1.preact", *COSTS]
    (curves,) = re.findall(r'<svg class="chart".*?</svg>', text, flags=re.DOTALL)[:1]
    assert ">KD</text>" in curves, "of its other seeds"
    bare = html(build(comparison(VALUES)), comparison(VALUES))
    assert "beside the record of 9 of 9 cells" in bare and charts_of(bare) == COSTS
    Page(bare)
    (tmp_path / "ab-0" / "metrics.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="damaged"):
        html(build(records), records)


def test_charts_are_words_and_shapes_of_the_records_and_the_rest_is_the_same_without_them(tmp_path: Path) -> None:
    records = finished(tmp_path, VALUES)
    table = build(records)
    text = html(table, records)
    for chart in re.findall(r'<svg class="chart".*?</svg>', text, flags=re.DOTALL):
        # Words stay words, and every chart has its own legend.
        assert all(f">{word}</text>" in chart for word in ("AB", *(() if "layer1" in chart else ("CE", "KD"))))
    assert not re.search(r"\d{4}-\d\d-\d\dT|Matplotlib", text), "a date or a version"
    bare = without_charts(text)
    assert bare == html(table, records, charts=False) and "<svg" not in bare
    for kept in ("94.50 ± 0.17", "last quarter", "Provenance and resolved recipe", records[0].identity[:12]):
        assert kept in bare


def test_the_teachers_size_is_said_and_drawn(tmp_path: Path) -> None:
    records = finished(tmp_path, VALUES, models__teacher={"parameters": 2_748_890, "flops": 8.0e8})
    text = html(build(records), records)
    assert "95.50 %, 2,748,890 parameters, sha256" in text
    size = text.rpartition('<svg class="chart"')[2]
    assert ">teacher</text>" in size and ">parameters</text>" in size and "M</text>" in size


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
        ("2.5e-05", 2.5e-05),
        ("1.235e+06", 1.235e06),
        ("–", None),
        ("", None),
    ],
)
def test_entries_are_sorted_by_their_first_number(text: str, value: float | None) -> None:
    assert sort_value(text) == value
