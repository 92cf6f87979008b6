"""From a recipe to its cells: the comparison multiplied out, one cell for each combination and seed."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdbench.errors import UserError, did_you_mean
from kdbench.files import OWN_FOLDERS, SHARE
from kdbench.reading import LONGEST, plain_name
from kdbench.recipe.cells import cell_spec
from kdbench.recipe.choices import TeacherChoice, Tune
from kdbench.recipe.datasets import check_parts, spec_of_card
from kdbench.recipe.differences import differences, shown
from kdbench.recipe.loading import load, typed_recipe
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.networks import teacher_spec
from kdbench.recipe.remarks import remarks
from kdbench.recipe.specs import CellSpec, TeacherSpec, recorded
from kdbench.recipe.tuning import Tuning
from kdbench.recipe.variants import MOST_CELLS, Variant, means_nothing, variants
from kdbench.registry import Registry
from kdbench.tree import Tree, text, walk


def cell_name(label: str, axes: Mapping[str, Any]) -> str:
    """A cell as people call it: its method and what else was compared."""
    compared = (f"{path} {text(value)}" for path, value in axes.items() if not path.startswith("method"))
    return ", ".join([label, *compared])


def identity_of(name: str) -> str:
    """What a cell's folder is called whatever else was compared: the end of its name."""
    return name[-8:]


@dataclass(frozen=True)
class PlannedCell:
    """A cell with its place in the comparison. `axes`: compared dotted path -> value (without the seed). `tuning`: how
    its setting was chosen, as its record says it."""

    spec: CellSpec
    axes: dict[str, Any]
    order: int
    tuning: dict[str, Any] | None = None

    @property
    def slug(self) -> str:
        """Folder name: readable, and different for cells that differ in anything that affects numbers."""
        return self.slugs[0]

    @functools.cached_property
    def slugs(self) -> list[str]:
        """The folder's name, and the one that an earlier version gave it."""
        parts = [self.spec.method.name]
        parts += [f"{path.rpartition('.')[2]}_{_name(value)}" for path, value in self.axes.items() if path != "method"]
        plain = "".join(c if c.isalnum() or c in "-_.=" else "_" for c in "-".join(parts))
        ends = [f"-seed{self.spec.seed}-{identity[:8]}" for identity in self.spec.identities()]
        # What is too long for a folder's name is cut: the identity tells cells apart.
        return [plain.encode()[: LONGEST - len(end)].decode(errors="ignore") + end for end in ends]


@dataclass(frozen=True)
class Candidate:
    """A setting that a recipe tries: dotted path -> value, none for the recipe's own. `tried`: a cell for each seed of
    tuning, on the validation part. `cells`: what the table gets if it is chosen."""

    setting: dict[str, Any]
    tried: list[PlannedCell]
    cells: list[PlannedCell]


@dataclass(frozen=True)
class Plan:
    """All cells of a recipe in the order of the comparison, a combination's seeds together.

    `candidates`: of a recipe that tunes, order of a combination -> what it tries. Until one is chosen
    (`kdbench.engine.workers.tuning`), `cells` are those of the first. `tune`: what the recipe says.
    """

    name: str
    title: str
    cells: list[PlannedCell]
    baseline: str
    recipe: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    candidates: dict[int, list[Candidate]] = field(default_factory=dict)
    tune: Tune | None = None
    origins: dict[str, str] = field(default_factory=dict)

    @functools.cached_property
    def tried(self) -> list[PlannedCell]:
        """The cells of all candidates, each once."""
        every = (cell for several in self.candidates.values() for one in several for cell in one.tried)
        return list({cell.spec.identity(): cell for cell in every}.values())

    @property
    def remarks(self) -> list[str]:
        """Sentences on what may surprise in it: its notes, and what its cells give to say."""
        return [*self.notes, *remarks(cell.spec for cell in self.cells)]

    def placed(self, error: UserError) -> UserError:
        """An error of what was built from this plan, with the place in the recipe of the first thing that it quotes, or
        that of the user's own loss term that it is about.

        Of an optimizer that only a card names, for one, the recipe may give numbers: then it is that of its kind. The
        method and the stage in which it is come last.
        """
        # They begin "method 'x', stage 'y': loss 'z' …" or "method 'x': y/z: …".
        head = re.match(r"method '([^']+)'(?:, stage '([^']+)')?: ", error.what)
        rest = error.what[head.end() :] if head else error.what
        term = re.match(r"loss '([^']+)'" if head and head[2] else r"[\w-]+/([\w-]+)", rest)
        of_card = [f"method '{head[1]}': " + (f"{head[2]}/{term[1]}" if head[2] else term[0])] if head and term else []
        words = [*re.findall(r"'([^']+)'", rest), *of_card, *re.findall(r"(\w+) '", rest)]
        words += [word for word in (head.groups() if head else ()) if word]
        where = next((self.origins[word] for word in words if word in self.origins), None)
        return UserError(error.what, error.where or where, error.hint)


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
    base = typed_recipe(tree)
    # No more than are too many: how many cells there are is checked with the comparison.
    seeds = list(range(min(base.seeds, MOST_CELLS))) if isinstance(base.seeds, int) else base.seeds
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError("'seeds' needs at least one seed, and each only once", where=tree.origin(("seeds",)))
    # A method's keys that the recipe gives for all methods must mean something to one of them, and so must what it
    # compares.
    unused = {key: tree.origin(("method", key)) for key in base.method if "method" in base.compare and key != "name"}
    idle = {path: tree.origin(("compare", path)) for path in base.compare}
    trained = functools.partial(_teacher_cell, registry)
    tuning = Tuning(base.tune, tree) if base.tune is not None else None
    cells, candidates = dict[str, PlannedCell](), dict[int, list[Candidate]]()
    seen, origins = dict[str, str](), _words(tree)

    def resolved(variant: Variant) -> tuple[CellSpec, set[str]]:
        spec, foreign, method = cell_spec(variant, seeds[0], registry, trained, weights_must_exist)
        origins.update(_terms(spec, method))
        return spec, foreign

    for order, variant in enumerate(variants(base, tree)):
        first, foreign = resolved(variant)
        unused = {key: where for key, where in unused.items() if key in foreign}
        axes = {path: value for path, value in variant.axes.items() if not means_nothing(path, foreign)}
        idle = {path: where for path, where in idle.items() if path not in axes}
        if _is_repeated(first, seen, tree):
            continue
        found = [PlannedCell(first.model_copy(update={"seed": seed}), axes, order) for seed in seeds]
        if tuning is not None and (tried := _candidates(tuning, variant, found, resolved)):
            candidates[order], found = tried, tried[0].cells
        for cell in found:
            cells.setdefault(cell.spec.identity(), cell)
    if tuning is not None:
        tuning.check(seeds)
    for path, where in (unused | idle).items():
        key, known = path.removeprefix("method."), _parameters(cells.values(), registry)
        raise UserError(f"no method of this comparison has '{key}'", where=where, hint=did_you_mean(key, known))
    _check_names(cells.values(), tree)
    name = run_name(str(recipe)) if not isinstance(recipe, dict) else "recipe"
    planned = list(cells.values())
    data = {part.name for cell in planned for part in cell.spec.domains}
    notes = [note for part in sorted(data) for note in registry.notes.get(part, ())]
    baseline = _baseline(base.baseline, planned, tree)
    return Plan(name, base.title, planned, baseline, tree.data, notes, candidates, base.tune, origins)


def _baseline(asked: str | None, cells: list[PlannedCell], tree: Tree) -> str:
    """The method that is compared with: the one asked for, else the first."""
    methods = list(dict.fromkeys(cell.spec.method.name for cell in cells))
    if asked is not None and asked not in methods:
        what = f"the baseline '{asked}' is not among the methods"
        raise UserError(what, tree.origin(("baseline",)), did_you_mean(asked, methods))
    return asked or methods[0]


def _candidates(
    tuning: Tuning, variant: Variant, cells: list[PlannedCell], resolved: Callable[[Variant], tuple[CellSpec, set[str]]]
) -> list[Candidate]:
    """What a variant tries, each setting once; nothing where its method has nothing that is tuned.

    Args:
        cells: of the variant itself, one for each seed.
    """
    keys = tuning.keys(variant)
    _, foreign = resolved(tuning.laid_over(variant, tuning.lowest(keys), keys))
    keys = {path: key for path, key in keys.items() if not means_nothing(path, foreign)}
    tuning.idle -= {*keys.values()}
    found: dict[str, Candidate] = {}
    for setting in tuning.settings(keys) if keys else ():
        spec, _ = resolved(tuning.laid_over(variant, setting, keys))
        own = [replace(cell, spec=spec.model_copy(update={"seed": cell.spec.seed})) for cell in cells]
        tried = [_tried(own[0], setting, seed, tuning) for seed in tuning.tune.seeds]
        found.setdefault(spec.identity(), Candidate(setting, tried, own))
        if len(found) == tuning.tune.trials:
            return list(found.values())
    if keys:
        raise tuning.other_number(len(found), keys)
    return []


def _tried(cell: PlannedCell, setting: dict[str, Any], seed: int, tuning: Tuning) -> PlannedCell:
    """A cell of the table as it is tried: with another seed, and tested on images of the training set.

    Raises:
        UserError: the table is tested on such images too, or there are too few of them.
    """
    spec, where = cell.spec, tuning.origin("validation")
    if spec.data.tested_on == "validation":
        what = "settings would be chosen by the validation part, on which the table is tested too"
        raise UserError(what, where, "leave out 'tune' or 'tested_on: validation'")
    part = {"validation": spec.data.validation or tuning.tune.validation, "tested_on": "validation"}
    data = spec.data.model_copy(update=part)
    check_parts(data, where, where)
    said = [f"{path.removeprefix('method.')} {_name(value)}" for path, value in setting.items()]
    changes = {
        "data": data,
        "method": spec.method.model_copy(update={"label": ", ".join([spec.method.label, *said])}),
        "seed": seed,
    }
    return PlannedCell(spec.model_copy(update=changes), cell.axes, cell.order)


def _terms(spec: CellSpec, method: Tree) -> dict[str, str]:
    """How errors of a method's loss terms begin -> where its author wrote the connector, or the term. Shipped cards are
    right: there the recipe must have named what does not fit."""
    found: dict[str, str] = {}
    for stage, name, _ in spec.method.named_terms:
        path = ("stages", stage, "losses", name)
        where = method.origins.get((*path, "connector")) or method.origin(path)
        if not Path(where.rpartition(":")[0]).resolve().is_relative_to(SHARE.resolve() / "registry"):
            found[f"method '{spec.method.name}': {stage}/{name}"] = where
    return found


def _words(tree: Tree) -> dict[str, str]:
    """Keys and texts of a recipe -> where they stand, the more particular last."""
    found: dict[str, str] = {}
    for path in sorted(walk(tree.data), key=len):
        value = functools.reduce(lambda data, key: data[key], path, tree.data)
        for word in (str(path[-1]).rpartition(".")[2] if path else "", value):
            if isinstance(word, str) and word:
                # Errors of timm's and torchvision's networks quote the name without the library.
                found[word] = found[word.rpartition(":")[2]] = tree.origin(path)
    return found


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
        planned = plan(recipe, registry, overrides)
    finally:
        _open.remove(recipe)
    if len(cells := planned.cells) != 1:
        raise UserError(f"a teacher's recipe must have exactly one cell; '{recipe}' has {len(cells)}", where=where)
    if planned.candidates:
        raise UserError(f"a teacher's recipe cannot be tuned: '{recipe}'", where=where, hint="remove its 'tune:'")
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
    seen: dict[str, CellSpec] = {}
    for cell in cells:
        key = repr((cell.spec.method.label, cell.axes, cell.spec.seed))
        if key in seen:
            found = list(differences(recorded(seen[key]), recorded(cell.spec)))
            # Of two methods all differs: their names say which they are.
            named = [one for one in found if one[0] == "method.name"]
            what = f"two different cells are both called '{cell.spec.method.label}': {shown(named or found)}"
            raise UserError(what, tree.origin(("compare", "method")), "give each its own 'label'")
        seen[key] = cell.spec


def _is_repeated(spec: CellSpec, seen: dict[str, str], tree: Tree) -> bool:
    """Whether the comparison has this cell already, as a method without a compared parameter.

    Args:
        seen: identity -> label of the cells before, to which this one is added.

    Raises:
        UserError: it is called otherwise there, so a row that was asked for would be left out.
    """
    identity, label = spec.identity(), spec.method.label
    if (before := seen.get(identity, label)) != label:
        what = f"'{before}' and '{label}' are the same method under two names"
        raise UserError(what, tree.origin(("compare", "method")), "leave one of them out")
    repeated = identity in seen
    seen[identity] = label
    return repeated


def _parameters(cells: Iterable[PlannedCell], registry: Registry) -> set[str]:
    """Short names of all parameters of the methods, and their stages as paths."""
    names: set[str] = set()
    for method in {cell.spec.method.name for cell in cells}:
        card = registry.card("methods", method)
        names |= {*card.parameters, *(f"stages.{stage}" for stage in card.stages)}
    return names


def _name(value: Any) -> str:
    return str(value["name"]) if isinstance(value, dict) and "name" in value else str(value)
