"""What the machine can do: the speed of a large matrix product, in every precision that it computes in."""

import time

import torch

from kdbench.bench.compare import Machine
from kdbench.engine.computing.choosing import bfloat16_computes, compiler_works
from kdbench.engine.computing.compute import Precision
from kdbench.engine.finish import machine, size_of
from kdbench.engine.networks.build import build_model
from kdbench.recipe.specs import CellSpec

SIZE = {"cpu": 2048, "cuda": 8192}
REPEATS = 8


def machine_of(device: torch.device, threads: int, compiled: bool) -> Machine:
    """The machine. Peaks are measured when they are asked for, in FLOP/s (a multiply-add is two).

    Args:
        compiled: whether torch.compile may take part.
    """
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    precisions: tuple[Precision, ...] = ("float32", "bfloat16") if bfloat16_computes(device) else ("float32",)
    about = machine(device, threads)
    return Machine(about, precisions, compiled and compiler_works(device), lambda precision: _peak(precision, device))


def flops_of(spec: CellSpec) -> dict[str, float]:
    """FLOPs of one image's forward pass, of a cell's student and teacher."""
    return {
        name: size_of(build_model(model.untrained(), data), data)["flops"]
        for name, (model, data) in spec.networks.items()
    }


def _peak(precision: str, device: torch.device) -> float:
    n = SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, precision)) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS):
        begin = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best
