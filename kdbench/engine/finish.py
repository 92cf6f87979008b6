"""What a finished cell leaves: weights without connectors, test logits, and the record that makes it count."""

import platform
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdbench.data.pictures import AnyData, Pictures
from kdbench.engine.answers import measured
from kdbench.engine.data.batch import SECOND, TARGET
from kdbench.engine.evaluation import PARTS, scores
from kdbench.engine.log import Log
from kdbench.engine.member import Member
from kdbench.engine.networks.predicting import Predictor
from kdbench.engine.networks.weights import save_tensors, weights_of
from kdbench.engine.surroundings import said_of
from kdbench.engine.targets import import_target
from kdbench.engine.teachers.files import TeacherFile
from kdbench.files import BEST, LOGITS, PACKAGE, RECORD, STUDENT, UNFINISHED, write_json
from kdbench.models.probing import undisturbed
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.specs import AugmentationSpec, CellSpec, recorded
from kdbench.record import SCHEMA, Record, summary
from kdbench.record_parts import Result
from kdbench.version import __version__


def finish(
    member: Member,
    folder: Path,
    names: dict[str, Any],
    domains: tuple[AnyData, AnyData | None],
    teacher: TeacherFile | None,
    teacher_logits: Tensor | None,
    compute: dict[str, Any],
) -> Record:
    """Write a finished member's files, its record last: a folder with a record is whole.

    Args:
        names: what the record says of the cell's place in the comparison.
        domains: the cell's data set, and its target domain.
        teacher: the cell's, where it learned from one.
        teacher_logits: of the shared teacher on the test part.
        compute: device, threads, precision and so on.

    Returns:
        the record.
    """
    member.set_modes(evaluating=True)
    logits = scores(member.answers, member.batches.test).logits
    kept = {LOGITS: {"logits": logits.to(torch.float16).cpu().contiguous()}, STUDENT: weights_of(member.answers.model)}
    if best := member.log.best:
        kept[BEST] = best["weights"]
    files = {name: save_tensors(folder / name, tensors) for name, tensors in kept.items()}
    spec, log = member.spec, member.log
    # What follows from the resolved recipe is filled in by the record itself.
    record = Record.model_validate(
        {
            "schema": SCHEMA,
            "kdbench": __version__,
            "status": "finished",
            "identity": spec.identity(),
            **names,
            "spec": recorded(spec),
            "result": _result(member, logits, teacher_logits),
            "teacher": _teacher(spec, teacher),
            "anchors": member.anchors.record() if member.anchors else [],
            "route": log.route,
            "best": best and {key: value for key, value in best.items() if key != "weights"},
            **_data(*domains),
            "models": _sizes(member),
            "compute": compute | _times(log),
            "sources": {name: source.record() for name, source in member.sources.items()},
            "operations": {name: operation.record() for name, operation in member.operations.items()},
            "modules": said_of(member.modules.of_method),
            "seeds": {"streams": streams(spec)},
            "files": files,
            "git": git_state(),
        }
    )
    write_json(folder / RECORD, record.plain())
    for name in UNFINISHED:
        (folder / name).unlink(missing_ok=True)
    return record


def _sizes(member: Member) -> dict[str, dict[str, float] | None]:
    data = {network: taken for network, (_, taken) in member.spec.networks.items()}
    taught = size_of(member.teacher.network.model, data["teacher"]) if member.teacher else None
    return {"student": size_of(member.answers.model, data["student"]), "teacher": taught}


def _times(log: Log) -> dict[str, float]:
    return {
        "seconds": round(log.seconds + log.evaluation_seconds, 3),
        "training_seconds": round(log.history[-1]["seconds"], 3),
        "images_per_second": round(log.images / max(log.seconds, 1e-9), 1),
    }


def _result(member: Member, logits: Tensor, teacher: Tensor | None) -> Result:
    history, test = member.log.history, member.batches.test
    if (own := member.modules.trained_teacher) is not None:
        own.model.eval()
        teacher = scores(own, test).logits
    # On the source, and of the teacher that the cell trained, where there are such.
    parts = [part for part in PARTS if part in history[-1]]
    return Result.model_validate(
        {
            **{part: summary(history, part) for part in parts},
            **measured(logits, test.labels, teacher),
            "metrics": history[-1].get("metrics", {}),
            "references": history[-1].get("references", {}),
            "by_classes": by_classes(member.spec.data, logits, test.labels),
        }
    )


def _teacher(spec: CellSpec, file: TeacherFile | None) -> dict[str, Any] | None:
    if file is None or spec.teacher is None:
        return None
    on_source = {} if spec.target is None else {"source_accuracy": file.source_accuracy}
    several = {"members": list(file.members) or None, "doubts": list(file.doubts) or None}
    return {"sha256": file.sha256, "accuracy": file.accuracy, **on_source, **several}


def _data(data: AnyData, target: AnyData | None) -> dict[str, Any]:
    """Of the data set and of the target domain what no card knows: which bytes they were, and what is seen of them."""

    def known(one: AnyData) -> dict[str, Any]:
        seen = {"short_side": one.short_side} if isinstance(one, Pictures) else {}
        return {"fingerprint": one.fingerprint, "origin": one.origin, "class_names": [*one.classes]} | seen

    return {name: known(one) for name, one in {"data": data, "target": target}.items() if one is not None}


def streams(spec: CellSpec) -> list[str]:
    """What each stream of draws begins with."""

    def drawn_for(chosen: AugmentationSpec) -> list[str]:
        return ["augmentation", *(part for part in ("resized_crop", "transforms", "mix") if getattr(chosen, part))]

    drawn = ["order", *drawn_for(spec.protocol.augmentation)]
    of_target = [f"{TARGET}/{stream}" for stream in drawn] if spec.target is not None else []
    if any(SECOND in (term.input, term.against) for term in spec.method.terms):
        of_target += [f"{SECOND}/{one}" for one in drawn_for(spec.protocol.second or spec.protocol.augmentation)]
    sources = [import_target(source.target) for source in spec.method.sources.values()]
    own = dict.fromkeys(name for source in sources for name in source.streams)
    return ["init", "connectors", *drawn, *of_target, "dropout", *own]


def by_classes(data: DataSpec, logits: Tensor, labels: Tensor) -> dict[str, float] | None:
    """Of a student that trained on images of some classes: test accuracy in percent on these and on the others.

    All classes compete in both; what has no test images is left out. None for a student that trained on all.
    """
    if data.only_classes is None:
        return None
    right = (logits.argmax(dim=1) == labels).float()
    own = torch.isin(labels, torch.tensor(data.only_classes, device=labels.device))
    parts = {"trained_on": right[own], "others": right[~own]}
    return {name: 100 * part.mean().item() for name, part in parts.items() if len(part)}


def size_of(model: nn.Module, data: DataSpec) -> dict[str, float]:
    """Parameters, and floating-point operations of one image's forward pass (a multiply-add counts as two)."""
    device = next(model.parameters()).device
    counter = FlopCounterMode(display=False)
    image = torch.zeros(1, *data.image_shape, device=device)
    with undisturbed(model, training=False):
        with counter:
            model(image)
        counted = model.used(image) if isinstance(model, Predictor) else model.parameters()
    return {"parameters": sum(p.numel() for p in counted), "flops": counter.get_total_flops()}


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
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that kdbench runs from, or None when it is installed."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", "kdbench", "registry")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": bool(changes)}
