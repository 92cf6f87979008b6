"""On PYTHONPATH this makes a worker strike at a moment that the environment names; see `kills`."""

from __future__ import annotations

import importlib.abc
import os
import select
import signal
import sys
import time
from typing import Any


def strike() -> None:
    """Kill or interrupt somebody at the chosen one of such moments."""
    left = int(os.environ["STRIKE_AFTER"])
    os.environ["STRIKE_AFTER"] = str(left - 1)
    if left:
        return
    match os.environ["STRIKE_AT_WHOM"]:
        case "worker":
            os.kill(os.getpid(), signal.SIGKILL)
        case "everybody":
            os.killpg(0, signal.SIGKILL)
        case whom:
            if whom.endswith(" to all"):
                os.killpg(0, getattr(signal, whom.split()[0]))
            elif whom != "nobody":
                os.kill(os.getppid(), {"run": signal.SIGKILL, "interrupt": signal.SIGINT}[whom])
            # Not a step more until the worker can know that its run is leaving: its input has ended.
            ended = select.poll()
            ended.register(0, select.POLLHUP)
            ended.poll()
            time.sleep(1)


def before(owner: Any, name: str, when: Any = lambda *arguments: True) -> None:
    """Strike before a function is called."""
    function = getattr(owner, name)

    def striking(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            strike()
        return function(*arguments, **options)

    setattr(owner, name, striking)


def arm() -> None:
    import torch

    import kdbench.engine.finish
    from kdbench.engine.member import Member

    match os.environ["STRIKE_WHEN"]:
        case "step":
            before(Member, "before_step")
        case "second stage":
            before(Member, "enter", lambda member, stage: stage == 1)
        case "record":
            before(kdbench.engine.finish, "write_json")
        case "half a checkpoint":
            save = torch.save

            def half(state: Any, file: Any) -> None:
                save(state, file)
                if not isinstance(file, str | os.PathLike):
                    return
                os.truncate(file, os.path.getsize(file) // 2)
                strike()
                save(state, file)

            torch.save = half
        case "checkpoint":
            replace = os.replace

            def after(source: Any, target: Any) -> None:
                replace(source, target)
                if str(target).endswith("checkpoint.pt"):
                    strike()

            os.replace = after


class Armed(importlib.abc.MetaPathFinder):
    """Arms when the training loop is imported: in a worker, not in the command that starts it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "kdbench.engine.loop" and self in sys.meta_path:
            sys.meta_path.remove(self)
            arm()


if "STRIKE_WHEN" in os.environ and os.environ.get("STRIKE_RANK", "") in ("", os.environ.get("RANK")):
    sys.meta_path.insert(0, Armed())
