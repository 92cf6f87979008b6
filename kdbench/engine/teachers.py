"""A cell's teacher: its weights by hash, found, downloaded or trained; then loaded, frozen and checked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from kdbench.cards import TEACHER_TOLERANCE
from kdbench.data.images import ImageData
from kdbench.data.pictures import Pictures
from kdbench.engine.anchors import Route
from kdbench.engine.batches import split_for_testing
from kdbench.engine.build import build_extractor, build_model
from kdbench.engine.compute import REFERENCE, Computing
from kdbench.engine.measuring import Seen, doubts, kept, look
from kdbench.engine.network import Normalizer
from kdbench.engine.targets import import_target
from kdbench.engine.teacher import Teacher
from kdbench.engine.weights import load_weights, locate, read_weights
from kdbench.errors import UserError
from kdbench.files import sha256_of
from kdbench.recipe.beside import training_of
from kdbench.recipe.route import FOLDER
from kdbench.recipe.specs import DataSpec, TeacherSpec, recorded
from kdbench.record import finished_record, student_file


@dataclass(frozen=True)
class TeacherFile:
    """Where a teacher's weights lie, their sha256, and the accuracy measured with them (percent; None for a teacher of
    other classes, which cannot be tested on these data), and the checkpoints of its training where they were kept.
    `source_accuracy`: on the source, where `accuracy` is that on a target domain. `data`: fingerprint of the data that
    it was trained on here. `doubts`: sentences that its user should read."""

    file: Path
    sha256: str
    accuracy: float | None
    route: Route | None = None
    source_accuracy: float | None = None
    data: str | None = None
    doubts: tuple[str, ...] = ()


def load_teacher(
    spec: TeacherSpec, data: DataSpec, file: Path, device: torch.device, computing: Computing = REFERENCE
) -> Teacher:
    """The frozen network with its weights, on its device, in eval mode."""
    model = build_model(spec.model, spec.knows(data))
    state = read_weights(file)
    if spec.weights is not None and spec.weights.layout is not None:
        state = import_target(spec.weights.layout)(state)
    load_weights(model, state, spec.model.name, str(file))
    return _as_teacher(model, spec, data, device, computing)


def untrained_teacher(spec: TeacherSpec, data: DataSpec, device: torch.device, computing: Computing) -> Teacher:
    """The same network with first weights: for whoever asks only what it costs."""
    return _as_teacher(build_model(spec.model.untrained(), spec.knows(data)), spec, data, device, computing)


def _as_teacher(
    model: nn.Module, spec: TeacherSpec, data: DataSpec, device: torch.device, computing: Computing
) -> Teacher:
    extractor = build_extractor(model, spec.model, spec.knows(data))
    shapes = extractor.shapes((data.channels, data.image_size, data.image_size))
    model.to(device)
    return Teacher(extractor, Normalizer(spec.normalization, device), shapes, computing)


def measured(
    spec: TeacherSpec,
    folder: Path,
    download: bool,
    data_spec: DataSpec,
    data: ImageData | Pictures,
    device: torch.device,
) -> TeacherFile:
    """A teacher of given weights with its accuracy on the test part, measured once and kept beside the runs."""
    assert spec.weights is not None
    file = TeacherFile(locate(spec.weights, download), spec.weights.sha256, None)
    if spec.classes is not None:
        return file
    seen = _seen(spec, file, folder / "teacher.json", data_spec, data_spec, data, device)
    if spec.accuracy is not None and abs(seen.accuracy - spec.accuracy) > TEACHER_TOLERANCE:
        raise UserError(
            f"the teacher '{spec.name}' reaches {seen.accuracy:.2f} % where {spec.accuracy:.2f} % is stated",
            where=str(file.file),
            hint="check the data and the order of their classes, the model's options and the normalization",
        )
    training, on_record = training_of(file.file), None
    if training is not None and training.accuracy is not None and training.target is None:
        on_record = (training.accuracy, "the record beside its weights")
    found = _doubts(spec, seen, data_spec, on_record)
    if training is not None and training.fingerprint != data.fingerprint:
        found += (f"the teacher '{spec.name}' was trained on other data of that name, of another fingerprint",)
    return replace(file, accuracy=seen.accuracy, doubts=found)


def as_used(
    spec: TeacherSpec,
    file: TeacherFile,
    folder: Path,
    data_spec: DataSpec,
    data: ImageData | Pictures,
    device: torch.device,
) -> TeacherFile:
    """A teacher that was trained here, with its accuracy by the input that it gets here: its record's where that is the
    same, else measured once and kept beside it."""
    assert spec.trained_by is not None
    if spec.classes is not None:
        return replace(file, accuracy=None)
    same = spec.normalization == spec.trained_by.protocol.normalization and file.data == data.fingerprint
    if same and spec.trained_by.target is None and file.accuracy is not None:
        return replace(file, doubts=_doubts(spec, Seen(file.accuracy), data_spec, None))
    seen = _seen(spec, file, folder / "as_used.json", data_spec, data_spec, data, device)
    on_record = None
    if spec.trained_by.target is None and file.accuracy is not None:
        on_record = (file.accuracy, "the record of its training")
    return replace(file, accuracy=seen.accuracy, doubts=_doubts(spec, seen, data_spec, on_record))


def on_target(
    spec: TeacherSpec,
    file: TeacherFile,
    folder: Path,
    source: DataSpec,
    target_spec: DataSpec,
    target: ImageData | Pictures,
    device: torch.device,
) -> TeacherFile:
    """The same with its accuracy on the target domain's test part, measured once and kept beside it."""
    if spec.classes is not None:
        return file
    seen = _seen(spec, file, folder / f"on_{target_spec.name}.json", source, target_spec, target, device)
    by_source = spec.trained_by is None or spec.trained_by.target is None
    return replace(file, accuracy=seen.accuracy, source_accuracy=file.accuracy if by_source else None)


def _seen(
    spec: TeacherSpec,
    file: TeacherFile,
    kept_in: Path,
    known: DataSpec,
    tested: DataSpec,
    data: ImageData | Pictures,
    device: torch.device,
) -> Seen:
    """A teacher of the data `known` on the test part of others, or of these."""
    key = {
        "sha256": file.sha256,
        "data": data.fingerprint,
        "model": recorded(spec.model),
        "normalization": spec.normalization.model_dump(mode="json"),
    }

    def measure() -> Seen:
        part = split_for_testing(tested, data, device)
        return look(load_teacher(spec, known, file.file, device), part, tested.classes)

    return kept(kept_in, key, {"name": spec.name}, measure)


def _doubts(spec: TeacherSpec, seen: Seen, data: DataSpec, expected: tuple[float, str] | None) -> tuple[str, ...]:
    return tuple(doubts(spec.name, seen, data.classes, expected, spec.known_classes is not None))


def trained(folder: Path) -> TeacherFile | None:
    """A teacher that was trained here, or None when it is not finished. UserError where its weights are gone, or are
    not those that its record names."""
    record = finished_record(folder)
    if record is None:
        return None
    file = student_file(record)
    checkpoints = tuple(checkpoint.model_dump(mode="json") for checkpoint in record.route)
    route = Route(folder / FOLDER, checkpoints) if checkpoints else None
    return TeacherFile(file, sha256_of(file), record.result.test.last, route, data=record.data.fingerprint)


def fingerprint(model: nn.Module) -> str:
    """sha256 over all parameters and buffers of a network, names included."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
