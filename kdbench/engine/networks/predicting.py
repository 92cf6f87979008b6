"""A student that answers through modules of its method in place of its own head (`predicts` on a method's card)."""

import copy

import torch
from torch import Tensor, nn

from kdbench.engine.networks.averaging import Average
from kdbench.engine.networks.build import build_extractor, build_model
from kdbench.engine.networks.network import Network
from kdbench.engine.surroundings import Surroundings
from kdbench.engine.targets import code_of
from kdbench.errors import UserError
from kdbench.models.hooks import Extractor
from kdbench.models.points import LOGITS
from kdbench.recipe.specs import CellSpec


class Predictor(nn.Module):
    """A student up to one of its hook points, and what makes logits of the value there.

    It runs no further than that point, and holds all of the student, the head's modules and those of the teacher that
    the head uses: what is exported, counted and loaded.
    """

    def __init__(self, student: Extractor, point: str, head: nn.Module) -> None:
        super().__init__()
        self.student, self.head = student.model, head
        self._extractor, self._point = student, point

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, C, H, W]."""
        # An exporter cannot follow a network that stops midway. What nobody needs is not exported.
        points = [self._point, LOGITS] if torch.compiler.is_exporting() else [self._point]
        logits: Tensor = self.head(self._extractor(images, points)[self._point])
        return logits

    def used(self, images: Tensor) -> list[nn.Parameter]:
        """The parameters on which its answers depend: the student's own head is not among them."""
        parameters = [*self.parameters()]
        asked = [parameter.requires_grad for parameter in parameters]
        self.requires_grad_(True)
        with torch.enable_grad():
            gradients = torch.autograd.grad(self(images).sum(), parameters, allow_unused=True)
        for parameter, before in zip(parameters, asked, strict=True):
            parameter.requires_grad_(before)
        return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def predictor(cell: Surroundings) -> Predictor:
    """The student of a method with `predicts`.

    Raises:
        UserError: the head cannot be built, or has parameters that are no module's of the method or the teacher.
    """
    spec = cell.spec.method.predicts
    assert spec is not None
    (point,) = cell.points([spec.student], "student")
    head = cell.built(spec, "predicts")
    known = [*cell.modules.values(), cell.student.model, *([cell.teacher.model] if cell.teacher else [])]
    if {*head.parameters()} - {parameter for module in known for parameter in module.parameters()}:
        what = f"'{spec.name}', through which the student is to answer, has parameters of its own, which nothing trains"
        hint = "name its modules under the method's 'modules'; the head asks for them by these names"
        raise UserError(what, hint=hint)
    return Predictor(cell.student, point, head)


def answers(cell: Surroundings, student: Network) -> Network:
    """The network that is tested and kept: the student, or what its protocol or its method has in its place."""
    if (decay := cell.spec.protocol.ema) is not None:
        own = student.extractor
        return Average(student, Extractor(copy.deepcopy(student.model), own.places, own.model_name), decay)
    if cell.spec.method.predicts is None:
        return student
    # No stage sets the modes of what the head is made of beside the method's modules: it has no other use than this.
    whole = Extractor(predictor(cell).eval(), {}, student.extractor.model_name)
    return Network(whole, student.normalizer, student.computing)


def check_answers(cell: Surroundings) -> None:
    """Have such a student answer once.

    Raises:
        UserError: it cannot, or not with logits of the data's classes.
    """
    data = cell.spec.student.takes(cell.spec.data)
    built = predictor(cell).eval()
    with code_of("the student cannot answer through 'predicts'"), torch.no_grad():
        logits = built(torch.zeros(2, *data.image_shape))
    given = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if given != [2, data.classes]:
        raise UserError(f"'predicts' gives {given} for two images, not [2, {data.classes}]")


def untrained(spec: CellSpec) -> nn.Module:
    """The network with which a cell of such a method answers, with weights that are to be loaded yet."""
    networks = {
        name: build_extractor(build_model(model.untrained(), data), model, data)
        for name, (model, data) in spec.networks.items()
    }
    shapes = {name: network.shapes(spec.networks[name][1].image_shape) for name, network in networks.items()}
    return predictor(Surroundings(spec, networks["student"], networks.get("teacher"), {"teacher": {}, **shapes}))
