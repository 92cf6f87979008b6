"""The data and the teachers that a worker's tasks need."""

import platform
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from kdbench.data.images import load_images
from kdbench.data.pictures import AnyData, Pictures, load_listing
from kdbench.data.sent import SUFFIX
from kdbench.engine.computing.compute import Computing
from kdbench.engine.data.datasets import load_data
from kdbench.engine.teachers import logit_table
from kdbench.engine.teachers.files import TeacherFile, all_weights, given_weights, on_target, trained, with_accuracy
from kdbench.engine.teachers.loading import load_teacher, untrained_teacher
from kdbench.engine.teachers.logit_files import table_at
from kdbench.engine.teachers.teacher import Teacher
from kdbench.engine.workers.messages import Settings
from kdbench.engine.workers.unchanged import CodeAsPlanned
from kdbench.errors import CellError, UserError
from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.specs import CellSpec, TeacherSpec


class Materials:
    """Reads data and teachers, and keeps the data for the next task.

    Attributes:
        settings, device: those of the present order. code: what this process has imported.
    """

    def __init__(self) -> None:
        self.settings, self.device = Settings(), torch.device("cpu")
        self._data: dict[str, AnyData] = {}
        self.code = CodeAsPlanned()

    def data(self, spec: DataSpec, download: bool = True) -> AnyData:
        """A data set. UserError where it cannot be read, or is another one than the run has."""
        roots = spec.roots(self.settings.data_roots)
        key = f"{spec.name} {spec.options} {roots}"
        if key not in self._data:
            found = self._given(spec) or load_data(
                spec, roots, download and self.settings.download, self.settings.cache
            )
            known = self.settings.given.get(spec.images_key())
            if known is not None and known.fingerprint != found.fingerprint:
                raise UserError(
                    f"the data set '{spec.name}' on {platform.node()} is another one than the run has: "
                    f"its fingerprint is {found.fingerprint[:12]}, not {known.fingerprint[:12]}",
                    where=found.origin,
                    hint="copy the same files to all nodes",
                )
            # Two at most: a cell's domains.
            self._data = dict([*self._data.items()][-1:]) | {key: found}
        return self._data[key]

    def _given(self, spec: DataSpec) -> AnyData | None:
        """A data set that was sent here."""
        known = self.settings.given.get(spec.images_key())
        if known is None:
            return None
        return load_listing(known.file) if known.file.name.endswith(SUFFIX) else load_images(known.file, spec.name)

    def domains(self, spec: CellSpec) -> tuple[AnyData, AnyData | None]:
        """A cell's data set, and its target domain. UserError where their classes are not the same."""
        data = self.data(spec.data)
        if spec.target is None:
            return data, None
        target = self.data(spec.target)
        if target.classes != data.classes:
            raise UserError(
                f"the classes of '{spec.data.name}' and of '{spec.target.name}' have different names: "
                f"{', '.join(data.classes[:3])} … against {', '.join(target.classes[:3])} …",
                hint="both domains have the same classes, in the same order",
            )
        return data, target

    def teacher_file(self, spec: CellSpec, folder: Path | None) -> TeacherFile | None:
        """The weights of a cell's teacher, None for a cell without one, or with one that begins untrained.

        Args:
            folder: of the teacher.

        Raises:
            UserError: its weights are not to be had, or it has another accuracy than is stated. CellError: it was not
                trained.
        """
        if spec.teacher is None or spec.teacher.untrained:
            return None
        assert folder is not None
        teacher = spec.teacher
        if teacher.members:
            file = all_weights(teacher, folder, spec.data, self._weights)
        else:
            file = self._weights(teacher, folder)
        file = with_accuracy(teacher, file, folder, spec.data, self.data(spec.data), self.device)
        if spec.target is not None:
            target = self.data(spec.target)
            file = on_target(teacher, file, folder, spec.data, spec.target, target, self.device)
        return file

    def _weights(self, teacher: TeacherSpec, folder: Path) -> TeacherFile:
        """The weights of one teacher."""
        file = trained(folder) if teacher.weights is None else given_weights(teacher, self.settings.download)
        if file is None:
            raise CellError(f"the teacher '{teacher.name}' is not trained: there is no record in {folder}")
        return file

    def teacher(self, spec: CellSpec, file: TeacherFile | None, computing: Computing) -> Teacher | None:
        """The teacher of a cell's cohort."""
        if spec.teacher is not None and spec.teacher.untrained:
            return untrained_teacher(spec.teacher, spec.data, self.device, computing)
        if spec.teacher is None or file is None:
            return None
        teacher = load_teacher(spec.teacher, spec.data, file.file, self.device, computing)
        teacher.route = file.route
        return teacher

    def logits(
        self, specs: list[CellSpec], file: TeacherFile | None, teacher: Teacher | None, kept: str | None
    ) -> tuple[str, Tensor | None]:
        """The table of a teacher's logits, where there is one for all images of some cells or they began with it.

        Args:
            specs: of cells with one teacher, on one data set.
            kept: name of the table that they began with, "" for none, None for cells that begin now.

        Returns:
            the name of the table, "" for none, and its logits [images, views, classes].

        Raises:
            UserError: the table that they began with is gone, or what it holds is not what the teacher gives.
        """
        spec = taught_first(specs)
        data = self.data(spec.data)
        if kept == "" or teacher is None or spec.teacher is None or file is None or isinstance(data, Pictures):
            return "", None
        if not spec.protocol.augmentation.finite:
            return "", None
        key = logit_table.table_key(spec, file.sha256, data, teacher.network.computing.precision)
        table = table_at(key, spec.teacher.name, self.settings.tables)
        serves = table.serves(logit_table.images_of(specs, data))
        if kept is not None and not (serves and table.folder.name == kept):
            what = f"these cells began with the table of teacher logits '{kept}', which is not there any more"
            hint = "fill it again ('kdbench logits fill RECIPE'), or remove the unfinished cells' folders"
            raise UserError(what, str(table.folder), hint)
        if not serves:
            return "", None
        return table.folder.name, logit_table.open_table(table, teacher, data, spec.protocol, self.device)


def taught_first(specs: Iterable[CellSpec]) -> CellSpec:
    """Of a cohort's cells the first with a teacher, which says what data and teacher of all are; else its first."""
    return min(specs, key=lambda spec: spec.teacher is None)
