"""Filters that are switched off by their batch norm: which there are, that they stay off, and what is left.

A filter is a channel of a convolution whose output goes straight into a batch norm. With the norm's scale and shift of
that channel at zero, the filter contributes nothing, whatever it computes: it can be cut out without any change.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdbench.models.probing import dry_call, dry_images, undisturbed, watched

# Name of a batch norm -> which of its channels are kept, bool [C].
Kept = Mapping[str, Tensor]


def filters(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, str]:
    """Batch norms that take a convolution's output as it is, where nothing else does.

    Name of the norm -> of the convolution. In the order in which they run, found by dry forwards.
    """
    outputs: dict[int, tuple[str, object]] = {}
    found: dict[str, str] = {}

    def remember(conv: str, output: object) -> None:
        # Held, so that no other tensor gets its id.
        outputs[id(output)] = (conv, output)

    def recognize(norm: str, taken: object) -> None:
        if id(taken) in outputs:
            found[norm] = outputs[id(taken)][0]

    places: list[tuple[nn.Module, Literal["input", "output"], Callable[[object], None]]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            places.append((module, "output", partial(remember, name)))
        elif isinstance(module, _BatchNorm) and module.affine:
            places.append((module, "input", partial(recognize, name)))
    with watched(places):
        _with_hooks(model, image_shape, {})
    return {norm: conv for norm, conv in found.items() if not _used_elsewhere(model, image_shape, norm, conv)}


def _used_elsewhere(model: nn.Module, image_shape: tuple[int, int, int], norm: str, conv: str) -> bool:
    """Whether a convolution's output reaches the logits although its batch norm gives zeros: by a shortcut, say."""

    def filled(value: float) -> Callable[..., Tensor]:
        return lambda _, args, output: torch.full_like(output, value)

    logits = [_with_hooks(model, image_shape, {conv: filled(value), norm: filled(0.0)}) for value in (0.0, 1.0)]
    return not torch.equal(*logits)


def importance(norm: nn.Module) -> Tensor:
    """(γ ∂L/∂γ + β ∂L/∂β)² of each channel, from the gradients that a backward pass left: float32 [C].

    The square of L's first-order change when the channel is switched off. Molchanov et al.: Importance Estimation for
    Neural Network Pruning, CVPR 2019.
    """
    assert isinstance(norm, _BatchNorm) and norm.weight.grad is not None and norm.bias.grad is not None
    return (norm.weight.detach() * norm.weight.grad + norm.bias.detach() * norm.bias.grad).square()


def least_important(scores: Mapping[str, Tensor], kept: Kept, share: float) -> dict[str, Tensor]:
    """Switch off filters of the lowest score until a share of all is off; every norm keeps at least one.

    Args:
        scores: of each norm's channels, [C].
        kept: what is on now; what is off stays off.

    Returns:
        what is on then. Ties: the earlier norm, the lower channel first.
    """
    off = sum(int((~mask).sum()) for mask in kept.values())
    wanted = round(share * sum(len(mask) for mask in kept.values())) - off
    result = {name: mask.clone() for name, mask in kept.items()}
    flat = [
        (value, position, channel)
        for position, name in enumerate(result)
        for channel, value in enumerate(scores[name].tolist())
        if kept[name][channel]
    ]
    names = list(result)
    for _, position, channel in sorted(flat):
        mask = result[names[position]]
        if wanted <= 0:
            break
        if int(mask.sum()) > 1:
            mask[channel] = False
            wanted -= 1
    return result


def switch_off(model: nn.Module, kept: Kept) -> None:
    """Zero scale and shift of what is not kept, and their gradients from now on.

    With zeros, no gradient and no momentum, optimizers leave them: weight decay of zero is zero. Only for an optimizer
    that begins now.
    """
    for name, mask in kept.items():
        norm = model.get_submodule(name)
        for parameter in (norm.weight, norm.bias):
            assert isinstance(parameter, nn.Parameter)
            own = mask.to(parameter.device)
            with torch.no_grad():
                parameter.mul_(own)
            trained = parameter.requires_grad
            parameter.requires_grad_().register_hook(lambda gradient, own=own: gradient * own)
            parameter.requires_grad_(trained)


def size_without(model: nn.Module, image_shape: tuple[int, int, int], kept: Kept) -> dict[str, float]:
    """Parameters and FLOPs of one image (a multiply-add is two) of convolutions and linear layers, were everything that
    is off cut out: filters, their batch norm's channels, and the channels that nothing but zeros would enter.

    What enters is found by one forward in which every convolution gives ones and every norm gives ones where it is kept
    and zeros where it is off: sums, paddings and ReLUs keep that apart. Grouped convolutions count whole.
    """
    of_conv = {conv: norm for norm, conv in filters(model, image_shape).items() if norm in kept}
    parameters = sum(p.numel() for p in model.parameters())
    flops = 0
    hooks: dict[str, Callable[..., Any]] = {}

    def layer(name: str) -> Callable[..., Tensor]:
        def count(module: nn.Conv2d | nn.Linear, args: tuple[Tensor], output: Tensor) -> Tensor:
            nonlocal parameters, flops
            outputs, inputs = len(module.weight), module.weight[0].numel()
            if getattr(module, "groups", 1) == 1:
                outputs = int(kept[of_conv[name]].sum()) if name in of_conv else outputs
                # Channels that are not zero throughout.
                alive = int((args[0].transpose(0, 1).flatten(1) != 0).any(dim=1).sum())
                inputs = alive * inputs // args[0].shape[1]
            parameters -= module.weight.numel() - outputs * inputs
            parameters -= 0 if module.bias is None else len(module.weight) - outputs
            flops += 2 * outputs * inputs * output[0, 0].numel()
            return torch.ones_like(output)

        return count

    def norm(name: str) -> Callable[..., Tensor]:
        def count(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            nonlocal parameters
            if name not in kept:
                return torch.ones_like(output)
            mask = kept[name].to(output.device, output.dtype)
            parameters -= 2 * int((mask == 0).sum())
            return torch.ones_like(output) * mask.view(-1, *[1] * (output.ndim - 2))

        return count

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            hooks[name] = layer(name)
        elif isinstance(module, _BatchNorm):
            hooks[name] = norm(name)
    _with_hooks(model, image_shape, hooks)
    return {"parameters": parameters, "flops": flops}


def _with_hooks(model: nn.Module, image_shape: tuple[int, int, int], after: Mapping[str, Callable[..., Any]]) -> Tensor:
    """The logits of a dry forward with hooks on modules by name."""
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in after.items()]
    try:
        with undisturbed(model, training=False):
            logits = dry_call(model, dry_images(model, image_shape))
            assert isinstance(logits, Tensor)
            return logits
    finally:
        for handle in handles:
            handle.remove()
