"""Networks of timm and torchvision, by their names there, without pretrained weights, and ResNets of torchvision with
a stem for small images."""

import functools
import importlib
import inspect
import re
from collections.abc import Collection
from typing import Any

from torch import nn

from kdbench.errors import UserError, did_you_mean, first_line
from kdbench.models.arguments import check_sizes

# Networks with auxiliary classifiers, and what the entries of these in weight files begin with.
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
# Arguments of timm's networks that are said elsewhere.
_WEIGHTS = "networks come without weights; give them as 'weights' beside the model"
_OF_DATA = "it follows from the data, the side of images also from 'image_size' beside the model"
_NO_OPTIONS = {
    **dict.fromkeys(
        ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"), _WEIGHTS
    ),
    **dict.fromkeys(("num_classes", "in_chans", "img_size"), _OF_DATA),
    **dict.fromkeys(("features_only", "scriptable", "exportable", "no_jit"), "a student gives logits, as eager torch"),
}
# torchvision builds them with `transform_input=True` for its own weights: that turns its usual normalization into this.
_WITHOUT_AUXILIARY = (
    "the auxiliary classifiers are left out. If the weights are torchvision's own, they take images normalized by mean "
    "0.5 and deviation 0.5: write 'normalization: {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}' beside them"
)


def timm_model(
    name: str,
    options: dict[str, bool | int | float | str | list[int]] | None = None,
    *,
    classes: int,
    channels: int = 3,
    image_size: int = 32,
) -> nn.Module:
    """A network of timm: images [N, channels, image_size, image_size] -> logits [N, classes].

    Nothing in it is changed; initial values are timm's own. Networks that are built for one size of image
    (transformers) are built for this one.

    Args:
        name: as in `timm.list_models()`.
        options: of timm's model, such as drop_path_rate, global_pool or dims.

    Raises:
        UserError: timm is not installed, has no such model or option, or cannot build it for such images.
    """
    timm = _library("timm")
    if not timm.is_model(name):
        raise UserError(f"timm has no model '{name}'", hint=did_you_mean(name, timm.list_models()))
    check_sizes(f"'timm:{name}'", classes=classes, channels=channels, image_size=image_size)
    given = options or {}
    if taken := sorted(given.keys() & _NO_OPTIONS):
        raise UserError(f"'{taken[0]}' is no option of 'timm:{name}' here", hint=_NO_OPTIONS[taken[0]])
    create = functools.partial(
        timm.create_model, name, pretrained=False, num_classes=classes, in_chans=channels, **given
    )
    try:
        try:
            return create(img_size=image_size)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return create()
    # timm looks words up, as of an activation, and calls what it finds.
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError) as error:
        raise _cannot(f"timm:{name}", channels, image_size, error, given) from None


def torchvision_model(name: str, *, classes: int, channels: int = 3, image_size: int = 32) -> nn.Module:
    """A classification network of torchvision: images [N, channels, image_size, image_size] -> logits [N, classes].

    Initial values are torchvision's own. With other than 3 channels the first convolution is replaced by one for
    these, normally distributed with the replaced one's mean and deviation. Vision transformers are built for this size
    of image.

    Args:
        name: as in `torchvision.models.list_models(module=torchvision.models)`.

    Raises:
        UserError: torchvision is not installed, has no such model, or cannot build it for such images.
    """
    models = _library("torchvision.models")
    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"torchvision has no classification model '{name}'", hint=did_you_mean(name, known))
    check_sizes(f"'torchvision:{name}'", classes=classes, channels=channels, image_size=image_size)
    builder = models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None, "num_classes": classes}
    if "VisionTransformer" in str(inspect.signature(builder).return_annotation):
        options["image_size"] = image_size
    if name in _AUXILIARY:
        # They make the output in train mode a tuple.
        options |= {"aux_logits": False, "init_weights": True}
    try:
        model: nn.Module = builder(**options)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise _cannot(f"torchvision:{name}", channels, image_size, error) from None
    if name in _AUXILIARY:
        model.left_out = (_AUXILIARY[name], _WITHOUT_AUXILIARY)  # type: ignore[assignment]
    if channels != 3:
        _change_channels(model, channels)
    return model


def small_image_resnet(depth: int, *, classes: int, channels: int = 3, image_size: int = 32) -> nn.Module:
    """ImageNet's residual network for small images: [N, channels, H, W] -> logits [N, classes].

    torchvision's network of that depth, whose stem is one 3×3 convolution of stride 1 without pooling after it, so that
    the four stages see 1, 1/2, 1/4 and 1/8 of the image's side. Initial values are torchvision's.

    Args:
        depth: 18, 34, 50, 101 or 152.

    Raises:
        UserError: torchvision is not installed, or has no such depth.
    """
    models = _library("torchvision.models")
    builder = f"resnet{depth}"
    known = [name for name in models.list_models(module=models) if re.fullmatch(r"resnet\d+", name)]
    if builder not in known:
        depths = sorted(int(name.removeprefix("resnet")) for name in known)
        what = f"'{builder}_32x32' does not exist: torchvision has no residual network of depth {depth}"
        raise UserError(what, hint=f"the depths are {', '.join(map(str, depths))}")
    check_sizes(f"'{builder}_32x32'", classes=classes, channels=channels, image_size=image_size)
    model: nn.Module = models.get_model_builder(builder)(weights=None, num_classes=classes)
    stem = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.register_module("conv1", stem)
    model.register_module("maxpool", nn.Identity())
    return model


def _change_channels(model: nn.Module, channels: int) -> None:
    path, old = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    settings = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    new = nn.Conv2d(channels, old.out_channels, bias=old.bias is not None, **settings)
    nn.init.normal_(new.weight, old.weight.mean().item(), old.weight.std().item())
    if old.bias is not None and new.bias is not None:
        new.load_state_dict({"weight": new.weight, "bias": old.bias})
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(f"{package} cannot be imported: {error}", hint=f"install it: pip install {package}") from None


def _cannot(name: str, channels: int, image_size: int, error: Exception, options: Collection[str] = ()) -> UserError:
    reason = first_line(error)
    own = f"check its options ({', '.join(options)}), " if options else ""
    return UserError(
        f"'{name}' cannot be built for images of {channels}×{image_size}×{image_size}: {reason}",
        hint=f"{own}choose another model, or a data set with larger images",
    )
