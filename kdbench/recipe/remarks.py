"""Notes on what may surprise in a plan: whose normalization images get, and whose weights a student starts from."""

from collections.abc import Iterable
from pathlib import Path

from kdbench.files import find_weights
from kdbench.image_cards import Normalization
from kdbench.recipe.beside import origin_of
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.specs import CellSpec, TeacherSpec

# Half a step of pixels of 8 bits: means and deviations that are closer are the same, rounded.
_SAME = 0.5 / 255


def remarks(specs: Iterable[CellSpec]) -> list[str]:
    """Sentences on all cells of a plan, each once."""
    found: dict[str, None] = {}
    for spec in specs:
        of_teachers = [text for one in spec.teachers for text in _teacher(one, spec.data)]
        found |= dict.fromkeys([*replaced_normalization(spec), *of_teachers, *_start(spec)])
    return list(found)


def replaced_normalization(spec: CellSpec) -> list[str]:
    """Where students do not get the data card's normalization."""
    own, card = spec.protocol.normalization, spec.data.normalization
    if alike(own, card):
        return []
    whose = "its teacher's" if spec.method.starts_from == "teacher" else f"protocol '{spec.protocol.name}'"
    return [
        f"the student's images are normalized by {said(own)} ({whose}), not by {said(card)} of the data card "
        f"'{spec.data.name}'"
    ]


def alike(one: Normalization, other: Normalization) -> bool:
    """Whether two normalizations are the same but for rounding."""
    pairs = zip([*one.mean, *one.std], [*other.mean, *other.std], strict=False)
    return len(one.mean) == len(other.mean) and all(abs(a - b) <= _SAME for a, b in pairs)


def said(normalization: Normalization) -> str:
    """As 'mean 0.305, deviation 0.376'."""
    mean, deviation = (" ".join(f"{v:.4g}" for v in part) for part in (normalization.mean, normalization.std))
    return f"mean {mean} and deviation {deviation}"


def _teacher(teacher: TeacherSpec, data: DataSpec) -> list[str]:
    if teacher.trained_by is not None:
        own, origin = teacher.trained_by.protocol.normalization, "its training"
    else:
        training = origin_of(Path(teacher.weights.file)) if teacher.weights else None
        if training is None:
            return _unstated(teacher, data)
        own, origin = training.normalization, "its training, by the record beside its weights"
        if alike(own, teacher.normalization):
            side = teacher.model.image_size
            of = f"of {side}×{side} pixels, " if side is not None and side == training.image_size else ""
            return [f"the teacher '{teacher.name}' takes images {of}normalized by {said(own)}, as in {origin}"]
    if alike(own, teacher.normalization):
        return []
    return [
        f"the teacher '{teacher.name}' takes images normalized by {said(teacher.normalization)}; in {origin} it was "
        f"{said(own)}"
    ]


def _unstated(teacher: TeacherSpec, data: DataSpec) -> list[str]:
    """Where a teacher from elsewhere gets the data card's normalization, and no stated accuracy would show that it was
    trained with another."""
    if teacher.weights is None or teacher.accuracy is not None:
        return []
    if not alike(teacher.normalization, data.normalization):
        return []
    return [
        f"the teacher '{teacher.name}' takes images normalized by {said(data.normalization)}, as on the data card "
        f"'{data.name}': if it was trained with others, write them as 'normalization' beside its 'weights'"
    ]


def _start(spec: CellSpec) -> list[str]:
    file = find_weights(spec.student.weights) if spec.student.weights is not None else None
    training = origin_of(file) if file is not None else None
    if training is None:
        return []
    found = []
    if not training.knows(spec.data.name, spec.data.classes):
        found.append(f"the student starts from weights that were trained on '{training.data.name}'")
    if not alike(training.normalization, spec.protocol.normalization):
        found.append(
            "the student starts from weights that were trained on images normalized by "
            f"{said(training.normalization)}; here it is {said(spec.protocol.normalization)}: to go on with theirs, "
            "write it under 'protocol'"
        )
    return found
