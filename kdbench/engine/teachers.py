"""A cell's teacher: its weights by hash, found, downloaded or trained; then loaded, frozen and checked."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import nn

from kdbench.cards import TEACHER_TOLERANCE, Weights
from kdbench.engine.anchors import Route
from kdbench.engine.batches import SLICE, Part
from kdbench.engine.build import build_extractor, build_model, load_weights, read_weights, resolve
from kdbench.engine.compute import REFERENCE, Computing
from kdbench.engine.network import Normalizer
from kdbench.engine.route import FOLDER
from kdbench.engine.streamed import part_for_testing
from kdbench.engine.teacher import Teacher
from kdbench.errors import UserError
from kdbench.files import find_weights, home, sha256_of, weight_folders, write_json
from kdbench.reading import of_form, read_json
from kdbench.recipe.schema import DataSpec, TeacherSpec, recorded
from kdbench.results.record import finished_record, student_file
from kdbench.sources.images import ImageData
from kdbench.sources.pictures import Pictures

log = logging.getLogger("kdbench")


@dataclass(frozen=True)
class TeacherFile:
    """Where a teacher's weights lie, their sha256, and the accuracy measured with them (percent; None for a teacher of
    other classes, which cannot be tested on these data), and the checkpoints of its training where they were kept.
    `source_accuracy`: on the source, where `accuracy` is that on a target domain."""

    file: Path
    sha256: str
    accuracy: float | None
    route: Route | None = None
    source_accuracy: float | None = None


def locate(weights: Weights, download: bool) -> Path:
    """A weight file with the right hash: from the weight folders, or downloaded into the cache."""
    file = find_weights(weights.file)
    if file is None:
        if weights.url is None or not download:
            tried = ", ".join(str(folder) for folder in weight_folders())
            raise UserError(
                f"there is no weight file '{weights.file}'",
                hint=f"looked in {tried}; put it there, set KDBENCH_WEIGHTS, or allow the download"
                + (f" of {weights.url}" if weights.url else ""),
            )
        file = home() / "weights" / weights.file
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(weights.url, str(file), hash_prefix=weights.sha256, progress=False)
        except (OSError, RuntimeError) as error:
            tried = ", ".join(str(folder) for folder in weight_folders())
            raise UserError(
                f"the weights could not be downloaded from {weights.url}: {error}",
                hint=f"get '{weights.file}' by hand and put it into one of: {tried}",
            ) from None
    if sha256_of(file) != weights.sha256:
        raise UserError(
            f"the weight file has another sha256 than its card says ({weights.sha256[:12]}…)",
            where=str(file),
            hint="it is damaged or another file: replace it",
        )
    return file


def load_teacher(
    spec: TeacherSpec, data: DataSpec, file: Path, device: torch.device, computing: Computing = REFERENCE
) -> Teacher:
    """The frozen network with its weights, on its device, in eval mode."""
    model = build_model(spec.model, spec.knows(data))
    state = read_weights(file)
    if spec.weights is not None and spec.weights.layout is not None:
        state = resolve(spec.weights.layout)(state)
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
    file = locate(spec.weights, download)
    if spec.classes is not None:
        return TeacherFile(file, spec.weights.sha256, None)
    kept = folder / "teacher.json"
    key = {
        "sha256": spec.weights.sha256,
        "data": data.fingerprint,
        "model": recorded(spec.model),
        "normalization": spec.normalization.model_dump(mode="json"),
    }
    accuracy = _measured_before(kept, key)
    if accuracy is None:
        accuracy = accuracy_of(load_teacher(spec, data_spec, file, device), part_for_testing(data_spec, data, device))
        write_json(kept, {"name": spec.name, **key, "accuracy": accuracy})
    if spec.accuracy is not None and abs(accuracy - spec.accuracy) > TEACHER_TOLERANCE:
        raise UserError(
            f"the teacher '{spec.name}' reaches {accuracy:.2f} % where its card says {spec.accuracy:.2f} %",
            where=str(file),
            hint="check the data, the model's options and the normalization",
        )
    return TeacherFile(file, spec.weights.sha256, accuracy)


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
    key = {"sha256": file.sha256, "data": target.fingerprint, "normalization": spec.normalization.model_dump()}
    kept = folder / f"on_{target_spec.name}.json"
    accuracy = _measured_before(kept, key)
    if accuracy is None:
        teacher = load_teacher(spec, source, file.file, device)
        accuracy = accuracy_of(teacher, part_for_testing(target_spec, target, device))
        write_json(kept, {**key, "accuracy": accuracy})
    by_source = spec.trained_by is None or spec.trained_by.target is None
    return replace(file, accuracy=accuracy, source_accuracy=file.accuracy if by_source else None)


def trained(folder: Path) -> TeacherFile | None:
    """A teacher that was trained here, or None when it is not finished. UserError where its weights are gone, or are
    not those that its record names."""
    record = finished_record(folder)
    if record is None:
        return None
    file = student_file(record)
    kept = tuple(checkpoint.model_dump(mode="json") for checkpoint in record.route)
    return TeacherFile(file, sha256_of(file), record.result.test.last, Route(folder / FOLDER, kept) if kept else None)


@torch.no_grad()
def accuracy_of(teacher: Teacher, part: Part) -> float:
    """Accuracy on a part, in percent."""
    right = 0
    for images, labels in part.slices(SLICE[part.labels.device.type]):
        right += int((teacher(images, ["logits"])["logits"].argmax(dim=1) == labels).sum())
    return round(100 * right / len(part.labels), 4)


def fingerprint(model: nn.Module) -> str:
    """sha256 over all parameters and buffers of a network, names included."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Kept(BaseModel):
    """What is read of an accuracy that was kept."""

    accuracy: float = Field(ge=0, le=100, strict=True)


def _measured_before(file: Path, key: dict[str, Any]) -> float | None:
    """The accuracy in percent that was kept with this key; None where it is to be measured."""
    if not file.exists():
        return None
    try:
        found = read_json(file)
        accuracy = of_form(_Kept, found, str(file)).accuracy
    except UserError as error:
        log.warning("%s; the teacher is measured again", str(error))
        return None
    return accuracy if all(found.get(name) == value for name, value in key.items()) else None
