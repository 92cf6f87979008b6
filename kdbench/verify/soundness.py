"""What one record says twice must agree: with itself, with its metrics, with its resolved recipe. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from kdbench.cards import TEACHER_TOLERANCE
from kdbench.recipe import route
from kdbench.recipe.specs import CellSpec
from kdbench.recipe.timeline import Timeline, planned_timeline, timeline, training_images, validation_images
from kdbench.record import Record, summary


def spec_of(record: Record) -> CellSpec | None:
    """The resolved recipe of a record, or None where another version wrote it in a form that this one does not know."""
    try:
        return CellSpec.model_validate(record.spec)
    except ValidationError:
        return None


def problems(record: Record, history: list[dict[str, Any]]) -> Iterator[str]:
    """Every disagreement inside a record, in words; none for a sound one.

    Args:
        history: the entries of its metrics.jsonl.
    """
    spec = spec_of(record)
    line = timeline(spec, record.data.train) if spec is not None else None
    yield from _names(record)
    yield from _budget(record, line)
    yield from _data(record, spec)
    yield from _teacher(record)
    if spec is not None:
        yield from _route(record, spec)
    if not history:
        yield "its metrics.jsonl is empty"
        return
    yield from _results(record, history)
    yield from _course(record, history, line)
    yield from _times(record, history)


def _names(record: Record) -> Iterator[str]:
    """The cell's names are those of its resolved recipe."""
    cell, spec = record.cell, record.spec
    for name in ("student", "teacher", "data", "target", "protocol", "method"):
        yield from _same(f"cell.{name}", getattr(cell, name), (spec.get(name) or {}).get("name"))
    yield from _same("cell.label", cell.label, (spec.get("method") or {}).get("label"))
    yield from _same("cell.seed", cell.seed, spec.get("seed"))
    seeds: dict[str, Any] = (record.model_extra or {}).get("seeds") or {}
    if seeds:
        yield from _same("seeds.seed", seeds.get("seed"), cell.seed)
        split = (spec.get("data") or {}).get("split_seed")
        yield from _same("seeds.split", seeds.get("split"), cell.seed if split is None else split)
    known = {
        "epochs": (spec.get("protocol") or {}).get("epochs"),
        "steps": (spec.get("protocol") or {}).get("steps"),
        "data.fraction": (spec.get("data") or {}).get("fraction"),
        "data.per_class": (spec.get("data") or {}).get("per_class"),
    }
    for path, value in cell.axes.items():
        if path in known:
            yield from _same(f"cell.axes.{path}", value, known[path])


def _budget(record: Record, line: Timeline | None) -> Iterator[str]:
    budget = record.budget
    yield from _same("budget.steps", budget.steps, sum(stage.steps for stage in budget.stages))
    if line is None:
        return
    per_epoch = (budget.model_extra or {}).get("batches_per_epoch", line.batches_per_epoch)
    yield from _same("budget.batches_per_epoch", per_epoch, line.batches_per_epoch)
    yield from _same("budget.epochs", budget.epochs, round(line.epochs(line.total), 4))
    yield from _same("budget.extra_epochs", budget.extra_epochs, round(line.epochs(line.extra), 4))
    stages = [(stage.name, stage.steps) for stage in budget.stages]
    yield from _same("budget.stages", stages, [(span.name, span.steps) for span in line.spans])


def _data(record: Record, spec: CellSpec | None) -> Iterator[str]:
    data = record.data
    yield from _same("data.name", data.name, record.cell.data)
    if spec is None:
        return
    yield from _same("data.train", data.train, training_images(spec.data))
    yield from _same("data.validation", data.validation, validation_images(spec.data))
    yield from _same("data.test", data.test, spec.data.test)
    yield from _same("data.classes", data.classes, spec.data.classes)
    target = record.target
    yield from _same("target.name", target and target.name, record.cell.target)
    if target is not None and spec.target is not None:
        yield from _same("target.train", target.train, spec.target.train)
        yield from _same("target.test", target.test, spec.target.test)
        yield from _same("target.classes", target.classes, data.classes)
    published = spec.data.options.get("fingerprint")
    # A lossy copy is told in the origin by whoever read it.
    if published is not None and "not the published" not in data.origin:
        yield from _same("data.fingerprint", data.fingerprint, published)


def _teacher(record: Record) -> Iterator[str]:
    teacher, spec = record.teacher, record.spec.get("teacher")
    yield from _same("teacher.name", teacher and teacher.name, record.cell.teacher)
    if teacher is None or spec is None:
        return
    if (weights := spec.get("weights")) is not None:
        yield from _same("teacher.sha256", teacher.sha256, weights.get("sha256"))
    # Its card speaks of the data that it knows: with a target domain, those of the source.
    key = "accuracy" if record.target is None else "source_accuracy"
    said, found = spec.get("accuracy"), getattr(teacher, key)
    if said is not None and found is not None and abs(found - said) > TEACHER_TOLERANCE:
        yield f"teacher.{key} is {found}, its card says {said}"


def _route(record: Record, spec: CellSpec) -> Iterator[str]:
    """The checkpoints that were kept are at their steps, and the anchors those that were to be chosen."""
    kept = [checkpoint.step for checkpoint in record.route]
    yield from _same("route", kept, list(route.points(spec.route, record.budget.steps)))
    anchors = {name: stage.anchor for name, stage in spec.method.stages.items() if stage.anchor is not None}
    yield from _same("anchors", [anchor.stage for anchor in record.anchors], [*anchors])
    if not anchors or spec.teacher is None or spec.teacher.trained_by is None:
        return
    trained = spec.teacher.trained_by
    steps = route.points(trained.route, planned_timeline(trained).total)
    present = 0
    for found in record.anchors:
        if (anchor := anchors.get(found.stage)) is None:
            continue
        divergences = found.divergences or [0.0] * len(steps)
        expected = route.position(anchor, len(steps), present, lambda values=divergences: values)  # type: ignore[misc]
        yield from _same(f"the anchor of {found.stage}", (found.checkpoint, found.step), (expected, steps[expected]))
        present = found.checkpoint


def _results(record: Record, history: list[dict[str, Any]]) -> Iterator[str]:
    """The result is what the metrics say."""
    result = record.result
    for part in ("test", "validation", "source", "teacher"):
        found = summary(history, part) if any(part in entry for entry in history) else None
        recorded = getattr(result, part)
        if recorded is None or found is None:
            yield from _same(f"result.{part}", recorded, found)
            continue
        for name, value in found.items():
            yield from _same(f"result.{part}.{name}", getattr(recorded, name), value, "the metrics say")
    if not record.data.validation:
        yield from _same("result.validation", result.validation, None)
    for name in ("metrics", "references"):
        yield from _same(f"result.{name}", getattr(result, name), history[-1].get(name, {}), "the metrics say")


def _course(record: Record, history: list[dict[str, Any]], line: Timeline | None) -> Iterator[str]:
    """The metrics' steps, epochs and stages are those of the budget."""
    steps = [entry["step"] for entry in history]
    if line is None:
        if steps != sorted(set(steps)) or steps[-1] != record.budget.steps:
            yield f"the metrics' steps do not lead to the last one, {record.budget.steps}"
        return
    yield from _same("the metrics' steps", steps, list(line.evaluations))
    for entry in history:
        step = entry["step"]
        stage = line.spans[min(line.stage(max(step - 1, 0)), len(line.spans) - 1)].name
        yield from _same(f"the metrics' stage at step {step}", entry.get("stage"), stage)
        yield from _same(f"the metrics' epoch at step {step}", entry.get("epoch"), round(line.epochs(step), 4))


def _times(record: Record, history: list[dict[str, Any]]) -> Iterator[str]:
    """Times agree within their rounding: metrics have four decimals, records three, images a second one."""
    compute = record.compute
    spent = compute.training_seconds
    if spent is None or "seconds" not in history[-1]:
        return
    if abs(spent - history[-1]["seconds"]) > 0.0006:
        yield f"compute.training_seconds is {spent}, the metrics say {history[-1]['seconds']}"
    if compute.seconds < spent:
        yield f"compute.seconds, {compute.seconds}, are fewer than those of training alone, {spent}"
    images = _images(record)
    if images is None or not spent:
        return
    # Versions before this one counted a smaller last batch as a whole one.
    rates = [images / spent, record.budget.steps * record.spec["protocol"]["batch_size"] / spent]
    if all(abs(compute.images_per_second - rate) > 0.051 + rate * 0.0006 / spent for rate in rates):
        yield (
            f"compute.images_per_second is {compute.images_per_second}, {images} images in {spent} s are {rates[0]:.1f}"
        )


def _images(record: Record) -> int | None:
    """Images that were trained on, counted from the budget."""
    spec = spec_of(record)
    if spec is None or any(stage.source and "data" in stage.source.gives for stage in spec.method.stages.values()):
        # Made images come in batches of their source's.
        return None
    line = timeline(spec, record.data.train)
    batch = min(spec.protocol.batch_size, record.data.train)
    keep = spec.protocol.last_batch == "keep" or line.batches_per_epoch == 1
    epoch = min(record.data.train, batch * line.batches_per_epoch) if keep else batch * line.batches_per_epoch
    # Steps on top of the budget have epochs of their own.
    parts = [divmod(steps, line.batches_per_epoch) for steps in (line.extra, line.total - line.extra)]
    return sum(epochs * epoch + rest * batch for epochs, rest in parts)


def _same(what: str, recorded: Any, expected: Any, source: str = "it follows") -> Iterator[str]:
    if recorded != expected:
        yield f"{what} is {_short(recorded)}, {source} {_short(expected)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "…"
