"""`kdbench export`: a finished cell's student for other tools."""

from pathlib import Path
from typing import Annotated

import typer

from kdbench.cli.options import RegistryOption
from kdbench.errors import UserError
from kdbench.files import write_json
from kdbench.record import WhichWeights

EXAMPLES = """
kdbench export runs/quickstart/ab-seed0-5f3a2b66 --onnx
kdbench export runs/my/kd-seed0-1a2b3c4d --hub my-name/my-student
"""


def command(
    cell: Annotated[Path, typer.Argument(metavar="CELL", help="Folder of a finished cell: runs/<recipe>/<cell>.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="student.onnx, compared in onnxruntime.")] = False,
    torchscript: Annotated[bool, typer.Option("--torchscript", help="student.pt, which runs without Python.")] = False,
    timm: Annotated[bool, typer.Option("--timm", help="A folder that timm loads (students 'timm:NAME').")] = False,
    hub: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload it to Hugging Face's hub, with a model card.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to (default: export/<cell>).")] = None,
    weights: Annotated[WhichWeights, typer.Option(help="After the last step, or of the best evaluation.")] = "last",
    registry: RegistryOption = None,
) -> None:
    """Export the student of a finished CELL for another tool.

    ONNX and TorchScript files include the normalization: they take pixel values in [0, 1]. Their logits are compared
    with the network's. In Python, use kdbench.load_student.
    """
    if not (onnx or torchscript or timm or hub):
        raise UserError(
            "choose a form to export to", where="kdbench export", hint="--onnx, --torchscript, --timm or --hub NAME"
        )
    from kdbench.engine.networks.exporting import CLASSES, exported_student, to_hub, to_onnx, to_timm, to_torchscript

    student = exported_student(cell, registry or (), weights)
    folder = out or Path("export") / cell.resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    if onnx:
        print(
            f"{folder / 'student.onnx'}: logits within {to_onnx(student, folder / 'student.onnx'):.1g} of the network's"
        )
    if torchscript:
        off = to_torchscript(student, folder / "student.pt")
        print(f"{folder / 'student.pt'}: logits within {off:.1g} of the network's")
    if (onnx or torchscript) and student.class_names is not None:
        write_json(folder / CLASSES, student.class_names)
        print(f"{folder / CLASSES}: the class of each logit")
    if timm:
        to_timm(student, folder / "timm")
        print(f"{folder / 'timm'}: timm.create_model('local-dir:{folder / 'timm'}', pretrained=True)")
    if hub:
        (folder / "hub").mkdir(exist_ok=True)
        print(to_hub(student, hub, folder / "hub"))
