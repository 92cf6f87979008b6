"""A rank that is not the first: does what rank 0's worker is told to do."""

import signal
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from kdbench.engine.ranks import LOST
from kdbench.engine.workers.distributed import device_here, join, receive
from kdbench.engine.workers.messages import Settings
from kdbench.engine.workers.pool import ENDS
from kdbench.engine.workers.tasks import TaskRunner
from kdbench.errors import CellError, UserError


def follow(paths: tuple[Path, ...], settings: Settings, device: str) -> None:
    """Train with rank 0 until there is nothing more to do.

    Args:
        device: that its run was given, as a user says it.
    """
    sys.path.extend(str(path.resolve()) for path in paths)
    stopping = threading.Event()

    def stop(*_: Any) -> None:
        stopping.set()

    # Who waits for ranks that do not come has nothing to save, and answers no signal but by its end.
    for number in ENDS:
        signal.signal(number, signal.SIG_DFL)
    ranks = join(settings, device_here(device))
    for number in ENDS:
        signal.signal(number, stop)
    # What there is to tell, rank 0 tells.
    runner = TaskRunner(lambda event: None, stopping.is_set, ranks)
    while True:
        with tempfile.TemporaryDirectory(prefix="kdbench-rank-") as scratch:
            task = receive(ranks, Path(scratch))
            if task is None:
                return
            # What is wrong with a task is wrong on all ranks.
            with suppress(CellError, UserError):
                try:
                    runner.run(task)
                except SystemExit as error:
                    sys.exit(1 if str(error) == LOST else f"rank {ranks.rank}: {error}")
