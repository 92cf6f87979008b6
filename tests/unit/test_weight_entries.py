"""A weight file that holds two networks: what is kept of one must not do for the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shipped import REGISTRY
from tiny import CPU, images

from kdbench.engine.computing.compute import REFERENCE
from kdbench.engine.folders import teacher_folder
from kdbench.engine.inputs import SourceContext, SourceFiles, build_source
from kdbench.engine.networks.build import build_model
from kdbench.engine.teachers.files import all_weights, given_weights, with_accuracy
from kdbench.engine.teachers.loading import load_teacher
from kdbench.engine.teachers.logit_table import table_key
from kdbench.methods.deep_inversion.source import SynthesizedImages
from kdbench.recipe.planning import plan
from kdbench.recipe.specs import CellSpec

RECIPE: dict[str, Any] = {"data": "digits", "student": "wrn_10_1", "protocol": "digits", "epochs": 1}
ENTRIES = ["state_dict", "ema"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = plan(RECIPE | {"method": "ce"}, REGISTRY).cells[0].spec
    file = tmp_path_factory.mktemp("weights") / "two.pt"
    found = {entry: build_model(spec.student, spec.data, seed=i).state_dict() for i, entry in enumerate(ENTRIES)}
    torch.save(found, file)
    return file


def teacher(file: Path, entry: str | None) -> dict[str, Any]:
    return {"model": "wrn_10_1", "weights": str(file), **({"entry": entry} if entry else {})}


def cell(of: Any, method: str = "kd") -> CellSpec:
    return plan(RECIPE | {"method": method, "teacher": of}, REGISTRY).cells[0].spec


def test_members_of_several_teachers_are_what_their_entries_say(file: Path, tmp_path: Path) -> None:
    spec = cell([teacher(file, entry) for entry in reversed(ENTRIES)])
    assert spec.teacher is not None
    whole = all_weights(spec.teacher, tmp_path / "a" / "b", spec.data, lambda one, folder: given_weights(one, False))
    model: Any = load_teacher(spec.teacher, spec.data, whole.file, CPU).network.model
    held = torch.load(file)
    for part, entry in zip(model.parts, reversed(ENTRIES), strict=True):
        assert all(torch.equal(value, held[entry][name]) for name, value in part.network.state_dict().items())


def test_what_is_measured_and_made_is_of_one_entry(file: Path, tmp_path: Path) -> None:
    data = images(cell(teacher(file, None)).data, per_class=20)
    accuracies, folders, pools, tables = {}, {}, {}, {}
    for entry in (*ENTRIES, None):
        spec = cell(teacher(file, entry), "deep_inversion")
        assert spec.teacher is not None
        weights = given_weights(spec.teacher, False)
        # Also where both are kept in one folder.
        measured = with_accuracy(spec.teacher, weights, tmp_path, spec.data, data, CPU)
        again = with_accuracy(spec.teacher, weights, tmp_path / "anew" / str(entry), spec.data, data, CPU)
        assert measured.accuracy == again.accuracy
        accuracies[entry] = measured.accuracy
        folders[entry] = teacher_folder(spec.teacher, tmp_path)
        network = load_teacher(spec.teacher, spec.data, weights.file, CPU, REFERENCE).network
        stage, source = next(iter(spec.method.sources.items()))
        context = SourceContext(spec, stage, CPU, network, SourceFiles(weights.sha256, None, tmp_path / "shared"))
        made = build_source(source, context)
        assert isinstance(made, SynthesizedImages) and made.pool is not None
        pools[entry] = made.pool.folder
        tables[entry] = str(table_key(spec, weights.sha256, data, "float32"))
    assert accuracies["ema"] != accuracies["state_dict"]
    assert all(len(set(found.values())) == 3 for found in (folders, pools, tables))
