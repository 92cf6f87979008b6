"""Turns pydantic's errors into one message: what is wrong, file and line, what to do."""

import typing
from datetime import date
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kdbench.errors import UserError, did_you_mean, number_meant, shortened
from kdbench.tree import Path, Tree, dotted

M = TypeVar("M", bound=BaseModel)


def validated(model: type[M], tree: Tree, what: str, within: Path | None = None) -> M:
    """`tree` as an instance of `model`; the first finding in file order becomes a UserError.

    Args:
        within: where a recipe can set what is in the tree; None for what none can.
    """
    try:
        return model.model_validate(tree.data)
    except ValidationError as error:
        # Of a union the alternative that is a fixed word says least.
        order = {"extra_forbidden": 0, "literal_error": 2}
        found = error.errors()
        # A list is no mistake where another alternative took it for one, and found a mistake inside.
        taken = {_keys(e["loc"][:-1], tree.data) for e in found if e["loc"] and isinstance(e["loc"][-1], int)}
        found = [e for e in found if not (isinstance(e["input"], list) and _keys(e["loc"], tree.data) in taken)]
        findings = sorted(found, key=lambda e: (order.get(e["type"], 1), str(e["loc"])))
        first = findings[0]
        # What is wrong for every alternative of a union is one mistake.
        places = [_keys(e["loc"], tree.data) + (e["loc"][-1:] if e["type"] == "missing" else ()) for e in findings]
        loc, others = places[0], {*places} - {places[0]}
        more = f" (and {len(others)} more)" if others else ""
        text, hint = _explain(model, first, loc, within)
        raise UserError(f"{what}: {text}{more}", where=_place(tree, loc, first["type"]), hint=hint) from None


def _place(tree: Tree, loc: Path, kind: str) -> str:
    """Where a finding stands. What is wrong with a mapping as a whole is so by the key that came last: the user's own,
    where others were inherited."""
    inside = [tree.origins[path] for path in tree.origins if kind == "value_error" and path[:-1] == loc and path != loc]
    files = {origin.rpartition(":")[0] for origin in [*inside, tree.origin(loc)]}
    return inside[-1] if inside and len(files) > 1 else tree.origin(loc)


def _keys(loc: tuple[Any, ...], data: Any) -> Path:
    """The parts of pydantic's location that lead through data. The others name types inside unions."""
    found: Path = ()
    for part in loc:
        if (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int)):
            found, data = (*found, part), data[part]
    return found


# Findings that say of a list that something else is expected.
_NO_LIST = {"model_type", "dict_type", "literal_error"} | {
    f"{kind}_type" for kind in ("string", "int", "float", "bool")
}
# no, on, 12 and 2024-01-01 are no texts in YAML.
_IN_QUOTES = "a text that looks like a number, a date or yes and no must be in quotes"


def _explain(model: type[BaseModel], finding: Any, loc: Path, within: Path | None) -> tuple[str, str]:
    kind, value = finding["type"], finding.get("input")
    inside = f" in '{dotted(loc[:-1])}'" if len(loc) > 1 else ""
    if kind == "extra_forbidden":
        hint = did_you_mean(str(loc[-1]), fields_at(model, loc[:-1]))
        # On a card that names code, what is unknown may be meant for the code.
        if options := getattr(form_at(model, loc[:-1]), "options_of_target", ""):
            hint = f"{hint}{'' if hint.endswith('?') else '.'} {options}"
        return f"unknown key '{loc[-1]}'{inside}", hint
    if kind == "missing":
        return f"the key '{loc[-1]}' is missing{inside}", f"add '{loc[-1]}:'"
    message = finding["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    place = f"'{dotted(loc)}' " if loc else ""
    shown = str(value) if isinstance(value, date) else shortened(value)
    if isinstance(value, str) and ("number" in message or "integer" in message):
        return f"{place}cannot be the text {shortened(value)}", f"{message}; {number_meant(value)}"
    if isinstance(value, list) and kind in _NO_LIST:
        return f"{place}is one thing, not a list", _several(model, loc, within) or message
    if kind == "list_type" and loc:
        return f"{place}needs a list", f"write brackets: {loc[-1]}=[A, B] or '{loc[-1]}: [A, B]'"
    if kind == "model_type":
        keys = fields_at(model, loc)
        hint = f"it has the keys {', '.join(keys)}" if keys else message
        hint += "; 'weight: 0' switches it off" if value is None and "weight" in keys else ""
        # The name of a thing may stand for it: of one called 2024 too.
        unquoted = "name" in keys and isinstance(value, bool | int | float | date)
        return f"{place}cannot be {shown}", f"{hint}; {_IN_QUOTES}" if unquoted else hint
    if isinstance(value, dict | list) or not loc:
        return f"{place}is invalid", message
    if kind == "dict_type" and isinstance(value, str):
        message = f"write a mapping: '{loc[-1]}: {{KEY: VALUE}}'"
    elif kind in ("string_type", "dict_type"):
        message = _IN_QUOTES
    return f"{place}cannot be {shown}", message


def _several(model: type[BaseModel], loc: Path, within: Path | None) -> str:
    """How a recipe compares several values of what stands at a location; empty where it cannot."""
    path = (*(within or ()), *loc)
    if within is None or path[0] in getattr(model, "not_compared", ()) or any(isinstance(key, int) for key in path):
        return ""
    return f"to compare several: 'compare: {{{dotted(path)}: […]}}'"


def fields_at(model: type[BaseModel], loc: Path) -> list[str]:
    """Known keys of the (nested) model at a location; empty where keys are free."""
    found = form_at(model, loc)
    return list(found.model_fields) if found else []


def form_at(model: type[BaseModel], loc: Path) -> type[BaseModel] | None:
    """The (nested) model at a location; None where keys are free."""
    current: Any = model
    for part in loc:
        current = _step(current, part)
    return _model_in(current)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        if found := _model_in(argument):
            return found
    return None


def _step(annotation: Any, part: str | int) -> Any:
    for one in (annotation, *typing.get_args(annotation)):
        if (origin := typing.get_origin(one)) in (dict, list):
            return typing.get_args(one)[1 if origin is dict else 0]
    found = _model_in(annotation)
    return found.model_fields[str(part)].annotation if found and part in found.model_fields else None
