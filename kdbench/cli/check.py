"""`kdbench check`: resolve a recipe and print its plan, without training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdbench.cli.options import Overrides, RecipeArgument, RegistryOption
from kdbench.cli.progress import clock

if TYPE_CHECKING:
    from kdbench.recipe.planning import PlannedCell
    from kdbench.recipe.schema import DataSpec, ModelSpec

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
    from kdbench.engine.runner import is_finished
    from kdbench.recipe.planning import plan
    from kdbench.registry import Registry

    planned = plan(recipe, Registry(registry or ()), tuple(overrides or ()))

    import torch

    from kdbench.engine.dry import measure, try_out
    from kdbench.engine.timeline import planned_timeline

    console = page()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    tried = set()
    for cell in planned.cells:
        key = cell.spec.model_copy(update={"seed": 0}).identity()
        if key not in tried:
            tried.add(key)
            try_out(cell.spec)

    models: dict[tuple[str, str, str], tuple[ModelSpec, DataSpec]] = {}
    for cell in planned.cells:
        teacher = cell.spec.teacher
        for role, model in (("student", cell.spec.student), ("teacher", teacher.model if teacher else None)):
            if model is not None:
                models.setdefault((role, model.name, str(model.options)), (model, cell.spec.data))
    sizes = {key: measure(model, data, time, device) for key, (model, data) in models.items()}

    networks = Table("network", "role", "parameters", "MFLOPs an image", box=None, header_style="bold")
    for column in networks.columns[2:]:
        column.justify = "right"
    for (role, name, _), size in sizes.items():
        networks.add_row(name, role, f"{size.parameters:,}", f"{size.flops / 1e6:.1f}")

    def seconds(cell: PlannedCell) -> float:
        spec, line = cell.spec, planned_timeline(cell.spec)
        images = line.total * min(spec.protocol.batch_size, spec.data.train)
        total = images * sizes[("student", spec.student.name, str(spec.student.options))].training
        if spec.teacher is not None:
            model = spec.teacher.model
            total += images * sizes[("teacher", model.name, str(model.options))].forward
        evaluation = len(line.evaluations) * spec.data.test
        return total + evaluation * sizes[("student", spec.student.name, str(spec.student.options))].forward

    rows = Table("cell", "stages (steps)", "epochs", "seeds", box=None, header_style="bold")
    if time:
        rows.add_column("time a seed", justify="right")
    rows.add_column("finished", justify="right")
    whole = 0.0
    orders: dict[int, list[PlannedCell]] = {}
    for cell in planned.cells:
        orders.setdefault(cell.order, []).append(cell)
    for cells in orders.values():
        cell, line = cells[0], planned_timeline(cells[0].spec)
        stages = " + ".join(f"{span.name} {span.steps}" for span in line.spans)
        others = [f"{path} {value}" for path, value in cell.axes.items() if not path.startswith("method")]
        done = sum(is_finished(runs / planned.name / c.slug) for c in cells)
        row = [", ".join([cell.spec.method.label, *others]), stages, f"{line.epochs(line.total):.4g}", str(len(cells))]
        if time:
            row.append(clock(seconds(cell)))
            whole += seconds(cell) * (len(cells) - done)
        rows.add_row(*row, f"{done}/{len(cells)}")

    terms = Table("method", "stage", "loss", "student", "teacher", "connector", "weight", box=None, header_style="bold")
    for method in {cell.spec.method.label: cell.spec.method for cell in planned.cells}.values():
        for stage_name, stage in method.stages.items():
            for term_name, term in stage.losses.items():
                reads = term.loss.inputs
                terms.add_row(
                    method.label,
                    stage_name,
                    f"{term_name} ({term.loss.name})",
                    term.student if "student" in reads else "–",
                    term.teacher if "teacher" in reads else "–",
                    term.connector.name if term.connector else "–",
                    f"{term.weight:g}",
                )

    first = planned.cells[0].spec
    fixed = first.compute.fixed()
    computed = ", ".join(str(value) for value in fixed.values()) if len(fixed) == 3 else "as a short trial will choose"
    console.print(f"[bold]{planned.title or planned.name}[/bold]: {len(planned.cells)} cells")
    console.print(
        f"data {first.data.name}, protocol {first.protocol.name}, batch {first.protocol.batch_size}, "
        f"computed {computed}, baseline {planned.baseline}"
    )
    for teacher in {c.spec.teacher.name: c.spec.teacher for c in planned.cells if c.spec.teacher}.values():
        origin = "trained from its own recipe first" if teacher.trained_by else f"weights {teacher.weights.file}"  # type: ignore[union-attr]
        console.print(f"teacher {teacher.name}: {origin}")
    console.print(networks)
    console.print(terms)
    console.print(rows)
    if time:
        workers = min(cores, len(planned.cells)) if device.type == "cpu" else max(torch.cuda.device_count(), 1)
        where = f"{workers} one-thread workers" if device.type == "cpu" else f"{workers} GPU(s)"
        console.print(
            f"estimate for what is not finished: {clock(whole / workers)} on {where} "
            "(teacher passes counted for each cell; cells that share them take less)"
        )
