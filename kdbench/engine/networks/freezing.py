"""Which parameters a stage trains: never those that the author of their module froze."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

# Of a parameter: whether it came frozen.
_CAME_FROZEN = "came_frozen"


def note_frozen(*modules: nn.Module) -> None:
    """Keep in mind which parameters of new modules are frozen."""
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        if not hasattr(parameter, _CAME_FROZEN):
            setattr(parameter, _CAME_FROZEN, not parameter.requires_grad)


def let_train(parameters: Sequence[nn.Parameter], trains: bool, like: Sequence[nn.Parameter] | None = None) -> None:
    """Have those of some parameters trained that may be, or none.

    Args:
        like: those of which they are copies; copies do not know what was frozen.
    """
    for parameter, noted in zip(parameters, like or parameters, strict=True):
        parameter.requires_grad_(trains and not getattr(noted, _CAME_FROZEN, False))


def owned(modules: Mapping[str, nn.Module], known: Iterable[nn.Parameter] = ()) -> dict[str, list[nn.Parameter]]:
    """Parameters by the first of some modules that has them: what a later one was told and holds is not its own.

    Args:
        known: those that belong to none of them.
    """
    taken = {*known}
    found: dict[str, list[nn.Parameter]] = {}
    for name, module in modules.items():
        found[name] = [parameter for parameter in module.parameters() if parameter not in taken]
        taken.update(found[name])
    return found
