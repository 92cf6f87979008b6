"""One cell over several processes, as `torchrun` starts them: how they find each other, and get what to do.

Rank 0 is an ordinary run with one worker, which alone writes. The others do what that worker is told to do, each in a
folder of its own that nobody keeps.
"""

import os
import platform
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kdbench.engine.computing.device import gpus
from kdbench.engine.ranks import Ranks
from kdbench.engine.workers.messages import Settings, Task, TrainCells, read_line
from kdbench.engine.workers.versions import versions
from kdbench.errors import UserError, counted
from kdbench.files import files_to_send
from kdbench.models.points import any_gradient
from kdbench.recipe.specs import CellSpec
from kdbench.recipe.timeline import training_images

# How long ranks wait for what one of them does alone: data and teachers are prepared, an evaluation is written.
PATIENCE = timedelta(days=7)
# How long a rank waits for the others in the middle of a step.
STEP = timedelta(hours=1)


def join(settings: Settings, device: str) -> Ranks:
    """Meet the other ranks.

    Args:
        device: that this one was given.

    Raises:
        UserError: they are of other versions, are to synchronize batch norms on a CPU, or this one is not to compute on
            its own GPU.
    """
    if device != own_device(device):
        hint = "give --device cuda, and select GPUs with CUDA_VISIBLE_DEVICES"
        raise UserError(f"each rank uses the GPU of its own number, so rank 0 cannot have {device}", "--device", hint)
    if settings.sync_batch_norm and not device.startswith("cuda"):
        raise UserError("torch synchronizes batch norms on GPUs only", where="--sync-batch-norm")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=STEP)
    control = dist.new_group(backend="gloo", timeout=PATIENCE)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), control, settings.sync_batch_norm)
    found: list[Any] = [None] * ranks.size
    dist.all_gather_object(found, (platform.node(), versions()), control)
    for rank, (node, here) in enumerate(found):
        if here != found[0][1]:
            hint = "install the same versions on all nodes"
            raise UserError(f"rank {rank} on {node} has {here}, rank 0 on {found[0][0]} has {found[0][1]}", hint=hint)
    return ranks


def note_on(ranks: Ranks) -> str:
    """What its user should know of a run of several ranks."""
    norms = "the whole batch" if ranks.sync_batch_norm else "each one's share of a batch"
    return f"{ranks.size} ranks train each cell together; batch norms take {norms}"


def device_here(asked: str) -> str:
    """The device of a rank that is not the first, of a run with this choice."""
    if asked == "cpu" or not torch.cuda.is_available():
        return "cpu"
    # Before anything touches a GPU: a process takes memory of each that it touches.
    torch.cuda.set_device(min(_local(), torch.cuda.device_count() - 1))
    return own_device("cuda") if gpus() else "cpu"


def own_device(device: str) -> str:
    """This rank's device, of the kind that rank 0 has. UserError where there is no GPU for it."""
    local = _local()
    if not device.startswith("cuda"):
        return device
    if local >= gpus():
        raise UserError(f"there is no GPU {local} for local rank {local}", hint=f"GPUs here: {gpus()}")
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def _local() -> int:
    """This rank's number among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def send(ranks: Ranks, task: TrainCells | None) -> None:
    """Give the other ranks a task with the files that it begins from; None: there are no more, and all part."""
    what: list[Any] = [None]
    if task is not None:
        folders = [*(cell.folder for cell in task.cells), *([task.teacher_folder] if task.teacher_folder else [])]
        files = {str(one): {name: file.read_bytes() for name, file in files_to_send(one).items()} for one in folders}
        what = [(task.line(), files)]
    dist.broadcast_object_list(what, 0, ranks.control)
    if task is None:
        dist.destroy_process_group()


def receive(ranks: Ranks, scratch: Path) -> TrainCells | None:
    """The next task, with its folders below one of this rank's own."""
    what: list[Any] = [None]
    dist.broadcast_object_list(what, 0, ranks.control)
    if what[0] is None:
        # NCCL would wait, or complain, if a process ended with it.
        dist.destroy_process_group()
        return None
    line, files = what[0]
    here = {folder: scratch / str(number) / Path(folder).name for number, folder in enumerate(files)}
    for folder, contents in files.items():
        for name, content in contents.items():
            file = here[folder] / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    task = read_line(Task, line)
    assert isinstance(task, TrainCells)
    cells = [cell.model_copy(update={"folder": here[str(cell.folder)]}) for cell in task.cells]
    teacher = here[str(task.teacher_folder)] if task.teacher_folder else None
    settings = task.settings.model_copy(update={"checkpoint_seconds": PATIENCE.total_seconds()})
    own = {"cells": cells, "teacher_folder": teacher, "shared": scratch / "shared", "settings": settings}
    return task.model_copy(update=own | {"device": own_device(task.device)})


def refuse(spec: CellSpec, ranks: int, sync_batch_norm: bool = False) -> None:
    """Raises UserError for a cell that several ranks cannot train together.

    Args:
        sync_batch_norm: whether their batch norms take the whole batch together.
    """
    method = spec.method
    for name, stage in method.stages.items():
        if stage.begins:
            raise UserError(
                f"method '{method.name}', stage '{name}': '{stage.begins.name}' is made for one process, "
                f"here are {ranks} ranks",
                hint="run it without torchrun; without torchrun, cells are spread over several GPUs anyway",
            )
        for loss, term in stage.losses.items() if sync_batch_norm else ():
            # torch has no second derivative of theirs (pytorch/pytorch#61222).
            read = {term.of: term.points("student")} | ({} if term.detach else {"teacher": term.points("teacher")})
            if any(getattr(stage.modes, of) == "train" and any_gradient(points) for of, points in read.items()):
                raise UserError(
                    f"method '{method.name}', stage '{name}': the loss '{loss}' reads gradients, which torch cannot "
                    "differentiate through synchronized batch norms",
                    where="--sync-batch-norm",
                    hint="leave it out: batch norms then take each rank's share of a batch",
                )
    size, keeps = spec.protocol.batch_size, spec.protocol.last_batch == "keep"
    parts = [training_images(part) for part in spec.domains]
    smallest = min([size, *(n if n < size else n % size or size for n in parts if n < size or keeps)])
    if smallest < ranks:
        last = "" if smallest == size else f", as the last one of an epoch is (batches have {size}),"
        hint = "choose another batch size, leave the last one out (protocol.last_batch=drop), or start fewer ranks"
        raise UserError(
            f"a batch of {counted(smallest, 'image')}{last} cannot be shared out among {ranks} ranks", hint=hint
        )
