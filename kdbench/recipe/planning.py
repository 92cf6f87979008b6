"""From a recipe to its cells: the comparison multiplied out, one cell for each combination and seed."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdbench.errors import UserError, did_you_mean
from kdbench.reading import LONGEST, plain_name
from kdbench.recipe.cells import cell_spec
from kdbench.recipe.choices import TeacherChoice
from kdbench.recipe.datasets import spec_of_card
from kdbench.recipe.loading import load, typed
from kdbench.recipe.networks import teacher_spec
from kdbench.recipe.specs import CellSpec, DataSpec, TeacherSpec
from kdbench.recipe.variants import means_nothing, variants
from kdbench.registry import Registry
from kdbench.tree import Tree

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
    notes: list[str] = field(default_factory=list)


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
        raise UserError("'seeds' needs at least one seed, and each only once", where=tree.origin(("seeds",)))
    cells: dict[str, PlannedCell] = {}
    # A method's keys that the recipe gives for all methods must mean something to one of them, and so must what it
    # compares.
    unused = {key: tree.origin(("method", key)) for key in base.method if "method" in base.compare and key != "name"}
    idle = {path: tree.origin(("compare", path)) for path in base.compare}
    trained = functools.partial(_teacher_cell, registry)
    for order, variant in enumerate(variants(base, tree)):
        first, foreign = cell_spec(variant, seeds[0], registry, trained, weights_must_exist)
        unused = {key: where for key, where in unused.items() if key in foreign}
        axes = {path: value for path, value in variant.axes.items() if not means_nothing(path, foreign)}
        idle = {path: where for path, where in idle.items() if path not in axes}
        for seed in seeds:
            spec = first.model_copy(update={"seed": seed})
            cells.setdefault(spec.identity(), PlannedCell(spec, axes, order))
    for path, where in (unused | idle).items():
        key, known = path.removeprefix("method."), _parameters(cells.values(), registry)
        raise UserError(f"no method of this comparison has '{key}'", where=where, hint=did_you_mean(key, known))
    _check_names(cells.values(), tree)
    methods = list(dict.fromkeys(cell.spec.method.name for cell in cells.values()))
    if base.baseline is not None and base.baseline not in methods:
        raise UserError(
            f"the baseline '{base.baseline}' is not among the methods",
            where=tree.origin(("baseline",)),
            hint=did_you_mean(base.baseline, methods),
        )
    name = run_name(str(recipe)) if not isinstance(recipe, dict) else "recipe"
    data = {part.name for cell in cells.values() for part in (cell.spec.data, cell.spec.target) if part is not None}
    notes = [note for part in sorted(data) for note in registry.notes.get(part, ())]
    return Plan(name, base.title, list(cells.values()), base.baseline or methods[0], tree.data, notes)


# Teachers' recipes that are being planned, to notice a circle.
_open: list[str] = []


@functools.cache
def _teacher_cell(registry: Registry, recipe: str, where: str, data_root: str | None) -> CellSpec:
    """The one cell of a teacher's own recipe."""
    if recipe in _open:
        raise UserError(f"the recipe '{recipe}' needs the teacher that it trains", where=where)
    overrides = () if data_root is None else (f"data.root={data_root}",)
    _open.append(recipe)
    try:
        cells = plan(recipe, registry, overrides).cells
    finally:
        _open.remove(recipe)
    if len(cells) != 1:
        raise UserError(f"a teacher's recipe must have exactly one cell; '{recipe}' has {len(cells)}", where=where)
    return cells[0].spec


def teacher_of_card(
    name: str, registry: Registry, where: str, trained: bool = False, weights_must_exist: bool = True
) -> tuple[TeacherSpec, DataSpec]:
    """A teacher of a card and the data that it knows, without a recipe.

    Args:
        trained: by its own recipe, though the card has weights.
    """
    data = registry.card("teachers", name, where).data.name
    tree = Tree.of({"teacher": {"name": name, "trained": trained}, "data": {"name": data}}, where)
    choice = TeacherChoice(name=name, trained=trained)
    teacher = teacher_spec(choice, tree, registry, functools.partial(_teacher_cell, registry), weights_must_exist)
    return teacher, spec_of_card(data, registry)


def run_name(recipe: str) -> str:
    """What the runs of a recipe's file are called, and their folder beside those of other recipes.

    Raises:
        UserError: a name that not every system takes for a folder, or that runs use for something else.
    """
    name = Path(recipe).stem
    try:
        if plain_name(name).casefold() in OWN_FOLDERS:
            raise ValueError(f"runs keep shared files in a folder called '{name.casefold()}'")
    except ValueError as error:
        raise UserError(
            f"runs are kept in a folder named after the recipe: {error}", where=recipe, hint="rename the recipe's file"
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
                hint="give each its own 'label'",
            )
        seen.add(key)


def _parameters(cells: Iterable[PlannedCell], registry: Registry) -> set[str]:
    """Short names of all parameters of the methods, and their stages as paths."""
    names: set[str] = set()
    for method in {cell.spec.method.name for cell in cells}:
        card = registry.card("methods", method)
        names |= {*card.parameters, *(f"stages.{stage}" for stage in card.stages)}
    return names


def _name(value: Any) -> str:
    return str(value["name"]) if isinstance(value, dict) and "name" in value else str(value)
