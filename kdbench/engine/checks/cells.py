"""A cell built once before anything trains: what cannot be built is told now."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from kdbench.engine.checks.gradients import check_gradients
from kdbench.engine.checks.rates import check_optimizer, check_schedules
from kdbench.engine.checks.terms import check_term
from kdbench.engine.computing.compute import REFERENCE
from kdbench.engine.data.streamed import check_transforms
from kdbench.engine.inputs import Cost, SourceContext, build_source
from kdbench.engine.networks.build import build_extractor, build_model
from kdbench.engine.networks.freezing import owned
from kdbench.engine.networks.predicting import check_answers
from kdbench.engine.networks.weights import check_start
from kdbench.engine.surroundings import Shape, Surroundings, said_of
from kdbench.engine.targets import import_target
from kdbench.engine.teachers.loading import untrained_teacher
from kdbench.engine.terms import Term, build_terms
from kdbench.errors import UserError, counted, first_line
from kdbench.models.hooks import Extractor
from kdbench.models.points import LOGITS
from kdbench.models.probing import dry_images, dry_run
from kdbench.recipe.model_specs import DataSpec, ModelSpec
from kdbench.recipe.specs import CellSpec
from kdbench.recipe.timeline import planned_timeline, training_images

CPU = torch.device("cpu")
# The largest networks that people distil into or from here have a tenth of these.
MOST_PARAMETERS = 4 * 10**9
# Of tensors with more elements than this, a check draws no first values: a memory bank has a row for every image.
LARGE = 2**26
# Networks that are kept for the next cells that are checked.
KEPT = 4

# Network and data -> the network, and the shapes of its hook points.
Known = dict[str, tuple[Extractor, dict[str, Shape]]]


@dataclass(frozen=True)
class BuiltCell:
    """A cell's networks (the teacher without its weights), loss terms and modules, and shapes of all hook points.

    `said`: what modules say of themselves.
    """

    student: Extractor
    shapes: Mapping[str, Shape]
    teacher: Extractor | None
    teacher_shapes: Mapping[str, Shape]
    terms: Mapping[str, Mapping[str, Term]]
    modules: Mapping[str, nn.Module]
    said: Mapping[str, Any]


class _Undrawn(TorchFunctionMode):
    """Inside, large tensors get zeros that take no place in memory, and no random values."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.uniform_, torch.Tensor.normal_) and args[0].numel() > LARGE:
            if args[0].device.type == "cpu":
                # torch writes its zeros, and its empty tensors may lie where something was. NumPy's come from calloc.
                zeros = torch.from_numpy(np.zeros(args[0].nbytes, dtype=np.uint8))
                args[0].data = zeros.view(args[0].dtype).view(args[0].shape)
            return args[0]
        return func(*args, **(kwargs or {}))


def build_cell(spec: CellSpec, known: Known | None = None) -> BuiltCell:
    """Build what a cell consists of, on the CPU, to look at and not to train.

    Args:
        known: networks that other cells were built with, extended: they are built once.

    Raises:
        UserError: a model that cannot be built, a hook point that does not exist, a pair that no connector can bridge.
    """
    before: Known = {} if known is None else known

    def built(model: ModelSpec, data: DataSpec, trains: bool, asked: bool) -> tuple[Extractor, dict[str, Shape]]:
        key = f"{model.model_dump_json()} {data.model_dump_json()} {trains} {asked}"
        if key not in before:
            _check_size(model, data)
            extractor = build_extractor(build_model(model, data), model, data)
            found = extractor, extractor.shapes(data.image_shape)
            _check_graph(extractor, data, trains, asked)
            _check_weights_say_all(model, data)
            for oldest in [*before][: len(before) + 1 - KEPT]:
                del before[oldest]
            before[key] = found
        return before[key]

    own, asked = spec.student.not_started(), _asks_logits(spec)
    student, shapes = built(own, spec.student.takes(spec.data), spec.method.trains("student"), asked)
    teacher: Extractor | None = None
    teacher_shapes: dict[str, Shape] = {}
    if spec.teacher is not None:
        taught = spec.networks["teacher"][1]
        teacher, teacher_shapes = built(spec.teacher.model.untrained(), taught, spec.method.trains("teacher"), True)
        if spec.method.starts_from == "teacher":
            check_start(student.model, teacher.model.state_dict(), spec.student.name, spec.teacher.model.name)
    with _Undrawn():
        cell = Surroundings(spec, student, teacher, {"student": shapes, "teacher": teacher_shapes})
        if spec.method.predicts is not None:
            check_answers(cell)
        terms, said = build_terms(cell), said_of(cell.modules)
        return BuiltCell(student, shapes, teacher, teacher_shapes, terms, cell.modules, said)


def _check_size(spec: ModelSpec, data: DataSpec) -> None:
    """Raises UserError for a network that would fill the memory of any machine before it is built."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = import_target(spec.target)(
                **spec.options, classes=data.classes, channels=data.channels, image_size=data.image_size
            )
            n = sum(parameter.numel() for parameter in model.parameters())
    except (Exception, SystemExit):  # noqa: BLE001 - building it says what is wrong, where it cannot be built without values
        return
    if n > MOST_PARAMETERS:
        raise UserError(f"model '{spec.name}' has {n:.3g} parameters", hint=f"the limit is {MOST_PARAMETERS:.0e}")


def _check_graph(network: Extractor, data: DataSpec, trains: bool, asked: bool) -> None:
    """Raises UserError for a pre-activation that has been through a ReLU, which left no negative sign, for logits that
    have been through a softmax, and for a network that is to be trained though no gradient leaves its logits.

    Args:
        asked: whether anybody reads its logits.
    """
    made_by = network.made_by(data.image_shape)
    for point, node in made_by.items():
        if point.endswith(".preact") and _is_relu(node):
            raise UserError(
                f"hook point '{point}' ({network.places[point]}) of model '{network.model_name}' is what a ReLU gives: "
                "none of its values is negative",
                hint="name what enters the layer's last ReLU: 'input(PATH)', where PATH is that ReLU's module",
            )
    if asked and (kind := type(made_by.get(LOGITS)).__name__).startswith(("Softmax", "Sigmoid")):
        what = f"model '{network.model_name}' returns probabilities, not logits: a {kind.removesuffix('Backward0')}'s"
        raise UserError(what, hint="return what enters it: the losses have a softmax of their own")
    # Some spare the graph in eval mode.
    untaught = trains and made_by.get(LOGITS, LOGITS) is None
    if untaught and network.made_by(data.image_shape, training=True).get(LOGITS, LOGITS) is None:
        what = f"model '{network.model_name}' cannot be trained: no gradient gets from its logits into it"
        raise UserError(what, hint="its forward may run under torch.no_grad(), or detach what it computes")


def _is_relu(node: Node | None) -> bool:
    """ReLU6 is a Hardtanh to autograd, and a clamp from zero is a ReLU too."""
    try:
        least = getattr(node, "_saved_min_val", getattr(node, "_saved_min", None))
    except RuntimeError:
        # A bound that is a tensor, and was overwritten or freed since.
        return False
    return type(node).__name__.startswith("Relu") or (not isinstance(least, Tensor) and least == 0)


def _check_weights_say_all(spec: ModelSpec, data: DataSpec) -> None:
    """Raises UserError for a network of the user's own whose weights, loaded into one that was built anew, give other
    answers: nobody could load what was trained, nor say what a teacher's accuracy is."""
    for own in (one for one in [part.model for part in spec.parts] or [spec] if one.source_sha256 is not None):
        model, again = (build_model(own.untrained(), data, seed) for seed in range(2))
        what = (
            f"model '{own.name}' holds values that its state dict lacks: its weights, loaded into a network built anew"
        )
        hint = "register what it draws as buffers: self.register_buffer('name', values)"
        try:
            again.load_state_dict(model.state_dict())
        except RuntimeError as error:
            raise UserError(f"{what}, do not fit: {first_line(error)}", hint=hint) from None
        answers = []
        for network in (model, again):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                answers.append(dry_run(network, data.image_shape))
        first, second = (answer if isinstance(answer, Tensor) else None for answer in answers)
        if first is not None and second is not None and not torch.equal(first, second):
            raise UserError(f"{what}, give other answers", hint=hint)


def check_cell(spec: CellSpec, known: Known | None = None) -> BuiltCell:
    """Build a cell, compute its loss terms once on random values, and build its optimizers.

    Args:
        known: as of `build_cell`.

    Raises:
        UserError: what of it cannot be built or computed, or that a stage trains nothing.
    """
    cell = build_cell(spec, known)
    _check_logits(spec, cell)
    for chosen in (spec.protocol.augmentation, spec.protocol.second):
        if chosen is not None:
            check_transforms(chosen, spec.data)
    _check_single_images(spec, cell)
    networks = {"student": cell.student.model} | ({"teacher": cell.teacher.model} if cell.teacher else {})
    owners = owned({**networks, **cell.modules})
    others = {parameter for parameters in owners.values() for parameter in parameters}
    for name, terms in cell.terms.items():
        stage, where = spec.method.stages[name], f"method '{spec.method.name}', stage '{name}'"
        trained = [*cell.student.model.parameters()] if "student" in stage.trains else []
        for key, of in spec.method.modules.items():
            own = owners[key] if key in stage.trains else []
            if own and of.optimizer is not None:
                check_optimizer(of.optimizer, stage.schedule, own, stage.clip)
            trained += own
        for term in terms.values():
            _check_term(term, f"method '{spec.method.name}': {name}/{term.name}", spec, cell)
            own = [parameter for parameter in term.parameters() if parameter not in others]
            if own and "connectors" not in stage.trains:
                what = f"{where}: the loss '{term.name}' has parameters of its own, which this stage does not train"
                raise UserError(what, hint="write 'trains: [student, connectors]'")
            trained += own
        trained = [parameter for parameter in dict.fromkeys(trained) if parameter.requires_grad]
        if not trained and "teacher" not in stage.trains:
            raise UserError(f"{where}: there is nothing to train", hint="add 'student' to its 'trains'")
        if trained:
            check_optimizer(stage.optimizer, stage.schedule, trained, stage.clip)
        if "teacher" in stage.trains and cell.teacher is not None:
            optimizer, schedule = stage.teacher_optimizer or stage.optimizer, stage.teacher_schedule or stage.schedule
            check_optimizer(optimizer, schedule, [*cell.teacher.model.parameters()], stage.clip)
    check_schedules(spec)
    return cell


def _check_term(term: Term, place: str, spec: CellSpec, cell: BuiltCell) -> None:
    """Compute a term once, and gradients that it reads. Its errors begin as those of building it."""
    try:
        check_term(term, cell.shapes, cell.teacher_shapes, spec.data.classes)
        for side, network in (("student", cell.student), ("teacher", cell.teacher)):
            if network is not None:
                check_gradients(term, network, side, spec.networks[side][1].image_shape)
    except UserError as error:
        raise UserError(f"{place}: {error.what}", error.where, error.hint) from None


def _check_logits(spec: CellSpec, cell: BuiltCell) -> None:
    """Raises UserError for a network with other logits than one for each class that it is to know."""
    networks = [(spec.student, spec.data, cell.shapes)] if _asks_logits(spec) else []
    if spec.teacher is not None:
        networks.append((spec.teacher.model, spec.teacher.knows(spec.data), cell.teacher_shapes))
    for model, data, shapes in networks:
        if (found := tuple(shapes[LOGITS])) != (data.classes,):
            many = counted(found[0], "logit") if len(found) == 1 else f"logits of shape {[*found]}"
            what = (
                f"model '{model.name}' gives {many} for an image, where the data have {counted(data.classes, 'class')}"
            )
            raise UserError(what, model.target, "it is built with 'classes': its last layer has as many outputs")


def _asks_logits(spec: CellSpec) -> bool:
    """Whether anybody reads what the student's own head gives."""
    return spec.method.predicts is None or LOGITS in spec.method.points("student")


def _check_single_images(spec: CellSpec, cell: BuiltCell) -> None:
    """Raises UserError where a training batch is one image, and a batch norm then has one value of each channel."""
    size, keeps = spec.protocol.batch_size, spec.protocol.last_batch == "keep"
    images = [training_images(part) for part in spec.domains]
    single = [n for n in images if n == 1 or size == 1 or (n % size == 1 and keeps)]
    trained = {name for name, stage in spec.method.stages.items() if stage.modes.student == "train"}
    if not single or not trained:
        return
    one = spec.student.takes(spec.data).image_shape
    layers = [layer for name in trained for term in cell.terms[name].values() for layer in term.layers]
    pairs = [pair for layer in layers for pair in zip(layer.connectors, layer.students, strict=True)]
    # Built anew: one that ran may hold values with gradients, as of its last maps, and those cannot be copied.
    student = build_model(spec.student.not_started(), spec.student.takes(spec.data))
    parts = [(student, one), *((copy.deepcopy(connector), cell.shapes[point]) for connector, point in pairs)]
    for module, shape in parts:
        try:
            with torch.no_grad():
                module.train()(dry_images(module, shape, 1))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                continue
            which = (
                "every batch is" if size == 1 else f"the last batch of {counted(single[0], 'image')}, {size} each, is"
            )
            what = f"{which} one image, of which a batch norm of '{spec.student.name}' cannot take a deviation"
            hint = "leave that batch out with 'protocol.last_batch: drop', or choose another 'protocol.batch_size'"
            raise UserError(what, f"protocol '{spec.protocol.name}'", hint) from None


def costs_of(spec: CellSpec) -> dict[str, Cost]:
    """Stage -> what its batch source takes, by sources whose teacher has the right shape and knows nothing."""
    if not spec.method.sources:
        return {}
    teacher = untrained_teacher(spec.teacher, spec.data, CPU, REFERENCE) if spec.teacher is not None else None
    frozen = teacher.network if teacher else None
    steps = {span.name: span.steps for span in planned_timeline(spec).spans}
    return {
        name: build_source(source, SourceContext(spec, name, CPU, frozen)).cost(steps[name])
        for name, source in spec.method.sources.items()
    }


def multiples(spec: CellSpec, costs: Mapping[str, Cost]) -> dict[str, int]:
    """Input set -> its images for each of the batch, of sets that batch sources give."""
    return {given: costs[name].times for name, source in spec.method.sources.items() for given in source.gives}
