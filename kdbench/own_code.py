"""The files that a user's own code stands in, and the hash by which cells count it."""

import ast
import functools
import hashlib
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

    Of one file it is the file's sha256. Files beside it that it imports count too. Of an installed package it is the
    target's file alone.
    """
    if target.partition(":")[0].split(".")[0] in _KNOWN_PACKAGES:
        return None
    first, *others = map(sha256_of, own_files(target).values())
    return hashlib.sha256("\n".join([first, *sorted(others)]).encode()).hexdigest() if others else first


def check_one_file(target: str, folders: Iterable[Path]) -> None:
    """Raises UserError where a target's module, or one that it imports, is not the file of that name in these folders:
    Python would run another registry's code, or a package's."""
    folders = list(folders)
    for module, taken in own_files(target).items() if folders else ():
        for folder in folders:
            file = module_at(folder.joinpath(*module.split(".")))
            if file is not None and file.resolve() != taken.resolve() and sha256_of(file) != sha256_of(taken):
                what = f"target '{target}': {file} would not be used, for Python takes {taken}"
                hint = "two modules must not have one name: rename the file, and the target in its card"
                raise UserError(what, hint=hint)


def own_files(target: str) -> dict[str, Path]:
    """The file of a target's module, and those in the same folder, or below it, that are imported with it.

    Imports are read, not run: a module that is imported by a computed name is not found. Empty files do not count.

    Returns:
        module -> the file that Python takes for it, the target's first.
    """
    module = target.partition(":")[0]
    file = source_file(module, target)
    found, waiting = {module: file}, [] if _installed(file) else [module]
    root = file.parents[module.count(".") + (file.stem == "__init__")]
    for name in waiting:
        for imported in [*_with_packages(name), *_imports(found[name], written(found[name]), name)]:
            if imported in found or module_at(root.joinpath(*imported.split("."))) is None:
                continue
            try:
                taken = source_file(imported, target)
            except (UserError, ValueError):
                continue
            if taken.is_file() and not _installed(taken):
                found[imported] = taken
                waiting.append(imported)
    return {name: file for name, file in found.items() if name == module or file.stat().st_size}


def _installed(file: Path) -> bool:
    """Whether a file is of an installed package, or one of Python's own."""
    file = file.resolve()
    return _PYTHONS_OWN in file.parents or not {"site-packages", "dist-packages"}.isdisjoint(file.parts)


def _with_packages(module: str) -> Iterator[str]:
    """The packages that Python imports before a module, and the module."""
    parts = module.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


@functools.cache
def _imports(file: Path, of: tuple[int, int], module: str) -> list[str]:
    """The modules that a file's imports may name, packages among them: `from a import b` may name a module `a.b`."""
    try:
        tree = ast.parse(importlib.util.decode_source(file.read_bytes()))
    except (SyntaxError, ValueError):
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
