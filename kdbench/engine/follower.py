"""A rank that is not the first: does what rank 0's worker is told to do."""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from kdbench.engine.distributed import join, receive
from kdbench.engine.messages import Settings
from kdbench.engine.tasks import TaskRunner
from kdbench.errors import CellError, UserError


def follow(paths: tuple[Path, ...], settings: Settings) -> None:
    """Train with rank 0 until there is nothing more to do."""
    sys.path.extend(str(path.resolve()) for path in paths)
    stopping = threading.Event()

    def stop(*_: Any) -> None:
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    ranks = join(settings)
    # What there is to tell, rank 0 tells.
    runner = TaskRunner(lambda event: None, stopping.is_set, ranks)
    while True:
        with tempfile.TemporaryDirectory(prefix="kdbench-rank-") as scratch:
            task = receive(ranks, Path(scratch))
            if task is None:
                return
            # What is wrong with a task is wrong on all ranks.
            with suppress(CellError, UserError):
                runner.run(task)
