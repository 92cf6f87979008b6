"""What a finished cell leaves: weights without connectors, test logits, and the record that makes it count."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdbench.data.images import ImageData
from kdbench.data.pictures import Pictures
from kdbench.engine import checkpoint
from kdbench.engine.batch import TARGET
from kdbench.engine.batches import Batches
from kdbench.engine.evaluation import score
from kdbench.engine.member import Log, Member
from kdbench.engine.targets import import_target
from kdbench.engine.teachers import TeacherFile
from kdbench.files import atomic, sha256_of, write_json
from kdbench.recipe.specs import CellSpec, DataSpec, recorded
from kdbench.recipe.timeline import Timeline
from kdbench.record import LOGITS, STUDENT, summary
from kdbench.version import __version__

SCHEMA = 1


def finish(
    member: Member,
    folder: Path,
    cell: dict[str, Any],
    batches: Batches,
    domains: tuple[ImageData | Pictures, ImageData | Pictures | None],
    teacher: TeacherFile | None,
    teacher_model: nn.Module | None,
    compute: dict[str, Any],
) -> dict[str, Any]:
    """Write a finished member's files, its record last: a folder with a record is whole.

    Args:
        domains: the cell's data set, and its target domain.
        cell: the planned cell's names and axes, as the record shows them.
        compute: device, threads, precision and so on.
    Returns:
        the record.
    """
    member.student.model.eval()
    _, logits = score(member.student, batches.test)
    weights = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in member.student.model.state_dict().items()
    }
    for name, tensors in ((LOGITS, {"logits": logits.to(torch.float16).cpu().contiguous()}), (STUDENT, weights)):
        with atomic(folder / name) as temporary:
            save_file(tensors, temporary)
    spec, log = member.spec, member.log
    about_data, about_target = _data(domains, batches)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "kdbench": __version__,
        "status": "finished",
        "identity": spec.identity(),
        "recipe": cell.pop("recipe"),
        "cell": cell,
        "spec": recorded(spec),
        "budget": _budget(member.timeline),
        "result": _result(member, batches, logits),
        "teacher": _teacher(spec, teacher),
        **({"anchors": member.anchors.record()} if member.anchors else {}),
        **({"route": log.route} if log.route else {}),
        "data": about_data,
        **({"target": about_target} if about_target else {}),
        "models": {
            "student": size_of(member.student.model, spec.data),
            "teacher": size_of(teacher_model, spec.data) if teacher_model is not None else None,
        },
        "compute": compute | _times(log),
        "sources": {name: source.record() for name, source in member.sources.items()},
        "operations": {name: operation.record() for name, operation in member.operations.items()},
        "seeds": streams(spec),
        "files": {name: sha256_of(folder / name) for name in (STUDENT, LOGITS)},
        "git": git_state(),
    }
    write_json(folder / "record.json", record)
    (folder / checkpoint.NAME).unlink(missing_ok=True)
    return record


def _times(log: Log) -> dict[str, float]:
    return {
        "seconds": round(log.seconds + log.evaluation_seconds, 3),
        "training_seconds": round(log.seconds, 3),
        "images_per_second": round(log.images / max(log.seconds, 1e-9), 1),
    }


def _budget(line: Timeline) -> dict[str, Any]:
    return {
        "steps": line.total,
        "epochs": round(line.epochs(line.total), 4),
        "extra_epochs": round(line.epochs(line.extra), 4),
        "batches_per_epoch": line.batches_per_epoch,
        "stages": [{"name": span.name, "steps": span.steps} for span in line.spans],
    }


def _result(member: Member, batches: Batches, logits: Tensor) -> dict[str, Any]:
    history = member.log.history
    return {
        "test": summary(history, "test"),
        "validation": summary(history, "validation") if len(batches.validation) else None,
        "metrics": history[-1].get("metrics", {}),
        "references": history[-1].get("references", {}),
        # On the source, and of the teacher that the cell trained, where there are such.
        **{part: summary(history, part) for part in ("source", "teacher") if part in history[-1]},
        **by_classes(member.spec.data, logits, batches.test.labels),
    }


def _teacher(spec: CellSpec, file: TeacherFile | None) -> dict[str, Any] | None:
    if file is None or spec.teacher is None:
        return None
    on_source = {} if spec.target is None else {"source_accuracy": file.source_accuracy}
    doubts = {"doubts": list(file.doubts)} if file.doubts else {}
    return {"name": spec.teacher.name, "sha256": file.sha256, "accuracy": file.accuracy, **on_source, **doubts}


def _data(
    domains: tuple[ImageData | Pictures, ImageData | Pictures | None], batches: Batches
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The data set and the target domain as the record describes them: of the target, `train` images have no labels."""
    data, target = domains
    source_test = batches.source_test or batches.test
    about = _described(data, len(batches.train), len(source_test.labels)) | {"validation": len(batches.validation)}
    if target is None or batches.target is None:
        return about, None
    return about, _described(target, len(batches.target.train), len(batches.test.labels))


def _described(data: ImageData | Pictures, train: int, test: int) -> dict[str, Any]:
    return {
        "name": data.name,
        "fingerprint": data.fingerprint,
        "train": train,
        "test": test,
        "classes": len(data.classes),
        "origin": data.origin,
    }


def streams(spec: CellSpec) -> dict[str, Any]:
    """The seed, and what each stream of draws begins with."""
    split_seed = spec.data.split_seed if spec.data.split_seed is not None else spec.seed
    cropped = ["resized_crop"] if spec.protocol.augmentation.resized_crop else []
    drawn = ["order", "augmentation", *cropped]
    of_target = [f"{TARGET}/{stream}" for stream in drawn] if spec.target is not None else []
    sources = [import_target(stage.source.target) for stage in spec.method.stages.values() if stage.source is not None]
    own = dict.fromkeys(name for source in sources for name in source.streams)
    return {
        "seed": spec.seed,
        "split": split_seed,
        "streams": ["init", "connectors", *drawn, *of_target, "dropout", *own],
    }


def by_classes(data: DataSpec, logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Of a student that trained on images of some classes: test accuracy in percent on these and on the others.

    All classes compete in both; nothing for a student that trained on all.
    """
    if data.only_classes is None:
        return {}
    right = (logits.argmax(dim=1) == labels).float()
    own = torch.isin(labels, torch.tensor(data.only_classes, device=labels.device))
    return {"by_classes": {"trained_on": 100 * right[own].mean().item(), "others": 100 * right[~own].mean().item()}}


def size_of(model: nn.Module, data: DataSpec) -> dict[str, float]:
    """Parameters, and floating-point operations of one image's forward pass (a multiply-add counts as two)."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.zeros(1, data.channels, data.image_size, data.image_size, device=device))
    model.train(was_training)
    return {"parameters": sum(p.numel() for p in model.parameters()), "flops": counter.get_total_flops()}


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """Where and with what a cell was computed."""
    import torchvision

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": device.type,
        "device_name": name,
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": platform.platform(terse=True),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


@cache
def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that kdbench runs from, or None when it is installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--", "kdbench", "registry"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}
