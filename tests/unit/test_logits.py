"""Tables of teacher logits: what they hold, when they are used, and that nothing else is ever taken for them."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shipped import REGISTRY
from tiny import CPU, images, sets_at, shortened, train, untrained_teacher

from kdbench.data.augment import Augmentation
from kdbench.data.images import ImageData
from kdbench.engine.computing.compute import Computing
from kdbench.engine.data.batches import Batches
from kdbench.engine.member import Member
from kdbench.engine.teachers import logit_files, logit_table
from kdbench.engine.teachers.logit_files import LogitTable, table_at
from kdbench.engine.teachers.teacher import SplitLogits, Teacher
from kdbench.engine.workers.materials import Materials
from kdbench.errors import UserError
from kdbench.image_cards import Mix
from kdbench.recipe.coded import TargetSpec
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec

RECIPE: dict[str, Any] = {
    "data": "digits",
    "teacher": "wrn_16_2_digits",
    "student": "wrn_10_1",
    "protocol": {"name": "digits", "augmentation": {"padding": 1, "mode": "zero", "flip": True}},
}
VIEWS = 18


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDBENCH_HOME", str(tmp_path))
    # Several passes for a few images.
    monkeypatch.setitem(logit_table.PASS, "cpu", 3 * VIEWS)


def cell(method: str = "kd", **more: Any) -> CellSpec:
    return shortened(plan(RECIPE | more | {"method": method}, REGISTRY).cells[0].spec, steps=8)


def one_of_each_class() -> CellSpec:
    spec = cell()
    return spec.model_copy(update={"data": spec.data.model_copy(update={"per_class": 1})})


def teacher_of(spec: CellSpec, precision: str = "float32") -> Teacher:
    plain = untrained_teacher(spec)
    assert plain is not None
    way = Computing(precision, "channels_last" if precision == "bfloat16" else "contiguous")
    return Teacher(plain.network.extractor, plain.network.normalizer, plain.shapes, way)


def table_for(spec: CellSpec, data: ImageData, precision: str = "float32", sha256: str = "ab") -> LogitTable:
    return table_at(logit_table.table_key(spec, sha256, data, precision), "some teacher")


def filled(spec: CellSpec, data: ImageData, teacher: Teacher, stop: Any = lambda: False) -> LogitTable:
    table = table_for(spec, data, teacher.network.computing.precision)
    images = logit_table.images_of([spec], data)
    logit_table.fill(table, images, teacher, data, spec.protocol, CPU, lambda done, seconds: None, stop)
    return table_for(spec, data, teacher.network.computing.precision)


@pytest.mark.parametrize(("precision", "off"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_a_table_holds_every_view_of_every_image(precision: str, off: float) -> None:
    """Against the teacher on views that are made one by one, from given offsets."""
    spec, data = cell(), images(cell().data)
    teacher = teacher_of(spec, precision)
    table = filled(spec, data, teacher)
    assert table.done == 20 and table.shape == (20, VIEWS, 10)
    values = logit_table.open_table(table, teacher, data, spec.protocol, CPU)
    assert values.dtype == (torch.bfloat16 if precision == "bfloat16" else torch.float32)
    augmentation = Augmentation(1, "zero", True)
    for image in (0, 7, 19):
        for view in range(VIEWS):
            pixels = augmentation.view(data.train_images[image : image + 1], torch.tensor([view]))
            expected = teacher(pixels, ["logits"])["logits"][0]
            assert (values[image, view].float() - expected).abs().max() <= off * expected.abs().max(), (image, view)


def test_training_with_a_table_runs_no_teacher_and_learns_the_same() -> None:
    """Also on a subset of the training images, whose positions are not those of the whole set."""
    spec = one_of_each_class()
    data = images(spec.data)
    with_table, without = teacher_of(spec), teacher_of(spec)
    table = filled(spec, data, with_table)
    members = []
    for teacher in (with_table, without):
        batches = Batches(spec, data, CPU)
        if teacher is with_table:
            values = logit_table.open_table(table, teacher, data, spec.protocol, CPU)
            teacher.logits = SplitLogits(values, batches.positions)
            teacher.network.model.register_forward_pre_hook(lambda *_: pytest.fail("the teacher ran"))
        member = Member(spec, batches, teacher, CPU)
        assert batches.positions.tolist() != list(range(len(batches.positions)))
        train(member, batches, teacher, 8)
        members.append(member)
    a, b = (member.meter.result()["loss"] for member in members)
    assert a == pytest.approx(b, rel=1e-4)


def test_methods_that_read_features_take_the_logits_from_the_table_all_the_same() -> None:
    """So that a cell in a cohort learns from the same logits as alone."""
    spec = cell("fitnets")
    data, teacher = images(spec.data), teacher_of(spec)
    values = logit_table.open_table(filled(spec, data, teacher), teacher, data, spec.protocol, CPU)
    batches = Batches(spec, data, CPU)
    teacher.logits = SplitLogits(values + 1, batches.positions)
    member = Member(spec, batches, teacher, CPU)
    sets = sets_at(batches, 0, member.timeline, ["data"])
    got = teacher.shared(sets, {"data": ["layer2", "logits"]})["data"]
    plain = teacher_of(spec).shared(sets, {"data": ["layer2", "logits"]})["data"]
    assert torch.equal(got["layer2"], plain["layer2"])
    assert torch.allclose(got["logits"], plain["logits"] + 1, atol=1e-4)
    # Other input sets have other views, of which the table knows nothing.
    second = teacher.shared({"second": sets["data"]}, {"second": ["logits"]})["second"]
    assert torch.allclose(second["logits"], plain["logits"], atol=1e-4)


def test_filling_goes_on_where_it_was_stopped() -> None:
    spec, data = cell(), images(cell().data)
    teacher = teacher_of(spec)
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls > 3

    part = filled(spec, data, teacher, stop)
    assert 0 < part.done < 20 and not part.serves(logit_table.images_of([spec], data))
    ran: list[int] = []
    teacher.network.model.register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    whole = filled(spec, data, teacher)
    assert whole.done == 20 and sum(ran) == (20 - part.done) * VIEWS
    fresh = teacher_of(spec)
    values = logit_table.open_table(whole, fresh, data, spec.protocol, CPU)
    pixels = Augmentation(1, "zero", True).view(data.train_images, torch.full((20,), 5))
    assert torch.allclose(values[:, 5], fresh(pixels, ["logits"])["logits"], atol=1e-4)


def test_only_images_that_cells_train_with_are_filled() -> None:
    """Those of other cells come on top, and what holds too few of a cell's images does not serve it."""
    few, all_of_them = one_of_each_class(), cell()
    data = images(few.data)
    teacher = teacher_of(few)
    chosen = Batches(few, data, CPU).positions.tolist()
    assert len(chosen) == 10 and chosen != [*range(10)]
    ran: list[int] = []
    teacher(data.train_images[:1], ["logits"])
    teacher.network.model.register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    table = filled(few, data, teacher)
    assert (table.done, sum(ran)) == (10, 10 * VIEWS)
    wanted = [logit_table.images_of([spec], data) for spec in (few, all_of_them)]
    assert [table.serves(one) for one in wanted] == [True, False]
    values = logit_table.open_table(table, teacher_of(few), data, few.protocol, CPU)
    assert values.flatten(1).any(1).nonzero().flatten().tolist() == chosen
    ran.clear()
    whole = filled(all_of_them, data, teacher)
    assert (whole.done, sum(ran)) == (20, 10 * VIEWS) and all(map(whole.serves, wanted))
    after = logit_table.open_table(whole, teacher_of(few), data, few.protocol, CPU)
    assert torch.equal(after[chosen], values[chosen])


def test_a_table_whose_filling_was_cut_off_serves_nobody() -> None:
    """A kill leaves values that no sum was taken of, also of the images before."""
    few, data = one_of_each_class(), images(cell().data)
    teacher, wanted = teacher_of(few), logit_table.images_of([few], data)
    assert filled(few, data, teacher).serves(wanted)

    def killed() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        filled(cell(), data, teacher, killed)
    left = table_for(few, data)
    assert left.done == 10 and not left.serves(wanted)
    assert filled(few, data, teacher).serves(wanted)


@pytest.mark.parametrize("change", ["weights", "precision", "normalization", "augmentation", "data", "model"])
def test_a_table_belongs_to_what_it_was_computed_from(change: str) -> None:
    spec, data = cell(), images(cell().data)
    assert spec.teacher is not None
    key = logit_table.table_key(spec, "ab", data, "float32")
    teacher, protocol, sha256, precision = spec.teacher, spec.protocol, "ab", "float32"
    if change == "weights":
        sha256 = "cd"
    elif change == "precision":
        precision = "bfloat16"
    elif change == "normalization":
        teacher = teacher.model_copy(
            update={"normalization": teacher.normalization.model_copy(update={"mean": [0.123]})}
        )
    elif change == "augmentation":
        protocol = cell(
            protocol={"name": "digits", "augmentation": {"padding": 1, "mode": "reflect", "flip": True}}
        ).protocol
    elif change == "data":
        data = replace(data, fingerprint="other")
    else:
        options = {**teacher.model.options, "depth": 22}
        teacher = teacher.model_copy(update={"model": teacher.model.model_copy(update={"options": options})})
    spec = spec.model_copy(update={"teacher": teacher, "protocol": protocol})
    other = logit_table.table_key(spec, sha256, data, precision)
    assert other != key and table_at(other, "t").folder != table_at(key, "t").folder


def test_other_batches_budgets_and_seeds_share_a_table() -> None:
    data = images(cell().data)
    folders = {
        table_for(spec, data).folder
        for spec in (cell(), cell(seeds=[3]), cell("ab"), cell(protocol=RECIPE["protocol"] | {"batch_size": 7}))
    }
    assert len(folders) == 1


def test_views_that_are_mixed_or_transformed_at_random_have_no_table() -> None:
    """A table of the crops and mirrors that come before would have their key."""
    few, data = one_of_each_class(), images(cell().data)
    assert few.teacher is not None
    few = few.model_copy(update={"teacher": few.teacher.model_copy(update={"name": "some teacher"})})
    teacher = teacher_of(few)
    name = filled(few, data, teacher).folder.name
    here = SimpleNamespace(data=lambda spec: data, settings=SimpleNamespace(tables=None), device=CPU)

    def served(**more: Any) -> str:
        changed = few.protocol.augmentation.model_copy(update=more)
        spec = few.model_copy(update={"protocol": few.protocol.model_copy(update={"augmentation": changed})})
        return Materials.logits(here, [spec], SimpleNamespace(sha256="ab"), teacher, None)[0]  # type: ignore[arg-type]

    assert served() == name
    changing = TargetSpec(name="rand_augment", target="kdbench.data.transforms:rand_augment", options={})
    assert served(mix=Mix(mixup=0.2)) == served(transforms=[changing]) == ""


def test_a_table_that_is_not_what_the_teacher_gives_is_an_error() -> None:
    spec, data = cell(), images(cell().data)
    table = filled(spec, data, teacher_of(spec))
    other = untrained_teacher(spec)
    assert other is not None
    with torch.no_grad():
        other.network.model.fc.weight.mul_(-1)
    with pytest.raises(UserError, match="is off by") as error:
        logit_table.open_table(table, other, data, spec.protocol, CPU)
    assert f"kdbench logits clear {table.folder.name}" in str(error.value)


@pytest.mark.parametrize("what", ["another size", "sha256"])
def test_a_shortened_file_and_a_changed_value_are_errors(what: str) -> None:
    """Of a value, one logit among thousands, which no sample would find."""
    spec, data = cell(), images(cell().data)
    teacher = teacher_of(spec)
    table = filled(spec, data, teacher)
    with (table.folder / "logits.bin").open("rb+") as stream:
        if what == "another size":
            stream.truncate(100)
        else:
            stream.seek(400)
            stream.write(b"\x01\x02\x03")
    with pytest.raises(UserError, match=what):
        logit_table.open_table(table, teacher, data, spec.protocol, CPU)


@pytest.mark.parametrize("loss", ["gone", "short"])
def test_what_was_filled_and_is_lost_is_filled_again(loss: str) -> None:
    spec, data = cell(), images(cell().data)
    teacher = teacher_of(spec)
    calls = iter([False, False, True, True, True])
    part = filled(spec, data, teacher, lambda: next(calls))
    assert 0 < part.done < 20
    file = part.folder / "logits.bin"
    if loss == "gone":
        file.unlink()
    else:
        with file.open("rb+") as stream:
            stream.truncate(10)
    whole = filled(spec, data, teacher)
    values = logit_table.open_table(whole, teacher, data, spec.protocol, CPU)
    assert whole.done == 20 and values.abs().flatten(1).amax(1).min() > 0


def test_a_changed_value_is_not_summed_up_anew_when_more_is_filled(caplog: pytest.LogCaptureFixture) -> None:
    spec, data = one_of_each_class(), images(cell().data)
    teacher = teacher_of(spec)
    table = filled(spec, data, teacher)
    first = int(logit_table._indices(table.filled)[0])
    with (table.folder / "logits.bin").open("rb+") as stream:
        stream.seek(first * table.image_bytes + 3)
        stream.write(b"\x7f")
    whole = filled(cell(), data, teacher)
    assert "is damaged" in caplog.text and whole.done == 20
    values = logit_table.open_table(whole, teacher, data, spec.protocol, CPU)
    assert values.abs().max() < 1000, "the byte made it 1e38"


@pytest.mark.parametrize("number", ["done", "seconds"])
def test_a_changed_number_in_what_a_table_says_of_itself_is_told(number: str) -> None:
    """With images that it does not hold, whose logits are zeros, and which a sample rarely finds."""
    spec, data = one_of_each_class(), images(cell().data)
    file = filled(spec, data, teacher_of(spec)).folder / "table.json"
    about = json.loads(file.read_text())
    held = int(about["filled"], 16)
    more = {"done": about["done"] + 1, "filled": f"{held | (held + 1):x}"}
    file.write_text(json.dumps(about | (more if number == "done" else {"seconds": 7.0})))
    with pytest.raises(UserError, match="damaged"):
        table_for(spec, data)


def test_listing_and_clearing(tmp_path: Path) -> None:
    spec, data = cell(), images(cell().data)
    table = filled(spec, data, teacher_of(spec))
    (tmp_path / "teacher_logits" / "rubbish").mkdir()
    (tmp_path / "teacher_logits" / "rubbish" / "table.json").write_text("{")
    assert [t.folder for t in logit_files.tables()] == [table.folder]
    with logit_files.filling(table.folder), pytest.raises(UserError, match="another process"):
        logit_files.clear(table)
    logit_files.clear(table)
    assert logit_files.tables() == [] and not table.folder.exists()
    assert table_for(spec, data).done == 0


def test_a_full_disk_is_told_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, data = cell(), images(cell().data)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="the disk has"):
        filled(spec, data, teacher_of(spec))
    assert not list(Path(table_for(spec, data).folder).glob("logits.bin"))


def test_how_far_it_is_filled_is_noted_only_after_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the two leaves less noted than written, never more."""
    spec, data = cell(), images(cell().data)
    teacher = teacher_of(spec)
    order: list[str] = []
    monkeypatch.setattr(logit_table, "NOTE_SECONDS", 0.0)
    monkeypatch.setattr("os.fsync", lambda handle: order.append("values"))
    write = logit_files.write_summed

    def noting(file: Path, about: Any) -> None:
        order.extend(["note"] if about["done"] else [])
        write(file, about)

    monkeypatch.setattr(logit_files, "write_summed", noting)
    table = filled(spec, data, teacher)
    noted = json.loads((table.folder / "table.json").read_text())
    assert noted["done"] == 20
    before = [a for a, b in itertools.pairwise(order) if b == "note"]
    assert len(before) == order.count("note") >= 3 and set(before) == {"values"}
