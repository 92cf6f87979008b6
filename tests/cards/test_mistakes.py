"""Bad input gives one clear message: what, where, what to do; and before torch is imported where cards can tell."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from card_checks import check_card
from shipped import REGISTRY

from kdbench.cards import KINDS
from kdbench.errors import UserError
from kdbench.files import SHARE
from kdbench.recipe.loading import recipe_names
from kdbench.recipe.planning import plan
from kdbench.registry import Registry
from kdbench.tree import Tree, walk

METHODS = REGISTRY.names("methods")
RECIPE = """\
data: {name: digits, per_class: 10}
teacher: wrn_16_2_digits
student: wrn_10_1
protocol: digits
steps: 20
compare:
  method: [ce, kd, ab]
"""


def stages(text: str) -> tuple[str, str]:
    """An old and a new text that say something of the stages of all methods."""
    return "steps: 20", f"steps: 20\nmethod: {{stages: {{{text}}}}}"


# The mistakes that the leading framework lets pass or reports late and deep, carried over to recipes and cards:
# (old text, new text, what the message must hold, line of the mistake).
MISTAKES = [
    ("protocol: digits", "protocol: {name: digits, schedular: {name: cosine}}", "unknown key 'schedular'|schedule", 4),
    (*stages("classification: {trian: [student]}"), "unknown key 'trian'|trains", 6),
    (*stages("classification: {mods: {teacher: eval}}"), "unknown key 'mods'|modes", 6),
    ("protocol: digits", "protocol: digits\nwrapper: DistributedDataParalel", "unknown key 'wrapper'", 5),
    ("protocol: digits", "protocol: {name: digits, optimizer: {momentun: 0.9}}", "unknown key 'momentun'|momentum", 4),
    (*stages("boundaries: {losses: {boundary: {hok: layer1}}}"), "unknown key 'hok'|hook", 6),
    (
        "teacher: wrn_16_2_digits",
        "teacher: {model: wrn_16_2, weights: nowhere.pt}",
        "no weight file 'nowhere.pt'|KDBENCH_WEIGHTS",
        2,
    ),
    ("protocol: digits", "protocol: {name: digits, schedule: {at: '60,120'}}", "cannot be '60,120'|list[str]", 4),
    ("protocol: digits", "protocol: {name: digits, schedule: {at: ['60', '120']}}", "written like '30%'", 4),
    (*stages("classification: {optimiser: {lr: 0.01}}"), "unknown key 'optimiser'|optimizer", 6),
    ("[ce, kd, ab]", "[{name: kd, temprature: 2}]", "unknown key 'temprature'|temperature", 7),
    ("protocol: digits", "protocol: {name: digits, optimizer: {lrr: 0.1}}", "unknown key 'lrr'|lr", 4),
    (*stages("classification: {losses: {kd: {wieght: 0.9}}}"), "unknown key 'wieght'|weight", 6),
    ("protocol: digits", "protocol: {name: digits, optimizer: {lr: '0.1'}}", "cannot be '0.1'|without quotes", 4),
    ("data: {name: digits, per_class: 10}\n", "", "the key 'data' is missing|add 'data:'", 1),
    ("student: wrn_10_1\n", "", "the key 'student' is missing", 1),
    ("teacher: wrn_16_2_digits\n", "", "needs a teacher|add 'teacher:'", 1),
    ("name: digits", "name: digit", "unknown data set 'digit'|digits", 1),
    ("data:", "dta:", "unknown key 'dta'|data", 1),
    (*stages("boundaries: {losses: {boundary: {hook: layer9}}}"), "no hook point 'layer9'|layer", 6),
    (
        *stages("boundaries: {losses: {boundary: {loss: activation_bundary}}}"),
        "unknown loss 'activation_bundary'|activation_boundary",
        6,
    ),
    ("compare:\n  method: [ce, kd, ab]\n", "", "the recipe names no method|method: kd", 1),
    ("protocol: digits", "protocol: {name: digits, optimizer: {name: sdg, lr: 0.1}}", "unknown optimizer 'sdg'|sgd", 4),
    ("student: wrn_10_1", "student: wrn10_1", "unknown model 'wrn10_1'|wrn_10_1", 3),
    ("[ce, kd, ab]", "[ce, kd, abb]", "unknown method 'abb'|ab", 7),
    ("steps: 20", "steps: many", "'steps' cannot be|number", 5),
    ("steps: 20", "steps: '20'", "write a number without quotes", 5),
    ("per_class: 10", "fraction: '0,5'", "without commas, with a decimal point", 1),
    ("per_class: 10", "fraction: 50%", "a number without %", 1),
    ("protocol: digits", "protocol: {name: digits, optimizer: {lr: '0,1'}}", "without commas, with a decimal point", 4),
    ("[ce, kd, ab]", "kd", "'compare.method' needs a list|method: [A, B]", 7),
    ("steps: 20", "steps: 20\nepochs: 3", "either 'epochs' or 'steps'", 1),
    ("steps: 20", "steps: 20\nsteps: 30", "given twice", 6),
    ("protocol: digits", "protocol: digit", "unknown protocol 'digit'|digits", 4),
    ("per_class: 10", "fraction: 1.5", "less than or equal to 1", 1),
    ("compare:", "compare:\n  studnet: [wrn_10_1]", "unknown path 'studnet'|student", 7),
    ("compare:", "compare:\n  method.margn: [1.0, 2.0]", "has 'margn'|margin", 7),
    ("steps: 20", "steps: [20", "not valid YAML", 6),
    (*stages("boundaries: {losses: {boundary: {connector: {name: conv1x1_bn, bais: true}}}}"), "unknown key 'bais'", 6),
]


@pytest.mark.parametrize(("old", "new", "expected", "line"), MISTAKES, ids=[expected for *_, expected, _ in MISTAKES])
def test_mistake_is_told_with_file_and_line(old: str, new: str, expected: str, line: int, tmp_path: Path) -> None:
    assert RECIPE.count(old) >= 1
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        plan(tmp_path / "recipe.yaml", REGISTRY)
    assert all(part in str(error.value) for part in [*expected.split("|"), f"recipe.yaml:{line}"]), error.value


def test_the_recipe_without_a_mistake_is_planned(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert len(plan(tmp_path / "recipe.yaml", REGISTRY).cells) == 3


def test_mistake_on_the_command_line_leaves_with_2_before_torch(tmp_path: Path) -> None:
    """Exit code 2, one message, no traceback; and torch, which takes seconds, was not imported for it."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("steps", "step"))
    code = (
        "import sys; from kdbench.cli import main\ntry: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "recipe.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: recipe.yaml:5: unknown key 'step'")
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().endswith("False")
    assert not (tmp_path / "runs").exists()


def keys_of(data: object) -> list[tuple[Any, ...]]:
    """Paths of all mapping keys, through lists too."""
    return [path for path in walk(data) if path and isinstance(path[-1], str)]


def misspelt(data: object, path: tuple[str | int, ...]) -> object:
    """A deep copy with one key misspelt: two letters exchanged, or the last one doubled."""
    if isinstance(data, list):
        return [misspelt(v, path[1:]) if i == path[0] else v for i, v in enumerate(data)]
    assert isinstance(data, dict)
    if len(path) == 1:
        return {(wrong(k) if k == path[0] else k): v for k, v in data.items()}
    return {k: misspelt(v, path[1:]) if k == path[0] else v for k, v in data.items()}


def wrong(key: str) -> str:
    other = key[0] + key[2:3] + key[1] + key[3:] if len(key) > 2 else key[::-1]
    return other if other != key else key + key[-1]


def is_defined_here(path: tuple[str | int, ...], kind: str) -> bool:
    """Whether a key is a name that its author chooses, not a word of kdbench: nothing can tell that it is misspelt."""
    parent = path[-2] if len(path) > 1 else None
    return (
        parent in ("parameters", "metrics", "profiles")
        or (parent in ("losses", "stages") and kind in ("methods", "recipes"))
        or (parent in ("pairs", "methods") and kind == "published")
        # Of a timm model: timm says which there are, when the network is built.
        or path[-3:-1] == ("student", "options")
    )


def place(path: tuple[str | int, ...], kind: str) -> tuple[str, ...]:
    """Where a key stands, whatever names its author chose on the way to it and wherever in a list. What is tuned is
    told in one place of any method and parameter, as `at.beta`."""
    tuned = [key for key in path if str(key).partition(".")[0] in METHODS and "." in str(key)]
    chosen = [
        isinstance(key, int) or key in tuned or is_defined_here(path[: i + 1], kind) for i, key in enumerate(path)
    ]
    return tuple("*" if own else str(key) for key, own in zip(path, chosen, strict=True))


def first_of_each_place(found: Iterable[tuple[str, str, tuple[str, ...]]]) -> list[tuple[str, str, tuple[str, ...]]]:
    """What holds for a key in one recipe or card holds in all that have it in the same place: one of them is tried."""
    firsts: dict[Any, tuple[str, str, tuple[str, ...]]] = {}
    for kind, file, path in found:
        firsts.setdefault((kind, place(path if kind == "recipes" else ("*", *path[1:]), kind)), (kind, file, path))
    return list(firsts.values())


RECIPES = first_of_each_place(
    ("recipes", name, path)
    for name in recipe_names()
    for path in keys_of(yaml.safe_load((SHARE / "recipes" / f"{name}.yaml").read_text()))
    if not is_defined_here(path, "recipes")
)


@pytest.mark.parametrize(
    ("name", "path"),
    [parts[1:] for parts in RECIPES],
    ids=[f"{name}-{'.'.join(map(str, path))}" for _, name, path in RECIPES],
)
def test_every_key_of_recipes_misspelt_is_an_error(name: str, path: tuple[str, ...], tmp_path: Path) -> None:
    data = yaml.safe_load((SHARE / "recipes" / f"{name}.yaml").read_text())
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(misspelt(data, path), sort_keys=False))
    with pytest.raises(UserError) as error:
        plan(file, REGISTRY)
    assert str(error.value)


CARDS = first_of_each_place(
    (kind, str(file.relative_to(SHARE)), path)
    for kind in KINDS
    for file in sorted((SHARE / "registry" / kind).glob("*.yaml"))
    for path in keys_of(yaml.safe_load(file.read_text()))
    if len(path) > 1 and not is_defined_here(path, kind)
)


@pytest.mark.parametrize(
    ("kind", "file", "path"), CARDS, ids=[f"{kind}-{'.'.join(map(str, path))}" for kind, _, path in CARDS]
)
def test_every_key_of_cards_misspelt_is_an_error(kind: str, file: str, path: tuple[str, ...]) -> None:
    data = yaml.safe_load((SHARE / file).read_text())
    changed = misspelt(data, path)
    assert isinstance(changed, dict)
    name = path[0]
    original = REGISTRY.trees[kind][name]
    REGISTRY.trees[kind][name] = Tree.of(changed[name], f"{file}:1")
    try:
        with pytest.raises(UserError):
            use(REGISTRY, kind, name)
    finally:
        REGISTRY.trees[kind][name] = original


PARAMETERS: dict[str | tuple[str, ...], str | None] = {
    "stages.only.losses.kd.temperature": None,
    "stages.only.losses.kd.weight": None,
    "stages.only.losses.kd.temprature": "temperature",
    "stages.only.losses.kt.temperature": "points to nothing",
    "stages.only.optimizer.momentum": None,
    "stages.only.optimizer.momentun": "momentum",
    "stages.only.modes.teacher": None,
    "stages.only.batch_norm.data": None,
    "stages.only.batch_norm.other": "data",
    "stages.first.modes.teacher": "points to nothing",
    "stages.only.anchors.n": "points to nothing",
    "stages.only": "points to nothing",
    # One name for several places.
    ("stages.only.losses.kd.temperature", "stages.only.losses.kd.weight"): None,
    ("stages.only.losses.kd.temperature", "stages.only.losses.kd.wieght"): "weight",
    "title": "points to nothing",
}


@pytest.mark.parametrize(("path", "hint"), PARAMETERS.items())
def test_a_parameter_of_a_method_card_points_to_something(
    path: str | tuple[str, ...], hint: str | None, tmp_path: Path
) -> None:
    stage = {"name": "only", "optimizer": {"name": "sgd", "lr": 0.1}, "losses": {"kd": {"loss": "kd"}}}
    stage |= {"modes": {"teacher": "train"}, "batch_norm": {"data": "frozen"}}
    card = {"title": "Mine", "parameters": {"short": path if isinstance(path, str) else [*path]}, "stages": [stage]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"methods": {"mine": card}}, sort_keys=False))
    registry = Registry([tmp_path])
    if hint is None:
        check_card(registry, "methods", "mine")
        return
    with pytest.raises(UserError, match="the parameter 'short' points to nothing") as error:
        check_card(registry, "methods", "mine")
    assert hint in str(error.value) and "mine.yaml:5" in str(error.value)


def use(registry: Registry, kind: str, name: str) -> None:
    """Check a card as thoroughly as using it does, without torch."""
    examples = registry.trees[kind][name].data.get("examples", []) if "{" in name else [name]
    if not examples:
        raise UserError("a template needs examples")
    for example in examples:
        check_card(registry, kind, example)
