"""`kdbench bench`: images per second, technique by technique, and beside peers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from kdbench.cli.options import DeviceOption, RegistryOption
from kdbench.errors import UserError

EXAMPLES = (
    "Examples:  kdbench bench   ·   kdbench bench ab_resnet --rounds 3   ·   "
    "kdbench bench my.yaml --no-peers --json speed.json"
)


def command(
    recipes: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE]...", help="Their pairs and methods.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every lane, interleaved.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of one turn.")] = 3.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads (default: all cores).")] = None,
    device: DeviceOption = "auto",
    peers: Annotated[bool, typer.Option(help="Whether torchdistill and a plain PyTorch loop take part.")] = True,
    compiled: Annotated[bool, typer.Option(help="Whether torch.compile takes part: it needs minutes to start.")] = True,
    json: Annotated[Path | None, typer.Option(help="Also write everything that was measured to this file.")] = None,
    registry: RegistryOption = None,
) -> None:
    """Time the training loop on the pairs of RECIPES (default: ab_wrn), on made-up images of their size.

    A method that reads its teacher's logits alone is trained in several ways; by the fastest, that method with a table
    of teacher logits, and all methods as one cohort. Lanes take turns, so that a busy machine slows all of them.
    About five minutes for each recipe on two CPU cores.
    """
    import importlib.util

    from kdbench.bench.compare import Result, compare, table
    from kdbench.files import write_json
    from kdbench.recipe.planning import plan
    from kdbench.registry import Registry

    if peers and importlib.util.find_spec("torchdistill") is None:
        raise UserError(
            "torchdistill, which the comparison needs, is not installed",
            where="kdbench bench",
            hint="pip install 'kdbench[peers]', or leave the peers out: --no-peers",
        )
    cards = Registry(registry or ())
    plans = [plan(recipe, cards) for recipe in recipes or ("ab_wrn",)]

    import torch

    from kdbench.bench.machine import flops_of, machine_of

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= gpus:
        raise UserError(f"there is no device {device}", where="--device", hint=f"CUDA devices here: {gpus}")
    chosen = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    cores = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    machine = machine_of(torch.device(chosen), cores, compiled)

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    print(f"{machine.about['device_name']}, {cores} threads, torch {machine.about['torch']}\n")
    results: list[Result] = []
    for planned in plans:
        tell(f"{planned.title or planned.name}")
        teacher = next((cell.spec for cell in planned.cells if cell.spec.teacher is not None), None)
        if teacher is None:
            raise UserError("the benchmark needs a recipe with a teacher", where=planned.name)
        results.append(compare(planned, machine, flops_of(teacher), chosen, cores, rounds, seconds, peers, tell))
        print(table(results[-1:]))
        if json is not None:
            write_json(json, {"machine": machine.about, "results": [one.plain() for one in results]})

    def ratios(one: Result) -> str:
        return " ".join(f"{role}={ratio:.2f}" for role, ratio in one.ratios.items())

    for one in results:
        print(f"{one.title}, against {one.rows[0].lane.name}: {ratios(one)}")
    print(f"RATIO {ratios(results[0])}")
