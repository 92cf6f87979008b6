"""The losses' own metrics, at evaluations. One that fails costs its value, never the cell that was trained."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdbench.errors import UserError, failure

# Metric and hook point of the student.
MetricPoint = tuple[str, str]

# Why there is no value of a metric that may have one of other images.
NOT_FINITE = "it is not finite"


class Metrics:
    """Metrics of loss terms, averaged over images.

    Attributes:
        failed: why there is no value; of a reference, by its metric's name with `_reference`.
    """

    def __init__(self, terms: list[Any]) -> None:
        self.terms, self.images = terms, 0
        self.sums: dict[MetricPoint, Tensor] = {}
        self.failed: dict[MetricPoint, str] = {}
        # Of two terms that measure one point, the later stage's counts.
        self.references: dict[MetricPoint, tuple[tuple[bool, list[str]], Any]] = {}
        self.places: dict[MetricPoint, None] = {}
        for term in terms:
            for point, layer in _places(term):
                self.places |= dict.fromkeys((metric, point) for metric in term.metrics)
                for metric, reference in term.references.items():
                    built = self._carried_out(_of_reference(metric, point), reference)
                    self.references[metric, point] = (term.joint, layer.teachers), built

    def points(self, network: str) -> list[str]:
        """Hook points of the "student" or the "teacher" that they read."""
        return [point for term in self.terms for point in term.points(network)["data"]]

    def add(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], images: int) -> None:
        """Add both networks' values on further images. Reads nothing from the device."""
        here: dict[MetricPoint, Tensor] = {}
        for term in self.terms:
            for metric, function in term.metrics.items():
                for point, layer in _places(term):
                    given = (function, term.joint, layer, student, teacher)
                    if (value := self._carried_out((metric, point), _measured, *given)) is not None:
                        here[metric, point] = value
        for (metric, point), ((joint, taught), reference) in self.references.items():
            # A reference that could not be built has failed already.
            place = _of_reference(metric, point)
            values = [teacher[point] for point in taught]
            self._carried_out(place, lambda one, *of: one.add(_given(*of)), reference, joint, values)
        for place, value in here.items():
            self.sums[place] = self.sums.get(place, 0) + value * images
        self.images += images

    def plain(self) -> dict[str, dict[str, Any]]:
        """ "metrics" and "references", each by metric and hook point of the student, None for what has no finite value;
        and "unmeasured", why, where there is such: metric -> hook point -> text."""
        found: dict[str, dict[str, Any]] = {"metrics": {}, "references": {}}
        for metric, point in self.places:
            value = self._finite((metric, point), lambda at: self.sums[at].item() / self.images, (metric, point))
            found["metrics"].setdefault(metric, {})[point] = value
        for (metric, point), (_, reference) in self.references.items():
            value = self._finite(_of_reference(metric, point), lambda one: float(one.value()), reference)
            found["references"].setdefault(metric, {})[point] = value
        for (metric, point), why in self.failed.items():
            found.setdefault("unmeasured", {}).setdefault(metric, {})[point] = why
        return found

    def _finite(self, place: MetricPoint, call: Callable[..., float], given: Any) -> float | None:
        """The value that a call gives, None for one that is not finite, which is noted."""
        value: float | None = self._carried_out(place, call, given)
        if value is not None and not math.isfinite(value):
            self.failed[place] = NOT_FINITE
            return None
        return value

    def _carried_out(self, place: MetricPoint, call: Callable[..., Any], *given: Any) -> Any:
        """What a call gives that runs a user's code; None where it fails, now or before, which is noted."""
        if place in self.failed:
            return None
        try:
            return call(*given)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's metric can fail in any way
            self.failed[place] = failure(error, given[0] if given else call)
            return None


def check_metrics(term: Any, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], images: int) -> None:
    """Measure a term's metrics once.

    Args:
        student, teacher: values at its hook points. images: how many.

    Raises:
        UserError: a metric, or its reference, cannot be computed or is no scalar.
    """
    if not term.measured:
        return
    what = f"of the loss '{term.name}' ({term.spec.loss.target})"
    if not all(layer.students and layer.teachers for layer in term.layers):
        hint = "a metric takes a value of the student and one of the teacher, which the loss must read"
        raise UserError(f"the metric '{next(iter(term.metrics))}' {what} cannot be measured", hint=hint)
    taken = [*student.values(), *teacher.values()]
    versions = [value._version for value in taken]
    with torch.no_grad():
        metrics = Metrics([term])
        metrics.add(student, teacher, images)
        metrics.plain()
    for (metric, point), why in metrics.failed.items():
        if why != NOT_FINITE:
            raise UserError(f"the metric '{metric}' {what} cannot be measured at {point}: {why}", hint=_HINT)
    if [value._version for value in taken] != versions:
        raise UserError(f"a metric {what} changes what it is given, in place", hint="write 'x * 2', not 'x.mul_(2)'")


_HINT = "a metric takes values of student and teacher and returns a scalar tensor; a reference has 'add' and 'value'"


def _places(term: Any) -> Iterator[tuple[str, Any]]:
    """What each call of a term takes, by the student's hook points."""
    for layer in term.layers:
        yield "+".join(layer.students), layer


def _given(joint: bool, values: Sequence[Tensor]) -> Any:
    """What a metric gets of one network, as its loss does: a list where that takes several hook points at once."""
    return values if joint else values[0]


def _of_reference(metric: str, point: str) -> MetricPoint:
    return f"{metric}_reference", point


def _measured(
    metric: Callable[..., Any], joint: bool, layer: Any, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
) -> Tensor:
    fitted = [connector(student[point]) for point, connector in zip(layer.students, layer.connectors, strict=True)]
    value = metric(_given(joint, fitted), _given(joint, [teacher[point] for point in layer.teachers]))
    if not isinstance(value, Tensor) or value.dim() or value.is_complex():
        given = f"shape {[*value.shape]}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"it gives {given}, no scalar tensor")
    return value
