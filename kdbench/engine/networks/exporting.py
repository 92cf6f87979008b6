"""A finished cell's student in the forms of other tools: ONNX, TorchScript, timm's folders, Hugging Face's hub."""

import importlib.util
import json
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Template
from torch import Tensor, nn

from kdbench.engine.networks.trained import load_student
from kdbench.errors import UserError, counted, first_line
from kdbench.files import RECORD, STUDENT, atomic, disk_full, sha256_of, write_json, write_text
from kdbench.models.several import Part
from kdbench.record import Record, WhichWeights, read_record, student_file

# How far an exported network's logits may be from the network's own.
TOLERANCE = 1e-4
# The file that holds what the network is, in a folder for the hub; timm has the same.
CONFIG, CARD, CLASSES = "config.json", "README.md", "classes.json"
MODEL_CARD = Path(__file__).with_name("model_card.md.jinja")


@dataclass(frozen=True)
class Student:
    """A trained student with what it needs.

    Attributes:
        shape: of one image: channels, height, width.
        file: its weights.
    """

    record: Record
    model: nn.Module
    shape: tuple[int, int, int]
    normalization: dict[str, list[float]]
    file: Path

    @property
    def network(self) -> nn.Module:
        """Float32 pixel values on the scale of [0, 1], [N, channels, size, size] -> logits [N, classes]."""
        return Part(self.model, self.normalization["mean"], self.normalization["std"]).eval()

    @property
    def class_names(self) -> list[str] | None:
        """Of each logit the name of its class, where the record has them."""
        return self.record.data.class_names

    @property
    def short_side(self) -> int | None:
        """Pixels to which the shorter side of a test picture was brought before its centre was cropped."""
        return (self.record.target or self.record.data).short_side

    @property
    def crop(self) -> float:
        """How much of that side the centre is; 1 for images that were taken whole."""
        return self.record.spec["data"]["image_size"] / self.short_side if self.short_side else 1.0

    def images(self, n: int) -> Tensor:
        """Random pixel values on the scale of [0, 1], always the same."""
        return torch.rand(n, *self.shape, generator=torch.Generator().manual_seed(n))


def exported_student(folder: Path, registries: Iterable[str | Path] = (), weights: WhichWeights = "last") -> Student:
    """The student of a finished cell.

    Raises:
        UserError: there is no finished cell, or its weights are gone.
    """
    model = load_student(folder, registries, weights)
    record = read_record(folder)
    data, protocol = record.spec["data"], record.spec["protocol"]
    side = record.spec["student"].get("image_size") or data["image_size"]
    shape = (data["channels"], side, side)
    return Student(record, model, shape, protocol["normalization"], student_file(record, weights))


def to_onnx(student: Student, file: Path) -> float:
    """Write a network as ONNX (input "images", output "logits", any number of images), and run it by onnxruntime.

    Returns:
        the largest difference of its logits from the network's own, on random images.

    Raises:
        UserError: it cannot be exported, or its logits are more than `TOLERANCE` off.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed", where="--onnx", hint="pip install 'kdbench[export]'")
    import onnxruntime

    with atomic(file) as written:
        try:
            with warnings.catch_warnings():
                # The exporter warns of torch's own future.
                warnings.simplefilter("ignore", FutureWarning)
                torch.onnx.export(
                    student.network,
                    (student.images(2),),
                    str(written),
                    input_names=["images"],
                    output_names=["logits"],
                    dynamic_shapes={"images": {0: torch.export.Dim("images", min=1)}},
                    external_data=False,
                    dynamo=True,
                    verbose=False,
                )
        except Exception as error:  # noqa: BLE001 - the exporter fails in as many ways as there are networks
            raise _refused(student, "ONNX", error) from None
        session = onnxruntime.InferenceSession(str(written), providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

        return _checked(student, file, run)


def to_torchscript(student: Student, file: Path) -> float:
    """Write a network as TorchScript, which needs no Python to run, and load it again.

    Returns:
        as `to_onnx`.

    Raises:
        UserError: as `to_onnx`.
    """
    try:
        traced = torch.jit.trace(student.network, student.images(2))  # type: ignore[no-untyped-call]
        content = traced.save_to_buffer()
    except Exception as error:  # noqa: BLE001 - as above
        raise _refused(student, "TorchScript", error) from None
    with atomic(file) as written:
        # torch's own writer ends the program on a full disk.
        written.write_bytes(content)
        return _checked(student, file, torch.jit.load(str(written)))  # type: ignore[no-untyped-call]


def to_timm(student: Student, folder: Path) -> None:
    """Write a network of timm as timm keeps its own: `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it.

    Raises:
        UserError: it is no network of timm.
    """
    architecture = (getattr(student.model, "pretrained_cfg", None) or {}).get("architecture")
    if architecture is None:
        hint = "this is for students 'timm:NAME'; --onnx, --torchscript and --hub take any"
        raise UserError(f"timm has no network '{student.record.cell.student}'", "--timm", hint)
    from timm.models import save_for_hf

    mean, std = student.normalization["mean"], student.normalization["std"]
    about = {"input_size": list(student.shape), "mean": mean, "std": std}
    about |= {"crop_pct": student.crop, "interpolation": "bilinear"}
    # What timm says of its own weights is not so of these.
    others = dict.fromkeys(("license", "origin_url", "paper_ids", "description"))
    own = {"pretrained_cfg": {"tag": "kdbench"} | others, "label_names": student.class_names}
    save_for_hf(student.model, str(folder), model_config=own, data_config=about, safe_serialization=True)


def to_hub(student: Student, name: str, folder: Path) -> str:
    """Write a folder for Hugging Face's hub and upload it: weights, what the network is, the record, a model card.

    `kdbench.load_student` takes the folder as it is; a network of timm is there in timm's form too.

    Args:
        name: of the repository, "user/name"; it is made where it does not exist.

    Returns:
        its address.

    Raises:
        UserError: the hub refused it, or is not there.
    """
    from huggingface_hub import HfApi

    timm_too = getattr(student.model, "pretrained_cfg", None) is not None
    if timm_too:
        to_timm(student, folder)
    else:
        about = {"kdbench": student.record.spec["student"], "shape": student.shape}
        write_json(folder / CONFIG, about | {"label_names": student.class_names})
    shutil.copyfile(student.file, folder / student.file.name)
    write_json(folder / RECORD, student.record.plain())
    write_text(folder / CARD, model_card(student, name, timm_too))
    try:
        hub = HfApi()
        address = str(hub.create_repo(name, exist_ok=True))
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="A student trained with kdbench")
    except Exception as error:  # noqa: BLE001 - the hub's client raises what its HTTP library of the day raises
        hint = "log in first (hf auth login), and check the connection"
        raise UserError(f"it was not uploaded to '{name}': {first_line(error)}", "--hub", hint) from None
    return address


def model_card(student: Student, name: str, timm_too: bool) -> str:
    """README.md of a repository on the hub: the table's row, how to load it, recipe and hashes."""
    mean, std = (", ".join(f"{value:.4g}" for value in student.normalization[key]) for key in ("mean", "std"))
    centre, side = student.record.spec["data"]["image_size"], student.shape[-1]
    return Template(MODEL_CARD.read_text(encoding="utf-8"), trim_blocks=True, keep_trailing_newline=True).render(
        name=name,
        timm=timm_too,
        record=student.record,
        shape=" × ".join(map(str, student.shape)),
        short_side=student.short_side,
        centre=centre,
        resized=side != centre,
        mean=mean,
        std=std,
        which="" if student.file.name == STUDENT else ', weights="best"',
        spec=yaml.safe_dump(json.loads(json.dumps(student.record.spec)), sort_keys=False).strip(),
        weights=sha256_of(student.file),
    )


def _checked(student: Student, file: Path, run: Any) -> float:
    """The largest difference of an exported network's logits, in batches of other sizes than it was exported with."""
    worst = 0.0
    with torch.no_grad():
        for n in (1, 5):
            images = student.images(n)
            try:
                worst = max(worst, float((run(images) - student.network(images)).abs().max()))
            except Exception as error:  # noqa: BLE001 - as many runtimes as forms
                what = f"the exported network fails on {counted(n, 'image')} where 2 were shown: {first_line(error)}"
                raise UserError(what, str(file)) from None
    if not worst <= TOLERANCE:
        hint = f"at most {TOLERANCE} is allowed"
        raise UserError(f"the exported network's logits are {worst:.2g} off", str(file), hint)
    return worst


def _refused(student: Student, form: str, error: BaseException) -> UserError:
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    if any(isinstance(one, KeyboardInterrupt) for one in chain):
        # The exporter takes an interrupt for a fault of the network.
        raise KeyboardInterrupt
    while error.__cause__ is not None:
        error = error.__cause__
    what = f"'{student.record.cell.student}' cannot be written as {form}: {first_line(error)}"
    return disk_full(error) or UserError(what)
