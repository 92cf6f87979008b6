"""The batch source of SSKD (Xu et al., ECCV 2020): every image upright and turned by 90, 180 and 270 degrees."""

import torch

from kdbench.engine.data.batch import Batch
from kdbench.engine.inputs import Cost, Source, SourceContext, SourceStep
from kdbench.losses.sskd import TURNS


class TurnedImages(Source):
    """From "data" makes "turned": each image four times, one after another, with its label."""

    by_step = None

    def __init__(self, context: SourceContext) -> None:
        self.context = context

    def sets(self, now: SourceStep) -> dict[str, Batch]:
        batch = now.sets["data"]
        assert batch.labels is not None
        turned = torch.stack([batch.images.rot90(k, (2, 3)) for k in range(TURNS)], dim=1)
        return {"turned": Batch(turned.flatten(0, 1), batch.labels.repeat_interleave(TURNS))}

    def cost(self, steps: int) -> Cost:
        return Cost(times=TURNS)
