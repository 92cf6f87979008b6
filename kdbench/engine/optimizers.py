"""Optimizers whose rates lie on the device, and the schedule that sets them."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from kdbench.engine.networks.build import build_schedule
from kdbench.engine.targets import code_of, import_target
from kdbench.errors import UserError, shortened
from kdbench.recipe.coded import TargetSpec
from kdbench.schedules import Moment

# Gradients of the terms that read a teacher, where an optimizer takes these apart.
Distillation = Mapping[Tensor, Tensor]


class SGD(torch.optim.Optimizer):
    """Stochastic gradient descent with (Nesterov) momentum, bit for bit that of `torch.optim.SGD` on CPUs.

    torch's own takes its rate as a number, or reads it from the device, or rounds otherwise where it is fused. Here
    every group's rate is a tensor that a step only uses.

    With a `delta` it is the distillation-oriented trainer (Zhao et al., ICCV 2023, "DOT"): gradients of the terms
    that read a teacher have a momentum of their own, which is larger.

    Args:
        params: what to train.
        lr: the rate at first; `param_groups[i]["lr"]` is a tensor, float32 [], to be filled in place.
        momentum: factor of the gradients' running sum.
        weight_decay: factor of the parameters that are added to their gradients.
        nesterov: whether to step by the gradient as it will be after the momentum's step.
        delta: above 0, momentum is larger by it for gradients of terms that read a teacher, and smaller for others;
            the weights' decay goes with the others. A parameter with gradients of one kind has `momentum`.

    Raises:
        ValueError: a negative number, Nesterov's form without momentum, or momenta outside [0, 1).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        delta: float = 0.0,
    ) -> None:
        for name, value in (("learning rate", lr), ("momentum", momentum), ("weight decay", weight_decay)):
            if value < 0:
                raise ValueError(f"the {name} must be at least 0, not {value}")
        if nesterov and not momentum:
            raise ValueError("Nesterov momentum needs a momentum above 0")
        if delta and not 0 < delta <= momentum < 1 - delta:
            raise ValueError(f"momentum {momentum} ± delta {delta} must lie between 0 and 1")
        options = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "delta": delta}
        super().__init__(params, {"lr": lr} | options)
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=group["params"][0].device)
            for name in (["momentum_buffer"] if momentum else []) + (["distillation_buffer"] if delta else []):
                for parameter in group["params"]:
                    kept = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                    self.state[parameter][name] = kept

    @torch.no_grad()
    def step(self, closure: None = None, distillation: Distillation | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient.

        Args:
            closure: of torch's interface; there is none here.
            distillation: with `delta`, gradients of the terms that read a teacher; all others are in `.grad`.
        """
        for group in self.param_groups:
            if group["delta"]:
                self._step_apart(group, distillation or {})
                continue
            if group["params"][0].is_cuda:
                self._step_together(group)
                continue
            decay, momentum = group["weight_decay"], group["momentum"]
            for parameter in group["params"]:
                change = parameter.grad
                if change is None:
                    continue
                if decay:
                    change = change.add(parameter, alpha=decay)
                if momentum:
                    kept = self.state[parameter]["momentum_buffer"].mul_(momentum).add_(change)
                    change = change.add(kept, alpha=momentum) if group["nesterov"] else kept
                # An addition scaled by the rate rounds once, as torch's does; a product and a sum round twice.
                parameter.addcmul_(change, group["lr"], value=-1)

    def _step_apart(self, group: dict[str, Any], distillation: Distillation) -> None:
        """The same with two gradients of every parameter, each with its own momentum."""
        for parameter in group["params"]:
            both = {"momentum_buffer": parameter.grad, "distillation_buffer": distillation.get(parameter)}
            changes = {name: change for name, change in both.items() if change is not None}
            decay = group["weight_decay"]
            for name, change in changes.items():
                delta = 0.0 if len(changes) == 1 else group["delta"]
                momentum = group["momentum"] + (delta if name == "distillation_buffer" else -delta)
                if decay:
                    change, decay = change.add(parameter, alpha=decay), 0.0
                kept = self.state[parameter][name].mul_(momentum).add_(change)
                changes[name] = change.add(kept, alpha=momentum) if group["nesterov"] else kept
            if changes:
                parameter.addcmul_(sum(changes.values()), group["lr"], value=-1)

    def _step_together(self, group: dict[str, Any]) -> None:
        """The same for all parameters at once: on a GPU one kernel in place of a handful for each."""
        moved = [parameter for parameter in group["params"] if parameter.grad is not None]
        sgd(
            moved,
            [parameter.grad for parameter in moved],
            [self.state[parameter].get("momentum_buffer") for parameter in moved],
            fused=True,
            lr=group["lr"],
            dampening=0.0,
            maximize=False,
            **{name: group[name] for name in ("momentum", "weight_decay", "nesterov")},
        )


class ScheduledOptimizer:
    """An optimizer and the schedule of its rates.

    Args:
        optimizer, schedule: as a stage resolved them.
        trained: its parameters, on their device.

    Attributes:
        on_device: whether its rates are tensors. torch's own optimizers take numbers on CPUs.
        separates: whether it takes gradients of terms that read a teacher apart from others.
        renewed: how often its state became another one; a recorded step holds the one before.
    """

    def __init__(self, optimizer: TargetSpec, schedule: TargetSpec, trained: list[nn.Parameter]) -> None:
        self.optimizer = build_optimizer(optimizer, trained)
        groups = self.optimizer.param_groups
        self.separates = separates(optimizer)
        self.on_device = all(isinstance(group["lr"], Tensor) for group in groups)
        # In full: on the device they are rounded.
        self.base_rates = [float(group.get("initial_lr", group["lr"])) for group in groups]
        self.schedule = build_schedule(schedule)
        self.renewed = 0

    def rates(self, now: Moment) -> list[float]:
        """The rate of every group at a moment."""
        factor = self.schedule.at(*now)
        return [base * factor for base in self.base_rates]

    def resets(self, progress: float, before: float) -> bool:
        """Whether momentum is forgotten at a progress; `before`: progress at the step before."""
        return any(before + 1e-9 < reset <= progress + 1e-9 for reset in self.schedule.resets)

    def reset_state(self) -> None:
        """Forget momentum: what the optimizer keeps becomes what it was at first, of SGD in the same tensors."""
        if not isinstance(self.optimizer, SGD):
            self.optimizer.state.clear()
            self.renewed += 1
            return
        for kept in self.optimizer.state.values():
            for buffer in kept.values():
                buffer.zero_()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from the state dict of such an optimizer.

        Rates lie in the same tensors as before. The cell's own are what belongs to its device, and options that the
        state of an older version lacks.

        Raises:
            ValueError: a state without an entry that a step reads.
        """
        needed = {parameter: {*kept} for parameter, kept in self.optimizer.state.items()}
        before = [{**group} for group in self.optimizer.param_groups]
        groups = [
            own | kept | {name: own[name] for name in own.keys() & {"capturable"}}
            for own, kept in zip(before, state["param_groups"], strict=True)
        ]
        self.optimizer.load_state_dict(state | {"param_groups": groups})
        self.renewed += 1
        if any(names - self.optimizer.state[parameter].keys() for parameter, names in needed.items()):
            raise ValueError("its optimizer kept other values")
        for group, own in zip(self.optimizer.param_groups, before, strict=True):
            group["lr"] = own["lr"]

    def set_rates(self, now: Moment) -> None:
        """Let an optimizer that takes numbers have the rates of a moment."""
        if not self.on_device:
            for group, rate in zip(self.optimizer.param_groups, self.rates(now), strict=True):
                group["lr"] = rate

    @property
    def parameters(self) -> list[Tensor]:
        """All that it trains."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def step(
        self, rates: Sequence[Tensor], clip: float | None = None, distillation: Distillation | None = None
    ) -> None:
        """A step at these rates, on the device.

        Args:
            clip: the norm to which the gradients of all its parameters together are clipped.
            distillation: gradients of the terms that read a teacher, for one that takes them apart.
        """
        if clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, clip)
        if self.on_device:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"].copy_(rate)
        if self.separates:
            self.optimizer.step(distillation=distillation)  # type: ignore[call-overload]
        else:
            self.optimizer.step()


def separates(spec: TargetSpec) -> bool:
    """Whether an optimizer takes gradients of terms that read a teacher apart from others (see `SGD`)."""
    return bool(spec.options.get("delta")) and import_target(spec.target) is SGD


def build_optimizer(spec: TargetSpec, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer over parameters; one of torch's takes its rate as a tensor where it can.

    Raises:
        UserError: options that it refuses, a class that fails, or another than torch's optimizers are of.
    """
    kind = import_target(spec.target)
    options: dict[str, Any] = dict(spec.options)
    if parameters[0].is_cuda and "capturable" in inspect.signature(kind).parameters:
        rate = options.get("lr", inspect.signature(kind).parameters["lr"].default)
        groups: list[Any] = [{"params": parameters, "initial_lr": rate}]
        options |= {"capturable": True, "lr": torch.tensor(rate, dtype=torch.float32, device=parameters[0].device)}
    else:
        groups = parameters
    with code_of(f"optimizer '{spec.name}'", spec.target):
        optimizer = kind(groups, **options)
    if not isinstance(optimizer, torch.optim.Optimizer):
        what = f"optimizer '{spec.name}' is no torch.optim.Optimizer: {shortened(optimizer)}"
        raise UserError(what, hint="derive its class from torch.optim.Optimizer")
    return optimizer
