"""What a target accepts, read from its source without importing it.

Cards point at functions and classes by `module:object`. Their parameters, types and defaults stand in one place, the
signature; reading it with `ast` lets a misspelt option be reported before torch (seconds of import) is loaded.
"""

import ast
import copy
import functools
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from kdbench.errors import UserError, did_you_mean, number_meant

REQUIRED = object()

_TYPES: dict[str, Any] = {
    **{kind.__name__: kind for kind in (int, float, bool, str, list, tuple, dict)},
    "Literal": Literal,
}


@dataclass(frozen=True)
class Parameter:
    """One keyword a target takes. `type` is None where the annotation is not a plain one (tensors, shapes)."""

    name: str
    type: Any
    annotation: str
    default: Any
    positional: bool


def parameters(target: str, called: bool = False) -> dict[str, Parameter]:
    """Parameters of a target by name, in order. Raises UserError when module or object cannot be found.

    Args:
        called: of a class, those of its `forward`, which its instances take when they are called.
    """
    module_name, _, object_name = target.partition(":")
    file = source_file(module_name, target)
    return _parameters(file, written(file), object_name, called)


def written(file: Path) -> tuple[int, int]:
    """What tells whether a file was written again: a long-lived process, such as a notebook's, must read it again."""
    status = file.stat()
    return status.st_mtime_ns, status.st_size


@functools.cache
def _parameters(file: Path, of: tuple[int, int], object_name: str, called: bool) -> dict[str, Parameter]:
    try:
        tree = ast.parse(importlib.util.decode_source(file.read_bytes()))
    except UnicodeDecodeError as error:
        raise UserError(f"not text in UTF-8: {error}", str(file), "save it as text in UTF-8") from None
    except SyntaxError as error:
        raise UserError(f"not valid Python: {error.msg}", where=f"{file}:{error.lineno}") from None
    _write_out(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == object_name:
            return _from_arguments(node.args, skip=0)
        if isinstance(node, ast.ClassDef) and node.name == object_name:
            classes = [*_with_bases(node, {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)})]
            for item in (item for of in classes for item in of.body):
                if isinstance(item, ast.FunctionDef) and item.name == ("forward" if called else "__init__"):
                    return _from_arguments(item.args, skip=1)
            return {} if called else _from_fields(classes)
    names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    raise UserError(f"{file.name} defines no function or class '{object_name}'", hint=did_you_mean(object_name, names))


def _write_out(tree: ast.Module) -> None:
    """Write out, in a file's annotations, the names that it gives to plain types: `Form = Literal["a", "b"]`."""
    names: dict[str, ast.expr] = {}
    for node in tree.body:
        place = (
            node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", getattr(node, "name", None))
        )
        value = getattr(node, "value", None)
        if isinstance(place, ast.Name) and isinstance(value, ast.Name | ast.Subscript | ast.BinOp):
            names[place.id] = value
    for typed in ast.walk(tree):
        if isinstance(typed, ast.arg | ast.AnnAssign) and typed.annotation is not None:
            found = _WrittenOut(names).visit(copy.deepcopy(typed.annotation))
            if _plain_type(text := ast.unparse(found)) is not None and text != ast.unparse(typed.annotation):
                typed.annotation = found


class _WrittenOut(ast.NodeTransformer):
    def __init__(self, names: Mapping[str, ast.expr]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id not in self.names:
            return node
        # A name of itself leads nowhere.
        others = {name: value for name, value in self.names.items() if name != node.id}
        return _WrittenOut(others).visit(copy.deepcopy(self.names[node.id]))


def _with_bases(node: ast.ClassDef, known: Mapping[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    """A class, and what it inherits from in its own file."""
    yield node
    for base in node.bases:
        # A class that inherits from its own name is of a later time of the file.
        if isinstance(base, ast.Name) and base.id in known and base.id != node.name:
            yield from _with_bases(known[base.id], {name: one for name, one in known.items() if name != node.name})


def source_file(module_name: str, target: str) -> Path:
    """File of a module, found without importing its parent packages."""
    top, *rest = module_name.split(".")
    spec = getattr(sys.modules[top], "__spec__", None) if top in sys.modules else importlib.util.find_spec(top)
    # A package without an __init__.py has no file of its own, and may lie in several folders.
    if spec is None or not (rest or spec.origin):
        hint = "a target is module:object; the module must be importable or lie in the registry's folder"
        raise UserError(f"target '{target}': there is no module '{top}'", hint=hint)
    if not rest:
        return Path(str(spec.origin))
    paths = [Path(folder).joinpath(*rest) for folder in spec.submodule_search_locations or ()]
    if file := next(filter(None, map(module_at, paths)), None):
        return file
    what = f"target '{target}': there is no module '{module_name}'"
    raise UserError(what, hint=did_you_mean(rest[-1], [f.stem for path in paths for f in path.parent.glob("*.py")]))


def module_at(path: Path) -> Path | None:
    """The file of a package or module at a path without suffix, if there is one."""
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def check_options(
    options: dict[str, Any],
    known: dict[str, Parameter],
    where: Callable[[str | None], str],
    what: str,
    also_known: tuple[str, ...] = (),
    if_missing: str = "",
    giving: str = "add '{}:'",
) -> dict[str, Any]:
    """Options for a target, typed: numbers given as text, unknown names and missing ones are errors.

    Args:
        where: function from an option's name (or None) to "file:line".
        known: the parameters that options may name (without tensors and shapes).
        also_known: further keys allowed at the same place, for suggestions only.
        if_missing: what a missing one of no plain type may be, if it is no option.
        giving: how one is given, with a place for its name; for hints.
    """
    result: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            hint = did_you_mean(name, [*known, *also_known])
            if not (known or also_known):
                hint = "it takes none: options are the arguments of its function, or of its class's own '__init__'"
            raise UserError(f"unknown key '{name}' for {what}", where=where(name), hint=hint)
        result[name] = _typed(value, known[name], where(name), what)
    missing = [p for p in known.values() if p.default is REQUIRED and p.name not in result]
    if missing:
        hint = giving.format(missing[0].name) + (f"; {if_missing}" if if_missing and missing[0].type is None else "")
        raise UserError(f"{what} needs '{missing[0].name}'", where=where(None), hint=hint)
    return result


def _typed(value: Any, parameter: Parameter, where: str, what: str) -> Any:
    if not _finite(value):
        raise UserError(f"'{parameter.name}' of {what} cannot be {value}", where=where, hint="it must be finite")
    if parameter.type is None:
        return value
    try:
        # By way of JSON, where a list may stand for a tuple but text never for a number.
        return TypeAdapter(parameter.type).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError):
        hint = f"it must be {parameter.annotation}"
        if isinstance(value, str) and parameter.type in (int, float):
            hint += f"; {number_meant(value)}"
        if isinstance(value, list) and not re.search(r"\b(list|tuple)\b", parameter.annotation):
            hint += "; to compare several, list them under 'compare'"
        if "str" in parameter.annotation and isinstance(value, int | float | list):
            hint += "; a number that is meant as text needs quotes, and a share its sign: '30%'"
        raise UserError(f"'{parameter.name}' of {what} cannot be {value!r}", where=where, hint=hint) from None


def _finite(value: Any) -> bool:
    """Whether all numbers in plain data are finite: others have no place in a record."""
    if isinstance(value, dict | list | tuple):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _from_arguments(arguments: ast.arguments, skip: int) -> dict[str, Parameter]:
    result = {}
    positional = (arguments.posonlyargs + arguments.args)[skip:]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    for argument, default in zip(positional, defaults, strict=False):
        result[argument.arg] = _parameter(argument, default, positional=True)
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        result[argument.arg] = _parameter(argument, default, positional=False)
    return result


def _from_fields(classes: list[ast.ClassDef]) -> dict[str, Parameter]:
    """The fields of a dataclass, those of its bases first; of another class nothing."""
    own = [c for c in reversed(classes) if any("dataclass" in ast.unparse(one) for one in c.decorator_list)]
    items = [item for of in own for item in of.body]
    fields = [item for item in items if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
    found = [
        _parameter(ast.arg(ast.unparse(field.target), field.annotation), field.value, positional=False)
        for field in fields
    ]
    return {parameter.name: parameter for parameter in found}


def _parameter(argument: ast.arg, default: ast.expr | None, positional: bool) -> Parameter:
    text = ast.unparse(argument.annotation) if argument.annotation else ""
    value: Any = REQUIRED
    if default is not None:
        try:
            value = ast.literal_eval(default)
        except ValueError:
            value = ast.unparse(default)
    return Parameter(argument.arg, _plain_type(text), text, value, positional)


def _plain_type(annotation: str) -> Any:
    """The type an annotation stands for, or None. `float | Tensor` counts as float: a recipe can only write numbers."""
    plain = re.sub(r" \| (\w+\.)*Tensor\b|\b(\w+\.)*Tensor \| ", "", annotation)
    try:
        return eval(plain, {"__builtins__": {}}, _TYPES)
    except (NameError, SyntaxError, TypeError):
        return None
