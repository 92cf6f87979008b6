"""What a worker does for each kind of task."""

import gc
from collections.abc import Callable
from typing import Any

import torch

from kdbench.data.images import save_images
from kdbench.data.pictures import Pictures, save_listing
from kdbench.data.sent import SUFFIX
from kdbench.engine.checks.cells import Known, check_cell
from kdbench.engine.computing.choosing import NO_COMPILER, choose, compiler_works, possible
from kdbench.engine.computing.compute import REFERENCE, Computing
from kdbench.engine.computing.device import use
from kdbench.engine.computing.memory import memory_of
from kdbench.engine.data.batches import Batches
from kdbench.engine.inputs import SourceContext, SourceFiles
from kdbench.engine.networks.build import weight_notes
from kdbench.engine.networks.weights import locate
from kdbench.engine.ranks import ALONE, Apart, Ranks
from kdbench.engine.scheduling import kind
from kdbench.engine.targets import import_target
from kdbench.engine.teachers import logit_table
from kdbench.engine.teachers.loading import load_teacher, untrained_teacher
from kdbench.engine.teachers.logit_files import table_at
from kdbench.engine.teachers.teacher import Teacher
from kdbench.engine.workers import messages
from kdbench.engine.workers.distributed import join, note_on, refuse, send
from kdbench.engine.workers.materials import Materials, taught_first
from kdbench.engine.workers.training import train_cells
from kdbench.errors import CellError, UserError, raised_by_own_code
from kdbench.record import finished_record


class TaskRunner:
    """Does tasks in one process.

    Args:
        emit: sends an event.
        stopping: whether the run is being stopped; asked before every step.
        ranks: that train cells together, where this process has met them.
    """

    def __init__(
        self, emit: Callable[[messages.Event], None], stopping: Callable[[], bool], ranks: Ranks = ALONE
    ) -> None:
        self.emit, self.stopping, self.ranks = emit, stopping, ranks
        self.materials = Materials()

    def run(self, task: messages.Task) -> None:
        """Do a task. UserError and CellError say what went wrong with the whole of it."""
        torch.set_num_threads(task.threads)
        self.materials.settings, self.materials.device = task.settings, use(torch.device(task.device))
        if task.settings.ranks > self.ranks.size:
            self.ranks = join(task.settings, task.device)
            self.emit(messages.Announcement(text=f"note: {note_on(self.ranks)}"))
        if self.device.type == "cuda":
            # Recorded steps of the task before hold each other, and memory.
            gc.collect()
            torch.cuda.empty_cache()
        kinds: dict[type[messages.Task], Callable[[Any], None]] = {
            messages.CheckCells: self.check_cells,
            messages.ReadFingerprint: self.read_fingerprint,
            messages.SaveData: self.save_data,
            messages.Prepare: self.prepare,
            messages.PrepareSources: self.prepare_sources,
            messages.ChooseComputing: self.choose_computing,
            messages.FillLogits: self.fill_logits,
            messages.TrainCells: self.train_cells,
        }
        try:
            # Of what is trained all ranks tell it together.
            if not isinstance(task, messages.TrainCells):
                self.materials.code.check(task)
            kinds[type(task)](task)
        except (UserError, CellError, Apart):
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - raised again, in what words it may be
            found = raised_by_own_code(error)
            if found and isinstance(task, messages.TrainCells):
                # Other cells may go on.
                raise CellError(str(found)) from None
            raise (found or error) from None

    @property
    def device(self) -> torch.device:
        return self.materials.device

    def doing(self, text: str) -> None:
        self.emit(messages.Doing(text=text))

    def check_cells(self, task: messages.CheckCells) -> None:
        """Build every kind of cell once, and tell what memory it will take."""
        known: Known = {}
        for spec in task.specs:
            if self.ranks.size > 1:
                refuse(spec, self.ranks.size, self.ranks.sync_batch_norm)
            memory = memory_of(spec, self.device, check_cell(spec, known))
            self.emit(messages.MemoryNeeded(kind=kind(spec), memory=memory))

    def read_fingerprint(self, task: messages.ReadFingerprint) -> None:
        self.emit(messages.FingerprintRead(fingerprint=self.materials.data(task.data, task.download).fingerprint))

    def save_data(self, task: messages.SaveData) -> None:
        """Keep a data set in one file: all of it, or a list of the pictures that stay on disk."""
        data, cache = self.materials.data(task.data), self.materials.settings.cache
        if isinstance(data, Pictures):
            save_listing(file := cache / f"{data.fingerprint}{SUFFIX}", data, cache)
        else:
            save_images(file := cache / f"{data.fingerprint}.safetensors", data)
        self.emit(messages.DataSaved(given=messages.GivenData(fingerprint=data.fingerprint, file=file)))

    def prepare(self, task: messages.Prepare) -> None:
        """Data in the cache and the teacher measured, so that later tasks find both."""
        spec = task.spec
        self.doing(f"data {spec.data.name}")
        self.materials.domains(spec)
        if spec.student.start is not None:
            locate(spec.student.start, self.materials.settings.download)
        if spec.teacher is not None:
            self.doing(f"teacher {spec.teacher.name}")
            file = self.materials.teacher_file(spec, task.teacher_folder)
            for doubt in file.doubts if file else ():
                self.emit(messages.Announcement(text=f"warning: {doubt}"))
        for note in weight_notes(spec):
            self.emit(messages.Announcement(text=f"note: {note}"))

    def prepare_sources(self, task: messages.PrepareSources) -> None:
        """What a cell's batch sources need before it trains."""
        spec = task.spec
        file = self.materials.teacher_file(spec, task.teacher_folder)
        teacher = self.materials.teacher(spec, file, REFERENCE)
        network = teacher.network if teacher else None
        files = SourceFiles(file.sha256 if file else "", None, task.shared)
        for name, source in spec.method.sources.items():
            context = SourceContext(spec, name, self.device, network, files)
            import_target(source.target).prepare(context, self.doing, self.stopping, **source.options)
        if self.stopping():
            raise CellError("stopped; repeat the command to continue")

    def choose_computing(self, task: messages.ChooseComputing) -> None:
        """Choose how to compute, by measuring on cells of one cohort."""
        first = taught_first(task.specs)
        data, target = self.materials.domains(first)
        batches = Batches(first, data, self.device, target)
        file = self.materials.teacher_file(first, task.teacher_folder)

        def teacher(way: Computing) -> Teacher | None:
            loaded = self.materials.teacher(first, file, way)
            _, table = self.materials.logits(task.specs, file, loaded, None)
            return loaded if loaded is None or table is None else loaded.with_logits(table, batches.positions)

        if not compiler_works(self.device) and self.device.type == "cuda" and first.compute.compile is not False:
            self.emit(messages.Announcement(text=f"note: {NO_COMPILER}"))
        chosen = choose(
            first.compute,
            task.specs,
            batches,
            teacher,
            task.ahead,
            self.device,
            self.doing,
            SourceFiles(file.sha256 if file else "", None, task.shared),
        )
        self.emit(messages.ComputingChosen(chosen=chosen))

    def fill_logits(self, task: messages.FillLogits) -> None:
        """Fill a table of teacher logits, or only tell what that takes."""
        spec, device = task.specs[0], self.device
        assert spec.teacher is not None
        data = self.materials.data(spec.data)
        if isinstance(data, Pictures) or not spec.protocol.augmentation.finite:
            what = "read while training" if isinstance(data, Pictures) else "resized, transformed or mixed at random"
            raise UserError(f"images of '{spec.data.name}' are {what}: they have no finite set of views")
        way = possible(task.computing, device)
        trained = spec.teacher.trained_by is not None and finished_record(task.teacher_folder) is not None
        unknown = task.estimate and not trained
        if unknown:
            # Time and size are the same for any weights; its own may not be trained yet.
            teacher, sha256 = untrained_teacher(spec.teacher, spec.data, device, way), ""
        else:
            file = self.materials.teacher_file(spec, task.teacher_folder)
            assert file is not None
            teacher, sha256 = load_teacher(spec.teacher, spec.data, file.file, device, way), file.sha256
        table = table_at(logit_table.table_key(spec, sha256, data, way.precision), spec.teacher.name)
        images = logit_table.images_of(task.specs, data)
        whole, lacking = table.serves(images), (images & ~table.filled).bit_count()
        each = 0.0 if whole else logit_table.seconds_an_image(table, teacher, data, spec.protocol, device)
        self.emit(
            messages.TableFound(
                # It is called after the weights.
                folder=table.folder.parent if unknown else table.folder,
                images=images.bit_count(),
                views=table.shape[1],
                classes=table.shape[2],
                bytes=images.bit_count() * table.image_bytes,
                done=images.bit_count() - lacking,
                seconds=lacking * each,
            )
        )
        if task.estimate or whole:
            return

        def tell(done: int, seconds: float) -> None:
            self.emit(messages.Filled(done=done, seconds=seconds))

        if not logit_table.fill(table, images, teacher, data, spec.protocol, device, tell, self.stopping):
            raise CellError("stopped; repeat the command to continue")

    def train_cells(self, task: messages.TrainCells) -> None:
        if self.ranks.size > 1 and self.ranks.rank == 0:
            send(self.ranks, task)
        train_cells(task, self.materials, self.emit, self.stopping, self.ranks)

    def close(self) -> None:
        """Let the other ranks go."""
        if self.ranks.size > 1 and self.ranks.rank == 0:
            send(self.ranks, None)
