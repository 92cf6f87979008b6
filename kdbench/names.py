"""Names by which cells are hashed in place of the location of their code, so that moving code changes no cell.

A shipped card counts under its key, an older one under what `names.yaml` keeps for that key. A user's card counts by
the content of the file that its code stands in, or, where it points at code of a shipped card, as that card does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdbench.own_code import own_code_sha256
from kdbench.tree import Tree


@functools.cache
def frozen() -> dict[str, dict[str, str]]:
    """Kind -> key -> the name of a card of version 0.1.0 or before. Of a metric: key.metrics.metric. Beside the kinds,
    `last_layers`: loss -> the hook point that its methods once named in place of `layers.last`."""
    kept: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return kept


def targets_in(card: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """All targets of a card: where they stand (nothing for the card's own), and what they are now."""
    if isinstance(card.get("target"), str):
        yield "", card["target"]
    for part in ("metrics", "references"):
        for name, target in (card.get(part) or {}).items():
            yield f".{part}.{name}", target


@dataclass(frozen=True)
class Shipped:
    """The shipped cards of a kind: what their code counts as.

    Attributes:
        keys: of all of them.
        names: present target -> its name. versions: present target -> the highest version that a card gives it.
    """

    kind: str
    keys: frozenset[str]
    names: dict[str, str]
    versions: dict[str, int]

    @classmethod
    def of(cls, kind: str, cards: Mapping[str, Tree]) -> Shipped:
        kept = frozen().get(kind, {})
        found = [(key, at, target) for key, tree in cards.items() for at, target in targets_in(tree.data)]
        # A new card for code that an older one names is that one's alias, whichever comes first in the alphabet.
        found.sort(key=lambda one: (one[0] + one[1] not in kept, one[0]))
        names: dict[str, str] = {}
        versions: dict[str, int] = {}
        for key, at, target in found:
            if target.startswith("kdbench.") or key + at in kept:
                names.setdefault(target, kept.get(key + at, key + at))
            versions[target] = max(versions.get(target, 1), cards[key].data.get("version", 1))
        return cls(kind, frozenset(cards), names, versions)

    def name(self, key: str, at: str, target: str) -> str:
        """What a target counts as that stands in the card of a key. Paths of other packages count as they are."""
        kept = frozen().get(self.kind, {})
        if key in self.keys and key + at in kept:
            return kept[key + at]
        return self.names.get(target) or own_name(target) or target


def own_name(target: str) -> str | None:
    """The name of a user's own code, by its content; None for other code."""
    sha256 = own_code_sha256(target)
    return None if sha256 is None else content_name(target, sha256)


def content_name(target: str, sha256: str) -> str:
    return f"{target.partition(':')[2]}@{sha256}"


def is_content(name: str) -> bool:
    return "@" in name
