"""One lane's process: builds what the lane trains, then trains it for some seconds whenever it is asked to."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdbench.bench.peers import plain_loop, torchdistill_loop
from kdbench.data.images import ImageData
from kdbench.engine.batches import Batches
from kdbench.engine.cell import TrainingCell
from kdbench.engine.compute import Computing
from kdbench.engine.domain import augmentation_of
from kdbench.engine.member import Member
from kdbench.engine.program import Group, make_graphs
from kdbench.engine.teachers import untrained_teacher
from kdbench.engine.trial import endless, enter_longest_stage
from kdbench.recipe.specs import CellSpec, DataSpec

# Images of the made-up training set: speed does not depend on what they show.
IMAGES = 10_240
# Steps before the first measured one, after compilation.
WARM = 2


def made_up(spec: DataSpec) -> ImageData:
    """Random bytes in the shape of a data set."""
    generator = torch.Generator().manual_seed(0)
    shape = (spec.channels, spec.image_size, spec.image_size)
    images = torch.randint(0, 256, (IMAGES, *shape), dtype=torch.uint8, generator=generator)
    labels = torch.arange(IMAGES) % spec.classes
    names = tuple(str(i) for i in range(spec.classes))
    return ImageData(spec.name, names, images, labels, images[:64], labels[:64], "made up", "made up")


def kdbench_loop(lane: dict[str, Any], device: torch.device) -> Callable[[], int]:
    """The engine's own step for a lane's cells. A call trains one batch and returns its images, once a student."""
    specs = [CellSpec.model_validate(spec) for spec in lane["specs"]]
    computing = Computing(**lane["computing"])
    first = next(spec for spec in specs if spec.teacher is not None)
    assert first.teacher is not None
    data = made_up(first.data)
    batches = Batches(first, data, device)
    teacher = untrained_teacher(first.teacher, first.data, device, computing)
    if lane["table"]:
        views = augmentation_of(first.protocol).views
        kind = torch.bfloat16 if computing.precision == "bfloat16" else torch.float32
        values = torch.randn(len(data.train_labels), views, first.data.classes).to(kind)
        teacher = teacher.with_logits(values.to(device), batches.positions)
    members = [Member(spec, batches, teacher if spec.teacher else None, device, computing) for spec in specs]
    folder = Path(tempfile.mkdtemp())
    cells = [TrainingCell(enter_longest_stage(member), folder, {}, None) for member in members]
    make_graphs(members, batches, teacher)
    step = endless([Group(batches, teacher, cells)], computing)

    def train() -> int:
        step()
        return batches.batch_size * len(members)

    return train


LOOPS: dict[str, Callable[[dict[str, Any], torch.device], Callable[[], int]]] = {
    "kdbench": kdbench_loop,
    "torchdistill": torchdistill_loop,
    "plain": plain_loop,
}


def main() -> None:
    # What libraries print must not end up between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    step: Callable[[], int] | None = None
    device = torch.device("cpu")

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for line in sys.stdin:
        question = json.loads(line)
        if "lane" in question:
            torch.set_num_threads(question["threads"])
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            device = torch.device(question["device"])
            begin = time.perf_counter()
            step = LOOPS[question["lane"]["kind"]](question["lane"], device)
            for _ in range(WARM + 1):
                step()
            finish()
            answer = {"seconds": time.perf_counter() - begin}
        else:
            assert step is not None
            images, begin = 0, time.perf_counter()
            while time.perf_counter() - begin < question["seconds"]:
                images += step()
            finish()
            answer = {"rate": images / (time.perf_counter() - begin)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
