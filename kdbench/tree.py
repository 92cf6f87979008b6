"""YAML as plain data that remembers, for every node, the file and line it came from.

Errors in a recipe or card can then say where they are, also after includes, card defaults and overrides were merged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from numbers import Integral
from pathlib import Path as FilePath
from typing import Any

import yaml

from kdbench.errors import UserError
from kdbench.reading import CONTROL, DEEPEST, WIDEST, read_text

# Of one file, with what its aliases stand for.
MOST_ENTRIES = 100_000

Path = tuple[str | int, ...]

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# What YAML 1.1 reads as an octal number, and as hours, minutes and seconds.
_OTHER_BASE = re.compile(r"^[+-]?(0[0-7_]+|\d[\d_]*(:[0-5]?\d)+(\.\d*)?)$")
SCIENTIFIC = re.compile(r"^[+-]?\d+(\.\d*)?[eE][+-]?\d+$")


class Tree:
    """Nested dicts and lists with an origin ("file:line") for every path."""

    def __init__(self, data: Any, origins: dict[Path, str]) -> None:
        self.data = data
        self.origins = origins

    @classmethod
    def read(cls, file: FilePath) -> Tree:
        """Parse one YAML file (safe types only; a key given twice is an error, not a silent overwrite)."""
        return cls.parse(read_text(file), shown(file))

    @classmethod
    def parse(cls, text: str, source: str) -> Tree:
        """Parse YAML text; `source` names it in messages."""
        try:
            node = yaml.compose(text, Loader=_Loader)
            origins: dict[Path, str] = {(): f"{source}:1"}
            data = _construct(node, (), source, origins) if node is not None else {}
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f":{mark.line + 1}" if mark else ""
            hint = "check the indentation, the colons and the brackets of this line and the one above"
            if mark and re.match(r"\s*\t", (text.split("\n") + [""])[mark.line]):
                hint = "indent with spaces, not with tabs"
            raise UserError(f"not valid YAML: {error.problem or error.context}", f"{source}{line}", hint) from None
        except yaml.YAMLError as error:
            raise UserError(f"not valid YAML: {error}", where=source) from None
        except RecursionError:
            raise UserError(f"nested more than {DEEPEST} deep", where=source) from None
        return cls(data, origins)

    @classmethod
    def of(cls, data: Any, origin: str) -> Tree:
        """A tree from plain data, all of one origin (the command line, Python)."""
        return cls(data, dict.fromkeys(walk(data), origin))

    def origin(self, path: Path) -> str:
        """Origin of a path, or of its nearest known ancestor."""
        while path not in self.origins and path:
            path = path[:-1]
        return self.origins.get(path, "?")

    def at(self, *path: str | int) -> Tree:
        """The subtree below a path that exists."""
        data = self.data
        for key in path:
            data = data[key]
        n = len(path)
        return Tree(data, {p[n:]: o for p, o in self.origins.items() if p[:n] == path} | {(): self.origin(path)})

    def without(self, *keys: str) -> Tree:
        """This mapping without some of its keys."""
        return Tree({key: value for key, value in self.data.items() if key not in keys}, self.origins)

    def merged(self, over: Tree, whole: Collection[Path] = ()) -> Tree:
        """This tree with another laid over it: mappings merge, everything else is replaced. A mapping that has a `name`
        replaces a mapping of another name whole: the options of one optimizer say nothing to another.

        Args:
            whole: paths of mappings that replace one of the same name too.
        """
        origins = dict(self.origins)
        data = _merge(self.data, over.data, (), origins, over.origins, whole)
        return Tree(data, origins)

    def put(self, path: Path, value: Tree) -> Tree:
        """This tree with `value` laid over it at `path` (missing mappings on the way are made)."""
        data: Any = value.data
        for key in reversed(path):
            data = {key: data}
        origins = {path + p: o for p, o in value.origins.items()}
        for n in range(len(path)):
            origins.setdefault(path[:n], value.origin(()))
        return self.merged(Tree(data, origins))


def plain(data: Any) -> Any:
    """Data from Python as YAML would give it: numbers of NumPy and torch, tuples and paths become plain ones."""
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, os.PathLike):
        return os.fspath(data)
    if hasattr(data, "state_dict"):
        hint = "write a card of the kind 'models' with its class as 'target', and save its weights into a file"
        raise UserError(f"a recipe names a network, and cannot hold one: {type(data).__name__}", "recipe", hint)
    if hasattr(data, "tolist"):
        return data.tolist()
    if isinstance(data, list | tuple | set | range):
        return [plain(value) for value in data]
    return int(data) if isinstance(data, Integral) and not isinstance(data, bool) else data


def text(value: Any) -> str:
    """A value of a recipe as people read it: a mapping by its name and its other entries, a float without noise."""
    if isinstance(value, Mapping):
        rest = [f"{key} {text(part)}" for key, part in value.items() if key != "name"]
        return ", ".join([*([str(value["name"])] if "name" in value else []), *rest])
    if isinstance(value, list | tuple):
        return ", ".join(text(part) for part in value)
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def shown(file: FilePath) -> str:
    """A path as the user would write it: relative where that is shorter."""
    try:
        relative = file.resolve().relative_to(FilePath.cwd())
    except ValueError:
        return str(file)
    return str(relative)


def walk(data: Any, path: Path = ()) -> Iterator[Path]:
    """All paths of nested data, the root first."""
    yield path
    if isinstance(data, dict):
        for key, value in data.items():
            yield from walk(value, (*path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from walk(value, (*path, index))


def dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)


def _construct(node: yaml.Node, path: Path, source: str, origins: dict[Path, str]) -> Any:
    origins.setdefault(path, f"{source}:{node.start_mark.line + 1}")
    if len(path) > DEEPEST:
        raise RecursionError
    if len(origins) > MOST_ENTRIES:
        raise UserError(f"more than {MOST_ENTRIES:,} entries after expanding aliases", where=source)
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where = f"{source}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError("a key must be a plain word", where=where)
            if bad := CONTROL.search(key := key_node.value):
                raise UserError(f"a key contains the character {bad[0]!r}", where=where, hint="remove it")
            if key == "<<":
                raise UserError("YAML merge keys are not supported", where=where, hint="use 'include:' instead")
            if key in result:
                raise UserError(f"the key '{key}' is given twice in one mapping", where=where, hint="keep one of them")
            origins[(*path, key)] = where
            result[key] = _construct(value_node, (*path, key), source, origins)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child, (*path, index), source, origins) for index, child in enumerate(node.value)]
    try:
        scalar = yaml.constructor.SafeConstructor().construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"not a valid YAML value: {error}", where=f"{source}:{node.start_mark.line + 1}") from None
    if isinstance(scalar, int | float) and _OTHER_BASE.match(node.value):
        hint = "write a plain number, or a text in quotes"
        raise UserError(f"'{node.value}' would be read as {scalar}", f"{source}:{node.start_mark.line + 1}", hint)
    if isinstance(scalar, int) and abs(scalar) > WIDEST:
        raise UserError("this number is too large", f"{source}:{node.start_mark.line + 1}", "write a smaller one")
    if isinstance(scalar, str) and (bad := CONTROL.search(scalar)):
        where = f"{source}:{node.start_mark.line + 1}"
        raise UserError(f"a text contains the character {bad[0]!r}", where=where, hint="remove it")
    # YAML 1.1 takes 1e-3 for text because it lacks the dot; nobody who writes it means text.
    if isinstance(scalar, str) and not getattr(node, "style", None) and SCIENTIFIC.match(scalar):
        return float(scalar)
    return scalar


def _merge(
    base: Any, over: Any, path: Path, origins: dict[Path, str], over_origins: dict[Path, str], whole: Collection[Path]
) -> Any:
    both = isinstance(base, dict) and isinstance(over, dict)
    # A named card and one's own model say who teaches in two ways: the later one holds whole.
    forms = ("model", "name", "several")
    other_form = (
        both
        and path[-1:] == ("teacher",)
        and any(form in over for form in forms)
        and any((form in over) != (form in base) for form in ("model", "several"))
    )
    # What is said of a method without its name holds whatever is named.
    other_name = both and "name" in over and base.get("name", over["name"]) != over["name"]
    replaced = path in whole and both and ("name" in base or "name" not in over)
    if both and not (other_form or other_name or replaced):
        result = dict(base)
        if path in over_origins and path not in origins:
            origins[path] = over_origins[path]
        for key, value in over.items():
            if key in result:
                result[key] = _merge(result[key], value, (*path, key), origins, over_origins, whole)
            else:
                result[key] = value
                _take(origins, over_origins, (*path, key))
        return result
    _take(origins, over_origins, path)
    return over


def _take(origins: dict[Path, str], over_origins: dict[Path, str], path: Path) -> None:
    n = len(path)
    for known in [p for p in origins if p[:n] == path]:
        del origins[known]
    origins.update({p: o for p, o in over_origins.items() if p[:n] == path})
