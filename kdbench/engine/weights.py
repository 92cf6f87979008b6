"""Weight files: found, read, and loaded into networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kdbench.cards import Weights
from kdbench.engine.targets import import_target
from kdbench.errors import UserError
from kdbench.files import atomic, find_weights, home, sha256_of, weight_folders
from kdbench.recipe.specs import CellSpec, ModelSpec


def locate(weights: Weights, download: bool) -> Path:
    """A weight file with the right hash: from the weight folders, or downloaded into the cache."""
    file = find_weights(weights.file)
    if file is None:
        if weights.url is None or not download:
            tried = ", ".join(str(folder) for folder in weight_folders())
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
            tried = ", ".join(str(folder) for folder in weight_folders())
            raise UserError(
                f"the weights could not be downloaded from {weights.url}: {error}",
                hint=f"get '{weights.file}' by hand and put it into one of: {tried}",
            ) from None
    if sha256_of(file) != weights.sha256:
        raise UserError(
            f"the weight file has another sha256 than its card says ({weights.sha256[:12]}…)",
            where=str(file),
            hint="it is damaged or another file: replace it",
        )
    return file


def weight_file(spec: ModelSpec) -> Path:
    assert spec.weights is not None
    file = find_weights(spec.weights)
    if file is None:
        raise UserError(f"there is no weight file '{spec.weights}'")
    if spec.weights_sha256 is not None and sha256_of(file) != spec.weights_sha256:
        raise UserError(f"the weight file '{file}' has changed since this run began")
    return file


def read_weights(file: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a torch file (tensors only, nothing is executed)."""
    return weights_and_choice(file)[0]


def weights_and_choice(file: Path) -> tuple[dict[str, Tensor], str | None]:
    """The same, and a sentence where the file holds several and one was chosen (weights and their moving average)."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file), None
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a damaged file can fail in any way inside the unpickler
        raise UserError(
            f"the weight file cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}",
            where=str(file),
            hint="it must hold a state dict (.safetensors, or torch.save of tensors)",
        ) from None
    choice = None
    if isinstance(loaded, Mapping) and isinstance(taken := loaded.get("state_dict"), Mapping):
        others = [key for key, value in loaded.items() if value is not taken and _alike(value, taken)]
        if others:
            not_taken = ", ".join(f"'{key}'" for key in others)
            choice = f"{file} holds several networks' weights: 'state_dict' is taken, not {not_taken}"
        loaded = taken
    if not isinstance(loaded, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        held = f"the entries {', '.join(map(repr, [*loaded][:5]))}" if isinstance(loaded, Mapping) else "no entries"
        raise UserError(
            f"the weight file holds no state dict: a {type(loaded).__name__} with {held}",
            where=str(file),
            hint="save the network's state_dict() alone",
        )
    return {key.removeprefix("module."): value for key, value in loaded.items()}, choice


def choices_of(spec: CellSpec) -> list[str]:
    """Of a cell's weight files that are here: a sentence for each that holds several networks' weights."""
    teacher = spec.teacher.weights if spec.teacher is not None else None
    names = [spec.student.weights, *(weights.file for weights in (spec.student.start, teacher) if weights is not None)]
    files = {file for name in names if name is not None and (file := find_weights(name)) is not None}
    return [choice for file in sorted(files) if (choice := weights_and_choice(file)[1]) is not None]


def _alike(one: object, other: Mapping[str, Tensor]) -> bool:
    """Whether something holds tensors by the same names."""
    names = {str(key).removeprefix("module.") for key in other}
    return isinstance(one, Mapping) and names <= {str(key).removeprefix("module.") for key in one}


def load_weights(model: nn.Module, state: dict[str, Tensor], name: str, where: str) -> None:
    """Load a state dict that must fit exactly."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise UserError(
            f"these weights do not fit '{name}': {' '.join(lines)}",
            where=where,
            hint="check the model's name and options; two networks of one name can differ",
        ) from None


def start_from_card(model: nn.Module, weights: Weights, name: str) -> None:
    """Load a card's weights; the one layer that has other classes there keeps its first values."""
    file = locate(weights, download=False)
    state = read_weights(file)
    state = import_target(weights.layout)(state) if weights.layout is not None else state
    own = model.state_dict()
    new = {key: own[key] for key in state if key in own and own[key].shape != state[key].shape}
    if len({key.rpartition(".")[0] for key in new}) > 1:
        raise UserError(
            f"these weights do not fit '{name}': {', '.join(list(new)[:4])} have other shapes",
            where=str(file),
            hint="only its last layer may have other classes",
        )
    load_weights(model, state | new, name, str(file))


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
        raise UserError(
            f"the student '{name}' cannot begin with the weights of its teacher '{teacher}': they differ at '{at}'",
            hint="choose the same model for both (the student may have more classes)",
        )
    rows = None if known_classes is None else torch.tensor(known_classes)
    classifier = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    if rows is not None and not classifier:
        raise UserError(f"the student '{name}' has no linear classifier whose rows could be told apart by class")
    with torch.no_grad():
        for key, value in own.items():
            if rows is not None and key.rpartition(".")[0] in classifier:
                value[rows] = state[key][rows]
            elif value.ndim:
                value[: len(state[key])] = state[key]
            else:
                value.copy_(state[key])


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
