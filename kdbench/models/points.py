"""The names of hook points, the same for every model.

`stem`, `layer1` … `layerN`, `layer1.preact` … `layerN.preact`, `pooled` and `logits`; `layers` and `layers.preact`
stand for all of them in the order of the layers, `layers.last` and `layers.last.preact` for the last of them.
`last.preact` is the map of one more convolution behind the layers, before its ReLU, where a network pools that.
`layer1.patches` … `layerN.patches` are the tokens of the image's patches as a map, where a transformer keeps one for
each, and `last.patches` those behind the last layer, after the norm that many have there. Of several teachers at once,
`teacher2.layer1` is that of the second one.
Networks with a head for the labels and one for a teacher have `logits.class` and `logits.distillation`, and answer
`logits`, the mean of both.
`layer1.gradient` and so on are gradients of the logit of each image's label with respect to what is found at the place,
and `images.gradient` with respect to the images as the network gets them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from kdbench.errors import UserError

P = TypeVar("P")

LOGITS, LAST = "logits", "layers.last"
IMAGES, _GRADIENT = "images", ".gradient"
# What hook points of layers may be called after the layer, and why some networks have none.
_ENDINGS = {
    "preact": "{layer} does not end in a ReLU",
    "patches": "its layers do not keep a token for each patch of the image",
}
# Names that stand for all hook points of one form.
POINT_GROUPS = {
    group + ending: re.compile(rf"layer(\d+){re.escape(ending)}")
    for group in ("layers", LAST)
    for ending in ("", *(f".{ending}" for ending in _ENDINGS))
}
# How a recipe names hook points.
_EXAMPLE = "'student: {name: MODEL, hooks: {layer1: MODULE, layer2: MODULE, pooled: input(MODULE)}}'"
# What to do where patches are missing.
TRANSFORMERS = "transformers such as 'timm:deit_tiny_patch16_224' have patches"

# What to do where something wants a map, or a vector, and gets tokens [T, C].
OF_TOKENS = (
    "a transformer's tokens are no map: 'layerK.patches' is one ('kdbench show models NAME' lists them, and 'student' "
    "and 'teacher' of a loss term name them), and 'pooled' is a vector"
)


def point_name(name: str) -> str:
    """`name`, if a hook point of a card can be called so. Raises ValueError otherwise."""
    endings = "|".join(_ENDINGS)
    layer = rf"layer[1-9]\d*(\.({endings}))?|last\.({endings})"
    if not re.fullmatch(rf"stem|{layer}|pooled|logits\.(class|distillation)", name):
        raise ValueError(
            "a hook point is called stem, layer1, layer1.preact, layer1.patches, …, last.preact, last.patches, pooled, "
            "logits.class or logits.distillation"
        )
    return name


def numbered(name: str) -> tuple[str, str]:
    """A hook point's teacher, by number where it is one of several ("teacher2."), and its name in that network."""
    number, dot, own = name.partition(".")
    return (f"{number}.", own) if dot and re.fullmatch(r"teacher[1-9]\d*", number) else ("", name)


def place_of_gradient(point: str) -> str | None:
    """With respect to what a gradient is: a hook point or group, or "images"; None for a point that is no gradient."""
    return point.removesuffix(_GRADIENT) if point.endswith(_GRADIENT) else None


def gradient_at(place: str) -> str:
    """The name of the gradient with respect to a place."""
    return place + _GRADIENT


def any_gradient(points: Iterable[str]) -> bool:
    """Whether gradients are among some points."""
    return any(place_of_gradient(point) is not None for point in points)


def needed_for(points: Iterable[str]) -> list[str]:
    """The places, each once, that a network must give its values at, for gradients among the points too."""
    found: dict[str, None] = {}
    for point in points:
        place = place_of_gradient(point)
        found |= dict.fromkeys([point] if place is None else [place, LOGITS])
    return [point for point in found if point != IMAGES]


def expand(names: Iterable[str], available: Iterable[str], model_name: str | None = None) -> list[str]:
    """Hook points in the order asked for, groups replaced by their points in the order of layers.

    Args:
        names: hook points and groups (`POINT_GROUPS`).
        available: the points that a model has.
        model_name: for messages.

    Raises:
        UserError: a point that the model lacks; a `.preact`, or the group of them, where a layer ends without a ReLU;
            `.patches` where layers keep none.
    """
    known = list(available)
    whose = f"model '{model_name}'" if model_name else "the model"
    result: list[str] = []
    for name in names:
        if (place := place_of_gradient(name)) is not None:
            if place == LOGITS:
                raise UserError(f"{whose} has no '{name}': it would be the same for all networks", hint=_has(known))
            if numbered(place)[0]:
                what = f"{whose} has no '{name}': several teachers have one gradient, that of their mean logits"
                raise UserError(what, hint="leave the number out, or take one teacher")
            places = [place] if place == IMAGES else expand([place], known, model_name)
            result += map(gradient_at, places)
            continue
        number, own = numbered(name)
        pattern = POINT_GROUPS.get(name)
        if number and own in POINT_GROUPS:
            of_one = [point.removeprefix(number) for point in known if point.startswith(number)]
            result += [number + point for point in expand([own], of_one, model_name)]
            continue
        if pattern is None:
            result.append(existing(name, known, whose))
            continue
        members = sorted((p for p in known if pattern.fullmatch(p)), key=lambda p: int(pattern.fullmatch(p)[1]))  # type: ignore[index]
        if ending := name.removeprefix(LAST).removeprefix("layers"):
            for layer in expand([name.removesuffix(ending)], known, model_name):
                existing(f"{layer}{ending}", known, whose)
        if not members:
            raise UserError(f"{whose} has no hook points '{name}'", hint=_has(known))
        result += members[-1:] if ".last" in name else members
    return result


def in_order(found: Mapping[str, P]) -> dict[str, P]:
    def key(point: str) -> tuple[int, int, bool, str]:
        match = re.fullmatch(r"layer(\d+)(\.\w+)?", point)
        group = 1 if match else {"stem": 0, "pooled": 2}.get(point, 3)
        return group, int(match[1]) if match else 0, bool(match and match[2]), point

    return {point: found[point] for point in sorted(found, key=key)}


def existing(point: str, known: Sequence[str], whose: str) -> str:
    if point in known:
        return point
    layer, _, rest = point.partition(".")
    if rest in _ENDINGS and (layer in known or rest == "patches"):
        other = TRANSFORMERS if rest == "patches" else "a recipe can name another place under the model's 'hooks'"
        hint = f"{_has(known)}; {other}"
        raise UserError(f"{whose} has no '{point}': {_ENDINGS[rest].format(layer=layer)}", hint=hint)
    raise UserError(f"{whose} has no hook point '{point}'", hint=_has(known))


def _has(known: Sequence[str]) -> str:
    has = f"it has {', '.join(known)}" if known else "it has none"
    if any(re.match(r"(teacher\d+\.)?layer", point) for point in known):
        return has
    # Running the network found no stages, or the recipe or card names none.
    return f"{has}, and no layers; a recipe can name some beside the model, as in {_EXAMPLE}"
