"""Whether two records are of one experiment: cells of different ones are never averaged."""

from collections.abc import Iterator
from typing import Any

from kdbench.errors import UserError
from kdbench.recipe.specs import recorded
from kdbench.record import DIGEST, Record, made_from
from kdbench.tree import text

# Parts of a resolved recipe that change no number, or that differ between the cells of a row on purpose.
_NAMES_ONLY = {"label", "root", "file", "url", "accuracy", "shares", "keep"}
# Parts whose keys were chosen by whoever wrote a card: one of them may be called as a part above.
_OF_CARDS = {"options", "losses", "stages", "modules", "modes", "schedules", "batch_norm"}


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted paths at which two resolved recipes differ in what affects numbers; the seed does not count."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            if (path or key != "seed") and not _names_only(path, key):
                yield from differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for n, (own, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(own, other, f"{path}.{n}")
    elif a != b:
        yield path, a, b


def _names_only(path: str, key: str) -> bool:
    above, _, last = path.rpartition(".")
    if last in _OF_CARDS and not (last == "options" and above.rpartition(".")[2] in ("data", "target")):
        return False
    return key in _NAMES_ONLY


def check_same(label: str, a: Record, b: Record) -> None:
    """Refuse to pool different experiments, or to have two values for one seed."""
    # A field that came with a later version is absent from older records; a typed recipe has it, with its default.
    own, other, drift = a.spec, b.spec, a.kdbench != b.kdbench
    if any(differences(own, other)) and a.resolved is not None and b.resolved is not None:
        # Own code by its content.
        own, other = recorded(a.resolved.counted()), recorded(b.resolved.counted())
        # A card may have come to say more since: what no identity counts.
        drift = len({one.model_copy(update={"seed": 0}).identity() for one in (a.resolved, b.resolved)}) == 1
    found = [(path, x, y) for path, x, y in differences(own, other) if not (drift and (x is None or y is None))]
    if not found and a.cell.seed != b.cell.seed:
        return
    shown = "; ".join(f"{path} ({text(x)} and {text(y)})" for path, x, y in found[:3])
    shown += "; …" if len(found) > 3 else ""
    seeds = f"seed {a.cell.seed}" if a.cell.seed == b.cell.seed else f"seeds {a.cell.seed} and {b.cell.seed}"
    raise UserError(
        f"two cells of '{label}', {seeds}, would share one place in the table, but are different experiments"
        + (f": {shown}" if shown else ""),
        where=f"{a.place} and {b.place}",
        hint="give the folders of one comparison, or take one of the two out",
    )


def check_made_alike(a: Record, b: Record) -> None:
    """Refuse to average over, or to take for one cell, what was made from different data or by different teachers of
    one name."""
    own, other = made_from(a), made_from(b)
    for what, name in (key for key in own if other.get(key, own[key]) != own[key]):
        one, two = own[what, name], other[what, name]
        raise UserError(
            f"two cells of '{a.cell.label}', seeds {a.cell.seed} and {b.cell.seed}, were made from different {what} "
            f"'{name}', so no mean is taken over them: {DIGEST[what]} {one[:12]} and {two[:12]}",
            where=f"{a.place} and {b.place}",
            hint="give the folders of one comparison, or take one of the two out: of a run, remove its folder, and "
            "'kdbench run' trains it again",
        )
