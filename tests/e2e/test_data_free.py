"""Distillation without data by the whole way through the runner: nothing real is read."""

from __future__ import annotations

import shutil
from pathlib import Path

import guarded
import pytest
from safetensors.torch import save_file

import kdbench
from kdbench.engine.networks.build import build_model
from kdbench.errors import CellError
from kdbench.files import sha256_of
from kdbench.recipe.planning import plan
from kdbench.registry import Registry

CARDS = """\
datasets:
  guarded_digits: {{include: digits, target: "guarded:digits"}}
teachers:
  untrained:
    model: wrn_10_1
    data: guarded_digits
    weights: {{file: {file}, sha256: {sha256}}}
"""
RECIPE = """\
data: guarded_digits
teacher: untrained
student: wrn_10_1
protocol: digits
steps: 8
evaluations: 2
compute: reference
method: {batches: 1, images: 32}
compare:
  method:
    - noise_kd
    - deep_dream_kd
    - deep_inversion
    - {name: adaptive_deep_inversion, every: 3}
    - prune_data_free
    - dafl
    - zskt
    - dfad
    - dfq
    - {name: cmi, every: 3}
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cards of digits whose training part must not be read, and of a teacher that knows nothing of them."""
    folder = tmp_path_factory.mktemp("registry")
    shutil.copy(guarded.__file__, folder)
    plain = {"data": "digits", "student": "wrn_10_1", "protocol": "digits", "method": "ce"}
    spec = plan(plain, Registry()).cells[0].spec
    file = folder / "untrained.safetensors"
    save_file(build_model(spec.student, spec.data, seed=1).state_dict(), file)
    (folder / "cards.yaml").write_text(CARDS.format(file=file, sha256=sha256_of(file)))
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "data_free.yaml"
    file.write_text(RECIPE)
    return file


@pytest.mark.slow
def test_nothing_real_is_read_by_a_whole_run(registry: Path, recipe: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    options: dict[str, object] = {"registries": [registry], "jobs": 1, "threads": 1, "device": "cpu"}
    records = kdbench.run(recipe, ["method.iterations=3"], runs=runs, **options)  # type: ignore[arg-type]
    assert [record.cell.method for record in records] == [
        "noise_kd",
        "deep_dream_kd",
        "deep_inversion",
        "adaptive_deep_inversion",
        "prune_data_free",
        "dafl",
        "zskt",
        "dfad",
        "dfq",
        "cmi",
    ]
    for grown in ("adaptive", "cmi"):
        assert list(runs.glob(f"data_free/{grown}*/synthesized/distillation/grid.png"))
    assert len(list(runs.glob("data_free/*/generated/distillation/grid.png"))) == 4
    # The guard guards: whoever trains on the data set meets it.
    with pytest.raises(CellError, match="1 of 2 cells failed: KD, seed 0: .*a guarded value was read"):
        kdbench.run(recipe, ["compare.method=[noise_kd, kd]"], runs=runs, **options)  # type: ignore[arg-type]
