"""`kdbench export`: what other tools load of a finished cell's student."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Kdbench, Once
from safetensors.torch import load_file

import kdbench
from kdbench.engine.networks import exporting
from kdbench.engine.networks.exporting import Student, exported_student, model_card, to_onnx, to_timm, to_torchscript
from kdbench.errors import UserError
from kdbench.files import BEST
from kdbench.record import read_record
from kdbench.record_parts import Best

RECIPE = """\
data: {name: digits, per_class: 10}
student: timm:resnet10t
protocol: digits
method: ce
steps: 4
evaluations: 1
"""


@pytest.fixture(scope="session")
def timm_cell(once: Once, command_line: Kdbench) -> Path:
    """The folder of a finished cell whose student is a network of timm."""

    def make(folder: Path) -> None:
        (folder / "own.yaml").write_text(RECIPE)
        command_line("run", "own.yaml", cwd=folder)

    return next((once("timm_cell", make) / "runs" / "own").glob("ce-*"))


@pytest.fixture
def cell(tiny_run: Path) -> Path:
    return next((tiny_run / "runs" / "tiny").glob("ab-seed0-*"))


def by_hand(cell: Path, pixels: torch.Tensor) -> torch.Tensor:
    """A student's logits of pixel values on the scale of [0, 1]."""
    normalization = (read_record(cell).spec or {})["protocol"]["normalization"]
    mean, std = (torch.tensor(normalization[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return kdbench.load_student(cell)((pixels - mean) / std)


@pytest.mark.slow
def test_onnx_and_torchscript_files_give_the_students_logits(cell: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    import onnxruntime

    said = kdbench("export", cell, "--onnx", "--torchscript", "--out", tmp_path, cwd=tmp_path).stdout
    assert "student.onnx" in said and "student.pt" in said
    pixels = torch.rand(7, 1, 8, 8)
    expected = by_hand(cell, pixels)
    session = onnxruntime.InferenceSession(str(tmp_path / "student.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": pixels.numpy()})
    assert (torch.from_numpy(found) - expected).abs().max() < 1e-4
    loaded: Any = torch.jit.load(str(tmp_path / "student.pt"))
    assert (loaded(pixels) - expected).abs().max() < 1e-4
    assert json.loads((tmp_path / "classes.json").read_text()) == [str(digit) for digit in range(10)]


@pytest.mark.slow
def test_timm_alone_loads_what_was_written_for_it(timm_cell: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    import timm

    kdbench("export", timm_cell, "--timm", "--out", tmp_path, cwd=tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    about = model.pretrained_cfg
    said = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    assert (said["tag"], said.get("license"), said.get("origin_url")) == ("kdbench", None, None)
    mean, std = (torch.tensor(about[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    pixels = torch.rand(3, *about["input_size"])
    assert tuple(about["input_size"]) == (1, 8, 8) and model.num_classes == 10
    with torch.no_grad():
        assert torch.equal(model((pixels - mean) / std), by_hand(timm_cell, pixels))


def test_what_cannot_be_written_is_told(cell: Path, kdbench: Kdbench, tmp_path: Path) -> None:
    for words, said in (
        ([cell], "choose a form to export to"),
        ([cell, "--timm"], "timm has no network 'wrn_10_1'"),
        ([tmp_path, "--onnx"], "there is no finished cell"),
        ([cell, "--onnx", "--weights", "best"], "kept no weights of its best evaluation"),
    ):
        wrong = kdbench("export", *words, cwd=tmp_path, code=2)
        assert said in wrong.stderr and "Traceback" not in wrong.stderr


def test_what_was_seen_of_a_picture_goes_with_its_network(cell: Path, tmp_path: Path) -> None:
    """timm and a reader of the card prepare a picture as it was tested: of 10 pixels the 8 in the middle."""
    import timm

    for short_side, crop in ((10, 0.8), (None, 1.0)):
        given = exported_student(cell)
        data = given.record.data.model_copy(update={"short_side": short_side})
        model = timm.create_model("resnet10t", in_chans=1, num_classes=10)
        student = replace(given, model=model, record=given.record.model_copy(update={"data": data}))
        to_timm(student, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["crop_pct"] == crop
        card = model_card(student, "me/student", True)
        assert ("resized to 10 pixels" in card) == (short_side is not None) and "resized to its size" not in card
        assert "resized to its size" in model_card(replace(student, shape=(1, 16, 16)), "me/student", True)


@pytest.mark.parametrize("write", [to_onnx, to_torchscript])
def test_an_export_that_fails_leaves_what_was_there(
    write: Callable[[Student, Path], float], cell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, file = exported_student(cell), tmp_path / "student"
    file.write_text("the one before")
    monkeypatch.setattr(exporting, "TOLERANCE", -1)
    with pytest.raises(UserError, match="the exported network's logits are"):
        write(student, file)
    assert file.read_text() == "the one before" and [*tmp_path.iterdir()] == [file]


class OnlyPython(torch.nn.Module):
    """It decides by values, and a tracer sees constants."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = x if x.sum() > 0 else -x
        return torch.from_numpy(seen.detach().numpy()).flatten(1)[:, :10]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("write", "said"), [(to_onnx, r"cannot be written as ONNX: \S"), (to_torchscript, "fails on 5 images where 2")]
)
def test_networks_that_a_form_cannot_hold_are_told(
    write: Callable[[Student, Path], float], said: str, cell: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said) as error:
        write(replace(exported_student(cell), model=OnlyPython()), tmp_path / "student")
    assert "step 1/3" not in str(error.value) and not [*tmp_path.iterdir()]


def test_an_interrupt_is_not_taken_for_a_fault_of_the_network(
    cell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        """As torch's exporter hands an interrupt on."""
        try:
            try:
                raise KeyboardInterrupt
            finally:
                raise AttributeError("module 'torch._dynamo' has no attribute 'exc'")
        except AttributeError as error:
            raise RuntimeError("Failed to export the model") from error

    monkeypatch.setattr("torch.onnx.export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        to_onnx(exported_student(cell), tmp_path / "student.onnx")


class Hub(BaseHTTPRequestHandler):
    """As much of Hugging Face's hub as an upload needs. What was uploaded is kept in the server's `files`."""

    server: Any

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, what: Any, status: int = 200) -> None:
        body = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer({"id": "me/student", "sha": "0" * 40, "siblings": []})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        address = f"http://{self.headers['Host']}/me/student"
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path.startswith("/api/repos/create"):
            self.answer({"url": address, "id": "me/student"})
        elif "/preupload/" in self.path:
            files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
            self.answer({"files": [one | {"shouldIgnore": False} for one in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": address, "commitOid": "0" * 40, "success": True})
        else:
            self.answer({"valid": True})


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def upload(cell: Path, port: int, folder: Path, token: str) -> subprocess.CompletedProcess[str]:
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_TOKEN": token, "HF_HOME": str(folder)}
    words = [sys.executable, "-m", "kdbench", "export", str(cell), "--hub", "me/student", "--out", str(folder / "out")]
    environment = os.environ | own | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_what_is_uploaded_loads_again_and_says_what_it_is(
    cell: Path, timm_cell: Path, hub: Any, tmp_path: Path
) -> None:
    for one in (cell, timm_cell):
        hub.files.clear()
        done = upload(one, hub.server_port, tmp_path, "hf_right")
        assert done.returncode == 0 and "/me/student" in done.stdout, done.stderr
        folder = tmp_path / f"downloaded {one.name}"
        for name, content in hub.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        again = kdbench.load_student(folder).state_dict()
        assert all(torch.equal(value, again[name]) for name, value in load_file(one / "student.safetensors").items())
        card, record = (folder / "README.md").read_text(), read_record(one)
        rows = [line for line in card.partition("## Use")[0].splitlines() if line.startswith("|")]
        assert len(rows) == (7 if one == timm_cell else 8) and all(row.endswith("|") for row in rows), card
        assert f"{record.result.test.last:.2f} %" in card and record.data.fingerprint in card
        assert ('timm.create_model("hf-hub:me/student"' in card) == (one == timm_cell) == ("without a teacher" in card)
        assert "record.json" in hub.files
        assert json.loads(hub.files["config.json"])["label_names"] == [str(digit) for digit in range(10)]


def test_the_card_of_the_best_weights_has_their_accuracy(cell: Path, tmp_path: Path) -> None:
    last, file = exported_student(cell), tmp_path / BEST
    file.write_bytes(last.file.read_bytes())
    assert last.record.teacher is not None
    changes = {
        "best": Best(step=7, part="validation", accuracy=12.34),
        "teacher": last.record.teacher.model_copy(update={"accuracy": None}),
    }
    chosen = replace(last, record=last.record.model_copy(update=changes), file=file)
    card, other = (model_card(one, "me/student", False) for one in (chosen, last))
    accuracy = f"{last.record.result.test.last:.2f} %"
    assert "12.34 %" in card and "validation accuracy at step 7" in card and accuracy not in card
    assert "12.34 %" not in other and accuracy in other


@pytest.mark.slow
def test_a_hub_that_refuses_is_told(cell: Path, hub: Any, tmp_path: Path) -> None:
    done = upload(cell, hub.server_port, tmp_path, "hf_wrong")
    assert done.returncode == 2 and "hf auth login" in done.stderr and "Traceback" not in done.stderr
    assert not hub.files


@pytest.mark.slow
def test_a_hub_that_is_not_there_is_told(cell: Path, tmp_path: Path) -> None:
    """As on a node of a cluster, which has no network. The client raises errors of its HTTP library."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # Nobody listens there.
        done = upload(cell, closed.getsockname()[1], tmp_path, "hf_right")
    assert done.returncode == 2 and "check the connection" in done.stderr and "Traceback" not in done.stderr
