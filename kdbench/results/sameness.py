"""Whether two records are of one experiment: cells of different ones are never averaged."""

from kdbench.errors import UserError
from kdbench.recipe.differences import differences, shown
from kdbench.recipe.specs import recorded
from kdbench.record import DIGEST, Record, made_from


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
    seeds = f"seed {a.cell.seed}" if a.cell.seed == b.cell.seed else f"seeds {a.cell.seed} and {b.cell.seed}"
    raise UserError(
        f"two cells of '{label}', {seeds}, would share one place in the table, but are different experiments"
        + (f": {shown(found)}" if found else ""),
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
