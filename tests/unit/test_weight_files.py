"""Weights load in whatever form codes and tools leave them; of what does not fit, one short message says why."""

from __future__ import annotations

import argparse
import builtins
import hashlib
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from shipped import REGISTRY
from tiny import changed_at
from torch import Tensor, nn

from kdbench.engine.networks.build import build_model, weight_notes
from kdbench.engine.networks.weights import load_file
from kdbench.engine.teachers.loading import load_teacher
from kdbench.errors import UserError
from kdbench.models.external import torchvision_model
from kdbench.models.wrn import wide_resnet
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec

AVERAGE_AT, CHOICE = "state_dict_ema", " ('entry' beside the file's name chooses)"


def network(depth: int = 10, width: int = 1, classes: int = 10, channels: int = 1) -> nn.Module:
    return wide_resnet(depth=depth, width=width, classes=classes, channels=channels, image_size=8)


class Pair(nn.Module):
    """As a Lightning module that distils."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.teacher, self.student = network(width=2), student


class Options(dict):
    """As the options of many codes."""


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


def made() -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    torch.manual_seed(5)
    net = network()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(4, 1, 8, 8)).sum().backward()
    optimizer.step()
    return net, {key: value.clone() for key, value in net.state_dict().items()}, optimizer.state_dict()


NET, STATE, OPTIMIZER = made()
AVERAGE = {key: value * 2 for key, value in STATE.items()}
FORMS: dict[str, Any] = {
    "plain": STATE,
    "DataParallel": under("module.", STATE),
    "DataParallel and torch.compile": under("module._orig_mod.", STATE),
    "torch.compile of a part": {
        key.replace("block1.", "block1._orig_mod.") if key.startswith("block1.") else key: value
        for key, value in STATE.items()
    },
    "wrapped layers": {
        key.replace("block1.", "block1._fsdp_wrapped_module._checkpoint_wrapped_module."): value
        for key, value in under("_forward_module.", STATE).items()
    },
    "DeepSpeed": {"module": under("module.", STATE), "ds_config": {"a": 1}},
    "torch's average": {"model_ema": torch.optim.swa_utils.AveragedModel(NET).state_dict()},
    "operations counted": STATE | {"total_ops": torch.zeros(1), "fc.total_params": torch.zeros(1)},
    "state_dict": {"state_dict": STATE, "epoch": 3},
    "RepDistiller": {"opt": argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("x")), "model": STATE},
    "mdistiller": {"epoch": 240, "model": STATE, "optimizer": OPTIMIZER, "best_acc": 75.6},
    "any key": {"my_own": STATE, "acc": 91.0},
    "deep and with any prefix": {"a": {"b": under("x.y.", STATE)}},
    "Lightning": {
        "state_dict": under("model.", STATE),
        "optimizer_states": [OPTIMIZER],
        "lr_schedulers": [],
        "hyper_parameters": Options(lr=0.1),
    },
    "a loss with parameters": {"state_dict": under("net.", STATE) | {"criterion.centers": torch.zeros(3, 3)}},
    "student beside teacher": {"state_dict": Pair(NET).state_dict()},
    "student and teacher": {"teacher": network(width=2).state_dict(), "student": STATE},
    "average beside": {"state_dict": STATE, "state_dict_ema": under("module.", AVERAGE)},
    "average first": {"ema": {"decay": 0.9, "shadow": AVERAGE}, "model": STATE},
    "numbers of NumPy": {"model": STATE, "best": np.float64(3), "all": np.zeros(3)},
    "half": {key: value.half() for key, value in STATE.items()},
    "a mapping of its own kind": Options(model=Options(STATE)),
    "defaultdict": defaultdict(dict, model=STATE),
    "whole module": NET,
    "whole modules": {"model": Pair(NET), "epoch": 3},
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.replace(" ", "_"))
@pytest.mark.parametrize("zipped", [True, False], ids=["", "legacy"])
def test_weights_load_in_any_form(form: str, zipped: bool, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(FORMS[form], file, _use_new_zipfile_serialization=zipped)
    model = network()
    if form.startswith("whole") and not zipped:
        with pytest.raises(UserError, match="a whole module in torch's form of before 1.6"):
            load_file(model, file, "wrn_10_1")
        return
    notes = load_file(model, file, "wrn_10_1")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, STATE[key], atol=1e-3 if form == "half" else 0, rtol=0)
    said = {
        "average beside": f"{file} holds several networks' weights: 'state_dict' is taken, not '{AVERAGE_AT}'{CHOICE}",
        "average first": f"{file} holds several networks' weights: 'model' is taken, not 'ema.shadow'{CHOICE}",
    }
    assert notes == ([said[form]] if form in said else [])


def test_an_entry_chooses_among_several_networks(tmp_path: Path) -> None:
    file, model = tmp_path / "weights.pth", network()
    for form, entry in (
        ("average beside", "state_dict_ema"),
        ("average first", "ema"),
        ("average first", "ema.shadow"),
        ("average below the same names", "ema"),
    ):
        content = FORMS.get(form, {"state_dict": under("net.", STATE) | under("ema.", AVERAGE)})
        torch.save(content, file)
        if form == "average below the same names":
            entry = "state_dict.ema"
        assert load_file(model, file, "wrn_10_1", entry=entry) == []
        assert all(torch.equal(value, AVERAGE[key]) for key, value in model.state_dict().items())
        with pytest.raises(UserError, match=r"no network in 'shadow'\n  it has: '\w+(\.net)?', '\w+(\.\w+)?'$"):
            load_file(model, file, "wrn_10_1", entry="shadow")


def test_a_recipe_and_a_card_choose_an_entry(tmp_path: Path) -> None:
    """Another cell, and the same one as ever where nothing is chosen."""
    file = tmp_path / "w.pth"
    torch.save({"state_dict": STATE, "state_dict_ema": AVERAGE}, file)
    own = {"data": "digits", "method": "kd", "student": "wrn_10_1", "steps": 4, "protocol": "digits"}
    teacher = {"model": {"name": "wrn_10_1"}, "weights": str(file)}

    def cell(**given: Any) -> CellSpec:
        recipe = tmp_path / "r.yaml"
        recipe.write_text(json.dumps({**own, "teacher": teacher, **given}))
        return plan(str(recipe), REGISTRY).cells[0].spec

    average = {"entry": "state_dict_ema"}
    plain, taught = cell(), cell(teacher={**teacher, **average})
    begun = cell(student={"name": "wrn_10_1", "weights": str(file), **average})
    assert len({plain.identity(), taught.identity(), begun.identity()}) == 3
    assert "entry" not in json.dumps(plain.model_dump(mode="json", exclude_defaults=True))
    assert torch.equal(build_model(begun.student, begun.data).state_dict()["fc.weight"], AVERAGE["fc.weight"])
    for spec, expected in ((plain, STATE), (taught, AVERAGE)):
        loaded = load_teacher(spec.teacher, spec.data, file, torch.device("cpu")).network.model
        assert torch.equal(loaded.state_dict()["fc.weight"], expected["fc.weight"])
    assert "taken" in weight_notes(plain)[0] and not weight_notes(taught)
    for wrong in ({"model": {"name": "wrn_10_1"}, "untrained": True, **average}, {"name": "x", **average}):
        with pytest.raises(UserError, match="'entry' goes with 'weights'"):
            cell(teacher=wrong)


def test_safetensors_and_old_files_without_counters_load(tmp_path: Path) -> None:
    old = {key: value for key, value in STATE.items() if not key.endswith("num_batches_tracked")}
    save_file(under("model.", old), tmp_path / "w.safetensors")
    model = network()
    assert load_file(model, tmp_path / "w.safetensors", "wrn_10_1") == []
    assert all(torch.equal(model.state_dict()[key], value) for key, value in old.items())
    (tmp_path / "w.safetensors").rename(tmp_path / "w.bin")
    assert load_file(network(), tmp_path / "w.bin", "wrn_10_1") == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([STATE], "no state dict; it holds: list"),
        (STATE["fc.weight"], "no state dict; it holds: Tensor"),
        ({0: STATE["fc.weight"]}, "no state dict; it holds: 0"),
        ({}, "no state dict; it holds: nothing"),
        (None, "no state dict"),
        (OPTIMIZER, "no state dict; it holds: 'state', 'param_groups'"),
        (network(width=2).state_dict(), "of 46 entries 1 unknown .* 33 of another shape"),
        (network(depth=16).state_dict(), "36 unknown"),
        (network(channels=3).state_dict(), r"conv1.weight \[16, 3, 3, 3\] against \[16, 1, 3, 3\]"),
        ({key: value for key, value in STATE.items() if "fc" not in key}, r"2 missing \(fc.weight, fc.bias\)"),
        ({key: value.to(torch.int8) for key, value in STATE.items()}, "39 of another kind .*weight of whole numbers"),
        ({key: value.to_sparse() for key, value in STATE.items() if value.ndim}, "39 of another kind .*weight sparse"),
        ({key: value.to("meta") for key, value in STATE.items()}, "46 of another kind .*weight without values"),
        (STATE | {"fc.bias": STATE["fc.bias"] * 1j}, r"1 of another kind \(fc.bias of complex numbers"),
        (STATE | {"k" * 10_000: STATE["fc.bias"]}, r"1 unknown \(k+\)"),
        (STATE | under("module.", AVERAGE), r"46 unknown \(module.conv1.weight"),
        ({key: value.numpy() for key, value in STATE.items()}, "no state dict; it holds: 'conv1.weight'"),
        (network(classes=7).state_dict(), "are for 7 classes, where the data have 10"),
    ],
)
def test_what_does_not_fit_is_one_short_message(content: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(content, file)
    with pytest.raises(UserError, match=said) as error:
        load_file(network(), file, "wrn_10_1")
    assert error.value.where == str(file) and error.value.hint and len(str(error.value)) < 400 + len(str(file))


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@pytest.mark.parametrize("function", [os.system, subprocess.call, builtins.eval], ids=lambda f: f.__name__)
def test_nothing_in_a_file_is_executed(function: Any, tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "weights.pth"
    text = f"open({str(mark)!r}, 'w')" if function is eval else f"touch {mark}"
    torch.save({"model": STATE, "other": Call(function, text)}, file)
    try:
        load_file(network(), file, "wrn_10_1")
    except UserError as error:
        assert "calls" in str(error)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("line", "said"), [("raise SystemExit(3)", r"'sys.exit\(3\)'"), ("return state['absent']", "KeyError: 'absent'")]
)
def test_a_layout_that_fails_is_told_with_its_line(
    line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_layout.py").write_text(f"def ours(state):\n    {line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_layout", raising=False)
    model = nn.Linear(2, 2)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=rf"layout 'own_layout:ours' of .*{said}.*own_layout.py:2"):
        load_file(model, tmp_path / "w.safetensors", "net", layout="own_layout:ours")


def test_files_of_another_kind_are_told(tmp_path: Path) -> None:
    torch.save(STATE, whole := tmp_path / "whole.pth")
    torch.jit.trace(network().eval(), torch.zeros(1, 1, 8, 8)).save(str(tmp_path / "traced.pt"))
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:5000])
    (tmp_path / "last.pth").write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "pickled.pkl").write_bytes(pickle.dumps(OPTIMIZER))
    for name in ("text.pth", "text.safetensors", "empty.pth"):
        (tmp_path / name).write_text("" if "empty" in name else "version https://git-lfs.github.com/spec/v1\n")
    for file in tmp_path.iterdir():
        if file != whole:
            with pytest.raises(UserError, match="cannot be read: it is (damaged|text|a TorchScript)") as error:
                load_file(network(), file, "wrn_10_1")
            assert len(str(error.value)) < 400 + len(str(file)), file
            # What torch tells of it, not what may have happened to it, broken off somewhere.
            assert "If you are" not in str(error.value)


def test_a_wrong_byte_and_a_value_that_is_not_finite_are_told_by_the_file(tmp_path: Path) -> None:
    state, file = network().state_dict(), tmp_path / "w.pth"
    torch.save(state, file)
    assert load_file(network(), file, "wrn_10_1") == []
    file.write_bytes(changed_at(file.read_bytes(), state["fc.weight"].numpy().tobytes()))
    (note,) = load_file(network(), file, "wrn_10_1")
    assert re.fullmatch(rf"{file} is probably damaged: 'w/data/\d+' in it does not have its checksum", note)
    state["fc.weight"][2, 3] = torch.inf
    for write, name in ((torch.save, "w.pth"), (save_file, "w.safetensors")):
        write(state, tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}: these weights of 'wrn_10_1' .* not finite, in 'fc.weight'"):
            load_file(network(), tmp_path / name, "wrn_10_1")


def spec(**over: Any) -> Any:
    recipe = {"data": "digits", "student": "wrn_10_1", "protocol": "digits", "method": "ce", "steps": 2} | over
    return plan(recipe, REGISTRY).cells[0].spec


def test_a_student_starts_from_weights_of_other_classes_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save({"model": (state := network(classes=1000).state_dict())}, file)
    cell = spec(student={"name": "wrn_10_1", "weights": str(file)})
    assert weight_notes(cell) == [f"{file} has 1000 classes: the last layer of 'wrn_10_1', of 10, is new"]
    found = build_model(cell.student, cell.data, seed=4)
    first = build_model(cell.student.untrained(), cell.data, seed=4)
    assert torch.equal(found.state_dict()["conv1.weight"], state["conv1.weight"])
    assert torch.equal(found.state_dict()["fc.weight"], first.state_dict()["fc.weight"])


def test_weights_that_were_written_again_are_other_weights(tmp_path: Path) -> None:
    """As in a notebook that trains its teacher anew between two runs."""
    file, found = tmp_path / "w.pth", []
    for seed in range(2):
        torch.manual_seed(seed)
        torch.save(network().state_dict(), file)
        taught = spec(teacher={"model": "wrn_10_1", "weights": str(file)}, method="kd").teacher
        found.append(taught.weights.sha256 == hashlib.sha256(file.read_bytes()).hexdigest())
    assert found == [True, True]


def test_a_teacher_of_other_classes_teaches_features_only(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save(network(classes=1000).state_dict(), file)
    teacher = {"model": "wrn_10_1", "weights": str(file), "classes": 1000}
    assert weight_notes(spec(teacher=teacher, method="at")) == []
    with pytest.raises(UserError, match="its own 1000 classes"):
        spec(teacher=teacher, method="kd")
    with pytest.raises(UserError, match="1000 classes, where the data have 10") as error:
        weight_notes(spec(teacher={**teacher, "classes": None}, method="at"))
    assert "classes: 1000" in str(error.value)


class Tokens(nn.Module):
    """As a small transformer with a table of positions, which has no axis for the batch."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(positions, 4))
        self.fc = nn.Linear(4, 10)


@pytest.mark.parametrize("new_classes", [True, False])
def test_a_layer_that_is_not_the_last_is_not_taken_for_one_of_other_classes(new_classes: bool, tmp_path: Path) -> None:
    """A student of other images began with new positions, and was told of a new last layer."""
    torch.save(Tokens(16).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"1 of another shape \(positions \[16, 4\] against \[4, 4\]\)") as error:
        load_file(Tokens(4), tmp_path / "w.pth", "tokens", classes=10, new_classes=new_classes)
    assert error.value.hint and "in the rows of 'positions' alone" in error.value.hint


def test_a_last_layer_with_a_row_beside_those_of_the_classes_is_told_what_to_do(tmp_path: Path) -> None:
    torch.save(network(classes=21).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="2 of another shape") as error:
        load_file(network(classes=11), tmp_path / "w.pth", "net", classes=10, new_classes=True)
    hint = error.value.hint or ""
    assert "in the rows of 'fc' alone" in hint and "each of the 10 classes" in hint and "save the file anew" in hint


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_networks_that_ask_for_a_version_of_their_weights_load(ending: str, tmp_path: Path) -> None:
    """torchvision's MNASNet: a student could be trained, and then neither be loaded nor teach."""
    from torchvision.models import mnasnet0_5

    torch.manual_seed(0)
    theirs, file = mnasnet0_5(weights=None, num_classes=10).eval(), tmp_path / f"w.{ending}"
    save_file(theirs.state_dict(), file) if ending == "safetensors" else torch.save(theirs.state_dict(), file)
    ours, pixels = torchvision_model("mnasnet0_5", classes=10).eval(), torch.rand(2, 3, 64, 64)
    assert load_file(ours, file, "torchvision:mnasnet0_5") == []
    assert torch.equal(ours(pixels), theirs(pixels))


def test_torchvisions_own_weights_load_without_their_auxiliary_classifiers(tmp_path: Path) -> None:
    """And their hidden change of the input is the normalization that the note names."""
    from torchvision.models import googlenet

    torch.manual_seed(0)
    theirs = googlenet(weights=None, num_classes=10, aux_logits=True, transform_input=True, init_weights=False).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = torchvision_model("googlenet", classes=10).eval()
    (note,) = load_file(ours, tmp_path / "w.pth", "torchvision:googlenet")
    assert "mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]" in note
    pixels = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(
        ours((pixels - 0.5) / 0.5), theirs((pixels - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)), atol=1e-4, rtol=1e-3
    )
