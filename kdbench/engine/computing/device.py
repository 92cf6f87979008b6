"""Which device computes, why a GPU that is there does not, and how much main memory there is.

Imports torch only when it is asked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kdbench.errors import UserError, first_line

if TYPE_CHECKING:
    import torch

# There where NVIDIA's driver is loaded.
DRIVER = Path("/dev/nvidiactl")


def gpus() -> int:
    """How many GPUs torch can compute on."""
    import torch

    return torch.cuda.device_count() if not unusable_gpu() and torch.cuda.is_available() else 0


def unusable_gpu() -> str:
    """Why torch cannot use an NVIDIA GPU that the system has; "" where it can, or where there is none."""
    import torch

    if not torch.cuda.is_available() and not DRIVER.exists():
        return ""
    try:
        torch.cuda.init()
        # A GPU that is too old or too new for this torch is there, until something is computed.
        torch.zeros(1, device="cuda").add_(1).item()
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return ""


def not_used(why: str) -> str:
    """What is said of a GPU that torch cannot use."""
    return f"warning: there is a GPU that torch cannot use, so this computes on the CPU: {why}"


def chosen_device(asked: str, tell: Callable[[str], None]) -> torch.device:
    """The device that a command computes on: for "auto" a GPU, where there is one that torch can use.

    Args:
        tell: is told of a GPU that torch cannot use.

    Raises:
        UserError: there is no such device.
    """
    import torch

    here, why = gpus(), unusable_gpu()
    if asked.startswith("cuda") and int(asked.partition(":")[2] or 0) >= here:
        hint = f"CUDA devices here: {here}" + (f"; there is one that torch cannot use: {why}" if why else "")
        raise UserError(f"there is no device {asked}", where="--device", hint=hint)
    if asked == "auto" and why:
        tell(not_used(why))
    return indexed(torch.device(asked if asked != "auto" else "cuda" if here else "cpu"))


def indexed(device: torch.device) -> torch.device:
    """The device with its number: torch takes "cuda" in some places and not in others."""
    import torch

    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def use(device: torch.device) -> torch.device:
    """Have this process compute on a device, in a float32 that is one: TensorFloat-32 keeps ten bits of the
    mantissa."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = indexed(device)
    if device.type == "cuda":
        # Recordings, compiled code and seeds belong to the present device, not to that of a tensor.
        torch.cuda.set_device(device)
    return device


def available_memory() -> int | None:
    """Bytes of main memory that are free for new processes, within what a container allows."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None
    groups = Path("/sys/fs/cgroup")
    for folder, limit, used in (
        (groups, "memory.max", "memory.current"),
        (groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            free = min(free, max(left, 0))
    return free


def peak_resident() -> int:
    """The most main memory that this process had so far, in bytes; 0 where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        # Elsewhere: on Linux this begins with what the process had that started this one.
        if sys.platform == "win32":
            return 0
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
