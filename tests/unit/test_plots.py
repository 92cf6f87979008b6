"""Plots: what is drawn, that labels stay apart, and that the same records give the same bytes."""

from __future__ import annotations

import itertools
import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from synthetic import make, plain_record, write

from kdbench import drawing
from kdbench.cli import plot
from kdbench.errors import UserError
from kdbench.record import Record, read_records
from kdbench.results import costs, plots
from kdbench.results.comparison import Row, compare
from kdbench.results.curves import last_quarter
from kdbench.results.tables import build
from kdbench.results.writing import write_tables_and_plots
from kdbench.verify import sums

LABELS = {"ce": "student", "kd": "KD", "hint": "FitNets (one stage)", "ab": "AB"}


def draw_all(records: list[Record], folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [
        plots.learning_curves(records, folder / "learning_curves.png"),
        *plots.metric_curves(records, folder),
        plots.final_accuracies(records, folder / "final_accuracies.png"),
    ]


def run(folder: Path, methods: tuple[str, ...] = tuple(LABELS), seeds: int = 3, **over: Any) -> list[Record]:
    """Finished cells with metrics: accuracy 80 + method + seed / 10 + epoch / 10, agreement for AB."""
    for k, method in enumerate(methods):
        for seed in range(seeds):
            lines = [
                {
                    "step": 391 * epoch,
                    "epoch": float(epoch),
                    "test": {"accuracy": 80 + k % 15 + seed / 10 + epoch / 10, "loss": 1.0},
                    **(
                        {
                            "metrics": {
                                "agreement": {"layer1.preact": 0.5 + epoch / 100, "layer2.preact": 0.4 + epoch / 100}
                            }
                        }
                        if method == "ab"
                        else {}
                    ),
                }
                for epoch in range(4, 41, 4)
            ]
            last = lines[-1]["test"]["accuracy"]  # type: ignore[index]
            write(
                folder / f"{method}-{seed}-{len(over)}-{over.get('student', '')}",
                plain_record(method, seed, last, label=LABELS.get(method, method), order=k, **over),
                lines,
            )
    return read_records([folder])


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The figures that are saved."""
    saved: list[Figure] = []
    original = Figure.savefig

    def keep(self: Figure, *arguments: Any, **options: Any) -> None:
        saved.append(self)
        original(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    yield saved


def test_curves_are_means_over_seeds_with_bands(tmp_path: Path, figures: list[Figure]) -> None:
    file = plots.learning_curves(run(tmp_path / "runs"), tmp_path / "curves.png")
    assert file.read_bytes().startswith(b"\x89PNG")
    whole, end = figures[0].axes
    lines = {line.get_label(): line for line in whole.get_lines()}
    assert list(lines) == list(LABELS.values())
    np.testing.assert_allclose(lines["KD"].get_xdata(), np.arange(4, 41, 4))
    np.testing.assert_allclose(lines["KD"].get_ydata(), 81.1 + np.arange(4, 41, 4) / 10)
    band = whole.collections[1].get_paths()[0].vertices
    at_end = band[np.isclose(band[:, 0], 40), 1]
    assert (at_end.min(), at_end.max()) == (pytest.approx(85.0), pytest.approx(85.2))
    assert end.get_xlim()[0] > 25 and end.get_ylim()[0] > 82
    assert len({line.get_color() for line in whole.get_lines()}) == 4
    assert len({line.get_marker() for line in whole.get_lines()}) == 4
    assert (whole.get_xlabel(), whole.get_ylabel()) == ("epoch", "test accuracy (%) ± 1 deviation")


def test_one_evaluation_and_methods_of_different_length(tmp_path: Path, figures: list[Figure]) -> None:
    """Both are drawn; there is nothing in a last quarter to enlarge, so nothing is called that."""
    for method, epochs in (("ce", [1.0]), ("ab", [1.0, 50.0])):
        write(
            tmp_path / "runs" / method,
            plain_record(method, agreement={}),
            [{"step": int(epoch * 10), "epoch": epoch, "test": {"accuracy": 50.0}} for epoch in epochs],
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.learning_curves(read_records([tmp_path / "runs" / "ce"]), tmp_path / "one.png")
        plots.learning_curves(read_records([tmp_path / "runs"]), tmp_path / "both.png")
    assert [[axis.get_title() for axis in figure.axes] for figure in figures] == [["whole run"]] * 2
    # One seed has no band.
    assert [figure.axes[0].get_ylabel() for figure in figures] == ["test accuracy (%)"] * 2


def test_letters_that_the_font_lacks_are_boxes_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with drawing.style():
            figure, (axis,) = drawing.panels(1, 1, (2, 2))
            axis.set_title("日本")
            drawing.save(figure, tmp_path / "x.png")
            assert "日本" in drawing.svg(figure, "title", "name")


def test_methods_that_trained_for_a_shorter_time_are_named(tmp_path: Path, figures: list[Figure]) -> None:
    run(tmp_path / "runs", ("ce", "kd"))
    for line in (tmp_path / "runs").glob("ce-*/metrics.jsonl"):
        line.write_text("".join(line.read_text().splitlines(keepends=True)[:4]))
    plots.learning_curves(read_records([tmp_path / "runs"]), tmp_path / "curves.png")
    assert [axis.get_title() for axis in figures[0].axes] == ["whole run", "last quarter\n(ended before: student)"]


def test_four_evaluations_on_whole_steps_have_a_last_quarter(tmp_path: Path, figures: list[Figure]) -> None:
    """Of 391 steps the third lies at 293, which is 0.749 of an epoch."""
    steps = (98, 196, 293, 391)
    lines = [{"step": s, "epoch": s / 391, "test": {"accuracy": 50.0 + s / 100}} for s in steps]
    write(tmp_path / "runs" / "ce", plain_record("ce", agreement={}), lines)
    plots.learning_curves(read_records([tmp_path / "runs"]), tmp_path / "curves.png")
    assert [axis.get_title() for axis in figures[0].axes] == ["whole run", "last quarter"]
    # A curve alone is in it with all its points.
    low, high = figures[0].axes[1].get_ylim()
    assert low < 50.0 + 293 / 100 and high > 50.0 + 391 / 100


def test_a_metric_s_plot_stays_in_its_folder(tmp_path: Path) -> None:
    """Its name may come from somebody else's record."""
    measured = {"test": {"accuracy": 50.0}, "metrics": {"../evil": {"layer1": 0.5}}}
    lines = [{"step": s, "epoch": s, **measured} for s in (1, 2)]
    write(tmp_path / "runs" / "ce", plain_record("ce", agreement={}), lines)
    with pytest.raises(UserError, match="evil"):
        plots.metric_curves(read_records([tmp_path / "runs"]), tmp_path / "plots")
    assert not list(tmp_path.rglob("evil.png"))


def test_a_method_far_below_does_not_flatten_the_enlarged_panel(tmp_path: Path, figures: list[Figure]) -> None:
    records = run(tmp_path / "runs")
    for line in (tmp_path / "runs").glob("kd-*/metrics.jsonl"):
        line.write_text(line.read_text().replace('"accuracy": 8', '"accuracy": 2'))
    plots.learning_curves(records, tmp_path / "curves.png")
    end = figures[0].axes[1]
    assert end.get_title() == "last quarter\n(below: KD)"
    assert end.get_ylim()[0] > 70 and figures[0].axes[0].get_ylim()[0] < 30


def test_agreement_has_one_panel_for_each_hook_point(tmp_path: Path, figures: list[Figure]) -> None:
    assert plots.metric_curves(run(tmp_path / "runs"), tmp_path) == [tmp_path / "agreement.png"]
    assert [axis.get_title() for axis in figures[0].axes] == ["layer1.preact", "layer2.preact"]
    for axis, start in zip(figures[0].axes, (0.5, 0.4), strict=True):
        (line,) = axis.get_lines()
        np.testing.assert_allclose(line.get_ydata(), start + np.arange(4, 41, 4) / 100)
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["AB"]


@pytest.mark.parametrize(("reference", "below"), [(0.88, True), (0.61, False), (0.97, False)])
def test_agreement_is_shown_beside_what_a_student_has_that_ignores_its_input(
    reference: float, below: bool, tmp_path: Path, figures: list[Figure]
) -> None:
    records = run(tmp_path / "runs", result__references={"agreement": {"layer1.preact": reference}})
    plots.metric_curves(records, tmp_path)
    first, second = figures[0].axes
    np.testing.assert_allclose(first.get_lines()[-1].get_ydata(), reference)
    # The curve ends at 0.9, and the words do not lie on it.
    (words,) = first.texts
    box, line = words.get_window_extent(), first.transData.transform((0, reference))[1]
    assert words.get_text() == "input ignored" and ((box.y1 < line) if below else (box.y0 > line))
    assert len(second.get_lines()) == 1


def test_no_agreement_is_no_file(tmp_path: Path) -> None:
    assert plots.metric_curves(run(tmp_path / "runs", ("ce", "kd")), tmp_path) == []
    assert not (tmp_path / "agreement.png").exists()


def drawn_costs(records: list[Record]) -> dict[str, Any]:
    """Axes of the charts of accuracy against cost, by their titles."""
    found = {}
    for panel in costs.cost_panels(build(records), compare(records)):
        _, (axis,) = drawing.panels(1, 1, (4.0, 3.0))
        panel.draw(axis)
        found[panel.title] = axis
    return found


def test_accuracies_on_several_target_domains_have_no_common_axis() -> None:
    records = []
    for name, last in (("usps", 90.0), ("svhn", 40.0)):
        target = make().data.model_dump() | {"name": name}
        records += [make(m, 0, last, cell__target=name, target=target, order=k) for k, m in enumerate(("ce", "kd"))]
    found = drawn_costs(records)
    assert sorted(title.partition(":")[0] for title in found) == ["svhn", "svhn", "usps", "usps"]


def test_accuracy_is_drawn_against_time_and_size() -> None:
    values = {"ce": [90.0, 91.0], "kd": [92.0, 94.0]}
    records = [
        make(m, s, v, order=k, compute__training_seconds=seconds)
        for k, (m, seconds) in enumerate((("ce", 10.0), ("kd", 30.0)))
        for s, v in enumerate(values[m])
    ]
    times = drawn_costs(records)["training time of one seed"]
    places = [(bars[0].get_xdata()[0], bars[0].get_ydata()[0]) for bars in times.containers]
    assert places == [(10.0, pytest.approx(90.5)), (30.0, pytest.approx(93.0))]
    (whisker,) = times.containers[1][2][0].get_segments()
    assert whisker[:, 1] == pytest.approx([93 - 2**0.5, 93 + 2**0.5])
    assert times.get_xlabel() == "seconds" and times.get_xscale() == "linear"
    assert times.get_ylabel() == "test accuracy (%) ± 1 deviation"
    slow = [*records, make("slow", 0, 95.0, order=2, compute__training_seconds=900.0)]
    assert drawn_costs(slow)["training time of one seed"].get_xlabel() == "seconds (logarithmic)"
    large = drawn_costs(
        [make("kd", s, 90.0 + s, models__teacher={"parameters": 5_000_000, "flops": 1.0}) for s in (0, 1)]
    )
    sizes = large["parameters"].containers
    assert [bars.get_label() for bars in sizes] == ["KD", "teacher"]
    assert [bars[0].get_xdata()[0] for bars in sizes] == [691674, 5_000_000]


def test_two_data_sets_have_no_common_axis() -> None:
    records = [make("kd", s, 90.0 + s, data=data, recipe=data) for data in ("cifar10", "cifar100") for s in (0, 1)]
    assert list(drawn_costs(records)) == [
        f"{data}: {what}" for data in ("cifar10", "cifar100") for what in ("training time of one seed", "parameters")
    ]


def test_every_seed_is_a_point(tmp_path: Path, figures: list[Figure]) -> None:
    plots.final_accuracies(run(tmp_path / "runs"), tmp_path / "final.png")
    (axis,) = figures[0].axes
    points = [line for line in axis.get_lines() if line.get_linestyle() == "None"]
    np.testing.assert_allclose([line.get_xdata() for line in points], [[84 + k, 84.1 + k, 84.2 + k] for k in range(4)])
    assert [label.get_text() for label in axis.get_yticklabels()] == list(LABELS.values())
    assert "teacher 95.50" in axis.get_title() and axis.get_xlabel() == "test accuracy (%) ± 1 deviation"


def test_the_teacher_is_a_line_only_where_it_is_near(tmp_path: Path, figures: list[Figure]) -> None:
    plots.final_accuracies([make("kd", s, 95.0 + s / 10) for s in (0, 1)], tmp_path / "near.png")
    assert "dashed: teacher 95.50" in figures[0].axes[0].get_title()
    plots.final_accuracies([make("kd", s, 60.0 + s / 10) for s in (0, 1)], tmp_path / "far.png")
    assert "dashed" not in figures[1].axes[0].get_title()
    assert figures[1].axes[0].get_xlim()[1] < 70


def test_one_seed_and_several_columns(tmp_path: Path, figures: list[Figure]) -> None:
    run(tmp_path / "runs", seeds=1, student="wrn_16_2")
    records = run(tmp_path / "runs", seeds=1, student="wrn_40_1")
    assert all(file.is_file() for file in draw_all(records, tmp_path))
    assert len(figures[0].axes) == 4 and len(figures[1].axes) == 4 and len(figures[2].axes) == 2
    assert figures[1].axes[0].get_ylabel() == "agreement" and figures[2].axes[0].get_xlabel() == "test accuracy (%)"


def test_labels_do_not_overlap(tmp_path: Path, figures: list[Figure]) -> None:
    run(tmp_path / "runs", student="wrn_16_2")
    records = run(tmp_path / "runs", student="wrn_40_1")
    draw_all(records, tmp_path)
    for figure in figures:
        page = figure.bbox
        texts = [
            (t.get_text(), t.get_window_extent())
            for axis in figure.axes
            for t in (
                axis.title,
                axis.xaxis.label,
                axis.yaxis.label,
                *[t for t in axis.get_xticklabels() + axis.get_yticklabels() if _inside(axis, t)],
            )
            if t.get_text()
        ]
        texts += [(t.get_text(), t.get_window_extent()) for legend in figure.legends for t in legend.get_texts()]
        assert len(texts) > 10
        for i, (a, box) in enumerate(texts):
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, a
            for b, other in texts[:i]:
                assert not box.overlaps(other), (a, b)


def _inside(axis: Any, label: Any) -> bool:
    """Whether a tick label is drawn: its tick lies within the axis' limits (and the axis shows its labels)."""
    if not label.get_visible():
        return False
    x, y = label.get_position()
    horizontal = label in axis.get_xticklabels()
    low, high = sorted(axis.get_xlim() if horizontal else axis.get_ylim())
    return bool(low <= (x if horizontal else y) <= high)


def test_the_same_records_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    records = run(tmp_path / "runs")
    first = [file.read_bytes() for file in draw_all(records, tmp_path / "first")]
    random.Random(1).shuffle(records)
    assert [file.read_bytes() for file in draw_all(records, tmp_path / "second")] == first


def test_the_last_digits_of_a_layout_are_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver of the layout ends in one digit or another, as its variables lie in memory."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    def drawn(noise: float) -> bytes:
        def execute(engine: Any, figure: Any) -> None:
            width = figure.get_size_inches()[0] * drawing.DPI
            for axis in figure.axes:
                # An edge on half a pixel goes to one side or the other.
                axis.set_position(((100.5 + noise) / width, 0.2, 0.6, 0.6))

        monkeypatch.setattr(ConstrainedLayoutEngine, "execute", execute)
        return plots.final_accuracies([make()], tmp_path / "picture.png").read_bytes()

    assert drawn(1e-12) == drawn(-1e-12) != drawn(1.0)


def test_plots_as_pdf_have_letters_and_no_fonts_that_publishers_refuse(tmp_path: Path) -> None:
    run(tmp_path / "runs")
    before = sums.write(tmp_path / "runs").read_bytes()
    for folder in ("first", "second"):
        plot.command([tmp_path / "runs"], tmp_path / folder, "pdf")
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()} for folder in ("first", "second")
    )
    assert first == second and {*first} == {"learning_curves.pdf", "agreement.pdf", "final_accuracies.pdf"}
    for content in first.values():
        assert content.startswith(b"%PDF") and b"/CIDFontType2" in content and b"/Type3" not in content
    plot.command([tmp_path / "runs"], None, "pdf")
    assert (tmp_path / "runs" / "SHA256SUMS").read_bytes() == before


def test_the_users_matplotlib_settings_stay_out_and_stay_theirs(tmp_path: Path) -> None:
    import matplotlib

    records = run(tmp_path / "runs", ("kd",))
    first = plots.final_accuracies(records, tmp_path / "first.png").read_bytes()
    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "red"}):
        assert plots.final_accuracies(records, tmp_path / "second.png").read_bytes() == first
        assert matplotlib.rcParams["font.size"] == 31


def test_a_record_without_metrics_is_named(tmp_path: Path) -> None:
    write(tmp_path / "cell", plain_record())
    with pytest.raises(UserError, match="cannot be read") as error:
        plots.learning_curves(read_records([tmp_path]), tmp_path / "curves.png")
    assert error.value.where == str(tmp_path / "cell" / "metrics.jsonl")
    with pytest.raises(UserError, match="has no evaluations"):
        plots.learning_curves([make()], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_a_plot_has_a_palette_and_a_photograph_all_its_colours(tmp_path: Path) -> None:
    with drawing.style():
        figure, (axis,) = drawing.panels(1, 1, (4.0, 3.0))
        axis.plot([0, 1], [0, 1], color="#0072B2")
        plot = Image.open(drawing.save(figure, tmp_path / "plot.png"))
        figure, (axis,) = drawing.panels(1, 1, (4.0, 3.0))
        axis.imshow(np.random.default_rng(0).random((64, 64, 3)))
        photograph = Image.open(drawing.save(figure, tmp_path / "photograph.png"))
    assert plot.mode == "P" and photograph.mode == "RGB"
    colours = {colour for _, colour in plot.convert("RGB").getcolors(1 << 24)}
    assert {(255, 255, 255), (0, 0x72, 0xB2)} <= colours


def test_many_methods_are_drawn_in_groups_that_can_be_told_apart(tmp_path: Path, figures: list[Figure]) -> None:
    methods = tuple(f"method{i}" for i in range(24))
    draw_all(run(tmp_path / "runs", methods, seeds=2), tmp_path / "plots")
    curves = figures[0]
    curves.canvas.draw()
    seen = []
    for axis in curves.axes:
        lines = [line for line in axis.get_lines() if not str(line.get_label()).startswith("_")]
        looks = {(line.get_color(), line.get_marker()) for line in lines}
        assert len(looks) == len(lines) <= 10 and lines[0].get_label() == "method0"
        seen += [line.get_label() for line in lines[1:]]
    assert seen.count("method23") == 2 and set(seen) == set(methods[1:])
    boxes = [legend.get_window_extent() for axis in curves.axes if (legend := axis.get_legend()) is not None]
    panels = [axis.get_window_extent() for axis in curves.axes]
    assert len(boxes) == 3 and not any(box.overlaps(panel) for box in boxes for panel in panels)


def test_plots_of_an_earlier_table_do_not_stay_beside_a_smaller_one(tmp_path: Path) -> None:
    """Of three budgets and a method that measures agreement, then of two without it. What is not ours stays."""
    run_folder = tmp_path / "r"

    def table_of(epochs: tuple[int, ...], methods: tuple[str, ...]) -> set[str]:
        names = []
        for method, e in itertools.product(methods, epochs):
            measured = {"metrics": {"agreement": {"layer1.preact": 0.5}}} if method == "ab" else {}
            lines = [{"step": s, "epoch": s / 2, "test": {"accuracy": 50.0}, **measured} for s in (1, 2)]
            agreement = {"layer1.preact": 0.5} if measured else {}
            axes = {"method": method, "epochs": e}
            record = plain_record(method, 0, 80.0 + e, axes=axes, epochs=float(e), agreement=agreement)
            names.append(name := f"{method}-{e}-{record['identity'][:8]}")
            if not (run_folder / name).exists():
                write(run_folder / name, record, lines)
        (run_folder / "recipe.json").write_text(json.dumps({"name": "r", "cells": names}))
        _, files = write_tables_and_plots([run_folder], run_folder, [])
        plots_there = {file.name for file in run_folder.glob("*.png")}
        assert {file.name for file in files if file.suffix == ".png"} <= plots_there
        return plots_there

    always = {"learning_curves.png", "final_accuracies.png"}
    assert table_of((1, 2, 3), ("ce", "ab")) == always | {"by_epochs.png", "agreement.png"}
    Image.new("RGB", (2, 2)).save(run_folder / "mine.png")
    assert table_of((1, 2), ("ce",)) == always | {"mine.png"}


def test_the_last_quarter_holds_bands_of_one_deviation_and_methods_that_end_a_little_earlier() -> None:
    """Seeds at 90 and 92: mean 91, sample deviation √2, and 6 % of the band's height as room on either side."""
    epochs, seeds = np.arange(0, 101, 10.0), np.array([[90.0], [92.0]])
    long, short = Row("long", "long"), Row("short", "short")
    curves = {long: (epochs, seeds.repeat(11, axis=1))}
    found = last_quarter(curves)
    assert found is not None and found.epochs == pytest.approx((73, 101))
    half = 1.12 * 2**0.5
    assert found.values == pytest.approx((91 - half, 91 + half))
    # Two of its evaluations are in the quarter.
    found = last_quarter(curves | {short: (epochs[:10], seeds.repeat(10, axis=1))})
    assert found is not None and found.before == ()


@pytest.mark.parametrize(("last", "bottom", "below"), [(79.0, 79.0, ()), (77.1, 78.0, ()), (77.0, 78.0, ("last",))])
def test_who_ends_three_times_as_far_below_the_median_as_the_best_is_above_it_is_left_out(
    last: float, bottom: float, below: tuple[str, ...]
) -> None:
    """The best is 4 above the median of 90, so the part ends at 78, and 6 % of its height below that."""
    epochs, ends = np.arange(0, 101, 10.0), {"best": 94.0, "a": 90.0, "b": 90.0, "c": 90.0, "last": last}
    found = last_quarter({Row(name, name): (epochs, np.full((1, 11), value)) for name, value in ends.items()})
    assert found is not None and found.below == below
    assert found.values == pytest.approx((bottom - 0.06 * (94 - bottom), 94 + 0.06 * (94 - bottom)))
