"""What cells are hashed by: names that stay when code moves, versions of cards, the content of a user's own code."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdbench import own_code
from kdbench.engine.folders import open_cells
from kdbench.engine.workers.finished import names
from kdbench.errors import UserError
from kdbench.names import frozen
from kdbench.recipe.differences import differences
from kdbench.recipe.loading import recipe_names
from kdbench.recipe.planning import plan
from kdbench.recipe.recorded import NotHere, cell_of
from kdbench.recipe.specs import CellSpec, recorded
from kdbench.registry import SHARE, Registry
from kdbench.tree import Tree, shown
from kdbench.verify.verification import verify

IDENTITIES = Path(__file__).with_name("identities.yaml")
RESULTS = SHARE / "results"
REGISTRY = Registry()
RECIPE: dict[str, Any] = {"data": "digits", "teacher": "wrn_16_2_digits", "student": "wrn_10_1", "protocol": "digits"}
OWN_LOSS = "def mine(student_logits, labels, *, label: float = 1.0):\n    return label * student_logits.sum()\n"


def identities(recipe: str, registry: Registry) -> str:
    found = []
    for cell in plan(recipe, registry, ("seeds=1",), weights_must_exist=False).cells:
        found.append(cell.slug)
        spec: CellSpec | None = cell.spec
        while spec is not None:
            found.append(spec.identity())
            if spec.teacher is not None:
                found.append(spec.teacher.identity())
            spec = spec.teacher.trained_by if spec.teacher else None
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def one(registry: Registry = REGISTRY, **recipe: Any) -> CellSpec:
    (cell,) = plan({**RECIPE, "method": "kd", **recipe}, registry).cells
    return cell.spec


def with_text(change: Any, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The shipped registry with its files' text changed."""

    def read(file: Path) -> Tree:
        return Tree.parse(change(file.read_text(encoding="utf-8")), shown(file))

    with monkeypatch.context() as patch:
        patch.setattr(Tree, "read", read)
        return Registry()


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The shipped registry after every module went into a package of another name."""
    (tmp_path / "elsewhere").symlink_to(Path(own_code.__file__).parent)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(own_code, "_KNOWN_PACKAGES", (*own_code._KNOWN_PACKAGES, "elsewhere"))
    found = with_text(lambda text: text.replace("kdbench.", "elsewhere."), monkeypatch)
    assert found.card("losses", "kd").target == "elsewhere.losses.kd:kd"
    return found


def test_shipped_recipes_plan_the_cells_that_they_always_did() -> None:
    expected = yaml.safe_load(IDENTITIES.read_text(encoding="utf-8"))
    other = {name for name in recipe_names() if identities(name, REGISTRY) != expected.get(name)}
    assert not other, (
        f"cells of {sorted(other)} have other identities: finished ones will be trained again. If a recipe or a card "
        f"was meant to change, renew with: python tests/unit/{Path(__file__).name}"
    )


def test_a_moved_module_changes_no_identity(moved: Registry) -> None:
    """Among them is a card of each kind: models, losses with metrics, sources, operations, connectors and so on."""
    for name in ("ab_mobilenet", "deep_inversion_small", "prune_small", "uda_digits", "bss"):
        assert identities(name, moved) == identities(name, REGISTRY), name
    here, there = one(method="ab"), one(moved, method="ab")
    assert here != there
    assert recorded(here) == recorded(there)


def test_a_record_of_before_is_read_after_a_move(moved: Registry) -> None:
    folders = sorted({file.parent.parent for file in RESULTS.glob("*/*/record.json")})
    if not folders:
        pytest.skip("results/ is not beside the package")
    for folder in folders:
        # Of a newer card the key counts within this package alone; a cell of KD is there nearly always.
        files = sorted(folder.glob("*/record.json"), key=lambda file: (not file.parent.name.startswith("kd-"), file))
        record = json.loads(files[0].read_text(encoding="utf-8"))
        for registry in (REGISTRY, moved):
            spec = cell_of(record["spec"], registry, str(folder))
            assert spec.identity() == record["identity"]
            package = "kdbench" if registry is REGISTRY else "elsewhere"
            assert spec.student.target.split(".")[0] == package
        # What such a spec is written down as is what was read; later versions may say more of what they leave open.
        assert all(found is None for _, found, _ in differences(record["spec"], recorded(spec)))


def test_every_shipped_card_of_code_is_told_by_its_key() -> None:
    """Two new cards of one function would be two cells: one includes the other."""
    for kind, cards in REGISTRY.trees.items():
        kept = frozen().get(kind, {})
        new = [tree.data["target"] for key, tree in cards.items() if "target" in tree.data and key not in kept]
        assert len(new) == len(set(new)), f"{kind}: let one card include the other, in place of the same target twice"


@pytest.mark.parametrize("method", ["sp", "ickd", "mgd", "cwd"])
def test_the_last_layer_counts_as_the_number_that_methods_once_gave_it(method: str) -> None:
    """Finished cells of three stages count; in networks of four, layer3 is another hook point than the last one."""
    assert one(method=method).identity() == one(method={"name": method, "hook": "layer3"}).identity()
    four = {"student": "torchvision:resnet18"}
    others = [one(method=chosen, **four).identity() for chosen in (method, {"name": method, "hook": "layer3"})]
    assert others[0] != others[1]


def test_weights_kept_beside_the_last_ones_are_no_part_of_what_a_cell_is() -> None:
    assert one(keep="best").keep == "best" and one(keep="best").identity() == one().identity()


@pytest.mark.parametrize("kind", [kind for kind in frozen() if kind not in ("optimizers", "last_layers")])
def test_a_new_card_is_hashed_by_its_key_and_as_an_alias_by_the_older_one(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen key that is not in the table stands for a new card; its alias comes before it in the alphabet."""
    key = next(key for key in frozen()[kind] if "{" not in key)
    target, kept = REGISTRY.card(kind, key).target, frozen()[kind][key]
    without = {k: {n: name for n, name in names.items() if name != kept} for k, names in frozen().items()}
    monkeypatch.setattr("kdbench.names.frozen", lambda: without)
    new = Registry()
    named = next(k for k in new.keys(kind) if new.trees[kind][k].data.get("target") == target)
    assert new.code(kind, key)["counts_as"][target] == named
    # As long as it is in the table, whoever names the same code is that card.
    assert REGISTRY.code(kind, key)["counts_as"] == ({} if target == kept else {target: kept})


def test_a_version_that_was_raised_makes_other_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "target: kdbench.losses.kd:kd\n"
    raised = with_text(lambda text: text.replace(line, f"{line}  version: 2\n"), monkeypatch)
    assert one(raised).identity() != one().identity()
    assert one(raised, method="ce").identity() == one(method="ce").identity()
    with pytest.raises(NotHere, match="the loss 'kd' has version 2 here, and 1 in the record"):
        cell_of(recorded(one()), raised, "cell")
    assert cell_of(recorded(one(raised)), raised, "cell") == one(raised)


@pytest.mark.parametrize("method", ["ab", "bss", "uda", "prune", "deep_inversion"])
def test_what_is_recorded_is_read_back(method: str) -> None:
    methods = [name for name in REGISTRY.names("methods") if name.startswith(method)]
    for name in methods:
        same = {"student": "wrn_16_2"} if REGISTRY.card("methods", name).starts_from == "teacher" else {}
        spec = one(method=name, target="digits", **same)
        assert cell_of(json.loads(json.dumps(recorded(spec))), REGISTRY, "cell") == spec, name


def test_stages_and_losses_may_be_called_as_fields_of_specs(tmp_path: Path) -> None:
    (tmp_path / "cards.yaml").write_text(
        "methods: {strange: {title: S, stages: {counts_as: {share: 50%, losses: {options: {loss: kd}}}, "
        "target: {losses: {label: {loss: kd, hook: logits}, options: {loss: cross_entropy}}}}}}\n"
    )
    registry = Registry([tmp_path])
    spec = one(registry, method="strange")
    plain = recorded(spec)
    assert "counts_as" not in plain["method"]["stages"]["target"]["losses"]["options"]["loss"]
    assert "version" not in plain["method"]["stages"]["counts_as"]["losses"]["options"]["loss"]
    assert cell_of(plain, registry, "cell") == spec


# A user's own code.


def own(folder: Path, module: str = "mine_", text: str = OWN_LOSS, name: str = "mine", card: str = "") -> Registry:
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(text)
    (folder / "cards.yaml").write_text(
        f"losses: {{my_loss: {{target: '{module}:{name}', inputs: [student, labels]{card}}}}}\n"
        "methods: {my_method: {title: Mine, stages: {only: {losses: {mine: {loss: my_loss}}}}}}\n"
    )
    return Registry([folder])


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one name in several folders: nothing is remembered of the others."""
    monkeypatch.setattr("sys.path", list(sys.path))


def test_own_code_counts_by_its_content(tmp_path: Path, modules: None) -> None:
    twin = OWN_LOSS + OWN_LOSS.replace("mine", "twin")
    texts = {"first": OWN_LOSS, "renamed": OWN_LOSS, "both_a": twin, "both_b": twin}
    specs = {
        module: one(own(tmp_path / module, module, text, "twin" if module == "both_b" else "mine"), method="my_method")
        for module, text in texts.items()
    }
    found = {module: spec.identity() for module, spec in specs.items()}
    assert found["first"] == found["renamed"]
    assert len(set(found.values())) == 3
    assert recorded(specs["first"]) == recorded(specs["renamed"])
    # A record of before names the module.
    before = json.loads(json.dumps(recorded(specs["first"])))
    before["method"]["stages"]["only"]["losses"]["mine"]["loss"]["target"] = "first:mine"
    registry = Registry([tmp_path / "renamed"])
    assert cell_of(before, registry, "cell").identity() == found["renamed"]
    with pytest.raises(NotHere, match="unknown loss 'my_loss'") as absent:
        cell_of(before, REGISTRY, "cell")
    assert "--registry" in str(absent.value.hint)


def test_own_code_that_changed_is_not_the_record_s(tmp_path: Path, modules: None) -> None:
    spec = one(own(tmp_path / "a", "before_", OWN_LOSS), method="my_method")
    with pytest.raises(NotHere, match="the code of the loss 'my_loss' is not that of the record"):
        cell_of(recorded(spec), own(tmp_path / "b", "after_", OWN_LOSS + "\n"), "cell")


def test_verify_knows_cells_of_own_code_that_once_counted_by_its_module(tmp_path: Path, modules: None) -> None:
    recipe = RECIPE | {"method": "my_method"}
    registry = own(tmp_path / "cards", "place_")
    planned = plan(recipe, registry)
    spec = recorded(planned.cells[0].spec)
    spec["method"]["stages"]["only"]["losses"]["mine"]["loss"]["target"] = "place_:mine"
    identity = planned.cells[0].spec.identity(earlier=True)
    read = CellSpec.model_validate(spec)
    assert (read.identity(earlier=True), read.identity()) == (identity, planned.cells[0].spec.identity())
    assert identity != read.identity()
    assert recorded(read) == recorded(planned.cells[0].spec)
    template = next((RESULTS / "quickstart").glob("ce-seed0-*/record.json"), None)
    if template is None:
        pytest.skip("results/ is not beside the package")
    record = json.loads(template.read_text(encoding="utf-8"))
    cell = record["cell"] | names(planned, planned.cells[0])["cell"]
    record |= {"spec": spec, "identity": identity, "recipe": planned.name, "cell": cell}
    folder = tmp_path / f"my_method-seed0-{identity[:8]}"
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    run = {"name": planned.name, "title": "", "recipe": planned.recipe, "cells": [folder.name]}
    (tmp_path / "recipe.json").write_text(json.dumps(run), encoding="utf-8")
    found = {finding.what: finding.level for finding in verify(tmp_path, registry)}
    assert found["planned with the cards of today it gives these very cells"] == "agrees"
    assert found["what the records name are cards of this installation, as they are today"] == "agrees"
    # It is not trained again, nor counted as work that is left.
    assert open_cells(planned.cells, tmp_path) == [] and open_cells(planned.cells, tmp_path / "empty") == planned.cells
    # Without the registry it is said, and what to do.
    unchecked = [finding for finding in verify(tmp_path, REGISTRY) if finding.level == "unchecked" and finding.check]
    assert any("unknown loss 'my_loss'" in finding.what and "--registry" in finding.what for finding in unchecked)


def test_every_option_of_own_code_counts(tmp_path: Path, modules: None) -> None:
    """Also one that is called as a field which changes no number."""
    registry = own(tmp_path / "o", "options_")
    change = {"stages": {"only": {"losses": {"mine": {"label": 2.0}}}}}
    usual, other = (one(registry, method={"name": "my_method", **more}) for more in ({}, change))
    assert usual.identity() != other.identity()


def test_a_card_of_the_user_s_for_shipped_code_is_its_alias(tmp_path: Path) -> None:
    (tmp_path / "cards.yaml").write_text(
        "losses: {hinton: {target: 'kdbench.losses.kd:kd', inputs: [student, teacher]}}\n"
        "optimizers: {nadam: {target: 'torch.optim.nadam:NAdam'}}\n"
    )
    registry = Registry([tmp_path])
    shipped, alias = REGISTRY.code("losses", "kd"), registry.code("losses", "hinton")
    assert shipped == alias
    assert registry.code("optimizers", "nadam")["counts_as"] == {}


def test_what_a_weight_file_is_read_by_counts_by_content(tmp_path: Path, modules: None) -> None:
    found = []
    for number, text in enumerate(["def ours(state): return state\n", "def ours(state): return dict(state)\n"] * 2):
        folder = tmp_path / f"layout{number}"
        folder.mkdir()
        (folder / f"layout_{number}.py").write_text(text)
        (folder / "cards.yaml").write_text(
            # Two cards read one file in two ways.
            f"teachers: {{a: {{model: wrn_16_2, data: digits, weights: {{file: t.pt, sha256: {'a' * 64}}}}}, "
            "t: {model: wrn_16_2, data: digits, weights: "
            f"{{file: t.pt, sha256: {'a' * 64}, url: 'https://example.org', layout: 'layout_{number}:ours'}}}}}}\n"
        )
        spec = one(Registry([folder]), teacher="t")
        assert cell_of(recorded(spec), Registry([folder]), "cell") == spec
        found.append(spec.identity())
        with pytest.raises(UserError):
            cell_of(recorded(spec), REGISTRY, "cell")
    assert found[:2] == found[2:]
    assert found[0] != found[1]


if __name__ == "__main__":
    lines = [line for line in IDENTITIES.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    lines += [f"{name}: {identities(name, REGISTRY)}" for name in recipe_names()]
    IDENTITIES.write_text("\n".join(lines) + "\n", encoding="utf-8")
