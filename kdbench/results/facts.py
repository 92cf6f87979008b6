"""What a record says of how its number was made, in words, for notes below tables and for the page."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from kdbench.errors import counted
from kdbench.record import LAST_EPOCHS, Metric, Record
from kdbench.record_parts import Data
from kdbench.results import settings

K = TypeVar("K")
V = TypeVar("V")

# Letters of a hash that are shown below a table.
SHORT = 12


def metric_label(records: Sequence[Record], metric: Metric) -> str:
    """What the accuracies are, in words."""
    if metric == "last":
        return "last epoch"
    if metric == "best":
        return "best test epoch (optimistic)"
    counts = sorted({record.tail.evaluations for record in records})
    return f"mean of {ranged(counts)} evaluations in the last {LAST_EPOCHS} epochs"


def _protocol(record: Record, digits: int | None) -> str:
    epochs = record.budget.epochs - record.budget.extra_epochs
    return f"{record.cell.protocol}, {counted(epochs, 'epoch', 'g')}"


def _teacher(record: Record, digits: int | None) -> str:
    teacher, network = record.teacher, record.models.teacher
    if teacher is None:
        return ""
    accuracy = "accuracy not measured" if teacher.accuracy is None else f"{teacher.accuracy:.2f} %"
    size = f"{network.parameters:,} parameters, " if digits is None and network and network.parameters else ""
    return f"{teacher.name}, {accuracy}, {size}sha256 {teacher.sha256[:digits]}"


def _data(record: Record, digits: int | None) -> str:
    data, target = record.data, record.target
    parts = [f"{data.name}", f"{data.train:,} training"]
    held_out = settings.on_validation(record)
    parts += [f"{data.validation:,} validation"] if data.validation and not held_out else []
    tested = "validation image" if held_out else "test image"
    parts += [counted(data.test, tested, ",")] if target is None else []
    said = ", ".join([*parts, *_source(data, digits)])
    if target is None:
        return said
    images = [f"{target.train:,} without labels", counted(target.test, "test image", ",")]
    return f"{said} → {', '.join([target.name, *images, *_source(target, digits)])}"


def _source(data: Data, digits: int | None) -> list[str]:
    origin = [f"from {data.origin or 'an origin that was not recorded'}"] if digits is None else []
    return [*origin, f"fingerprint {data.fingerprint[:digits]}"]


def _machine(record: Record, digits: int | None) -> str:
    """Device, the threads of a processor, and the ranks that trained a cell together."""
    compute = record.compute
    parts = [compute.device_name]
    if compute.device == "cpu":
        parts.append(counted(compute.threads, "thread"))
    if compute.ranks:
        norms = "synchronized batch norms" if compute.sync_batch_norm else "batch norms of each one's share"
        parts.append(f"{', then '.join(map(str, compute.ranks))} ranks with {norms}")
    return ", ".join(parts)


def _precision(record: Record, digits: int | None) -> str:
    """How networks were computed, as far as it was not plainly."""
    compute = record.compute
    parts = [compute.precision, "" if compute.layout == "contiguous" else compute.layout]
    parts += ["compiled" if compute.compile else "", "CUDA graphs" if compute.cuda_graphs else ""]
    return ", ".join(part for part in parts if part)


def _teacher_logits(record: Record, digits: int | None) -> str:
    """Where they came from, if they were not computed in every step: a table has the same."""
    where = record.compute.teacher_logits
    return "" if where == "computed" else f"from a {where}"


def _version(record: Record, digits: int | None) -> str:
    git = record.git
    changes = " with uncommitted changes" if git is not None and git.dirty else ""
    commit = "" if git is None else f", commit {git.commit[:digits]}{changes}"
    return f"kdbench {record.kdbench}{commit}, torch {record.compute.torch}"


def instructions(record: Record, digits: int | None) -> str:
    """A processor's vector instructions: two of one name round differently where these differ."""
    return record.compute.cpu_capability if record.compute.device == "cpu" else ""


# Name -> what a record says of it, with hashes cut to some digits (None: whole, and with all details); empty: nothing.
# These must be the same within a column for its cells to be comparable.
FACTS: dict[str, Callable[[Record, int | None], str]] = {
    "Protocol": _protocol,
    "Teacher": _teacher,
    "Data": _data,
    "Machine": _machine,
    "Precision": _precision,
    "Teacher logits": _teacher_logits,
    "Software": _version,
}


def sentence(text: str) -> str:
    """With a capital letter and a full stop, where no question mark ends it."""
    text = text[:1].upper() + text[1:].rstrip(".")
    return text if text.endswith("?") else f"{text}."


def in_words(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def ranged(counts: Sequence[int]) -> str:
    """ "3" or "3 to 5", of sorted counts."""
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def grouped(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    """What comes first in pairs -> all that comes second with it, each once, in the order in which they come."""
    found: dict[K, dict[V, None]] = {}
    for first, second in pairs:
        found.setdefault(first, {})[second] = None
    return {first: [*seconds] for first, seconds in found.items()}


def listed(values: Sequence[Any], most: int = 12) -> str:
    """Values with commas, or semicolons where one has a comma itself; the first of many."""
    shown = [str(value) for value in values[:most]]
    separator = "; " if any(", " in one for one in shown) else ", "
    return separator.join(shown) + (f" and {len(values) - most} more" if len(values) > most else "")
