"""A member's place in the run: its folder, its log, and why it left the cohort, if it did."""

import time
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdbench.engine.computing.compute import REFERENCE
from kdbench.engine.log import MetricsLog
from kdbench.engine.member import Member
from kdbench.engine.ranks import LOST, Apart, is_lost
from kdbench.errors import CellError, SharedChange, UserError, failure
from kdbench.files import ERROR, disk_full


@dataclass(eq=False)
class TrainingCell:
    """A member with what lies on the disk.

    Attributes:
        folder, key, metrics_log: where its files are, what its checkpoint must agree in, and its log. Cells that only
            try something out have none, and leave no file.
        failure: why it cannot go on. recorded: whether its record is written.
    """

    member: Member
    folder: Path = Path()
    key: dict[str, Any] = field(default_factory=dict)
    metrics_log: MetricsLog | None = None
    failure: str | None = None
    recorded: bool = False

    @property
    def active(self) -> bool:
        return self.failure is None and not self.recorded

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Turns an exception of this cell into its failure; the others go on."""
        try:
            yield
        except (SharedChange, Apart):
            raise
        except (CellError, UserError) as error:
            self.failure = str(error)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - one cell's user code must not end the others
            way = self.member.computing
            hint = "" if way == REFERENCE else f"; it was computed in {way.name}: does it run with compute=reference?"
            full = disk_full(error)
            self.failure = str(full) if full else failure(error)
            if self.metrics_log is not None and full is None:
                file = self.folder / ERROR
                # On a full disk there is none, and the others go on all the same.
                with suppress(OSError):
                    file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
                    self.failure += f"; the whole is in {file}{hint}"
            if self.member.batches.ranks.size > 1:
                # The other ranks may wait for this one in the middle of a step.
                raise Apart(LOST if is_lost(error) else self.failure) from None


@contextmanager
def time_of(cells: Collection[TrainingCell]) -> Iterator[None]:
    """The time of the block is training of these cells, an equal share of each."""
    begin = time.perf_counter()
    yield
    for cell in cells:
        cell.member.log.seconds += (time.perf_counter() - begin) / len(cells)
