"""How alike the decision boundaries of two networks are: MagSim and AngSim of Heo et al. (AAAI 2019, arXiv 1805.05532),
for any two networks, and for the students of finished cells against their teacher. And where attacks on one network
end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kdbench.engine.batches import SLICE, load_data
from kdbench.engine.finished import teacher_folder
from kdbench.engine.network import Normalizer
from kdbench.engine.options import Options
from kdbench.engine.provenance import Provenance
from kdbench.engine.streamed import part_for_testing
from kdbench.engine.teachers import load_teacher, locate, trained
from kdbench.engine.trained import load_student
from kdbench.errors import UserError
from kdbench.files import home, sha256_of
from kdbench.losses.bss import angle_similarity, magnitude_similarity
from kdbench.methods.bss.attack import RATES, StepRule, boundary_attack
from kdbench.recipe.networks import teacher_alone
from kdbench.recipe.recorded import cell_of
from kdbench.recipe.specs import CellSpec, DataSpec, TeacherSpec
from kdbench.record import Record, student_file
from kdbench.registry import Registry

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
class Ends:
    """Where one network's attacks ended, after at most `iterations` steps of one rule.

    Attributes:
        step: the rule. rate: its η. clamp: the range of values kept after every step, None for none.
        images: that the network classifies correctly, out of those given. pairs: of these and a target class each; what
            follows is over these.
        crossed: share that left the base class. arrived: share in the target class.
        margin_before, margin: median difference of the two largest logits, at the image and where the attack ended.
        length: mean L2 length of the ways, in the space of the images.
    """

    step: StepRule
    rate: float
    iterations: int
    epsilon: float
    clamp: tuple[float, float] | None
    images: int
    pairs: int
    crossed: float
    arrived: float
    margin_before: float
    margin: float
    length: float


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
    for images, base, target in _parts(pairs):
        with torch.no_grad():
            right = network(images).argmax(dim=1) == base
        ended = boundary_attack(network, images, base, target, iterations=iterations, epsilon=epsilon, clamp=PIXELS)
        found.append((ended.images - images, ended.arrived, right))
    return Ways(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _parts(pairs: Pairs) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images, base and target classes of as many pairs as are looked at at once."""
    split = (part.split(_slice(pairs.images)) for part in (pairs.images, pairs.base, pairs.target))
    yield from zip(*split, strict=True)


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


def ends_of_attacks(
    network: Classifier,
    images: Tensor,
    labels: Tensor,
    targets: int | None = None,
    *,
    iterations: int = 10,
    epsilon: float = 1e-4,
    clamp: tuple[float, float] | None = None,
) -> list[Ends]:
    """A network in eval mode attacked by every rule's step, from the images that it classifies correctly.

    Args:
        network: images [N, C, H, W] -> logits [N, K].
        images: in the space in which the network takes them. labels: int64 [N].
        targets: classes an image is moved to, those that the network takes for most probable; None: all others.
        iterations, epsilon, clamp: as in `kdbench.methods.bss.attack.boundary_attack`.

    Returns:
        one for each rule: Newton's, the released code's.

    Raises:
        ValueError: the network classifies none of the images correctly.
    """
    with torch.no_grad():
        right = torch.cat([network(part).argmax(dim=1) for part in images.split(_slice(images))]) == labels
    if not right.any():
        raise ValueError("there is nothing to attack: the network classifies none of the images correctly")
    pairs = pairs_of(network, images[right], labels[right], targets)
    found = []
    for step, rate in RATES.items():
        rows = []
        for x, base, target in _parts(pairs):
            with torch.no_grad():
                before = network(x)
            ended = boundary_attack(
                network, x, base, target, step=step, rate=rate, iterations=iterations, epsilon=epsilon, clamp=clamp
            )
            length = (ended.images - x).flatten(1).norm(dim=1)
            columns = [ended.crossed, ended.arrived, _margin(before), _margin(ended.logits), length]
            rows.append(torch.stack([column.float() for column in columns], dim=1))
        crossed, arrived, margin_before, margin, length = torch.cat(rows).unbind(dim=1)
        found.append(
            Ends(
                step,
                rate,
                iterations,
                epsilon,
                clamp,
                int(right.sum()),
                len(pairs.images),
                float(crossed.mean()),
                float(arrived.mean()),
                float(margin_before.quantile(0.5)),
                float(margin.quantile(0.5)),
                float(length.mean()),
            )
        )
    return found


def _margin(logits: Tensor) -> Tensor:
    """Difference of the two largest logits, [N]."""
    first, second = logits.topk(2, dim=1).values.unbind(dim=1)
    return first - second


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
    seen: Provenance,
    pictures: int = 0,
) -> Iterator[tuple[Record, Similarity | None, list[Look]]]:
    """Students of finished cells against their teacher, on evenly spaced test images.

    A cell without a teacher is held against that of the other cells on its data, where they have only one.

    Args:
        images: test images, before those are left out that one of the two gets wrong.
        seen: is told of the data and the networks.
        pictures: ways to look at, of images of different classes as far as there are such, and of one cell: the first
            that trained on boundary samples, else the first.

    Yields:
        a record with its similarity, and the ways; None for a cell for which there is no teacher.

    Raises:
        UserError: a record that cannot be built from the cards here, no weights of a student or a teacher, no data.
    """
    registry = Registry(options.registries)
    specs = [cell_of(record.spec, registry, str(record.folder)) for record in records]
    teachers: dict[str, tuple[Classifier, Pairs, Ways, int, Sequence[str], dict[str, str]]] = {}
    against = _held_against(specs)
    compared = [number for number, teacher in enumerate(against) if teacher is not None]
    # The first of equals.
    shown = max(compared, key=lambda number: makes_boundary_samples(specs[number]), default=None)
    for number, (record, spec, teacher) in enumerate(zip(records, specs, against, strict=True)):
        if teacher is None:
            yield record, None, []
            continue
        key = f"{spec.data.name} {teacher.identity()}"
        if key not in teachers:
            tell(f"{teacher.name}: its boundary around {images} test images of {spec.data.name}")
            teachers[key] = _prepared(record, spec, teacher, options, images, targets, device, seen)
        classifier, pairs, ways, each, names, made_from = teachers[key]
        _check_made_from(record, made_from)
        tell(f"{record.cell.label}, seed {record.cell.seed}")
        file = student_file(record)
        student = student_of(record, spec, options.registries, device)
        seen.network(f"{record.recipe}/{file.parent.resolve().name}", file)
        own = ways_to_boundary(student, pairs)
        looks: list[Look] = []
        if number == shown and pictures:
            networks = {"teacher": classifier, f"{record.cell.label}, seed {record.cell.seed}": student}
            right = (own.right & ways.right).view(-1, each)[:, 0].nonzero().flatten().tolist()
            # The first of an image's pairs is the class that the teacher takes for most probable beside its own.
            for image in varied([i * each for i in right], pairs.base.tolist())[:pictures]:
                pair = (int(pairs.base[image]), int(pairs.target[image]))
                looks.append(way_to_look_at(networks, "teacher", pairs.images[image], *pair, names))
        yield record, similarity(own, ways, each), looks


def _held_against(specs: Sequence[CellSpec]) -> list[TeacherSpec | None]:
    """The teacher that each cell is held against: its own, or the only one that others have on its data."""
    known: dict[str, list[TeacherSpec]] = {}
    for spec in specs:
        if spec.teacher is not None and spec.teacher.classes is None:
            of_data = known.setdefault(spec.data.name, [])
            if all(spec.teacher.identity() != other.identity() for other in of_data):
                of_data.append(spec.teacher)
    against: list[TeacherSpec | None] = []
    for spec in specs:
        candidates = known.get(spec.data.name, [])
        teacher = spec.teacher or (candidates[0] if len(candidates) == 1 else None)
        against.append(teacher if teacher is not None and teacher.classes is None else None)
    return against


def of_teacher(
    name: str,
    registry: Registry,
    options: Options,
    images: int,
    targets: int | None,
    device: torch.device,
    seen: Provenance,
) -> tuple[str, list[Ends]]:
    """Where attacks on a card's teacher end, by every rule's step, from evenly spaced test images of its data.

    They are made as for training: in the teacher's normalized space, within the range of values that the card
    `boundary_samples` has.

    Returns:
        the name of the data, and what `ends_of_attacks` finds.

    Raises:
        UserError: no such card, no weights, no data, or a teacher that classifies none of the images correctly.
    """
    spec, data = teacher_alone(name, registry, "--attack")
    file = weights_of(spec, options)
    pixels, labels, _, fingerprint = spaced_images(data, options, images, device)
    seen.data[data.name] = fingerprint
    seen.network(name, file)
    teacher = load_teacher(spec, data, file, device).network
    low, high = registry.card("sources", "boundary_samples").args["clamp"]

    def network(images: Tensor) -> Tensor:
        return teacher(images, ["logits"])["logits"]

    try:
        return data.name, ends_of_attacks(network, teacher.normalizer(pixels), labels, targets, clamp=(low, high))
    except ValueError as error:
        raise UserError(f"'{name}': {error}", where="--attack") from None


def makes_boundary_samples(spec: CellSpec) -> bool:
    """Whether a cell's batch sources give the input set "boundary"."""
    return any(stage.source is not None and "boundary" in stage.source.gives for stage in spec.method.stages.values())


def varied(rows: Sequence[int], classes: Sequence[int]) -> list[int]:
    """Rows so ordered that the first of every class come first, then the second of every class, and so on.

    Args:
        classes: of all rows.
    """
    turn: dict[int, int] = {}
    counted: Counter[int] = Counter()
    for row in rows:
        turn[row] = counted[classes[row]]
        counted[classes[row]] += 1
    return sorted(rows, key=lambda row: turn[row])


def spaced_images(
    spec: DataSpec, options: Options, images: int, device: torch.device
) -> tuple[Tensor, Tensor, Sequence[str], str]:
    """So many evenly spaced test images, or a few less.

    Returns:
        pixel values on the scale of [0, 1], float32 [N, C, H, W]; labels, int64 [N]; the names of the classes; the
        data's fingerprint.
    """
    roots = [Path(root) for root in ([spec.root] if spec.root else options.roots())]
    data = load_data(spec, roots, options.download, home() / "cache")
    part = part_for_testing(spec, data, device)
    slices = list(part.every(max(1, -(-len(part.labels) // images))).slices(SLICE[device.type]))
    pixels = torch.cat([found.float() / 255 for found, _ in slices])
    return pixels, torch.cat([labels for _, labels in slices]), data.classes, data.fingerprint


def _prepared(
    record: Record,
    spec: CellSpec,
    teacher: TeacherSpec,
    options: Options,
    images: int,
    targets: int | None,
    device: torch.device,
    seen: Provenance,
) -> tuple[Classifier, Pairs, Ways, int, Sequence[str], dict[str, str]]:
    """A teacher, the pairs that it gives rise to, its ways, pairs an image, the classes' names, and of both data and
    teacher the name with fingerprint or sha256."""
    pixels, labels, names, fingerprint = spaced_images(spec.data, options, images, device)
    assert record.folder is not None
    file = weights_of(teacher, options, record.folder.parent.parent)
    seen.data[spec.data.name] = fingerprint
    seen.network(teacher.name, file)
    network = load_teacher(teacher, spec.data, file, device).network
    pairs = pairs_of(network.logits, pixels, labels, targets)
    each, made_from = (
        len(pairs.images) // len(pixels),
        {f"data '{spec.data.name}'": fingerprint, f"teacher '{teacher.name}'": sha256_of(file)},
    )
    return network.logits, pairs, ways_to_boundary(network.logits, pairs), each, names, made_from


def _check_made_from(record: Record, here: Mapping[str, str]) -> None:
    """UserError for a cell that was made from other data than those here, or by another teacher of this name."""
    made = {f"data '{record.data.name}'": record.data.fingerprint}
    if record.teacher is not None:
        made[f"teacher '{record.teacher.name}'"] = record.teacher.sha256
    for name, digest in made.items():
        if (now := here.get(name, digest)) != digest:
            raise UserError(
                f"this cell was made from other {name}: {digest[:12]}, here it is {now[:12]}",
                where=str(record.folder),
                hint="give the data and the runs that belong to it (--data, --runs), or run its recipe again",
            )


def weights_of(teacher: TeacherSpec, options: Options, *runs: Path) -> Path:
    """The file of a teacher's weights: its card's, or what its training left in a folder of runs.

    Args:
        runs: folders in which to look before that of the options.

    Raises:
        UserError: it is not there.
    """
    if teacher.weights is not None:
        return locate(teacher.weights, options.download)
    folders = [teacher_folder(teacher, folder) for folder in (*runs, options.runs)]
    file = next((found.file for found in map(trained, folders) if found is not None), None)
    if file is None:
        raise UserError(
            f"the teacher '{teacher.name}' is not there: a recipe trains it",
            where=str(folders[0]),
            hint="run its recipe, or say with --runs which folder of runs holds it",
        )
    return file


def student_of(record: Record, spec: CellSpec, registries: Sequence[Path], device: torch.device) -> Classifier:
    """The student of a finished cell. UserError where its weights are not beside its record."""
    model = load_student(student_file(record).parent, registries).to(device).requires_grad_(False)
    normalizer = Normalizer(spec.protocol.normalization, device)
    return lambda images: model(normalizer(images))


def _slice(images: Tensor) -> int:
    return SLICE.get(images.device.type, SLICE["cpu"])
