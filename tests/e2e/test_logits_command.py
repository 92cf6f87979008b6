"""Teacher logits by command: told, filled, listed, used, cleared. And how a run remembers its way to compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Kdbench, filled

HERE = Path(__file__).parent
TINY = (str(HERE / "recipes" / "tiny.yaml"), "seeds=1", "compare.method=[ce, kd]", "steps=10")
REGISTRY = ("--registry", str(HERE / "registry"))


@pytest.mark.slow
def test_told_filled_used_and_cleared(kdbench: Kdbench, tmp_path: Path) -> None:
    home = {"KDBENCH_HOME": str(tmp_path / "home")}
    told = kdbench("logits", "fill", *TINY, *REGISTRY, "--estimate", **home).stdout
    assert "100 images × 1 view × 10 classes" in told and "MB" in told and "about" in told
    assert "pays" not in told, "10 steps of 64 images, for 100 views"
    few = kdbench("logits", "fill", *TINY[:-1], "steps=1", *REGISTRY, "--estimate", **home).stdout
    assert "shows the teacher 64 views, fewer than the 100 of the table" in few
    # One pass serves the methods of a seed, but not budgets that are compared.
    apart = ("compare.method=[kd, kd_only]", "compare.steps=[1, 2]")
    few = kdbench("logits", "fill", *TINY[:2], *apart, "data.per_class=20", *REGISTRY, "--estimate", **home).stdout
    assert "shows the teacher 192 views, fewer than the 200 of the table" in few
    # What a table is called is known once its teacher is trained.
    assert f"MB in {tmp_path / 'home' / 'teacher_logits'}: about" in told
    assert "no tables" in kdbench("logits", "ls", **home).stdout
    kdbench("logits", "fill", *TINY, "data.per_class=2", *REGISTRY, **home)
    assert "20 images" in kdbench("logits", "ls", **home).stdout
    kdbench("logits", "fill", *TINY, *REGISTRY, **home)
    complete = kdbench("logits", "fill", *TINY, *REGISTRY, **home).stdout
    assert "already complete" in complete
    assert kdbench("logits", "fill", *TINY, *REGISTRY, "--estimate", **home).stdout == complete
    assert "100 images" in kdbench("logits", "ls", **home).stdout
    kdbench("run", *TINY, *REGISTRY, **home)
    records = [filled(file) for file in (tmp_path / "runs" / "tiny").glob("*/record.json")]
    used = {record["cell"]["method"]: record["compute"]["teacher_logits"] for record in records}
    assert used == {"ce": "computed", "kd": "table"}
    # That is no difference between the methods.
    table = (tmp_path / "runs" / "tiny" / "table.md").read_text()
    assert "Teacher logits: from a table" in table and "mixed" not in table
    name = next((tmp_path / "home" / "teacher_logits").glob("*/table.json")).parent.name
    assert "removed" in kdbench("logits", "clear", name, **home).stdout
    assert "no tables" in kdbench("logits", "ls", **home).stdout


@pytest.mark.slow
def test_a_run_goes_on_computing_as_it_began(kdbench: Kdbench, tmp_path: Path) -> None:
    """What a trial chose once is taken for the cells that come later, whatever would be measured then."""
    kdbench("run", *TINY, *REGISTRY)
    kept = tmp_path / "runs" / "tiny" / "compute.json"
    choices = json.loads(kept.read_text())
    (key,) = choices
    assert "too short" in choices[key]["why"] and choices[key]["computing"]["precision"] == "float32"
    choices[key]["computing"]["layout"] = "channels_last"
    kept.write_text(json.dumps(choices))
    kdbench("run", *TINY[:1], "seeds=2", *TINY[2:], *REGISTRY)
    records = [filled(file) for file in (tmp_path / "runs" / "tiny").glob("*/record.json")]
    ways = {record["cell"]["seed"]: record["compute"]["layout"] for record in records}
    assert ways == {0: "contiguous", 1: "channels_last"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("logits", "clear"), "no tables are named"),
        (("logits", "clear", "nothing"), "there is no table 'nothing'"),
        (("logits", "fill", *TINY[:1], "compare.method=[ce]", *REGISTRY), "no method of this recipe uses"),
        (("run", *TINY, *REGISTRY, "compute=fast"), "'compute.mode' cannot be 'fast'"),
        (("run", *TINY, *REGISTRY, "compute.presicion=float32"), "unknown key 'presicion'"),
        (("run", *TINY, *REGISTRY, "compute.layout=nhwc"), "'compute.layout' cannot be 'nhwc'"),
    ],
)
def test_mistakes_are_told(kdbench: Kdbench, words: tuple[str, ...], message: str) -> None:
    done = kdbench(*words, code=2)
    assert message in done.stderr and "Traceback" not in done.stderr
