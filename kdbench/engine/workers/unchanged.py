"""Whether code is still what a run was planned with: a worker that begins later imports what stands there then."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from kdbench.engine.finish import git_state
from kdbench.engine.workers.messages import Task, TrainCells
from kdbench.engine.workers.versions import CARDS, versions
from kdbench.errors import CellError, UserError
from kdbench.names import is_content
from kdbench.own_code import own_code_sha256
from kdbench.recipe.coded import Coded


class CodeAsPlanned:
    """What a process has imported, or is about to import."""

    def __init__(self) -> None:
        # Asked now, and kept for records: the checkout may change under what is loaded.
        self._versions = versions()
        git_state()
        self._known: set[tuple[str, str]] = set()

    def check(self, task: Task) -> None:
        """See that kdbench and code of the user's own are what the task's run has. What this process took before stays
        loaded, whatever stands in the file by now.

        Raises:
            UserError: they are not. CellError: of cells that are to be trained; others may go on.
        """
        try:
            self._check(task)
        except UserError as error:
            raise CellError(str(error)) if isinstance(task, TrainCells) else error from None

    def _check(self, task: Task) -> None:
        given = task.settings.versions
        if any(given.get(part, found) != found for part, found in self._versions.items() if part != CARDS):
            raise UserError("kdbench was changed after this run had begun", hint="start the command again")
        for target, sha256 in sorted({*_own_code(task)} - self._known):
            if own_code_sha256(target) != sha256:
                what = f"the code of '{target}' was changed after this run had begun"
                hint = "start the command again: cells of the code before count as other ones; or restore the file"
                raise UserError(what, hint=hint)
            self._known.add((target, sha256))


def _own_code(part: Any) -> Iterator[tuple[str, str]]:
    """Targets of the user's own in a task, and the sha256 of their code when it was planned."""
    if isinstance(part, Coded):
        yield from ((target, name.partition("@")[2]) for target, name in part.counts_as.items() if is_content(name))
    if isinstance(part, BaseModel):
        part = [getattr(part, name) for name in type(part).model_fields]
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else ():
        yield from _own_code(inner)
