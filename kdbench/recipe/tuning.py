"""What a recipe tunes: the settings that each method tries, the same number for all of them.

They are all known before anything is trained. So they train side by side like any other cells, and a run that was
killed and goes on chooses as it would have.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from kdbench.errors import UserError, counted
from kdbench.recipe.choices import Range, Tune
from kdbench.recipe.loading import put
from kdbench.recipe.variants import Variant
from kdbench.tree import Tree

# Parts of a recipe that may be tuned.
TUNED = ("method", "protocol")
# Digits of a number from a range: enough to tell values apart, few enough to be the same on every machine.
DIGITS = 3
# Of so many points of a range, by the number of settings, some may give a setting that was there already.
SPARE = 4


class Tuning:
    """What a recipe tunes, for one variant after another.

    Args:
        tune: what it says.
        tree: the recipe's.
    """

    def __init__(self, tune: Tune, tree: Tree) -> None:
        self.tune, self.tree = tune, tree
        self.idle = set(tune.spaces)

    def keys(self, variant: Variant) -> dict[str, str]:
        """Dotted recipe path -> the key under which the recipe tunes it, as far as it is for a variant's method.

        Raises:
            UserError: a path that is compared too.
        """
        method = variant.tree.data["method"]["name"]
        found = {}
        for key in self.tune.spaces:
            first, _, rest = key.partition(".")
            path = f"method.{rest}" if first == method else key
            if rest and path.partition(".")[0] in TUNED:
                if path in variant.axes or (path.startswith("method.") and path.split(".")[1] in variant.own):
                    raise UserError(f"'{path}' is both compared and tuned", where=self.origin(key), hint="choose one")
                found[path] = key
        return found

    def settings(self, keys: dict[str, str]) -> Iterator[dict[str, Any]]:
        """Settings, path -> value, in the order in which they count. Of lists alone: all combinations. Where there is a
        range: the recipe's own first, then points that fill the ranges evenly (a Halton sequence).

        Args:
            keys: path -> key.

        Raises:
            UserError: lists whose combinations are not as many as the settings that every method tries.
        """
        spaces = {path: self.tune.spaces[key] for path, key in keys.items()}
        lists = [space for space in spaces.values() if isinstance(space, list)]
        if len(lists) < len(spaces):
            from scipy.stats.qmc import Halton

            yield {}
            # The first point is the corner of all lowest values.
            points = Halton(len(spaces), scramble=False).random(SPARE * self.tune.trials)[1:].tolist()
        elif (number := math.prod(map(len, lists))) != self.tune.trials:
            raise self.other_number(number, keys)
        else:
            points = itertools.product(*([n / len(values) for n in range(len(values))] for values in lists))
        for point in points:
            yield {path: value_at(space, share) for (path, space), share in zip(spaces.items(), point, strict=True)}

    def other_number(self, number: int, keys: dict[str, str]) -> UserError:
        paths = ", ".join(keys.values())
        return UserError(
            f"{paths}: {counted(number, 'setting')}, and every method tries {self.tune.trials}",
            where=self.origin(next(iter(keys.values()))),
            hint="give lists with as many combinations, or a range, or another number of 'trials'",
        )

    def lowest(self, keys: dict[str, str]) -> dict[str, Any]:
        """A setting that gives every path a value."""
        return {path: value_at(self.tune.spaces[key], 0.0) for path, key in keys.items()}

    def laid_over(self, variant: Variant, setting: dict[str, Any], keys: dict[str, str]) -> Variant:
        """A variant with a setting."""
        tree, shared = variant.tree, set(variant.shared)
        for path, value in setting.items():
            tree = put(tree, path, value, self.origin(keys[path]))
            # What is said for all methods means nothing to those that lack it.
            shared |= {path.split(".")[1]} if keys[path].startswith("method.") else set()
        return replace(variant, tree=tree, shared=frozenset(shared))

    def origin(self, key: str) -> str:
        return self.tree.origin(("tune", key))

    def check(self, seeds: list[int]) -> None:
        """Raises UserError for what meant nothing to any method, and for seeds that the table uses too."""
        for key in sorted(self.idle):
            raise UserError(
                f"'{key}' is no option of the methods of this comparison",
                where=self.origin(key),
                hint="write a method and one of its parameters, as at.beta ('kdbench show methods at' lists them), or "
                "a field of the protocol, as protocol.optimizer.lr",
            )
        if both := sorted({*self.tune.seeds} & {*seeds}):
            hint = "try settings on other seeds, as [100, 101]"
            raise UserError(f"seed {both[0]} is also a seed of the table", self.tree.origin(("tune", "seeds")), hint)


def value_at(space: Range | list[Any], share: float) -> Any:
    """The value at a share in [0, 1) of a list or a range."""
    if isinstance(space, list):
        # Shares of lists alone are whole parts of them, but for rounding.
        return space[math.floor(round(share * len(space), DIGITS))]
    value = space.low * (space.high / space.low) ** share if space.log else space.low + (space.high - space.low) * share
    return float(f"{value:.{DIGITS}g}")
