"""How alike the decision boundaries of two networks are: MagSim and AngSim of Heo et al. (AAAI 2019, arXiv 1805.05532),
for any two networks, and for the students of finished cells and their teacher. And where attacks on a teacher end."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdbench.engine.analysis import Analysis, AnalysisRow, FinishedCell, PixelLogits
from kdbench.engine.data.batch import at_once
from kdbench.errors import UserError, counted
from kdbench.losses.bss import angle_similarity, magnitude_similarity
from kdbench.methods.bss.attack import RATES, boundary_attack
from kdbench.methods.bss.picture import Crossing, boundary_picture
from kdbench.recipe.planning import teacher_of_card
from kdbench.recipe.specs import CellSpec, TeacherSpec

# What pixel values can be: an image stays one while it is moved.
PIXELS = (0.0, 1.0)
# Images in a picture.
SHOWN = 4


@dataclass(frozen=True)
class Pairs:
    """Images float32 [P, C, H, W], each with its base class and one target class, int64 [P]."""

    images: Tensor
    base: Tensor
    target: Tensor

    def slices(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images, base and target classes of as many pairs as are computed at once."""
        size = _slice(self.images)
        yield from zip(self.images.split(size), self.base.split(size), self.target.split(size), strict=True)


@dataclass(frozen=True)
class Moves:
    """How attacks moved the images of pairs to a network's boundary.

    Attributes:
        displacement: float32 [P, C, H, W], from image to boundary, in pixel values on the scale of [0, 1].
        arrived: bool [P], whether it ends in the pair's target class.
        right: bool [P], whether the network classifies the pair's image correctly.
    """

    displacement: Tensor
    arrived: Tensor
    right: Tensor


def boundary(
    analysis: Analysis, *, images: int = 200, targets: int | None = None, picture: bool = False
) -> Iterator[AnalysisRow]:
    """Compare the boundaries of students with their teacher's.

    A cell without a teacher is compared with that of the other cells on its data, if they have only one.

    Args:
        images: evenly spaced test images to attack, before those are left out that one of the two gets wrong.
        targets: classes that an image is moved to, the likeliest; null for all others.
        picture: also draw some images: of one cell, the first that trained on boundary samples, else the first.

    Yields:
        for each cell what `similarity` gives.

    Raises:
        UserError: no cell has a teacher; no weights of a student or a teacher; no data, or others than the cell's.
    """
    _check_targets(targets)
    teachers = compared_with([cell.spec for cell in analysis.cells])
    compared = [cell for cell, teacher in zip(analysis.cells, teachers, strict=True) if teacher is not None]
    if not compared:
        where = ", ".join(map(str, analysis.folders))
        raise UserError("no cell has a teacher to compare with", where=where)
    # The first of equals.
    drawn = max(compared, key=lambda cell: makes_boundary_samples(cell.spec)) if picture else None
    known: dict[str, AttackedTeacher] = {}
    for cell, teacher in zip(analysis.cells, teachers, strict=True):
        if teacher is None:
            analysis.tell(f"{cell.name}: left out, no single teacher of its data to compare with")
            continue
        key = f"{cell.spec.data.name} {teacher.identity()}"
        if key not in known:
            analysis.tell(
                f"{teacher.name}: its boundary around {counted(images, 'test image')} of {cell.spec.data.name}"
            )
            known[key] = _attacked(analysis, cell, teacher, images, targets)
        attacked = known[key]
        cell.check_made_from(attacked.fingerprint, teacher.name, attacked.sha256)
        analysis.tell(cell.name)
        student = analysis.student(cell)
        own = moves_to_boundary(student, attacked.pairs)
        if cell is drawn:
            networks = {"teacher": attacked.logits, cell.name: student}
            if shown := crossings(networks, own, attacked):
                boundary_picture(shown, analysis.picture("samples"))
        yield {**cell.columns, **similarity(own, attacked.moves, attacked.targets)}


@dataclass(frozen=True)
class AttackedTeacher:
    """A teacher that was attacked.

    Attributes:
        targets: pairs of each image, in a row.
        classes: names. fingerprint: of the data. sha256: of the teacher's weights.
    """

    logits: PixelLogits
    pairs: Pairs
    moves: Moves
    targets: int
    classes: Sequence[str]
    fingerprint: str
    sha256: str


def _attacked(
    analysis: Analysis, cell: FinishedCell, teacher: TeacherSpec, images: int, targets: int | None
) -> AttackedTeacher:
    test = analysis.test_images(cell.spec.data, images)
    network, sha256 = analysis.teacher(teacher, cell.spec.data, cell.record.read_from.parent.parent)
    pairs = pairs_of(network.logits, test.pixels, test.labels, targets)
    moves = moves_to_boundary(network.logits, pairs)
    each = len(pairs.images) // len(test.pixels)
    return AttackedTeacher(network.logits, pairs, moves, each, test.classes, test.fingerprint, sha256)


def compared_with(specs: Sequence[CellSpec]) -> list[TeacherSpec | None]:
    """The teacher that each cell is compared with: its own, or the only one that others have on its data."""
    known: dict[str, dict[str, TeacherSpec]] = {}
    for spec in specs:
        if spec.teacher is not None and spec.teacher.classes is None:
            known.setdefault(spec.data.name, {})[spec.teacher.identity()] = spec.teacher
    found: list[TeacherSpec | None] = []
    for spec in specs:
        only = list(known.get(spec.data.name, {}).values())
        teacher = spec.teacher or (only[0] if len(only) == 1 else None)
        found.append(teacher if teacher is not None and teacher.classes is None else None)
    return found


def makes_boundary_samples(spec: CellSpec) -> bool:
    """Whether a cell's batch sources give the input set "boundary"."""
    return any("boundary" in source.gives for source in spec.method.sources.values())


def attack(
    analysis: Analysis, *, teachers: str | list[str], images: int = 200, targets: int | None = None
) -> Iterator[AnalysisRow]:
    """Attack teachers by each kind of step from evenly spaced test images of their data.

    They are attacked as for training: in the teacher's normalized space, within the range of values that the card
    `boundary_samples` has.

    Args:
        teachers: keys of teacher cards.
        images: test images. targets: classes that an image is moved to, the likeliest; null for all others.

    Yields:
        for each teacher and kind of step what `ends_of_attacks` gives.

    Raises:
        UserError: no such card, no weights, no data, or a teacher that classifies none of the images correctly.
    """
    _check_targets(targets)
    low, high = analysis.registry.card("sources", "boundary_samples").args["clamp"]
    for name in dict.fromkeys([teachers] if isinstance(teachers, str) else teachers):
        spec, data = teacher_of_card(name, analysis.registry, "teachers")
        analysis.tell(f"{name}: attacks from {counted(images, 'test image')}")
        test = analysis.test_images(data, images)
        network, _ = analysis.teacher(spec, data)
        try:
            ends = ends_of_attacks(
                lambda x, network=network: network(x, ["logits"])["logits"],  # type: ignore[misc]
                network.normalizer(test.pixels),
                test.labels,
                targets,
                clamp=(low, high),
            )
        except ValueError as error:
            raise UserError(f"'{name}': {error}", where="teachers") from None
        yield from ({"teacher": name, "data": data.name, **end} for end in ends)


def pairs_of(teacher: PixelLogits, images: Tensor, labels: Tensor, targets: int | None = None) -> Pairs:
    """Every image with each other class, or with the `targets` classes that the teacher takes for most probable.

    Args:
        images: [N, C, H, W], pixel values on the scale of [0, 1]. labels: int64 [N].
    """
    with torch.no_grad():
        logits = torch.cat([teacher(some) for some in images.split(_slice(images))])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    count = logits.shape[1] - 1 if targets is None else min(targets, logits.shape[1] - 1)
    chosen = others.topk(count, dim=1).indices
    return Pairs(images.repeat_interleave(count, 0), labels.repeat_interleave(count, 0), chosen.flatten())


def moves_to_boundary(network: PixelLogits, pairs: Pairs) -> Moves:
    """A network attacked on every pair, by Newton's step in the space of pixel values.

    Lengths are measured in that space for every network, whatever each one's normalization is. The network is in eval
    mode.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for images, base, target in pairs.slices():
        with torch.no_grad():
            right = network(images).argmax(dim=1) == base
        ended = boundary_attack(network, images, base, target, clamp=PIXELS)
        found.append((ended.images - images, ended.arrived, right))
    return Moves(*(torch.cat(values) for values in zip(*found, strict=True)))


def similarity(student: Moves, teacher: Moves, targets: int) -> dict[str, float]:
    """Two networks' boundaries compared, on the images that both classify correctly.

    Args:
        student, teacher: moves of the same pairs, in which each image comes `targets` times in a row.

    Returns:
        images: compared, out of those given: both networks classify them correctly.
        pairs: of an image and a target class in which both networks' attacks arrived; the means are over these.
        magnitude: MagSim in [0, 1]. angle: AngSim in [-1, 1]. Both NaN without a pair.
        student_arrived, teacher_arrived: share of the images' pairs in which the network's attack arrived.
        student_length, teacher_length: mean L2 length of the moves, in pixel values on the scale of [0, 1].
    """
    right = student.right & teacher.right
    both = right & student.arrived & teacher.arrived
    arguments = (student.displacement, teacher.displacement, both)
    networks = {"student": student, "teacher": teacher}
    return {
        "images": int(right.sum()) // targets,
        "pairs": int(both.sum()),
        "magnitude": float(magnitude_similarity(*arguments)),
        "angle": float(angle_similarity(*arguments)),
        **{f"{name}_arrived": float(moves.arrived[right].float().mean()) for name, moves in networks.items()},
        **{
            f"{name}_length": float(moves.displacement[both].flatten(1).norm(dim=1).mean())
            for name, moves in networks.items()
        },
    }


def ends_of_attacks(
    network: PixelLogits,
    images: Tensor,
    labels: Tensor,
    targets: int | None = None,
    *,
    iterations: int = 10,
    epsilon: float = 1e-4,
    clamp: tuple[float, float] | None = None,
) -> list[dict[str, Any]]:
    """A network in eval mode attacked by every kind of step, from the images that it classifies correctly.

    Args:
        network: images [N, C, H, W] -> logits [N, K].
        images: in the space in which the network takes them. labels: int64 [N].
        targets: classes an image is moved to, those that the network takes for most probable; None: all others.
        iterations, epsilon, clamp: as in `kdbench.methods.bss.attack.boundary_attack`.

    Returns:
        one for each kind of `step`, with its `rate` η and the settings; images: that the network classifies correctly;
        pairs: of these and a target class each, over which are
        crossed: the share that left the base class, arrived: that in the target class,
        margin_before, margin: median difference of the two largest logits, at the image and where the attack ended,
        length: mean L2 distance between both.

    Raises:
        ValueError: the network classifies none of the images correctly.
    """
    with torch.no_grad():
        right = torch.cat([network(some).argmax(dim=1) for some in images.split(_slice(images))]) == labels
    if not right.any():
        raise ValueError("there is nothing to attack: the network classifies none of the images correctly")
    pairs = pairs_of(network, images[right], labels[right], targets)
    found = []
    for step, rate in RATES.items():
        settings: dict[str, Any] = {"step": step, "rate": rate, "iterations": iterations, "epsilon": epsilon}
        rows = []
        for x, base, target in pairs.slices():
            with torch.no_grad():
                before = network(x)
            ended = boundary_attack(network, x, base, target, clamp=clamp, **settings)
            length = (ended.images - x).flatten(1).norm(dim=1)
            columns = [ended.crossed, ended.arrived, _margin(before), _margin(ended.logits), length]
            rows.append(torch.stack([column.float() for column in columns], dim=1))
        crossed, arrived, margin_before, margin, length = torch.cat(rows).unbind(dim=1)
        settings["clamp"] = " ".join(map(str, clamp)) if clamp else None
        counts = {"images": int(right.sum()), "pairs": len(pairs.images)}
        means = {"crossed": crossed.mean(), "arrived": arrived.mean()}
        medians = {"margin_before": margin_before.quantile(0.5), "margin": margin.quantile(0.5)}
        values = {**means, **medians, "length": length.mean()}
        found.append(settings | counts | {name: float(value) for name, value in values.items()})
    return found


def _margin(logits: Tensor) -> Tensor:
    """Difference of the two largest logits, [N]."""
    first, second = logits.topk(2, dim=1).values.unbind(dim=1)
    return first - second


def crossings(networks: Mapping[str, PixelLogits], student: Moves, attacked: AttackedTeacher) -> list[Crossing]:
    """Some images that student and teacher classify correctly, of different classes as far as there are such."""
    right = (student.right & attacked.moves.right).view(-1, attacked.targets)[:, 0].nonzero().flatten().tolist()
    pairs, found = attacked.pairs, []
    # The first of an image's pairs is with the class that the teacher takes for most probable beside its own.
    for row in varied([image * attacked.targets for image in right], pairs.base.tolist())[:SHOWN]:
        classes = (int(pairs.base[row]), int(pairs.target[row]))
        found.append(crossing(networks, pairs.images[row], *classes, attacked.classes))
    return found


def crossing(
    networks: Mapping[str, PixelLogits], image: Tensor, base: int, target: int, names: Sequence[str]
) -> Crossing:
    """An image attacked on the teacher, and the two classes' logits of all networks on the line to its boundary.

    Args:
        networks: whose logits are asked for, the "teacher" among them.
        image: [C, H, W], pixel values on the scale of [0, 1].
    """
    both = torch.tensor([base, target], device=image.device)
    ended = boundary_attack(networks["teacher"], image[None], both[:1], both[1:], clamp=PIXELS).images[0]
    at = torch.linspace(0.0, 1.5, 61, device=image.device)
    line = image + at.view(-1, 1, 1, 1) * (ended - image)
    with torch.no_grad():
        logits = {name: network(line).cpu() for name, network in networks.items()}
    scores = {name: (found[:, base], found[:, target]) for name, found in logits.items()}
    shown, moved = (picture.permute(1, 2, 0).cpu() for picture in (image, ended))
    return Crossing(shown, moved, names[base], names[target], at.cpu(), scores)


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


def _check_targets(targets: int | None) -> None:
    if targets is not None and targets < 1:
        raise UserError(f"an image cannot be moved to {targets} classes", where="targets", hint="write at least 1")


def _slice(images: Tensor) -> int:
    return at_once(images.device, images.shape[-1])
