"""Checks of arguments that the builders of networks share."""

from kdbench.errors import UserError

# Layers of a network, at most: what is deeper takes minutes to build.
DEEPEST = 5000


def check_sizes(model: str, *, classes: int, channels: int, image_size: int, smallest: int = 1) -> None:
    """UserError when a network cannot be built for such data.

    Args:
        model: the network's name, for the message.
        smallest: side of the smallest image, in pixels, on which every map keeps at least one pixel.
    """
    for name, value in (("classes", classes), ("channels", channels), ("image_size", image_size)):
        if value < 1:
            raise UserError(f"{model} needs at least 1 for '{name}', not {value}")
    if image_size < smallest:
        what = f"{model} needs images of at least {smallest}×{smallest} pixels, not {image_size}×{image_size}"
        raise UserError(what, hint="choose a network that shrinks its input less, such as wrn_16_1 or resnet20")


def blocks_per_stage(model: str, depth: int, outside: int) -> int:
    """Residual blocks of two layers in each of three stages: depth = 6 · blocks + outside.

    Args:
        outside: layers with weights outside the blocks.
    """
    if depth > DEEPEST:
        raise UserError(f"{model} has a depth of at most {DEEPEST}, not {depth}")
    blocks, rest = divmod(depth - outside, 6)
    if rest or blocks < 1:
        near = [outside + 6 * n for n in range(max(blocks, 1), max(blocks, 1) + 2)]
        hint = f"the nearest are {near[0]} and {near[1]}"
        raise UserError(f"{model} has a depth of 6n + {outside}, not {depth}", hint=hint)
    return blocks
