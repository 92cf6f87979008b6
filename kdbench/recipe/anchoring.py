"""Writes a stage with anchors out as one stage for each, and refuses what such a stage cannot have."""

from kdbench.cards import Anchors, StageCard
from kdbench.errors import UserError, counted
from kdbench.recipe.method_specs import AnchorSpec, MethodSpec, StageSpec
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.specs import TeacherSpec
from kdbench.tree import Tree


def with_anchors(
    stages: dict[str, StageSpec], cards: dict[str, StageCard], tree: Tree
) -> tuple[dict[str, StageSpec], Tree]:
    """The stages of a method with those that have anchors written out, and the method's tree with the same stages.

    Args:
        stages: as the cards say, without regard to anchors. tree: of the method.
    """
    result: dict[str, StageSpec] = {}
    taken = sum(stage.share or 0.0 for stage in stages.values())
    for name, stage in stages.items():
        anchors = cards[name].anchors
        if anchors is None:
            result[name] = stage
            continue
        where = tree.origin(("stages", name, "anchors"))
        _check(stage, anchors, f"stage '{name}'", where)
        if other := next((s for s, o in stages.items() if "teacher" in o.trains or o.modes.teacher == "train"), None):
            what = f"stage '{name}': anchors are frozen, but in the stage '{other}' the teacher is not"
            raise UserError(what, where, "leave 'teacher' out of 'trains', and the teacher in eval mode")
        for new, part in _parts(name, stage, anchors, 1 - taken).items():
            if new in stages:
                raise UserError(
                    f"stage '{name}': its anchors would create a stage '{new}', which already exists", where=where
                )
            result[new] = part
            tree = tree.put(("stages", new), tree.at("stages", name))
    return result, tree


def _parts(name: str, stage: StageSpec, anchors: Anchors, rest: float) -> dict[str, StageSpec]:
    """One stage for each anchor, called name_1, name_2, …

    Args:
        rest: share of the budget that a stage without one takes.
    """
    n, greedy = anchors.n, anchors.choose == "greedy"
    share = rest if stage.share is None else stage.share
    each = anchors.budget == "each"
    parts = {}
    for at in range(n):
        last = at == n - 1
        steps: dict[str, float | None] = {}
        if stage.extra_epochs is not None:
            steps["extra_epochs"] = stage.extra_epochs / (1 if each else n)
        elif each:
            # The steps of the last anchor are the budget's own: they stay paired with other methods.
            steps |= {"share": stage.share} if last else {"share": None, "extra_share": share}
        else:
            steps["share"] = None if last and stage.share is None else share / n
        anchor = AnchorSpec(
            choose=anchors.choose,
            n=n,
            at=at,
            delta=anchors.delta if greedy else None,
            images=anchors.images if greedy else None,
        )
        more = {"anchor": anchor, "continues": anchors.rates == "continue" and at > 0}
        parts[f"{name}_{at + 1}"] = stage.model_copy(update=steps | more)
    return parts


def _check(stage: StageSpec, anchors: Anchors, what: str, where: str) -> None:
    if stage.source is not None:
        raise UserError(
            f"{what}: a batch source uses the converged teacher, so it cannot be combined with anchors", where=where
        )
    if all("teacher" not in term.loss.inputs for term in stage.losses.values()):
        raise UserError(f"{what} has anchors, but no loss that reads the teacher", where=where)
    if anchors.rates == "continue" and "connectors" in stage.trains:
        raise UserError(
            f"{what}: connectors are dropped after each anchor, so the optimizer cannot continue to the next",
            where=where,
            hint="write 'rates: restart', or use a loss without connector",
        )


def check_route(method: MethodSpec, teacher: TeacherSpec | None, data: DataSpec, where: str) -> None:
    """Anchors need a teacher whose training kept a route of enough checkpoints, and greedy ones validation images.

    Raises:
        UserError: there is none.
    """
    anchors = [stage.anchor for stage in method.stages.values() if stage.anchor is not None]
    if not anchors or teacher is None:
        return
    needs = f"the method '{method.name}' learns from checkpoints of its teacher's training"
    if teacher.trained_by is None:
        hint = "choose a teacher that is trained from a recipe with 'route:' (of a card with both: 'trained: true')"
        raise UserError(f"{needs}, and '{teacher.name}' is a weight file, which has none", where, hint)
    if teacher.trained_by.route is None:
        hint = "add 'route: 20' to that recipe (or a copy of recipe and card): it keeps 20 evenly spaced checkpoints"
        raise UserError(f"{needs}, and the recipe of '{teacher.name}' saves none", where, hint)
    if most := max((a.n for a in anchors if a.n > (teacher.trained_by.route or 0)), default=0):
        raise UserError(
            f"the method '{method.name}' has {counted(most, 'anchor')}, the route of '{teacher.name}' "
            f"{counted(teacher.trained_by.route, 'checkpoint')}",
            where=where,
            hint="use fewer anchors, or a longer route",
        )
    if any(a.choose == "greedy" for a in anchors) and not data.validation:
        what = f"the method '{method.name}' chooses anchors on validation images, which this recipe does not split off"
        hint = "write 'data: {validation: 0.1, …}': all methods of the recipe then train on the same rest"
        raise UserError(what, where, hint)
