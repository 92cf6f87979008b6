"""Optimizers and schedules, tried before anything is trained: both may be the user's own code."""

import io
import math
from collections.abc import Iterator
from functools import partial
from numbers import Real

import torch
from torch import nn

from kdbench.engine.networks.build import build_schedule
from kdbench.engine.optimizers import ScheduledOptimizer, build_optimizer, separates
from kdbench.engine.stage import moment_at, schedule_span_of
from kdbench.engine.targets import import_target
from kdbench.errors import UserError, failure
from kdbench.recipe.coded import TargetSpec
from kdbench.recipe.method_specs import StageSpec
from kdbench.recipe.specs import CellSpec
from kdbench.recipe.timeline import planned_timeline

# Steps of a stage at which its schedules are asked, about evenly from the first to the last.
ASKED = 100


def check_optimizer(
    optimizer: TargetSpec, schedule: TargetSpec, trained: list[nn.Parameter], clip: float | None
) -> None:
    """Build an optimizer of these parameters, and let two others take a step with copies of a few, of every number of
    dimensions: one goes on, and the other from its state, as a resumed cell does.

    Raises:
        UserError: it cannot be built, fails, keeps something that does not come back from a checkpoint, or is to clip
            gradients that it takes apart.
    """
    if clip is not None and separates(optimizer):
        what = f"'clip' does not work with an optimizer that has 'delta', as '{optimizer.name}' here"
        raise UserError(what, hint="leave out 'clip' or 'delta'")
    build_optimizer(optimizer, trained)
    few = {one.ndim: one for one in sorted(trained, key=torch.Tensor.numel, reverse=True)}.values()
    doing = "has no rate 'lr' in its parameter groups"
    try:
        tried, resumed = (
            ScheduledOptimizer(optimizer, schedule, [nn.Parameter(one.detach().clone()) for one in few])
            for _ in range(2)
        )
        doing = "fails in its first step"
        _step(tried)
        doing = "keeps something that no checkpoint gives back"
        stream = io.BytesIO()
        torch.save({"weights": tried.parameters, "state": tried.optimizer.state_dict()}, stream)
        stream.seek(0)
        kept = torch.load(stream, weights_only=True)
        for parameter, value in zip(resumed.parameters, kept["weights"], strict=True):
            parameter.data.copy_(value)
        resumed.load_state(kept["state"])
        for one in (tried, resumed):
            _step(one)
        if not all(map(partial(torch.allclose, equal_nan=True), tried.parameters, resumed.parameters)):
            raise ValueError("where it goes on from its state, its next step is another one")
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's class can fail in any way
        what = f"optimizer '{optimizer.name}' {doing}: {failure(error, import_target(optimizer.target))}"
        hint = "write it as a subclass of torch.optim.Optimizer: step() moves parameters at the rate group['lr'], and "
        hint += "what it keeps lies in self.state or in the groups"
        raise UserError(what, hint=hint) from None


def _step(one: ScheduledOptimizer) -> None:
    """A step by gradients of 1, with draws that are always the same."""
    for parameter in one.parameters:
        parameter.grad = torch.ones_like(parameter)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one.step([torch.tensor(rate) for rate in one.base_rates])


def check_schedules(spec: CellSpec) -> None:
    """Ask the schedules of all stages for their values.

    Raises:
        UserError: one fails, gives no finite number, or a rate below 0.
    """
    line = planned_timeline(spec)
    for index, (name, stage) in enumerate(spec.method.stages.items()):
        span, own = schedule_span_of(line.spans, spec.method.stages, index), line.spans[index]
        steps = sorted({own.start + (own.steps - 1) * number // ASKED for number in range(ASKED + 1)})
        within = f"method '{spec.method.name}', stage '{name}'"
        for what, target in _schedules(stage):
            schedule, said = build_schedule(target), f"{within}: the schedule '{target.name}' of {what}"
            for step in steps:
                now = moment_at(step, span, line)
                where = f"at step {step - span.start} of {span.steps}"
                try:
                    value = schedule.at(*now)
                except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's function can fail in any way
                    raise UserError(f"{said} fails {where}: {failure(error, import_target(target.target))}") from None
                if not isinstance(value, Real) or not math.isfinite(value):
                    raise UserError(f"{said} gives {value!r} {where}", hint="it must give a finite number")
                if what == "the learning rate" and value < 0:
                    raise UserError(f"{said} gives {value:g} {where}", hint="a rate is at least 0")


def _schedules(stage: StageSpec) -> Iterator[tuple[str, TargetSpec]]:
    """What is scheduled in a stage, and by which schedule."""
    yield "the learning rate", stage.schedule
    if stage.teacher_schedule is not None:
        yield "the learning rate", stage.teacher_schedule
    for name, term in stage.losses.items():
        for one in term.weight_schedules:
            yield f"the weight of '{name}'", one
        for option, one in term.schedules.items():
            yield f"'{option}' of '{name}'", one
