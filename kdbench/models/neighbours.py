"""Modules of a network that belong to a hook point: its batch norm, and the classifier behind the pooled features."""

from contextlib import suppress
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdbench.errors import UserError
from kdbench.models.hooks import Extractor
from kdbench.models.probing import UNSUITABLE, dry_run, watched


def classifier(extractor: Extractor) -> nn.Module:
    """The module that takes the pooled features and gives logits.

    Raises:
        UserError: the network's hook point `pooled` is not what such a module takes.
    """
    place = extractor.place("pooled")
    if place.side != "input":
        what = f"the classifier of model '{extractor.model_name}' is not known: its hook point 'pooled' is {place}"
        hint = "name the classifier's input in the recipe, under the model's 'hooks': 'pooled: input(PATH)'"
        raise UserError(what, hint=hint)
    return extractor.model.get_submodule(place.path)


def batch_norm_before(extractor: Extractor, point: str, image_shape: tuple[int, int, int]) -> nn.Module:
    """The batch norm whose output a hook point shows, or the last one before it on the main path.

    Of a ResNet's sum with the shortcut that is the block's own last batch norm, not that of the shortcut: of those that
    ran before, one that lies beside the hook point's module is taken where there is one.

    Raises:
        UserError: there is no batch norm before the point.
    """
    place, model = extractor.place(point), extractor.model
    module = model.get_submodule(place.path)
    if isinstance(module, _BatchNorm) and place.side == "output":
        return module
    ran: list[str] = []
    before: list[str] = []
    norms = {name: one for name, one in model.named_modules() if isinstance(one, _BatchNorm)}
    places = [(one, "output", partial(lambda name, _: ran.append(name), name)) for name, one in norms.items()]
    at_point = (module, place.side, lambda _: before.extend(ran[len(before) :]))
    with watched([*places, at_point]), suppress(*UNSUITABLE):  # type: ignore[list-item]
        dry_run(model, image_shape)
    beside = [name for name in before if name.rpartition(".")[0] == place.path.rpartition(".")[0]]
    if not before:
        raise UserError(f"there is no batch norm before '{point}' ({place}) of model '{extractor.model_name}'")
    return norms[(beside or before)[-1]]
