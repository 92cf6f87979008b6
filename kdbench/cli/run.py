"""`kdbench run`: train what a recipe plans, then print and write its table."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdbench.cli.options import (
    AdoptOption,
    CpusOption,
    DataOption,
    DeviceOption,
    DownloadOption,
    GpusOption,
    JobsOption,
    Overrides,
    RayOption,
    RecipeArgument,
    RegistryOption,
    RunsOption,
    SyncBatchNormOption,
    ThreadsOption,
)
from kdbench.cli.output import prepare, write_tables
from kdbench.cli.progress import listener
from kdbench.engine.options import Cluster, Listener, Options
from kdbench.errors import CellError, UserError, counted
from kdbench.files import failed
from kdbench.recipe.planning import Plan, plan
from kdbench.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kdbench.engine.workers.runner import Outcome
    from kdbench.record import Record

EXAMPLES = """
kdbench run quickstart --no-adopt
kdbench run recipes/ab_wrn.yaml
kdbench run ab_wrn seeds=1 epochs=20 --jobs 1
kdbench run my.yaml method.temperature=2 --registry my_methods
"""


def command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    runs: RunsOption = Path("runs"),
    jobs: JobsOption = None,
    threads: ThreadsOption = None,
    seeds_together: Annotated[
        bool | None, typer.Option(help="Whether a worker trains several seeds at once (default: only on a GPU).")
    ] = None,
    device: DeviceOption = "auto",
    data: DataOption = None,
    download: DownloadOption = True,
    registry: RegistryOption = None,
    sync_batch_norm: SyncBatchNormOption = False,
    ray: RayOption = None,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    checkpoint_seconds: Annotated[float, typer.Option(min=0, help="Time between checkpoints.")] = 60.0,
    results: Annotated[Path, typer.Option(help="Folder of published results.")] = Path("results"),
    adopt: AdoptOption = True,
) -> None:
    """Train every cell of RECIPE that is not finished yet, then print and write the table.

    RECIPE is a file or the name of a shipped recipe ('kdbench ls recipes'). Further words KEY.PATH=VALUE override it.
    Repeat the command after an interruption: it continues where it stopped. Finished cells are not trained again.
    Cells that 'kdbench publish' has put into results/<recipe> count as finished, so you can add seeds to a published
    table.
    """
    folders = tuple(registry or ())
    rank, ranks = started_by_torchrun(sync_batch_norm, ray)
    if rank > 0:
        from kdbench.engine.workers.follower import follow
        from kdbench.engine.workers.messages import Settings

        return follow(folders, Settings(ranks=ranks, sync_batch_norm=sync_batch_norm), device)
    planned = plan(recipe, Registry(folders), tuple(overrides or ()))
    options = Options(
        runs=runs,
        jobs=jobs,
        threads=threads,
        seeds_together=seeds_together,
        device=device,
        data_roots=tuple(data or ()),
        download=download,
        registries=folders,
        checkpoint_seconds=checkpoint_seconds,
        ranks=ranks,
        sync_batch_norm=sync_batch_norm,
        cluster=None if ray is None else Cluster(ray, cpus_per_worker, gpus_per_worker),
    )
    outcome = carry_out(planned, options, results if adopt else None)
    if outcome.failed:
        raise failure(planned, outcome)


def started_by_torchrun(sync_batch_norm: bool, ray: str | None) -> tuple[int, int]:
    """Rank of this process, and how many ranks there are: 0 and 1 for a run of its own. UserError for variables that
    torchrun does not set so, and for options that do not belong to such a run."""
    rank, ranks = 0, 1
    if os.environ.keys() & {"RANK", "WORLD_SIZE"}:
        if absent := [name for name in _OF_TORCHRUN if not os.environ.get(name)]:
            are = "is" if len(absent) == 1 else "are"
            what = f"{' and '.join(absent)} {are} not set, but other variables of ranks are"
            hint = "start it by torchrun, which sets all of them, or unset RANK and WORLD_SIZE for a run of its own"
            raise UserError(what, "environment", hint)
        ranks = _variable("WORLD_SIZE", 1, 1 << 20)
        rank = _variable("RANK", 0, ranks - 1)
        _variable("MASTER_PORT", 1, 65535)
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            if name in os.environ:
                _variable(name, 0, ranks)
    if ranks > 1 and ray is not None:
        raise UserError("torchrun and Ray cannot be combined", where="--ray", hint="leave one of them out")
    if ranks == 1 and sync_batch_norm:
        raise UserError(
            "there are no other ranks", where="--sync-batch-norm", hint="start it by torchrun --nproc-per-node N"
        )
    if ranks > 1:
        # DistributedDataParallel would remark at every stage that all parameters are used.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return rank, ranks


_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _variable(name: str, least: int, most: int) -> int:
    """A whole number from the environment. UserError for anything else, or outside the bounds."""
    text = os.environ[name]
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not least <= int(text) <= most:
        hint = "start it by torchrun, which sets it, or unset RANK and WORLD_SIZE for a run of its own"
        raise UserError(f"{name} is '{text}', and must be a whole number from {least} to {most}", "environment", hint)
    return int(text)


def carry_out(planned: Plan, options: Options, results: Path | None = None) -> Outcome:
    """Run a plan before the user's eyes, then print and write the table of what is finished.

    Args:
        results: folder of published results, whose cells of this plan count as finished.

    Raises:
        KeyboardInterrupt: after all cells were checkpointed.
    """
    from kdbench.engine.workers.finished import OtherTrials
    from kdbench.verify.adopting import tried

    shown = listener()
    for remark in planned.remarks:
        shown.say(f"note: {remark}")
    trials = tried(planned, results / planned.name) if results is not None else {}
    try:
        outcome = _outcome(planned, options, shown, results, trials)
    except OtherTrials as error:
        shown.say(f"accuracies of published trials are not taken: {error}")
        # Teachers among them are taken all the same, if they fit.
        trials = {name: record for name, record in trials.items() if record.cell.tuning is None}
        outcome = _outcome(planned, options, shown, results, trials)
    if outcome.finished:
        write_tables(outcome.finished, outcome.folder, [state.cell.slug for state in outcome.failed])
    return outcome


def _outcome(
    planned: Plan, options: Options, shown: Listener, results: Path | None, trials: Mapping[str, Record]
) -> Outcome:
    """Choose the settings of a plan that tunes, then run it."""
    from kdbench.engine.workers.runner import run as run_plan
    from kdbench.engine.workers.tuning import tuned
    from kdbench.verify.adopting import computed_otherwise, published

    before = (results or Path()) / planned.name
    planned = tuned(planned, options, shown, trials)
    found = published(planned, before) if results is not None else {}
    if results is not None and not found and (way := computed_otherwise(planned, before)):
        shown.say(f"note: the cells of {before} count as finished only if they are computed as they were there: {way}")
    prepare()
    tunings = [record for record in trials.values() if record.cell.tuning is not None]
    return run_plan(planned, options, shown, before, found, tunings)


def failure(planned: Plan, outcome: Outcome) -> UserError | CellError:
    """What is said of a run in which cells failed."""
    lines = "\n".join(f"  {state.label}: {state.message}" for state in outcome.failed)
    what = f"{len(outcome.failed)} of {counted(len(planned.cells), 'cell')} failed, finished: {len(outcome.finished)}"
    return failed(f"{what}\n{lines}", [state.message for state in outcome.failed])
