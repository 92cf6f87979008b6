"""In what two resolved recipes differ, apart from names and seeds."""

from collections.abc import Iterator, Sequence
from typing import Any

from kdbench.tree import text

# Parts of a resolved recipe that change no number, or that differ between the cells of a row on purpose.
_NAMES_ONLY = {"label", "root", "file", "url", "accuracy", "shares", "keep"}
# Parts whose keys were chosen by whoever wrote a card: one of them may be called as a part above.
_OF_CARDS = {"options", "losses", "stages", "modules", "modes", "schedules", "batch_norm"}


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted paths at which two resolved recipes differ in what affects numbers; the seed does not count."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            if (path or key != "seed") and not _names_only(path, key):
                yield from differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for n, (own, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(own, other, f"{path}.{n}")
    elif a != b:
        yield path, a, b


def _names_only(path: str, key: str) -> bool:
    above, _, last = path.rpartition(".")
    if last in _OF_CARDS and not (last == "options" and above.rpartition(".")[2] in ("data", "target")):
        return False
    return key in _NAMES_ONLY


def shown(found: Sequence[tuple[str, Any, Any]]) -> str:
    """The first differences, as an error's message says them."""
    return "; ".join(f"{path} ({text(x)} and {text(y)})" for path, x, y in found[:3]) + ("; …" if found[3:] else "")
