"""The same pair and batch in torchdistill, and in a loop as the field's repositories write it.

Both read images through torchvision's in-memory CIFAR10 class and its per-image transforms, compute in float32, and
read their loss at every step. torchdistill comes from its package (extra `peers`); its own box, loss, optimizer and
data loader run as its example script runs them.
"""

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import CIFAR10

from kdbench.bench.made_up import made_up
from kdbench.engine.networks.build import build_model
from kdbench.errors import UserError
from kdbench.recipe.specs import CellSpec

TEMPERATURE = 4.0
ALPHA = 0.1  # of the labels


class _InMemory(CIFAR10):
    """torchvision's class on images that are given, not read."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[..., Any]) -> None:
        self.data = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = labels.tolist()
        self.transform, self.target_transform = transform, None


def _data(spec: CellSpec) -> _InMemory:
    data, chosen = made_up(spec.data), spec.protocol.augmentation
    padding = "reflect" if chosen.mode == "reflect" else "constant"
    transform = transforms.Compose(
        [
            transforms.RandomCrop(spec.data.image_size, padding=chosen.padding, padding_mode=padding),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(spec.protocol.normalization.mean, spec.protocol.normalization.std),
        ]
    )
    return _InMemory(data.train_images, data.train_labels, transform)


def _networks(spec: CellSpec, device: torch.device) -> tuple[nn.Module, nn.Module]:
    assert spec.teacher is not None
    teacher = build_model(spec.teacher.model.untrained(), spec.data)
    return teacher.to(device), build_model(spec.student, spec.data, spec.seed).to(device)


def _loading(device: torch.device) -> dict[str, Any]:
    """On a GPU images are made by processes beside it; on a CPU these would take the cores from the training."""
    if device.type == "cpu":
        return {"num_workers": 0}
    return {"num_workers": min(os.cpu_count() or 1, 8), "persistent_workers": True, "pin_memory": True}


def _forever(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def plain_loop(lane: dict[str, Any], device: torch.device) -> Callable[[], int]:
    """A hand-written KD loop: loader, teacher without gradients, loss, step, loss and accuracy read at every step."""
    spec = CellSpec.model_validate(lane["specs"][0])
    teacher, student = _networks(spec, device)
    teacher.train(not lane["teacher_eval"])
    stage = next(iter(spec.method.stages.values()))
    optimizer = torch.optim.SGD(student.parameters(), **stage.optimizer.options)
    loader = _forever(
        DataLoader(_data(spec), spec.protocol.batch_size, shuffle=True, drop_last=True, **_loading(device))
    )

    def step() -> int:
        images, labels = next(loader)
        images, labels = images.to(device), labels.to(device)
        with torch.no_grad():
            targets = teacher(images)
        logits = student(images)
        soft = F.kl_div(
            F.log_softmax(logits / TEMPERATURE, dim=1), F.softmax(targets / TEMPERATURE, dim=1), reduction="batchmean"
        )
        loss = ALPHA * F.cross_entropy(logits, labels) + (1 - ALPHA) * TEMPERATURE**2 * soft
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        (logits.argmax(dim=1) == labels).float().mean().item()
        return len(labels)

    return step


def torchdistill_loop(lane: dict[str, Any], device: torch.device) -> Callable[[], int]:
    """torchdistill's own distillation box with its KD loss."""
    try:
        from torchdistill.core.distillation import get_distillation_box
    except ImportError:
        raise UserError("torchdistill is not installed", hint="pip install 'kdbench[peers]'") from None
    logging.disable(logging.INFO)
    spec = CellSpec.model_validate(lane["specs"][0])
    teacher, student = _networks(spec, device)
    stage = next(iter(spec.method.stages.values()))
    loss_of_kd = {
        "key": "KDLoss",
        "kwargs": {
            "student_module_path": ".",
            "student_module_io": "output",
            "teacher_module_path": ".",
            "teacher_module_io": "output",
            "temperature": TEMPERATURE,
            "alpha": ALPHA,
            "reduction": "batchmean",
        },
    }
    config = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler, "kwargs": {}},
            "kwargs": {"batch_size": spec.protocol.batch_size, "drop_last": True, **_loading(device)},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False, "sequential": []},
        "student": {"forward_proc": "forward_batch_only", "sequential": []},
        "optimizer": {"key": "SGD", "kwargs": dict(stage.optimizer.options)},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": loss_of_kd, "weight": 1.0}}},
        },
    }
    box = get_distillation_box(teacher, student, {"train": _data(spec)}, config, device, None, False, 1)
    box.pre_epoch_process(epoch=0)
    if lane["teacher_eval"]:
        box.teacher_model.eval()
    loader = _forever(box.train_data_loader)

    def step() -> int:
        images, labels, more = next(loader)
        images, labels = images.to(device), labels.to(device)
        box.pre_forward_process()
        loss = box.forward_process(images, labels, more)
        box.post_forward_process(loss=loss)
        loss.item()
        if torch.isnan(loss) or torch.isinf(loss):
            raise RuntimeError("torchdistill's loss was not finite")
        return len(labels)

    return step
