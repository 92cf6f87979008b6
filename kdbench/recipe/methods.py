"""The method of a cell: its card with the recipe's changes, and its stages."""

from functools import reduce
from typing import Any

from kdbench.cards import MethodCard
from kdbench.errors import UserError, did_you_mean, shortened
from kdbench.forms import listed
from kdbench.recipe.anchoring import with_anchors
from kdbench.recipe.method_specs import MethodSpec, ModuleSpec, StageSpec
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.named import named_spec
from kdbench.recipe.stages import NAMED_KINDS, check_asked, stage_spec
from kdbench.recipe.variants import Variant
from kdbench.registry import Registry, written_out
from kdbench.tree import Tree
from kdbench.validation import form_at, validated

# Keys of a method mapping in a recipe that are no parameters of the method.
_METHOD_KEYS = ("name", "label", "stages")


def method_spec(variant: Variant, protocol: Tree, registry: Registry) -> tuple[MethodSpec, set[str], Tree]:
    """The method of a variant, the shared keys that it does not have, and its tree.

    Args:
        protocol: its tree, for optimizer and schedule of stages that name none.
    """
    name = variant.tree.data["method"]["name"]
    tree, foreign, label = _changed(variant, registry)
    card = validated(MethodCard, tree, f"method '{name}'", ("method",))
    stages = {
        key: stage_spec(
            stage, tree.at("stages", key), protocol, registry, f"stage '{key}' of method '{name}'", card.modules
        )
        for key, stage in card.stages.items()
    }
    modules = {key: _module(tree.at("modules", key), card, registry, f"module '{key}'") for key in card.modules}
    predicts = _module(tree.at("predicts"), card, registry, "'predicts'") if card.predicts else None
    stages, tree = with_anchors(stages, card.stages, tree)
    _check_shares(stages, tree.origin(("stages",)), name)
    # No step at all, where every other share gives one at least.
    stages = {key: stage for key, stage in stages.items() if stage.share != 0}
    spec = MethodSpec(
        name=name, label=label, starts_from=card.starts_from, modules=modules, predicts=predicts, stages=stages
    )
    return spec, foreign, tree


def _module(tree: Tree, card: MethodCard, registry: Registry, what: str) -> ModuleSpec:
    """A module of a method, from its connector's card."""
    own = {key: tree.data[key] for key in ("student", "teacher") if key in tree.data}
    if tree.data.get("optimizer") is not None:
        own["optimizer"] = named_spec("optimizers", tree.at("optimizer"), registry)
    found = named_spec("connectors", tree, registry, own=("name", *ModuleSpec.model_fields), what=what)
    check_asked(found.target, card.modules, what, tree.origin(("name",)))
    return ModuleSpec(**dict(found), **own)


def _changed(variant: Variant, registry: Registry) -> tuple[Tree, set[str], str]:
    """The tree of a method's card with what the recipe says of it, the shared keys that mean nothing to it, and its
    label."""
    given = variant.tree.at("method")
    name = given.data["name"]
    tree = registry.tree("methods", name, given.origin(("name",)))
    short = registry.card("methods", name).parameters
    for key, said in short.items():
        for path in _paths(said):
            _check_parameter(tree, key, ".".join(path), registry)
    # Settings of one method in a comparison are told apart by what they set.
    own = [f"{k} {v}" for k, v in given.data.items() if k in variant.own and k not in _METHOD_KEYS]
    if not isinstance(given.data.get("label", ""), str | None):
        what = f"a label is a text, not {shortened(given.data['label'])}"
        raise UserError(what, where=given.origin(("label",)), hint="put it in quotes")
    label = given.data.get("label") or ", ".join([tree.data.get("title", name), *own])
    foreign: set[str] = set()
    for path, value in _of_pair(tree, variant.tree.data, registry).items():
        tree = tree.put(path, value)
    for key, value in given.data.items():
        if key in short:
            for path in _paths(short[key]):
                tree = tree.put(path, Tree.of(value, given.origin((key,))))
            if f"method.{key}" in variant.axes:
                label = f"{label}, {key} {value}"
        elif key == "stages" and isinstance(value, dict):
            changes = _applicable(written_out(given.at("stages")), tree.data["stages"], name, key in variant.shared)
            if changes.data:
                tree = tree.put(("stages",), changes)
            else:
                foreign.add(key)
        elif key in variant.shared:
            foreign.add(key)
        elif key not in _METHOD_KEYS:
            what = f"unknown key '{key}' for method '{name}'"
            raise UserError(what, given.origin((key,)), did_you_mean(key, [*short, "stages", "label"]))
    return written_out(tree), foreign, label


def _paths(said: str | list[str]) -> list[tuple[str, ...]]:
    """What a parameter's short name stands for on a card: one place, or several that get the same value."""
    return [tuple(path.split(".")) for path in listed(said)]


def _check_parameter(tree: Tree, name: str, path: str, registry: Registry) -> None:
    """A short name must point at a key that exists: of a stage, of a loss term, or an option of what is named there."""
    *parents, last = path.split(".")
    if last not in (known := _keys_at(tree, parents, registry)):
        what = f"the parameter '{name}' points to nothing: {path}"
        raise UserError(what, tree.origin(("parameters", name)), did_you_mean(last, known))


def _keys_at(tree: Tree, parents: list[str], registry: Registry) -> dict[str, Any]:
    """What can be set at a place of a method's card -> its value there."""
    inside: Any = reduce(lambda at, key: at.get(key) if isinstance(at, dict) else None, parents, tree.data)
    if not isinstance(inside, dict) or not parents:
        return {}
    form = form_at(MethodCard, tuple(parents))
    found = {key: field.get_default() for key, field in form.model_fields.items()} if form else dict(inside)
    kinds = NAMED_KINDS | {"predicts": "connectors"}
    kind = {"losses": "losses", "modules": "connectors"}.get(["", *parents][-2], kinds.get(parents[-1]))
    if kind is not None:
        key = "loss" if kind == "losses" else "name"
        card = registry.card(kind, inside.get(key, ""), tree.origin((*parents, key)))
        found |= {option.name: option.default for option in registry.settable(card).values()}
        found |= getattr(card, "args", {})
    return {key: inside.get(key, value) for key, value in found.items()}


def settings_of(name: str, registry: Registry) -> dict[str, tuple[str, Any]]:
    """What a method's losses take, and what else has a short name: dotted path -> short name (or ""), and value."""
    tree = registry.tree("methods", name)
    short = {".".join(path): key for key, said in tree.data.get("parameters", {}).items() for path in _paths(said)}
    found: dict[str, tuple[str, Any]] = {}
    for stage, card in tree.data["stages"].items():
        for term, given in card["losses"].items():
            at = ["stages", stage, "losses", term]
            options = registry.settable(registry.card("losses", given["loss"], tree.origin((*at, "loss"))))
            values = _keys_at(tree, at, registry)
            found |= {".".join([*at, key]): ("", values[key]) for key in ("weight", *options)}
    for path, key in short.items():
        _check_parameter(tree, key, path, registry)
        *parents, last = path.split(".")
        found[path] = (key, _keys_at(tree, parents, registry)[last])
    return found


def _of_pair(method: Tree, recipe: dict[str, Any], registry: Registry) -> dict[tuple[str, ...], Tree]:
    """What a method's card says of a recipe's pair of networks: path in the card -> value."""
    found: dict[tuple[str, ...], Tree] = {}
    if not (pairs := method.data.get("pairs")):
        return found
    short, teacher = method.data.get("parameters", {}), recipe.get("teacher") or {}
    if (named := teacher.get("name")) is not None:
        teacher = registry.tree("teachers", named).data
    models = {"teacher": (teacher.get("model") or {}).get("name"), "student": (recipe.get("student") or {}).get("name")}
    for index, pair in enumerate(pairs):
        for key, value in pair.items():
            where = method.origin(("pairs", index, key))
            if key not in ("teacher", "student") and key not in short:
                hint = did_you_mean(key, short)
                raise UserError(f"a pair sets the method's parameters, and '{key}' is not one of them", where, hint)
            if key in short and all(model in listed(pair[side]) for side, model in models.items()):
                found |= dict.fromkeys(_paths(short[key]), Tree.of(value, where))
    return found


def _applicable(over: Tree, stages: dict[str, Any], method: str, shared: bool) -> Tree:
    """The part of an override of stages that a method has.

    A loss term that is new to a stage needs its 'loss'; one without is an override of a term that is not there.

    Args:
        shared: whether it is for all compared methods.

    Raises:
        UserError: the method lacks something, and the override is for this method alone.
    """

    def lacks(what: str, path: tuple[str, ...], known: dict[str, Any]) -> None:
        if not shared:
            hint = did_you_mean(path[-1], known)
            raise UserError(f"method '{method}' has no {what}", where=over.origin(path), hint=hint)

    found: dict[str, Any] = {}
    for stage, changes in over.data.items():
        if stage not in stages:
            lacks(f"stage '{stage}'", (stage,), stages)
            continue
        terms = changes.get("losses") if isinstance(changes, dict) else None
        if isinstance(terms, dict):
            own, kept = stages[stage].get("losses", {}), {}
            for term, change in terms.items():
                if term in own or (isinstance(change, dict) and "loss" in change):
                    kept[term] = change
                else:
                    lacks(f"loss '{term}' in stage '{stage}'", (stage, "losses", term), own)
            changes = {**changes, "losses": kept}
            if not kept and len(changes) == 1:
                continue
        found[stage] = changes
    return Tree(found, over.origins)


def check_target(method: MethodSpec, target: DataSpec | None, tree: Tree) -> None:
    """Raises UserError for a method that reads the target domain, where the recipe names none."""
    for stage, name, term in method.named_terms:
        source = method.stages[stage].source
        if target is None and "target" in (term.input, term.against) and not (source and "target" in source.gives):
            what = f"the method '{method.name}' needs a target domain (loss '{name}' reads it)"
            hint = "add 'target:' with the key of a data card to the recipe ('kdbench ls datasets')"
            raise UserError(what, tree.origin(("stages", stage, "losses", name)), hint)


def check_trains_teacher(method: MethodSpec, where: str) -> None:
    """Raises UserError for a method that needs more of its teacher than it has taught it."""
    first = next(iter(method.stages.values()))
    if "teacher" not in first.trains or _needs_trained_teacher(method):
        what = f"the method '{method.name}' needs a trained teacher, and this one is untrained"
        hint = "choose a method that trains its teacher from the first step on, such as dml, or a trained teacher"
        raise UserError(what, where, hint)


def needs_teacher(method: MethodSpec) -> bool:
    """Whether anything of it does, a loss or what it begins with."""
    reads = any("teacher" in term.loss.inputs or term.of == "teacher" for term in method.terms)
    return reads or _needs_trained_teacher(method)


def _needs_trained_teacher(method: MethodSpec) -> bool:
    """Whether its student, a batch source or an operation begins with what a teacher has learned."""
    parts = [part for stage in method.stages.values() for part in (stage.source, stage.begins) if part is not None]
    return method.starts_from == "teacher" or any(part.teacher for part in parts)


def _check_shares(stages: dict[str, StageSpec], where: str, method: str) -> None:
    extra = [stage.extra for stage in stages.values()]
    for position, (name, stage) in enumerate(stages.items()):
        if stage.extra and not all(extra[:position]):
            hint = "their steps are on top of the budget, so that the others stay paired with other methods"
            raise UserError(
                f"method '{method}', stage '{name}': stages with 'extra_epochs' must come first", where, hint
            )
        if stage.extra and stage.share is not None:
            raise UserError(f"method '{method}', stage '{name}': 'share' and 'extra_epochs' cannot be combined", where)
    rest = [name for name, stage in stages.items() if stage.share is None and not stage.extra]
    if len(rest) > 1:
        hint = "only one stage may leave it out and take the rest"
        raise UserError(f"method '{method}': the stages {rest} have no share", where, hint)
    total = sum(stage.share or 0.0 for stage in stages.values())
    if total > 1 + 1e-9 or (rest and total >= 1) or (not rest and abs(total - 1) > 1e-9):
        hint = "they sum to 100 %; one stage may leave its share out and take the rest"
        nothing = f", which leaves nothing to '{rest[0]}'" if rest else ""
        raise UserError(f"method '{method}': the shares of its stages sum to {total:.0%}{nothing}", where, hint)
