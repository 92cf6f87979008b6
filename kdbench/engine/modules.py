"""The networks and modules of one cell: what of them trains in a stage, by which optimizers, and in which modes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kdbench.engine.computing.compute import Computing
from kdbench.engine.data.batches import Batches
from kdbench.engine.networks.build import build_extractor, build_student
from kdbench.engine.networks.freezing import let_train, note_frozen, owned
from kdbench.engine.networks.network import Network, Normalizer, memory_format
from kdbench.engine.networks.predicting import answers
from kdbench.engine.optimizers import ScheduledOptimizer
from kdbench.engine.surroundings import Surroundings
from kdbench.engine.teachers.teacher import OwnTeacher, StageTeacher, Teacher, own_teacher_of
from kdbench.engine.terms import Term, build_terms
from kdbench.errors import UserError
from kdbench.recipe.coded import TargetSpec
from kdbench.recipe.specs import CellSpec


class CellModules:
    """A cell's student, its loss terms, the modules of its method, and the teacher that is its own.

    Attributes:
        teacher: the one that it shares with other cells. own_teacher: None where that one serves in all stages.
        of_method: the method's modules by name.
        terms: those of every stage, with their connectors, and the method's modules: what a checkpoint has of them.
    """

    def __init__(
        self, spec: CellSpec, batches: Batches, teacher: Teacher | None, device: torch.device, computing: Computing
    ) -> None:
        self.spec, self.teacher = spec, teacher
        taken = spec.student.takes(spec.data)
        normalizer = Normalizer(spec.protocol.normalization, taken.image_shape[1:], device)
        own = build_student(spec, teacher.network.model if teacher else None).to(device)
        self.student = Network(build_extractor(own, spec.student, taken), normalizer, computing)
        batches.ranks.synchronize(self.student.extractor, taken.image_shape)
        shapes = self.student.extractor.shapes(taken.image_shape)
        self.own_teacher = own_teacher_of(spec, teacher, computing, device, batches.ranks)
        cell = Surroundings(
            spec,
            self.student.extractor,
            teacher.network.extractor if teacher else None,
            {"student": shapes, "teacher": teacher.shapes if teacher else {}},
            self.own_teacher.network.extractor if self.own_teacher else None,
            lambda: batches.train.labels,
        )
        self._by_stage, self.of_method = build_terms(cell), cell.modules
        # Prefixed, because a name like "training" is already an attribute of every module.
        terms = {
            f"stage:{stage}": nn.ModuleDict({f"loss:{name}": term for name, term in by_name.items()})
            for stage, by_name in self._by_stage.items()
        }
        if self.of_method:
            modules = {f"module:{name}": one for name, one in self.of_method.items()}
            terms["method:modules"] = nn.ModuleDict(modules)
        self.terms = nn.ModuleDict(terms).to(device)
        # torch's stubs lack the overload with a memory format alone.
        self.terms.to(memory_format=memory_format(computing))  # type: ignore[call-overload]
        self.student.answers = answers(cell, self.student)
        note_frozen(*self.all)
        self._own, self._of_teacher = self._owned()

    @property
    def networks(self) -> list[nn.Module]:
        """The student, and the teacher that is the cell's own."""
        return [self.student.model, *([self.own_teacher.model] if self.own_teacher else [])]

    @property
    def all(self) -> list[nn.Module]:
        """All of them but the shared teacher."""
        return [*self.networks, self.terms]

    @property
    def trained_teacher(self) -> Network | None:
        """The cell's own teacher, where the method trains it."""
        return self.own_teacher.network if self.own_teacher and self.spec.method.trains("teacher") else None

    @property
    def compiled(self) -> bool:
        """Whether networks or losses run as compiled graphs."""
        terms = (term.graph for by_name in self._by_stage.values() for term in by_name.values())
        return any((self.student.graphs, self.teacher and self.teacher.network.graphs, *terms))

    def terms_of(self, stage: str) -> dict[str, Term]:
        """Loss terms of a stage by name."""
        return self._by_stage[stage]

    def used_in(self, stage: str) -> list[nn.Module]:
        """What a stage may train: the networks, its terms, and the method's modules."""
        return [*self.networks, self.terms[f"stage:{stage}"], *self.of_method.values()]

    def teacher_of(self, stage: str) -> StageTeacher | None:
        """The teacher that a stage has."""
        return self.own_teacher if stage in self.spec.method.own_teacher_stages else self.teacher

    def freeze_others(self, stage: str) -> None:
        """Let gradients go to what a stage trains, and to nothing else."""
        trains = self.spec.method.stages[stage].trains
        # Anew: an operation may have given the student other layers.
        self._own, self._of_teacher = self._owned()
        for owner, parameters in self._own.items():
            let_train(parameters, owner in trains or (owner == f"stage:{stage}" and "connectors" in trains))
        if self.own_teacher is not None:
            self.own_teacher.trains = "teacher" in trains

    def set_modes(self, stage: str, evaluating: bool) -> None:
        """Modes of a stage, or of an evaluation between its steps."""
        spec = self.spec.method.stages[stage]
        # What may hold others first.
        for name, terms in self.terms.items():
            terms.train(name == f"stage:{stage}" and "connectors" in spec.trains and not evaluating)
        for name, module in reversed(self.of_method.items()):
            module.train(name in spec.trains and not evaluating)
        for module in self._of_teacher:
            module.eval()
        self.student.model.train(not evaluating and spec.modes.student == "train")
        if self.own_teacher is not None:
            self.own_teacher.model.train(not evaluating and spec.modes.teacher == "train")

    def optimizers(self, stage: str) -> list[ScheduledOptimizer]:
        """New ones of what a stage trains: of the student and its connectors, of modules with one of their own, of the
        teacher.

        Raises:
            UserError: the stage trains nothing.
        """
        spec, cards = self.spec.method.stages[stage], self.spec.method.modules
        found: list[ScheduledOptimizer] = []

        def add(optimizer: TargetSpec | None, schedule: TargetSpec | None, *owners: str) -> None:
            trained = [p for owner in owners for p in self._own[owner] if p.requires_grad]
            if trained:
                found.append(ScheduledOptimizer(optimizer or spec.optimizer, schedule or spec.schedule, trained))

        apart = [name for name in self.of_method if cards[name].optimizer is not None]
        add(None, None, "student", f"stage:{stage}", *(name for name in self.of_method if name not in apart))
        for name in (name for name in apart if name in spec.trains):
            add(cards[name].optimizer, None, name)
        if self.own_teacher is not None and "teacher" in spec.trains:
            add(spec.teacher_optimizer, spec.teacher_schedule, "teacher")
        if not found:
            hint = "add 'student' to the stage's 'trains'"
            raise UserError(f"method '{self.spec.method.name}', stage '{stage}': nothing to train", hint=hint)
        return found

    def state(self) -> dict[str, Any]:
        """Their weights and buffers, for a checkpoint."""
        own = self._kept_teacher
        return {
            "student": self.student.model.state_dict(),
            "terms": self.terms.state_dict(),
            "own_teacher": own.model.state_dict() if own else None,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, among other things."""
        self.student.model.load_state_dict(state["student"])
        self.terms.load_state_dict(state["terms"])
        if (own := self._kept_teacher) is not None:
            own.model.load_state_dict(state["own_teacher"])

    @property
    def _kept_teacher(self) -> OwnTeacher | None:
        """The cell's own teacher, but for one that becomes checkpoints of a route: these are read from disk again."""
        return None if any(stage.anchor for stage in self.spec.method.stages.values()) else self.own_teacher

    def _owned(self) -> tuple[dict[str, list[nn.Parameter]], list[nn.Module]]:
        """Parameters by their owner: what a stage's `trains` names, or the stage whose terms they are of. Whoever was
        told of a module and holds it does not own it. And modules of the shared teacher that are held so."""
        shared = [*self.teacher.network.model.modules()] if self.teacher else []
        known = [parameter for module in shared for parameter in module.parameters(recurse=False)]
        networks = {"student": self.student.model} | ({"teacher": self.own_teacher.model} if self.own_teacher else {})
        stages = {name: terms for name, terms in self.terms.items() if name.startswith("stage:")}
        held = {*self.terms.modules()}
        return owned(networks | self.of_method | stages, known), [module for module in shared if module in held]
