"""The table of a teacher's logits: every view of every training image, computed once, looked up ever after.

With a random crop and mirror an image has finitely many views (162 for a padding of 4), so all logits of CIFAR-10 fit
in 0.16 GB. Methods that need nothing else of their teacher then run no teacher. A table is filled on purpose, used only
by cells whose images it all holds, and belongs to exactly one teacher, data set, normalization, augmentation and
precision.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdbench.data.augment import Augmentation
from kdbench.data.images import ImageData
from kdbench.engine.data.domain import augmentation_of, split
from kdbench.engine.networks.network import autocast
from kdbench.engine.teachers.logit_files import VALUES, LogitTable, filling, note, read_table
from kdbench.engine.teachers.teacher import Teacher
from kdbench.errors import UserError
from kdbench.files import sha256_of
from kdbench.recipe.specs import CellSpec, ProtocolSpec, recorded

logger = logging.getLogger("kdbench")

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


def images_of(specs: Iterable[CellSpec], data: ImageData) -> int:
    """The images that cells on one data set train with, as the bits of a number."""
    found = torch.zeros(len(data.train_labels), dtype=torch.bool)
    for one, seed in {(spec.data.model_dump_json(), spec.seed): (spec.data, spec.seed) for spec in specs}.values():
        found[split(one, data.train_labels, seed)[0]] = True
    return _bits(found)


def _bits(images: Tensor) -> int:
    """Images, bool [N], as the bits of a number."""
    return int.from_bytes(np.packbits(images.numpy(), bitorder="little").tobytes(), "little")


def _indices(bits: int) -> Tensor:
    """int64 indices of images that are given as the bits of a number, ascending."""
    packed = np.frombuffer(bits.to_bytes(-(-bits.bit_length() // 8), "little"), dtype=np.uint8)
    return torch.from_numpy(np.flatnonzero(np.unpackbits(packed, bitorder="little")))


def open_table(
    table: LogitTable, teacher: Teacher, data: ImageData, protocol: ProtocolSpec, device: torch.device
) -> Tensor:
    """Logits [images, views, classes] of a table, compared with the teacher on a sample of views.

    Of images that the table does not hold they are zero.

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
    views, held = table.shape[1], _indices(table.filled)
    generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "little"))
    at = held[torch.randint(len(held), (SAMPLE,), generator=generator)]
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
    images: int,
    teacher: Teacher,
    data: ImageData,
    protocol: ProtocolSpec,
    device: torch.device,
    tell: Callable[[int, float], None],
    stop: Callable[[], bool],
) -> bool:
    """Compute what a table lacks of some images. What was done before is kept, also when this process is killed.

    Args:
        images: as the bits of a number.
        tell: called with how many of them are done and seconds of this call, now and then.
        stop: asked before every pass.

    Returns:
        whether the table holds all of them.

    Raises:
        UserError: the disk is too small, or another process fills this table.
    """
    table.folder.mkdir(parents=True, exist_ok=True)
    with filling(table.folder):
        table = _made_room(_undamaged(read_table(table.folder) or table), images)
        lacking = _indices(images & ~table.filled)
        views = table.shape[1]
        together = max(1, PASS[device.type] // views)
        shape = (together * views, *data.train_images.shape[1:])
        teacher.network.prepare({frozenset({"logits"}): -(-len(lacking) // together)}, shape, training=False)
        augmentation = augmentation_of(protocol)
        begin = noted = time.monotonic()
        before, held = table.seconds, torch.zeros(table.shape[0], dtype=torch.bool)
        held[_indices(table.filled)] = True
        stored = _mapped(table, "r+")
        done = images.bit_count() - len(lacking)
        for at in range(0, len(lacking), together):
            if stop():
                break
            part = lacking[at : at + together]
            logits = _of_all_views(teacher, data.train_images[part].to(device), augmentation)
            stored[part] = logits.to(stored.dtype).cpu()
            held[part] = True
            done += len(part)
            now = time.monotonic()
            if now - noted >= NOTE_SECONDS:
                table, noted = _kept(replace(table, filled=_bits(held), seconds=before + now - begin)), now
                tell(done, now - begin)
        taken = time.monotonic() - begin
        table = _kept(replace(table, filled=_bits(held), seconds=before + taken))
        note(replace(table, sha256=sha256_of(table.folder / VALUES)))
        tell(done, taken)
    return table.filled & images == images


def seconds_an_image(
    table: LogitTable, teacher: Teacher, data: ImageData, protocol: ProtocolSpec, device: torch.device
) -> float:
    """Time that all views of one training image take, the second of two passes."""
    pixels = data.train_images[: max(1, PASS[device.type] // table.shape[1])].to(device)
    taken = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        _of_all_views(teacher, pixels, augmentation_of(protocol)).cpu()
        taken = time.perf_counter() - begin
    return taken / len(pixels)


def _of_all_views(teacher: Teacher, images: Tensor, augmentation: Augmentation) -> Tensor:
    """Logits [images, views, classes] of every view of some images."""
    views = torch.arange(augmentation.views, device=images.device)
    batch = augmentation.view(images.repeat_interleave(len(views), dim=0), views.repeat(len(images)))
    return _logits(teacher, batch).view(len(images), len(views), -1)


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


def _kept(table: LogitTable) -> LogitTable:
    """Note which images a table holds, after its values are on the disk."""
    with (table.folder / VALUES).open("rb+") as stream:
        os.fsync(stream.fileno())
    note(table)
    return table


def _undamaged(table: LogitTable) -> LogitTable:
    """The table, empty where its values are not those that it was summed up with: else they were summed up anew."""
    file = table.folder / VALUES
    if table.sha256 is None or not file.is_file() or sha256_of(file) == table.sha256:
        return table
    logger.warning("%s is damaged; what it held is computed again", file)
    return replace(table, filled=0, seconds=0.0)


def _made_room(table: LogitTable, images: int) -> LogitTable:
    """The table with room on the disk for some images, so that a full disk is told now and not in the middle of a
    store. A file that is gone or of another size begins anew."""
    file = table.folder / VALUES
    if table.filled and (not file.is_file() or file.stat().st_size != table.bytes):
        table = replace(table, filled=0, seconds=0.0)
    lacking = _indices(images & ~table.filled).tolist()
    needed, free = len(lacking) * table.image_bytes, shutil.disk_usage(table.folder).free
    if free < needed * 1.05:
        what = f"the table needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB left"
        raise UserError(what, str(table.folder), "make room, or set KDBENCH_HOME to a larger disk")
    with file.open("ab") as stream:
        os.truncate(file, table.bytes)
        if hasattr(os, "posix_fallocate"):
            for image in lacking:
                os.posix_fallocate(stream.fileno(), image * table.image_bytes, table.image_bytes)
    table = replace(table, sha256=None)
    note(table)
    return table
