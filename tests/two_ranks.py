"""What each of two processes of `test_ranks` does: train every method a few steps, with the other one and alone.

Prints a line of JSON for each method: how far the two came apart, relative to the largest value of each tensor.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import torch
from tiny import CPU, images, networks_for, shortened, target_for, untrained_teacher
from torch import Tensor

from kdbench.engine.cell import TrainingCell
from kdbench.engine.data.batches import Batches
from kdbench.engine.member import Member
from kdbench.engine.program import Cohort, Program
from kdbench.engine.ranks import ALONE, Ranks
from kdbench.engine.teachers.teacher import Teacher
from kdbench.engine.together import Together
from kdbench.engine.workers.distributed import join, refuse
from kdbench.engine.workers.messages import Settings
from kdbench.errors import UserError
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec
from kdbench.registry import Registry

REGISTRY = Registry()
STEPS = 2
# Not divisible by two, and the last batch of the 40 images is a smaller one.
BATCH = 9
PER_CLASS = 4


def cell(method: str, still: bool = True) -> CellSpec:
    """A cell of a few steps.

    Args:
        still: whether batch norms of both networks keep their statistics, which several ranks would take of shares.
    """
    recipe = {
        "data": {"name": "digits", "validation": 100},
        **networks_for(method),
        **({"student": "wrn_16_2"} if method.startswith("bss") else {}),
        "protocol": "digits",
        "method": method,
    }
    spec = plan(recipe | target_for(method, REGISTRY), REGISTRY).cells[0].spec
    n = len(spec.method.stages)
    spec = shortened(spec, steps=STEPS * n, batch=BATCH)
    made = {"data": spec.data, **({"target": spec.target} if spec.target else {})}
    spec = spec.model_copy(
        update={part: of.model_copy(update={"train": of.classes * PER_CLASS}) for part, of in made.items()}
    )
    stages = {
        name: stage.model_copy(
            update={
                "share": 1 / n if i < n - 1 else None,
                **({"modes": stage.modes.model_copy(update={"student": "eval", "teacher": "eval"})} if still else {}),
            }
        )
        for i, (name, stage) in enumerate(spec.method.stages.items())
    }
    return spec.model_copy(update={"method": spec.method.model_copy(update={"stages": stages}), "evaluations": 0})


def trained(spec: CellSpec, ranks: Ranks) -> dict[str, Tensor]:
    """Losses and gradients of each step, and what was trained after the last."""
    target = images(spec.target, per_class=PER_CLASS, seed=1) if spec.target else None
    batches = Batches(spec, images(spec.data, per_class=PER_CLASS), CPU, target, ranks)
    teacher = untrained_teacher(spec)
    member = Member(spec, batches, teacher, CPU)
    attacks = spec.method.name.startswith("bss")
    if attacks:
        agree(member, teacher)
    alone = TrainingCell(member)
    cohorts = [Cohort(batches, teacher, [alone])]
    program = Together(cohorts, ranks) if ranks.size > 1 else Program(cohorts)
    modules = {"student": member.student.model, "terms": member.modules.terms}
    modules |= {"teacher": member.modules.own_teacher.model} if member.modules.own_teacher else {}
    found: dict[str, Tensor] = {}
    while not member.finished:
        step = member.step
        assert member.ready(lambda text: None, lambda: False)
        program.prepare([alone], 1)
        program.step([alone])
        assert alone.failure is None, alone.failure
        sums = zip(member.meter.names, member.meter.sums.clone(), strict=True)
        found |= {f"{step} loss {name}": value for name, value in sums}
        for part, module in modules.items():
            given = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
            found |= {f"{step} gradient {part}.{name}": value for name, value in given.items()}
    if attacks and not ranks.rank:
        assert all(source.record()["attacked"] > STEPS for source in member.sources.values())
    for part, module in modules.items():
        found |= {f"end {part}.{name}": value.clone() for name, value in module.state_dict().items()}
    return found | {"images": torch.tensor(member.log.images)}


def alike(spec: CellSpec) -> bool:
    """Whether both networks give a batch the very bits that they give its two shares, as some processors do not."""
    target = images(spec.target, per_class=PER_CLASS, seed=1) if spec.target else None
    batches = Batches(spec, images(spec.data, per_class=PER_CLASS), CPU, target)
    teacher = untrained_teacher(spec)
    student = Member(spec, batches, teacher, CPU).student.model.eval()
    batch = batches.train.images[:BATCH]
    shares = batch.split(-(-BATCH // 2))

    def of_teacher(part: Tensor) -> Tensor:
        return torch.zeros(len(part)) if teacher is None else teacher(part, ["logits"])["logits"]

    def of_student(part: Tensor) -> Tensor:
        return student(part.float() / 255)

    return all(torch.equal(one(batch), torch.cat([one(part) for part in shares])) for one in (of_teacher, of_student))


def agree(member: Member, teacher: Teacher | None) -> None:
    """Let both networks know the labels, nearly alike: only then there is something to attack."""
    assert teacher is not None
    model, noise = member.student.model, torch.Generator().manual_seed(0)
    model.load_state_dict(teacher.network.model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-3 * torch.randn(parameter.shape, generator=noise))
    split = member.batches.train
    split.labels.copy_(torch.cat([teacher(part, ["logits"])["logits"] for part, _ in split.slices()]).argmax(dim=1))


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """How far each kind of value is from what is expected, relative to the largest of its kind and step."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    largest: dict[str, float] = {}
    farthest: dict[str, float] = {}
    for name, value in expected.items():
        kind = name.partition(".")[0].replace(" loss ", " loss:").partition(":")[0]
        if value.numel():
            far = (found[name].double() - value.double()).abs().max().item()
            farthest[kind] = max(farthest.get(kind, 0.0), far)
            largest[kind] = max(largest.get(kind, 0.0), value.double().abs().max().item())
    return {kind: far / max(largest[kind], 1e-12) for kind, far in farthest.items()}


def main(methods: list[str]) -> None:
    torch.set_num_threads(1)
    ranks = join(Settings(ranks=2), "cpu")
    for method in methods:
        line: dict[str, Any] = {"method": method}
        spec = cell(method)
        try:
            refuse(spec, ranks.size)
            line["alike"] = alike(spec)
            line["apart"] = apart(trained(spec, ranks), trained(spec, ALONE))
        except UserError as error:
            line["refused"] = str(error)
        except Exception:  # noqa: BLE001 - whatever it is, the test tells it
            line["failed"] = traceback.format_exc()
        print(json.dumps(line), flush=True)
        if "failed" in line:
            return


if __name__ == "__main__":
    main(sys.argv[1:] or REGISTRY.names("methods"))
