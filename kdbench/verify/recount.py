"""Test accuracies against the test logits that lie beside their records, where the labels are at hand."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kdbench.engine.materials import load_data
from kdbench.errors import UserError
from kdbench.files import LOGITS, home
from kdbench.recipe.specs import DataSpec
from kdbench.record import Record


def labels_of(data: DataSpec, roots: Iterable[Path]) -> tuple[Tensor, str]:
    """Labels of a data set's test part, int64 [N], and its fingerprint.

    UserError where it is not here: nothing is downloaded.
    """
    found = load_data(data, data.roots(roots), False, home() / "cache")
    return found.test_labels, found.fingerprint


def accuracies(file: Path, labels: Tensor) -> tuple[float, float]:
    """Between which test accuracies, in percent, logits in float16 leave the choice.

    Rounding keeps the order of logits but may make several the largest: then any of these was the answer.

    Raises:
        UserError: this is no file of logits for these labels.
    """
    try:
        logits = load_file(file)["logits"]
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"{file.name} cannot be read: {error}") from None
    if logits.ndim != 2 or len(logits) != len(labels) or logits.shape[1] <= int(labels.max()):
        raise UserError(f"{file.name} holds no logits for these {len(labels)} test images")
    largest = logits == logits.amax(dim=1, keepdim=True)
    possible = largest[torch.arange(len(labels)), labels]
    certain = possible & (largest.sum(dim=1) == 1)
    return tuple(100 * found.double().mean().item() for found in (certain, possible))  # type: ignore[return-value]


def counted_again(
    records: Mapping[str, Record], data: Mapping[str, DataSpec], roots: Iterable[Path]
) -> dict[str, str | None]:
    """Records whose accuracy could be compared with their logits: folder name -> what is wrong, None if nothing is.

    Others were not tested on the test images that are here.

    Args:
        records: by folder name, with logits beside them.
        data: folder name -> the data that it was tested on, by the cards of this installation.

    Raises:
        UserError: the data are not here.
    """
    roots, known = list(roots), dict[str, tuple[Tensor, str]]()
    found: dict[str, str | None] = {}
    for name, record in records.items():
        if data[name].tested_on != "test":
            continue
        key = data[name].model_dump_json()
        if key not in known:
            known[key] = labels_of(data[name], roots)
        labels, fingerprint = known[key]
        if fingerprint != (record.target or record.data).fingerprint:
            continue
        assert record.folder is not None
        try:
            low, high = accuracies(record.folder / LOGITS, labels)
        except UserError as error:
            found[name] = error.what
            continue
        found[name] = None
        # Accuracies are recorded with four decimals.
        if not low - 1e-4 <= record.result.test.last <= high + 1e-4:
            span = f"{low:.4f}" if low == high else f"{low:.4f} to {high:.4f}"
            found[name] = f"result.test.last is {record.result.test.last}, the test logits say {span}"
    return found
