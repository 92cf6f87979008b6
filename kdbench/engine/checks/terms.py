"""Loss terms, each tried on random values before anything is trained: losses may be the user's own code."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kdbench.engine.data.batch import Batch, Sets
from kdbench.engine.metrics import check_metrics
from kdbench.engine.surroundings import Shape
from kdbench.engine.targets import import_target
from kdbench.engine.terms import Term
from kdbench.errors import UserError, device_advice, failure
from kdbench.models.points import OF_TOKENS
from kdbench.models.probing import kind_of
from kdbench.schedules import Moment

# Of a loss that is tried on random values: some losses take pairs of rows, or four that show one image.
ROWS = 8
# Just before the end of a stage or an epoch.
END = 1 - 2.0**-20


def check_term(term: Term, student: Mapping[str, Shape], teacher: Mapping[str, Shape], classes: int) -> None:
    """Compute the term once on random values of the right shapes.

    Raises:
        UserError: it cannot be computed, is no finite scalar, or nothing that trains changes it; or so a metric.
    """
    term.eval()
    what, n = f"loss '{term.name}' ({term.spec.loss.target})", min(ROWS, term.most or ROWS)
    values: dict[str, dict[str, dict[str, Tensor]]] = {"student": {}, "teacher": {}}
    sets: Sets = {}
    for name in term.input_sets:
        for network, shapes in (("student", student), ("teacher", teacher)):
            points = term.points(network).get(name, [])
            trains = network == term.spec.of
            # Copies: torch itself refuses to change in place what asks for gradients, and not in our words.
            drawn = {p: torch.randn(n, *shapes[p]).requires_grad_(trains) for p in points}
            values[network][name] = {p: value.clone() for p, value in drawn.items()}
        rows = torch.arange(n)
        labels = torch.where(rows < n / 2, 0, classes - 1)
        sets[name] = Batch(torch.empty(0), labels, rows, mask=torch.ones(n, dtype=torch.bool))
    own = [value for points in values[term.spec.of].values() for value in points.values()]
    taken = [value for sides in values.values() for points in sides.values() for value in points.values()]
    of_batches = (part for batch in sets.values() for part in (batch.labels, batch.index, batch.mask))
    taken += [part for part in of_batches if part is not None]
    versions = [value._version for value in taken]
    try:
        # As plain numbers options are checked; those of a step lie on the device, where nobody looks.
        for now in (Moment(), Moment(END, END)) if term.spec.schedules else ():
            plain, known = term.spec.schedules.keys(), {name: at(now) for name, at in term.numbers.items()}
            term(values, sets, {name: v if name in plain else torch.tensor(v) for name, v in known.items()})
        result = term(values, sets)
        term.train()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's loss can fail in any way
        raise _uncomputable(term, what, error, student, teacher) from None
    if [value._version for value in taken] != versions:
        hint = "other losses and methods read the same values: write 'teacher * 2', not 'teacher.mul_(2)'"
        connector = f", or its connector '{_connector(term)}'," if _connector(term) else ""
        raise UserError(f"{what}{connector} changes what it is given, in place", hint=hint)
    if not isinstance(result, Tensor) or result.dim() or not result.is_floating_point():
        given = f"{result.dtype} {list(result.shape)}" if isinstance(result, Tensor) else kind_of(result)
        hint = "a loss returns one float in a tensor, with its gradient: take .mean() or .sum(), and no .item()"
        raise UserError(f"{what} returned {given}", hint=hint)
    if not torch.isfinite(result):
        raise UserError(f"{what} gave {result.item()} on random values", hint="a loss must be finite")
    reads = {"student", "other"} & {*term.spec.loss.inputs}
    if result.requires_grad and reads:
        reached = torch.autograd.grad(result, own, allow_unused=True)
    if not result.requires_grad or (reads and all(gradient is None for gradient in reached)):
        raise UserError(
            f"{what} does not depend on the {term.spec.of}", hint=f"is the value of the {term.spec.of} detached?"
        )
    term.eval()
    check_metrics(term, values["student"].get("data", {}), values["teacher"].get("data", {}), n)
    term.train()


def _uncomputable(
    term: Term, what: str, error: BaseException, student: Mapping[str, Shape], teacher: Mapping[str, Shape]
) -> UserError:
    """What to say where the loss failed on random values: the option that it names, or the shapes."""
    # What torch, or a loss itself, says of values. Other errors are of code, whatever it is given.
    of_values = isinstance(error, RuntimeError | ValueError | IndexError)
    said = str(error).replace(" ", "_")
    for option, given in term.spec.loss.options.items() if of_values else ():
        if option in said:
            return UserError(f"'{option}' of the loss '{term.name}' cannot be {given!r}: {error}")
    own = student if term.spec.of == "student" else teacher
    sides = [(p, own[p]) for layer in term.layers for p in layer.students]
    taken = [(p, teacher[p]) for layer in term.layers for p in layer.teachers]
    own_shapes, taught = (", ".join(f"{p} {shape}" for p, shape in side) for side in (sides, taken))
    shapes = f"student: {own_shapes or 'nothing'}; teacher: {taught or 'nothing'}"
    tokens = any(len(shape) == 2 for _, shape in [*sides, *taken])
    advice = OF_TOKENS if tokens else "a connector can change channels and sizes ('kdbench ls connectors')"
    fit = f"; {advice}" if of_values else ""
    # Where something stands before the loss, it is not known which of the two failed.
    called = _connector(term) or import_target(term.spec.loss.target)
    said = failure(error, called)
    return UserError(f"{what} cannot be computed: {said}", hint=device_advice(error) or f"{shapes}{fit}")


def _connector(term: Term) -> str:
    """What stands between the student's values and the loss, by name; "" where nothing does."""
    return term.spec.connector.name if term.spec.connector else term.spec.through or ""
