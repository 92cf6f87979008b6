"""What is measured at an evaluation point: accuracy on the test (and validation) part, and the losses' own metrics."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.engine.data.batch import Split, at_most
from kdbench.engine.member import Member
from kdbench.engine.metrics import Metrics
from kdbench.engine.networks.averaging import Average
from kdbench.engine.networks.network import Network

# Metrics need features of the teacher: they are measured on at most this many evenly spaced test images.
PROBE_IMAGES = 2000
# What accuracies and losses are of, by name; whatever else was found is by the name of a metric, which may be any.
PARTS = ("test", "validation", "source", "teacher")


class Measurement:
    """An evaluation of a member at its present step. `compute` runs on the device alone, so that it can be recorded;
    `plain` waits for it and reads what it found."""

    def __init__(self, member: Member) -> None:
        self.member, batches = member, member.batches
        self.parts: dict[str, tuple[Network, Split]] = {"test": (member.answers, batches.test)}
        if len(batches.validation) and batches.test is not batches.validation:
            self.parts["validation"] = (member.answers, batches.validation)
        if batches.source_test is not None:
            self.parts["source"] = (member.answers, batches.source_test)
        self.teacher = member.teacher.network if member.teacher else None
        if (own := member.modules.trained_teacher) is not None:
            self.parts["teacher"] = (own, batches.test)
            self.teacher = own
        # Terms of past stages are measured with their connectors as they were left: whether the student keeps what a
        # first stage taught it is the question.
        self.stages = tuple(span.name for span in member.timeline.spans if span.start < max(member.step, 1))
        self.scores: dict[str, Scores] = {}
        self.metrics: Metrics | None = None

    @property
    def resident(self) -> bool:
        """Whether all images lie on the device."""
        return all(part.resident for _, part in self.parts.values())

    @torch.no_grad()
    def compute(self) -> None:
        """Run the networks over all parts, in eval mode."""
        self.scores = {name: scores(network, part) for name, (network, part) in self.parts.items()}
        terms = [term for name in self.stages for term in self.member.modules.terms_of(name).values() if term.measured]
        if self.teacher is not None and terms:
            self.metrics = Metrics(terms)
            # Of the network whose accuracy this is; one that answers through another head has no hook points.
            answers = self.member.answers
            student = answers if isinstance(answers, Average) else self.member.student
            for images, labels in at_most(PROBE_IMAGES, self.member.batches.test).slices():
                own = student(student.normalizer(images), self.metrics.points("student"), labels)
                taught = self.teacher(self.teacher.normalizer(images), self.metrics.points("teacher"), labels)
                self.metrics.add(own, taught, len(labels))

    def plain(self) -> dict[str, Any]:
        """What was found.

        Returns:
            {"test": {"accuracy": percent, "loss": mean cross-entropy}, "validation": same (if there is such a part),
            "source": same on the source's test part, where the test part is a target domain's,
            "teacher": same of the teacher on the test part, where the cell trains it,
            "metrics": {metric: {hook point: value}}, the metrics that the loss cards declare, and "references": the
            same of a student that ignores its input, where a card has a reference; both are absent where there are
            none; "unmeasured": why a metric has no value}.
        """
        found: dict[str, Any] = {name: one.plain() for name, one in self.scores.items()}
        return found | (self.metrics.plain() if self.metrics else {})


def computed(measurement: Measurement) -> Measurement:
    """Let a measurement be computed."""
    measurement.compute()
    return measurement


def evaluate(member: Member, carry_out: Callable[[Measurement], Measurement] = computed) -> dict[str, Any]:
    """Metrics of a member at its present step, as `Measurement.plain` gives them; its modes are as before afterwards.

    Args:
        carry_out: gives the measurement that was carried out: this one, or a recorded one that was replayed.
    """
    member.set_modes(evaluating=True)
    measured = carry_out(Measurement(member))
    member.set_modes()
    return measured.plain()


@dataclass(frozen=True)
class Scores:
    """A network's answers on a part: how many are right, the sum of cross-entropies, and all logits [N, classes]."""

    right: Tensor
    loss: Tensor
    logits: Tensor

    def plain(self) -> dict[str, float]:
        """Accuracy in percent and mean cross-entropy."""
        n = len(self.logits)
        return {"accuracy": 100 * self.right.item() / n, "loss": self.loss.item() / n}


@torch.no_grad()
def scores(network: Network, part: Split) -> Scores:
    """What a network answers on a part. Reads nothing from the device."""
    all_logits = []
    device = part.labels.device
    right = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), device=device)
    for images, labels in part.slices():
        logits = network.logits(images)
        right = right + (logits.argmax(dim=1) == labels).sum()
        loss = loss + F.cross_entropy(logits.float(), labels, reduction="sum")
        all_logits.append(logits)
    return Scores(right, loss, torch.cat(all_logits))
