"""Dry runs of a network: they leave modes, buffers and random states as they were."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from kdbench.errors import UserError, failure, first_line

# What a network can raise when its input does not suit it.
UNSUITABLE = (
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    IndexError,
    KeyError,
    AttributeError,
    NotImplementedError,
    ArithmeticError,
    ImportError,
    OSError,
    SystemExit,
)


# Images of a dry run: more than one, since batch norms in train mode refuse single pixels.
IMAGES = 2


@contextmanager
def undisturbed(model: nn.Module, training: bool) -> Iterator[None]:
    """All modules in train or eval mode, no gradients, random numbers that are put back; then everything as before."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    # Inference tensors carry no version counter, and dry runs read it.
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.no_grad():
        try:
            # Not model.train(): networks override it with side effects.
            for module, _ in modes:
                module.training = training
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def watched(places: Iterable[tuple[nn.Module, Literal["input", "output"], Callable[[object], None]]]) -> Iterator[None]:
    """Inside, every call of a module gives its (first) input or its output to a function."""
    handles: list[RemovableHandle] = []
    try:
        for module, side, note in places:

            def on_input(_: nn.Module, args: Any, kwargs: Any, note: Callable[[object], None] = note) -> None:
                note(next(iter((*args, *kwargs.values())), None))

            def on_output(_: nn.Module, args: Any, output: Any, note: Callable[[object], None] = note) -> None:
                note(output)

            handles.append(
                module.register_forward_pre_hook(on_input, with_kwargs=True)
                if side == "input"
                else module.register_forward_hook(on_output)
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


def dry_run(model: nn.Module, image_shape: tuple[int, int, int], meta: bool = False) -> object:
    """The network's output for two images of noise, in eval mode.

    Args:
        meta: compute nothing, follow the shapes alone.
    """
    tensors = None
    if meta:
        held = (*model.named_parameters(), *model.named_buffers())
        tensors = {name: torch.empty_like(tensor, device="meta") for name, tensor in held}
    with undisturbed(model, training=False):
        images = dry_images(model, image_shape)
        return dry_call(model, images.to("meta") if meta else images, tensors)


def dry_call(model: nn.Module, images: Tensor, tensors: dict[str, Tensor] | None = None) -> object:
    """The network's output with copies of its buffers in place of them, or with all the given tensors."""
    if tensors is None:
        tensors = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return functional_call(model, tensors, (images,))


def dry_images(model: nn.Module, image_shape: tuple[int, int, int], n: int = IMAGES) -> Tensor:
    """Noise [n, *image_shape] in the network's type and on its device, always the same values."""
    values = torch.randn(n, *image_shape, generator=torch.Generator().manual_seed(0))
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    return values if parameter is None else values.to(parameter.device, parameter.dtype)


def cannot_take(model_name: str, image_shape: tuple[int, int, int], error: BaseException) -> UserError:
    """What to raise when a network failed on images of this shape."""
    size = "×".join(map(str, image_shape))
    reason = failure(error) if isinstance(error, SystemExit) else first_line(error)
    return UserError(
        f"model '{model_name}' cannot take images of {size}: {reason}",
        hint="choose another model, or a data set with larger images",
    )
