"""How much memory cells take: predicted from one small forward pass, to split cohorts that would not fit."""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kdbench.engine.checks.cells import BuiltCell, build_cell, costs_of, multiples
from kdbench.engine.computing.compute import Memory
from kdbench.engine.computing.device import peak_resident
from kdbench.engine.data.batch import Batch, at_once
from kdbench.engine.data.domain import augmentation_of
from kdbench.engine.stage import union
from kdbench.engine.terms import Term
from kdbench.models.hooks import Extractor
from kdbench.models.points import any_gradient
from kdbench.models.probing import DRY, UNSUITABLE, dry_run, watched
from kdbench.recipe.specs import CellSpec

# Parameter, gradient, momentum.
COPIES = 3
# Backward passes hold gradients and kernels' scratch space beside what was saved for them, as a share of that.
SCRATCH = 0.5
# A forward pass without gradients holds about this many of its largest feature maps at once.
MAPS = 4
# Images in the pass that is measured: some losses take pairs, or four that show one image.
IMAGES = 4
FLOAT = 4


def memory_of(spec: CellSpec, device: torch.device, built: BuiltCell | None = None) -> Memory:
    """Predicted for float32 without compilation: other ways take less for activations.

    Args:
        device: on which the cell will train; it says how many images are tested at once.
        built: the cell, where it is built already.
    """
    cell = built or build_cell(spec)
    data, student, terms = spec.data, cell.student.model, cell.terms
    shape, known = spec.student.takes(data).image_shape, spec.teacher.knows(data).image_shape if spec.teacher else None
    batch = min(spec.protocol.batch_size, data.train)
    teacher_bytes = copy = passing = 0
    every = [term for stage in terms.values() for term in stage.values()]
    read = {(name, p) for term in every for name, points in term.points("teacher").items() for p in points}
    by_stage = costs_of(spec)
    costs, times = by_stage.values(), multiples(spec, by_stage)
    learning = cell.teacher if spec.method.trains("teacher") else None
    if cell.teacher is not None and known is not None:
        model = cell.teacher.model
        copy = _bytes(model) * bool(spec.method.own_teacher_stages)
        if made := max((cost.at_once for cost in costs), default=0):
            passing = _passing(model, known) * made
            if any(cost.student for cost in costs):
                passing += _passing(student, shape) * made
        teacher_bytes = 2 * _bytes(model) + MAPS * _largest_map(model, known) * max(
            batch * max([1, *times.values()]), at_once(device, data.image_size)
        )
        teacher_bytes += _passing(model, known) * batch if any_gradient(point for _, point in read) else 0
    features = FLOAT * sum(math.prod(cell.teacher_shapes[p]) * times.get(name, 1) for name, p in read)
    # Tests look at the terms that have metrics: features of both sides, and the connectors' outputs.
    layers = [layer for term in every if term.measured for layer in term.layers]
    looked_at = FLOAT * sum(
        sum(math.prod(cell.shapes[p]) for p in layer.students)
        + 2 * sum(math.prod(cell.teacher_shapes[p]) for p in layer.teachers)
        for layer in layers
    )
    saved = max(
        _saved(
            stage.values(),
            cell,
            learning if "teacher" in spec.method.stages[name].trains else None,
            (shape, known or shape),
            times,
        )
        for name, stage in terms.items()
    )
    trained = [student, *every, *cell.modules.values(), *([learning.model] if learning else [])]
    own = sum(_bytes(one) + (COPIES - 1) * sum(p.nbytes for p in one.parameters()) for one in trained)
    testing = (MAPS * _largest_map(student, shape) + looked_at) * at_once(device, data.image_size)
    training = round((1 + SCRATCH) * saved * batch / IMAGES)
    held = sum(cost.held for cost in costs) + (_bytes(student) if spec.protocol.ema else 0)
    # Resident data are there as they were read, and in parts on the device.
    domains = [part for part in spec.domains if not part.streamed]
    both = sum(2 * (part.train + part.test) * math.prod(part.image_shape) for part in domains)
    if device.type == "cuda" and ("data", "logits") in read:
        # A table of teacher logits, where there is one, lies on the GPU.
        views = augmentation_of(spec.protocol).views
        tabled = not data.streamed and spec.protocol.augmentation.finite
        both += FLOAT * data.train * views * cell.teacher_shapes["logits"][0] if tabled else 0
    return Memory(both, teacher_bytes, features * batch, own + copy + held, max(training + passing, testing))


def _saved(
    terms: Collection[Term],
    cell: BuiltCell,
    learning: Extractor | None,
    shapes: tuple[tuple[int, int, int], ...],
    times: Mapping[str, int],
) -> int:
    """Bytes that autograd keeps of a stage's terms, for `IMAGES` images.

    Args:
        learning: the teacher, where the stage trains it.
        shapes: of an image for the student, and for the teacher.
        times: of `multiples`.
    """
    names = list(dict.fromkeys(name for term in terms for name in term.input_sets))
    asked = {network: union(term.points(network) for term in terms) for network in ("student", "teacher")}
    few = min([IMAGES, *(term.most for term in terms if term.most)])
    images = {n: few * times.get(n, 1) for n in names}
    labels = {n: torch.zeros(images[n], dtype=torch.int64) for n in names}
    sets = {n: Batch(torch.randn(images[n], *shapes[0]), labels[n], labels[n], mask=labels[n] == 0) for n in names}

    def taught(name: str) -> dict[str, Tensor]:
        """The teacher's values on an input set: its own, where it is trained, else any of their shapes."""
        points = asked["teacher"].get(name, [])
        if learning is None:
            return {point: torch.randn(images[name], *cell.teacher_shapes[point]) for point in points}
        return learning(torch.randn(images[name], *shapes[1]), points, labels[name]) if points else {}

    kept = Saved(cell.student.model, *([learning.model] if learning else []))
    with kept:
        values: dict[str, dict[str, dict[str, Tensor]]] = {
            "student": {n: cell.student(sets[n].images, asked["student"].get(n, []), labels[n]) for n in names},
            "teacher": {n: taught(n) for n in names},
        }
        total = sum(term(values, sets) for term in terms)
    assert isinstance(total, Tensor)
    return kept.bytes * IMAGES // few


def peak_memory(device: torch.device) -> int:
    """The most memory that this process had so far, in bytes: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident()


class Saved(saved_tensors_hooks):
    """Counts the bytes that autograd keeps for the backward pass, parameters left out."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self.known = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
        self.bytes = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def _passing(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Bytes that a pass with a gradient to the images takes, for each of them."""
    frozen = [p for p in model.parameters() if p.requires_grad]
    was_training = model.training
    model.eval().requires_grad_(False)
    kept = Saved(model)
    with kept:
        model(torch.randn(IMAGES, *shape, requires_grad=True))
    for parameter in frozen:
        parameter.requires_grad_(True)
    model.train(was_training)
    return round((1 + SCRATCH) * kept.bytes / IMAGES)


def _largest_map(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Bytes of the largest output of a module, of one image."""
    sizes = [0]

    def note(output: object) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.numel() * output.element_size())

    with watched((module, "output", note) for module in model.modules()):
        try:
            dry_run(model, shape, meta=True)
        except UNSUITABLE:
            dry_run(model, shape)
    return max(sizes) // DRY


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
