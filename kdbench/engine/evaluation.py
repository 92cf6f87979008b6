"""What is measured at an evaluation point: accuracy on the test (and validation) part, and the losses' own metrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.engine.batches import SLICE, Batches, Part
from kdbench.engine.member import Member
from kdbench.engine.network import Network
from kdbench.engine.teacher import Teacher

# Metrics need features of the teacher: they are measured on at most this many evenly spaced test images.
PROBE_IMAGES = 2000


def evaluate(member: Member, batches: Batches, teacher: Teacher | None) -> dict[str, Any]:
    """Metrics of a member at its present step; its modes are as before afterwards.

    Returns:
        {"test": {"accuracy": percent, "loss": mean cross-entropy}, "validation": same (if there is such a part),
        "source": same on the source's test part, where the test part is a target domain's,
        "teacher": same of the teacher on the test part, where the cell trains it,
        "metrics": {metric: {hook point: value}}, the metrics that the loss cards declare, and "references": the same
        of a student that ignores its input, where a card has a reference}. Both are absent where there are none.
    """
    member.student.model.eval()
    member.terms.eval()
    student = member.student
    result: dict[str, Any] = {"test": score(student, batches.test)[0]}
    if len(batches.validation):
        result["validation"] = score(student, batches.validation)[0]
    if batches.source_test is not None:
        result["source"] = score(student, batches.source_test)[0]
    if (own := member.trained_teacher) is not None:
        own.model.eval()
        result["teacher"] = score(own, batches.test)[0]
    if teacher is not None:
        result |= probe(member, teacher, batches.test)
    member.set_modes()
    return result


@torch.no_grad()
def score(network: Network, part: Part) -> tuple[dict[str, float], Tensor]:
    """Accuracy in percent and mean cross-entropy of a network on a part, and all its logits [N, classes]."""
    all_logits = []
    device = part.labels.device
    right = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), device=device)
    for images, labels in part.slices(SLICE[device.type]):
        logits = network.logits(images)
        right = right + (logits.argmax(dim=1) == labels).sum()
        loss = loss + F.cross_entropy(logits.float(), labels, reduction="sum")
        all_logits.append(logits)
    n = len(part.labels)
    return {"accuracy": 100 * right.item() / n, "loss": loss.item() / n}, torch.cat(all_logits)


@torch.no_grad()
def probe(member: Member, teacher: Teacher, test: Part) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics of the loss terms so far, averaged over evenly spaced test images. Terms of past stages are measured
    with their connectors as they were left: whether the student keeps what a first stage taught it is the question."""
    seen = [span.name for span in member.timeline.spans if span.start < max(member.step, 1)]
    terms: list[Any] = [term for name in seen for term in member.terms_of(name).values() if term.measured]
    if not terms:
        return {}
    stride = max(1, -(-len(test.labels) // PROBE_IMAGES))
    part = test.every(stride)
    student_points, teacher_points = (
        [point for term in terms for point in term.points(network)["data"]] for network in ("student", "teacher")
    )
    sums: dict[str, dict[str, Tensor]] = {}
    # Of two terms that measure one point, the later stage's counts.
    references = {
        (metric, layer.student): (layer.teacher, reference())
        for term in terms
        for metric, reference in term.references.items()
        for layer in term.layers
    }
    for images, labels in part.slices(SLICE[member.device.type]):
        student = member.student(member.student.normalizer(images), student_points)
        values = teacher(images, teacher_points)
        here: dict[str, dict[str, Tensor]] = {}
        for term in terms:
            for metric, points in term.measure(student, values).items():
                here.setdefault(metric, {}).update(points)
        for point, reference in references.values():
            reference.add(values[point])
        for metric, points in here.items():
            into = sums.setdefault(metric, {})
            for point, value in points.items():
                into[point] = into.get(point, 0) + value * len(labels)
    found: dict[str, dict[str, float]] = {}
    for (metric, point), (_, reference) in references.items():
        found.setdefault(metric, {})[point] = reference.value()
    return {
        "metrics": {
            metric: {point: value.item() / len(part.labels) for point, value in points.items()}
            for metric, points in sums.items()
        },
        "references": found,
    }
