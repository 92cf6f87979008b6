"""The trained network of a finished cell."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from kdbench.engine.networks.build import build_model
from kdbench.engine.networks.predicting import untrained
from kdbench.engine.networks.weights import load_file
from kdbench.errors import UserError
from kdbench.files import RECORD, meant
from kdbench.recipe.recorded import cell_of, student_of
from kdbench.record import WhichWeights, read_record, student_file
from kdbench.registry import Registry


@contextmanager
def plain_torch() -> Iterator[None]:
    """Float32, on the CPU, and to be trained further, whatever a notebook has set for all of torch."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.inference_mode(False):
            yield
    finally:
        torch.set_default_dtype(before)


@plain_torch()
def load_student(
    folder: Path, registries: str | Path | Iterable[str | Path] = (), weights: WhichWeights = "last"
) -> nn.Module:
    """The student of a finished cell's folder, in eval mode, on the CPU. See `kdbench.load_student`."""
    if not (folder / RECORD).is_file():
        hint = meant(folder, "the folder of a finished cell", RECORD)
        raise UserError("there is no finished cell", str(folder), hint)
    record = read_record(folder)
    cards = Registry(registries)
    if (record.spec.get("method") or {}).get("predicts") is not None:
        spec = cell_of(record.spec, cards, str(folder))
        student, model = spec.student, untrained(spec)
    else:
        student, data = student_of(record.spec, cards, str(folder))
        # Its own first weights, or those it started from, are not needed any more.
        model = build_model(student.untrained(), student.takes(data))
    load_file(model, student_file(record, weights), student.name)
    return model.eval()
