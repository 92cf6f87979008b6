"""What must be the same wherever one run computes."""

import hashlib
import importlib.metadata
import platform
from functools import cache

from kdbench.files import PACKAGE, SHARE
from kdbench.version import __version__


@cache
def versions() -> dict[str, str]:
    """Versions of kdbench, torch and Python, and the sum of kdbench's own files and cards."""
    digest = hashlib.sha256()
    for root, pattern in ((PACKAGE, "*.py"), (SHARE / "registry", "*.yaml")):
        for file in sorted(root.rglob(pattern)):
            digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return {
        "kdbench": __version__,
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "files": digest.hexdigest()[:12],
    }
