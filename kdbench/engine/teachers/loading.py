"""Teachers from their weights: loaded and frozen, or with first weights."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from kdbench.engine.computing.compute import REFERENCE, Computing
from kdbench.engine.networks.build import build_extractor, build_model
from kdbench.engine.networks.network import Normalizer
from kdbench.engine.networks.weights import load_teacher_file
from kdbench.engine.teachers.teacher import Teacher
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.specs import TeacherSpec


def load_teacher(
    spec: TeacherSpec, data: DataSpec, file: Path, device: torch.device, computing: Computing = REFERENCE
) -> Teacher:
    """The frozen network with its weights, on its device, in eval mode."""
    model = build_model(spec.model, spec.knows(data))
    load_teacher_file(model, file, spec, data)
    return _as_teacher(model, spec, data, device, computing)


def untrained_teacher(spec: TeacherSpec, data: DataSpec, device: torch.device, computing: Computing) -> Teacher:
    """The same network with first weights: for whoever asks only what it costs."""
    return _as_teacher(build_model(spec.model.untrained(), spec.knows(data)), spec, data, device, computing)


def _as_teacher(
    model: nn.Module, spec: TeacherSpec, data: DataSpec, device: torch.device, computing: Computing
) -> Teacher:
    known = spec.knows(data)
    extractor = build_extractor(model, spec.model, known)
    shapes = extractor.shapes(known.image_shape)
    model.to(device)
    return Teacher(extractor, Normalizer(spec.normalization, known.image_shape[1:], device), shapes, computing)


def fingerprint(model: nn.Module) -> str:
    """sha256 over all parameters and buffers of a network, names included."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
