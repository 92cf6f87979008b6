"""What must be the same wherever one run computes."""

import hashlib
import importlib.metadata
import platform
from functools import cache
from pathlib import Path

from kdbench.files import PACKAGE, SHARE
from kdbench.version import __version__

# The only part that no worker reads: cells come to it resolved.
CARDS = "cards"


@cache
def versions() -> dict[str, str]:
    """Versions of kdbench, torch and Python, and the sums of kdbench's own files and of its cards."""
    return {
        "kdbench": __version__,
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "files": _sum(PACKAGE, "*.py"),
        CARDS: _sum(SHARE / "registry", "*.yaml"),
    }


def _sum(root: Path, pattern: str) -> str:
    digest = hashlib.sha256()
    for file in sorted(root.rglob(pattern)):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]
