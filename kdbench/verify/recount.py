"""What a record says of its answers against the test logits that lie beside it, where the labels are at hand.

Logits are kept in float16, so what they say is a span. Rounding keeps their order, but may make several the largest:
then any of these was the answer.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kdbench.engine.answers import BINS, FEWEST_CLASSES, mean_of_classes, unbalanced
from kdbench.engine.data.datasets import load_data
from kdbench.errors import UserError, counted
from kdbench.files import LOGITS, STUDENT, home
from kdbench.recipe.model_specs import DataSpec
from kdbench.record import Record
from kdbench.record_parts import OF_LOGITS


def labels_of(data: DataSpec, roots: Iterable[Path]) -> tuple[Tensor, str]:
    """Labels of a data set's test part, int64 [N], and its fingerprint.

    UserError where it is not here: nothing is downloaded.
    """
    found = load_data(data, data.roots(roots), False, home() / "cache")
    return found.test_labels, found.fingerprint


# Between which values, both included, something lies.
Span = tuple[float, float]


def logits_in(file: Path, labels: Tensor) -> Tensor:
    """Logits [N, classes] of a file.

    Raises:
        UserError: this is no file of logits for these labels.
    """
    try:
        logits = load_file(file)["logits"]
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"{file.name} cannot be read: {error}") from None
    if logits.ndim != 2 or len(logits) != len(labels) or logits.shape[1] <= int(labels.max()):
        raise UserError(f"{file.name} holds no logits for the {counted(len(labels), 'test image')}")
    return logits


def spans(logits: Tensor, labels: Tensor, teacher: Tensor | None, own: list[int] | None = None) -> dict[str, Span]:
    """What logits in float16 say of the numbers of a result, by their names there, in percent but for the loss.

    Args:
        logits: [N, classes]. labels: int64 [N]. teacher: logits in float16 for the same images, where they are known.
        own: classes that the student was trained on, where these are not all.
    """
    right = _within(logits, labels, 1)
    found = {
        "test.last": _share(*right),
        "test.loss": _loss(logits, labels),
        "calibration_error": _calibration(logits, *right),
    }
    if unbalanced(labels):
        low, high = (100 * mean_of_classes(part, labels) for part in right)
        found["balanced_accuracy"] = low, high
    if logits.shape[1] >= FEWEST_CLASSES:
        found["top5"] = _share(*_within(logits, labels, 5))
    if teacher is not None and teacher.shape == logits.shape:
        largest = logits == logits.amax(dim=1, keepdim=True)
        taught = teacher == teacher.amax(dim=1, keepdim=True)
        possible = (largest & taught).any(dim=1)
        found["fidelity"] = _share(possible & (largest.sum(dim=1) == 1) & (taught.sum(dim=1) == 1), possible)
    if own is not None:
        inside = torch.isin(labels, torch.tensor(own))
        parts = {"trained_on": inside, "others": ~inside}
        found |= {
            f"by_classes.{name}": _share(right[0][part], right[1][part]) for name, part in parts.items() if part.any()
        }
    return found


def _within(logits: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of which images the label is certainly among the k largest, and of which possibly."""
    label = logits.gather(1, labels[:, None])
    # Of what is no number nothing is known.
    return (~(logits < label)).sum(dim=1) <= k, (logits > label).sum(dim=1) < k


def _share(certain: Tensor, possible: Tensor) -> Span:
    return 100 * certain.double().mean().item(), 100 * possible.double().mean().item()


def _calibration(logits: Tensor, certain: Tensor, possible: Tensor) -> Span:
    """The calibration error, whatever bin of several an image was in."""
    if not logits.isfinite().all():
        return 0.0, 100.0
    low, high = _confidence(logits)
    first, last = (((c * BINS).ceil().long().clamp(1, BINS) - 1) for c in (low, high))
    least, most = certain.double() - high, possible.double() - low
    sums = [0.0, 0.0]
    for place in range(BINS):
        here, surely = (first <= place) & (place <= last), (first == place) & (place == last)
        below = torch.where(surely, least, least.clamp(max=0))[here].sum().item()
        above = torch.where(surely, most, most.clamp(min=0))[here].sum().item()
        sums[0] += max(below, -above, 0.0)
        sums[1] += max(above, -below)
    return 100 * sums[0] / len(logits), min(100.0, 100 * sums[1] / len(logits))


def _confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Between which values the largest softmax probability of each image was, before its logits were rounded."""
    exact, error = _exact(logits)
    exact = exact - exact.amax(dim=1, keepdim=True)
    lower, upper = (exact - error).exp(), (exact + error).exp()

    def largest(one: Tensor, others: Tensor) -> Tensor:
        rest = (others.sum(dim=1, keepdim=True) - others).clamp(min=0)
        return (one / (one + rest)).amax(dim=1)

    return largest(lower, upper), largest(upper, lower)


def _loss(logits: Tensor, labels: Tensor) -> Span:
    """The mean cross-entropy."""
    if not logits.isfinite().all():
        return 0.0, torch.inf
    exact, error = _exact(logits)
    # The label's logit was lower and all others higher, or the reverse.
    error = error.scatter(1, labels[:, None], -error.gather(1, labels[:, None]))
    low, high = (F.cross_entropy(exact + side * error, labels).item() for side in (-1, 1))
    return low, high


def _exact(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float64, and by how much each may have been rounded to float16."""
    exact = logits.double()
    # Half of the distance between neighbours in float16.
    return exact, torch.exp2(torch.frexp(exact).exponent.clamp(min=-13).double() - 12)


def counted_again(
    records: Mapping[str, Record],
    numbers: Mapping[str, Mapping[str, float]],
    data: Mapping[str, DataSpec],
    roots: Iterable[Path],
) -> dict[str, tuple[list[str], list[str]]]:
    """What of records could be compared with their logits: folder name -> the numbers, and what is wrong.

    Others were not tested on the test images that are here.

    Args:
        records: by folder name, with logits beside them; teachers' among them.
        numbers: folder name -> `recorded_numbers`.
        data: folder name -> the data that it was tested on, by the cards of this installation.

    Raises:
        UserError: the data are not here.
    """
    roots, known = list(roots), dict[str, tuple[Tensor, str]]()
    found: dict[str, tuple[list[str], list[str]]] = {}
    for name, record in records.items():
        if data[name].tested_on != "test":
            continue
        key = data[name].model_dump_json()
        if key not in known:
            known[key] = labels_of(data[name], roots)
        labels, fingerprint = known[key]
        if fingerprint != (record.target or record.data).fingerprint:
            continue
        try:
            logits = logits_in(record.read_from / LOGITS, labels)
            said = spans(logits, labels, _taught(record, records, data, labels), data[name].only_classes)
        except UserError as error:
            found[name] = [], [error.what]
            continue
        compared = {of: value for of, value in numbers[name].items() if of in said}
        # They are recorded with four decimals.
        wrong = {of: v for of, v in compared.items() if not said[of][0] - 1e-4 <= v <= said[of][1] + 1e-4}
        found[name] = ([*compared], [f"{of} is {v}, the test logits say {_text(said[of])}" for of, v in wrong.items()])
    return found


def recorded_numbers(record: Record, history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Numbers of a record and of its last evaluation that follow from test logits, a teacher's among them."""
    result = record.result
    named = {name: getattr(result, name) for name in OF_LOGITS}
    parts = {f"by_classes.{name}": value for name, value in (result.by_classes or {}).items()}
    loss = history[-1].get("test", {}).get("loss") if history else None
    # It may have grown out of all bounds.
    last = {"test.loss": loss} if loss is not None and isfinite(loss) else {}
    return {"test.last": result.test.last, **last, **{n: v for n, v in named.items() if v is not None}, **parts}


def _taught(
    record: Record, records: Mapping[str, Record], data: Mapping[str, DataSpec], labels: Tensor
) -> Tensor | None:
    """The logits of a record's teacher for the same images, where they lie beside the record of its training."""
    if record.teacher is None or record.result.teacher is not None:
        return None
    for name, one in records.items():
        same = one.files.get(STUDENT) == record.teacher.sha256 and one.result.test.last == record.teacher.accuracy
        tested = (one.target or one.data).fingerprint == (record.target or record.data).fingerprint
        # In another precision it may have answered otherwise.
        exact = {one.compute.precision, record.compute.precision} == {"float32"}
        if same and tested and exact and data[name].tested_on == "test" and one.folder is not None:
            # A file that cannot be read is told of its own record.
            with suppress(UserError):
                return logits_in(one.folder / LOGITS, labels)
    return None


def _text(span: Span) -> str:
    low, high = (f"{value:.4f}" for value in span)
    return low if low == high else f"{low} to {high}"
