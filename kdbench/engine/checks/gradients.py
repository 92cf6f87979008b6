"""Gradients that losses read, computed once before anything is trained: not every network has them everywhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdbench.engine.terms import Term
from kdbench.errors import UserError, first_line
from kdbench.models.hooks import Extractor
from kdbench.models.points import place_of_gradient
from kdbench.models.probing import DRY, dry_images, other_tensors, undisturbed


def check_gradients(term: Term, network: Extractor, side: str, image_shape: tuple[int, int, int]) -> None:
    """Compute the gradients that a term reads of a network, for two images of noise.

    Args:
        side: whether it is the "student" or the "teacher". What the term trains must have gradients of these.

    Raises:
        UserError: there are none at a place, or they cannot be differentiated.
    """
    trains = side == term.spec.of
    read = {point for points in term.points(side).values() for point in points if place_of_gradient(point) is not None}
    points = sorted(read)
    if not points:
        return
    try:
        with undisturbed(network.model, training=trains), other_tensors(network.model, torch.clone):
            images, labels = dry_images(network.model, image_shape), torch.zeros(DRY, dtype=torch.int64)
            if trains:
                with torch.enable_grad():
                    _differentiated(network, points, images, labels)
            else:
                network(images, points, labels)
    except UserError as error:
        raise UserError(f"loss '{term.name}': {error.what}", hint=error.hint) from None
    except RuntimeError as error:
        what = f"loss '{term.name}' reads {', '.join(points)} of model '{network.model_name}', of which torch has no"
        hint = "choose another model, or a method that reads no gradients"
        raise UserError(f"{what} gradient: {first_line(error)}", hint=hint) from None


def _differentiated(network: Extractor, points: Sequence[str], images: Tensor, labels: Tensor) -> None:
    found = network(images, points, labels)
    total = torch.stack([value.square().sum() for value in found.values()]).sum()
    weights = [parameter for parameter in network.model.parameters() if parameter.requires_grad]
    if total.requires_grad and weights:
        torch.autograd.grad(total, weights, allow_unused=True)
