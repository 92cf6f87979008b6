"""From a recipe's file (or shipped name) and overrides to one checked tree."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from kdbench.cards import ProtocolCard
from kdbench.errors import UserError, did_you_mean, shortened
from kdbench.files import SHARE, expanded, is_recipe, no_file
from kdbench.forms import listed
from kdbench.recipe.choices import Range, Recipe
from kdbench.registry import written_out
from kdbench.tree import SCIENTIFIC, Tree
from kdbench.tree import Path as TreePath
from kdbench.validation import fields_at, validated

# What a title does not speak of: how much is run and how it is computed, what is compared, names, and folders.
_UNTITLED = {"seeds", "evaluations", "compute", "keep", "route", "compare", "baseline", "title", "data.root"}
# How the place of an override begins.
_COMMAND_LINE = "command line"
# Of these the later one holds.
_BUDGETS = ("epochs", "steps")


def recipe_names() -> list[str]:
    """Names of the shipped recipes, as `kdbench run NAME` takes them."""
    folder = SHARE / "recipes"
    return sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))


def find(recipe: str, base: Path | None = None) -> Path:
    """File of a recipe given as a path (also relative to `base`) or as that of a shipped one; UserError for none."""
    path = expanded(recipe)
    candidates = [path, SHARE / "recipes" / f"{recipe}.yaml"]
    if base is not None:
        candidates.insert(0, base / path)
    for file in candidates:
        if os.path.isfile(file):
            return file
    if what := next(filter(None, map(no_file, candidates)), None):
        raise UserError(f"'{recipe}' is no recipe: {what}", hint="'kdbench ls recipes' lists the shipped ones")
    if is_recipe(path):
        hint = f"{did_you_mean(path.stem, recipe_names())} ('kdbench ls recipes' lists the shipped ones)"
        raise UserError(f"there is no recipe file '{recipe}'", hint=hint)
    raise UserError(f"there is no recipe '{recipe}'", hint=did_you_mean(recipe, recipe_names()))


def load(recipe: str | Path | dict[str, object], overrides: Iterable[str] = ()) -> Tree:
    """A recipe as a tree: includes followed, overrides laid over it, short forms written out, every key known.

    Args:
        recipe: file, shipped name, or plain data.
        overrides: texts `dotted.path=value`, the value in YAML.
    """
    if isinstance(recipe, dict):
        tree = _over_included(Tree.of(recipe, "recipe"), Path(), ())
    else:
        tree = _load_file(find(str(recipe)), ())
    over: dict[str, str] = {}
    compared: dict[str, str] = {}
    for text in overrides:
        tree = override(tree, text)
        over[text.partition("=")[0]] = text
        given = tree.data.get("compare")
        origins = {path: tree.origin(("compare", path)) for path in (given if isinstance(given, dict) else ())}
        compared |= {path: origin for path, origin in origins.items() if origin.startswith(_COMMAND_LINE)}
    for path, text in over.items():
        budget = path in _BUDGETS and tree.data.get(path) is not None
        for one in {path, *(_BUDGETS if budget else ())} & compared.keys():
            what = f"'{path}' is given one value, and there are several to compare"
            where = f"{_COMMAND_LINE}, '{text}' and {compared[one].removeprefix(_COMMAND_LINE + ', ')}"
            raise UserError(what, where, "leave one of the two out")
    return _titled(tree, over)


def _titled(tree: Tree, over: Mapping[str, str]) -> Tree:
    """The title says what was laid over the recipe, since its own words may not hold any more."""
    said = [text for path, text in over.items() if path.partition(".")[0] not in _UNTITLED and path not in _UNTITLED]
    if not said or "title" in over or not isinstance(title := tree.data.get("title"), str):
        return tree
    return put(tree, "title", f"{title} ({', '.join(said)})", _COMMAND_LINE)


def typed_recipe(tree: Tree) -> Recipe:
    """The typed form of a loaded recipe."""
    return validated(Recipe, tree, "recipe", ())


def override(tree: Tree, text: str) -> Tree:
    """`tree` with one `dotted.path=value` laid over it."""
    where = f"{_COMMAND_LINE}, '{text}'"
    if not isinstance(text, str):
        raise UserError(f"an override is a text, not {shortened(text)}", "overrides", "for example: 'epochs=20'")
    path_text, equals, value_text = text.partition("=")
    if not equals or not path_text:
        raise UserError("write overrides as key.path=value", where=where, hint="for example: epochs=20")
    if not value_text.strip():
        raise UserError("there is no value", where=where, hint=f"write '{path_text}=null' for no value")
    value = Tree.parse(value_text, where).data
    compared = tree.data.get("compare")
    if isinstance(compared, dict) and path_text in compared:
        # One value in place of the compared ones.
        rest = {path: values for path, values in compared.items() if path != path_text}
        tree = Tree({**tree.data, "compare": rest}, tree.origins)
    return put(tree, path_text, value, where)


def put(tree: Tree, dotted_path: str, value: object, where: str) -> Tree:
    """`tree` with a value laid over it at a dotted path. The first part must be a key of a recipe."""
    path = tuple(dotted_path.split("."))
    known = fields_at(Recipe, ())
    if path[0] not in known:
        raise UserError(f"unknown key '{path[0]}'", where=where, hint=_meant(path[0], known))
    if path[0] in ("compare", "tune") and len(path) > 1:
        inner, last, tuned = ".".join(path[1:-1]), path[-1], tree.data.get("tune")
        # Of a range that is tuned one end may be given alone.
        ranged = last in Range.model_fields and isinstance(tuned, dict) and isinstance(tuned.get(inner), dict)
        path = ("tune", inner, last) if path[0] == "tune" and ranged else (path[0], ".".join(path[1:]))
    tree = _without_other_budget(tree, {dotted_path})
    given = Tree({}, {}).put(path, Tree.of(value, where))
    over = written_out(given, recipe=True)
    return tree.merged(over, _names(given.data, over.data))


def _names(given: object, written: object, path: TreePath = ()) -> set[TreePath]:
    """Where a recipe gives a name alone, which replaces what it is laid over, also of the same name.

    Args:
        written: the same with short forms written out.
    """
    if not isinstance(written, dict) or isinstance(given, list):
        return set()
    if not isinstance(given, dict):
        return {path}
    return {name for key in given.keys() & written.keys() for name in _names(given[key], written[key], (*path, key))}


def _load_file(file: Path, seen: tuple[Path, ...]) -> Tree:
    if file.resolve() in seen:
        raise UserError("a recipe includes itself", where=str(file), hint="remove the circular 'include:'")
    tree = Tree.read(file)
    if not isinstance(tree.data, dict) or not tree.data:
        hint = "'kdbench cp quickstart my.yaml' writes one to begin with"
        raise UserError("a recipe is a mapping of keys to values", where=str(file), hint=hint)
    return _over_included(tree, file.parent, (*seen, file.resolve()))


def _over_included(given: Tree, folder: Path, seen: tuple[Path, ...]) -> Tree:
    """A recipe laid over those that it includes, which are looked for in a folder first."""
    base, tree = Tree({}, {}), written_out(given, recipe=True)
    for name in listed(tree.data.get("include", [])):
        if not isinstance(name, str):
            raise UserError("'include' names a recipe, or a list of recipes", where=tree.origin(("include",)))
        try:
            included = find(name, folder)
        except UserError as error:
            raise UserError(error.what, where=tree.origin(("include",)), hint=error.hint) from None
        base = base.merged(_load_file(included, seen))
    own = tree.without("include")
    _check_keys(own)
    if not base.data:
        return own
    return _without_other_budget(base, set(own.data)).merged(own, _names(given.data, tree.data))


def _without_other_budget(tree: Tree, given: set[str]) -> Tree:
    """Of 'epochs' and 'steps' the later one holds: `tree` without the one that `given` replaces by the other."""
    replaced = {other for key, other in (("epochs", "steps"), ("steps", "epochs")) if key in given}
    return tree.without(*replaced)


def _check_keys(tree: Tree) -> None:
    """Top-level keys are checked before merging, so that a typo in an included file is found there."""
    known = [*fields_at(Recipe, ()), "include"]
    for key in tree.data:
        if key not in known:
            raise UserError(f"unknown key '{key}'", where=tree.origin((key,)), hint=_meant(str(key), known))


# Where keys stand that people look for at the top of a recipe.
_DEEPER = {
    "protocol.optimizer": ("lr", "momentum", "weight_decay", "nesterov"),
    "protocol": (*fields_at(ProtocolCard, ()), "normalization"),
    "data": fields_at(Recipe, ("data",)),
    "compute": fields_at(Recipe, ("compute",)),
    "method": ("temperature", "alpha", "beta", "gamma", "weight", "label", "stages", "losses"),
    "teacher": fields_at(Recipe, ("teacher",)),
    "student": fields_at(Recipe, ("student",)),
}


def _meant(key: str, known: Iterable[str]) -> str:
    """A hint for a key that no recipe has at its top."""
    if key == "seed":
        return "'seeds=[42]' is the one seed 42, and 'seeds=42' are 42 seeds"
    places = [f"'{place}.{key}'" for place, keys in _DEEPER.items() if key in keys]
    return f"did you mean {' or '.join(places)}?" if places else did_you_mean(key, known)


class _Dumper(yaml.SafeDumper):
    """Puts into quotes the texts that would be read as numbers here, and not by YAML 1.1: 1e3."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", SCIENTIFIC, [*"+-0123456789"])


def dump(data: object) -> str:
    """Plain data as YAML, in its own order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
