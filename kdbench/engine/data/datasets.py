"""A data set as its card says: made by the card's function, and checked against the card."""

from pathlib import Path
from typing import Any

from kdbench.data.images import ImageData, check, fingerprint_of_images
from kdbench.data.pictures import AnyData, Pictures, fingerprint_of_files
from kdbench.engine.targets import import_target
from kdbench.errors import UserError, failure
from kdbench.image_cards import SQUARE
from kdbench.own_code import own_code_sha256
from kdbench.recipe.model_specs import DataSpec


def load_data(spec: DataSpec, roots: list[Path], download: bool, cache: Path) -> AnyData:
    """The data set of a spec, checked against its card.

    Raises:
        UserError: the card's function fails or gives something else than it should, or than the card says.
    """
    data = _made(spec, {"roots": roots, "download": download, "cache": cache})
    if isinstance(data, Pictures) != spec.streamed:
        raise UserError(
            f"the data set '{spec.name}' is {'not ' if spec.streamed else ''}read from disk while training, its card "
            f"says {'it is' if spec.streamed else 'nothing of it'}",
            hint="correct 'streamed' in the card",
        )
    found: dict[str, object] = {
        "classes": len(data.classes),
        "train": len(data.train_labels),
        "test": len(data.test_labels),
    }
    if empty := [said for said, name in (("training", "train"), ("test", "test")) if not found[name]]:
        what = f"the data set '{spec.name}' has no {empty[0]} images"
        raise UserError(what, spec.target, "both parts have images of each class")
    hint = "correct the card, or the files; 'kdbench data FOLDER' writes a card for a folder of pictures"
    if isinstance(data, ImageData):
        channels, height, width = data.train_images.shape[1:]
        found |= {"channels": channels, "image_size": height if height == width else f"{height}×{width}"}
        if width == spec.channels != channels:
            hint = "channels come before height and width: 'images.permute(0, 3, 1, 2)'"
        elif height != width:
            hint = SQUARE
    if wrong := [
        f"{value} for '{key}', where the card says {getattr(spec, key)}"
        for key, value in found.items()
        if value != getattr(spec, key)
    ]:
        what = f"the data set '{spec.name}' is not what its card says: the files have {', and '.join(wrong)}"
        raise UserError(what, hint=hint)
    return data


def _made(spec: DataSpec, places: dict[str, Any]) -> AnyData:
    """What the function of a data card gives; its errors are the user's."""
    own = own_code_sha256(spec.target) is not None
    try:
        data = import_target(spec.target)(**places, **spec.options)
    except UserError as error:
        raise UserError(error.what, error.where or (spec.target if own else None), error.hint) from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's function can fail in any way
        said = failure(error, import_target(spec.target))
        what = f"the data set '{spec.name}' cannot be made by '{spec.target}': {said}"
        hint = "the function is called with roots, download, cache and the 'args' of its card, all by name"
        raise UserError(what, hint=hint if isinstance(error, TypeError) else None) from None
    if not isinstance(data, AnyData):
        what = f"the data set '{spec.name}': its function gives {type(data).__name__}, not ImageData or Pictures"
        raise UserError(what, spec.target, "end it with 'return kdbench.data.images.canonical(…)'")
    if not own:
        # What is shipped takes its fingerprint of what it read.
        return data
    if isinstance(data, ImageData):
        check(data)
        taken = fingerprint_of_images(data)
    else:
        taken = fingerprint_of_files(data, places["cache"])
    if data.fingerprint != taken:
        what = f"the data set '{spec.name}': its fingerprint {data.fingerprint!s:.12} is not that of its images"
        hint = "'kdbench.data.images.canonical' or 'kdbench.data.pictures.gather' takes it; by one that stays results "
        hint += "of other images would count"
        raise UserError(what, spec.target, hint)
    return data
