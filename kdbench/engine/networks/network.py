"""A network as the training step runs it: with hooks, or as compiled graphs made for what will be asked of it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.data.augment import normalize
from kdbench.engine.computing.compute import Computing
from kdbench.errors import CellError, first_line
from kdbench.image_cards import Normalization
from kdbench.models.graph import Traced, Untraceable, traced
from kdbench.models.hooks import Extractor
from kdbench.models.points import any_gradient

# What will be asked of a network: sets of hook points, and for how many steps each.
Uses = Mapping[frozenset[str], int]


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Context in which convolutions and products are computed in this precision; parameters stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def memory_format(computing: Computing) -> torch.memory_format:
    return torch.channels_last if computing.layout == "channels_last" else torch.contiguous_format


class Normalizer:
    """Bytes, or pixel values on the scale of [0, 1] -> float32 with one network's mean and deviation, in its size.

    Images of another size are resized as torchvision's `Resize` does it: bilinear, with antialiasing where they shrink.

    Args:
        size: height and width that the network takes.
    """

    def __init__(self, normalization: Normalization, size: tuple[int, int], device: torch.device) -> None:
        self.size = size
        self.mean = torch.tensor(normalization.mean, dtype=torch.float32, device=device)
        self.std = torch.tensor(normalization.std, dtype=torch.float32, device=device)

    def __call__(self, images: Tensor) -> Tensor:
        pixels = normalize(images, self.mean, self.std)
        if pixels.shape[-2:] == self.size:
            return pixels
        return F.interpolate(pixels, self.size, mode="bilinear", antialias=True)

    def pixels(self, normalized: Tensor) -> Tensor:
        """The inverse: pixel values on the scale of [0, 1], in the same size."""
        return normalized * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)


class Network:
    """An extractor, the normalization of its images, and the way it is computed.

    Calling it runs the network with hooks, for any batch; `step` runs a full training batch, compiled where `prepare`
    found that worth it. Both give the values of the same hook points, for images that are normalized already;
    `logits` takes them as a batch holds them.

    Args:
        extractor: its model is brought into the layout.
        frozen: whether its weights stay as they are, so that a graph may hold them as constants.

    Attributes:
        graphs: by the points that are asked for, for batches of `batch_size` in the mode `training`.
        answers: the network that is tested in its place, where it is a student that answers through another head.
    """

    def __init__(
        self, extractor: Extractor, normalizer: Normalizer, computing: Computing, frozen: bool = False
    ) -> None:
        self.extractor, self.normalizer = extractor, normalizer
        self.computing, self.frozen = computing, frozen
        self.model = extractor.model
        self.memory_format = memory_format(computing)
        # torch's stubs lack the overload with a memory format alone.
        self.model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.graphs: dict[frozenset[str], tuple[list[str], Callable[..., Any]]] = {}
        self.batch_size, self.training = 0, False
        self.untraceable: str | None = None
        self.answers = self

    def __call__(self, images: Tensor, points: Sequence[str], labels: Tensor | None = None) -> dict[str, Tensor]:
        """Values of hook points for normalized images [N, C, H, W], as `Extractor` gives them."""
        return self.extractor(images.contiguous(memory_format=self.memory_format), points, labels)

    def logits(self, images: Tensor) -> Tensor:
        """Logits of bytes or pixel values on the scale of [0, 1], in float32, in the mode that the network is in."""
        return self(self.normalizer(images), ["logits"])["logits"]

    def step(self, images: Tensor, points: Sequence[str], labels: Tensor | None = None) -> dict[str, Tensor]:
        """The same as calling it, for a batch of training. Where gradients are asked for, no graph gives the rest."""
        # A graph holds the mode in which it was traced: dropout would go on in eval mode.
        fits = len(images) == self.batch_size and self.model.training == self.training and not any_gradient(points)
        graph = self._graph(frozenset(points)) if fits else None
        if graph is None:
            return self(images, points, labels)
        names, call = graph
        try:
            values = call(images.contiguous(memory_format=self.memory_format))
        except Exception as error:  # noqa: BLE001 - all but the compiler's own are raised
            what = f"torch.compile failed on '{self.extractor.model_name}'"
            raise CellError(f"{what}: {of_compiler(error)}; run with compute.compile=false") from None
        found = dict(zip(names, values, strict=True))
        return {point: found[point] for point in points}

    def follow(self) -> None:
        """Go on after an optimizer step of the network in whose place this one is tested."""

    def state(self) -> dict[str, Any]:
        """What a resumed cell needs of it beside the student's own state."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`, among other things."""

    def _graph(self, points: frozenset[str]) -> tuple[list[str], Callable[..., Any]] | None:
        """The graph for these points, or one that gives more: users may leave, or be at different steps."""
        if points not in self.graphs:
            larger = [graph for graph in self.graphs.values() if points <= set(graph[0])]
            if not larger:
                return None
            self.graphs[points] = min(larger, key=lambda graph: len(graph[0]))
        return self.graphs[points]

    def prepare(self, uses: Uses, batch: tuple[int, int, int, int], training: bool) -> None:
        """Make the graphs for what will be asked, where compiling pays. They are compiled when they first run.

        Args:
            batch: shape of a full batch of training.
            training: the mode in which the network will be.

        Sets of points that end at the same place share the graph of their union: a network that is used by several
        methods is compiled once for all of them, and no set makes it run further than it must.
        """
        self.graphs, self.batch_size, self.training = {}, batch[0], training
        image_shape = (batch[1], *self.normalizer.size)
        if not self.computing.compile:
            return
        try:
            ends: dict[str, dict[frozenset[str], int]] = {}
            for points, steps in uses.items():
                if points and not any_gradient(points):
                    last = traced(self.extractor, points, training, image_shape).last
                    ends.setdefault(last, {})[points] = steps
            for sets in ends.values():
                if sum(sets.values()) >= self.computing.worth:
                    graph = traced(self.extractor, frozenset().union(*sets), training, image_shape)
                    call = self._compiled(graph)
                    self.graphs |= dict.fromkeys(sets, (graph.points, call))
        except Untraceable as error:
            self.graphs, self.untraceable = {}, str(error)

    def _compiled(self, graph: Traced) -> Callable[..., Any]:
        options: dict[str, Any] = {}
        if self.frozen and next(self.model.parameters()).device.type == "cpu":
            # Weights become constants, packed for the kernels once, with batch norms folded into convolutions.
            options["freezing"] = True
        return compiled(graph.module, options)


def compiled(call: Callable[..., Any], options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """A function or module as a graph for inputs of one size, with the gradient of an eager call."""
    # One loss may see the layers of many students, and each of its options' values is another graph.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 512
    config = torch._functorch.config
    # As an eager backward pass, a compiled one is no matter of the forward pass's autocast: what a loss computes in
    # float32 has its gradient in float32.
    config.backward_pass_autocast = "off"
    # Where an optimizer takes gradients apart, two backward passes go through one graph.
    config.donated_buffer = False
    # What the compiler cannot do is known when the function is called.
    config.force_non_lazy_backward_lowering = True
    return torch.compile(call, dynamic=False, options=options or None)


def of_compiler(error: Exception) -> str:
    """What torch.compile says of its failure; any other error is raised."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        raise error
    return first_line(getattr(error, "inner_exception", error))
