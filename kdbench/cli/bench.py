"""`kdbench bench`: images per second, technique by technique, and beside peers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kdbench.cli.console import tell
from kdbench.cli.options import DeviceOption, RegistryOption
from kdbench.errors import UserError
from kdbench.files import cores, write_json
from kdbench.recipe.planning import Plan, plan
from kdbench.registry import Registry

# Side by side, for the time of a cohort.
FIVE_METHODS = "compare.method=[ce, kd, kd_only, fitnets, at]"

EXAMPLES = """
kdbench bench
kdbench bench ab_resnet --rounds 3
kdbench bench my.yaml --no-peers --json speed.json
"""


def command(
    recipes: Annotated[list[str] | None, typer.Argument(metavar="RECIPE", help="What is timed.")] = None,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Turns of every lane.")] = 3,
    seconds: Annotated[float | None, typer.Option(min=0.1, max=3600, help="Of a turn (default: 2, GPU 1).")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads (default: all cores).")] = None,
    device: DeviceOption = "auto",
    peers: Annotated[bool, typer.Option(help="Whether torchdistill and a plain PyTorch loop take part.")] = True,
    compiled: Annotated[bool, typer.Option(help="Whether torch.compile takes part: it takes minutes to start.")] = True,
    quickstart: Annotated[bool, typer.Option(help="On a GPU: whether the quickstart is timed too.")] = True,
    minutes: Annotated[float, typer.Option(min=0.5, max=10_000, help="On a GPU: stop after so many minutes.")] = 3.8,
    loading: Annotated[bool, typer.Option("--loading", help="Instead: how fast one core reads pictures.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write everything that was measured to this file.")] = None,
    registry: RegistryOption = None,
) -> None:
    """Time the training loop on the networks of each RECIPE (default: ab_wrn), with random images of their size.

    A method that uses only its teacher's logits is trained in several ways. The fastest is then timed with a table of
    teacher logits, and with all methods as one cohort. All ways take turns, so that a busy machine slows all of them
    alike. This takes five to six minutes for each recipe on two CPU cores.

    On a GPU, all ways of every RECIPE start at once (default: ab_wrn, and speed with five methods). Five seeds of the
    method also train at once, whole runs are extrapolated, and what does not fit into --minutes is left out.
    """
    from kdbench.bench.compare import Benchmark, LaneTimer, benchmark, speed_table
    from kdbench.bench.gpu import THREADS, Pair, bench_gpu, result_lines

    if loading:
        return _loading(rounds, json)
    cards = Registry(registry or ())
    plans = measured_plans(recipes, cards, gpu=False)
    if peers:
        _check_peers()

    from kdbench.bench.machine import machine_of
    from kdbench.engine.computing.device import chosen_device

    on = chosen_device(device, tell)
    threads = threads or cores()
    machine, turn = machine_of(on, threads, compiled), seconds or (1.0 if on.type == "cuda" else 2.0)
    print(f"{machine.about['device_name']}, {threads} threads, torch {machine.about['torch']}\n")

    def keep(results: list[Benchmark], times: dict[str, Any]) -> None:
        if json is not None:
            more = {"times": times} if times else {}
            write_json(json, {"machine": machine.about, "results": [one.plain() for one in results], **more})

    if on.type == "cuda":
        pairs = [Pair(planned, _flops(planned)) for planned in measured_plans(recipes, cards, gpu=True)]
        timer = LaneTimer(machine, str(on), THREADS, rounds, turn, tell)
        results, times = bench_gpu(pairs, timer, minutes, peers, quickstart, keep)
    else:
        results, times = [], {}
        for planned in plans:
            tell(f"{planned.title or planned.name}")
            timer = LaneTimer(machine, "cpu", threads, rounds, turn, tell)
            results.append(benchmark(planned, timer, _flops(planned), peers))
            keep(results, times)
    print(f"{speed_table(results)}\n{result_lines(results, times)}")


def _loading(rounds: int, json: Path | None) -> None:
    import torch

    from kdbench.bench.loading import HEIGHT, QUALITY, WIDTH, measured
    from kdbench.engine.finish import machine

    about, found = machine(torch.device("cpu"), 1), measured(rounds, tell)
    if json is not None:
        write_json(json, {"machine": about, **asdict(found)})
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "torchvision"))
    print(f"{about['device_name']}, {versions}; {rounds} rounds of pictures of {WIDTH}×{HEIGHT} pixels,")
    print(f"JPEG of quality {QUALITY}, {found.kilobytes:.0f} kB\n\n{found.table()}")


def measured_plans(recipes: Sequence[str] | None, cards: Registry, gpu: bool) -> list[Plan]:
    """What is measured: these recipes, or where there are none those that stand for all."""
    if recipes:
        return [plan(recipe, cards) for recipe in recipes]
    return [plan("ab_wrn", cards), *([plan("speed", cards, (FIVE_METHODS,))] if gpu else [])]


def _check_peers() -> None:
    if importlib.util.find_spec("torchdistill") is None:
        hint = "pip install 'kdbench[peers]', or leave the peers out: --no-peers"
        raise UserError("the comparison needs torchdistill, which is not installed", "kdbench bench", hint)


def _flops(planned: Plan) -> dict[str, float]:
    from kdbench.bench.compare import cells_of
    from kdbench.bench.machine import flops_of

    return flops_of(cells_of(planned)[0])
