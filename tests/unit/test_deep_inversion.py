"""Images from a network alone: the terms, the optimization, the pool on disk, and batches of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded import without
from PIL import Image
from tiny import CPU, images, killed, shortened, teacher_for, train
from torch import nn

from kdbench.engine import checkpoint
from kdbench.engine.cell import TrainingCell
from kdbench.engine.data.batch import Batch
from kdbench.engine.data.batches import Batches
from kdbench.engine.evaluation import evaluate
from kdbench.engine.inputs import SourceContext, SourceFiles
from kdbench.engine.log import MetricsLog
from kdbench.engine.loop import TrainingLoop
from kdbench.engine.member import Member
from kdbench.engine.program import Cohort, Program
from kdbench.engine.teachers.loading import fingerprint
from kdbench.engine.teachers.teacher import Teacher
from kdbench.errors import CellError, UserError
from kdbench.files import sha256_of
from kdbench.losses import BatchNormInputs, batch_norm_distance, competition, jensen_shannon, l2_norm, total_variation
from kdbench.methods.deep_inversion import inversion
from kdbench.methods.deep_inversion.inversion import BatchDraws, Inversion, labels_in_turn, synthesize
from kdbench.methods.deep_inversion.made import MadeImages, grid
from kdbench.methods.deep_inversion.source import SynthesizedImages
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec
from kdbench.registry import Registry

REGISTRY = Registry()
RECIPE: dict[str, Any] = {"data": "digits", "teacher": "wrn_16_2_digits", "student": "wrn_10_1", "protocol": "digits"}
MEAN, STD = torch.tensor([0.3]), torch.tensor([0.4])
QUICK = {"batches": 2, "images": 12, "iterations": 3, "jitter": 1}


def network(classes: int = 3) -> nn.Module:
    """A small network with two batch norms whose statistics are no defaults."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    )
    with torch.no_grad():
        # Of the size that a trained network's have.
        model[-1].weight.mul_(30)  # type: ignore[operator,union-attr]
    model.train()
    for _ in range(20):
        model(torch.randn(16, 1, 8, 8) * 2 + 1.5)
    return model.eval().requires_grad_(False)


def cell(method: str | dict[str, Any], steps: int = 8, seed: int = 0, **more: Any) -> CellSpec:
    spec = plan(RECIPE | more | {"method": method, "seeds": [seed]}, REGISTRY).cells[0].spec
    return shortened(spec, steps)


# --- terms


def test_batch_norm_distance_is_that_of_a_batch_norms_own_statistics() -> None:
    """What torch's batch norm in train mode makes its running statistics of, with momentum 1; its variance unbiased."""
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64) * 2 + 1
    norm = nn.BatchNorm2d(3, momentum=1.0).double().train()
    norm(x)
    assert norm.running_mean is not None and norm.running_var is not None
    n = 5 * 4 * 4
    mean, variance = torch.tensor([0.1, -0.2, 0.3]).double(), torch.tensor([1.0, 2.0, 0.5]).double()
    expected = (norm.running_mean - mean).square().sum().sqrt()
    expected += (norm.running_var * (n - 1) / n - variance).square().sum().sqrt()
    assert batch_norm_distance(x, mean, variance).item() == pytest.approx(expected.item(), rel=1e-12)
    assert batch_norm_distance(x, norm.running_mean, norm.running_var * (n - 1) / n).item() < 1e-12


def test_norms_and_total_variation_by_hand() -> None:
    x = torch.tensor([[[[0.0, 1.0], [2.0, 4.0]]], [[[0.0, 0.0], [0.0, 3.0]]]])
    # Differences across (1, 2), (0, 3); down (2, 3), (0, 3); main diagonal 4, 3; the other one 1, 0.
    whole = math.sqrt(1 + 4 + 9) + math.sqrt(4 + 9 + 9) + math.sqrt(16 + 9) + 1
    each = (math.sqrt(5) + math.sqrt(13) + 4 + 1 + 3 + 3 + 3 + 0) / 2
    assert total_variation(x).item() == pytest.approx(whole, rel=1e-6)
    assert total_variation(x, per_image=True).item() == pytest.approx(each, rel=1e-6)
    assert l2_norm(x).item() == pytest.approx(math.sqrt(21 + 9), rel=1e-6)
    assert l2_norm(x, per_image=True).item() == pytest.approx((math.sqrt(21) + 3) / 2, rel=1e-6)
    # Repeating a batch k times scales norms of a whole batch by √k, means over images not at all.
    twice = torch.cat([x, x])
    assert total_variation(twice).item() == pytest.approx(math.sqrt(2) * whole, rel=1e-6)
    assert total_variation(twice, per_image=True).item() == pytest.approx(each, rel=1e-6)


def test_jensen_shannon_of_both_forms_in_closed_form() -> None:
    """Two classes; logits T·log(odds) make probabilities that are known."""
    p, q, t = 0.8, 0.4, 3.0
    teacher = torch.tensor([[t * math.log(p / (1 - p)), 0.0]], dtype=torch.float64)
    student = torch.tensor([[t * math.log(q / (1 - q)), 0.0]], dtype=torch.float64)
    m = (p + q) / 2

    def kl(a: float, b: float) -> float:
        return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))

    paper = 0.5 * kl(p, m) + 0.5 * kl(q, m)
    code = 0.5 * kl(m, p) + 0.5 * kl(m, q)
    assert paper != pytest.approx(code, rel=1e-3)
    assert jensen_shannon(student, teacher, t).item() == pytest.approx(paper, rel=1e-9)
    assert jensen_shannon(student, teacher, t, "code").item() == pytest.approx(code, rel=1e-9)
    assert competition(student, teacher, t).item() == pytest.approx(1 - paper, rel=1e-9)
    for form in ("paper", "code"):
        assert jensen_shannon(teacher, teacher, t, form).item() == pytest.approx(0, abs=1e-12)
    # Certain and opposite: the paper's reaches its bound ln 2; the code's is of clamped probabilities.
    far = torch.tensor([[500.0, -500.0]], dtype=torch.float64)
    assert jensen_shannon(far, -far, t).item() == pytest.approx(math.log(2), rel=1e-9)
    clamped = 0.5 * (math.log(0.5 / 0.99) + math.log(0.5 / 0.01))
    assert jensen_shannon(far, -far, t, "code").item() == pytest.approx(clamped, rel=1e-9)
    with pytest.raises(ValueError, match="form"):
        jensen_shannon(far, far, t, "other")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["paper", "code"])
def test_gradients_are_the_derivatives(form: Any) -> None:
    torch.manual_seed(1)
    logits = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: competition(a, b, 3.0, form), logits)
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    mean, variance = torch.zeros(2).double(), torch.full((2,), 0.5).double()
    for per_image in (False, True):
        assert torch.autograd.gradcheck(lambda v, p=per_image: total_variation(v, p) + l2_norm(v, p), [x])
    assert torch.autograd.gradcheck(lambda v: batch_norm_distance(v, mean, variance), [x])


def test_the_sum_over_layers_is_that_of_the_networks_own_inputs() -> None:
    model = network()
    x = torch.randn(7, 1, 8, 8)
    entering = [model[:1](x), model[:4](x)]  # type: ignore[index]
    layers = [
        batch_norm_distance(value, norm.running_mean, norm.running_var)
        for value, norm in zip(entering, (model[1], model[4]), strict=True)  # type: ignore[index]
    ]
    with BatchNormInputs(model) as norms:
        model(x)
        assert norms.distance().item() == pytest.approx(sum(layers).item(), rel=1e-6)  # type: ignore[union-attr]
        model(x)
        assert norms.distance(first=10.0).item() == pytest.approx((10 * layers[0] + layers[1]).item(), rel=1e-6)
        with pytest.raises(ValueError, match="did not run"):
            norms.distance()


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_no_hook_stays_however_it_ends() -> None:
    model = network()
    with BatchNormInputs(model):
        assert hooks_of(model) == 2
    assert hooks_of(model) == 0
    with pytest.raises(RuntimeError), BatchNormInputs(model):
        raise RuntimeError
    assert hooks_of(model) == 0
    made(model, Inversion(iterations=2))
    assert hooks_of(model) == 0

    def stop() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(model, Inversion(iterations=2), stopping=stop)
    assert hooks_of(model) == 0
    with pytest.raises(ValueError, match="no batch norm"):
        BatchNormInputs(nn.Linear(2, 2))


# --- synthesis


def made(model: nn.Module, settings: Inversion, n: int = 9, batch: int = 0, **more: Any) -> Any:
    return synthesize(model, labels_in_turn(n, 3), (1, 8, 8), settings, BatchDraws(0, "test", batch), MEAN, STD, **more)


def test_the_statistics_come_closer_and_the_classes_are_hit() -> None:
    model = network()
    before = fingerprint(model)
    settings = Inversion(iterations=200, feature=0.3, jitter=1)
    noise, result = made(model, replace(settings, iterations=0)), made(model, settings)
    assert result.terms["feature"] < 0.3 * noise.terms["feature"]
    logits = model((result.images - MEAN) / STD)
    assert (logits.argmax(1) == result.labels).float().mean() > 0.5
    assert result.terms["cross_entropy"] < 0.5 * noise.terms["cross_entropy"]
    assert fingerprint(model) == before and all(p.grad is None for p in model.parameters())
    # What is reported are the terms of what is returned, unweighted, and their weighted sum.
    with BatchNormInputs(model) as norms:
        model((result.images - MEAN) / STD)
        assert norms.distance().item() == pytest.approx(result.terms["feature"], rel=1e-3)
    parts = result.terms["cross_entropy"] + 0.3 * result.terms["feature"] + 2.5e-5 * result.terms["tv"]
    assert result.terms["loss"] == pytest.approx(parts, rel=1e-5)


def test_noise_and_deep_dream_are_settings() -> None:
    model = network()
    noise = made(model, Inversion(iterations=0))
    normalized = (noise.images - MEAN) / STD
    assert abs(normalized.mean().item()) < 0.15 and abs(normalized.std().item() - 1) < 0.1
    dream = made(model, Inversion(iterations=30, feature=0.0))
    assert "feature" not in dream.terms and dream.terms["cross_entropy"] < noise.terms["cross_entropy"]
    # Neither needs a network with batch norms.
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    made(plain, Inversion(iterations=2, feature=0.0))
    with pytest.raises(ValueError, match="no batch norm"):
        made(plain, Inversion(iterations=2))


def test_the_best_iterate_is_kept_where_it_is_asked_for() -> None:
    model = network()
    settings = Inversion(iterations=7, lr=10.0, feature=1.0, jitter=0)
    best = made(model, replace(settings, keep="best"))
    # At such a rate the loss goes up and down: the best is neither the first nor the last.
    iterates = [made(model, replace(settings, iterations=n)) for n in range(8)]
    losses = [one.terms["loss"] for one in iterates[:7]]
    assert best.terms["loss"] == pytest.approx(min(losses), rel=1e-6) and min(losses) < losses[-1]
    assert iterates[7].terms["loss"] != pytest.approx(best.terms["loss"], rel=1e-3)
    assert torch.equal(iterates[losses.index(min(losses))].images, best.images)


def test_a_batch_is_a_function_of_its_address() -> None:
    model = network()
    settings = Inversion(iterations=4, flip=True)
    torch.manual_seed(1)
    a = made(model, settings, batch=3).images
    torch.manual_seed(2)
    assert torch.equal(a, made(model, settings, batch=3).images)
    assert not torch.equal(a, made(model, settings, batch=4).images)


def test_values_stay_where_pixels_can_be() -> None:
    model = network()
    assert made(model, Inversion(iterations=10, lr=1.0, clip=True)).images.aminmax() == pytest.approx((0, 1), abs=1e-6)
    low, high = made(model, Inversion(iterations=10, lr=1.0)).images.aminmax()
    assert low < 0 and high > 1


@pytest.mark.parametrize("form", ["paper", "code"])
def test_competition_makes_images_on_which_student_and_teacher_disagree(form: Any) -> None:
    teacher, student = network(), network()
    torch.manual_seed(3)
    for parameter in student.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter)).requires_grad_()
    before = fingerprint(student)

    def look(pixels: torch.Tensor) -> torch.Tensor:
        return student((pixels - MEAN) / STD)

    def apart(settings: Inversion) -> float:
        x = made(teacher, settings, student=look).images
        return jensen_shannon(look(x), teacher((x - MEAN) / STD)).item()

    plain = Inversion(iterations=60, feature=0.0, jitter=0)
    assert apart(replace(plain, competition=10.0, form=form)) > 1.2 * apart(plain)
    assert fingerprint(student) == before and all(p.grad is None for p in student.parameters())
    with pytest.raises(ValueError, match="needs a student"):
        made(teacher, replace(plain, competition=1.0))


def test_a_teacher_in_train_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="eval mode"):
        made(network().train(), Inversion(iterations=1))


# --- the pool


def place_of(spec: CellSpec, teacher: Teacher, folder: Path) -> SourceContext:
    stage = next(iter(spec.method.stages))
    return SourceContext(spec, stage, CPU, teacher.network, SourceFiles("abc", folder / "cell", folder / "shared"))


def prepared(spec: CellSpec, teacher: Teacher, folder: Path, stopping: Any = lambda: False) -> list[str]:
    told: list[str] = []
    stage = next(iter(spec.method.stages.values()))
    assert stage.source is not None
    place = place_of(spec, teacher, folder)
    SynthesizedImages.prepare(place, told.append, stopping, **stage.source.options)
    return told


def files(folder: Path) -> dict[str, str]:
    return {f.name: sha256_of(f) for f in sorted(folder.glob("shared/synthesized/*/*.safetensors"))}


def test_a_pool_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    spec = cell({"name": "deep_inversion", **QUICK, "batches": 4})
    teacher = teacher_for(spec)
    told = prepared(spec, teacher, tmp_path / "a")
    assert len(told) == 4 and "batch 4 of 4" in told[-1] and "left" in told[-1]
    whole = files(tmp_path / "a")
    assert len(whole) == 4 and len(set(whole.values())) == 4

    # Stopped in the middle of the second batch: what it had of that is lost, the first batch is kept.
    calls = iter(range(100))
    prepared(spec, teacher, tmp_path / "b", stopping=lambda: next(calls) >= 6)
    assert list(files(tmp_path / "b")) == ["batch_00000.safetensors"]
    # Killed between a batch's images and its JSON file: that batch is made again.
    pool = next((tmp_path / "b").glob("shared/synthesized/*"))
    (pool / "batch_00001.safetensors").write_bytes(b"half")
    (pool / ".batch_00001.safetensors.x.part").write_bytes(b"less")
    assert len(prepared(spec, teacher, tmp_path / "b")) == 3
    assert files(tmp_path / "b") == whole and not list(pool.glob(".*.part"))
    assert prepared(spec, teacher, tmp_path / "b") == []
    assert (pool / "grid.png").read_bytes()[:4] == b"\x89PNG"
    about = json.loads((pool / "batch_00002.json").read_text())
    assert {"sha256", "seconds", "terms", "torch", "threads"} <= set(about) and about["terms"]["feature"] > 0


def test_a_pool_of_noise_can_be_stopped_too(tmp_path: Path) -> None:
    spec = cell({"name": "deep_inversion", **QUICK, "iterations": 0, "batches": 4})
    calls = iter(range(100))
    prepared(spec, teacher_for(spec), tmp_path, stopping=lambda: next(calls) >= 2)
    assert list(files(tmp_path)) == ["batch_00000.safetensors", "batch_00001.safetensors"]


def test_images_that_grew_out_of_all_bounds_are_told_and_not_kept(tmp_path: Path) -> None:
    spec = cell({"name": "deep_inversion", **QUICK, "rate": 1e9})
    teacher = teacher_for(spec)
    with pytest.raises(UserError, match="grew out of all bounds in batch 0"):
        prepared(spec, teacher, tmp_path)
    assert not [name for name in files(tmp_path) if name.endswith(".safetensors")]


def test_a_pool_belongs_to_teacher_settings_and_seed(tmp_path: Path) -> None:
    def pool(method: dict[str, Any], seed: int = 0, sha: str = "abc") -> str:
        spec = cell({"name": "deep_inversion", **QUICK} | method, seed=seed)
        teacher = teacher_for(spec)
        place = place_of(spec, teacher, tmp_path)
        place = replace(place, files=replace(place.files, teacher_sha256=sha))
        source = next(iter(spec.method.stages.values())).source
        assert source is not None
        made = SynthesizedImages(place, **source.options).pool
        assert made is not None
        return made.folder.name

    base = pool({})
    assert pool({"batches": 7}) == base, "a larger pool begins with the smaller one"
    assert pool({"name": "adaptive_deep_inversion"}) == base, "an adaptive cell begins with the plain pool"
    assert pool({"pool_seed": 0}, seed=5) == base
    others = [pool({}, seed=5), pool({}, sha="abd"), pool({"feature": 1.0}), pool({"images": 11})]
    assert len({base, *others}) == 5


def test_what_changed_on_disk_is_noticed(tmp_path: Path) -> None:
    spec = cell({"name": "deep_inversion", **QUICK})
    teacher = teacher_for(spec)
    member, batches = member_in(spec, teacher, tmp_path)
    with pytest.raises(UserError, match="0 of 2 batches"):
        train(member, batches, teacher, 1)
    prepared(spec, teacher, tmp_path)
    file = next(tmp_path.glob("shared/synthesized/*/batch_00001.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    with pytest.raises(UserError, match="has changed"):
        train(member, batches, teacher, 1)


def test_a_grid_shows_the_images() -> None:
    x = torch.zeros(9, 3, 4, 4)
    x[8, 0] = 2.0
    picture = grid(x)
    assert picture.size == (2 * (8 * 5 + 1), 2 * (2 * 5 + 1)) and picture.getpixel((4, 14)) == (255, 0, 0)
    assert grid(x[:, :1]).size == picture.size


# --- training on it


def member_in(spec: CellSpec, teacher: Teacher, folder: Path, guarded: bool = False) -> tuple[Member, Batches]:
    data = images(spec.data, per_class=4)
    if guarded:
        data = without(data)
    batches = Batches(spec, data, CPU)
    files = SourceFiles("abc", folder / "cell", folder / "shared")
    return Member(spec, batches, teacher, CPU, files=files), batches


def pooled(spec: CellSpec, folder: Path, guarded: bool = False) -> tuple[Teacher, Member, Batches]:
    """A cell whose pool is made."""
    teacher = teacher_for(spec)
    prepared(spec, teacher, folder)
    return teacher, *member_in(spec, teacher, folder, guarded)


DATA_FREE = ["deep_inversion", "adaptive_deep_inversion", "adaptive_deep_inversion_code", "noise_kd", "deep_dream_kd"]
DATA_FREE += ["prune_data_free", "prune_none"]


@pytest.mark.parametrize("method", DATA_FREE)
def test_no_real_training_image_or_label_is_read(method: str, tmp_path: Path) -> None:
    own = {k: v for k, v in QUICK.items() if k in ("batches", "images") or method != "noise_kd"}
    own |= {"every": 2} if "adaptive" in method else {}
    spec = cell({"name": method, **own}, steps=4, **({"student": "wrn_16_2"} if method.startswith("prune") else {}))
    teacher, member, batches = pooled(spec, tmp_path, guarded=True)
    train(member, batches, teacher, 4)
    assert evaluate(member)["test"]["accuracy"] >= 0
    assert member.finished
    with_validation = spec.model_copy(update={"data": spec.data.model_copy(update={"validation": 10})})
    # The guard guards: a step on the data set's batch is seen, and so are looks at images or labels alone.
    for look in (
        lambda: batches.at(0, member.timeline),
        lambda: batches.train.images,
        lambda: batches.train.labels,
        lambda: next(iter(batches.train.slices())),
        # A validation part is taken from the training images by their labels, for whoever asks for one.
        lambda: Batches(with_validation, without(images(spec.data, per_class=4)), CPU),
    ):
        with pytest.raises(AssertionError, match="guarded value was read"):
            look()


def made_at(source: Any, now: Any) -> Batch:
    """What a source makes at any step."""
    assert source.ready(now, print, lambda: False)
    return source.sets(now)["data"]


def test_batches_carry_the_pools_images_and_labels(tmp_path: Path) -> None:
    spec = cell({"name": "deep_inversion", **QUICK})
    teacher, member, _ = pooled(spec, tmp_path)
    source = member.sources["distillation"]
    pool, labels = source.images  # type: ignore[attr-defined]
    seen: list[int] = []
    for step in range(3):
        batch = made_at(source, moment(member, step))
        assert batch.images.dtype == torch.float32 and batch.labels is not None and len(batch.labels) == 8
        for image, label in zip(batch.images, batch.labels, strict=True):
            at = (pool.float() == image).flatten(1).all(1).nonzero().flatten().tolist()
            assert len(at) == 1 and labels[at[0]] == label
            seen += at
    # 24 images, batches of 8: every image once in a pass, in another order in the next.
    assert sorted(seen) == list(range(24)) and seen != sorted(seen)
    later, first = (made_at(source, moment(member, at)).images for at in (3, 0))
    assert not torch.equal(later, first)


def moment(member: Member, step: int) -> Any:
    from kdbench.engine.inputs import SourceStep

    return SourceStep(step, step / member.timeline.total, member.student)


def test_an_adaptive_cell_adds_images_against_its_student_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    spec = cell({"name": "adaptive_deep_inversion", **QUICK, "every": 3}, steps=11)
    teacher, whole, batches = pooled(spec, tmp_path)
    train(whole, batches, teacher, 11)
    source: Any = whole.sources["distillation"]
    assert [number for number, _, _ in source.added] == [1, 2, 3] and source.memory() == 24 + 3 * 12
    added = {f.name: sha256_of(f) for f in (tmp_path / "cell").glob("**/*.safetensors")}
    assert len(set(added.values())) == 3
    record = source.record()
    assert record["images"] == 24 and record["added_images"] == 36 and record["terms"]["loss"] > 0

    # Killed at every step: between the checkpoint and the kill it went on, so files of later growths are there.
    for kill in (2, 3, 7):
        folder = tmp_path / f"killed{kill}"
        folder.mkdir()
        (folder / "shared").symlink_to(tmp_path / "shared")
        second = killed(lambda folder=folder: member_in(spec, teacher, folder)[0], batches, teacher, folder, kill, 3)
        assert fingerprint(second.student.model) == fingerprint(whole.student.model), f"killed at step {kill}"
        assert {f.name: sha256_of(f) for f in (folder / "cell").glob("**/*.safetensors")} == added


def test_a_stop_within_an_added_batch_ends_at_once_and_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"every": 3, "iterations": 20}
    spec = cell({"name": "adaptive_deep_inversion", **QUICK, **settings}, steps=8)
    teacher, whole, batches = pooled(spec, tmp_path)
    train(whole, batches, teacher, 8)
    added = {f.name: sha256_of(f) for f in (tmp_path / "cell").glob("**/*.safetensors")}
    assert len(added) == 2
    iterations = 0
    terms_of = inversion._terms

    def counted(*values: Any, **named: Any) -> Any:
        nonlocal iterations
        iterations += 1
        return terms_of(*values, **named)

    monkeypatch.setattr(inversion, "_terms", counted)
    folder = tmp_path / "stopped"
    (folder / "cell").mkdir(parents=True)
    (folder / "shared").symlink_to(tmp_path / "shared")
    told: list[str] = []

    def run(stop_after: int) -> tuple[bool, Member]:
        """Until so many iterations of added batches are done, from where the last one left off."""
        member, _ = member_in(spec, teacher, folder)
        if (state := checkpoint.load(folder / "cell", {"a": 1}, member.state())) is not None:
            member.load_state(state)
        log = MetricsLog(folder / "cell", member.log.history, tensorboard=False)
        seat = TrainingCell(member, folder / "cell", {"a": 1}, log)
        loop = TrainingLoop(
            Program([Cohort(batches, teacher, [seat])]),
            lambda *_: None,
            lambda _: None,
            lambda: iterations >= stop_after,
            tell=lambda _, text: told.append(text),
        )
        done = loop.run()
        assert seat.failure is None
        return done, member

    # In the first added batch, in the same again, and in the second: an added batch has 20 iterations and a last look.
    for stop_after, step, kept in ((7, 3, 0), (12, 3, 0), (12 + 21 + 5, 6, 1)):
        done, member = run(stop_after)
        assert not done and iterations <= stop_after + 1
        assert member.step == step and len(member.sources["distillation"].added) == kept  # type: ignore[attr-defined]
    assert list((folder / "cell").glob("**/*.safetensors")) != []
    done, member = run(10**6)
    assert done and fingerprint(member.student.model) == fingerprint(whole.student.model)
    assert {f.name: sha256_of(f) for f in (folder / "cell").glob("**/*.safetensors")} == added
    assert [text.partition(",")[0] for text in told] == [
        f"adding synthesized images: batch {number} of 2" for number in (1, 1, 1, 2, 2)
    ]
    assert "s each" in told[-1] and "left" in told[-1]


def test_a_grid_of_many_batches_shows_the_first_and_the_last(tmp_path: Path) -> None:
    made = MadeImages(tmp_path, {})
    made.begin()
    for number in range(1, 12):
        made.write(number, torch.full((9, 1, 4, 4), number / 12), torch.zeros(9, dtype=torch.int64), {})
    made.picture(range(1, 12), each=8)
    with Image.open(tmp_path / "grid.png") as shown:
        assert shown.height == grid(torch.zeros(64, 1, 4, 4)).height
        greys = [shown.getpixel((4, 10 * row + 4)) for row in range(8)]
    assert greys == sorted(set(greys)) and len(greys) == 8
    assert greys[0] == round(255 / 12) and greys[-1] == round(255 * 11 / 12)


def test_growth_counts_the_steps_of_the_stage_and_nothing_grows_ahead_of_its_time(tmp_path: Path) -> None:
    spec = cell({"name": "adaptive_deep_inversion", **QUICK, "every": 3})
    teacher, member, _ = pooled(spec, tmp_path)
    source: Any = member.sources["distillation"]

    def ready(step: int) -> bool:
        return bool(source.ready(replace(moment(member, step), begin=5, end=13), print, lambda: False))

    assert ready(7)
    source.sets(replace(moment(member, 8), begin=5, ahead=True))
    assert source.added == []
    assert ready(8)
    assert [number for number, _, _ in source.added] == [1]


def test_another_pool_than_a_cell_began_with_is_refused(tmp_path: Path) -> None:
    spec = cell({"name": "deep_inversion", **QUICK})
    teacher, member, batches = pooled(spec, tmp_path)
    train(member, batches, teacher, 2)
    state = member.state()
    about = next(tmp_path.glob("shared/synthesized/*/batch_00000.json"))
    about.write_text(json.dumps(json.loads(about.read_text()) | {"sha256": "0" * 64}))
    again, _ = member_in(spec, teacher, tmp_path)
    with pytest.raises(CellError, match="have changed"):
        again.load_state(state)


def test_every_setting_of_the_inversion_is_an_option_of_its_source() -> None:
    card = REGISTRY.card("sources", "synthesized")
    options = REGISTRY.settable(card)
    plain = {name: options[name].default for name in Inversion().plain()}
    assert plain == Inversion().plain() | {"betas": (0.9, 0.999)}
    assert {"batches", "images", "every"} <= options.keys() and "context" not in options


def test_settings_that_make_no_sense_are_told() -> None:
    spec = cell({"name": "deep_inversion", "rate": 0.0})
    teacher = teacher_for(spec)
    with pytest.raises(UserError, match="'lr' cannot be 0"):
        member_in(spec, teacher, Path("nowhere"))
    with pytest.raises(UserError, match="unknown key"):
        cell({"name": "noise_kd", "iterations": 3})
    with pytest.raises(UserError, match="'jitter' of source 'synthesized' cannot be 1.5"):
        cell({"name": "deep_inversion", "jitter": 1.5})
    with pytest.raises(UserError, match="Adam has two betas, not 1"):
        SynthesizedImages(place_of(spec, teacher, Path("nowhere")), betas=(0.5,))  # type: ignore[arg-type]


# --- real teachers


@pytest.mark.slow
def test_an_independent_network_recognizes_the_images(teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet-32, trained by itself, on images from ResNet-20: chance is 10 %, and images are few and quickly made."""
    from kdbench.engine.networks.weights import locate
    from kdbench.engine.teachers.loading import load_teacher

    monkeypatch.setenv("KDBENCH_WEIGHTS", str(teacher_folder))
    teachers = []
    for name in ("resnet20_cifar10", "resnet32_cifar10"):
        recipe = {"data": "cifar10", "teacher": name, "student": "resnet20", "protocol": "ab_official", "method": "kd"}
        spec = plan(recipe, REGISTRY).cells[0].spec
        assert spec.teacher is not None and spec.teacher.weights is not None
        teachers.append(load_teacher(spec.teacher, spec.data, locate(spec.teacher.weights, False), CPU))
    own, other = teachers
    settings = Inversion(iterations=100, feature=1.0, decay="cosine", tv=1e-3)
    mean, std = own.network.normalizer.mean, own.network.normalizer.std
    labels = labels_in_turn(30, 10)
    result = synthesize(own.network.model, labels, (3, 32, 32), settings, BatchDraws(0, "x", 0), mean, std)
    assert result is not None

    def accuracy(teacher: Teacher) -> float:
        return (teacher(result.images, ["logits"])["logits"].argmax(1) == result.labels).float().mean().item()

    assert accuracy(own) > 0.8
    assert accuracy(other) > 0.3


@pytest.mark.slow
def test_kd_on_synthesized_digits_is_better_than_on_noise(tmp_path: Path) -> None:
    """A real teacher of the digits, trained here for a few steps; no student sees a real image."""
    from kdbench.engine.data.datasets import load_data

    def real(method: str | dict[str, Any], steps: int, **more: Any) -> CellSpec:
        return plan(RECIPE | more | {"method": method, "steps": steps, "compute": "reference"}, REGISTRY).cells[0].spec

    spec = real("ce", 150, student="wrn_10_1")
    data = load_data(spec.data, [], False, tmp_path)
    first = Member(spec, Batches(spec, data, CPU), None, CPU)
    train(first, Batches(spec, data, CPU), None, 150)
    extractor = first.student.extractor
    shapes = extractor.shapes((1, 8, 8))
    teacher = Teacher(extractor, first.student.normalizer, shapes)
    accuracies = {}
    for method in ("noise_kd", "deep_inversion"):
        more = {} if method == "noise_kd" else {"iterations": 100, "feature": 1.0, "jitter": 0}
        spec = real({"name": method, "batches": 2, "images": 128, **more}, 150)
        prepared(spec, teacher, tmp_path)
        batches = Batches(spec, without(data), CPU)
        files = SourceFiles("abc", tmp_path / method, tmp_path / "shared")
        member = Member(spec, batches, teacher, CPU, files=files)
        train(member, batches, teacher, 150)
        accuracies[method] = evaluate(member)["test"]["accuracy"]
    assert accuracies["deep_inversion"] > accuracies["noise_kd"] + 5 and accuracies["deep_inversion"] > 80
