"""A card that a recipe or another card names, as a spec: its code, its options, and what else the card says of it."""

import importlib
from typing import Any

from pydantic import BaseModel

from kdbench.errors import UserError, failure, shortened
from kdbench.recipe.coded import TargetSpec
from kdbench.recipe.method_specs import LossSpec, OperationSpec, SourceSpec
from kdbench.recipe.model_specs import DataSpec, ModelSpec
from kdbench.registry import Registry
from kdbench.tree import Tree

_FORMS: dict[str, type[TargetSpec]] = {
    "datasets": DataSpec,
    "losses": LossSpec,
    "models": ModelSpec,
    "operations": OperationSpec,
    "sources": SourceSpec,
}
# What a spec says in its own way: the code's version counts aliases too, and hook points are those of the hooks card.
_OWN = TargetSpec.model_fields.keys() | {"hooks"}


def repeated(kind: str, card: BaseModel) -> dict[str, Any]:
    """What a card of a kind says that its spec says too, in the same words."""
    fields = _FORMS.get(kind, TargetSpec).model_fields.keys() & type(card).model_fields.keys() - _OWN
    return {field: getattr(card, field) for field in sorted(fields)}


def spec_of(kind: str, name: str, registry: Registry, options: dict[str, Any], **more: Any) -> Any:
    """The spec of a named card (a `TargetSpec`, or what a kind has in its place) with these options."""
    said = repeated(kind, registry.card(kind, name)) | more
    return _FORMS.get(kind, TargetSpec)(name=name, **registry.code(kind, name), options=options, **said)


def named_spec(
    kind: str, tree: Tree, registry: Registry, own: tuple[str, ...] = ("name",), what: str | None = None, **more: Any
) -> Any:
    """The spec of what a mapping names, with the options that stand beside the name.

    Args:
        own: keys of the mapping that are no options; the first one holds the name.
        what: for messages.
        more: fields of the spec that the card does not say.
    """
    name = tree.data[own[0]]
    options = registry.options(kind, tree, own, what)
    spec = spec_of(kind, name, registry, options, **more)
    if kind == "schedules":
        _try_schedule(spec, tree)
    return spec


def _try_schedule(spec: TargetSpec, tree: Tree) -> None:
    """Schedules are plain Python: building one now tells a malformed share, and a function that makes something else,
    before torch is imported."""
    module, _, function = spec.target.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)(**spec.options)
    except ValueError as error:
        shares = [key for key, value in spec.options.items() if isinstance(value, list | str)]
        raise UserError(f"schedule '{spec.name}': {error}", where=tree.origin(tuple(shares[:1]))) from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's function can fail in any way
        what = f"schedule '{spec.name}' cannot be built: {failure(error, spec.target)}"
        raise UserError(what, tree.origin(()), f"see {spec.target}") from None
    if not hasattr(made, "factor"):
        hint = "its function returns kdbench.schedules.Schedule(factor), where factor takes the progress in [0, 1)"
        raise UserError(f"schedule '{spec.name}' is no schedule: {shortened(made)}", tree.origin(()), hint)
