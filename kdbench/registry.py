"""The index of cards: every YAML file below the registry folders, found by scanning, read once, checked when used.

A file in a folder named after a kind (`methods/ab.yaml`) maps card keys to cards of that kind. A file directly in a
registry folder maps kinds to such mappings, so that one file can carry a new method with its loss. User folders
(`--registry DIR`) and installed packages (entry point group `kdbench.registry`) add to the built-in cards.
"""

import functools
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kdbench.cards import KINDS, AnalysisCard, CodeCard, LossCard, SourceCard
from kdbench.errors import UserError, did_you_mean, shortened
from kdbench.files import SHARE, paths_of
from kdbench.forms import listed
from kdbench.names import Shipped, targets_in
from kdbench.own_code import check_one_file, own_code_sha256
from kdbench.signature import Parameter, check_options, parameters
from kdbench.told import TOLD, inputs_of, is_module, losses_in
from kdbench.tree import Tree, dotted, shown
from kdbench.tree import walk as paths
from kdbench.validation import validated

# Of an argument of a loss that nobody gives.
_A_TENSOR = (
    "if it is a tensor, its name must begin with student, teacher or other, or be labels, index or mask; or list all "
    "tensors as 'inputs' on the loss's card"
)
# Keywords that the engine fills in; recipes cannot: of models, of connectors, of optimizers, of data sets.
_OF_THE_ENGINE = {
    *("classes", "channels", "image_size"),
    *("student_shape", "teacher_shape"),
    "params",
    *("roots", "download", "cache"),
}

# Keys under which a card's name may be written as plain text: `optimizer: sgd` means `optimizer: {name: sgd}`.
_NAMED_INSIDE = {
    "losses": {"connector", "weight_schedule"},
    "stages": {"optimizer", "schedule", "teacher_optimizer", "teacher_schedule", "source", "begins"},
    "modules": {"optimizer"},
}
_NAMED = {"optimizer", "schedule", "model", "student", "teacher", "data", "protocol", "method"}
# Mappings whose keys are their author's names, or networks.
_AS_WRITTEN = {"parameters", "modes", "batch_norm"}

# How one makes one's own of a kind without Python.
_OWN = {
    "models": "your own network: 'timm:NAME', 'torchvision:NAME', or a card in a folder that '--registry FOLDER' names",
    "methods": "your own method: a card in a folder that '--registry FOLDER' names",
    "losses": "your own loss: a card in a folder that '--registry FOLDER' names",
    "datasets": "your own pictures: 'data: path/to/folder', or 'kdbench data FOLDER', which writes a card",
    "teachers": "your own weights: 'teacher: {model: NAME, weights: FILE}', or a card with the 'recipe' that trains it",
}


class Registry:
    """All cards of all kinds.

    Attributes:
        notes: data set -> what its user should know of how its card was made.

    Args:
        folders: further registry folders, in order. Each is added to `sys.path`, since its cards point at its modules.
    """

    def __init__(self, folders: str | Path | Iterable[str | Path] = ()) -> None:
        self.trees: dict[str, dict[str, Tree]] = {kind: {} for kind in KINDS}
        self.folders = [SHARE / "registry", *_installed()]
        for folder in paths_of(folders, "--registry"):
            if not folder.is_dir():
                what = f"'{folder}' is a file" if folder.exists() else f"there is no registry folder '{folder}'"
                raise UserError(what, "--registry", "give a folder that holds cards and their Python files")
            if folder.resolve() in [known.resolve() for known in self.folders]:
                continue
            self.folders.append(folder)
            if str(folder.resolve()) not in sys.path:
                sys.path.append(str(folder.resolve()))
        self.notes: dict[str, list[str]] = {}
        self._scan(self.folders[0])
        self.shipped = {kind: Shipped.of(kind, trees) for kind, trees in self.trees.items()}
        for folder in self.folders[1:]:
            self._scan(folder)

    def _scan(self, folder: Path) -> None:
        for file in sorted(folder.rglob("*.yaml")):
            tree = Tree.read(file)
            if not isinstance(tree.data, dict):
                raise UserError("a registry file must map names to cards", where=shown(file))
            if "recipes" in file.relative_to(folder).parts or {"data", "student"} <= tree.data.keys():
                continue  # a recipe that lies beside the card of the teacher that it trains
            if file.parent == folder:
                for kind in tree.data:
                    self._add(_known(kind, tree.origin((kind,))), tree.at(kind))
            else:
                self._add(_known(file.parent.name, shown(file)), tree)

    def _add(self, kind: str, tree: Tree) -> None:
        for key, card in (tree.data or {}).items():
            if not isinstance(card, dict):
                raise UserError(f"the card '{key}' is not a mapping", where=tree.origin((key,)))
            if key in self.trees[kind]:
                first = self.trees[kind][key].origin(())
                hint = f"the first is at {first}; choose another key"
                raise UserError(f"there are two cards '{key}' in {kind}", tree.origin((key,)), hint)
            self.trees[kind][key] = tree.at(key)
            if kind == "methods":
                for loss in losses_in(card):
                    # A loss whose signature says all needs no card of its own.
                    self.trees["losses"].setdefault(loss, Tree.of({"target": loss}, tree.origin((key,))))

    def keys(self, kind: str) -> list[str]:
        """Keys of a kind, templates as they stand (`wrn_{depth}_{width}`)."""
        return sorted(self.trees[kind])

    def names(self, kind: str) -> list[str]:
        """Keys of a kind with templates replaced by their examples."""
        result: list[str] = []
        for key in self.keys(kind):
            result.extend(self.trees[kind][key].data.get("examples", []) if "{" in key else [key])
        return result

    def tree(self, kind: str, name: str, where: str | None = None, includers: tuple[str, ...] = ()) -> Tree:
        """A card as a tree, `include` followed, short forms written out.

        Args:
            includers: names of the cards on whose behalf this one is read.
        """
        tree = written_out(self.trees[kind][self._find(kind, name, where)[0]])
        if "include" not in tree.data:
            return tree
        base, place = tree.data["include"], tree.origin(("include",))
        if not isinstance(base, str) or base in (name, *includers):
            raise UserError("'include' must name another card", where=place)
        return _unpaired(self.tree(kind, base, place, (*includers, name)), tree).merged(tree.without("include"))

    def code(self, kind: str, name: str) -> dict[str, Any]:
        """A card's code as fields of a `TargetSpec`: where it is now, and what it counts as in identities."""
        card = self.card(kind, name)
        shipped, key = self.shipped[kind], self._find(kind, name, None)[0]
        counts_as = {target: shipped.name(key, at, target) for at, target in targets_in(card.model_dump())}
        return {
            "target": card.target,
            "counts_as": {target: counted for target, counted in counts_as.items() if target != counted},
            "version": max(card.version, shipped.versions.get(card.target, 1)),
            "source_sha256": own_code_sha256(card.target),
        }

    def card(self, kind: str, name: str, where: str | None = None) -> Any:
        """A card of a kind as its typed form. UserError with the nearest names when there is none."""
        tree = self.tree(kind, name, where)
        card: Any = validated(KINDS[kind], tree, f"{singular(kind)} card '{name}'")
        settings = [(".settings", tree.data["settings"])] if tree.data.get("settings") else []
        for at, target in [*targets_in(tree.data), *settings]:
            # A target whose file and object can be found, without importing it.
            try:
                check_one_file(target, self.folders[1:])
                parameters(target)
            except UserError as error:
                path = tuple(at.split(".")[1:]) or ("target",)
                raise UserError(error.what, error.where or tree.origin(path), error.hint) from None
        if isinstance(card, LossCard) and card.inputs is None:
            card = card.model_copy(update={"inputs": inputs_of(card.target)})
        return card

    def fields(self, kind: str, name: str) -> dict[str, Any]:
        """What a template key's fields stand for in a name: `wrn_16_2` -> {depth: 16, width: 2}."""
        return self._find(kind, name, None)[1]

    def _find(self, kind: str, name: str, where: str | None) -> tuple[str, dict[str, Any]]:
        """The key of the card that a name means, and a template key's fields."""
        if not isinstance(name, str):
            hint = "write the name of one; to compare several, list them under 'compare'"
            raise UserError(f"the name of a {singular(kind)} is a text, not {shortened(name)}", where, hint)
        if name in self.trees[kind] and "{" not in name:
            return name, {}
        for key in self.keys(kind):
            match = _match(key, name, self.trees[kind][key].data.get("target"))
            if match is not None:
                return key, match
        hint = did_you_mean(name, self.names(kind), _OWN.get(kind, ""))
        raise UserError(f"unknown {singular(kind)} '{name}'", where=where, hint=hint)

    def options(
        self, kind: str, given: Tree, own: tuple[str, ...] = ("name",), what: str | None = None
    ) -> dict[str, Any]:
        """Typed options of a named thing: the card's fixed args, a template's fields, and what is given.

        Args:
            given: the mapping in which the options stand.
            own: its keys that are no options. The first one holds the name.
            what: for messages.
        """
        name = given.data[own[0]]
        card = self.card(kind, name, given.origin(own[:1]))
        args = getattr(card, "args", {})
        origins = {key: self.tree(kind, name).origin(("args", key)) for key in args}
        options = args | self.fields(kind, name)
        what = what or f"{singular(kind)} '{name}'"
        settable = self.settable(card)
        if hidden := [key for key in own if key in settable and key not in options]:
            hint = f"rename that parameter in {card.target.partition(':')[0]}, or set it under the card's 'args'"
            raise UserError(
                f"{what} has a parameter '{hidden[0]}', which nobody can set: the word has a meaning here",
                given.origin(own[:1]),
                hint,
            )
        for key, value in given.data.items():
            if key not in own:
                options[key] = value
                origins[key] = given.origin((key,))
        where, if_missing = (lambda key: origins.get(key, given.origin(()))), _A_TENSOR if kind == "losses" else ""
        # An analysis takes its options from the command line.
        words = f"write '{{}}=VALUE': 'kdbench show analyses {name}' tells which" if kind == "analyses" else "add '{}:'"
        return check_options(options, settable, where, what, own[1:], if_missing, words)

    def settable(self, card: CodeCard) -> dict[str, Parameter]:
        """Parameters of a card's code that it or a recipe may set: not its tensors, not what the engine fills in."""
        tensors = (card.inputs if isinstance(card, LossCard) else None) or ()
        taken = _OF_THE_ENGINE | TOLD.keys() | {*tensors}
        # A source is built with its context first, whatever its author calls that, and so is an analysis.
        inputs = 1 if isinstance(card, SourceCard | AnalysisCard) else len(tensors)
        if isinstance(card, LossCard) and parameters(card.target) != parameters(card.target, called=True):
            # A class is built with shapes, and its instances take the tensors.
            inputs = len({"student", "teacher"} & {*tensors})
        settings = card.settings if isinstance(card, SourceCard) else None
        known = [*parameters(card.target).values(), *(parameters(settings).values() if settings else ())]
        options = [p for i, p in enumerate(known) if not (p.positional and i < inputs)]
        return {p.name: p for p in options if p.name not in taken and not is_module(p)}


def _known(kind: str, where: str) -> str:
    if kind not in KINDS:
        raise UserError(f"unknown kind of card '{kind}'", where, did_you_mean(kind, KINDS))
    return kind


def singular(kind: str) -> str:
    special = {
        "analyses": "analysis",
        "losses": "loss",
        "hooks": "hooks",
        "datasets": "data set",
        "published": "published table",
        "studies": "study",
    }
    return special.get(kind, kind[:-1])


def _unpaired(base: Tree, own: Tree) -> Tree:
    """A card that another includes, without what its `pairs` say of parameters that the other sets itself."""
    short, pairs = base.data.get("parameters"), base.data.get("pairs")
    if not (isinstance(pairs, list) and isinstance(short, dict)):
        return base
    said = {dotted(path) for path in paths(own.data)}
    kept = [
        {key: value for key, value in pair.items() if said.isdisjoint(map(str, listed(short.get(key))))}
        if isinstance(pair, dict)
        else pair
        for pair in pairs
    ]
    return Tree(base.data | {"pairs": kept}, base.origins)


def written_out(tree: Tree, recipe: bool = False) -> Tree:
    """A tree with short forms written out: `optimizer: sgd` -> `{name: sgd}`, a list of named stages -> a mapping.

    Args:
        recipe: whether it is a recipe, whose `target` is a data card, not what a card calls.
    """
    origins = dict(tree.origins)

    def walk(data: Any, path: tuple[str | int, ...]) -> Any:
        if not isinstance(data, dict) or {*path[-1:]} & _AS_WRITTEN:
            return data
        last, parent = [str(part) for part in ("", "", *path)][:-3:-1]
        keys: set[str] = _NAMED_INSIDE.get(parent, _NAMED)
        if last == "predicts":
            keys = set()
        elif last in ("modules", "schedules"):
            keys = {*data}
        if not path:
            keys = keys | {"compute"} | ({"target"} if recipe else set())
        result = {}
        for key, value in data.items():
            here = (*path, key)
            if key in keys and isinstance(value, str):
                word = "mode" if key == "compute" else "name"
                value = {word: value}
                origins[(*here, word)] = tree.origin(here)
            elif key == "teacher" and recipe and not path and isinstance(value, list):
                value = {"several": [walk(one, ("teacher", i)) for i, one in enumerate(_each_named(value))]}
                origins.update({("teacher", "several", *p[1:]): o for p, o in tree.origins.items() if p[:1] == here})
            elif key in ("weight_schedule", "transforms") and isinstance(value, list):
                value = _each_named(value)
            elif key == "stages" and isinstance(value, list):
                value = _stages_by_name(value, here, origins, tree)
            result[key] = walk(value, here)
        return result

    return Tree(walk(tree.data, ()), origins)


def _each_named(several: list[Any]) -> list[Any]:
    return [{"name": one} if isinstance(one, str) else one for one in several]


def _stages_by_name(stages: list[Any], path: tuple[str | int, ...], origins: dict[Any, str], tree: Tree) -> Any:
    result = {}
    for index, stage in enumerate(stages):
        where = tree.origin((*path, index))
        if not isinstance(stage, dict) or not isinstance(stage.get("name"), str):
            raise UserError("every stage needs a 'name'", where=where, hint="add 'name:'")
        name = stage["name"]
        if name in result:
            raise UserError(f"two stages are called '{name}'", where=where, hint="use different names")
        result[name] = {key: value for key, value in stage.items() if key != "name"}
        n = len(path) + 1
        moved = {(*path, name, *p[n:]): o for p, o in tree.origins.items() if p[:n] == (*path, index)}
        origins.update(moved)
    return result


def _match(key: str, name: str, target: Any) -> dict[str, Any] | None:
    """Fields of a template key that make it this name, or None."""
    # Most templates are not the name's: only where one may be is its code asked for the types of its fields.
    if "{" not in key or not re.fullmatch(_pattern(key), name):
        return None
    types = {p.name: p.type for p in parameters(target).values()} if isinstance(target, str) else {}
    numbers = frozenset(field for field, type_ in types.items() if type_ is int)
    match = re.fullmatch(_pattern(key, numbers), name)
    return match and {f: int(v) if f in numbers else v for f, v in match.groupdict().items()}


@functools.cache
def _pattern(key: str, numbers: frozenset[str] = frozenset()) -> str:
    """The names that a template key stands for, with a group for each field."""
    pattern = ""
    for part in re.split(r"(\{\w+\})", key):
        field = part[1:-1]
        found = r"\d+" if field in numbers else ".+"
        pattern += f"(?P<{field}>{found})" if part.startswith("{") else re.escape(part)
    return pattern


def _installed() -> list[Path]:
    """Registry folders of installed packages. The entry point names a package whose folder holds the cards."""
    folders = []
    for point in importlib.metadata.entry_points(group="kdbench.registry"):
        top, *rest = point.value.split(".")
        spec = importlib.util.find_spec(top)
        locations = list(spec.submodule_search_locations or []) if spec else []
        folder = Path(locations[0]).joinpath(*rest) if locations else None
        if folder is None or not folder.is_dir():
            hint = "reinstall or remove that package"
            raise UserError(f"the entry point '{point.name}' names no folder: {point.value}", "kdbench.registry", hint)
        folders.append(folder)
    return folders
