"""What a loss is told: the arguments by which its function, or its module, asks for something of the cell it is in.

No card sets them. Beside these names, an argument annotated as a module (`nn.Module`) asks for the module of that name
among the method's `modules`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from kdbench.signature import REQUIRED, Parameter, parameters

# Of the batch; its values come first among the arguments, after those of the networks.
OF_BATCH = ("labels", "index", "mask")
_OF_NETWORKS = re.compile("(student|teacher|other)s?(?![a-z])")


# Name -> what it is. The last two are told anew at every step, the others once the cell is built.
TOLD = {
    "known_classes": "classes that the teacher was trained on; None: all",
    "training_labels": "labels of the images that the cell trains on, int64 [M], on the CPU",
    "batch_size": "images of a batch; the last one of a pass may have fewer",
    "student_classifier": "the module that makes the student's logits of its pooled features",
    "teacher_classifier": "the same of the teacher",
    "student_batch_norm": "the batch norm before the student's hook point",
    "teacher_batch_norm": "the same of the teacher",
    "student_tail": "what the student does behind the hook point named for the teacher, a `kdbench.models.tails.Tail`",
    "progress": "steps done of the stage, as a share in [0, 1); float32 [] on the device",
    "epoch": "whole epochs done of the stage, from 0; float32 [] on the device",
}


def asked(target: str, called: bool) -> list[str]:
    """Names that a target asks for, in its call or (of a class) when it is built."""
    known = parameters(target, called).values()
    return [p.name for p in known if p.name in TOLD or is_module(p)]


def asks_for_modules(target: str) -> list[str]:
    """Modules of the method that a loss asks for, in either place."""
    known = {**parameters(target), **parameters(target, called=True)}
    return [p.name for p in known.values() if is_module(p) and p.name not in TOLD]


def is_module(parameter: Parameter) -> bool:
    """Whether an argument is a module, which no card can set."""
    return parameter.annotation.rpartition(".")[2] == "Module"


def inputs_of(target: str) -> list[str]:
    """What the first arguments of a loss take, by their names: `student…`, `teacher…`, `other…`, or one `OF_BATCH`.

    One with a default, or of a plain type such as float, is an option; a card's `inputs` can say otherwise.
    """
    found = []
    for parameter in parameters(target, called=True).values():
        network = _OF_NETWORKS.match(parameter.name)
        option = parameter.type in (int, float, bool, str) or parameter.default is not REQUIRED
        if option or parameter.name in TOLD or is_module(parameter) or not (network or parameter.name in OF_BATCH):
            break
        found.append(network[1] if network else parameter.name)
    return found


def losses_in(method: Mapping[str, Any]) -> Iterator[str]:
    """Losses that the stages of a method's card name as `module:object`."""

    def parts(data: Any) -> list[Any]:
        found = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
        return [one for one in found if isinstance(one, dict)]

    for stage in parts(method.get("stages")):
        for term in parts(stage.get("losses")):
            if isinstance(loss := term.get("loss"), str) and ":" in loss:
                yield loss
