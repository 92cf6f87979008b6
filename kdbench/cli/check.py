"""`kdbench check`: the plan of a recipe, without training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from kdbench.cli.console import page, plain_table, show
from kdbench.cli.options import (
    AdoptOption,
    DataOption,
    DeviceOption,
    JobsOption,
    Overrides,
    RecipeArgument,
    RegistryOption,
    ThreadsOption,
)
from kdbench.cli.progress import clock, continuing
from kdbench.engine.computing.compute import Memory, plainest
from kdbench.engine.folders import cell_states
from kdbench.engine.scheduling import kind
from kdbench.errors import UserError, counted
from kdbench.recipe.method_specs import MethodSpec
from kdbench.recipe.planning import Plan, PlannedCell, cell_name, plan
from kdbench.recipe.specs import CellSpec
from kdbench.recipe.timeline import planned_timeline
from kdbench.registry import Registry
from kdbench.tree import text

if TYPE_CHECKING:
    import torch

    from kdbench.engine.computing.estimate import Estimate
    from kdbench.verify.adopting import Left

EXAMPLES = """
kdbench check ab_wrn
kdbench check my.yaml epochs=10 --jobs 1
kdbench check ab_wrn --no-time
"""


def command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    registry: RegistryOption = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs, to count finished cells.")] = Path("runs"),
    results: Annotated[Path, typer.Option(help="Folder of published results, to count theirs.")] = Path("results"),
    adopt: AdoptOption = True,
    jobs: JobsOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    data: DataOption = None,
    time: Annotated[bool, typer.Option(help="Time a few steps of each network to estimate the whole.")] = True,
) -> None:
    """Check RECIPE without training: build its networks, then print cells, stages, sizes and an estimate of time.

    Options mean what they mean for 'kdbench run'. No data are read.
    """
    asked = plan(recipe, Registry(registry or ()), tuple(overrides or ()))

    import torch

    from kdbench.engine.checks.cells import Known, check_cell
    from kdbench.engine.computing.device import chosen_device
    from kdbench.engine.computing.estimate import Estimate, threads_of, workers
    from kdbench.engine.computing.memory import memory_of
    from kdbench.engine.networks.build import weight_notes
    from kdbench.verify.adopting import left_of

    console = page()
    chosen = chosen_device(device, lambda text: console.print(text, style="yellow"))
    left = left_of(asked, runs, results if adopt else None)
    planned = left.plan
    torch.set_num_threads(threads_of(workers(chosen, max(len(left.cells), len(left.tried)), jobs), threads))
    # Before what takes seconds with large networks.
    _print_heading(console, planned, chosen)
    known: Known = {}
    try:
        distinct = _distinct(cell.spec for cell in planned.cells)
        taken, said = {}, dict[str, None]()
        for name, spec in distinct.items():
            built = check_cell(spec, known)
            taken[name] = memory_of(spec, chosen, built)
            said |= {f"{spec.method.label}: module '{one}': {text(facts)}": None for one, facts in built.said.items()}
    except UserError as error:
        raise planned.placed(error) from None
    estimate = Estimate(chosen, time)
    networks, cells = _networks(planned, estimate), _cells(planned, left.cells, estimate if time else None)
    files = {f"{spec.student} {spec.teacher}": spec for spec in distinct.values()}
    notes = dict.fromkeys(note for spec in files.values() for note in weight_notes(spec))
    for remark in [*planned.remarks, *notes]:
        console.print(f"note: {remark}", style="yellow")
    _print_routes(console, planned, estimate)
    methods = {cell.spec.method.label: cell.spec.method for cell in planned.cells}
    for table in (networks, _terms(methods.values()), cells):
        show(console, table)
    for line in said:
        console.print(line)
    _print_done(console, left, runs, results)
    _print_needs(console, planned, left, runs, estimate, taken, time, jobs)


def _distinct(specs: Iterable[CellSpec]) -> dict[str, CellSpec]:
    """One spec of each `kind`."""
    found: dict[str, CellSpec] = {}
    for spec in specs:
        found.setdefault(kind(spec), spec)
    return found


def _lineage(spec: CellSpec | None) -> Iterable[CellSpec]:
    """A cell, those that train its teachers, and so on."""
    if spec is not None:
        yield spec
        for teacher in spec.teachers:
            yield from _lineage(teacher.trained_by)


def _print_routes(console: Console, planned: Plan, estimate: Estimate) -> None:
    routes = _distinct(spec for cell in planned.cells for spec in _lineage(cell.spec) if spec.route is not None)
    for keeper in routes.values():
        kept = keeper.route or 0
        size = kept * 4 * estimate.size(*keeper.networks["student"]).parameters / 1e6
        are = "checkpoint of {} is" if kept == 1 else "checkpoints of {} are"
        console.print(f"route: {kept} {are.format(keeper.student.name)} kept, {size:.0f} MB for each training")


def _networks(planned: Plan, estimate: Estimate) -> Table:
    sizes = ("parameters", "MFLOPs an image")
    table = plain_table("network", "role", *sizes, right=sizes)
    rows: dict[tuple[str, ...], None] = {}
    for spec in (cell.spec for cell in planned.cells):
        for role, (model, data) in spec.networks.items():
            size = estimate.size(model, data)
            rows[model.name, role, f"{size.parameters:,}", f"{size.flops / 1e6:.1f}"] = None
    for row in rows:
        table.add_row(*row)
    return table


def _cells(planned: Plan, left: list[PlannedCell], estimate: Estimate | None) -> Table:
    timed = ["time a seed"] if estimate is not None else []
    table = plain_table("cell", "stages (steps)", "epochs", "seeds", *timed, "finished", right=(*timed, "finished"))
    unfinished = {id(cell) for cell in left}
    orders: dict[int, list[PlannedCell]] = {}
    for cell in planned.cells:
        orders.setdefault(cell.order, []).append(cell)
    for cells in orders.values():
        spec, line = cells[0].spec, planned_timeline(cells[0].spec)
        table.add_row(
            cell_name(spec.method.label, cells[0].axes),
            " + ".join(f"{span.name} {span.steps}" for span in line.spans),
            f"{line.epochs(line.total):.4g}",
            str(len(cells)),
            *([clock(estimate.cell(spec) + estimate.passes(spec))] if estimate is not None else []),
            f"{sum(id(cell) not in unfinished for cell in cells)}/{len(cells)}",
        )
    return table


def _terms(methods: Iterable[MethodSpec]) -> Table:
    table = plain_table("method", "stage", "loss", "student", "teacher", "connector", "weight")
    for method in methods:
        sources = {stage: f" ({source.name})" for stage, source in method.sources.items()}
        for stage, name, term in method.named_terms:
            reads = {*term.loss.inputs}
            # Where a term does not read the data set's own batch, its hook points say what.
            at = "" if term.input == "data" else f" of {term.input}"
            student, teacher = (", ".join(term.points(network)) for network in ("student", "teacher"))
            own = f"{student}{at}" + (f", of {term.against}" if term.against else "")
            table.add_row(
                method.label,
                stage + sources.get(stage, ""),
                f"{name} ({term.loss.name})",
                own if term.of == "student" and {"student", "other"} & reads else "–",
                own if term.of == "teacher" else f"{teacher}{at}" if "teacher" in reads else "–",
                term.connector.name if term.connector else term.through or "–",
                f"{term.weight:g}",
            )
    return table


def _print_heading(console: Console, planned: Plan, device: torch.device) -> None:
    from kdbench.engine.computing.choosing import possible

    first = planned.cells[0].spec
    domains = " → ".join(part.name for part in first.domains)
    computed = possible(plainest(first.compute), device).name if first.compute.settled else "chosen by a short trial"
    console.print(planned.title or planned.name, style="bold", end="")
    console.print(f": {counted(len(planned.cells), 'cell')}")
    console.print(
        f"data: {domains}, protocol: {first.protocol.name}, batch size: {first.protocol.batch_size}, "
        f"compute: {computed}, baseline: {planned.baseline}"
    )
    for teacher in {one.identity(): one for cell in planned.cells for one in cell.spec.teachers}.values():
        weights = f"weights {teacher.weights.file}" if teacher.weights else "trained from its own recipe"
        weights = "untrained, it trains along with the student" if teacher.untrained else weights
        console.print(f"teacher {teacher.name}: {weights}")


def _print_done(console: Console, left: Left, runs: Path, results: Path) -> None:
    """Which cells are finished, and which are begun."""
    planned = left.plan
    if done := len(planned.cells) - len(left.cells):
        also = f", {left.taken} of them published in {results / planned.name}" if left.taken else ""
        console.print(f"finished: {done} of {counted(len(planned.cells), 'cell')}{also}")
    if resumed := continuing(cell_states(runs / planned.name, left.cells)):
        console.print(f"{resumed}; times here are from the start")


def _print_needs(
    console: Console,
    planned: Plan,
    left: Left,
    runs: Path,
    estimate: Estimate,
    taken: dict[str, Memory],
    time: bool,
    jobs: int | None,
) -> None:
    """What the cells that are not finished need of memory and time.

    Args:
        left: what is not finished.
        taken: what each kind of cell takes of memory.
    """
    import torch

    from kdbench.engine.computing.device import available_memory
    from kdbench.engine.computing.estimate import GPU, GPU_RATE, SHORTEST_TOLD, Estimate, memory, workers

    device, cells = estimate.device, left.cells
    at_once = workers(device, len(cells), jobs)
    if cells:
        free = available_memory() if device.type == "cpu" else torch.cuda.mem_get_info()[0]
        here = f" ({free / 1e9:.1f} GB are free)" if free is not None else ""
        most = memory(cells, taken, at_once, device) / 1e9
        console.print(
            f"memory: up to {most:.1f} GB for each of {counted(at_once, 'worker')}{here}; "
            "cohorts that do not fit are split"
        )
    if left.tried:
        seconds = f": {clock(estimate.cells(left.tried) / workers(device, len(left.tried), jobs))}" if time else ""
        console.print(
            f"first, settings of {counted(len(planned.candidates), 'method')} are tried, tested on images of the "
            f"training set: {counted(len(left.tried), 'cell')}{seconds}"
        )
    if not time:
        return
    of_cpu = f"{counted(at_once, 'worker')} of {counted(torch.get_num_threads(), 'thread')}"
    where = of_cpu if device.type == "cpu" else counted(at_once, "GPU")
    console.print(
        f"estimated time for all unfinished cells: {clock(estimate.cells(cells) / at_once)} on {where} "
        "(cells that train side by side share their teacher's passes)"
    )
    if device.type == "cpu" and cells:
        elsewhere = Estimate(device, rate=GPU_RATE)
        total = elsewhere.cells([*cells, *left.tried]) + elsewhere.teachers(cells, runs, {*left.teachers})
        if total >= SHORTEST_TOLD:
            console.print(f"everything on one {GPU}: at least {clock(total)}, at {GPU_RATE:.0e} operations per second")
    if any(estimate.costs(cell.spec) for cell in cells):
        console.print("this counts batch sources at their slowest: an attack that succeeds early takes less time")
    if first_teachers := estimate.teachers(cells, runs, {*left.teachers}):
        console.print(f"before that, teachers are trained: {clock(first_teachers)} on one worker")
    if prepared := estimate.prepared(cells):
        console.print(
            f"and batch sources are prepared: {clock(prepared)} on one worker, less if a part is there already"
        )
