"""What a weight file holds: state dicts, wherever training codes and tools put them, and the one that a network fits.

Nothing in a file is executed. Of objects whose classes are unknown here (options, schedulers, whole modules) only the
plain content is read.
"""

import contextlib
import re
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kdbench.errors import UserError

State = dict[str, Tensor]

# Keys of the network itself in checkpoints, the likelier first. Averages come last: what they are is not always wanted.
_USUAL = ("state_dict", "model_state_dict", "model", "net", "network", "student", "weights", "params")
# Levels of mappings, and unknown classes in one file, at most.
_DEEPEST, _MOST_CLASSES = 4, 200
# Put around networks by DataParallel, torch.compile, FSDP, checkpointing and Fabric, at any level.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# Left beside the weights by torch's averages and by counters of operations.
_COUNTERS = ("n_averaged", "total_ops", "total_params")
_UNKNOWN = re.compile(r"GLOBAL ([\w.]+) (was not an allowed global|whose module)")
# Types of Python itself that stand in files by name alone.
_TYPES = {"dict", "list", "int", "float", "str", "object"}


class _Plain:
    """Stands for an object of an unknown class: an ordered mapping with its attributes."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


class _Nothing:
    """Stands for a number or type of NumPy."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def networks(file: Path) -> dict[str, State]:
    """The state dicts of a file by their places in it ("" where it is nothing else), the likeliest first.

    Raises:
        UserError: a file that cannot be read, or holds none.
    """
    content = _content(file)
    found = dict(_states(content, ()))
    if not found:
        held = ", ".join(map(repr, [*content][:5])) if isinstance(content, Mapping) else type(content).__name__
        hint = "save the network's state_dict() (names and torch tensors) alone, or under a key like 'state_dict'"
        raise UserError(f"the weight file holds no state dict; it holds: {held or 'nothing'}", str(file), hint)
    return dict(sorted(found.items(), key=lambda item: _rank(*item)))


def read_weights(file: Path) -> State:
    """The likeliest state dict of a file. UserError as `networks` has it."""
    return next(iter(networks(file).values()))


def fitting(found: Mapping[str, State], model: nn.Module, entry: str | None) -> tuple[State, str]:
    """Of the state dicts in a file the one that fits a network best, by the names that its entries have there.

    Args:
        entry: the place of the one that is wanted.

    Returns:
        that state dict, and which one it is where others fit as well, else "".

    Raises:
        UserError: there is none in that place.
    """
    own = {name: value.shape for name, value in model.state_dict().items()}
    tried = {
        ".".join(filter(None, (place, prefix.strip(".")))): state
        for place, whole in found.items()
        for prefix, state in _inside(whole, own)
    }
    fits = {place: _matches(state, own) for place, state in tried.items()}
    best = {place: state for place, state in tried.items() if fits[place] == max(fits.values())}
    if entry is not None:
        below = at(entry, tried, best)
        best = {place: state for place, state in below.items() if fits[place] == max(fits[place] for place in below)}
    taken, *others = best
    not_taken = ", ".join(f"'{place}'" for place in others)
    return best[taken], f"'{taken}' is taken, not {not_taken}" if others and fits[taken] else ""


def at(entry: str, found: Mapping[str, State], likely: Iterable[str]) -> dict[str, State]:
    """The state dicts at a place in a file, or below it. UserError where there is none, with those that are likely."""
    there = {place: state for place, state in found.items() if f"{place}.".startswith(f"{entry}.")}
    if not there:
        places = ", ".join(repr(place) for place in likely if place) or "one network that has no name"
        raise UserError(f"the weight file has no network in '{entry}'", hint=f"it has: {places}")
    return there


def _matches(state: State, own: Mapping[str, torch.Size]) -> int:
    """How well a state dict has a network's entries: by name, and by shape. Counters of batch norms do not count."""
    names = [name for name in state.keys() & own.keys() if not name.endswith("num_batches_tracked")]
    return len(names) + sum(state[name].shape == own[name] for name in names)


def _inside(whole: State, own: Mapping[str, torch.Size]) -> list[tuple[str, State]]:
    """A state dict by a network's own names, once for each prefix that these have in it; that which has most first."""
    extra = _WRAPPERS - {part for name in own for part in name.split(".")}
    whole = {name: value for name, value in whole.items() if not name.endswith(_COUNTERS)}
    state = {".".join(part for part in name.split(".") if part not in extra): value for name, value in whole.items()}
    if len(state) < len(whole):
        state = dict(whole)  # a network with a wrapper beside one without
    ends = {(*name.split("."),) for name in own}
    prefixes = Counter(
        "".join(f"{part}." for part in parts[:i])
        for parts in (name.split(".") for name in state)
        for i in range(len(parts))
        if (*parts[i:],) in ends
    )
    return [
        (prefix, {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)})
        for prefix in sorted(prefixes or [""], key=lambda prefix: ("ema" in prefix, -prefixes[prefix]))
    ]


def _content(file: Path) -> Any:
    unknown: dict[str, type] = {}
    while True:
        try:
            with file.open("rb") as opened:
                if opened.read(9)[8:] == b"{":
                    return load_file(file)
            classes: list[Any] = [(stand_in, name) for name, stand_in in unknown.items()]
            with torch.serialization.safe_globals(classes), warnings.catch_warnings(action="ignore"):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - a damaged file can fail in any way inside the unpickler
            found = _UNKNOWN.search(str(error))
            name = f"builtins.{found[1]}" if found and found[1] in _TYPES else found[1] if found else ""
            if "." not in name or name in unknown or len(unknown) >= _MOST_CLASSES:
                raise _unreadable(file, error) from None
            unknown[name] = _Nothing if name.startswith("numpy.") else _Plain


def _unreadable(file: Path, error: Exception) -> UserError:
    said = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    begins = b""
    with contextlib.suppress(OSError), file.open("rb") as opened:
        begins = opened.read(40)
    hint = "it must hold a state dict (.safetensors, or torch.save of tensors)"
    if called := _UNKNOWN.search(said):
        why = f"it calls '{called[1]}', and nothing in such files is executed here"
    elif "persistent_load" in said:
        why, hint = "it holds a whole module in torch's form of before 1.6", f"{hint}: save its state_dict()"
    elif "TorchScript" in said:
        why, hint = "it is a TorchScript program", f"{hint}: save that of the module which was scripted"
    elif begins.isascii() and len(begins) == 40 and begins.decode().isprintable():
        why, hint = f"it is text, and begins with '{begins.decode()}'", f"{hint}; was it really downloaded?"
    else:
        # torch goes on with what may have happened to the file.
        first = "" if "weights_only" in said else next(iter(said.splitlines()), "").partition(". ")[0][:160]
        why = f"it is damaged, cut short, or of another kind ({type(error).__name__}{': ' if first else ''}{first})"
    return UserError(f"the weight file cannot be read: {why}", where=str(file), hint=hint)


def _states(content: Any, place: tuple[str, ...]) -> Iterator[tuple[str, State]]:
    if not isinstance(content, Mapping) or len(place) > _DEEPEST:
        return
    if "_parameters" in getattr(content, "__dict__", {}):
        if state := dict(_of_module(content, "")):
            yield ".".join(place), state
    elif "param_groups" in content and "state" in content:
        return  # an optimizer's
    elif content and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        yield ".".join(place), dict(content)
    else:
        for key, value in content.items():
            if isinstance(key, str):
                yield from _states(value, (*place, key))


def _of_module(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The state dict of a pickled module, from its attributes."""
    own = vars(module)
    left_out = own.get("_non_persistent_buffers_set") or ()
    for part in ("_parameters", "_buffers"):
        for name, value in own.get(part, {}).items():
            if isinstance(value, Tensor) and name not in left_out:
                yield f"{prefix}{name}", value.detach()
    for name, child in own.get("_modules", {}).items():
        if isinstance(child, Mapping) and prefix.count(".") < 50:
            yield from _of_module(child, f"{prefix}{name}.")


def _rank(place: str, state: State) -> tuple[bool, int, int]:
    words = place.split(".")
    usual = min((_USUAL.index(word) for word in words if word in _USUAL), default=len(_USUAL))
    return any("ema" in word or "average" in word for word in words), usual, -len(state)
