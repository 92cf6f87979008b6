"""A worker process: tasks come in as lines, events go out as lines.

Started by the runner as `python -m kdbench.engine.workers.worker`. When its input ends (the runner is gone, however it
went) it writes its checkpoints and leaves; so no orphan goes on computing beside a resumed run.
"""

import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import IO

from kdbench.engine.workers.messages import Done, Event, Failed, Gone, Ready, Task, read_line
from kdbench.engine.workers.pool import ENDS, LEAVE_SECONDS
from kdbench.errors import CellError, UserError, failure
from kdbench.files import refused


class Worker:
    """Takes tasks from one stream and sends events to another, until the tasks end."""

    def __init__(self, tasks: IO[str], events: IO[str]) -> None:
        self.tasks, self.events = tasks, events
        # Whether a stop has to wait for what the present task saves.
        self.stopping, self.saves = threading.Event(), False
        self.queue: queue.Queue[Task | None] = queue.Queue()

    def emit(self, event: Event) -> None:
        try:
            self.events.write(event.line())
            self.events.flush()
        except BrokenPipeError:
            # The runner is gone; what matters now is the checkpoint.
            self.stopping.set()

    def serve(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()
        import torch

        from kdbench.engine.computing.device import gpus, unusable_gpu
        from kdbench.engine.workers.tasks import TaskRunner

        free = [torch.cuda.mem_get_info(i)[0] for i in range(gpus())]
        self.emit(Ready(cuda=free, unusable=unusable_gpu()))
        runner = TaskRunner(self.emit, self.stopping.is_set)
        while (task := self.queue.get()) is not None:
            # Other ranks wait for this one in the middle of a task.
            self.saves = task.saves or task.settings.ranks > 1
            self.emit(self.outcome(partial(runner.run, task)))
        runner.close()

    def outcome(self, work: Callable[[], None]) -> Event:
        """What to tell of a task after it was done, well or not."""
        from kdbench.engine.ranks import Apart

        try:
            work()
            return Done()
        except UserError as error:
            return Failed(message=error.what, by_user=True, where=error.where, hint=error.hint)
        except CellError as error:
            return Failed(message=str(error))
        except Apart as error:
            # Of several ranks: this one cannot go on alone.
            self.emit(Gone(code=1, why=str(error)))
            os._exit(1)
        except (SystemExit, KeyboardInterrupt) as error:
            # No signal does this here: a user's code does.
            return Failed(message=failure(error), by_user=True)
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the runner must hear of it
            if found := refused(error):
                return Failed(message=found.what, by_user=True, where=found.where, hint=found.hint)
            return Failed(message=f"{type(error).__name__}: {error}", trace=traceback.format_exc())

    def _listen(self) -> None:
        try:
            for line in self.tasks:
                self.queue.put(read_line(Task, line))
        except ValueError as error:
            # The run and its worker are of two versions, as when the package was changed under a run.
            self.emit(Failed(message=f"the worker does not understand its run: {error}; start the command again"))
        self.stopping.set()
        if not self.saves:
            # What is being imported, built or measured need not be waited for.
            os._exit(0)
        self.queue.put(None)
        time.sleep(LEAVE_SECONDS)
        os._exit(1)


def main() -> None:
    # Ctrl-C, a scheduler's SIGTERM and a closed terminal's SIGHUP reach the whole process group; the runner ends its
    # workers by closing their input.
    for number in ENDS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
    # Whatever a library prints must not end up between the events.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.path.extend(sys.argv[1:])
    Worker(sys.stdin, events).serve()
    sys.stdout.flush()
    # Python would take a second to take torch apart.
    os._exit(0)


if __name__ == "__main__":
    main()
