"""What was tuned before a table was made: notes below it, and every setting that was tried."""

from collections.abc import Iterator
from typing import Any

from kdbench.errors import counted
from kdbench.record_parts import RecordedTuning, Tried
from kdbench.results.comparison import Comparison
from kdbench.results.facts import grouped, in_words, listed
from kdbench.tree import text

# Values of one option, and methods' spaces, that a note says one by one. The page has all trials.
MOST_VALUES, MOST_SPACES = 4, 6


def tunings(comparison: Comparison) -> Iterator[tuple[str, RecordedTuning | None]]:
    """Every place of the table, and how its setting was chosen; nothing where no place's was."""
    if all(record.cell.tuning is None for record in comparison.records):
        return
    for row in comparison.rows:
        for column in comparison.columns:
            records = comparison.cell(row, column)
            if records:
                label = row.label + (f" ({column.label})" if comparison.axes else "")
                yield label, next(iter(records.values())).cell.tuning


def tuning_notes(comparison: Comparison) -> Iterator[str]:
    """How settings were chosen, among which, and where there was nothing to choose. The table has the chosen ones."""
    found = list(tunings(comparison))
    by_way = grouped((_way(tuning), label) for label, tuning in found if tuning is not None)
    for way, tuned in by_way.items():
        yield f"Tuned: {way}, never on the test set" + (f" ({listed(tuned)})" if len(by_way) > 1 else "")
    if by_way:
        spaces = grouped((_space(tuning), label) for label, tuning in found if tuning is not None)
        said = [space + (f" ({listed(labels, 6)})" if len(spaces) > 1 else "") for space, labels in spaces.items()]
        more = f"; {len(said) - MOST_SPACES} more in table.html" if len(said) > MOST_SPACES else ""
        yield f"Settings tried: {'; '.join(said[:MOST_SPACES])}{more}"
    if by_way and (untuned := [label for label, tuning in found if tuning is None]):
        yield f"Not tuned: {listed(untuned)}"


def _way(tuning: RecordedTuning) -> str:
    """How a setting was chosen, in words."""
    seeds = f"{'seed' if len(tuning.seeds) == 1 else 'seeds'} {in_words(list(map(str, tuning.seeds)))}"
    part = f"{100 * tuning.validation:.4g} %" if tuning.validation < 1 else f"{tuning.validation:g}"
    return f"{counted(len(tuning.trials), 'trial')} each on {seeds}, by accuracy on {part} of the training images"


def _space(tuning: RecordedTuning) -> str:
    """The values that were tried, as 'temperature 2, 4 or 8'; of many, the lowest and the highest."""
    values: dict[str, list[Any]] = {}
    for tried in tuning.trials:
        for path, value in tried.setting.items():
            known = values.setdefault(path.removeprefix("method."), [])
            known += [] if value in known else [value]
    parts = [f"{path} {_values(known)}" for path, known in values.items()]
    return ", ".join(parts) + (", or unchanged" if any(not tried.setting for tried in tuning.trials) else "")


def _values(known: list[Any]) -> str:
    if all(isinstance(value, int | float) for value in known):
        known = sorted(known)
        if len(known) > MOST_VALUES:
            return f"{text(known[0])} to {text(known[-1])}"
    *others, last = map(text, known)
    return " or ".join(filter(None, (", ".join(others), last)))


def trials(comparison: Comparison) -> list[tuple[str, ...]]:
    """Every setting that was tried.

    The place it was for, what was set, mean accuracy in percent, that of each seed, and whether it was chosen.
    """
    return [
        (
            label,
            setting_text(tried),
            "–" if tried.mean is None else f"{tried.mean:.2f}",
            ", ".join("not finite" if one is None else f"{one:.2f}" for one in tried.accuracies),
            "chosen" if tried is tuning.chosen else "",
        )
        for label, tuning in tunings(comparison)
        if tuning is not None
        for tried in tuning.trials
    ]


def setting_text(tried: Tried) -> str:
    """A setting in words, as 'beta 100, p 2'."""
    values = (f"{path.removeprefix('method.')} {text(value)}" for path, value in tried.setting.items())
    return ", ".join(values) or "unchanged"
