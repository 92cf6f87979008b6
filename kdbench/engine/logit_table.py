"""The table of a teacher's logits: every view of every training image, computed once, looked up ever after.

With a random crop and mirror an image has finitely many views (162 for a padding of 4), so all logits of CIFAR-10 fit
in 0.16 GB. Methods that need nothing else of their teacher then run no teacher. A table is filled on purpose, used only
when it is whole, and belongs to exactly one teacher, data set, normalization, augmentation and precision.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdbench.data.images import ImageData
from kdbench.engine.domain import augmentation_of
from kdbench.engine.logit_files import ABOUT, VALUES, LogitTable, filling, read_table
from kdbench.engine.network import autocast
from kdbench.engine.teacher import Teacher
from kdbench.errors import UserError
from kdbench.files import sha256_of, write_json
from kdbench.recipe.specs import CellSpec, ProtocolSpec, recorded

# Version of the layout on disk.
LAYOUT = 1
# Views in one pass while filling.
PASS = {"cpu": 512, "cuda": 8192}
# Views that are computed again when a table is opened, and how far they may be off, as a share of the largest logit:
# the same views come in other batches, and convolutions round by those.
SAMPLE = 32
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
# Time between two notes of how far filling has come.
NOTE_SECONDS = 5.0

_STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def table_key(spec: CellSpec, sha256: str, data: ImageData, precision: str) -> dict[str, Any]:
    """What the values of a table depend on that serves a cell.

    Args:
        sha256: of its teacher's weights.
        precision: in which the teacher is computed.
    """
    teacher = spec.teacher
    assert teacher is not None
    model = recorded(teacher.model)
    return {
        "layout": LAYOUT,
        "weights": sha256,
        **teacher.choice,
        "model": [model[part] for part in ("target", "options", "version", "image_size") if part in model],
        "normalization": teacher.normalization.model_dump(mode="json"),
        "data": data.fingerprint,
        "augmentation": spec.protocol.augmentation.model_dump(mode="json", exclude={"mix", "transforms"}),
        "precision": precision,
        "images": len(data.train_labels),
        "views": augmentation_of(spec.protocol).views,
        "classes": teacher.knows(spec.data).classes,
    }


def open_table(
    table: LogitTable, teacher: Teacher, data: ImageData, protocol: ProtocolSpec, device: torch.device
) -> Tensor:
    """Logits [images, views, classes] of a whole table, compared with the teacher on a sample of views.

    Raises:
        UserError: they are not what the teacher gives, or the file is damaged.
    """
    damaged = f"clear it ('kdbench logits clear {table.folder.name}') and fill it again, or run without it"
    file = table.folder / VALUES
    if not file.is_file() or file.stat().st_size != table.bytes:
        raise UserError("this table of teacher logits is damaged: its file has another size", str(file), damaged)
    if sha256_of(file) != table.sha256:
        raise UserError("this table of teacher logits is damaged: its file has another sha256", str(file), damaged)
    logits = _mapped(table, "c")
    images, views, _ = table.shape
    generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "little"))
    at = torch.randint(images, (SAMPLE,), generator=generator)
    view = torch.randint(views, (SAMPLE,), generator=generator)
    pixels = augmentation_of(protocol).view(data.train_images[at].to(device), view.to(device))
    computed = _logits(teacher, pixels).float().cpu()
    error = (logits[at, view].float() - computed).abs().max() / computed.abs().max().clamp(min=1e-12)
    if not error <= TOLERANCE[table.key["precision"]]:
        what = f"this table of teacher logits is off by {error:.2g} of the largest logit on {SAMPLE} views"
        raise UserError(what, str(file), damaged)
    if device.type == "cuda" and table.bytes < 0.4 * torch.cuda.mem_get_info(device)[0]:
        return logits.to(device)
    return logits


def fill(
    table: LogitTable,
    teacher: Teacher,
    data: ImageData,
    protocol: ProtocolSpec,
    device: torch.device,
    tell: Callable[[int, float], None],
    stop: Callable[[], bool],
) -> bool:
    """Compute what is missing of a table. What was done before is kept, also when this process is killed.

    Args:
        tell: called with images done and seconds of this call, now and then.
        stop: asked before every pass.

    Returns:
        whether the table is whole.

    Raises:
        UserError: the disk is too small, or another process fills this table.
    """
    table.folder.mkdir(parents=True, exist_ok=True)
    with filling(table.folder):
        table = read_table(table.folder) or table
        table = _made_room(table)
        images, views, _ = table.shape
        together = max(1, PASS[device.type] // views)
        all_views = torch.arange(views, device=device)
        shape = (together * views, *data.train_images.shape[1:])
        teacher.network.prepare({frozenset({"logits"}): -(-images // together)}, shape, training=False)
        augmentation = augmentation_of(protocol)
        begin = noted = time.monotonic()
        done, before = table.done, table.seconds
        stored = _mapped(table, "r+")
        while done < images and not stop():
            part = slice(done, min(done + together, images))
            pixels = data.train_images[part].to(device)
            n = len(pixels)
            batch = augmentation.view(pixels.repeat_interleave(views, dim=0), all_views.repeat(n))
            stored[part] = _logits(teacher, batch).to(stored.dtype).cpu().view(n, views, -1)
            done += n
            now = time.monotonic()
            if now - noted >= NOTE_SECONDS or done >= images:
                _note(table, done, before + now - begin)
                noted = now
                tell(done, now - begin)
        if stop() and done < images:
            _note(table, done, before + time.monotonic() - begin)
    return done >= images


def seconds_an_image(
    table: LogitTable, teacher: Teacher, data: ImageData, protocol: ProtocolSpec, device: torch.device
) -> float:
    """Time that all views of one training image take, the second of two passes."""
    together = max(1, PASS[device.type] // table.shape[1])
    views = torch.arange(table.shape[1], device=device)
    pixels = data.train_images[:together].to(device)
    batch = augmentation_of(protocol).view(pixels.repeat_interleave(len(views), dim=0), views.repeat(len(pixels)))
    taken = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        _logits(teacher, batch).cpu()
        taken = time.perf_counter() - begin
    return taken / len(pixels)


def _logits(teacher: Teacher, pixels: Tensor) -> Tensor:
    with torch.no_grad(), autocast(teacher.network.computing.precision, pixels.device):
        return teacher.network.step(teacher.network.normalizer(pixels), ["logits"])["logits"]


def _mapped(table: LogitTable, mode: str) -> Tensor:
    """The file as a tensor [images, views, classes]: "c" to read, "r+" and "w+" to write."""
    kind = _STORED[table.key["precision"]]
    # numpy has no bfloat16: the same bits as integers.
    bits = np.dtype("<i2" if kind.itemsize == 2 else "<i4")
    array = np.memmap(table.folder / VALUES, dtype=bits, mode=mode, shape=table.shape)  # type: ignore[call-overload]
    return torch.from_numpy(array).view(kind)


def _note(table: LogitTable, done: int, seconds: float) -> None:
    """Say how far the table is filled, after its values are on the disk."""
    file = table.folder / VALUES
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())
    about = {"name": table.name, "key": table.key, "done": done, "seconds": round(seconds, 1)}
    whole = {"sha256": sha256_of(file)} if done >= table.shape[0] else {}
    write_json(table.folder / ABOUT, about | whole)


def _made_room(table: LogitTable) -> LogitTable:
    """The table with its file on the disk in full size, so that a full disk is told now and not in the middle of a
    store. A file that is gone or of another size begins anew."""
    file = table.folder / VALUES
    if table.done and (not file.is_file() or file.stat().st_size != table.bytes):
        table = replace(table, done=0, seconds=0.0)
    free = shutil.disk_usage(table.folder).free
    if not file.is_file() and free < table.bytes * 1.05:
        what = f"the table needs {table.bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB left"
        raise UserError(what, str(table.folder), "make room, or set KDBENCH_HOME to a larger disk")
    with file.open("ab") as stream:
        os.truncate(file, table.bytes)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, table.bytes)
    _note(table, table.done, table.seconds)
    return table
