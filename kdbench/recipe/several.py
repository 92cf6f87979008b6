"""Several teachers as one: their hook points by number, and the mean of their logits."""

import re
from collections.abc import Sequence

from kdbench.errors import UserError
from kdbench.image_cards import Normalization
from kdbench.recipe.model_specs import ModelSpec, PartSpec
from kdbench.recipe.specs import TeacherSpec


def several_teachers(members: Sequence[TeacherSpec], where: str) -> TeacherSpec:
    """The teacher that a list of them is.

    Its hook point `teacher2.layer1` is `layer1` of the second one, `logits` the mean of all logits.

    Raises:
        UserError: one of them begins untrained, does not know all classes of the data, or takes images of another size.
    """
    name = " + ".join(member.name for member in members)
    for member in members:
        why = "begins untrained" if member.untrained else ""
        why = why or ("does not know all classes" if member.classes or member.known_classes else "")
        why = why or ("has an 'image_size' of its own" if member.model.image_size is not None else "")
        if why:
            hint = "take teachers that were trained on all classes of these data, on images of their size"
            raise UserError(f"'{member.name}' {why}, so it cannot be one of several teachers", where, hint)
    parts = [PartSpec(model=member.model, normalization=member.normalization) for member in members]
    hooks: dict[str, str] = {}
    for number, member in enumerate(members):
        hooks[f"teacher{number + 1}.logits"] = f"parts.{number}"
        # Derived ones are known once the network runs: of such a member there are the logits.
        own = {} if isinstance(member.model.hooks, str) else member.model.hooks
        for point, place in own.items():
            inner = re.sub(r"([^()]+)(\)*)$", rf"parts.{number}.network.\1\2", place)
            hooks[f"teacher{number + 1}.{point}"] = inner
    channels = len(members[0].normalization.mean)
    return TeacherSpec(
        name=name,
        model=ModelSpec(name=name, target="kdbench.models.several:Several", hooks=hooks, parts=parts),
        normalization=Normalization(mean=[0.0] * channels, std=[1.0] * channels),
        members=[*members],
    )
