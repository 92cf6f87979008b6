"""Finished cells and trained teachers count for the data and the weights of their records; published tables grow."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from picture_files import write_pictures

import kdbench
from kdbench.cli.output import write_tables
from kdbench.engine.options import Listener, Options
from kdbench.engine.workers.runner import Outcome, run
from kdbench.errors import UserError
from kdbench.files import LOGITS
from kdbench.recipe.planning import plan
from kdbench.record import read_record
from kdbench.registry import Registry
from kdbench.verify.adopting import published
from kdbench.verify.publishing import publish
from kdbench.verify.verification import verify

pytestmark = pytest.mark.slow

CARDS = """
datasets:
  mine:
    target: "kdbench.data.folder:load"
    args: {folder: mine}
    title: Mine
    classes: 3
    channels: 3
    image_size: 32
    train: 15
    test: 6
    normalization: {mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
teachers:
  mine_wrn: {model: wrn_10_1, data: mine, recipe: ../teacher.yaml}
"""
BOTH = "data: mine\nstudent: wrn_10_1\nprotocol: {name: digits, batch_size: 5}\nevaluations: 1\ncompute: reference\n"


class Told(Listener):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


class Lab:
    """A folder with pictures, a recipe with a teacher of its own, and runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs, self.results = folder / "runs", folder / "results"
        self.registry = Registry([folder / "cards"])

    def go(self, *overrides: str) -> tuple[Outcome, list[str]]:
        """Run the recipe, with what is published."""
        told, planned = Told(), plan(self.folder / "recipe.yaml", self.registry, overrides)
        options = Options(
            runs=self.runs, jobs=1, threads=1, device="cpu", data_roots=(self.folder / "data",),
            registries=(self.folder / "cards",),
        )  # fmt: skip
        place = self.results / planned.name
        outcome = run(planned, options, told, place, published(planned, place))
        # A teacher of three steps is near chance, and that is told.
        return outcome, [said for said in told.said if "near chance" not in said]

    def publish(self, cells: list[Path]) -> Path:
        """Publish the run with the table of its cells."""
        write_tables(cells, self.runs / "recipe", [])
        return publish(self.runs / "recipe", self.results)

    def files(self) -> dict[str, Any]:
        return {str(f): f.stat().st_mtime_ns for f in self.runs.rglob("*.safetensors")}

    def fingerprint(self) -> str:
        return read_record(next(self.runs.glob("recipe/*/record.json"))).data.fingerprint[:12]

    def teacher(self) -> Path:
        return next(self.runs.glob("teachers/*/student.safetensors"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    (folder / "cards").mkdir()
    (folder / "cards" / "cards.yaml").write_text(CARDS)
    (folder / "teacher.yaml").write_text(f"{BOTH}method: ce\nsteps: 3\n")
    (folder / "recipe.yaml").write_text(f"{BOTH}method: kd\nsteps: 2\nteacher: mine_wrn\n")
    write_square(folder / "data" / "mine")
    lab = Lab(folder)
    outcome, said = lab.go()
    assert len(outcome.finished) == 1 and said == []
    return folder


def write_square(root: Path) -> None:
    """Pictures of 32 × 32 pixels."""
    from PIL import Image

    write_pictures(root)
    for file in root.rglob("*.jpg"):
        Image.open(file).resize((32, 32)).save(file)


@pytest.fixture
def lab(finished: Path, tmp_path: Path) -> Lab:
    """A copy of it to spoil."""
    return Lab(Path(shutil.copytree(finished, tmp_path / "lab")))


def test_pictures_that_change_places_are_noticed(lab: Lab) -> None:
    """As many pictures of every class as before: the card fits, only the fingerprint tells."""
    was, files = lab.fingerprint(), lab.files()
    one, two = (lab.folder / "data" / "mine" / "train" / name / "0.jpg" for name in ("c0", "c1"))
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)
    with pytest.raises(UserError, match=f"cell finished before was made from other data: .*{was}") as error:
        lab.go("seeds=2")
    assert "kd-seed0-" in str(error.value.where) and lab.files() == files
    # The cells are gone: their teacher knows the old labels.
    shutil.rmtree(lab.runs / "recipe")
    with pytest.raises(UserError, match=f"the teacher 'mine_wrn' was trained on other data: .*{was}"):
        lab.go()


def test_a_finished_run_needs_no_data_and_says_that_it_did_not_look(lab: Lab) -> None:
    (lab.folder / "data").rename(lab.folder / "away")
    outcome, said = lab.go()
    assert len(outcome.finished) == 1
    assert len(said) == 1 and "not compared with the data 'mine': there is no image folder" in said[0]


def test_a_run_and_a_published_table_grow_by_what_is_compared(lab: Lab) -> None:
    """A cell is not trained again because its folder is named after another comparison."""
    (first,) = lab.go()[0].finished
    outcome, _ = lab.go("compare.steps=[2, 3]")
    assert outcome.finished[0] == first and len(list(lab.runs.glob("recipe/kd-*"))) == 2
    assert [read_record(folder).cell.axes["steps"] for folder in outcome.finished] == [2, 3]
    made = lab.publish(outcome.finished)
    assert {finding.level for finding in verify(made, lab.registry, [lab.folder / "data"])} == {"agrees"}
    shutil.rmtree(lab.runs / "recipe")
    assert f"1 cell taken from {made}" in lab.go("steps=3")[1][0]
    assert f"1 cell taken from {made}" in lab.go("compare.steps=[2, 3]")[1][0]
    assert not list(lab.runs.glob("recipe/kd-*/student.safetensors")), "nothing is trained"


def test_a_published_table_grows_by_seeds(lab: Lab) -> None:
    """And on the way: flipped bytes of the teacher, a damaged checkpoint."""
    made = lab.publish([next(lab.runs.glob("recipe/kd-*"))])
    shutil.rmtree(lab.runs / "recipe")
    weights = lab.teacher().read_bytes()
    lab.teacher().write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(UserError, match="these weights are not those of their record"):
        lab.go("seeds=2")
    lab.teacher().write_bytes(weights)
    second = lab.runs / "recipe" / plan(lab.folder / "recipe.yaml", lab.registry, ("seeds=2",)).cells[1].slug
    second.mkdir(parents=True, exist_ok=True)
    (second / "checkpoint.pt").write_bytes(b"half of it")
    outcome, said = lab.go("seeds=2")
    assert len(outcome.finished) == 2
    assert {file.parent for file in second.parent.rglob("student.safetensors")} == {second}, "the first is not trained"
    assert f"1 cell taken from {made}" in said[0] and "KD, seed 1: its checkpoint is damaged: set aside" in said[1]
    lab.publish(outcome.finished)
    # Fewer seeds do not take the place of more, unless it is said.
    assert len(lab.go()[0].finished) == 1
    with pytest.raises(UserError, match="not in this run: 1 of 2 cells published there, kd-seed1"):
        lab.publish([outcome.finished[0]])
    assert len(lab.go("seeds=2")[0].finished) == 2
    lab.publish(outcome.finished)
    for folder in (made, lab.runs / "recipe"):
        assert {finding.level for finding in verify(folder, lab.registry, [lab.folder / "data"])} == {"agrees"}
        # Where the data are not at hand, accuracies are not counted again, and that is said.
        assert {finding.where for finding in verify(folder, lab.registry) if finding.level == "unchecked"} == {LOGITS}
    assert len(list(made.glob("kd-*/test_logits.safetensors"))) == 2, "those of the first came along"
    assert len(list(made.glob("kd-*"))) == 2 and (made / "teacher" / "record.json").is_file()
    # For use, a record without weights is not finished, nor is one with others.
    with pytest.raises(UserError, match="no weights of this cell's student"):
        kdbench.load_student(next(lab.runs.glob("recipe/kd-seed0-*")), [lab.folder / "cards"])
    student = second / "student.safetensors"
    assert kdbench.load_student(second, [lab.folder / "cards"])
    student.write_bytes(student.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="these weights are not those of their record"):
        kdbench.load_student(second, [lab.folder / "cards"])
