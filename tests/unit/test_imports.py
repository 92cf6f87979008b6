"""How the package hangs together: who may import whom, and how large a file, a function or a class may be.

What an import needs counts wherever it stands: at the top, inside a function, under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

import pytest
from conftest import ROOT

PACKAGE = ROOT / "kdbench"

# From the top floor down (DESIGN.md, section 3). Modules of one line stand side by side.
FLOORS = (
    ("cli",),
    ("api",),
    ("bench",),
    ("verify",),
    ("results",),
    ("methods",),
    ("engine.workers",),
    ("engine",),
    ("record", "record_derived", "record_parts"),
    ("recipe",),
    ("registry", "cards", "image_cards", "published", "forms"),
    ("models",),
    ("data",),
    ("losses",),
)
# May be imported by all, and import only each other.
GROUND = [
    "errors",
    "files",
    "reading",
    "tree",
    "validation",
    "signature",
    "own_code",
    "schedules",
    "told",
    "names",
    "drawing",
    "version",
]
# Mistakes are told before torch is loaded (CONTRIBUTING.md), which takes seconds.
WITHOUT_TORCH = ("cli", "recipe", "registry", "results", "record")
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, ATTRIBUTES_OF_A_CLASS = 400, 60, 15


@cache
def modules() -> dict[str, ast.Module]:
    """Name (`kdbench.recipe.choices`) -> the parsed file."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def imported(tree: ast.Module, known: dict[str, ast.Module]) -> set[str]:
    """Modules of the package that a module imports anywhere in its text."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written out from 'kdbench'"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in full}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known.keys()


def edges(known: dict[str, ast.Module]) -> dict[str, set[str]]:
    return {name: imported(tree, known) - {name} for name, tree in known.items()}


def needed_at_once(tree: ast.Module) -> set[str]:
    """What a module imports as soon as it is imported itself, by its full name, from wherever it is."""
    found: set[str] = set()
    waiting: list[ast.AST] = [*tree.body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif not isinstance(node, ast.FunctionDef) and not (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            waiting += ast.iter_child_nodes(node)
    return found


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Strongly connected components of more than one module: such as need each other."""

    @cache
    def reached(start: str) -> frozenset[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return frozenset(seen)

    found = (frozenset(b for b in reached(a) if a in reached(b)) for a in graph)
    return {circle for circle in found if circle}


def height(module: str) -> int:
    """Floor of a module, 0 for the ground."""
    _, _, below = module.partition(".")
    part, *inner = below.split(".")
    if part in ("", "__main__"):
        return len(FLOORS)
    if part in GROUND:
        return 0
    folder = ".".join([part, *inner[:1]])
    found = [i for i, floor in enumerate(reversed(FLOORS), start=1) if {part, folder} & {*floor}]
    assert found, f"'{part}' is on no floor: name it in FLOORS"
    return found[-1]


def named(tree: ast.Module, kinds: tuple[type[ast.AST], ...]) -> Iterator[tuple[str, ast.AST]]:
    """All definitions of some kinds with their dotted names."""

    def walk(node: ast.AST, path: tuple[str, ...]) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            inside = path
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inside = (*path, child.name)
                if isinstance(child, kinds):
                    yield ".".join(inside), child
            yield from walk(child, inside)

    return walk(tree, ())


def attributes(node: ast.AST) -> set[str]:
    """What an instance holds: fields, cached properties, and all that is assigned to `self`."""
    assert isinstance(node, ast.ClassDef)
    found = {
        item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    for inner in ast.walk(node):
        if (
            isinstance(inner, ast.Attribute)
            and isinstance(inner.ctx, ast.Store)
            and isinstance(inner.value, ast.Name)
            and inner.value.id == "self"
        ):
            found.add(inner.attr)
        if isinstance(inner, ast.FunctionDef) and any(
            "cached_property" in ast.unparse(d) for d in inner.decorator_list
        ):
            found.add(inner.name)
    return found


def lines(node: ast.AST) -> int:
    assert isinstance(node, ast.stmt) and node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_nothing_is_imported_from_a_higher_floor() -> None:
    found = {
        (importer, name)
        for importer, names in edges(modules()).items()
        for name in names
        if height(name) > height(importer)
    }
    assert not sorted(found), "move what both need to a lower floor"


def test_no_two_files_need_each_other() -> None:
    found = [sorted(circle) for circle in circles(edges(modules()))]
    assert not found, "give what they share a file of its own"


def test_what_says_so_imports_no_torch() -> None:
    known = modules()
    at_once = {name: needed_at_once(tree) for name, tree in known.items()}
    heavy = {name for name, needs in at_once.items() if {one.partition(".")[0] for one in needs} & {"torch", "timm"}}
    while more := {name for name, needs in at_once.items() if needs & heavy} - heavy:
        heavy |= more
    promised = {name for name, tree in known.items() if "imports no torch" in (ast.get_docstring(tree) or "").lower()}
    promised |= {name for name in known if name.split(".")[1:2] and name.split(".")[1] in WITHOUT_TORCH}
    assert {"kdbench.engine.step", "kdbench.engine.workers.tasks"} <= heavy and len(promised) > 60
    assert not sorted(promised & heavy), "import torch in the function that needs it"


def test_no_file_is_longer_than_one_can_read() -> None:
    count = {str(f.relative_to(ROOT)): len(f.read_text(encoding="utf-8").splitlines()) for f in PACKAGE.rglob("*.py")}
    assert not sorted((n, name) for name, n in count.items() if n > LINES_OF_A_FILE)


def test_no_function_is_longer_than_a_screen() -> None:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    count = {f"{m}.{name}": lines(node) for m, tree in modules().items() for name, node in named(tree, functions)}
    assert not sorted((n, name) for name, n in count.items() if n > LINES_OF_A_FUNCTION)


def test_no_class_of_the_engine_holds_everything() -> None:
    engine = {m: tree for m, tree in modules().items() if m.startswith("kdbench.engine")}
    count = {
        f"{m}.{name}": len(attributes(node))
        for m, tree in engine.items()
        for name, node in named(tree, (ast.ClassDef,))
    }
    assert not sorted((n, name) for name, n in count.items() if n > ATTRIBUTES_OF_A_CLASS)


@pytest.mark.parametrize(
    "text",
    [
        "import kdbench.b",
        "from kdbench import b",
        "from kdbench.b import thing",
        "def f():\n    from kdbench.b import thing",
        "if TYPE_CHECKING:\n    from kdbench.b import Thing",
    ],
)
def test_imports_are_seen_wherever_they_stand(text: str) -> None:
    known = {"kdbench": ast.parse(""), "kdbench.a": ast.parse(text), "kdbench.b": ast.parse("import kdbench.a")}
    assert edges(known)["kdbench.a"] == {"kdbench.b"}
    assert circles(edges(known)) == {frozenset({"kdbench.a", "kdbench.b"})}
