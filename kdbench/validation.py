"""Turns pydantic's errors into one message: what is wrong, file and line, what to do."""

import typing
from datetime import date
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kdbench.errors import UserError, did_you_mean, shortened
from kdbench.tree import Path, Tree, dotted

M = TypeVar("M", bound=BaseModel)


def validated(model: type[M], tree: Tree, what: str) -> M:
    """`tree` as an instance of `model`; the first finding in file order becomes a UserError."""
    try:
        return model.model_validate(tree.data)
    except ValidationError as error:
        # Of a union the alternative that is a fixed word says least.
        order = {"extra_forbidden": 0, "literal_error": 2}
        findings = sorted(error.errors(), key=lambda e: (order.get(e["type"], 1), str(e["loc"])))
        first = findings[0]
        # What is wrong for every alternative of a union is one mistake.
        places = [_keys(e["loc"], tree.data) + (e["loc"][-1:] if e["type"] == "missing" else ()) for e in findings]
        loc, others = places[0], {*places} - {places[0]}
        more = f" (and {len(others)} more)" if others else ""
        text, hint = _explain(model, first, loc)
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


# no, on, 12 and 2024-01-01 are no texts in YAML.
_IN_QUOTES = "a text that looks like a number, a date or yes and no must be in quotes"


def _explain(model: type[BaseModel], finding: Any, loc: Path) -> tuple[str, str]:
    kind, value = finding["type"], finding.get("input")
    inside = f" in '{dotted(loc[:-1])}'" if len(loc) > 1 else ""
    if kind == "extra_forbidden":
        return f"unknown key '{loc[-1]}'{inside}", did_you_mean(str(loc[-1]), fields_at(model, loc[:-1]))
    if kind == "missing":
        return f"the key '{loc[-1]}' is missing{inside}", f"add '{loc[-1]}:'"
    message = finding["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    place = f"'{dotted(loc)}' " if loc else ""
    shown = str(value) if isinstance(value, date) else shortened(value)
    if isinstance(value, str) and ("number" in message or "integer" in message):
        return f"{place}cannot be the text {shortened(value)}", f"{message}; write a number without quotes"
    if isinstance(value, list) and kind in ("model_type", "string_type"):
        return f"{place}is one thing, not a list", f"to compare several: 'compare: {{{dotted(loc)}: […]}}'"
    if kind == "model_type":
        keys = fields_at(model, loc)
        hint = f"it has the keys {', '.join(keys)}" if keys else message
        # The name of a thing may stand for it: of one called 2024 too.
        unquoted = "name" in keys and isinstance(value, bool | int | float | date)
        return f"{place}cannot be {shown}", f"{hint}; {_IN_QUOTES}" if unquoted else hint
    if isinstance(value, dict | list) or not loc:
        return f"{place}is invalid", message
    if kind in ("string_type", "dict_type"):
        message = _IN_QUOTES
    return f"{place}cannot be {shown}", message


def fields_at(model: type[BaseModel], loc: Path) -> list[str]:
    """Known keys of the (nested) model at a location; empty where keys are free."""
    current: Any = model
    for part in loc:
        current = _step(current, part)
    found = _model_in(current)
    return list(found.model_fields) if found else []


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
