"""Recording calls and replaying them: on a GPU, CUDA graphs."""

import contextlib
import gc
import logging
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch

logger = logging.getLogger("kdbench")

Call = Callable[[], None]
# Bytes that torch keeps for eager steps, from which on they are given back before a recording.
MUCH = 1_000_000_000


class CudaRecorder:
    """CUDA graphs on a stream of their own; calls side by side have a stream each.

    Follows PyTorch's notes on CUDA graphs (docs.pytorch.org, notes/cuda) and NVIDIA's guide to them in PyTorch
    (docs.nvidia.com/dl-cuda-graph).
    """

    # Recordings that failed. torch's allocator asks them to the end of the process which memory is theirs.
    failed: ClassVar[list[torch.cuda.CUDAGraph]] = []

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.side: list[torch.cuda.Stream] = []
        # Graphs of one program never run at the same time, and none reads what another left but where `Recording` holds
        # it: so they may share memory, in whatever order they are replayed.
        self.pool = torch.cuda.graph_pool_handle()
        # A pool that no graph holds is gone.
        self.holds_pool: torch.cuda.CUDAGraph | None = None

    def run(self, call: Call) -> None:
        """Run a call where recorded ones run."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            call()
        here.wait_stream(self.stream)

    def record(self, call: Call) -> Call:
        """Record a call, which computes nothing now. Returns what replays it."""
        # What nobody holds any more must not be destroyed while a recording goes on.
        collects = gc.isenabled()
        gc.disable()
        try:
            torch.cuda.synchronize(self.device)
            graph = self._recorded(call)
        except BaseException:
            self._recover()
            raise
        finally:
            if collects:
                gc.enable()
        replay: Call = graph.replay
        return replay

    def _recorded(self, call: Call) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self.failed.append(graph)
        if torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device) > MUCH:
            # A recording cannot use what eager steps left behind.
            torch.cuda.empty_cache()
        with torch.cuda.stream(self.stream):
            # Other threads, such as those that decode pictures, may use the GPU meanwhile.
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                call()
            finally:
                graph.capture_end()
        self.failed.remove(graph)
        return graph

    def _recover(self) -> None:
        """Bring torch back from a recording that failed: its pool stays reserved, so there must be another one, and the
        random generator believes that it is still being recorded until a recording succeeds."""
        for graph in self.failed[-1:]:
            self._give_back(graph)
        self.pool = torch.cuda.graph_pool_handle()
        anything = torch.zeros(1, device=self.device)

        def call() -> None:
            anything.zero_()

        try:
            self.holds_pool = self._recorded(call)
        except RuntimeError as error:
            logger.warning("the GPU may be unusable after a recording that failed: %s", error)

    def _give_back(self, graph: torch.cuda.CUDAGraph) -> None:
        """Give back the memory of a recording that failed.

        Where it was ended as it should, the graph can be reset. Else torch's allocator has to be told that nothing is
        being recorded, or it never frees memory again.
        """
        index = torch.cuda.current_device()
        try:
            graph.pool()
        except RuntimeError:
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(index, self.pool)
                torch._C._cuda_releasePool(index, self.pool)
        else:
            graph.reset()
            self.failed.remove(graph)

    def side_by_side(self, calls: Sequence[Call]) -> None:
        """Run calls, inside `run` or `record`. None may need what a later one does; see `so_far` for earlier ones."""
        here = torch.cuda.current_stream(self.device)
        while len(self.side) < len(calls):
            self.side.append(torch.cuda.Stream(self.device))
        begun: list[torch.cuda.Stream] = []
        try:
            for stream, call in zip(self.side, calls, strict=False):
                stream.wait_stream(here)
                begun.append(stream)
                with torch.cuda.stream(stream):
                    call()
        finally:
            for stream in begun:
                here.wait_stream(stream)

    def so_far(self) -> Call:
        """Inside a call that runs side by side with others: what has another one wait for all that this one did."""
        done = torch.cuda.current_stream(self.device).record_event()
        return lambda: torch.cuda.current_stream(self.device).wait_event(done)

    def drawn(self) -> int:
        """A number that changes whenever something was drawn at random."""
        index = self.device.index if self.device.index is not None else torch.cuda.current_device()
        return int(torch.cuda.default_generators[index].get_offset())
