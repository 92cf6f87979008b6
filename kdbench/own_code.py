"""The files that a user's own code stands in, and the hash by which cells count it."""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from kdbench.errors import UserError
from kdbench.files import sha256_of
from kdbench.signature import module_at, source_file, written

# Packages whose versions a record names: their files need no hash of their own.
_KNOWN_PACKAGES = ("kdbench", "torch", "torchvision", "timm")
_PYTHONS_OWN = Path(sysconfig.get_path("stdlib")).resolve()


def own_code_sha256(target: str) -> str | None:
    """A hash of the code of a target of the user's own; None for what kdbench and torch bring.

    Of one file it is the file's sha256. Files that it imports count too: those in the same folder or below it, or those
    of its package, where that is installed and offers cards. Of others that are installed, the target's file alone.
    """
    if _top(target) in _KNOWN_PACKAGES:
        return None
    (_, (_, file)), *others = _beside(target).items()
    installed, sha256 = _installed(file), sha256_of(file)
    own = {name: taken for name, (_, taken) in others if _installed(taken) == installed and taken.stat().st_size}
    lines = [sha256, *sorted(f"{name} {sha256_of(taken)}" for name, taken in own.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if own else sha256


def check_one_file(target: str, folders: Iterable[Path]) -> None:
    """Raises UserError where a target's module, or one beside it that it imports, is not the file of that name in these
    folders: Python would run another registry's code, or a package's."""
    folders = list(folders)
    for module, (there, taken) in _beside(target).items() if folders else ():
        for file in (there, *(module_at(folder.joinpath(*module.split("."))) for folder in folders)):
            if file is not None and file.resolve() != taken.resolve() and sha256_of(file) != sha256_of(taken):
                what = f"target '{target}': {file} would not be used, for Python takes {taken}"
                hint = "two modules must not have one name: rename the file, and the target in its card"
                raise UserError(what, hint=hint)


def _beside(target: str) -> dict[str, tuple[Path, Path]]:
    """A target's module, and those that are imported with it and have a file in the same folder or below it.

    Imports are read, not run: a module that is imported by a computed name is not found. Names of Python's own modules
    are taken for these.

    Returns:
        module -> (the file there, the file that Python takes for it), the target's first.
    """
    module, top = target.partition(":")[0], _top(target)
    file = source_file(module, target)
    found, installed = {module: (file, file)}, _installed(file)
    if top in _KNOWN_PACKAGES or (installed and top not in _packages_with_cards()):
        return found
    root = file.parents[module.count(".") + (file.stem == "__init__")]
    waiting = [module]
    for name in waiting:
        of = found[name][0]
        for imported in [*_with_packages(name), *_imports(of, written(of), name)]:
            foreign = _top(imported) in _KNOWN_PACKAGES or (installed and _top(imported) != top)
            there = None if imported in found or foreign else module_at(root.joinpath(*imported.split(".")))
            if there is None:
                continue
            try:
                taken = source_file(imported, target)
            except (UserError, ImportError, ValueError):
                continue
            if taken.is_file() and (_installed(taken) or _PYTHONS_OWN not in taken.resolve().parents):
                found[imported] = there, taken
                waiting.append(imported)
    return found


def _top(target: str) -> str:
    return target.partition(":")[0].partition(".")[0]


def _installed(file: Path) -> bool:
    """Whether a file is of an installed package, be it a link into an installer's cache."""
    return not {"site-packages", "dist-packages"}.isdisjoint((*file.parts, *file.resolve().parts))


@functools.cache
def _packages_with_cards() -> frozenset[str]:
    return frozenset(_top(point.value) for point in importlib.metadata.entry_points(group="kdbench.registry"))


def _with_packages(module: str) -> Iterator[str]:
    """The packages that Python imports before a module, and the module."""
    parts = module.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


@functools.cache
def _imports(file: Path, of: tuple[int, int], module: str) -> list[str]:
    """The modules that a file's imports may name, packages among them: `from a import b` may name a module `a.b`."""
    try:
        tree = ast.parse(importlib.util.decode_source(file.read_bytes()))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # Whoever imports it is told.
        return []
    found: list[str] = []
    package = module.split(".") if file.stem == "__init__" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)] if base else []
    return list(dict.fromkeys(name for one in found for name in _with_packages(one)))
