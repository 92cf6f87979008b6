"""A comparison multiplied out: the recipe's tree for each combination of compared values."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kdbench.errors import UserError, did_you_mean, shortened
from kdbench.recipe.choices import Recipe
from kdbench.recipe.loading import put
from kdbench.registry import written_out
from kdbench.tree import Tree

# Cells of one recipe, at most.
MOST_CELLS = 10_000


@dataclass(frozen=True)
class Variant:
    """A recipe's tree for one combination of compared values.

    `axes`: compared dotted path -> its value. `shared`: keys below `method` that were given for all compared methods; a
    method that lacks one ignores it. `own`: keys that stand beside this method's name in the comparison.
    """

    tree: Tree
    axes: dict[str, Any]
    shared: frozenset[str] = frozenset()
    own: frozenset[str] = frozenset()


def variants(recipe: Recipe, tree: Tree) -> Iterator[Variant]:
    """All combinations, the last compared path running fastest.

    Raises:
        UserError: a path that no recipe has, one without values, no method, or a method beside the compared ones.
    """
    known = [key for key in Recipe.model_fields if key not in Recipe.not_compared]
    for path, values in recipe.compare.items():
        where = tree.origin(("compare", path))
        first = path.split(".")[0]
        if first not in known:
            raise UserError(f"'compare' has an unknown path '{path}'", where=where, hint=did_you_mean(first, known))
        if not values:
            raise UserError(f"'compare.{path}' has no values", where=where)
    if "method" in recipe.compare and "name" in recipe.method:
        hint = "either 'method:' or 'compare: {method: […]}'"
        raise UserError("there is a 'method' as well as a 'compare.method'", tree.origin(("method",)), hint)
    if "method" not in recipe.compare and "name" not in recipe.method:
        hint = "add 'method: kd', or 'compare: {method: [ce, kd, ab]}'"
        raise UserError("the recipe names no method", tree.origin(()), hint)
    seeds = recipe.seeds if isinstance(recipe.seeds, int) else len(recipe.seeds)
    if (cells := seeds * math.prod(map(len, recipe.compare.values()))) > MOST_CELLS:
        where = tree.origin(("seeds",) if seeds > MOST_CELLS else ("compare",))
        raise UserError(f"{cells:,} cells, more than {MOST_CELLS:,}", where, "split the recipe, or take fewer seeds")
    tried = recipe.tune.trials * len(recipe.tune.seeds) * cells // max(seeds, 1) if recipe.tune else 0
    if tried > MOST_CELLS:
        hint = "take fewer 'trials' or seeds of 'tune', or compare less"
        raise UserError(f"{tried:,} cells to tune by, more than {MOST_CELLS:,}", tree.origin(("tune",)), hint)
    for combination in itertools.product(*map(enumerate, recipe.compare.values())):
        chosen = dict(zip(recipe.compare, combination, strict=True))
        places = {path: tree.origin(("compare", path, n)) for path, (n, _) in chosen.items()}
        yield _variant(tree, {path: value for path, (_, value) in chosen.items()}, places)


def _variant(tree: Tree, combination: dict[str, Any], places: dict[str, str]) -> Variant:
    """The recipe of one combination. A compared method is put first: other paths may go into it.

    Args:
        places: where each of its values stands.
    """
    axes = dict(combination)
    shared: set[str] = set()
    own: frozenset[str] = frozenset()
    if "method" in combination:
        where = places["method"]
        given = written_out(Tree.of({"method": combination["method"]}, where))
        method = given.data["method"]
        if not isinstance(method, dict) or not isinstance(method.get("name"), str):
            what = f"a compared method is a name, or a mapping with a 'name', not {shortened(method)}"
            raise UserError(what, where=where)
        # What the recipe says of `method` without naming one holds for every compared method that has it.
        for_all = {key: v for key, v in tree.data.get("method", {}).items() if key != "name"}
        shared = for_all.keys() - method.keys()
        own = frozenset(method)
        tree = Tree({**tree.data, "method": for_all}, tree.origins).merged(given)
        extra = [f"{k} {v}" for k, v in method.items() if k not in ("name", "label", "stages")]
        axes["method"] = method.get("label") or ", ".join([method["name"], *extra])
    # A name alone replaces what other paths say of its options.
    for path, value in sorted(combination.items(), key=lambda pair: pair[0].count(".")):
        if path != "method":
            tree = put(tree, path, value, places[path])
            shared |= {path.split(".")[1]} if path.startswith("method.") else set()
    return Variant(tree, axes, frozenset(shared), own)


def means_nothing(path: str, foreign: set[str]) -> bool:
    """Whether a compared path is among the parts of a recipe that a cell does not have."""
    first, _, rest = path.partition(".")
    return bool({path, first} & foreign) or (first == "method" and rest.partition(".")[0] in foreign)
