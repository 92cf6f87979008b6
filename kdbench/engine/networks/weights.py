"""Weight files: found, read, and loaded into networks."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kdbench.cards import Weights
from kdbench.engine.networks.weight_files import State, at, fitting, networks
from kdbench.engine.targets import code_of, import_target
from kdbench.errors import UserError, counted
from kdbench.files import atomic, damaged_part, find_weights, home, sha256_of, weight_folders
from kdbench.recipe.model_specs import DataSpec, ModelSpec
from kdbench.recipe.specs import TeacherSpec


def locate(weights: Weights, download: bool) -> Path:
    """A weight file with the right hash: from the weight folders, or downloaded into the cache.

    Raises:
        UserError: it is in none, cannot be downloaded, or has another hash.
    """
    file = find_weights(weights.file)
    if file is None:
        tried = ", ".join(str(folder) for folder in weight_folders())
        if weights.url is None or not download:
            raise UserError(
                f"there is no weight file '{weights.file}'",
                hint=f"looked in {tried}; put it there, set KDBENCH_WEIGHTS, or allow the download"
                + (f" of {weights.url}" if weights.url else ""),
            )
        file = home() / "weights" / weights.file
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(weights.url, str(file), hash_prefix=weights.sha256, progress=False)
        except (OSError, RuntimeError) as error:
            hint = f"get '{weights.file}' by hand and put it into one of: {tried}"
            raise UserError(f"the weights could not be downloaded from {weights.url}: {error}", hint=hint) from None
    if sha256_of(file) != weights.sha256:
        what = f"the weight file does not have the sha256 of its card ({weights.sha256[:12]}…)"
        raise UserError(what, str(file), "it is damaged or another file: replace it")
    return file


def weight_file(spec: ModelSpec) -> Path:
    """The user's weights that a model starts from. UserError where they are gone, or were changed meanwhile."""
    assert spec.weights is not None
    file = find_weights(spec.weights)
    if file is None:
        raise UserError(f"there is no weight file '{spec.weights}'")
    if spec.weights_sha256 is not None and sha256_of(file) != spec.weights_sha256:
        raise UserError(f"the weight file '{file}' has changed since this run began")
    return file


def load_file(
    model: nn.Module,
    file: Path,
    name: str,
    layout: str | None = None,
    entry: str | None = None,
    new_classes: bool = False,
    classes: int | None = None,
) -> list[str]:
    """Load the weights of a file that fit a network, wherever they are in it.

    Args:
        name: of the network, for messages.
        layout: module:object that turns the file's state dict into the network's.
        entry: which of several networks in the file.
        new_classes: whether its last layer may have other classes there, and then keeps its first values.
        classes: of the network: its last layer has as many rows. None: not known.

    Returns:
        sentences on what its user should know: which of several networks was taken, what was left out.

    Raises:
        UserError: weights that do not fit, with what differs.
    """
    found = networks(file)
    if layout is not None:
        place, state = next(iter((found if entry is None else at(entry, found, found)).items()))
        with code_of(f"layout '{layout}' of {file}"):
            found = {place: import_target(layout)({key.removeprefix("module."): value for key, value in state.items()})}
    state, choice = fitting(found, model, entry)
    notes = []
    if choice:
        notes.append(f"{file} holds several networks' weights: {choice} ('entry' beside the file's name chooses)")
    if part := damaged_part(file):
        notes.append(f"{file} is probably damaged: '{part}' in it does not have its checksum")
    prefixes, why = getattr(model, "left_out", ((), ""))
    if left_out := {key for key in state if key.startswith(prefixes)}:
        state = {key: value for key, value in state.items() if key not in left_out}
        notes.append(f"{file}: {why}")
    own = model.state_dict()
    other = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if new_classes and (counts := _other_classes(own, state, other, classes)):
        state = state | {key: own[key] for key in other}
        notes.append(f"{file} has {counted(counts[0], 'class')}: the last layer of '{name}', of {counts[1]}, is new")
    load_weights(model, state, name, str(file), classes)
    return notes


def load_teacher_file(model: nn.Module, file: Path, spec: TeacherSpec, data: DataSpec) -> list[str]:
    """Load a file into one teacher's network, by what its card says of the file. Returns and raises as `load_file`."""
    layout, entry = (spec.weights.layout, spec.weights.entry) if spec.weights is not None else (None, None)
    return load_file(model, file, spec.model.name, layout, entry, classes=spec.knows(data).classes)


def load_weights(model: nn.Module, state: State, name: str, where: str, classes: int | None = None) -> None:
    """Load a state dict that must fit exactly. Counters of batch norms, which old files lack, may be missing.

    Args:
        name: of the network. where: its weights are from. Both for messages. classes: as of `load_file`.

    Raises:
        UserError: it does not fit, or has values that are not finite.
    """
    own = model.state_dict()
    other = [key for key in own if key in state and own[key].shape != state[key].shape]
    if counts := _other_classes(own, state, other, classes):
        raise UserError(
            f"these weights of '{name}' are for {counted(counts[0], 'class')}, where the data have {counts[1]}",
            where=where,
            hint=f"a teacher of other classes can teach its features: write 'classes: {counts[0]}' beside its "
            "'weights'; a student may start from them, with a new last layer",
        )
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    strange = [key for key in state if key not in own]
    shapes = [f"{key} {[*state[key].shape]} against {[*own[key].shape]}" for key in other]
    kinds = [f"{key} {kind}" for key in own if key in state and (kind := _no_values(state[key], own[key]))]
    differing = [
        f"{len(keys)} {what} ({', '.join(key[:80] for key in keys[:2])}{', …' if keys[2:] else ''})"
        for keys, what in (
            (missing, "missing"),
            (strange, "unknown"),
            (shapes, "of another shape"),
            (kinds, "of another kind"),
        )
        if keys
    ]
    if differing:
        hint = "check the model's name and options; two networks of one name can differ"
        if _other_classes(own, state, other, None):
            layer = other[0].rpartition(".")[0] or other[0]
            hint = (
                f"they differ in the rows of '{layer}' alone. A last layer begins anew if it has one row for each of "
            )
            hint += f"the {classes} classes; for other rows, save the file anew with as many as the network has"
        raise UserError(f"these weights do not fit '{name}': of {len(own)} entries {', '.join(differing)}", where, hint)
    bad = (key for key in state if own[key].isfinite().all() and not state[key].float().isfinite().all())
    if key := next(bad, None):
        hint = "the file is damaged, or its training diverged: take another one"
        raise UserError(f"these weights of '{name}' have values that are not finite, in '{key}'", where, hint)
    # Beside the tensors a state dict holds the layers' versions, which some networks must know (torchvision's MNASNet).
    own.update(state)
    model.load_state_dict(own)


def _no_values(value: Tensor, own: Tensor) -> str:
    """Why a tensor cannot stand for a network's one: "" where it can, in whatever precision."""
    reasons = {
        "quantized": value.is_quantized,
        "sparse": value.layout != torch.strided,
        "without values": value.is_meta,
        "of complex numbers": value.is_complex(),
        "of whole numbers": own.is_floating_point() and not value.is_floating_point(),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _other_classes(
    own: Mapping[str, Tensor], state: State, other: list[str], classes: int | None
) -> tuple[int, int] | None:
    """The classes of a state dict and of a network, where these are all that differs."""
    layers = {key.rpartition(".")[0] for key in other}
    rows = {(len(state[key]), len(own[key])) for key in other if state[key].ndim and own[key].ndim}
    same = all(state[key].shape[1:] == own[key].shape[1:] for key in other)
    fits = state.keys() <= own.keys() and all(key in state or key.endswith("num_batches_tracked") for key in own)
    if not (len(layers) == len(rows) == 1 and same and fits):
        return None
    counts = next(iter(rows))
    # Another layer may differ in its rows alone too: a transformer's table of positions does for other images.
    return counts if classes in (None, counts[1]) else None


def start_from(
    model: nn.Module, state: Mapping[str, Tensor], name: str, teacher: str, known_classes: list[int] | None = None
) -> None:
    """Give a network another one's weights. Of a tensor with more rows than the other's (a classifier of more classes)
    the first ones are taken over, the others keep their first values.

    Args:
        name, teacher: what the two are called, for messages.
        known_classes: those that the other one was trained on; rows of others in the classifier (the last linear layer)
            keep their first values too. None: all.

    Raises:
        UserError: networks that differ in anything else.
    """
    check_start(model, state, name, teacher)
    rows = None if known_classes is None else torch.tensor(known_classes)
    classifier = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    if rows is not None and not classifier:
        raise UserError(f"the student '{name}' has no linear classifier whose rows could be told apart by class")
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if rows is not None and key.rpartition(".")[0] in classifier:
                value[rows] = state[key][rows]
            elif value.ndim:
                value[: len(state[key])] = state[key]
            else:
                value.copy_(state[key])


def check_start(model: nn.Module, state: Mapping[str, Tensor], name: str, teacher: str) -> None:
    """Raises UserError for networks of which one cannot get the other's weights by `start_from`."""
    own = model.state_dict()
    bad = list(own.keys() ^ state.keys())
    wider = [
        key
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
        and not (own[key].ndim and own[key].shape[1:] == state[key].shape[1:] and len(own[key]) > len(state[key]))
    ]
    if bad or wider:
        at = min([*bad, *wider])
        what = f"the student '{name}' cannot begin with the weights of its teacher '{teacher}': they differ at '{at}'"
        raise UserError(what, hint="choose the same model for both (the student may have more classes)")


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's parameters and buffers, contiguous and on the CPU."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }


def save_tensors(file: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file, whole or not at all. Returns its sha256."""
    with atomic(file) as temporary:
        save_file(tensors, temporary)
    return sha256_of(file)
