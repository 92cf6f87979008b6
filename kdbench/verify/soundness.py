"""What one record says must agree with its metrics and with its resolved recipe. Imports no torch."""

from collections.abc import Iterator
from typing import Any

from kdbench.cards import TEACHER_TOLERANCE
from kdbench.recipe import route
from kdbench.recipe.specs import CellSpec
from kdbench.recipe.timeline import Timeline, planned_timeline, timeline
from kdbench.record import Record, summary
from kdbench.record_derived import derived


def problems(record: Record, history: list[dict[str, Any]]) -> Iterator[str]:
    """Every disagreement inside a record, in words; none for a sound one.

    Args:
        history: the entries of its metrics.jsonl.
    """
    spec = record.resolved
    if spec is not None:
        # Earlier versions wrote down what follows from the resolved recipe.
        yield from _copies(record.model_dump(mode="json"), derived(spec))
        yield from _origins(record, spec)
        yield from _route(record, spec)
    if not history:
        yield "its metrics.jsonl is empty"
        return
    yield from _results(record, history)
    yield from _course(record, history, timeline(spec, record.data.train) if spec is not None else None)
    spent, measured = record.compute.training_seconds, history[-1].get("seconds")
    # Records have fewer decimals than metrics, and earlier ones count a wait after the last evaluation too.
    if spent is not None and measured is not None and abs(spent - measured) > 0.01:
        yield f"compute.training_seconds is {spent}, the metrics say {measured}"
    if spent is not None and record.compute.seconds < spent:
        yield f"compute.seconds, {record.compute.seconds}, are fewer than those of training alone, {spent}"


def _copies(recorded: Any, expected: Any, path: str = "") -> Iterator[str]:
    if isinstance(recorded, dict) and isinstance(expected, dict):
        for key, value in expected.items():
            yield from _copies(recorded[key], value, f"{path}.{key}" if path else key)
    else:
        yield from _same(path, recorded, expected)


def _origins(record: Record, spec: CellSpec) -> Iterator[str]:
    """Data and teacher are those of their cards."""
    published, data = spec.data.options.get("fingerprint"), record.data
    # A lossy copy is told in the origin by whoever read it.
    if published is not None and "not the published" not in data.origin:
        yield from _same("data.fingerprint", data.fingerprint, published)
    teacher = record.teacher
    if teacher is None or spec.teacher is None:
        return
    found = teacher.members or [teacher.sha256]
    yield from _same("teacher.members", len(found), len(spec.teacher.each))
    for number, (one, sha256) in enumerate(zip(spec.teacher.each, found, strict=False)):
        if one.weights is not None:
            what = f"teacher.members.{number}" if teacher.members else "teacher.sha256"
            yield from _same(what, sha256, one.weights.sha256)
    # Its card speaks of the data that it knows: with a target domain, those of the source.
    key = "accuracy" if record.target is None else "source_accuracy"
    said, found = spec.teacher.accuracy, getattr(teacher, key)
    # That of pictures as they were tested on is checked before it teaches; the record has that of these views.
    same_view = spec.teacher.resize is None and spec.teacher.model.image_size is None
    if same_view and said is not None and found is not None and abs(found - said) > TEACHER_TOLERANCE:
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
    if (best := record.best) is not None:
        at = next((entry[best.part]["accuracy"] for entry in history if entry["step"] == best.step), None)
        yield from _same("best", (best.step, best.accuracy), (summary(history, best.part)["best_step"], at))
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


def _same(what: str, recorded: Any, expected: Any, source: str = "it follows") -> Iterator[str]:
    if recorded != expected:
        yield f"{what} is {_short(recorded)}, {source} {_short(expected)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "…"
