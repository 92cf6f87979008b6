"""Hook points of networks that kdbench does not define, found by looking at how they run.

Stages are those that a network declares itself (timm's `feature_info`). Where it declares none (torchvision), they are
found from a trace: among the children of the one module in which most of the changes of resolution happen, the last one
at each resolution ends a stage. A network that keeps its resolution (a plain transformer) has one stage a block.
Only modules can be hooked: where a network applies a ReLU as a function (torchvision's densenet121, after its last
stage), the layer is what came before it, and there is no pre-activation. Of a transformer whose layers all keep a token
for each patch of the image, these tokens are maps too.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from kdbench.models.places import FIRST, LAST, Place, shapes_at, with_orders
from kdbench.models.probing import DRY, UNSUITABLE, cannot_take, dry_run, logits_of, watched

# A side at which networks made for ImageNet keep all their stages apart (2 pixels are left after a stride of 128).
_SIDE = 256

# Modules that end no stage: they summarize, drop or reshape what the stage gave.
_NO_STAGE = re.compile(r"Pool\dd$|Flatten|Dropout|Identity|Permute")


@dataclass
class _ModuleCall:
    path: str
    module: nn.Module
    output: Any


def derived_places(
    model: nn.Module, model_name: str, image_shape: tuple[int, int, int], larger: Callable[[int], nn.Module] | None
) -> dict[str, Place]:
    """stem (where there is one before the stages), layerK, layerK.preact where a ReLU or ReLU6 ends the stage, pooled;
    logits.class and logits.distillation of timm's networks with two heads; layerK.patches and last.patches of
    transformers. Of a network without stages there is `pooled` at most.

    Args:
        larger: builds the network anew for another side of images, for such as take one size only.

    Raises:
        UserError: the network cannot run on such images.
    """
    calls, output = _trace(model, model_name, image_shape)
    logits = logits_of(model_name, output)
    last = {call.path: call for call in calls}
    stages = _declared_stages(model, calls)
    if stages is None:
        stages = _stages_by_resolution(calls)
    stem, layers = _split_stem(stages) if stages else (None, [])
    found = {"stem": Place(stem, "output")} if stem else {}
    for number, path in enumerate(layers, start=1):
        found[f"layer{number}"] = Place(path, "output")
        relu = _final_relu(path, last)
        if relu is not None:
            found[f"layer{number}.preact"] = Place(relu, "input")
    classifier = _classifier(calls, logits)
    if classifier is not None:
        found["pooled"] = Place(classifier, "input")
    heads = getattr(model, "pretrained_cfg", {}).get("classifier")
    if isinstance(heads, tuple) and len(heads) == 2:
        # Of a head that is more than one layer, timm names the layer.
        names = ("logits.class", "logits.distillation")
        found |= {name: Place(head.partition(".")[0], "output") for name, head in zip(names, heads, strict=True)}
    ordered = with_orders(model, found, set(), model_name, image_shape, larger)
    # timm's networks may declare the order of their stages' maps.
    declared = {"NCHW": FIRST, "NHWC": LAST}.get(str(getattr(model, "output_fmt", "")))
    return {
        point: place._replace(order=declared) if place.order is None and point.startswith("layer") else place
        for point, place in ordered.items()
    } | (_patches(model, calls, layers, image_shape) if layers else {})


def _trace(model: nn.Module, model_name: str, image_shape: tuple[int, int, int]) -> tuple[list[_ModuleCall], object]:
    """All calls of modules in the order in which they end, with their outputs, and the network's own output."""
    large = (image_shape[0], max(_SIDE, image_shape[1]), max(_SIDE, image_shape[2]))
    failure: BaseException | None = None
    # Without computing anything where that is possible; networks of a fixed size refuse the large image.
    for shape, meta in ((large, True), (image_shape, True), (image_shape, False)):
        calls: list[_ModuleCall] = []

        def noted(module: nn.Module, path: str, calls: list[_ModuleCall] = calls) -> Callable[[object], None]:
            return lambda output: calls.append(_ModuleCall(path, module, output))

        try:
            with watched([(module, "output", noted(module, path)) for path, module in model.named_modules()]):
                return calls, dry_run(model, shape, meta)
        except UNSUITABLE as error:
            failure = error
    assert failure is not None
    raise cannot_take(model_name, image_shape, failure)


def _declared_stages(model: nn.Module, calls: list[_ModuleCall]) -> list[str] | None:
    """Stages by `feature_info`, without such as only pool. None where the network declares none."""
    info = getattr(model, "feature_info", None)
    entries = getattr(info, "info", info)
    if not isinstance(entries, list | tuple) or not entries:
        return None
    last = {call.path: call for call in calls}
    stages = []
    for entry in entries:
        call = last.get(str(entry.get("module")))
        if call is None or not isinstance(call.output, Tensor):
            return []
        if isinstance(call.module, nn.Identity):
            # Declared for the sake of other variants of the family: the stage is the module before it.
            same = [c for c in calls if c.output is call.output and not isinstance(c.module, nn.Identity)]
            call = same[-1] if same else call
        if not _NO_STAGE.search(type(call.module).__name__):
            stages.append(call.path)
    return stages


def _stages_by_resolution(calls: list[_ModuleCall]) -> list[str]:
    children: dict[str, list[_ModuleCall]] = {}
    for call in calls:
        if call.path and _resolution(call) is not None:
            children.setdefault(call.path.rpartition(".")[0], []).append(call)
    if not children:
        return []

    def rank(parent: str) -> tuple[int, int]:
        inside = children[parent]
        kinds = Counter(type(call.module) for call in inside)
        changes = Counter(kind for kind, _ in {_resolution(call) for call in inside})  # type: ignore[misc]
        return max(changes.values()), max(kinds.values())

    trunk = children[max(children, key=rank)]
    inside = [call for call in trunk if not _NO_STAGE.search(type(call.module).__name__)]
    ends = {_resolution(call): call.path for call in inside}
    return list(ends.values()) if len(ends) > 1 else list(dict.fromkeys(call.path for call in inside))


def _resolution(call: _ModuleCall) -> tuple[str, int] | None:
    """Side of a square map (of whichever layout), or number of tokens. None for anything else, single pixels too."""
    shape = tuple(call.output.shape) if isinstance(call.output, Tensor) else ()
    if len(shape) == 4:
        side = shape[2] if shape[2] == shape[3] else shape[1]
        return ("map", side) if side > 1 else None
    return ("tokens", shape[1]) if len(shape) == 3 else None


def _split_stem(stages: list[str]) -> tuple[str | None, list[str]]:
    """What comes before the longest run of stages that are called alike is the stem: act1 | layer1 … layer4."""
    runs = [list(run) for _, run in groupby(stages, key=lambda path: re.split(r"\d", path, maxsplit=1)[0])]
    first = stages.index(max(runs, key=len)[0])
    return (stages[first - 1] if first else None), stages[first:]


def _patches(
    model: nn.Module, calls: list[_ModuleCall], layers: list[str], image_shape: tuple[int, int, int]
) -> dict[str, Place]:
    """Tokens of the image's patches as maps, behind each layer and behind the norm that follows the last one.

    The grid is that of the last convolution before the layers. Networks that have fewer tokens in a later layer have
    none: those may lie in another order.
    """
    ends = {call.path: i for i, call in enumerate(calls)}
    begins = next(i for i, call in enumerate(calls) if f"{call.path}.".startswith(f"{layers[0]}."))
    convolutions = [
        call.path for call in calls[:begins] if isinstance(call.module, nn.Conv2d) and len(call.output) == DRY
    ]
    outputs = [calls[ends[path]].output for path in layers]
    if not convolutions or not all(isinstance(output, Tensor) and output.ndim == 3 for output in outputs):
        return {}
    # A norm inside another module is that one's own: of attention from the class token alone, say.
    beside = layers[-1].rpartition(".")[0].rpartition(".")[0]
    behind = [call for call in calls[ends[layers[-1]] :] if call.path.rpartition(".")[0] == beside]
    norms = [call.path for call in behind if "Norm" in type(call.module).__name__]
    at = {path: Place(path, "output") for path in (convolutions[-1], *layers, *norms)}
    shapes = shapes_at(model, at, image_shape)
    height, width = shapes.get(convolutions[-1], (0, 0))[-2:]
    whole = [path for path in (*layers, *norms) if len(shapes.get(path, ())) == 3 and shapes[path][1] >= height * width]
    if not height or whole[: len(layers)] != layers:
        return {}
    found = {f"layer{number}.patches": path for number, path in enumerate(layers, start=1)}
    found["last.patches"] = (*whole[len(layers) :], layers[-1])[0]
    return {point: Place(path, "output", grid=(height, width)) for point, path in found.items()}


def _final_relu(stage: str, last: dict[str, _ModuleCall]) -> str | None:
    """The ReLU inside a stage whose last output is the stage's own output."""
    output = last[stage].output
    for path, call in last.items():
        inside = path == stage or path.startswith(f"{stage}.")
        if inside and isinstance(call.module, nn.ReLU | nn.ReLU6) and call.output is output:
            return path
    return None


def _classifier(calls: list[_ModuleCall], logits: object) -> str | None:
    """The last module with weights of its own, if what it gives is what the network returns."""
    for call in reversed(calls):
        # Not the network itself, which may have parameters too (a class token).
        if call.path and any(True for _ in call.module.parameters(recurse=False)):
            gives = call.output
            same = gives is logits or (
                isinstance(call.module, nn.Conv2d) and isinstance(logits, Tensor) and gives.numel() == logits.numel()
            )
            return call.path if same else None
    return None
