"""Which parameters a stage trains: never those that the author of their module froze."""

from collections.abc import Sequence

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
