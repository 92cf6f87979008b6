"""How to run, and who is told how it goes. Imports no torch."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from kdbench.engine.scheduling import MOST_THREADS, CellState
from kdbench.errors import UserError, counted, shortened
from kdbench.files import folders_in, home

logger = logging.getLogger("kdbench")

# Between checkpoints: thirty years.
MOST_SECONDS = 1e9


def check_device(device: str) -> str:
    """The name of a device. UserError for what is none."""
    if device not in ("auto", "cpu", "cuda") and not re.fullmatch(r"cuda:\d+", device):
        other = device.partition(":")[0] in ("mps", "xpu", "hpu", "xla", "npu", "rocm", "gpu")
        what = f"kdbench does not compute on '{device}'" if other else f"unknown device '{device}'"
        raise UserError(what, where="--device", hint="known: auto, cpu, cuda, cuda:0, … (Apple's GPU is not used)")
    return device


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster on whose nodes to compute.

    Attributes:
        address: of the cluster ("auto": the one that this machine belongs to; "local": one of this machine alone).
        cpus, gpus: of each worker; None: one core, or one GPU with its share of the cores.
    """

    address: str
    cpus: int | None = None
    gpus: float | None = None


@dataclass(frozen=True)
class Options:
    """How to run: everything that is not in the recipe because it changes no number.

    jobs: worker processes (None: one for each CPU core or GPU). threads: of each worker (None: cores shared out).
    seeds_together: whether a worker trains several seeds of a comparison at once, as memory allows (None: on a GPU).
    ranks: processes that train every cell together, as torchrun started them; sync_batch_norm: whether their batch
        norms take the whole batch.
    cluster: a Ray cluster whose nodes the workers are on; None: this machine.
    """

    runs: Path = Path("runs")
    jobs: int | None = None
    threads: int | None = None
    seeds_together: bool | None = None
    device: str = "auto"
    data_roots: tuple[Path, ...] = ()
    download: bool = True
    registries: tuple[Path, ...] = ()
    checkpoint_seconds: float = 60.0
    ranks: int = 1
    sync_batch_norm: bool = False
    cluster: Cluster | None = None

    def __post_init__(self) -> None:
        check_device(self.device)
        for name, value, most in (("jobs", self.jobs, None), ("threads", self.threads, MOST_THREADS)):
            if value is not None and (type(value) is not int or not 1 <= value <= (most or value)):
                bounds = f"from 1 to {most}" if most else "of at least 1"
                raise UserError(f"'{name}' is {shortened(value)}, and must be a whole number {bounds}", f"--{name}")
        seconds = self.checkpoint_seconds
        if not isinstance(seconds, int | float) or not 0 <= seconds <= MOST_SECONDS:
            what = f"'checkpoint_seconds' is {shortened(seconds)}, and must be a number from 0 to {MOST_SECONDS:g}"
            raise UserError(what, "--checkpoint-seconds", "an interrupted run writes checkpoints in any case")

    def roots(self) -> list[Path]:
        """Folders searched for data, in order."""
        return [*self.data_roots, *folders_in("KDBENCH_DATA"), Path("data"), home() / "data"]


class Listener:
    """Is told what happens. `update` comes after every change; `say` is for what nobody should miss, at any time.

    This one ignores all of it.
    """

    def say(self, text: str) -> None: ...
    def begin(self, cells: list[CellState], title: str) -> None: ...
    def doing(self, text: str) -> None: ...
    def update(self, cell: CellState) -> None: ...
    def end(self) -> None: ...


class Logged(Listener):
    """Tells Python's log, for who calls from Python: warnings, which stand below a notebook's cell unless somebody asks
    for less, and how it goes at the level INFO."""

    def say(self, text: str) -> None:
        logger.warning("%s", text)

    def begin(self, cells: list[CellState], title: str) -> None:
        self.ended = {cell.id for cell in cells if cell.state in ("finished", "failed")}
        logger.info("%s: %s, %d finished before", title, counted(len(cells), "cell"), len(self.ended))

    def doing(self, text: str) -> None:
        logger.info("preparing %s", text)

    def update(self, cell: CellState) -> None:
        if cell.state not in ("finished", "failed") or cell.id in self.ended:
            return
        self.ended.add(cell.id)
        told = f"{cell.accuracy:.2f} %" if cell.state == "finished" else f"failed: {cell.message}"
        logger.info("%s: %s", cell.label, told)
