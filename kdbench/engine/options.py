"""How to run, and who is told how it goes. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from kdbench.engine.ray_pool import Cluster
from kdbench.engine.scheduling import CellState
from kdbench.files import folders_in, home


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
