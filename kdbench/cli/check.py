"""`kdbench check`: resolve a recipe and print its plan, without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdbench.cli.options import Overrides, RecipeArgument, RegistryOption
from kdbench.cli.progress import clock

if TYPE_CHECKING:
    from kdbench.recipe.planning import PlannedCell
    from kdbench.recipe.specs import CellSpec

EXAMPLES = "Examples:  kdbench check ab_wrn   ·   kdbench check my.yaml epochs=10   ·   kdbench check ab_wrn --no-time"


def command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    registry: RegistryOption = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs, to tell what is finished.")] = Path("runs"),
    time: Annotated[bool, typer.Option(help="Time a few steps of each network for an estimate.")] = True,
) -> None:
    """Resolve RECIPE, build its networks once, and print cells, stages, sizes and an estimate of time."""
    from rich.table import Table

    from kdbench.cli.console import console as page
    from kdbench.recipe.planning import plan
    from kdbench.recipe.remarks import remarks
    from kdbench.registry import Registry

    planned = plan(recipe, Registry(registry or ()), tuple(overrides or ()))

    import torch

    from kdbench.engine.build import choices_of
    from kdbench.engine.compute import plainest
    from kdbench.engine.dry import check_cell
    from kdbench.engine.estimate import Estimate, memory, workers
    from kdbench.engine.pool import available_memory
    from kdbench.recipe.timeline import planned_timeline
    from kdbench.record import finished_record

    console = page()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    tried = set()
    for cell in planned.cells:
        key = cell.spec.model_copy(update={"seed": 0}).identity()
        if key not in tried:
            tried.add(key)
            check_cell(cell.spec)

    estimate = Estimate(device, time)
    networks = Table("network", "role", "parameters", "MFLOPs an image", box=None, header_style="bold")
    for column in networks.columns[2:]:
        column.justify = "right"
    listed = set()
    for cell in planned.cells:
        teacher = cell.spec.teacher
        roles = [("student", cell.spec.student, cell.spec.data)]
        if teacher is not None:
            roles.append(("teacher", teacher.model, teacher.knows(cell.spec.data)))
        for role, model, data in roles:
            network = (role, model.name, str(model.options))
            if network not in listed:
                listed.add(network)
                size = estimate.size(model, data)
                networks.add_row(model.name, role, f"{size.parameters:,}", f"{size.flops / 1e6:.1f}")

    rows = Table("cell", "stages (steps)", "epochs", "seeds", box=None, header_style="bold")
    if time:
        rows.add_column("time a seed", justify="right")
    rows.add_column("finished", justify="right")
    orders: dict[int, list[PlannedCell]] = {}
    for cell in planned.cells:
        orders.setdefault(cell.order, []).append(cell)
    for cells in orders.values():
        cell, line = cells[0], planned_timeline(cells[0].spec)
        stages = " + ".join(f"{span.name} {span.steps}" for span in line.spans)
        others = [f"{path} {value}" for path, value in cell.axes.items() if not path.startswith("method")]
        done = sum(finished_record(runs / planned.name / c.slug) is not None for c in cells)
        row = [", ".join([cell.spec.method.label, *others]), stages, f"{line.epochs(line.total):.4g}", str(len(cells))]
        if time:
            row.append(clock(estimate.cell(cell.spec) + estimate.passes(cell.spec)))
        rows.add_row(*row, f"{done}/{len(cells)}")

    terms = Table("method", "stage", "loss", "student", "teacher", "connector", "weight", box=None, header_style="bold")
    for method in {cell.spec.method.label: cell.spec.method for cell in planned.cells}.values():
        for stage_name, stage in method.stages.items():
            for term_name, term in stage.losses.items():
                reads = term.loss.inputs
                # Where a term does not read the data set's own batch, its hook points say what.
                at = "" if term.input == "data" else f" of {term.input}"
                own = f"{term.student}{at}" + (f", of {term.against}" if term.against else "")
                terms.add_row(
                    method.label,
                    stage_name,
                    f"{term_name} ({term.loss.name})",
                    own if term.of == "student" and {"student", "other"} & {*reads} else "–",
                    own if term.of == "teacher" else f"{term.teacher}{at}" if "teacher" in reads else "–",
                    term.connector.name if term.connector else "–",
                    f"{term.weight:g}",
                )

    first = planned.cells[0].spec
    domains = " → ".join(part.name for part in (first.data, first.target) if part is not None)
    computed = plainest(first.compute).name if first.compute.settled else "as a short trial will choose"
    console.print(f"[bold]{planned.title or planned.name}[/bold]: {len(planned.cells)} cells")
    console.print(
        f"data {domains}, protocol {first.protocol.name}, batch {first.protocol.batch_size}, "
        f"computed {computed}, baseline {planned.baseline}"
    )
    for teacher in {c.spec.teacher.identity(): c.spec.teacher for c in planned.cells if c.spec.teacher}.values():
        origin = "trained from its own recipe first" if teacher.trained_by else f"weights {teacher.weights.file}"  # type: ignore[union-attr]
        console.print(f"teacher {teacher.name}: {origin}")
    choices = dict.fromkeys(choice for cell in planned.cells for choice in choices_of(cell.spec))
    for remark in [*remarks(cell.spec for cell in planned.cells), *choices]:
        console.print(f"note: {remark}", style="yellow", markup=False)
    for keeper in _keepers(planned.cells):
        kept = keeper.route or 0
        each = 4 * estimate.size(keeper.student, keeper.data).parameters
        console.print(
            f"route: {kept} checkpoints of {keeper.student.name} are kept, {kept * each / 1e6:.0f} MB for each training"
        )
    console.print(networks)
    console.print(terms)
    console.print(rows)
    left = [cell for cell in planned.cells if finished_record(runs / planned.name / cell.slug) is None]
    at_once = workers(device, len(left))
    if left:
        free = available_memory() if device.type == "cpu" else torch.cuda.mem_get_info()[0]
        here = f", of {free / 1e9:.1f} GB that are free here" if free is not None else ""
        most = memory(left, at_once, device)
        console.print(
            f"memory: up to {most / 1e9:.1f} GB for each of {at_once} workers{here}; what does not fit is split"
        )
    if time:
        where = f"{at_once} one-thread workers" if device.type == "cpu" else f"{at_once} GPU(s)"
        console.print(
            f"estimate for what is not finished: {clock(estimate.cells(left) / at_once)} on {where} "
            "(cells that train side by side share their teacher's passes)"
        )
        if any(estimate.costs(cell.spec) for cell in left):
            console.print("what batch sources do is counted at its most: an attack that arrives early takes less")
        if first_teachers := estimate.teachers(left, runs, set()):
            console.print(f"before that, teachers are trained: {clock(first_teachers)} on one of them")
        if prepared := estimate.prepared(left):
            console.print(f"and batch sources prepare: {clock(prepared)} on one of them, less what is there already")


def _keepers(cells: list[PlannedCell]) -> list[CellSpec]:
    """One of each kind of cell that leaves a route: of these, and of the trainings of their teachers."""
    found: dict[str, CellSpec] = {}
    for cell in cells:
        spec: CellSpec | None = cell.spec
        while spec is not None:
            if spec.route is not None:
                found.setdefault(spec.model_copy(update={"seed": 0}).identity(), spec)
            spec = spec.teacher.trained_by if spec.teacher is not None else None
    return list(found.values())
