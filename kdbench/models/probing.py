"""Dry runs of a network: they leave modes, buffers and random states as they were."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdbench.errors import UserError, device_advice, failure, first_line

# What a network can raise when its input does not suit it.
UNSUITABLE = (
    *(RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError),
    *(ImportError, OSError, SystemExit),
)
# Images of a dry run: more than one, since batch norms in train mode refuse single pixels.
DRY = 2


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
    with undisturbed(model, training=False):
        images = dry_images(model, image_shape)
        if not meta:
            return dry_call(model, images)
        with other_tensors(model, lambda tensor: torch.empty_like(tensor, device="meta"), parameters=True):
            return model(images.to("meta"))


def dry_call(model: nn.Module, images: Tensor) -> object:
    """The network's output with copies of its buffers in place of them."""
    with other_tensors(model, torch.clone):
        return model(images)


@contextmanager
def other_tensors(model: nn.Module, make: Callable[[Tensor], Tensor], parameters: bool = False) -> Iterator[None]:
    """Inside, a network computes with other tensors in place of its buffers, and of its parameters.

    `torch.func.functional_call` would leave them in a module that stands in two places of the network.
    """
    kinds = ("_buffers", "_parameters") if parameters else ("_buffers",)
    held = [getattr(module, kind) for module in model.modules() for kind in kinds]
    own = [dict(one) for one in held]
    made: dict[Tensor, Tensor] = {}
    try:
        for one, before in zip(held, own, strict=True):
            for name, tensor in before.items():
                if tensor is not None:
                    # Of tied parameters each stands for all.
                    made[tensor] = made[tensor] if tensor in made else make(tensor)
                    one[name] = made[tensor]
        yield
    finally:
        for one, before in zip(held, own, strict=True):
            one.clear()
            one.update(before)


def dry_images(model: nn.Module, shape: tuple[int, ...], n: int = DRY) -> Tensor:
    """Noise [n, *shape] in the network's type and on its device, always the same values."""
    values = torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    return values if parameter is None else values.to(parameter.device, parameter.dtype)


def cannot_take(model_name: str, image_shape: tuple[int, int, int], error: BaseException) -> UserError:
    """What to raise when a network failed on images of this shape."""
    size = "×".join(map(str, image_shape))
    reason = first_line(error) if isinstance(error, RuntimeError | ValueError) else failure(error, model_name)
    return UserError(
        f"model '{model_name}' cannot take images of {size}: {reason}",
        hint=device_advice(error) or "choose another model, or a data set with larger images",
    )


def logits_of(model_name: str, value: object) -> Tensor:
    """A network's output, which must be logits.

    Raises:
        UserError: it is no tensor of numbers with a point.
    """
    if isinstance(value, Tensor) and value.is_floating_point():
        return value
    what = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else kind_of(value)
    hint = "a model here returns one tensor [N, classes]"
    raise UserError(f"model '{model_name}' returns {what}, not logits", hint=hint)


def kind_of(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
