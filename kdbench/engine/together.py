"""Steps of cells that several ranks train together.

Each computes the networks on its share of a batch, and the losses of the whole batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.data.streams import address, seed_draws
from kdbench.engine.data.batch import Batch, Sets
from kdbench.engine.member import Member
from kdbench.engine.networks.averaging import Average
from kdbench.engine.networks.network import autocast
from kdbench.engine.program import Cohort, Program
from kdbench.engine.ranks import Ranks, replicated, statistics
from kdbench.engine.source_of_ranks import sizes_of
from kdbench.engine.stage import Numbers, Stage, Turn
from kdbench.engine.step import backward, inputs_of, train, weighted_sum
from kdbench.engine.teachers.teacher import PointValues, Taught
from kdbench.engine.terms import Term


class Together(Program):
    """A program whose cells are trained by several ranks, all of which run it.

    Attributes:
        replicas: what each member's present stage trains.
    """

    def __init__(self, cohorts: Sequence[Cohort], ranks: Ranks) -> None:
        super().__init__(cohorts)
        self.ranks = ranks
        self.replicas: dict[Member, tuple[Stage, nn.Module]] = {}

    def train(self, member: Member, sets: Sets, taught: Taught) -> int:
        stage, replica = self.replicas.get(member, (None, None))
        if stage is not member.stage or replica is None:
            replica = replicated(member.modules.used_in(member.stage.span.name))
            self.replicas[member] = member.stage, replica

        def losses(member: Member, turn: Turn, *more: Any) -> Any:
            # Without a loss there is no backward pass, which DistributedDataParallel would wait for.
            # Nor does it wait for two.
            with_it = turn.active and not turn.separate
            return replica(losses_of, member, turn, *more) if with_it else losses_of(member, turn, *more)

        images = train(member, sets, taught, losses, self.backward)
        # What follows batch norms took its share of each rank's own statistics.
        followers = member.answers.model.buffers() if isinstance(member.answers, Average) else ()
        self.ranks.average(
            [*statistics(member.modules.networks), *(one for one in followers if one.is_floating_point())]
        )
        return images

    def backward(self, turn: Turn, *more: Any) -> dict[Tensor, Tensor]:
        """What `step.backward` does, with the mean of all ranks' gradients."""
        found = backward(turn, *more)
        if turn.separate:
            given = [parameter.grad for parameter in turn.parameters if parameter.grad is not None]
            self.ranks.average([*given, *found.values()])
        return found


def losses_of(
    member: Member, turn: Turn, sets: Sets, taught: Taught, numbers: Numbers
) -> tuple[Tensor, dict[str, Tensor], int]:
    """What `step.losses_of` gives, of the batch of all ranks."""
    names = member.stage.shared_sets
    sizes = dict(zip(names, member.batches.sizes(names), strict=True))
    whole = WholeBatch(member.batches.ranks, sizes)
    with autocast(member.computing.precision, member.device):
        # Networks draw for each rank's own images; losses draw alike on all ranks.
        with torch.random.fork_rng([member.device] if member.device.type == "cuda" else []):
            if rank := whole.ranks.rank:
                seed_draws(address(member.spec.seed, f"dropout/rank {rank}", member.step), member.device)
            seen, values = inputs_of(member, turn, sets, taught)
        sizes |= sizes_of(member.stage.source)
        losses = {name: whole.loss(turn.terms[name], values, seen, numbers.told[name]) for name in turn.active}
        loss = weighted_sum(losses, numbers.weights, member.device)
    counted = ["data"] if "data" in names else [*seen]
    return loss, losses, max(sizes[name] for name in counted)


@dataclass
class WholeBatch:
    """The values and input sets of a step, gathered when a term first asks for them.

    Args:
        images: input set -> images of its whole batch.
    """

    ranks: Ranks
    images: Mapping[str, int]
    known: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def loss(self, term: Term, values: Mapping[str, PointValues], sets: Sets, told: Mapping[str, Tensor]) -> Tensor:
        """A term's loss of the whole batch."""
        asked = {
            network: {
                name: {point: self._of(name, values[network][name][point]) for point in dict.fromkeys(points)}
                for name, points in term.points(network).items()
            }
            for network in values
        }
        return term(asked, {name: self._batch(name, sets[name]) for name in term.input_sets}, told)

    def _of(self, name: str, part: Tensor) -> Tensor:
        """A value of an input set. Where it is the same tensor, it is gathered once."""
        if id(part) not in self.known:
            self.known[id(part)] = (part, self.ranks.whole(part, self.images[name]))
        return self.known[id(part)][1]

    def _batch(self, name: str, batch: Batch) -> Batch:
        """An input set with all that a loss may read of it."""
        parts = {key: getattr(batch, key) for key in ("labels", "index", "view", "mask")}
        return replace(batch, **{key: self._of(name, part) for key, part in parts.items() if part is not None})
