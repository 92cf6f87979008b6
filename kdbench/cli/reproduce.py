"""`kdbench reproduce`: run every recipe of a study, and publish what comes out."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from kdbench.cli.console import page, plain_table
from kdbench.cli.options import (
    AdoptOption,
    DataOption,
    DeviceOption,
    DownloadOption,
    JobsOption,
    RegistryOption,
    RunsOption,
)
from kdbench.cli.output import print_table
from kdbench.cli.progress import clock
from kdbench.cli.run import carry_out, failure
from kdbench.engine.options import Options
from kdbench.errors import CellError, UserError, counted, did_you_mean
from kdbench.files import RUN
from kdbench.published import PublishedCard
from kdbench.reading import same_name
from kdbench.recipe.loading import find
from kdbench.recipe.planning import Plan, plan
from kdbench.record import read_records, unfinished
from kdbench.registry import Registry
from kdbench.verify import sums
from kdbench.verify.publishing import lost, publish

EXAMPLES = """
kdbench reproduce cifar --cost
kdbench reproduce cifar --profile small
kdbench reproduce transfer --data ~/pictures
"""


def command(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Key of a study card ('kdbench ls studies').")],
    profile: Annotated[str, typer.Option(help="One of the study's profiles.")] = "full",
    cost: Annotated[bool, typer.Option(help="Print the estimated cost and exit.")] = False,
    runs: RunsOption = Path("runs"),
    results: Annotated[Path, typer.Option(help="Folder to publish to.")] = Path("results"),
    jobs: JobsOption = None,
    device: DeviceOption = "auto",
    data: DataOption = None,
    download: DownloadOption = True,
    registry: RegistryOption = None,
    adopt: AdoptOption = True,
) -> None:
    """Run the recipes of STUDY one after the other and publish each to results/ when all its cells are finished.

    Cells that are published there count as finished; those that are missing are computed as these were. With --no-adopt
    all are trained here: give another --results to keep both. It prints the estimated cost first. Repeat the command
    after an interruption: it continues where it stopped. If a cell fails, the other recipes still run; the failed one
    is not published, and the exit code is 1.
    """
    folders = tuple(registry or ())
    adopted = results if adopt else None
    cards = Registry(folders)
    plans = plans_of(study, profile, cards, adopted)
    for planned in plans if not adopt else ():
        if what := lost(results / planned.name, {slug for cell in planned.cells for slug in cell.slugs}):
            raise UserError(what, str(results / planned.name), "they would be lost: give another --results")
    _print_cost(plans, runs, adopted, device, jobs)
    if cost:
        return
    results.mkdir(parents=True, exist_ok=True)  # What is no folder is told before hours of training.
    options = Options(
        runs=runs, jobs=jobs, device=device, data_roots=tuple(data or ()), download=download, registries=folders
    )
    failed = []
    for planned in plans:
        try:
            outcome = carry_out(planned, options, adopted)
            if outcome.failed:
                raise failure(planned, outcome)
            try:
                print(f"published: {publish(outcome.folder, results)}")
            except UserError as error:
                raise CellError(f"it is finished, and not published: {error}") from None
        except CellError as error:
            print(f"failed: {planned.name}: {error}", file=sys.stderr)
            failed.append(planned.name)
    if keys := cards.card("studies", study).published:
        beside = {key: cards.card("published", key) for key in keys}
        _write_together([results / planned.name for planned in plans], beside, results / study)
    if failed:
        raise CellError(
            f"{len(failed)} of {counted(len(plans), 'recipe')}: {', '.join(failed)}; the others are published"
        )


def plans_of(study: str, profile: str, registry: Registry, results: Path | None = None) -> list[Plan]:
    """The plans of a study's recipes, in order. UserError for an unknown study, profile or recipe.

    Args:
        results: folder of published results. A recipe's cells are computed as those that are published there.
    """
    from kdbench.verify.adopting import computed_otherwise

    card = registry.card("studies", study)
    tree = registry.tree("studies", study)
    if profile not in card.profiles:
        what = f"the study '{study}' has no profile '{profile}'"
        raise UserError(what, "--profile", did_you_mean(profile, card.profiles))
    plans = []
    for index, recipe in enumerate(card.profiles[profile]):
        card_file = Path(tree.origin(("profiles", profile, index)).rpartition(":")[0])
        file = find(recipe, card_file.parent)
        planned = plan(file, registry)
        if results is not None and (way := computed_otherwise(planned, results / planned.name)):
            planned = plan(file, registry, tuple(way.split()))
            planned.notes.append(f"{planned.name} is computed as its published cells were: {way}")
        plans.append(planned)
    # The table of the whole study has a folder too.
    names = [planned.name for planned in plans] + [study] * bool(card.published)
    if any(same_name(a, b) for a, b in itertools.combinations(names, 2)):
        raise UserError(
            "two recipes have the same name, and so the same folder", where=tree.origin(("profiles", profile))
        )
    return plans


def _write_together(folders: list[Path], beside: Mapping[str, PublishedCard], out: Path) -> None:
    """Print the table of all published recipes of a study, with other people's numbers, and write it."""
    from kdbench.results.tables import build
    from kdbench.results.writing import write_files

    there = [folder for folder in folders if (folder / RUN).is_file()]
    if there:
        records = read_records(there)
        table = build(records, unfinished=unfinished(there), published=beside)
        print_table(table)
        write_files(table, out, records)
        print(f"written together: {sums.write(out).parent}")


def _print_cost(plans: list[Plan], runs: Path, results: Path | None, device_name: str, jobs: int | None) -> None:
    """Cells, what of them is finished, and an estimate of time, for every recipe and in all."""
    import torch

    from kdbench.engine.computing.estimate import GPU, GPU_RATE, SHORTEST_TOLD, Estimate, workers
    from kdbench.verify.adopting import left_of

    on_gpu = device_name != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.set_num_threads(1)
    estimate = Estimate(device)
    numbers = ("cells", "finished", "teachers first", "then")
    table = plain_table("recipe", *numbers, right=numbers)
    elsewhere, on_other, known_there = Estimate(device, rate=GPU_RATE), 0.0, set[str]()
    total = 0.0
    known: set[str] = set()
    for planned in plans:
        what = left_of(planned, runs, results)
        left = [*what.tried, *what.cells]
        known |= what.teachers
        known_there |= what.teachers
        at_once = workers(device, len(left), jobs)
        teachers, seconds = estimate.teachers(left, runs, known), estimate.cells(left) / at_once
        total += teachers + seconds
        on_other += elsewhere.cells(left) + elsewhere.teachers(left, runs, known_there)
        every = len(what.plan.cells) + len(planned.tried)
        table.add_row(
            planned.name, str(every), str(every - len(left)), clock(teachers) if teachers else "–", clock(seconds)
        )
    console = page()
    console.print(table)
    at_once = workers(device, sum(len(planned.cells) for planned in plans), jobs)
    where = counted(at_once, "GPU" if on_gpu else "one-thread worker")
    console.print(
        f"estimate for what is not finished: {clock(total)} on {where}, from a few timed steps of each network"
    )
    if not on_gpu and on_other >= SHORTEST_TOLD:
        console.print(f"on one {GPU}: at least {clock(on_other)}, at {GPU_RATE:.0e} operations per second")
