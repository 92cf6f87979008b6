"""From a recipe to its cells: the comparison multiplied out, one cell for each combination and seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdbench.errors import UserError, did_you_mean
from kdbench.reading import LONGEST, plain_name
from kdbench.recipe.loading import load, put, typed
from kdbench.recipe.resolving import Variant, resolve
from kdbench.recipe.schema import Recipe
from kdbench.recipe.specs import CellSpec
from kdbench.registry import Registry, written_out
from kdbench.tree import Tree
from kdbench.validation import fields_at

# Folders beside those of runs: of trained teachers, and of what batch sources make once for several cells.
TEACHERS, SOURCES = OWN_FOLDERS = ("teachers", "sources")


@dataclass(frozen=True)
class PlannedCell:
    """A cell with its place in the comparison. `axes`: compared dotted path -> value (without the seed)."""

    spec: CellSpec
    axes: dict[str, Any]
    order: int

    @property
    def slug(self) -> str:
        """Folder name: readable, and different for cells that differ in anything that affects numbers."""
        return self._slug(self.spec.identity())

    @property
    def slugs(self) -> list[str]:
        """The folder's name, and the one that an earlier version gave it."""
        return [self.slug, self._slug(self.spec.identity(earlier=True))]

    def _slug(self, identity: str) -> str:
        parts = [self.spec.method.name]
        parts += [f"{path.rpartition('.')[2]}_{_name(value)}" for path, value in self.axes.items() if path != "method"]
        plain = "".join(c if c.isalnum() or c in "-_.=" else "_" for c in "-".join(parts))
        end = f"-seed{self.spec.seed}-{identity[:8]}"
        # What is too long for a folder's name is cut: the identity tells cells apart.
        return plain.encode()[: LONGEST - len(end)].decode(errors="ignore") + end


@dataclass(frozen=True)
class Plan:
    """All cells of a recipe in the order of the comparison, a combination's seeds together."""

    name: str
    title: str
    cells: list[PlannedCell]
    baseline: str
    recipe: dict[str, Any] = field(default_factory=dict)


def plan(
    recipe: str | Path | dict[str, Any],
    registry: Registry,
    overrides: tuple[str, ...] = (),
    weights_must_exist: bool = True,
) -> Plan:
    """The cells of a recipe.

    Args:
        recipe: file, shipped name, or plain data.
        overrides: texts `dotted.path=value`.
        weights_must_exist: whether weights of a teacher that cannot be downloaded must be here, as for training.
    Raises:
        UserError: for whatever the schema and the cards can tell.
    """
    tree = load(recipe, overrides)
    base = typed(tree)
    seeds = list(range(base.seeds)) if isinstance(base.seeds, int) else base.seeds
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError("'seeds' needs at least one seed, none twice", where=tree.origin(("seeds",)))
    cells: dict[str, PlannedCell] = {}
    # A method's keys that the recipe gives for all methods must mean something to one of them.
    unused = {key: tree.origin(("method", key)) for key in base.method if "method" in base.compare and key != "name"}
    for order, combination in enumerate(_combinations(base, tree)):
        variant = _variant(tree, combination)
        first, foreign = resolve(variant, seeds[0], registry, weights_must_exist)
        unused = {key: where for key, where in unused.items() if key in foreign}
        axes = {path: value for path, value in variant.axes.items() if not _is_foreign(path, foreign)}
        for seed in seeds:
            spec = first.model_copy(update={"seed": seed})
            cells.setdefault(spec.identity(), PlannedCell(spec, axes, order))
    for key, where in unused.items():
        raise UserError(
            f"no method of this comparison has '{key}'",
            where=where,
            hint=did_you_mean(key, _parameters(cells.values(), registry)),
        )
    for path in base.compare:
        if all(path not in cell.axes for cell in cells.values()):
            last = path.removeprefix("method.")
            raise UserError(
                f"no method of this comparison has '{last}'",
                where=tree.origin(("compare", path)),
                hint=did_you_mean(last, _parameters(cells.values(), registry)),
            )
    _check_names(cells.values(), tree)
    methods = list(dict.fromkeys(cell.spec.method.name for cell in cells.values()))
    if base.baseline is not None and base.baseline not in methods:
        raise UserError(
            f"the baseline '{base.baseline}' is not among the methods",
            where=tree.origin(("baseline",)),
            hint=did_you_mean(base.baseline, methods),
        )
    name = run_name(str(recipe)) if not isinstance(recipe, dict) else "recipe"
    return Plan(name, base.title, list(cells.values()), base.baseline or methods[0], tree.data)


def run_name(recipe: str) -> str:
    """What the runs of a recipe's file are called, and their folder beside those of other recipes.

    Raises:
        UserError: a name that not every system takes for a folder, or that runs use for something else.
    """
    name = Path(recipe).stem
    try:
        if plain_name(name).casefold() in OWN_FOLDERS:
            raise ValueError(f"runs keep what they share in a folder called '{name.casefold()}'")
    except ValueError as error:
        raise UserError(
            f"a recipe's runs lie in a folder of its name: {error}", where=recipe, hint="rename the recipe's file"
        ) from None
    return name


def _check_names(cells: Iterable[PlannedCell], tree: Tree) -> None:
    """Different cells need different names, or no table could tell them apart."""
    seen: set[str] = set()
    for cell in cells:
        key = repr((cell.spec.method.label, cell.axes, cell.spec.seed))
        if key in seen:
            raise UserError(
                f"two different cells are both called '{cell.spec.method.label}'",
                where=tree.origin(("compare", "method")),
                hint="give each a 'label'",
            )
        seen.add(key)


def _combinations(base: Recipe, tree: Tree) -> list[dict[str, Any]]:
    known = [key for key in fields_at(Recipe, ()) if key not in ("compare", "seeds", "title", "baseline")]
    for path, values in base.compare.items():
        where = tree.origin(("compare", path))
        first = path.split(".")[0]
        if first not in known:
            raise UserError(f"'compare' has an unknown path '{path}'", where=where, hint=did_you_mean(first, known))
        if not values:
            raise UserError(f"'compare.{path}' has no values", where=where)
    if "method" in base.compare and "name" in base.method:
        raise UserError(
            "a method is named beside the compared ones",
            where=tree.origin(("method",)),
            hint="either 'method:' or 'compare: {method: […]}'",
        )
    if "method" not in base.compare and "name" not in base.method:
        raise UserError(
            "no method is named", where=tree.origin(()), hint="add 'method: kd', or 'compare: {method: [ce, kd, ab]}'"
        )
    return [dict(zip(base.compare, values, strict=True)) for values in itertools.product(*base.compare.values())]


def _variant(tree: Tree, combination: dict[str, Any]) -> Variant:
    """The recipe of one combination. A compared method is put first: other paths may go into it."""
    axes: dict[str, Any] = {}
    shared: set[str] = set()
    own: frozenset[str] = frozenset()
    if "method" in combination:
        where = tree.origin(("compare", "method"))
        value = combination["method"]
        given = written_out(Tree.of({"method": value}, where))
        named = isinstance(given.data["method"], dict) and isinstance(given.data["method"].get("name"), str)
        if not named:
            raise UserError(f"a compared method is a name, or a mapping with a 'name', not {value!r}", where=where)
        # What the recipe says of `method` without naming one holds for every compared method that has it.
        for_all = {key: v for key, v in tree.data.get("method", {}).items() if key != "name"}
        shared = {key for key in for_all if key not in given.data["method"]}
        tree = Tree({**tree.data, "method": for_all}, tree.origins).merged(given)
        extra = [f"{k} {v}" for k, v in given.data["method"].items() if k not in ("name", "label", "stages")]
        axes["method"] = given.data["method"].get("label") or ", ".join([given.data["method"]["name"], *extra])
        own = frozenset(given.data["method"])
    for path, value in combination.items():
        if path != "method":
            tree = put(tree, path, value, tree.origin(("compare", path)))
            axes[path] = value
            if path.startswith("method."):
                shared.add(path.split(".")[1])
    return Variant(tree, {path: axes[path] for path in combination}, frozenset(shared), own)


def _parameters(cells: Iterable[PlannedCell], registry: Registry) -> set[str]:
    """Short names of all parameters of the methods, and their stages as paths."""
    names: set[str] = set()
    for method in {cell.spec.method.name for cell in cells}:
        card = registry.card("methods", method)
        names |= {*card.parameters, *(f"stages.{stage}" for stage in card.stages)}
    return names


def _is_foreign(path: str, foreign: set[str]) -> bool:
    return (
        path.split(".")[0] in foreign
        or path in foreign
        or (path.startswith("method.") and path.split(".")[1] in foreign)
    )


def _name(value: Any) -> str:
    return str(value["name"]) if isinstance(value, dict) and "name" in value else str(value)
