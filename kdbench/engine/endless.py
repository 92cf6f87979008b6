"""A member's longest stage without end: what measures how fast steps are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kdbench.engine.capture import program_of
from kdbench.engine.compute import Computing
from kdbench.engine.member import Member
from kdbench.engine.program import Group


def enter_longest_stage(member: Member) -> Member:
    """Have a member at the first step of the stage in which a run mostly is."""
    spans = member.timeline.spans
    longest = max(range(len(spans)), key=lambda i: spans[i].steps)
    member.step = spans[longest].start
    member.enter(longest)
    return member


def endless(groups: Sequence[Group], computing: Computing) -> Callable[[], None]:
    """A step of all cells, which can be called any number of times: their stages begin anew before they end.

    Raises:
        RuntimeError: a cell failed.
    """
    program = program_of(groups, computing)
    cells = [cell for group in groups for cell in group.cells]
    starts = [cell.member.step for cell in cells]
    most = max(min(cell.member.stage.span.steps for cell in cells) - 1, 1)
    left = 0

    def step() -> None:
        nonlocal left
        if not left:
            for cell, start in zip(cells, starts, strict=True):
                cell.member.step = start
                cell.member.ready(lambda text: None, lambda: False)
            left = program.prepare(cells, most)
        program.step(cells)
        left -= 1
        for failure in (cell.failure for cell in cells if cell.failure):
            raise RuntimeError(failure)

    return step
