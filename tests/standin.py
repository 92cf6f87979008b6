"""A stand-in for CUDA graphs that works on a processor, and fails where a graph would go wrong without a word.

A graph replays what it recorded, on the memory that it recorded: it never looks at Python again. The stand-in runs the
recorded call once more in place of a replay, and demands that this is the very same computation: the same operations on
the same shapes with the same numbers, and no tensor from outside that was not there when it was recorded. What was
replaced since, or told anew as a number, is found so; and what a graph may not hold at all (a value that is read, a
tensor made of the host's numbers) when it is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# Operations that give the host a value of the device, and those that bring numbers of the host to it.
READS = {
    *("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select"),
    # How many there are decides about a shape.
    *("aten::unique_dim", "aten::unique_consecutive", "aten::_unique2", "aten::bincount", "aten::histc"),
    # They ask on the host whether they succeeded, or whether they may begin.
    *("aten::multinomial", "aten::linalg_lstsq"),
    *("aten::_linalg_eigh", "aten::_linalg_svd", "aten::linalg_eig", "aten::_linalg_check_errors"),
}
MAKES = {"aten::lift_fresh", "aten::lift_fresh_copy"}
BY_MASK = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
# Functions of Python that need a tensor on the processor.
TAKES = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}


def counts(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operation has the host count on a GPU, where it asks nothing on a processor."""
    if name in BY_MASK:
        return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])
    return name == "aten::repeat_interleave" and isinstance(args[-1], Tensor) and kwargs.get("output_size") is None


class Placed(TorchFunctionMode):
    """Notes the functions that make a tensor on the processor, because they do not say where, or take one there."""

    def __init__(self) -> None:
        super().__init__()
        self.on_processor: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        nowhere = func in _device_constructors() and kwargs.get("device") is None
        away = func is Tensor.to and "cpu" in [
            value for value in (*args[1:], *kwargs.values()) if isinstance(value, str)
        ]
        if func in TAKES or away or (nowhere and not any(isinstance(value, Tensor) for value in args[:1])):
            self.on_processor.append(func.__name__)
        return func(*args, **kwargs)


class Broken(BaseException):
    """A graph would go wrong here. No `Exception`: a recording that fails ends no run, and this must be seen."""


def demand(holds: bool, why: str) -> None:
    if not holds:
        raise Broken(why)


class Watched(TorchDispatchMode):
    """Notes the operations of a call, with their numbers and shapes, and the memory from outside that they touch."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, tuple[Any, ...]]] = []
        self.counted: list[str] = []
        self.inside: dict[int, Any] = {}
        self.outside: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, _ = tree_flatten((args, kwargs))
        for value in flat:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.inside and storage._cdata not in self.outside:
                    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                    self.outside[storage._cdata] = (whole, whole.clone())
        told = tuple((tuple(a.shape), a.dtype) if isinstance(a, Tensor) else str(a) for a in flat)
        self.operations.append((func._schema.name, told))
        if counts(func._schema.name, args, kwargs):
            self.counted.append(func._schema.name)
        found = func(*args, **kwargs)
        for value in tree_flatten(found)[0]:
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self.outside:
                # Held, so that no later tensor can come to lie in the same place.
                self.inside[value.untyped_storage()._cdata] = value.untyped_storage()
        return found

    def put_back(self) -> None:
        """Have all memory from outside as it was before."""
        for whole, before in self.outside.values():
            whole.copy_(before)


class StandIn:
    """What does as `kdbench.engine.computing.recorder.CudaRecorder`, without a GPU.

    Attributes:
        recorded: how many calls were recorded. replayed: how many replays there were.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = self.last = 0
        self.made: dict[int, Any] = {}

    def run(self, call: Callable[[], None]) -> None:
        call()

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        state = torch.get_rng_state()
        watched, placed = Watched(), Placed()
        try:
            with watched, placed:
                call()
        finally:
            # A recording computes nothing, whether it fails or not.
            watched.put_back()
            torch.set_rng_state(state)
        names = {name for name, _ in watched.operations}
        demand(not names & READS, f"a recorded call reads values: {names & READS}")
        demand(not names & MAKES, f"a recorded call makes tensors of the host's numbers: {names & MAKES}")
        demand(not watched.counted, f"a recorded call has the host count: {watched.counted}")
        demand(not placed.on_processor, f"a recorded call has tensors on the host's side: {placed.on_processor}")
        self.recorded += 1
        number = self.recorded

        def replay() -> None:
            if number <= self.last:
                # A new step: what the calls of the last one made for each other is gone.
                self.made = {}
            self.last = number
            with Watched() as again:
                call()
            known = watched.outside.keys() | self.made.keys()
            new = [whole for key, (whole, _) in again.outside.items() if key not in known]
            demand(not new, f"stale: {len(new)} tensors were replaced since the call was recorded")
            self.made |= again.inside
            demand(len(again.operations) == len(watched.operations), "stale: the call is another computation")
            for a, b in zip(watched.operations, again.operations, strict=True):
                demand(a == b, f"stale: {b} was recorded as {a}")
            self.replayed += 1

        return replay

    def side_by_side(self, calls: Sequence[Callable[[], None]]) -> None:
        for call in calls:
            call()

    def so_far(self) -> Callable[[], None]:
        return lambda: None

    def drawn(self) -> int:
        return hash(torch.get_rng_state().numpy().tobytes())
