"""Several processes that train one cell together: which share of a batch each has, and the shares as one batch again.

Every rank computes the networks on its share. Losses are computed on every rank of the whole batch, from values that
are gathered, so a loss that relates the samples of a batch, or keeps a bank of them, is what it is on one process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, starmap
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdbench.errors import CellError, UserError
from kdbench.models.hooks import Extractor

T = TypeVar("T")
LOST = "another rank has ended, see its message above; repeat the command to continue from the last checkpoints"


class Apart(SystemExit):
    """Ends this rank: it cannot go on without the others."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and which of them this one is.

    Attributes:
        control: a group for what is agreed on between steps; it waits as long as it takes.
        sync_batch_norm: whether batch norms take the whole batch together.
    """

    rank: int = 0
    size: int = 1
    control: Any = None
    sync_batch_norm: bool = False

    def synchronize(self, extractor: Extractor, image_shape: tuple[int, int, int]) -> None:
        """Let a network's batch norms take the whole batch, where they are to."""
        if not self.sync_batch_norm:
            return
        # A dry run in train mode, which one rank might make alone later, and wait for the others.
        extractor.overwritten(image_shape)
        # Torch's own loses the activation that is part of timm's batch norms.
        from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm

        known = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d}
        for module in extractor.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in known:
                what = f"batch norms of model '{extractor.model_name}' are of a kind of their own"
                raise UserError(f"{what}, {type(module).__name__}", where="--sync-batch-norm", hint="leave it out")
        convert_sync_batchnorm(extractor.model)

    def share(self, images: int) -> slice:
        """This rank's part of a batch: consecutive images, one more on the first ranks where it does not divide."""
        return self._shares(images)[self.rank]

    def _shares(self, images: int) -> list[slice]:
        each, more = divmod(images, self.size)
        ends = [rank * each + min(rank, more) for rank in range(self.size + 1)]
        return list(starmap(slice, pairwise(ends)))

    def gathered(self, part: Tensor, images: int) -> Tensor:
        """The shares of all ranks as one batch, in its order. Without gradients."""
        shares = self._shares(images)
        room = part.new_zeros(shares[0].stop, *part.shape[1:])
        room[: len(part)] = part
        found = [torch.empty_like(room) for _ in shares]
        dist.all_gather(found, room)
        return torch.cat([one[: share.stop - share.start] for one, share in zip(found, shares, strict=True)])

    def whole(self, part: Tensor, images: int) -> Tensor:
        """The same with gradients: this rank's share of them reaches what it computed."""
        return _AllGather.apply(part, self, images) if part.requires_grad else self.gathered(part, images)

    def all_well(self, build: Callable[[], T], alike: Callable[[T], Any]) -> T:
        """What `build` returns, where it does so on all ranks.

        Args:
            alike: what must be the same of it on all ranks.

        Raises:
            UserError: it failed on one of them, or is not the same.
        """
        if self.size == 1:
            return build()
        built: T | None = None
        mine: tuple[str, Any]
        try:
            built = build()
            mine = ("", alike(built))
        except (CellError, UserError) as error:
            mine = (str(error), None)
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, self.control)
        for rank, (problem, value) in enumerate(found):
            if problem or value != found[0][1]:
                raise UserError(f"rank {rank}: {problem or f'it has {value} where rank 0 has {found[0][1]}'}")
        assert built is not None
        return built

    def of_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, plain data that all ranks get.

        Raises:
            CellError: on all of them, where rank 0 could not make it.
        """
        told: list[Any] = [None, ""]
        if self.rank == 0:
            try:
                told[0] = make()
            except (CellError, UserError) as error:
                told[1] = str(error)
        dist.broadcast_object_list(told, 0, self.control)
        if told[1]:
            raise CellError(told[1])
        made: T = told[0]
        return made

    def agreed(self, stopping: Callable[[], bool], at: Callable[[], list[int]]) -> Callable[[], bool]:
        """Whether the run is being stopped, for all ranks alike: asked of them once in every state.

        Args:
            stopping: whether this rank is told to. at: numbers that tell how far the training is.

        Raises:
            Apart: a rank has ended, or they are not equally far: one lost a cell that the others still train.
        """
        last: list[Any] = [None, False]

        def stop() -> bool:
            now = at()
            if last[0] != now:
                mine = torch.tensor([int(stopping()), *now])
                found = [torch.empty_like(mine) for _ in range(self.size)]
                try:
                    dist.all_gather(found, mine, self.control)
                except RuntimeError:
                    raise Apart(LOST) from None
                if any(one[1:].tolist() != now for one in found):
                    far = [one[1:].tolist() for one in found]
                    raise Apart(f"the ranks have come apart, a cell failed on some of them alone: {far}")
                last[:] = now, any(bool(one[0]) for one in found)
            return bool(last[1])

        return stop

    def average(self, tensors: list[Tensor]) -> None:
        """Bring the means of all ranks into tensors, in place."""
        if not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, mean in zip(tensors, (flat / self.size).split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


ALONE = Ranks()


def is_lost(error: BaseException) -> bool:
    """Whether an exception of a step says that another rank is not there any more."""
    # Gloo's have no class of their own.
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection " in str(error)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks, images: int) -> Tensor:  # type: ignore[override]
        ctx.ranks, ctx.images = ranks, images
        return ranks.gathered(part, images)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        # Every rank has the gradient of the one loss. DistributedDataParallel takes the mean over ranks, where what
        # each of them adds by its own share is to be summed.
        return gradient[ctx.ranks.share(ctx.images)] * ctx.ranks.size, None, None


class Trained(nn.Module):
    """What a stage trains, so that DistributedDataParallel can see to its gradients: calling it calls a function."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return call(*arguments)


def replicated(parts: list[nn.Module]) -> nn.Module:
    """Modules whose parameters begin alike on all ranks and get the mean of all ranks' gradients."""
    # A turn may reach some parameters only. Batch norms are seen to after each step.
    return DistributedDataParallel(Trained(parts), broadcast_buffers=False, find_unused_parameters=True)


def statistics(parts: list[nn.Module]) -> list[Tensor]:
    """Running statistics that every rank has of its own shares."""
    norms = [m for part in parts for m in part.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(n.running_mean, n.running_var) for n in norms if n.training and not isinstance(n, nn.SyncBatchNorm)]
    return [tensor for pair in kept for tensor in pair if tensor is not None]
