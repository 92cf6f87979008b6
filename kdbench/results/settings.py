"""How a cell was trained, told from its record in the words that cards of published tables use."""

from collections.abc import Callable
from typing import Any

from kdbench.record import Record


def batch_size(record: Record) -> float | None:
    """Images a batch; None where the record does not say."""
    size = (record.spec.get("protocol") or {}).get("batch_size")
    return float(size) if isinstance(size, int | float) else None


def on_validation(record: Record) -> bool:
    """Whether its accuracy is on the validation part, whatever version's form its recipe has."""
    return (record.spec.get("data") or {}).get("tested_on") == "validation"


def in_a_line(record: Record) -> str:
    """Batches, augmentation, optimizer, schedule and further settings of the main stage in a line; empty where nothing
    is said."""
    size = batch_size(record)
    said = {name: words for name, say in SAID.items() if (words := say(record))}
    parts = [
        "" if size is None else f"batches of {size:g}",
        said.get("optimizer", ""),
        *(f"{name} {said[name]}" for name in ("learning rate", "weight decay") if name in said),
        *([f"rate {said['schedule']}{_in_brackets(record)}"] if "schedule" in said else []),
        *([f"augmentation: {said['augmentation']}"] if "augmentation" in said else []),
        *_further(record),
    ]
    return ", ".join(part for part in parts if part)


def _in_brackets(record: Record) -> str:
    """Options of the schedule that its words leave out, as ' (warmup 5%)'."""
    name, options = _options(record, "schedule")
    told = {"at", "gamma", "reset_momentum"} if name == "multistep" else set()
    found = [f"{key} {value}".replace("_", " ") for key, value in options.items() if key not in told]
    return f" ({', '.join(found)})" if found else ""


def _further(record: Record) -> list[str]:
    """What few protocols have, and only where it is on."""
    stage = main_stage(record)
    losses = [(term.get("loss") or {}).get("options") or {} for term in (stage.get("losses") or {}).values()]
    smoothing = sorted({value for options in losses if (value := options.get("label_smoothing"))})
    ema = (record.spec.get("protocol") or {}).get("ema")
    return [
        *(f"label smoothing {value:g}" for value in smoothing),
        *([f"gradients clipped at {stage['clip']:g}"] if stage.get("clip") else []),
        *([f"tested with a moving average of the weights ({ema:g})"] if ema else []),
    ]


def main_stage(record: Record) -> dict[str, Any]:
    """The stage that has the protocol's epochs to itself, or what others leave of them; the last where none does."""
    stages = list(((record.spec.get("method") or {}).get("stages") or {}).values())
    whole = [s for s in stages if not any(s.get(key) for key in ("share", "extra_epochs", "extra_share"))]
    return (whole or stages or [{}])[-1]


def _options(record: Record, part: str) -> tuple[str, dict[str, Any]]:
    """Name and options of the main stage's optimizer or schedule."""
    found = main_stage(record).get(part) or {}
    return str(found.get("name", "")), found.get("options") or {}


def _optimizer(record: Record) -> str:
    """As 'SGD with momentum 0.9'."""
    name, options = _options(record, "optimizer")
    if name != "sgd" or not options.get("momentum"):
        return name.upper() if name == "sgd" else name
    return f"SGD with {'Nesterov ' * bool(options.get('nesterov'))}momentum {options['momentum']:g}"


def _schedule(record: Record) -> str:
    name, options = _options(record, "schedule")
    if name != "multistep":
        return name
    places = [str(place) for place in options.get("at", ())]
    shares = [place.removesuffix("%") for place in places if place.endswith("%")]
    shown = f"{'/'.join(shares)} %" if len(shares) == len(places) else "/".join(places)
    return f"× {options.get('gamma', 0.1):g} at {shown}"


def _augmentation(record: Record) -> str:
    found = (record.spec.get("protocol") or {}).get("augmentation")
    if found is None:
        return ""
    crop = f"crop after {'reflect ' * (found.get('mode') == 'reflect')}padding {found.get('padding')}"
    parts = [crop] * bool(found.get("padding")) + ["resized crop"] * bool(found.get("resized_crop"))
    parts += [f"{found.get('decoder')}'s decoder"] * bool(found.get("decoder"))
    mix = found.get("mix") or {}
    mixed = [f"{word} {mix[key]:g}" for key, word in (("mixup", "Mixup"), ("cutmix", "CutMix")) if mix.get(key)]
    own = [str(one.get("name")).replace("_", " ") for one in found.get("transforms") or ()]
    return " and ".join(parts + ["flip"] * bool(found.get("flip")) + own + mixed) or "none"


def _option(record: Record, name: str) -> str:
    value = _options(record, "optimizer")[1].get(name)
    return f"{value:g}" if isinstance(value, int | float) else ""


SAID: dict[str, Callable[[Record], str]] = {
    "optimizer": _optimizer,
    "learning rate": lambda record: _option(record, "lr"),
    "weight decay": lambda record: _option(record, "weight_decay"),
    "schedule": _schedule,
    "augmentation": _augmentation,
}
