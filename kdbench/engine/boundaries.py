"""How alike the decision boundaries of two networks are: MagSim and AngSim of Heo et al. (AAAI 2019, arXiv 1805.05532),
for any two networks, and for the students of finished cells against their teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import kdbench
from kdbench.engine.batches import SLICE, Normalizer, load_data
from kdbench.engine.runner import Options, teacher_folder
from kdbench.engine.streamed import part_for_testing
from kdbench.engine.teachers import load_teacher, locate, trained
from kdbench.errors import UserError
from kdbench.files import home
from kdbench.losses.bss import angle_similarity, magnitude_similarity
from kdbench.recipe.schema import CellSpec, TeacherSpec
from kdbench.results.record import Record
from kdbench.results.soundness import spec_of
from kdbench.sources.attack import boundary_attack

# Logits of pixel values [N, C, H, W] on the scale of [0, 1].
Classifier = Callable[[Tensor], Tensor]
# What pixel values can be: an image stays one on its way.
PIXELS = (0.0, 1.0)


@dataclass(frozen=True)
class Ways:
    """One network's ways from images to its boundary.

    Attributes:
        displacement: float32 [P, C, H, W], from image to boundary, in pixel values on the scale of [0, 1].
        arrived: bool [P], whether it ends in the pair's target class.
        right: bool [P], whether the network classifies the pair's image correctly.
    """

    displacement: Tensor
    arrived: Tensor
    right: Tensor


@dataclass(frozen=True)
class Pairs:
    """Images, each with one target class: images float32 [P, C, H, W], base and target int64 [P]."""

    images: Tensor
    base: Tensor
    target: Tensor


@dataclass(frozen=True)
class Similarity:
    """Two networks' boundaries compared.

    Attributes:
        images: compared, out of those given: both networks classify them correctly.
        pairs: of an image and a target class in which both networks' attacks arrived; the means are over these.
        magnitude: MagSim in [0, 1]. angle: AngSim in [-1, 1]. Both NaN without a pair.
        student_arrived, teacher_arrived: share of the images' pairs in which the network's attack arrived.
        student_length, teacher_length: mean L2 length of the ways, in pixel values on the scale of [0, 1].
    """

    images: int
    pairs: int
    magnitude: float
    angle: float
    student_arrived: float
    teacher_arrived: float
    student_length: float
    teacher_length: float


@dataclass(frozen=True)
class Look:
    """A way for a picture. Images as [H, W, C] of pixel values; `at`: places from the image (0) to the boundary sample
    (1) and beyond; `scores`: network -> the base and the target class's logits there."""

    image: Tensor
    moved: Tensor
    base: str
    target: str
    at: Tensor
    scores: dict[str, tuple[Tensor, Tensor]]


def pairs_of(teacher: Classifier, images: Tensor, labels: Tensor, targets: int | None = None) -> Pairs:
    """Every image with each other class, or with the `targets` classes that the teacher takes for most probable.

    Args:
        images: [N, C, H, W], pixel values on the scale of [0, 1]. labels: int64 [N].
    """
    with torch.no_grad():
        logits = torch.cat([teacher(part) for part in images.split(_slice(images))])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    count = logits.shape[1] - 1 if targets is None else min(targets, logits.shape[1] - 1)
    chosen = others.topk(count, dim=1).indices
    return Pairs(images.repeat_interleave(count, 0), labels.repeat_interleave(count, 0), chosen.flatten())


def ways_to_boundary(network: Classifier, pairs: Pairs, *, iterations: int = 10, epsilon: float = 1e-4) -> Ways:
    """A network attacked on every pair, by Newton's step in the space of pixel values.

    Lengths are measured in that space for every network, whatever each one's normalization is. Its parameters must not
    depend on it: it is in eval mode.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    size = _slice(pairs.images)
    for images, base, target in zip(
        *(part.split(size) for part in (pairs.images, pairs.base, pairs.target)), strict=True
    ):
        with torch.no_grad():
            right = network(images).argmax(dim=1) == base
        ended = boundary_attack(network, images, base, target, iterations=iterations, epsilon=epsilon, clamp=PIXELS)
        found.append((ended.images - images, ended.arrived, right))
    return Ways(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def similarity(student: Ways, teacher: Ways, targets: int) -> Similarity:
    """Two networks' ways compared, on the images that both classify correctly.

    Args:
        student, teacher: ways of the same pairs, in which each image comes `targets` times in a row.
    """
    looked_at = student.right & teacher.right
    both = looked_at & student.arrived & teacher.arrived
    arguments = (student.displacement, teacher.displacement, both)
    lengths = [float(ways.displacement[both].flatten(1).norm(dim=1).mean()) for ways in (student, teacher)]
    shares = [float(ways.arrived[looked_at].float().mean()) for ways in (student, teacher)]
    return Similarity(
        int(looked_at.sum()) // targets,
        int(both.sum()),
        float(magnitude_similarity(*arguments)),
        float(angle_similarity(*arguments)),
        shares[0],
        shares[1],
        lengths[0],
        lengths[1],
    )


def boundary_similarity(
    student: Classifier, teacher: Classifier, images: Tensor, labels: Tensor, targets: int | None = None
) -> Similarity:
    """MagSim and AngSim of two networks in eval mode.

    Both are attacked from the same images towards the same classes, each by its own gradients; an image counts where
    both classify it correctly, a pair where both attacks arrive.

    Args:
        student, teacher: pixel values [N, C, H, W] on the scale of [0, 1] -> logits [N, K]; each normalizes for itself.
        images: such pixel values. labels: int64 [N].
        targets: classes an image is moved to, those that the teacher takes for most probable; None: all others.
    """
    pairs = pairs_of(teacher, images, labels, targets)
    each = len(pairs.images) // max(len(images), 1)
    return similarity(ways_to_boundary(student, pairs), ways_to_boundary(teacher, pairs), each)


def way_to_look_at(
    networks: dict[str, Classifier], of: str, image: Tensor, base: int, target: int, names: Sequence[str]
) -> Look:
    """One image on its way to a network's boundary, and the two classes' logits along it.

    Args:
        networks: whose logits are asked; `of`: whose boundary it is.
        image: [C, H, W], pixel values on the scale of [0, 1].
    """
    both = torch.tensor([base, target], device=image.device)
    ended = boundary_attack(networks[of], image[None], both[:1], both[1:], clamp=PIXELS).images[0]
    at = torch.linspace(0.0, 1.5, 61, device=image.device)
    line = image + at.view(-1, 1, 1, 1) * (ended - image)
    with torch.no_grad():
        scores = {name: network(line).cpu() for name, network in networks.items()}
    return Look(
        image.permute(1, 2, 0).cpu(),
        ended.permute(1, 2, 0).cpu(),
        names[base],
        names[target],
        at.cpu(),
        {name: (found[:, base], found[:, target]) for name, found in scores.items()},
    )


def of_cells(
    records: Sequence[Record],
    options: Options,
    images: int,
    targets: int | None,
    device: torch.device,
    tell: Callable[[str], None],
    pictures: int = 0,
) -> Iterator[tuple[Record, Similarity | None, list[Look]]]:
    """Students of finished cells against their teacher, on evenly spaced test images.

    A cell without a teacher is held against that of the other cells on its data, where they have only one.

    Args:
        images: test images, before those are left out that one of the two gets wrong.
        pictures: ways to look at, of the first cell's images (none for the others).

    Yields:
        a record with its similarity, and the ways; None for a cell for which there is no teacher.

    Raises:
        UserError: a record that this version cannot read, no weights of a student or a teacher, no data.
    """
    specs = [readable_spec(record) for record in records]
    known: dict[str, list[TeacherSpec]] = {}
    for spec in specs:
        if spec.teacher is not None and spec.teacher.classes is None:
            of_data = known.setdefault(spec.data.name, [])
            if all(spec.teacher.identity() != other.identity() for other in of_data):
                of_data.append(spec.teacher)
    teachers: dict[str, tuple[Classifier, Pairs, Ways, int, Sequence[str]]] = {}
    for record, spec in zip(records, specs, strict=True):
        candidates = known.get(spec.data.name, [])
        teacher = spec.teacher or (candidates[0] if len(candidates) == 1 else None)
        if teacher is None or teacher.classes is not None:
            yield record, None, []
            continue
        key = f"{spec.data.name} {teacher.identity()}"
        if key not in teachers:
            tell(f"{teacher.name}: its boundary around {images} test images of {spec.data.name}")
            teachers[key] = _prepared(record, spec, teacher, options, images, targets, device)
        classifier, pairs, ways, each, names = teachers[key]
        tell(f"{record.cell.label}, seed {record.cell.seed}")
        student = student_of(record, spec, options.registries, device)
        own = ways_to_boundary(student, pairs)
        looks: list[Look] = []
        if pictures:
            networks = {"teacher": classifier, f"{record.cell.label}, seed {record.cell.seed}": student}
            right = (own.right & ways.right).view(-1, each)[:, 0].nonzero().flatten()[:pictures].tolist()
            # The first of an image's pairs is the class that the teacher takes for most probable beside its own.
            for image in (i * each for i in right):
                pair = (int(pairs.base[image]), int(pairs.target[image]))
                looks.append(way_to_look_at(networks, "teacher", pairs.images[image], *pair, names))
            pictures = 0
        yield record, similarity(own, ways, each), looks


def _prepared(
    record: Record,
    spec: CellSpec,
    teacher: TeacherSpec,
    options: Options,
    images: int,
    targets: int | None,
    device: torch.device,
) -> tuple[Classifier, Pairs, Ways, int, Sequence[str]]:
    """A teacher, the pairs that it gives rise to, its ways, pairs an image, and the classes' names."""
    roots = [Path(root) for root in ([spec.data.root] if spec.data.root else options.roots())]
    data = load_data(spec.data, roots, options.download, home() / "cache")
    part = part_for_testing(spec.data, data, device)
    part = part.every(max(1, -(-len(part.labels) // images)))
    slices = list(part.slices(SLICE[device.type]))
    pixels = torch.cat([found.float() / 255 for found, _ in slices])
    labels = torch.cat([found for _, found in slices])
    loaded = load_teacher(teacher, spec.data, _weights(teacher, record, options), device)
    eyes = loaded.eyes()
    pairs = pairs_of(eyes.logits, pixels, labels, targets)
    return eyes.logits, pairs, ways_to_boundary(eyes.logits, pairs), len(pairs.images) // len(pixels), data.classes


def _weights(teacher: TeacherSpec, record: Record, options: Options) -> Path:
    if teacher.weights is not None:
        return locate(teacher.weights, options.download)
    assert record.folder is not None
    folders = [teacher_folder(teacher, runs) for runs in (record.folder.parent.parent, options.runs)]
    file = next((found.file for found in map(trained, folders) if found is not None), None)
    if file is None:
        raise UserError(
            f"the teacher '{teacher.name}' is not there: it was trained in a run of its own",
            where=str(folders[0]),
            hint="say with --runs which folder of runs holds it",
        )
    return file


def student_of(record: Record, spec: CellSpec, registries: Sequence[Path], device: torch.device) -> Classifier:
    """The student of a finished cell. UserError where its weights are not beside its record."""
    assert record.folder is not None
    if not (record.folder / "student.safetensors").is_file():
        raise UserError(
            "there are no weights of this cell's student: published results hold records alone",
            where=str(record.folder),
            hint="give a folder of runs, or run the recipe again",
        )
    model = kdbench.load_student(record.folder, registries).to(device).requires_grad_(False)
    normalizer = Normalizer(spec.protocol.normalization, device)
    return lambda images: model(normalizer(images))


def readable_spec(record: Record) -> CellSpec:
    """What a record says of its cell. UserError where another version wrote it in another form."""
    spec = spec_of(record)
    if spec is None:
        raise UserError(
            f"kdbench {record.kdbench} wrote this record's recipe in a form that this version cannot read",
            where=str(record.folder),
            hint="check out the commit that the record names",
        )
    return spec


def _slice(images: Tensor) -> int:
    return SLICE.get(images.device.type, SLICE["cpu"])
