"""A batch source of several ranks: rank 0's alone. It is shown the whole batch, and every rank gets its share of what
it makes. So what a source chooses among the images of a batch, or finds by a long search, is what it is on one process.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdbench.engine.data.batch import Batch
from kdbench.engine.data.batches import Batches
from kdbench.engine.inputs import Source, SourceContext, SourceStep, build_source
from kdbench.errors import CellError, counted

# Of the parts of a batch by their names: shape and kind.
Form = dict[str, tuple[torch.Size, torch.dtype]]


class SourceOfRanks(Source):
    """What stands on every rank for the source that rank 0 has.

    Args:
        build: makes the source; called on rank 0 alone.

    Attributes:
        made: images of the whole batch of each input set that was made last.
    """

    by_step = "the other ranks get their shares of what is made"

    def __init__(self, build: Callable[[], Source], batches: Batches) -> None:
        self.batches, self.ranks = batches, batches.ranks
        self.source: Source | None = None
        self.made: dict[str, int] = {}
        self._stretch = 1

        def begin() -> tuple[str, ...]:
            self.source = build()
            return self.source.streams

        self.streams = self.ranks.of_first(begin)  # type: ignore[misc]

    @property
    def first(self) -> Source:
        """The source, on rank 0."""
        assert self.source is not None
        return self.source

    def ready(self, now: SourceStep, tell: Callable[[str], None], stopping: Callable[[], bool]) -> bool:
        buffers = [*now.student.model.buffers()]

        def begin() -> tuple[bool, int, bool]:
            before = [buffer._version for buffer in buffers]
            done = self.first.ready(now, tell, stopping)
            return done, self.first.stretch(now), before != [buffer._version for buffer in buffers]

        done, self._stretch, changed = self.ranks.of_first(begin)
        # Running statistics follow what a source shows a student in train mode.
        for buffer in buffers if changed else ():
            dist.broadcast(buffer, 0)
        return done

    def stretch(self, now: SourceStep) -> int:
        return self._stretch

    def sets(self, now: SourceStep) -> dict[str, Batch]:
        whole, made = self._whole(now), dict[str, Batch]()

        def forms() -> dict[str, Form]:
            made.update(self.first.sets(whole))
            return {name: {key: (part.shape, part.dtype) for key, part in parts(made[name])} for name in made}

        told = self.ranks.of_first(forms)
        self.made = {name: form["images"][0][0] for name, form in told.items()}
        return {name: self._share(form, made.get(name)) for name, form in told.items()}

    def state(self) -> dict[str, Any]:
        return self.source.state() if self.source is not None else {}

    def load_state(self, state: dict[str, Any]) -> None:
        self.ranks.of_first(lambda: self.first.load_state(state))

    def record(self) -> dict[str, Any]:
        return self.source.record() if self.source is not None else {}

    def _whole(self, now: SourceStep) -> SourceStep:
        """A step with the whole batch in place of this rank's share."""
        sizes = dict(zip(now.sets, self.batches.sizes(now.sets), strict=True))

        def gathered(points: Mapping[str, Tensor], images: int) -> dict[str, Tensor]:
            return {point: self.ranks.gathered(part.detach(), images) for point, part in points.items()}

        sets = {name: replace(batch, **gathered(dict(parts(batch)), sizes[name])) for name, batch in now.sets.items()}
        values = {
            network: {name: gathered({p: v for p, v in of[name].items() if p == "logits"}, sizes[name]) for name in of}
            for network, of in now.values.items()
        }
        return replace(now, sets=sets, values=values)

    def _share(self, form: Form, made: Batch | None) -> Batch:
        """This rank's part of what rank 0 made."""
        images = form["images"][0][0]
        if images < self.ranks.size:
            raise CellError(
                f"a batch of {counted(images, 'made image')} cannot be shared out among {self.ranks.size} ranks"
            )
        share = self.ranks.share(images)
        found: dict[str, Tensor] = {}
        for key, (shape, kind) in form.items():
            there = torch.empty(shape, dtype=kind, device=self.batches.device)
            part = getattr(made, key).contiguous() if made else there
            dist.broadcast(part, 0)
            found[key] = part[share]
        return Batch(**({"labels": None} | found))  # type: ignore[arg-type]


def parts(batch: Batch) -> list[tuple[str, Tensor]]:
    """What a batch has, by the names of its fields."""
    found = ((field.name, getattr(batch, field.name)) for field in fields(batch))
    return [(name, part) for name, part in found if part is not None]


def source_on(batches: Batches, context: SourceContext) -> Source:
    """The source of a stage, or what stands for it on the ranks that share these batches."""
    spec = context.spec.method.stages[context.stage].source
    assert spec is not None
    build = partial(build_source, spec, context)
    return SourceOfRanks(build, batches) if batches.ranks.size > 1 else build()


def sizes_of(source: Source | None) -> dict[str, int]:
    """Images of the whole batch of each input set that a source made last, on several ranks."""
    return source.made if isinstance(source, SourceOfRanks) else {}
